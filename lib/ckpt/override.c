/* See override.h. */
#include "ckpt/override.h"

#include "base/file.h"
#include "base/mem.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MAX_FILES = 65536, HASH_BYTES = 1 << 24 };

/* A file and its tensors by name. Allocated one by one: pointers to tensors must outlive the list's growth. */
typedef struct part {
    moec_shard shard;
    moec_tensor *tensor; /* sorted by name */
} part;

struct moec_override {
    char *dir;
    part **at; /* sorted by the files' names */
    size_t n, cap;
    moec_sheet **sheet; /* committed; their maps live on */
    size_t sheets, sheets_cap;
};

static void sheet_free(moec_sheet *s);

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
    for (size_t i = 0; i < o->sheets; i++)
        sheet_free(o->sheet[i]);
    moec_free(o->sheet);
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

moec_status moec_override_get(const moec_tensor **out, const moec_override *o, const char *name, moec_dtype dtype, int rank,
                              const int64_t *dim, moec_err *err)
{
    const moec_tensor *t = moec_override_find(o, name);
    *out = t;
    if (t && t->dtype == dtype && t->rank == rank && memcmp(t->dim, dim, (size_t)rank * sizeof *dim) == 0)
        return MOEC_OK;
    return moec_fail(err, MOEC_EFORMAT, "tensor %s is %s among the weights that were computed anew", name,
                     t ? "of another form" : "not");
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

/* Pages go back behind each block: a layer may be larger than memory. */
static moec_status hash_map(moec_digest *out, const unsigned char *map, size_t size, moec_err *err)
{
    moec_hash *h;
    moec_status st = moec_hash_new(&h, err);
    if (st != MOEC_OK)
        return st;
    for (size_t at = 0; at < size; at += HASH_BYTES) {
        const size_t n = size - at < HASH_BYTES ? size - at : HASH_BYTES;
        moec_hash_add(h, map + at, n);
        moec_pages_drop(map + at, n);
    }
    *out = moec_hash_digest(h);
    moec_hash_free(h);
    return MOEC_OK;
}

moec_status moec_override_file_digest(moec_digest *out, const moec_override *o, const char *file, moec_err *err)
{
    const part *p = file_of(o, file);
    if (!p)
        return moec_fail(err, MOEC_EFORMAT, "%s/%s: is not there", o->dir, file);
    return hash_map(out, p->shard.map, p->shard.size, err);
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

/* --- a file that is being made ---------------------------------------------------------------------------------------- */

struct moec_sheet {
    char *file, *path, *tmp;
    int fd;
    unsigned char *map;
    size_t size;
    char **name;
    moec_tensor *tensor;
    size_t n;
};

static void sheet_free(moec_sheet *s)
{
    if (s->map)
        munmap(s->map, s->size);
    if (s->fd >= 0)
        close(s->fd);
    moec_names_free(s->name, s->n);
    moec_free(s->tensor);
    moec_free(s->file);
    moec_free(s->path);
    moec_free(s->tmp);
    moec_free(s);
}

static moec_status map_room(moec_sheet *s, const char *head, size_t head_len, moec_err *err)
{
    s->fd = open(s->tmp, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (s->fd < 0)
        return moec_fail_errno(err, errno, s->tmp);
    int failed = posix_fallocate(s->fd, 0, (off_t)s->size); /* a full disk is an error now, not a signal later */
    if (failed)
        return moec_fail_errno(err, failed, s->tmp);
    void *map = mmap(NULL, s->size, PROT_READ | PROT_WRITE, MAP_SHARED, s->fd, 0);
    if (map == MAP_FAILED)
        return moec_fail_errno(err, errno, s->tmp);
    s->map = map;
    memcpy(s->map, head, head_len);
    return MOEC_OK;
}

moec_status moec_sheet_new(moec_sheet **out, const moec_override *o, const char *file, const moec_tensor *t, size_t n,
                           moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_st_entry *entry = NULL;
    moec_sheet *s = NULL;
    char *head = NULL;
    size_t head_len;
    uint64_t at = 0;
    *out = NULL;
    if (moec_override_has(o, file))
        return moec_fail(err, MOEC_EEXIST, "%s/%s: is there already", o->dir, file);
    MOEC_TRY(MOEC_NEW(s, 1, err));
    s->fd = -1;
    MOEC_TRY(moec_copy(&s->file, file, strlen(file), err));
    MOEC_TRY(moec_path_join(&s->path, o->dir, file, err));
    MOEC_TRY(moec_format(&s->tmp, err, "%s.tmp", s->path));
    MOEC_TRY(MOEC_NEW(entry, n, err));
    MOEC_TRY(MOEC_NEW(s->name, n, err));
    MOEC_TRY(MOEC_NEW(s->tensor, n, err));
    for (s->n = 0; s->n < n; s->n++) {
        const moec_tensor *from = &t[s->n];
        MOEC_TRY(moec_copy(&s->name[s->n], from->name, strlen(from->name), err));
        s->tensor[s->n] = *from;
        s->tensor[s->n].name = s->name[s->n];
        entry[s->n] = (moec_st_entry){.name = s->name[s->n], .dtype = from->dtype, .rank = from->rank, .begin = at,
                                      .end = at + from->bytes};
        memcpy(entry[s->n].dim, from->dim, sizeof entry[s->n].dim);
        at += from->bytes;
    }
    MOEC_TRY(moec_st_header(&head, &head_len, entry, n, NULL, err));
    s->size = head_len + at;
    MOEC_TRY(map_room(s, head, head_len, err));
    for (size_t i = 0; i < n; i++)
        s->tensor[i].data = s->map + head_len + entry[i].begin;
    *out = s;
    s = NULL;
done:
    moec_sheet_discard(s);
    moec_free(entry);
    moec_free(head);
    return st;
}

const moec_tensor *moec_sheet_at(const moec_sheet *s, size_t i)
{
    return &s->tensor[i];
}

moec_status moec_sheet_digest(moec_digest *out, const moec_sheet *s, moec_err *err)
{
    return hash_map(out, s->map, s->size, err);
}

moec_status moec_sheet_commit(moec_sheet *s, moec_override *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    bool published = false;
    MOEC_TRY(MOEC_GROW(o->sheet, o->sheets_cap, o->sheets + 1, err)); /* nothing may fail once the file counts */
    if (msync(s->map, s->size, MS_SYNC) != 0) {
        st = moec_fail_errno(err, errno, s->tmp);
        goto done;
    }
    st = moec_file_publish(s->tmp, s->path, err);
    published = !moec_path_exists(s->tmp); /* the folder's sync may have failed behind it */
    if (published) {
        close(s->fd); /* the map does without */
        s->fd = -1;
    }
    if (st == MOEC_OK)
        st = map_file(o, s->file, err);
    if (st != MOEC_OK)
        goto done;
    o->sheet[o->sheets++] = s; /* whoever points into its map may go on */
    s = NULL;
done:
    if (s && published)
        unlink(s->path);
    moec_sheet_discard(s);
    return st;
}

void moec_sheet_discard(moec_sheet *s)
{
    if (!s)
        return;
    if (s->tmp && s->fd >= 0)
        unlink(s->tmp);
    sheet_free(s);
}

size_t moec_override_count(const moec_override *o)
{
    size_t n = 0;
    for (size_t i = 0; i < o->n; i++)
        n += o->at[i]->shard.ix.n;
    return n;
}

moec_status moec_override_digest(moec_digest *out, const moec_override *o, moec_err *err)
{
    moec_hash *h;
    moec_status st = moec_hash_new(&h, err);
    if (st != MOEC_OK)
        return st;
    for (size_t i = 0; i < o->n; i++)
        for (size_t k = 0; k < o->at[i]->shard.ix.n; k++) {
            const moec_tensor *t = &o->at[i]->tensor[k];
            moec_tensor_hash(h, t);
            moec_hash_add(h, t->data, t->bytes);
            moec_pages_drop(t->data, t->bytes);
        }
    *out = moec_hash_digest(h);
    moec_hash_free(h);
    return MOEC_OK;
}
