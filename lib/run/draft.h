/* The weights of one set of experts as they will be in the output, writable: what repair and its kin change in place. */
#ifndef MOEC_RUN_DRAFT_H
#define MOEC_RUN_DRAFT_H

#include "run/layout.h"

typedef struct moec_draft {
    moec_sheet *sheet;
    moec_mlp *expert;   /* [n_keep] in the order of the plan's keep list; gate, up and down of parts that are not in the
                           draft are views of the source */
    moec_weight router; /* rows of the output, dead ones and those of experts without a network included; .of NULL when it is
                           not in the draft */
    const moec_tensor *gate_up_bias, *down_bias; /* [., 2I] [., H], writable; NULL: there is none, or it is not in the draft */
    int64_t n_keep;
    int32_t *row;       /* [E] an expert's row in the router and in biases, -1: removed */
} moec_draft;

/** Lays out the tensors of set `set` that hold one of `parts` (moec_part bits) as the plan's output has them, dead
 *  experts included, in a sheet called FILE of `weights`, and fills them with what the source has: with a width in the plan only
 *  tensors that do not grow with it, the others are zero. The plan's `rewritten` must be set where there is a width.
 *  MOEC_EINVAL: the weights are quantized and plan->dtype does not make them plain (the text says so), or the router's rows
 *  do not stand side by side; what moec_sheet_new and moec_cast_make return. */
MOEC_API moec_status moec_draft_new(moec_draft *out, const moec_override *weights, const char *file, const moec_model *m,
                                    const moec_plan *p, const moec_forms *forms, int64_t set, uint32_t parts, moec_err *err)
    MOEC_USE_RESULT;
/** Bytes of these tensors together, and of the largest. MOEC_EINVAL as above, MOEC_ENOMEM. */
MOEC_API moec_status moec_draft_bytes(uint64_t *all, uint64_t *largest, const moec_model *m, const moec_plan *p,
                                      const moec_forms *forms, int64_t set, uint32_t parts, moec_err *err) MOEC_USE_RESULT;
/** Drops what was not committed. Of a zeroed one too. */
MOEC_API void moec_draft_release(moec_draft *d);
/** Gives a variant's layer the views of the kept experts, and the router and biases that are in the draft: what is written there
 *  later is seen. */
MOEC_API void moec_draft_show(moec_layer *layer, const moec_draft *d, const int32_t *keep);
/** The views of a file that an earlier run committed. MOEC_EFORMAT: a tensor is missing or has another form. */
MOEC_API moec_status moec_draft_reopen(moec_draft *out, const moec_override *weights, const moec_model *m, const moec_plan *p,
                                       const moec_forms *forms, int64_t set, uint32_t parts, moec_err *err) MOEC_USE_RESULT;

#endif
