/* One matrix W [rows,cols] in few bits: the grid of its values, how its scales are found, and rounding to nearest. Each row has
 * groups of neighbouring columns, of one scale each. Pure functions; gptq.h rounds better, run/quantize.h carries both through a
 * model.
 *
 *     W'[r,c] = s[r,j] (u[r,c] - z[r,j]),     j = c / group,     u = 0 .. 2^bits - 1
 *
 * Without zero points z = 2^(bits-1) (one half at 1 bit, where W' is -s/2 or s/2); then s may be negative: the side that has one
 * level more is the one that a group needs more. */
#ifndef MOEC_METHOD_QUANT_H
#define MOEC_METHOD_QUANT_H

#include "num/tensor.h"

enum { MOEC_QUANT_BITS = 8 }; /* most; 16 stands for a matrix that is left as it is */

typedef struct moec_qgrid {
    int bits;              /* 1 .. MOEC_QUANT_BITS */
    int64_t group;         /* columns of a scale; divides cols */
    bool zeros;            /* zero points z = 0 .. 2^bits - 1; not at 1 bit */
    moec_dtype scale_type; /* F16, BF16 or F32: scales are rounded to it before anything is rounded to them */
} moec_qgrid;

typedef struct moec_qcodes {
    moec_qgrid grid;
    int64_t rows, cols;
    uint8_t *code;  /* [rows,cols] */
    float *scale;   /* [rows, cols/group] */
    uint8_t *zero;  /* the same, NULL without zero points */
    struct moec_qcodes *plane; /* [planes] of 1 bit each, whose values come on top: nested.h; NULL: none */
    int planes;
} moec_qcodes;

/** Room for a matrix. MOEC_EINVAL: bits, group or type that there is not; MOEC_ENOMEM. Release with moec_qcodes_release. */
MOEC_API moec_status moec_qcodes_new(moec_qcodes *out, const moec_qgrid *g, int64_t rows, int64_t cols, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_qcodes_release(moec_qcodes *c);
/** The largest of group, group/2, group/4 .. that divides cols and is a multiple of `least`; 0: none is. group 0: cols. */
MOEC_API int64_t moec_quant_group(int64_t group, int64_t cols, int64_t least);

/* How scales (and zero points) of a group are found: from its largest and smallest value; by search.
 *    MINMAX, no zeros   s = 2 max|w| / (2^bits - 1);  zeros: over the range of the values and 0;  1 bit: s = 2 mean|w|
 *    CLIP               s (both signs without zeros) and z of least sum_c m_c (w_c - w'_c)^2, m_c the column's importance */
typedef enum moec_qrange { MOEC_QRANGE_MINMAX, MOEC_QRANGE_CLIP } moec_qrange;
/** Scales and zero points of rows [lo, hi) of c for w [rows,cols] (row 0 first). importance: [cols], none negative; NULL: 1.
 *  A group of zeros gets scale 1, with 1 bit the least that the type has; one whose importance is all 0 is taken as if it were all 1. A scale that the type would make 0 is
 *  its least value. MOEC_ENUMERIC: w is not finite, or a scale is too large for the type; MOEC_ENOMEM. Results do not depend on how
 *  rows are shared out, nor on the machine. Cost: MINMAX one read; CLIP some 20 roundings of every value, 40 with zero points.
 *  CLIP tries scales in even ratios from MINMAX's down to three quarters of a Gaussian's best, each with the zero points around the
 *  middle of the values, takes the one whose codes have the least error with their own best scale, and then codes and scale are
 *  fitted to each other in turn; scales are rounded to the type before they are judged. */
MOEC_API moec_status moec_quant_range(moec_qcodes *c, const float *w, moec_qrange how, const float *importance, int64_t lo, int64_t hi,
                                      moec_err *err) MOEC_USE_RESULT;
/** Codes of rows [lo, hi): the nearest value of the grid; halves go to the even code. */
MOEC_API void moec_quant_nearest(moec_qcodes *c, const float *w, int64_t lo, int64_t hi);
/** W' of rows [lo, hi) to out [rows,cols] (row 0 first), in float32; planes are added one after the other. */
MOEC_API void moec_quant_restore(float *out, const moec_qcodes *c, int64_t lo, int64_t hi);

/** Zero point of scale number `at` of c, and s rounded to a type as scales are. For gptq.c. */
MOEC_API float moec_quant_zero(const moec_qcodes *c, int64_t at);
MOEC_API float moec_quant_scale(float s, moec_dtype type);

#endif
