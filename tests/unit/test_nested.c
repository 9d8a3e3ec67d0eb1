/* Nested codes: their layout against a formula written out here, every width of one file, scales that no others are better than, and
 * rounding whose losses are those of a product in float64. */
#include "base/mem.h"
#include "method/nested.h"
#include "run/format.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

static uint64_t seed = 7;

static uint64_t next(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

/* About a Gaussian. */
static float value(void)
{
    float sum = 0.0F;
    for (int i = 0; i < 12; i++)
        sum += (float)(next() >> 40) / (float)(1 << 24);
    return sum - 6.0F;
}

static void must(moec_status st, const moec_err *err)
{
    if (st != MOEC_OK)
        fail_msg("%s", err->text);
}

/* --- the layout ------------------------------------------------------------------------------------------------------- */

/* Bytes made here; every part of the matrix at every width. */
static void bytes_are_read_as_written_down(void **state)
{
    enum { ROWS = 5, COLS = 48, GROUP = 16, PLANES = 3 };
    unsigned char base[ROWS * COLS / 4], plane[PLANES * ROWS * COLS / 8];
    float scale[(1 + PLANES) * ROWS * COLS / GROUP], got[ROWS * COLS];
    (void)state;
    for (size_t i = 0; i < sizeof base; i++)
        base[i] = (unsigned char)(next() >> 30);
    for (size_t i = 0; i < sizeof plane; i++)
        plane[i] = (unsigned char)(next() >> 30);
    for (size_t i = 0; i < MOEC_COUNT(scale); i++)
        scale[i] = value();
    const moec_tensor b = {.name = "b", .dtype = MOEC_U8, .rank = 2, .dim = {ROWS, COLS / 4}, .bytes = sizeof base, .data = base};
    const moec_tensor s = {.name = "s", .dtype = MOEC_F32, .rank = 3, .dim = {1 + PLANES, ROWS, COLS / GROUP}, .bytes = sizeof scale,
                           .data = scale};
    const moec_tensor p = {.name = "p", .dtype = MOEC_U8, .rank = 3, .dim = {PLANES, ROWS, COLS / 8}, .bytes = sizeof plane, .data = plane};
    moec_weight w = {.of = &b, .scale = &s, .zero = &p, .rows = ROWS - 1, .cols = COLS, .at = COLS, .row_step = COLS, .col_step = 1,
                     .block_cols = GROUP, .storage = MOEC_NESTED};
    for (w.bits = 2; w.bits <= 2 + PLANES; w.bits++) {
        assert_int_equal(moec_weight_check(&w, NULL), MOEC_OK);
        for (int c = 0; c < COLS; c += 11) {
            const int cols = c + 13 < COLS ? 13 : COLS - c;
            moec_weight_read(got, COLS, &w, 1, ROWS - 2, c, cols);
            for (int i = 0; i < ROWS - 2; i++)
                for (int j = c; j < c + cols; j++) {
                    const int r = i + 2, g = j / GROUP;
                    float want = scale[r * (COLS / GROUP) + g] * (float)((base[(r * COLS + j) / 4] >> (2 * (j % 4)) & 3) - 2);
                    for (int k = 1; k <= w.bits - 2; k++) {
                        const int bit = plane[((k - 1) * ROWS * COLS + r * COLS + j) / 8] >> (j % 8) & 1;
                        want += scale[(k * ROWS + r) * (COLS / GROUP) + g] * (bit ? 0.5F : -0.5F);
                    }
                    assert_memory_equal(&got[i * COLS + (j - c)], &want, sizeof want);
                }
        }
    }
    w.bits = 3; /* what is counted is what is read */
    assert_int_equal(moec_weight_bytes(&w), (ROWS - 1) * COLS * 3 / 8 + (ROWS - 1) * (COLS / GROUP) * 2 * 4);
    moec_weight bad = w;
    bad.bits = 6;
    assert_int_equal(moec_weight_check(&bad, NULL), MOEC_EINVAL);
    bad.bits = 1;
    assert_int_equal(moec_weight_check(&bad, NULL), MOEC_EINVAL);
    bad = w;
    bad.zero = NULL;
    assert_int_equal(moec_weight_check(&bad, NULL), MOEC_EINVAL);
    bad.bits = 2;
    assert_int_equal(moec_weight_check(&bad, NULL), MOEC_OK);
    bad = w;
    bad.rows = ROWS;
    assert_int_equal(moec_weight_check(&bad, NULL), MOEC_EINVAL);
    bad = w;
    bad.block_cols = 32;
    assert_int_equal(moec_weight_check(&bad, NULL), MOEC_EINVAL);
    moec_tensor cut = s;
    cut.bytes -= 4;
    bad = w;
    bad.scale = &cut;
    assert_int_equal(moec_weight_check(&bad, NULL), MOEC_EINVAL);
}

static moec_qcodes random_codes(const moec_qgrid *g, int64_t rows, int64_t cols)
{
    moec_qcodes c;
    moec_err err = {MOEC_OK, ""};
    must(moec_nested_new(&c, g, rows, cols, &err), &err);
    for (int l = 0; l <= c.planes; l++) {
        moec_qcodes *one = l == 0 ? &c : &c.plane[l - 1];
        for (int64_t i = 0; i < rows * cols; i++)
            one->code[i] = (uint8_t)(next() >> 20 & (l == 0 ? 3 : 1));
        for (int64_t i = 0; i < rows * (cols / g->group); i++)
            one->scale[i] = (float)((int)(next() >> 20 & 255) - 100) / 64.0F; /* of either sign, exact in every type */
    }
    return c;
}

static void one_file_has_every_width(void **state)
{
    enum { ROWS = 6, COLS = 64 };
    static const moec_dtype types[] = {MOEC_F16, MOEC_BF16, MOEC_F32};
    const moec_qformat *f = moec_qformat_find("nested");
    (void)state;
    for (int bits = 2; bits <= 8; bits++) {
        const moec_qgrid g = {.bits = bits, .group = 16, .scale_type = types[bits % 3]};
        moec_qcodes c = random_codes(&g, ROWS, COLS), back;
        moec_piece piece[MOEC_PIECES];
        moec_tensor t[MOEC_PIECES];
        const moec_tensor *at[MOEC_PIECES];
        void *data[MOEC_PIECES] = {NULL};
        moec_err err = {MOEC_OK, ""};
        float want[ROWS * COLS], got[ROWS * COLS];
        const int n = f->pieces(piece, &g, ROWS, COLS);
        assert_int_equal(n, bits == 2 ? 2 : 3);
        for (int i = 0; i < n; i++) {
            t[i] = (moec_tensor){.name = "t", .dtype = piece[i].dtype, .rank = piece[i].rank, .bytes = (size_t)moec_dtypes[piece[i].dtype].bytes};
            for (int d = 0; d < t[i].rank; d++)
                t[i].bytes *= (size_t)(t[i].dim[d] = piece[i].dim[d]);
            must(moec_alloc(&data[i], t[i].bytes, 1, &err), &err);
            t[i].data = data[i];
            at[i] = &t[i];
        }
        f->write(data, &c);
        must(moec_nested_new(&back, &g, ROWS, COLS, &err), &err);
        must(f->read(&back, (const void *const *)data, &err), &err);
        moec_quant_restore(want, &c, 0, ROWS);
        moec_quant_restore(got, &back, 0, ROWS);
        assert_memory_equal(got, want, sizeof want);
        moec_weight w = moec_qformat_view(f, at, &g, ROWS, COLS);
        must(moec_weight_check(&w, &err), &err);
        assert_int_equal(w.bits, bits);
        for (; w.bits >= 2; w.bits--) {
            moec_nested_restore(want, &c, w.bits);
            moec_weight_read(got, COLS, &w, 0, ROWS, 0, COLS);
            assert_memory_equal(got, want, sizeof want);
        }
        for (int i = 0; i < n; i++)
            moec_free(data[i]);
        moec_qcodes_release(&c);
        moec_qcodes_release(&back);
    }
    moec_qcodes none;
    assert_int_equal(moec_nested_new(&none, &(moec_qgrid){.bits = 1, .group = 8, .scale_type = MOEC_F16}, 1, 8, NULL), MOEC_EINVAL);
    assert_int_equal(moec_nested_new(&none, &(moec_qgrid){.bits = 3, .group = 8, .zeros = true, .scale_type = MOEC_F16}, 1, 8, NULL),
                     MOEC_EINVAL);
    assert_int_equal(moec_nested_new(&none, &(moec_qgrid){.bits = 3, .group = 5, .scale_type = MOEC_F16}, 1, 8, NULL), MOEC_EINVAL);
}

/* --- scales ----------------------------------------------------------------------------------------------------------- */

/* J of nested.h by its definition: over h [n,n] or, with h NULL, over the columns' importance m. */
static double joint(const moec_qcodes *c, const float *w, const float *m, const double *h)
{
    const int64_t n = c->cols;
    double sum = 0.0;
    float *v;
    must(moec_alloc((void **)&v, (size_t)(c->rows * n), sizeof *v, NULL), NULL);
    for (int bits = 2; bits <= 2 + c->planes; bits++) {
        moec_nested_restore(v, c, bits);
        double all = 0.0;
        for (int64_t r = 0; r < c->rows; r++)
            for (int64_t i = 0; i < n; i++) {
                const double d = (double)w[r * n + i] - (double)v[r * n + i];
                for (int64_t j = 0; h && j < n; j++)
                    all += d * h[i > j ? i * n + j : j * n + i] * ((double)w[r * n + j] - (double)v[r * n + j]);
                all += h ? 0.0 : (double)m[i] * d * d;
            }
        sum += pow(4.0, bits) * all;
    }
    moec_free(v);
    return sum;
}

static void scales_are_of_least_error(void **state)
{
    enum { ROWS = 4, COLS = 64, GROUP = 32 };
    float w[ROWS * COLS], m[COLS];
    (void)state;
    for (int i = 0; i < ROWS * COLS; i++)
        w[i] = value();
    for (int i = 0; i < COLS; i++)
        m[i] = (float)(1 + i % 5);
    for (int bits = 2; bits <= 5; bits++) {
        const moec_qgrid g = {.bits = bits, .group = GROUP, .scale_type = MOEC_F32};
        moec_qcodes c = random_codes(&g, ROWS, COLS);
        moec_err err = {MOEC_OK, ""};
        const double before = joint(&c, w, m, NULL);
        must(moec_nested_refit(&c, w, m, 0, ROWS, &err), &err);
        const double after = joint(&c, w, m, NULL);
        assert_true(after < before);
        for (int l = 0; l <= c.planes; l++)
            for (int64_t i = 0; i < ROWS * (COLS / GROUP); i++)
                for (int side = -1; side <= 1; side += 2) {
                    float *s = l == 0 ? &c.scale[i] : &c.plane[l - 1].scale[i];
                    const float was = *s;
                    *s = was + (float)side * 1e-2F;
                    assert_true(joint(&c, w, m, NULL) >= after * (1.0 - 1e-6));
                    *s = was;
                }
        moec_qcodes_release(&c);
    }
}

/* --- rounding --------------------------------------------------------------------------------------------------------- */

static void losses_are_those_of_h(void **state)
{
    enum { ROWS = 12, COLS = 48, TOKENS = 96, BITS = 4 };
    static float w[ROWS * COLS], v[ROWS * COLS];
    static double h[COLS * COLS];
    const moec_qgrid g = {.bits = BITS, .group = 16, .scale_type = MOEC_F16};
    const moec_gptq_opts opts = MOEC_GPTQ_DEFAULTS;
    moec_err err = {MOEC_OK, ""};
    moec_gptq *metric;
    moec_qcodes clip, c;
    double loss, nearest;
    (void)state;
    for (int i = 0; i < ROWS * COLS; i++)
        w[i] = value();
    memset(h, 0, sizeof h);
    for (int t = 0; t < TOKENS; t++) {
        double x[COLS];
        const double common = (double)value();
        for (int i = 0; i < COLS; i++)
            x[i] = (double)value() + common;
        for (int i = 0; i < COLS; i++)
            for (int j = 0; j <= i; j++)
                h[i * COLS + j] += x[i] * x[j] / TOKENS;
    }
    must(moec_gptq_new(&metric, h, COLS, &opts, &err), &err);
    must(moec_nested_new(&clip, &g, ROWS, COLS, &err), &err);
    must(moec_nested_new(&c, &g, ROWS, COLS, &err), &err);
    must(moec_nested_round(&clip, NULL, NULL, w, MOEC_ROUND_CLIP, NULL, moec_gptq_importance(metric), &err), &err);
    must(moec_nested_round(&c, &loss, &nearest, w, MOEC_ROUND_GPTQ, metric, NULL, &err), &err);
    for (int k = 0; k < 2; k++) {
        double want = 0.0;
        moec_quant_restore(v, k == 0 ? &c : &clip, 0, ROWS);
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < COLS; i++)
                for (int j = 0; j < COLS; j++)
                    want += (double)(w[r * COLS + i] - v[r * COLS + i]) * h[i > j ? i * COLS + j : j * COLS + i] *
                            (double)(w[r * COLS + j] - v[r * COLS + j]);
        assert_true(fabs((k == 0 ? loss : nearest) - want) < 1e-4 * want);
    }
    assert_true(joint(&c, w, NULL, h) < 0.7 * joint(&clip, w, NULL, h));
    double last = INFINITY; /* every bit takes its share */
    for (int bits = 2; bits <= BITS; bits++) {
        double error;
        moec_nested_restore(v, &c, bits);
        must(moec_gptq_loss(&error, metric, w, v, ROWS, &err), &err);
        assert_true(error < 0.5 * last);
        last = error;
    }
    moec_qcodes_release(&clip);
    moec_qcodes_release(&c);
    moec_gptq_free(metric);
}

static void bad_numbers_are_refused(void **state)
{
    const moec_qgrid g = {.bits = 3, .group = 8, .scale_type = MOEC_F16};
    float w[8] = {1, 2, 3, 4, 5, 6, 7, NAN};
    moec_qcodes c;
    (void)state;
    assert_int_equal(moec_nested_new(&c, &g, 1, 8, NULL), MOEC_OK);
    assert_int_equal(moec_nested_round(&c, NULL, NULL, w, MOEC_ROUND_CLIP, NULL, NULL, NULL), MOEC_ENUMERIC);
    for (int how = MOEC_ROUND_NEAREST; how <= MOEC_ROUND_CLIP; how++) { /* and zeros stay zeros, but for what a plane cannot say */
        memset(w, 0, sizeof w);
        assert_int_equal(moec_nested_round(&c, NULL, NULL, w, (moec_rounding)how, NULL, NULL, NULL), MOEC_OK);
        for (int bits = 2; bits <= 3; bits++) {
            moec_nested_restore(w, &c, bits);
            for (int i = 0; i < 8; i++)
                assert_true(fabsf(w[i]) <= (bits == 2 ? 0.0F : 0x1p-25F));
        }
    }
    moec_qcodes_release(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bytes_are_read_as_written_down), cmocka_unit_test(one_file_has_every_width),
        cmocka_unit_test(scales_are_of_least_error),      cmocka_unit_test(losses_are_those_of_h),
        cmocka_unit_test(bad_numbers_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
