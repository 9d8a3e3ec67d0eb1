/* blocks_table.h for x86-64-v3. */
#include "num/blocks_table.h"

#ifdef MOEC_VEC_X86
#include <immintrin.h>
#include <string.h>
#pragma GCC target("arch=x86-64-v3") /* behind the system headers: they are not ours to compile differently */
#define VEC_BYTES 32
#define VEC_TABLE moec__blocks_avx2
#define VEC_MAX(a, b) ((vf)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define VEC_MIN(a, b) ((vf)_mm256_min_ps((__m256)(a), (__m256)(b)))
#include "num/blocks_body.inc"
#endif
