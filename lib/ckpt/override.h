/* Weights that take the place of a checkpoint's: a folder of safetensors files, one for each step of the work that makes
 * them (a layer, as a rule), each complete or not there. Tensors are called and shaped as they will be in the output.
 * What repair, merging and the like compute goes in here as it is made, so that memory holds one layer, a killed run
 * continues behind the last file, and the writer of the output takes bytes from it as it takes them from the source. */
#ifndef MOEC_CKPT_OVERRIDE_H
#define MOEC_CKPT_OVERRIDE_H

#include "base/hash.h"
#include "ckpt/shard.h"

typedef struct moec_override moec_override;

/** Opens a folder and maps its *.safetensors files; makes the folder where it is not there and `make` is set.
 *  MOEC_EIO, MOEC_ENOMEM; MOEC_EFORMAT: no such folder, a file that moec_shard_open refuses, a tensor that is in two files.
 *  Close with moec_override_close. */
MOEC_API moec_status moec_override_open(moec_override **out, const char *dir, bool make, moec_err *err) MOEC_USE_RESULT;
/** NULL-safe. Its tensors are gone after it. */
MOEC_API void moec_override_close(moec_override *o);
/** By name; NULL when there is none. Valid until the override is closed. */
MOEC_API const moec_tensor *moec_override_find(const moec_override *o, const char *name);
/** Tensor `name`, which must have this type and shape. MOEC_EFORMAT: it is not there, or has another form. */
MOEC_API moec_status moec_override_get(const moec_tensor **out, const moec_override *o, const char *name, moec_dtype dtype, int rank,
                                       const int64_t *dim, moec_err *err) MOEC_USE_RESULT;
/** Is there a file of this name? */
MOEC_API bool moec_override_has(const moec_override *o, const char *file);
/** Hash of that file's bytes. MOEC_EFORMAT: there is none; MOEC_ENOMEM. Cost: one read. */
MOEC_API moec_status moec_override_file_digest(moec_digest *out, const moec_override *o, const char *file, moec_err *err)
    MOEC_USE_RESULT;
/** Where a tensor's bytes are. */
MOEC_API void moec_override_place(int *fd, uint64_t *at, const moec_override *o, const moec_tensor *t);
/* A file of an override that is being made: its tensors lie in writable maps of the file, so that memory does not bound
 * them; pages can be given back with moec_pages_drop at any time. */
typedef struct moec_sheet moec_sheet;

/** Makes room for n tensors (names, types, shapes and bytes are taken over, data is ignored; zeros) in a file that will be
 *  called `file`, which ends in .safetensors. MOEC_EEXIST: there is such a file; MOEC_ENOFIT: the disk has not that many
 *  bytes; MOEC_EIO, MOEC_ENOMEM. */
MOEC_API moec_status moec_sheet_new(moec_sheet **out, const moec_override *o, const char *file, const moec_tensor *t, size_t n,
                                    moec_err *err) MOEC_USE_RESULT;
/** Tensor i; its data may be written. Borrowed. */
MOEC_API const moec_tensor *moec_sheet_at(const moec_sheet *s, size_t i);
/** Syncs the file, gives it its name and adds it to the override; the sheet is gone. Pointers into it stay valid until the
 *  override is closed. MOEC_EIO, MOEC_ENOMEM, MOEC_EFORMAT (the override has one of the tensors): then the file is gone as
 *  well. */
MOEC_API moec_status moec_sheet_commit(moec_sheet *s, moec_override *o, moec_err *err) MOEC_USE_RESULT;
/** Hash of the file's bytes as they are now; after moec_sheet_commit moec_override_file_digest gives the same. MOEC_ENOMEM.
 *  Cost: one read. */
MOEC_API moec_status moec_sheet_digest(moec_digest *out, const moec_sheet *s, moec_err *err) MOEC_USE_RESULT;
/** Drops it and its file. NULL-safe. */
MOEC_API void moec_sheet_discard(moec_sheet *s);
/** Number of tensors. */
MOEC_API size_t moec_override_count(const moec_override *o);
/** Hash of all names, types, shapes and bytes, in order of the files' names. Cost: one read. */
MOEC_API moec_status moec_override_digest(moec_digest *out, const moec_override *o, moec_err *err) MOEC_USE_RESULT;

#endif
