/* The safetensors container: 8 bytes little-endian header length N, N bytes of JSON {name: {dtype, shape, data_offsets}},
 * then the data. Reading is strict, because the file comes from the internet; writing is by moec_st_header and whoever
 * streams the data behind it.
 * Source: the format description of the safetensors project (README, "Format"). */
#ifndef MOEC_CKPT_SAFETENSORS_H
#define MOEC_CKPT_SAFETENSORS_H

#include "num/tensor.h"

#include <stddef.h>

typedef struct moec_st_entry {
    char *name;
    moec_dtype dtype;
    int rank;
    int64_t dim[MOEC_MAX_RANK];
    uint64_t begin, end; /* within the data, end exclusive */
} moec_st_entry;

typedef struct moec_st_index {
    moec_st_entry *entry; /* in the order of their offsets */
    size_t n;
    uint64_t data_at;     /* offset of the data in the file */
    char *metadata;       /* JSON text of __metadata__, or NULL */
} moec_st_index;

/** Parses the front of a file.
 *  @param bytes, size  at least the whole header: the first min(file_size, 8+N) bytes.
 *  @param file_size    length of the file that the offsets must lie in.
 *  @param what         name for error texts.
 *  @return MOEC_OK; MOEC_EFORMAT: header cut short, longer than 100 MB or than the file; not a JSON object from its
 *          first byte; an entry that is not {dtype, shape, data_offsets}; unknown dtype; more than 8
 *          dimensions, a negative one, or a product that overflows; offsets negative, descending, past the file,
 *          overlapping, leaving holes, or of another length than the shape says; a name twice; metadata that is not text
 *          to text. MOEC_ENOMEM.
 *  Release with moec_st_index_release, also after failure. */
MOEC_API moec_status moec_st_parse(moec_st_index *out, const void *bytes, size_t size, uint64_t file_size,
                                   const char *what, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_st_index_release(moec_st_index *ix);

/** Length word and header for n entries whose begin/end are set; padded with spaces to a multiple of 8. `metadata` is
 *  JSON text or NULL (then {"format":"pt"}). Free *out with moec_free. */
MOEC_API moec_status moec_st_header(char **out, size_t *len, const moec_st_entry *entry, size_t n, const char *metadata,
                                    moec_err *err) MOEC_USE_RESULT;

#endif
