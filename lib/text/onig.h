/* Rewrites a regular expression of Oniguruma's Ruby syntax, which tokenizer.json files hold, into one that means the
 * same to PCRE2 with PCRE2_UTF, PCRE2_UCP and PCRE2_MULTILINE. */
#ifndef MOEC_TEXT_ONIG_H
#define MOEC_TEXT_ONIG_H

#include "text/utf8.h"

/* Members of \w in Oniguruma, to be used inside brackets. Outside of a class it has some more Latin-1 characters. */
#define MOEC__WORD_CLASS "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}"
#define MOEC__WORD_ALONE MOEC__WORD_CLASS "\\x{b2}\\x{b3}\\x{b9}\\x{bc}-\\x{be}"

/** Appends the rewritten pattern and a NUL (not counted in out->n). MOEC_EFORMAT names a construct that would
 * silently mean something else (POSIX brackets, classes of classes under (?i), some escapes); what PCRE2 itself refuses
 * is left to it. MOEC_ENOMEM. */
moec_status moec__onig_to_pcre(moec__buf *out, const char *pattern, size_t n, moec_err *err) MOEC_USE_RESULT;

#endif
