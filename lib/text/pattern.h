/* Searching in text by regular expression or by literal; the library's only sight of PCRE2. A pattern never changes
 * once made and may be shared, a matcher belongs to one thread. */
#ifndef MOEC_TEXT_PATTERN_H
#define MOEC_TEXT_PATTERN_H

#include "base/err.h"

#include <stdbool.h>
#include <stddef.h>

typedef struct moec__pattern moec__pattern;
typedef struct moec__matcher moec__matcher;

/** Compiles checked UTF-8 in Oniguruma's syntax. MOEC_EFORMAT when it is not supported or does not compile;
 * MOEC_ENOMEM. */
moec_status moec__pattern_regex(moec__pattern **out, const char *onig, size_t n, moec_err *err) MOEC_USE_RESULT;
/** Matches these bytes, at every character when n is 0. MOEC_ENOMEM. */
moec_status moec__pattern_literal(moec__pattern **out, const char *bytes, size_t n, moec_err *err) MOEC_USE_RESULT;
void moec__pattern_free(moec__pattern *p);

moec_status moec__matcher_new(moec__matcher **out, moec_err *err) MOEC_USE_RESULT;
void moec__matcher_free(moec__matcher *m);

/* All matches in s from left to right without overlap; an empty match right behind another match is passed over.
 * Set the first four, leave the rest zero. */
typedef struct moec__search {
    const moec__pattern *p;
    moec__matcher *m;
    const char *s; /* checked UTF-8; the pattern sees nothing in front or behind */
    size_t n;
    size_t at, last;
    bool any;
} moec__search;
/** The next match is s[*from..*to), *found tells whether there is one. MOEC_EFORMAT when a limit on steps or memory
 * is hit. */
moec_status moec__search_next(bool *found, size_t *from, size_t *to, moec__search *search,
                              moec_err *err) MOEC_USE_RESULT;

#endif
