/* Edit distance with swaps, for "did you mean". */
#include "base/word.h"

#include <string.h>

enum { WORD_MAX = 63 };

static int min_int(int a, int b)
{
    return a < b ? a : b;
}

int moec_word_distance(const char *a, const char *b)
{
    size_t na = strnlen(a, WORD_MAX), nb = strnlen(b, WORD_MAX);
    int row[3][WORD_MAX + 1]; /* the two rows before are needed for swaps */
    for (size_t j = 0; j <= nb; j++)
        row[0][j] = (int)j;
    for (size_t i = 1; i <= na; i++) {
        int *now = row[i % 3], *one = row[(i + 2) % 3], *two = row[(i + 1) % 3];
        now[0] = (int)i;
        for (size_t j = 1; j <= nb; j++) {
            int same = a[i - 1] == b[j - 1] ? 0 : 1;
            now[j] = min_int(one[j - 1] + same, min_int(one[j], now[j - 1]) + 1);
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1])
                now[j] = min_int(now[j], two[j - 2] + 1);
        }
    }
    return row[na % 3][nb];
}

const char *moec_word_nearest(const char *word, const char *const *names, size_t n)
{
    const char *best = NULL;
    int best_distance = 1 + (int)(strnlen(word, WORD_MAX) / 3); /* a third of the letters may be wrong */
    if (best_distance > 4)
        best_distance = 4;
    for (size_t i = 0; i < n; i++) {
        int d = moec_word_distance(word, names[i]);
        if (d < best_distance) {
            best = names[i];
            best_distance = d;
        }
    }
    return best;
}
