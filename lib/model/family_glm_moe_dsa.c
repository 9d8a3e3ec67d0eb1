/* GLM-5: DeepSeek-V3.2 in all but its numbers. */
#include "model/family_names.h"

const moec_family moec_family_glm_moe_dsa = {
    .model_type = "glm_moe_dsa",
    .architecture = "GlmMoeDsaForCausalLM",
    .source = "transformers 5.23 modeling_glm_moe_dsa",
    .models = "GLM-5",
    MOEC_MODEL_DEEPSEEK_V3,
    MOEC_INDEXER,
    MOEC_SIZES_DEEPSEEK_V3,
    .default_norm_eps = 1e-5,
    .loads_transformers = true,
    .loads_gptq = true,
    .loads_compressed = true,
    .loads_vllm = true,
    .loads_sglang = true,
    .loads_llama_cpp = true,
};
