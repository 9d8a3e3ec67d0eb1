/* Streams of codes, grids, and how their scales are found. */
#include "base/mem.h"
#include "base/random.h"
#include "method/quant.h"
#include "num/bits.h"
#include "num/grid_table.h"
#include "num/simd.h"

#include <limits.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

static uint64_t seed = 1;

static double uniform(void)
{
    return ((double)(moec_mix64(seed++) >> 11) + 0.5) * 0x1p-53;
}

static float normal(void)
{
    const double r = sqrt(-2.0 * log(uniform()));
    return (float)(r * cos(6.283185307179586 * uniform()));
}

/* Words that other programs' readers decode right: codes (7 i + 1) mod 2^bits. */
static void streams_are_those_of_clients(void **state)
{
    static const struct {
        int bits;
        uint32_t word[8];
    } known[] = {
        {2, {0xb1b1b1b1, 0xb1b1b1b1}},
        {3, {0xc14e5dc1, 0x5dc14e5d, 0x4e5dc14e}},
        {4, {0x2b4d6f81, 0xa3c5e709, 0x2b4d6f81, 0xa3c5e709}},
        {5, {0xc9db3d01, 0x571c1992, 0x7f1150f9, 0x0916e8d3, 0xd4d85f5e}},
        {6, {0x1d58f201, 0x7039cab9, 0xaa371538, 0x0d1bfe31, 0x7c2989b5, 0x693305fb}},
        {8, {0x160f0801, 0x322b241d, 0x4e474039, 0x6a635c55, 0x867f7871, 0xa29b948d, 0xbeb7b0a9, 0xdad3ccc5}},
    };
    (void)state;
    for (size_t k = 0; k < MOEC_COUNT(known); k++) {
        uint8_t code[32];
        uint32_t word[8];
        for (int i = 0; i < 32; i++)
            code[i] = (uint8_t)((7 * i + 1) % (1 << known[k].bits));
        moec_bits_pack(word, code, 32, known[k].bits);
        assert_memory_equal(word, known[k].word, (size_t)known[k].bits * sizeof *word);
    }
    for (int bits = 1; bits <= 8; bits++) {
        uint8_t code[96], again[96];
        uint32_t word[24];
        for (int i = 0; i < 96; i++)
            code[i] = (uint8_t)(moec_mix64((uint64_t)i) >> (64 - bits));
        moec_bits_pack(word, code, 96, bits);
        moec_bits_unpack(again, word, 96, bits);
        assert_memory_equal(code, again, sizeof code);
        for (int i = 0; i < 96 * bits; i++) /* bit by bit */
            assert_int_equal(word[i / 32] >> (i % 32) & 1, code[i / bits] >> (i % bits) & 1);
    }
}

static void groups_divide(void **state)
{
    (void)state;
    assert_int_equal(moec_quant_group(128, 2048, 32), 128);
    assert_int_equal(moec_quant_group(128, 1408, 32), 128);
    assert_int_equal(moec_quant_group(128, 96, 32), 32);
    assert_int_equal(moec_quant_group(128, 48, 32), 0);
    assert_int_equal(moec_quant_group(128, 48, 1), 16);
    assert_int_equal(moec_quant_group(0, 768, 32), 768);
    assert_int_equal(moec_quant_group(100, 50, 1), 50);
    assert_int_equal(moec_quant_group(3, 4, 1), 0);
    assert_int_equal(moec_quant_group(128, 0, 32), 0);
}

static void impossible_grids_are_refused(void **state)
{
    static const moec_qgrid bad[] = {{0, 4, false, MOEC_F16}, {9, 4, false, MOEC_F16}, {4, 0, false, MOEC_F16},
                                     {4, 3, false, MOEC_F16}, {1, 4, true, MOEC_F16}, {4, 4, false, MOEC_F64}};
    const moec_qgrid good = {4, 4, true, MOEC_BF16};
    moec_qcodes c;
    (void)state;
    for (size_t k = 0; k < MOEC_COUNT(bad); k++)
        assert_int_equal(moec_qcodes_new(&c, &bad[k], 2, 8, NULL), MOEC_EINVAL);
    assert_int_equal(moec_qcodes_new(&c, &good, -1, 8, NULL), MOEC_EINVAL);
    assert_int_equal(moec_qcodes_new(&c, &good, INT64_MAX / 2, 8, NULL), MOEC_ENOMEM);
    for (long left = 0; left < 3; left++) {
        moec_test_allocs_left = left;
        assert_int_equal(moec_qcodes_new(&c, &good, 2, 8, NULL), MOEC_ENOMEM);
        moec_test_allocs_left = LONG_MAX;
        assert_null(c.code);
    }
}

/* Scales, zero points and codes of one row of one group, and what comes back. */
static void row_is(int bits, bool zeros, moec_dtype type, int n, const float *w, float scale, int zero, const uint8_t *code,
                   const float *value)
{
    const moec_qgrid g = {bits, n, zeros, type};
    moec_qcodes c;
    float out[16];
    assert_int_equal(moec_qcodes_new(&c, &g, 1, n, NULL), MOEC_OK);
    assert_int_equal(moec_quant_range(&c, w, MOEC_QRANGE_MINMAX, NULL, 0, 1, NULL), MOEC_OK);
    assert_float_equal(c.scale[0], scale, 0.0f);
    if (zeros)
        assert_int_equal(c.zero[0], zero);
    moec_quant_nearest(&c, w, 0, 1);
    assert_memory_equal(c.code, code, (size_t)n);
    moec_quant_restore(out, &c, 0, 1);
    assert_memory_equal(out, value, (size_t)n * sizeof *out);
    moec_qcodes_release(&c);
}

static void rows_by_hand(void **state)
{
    (void)state;
    /* 2 bits: s = 2 * 3 / 3; -3 lies below the lowest level, 0.5, -0.5 and 1.5 halfway: to the even code */
    row_is(2, false, MOEC_F32, 5, (float[]){-3, 0.5f, -0.5f, -3, 2.9f}, 2.0f, 0, (uint8_t[]){0, 2, 2, 0, 3},
           (float[]){-4, 0, 0, -4, 2});
    row_is(2, false, MOEC_F32, 4, (float[]){-1.5f, 1.5f, 0.5f, -0.5f}, 1.0f, 0, (uint8_t[]){0, 3, 2, 2}, (float[]){-2, 1, 0, 0});
    row_is(2, true, MOEC_F32, 4, (float[]){-1, 0, 1, 2}, 1.0f, 1, (uint8_t[]){0, 1, 2, 3}, (float[]){-1, 0, 1, 2});
    row_is(2, true, MOEC_F32, 3, (float[]){1, 2, 3}, 1.0f, 0, (uint8_t[]){1, 2, 3}, (float[]){1, 2, 3}); /* 0 is in the range */
    row_is(3, true, MOEC_F32, 3, (float[]){-1, -7, -2}, 1.0f, 7, (uint8_t[]){6, 0, 5}, (float[]){-1, -7, -2});
    row_is(1, false, MOEC_F32, 4, (float[]){-1, 2, 3, 0}, 3.0f, 0, (uint8_t[]){0, 1, 1, 0}, (float[]){-1.5f, 1.5f, 1.5f, -1.5f});
    /* of one bit no code is 0: the least that there is, 2^-24 */
    row_is(1, false, MOEC_F16, 2, (float[]){0, 0}, 0x1p-24f, 0, (uint8_t[]){0, 0}, (float[]){-0x1p-25f, -0x1p-25f});
    row_is(8, false, MOEC_F32, 2, (float[]){0, 0}, 1.0f, 0, (uint8_t[]){128, 128}, (float[]){0, 0});
    row_is(4, true, MOEC_F16, 2, (float[]){0, 0}, 1.0f, 0, (uint8_t[]){0, 0}, (float[]){0, 0});
    /* 2 / 15 in F16 and BF16; too small for F16: its least value */
    row_is(4, false, MOEC_F16, 1, (float[]){1}, 0x1.11p-3f, 0, (uint8_t[]){15}, (float[]){7 * 0x1.11p-3f});
    row_is(4, false, MOEC_BF16, 1, (float[]){1}, 0x1.12p-3f, 0, (uint8_t[]){15}, (float[]){7 * 0x1.12p-3f});
    row_is(4, false, MOEC_F16, 1, (float[]){1e-9f}, 0x1p-24f, 0, (uint8_t[]){8}, (float[]){0});
}

static void scales_round_as_their_types(void **state)
{
    (void)state;
    for (uint32_t k = 0; k < 200000; k++) {
        uint32_t bits = k < 100000 ? (uint32_t)(moec_mix64(k) >> 33) : (uint32_t)(0x33000000u + (k - 100000) * 4096u); /* with ties */
        float x, back;
        bits &= 0x7fffffffu;
        memcpy(&x, &bits, sizeof x);
        if (isnan(x))
            continue;
        const uint16_t half = moec_to_f16(x), brain = moec_to_bf16(x);
        moec_dtypes[MOEC_F16].to_f32(&back, &half, 1);
        assert_true(moec_quant_scale(x, MOEC_F16) == (back > 0.0f ? back : 0x1p-24f));
        moec_dtypes[MOEC_BF16].to_f32(&back, &brain, 1);
        assert_true(moec_quant_scale(-x, MOEC_BF16) == -(back > 0.0f ? back : 0x1p-133f));
    }
}

static void unusable_values_are_refused(void **state)
{
    const moec_qgrid g = {2, 4, false, MOEC_F16};
    moec_qcodes c;
    (void)state;
    assert_int_equal(moec_qcodes_new(&c, &g, 1, 4, NULL), MOEC_OK);
    for (int how = 0; how < 2; how++) {
        assert_int_equal(moec_quant_range(&c, (float[]){1, NAN, 0, 0}, (moec_qrange)how, NULL, 0, 1, NULL), MOEC_ENUMERIC);
        assert_int_equal(moec_quant_range(&c, (float[]){1, -INFINITY, 0, 0}, (moec_qrange)how, NULL, 0, 1, NULL), MOEC_ENUMERIC);
        assert_int_equal(moec_quant_range(&c, (float[]){1e6f, 1, 0, 0}, (moec_qrange)how, NULL, 0, 1, NULL), MOEC_ENUMERIC);
        for (long left = 0; left < 3; left++) {
            moec_test_allocs_left = left;
            const moec_status st = moec_quant_range(&c, (float[]){1, 1, 0, 0}, (moec_qrange)how, NULL, 0, 1, NULL);
            moec_test_allocs_left = LONG_MAX;
            assert_int_equal(st, MOEC_ENOMEM);
        }
    }
    moec_qcodes_release(&c);
}

/* sum_c m_c (w_c - w'_c)^2 over sum_c m_c w_c^2 */
static double error_of(const moec_qcodes *c, const float *w, const float *m)
{
    double error = 0.0, all = 0.0;
    float v[256];
    for (int64_t r = 0; r < c->rows; r++) {
        moec_qcodes one = *c;
        one.rows = 1;
        one.code += r * c->cols;
        one.scale += r * (c->cols / c->grid.group);
        one.zero = c->zero ? c->zero + r * (c->cols / c->grid.group) : NULL;
        moec_quant_restore(v, &one, 0, 1);
        for (int64_t k = 0; k < c->cols; k++) {
            const double x = (double)w[r * c->cols + k], d = x - (double)v[k], weight = m ? (double)m[k] : 1.0;
            error += weight * d * d;
            all += weight * x * x;
        }
    }
    return error / all;
}

static double rounded(int bits, bool zeros, int64_t group, const float *w, int64_t rows, int64_t cols, moec_qrange how, const float *m)
{
    const moec_qgrid g = {bits, group, zeros, MOEC_F16};
    moec_qcodes c;
    assert_int_equal(moec_qcodes_new(&c, &g, rows, cols, NULL), MOEC_OK);
    assert_int_equal(moec_quant_range(&c, w, how, m, 0, rows, NULL), MOEC_OK);
    moec_quant_nearest(&c, w, 0, rows);
    const double error = error_of(&c, w, m);
    moec_qcodes_release(&c);
    return error;
}

/* Known errors of a Gaussian in groups of 128: by the largest value, and of a search with a negative scale where it is better. */
static void gaussians_keep_to_known_errors(void **state)
{
    enum { ROWS = 400, COLS = 128 };
    static const double largest[] = {0, 0, 0.30, 0.056, 0.0123}, searched[] = {0, 0, 0.142, 0.037, 0.0099};
    static const double zeros[] = {0, 0, 0.253, 0.046, 0.0101};
    static float w[ROWS * COLS];
    (void)state;
    for (int i = 0; i < ROWS * COLS; i++)
        w[i] = 0.02f * normal();
    assert_true(fabs(rounded(1, false, 128, w, ROWS, COLS, MOEC_QRANGE_CLIP, NULL) - (1.0 - 2.0 / 3.14159265)) < 0.01);
    for (int bits = 2; bits <= 4; bits++) {
        const double plain = rounded(bits, false, 128, w, ROWS, COLS, MOEC_QRANGE_MINMAX, NULL);
        const double clip = rounded(bits, false, 128, w, ROWS, COLS, MOEC_QRANGE_CLIP, NULL);
        const double range = rounded(bits, true, 128, w, ROWS, COLS, MOEC_QRANGE_MINMAX, NULL);
        const double both = rounded(bits, true, 128, w, ROWS, COLS, MOEC_QRANGE_CLIP, NULL);
        print_message("%d bits: %.4f, clip %.4f; with zero points %.4f, clip %.4f\n", bits, plain, clip, range, both);
        assert_true(fabs(plain / largest[bits] - 1.0) < 0.03 && clip < searched[bits]);
        assert_true(fabs(range / zeros[bits] - 1.0) < 0.03 && both < clip * 1.01);
    }
}

/* The least weighted error of any scale (and zero point), by trying very many. */
static double by_trying(const float *w, const float *m, int n, int bits, bool zeros)
{
    const double top = (1 << bits) - 1, half = (top + 1) / 2;
    double most = 0.0, best = INFINITY, all = 0.0;
    for (int i = 0; i < n; i++) {
        most = fmax(most, fabs((double)w[i]));
        all += (double)m[i] * (double)w[i] * (double)w[i];
    }
    for (int k = 1; k <= 2000; k++)
        for (double z = zeros ? 0 : half; z <= (zeros ? top : half); z++)
            for (double sign = -1; sign <= 1; sign += 2) {
                const double s = sign * most * k / 1000.0 / (zeros ? 1.0 : half - 0.5) / (zeros ? top / 2 : 1.0);
                double error = 0.0;
                for (int i = 0; i < n; i++) {
                    const double x = (double)w[i], q = fmin(fmax(rint(x / s + z), 0), top) - z, r = x - s * q;
                    error += (double)m[i] * r * r;
                }
                best = fmin(best, error);
            }
    return best / all;
}

static void search_comes_near_the_best(void **state)
{
    enum { N = 32, TIMES = 12 };
    (void)state;
    for (int bits = 2; bits <= 4; bits++)
        for (int zeros = 0; zeros < 2; zeros++) {
            double ours = 0.0, best = 0.0;
            for (int k = 0; k < TIMES; k++) {
                float w[N], m[N];
                for (int i = 0; i < N; i++) {
                    w[i] = normal() * (k % 3 == 1 && i % 11 == 0 ? 6.0f : 1.0f) + (k % 3 == 2 ? 0.7f : 0.0f);
                    m[i] = expf(normal());
                }
                ours += rounded(bits, zeros != 0, N, w, 1, N, MOEC_QRANGE_CLIP, m);
                best += by_trying(w, m, N, bits, zeros != 0);
                assert_true(rounded(bits, zeros != 0, N, w, 1, N, MOEC_QRANGE_CLIP, m) <=
                            rounded(bits, zeros != 0, N, w, 1, N, MOEC_QRANGE_MINMAX, m) * 1.000001);
            }
            print_message("%d bits%s: error %.5f, best of all %.5f\n", bits, zeros ? ", zero points" : "", ours / TIMES, best / TIMES);
            assert_true(ours < 1.06 * best);
        }
}

/* Sizes of values and of importance do not matter, only importance relative to the rest does; rows can be shared out. */
static void search_does_not_depend_on_sizes(void **state)
{
    enum { ROWS = 5, COLS = 48 };
    static const float sizes[] = {1.0f, 0x1p-60f, 0x1p60f};
    const moec_qgrid g = {3, 24, false, MOEC_F32};
    float w[ROWS * COLS], m[COLS], sized[ROWS * COLS], weights[COLS];
    moec_qcodes c[3], parts;
    (void)state;
    for (int i = 0; i < ROWS * COLS; i++)
        w[i] = normal();
    for (int i = 0; i < COLS; i++)
        m[i] = i < 24 ? 0.0f : expf(normal()); /* the first group's all 0: as 1 */
    for (size_t k = 0; k < 3; k++) {
        for (int i = 0; i < ROWS * COLS; i++)
            sized[i] = w[i] * sizes[k];
        for (int i = 0; i < COLS; i++)
            weights[i] = m[i] * sizes[2 - k];
        assert_int_equal(moec_qcodes_new(&c[k], &g, ROWS, COLS, NULL), MOEC_OK);
        assert_int_equal(moec_quant_range(&c[k], sized, MOEC_QRANGE_CLIP, weights, 0, ROWS, NULL), MOEC_OK);
        moec_quant_nearest(&c[k], sized, 0, ROWS);
        assert_memory_equal(c[k].code, c[0].code, sizeof w / sizeof *w);
    }
    assert_int_equal(moec_qcodes_new(&parts, &g, ROWS, COLS, NULL), MOEC_OK);
    for (int r = 0; r < ROWS; r++)
        assert_int_equal(moec_quant_range(&parts, w, MOEC_QRANGE_CLIP, m, r, r + 1, NULL), MOEC_OK);
    assert_int_equal(moec_quant_range(&c[0], w, MOEC_QRANGE_CLIP, m, 0, ROWS, NULL), MOEC_OK);
    assert_memory_equal(parts.scale, c[0].scale, ROWS * 2 * sizeof(float));
    float ones[24];
    for (int i = 0; i < 24; i++)
        ones[i] = 1.0f;
    memcpy(m, ones, sizeof ones);
    assert_int_equal(moec_quant_range(&parts, w, MOEC_QRANGE_CLIP, m, 0, ROWS, NULL), MOEC_OK);
    assert_memory_equal(parts.scale, c[0].scale, ROWS * 2 * sizeof(float));
    for (size_t k = 0; k < 3; k++)
        moec_qcodes_release(&c[k]);
    moec_qcodes_release(&parts);
}

/* Both signs of a scale by one pass: the sums of moec_grid_measure, x q = r q + s q^2. */
static void scan_and_measure_agree(void **state)
{
    enum { N = 96, SCALES = 4 };
    const float s[SCALES] = {0.05f, 0.2f, 0.3f, 1.0f};
    float x[N], m[N], xq[SCALES][2], qq[SCALES][2];
    (void)state;
    for (int i = 0; i < N; i++) {
        x[i] = normal();
        m[i] = expf(normal());
    }
    for (int bits = 2; bits <= 8; bits++) {
        const float top = (float)((1 << bits) - 1), z = (top + 1.0f) / 2.0f;
        moec_grid_scan(xq, qq, x, m, N, s, top, SCALES);
        for (int k = 0; k < SCALES; k++)
            for (int i = 0; i < 2; i++) {
                const float scale = i == 0 ? s[k] : -s[k], sign = i == 0 ? 1.0f : -1.0f;
                moec_grid_sums a;
                moec_grid_measure(&a, x, m, N, &scale, &z, top, 1);
                assert_true(fabsf(qq[k][i] - a.qq) <= 1e-5f * a.qq);
                assert_true(fabsf(sign * xq[k][i] - (a.rq + scale * a.qq)) <= 1e-5f * s[k] * a.qq);
            }
    }
}

static void codes_and_values_are_turned(void **state)
{
    enum { ROWS = 21, COLS = 35, LDI = 40, LDO = 32 };
    uint8_t in[ROWS * LDI], out[COLS * LDO];
    float x[ROWS * LDI], y[COLS * LDO];
    (void)state;
    for (int i = 0; i < ROWS * LDI; i++)
        x[i] = (float)(in[i] = (uint8_t)(i * 7 % 251));
    memset(out, 255, sizeof out);
    moec_grid_turn_codes(out, LDO, in, LDI, ROWS, COLS);
    moec_grid_turn(y, LDO, x, LDI, ROWS, COLS);
    for (int c = 0; c < COLS; c++)
        for (int r = 0; r < LDO; r++) {
            assert_int_equal(out[c * LDO + r], r < ROWS ? in[r * LDI + c] : 255);
            assert_true(y[c * LDO + r] == (r < ROWS ? x[r * LDI + c] : 0.0f));
        }
}

#ifdef MOEC_VEC_X86
enum { N = 80 };

enum { GRIDS = 6 }; /* 3 + 2 + 1, as they are measured together */

typedef struct outcome {
    moec_grid_sums sums[GRIDS];
    float xq[GRIDS][2], qq[GRIDS][2];
    uint8_t codes[N + 5], u[N], stepped[N];
    float values[N + 5], d[N], q[N], left[N], change[N], pulled[N], less[N], dot[N];
    double loss[N], squares[N];
    bool any;
} outcome;

static void run_table(outcome *o, const moec_grid_table *t, const float *x, const float *y, const float *s, const float *z)
{
    memset(o, 0, sizeof *o);
    const float scale[GRIDS] = {0.3f, -0.3f, 0.2f, 0.5f, 0.7f, -0.1f}, zero[GRIDS] = {8.0f, 8.0f, 7.0f, 0.0f, 15.0f, 3.0f};
    const float positive[GRIDS] = {0.3f, 0.2f, 0.25f, 0.5f, 0.7f, 0.1f};
    t->measure(o->sums, x, s, N, scale, zero, 15.0f, GRIDS - 1);
    t->measure(o->sums + GRIDS - 1, x, s, N, scale + GRIDS - 1, zero + GRIDS - 1, 15.0f, 1);
    t->scan(o->xq, o->qq, x, s, N, positive, 15.0f, GRIDS - 1);
    t->scan(o->xq + GRIDS - 1, o->qq + GRIDS - 1, x, s, N, positive + GRIDS - 1, 15.0f, 1);
    t->codes(o->codes, x, N + 5, 0.3f, 8.0f, 15.0f);
    t->values(o->values, o->codes, N + 5, 0.3f, 8.0f);
    t->column(o->u, o->left, x, y, s, z, 15.0f, o->loss, 1.7, 0.3, N);
    t->difference(o->d, o->q, x, o->u, s, z, N);
    memcpy(o->stepped, o->u, sizeof o->u);
    o->any = t->step(o->stepped, o->d, o->change, y, s, z, 15.0f, 1.3f, 0.1f, N);
    memcpy(o->pulled, y, sizeof o->pulled);
    t->pull(o->pulled, x, 0, y, 3, N);
    t->less(o->less, x, y, N);
    t->dot(o->dot, x, y, 0.7f, N);
    t->squares(o->squares, y, 1.1, N);
}

static void instruction_sets_give_the_same_bits(void **state)
{
    static const moec_grid_table *const table[] = {&moec__grid_generic, &moec__grid_avx2, &moec__grid_avx512};
    static const moec_isa need[] = {MOEC_ISA_GENERIC, MOEC_ISA_AVX2, MOEC_ISA_AVX512};
    static outcome first, other;
    float x[N + 5], y[N + 5], s[N], z[N];
    (void)state;
    for (int i = 0; i < N + 5; i++) {
        x[i] = i == 7 ? NAN : i == 8 ? INFINITY : i == 9 ? -1e30f : 2.0f * normal();
        y[i] = normal();
    }
    for (int i = 0; i < N; i++) {
        s[i] = (i % 3 ? 0.1f : -0.1f) + 0.05f * normal();
        z[i] = (float)(i % 16);
    }
    run_table(&first, table[0], x, y, s, z);
    assert_true(first.any);
    for (size_t k = 1; k < MOEC_COUNT(table) && moec__isa() >= need[k]; k++) {
        run_table(&other, table[k], x, y, s, z);
        assert_memory_equal(first.codes, other.codes, sizeof first.codes);
        assert_memory_equal(first.u, other.u, sizeof first.u);
        assert_memory_equal(first.stepped, other.stepped, sizeof first.stepped);
        assert_memory_equal(first.values, other.values, sizeof first.values);
        assert_memory_equal(first.change, other.change, sizeof first.change);
        assert_memory_equal(first.q, other.q, sizeof first.q);
        for (int i = 0; i < N; i++)
            if (i < 7 || i > 9) {
                assert_true(first.d[i] == other.d[i] && first.left[i] == other.left[i] && first.loss[i] == other.loss[i]);
                assert_true(first.pulled[i] == other.pulled[i]);
                assert_true(first.less[i] == other.less[i] && first.dot[i] == other.dot[i] && first.squares[i] == other.squares[i]);
            }
    }
    for (int i = 7; i < 10; i++) /* sums of numbers */
        x[i] = 0.1f * (float)i;
    run_table(&first, table[0], x, y, s, z);
    for (size_t k = 1; k < MOEC_COUNT(table) && moec__isa() >= need[k]; k++) {
        run_table(&other, table[k], x, y, s, z);
        assert_memory_equal(&first.sums, &other.sums, sizeof first.sums);
    }
}
#endif

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(scan_and_measure_agree),
        cmocka_unit_test(codes_and_values_are_turned),
        cmocka_unit_test(streams_are_those_of_clients),
        cmocka_unit_test(groups_divide),
        cmocka_unit_test(impossible_grids_are_refused),
        cmocka_unit_test(rows_by_hand),
        cmocka_unit_test(scales_round_as_their_types),
        cmocka_unit_test(unusable_values_are_refused),
        cmocka_unit_test(gaussians_keep_to_known_errors),
        cmocka_unit_test(search_comes_near_the_best),
        cmocka_unit_test(search_does_not_depend_on_sizes),
#ifdef MOEC_VEC_X86
        cmocka_unit_test(instruction_sets_give_the_same_bits),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
