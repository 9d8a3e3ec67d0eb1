/* Inside of the forward pass, shared by the files of this folder that compute: forward.c (memory, layers, chunks), mix_*.c
 * (what mixes tokens: attention and its kin), router.c (who is chosen), moe.c (experts), forward_share.c (what threads do
 * together in one chunk). */
#ifndef MOEC_MODEL_FORWARD_PARTS_H
#define MOEC_MODEL_FORWARD_PARTS_H

#include "base/par.h"
#include "model/forward.h"

enum {
    MOEC_BLOCK = 256,    /* tokens of one matrix product inside an expert */
    MOEC_QUERIES = 64,   /* query rows of one attention score block */
    MOEC_GROUP = 512,    /* tokens whose token mixing runs together, unless one sequence is longer */
};

/* A router in float32: logits = rows x + bias, or rows tanh(in x) + bias; where logits are carried, plus map times those of
 * the MoE layer before. */
typedef struct moec_router {
    const moec_layer *layer; /* NULL: there is none */
    float *in, *map;         /* [width, H], [E+N, E+N]; NULL: none */
    int64_t width;           /* columns of rows */
    float *rows, *bias, *selection; /* [E+N, width]; [E+N] added to the logits, [E] to the scores when choosing; NULL: none */
    float *norm;             /* [E] |w_e|_2; 0 where logits are not rows x + bias alone */
    const bool *removed;     /* [E] never chosen, logits -infinity; NULL: none */
    float *rows_store, *bias_store, *selection_store, *in_store, *map_store;
} moec_router;

/* One worker's memory. g: tokens of an attention group, n: tokens of a chunk. What a mixer of the model does not need has
 * no bytes. Mixers may use panel_*, q, k, v, ctx, gate and work as they like; the names say what attention does. */
typedef struct moec_scratch {
    float *x, *r;                   /* [n,H] normed input, routed output */
    float *shared;                  /* [n,H] output of the shared experts; no bytes without them */
    float *panel_in;                /* panels [g, widest input of a mixer's matrix], [BLOCK, widest input of the others] */
    float *panel_a, *panel_b;       /* panels [BLOCK, widest of expert, shared and dense MLP] */
    float *panel_out;               /* panels [BLOCK, most rows of any matrix and router] */
    float *q, *k, *v, *ctx;         /* what attention's kinds need, [g, heads*d] [g, kv*d] [g, kv*dv] [g, heads*dv] for one */
    float *gate;                    /* [g, heads*dv] attention output gate before its sigmoid */
    float *work;                    /* [moec__mix_work_floats] of the model's mixers */
    float *scores_qk;               /* [threads, QUERIES, max_seq + 16] */
    float *rope_cos, *rope_sin;     /* [max_seq, width/2] where a sequence needs its own table, else NULL */
    double *inv_freq;               /* [width/2] */
    float *logits, *scores;         /* [n, E+N] */
    int32_t *ids, *next_ids;        /* [n, slots]; -1: the slot is empty */
    float *gates, *y_norm;          /* [n, slots] */
    float *null_gates;              /* [n, N] weights of the experts without a network; -1: not chosen */
    float *carried;                 /* [n, C] logits of the MoE layer before; the caller's, NULL: none are needed */
    int32_t *count, *first;         /* [E], [E+1] */
    int32_t *token, *slot;          /* [n*slots] tokens and slots by expert */
    float *weight;                  /* [n*slots] gate of each slot, by expert */
    float *out_absmax, *in_absmax;  /* [E] */
    int32_t *out_channel;           /* [E] */
    void *gemm;                     /* scratch of moec_gemm */
    moec_tap_fn *tap;               /* shown what matrices multiply; NULL: nobody */
    void *tap_ctx;
    int64_t tapped[MOEC_MAT_COUNT]; /* tokens of the chunk that each was shown */
    bool mix_only;
    moec_expert_sums sums;
} moec_scratch;

struct moec_forward {
    const moec_model *m;
    moec_forward_opts o;
    const moec_layer *layer;            /* current */
    int64_t group;                      /* tokens that an attention group may hold */
    float *vec[MOEC_VEC_COUNT];         /* float32 of the current layer's small arrays; NULL: it has none */
    float *bias[MOEC_MAT_COUNT];        /* the same for biases */
    float *vec_store[MOEC_VEC_COUNT], *bias_store[MOEC_MAT_COUNT]; /* their memory, for the largest of all layers */
    float *expert_gate_bias, *expert_up_bias, *expert_down_bias;   /* [E,I] [E,I] [E,H]; no bytes without them */
    float *constant, *constant_mix;     /* [tail,H] [tail,2,H] of constants among the experts without a network */
    moec_router router, next_router;    /* of this layer; of the next one with a router (what prefetching would use) */
    float *rope_cos, *rope_sin;         /* [max_seq, width/2] */
    unsigned char *expert_ok;           /* [E] of a lean pass: 1 once the expert's weights were found finite; atomic */
    moec_scratch *scratch;              /* [workers] */
};

/* --- forward.c ------------------------------------------------------------------------------------------------------- */

/* y = norm(x) for n rows of the model's kind of norm; bias NULL: none. In place allowed. */
void moec__norm(float *y, const float *x, const float *w, const float *bias, const moec_model *m, int64_t n, int64_t width);
/* out [n, rows] = W x + bias for token-major x given as panels [n, cols] already packed in s->panel_in. */
moec_status moec__project(moec_forward *f, moec_scratch *s, float *out, int64_t n, moec_mat which, moec_err *err)
    MOEC_USE_RESULT;
/* Shows the input of `w` to the tap, where there is one and w is a matrix of the layer, or the first rows of one. */
moec_status moec__tap(moec_forward *f, moec_scratch *s, const moec_weight *w, const float *panels, int64_t n, moec_err *err)
    MOEC_USE_RESULT;
/* The same for any view, panels and bias (NULL: none), with `ldo` floats from row to row of out. */
moec_status moec__project_view(moec_forward *f, moec_scratch *s, float *out, int64_t ldo, const float *panels, int64_t n,
                               const moec_weight *w, const float *bias, moec_err *err) MOEC_USE_RESULT;
/* out [n, rows] = W x + bias for token-major x [n, cols], packed here by blocks; panel_in is overwritten. out is not x. */
moec_status moec__project_rows(moec_forward *f, moec_scratch *s, float *out, const float *x, int64_t n, moec_mat which,
                               moec_err *err) MOEC_USE_RESULT;

/* --- forward_share.c: the same with a chunk's threads; each gives the bits that one thread would give ------------------- */

/* fn over [0, n), items of about `each` floats. fn does not fail; its worker is below max(1, opts.threads). */
void moec__share(const moec_forward *f, int64_t n, int64_t each, moec_range_fn *fn, void *ctx);
/* moec_panel_pack, moec_panel_unpack, moec_panel_scatter_add with tokens that are all different, moec__norm, moec_add. */
void moec__share_pack(const moec_forward *f, float *out, const float *x, int64_t ldx, const int32_t *at, int64_t n,
                      int64_t width);
void moec__share_unpack(const moec_forward *f, float *y, int64_t ldy, const float *panels, int64_t n, int64_t width);
void moec__share_scatter(const moec_forward *f, float *y, int64_t ldy, const int32_t *at, const float *scale,
                         const float *panels, int64_t n, int64_t width);
void moec__share_norm(const moec_forward *f, float *y, const float *x, const float *w, const float *bias, int64_t n,
                      int64_t width);
void moec__share_add(const moec_forward *f, float *y, const float *x, int64_t n, int64_t width);

/* --- forward_tensors.c: every tensor of a layer is finite, see moec_forward_layer. lean: pages are given back, and the
 * matrices of experts are left to moec__expert_check, which looks at each until it was found good. ------------------------ */

moec_status moec__layer_check(const moec_model *m, int64_t layer, bool lean, moec_err *err) MOEC_USE_RESULT;
moec_status moec__expert_check(moec_forward *f, int64_t e, moec_err *err) MOEC_USE_RESULT;

/* --- mix_*.c: out [n,H] = mixed x, for the sequences of one group. x [n,H] is the normed input; out may be x; offsets
 * seq[0..n_seq] start at seq[0]; token t of the group is row t - seq[0]. -------------------------------------------------- */

typedef moec_status moec_mix_fn(moec_forward *f, moec_scratch *s, float *out, const float *x, const int64_t *seq,
                                int64_t n_seq, moec_err *err);
moec_mix_fn moec__mix_attention, moec__mix_latent, moec__mix_conv, moec__mix_delta, moec__mix_heads;
/* Floats of scratch->work that the mixers of a model need for groups of g tokens and sequences of max_seq: the most that
 * one of its layers' mixers asks for (forward.c asks each mixer that a layer has). q, k, v, ctx, gate belong to attention,
 * latent attention and attention experts; convolution and delta nets have everything but panel_in in `work`. */
size_t moec__mix_work_floats(const moec_model *m, int64_t g, int64_t max_seq);
size_t moec__work_attention(const moec_model *m, const moec_layer *l, int64_t g, int64_t max_seq);
size_t moec__work_latent(const moec_model *m, const moec_layer *l, int64_t g, int64_t max_seq);
size_t moec__work_conv(const moec_model *m, const moec_layer *l, int64_t g, int64_t max_seq);
size_t moec__work_delta(const moec_model *m, const moec_layer *l, int64_t g, int64_t max_seq);
size_t moec__work_heads(const moec_model *m, const moec_layer *l, int64_t g, int64_t max_seq);

/* --- mix_conv.c: what mixers with a convolution share -------------------------------------------------------------------- */

typedef struct moec_conv {
    const float *weight; /* [taps, channels]; the last tap is the current token */
    float *past;         /* [taps-1, channels] rows before the first; 0 at the start of a sequence */
    int64_t channels, taps;
} moec_conv;
/* y[t] = sum of weight[j] * x[t - (taps-1) + j] for n tokens of one sequence; past becomes what the next ones need. */
void moec__convolve(float *y, int64_t ldy, const float *x, int64_t ldx, int64_t n, const moec_conv *v);
/* w [channels, 1, taps], as it lies in checkpoints, to [taps, channels]. */
void moec__taps_by_token(float *out, const float *w, int64_t channels, int64_t taps);
/* End of the run of tokens from `at` that are of one sequence and before `end`; *fresh: a sequence starts at `at`. *seq_at is
 * the sequence, 0 at first; calls ascend. */
int64_t moec__block_part(int64_t *seq_at, bool *fresh, const int64_t *seq, int64_t at, int64_t end);

/* --- attention.c: what mixers with a softmax over keys share ----------------------------------------------------------- */

/* cos and sin of a sequence of `length` tokens into [length, width/2] tables. */
void moec__rope_fill(float *cos_out, float *sin_out, double *inv_freq, const moec_rope *rope, int64_t length);
/* Tables of a sequence: shared, or its own where they depend on the length. */
void moec__rope_of(const moec_forward *f, moec_scratch *s, int64_t length, const float **c, const float **sn);
/* Rotates the first rope.width entries of one head. */
void moec__rotate(float *x, const float *c, const float *s, int64_t half, moec_rotation how);
/* out[t, head*dv ..] = softmax(scale q.k) v for one sequence of `length` tokens, causal, with the layer's window or chunk
 * and sinks. q [length, heads*d], k [length, kv*d], v [length, kv*dv] with row strides ldq, ldk, ldv; out has stride ldo. */
typedef struct moec_heads {
    const float *q, *k, *v;
    float *out;
    int64_t ldq, ldk, ldv, ldo, length;
    int64_t heads, kv_heads, head_dim, value_dim;
    int64_t v_step;     /* from one key head's values to the next's; 0: value_dim */
    bool tiled;         /* head i uses key head i % kv_heads */
    const float *sinks; /* [heads] or NULL */
} moec_heads;
void moec__attend(const moec_forward *f, moec_scratch *s, const moec_heads *h);

/* --- router.c ---------------------------------------------------------------------------------------------------------- */

/* Memory of a router (as pieces of forward.c), and its weights of a layer to float32. */
void moec__router_load(moec_router *r, const moec_model *m, const moec_layer *l);
/* logits [n, E+N] in float32 whatever the compute mode, as a flipped selection is a large error, without what is carried. */
moec_status moec__router_logits(float *const *out, const moec_router *const *router, int n_routers, moec_forward *f,
                                moec_scratch *s, int64_t n, moec_err *err) MOEC_USE_RESULT;
/* logits [n, E+N] += map before, `before` [n, E+N] the logits of the MoE layer before. Nothing without a map. */
moec_status moec__router_add_carried(float *logits, const moec_router *r, const float *before, moec_forward *f,
                                     moec_scratch *s, int64_t n, moec_err *err) MOEC_USE_RESULT;
/* From logits [n,E+N] to scores [n,E+N], ids and gates [n,slots], by the family's rules; ids by descending gate, lowest
 * number first on ties, -1 and weight 0 behind the last; null_gates [n,N] (NULL: not wanted): weights of the chosen ones
 * without a network, -1 for the others. `gates` NULL: ids only, in any order. */
MOEC_API void moec__route(float *scores, int32_t *ids, float *gates, float *null_gates, const float *logits,
                          const moec_router *r, const moec_model *m, int64_t n);

/* --- moe.c ------------------------------------------------------------------------------------------------------------- */

/* s->x = norm(h); s->r = feed-forward of x, routed or dense; s->shared; the router's results into s. */
moec_status moec__feed_forward(moec_forward *f, moec_scratch *s, const float *h, int64_t n, moec_err *err) MOEC_USE_RESULT;

#endif
