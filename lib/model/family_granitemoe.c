/* Granite 3 MoE (1B-A400M, 3B-A800M): multipliers on embedding, residual, scores and logits; the k largest router logits,
 * softmax over these; experts joined. */
#include "model/family_names.h"

const moec_family moec_family_granitemoe = {
    .model_type = "granitemoe",
    .architecture = "GraniteMoeForCausalLM",
    .source = "transformers 5.23 modeling_granitemoe",
    .models = "Granite-3.0/3.1 1B-A400M, 3B-A800M",
    MOEC_MODEL_GRANITE,
    .mat = {MOEC_NAMES_GRANITE},
    .loads_transformers = true,
    .loads_vllm = true,
    .loads_sglang = true,
    .loads_llama_cpp = true,
};
