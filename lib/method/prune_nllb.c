/* Importance of NLLB-200's pruning: how often an expert is the first choice, and how sure the router is of it then.
 *
 *    top1[e] = share of the tokens whose first choice is e,  conf1[e] = mean weight over these tokens (0: none)
 *    score   = top1[e] exp(conf1[e])                         several domains: sum_d w_d score_d
 *
 * Its own choice of how many each layer keeps is --allocation mass.
 * Source: Koishekenov et al., and get_metrics of github.com/naver/nllb-pruning. Departs: the weight is the applied one (there:
 * the softmax over all experts); which is the first choice goes by the weight too. */
#include "method/method.h"

#include "base/mem.h"

#include <math.h>

static void add_domain(double *score, const moec_stats *s, int d, int64_t l)
{
    const int64_t n = s->meta.experts, k = s->meta.top_k;
    const uint64_t *rank = moec_stat_at(s, d, MOEC_STAT_RANK, l);
    const double *gate = moec_stat_at(s, d, MOEC_STAT_GATE_TOP1_SUM, l);
    const double tokens = (double)s->domain[d].tokens, weight = moec_stats_weight(s, d);
    for (int64_t e = 0; e < n; e++) {
        const double first = (double)rank[e * k];
        if (first > 0.0 && tokens > 0.0)
            score[e] += weight * first / tokens * exp(gate[e] / first);
    }
}

static moec_status plan_nllb(moec_plan **out, const moec_method *me, const moec_request *q, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t layers = q->model->moe_layers, n = q->model->dims.experts;
    double *score = NULL;
    *out = NULL;
    MOEC_TRY(MOEC_NEW(score, (size_t)(layers * n), err));
    for (int64_t l = 0; l < layers; l++)
        for (int d = 0; d < q->stats->n_domains; d++)
            add_domain(score + l * n, q->stats, d, l);
    MOEC_TRY(moec_select(out, me, q, score, err));
done:
    moec_free(score);
    return st;
}

static const moec_stat needs[] = {MOEC_STAT_SELECTED, MOEC_STAT_RANK, MOEC_STAT_GATE_TOP1_SUM};

extern const moec_method moec_method_nllb;
const moec_method moec_method_nllb = {
    .name = "nllb",
    .kind = MOEC_PRUNE,
    .brief = "share of tokens whose first choice the expert is, times e to its mean weight there; published with "
             "--allocation mass",
    .paper = "Memory-efficient NLLB-200: Language-specific Expert Pruning of a Massively Multilingual Machine Translation Model",
    .arxiv = "2212.09811",
    .formula = "top1[e] exp(conf1[e])",
    .needs = needs,
    .n_needs = (int)MOEC_COUNT(needs),
    .plan = plan_nllb,
};
