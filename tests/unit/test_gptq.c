/* GPTQ: what it does by hand, at its borders, and that its descent ends in a minimum. tests/interop/test_gptq.py compares numbers. */
#include "base/mem.h"
#include "base/par.h"
#include "base/random.h"
#include "method/gptq.h"

#include <limits.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static uint64_t seed = 1;

static float normal(void)
{
    const double u = ((double)(moec_mix64(seed++) >> 11) + 0.5) * 0x1p-53, v = (double)(moec_mix64(seed++) >> 11) * 0x1p-53;
    return (float)(sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v));
}

static void fill(float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = normal();
}

/* h = x^T x of `tokens` random rows with columns that go together. */
static void hessian(double *h, int64_t n, int64_t tokens)
{
    memset(h, 0, (size_t)(n * n) * sizeof *h);
    double *x = calloc((size_t)n, sizeof *x);
    assert_non_null(x);
    for (int64_t t = 0; t < tokens; t++) {
        double before = 0.0;
        for (int64_t i = 0; i < n; i++) {
            x[i] = (double)normal() + 0.8 * before;
            before = x[i];
        }
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < n; j++)
                h[i * n + j] += x[i] * x[j];
    }
    free(x);
}

static moec_qcodes ranged(const moec_qgrid *g, const float *w, int64_t rows, int64_t cols)
{
    moec_qcodes c;
    assert_int_equal(moec_qcodes_new(&c, g, rows, cols, NULL), MOEC_OK);
    assert_int_equal(moec_quant_range(&c, w, MOEC_QRANGE_CLIP, NULL, 0, rows, NULL), MOEC_OK);
    return c;
}

static moec_compute compute = MOEC_COMPUTE_F32;

/* Runs a test with products in bfloat16. */
static void in_bf16(void (*test)(void **state))
{
    compute = MOEC_COMPUTE_BF16;
    test(NULL);
    compute = MOEC_COMPUTE_F32;
}

static moec_gptq *factored(const double *h, int64_t n, double damp, bool order, int sweeps)
{
    const moec_gptq_opts o = {damp, order, sweeps, compute};
    moec_gptq *g;
    assert_int_equal(moec_gptq_new(&g, h, n, &o, NULL), MOEC_OK);
    return g;
}

/* H = [[2, 1], [1, 1]]: A = [[1, 1], [0, 1]], so column 1 takes over the whole error of column 0, and with the order turned round half
 * of that of column 1. s = 1, u - z whole. */
static void two_columns_by_hand(void **state)
{
    static const double h[] = {2, NAN, 1, 1};
    const moec_qgrid grid = {4, 2, false, MOEC_F32};
    const float w[] = {0.4f, 0.3f};
    double loss, nearest;
    moec_qcodes c;
    (void)state;
    assert_int_equal(moec_qcodes_new(&c, &grid, 1, 2, NULL), MOEC_OK);
    c.scale[0] = 1.0f;
    moec_gptq *g = factored(h, 2, 0.0, false, 0);
    assert_true(moec_gptq_importance(g)[0] == 2.0f && moec_gptq_importance(g)[1] == 1.0f);
    assert_int_equal(moec_gptq_round(&c, &loss, &nearest, g, w, NULL), MOEC_OK);
    assert_true(c.code[0] == 8 && c.code[1] == 9); /* 0.4 -> 0, 0.3 + 0.4 -> 1 */
    assert_true(fabs(nearest - (2 * 0.16 + 2 * 0.12 + 0.09)) < 1e-6);
    assert_true(fabs(loss - (2 * 0.16 - 2 * 0.28 + 0.49)) < 1e-6);
    moec_gptq_free(g);
    c.code[0] = c.code[1] = 0;
    g = factored(h, 2, 0.0, true, 0); /* column 0 has the larger diagonal: the same order */
    assert_int_equal(moec_gptq_round(&c, &loss, &nearest, g, w, NULL), MOEC_OK);
    assert_true(c.code[0] == 8 && c.code[1] == 9);
    moec_gptq_free(g);
    static const double turned[] = {1, 0, 1, 2};
    g = factored(turned, 2, 0.0, true, 0); /* column 1 first: 0.3 -> 0, then 0.4 + 0.3 -> 1 */
    assert_int_equal(moec_gptq_round(&c, &loss, &nearest, g, w, NULL), MOEC_OK);
    assert_true(c.code[0] == 9 && c.code[1] == 8);
    assert_true(fabs(loss - (0.36 - 2 * 0.18 + 2 * 0.09)) < 1e-6);
    moec_gptq_free(g);
    moec_qcodes_release(&c);
}

/* Where H says nothing of a column, or nothing at all, or is no Hessian, there is rounding to nearest. */
static void without_tokens_nearest(void **state)
{
    enum { N = 8, ROWS = 3 };
    const moec_qgrid grid = {2, 4, false, MOEC_F16};
    float w[ROWS * N];
    double h[N * N] = {0}, loss, nearest;
    (void)state;
    fill(w, ROWS * N);
    moec_qcodes c = ranged(&grid, w, ROWS, N), plain = ranged(&grid, w, ROWS, N);
    moec_quant_nearest(&plain, w, 0, ROWS);
    for (int kind = 0; kind < 4; kind++) { /* 0; the identity; indefinite; negative */
        for (int i = 0; i < N; i++)
            h[i * N + i] = kind == 0 ? 0.0 : kind == 3 ? -1.0 : 1.0;
        h[1 * N] = kind == 2 ? 1e9 : 0.0;
        moec_gptq *g = factored(h, N, 0.01, true, 2);
        assert_int_equal(moec_gptq_round(&c, &loss, &nearest, g, w, NULL), MOEC_OK);
        if (kind != 1)
            assert_memory_equal(c.code, plain.code, ROWS * N);
        if (kind == 0)
            assert_true(loss == 0.0 && nearest == 0.0);
        assert_true(loss <= nearest);
        moec_gptq_free(g);
        moec_qcodes_release(&c);
        c = ranged(&grid, w, ROWS, N);
    }
    memset(h, 0, sizeof h); /* columns that no token reached among others */
    hessian(h, N, 50);
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++)
            if (i >= 4 || j >= 4)
                h[i * N + j] = 0.0;
    moec_gptq *g = factored(h, N, 0.01, true, 0);
    assert_int_equal(moec_gptq_round(&c, &loss, &nearest, g, w, NULL), MOEC_OK);
    for (int r = 0; r < ROWS; r++)
        assert_memory_equal(c.code + r * N + 4, plain.code + r * N + 4, 4);
    moec_gptq_free(g);
    moec_qcodes_release(&c);
    moec_qcodes_release(&plain);
}

/* Behind many sweeps no code of its own can be better: by trying all. And no choice of codes is better than GPTQ's by much. */
static void descent_ends_in_a_minimum(void **state)
{
    enum { N = 6, ROWS = 16 };
    const moec_qgrid grid = {2, 3, false, MOEC_F32};
    float w[ROWS * N], v[ROWS * N];
    double h[N * N], loss, nearest, sum[3] = {0};
    (void)state;
    fill(w, ROWS * N);
    hessian(h, N, 40);
    moec_qcodes c = ranged(&grid, w, ROWS, N);
    moec_gptq *g = factored(h, N, 0.0, true, 30);
    assert_int_equal(moec_gptq_round(&c, &loss, &nearest, g, w, NULL), MOEC_OK);
    for (int r = 0; r < ROWS; r++) {
        double least = INFINITY, best = INFINITY, own = 0.0;
        moec_quant_restore(v, &c, 0, ROWS);
        assert_int_equal(moec_gptq_loss(&own, g, w + r * N, v + r * N, 1, NULL), MOEC_OK);
        uint8_t *code = c.code + r * N, kept[N];
        memcpy(kept, code, N);
        for (int all = 0; all < 1 << (2 * N); all++) {
            int others = 0;
            double l = 0.0, d[N];
            for (int i = 0; i < N; i++) {
                const int u = all >> (2 * i) & 3;
                others += u != kept[i];
                d[i] = (double)w[r * N + i] - (double)(c.scale[r * 2 + i / 3] * (float)(u - 2));
            }
            for (int i = 0; i < N; i++)
                for (int j = 0; j < N; j++)
                    l += d[i] * h[i * N + j] * d[j];
            best = l < best ? l : best;
            if (others == 1)
                least = l < least ? l : least;
        }
        assert_true(own <= least * 1.00001);
        sum[0] += own;
        sum[1] += best;
    }
    assert_true(fabs(sum[0] - loss) < 1e-5 * loss);
    print_message("loss: nearest %.4f, GPTQ with sweeps %.4f, best codes for its scales %.4f\n", nearest, sum[0], sum[1]);
    assert_true(sum[0] < 1.1 * sum[1] && sum[0] < 0.7 * nearest);
    moec_gptq_free(g);
    moec_qcodes_release(&c);
}

/* More rows than a panel has, groups wider and narrower than a block; sweeps only lower the loss; scales keep their type and sign. */
static void sweeps_lower_the_loss(void **state)
{
    enum { N = 544, ROWS = 1040 };
    static const int64_t group[] = {32, 544, 136};
    float *w = malloc(ROWS * N * sizeof *w), *v = malloc(ROWS * N * sizeof *v);
    double *h = malloc(N * N * sizeof *h);
    (void)state;
    assert_true(w && v && h);
    fill(w, ROWS * N);
    hessian(h, N, 300);
    for (size_t k = 0; k < 3; k++) {
        const moec_qgrid grid = {3, group[k], k == 1, MOEC_F16};
        const int64_t rows = k == 0 ? ROWS : 19;
        double loss, nearest, again, before = INFINITY;
        for (int sweeps = 0; sweeps < 3; sweeps += 2) {
            moec_qcodes c = ranged(&grid, w, rows, N);
            moec_gptq *g = factored(h, N, 0.01, true, sweeps);
            assert_int_equal(moec_gptq_round(&c, &loss, &nearest, g, w, NULL), MOEC_OK);
            moec_quant_restore(v, &c, 0, rows);
            assert_int_equal(moec_gptq_loss(&again, g, w, v, rows, NULL), MOEC_OK);
            assert_true(fabs(loss - again) < (compute == MOEC_COMPUTE_F32 ? 1e-5 : 1e-3) * again && loss < before && loss < nearest);
            for (int64_t i = 0; i < rows * (N / group[k]); i++)
                assert_true(moec_quant_scale(c.scale[i], MOEC_F16) == c.scale[i] && (!grid.zeros || c.scale[i] > 0.0f));
            before = loss;
            moec_gptq_free(g);
            moec_qcodes_release(&c);
        }
    }
    free(w);
    free(v);
    free(h);
}

typedef struct shared {
    const moec_gptq *g;
    const float *w;
    moec_qcodes c[4];
    double loss[4], nearest[4];
} shared;

static moec_status round_one(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    shared *s = ctx;
    (void)worker;
    for (int64_t k = lo; k < hi; k++) {
        const moec_status st = moec_gptq_round(&s->c[k], &s->loss[k], &s->nearest[k], s->g, s->w, err);
        if (st != MOEC_OK)
            return st;
    }
    return MOEC_OK;
}

static void threads_give_the_same(void **state)
{
    enum { N = 96, ROWS = 33 };
    const moec_qgrid grid = {4, 32, true, MOEC_BF16};
    float w[ROWS * N];
    double h[N * N];
    (void)state;
    fill(w, ROWS * N);
    hessian(h, N, 60);
    shared s = {.g = factored(h, N, 0.01, true, 2), .w = w};
    for (int k = 0; k < 4; k++)
        s.c[k] = ranged(&grid, w, ROWS, N);
    moec_par_set_threads(2);
    assert_int_equal(moec_par_for(3, 1, round_one, &s, NULL), MOEC_OK);
    assert_int_equal(round_one(&s, 0, 3, 4, NULL), MOEC_OK);
    for (int k = 0; k < 3; k++) {
        assert_memory_equal(s.c[k].code, s.c[3].code, ROWS * N);
        assert_memory_equal(s.c[k].scale, s.c[3].scale, ROWS * (N / 32) * sizeof(float));
        assert_true(s.loss[k] == s.loss[3] && s.nearest[k] == s.nearest[3]);
    }
    for (int k = 0; k < 4; k++)
        moec_qcodes_release(&s.c[k]);
    moec_gptq_free((moec_gptq *)s.g);
}

/* Without the loss of rounding to nearest, and with memory that held another Hessian: the same bits. */
static void shortcuts_give_the_same(void **state)
{
    enum { N = 160, ROWS = 270 };
    static float w[ROWS * N];
    static double h[N * N], other[N * N];
    const moec_qgrid grid = {4, 32, false, MOEC_F16};
    (void)state;
    fill(w, ROWS * N);
    for (int kind = 0; kind < 3; kind++) { /* GPTQ is better in all rows; in few, as H is all but diagonal; H is 0 */
        hessian(h, N, 400);
        hessian(other, N, 30);
        for (int i = 0; i < N; i++)
            for (int j = 0; j < N; j++)
                h[i * N + j] *= kind == 2 ? 0.0 : kind == 1 && i != j ? 0.01 : 1.0;
        for (int sweeps = 0; sweeps < 2; sweeps++) {
            double loss[2], nearest;
            moec_qcodes a = ranged(&grid, w, ROWS, N), b = ranged(&grid, w, ROWS, N);
            moec_gptq *g = factored(h, N, 0.01, true, sweeps);
            assert_int_equal(moec_gptq_round(&a, &loss[0], &nearest, g, w, NULL), MOEC_OK);
            moec_gptq_free(g);
            g = factored(other, N, 0.01, true, sweeps);
            assert_int_equal(moec_gptq_renew(g, h, NULL), MOEC_OK);
            assert_int_equal(moec_gptq_round(&b, &loss[1], NULL, g, w, NULL), MOEC_OK);
            assert_memory_equal(a.code, b.code, ROWS * N);
            assert_memory_equal(a.scale, b.scale, ROWS * (N / 32) * sizeof(float));
            assert_true(loss[0] == loss[1] && loss[0] <= nearest);
            moec_gptq_free(g);
            moec_qcodes_release(&a);
            moec_qcodes_release(&b);
        }
    }
}

/* What rounding to bfloat16 on the way costs: next to nothing, with and without sweeps. */
static void bf16_rounds_as_well(void **state)
{
    enum { N = 700, ROWS = 300 };
    const moec_qgrid grid = {3, 70, false, MOEC_F16};
    float *w = malloc(ROWS * N * sizeof *w), *v = malloc(ROWS * N * sizeof *v);
    double *h = malloc(N * N * sizeof *h);
    (void)state;
    assert_true(w && v && h);
    fill(w, ROWS * N);
    hessian(h, N, 900);
    for (int sweeps = 0; sweeps < 2; sweeps++) {
        double loss, nearest, again[2];
        for (int k = 0; k < 2; k++) {
            compute = k == 0 ? MOEC_COMPUTE_F32 : MOEC_COMPUTE_BF16;
            moec_qcodes c = ranged(&grid, w, ROWS, N);
            moec_gptq *g = factored(h, N, 0.01, true, sweeps);
            assert_int_equal(moec_gptq_round(&c, &loss, &nearest, g, w, NULL), MOEC_OK);
            moec_quant_restore(v, &c, 0, ROWS);
            assert_int_equal(moec_gptq_loss(&again[k], g, w, v, ROWS, NULL), MOEC_OK);
            assert_true(fabs(loss - again[k]) < 1e-3 * again[k]);
            moec_gptq_free(g);
            moec_qcodes_release(&c);
        }
        print_message("%d sweeps: loss with products in bfloat16 over that in float32: %.5f\n", sweeps, again[1] / again[0]);
        assert_true(again[1] < 1.005 * again[0]);
    }
    compute = MOEC_COMPUTE_F32;
    in_bf16(sweeps_lower_the_loss);
    in_bf16(threads_give_the_same);
    in_bf16(shortcuts_give_the_same);
    free(w);
    free(v);
    free(h);
}

static void hessians_blend(void **state)
{
    enum { N = 8 };
    double h[N * N], layer[N * N];
    (void)state;
    for (int i = 0; i < N * N; i++) {
        h[i] = 6.0;
        layer[i] = 20.0;
    }
    h[1] = NAN; /* above the diagonal: neither read nor written */
    moec_gptq_blend(h, 3.0, 1, layer, 10.0, N); /* lambda = 1 / (1 + 8/8) */
    assert_true(h[0] == 2.0 && h[N] == 2.0 && isnan(h[1]));
    h[N] = 6.0;
    moec_gptq_blend(h, 3.0, 3, layer, 20.0, N); /* 3 / 4: 1.5 + 0.25 */
    assert_true(h[N] == 1.75);
    h[N] = 6.0;
    moec_gptq_blend(h, 3.0, 2 * N, layer, 20.0, N);
    assert_true(h[N] == 2.0);
    h[N] = 6.0;
    moec_gptq_blend(h, 3.0, 1, NULL, 20.0, N);
    assert_true(h[N] == 2.0);
    h[N] = 6.0;
    moec_gptq_blend(h, 3.0, 1, layer, 0.0, N);
    assert_true(h[N] == 2.0);
    h[N] = NAN;
    moec_gptq_blend(h, 0.0, 0, layer, 20.0, N);
    assert_true(h[N] == 1.0);
    h[N] = h[0] = NAN;
    moec_gptq_blend(h, 0.0, 0, NULL, 0.0, N);
    assert_true(h[0] == 1.0 && h[N] == 0.0 && h[N + 1] == 1.0);
}

static void faults_are_said(void **state)
{
    enum { N = 8 };
    const moec_qgrid grid = {4, 4, false, MOEC_F16};
    const moec_gptq_opts o = MOEC_GPTQ_DEFAULTS;
    float w[N];
    double h[N * N], loss, nearest;
    moec_gptq *g = NULL;
    (void)state;
    fill(w, N);
    hessian(h, N, 20);
    h[5 * N + 2] = NAN;
    assert_int_equal(moec_gptq_new(&g, h, N, &o, NULL), MOEC_ENUMERIC);
    assert_null(g);
    hessian(h, N, 20);
    assert_int_equal(moec_gptq_new(&g, h, -1, &o, NULL), MOEC_EINVAL);
    assert_int_equal(moec_gptq_new(&g, h, N, &(moec_gptq_opts){.damp = NAN}, NULL), MOEC_EINVAL);
    int failed = 0;
    moec_status st = MOEC_ENOMEM;
    for (long left = 0; st != MOEC_OK; left++) {
        moec_test_allocs_left = left;
        moec_qcodes c = {0};
        st = moec_qcodes_new(&c, &grid, 1, N, NULL);
        st = st == MOEC_OK ? moec_gptq_new(&g, h, N, &o, NULL) : st;
        st = st == MOEC_OK ? moec_quant_range(&c, w, MOEC_QRANGE_CLIP, NULL, 0, 1, NULL) : st;
        st = st == MOEC_OK ? moec_gptq_round(&c, &loss, &nearest, g, w, NULL) : st;
        st = st == MOEC_OK ? moec_gptq_loss(&loss, g, w, w, 1, NULL) : st;
        moec_test_allocs_left = LONG_MAX;
        assert_true(st == MOEC_OK || st == MOEC_ENOMEM);
        failed += st != MOEC_OK;
        moec_gptq_free(g);
        g = NULL;
        moec_qcodes_release(&c);
    }
    assert_true(failed > 20 && loss == 0.0);
    moec_qcodes c = ranged(&grid, w, 1, 4);
    g = factored(h, N, 0.01, true, 0);
    assert_int_equal(moec_gptq_round(&c, &loss, &nearest, g, w, NULL), MOEC_EINVAL);
    moec_qcodes_release(&c);
    c = ranged(&grid, w, 1, N);
    w[1] = NAN; /* behind the search of scales, which would refuse it */
    assert_int_equal(moec_gptq_round(&c, &loss, &nearest, g, w, NULL), MOEC_ENUMERIC);
    assert_int_equal(moec_gptq_round(&c, &loss, NULL, g, w, NULL), MOEC_ENUMERIC);
    moec_gptq_free(g);
    moec_qcodes_release(&c);
}

/* Multiplied back by the damped Hessian, of more columns than tokens; more rows than one panel. */
static void solves_what_it_factored(void **state)
{
    enum { N = 70, TOKENS = 30, ROWS = 300 };
    static double h[N * N];
    static float x[TOKENS * N], b[ROWS * N], s[ROWS * N];
    double mean = 0.0;
    const moec_gptq_opts o = MOEC_GPTQ_DEFAULTS;
    moec_gptq *g;
    moec_err err;
    (void)state;
    for (int i = 0; i < TOKENS * N; i++)
        x[i] = normal() * (i % N == 7 ? 10.0f : 1.0f);
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) {
            h[i * N + j] = 0.0;
            for (int t = 0; t < TOKENS; t++)
                h[i * N + j] += (double)x[t * N + i] * (double)x[t * N + j];
        }
    for (int i = 0; i < N; i++)
        mean += h[i * N + i] / N;
    for (int i = 0; i < ROWS * N; i++)
        s[i] = b[i] = normal();
    assert_int_equal(moec_gptq_new(&g, h, N, &o, &err), MOEC_OK);
    assert_int_equal(moec_gptq_solve(s, g, ROWS, &err), MOEC_OK);
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < N; i++) {
            double sum = 0.01 * mean * (double)s[r * N + i];
            for (int j = 0; j < N; j++)
                sum += h[i * N + j] * (double)s[r * N + j];
            assert_true(fabs(sum - (double)b[r * N + i]) < 2e-3);
        }
    moec_gptq_free(g);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(two_columns_by_hand),   cmocka_unit_test(without_tokens_nearest), cmocka_unit_test(descent_ends_in_a_minimum),
        cmocka_unit_test(sweeps_lower_the_loss), cmocka_unit_test(threads_give_the_same),  cmocka_unit_test(hessians_blend),
        cmocka_unit_test(faults_are_said),       cmocka_unit_test(shortcuts_give_the_same),
        cmocka_unit_test(solves_what_it_factored), cmocka_unit_test(bf16_rounds_as_well),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
