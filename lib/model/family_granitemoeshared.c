/* Granite MoE with a shared expert beside the routed ones. */
#include "model/family_names.h"

const moec_family moec_family_granitemoeshared = {
    .model_type = "granitemoeshared",
    .architecture = "GraniteMoeSharedForCausalLM",
    .source = "transformers 5.23 modeling_granitemoeshared",
    .models = "Granite 4 previews",
    .key_experts = {"num_local_experts"},
    .key_top_k = {"num_experts_per_tok"},
    .key_expert_width = {"intermediate_size"},
    .key_shared_width = "shared_intermediate_size",
    .default_experts = 8,
    .default_top_k = 2,
    MOEC_NAMES_ENDS,
    .mat = {MOEC_NAMES_QKVO, [MOEC_MAT_SHARED_DOWN] = P "shared_mlp.output_linear.weight",
            [MOEC_MAT_ROUTER] = P "block_sparse_moe.router.layer.weight|" P "block_sparse_moe.router.weight"},
    .vec = {MOEC_NAMES_NORMS},
    .shared_gate_up = P "shared_mlp.input_linear.weight",
    .experts = {{.layout = MOEC_LAYOUT_OUT_IN, .gate = P "block_sparse_moe.input_linear.weight",
                 .down = P "block_sparse_moe.output_linear.weight"},
                MOEC_EXPERTS_JOINED("block_sparse_moe.")},
    .default_score_scale = 1.0, /* the class default of attention_multiplier */
    .default_rope_theta = 10000.0,
    .default_norm_eps = 1e-6,
    .choice = MOEC_CHOOSE_TOP_K_SOFTMAX,
    .renorm = MOEC_RENORM_NEVER,
    .loads_transformers = true,
    .loads_vllm = true,
    .loads_sglang = true,
    .loads_llama_cpp = true,
};
