/* See moec_plan_betas. */
#include "method/betas.h"

#include "base/mem.h"

#include <math.h>

moec_status moec_plan_betas(moec_plan *p, const moec_stats *s, moec_err *err)
{
    moec_status st = MOEC_OK;
    double *beta = NULL;
    if (p->top_k != 2 || p->new_top_k != 2)
        return moec_fail(err, MOEC_EINVAL, "betas say when the second of two experts is skipped: this model's top-k is %lld, "
                         "the output's %lld; stats show --json has the medians of every rank", (long long)p->top_k,
                         (long long)p->new_top_k);
    if (s->meta.top_k != 2 || s->meta.moe_layers != p->n_layers)
        return moec_fail(err, MOEC_EFORMAT, "betas: statistics of another model");
    MOEC_TRY(MOEC_NEW(beta, (size_t)p->n_layers, err));
    MOEC_TRY(moec_stats_betas(beta, s, err));
    for (int64_t l = 0; l < p->n_layers; l++)
        if (isnan(beta[l])) {
            st = moec_fail(err, MOEC_EFORMAT, "betas: layer %lld: no token of the statistics has two experts",
                           (long long)p->layer[l].layer);
            goto done;
        }
    moec_free(p->betas);
    p->betas = beta;
    beta = NULL;
done:
    moec_free(beta);
    return st;
}
