/* Llama 4 (Scout, Maverick), their text model: chunked attention on rotated layers, every fourth layer full, not rotated, its
 * queries scaled by position; q/k norms without weights behind the rotation; the sigmoid of the one chosen logit multiplies the
 * expert's input; shared expert; experts joined and transposed. */
#include "model/family_names.h"

const moec_family moec_family_llama4 = {
    .model_type = "llama4_text",
    .alias = {"llama4"},
    .architecture = "Llama4ForCausalLM",
    .source = "transformers 5.23 modeling_llama4",
    .models = "Llama-4-Scout, Maverick",
    .key_experts = {"num_local_experts"},
    .key_top_k = {"num_experts_per_tok"},
    .key_expert_width = {"intermediate_size"},
    .key_dense_width = "intermediate_size_mlp",
    .default_experts = 16,
    .default_top_k = 1,
    MOEC_NAMES_ENDS,
    .mat = {MOEC_NAMES_QKVO, [MOEC_MAT_DENSE_GATE] = P "feed_forward.gate_proj.weight",
            [MOEC_MAT_DENSE_UP] = P "feed_forward.up_proj.weight", [MOEC_MAT_DENSE_DOWN] = P "feed_forward.down_proj.weight",
            MOEC_NAMES_SHARED("feed_forward.shared_expert."), [MOEC_MAT_ROUTER] = P "feed_forward.router.weight"},
    .vec = {MOEC_NAMES_NORMS},
    .experts = {{.layout = MOEC_LAYOUT_IN_OUT, .gate = P "feed_forward.experts.gate_up_proj",
                 .down = P "feed_forward.experts.down_proj"}},
    .default_rope_theta = 500000.0,
    .default_norm_eps = 1e-5,
    .rotation = MOEC_ROTATE_PAIRS,
    .qk_norm = MOEC_QK_L2_AFTER,
    .nope = MOEC_NOPE_LIST,
    .window = MOEC_WINDOW_CHUNK,
    .score = MOEC_SCORE_SIGMOID,
    .renorm = MOEC_RENORM_NEVER,
    .weight_on_input = true,
    .dense = MOEC_DENSE_INTERLEAVED,
    .loads_transformers = true,
    .loads_vllm = true,
    .loads_sglang = true,
    .loads_llama_cpp = true,
};
