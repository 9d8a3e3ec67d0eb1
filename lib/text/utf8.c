/* UTF-8 checking and repair. Everything behind it may rely on well-formed text. */
#include "text/utf8.h"

#include "base/mem.h"

#include <string.h>

moec_status moec__buf_add(moec__buf *b, const char *bytes, size_t n, moec_err *err)
{
    size_t want;
    if (!moec_add_size(&want, b->n, n))
        return moec_fail(err, MOEC_ENOMEM, "a text of %zu and %zu bytes is more than this machine can address", b->n,
                         n);
    moec_status st = MOEC_GROW(b->p, b->cap, want, err);
    if (st == MOEC_OK && n > 0) {
        memcpy(b->p + b->n, bytes, n);
        b->n = want;
    }
    return st;
}

size_t moec__utf8_put(char out[4], uint32_t cp)
{
    if (cp < 0x80) {
        out[0] = (char)cp;
        return 1;
    }
    size_t n = cp < 0x800 ? 2 : cp < 0x10000 ? 3 : 4;
    static const unsigned char mark[] = {0, 0, 0xc0, 0xe0, 0xf0};
    for (size_t i = n - 1; i > 0; i--) {
        out[i] = (char)(0x80 | (cp & 0x3f));
        cp >>= 6;
    }
    out[0] = (char)(mark[n] | cp);
    return n;
}

/* Length of the well-formed character at s, or 0 and in *bad the length of the maximal ill-formed part. */
static size_t take_char(size_t *bad, const unsigned char *s, size_t left)
{
    unsigned char lo = 0x80, hi = 0xbf, a = s[0];
    size_t need;
    *bad = 1;
    if (a < 0x80)
        return 1;
    if (a >= 0xc2 && a <= 0xdf)
        need = 2;
    else if (a >= 0xe0 && a <= 0xef)
        need = 3;
    else if (a >= 0xf0 && a <= 0xf4)
        need = 4;
    else
        return 0;
    /* The second byte rules out overlong forms, surrogates and what is above U+10FFFF. */
    if (a == 0xe0)
        lo = 0xa0;
    else if (a == 0xed)
        hi = 0x9f;
    else if (a == 0xf0)
        lo = 0x90;
    else if (a == 0xf4)
        hi = 0x8f;
    for (size_t i = 1; i < need; i++) {
        if (i >= left || s[i] < lo || s[i] > hi) {
            *bad = i;
            return 0;
        }
        lo = 0x80;
        hi = 0xbf;
    }
    return need;
}

size_t moec__utf8_check(const char *s, size_t len)
{
    const unsigned char *u = (const unsigned char *)s;
    size_t i = 0, bad;
    while (i < len) {
        uint64_t word;
        while (len - i >= sizeof word) {
            memcpy(&word, u + i, sizeof word);
            if (word & 0x8080808080808080u)
                break;
            i += sizeof word;
        }
        if (i >= len)
            break;
        size_t n = take_char(&bad, u + i, len - i);
        if (n == 0)
            return i;
        i += n;
    }
    return len;
}

moec_status moec__utf8_repair(moec__buf *out, uint64_t *n_invalid, const char *s, size_t len, moec_err *err)
{
    moec_status st = MOEC_OK;
    size_t i = 0, bad = 0;
    for (;;) {
        size_t good = moec__utf8_check(s + i, len - i);
        MOEC_TRY(moec__buf_add(out, s + i, good, err));
        i += good;
        if (i >= len)
            break;
        (void)take_char(&bad, (const unsigned char *)s + i, len - i);
        MOEC_TRY(moec__buf_add(out, "\xef\xbf\xbd", 3, err));
        i += bad;
        ++*n_invalid;
    }
done:
    return st;
}

bool moec__is_space(uint32_t cp)
{
    if (cp < 0x80)
        return cp == ' ' || (cp >= 9 && cp <= 13);
    return cp == 0x85 || cp == 0xa0 || cp == 0x1680 || (cp >= 0x2000 && cp <= 0x200a) || cp == 0x2028 ||
           cp == 0x2029 || cp == 0x202f || cp == 0x205f || cp == 0x3000;
}

size_t moec__skip_space(const char *s, size_t lo, size_t hi)
{
    while (lo < hi && moec__is_space(moec__utf8_get(s + lo)))
        lo += moec__utf8_len((unsigned char)s[lo]);
    return lo;
}

size_t moec__skip_space_back(const char *s, size_t lo, size_t hi)
{
    while (hi > lo) {
        size_t at = moec__utf8_back(s, hi);
        if (!moec__is_space(moec__utf8_get(s + at)))
            break;
        hi = at;
    }
    return hi;
}
