/* Qwen1.5-MoE and Qwen2-MoE: biases on q, k and v; softmax routing, weights not divided by their sum unless norm_topk_prob
 * says so; a shared expert behind a sigmoid gate. */
#include "model/family_names.h"

const moec_family moec_family_qwen2_moe = {
    .model_type = "qwen2_moe",
    .architecture = "Qwen2MoeForCausalLM",
    .source = "Qwen2 Technical Report, arXiv:2407.10671; transformers 5.23 modeling_qwen2_moe",
    .models = "Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
    .key_experts = {"num_experts", "num_local_experts"},
    .key_top_k = {"num_experts_per_tok"},
    .key_expert_width = {"moe_intermediate_size"},
    .key_dense_width = "intermediate_size",
    .key_shared_width = "shared_expert_intermediate_size",
    .default_experts = 60,
    .default_top_k = 4,
    MOEC_NAMES_ENDS,
    .mat = {MOEC_NAMES_QKVO, MOEC_NAMES_DENSE, MOEC_NAMES_SHARED("mlp.shared_expert."),
            [MOEC_MAT_ROUTER] = P "mlp.gate.weight", [MOEC_MAT_SHARED_MIX] = P "mlp.shared_expert_gate.weight"},
    .vec = {MOEC_NAMES_NORMS},
    .experts = {MOEC_EXPERTS_SPLIT("mlp."), MOEC_EXPERTS_JOINED("mlp.")},
    .default_kv_heads = 16,
    .default_window = 4096,
    .default_rope_theta = 10000.0,
    .default_norm_eps = 1e-6,
    .renorm = MOEC_RENORM_KEY,
    .dense = MOEC_DENSE_MLP_ONLY,
    .window = MOEC_WINDOW_TYPES,
    .types = MOEC_TYPES_SLIDE_EVEN_BELOW,
    .loads_transformers = true,
    .loads_vllm = true,
    .loads_sglang = true,
    .loads_llama_cpp = true,
};
