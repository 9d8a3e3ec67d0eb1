/* The operations of vec.h against double precision, once per instruction set that this machine has: main starts itself again
 * with MOEC_KERNEL set, since a process chooses its kernels once. */
#include "kernels.h"
#include "num/vec.h"

#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

enum { MOST = 10000 };

static const int64_t lengths[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 255, 1000, 4095, 4097, MOST};
static uint32_t seed = 2024;

static float uniform(void)
{
    seed = seed * 1664525U + 1013904223U;
    return (float)(seed >> 8) * 0x1p-23F - 1.0F;
}

/* n values at the end of an allocation, so that sanitizers see any access behind them. */
static float *values(int64_t n, float spread)
{
    float *x = malloc((size_t)n * sizeof *x);
    assert_non_null(x);
    for (int64_t i = 0; i < n; i++)
        x[i] = spread * uniform();
    return x;
}

static void close_to(double got, double want, double relative, double absolute, const char *what, int64_t n)
{
    if (fabs(got - want) <= relative * fabs(want) + absolute)
        return;
    print_error("%s, n = %lld: %.9g, expected %.9g\n", what, (long long)n, got, want);
    fail();
}

static void rms_norm_follows_its_formula(void **state)
{
    (void)state;
    for (size_t k = 0; k < MOEC_COUNT(lengths); k++) {
        int64_t n = lengths[k];
        float *x = values(n, 3.0f), *w = values(n, 2.0f), *out = values(n, 1.0f);
        double sum = 0;
        for (int64_t i = 0; i < n; i++)
            sum += (double)x[i] * (double)x[i];
        moec_rms_norm(out, x, w, n, 1e-5f);
        close_to(moec_sum_sq(x, n), sum, 1e-5, 0, "sum_sq", n);
        for (int64_t i = 0; i < n; i++)
            close_to((double)out[i], (double)x[i] * (double)w[i] / sqrt(sum / (double)n + 1e-5), 1e-5, 0, "rms_norm", n);
        moec_rms_norm(x, x, w, n, 1e-5f);
        assert_memory_equal(x, out, (size_t)n * sizeof *x);
        free(x);
        free(w);
        free(out);
    }
}

static void softmax_follows_its_formula(void **state)
{
    static const float spread[] = {0.0f, 1.0f, 20.0f, 90.0f, 1e4f};
    (void)state;
    for (size_t k = 0; k < MOEC_COUNT(lengths); k++)
        for (size_t j = 0; j < MOEC_COUNT(spread); j++) {
            int64_t n = lengths[k];
            float *x = values(n, spread[j]), *y = values(n, 1.0f);
            double top = -INFINITY, sum = 0, total = 0;
            memcpy(y, x, (size_t)n * sizeof *x);
            for (int64_t i = 0; i < n; i++)
                top = fmax(top, (double)x[i]);
            for (int64_t i = 0; i < n; i++)
                sum += exp((double)x[i] - top);
            moec_softmax(y, n);
            for (int64_t i = 0; i < n; i++) {
                /* x - max is rounded before exp, hence the limit grows with it */
                double z = (double)x[i] - top;
                close_to((double)y[i], exp(z) / sum, 1e-6 + 1.2e-7 * fabs(z) + 5e-10 * (double)n, 2e-38, "softmax", n);
                total += (double)y[i];
            }
            close_to(total, 1.0, 1e-5, 0, "sum of softmax", n);
            free(x);
            free(y);
        }
}

static void softmax_of_unusual_rows(void **state)
{
    float masked[] = {1.0f, -INFINITY, 1.0f, -INFINITY, -1e30f}, huge[] = {FLT_MAX, -FLT_MAX, FLT_MAX};
    float bad[] = {0.0f, NAN, 1.0f};
    (void)state;
    moec_softmax(masked, 5);
    close_to((double)masked[0], 0.5, 1e-6, 0, "masked", 5);
    assert_true(masked[1] == 0.0f && masked[3] == 0.0f && masked[4] == 0.0f);
    moec_softmax(huge, 3);
    close_to((double)huge[2], 0.5, 1e-6, 0, "huge", 3);
    assert_true(huge[1] == 0.0f);
    moec_softmax(bad, 3); /* a NaN must not vanish: it is looked for behind the layer */
    assert_true(bad[0] != bad[0] && bad[1] != bad[1] && bad[2] != bad[2]);
}

static double logistic(double x)
{
    return 1.0 / (1.0 + exp(-x));
}

static void sigmoid_and_silu_follow_their_formulas(void **state)
{
    static const float spread[] = {1.0f, 10.0f, 80.0f};
    (void)state;
    for (size_t k = 0; k < MOEC_COUNT(lengths); k++)
        for (size_t j = 0; j < MOEC_COUNT(spread); j++) {
            int64_t n = lengths[k];
            float *x = values(n, spread[j]), *up = values(n, 2.0f), *s = values(n, 0.0f), *g = values(n, 0.0f);
            memcpy(s, x, (size_t)n * sizeof *x);
            memcpy(g, x, (size_t)n * sizeof *x);
            moec_sigmoid(s, n);
            moec_silu_mul(g, up, n);
            for (int64_t i = 0; i < n; i++) {
                double v = (double)x[i];
                close_to((double)s[i], logistic(v), 1e-6, 1e-37, "sigmoid", n);
                close_to((double)g[i], v * logistic(v) * (double)up[i], 1e-6, 1e-35, "silu", n);
            }
            free(x);
            free(up);
            free(s);
            free(g);
        }
}

/* Three tokens one after the other, against the recurrence in float64. */
static void delta_step_follows_its_formula(void **state)
{
    static const int64_t sizes[][2] = {{1, 1}, {3, 5}, {16, 16}, {7, 33}, {128, 128}, {20, 67}};
    (void)state;
    for (size_t c = 0; c < MOEC_COUNT(sizes); c++) {
        const int64_t dk = sizes[c][0], dv = sizes[c][1];
        float *s = values(dk * dv, 1.0f);
        double *want = malloc((size_t)(dk * dv) * sizeof *want);
        assert_non_null(want);
        for (int64_t i = 0; i < dk * dv; i++)
            want[i] = (double)s[i];
        for (int t = 0; t < 3; t++) {
            float *q = values(dk, 0.3f), *k = values(dk, 0.3f), *v = values(dv, 1.0f), *out = values(dv, 1.0f);
            const float decay = 0.5f + 0.4f * uniform(), beta = 0.5f + 0.4f * uniform();
            memcpy(out, v, (size_t)dv * sizeof *v);
            moec_delta_step(s, out, q, k, dk, dv, decay, beta);
            for (int64_t j = 0; j < dv; j++) {
                double held = 0, o = 0;
                for (int64_t i = 0; i < dk; i++)
                    held += (double)decay * want[i * dv + j] * (double)k[i];
                for (int64_t i = 0; i < dk; i++) {
                    want[i * dv + j] = (double)decay * want[i * dv + j] + (double)k[i] * (double)beta * ((double)v[j] - held);
                    o += want[i * dv + j] * (double)q[i];
                }
                close_to((double)out[j], o, 1e-5, 1e-5, "delta_step", dv);
            }
            free(q), free(k), free(v), free(out);
        }
        for (int64_t i = 0; i < dk * dv; i++)
            close_to((double)s[i], want[i], 1e-5, 1e-5, "state of delta_step", dv);
        free(want);
        free(s);
    }
}

static void sigmoid_at_the_ends(void **state)
{
    float x[] = {0.0f, -0.0f, 200.0f, -200.0f, INFINITY, -INFINITY, NAN, FLT_MIN, 88.0f, -88.0f, FLT_MAX, -FLT_MAX};
    static const float want[] = {0.5f, 0.5f, 1.0f, 0.0f, 1.0f, 0.0f, NAN, 0.5f, 1.0f, 0.0f, 1.0f, 0.0f};
    float gate[] = {100.0f, -100.0f, 0.0f, NAN, INFINITY}, up[] = {2.0f, 2.0f, 2.0f, 2.0f, 2.0f};
    (void)state;
    moec_sigmoid(x, MOEC_COUNT(x));
    for (size_t i = 0; i < MOEC_COUNT(x); i++)
        assert_true(isnan(want[i]) ? x[i] != x[i] : fabsf(x[i] - want[i]) < 1e-6f);
    moec_silu_mul(gate, up, MOEC_COUNT(gate));
    assert_true(gate[0] == 200.0f && fabsf(gate[1]) < 1e-30f && gate[2] == 0.0f && gate[3] != gate[3] && gate[4] == INFINITY);
}

static void adds_and_finds_the_largest(void **state)
{
    (void)state;
    for (size_t k = 0; k < MOEC_COUNT(lengths); k++) {
        int64_t n = lengths[k];
        float *x = values(n, 5.0f), *y = values(n, 5.0f), *before = values(n, 0.0f), top = 0.0f;
        memcpy(before, y, (size_t)n * sizeof *y);
        for (int64_t i = 0; i < n; i++)
            top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
        assert_true(moec_abs_max(x, n) == top);
        moec_add(y, x, n);
        for (int64_t i = 0; i < n; i++)
            assert_true(y[i] == before[i] + x[i]);
        x[n / 2] = NAN;
        y[0] = 0.0f;
        top = moec_abs_max(x, n);
        assert_true(top == top);
        x[n - 1] = -INFINITY;
        assert_true(moec_abs_max(x, n) == INFINITY);
        free(x);
        free(y);
        free(before);
    }
    assert_true(moec_abs_max(NULL, 0) == 0.0f && moec_sum_sq(NULL, 0) == 0.0);
}

static void finds_what_is_not_finite(void **state)
{
    static const float bad[] = {NAN, -NAN, INFINITY, -INFINITY};
    (void)state;
    assert_true(moec_all_finite(NULL, 0));
    for (int64_t n = 1; n <= 70; n++) {
        float *x = values(n, FLT_MAX);
        assert_true(moec_all_finite(x, n));
        for (int64_t at = 0; at < n; at++)
            for (size_t b = 0; b < MOEC_COUNT(bad); b++) {
                float was = x[at];
                x[at] = bad[b];
                assert_false(moec_all_finite(x, n));
                x[at] = was;
            }
        free(x);
    }
}

static void panel_norms_are_per_lane(void **state)
{
    (void)state;
    for (size_t k = 0; k < MOEC_COUNT(lengths); k++) {
        int64_t n = lengths[k] < 1100 ? lengths[k] : 1100;
        float *x = values(n * 32, 2.0f), top[32];
        double sum[32];
        moec_panel_norms(sum, top, x, n);
        for (int lane = 0; lane < 32; lane++) {
            double want = 0;
            float most = 0.0f;
            for (int64_t i = 0; i < n; i++) {
                want += (double)x[i * 32 + lane] * (double)x[i * 32 + lane];
                most = fmaxf(most, fabsf(x[i * 32 + lane]));
            }
            close_to(sum[lane], want, 1e-5, 0, "panel_norms", n);
            assert_true(top[lane] == most);
        }
        free(x);
    }
}

static void path_step_is_exact(void **state)
{
    (void)state;
    for (size_t k = 0; k < MOEC_COUNT(lengths); k++) {
        const int64_t n = lengths[k], blocks = (n + MOEC_PATH_BLOCK - 1) / MOEC_PATH_BLOCK;
        float *p = values(n, 2.0f);
        double *d = malloc((size_t)n * sizeof *d), *v = malloc((size_t)n * sizeof *v), *low = malloc((size_t)blocks * sizeof *low);
        double *want = malloc((size_t)n * sizeof *want);
        int64_t *before = malloc((size_t)n * sizeof *before), *from = malloc((size_t)n * sizeof *from);
        for (int64_t j = 0; j < n; j++) {
            v[j] = j % 5 == 1 ? -(double)INFINITY : (double)uniform() - 1.0;
            d[j] = j % 5 < 2 ? (double)INFINITY : j % 5 == 2 ? 0.75 - (double)p[j] - v[j] : (double)uniform() + 1.0;
            before[j] = from[j] = j;
            const double h = 0.75 - (double)p[j] - v[j]; /* no less than d where j % 5 is 2 */
            want[j] = h < d[j] ? h : d[j];
            from[j] = h < d[j] ? 12345 : from[j];
        }
        moec_path_step(low, d, before, v, p, n, 0.75, 12345);
        assert_memory_equal(d, want, (size_t)n * sizeof *d);
        assert_memory_equal(before, from, (size_t)n * sizeof *before);
        for (int64_t b = 0; b < blocks; b++) {
            double least = (double)INFINITY;
            for (int64_t j = b * MOEC_PATH_BLOCK; j < n && j < (b + 1) * MOEC_PATH_BLOCK; j++)
                least = fmin(least, d[j]);
            assert_true(low[b] == least);
        }
        free(p);
        free(d);
        free(v);
        free(low);
        free(want);
        free(before);
        free(from);
    }
}

static void orders_are_descending_with_the_lowest_first(void **state)
{
    (void)state;
    for (int64_t n = 1; n <= MOEC_ORDER_MOST; n++)
        for (int levels = 1; levels <= 64; levels *= 2) { /* few levels: many ties */
            float *v = values(n, (float)levels);
            int32_t got[MOEC_ORDER_MOST], seen[MOEC_ORDER_MOST] = {0};
            for (int64_t i = 0; i < n; i++)
                v[i] = floorf(v[i]);
            moec_order(got, v, n);
            for (int64_t i = 0; i < n; i++) {
                assert_in_range(got[i], 0, n - 1);
                assert_int_equal(seen[got[i]]++, 0);
                if (i > 0)
                    assert_true(v[got[i - 1]] > v[got[i]] || (v[got[i - 1]] == v[got[i]] && got[i - 1] < got[i]));
            }
            v[n / 2] = NAN;
            moec_order(got, v, n);
            for (int64_t i = 0; i < n; i++)
                assert_in_range(got[i], 0, n - 1);
            free(v);
        }
    float zeros[] = {0.0f, -0.0f, 0.0f, INFINITY, -INFINITY};
    int32_t got[5];
    static const int32_t want[] = {3, 0, 1, 2, 4};
    moec_order(got, zeros, 5);
    assert_memory_equal(got, want, sizeof want);
}

static void products_follow_their_formulas(void **state)
{
    (void)state;
    for (size_t k = 0; k < MOEC_COUNT(lengths); k++) {
        int64_t n = lengths[k];
        float *h = values(n, 3.0f), *r = values(n, 1e-3f), *x = values(n, 1.0f);
        double got[4], want[4] = {0}, size = 0;
        for (int64_t i = 0; i < n; i++) {
            want[0] += (double)h[i] * (double)h[i];
            want[1] += (double)h[i] * (double)r[i];
            want[2] += (double)r[i] * (double)r[i];
            want[3] += (double)x[i] * (double)x[i];
            size += fabs((double)h[i] * (double)r[i]);
        }
        moec_products(got, h, r, x, n);
        for (int i = 0; i < 4; i++)
            close_to(got[i], want[i], 1e-13, i == 1 ? 1e-13 * size : 0, "products", n);
        free(h);
        free(r);
        free(x);
    }
}

/* Blocks of unequal size against one pass in double precision, with a second model and ties for the largest. */
static void lse_of_blocks(float spread, int64_t rows, int64_t block)
{
    float *z = values(rows * 32, spread), *other = values(rows * 32, spread);
    for (int lane = 0; lane < 32; lane += 5) /* two ids share the maximum: the lower one counts */
        z[(rows - 1) * 32 + lane] = z[rows / 3 * 32 + lane] = 2.0f * spread + 1.0f;
    moec_lse s;
    moec_lse_start(&s);
    for (int64_t at = 0; at < rows; at += block)
        moec_lse_add(&s, z + at * 32, other + at * 32, rows - at < block ? rows - at : block, (int32_t)at);
    for (int lane = 0; lane < 32; lane++) {
        double top = -INFINITY, sum = 0, cross = 0;
        int64_t id = 0;
        for (int64_t r = 0; r < rows; r++)
            if ((double)z[r * 32 + lane] > top) {
                top = (double)z[r * 32 + lane];
                id = r;
            }
        for (int64_t r = 0; r < rows; r++) {
            double v = (double)z[r * 32 + lane], e = exp(v - top);
            sum += e;
            cross += e * (v - (double)other[r * 32 + lane]);
        }
        close_to(s.max[lane] + log(s.sum[lane]), top + log(sum), 1e-6, 1e-6, "lse", rows);
        close_to(s.cross[lane] / s.sum[lane], cross / sum, 1e-5, 1e-5 * (1.0 + (double)spread), "lse cross", rows);
        assert_true((double)s.top[lane] == top);
        assert_int_equal(s.top_id[lane], id);
    }
    free(z);
    free(other);
}

static void lse_follows_its_formula(void **state)
{
    static const float spread[] = {0.5f, 10.0f, 300.0f};
    static const int64_t rows[] = {1, 2, 63, 64, 65, 1000, 4097}, block[] = {1, 7, 64, 1024};
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(spread); i++)
        for (size_t j = 0; j < MOEC_COUNT(rows); j++)
            for (size_t k = 0; k < MOEC_COUNT(block); k++)
                lse_of_blocks(spread[i], rows[j], block[k]);
}

static void lse_survives_minus_infinity(void **state)
{
    float z[3 * 32];
    moec_lse s;
    (void)state;
    for (int i = 0; i < 32; i++) {
        z[i] = -INFINITY;
        z[32 + i] = 4.0f;
        z[64 + i] = -INFINITY;
    }
    moec_lse_start(&s);
    for (int32_t r = 0; r < 3; r++)
        moec_lse_add(&s, z + r * 32, NULL, 1, r);
    for (int i = 0; i < 32; i++) {
        close_to(s.max[i] + log(s.sum[i]), 4.0, 1e-6, 0, "lse", 3);
        assert_int_equal(s.top_id[i], 1);
    }
}

/* The activations in float64, and their slopes by differences. */
static double silu_of(double g, double u)
{
    return g / (1 + exp(-g)) * u;
}

static double clamped_of(double g, double u)
{
    g = fmin(g, 1.5);
    return (fmax(fmin(u, 1.5), -1.5) + 1) * g / (1 + exp(-1.702 * g));
}

static void activations_have_slopes(void **state)
{
    (void)state;
    for (size_t k = 0; k < 2 * MOEC_COUNT(lengths); k++) {
        double (*of)(double, double) = k % 2 ? clamped_of : silu_of;
        const int64_t n = lengths[k / 2];
        float *g = values(n, 3.0f), *u = values(n, 3.0f), *grad = values(n, 2.0f), *dg = values(n, 1.0f), *du = values(n, 1.0f);
        memcpy(dg, g, (size_t)n * sizeof *g);
        memcpy(du, u, (size_t)n * sizeof *u);
        if (k % 2)
            moec_swiglu_clamped_grad(dg, du, grad, n, 1.5f, 1.702f);
        else
            moec_silu_mul_grad(dg, du, grad, n);
        for (int64_t i = 0; i < n; i++) {
            const double a = (double)g[i], b = (double)u[i], h = 1e-6, out = (double)grad[i];
            const bool corner = k % 2 && (fabs(a - 1.5) < 1e-4 || fabs(fabs(b) - 1.5) < 1e-4);
            if (corner)
                continue;
            close_to((double)dg[i], out * (of(a + h, b) - of(a - h, b)) / (2 * h), 1e-5, 1e-5, "of gate", n);
            close_to((double)du[i], out * (of(a, b + h) - of(a, b - h)) / (2 * h), 1e-5, 1e-5, "of up", n);
        }
        free(g);
        free(u);
        free(grad);
        free(dg);
        free(du);
    }
}

static void adam_follows_its_formula(void **state)
{
    const moec_adam_factors f = {.keep1 = 0.9f, .keep2 = 0.98f, .fix1 = 3.0f, .fix2 = 7.0f, .rate = 0.01f, .eps = 1e-12f};
    (void)state;
    for (size_t k = 0; k < MOEC_COUNT(lengths); k++) {
        const int64_t n = lengths[k];
        float *w = values(n, 1.0f), *m = values(n, 0.1f), *v = values(n, 0.1f), *g = values(n, 0.5f), *old[3];
        for (int i = 0; i < 3; i++)
            old[i] = values(n, 1.0f);
        for (int64_t i = 0; i < n; i++) {
            old[0][i] = w[i];
            old[1][i] = m[i];
            old[2][i] = v[i] = fabsf(v[i]) + 1e-3f;
        }
        moec_adam(w, m, v, g, n, &f);
        for (int64_t i = 0; i < n; i++) {
            const double grad = (double)g[i], mean = 0.9 * (double)old[1][i] + 0.1 * grad;
            const double square = 0.98 * (double)old[2][i] + 0.02 * grad * grad;
            close_to((double)m[i], mean, 1e-5, 1e-6, "mean", n);
            close_to((double)v[i], square, 1e-5, 1e-6, "square", n);
            close_to((double)w[i], (double)old[0][i] - 0.01 * 3 * mean / sqrt(7 * square), 1e-5, 1e-6, "value", n);
        }
        free(w);
        free(m);
        free(v);
        free(g);
        for (int i = 0; i < 3; i++)
            free(old[i]);
    }
}

static int run_all(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rms_norm_follows_its_formula),
        cmocka_unit_test(softmax_follows_its_formula),
        cmocka_unit_test(softmax_of_unusual_rows),
        cmocka_unit_test(sigmoid_and_silu_follow_their_formulas),
        cmocka_unit_test(activations_have_slopes),
        cmocka_unit_test(adam_follows_its_formula),
        cmocka_unit_test(delta_step_follows_its_formula),
        cmocka_unit_test(sigmoid_at_the_ends),
        cmocka_unit_test(adds_and_finds_the_largest),
        cmocka_unit_test(finds_what_is_not_finite),
        cmocka_unit_test(panel_norms_are_per_lane),
        cmocka_unit_test(orders_are_descending_with_the_lowest_first),
        cmocka_unit_test(path_step_is_exact),
        cmocka_unit_test(products_follow_their_formulas),
        cmocka_unit_test(lse_follows_its_formula),
        cmocka_unit_test(lse_survives_minus_infinity),
    };
    return cmocka_run_group_tests_name(getenv("MOEC_KERNEL"), tests, NULL, NULL);
}

int main(int argc, char **argv)
{
    (void)argc;
    return every_kernel(argv, run_all);
}
