/* vec.h for x86-64-v4. Multiplications and additions are not fused, so that only the vector length differs from the plain
 * version. */
#include "num/vec_table.h"

#ifdef MOEC_VEC_X86
#include <math.h>
#include <string.h>
#pragma GCC target("arch=x86-64-v4") /* behind the system headers: they are not ours to compile differently */
#define VEC_BYTES 64
#define VEC_TABLE moec__vec_avx512
#include "num/vec_body.inc"
#endif
