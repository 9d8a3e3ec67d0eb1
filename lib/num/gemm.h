/* Matrix products of the layer pass: activations times a weight matrix as it lies in the checkpoint.
 *
 * Activations travel in PANELS of 32 tokens, feature-major: a panel of a matrix with `width` features is
 * float[width][32], token t of a batch is lane t%32 of panel t/32, unused lanes of the last panel are 0. The product's
 * output has the same form as its input, so that an expert's gate, up, activation and down run without a transpose.
 *
 *     Y[rows, 32] = W[rows, k] . X[k, 32]          for every panel
 *
 * W is row-major [rows, k] in F32, BF16 or F16, or any view of weight.h, read where it lies. Two compute modes:
 *   MOEC_COMPUTE_F32   float32 products and sums; the reference.
 *   MOEC_COMPUTE_BF16  activations rounded to bfloat16 (nearest even), weights as stored in BF16 (others rounded),
 *                      float32 sums. With AVX512_BF16 the multiply instruction takes two k values at a time and treats
 *                      denormal operands and results as 0; without it the rounded values go through the float32
 *                      kernels, which is no faster than MOEC_COMPUTE_F32 and only there so that results agree closely.
 * Every output value is summed in one fixed order whatever the number of threads, the batch and the place in it: the
 * bits depend on the operands, the mode and the kernel alone. Kernels differ from each other in the last bits.
 *
 * The kernel is the best that the CPU has; the environment variable MOEC_KERNEL = generic | avx2 | avx512 lowers that
 * (read once per process). No weight matrix is ever packed or converted as a whole.
 */
#ifndef MOEC_NUM_GEMM_H
#define MOEC_NUM_GEMM_H

#include "num/weight.h"

typedef enum moec_compute { MOEC_COMPUTE_F32, MOEC_COMPUTE_BF16 } moec_compute;

enum { MOEC_PANEL = 32 };

/** Panels for n tokens. */
static inline int64_t moec_panels(int64_t n)
{
    return (n + MOEC_PANEL - 1) / MOEC_PANEL;
}

/** Gathers token-major rows into panels: token i of the batch is x + at[i]*ldx (at == NULL: i itself).
 *  out: moec_panels(n)*width*32 floats, 64-byte aligned. */
MOEC_API void moec_panel_pack(float *out, const float *x, int64_t ldx, const int32_t *at, int64_t n, int64_t width);
/** The inverse: y + i*ldy receives token i (width values). */
MOEC_API void moec_panel_unpack(float *y, int64_t ldy, const float *panels, int64_t n, int64_t width);
/** y[at[i]] += scale[i] * token i, in ascending i (at == NULL: i itself). */
MOEC_API void moec_panel_scatter_add(float *y, int64_t ldy, const int32_t *at, const float *scale, const float *panels,
                                     int64_t n, int64_t width);

/** Bytes of scratch that moec_gemm needs for n tokens of width k (per call in flight). Grows up to n = 1024 and then
 *  stays; 0 where activations are read in place (MOEC_COMPUTE_F32), and then scratch may be NULL. */
MOEC_API size_t moec_gemm_scratch_bytes(moec_compute mode, int64_t n, int64_t k);

/** Y = W X for every panel.
 *  @param y        moec_panels(n) panels of width `rows`; 64-byte aligned; must not overlap x. Unused lanes become 0.
 *  @param x        moec_panels(n) panels of width k; 64-byte aligned.
 *  @param w        [rows, k] row-major, any alignment; dtype F32, BF16 or F16.
 *  @param scratch  moec_gemm_scratch_bytes(mode, n, k) bytes, 64-byte aligned.
 *  @return MOEC_OK; MOEC_EINVAL for another dtype or a negative size.
 *  Threads: runs row and token blocks with moec_par_for, hence serially inside a parallel loop; small products always.
 *  Cost: 2*n*rows*k operations; weights are read and converted once per 256 tokens. */
MOEC_API moec_status moec_gemm(float *y, const float *x, int64_t n, int64_t k, const void *w, moec_dtype dtype,
                               int64_t rows, moec_compute mode, void *scratch, moec_err *err) MOEC_USE_RESULT;

/** The same with the matrix of a view: k is w->cols, rows is w->rows; scratch as for moec_gemm with n and w->cols. A plain
 *  view of F32, F16 or BF16 with col_step 1 runs as fast as moec_gemm; of every other view 12 rows (96 when transposed) of a
 *  k block at a time are read to float32. Bits: those of moec_gemm with the whole matrix read to float32.
 *  Cost: in BF16 mode 93 % of moec_gemm's speed for FP8, 97 for MXFP4, 87 transposed with 512 tokens; 57, 80, 34 with 16.
 *  Stack: 240 KB in each thread that takes part.
 *  @return MOEC_OK; MOEC_EINVAL for a view that moec_weight_check refuses, for plain F64, or for n < 0. */
MOEC_API moec_status moec_gemm_weight(float *y, const float *x, int64_t n, const moec_weight *w, moec_compute mode,
                                      void *scratch, moec_err *err) MOEC_USE_RESULT;

/** Name of the kernels this machine uses for a mode, for reports: "avx512", "avx512bf16", "avx2", "generic". */
MOEC_API const char *moec_gemm_kernel(moec_compute mode);

#endif
