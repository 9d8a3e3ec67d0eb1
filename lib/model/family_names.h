/* Groups of tensor names that most families share, so that a family's file says only what is its own. */
#ifndef MOEC_MODEL_FAMILY_NAMES_H
#define MOEC_MODEL_FAMILY_NAMES_H

#include "model/family.h"

#define P "model.layers.%d."

#define MOEC_NAMES_ENDS                                                                                                      \
    .embed = "model.embed_tokens.weight", .final_norm = "model.norm.weight", .head = "lm_head.weight"

#define MOEC_NAMES_QKVO                                                                                                      \
    [MOEC_MAT_Q] = P "self_attn.q_proj.weight", [MOEC_MAT_K] = P "self_attn.k_proj.weight",                                  \
    [MOEC_MAT_V] = P "self_attn.v_proj.weight", [MOEC_MAT_O] = P "self_attn.o_proj.weight"

#define MOEC_NAMES_LATENT                                                                                                    \
    [MOEC_MAT_Q] = P "self_attn.q_proj.weight", [MOEC_MAT_Q_A] = P "self_attn.q_a_proj.weight",                              \
    [MOEC_MAT_Q_B] = P "self_attn.q_b_proj.weight", [MOEC_MAT_KV_A] = P "self_attn.kv_a_proj_with_mqa.weight",               \
    [MOEC_MAT_KV_B] = P "self_attn.kv_b_proj.weight", [MOEC_MAT_O] = P "self_attn.o_proj.weight"

#define MOEC_NAMES_LATENT_NORMS                                                                                              \
    [MOEC_VEC_Q_A_NORM] = P "self_attn.q_a_layernorm.weight", [MOEC_VEC_KV_A_NORM] = P "self_attn.kv_a_layernorm.weight"

#define MOEC_NAMES_DENSE                                                                                                     \
    [MOEC_MAT_DENSE_GATE] = P "mlp.gate_proj.weight", [MOEC_MAT_DENSE_UP] = P "mlp.up_proj.weight",                          \
    [MOEC_MAT_DENSE_DOWN] = P "mlp.down_proj.weight"

/* `shared`: "mlp.shared_experts." and the like. */
#define MOEC_NAMES_SHARED(shared)                                                                                            \
    [MOEC_MAT_SHARED_GATE] = P shared "gate_proj.weight", [MOEC_MAT_SHARED_UP] = P shared "up_proj.weight",                  \
    [MOEC_MAT_SHARED_DOWN] = P shared "down_proj.weight"

#define MOEC_NAMES_NORMS                                                                                                     \
    [MOEC_VEC_NORM_ATTN] = P "input_layernorm.weight", [MOEC_VEC_NORM_MLP] = P "post_attention_layernorm.weight"

#define MOEC_NAMES_QK_NORMS                                                                                                  \
    [MOEC_VEC_Q_NORM] = P "self_attn.q_norm.weight", [MOEC_VEC_K_NORM] = P "self_attn.k_norm.weight"

/* Experts in a block `at`, "mlp." or "feed_forward.": one tensor each as on the hub, or joined as in transformers 5. */
#define MOEC_EXPERTS_SPLIT(at)                                                                                               \
    {                                                                                                                        \
        .layout = MOEC_LAYOUT_SPLIT, .gate = P at "experts.%d.gate_proj.weight", .up = P at "experts.%d.up_proj.weight",     \
        .down = P at "experts.%d.down_proj.weight"                                                                           \
    }
#define MOEC_EXPERTS_W123(at)                                                                                                \
    {                                                                                                                        \
        .layout = MOEC_LAYOUT_SPLIT, .gate = P at "experts.%d.w1.weight", .up = P at "experts.%d.w3.weight",                 \
        .down = P at "experts.%d.w2.weight"                                                                                  \
    }
#define MOEC_EXPERTS_JOINED(at)                                                                                              \
    {                                                                                                                        \
        .layout = MOEC_LAYOUT_OUT_IN, .gate = P at "experts.gate_up_proj", .down = P at "experts.down_proj"                  \
    }

/* The MoE of DeepSeek-V3: sigmoid, selection bias, groups by their two best, weights divided by their sum and scaled. */
#define MOEC_RULES_DEEPSEEK_V3                                                                                               \
    .score = MOEC_SCORE_SIGMOID, .choice = MOEC_CHOOSE_TOP_K, .renorm = MOEC_RENORM_KEY, .renorm_eps = 1e-20,                \
    .group = MOEC_GROUP_TOP2, .key_groups = "n_group", .key_top_groups = "topk_group",                                       \
    .key_route_scale = "routed_scaling_factor"

#define MOEC_KEYS_DEEPSEEK                                                                                                   \
    .key_experts = {"n_routed_experts", "num_experts", "num_local_experts"}, .key_top_k = {"num_experts_per_tok"},           \
    .key_expert_width = {"moe_intermediate_size"}, .key_dense_width = "intermediate_size",                                   \
    .key_shared_count = {"n_shared_experts"}

/* DeepSeek-V3 and what differs from it by numbers only: latent attention, its MoE, shared experts, prediction layers.
 * The norms of the latents have the class's default eps, whatever rms_norm_eps says. */
#define MOEC_MODEL_DEEPSEEK_V3                                                                                               \
    MOEC_KEYS_DEEPSEEK, .key_mtp = {"num_nextn_predict_layers", "num_mtp_layers"}, MOEC_NAMES_ENDS,                          \
    .mat = {MOEC_NAMES_LATENT, MOEC_NAMES_DENSE, MOEC_NAMES_SHARED("mlp.shared_experts."),                                   \
            [MOEC_MAT_ROUTER] = P "mlp.gate.weight"},                                                                        \
    .vec = {MOEC_NAMES_NORMS, MOEC_NAMES_LATENT_NORMS,                                                                       \
            [MOEC_VEC_SELECTION_BIAS] = P "mlp.gate.e_score_correction_bias"},                                               \
    .experts = {MOEC_EXPERTS_SPLIT("mlp."), MOEC_EXPERTS_JOINED("mlp.")}, MOEC_RULES_DEEPSEEK_V3, .default_renorm = true,    \
    .default_rope_theta = 10000.0, .latent_norm_eps = 1e-6, .mixer = MOEC_MIXER_LATENT, .rotation = MOEC_ROTATE_PAIRS

/* The sizes that DeepSeek-V3's classes have where a config leaves them out. */
#define MOEC_SIZES_DEEPSEEK_V3                                                                                               \
    .default_experts = 256, .default_top_k = 8, .default_shared = 1, .default_dense = 3, .dense = MOEC_DENSE_FIRST_K,        \
    .default_route_scale = 2.5

/* An indexer that picks the keys that are attended to: all of them in windows up to index_topk. */
#define MOEC_INDEXER .key_exact_tokens = "index_topk", .default_exact_tokens = 2048, .unread = ".indexer."

/* Granite's MoE: the k largest router logits, softmax over these; experts joined. Without its matrices. */
#define MOEC_MODEL_GRANITE                                                                                                   \
    .key_experts = {"num_local_experts"}, .key_top_k = {"num_experts_per_tok"}, .key_expert_width = {"intermediate_size"},   \
    .default_experts = 8, .default_top_k = 2, MOEC_NAMES_ENDS, .vec = {MOEC_NAMES_NORMS},                                    \
    .experts = {{.layout = MOEC_LAYOUT_OUT_IN, .gate = P "block_sparse_moe.input_linear.weight",                             \
                 .down = P "block_sparse_moe.output_linear.weight"},                                                         \
                MOEC_EXPERTS_JOINED("block_sparse_moe.")},                                                                   \
    .default_score_scale = 1.0 /* the class default of attention_multiplier */, .default_rope_theta = 10000.0,               \
    .default_norm_eps = 1e-6, .choice = MOEC_CHOOSE_TOP_K_SOFTMAX, .renorm = MOEC_RENORM_NEVER
#define MOEC_NAMES_GRANITE                                                                                                   \
    MOEC_NAMES_QKVO,                                                                                                         \
        [MOEC_MAT_ROUTER] = P "block_sparse_moe.router.layer.weight|" P "block_sparse_moe.router.weight"

/* What a config.json of Qwen's has beside what a GGUF says: a router in every layer, no sliding windows. */
#define MOEC_GGUF_QWEN "{\"decoder_sparse_step\": 1, \"mlp_only_layers\": [], \"use_sliding_window\": false}"

/* Gated delta nets between attention with an output gate, shared expert behind a sigmoid gate: Qwen3-Next and its kin. Their
 * matrices but those into the delta net, which are grouped or flat; all else that they have in common. */
#define MOEC_NAMES_QWEN3_NEXT                                                                                                \
    MOEC_NAMES_QKVO, MOEC_NAMES_SHARED("mlp.shared_expert."), [MOEC_MAT_ROUTER] = P "mlp.gate.weight",                       \
    [MOEC_MAT_SHARED_MIX] = P "mlp.shared_expert_gate.weight", [MOEC_MAT_DELTA_OUT] = P "linear_attn.out_proj.weight"
#define MOEC_RULES_QWEN3_NEXT                                                                                                \
    .key_experts = {"num_experts", "num_local_experts"}, .key_top_k = {"num_experts_per_tok"},                               \
    .key_expert_width = {"moe_intermediate_size"}, .key_shared_width = "shared_expert_intermediate_size",                    \
    .key_mtp = {"mtp_num_hidden_layers", "num_nextn_predict_layers"}, .mtp_layer = "mtp.layers.%d.", .mtp_prefix = "mtp.",   \
    .vec = {MOEC_NAMES_NORMS, MOEC_NAMES_QK_NORMS, [MOEC_VEC_CONV] = P "linear_attn.conv1d.weight",                          \
            [MOEC_VEC_DELTA_A_LOG] = P "linear_attn.A_log", [MOEC_VEC_DELTA_DT_BIAS] = P "linear_attn.dt_bias",              \
            [MOEC_VEC_DELTA_NORM] = P "linear_attn.norm.weight"},                                                            \
    .experts = {MOEC_EXPERTS_SPLIT("mlp."), MOEC_EXPERTS_JOINED("mlp.")}, .default_kv_heads = 2, .default_head_dim = 256,    \
    .default_rope_theta = 10000.0, .default_partial_rotary = 0.25, .default_norm_eps = 1e-6, .norm = MOEC_NORM_RMS_PLUS1,    \
    .mixer = MOEC_MIXER_DELTA, .gate_in_q = true, .types = MOEC_TYPES_FULL_EVERY,                                            \
    .key_full_every = "full_attention_interval", .full_every = 4

#endif
