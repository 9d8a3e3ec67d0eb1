/* The layer pass: the whole model over all tokens, one layer at a time, with one layer's weights and the hidden states as
 * its only large memory. It owns chunking, memory planning, prefetch and progress; watchers come from outside. */
#ifndef MOEC_CALIB_PASS_H
#define MOEC_CALIB_PASS_H

#include "base/log.h"
#include "calib/hidden.h"
#include "model/forward.h"
#include "text/corpus.h"

/* Consecutive windows of one domain that go through a layer together. */
typedef struct moec_chunk {
    int domain;
    int64_t token, n;      /* first token among all, number of tokens */
    int64_t n_seq;
    const int64_t *seq;    /* [n_seq+1] offsets from `token` */
    const int32_t *ids;    /* [n] */
} moec_chunk;

typedef struct moec_pass_opts {
    moec_compute compute;
    bool watch, sums;
    uint64_t max_memory;     /* 0: what the machine has to spare; then never refused */
    size_t fixed_bytes;      /* what the caller keeps besides, */
    size_t worker_bytes;     /* and for each worker */
    size_t after_bytes;      /* what comes after the pass needs, while the hidden states are still there */
    const char *dir;         /* for hidden states that do not fit memory; NULL: the system's temporary folder */
    bool keep;               /* files in dir stay for a later run */
    bool look;               /* room for moec_pass_look */
    const char *what;        /* name of the progress line */
} moec_pass_opts;

/* What the planner decided. Nothing of it changes a result. */
typedef struct moec_pass_plan {
    int workers;  /* chunks under way */
    int threads;  /* in all: one for each worker, or all within the chunk of the only one */
    bool on_disk; /* hidden states */
    bool lean;    /* experts' pages are given back after each use */
    uint64_t bytes, limit;
} moec_pass_plan;

typedef struct moec_pass {
    const moec_model *m;
    moec_pass_opts o;
    moec_pass_plan plan;
    int64_t n_tokens, max_seq, max_tokens, n_chunks;
    moec_chunk *chunk;     /* [n_chunks], a function of the corpus alone */
    int64_t *seq;          /* storage behind chunk[].seq */
    moec_hidden *hidden;
    moec_forward *forward;
    float **look;          /* [workers][max_tokens, H + dims.carried] */
    moec_progress progress;
} moec_pass;

/** Worker's thread: what a MoE layer did to a chunk. */
typedef moec_status moec_see_fn(void *ctx, int worker, const moec_chunk *c, const moec_moe_view *v, moec_err *err);
/** In chunk order, one at a time: what that worker saw of chunk c may be added up. Called for MoE layers only. */
typedef moec_status moec_sum_fn(void *ctx, int worker, const moec_chunk *c, moec_err *err);

/** Plans memory and makes room. Model and corpus are borrowed.
 *  @return MOEC_OK; MOEC_ENOFIT when no arrangement (hidden states on disk, lean experts, one thread) stays under
 *          max_memory: the text says how much would do; MOEC_ENOMEM, MOEC_EIO. Free with moec_pass_free. */
MOEC_API moec_status moec_pass_new(moec_pass **out, const moec_model *m, const moec_corpus *corpus,
                                   const moec_pass_opts *o, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_pass_free(moec_pass *p);

/** Hidden states := embeddings. MOEC_EFORMAT: an id outside the vocabulary; MOEC_ENUMERIC; MOEC_EIO, MOEC_ENOFIT (disk);
 *  MOEC_EINTR. */
MOEC_API moec_status moec_pass_embed(moec_pass *p, moec_err *err) MOEC_USE_RESULT;
/** Starts the progress line; layers before first_layer were done by an earlier run. */
MOEC_API void moec_pass_begin(moec_pass *p, int64_t first_layer);
/** One layer over all chunks. `see` and `sum` may be NULL. MOEC_EINTR between chunks once a signal came. */
MOEC_API moec_status moec_pass_layer(moec_pass *p, int64_t layer, moec_see_fn *see, moec_sum_fn *sum, void *ctx,
                                     moec_err *err) MOEC_USE_RESULT;
/** The same without going on: what the layer does is seen, and the hidden states stay those before it. With opts.look. */
MOEC_API moec_status moec_pass_look(moec_pass *p, int64_t layer, moec_see_fn *see, void *ctx, moec_err *err) MOEC_USE_RESULT;
/** Worker's thread: what a matrix of the layer is about to multiply, `at` tokens behind the chunk's first; moec_tap_fn. */
typedef moec_status moec_take_fn(void *ctx, int worker, const moec_chunk *c, moec_mat which, const float *panels, int64_t at, int64_t n,
                                 int64_t cols, moec_err *err);
/** moec_pass_look that shows these, too; `see` may be NULL. mix_only: the layer's feed-forward part is not run. */
MOEC_API moec_status moec_pass_look_inputs(moec_pass *p, int64_t layer, moec_see_fn *see, moec_take_fn *take, bool mix_only, void *ctx,
                                           moec_err *err) MOEC_USE_RESULT;
/** moec_pass_layer that shows these, too. sum: for every layer. */
MOEC_API moec_status moec_pass_layer_inputs(moec_pass *p, int64_t layer, moec_take_fn *take, moec_sum_fn *sum, void *ctx, moec_err *err)
    MOEC_USE_RESULT;
/** moec_pass_layer on n copies of the corpus's states, each made as the pass's own, in place of these: the layer is read once. */
MOEC_API moec_status moec_pass_layer_of(moec_pass *p, int64_t layer, moec_hidden *const *states, int n, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_pass_end(moec_pass *p);

/** How the tokens of a corpus are chunked: at most this many tokens, whole windows, one domain.
 *  max(512, min(4096, tokens/8)), or one window when that is longer. Where a layer's experts have 2^30 values or more, each
 *  chunk reads (and converts) so much that it should be worth it: then as many tokens as give every expert 512 on average,
 *  if there are that many and one [tokens, H] array of them stays within 512 MiB. 16384 for DeepSeek-V3. */
MOEC_API int64_t moec_pass_chunk_tokens(const moec_dims *d, int64_t n_tokens, int64_t max_seq);
/** Tokens of the longest window. */
MOEC_API int64_t moec_pass_max_seq(const moec_corpus *corpus);
/** Memory estimate of the arrangement that moec_pass_new would choose; nothing is allocated or read. MOEC_ENOFIT: no
 *  arrangement stays under max_memory, and *out is the smallest there is. */
MOEC_API moec_status moec_pass_estimate(moec_pass_plan *out, const moec_model *m, int64_t n_tokens, int64_t max_seq,
                                        const moec_pass_opts *o, moec_err *err) MOEC_USE_RESULT;

#endif
