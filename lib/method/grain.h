/* Grains of pruning other than whole experts: neurons inside all experts, single weights, whole layers. A method of these makes
 * a plan that keeps every expert and says how much goes; which neurons and which weights, is chosen expert by expert by the
 * functions below when the new weights are made (run/thin.h), so that memory holds a few experts whatever the model.
 * Symbols: H hidden, I expert width, g u d a neuron's rows of gate and up and column of down, a its activation. */
#ifndef MOEC_METHOD_GRAIN_H
#define MOEC_METHOD_GRAIN_H

#include "method/method.h"

/* --- neurons --------------------------------------------------------------------------------------------------------- */

/** How many neurons every expert keeps: q->width, or
 *
 *    floor((I - floor(I * share + 1e-9)) / align) * align      align: q->align, or 16 where 64 or more would stay, else 1
 *
 *  so never more than was asked for. MOEC_EINVAL: none would stay, more than I, a width that is no multiple of an align that
 *  was given, a model whose widths hang together (moec_plan_check_width). */
MOEC_API moec_status moec_neurons_width(int64_t *out, const moec_request *q, moec_err *err) MOEC_USE_RESULT;

/** Scores of the neurons of one expert, n_e tokens having selected it:
 *
 *    out-norm        sum_t a_j^2 / n_e * |d_j|^2          the expert's mean squared output error when neuron j alone is zeroed
 *    gate-weighted   sum_t g_t^2 a_j^2 / n_e * |d_j|^2    the same of the weighted output
 *    mean-abs        sum_t |a_j| / n_e
 *
 *  Several domains: sums and n_e are added with the domains' weights. Where no token was seen (n_e = 0, or `set` is one of multi-token
 *  prediction) |g_j| |u_j| |d_j|, *seen false.
 *  g, u, d: [I] squared norms |g_j|^2, |u_j|^2, |d_j|^2.
 *  Source: the first two are ours; mean-abs as in Read-ME (arXiv:2410.19123). The error is exact for one neuron; of several,
 *  cross terms are left out. MOEC_ENUMERIC: a score is not finite. */
MOEC_API moec_status moec_neurons_score(double *score, bool *seen, const moec_method *me, const moec_request *q, int64_t set,
                                        int64_t expert, const double *g, const double *u, const double *d, moec_err *err)
    MOEC_USE_RESULT;
/** The `width` neurons of largest score, ascending; ties to the lower. MOEC_ENOMEM. */
MOEC_API moec_status moec_neurons_keep(int32_t *keep, const double *score, int64_t n, int64_t width, moec_err *err)
    MOEC_USE_RESULT;

/* --- weights --------------------------------------------------------------------------------------------------------- */

enum { MOEC_WEIGHTS_MAGNITUDE, MOEC_WEIGHTS_WANDA, MOEC_WEIGHTS_OWL }; /* of a method's row */
/** Which of these a method is. */
MOEC_API int moec_weights_rule(const moec_method *me);
/** Scales of the inputs of an expert's gate and up [H] and down [I], by which |W_oi| is multiplied:
 *
 *    wanda, owl   sqrt(sum_t x_i^2 / n_e);  down: of a       magnitude   1
 *
 *  An expert without tokens: gate and up by the mean over all experts of the layer, down by magnitude; *seen false. A set of
 *  multi-token prediction: magnitude. Source: Sun et al., arXiv:2306.11695. Departs: per token, where the published code sums
 *  over calls. */
MOEC_API void moec_weights_scales(double *in, double *mid, bool *seen, const moec_method *me, const moec_request *q, int64_t set,
                                  int64_t expert);
/** Zeros of one output row w[n] with scales s[n]: the floor(n * share + 1e-9) values of lowest |w| s (ties: the lower index), or
 *  where q->of > 0 in every `of` neighbours all but the `some` largest (the last few may be fewer: n is a multiple of `of`).
 *  scratch: [2 n]. Returns how many are zero then. */
MOEC_API int64_t moec_weights_cut(float *w, int64_t n, const double *s, double share, int64_t some, int64_t of, double *scratch);
/** OWL's share of each layer from its outlier value D (percent of scores above M times their mean, M = 5):
 *
 *    D' = (D - min) / (max - min) * 2 lambda,  share_l = share - (D'_l - mean D'),  lambda = 0.08; 0 or less becomes 0.01, where the share
 *    itself is 0 it becomes 0
 *
 *  All D equal: the share itself. At most 1. Source: Yin et al., arXiv:2310.05175. */
MOEC_API void moec_weights_owl(double *ratio, const double *d, int64_t n, double share);

/* --- blocks ---------------------------------------------------------------------------------------------------------- */

/** Similarity of each layer's input and output [layers]: sum of cos(H_i, H_i+1) over sampled tokens by their number, domains by
 *  weight. MOEC_ENUMERIC: no token was sampled. */
MOEC_API moec_status moec_blocks_similarity(double *out, const moec_request *q, moec_err *err) MOEC_USE_RESULT;
/** The n layers of highest similarity, ascending; ties: the lower goes first. MOEC_ENOMEM. */
MOEC_API moec_status moec_blocks_choose(int32_t *drop, const double *similarity, int64_t layers, int64_t n, moec_err *err)
    MOEC_USE_RESULT;

/* --- shared by the three --------------------------------------------------------------------------------------------- */

/** A plan that keeps every expert, with options {"grain": ..}, the statistics' digest and what q says of MTP layers. */
MOEC_API moec_status moec_grain_plan(moec_plan **out, const moec_method *me, const moec_request *q, moec_err *err)
    MOEC_USE_RESULT;
/** Sum over the domains of weight times value [.., expert, i] of a kind [E, n]; `out` [n] is overwritten. Also adds up the tokens
 *  that selected the expert: returned. */
MOEC_API double moec_grain_sum(double *out, const moec_stats *s, moec_stat kind, int64_t moe_layer, int64_t expert, int64_t n);

#endif
