/* vec.h for x86-64-v3. The exponential fuses its multiplications and additions; nothing else does. */
#include "num/vec_table.h"

#ifdef MOEC_VEC_X86
#include <immintrin.h>
#include <math.h>
#include <string.h>
#pragma GCC target("arch=x86-64-v3") /* behind the system headers: they are not ours to compile differently */
#define VEC_BYTES 32
#define VEC_TABLE moec__vec_avx2
#define VEC_FMA(a, b, c) ((vf)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define VEC_MAX(a, b) ((vf)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define VEC_MIN(a, b) ((vf)_mm256_min_ps((__m256)(a), (__m256)(b)))
#define VEC_SQRT(a) ((vf)_mm256_sqrt_ps((__m256)(a)))
#include "num/vec_body.inc"
#endif
