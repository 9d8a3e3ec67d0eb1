/* GLM-4.5, 4.5-Air, 4.6, 4.7: grouped-query attention, half of each head rotated, q/k norms in the large ones; the MoE of
 * DeepSeek-V3; multi-token prediction. */
#include "model/family_names.h"

const moec_family moec_family_glm4_moe = {
    .model_type = "glm4_moe",
    .architecture = "Glm4MoeForCausalLM",
    .source = "GLM-4.5, arXiv:2508.06471; transformers 5.23 modeling_glm4_moe",
    .models = "GLM-4.5, 4.5-Air, 4.6, 4.7",
    MOEC_KEYS_DEEPSEEK,
    .key_mtp = {"num_nextn_predict_layers", "num_mtp_layers"},
    MOEC_NAMES_ENDS,
    .mat = {MOEC_NAMES_QKVO, MOEC_NAMES_DENSE, MOEC_NAMES_SHARED("mlp.shared_experts."),
            [MOEC_MAT_ROUTER] = P "mlp.gate.weight"},
    .vec = {MOEC_NAMES_NORMS, MOEC_NAMES_QK_NORMS,
            [MOEC_VEC_SELECTION_BIAS] = P "mlp.gate.e_score_correction_bias"},
    .experts = {MOEC_EXPERTS_SPLIT("mlp."), MOEC_EXPERTS_JOINED("mlp.")},
    MOEC_RULES_DEEPSEEK_V3,
    .default_experts = 128,
    .default_top_k = 8,
    .default_shared = 1,
    .default_dense = 1,
    .default_renorm = true,
    .dense = MOEC_DENSE_FIRST_K,
    .default_kv_heads = 8,
    .default_rope_theta = 10000.0,
    .default_partial_rotary = 0.5,
    .default_norm_eps = 1e-5,
    .loads_transformers = true,
    .loads_vllm = true,
    .loads_sglang = true,
    .loads_llama_cpp = true,
};
