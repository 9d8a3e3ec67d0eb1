/* Rounding of a matrix W [rows,cols] so that its output changes least: of all codes for given scales those of small
 *
 *     L = tr(D H D^T),   D = W - W',   H = sum_t m_t x_t x_t^T over calibration tokens
 *
 * by GPTQ (Frantar et al., arXiv:2210.17323): columns are rounded one after the other, each after the error of those before it was
 * made up for in it. We take it in the form of LDLQ (Chee et al., arXiv:2307.13304, theorem 6: the same numbers): with rows and
 * columns in the order of rounding and H + diag(added) = A diag(variance) A^T, A upper and of unit diagonal,
 *
 *     v_k = w_k + sum_{j before k} (w_j - w'_j) a_jk,     L + sum_c added_c |D_c|^2 = sum_k variance_k |v_k - w'_k|^2
 *
 * where column k is rounded from v_k: one Cholesky factor, no inverse. Departs from the published code: scales are found before (static
 * groups), no column is set to 0, and rows may keep rounding to nearest. */
#ifndef MOEC_METHOD_GPTQ_H
#define MOEC_METHOD_GPTQ_H

#include "method/quant.h"
#include "num/gemm.h"

/* How a matrix is rounded: to nearest with MINMAX scales, with CLIP scales (quant.h), or by what is below. */
typedef enum moec_rounding { MOEC_ROUND_NEAREST, MOEC_ROUND_CLIP, MOEC_ROUND_GPTQ } moec_rounding;

typedef struct moec_gptq_opts {
    double damp;    /* share of the mean diagonal that is added to the diagonal of H; raised tenfold until there is a factor */
    bool act_order; /* columns by descending diagonal of H; groups stay those of neighbours (scales are found before) */
    int sweeps;     /* behind GPTQ: rounds of coordinate descent on the codes with scales fitted by least squares in between; what
                       raises L is not taken */
    moec_compute compute; /* of what errors make in other columns; the factor and sums are the same in both modes */
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
 *  Without a factor at any damping (H is 0 or far from positive semidefinite) H is replaced by the identity: rounding to nearest.
 *  MOEC_ENUMERIC: h is not finite; MOEC_EINVAL: n, damp or sweeps below 0; MOEC_ENOMEM. Free with moec_gptq_free. Cost: n^3/3 operations
 *  in float32, summed in float64 as moec_gram does, to some 1e-5 of each variance; where one is below 1/500 of its column's diagonal
 *  entry, those are done once more in float64. Memory: 8 n^2 bytes, 12 n^2 with sweeps, and 1 kB n while it works. */
MOEC_API moec_status moec_gptq_new(moec_gptq **out, const double *h, int64_t n, const moec_gptq_opts *o, moec_err *err) MOEC_USE_RESULT;
/** The same for another H of as many columns, with the same options: pages that the system does not have to give out anew save a
 *  third of the time. After an error g is good for this and for moec_gptq_free only. MOEC_ENUMERIC, MOEC_ENOMEM. */
MOEC_API moec_status moec_gptq_renew(moec_gptq *g, const double *h, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_gptq_free(moec_gptq *g);
/** Diagonal of H as it was given, [n] floats: importance for moec_quant_range. Borrowed. */
MOEC_API const float *moec_gptq_importance(const moec_gptq *g);
/** Codes of c for w [rows,cols]; c has its scales (moec_quant_range), which sweeps change. *loss: L by H as it was given, of what
 *  is returned; *nearest: that of rounding to nearest with the scales as they were. Rows where that is the smaller one get its codes
 *  (all: *loss == *nearest). Both are found as the damped loss less what the damping makes, to some 1e-5 of the damped one, with
 *  MOEC_COMPUTE_BF16 to 1e-3; moec_gptq_loss is exact. Deterministic; any thread.
 *  nearest NULL: the codes and *loss are the same bits, but that of rounding to nearest is summed, from its largest terms on, only
 *  until it is clear that no row gets its codes, which is most often soon.
 *  A sweep goes through the columns as they lie: each code to its best value with all others as they are, then, behind the last column
 *  of a group, the group's scale by least squares, rounded to its type; both only where neither the loss nor the damped loss
 *  rises, as far as opts.compute tells.
 *  MOEC_EINVAL: c and g differ in columns; MOEC_ENUMERIC: a loss is not finite; MOEC_ENOMEM.
 *  Cost: 2 rows n^2 operations, little more than half with nearest NULL, 2 rows n^2 for each sweep and rows n^2 behind them, nearly all of
 *  it in opts.compute. With MOEC_COMPUTE_BF16 what a column is rounded from is off by some thousandths of a step: losses come out
 *  within some thousandths of those by float32, on either side, and within a hundredth where H is of fewer tokens than columns.
 *  Memory: 10 n bytes for each of up to 256 rows. */
MOEC_API moec_status moec_gptq_round(moec_qcodes *c, double *loss, double *nearest, const moec_gptq *g, const float *w, moec_err *err)
    MOEC_USE_RESULT;
/** tr(D H D^T) by H as it was given, in float64. v [rows,cols]: W'. MOEC_ENOMEM. */
MOEC_API moec_status moec_gptq_loss(double *out, const moec_gptq *g, const float *w, const float *v, int64_t rows, moec_err *err)
    MOEC_USE_RESULT;
/** Each row x [n] of b [rows,n] becomes x (H + diag(added))^-1 by the factor that rounding goes by, in float32, to what the
 *  factor allows (moec_gptq_new). Any thread. MOEC_ENOMEM. Cost: 2 rows n^2 operations. Memory: 1 kB n. */
MOEC_API moec_status moec_gptq_solve(float *b, const moec_gptq *g, int64_t rows, moec_err *err) MOEC_USE_RESULT;

#endif
