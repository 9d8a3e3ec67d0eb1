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

/* Multiplied back; rows of the triangle lie apart, and what is not of it is not looked at. */
static void unit_triangles_solve(void **state)
{
    enum { N = 37, LDA = 41, ROWS = 3 };
    float a[N * LDA], b[ROWS * N], x[ROWS * N];
    (void)state;
    for (int i = 0; i < N; i++)
        for (int j = 0; j < LDA; j++)
            a[i * LDA + j] = j > i && j < N ? 0.2f * repair_normal() : NAN;
    for (int i = 0; i < ROWS * N; i++)
        b[i] = repair_normal();
    for (int trans = 0; trans < 2; trans++) {
        memcpy(x, b, sizeof x);
        moec_strsm_unit(x, trans, a, LDA, N, ROWS);
        for (int r = 0; r < ROWS; r++)
            for (int j = 0; j < N; j++) {
                double sum = (double)x[r * N + j];
                for (int i = 0; i < N; i++)
                    if (trans ? i > j : i < j)
                        sum += (double)x[r * N + i] * (double)a[trans ? j * LDA + i : i * LDA + j];
                assert_true(fabs(sum - (double)b[r * N + j]) < 1e-4);
            }
    }
    moec_strsm_unit(x, false, a, LDA, 0, ROWS);
    moec_strsm_unit(x, false, a, LDA, N, 0);
}

enum { MOST = 70 };

static double dot(const double *a, int64_t step_a, const double *b, int64_t step_b, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += a[i * step_a] * b[i * step_b];
    return sum;
}

/* q r is the matrix, columns of q are orthonormal, r is a triangle; of a matrix of too few independent columns, too. */
static void qr_is_taken(void **state)
{
    static const struct {
        int64_t m, n;
    } size[] = {{1, 1}, {3, 3}, {9, 4}, {MOST, 1}, {MOST, MOST - 3}, {5, 0}};
    double a[MOST * MOST], q[MOST * MOST], r[MOST * MOST];
    (void)state;
    for (size_t k = 0; k < MOEC_COUNT(size); k++)
        for (int poor = 0; poor < 2; poor++) {
            const int64_t m = size[k].m, n = size[k].n;
            for (int64_t i = 0; i < m * n; i++)
                q[i] = a[i] = poor && i % n > 0 ? a[i - 1] : (double)repair_normal();
            assert_int_equal(moec_qr(r, q, m, n, NULL), MOEC_OK);
            for (int64_t i = 0; i < n; i++)
                for (int64_t j = 0; j < n; j++) {
                    assert_true(fabs(dot(q + i, n, q + j, n, m) - (i == j)) < 1e-13);
                    assert_true(i <= j || r[i * n + j] == 0.0);
                }
            for (int64_t i = 0; i < m; i++)
                for (int64_t j = 0; j < n; j++)
                    assert_true(fabs(dot(q + i * n, 1, r + j, n, n) - a[i * n + j]) < 1e-12);
        }
}

/* a = sum i q_i q_i^T, q_i orthonormal: who has r of the ends is known, whatever the size of a. */
static void spaces_are_found(void **state)
{
    static const int64_t sizes[] = {1, 2, 7, MOST};
    static const float scales[] = {1.0f, 1e30f, 1e-35f};
    double q[MOST * MOST], tri[MOST * MOST];
    float a[MOST * MOST], lost[MOST * MOST], basis[MOST * MOST];
    moec_err err = {MOEC_OK, ""};
    (void)state;
    for (size_t k = 0; k < MOEC_COUNT(sizes); k++) {
        const int64_t n = sizes[k];
        for (int64_t i = 0; i < n * n; i++)
            q[i] = (double)repair_normal();
        assert_int_equal(moec_qr(tri, q, n, n, NULL), MOEC_OK);
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < n; j++) {
                double sum = 0;
                for (int64_t v = 0; v < n; v++)
                    sum += (double)(v + 1) * q[i * n + v] * q[j * n + v];
                a[i * n + j] = j > i ? NAN : (float)sum; /* not read */
            }
        for (int64_t r = 0; r <= n; r += n > 10 ? 23 : 1)
            for (int way = 0; way < 6; way++) {
                const moec_eigen_end end = way % 2 ? MOEC_EIGEN_SMALLEST : MOEC_EIGEN_LARGEST;
                for (int64_t i = 0; i < n * n; i++)
                    lost[i] = a[i] * scales[way / 2];
                assert_int_equal(moec_eigenspace(basis, lost, n, r, end, NULL), MOEC_OK);
                for (int64_t v = 0; v < n; v++) { /* how much of q_v lies in it */
                    double inside = 0;
                    for (int64_t b = 0; b < r; b++) {
                        double part = 0;
                        for (int64_t i = 0; i < n; i++)
                            part += q[i * n + v] * (double)basis[b * n + i];
                        inside += part * part;
                    }
                    assert_true(fabs(inside - (end == MOEC_EIGEN_LARGEST ? v >= n - r : v < r)) < 1e-5);
                }
                for (int64_t i = 0; r > 0 && i < n * n; i++)
                    assert_true(i % n <= i / n || isnan(lost[i]));
            }
    }
    memset(a, 0, sizeof a); /* any space */
    assert_int_equal(moec_eigenspace(basis, a, 2, 1, MOEC_EIGEN_LARGEST, NULL), MOEC_OK);
    assert_true(fabsf(basis[0] * basis[0] + basis[1] * basis[1] - 1.0f) < 1e-6f);
    a[2] = INFINITY;
    assert_int_equal(moec_eigenspace(basis, a, 2, 1, MOEC_EIGEN_LARGEST, &err), MOEC_ENUMERIC);
    assert_non_null(strstr(err.text, "not finite at 1, 0"));
    assert_int_equal(moec_eigenspace(basis, a, 50000, 1, MOEC_EIGEN_LARGEST, NULL), MOEC_ENOMEM);
}

static void upper_factor_is_the_lower_one_turned(void **state)
{
    enum { N = 40, LDA = 43 };
    double a[N * LDA], l[N * N];
    (void)state;
    for (int i = 0; i < N; i++)
        for (int j = 0; j < LDA; j++)
            a[i * LDA + j] = j < i || j >= N ? (double)NAN : 1.0 / (1.0 + j - i) + (i == j ? 2.0 : 0.0);
    for (int i = 0; i < N; i++)
        for (int j = 0; j <= i; j++)
            l[i * N + j] = a[j * LDA + i];
    assert_true(moec_cholesky(l, N) && moec_cholesky_upper(a, N, LDA));
    for (int i = 0; i < N; i++)
        for (int j = 0; j < LDA; j++)
            assert_true(j < i || j >= N ? isnan(a[i * LDA + j]) : fabs(a[i * LDA + j] - l[j * N + i]) < 1e-14);
    a[N - 1] = NAN;
    assert_false(moec_cholesky_upper(a, N, LDA));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(weights_are_written),
        cmocka_unit_test(cholesky_solves),
        cmocka_unit_test(unit_triangles_solve),
        cmocka_unit_test(qr_is_taken),
        cmocka_unit_test(spaces_are_found),
        cmocka_unit_test(upper_factor_is_the_lower_one_turned),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
