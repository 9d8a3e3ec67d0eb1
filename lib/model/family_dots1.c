/* dots.llm1: grouped-query attention with q/k norms per head, sliding from max_window_layers on; the MoE of DeepSeek-V3. */
#include "model/family_names.h"

const moec_family moec_family_dots1 = {
    .model_type = "dots1",
    .architecture = "Dots1ForCausalLM",
    .source = "dots.llm1 Technical Report, arXiv:2506.05767; transformers 5.23 modeling_dots1",
    .models = "dots.llm1",
    MOEC_KEYS_DEEPSEEK,
    MOEC_NAMES_ENDS,
    .mat = {MOEC_NAMES_QKVO, MOEC_NAMES_DENSE, MOEC_NAMES_SHARED("mlp.shared_experts."),
            [MOEC_MAT_ROUTER] = P "mlp.gate.weight"},
    .vec = {MOEC_NAMES_NORMS, MOEC_NAMES_QK_NORMS,
            [MOEC_VEC_SELECTION_BIAS] = P "mlp.gate.e_score_correction_bias"},
    .experts = {MOEC_EXPERTS_SPLIT("mlp."), MOEC_EXPERTS_JOINED("mlp.")},
    MOEC_RULES_DEEPSEEK_V3,
    .default_renorm = false,
    .dense = MOEC_DENSE_FIRST_K,
    .default_kv_heads = 32,
    .default_window = 4096,
    .default_rope_theta = 10000.0,
    .default_norm_eps = 1e-6,
    .window = MOEC_WINDOW_TYPES,
    .types = MOEC_TYPES_SLIDE_FROM,
    .loads_transformers = true,
    .loads_vllm = true,
    .loads_sglang = true,
    .loads_llama_cpp = true,
};
