/* Inside of moec_gguf_ckpt, shared by gguf_open.c (tensors) and gguf_config.c (keys). */
#ifndef MOEC_MODEL_GGUF_READ_H
#define MOEC_MODEL_GGUF_READ_H

#include "model/gguf_open.h"

typedef struct moec_gguf_reader {
    const char *path;
    const moec_gguf *g;
    const moec_gguf_index *ix; /* keys */
    const moec_family *f;
    int64_t blocks, layers;    /* layers: without those of multi-token prediction, which come behind */
    int64_t experts, hidden, heads;
    bool latent;
    int64_t nope, value, kv_rank; /* of latent attention */
} moec_gguf_reader;

/** Finds the family and makes the text of config.json; *out is the caller's. MOEC_EFORMAT, MOEC_ENOMEM. */
moec_status moec__gguf_config(char **out, moec_gguf_reader *r, moec_err *err) MOEC_USE_RESULT;
/** The tensor "blk.0.NAME" or of the first layer that has it; NULL: none has. */
const moec_gguf_tensor *moec__gguf_first(const moec_gguf_reader *r, const char *name);

#endif
