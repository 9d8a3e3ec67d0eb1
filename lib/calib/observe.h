/* What one chunk of tokens did in one MoE layer, handed by the layer pass to whoever watches, and the watcher that turns it
 * into statistics. A chunk is whole sequences of one domain. All arrays are borrowed and token-major. */
#ifndef MOEC_CALIB_OBSERVE_H
#define MOEC_CALIB_OBSERVE_H

#include "calib/stats.h"

typedef struct moec_event {
    const moec_model *model;
    int64_t moe_layer;
    int64_t n;                /* tokens */
    const int64_t *seq;       /* [n_seq+1] token offsets of the sequences in the chunk */
    int64_t n_seq;
    const float *h;           /* [n,H] residual stream before the MoE */
    const float *x;           /* [n,H] router and expert input, norm(h) */
    const float *r;           /* [n,H] routed output, sum of g y; h + r enters the next layer (no shared expert yet) */
    const float *logits;      /* [n,E] router logits z */
    const float *scores;      /* [n,E] softmax or sigmoid of z */
    const int32_t *ids;       /* [n,k] selected experts, by descending weight (lowest id first on ties) */
    const float *gates;       /* [n,k] weights really applied, same order */
    const float *y_norm;      /* [n,k] |y|_2 of each selected expert's output, same order */
    const float *out_absmax;  /* [E] over the chunk's tokens; 0 where no token */
    const int32_t *out_channel; /* [E] */
    const float *in_absmax;   /* [E] */
    const float *router;      /* [E,H] router weights as float32 */
    const float *router_norm; /* [E] |w_e|_2 */
    const int32_t *prev_ids;  /* [n,k] selections at the MoE layer before, or NULL at the first */
    const int32_t *guess_ids; /* [n,k] selections this layer's router made from the layer before's input, or NULL */
    /* tier 1, NULL when not collected: sums over the chunk's tokens, made inside the expert loop. They may be the
     * partial's own blocks, which are then left as they are. */
    const double *y_sum, *gy_sum, *xin_abs, *xin_sq; /* [E,H] */
    const double *act_abs, *act_sq, *gact_sq;        /* [E,I] */
} moec_event;

/* The partial statistics of one chunk in one layer: a block for each layered kind that is collected, NULL otherwise. */
typedef struct moec_partial {
    void *block[MOEC_STAT_COUNT];
    moec_stats_meta meta;      /* sizes only; pointers borrowed */
    uint64_t *order, *spare;   /* [E] scratch: experts by descending logit */
    double *row;               /* [4,E] scratch */
    bool has_prev, has_guess;  /* TRANS and PREFETCH_HIT were filled */
} moec_partial;

/** Room for one chunk's partial statistics; one per worker. Sizes in `meta` as moec_stats_new wants them. MOEC_ENOMEM. */
MOEC_API moec_status moec_partial_new(moec_partial **out, const moec_stats_meta *meta, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_partial_free(moec_partial *p);
/** Bytes that moec_partial_new takes. */
MOEC_API size_t moec_partial_bytes(const moec_stats_meta *meta);

/**
 * Overwrites the partial with what the chunk did. Sums are in float64 and in one fixed order, so the same event gives the
 * same bits anywhere. Per token:
 *
 *   u = max(1 - cos(h, h+r), 0); cos is 0 where one of the vectors is 0
 *   cos(x, w_e) = z_e / (|x| |w_e|), which holds for routers without bias; 0 where one of them is 0
 *   TOPP_COUNT: order by descending logit, lowest id first on ties;
 *               n(p) = least n with s_1 + .. + s_n >= p (s_1 + .. + s_E)
 *   histograms: a weight ratio over 0 counts as 0
 *   NORMS_RES: |h|, |r|, 0 (no family here has a shared expert)
 *
 * COS_BLOCK and BLOCK_TOKENS span layers and are the layer pass's business. Empty sequences are passed over.
 * Cost: O(n(E + k^2 + H)), tier 1 also n E^2/2. No allocation. Threads: safe on distinct partials.
 */
MOEC_API void moec_observe(moec_partial *p, const moec_event *ev);
/** Adds a partial to the blocks of (domain, moe_layer); TRANS and PREFETCH_HIT go to pair moe_layer-1. Kinds that `s` or
 *  the partial does not collect are passed over. */
MOEC_API void moec_stats_absorb(moec_stats *s, int domain, int64_t moe_layer, const moec_partial *p);

#endif
