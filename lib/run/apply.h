/* Carries a plan out: model and plan in, a complete checkpoint folder with a manifest out, verified before it gets its
 * name. */
#ifndef MOEC_RUN_APPLY_H
#define MOEC_RUN_APPLY_H

#include "ckpt/override.h"
#include "method/plan.h"
#include "model/model.h"

typedef struct moec_apply_options {
    const char *out;         /* output folder */
    const char *fingerprint; /* of the model, when the caller has it already; NULL: it is computed */
    bool overwrite, resume;
    uint64_t max_memory;     /* 0: no limit */
    const moec_override *weights; /* those that the plan has computed anew; NULL: none (an estimate needs none) */
} moec_apply_options;

typedef struct moec_apply_result {
    uint64_t source_bytes, output_bytes; /* of all tensors */
    uint64_t dead_bytes;                 /* of the output's, of experts that only pad a layer */
    uint64_t disk_bytes;                 /* all files of the output but the manifest */
    uint64_t manifest_bytes;             /* of that at most, without its plan */
    uint64_t disk_free;                  /* of moec_apply_estimate */
    uint64_t memory_bytes;               /* peak that the writing needs, estimated */
    uint64_t left_out;                   /* files of the source that are not in the output */
} moec_apply_result;

/** Writes the output of a plan: tensors that stay are copied byte for byte, those of removed experts are left out, kept
 *  experts are renumbered 0 .. K-1 in their order, router rows follow the same list; config.json gets the new numbers,
 *  the index is written anew, all other files are copied; moecompress.json says what was made from what. The same plan
 *  and source give the same bytes in every file. Runs moec_verify before the folder gets its final name.
 *  @return MOEC_OK; MOEC_EFORMAT: the plan does not fit the model, or opt->weights are not those it was made with; what moec_writer_open and moec_writer_run return;
 *          MOEC_EIO: the written bytes do not verify (then nothing is left); MOEC_ENOFIT: max_memory is less than the writing needs.
 *  Cost: each kept byte is read once, written once, and read back once; memory does not grow with the model's bytes. */
MOEC_API moec_status moec_apply(moec_apply_result *out, const moec_model *m, const moec_plan *p,
                                const moec_apply_options *opt, moec_err *err) MOEC_USE_RESULT;
/** The same numbers without writing anything or reading weights. `opt->out` may be NULL. */
MOEC_API moec_status moec_apply_estimate(moec_apply_result *out, const moec_model *m, const moec_plan *p,
                                         const moec_apply_options *opt, moec_err *err) MOEC_USE_RESULT;

#endif
