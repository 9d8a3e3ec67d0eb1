/* vec.h for x86-64-v3. Multiplications and additions are not fused, so that only the vector length differs from the plain
 * version. */
#include "num/vec_table.h"

#ifdef MOEC_VEC_X86
#include <math.h>
#include <string.h>
#pragma GCC target("arch=x86-64-v3") /* behind the system headers: they are not ours to compile differently */
#define VEC_BYTES 32
#define VEC_TABLE moec__vec_avx2
#include "num/vec_body.inc"
#endif
