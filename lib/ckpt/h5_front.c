/* Looks at the first bytes of an HDF5 file, since the library itself is not safe with every form of one; bytes in and
 * out of a file; chunk sizes. */
#include "ckpt/h5_front.h"

#include "base/file.h"
#include "ckpt/h5.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* The signature, then the superblock's version. Versions 0 and 1, which we never write, lead to metadata without
 * checksums, where one flipped bit makes HDF5 1.10 run off its buffers. */
enum { SIGNATURE = 8, NEEDED = MOEC_H5_FRONT + SIGNATURE + 1 };

moec_status moec__h5_front_check(const void *bytes, size_t len, const char *what, moec_err *err)
{
    static const char signature[SIGNATURE + 1] = "\x89HDF\r\n\x1a\n";
    const char *at = (const char *)bytes + MOEC_H5_FRONT;
    if (len < NEEDED || memcmp(at, signature, SIGNATURE) != 0 || (at[SIGNATURE] != 2 && at[SIGNATURE] != 3))
        return moec_fail(err, MOEC_EFORMAT, "%s: no HDF5 of the newer form behind its first %d bytes", what,
                         MOEC_H5_FRONT);
    return MOEC_OK;
}

moec_status moec__h5_front_read(uint64_t *size, const char *path, moec_err *err)
{
    char front[NEEDED];
    struct stat s;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return moec_fail_errno(err, errno, path);
    ssize_t n = fstat(fd, &s) == 0 ? pread(fd, front, sizeof front, 0) : -1;
    int errnum = errno;
    close(fd);
    if (n < 0)
        return moec_fail_errno(err, errnum, path);
    *size = (uint64_t)s.st_size;
    return moec__h5_front_check(front, (size_t)n, path, err);
}

void moec__h5_bytes_get(void *to, int fd, uint64_t at, size_t size)
{
    for (size_t done = 0; done < size;) {
        ssize_t n = pread(fd, (char *)to + done, size - done, (off_t)(at + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            memset((char *)to + done, 0, size - done);
            break;
        }
        done += (size_t)n;
    }
}

int moec__h5_bytes_put(int fd, uint64_t at, const void *from, size_t size)
{
    for (size_t done = 0; done < size;) {
        ssize_t n = pwrite(fd, (const char *)from + done, size - done, (off_t)(at + done));
        if (n < 0 && errno != EINTR)
            return errno;
        done += n > 0 ? (size_t)n : 0;
    }
    return 0;
}

void moec__h5_chunk(unsigned long long *chunk, int rank, const int64_t *dim, size_t cell)
{
    unsigned long long room = (1u << 20) / cell;
    for (int i = rank - 1; i >= 0; i--) { /* leading axes are cut first */
        unsigned long long n = (unsigned long long)dim[i] < room ? (unsigned long long)dim[i] : room;
        chunk[i] = n > 0 ? n : 1;
        room /= chunk[i];
    }
}
