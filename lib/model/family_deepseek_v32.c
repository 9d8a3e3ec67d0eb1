/* DeepSeek-V3.2: DeepSeek-V3 with an indexer that picks index_topk keys; in windows up to that length it picks all of
 * them, and its weights are copied. */
#include "model/family_names.h"

const moec_family moec_family_deepseek_v32 = {
    .model_type = "deepseek_v32",
    .architecture = "DeepseekV32ForCausalLM",
    .source = "DeepSeek-V3.2, arXiv:2512.02556; transformers 5.23 modeling_deepseek_v32",
    .models = "DeepSeek-V3.2",
    MOEC_MODEL_DEEPSEEK_V3,
    MOEC_INDEXER,
    MOEC_SIZES_DEEPSEEK_V3,
    .default_groups = 8,
    .default_top_groups = 4,
    .default_norm_eps = 1e-6,
    .loads_transformers = true,
    .loads_gptq = true,
    .loads_compressed = true,
    .loads_vllm = true,
    .loads_sglang = true,
    .loads_llama_cpp = true,
};
