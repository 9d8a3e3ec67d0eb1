/* A model: a checkpoint whose tensors were bound once to named roles with checked shapes, and the numbers of its config. */
#ifndef MOEC_MODEL_MODEL_H
#define MOEC_MODEL_MODEL_H

#include "ckpt/ckpt.h"
#include "model/family.h"

/* Rotary embedding as one table: angle of pair i at position p is p*inv_freq[i], cos and sin are times `scale`. */
typedef enum moec_rope_kind { MOEC_ROPE_DEFAULT, MOEC_ROPE_LINEAR, MOEC_ROPE_DYNAMIC, MOEC_ROPE_YARN, MOEC_ROPE_LLAMA3 } moec_rope_kind;
typedef struct moec_rope {
    moec_rope_kind kind;
    double theta, factor, original, low_factor, high_factor, beta_fast, beta_slow, attention_factor, mscale, mscale_all;
    bool truncate;
    int64_t width, max_positions;
} moec_rope;

typedef struct moec_dims {
    int64_t layers, hidden, vocab, heads, kv_heads, head_dim;
    int64_t experts, top_k, expert_width; /* E, k, I: one value for all MoE layers */
    int64_t dense_width;
    int64_t window; /* sliding window in keys, self included; 0: none */
    double norm_eps;
    bool renorm; /* selected weights are divided by their sum */
    bool tied;
    moec_rope rope;
} moec_dims;

/* One expert or one dense feed-forward: down(silu(gate x) * (up x)). */
typedef struct moec_mlp {
    const moec_tensor *gate, *up, *down;
} moec_mlp;

typedef struct moec_layer {
    int64_t index;
    const moec_tensor *norm_attn, *norm_mlp;
    const moec_tensor *q, *k, *v, *o;
    const moec_tensor *q_bias, *k_bias, *v_bias, *o_bias; /* NULL: none */
    const moec_tensor *q_norm, *k_norm;                   /* NULL: none */
    const moec_tensor *router;                            /* NULL: dense layer */
    moec_mlp *expert;                                     /* [E], or NULL */
    moec_mlp dense;
    int64_t moe_index; /* 0, 1, .. over the MoE layers; -1: dense */
} moec_layer;

typedef struct moec_model {
    moec_ckpt *ckpt;
    const moec_family *family;
    moec_dims dims;
    moec_layer *layer; /* [dims.layers] */
    int64_t moe_layers;
    const moec_tensor *embed, *final_norm, *head; /* head == embed when tied */
    const char *key_experts, *key_top_k; /* spelled as in this config.json; NULL: the default is in force, no key */
} moec_model;

/** Opens a folder and binds it.
 *  @return MOEC_OK; everything moec_ckpt_open returns; MOEC_EFORMAT: model_type unknown (the text lists the known ones), a
 *          config key missing, of the wrong type or out of range, top-k above the number of experts, unknown rope type, a
 *          quantized source; MOEC_ESHAPE: a tensor missing or of another shape or a dtype that cannot be computed with
 *          (the text names it, what it is and what was expected). Close with moec_model_close. */
MOEC_API moec_status moec_model_open(moec_model **out, const char *dir, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_model_close(moec_model *m);

/* What a tensor is, for whoever rewrites or counts it. */
typedef enum moec_role { MOEC_ROLE_OTHER, MOEC_ROLE_ROUTER, MOEC_ROLE_EXPERT } moec_role;
typedef struct moec_place {
    moec_role role;
    int64_t layer, expert; /* of ROUTER and EXPERT; expert -1 for ROUTER */
} moec_place;

/** Role of every tensor of the checkpoint, by its index there; free with moec_free. Tensors that no role was bound to
 *  (a multi-token-prediction layer, say) are OTHER. */
MOEC_API moec_status moec_model_places(moec_place **out, const moec_model *m, moec_err *err) MOEC_USE_RESULT;

/** Name of an expert's tensor under another expert number: `name` is that of a tensor whose place is (layer, expert).
 *  Free with moec_free. */
MOEC_API moec_status moec_model_rename_expert(char **out, const moec_model *m, const moec_tensor *t, moec_place place,
                                              int64_t new_expert, moec_err *err) MOEC_USE_RESULT;

/** Parameter and byte counts. active: parameters a token uses (embedding row not counted, head counted, k experts). */
typedef struct moec_sizes {
    uint64_t total, active, routed; /* parameters */
    uint64_t bytes, routed_bytes;
} moec_sizes;
MOEC_API moec_status moec_model_sizes(moec_sizes *out, const moec_model *m, moec_err *err) MOEC_USE_RESULT;

/** inv_freq[width/2] and the scale of cos and sin, for sequences of `length` tokens (dynamic scaling depends on it).
 *  Source: transformers' modeling_rope_utils; see each kind's comment in rope.c. */
MOEC_API void moec_rope_table(double *inv_freq, double *scale, const moec_rope *rope, int64_t length);
/** Reads rope_scaling / rope_parameters / rope_theta in both config dialects. MOEC_EFORMAT: unknown type, bad number. */
MOEC_API moec_status moec_rope_read(moec_rope *out, const moec_json *config, int64_t width, double default_theta,
                                    moec_err *err) MOEC_USE_RESULT;

#endif
