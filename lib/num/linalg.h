/* Dense linear algebra on ordinary row-major matrices: the border to OpenBLAS. No other file sees cblas.h and lapacke.h.
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
/** The same of doubles. */
MOEC_API void moec_dgemm(bool transa, bool transb, int64_t m, int64_t n, int64_t k, double alpha, const double *a, int64_t lda,
                         const double *b, int64_t ldb, double beta, double *c, int64_t ldc);

/** Lower triangle of C = A A^T + beta * C in float64, A [n,k], C [n,n]; what lies above it is neither read nor written. beta 0
 *  overwrites C whatever it holds. Safe from several threads at once, on different C. */
MOEC_API void moec_dsyrk(int64_t n, int64_t k, const double *a, int64_t lda, double beta, double *c);

/** y[i] += alpha * x[i]. */
MOEC_API void moec_saxpy(float *y, float alpha, const float *x, int64_t n);
/** sum of x[i] * y[i] in float32, in one order for each n. */
MOEC_API float moec_sdot(const float *x, const float *y, int64_t n);

/** Factor of a symmetric positive definite matrix a [n,n] in float64: the lower triangle is overwritten by L with L L^T = a;
 *  what lies above it is neither read nor written. False: a is not positive definite or not finite; the triangle is lost then.
 *  Cost: n^3/3 operations. */
MOEC_API bool moec_cholesky(double *a, int64_t n) MOEC_USE_RESULT;
/** The same of the upper triangle, overwritten by U with U^T U = a, rows lda apart; what lies below it is neither read nor written. */
MOEC_API bool moec_cholesky_upper(double *a, int64_t n, int64_t lda) MOEC_USE_RESULT;
/** b [n,cols], rows ldb apart, becomes U^-T b for an upper triangle U [n,n], rows ldu apart, of which nothing below the diagonal is read.
 *  Cost: cols n^2 operations. Safe from several threads at once, on different columns. */
MOEC_API void moec_dtrsm_upper(double *b, int64_t ldb, const double *u, int64_t ldu, int64_t n, int64_t cols);
/** Each row x [n] of b [rows,n] becomes a^-1 x, with the factor that moec_cholesky left. Cost: 2 rows n^2. Safe from several
 *  threads at once, on different rows. */
MOEC_API void moec_cholesky_solve(double *b, const double *factor, int64_t n, int64_t rows);

/** a [m,n] = q r in float64, m >= n: a becomes q, whose columns are orthonormal, and r [n,n] the triangle, 0 below the diagonal.
 *  MOEC_ENOMEM. Cost: 4 m n^2 operations. Safe from several threads at once. */
MOEC_API moec_status moec_qr(double *r, double *a, int64_t m, int64_t n, moec_err *err) MOEC_USE_RESULT;

/** Each row x [n] of b [rows,n] becomes x A^-1, or x A^-T with `trans`, for an upper triangle A [n,n], rows lda apart, with a
 *  diagonal of 1 (neither it nor what lies below is read), in float32. Cost: rows n^2 operations. Safe from several
 *  threads at once, on different rows. */
MOEC_API void moec_strsm_unit(float *b, bool trans, const float *a, int64_t lda, int64_t n, int64_t rows);

typedef enum moec_eigen_end { MOEC_EIGEN_LARGEST, MOEC_EIGEN_SMALLEST } moec_eigen_end;
/** The r largest or smallest eigenvalues of a symmetric matrix a [n,n] in float64 and their eigenvectors, a v = value v; by
 *  LAPACK's tridiagonal form and divide and conquer. Largest is by value, not by magnitude.
 *  @param values  [r] descending for the largest, ascending for the smallest; NULL: they are not wanted.
 *  @param vectors [r,n] a row each, orthonormal; of the entries of largest magnitude the first is positive. Of equal eigenvalues
 *                 only the space is given by a, the vectors are some basis of it.
 *  @param a       the lower triangle is read, and lost; what lies above it is neither read nor written.
 *  0 <= r <= n. MOEC_ENUMERIC: a is not finite, or LAPACK did not converge; MOEC_ENOMEM, also where n > 46000. Cost: up to
 *  8/3 n^3 + 2 r n^2 operations. Memory: 2 n^2 values. Safe from several threads at once. */
MOEC_API moec_status moec_eigen(double *values, double *vectors, double *a, int64_t n, int64_t r, moec_eigen_end end,
                                moec_err *err) MOEC_USE_RESULT;
/** What these vectors span, in float32: basis [r,n], orthonormal rows in no order; at twice the speed of moec_eigen. Of a unit
 *  vector of that space some 1e-7 lambda / gap is missing, lambda the largest eigenvalue by magnitude and gap how far the vector's
 *  own is from those left out. a's lower triangle is read, and lost. Errors and cost as above. */
MOEC_API moec_status moec_eigenspace(float *basis, float *a, int64_t n, int64_t r, moec_eigen_end end, moec_err *err)
    MOEC_USE_RESULT;

#endif
