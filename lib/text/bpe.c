/* Building of the byte pair encoding model. The merging itself is in merge.c. */
#include "text/bpe.h"

moec_status moec__bpe_add_merge(moec__bpe *b, const char *left, size_t n_left, const char *right, size_t n_right,
                                uint32_t rank, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec__buf both = {0};
    int32_t l = moec__words_find(&b->vocab, left, n_left), r = moec__words_find(&b->vocab, right, n_right);
    MOEC_TRY(moec__buf_add(&both, left, n_left, err));
    MOEC_TRY(moec__buf_add(&both, right, n_right, err));
    int32_t joined = moec__words_find(&b->vocab, both.p, both.n);
    if (l < 0 || r < 0 || joined < 0) {
        const char *absent = l < 0 ? left : r < 0 ? right : both.p;
        size_t n = l < 0 ? n_left : r < 0 ? n_right : both.n;
        st = moec_fail(err, MOEC_EFORMAT,
                       "model: merge %u (\"%.*s\" + \"%.*s\"): token \"%.*s\" is not in the vocabulary", rank,
                       n_left > 60 ? 60 : (int)n_left, left, n_right > 60 ? 60 : (int)n_right, right,
                       n > 60 ? 60 : (int)n, absent);
        goto done;
    }
    MOEC_TRY(
        moec__pairs_set(&b->merges, (uint64_t)l << 32 | (uint32_t)r, (uint64_t)rank << 32 | (uint32_t)joined, err));
done:
    moec_free(both.p);
    return st;
}

static const char *word_of(size_t *len, const moec__bpe *b, uint32_t id)
{
    const struct moec__word *w = &b->vocab.word[*moec__pairs_get(&b->by_id, id)];
    *len = w->len;
    return b->vocab.bytes + w->at;
}

/* True when pieces begin with this id although it spells more than one character: bytes of a fallback, unk. */
static bool is_special_start(const moec__bpe *b, uint32_t id)
{
    size_t n;
    const char *s = word_of(&n, b, id);
    if (n > 0 && moec__utf8_len((unsigned char)s[0]) == n)
        return false;
    if (b->has_unk && b->unk_id == (int32_t)id)
        return true;
    for (int i = 0; i < 256 && n == 6 && s[0] == '<'; i++) /* "<0xNN>" */
        if (b->byte_id[i] == (int32_t)id)
            return true;
    return false;
}

/* A stretch of text may be merged in parts wherever no rule can ever join the two characters at the border: what a
 * rule joins ends, on its left, in the last character of its left token, and begins, on its right, with the first of
 * its right token. That holds as long as every token that takes part is spelled by the characters it came from, which
 * is not so for byte tokens and unk; when a rule touches those, nothing is cut. */
static moec_status find_joinable(moec__bpe *b, moec_err *err)
{
    moec_status st = MOEC_OK;
    b->can_cut = false;
    for (size_t i = 0; b->merges.slot && i <= b->merges.mask; i++) {
        uint64_t key = b->merges.slot[i].key;
        if (key == MOEC__NO_KEY)
            continue;
        if (is_special_start(b, (uint32_t)(key >> 32)) || is_special_start(b, (uint32_t)key))
            return MOEC_OK;
        size_t n_left, n_right;
        const char *left = word_of(&n_left, b, (uint32_t)(key >> 32)), *right = word_of(&n_right, b, (uint32_t)key);
        if (n_left == 0 || n_right == 0)
            return MOEC_OK;
        size_t last = moec__utf8_back(left, n_left);
        int32_t l = moec__words_find(&b->vocab, left + last, n_left - last);
        int32_t r = moec__words_find(&b->vocab, right, moec__utf8_len((unsigned char)right[0]));
        if (l >= 0 && r >= 0) /* otherwise no text leads to this rule */
            MOEC_TRY(moec__pairs_set(&b->joinable, (uint64_t)l << 32 | (uint32_t)r, 1, err));
    }
    b->can_cut = true;
done:
    return st;
}

moec_status moec__bpe_finish(moec__bpe *b, moec_err *err)
{
    char c[4];
    for (uint32_t cp = 0; cp < MOEC__DIRECT; cp++)
        b->direct[cp] = moec__words_find(&b->vocab, c, moec__utf8_put(c, cp));
    return find_joinable(b, err);
}

void moec__bpe_release(moec__bpe *b)
{
    moec_free(b->joinable.slot);
    moec_free(b->by_id.slot);
    moec_free(b->merges.slot);
    moec__words_release(&b->vocab);
}
