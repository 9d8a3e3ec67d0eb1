/* The forward pass of one layer over one chunk of tokens, the only one there is: calibration, evaluation and every method
 * that needs activations run it with other watchers. A chunk is whole sequences, so chunks are independent and run in
 * parallel, each on its worker's scratch memory; what a chunk computes does not depend on who computes it.
 * Symbols: n tokens of the chunk, H hidden, E experts, N null experts (most families: 0), k slots (moec_dims.slots: top-k, or
 * more where their number varies), I expert width. */
#ifndef MOEC_MODEL_FORWARD_H
#define MOEC_MODEL_FORWARD_H

#include "model/model.h"
#include "num/gemm.h"

/* Sums over the chunk's tokens, made inside the expert loop; only when asked for. */
typedef struct moec_expert_sums {
    double *y_sum, *gy_sum, *xin_abs, *xin_sq; /* [E,H] */
    double *act_abs, *act_sq, *gact_sq;        /* [E,I] */
} moec_expert_sums;

/* What happened in one MoE layer to one chunk. Borrowed, valid during the watcher's call. */
typedef struct moec_moe_view {
    int64_t layer, n, n_seq;
    const int64_t *seq;      /* [n_seq+1] token offsets */
    const float *h;          /* [n,H] residual stream before the MoE */
    const float *x;          /* [n,H] router and expert input */
    const float *r;          /* [n,H] routed output, that of experts without a network included */
    const float *shared;     /* [n,H] output of the shared experts; NULL: none */
    int64_t ld;              /* columns of logits and scores: E+N */
    const float *logits, *scores; /* [n,E+N] */
    const int32_t *ids;      /* [n,k] by descending weight, lowest id first on ties; -1: the slot is empty */
    const float *gates;      /* [n,k] weights as applied; 0 in empty slots */
    const float *null_gates; /* [n,N] weights of the chosen experts without a network, -1: not chosen; NULL: N is 0 */
    const float *y_norm;     /* [n,k] |y|_2 of the un-gated expert outputs (weight on the input: |y| / weight) */
    const float *out_absmax, *in_absmax; /* [E] */
    const int32_t *out_channel;          /* [E] */
    const float *router, *router_norm;   /* [E,H] float32, NULL: two matrices; [E] |w_e|_2, 0 if logits are more than w_e x */
    const float *router_bias;            /* [E] of the logits, NULL: none */
    const int32_t *next_ids; /* [n,k] what the next MoE layer's router would choose from x, in no order, -1: empty; NULL at
                                the last */
    const moec_expert_sums *sums; /* NULL unless asked for */
} moec_moe_view;

/* Called on the worker's thread, before h + r. */
typedef moec_status moec_watch_fn(void *ctx, int worker, const moec_moe_view *view, moec_err *err);

/* What matrix `which` of the layer is about to multiply: n tokens as panels (gemm.h) of `cols` features, behind `at` tokens of the
 * chunk that it was given before. Up has gate's input, and is not shown; experts' matrices are not. Called on the worker's thread. */
typedef moec_status moec_tap_fn(void *ctx, int worker, moec_mat which, const float *panels, int64_t at, int64_t n, int64_t cols,
                                moec_err *err);

typedef struct moec_forward_opts {
    moec_compute compute;
    int workers;
    int64_t max_tokens; /* of a chunk */
    int64_t max_seq;    /* tokens of the longest sequence */
    bool watch;         /* fill moec_moe_view for the watcher */
    bool sums;          /* moec_expert_sums too */
    bool lean;          /* ask for an expert's mapped pages just before its use and give them back right after */
    int threads;        /* that divide one chunk among them, when there is one worker; 0 and 1: none but the worker */
} moec_forward_opts;

typedef struct moec_forward moec_forward;

/** Scratch for `workers` chunks. The model is borrowed. MOEC_ENOMEM; MOEC_EINVAL: more selections in a chunk than
 *  2^31 - 1; windows longer than dims.exact_tokens. Free with moec_forward_free. */
MOEC_API moec_status moec_forward_new(moec_forward **out, const moec_model *m, const moec_forward_opts *o, moec_err *err)
    MOEC_USE_RESULT;
MOEC_API void moec_forward_free(moec_forward *f);
/** Bytes that moec_forward_new would take. */
MOEC_API size_t moec_forward_bytes(const moec_model *m, const moec_forward_opts *o);

/** Writes the embeddings of n ids into h [n,H]. MOEC_EFORMAT: an id outside the vocabulary; MOEC_ENUMERIC: a value that is
 *  not finite; MOEC_EIO, MOEC_ENOMEM. */
MOEC_API moec_status moec_forward_embed(float *h, const moec_model *m, const int32_t *ids, int64_t n, moec_err *err)
    MOEC_USE_RESULT;

/** Makes a layer current: small tensors to float32, every tensor checked for NaN and infinity (in parallel). A lean pass
 *  leaves the experts' matrices to the first chunk, which has to read them anyway; the error is the same.
 *  MOEC_ENUMERIC: names the tensor and the place of its first value that is not finite. */
MOEC_API moec_status moec_forward_layer(moec_forward *f, int64_t layer, moec_err *err) MOEC_USE_RESULT;

/** From now on `worker` shows what matrices multiply to `tap`; NULL: no more. A layer is mixed only, and its feed-forward part is
 *  left out, where `mix_only` is set: h is then the stream behind the mixer. */
MOEC_API void moec_forward_tap(moec_forward *f, int worker, moec_tap_fn *tap, void *ctx, bool mix_only);

/** Runs the current layer on a chunk, in place.
 *  @param h    [n,H] residual stream, n = seq[n_seq].
 *  @param carried [n, dims.carried] logits of the MoE layer before, replaced by this one's; not read in the first. NULL
 *              where dims.carried is 0.
 *  @param seq  [n_seq+1] offsets of the sequences; each is at most max_seq long.
 *  @return MOEC_OK; MOEC_ENUMERIC when the layer's output is not finite; what the watcher returns.
 *  Thread-safe for distinct workers and distinct h. */
MOEC_API moec_status moec_forward_chunk(moec_forward *f, int worker, float *h, float *carried, const int64_t *seq,
                                        int64_t n_seq, moec_watch_fn *watch, void *ctx, moec_err *err) MOEC_USE_RESULT;

/** Chooses experts from logits [n, E+N] (bias included, -infinity for experts that are not to be chosen) by the rule of the
 *  model: scores [n, E+N], ids and gates [n, slots] as in moec_moe_view. `scores` may be `logits`. Any thread.
 *  Stack: 256 KB. */
MOEC_API void moec_route(float *scores, int32_t *ids, float *gates, const float *logits, const moec_model *m,
                         const moec_layer *l, int64_t n);

/** Biases of an expert's gate and up to float32, [I] each; the layer has gate_up_bias. 0 for an expert without a row. */
MOEC_API void moec_expert_bias(float *gate, float *up, const moec_model *m, const moec_layer *l, int64_t expert);
/** The same of its down, [H]; the layer has down_bias. */
MOEC_API void moec_expert_down_bias(float *out, const moec_model *m, const moec_layer *l, int64_t expert);

/** gate[i] = act(gate[i]) up[i] by the model's activation, n values. Any thread. */
MOEC_API void moec_activate(float *gate, const float *up, int64_t n, const moec_model *m);

/** Bytes of one layer's tensors. */
MOEC_API uint64_t moec_layer_bytes(const moec_model *m, int64_t layer);
/** Bytes of one expert's matrices and scales. */
MOEC_API uint64_t moec_expert_bytes(const moec_layer *l, int64_t expert);
/** Calls fn for every tensor of a layer, scales included, each once; `common` leaves the experts' matrices out. */
MOEC_API void moec_layer_each(const moec_model *m, int64_t layer,
                              void (*fn)(void *ctx, const moec_model *m, const moec_tensor *t), void *ctx);
MOEC_API void moec_layer_each_common(const moec_model *m, int64_t layer,
                                     void (*fn)(void *ctx, const moec_model *m, const moec_tensor *t), void *ctx);

#endif
