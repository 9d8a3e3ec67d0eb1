/* See shard.h. */
#include "ckpt/shard.h"

#include "base/file.h"
#include "base/mem.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

moec_status moec_shard_open(moec_shard *s, const char *dir, const char *name, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *path = NULL;
    struct stat info;
    *s = (moec_shard){.fd = -1};
    MOEC_TRY(moec_copy(&s->name, name, strlen(name), err));
    MOEC_TRY(moec_path_join(&path, dir, name, err));
    s->fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe must not make this wait */
    if (s->fd < 0 && errno == ENOENT) {
        st = moec_fail(err, MOEC_EFORMAT, "%s: shard is missing", path);
        goto done;
    }
    if (s->fd < 0 || fstat(s->fd, &info) != 0) {
        st = moec_fail_errno(err, errno, path);
        goto done;
    }
    if (!S_ISREG(info.st_mode) || info.st_size < 8) {
        st = moec_fail(err, MOEC_EFORMAT, "%s: not a safetensors file", path);
        goto done;
    }
    s->size = (size_t)info.st_size;
    s->changed = info.st_mtim;
    void *map = mmap(NULL, s->size, PROT_READ, MAP_SHARED, s->fd, 0);
    if (map == MAP_FAILED) {
        st = moec_fail_errno(err, errno, path);
        goto done;
    }
    s->map = map;
    MOEC_TRY(moec_st_parse(&s->ix, s->map, s->size, s->size, path, err));
    /* A touched page can bring megabytes of its neighbours into resident memory: with many shards that adds up to more than
     * a layer, for headers and samples that are not needed again. */
    moec_pages_drop(s->map, s->size);
done:
    moec_free(path);
    return st;
}

void moec_shard_close(moec_shard *s)
{
    moec_st_index_release(&s->ix);
    if (s->map)
        munmap(s->map, s->size);
    if (s->name && s->fd >= 0)
        close(s->fd);
    moec_free(s->name);
    *s = (moec_shard){.fd = -1};
}

moec_tensor moec_shard_tensor(const moec_shard *s, size_t i)
{
    const moec_st_entry *e = &s->ix.entry[i];
    moec_tensor t = {.name = e->name, .dtype = e->dtype, .rank = e->rank, .data = s->map + s->ix.data_at + e->begin,
                     .bytes = (size_t)(e->end - e->begin)};
    memcpy(t.dim, e->dim, sizeof t.dim);
    return t;
}

void moec_tensor_hash(moec_hash *h, const moec_tensor *t)
{
    char shape[256];
    moec_hash_text(h, t->name);
    moec_hash_text(h, moec_dtypes[t->dtype].name);
    moec_hash_text(h, moec_shape_text(shape, sizeof shape, t->rank, t->dim));
}
