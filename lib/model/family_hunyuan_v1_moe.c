/* Hunyuan-A13B: q/k norms per head behind the rotation, positions scaled by alpha; softmax routing, weights divided by their
 * sum; a shared expert. */
#include "model/family_names.h"

const moec_family moec_family_hunyuan_v1_moe = {
    .model_type = "hunyuan_v1_moe",
    .alias = {"hunyuan"},
    .architecture = "HunYuanMoEV1ForCausalLM",
    .source = "transformers 5.23 modeling_hunyuan_v1_moe",
    .models = "Hunyuan-A13B",
    .key_experts = {"num_experts", "num_local_experts"},
    .key_top_k = {"moe_topk"},
    .key_expert_width = {"moe_intermediate_size", "intermediate_size"},
    .key_shared_count = {"num_shared_expert"},
    MOEC_NAMES_ENDS,
    .mat = {MOEC_NAMES_QKVO, MOEC_NAMES_SHARED("mlp.shared_mlp."),
            [MOEC_MAT_ROUTER] = P "mlp.gate.wg.weight"},
    .vec = {MOEC_NAMES_NORMS, [MOEC_VEC_Q_NORM] = P "self_attn.query_layernorm.weight",
            [MOEC_VEC_K_NORM] = P "self_attn.key_layernorm.weight"},
    .experts = {MOEC_EXPERTS_SPLIT("mlp."), MOEC_EXPERTS_JOINED("mlp.")},
    .default_rope_theta = 10000.0,
    .default_norm_eps = 1e-5,
    .qk_norm = MOEC_QK_AFTER,
    .renorm = MOEC_RENORM_ALWAYS,
    .loads_transformers = true,
    .loads_gptq = true,
    .loads_compressed = true,
    .loads_vllm = true,
    .loads_sglang = true,
    .loads_llama_cpp = true,
};
