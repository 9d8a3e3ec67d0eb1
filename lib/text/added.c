/* Search for added tokens by narrowing a sorted list byte by byte. */
#include "text/added.h"

#include "base/mem.h"
#include "text/onig.h"

#include <stdlib.h>
#include <string.h>

static int compare(const void *a, const void *b)
{
    const moec__added_token *x = *(const moec__added_token *const *)a, *y = *(const moec__added_token *const *)b;
    size_t n = x->n_find < y->n_find ? x->n_find : y->n_find;
    int c = memcmp(x->find, y->find, n);
    if (c == 0)
        c = (x->n_find > y->n_find) - (x->n_find < y->n_find);
    /* Two may read the same once normalized. Then `tokenizers` takes either, by chance; here it is the one that is
     * spelled so in the file, else the first. */
    if (c == 0)
        c = (int)(strcmp(y->find, y->content) == 0) - (int)(strcmp(x->find, x->content) == 0);
    return c ? c : (x > y) - (x < y);
}

moec_status moec__added_set_make(moec__added_set *out, const moec__added_token *all, size_t n, bool normalized,
                                 moec_err *err)
{
    static const char word[] = "[" MOEC__WORD_CLASS "\\p{Join_Control}]";
    moec_status st = MOEC_OK;
    bool single = false;
    *out = (moec__added_set){0};
    MOEC_TRY(MOEC_NEW(out->token, n, err));
    for (size_t i = 0; i < n; i++) {
        if (all[i].normalized == normalized && all[i].n_find > 0) {
            out->token[out->n++] = &all[i];
            single = single || all[i].single_word;
        }
    }
    if (out->n > 0)
        qsort(out->token, out->n, sizeof *out->token, compare);
    for (size_t i = 0; i < out->n; i++)
        out->first[(unsigned char)out->token[i]->find[0] + 1] = i + 1;
    for (size_t b = 1; b < MOEC_COUNT(out->first); b++)
        if (out->first[b] < out->first[b - 1])
            out->first[b] = out->first[b - 1];
    if (single)
        MOEC_TRY(moec__pattern_regex(&out->word, word, sizeof word - 1, err));
done:
    return st;
}

void moec__added_set_release(moec__added_set *set)
{
    moec__pattern_free(set->word);
    moec_free(set->token);
    *set = (moec__added_set){0};
}

/* First index in [lo, hi) whose byte k is at least b (behind its end counts as lowest). */
static size_t lower_bound(const moec__added_set *set, size_t lo, size_t hi, size_t k, unsigned b)
{
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        const moec__added_token *t = set->token[mid];
        if (t->n_find <= k || (unsigned char)t->find[k] < b)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

/* The longest token that s begins with, or NULL. */
static const moec__added_token *longest(const moec__added_set *set, const char *s, size_t n)
{
    const moec__added_token *best = NULL;
    size_t lo = set->first[(unsigned char)s[0]], hi = set->first[(unsigned char)s[0] + 1];
    for (size_t k = 1; lo < hi; k++) {
        /* Here all of [lo, hi) begin with s[0..k); a token of just that length is the first. */
        if (set->token[lo]->n_find == k && (!best || best->n_find < k))
            best = set->token[lo];
        if (k >= n)
            break;
        lo = lower_bound(set, lo, hi, k, (unsigned char)s[k]);
        hi = lower_bound(set, lo, hi, k, (unsigned char)s[k] + 1u);
    }
    return best;
}

static moec_status is_word(bool *out, const moec__added_set *set, moec__matcher *m, const char *s, size_t at,
                           moec_err *err)
{
    size_t from, to;
    moec__search q = {.p = set->word, .m = m, .s = s + at, .n = moec__utf8_len((unsigned char)s[at])};
    return moec__search_next(out, &from, &to, &q, err);
}

moec_status moec__added_next(moec__found *out, size_t *at, size_t *done, const moec__added_set *set, moec__matcher *m,
                             const char *s, size_t n, moec_err *err)
{
    moec_status st = MOEC_OK;
    size_t i = *at;
    out->token = NULL;
    while (i < n && set->n > 0) {
        unsigned b = (unsigned char)s[i];
        const moec__added_token *t = set->first[b] < set->first[b + 1] ? longest(set, s + i, n - i) : NULL;
        if (!t) {
            i++;
            continue;
        }
        size_t from = i, to = i + t->n_find;
        i = to;
        if (t->single_word) {
            bool before = false, behind = false;
            if (from > 0)
                MOEC_TRY(is_word(&before, set, m, s, moec__utf8_back(s, from), err));
            if (to < n)
                MOEC_TRY(is_word(&behind, set, m, s, to, err));
            if (before || behind)
                continue;
        }
        if (t->lstrip) {
            from = moec__skip_space_back(s, 0, from);
            if (from < *done) /* the token before took this space */
                from = *done;
        }
        if (t->rstrip)
            to = moec__skip_space(s, to, n);
        *out = (moec__found){from, to, t};
        *done = to;
        break;
    }
    *at = i;
done:
    return st;
}
