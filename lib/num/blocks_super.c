/* Writing the types whose blocks of 256 are divided, and the ternary ones. */
#include "num/blocks_table.h"

#include <math.h>
#include <string.h>

enum { LANES = MOEC_BLOCK_LANES, SUPER = MOEC_BLOCK_SUPER, ROUNDS = 3 };

/* A tile of one or two blocks: what was found of each sub-block, and of each block d and e. */
typedef struct found {
    float s[LANES], b[LANES];   /* as the sub-block alone would have them */
    float ds[LANES], db[LANES]; /* multiples of d and e, */
    float d[LANES], e[LANES];   /* which are the same for all sub-blocks of a block */
} found;

static bool with_min(const moec_block_grid *g)
{
    return g->kind == MOEC_GRID_MIN;
}

static float rounded(double x)
{
    return moec__blocks_value(moec__blocks_half((float)x));
}

/* d and e such that the largest s and b are their largest multiples. */
static void first_scales(float *d, float *e, const float *s, const float *b, int subs, const moec_block_grid *g)
{
    float top = 0.0f, top_b = 0.0f;
    for (int k = 0; k < subs; k++) {
        top = fabsf(s[k]) > fabsf(top) ? s[k] : top;
        top_b = b[k] > top_b ? b[k] : top_b;
    }
    *d = rounded((double)(top / (with_min(g) ? g->scale_most : g->scale_least)));
    *e = with_min(g) ? rounded((double)(top_b / g->scale_most)) : 0.0f;
}

/* d and e by least squares, codes and multiples as they are. */
static void next_scales(float *d, float *e, const found *f, const moec_block_sums *t, int from, int subs, const moec_block_grid *g)
{
    double a = 0.0, b = 0.0, c = 0.0, x = 0.0, y = 0.0, by = 0.0, by_e = 0.0;
    for (int k = from; k < from + subs; k++) {
        const double ds = (double)f->ds[k], db = (double)f->db[k];
        a += ds * ds * (double)t->qq[k];
        b += ds * db * (double)t->q[k];
        c += db * db * (double)t->m[k];
        x += ds * (double)t->rq[k];
        y -= db * (double)t->r[k];
    }
    const double det = a * c - b * b;
    if (with_min(g) && det > 1e-9 * a * c) {
        by = (x * c + y * b) / det;
        by_e = (y * a + x * b) / det;
    } else if (a > 0.0)
        by = x / a;
    *d = rounded((double)*d + by);
    *e = with_min(g) ? rounded(fmax(0.0, (double)*e + by_e)) : 0.0f;
}

static double error_of(const moec_block_sums *t, int from, int subs)
{
    double sum = 0.0;
    for (int k = from; k < from + subs; k++)
        sum += (double)t->error[k];
    return sum;
}

static void take(found *to, const found *from, int at, int subs)
{
    const size_t n = (size_t)subs * sizeof(float);
    memcpy(to->ds + at, from->ds + at, n);
    memcpy(to->db + at, from->db + at, n);
    memcpy(to->d + at, from->d + at, n);
    memcpy(to->e + at, from->e + at, n);
}

static void search(found *out, const moec_block_tile *t, const moec_block_grid *g, int subs)
{
    const moec_block_table *table = moec__blocks_table();
    const int blocks = LANES / subs;
    found f;
    moec_block_sums sums;
    double best[LANES];
    float d[LANES], e[LANES];
    table->fit(f.s, f.b, t, g);
    for (int k = 0; k < blocks; k++)
        first_scales(&d[k], &e[k], f.s + k * subs, f.b + k * subs, subs, g);
    for (int round = 0; round < ROUNDS; round++) {
        for (int l = 0; l < LANES; l++) {
            f.d[l] = d[l / subs];
            f.e[l] = e[l / subs];
        }
        table->settle(f.ds, f.db, &sums, t, g, f.s, f.b, f.d, f.e);
        for (int k = 0; k < blocks; k++) {
            const double error = error_of(&sums, k * subs, subs);
            if (round == 0 || error < best[k]) {
                best[k] = error;
                take(out, &f, k * subs, subs);
            }
            next_scales(&d[k], &e[k], &f, &sums, k * subs, subs, g);
        }
    }
}

/* One scale for all: several, and their least squares. */
static float ternary_scale(const float *w, const float *m, const moec_block_grid *g)
{
    enum { STARTS = 7, PASSES = 3 };
    const moec_block_table *table = moec__blocks_table();
    const float none[LANES] = {0};
    moec_block_tile t;
    moec_block_sums sums;
    float top = 0.0f, best_s = 0.0f;
    double best = INFINITY;
    moec__blocks_tile(&t, w, m, LANES, SUPER / LANES);
    for (int i = 0; i < SUPER; i++)
        top = fabsf(w[i]) > top ? fabsf(w[i]) : top;
    for (int start = 0; start < STARTS; start++) {
        float scale = rounded((double)(top * (1.0f - 0.125f * (float)start))), s[LANES];
        for (int pass = 0; pass < PASSES; pass++) {
            double rq = 0.0, qq = 0.0;
            for (int l = 0; l < LANES; l++)
                s[l] = scale;
            table->measure(&sums, &t, g, s, none);
            const double error = error_of(&sums, 0, LANES);
            for (int l = 0; l < LANES; l++) {
                rq += (double)sums.rq[l];
                qq += (double)sums.qq[l];
            }
            if (error < best) {
                best = error;
                best_s = scale;
            }
            scale = rounded((double)scale + (qq > 0.0 ? rq / qq : 0.0));
        }
    }
    return best_s;
}

static void put_half(uint8_t *out, float x)
{
    const uint16_t h = moec__blocks_half(x);
    memcpy(out, &h, sizeof h);
}

/* Two bits of each code: in each half of 128, byte l has elements l, l + 32, l + 64, l + 96. */
static void pairs(uint8_t out[64], const uint8_t *u)
{
    for (int half = 0; half < 2; half++, u += 128, out += 32)
        for (int l = 0; l < 32; l++)
            out[l] = (uint8_t)((u[l] & 3) | (u[l + 32] & 3) << 2 | (u[l + 64] & 3) << 4 | (u[l + 96] & 3) << 6);
}

/* Four bits: in each chunk of `span` values, byte l has elements l and l + span / 2. */
static void nibbles(uint8_t out[128], const uint8_t *u, int span)
{
    for (int at = 0; at < SUPER; at += span, out += span / 2)
        for (int l = 0; l < span / 2; l++)
            out[l] = (uint8_t)((u[at + l] & 15) | u[at + l + span / 2] << 4);
}

/* One bit: byte l has elements l, l + 32, .. l + 224. */
static void bits(uint8_t out[32], const uint8_t *u, int bit)
{
    for (int l = 0; l < 32; l++) {
        unsigned all = 0;
        for (int k = 0; k < 8; k++)
            all |= (unsigned)(u[32 * k + l] >> bit & 1) << k;
        out[l] = (uint8_t)all;
    }
}

static void pack_q2(uint8_t *out, const found *f, int at, const uint8_t *u)
{
    for (int k = 0; k < 16; k++)
        out[k] = (uint8_t)((unsigned)f->ds[at + k] | (unsigned)f->db[at + k] << 4);
    pairs(out + 16, u);
    put_half(out + 80, f->d[at]);
    put_half(out + 82, f->e[at]);
}

static void pack_q3(uint8_t *out, const found *f, int at, const uint8_t *u)
{
    uint8_t *scales = out + 96;
    bits(out, u, 2);
    pairs(out + 32, u);
    memset(scales, 0, 12);
    for (int k = 0; k < 16; k++) {
        const unsigned s = (unsigned)((int)f->ds[at + k] + 32);
        scales[k % 8] |= (uint8_t)((s & 15) << 4 * (k / 8));
        scales[8 + k % 4] |= (uint8_t)(s >> 4 << 2 * (k / 4));
    }
    put_half(out + 108, f->d[at]);
}

static void pack_q45(uint8_t *out, const found *f, int at, const uint8_t *u, bool five)
{
    uint8_t *scales = out + 4;
    put_half(out, f->d[at]);
    put_half(out + 2, f->e[at]);
    for (int k = 0; k < 4; k++) {
        const unsigned s = (unsigned)f->ds[at + k], b = (unsigned)f->db[at + k];
        const unsigned s4 = (unsigned)f->ds[at + k + 4], b4 = (unsigned)f->db[at + k + 4];
        scales[k] = (uint8_t)(s | s4 >> 4 << 6);
        scales[k + 4] = (uint8_t)(b | b4 >> 4 << 6);
        scales[k + 8] = (uint8_t)((s4 & 15) | (b4 & 15) << 4);
    }
    if (five)
        bits(out + 16, u, 4);
    nibbles(out + (five ? 48 : 16), u, 64);
}

static void pack_q6(uint8_t *out, const found *f, int at, const uint8_t *u)
{
    uint8_t high[SUPER];
    nibbles(out, u, 128);
    for (int i = 0; i < SUPER; i++)
        high[i] = u[i] >> 4;
    pairs(out + 128, high);
    for (int k = 0; k < 16; k++)
        out[192 + k] = (uint8_t)(int)f->ds[at + k];
    put_half(out + 208, f->d[at]);
}

static void pack_iq4(uint8_t *out, const found *f, int at, const uint8_t *u)
{
    unsigned high = 0;
    put_half(out, f->d[at]);
    memset(out + 4, 0, 4);
    for (int k = 0; k < 8; k++) {
        const unsigned s = (unsigned)((int)f->ds[at + k] + 32);
        out[4 + k / 2] |= (uint8_t)((s & 15) << 4 * (k % 2));
        high |= s >> 4 << 2 * k;
    }
    out[2] = (uint8_t)high;
    out[3] = (uint8_t)(high >> 8);
    nibbles(out + 8, u, 32);
}

/* Five base-3 digits a byte, element j, j + bytes, .. from the highest down, scaled so that times 3 brings up digit by digit. */
static void trits(uint8_t *out, const uint8_t *u, int bytes, int digits)
{
    for (int j = 0; j < bytes; j++) {
        unsigned v = 0;
        for (int k = 0; k < 5; k++)
            v = 3 * v + (k < digits ? u[k * bytes + j] : 0U);
        out[j] = (uint8_t)((v * 256 + 242) / 243);
    }
}

static void write_ternary(uint8_t *out, const float *w, const float *m, moec_block type)
{
    const moec_block_grid *g = moec__blocks_grid(type);
    const float scale = ternary_scale(w, m, g), none[LANES] = {0};
    float s[LANES];
    uint8_t u[SUPER];
    for (int l = 0; l < LANES; l++)
        s[l] = scale;
    moec__blocks_table()->codes(u, w, LANES, SUPER / LANES, g, s, none);
    if (type == MOEC_BLOCK_TQ1_0) {
        trits(out, u, 32, 5);
        trits(out + 32, u + 160, 16, 5);
        trits(out + 48, u + 240, 4, 4);
    } else
        pairs(out, u);
    put_half(out + moec_blocks[type].bytes - 2, scale);
}

static void pack(uint8_t *out, const found *f, int at, const uint8_t *u, moec_block type)
{
    switch (type) {
    case MOEC_BLOCK_Q2_K: pack_q2(out, f, at, u); break;
    case MOEC_BLOCK_Q3_K: pack_q3(out, f, at, u); break;
    case MOEC_BLOCK_Q6_K: pack_q6(out, f, at, u); break;
    case MOEC_BLOCK_IQ4_XS: pack_iq4(out, f, at, u); break;
    default: pack_q45(out, f, at, u, type == MOEC_BLOCK_Q5_K); break;
    }
}

static int values_of_sub_block(moec_block type)
{
    return type == MOEC_BLOCK_Q4_K || type == MOEC_BLOCK_Q5_K || type == MOEC_BLOCK_IQ4_XS ? 32 : 16;
}

void moec__blocks_write_256(uint8_t *out, const float *w, const float *m, int64_t blocks, moec_block type)
{
    const moec_block_grid *g = moec__blocks_grid(type);
    const int count = values_of_sub_block(type), subs = SUPER / count, bytes = moec_blocks[type].bytes;
    if (type == MOEC_BLOCK_TQ1_0 || type == MOEC_BLOCK_TQ2_0) {
        for (int64_t k = 0; k < blocks; k++)
            write_ternary(out + k * bytes, w + k * SUPER, m ? m + k * SUPER : NULL, type);
        return;
    }
    for (int64_t k = 0; k < blocks; k += LANES / subs) {
        const int here = blocks - k < LANES / subs ? (int)(blocks - k) : LANES / subs;
        const float *x = w + k * SUPER;
        float s[LANES], b[LANES];
        uint8_t u[2 * SUPER];
        moec_block_tile t;
        found f;
        moec__blocks_tile(&t, x, m ? m + k * SUPER : NULL, here * subs, count);
        search(&f, &t, g, subs);
        for (int l = 0; l < LANES; l++) {
            s[l] = f.d[l] * f.ds[l];
            b[l] = f.e[l] * f.db[l];
        }
        moec__blocks_table()->codes(u, x, here * subs, count, g, s, b);
        for (int i = 0; i < here; i++)
            pack(out + (k + i) * bytes, &f, i * subs, u + i * SUPER, type);
    }
}
