/* GLM-5: DeepSeek-V3.2 in all but its numbers. */
#include "model/family_names.h"

const moec_family moec_family_glm_moe_dsa = {
    .model_type = "glm_moe_dsa",
    .architecture = "GlmMoeDsaForCausalLM",
    .source = "transformers 5.23 modeling_glm_moe_dsa",
    .models = "GLM-5",
    MOEC_MODEL_DEEPSEEK_V3,
    .key_exact_tokens = "index_topk",
    .default_exact_tokens = 2048,
    .unread = ".indexer.",
    .default_experts = 256,
    .default_top_k = 8,
    .default_shared = 1,
    .default_dense = 3,
    .dense = MOEC_DENSE_FIRST_K,
    .default_route_scale = 2.5,
    .default_norm_eps = 1e-5,
    .loads_transformers = true,
    .loads_vllm = true,
    .loads_sglang = true,
    .loads_llama_cpp = true,
};
