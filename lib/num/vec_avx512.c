/* vec.h for x86-64-v4. The exponential fuses its multiplications and additions; nothing else does. */
#include "num/vec_table.h"

#ifdef MOEC_VEC_X86
#include <immintrin.h>
#include <math.h>
#include <string.h>
#pragma GCC target("arch=x86-64-v4") /* behind the system headers: they are not ours to compile differently */
#define VEC_BYTES 64
#define VEC_TABLE moec__vec_avx512
#define VEC_FMA(a, b, c) ((vf)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define VEC_MAX(a, b) ((vf)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define VEC_MIN(a, b) ((vf)_mm512_min_ps((__m512)(a), (__m512)(b)))
#define VEC_SCALE(a, b) ((vf)_mm512_scalef_ps((__m512)(a), (__m512)(b)))
#define VEC_SQRT(a) ((vf)_mm512_sqrt_ps((__m512)(a)))
#include "num/vec_body.inc"
#endif
