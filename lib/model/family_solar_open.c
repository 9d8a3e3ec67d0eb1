/* Solar Open: GLM-4.5 without dense layers, q/k norms and partial rotation. */
#include "model/family_names.h"

const moec_family moec_family_solar_open = {
    .model_type = "solar_open",
    .architecture = "SolarOpenForCausalLM",
    .source = "transformers 5.23 modeling_solar_open",
    .models = "Solar-Open-100B",
    MOEC_KEYS_DEEPSEEK,
    MOEC_NAMES_ENDS,
    .mat = {MOEC_NAMES_QKVO, MOEC_NAMES_SHARED("mlp.shared_experts."),
            [MOEC_MAT_ROUTER] = P "mlp.gate.weight"},
    .vec = {MOEC_NAMES_NORMS,
            [MOEC_VEC_SELECTION_BIAS] = P "mlp.gate.e_score_correction_bias"},
    .experts = {MOEC_EXPERTS_SPLIT("mlp."), MOEC_EXPERTS_JOINED("mlp.")},
    MOEC_RULES_DEEPSEEK_V3,
    .default_experts = 128,
    .default_top_k = 8,
    .default_shared = 1,
    .default_renorm = true,
    .default_kv_heads = 8,
    .default_head_dim = 128,
    .default_rope_theta = 1e6,
    .default_norm_eps = 1e-5,
    .loads_transformers = true,
    .loads_vllm = true,
    .loads_sglang = true,
    .loads_llama_cpp = true,
};
