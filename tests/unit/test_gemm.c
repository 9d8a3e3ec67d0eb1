/* Every test runs once per instruction set that this machine has: main starts itself again with MOEC_KERNEL set, since
 * a process chooses its kernels once. */
#include "kernels.h"
#include "base/mem.h"
#include "base/par.h"
#include "num/gemm.h"
#include "num/linalg.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static uint32_t seed = 12345;

static float uniform(void)
{
    seed = seed * 1664525U + 1013904223U;
    return (float)(seed >> 8) * 0x1p-23F - 1.0F;
}

static void *get(size_t n, size_t size)
{
    void *p = NULL;
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_alloc(&p, n ? n : 1, size, &err), MOEC_OK);
    return p;
}

static float to_bf16(float v)
{
    uint32_t u;
    memcpy(&u, &v, sizeof u);
    u = (u + 0x7fffU + (u >> 16 & 1U)) & 0xffff0000U;
    memcpy(&v, &u, sizeof v);
    return v;
}

/* A product with its operands; x and want are token-major. The weights end exactly at the end of their allocation and
 * start at an odd address, so that sanitizers see any read outside. */
typedef struct product {
    int64_t n, rows, k;
    moec_dtype dtype;
    moec_compute mode;
    char *w_memory, *w;
    float *x, *panels, *y, *got;
    double *want, *size; /* the product and the sum of its terms' magnitudes */
} product;

static void set_weight(product *p, int64_t i, float v)
{
    uint32_t u;
    if (p->dtype == MOEC_F32) {
        memcpy(p->w + 4 * i, &v, 4);
    } else if (p->dtype == MOEC_BF16) {
        memcpy(&u, &v, 4);
        uint16_t h = (uint16_t)(u >> 16);
        memcpy(p->w + 2 * i, &h, 2);
    } else { /* any finite f16 of moderate size */
        uint16_t h = (uint16_t)(0x3000 + (int)(fabsf(v) * 3000.0F) + (v < 0 ? 0x8000 : 0));
        memcpy(p->w + 2 * i, &h, 2);
    }
}

static void operands(product *p)
{
    size_t size = (size_t)moec_dtypes[p->dtype].bytes, nw = (size_t)(p->rows * p->k);
    p->w_memory = malloc(nw * size + 1);
    assert_non_null(p->w_memory);
    p->w = p->w_memory + 1;
    p->x = get((size_t)(p->n * p->k), sizeof *p->x);
    p->panels = get((size_t)(moec_panels(p->n) * p->k * MOEC_PANEL), sizeof *p->panels);
    p->y = get((size_t)(moec_panels(p->n) * p->rows * MOEC_PANEL + 16), sizeof *p->y);
    p->got = get((size_t)(p->n * p->rows), sizeof *p->got);
    p->want = get((size_t)(p->n * p->rows), sizeof *p->want);
    p->size = get((size_t)(p->n * p->rows), sizeof *p->size);
    for (int64_t i = 0; i < p->n * p->k; i++)
        p->x[i] = uniform();
    for (int64_t i = 0; i < p->rows * p->k; i++)
        set_weight(p, i, uniform());
    moec_panel_pack(p->panels, p->x, p->k, NULL, p->n, p->k);
}

static void reference(product *p)
{
    float *w = get((size_t)(p->rows * p->k), sizeof *w);
    bool round = p->mode == MOEC_COMPUTE_BF16;
    moec_dtypes[p->dtype].to_f32(w, p->w, p->rows * p->k);
    for (int64_t t = 0; t < p->n; t++)
        for (int64_t r = 0; r < p->rows; r++) {
            double sum = 0, size = 0;
            for (int64_t i = 0; i < p->k; i++) {
                float a = p->x[t * p->k + i], b = w[r * p->k + i];
                double term = round ? (double)to_bf16(a) * (double)to_bf16(b) : (double)a * (double)b;
                sum += term;
                size += fabs(term);
            }
            p->want[t * p->rows + r] = sum;
            p->size[t * p->rows + r] = size;
        }
    moec_free(w);
}

static void multiply(product *p)
{
    moec_err err = {MOEC_OK, ""};
    int64_t used = moec_panels(p->n) * p->rows * MOEC_PANEL;
    char *scratch = get(moec_gemm_scratch_bytes(p->mode, p->n, p->k), 1);
    for (int64_t i = 0; i < used + 16; i++)
        p->y[i] = 777.0F;
    assert_int_equal(moec_gemm(p->y, p->panels, p->n, p->k, p->w, p->dtype, p->rows, p->mode, scratch, &err), MOEC_OK);
    for (int i = 0; i < 16; i++)
        assert_true(p->y[used + i] == 777.0F);
    for (int64_t t = p->n; t % MOEC_PANEL != 0; t++)
        for (int64_t r = 0; r < p->rows; r++) /* unused lanes */
            assert_true(p->y[((moec_panels(p->n) - 1) * p->rows + r) * MOEC_PANEL + t % MOEC_PANEL] == 0.0F);
    moec_panel_unpack(p->got, p->rows, p->y, p->n, p->rows);
    moec_free(scratch);
}

static void release(product *p)
{
    moec_free(p->size);
    moec_free(p->want);
    moec_free(p->got);
    moec_free(p->y);
    moec_free(p->panels);
    moec_free(p->x);
    free(p->w_memory);
}

/* |got - want| <= c u sum |terms| with u = 2^-24; c = 8 covers blocked sums of this length by far, since roundings
 * mostly cancel, and is far below what one missing or misplaced term makes. */
static void assert_product(int64_t n, int64_t rows, int64_t k, moec_dtype dtype, moec_compute mode)
{
    product p = {.n = n, .rows = rows, .k = k, .dtype = dtype, .mode = mode};
    operands(&p);
    reference(&p);
    multiply(&p);
    for (int64_t i = 0; i < n * rows; i++)
        if (!(fabs((double)p.got[i] - p.want[i]) <= 8 * 0x1p-24 * p.size[i] + 1e-30))
            fail_msg("n %lld rows %lld k %lld dtype %d mode %d: output %lld is %.9g, expected %.9g", (long long)n,
                     (long long)rows, (long long)k, (int)dtype, (int)mode, (long long)i, (double)p.got[i], p.want[i]);
    release(&p);
}

static const moec_dtype dtypes[] = {MOEC_F32, MOEC_BF16, MOEC_F16};

static void all_ways(int64_t n, int64_t rows, int64_t k)
{
    for (size_t d = 0; d < MOEC_COUNT(dtypes); d++)
        for (int mode = 0; mode < 2; mode++)
            assert_product(n, rows, k, dtypes[d], mode ? MOEC_COMPUTE_BF16 : MOEC_COMPUTE_F32);
}

static void every_row_count(void **state)
{
    (void)state;
    for (int64_t rows = 1; rows <= 30; rows++)
        all_ways(33 + rows % 3, rows, 37);
}

static void every_k(void **state)
{
    (void)state;
    for (int64_t k = 1; k <= 70; k++)
        all_ways(1 + k % 40, 13, k);
}

static void every_token_count(void **state)
{
    (void)state;
    for (int64_t n = 1; n <= 300; n++)
        all_ways(n, 5, 9);
}

/* Borders of the k blocks (512 and 1024), of the token blocks (256) and of the activation spans (1024). */
static void block_borders(void **state)
{
    static const int64_t ks[] = {511, 512, 513, 1023, 1024, 1025, 1536, 2049};
    static const int64_t ns[] = {255, 257, 512, 1023, 1024, 1025, 1300};
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(ks); i++)
        all_ways(19, 14, ks[i]);
    for (size_t i = 0; i < MOEC_COUNT(ns); i++)
        all_ways(ns[i], 7, 6);
    all_ways(600, 100, 1100);
}

/* A token's result has the same bits alone, in any batch and at any place in it, and for any subset of rows. */
static void batch_does_not_matter(void **state)
{
    (void)state;
    for (size_t d = 0; d < MOEC_COUNT(dtypes); d++)
        for (int mode = 0; mode < 2; mode++) {
            product all = {.n = 290, .rows = 41, .k = 1111, .dtype = dtypes[d],
                           .mode = mode ? MOEC_COMPUTE_BF16 : MOEC_COMPUTE_F32};
            operands(&all);
            multiply(&all);
            for (int64_t n = 1; n < 290; n = n * 3 + 1) {
                product part = all;
                int64_t from = 290 - n, row = n % 7;
                part.n = n;
                part.rows = all.rows - row;
                part.w = all.w + row * all.k * moec_dtypes[all.dtype].bytes;
                part.panels = get((size_t)(moec_panels(n) * all.k * MOEC_PANEL), sizeof(float));
                part.y = get((size_t)(moec_panels(n) * all.rows * MOEC_PANEL + 16), sizeof(float));
                part.got = get((size_t)(n * all.rows), sizeof(float));
                moec_panel_pack(part.panels, all.x + from * all.k, all.k, NULL, n, all.k);
                multiply(&part);
                for (int64_t t = 0; t < n; t++)
                    assert_memory_equal(part.got + t * part.rows, all.got + (from + t) * all.rows + row,
                                        (size_t)part.rows * sizeof(float));
                moec_free(part.got);
                moec_free(part.y);
                moec_free(part.panels);
            }
            release(&all);
        }
}

static void threads_do_not_matter(void **state)
{
    static const int64_t shapes[][3] = {{300, 200, 600}, {1100, 64, 520}, {20, 500, 1030}};
    (void)state;
    for (size_t s = 0; s < MOEC_COUNT(shapes); s++)
        for (int mode = 0; mode < 2; mode++) {
            product p = {.n = shapes[s][0], .rows = shapes[s][1], .k = shapes[s][2], .dtype = MOEC_BF16,
                         .mode = mode ? MOEC_COMPUTE_BF16 : MOEC_COMPUTE_F32};
            size_t bytes = (size_t)(p.n * p.rows) * sizeof(float);
            float *one = get((size_t)(p.n * p.rows), sizeof *one);
            operands(&p);
            moec_par_set_threads(1);
            multiply(&p);
            memcpy(one, p.got, bytes);
            for (int threads = 2; threads <= 5; threads++) {
                moec_par_set_threads(threads);
                multiply(&p);
                assert_memory_equal(p.got, one, bytes);
            }
            moec_par_set_threads(0);
            release(&p);
            moec_free(one);
        }
}

/* Nothing of a neighbouring row leaks in through padding: 0 times infinity would show. */
static void neighbours_do_not_leak(void **state)
{
    (void)state;
    for (int mode = 0; mode < 2; mode++)
        for (int64_t k = 1; k < 40; k++) {
            product p = {.n = 3, .rows = 14, .k = k, .dtype = MOEC_BF16,
                         .mode = mode ? MOEC_COMPUTE_BF16 : MOEC_COMPUTE_F32};
            operands(&p);
            for (int64_t r = 1; r < p.rows; r += 2)
                for (int64_t i = 0; i < k; i++)
                    set_weight(&p, r * k + i, INFINITY);
            multiply(&p);
            for (int64_t t = 0; t < p.n; t++)
                for (int64_t r = 0; r < p.rows; r++)
                    assert_int_equal(isfinite(p.got[t * p.rows + r]) != 0, r % 2 == 0);
            release(&p);
        }
}

static void activations_are_rounded_to_nearest_even(void **state)
{
    static const float one = 1.0F;
    _Alignas(64) float x[MOEC_PANEL] = {0}, y[MOEC_PANEL];
    moec_err err = {MOEC_OK, ""};
    (void)state;
    for (int i = 0; i < 20000; i++) {
        uint32_t u = 0x3f7f0000U + (uint32_t)i * 13U;
        memcpy(&x[0], &u, sizeof u);
        char *scratch = get(moec_gemm_scratch_bytes(MOEC_COMPUTE_BF16, 1, 1), 1);
        assert_int_equal(moec_gemm(y, x, 1, 1, &one, MOEC_F32, 1, MOEC_COMPUTE_BF16, scratch, &err), MOEC_OK);
        assert_true(y[0] == to_bf16(x[0]));
        moec_free(scratch);
    }
}

static void empty_and_refused(void **state)
{
    _Alignas(64) float y[2 * MOEC_PANEL], x[MOEC_PANEL] = {0};
    moec_err err = {MOEC_OK, ""};
    (void)state;
    for (int i = 0; i < 2 * MOEC_PANEL; i++)
        y[i] = 5.0F;
    assert_int_equal(moec_gemm(y, x, 0, 4, NULL, MOEC_F32, 2, MOEC_COMPUTE_F32, NULL, &err), MOEC_OK);
    assert_int_equal(moec_gemm(y, x, 3, 4, NULL, MOEC_F32, 0, MOEC_COMPUTE_F32, NULL, &err), MOEC_OK);
    assert_true(y[0] == 5.0F);
    assert_int_equal(moec_gemm(y, x, 3, 0, NULL, MOEC_F32, 2, MOEC_COMPUTE_F32, NULL, &err), MOEC_OK);
    for (int i = 0; i < 2 * MOEC_PANEL; i++)
        assert_true(y[i] == 0.0F);
    assert_int_equal(moec_gemm(y, x, 1, 1, x, MOEC_I8, 1, MOEC_COMPUTE_F32, NULL, &err), MOEC_EINVAL);
    assert_string_equal(err.text, "gemm: weights are I8, expected F32, F16 or BF16");
    assert_int_equal(moec_gemm(y, x, 1, 1, x, MOEC_DTYPE_COUNT, 1, MOEC_COMPUTE_F32, NULL, NULL), MOEC_EINVAL);
    assert_int_equal(moec_gemm(y, x, 1, -1, x, MOEC_F32, 1, MOEC_COMPUTE_F32, NULL, NULL), MOEC_EINVAL);
}

/* pack, unpack and scatter against their definitions, for all remainders, with rows wider than what is taken. */
static void panels_one(int64_t n, int64_t width, bool gathered)
{
    int64_t ld = width + 3, from = n + 5;
    float *x = get((size_t)(from * ld), sizeof *x), *y = get((size_t)(from * ld), sizeof *y);
    float *panels = get((size_t)(moec_panels(n) * width * MOEC_PANEL), sizeof *panels);
    float *scale = get((size_t)n, sizeof *scale);
    int32_t *at = get((size_t)n, sizeof *at);
    for (int64_t i = 0; i < from * ld; i++)
        x[i] = uniform();
    for (int64_t i = 0; i < n; i++) {
        at[i] = (int32_t)(gathered ? i * 7 % from : i); /* repeats some when 7 divides from */
        scale[i] = uniform();
    }
    memset(panels, 0xff, (size_t)(moec_panels(n) * width * MOEC_PANEL) * sizeof *panels);
    moec_panel_pack(panels, x, ld, gathered ? at : NULL, n, width);
    for (int64_t t = 0; t < moec_panels(n) * MOEC_PANEL; t++)
        for (int64_t f = 0; f < width; f++) {
            float got = panels[(t / MOEC_PANEL * width + f) * MOEC_PANEL + t % MOEC_PANEL];
            assert_true(got == (t < n ? x[at[t] * ld + f] : 0.0F));
        }
    for (int64_t i = 0; i < from * ld; i++)
        y[i] = 9.0F;
    moec_panel_unpack(y, ld, panels, n, width);
    for (int64_t t = 0; t < from; t++)
        for (int64_t f = 0; f < ld; f++)
            assert_true(y[t * ld + f] == (t < n && f < width ? x[at[t] * ld + f] : 9.0F));
    for (int64_t i = 0; i < from * ld; i++)
        y[i] = 0.5F;
    moec_panel_scatter_add(y, ld, gathered ? at : NULL, scale, panels, n, width);
    for (int64_t i = 0; i < from * ld; i++) {
        double want = 0.5;
        for (int64_t t = 0; t < n; t++)
            if (at[t] == i / ld && i % ld < width)
                want += (double)scale[t] * (double)x[i];
        assert_true(fabs((double)y[i] - want) < 1e-5);
    }
    moec_free(at);
    moec_free(scale);
    moec_free(panels);
    moec_free(y);
    moec_free(x);
}

static void panels(void **state)
{
    (void)state;
    for (int64_t n = 1; n <= 70; n++)
        for (int64_t width = 1; width <= 40; width += 1 + n % 3)
            panels_one(n, width, width % 2 == 0);
    panels_one(0, 5, false);
}

/* Our border to OpenBLAS, called by several threads at once. */
typedef struct blas {
    float a[12 * 20], b[20 * 16], want[12 * 16];
} blas;

static moec_status blas_chunk(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const blas *m = ctx;
    (void)worker;
    for (int64_t i = lo; i < hi; i++) {
        float c[12 * 16];
        for (int j = 0; j < 12 * 16; j++)
            c[j] = NAN;
        moec_sgemm(false, false, 12, 16, 20, 2.0F, m->a, 20, m->b, 16, 0.0F, c, 16);
        for (int j = 0; j < 12 * 16; j++)
            if (!(fabsf(c[j] - m->want[j]) < 1e-4F))
                return moec_fail(err, MOEC_ENUMERIC, "call %lld: %g, expected %g", (long long)i, (double)c[j],
                                 (double)m->want[j]);
    }
    return MOEC_OK;
}

static void sgemm(void **state)
{
    moec_err err = {MOEC_OK, ""};
    blas m;
    float at[20 * 12], bt[16 * 20], c[12 * 16];
    (void)state;
    for (int i = 0; i < 12 * 20; i++)
        at[i % 20 * 12 + i / 20] = m.a[i] = uniform();
    for (int i = 0; i < 20 * 16; i++)
        bt[i % 16 * 20 + i / 16] = m.b[i] = uniform();
    for (int i = 0; i < 12 * 16; i++) {
        double sum = 0;
        for (int k = 0; k < 20; k++)
            sum += (double)m.a[i / 16 * 20 + k] * (double)m.b[k * 16 + i % 16];
        m.want[i] = (float)(2 * sum);
        c[i] = m.want[i];
    }
    moec_sgemm(true, true, 12, 16, 20, -2.0F, at, 12, bt, 20, 1.0F, c, 16);
    for (int i = 0; i < 12 * 16; i++)
        assert_true(fabsf(c[i]) < 1e-4F);
    moec_sgemm(false, false, 0, 16, 20, 1.0F, NULL, 20, m.b, 16, 0.0F, NULL, 16);
    moec_par_set_threads(4);
    moec_status st = moec_par_for(20000, 50, blas_chunk, &m, &err);
    moec_par_set_threads(0);
    if (st != MOEC_OK)
        fail_msg("%s", err.text);
}

static int run_all(void)
{
    const char *limit = getenv("MOEC_KERNEL");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_row_count),
        cmocka_unit_test(every_k),
        cmocka_unit_test(every_token_count),
        cmocka_unit_test(block_borders),
        cmocka_unit_test(batch_does_not_matter),
        cmocka_unit_test(threads_do_not_matter),
        cmocka_unit_test(neighbours_do_not_leak),
        cmocka_unit_test(activations_are_rounded_to_nearest_even),
        cmocka_unit_test(empty_and_refused),
        cmocka_unit_test(panels),
        cmocka_unit_test(sgemm),
    };
    printf("MOEC_KERNEL=%s: %s, %s\n", limit, moec_gemm_kernel(MOEC_COMPUTE_F32), moec_gemm_kernel(MOEC_COMPUTE_BF16));
    return cmocka_run_group_tests_name(limit, tests, NULL, NULL);
}

int main(int argc, char **argv)
{
    (void)argc;
    return every_kernel(argv, run_all);
}
