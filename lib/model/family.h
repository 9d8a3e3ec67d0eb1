/* Model families as data: how a checkpoint of a family names its tensors, which config keys hold its numbers, and which
 * rule each step of its forward pass follows. A new family is one file with one moec_family and one line in
 * family_table.inc; no other file names a family. What tensors can tell (biases, q/k norms, low-rank queries, a tied head,
 * a shared expert) is not written here: an optional tensor is used when it is there.
 *
 * Names are patterns: the first %d is the layer, the second the expert; "a|b" means a, or else b. They are written as in
 * text-only checkpoints ("model.layers..."); model.c also looks under the prefixes of multimodal ones.
 * Keys are dotted paths ("ffn_config.moe_top_k") inside config.json, or inside its text_config where there is one.
 * Symbols in comments: H hidden, E experts, k top-k, I expert width, S width of the shared experts, F dense width. */
#ifndef MOEC_MODEL_FAMILY_H
#define MOEC_MODEL_FAMILY_H

#include "base/err.h"
#include "base/json.h"

#include <stdbool.h>
#include <stdint.h>

/* --- tensors of a layer, by what they are for ---------------------------------------------------------------------- */

/* Matrices; each may have a bias, "<name minus .weight>.bias". */
typedef enum moec_mat {
    MOEC_MAT_Q, MOEC_MAT_K, MOEC_MAT_V, MOEC_MAT_O,           /* [heads*d, H] [kv*d, H] [kv*dv, H] [H, heads*dv] */
    MOEC_MAT_ATTN_GATE,                                       /* [heads*dv, H]: attention output times sigmoid(gate x) */
    MOEC_MAT_Q_A, MOEC_MAT_Q_B, MOEC_MAT_KV_A, MOEC_MAT_KV_B, /* latent attention; Q when queries have full rank */
    MOEC_MAT_CONV_IN, MOEC_MAT_CONV_OUT,                      /* short convolution [3H, H] [H, H] */
    MOEC_MAT_DELTA_QKV, MOEC_MAT_DELTA_Z, MOEC_MAT_DELTA_B, MOEC_MAT_DELTA_A, /* gated delta net, flat */
    MOEC_MAT_DELTA_QKVZ, MOEC_MAT_DELTA_BA,                   /* the same grouped by key head */
    MOEC_MAT_DELTA_OUT,
    MOEC_MAT_ROUTER,                                          /* [E, H] */
    MOEC_MAT_ROUTER_NULL,                                     /* [N, H] rows of experts without a network (AdaMoE, MoE++) */
    MOEC_MAT_ROUTER_IN,                                       /* [R, H]: the router is W tanh(IN x), W then [E, R] */
    MOEC_MAT_ROUTER_MAP,                                      /* [E+N, E+N]: z += MAP z', z' of the MoE layer before */
    MOEC_MAT_SHARED_GATE, MOEC_MAT_SHARED_UP, MOEC_MAT_SHARED_DOWN, /* [S, H] [S, H] [H, S] */
    MOEC_MAT_SHARED_MIX,                                      /* [1, H]: shared output times sigmoid(mix x) */
    MOEC_MAT_DENSE_GATE, MOEC_MAT_DENSE_UP, MOEC_MAT_DENSE_DOWN, /* [F, H] [F, H] [H, F] */
    MOEC_MAT_HEADS_ROUTER,                                    /* [E, H] of attention experts (JetMoE) */
    MOEC_MAT_COUNT
} moec_mat;

/* Vectors and other small arrays, kept as float32 while their layer runs. */
typedef enum moec_vec {
    MOEC_VEC_NORM_ATTN, MOEC_VEC_NORM_ATTN_BIAS, MOEC_VEC_NORM_MLP, MOEC_VEC_NORM_MLP_BIAS, /* [H] of the branch's input */
    MOEC_VEC_POST_ATTN, MOEC_VEC_POST_MLP,     /* [H] of the branch's output */
    MOEC_VEC_Q_NORM, MOEC_VEC_K_NORM,          /* [d] per head or [heads*d], [kv*d] whole: as long as they are */
    MOEC_VEC_Q_A_NORM, MOEC_VEC_KV_A_NORM,     /* [q rank] [kv rank] */
    MOEC_VEC_SINKS,                            /* [heads] logits that join the softmax of the scores */
    MOEC_VEC_CONV,                             /* [channels, 1, taps] depthwise; the last tap is the current token */
    MOEC_VEC_DELTA_A_LOG, MOEC_VEC_DELTA_DT_BIAS, MOEC_VEC_DELTA_NORM, /* [value heads] [value heads] [value dim] */
    MOEC_VEC_SELECTION_BIAS,                   /* [E] (any rank): added to the scores for choosing, never to the weight */
    MOEC_VEC_MOE_BIAS, MOEC_VEC_HEADS_BIAS,    /* [H] added to the output of the experts, of the attention experts */
    MOEC_VEC_COUNT
} moec_vec;

/* How experts lie in the checkpoint. "out-in" is [out, in] as in nn.Linear, "in-out" its transpose. */
typedef enum moec_expert_layout {
    MOEC_LAYOUT_SPLIT,       /* one tensor an expert: gate [I,H], up [I,H], down [H,I]; up NULL: gate_up [2I,H], gate first */
    MOEC_LAYOUT_OUT_IN,      /* gate_up [E,2I,H], gate first; down [E,H,I] */
    MOEC_LAYOUT_IN_OUT,      /* gate_up [E,H,2I], gate first; down [E,I,H] */
    MOEC_LAYOUT_IN_OUT_PAIRS, /* gate_up [E,H,2I], gate in even columns, up in odd; down [E,I,H] */
    MOEC_LAYOUT_MXFP4_PAIRS, /* blocks [E,2I,H/32,16] with gate in even rows, [E,H,I/32,16]; "_blocks" has its "_scales" */
    MOEC_LAYOUT_FLAT,        /* gate, up, down each [E*I,H], down transposed */
} moec_expert_layout;

typedef struct moec_expert_names {
    moec_expert_layout layout;
    const char *gate, *up, *down;     /* gate: gate_up where they are one tensor (then up is NULL) */
    const char *gate_bias, *down_bias; /* [E,2I] interleaved as gate_up is, [E,H]; NULL: none */
} moec_expert_names;

/* --- rules --------------------------------------------------------------------------------------------------------- */

/* RMS: x / rms(x) * w; RMS_PLUS1: w is stored minus 1; LAYER: LayerNorm, bias where there is one. */
typedef enum moec_norm { MOEC_NORM_RMS, MOEC_NORM_RMS_PLUS1, MOEC_NORM_LAYER } moec_norm;
/* What mixes tokens in a layer. The second name is that of the layers that layer_types calls otherwise than attention. */
typedef enum moec_mixer {
    MOEC_MIXER_ATTENTION, MOEC_MIXER_LATENT, /* grouped-query; MLA */
    MOEC_MIXER_CONV, MOEC_MIXER_DELTA,       /* layers "conv", "linear_attention" of layer_types; others are attention */
    MOEC_MIXER_HEADS,                        /* attention experts (JetMoE's mixture of attention heads) */
} moec_mixer;
typedef enum moec_rotation { MOEC_ROTATE_HALF, MOEC_ROTATE_PAIRS } moec_rotation; /* (i, i+d/2); (2i, 2i+1) */
/* Norms of q and k: where Q_NORM and K_NORM are; AFTER: behind the rotation; L2_AFTER: without weights, behind the
 * rotation, on rotated layers, when use_qk_norm is set (Llama 4). */
typedef enum moec_qk_norm { MOEC_QK_BEFORE, MOEC_QK_AFTER, MOEC_QK_L2_AFTER } moec_qk_norm;
/* Which layers are not rotated: none; those with full attention when others slide; those with a 0 in no_rope_layers. */
typedef enum moec_nope { MOEC_NOPE_NONE, MOEC_NOPE_ON_FULL, MOEC_NOPE_LIST } moec_nope;
/* Which layers see a part of the past: none; all when sliding_window is set; the same if use_sliding_window is true; those
 * that are "sliding_attention"; those that are "chunked_attention", which without layer_types are the rotated ones. */
typedef enum moec_window_rule {
    MOEC_WINDOW_NONE, MOEC_WINDOW_ALL, MOEC_WINDOW_IF_USED, MOEC_WINDOW_TYPES, MOEC_WINDOW_CHUNK
} moec_window_rule;

/* What layers are when the config has no layer_types: all full attention; every n-th full attention (key_full_every, else
 * full_every) and the others sliding, or what the family's mixer puts in their place; sliding from max_window_layers on; the
 * even ones below max_window_layers sliding. */
typedef enum moec_types_rule {
    MOEC_TYPES_FULL, MOEC_TYPES_FULL_EVERY, MOEC_TYPES_SLIDE_FROM, MOEC_TYPES_SLIDE_EVEN_BELOW
} moec_types_rule;

typedef enum moec_router_score { MOEC_SCORE_SOFTMAX, MOEC_SCORE_SIGMOID, MOEC_SCORE_RELU } moec_router_score;
/* Who is chosen and with what weight: the k largest scores; the k largest logits, weighted by the softmax over these k; the
 * fewest whose scores exceed top_p_threshold together; all with a score above 0; sparsemixer (PhiMoE), two draws. */
typedef enum moec_choice {
    MOEC_CHOOSE_TOP_K, MOEC_CHOOSE_TOP_K_SOFTMAX, MOEC_CHOOSE_TOP_P, MOEC_CHOOSE_POSITIVE, MOEC_CHOOSE_SPARSEMIXER
} moec_choice;
/* Are the selected weights divided by their sum? By key_renorm (NULL: norm_topk_prob; true or 1), always, never. */
typedef enum moec_renorm { MOEC_RENORM_KEY, MOEC_RENORM_ALWAYS, MOEC_RENORM_NEVER } moec_renorm;
/* Choice among the topk_group best of n_group groups of experts, a group being as good as its best score, or as the sum of
 * its two best. MAX holds when topk_method is group_limited_greedy. */
typedef enum moec_group_rule { MOEC_GROUP_NONE, MOEC_GROUP_MAX, MOEC_GROUP_TOP2 } moec_group_rule;
/* What a row of the router without a network stands for: nothing; the expert's input; a mixture of it and a constant. */
typedef enum moec_null_kind { MOEC_NULL_ZERO, MOEC_NULL_COPY, MOEC_NULL_CONSTANT } moec_null_kind;
/* silu(gate) * up; gpt-oss's clamped (up + 1) * gate * sigmoid(alpha * gate). */
typedef enum moec_activation { MOEC_ACT_SWIGLU, MOEC_ACT_SWIGLU_CLAMPED } moec_activation;
/* Which layers have no router: none; i < first_k_dense_replace; those in mlp_only_layers or off the decoder_sparse_step;
 * i < num_dense_layers; "dense" in mlp_layer_types, else the first; not in moe_layers or off interleave_moe_layer_step;
 * outside moe_layer_start_index .. moe_layer_end_index or off moe_layer_interval; off expert_frequency.
 * Where mlp_layer_types is present it decides for the FIRST_K, NUM_DENSE and TYPES rules. */
typedef enum moec_dense_rule {
    MOEC_DENSE_NONE, MOEC_DENSE_FIRST_K, MOEC_DENSE_MLP_ONLY, MOEC_DENSE_NUM, MOEC_DENSE_TYPES, MOEC_DENSE_INTERLEAVED,
    MOEC_DENSE_RANGE, MOEC_DENSE_FREQUENCY
} moec_dense_rule;

/* What llama.cpp's graph of an architecture does on its own, and so what a GGUF of it must agree with (run/gguf_model.h). */
typedef enum moec_gguf_renorm { MOEC_GGUF_RENORM_NEVER, MOEC_GGUF_RENORM_ALWAYS, MOEC_GGUF_RENORM_KEY } moec_gguf_renorm;
typedef struct moec_gguf_rules {
    const char *arch;        /* general.architecture; NULL: no GGUF of this family is written */
    const char *mlp_norm;    /* name of MOEC_VEC_NORM_MLP; NULL: "ffn_norm" */
    moec_gguf_renorm renorm; /* are the selected weights divided by their sum? KEY: expert_weights_norm says it */
    bool permute;            /* rows of q and k in the order of rotated pairs (i, i+d/2) -> (2i, 2i+1) */
    bool dense_first;        /* leading_dense_block_count layers without a router; else every layer has one */
    bool routing_keys;       /* expert_gating_func, expert_weights_scale, expert_shared_count and groups are read */
    bool expert_width;       /* expert_feed_forward_length is the experts' width; else feed_forward_length is */
    bool equal_heads;        /* as many key heads as heads, together as wide as the hidden size: norms of q and k are loaded so */
    bool window;             /* every second layer slides, attention.sliding_window wide */
    /* For reading (model/gguf_open.h): */
    const char *config;      /* JSON object of keys that config.json then also has; NULL: none */
    const char *key_bias;    /* config key that says whether q, k and v have biases; NULL: none */
    moec_expert_names experts; /* names of an expert's own tensors where the family has none; gate NULL: it has */
} moec_gguf_rules;

enum { MOEC_KEY_ALIASES = 4, MOEC_LAYOUTS = 4, MOEC_TAIL = 4 };

typedef struct moec_family {
    const char *model_type;   /* config.json's model_type */
    const char *alias[3];     /* further model_types with the same layout and arithmetic */
    const char *detect;       /* or: a key whose presence means this family, whatever the model_type says; NULL: none */
    const char *architecture; /* config.json's architectures[0], for reports */
    const char *source;       /* where the layout and the arithmetic were taken from */
    const char *models;       /* released models, for the table in the README */

    /* Config keys: the first that is present wins, in reading and in writing. */
    const char *key_experts[MOEC_KEY_ALIASES], *key_top_k[MOEC_KEY_ALIASES], *key_expert_width[MOEC_KEY_ALIASES];
    const char *key_dense_width;
    const char *key_shared_count[MOEC_KEY_ALIASES]; /* shared width = count * I, unless key_shared_width is there */
    const char *key_shared_width;
    const char *key_groups, *key_top_groups;        /* n_group, topk_group; NULL: no groups */
    const char *key_route_scale;                    /* factor on the weights; NULL: none */
    const char *key_mtp[MOEC_KEY_ALIASES];          /* number of multi-token-prediction layers; NULL: no such key */
    int64_t default_experts, default_top_k, default_shared; /* when no key is present; 0: the key is required / none */
    int64_t default_kv_heads, default_head_dim;   /* 0: as many as heads; hidden / heads */
    int64_t default_window, default_chunk;        /* when the key is absent (null means none); 0: none */
    int64_t default_groups, default_top_groups;   /* 0: 1 */
    double default_route_scale, default_score_scale; /* 0: 1; 1 / sqrt(head_dim) */

    /* Tensor names. */
    const char *embed, *final_norm, *final_norm_bias, *head; /* head absent: tied to embed */
    const char *mat[MOEC_MAT_COUNT], *vec[MOEC_VEC_COUNT];
    const char *qkv;           /* q, k and v in one matrix, in this order; then no MOEC_MAT_Q, K, V */
    const char *heads_in, *heads_out; /* attention experts [E, kv*d, H] [E, H, kv*d] */
    const char *shared_gate_up; /* gate and up of the shared expert in one matrix; then no MOEC_MAT_SHARED_GATE, UP */
    moec_expert_names experts[MOEC_LAYOUTS]; /* the first that a layer has */
    /* Experts without a network that config and names count behind the others, their rows in the router's one tensor; they
     * always stay. A constant is a1 x + a2 v with (a1, a2) = softmax(mix x). */
    moec_null_kind tail[MOEC_TAIL];
    int n_tail;
    const char *constant, *constant_mix; /* v [H] and mix [2, H] of expert %d */
    const char *key_exact_tokens; /* longest window whose attention is dense, which is all that is computed (a sparse indexer picks
                                  keys in longer ones); NULL: any */
    int64_t default_exact_tokens;
    const char *unread;        /* part of the names of tensors that such windows do not need, ".indexer."; NULL: none */
    const char *mtp_layer;     /* prefix of layer %d of multi-token prediction, "mtp.layers.%d."; NULL: "model.layers.%d."
                                  from the number of layers on */
    const char *mtp_prefix;    /* prefix of all their tensors where mtp_layer is set, "mtp." */

    /* Rules. */
    double default_rope_theta, default_norm_eps, default_partial_rotary; /* partial: 0 means 1 */
    const char *default_rope;  /* JSON object read in place of config.json's rope keys where it has none; NULL: plain */
    const char *key_norm_eps;                                            /* NULL: rms_norm_eps; "": none */
    double latent_norm_eps;                                              /* of Q_A_NORM, KV_A_NORM; 0: the same */
    moec_norm norm;
    moec_mixer mixer;
    moec_rotation rotation;
    moec_qk_norm qk_norm;
    bool gate_in_q;            /* each head of Q is [query d | gate d]: output times sigmoid(gate) */
    moec_nope nope;
    moec_window_rule window;
    moec_router_score score;
    moec_choice choice;
    moec_renorm renorm;
    const char *key_renorm;
    bool default_renorm;       /* when the key is absent */
    double renorm_eps;         /* added to the sum */
    const char *key_renorm_min; /* the sum is at least this; NULL: no such bound */
    const char *key_top_k_softmax; /* true: MOEC_CHOOSE_TOP_K_SOFTMAX, and no division by the sum; NULL: no such key */
    const char *key_logit_std, *key_logit_std_used; /* if the second is true: deviation of the logits that decide */
    const char *key_input_plain; /* the experts' input is k x, unless this or key_top_k_softmax is true; NULL: x */
    const char *key_router_in;   /* false: there is no MOEC_MAT_ROUTER_IN */
    int64_t router_in_each;      /* R / (E+N) that the model's own code wants; 0: any */
    moec_group_rule group;
    bool weight_on_input;      /* the weight multiplies the expert's input, not its output */
    moec_activation activation;
    moec_dense_rule dense;
    int64_t default_dense;     /* layers of the FIRST_K and NUM rules when the key is absent */
    moec_types_rule types;
    const char *key_full_every;
    int64_t full_every;

    /* What clients take, all layers having the same number of experts. */
    bool loads_transformers, loads_vllm, loads_sglang, loads_llama_cpp;
    /* Experts in codes of few bits are loaded by transformers with auto-round, with compressed-tensors: tried (tests/interop). */
    bool loads_gptq, loads_compressed;
    moec_gguf_rules gguf;
    bool remote_code;          /* transformers needs the model's own Python files */
} moec_family;

/** The family whose model_type or alias this is, or NULL. */
MOEC_API const moec_family *moec_family_find(const char *model_type);
/** The family of a config.json: by detect key first, then by model_type of text_config, then of the whole; NULL: none. */
MOEC_API const moec_family *moec_family_of(const moec_json *config);
/** What row E + i of a family's routers stands for. */
MOEC_API moec_null_kind moec_family_null(const moec_family *f, int64_t i);
/** Row i of the table, NULL behind the last. */
MOEC_API const moec_family *moec_family_at(int i);

#endif
