/* Whole-file reads and writes, atomic publication, folders. */
#include "base/file.h"

#include "base/mem.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

moec_status moec_fail_errno(moec_err *err, int errnum, const char *what)
{
    char reason[128];
    const char *text = strerror_r(errnum, reason, sizeof reason); /* GNU form: may not use the buffer */
    moec_status code = errnum == ENOSPC || errnum == EDQUOT || errnum == EFBIG ? MOEC_ENOFIT : MOEC_EIO;
    return moec_fail(err, code, "%s: %s", what, text);
}

const char *moec_scratch_dir(void)
{
    const char *dir = getenv("TMPDIR");
    return dir && *dir ? dir : "/tmp";
}

moec_status moec_file_scratch(void **out, size_t n, const char *what, moec_err *err)
{
    moec_status st = MOEC_OK;
    char text[192], *path = NULL;
    int fd = -1;
    *out = NULL;
    snprintf(text, sizeof text, "%.60s: a temporary file for %.100s", moec_scratch_dir(), what);
    if (n > INT64_MAX)
        return moec_fail_errno(err, EFBIG, text);
    MOEC_TRY(moec_format(&path, err, "%s/moecompress-XXXXXX", moec_scratch_dir()));
    fd = mkstemp(path);
    int cause = fd < 0 ? errno : 0;
    if (cause == 0) {
        (void)unlink(path);
        cause = ftruncate(fd, (off_t)n) != 0 ? errno : posix_fallocate(fd, 0, (off_t)n); /* a full disk shows here, not as a signal */
        if (cause == EOPNOTSUPP || cause == EINVAL)
            cause = 0;
    }
    void *map = cause == 0 ? mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) : MAP_FAILED;
    if (map != MAP_FAILED)
        *out = map;
    else
        st = moec_fail_errno(err, cause != 0 ? cause : errno, text);
done:
    if (fd >= 0)
        close(fd);
    moec_free(path);
    return st;
}

void moec_file_scratch_free(void *at, size_t n)
{
    if (at)
        munmap(at, n);
}

moec_status moec_file_read(char **out, size_t *len, const char *path, size_t max_bytes, moec_err *err)
{
    moec_status st = MOEC_OK;
    *out = NULL;
    *len = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe must not make this wait */
    struct stat s;
    if (fd < 0)
        return moec_fail_errno(err, errno, path);
    if (fstat(fd, &s) != 0) {
        st = moec_fail_errno(err, errno, path);
        goto done;
    }
    if (!S_ISREG(s.st_mode)) {
        st = moec_fail(err, MOEC_EFORMAT, "%s: not a regular file", path);
        goto done;
    }
    if ((uint64_t)s.st_size > max_bytes) {
        st = moec_fail(err, MOEC_EFORMAT, "%s: %lld bytes, at most %zu were expected", path, (long long)s.st_size,
                       max_bytes);
        goto done;
    }
    size_t size = (size_t)s.st_size;
    MOEC_TRY(moec_alloc((void **)out, size + 1, 1, err));
    while (*len < size) {
        ssize_t n = read(fd, *out + *len, size - *len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            st = moec_fail_errno(err, errno, path);
            goto done;
        }
        if (n == 0)
            break; /* shorter than it was a moment ago */
        *len += (size_t)n;
    }
    (*out)[*len] = '\0';
done:
    if (st != MOEC_OK) {
        moec_free(*out);
        *out = NULL;
        *len = 0;
    }
    close(fd);
    return st;
}

moec_status moec_dir_sync(const char *path, moec_err *err)
{
    path = *path ? path : ".";
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return moec_fail_errno(err, errno, path);
    int failed = fsync(fd), errnum = errno;
    close(fd);
    /* Some file systems cannot sync a folder; there is nothing more to be done there. */
    if (failed != 0 && errnum != EINVAL && errnum != ENOTSUP)
        return moec_fail_errno(err, errnum, path);
    return MOEC_OK;
}

static moec_status sync_parent(const char *path, moec_err *err)
{
    char *dir;
    const char *slash = strrchr(path, '/');
    moec_status st = moec_copy(&dir, path, slash ? (size_t)(slash - path) + (slash == path) : 0, err);
    if (st == MOEC_OK)
        st = moec_dir_sync(dir, err);
    moec_free(dir);
    return st;
}

moec_status moec_file_publish(const char *tmp, const char *path, moec_err *err)
{
    int fd = open(tmp, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return moec_fail_errno(err, errno, tmp);
    int failed = fsync(fd), errnum = errno;
    close(fd);
    if (failed != 0)
        return moec_fail_errno(err, errnum, tmp);
    if (rename(tmp, path) != 0)
        return moec_fail_errno(err, errno, path);
    return sync_parent(path, err);
}

moec_status moec_file_write(const char *path, const void *bytes, size_t len, moec_err *err)
{
    char *tmp;
    moec_status st = moec_format(&tmp, err, "%s.tmp", path);
    if (st != MOEC_OK)
        return st;
    int fd = open(tmp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) {
        st = moec_fail_errno(err, errno, tmp);
        goto done;
    }
    for (size_t at = 0; st == MOEC_OK && at < len;) {
        ssize_t n = write(fd, (const char *)bytes + at, len - at);
        if (n < 0 && errno != EINTR)
            st = moec_fail_errno(err, errno, tmp);
        else if (n > 0)
            at += (size_t)n;
    }
    if (close(fd) != 0 && st == MOEC_OK)
        st = moec_fail_errno(err, errno, tmp);
    if (st == MOEC_OK)
        st = moec_file_publish(tmp, path, err);
    if (st != MOEC_OK)
        unlink(tmp);
done:
    moec_free(tmp);
    return st;
}

moec_status moec_path_join(char **out, const char *dir, const char *name, moec_err *err)
{
    bool slash = dir && *dir && dir[strlen(dir) - 1] != '/';
    return moec_format(out, err, "%s%s%s", dir ? dir : "", slash ? "/" : "", name);
}

const char *moec_path_base(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

bool moec_path_is_plain(const char *name)
{
    return *name && !strchr(name, '/') && strcmp(name, ".") != 0 && strcmp(name, "..") != 0;
}

bool moec_path_exists(const char *path)
{
    struct stat s;
    return lstat(path, &s) == 0;
}

bool moec_path_is_dir(const char *path)
{
    struct stat s;
    return stat(path, &s) == 0 && S_ISDIR(s.st_mode);
}

moec_status moec_dir_make(const char *path, moec_err *err)
{
    char *p;
    moec_status st = moec_copy(&p, path, strlen(path), err);
    if (st != MOEC_OK)
        return st;
    for (char *c = p + (*p != '\0');; c++) {
        char keep = *c;
        if (keep != '/' && keep != '\0')
            continue;
        *c = '\0';
        if (mkdir(p, 0777) != 0 && errno != EEXIST) {
            st = moec_fail_errno(err, errno, p);
            break;
        }
        if (keep == '\0')
            break;
        *c = keep;
    }
    if (st == MOEC_OK && !moec_path_is_dir(path))
        st = moec_fail(err, MOEC_EEXIST, "%s: is there and is not a folder", path);
    moec_free(p);
    return st;
}

static moec_status remove_at(int parent, const char *name, int depth, moec_err *err)
{
    if (depth > 64)
        return moec_fail(err, MOEC_EIO, "%s: folders nested too deep to remove", name);
    if (unlinkat(parent, name, 0) == 0 || errno == ENOENT)
        return MOEC_OK;
    int refused = errno;
    if (refused != EISDIR && refused != EPERM)
        return moec_fail_errno(err, refused, name);
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *d = fd < 0 ? NULL : fdopendir(fd);
    if (!d) {
        moec_status st = moec_fail_errno(err, errno == ENOTDIR ? refused : errno, name);
        if (fd >= 0)
            close(fd);
        return st;
    }
    moec_status st = MOEC_OK;
    for (struct dirent *e; st == MOEC_OK && (e = readdir(d)) != NULL;)
        if (moec_path_is_plain(e->d_name))
            st = moec_within(err, remove_at(fd, e->d_name, depth + 1, err), "%s", name);
    closedir(d);
    if (st == MOEC_OK && unlinkat(parent, name, AT_REMOVEDIR) != 0)
        st = moec_fail_errno(err, errno, name);
    return st;
}

moec_status moec_dir_remove(const char *path, moec_err *err)
{
    return remove_at(AT_FDCWD, path, 0, err);
}

static int by_bytes(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

moec_status moec_dir_list(char ***out, size_t *n, const char *path, moec_err *err)
{
    moec_status st = MOEC_OK;
    size_t cap = 0;
    *out = NULL;
    *n = 0;
    DIR *d = opendir(path);
    if (!d)
        return moec_fail_errno(err, errno, path);
    for (;;) {
        errno = 0;
        const struct dirent *e = readdir(d);
        if (!e && errno != 0)
            MOEC_TRY(moec_fail_errno(err, errno, path));
        if (!e)
            break;
        if (!moec_path_is_plain(e->d_name))
            continue;
        MOEC_TRY(MOEC_GROW(*out, cap, *n + 1, err));
        MOEC_TRY(moec_copy(&(*out)[*n], e->d_name, strlen(e->d_name), err));
        ++*n;
    }
    if (*n > 0)
        qsort(*out, *n, sizeof **out, by_bytes);
done:
    closedir(d);
    if (st != MOEC_OK) {
        moec_names_free(*out, *n);
        *out = NULL;
        *n = 0;
    }
    return st;
}

void moec_names_free(char **names, size_t n)
{
    for (size_t i = 0; i < n; i++)
        moec_free(names[i]);
    moec_free(names);
}

moec_status moec_disk_free(uint64_t *out, const char *path, moec_err *err)
{
    char *p;
    if (!*path)
        path = ".";
    moec_status st = moec_copy(&p, path, strlen(path), err);
    if (st != MOEC_OK)
        return st;
    while (!moec_path_exists(p)) { /* the output is not there yet: ask for the folder it will be in */
        char *slash = strrchr(p, '/');
        if (!slash) {
            strcpy(p, ".");
            break;
        }
        slash[slash == p ? 1 : 0] = '\0';
    }
    struct statvfs v;
    if (statvfs(p, &v) != 0)
        st = moec_fail_errno(err, errno, p);
    else
        *out = (uint64_t)v.f_bavail * v.f_frsize;
    moec_free(p);
    return st;
}
