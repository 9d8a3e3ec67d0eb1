/* Weights of experts made thinner: neurons taken out of all of them, or single weights set to zero. Written layer by layer into a
 * folder of computed weights, from which the output takes them. */
#ifndef MOEC_RUN_THIN_H
#define MOEC_RUN_THIN_H

#include "method/grain.h"
#include "run/draft.h"
#include "run/work.h"

typedef struct moec_thin_opts {
    const char *work; /* the folder is WORK.partial */
    bool resume;
    uint64_t max_memory; /* 0: no bound */
} moec_thin_opts;

typedef struct moec_thin_tally {
    int64_t unseen;         /* experts that no token selected and that were judged by their weights, MTP layers' among them */
    uint64_t zeros, values; /* of all experts' matrices as they are now */
    const uint64_t *set_zeros; /* [sets of the plan], until moec_thin_close */
} moec_thin_tally;

typedef struct moec_thin moec_thin;

/** Makes the weights of a plan of grain neurons or weights (moec_method_plan with the same request), which may have got a
 *  dtype since. Fills the plan's `weights`, and with owl its option "ratios" [MoE layers].
 *  Neurons: rows of gate and up and columns of down of the kept neurons, biases of gate and up likewise; values are the
 *  source's, rounded once where plan->dtype is another type. Weights: see moec_weights_cut; rows are those of the matrices, so each
 *  output of gate, up and down loses the same number of inputs.
 *  Results do not depend on the number of threads. Layers that an earlier run finished are taken over.
 *  @return MOEC_OK; MOEC_EINVAL: quantized weights without plan->dtype; MOEC_EEXIST: another run is at work in the folder;
 *          MOEC_ENUMERIC: a score or a value is not finite; MOEC_ENOFIT (disk; max_memory, as moec_thin_estimate
 *          says), MOEC_EINTR, MOEC_EIO, MOEC_ENOMEM.
 *  Cost: two reads of the experts (owl: four) and one write. Memory: moec_thin_estimate. */
MOEC_API moec_status moec_thin_run(moec_thin **out, moec_plan *p, const moec_method *me, const moec_request *q,
                                   const moec_thin_opts *o, moec_err *err) MOEC_USE_RESULT;
/** What that run would take. Memory: what is resident now and the larger of the largest tensor written and, for each worker, some
 *  100 rows of a matrix with the mapped pages of the expert that it is at, of source and output, which go back behind each. Under
 *  max_memory there are fewer workers than threads. MOEC_ENOFIT: one worker is too much for it, the text says how much would
 *  do; MOEC_EINVAL, MOEC_ENOMEM. */
MOEC_API moec_status moec_thin_estimate(moec_work_cost *out, const moec_plan *p, const moec_model *m, const moec_thin_opts *o,
                                        moec_err *err) MOEC_USE_RESULT;
/** How many experts are `unseen` (moec_thin_tally) where all sets that the plan rewrites are made by this method. */
MOEC_API int64_t moec_thin_unseen(const moec_plan *p, const moec_method *me, const moec_request *q);
MOEC_API const moec_override *moec_thin_weights(const moec_thin *t);
MOEC_API moec_thin_tally moec_thin_count(const moec_thin *t);
/** Moves the folder to `dir`, where it stays. MOEC_EIO. */
MOEC_API moec_status moec_thin_keep(moec_thin *t, const char *dir, moec_err *err) MOEC_USE_RESULT;
/** Releases it; `remove`: the folder goes, too. NULL-safe. */
MOEC_API void moec_thin_close(moec_thin *t, bool remove);

/* --- neurons of a single set, for repair, which thins a layer and fits it ---------------------------------------------- */

/** Fills gate, up and down and their biases in a draft of set `set` of a plan of grain neurons, as moec_thin_run does, with at most
 *  `workers` experts at a time. d: as moec_draft_new left it, all three parts in it. MOEC_ENUMERIC, MOEC_EINTR, MOEC_ENOMEM.
 *  Cost: two reads of the set's experts and one write. Memory: moec_thin_worker_bytes for each worker. */
MOEC_API moec_status moec_thin_fill(const moec_draft *d, moec_plan *p, const moec_method *me, const moec_request *q, int64_t set,
                                    int64_t workers, moec_err *err) MOEC_USE_RESULT;
/** The same of a set that nothing else changes, into a file of `weights`; one that is there already stays. What moec_thin_fill,
 *  moec_draft_new and moec_sheet_commit return. */
MOEC_API moec_status moec_thin_make(moec_override *weights, moec_plan *p, const moec_forms *forms, const moec_method *me,
                                    const moec_request *q, int64_t set, int64_t workers, moec_err *err) MOEC_USE_RESULT;
/** Bytes of a worker, as moec_thin_estimate counts them. MOEC_EINVAL, MOEC_ENOMEM: as moec_draft_bytes. */
MOEC_API moec_status moec_thin_worker_bytes(uint64_t *out, const moec_plan *p, const moec_model *m, const moec_forms *forms,
                                            moec_err *err) MOEC_USE_RESULT;

#endif
