/* Mixtral (8x7B, 8x22B): grouped-query attention, optionally sliding; softmax over all experts, top-k, always divided by
 * the sum of the kept weights; every layer has a router; w1 is gate, w3 up, w2 down. */
#include "model/family.h"

#define P "model.layers.%d."

const moec_family moec_family_mixtral = {
    .model_type = "mixtral",
    .architecture = "MixtralForCausalLM",
    .source = "Mixtral of Experts, arXiv:2401.04088; transformers 5.23 modeling_mixtral",
    .key_experts = {"num_local_experts"},
    .key_top_k = {"num_experts_per_tok"},
    .key_expert_width = {"intermediate_size"},
    .default_experts = 8,
    .default_top_k = 2,
    .embed = "model.embed_tokens.weight",
    .final_norm = "model.norm.weight",
    .head = "lm_head.weight",
    .norm_attn = P "input_layernorm.weight",
    .norm_mlp = P "post_attention_layernorm.weight",
    .q = P "self_attn.q_proj.weight",
    .k = P "self_attn.k_proj.weight",
    .v = P "self_attn.v_proj.weight",
    .o = P "self_attn.o_proj.weight",
    .router = P "block_sparse_moe.gate.weight",
    .expert_gate = P "block_sparse_moe.experts.%d.w1.weight",
    .expert_up = P "block_sparse_moe.experts.%d.w3.weight",
    .expert_down = P "block_sparse_moe.experts.%d.w2.weight",
    .default_rope_theta = 1e6,
    .default_norm_eps = 1e-5,
    .score = MOEC_SCORE_SOFTMAX,
    .renorm = MOEC_RENORM_ALWAYS,
    .dense = MOEC_DENSE_NONE,
    .window = MOEC_WINDOW_ALL,
    .loads_transformers = true,
    .loads_vllm = true,
    .loads_llama_cpp = true,
};
