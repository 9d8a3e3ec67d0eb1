/* The grids of all types, and writing those whose blocks are not divided. */
#include "num/blocks_table.h"

#include <math.h>
#include <string.h>

const int8_t moec__blocks_iq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
const int8_t moec__blocks_e2m1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

#define IQ4_POINTS .points = 16, .point = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113}

/* Few starts where the grid is fine: there the range hardly matters, and these types are chosen for speed. */
#define SCALE(x) {1.0f / (x), 0.0f}
#define IQ4_STARTS .passes = 2, .starts = 6, \
    .start = {SCALE(-127.0f), SCALE(-141.0f), SCALE(-159.0f), SCALE(113.0f), SCALE(126.0f), SCALE(141.0f)}

/* Starts were chosen by the error that is left on normal and long-tailed values, until more of them bought less than 2 percent; few
 * where q4_0 to q8_0 have no weights, which are chosen for speed. */
static const moec_block_grid grids[MOEC_BLOCK_COUNT] = {
    [MOEC_BLOCK_Q4_0] = {.kind = MOEC_GRID_SIGNED, .least = -8, .most = 7,
                         .passes = 2, .starts = 6, .quick = 1,
                         .start = {SCALE(-8.0f), SCALE(-8.5f), SCALE(-9.5f), SCALE(7.0f), SCALE(8.0f), SCALE(9.0f)}},
    [MOEC_BLOCK_Q5_0] = {.kind = MOEC_GRID_SIGNED, .least = -16, .most = 15,
                         .passes = 2, .starts = 6, .quick = 3,
                         .start = {SCALE(-16.0f), SCALE(-17.0f), SCALE(15.5f), SCALE(-18.0f), SCALE(-19.0f), SCALE(17.0f)}},
    [MOEC_BLOCK_Q8_0] = {.kind = MOEC_GRID_SIGNED, .least = -127, .most = 127,
                         .passes = 2, .starts = 4, .quick = 1,
                         .start = {SCALE(127.0f), SCALE(129.0f), SCALE(132.0f), SCALE(136.0f)}},
    [MOEC_BLOCK_Q4_1] = {.kind = MOEC_GRID_FREE, .most = 15,
                         .passes = 3, .starts = 6, .quick = 2,
                         .start = {{1, 0}, {0.88f, 0.06f}, {0.9f, 0}, {0.9f, 0.1f}, {0.8f, 0.1f}, {0.95f, 0.02f}}},
    [MOEC_BLOCK_Q5_1] = {.kind = MOEC_GRID_FREE, .most = 31,
                         .passes = 2, .starts = 6, .quick = 2,
                         .start = {{1, 0}, {0.96f, 0.02f}, {0.94f, 0}, {0.94f, 0.06f}, {0.9f, 0.05f}, {0.98f, 0.01f}}},
    [MOEC_BLOCK_Q2_K] = {.kind = MOEC_GRID_MIN, .most = 3, .scale_most = 15, .reach = 1,
                         .passes = 3, .starts = 8,
                         .start = {{1, 0}, {0.85f, 0}, {0.85f, 0.15f}, {0.7f, 0}, {0.7f, 0.15f}, {0.7f, 0.3f}, {0.55f, 0.1f},
                                   {0.55f, 0.35f}}},
    [MOEC_BLOCK_Q3_K] = {.kind = MOEC_GRID_SIGNED, .least = -4, .most = 3, .scale_least = -32, .scale_most = 31, .reach = 1,
                         .passes = 2, .starts = 9,
                         .start = {SCALE(-4.0f), SCALE(-4.4f), SCALE(-5.0f), SCALE(-6.0f), SCALE(-7.0f), SCALE(3.0f), SCALE(3.4f),
                                   SCALE(4.0f), SCALE(4.7f)}},
    [MOEC_BLOCK_Q4_K] = {.kind = MOEC_GRID_MIN, .most = 15, .scale_most = 63, .reach = 2,
                         .passes = 3, .starts = 9,
                         .start = {{1, 0}, {0.95f, 0}, {0.95f, 0.05f}, {0.9f, 0}, {0.9f, 0.05f}, {0.9f, 0.1f}, {0.85f, 0.05f},
                                   {0.85f, 0.1f}, {0.8f, 0.1f}}},
    [MOEC_BLOCK_Q5_K] = {.kind = MOEC_GRID_MIN, .most = 31, .scale_most = 63, .reach = 3,
                         .passes = 3, .starts = 8,
                         .start = {{1, 0}, {0.98f, 0.01f}, {0.96f, 0}, {0.96f, 0.02f}, {0.96f, 0.04f}, {0.93f, 0.02f},
                                   {0.93f, 0.05f}, {0.9f, 0.05f}}},
    [MOEC_BLOCK_Q6_K] = {.kind = MOEC_GRID_SIGNED, .least = -32, .most = 31, .scale_least = -128, .scale_most = 127, .reach = 3,
                         .passes = 2, .starts = 8,
                         .start = {SCALE(-31.0f), SCALE(-32.0f), SCALE(-33.0f), SCALE(-34.5f), SCALE(31.0f), SCALE(32.0f),
                                   SCALE(33.0f), SCALE(36.0f)}},
    [MOEC_BLOCK_IQ4_NL] = {.kind = MOEC_GRID_POINTS, IQ4_POINTS, IQ4_STARTS},
    [MOEC_BLOCK_IQ4_XS] = {.kind = MOEC_GRID_POINTS, IQ4_POINTS, IQ4_STARTS, .scale_least = -32, .scale_most = 31, .reach = 1},
    [MOEC_BLOCK_MXFP4] = {.kind = MOEC_GRID_POINTS, .points = 15, .point = {-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12}},
    [MOEC_BLOCK_TQ1_0] = {.kind = MOEC_GRID_SIGNED, .least = -1, .most = 1},
    [MOEC_BLOCK_TQ2_0] = {.kind = MOEC_GRID_SIGNED, .least = -1, .most = 1},
};

const moec_block_grid *moec__blocks_grid(moec_block type)
{
    return &grids[type];
}

/* u [32] of 4 bits, the first half in the low nibbles. */
static void nibbles(uint8_t out[16], const uint8_t *u)
{
    for (int j = 0; j < 16; j++)
        out[j] = (uint8_t)((u[j] & 15) | u[j + 16] << 4);
}

static void fifth_bits(uint8_t out[4], const uint8_t *u)
{
    for (int k = 0; k < 4; k++) {
        unsigned bits = 0;
        for (int j = 0; j < 8; j++)
            bits |= (unsigned)(u[8 * k + j] >> 4) << j;
        out[k] = (uint8_t)bits;
    }
}

/* Codes of 5 or 8 bits. */
static void pack_codes(uint8_t *out, const uint8_t *u, moec_block type)
{
    if (type == MOEC_BLOCK_Q8_0) {
        for (int j = 0; j < 32; j++)
            out[j] = (uint8_t)(u[j] - 127);
        return;
    }
    fifth_bits(out, u);
    nibbles(out + 4, u);
}

/* Scales, and minima where the type has them, to float16 and to their places in front of the blocks. */
static void put_scales(uint8_t *out, float *s, float *b, int blocks, int bytes, bool low)
{
    for (int k = 0; k < blocks; k++, out += bytes) {
        const uint16_t d = moec__blocks_half(s[k]);
        memcpy(out, &d, sizeof d);
        s[k] = moec__blocks_value(d);
        if (low) {
            const uint16_t m = moec__blocks_half(-b[k]);
            memcpy(out + 2, &m, sizeof m);
            b[k] = -moec__blocks_value(m);
        }
    }
}

void moec__blocks_write_32(uint8_t *out, const float *w, const float *m, int64_t blocks, moec_block type)
{
    const moec_block_table *table = moec__blocks_table();
    const moec_block_grid *g = moec__blocks_grid(type);
    const int count = (int)blocks, bytes = moec_blocks[type].bytes, head = g->kind == MOEC_GRID_FREE ? 4 : 2;
    float s[MOEC_BLOCK_LANES], b[MOEC_BLOCK_LANES];
    moec_block_tile t;
    moec__blocks_tile(&t, w, m, count, 32);
    table->fit(s, b, &t, g);
    put_scales(out, s, b, count, bytes, g->kind == MOEC_GRID_FREE);
    if (bytes - head == 16) {
        table->nibbles(out + head, bytes, w, count, g, s, b);
        return;
    }
    uint8_t u[MOEC_BLOCK_LANES * 32];
    table->codes(u, w, count, 32, g, s, b);
    for (int k = 0; k < count; k++)
        pack_codes(out + k * bytes + head, u + 32 * k, type);
}

/* The exponent that brings the largest value to points 8 to 12, and its neighbours. A block is scaled by a power of two first, so
 * that no square leaves float32. */
void moec__blocks_write_mxfp4(uint8_t *out, const float *w, const float *m, int64_t blocks)
{
    static const uint8_t code[15] = {15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7};
    enum { LEAST = -127, MOST = 124 }; /* 2^-128 has no inverse, 12 * 2^125 is no float */
    const moec_block_table *table = moec__blocks_table();
    const moec_block_grid *g = moec__blocks_grid(MOEC_BLOCK_MXFP4);
    float x[MOEC_BLOCK_LANES * 32], best[MOEC_BLOCK_LANES], scale[MOEC_BLOCK_LANES], none[MOEC_BLOCK_LANES] = {0};
    int power[MOEC_BLOCK_LANES];
    uint8_t u[MOEC_BLOCK_LANES * 32];
    moec_block_tile t;
    moec_block_sums sums;
    for (int k = 0; k < (int)blocks; k++) {
        float top = 0.0f;
        for (int j = 0; j < 32; j++)
            top = fabsf(w[32 * k + j]) > top ? fabsf(w[32 * k + j]) : top;
        power[k] = top > 0.0f ? ilogbf(top) - 3 : LEAST;
        power[k] = power[k] < LEAST ? LEAST : power[k] > MOST ? MOST : power[k];
        for (int j = 0; j < 32; j++)
            x[32 * k + j] = w[32 * k + j] * ldexpf(1.0f, -power[k]);
    }
    moec__blocks_tile(&t, x, m, (int)blocks, 32);
    for (int step = 0; step < 3; step++) {
        static const float by[3] = {1.0f, 0.5f, 2.0f};
        float s[MOEC_BLOCK_LANES];
        for (int k = 0; k < MOEC_BLOCK_LANES; k++)
            s[k] = by[step];
        table->measure(&sums, &t, g, s, none);
        for (int k = 0; k < (int)blocks; k++) {
            const bool there = step == 0 || (step == 1 ? power[k] > LEAST : power[k] < MOST);
            if (step == 0 || (there && sums.error[k] < best[k])) {
                best[k] = sums.error[k];
                scale[k] = by[step];
            }
        }
    }
    table->codes(u, x, (int)blocks, 32, g, scale, none);
    for (int k = 0; k < (int)blocks; k++, out += 17) {
        for (int j = 0; j < 32; j++)
            u[32 * k + j] = code[u[32 * k + j]];
        out[0] = (uint8_t)(power[k] + ilogbf(scale[k]) + 128);
        nibbles(out + 1, u + 32 * k);
    }
}
