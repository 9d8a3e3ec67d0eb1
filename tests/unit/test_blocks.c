/* ggml's block types: bytes made by hand, what is written of values on a grid and of extreme ones, and what is refused. gguf-py
 * reads the same bytes in tests/interop/test_blocks.py. Every test runs once per instruction set that this machine has. */
#include "kernels.h"
#include "num/blocks.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static uint32_t seed = 5;

static float uniform(void)
{
    seed = seed * 1664525U + 1013904223U;
    return (float)(seed >> 8) * 0x1p-23F - 1.0F;
}

/* Sum of uniform values: near to normal, of variance 1. */
static float normal(void)
{
    float sum = 0.0F;
    for (int i = 0; i < 3; i++)
        sum += uniform();
    return sum;
}

static void write_row(uint8_t *out, const float *w, const float *importance, int64_t n, moec_block type)
{
    moec_err err = {MOEC_OK, ""};
    if (moec_blocks_write(out, w, importance, n, type, &err) != MOEC_OK)
        fail_msg("%s: %s", moec_blocks[type].name, err.text);
}

static void read_row(float *out, const uint8_t *in, int64_t n, moec_block type)
{
    assert_int_equal(moec_blocks_read(out, in, n, type, NULL), MOEC_OK);
}

/* Writes and reads in an allocation of just that size, at an odd address. */
static void there_and_back(float *out, const float *w, const float *importance, int64_t n, moec_block type)
{
    const size_t bytes = (size_t)moec_blocks_bytes(type, n);
    uint8_t *p = malloc(bytes + 1);
    assert_non_null(p);
    write_row(p + 1, w, importance, n, type);
    read_row(out, p + 1, n, type);
    free(p);
}

static void names_sizes_and_what_replaces_what(void **state)
{
    (void)state;
    for (int i = 0; i < MOEC_BLOCK_COUNT; i++)
        assert_int_equal(moec_blocks_find(moec_blocks[i].name), i);
    assert_int_equal(moec_blocks_find("Q4_K"), MOEC_BLOCK_COUNT);
    assert_int_equal(moec_blocks_bytes(MOEC_BLOCK_Q4_K, 768), 3 * 144);
    assert_int_equal(moec_blocks_bytes(MOEC_BLOCK_Q4_K, 768 + 32), -1);
    assert_int_equal(moec_blocks_bytes(MOEC_BLOCK_Q8_0, 0), 0);
    assert_int_equal(moec_blocks_bytes(MOEC_BLOCK_Q8_0, -32), -1);
    assert_int_equal(moec_blocks_bytes(MOEC_BLOCK_F16, INT64_MAX), -1);
    assert_int_equal(moec_blocks_bytes(MOEC_BLOCK_COUNT, 256), -1);
    static const moec_block pairs[][2] = {
        {MOEC_BLOCK_Q2_K, MOEC_BLOCK_IQ4_NL}, {MOEC_BLOCK_Q3_K, MOEC_BLOCK_IQ4_NL}, {MOEC_BLOCK_IQ4_XS, MOEC_BLOCK_IQ4_NL},
        {MOEC_BLOCK_Q4_K, MOEC_BLOCK_Q5_0}, {MOEC_BLOCK_Q5_K, MOEC_BLOCK_Q5_1}, {MOEC_BLOCK_Q6_K, MOEC_BLOCK_Q8_0},
        {MOEC_BLOCK_TQ1_0, MOEC_BLOCK_IQ4_NL}, {MOEC_BLOCK_TQ2_0, MOEC_BLOCK_IQ4_NL}, {MOEC_BLOCK_Q4_0, MOEC_BLOCK_Q4_0},
        {MOEC_BLOCK_BF16, MOEC_BLOCK_BF16}};
    for (size_t i = 0; i < MOEC_COUNT(pairs); i++) {
        assert_int_equal(moec_blocks_fall_back(pairs[i][0], 1408), pairs[i][1]);
        assert_int_equal(moec_blocks_fall_back(pairs[i][0], 1536), pairs[i][0]);
        if (pairs[i][0] != MOEC_BLOCK_BF16)
            assert_int_equal(moec_blocks_fall_back(pairs[i][0], 1500), MOEC_BLOCK_F16);
    }
}

/* ---- bytes by hand: 0x3c00 is 1, 0x3800 one half, 0xc000 minus 2 -------------------------------------------------------- */

static void expect(const uint8_t *bytes, moec_block type, const int *at, const float *value, int n)
{
    float out[256];
    read_row(out, bytes, moec_blocks[type].elements, type);
    for (int i = 0; i < n; i++)
        if (out[at[i]] != value[i])
            fail_msg("%s: value %d is %g, not %g", moec_blocks[type].name, at[i], (double)out[at[i]], (double)value[i]);
}

#define EXPECT(bytes, type, ...) \
    expect(bytes, type, (const int[]){__VA_ARGS__}, want, (int)(sizeof want / sizeof want[0]))

static void small_blocks_by_hand(void **state)
{
    (void)state;
    uint8_t b[36] = {0};
    b[1] = 0x38; /* d = 0.5 */
    b[2] = 0xf1; /* values 0 and 16: codes 1 and 15 */
    {
        const float want[] = {-3.5F, 3.5F, -4.0F};
        EXPECT(b, MOEC_BLOCK_Q4_0, 0, 16, 1);
    }
    {
        const float want[] = {-52.0F, 56.5F, -63.5F};
        EXPECT(b, MOEC_BLOCK_IQ4_NL, 0, 16, 1);
    }
    {
        const float want[] = {-7.5F, 0.0F};
        EXPECT(b, MOEC_BLOCK_Q8_0, 0, 31);
    }
    b[2] = 0, b[3] = 0x3c; /* m = 1 */
    b[4] = 0xf1;
    {
        const float want[] = {1.5F, 8.5F, 1.0F};
        EXPECT(b, MOEC_BLOCK_Q4_1, 0, 16, 1);
    }
    const uint8_t q5_0[22] = {0, 0x38, 1, 0, 0, 0x80, 0xf1}; /* fifth bits of values 0 and 31 */
    {
        const float want[] = {0.5F, -0.5F, 0.0F, -8.0F};
        EXPECT(q5_0, MOEC_BLOCK_Q5_0, 0, 16, 31, 1);
    }
    const uint8_t q5_1[24] = {0, 0x38, 0, 0xc0, 1, 0, 0, 0x80, 0xf1};
    {
        const float want[] = {6.5F, 5.5F, 6.0F, -2.0F};
        EXPECT(q5_1, MOEC_BLOCK_Q5_1, 0, 16, 31, 1);
    }
    const uint8_t mxfp4[17] = {129, 0xf1, 0x87}; /* 2 * */
    {
        const float want[] = {2.0F, -24.0F, 24.0F, 0.0F};
        EXPECT(mxfp4, MOEC_BLOCK_MXFP4, 0, 16, 1, 17);
    }
    const uint8_t least[17] = {0, 0x02};
    {
        const float want[] = {0x1p-127F};
        EXPECT(least, MOEC_BLOCK_MXFP4, 0);
    }
}

static void large_blocks_by_hand(void **state)
{
    (void)state;
    uint8_t q2[84] = {0x23, [9] = 0x14}; /* sub-block 0: scale 3, minimum 2; 9: 4 and 1 */
    q2[16] = 0x02;                       /* value 0 */
    q2[16 + 32 + 16] = 0x03;             /* value 144, the first of sub-block 9 */
    q2[81] = 0x3c, q2[83] = 0x38;        /* 1 and 0.5 */
    {
        const float want[] = {5.0F, -1.0F, 11.5F, -0.5F};
        EXPECT(q2, MOEC_BLOCK_Q2_K, 0, 1, 144, 145);
    }
    uint8_t q3[110] = {[31] = 0x82};   /* high bits of values 63 and 255 */
    q3[32 + 31] = 1 << 2;              /* two low bits of value 63: 1 */
    q3[96 + 3] = 5, q3[96 + 7] = 0xf0; /* low bits of scales 3 and 15 */
    q3[96 + 11] = 0x82;                /* high bits of both: 5 + 32 - 32, 15 + 32 - 32 */
    q3[109] = 0x3c;
    {
        const float want[] = {5.0F, -20.0F, 0.0F, -60.0F, 128.0F};
        EXPECT(q3, MOEC_BLOCK_Q3_K, 63, 62, 255, 254, 0);
    }
    uint8_t q4[144] = {0, 0x3c, 0, 0x38, 0x41}; /* scale 0: 1; high bits of scale 4: 1 */
    q4[4 + 4] = 0x82, q4[4 + 8] = 0x53;         /* minimum 0: 2, of 4: 5 + 32; scale 4: 3 + 16 */
    q4[16] = 0x07, q4[16 + 64] = 0x0f;          /* value 0, value 128 */
    {
        const float want[] = {6.0F, -1.0F, 266.5F, -18.5F, 0.0F};
        EXPECT(q4, MOEC_BLOCK_Q4_K, 0, 1, 128, 129, 32);
    }
    uint8_t q5[176];
    memcpy(q5, q4, 16);
    memset(q5 + 16, 0, sizeof q5 - 16);
    q5[16] = 0x11, q5[48] = 0x07; /* fifth bits of value 0 of sub-blocks 0 and 4 */
    {
        const float want[] = {22.0F, 285.5F};
        EXPECT(q5, MOEC_BLOCK_Q5_K, 0, 128);
    }
    uint8_t q6[210] = {[0] = 0x21, [128] = 0x30, [192] = 2, [196] = 0xff, [209] = 0x38};
    {
        const float want[] = {-31.0F, -0.5F * (2 + 48 - 32), -32.0F, 0.0F};
        EXPECT(q6, MOEC_BLOCK_Q6_K, 0, 64, 1, 16);
    }
    {
        q6[194] = 1; /* values 32 to 47: two high bits 0 of value 33, 0x30 >> 2 of value 32 */
        q6[128] = 0x0c;
        const float want[] = {0.5F * (48 - 32), -16.0F};
        EXPECT(q6, MOEC_BLOCK_Q6_K, 32, 33);
    }
    uint8_t iq4[136] = {0, 0x3c, 0x02, 0xc0, [4] = 0x03, [7] = 0xf0, [8] = 0x8f, [8 + 112] = 0x80};
    {
        const float want[] = {3.0F * 113, 3.0F * 1, 31.0F * -127, 31.0F * 1, 32.0F * 127};
        EXPECT(iq4, MOEC_BLOCK_IQ4_XS, 0, 16, 224, 240, 32);
    }
    uint8_t tq2[66] = {[0] = 0x86, [65] = 0xc0}; /* -2: codes 2, 1, 0, 2 */
    {
        const float want[] = {-2.0F, 0.0F, 2.0F, -2.0F, 2.0F};
        EXPECT(tq2, MOEC_BLOCK_TQ2_0, 0, 32, 64, 96, 128);
    }
    uint8_t tq1[54] = {[0] = 216, [53] = 0x3c}; /* digits 2 1 1 2 1: 205, (205 * 256 + 242) / 243 = 216.97 */
    {
        const float want[] = {1.0F, 0.0F, 0.0F, 1.0F, 0.0F, -1.0F};
        EXPECT(tq1, MOEC_BLOCK_TQ1_0, 0, 32, 64, 96, 128, 1);
    }
}

/* ---- there and back ----------------------------------------------------------------------------------------------------- */

/* What is on the grid of a type comes back bit for bit. */
static void values_on_the_grid_are_kept(void **state)
{
    (void)state;
    float w[256], back[256];
    static const moec_block exact[] = {MOEC_BLOCK_F16, MOEC_BLOCK_BF16, MOEC_BLOCK_Q4_0, MOEC_BLOCK_Q4_1, MOEC_BLOCK_Q5_0,
                                       MOEC_BLOCK_Q5_1, MOEC_BLOCK_Q8_0, MOEC_BLOCK_IQ4_NL, MOEC_BLOCK_MXFP4};
    static const float step[] = {1, 1, 0.25F, 0.25F, 0.25F, 0.25F, 0.25F, 0.25F, 0.25F};
    static const int iq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    static const float e2m1[16] = {0, 1, 2, 3, 4, 6, 8, 12, -12, -1, -2, -3, -4, -6, -8, -12};
    for (size_t k = 0; k < MOEC_COUNT(exact); k++) {
        const moec_block type = exact[k];
        for (int i = 0; i < 256; i++) {
            const float value[MOEC_BLOCK_COUNT] = {
                [MOEC_BLOCK_F16] = (float)i, [MOEC_BLOCK_BF16] = (float)i, [MOEC_BLOCK_Q4_0] = (float)(i % 16 - 8),
                [MOEC_BLOCK_Q4_1] = (float)(i % 16 + 3), [MOEC_BLOCK_Q5_0] = (float)(i % 32 - 16),
                [MOEC_BLOCK_Q5_1] = (float)(i % 32 - 40), [MOEC_BLOCK_Q8_0] = (float)(i % 32 * 8 - 127),
                [MOEC_BLOCK_IQ4_NL] = (float)iq4[i % 16], [MOEC_BLOCK_MXFP4] = e2m1[i % 16]};
            w[i] = value[type] * step[k];
        }
        there_and_back(back, w, NULL, 256, type);
        for (int i = 0; i < 256; i++)
            if (w[i] != back[i])
                fail_msg("%s: value %d: %g became %g", moec_blocks[type].name, i, (double)w[i], (double)back[i]);
    }
    for (int i = 0; i < 256; i++)
        w[i] = (float)((i * 7 + i / 16) % 3 - 1) * 0.375F;
    for (int t = MOEC_BLOCK_TQ1_0; t <= MOEC_BLOCK_TQ2_0; t++) {
        there_and_back(back, w, NULL, 256, (moec_block)t);
        assert_memory_equal(w, back, sizeof w);
    }
}

static double error_of(const float *x, const float *w, const float *m, int n)
{
    double sum = 0.0, all = 0.0;
    for (int i = 0; i < n; i++) {
        const double r = (double)x[i] - (double)w[i], weight = m ? (double)m[i] : 1.0;
        sum += weight * r * r;
        all += weight * (double)w[i] * (double)w[i];
    }
    return sum / all;
}

static void errors_are_what_the_bits_allow(void **state)
{
    (void)state;
    enum { N = 256 * 5 };
    static const double limit[MOEC_BLOCK_COUNT] = {
        [MOEC_BLOCK_F16] = 1e-7, [MOEC_BLOCK_BF16] = 5e-6, [MOEC_BLOCK_Q4_0] = 0.009, [MOEC_BLOCK_Q4_1] = 0.006,
        [MOEC_BLOCK_Q5_0] = 0.002, [MOEC_BLOCK_Q5_1] = 0.0015, [MOEC_BLOCK_Q8_0] = 4e-5, [MOEC_BLOCK_Q2_K] = 0.08,
        [MOEC_BLOCK_Q3_K] = 0.025, [MOEC_BLOCK_Q4_K] = 0.006, [MOEC_BLOCK_Q5_K] = 0.0015, [MOEC_BLOCK_Q6_K] = 4e-4,
        [MOEC_BLOCK_IQ4_NL] = 0.007, [MOEC_BLOCK_IQ4_XS] = 0.007, [MOEC_BLOCK_MXFP4] = 0.015, [MOEC_BLOCK_TQ1_0] = 0.21,
        [MOEC_BLOCK_TQ2_0] = 0.21};
    float w[N], m[N], back[N], by_weight[N];
    for (int i = 0; i < N; i++) {
        w[i] = 0.02F * normal();
        m[i] = expf(2.0F * uniform());
    }
    for (int t = 0; t < MOEC_BLOCK_COUNT; t++) {
        there_and_back(back, w, NULL, N, (moec_block)t);
        there_and_back(by_weight, w, m, N, (moec_block)t);
        if (error_of(back, w, NULL, N) > limit[t])
            fail_msg("%s: error %g", moec_blocks[t].name, error_of(back, w, NULL, N));
        if (t > MOEC_BLOCK_BF16 && error_of(by_weight, w, m, N) >= error_of(back, w, m, N))
            fail_msg("%s: importance does not lower the error that it weighs", moec_blocks[t].name);
    }
}

/* A block does not depend on what lies around it, and importance that is the same everywhere is none. */
static void blocks_stand_alone(void **state)
{
    (void)state;
    enum { N = 256 * 7 };
    float w[N], zero[N] = {0};
    uint8_t whole[N * 2], one[256 * 2], weighted[N * 2];
    for (int i = 0; i < N; i++)
        w[i] = normal();
    for (int t = 0; t < MOEC_BLOCK_COUNT; t++) {
        const moec_block type = (moec_block)t;
        const int elements = moec_blocks[t].elements, bytes = moec_blocks[t].bytes;
        write_row(whole, w, NULL, N, type);
        for (int k = 0; k < N / elements; k++) {
            write_row(one, w + k * elements, NULL, elements, type);
            assert_memory_equal(one, whole + k * bytes, (size_t)bytes);
        }
        write_row(weighted, w, zero, N, type);
        assert_memory_equal(weighted, whole, (size_t)moec_blocks_bytes(type, N));
    }
}

static void check_values(const float *w, const float *importance, double share, const char *what)
{
    float back[256];
    for (int t = 0; t < MOEC_BLOCK_COUNT; t++) {
        double top = 0.0;
        there_and_back(back, w, importance, 256, (moec_block)t);
        for (int i = 0; i < 256; i++)
            top = fmax(top, fabs((double)w[i]));
        for (int i = 0; i < 256; i++)
            if (!(fabs((double)back[i] - (double)w[i]) <= share * top))
                fail_msg("%s, %s: value %d: %g became %g", moec_blocks[t].name, what, i, (double)w[i], (double)back[i]);
    }
}

static void extremes(void **state)
{
    (void)state;
    float w[256] = {0}, m[256] = {0};
    m[77] = 3e38F;
    check_values(w, NULL, 0.0, "zeros");
    check_values(w, m, 0.0, "zeros, weighted");
    for (int sign = -1; sign <= 1; sign += 2) {
        for (int i = 0; i < 256; i++)
            w[i] = (float)sign * 0.7F;
        check_values(w, NULL, 0.2, "a constant"); /* e2m1 has nothing nearer */
        check_values(w, m, 0.2, "a constant, weighted");
        for (int i = 0; i < 256; i++)
            w[i] = (float)sign * 65504.0F;
        check_values(w, NULL, 0.2, "the largest of float16");
        for (int i = 0; i < 256; i++)
            w[i] = (float)sign * 1e-40F;
        check_values(w, NULL, 1.0, "denormals");
        for (int i = 0; i < 256; i++)
            w[i] = (float)sign * (i == 100 ? 50.0F : 0.001F);
        check_values(w, NULL, 0.2, "one that is far from the others");
        check_values(w, m, 0.75, "one that is far from the others, unimportant");
    }
    for (int i = 0; i < 256; i++)
        w[i] = uniform() * 65504.0F;
    check_values(w, NULL, 0.75, "large");
    for (int i = 0; i < 256; i++)
        w[i] = uniform() * 1e-6F;
    check_values(w, NULL, 1.0, "small");
    for (int i = 0; i < 256; i++)
        w[i] = uniform() * 1e-7F;
    check_values(w, NULL, 2.5, "as small as the steps of float16"); /* 6e-8: scale and minimum go either way */
    for (int i = 0; i < 256; i++)
        w[i] = i % 2 ? 3.4e38F : -3.4e38F;
    float back[256];
    static const moec_block wide[] = {MOEC_BLOCK_BF16, MOEC_BLOCK_MXFP4};
    for (size_t k = 0; k < MOEC_COUNT(wide); k++) {
        there_and_back(back, w, NULL, 256, wide[k]);
        for (int i = 0; i < 256; i++)
            assert_true(fabsf(back[i] / w[i] - 1.0F) < 0.3F);
    }
}

/* ---- refusals ----------------------------------------------------------------------------------------------------------- */

static void what_is_refused(void **state)
{
    (void)state;
    float w[256], m[256];
    uint8_t out[512];
    moec_err err = {MOEC_OK, ""};
    for (int i = 0; i < 256; i++) {
        w[i] = normal();
        m[i] = 1.0F;
    }
    for (int t = 0; t < MOEC_BLOCK_COUNT; t++) {
        const moec_block type = (moec_block)t;
        static const float bad[] = {NAN, INFINITY, -INFINITY};
        for (size_t k = 0; k < MOEC_COUNT(bad); k++)
            for (int i = 0; i < 256; i += 51) {
                const float was = w[i];
                w[i] = bad[k];
                assert_int_equal(moec_blocks_write(out, w, NULL, 256, type, NULL), MOEC_ENUMERIC);
                w[i] = was;
                m[i] = k == 2 ? -1.0F : bad[k];
                assert_int_equal(moec_blocks_write(out, w, m, 256, type, NULL), MOEC_ENUMERIC);
                m[i] = 1.0F;
            }
        const float was = w[9];
        w[9] = -65505.0F;
        assert_int_equal(moec_blocks_write(out, w, NULL, 256, type, NULL),
                         type == MOEC_BLOCK_BF16 || type == MOEC_BLOCK_MXFP4 ? MOEC_OK : MOEC_ENUMERIC);
        w[9] = was;
        if (moec_blocks[t].elements > 1) {
            assert_int_equal(moec_blocks_write(out, w, NULL, 40, type, NULL), MOEC_ESHAPE);
            assert_int_equal(moec_blocks_read(w, out, 40, type, NULL), MOEC_ESHAPE);
        }
        assert_int_equal(moec_blocks_write(out, w, m, 0, type, NULL), MOEC_OK);
        assert_int_equal(moec_blocks_read(w, out, 0, type, NULL), MOEC_OK);
    }
    assert_int_equal(moec_blocks_write(out, w, NULL, 256, MOEC_BLOCK_COUNT, &err), MOEC_EINVAL);
    assert_int_equal(moec_blocks_read(w, out, 256, MOEC_BLOCK_COUNT, NULL), MOEC_EINVAL);
}

static int run_all(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(names_sizes_and_what_replaces_what),
        cmocka_unit_test(small_blocks_by_hand),
        cmocka_unit_test(large_blocks_by_hand),
        cmocka_unit_test(values_on_the_grid_are_kept),
        cmocka_unit_test(errors_are_what_the_bits_allow),
        cmocka_unit_test(blocks_stand_alone),
        cmocka_unit_test(extremes),
        cmocka_unit_test(what_is_refused),
    };
    return cmocka_run_group_tests_name(getenv("MOEC_KERNEL"), tests, NULL, NULL);
}

int main(int argc, char **argv)
{
    (void)argc;
    return every_kernel(argv, run_all);
}
