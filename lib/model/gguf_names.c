/* See gguf_names.h. */
#include "model/gguf_names.h"

const char *const moec_gguf_mats[MOEC_MAT_COUNT] = {
    [MOEC_MAT_Q] = "attn_q", [MOEC_MAT_K] = "attn_k", [MOEC_MAT_V] = "attn_v", [MOEC_MAT_O] = "attn_output",
    [MOEC_MAT_Q_A] = "attn_q_a", [MOEC_MAT_Q_B] = "attn_q_b", [MOEC_MAT_KV_A] = "attn_kv_a_mqa",
    [MOEC_MAT_ROUTER] = "ffn_gate_inp", [MOEC_MAT_SHARED_GATE] = "ffn_gate_shexp", [MOEC_MAT_SHARED_UP] = "ffn_up_shexp",
    [MOEC_MAT_SHARED_DOWN] = "ffn_down_shexp", [MOEC_MAT_SHARED_MIX] = "ffn_gate_inp_shexp",
    [MOEC_MAT_DENSE_GATE] = "ffn_gate", [MOEC_MAT_DENSE_UP] = "ffn_up", [MOEC_MAT_DENSE_DOWN] = "ffn_down",
};
const char *const moec_gguf_vecs[MOEC_VEC_COUNT] = {
    [MOEC_VEC_NORM_ATTN] = "attn_norm.weight", [MOEC_VEC_Q_NORM] = "attn_q_norm.weight",
    [MOEC_VEC_K_NORM] = "attn_k_norm.weight", [MOEC_VEC_Q_A_NORM] = "attn_q_a_norm.weight",
    [MOEC_VEC_KV_A_NORM] = "attn_kv_a_norm.weight", [MOEC_VEC_SINKS] = "attn_sinks.weight",
    [MOEC_VEC_SELECTION_BIAS] = "exp_probs_b.bias",
};
const char *const moec_gguf_experts[3] = {"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"};
