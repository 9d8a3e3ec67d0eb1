/* Calibration: the layer pass with the statistics watcher, resumable after every checkpoint. */
#ifndef MOEC_CALIB_CALIBRATE_H
#define MOEC_CALIB_CALIBRATE_H

#include "calib/pass.h"
#include "calib/stats.h"

typedef struct moec_calibrate_opts {
    moec_compute compute;
    int tier;                 /* 0, or 1 for the per-channel sums as well */
    uint64_t max_memory;
    const char *options;      /* JSON for the file: what was asked; the same content gives the same file */
    bool keep_existing;       /* MOEC_EEXIST when path or trace is there, unless an interrupted run of the same left it */
    bool resume;              /* continue what an interrupted run left; else begin anew */
    const char *trace;        /* also write the routing trace (trace.h) here; NULL: none */
    double checkpoint_every;  /* seconds of work that a kill may cost, beyond the layer under way */
} moec_calibrate_opts;

/**
 * Statistics of a model's routers on a corpus.
 *
 * Beside `path` a folder PATH.partial holds checkpoints: hidden states, statistics so far, and state.json, which names
 * them and is replaced last. A run of the same model, text and options continues from there and gives the same bytes as one
 * that was never interrupted.
 *
 * @param out   the statistics, also written to `path`; free with moec_stats_free. May be NULL.
 * @param path  the HDF5 file; replaced when it is there, unless keep_existing.
 * @return MOEC_OK; MOEC_EEXIST: keep_existing, or another process is at work in the folder; MOEC_EINTR: a signal came,
 *         the folder is left for the next run; MOEC_ENUMERIC: a weight or a layer's output is not finite; MOEC_ENOFIT,
 *         MOEC_ENOMEM, MOEC_EIO; MOEC_EFORMAT: an id outside the vocabulary.
 * Memory: one layer, hidden states (or a chunk of them for each worker), the statistics.
 * Cost: one forward pass.
 */
MOEC_API moec_status moec_calibrate(moec_stats **out, const moec_model *m, const moec_corpus *corpus, const char *path,
                                    const moec_calibrate_opts *o, moec_err *err) MOEC_USE_RESULT;

/** True when PATH.partial is there: a run that would write `path` was interrupted, or is under way. */
MOEC_API bool moec_calibrate_unfinished(const char *path);
/** Removes PATH.partial: what a run leaves that was killed behind writing `path`. MOEC_EEXIST: another process is at work there;
 *  MOEC_EIO, MOEC_ENOMEM. */
MOEC_API moec_status moec_calibrate_forget(const char *path, moec_err *err) MOEC_USE_RESULT;

/** Sizes, rule and identity for statistics of this model. Release with moec_stats_meta_release. */
MOEC_API moec_status moec_calibrate_meta(moec_stats_meta *out, const moec_model *m, const moec_calibrate_opts *o,
                                         moec_err *err) MOEC_USE_RESULT;
/** The arrangement that moec_calibrate would choose, and the bytes of statistics and what is carried between layers. Errors
 *  of moec_pass_estimate and moec_calibrate_meta. Reads 192 bytes of each tensor. */
MOEC_API moec_status moec_calibrate_plan(moec_pass_plan *out, size_t *statistics, const moec_model *m,
                                         const moec_corpus *corpus, const moec_calibrate_opts *o, moec_err *err)
    MOEC_USE_RESULT;

#endif
