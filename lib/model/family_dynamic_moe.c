/* Dynamic-MoE: a token takes experts by descending probability until their sum exceeds top_p_threshold; weights are not
 * divided by their sum; every second layer has a router. Its config says model_type llama. */
#include "model/family_names.h"

const moec_family moec_family_dynamic_moe = {
    .model_type = "dynamic_moe",
    .detect = "top_p_threshold",
    .architecture = "LlamaForCausalLM",
    .source = "Harder Tasks Need More Experts, arXiv:2403.07652; its released code",
    .models = "Dynamic-MoE",
    .key_experts = {"num_experts"},
    .key_top_k = {"experts_topk"},
    .key_expert_width = {"intermediate_size"},
    .key_dense_width = "intermediate_size",
    .default_top_k = 2,
    MOEC_NAMES_ENDS,
    .mat = {MOEC_NAMES_QKVO, [MOEC_MAT_DENSE_GATE] = P "mlp.mlp.gate_proj.weight",
            [MOEC_MAT_DENSE_UP] = P "mlp.mlp.up_proj.weight", [MOEC_MAT_DENSE_DOWN] = P "mlp.mlp.down_proj.weight",
            [MOEC_MAT_ROUTER] = P "mlp.router.weight"},
    .vec = {MOEC_NAMES_NORMS},
    .experts = {MOEC_EXPERTS_SPLIT("mlp.")},
    .default_rope_theta = 10000.0,
    .default_norm_eps = 1e-5,
    .choice = MOEC_CHOOSE_TOP_P,
    .renorm = MOEC_RENORM_NEVER,
    .dense = MOEC_DENSE_FREQUENCY,
    .remote_code = true,
};
