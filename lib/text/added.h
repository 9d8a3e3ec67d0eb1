/* Added tokens: found in the text before the model sees it, leftmost first, the longest where several begin. */
#ifndef MOEC_TEXT_ADDED_H
#define MOEC_TEXT_ADDED_H

#include "text/pattern.h"
#include "text/utf8.h"

typedef struct moec__added_token {
    char *content; /* as in the file, NUL behind */
    char *find;    /* what is looked for: content, or its normal form */
    size_t n_content, n_find;
    int32_t id;
    bool single_word, lstrip, rstrip, normalized, special;
} moec__added_token;

/* The tokens that are looked for at the same time, sorted by `find`. */
typedef struct moec__added_set {
    const moec__added_token **token;
    size_t n;
    size_t first[257];   /* tokens whose first byte is b are token[first[b]] .. token[first[b+1] - 1] */
    moec__pattern *word; /* one word character; NULL when no token asks for single words */
} moec__added_set;

/** Collects those of all[n] whose `normalized` is as given. MOEC_ENOMEM. Release with moec__added_set_release. */
moec_status moec__added_set_make(moec__added_set *out, const moec__added_token *all, size_t n, bool normalized,
                                 moec_err *err) MOEC_USE_RESULT;
void moec__added_set_release(moec__added_set *set);

typedef struct moec__found {
    size_t from, to; /* with the white space that lstrip and rstrip take */
    const moec__added_token *token;
} moec__found;
/** The next token in s[0..n): *at is where to look from and *done up to where text is taken; both are 0 at first and
 * moved on. out->token is NULL when there is none. */
moec_status moec__added_next(moec__found *out, size_t *at, size_t *done, const moec__added_set *set, moec__matcher *m,
                             const char *s, size_t n, moec_err *err) MOEC_USE_RESULT;

#endif
