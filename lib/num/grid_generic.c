/* grid.h for any machine. */
#define VEC_BYTES 16
#define VEC_TABLE moec__grid_generic
#include "num/grid_body.inc"
