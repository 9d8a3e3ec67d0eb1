/* How many bits each expert gets: mixed precision by integer programming over measured errors. Pure functions from statistics to
 * a plan's widths; the errors were measured once (run/measure.h) and lie in the statistics file, so that any budget is solved
 * without touching weights.
 *
 *     minimise   sum over items i of cost[i, b_i]     subject to   sum of size[i, b_i] <= budget
 *
 * An item is what has one width: an expert, one of its matrices, or a layer (moec_widths_grain). Costs are the method's:
 *
 *   pmq         f_e^1 w_e^1.5 eps_eb       a program for each layer, at least one expert at 3 bits or more and one at 2 (where these
 *                                          widths are offered): MC-MoE (arXiv:2410.06270) as its code has it. f: share of the
 *                                          layer's selections, w: share of the layer's scores before renormalisation summed over
 *                                          them, eps: block error sum over batches |F - F_q|_F (QUANT_FRO)
 *   pmq-paper   f w eps^2                  as the paper prints it
 *   pmq-global  as pmq, one program over all layers
 *   direct      gain_l eps2_eb             (ours, the default) one program; eps2: sum over tokens g^2 |y - y_q|^2 over the mean square
 *                                          of the residual stream (QUANT_SQ); gain_l: KL that a unit of it costs, from quantizing the
 *                                          layer alone to 2 bits (QUANT_KL over the layer's eps2 there; where it was not measured
 *                                          the mean of other layers, 1 where of none)
 *   gemq-like   eps2_eb (|h|_l / |r|_l)^2  one program: error against the layer's routed output, |h|, |r| sums over tokens
 *                                          (NORMS_RES); stands for GEMQ's coefficient (arXiv:2605.23078) without its gradients
 *   frequency   no program: the items that matter most get the higher of two neighbouring widths until the next one no longer fits
 *               (QuantMoE-Bench, arXiv:2406.08155). Here (H3) experts by f, in one list over all layers; first-blocks (H4), projection
 *               (H5: down, gate, up), outlier (H6: moec_widths_outlier, the largest of the item's matrices), block-importance
 *               (H7: lowest mean cosine of the residual stream before and behind the MoE, COS_MOE; the paper trains a predictor)
 *   rtn, clip, gptq   uniform: one width; `bits` names it, of bytes it is the largest that fits
 *
 * Errors of an item are the sums over what it consists of; those of a matrix alone are taken to add up. pmq's are of whole experts; a
 * program for each layer and its two rows are for items that are experts, coarser ones have one program without them, and where no
 * choice has both rows they are left out. A layer's share of the budget is that of its weights.
 * Several domains d of weight w_d and T_d tokens: sums S are mixed as sum_d w_d S_d / T_d, and f and w as sum_d w_d f_d.
 * Protected experts have the largest candidate, and so does an item with one of them in it; `bits` of a uniform method is the width
 * of the others. */
#ifndef MOEC_METHOD_WIDTHS_H
#define MOEC_METHOD_WIDTHS_H

#include "method/gptq.h"
#include "method/method.h"

/* What has a width of its own. */
typedef enum moec_widths_grain {
    MOEC_WIDTHS_EXPERT, MOEC_WIDTHS_PROJECTION, /* each of gate, up, down of each expert */
    MOEC_WIDTHS_LAYER, MOEC_WIDTHS_LAYER_PROJECTION, /* all experts of a layer */
    MOEC_WIDTHS_MODEL
} moec_widths_grain;

/* Options of a quantize method that are no options of others. */
typedef struct moec_widths_request {
    const moec_request *q;     /* model, stats, guard (its experts get the largest candidate) */
    moec_widths_grain grain;   /* as fine as the format and the user let it be */
    int n_widths, width[8];    /* candidates, ascending: 1 .. 8, and 16, as it is. Programs: those of MOEC_QUANT_WIDTH_LIST and 16,
                                  whose error is 0 */
    const uint64_t *bytes;     /* [3, n_widths] of one expert's gate, up and down at each, on disk */
    double bits;               /* average width asked of routed experts' weights (codes alone), or 0: */
    uint64_t budget;           /* bytes of all routed experts */
    double alpha, beta, gamma; /* of pmq's formula f^alpha w^beta eps^gamma; NAN: the method's */
    double seconds;            /* for the solver; 0: 10 */
} moec_widths_request;

typedef struct moec_widths {
    uint8_t *bits;      /* [MoE layers, E, 3] of gate, up, down */
    double mean;        /* average over routed weights */
    uint64_t bytes;     /* of them all on disk */
    double cost, bound; /* summed over the programs, bound = cost where it is proven; NAN where there is none */
    bool proven;
} moec_widths;

/** "expert", "projection", "layer", "layer-projection", "model". */
MOEC_API const char *moec_widths_grain_name(moec_widths_grain g);
/** How weights are rounded unless the user says otherwise: part of a method of kind MOEC_QUANTIZE. */
MOEC_API moec_rounding moec_widths_rounding(const moec_method *me);

/** Does a method scale errors by what they cost at the logits (QUANT_KL)? */
MOEC_API bool moec_widths_gains(const moec_method *me);
/** The finest grain that a method speaks of: MOEC_WIDTHS_EXPERT or MOEC_WIDTHS_PROJECTION; of a uniform one MOEC_WIDTHS_MODEL. */
MOEC_API moec_widths_grain moec_widths_finest(const moec_method *me);

/** Widths by a method of kind MOEC_QUANTIZE.
 *  @return MOEC_OK; MOEC_ENOFIT: the budget is below the least that is possible (the text says which budget is); MOEC_EINVAL:
 *          neither or both of bits and budget, no candidates, bits above the largest, of a uniform method none
 *          of the candidates, a grain that the method says nothing of, no statistics where it needs some;
 *          MOEC_EFORMAT: statistics without errors of these widths (the text says how to get them); MOEC_ENUMERIC; MOEC_ENOMEM.
 *  Release with moec_widths_release. */
MOEC_API moec_status moec_widths_solve(moec_widths *out, const moec_method *me, const moec_widths_request *r, moec_err *err)
    MOEC_USE_RESULT;
MOEC_API void moec_widths_release(moec_widths *w);
/** The outlier score of a matrix, H6 above: max over columns j of max_i |W_ij| / mean_i |W_ij|. MOEC_ENOMEM. Cost: one read. */
MOEC_API moec_status moec_widths_outlier(double *out, const moec_weight *w, moec_err *err) MOEC_USE_RESULT;

#endif
