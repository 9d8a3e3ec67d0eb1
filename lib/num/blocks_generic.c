/* blocks_table.h for any machine. */
#define VEC_BYTES 16
#define VEC_TABLE moec__blocks_generic
#include "num/blocks_body.inc"
