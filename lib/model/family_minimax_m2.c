/* MiniMax-M2: q/k norms over the whole projection, a part of each head rotated (rotary_dim); sigmoid scores, selection bias,
 * weights divided by their sum; released in FP8 with block scales. */
#include "model/family_names.h"

const moec_family moec_family_minimax_m2 = {
    .model_type = "minimax_m2",
    .architecture = "MiniMaxM2ForCausalLM",
    .source = "transformers 5.23 modeling_minimax_m2",
    .models = "MiniMax-M2",
    .key_experts = {"num_local_experts"},
    .key_top_k = {"num_experts_per_tok"},
    .key_expert_width = {"intermediate_size"},
    .default_experts = 256,
    .default_top_k = 8,
    MOEC_NAMES_ENDS,
    .mat = {MOEC_NAMES_QKVO, [MOEC_MAT_ROUTER] = P "block_sparse_moe.gate.weight|" P "mlp.gate.weight"},
    .vec = {MOEC_NAMES_NORMS, MOEC_NAMES_QK_NORMS,
            [MOEC_VEC_SELECTION_BIAS] = P "block_sparse_moe.e_score_correction_bias|" P "mlp.e_score_correction_bias"},
    .experts = {MOEC_EXPERTS_W123("block_sparse_moe."), MOEC_EXPERTS_JOINED("mlp.")},
    .default_rope_theta = 5e6,
    .default_norm_eps = 1e-6,
    .score = MOEC_SCORE_SIGMOID,
    .renorm = MOEC_RENORM_ALWAYS,
    .loads_transformers = true,
    .loads_vllm = true,
    .loads_sglang = true,
    .loads_llama_cpp = true,
};
