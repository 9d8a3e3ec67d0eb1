/* One safetensors file, open and mapped read-only. */
#ifndef MOEC_CKPT_SHARD_H
#define MOEC_CKPT_SHARD_H

#include "base/hash.h"
#include "ckpt/safetensors.h"

#include <time.h>

typedef struct moec_shard {
    char *name; /* in its folder */
    int fd;
    unsigned char *map;
    size_t size;
    struct timespec changed; /* when it was opened */
    moec_st_index ix;
} moec_shard;

/** Opens DIR/NAME. MOEC_EFORMAT: it is not there, no regular file, what moec_st_parse refuses; MOEC_EIO, MOEC_ENOMEM.
 *  Release with moec_shard_close, also after failure. */
MOEC_API moec_status moec_shard_open(moec_shard *out, const char *dir, const char *name, moec_err *err) MOEC_USE_RESULT;
/** Of a zeroed one too. */
MOEC_API void moec_shard_close(moec_shard *s);
/** Tensor i of its index, a view into the map. */
MOEC_API moec_tensor moec_shard_tensor(const moec_shard *s, size_t i);
/** Adds what a tensor is, not its bytes: name, type, shape. */
MOEC_API void moec_tensor_hash(moec_hash *h, const moec_tensor *t);

#endif
