/* What each width costs each routed expert, measured once over text for all candidates and kept with the other statistics. */
#ifndef MOEC_RUN_MEASURE_H
#define MOEC_RUN_MEASURE_H

#include "calib/pass.h"
#include "calib/stats.h"

typedef struct moec_measure_opts {
    moec_compute compute; /* of the forward pass */
    int64_t group;        /* of the grid (moec_quant_group of it) */
    bool gains;           /* QUANT_KL too: for each MoE layer the rest of the model runs over the text once more */
    uint64_t max_memory;
    const char *work;     /* layers that are done lie in WORK.partial */
    bool resume;
} moec_measure_opts;

/** Fills QUANT_SQ, QUANT_FRO and with `gains` QUANT_KL of s, whose domains must be those of the corpus (name and digest): widths
 *  MOEC_QUANT_WIDTHS, quantized by moec_quant_range CLIP without importance and to nearest, F32 scales, no zero points. Everything
 *  else of the model stays as it is. Only the tokens that select an expert can change when it does:
 *
 *    SQ[l,e,p,b]  += g^2 |y - y_q|^2 / mean(h'^2)    p = gate, up, down alone, all three; h' the residual stream behind the layer
 *    FRO[l,e,b]   += sqrt(sum over the window's tokens of g^2 |y - y_q|^2)        once a window (MC-MoE's batch), p = all three
 *    KL[l]        += KL(original || the model with all experts of layer l at 2 bits), over scored tokens
 *
 *  The group goes into the statistics' options ("quant_group").
 *  MOEC_EINVAL: other domains than the statistics'; MOEC_ENUMERIC; MOEC_ENOFIT, MOEC_EINTR (can be resumed), MOEC_EIO, MOEC_ENOMEM.
 *  Cost: one forward pass and some 13 times the routed experts' share of it; gains: layers / 2 passes. */
MOEC_API moec_status moec_measure(moec_stats *s, const moec_model *m, const moec_corpus *corpus, const moec_measure_opts *o,
                                  moec_err *err) MOEC_USE_RESULT;

#endif
