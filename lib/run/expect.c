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
    int fd; /* the source's shard, where the data is at `from` */
    uint64_t from;
    const moec_plan_layer *rows;
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
    size_t n;
    shard *shard;
    size_t n_shards, cap;
};

static int by_name(const void *a, const void *b)
{
    return strcmp(((const wanted *)a)->name, ((const wanted *)b)->name);
}

moec_status moec_expect_new(moec_expect **out, const moec_model *source, const moec_plan *p, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_expect *x = NULL;
    moec_place *place = NULL;
    const moec_ckpt *c = source->ckpt;
    *out = NULL;
    MOEC_TRY(MOEC_NEW(x, 1, err));
    MOEC_TRY(moec_model_places(&place, source, err));
    MOEC_TRY(MOEC_NEW(x->want, moec_ckpt_count(c), err));
    for (size_t i = 0; i < moec_ckpt_count(c); i++) {
        moec_fate f = moec_plan_fate(p, source, place[i]);
        if (f.dropped)
            continue;
        wanted *w = &x->want[x->n];
        *w = (wanted){.source = moec_ckpt_at(c, i), .rows = f.rows, .from = moec_ckpt_offset(c, i),
                      .fd = moec_ckpt_shard_fd(c, moec_ckpt_shard_of(c, i))};
        MOEC_TRY(moec_fate_name(&w->name, source, i, place[i], f, err));
        x->n++;
    }
    qsort(x->want, x->n, sizeof *x->want, by_name);
    *out = x;
    x = NULL;
done:
    moec_free(place);
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
    const moec_tensor *t = w->source;
    int64_t dim[MOEC_MAX_RANK];
    memcpy(dim, t->dim, sizeof dim);
    if (w->rows)
        dim[0] = w->rows->n_keep;
    if (e->dtype != t->dtype || e->rank != t->rank || memcmp(e->dim, dim, (size_t)t->rank * sizeof *dim) != 0)
        return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is %s %s, expected %s %s", file, e->name,
                         moec_dtypes[e->dtype].name, moec_shape_text(have, sizeof have, e->rank, e->dim),
                         moec_dtypes[t->dtype].name, moec_shape_text(need, sizeof need, t->rank, dim));
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

static moec_status differ(const item *it, const unsigned char *have, const unsigned char *want, uint64_t n, uint64_t at,
                          moec_err *err)
{
    uint64_t i = 0;
    while (i + 1 < n && have[i] == want[i])
        i++;
    return moec_fail(err, MOEC_EIO, "tensor %s: byte %llu of its data is %02x, the source (%s) has %02x", it->w->name,
                     (unsigned long long)(at + i), have[i], it->w->source->name, want[i]);
}

/* The source is read, not mapped: a touched page of a map can bring megabytes of its neighbours into resident memory. */
static moec_status compare_run(const item *it, const unsigned char *have, uint64_t at, uint64_t from, uint64_t n,
                               unsigned char *buf, moec_err *err)
{
    while (n > 0) {
        ssize_t got = pread(it->w->fd, buf, n < BUFFER ? (size_t)n : BUFFER, (off_t)from);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return moec_fail_errno(err, errno, it->w->source->name);
        if (got == 0)
            return moec_fail(err, MOEC_EIO, "tensor %s: the source ends early; it was changed", it->w->source->name);
        if (memcmp(have, buf, (size_t)got) != 0)
            return differ(it, have, buf, (uint64_t)got, at, err);
        have += got;
        at += (uint64_t)got;
        from += (uint64_t)got;
        n -= (uint64_t)got;
    }
    return MOEC_OK;
}

/* Bytes [lo, hi) of a tensor's data. */
static moec_status compare(const item *it, const unsigned char *data, uint64_t lo, uint64_t hi, unsigned char *buf,
                           moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_tensor *t = it->w->source;
    const uint64_t row = it->w->rows ? t->bytes / (uint64_t)t->dim[0] : t->bytes;
    for (uint64_t at = lo; st == MOEC_OK && at < hi;) {
        uint64_t r = at / row, in = at - r * row, n = row - in < hi - at ? row - in : hi - at;
        uint64_t source_row = it->w->rows ? (uint64_t)it->w->rows->keep[r] : r;
        st = compare_run(it, data + at, at, it->w->from + source_row * row + in, n, buf, err);
        at += n;
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
