/* DeepSeek-V3 and R1, V3.1, Moonlight, Kimi-K2: latent attention (MLA); sigmoid scores, selection bias, choice within the
 * best groups, weights divided by their sum and scaled; shared expert; the first layers dense; multi-token prediction. */
#include "model/family_names.h"

const moec_family moec_family_deepseek_v3 = {
    .model_type = "deepseek_v3",
    .alias = {"kimi_k2"},
    .architecture = "DeepseekV3ForCausalLM",
    .source = "DeepSeek-V3 Technical Report, arXiv:2412.19437; transformers 5.23 modeling_deepseek_v3",
    .models = "DeepSeek-V3, R1, V3.1, Moonlight, Kimi-K2",
    MOEC_MODEL_DEEPSEEK_V3,
    .default_experts = 256,
    .default_top_k = 8,
    .default_shared = 1,
    .default_dense = 3,
    .dense = MOEC_DENSE_FIRST_K,
    .default_groups = 8,
    .default_top_groups = 4,
    .default_route_scale = 2.5,
    .default_norm_eps = 1e-6,
    .loads_transformers = true,
    .loads_vllm = true,
    .loads_sglang = true,
    .loads_llama_cpp = true,
};
