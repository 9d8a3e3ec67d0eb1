/* A model: a checkpoint whose tensors were bound once to named roles with checked shapes, and the numbers of its config. */
#ifndef MOEC_MODEL_MODEL_H
#define MOEC_MODEL_MODEL_H

#include "ckpt/ckpt.h"
#include "model/family.h"
#include "num/weight.h"

/* Rotary embedding as one table: angle of pair i at position p is p*inv_freq[i], cos and sin are times `scale`. */
typedef enum moec_rope_kind {
    MOEC_ROPE_DEFAULT, MOEC_ROPE_LINEAR, MOEC_ROPE_DYNAMIC, MOEC_ROPE_YARN, MOEC_ROPE_LLAMA3, MOEC_ROPE_LONGROPE
} moec_rope_kind;
enum { MOEC_ROPE_FACTORS = 256 }; /* most pairs of a longrope table */
/* Numbers as the config's keys name them: original is original_max_position_embeddings, mscale_all mscale_all_dim, low_factor
 * and high_factor are low_freq_factor and high_freq_factor; 0: not given. Lengths in tokens, width in values of a head. */
typedef struct moec_rope {
    moec_rope_kind kind;
    double theta, factor, original, low_factor, high_factor, beta_fast, beta_slow, attention_factor, mscale, mscale_all;
    double alpha;                                          /* dynamic, not by length but by this (HunYuan); 0: by length */
    double short_mscale, long_mscale;                      /* longrope as PhiMoE scales it; 0: by the factor */
    double short_factor[MOEC_ROPE_FACTORS], long_factor[MOEC_ROPE_FACTORS]; /* longrope [width/2] */
    bool truncate;
    int64_t width, max_positions;
} moec_rope;

typedef struct moec_dims {
    int64_t layers, hidden, vocab;
    int64_t heads, kv_heads, head_dim, value_dim; /* head_dim: of q and k; value_dim: of v */
    int64_t nope_dim, q_rank, kv_rank;            /* latent attention: head_dim = nope_dim + rope.width; q_rank 0: full */
    int64_t experts, top_k, expert_width;         /* E, k, I: one value for all MoE layers */
    int64_t slots;                                /* most experts a token can have: k, or E where their number varies */
    int64_t null_experts;                         /* N router rows without a network, from E on; moec_family_null */
    int64_t carried;                              /* logits of a token that the next MoE layer's router needs: E+N or 0 */
    int64_t shared_width, dense_width;            /* 0: none */
    int64_t groups, top_groups;                   /* 1, 1: no groups */
    int64_t delta_key_heads, delta_value_heads, delta_key_dim, delta_value_dim; /* gated delta net */
    int64_t conv_taps;
    double norm_eps, latent_eps;
    double renorm_eps, renorm_min, route_scale;
    double logit_std;                             /* of the logits that decide; 0: as they are */
    double input_scale;                           /* the routed experts' input is x times this */
    double top_p, jitter;                         /* MOEC_CHOOSE_TOP_P; sparsemixer's threshold is 2*jitter */
    double embed_scale, residual_scale, logit_scale; /* logits are DIVIDED by logit_scale */
    double score_scale;                           /* of q.k, everything included */
    double clip_qkv;                              /* |q|, |k|, |v| are cut here; 0: not */
    double temper_floor, temper_scale;            /* layers without rotation: q *= 1 + scale*ln(1 + floor((p+1)/floor));
                                                     0: not */
    double act_limit, act_alpha;                  /* MOEC_ACT_SWIGLU_CLAMPED */
    int64_t exact_tokens;                         /* longest window that is computed; 0: any */
    double keep_mass;                             /* of the selected experts of a token only the fewest of largest weight stay that
                                                     hold this share of their sum; 0: all (variant.h) */
    bool renorm;                                  /* selected weights are divided by their sum */
    bool top_k_softmax;                           /* MOEC_CHOOSE_TOP_K_SOFTMAX, whatever the family chooses by */
    bool router_in;                               /* there is a MOEC_MAT_ROUTER_IN */
    bool qk_l2;                                   /* MOEC_QK_L2_AFTER is in force */
    bool tied;
    moec_rope rope;
} moec_dims;

/* One expert: down(act(gate x, up x)). */
typedef struct moec_mlp {
    moec_weight gate, up, down; /* [I,H] [I,H] [H,I] */
} moec_mlp;
/* By number: 0 gate, 1 up, 2 down. */
static inline moec_weight *moec_mlp_matrix(moec_mlp *x, int64_t which)
{
    return which == 0 ? &x->gate : which == 1 ? &x->up : &x->down;
}

typedef struct moec_layer {
    int64_t index;
    moec_mixer mixer;
    int64_t window, chunk; /* keys seen, self included; keys p with p / chunk equal to the query's; 0: no such bound */
    bool rotated;          /* rotary positions here */
    moec_weight mat[MOEC_MAT_COUNT];          /* .of NULL: none */
    const moec_tensor *bias[MOEC_MAT_COUNT];  /* NULL: none */
    const moec_tensor *vec[MOEC_VEC_COUNT];   /* NULL: none */
    moec_expert_layout layout;
    moec_mlp *expert;                         /* [E], NULL: dense layer */
    const bool *removed;                      /* [E] experts whose logits count as -infinity; NULL: none (see variant.h) */
    const bool *heads_removed;                /* the same of attention experts */
    const int32_t *router_row;                /* [E] row of the router that is an expert's, -1: none; NULL: e is e's */
    const moec_tensor *gate_up_bias, *down_bias; /* a row an expert, [.,2I] interleaved as gate_up is, [.,H]; NULL: none */
    const int32_t *gate_up_bias_row, *down_bias_row; /* [E] an expert's row in them, -1: it has none; NULL: e is e's */
    const moec_tensor *constant[MOEC_TAIL], *constant_mix[MOEC_TAIL]; /* of null expert i; NULL: of another kind */
    const moec_tensor *heads_in, *heads_out;  /* attention experts [E, kv*d, H] [E, H, kv*d]; NULL: none */
    int64_t moe_index;                        /* 0, 1, .. over the MoE layers; -1: dense */
} moec_layer;

/* A set of E experts behind one router; a plan has one keep list for each. */
typedef enum moec_set_kind {
    MOEC_SET_MOE,   /* an MoE layer of the forward pass: its moe_index is the set's number */
    MOEC_SET_HEADS, /* attention experts of a layer; no statistics are kept of them */
    MOEC_SET_MTP,   /* a multi-token-prediction layer: not run, so no statistics either */
} moec_set_kind;
typedef struct moec_set {
    moec_set_kind kind;
    int64_t layer;             /* number in its tensors' names */
    const moec_weight *router; /* [E, H] */
} moec_set;

typedef struct moec_model {
    moec_ckpt *ckpt;
    const moec_family *family;
    const moec_json *config; /* of the text model: config.json or its text_config; borrowed from ckpt */
    const char *config_at;   /* path of it: "" or "text_config." */
    const char *prefix;      /* what stands for "model." in tensor names */
    moec_dims dims;
    moec_layer *layer;       /* [dims.layers] */
    moec_layer *mtp;         /* [mtp_layers] router and experts only are bound; index is the number in the names */
    moec_set *set;           /* [sets] first the moe_layers, then attention experts, then mtp */
    int64_t moe_layers, mtp_layers, sets;
    moec_weight embedding;   /* [vocab, H] */
    const moec_tensor *final_norm, *final_norm_bias; /* final_norm_bias, head_bias: NULL: none */
    moec_weight head;        /* [vocab, H], the embedding when tied */
    const moec_tensor *head_bias;
    const char *key_experts, *key_top_k; /* spelled as in this config.json; NULL: the default is in force, no key */
    const char *key_mtp;                 /* NULL: no such key */
    bool packed;             /* matrices are in codes of few bits: as config.json says (GPTQ, compressed-tensors, nested), or a GGUF's */
    bool zero_more;          /* and that GPTQ's zero points are stored less one */
    int read_bits;           /* nested codes are read at this width, where they have as many; 0: at their own */
} moec_model;

/* Key of a config.json whose checkpoint has factors in place of experts' matrices: only transformers computes with them. */
#define MOEC_CONFIG_FACTORS "moecompress_factors"
/* And where a router has more rows than there are experts: {"LAYER": [expert of each row, ..], ..}. */
#define MOEC_CONFIG_MAP "moecompress_map"

/** Opens a folder, or a GGUF file (model/gguf_open.h), and binds it. Of a GGUF moec_ckpt_gguf of its checkpoint is not NULL: what writes
 *  a folder by copying from one refuses it.
 *  @return MOEC_OK; everything moec_ckpt_open and moec_gguf_ckpt return; MOEC_EFORMAT: model_type unknown (the text names what is near it), a
 *          config key missing, of the wrong type or out of range, top-k above the number of experts, unknown rope type, a
 *          quantized source in a form that is not read (FP8 in blocks, MXFP4, GPTQ and compressed-tensors' packed codes are), or one
 *          with factored experts or a router with rows that share some; MOEC_ESHAPE: a tensor missing or of another shape or a dtype that cannot be computed with
 *          (the text names it, what it is and what was expected). Close with moec_model_close. */
MOEC_API moec_status moec_model_open(moec_model **out, const char *dir, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_model_close(moec_model *m);
/** From now on nested codes (run/nested.md) are read at `bits`, as far as a matrix has as many and config.json's read_bits allows.
 *  MOEC_EINVAL: bits are not 2 to 8, or none of the routed experts' matrices is nested. */
MOEC_API moec_status moec_model_read_bits(moec_model *m, int bits, moec_err *err) MOEC_USE_RESULT;

/* What a tensor is, for whoever rewrites or counts it. */
typedef enum moec_role {
    MOEC_ROLE_OTHER,
    MOEC_ROLE_EXPERT, /* belongs to one expert, whose number is in its name */
    MOEC_ROLE_STACK,  /* has one equal part for each expert, side by side in its bytes: router rows, biases, stacked
                         experts, their scales; behind them `tail` more parts */
} moec_role;
/* Which weights of a set a tensor holds: bits, since gate and up may be one tensor. Scales and biases of experts go with
 * their matrices. */
typedef enum moec_part {
    MOEC_PART_GATE = 1, MOEC_PART_UP = 2, MOEC_PART_DOWN = 4,
    MOEC_PART_ROUTER = 8, MOEC_PART_ROUTER_BIAS = 16, MOEC_PART_SELECTION_BIAS = 32,
} moec_part;
typedef struct moec_place {
    moec_role role;
    uint32_t parts;           /* moec_part of EXPERT and STACK; 0: other */
    int32_t width_axis;       /* dimension that grows with the experts' width; -1: none */
    bool weights;             /* of an expert's matrices, biases and scales; false: router, selection bias, other */
    bool mtp;                 /* of a multi-token-prediction layer, whatever its role */
    int32_t axis;             /* STACK: the dimension that counts E parts (dim[axis] minus tail is a multiple of E) */
    int64_t tail;             /* STACK: parts of experts that always stay */
    int64_t across;           /* STACK: 1 + the set whose experts the second dimension counts, tail as well; 0: none */
    int64_t set, expert;      /* EXPERT, STACK: model->set; EXPERT: its number, E and above for one that always stays */
    size_t number_at;         /* EXPERT: where the number stands in the name */
    int64_t layer;            /* number in a name that begins as those of layers do ("model.layers.7."), -1: none */
    size_t layer_at;          /* where it stands */
} moec_place;

/** Role of every tensor of the checkpoint, by its index there; free with moec_free. Tensors that no role was bound to
 *  are OTHER. MOEC_ENOMEM. */
MOEC_API moec_status moec_model_places(moec_place **out, const moec_model *m, moec_err *err) MOEC_USE_RESULT;
/** Name of an EXPERT tensor under another expert number. Free with moec_free. MOEC_EINVAL: not of that role; MOEC_ENOMEM. */
MOEC_API moec_status moec_model_rename_expert(char **out, const moec_tensor *t, moec_place place, int64_t new_expert,
                                              moec_err *err) MOEC_USE_RESULT;
/** Name of the module of an expert's matrix (0 gate, 1 up, 2 down) of a layer: "model.layers.0.mlp.experts.3.gate_proj", as
 *  transformers 5 has it, or with `own` as releases have it ("block_sparse_moe.experts.3.w1"). Free with moec_free. MOEC_EINVAL: the
 *  family has no such name, its experts are stacked; MOEC_ENOMEM. */
MOEC_API moec_status moec_expert_module(char **out, const moec_model *m, int64_t layer, int64_t expert, int which, bool own,
                                        moec_err *err) MOEC_USE_RESULT;
/** Does the forward pass read the tensor? By index in the checkpoint; free with moec_free. MOEC_ENOMEM. */
MOEC_API moec_status moec_model_used(bool **out, const moec_model *m, moec_err *err) MOEC_USE_RESULT;

/* Of all tensors of the checkpoint, multi-token prediction included. A quantized value is one parameter, its scales are
 * none. */
typedef struct moec_sizes {
    uint64_t total;        /* parameters */
    uint64_t active;       /* of these, what a token uses: k experts of each set, no row of the embedding, the head, no MTP;
                              where the number of experts varies, k is that of the config */
    uint64_t routed;       /* of these, of experts, attention experts and those of MTP included */
    uint64_t bytes, routed_bytes;
} moec_sizes;
/** Counts by roles and shapes; reads no tensor data. MOEC_ENOMEM. */
MOEC_API moec_status moec_model_sizes(moec_sizes *out, const moec_model *m, moec_err *err) MOEC_USE_RESULT;

/** inv_freq[width/2] and the scale of cos and sin, for sequences of `length` tokens (dynamic and longrope depend on it).
 *  Source: transformers' modeling_rope_utils; see each kind's comment in rope.c. */
MOEC_API void moec_rope_table(double *inv_freq, double *scale, const moec_rope *rope, int64_t length);
/** Does the table depend on the length of the sequence? */
MOEC_API bool moec_rope_by_length(const moec_rope *rope);
/** Reads rope_scaling / rope_parameters / rope_theta in both config dialects. `width`: of a head; the rotated part of it is
 *  by partial_rotary_factor or rotary_dim, else `partial` of it (0: all).
 *  MOEC_EFORMAT: unknown type, bad number. */
MOEC_API moec_status moec_rope_read(moec_rope *out, const moec_json *config, int64_t width, double partial,
                                    double default_theta, moec_err *err) MOEC_USE_RESULT;

#endif
