/* Which experts of a layer stay, by what the layer gives without the others: methods that look at tokens, not at sums. */
#ifndef MOEC_METHOD_CHOOSE_H
#define MOEC_METHOD_CHOOSE_H

#include "model/model.h"

/* One MoE layer on calibration tokens. All borrowed. */
typedef struct moec_choice_task {
    const moec_model *model;
    const moec_layer *layer;  /* nothing masked yet; its experts' views are read */
    int64_t n;                /* tokens */
    const float *x;           /* [n,H] input of router and experts */
    const float *y;           /* [n,H] routed output that is wanted */
    const float *logits;      /* [n,ld] of all experts, biases included */
    int64_t ld;
    int64_t window;           /* rows whose error is one term, see below */
    int64_t keep;             /* experts that stay */
    int64_t groups;           /* each keeps keep / groups; 1: none */
    const bool *guarded;      /* [E] stay whatever happens, or NULL */
    int64_t top_k;            /* experts a token uses afterwards */
} moec_choice_task;

enum { MOEC_LU_TOKENS = 2048, MOEC_LU_SUBSETS = 20000 };

/** Lu et al.: the experts without which the layer's output changes least,
 *
 *      loss(S) = sum over windows |y - r_S|_F,   r_S the routed output when only S can be selected (others' logits -infinity)
 *
 *  on at most MOEC_LU_TOKENS tokens. Windows are t->window rows each (at most MOEC_LU_TOKENS), counted from row 0 and wherever
 *  texts begin: where the sequences behind the rows have several lengths, a term may hold parts of more than one. Of more rows
 *  than MOEC_LU_TOKENS whole windows at even distances are looked at; else all rows, the last window as short as it comes.
 *  Where there are at most MOEC_LU_SUBSETS subsets all are tried, in lexicographic order, the first of the least; else experts
 *  are removed one by one, each time the one whose loss is least (ties to the lower number).
 *  keep [t->keep] ascending. score [E]: how late an expert was removed (1, 2, ..), E for those that stay; exhaustive: E and 0.
 *  The loss comes from inner products of the experts' outputs, E^2 + E floats a token, so that a subset costs no product with
 *  weights.
 *  MOEC_EINVAL: more guarded experts than stay, no tokens or more than INT32_MAX, a model that the method does not fit (said
 *  why); MOEC_ENUMERIC: an output that is not finite; MOEC_ENOMEM, MOEC_EINTR.
 *  Cost: all experts on the tokens, then E subsets for each expert removed, each n (E + top_k^2) operations.
 *  Source: Not All Experts are Equal (arXiv 2402.14800), layer-wise pruning; greedy removal is ours. */
MOEC_API moec_status moec_choose_lu(int32_t *keep, double *score, const moec_choice_task *t, moec_err *err) MOEC_USE_RESULT;
/** Bytes it needs. */
MOEC_API size_t moec_choose_bytes(const moec_model *m);

#endif
