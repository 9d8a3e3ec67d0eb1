/* Qwen3-Next: three of four layers a gated delta net, the others attention with an output gate inside q; norms stored
 * minus 1; a quarter of each head rotated; softmax routing, a shared expert behind a sigmoid gate. */
#include "model/family_names.h"

const moec_family moec_family_qwen3_next = {
    .model_type = "qwen3_next",
    .architecture = "Qwen3NextForCausalLM",
    .source = "transformers 5.23 modeling_qwen3_next; Gated Delta Networks, arXiv:2412.06464",
    .models = "Qwen3-Next-80B-A3B",
    MOEC_NAMES_ENDS,
    .mat = {MOEC_NAMES_QWEN3_NEXT, MOEC_NAMES_DENSE, [MOEC_MAT_DELTA_QKVZ] = P "linear_attn.in_proj_qkvz.weight",
            [MOEC_MAT_DELTA_BA] = P "linear_attn.in_proj_ba.weight"},
    MOEC_RULES_QWEN3_NEXT,
    .key_dense_width = "intermediate_size",
    .dense = MOEC_DENSE_MLP_ONLY,
    .default_experts = 512,
    .default_top_k = 10,
    .renorm = MOEC_RENORM_KEY,
    .default_renorm = true,
    .loads_transformers = true,
    .loads_gptq = true,
    .loads_compressed = true,
    .loads_vllm = true,
    .loads_sglang = true,
    .loads_llama_cpp = true,
};
