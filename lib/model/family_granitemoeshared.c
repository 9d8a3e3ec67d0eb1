/* Granite MoE with a shared expert beside the routed ones. */
#include "model/family_names.h"

const moec_family moec_family_granitemoeshared = {
    .model_type = "granitemoeshared",
    .architecture = "GraniteMoeSharedForCausalLM",
    .source = "transformers 5.23 modeling_granitemoeshared",
    .models = "Granite 4 previews",
    MOEC_MODEL_GRANITE,
    .key_shared_width = "shared_intermediate_size",
    .shared_gate_up = P "shared_mlp.input_linear.weight",
    .mat = {MOEC_NAMES_GRANITE, [MOEC_MAT_SHARED_DOWN] = P "shared_mlp.output_linear.weight"},
    .loads_transformers = true,
    .loads_vllm = true,
    .loads_sglang = true,
    .loads_llama_cpp = true,
};
