/* MoE++: behind the experts of a layer stand two constants, a copy of the input and nothing at all, so that a token may have
 * fewer true experts; the router is two matrices with a tanh between and also gets the logits of the layer before, which
 * carry what the layers before that one added. The zero expert's weight is left out of the sum that the others are divided
 * by, unless moe_use_mixtral_gating is set. moe_gate_norm_std concerns the choice; what is carried are the plain logits. */
#include "model/family_names.h"

#define GATE P "mlp.moe.gate."
#define EXPERT P "mlp.moe.experts.experts.%d."

const moec_family moec_family_moe_plus_plus = {
    .model_type = "MoE++",
    .architecture = "MoeForCausalLM",
    .source = "MoE++, arXiv:2410.07348; its released code (MoE++/moe_plus_plus_layer.py)",
    .models = "MoE++",
    .key_experts = {"num_experts"},
    .key_expert_width = {"intermediate_size"},
    .default_experts = 32,
    .default_top_k = 2, /* of the code: no key says it */
    MOEC_NAMES_ENDS,
    .mat = {MOEC_NAMES_QKVO, [MOEC_MAT_ROUTER] = GATE "wg.2.weight|" GATE "wg.weight",
            [MOEC_MAT_ROUTER_IN] = GATE "wg.0.weight", [MOEC_MAT_ROUTER_MAP] = GATE "gate_map.weight"},
    .vec = {MOEC_NAMES_NORMS},
    .experts = {{.layout = MOEC_LAYOUT_SPLIT, .gate = EXPERT "up_proj.weight", .down = EXPERT "down_proj.weight"}},
    .tail = {MOEC_NULL_CONSTANT, MOEC_NULL_CONSTANT, MOEC_NULL_COPY, MOEC_NULL_ZERO},
    .n_tail = 4,
    .constant = EXPERT "constant",
    .constant_mix = EXPERT "wg.weight",
    .key_top_k_softmax = "moe_use_mixtral_gating",
    .key_logit_std = "moe_gate_norm_std",
    .key_logit_std_used = "moe_use_logits_norm",
    .key_input_plain = "moe_feature_no_mul_topk",
    .key_router_in = "moe_2layer_gate",
    .router_in_each = 8,
    .default_rope_theta = 10000.0,
    .default_norm_eps = 1e-6,
    .renorm = MOEC_RENORM_ALWAYS,
    .remote_code = true,
};
