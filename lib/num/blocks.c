/* See blocks.h: the types, what is refused, and a row cut in pieces of MOEC_BLOCK_LANES blocks of 32. */
#include "num/blocks.h"

#include "num/blocks_table.h"
#include "num/gemm_kernel.h"
#include "num/simd.h"
#include "num/tensor.h"
#include "num/vec.h"

#include <math.h>
#include <string.h>

const moec_block_traits moec_blocks[MOEC_BLOCK_COUNT] = {
    [MOEC_BLOCK_F16] = {"f16", 1, 1, 2},
    [MOEC_BLOCK_BF16] = {"bf16", 30, 1, 2},
    [MOEC_BLOCK_Q4_0] = {"q4_0", 2, 32, 18},
    [MOEC_BLOCK_Q4_1] = {"q4_1", 3, 32, 20},
    [MOEC_BLOCK_Q5_0] = {"q5_0", 6, 32, 22},
    [MOEC_BLOCK_Q5_1] = {"q5_1", 7, 32, 24},
    [MOEC_BLOCK_Q8_0] = {"q8_0", 8, 32, 34},
    [MOEC_BLOCK_Q2_K] = {"q2_k", 10, 256, 84},
    [MOEC_BLOCK_Q3_K] = {"q3_k", 11, 256, 110},
    [MOEC_BLOCK_Q4_K] = {"q4_k", 12, 256, 144},
    [MOEC_BLOCK_Q5_K] = {"q5_k", 13, 256, 176},
    [MOEC_BLOCK_Q6_K] = {"q6_k", 14, 256, 210},
    [MOEC_BLOCK_IQ4_NL] = {"iq4_nl", 20, 32, 18},
    [MOEC_BLOCK_IQ4_XS] = {"iq4_xs", 23, 256, 136},
    [MOEC_BLOCK_MXFP4] = {"mxfp4", 39, 32, 17},
    [MOEC_BLOCK_TQ1_0] = {"tq1_0", 34, 256, 54},
    [MOEC_BLOCK_TQ2_0] = {"tq2_0", 35, 256, 66},
};

static bool known(moec_block type)
{
    return (int)type >= 0 && type < MOEC_BLOCK_COUNT;
}

moec_block moec_blocks_find(const char *name)
{
    for (int i = 0; i < MOEC_BLOCK_COUNT; i++)
        if (strcmp(moec_blocks[i].name, name) == 0)
            return (moec_block)i;
    return MOEC_BLOCK_COUNT;
}

int64_t moec_blocks_bytes(moec_block type, int64_t n)
{
    if (!known(type) || n < 0 || n % moec_blocks[type].elements != 0)
        return -1;
    const int64_t blocks = n / moec_blocks[type].elements;
    return blocks > INT64_MAX / moec_blocks[type].bytes ? -1 : blocks * moec_blocks[type].bytes;
}

moec_block moec_blocks_fall_back(moec_block type, int64_t n)
{
    if (!known(type) || n % moec_blocks[type].elements == 0)
        return type;
    if (n % 32 != 0)
        return MOEC_BLOCK_F16;
    switch (type) {
    case MOEC_BLOCK_Q4_K: return MOEC_BLOCK_Q5_0;
    case MOEC_BLOCK_Q5_K: return MOEC_BLOCK_Q5_1;
    case MOEC_BLOCK_Q6_K: return MOEC_BLOCK_Q8_0;
    default: return MOEC_BLOCK_IQ4_NL;
    }
}

const moec_block_table *moec__blocks_table(void)
{
#ifdef MOEC_VEC_X86
    static const moec_block_table *const by_isa[] = {
        [MOEC_ISA_GENERIC] = &moec__blocks_generic,
        [MOEC_ISA_AVX2] = &moec__blocks_avx2,
        [MOEC_ISA_AVX512] = &moec__blocks_avx512,
        [MOEC_ISA_AVX512BF16] = &moec__blocks_avx512,
    };
    _Static_assert(MOEC_COUNT(by_isa) == MOEC_ISA_COUNT, "one table per instruction set");
    return by_isa[moec__isa()];
#else
    return &moec__blocks_generic;
#endif
}

uint16_t moec__blocks_half(float x)
{
    return moec_to_f16(x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x);
}

static void turn(float *out, const float *in, int lanes, int count)
{
    enum { SIDE = 16 };
    const float *row[SIDE];
    for (int k = 0; k < lanes; k++)
        row[k] = in + k * count;
    for (int c = 0; c < count; c += SIDE)
        moec__transpose()(out + c * MOEC_BLOCK_LANES, MOEC_BLOCK_LANES, row, c, lanes, SIDE);
}

void moec__blocks_tile(moec_block_tile *t, const float *x, const float *m, int lanes, int count)
{
    const int n = MOEC_BLOCK_LANES * count;
    t->count = count;
    if (lanes < MOEC_BLOCK_LANES)
        memset(t->x, 0, (size_t)n * sizeof *t->x);
    turn(t->x, x, lanes, count);
    t->m_step = m ? MOEC_BLOCK_LANES : 0;
    for (int i = 0; i < (!m ? MOEC_BLOCK_LANES : lanes < MOEC_BLOCK_LANES ? n : 0); i++)
        t->m[i] = 1.0f;
    if (m)
        turn(t->m, m, lanes, count);
}

/* Factor that makes the mean importance 1; 0 when all are 0. */
static moec_status importance_factor(double *factor, const float *importance, int64_t n, moec_err *err)
{
    double part[8] = {0}, sum = 0.0;
    bool good = true;
    for (int64_t i = 0; i < n; i++) {
        good &= importance[i] >= 0.0f && importance[i] <= 3.4028235e38f; /* neither is true of NaN */
        part[i % 8] += (double)importance[i];
    }
    if (!good)
        return moec_fail(err, MOEC_ENUMERIC, "blocks: an importance is negative or not finite, expected finite values from 0 on");
    for (int k = 0; k < 8; k++)
        sum += part[k];
    *factor = sum > 0.0 ? (double)n / sum : 0.0;
    return MOEC_OK;
}

static void write_f16(uint8_t *out, const float *w, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        const uint16_t h = moec__blocks_half(w[i]);
        memcpy(out + 2 * i, &h, sizeof h);
    }
}

static void write_bf16(uint8_t *out, const float *w, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        uint32_t u;
        memcpy(&u, w + i, sizeof u);
        const uint32_t up = (u + 0x7fff + (u >> 16 & 1)) >> 16;
        const uint16_t h = (uint16_t)((up & 0x7fff) == 0x7f80 ? up - 1 : up); /* the largest, rounded up, would be infinite */
        memcpy(out + 2 * i, &h, sizeof h);
    }
}

static void write_piece(uint8_t *out, const float *w, const float *m, int64_t n, moec_block type)
{
    const int64_t blocks = n / moec_blocks[type].elements;
    if (type == MOEC_BLOCK_BF16)
        write_bf16(out, w, n);
    else if (type == MOEC_BLOCK_F16)
        write_f16(out, w, n);
    else if (type == MOEC_BLOCK_MXFP4)
        moec__blocks_write_mxfp4(out, w, m, blocks);
    else if (moec_blocks[type].elements == 32)
        moec__blocks_write_32(out, w, m, blocks, type);
    else
        moec__blocks_write_256(out, w, m, blocks, type);
}

moec_status moec_blocks_write(void *out, const float *w, const float *importance, int64_t n, moec_block type, moec_err *err)
{
    enum { PIECE = 32 * MOEC_BLOCK_LANES };
    float m[PIECE];
    double factor = 0.0;
    moec_status st = MOEC_OK;
    if (!known(type))
        return moec_fail(err, MOEC_EINVAL, "blocks: type %d, expected one of moec_blocks", (int)type);
    if (moec_blocks_bytes(type, n) < 0)
        return moec_fail(err, MOEC_ESHAPE, "blocks: a row of %lld values for %s, expected a multiple of %d", (long long)n,
                         moec_blocks[type].name, moec_blocks[type].elements);
    if (!moec_all_finite(w, n))
        return moec_fail(err, MOEC_ENUMERIC, "blocks: a weight is NaN or infinite, expected finite values");
    if (type != MOEC_BLOCK_BF16 && type != MOEC_BLOCK_MXFP4 && moec_abs_max(w, n) > 65504.0f)
        return moec_fail(err, MOEC_ENUMERIC, "blocks: a weight of magnitude %g for %s, expected at most 65504; bf16 holds it",
                         (double)moec_abs_max(w, n), moec_blocks[type].name);
    if (importance && (st = importance_factor(&factor, importance, n, err)) != MOEC_OK)
        return st;
    for (int64_t at = 0; at < n; at += PIECE) {
        const int64_t values = n - at < PIECE ? n - at : PIECE;
        for (int64_t i = 0; factor > 0.0 && i < values; i++)
            m[i] = (float)((double)importance[at + i] * factor) + 1e-4f;
        write_piece((uint8_t *)out + moec_blocks_bytes(type, at), w + at, factor > 0.0 ? m : NULL, values, type);
    }
    return MOEC_OK;
}
