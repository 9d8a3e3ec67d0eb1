/* Qwen3-MoE (30B-A3B, 235B-A22B, Coder): grouped-query attention with an RMS norm per head on q and k; softmax over all
 * experts, then top-k; the kept weights are divided by their sum when norm_topk_prob is set; no shared expert. */
#include "model/family.h"

#define P "model.layers.%d."

const moec_family moec_family_qwen3_moe = {
    .model_type = "qwen3_moe",
    .architecture = "Qwen3MoeForCausalLM",
    .source = "Qwen3 Technical Report, arXiv:2505.09388; transformers 5.23 modeling_qwen3_moe",
    /* transformers 5 writes num_local_experts where every hub release has num_experts */
    .key_experts = {"num_experts", "num_local_experts"},
    .key_top_k = {"num_experts_per_tok"},
    .key_expert_width = {"moe_intermediate_size"},
    .key_dense_width = "intermediate_size",
    .default_experts = 128,
    .default_top_k = 8,
    .embed = "model.embed_tokens.weight",
    .final_norm = "model.norm.weight",
    .head = "lm_head.weight",
    .norm_attn = P "input_layernorm.weight",
    .norm_mlp = P "post_attention_layernorm.weight",
    .q = P "self_attn.q_proj.weight",
    .k = P "self_attn.k_proj.weight",
    .v = P "self_attn.v_proj.weight",
    .o = P "self_attn.o_proj.weight",
    .q_norm = P "self_attn.q_norm.weight",
    .k_norm = P "self_attn.k_norm.weight",
    .router = P "mlp.gate.weight",
    .expert_gate = P "mlp.experts.%d.gate_proj.weight",
    .expert_up = P "mlp.experts.%d.up_proj.weight",
    .expert_down = P "mlp.experts.%d.down_proj.weight",
    .dense_gate = P "mlp.gate_proj.weight",
    .dense_up = P "mlp.up_proj.weight",
    .dense_down = P "mlp.down_proj.weight",
    .default_rope_theta = 10000.0,
    .default_norm_eps = 1e-6,
    .score = MOEC_SCORE_SOFTMAX,
    .renorm = MOEC_RENORM_KEY,
    .renorm_default = false,
    .dense = MOEC_DENSE_MLP_ONLY,
    .window = MOEC_WINDOW_IF_USED,
    .loads_transformers = true,
    .loads_vllm = true,
    .loads_llama_cpp = true,
};
