/* DeepSeek-V2, V2-Lite, Coder-V2: latent attention; softmax scores, the k largest or those of the groups with the best
 * expert, weights scaled and never divided by their sum; shared experts; the first layer dense. */
#include "model/family_names.h"

const moec_family moec_family_deepseek_v2 = {
    .model_type = "deepseek_v2",
    .architecture = "DeepseekV2ForCausalLM",
    .source = "DeepSeek-V2, arXiv:2405.04434; transformers 5.23 modeling_deepseek_v2",
    .models = "DeepSeek-V2, V2-Lite, Coder-V2",
    MOEC_KEYS_DEEPSEEK,
    MOEC_NAMES_ENDS,
    .mat = {MOEC_NAMES_LATENT, MOEC_NAMES_DENSE, MOEC_NAMES_SHARED("mlp.shared_experts."),
            [MOEC_MAT_ROUTER] = P "mlp.gate.weight"},
    .vec = {MOEC_NAMES_NORMS, MOEC_NAMES_LATENT_NORMS},
    .experts = {MOEC_EXPERTS_SPLIT("mlp."), MOEC_EXPERTS_JOINED("mlp.")},
    .renorm = MOEC_RENORM_NEVER,
    .group = MOEC_GROUP_MAX,
    .key_groups = "n_group",
    .key_top_groups = "topk_group",
    .key_route_scale = "routed_scaling_factor",
    .default_experts = 64,
    .default_shared = 2,
    .dense = MOEC_DENSE_FIRST_K,
    .default_rope_theta = 10000.0,
    .default_norm_eps = 1e-6,
    .latent_norm_eps = 1e-6,
    .mixer = MOEC_MIXER_LATENT,
    .rotation = MOEC_ROTATE_PAIRS,
    .loads_transformers = true,
    .loads_vllm = true,
    .loads_sglang = true,
    .loads_llama_cpp = true,
};
