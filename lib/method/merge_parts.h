/* What the parts of merge.h share. Private to lib/method and its tests. */
#ifndef MOEC_METHOD_MERGE_PARTS_H
#define MOEC_METHOD_MERGE_PARTS_H

#include "method/merge.h"
#include "method/repair_parts.h"

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
/** Does a mass need outputs of experts? */
bool moec__merge_mass_runs(moec_merge_mass kind);
size_t moec__merge_mass_bytes(const moec_model *m, int64_t n);

/* ---- merge_distance.c ---------------------------------------------------------------------------------------------------- */

/** Is a distance of this kind a square already? */
bool moec__merge_is_square(moec_merge_distance kind);
/** Does it need outputs of experts? */
bool moec__merge_runs_experts(moec_merge_distance kind);
size_t moec__merge_distance_bytes(const moec_model *m);

/* ---- merge_fill.c -------------------------------------------------------------------------------------------------------- */

/** What moec_merge_fill_all refuses of a recipe, whatever the weights are; `gated`: experts have gates. MOEC_EINVAL. */
moec_status moec__merge_fill_check(const moec_merge_recipe *r, bool gated, moec_err *err) MOEC_USE_RESULT;
/** Bytes that moec_merge_fill_all needs for a recipe. */
MOEC_API size_t moec__merge_fill_bytes(const moec_model *m, const moec_merge_recipe *r);

/* What all ways to fill have. */
typedef struct moec_filling {
    const moec_merge_target *to;
    const moec_merge_task *t;
    const moec_merge_groups *g;
    const moec_merge_recipe *r;
    moec_merge_tally *tally;
    int64_t experts, hidden, width;
    bool gated, scales, biased; /* experts have gates; see moec_neurons; there are biases of gate and up */
    moec_room room;             /* for reading and writing */
    int32_t *took;              /* [E,E] segments: neurons of one expert that another took */
    double gain;                /* sums of the alignments made */
    int64_t alignments;
} moec_filling;

/** Is e a centre that may be written? */
static inline bool moec__fill_open(const moec_filling *f, int64_t e)
{
    return f->g->centre[e] == (int32_t)e && !(f->t->guarded && f->t->guarded[e]);
}

/* ---- merge_neurons.c ----------------------------------------------------------------------------------------------------- */

enum { MOEC_MERGE_BAND = 96 }; /* neurons, or rows of down, that one thread reads or writes at a time */

typedef struct moec_neuron_id {
    int32_t expert, neuron;
} moec_neuron_id;

/* Neurons in float32, a row each: down is transposed. */
typedef struct moec_rows {
    float *gate, *up, *down;    /* [most,H]; gate NULL: there is none */
    float *gate_bias, *up_bias; /* [most], or NULL */
    int64_t most;
    float *store;
} moec_rows;

moec_status moec__rows_new(moec_rows *out, const moec_filling *f, int64_t most, moec_err *err) MOEC_USE_RESULT;
void moec__rows_release(moec_rows *x);
/** Floats of `most` neurons. */
size_t moec__rows_floats(const moec_model *m, int64_t most);
/** Row i becomes the source's neuron who[i], n <= most. Neurons that lie side by side in `who` are read together. MOEC_ENUMERIC: a
 *  weight is not finite. */
moec_status moec__rows_read(moec_rows *x, const moec_filling *f, const moec_neuron_id *who, int64_t n, moec_err *err)
    MOEC_USE_RESULT;
/** All neurons of an expert. */
moec_status moec__rows_read_expert(moec_rows *x, const moec_filling *f, int32_t expert, moec_err *err) MOEC_USE_RESULT;
/** Rows [0, I) become the target's expert. MOEC_ENUMERIC: a value that its tensors cannot hold. */
moec_status moec__rows_write(const moec_rows *x, const moec_filling *f, int32_t expert, moec_err *err) MOEC_USE_RESULT;
/** Place j takes neuron from[j], up times scale[j] and down over it, in place. */
moec_status moec__rows_apply(moec_rows *x, const moec_filling *f, const moec_alignment *a, moec_err *err) MOEC_USE_RESULT;
/** The target's down bias of an expert becomes sum of weight[e] [E] times the source's of e, in float64; nothing where there is none.
 *  MOEC_ENUMERIC, MOEC_ENOMEM. */
moec_status moec__down_bias_write(const moec_filling *f, int32_t expert, const double *weight, moec_err *err) MOEC_USE_RESULT;
moec_neurons moec__rows_neurons(const moec_rows *x, const moec_filling *f);
/** What neurons [0, I) make of tokens x [n,H], any thread: gate and up (without biases) to pre_gate, pre_up where they are not
 *  NULL, act [n,I] = act(gate x, up x); up: scratch [n,I]. Experts with a gate only. */
void moec__rows_act(float *act, float *up, float *pre_gate, float *pre_up, const moec_rows *w, const moec_filling *f,
                    const float *x, int64_t n);

/* ---- merge_average.c ----------------------------------------------------------------------------------------------------- */

moec_status moec__fill_average(moec_filling *f, moec_err *err) MOEC_USE_RESULT;
size_t moec__fill_average_bytes(const moec_model *m, const moec_merge_recipe *r);

/* ---- merge_subspace.c ---------------------------------------------------------------------------------------------------- */

typedef struct moec_subspace moec_subspace;

moec_status moec__subspace_new(moec_subspace **out, const moec_filling *f, moec_err *err) MOEC_USE_RESULT;
void moec__subspace_free(moec_subspace *s);
/** Forgets what was added. */
void moec__subspace_clear(moec_subspace *s);
/** Adds W W^T of an expert's matrices; with `whiten` W C W^T, C = sum of v v^T over the inputs v that the matrix has for the
 *  tokens that select `expert`. */
moec_status moec__subspace_add(moec_subspace *s, const moec_rows *w, int32_t expert, bool whiten, moec_err *err) MOEC_USE_RESULT;
/** W := U U^T W for each matrix. */
moec_status moec__subspace_project(moec_subspace *s, moec_rows *w, moec_err *err) MOEC_USE_RESULT;
size_t moec__subspace_bytes(const moec_model *m, const moec_merge_recipe *r);

/* ---- merge_segments.c ---------------------------------------------------------------------------------------------------- */

moec_status moec__fill_segments(moec_filling *f, moec_err *err) MOEC_USE_RESULT;
size_t moec__fill_segments_bytes(const moec_model *m);

#endif
