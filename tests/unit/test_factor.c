/* Factors of matrices: eigenvectors, svd against LAPACK's own singular values and against C taken apart, rows against every other choice,
 * trains and bases that lose nothing, forms and budgets, plans as text, and what is refused. */
#include "base/mem.h"
#include "base/par.h"
#include "base/random.h"
#include "method/factor.h"
#include "num/linalg.h"
#include "run/apply.h"
#include "run/factor.h"
#include "run/preview.h"
#include "support/tiny.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

enum { R = 12, C = 20 };

static char *folder, *source, *out, *work;
static moec_model *model;
static moec_digest print;

static int set_up(void **state)
{
    (void)state;
    folder = tiny_folder();
    source = tiny_path(folder, "source");
    out = tiny_path(folder, "out");
    work = tiny_path(folder, "work");
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    moec_model_close(model);
    tiny_remove(folder);
    char *all[] = {folder, source, out, work};
    for (size_t i = 0; i < MOEC_COUNT(all); i++)
        moec_free(all[i]);
    return 0;
}

static void open_new(const tiny_spec *spec)
{
    moec_err err = {MOEC_OK, ""};
    moec_model_close(model);
    model = NULL;
    tiny_remove(source);
    tiny_remove(out);
    if (tiny_write(source, spec, &err) != MOEC_OK || moec_model_open(&model, source, &err) != MOEC_OK ||
        moec_ckpt_fingerprint(&print, model->ckpt, &err) != MOEC_OK)
        fail_msg("%s", err.text);
}

/* In [-1, 1). */
static double noise(uint64_t i)
{
    return (double)(moec_mix64(i) >> 11) * 0x1p-52 - 1.0;
}

static void fill(float *w, int64_t n, uint64_t seed)
{
    for (int64_t i = 0; i < n; i++)
        w[i] = (float)noise(seed * 1000003u + (uint64_t)i);
}

/* c [n,n] = X^T X of n + 5 rows of noise, uneven by column. */
static void covariance(double *c, int64_t n, uint64_t seed)
{
    memset(c, 0, (size_t)(n * n) * sizeof *c);
    for (int64_t t = 0; t < n + 5; t++)
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < n; j++)
                c[i * n + j] += noise(seed + (uint64_t)(t * n + i)) * noise(seed + (uint64_t)(t * n + j)) * (double)((1 + i) * (1 + j));
}

static double far(const float *a, const float *b, int64_t n)
{
    double most = 0.0;
    for (int64_t i = 0; i < n; i++)
        most = fmax(most, fabs((double)a[i] - (double)b[i]));
    return most;
}

/* --- eigenvectors ------------------------------------------------------------------------------------------------------ */

static void test_eigen(void **state)
{
    (void)state;
    enum { N = 9, K = 4 };
    double a[N * N], keep[N * N], v[K * N], w[K];
    moec_err err;
    covariance(keep, N, 7);
    memcpy(a, keep, sizeof a);
    assert_int_equal(moec_eigen(w, v, a, N, K, MOEC_EIGEN_LARGEST, &err), MOEC_OK);
    for (int k = 0; k < K; k++) {
        double most = 0.0, first = 0.0;
        assert_true(k == 0 || w[k] <= w[k - 1]);
        for (int i = 0; i < N; i++) {
            double av = 0.0;
            for (int j = 0; j < N; j++)
                av += keep[i * N + j] * v[k * N + j];
            assert_true(fabs(av - w[k] * v[k * N + i]) < 1e-9 * w[0]);
            first = fabs(v[k * N + i]) > most ? v[k * N + i] : first;
            most = fmax(most, fabs(v[k * N + i]));
        }
        assert_true(first > 0.0);
        for (int l = 0; l <= k; l++) {
            double dot = 0.0;
            for (int i = 0; i < N; i++)
                dot += v[k * N + i] * v[l * N + i];
            assert_true(fabs(dot - (k == l)) < 1e-12);
        }
    }
    double ones[4] = {2.0, 0.0, 0.0, 2.0}, one[2]; /* two equal ones: any vector, of length 1 */
    assert_int_equal(moec_eigen(w, one, ones, 2, 1, MOEC_EIGEN_LARGEST, &err), MOEC_OK);
    assert_true(fabs(w[0] - 2.0) < 1e-15 && fabs(one[0] * one[0] + one[1] * one[1] - 1.0) < 1e-12);
    double zero[9] = {0}, z[9];
    assert_int_equal(moec_eigen(w, z, zero, 3, 3, MOEC_EIGEN_LARGEST, &err), MOEC_OK);
    double bad[4] = {1.0, 0.0, (double)NAN, 1.0};
    assert_int_equal(moec_eigen(w, z, bad, 2, 1, MOEC_EIGEN_LARGEST, &err), MOEC_ENUMERIC);
    double single[1] = {-3.0};
    assert_int_equal(moec_eigen(w, z, single, 1, 1, MOEC_EIGEN_LARGEST, &err), MOEC_OK);
    assert_true(w[0] == -3.0 && z[0] == 1.0);
}

/* Of a tall matrix they come from a smaller one than of W C W^T, and are the same. */
static void test_lead(void **state)
{
    (void)state;
    enum { TALL = 23, WIDE = 9, K = 4 };
    double w[TALL * WIDE], c[WIDE * WIDE], wc[TALL * WIDE], g[TALL * TALL], p[WIDE * TALL], want[WIDE * TALL];
    moec_err err;
    covariance(c, WIDE, 5);
    for (int whole = 0; whole < 4; whole++) { /* with c, without; a row and a column of 0 */
        const int64_t r = whole % 2 ? WIDE : K;
        const double *by = whole < 2 ? c : NULL;
        for (int i = 0; i < TALL * WIDE; i++)
            w[i] = i / WIDE == 3 || (whole == 2 && i % WIDE == 1) ? 0.0 : noise((uint64_t)i);
        for (int o = 0; o < TALL; o++)
            for (int i = 0; i < WIDE; i++) {
                wc[o * WIDE + i] = by ? 0.0 : w[o * WIDE + i];
                for (int j = 0; by && j < WIDE; j++)
                    wc[o * WIDE + i] += w[o * WIDE + j] * c[j * WIDE + i];
            }
        moec_dgemm(false, true, TALL, TALL, WIDE, 1.0, wc, WIDE, w, WIDE, 0.0, g, TALL);
        assert_int_equal(moec_eigen(NULL, want, g, TALL, r, MOEC_EIGEN_LARGEST, &err), MOEC_OK);
        assert_int_equal(moec_factor_lead(p, w, by, TALL, WIDE, r, &err), MOEC_OK);
        for (int i = 0; i < r; i++)
            for (int j = 0; j < r; j++) {
                double same = 0.0;
                for (int o = 0; o < TALL; o++)
                    same += p[i * TALL + o] * want[j * TALL + o];
                assert_true(fabs(fabs(same) - (i == j)) < 1e-9);
            }
    }
}

/* --- svd --------------------------------------------------------------------------------------------------------------- */

typedef struct factors {
    float a[R * R], b[R * C], rows[R * C], back[R * C];
    int32_t index[R];
} factors;

static void factor(factors *f, const moec_factor_shape *s, const float *w, const double *c)
{
    moec_err err = {MOEC_OK, ""};
    float *piece[] = {f->a, f->b, f->rows};
    if (moec_factor_matrix(piece, f->index, s, w, c, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    assert_int_equal(moec_factor_restore(f->back, (const float *const *)piece, f->index, s, &err), MOEC_OK);
}

static double error_of(const float *w, const float *v, const double *c)
{
    double lost, whole;
    moec_err err;
    assert_int_equal(moec_factor_error(&lost, &whole, w, v, c, R, C, &err), MOEC_OK);
    assert_true(whole > 0.0);
    return lost;
}

/* Eigenvalues of (W L)(W L)^T, L L^T = C, are the squared singular values of W C^(1/2): what rank r leaves of them is the least error
 * that there is (Eckart, Young), and W' = P P^T W reaches it. */
static void test_svd(void **state)
{
    (void)state;
    float w[R * C];
    double c[C * C], l[C * C], wl[R * C] = {0}, g[R * R], value[R], vector[R * R];
    factors f;
    moec_err err;
    fill(w, R * C, 1);
    covariance(c, C, 99);
    memcpy(l, c, sizeof l);
    assert_true(moec_cholesky(l, C));
    for (int o = 0; o < R; o++)
        for (int j = 0; j < C; j++)
            for (int i = j; i < C; i++)
                wl[o * C + j] += (double)w[o * C + i] * l[i * C + j];
    moec_dgemm(false, true, R, R, C, 1.0, wl, C, wl, C, 0.0, g, R);
    assert_int_equal(moec_eigen(value, vector, g, R, R, MOEC_EIGEN_LARGEST, &err), MOEC_OK);
    for (int64_t r = 1; r < R; r++) {
        const moec_factor_shape s = {.kind = MOEC_FACTOR_SVD, .rows = R, .cols = C, .rank = r};
        double least = 0.0, plain, same;
        for (int64_t k = r; k < R; k++)
            least += value[k];
        factor(&f, &s, w, c);
        assert_true(fabs(error_of(w, f.back, c) - least) < 1e-5 * value[0]);
        plain = error_of(w, f.back, NULL);
        same = error_of(w, f.back, c);
        factor(&f, &s, w, NULL);
        assert_true(error_of(w, f.back, NULL) <= plain && error_of(w, f.back, c) >= same);
    }
    const moec_factor_shape all = {.kind = MOEC_FACTOR_SVD, .rows = R, .cols = C, .rank = R};
    factor(&f, &all, w, c);
    assert_true(far(f.back, w, R * C) < 1e-5);
}

/* A known decomposition: W = 3 u v^T + 1 x y^T. */
static void test_svd_by_hand(void **state)
{
    (void)state;
    const float w[4] = {3.0f, 0.0f, 0.0f, 1.0f};
    const double c[4] = {1.0, 0.0, 0.0, 16.0}; /* the second input is four times as large: 3 against 4 */
    const moec_factor_shape s = {.kind = MOEC_FACTOR_SVD, .rows = 2, .cols = 2, .rank = 1};
    float a[2], b[2], *piece[] = {a, b};
    moec_err err;
    assert_int_equal(moec_factor_matrix(piece, NULL, &s, w, NULL, &err), MOEC_OK);
    assert_true(fabsf(a[0] - 1.0f) < 1e-6f && fabsf(a[1]) < 1e-6f && fabsf(b[0] - 3.0f) < 1e-6f && fabsf(b[1]) < 1e-6f);
    assert_int_equal(moec_factor_matrix(piece, NULL, &s, w, c, &err), MOEC_OK);
    assert_true(fabsf(a[0]) < 1e-6f && fabsf(a[1] - 1.0f) < 1e-6f && fabsf(b[0]) < 1e-6f && fabsf(b[1] - 1.0f) < 1e-6f);
}

static void test_damp(void **state)
{
    (void)state;
    double c[4] = {1.0, 0.5, 0.5, 3.0}, zero[4] = {0}, bad[4] = {(double)INFINITY, 0, 0, 1};
    assert_true(moec_factor_damp(c, 2, 0.5));
    assert_true(c[0] == 2.0 && c[1] == 0.5 && c[3] == 4.0);
    assert_false(moec_factor_damp(zero, 2, 0.5));
    assert_false(moec_factor_damp(bad, 2, 0.5));
}

/* --- rows -------------------------------------------------------------------------------------------------------------- */

static void test_rows(void **state)
{
    (void)state;
    enum { K = 3, N = 7, M = 5 };
    double s[N * M], c[M * M], best = (double)INFINITY;
    int32_t row[K];
    int least = 0;
    moec_err err;
    for (int i = 0; i < N * M; i++)
        s[i] = noise(500 + (uint64_t)i);
    covariance(c, M, 31);
    for (int set = 0; set < 1 << N; set++) { /* every choice of K rows: what the others lose */
        double lost = 0.0;
        if (__builtin_popcount((unsigned)set) != K)
            continue;
        for (int o = 0; o < N; o++)
            for (int i = 0; i < M && !(set >> o & 1); i++)
                for (int j = 0; j < M; j++)
                    lost += s[o * M + i] * c[i * M + j] * s[o * M + j];
        if (lost < best) {
            best = lost;
            least = set;
        }
    }
    assert_int_equal(moec_factor_rows(row, K, s, c, N, M, &err), MOEC_OK);
    assert_int_equal(1 << row[0] | 1 << row[1] | 1 << row[2], least);
    assert_true(row[0] < row[1] && row[1] < row[2]);
    double same[6] = {1, 1, -1, 1, 1, 1};
    assert_int_equal(moec_factor_rows(row, 2, same, NULL, 3, 2, &err), MOEC_OK); /* ties: the lower */
    assert_true(row[0] == 0 && row[1] == 1);
}

/* Kept rows come back as they are, and the others no worse than by the first A B. */
static void test_rows_and_rank(void **state)
{
    (void)state;
    float w[R * C];
    double c[C * C], rest = 0.0, first = 0.0;
    factors f, plain;
    fill(w, R * C, 3);
    covariance(c, C, 5);
    const moec_factor_shape s = {.kind = MOEC_FACTOR_ROWS, .rows = R, .cols = C, .rank = 4, .keep = 3},
                            low = {.kind = MOEC_FACTOR_SVD, .rows = R, .cols = C, .rank = 4};
    factor(&f, &s, w, c);
    factor(&plain, &low, w, c);
    for (int k = 0; k < 3; k++) {
        assert_true(f.index[k] >= 0 && f.index[k] < R && (k == 0 || f.index[k] > f.index[k - 1]));
        assert_true(far(f.back + f.index[k] * C, w + f.index[k] * C, C) < 1e-5);
        memcpy(plain.back + f.index[k] * C, w + f.index[k] * C, C * sizeof *w);
    }
    rest = error_of(w, f.back, c);
    first = error_of(w, plain.back, c);
    assert_true(rest <= first * (1.0 + 1e-6));
    const moec_factor_shape none = {.kind = MOEC_FACTOR_ROWS, .rows = R, .cols = C, .rank = 4};
    factor(&f, &none, w, c);
    factor(&plain, &low, w, c);
    assert_true(far(f.back, plain.back, R * C) == 0.0);
}

/* The same matrix as svd's, whatever the rank. */
static void test_pivot(void **state)
{
    (void)state;
    float w[R * C];
    double c[C * C];
    factors f, plain;
    fill(w, R * C, 13);
    covariance(c, C, 14);
    for (int64_t r = 1; r < R; r++) {
        const moec_factor_shape s = {.kind = MOEC_FACTOR_PIVOT, .rows = R, .cols = C, .rank = r},
                                low = {.kind = MOEC_FACTOR_SVD, .rows = R, .cols = C, .rank = r};
        bool there[R] = {false};
        factor(&f, &s, w, c);
        factor(&plain, &low, w, c);
        assert_true(far(f.back, plain.back, R * C) < 1e-5);
        for (int k = 0; k < R; k++) {
            assert_true(f.index[k] >= 0 && f.index[k] < R && !there[f.index[k]]);
            there[f.index[k]] = true;
        }
    }
    memset(w, 0, sizeof w);
    w[3] = 2.0f; /* of rank 1 */
    const moec_factor_shape s = {.kind = MOEC_FACTOR_PIVOT, .rows = R, .cols = C, .rank = 4};
    factor(&f, &s, w, NULL);
    assert_true(far(f.back, w, R * C) < 1e-6);
}

/* --- base and delta ------------------------------------------------------------------------------------------------------ */

static void test_base(void **state)
{
    (void)state;
    float w[R * C];
    double c[C * C];
    factors f;
    fill(w, R * C, 4);
    covariance(c, C, 6);
    fill(f.rows, R * C, 8);
    const moec_factor_shape s = {.kind = MOEC_FACTOR_BASE, .rows = R, .cols = C, .rank = R};
    factor(&f, &s, w, c);
    assert_true(far(f.back, w, R * C) < 1e-5);
    memcpy(w, f.rows, sizeof w); /* no delta at all */
    const moec_factor_shape one = {.kind = MOEC_FACTOR_BASE, .rows = R, .cols = C, .rank = 1};
    factor(&f, &one, w, c);
    assert_true(far(f.back, w, R * C) < 1e-7);
}

/* --- trains ---------------------------------------------------------------------------------------------------------------- */

static void test_split(void **state)
{
    (void)state;
    static const struct {
        int64_t n, number, want[5];
    } cases[] = {{3, 96, {4, 6, 4}}, {3, 192, {4, 8, 6}}, {2, 7, {1, 7}}, {5, 768, {2, 4, 6, 4, 4}}, {4, 1, {1, 1, 1, 1}}, {3, 30, {2, 5, 3}}};
    for (size_t i = 0; i < MOEC_COUNT(cases); i++) {
        int64_t got[5] = {0}, all = 1, most = 0;
        moec_factor_split(got, cases[i].n, cases[i].number);
        for (int64_t k = 0; k < cases[i].n; k++) {
            all *= got[k];
            most = got[k] > most ? got[k] : most;
        }
        assert_int_equal(all, cases[i].number);
        if (cases[i].n == 3)
            assert_int_equal(got[1], most);
    }
}

static moec_factor_shape train_shape(int64_t cores, double share)
{
    moec_factor_shape s = {.kind = MOEC_FACTOR_MPO, .rows = R, .cols = C, .cores = cores};
    int64_t left = 1;
    moec_factor_split(s.out, cores, R);
    moec_factor_split(s.in, cores, C);
    s.bond[0] = s.bond[cores] = 1;
    for (int64_t k = 1; k < cores; k++) {
        left *= s.out[k - 1] * s.in[k - 1];
        const int64_t full = left < R * C / left ? left : R * C / left;
        s.bond[k] = (int64_t)((double)full * share);
        s.bond[k] = s.bond[k] < 1 ? 1 : s.bond[k];
    }
    return s;
}

static void train(float *back, const moec_factor_shape *s, const float *w)
{
    moec_err err = {MOEC_OK, ""};
    moec_factor_piece piece[MOEC_FACTOR_PIECES];
    float *p[MOEC_FACTOR_PIECES] = {NULL};
    const int n = moec_factor_pieces(piece, s);
    assert_int_equal(n, s->cores);
    for (int k = 0; k < n; k++)
        assert_int_equal(MOEC_NEW(p[k], (size_t)moec_factor_piece_values(&piece[k]), &err), MOEC_OK);
    if (moec_factor_matrix(p, NULL, s, w, NULL, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    assert_int_equal(moec_factor_restore(back, (const float *const *)p, NULL, s, &err), MOEC_OK);
    for (int k = 0; k < n; k++)
        moec_free(p[k]);
}

static void test_train(void **state)
{
    (void)state;
    float w[R * C], back[R * C];
    fill(w, R * C, 11);
    for (int64_t cores = 2; cores <= MOEC_FACTOR_CORES; cores++) {
        double before = 0.0;
        for (int share = 4; share >= 1; share--) {
            const moec_factor_shape s = train_shape(cores, 0.25 * share);
            train(back, &s, w);
            const double lost = error_of(w, back, NULL);
            if (share == 4)
                assert_true(far(back, w, R * C) < 1e-5); /* full bonds lose nothing */
            assert_true(lost >= before - 1e-6);
            before = lost;
        }
    }
    /* a Kronecker product has bonds of 1 */
    moec_factor_shape s = train_shape(2, 0.0);
    float a[R * C], b[R * C];
    fill(a, R * C, 21);
    fill(b, R * C, 22);
    for (int64_t o = 0; o < R; o++)
        for (int64_t i = 0; i < C; i++)
            w[o * C + i] = a[o / s.out[1] * s.in[0] + i / s.in[1]] * b[o % s.out[1] * s.in[1] + i % s.in[1]];
    train(back, &s, w);
    assert_true(far(back, w, R * C) < 1e-5);
    memset(w, 0, sizeof w);
    s = train_shape(3, 0.5);
    train(back, &s, w);
    assert_true(far(back, w, R * C) == 0.0);
    w[5] = NAN;
    moec_err err;
    float *none[MOEC_FACTOR_PIECES] = {a, b, back};
    assert_int_equal(moec_factor_matrix(none, NULL, &s, w, NULL, &err), MOEC_ENUMERIC);
}

/* --- plans ----------------------------------------------------------------------------------------------------------------- */

static moec_request request(double ratio)
{
    return (moec_request){.model = model, .fingerprint = print.hex, .ratio = ratio, .keep_rows = 0.25, .cores = 3,
                          .dtype = MOEC_DTYPE_COUNT};
}

static moec_plan *plan(const char *method, const moec_request *q)
{
    moec_plan *p;
    moec_err err = {MOEC_OK, ""};
    if (moec_method_plan(&p, MOEC_FACTOR, method, q, &err) != MOEC_OK)
        fail_msg("%s: %s", method, err.text);
    return p;
}

static void refuse(const char *method, const moec_request *q, const char *text)
{
    moec_plan *p = NULL;
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_method_plan(&p, MOEC_FACTOR, method, q, &err), MOEC_EINVAL);
    if (p || !strstr(err.text, text))
        fail_msg("%s: %s", method, err.text);
}

static const char *const methods[] = {"svd", "pivot", "mc-smoe", "base-delta", "mpo"};
static const double ratios[] = {0.5, 0.6, 0.7, 0.8, 0.9};

/* H 32, I 24, 8 experts, F32: 768 values a matrix. */
static void test_budget(void **state)
{
    (void)state;
    moec_err err;
    open_new(&(tiny_spec){.hidden = 32, .width = 24, .head_dim = 8});
    for (size_t k = 0; k < MOEC_COUNT(methods); k++)
        for (size_t i = 0; i < MOEC_COUNT(ratios); i++) {
            uint64_t small, dense;
            const moec_request q = request(ratios[i]);
            moec_plan *p = plan(methods[k], &q), *again;
            char *text, *second;
            moec_factor_sizes(&small, &dense, p, model);
            assert_int_equal(dense, 3 * 8 * 3 * 768 * 4);
            if ((double)small > ratios[i] * (double)dense || (double)small <= (ratios[i] - 0.1) * (double)dense)
                fail_msg("%s: %g becomes %g", methods[k], ratios[i], (double)small / (double)dense);
            snprintf(p->weights, sizeof p->weights, "none");
            assert_int_equal(moec_plan_check(p, model, print.hex, &err), MOEC_OK);
            assert_int_equal(moec_plan_to_text(&text, p, &err), MOEC_OK);
            assert_int_equal(moec_plan_parse(&again, text, strlen(text), "plan", &err), MOEC_OK);
            assert_int_equal(moec_plan_to_text(&second, again, &err), MOEC_OK);
            assert_string_equal(text, second);
            moec_free(text);
            moec_free(second);
            moec_plan_free(again);
            moec_plan_free(p);
        }
    moec_request q = request(0.5);
    moec_plan *p = plan("svd", &q);
    assert_int_equal(p->factor.rank[0], 6); /* 384 / 56 */
    assert_int_equal(p->factor.rank[1], 6);
    moec_plan_free(p);
    p = plan("pivot", &q); /* 8 * 48 + 24 > 384, 7 * 49 + 24; 32 rows: 343 + 32 */
    assert_int_equal(p->factor.rank[0], 7);
    assert_int_equal(p->factor.rank[1], 7);
    moec_plan_free(p);
    p = plan("base-delta", &q);
    assert_int_equal(p->factor.rank[0], 5); /* (4 - 1) 768 / (8 * 56) */
    moec_plan_free(p);
    p = plan("mc-smoe", &q); /* 6 of 24 rows: (384 - 6 * 32 - 6) / 56; 8 of 32: (384 - 8 * 24 - 8) / 56 */
    assert_int_equal(p->factor.rows[0], 6);
    assert_int_equal(p->factor.rank[0], 3);
    assert_int_equal(p->factor.rows[1], 8);
    assert_int_equal(p->factor.rank[1], 3);
    moec_plan_free(p);
    q.rank = 7;
    p = plan("svd", &q);
    assert_int_equal(p->factor.rank[1], 7);
    moec_plan_free(p);
    q.rank = 14; /* 14 * 56 > 768 */
    refuse("svd", &q, "as large as they are");
    q.rank = 0;
    q.ratio = 0.07;
    refuse("svd", &q, "leaves no rank");
    q.ratio = 0.01;
    refuse("mpo", &q, "bonds of 1");
    q.ratio = 0.2;
    refuse("mc-smoe", &q, "beside the kept rows");
    q.ratio = 0.15;
    refuse("base-delta", &q, "beside the base");
    q.ratio = 0.0;
    refuse("svd", &q, "expected more than 0%");
    q.ratio = 1.5;
    refuse("svd", &q, "expected more than 0%");
}

static void test_refused(void **state)
{
    (void)state;
    moec_request q;
    moec_err err;
    open_new(&(tiny_spec){.family = "gpt_oss"});
    q = request(0.5);
    q.kept = true;
    refuse("svd", &q, "--emit factored: gpt_oss: ");
    open_new(&(tiny_spec){0});
    q = request(0.8);
    moec_plan *p = plan("svd", &q);
    snprintf(p->weights, sizeof p->weights, "none");
    p->factor.rank[1] = 0;
    assert_int_equal(moec_plan_check(p, model, print.hex, &err), MOEC_EFORMAT);
    p->factor.rank[1] = 1 << 20;
    assert_int_equal(moec_plan_check(p, model, print.hex, &err), MOEC_EFORMAT);
    p->factor.rank[1] = 1;
    assert_int_equal(moec_plan_check(p, model, print.hex, &err), MOEC_OK);
    p->layer[1].rewritten = MOEC_PART_GATE;
    assert_int_equal(moec_plan_check(p, model, print.hex, &err), MOEC_EFORMAT);
    moec_plan_free(p);
    static const char *const bad[] = {
        "{\"kind\": \"svt\", \"emit\": \"dense\", \"rank\": [1, 1]}", "{\"kind\": \"svd\", \"emit\": \"small\", \"rank\": [1, 1]}",
        "{\"kind\": \"svd\", \"emit\": \"dense\", \"rank\": [1]}", "{\"kind\": \"svd\", \"emit\": \"dense\", \"rank\": [1, -1]}",
        "{\"kind\": \"svd\", \"emit\": \"dense\"}", "{\"kind\": \"mpo\", \"emit\": \"dense\", \"cores\": 9, \"bonds\": [1, 1]}",
        "{\"kind\": \"mpo\", \"emit\": \"dense\", \"cores\": 3, \"bonds\": [1, 1, 1]}", "{\"kind\": \"svd\", \"emit\": \"dense\", "
        "\"rank\": [1, 1], \"error\": [0.5]}", "{\"kind\": \"svd\", \"emit\": \"dense\", \"rank\": [1, 1], \"ranks\": 1}", "[]"};
    for (size_t i = 0; i < MOEC_COUNT(bad); i++) {
        char text[600];
        moec_plan *none = NULL;
        snprintf(text, sizeof text, "{\"moecompress_plan\": 1, \"kind\": \"prune\", \"model\": \"\", \"top_k\": 2, \"new_top_k\": 2, "
                 "\"factor\": %s, \"layers\": [{\"layer\": 0, \"experts\": 2, \"keep\": [0, 1]}]}", bad[i]);
        assert_int_equal(moec_plan_parse(&none, text, strlen(text), "plan", &err), MOEC_EFORMAT);
        assert_null(none);
    }
}

/* --- runs ------------------------------------------------------------------------------------------------------------------- */

static moec_corpus corpus_of(int32_t *ids, int64_t *start, moec_domain *domain)
{
    for (int64_t i = 0; i < 64; i++)
        ids[i] = (int32_t)(moec_mix64((uint64_t)i) % 64);
    for (int64_t i = 0; i <= 4; i++)
        start[i] = 16 * i;
    *domain = (moec_domain){.name = "text", .path = "text", .ids = ids, .n_ids = 64, .start = start, .n_windows = 4};
    return (moec_corpus){.domain = domain, .n_domains = 1};
}

static moec_status run(moec_factoring **f, moec_plan *p, const moec_corpus *c, moec_err *err)
{
    const moec_factor_opts o = {.corpus = c, .compute = MOEC_COMPUTE_F32, .work = work, .resume = true};
    return moec_factoring_run(f, p, model, &o, err);
}

/* The same bytes on one thread and on three, and after a run of which only the first layer was left. */
static void test_run(void **state)
{
    (void)state;
    moec_err err = {MOEC_OK, ""};
    int32_t ids[64];
    int64_t start[5];
    moec_domain domain;
    const moec_corpus c = corpus_of(ids, start, &domain);
    const int threads = moec_par_threads();
    for (size_t k = 0; k < MOEC_COUNT(methods); k++) {
        char digest[3][33], *dropped = NULL;
        open_new(&(tiny_spec){.hidden = 32, .width = 24, .head_dim = 8, .dtype = k % 2 ? MOEC_BF16 : MOEC_F32});
        const moec_request q = request(0.7);
        for (int turn = 0; turn < 3; turn++) {
            moec_plan *p = plan(methods[k], &q);
            moec_factoring *f = NULL;
            moec_par_set_threads(turn == 1 ? 3 : 1);
            if (run(&f, p, &c, &err) != MOEC_OK)
                fail_msg("%s: %s", methods[k], err.text);
            snprintf(digest[turn], sizeof digest[turn], "%s", p->weights);
            for (int64_t i = 0; i < 3 * p->n_layers; i++)
                assert_true(p->factor.error[i] >= 0.0 && p->factor.error[i] < 1.0);
            moec_preview v;
            assert_int_equal(moec_preview_new(&v, model, p, moec_factoring_weights(f), &err), MOEC_OK);
            moec_preview_release(&v);
            moec_factoring_close(f, turn > 0);
            if (turn == 0) { /* as a kill would leave it: factors of layer 1 are there, what they make is not, layer 2 is not begun */
                static const char *const names[] = {"layer-00001.safetensors", "layer-00002.safetensors",
                                                    "layer-00002-factors.safetensors"};
                for (size_t i = 0; i < MOEC_COUNT(names); i++) {
                    assert_int_equal(moec_format(&dropped, &err, "%s.partial/%s", work, names[i]), MOEC_OK);
                    assert_int_equal(remove(dropped), 0);
                    moec_free(dropped);
                }
            }
            moec_plan_free(p);
        }
        assert_string_equal(digest[0], digest[1]);
        assert_string_equal(digest[0], digest[2]);
    }
    moec_par_set_threads(threads);
}

static void test_write(void **state)
{
    (void)state;
    moec_err err = {MOEC_OK, ""};
    int32_t ids[64];
    int64_t start[5];
    moec_domain domain;
    const moec_corpus c = corpus_of(ids, start, &domain);
    for (int shards = 0; shards < 4; shards += 3)
        for (size_t k = 0; k < MOEC_COUNT(methods); k++) {
            moec_plan *p;
            moec_factoring *f = NULL;
            moec_apply_result r;
            moec_model *made = NULL;
            moec_ckpt *ckpt;
            uint64_t small, dense;
            open_new(&(tiny_spec){.hidden = 32, .width = 24, .head_dim = 8, .shards = shards, .dense_layer = 2});
            moec_request q = request(0.7);
            q.kept = true;
            p = plan(methods[k], &q);
            if (run(&f, p, &c, &err) != MOEC_OK)
                fail_msg("%s", err.text);
            const moec_apply_options opt = {.out = out, .fingerprint = print.hex, .weights = moec_factoring_weights(f)};
            if (moec_apply(&r, model, p, &opt, &err) != MOEC_OK)
                fail_msg("%s: %s", methods[k], err.text);
            moec_factor_sizes(&small, &dense, p, model);
            assert_int_equal(r.source_bytes - r.output_bytes, dense - small);
            assert_int_equal(moec_model_open(&made, out, &err), MOEC_EFORMAT);
            assert_non_null(strstr(err.text, "its experts are factors"));
            assert_int_equal(moec_ckpt_open(&ckpt, out, &err), MOEC_OK);
            assert_int_equal(moec_ckpt_bytes(ckpt), r.output_bytes);
            assert_null(moec_ckpt_find(ckpt, "model.layers.0.mlp.experts.0.gate_proj.weight"));
            assert_non_null(moec_ckpt_find(ckpt, "model.layers.0.mlp.experts.gate_proj"));
            assert_null(moec_ckpt_find(ckpt, "model.layers.1.mlp.experts.gate_proj"));
            moec_ckpt_close(ckpt);
            moec_factoring_close(f, true);
            moec_plan_free(p);
        }
}

/* Without text, and with weights that are not finite. */
static void test_no_text(void **state)
{
    (void)state;
    moec_err err = {MOEC_OK, ""};
    open_new(&(tiny_spec){.hidden = 32, .width = 24, .head_dim = 8});
    moec_request q = request(0.7);
    moec_plan *p = plan("mpo", &q);
    moec_factoring *f = NULL;
    if (run(&f, p, NULL, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    assert_int_equal(moec_factoring_unseen(f), 0);
    moec_factoring_close(f, true);
    moec_plan_free(p);
    const moec_weight w = model->layer[0].expert[1].up;
    FILE *file;
    char *path = tiny_path(source, "model.safetensors");
    size_t at = 0;
    for (size_t i = 0; i < moec_ckpt_count(model->ckpt); i++)
        if (moec_ckpt_at(model->ckpt, i) == w.of)
            at = (size_t)moec_ckpt_offset(model->ckpt, i);
    static const unsigned char nan_bytes[] = {0, 0, 0xc0, 0x7f};
    file = fopen(path, "r+b");
    assert_non_null(file);
    assert_int_equal(fseek(file, (long)at, SEEK_SET), 0);
    assert_int_equal(fwrite(nan_bytes, 1, 4, file), 4);
    fclose(file);
    moec_free(path);
    moec_model_close(model);
    assert_int_equal(moec_model_open(&model, source, &err), MOEC_OK);
    q.model = model;
    p = plan("mpo", &q);
    assert_int_equal(run(&f, p, NULL, &err), MOEC_ENUMERIC);
    assert_non_null(strstr(err.text, "up_proj"));
    moec_plan_free(p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_eigen), cmocka_unit_test(test_lead), cmocka_unit_test(test_svd), cmocka_unit_test(test_svd_by_hand), cmocka_unit_test(test_damp),
        cmocka_unit_test(test_rows), cmocka_unit_test(test_rows_and_rank), cmocka_unit_test(test_pivot), cmocka_unit_test(test_base), cmocka_unit_test(test_split),
        cmocka_unit_test(test_train), cmocka_unit_test(test_budget), cmocka_unit_test(test_refused), cmocka_unit_test(test_run),
        cmocka_unit_test(test_write), cmocka_unit_test(test_no_text),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
