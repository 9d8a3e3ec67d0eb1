/* Views of weights against their definition, products of them against moec_gemm, and the operations of vec.h that came with
 * them. Every test runs once per instruction set that this machine has: main starts itself again with MOEC_KERNEL set. */
#include "kernels.h"
#include "base/mem.h"
#include "base/par.h"
#include "num/gemm.h"
#include "num/vec.h"
#include "num/weight.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmocka.h>

static uint32_t seed = 77;

static uint32_t random_bits(void)
{
    seed = seed * 1664525U + 1013904223U;
    return seed >> 8;
}

static float uniform(void)
{
    return (float)random_bits() * 0x1p-23F - 1.0F;
}

static void *get(size_t n)
{
    void *p = malloc(n ? n : 1);
    assert_non_null(p);
    return p;
}

/* ---- the definition, value by value ----------------------------------------------------------------------------- */

static double e4m3(unsigned b)
{
    double sign = b & 0x80 ? -1.0 : 1.0, fraction = (double)(b & 7) / 8.0;
    int exponent = (int)(b >> 3 & 15);
    if ((b & 0x7f) == 0x7f)
        return (double)NAN;
    return sign * (exponent ? ldexp(1.0 + fraction, exponent - 7) : ldexp(fraction, -6));
}

static double e8m0(unsigned b)
{
    return b == 0xff ? (double)NAN : ldexp(1.0, (int)b - 127);
}

static double e2m1(unsigned code)
{
    static const double value[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    return code & 8 ? -value[code & 7] : value[code & 7];
}

static float one_value(const moec_tensor *t, int64_t i)
{
    float v;
    if (t->dtype == MOEC_F8_E8M0 || t->dtype == MOEC_U8)
        return (float)e8m0(((const unsigned char *)t->data)[i]);
    moec_dtypes[t->dtype].to_f32(&v, (const char *)t->data + i * moec_dtypes[t->dtype].bytes, 1);
    return v;
}

static float naive(const moec_weight *w, int64_t r, int64_t c)
{
    int64_t i = w->at + r * w->row_step + c * w->col_step;
    const unsigned char *bytes = w->of->data;
    if (w->storage == MOEC_MXFP4)
        return (float)(e2m1((unsigned)bytes[i / 2] >> (i % 2 * 4) & 15U) * (double)one_value(w->scale, i / 32));
    if (w->storage == MOEC_PLAIN)
        return one_value(w->of, i);
    int64_t s = (w->at / w->row_step + r) / w->block_rows * w->scale_cols + c / w->block_cols;
    return (float)(e4m3(bytes[i]) * (double)one_value(w->scale, s)); /* exact in double, then one rounding */
}

static float *naive_all(const moec_weight *w)
{
    float *all = get((size_t)(w->rows * w->cols) * sizeof *all);
    for (int64_t r = 0; r < w->rows; r++)
        for (int64_t c = 0; c < w->cols; c++)
            all[r * w->cols + c] = naive(w, r, c);
    return all;
}

/* ---- tensors that end exactly at the end of their allocation and start at an odd address ------------------------- */

static moec_tensor tensor(moec_dtype dtype, int64_t n)
{
    size_t size = (size_t)moec_dtypes[dtype].bytes;
    unsigned char *p = get((size_t)n * size + 1);
    moec_tensor t = {.name = "t", .dtype = dtype, .rank = 1, .dim = {n}, .data = p + 1, .bytes = (size_t)n * size};
    for (int64_t i = 0; i < n; i++) {
        float v = uniform();
        double d = (double)v;
        uint32_t u;
        memcpy(&u, &v, sizeof u);
        uint16_t half = dtype == MOEC_BF16 ? (uint16_t)(u >> 16)
                                           : (uint16_t)(0x3000 + (random_bits() & 0x8bff)); /* of moderate size */
        unsigned char byte = (unsigned char)random_bits();
        if (dtype == MOEC_F8_E4M3 && (byte & 0x7f) == 0x7f)
            byte = 0x3a;
        if (dtype == MOEC_F8_E5M2)
            byte &= 0xbf;
        if (dtype == MOEC_F8_E8M0)
            byte = (unsigned char)(100 + byte % 50);
        const void *from[] = {[8] = &d, [4] = &v, [2] = &half, [1] = &byte};
        memcpy(p + 1 + (size_t)i * size, from[size], size);
    }
    return t;
}

static unsigned char *bytes_of(const moec_tensor *t)
{
    return (unsigned char *)t->data; /* from tensor() */
}

static void drop(const moec_tensor *t)
{
    free(bytes_of(t) - 1);
}

/* All of a view, and blocks of it at all kinds of places, with nothing written beside them. */
static void assert_reads(const moec_weight *w)
{
    float *want = naive_all(w);
    moec_err err = {MOEC_OK, ""};
    if (moec_weight_check(w, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    assert_int_equal(moec_weight_nonfinite(w), -1);
    for (int turn = 0; turn < 60; turn++) {
        int64_t r = turn ? random_bits() % w->rows : 0, c = turn ? random_bits() % w->cols : 0;
        int64_t rows = turn ? 1 + random_bits() % (w->rows - r) : w->rows;
        int64_t cols = turn ? 1 + random_bits() % (w->cols - c) : w->cols, ld = cols + turn % 3;
        float *got = get((size_t)(rows * ld) * sizeof *got);
        for (int64_t i = 0; i < rows * ld; i++)
            got[i] = 555.0F;
        moec_weight_read(got, ld, w, r, rows, c, cols);
        for (int64_t i = 0; i < rows; i++) {
            if (memcmp(got + i * ld, want + (r + i) * w->cols + c, (size_t)cols * sizeof *got) != 0)
                fail_msg("storage %d dtype %d steps %lld %lld: row %lld of [%lld+%lld, %lld+%lld] differs", (int)w->storage,
                         (int)w->of->dtype, (long long)w->row_step, (long long)w->col_step, (long long)i, (long long)r,
                         (long long)rows, (long long)c, (long long)cols);
            for (int64_t j = cols; j < ld; j++)
                assert_true(got[i * ld + j] == 555.0F);
        }
        free(got);
    }
    free(want);
}

static const moec_dtype plain[] = {MOEC_F64, MOEC_F32, MOEC_F16, MOEC_BF16, MOEC_F8_E4M3, MOEC_F8_E5M2};

/* Rows of a part of a stack, every second row, transposed, transposed and interleaved, strides of all other kinds. */
static int plain_views(moec_weight out[12], const moec_tensor *t, int64_t rows, int64_t cols)
{
    const moec_weight all[] = {
        {.at = 0, .row_step = cols, .col_step = 1},        {.at = 5, .row_step = cols + 3, .col_step = 1},
        {.at = cols, .row_step = 2 * cols, .col_step = 1}, {.at = 0, .row_step = 1, .col_step = rows},
        {.at = 7, .row_step = 1, .col_step = rows + 9},    {.at = 0, .row_step = 2, .col_step = 2 * rows},
        {.at = 1, .row_step = 2, .col_step = 2 * rows},    {.at = 2, .row_step = 3, .col_step = 3 * rows},
        {.at = 3, .row_step = 4, .col_step = 4 * rows},    {.at = 1, .row_step = 6 * cols, .col_step = 6},
        {.at = 9, .row_step = 0, .col_step = 1},           {.at = 9, .row_step = 1, .col_step = 0},
    };
    for (size_t i = 0; i < MOEC_COUNT(all); i++) {
        out[i] = all[i];
        out[i].of = t;
        out[i].rows = rows;
        out[i].cols = cols;
    }
    return (int)MOEC_COUNT(all);
}

static void plain_views_read_what_is_there(void **state)
{
    static const int64_t sizes[][2] = {{1, 1}, {1, 40}, {40, 1}, {13, 37}, {97, 16}, {200, 131}, {17, 300}};
    (void)state;
    for (size_t d = 0; d < MOEC_COUNT(plain); d++)
        for (size_t s = 0; s < MOEC_COUNT(sizes); s++) {
            int64_t rows = sizes[s][0], cols = sizes[s][1];
            moec_weight w[12];
            int n = plain_views(w, NULL, rows, cols);
            for (int i = 0; i < n; i++) { /* the last value of the view is the last of its tensor */
                moec_tensor t = tensor(plain[d], w[i].at + (rows - 1) * w[i].row_step + (cols - 1) * w[i].col_step + 1);
                w[i].of = &t;
                assert_reads(&w[i]);
                drop(&t);
            }
        }
}

static moec_weight fp8_view(const moec_tensor *t, const moec_tensor *scale, int64_t at_row, int64_t rows, int64_t cols,
                            int32_t block)
{
    return (moec_weight){.of = t, .scale = scale, .rows = rows, .cols = cols, .at = at_row * cols, .row_step = cols,
                         .col_step = 1, .block_rows = block, .block_cols = block,
                         .scale_cols = (int32_t)((cols + block - 1) / block), .storage = MOEC_FP8};
}

static void fp8_blocks(void **state)
{
    static const moec_dtype kinds[] = {MOEC_F32, MOEC_BF16, MOEC_F16, MOEC_F8_E8M0};
    static const int64_t shapes[][4] = { /* rows of the tensor, cols, first row, block */
        {300, 200, 0, 128}, {300, 200, 130, 128}, {7, 5, 0, 128}, {256, 256, 128, 128}, {50, 333, 3, 32}, {9, 700, 2, 3}};
    (void)state;
    for (size_t k = 0; k < MOEC_COUNT(kinds); k++)
        for (size_t s = 0; s < MOEC_COUNT(shapes); s++) {
            int64_t all = shapes[s][0], cols = shapes[s][1], from = shapes[s][2], b = shapes[s][3];
            moec_tensor t = tensor(MOEC_F8_E4M3, all * cols);
            moec_tensor scale = tensor(kinds[k], (all + b - 1) / b * ((cols + b - 1) / b));
            moec_weight w = fp8_view(&t, &scale, from, all - from, cols, (int32_t)b);
            assert_reads(&w);
            int64_t bands = (all - 1) / b - from / b + 1;
            assert_int_equal(moec_weight_bytes(&w),
                             (all - from) * cols + bands * w.scale_cols * moec_dtypes[kinds[k]].bytes);
            drop(&t);
            drop(&scale);
        }
}

/* Every code at every place of a vector, NaN codes among the others. */
static void fp8_codes(void **state)
{
    unsigned char codes[256 + 70];
    float scale = 0.37F, got[256];
    moec_tensor t = {.dtype = MOEC_F8_E4M3, .data = codes, .bytes = sizeof codes};
    moec_tensor s = {.dtype = MOEC_F32, .data = &scale, .bytes = sizeof scale};
    (void)state;
    for (int i = 0; i < 256 + 70; i++)
        codes[i] = (unsigned char)i;
    for (int shift = 0; shift < 70; shift++) {
        moec_weight w = {.of = &t, .scale = &s, .rows = 1, .cols = 256 + 70, .row_step = 256 + 70, .col_step = 1,
                         .block_rows = INT32_MAX, .block_cols = INT32_MAX, .scale_cols = 1, .storage = MOEC_FP8};
        moec_weight_read(got, 256, &w, 0, 1, shift, 256);
        for (int i = 0; i < 256; i++) {
            float want = (float)(e4m3((unsigned)(i + shift) & 255U) * (double)scale);
            assert_true(isnan(want) ? isnan(got[i]) != 0 : got[i] == want && !signbit(got[i]) == !signbit(want));
        }
    }
}

static void mxfp4_golden(void **state)
{
    static const unsigned char codes[32] = {0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe, 0x01, 0x2f, 0x70, 0x07,
                                            0xf0, 0x0f, 0x11, 0x22, 0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe};
    static const unsigned char scales[2] = {127, 125};
    static const float want[32] = {0, .5F, 1, 1.5F, 2, 3, 4, 6, -0.0F, -.5F, -1, -1.5F, -2, -3, -4, -6,
                                   .5F, 0, -6, 1, 0, 6, 6, 0, 0, -6, -6, 0, .5F, .5F, 1, 1};
    moec_tensor t = {.dtype = MOEC_U8, .data = codes, .bytes = sizeof codes};
    moec_tensor s = {.dtype = MOEC_U8, .data = scales, .bytes = sizeof scales};
    moec_weight w = {.of = &t, .scale = &s, .rows = 2, .cols = 32, .row_step = 32, .col_step = 1, .storage = MOEC_MXFP4};
    float got[64];
    (void)state;
    assert_int_equal(moec_weight_check(&w, NULL), MOEC_OK);
    moec_weight_read(got, 32, &w, 0, 2, 0, 32);
    for (int i = 0; i < 32; i++)
        assert_true(got[i] == want[i] && !signbit(got[i]) == !signbit(want[i]));
    for (int i = 0; i < 16; i++)
        assert_true(got[32 + i] == want[i] / 4);
    assert_int_equal(moec_weight_bytes(&w), 32 + 2);
}

static void mxfp4_views(void **state)
{
    static const int64_t shapes[][4] = {{1, 32, 0, 32}, {5, 96, 64, 96}, {33, 224, 32, 448}, {14, 64, 0, 0},
                                        {3, 1056, 96, 1088}};
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(shapes); i++) {
        int64_t rows = shapes[i][0], cols = shapes[i][1], at = shapes[i][2], step = shapes[i][3];
        int64_t n = at + (rows - 1) * step + cols;
        moec_tensor t = tensor(MOEC_U8, n / 2), s = tensor(MOEC_F8_E8M0, n / 32);
        moec_weight w = {.of = &t, .scale = &s, .rows = rows, .cols = cols, .at = at, .row_step = step, .col_step = 1,
                         .storage = MOEC_MXFP4};
        bytes_of(&s)[0] = 0; /* 2^-127 */
        assert_reads(&w);
        s.dtype = MOEC_U8;
        assert_reads(&w);
        drop(&t);
        drop(&s);
    }
}

/* ---- products --------------------------------------------------------------------------------------------------- */

/* Panels of k features for n tokens; free with moec_free. */
static float *panels_for(int64_t n, int64_t k, bool filled)
{
    float *p = NULL, *rows = get((size_t)(n * k) * sizeof *rows);
    moec_err err = {MOEC_OK, ""};
    for (int64_t i = 0; i < n * k; i++)
        rows[i] = uniform();
    assert_int_equal(MOEC_NEW(p, (size_t)(moec_panels(n) * k * MOEC_PANEL), &err), MOEC_OK);
    if (filled)
        moec_panel_pack(p, rows, k, NULL, n, k);
    free(rows);
    return p;
}

static void assert_product(const moec_weight *w, int64_t n, moec_compute mode)
{
    moec_err err = {MOEC_OK, ""};
    float *x = panels_for(n, w->cols, true), *y = panels_for(n, w->rows, false), *want = panels_for(n, w->rows, false);
    float *expanded = naive_all(w);
    void *scratch = NULL;
    size_t bytes = (size_t)(moec_panels(n) * w->rows * MOEC_PANEL) * sizeof *y;
    assert_int_equal(moec_alloc(&scratch, moec_gemm_scratch_bytes(mode, n, w->cols), 1, &err), MOEC_OK);
    memset(y, 0xff, bytes);
    assert_int_equal(moec_gemm(want, x, n, w->cols, expanded, MOEC_F32, w->rows, mode, scratch, &err), MOEC_OK);
    assert_int_equal(moec_gemm_weight(y, x, n, w, mode, scratch, &err), MOEC_OK);
    if (memcmp(y, want, bytes) != 0)
        fail_msg("storage %d dtype %d [%lld, %lld] steps %lld %lld, %lld tokens, mode %d: other bits", (int)w->storage,
                 (int)w->of->dtype, (long long)w->rows, (long long)w->cols, (long long)w->row_step, (long long)w->col_step,
                 (long long)n, (int)mode);
    moec_free(scratch);
    moec_free(want);
    moec_free(y);
    moec_free(x);
    free(expanded);
}

static void both_modes(const moec_weight *w, int64_t n)
{
    assert_product(w, n, MOEC_COMPUTE_F32);
    assert_product(w, n, MOEC_COMPUTE_BF16);
}

static void products_of_plain_views(void **state)
{
    static const int64_t sizes[][3] = {{1, 1, 1}, {14, 37, 33}, {13, 1, 5}, {99, 65, 3}, {30, 1101, 40}, {109, 515, 270}};
    (void)state;
    for (size_t d = 1; d < MOEC_COUNT(plain); d++) /* F64 is refused */
        for (size_t s = 0; s < MOEC_COUNT(sizes); s++) {
            moec_weight w[12];
            int n = plain_views(w, NULL, sizes[s][0], sizes[s][1]);
            for (int i = 0; i < n; i++) {
                moec_tensor t = tensor(plain[d], w[i].at + (w[i].rows - 1) * w[i].row_step +
                                                     (w[i].cols - 1) * w[i].col_step + 1);
                w[i].of = &t;
                both_modes(&w[i], sizes[s][2]);
                drop(&t);
            }
        }
}

static void products_of_quantized_views(void **state)
{
    static const int64_t sizes[][3] = {{1, 32, 1}, {14, 64, 33}, {61, 1056, 40}, {300, 224, 270}, {25, 2080, 20}};
    (void)state;
    for (size_t s = 0; s < MOEC_COUNT(sizes); s++) {
        int64_t rows = sizes[s][0], cols = sizes[s][1], odd = cols - 5;
        moec_tensor t = tensor(MOEC_F8_E4M3, (rows + 7) * odd);
        moec_tensor f = tensor(MOEC_F32, (rows + 134) / 128 * ((odd + 127) / 128));
        moec_weight fp8 = fp8_view(&t, &f, 7, rows, odd, 128);
        both_modes(&fp8, sizes[s][2]);
        moec_tensor u = tensor(MOEC_U8, (rows + 1) * cols / 2), e = tensor(MOEC_F8_E8M0, (rows + 1) * cols / 32);
        moec_weight mx = {.of = &u, .scale = &e, .rows = rows, .cols = cols, .at = cols, .row_step = cols, .col_step = 1,
                          .storage = MOEC_MXFP4};
        both_modes(&mx, sizes[s][2]);
        drop(&t);
        drop(&f);
        drop(&u);
        drop(&e);
    }
}

static void threads_do_not_matter(void **state)
{
    moec_err err = {MOEC_OK, ""};
    int64_t rows = 500, k = 1100, n = 300;
    moec_tensor t = tensor(MOEC_BF16, rows * k);
    moec_weight w = {.of = &t, .rows = rows, .cols = k, .row_step = 1, .col_step = rows};
    float *x = panels_for(n, k, true), *one = panels_for(n, rows, false), *y = panels_for(n, rows, false);
    (void)state;
    for (int threads = 1; threads <= 4; threads++) {
        moec_par_set_threads(threads);
        assert_int_equal(moec_gemm_weight(threads == 1 ? one : y, x, n, &w, MOEC_COMPUTE_F32, NULL, &err), MOEC_OK);
        if (threads > 1)
            assert_memory_equal(y, one, (size_t)(moec_panels(n) * rows * MOEC_PANEL) * sizeof *y);
    }
    moec_par_set_threads(0);
    moec_free(y);
    moec_free(one);
    moec_free(x);
    drop(&t);
}

/* ---- what is refused -------------------------------------------------------------------------------------------- */

static void refused(const moec_weight *w)
{
    _Alignas(64) float x[64 * MOEC_PANEL] = {0}, y[64 * MOEC_PANEL];
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_weight_check(w, NULL), MOEC_EINVAL);
    assert_int_equal(moec_gemm_weight(y, x, 1, w, MOEC_COMPUTE_F32, NULL, &err), MOEC_EINVAL);
    assert_true(strncmp(err.text, "gemm: ", 6) == 0);
}

static void impossible_views_are_refused(void **state)
{
    static const unsigned char zero[1024];
    const moec_tensor f = {.dtype = MOEC_F32, .data = zero, .bytes = 400}, d = {.dtype = MOEC_F64, .data = zero, .bytes = 800};
    const moec_tensor i8 = {.dtype = MOEC_I8, .data = zero, .bytes = 100};
    const moec_tensor odd = {.dtype = MOEC_DTYPE_COUNT, .data = zero, .bytes = 100};
    const moec_tensor e = {.dtype = MOEC_F8_E8M0, .data = zero, .bytes = 100};
    const int64_t max = INT64_MAX;
    const moec_weight bad[] = {
        {.of = NULL, .rows = 1, .cols = 1},
        {&f, NULL, -1, 10, 0, 10, 1, 0, 0, 0, MOEC_PLAIN, NULL, 0, 0, 0, 0},   {&f, NULL, 10, -1, 0, 10, 1, 0, 0, 0, MOEC_PLAIN, NULL, 0, 0, 0, 0},
        {&f, NULL, 10, 10, -1, 10, 1, 0, 0, 0, MOEC_PLAIN, NULL, 0, 0, 0, 0},  {&f, NULL, 10, 10, 0, -10, 1, 0, 0, 0, MOEC_PLAIN, NULL, 0, 0, 0, 0},
        {&f, NULL, 10, 10, 0, 10, -1, 0, 0, 0, MOEC_PLAIN, NULL, 0, 0, 0, 0},  {&f, NULL, 10, 10, 1, 10, 1, 0, 0, 0, MOEC_PLAIN, NULL, 0, 0, 0, 0},
        {&f, NULL, 10, 11, 0, 10, 1, 0, 0, 0, MOEC_PLAIN, NULL, 0, 0, 0, 0},   {&f, NULL, 2, 2, 0, max, max, 0, 0, 0, MOEC_PLAIN, NULL, 0, 0, 0, 0},
        {&f, NULL, 2, 1, max, 1, 1, 0, 0, 0, MOEC_PLAIN, NULL, 0, 0, 0, 0},    {&f, NULL, max, max, 0, max, 1, 0, 0, 0, MOEC_PLAIN, NULL, 0, 0, 0, 0},
        {&i8, NULL, 10, 10, 0, 10, 1, 0, 0, 0, MOEC_PLAIN, NULL, 0, 0, 0, 0},  {&odd, NULL, 10, 10, 0, 10, 1, 0, 0, 0, MOEC_PLAIN, NULL, 0, 0, 0, 0},
        {&e, NULL, 10, 10, 0, 10, 1, 0, 0, 0, MOEC_PLAIN, NULL, 0, 0, 0, 0},   {&f, NULL, 10, 10, 0, 10, 1, 0, 0, 0, (moec_storage)9, NULL, 0, 0, 0, 0},
    };
    (void)state;
    assert_int_equal(moec_weight_check(NULL, NULL), MOEC_EINVAL);
    for (size_t i = 0; i < MOEC_COUNT(bad); i++)
        refused(&bad[i]);
    _Alignas(64) float x[10 * MOEC_PANEL] = {0}, y[10 * MOEC_PANEL];
    moec_err err = {MOEC_OK, ""};
    moec_weight w = moec_weight_of(&d);
    w.rows = w.cols = w.row_step = 10;
    assert_int_equal(moec_weight_check(&w, NULL), MOEC_OK);
    assert_int_equal(moec_gemm_weight(y, x, 1, &w, MOEC_COMPUTE_F32, NULL, &err), MOEC_EINVAL);
    w.of = &f;
    assert_int_equal(moec_gemm_weight(y, x, -1, &w, MOEC_COMPUTE_F32, NULL, NULL), MOEC_EINVAL);
    assert_int_equal(moec_gemm_weight(y, x, 0, &w, MOEC_COMPUTE_F32, NULL, NULL), MOEC_OK);
    w.rows = 0;
    w.at = max;
    assert_int_equal(moec_gemm_weight(y, x, 1, &w, MOEC_COMPUTE_F32, NULL, NULL), MOEC_OK);
    w.rows = 10;
    w.cols = 0;
    y[5] = 3.0F;
    assert_int_equal(moec_gemm_weight(y, x, 1, &w, MOEC_COMPUTE_F32, NULL, NULL), MOEC_OK);
    assert_true(y[5] == 0.0F);
}

static void impossible_quantized_views_are_refused(void **state)
{
    moec_tensor t = tensor(MOEC_F8_E4M3, 60 * 60), s = tensor(MOEC_F32, 4 * 4), u = tensor(MOEC_U8, 320);
    moec_tensor i = tensor(MOEC_I32, 16);
    const moec_weight ok = {&t, &s, 60, 60, 0, 60, 1, 16, 16, 4, MOEC_FP8, NULL, 0, 0, 0, 0};
    const moec_weight mx = {&u, &u, 10, 64, 0, 64, 1, 0, 0, 0, MOEC_MXFP4, NULL, 0, 0, 0, 0};
    (void)state;
    assert_int_equal(moec_weight_check(&ok, NULL), MOEC_OK);
    assert_int_equal(moec_weight_check(&mx, NULL), MOEC_OK);
    for (int k = 0; k < 13; k++) {
        moec_weight w = ok;
        moec_tensor few = s;
        few.bytes -= 4;
        w.scale = k == 0 ? NULL : k == 1 ? &i : k == 2 ? &few : &s;
        w.block_rows = k == 3 ? 0 : k == 4 ? 14 : 16;
        w.block_cols = k == 5 ? -1 : k == 6 ? 8 : 16;
        w.scale_cols = k == 7 ? 3 : k == 8 ? INT32_MAX : 4;
        w.of = k == 9 ? &s : &t;
        w.col_step = k == 10 ? 2 : 1;
        w.row_step = k == 11 ? 59 : 60;
        w.rows = k == 12 ? 59 : 60;
        w.at = k == 12 ? 1 : 0;
        refused(&w);
    }
    for (int k = 0; k < 9; k++) {
        moec_weight w = mx;
        moec_tensor few = u;
        few.bytes = 19;
        w.of = k == 0 ? &t : &u;
        w.scale = k == 1 ? NULL : k == 2 ? &s : k == 3 ? &few : &u;
        w.at = k == 4 ? 1 : k == 5 ? 32 : 0;
        w.cols = k == 6 ? 63 : 64;
        w.row_step = k == 7 ? 60 : 64;
        w.col_step = k == 8 ? 2 : 1;
        w.rows = k == 7 || k == 8 || k == 4 ? 4 : 10;
        refused(&w);
    }
    drop(&t);
    drop(&s);
    drop(&u);
    drop(&i);
}

/* ---- not finite ------------------------------------------------------------------------------------------------- */

static void finds_the_first_bad_value_of_plain_views(void **state)
{
    static const uint64_t infinity[] = {0x7ff0000000000000U, 0x7f800000U, 0x7c00U, 0x7f80U, 0x7fU, 0x7cU};
    int64_t rows = 101, cols = 70;
    (void)state;
    for (size_t d = 0; d < MOEC_COUNT(plain); d++) {
        moec_weight w[12];
        int n = plain_views(w, NULL, rows, cols);
        for (int i = 0; i + 2 < n; i++) { /* the last two have every value many times */
            moec_tensor t = tensor(plain[d], w[i].at + (rows - 1) * w[i].row_step + (cols - 1) * w[i].col_step + 1);
            size_t size = (size_t)moec_dtypes[plain[d]].bytes;
            w[i].of = &t;
            for (int64_t at = rows * cols - 1; at >= 0; at -= 1 + random_bits() % 300) {
                int64_t where = w[i].at + at / cols * w[i].row_step + at % cols * w[i].col_step;
                memcpy(bytes_of(&t) + (size_t)where * size, &infinity[d], size);
                assert_int_equal(moec_weight_nonfinite(&w[i]), at);
            }
            if (i == 6) { /* and nothing between the values counts */
                w[i].at = 0;
                assert_int_equal(moec_weight_nonfinite(&w[i]), -1);
            }
            drop(&t);
        }
    }
}

static void finds_the_first_bad_value_of_quantized_views(void **state)
{
    moec_tensor t = tensor(MOEC_F8_E4M3, 60 * 50), s = tensor(MOEC_F32, 4 * 4), u = tensor(MOEC_U8, 64 * 10 / 2),
                e = tensor(MOEC_F8_E8M0, 20);
    moec_weight fp8 = fp8_view(&t, &s, 10, 50, 50, 16);
    moec_weight mx = {&u, &e, 10, 64, 0, 64, 1, 0, 0, 0, MOEC_MXFP4, NULL, 0, 0, 0, 0};
    float bad = INFINITY, huge = 3e38F;
    (void)state;
    bytes_of(&t)[9 * 50] = 0x7f; /* before the view */
    assert_int_equal(moec_weight_nonfinite(&fp8), -1);
    memcpy(bytes_of(&s) + 4 * 15, &bad, 4); /* rows 48.., columns 48.. of the tensor, the view starts at row 10 */
    assert_int_equal(moec_weight_nonfinite(&fp8), 38 * 50 + 48);
    bytes_of(&t)[20 * 50 + 49] = 0xff;
    assert_int_equal(moec_weight_nonfinite(&fp8), 10 * 50 + 49);
    for (int i = 0; i < 16; i++)
        bytes_of(&t)[12 * 50 + i] = bytes_of(&t)[11 * 50 + i] = bytes_of(&t)[10 * 50 + i] = 0x18; /* 2^-4 */
    for (int i = 0; i < 16; i++)
        bytes_of(&t)[13 * 50 + i] = bytes_of(&t)[14 * 50 + i] = bytes_of(&t)[15 * 50 + i] = 0x18;
    bytes_of(&t)[13 * 50 + 3] = 0x7e; /* 448 times 3e38 */
    memcpy(bytes_of(&s), &huge, 4);
    assert_int_equal(moec_weight_nonfinite(&fp8), 3 * 50 + 3);
    bad = NAN;
    memcpy(bytes_of(&s), &bad, 4);
    assert_int_equal(moec_weight_nonfinite(&fp8), 0);
    bytes_of(&e)[13] = 0xff;
    assert_int_equal(moec_weight_nonfinite(&mx), 6 * 64 + 32);
    bytes_of(&e)[4] = 0xff;
    assert_int_equal(moec_weight_nonfinite(&mx), 2 * 64);
    drop(&t);
    drop(&s);
    drop(&u);
    drop(&e);
}

static void whole_tensors_bytes_and_pages(void **state)
{
    enum { BYTES = 1 << 16 };
    FILE *f = tmpfile();
    moec_weight w = moec_weight_of(NULL);
    (void)state;
    assert_null(w.of);
    assert_int_equal(moec_weight_bytes(&w), 0);
    assert_int_equal(moec_weight_nonfinite(&w), -1);
    moec_weight_drop(&w);
    moec_weight_prefetch(&w);
    assert_non_null(f);
    for (int i = 0; i < BYTES; i++)
        fputc(i % 251 & 0x3f, f);
    assert_int_equal(fflush(f), 0);
    unsigned char *p = mmap(NULL, BYTES, PROT_READ, MAP_PRIVATE, fileno(f), 0);
    assert_true(p != MAP_FAILED);
    moec_tensor t = {.dtype = MOEC_BF16, .rank = 3, .dim = {4, 64, 128}, .data = p, .bytes = BYTES};
    w = moec_weight_of(&t);
    assert_true(w.rows == 256 && w.cols == 128 && w.row_step == 128 && w.col_step == 1 && w.at == 0 && w.of == &t);
    assert_int_equal(moec_weight_bytes(&w), BYTES);
    moec_weight_prefetch(&w);
    moec_weight_drop(&w);
    w = (moec_weight){.of = &t, .rows = 64, .cols = 128, .at = 64 * 128 + 1, .row_step = 2, .col_step = 128};
    w.rows = 63;
    assert_int_equal(moec_weight_bytes(&w), 63 * 128 * 2);
    moec_weight_prefetch(&w);
    moec_weight_drop(&w);
    moec_tensor codes = {.dtype = MOEC_U8, .data = p, .bytes = BYTES / 2};
    moec_tensor scales = {.dtype = MOEC_U8, .data = p + BYTES / 2, .bytes = BYTES / 32};
    moec_weight mx = {&codes, &scales, 100, 128, 128, 256, 1, 0, 0, 0, MOEC_MXFP4, NULL, 0, 0, 0, 0};
    moec_weight_prefetch(&mx);
    moec_weight_drop(&mx);
    for (int i = 0; i < BYTES; i++)
        assert_int_equal(p[i], i % 251 & 0x3f);
    munmap(p, BYTES);
    fclose(f);
    t.rank = 1;
    t.dim[0] = 9;
    w = moec_weight_of(&t);
    assert_true(w.rows == 1 && w.cols == 9);
    t.rank = 0;
    w = moec_weight_of(&t);
    assert_true(w.rows == 1 && w.cols == 1);
}

/* ---- vec.h ------------------------------------------------------------------------------------------------------ */

static const int64_t lengths[] = {1, 2, 3, 5, 8, 15, 16, 17, 33, 64, 100, 1000, 4097, 10000};

static float *values(int64_t n, float spread)
{
    float *x = get((size_t)n * sizeof *x);
    for (int64_t i = 0; i < n; i++)
        x[i] = spread * uniform();
    return x;
}

static void assert_close(float got, double want, double absolute, const char *what, int64_t n)
{
    if (!(fabs((double)got - want) <= 2e-6 * fabs(want) + absolute))
        fail_msg("%s, n = %lld: %.9g, expected %.9g", what, (long long)n, (double)got, want);
}

static void layer_norm_follows_its_formula(void **state)
{
    (void)state;
    for (size_t k = 0; k < MOEC_COUNT(lengths); k++)
        for (int biased = 0; biased < 2; biased++) {
            int64_t n = lengths[k];
            float *x = values(n, 2.0F), *w = values(n, 2.0F), *b = values(n, 1.0F), *y = values(n, 1.0F);
            double mean = 0, var = 0;
            for (int64_t i = 0; i < n; i++) {
                x[i] += 5.0F; /* a mean that matters */
                mean += (double)x[i] / (double)n;
            }
            for (int64_t i = 0; i < n; i++)
                var += ((double)x[i] - mean) * ((double)x[i] - mean) / (double)n;
            moec_layer_norm(y, x, w, biased ? b : NULL, n, 1e-5F);
            for (int64_t i = 0; i < n && n > 1; i++)
                assert_close(y[i], ((double)x[i] - mean) / sqrt(var + 1e-5) * (double)w[i] + (biased ? (double)b[i] : 0.0),
                             1e-5, "layer_norm", n);
            if (n == 1)
                assert_true(y[0] == (biased ? b[0] : 0.0F));
            moec_layer_norm(x, x, w, biased ? b : NULL, n, 1e-5F);
            assert_memory_equal(x, y, (size_t)n * sizeof *x);
            x[n / 2] = NAN;
            moec_layer_norm(x, x, w, NULL, n, 1e-5F);
            assert_true(isnan(x[0]) && isnan(x[n - 1]));
            free(x);
            free(w);
            free(b);
            free(y);
        }
}

static void activations_follow_their_formulas(void **state)
{
    (void)state;
    for (size_t k = 0; k < MOEC_COUNT(lengths); k++) {
        int64_t n = lengths[k];
        float *g = values(n, 12.0F), *u = values(n, 12.0F), *got = values(n, 1.0F);
        size_t bytes = (size_t)n * sizeof *got;
        memcpy(got, g, bytes);
        moec_swiglu_clamped(got, u, n, 7.0F, 1.702F);
        for (int64_t i = 0; i < n; i++) {
            double a = fmin((double)g[i], 7.0), b = fmin(fmax((double)u[i], -7.0), 7.0);
            assert_close(got[i], (b + 1.0) * a / (1.0 + exp(-(double)1.702F * a)), 1e-6, "swiglu_clamped", n);
        }
        memcpy(got, g, bytes);
        moec_silu(got, n);
        for (int64_t i = 0; i < n; i++)
            assert_close(got[i], (double)g[i] / (1.0 + exp(-(double)g[i])), 0, "silu", n);
        memcpy(got, g, bytes);
        moec_mul_sigmoid(got, u, n);
        for (int64_t i = 0; i < n; i++)
            assert_close(got[i], (double)g[i] / (1.0 + exp(-(double)u[i])), 0, "mul_sigmoid", n);
        free(g);
        free(u);
        free(got);
    }
}

/* A NaN at every place of either operand comes out at that place and nowhere else. */
static void nan_comes_through(void **state)
{
    enum { N = 37 };
    (void)state;
    for (int at = 0; at < N; at++)
        for (int which = 0; which < 4; which++) {
            float a[N], b[N];
            for (int i = 0; i < N; i++) {
                a[i] = uniform();
                b[i] = uniform();
            }
            (which % 2 ? b : a)[at] = NAN;
            if (which < 2)
                moec_swiglu_clamped(a, b, N, 7.0F, 1.702F);
            else
                moec_mul_sigmoid(a, b, N);
            for (int i = 0; i < N; i++)
                assert_int_equal(isnan(a[i]) != 0, i == at);
            a[at] = NAN;
            moec_silu(a, N);
            for (int i = 0; i < N; i++)
                assert_int_equal(isnan(a[i]) != 0, i == at);
        }
    float ends[2] = {INFINITY, 50.0F}, up[2] = {-INFINITY, INFINITY};
    moec_swiglu_clamped(ends, up, 2, 7.0F, 1.702F);
    assert_close(ends[0], -42.0 / (1.0 + exp(-7 * 1.702)), 1e-5, "swiglu_clamped", 2);
    assert_close(ends[1], 56.0 / (1.0 + exp(-7 * 1.702)), 1e-5, "swiglu_clamped", 2);
}

static int run_all(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(plain_views_read_what_is_there),
        cmocka_unit_test(fp8_blocks),
        cmocka_unit_test(fp8_codes),
        cmocka_unit_test(mxfp4_golden),
        cmocka_unit_test(mxfp4_views),
        cmocka_unit_test(products_of_plain_views),
        cmocka_unit_test(products_of_quantized_views),
        cmocka_unit_test(threads_do_not_matter),
        cmocka_unit_test(impossible_views_are_refused),
        cmocka_unit_test(impossible_quantized_views_are_refused),
        cmocka_unit_test(finds_the_first_bad_value_of_plain_views),
        cmocka_unit_test(finds_the_first_bad_value_of_quantized_views),
        cmocka_unit_test(whole_tensors_bytes_and_pages),
        cmocka_unit_test(layer_norm_follows_its_formula),
        cmocka_unit_test(activations_follow_their_formulas),
        cmocka_unit_test(nan_comes_through),
    };
    return cmocka_run_group_tests_name(getenv("MOEC_KERNEL"), tests, NULL, NULL);
}

int main(int argc, char **argv)
{
    (void)argc;
    return every_kernel(argv, run_all);
}
