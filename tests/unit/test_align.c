/* Linear assignment against all permutations, and alignment of experts whose order, scales and signs are known. */
#include "method/align.h"

#include "base/mem.h"
#include "base/par.h"
#include "num/assign.h"

#include <limits.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { SMALL = 8, WIDTH = 200, HIDDEN = 48, TOKENS = 700 };

static uint64_t seed = 88172645463325252u;

static double uniform(double low, double high)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return low + (high - low) * (double)(seed >> 40) / 16777216.0;
}

static float normal(void)
{
    double s = 0.0;
    for (int i = 0; i < 12; i++)
        s += uniform(-0.5, 0.5);
    return (float)s;
}

static float *normals(int64_t n)
{
    float *x = calloc((size_t)n, sizeof *x);
    for (int64_t i = 0; i < n; i++)
        x[i] = normal();
    return x;
}

static void shuffle(int32_t *perm, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        perm[i] = (int32_t)i;
    for (int64_t i = n - 1; i > 0; i--) {
        const int64_t j = (int64_t)uniform(0.0, (double)i + 0.999);
        const int32_t t = perm[i];
        perm[i] = perm[j];
        perm[j] = t;
    }
}

static bool is_permutation(const int32_t *p, int64_t n)
{
    bool *seen = calloc((size_t)n + 1, sizeof *seen), ok = true;
    for (int64_t i = 0; i < n && ok; i++) {
        ok = p[i] >= 0 && p[i] < n && !seen[p[i]];
        if (ok)
            seen[p[i]] = true;
    }
    free(seen);
    return ok;
}

/* ---- assignment --------------------------------------------------------------------------------------------------------- */

static double total(const float *profit, const int32_t *to, int64_t n)
{
    double s = 0.0;
    for (int64_t i = 0; i < n; i++)
        s += (double)profit[i * n + to[i]];
    return s;
}

/* The most rows and then the largest sum over all permutations, pairs with allowed == 0 being no pairs. */
static void brute(const float *profit, const bool *allowed, int64_t n, int64_t row, unsigned used, int64_t rows, double sum,
                  int64_t *best_rows, double *best)
{
    if (row == n) {
        if (rows > *best_rows || (rows == *best_rows && sum > *best)) {
            *best_rows = rows;
            *best = sum;
        }
        return;
    }
    for (int64_t j = 0; j < n; j++)
        if (!(used >> j & 1u) && (!allowed || allowed[row * n + j]))
            brute(profit, allowed, n, row + 1, used | 1u << j, rows + 1, sum + (double)profit[row * n + j], best_rows, best);
    if (allowed)
        brute(profit, allowed, n, row + 1, used, rows, sum, best_rows, best);
}

static void best_of_all_permutations(void **state)
{
    (void)state;
    float p[SMALL * SMALL];
    int32_t to[SMALL], again[SMALL];
    for (int round = 0; round < 60; round++)
        for (int64_t n = 0; n <= (round < 4 ? SMALL : SMALL - 2); n++) {
            for (int64_t i = 0; i < n * n; i++) /* whole numbers have many ties */
                p[i] = round % 2 ? (float)floor(uniform(-2.0, 3.0)) : normal();
            int64_t rows = -1;
            double want = 0.0;
            brute(p, NULL, n, 0, 0, 0, 0.0, &rows, &want);
            assert_int_equal(moec_assign(to, p, n, NULL), MOEC_OK);
            assert_true(is_permutation(to, n));
            assert_true(fabs(total(p, to, n) - want) <= (round % 2 ? 0.0 : 1e-5));
            assert_int_equal(moec_assign(again, p, n, NULL), MOEC_OK);
            assert_memory_equal(to, again, (size_t)n * sizeof *to);
        }
}

/* Rows in order, each its best free column. */
static double greedy(const float *p, int64_t n)
{
    bool *used = calloc((size_t)n, sizeof *used);
    double s = 0.0;
    for (int64_t i = 0; i < n; i++) {
        int64_t at = -1;
        for (int64_t j = 0; j < n; j++)
            if (!used[j] && (at < 0 || p[i * n + j] > p[i * n + at]))
                at = j;
        used[at] = true;
        s += (double)p[i * n + at];
    }
    free(used);
    return s;
}

static void no_less_than_identity_and_greedy(void **state)
{
    (void)state;
    static const int64_t sizes[] = {9, 63, 64, 65, 200};
    for (size_t k = 0; k < MOEC_COUNT(sizes); k++) {
        const int64_t n = sizes[k];
        float *p = normals(n * n);
        int32_t *to = calloc((size_t)n, sizeof *to), *same = calloc((size_t)n, sizeof *same);
        for (int64_t i = 0; i < n; i++)
            same[i] = (int32_t)i;
        assert_int_equal(moec_assign(to, p, n, NULL), MOEC_OK);
        assert_true(is_permutation(to, n));
        assert_true(total(p, to, n) >= total(p, same, n));
        assert_true(total(p, to, n) >= greedy(p, n));
        memset(p, 0, (size_t)(n * n) * sizeof *p); /* all equal */
        assert_int_equal(moec_assign(to, p, n, NULL), MOEC_OK);
        assert_memory_equal(to, same, (size_t)n * sizeof *to);
        free(p);
        free(to);
        free(same);
    }
}

static void bad_profits_are_refused(void **state)
{
    (void)state;
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    float p[9] = {0};
    int32_t to[3], col[9] = {0, 1, 2, 0, 1, 2, 0, 1, 2};
    moec_err err = {MOEC_OK, ""};
    for (size_t k = 0; k < MOEC_COUNT(bad); k++) {
        p[5] = bad[k];
        assert_int_equal(moec_assign(to, p, 3, &err), MOEC_ENUMERIC);
        assert_non_null(strstr(err.text, "row 1"));
        assert_int_equal(moec_assign_sparse(to, col, p, 3, 3, NULL), MOEC_ENUMERIC);
    }
    p[5] = 0.0f;
    for (int32_t c = -1; c <= 3; c += 2) { /* below, twice, beyond */
        col[5] = c;
        assert_int_equal(moec_assign_sparse(to, col, p, 3, 3, NULL), MOEC_EINVAL);
    }
}

static void sparse_with_all_columns_is_dense(void **state)
{
    (void)state;
    for (int64_t n = 1; n <= 150; n += 29) {
        float *p = normals(n * n);
        int32_t *to = calloc((size_t)n, sizeof *to), *sparse = calloc((size_t)n, sizeof *sparse);
        int32_t *col = calloc((size_t)(n * n), sizeof *col);
        for (int64_t i = 0; i < n * n; i++)
            col[i] = (int32_t)(i % n);
        assert_int_equal(moec_assign(to, p, n, NULL), MOEC_OK);
        assert_int_equal(moec_assign_sparse(sparse, col, p, n, n, NULL), MOEC_OK);
        assert_memory_equal(to, sparse, (size_t)n * sizeof *to);
        free(p);
        free(to);
        free(sparse);
        free(col);
    }
}

static void sparse_matches_most_rows_then_most_profit(void **state)
{
    (void)state;
    enum { N = 6 };
    for (int round = 0; round < 200; round++) {
        const int64_t each = round % 4;
        float p[N * N], list[N * N];
        bool allowed[N * N] = {false};
        int32_t col[N * N], to[N];
        for (int64_t i = 0; i < N; i++) {
            int64_t at = 0;
            for (int64_t j = 0; j < N; j++) {
                p[i * N + j] = round % 3 ? (float)floor(uniform(-3.0, 4.0)) : normal();
                /* few columns are liked by many, so that some rows get none */
                if (at < each && (N - j == each - at || uniform(0.0, 1.0) < 0.6)) {
                    allowed[i * N + j] = true;
                    col[i * each + at] = (int32_t)j;
                    list[i * each + at++] = p[i * N + j];
                }
            }
        }
        int64_t rows = -1, got_rows = 0;
        double want = 0.0, got = 0.0;
        brute(p, allowed, N, 0, 0, 0, 0.0, &rows, &want);
        assert_int_equal(moec_assign_sparse(to, col, list, N, each, NULL), MOEC_OK);
        assert_true(is_permutation(to, N));
        for (int64_t i = 0; i < N; i++)
            if (allowed[i * N + to[i]]) {
                got_rows++;
                got += (double)p[i * N + to[i]];
            }
        assert_int_equal(got_rows, rows);
        assert_true(fabs(got - want) < 1e-5);
    }
}

/* ---- experts ------------------------------------------------------------------------------------------------------------ */

typedef struct expert {
    float *gate, *up, *down, *gate_bias, *up_bias;
    moec_neurons x;
} expert;

static expert expert_new(int64_t width, bool gated)
{
    expert e = {.up = normals(width * HIDDEN), .down = normals(width * HIDDEN)};
    if (gated)
        e.gate = normals(width * HIDDEN);
    e.x = (moec_neurons){.gate = e.gate, .up = e.up, .down = e.down, .width = width, .hidden = HIDDEN, .scales = gated};
    return e;
}

static void expert_free(expert *e)
{
    free(e->gate);
    free(e->up);
    free(e->down);
    free(e->gate_bias);
    free(e->up_bias);
}

/* Neuron perm[k] of e stands at place k of the copy, up times scale[k] and down over it (NULL: 1). */
static expert expert_copy(const expert *e, const int32_t *perm, const float *scale, float gate_noise)
{
    expert c = expert_new(e->x.width, e->gate != NULL);
    for (int64_t k = 0; k < e->x.width; k++)
        for (int64_t h = 0; h < HIDDEN; h++) {
            const int64_t to = k * HIDDEN + h, from = perm[k] * HIDDEN + h;
            const float s = scale ? scale[k] : 1.0f;
            c.up[to] = e->up[from] * s;
            c.down[to] = e->down[from] / s;
            if (e->gate)
                c.gate[to] = e->gate[from] + gate_noise * normal();
        }
    return c;
}

static void random_scales(float *scale, int64_t n)
{
    for (int64_t k = 0; k < n; k++)
        scale[k] = (float)(exp(uniform(-2.3, 2.3)) * (uniform(0.0, 1.0) < 0.5 ? -1.0 : 1.0));
}

/* f(x), in float64; with al: of the expert as aligned. */
static void apply(double *y, const moec_neurons *e, const moec_alignment *al, const float *x)
{
    memset(y, 0, HIDDEN * sizeof *y);
    for (int64_t j = 0; j < e->width; j++) {
        const int64_t at = (al ? al->from[j] : j) * HIDDEN;
        const double s = al ? (double)al->scale[j] : 1.0;
        double g = 0.0, u = 0.0;
        for (int64_t h = 0; h < HIDDEN; h++) {
            g += e->gate ? (double)e->gate[at + h] * (double)x[h] : 0.0;
            u += (double)e->up[at + h] * (double)x[h];
        }
        const double a = e->gate ? g / (1.0 + exp(-g)) * (u * s) : fmax(u, 0.0);
        for (int64_t h = 0; h < HIDDEN; h++)
            y[h] += a * (double)e->down[at + h] / s;
    }
}

static const moec_align_opts canonical = {true, MOEC_ALIGN_DENSE, MOEC_ALIGN_CANDIDATES}, plain = {false, 1000, 64},
                             sparse = {true, 10, 16};

typedef struct result {
    int32_t from[WIDTH];
    float scale[WIDTH];
    moec_alignment al;
} result;

static moec_alignment *into(result *r)
{
    r->al = (moec_alignment){.from = r->from, .scale = r->scale};
    return &r->al;
}

/* Share of neurons that are found: perm[from[j]] == j. */
static double found(const result *r, const int32_t *perm, int64_t n)
{
    int64_t ok = 0;
    for (int64_t j = 0; j < n; j++)
        ok += perm[r->from[j]] == j;
    return (double)ok / (double)n;
}

static void planted_order_scale_and_sign_are_found(void **state)
{
    (void)state;
    int32_t perm[WIDTH];
    float scale[WIDTH];
    result r;
    expert a = expert_new(WIDTH, true);
    shuffle(perm, WIDTH);
    random_scales(scale, WIDTH);
    expert b = expert_copy(&a, perm, scale, 0.05f);
    assert_int_equal(moec_align_weights(into(&r), &a.x, &b.x, &canonical, NULL), MOEC_OK);
    assert_true(found(&r, perm, WIDTH) == 1.0);
    for (int64_t j = 0; j < WIDTH; j++)
        assert_true(fabs((double)(r.scale[j] * scale[r.from[j]]) - 1.0) < 1e-5);
    assert_true(r.al.fit > 0.98 && r.al.fit < 1.01 && r.al.gain > 0.5);
    assert_int_equal(moec_align_weights(into(&r), &a.x, &b.x, &sparse, NULL), MOEC_OK);
    assert_true(found(&r, perm, WIDTH) == 1.0);
    assert_int_equal(moec_align_weights(into(&r), &a.x, &b.x, &plain, NULL), MOEC_OK); /* what canonical is for */
    assert_true(is_permutation(r.from, WIDTH));
    assert_true(r.al.gain >= 0.0 && r.scale[0] == 1.0f);
    expert_free(&a);
    expert_free(&b);
}

static void an_aligned_copy_is_the_same_function(void **state)
{
    (void)state;
    for (int gated = 0; gated < 2; gated++) {
        int32_t perm[WIDTH];
        float scale[WIDTH], x[HIDDEN];
        result r;
        expert a = expert_new(WIDTH, gated);
        shuffle(perm, WIDTH);
        random_scales(scale, WIDTH);
        expert b = expert_copy(&a, perm, gated ? scale : NULL, 0.0f);
        assert_int_equal(moec_align_weights(into(&r), &a.x, &b.x, &canonical, NULL), MOEC_OK);
        assert_true(found(&r, perm, WIDTH) == 1.0);
        assert_true(fabs(r.al.fit - 1.0) < 1e-5);
        double up = 0.0, down = 0.0, norm = 0.0;
        for (int64_t j = 0; j < WIDTH; j++) { /* neuron by neuron, as averages need it */
            const int64_t p = j * HIDDEN, q = r.from[j] * HIDDEN;
            for (int64_t h = 0; h < HIDDEN; h++) {
                up = fmax(up, fabs((double)(a.up[p + h] - b.up[q + h] * r.scale[j])));
                down = fmax(down, fabs((double)(a.down[p + h] - b.down[q + h] / r.scale[j])));
                norm = fmax(norm, fabs((double)a.up[p + h]));
            }
            assert_true(gated || r.scale[j] == 1.0f);
        }
        assert_true(up < 2e-6 * norm && down < 2e-6 * norm);
        for (int t = 0; t < 5; t++) {
            double want[HIDDEN], before[HIDDEN], got[HIDDEN], off = 0.0, size = 0.0;
            for (int64_t h = 0; h < HIDDEN; h++)
                x[h] = 0.3f * normal();
            apply(want, &a.x, NULL, x);
            apply(before, &b.x, NULL, x);
            apply(got, &b.x, &r.al, x);
            for (int64_t h = 0; h < HIDDEN; h++) {
                size = fmax(size, fabs(want[h]));
                off = fmax(off, fmax(fabs(got[h] - want[h]), fabs(got[h] - before[h])));
            }
            assert_true(off < 1e-6 * size);
        }
        expert_free(&a);
        expert_free(&b);
    }
}

/* The profit that moec_align_weights has, in float64, by its formula. */
static double formula_sum(const moec_neurons *a, const moec_neurons *b, const int32_t *from, bool free_scale)
{
    double sum = 0.0;
    for (int64_t j = 0; j < a->width; j++) {
        const int64_t p = j * HIDDEN, q = (from ? from[j] : j) * HIDDEN;
        double g = 0.0, u = 0.0, d = 0.0, ua = 0.0, da = 0.0, ub = 0.0, db = 0.0;
        for (int64_t h = 0; h < HIDDEN; h++) {
            g += (double)a->gate[p + h] * (double)b->gate[q + h];
            u += (double)a->up[p + h] * (double)b->up[q + h];
            d += (double)a->down[p + h] * (double)b->down[q + h];
            ua += pow((double)a->up[p + h], 2.0);
            da += pow((double)a->down[p + h], 2.0);
            ub += pow((double)b->up[q + h], 2.0);
            db += pow((double)b->down[q + h], 2.0);
        }
        const double ra = sqrt(sqrt(da * ua)), rb = sqrt(sqrt(db * ub)); /* canonical lengths of both up and down */
        sum += g + (free_scale ? fabs(u / sqrt(ua * ub) * ra * rb + d / sqrt(da * db) * ra * rb) : u + d);
    }
    return sum;
}

static void fit_and_gain_are_sums_of_profits(void **state)
{
    (void)state;
    result r;
    expert a = expert_new(WIDTH, true), b = expert_new(WIDTH, true);
    for (int k = 0; k < 2; k++) {
        assert_int_equal(moec_align_weights(into(&r), &a.x, &b.x, k ? &canonical : &plain, NULL), MOEC_OK);
        const double own = 0.5 * (formula_sum(&a.x, &a.x, NULL, k) + formula_sum(&b.x, &b.x, NULL, k));
        const double after = formula_sum(&a.x, &b.x, r.from, k), before = formula_sum(&a.x, &b.x, NULL, k);
        assert_true(fabs(r.al.fit - after / own) < 1e-5);
        assert_true(fabs(r.al.gain - (after - before) / own) < 1e-5);
        assert_true(r.al.gain > 0.1);
    }
    assert_int_equal(moec_align_weights(into(&r), &a.x, &a.x, &canonical, NULL), MOEC_OK);
    for (int64_t j = 0; j < WIDTH; j++)
        assert_true(r.from[j] == j && r.scale[j] == 1.0f);
    assert_true(fabs(r.al.fit - 1.0) < 1e-6 && r.al.gain == 0.0);
    expert_free(&a);
    expert_free(&b);
}

static void dead_neurons_do_no_harm(void **state)
{
    (void)state;
    int32_t perm[WIDTH];
    float scale[WIDTH];
    result r;
    expert a = expert_new(WIDTH, true);
    for (int64_t h = 0; h < HIDDEN; h++) { /* 0 without up, 1 without down, 2 without anything */
        a.up[h] = a.down[HIDDEN + h] = 0.0f;
        a.up[2 * HIDDEN + h] = a.down[2 * HIDDEN + h] = a.gate[2 * HIDDEN + h] = 0.0f;
    }
    shuffle(perm, WIDTH);
    random_scales(scale, WIDTH);
    expert b = expert_copy(&a, perm, scale, 0.0f);
    assert_int_equal(moec_align_weights(into(&r), &a.x, &b.x, &canonical, NULL), MOEC_OK);
    assert_true(found(&r, perm, WIDTH) == 1.0);
    for (int64_t j = 0; j < WIDTH; j++)
        assert_true(j < 3 ? r.scale[j] == 1.0f : isfinite(r.scale[j]) && r.scale[j] != 0.0f);
    memset(b.gate, 0, WIDTH * HIDDEN * sizeof *b.gate); /* and a wholly dead expert */
    memset(b.up, 0, WIDTH * HIDDEN * sizeof *b.up);
    memset(b.down, 0, WIDTH * HIDDEN * sizeof *b.down);
    assert_int_equal(moec_align_weights(into(&r), &a.x, &b.x, &canonical, NULL), MOEC_OK);
    assert_true(r.al.fit == 0.0 && r.al.gain == 0.0 && r.from[WIDTH - 1] == WIDTH - 1);
    assert_int_equal(moec_align_weights(into(&r), &b.x, &b.x, &canonical, NULL), MOEC_OK);
    assert_true(r.al.fit == 1.0 && r.al.gain == 0.0);
    expert_free(&a);
    expert_free(&b);
}

/* Experts that differ by their biases alone. */
static void biases_count(void **state)
{
    (void)state;
    int32_t perm[WIDTH];
    result r;
    expert a = expert_new(WIDTH, true);
    for (int64_t i = HIDDEN; i < WIDTH * HIDDEN; i++) {
        a.gate[i] = a.gate[i % HIDDEN];
        a.up[i] = a.up[i % HIDDEN];
        a.down[i] = a.down[i % HIDDEN];
    }
    shuffle(perm, WIDTH);
    expert b = expert_copy(&a, perm, NULL, 0.0f);
    a.gate_bias = normals(WIDTH);
    a.up_bias = normals(WIDTH);
    b.gate_bias = calloc(WIDTH, sizeof *b.gate_bias);
    b.up_bias = calloc(WIDTH, sizeof *b.up_bias);
    for (int64_t k = 0; k < WIDTH; k++) {
        b.gate_bias[k] = a.gate_bias[perm[k]];
        b.up_bias[k] = a.up_bias[perm[k]];
    }
    a.x.gate_bias = a.gate_bias, a.x.up_bias = a.up_bias;
    b.x.gate_bias = b.gate_bias, b.x.up_bias = b.up_bias;
    a.x.scales = b.x.scales = false;
    assert_int_equal(moec_align_weights(into(&r), &a.x, &b.x, &canonical, NULL), MOEC_OK);
    double off = 0.0; /* float32 products of equal rows tell near biases apart only so far */
    for (int64_t j = 0; j < WIDTH; j++)
        off = fmax(off, fabs((double)(a.gate_bias[j] - b.gate_bias[r.from[j]])) +
                            fabs((double)(a.up_bias[j] - b.up_bias[r.from[j]])));
    assert_true(off < 0.05 && fabs(r.al.fit - 1.0) < 1e-5);
    expert_free(&a);
    expert_free(&b);
}

static void activations_find_order_and_sign(void **state)
{
    (void)state;
    int32_t perm[WIDTH];
    float scale[WIDTH];
    float *ha = calloc(TOKENS * WIDTH, sizeof *ha), *hb = calloc(TOKENS * WIDTH, sizeof *hb);
    result r, weights;
    expert a = expert_new(WIDTH, true);
    shuffle(perm, WIDTH);
    random_scales(scale, WIDTH);
    expert b = expert_copy(&a, perm, scale, 0.0f);
    for (int64_t t = 0; t < TOKENS; t++) {
        for (int64_t j = 0; j < WIDTH; j++)
            ha[t * WIDTH + j] = j == 7 ? 0.3f : normal() + 20.0f; /* 7 does not vary */
        for (int64_t k = 0; k < WIDTH; k++)
            hb[t * WIDTH + k] = ha[t * WIDTH + perm[k]] * scale[k];
    }
    assert_int_equal(moec_align_activations(into(&r), &a.x, &b.x, ha, hb, TOKENS, &canonical, NULL), MOEC_OK);
    assert_true(found(&r, perm, WIDTH) == 1.0);
    assert_int_equal(moec_align_weights(into(&weights), &a.x, &b.x, &canonical, NULL), MOEC_OK);
    for (int64_t j = 0; j < WIDTH; j++)
        assert_true(j == 7 ? fabsf(r.scale[j]) == fabsf(weights.scale[j]) : r.scale[j] == weights.scale[j]);
    assert_true(fabs(r.al.fit - 1.0) < 1e-5);

    /* where signs are not free, opposite is worse than unlike */
    a.x.scales = b.x.scales = false;
    assert_int_equal(moec_align_activations(into(&r), &a.x, &b.x, ha, hb, TOKENS, &canonical, NULL), MOEC_OK);
    int64_t opposite = 0;
    for (int64_t j = 0; j < WIDTH; j++) {
        assert_true(r.scale[j] == 1.0f);
        opposite += perm[r.from[j]] == j && scale[r.from[j]] < 0.0f;
    }
    assert_true(opposite <= 1); /* the one that does not vary fits anywhere */
    ha[5] = NAN;
    assert_int_equal(moec_align_activations(into(&r), &a.x, &b.x, ha, hb, TOKENS, &canonical, NULL), MOEC_ENUMERIC);
    free(ha);
    free(hb);
    expert_free(&a);
    expert_free(&b);
}

static void any_number_of_threads_gives_the_same(void **state)
{
    (void)state;
    expert a = expert_new(WIDTH, true), b = expert_new(WIDTH, true);
    float *ha = normals(TOKENS * WIDTH), *hb = normals(TOKENS * WIDTH);
    for (int k = 0; k < 4; k++) {
        result r[2];
        memset(r, 0, sizeof r);
        for (int threads = 1; threads <= 2; threads++) {
            moec_par_set_threads(threads);
            moec_alignment *out = into(&r[threads - 1]);
            const moec_align_opts *o = k % 2 ? &sparse : &canonical;
            assert_int_equal(k < 2 ? moec_align_weights(out, &a.x, &b.x, o, NULL)
                                   : moec_align_activations(out, &a.x, &b.x, ha, hb, TOKENS, o, NULL),
                             MOEC_OK);
        }
        assert_memory_equal(r[0].from, r[1].from, sizeof r[0].from);
        assert_memory_equal(r[0].scale, r[1].scale, sizeof r[0].scale);
        assert_memory_equal(&r[0].al.fit, &r[1].al.fit, 2 * sizeof(double));
        assert_true(is_permutation(r[0].from, WIDTH));
        assert_true(r[0].al.gain >= 0.0);
    }
    free(ha);
    free(hb);
    expert_free(&a);
    expert_free(&b);
}

static void impossible_arguments_are_refused(void **state)
{
    (void)state;
    result r;
    moec_err err = {MOEC_OK, ""};
    expert a = expert_new(WIDTH, true), b = expert_new(WIDTH - 1, true), c = expert_new(WIDTH, false);
    const moec_align_opts none = {true, 10, 0};
    assert_int_equal(moec_align_weights(into(&r), &a.x, &b.x, &canonical, &err), MOEC_EINVAL);
    assert_int_equal(moec_align_weights(into(&r), &a.x, &c.x, &canonical, NULL), MOEC_EINVAL);
    assert_int_equal(moec_align_weights(into(&r), &a.x, &a.x, &none, NULL), MOEC_EINVAL);
    a.down[77] = INFINITY;
    err.code = MOEC_OK;
    assert_int_equal(moec_align_weights(into(&r), &a.x, &a.x, &canonical, &err), MOEC_ENUMERIC);
    assert_non_null(strstr(err.text, "down: row 1"));
    a.down[77] = 1e30f; /* finite, and its square is not */
    assert_int_equal(moec_align_weights(into(&r), &a.x, &a.x, &plain, NULL), MOEC_ENUMERIC);
    for (long k = 0; k < 12; k++) {
        moec_test_allocs_left = k;
        moec_status st = moec_align_weights(into(&r), &c.x, &c.x, k % 2 ? &sparse : &canonical, NULL);
        moec_test_allocs_left = LONG_MAX;
        assert_int_equal(st, MOEC_ENOMEM);
    }
    assert_true(moec_align_bytes(1408, &canonical) < 2u * 1408u * 1408u * 4u);
    assert_true(moec_align_bytes(INT64_MAX, &(moec_align_opts){true, INT64_MAX, 1}) == SIZE_MAX);
    expert_free(&a);
    expert_free(&b);
    expert_free(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(best_of_all_permutations),
        cmocka_unit_test(no_less_than_identity_and_greedy),
        cmocka_unit_test(bad_profits_are_refused),
        cmocka_unit_test(sparse_with_all_columns_is_dense),
        cmocka_unit_test(sparse_matches_most_rows_then_most_profit),
        cmocka_unit_test(planted_order_scale_and_sign_are_found),
        cmocka_unit_test(an_aligned_copy_is_the_same_function),
        cmocka_unit_test(fit_and_gain_are_sums_of_profits),
        cmocka_unit_test(dead_neurons_do_no_harm),
        cmocka_unit_test(biases_count),
        cmocka_unit_test(activations_find_order_and_sign),
        cmocka_unit_test(any_number_of_threads_gives_the_same),
        cmocka_unit_test(impossible_arguments_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
