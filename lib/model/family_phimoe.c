/* Phi-3.5-MoE, Phi-mini-MoE, Phi-tiny-MoE: LayerNorm with biases, biases on attention and head, longrope; sparsemixer
 * chooses two experts one after the other, their weights are not divided by their sum. */
#include "model/family_names.h"

const moec_family moec_family_phimoe = {
    .model_type = "phimoe",
    .architecture = "PhimoeForCausalLM",
    .source = "Phi-3 Technical Report, arXiv:2404.14219; SparseMixer, arXiv:2310.00811; transformers 5.23 modeling_phimoe",
    .models = "Phi-3.5-MoE, Phi-mini-MoE, Phi-tiny-MoE",
    .key_experts = {"num_local_experts"},
    .key_top_k = {"num_experts_per_tok"},
    .key_expert_width = {"intermediate_size"},
    .default_experts = 16,
    .default_top_k = 2,
    MOEC_NAMES_ENDS,
    .final_norm_bias = "model.norm.bias",
    .mat = {MOEC_NAMES_QKVO, [MOEC_MAT_ROUTER] = P "block_sparse_moe.gate.weight|" P "mlp.router.weight"},
    .vec = {MOEC_NAMES_NORMS, [MOEC_VEC_NORM_ATTN_BIAS] = P "input_layernorm.bias",
            [MOEC_VEC_NORM_MLP_BIAS] = P "post_attention_layernorm.bias"},
    .experts = {MOEC_EXPERTS_W123("block_sparse_moe."), MOEC_EXPERTS_JOINED("mlp.")},
    .default_kv_heads = 8,
    .default_rope_theta = 1e6,
    .default_norm_eps = 1e-5,
    .norm = MOEC_NORM_LAYER,
    .choice = MOEC_CHOOSE_SPARSEMIXER,
    .renorm = MOEC_RENORM_NEVER,
    .window = MOEC_WINDOW_ALL,
    .loads_transformers = true,
    .loads_vllm = true,
    .loads_sglang = true,
    .loads_llama_cpp = true,
};
