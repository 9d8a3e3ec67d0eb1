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
 *  not the router, not experts that keep MXFP4). s has tier 1 statistics of the same text; without XIN_SQ and ACT_SQ experts'
 *  importance is 1. Domains count with their weights in s.
 *
 *    square[c]  mean of x_c^2 over the whole text. Of a tied embedding what the head multiplies; of attn_v_b what kv_b does; none of
 *               attn_k_b, whose rows meet queries of one head after rotation is split off: its importance is 1
 *    error[t]   over 64 rows of each expert's matrix and 512 of another, in even steps, under the importance of gguf_importance.h
 *    probe[b]   the same where the matrix is on the grid of b bits: moec_quant_range CLIP without importance, no zero points, F32
 *               scales, groups of 32 columns (16, 8, or whole rows, where these do not divide them); of attn_k_b rows as the GGUF's
 *    kl[b]      KL(original || the model with this matrix alone on that grid) a scored token, by windows of o->tokens
 *
 *  Results do not depend on threads, memory or interruptions. On failure s is as it was.
 *  @return as moec_measure; MOEC_EINVAL also: no GGUF is written of this model.
 *  Cost: a pass; every sampled row in every type; two passes over o->tokens, and for each matrix and probe the rest of the model from
 *  its layer on, all of a layer's at once as far as their states fit, so that weights are read about layers / 2 times.
 *  Memory: the pass; E (H + I) floats a MoE layer; KL: two passes, states of the original and of the variants under way.
 *  Disk: a matrix (of experts the stack) in float32; the embedding twice. */
MOEC_API moec_status moec_gguf_measure(moec_stats *s, const moec_model *m, const moec_corpus *corpus, const moec_gguf_measure_opts *o,
                                       moec_err *err) MOEC_USE_RESULT;

/** Whether KL will fit o->max_memory, which is better known before a calibration than behind it; nothing is read or run. MOEC_ENOFIT:
 *  it will not. MOEC_EINVAL: no GGUF is written of this model, or o->tokens < 0. */
MOEC_API moec_status moec_gguf_measure_fit(const moec_model *m, const moec_corpus *corpus, const moec_gguf_measure_opts *o,
                                           moec_err *err) MOEC_USE_RESULT;

#endif
