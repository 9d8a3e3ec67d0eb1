/* FlexOlmo: OLMoE with norms on the outputs of attention and experts only. */
#include "model/family_names.h"

const moec_family moec_family_flex_olmo = {
    .model_type = "flex_olmo",
    .architecture = "FlexOlmoForCausalLM",
    .source = "FlexOlmo, arXiv:2507.07024; transformers 5.23 modeling_flex_olmo",
    .models = "FlexOlmo-7x7B",
    .key_experts = {"num_experts", "num_local_experts"},
    .key_top_k = {"num_experts_per_tok"},
    .key_expert_width = {"intermediate_size"},
    .default_experts = 7,
    .default_top_k = 5,
    MOEC_NAMES_ENDS,
    .mat = {MOEC_NAMES_QKVO, [MOEC_MAT_ROUTER] = P "mlp.gate.weight"},
    .vec = {MOEC_NAMES_QK_NORMS, [MOEC_VEC_POST_ATTN] = P "post_attention_layernorm.weight",
            [MOEC_VEC_POST_MLP] = P "post_feedforward_layernorm.weight"},
    .experts = {MOEC_EXPERTS_SPLIT("mlp."), MOEC_EXPERTS_JOINED("mlp.")},
    .default_rope_theta = 500000.0,
    .default_norm_eps = 1e-6,
    .renorm = MOEC_RENORM_KEY,
    .loads_transformers = true,
    .loads_gptq = true,
    .loads_compressed = true,
    .loads_vllm = true,
};
