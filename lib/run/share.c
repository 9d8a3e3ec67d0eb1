/* See share.h. */
#include "run/share.h"

#include "base/file.h"
#include "base/log.h"
#include "base/mem.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PIECE = 1 << 20 };

static bool is_shard(const char *name)
{
    static const char tail[] = ".safetensors";
    const size_t n = strlen(name), k = sizeof tail - 1;
    return n > k && strcmp(name + n - k, tail) == 0;
}

/* n bytes, or fewer at the end; -1: errno. */
static ssize_t fill(int fd, unsigned char *to, size_t n)
{
    size_t have = 0;
    while (have < n) {
        const ssize_t got = read(fd, to + have, n - have);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return -1;
        if (got == 0)
            break;
        have += (size_t)got;
    }
    return (ssize_t)have;
}

static moec_status compare(bool *same, const char *a, const char *b, moec_err *err)
{
    moec_status st = MOEC_OK;
    unsigned char *room = NULL;
    int fa = -1, fb = -1;
    *same = false;
    MOEC_TRY(MOEC_NEW(room, 2 * (size_t)PIECE, err));
    if ((fa = open(a, O_RDONLY | O_CLOEXEC)) < 0)
        MOEC_TRY(moec_fail_errno(err, errno, a));
    if ((fb = open(b, O_RDONLY | O_CLOEXEC)) < 0)
        MOEC_TRY(moec_fail_errno(err, errno, b));
    for (;;) {
        MOEC_TRY(moec_interrupted(err));
        const ssize_t na = fill(fa, room, PIECE), nb = fill(fb, room + PIECE, PIECE);
        if (na < 0 || nb < 0)
            MOEC_TRY(moec_fail_errno(err, errno, na < 0 ? a : b));
        if (na != nb || memcmp(room, room + PIECE, (size_t)na) != 0)
            break;
        if (na == 0) {
            *same = true;
            break;
        }
    }
done:
    if (fa >= 0)
        close(fa);
    if (fb >= 0)
        close(fb);
    moec_free(room);
    return st;
}

/* `own` becomes `other`; *made false: there are no links here. */
static moec_status exchange(bool *made, const char *own, const char *other, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *tmp = NULL;
    *made = false;
    MOEC_TRY(moec_format(&tmp, err, "%s.tmp", own));
    (void)unlink(tmp);
    if (link(other, tmp) == 0) {
        *made = rename(tmp, own) == 0;
        if (!*made) {
            st = moec_fail_errno(err, errno, own);
            (void)unlink(tmp);
        }
    } else if (errno != EXDEV && errno != EPERM && errno != EMLINK && errno != EOPNOTSUPP && errno != ENOSYS) {
        st = moec_fail_errno(err, errno, own);
    }
done:
    moec_free(tmp);
    return st;
}

static moec_status share_one(moec_share_report *r, const char *own, const char *other, moec_err *err)
{
    struct stat a, b;
    bool same, made = true;
    if (lstat(own, &a) != 0)
        return moec_fail_errno(err, errno, own);
    if (!S_ISREG(a.st_mode))
        return MOEC_OK;
    r->shards++;
    if (lstat(other, &b) != 0 || !S_ISREG(b.st_mode) || a.st_size != b.st_size)
        return MOEC_OK;
    if (a.st_dev != b.st_dev || a.st_ino != b.st_ino) {
        moec_status st = compare(&same, own, other, err);
        if (st == MOEC_OK && same)
            st = exchange(&made, own, other, err);
        if (st != MOEC_OK || !same)
            return st;
    }
    *(made ? &r->linked : &r->copied) += 1;
    *(made ? &r->linked_bytes : &r->copied_bytes) += (uint64_t)a.st_size;
    return MOEC_OK;
}

moec_status moec_share_files(moec_share_report *out, const char *dir, const char *with, moec_err *err)
{
    moec_status st = MOEC_OK;
    char **names = NULL, *own = NULL, *other = NULL;
    size_t n = 0;
    struct stat a, b;
    *out = (moec_share_report){0};
    if (stat(dir, &a) != 0)
        return moec_fail_errno(err, errno, dir);
    if (stat(with, &b) != 0)
        return moec_fail_errno(err, errno, with);
    if (a.st_dev == b.st_dev && a.st_ino == b.st_ino)
        return moec_fail(err, MOEC_EINVAL, "%s and %s are one folder", dir, with);
    MOEC_TRY(moec_dir_list(&names, &n, dir, err));
    for (size_t i = 0; i < n; i++) {
        if (!is_shard(names[i]))
            continue;
        MOEC_TRY(moec_path_join(&own, dir, names[i], err));
        MOEC_TRY(moec_path_join(&other, with, names[i], err));
        MOEC_TRY(share_one(out, own, other, err));
        moec_free(own);
        moec_free(other);
        own = other = NULL;
    }
    if (out->linked > 0)
        MOEC_TRY(moec_dir_sync(dir, err));
done:
    moec_free(own);
    moec_free(other);
    moec_names_free(names, n);
    return st;
}
