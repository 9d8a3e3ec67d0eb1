/* 128-bit content hashes (XXH3, as printed by `xxhsum -H2`), for recognising files and checking copies; not a signature. */
#ifndef MOEC_BASE_HASH_H
#define MOEC_BASE_HASH_H

#include "base/err.h"

#include <stdint.h>

typedef struct moec_hash moec_hash;
typedef struct moec_digest { char hex[33]; } moec_digest;

MOEC_API moec_status moec_hash_new(moec_hash **out, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_hash_add(moec_hash *h, const void *bytes, size_t n);
/** Adds the text and its length, so that ("ab","c") and ("a","bc") differ. */
MOEC_API void moec_hash_text(moec_hash *h, const char *text);
MOEC_API moec_digest moec_hash_digest(const moec_hash *h);
MOEC_API void moec_hash_free(moec_hash *h);
/** Digest of an open file's bytes from offset `from` to its end; *end is that end's offset. `what` names it in errors.
 *  MOEC_EIO, MOEC_ENOMEM. */
MOEC_API moec_status moec_hash_file(moec_digest *out, uint64_t *end, int fd, uint64_t from, const char *what,
                                    moec_err *err) MOEC_USE_RESULT;
MOEC_API moec_digest moec_hash_bytes(const void *bytes, size_t n);

#endif
