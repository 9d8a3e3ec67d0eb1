/* Inside of the writer: where an output goes. Paths, the lock, what an earlier run left, the final rename. */
#ifndef MOEC_CKPT_PLACE_H
#define MOEC_CKPT_PLACE_H

#include "ckpt/writer.h"

typedef struct moec_place_out {
    char *dir, *partial;
    int lock; /* open folder OUT.partial that the lock is on, or -1 */
    const char *magic;  /* NULL: OUT is a folder, else a file that begins so */
    bool overwrite, fresh; /* fresh: nothing of an earlier run is left to take up */
} moec_place_out;

/** Would OUT be refused? The checks of moec_place_take that need no folder. MOEC_EINVAL, MOEC_EEXIST as moec_writer_open. */
MOEC_API moec_status moec_place_check(const moec_writer_options *opt, moec_err *err) MOEC_USE_RESULT;
/** Checks OUT and takes OUT.partial. `mark`: identity of the output; what an unfinished output of another identity holds is
 *  removed, and so is everything in one of the same identity but files that `keep` says are complete (name, size).
 *  need_bytes: for the disk check; complete files count as there. Errors: moec_writer_open.
 *  Release with moec_place_release, also after failure. */
typedef bool moec_keep_fn(void *ctx, const char *name, uint64_t size);
MOEC_API moec_status moec_place_take(moec_place_out *p, const moec_writer_options *opt, const char *mark,
                                     uint64_t need_bytes, moec_keep_fn *keep, void *ctx, moec_err *err) MOEC_USE_RESULT;
/** Gives the folder its final name, or with `file` the file of that name in it, and removes the folder. */
MOEC_API moec_status moec_place_publish(moec_place_out *p, const char *file, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_place_release(moec_place_out *p);

#endif
