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
 *   direct      gain_l eps2_eb             (ours, the default) one program; eps2: sum over tokens g^2 |y - y_q|^2 (QUANT_SQ)
 *                                          over sum of mean square of the residual stream; gain_l: KL that a unit of it costs,
 *                                          measured by quantizing the layer alone (QUANT_GAIN; 1 where it was not measured)
 *   gemq        eps2_eb / (L's sum of |r|^2)  one program; stands for GEMQ's coefficient (arXiv:2605.23078) without its gradients
 *   frequency   no program: the most used experts get the higher of two neighbouring widths (QuantMoE-Bench,
 *               arXiv:2406.08155, H3); first-blocks (H4), projection (H5), outlier (H6: max_j max_i|W_ij|/mean_i|W_ij|),
 *               block-importance (H7: mean cosine of the MoE block's input and output, COS_MOE)
 *   uniform     one width, the largest that fits */
#ifndef MOEC_METHOD_WIDTHS_H
#define MOEC_METHOD_WIDTHS_H

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
    int n_widths, width[8];    /* candidates, ascending */
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
    double cost, bound; /* summed over the programs; NAN where there is none */
    bool proven;
} moec_widths;

/** Widths by a method of kind MOEC_QUANTIZE.
 *  @return MOEC_OK; MOEC_ENOFIT: the budget is below the least that is possible (the text says which budget is); MOEC_EINVAL:
 *          neither or both of bits and budget, no candidates, bits above the largest, no statistics where the method needs some;
 *          MOEC_EFORMAT: statistics without errors of these widths (the text says how to get them); MOEC_ENUMERIC; MOEC_ENOMEM.
 *  Release with moec_widths_release. */
MOEC_API moec_status moec_widths_solve(moec_widths *out, const moec_method *me, const moec_widths_request *r, moec_err *err)
    MOEC_USE_RESULT;
MOEC_API void moec_widths_release(moec_widths *w);
/** The outlier score of a matrix, H6 above: max over columns j of max_i |W_ij| / mean_i |W_ij|. MOEC_ENOMEM. Cost: one read. */
MOEC_API moec_status moec_widths_outlier(double *out, const moec_weight *w, moec_err *err) MOEC_USE_RESULT;

#endif
