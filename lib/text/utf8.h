/* UTF-8: lengths and code points of checked text, repair of unchecked text, and the byte buffer the text stages
 * share. */
#ifndef MOEC_TEXT_UTF8_H
#define MOEC_TEXT_UTF8_H

#include "base/err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Bytes that grow. Zero-initialise; moec_free(b.p) releases. */
typedef struct moec__buf {
    char *p;
    size_t n, cap;
} moec__buf;
moec_status moec__buf_add(moec__buf *b, const char *bytes, size_t n, moec_err *err) MOEC_USE_RESULT;

/** Bytes of the character that starts with `lead`; the text must be checked UTF-8. */
static inline size_t moec__utf8_len(unsigned char lead)
{
    return lead < 0x80 ? 1u : lead < 0xe0 ? 2u : lead < 0xf0 ? 3u : 4u;
}

/** Code point at s, which must be the start of a character of checked UTF-8. */
static inline uint32_t moec__utf8_get(const char *s)
{
    const unsigned char *u = (const unsigned char *)s;
    if (u[0] < 0x80)
        return u[0];
    if (u[0] < 0xe0)
        return (uint32_t)(u[0] & 0x1f) << 6 | (u[1] & 0x3f);
    if (u[0] < 0xf0)
        return (uint32_t)(u[0] & 0x0f) << 12 | (uint32_t)(u[1] & 0x3f) << 6 | (u[2] & 0x3f);
    return (uint32_t)(u[0] & 0x07) << 18 | (uint32_t)(u[1] & 0x3f) << 12 | (uint32_t)(u[2] & 0x3f) << 6 |
           (u[3] & 0x3f);
}

/** Start of the character that ends before byte i > 0 of checked UTF-8. */
static inline size_t moec__utf8_back(const char *s, size_t i)
{
    do
        i--;
    while (((unsigned char)s[i] & 0xc0) == 0x80);
    return i;
}

/** Writes the UTF-8 of a code point below 0x110000 to out[4]; returns its length. */
size_t moec__utf8_put(char out[4], uint32_t cp);

/** Number of bytes in front of the first ill-formed part; len when there is none. */
size_t moec__utf8_check(const char *s, size_t len);

/** Appends s with every maximal ill-formed part as U+FFFD (Unicode 14, table 3-8, "substitution of maximal
 * subparts"); raises *n_invalid by their number. MOEC_ENOMEM. */
moec_status moec__utf8_repair(moec__buf *out, uint64_t *n_invalid, const char *s, size_t len,
                              moec_err *err) MOEC_USE_RESULT;

/** White_Space of the Unicode Character Database (what Rust calls char::is_whitespace). */
bool moec__is_space(uint32_t cp);

/** Index in [lo, hi) behind leading white space, and in front of trailing white space. */
size_t moec__skip_space(const char *s, size_t lo, size_t hi);
size_t moec__skip_space_back(const char *s, size_t lo, size_t hi);

#endif
