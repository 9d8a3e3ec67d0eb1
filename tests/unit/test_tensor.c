#include "num/tensor.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* The definition of a small float format, in double: sign, exponent field, fraction field. */
static double by_definition(unsigned bits, int exponent_bits, int fraction_bits)
{
    int top = (1 << exponent_bits) - 1, bias = top / 2;
    int exponent = (int)(bits >> fraction_bits) & top;
    double fraction = ldexp((double)(bits & ((1U << fraction_bits) - 1U)), -fraction_bits);
    double sign = bits >> (exponent_bits + fraction_bits) & 1U ? -1.0 : 1.0;
    if (exponent == top)
        return fraction > 0 ? (double)NAN : sign * (double)INFINITY;
    return exponent == 0 ? sign * ldexp(fraction, 1 - bias) : sign * ldexp(1.0 + fraction, exponent - bias);
}

static void all_values(moec_dtype dtype, int exponent_bits, int fraction_bits)
{
    enum { ALL = 65536 };
    uint16_t *in = malloc(ALL * sizeof *in);
    float *out = malloc(ALL * sizeof *out);
    assert_non_null(in);
    assert_non_null(out);
    for (int i = 0; i < ALL; i++)
        in[i] = (uint16_t)i;
    moec_dtypes[dtype].to_f32(out, in, ALL);
    for (int i = 0; i < ALL; i++) {
        double want = by_definition((unsigned)i, exponent_bits, fraction_bits);
        if (isnan(want))
            assert_true(isnan(out[i]));
        else
            assert_true((double)out[i] == want && !signbit(out[i]) == !signbit(want));
    }
    free(out);
    free(in);
}

static void f16_is_exact(void **state)
{
    (void)state;
    all_values(MOEC_F16, 5, 10);
}

static void bf16_is_exact(void **state)
{
    (void)state;
    all_values(MOEC_BF16, 8, 7);
}

/* Formats of one byte, all codes: fraction_bits 3 is E4M3, which differs from the rule in its highest exponent: no infinity,
 * NaN only where the fraction is full; 2 is E5M2; 0 is E8M0, no sign and no fraction. */
static double byte_by_definition(unsigned b, int fraction_bits)
{
    if (fraction_bits == 0)
        return b == 0xff ? (double)NAN : ldexp(1.0, (int)b - 127);
    if (fraction_bits == 2)
        return by_definition(b, 5, 2);
    if ((b & 0x7f) == 0x7f)
        return (double)NAN;
    if ((b & 0x78) == 0x78)
        return (b & 0x80 ? -1.0 : 1.0) * 256.0 * (1.0 + (double)(b & 7) / 8.0);
    return by_definition(b, 4, 3);
}

static void bytes_are_exact(void **state)
{
    static const struct {
        moec_dtype dtype;
        int fraction_bits;
    } rows[] = {{MOEC_F8_E4M3, 3}, {MOEC_F8_E5M2, 2}, {MOEC_F8_E8M0, 0}};
    unsigned char in[257];
    float out[258];
    (void)state;
    for (size_t d = 0; d < MOEC_COUNT(rows); d++)
        for (int n = 0; n <= 256; n++) { /* every length, from an odd address, nothing written behind the end */
            for (int i = 0; i < n; i++)
                in[1 + i] = (unsigned char)(255 - i);
            out[n] = out[n + 1] = -99.0F;
            moec_dtypes[rows[d].dtype].to_f32(out, in + 1, n);
            assert_true(out[n] == -99.0F && out[n + 1] == -99.0F);
            for (int i = 0; i < n; i++) {
                double want = byte_by_definition((unsigned)(255 - i), rows[d].fraction_bits);
                if (isnan(want))
                    assert_true(isnan(out[i]));
                else
                    assert_true((double)out[i] == want && !signbit(out[i]) == !signbit(want));
            }
        }
    unsigned char codes[] = {0x7e, 0x08, 0x01, 0x81, 0x38}; /* 448, 2^-6, 2^-9, -2^-9 and 1 */
    moec_dtypes[MOEC_F8_E4M3].to_f32(out, codes, 5);
    assert_true(out[0] == 448.0F && out[1] == 0x1p-6F && out[2] == 0x1p-9F && out[3] == -0x1p-9F && out[4] == 1.0F);
}

/* Every length, from an odd address, with nothing written behind the end. */
static void any_length_and_alignment(void **state)
{
    static const moec_dtype dtypes[] = {MOEC_F64, MOEC_F32, MOEC_F16, MOEC_BF16};
    (void)state;
    for (size_t d = 0; d < MOEC_COUNT(dtypes); d++)
        for (int n = 0; n < 50; n++) {
            size_t size = (size_t)moec_dtypes[dtypes[d]].bytes;
            char *in = malloc((size_t)n * size + 1);
            float out[52];
            double v[50];
            assert_non_null(in);
            for (int i = 0; i < n; i++) {
                double f64 = i - 20.5;
                float f32 = (float)f64;
                uint32_t u;
                memcpy(&u, &f32, sizeof u);
                uint16_t bf16 = (uint16_t)(u >> 16), f16 = (uint16_t)(0x3c00 + i);
                const void *from[] = {&f64, &f32, &f16, &bf16};
                memcpy(in + 1 + (size_t)i * size, from[d], size);
                v[i] = dtypes[d] == MOEC_F16 ? 1.0 + i / 1024.0 : f64;
            }
            for (int i = 0; i < 52; i++)
                out[i] = -99.0F;
            moec_dtypes[dtypes[d]].to_f32(out, in + 1, n);
            for (int i = 0; i < n; i++)
                assert_true((double)out[i] == v[i]);
            assert_true(out[n] == -99.0F && out[n + 1] == -99.0F);
            free(in);
        }
}

static void table_and_names(void **state)
{
    (void)state;
    for (int i = 0; i < MOEC_DTYPE_COUNT; i++) {
        assert_non_null(moec_dtypes[i].name);
        assert_in_range(moec_dtypes[i].bytes, 1, 8);
        assert_int_equal(moec_dtype_find(moec_dtypes[i].name), i);
        bool computed = i == MOEC_F64 || i == MOEC_F32 || i == MOEC_F16 || i == MOEC_BF16 || i == MOEC_F8_E4M3 ||
                        i == MOEC_F8_E5M2 || i == MOEC_F8_E8M0;
        assert_int_equal(moec_dtypes[i].to_f32 != NULL, computed);
    }
    assert_int_equal(moec_dtype_find("f32"), MOEC_DTYPE_COUNT);
    assert_int_equal(moec_dtype_find(""), MOEC_DTYPE_COUNT);
}

/* One bad value at every place of tensors of many lengths, at an odd address. */
static void finds_the_first_nonfinite(void **state)
{
    static const struct {
        moec_dtype dtype;
        uint64_t good, bad[3];
    } rows[] = {
        {MOEC_F64, 0x7fefffffffffffffU, {0x7ff0000000000000U, 0xfff0000000000000U, 0x7ff0000000000001U}},
        {MOEC_F32, 0xff7fffffU, {0x7f800000U, 0xff800000U, 0x7f800001U}},
        {MOEC_F16, 0x7bffU, {0x7c00U, 0xfc00U, 0x7c01U}},
        {MOEC_BF16, 0xff7fU, {0x7f80U, 0xff80U, 0xffffU}},
        {MOEC_F8_E4M3, 0xfeU, {0x7fU, 0xffU, 0x7fU}},
        {MOEC_F8_E5M2, 0xfbU, {0x7cU, 0xfdU, 0x7fU}},
        {MOEC_F8_E8M0, 0xfeU, {0xffU, 0xffU, 0xffU}},
    };
    static const int lengths[] = {1, 2, 15, 128, 512, 513, 1100, 2100};
    (void)state;
    for (size_t d = 0; d < MOEC_COUNT(rows); d++)
        for (size_t l = 0; l < MOEC_COUNT(lengths); l++) {
            size_t size = (size_t)moec_dtypes[rows[d].dtype].bytes, n = (size_t)lengths[l];
            char *data = malloc(n * size + 1);
            assert_non_null(data);
            for (size_t i = 0; i < n; i++)
                memcpy(data + 1 + i * size, &rows[d].good, size);
            moec_tensor t = {.dtype = rows[d].dtype, .rank = 1, .dim = {lengths[l]}, .data = data + 1,
                             .bytes = n * size};
            assert_int_equal(moec_tensor_nonfinite(&t), -1);
            for (size_t i = n; i-- > 0;) { /* from the back: earlier ones must win over later ones */
                memcpy(data + 1 + i * size, &rows[d].bad[i % 3], size);
                assert_int_equal(moec_tensor_nonfinite(&t), (int64_t)i);
            }
            free(data);
        }
}

static void other_formats_count_as_finite(void **state)
{
    unsigned char ones[64];
    (void)state;
    memset(ones, 0xff, sizeof ones);
    for (int i = 0; i < MOEC_DTYPE_COUNT; i++) {
        moec_tensor t = {.dtype = (moec_dtype)i, .rank = 1, .data = ones, .bytes = sizeof ones};
        assert_int_equal(moec_tensor_nonfinite(&t), moec_dtypes[i].to_f32 ? 0 : -1);
        t.bytes = 0;
        assert_int_equal(moec_tensor_nonfinite(&t), -1);
    }
}

static void shape_text(void **state)
{
    static const int64_t dim[] = {2, 3, INT64_MAX};
    char buf[64];
    (void)state;
    assert_string_equal(moec_shape_text(buf, sizeof buf, 2, dim), "[2, 3]");
    assert_string_equal(moec_shape_text(buf, sizeof buf, 1, dim), "[2]");
    assert_string_equal(moec_shape_text(buf, sizeof buf, 0, dim), "[]");
    assert_string_equal(moec_shape_text(buf, sizeof buf, 3, dim), "[2, 3, 9223372036854775807]");
    assert_string_equal(moec_shape_text(buf, 6, 3, dim), "[2, 3");
    assert_string_equal(moec_shape_text(buf, 5, 3, dim), "[2, ");
    assert_string_equal(moec_shape_text(buf, 1, 3, dim), "");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(f16_is_exact),
        cmocka_unit_test(bf16_is_exact),
        cmocka_unit_test(bytes_are_exact),
        cmocka_unit_test(any_length_and_alignment),
        cmocka_unit_test(table_and_names),
        cmocka_unit_test(finds_the_first_nonfinite),
        cmocka_unit_test(other_formats_count_as_finite),
        cmocka_unit_test(shape_text),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
