/* A folder of work: weights that are computed layer by layer, kept while that lasts, so that a run that is stopped continues.
 * Shared by repair.c and thin.c. */
#ifndef MOEC_RUN_WORK_H
#define MOEC_RUN_WORK_H

#include "calib/state.h"
#include "ckpt/override.h"

typedef struct moec_work {
    moec_checkpoint folder;
    moec_override *weights;
} moec_work;

/** Opens PATH.partial for a run that `identity` describes, takes over what such a run left there, and locks it. Files of
 *  layers begin with "layer-" or "set-". Release with moec_work_close, also after failure.
 *  MOEC_EEXIST: another run is at work there, layers of a run of another identity are there (unless resume is off), or something
 *  that this program did not make; MOEC_EFORMAT: a file of it is damaged; MOEC_EIO, MOEC_ENOMEM. */
MOEC_API moec_status moec_work_open(moec_work *w, const char *path, const char *identity, bool resume, moec_err *err)
    MOEC_USE_RESULT;
/** Gives the folder the name `dir`, under which it stays. MOEC_EIO. */
MOEC_API moec_status moec_work_keep(const moec_work *w, const char *dir, moec_err *err) MOEC_USE_RESULT;
/** `remove`: the folder goes, too. Of a zeroed one that was never opened: folder.lock must be -1. */
MOEC_API void moec_work_close(moec_work *w, bool remove);

#endif
