/* vec.h for any machine. */
#define VEC_BYTES 16
#define VEC_TABLE moec__vec_generic
#include "num/vec_body.inc"
