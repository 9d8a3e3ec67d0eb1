/* What h5.c needs and does not take from the library: a look at a file before it is opened, the choice of chunks,
 * bytes in and out of a file. */
#ifndef MOEC_CKPT_H5_FRONT_H
#define MOEC_CKPT_H5_FRONT_H

#include "base/err.h"

#include <stdint.h>

/** MOEC_EFORMAT unless HDF5 of the newer form (superblock 2 or 3) begins behind the user block. */
moec_status moec__h5_front_check(const void *bytes, size_t len, const char *what, moec_err *err) MOEC_USE_RESULT;
/** The same for a file; *size is its length. MOEC_EIO. */
moec_status moec__h5_front_read(uint64_t *size, const char *path, moec_err *err) MOEC_USE_RESULT;

/** Bytes of a file; those that are not there or cannot be read are zeros. */
void moec__h5_bytes_get(void *to, int fd, uint64_t at, size_t size);
/** Writes them all; 0 or the errno of what failed. */
int moec__h5_bytes_put(int fd, uint64_t at, const void *from, size_t size);

/** Extents of the chunks to write an array in: at most 1 MiB each, and the longest runs of whole rows that fit. */
void moec__h5_chunk(unsigned long long *chunk, int rank, const int64_t *dim, size_t cell);

#endif
