/* Thresholds of dynamic expert skipping for the output's config.json. */
#ifndef MOEC_METHOD_BETAS_H
#define MOEC_METHOD_BETAS_H

#include "calib/stats.h"
#include "method/plan.h"

/** Puts moec_stats_betas into a plan: the output's config.json gets
 *
 *    "betas": {"LAYER": beta, ..}    a token skips its second expert where w_(2) < beta w_(1), and g_(1) becomes 1
 *
 *  with the layers' numbers in the model, so about half of the tokens skip at each layer. The medians are those of the
 *  source: an output that routes much otherwise is better calibrated anew (and gets its betas by a plan that removes
 *  nothing).
 *  Source: Lu et al., Not All Experts are Equal (arXiv:2402.14800) and its repository; interpolated from a histogram.
 *  MOEC_EINVAL: top-k is not 2, or becomes 1; MOEC_EFORMAT: RATIO_HIST was not collected, a layer without tokens,
 *  statistics of another shape; MOEC_ENOMEM. The plan is unchanged on failure. */
MOEC_API moec_status moec_plan_betas(moec_plan *p, const moec_stats *s, moec_err *err) MOEC_USE_RESULT;

#endif
