/* A folder of work: weights that are computed layer by layer, kept while that lasts, so that a run that is stopped continues.
 * Shared by repair.c, thin.c and factor.c. */
#ifndef MOEC_RUN_WORK_H
#define MOEC_RUN_WORK_H

#include "calib/state.h"
#include "ckpt/override.h"
#include "method/plan.h"

typedef struct moec_work {
    moec_checkpoint folder;
    moec_override *weights;
} moec_work;

/* What such work takes, before it is done. */
typedef struct moec_work_cost {
    uint64_t disk;         /* bytes of the folder in the end */
    uint64_t memory;       /* resident, as planned; with max_memory below it */
    uint64_t token_passes; /* of a token through a layer, or an expert that is fitted; 0 where no text is run */
} moec_work_cost;

/** Opens PATH.partial for a run that `identity` describes, takes over what such a run left there, and locks it. Files of
 *  layers are "layer-" or "set-" and a number, which "-factors" or "-others" may follow. Release with moec_work_close, also after
 *  failure.
 *  guard: the work is dear, so that layers of a run of another identity are refused and not discarded, unless resume is off.
 *  MOEC_EEXIST: another run is at work there, such layers are there, or something that this program did not make
 *  (moec_work_ours); MOEC_EFORMAT: a file of it is damaged; MOEC_EIO, MOEC_ENOMEM. */
MOEC_API moec_status moec_work_open(moec_work *w, const char *path, const char *identity, bool resume, bool guard,
                                    moec_err *err) MOEC_USE_RESULT;
/** Does a folder hold nothing but what such work is made of, so that it may be removed? MOEC_EEXIST: no, the text names what;
 *  MOEC_EIO, MOEC_ENOMEM. */
MOEC_API moec_status moec_work_ours(const char *dir, moec_err *err) MOEC_USE_RESULT;
/** Removes PATH.partial where its weights are those that the plan `done` was carried out with: what a run leaves that was killed
 *  between giving the output its name and its last step. Work that another output needs, or that cannot be read, stays.
 *  MOEC_ENOMEM. Cost: one read of the weights. */
MOEC_API moec_status moec_work_forget(const char *path, const moec_plan *done, moec_err *err) MOEC_USE_RESULT;
/** Gives the folder the name `dir`, under which it stays. MOEC_EIO. */
MOEC_API moec_status moec_work_keep(const moec_work *w, const char *dir, moec_err *err) MOEC_USE_RESULT;
/** Closes it after a failure: the folder goes where no layer in it is finished, since then there is nothing to continue.
 *  Of one that moec_work_open opened. */
MOEC_API void moec_work_abandon(moec_work *w);
/** `remove`: the folder goes, too. Of a zeroed one that was never opened: folder.lock must be -1. */
MOEC_API void moec_work_close(moec_work *w, bool remove);

#endif
