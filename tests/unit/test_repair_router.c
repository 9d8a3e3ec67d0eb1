/* The router's refit against its definitions in float64: what groups want, the normal equations, derivatives by differences; what is
 * planted is found again, what held-out tokens deny is not taken, threads and dtypes make no difference. */
#include "base/mem.h"
#include "base/par.h"
#include "num/linalg.h"
#include "repair_layer.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static const rules kinds[] = {
    {.renorm = true, .router = true},
    {.scale = 2.5, .slots = 3, .router = true, .router_bias = true},
    {.score = MOEC_SCORE_SIGMOID, .renorm = true, .scale = 1.7, .router = true, .router_bias = true},
    {.score = MOEC_SCORE_SIGMOID, .slots = 3, .router = true},
    {.choice = MOEC_CHOOSE_TOP_K_SOFTMAX, .clamped = true, .biased = true, .router = true, .router_bias = true, .slots = 4},
    {.keep = EXPERTS, .slots = 4, .pairs = true, .renorm = true, .router = true},
};

/* ---- what groups want --------------------------------------------------------------------------------------------------- */

static void groups_want_their_members_mass(void **state)
{
    (void)state;
    enum { N = 50, LD = 7, K = 3 };
    static const int64_t first[] = {0, 1, 3, 6};
    static const int32_t member[] = {4, 0, 2, 1, 3, 5}; /* 6 is left out */
    static const double share[] = {1, 1, 0.25, 0.5, 1, 0.125};
    float z[N * LD], out[N * K];
    for (int i = 0; i < N * LD; i++)
        z[i] = 6.0f * repair_normal();
    for (int s = 0; s < 4; s++) {
        const bool soft = s < 2, shared = s % 2;
        const moec_family family = {.score = soft ? MOEC_SCORE_SOFTMAX : MOEC_SCORE_SIGMOID};
        const moec_model model = {.family = &family};
        const moec_router_groups g = {first, member, shared ? share : NULL};
        assert_int_equal(moec_router_group(out, &g, K, z, LD, N, &model, NULL), MOEC_OK);
        for (int t = 0; t < N; t++)
            for (int k = 0; k < K; k++) {
                double sum = 0, most = 0;
                for (int64_t i = first[k]; i < first[k + 1]; i++) {
                    const double v = (double)z[t * LD + member[i]], by = shared ? share[i] : 1;
                    sum += by * exp(v);
                    most = fmax(most, by / (1 + exp(-v)));
                }
                const double want = soft ? log(sum) : log(most / (1 - most));
                assert_true(fabs((double)out[t * K + k] - want) < 1e-5 * (1 + fabs(want)));
            }
        for (int t = 0; t < N; t++) /* a group of one */
            assert_true(fabsf(out[t * K] - z[t * LD + 4]) < 1e-6f * fabsf(z[t * LD + 4]));
    }
}

static void groups_keep_large_logits(void **state)
{
    (void)state;
    const int64_t first[] = {0, 2};
    const int32_t member[] = {0, 1};
    for (int s = 0; s < 2; s++) {
        const moec_family family = {.score = s ? MOEC_SCORE_SIGMOID : MOEC_SCORE_SOFTMAX};
        const moec_model model = {.family = &family};
        const float z[] = {800.0f, 800.0f, -900.0f, -900.0f};
        float out[2];
        assert_int_equal(moec_router_group(out, &(moec_router_groups){first, member, NULL}, 1, z, 2, 2, &model, NULL), MOEC_OK);
        const double more = s ? 0 : log(2.0);
        assert_true(fabs((double)out[0] - 800 - more) < 1e-4 && fabs((double)out[1] + 900 - more) < 1e-4);
    }
}

static void groups_that_are_none(void **state)
{
    (void)state;
    const moec_family relu = {.score = MOEC_SCORE_RELU}, soft = {.score = MOEC_SCORE_SOFTMAX};
    const moec_model r = {.family = &relu}, m = {.family = &soft};
    const int64_t first[] = {0, 1}, none[] = {0, 0};
    const int32_t member[] = {0};
    const double over[] = {1.5}, nil[] = {0.0}, nan[] = {(double)NAN};
    const float z[] = {1.0f};
    float out[1];
    assert_int_equal(moec_router_group(out, &(moec_router_groups){first, member, NULL}, 1, z, 1, 1, &r, NULL), MOEC_EINVAL);
    assert_int_equal(moec_router_group(out, &(moec_router_groups){none, member, NULL}, 1, z, 1, 1, &m, NULL), MOEC_EINVAL);
    assert_int_equal(moec_router_group(out, &(moec_router_groups){first, member, over}, 1, z, 1, 1, &m, NULL), MOEC_EINVAL);
    assert_int_equal(moec_router_group(out, &(moec_router_groups){first, member, nil}, 1, z, 1, 1, &m, NULL), MOEC_EINVAL);
    assert_int_equal(moec_router_group(out, &(moec_router_groups){first, member, nan}, 1, z, 1, 1, &m, NULL), MOEC_EINVAL);
}

/* ---- a layer whose router is wrong ------------------------------------------------------------------------------------------ */

/* rows [keep,HIDDEN] as float64 */
static void rows_of(double *rows, const fixture *f)
{
    float v[EXPERTS * HIDDEN];
    moec_weight_read(v, HIDDEN, &f->task.router, 0, f->r.keep, 0, HIDDEN);
    for (int64_t i = 0; i < f->r.keep * HIDDEN; i++)
        rows[i] = (double)v[i];
}

static void logits_of(double *z, const fixture *f, const double *rows, int64_t t)
{
    for (int64_t k = 0; k < f->r.keep; k++) {
        z[k] = f->r.router_bias ? (double)f->router_bias[k] : 0;
        for (int64_t j = 0; j < HIDDEN; j++)
            z[k] += rows[k * HIDDEN + j] * (double)f->x[t * HIDDEN + j];
    }
}

/* Selections by the rows as they are. */
static void route(fixture *f)
{
    moec_fit *fit;
    assert_int_equal(moec__fit_new(&fit, &f->task, 1, 1, 1, true, NULL), MOEC_OK);
    assert_int_equal(moec__fit_read(fit, 0, 1, 0, 1, NULL), MOEC_OK);
    assert_int_equal(moec__fit_route(f->ids, f->gates, fit, NULL), MOEC_OK);
    moec__fit_free(fit);
}

/* Targets by the router as it is; then its rows are moved by `size`, and everything routed by them. */
static void lead_astray(fixture *f, rules r, float size)
{
    repair_setup(f, r);
    repair_aim(f, 0.01f);
    repair_shake(&f->router, size);
    if (r.router)
        route(f);
    repair_start(f);
}

static bool run(fixture *f, const float *want, double lambda)
{
    moec_err err = {MOEC_OK, ""};
    bool taken = false;
    const moec_router_opts o = {.lambda = lambda, .reach = 0.02};
    moec_status st = moec_repair_router(&taken, &f->task, want, &o, &err);
    if (st != MOEC_OK)
        print_error("%s\n", err.text);
    assert_int_equal(st, MOEC_OK);
    return taken;
}

/* Solves a x = b for n unknowns and m right-hand sides b [n,m], in place, by elimination with pivots. */
static void eliminate(double *a, double *b, int64_t n, int64_t m)
{
    for (int64_t c = 0; c < n; c++) {
        int64_t best = c;
        for (int64_t r = c; r < n; r++)
            best = fabs(a[r * n + c]) > fabs(a[best * n + c]) ? r : best;
        for (int64_t j = 0; j < n + m; j++) {
            double *p = j < n ? &a[c * n + j] : &b[c * m + j - n], *q = j < n ? &a[best * n + j] : &b[best * m + j - n], v = *p;
            *p = *q;
            *q = v;
        }
        for (int64_t r = 0; r < n; r++) {
            const double k = r == c ? 0 : a[r * n + c] / a[c * n + c];
            for (int64_t j = 0; j < n; j++)
                a[r * n + j] -= k * a[c * n + j];
            for (int64_t j = 0; j < m; j++)
                b[r * m + j] -= k * b[c * m + j];
        }
    }
    for (int64_t r = 0; r < n; r++)
        for (int64_t j = 0; j < m; j++)
            b[r * m + j] /= a[r * n + r];
}

/* rows += the solution for changes c [n_fit,keep] */
static void normal_equations(double *rows, const fixture *f, const double *c, double lambda)
{
    const int64_t K = f->r.keep;
    double a[HIDDEN * HIDDEN] = {0}, b[HIDDEN * EXPERTS] = {0}, trace = 0;
    for (int64_t t = 0; t < f->r.n_fit; t++) {
        const float *x = f->x + t * HIDDEN;
        for (int64_t i = 0; i < HIDDEN; i++) {
            const double wx = (double)f->weight[t] * (double)x[i];
            for (int64_t j = 0; j < HIDDEN; j++)
                a[i * HIDDEN + j] += wx * (double)x[j];
            for (int64_t k = 0; k < K; k++)
                b[i * K + k] += wx * c[t * K + k];
        }
    }
    for (int64_t i = 0; i < HIDDEN; i++)
        trace += a[i * HIDDEN + i];
    for (int64_t i = 0; i < HIDDEN; i++)
        a[i * HIDDEN + i] += lambda / HIDDEN * trace;
    eliminate(a, b, HIDDEN, K);
    for (int64_t k = 0; k < K; k++)
        for (int64_t i = 0; i < HIDDEN; i++)
            rows[k * HIDDEN + i] += b[i * K + k];
}

static void rows_are(const fixture *f, const double *want, double tolerance)
{
    double rows[EXPERTS * HIDDEN];
    rows_of(rows, f);
    for (int64_t i = 0; i < f->r.keep * HIDDEN; i++)
        if (!(fabs(rows[i] - want[i]) < tolerance))
            fail_msg("row %d, column %d: %g, not %g", (int)(i / HIDDEN), (int)(i % HIDDEN), rows[i], want[i]);
}

static void rows_solve_the_normal_equations(void **state)
{
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(kinds); i++)
        for (int strong = 0; strong < 2; strong++) {
            fixture f;
            rules r = kinds[i];
            r.n = 1800; /* more than one block of tokens is summed */
            const double lambda = strong ? 0.3 : 0.0;
            repair_seed = 7 + i;
            repair_setup(&f, r);
            double right[EXPERTS * HIDDEN], rows[EXPERTS * HIDDEN], z[EXPERTS], now[EXPERTS];
            rows_of(right, &f);
            repair_teardown(&f);
            repair_seed = 7 + i;
            lead_astray(&f, r, 0.2f);
            rows_of(rows, &f);
            const int64_t K = f.r.keep;
            float *want = calloc((size_t)(f.r.n_fit * K), sizeof *want);
            double *c = calloc((size_t)(f.r.n_fit * K), sizeof *c);
            assert_true(want && c);
            for (int64_t t = 0; t < f.r.n_fit; t++) {
                double mean = 0;
                logits_of(z, &f, right, t);
                logits_of(now, &f, rows, t);
                for (int64_t k = 0; k < K; k++) {
                    want[t * K + k] = (float)z[k] + (f.r.score == MOEC_SCORE_SOFTMAX ? 50.0f : 0.0f); /* which is not seen */
                    mean += f.r.score == MOEC_SCORE_SOFTMAX ? (z[k] - now[k]) / (double)K : 0;
                }
                for (int64_t k = 0; k < K; k++)
                    c[t * K + k] = z[k] - now[k] - mean;
            }
            const double before = moec_repair_missing(&f.task).held;
            normal_equations(rows, &f, c, lambda);
            assert_true(run(&f, want, lambda));
            rows_are(&f, rows, 2e-4);
            repair_rest_is_right(&f, 1e-3);
            assert_true(moec_repair_missing(&f.task).held < (strong ? 0.5 : 0.02) * before);
            free(want);
            free(c);
            repair_teardown(&f);
        }
}

/* Experts 1 and 2 of the source had the same row but for a constant, and become one: its row and one constant are the exact
 * answer, which the constant column of x lets the fit find. */
static void a_merged_pair_is_exact(void **state)
{
    (void)state;
    fixture f;
    static const int64_t first[] = {0, 2, 3, 4, 5};
    static const int32_t member[] = {0, 1, 2, 3, 4};
    const moec_router_groups g = {first, member, NULL};
    double rows[EXPERTS * HIDDEN], z[EXPERTS], off = 0;
    repair_setup(&f, (rules){.renorm = true, .router = true, .n = 900});
    for (int64_t t = 0; t < f.r.n; t++)
        f.x[t * HIDDEN] = 1.0f;
    repair_aim(&f, 0.0f);
    float *source = calloc((size_t)f.r.n * 5, sizeof *source), *want = calloc((size_t)f.r.n * 4, sizeof *want);
    assert_true(source && want);
    rows_of(rows, &f);
    for (int64_t t = 0; t < f.r.n; t++) {
        logits_of(z, &f, rows, t);
        source[t * 5] = (float)z[0] + 1.5f;
        source[t * 5 + 1] = (float)z[0] - 0.7f;
        for (int k = 1; k < 4; k++)
            source[t * 5 + k + 1] = (float)z[k];
    }
    assert_int_equal(moec_router_group(want, &g, 4, source, 5, f.r.n, &f.model, NULL), MOEC_OK);
    /* the layer by those logits is what is wanted */
    const float with = (float)(rows[0] + log(exp(1.5) + exp(-0.7))), plain = (float)rows[0];
    assert_int_equal(moec_weight_write(&f.task.router, &with, 1, 0, 1, 0, 1, NULL), MOEC_OK);
    route(&f);
    repair_aim(&f, 0.0f);
    assert_int_equal(moec_weight_write(&f.task.router, &plain, 1, 0, 1, 0, 1, NULL), MOEC_OK);
    route(&f);
    repair_start(&f);
    const double before = moec_repair_missing(&f.task).held;
    assert_true(before > 0 && run(&f, want, 0.0));
    assert_true(moec_repair_missing(&f.task).held < 1e-6 * before);
    rows_of(rows, &f);
    for (int64_t t = 0; t < f.r.n; t++) { /* all logits but for one number that a token's have in common */
        double mean = 0;
        logits_of(z, &f, rows, t);
        for (int k = 0; k < 4; k++)
            mean += (z[k] - (double)want[t * 4 + k]) / 4;
        for (int k = 0; k < 4; k++)
            off = fmax(off, fabs(z[k] - (double)want[t * 4 + k] - mean));
    }
    assert_true(off < 1e-4);
    free(source);
    free(want);
    repair_teardown(&f);
}

/* ---- what tokens want ------------------------------------------------------------------------------------------------------- */

/* Weights of the chosen by logits z [keep]. */
static void weights_of(double *g, const fixture *f, const double *z, const int64_t *row, int64_t n)
{
    double s[EXPERTS], total = 0, sum = 0;
    for (int64_t k = 0; k < f->r.keep; k++)
        total += exp(z[k]);
    for (int64_t k = 0; k < f->r.keep; k++)
        s[k] = f->r.score == MOEC_SCORE_SIGMOID ? 1 / (1 + exp(-z[k])) : exp(z[k]) / total;
    for (int64_t j = 0; j < n; j++)
        sum += s[row[j]];
    for (int64_t j = 0; j < n; j++)
        g[j] = f->r.scale * s[row[j]] / (f->r.renorm || f->r.choice == MOEC_CHOOSE_TOP_K_SOFTMAX ? sum : 1);
}

/* c [keep] of token t, derivatives by differences */
static void wish(double *c, const fixture *f, const double *rows, double (*w)[EXPERT_VALUES], int64_t t)
{
    const int64_t n = f->r.slots, shift = f->r.keep < EXPERTS;
    double z[EXPERTS], g[MOST_SLOTS], up[MOST_SLOTS], out[MOST_SLOTS][HIDDEN] = {{0}}, d[MOST_SLOTS][HIDDEN];
    double m[MOST_SLOTS * MOST_SLOTS], b[MOST_SLOTS], size = 0;
    int64_t row[MOST_SLOTS];
    memset(c, 0, (size_t)f->r.keep * sizeof *c);
    logits_of(z, f, rows, t);
    for (int64_t j = 0; j < n; j++) {
        row[j] = f->ids[t * n + j] - shift;
        repair_add(out[j], f, w[f->ids[t * n + j]], f->ids[t * n + j], f->x + t * HIDDEN, 1);
    }
    for (int64_t j = 0; j < n; j++) {
        const double was = z[row[j]], h = 1e-5;
        z[row[j]] = was + h;
        weights_of(up, f, z, row, n);
        z[row[j]] = was - h;
        weights_of(g, f, z, row, n);
        z[row[j]] = was;
        for (int64_t i = 0; i < HIDDEN; i++) {
            d[j][i] = 0;
            for (int64_t e = 0; e < n; e++)
                d[j][i] += (up[e] - g[e]) / (2 * h) * out[e][i];
        }
    }
    for (int64_t i = 0; i < HIDDEN; i++)
        size += (double)f->y[t * HIDDEN + i] * (double)f->y[t * HIDDEN + i];
    for (int64_t j = 0; j < n; j++) {
        b[j] = 0;
        for (int64_t e = 0; e < n; e++) {
            m[j * n + e] = e == j ? 0.02 * size : 0;
            for (int64_t i = 0; i < HIDDEN; i++)
                m[j * n + e] += d[j][i] * d[e][i];
        }
        for (int64_t i = 0; i < HIDDEN; i++)
            b[j] += d[j][i] * (double)f->rest[t * HIDDEN + i];
    }
    eliminate(m, b, n, 1);
    for (int64_t j = 0; j < n; j++)
        c[row[j]] = fmax(-3, fmin(3, b[j]));
}

static void tokens_wish_by_gauss_and_newton(void **state)
{
    (void)state;
    double (*w)[EXPERT_VALUES] = malloc(EXPERTS * sizeof *w), rows[EXPERTS * HIDDEN];
    assert_non_null(w);
    for (size_t i = 0; i < MOEC_COUNT(kinds); i++) {
        fixture f;
        lead_astray(&f, kinds[i], 0.05f);
        double *c = calloc((size_t)(f.r.n_fit * f.r.keep), sizeof *c);
        assert_non_null(c);
        for (int32_t e = 0; e < EXPERTS; e++)
            repair_weights(w[e], &f, e);
        rows_of(rows, &f);
        for (int64_t t = 0; t < f.r.n_fit; t++)
            wish(c + t * f.r.keep, &f, rows, w, t);
        normal_equations(rows, &f, c, 1e-3);
        const double before = moec_repair_missing(&f.task).held;
        assert_true(run(&f, NULL, 1e-3));
        assert_true(moec_repair_missing(&f.task).held < before);
        rows_are(&f, rows, 1e-3);
        repair_rest_is_right(&f, 1e-3);
        free(c);
        repair_teardown(&f);
    }
    free(w);
}

/* ---- what is not taken ----------------------------------------------------------------------------------------------------- */

typedef struct snapshot {
    unsigned char *map;
    float *rest, *gates;
    int32_t *ids;
} snapshot;

static void *copy(const void *from, size_t n)
{
    void *to = malloc(n);
    assert_non_null(to);
    return memcpy(to, from, n);
}

static snapshot take(const fixture *f)
{
    const size_t cells = (size_t)(f->r.n * f->r.slots);
    return (snapshot){copy(f->map, f->map_bytes), copy(f->rest, (size_t)(f->r.n * HIDDEN) * sizeof *f->rest),
                      copy(f->gates, cells * sizeof *f->gates), copy(f->ids, cells * sizeof *f->ids)};
}

static bool same(snapshot s, const fixture *f)
{
    const size_t cells = (size_t)(f->r.n * f->r.slots);
    const bool all = memcmp(s.map, f->map, f->map_bytes) == 0 && memcmp(s.ids, f->ids, cells * sizeof *f->ids) == 0 &&
                     memcmp(s.rest, f->rest, (size_t)(f->r.n * HIDDEN) * sizeof *f->rest) == 0 &&
                     memcmp(s.gates, f->gates, cells * sizeof *f->gates) == 0;
    free(s.map);
    free(s.rest);
    free(s.gates);
    free(s.ids);
    return all;
}

/* Held-out tokens want what they have; then there is nothing to be fitted to, or no router, or rows that F16 cannot hold. */
static void refused_is_as_before(void **state)
{
    (void)state;
    for (int i = 0; i < 4; i++) {
        fixture f;
        lead_astray(&f, (rules){.renorm = true, .router = i != 2, .dtype = i == 3 ? MOEC_F16 : MOEC_F32}, i == 2 ? 0.0f : 0.1f);
        float *want = calloc((size_t)(f.r.n_fit * f.r.keep), sizeof *want);
        assert_non_null(want);
        for (int64_t t = 0; i == 3 && t < f.r.n_fit * f.r.keep; t++)
            want[t] = 1e7f * repair_normal();
        for (int64_t j = f.r.n_fit * HIDDEN; j < f.r.n * HIDDEN; j++)
            f.rest[j] = 1e-4f * repair_normal();
        f.task.n_fit = i == 1 ? 0 : f.r.n_fit;
        const snapshot before = take(&f);
        assert_false(run(&f, i == 3 ? want : NULL, 1e-3));
        assert_true(same(before, &f));
        free(want);
        repair_teardown(&f);
    }
}

/* Rounded rows are what is measured and kept; with no held-out tokens the fitted ones decide. */
static void as_the_tensor_holds_them(void **state)
{
    (void)state;
    static const moec_dtype types[] = {MOEC_BF16, MOEC_F16};
    for (int i = 0; i < 2; i++) {
        fixture f;
        lead_astray(&f, (rules){.renorm = true, .router = true, .dtype = types[i], .n = 500, .n_fit = 500}, 0.1f);
        const double before = moec_repair_missing(&f.task).fit;
        assert_true(run(&f, NULL, 1e-3));
        assert_true(moec_repair_missing(&f.task).fit < before);
        repair_rest_is_right(&f, 1e-3);
        repair_teardown(&f);
    }
}

static void threads_make_no_difference(void **state)
{
    (void)state;
    snapshot first = {0};
    const int threads = moec_par_threads();
    for (int n = 1; n <= 3; n++) {
        fixture f;
        moec_par_set_threads(n);
        repair_seed = 99;
        lead_astray(&f, (rules){.renorm = true, .router = true, .n = 2000}, 0.1f);
        assert_true(run(&f, NULL, 1e-3));
        if (n > 1)
            assert_true(same(first, &f));
        first = take(&f);
        if (n == 3)
            assert_true(same(first, &f));
        repair_teardown(&f);
    }
    moec_par_set_threads(threads);
}

static void shift_of_load(void **state)
{
    (void)state;
    static const int32_t a[] = {0, 1, 0, 2, 0, 1, 0, -1}, b[] = {0, 1, 0, 1, 3, 1, 0, 1}, none[] = {-1, -1, -1, -1, -1, -1, -1, -1};
    double d;
    assert_int_equal(moec_load_shift(&d, a, a, 4, 2, 4, NULL), MOEC_OK);
    assert_true(d == 0.0);
    assert_int_equal(moec_load_shift(&d, a, b, 4, 2, 4, NULL), MOEC_OK);
    /* 4/7 2/7 1/7 0 and 3/8 4/8 0 1/8 */
    assert_true(fabs(d - 0.5 * (4.0 / 7 - 3.0 / 8 + 0.5 - 2.0 / 7 + 1.0 / 7 + 1.0 / 8)) < 1e-15);
    assert_int_equal(moec_load_shift(&d, a, none, 4, 2, 4, NULL), MOEC_OK);
    assert_true(d == 0.0);
    assert_int_equal(moec_load_shift(&d, (int32_t[]){0, 0}, (int32_t[]){1, 1}, 1, 2, 2, NULL), MOEC_OK);
    assert_true(d == 1.0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(groups_want_their_members_mass), cmocka_unit_test(groups_keep_large_logits),
        cmocka_unit_test(groups_that_are_none),           cmocka_unit_test(rows_solve_the_normal_equations),
        cmocka_unit_test(a_merged_pair_is_exact),         cmocka_unit_test(tokens_wish_by_gauss_and_newton),
        cmocka_unit_test(refused_is_as_before),           cmocka_unit_test(as_the_tensor_holds_them),
        cmocka_unit_test(threads_make_no_difference),     cmocka_unit_test(shift_of_load),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
