#include "num/tensor.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* Values in checkpoints may lie at any address, hence memcpy in and out of short arrays whose loops have a constant
 * length: compilers turn those into vector code at every optimisation level that we use. */
enum { STEP = 16 };

static void f32_from_f32(float *out, const void *in, int64_t n)
{
    if (n > 0)
        memcpy(out, in, (size_t)n * sizeof *out);
}

static void bf16_step(float out[STEP], const unsigned char *in)
{
    uint16_t h[STEP];
    uint32_t u[STEP];
    memcpy(h, in, sizeof h);
    for (int i = 0; i < STEP; i++)
        u[i] = (uint32_t)h[i] << 16;
    memcpy(out, u, sizeof u);
}

/* The 15 low bits moved to their place in a float are the value times 2^-112, denormals included; the product with
 * 2^112 is exact. Infinities and NaNs (exponent 31) come out with exponent 143 and get all exponent bits set. */
static void f16_step(float out[STEP], const unsigned char *in)
{
    uint16_t h[STEP];
    uint32_t u[STEP], v[STEP];
    float f[STEP];
    memcpy(h, in, sizeof h);
    for (int i = 0; i < STEP; i++)
        u[i] = (uint32_t)(h[i] & 0x7fff) << 13;
    memcpy(f, u, sizeof f);
    for (int i = 0; i < STEP; i++)
        f[i] *= 0x1p112F;
    memcpy(v, f, sizeof v);
    for (int i = 0; i < STEP; i++) {
        uint32_t special = u[i] >= 0x0f800000U ? 0x7f800000U : 0U;
        v[i] |= special | (uint32_t)(h[i] & 0x8000) << 16;
    }
    memcpy(out, v, sizeof v);
}

static void f64_step(float out[STEP], const unsigned char *in)
{
    double d[STEP];
    memcpy(d, in, sizeof d);
    for (int i = 0; i < STEP; i++)
        out[i] = (float)d[i];
}

/* Sign and the 7 bits behind it moved to their places in a float are the value times 2^-120, denormals included. All seven
 * bits set is NaN, not 480. */
static void e4m3_step(float out[STEP], const unsigned char *in)
{
    uint32_t u[STEP], v[STEP];
    float f[STEP];
    for (int i = 0; i < STEP; i++)
        u[i] = (uint32_t)((int32_t)((uint32_t)in[i] << 24) >> 4) & 0x87f00000U;
    memcpy(f, u, sizeof f);
    for (int i = 0; i < STEP; i++)
        f[i] *= 0x1p120F;
    memcpy(v, f, sizeof v);
    for (int i = 0; i < STEP; i++)
        v[i] |= (u[i] & 0x07f00000U) == 0x07f00000U ? 0x7fc00000U : 0U;
    memcpy(out, v, sizeof v);
}

static void e5m2_step(float out[STEP], const unsigned char *in)
{
    uint16_t h[STEP];
    unsigned char bytes[sizeof h];
    for (int i = 0; i < STEP; i++)
        h[i] = (uint16_t)(in[i] << 8);
    memcpy(bytes, h, sizeof bytes);
    f16_step(out, bytes);
}

/* The exponent of a float as it is, but for 2^-127, which is a denormal, and for NaN. */
static void e8m0_step(float out[STEP], const unsigned char *in)
{
    uint32_t u[STEP];
    for (int i = 0; i < STEP; i++) {
        u[i] = (uint32_t)in[i] << 23;
        u[i] |= in[i] == 0 ? 0x00400000U : in[i] == 0xff ? 0x7fc00000U : 0U;
    }
    memcpy(out, u, sizeof u);
}

/* Whole steps in place, the rest through padded copies. */
static inline void convert(float *out, const void *in, int64_t n, size_t size,
                           void (*step)(float *, const unsigned char *))
{
    const unsigned char *p = in;
    unsigned char rest[STEP * sizeof(double)] = {0};
    float last[STEP];
    int64_t i = 0;
    for (; i + STEP <= n; i += STEP)
        step(out + i, p + (size_t)i * size);
    if (i < n) {
        memcpy(rest, p + (size_t)i * size, (size_t)(n - i) * size);
        step(last, rest);
        memcpy(out + i, last, (size_t)(n - i) * sizeof *out);
    }
}

static void f32_from_bf16(float *out, const void *in, int64_t n)
{
    convert(out, in, n, 2, bf16_step);
}

static void f32_from_f16(float *out, const void *in, int64_t n)
{
    convert(out, in, n, 2, f16_step);
}

static void f32_from_f64(float *out, const void *in, int64_t n)
{
    convert(out, in, n, 8, f64_step);
}

static void f32_from_e4m3(float *out, const void *in, int64_t n)
{
    convert(out, in, n, 1, e4m3_step);
}

static void f32_from_e5m2(float *out, const void *in, int64_t n)
{
    convert(out, in, n, 1, e5m2_step);
}

static void f32_from_e8m0(float *out, const void *in, int64_t n)
{
    convert(out, in, n, 1, e8m0_step);
}

/* name, bytes, to_f32 */
const moec_dtype_traits moec_dtypes[MOEC_DTYPE_COUNT] = {
    [MOEC_F64] = {"F64", 8, f32_from_f64},
    [MOEC_F32] = {"F32", 4, f32_from_f32},
    [MOEC_F16] = {"F16", 2, f32_from_f16},
    [MOEC_BF16] = {"BF16", 2, f32_from_bf16},
    [MOEC_F8_E4M3] = {"F8_E4M3", 1, f32_from_e4m3},
    [MOEC_F8_E5M2] = {"F8_E5M2", 1, f32_from_e5m2},
    [MOEC_F8_E8M0] = {"F8_E8M0", 1, f32_from_e8m0},
    [MOEC_I64] = {"I64", 8, NULL},
    [MOEC_I32] = {"I32", 4, NULL},
    [MOEC_I16] = {"I16", 2, NULL},
    [MOEC_I8] = {"I8", 1, NULL},
    [MOEC_U64] = {"U64", 8, NULL},
    [MOEC_U32] = {"U32", 4, NULL},
    [MOEC_U16] = {"U16", 2, NULL},
    [MOEC_U8] = {"U8", 1, NULL},
    [MOEC_BOOL] = {"BOOL", 1, NULL},
};
_Static_assert(MOEC_BOOL + 1 == MOEC_DTYPE_COUNT, "one row per dtype");

moec_dtype moec_dtype_find(const char *name)
{
    for (int i = 0; i < MOEC_DTYPE_COUNT; i++)
        if (strcmp(moec_dtypes[i].name, name) == 0)
            return (moec_dtype)i;
    return MOEC_DTYPE_COUNT;
}

uint16_t moec_to_bf16(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    if (isnan(x))
        return (uint16_t)(u >> 16 | 0x40);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

/* Subnormal results are multiples of 2^-24. */
uint16_t moec_to_f16(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    const uint16_t sign = (uint16_t)(u >> 16 & 0x8000);
    const float a = fabsf(x);
    if (isnan(x))
        return (uint16_t)(sign | 0x7e00);
    if (a >= 65520.0f)
        return (uint16_t)(sign | 0x7c00);
    if (a < 0x1p-14f)
        return (uint16_t)(sign | (uint16_t)lrintf(a * 0x1p24f));
    u &= 0x7fffffff;
    u += 0xfff + (u >> 13 & 1);
    return (uint16_t)(sign | (uint16_t)((u - (112u << 23)) >> 13));
}

/* A value is not finite when all its exponent bits are set, and these lie in the value's highest 16 bits. So every
 * format of two bytes and more is read as 16-bit words, eight at a time: a word hits when its exponent bits equal `all`.
 * Words that hold no exponent get a mask of 0 and can never equal 1. */
typedef uint16_t words __attribute__((vector_size(16)));
typedef struct exponent {
    words mask, all;
} exponent;

static bool exponent_of(exponent *out, moec_dtype dtype)
{
    static const exponent f64 = {{0, 0, 0, 0x7ff0, 0, 0, 0, 0x7ff0}, {1, 1, 1, 0x7ff0, 1, 1, 1, 0x7ff0}};
    static const exponent f32 = {{0, 0x7f80, 0, 0x7f80, 0, 0x7f80, 0, 0x7f80},
                                 {1, 0x7f80, 1, 0x7f80, 1, 0x7f80, 1, 0x7f80}};
    uint16_t half = dtype == MOEC_F16 ? 0x7c00 : 0x7f80;
    switch (dtype) {
    case MOEC_F64:
        *out = f64;
        return true;
    case MOEC_F32:
        *out = f32;
        return true;
    case MOEC_F16:
    case MOEC_BF16:
        out->mask = out->all = (words){half, half, half, half, half, half, half, half};
        return true;
    default:
        return false;
    }
}

enum { RUN = 1024 }; /* bytes examined between two tests for a hit */

static bool run_hits(const unsigned char *p, const exponent *e)
{
    words hit[4] = {{0}};
    uint64_t any[sizeof hit / 8];
    uint64_t all = 0;
    for (size_t at = 0; at < RUN; at += sizeof hit) {
        words w[4];
        memcpy(w, p + at, sizeof w);
        for (int i = 0; i < 4; i++)
            hit[i] |= (words)((w[i] & e->mask) == e->all);
    }
    memcpy(any, hit, sizeof any);
    for (size_t i = 0; i < MOEC_COUNT(any); i++)
        all |= any[i];
    return all != 0;
}

/* Formats of one byte: the bits that are all set in a value that is not finite, sign left out; 0 for others. */
static unsigned char special_byte(moec_dtype dtype)
{
    return dtype == MOEC_F8_E4M3 ? 0x7f : dtype == MOEC_F8_E5M2 ? 0x7c : dtype == MOEC_F8_E8M0 ? 0xff : 0;
}

static int64_t byte_nonfinite(const unsigned char *p, size_t n, unsigned char special)
{
    size_t at = 0;
    for (unsigned hits = 0; at + RUN <= n; at += RUN) {
        for (size_t i = 0; i < RUN; i++)
            hits |= (p[at + i] & special) == special;
        if (hits)
            break;
    }
    for (; at < n; at++)
        if ((p[at] & special) == special)
            return (int64_t)at;
    return -1;
}

int64_t moec_tensor_nonfinite(const moec_tensor *t)
{
    exponent e;
    const unsigned char *p = t->data;
    size_t at = 0;
    unsigned char special = special_byte(t->dtype);
    if (special)
        return byte_nonfinite(p, t->bytes, special);
    if (!exponent_of(&e, t->dtype))
        return -1;
    size_t size = (size_t)moec_dtypes[t->dtype].bytes, end = t->bytes - t->bytes % size;
    while (at + RUN <= end && !run_hits(p + at, &e))
        at += RUN;
    /* Value by value: the run that hit, or the rest behind the last whole run. */
    for (; at < end; at += size) {
        uint16_t high;
        memcpy(&high, p + at + size - 2, sizeof high);
        size_t word = size / 2 - 1; /* the word of a vector that holds an exponent */
        if ((high & e.mask[word]) == e.all[word])
            return (int64_t)(at / size);
    }
    return -1;
}

const char *moec_shape_text(char *buf, size_t cap, int rank, const int64_t *dim)
{
    size_t used = 0;
    if (cap == 0)
        return buf;
    buf[0] = '\0';
    for (int i = 0; i <= rank; i++) {
        char part[32];
        if (i < rank)
            snprintf(part, sizeof part, "%s%lld", i == 0 ? "[" : ", ", (long long)dim[i]);
        else
            snprintf(part, sizeof part, rank > 0 ? "]" : "[]");
        size_t len = strlen(part);
        if (used + len >= cap) { /* cut: keep what fits */
            memcpy(buf + used, part, cap - 1 - used);
            used = cap - 1;
        } else {
            memcpy(buf + used, part, len);
            used += len;
        }
        buf[used] = '\0';
    }
    return buf;
}
