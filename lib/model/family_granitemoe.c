/* Granite 3 MoE (1B-A400M, 3B-A800M): multipliers on embedding, residual, scores and logits; the k largest router logits,
 * softmax over these; experts joined. */
#include "model/family_names.h"

const moec_family moec_family_granitemoe = {
    .model_type = "granitemoe",
    .architecture = "GraniteMoeForCausalLM",
    .source = "transformers 5.23 modeling_granitemoe",
    .models = "Granite-3.0/3.1 1B-A400M, 3B-A800M",
    .key_experts = {"num_local_experts"},
    .key_top_k = {"num_experts_per_tok"},
    .key_expert_width = {"intermediate_size"},
    .default_experts = 8,
    .default_top_k = 2,
    MOEC_NAMES_ENDS,
    .mat = {MOEC_NAMES_QKVO,
            [MOEC_MAT_ROUTER] = P "block_sparse_moe.router.layer.weight|" P "block_sparse_moe.router.weight"},
    .vec = {MOEC_NAMES_NORMS},
    .experts = {{.layout = MOEC_LAYOUT_OUT_IN, .gate = P "block_sparse_moe.input_linear.weight",
                 .down = P "block_sparse_moe.output_linear.weight"},
                MOEC_EXPERTS_JOINED("block_sparse_moe.")},
    .default_score_scale = 1.0, /* the class default of attention_multiplier */
    .default_rope_theta = 10000.0,
    .default_norm_eps = 1e-6,
    .choice = MOEC_CHOOSE_TOP_K_SOFTMAX,
    .renorm = MOEC_RENORM_NEVER,
    .loads_transformers = true,
    .loads_vllm = true,
    .loads_sglang = true,
    .loads_llama_cpp = true,
};
