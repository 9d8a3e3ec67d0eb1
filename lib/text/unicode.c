/* Normal forms by utf8proc's decomposition and composition. Stretches that cannot change are copied; the ordering of
 * marks is done here because utf8proc's takes quadratic time on a hostile run of them. */
#include "text/unicode.h"

#include "base/mem.h"

#include <string.h>
#include <utf8proc.h>

/* Code points that utf8proc decomposes, composes or orders and that the normalizer of `tokenizers` leaves alone,
 * because it knows Unicode 9 only. Models were trained with what it does. Found by comparing all code points (version
 * 0.23.3). */
static const struct range {
    uint32_t from, to;
} younger[] = {
    {0x7fd, 0x7fd},     {0x898, 0x89f},     {0x8ca, 0x8d3},     {0x9fe, 0x9fe},     {0xc3c, 0xc3c},
    {0xd3b, 0xd3c},     {0xeba, 0xeba},     {0x1715, 0x1715},   {0x1abf, 0x1ace},   {0x1df6, 0x1dfa},
    {0x32ff, 0x32ff},   {0xa7f2, 0xa7f4},   {0xa82c, 0xa82c},   {0xab69, 0xab69},   {0x10781, 0x10785},
    {0x10787, 0x107b0}, {0x107b2, 0x107ba}, {0x10d24, 0x10d27}, {0x10eab, 0x10eac}, {0x10efd, 0x10eff},
    {0x10f46, 0x10f50}, {0x10f82, 0x10f85}, {0x11070, 0x11070}, {0x1133b, 0x1133b}, {0x1145e, 0x1145e},
    {0x11839, 0x1183a}, {0x11930, 0x11930}, {0x11938, 0x11938}, {0x1193d, 0x1193e}, {0x11943, 0x11943},
    {0x119e0, 0x119e0}, {0x11a34, 0x11a34}, {0x11a47, 0x11a47}, {0x11a99, 0x11a99}, {0x11d42, 0x11d42},
    {0x11d44, 0x11d45}, {0x11d97, 0x11d97}, {0x11f41, 0x11f42}, {0x16ff0, 0x16ff1}, {0x1e030, 0x1e06d},
    {0x1e08f, 0x1e08f}, {0x1e130, 0x1e136}, {0x1e2ae, 0x1e2ae}, {0x1e2ec, 0x1e2ef}, {0x1e4ec, 0x1e4ef},
    {0x1f16c, 0x1f16c}, {0x1fbf0, 0x1fbf9},
};

static bool is_younger(uint32_t cp)
{
    size_t lo = 0, hi = MOEC_COUNT(younger);
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        if (younger[mid].to < cp)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo < MOEC_COUNT(younger) && younger[lo].from <= cp;
}

static bool has_bit(const moec__calm *c, uint32_t cp)
{
    return (c->bits[cp >> 3] >> (cp & 7) & 1) != 0;
}

/* A starter that NFC leaves alone and that composes with nothing before it, given that `second` has the bits of what
 * composes with something before it. */
static bool is_calm(const moec__calm *second, utf8proc_int32_t cp, utf8proc_int32_t *parts, utf8proc_ssize_t n)
{
    if (is_younger((uint32_t)cp))
        return true;
    if (utf8proc_get_property(parts[0])->combining_class != 0 || parts[0] > 0xffff ||
        has_bit(second, (uint32_t)parts[0]))
        return false;
    if (n > 1)
        n = utf8proc_normalize_utf32(parts, n, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    return n == 1 && parts[0] == cp;
}

static utf8proc_ssize_t decompose(utf8proc_int32_t *out, size_t room, utf8proc_int32_t cp, bool compat)
{
    if (is_younger((uint32_t)cp)) {
        out[0] = cp;
        return 1;
    }
    int boundary = UTF8PROC_BOUNDCLASS_START;
    utf8proc_option_t how = UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | (compat ? UTF8PROC_COMPAT : 0);
    return utf8proc_decompose_char(cp, out, (utf8proc_ssize_t)room, how, &boundary);
}

moec_status moec__calm_new(moec__calm **out, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec__calm *second = NULL, *calm = NULL;
    utf8proc_int32_t parts[32];
    *out = NULL;
    MOEC_TRY(MOEC_NEW(second, 1, err));
    MOEC_TRY(MOEC_NEW(calm, 1, err));
    /* Whatever composes with what is in front of it ends the decomposition of some composite. Composites above U+FFFF
     * end in marks from there, which needs_work treats apart. */
    for (utf8proc_int32_t cp = 0x80; cp < 0x10000; cp++) {
        utf8proc_ssize_t n = decompose(parts, MOEC_COUNT(parts), cp, false);
        if (n > 1 && parts[n - 1] < 0x10000)
            second->bits[parts[n - 1] >> 3] |= (uint8_t)(1 << (parts[n - 1] & 7));
    }
    for (utf8proc_int32_t cp = 0; cp < 0x10000; cp++) {
        utf8proc_ssize_t n = decompose(parts, MOEC_COUNT(parts), cp, false);
        if (n > 0 && n <= (utf8proc_ssize_t)MOEC_COUNT(parts) && is_calm(second, cp, parts, n))
            calm->bits[cp >> 3] |= (uint8_t)(1 << (cp & 7));
    }
    *out = calm;
    calm = NULL;
done:
    moec_free(calm);
    moec_free(second);
    return st;
}

static bool needs_work(moec__form form, const moec__calm *calm, uint32_t cp)
{
    if (form == MOEC__NFC && calm && cp < 0x10000)
        return !has_bit(calm, cp);
    if (is_younger(cp))
        return false;
    if (form != MOEC__NFC || !calm)
        return cp >= 0x80;
    const utf8proc_property_t *p = utf8proc_get_property((utf8proc_int32_t)cp);
    return (cp >= 0x11000 && cp < 0x17000) || p->combining_class != 0 || p->decomp_seqindex != UINT16_MAX;
}

typedef struct codes {
    utf8proc_int32_t *cp, *spare;
    size_t n, cap, cap_spare;
} codes;

static int class_of(utf8proc_int32_t cp)
{
    return is_younger((uint32_t)cp) ? 0 : utf8proc_get_property(cp)->combining_class;
}

/* Stable sort by combining class of the marks c->cp[from..to). */
static moec_status sort_marks(codes *c, size_t from, size_t to, moec_err *err)
{
    size_t count[257] = {0};
    moec_status st = MOEC_GROW(c->spare, c->cap_spare, to - from, err);
    if (st != MOEC_OK)
        return st;
    for (size_t k = from; k < to; k++)
        count[class_of(c->cp[k]) + 1]++;
    for (size_t k = 1; k < MOEC_COUNT(count); k++)
        count[k] += count[k - 1];
    for (size_t k = from; k < to; k++)
        c->spare[count[class_of(c->cp[k])]++] = c->cp[k];
    memcpy(c->cp + from, c->spare, (to - from) * sizeof *c->cp);
    return MOEC_OK;
}

static moec_status order_marks(codes *c, moec_err *err)
{
    moec_status st = MOEC_OK;
    for (size_t i = 0; i < c->n; i++) {
        bool sorted = true;
        size_t from = i;
        for (int before = 0, class; i < c->n && (class = class_of(c->cp[i])) != 0; i++) {
            sorted = sorted && before <= class;
            before = class;
        }
        if (!sorted)
            MOEC_TRY(sort_marks(c, from, i, err));
    }
done:
    return st;
}

/* s begins with the character in front of the stretch, if there is one, for it may compose with what follows. */
static moec_status normalize_stretch(moec__buf *out, codes *c, moec__form form, const char *s, size_t n,
                                     moec_err *err)
{
    moec_status st = MOEC_OK;
    c->n = 0;
    for (size_t i = 0; i < n; i += moec__utf8_len((unsigned char)s[i])) {
        MOEC_TRY(MOEC_GROW(c->cp, c->cap, c->n + 32, err)); /* no character has more than 18 parts */
        utf8proc_ssize_t k = decompose(c->cp + c->n, 32, (utf8proc_int32_t)moec__utf8_get(s + i), form >= MOEC__NFKC);
        if (k < 0 || k > 32)
            return moec_fail(err, MOEC_EFORMAT, "normalizer: utf8proc: %s", utf8proc_errmsg(k));
        c->n += (size_t)k;
    }
    MOEC_TRY(order_marks(c, err));
    if (form == MOEC__NFC || form == MOEC__NFKC) {
        utf8proc_ssize_t k =
            utf8proc_normalize_utf32(c->cp, (utf8proc_ssize_t)c->n, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
        if (k < 0)
            return moec_fail(err, MOEC_EFORMAT, "normalizer: utf8proc: %s", utf8proc_errmsg(k));
        c->n = (size_t)k;
    }
    for (size_t i = 0; i < c->n; i++) {
        char bytes[4];
        MOEC_TRY(moec__buf_add(out, bytes, moec__utf8_put(bytes, (uint32_t)c->cp[i]), err));
    }
done:
    return st;
}

moec_status moec__normal_form(moec__buf *out, moec__form form, const moec__calm *calm, const char *s, size_t n,
                              moec_err *err)
{
    moec_status st = MOEC_OK;
    codes c = {0};
    size_t copied = 0, before = 0, i = 0; /* before: start of the last calm character */
    while (i < n) {
        if ((unsigned char)s[i] < 0x80) {
            before = i++;
            continue;
        }
        if (!needs_work(form, calm, moec__utf8_get(s + i))) {
            before = i;
            i += moec__utf8_len((unsigned char)s[i]);
            continue;
        }
        MOEC_TRY(moec__buf_add(out, s + copied, before - copied, err));
        while (i < n && (unsigned char)s[i] >= 0x80 && needs_work(form, calm, moec__utf8_get(s + i)))
            i += moec__utf8_len((unsigned char)s[i]);
        MOEC_TRY(normalize_stretch(out, &c, form, s + before, i - before, err));
        copied = before = i;
    }
    MOEC_TRY(moec__buf_add(out, s + copied, n - copied, err));
done:
    moec_free(c.spare);
    moec_free(c.cp);
    return st;
}

moec_status moec__lower_case(moec__buf *out, const char *s, size_t n, moec_err *err)
{
    moec_status st = MOEC_OK;
    for (size_t i = 0; i < n; i += moec__utf8_len((unsigned char)s[i])) {
        char bytes[4];
        uint32_t cp = moec__utf8_get(s + i);
        if (cp == 0x130) /* the one letter whose lower case is two code points */
            MOEC_TRY(moec__buf_add(out, "i\xcc\x87", 3, err));
        else
            MOEC_TRY(moec__buf_add(out, bytes,
                                   moec__utf8_put(bytes, (uint32_t)utf8proc_tolower((utf8proc_int32_t)cp)), err));
    }
done:
    return st;
}
