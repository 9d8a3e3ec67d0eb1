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
    bool opened; /* to the end: it holds layers of this run, or none */
} moec_work;

/* What such work takes, before it is done. */
typedef struct moec_work_cost {
    uint64_t disk;         /* bytes of the folder in the end */
    uint64_t memory;       /* resident, as planned; with max_memory below it */
    uint64_t token_passes; /* of a token through a layer, or an expert that is fitted; 0 where no text is run */
} moec_work_cost;

/** Opens PATH.partial for a run, takes over what such a run left there, and locks it. `identity`, as in printf, says everything
 *  that decides the run's result. Files of layers are "layer-" or "set-" and a number, which "-factors" or "-others" may follow.
 *  Release with moec_work_close or moec_work_abandon, also after failure.
 *  guard: the work is dear, so that layers of a run of another identity are refused and not discarded, unless resume is off.
 *  MOEC_EEXIST: another run is at work there, such layers are there, or something that this program did not make
 *  (moec_work_ours); MOEC_EFORMAT: a file of it is damaged; MOEC_EIO, MOEC_ENOMEM. */
MOEC_API moec_status moec_work_open(moec_work *w, const char *path, bool resume, bool guard, moec_err *err, const char *identity,
                                    ...) MOEC_PRINTF(6, 7) MOEC_USE_RESULT;
/** Does a folder hold nothing but what such work is made of, so that it may be removed? MOEC_EEXIST: no, the text names what;
 *  MOEC_EIO, MOEC_ENOMEM. */
MOEC_API moec_status moec_work_ours(const char *dir, moec_err *err) MOEC_USE_RESULT;
/** Removes PATH.partial where its weights are those that the plan `done` was carried out with: what a run leaves that was killed
 *  between giving the output its name and its last step. Work that another output needs, or that cannot be read, stays.
 *  MOEC_ENOMEM. Cost: one read of the weights. */
MOEC_API moec_status moec_work_forget(const char *path, const moec_plan *done, moec_err *err) MOEC_USE_RESULT;
/** Gives the folder the name `dir`, under which it stays. MOEC_EIO. */
MOEC_API moec_status moec_work_keep(const moec_work *w, const char *dir, moec_err *err) MOEC_USE_RESULT;
/** Closes it after a failure: the folder goes where it was opened and no layer in it is finished, since then there is nothing to
 *  continue. Else as moec_work_close. */
MOEC_API void moec_work_abandon(moec_work *w);
/** `remove`: the folder goes, too. Of a zeroed one that was never opened: folder.lock must be -1. */
MOEC_API void moec_work_close(moec_work *w, bool remove);

/** "layer-00012" and `end`. */
void moec_work_file_name(char out[64], int64_t layer, const char *end);
/** Writes `record`, which it frees, into the file `name`, with the hash by which a later run knows the weights of `sheet`; NULL: there
 *  are none. MOEC_EIO, MOEC_ENOMEM. */
moec_status moec_work_record_write(const moec_work *w, moec_json *record, const moec_sheet *sheet, const char *name, moec_err *err)
    MOEC_USE_RESULT;
/** Is `file` what it was when `record` was written? MOEC_EFORMAT: no; what moec_override_file_digest returns. */
moec_status moec_work_record_check(const moec_work *w, const moec_json *record, const char *file, moec_err *err) MOEC_USE_RESULT;
/** Reads the record `name`, of `most` bytes at most, and checks that `file` is what it was written for: numbers of rows in it are used
 *  as they are. Free with moec_json_free, also after failure.
 *  MOEC_EFORMAT: it is missing, or that file is another; what moec_json_read returns. */
moec_status moec_work_record_read(moec_json **out, const moec_work *w, const char *name, size_t most, const char *file, moec_err *err)
    MOEC_USE_RESULT;
/** Returns st; where it is MOEC_EINTR the text says after how many of the layers, and what was measured; NULL: nothing was. */
moec_status moec_work_interrupted(moec_status st, const char *measuring, int64_t done, int64_t layers, moec_err *err) MOEC_USE_RESULT;

#endif
