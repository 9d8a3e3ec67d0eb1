/* Dense linear algebra on ordinary row-major matrices: the border to OpenBLAS. No other file sees cblas.h.
 *
 * OpenBLAS is pinned to one thread: this library parallelises outside, over experts and row blocks, and one product
 * gives the same bits whatever the number of our threads. */
#ifndef MOEC_NUM_LINALG_H
#define MOEC_NUM_LINALG_H

#include "base/err.h"

#include <stdbool.h>
#include <stdint.h>

/** Pins OpenBLAS to one thread. Called by every function here; call it first when something else uses OpenBLAS. */
MOEC_API void moec_linalg_init(void);

/** C = alpha * op(A) op(B) + beta * C in float32; op is the transpose where transa/transb say so.
 *  @param m,n,k  op(A) is [m, k], op(B) is [k, n], C is [m, n]; dimensions above INT32_MAX are not possible.
 *  @param lda    floats from one row of A as stored to the next; ldb, ldc likewise.
 *  beta == 0 overwrites C whatever it holds. Safe from several threads at once, on different C. */
MOEC_API void moec_sgemm(bool transa, bool transb, int64_t m, int64_t n, int64_t k, float alpha, const float *a,
                         int64_t lda, const float *b, int64_t ldb, float beta, float *c, int64_t ldc);

#endif
