#include "num/linalg.h"

#include <assert.h>
#include <cblas.h>
#include <lapacke.h>
#include <math.h>
#include <pthread.h>

static void pin(void)
{
    openblas_set_num_threads(1);
}

void moec_linalg_init(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, pin);
}

static blasint dimension(int64_t n)
{
    assert(n >= 0 && n <= INT32_MAX);
    return (blasint)n;
}

void moec_sgemm(bool transa, bool transb, int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda,
                const float *b, int64_t ldb, float beta, float *c, int64_t ldc)
{
    moec_linalg_init();
    if (m == 0 || n == 0)
        return;
    cblas_sgemm(CblasRowMajor, transa ? CblasTrans : CblasNoTrans, transb ? CblasTrans : CblasNoTrans, dimension(m),
                dimension(n), dimension(k), alpha, a, dimension(lda), b, dimension(ldb), beta, c, dimension(ldc));
}

void moec_saxpy(float *y, float alpha, const float *x, int64_t n)
{
    moec_linalg_init();
    cblas_saxpy(dimension(n), alpha, x, 1, y, 1);
}

float moec_sdot(const float *x, const float *y, int64_t n)
{
    moec_linalg_init();
    return cblas_sdot(dimension(n), x, 1, y, 1);
}

/* LAPACK's columns are our rows: of a symmetric matrix our lower triangle is its upper one, and right-hand sides lie as it
 * wants them. So nothing is turned. */
bool moec_cholesky(double *a, int64_t n)
{
    moec_linalg_init();
    for (int64_t i = 0; i < n; i++) /* LAPACK may take a NaN for a pivot */
        for (int64_t j = 0; j <= i; j++)
            if (!isfinite(a[i * n + j]))
                return false;
    return n == 0 || LAPACKE_dpotrf_work(LAPACK_COL_MAJOR, 'U', dimension(n), a, dimension(n)) == 0;
}

void moec_cholesky_solve(double *b, const double *factor, int64_t n, int64_t rows)
{
    moec_linalg_init();
    if (n == 0 || rows == 0)
        return;
    lapack_int info = LAPACKE_dpotrs_work(LAPACK_COL_MAJOR, 'U', dimension(n), dimension(rows), factor, dimension(n), b,
                                          dimension(n));
    assert(info == 0); /* it only refuses impossible arguments */
    (void)info;
}
