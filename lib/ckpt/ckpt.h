/* A checkpoint folder as Hugging Face lays it out: config.json, model.safetensors or model.safetensors.index.json with
 * its shards, side files. Opened read-only and mapped; nothing in it is ever written. Tensors are views into the maps. */
#ifndef MOEC_CKPT_CKPT_H
#define MOEC_CKPT_CKPT_H

#include "base/hash.h"
#include "base/json.h"
#include "ckpt/gguf.h"
#include "num/tensor.h"

typedef struct moec_ckpt moec_ckpt;

/** Opens a folder.
 *  @return MOEC_OK; MOEC_EIO (no such folder, unreadable); MOEC_EFORMAT: no config.json, no safetensors; index.json not
 *          of the right form, naming a path outside the folder, a missing shard, or a tensor that its shard does not
 *          hold; a tensor in two shards; an index beside a model.safetensors that it does not name; a shard that
 *          moec_st_parse refuses; config.json above 8 MiB or index.json above 128 MiB. MOEC_ENOMEM. */
MOEC_API moec_status moec_ckpt_open(moec_ckpt **out, const char *dir, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_ckpt_close(moec_ckpt *c);

/* What stands for a folder when the model is a GGUF: tensors as the folder would have them, laid out over the mapped files by
 * somebody who knows the architecture (model/gguf_open.h). */
typedef struct moec_ckpt_parts {
    moec_gguf *gguf;
    char *config;              /* text of config.json */
    moec_tensor *tensor;       /* [n] each name its own */
    uint32_t *file;            /* [n] of the GGUF's; of those in memory any */
    size_t n, cap;
    void *made;                /* mapped memory that some tensors lie in, or NULL */
    size_t made_bytes;
} moec_ckpt_parts;
/** A checkpoint of them. Everything in `parts` is taken over, also after failure. `path` stands for the folder.
 *  MOEC_EFORMAT: a name twice, no tensors, config is no JSON; MOEC_ENOMEM. */
MOEC_API moec_status moec_ckpt_of_gguf(moec_ckpt **out, const char *path, moec_ckpt_parts *parts, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_ckpt_parts_release(moec_ckpt_parts *parts);
/** The GGUF that a checkpoint is of, NULL: a folder. Of a GGUF moec_ckpt_dir is the file, a shard one of its files; offsets, shards'
 *  descriptors and metadata are not for the caller then. */
MOEC_API const moec_gguf *moec_ckpt_gguf(const moec_ckpt *c);
/** MOEC_EFORMAT when a shard's size or time of change is no longer what it was when the folder was opened: what was
 *  read from it since may be of two models. */
MOEC_API moec_status moec_ckpt_unchanged(const moec_ckpt *c, moec_err *err) MOEC_USE_RESULT;

MOEC_API const char *moec_ckpt_dir(const moec_ckpt *c);
MOEC_API const moec_json *moec_ckpt_config(const moec_ckpt *c);      /* parsed config.json */
MOEC_API const char *moec_ckpt_config_text(const moec_ckpt *c);      /* its bytes, NUL-terminated */

/* Tensors, shard by shard in the order of their offsets; those that the index does not list are like others. */
MOEC_API size_t moec_ckpt_count(const moec_ckpt *c);
MOEC_API const moec_tensor *moec_ckpt_at(const moec_ckpt *c, size_t i);
MOEC_API const moec_tensor *moec_ckpt_find(const moec_ckpt *c, const char *name); /* NULL: absent */
MOEC_API size_t moec_ckpt_shard_of(const moec_ckpt *c, size_t i);
/** Offset of tensor i in its shard file. */
MOEC_API uint64_t moec_ckpt_offset(const moec_ckpt *c, size_t i);

/** Copies n bytes at byte `at` of one of its tensors without mapping pages: for places far apart, since a touched page
 *  of a map can bring megabytes around it into resident memory. Of a tensor that is not the checkpoint's (a variant's) from its
 *  data. From any thread. MOEC_EIO. */
MOEC_API moec_status moec_ckpt_read(void *out, const moec_ckpt *c, const moec_tensor *t, size_t at, size_t n, moec_err *err)
    MOEC_USE_RESULT;

MOEC_API size_t moec_ckpt_shards(const moec_ckpt *c);
MOEC_API const char *moec_ckpt_shard_name(const moec_ckpt *c, size_t s);
MOEC_API int moec_ckpt_shard_fd(const moec_ckpt *c, size_t s);               /* borrowed, read-only */
MOEC_API const char *moec_ckpt_shard_metadata(const moec_ckpt *c, size_t s); /* JSON text or NULL */
MOEC_API bool moec_ckpt_is_sharded(const moec_ckpt *c);                      /* has an index.json */
MOEC_API const moec_json *moec_ckpt_index(const moec_ckpt *c);               /* parsed index.json or NULL */
/** Sum of all tensor bytes. */
MOEC_API uint64_t moec_ckpt_bytes(const moec_ckpt *c);

/** Gives the mapped pages of all files back. A page that is touched brings its neighbours, of which those of other tensors may stay. */
MOEC_API void moec_ckpt_drop(const moec_ckpt *c);

/** Identity of the model: config.json without its whitespace is not enough and all bytes are too many, so this hashes, in
 *  name order, every tensor's name, dtype, shape and 64 bytes at its start, middle and end.
 *  Cost: three pages read per tensor. */
MOEC_API moec_status moec_ckpt_fingerprint(moec_digest *out, const moec_ckpt *c, moec_err *err) MOEC_USE_RESULT;

#endif
