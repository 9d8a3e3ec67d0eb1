/* A layer's selections by expert. Private to lib/run. */
#ifndef MOEC_RUN_SELECTED_H
#define MOEC_RUN_SELECTED_H

#include <stdint.h>

/* Sorts what n tokens select, ids and gates [n,slots], by expert, tokens ascending: those of expert e are token[i] and gate[i] for i in
 * [first[e], first[e + 1]). first: [experts + 1]; token, gate: [n slots]. An id below 0 or from `experts` on selects nothing. */
void moec__selected_sort(int64_t *first, int32_t *token, float *gate, const int32_t *ids, const float *gates, int64_t n, int64_t slots,
                         int64_t experts);

#endif
