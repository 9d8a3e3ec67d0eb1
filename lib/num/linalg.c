#include "num/linalg.h"

#include "base/mem.h"

#include <assert.h>
#include <cblas.h>
#include <lapacke.h>
#include <math.h>
#include <pthread.h>
#include <string.h>

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

void moec_dsyrk(int64_t n, int64_t k, const double *a, int64_t lda, double beta, double *c)
{
    moec_linalg_init();
    if (n == 0)
        return;
    cblas_dsyrk(CblasRowMajor, CblasLower, CblasNoTrans, dimension(n), dimension(k), 1.0, a, dimension(lda), beta, c, dimension(n));
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

void moec_dgemm(bool transa, bool transb, int64_t m, int64_t n, int64_t k, double alpha, const double *a, int64_t lda,
                const double *b, int64_t ldb, double beta, double *c, int64_t ldc)
{
    moec_linalg_init();
    if (m == 0 || n == 0)
        return;
    cblas_dgemm(CblasRowMajor, transa ? CblasTrans : CblasNoTrans, transb ? CblasTrans : CblasNoTrans, dimension(m),
                dimension(n), dimension(k), alpha, a, dimension(lda), b, dimension(ldb), beta, c, dimension(ldc));
}

/* The order of the eigenpairs is turned round, LAPACK's is ascending. */
static void reverse(double *values, double *vectors, int64_t n, int64_t r)
{
    for (int64_t i = 0, j = r - 1; i < j; i++, j--) {
        if (values) {
            const double value = values[i];
            values[i] = values[j];
            values[j] = value;
        }
        for (int64_t c = 0; c < n; c++) {
            const double v = vectors[i * n + c];
            vectors[i * n + c] = vectors[j * n + c];
            vectors[j * n + c] = v;
        }
    }
}

static void fix_sign(double *v, int64_t n)
{
    int64_t most = 0;
    for (int64_t c = 1; c < n; c++)
        most = fabs(v[c]) > fabs(v[most]) ? c : most;
    if (v[most] < 0.0)
        for (int64_t c = 0; c < n; c++)
            v[c] = -v[c];
}

moec_status moec_eigen(double *values, double *vectors, double *a, int64_t n, int64_t r, moec_eigen_end end, moec_err *err)
{
    moec_status st = MOEC_OK;
    double *all = NULL, *work = NULL, size[1];
    lapack_int *iwork = NULL, *support = NULL, isize[1], found = 0, info;
    const lapack_int order = dimension(n), last = dimension(end == MOEC_EIGEN_SMALLEST ? r : n), first = last - dimension(r) + 1;
    const char range = r == n ? 'A' : 'I';
    moec_linalg_init();
    if (r == 0)
        return MOEC_OK;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j <= i; j++)
            if (!isfinite(a[i * n + j]))
                return moec_fail(err, MOEC_ENUMERIC, "eigenvalues: the matrix is not finite at %lld, %lld", (long long)i,
                                 (long long)j);
    MOEC_TRY(MOEC_NEW(all, (size_t)n, err)); /* LAPACK uses n places for any r */
    MOEC_TRY(MOEC_NEW(support, 2 * (size_t)n, err));
    info = LAPACKE_dsyevr_work(LAPACK_COL_MAJOR, 'V', range, 'U', order, a, order, 0.0, 0.0, first, last, 0.0, &found, all,
                               vectors, order, support, size, -1, isize, -1);
    if (info == 0) {
        MOEC_TRY(MOEC_NEW(work, (size_t)size[0], err));
        MOEC_TRY(MOEC_NEW(iwork, (size_t)isize[0], err));
        info = LAPACKE_dsyevr_work(LAPACK_COL_MAJOR, 'V', range, 'U', order, a, order, 0.0, 0.0, first, last, 0.0, &found, all,
                                   vectors, order, support, work, (lapack_int)size[0], iwork, isize[0]);
    }
    if (info != 0 || found != r) {
        st = moec_fail(err, MOEC_ENUMERIC, "eigenvalues: LAPACK's dsyevr did not converge (%d, %d of %lld found)", (int)info,
                       (int)found, (long long)r);
        goto done;
    }
    for (int64_t i = 0; values && i < r; i++)
        values[i] = all[i];
    if (end == MOEC_EIGEN_LARGEST)
        reverse(values, vectors, n, r);
    for (int64_t i = 0; i < r; i++)
        fix_sign(vectors + i * n, n);
done:
    moec_free(iwork);
    moec_free(work);
    moec_free(support);
    moec_free(all);
    return st;
}
