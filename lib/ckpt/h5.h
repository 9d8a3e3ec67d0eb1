/* HDF5 behind our own names, addressed by path: groups, attributes and numeric arrays. h5.c is the only file that sees
 * hdf5.h. Failures of the library become a moec_err and print nothing.
 *
 * Writing is reproducible: no times, fixed format bounds (HDF5 1.10), little-endian types, links and attributes in the
 * order of the calls; the first 512 bytes are left to the caller (a user block, which other programs step over).
 *
 * Reading trusts nothing that can be checked first: the file must be of the form whose metadata has checksums; every link
 * on a path must be a hard link; types, ranks and extents must be the expected ones before anything is allocated; arrays
 * must be stored in the file itself, compressed by shuffle and deflate or not at all, and cannot claim more bytes than
 * their stored ones can expand to. Objects and attributes that are not asked for are ignored.
 * What cannot be checked first is HDF5's own reading of its metadata: release 1.10 can crash on a file that was made to
 * crash it. Damage does not get there (see ckpt/seal.h); a file from an enemy does.
 *
 * Not for use inside parallel loops. Errors name the file and the path in it. */
#ifndef MOEC_CKPT_H5_H
#define MOEC_CKPT_H5_H

#include "num/tensor.h"

#include <stdint.h>

typedef struct moec_h5 moec_h5;

enum { MOEC_H5_FRONT = 512 }; /* bytes of the user block */

/** Makes an empty file, replacing one that is there. MOEC_EIO, MOEC_ENOFIT. Close with moec_h5_close. */
MOEC_API moec_status moec_h5_create(moec_h5 **out, const char *path, moec_err *err) MOEC_USE_RESULT;
/** Opens for reading. MOEC_EIO; MOEC_EFORMAT: not HDF5 behind 512 other bytes, or of the form of before HDF5 1.8. */
MOEC_API moec_status moec_h5_open(moec_h5 **out, const char *path, moec_err *err) MOEC_USE_RESULT;
/** Opens a file's bytes (copied) for reading. MOEC_EFORMAT, MOEC_ENOMEM. */
MOEC_API moec_status moec_h5_open_image(moec_h5 **out, const void *bytes, size_t len, const char *what, moec_err *err)
    MOEC_USE_RESULT;
/** Writes what is pending and releases the handle whatever happens. NULL-safe. MOEC_EIO, MOEC_ENOFIT. */
MOEC_API moec_status moec_h5_close(moec_h5 *h, moec_err *err) MOEC_USE_RESULT;

/* Writing. `path` is absolute ("/meta"); its parent must be there. MOEC_EIO, MOEC_ENOFIT, MOEC_ENOMEM. */
MOEC_API moec_status moec_h5_group(moec_h5 *h, const char *path, moec_err *err) MOEC_USE_RESULT;
/** Values: C order, rank 0 to 8 (0: one value), every dim >= 1. Chunks of at most 1 MiB, shuffle and deflate; rank 0
 *  plain. */
MOEC_API moec_status moec_h5_put_array(moec_h5 *h, const char *path, moec_dtype dtype, int rank, const int64_t *dim,
                                       const void *values, moec_err *err) MOEC_USE_RESULT;
/** The same without chunks and compression: float64 sums with random low bits shrink by a seventh, at 25 MB/s. */
MOEC_API moec_status moec_h5_put_plain(moec_h5 *h, const char *path, moec_dtype dtype, int rank, const int64_t *dim,
                                       const void *values, moec_err *err) MOEC_USE_RESULT;
/* Attributes of a group or array: 64-bit signed integers, float64, UTF-8 text of fixed length (NUL-terminated). */
MOEC_API moec_status moec_h5_put_int(moec_h5 *h, const char *path, const char *name, int64_t v, moec_err *err)
    MOEC_USE_RESULT;
MOEC_API moec_status moec_h5_put_ints(moec_h5 *h, const char *path, const char *name, const int64_t *v, int64_t n,
                                      moec_err *err) MOEC_USE_RESULT;
MOEC_API moec_status moec_h5_put_real(moec_h5 *h, const char *path, const char *name, double v, moec_err *err)
    MOEC_USE_RESULT;
MOEC_API moec_status moec_h5_put_text(moec_h5 *h, const char *path, const char *name, const char *v, moec_err *err)
    MOEC_USE_RESULT;

/* Reading. MOEC_EFORMAT: missing, of another type or extent, out of range, or HDF5 cannot read it. */
/** An array of exactly this type and these extents; *out is allocated, free with moec_free. MOEC_ENOMEM. */
MOEC_API moec_status moec_h5_get_array(void **out, moec_h5 *h, const char *path, moec_dtype dtype, int rank,
                                       const int64_t *dim, moec_err *err) MOEC_USE_RESULT;
/** Values first[i] <= index < first[i] + count[i] of an array of exactly this type and these extents, in C order, into `out`, which
 *  has room for them; NULL: only looks whether the array is there and could be read. Cost: the array's metadata at every call; of
 *  packed arrays whole chunks. MOEC_EINVAL: a part beyond the array. */
MOEC_API moec_status moec_h5_get_part(void *out, moec_h5 *h, const char *path, moec_dtype dtype, int rank, const int64_t *dim,
                                      const int64_t *first, const int64_t *count, moec_err *err) MOEC_USE_RESULT;
MOEC_API moec_status moec_h5_get_int(int64_t *out, moec_h5 *h, const char *path, const char *name, int64_t low,
                                     int64_t high, moec_err *err) MOEC_USE_RESULT;
/** Exactly n values. */
MOEC_API moec_status moec_h5_get_ints(int64_t *out, moec_h5 *h, const char *path, const char *name, int64_t n,
                                      moec_err *err) MOEC_USE_RESULT;
/** A finite number. */
MOEC_API moec_status moec_h5_get_real(double *out, moec_h5 *h, const char *path, const char *name, moec_err *err)
    MOEC_USE_RESULT;
/** Text of at most max_len bytes; free with moec_free. */
MOEC_API moec_status moec_h5_get_text(char **out, moec_h5 *h, const char *path, const char *name, size_t max_len,
                                      moec_err *err) MOEC_USE_RESULT;
/** Names of the links of a group in the order they were made (by name when the file does not keep it), at most max_n of at
 *  most max_len bytes; free with moec_names_free. MOEC_EFORMAT also when there are more or longer ones. */
MOEC_API moec_status moec_h5_list(char ***out, size_t *n, moec_h5 *h, const char *path, size_t max_n, size_t max_len,
                                  moec_err *err) MOEC_USE_RESULT;

#endif
