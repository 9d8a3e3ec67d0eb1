/* What runtimes that skip or offload experts ask of a model's statistics: thresholds, shares of tokens behind them, sizes of caches, lists
 * of experts. Each is one JSON object with what it is made by; no stock client reads any of them. */
#ifndef MOEC_METHOD_THRESHOLDS_H
#define MOEC_METHOD_THRESHOLDS_H

#include "calib/stats.h"

/* --- the numbers ------------------------------------------------------------------------------------------------------ */

/** What a histogram counts, all bins added up in order. */
MOEC_API double moec_hist_total(const double *count, int64_t bins);
/** Share of a histogram over [0, 1] that lies below x, each bin taken as even inside; NAN where it counts nothing. */
MOEC_API double moec_hist_below(const double *count, int64_t bins, double x);
/** The least x below which that share is at least `share` (0 to 1), the same way; NAN where it counts nothing. */
MOEC_API double moec_hist_quantile(const double *count, int64_t bins, double share);
/** AdapMoE's expected loads of a token in a layer of E experts of which n are in the cache, two a token but for the share p1 of tokens that
 *  use one, q the share of experts that are foreseen:
 *
 *    f = p1 (1 - n/E) (1 - q) + (1 - p1) [2 A (1 - q) + A q + 2 B (1 - q)]
 *    A = (E-n)(E-n-1) / (E (E-1)),   B = (E-n) n / (E (E-1))
 *
 *  Source: PKU-SEC-Lab/AdapMoE with E for its 8. E from 2, n from 0 to E. */
MOEC_API double moec_cache_loads(int64_t E, int64_t n, double p1, double q);
/** Sizes of least sum over layers of cost[l][size[l]], cost [layers, E+1], that add up to `budget`: dp[i][j] = min_k dp[i-1][j-k] +
 *  cost[i][k]. On ties the first layers get less. MOEC_EINVAL: budget below 0 or above layers E, a cost that is not finite; MOEC_ENOMEM.
 *  Cost: layers budget E steps, 4 layers budget bytes. */
MOEC_API moec_status moec_cache_split(int32_t *size, const double *cost, int64_t layers, int64_t E, int64_t budget, moec_err *err)
    MOEC_USE_RESULT;
/** How much a layer's loss grows with the square of the weight that is taken from the second expert, nats a token, from statistics of
 *  calibrate --errors --gains:
 *
 *    sens_l = KL_l / S_l  H  2 mean |y|^2 / (mean |h|)^2
 *
 *  KL_l and S_l the divergence and the squared errors with the layer's experts at 2 bits, y an expert's output, h the residual stream: what
 *  a relative error of the stream costs, times the relative error of giving (1 - w) of the output to the other expert, outputs of two
 *  experts taken as uncorrelated. Ours; AdapMoE has numbers made once from gradients. out: [moe_layers], NAN where a layer was not measured.
 *  MOEC_EFORMAT: the statistics lack QUANT_KL, QUANT_SQ, NORM_SQ, SELECTED or NORMS_RES. */
MOEC_API moec_status moec_sensitivities(double *out, const moec_stats *s, moec_err *err) MOEC_USE_RESULT;
/** The same from a file: a JSON array of a number a MoE layer, a JSON object {"LAYER": number, ..}, or lines LAYER,NUMBER, layers counted
 *  among all. MOEC_EINVAL: numbers missing, twice, negative or not finite; MOEC_EIO, MOEC_EFORMAT, MOEC_ENOMEM. */
MOEC_API moec_status moec_sensitivities_read(double *out, const char *path, const moec_stats *s, moec_err *err) MOEC_USE_RESULT;

/* --- the files -------------------------------------------------------------------------------------------------------- */

/* All: {"format": "moecompress-NAME", "version": 1, "model", "model_type", "experts", "top_k", "texts": [{"name", "tokens", "weight"}],
 * "source", "formula", "units", "layers": [{"layer": among all, ..}]}; domains are mixed by their weights, NaN is null. MOEC_EFORMAT: the
 * statistics lack a kind; MOEC_EINVAL: the model has another top-k than the rule is for; MOEC_ENOMEM. */

/** ODP of MC-MoE (arXiv:2410.06270): "median": [of w_j / w_1 for j = 2 .. k] (moec_stats_betas); the second expert is dropped below it. */
MOEC_API moec_status moec_odp_json(moec_json **out, const moec_stats *s, moec_err *err) MOEC_USE_RESULT;

typedef struct moec_adapmoe_opts {
    double loss;               /* T */
    const double *sensitivity; /* [moe_layers]; NULL: moec_sensitivities */
    const char *origin;        /* of these: the file's name; NULL: measured */
    int64_t cache;             /* experts that fit, all layers together; -1: no split */
} moec_adapmoe_opts;
/** AdapMoE (arXiv:2408.10284), top-2: "threshold" = sqrt(T / sens), one expert is used where w_2 / (w_1 + w_2) is below; "one_expert": the
 *  share of tokens for which that is so; "sensitivity"; "prefetch": share of the layer's selections that the router finds from the input of
 *  the layer before (null in the first); with a cache "cache_size" and, at the top, "loads" expected a token. The split takes prefetch 0
 *  where it is null, and a share of 0 likewise. */
MOEC_API moec_status moec_adapmoe_json(moec_json **out, const moec_stats *s, const moec_adapmoe_opts *o, moec_err *err) MOEC_USE_RESULT;

/* Either thresholds, or shares that they are to give. */
typedef struct moec_hobbit_opts {
    double t1, t2;       /* NAN: by the shares: */
    double high, low;    /* of all selections */
} moec_hobbit_opts;
/** HOBBIT (arXiv:2411.01433): "t1", "t2", and of each layer and "overall" the shares "high" (s <= t1), "low" (s <= t2) and "skip", s_j the
 *  share of a token's weight that stands before its j-th expert; s of the first is 0 and always high. MOEC_EINVAL: not 0 <= t1 <= t2 <= 1,
 *  or shares that are none. */
MOEC_API moec_status moec_hobbit_json(moec_json **out, const moec_stats *s, const moec_hobbit_opts *o, moec_err *err) MOEC_USE_RESULT;

/** PreMoe (arXiv:2505.17639), for each domain: "domains": [{"name", "tokens", "layers": [{"layer", "experts": the `keep` of largest TCESS
 *  in that order, "score"}]}], TCESS the sum of raw logits over tokens where an expert's is the largest, over tokens. MOEC_EINVAL: keep
 *  is below top-k or above the experts. */
MOEC_API moec_status moec_premoe_json(moec_json **out, const moec_stats *s, int64_t keep, moec_err *err) MOEC_USE_RESULT;

#endif
