/* ggml's block types: how a row of a matrix lies in a GGUF file. A row of n values is n / elements blocks of `bytes` bytes each.
 *
 *   f16, bf16                                 one value a block
 *   q4_0, q5_0, q8_0   32 values              w = d q            q -8..7, -16..15, -127..127
 *   q4_1, q5_1         32                     w = d q + m        q 0..15, 0..31
 *   iq4_nl             32                     w = d t[q]         t a table of 16 values from -127 to 113
 *   mxfp4              32                     w = 2^(e-128) t[q] t twice the values of e2m1: 0 1 2 3 4 6 8 12 and their negatives
 *   q2_k               256 = 16 sub-blocks    w = d s q - e b    q 0..3,  s and b of 4 bits
 *   q4_k, q5_k         256 =  8               w = d s q - e b    q 0..15, 0..31, s and b of 6 bits
 *   q3_k, q6_k         256 = 16               w = d s q          q -4..3, -32..31, s of 6 and 8 bits with sign
 *   iq4_xs             256 =  8               w = d s t[q]       s of 6 bits with sign
 *   tq1_0, tq2_0       256                    w = d q            q -1..1
 *
 * d, m and e are float16, s and b whole numbers of a sub-block. Bytes lie as in ggml (ggml-common.h), and gguf-py reads them.
 *
 * Writing minimises the sum of importance (value - w)^2. Of each sub-block: from several clipped ranges, codes to the nearest and
 * scale and minimum by weighted least squares in turn, the best of all kept. Of a block of sub-blocks: d and e from the largest
 * scale and minimum, s and b of every sub-block among the neighbours of its own optimum by the error that their nearest codes
 * give, d and e by least squares, in turn. Last the codes for the scales as they are stored. ggml's own quantizers (ggml-quants.c)
 * differ: an error weighs importance times sqrt(2 mean w^2 + w^2) there, and s and b of a sub-block are rounded to multiples of d
 * and e without a look at the codes.
 *
 * Nothing is allocated; safe from several threads; every instruction set gives the same bytes. */
#ifndef MOEC_NUM_BLOCKS_H
#define MOEC_NUM_BLOCKS_H

#include "base/err.h"

#include <stdint.h>

typedef enum moec_block {
    MOEC_BLOCK_F16, MOEC_BLOCK_BF16, MOEC_BLOCK_Q4_0, MOEC_BLOCK_Q4_1, MOEC_BLOCK_Q5_0, MOEC_BLOCK_Q5_1, MOEC_BLOCK_Q8_0,
    MOEC_BLOCK_Q2_K, MOEC_BLOCK_Q3_K, MOEC_BLOCK_Q4_K, MOEC_BLOCK_Q5_K, MOEC_BLOCK_Q6_K, MOEC_BLOCK_IQ4_NL, MOEC_BLOCK_IQ4_XS,
    MOEC_BLOCK_MXFP4, MOEC_BLOCK_TQ1_0, MOEC_BLOCK_TQ2_0,
    MOEC_BLOCK_COUNT
} moec_block;

typedef struct moec_block_traits {
    const char *name;    /* ggml's, in lower case */
    int ggml;            /* number of the type in a GGUF file */
    int elements, bytes; /* of one block */
} moec_block_traits;

extern MOEC_API const moec_block_traits moec_blocks[MOEC_BLOCK_COUNT];

/** Finds a type by its name in lower case; MOEC_BLOCK_COUNT when unknown. */
MOEC_API moec_block moec_blocks_find(const char *name);

/** Bytes of a row of n >= 0 values; -1 when the block does not divide n or the number does not fit. */
MOEC_API int64_t moec_blocks_bytes(moec_block type, int64_t n);

/** The type that a row of n values gets where `type` is asked for: itself when its block divides n; else one of blocks of 32 with
 *  at least its bits (q2_k, q3_k, iq4_xs, tq1_0, tq2_0: iq4_nl; q4_k: q5_0; q5_k: q5_1; q6_k: q8_0); f16 when 32 does not divide n. */
MOEC_API moec_block moec_blocks_fall_back(moec_block type, int64_t n);

/** Writes one row.
 *  @param out        [moec_blocks_bytes(type, n)], any address; what it holds after a failure means nothing.
 *  @param w          [n], finite; at most 65504 in magnitude but for bf16 and mxfp4, which cut at their largest value.
 *  @param importance [n], what an error of each value weighs, finite and >= 0: the mean square of the input of each column; or
 *                    NULL: all weigh the same. It is divided by its mean and 0.0001 added, so that columns that no token reached
 *                    are still rounded to something near. All 0 is as NULL. f16, bf16: only checked.
 *  @return MOEC_ESHAPE when the block does not divide n; MOEC_ENUMERIC when a value is not finite, too large for the type, or an
 *          importance is negative or not finite; MOEC_EINVAL for a type that is none.
 *  Cost: one to some hundred reads of the row in cache, by type; see tests/bench/README.md. */
MOEC_API moec_status moec_blocks_write(void *out, const float *w, const float *importance, int64_t n, moec_block type,
                                       moec_err *err) MOEC_USE_RESULT;

/** Reads one row: out [n] in float32, the formulas above rounded product by product, from the left, so that gguf-py gives the same
 *  bits. `in` may lie at any address; any bytes are a row, those that hold no finite scale give values that are not finite.
 *  MOEC_ESHAPE when the block does not divide n; MOEC_EINVAL for a type that is none. */
MOEC_API moec_status moec_blocks_read(float *out, const void *in, int64_t n, moec_block type, moec_err *err) MOEC_USE_RESULT;

#endif
