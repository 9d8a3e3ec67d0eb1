#include "num/linalg.h"

#include <assert.h>
#include <cblas.h>
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
