/* Qwen3-VL-MoE, its text model: Qwen3-MoE with experts joined and transposed. */
#include "model/family_names.h"

const moec_family moec_family_qwen3_vl_moe = {
    .model_type = "qwen3_vl_moe_text",
    .alias = {"qwen3_vl_moe"},
    .architecture = "Qwen3VLMoeForConditionalGeneration",
    .source = "Qwen3-VL Technical Report, arXiv:2511.21631; transformers 5.23 modeling_qwen3_vl_moe",
    .models = "Qwen3-VL-30B-A3B, 235B-A22B",
    .key_experts = {"num_experts", "num_local_experts"},
    .key_top_k = {"num_experts_per_tok"},
    .key_expert_width = {"moe_intermediate_size"},
    .key_dense_width = "intermediate_size",
    .default_experts = 60,
    .default_top_k = 4,
    MOEC_NAMES_ENDS,
    .mat = {MOEC_NAMES_QKVO, MOEC_NAMES_DENSE, [MOEC_MAT_ROUTER] = P "mlp.gate.weight"},
    .vec = {MOEC_NAMES_NORMS, MOEC_NAMES_QK_NORMS},
    .experts = {{.layout = MOEC_LAYOUT_IN_OUT, .gate = P "mlp.experts.gate_up_proj", .down = P "mlp.experts.down_proj"},
                MOEC_EXPERTS_JOINED("mlp."), /* as transformers 5 saves it */
                MOEC_EXPERTS_SPLIT("mlp.")},
    .default_kv_heads = 16,
    .default_rope_theta = 500000.0,
    .default_norm_eps = 1e-6,
    .renorm = MOEC_RENORM_ALWAYS,
    .dense = MOEC_DENSE_MLP_ONLY,
    .loads_transformers = true,
    .loads_vllm = true,
    .loads_sglang = true,
    .loads_llama_cpp = true,
};
