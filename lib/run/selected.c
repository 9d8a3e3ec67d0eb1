/* See selected.h. */
#include "run/selected.h"

#include <string.h>

void moec__selected_sort(int64_t *first, int32_t *token, float *gate, const int32_t *ids, const float *gates, int64_t n, int64_t slots,
                         int64_t experts)
{
    memset(first, 0, (size_t)(experts + 1) * sizeof *first);
    for (int64_t i = 0; i < n * slots; i++)
        if (ids[i] >= 0 && ids[i] < experts)
            first[ids[i] + 1]++;
    for (int64_t e = 0; e < experts; e++)
        first[e + 1] += first[e];
    for (int64_t i = 0; i < n * slots; i++)
        if (ids[i] >= 0 && ids[i] < experts) {
            const int64_t to = first[ids[i]]++;
            token[to] = (int32_t)(i / slots);
            gate[to] = gates[i];
        }
    memmove(first + 1, first, (size_t)experts * sizeof *first); /* every start has moved to the next one's place */
    first[0] = 0;
}
