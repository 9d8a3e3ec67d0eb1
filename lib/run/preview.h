/* The model that a plan makes, in memory and without writing it: to measure a plan, and to fit layers behind others that are
 * done. */
#ifndef MOEC_RUN_PREVIEW_H
#define MOEC_RUN_PREVIEW_H

#include "model/variant.h"
#include "run/draft.h"

typedef struct moec_preview {
    moec_variant *variant;
    moec_forms forms;
    moec_draft *draft; /* [sets] of the plan; zeroed where nothing is rewritten */
    int64_t n_sets;
} moec_preview;

/** What a plan's `weights` is: a hash of moec_override_digest, and of the keep list and the rewritten parts of every layer that is
 *  rewritten, since weights fitted for one expert are not another's, and of what the factors are. MOEC_ENOMEM. Cost: one read. */
MOEC_API moec_status moec_preview_digest(moec_digest *out, const moec_plan *p, const moec_override *weights, moec_err *err)
    MOEC_USE_RESULT;
/** Are these the weights that the plan was made with? MOEC_EFORMAT: no, or they are missing (NULL). Cost: one read. */
MOEC_API moec_status moec_preview_check(const moec_plan *p, const moec_override *weights, moec_err *err) MOEC_USE_RESULT;
/** The variant of a plan that fits the model: top-k, groups, experts masked out (counts may differ from layer to layer, which
 *  no output could), weights of `weights` where layers are rewritten. plan->dtype does not show but in rewritten weights.
 *  `weights` is borrowed as long as the preview lives; NULL: the plan must rewrite nothing.
 *  MOEC_ENOMEM; MOEC_EINVAL: layers are dropped, biases of a router or attention experts are rewritten (no variant shows that);
 *  what moec_preview_check and moec_draft_reopen return. Release with moec_preview_release, also after failure. */
MOEC_API moec_status moec_preview_new(moec_preview *out, const moec_model *m, const moec_plan *p, const moec_override *weights,
                                      moec_err *err) MOEC_USE_RESULT;
/** The same with all experts of MoE layers and their own weights still there. */
MOEC_API moec_status moec_preview_begin(moec_preview *out, const moec_model *m, const moec_plan *p, moec_err *err)
    MOEC_USE_RESULT;
/** Set `set` as the plan has it from now on; `draft` (taken over, or NULL) holds its rewritten weights. MOEC_ENOMEM. */
MOEC_API moec_status moec_preview_set(moec_preview *v, const moec_plan *p, int64_t set, moec_draft *draft, moec_err *err)
    MOEC_USE_RESULT;
/** Gives `layer`, a copy of the model's layer `index` with experts of its own, the matrices that a plan quantizes, from its weights;
 *  those of experts in a dense format are the drafts'. MOEC_EFORMAT: a tensor is missing or has another form; MOEC_EINVAL: no such
 *  format; MOEC_ENOMEM. */
MOEC_API moec_status moec_preview_quantized(moec_layer *layer, const moec_model *m, const moec_plan *p, int64_t index,
                                            const moec_override *weights, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_preview_release(moec_preview *v);

#endif
