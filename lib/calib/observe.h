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
    const float *shared;      /* [n,H] output of the shared experts, or NULL */
    int64_t slots;            /* experts a token may have, in ids, gates, y_norm, prev_ids, guess_ids; k in most families */
    int64_t ld;               /* columns of logits and scores, the first E of them experts */
    const float *logits;      /* [n,ld] router logits z */
    const float *scores;      /* [n,ld] softmax, sigmoid or ReLU of z */
    const int32_t *ids;       /* [n,slots] selected experts, by descending weight (lowest id first on ties), then -1 */
    const float *gates;       /* [n,slots] weights really applied, same order */
    const float *null_gates;  /* [n,N] weights of the selected experts without a network, -1: not selected; NULL: none */
    const float *y_norm;      /* [n,slots] |y|_2 of each selected expert's output, same order */
    const float *out_absmax;  /* [E] over the chunk's tokens; 0 where no token */
    const int32_t *out_channel; /* [E] */
    const float *in_absmax;   /* [E] */
    const float *router;      /* [E,H] router weights as float32 */
    const float *router_norm; /* [E] |w_e|_2 */
    const float *router_bias; /* [E] of the logits, or NULL */
    const int32_t *prev_ids;  /* [n,slots] selections at the MoE layer before, -1: none; NULL at the first */
    const int32_t *guess_ids; /* [n,slots] selections this layer's router made from the layer before's input, or NULL */
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
 *   u = max(1 - cos(h, h+r), 0), r times the model's residual multiplier; cos is 0 where one of the vectors is 0
 *   cos(x, w_e) = (z_e - b_e) / (|x| |w_e|); 0 where one of them is 0, as |w_e| is where z is not w_e x + b_e alone
 *   TOPP_COUNT: order by descending logit, lowest id first on ties;
 *               n(p) = least n with s_1 + .. + s_n >= p (s_1 + .. + s_E)
 *   histograms: a weight ratio over 0 counts as 0; choices behind the k-th are in none
 *   RANK, PREFETCH_HIT: choices behind the k-th count as the k-th
 *   MARKER_TOPK: k largest logits of experts, however many the token uses
 *   NORMS_RES: |h|, |r|, |shared|, the last 0 without shared experts
 *   with the weight on the expert's input (Llama 4): y is what leaves the expert over the weight; x and a carry the weight,
 *   and GACT_SQ is ACT_SQ
 *
 * COS_BLOCK and BLOCK_TOKENS span layers and are the layer pass's business. Empty sequences are passed over.
 * Cost: O(n(E + k^2 + H)), tier 1 also n E^2/2. No allocation. Threads: safe on distinct partials.
 */
MOEC_API void moec_observe(moec_partial *p, const moec_event *ev);
/** Adds a partial to the blocks of (domain, moe_layer); TRANS and PREFETCH_HIT go to pair moe_layer-1. Kinds that `s` or
 *  the partial does not collect are passed over. */
MOEC_API void moec_stats_absorb(moec_stats *s, int domain, int64_t moe_layer, const moec_partial *p);

#endif
