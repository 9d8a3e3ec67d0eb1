/* See override.h. */
#include "ckpt/override.h"

#include "base/file.h"
#include "base/mem.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_FILES = 65536, PIECE = 64 << 20 };

/* A file and its tensors by name. Allocated one by one: pointers to tensors must outlive the list's growth. */
typedef struct part {
    moec_shard shard;
    moec_tensor *tensor; /* sorted by name */
} part;

struct moec_override {
    char *dir;
    part **at; /* sorted by the files' names */
    size_t n, cap;
};

static int by_name(const void *a, const void *b)
{
    return strcmp(((const moec_tensor *)a)->name, ((const moec_tensor *)b)->name);
}

static int by_file(const void *a, const void *b)
{
    return strcmp((*(part *const *)a)->shard.name, (*(part *const *)b)->shard.name);
}

static void part_free(part *p)
{
    moec_shard_close(&p->shard);
    moec_free(p->tensor);
    moec_free(p);
}

static const moec_tensor *find_in(const part *p, const char *name)
{
    const moec_tensor key = {.name = name};
    return p->shard.ix.n == 0 ? NULL : bsearch(&key, p->tensor, p->shard.ix.n, sizeof key, by_name);
}

static moec_status map_file(moec_override *o, const char *file, moec_err *err)
{
    moec_status st = MOEC_OK;
    part *p = NULL;
    if (o->n >= MAX_FILES)
        return moec_fail(err, MOEC_EFORMAT, "%s: more than %d files", o->dir, MAX_FILES);
    MOEC_TRY(MOEC_NEW(p, 1, err));
    p->shard.fd = -1;
    MOEC_TRY(moec_shard_open(&p->shard, o->dir, file, err));
    MOEC_TRY(MOEC_NEW(p->tensor, p->shard.ix.n, err));
    for (size_t i = 0; i < p->shard.ix.n; i++) {
        p->tensor[i] = moec_shard_tensor(&p->shard, i);
        if (moec_override_find(o, p->tensor[i].name)) {
            st = moec_fail(err, MOEC_EFORMAT, "%s: tensor %.200s is in two files", o->dir, p->tensor[i].name);
            goto done;
        }
    }
    if (p->shard.ix.n > 0)
        qsort(p->tensor, p->shard.ix.n, sizeof *p->tensor, by_name);
    MOEC_TRY(MOEC_GROW(o->at, o->cap, o->n + 1, err));
    o->at[o->n++] = p;
    p = NULL;
    qsort(o->at, o->n, sizeof *o->at, by_file);
done:
    if (p)
        part_free(p);
    return st;
}

static bool is_ours(const char *name)
{
    static const char end[] = ".safetensors";
    size_t n = strlen(name);
    return n >= sizeof end && strcmp(name + n - (sizeof end - 1), end) == 0;
}

moec_status moec_override_open(moec_override **out, const char *dir, bool make, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_override *o = NULL;
    char **names = NULL;
    size_t n = 0;
    *out = NULL;
    if (make)
        MOEC_TRY(moec_dir_make(dir, err));
    if (!moec_path_is_dir(dir)) {
        st = moec_fail(err, MOEC_EFORMAT, "%s: there is no such folder", dir);
        goto done;
    }
    MOEC_TRY(MOEC_NEW(o, 1, err));
    MOEC_TRY(moec_copy(&o->dir, dir, strlen(dir), err));
    MOEC_TRY(moec_dir_list(&names, &n, dir, err));
    for (size_t i = 0; i < n; i++)
        if (is_ours(names[i]))
            MOEC_TRY(map_file(o, names[i], err));
    *out = o;
    o = NULL;
done:
    moec_names_free(names, n);
    moec_override_close(o);
    return st;
}

void moec_override_close(moec_override *o)
{
    if (!o)
        return;
    for (size_t i = 0; i < o->n; i++)
        part_free(o->at[i]);
    moec_free(o->at);
    moec_free(o->dir);
    moec_free(o);
}

const moec_tensor *moec_override_find(const moec_override *o, const char *name)
{
    const moec_tensor *t = NULL;
    for (size_t i = 0; i < o->n && !t; i++)
        t = find_in(o->at[i], name);
    return t;
}

static const part *file_of(const moec_override *o, const char *file)
{
    for (size_t i = 0; i < o->n; i++)
        if (strcmp(o->at[i]->shard.name, file) == 0)
            return o->at[i];
    return NULL;
}

bool moec_override_has(const moec_override *o, const char *file)
{
    return file_of(o, file) != NULL;
}

const char *moec_override_note(const moec_override *o, const char *file)
{
    const part *p = file_of(o, file);
    return p ? p->shard.ix.metadata : NULL;
}

void moec_override_place(int *fd, uint64_t *at, const moec_override *o, const moec_tensor *t)
{
    *fd = -1;
    *at = 0;
    for (size_t i = 0; i < o->n; i++)
        if (find_in(o->at[i], t->name) == t) {
            *fd = o->at[i]->shard.fd;
            *at = (uint64_t)((const unsigned char *)t->data - o->at[i]->shard.map);
        }
}

static moec_status put(int fd, const void *bytes, size_t n, const char *path, moec_err *err)
{
    for (size_t at = 0; at < n;) {
        size_t piece = n - at < PIECE ? n - at : PIECE;
        ssize_t k = write(fd, (const char *)bytes + at, piece);
        if (k < 0 && errno != EINTR)
            return moec_fail_errno(err, errno, path);
        at += k > 0 ? (size_t)k : 0;
    }
    return MOEC_OK;
}

moec_status moec_override_add(moec_override *o, const char *file, const moec_tensor *t, size_t n, const char *note, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_st_entry *entry = NULL;
    char *path = NULL, *tmp = NULL, *head = NULL;
    size_t head_len;
    uint64_t at = 0;
    int fd = -1;
    if (moec_override_has(o, file))
        return moec_fail(err, MOEC_EEXIST, "%s/%s: is there already", o->dir, file);
    MOEC_TRY(moec_path_join(&path, o->dir, file, err));
    MOEC_TRY(moec_format(&tmp, err, "%s.tmp", path));
    MOEC_TRY(MOEC_NEW(entry, n, err));
    for (size_t i = 0; i < n; i++) {
        entry[i] = (moec_st_entry){.name = (char *)(uintptr_t)t[i].name, .dtype = t[i].dtype, .rank = t[i].rank,
                                   .begin = at, .end = at + t[i].bytes};
        memcpy(entry[i].dim, t[i].dim, sizeof entry[i].dim);
        at += t[i].bytes;
    }
    MOEC_TRY(moec_st_header(&head, &head_len, entry, n, note, err));
    fd = open(tmp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) {
        st = moec_fail_errno(err, errno, tmp);
        goto done;
    }
    MOEC_TRY(put(fd, head, head_len, tmp, err));
    for (size_t i = 0; i < n; i++)
        MOEC_TRY(put(fd, t[i].data, t[i].bytes, tmp, err));
    MOEC_TRY(moec_file_publish(tmp, path, err));
    MOEC_TRY(map_file(o, file, err));
done:
    if (fd >= 0)
        close(fd);
    moec_free(head);
    moec_free(entry);
    moec_free(tmp);
    moec_free(path);
    return st;
}

size_t moec_override_count(const moec_override *o)
{
    size_t n = 0;
    for (size_t i = 0; i < o->n; i++)
        n += o->at[i]->shard.ix.n;
    return n;
}

uint64_t moec_override_bytes(const moec_override *o)
{
    uint64_t n = 0;
    for (size_t i = 0; i < o->n; i++)
        n += o->at[i]->shard.size - o->at[i]->shard.ix.data_at;
    return n;
}

moec_status moec_override_digest(moec_digest *out, const moec_override *o, moec_err *err)
{
    moec_hash *h;
    char shape[256];
    moec_status st = moec_hash_new(&h, err);
    if (st != MOEC_OK)
        return st;
    for (size_t i = 0; i < o->n; i++)
        for (size_t k = 0; k < o->at[i]->shard.ix.n; k++) {
            const moec_tensor *t = &o->at[i]->tensor[k];
            moec_hash_text(h, t->name);
            moec_hash_text(h, moec_dtypes[t->dtype].name);
            moec_hash_text(h, moec_shape_text(shape, sizeof shape, t->rank, t->dim));
            moec_hash_add(h, t->data, t->bytes);
            moec_pages_drop(t->data, t->bytes);
        }
    *out = moec_hash_digest(h);
    moec_hash_free(h);
    return MOEC_OK;
}
