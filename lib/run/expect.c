/* See expect.h. */
#include "run/expect.h"

#include "base/file.h"
#include "base/mem.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BUFFER = 256 << 10 }; /* stays in the second-level cache */

/* A tensor that the output must have. */
typedef struct wanted {
    char *name;
    const moec_tensor *source;
    moec_cast *cast;              /* the source's form before the keep lists */
    int fd;                       /* the source's shard, where the data is at `from` */
    uint64_t from;
    int64_t dim[MOEC_MAX_RANK];
    const moec_forms *forms;
    size_t i;                     /* its index in the source */
    moec_fate fate;               /* which of its bytes; dead ones, and all of a dead tensor, */
    bool dead;
    unsigned char value[8];       /* are this over and over */
    bool rewritten;
    const moec_tensor *anew;      /* rewritten: these bytes; NULL: not known */
    bool found;
} wanted;

typedef struct item {
    uint64_t lo, hi; /* in the file */
    const wanted *w;
} item;

typedef struct shard {
    const unsigned char *front;
    uint64_t data_at;
    item *item; /* by offset */
    size_t n;
} shard;

struct moec_expect {
    wanted *want; /* sorted by name */
    size_t n, want_cap;
    moec_forms forms;
    shard *shard;
    size_t n_shards, cap;
};

static int by_name(const void *a, const void *b)
{
    return strcmp(((const wanted *)a)->name, ((const wanted *)b)->name);
}

static moec_status want(moec_expect *x, const moec_plan *p, const moec_model *m, const moec_override *weights, size_t i,
                        moec_fate f, int64_t number, bool dead, moec_err *err)
{
    const moec_ckpt *c = m->ckpt;
    moec_status st = MOEC_GROW(x->want, x->want_cap, x->n + 1, err);
    if (st != MOEC_OK)
        return st;
    wanted *w = &x->want[x->n];
    *w = (wanted){.source = moec_ckpt_at(c, i), .cast = &x->forms.cast[i], .forms = &x->forms, .i = i, .fate = f,
                  .dead = dead, .from = moec_ckpt_offset(c, i), .fd = moec_ckpt_shard_fd(c, moec_ckpt_shard_of(c, i))};
    moec_fate_shape(w->dim, p, m, &x->forms, i, f);
    (void)moec_dead_bytes(w->value, w->cast->dtype, x->forms.dead[i]);
    st = moec_fate_name(&w->name, m, &x->forms, i, number, err);
    x->n += st == MOEC_OK;
    w->rewritten = f.rewritten && !dead;
    if (st == MOEC_OK && w->rewritten && weights && (w->anew = moec_override_find(weights, w->name)) == NULL)
        st = moec_fail(err, MOEC_EFORMAT, "tensor %s is not among the weights that were computed anew", w->name);
    return st;
}

static moec_status want_extra(moec_expect *x, const moec_ckpt *c, const moec_override *weights, moec_extra *e, moec_err *err)
{
    moec_status st = MOEC_GROW(x->want, x->want_cap, x->n + 1, err);
    if (st != MOEC_OK)
        return st;
    wanted *w = &x->want[x->n];
    *w = (wanted){.source = moec_ckpt_at(c, e->anchor), .cast = &e->form, .forms = &x->forms, .i = e->anchor, .rewritten = true};
    memcpy(w->dim, e->form.dim, sizeof w->dim);
    st = moec_copy(&w->name, e->name, strlen(e->name), err);
    x->n += st == MOEC_OK;
    if (st == MOEC_OK && weights && (w->anew = moec_override_find(weights, e->key)) == NULL)
        st = moec_fail(err, MOEC_EFORMAT, "tensor %s is not among the weights that were computed anew", w->name);
    return st;
}

moec_status moec_expect_new(moec_expect **out, const moec_model *source, const moec_plan *p, const moec_override *weights,
                            moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_expect *x = NULL;
    *out = NULL;
    MOEC_TRY(MOEC_NEW(x, 1, err));
    MOEC_TRY(moec_forms_new(&x->forms, source, p, err));
    for (size_t i = 0; i < moec_ckpt_count(source->ckpt); i++) {
        const moec_fate f = moec_plan_fate(p, source, &x->forms, i);
        if (f.dropped)
            continue;
        MOEC_TRY(want(x, p, source, weights, i, f, f.number, false, err));
        for (int64_t k = 0; k < f.dead && f.number >= 0; k++)
            MOEC_TRY(want(x, p, source, weights, i, f, f.first_dead + k, true, err));
    }
    for (size_t k = 0; k < x->forms.n_extra; k++)
        MOEC_TRY(want_extra(x, source->ckpt, weights, &x->forms.extra[k], err));
    if (x->n > 0)
        qsort(x->want, x->n, sizeof *x->want, by_name);
    *out = x;
    x = NULL;
done:
    moec_expect_free(x);
    return st;
}

void moec_expect_free(moec_expect *x)
{
    if (!x)
        return;
    for (size_t i = 0; i < x->n; i++)
        moec_free(x->want[i].name);
    for (size_t s = 0; s < x->n_shards; s++)
        moec_free(x->shard[s].item);
    moec_forms_release(&x->forms);
    moec_free(x->want);
    moec_free(x->shard);
    moec_free(x);
}

static moec_status match(const wanted **out, moec_expect *x, const moec_st_entry *e, const char *file, moec_err *err)
{
    char have[160], need[160];
    const wanted key = {.name = e->name};
    wanted *w = x->n > 0 ? bsearch(&key, x->want, x->n, sizeof key, by_name) : NULL;
    if (!w)
        return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s should not be there", file, e->name);
    if (w->found)
        return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is in two shards", file, e->name);
    w->found = true;
    const moec_cast *c = w->cast;
    if (e->dtype != c->dtype || e->rank != c->rank || memcmp(e->dim, w->dim, (size_t)c->rank * sizeof *e->dim) != 0)
        return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is %s %s, expected %s %s", file, e->name,
                         moec_dtypes[e->dtype].name, moec_shape_text(have, sizeof have, e->rank, e->dim),
                         moec_dtypes[c->dtype].name, moec_shape_text(need, sizeof need, c->rank, w->dim));
    *out = w;
    return MOEC_OK;
}

moec_status moec_expect_shard(moec_expect *x, const void *front, size_t size, uint64_t file_size, const char *name,
                              moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_st_index ix = {0};
    MOEC_TRY(MOEC_GROW(x->shard, x->cap, x->n_shards + 1, err));
    shard *s = &x->shard[x->n_shards];
    *s = (shard){.front = front};
    MOEC_TRY(moec_st_parse(&ix, front, size, file_size, name, err));
    s->data_at = ix.data_at;
    MOEC_TRY(MOEC_NEW(s->item, ix.n, err));
    x->n_shards++; /* from here on moec_expect_free releases it */
    for (size_t i = 0; i < ix.n; i++) {
        item *it = &s->item[i];
        *it = (item){.lo = ix.data_at + ix.entry[i].begin, .hi = ix.data_at + ix.entry[i].end};
        MOEC_TRY(match(&it->w, x, &ix.entry[i], name, err));
        s->n++;
    }
done:
    moec_st_index_release(&ix);
    return st;
}

moec_status moec_expect_all(const moec_expect *x, moec_err *err)
{
    for (size_t i = 0; i < x->n; i++)
        if (!x->want[i].found)
            return moec_fail(err, MOEC_ESHAPE, "tensor %s is missing", x->want[i].name);
    return MOEC_OK;
}

uint64_t moec_expect_unknown(const moec_expect *x)
{
    uint64_t n = 0;
    for (size_t i = 0; i < x->n; i++)
        n += x->want[i].rewritten && !x->want[i].anew;
    return n;
}

static moec_status differ(const item *it, const unsigned char *have, const unsigned char *want, uint64_t n, uint64_t at,
                          moec_err *err)
{
    uint64_t i = 0;
    while (i + 1 < n && have[i] == want[i])
        i++;
    return moec_fail(err, MOEC_EIO, "tensor %s: byte %llu of its data is %02x, the source (%s) has %02x", it->w->name,
                     (unsigned long long)(at + i), have[i], it->w->source->name, want[i]);
}

/* Up to n of the bytes from `from` on that the tensor has before the keep lists. The source is read, not mapped: a touched
 * page of a map can bring megabytes of its neighbours into resident memory. */
static moec_status fetch(unsigned char **bytes, uint64_t *got, const item *it, uint64_t from, uint64_t n, unsigned char *buf,
                         moec_err *err)
{
    const wanted *w = it->w;
    *bytes = buf;
    if (w->cast->made) { /* whole values */
        const uint64_t value = (uint64_t)moec_dtypes[w->cast->dtype].bytes, back = from % value;
        uint64_t whole = (n + back + value - 1) / value * value;
        if (whole > BUFFER)
            whole = BUFFER;
        *bytes = buf + back;
        *got = whole - back < n ? whole - back : n;
        return moec_cast_make(buf, w->cast, from - back, (size_t)whole, err);
    }
    ssize_t have;
    do
        have = pread(w->fd, buf, n < BUFFER ? (size_t)n : BUFFER, (off_t)(w->from + from));
    while (have < 0 && errno == EINTR);
    if (have < 0)
        return moec_fail_errno(err, errno, w->source->name);
    if (have == 0)
        return moec_fail(err, MOEC_EIO, "tensor %s: the source ends early; it was changed", w->source->name);
    *got = (uint64_t)have;
    return MOEC_OK;
}

static moec_status compare_run(const item *it, const unsigned char *have, uint64_t at, uint64_t from, uint64_t n,
                               unsigned char *buf, moec_err *err)
{
    while (n > 0) {
        unsigned char *bytes;
        uint64_t got = 0;
        moec_status st = fetch(&bytes, &got, it, from, n, buf, err);
        if (st != MOEC_OK)
            return st;
        if (memcmp(have, bytes, (size_t)got) != 0)
            return differ(it, have, bytes, got, at, err);
        have += got;
        at += got;
        from += got;
        n -= got;
    }
    return MOEC_OK;
}

static moec_status compare_dead(const item *it, const unsigned char *have, uint64_t at, uint64_t n, moec_err *err)
{
    const uint64_t size = (uint64_t)moec_dtypes[it->w->cast->dtype].bytes;
    for (uint64_t i = 0; i < n; i++)
        if (have[i] != it->w->value[(at + i) % size])
            return moec_fail(err, MOEC_EIO, "tensor %s: byte %llu of its data is %02x, a dead expert has %02x", it->w->name,
                             (unsigned long long)(at + i), have[i], it->w->value[(at + i) % size]);
    return MOEC_OK;
}

/* Bytes [lo, hi) of a tensor's data. */
static moec_status compare(const item *it, const unsigned char *data, uint64_t lo, uint64_t hi, unsigned char *buf,
                           moec_err *err)
{
    moec_status st = MOEC_OK;
    const wanted *w = it->w;
    if (w->rewritten && !w->anew)
        return MOEC_OK;
    if (w->rewritten) {
        const unsigned char *want = (const unsigned char *)w->anew->data + lo;
        moec_status same = memcmp(data + lo, want, (size_t)(hi - lo)) == 0 ? MOEC_OK : differ(it, data + lo, want, hi - lo, lo, err);
        moec_pages_drop(want, (size_t)(hi - lo)); /* all of them together may be as large as the output */
        return same;
    }
    for (uint64_t at = lo, n, from; st == MOEC_OK && at < hi; at += n) {
        const bool live = moec_fate_source(&from, &n, w->forms, w->i, w->fate, at) && !w->dead;
        n = n < hi - at ? n : hi - at;
        st = live ? compare_run(it, data + at, at, from, n, buf, err) : compare_dead(it, data + at, at, n, err);
    }
    return st;
}

moec_status moec_expect_range(void *ctx, size_t s, const unsigned char *file, uint64_t lo, uint64_t hi, moec_err *err)
{
    const moec_expect *x = ctx;
    const shard *sh = &x->shard[s];
    moec_status st = MOEC_OK;
    unsigned char *buf = NULL;
    if (lo < sh->data_at) {
        uint64_t end = hi < sh->data_at ? hi : sh->data_at;
        if (file != sh->front && memcmp(file + lo, sh->front + lo, (size_t)(end - lo)) != 0)
            return moec_fail(err, MOEC_EIO, "the header is not what was written");
        lo = end;
    }
    if ((st = MOEC_NEW(buf, BUFFER, err)) != MOEC_OK)
        return st;
    size_t a = 0, b = sh->n; /* first tensor that ends behind lo */
    while (a < b) {
        size_t mid = a + (b - a) / 2;
        if (sh->item[mid].hi <= lo)
            a = mid + 1;
        else
            b = mid;
    }
    for (; st == MOEC_OK && a < sh->n && sh->item[a].lo < hi; a++) {
        const item *it = &sh->item[a];
        uint64_t from = it->lo > lo ? it->lo : lo, to = it->hi < hi ? it->hi : hi;
        if (from < to)
            st = compare(it, file + it->lo, from - it->lo, to - it->lo, buf, err);
    }
    moec_free(buf);
    return st;
}
