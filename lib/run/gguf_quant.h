/* A model as quantized GGUF: the description with its size, known before a weight is read, and the writing of it. */
#ifndef MOEC_RUN_GGUF_QUANT_H
#define MOEC_RUN_GGUF_QUANT_H

#include "run/gguf_importance.h"
#include "run/gguf_model.h"

/* What besides the model stands in the file. */
typedef struct moec_gguf_quant_opts {
    const char *name;        /* general.name, and of the files in a folder */
    const char *asked;       /* moecompress.request: by what types were chosen, "--bits 4" */
    double bits, cost;       /* moecompress.bits, moecompress.expected_kl (left out: NAN) */
    int64_t tokens;          /* moecompress.tokens: that importance and costs come from (left out: 0) */
    const char *fingerprint; /* moecompress.source: of the checkpoint */
    uint64_t shard_bytes;    /* 0: one file */
} moec_gguf_quant_opts;

typedef struct moec_gguf_quant moec_gguf_quant;

/** Describes the files of a model whose tensors have their types (moec_gguf_model_set_type): keys of moec_gguf_model_describe,
 *  general.quantized_by, moecompress.*, and `tokenizer`, a description that has the tokenizer's keys (moec_gguf_tokenizer). x is borrowed.
 *  MOEC_EINVAL as moec_gguf_out_close, MOEC_ENOMEM. Free with moec_gguf_quant_free. */
MOEC_API moec_status moec_gguf_quant_new(moec_gguf_quant **out, const moec_gguf_model *x, const moec_gguf_out *tokenizer,
                                         const moec_gguf_quant_opts *o, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_gguf_quant_free(moec_gguf_quant *q);
MOEC_API size_t moec_gguf_quant_files(const moec_gguf_quant *q);
MOEC_API uint64_t moec_gguf_quant_size(const moec_gguf_quant *q); /* bytes of all of them, moecompress.json with them */

typedef struct moec_gguf_quant_where {
    const char *out;      /* OUT.gguf; with shard_bytes a folder of NAME-00001-of-0000N.gguf and moecompress.json */
    const char *source;   /* folder that must not be touched */
    const char *identity; /* what decides about the bytes besides the description: model and statistics */
    bool overwrite, resume;
} moec_gguf_quant_where;
/** Writes it: rows are read as float32, weighed by `importance` (NULL: 1) and written by moec_blocks_write. Into OUT.partial, published
 *  by renaming; a run that was stopped is continued at the rows where it stopped. The same bytes for any number of threads.
 *  @return as moec_writer_open and moec_writer_run; MOEC_ENUMERIC: a value that is not finite or too large for its type.
 *  Memory: a thread a buffer of rows, 3 MiB or one row; of k_b a head. Pages of the checkpoint are given back. */
MOEC_API moec_status moec_gguf_quant_write(moec_gguf_quant *q, const moec_gguf_importance *importance, const moec_gguf_quant_where *w,
                                           moec_err *err) MOEC_USE_RESULT;

/* moec_gguf_rows_fn whose ctx this is. */
typedef struct moec_gguf_quant_source {
    moec_gguf_model *x;
    const moec_gguf_importance *importance; /* or NULL */
} moec_gguf_quant_source;
MOEC_API moec_status moec_gguf_quant_rows(void *out, void *ctx, size_t t, int64_t lo, int64_t hi, moec_err *err);
/** The block type of a tensor's type; MOEC_BLOCK_COUNT: none of num/blocks.h. */
MOEC_API moec_block moec_gguf_quant_block(uint32_t type);

#endif
