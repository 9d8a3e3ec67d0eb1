/* A weight matrix as it lies in a checkpoint: a tensor, a part of a stacked one, transposed, interleaved, or quantized in
 * blocks. Nothing is copied: a view says where value (r, c) is and how it is read. */
#ifndef MOEC_NUM_WEIGHT_H
#define MOEC_NUM_WEIGHT_H

#include "num/tensor.h"

/* How the values of a view are stored. */
typedef enum moec_storage {
    MOEC_PLAIN,   /* dtype with to_f32 other than F8_E8M0 */
    MOEC_FP8,     /* F8_E4M3 times the scale of its block: DeepSeek-V3's weight_scale_inv (F32, BF16, F16 or F8_E8M0) */
    MOEC_MXFP4,   /* U8, two e2m1 values a byte, the first in the low half; one e8m0 scale (U8, 2^(s-127)) per 32 values that
                     lie side by side (OCP Microscaling Formats 1.0, 5.2 and 5.3) */
    MOEC_GPTQ,    /* I32 [cols bits / 32, rows]: codes in streams (bits.h) along the columns, one for each row; scales
                     [cols / block_cols, rows], zero points I32 [cols / block_cols, rows bits / 32], streams along the rows */
    MOEC_PACKED,  /* I32 [rows, ceil(cols bits / 32)]: the same by rows, as compressed-tensors has it; scales
                     [rows, cols / block_cols], zero points I32 [ceil(rows bits / 32), cols / block_cols] or none */
    MOEC_NESTED,  /* U8 [rows, cols / 4]: codes of 2 bits, the first in the lowest bits, a scale each [1 + p, rows, cols / block_cols] and
                     p planes U8 [p, rows, cols / 8] of one bit more, the first in the lowest bit (run/nested.md) */
    MOEC_BLOCKS,  /* U8 [rows, moec_blocks_bytes(block, cols)]: rows of ggml's blocks (num/blocks.h) */
} moec_storage;

/* Value (r, c) is number at + r*row_step + c*col_step of `of`, counted in values (not bytes) from the tensor's start.
 * MXFP4 has col_step 1 and `at`, row_step and cols that are multiples of 32; value i has scale i / 32 of `scale`.
 * FP8: scale (r0 + r) / block_rows, c / block_cols of the row-major [ceil(rows of the tensor / block_rows), scale_cols]
 * matrix `scale`; r0 = at / row_step. FP8 has col_step 1, row_step >= cols and an `at` that is a multiple of row_step: rows
 * of the tensor, whole from their start on.
 * GPTQ and PACKED: value (r, c) is s (u - z) in float32, u the code, s and z those of group c / block_cols of row r0 + r;
 * z = (stored + zero_more) mod 2^bits, without zero points 2^(bits-1). As FP8 whole rows, row_step = cols.
 * NESTED: whole rows as those; in float32, in this order, s_0 (u - 2) + s_1 (v_1 - 1/2) + .. + s_(bits-2) (v_(bits-2) - 1/2), u the code of
 * 2 bits, v_k the bit in plane k - 1, s_k the scales; what is behind that is not looked at: fewer bits, less is read.
 * BLOCKS: whole rows likewise.
 * paired d > 0 (plain with col_step 1, and BLOCKS): of every d rows, i and d/2 + i of the view are 2i and 2i+1 as they lie: rows
 * of heads that a GGUF has in the order of rotated pairs.
 * moec_weight_check says whether all of this holds. */
typedef struct moec_weight {
    const moec_tensor *of;    /* NULL: there is no such matrix */
    const moec_tensor *scale; /* NULL: MOEC_PLAIN */
    int64_t rows, cols;
    int64_t at, row_step, col_step;
    int32_t block_rows, block_cols, scale_cols; /* MOEC_FP8; MOEC_GPTQ, MOEC_PACKED, MOEC_NESTED: block_cols columns have one scale */
    moec_storage storage;
    const moec_tensor *zero;  /* MOEC_GPTQ, MOEC_PACKED: zero points or NULL; MOEC_NESTED: planes, NULL where bits is 2 */
    uint8_t bits, zero_more;  /* 1 to 8, of MOEC_NESTED those that are read, from 2 on; 1 where zero points are stored less one (GPTQ's
                                 first format), else 0 */
    uint8_t block;            /* MOEC_BLOCKS: a moec_block */
    int32_t paired;           /* 0: rows lie as they are counted */
} moec_weight;

/** All of a [rows, cols] tensor, plain. With more dimensions the last is cols and the others are taken together as rows, a
 *  vector is one row. NULL: no matrix. */
MOEC_API moec_weight moec_weight_of(const moec_tensor *t);
/** Whether a view keeps what is said above: MOEC_EINVAL for no matrix, another dtype, negative or impossible sizes and
 *  steps, values or scales beyond the tensors' ends. The functions below take views that pass; one without rows or columns
 *  passes whatever its tensor is. Cost: none to speak of. */
MOEC_API moec_status moec_weight_check(const moec_weight *w, moec_err *err) MOEC_USE_RESULT;
/** Values [r, r+rows) x [c, c+cols) as float32 to out[i*ld + j]. The caller keeps inside the matrix. Exact but for F64 and
 *  FP8 (one rounding of the product with the scale); the same bits on every machine. Thread-safe. Cost: one read; views
 *  with row_step up to 4 are read along their columns, fastest in blocks of 96 rows; other col_steps value by value. */
MOEC_API void moec_weight_read(float *out, int64_t ld, const moec_weight *w, int64_t r, int64_t rows, int64_t c,
                               int64_t cols);
/** All of it to out [rows,cols]. MOEC_ENUMERIC: a value is not finite; the text names the tensor. */
MOEC_API moec_status moec_weight_read_all(float *out, const moec_weight *w, moec_err *err) MOEC_USE_RESULT;
/** Writes [r, r+rows) x [c, c+cols) from in[i*ld + j], each rounded to nearest even. For plain views of F32, BF16 and F16 whose
 *  tensor lies in writable memory. MOEC_EINVAL: another storage; MOEC_ENUMERIC: a value that is not finite, or too
 *  large for the tensor's type, and then those before it are written. Thread-safe on distinct values. */
MOEC_API moec_status moec_weight_write(const moec_weight *w, const float *in, int64_t ld, int64_t r, int64_t rows, int64_t c,
                                       int64_t cols, moec_err *err) MOEC_USE_RESULT;
/** Is every value of the view one that computing can take? -1, or row*cols + column of the first NaN or infinity, in which
 *  the float32 value counts: an FP8 or MXFP4 value that its scale takes out of range is found too. Formats without to_f32
 *  count as finite. Cost: one read. */
MOEC_API int64_t moec_weight_nonfinite(const moec_weight *w);
/** Bytes of the tensor that belong to this view, scales included: its share, rows*cols values and their blocks. */
MOEC_API uint64_t moec_weight_bytes(const moec_weight *w);
/** moec_pages_drop gives the mapped pages that only this view uses back, moec_pages_prefetch asks for them early.
 *  Interleaved and transposed views count as the whole part of the tensor they share. */
MOEC_API void moec_weight_drop(const moec_weight *w);
MOEC_API void moec_weight_prefetch(const moec_weight *w);

#endif
