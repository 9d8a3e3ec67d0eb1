/* ERNIE 4.5 (21B-A3B, 300B-A47B): pairs rotated; softmax scores, selection bias, weights divided by their sum but by no less
 * than moe_norm_min; shared experts; dense layers outside a range; multi-token prediction by a dense layer, mtp_block. */
#include "model/family_names.h"

const moec_family moec_family_ernie4_5_moe = {
    .model_type = "ernie4_5_moe",
    .architecture = "Ernie4_5_MoeForCausalLM",
    .source = "ERNIE 4.5 Technical Report; transformers 5.23 modeling_ernie4_5_moe; vLLM ernie_mtp",
    .models = "ERNIE-4.5-21B-A3B, 300B-A47B",
    .key_experts = {"moe_num_experts"},
    .key_top_k = {"moe_k"},
    .key_expert_width = {"moe_intermediate_size"},
    .key_dense_width = "intermediate_size",
    .key_shared_count = {"moe_num_shared_experts"},
    .key_mtp = {"num_nextn_predict_layers"},
    .mtp_layer = "model.mtp_block.%d.",
    .mtp_prefix = "model.mtp_",
    .default_experts = 64,
    .default_top_k = 6,
    .default_shared = 2,
    .default_dense = 1,
    MOEC_NAMES_ENDS,
    .mat = {MOEC_NAMES_QKVO, MOEC_NAMES_DENSE, MOEC_NAMES_SHARED("mlp.shared_experts."),
            [MOEC_MAT_ROUTER] = P "mlp.gate.weight"},
    .vec = {MOEC_NAMES_NORMS, [MOEC_VEC_SELECTION_BIAS] = P "mlp.moe_statics.e_score_correction_bias|" P
                                                            "mlp.gate.moe_statics.e_score_correction_bias"},
    .experts = {MOEC_EXPERTS_SPLIT("mlp."), MOEC_EXPERTS_JOINED("mlp.")},
    .default_kv_heads = 4,
    .default_rope_theta = 500000.0,
    .default_norm_eps = 1e-5,
    .rotation = MOEC_ROTATE_PAIRS,
    .renorm = MOEC_RENORM_ALWAYS,
    .key_renorm_min = "moe_norm_min",
    .dense = MOEC_DENSE_RANGE,
    .loads_transformers = true,
    .loads_vllm = true,
    .loads_sglang = true,
    .loads_llama_cpp = true,
};
