/* Writing weights and solving with them: what repair and merging stand on. */
#include "repair_layer.h"
#include "num/linalg.h"

#include <limits.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

/* Written values are read again, wherever they lie; what a tensor cannot hold is refused by name. */
static void weights_are_written(void **state)
{
    static const moec_dtype type[] = {MOEC_F32, MOEC_BF16, MOEC_F16};
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(type); i++) {
        uint32_t store[35 * 2];
        float in[3 * 5], out[3 * 5];
        moec_err err = {MOEC_OK, ""};
        const float huge = 70000.0f, inf = INFINITY;
        memset(store, 0, sizeof store);
        moec_tensor t = {.name = "t", .dtype = type[i], .rank = 1, .dim = {35}, .data = store,
                         .bytes = (size_t)(35 * moec_dtypes[type[i]].bytes)};
        const moec_weight w = repair_view(&t, 2, 4, 6, 1, 5); /* turned */
        for (int k = 0; k < 15; k++)
            in[k] = (float)(k - 7) / 8.0f;
        assert_int_equal(moec_weight_write(&w, in, 5, 1, 3, 1, 5, &err), MOEC_OK);
        moec_weight_read(out, 5, &w, 1, 3, 1, 5);
        assert_memory_equal(in, out, sizeof in);
        const moec_status too_large = type[i] == MOEC_F16 ? MOEC_ENUMERIC : MOEC_OK;
        assert_int_equal(moec_weight_write(&w, &huge, 1, 0, 1, 0, 1, &err), too_large);
        assert_int_equal(moec_weight_write(&w, &inf, 1, 0, 1, 0, 1, NULL), MOEC_ENUMERIC);
        moec_weight other = w;
        other.storage = MOEC_FP8;
        assert_int_equal(moec_weight_write(&other, in, 1, 0, 1, 0, 1, NULL), MOEC_EINVAL);
        t.dtype = MOEC_I32;
        assert_int_equal(moec_weight_write(&w, in, 1, 0, 1, 0, 1, NULL), MOEC_EINVAL);
    }
}

static void cholesky_solves(void **state)
{
    enum { N = 37 };
    double a[N * N], l[N * N], x[2 * N], b[2 * N];
    (void)state;
    for (int i = 0; i < N * N; i++)
        l[i] = (double)repair_normal();
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) {
            a[i * N + j] = i == j ? 0.1 : 0;
            for (int k = 0; k < N; k++)
                a[i * N + j] += l[i * N + k] * l[j * N + k];
        }
    for (int r = 0; r < 2; r++)
        for (int i = 0; i < N; i++)
            x[r * N + i] = (double)repair_normal();
    for (int r = 0; r < 2; r++)
        for (int i = 0; i < N; i++) {
            b[r * N + i] = 0;
            for (int j = 0; j < N; j++)
                b[r * N + i] += a[i * N + j] * x[r * N + j];
        }
    for (int i = 0; i < N; i++) /* what is above the diagonal is not looked at */
        for (int j = i + 1; j < N; j++)
            a[i * N + j] = (double)NAN;
    memcpy(l, a, sizeof a);
    assert_true(moec_cholesky(a, N));
    moec_cholesky_solve(b, a, N, 2);
    for (int i = 0; i < 2 * N; i++)
        assert_true(fabs(b[i] - x[i]) < 1e-8);
    memcpy(a, l, sizeof a);
    a[5 * N + 5] = -1;
    assert_false(moec_cholesky(a, N));
    l[5 * N + 3] = (double)NAN;
    assert_false(moec_cholesky(l, N));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(weights_are_written),
        cmocka_unit_test(cholesky_solves),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
