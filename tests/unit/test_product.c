/* Every test runs once per instruction set that this machine has (kernels.h), against sums in float64. */
#include "kernels.h"
#include "num/product.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { M = 130, N = 301, K = 1100, LD = K + 5 }; /* beyond a strip, eight panels and what a weight block of the kernels holds */

static uint32_t seed = 12345;
static float a[LD * LD], b[LD * LD], c[M * (N + 3)], was[M * (N + 3)];
static double right[K * N];

static void fill(float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        seed = seed * 1664525U + 1013904223U;
        x[i] = (float)(seed >> 8) * 0x1p-23F - 1.0F;
    }
}

/* What the mode makes of x; the generic kernel is not used here, but OpenBLAS in float32. */
static double rounded(float x, moec_compute mode)
{
    const uint16_t near = moec_to_bf16(x);
    if (mode == MOEC_COMPUTE_BF16 && strcmp(getenv("MOEC_KERNEL"), "generic") != 0)
        moec_dtypes[MOEC_BF16].to_f32(&x, &near, 1);
    return (double)x;
}

/* rows x cols of x, in memory that ends with the last of them: a sanitizer sees what is read beyond. */
static float *exactly(const float *x, int64_t rows, int64_t cols)
{
    const size_t n = rows > 0 && cols > 0 ? (size_t)((rows - 1) * LD + cols) : 0;
    float *copy = malloc((n > 0 ? n : 1) * sizeof *copy);
    assert_non_null(copy);
    memcpy(copy, x, n * sizeof *copy);
    return copy;
}

static void compare(moec_compute mode, bool transa, bool transb, int64_t m, int64_t n, int64_t k, bool add)
{
    const int64_t ldc = N + 3;
    float *left_side = transa ? exactly(a, k, m) : exactly(a, m, k), *right_side = transb ? exactly(b, n, k) : exactly(b, k, n);
    fill(c, M * ldc);
    memcpy(was, c, sizeof c);
    moec_product(mode, transa, transb, m, n, k, left_side, LD, right_side, LD, add, c, ldc);
    free(left_side);
    free(right_side);
    for (int64_t p = 0; p < k; p++)
        for (int64_t j = 0; j < n; j++)
            right[p * N + j] = rounded(b[transb ? j * LD + p : p * LD + j], mode);
    for (int64_t i = 0; i < M; i++) {
        double want[N + 3], size[N + 3];
        for (int64_t j = 0; j < ldc; j++)
            size[j] = fabs(want[j] = add || i >= m || j >= n ? (double)was[i * ldc + j] : 0.0);
        for (int64_t p = 0; i < m && p < k; p++) {
            const double left = rounded(a[transa ? p * LD + i : i * LD + p], mode);
            for (int64_t j = 0; j < n; j++) {
                want[j] += left * right[p * N + j];
                size[j] += fabs(left * right[p * N + j]);
            }
        }
        for (int64_t j = 0; j < ldc; j++)
            if (!(fabs((double)c[i * ldc + j] - want[j]) <= (i < m && j < n ? 4e-6 * size[j] : 0.0)))
                fail_msg("[%d,%d] of %d x %d x %d, transposed %d %d: %.9g, wanted %.9g", (int)i, (int)j, (int)m, (int)n, (int)k, transa, transb,
                         (double)c[i * ldc + j], want[j]);
    }
}

static void every_form(void **state)
{
    static const int64_t size[][3] = {{1, 1, 1},   {12, 32, 64},  {M, N, 7},    {5, 33, 130}, {49, 16, 513}, {13, 17, 65},
                                      {48, 256, 2}, {60, 288, 1024}, {25, 31, K}, {3, 257, 1025}};
    (void)state;
    fill(a, LD * LD);
    fill(b, LD * LD);
    for (size_t s = 0; s < sizeof size / sizeof *size; s++)
        for (int form = 0; form < 16; form++)
            compare(form & 1 ? MOEC_COMPUTE_BF16 : MOEC_COMPUTE_F32, form & 2, form & 4, size[s][0], size[s][1], size[s][2], form & 8);
    for (int form = 0; form < 4; form++) {
        compare(MOEC_COMPUTE_BF16, form & 1, form & 2, 0, 9, 9, false);
        compare(MOEC_COMPUTE_BF16, form & 1, form & 2, 9, 0, 9, false);
        compare(MOEC_COMPUTE_F32, form & 1, form & 2, 9, 9, 0, form & 1);
    }
}

/* Neither padding nor neighbours take over what is not finite. */
static void infinite_values_stay_where_they_are(void **state)
{
    enum { ROWS = 13, COLS = 17, DEPTH = 33 };
    static const float bad[] = {INFINITY, NAN};
    (void)state;
    for (int form = 0; form < 16; form++) {
        const bool transa = form & 2, transb = form & 4;
        const int row = form % ROWS, col = form % COLS, at = DEPTH - 1;
        fill(a, LD * LD);
        fill(b, LD * LD);
        a[transa ? at * LD + row : row * LD + at] = bad[form >> 3];
        b[transb ? col * LD + at : at * LD + col] = bad[form >> 3];
        moec_product(form & 1 ? MOEC_COMPUTE_BF16 : MOEC_COMPUTE_F32, transa, transb, ROWS, COLS, DEPTH, a, LD, b, LD, false, c, COLS);
        for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < COLS; j++)
                assert_true(isfinite(c[i * COLS + j]) == (i != row && j != col));
    }
}

/* More columns than a block and more rows than are summed in float32. */
static void gram_sums(void **state)
{
    enum { COLS = 300, ROWS = 700 };
    static double g[COLS * COLS], x[COLS * ROWS];
    (void)state;
    fill(a, LD * LD);
    for (int round = 0; round < 6; round++) {
        const moec_compute mode = round < 3 ? MOEC_COMPUTE_F32 : MOEC_COMPUTE_BF16;
        const double beta = round % 3 == 0 ? 0.0 : 0.5;
        const int rows = round % 3 == 2 ? 0 : ROWS;
        for (int i = 0; i < COLS * COLS; i++)
            g[i] = round % 3 == 0 || i % COLS > i / COLS ? (double)NAN : 8.0;
        float *exact = exactly(a, rows, COLS);
        moec_gram(g, COLS, exact, LD, rows, beta, mode);
        free(exact);
        for (int k = 0; k < rows; k++)
            for (int i = 0; i < COLS; i++)
                x[i * ROWS + k] = rounded(a[k * LD + i], mode);
        for (int i = 0; i < COLS; i++)
            for (int j = 0; j < COLS; j++) {
                double want = beta * 8.0, size = fabs(want);
                for (int k = 0; k < rows && j <= i; k++) {
                    want += x[i * ROWS + k] * x[j * ROWS + k];
                    size += fabs(x[i * ROWS + k] * x[j * ROWS + k]);
                }
                assert_true(j > i ? isnan(g[i * COLS + j]) : fabs(g[i * COLS + j] - want) <= 2e-6 * size);
            }
    }
}

static int run_all(void)
{
    const char *limit = getenv("MOEC_KERNEL");
    const struct CMUnitTest tests[] = {cmocka_unit_test(every_form), cmocka_unit_test(infinite_values_stay_where_they_are),
                                       cmocka_unit_test(gram_sums)};
    return cmocka_run_group_tests_name(limit, tests, NULL, NULL);
}

int main(int argc, char **argv)
{
    (void)argc;
    return every_kernel(argv, run_all);
}
