/* Rounding of a matrix W [rows,cols] so that its output changes least: of all codes for given scales those of small
 *
 *     L = tr(D H D^T),   D = W - W',   H = sum_t m_t x_t x_t^T over calibration tokens
 *
 * by GPTQ (Frantar et al., arXiv:2210.17323): columns are rounded one after the other, each after the error of those before it was
 * made up for in it. We take it in the form of LDLQ (Chee et al., arXiv:2307.13304, theorem 6: the same numbers): with columns in
 * the order p of rounding and P H P^T = U^T' D U' .. the value that column k is rounded from is
 *
 *     v_k = w_k + sum_{j before k} (w_j - w'_j) a_jk
 *
 * a the unit triangular factor of H: one Cholesky factor, no inverse. */
#ifndef MOEC_METHOD_GPTQ_H
#define MOEC_METHOD_GPTQ_H

#include "method/quant.h"

typedef struct moec_gptq_opts {
    double damp;    /* share of the mean diagonal that is added to the diagonal of H; raised tenfold until there is a factor */
    bool act_order; /* columns by descending diagonal of H; groups stay those of neighbours (scales are found before) */
    int sweeps;     /* behind GPTQ: rounds of coordinate descent on the codes with scales fitted by least squares in between; what
                       raises L is not taken */
} moec_gptq_opts;
#define MOEC_GPTQ_DEFAULTS {.damp = 0.01, .act_order = true, .sweeps = 2}

/** h [n,n] (lower triangle) = lambda h / mass + (1 - lambda) layer / layer_mass: the Hessian of an expert with few tokens leans on
 *  that of its layer.
 *
 *     lambda = tokens / (tokens + n/8),  1 from tokens = 2 n on
 *
 *  layer NULL, or layer_mass 0: of the expert alone; mass 0: of the layer alone; neither: the identity. */
MOEC_API void moec_gptq_blend(double *h, double mass, int64_t tokens, const double *layer, double layer_mass, int64_t n);

typedef struct moec_gptq moec_gptq;
/** What rounding needs of H: its factor. Gate and up have the same inputs and share one.
 *  @param h [n,n] in float64, lower triangle; read only. Diagonal entries below 1e-6 of the largest are raised to that: a column
 *           that no token reached is rounded to nearest and not set to 0 (which is what the published code does).
 *  MOEC_ENUMERIC: h is not finite; MOEC_ENOMEM. Free with moec_gptq_free. Cost: n^3/3 operations in float64. */
MOEC_API moec_status moec_gptq_new(moec_gptq **out, const double *h, int64_t n, const moec_gptq_opts *o, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_gptq_free(moec_gptq *g);
/** Diagonal of H as it was given, [n] floats: importance for moec_quant_range. Borrowed. */
MOEC_API const float *moec_gptq_importance(const moec_gptq *g);
/** Codes of c for w [rows,cols]; c has its scales (moec_quant_range), which sweeps change. *loss: L by H as it was given, of what
 *  is returned; *nearest: that of rounding to nearest with the scales as they were. Where that is the smaller one its codes are
 *  returned (*loss == *nearest). Deterministic; any thread. MOEC_ENUMERIC, MOEC_ENOMEM.
 *  Cost: rows n^2 operations in float32, (1 + 2 sweeps) times. */
MOEC_API moec_status moec_gptq_round(moec_qcodes *c, double *loss, double *nearest, const moec_gptq *g, const float *w, moec_err *err)
    MOEC_USE_RESULT;
/** tr(D H D^T) by H as it was given, in float64. v [rows,cols]: W'. MOEC_ENOMEM. */
MOEC_API moec_status moec_gptq_loss(double *out, const moec_gptq *g, const float *w, const float *v, int64_t rows, moec_err *err)
    MOEC_USE_RESULT;

#endif
