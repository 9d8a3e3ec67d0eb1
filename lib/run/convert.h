/* A model that is open from a GGUF, written as a folder of Hugging Face's form. */
#ifndef MOEC_RUN_CONVERT_H
#define MOEC_RUN_CONVERT_H

#include "model/model.h"

typedef struct moec_convert_options {
    const char *out;      /* folder to write; NULL: only the result is filled in */
    moec_dtype dtype;     /* MOEC_BF16, F16 or F32; MOEC_DTYPE_COUNT: that of the experts where it is one of these, else BF16 */
    uint64_t shard_bytes; /* most bytes of tensors in a file, but at least one tensor; 0: one file */
    bool overwrite, resume;
} moec_convert_options;

typedef struct moec_convert_result {
    moec_dtype dtype;
    uint64_t source_bytes, bytes, tensors, shards, disk_bytes; /* bytes: of tensors; disk_bytes: of all files */
    bool quantized;       /* the source has matrices in blocks: what is written are their values, rounded once more */
    bool tokenizer;
} moec_convert_result;

/** Writes config.json, model.safetensors (or shards and their index), tokenizer.json, tokenizer_config.json and
 *  generation_config.json. Tensors have the names of the family's releases and its shapes: one an expert, of gpt-oss the joined
 *  ones [E, H, 2I] and [E, I, H]. All have one type, each value rounded to nearest even, but for the bias that corrects the choice of
 *  experts, which stays F32 as in releases. A GGUF that was written of F32, F16 or BF16 without quantizing gives the values of the
 *  checkpoint that it was made from. The folder is opened as a model before it gets its name. The same file gives the same bytes.
 *  @return MOEC_OK; MOEC_EINVAL: the model is a folder, or another dtype; MOEC_ENUMERIC: a value is not finite or beyond the type;
 *          what moec_writer_open, moec_writer_run and moec_gguf_words_make return.
 *  Cost: the source is read once, the output written and read back once. Memory: some MiB a thread. */
MOEC_API moec_status moec_convert(moec_convert_result *result, const moec_model *m, const moec_convert_options *opt, moec_err *err)
    MOEC_USE_RESULT;

#endif
