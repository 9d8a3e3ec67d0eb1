/* Writes a checkpoint folder: a list of shards whose bytes come from ranges of source files or are made, and side files.
 * Everything is written into OUT.partial under a lock, shard by shard (temporary name, sync, rename), read back, hashed, and
 * the folder gets its final name last. What a killed run left in OUT.partial is taken up again when it belongs to the
 * same output, files of another container (moec_out_raw) in their middle too. What the bytes mean is the caller's business (run/apply, run/verify); the source is only ever read. */
#ifndef MOEC_CKPT_WRITER_H
#define MOEC_CKPT_WRITER_H

#include "base/hash.h"
#include "ckpt/safetensors.h"

/* --- the list -------------------------------------------------------------------------------------------------------- */

typedef struct moec_out moec_out;

/** An empty list of shards and files. Free with moec_out_free (not while a writer uses it). MOEC_ENOMEM. */
MOEC_API moec_status moec_out_new(moec_out **out, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_out_free(moec_out *o);
/** A new shard file. `metadata`: JSON text of __metadata__, or NULL for {"format":"pt"}; copied. */
MOEC_API moec_status moec_out_shard(moec_out *o, const char *name, const char *metadata, moec_err *err) MOEC_USE_RESULT;
/** A new tensor behind those that the last shard has. Its bytes follow by moec_out_bytes, in order.
 *  MOEC_EINVAL without a shard or when the tensor before it has not all its bytes. */
MOEC_API moec_status moec_out_tensor(moec_out *o, const char *name, moec_dtype dtype, int rank, const int64_t *dim,
                                     moec_err *err) MOEC_USE_RESULT;
/** The next `length` bytes of the last tensor are those at `from` of the open file `fd` (borrowed). Neighbours are
 *  joined. */
MOEC_API moec_status moec_out_bytes(moec_out *o, int fd, uint64_t from, uint64_t length, moec_err *err) MOEC_USE_RESULT;
/** The next `length` bytes of the last tensor are `size` (1 to 8) bytes over and over. MOEC_EINVAL: length is no
 *  multiple. */
MOEC_API moec_status moec_out_fill(moec_out *o, const void *bytes, size_t size, uint64_t length, moec_err *err)
    MOEC_USE_RESULT;
/* Makes bytes [from, from+n) of something. Called from several threads; `from` is a multiple of 8
 * behind a segment's begin, n too or up to its end; always with the same result. */
typedef moec_status moec_make_fn(void *out, void *ctx, uint64_t from, size_t n, moec_err *err);
/** The next `length` bytes of the last tensor are those from `from` on that `make` makes; ctx is borrowed until
 *  moec_out_free. What decides about these bytes must be in the writer's identity. */
MOEC_API moec_status moec_out_made(moec_out *o, moec_make_fn *make, void *ctx, uint64_t from, uint64_t length,
                                   moec_err *err) MOEC_USE_RESULT;
/** A new file of another container in place of a shard: `header` (copied) and behind it `data` bytes, which follow by
 *  moec_out_bytes, _fill and _made as those of one tensor. */
MOEC_API moec_status moec_out_raw(moec_out *o, const char *name, const void *header, size_t len, uint64_t data,
                                  moec_err *err) MOEC_USE_RESULT;
/** A side file with these bytes (copied). */
MOEC_API moec_status moec_out_text(moec_out *o, const char *name, const char *bytes, size_t len, moec_err *err)
    MOEC_USE_RESULT;
/** A side file that is a copy of the file at `path`. */
MOEC_API moec_status moec_out_copy(moec_out *o, const char *name, const char *path, moec_err *err) MOEC_USE_RESULT;

MOEC_API size_t moec_out_shards(const moec_out *o);
MOEC_API const char *moec_out_shard_name(const moec_out *o, size_t s);
/** Builds the headers; no shard or tensor may be added after it. MOEC_EINVAL: a tensor has not all its bytes. */
MOEC_API moec_status moec_out_close(moec_out *o, moec_err *err) MOEC_USE_RESULT;
/* After moec_out_close: */
MOEC_API const char *moec_out_header(size_t *len, const moec_out *o, size_t s); /* length word and JSON */
MOEC_API uint64_t moec_out_size(const moec_out *o, size_t s);                   /* of the shard file */
MOEC_API uint64_t moec_out_total(moec_out *o);                                  /* all shards and files */

/* --- the writing ----------------------------------------------------------------------------------------------------- */

/** Looks at bytes [lo, hi) of shard s, freshly written and read back: `file` is the whole file, mapped. Called from several
 *  threads. Any failure ends the writing with that error. */
typedef moec_status moec_check_fn(void *ctx, size_t s, const unsigned char *file, uint64_t lo, uint64_t hi,
                                  moec_err *err);

typedef struct moec_writer_options {
    const char *dir;      /* the output folder, or the file */
    const char *magic;    /* NULL: a folder. Else the list is one shard, which becomes the file `dir`; only a file that is empty or
                             begins with these bytes is replaced */
    const char *source;   /* folder that must not be touched, or NULL */
    const char *identity; /* text that says what is being written and from what; decides about resuming */
    bool overwrite;       /* replace an output that is there */
    bool resume;          /* take up what a killed run left */
    moec_check_fn *check; /* or NULL */
    void *ctx;
} moec_writer_options;

typedef struct moec_writer moec_writer;

/** Checks all that can be checked before the first byte and takes OUT.partial.
 *  @return MOEC_OK; MOEC_EEXIST: OUT is there and overwrite was not asked, or it is not a folder that this program
 *          would have written, or OUT.partial is somebody else's; MOEC_EINVAL: OUT is the source, lies in it or holds it; MOEC_ENOFIT:
 *          the disk has fewer free bytes than needed (the text says both); MOEC_EIO: another run holds the lock, ...
 *  Close with moec_writer_close. */
MOEC_API moec_status moec_writer_open(moec_writer **out, moec_out *o, const moec_writer_options *opt, moec_err *err)
    MOEC_USE_RESULT;
/** Writes shards (in parallel, shown as progress in bytes), checks them, then side files.
 *  MOEC_EINTR: can be resumed. MOEC_ENOFIT: the disk became full. MOEC_EIO, and what `check` returns.
 *  Cost: each byte is copied once and read back once. */
MOEC_API moec_status moec_writer_run(moec_writer *w, moec_err *err) MOEC_USE_RESULT;
/** OUT.partial; borrowed. */
MOEC_API const char *moec_writer_dir(const moec_writer *w);
/* What was written so far, shards first: name, bytes and hash. */
MOEC_API size_t moec_writer_files(const moec_writer *w);
MOEC_API const char *moec_writer_file(uint64_t *bytes, moec_digest *hash, const moec_writer *w, size_t i);
/** One more side file, outside the list of moec_writer_files: the manifest that holds that list. */
MOEC_API moec_status moec_writer_add(moec_writer *w, const char *name, const char *bytes, size_t len, moec_err *err)
    MOEC_USE_RESULT;
/** Gives the folder its final name; an old OUT is exchanged with it and removed after. MOEC_EIO, MOEC_EEXIST. */
MOEC_API moec_status moec_writer_publish(moec_writer *w, moec_err *err) MOEC_USE_RESULT;
/** Removes OUT.partial: what was written turned out wrong and must not be taken up again. */
MOEC_API void moec_writer_discard(moec_writer *w);
/** Releases the lock; OUT.partial stays unless it was published. NULL-safe. */
MOEC_API void moec_writer_close(moec_writer *w);

/* Name of the file that marks a folder as unfinished output; never part of a finished one. */
#define MOEC_PARTIAL_MARK ".moecompress-partial"
/* Name of the file that says what a folder was made from. */
#define MOEC_MANIFEST "moecompress.json"

/** Hash and size of a whole file, in pieces. MOEC_EIO. */
MOEC_API moec_status moec_file_digest(moec_digest *out, uint64_t *bytes, const char *path, moec_err *err)
    MOEC_USE_RESULT;
/** Copies `length` bytes between files by the kernel where it can, else through a small buffer. MOEC_EIO, MOEC_ENOFIT;
 *  MOEC_EIO "ends early" when the source is shorter. */
MOEC_API moec_status moec_copy_range(int to, uint64_t at, int fd, uint64_t from, uint64_t length, const char *what,
                                     moec_err *err) MOEC_USE_RESULT;

#endif
