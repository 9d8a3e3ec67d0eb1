/* GGUF files, mapped: one, or the series that a first file begins. */
#include "ckpt/gguf.h"

#include "base/file.h"
#include "base/mem.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_FILES = 65535, TAIL = 20 }; /* "-00001-of-00002.gguf" */

typedef struct gguf_file {
    void *map;
    size_t size;
    char *path;
    struct timespec changed; /* when it was opened */
    moec_gguf_index ix;
} gguf_file;

struct moec_gguf {
    gguf_file *file;
    size_t files, cap;
    moec_gguf_tensor **tensor, **sorted; /* of all files, by place and by name */
    size_t n;
};

static moec_status open_one(gguf_file *f, const char *path, moec_err *err)
{
    moec_status st = MOEC_OK;
    struct stat info;
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe must not make this wait */
    if (fd < 0 || fstat(fd, &info) != 0) {
        st = moec_fail_errno(err, errno, path);
        goto done;
    }
    if (!S_ISREG(info.st_mode) || info.st_size < 24) {
        st = moec_fail(err, MOEC_EFORMAT, "%s: not a GGUF file", path);
        goto done;
    }
    f->size = (size_t)info.st_size;
    f->changed = info.st_mtim;
    MOEC_TRY(moec_copy(&f->path, path, strlen(path), err));
    void *map = mmap(NULL, f->size, PROT_READ, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) {
        st = moec_fail_errno(err, errno, path);
        goto done;
    }
    f->map = map;
    MOEC_TRY(moec_gguf_parse(&f->ix, map, f->size, f->size, path, err));
done:
    if (fd >= 0)
        close(fd);
    return st;
}

/* What the file says about its series: number and count, 0 and 1 where it says nothing. */
static moec_status read_split(int64_t *no, int64_t *count, const gguf_file *f, const char *path, moec_err *err)
{
    const moec_gguf_value *a = moec_gguf_find(&f->ix, "split.no"), *b = moec_gguf_find(&f->ix, "split.count");
    *no = 0;
    *count = 1;
    if ((a && !moec_gguf_int(a, no)) || (b && !moec_gguf_int(b, count)) || *no < 0 || *count < 0 || *count > MAX_FILES)
        return moec_fail(err, MOEC_EFORMAT, "%s: split.no or split.count is not a number up to %d", path, MAX_FILES);
    if (*count == 0) /* what some writers put into a whole file */
        *count = 1;
    return MOEC_OK;
}

/* Path of file i of the series that `path` is the first of. */
static moec_status series_path(char **out, const char *path, int64_t i, int64_t count, moec_err *err)
{
    char tail[64];
    const size_t n = strlen(path);
    snprintf(tail, sizeof tail, "-00001-of-%05lld.gguf", (long long)count);
    if (n <= TAIL || strcmp(path + n - TAIL, tail) != 0)
        return moec_fail(err, MOEC_EFORMAT, "%s: the first of %lld files, its name must end with %s", path, (long long)count,
                         tail);
    return moec_format(out, err, "%.*s-%05lld-of-%05lld.gguf", (int)(n - TAIL), path, (long long)i + 1, (long long)count);
}

static moec_status open_series(moec_gguf *g, const char *path, moec_err *err)
{
    moec_status st = MOEC_OK;
    int64_t no, count, n, of;
    char *next = NULL;
    MOEC_TRY(MOEC_GROW(g->file, g->cap, 1, err));
    g->file[g->files++] = (gguf_file){0};
    MOEC_TRY(open_one(&g->file[0], path, err));
    MOEC_TRY(read_split(&no, &count, &g->file[0], path, err));
    if (no != 0)
        return moec_fail(err, MOEC_EFORMAT, "%s: file %lld of %lld, give the first", path, (long long)no + 1, (long long)count);
    for (int64_t i = 1; i < count; i++) {
        MOEC_TRY(series_path(&next, path, i, count, err));
        MOEC_TRY(MOEC_GROW(g->file, g->cap, g->files + 1, err));
        g->file[g->files] = (gguf_file){0};
        MOEC_TRY(open_one(&g->file[g->files++], next, err));
        MOEC_TRY(read_split(&n, &of, &g->file[i], next, err));
        if (n != i || of != count) {
            st = moec_fail(err, MOEC_EFORMAT, "%s: says it is file %lld of %lld, expected %lld of %lld", next, (long long)n + 1,
                           (long long)of, (long long)i + 1, (long long)count);
            goto done;
        }
        moec_free(next);
        next = NULL;
    }
done:
    moec_free(next);
    return st;
}

static int by_name(const void *a, const void *b)
{
    return strcmp((*(moec_gguf_tensor *const *)a)->name, (*(moec_gguf_tensor *const *)b)->name);
}

static moec_status collect(moec_gguf *g, const char *path, moec_err *err)
{
    moec_status st = MOEC_OK;
    int64_t total;
    size_t n = 0;
    for (size_t f = 0; f < g->files; f++)
        n += g->file[f].ix.n;
    MOEC_TRY(MOEC_NEW(g->tensor, n, err));
    MOEC_TRY(MOEC_NEW(g->sorted, n, err));
    for (size_t f = 0; f < g->files; f++) {
        moec_gguf_index *ix = &g->file[f].ix;
        for (size_t i = 0; i < ix->n; i++) {
            ix->tensor[i].file = f;
            ix->tensor[i].data = (const char *)g->file[f].map + ix->data_at + ix->tensor[i].begin;
            g->sorted[g->n] = g->tensor[g->n] = &ix->tensor[i];
            g->n++;
        }
    }
    if (n > 1)
        qsort(g->sorted, n, sizeof *g->sorted, by_name);
    for (size_t i = 1; i < n; i++)
        if (by_name(&g->sorted[i - 1], &g->sorted[i]) == 0)
            return moec_fail(err, MOEC_EFORMAT, "%s: tensor %s is in two files", path, g->sorted[i]->name);
    const moec_gguf_value *v = moec_gguf_find(&g->file[0].ix, "split.tensors.count");
    /* Of a single file it may be 0, and of one that is torn from a series it is too large. */
    if (v && (!moec_gguf_int(v, &total) || total < 0 || (g->files > 1 ? (uint64_t)total != n : (uint64_t)total > n)))
        st = moec_fail(err, MOEC_EFORMAT, "%s: %s %zu tensors, not split.tensors.count", path,
                       g->files > 1 ? "its files hold" : "it holds", n);
done:
    return st;
}

moec_status moec_gguf_open(moec_gguf **out, const char *path, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_gguf *g = NULL;
    *out = NULL;
    MOEC_TRY(MOEC_NEW(g, 1, err));
    MOEC_TRY(open_series(g, path, err));
    MOEC_TRY(collect(g, path, err));
    *out = g;
    g = NULL;
done:
    moec_gguf_close(g);
    return st;
}

void moec_gguf_close(moec_gguf *g)
{
    if (!g)
        return;
    for (size_t f = 0; f < g->files; f++) {
        moec_gguf_index_release(&g->file[f].ix);
        if (g->file[f].map)
            munmap(g->file[f].map, g->file[f].size);
        moec_free(g->file[f].path);
    }
    moec_free(g->file);
    moec_free(g->tensor);
    moec_free(g->sorted);
    moec_free(g);
}

const moec_gguf_index *moec_gguf_front(const moec_gguf *g)
{
    return &g->file[0].ix;
}

size_t moec_gguf_files(const moec_gguf *g)
{
    return g->files;
}

const char *moec_gguf_path(const moec_gguf *g, size_t file)
{
    return g->file[file].path;
}

moec_status moec_gguf_unchanged(const moec_gguf *g, moec_err *err)
{
    for (size_t f = 0; f < g->files; f++) {
        const gguf_file *file = &g->file[f];
        struct stat now;
        if (stat(file->path, &now) != 0)
            return moec_fail_errno(err, errno, file->path);
        if ((size_t)now.st_size != file->size || now.st_mtim.tv_sec != file->changed.tv_sec ||
            now.st_mtim.tv_nsec != file->changed.tv_nsec)
            return moec_fail(err, MOEC_EFORMAT, "%s: was changed while it was being read", file->path);
    }
    return MOEC_OK;
}

void moec_gguf_drop(const moec_gguf *g, size_t file)
{
    moec_pages_drop(g->file[file].map, g->file[file].size);
}

size_t moec_gguf_count(const moec_gguf *g)
{
    return g->n;
}

const moec_gguf_tensor *moec_gguf_at(const moec_gguf *g, size_t i)
{
    return g->tensor[i];
}

const moec_gguf_tensor *moec_gguf_named(const moec_gguf *g, const char *name)
{
    moec_gguf_tensor key = {.name = (char *)(uintptr_t)name}, *p = &key;
    moec_gguf_tensor *const *found = g->n > 0 ? bsearch(&p, g->sorted, g->n, sizeof p, by_name) : NULL;
    return found ? *found : NULL;
}
