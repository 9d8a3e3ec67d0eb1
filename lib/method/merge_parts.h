/* What the parts of merge.h share. Private to lib/method and its tests. */
#ifndef MOEC_METHOD_MERGE_PARTS_H
#define MOEC_METHOD_MERGE_PARTS_H

#include "method/merge.h"

/* ---- merge_group.c ------------------------------------------------------------------------------------------------------- */

/** Can the task be measured? MOEC_EINVAL: no tokens (unless `blind`), or more than INT32_MAX; logits of fewer experts than there
 *  are; experts without a network whose weight changes with who stays; outputs asked for where the router's weight multiplies the
 *  experts' input. */
moec_status moec__merge_check(const moec_merge_task *t, bool blind, bool outputs, moec_err *err) MOEC_USE_RESULT;

/* ---- merge_mass.c -------------------------------------------------------------------------------------------------------- */

/** Full scores of the router, softmax or sigmoid over all its rows: of rows `row` [n] of the task (NULL: 0, 1, ..), out [n,E];
 *  or with `selected`, of t->ids alone, out [n,slots] (0 in empty slots). MOEC_ENOMEM, MOEC_EINTR. */
moec_status moec__merge_scores(float *out, const moec_merge_task *t, const int32_t *row, int64_t n, bool selected, moec_err *err)
    MOEC_USE_RESULT;
size_t moec__merge_mass_bytes(const moec_model *m, int64_t n);

/* ---- merge_distance.c ---------------------------------------------------------------------------------------------------- */

/** Is a distance of this kind a square already? */
bool moec__merge_is_square(moec_merge_distance kind);
/** Does it need outputs of experts? */
bool moec__merge_runs_experts(moec_merge_distance kind);
size_t moec__merge_distance_bytes(const moec_model *m);

/* ---- merge_fill.c -------------------------------------------------------------------------------------------------------- */

/** Bytes that moec_merge_fill_all needs. */
size_t moec__merge_fill_bytes(const moec_model *m);

#endif
