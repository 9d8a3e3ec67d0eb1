/* blocks_table.h for x86-64-v4. */
#include "num/blocks_table.h"

#ifdef MOEC_VEC_X86
#include <immintrin.h>
#include <string.h>
#pragma GCC target("arch=x86-64-v4") /* behind the system headers: they are not ours to compile differently */
#define VEC_BYTES 64
#define VEC_TABLE moec__blocks_avx512
#define VEC_MAX(a, b) ((vf)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define VEC_MIN(a, b) ((vf)_mm512_min_ps((__m512)(a), (__m512)(b)))
#include "num/blocks_body.inc"
#endif
