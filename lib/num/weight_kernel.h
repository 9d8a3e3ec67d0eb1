/* What one instruction set contributes to moec_weight_read. Private to lib/num. All give the same bits: every value is one
 * exact number times its scale, rounded once. */
#ifndef MOEC_NUM_WEIGHT_KERNEL_H
#define MOEC_NUM_WEIGHT_KERNEL_H

#include "num/tensor.h"

#include <string.h>

enum { MOEC_MX = 32 }; /* values of MXFP4 that share a scale */

typedef struct moec_decode {
    /* n values of F8_E4M3 times scale */
    void (*fp8)(float *out, const unsigned char *in, int64_t n, float scale);
    /* whole blocks of 32 e2m1 values: 16 bytes and one scale byte each */
    void (*mxfp4)(float *out, const unsigned char *codes, const unsigned char *scales, int64_t blocks);
} moec_decode;

/* By code, bit 3 being the sign (OCP Microscaling Formats 1.0, 5.3.3). */
#define MOEC_E2M1 {0.0F, 0.5F, 1.0F, 1.5F, 2.0F, 3.0F, 4.0F, 6.0F, -0.0F, -0.5F, -1.0F, -1.5F, -2.0F, -3.0F, -4.0F, -6.0F}

/* 2^(b-127), a denormal for b = 0; NaN for 0xff. */
static inline float moec__e8m0(unsigned char b)
{
    uint32_t u = (uint32_t)b << 23 | (b == 0 ? 0x00400000U : b == 0xff ? 0x7fc00000U : 0U);
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

void moec__fp8_generic(float *out, const unsigned char *in, int64_t n, float scale);
#if defined(__x86_64__)
/* weight_x86.c */
extern const moec_decode moec__decode_avx2, moec__decode_avx512;
#endif

#endif
