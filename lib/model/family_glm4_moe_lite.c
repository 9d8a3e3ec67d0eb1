/* GLM-4.7-Flash: DeepSeek-V3 in all but which layers are dense (mlp_layer_types; by default the first). */
#include "model/family_names.h"

const moec_family moec_family_glm4_moe_lite = {
    .model_type = "glm4_moe_lite",
    .architecture = "Glm4MoeLiteForCausalLM",
    .source = "transformers 5.23 modeling_glm4_moe_lite",
    .models = "GLM-4.7-Flash",
    MOEC_MODEL_DEEPSEEK_V3,
    .default_experts = 64,
    .default_top_k = 4,
    .default_shared = 1,
    .dense = MOEC_DENSE_TYPES,
    .default_route_scale = 1.8,
    .default_norm_eps = 1e-5,
    .loads_transformers = true,
    .loads_gptq = true,
    .loads_compressed = true,
    .loads_vllm = true,
    .loads_sglang = true,
    .loads_llama_cpp = true,
};
