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
    .gguf = {.arch = "deepseek2", .renorm = MOEC_GGUF_RENORM_KEY, .dense_first = true, .routing_keys = true,
             .expert_width = true, .config = "{\"attention_bias\": false, \"moe_layer_freq\": 1, \"scoring_func\": \"sigmoid\", "
                                             "\"topk_method\": \"noaux_tc\", \"num_nextn_predict_layers\": 0}"},
};
