/* The list of what a checkpoint folder shall hold: shards, their tensors, the ranges these come from, side files. */
#include "ckpt/out.h"

#include "base/file.h"
#include "base/mem.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>

moec_status moec_out_new(moec_out **out, moec_err *err)
{
    return MOEC_NEW(*out, 1, err);
}

static void release_shard(moec_shard_plan *s)
{
    for (size_t i = 0; i < s->n; i++)
        moec_free(s->entry[i].name);
    moec_free(s->entry);
    moec_free(s->segment);
    moec_free(s->header);
    moec_free(s->metadata);
    moec_free(s->name);
}

void moec_out_free(moec_out *o)
{
    if (!o)
        return;
    for (size_t i = 0; i < o->n_shards; i++)
        release_shard(&o->shard[i]);
    for (size_t i = 0; i < o->n_files; i++) {
        moec_free(o->file[i].name);
        moec_free(o->file[i].path);
        moec_free(o->file[i].bytes);
    }
    moec_free(o->shard);
    moec_free(o->file);
    moec_free(o);
}

static moec_shard_plan *last_shard(const moec_out *o)
{
    return o->n_shards > 0 ? &o->shard[o->n_shards - 1] : NULL;
}

/* The tensor that bytes are being added to must be full before anything else begins. */
static moec_status check_full(const moec_out *o, moec_err *err)
{
    const moec_shard_plan *s = last_shard(o);
    const moec_st_entry *e = s && s->n > 0 ? &s->entry[s->n - 1] : NULL;
    if (e && s->bytes != e->end)
        return moec_fail(err, MOEC_EINVAL, "%s: tensor %s: %llu bytes were given, its shape needs %llu", s->name,
                         e->name, (unsigned long long)(s->bytes - e->begin), (unsigned long long)(e->end - e->begin));
    return o->closed ? moec_fail(err, MOEC_EINVAL, "the list of output files is closed") : MOEC_OK;
}

moec_status moec_out_shard(moec_out *o, const char *name, const char *metadata, moec_err *err)
{
    moec_status st = MOEC_OK;
    MOEC_TRY(check_full(o, err));
    MOEC_TRY(MOEC_GROW(o->shard, o->shards_cap, o->n_shards + 1, err));
    moec_shard_plan *s = &o->shard[o->n_shards];
    *s = (moec_shard_plan){0};
    MOEC_TRY(moec_copy(&s->name, name, strlen(name), err));
    o->n_shards++; /* from here on moec_out_free releases it */
    if (metadata)
        MOEC_TRY(moec_copy(&s->metadata, metadata, strlen(metadata), err));
done:
    return st;
}

moec_status moec_out_tensor(moec_out *o, const char *name, moec_dtype dtype, int rank, const int64_t *dim, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_shard_plan *s = last_shard(o);
    if (!s)
        return moec_fail(err, MOEC_EINVAL, "tensor %s: there is no shard to put it into", name);
    MOEC_TRY(check_full(o, err));
    MOEC_TRY(MOEC_GROW(s->entry, s->cap, s->n + 1, err));
    moec_st_entry *e = &s->entry[s->n];
    *e = (moec_st_entry){.dtype = dtype, .rank = rank, .begin = s->bytes};
    size_t bytes = (size_t)moec_dtypes[dtype].bytes;
    for (int i = 0; i < rank; i++) {
        e->dim[i] = dim[i];
        if (!moec_mul_size(&bytes, bytes, (size_t)dim[i])) {
            st = moec_fail(err, MOEC_EINVAL, "tensor %s: its size overflows", name);
            goto done;
        }
    }
    e->end = e->begin + bytes;
    MOEC_TRY(moec_copy(&e->name, name, strlen(name), err));
    s->n++;
done:
    return st;
}

moec_status moec_out_raw(moec_out *o, const char *name, const void *header, size_t len, uint64_t data, moec_err *err)
{
    moec_status st = MOEC_OK;
    if (data > INT64_MAX)
        return moec_fail(err, MOEC_EINVAL, "%s: its size overflows", name);
    MOEC_TRY(moec_out_shard(o, name, NULL, err));
    MOEC_TRY(moec_out_tensor(o, "data", MOEC_U8, 1, (const int64_t[]){(int64_t)data}, err));
    moec_shard_plan *s = last_shard(o);
    MOEC_TRY(moec_copy(&s->header, header, len, err));
    s->header_len = len;
    s->raw = true;
done:
    return st;
}

/* A new segment of the last tensor, behind the others; g has all but its place. */
static moec_status add_segment(moec_out *o, moec_segment g, moec_err *err)
{
    moec_shard_plan *s = last_shard(o);
    if (!s || s->n == 0 || o->closed || g.length > s->entry[s->n - 1].end - s->bytes)
        return moec_fail(err, MOEC_EINVAL, "%s: more bytes than its tensors hold", s ? s->name : "no shard");
    if (g.length == 0)
        return MOEC_OK;
    moec_segment *last = s->n_segments > 0 ? &s->segment[s->n_segments - 1] : NULL;
    if (last && g.fd >= 0 && last->fd == g.fd && last->from + last->length == g.from) {
        last->length += g.length;
    } else {
        moec_status st = MOEC_GROW(s->segment, s->segments_cap, s->n_segments + 1, err);
        if (st != MOEC_OK)
            return st;
        g.at = s->bytes;
        s->segment[s->n_segments++] = g;
    }
    s->bytes += g.length;
    return MOEC_OK;
}

moec_status moec_out_bytes(moec_out *o, int fd, uint64_t from, uint64_t length, moec_err *err)
{
    return add_segment(o, (moec_segment){.fd = fd, .from = from, .length = length}, err);
}

moec_status moec_out_fill(moec_out *o, const void *bytes, size_t size, uint64_t length, moec_err *err)
{
    moec_segment g = {.fd = -1, .length = length, .fill_size = size};
    if (size < 1 || size > sizeof g.fill || length % size != 0)
        return moec_fail(err, MOEC_EINVAL, "%llu bytes cannot be filled by %zu", (unsigned long long)length, size);
    memcpy(g.fill, bytes, size);
    return add_segment(o, g, err);
}

moec_status moec_out_made(moec_out *o, moec_make_fn *make, void *ctx, uint64_t from, uint64_t length, moec_err *err)
{
    return add_segment(o, (moec_segment){.fd = -1, .make = make, .ctx = ctx, .from = from, .length = length}, err);
}

static moec_status add_file(moec_file_plan **out, moec_out *o, const char *name, moec_err *err)
{
    moec_status st = MOEC_OK;
    if (!moec_path_is_plain(name))
        return moec_fail(err, MOEC_EINVAL, "%s: not a plain file name", name);
    MOEC_TRY(MOEC_GROW(o->file, o->files_cap, o->n_files + 1, err));
    *out = &o->file[o->n_files];
    **out = (moec_file_plan){0};
    MOEC_TRY(moec_copy(&(*out)->name, name, strlen(name), err));
    o->n_files++;
done:
    return st;
}

moec_status moec_out_text(moec_out *o, const char *name, const char *bytes, size_t len, moec_err *err)
{
    moec_file_plan *f;
    moec_status st = add_file(&f, o, name, err);
    if (st == MOEC_OK) {
        f->len = len;
        st = moec_copy(&f->bytes, bytes, len, err);
    }
    return st;
}

moec_status moec_out_copy(moec_out *o, const char *name, const char *path, moec_err *err)
{
    moec_file_plan *f;
    struct stat info;
    if (stat(path, &info) != 0)
        return moec_fail_errno(err, errno, path);
    moec_status st = add_file(&f, o, name, err);
    if (st == MOEC_OK) {
        f->len = (uint64_t)info.st_size;
        st = moec_copy(&f->path, path, strlen(path), err);
    }
    return st;
}

size_t moec_out_shards(const moec_out *o)
{
    return o->n_shards;
}

const char *moec_out_shard_name(const moec_out *o, size_t s)
{
    return o->shard[s].name;
}

moec_status moec_out_close(moec_out *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    MOEC_TRY(check_full(o, err));
    for (size_t i = 0; i < o->n_shards; i++) {
        moec_shard_plan *s = &o->shard[i];
        if (s->header) /* moec_out_raw's */
            continue;
        MOEC_TRY(moec_within(err, moec_st_header(&s->header, &s->header_len, s->entry, s->n, s->metadata, err), "%s",
                             s->name));
    }
    o->closed = true;
done:
    return st;
}

const char *moec_out_header(size_t *len, const moec_out *o, size_t s)
{
    *len = o->shard[s].header_len;
    return o->shard[s].header;
}

uint64_t moec_out_size(const moec_out *o, size_t s)
{
    return o->shard[s].header_len + o->shard[s].bytes;
}

uint64_t moec_out_total(moec_out *o)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < o->n_shards; i++)
        sum += moec_out_size(o, i);
    for (size_t i = 0; i < o->n_files; i++)
        sum += o->file[i].len;
    return sum;
}
