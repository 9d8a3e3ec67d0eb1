/* Reading the blocks of blocks.h, in the order of operations that ggml's readers have: the same bits. */
#include "num/blocks_table.h"
#include "num/tensor.h"

#include <string.h>

static float half_at(const uint8_t *in)
{
    uint16_t h;
    memcpy(&h, in, sizeof h);
    return moec__blocks_value(h);
}

static void read_32(float *out, const uint8_t *in, moec_block type)
{
    const bool low = type == MOEC_BLOCK_Q4_1 || type == MOEC_BLOCK_Q5_1, five = type == MOEC_BLOCK_Q5_0 || type == MOEC_BLOCK_Q5_1;
    const float d = half_at(in), m = low ? half_at(in + 2) : 0.0f;
    const uint8_t *high = in + (low ? 4 : 2), *q = five ? high + 4 : high;
    const int zero = type == MOEC_BLOCK_Q4_0 ? 8 : type == MOEC_BLOCK_Q5_0 ? 16 : 0;
    for (int j = 0; j < 32; j++) {
        int u = q[j % 16] >> 4 * (j / 16) & 15;
        if (five)
            u |= (high[j / 8] >> j % 8 & 1) << 4;
        if (type == MOEC_BLOCK_Q8_0)
            out[j] = d * (float)(int8_t)in[2 + j];
        else if (type == MOEC_BLOCK_IQ4_NL)
            out[j] = d * (float)moec__blocks_iq4[u];
        else if (low)
            out[j] = d * (float)u + m;
        else
            out[j] = d * (float)(u - zero);
    }
}

static void read_mxfp4(float *out, const uint8_t *in)
{
    const uint32_t e = in[0], bits = e < 2 ? 0x00200000U << e : (e - 1) << 23;
    float d;
    memcpy(&d, &bits, sizeof d);
    for (int j = 0; j < 32; j++)
        out[j] = d * (float)moec__blocks_e2m1[in[1 + j % 16] >> 4 * (j / 16) & 15];
}

/* Two bits of element i: see `pairs` of blocks_super.c. */
static int pair_at(const uint8_t *in, int i)
{
    return in[i / 128 * 32 + i % 32] >> 2 * (i % 128 / 32) & 3;
}

static int nibble_at(const uint8_t *in, int i, int span)
{
    const int within = i % span;
    return in[i / span * (span / 2) + within % (span / 2)] >> 4 * (within / (span / 2)) & 15;
}

static void read_q2(float *out, const uint8_t *in)
{
    const float d = half_at(in + 80), e = half_at(in + 82);
    for (int i = 0; i < MOEC_BLOCK_SUPER; i++) {
        const float s = d * (float)(in[i / 16] & 15), b = e * (float)(in[i / 16] >> 4);
        out[i] = s * (float)pair_at(in + 16, i) - b;
    }
}

static void read_q3(float *out, const uint8_t *in)
{
    const uint8_t *scales = in + 96;
    const float d = half_at(in + 108);
    for (int i = 0; i < MOEC_BLOCK_SUPER; i++) {
        const int k = i / 16, s = (scales[k % 8] >> 4 * (k / 8) & 15) | (scales[8 + k % 4] >> 2 * (k / 4) & 3) << 4;
        const int q = pair_at(in + 32, i) - (in[i % 32] >> i / 32 & 1 ? 0 : 4);
        out[i] = d * (float)(s - 32) * (float)q;
    }
}

static void read_q45(float *out, const uint8_t *in, bool five)
{
    const uint8_t *scales = in + 4, *high = in + 16, *q = in + (five ? 48 : 16);
    const float d = half_at(in), e = half_at(in + 2);
    for (int i = 0; i < MOEC_BLOCK_SUPER; i++) {
        const int k = i / 32, r = k % 4;
        const int s = k < 4 ? scales[k] & 63 : (scales[r + 8] & 15) | scales[r] >> 6 << 4;
        const int b = k < 4 ? scales[k + 4] & 63 : scales[r + 8] >> 4 | scales[r + 4] >> 6 << 4;
        const int u = nibble_at(q, i, 64) | (five ? (high[i % 32] >> k & 1) << 4 : 0);
        out[i] = d * (float)s * (float)u - e * (float)b;
    }
}

static void read_q6(float *out, const uint8_t *in)
{
    const float d = half_at(in + 208);
    for (int i = 0; i < MOEC_BLOCK_SUPER; i++) {
        const int u = nibble_at(in, i, 128) | pair_at(in + 128, i) << 4;
        out[i] = d * (float)(int8_t)in[192 + i / 16] * (float)(u - 32);
    }
}

static void read_iq4_xs(float *out, const uint8_t *in)
{
    const float d = half_at(in);
    for (int i = 0; i < MOEC_BLOCK_SUPER; i++) {
        const int k = i / 32, s = (in[4 + k / 2] >> 4 * (k % 2) & 15) | (in[2 + k / 4] >> 2 * (k % 4) & 3) << 4;
        out[i] = d * (float)(s - 32) * (float)moec__blocks_iq4[nibble_at(in + 8, i, 32)];
    }
}

/* Digit k of a byte: times 3^k, of which the eight low bits are kept, and again times 3, of which those above are. */
static void read_tq1(float *out, const uint8_t *in)
{
    static const int power[5] = {1, 3, 9, 27, 81};
    const float d = half_at(in + 52);
    for (int i = 0; i < MOEC_BLOCK_SUPER; i++) {
        const int from = i < 160 ? 0 : i < 240 ? 160 : 240, wide = i < 160 ? 32 : i < 240 ? 16 : 4;
        const int byte = in[(i < 160 ? 0 : i < 240 ? 32 : 48) + (i - from) % wide];
        const int digit = (byte * power[(i - from) / wide] & 255) * 3 >> 8;
        out[i] = d * (float)(digit - 1);
    }
}

static void read_tq2(float *out, const uint8_t *in)
{
    const float d = half_at(in + 64);
    for (int i = 0; i < MOEC_BLOCK_SUPER; i++)
        out[i] = d * (float)(pair_at(in, i) - 1);
}

static void read_block(float *out, const uint8_t *in, moec_block type)
{
    switch (type) {
    case MOEC_BLOCK_MXFP4: read_mxfp4(out, in); break;
    case MOEC_BLOCK_Q2_K: read_q2(out, in); break;
    case MOEC_BLOCK_Q3_K: read_q3(out, in); break;
    case MOEC_BLOCK_Q4_K: read_q45(out, in, false); break;
    case MOEC_BLOCK_Q5_K: read_q45(out, in, true); break;
    case MOEC_BLOCK_Q6_K: read_q6(out, in); break;
    case MOEC_BLOCK_IQ4_XS: read_iq4_xs(out, in); break;
    case MOEC_BLOCK_TQ1_0: read_tq1(out, in); break;
    case MOEC_BLOCK_TQ2_0: read_tq2(out, in); break;
    default: read_32(out, in, type); break;
    }
}

moec_status moec_blocks_read(float *out, const void *in, int64_t n, moec_block type, moec_err *err)
{
    if ((int)type < 0 || type >= MOEC_BLOCK_COUNT)
        return moec_fail(err, MOEC_EINVAL, "blocks: type %d, expected one of moec_blocks", (int)type);
    if (moec_blocks_bytes(type, n) < 0)
        return moec_fail(err, MOEC_ESHAPE, "blocks: a row of %lld values for %s, expected a multiple of %d", (long long)n,
                         moec_blocks[type].name, moec_blocks[type].elements);
    if (type == MOEC_BLOCK_F16 || type == MOEC_BLOCK_BF16) {
        moec_dtypes[type == MOEC_BLOCK_F16 ? MOEC_F16 : MOEC_BF16].to_f32(out, in, n);
        return MOEC_OK;
    }
    const uint8_t *p = in;
    for (int64_t at = 0; at < n; at += moec_blocks[type].elements, p += moec_blocks[type].bytes)
        read_block(out + at, p, type);
    return MOEC_OK;
}
