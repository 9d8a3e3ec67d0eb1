#include "num/linalg.h"

#include "base/mem.h"

#include <assert.h>
#include <cblas.h>
#include <float.h>
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

void moec_strsm_unit(float *b, bool trans, const float *a, int64_t lda, int64_t n, int64_t rows)
{
    moec_linalg_init();
    if (n == 0 || rows == 0)
        return;
    cblas_strsm(CblasRowMajor, CblasRight, CblasUpper, trans ? CblasTrans : CblasNoTrans, CblasUnit, dimension(rows), dimension(n), 1.0f,
                a, dimension(lda), b, dimension(n));
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

/* LAPACK may take a NaN for a pivot. */
static bool numbers(const double *a, int64_t n)
{
    int bad = 0;
    for (int64_t i = 0; i < n; i++)
        bad |= !(fabs(a[i]) <= DBL_MAX);
    return !bad;
}

/* LAPACK's columns are our rows: of a symmetric matrix our lower triangle is its upper one, and right-hand sides lie as it
 * wants them. So nothing is turned. */
bool moec_cholesky(double *a, int64_t n)
{
    moec_linalg_init();
    for (int64_t i = 0; i < n; i++)
        if (!numbers(a + i * n, i + 1))
            return false;
    return n == 0 || LAPACKE_dpotrf_work(LAPACK_COL_MAJOR, 'U', dimension(n), a, dimension(n)) == 0;
}

bool moec_cholesky_upper(double *a, int64_t n, int64_t lda)
{
    moec_linalg_init();
    for (int64_t i = 0; i < n; i++)
        if (!numbers(a + i * lda + i, n - i))
            return false;
    return n == 0 || LAPACKE_dpotrf_work(LAPACK_COL_MAJOR, 'L', dimension(n), a, dimension(lda)) == 0;
}

void moec_dtrsm_upper(double *b, int64_t ldb, const double *u, int64_t ldu, int64_t n, int64_t cols)
{
    moec_linalg_init();
    if (n == 0 || cols == 0)
        return;
    cblas_dtrsm(CblasRowMajor, CblasLeft, CblasUpper, CblasTrans, CblasNonUnit, dimension(n), dimension(cols), 1.0, u, dimension(ldu), b,
                dimension(ldb));
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

moec_status moec_qr(double *r, double *a, int64_t m, int64_t n, moec_err *err)
{
    moec_status st = MOEC_OK;
    double *tau = NULL, *work = NULL;
    const lapack_int M = dimension(m), N = dimension(n), room = dimension(64 * n);
    lapack_int info;
    moec_linalg_init();
    if (n == 0)
        return MOEC_OK;
    MOEC_TRY(MOEC_NEW(tau, (size_t)n, err));
    MOEC_TRY(MOEC_NEW(work, (size_t)room, err));
    info = LAPACKE_dgelqf_work(LAPACK_COL_MAJOR, N, M, a, N, tau, work, room); /* a^T = r^T q^T */
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++)
            r[i * n + j] = j < i ? 0.0 : a[i * n + j];
    info = info ? info : LAPACKE_dorglq_work(LAPACK_COL_MAJOR, N, M, N, a, N, tau, work, room);
    assert(info == 0); /* they only refuse impossible arguments */
    (void)info;
done:
    moec_free(tau);
    moec_free(work);
    return st;
}

/* --- eigenvectors ----------------------------------------------------------------------------------------------------------- */

/* All eigenvectors of the tridiagonal form by divide and conquer (xstedc) take less time than some of them by bisection and inverse
 * iteration, which is what xsyevr has for a part; turning back is spared those that are not wanted. */

enum { MOST_ROWS = 46000 }; /* LAPACK counts the room in 32 bits */

/* Row i of what is asked for as a row of LAPACK's, whose order is ascending. */
static int64_t place_of(int64_t i, int64_t n, moec_eigen_end end)
{
    return end == MOEC_EIGEN_LARGEST ? n - 1 - i : i;
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

static moec_status not_finite(int64_t i, int64_t j, moec_err *err)
{
    return moec_fail(err, MOEC_ENUMERIC, "eigenvalues: the matrix is not finite at %lld, %lld", (long long)i, (long long)j);
}

/* A power of two, which changes no digit, with which no magnitude is above 1: its squares do not overflow. */
static double scale_of(double most)
{
    int power;
    (void)frexp(most, &power);
    return ldexp(1.0, power < -1000 ? 1000 : -power);
}

/* What xstedc needs at least, n^2 + 4 n + 1, and with it what the others work fast with, blocks of 64. */
static moec_status room_for(lapack_int *values, lapack_int *integers, int64_t n, moec_err *err)
{
    if (n > MOST_ROWS)
        return moec_fail(err, MOEC_ENOMEM, "eigenvalues: a matrix of %lld rows is too large, %d are possible", (long long)n, MOST_ROWS);
    *values = (lapack_int)(n * n + 68 * n + 8192);
    *integers = (lapack_int)(5 * n + 3);
    return MOEC_OK;
}

static moec_status check(const char *name, lapack_int info, moec_err *err)
{
    return info == 0 ? MOEC_OK : moec_fail(err, MOEC_ENUMERIC, "eigenvalues: LAPACK's %s did not converge (%d)", name, (int)info);
}

moec_status moec_eigen(double *values, double *vectors, double *a, int64_t n, int64_t r, moec_eigen_end end, moec_err *err)
{
    moec_status st = MOEC_OK;
    double *d = NULL, *all = NULL, *work = NULL, *e, *tau, *part;
    lapack_int *iwork = NULL, room = 0, iroom = 0;
    const lapack_int N = dimension(n), R = dimension(r);
    double most = 0.0;
    moec_linalg_init();
    if (r == 0)
        return MOEC_OK;
    MOEC_TRY(room_for(&room, &iroom, n, err));
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j <= i; j++) {
            if (!isfinite(a[i * n + j]))
                return not_finite(i, j, err);
            most = fmax(most, fabs(a[i * n + j]));
        }
    const double scale = scale_of(most);
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j <= i; j++)
            a[i * n + j] *= scale;
    MOEC_TRY(MOEC_NEW(d, 3 * (size_t)n, err));
    MOEC_TRY(MOEC_NEW(all, (size_t)n * (size_t)n, err));
    MOEC_TRY(MOEC_NEW(work, (size_t)room, err));
    MOEC_TRY(MOEC_NEW(iwork, (size_t)iroom, err));
    e = d + n;
    tau = e + n;
    part = all + (end == MOEC_EIGEN_LARGEST ? (n - r) * n : 0);
    MOEC_TRY(check("dsytrd", LAPACKE_dsytrd_work(LAPACK_COL_MAJOR, 'U', N, a, N, d, e, tau, work, room), err));
    MOEC_TRY(check("dstedc", LAPACKE_dstedc_work(LAPACK_COL_MAJOR, 'I', N, d, e, all, N, work, room, iwork, iroom), err));
    MOEC_TRY(check("dormtr", LAPACKE_dormtr_work(LAPACK_COL_MAJOR, 'L', 'U', 'N', N, R, a, N, tau, part, N, work, room), err));
    for (int64_t i = 0; i < r; i++) {
        const int64_t from = place_of(i, n, end);
        if (values)
            values[i] = d[from] / scale;
        memcpy(vectors + i * n, all + from * n, (size_t)n * sizeof *vectors);
        fix_sign(vectors + i * n, n);
    }
done:
    moec_free(iwork);
    moec_free(work);
    moec_free(all);
    moec_free(d);
    return st;
}

moec_status moec_eigenspace(float *basis, float *a, int64_t n, int64_t r, moec_eigen_end end, moec_err *err)
{
    moec_status st = MOEC_OK;
    float *d = NULL, *all = NULL, *work = NULL, *e, *tau, *part;
    lapack_int *iwork = NULL, room = 0, iroom = 0;
    const lapack_int N = dimension(n), R = dimension(r);
    double most = 0.0;
    moec_linalg_init();
    if (r == 0)
        return MOEC_OK;
    MOEC_TRY(room_for(&room, &iroom, n, err));
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j <= i; j++) {
            if (!isfinite(a[i * n + j]))
                return not_finite(i, j, err);
            most = fmax(most, fabs((double)a[i * n + j]));
        }
    const float scale = (float)scale_of(fmax(most, 0x1p-120));
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j <= i; j++)
            a[i * n + j] *= scale;
    MOEC_TRY(MOEC_NEW(d, 3 * (size_t)n, err));
    MOEC_TRY(MOEC_NEW(all, (size_t)n * (size_t)n, err));
    MOEC_TRY(MOEC_NEW(work, (size_t)room, err));
    MOEC_TRY(MOEC_NEW(iwork, (size_t)iroom, err));
    e = d + n;
    tau = e + n;
    part = all + (end == MOEC_EIGEN_LARGEST ? (n - r) * n : 0);
    MOEC_TRY(check("ssytrd", LAPACKE_ssytrd_work(LAPACK_COL_MAJOR, 'U', N, a, N, d, e, tau, work, room), err));
    MOEC_TRY(check("sstedc", LAPACKE_sstedc_work(LAPACK_COL_MAJOR, 'I', N, d, e, all, N, work, room, iwork, iroom), err));
    MOEC_TRY(check("sormtr", LAPACKE_sormtr_work(LAPACK_COL_MAJOR, 'L', 'U', 'N', N, R, a, N, tau, part, N, work, room), err));
    for (int64_t i = 0; i < r; i++)
        memcpy(basis + i * n, all + place_of(i, n, end) * n, (size_t)n * sizeof *basis);
done:
    moec_free(iwork);
    moec_free(work);
    moec_free(all);
    moec_free(d);
    return st;
}
