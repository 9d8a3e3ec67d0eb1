/* Writing GGUF (ckpt/gguf.h): keys and tensors are described first, so that every file's size is known before its first
 * byte; tensor data is then made row by row, never held whole. */
#ifndef MOEC_CKPT_GGUF_WRITE_H
#define MOEC_CKPT_GGUF_WRITE_H

#include "ckpt/gguf.h"
#include "ckpt/writer.h"

typedef struct moec_gguf_out moec_gguf_out;

/** An empty description. Free with moec_gguf_out_free. MOEC_ENOMEM. */
MOEC_API moec_status moec_gguf_out_new(moec_gguf_out **out, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_gguf_out_free(moec_gguf_out *g);

/* Keys, in the order in which they shall stand; everything is copied. What goes wrong (a key twice, empty or too long,
 * MOEC_EINVAL; MOEC_ENOMEM) is remembered and told by moec_gguf_out_close. "general.alignment" and "split.*" are not for
 * the caller: alignment is 32. */
MOEC_API void moec_gguf_put_u32(moec_gguf_out *g, const char *key, uint32_t v);
MOEC_API void moec_gguf_put_i32(moec_gguf_out *g, const char *key, int32_t v);
MOEC_API void moec_gguf_put_f32(moec_gguf_out *g, const char *key, float v);
MOEC_API void moec_gguf_put_bool(moec_gguf_out *g, const char *key, bool v);
MOEC_API void moec_gguf_put_text(moec_gguf_out *g, const char *key, const char *utf8);
MOEC_API void moec_gguf_put_i32s(moec_gguf_out *g, const char *key, const int32_t *v, size_t n);
MOEC_API void moec_gguf_put_u32s(moec_gguf_out *g, const char *key, const uint32_t *v, size_t n);
MOEC_API void moec_gguf_put_f32s(moec_gguf_out *g, const char *key, const float *v, size_t n);
MOEC_API void moec_gguf_put_bools(moec_gguf_out *g, const char *key, const bool *v, size_t n);
MOEC_API void moec_gguf_put_texts(moec_gguf_out *g, const char *key, const char *const *utf8, size_t n);
/** Copies of all keys of another description, which is not closed yet or is. */
MOEC_API void moec_gguf_put_keys(moec_gguf_out *g, const moec_gguf_out *from);
/** A tensor behind the others; dim INNERMOST first. Remembered likewise: MOEC_EINVAL: a name twice, empty or above 63 bytes,
 *  an unknown type, a rank outside 1..4, a negative dimension, a row that is not whole blocks, a size that overflows. */
MOEC_API void moec_gguf_put_tensor(moec_gguf_out *g, const char *name, uint32_t type, int rank, const int64_t *dim);

/** Lays the tensors out in files of at most `shard_bytes` of data (0: one file), at least one tensor each, and builds the
 *  headers. Of several files the first has the keys, all have split.no, split.count and split.tensors.count, as
 *  llama-gguf-split writes them. Nothing may be added after it.
 *  MOEC_EINVAL: what was remembered; more than 65535 files. MOEC_ENOMEM. */
MOEC_API moec_status moec_gguf_out_close(moec_gguf_out *g, uint64_t shard_bytes, moec_err *err) MOEC_USE_RESULT;
/* After it: */
MOEC_API size_t moec_gguf_out_files(const moec_gguf_out *g);
MOEC_API uint64_t moec_gguf_out_size(const moec_gguf_out *g, size_t file); /* bytes of the whole file */
/** What stands in front of a file's data; borrowed. */
MOEC_API const void *moec_gguf_out_header(size_t *len, const moec_gguf_out *g, size_t file);
/** Name of a file: "STEM.gguf", of several "STEM-00001-of-00003.gguf". Free with moec_free. MOEC_ENOMEM. */
MOEC_API moec_status moec_gguf_out_name(char **out, const moec_gguf_out *g, const char *stem, size_t file, moec_err *err)
    MOEC_USE_RESULT;

/* Makes rows [lo, hi) of tensor `t`, counted over all dimensions but the innermost, in the tensor's type. Called from
 * several threads, always with the same result. */
typedef moec_status moec_gguf_rows_fn(void *out, void *ctx, size_t t, int64_t lo, int64_t hi, moec_err *err);

/** Adds the files to a list for moec_writer, which locks, checks, resumes and publishes. `g` and ctx are borrowed until
 *  moec_out_free. MOEC_EINVAL, MOEC_ENOMEM. */
MOEC_API moec_status moec_gguf_out_plan(moec_out *o, moec_gguf_out *g, const char *stem, moec_gguf_rows_fn *rows, void *ctx,
                                        moec_err *err) MOEC_USE_RESULT;
/** Writes a description of one file to `path`: aside as PATH.tmp, synced, renamed. For small files; no resuming.
 *  MOEC_EINVAL: it has several files; MOEC_EIO, MOEC_ENOFIT, MOEC_ENOMEM, MOEC_EINTR, what `rows` returns: then PATH is as it was.
 *  Memory: 4 MiB or a row, for each thread. */
MOEC_API moec_status moec_gguf_write(const char *path, const moec_gguf_out *g, moec_gguf_rows_fn *rows, void *ctx,
                                     moec_err *err) MOEC_USE_RESULT;

#endif
