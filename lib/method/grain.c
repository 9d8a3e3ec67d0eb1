/* What the grains share, and the choice of layers; see grain.h. */
#include "method/grain.h"

#include "base/mem.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

moec_status moec_grain_plan(moec_plan **out, const moec_method *me, const moec_request *q, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_plan *p = NULL;
    *out = NULL;
    if (q->guard)
        return moec_fail(err, MOEC_EINVAL, "--protect is for whole experts, not for --grain %s", moec_grain_name(me->grain));
    if (q->keep > 0 || q->pad > 0 || q->drop_groups)
        return moec_fail(err, MOEC_EINVAL, "--keep, --pad-to and --groups are for whole experts, not for --grain %s",
                         moec_grain_name(me->grain));
    if (!(q->share >= 0.0 && q->share <= 1.0))
        return moec_fail(err, MOEC_EINVAL, "a share of %g: expected 0 to 1", q->share);
    MOEC_TRY(moec_plan_new(&p, q->model, me->name, q->fingerprint, err));
    MOEC_TRY(moec_plan_keep_all(p, err));
    if (q->drop_mtp && p->mtp != MOEC_PLAN_MTP_UNSAID)
        moec_plan_drop_mtp(p);
    snprintf(p->stats, sizeof p->stats, "%s", q->stats_digest ? q->stats_digest : "");
    MOEC_TRY(moec_plan_set_option(p, "grain", moec_json_new_string(moec_grain_name(me->grain)), err));
    *out = p;
    p = NULL;
done:
    moec_plan_free(p);
    return st;
}

double moec_grain_sum(double *out, const moec_stats *s, moec_stat kind, int64_t moe_layer, int64_t expert, int64_t n)
{
    memset(out, 0, (size_t)n * sizeof *out);
    return moec_stats_add_expert(out, s, kind, moe_layer, expert, n);
}

moec_status moec_blocks_similarity(double *out, const moec_request *q, moec_err *err)
{
    const int64_t layers = q->model->dims.layers;
    double tokens = 0.0;
    memset(out, 0, (size_t)layers * sizeof *out);
    for (int d = 0; d < q->stats->n_domains; d++) {
        const double w = moec_stats_weight(q->stats, d);
        const double *sum = moec_stat_at(q->stats, d, MOEC_STAT_COS_BLOCK, 0);
        const uint64_t *count = moec_stat_at(q->stats, d, MOEC_STAT_BLOCK_TOKENS, 0);
        for (int64_t i = 0; i < layers; i++)
            out[i] += w * sum[i * (layers + 1) + i + 1];
        tokens += w * (double)count[0];
    }
    if (!(tokens > 0.0))
        return moec_fail(err, MOEC_ENUMERIC, "the statistics have no token of which layers were compared");
    for (int64_t i = 0; i < layers; i++)
        out[i] /= tokens;
    return MOEC_OK;
}

moec_status moec_blocks_choose(int32_t *drop, const double *similarity, int64_t layers, int64_t n, moec_err *err)
{
    bool *gone = NULL;
    moec_status st = MOEC_NEW(gone, (size_t)layers, err);
    if (st != MOEC_OK)
        return st;
    for (int64_t k = 0; k < n; k++) {
        int64_t best = -1;
        for (int64_t i = 0; i < layers; i++)
            if (!gone[i] && (best < 0 || similarity[i] > similarity[best]))
                best = i;
        gone[best] = true;
    }
    for (int64_t i = 0, k = 0; i < layers; i++)
        if (gone[i])
            drop[k++] = (int32_t)i;
    moec_free(gone);
    return MOEC_OK;
}

static moec_status plan_blocks(moec_plan **out, const moec_method *me, const moec_request *q, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_plan *p = NULL;
    double *similarity = NULL;
    const int64_t layers = q->model->dims.layers;
    const int64_t n = q->drop > 0 ? q->drop : (int64_t)floor((double)layers * q->share + 1e-9);
    *out = NULL;
    if (n >= layers)
        return moec_fail(err, MOEC_EINVAL, "dropping %lld layers: the model has %lld", (long long)n, (long long)layers);
    MOEC_TRY(moec_grain_plan(&p, me, q, err));
    MOEC_TRY(MOEC_NEW(similarity, (size_t)layers, err));
    MOEC_TRY(MOEC_NEW(p->drop, (size_t)n, err));
    MOEC_TRY(moec_blocks_similarity(similarity, q, err));
    MOEC_TRY(moec_blocks_choose(p->drop, similarity, layers, n, err));
    p->n_drop = n;
    MOEC_TRY(moec_plan_set_option(p, "similarity", moec_json_new_reals(similarity, layers), err));
    *out = p;
    p = NULL;
done:
    moec_plan_free(p);
    moec_free(similarity);
    return st;
}

static const moec_stat need_blocks[] = {MOEC_STAT_COS_BLOCK, MOEC_STAT_BLOCK_TOKENS};

extern const moec_method moec_method_block_similarity;

const moec_method moec_method_block_similarity = {
    .name = "similarity",
    .kind = MOEC_PRUNE,
    .grain = MOEC_GRAIN_BLOCKS,
    .is_default = true,
    .brief = "whole layers whose output is most like their input",
    .paper = "Towards Efficient Mixture of Experts: A Holistic Study of Compression Techniques",
    .arxiv = "2406.02500",
    .formula = "mean_t cos(H_i, H_i+1)",
    .needs = need_blocks,
    .n_needs = (int)MOEC_COUNT(need_blocks),
    .plan = plan_blocks,
};
