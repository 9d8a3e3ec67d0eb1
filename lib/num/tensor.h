/* Number formats and tensor views. A view owns nothing: it points into a mapped checkpoint or a buffer. */
#ifndef MOEC_NUM_TENSOR_H
#define MOEC_NUM_TENSOR_H

#include "base/err.h"

#include <stdbool.h>
#include <stdint.h>

typedef enum moec_dtype {
    MOEC_F64, MOEC_F32, MOEC_F16, MOEC_BF16, MOEC_F8_E4M3, MOEC_F8_E5M2, MOEC_F8_E8M0,
    MOEC_I64, MOEC_I32, MOEC_I16, MOEC_I8, MOEC_U64, MOEC_U32, MOEC_U16, MOEC_U8, MOEC_BOOL,
    MOEC_DTYPE_COUNT
} moec_dtype;

typedef struct moec_dtype_traits {
    const char *name; /* spelling in safetensors headers */
    int bytes;
    /* n values from any address to float32; exact but for F64; NULL where the format is copied but not computed with. The
     * formats of one byte, from "OCP 8-bit Floating Point Specification 1.0" and "OCP Microscaling Formats 1.0":
     * E4M3 has bias 7, no infinity and one NaN of each sign (0x7f, 0xff); E5M2 is the upper half of an F16; E8M0 is
     * 2^(b-127), 0xff NaN. */
    void (*to_f32)(float *out, const void *in, int64_t n);
} moec_dtype_traits;

extern MOEC_API const moec_dtype_traits moec_dtypes[MOEC_DTYPE_COUNT];

/** Finds a dtype by its safetensors name; MOEC_DTYPE_COUNT when unknown. */
MOEC_API moec_dtype moec_dtype_find(const char *name);

enum { MOEC_MAX_RANK = 8 };

typedef struct moec_tensor {
    const char *name; /* borrowed from the checkpoint */
    moec_dtype dtype;
    int rank;
    int64_t dim[MOEC_MAX_RANK];
    const void *data; /* little-endian, C order; may be unaligned */
    size_t bytes;
} moec_tensor;

/** To the nearest BF16 or F16, ties to even; a NaN stays one, a value beyond 65504 (by rounding: from 65520 on) becomes an
 *  infinite F16. */
MOEC_API uint16_t moec_to_bf16(float x);
MOEC_API uint16_t moec_to_f16(float x);

/** Index of the first value that is NaN or infinite, or -1. Formats without to_f32 count as finite. Cost: one read. */
MOEC_API int64_t moec_tensor_nonfinite(const moec_tensor *t);

/** "[2, 3]" into buf; returns buf. */
MOEC_API const char *moec_shape_text(char *buf, size_t cap, int rank, const int64_t *dim);

#endif
