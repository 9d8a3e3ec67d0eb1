/* A model as it would be after compression, without writing it: a copy of the model's tables in which experts are masked
 * out and weights are other tensors. It runs through the same forward pass as any model, so a plan can be measured, and
 * layers can be fitted behind others that are compressed already.
 *
 * A masked expert's router logit is -infinity: it is never selected and has no part in a softmax; where logits are carried
 * to the next layer's router, 0 is carried for it. That is exactly what slicing
 * its row off does, as long as as many experts as top-k are left (where fewer are, top-k falls to their number).
 * Numbers of experts, shapes of logits and statistics stay those of the source. */
#ifndef MOEC_MODEL_VARIANT_H
#define MOEC_MODEL_VARIANT_H

#include "model/model.h"

typedef struct moec_variant {
    moec_model model;   /* tables are the variant's own: layer[] and each layer's expert[] may be changed */
    bool **removed;     /* [sets of MoE layers and attention experts][E]; what layers' masks point to */
} moec_variant;

/** A variant that equals m. m stays borrowed and open as long as the variant lives; the variant's model must not be closed.
 *  Free with moec_variant_free. MOEC_ENOMEM. */
MOEC_API moec_status moec_variant_new(moec_variant **out, const moec_model *m, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_variant_free(moec_variant *v);
/** Masks all experts of a set but keep[0..n-1]. A set of multi-token prediction is passed over: it is not run.
 *  MOEC_ENOMEM. */
MOEC_API moec_status moec_variant_keep(moec_variant *v, int64_t set, const int32_t *keep, int64_t n, moec_err *err)
    MOEC_USE_RESULT;
/** Experts a token uses from now on: min(k, model's own). Forward passes made before do not know it. */
MOEC_API void moec_variant_top_k(moec_variant *v, int64_t k);
/** Of the experts that a token selects only the fewest of largest weight that hold `share` (0 to 1) of their sum stay; where
 *  the model renormalises weights, they keep their sum. What a runtime that skips experts would compute. */
MOEC_API void moec_variant_keep_mass(moec_variant *v, double share);
/** The router chooses among all experts at once. */
MOEC_API void moec_variant_drop_groups(moec_variant *v);

#endif
