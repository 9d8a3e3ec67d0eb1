/* Ids to text by the decoder nodes. */
#include "text/stage.h"

#include "base/mem.h"

#include <string.h>

moec_status moec__tokens_add(moec__tokens *t, const char *s, size_t n, moec_err *err)
{
    moec_status st = MOEC_OK;
    MOEC_TRY(MOEC_GROW(t->end, t->cap, t->n + 1, err));
    MOEC_TRY(moec__buf_add(&t->buf, s, n, err));
    t->end[t->n++] = t->buf.n;
done:
    return st;
}

void moec__tokens_release(moec__tokens *t)
{
    moec_free(t->end);
    moec_free(t->buf.p);
    *t = (moec__tokens){0};
}

static const char *token_at(size_t *n, const moec__tokens *t, size_t i)
{
    size_t from = i ? t->end[i - 1] : 0;
    *n = t->end[i] - from;
    return *n ? t->buf.p + from : "";
}

/* Ends a token whose bytes were appended to out->buf. */
static moec_status close_token(moec__tokens *out, moec_err *err)
{
    return moec__tokens_add(out, "", 0, err);
}

/* Bytes a byte-level token spells; a token with another character in it is taken literally. */
static moec_status add_spelled(moec__buf *out, const char *s, size_t n, moec_err *err)
{
    size_t before = out->n;
    for (size_t i = 0; i < n; i += moec__utf8_len((unsigned char)s[i])) {
        int b = moec__char_byte(moec__utf8_get(s + i));
        if (b < 0) {
            out->n = before;
            return moec__buf_add(out, s, n, err);
        }
        char byte = (char)b;
        moec_status st = moec__buf_add(out, &byte, 1, err);
        if (st != MOEC_OK)
            return st;
    }
    return MOEC_OK;
}

moec_status moec__join_bytes(moec__tokens *out, const moec__tokens *in, const moec__stage *stage, moec__matcher *m,
                             moec_err *err)
{
    moec_status st = MOEC_OK;
    moec__buf bytes = {0};
    uint64_t n_bad = 0;
    (void)stage;
    (void)m;
    for (size_t i = 0, n; i < in->n; i++) {
        const char *s = token_at(&n, in, i);
        MOEC_TRY(add_spelled(&bytes, s, n, err));
    }
    MOEC_TRY(moec__utf8_repair(&out->buf, &n_bad, bytes.p, bytes.n, err));
    MOEC_TRY(close_token(out, err));
done:
    moec_free(bytes.p);
    return st;
}

moec_status moec__join_metaspace(moec__tokens *out, const moec__tokens *in, const moec__stage *stage,
                                 moec__matcher *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    (void)m;
    for (size_t i = 0, n; i < in->n; i++) {
        const char *s = token_at(&n, in, i);
        for (size_t k = 0, len; k < n; k += len) {
            len = moec__utf8_len((unsigned char)s[k]);
            if (len != stage->n_text || memcmp(s + k, stage->text, len) != 0)
                MOEC_TRY(moec__buf_add(&out->buf, s + k, len, err));
            else if (i > 0 ||
                     stage->scheme == MOEC__NEVER) /* the first token's were put there by the pre-tokenizer */
                MOEC_TRY(moec__buf_add(&out->buf, " ", 1, err));
        }
        MOEC_TRY(close_token(out, err));
    }
done:
    return st;
}

moec_status moec__join_replace(moec__tokens *out, const moec__tokens *in, const moec__stage *stage, moec__matcher *m,
                               moec_err *err)
{
    moec_status st = MOEC_OK;
    for (size_t i = 0; i < in->n; i++) {
        moec__piece piece = {0};
        piece.s = token_at(&piece.n, in, i);
        MOEC_TRY(moec__run_replace(&out->buf, &piece, stage, m, err));
        MOEC_TRY(close_token(out, err));
    }
done:
    return st;
}

/* Value of "<0xNN>", or -1. */
static int byte_token(const char *s, size_t n)
{
    int value = 0;
    if (n != 6 || memcmp(s, "<0x", 3) != 0 || s[5] != '>')
        return -1;
    for (int i = 3; i < 5; i++) {
        const char *digits = "0123456789ABCDEFabcdef", *at = strchr(digits, s[i]);
        if (!at || !*at)
            return -1;
        value = value * 16 + (int)(at - digits) - (at - digits > 15 ? 6 : 0);
    }
    return value;
}

/* The bytes of neighbouring byte tokens: their text, or, when they are none, as many U+FFFD as there are bytes. */
static moec_status flush_bytes(moec__tokens *out, moec__buf *bytes, moec_err *err)
{
    moec_status st = MOEC_OK;
    if (bytes->n == 0)
        return MOEC_OK;
    bool good = moec__utf8_check(bytes->p, bytes->n) == bytes->n;
    for (size_t i = 0; i < bytes->n && !good; i++)
        MOEC_TRY(moec__tokens_add(out, "\xef\xbf\xbd", 3, err));
    if (good)
        MOEC_TRY(moec__tokens_add(out, bytes->p, bytes->n, err));
    bytes->n = 0;
done:
    return st;
}

moec_status moec__join_fallback(moec__tokens *out, const moec__tokens *in, const moec__stage *stage, moec__matcher *m,
                                moec_err *err)
{
    moec_status st = MOEC_OK;
    moec__buf bytes = {0};
    (void)stage;
    (void)m;
    for (size_t i = 0, n; i < in->n; i++) {
        const char *s = token_at(&n, in, i);
        int b = byte_token(s, n);
        if (b >= 0) {
            char byte = (char)b;
            MOEC_TRY(moec__buf_add(&bytes, &byte, 1, err));
            continue;
        }
        MOEC_TRY(flush_bytes(out, &bytes, err));
        MOEC_TRY(moec__tokens_add(out, s, n, err));
    }
    MOEC_TRY(flush_bytes(out, &bytes, err));
done:
    moec_free(bytes.p);
    return st;
}

moec_status moec__join_fuse(moec__tokens *out, const moec__tokens *in, const moec__stage *stage, moec__matcher *m,
                            moec_err *err)
{
    (void)stage;
    (void)m;
    return moec__tokens_add(out, in->buf.p, in->buf.n, err);
}

moec_status moec__join_strip(moec__tokens *out, const moec__tokens *in, const moec__stage *stage, moec__matcher *m,
                             moec_err *err)
{
    moec_status st = MOEC_OK;
    size_t step = stage->n_text;
    (void)m;
    for (size_t i = 0, n; i < in->n; i++) {
        const char *s = token_at(&n, in, i);
        size_t lo = 0;
        for (int64_t k = 0; k < stage->start && step > 0 && n - lo >= step && memcmp(s + lo, stage->text, step) == 0;
             k++)
            lo += step;
        for (int64_t k = 0;
             k < stage->stop && step > 0 && n - lo >= step && memcmp(s + n - step, stage->text, step) == 0; k++)
            n -= step;
        MOEC_TRY(moec__tokens_add(out, s + lo, n - lo, err));
    }
done:
    return st;
}

/* Spellings of the ids. */
static moec_status list_tokens(moec__tokens *out, const moec_tokenizer *t, const int32_t *ids, size_t n,
                               bool skip_special, moec_err *err)
{
    moec_status st = MOEC_OK;
    for (size_t i = 0; i < n; i++) {
        const uint64_t *at = ids[i] < 0 ? NULL : moec__pairs_get(&t->added_id, (uint32_t)ids[i]);
        const moec__added_token *added = at ? &t->added[*at] : NULL;
        if (added && added->special && skip_special)
            continue;
        if (added) {
            MOEC_TRY(
                moec__tokens_add(out, added->find, added->n_find, err)); /* its normal form, as `tokenizers` has it */
            continue;
        }
        at = ids[i] < 0 ? NULL : moec__pairs_get(&t->bpe.by_id, (uint32_t)ids[i]);
        if (!at)
            return moec_fail(err, MOEC_EINVAL, "id %d is of no token", ids[i]);
        const struct moec__word *w = &t->bpe.vocab.word[*at];
        MOEC_TRY(moec__tokens_add(out, t->bpe.vocab.bytes + w->at, w->len, err));
    }
done:
    return st;
}

moec_status moec_decode(char **out, size_t *len, const moec_tokenizer *t, const int32_t *ids, size_t n,
                        bool skip_special, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec__matcher *m = NULL;
    moec__tokens now = {0}, then = {0};
    moec__buf text = {0};
    *out = NULL;
    *len = 0;
    MOEC_TRY(moec__matcher_new(&m, err));
    MOEC_TRY(list_tokens(&now, t, ids, n, skip_special, err));
    for (size_t i = 0; i < t->decode.n; i++) {
        moec__tokens_release(&then);
        MOEC_TRY(moec_within(err, t->decode.at[i].join(&then, &now, &t->decode.at[i], m, err), "decoder"));
        moec__tokens both = now;
        now = then;
        then = both;
    }
    for (size_t i = 0, size; i < now.n; i++) {
        const char *s = token_at(&size, &now, i);
        if (i > 0 && !t->has_decoder)
            MOEC_TRY(moec__buf_add(&text, " ", 1, err));
        MOEC_TRY(moec__buf_add(&text, s, size, err));
    }
    MOEC_TRY(moec_copy(out, text.p, text.n, err));
    *len = text.n;
done:
    moec_free(text.p);
    moec__tokens_release(&then);
    moec__tokens_release(&now);
    moec__matcher_free(m);
    return st;
}
