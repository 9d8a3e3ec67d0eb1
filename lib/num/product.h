/* Products of ordinary row-major matrices by the kernels of gemm.h: what is neither activations in panels nor a matrix as it lies in a
 * checkpoint, and large enough that copying both sides into the kernels' form does not count. linalg.h has the rest.
 *
 * MOEC_COMPUTE_BF16 rounds both sides to bfloat16 and sums in float32: twice the speed with AVX512_BF16, and no slower without. As in
 * gemm.h that instruction takes denormals for 0, what comes out as well: squares of values below 1e-19 are lost. What is not finite
 * makes the sums that it is part of not finite in either mode, and no others; in BF16 so do values above 3.396e38.
 * Where gemm.h has no kernel but the generic one, OpenBLAS does it all, in float32 in either mode: three times as fast.
 * On one machine the same call gives the same bits from any thread. Stack: 650 KB. */
#ifndef MOEC_NUM_PRODUCT_H
#define MOEC_NUM_PRODUCT_H

#include "num/gemm.h"

/** C = op(A) op(B), or C + that with `add`; op is the transpose where transa/transb say so.
 *  @param m,n,k  op(A) is [m,k], op(B) is [k,n], C is [m,n]; none below 0.
 *  @param lda    floats from one row of A as stored to the next; ldb, ldc likewise.
 *  Any one value of C is summed in an order that k and the mode alone give. Safe from several threads at once, on different C.
 *  Cost: 2 m n k operations at some 90 % of moec_gemm's speed from 64 rows and 64 columns on. */
MOEC_API void moec_product(moec_compute mode, bool transa, bool transb, int64_t m, int64_t n, int64_t k, const float *a, int64_t lda,
                           const float *b, int64_t ldb, bool add, float *c, int64_t ldc);

/** Lower triangle of C = X^T X + beta C for X [k,n] in float32 and C [n,n] in float64; what lies above it is neither read nor
 *  written. Products and sums over up to 512 rows of X are in float32, the sums of those in float64. With MOEC_COMPUTE_BF16 it is that
 *  of X rounded to bfloat16, so positive semidefinite as well. beta 0 overwrites C whatever it holds. Safe from several threads at
 *  once, on different C. Cost: k n^2 operations. */
MOEC_API void moec_gram(double *c, int64_t n, const float *x, int64_t ldx, int64_t k, double beta, moec_compute mode);

#endif
