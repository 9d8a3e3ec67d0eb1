/* What each width costs each routed expert, measured once over text for all candidates and kept with the other statistics. */
#ifndef MOEC_RUN_MEASURE_H
#define MOEC_RUN_MEASURE_H

#include "calib/pass.h"
#include "calib/stats.h"

typedef struct moec_measure_opts {
    moec_compute compute; /* of the forward pass and of an expert's products */
    int64_t group;        /* of the grid: of each matrix the largest of group, group/2 .. 8 that divides its columns, else whole
                             rows; 0: whole rows */
    bool gains;           /* QUANT_KL too: for each MoE layer the rest of the model runs over the text once more */
    int64_t gain_tokens;  /* of which text: the first windows of each domain, its share of this many tokens (one window at least);
                             0: all */
    uint64_t max_memory;
    const char *work;     /* layers that are done lie in WORK.partial, which goes when all are */
    bool resume;
} moec_measure_opts;
enum { MOEC_MEASURE_GAIN_TOKENS = 16384 }; /* what tools offer */

/** Fills QUANT_SQ, QUANT_FRO and with `gains` QUANT_KL of s, whose domains must be those of the corpus (name and digest): widths
 *  MOEC_QUANT_WIDTH_LIST, quantized by moec_quant_range CLIP without importance and to nearest, F32 scales, no zero points.
 *  Everything else of the model stays as it is. Only the tokens that select an expert can change when it does:
 *
 *    SQ[l,e,p,b]  += g^2 |y - y_q|^2 / mean(h'^2)    p = gate, up, down alone, all three; h' the residual stream behind the layer
 *    FRO[l,e,b]   += sqrt(sum over the window's tokens of g^2 |y - y_q|^2)        once a window (MC-MoE's batch), p = all three
 *    KL[l]        += KL(original || the model with all experts of layer l at 2 bits), over scored tokens
 *
 *  where g multiplies the expert's input (Llama 4) y has it in it already. The block's output is taken before a norm behind it, if
 *  there is one, and before the model's residual_scale: per layer a constant, or nearly so, that a gain makes up for. KL of the first
 *  windows is multiplied by the domain's scored tokens over those that were run, so that it compares with the other sums.
 *  Without `gains` KL of an earlier run with the same group stays. The group goes into the statistics' options ("quant_group").
 *  Results do not depend on threads, memory or interruptions. On failure s is as it was, but for MOEC_ENOMEM in the last step: then
 *  kinds of tier 2 may be missing.
 *  @return MOEC_OK; MOEC_EINVAL: other domains than the statistics', more than 2^31 tokens, a group below 0; MOEC_EFORMAT: statistics
 *          of another model, a damaged folder; MOEC_EEXIST: the folder is another run's; MOEC_ENUMERIC: weights, states or errors
 *          that are not finite; MOEC_ENOFIT: max_memory or the disk are too small; MOEC_EINTR (can be resumed), MOEC_EIO,
 *          MOEC_ENOMEM.
 *  Cost: one forward pass, 37 products of an expert's matrix with its tokens (12 times the routed experts' share of a pass) and
 *  the search of scales, some 200 roundings of every routed weight; gains: layers / 2 + 2 passes over gain_tokens. Memory: the pass,
 *  n H floats for n tokens, and a thread some 39 bytes for a value of one matrix of an expert; gains: two passes, their states and
 *  states of the original. Disk: results, and with gains the routed experts of one layer in float32. */
MOEC_API moec_status moec_measure(moec_stats *s, const moec_model *m, const moec_corpus *corpus, const moec_measure_opts *o,
                                  moec_err *err) MOEC_USE_RESULT;

#endif
