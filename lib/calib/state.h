/* What calibration carries from layer to layer besides hidden states and statistics, and its checkpoints on disk. */
#ifndef MOEC_CALIB_STATE_H
#define MOEC_CALIB_STATE_H

#include "calib/calibrate.h"

/* Carried from layer to layer. N: all layers, S: sampled tokens. */
typedef struct moec_carry {
    int64_t n_tokens, slots, hidden, layers;
    int32_t *prev, *guess; /* [n_tokens, slots] selections there; what the next router would have chosen from its input */
    int64_t n_samples;    /* over all domains */
    int64_t *sample;      /* [S] tokens whose residual streams are compared between layers */
    int *sample_domain;   /* [S] */
    float *state;         /* [N+1, S, H] */
} moec_carry;

typedef struct moec_checkpoint {
    char *dir;      /* PATH.partial */
    char id[33];    /* digest of everything that decides the result */
    int64_t layers_done;
    int turn;       /* files of the last checkpoint end in this number, those of the next in the other */
    bool on_disk;   /* its hidden states are in hidden.N, not in carry.N */
    bool same;      /* the folder was left by a run of this id, with layers done or not */
    bool other;     /* or by a run of another id */
    int lock;       /* the folder, locked; -1: not open */
} moec_checkpoint;

/** Opens or makes the folder and locks it. layers_done is 0 unless there is a checkpoint with this id; nothing in the
 *  folder is changed. MOEC_EEXIST: another process is at work there; MOEC_EIO, MOEC_ENOMEM. Release also after failure. */
MOEC_API moec_status moec_checkpoint_open(moec_checkpoint *out, const char *path, const char *id, bool resume,
                                          moec_err *err) MOEC_USE_RESULT;
/** Empties the folder, whatever run left it, and marks it as one of this id with no layer done. */
MOEC_API moec_status moec_checkpoint_clear(moec_checkpoint *c, moec_err *err) MOEC_USE_RESULT;
/** Forgets the checkpoint but leaves files that may be open: from here on hidden states may be overwritten. */
MOEC_API moec_status moec_checkpoint_restart(moec_checkpoint *c, moec_err *err) MOEC_USE_RESULT;
/** Loads what the checkpoint holds; hidden states into memory or onto disk as this run keeps them, wherever they were.
 *  MOEC_EFORMAT when a file of it is damaged. */
MOEC_API moec_status moec_checkpoint_load(const moec_checkpoint *c, moec_stats **stats, moec_carry *carry,
                                          moec_hidden *hidden, moec_err *err) MOEC_USE_RESULT;
/** Writes everything aside, syncs, and replaces state.json last. */
MOEC_API moec_status moec_checkpoint_save(moec_checkpoint *c, int64_t layers_done, const moec_stats *stats,
                                          const moec_carry *carry, const moec_hidden *hidden, moec_err *err) MOEC_USE_RESULT;
/** Removes the folder. */
MOEC_API moec_status moec_checkpoint_remove(moec_checkpoint *c, moec_err *err) MOEC_USE_RESULT;
/** Unlocks; removes the folder when it is empty. */
MOEC_API void moec_checkpoint_release(moec_checkpoint *c);

#endif
