/* See hidden.h. */
#include "calib/hidden.h"

#include "base/file.h"
#include "base/mem.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct moec_hidden {
    int64_t n, width, beside, max_tokens;
    float *memory;  /* [n, width] [n, beside], or NULL on disk */
    float *buffer;  /* [workers] of [max_tokens, width] [max_tokens, beside] on disk */
    int fd[2], side;
    bool on_disk;
};

moec_status moec_read_all(int fd, void *bytes, size_t n, const char *what, moec_err *err)
{
    for (size_t at = 0; at < n;) {
        ssize_t got = read(fd, (char *)bytes + at, n - at);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return moec_fail_errno(err, errno, what);
        if (got == 0)
            return moec_fail(err, MOEC_EFORMAT, "%s: shorter than it must be", what);
        at += (size_t)got;
    }
    return MOEC_OK;
}

moec_status moec_write_all(int fd, const void *bytes, size_t n, const char *what, moec_err *err)
{
    for (size_t at = 0; at < n;) {
        ssize_t put = write(fd, (const char *)bytes + at, n - at);
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0)
            return moec_fail_errno(err, errno, what);
        at += (size_t)put;
    }
    return MOEC_OK;
}

moec_status moec_hidden_path(char **out, const char *dir, int side, moec_err *err)
{
    return moec_format(out, err, "%s/hidden.%d", dir, side);
}

static moec_status open_files(moec_hidden *s, const char *dir, bool keep, moec_err *err)
{
    for (int i = 0; i < 2; i++) {
        char *path = NULL;
        moec_status st = keep ? moec_hidden_path(&path, dir, i, err) : moec_format(&path, err, "%s/moecompress.XXXXXX", dir);
        if (st != MOEC_OK)
            return st;
        s->fd[i] = keep ? open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666)
                        : open(dir, O_RDWR | O_TMPFILE | O_CLOEXEC, 0600);
        if (s->fd[i] < 0 && !keep) { /* not every file system has nameless files */
            s->fd[i] = mkostemp(path, O_CLOEXEC);
            if (s->fd[i] >= 0)
                unlink(path);
        }
        if (s->fd[i] < 0)
            st = moec_fail_errno(err, errno, path);
        moec_free(path);
        if (st != MOEC_OK)
            return st;
    }
    return MOEC_OK;
}

moec_status moec_hidden_new(moec_hidden **out, int64_t n, int64_t width, int64_t beside, const char *dir, bool keep,
                            int workers, int64_t max_tokens, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_hidden *s = NULL;
    *out = NULL;
    MOEC_TRY(MOEC_NEW(s, 1, err));
    s->n = n;
    s->width = width;
    s->beside = beside;
    s->max_tokens = max_tokens;
    s->fd[0] = s->fd[1] = -1;
    s->on_disk = dir != NULL;
    if (dir) {
        MOEC_TRY(moec_alloc((void **)&s->buffer, (size_t)(workers * max_tokens), (size_t)(width + beside) * sizeof(float),
                            err));
        MOEC_TRY(open_files(s, dir, keep, err));
    } else {
        MOEC_TRY(moec_alloc((void **)&s->memory, (size_t)n, (size_t)(width + beside) * sizeof(float), err));
    }
    *out = s;
    s = NULL;
done:
    moec_hidden_free(s);
    return st;
}

void moec_hidden_free(moec_hidden *s)
{
    if (!s)
        return;
    for (int i = 0; i < 2; i++)
        if (s->fd[i] >= 0)
            close(s->fd[i]);
    moec_free(s->memory);
    moec_free(s->buffer);
    moec_free(s);
}

size_t moec_hidden_bytes(int64_t n, int64_t width, int64_t beside, bool on_disk, int workers, int64_t max_tokens)
{
    size_t row = (size_t)(width + beside) * sizeof(float);
    return on_disk ? (size_t)workers * (size_t)max_tokens * row : (size_t)n * row;
}

bool moec_hidden_on_disk(const moec_hidden *s)
{
    return s->on_disk;
}

/* `n` floats of a side's file from float `at` on. */
static moec_status transfer(const moec_hidden *s, int side, bool out, float *x, int64_t at, int64_t n, moec_err *err)
{
    size_t total = (size_t)n * sizeof(float), done = 0;
    while (done < total) {
        off_t where = (off_t)((size_t)at * sizeof(float) + done);
        ssize_t k = out ? pwrite(s->fd[side], (char *)x + done, total - done, where)
                        : pread(s->fd[side], (char *)x + done, total - done, where);
        if (k < 0 && errno == EINTR)
            continue;
        if (k < 0)
            return moec_fail_errno(err, errno, "hidden states on disk");
        if (k == 0)
            return moec_fail(err, MOEC_EIO, "hidden states on disk: file ends early");
        done += (size_t)k;
    }
    return MOEC_OK;
}

/* Rows [at, at+n) and what stands beside them, to or from a worker's buffer. */
static moec_status transfer_rows(const moec_hidden *s, int side, bool out, float *x, int64_t at, int64_t n, moec_err *err)
{
    moec_status st = transfer(s, side, out, x, at * s->width, n * s->width, err);
    if (st == MOEC_OK && s->beside > 0)
        st = transfer(s, side, out, x + s->max_tokens * s->width, s->n * s->width + at * s->beside, n * s->beside, err);
    return st;
}

static float *buffer_of(const moec_hidden *s, int worker)
{
    return s->buffer + worker * s->max_tokens * (s->width + s->beside);
}

float *moec_hidden_beside(moec_hidden *s, int worker, int64_t at)
{
    if (s->beside == 0)
        return NULL;
    return s->on_disk ? buffer_of(s, worker) + s->max_tokens * s->width : s->memory + s->n * s->width + at * s->beside;
}

moec_status moec_hidden_get(float **out, moec_hidden *s, int worker, int64_t at, int64_t n, bool fresh, moec_err *err)
{
    if (!s->on_disk) {
        *out = s->memory + at * s->width;
        return MOEC_OK;
    }
    *out = buffer_of(s, worker);
    return fresh ? MOEC_OK : transfer_rows(s, s->side, false, *out, at, n, err);
}

moec_status moec_hidden_put(moec_hidden *s, int worker, int64_t at, int64_t n, moec_err *err)
{
    if (!s->on_disk)
        return MOEC_OK;
    return transfer_rows(s, 1 - s->side, true, buffer_of(s, worker), at, n, err);
}

moec_status moec_hidden_read(float *out, const moec_hidden *s, int64_t at, int64_t n, moec_err *err)
{
    if (s->on_disk)
        return transfer(s, s->side, false, out, at * s->width, n * s->width, err);
    memcpy(out, s->memory + at * s->width, (size_t)n * (size_t)s->width * sizeof *out);
    return MOEC_OK;
}

void moec_hidden_turn(moec_hidden *s)
{
    if (s->on_disk)
        s->side = 1 - s->side;
}

int moec_hidden_side(const moec_hidden *s)
{
    return s->side;
}

void moec_hidden_set_side(moec_hidden *s, int side)
{
    s->side = side;
}

static size_t all_bytes(const moec_hidden *s)
{
    return (size_t)s->n * (size_t)(s->width + s->beside) * sizeof(float);
}

moec_status moec_hidden_save(const moec_hidden *s, int fd, const char *what, moec_err *err)
{
    if (!s->on_disk)
        return moec_write_all(fd, s->memory, all_bytes(s), what, err);
    return fsync(s->fd[s->side]) == 0 ? MOEC_OK : moec_fail_errno(err, errno, "hidden states on disk");
}

moec_status moec_hidden_load(moec_hidden *s, int fd, const char *what, moec_err *err)
{
    moec_status st = MOEC_OK;
    if (!s->on_disk)
        return moec_read_all(fd, s->memory, all_bytes(s), what, err);
    const int64_t all = s->n * (s->width + s->beside), most = s->max_tokens * (s->width + s->beside);
    for (int64_t at = 0; at < all && st == MOEC_OK; at += most) {
        int64_t n = all - at < most ? all - at : most;
        st = moec_read_all(fd, s->buffer, (size_t)n * sizeof(float), what, err);
        if (st == MOEC_OK)
            st = transfer(s, s->side, true, s->buffer, at, n, err);
    }
    return st;
}

moec_status moec_hidden_resume(const moec_hidden *s, moec_err *err)
{
    if (lseek(s->fd[s->side], 0, SEEK_END) < (off_t)all_bytes(s))
        return moec_fail(err, MOEC_EFORMAT, "hidden states on disk: file ends early");
    return MOEC_OK;
}
