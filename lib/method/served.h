/* What the removed experts of a plan were used for. */
#ifndef MOEC_METHOD_SERVED_H
#define MOEC_METHOD_SERVED_H

#include "calib/stats.h"
#include "method/plan.h"

/* Shares from 0 to 1; NAN where the domain has no token there or the sum was not collected. */
typedef struct moec_share {
    double selected; /* of selections */
    double gate;     /* of the sum of applied weights */
} moec_share;

typedef struct moec_served_expert {
    int64_t set;     /* index into plan->layer */
    int32_t expert;
    int most;        /* domain of the largest share of selections, the first of equal ones; -1: no token selected it */
} moec_served_expert;

typedef struct moec_served {
    int domains;
    int64_t layers, n;             /* MoE layers; removed experts in them */
    moec_served_expert *expert;    /* [n] by layer, then number */
    moec_share *share;             /* [n][domains] the expert's of its layer in the domain */
    moec_share *layer_lost;        /* [layers][domains] all removed ones' of the layer */
    moec_share *lost;              /* [domains] all removed ones' of all layers */
} moec_served;

/** For each removed expert e of MoE layer l and domain d, and summed over the removed ones R of a layer and of all layers:
 *
 *    share      = n_d[l,e] / sum_e' n_d[l,e']                          n: SELECTED, or GATE_SUM
 *    layer_lost = sum_{e in R_l} n_d[l,e] / sum_e' n_d[l,e']
 *    lost       = sum_l sum_{e in R_l} n_d[l,e] / sum_l sum_e' n_d[l,e']
 *
 *  Domains stand side by side, so their weights play no part. Attention experts and MTP layers are not seen by
 *  calibration and not in it. Ours: it reads what removal takes from a domain before anything is written; after it the router
 *  sends those tokens elsewhere, so the loss is smaller than the share.
 *  MOEC_EFORMAT: statistics of another shape than the plan; MOEC_ENOMEM. Release with moec_served_release.
 *  Cost: O(L E D). */
MOEC_API moec_status moec_served_by(moec_served *out, const moec_plan *p, const moec_stats *s, moec_err *err)
    MOEC_USE_RESULT;
MOEC_API void moec_served_release(moec_served *v);

#endif
