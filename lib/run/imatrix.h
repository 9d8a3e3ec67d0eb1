/* The importance matrix of llama.cpp from statistics of tier 1: mean squares of what experts' matrices are multiplied with,
 * which llama-quantize weighs rounding errors by (--imatrix). */
#ifndef MOEC_RUN_IMATRIX_H
#define MOEC_RUN_IMATRIX_H

#include "calib/stats.h"

/* GGUF: what llama-imatrix writes since 2025; DAT: the form before, which other forks still read. */
typedef enum moec_imatrix_form { MOEC_IMATRIX_GGUF, MOEC_IMATRIX_DAT } moec_imatrix_form;

/** Writes `path`, aside and renamed. Of each MoE layer N (its number among all layers), experts in order, one row each:
 *
 *    blk.N.ffn_gate_exps.weight, blk.N.ffn_up_exps.weight   [E, H]  sum of x^2 over the n tokens that select e (XIN_SQ)
 *    blk.N.ffn_down_exps.weight                             [E, I]  sum of a^2 over them (ACT_SQ)
 *
 *  Domains are mixed with their weights: the mean is sum(w S) / sum(w n), and n becomes round(sum(w n)), at least 1, with
 *  S = n times the mean. An expert that no token selects has in gate and up the layer's mean with n = 1, since its input
 *  comes from the same stream; in down n = 0, which llama-quantize takes as equal importance.
 *  GGUF: NAME.in_sum2 [H or I, E] and NAME.counts [1, E], both F32; general.type "imatrix", imatrix.datasets (names of
 *  domains), .chunk_count (windows), .chunk_size (tokens of one). DAT: for each entry int32 length of name, name, int32 c, int32
 *  number of values, float32 c times the mean, c the number of windows; then c and the domains' names; equal importance
 *  is c.
 *  Only routed experts are in statistics: llama-quantize treats all other tensors as without an importance matrix, and
 *  refuses to bring these to types that need one (below IQ3_XXS, Q2_K_S).
 *  Source: llama.cpp, tools/imatrix and common/imatrix-loader; filling in the layer's mean is ours.
 *  @return MOEC_OK; MOEC_EINVAL: SELECTED, XIN_SQ or ACT_SQ were not collected (calibrate with --tier 1), no tokens, or a
 *          tensor too large for DAT; MOEC_EIO, MOEC_ENOFIT, MOEC_ENOMEM; then nothing is written.
 *  Memory of DAT: the whole file. */
MOEC_API moec_status moec_imatrix_write(const char *path, const moec_stats *s, moec_imatrix_form form, moec_err *err)
    MOEC_USE_RESULT;

#endif
