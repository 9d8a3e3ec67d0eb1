/* Measures what block types cost each matrix of a model's GGUF (calib/sensitivity.h). */
#ifndef MOEC_RUN_GGUF_MEASURE_H
#define MOEC_RUN_GGUF_MEASURE_H

#include "calib/pass.h"
#include "calib/stats.h"

typedef struct moec_gguf_measure_opts {
    moec_compute compute;
    int64_t tokens;      /* kl: the first windows of each domain, its share of this many tokens (one window at least); 0: no kl */
    uint64_t max_memory;
    const char *work;    /* layers that are done lie in WORK.partial, which goes when all are */
    bool resume;
} moec_gguf_measure_opts;
enum { MOEC_GGUF_MEASURE_TOKENS = 4096 }; /* what tools offer; less where the model is large */

/** Fills s->sensitivity: a row for every matrix of the model's GGUF that can be quantized (moec_gguf_model: two dimensions or more,
 *  not the router). s has tier 1 statistics of the same text; without XIN_SQ and ACT_SQ experts' importance is 1.
 *  Of each matrix: mean squares of its input, over the whole text; errors of all types and both probes over sampled rows (all experts,
 *  every k-th row); KL with the matrix alone at each probe, as moec_measure has it for a layer's experts.
 *  Results do not depend on threads, memory or interruptions. On failure s is as it was.
 *  @return as moec_measure; MOEC_EINVAL also: no GGUF is written of this model. */
MOEC_API moec_status moec_gguf_measure(moec_stats *s, const moec_model *m, const moec_corpus *corpus, const moec_gguf_measure_opts *o,
                                       moec_err *err) MOEC_USE_RESULT;

#endif
