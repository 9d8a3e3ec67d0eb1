/* Words that people mistype. */
#ifndef MOEC_BASE_WORD_H
#define MOEC_BASE_WORD_H

#include "base/err.h"

/** Edits (insert, delete, replace, swap of neighbours) that turn one word into the other; words are cut at 63 bytes. */
MOEC_API int moec_word_distance(const char *a, const char *b);

/** The nearest of n names, or NULL when none is near enough to be what was meant. The first of several. */
MOEC_API const char *moec_word_nearest(const char *word, const char *const *names, size_t n);

#endif
