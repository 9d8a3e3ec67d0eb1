/* Texts to windows of ids: read, tokenize, cut, choose. */
#include "text/corpus.h"

#include "base/file.h"
#include "base/mem.h"
#include "text/corpus_args.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MAX_FILE ((size_t)4 << 30)

typedef struct span {
    int64_t from, n; /* ids of `raw` */
} span;

/* A file's ids with the windows they could be cut into. The first n_kept of `window` are chosen. */
typedef struct draft {
    moec_ids raw;
    span *window;
    size_t n_windows, cap_windows, n_kept;
    int64_t bos;    /* -1: none in this file */
    int64_t tokens; /* in the chosen windows, bos included */
    int64_t share;  /* of max_tokens; INT64_MAX: all */
} draft;

void moec_corpus_release(moec_corpus *c)
{
    for (int i = 0; i < c->n_domains; i++) {
        moec_free(c->domain[i].start);
        moec_free(c->domain[i].ids);
        moec_free(c->domain[i].path);
        moec_free(c->domain[i].name);
    }
    moec_free(c->domain);
    *c = (moec_corpus){0};
}

int64_t moec_corpus_tokens(const moec_corpus *c)
{
    int64_t n = 0;
    for (int i = 0; i < c->n_domains; i++)
        n += c->domain[i].n_ids;
    return n;
}

moec_status moec_corpus_needs_tokenizer(bool *out, const char *const *args, int n_args, moec_err *err)
{
    moec__sources s;
    *out = false;
    moec_status st = moec__sources_list(&s, args, n_args, err);
    for (size_t i = 0; i < s.n; i++)
        *out = *out || !s.at[i].is_ids;
    moec__sources_release(&s);
    return st;
}

/* ---- reading ---- */

/* Cuts raw ids [from, to) into windows of `step`; a rest too short to predict anything is counted in *n_dropped. */
static moec_status cut(draft *d, int64_t *n_dropped, int64_t from, int64_t to, int64_t step, moec_err *err)
{
    moec_status st = MOEC_OK;
    while (from < to) {
        int64_t n = to - from < step ? to - from : step;
        if (n + (d->bos >= 0) < 2) {
            *n_dropped += n;
        } else {
            MOEC_TRY(MOEC_GROW(d->window, d->cap_windows, d->n_windows + 1, err));
            d->window[d->n_windows++] = (span){from, n};
        }
        from += n;
    }
done:
    return st;
}

/* Ids that suffice when only the first windows are wanted, one window more than is kept; 0: all are needed. */
static size_t enough(const moec_corpus_opts *o, int64_t step)
{
    int64_t most = INT64_MAX;
    if (o->seed >= 0)
        return 0;
    if (o->max_windows > 0 && o->max_windows < most / step)
        most = o->max_windows * step;
    if (o->max_tokens > 0 && o->max_tokens < most)
        most = o->max_tokens;
    return most > INT64_MAX - step ? 0 : (size_t)(most + step);
}

static moec_status read_text(draft *d, moec_domain *dom, const moec_tokenizer *tok, const moec_corpus_opts *o,
                             moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_encoder *e = NULL;
    char *text = NULL;
    size_t len = 0;
    uint64_t n_invalid = 0;
    int64_t step = o->seq_len - (d->bos >= 0);
    moec_encode_opts how = {.max_ids = enough(o, step)};
    MOEC_TRY(moec_encoder_new(&e, tok, err));
    MOEC_TRY(moec_file_read(&text, &len, dom->path, MAX_FILE, err));
    MOEC_TRY(moec_within(err, moec_encode(&d->raw, &n_invalid, e, text, len, &how, err), "%s", dom->path));
    dom->n_invalid = (int64_t)n_invalid;
    for (size_t i = 0; i < d->raw.n; i++) {
        if (d->raw.id[i] >= o->vocab) {
            st = moec_fail(err, MOEC_EFORMAT,
                           "%s: the tokenizer gives id %d, but the model has %lld ids: tokenizer and model disagree",
                           dom->path, d->raw.id[i], (long long)o->vocab);
            goto done;
        }
    }
    int64_t n = (int64_t)d->raw.n;
    if (how.max_ids > 0 && d->raw.n >= how.max_ids)
        n -= n % step; /* the text goes on, this rest is not its end */
    MOEC_TRY(cut(d, &dom->n_dropped, 0, n, step, err));
done:
    moec_free(text);
    moec_encoder_free(e);
    return st;
}

/* One blank-separated word of an .ids file, s[0..n). */
static moec_status add_id(moec_ids *out, const char *s, size_t n, int64_t vocab, moec_err *err)
{
    int64_t id = 0;
    for (size_t i = 0; i < n; i++) {
        if (s[i] < '0' || s[i] > '9' || id >= vocab) {
            id = vocab;
            break;
        }
        id = id * 10 + (s[i] - '0');
    }
    if (id >= vocab)
        return moec_fail(err, MOEC_EFORMAT, "\"%.*s\" is not a token id from 0 to %lld", n > 40 ? 40 : (int)n, s,
                         (long long)vocab - 1);
    moec_status st = MOEC_GROW(out->id, out->cap, out->n + 1, err);
    if (st == MOEC_OK)
        out->id[out->n++] = (int32_t)id;
    return st;
}

static moec_status read_line(moec_ids *out, const char *s, size_t n, int64_t vocab, moec_err *err)
{
    static const char blanks[] = " \t\r";
    for (size_t i = 0; i < n;) {
        size_t from = i;
        while (i < n && !memchr(blanks, (unsigned char)s[i], 3))
            i++;
        if (i > from) {
            moec_status st = add_id(out, s + from, i - from, vocab, err);
            if (st != MOEC_OK)
                return st;
        } else {
            i++;
        }
    }
    return MOEC_OK;
}

static moec_status read_ids(draft *d, moec_domain *dom, const moec_corpus_opts *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *text = NULL;
    size_t len = 0;
    long long line = 0;
    MOEC_TRY(moec_file_read(&text, &len, dom->path, MAX_FILE, err));
    for (size_t at = 0, end; at < len; at = end + 1) {
        const char *newline = memchr(text + at, '\n', len - at);
        end = newline ? (size_t)(newline - text) : len;
        line++;
        int64_t from = (int64_t)d->raw.n;
        MOEC_TRY(moec_within(err, read_line(&d->raw, text + at, end - at, o->vocab, err), "%s: line %lld", dom->path,
                             line));
        MOEC_TRY(cut(d, &dom->n_dropped, from, (int64_t)d->raw.n, o->seq_len, err));
    }
done:
    moec_free(text);
    return st;
}

/* ---- choosing ---- */

static uint64_t next_random(uint64_t *state) /* splitmix64: Steele, Lea, Flood 2014 */
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* Puts the windows in the order in which limits keep them. */
static void shuffle(draft *d, const char *name, int64_t seed)
{
    uint64_t state = 0xcbf29ce484222325u;
    for (const char *c = name; *c; c++) /* FNV-1a: another domain beside this one changes nothing here */
        state = (state ^ (unsigned char)*c) * 0x100000001b3u;
    state ^= (uint64_t)seed * 0x9e3779b97f4a7c15u;
    for (size_t i = d->n_windows; i > 1; i--) {
        uint64_t r, limit = UINT64_MAX - UINT64_MAX % i;
        do
            r = next_random(&state);
        while (r >= limit);
        span other = d->window[r % i];
        d->window[r % i] = d->window[i - 1];
        d->window[i - 1] = other;
    }
}

static int by_place(const void *a, const void *b)
{
    const span *x = a, *y = b;
    return (x->from > y->from) - (x->from < y->from);
}

static void keep_windows(draft *d, const char *name, const moec_corpus_opts *o)
{
    d->n_kept = d->n_windows;
    if (o->seed >= 0 && (o->max_tokens > 0 || (o->max_windows > 0 && (uint64_t)o->max_windows < d->n_windows)))
        shuffle(d, name, o->seed);
    if (o->max_windows > 0 && (uint64_t)o->max_windows < d->n_windows)
        d->n_kept = (size_t)o->max_windows;
    for (size_t i = 0; i < d->n_kept; i++)
        d->tokens += d->window[i].n + (d->bos >= 0);
}

/* Keeps windows up to d->share ids. */
static void keep_tokens(draft *d)
{
    int64_t left = d->share, extra = d->bos >= 0;
    size_t i = 0;
    for (; i < d->n_kept && left >= 2; i++) {
        if (d->window[i].n + extra > left)
            d->window[i].n = left - extra;
        left -= d->window[i].n + extra;
    }
    d->n_kept = i;
    qsort(d->window, d->n_kept, sizeof *d->window, by_place);
}

/* Divides max_tokens in proportion to the weights. Who has less than its part gets all it has, and what it leaves is
 * divided again; the ids that rounding leaves over go to the largest fractions, the first on ties. */
static moec_status divide(draft *d, const moec_corpus *c, int64_t max_tokens, moec_err *err)
{
    moec_status st = MOEC_OK;
    int n = c->n_domains;
    double *fraction = NULL;
    int64_t left = max_tokens;
    bool again = true;
    MOEC_TRY(MOEC_NEW(fraction, (size_t)n, err));
    for (int i = 0; i < n; i++)
        d[i].share = -1;
    while (again) {
        double weights = 0;
        again = false;
        for (int i = 0; i < n; i++)
            weights += d[i].share < 0 ? c->domain[i].weight : 0;
        if (!(weights > 0))
            break;
        double whole = (double)left;
        for (int i = 0; i < n; i++) {
            fraction[i] = whole * (c->domain[i].weight / weights);
            if (d[i].share < 0 && (double)d[i].tokens <= fraction[i]) {
                d[i].share = d[i].tokens;
                left -= d[i].tokens;
                again = true;
            }
        }
    }
    for (int i = 0; i < n; i++) {
        fraction[i] = d[i].share < 0 ? fraction[i] : -1;
        if (d[i].share >= 0)
            continue;
        d[i].share = (int64_t)floor(fraction[i]);
        fraction[i] -= floor(fraction[i]);
        left -= d[i].share;
    }
    while (left > 0) {
        int best = 0;
        for (int i = 1; i < n; i++)
            if (fraction[i] > fraction[best])
                best = i;
        if (fraction[best] < 0)
            break;
        fraction[best] = -1;
        d[best].share++;
        left--;
    }
    for (int i = 0; i < n; i++)
        if (d[i].share < 2) {
            st = moec_fail(err, MOEC_EINVAL,
                           "%lld tokens are too few: domain \"%s\" would get %lld, at least 2 are needed",
                           (long long)max_tokens, c->domain[i].name, (long long)d[i].share);
            goto done;
        }
done:
    moec_free(fraction);
    return st;
}

static moec_status fill(moec_domain *dom, const draft *d, moec_err *err)
{
    moec_status st = MOEC_OK;
    int64_t extra = d->bos >= 0;
    for (size_t i = 0; i < d->n_kept; i++)
        dom->n_ids += d->window[i].n + extra;
    dom->n_windows = (int64_t)d->n_kept;
    MOEC_TRY(MOEC_NEW(dom->ids, (size_t)dom->n_ids, err));
    MOEC_TRY(MOEC_NEW(dom->start, d->n_kept + 1, err));
    for (size_t i = 0; i < d->n_kept; i++) {
        int32_t *to = dom->ids + dom->start[i];
        if (extra)
            *to++ = (int32_t)d->bos;
        memcpy(to, d->raw.id + d->window[i].from, (size_t)d->window[i].n * sizeof *to);
        dom->start[i + 1] = dom->start[i] + d->window[i].n + extra;
    }
done:
    return st;
}

/* ---- the whole ---- */

static moec_status check_opts(const moec_corpus_opts *o, moec_err *err)
{
    if (o->vocab <= 0 || o->vocab > INT32_MAX)
        return moec_fail(err, MOEC_EINVAL, "a model with %lld ids", (long long)o->vocab);
    if (o->seq_len < 2 || o->seq_len > INT32_MAX)
        return moec_fail(err, MOEC_EINVAL, "windows of %lld tokens: 2 to %d were expected", (long long)o->seq_len,
                         INT32_MAX);
    if (o->max_windows < 0 || o->max_tokens < 0)
        return moec_fail(err, MOEC_EINVAL, "a negative limit on windows or tokens");
    return MOEC_OK;
}

static moec_status read_file(draft *d, moec_domain *dom, bool is_ids, const moec_tokenizer *tok,
                             const moec_corpus_opts *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    d->bos = -1;
    d->share = INT64_MAX;
    if (!is_ids && !tok)
        return moec_fail(err, MOEC_EINVAL, "%s: text needs a tokenizer; only .ids files do without", dom->path);
    if (!is_ids && o->add_bos) {
        d->bos = o->bos >= 0 ? o->bos : moec_tokenizer_bos(tok);
        if (d->bos < 0)
            return moec_fail(err, MOEC_EINVAL, "the tokenizer names no token for the beginning of a text");
        if (d->bos >= o->vocab)
            return moec_fail(err, MOEC_EFORMAT, "beginning of text is id %lld, but the model has %lld ids",
                             (long long)d->bos, (long long)o->vocab);
    }
    if (is_ids)
        MOEC_TRY(read_ids(d, dom, o, err));
    else
        MOEC_TRY(read_text(d, dom, tok, o, err));
    if (d->n_windows == 0)
        st = moec_fail(err, MOEC_EFORMAT, "%s: %zu tokens, at least 2 in one window were expected", dom->path,
                       d->raw.n);
    else
        keep_windows(d, dom->name, o);
done:
    return st;
}

static moec_status take_sources(moec_corpus *out, moec__sources *s, moec_err *err)
{
    moec_status st = MOEC_NEW(out->domain, s->n, err);
    if (st != MOEC_OK)
        return st;
    out->n_domains = (int)s->n;
    for (size_t i = 0; i < s->n; i++) {
        out->domain[i].name = s->at[i].name;
        out->domain[i].path = s->at[i].path;
        out->domain[i].weight = s->at[i].weight;
        s->at[i].name = s->at[i].path = NULL;
    }
    return MOEC_OK;
}

moec_status moec_corpus_read(moec_corpus *out, const char *const *args, int n_args, const moec_tokenizer *tok,
                             const moec_corpus_opts *opts, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec__sources s = {0};
    draft *d = NULL;
    *out = (moec_corpus){0};
    MOEC_TRY(check_opts(opts, err));
    MOEC_TRY(moec__sources_list(&s, args, n_args, err));
    MOEC_TRY(take_sources(out, &s, err));
    MOEC_TRY(MOEC_NEW(d, s.n, err));
    for (size_t i = 0; i < s.n; i++)
        MOEC_TRY(read_file(&d[i], &out->domain[i], s.at[i].is_ids, tok, opts, err));
    if (opts->max_tokens > 0)
        MOEC_TRY(divide(d, out, opts->max_tokens, err));
    for (size_t i = 0; i < s.n; i++) {
        keep_tokens(&d[i]);
        MOEC_TRY(fill(&out->domain[i], &d[i], err));
    }
done:
    for (size_t i = 0; i < s.n && d; i++) {
        moec_free(d[i].window);
        moec_ids_release(&d[i].raw);
    }
    moec_free(d);
    moec__sources_release(&s);
    if (st != MOEC_OK)
        moec_corpus_release(out);
    return st;
}

/* Little endian, so that machines agree. */
static void hash_numbers(moec_hash *h, const int32_t *narrow, const int64_t *wide, size_t n)
{
    unsigned char bytes[4096];
    size_t size = wide ? 8 : 4, used = 0;
    for (size_t i = 0; i < n; i++) {
        uint64_t v = wide ? (uint64_t)wide[i] : (uint32_t)narrow[i];
        for (size_t k = 0; k < size; k++)
            bytes[used++] = (unsigned char)(v >> (8 * k) & 0xff);
        if (used == sizeof bytes || i + 1 == n) {
            moec_hash_add(h, bytes, used);
            used = 0;
        }
    }
}

moec_status moec_corpus_digest(moec_digest *out, const moec_corpus *c, moec_err *err)
{
    moec_hash *h;
    moec_status st = moec_hash_new(&h, err);
    if (st != MOEC_OK)
        return st;
    for (int i = 0; i < c->n_domains; i++) {
        const moec_domain *d = &c->domain[i];
        moec_hash_text(h, d->name);
        hash_numbers(h, NULL, &d->n_windows, 1);
        hash_numbers(h, NULL, d->start, (size_t)d->n_windows + 1);
        hash_numbers(h, d->ids, NULL, (size_t)d->n_ids);
    }
    *out = moec_hash_digest(h);
    moec_hash_free(h);
    return MOEC_OK;
}
