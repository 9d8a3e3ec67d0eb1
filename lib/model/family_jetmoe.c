/* JetMoE: attention is a mixture of experts too, each with its own queries and output over shared keys and values; both
 * routers take the k largest logits and the softmax over these. */
#include "model/family_names.h"

const moec_family moec_family_jetmoe = {
    .model_type = "jetmoe",
    .architecture = "JetMoeForCausalLM",
    .source = "JetMoE, arXiv:2404.07413; transformers 5.23 modeling_jetmoe",
    .models = "JetMoE-8B",
    .key_experts = {"num_local_experts", "moe_num_experts"},
    .key_top_k = {"num_experts_per_tok", "moe_top_k"},
    .key_expert_width = {"intermediate_size", "ffn_hidden_size"},
    .default_experts = 8,
    .default_top_k = 2,
    MOEC_NAMES_ENDS,
    .qkv = P "self_attention.kv_proj.weight",
    .heads_in = P "self_attention.experts.input_linear.weight",
    .heads_out = P "self_attention.experts.output_linear.weight",
    .mat = {[MOEC_MAT_HEADS_ROUTER] = P "self_attention.experts.router.layer.weight",
            [MOEC_MAT_ROUTER] = P "mlp.router.layer.weight"},
    .vec = {MOEC_NAMES_NORMS, [MOEC_VEC_HEADS_BIAS] = P "self_attention.experts.bias", [MOEC_VEC_MOE_BIAS] = P "mlp.bias"},
    .experts = {{.layout = MOEC_LAYOUT_OUT_IN, .gate = P "mlp.input_linear.weight", .down = P "mlp.output_linear.weight"}},
    .default_kv_heads = 16,
    .default_head_dim = 128,
    .default_rope_theta = 10000.0,
    .default_norm_eps = 1e-6,
    .key_norm_eps = "", /* the class builds its norms with 1e-6 whatever the config says */
    .mixer = MOEC_MIXER_HEADS,
    .choice = MOEC_CHOOSE_TOP_K_SOFTMAX,
    .renorm = MOEC_RENORM_NEVER,
    .loads_transformers = true,
};
