/* What writing the blocks of blocks.h is made of, as one instruction set implements it. Private to lib/num.
 *
 * The search works on tiles: MOEC_BLOCK_LANES sub-blocks side by side, value i of sub-block l at x[i * MOEC_BLOCK_LANES + l]. Every
 * sub-block is a lane of its own and no lane looks at another, so that the width of a vector does not show in any result; no
 * multiplication is fused with an addition.
 *
 *     value = s q - b,   q a point of the grid; b is 0 where the grid has no minimum */
#ifndef MOEC_NUM_BLOCKS_TABLE_H
#define MOEC_NUM_BLOCKS_TABLE_H

#include "num/blocks.h"
#include "num/vec_table.h"

#include <stdbool.h>
#include <string.h>

/* One float16 in float32, as moec_dtypes has it for many. */
static inline float moec__blocks_value(uint16_t half)
{
    uint32_t u = (uint32_t)(half & 0x7fff) << 13;
    float x;
    memcpy(&x, &u, sizeof x);
    x *= 0x1p112f; /* the exponent's bias; exact, denormals too */
    memcpy(&u, &x, sizeof u);
    u |= (uint32_t)(half & 0x8000) << 16 | ((half & 0x7c00) == 0x7c00 ? 0x7f800000U : 0U);
    memcpy(&x, &u, sizeof x);
    return x;
}

enum { MOEC_BLOCK_LANES = 16, MOEC_BLOCK_POINTS = 16, MOEC_BLOCK_SUPER = 256, MOEC_BLOCK_MOST = 32 };

typedef enum moec_block_kind {
    MOEC_GRID_SIGNED, /* q whole in least..most, b = 0 */
    MOEC_GRID_MIN,    /* q whole in 0..most, b >= 0 */
    MOEC_GRID_FREE,   /* q whole in 0..most, b of any sign */
    MOEC_GRID_POINTS  /* q = point[0 .. points-1], ascending, b = 0 */
} moec_block_kind;

/* A range to begin the search with. With b: s = scale (high - low) / most, b = -(low + shift (high - low)); else s = scale times
 * the value of largest magnitude. */
typedef struct moec_block_start {
    float scale, shift;
} moec_block_start;

typedef struct moec_block_grid {
    moec_block_kind kind;
    float least, most;
    float point[MOEC_BLOCK_POINTS];
    int points, passes; /* passes: times that codes are chosen for each start */
    int starts, quick; /* quick: how many of them where all values weigh the same; 0: all */
    moec_block_start start[9];
    float scale_least, scale_most; /* of s as a whole multiple of d; b's is 0 .. scale_most */
    int reach;                     /* neighbours of it to try on both sides */
} moec_block_grid;

typedef struct moec_block_tile {
    float x[MOEC_BLOCK_MOST * MOEC_BLOCK_LANES], m[MOEC_BLOCK_MOST * MOEC_BLOCK_LANES]; /* values, what they weigh; */
    int m_step; /* weights of value i at m[i * m_step]: LANES, or 0 where all weigh 1 */
    int count;  /* values of a sub-block */
} moec_block_tile;

/* Of each lane, with q the nearest codes for s and b, r = x - (s q - b). */
typedef struct moec_block_sums {
    float error[MOEC_BLOCK_LANES];                     /* sum m r^2 */
    float rq[MOEC_BLOCK_LANES], qq[MOEC_BLOCK_LANES];  /* sum m r q, sum m q^2 */
    float r[MOEC_BLOCK_LANES], q[MOEC_BLOCK_LANES];    /* sum m r, sum m q: 0 where there is no b */
    float m[MOEC_BLOCK_LANES];                         /* sum m, likewise */
} moec_block_sums;

typedef struct moec_block_table {
    /* The best s and b of each lane. */
    void (*fit)(float *s, float *b, const moec_block_tile *t, const moec_block_grid *g);
    /* Sums for given s and b. */
    void (*measure)(moec_block_sums *out, const moec_block_tile *t, const moec_block_grid *g, const float *s, const float *b);
    /* The best multiples ds of d and db of e near s / d and b / e, and their sums. */
    void (*settle)(float *ds, float *db, moec_block_sums *out, const moec_block_tile *t, const moec_block_grid *g, const float *s,
                   const float *b, const float *d, const float *e);
    /* Codes u = q - least, or the number of the point, of `subs` sub-blocks of `count` values in their order in the row. */
    void (*codes)(uint8_t *u, const float *x, int subs, int count, const moec_block_grid *g, const float *s, const float *b);
    /* The same of whole blocks of 32 with 4 bits a code, 16 bytes each, `stride` apart: the first half in the low nibbles. */
    void (*nibbles)(uint8_t *out, int stride, const float *x, int blocks, const moec_block_grid *g, const float *s, const float *b);
} moec_block_table;

extern const moec_block_table moec__blocks_generic;
#ifdef MOEC_VEC_X86
extern const moec_block_table moec__blocks_avx2, moec__blocks_avx512;
#endif

/* The row's blocks, packed and unpacked: blocks_write.c, blocks_super.c and blocks_read.c. `m` [n] is what values weigh or NULL. */
const moec_block_table *moec__blocks_table(void);
const moec_block_grid *moec__blocks_grid(moec_block type);
/* Sub-blocks of x [lanes * count] side by side; lanes above `lanes` are 0. */
void moec__blocks_tile(moec_block_tile *t, const float *x, const float *m, int lanes, int count);
uint16_t moec__blocks_half(float x); /* x in float16, at most 65504 */
void moec__blocks_write_32(uint8_t *out, const float *w, const float *m, int64_t blocks, moec_block type);
void moec__blocks_write_mxfp4(uint8_t *out, const float *w, const float *m, int64_t blocks);
void moec__blocks_write_256(uint8_t *out, const float *w, const float *m, int64_t blocks, moec_block type);

/* iq4_nl's and iq4_xs's points, and mxfp4's in the order of its codes. */
extern const int8_t moec__blocks_iq4[16], moec__blocks_e2m1[16];

#endif
