/* Nested codes of a matrix W [rows,cols]: one form of it that can be read at 2, 3 .. b bits, each wider one by adding a plane of one bit to
 * the narrower one. Runtimes that hold experts at different widths at different times keep one copy in place of one for each width.
 *
 *     W_2[r,c] = s_0[r,j] (u[r,c] - 2)                              u = 0 .. 3, j = c / group
 *     W_(k+2)  = W_(k+1) + s_k[r,j] (v_k[r,c] - 1/2)                v_k = 0, 1; k = 1 .. b-2
 *
 * so that plane k adds sign(R) s_k / 2, R = W - W_(k+1) what is left. Source: D2MoE (arXiv:2504.15299), "matryoshka weight
 * quantization". Departs: the base has no zero points (the side with one level more is that of the sign of s_0), scales are fitted over
 * all widths, and with tokens codes are found by coordinate descent in the metric of H where the paper makes up for errors between blocks
 * of columns: GPTQ's base leaves a rest that planes of one bit take up badly. */
#ifndef MOEC_METHOD_NESTED_H
#define MOEC_METHOD_NESTED_H

#include "method/gptq.h"

enum { MOEC_NESTED_LEAST = 2, MOEC_NESTED_SCALES = MOEC_QUANT_BITS - 1 };

/** Room for a matrix that can be read at up to g->bits: codes of 2 bits with g->bits - 2 planes of 1 bit, in groups and with scales as g
 *  says. MOEC_EINVAL: bits below 2, zero points, what moec_qcodes_new returns; MOEC_ENOMEM. Release with moec_qcodes_release. */
MOEC_API moec_status moec_nested_new(moec_qcodes *out, const moec_qgrid *g, int64_t rows, int64_t cols, moec_err *err) MOEC_USE_RESULT;
/** Rounds w [rows,cols] to c (of moec_nested_new). how NEAREST: each step to the nearest, scales from the largest value and the mean; CLIP:
 *  scales searched and weighed by importance [cols] (NULL: 1), then all of a group's fitted together (moec_nested_refit); GPTQ: from
 *  those on, each column's codes at all bits at once and each group's scales, to the least sum over widths k of 4^k L (gptq.h) with all
 *  others as they are, twice as often as g has sweeps.
 *  With g *loss is L of gptq.h at all bits and *nearest that of CLIP's codes; without, both are left as they are.
 *  MOEC_ENUMERIC, MOEC_ENOMEM as moec_quant_range. Deterministic; any thread. Cost: with g 2 rows n^2 b for each time through, in the
 *  mode of its options (gptq.h says what that costs), and 2^b steps a value. Memory: 8 bytes a value and 1 kB n b. */
MOEC_API moec_status moec_nested_round(moec_qcodes *c, double *loss, double *nearest, const float *w, moec_rounding how, const moec_gptq *g,
                                       const float *importance, moec_err *err) MOEC_USE_RESULT;
/** Fits all scales of each group of rows [lo, hi) to the codes, and the codes to the scales in turn (each plane the sign of what is left):
 *  scales of least
 *
 *      J = sum over widths k = 2 .. b of 4^k sum_c m_c (w_c - W_k,c)^2
 *
 *  which is linear in them: one system of b-1 unknowns a group. 4^k makes widths count alike, as each bit takes three quarters of the error.
 *  Scales are rounded to their type; what does not make J smaller is not taken. importance: [cols] or NULL: 1. MOEC_ENOMEM. */
MOEC_API moec_status moec_nested_refit(moec_qcodes *c, const float *w, const float *importance, int64_t lo, int64_t hi, moec_err *err)
    MOEC_USE_RESULT;
/** W_bits of all rows to out [rows,cols]; bits from 2, at most as many as c has. */
MOEC_API void moec_nested_restore(float *out, const moec_qcodes *c, int bits);

#endif
