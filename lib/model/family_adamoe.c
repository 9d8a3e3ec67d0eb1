/* AdaMoE: Mixtral with router rows for experts that do nothing, so that a token may have fewer true experts; the
 * weights of the true ones are divided by their sum. */
#include "model/family_names.h"

const moec_family moec_family_adamoe = {
    .model_type = "adamoe",
    .detect = "num_null_experts",
    .architecture = "MixtralForCausalLM",
    .source = "AdaMoE, arXiv:2406.13233; its released code (gate and gate2)",
    .models = "AdaMoE (none released)",
    .key_experts = {"num_local_experts"},
    .key_top_k = {"num_experts_per_tok"},
    .key_expert_width = {"intermediate_size"},
    MOEC_NAMES_ENDS,
    .mat = {MOEC_NAMES_QKVO, [MOEC_MAT_ROUTER] = P "block_sparse_moe.gate.weight",
            [MOEC_MAT_ROUTER_NULL] = P "block_sparse_moe.gate2.weight"},
    .vec = {MOEC_NAMES_NORMS},
    .experts = {MOEC_EXPERTS_W123("block_sparse_moe.")},
    .default_rope_theta = 1e6,
    .default_norm_eps = 1e-5,
    .renorm = MOEC_RENORM_ALWAYS,
    .window = MOEC_WINDOW_ALL,
    .remote_code = true,
};
