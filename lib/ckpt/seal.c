/* The 512-byte seal at the front of a file: written last, checked first. */
#include "ckpt/seal.h"

#include "base/file.h"
#include "base/hash.h"
#include "base/mem.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static void render(char out[MOEC_SEAL_BYTES], const char *title, const char *hex, uint64_t bytes)
{
    memset(out, 0, MOEC_SEAL_BYTES);
    snprintf(out, MOEC_SEAL_BYTES, "%s\nseal 1\nxxh3-128 %s\nbytes %020" PRIu64 "\n", title, hex, bytes);
}

/* Reads up to 512 bytes at the front; *n is how many there are. */
static moec_status read_front(char out[MOEC_SEAL_BYTES], size_t *n, int fd, const char *path, moec_err *err)
{
    for (*n = 0; *n < MOEC_SEAL_BYTES;) {
        ssize_t got = pread(fd, out + *n, MOEC_SEAL_BYTES - *n, (off_t)*n);
        if (got < 0 && errno != EINTR)
            return moec_fail_errno(err, errno, path);
        if (got == 0)
            break;
        *n += got > 0 ? (size_t)got : 0;
    }
    return MOEC_OK;
}

/* Does a file of this title begin like this? Told apart from damage, for a person who named the wrong file. */
static moec_status check_title(const char *front, size_t n, const char *title, const char *what, moec_err *err)
{
    size_t len = strlen(title);
    if (n < MOEC_SEAL_BYTES || memcmp(front, title, len) != 0 || front[len] != '\n')
        return moec_fail(err, MOEC_EFORMAT, "%s: not a file of %s", what, title);
    return MOEC_OK;
}

static moec_status check_front(const char *front, const char *title, const char *hex, uint64_t bytes, const char *what,
                               moec_err *err)
{
    char want[MOEC_SEAL_BYTES];
    render(want, title, hex, bytes);
    if (memcmp(front, want, MOEC_SEAL_BYTES) != 0)
        return moec_fail(err, MOEC_EFORMAT,
                         "%s: damaged: its %" PRIu64 " bytes are not those it was sealed with, or another program "
                         "changed it", what, bytes);
    return MOEC_OK;
}

moec_status moec_seal_write(const char *path, const char *title, moec_err *err)
{
    char front[MOEC_SEAL_BYTES];
    moec_digest hash;
    uint64_t bytes;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return moec_fail_errno(err, errno, path);
    moec_status st = moec_hash_file(&hash, &bytes, fd, MOEC_SEAL_BYTES, path, err);
    if (st == MOEC_OK)
        render(front, title, hash.hex, bytes);
    for (size_t at = 0; st == MOEC_OK && at < sizeof front;) {
        ssize_t n = pwrite(fd, front + at, sizeof front - at, (off_t)at);
        if (n < 0 && errno != EINTR)
            st = moec_fail_errno(err, errno, path);
        at += n > 0 ? (size_t)n : 0;
    }
    if (close(fd) != 0 && st == MOEC_OK)
        st = moec_fail_errno(err, errno, path);
    return st;
}

moec_status moec_seal_check(const char *path, const char *title, moec_err *err)
{
    moec_status st = MOEC_OK;
    char front[MOEC_SEAL_BYTES];
    moec_digest hash;
    uint64_t bytes;
    size_t n;
    struct stat s;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe must not make this wait */
    if (fd < 0)
        return moec_fail_errno(err, errno, path);
    if (fstat(fd, &s) != 0)
        st = moec_fail_errno(err, errno, path);
    else if (!S_ISREG(s.st_mode))
        st = moec_fail(err, MOEC_EFORMAT, "%s: not a regular file", path);
    if (st != MOEC_OK)
        goto done;
    MOEC_TRY(read_front(front, &n, fd, path, err));
    MOEC_TRY(check_title(front, n, title, path, err));
    MOEC_TRY(moec_hash_file(&hash, &bytes, fd, MOEC_SEAL_BYTES, path, err));
    MOEC_TRY(check_front(front, title, hash.hex, bytes, path, err));
done:
    close(fd);
    return st;
}

moec_status moec_seal_check_bytes(const void *bytes, size_t len, const char *title, const char *what, moec_err *err)
{
    const char *front = bytes;
    moec_status st = check_title(front, len, title, what, err);
    if (st != MOEC_OK)
        return st;
    moec_digest hash = moec_hash_bytes(front + MOEC_SEAL_BYTES, len - MOEC_SEAL_BYTES);
    return check_front(front, title, hash.hex, len, what, err);
}
