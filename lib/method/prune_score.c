/* One scorer for the saliency methods, each a row of it. For MoE layer l, over the calibration tokens t that select expert e
 * (n of them), with g the weight that the model applies to the expert, y the expert's un-gated output, h the residual stream
 * before the layer, r the sum of g y over the selected experts and u = max(1 - cos(h, h + r), 0):
 *
 *    score[l,e] = sum_t u^q g^b |y|_2^c / n^(1-a)
 *
 * The sums are what calibration stores, so a row names its sum and says whether it is divided by n (a = 0) or not (a = 1).
 *
 * One domain: the formula as it stands. Several domains, d with weight w_d:
 *    a = 1 (sums)   sum_d w_d score_d[l,e] / sum_e' score_d[l,e'], so that a long text does not outvote a short one
 *                   (EASY-EP's rule for mixed domains); a domain whose layer sums to 0 adds nothing;
 *    a = 0 (means)  sum_d w_d S_d[l,e] / sum_d w_d n_d[l,e]: sums and counts are pooled, since the mean of means would give
 *                   a domain in which an expert was hit twice the say of one in which it was hit a million times.
 * An expert that no token selected scores 0 and is reported as unseen.
 * Source: the papers in the rows; the common form is the taxonomy of arXiv:2606.15716. Departs: sums are kept in
 * f64 and from the weight that the model really applies, where some of the papers' programs take the bare softmax. */
#include "method/method.h"

#include "base/mem.h"

typedef struct score_row {
    moec_stat sum;  /* sum_t u^q g^b |y|^c, f64, or SELECTED (u64) */
    bool mean;      /* a = 0 */
} score_row;

/* Value e of a block that holds either counts or sums. */
static double cell(const void *block, moec_stat kind, int64_t e)
{
    return moec_stat_kinds[kind].cell == MOEC_CELL_U64 ? (double)((const uint64_t *)block)[e]
                                                       : ((const double *)block)[e];
}

static void add_sums(double *score, const moec_stats *s, int d, const score_row *r, int64_t l, int64_t n)
{
    const void *block = moec_stat_at(s, d, r->sum, l);
    double total = 0.0, weight = 1.0;
    if (s->n_domains > 1) {
        for (int64_t e = 0; e < n; e++)
            total += cell(block, r->sum, e);
        weight = total > 0.0 ? s->domain[d].weight / total : 0.0;
    }
    for (int64_t e = 0; e < n; e++)
        score[e] += weight * cell(block, r->sum, e);
}

static void add_means(double *score, const moec_stats *s, const score_row *r, int64_t l, int64_t n)
{
    for (int64_t e = 0; e < n; e++) {
        double sum = 0.0, count = 0.0;
        for (int d = 0; d < s->n_domains; d++) {
            double weight = s->n_domains > 1 ? s->domain[d].weight : 1.0;
            sum += weight * cell(moec_stat_at(s, d, r->sum, l), r->sum, e);
            count += weight * cell(moec_stat_at(s, d, MOEC_STAT_SELECTED, l), MOEC_STAT_SELECTED, e);
        }
        score[e] = count > 0.0 ? sum / count : 0.0;
    }
}

static moec_status plan_by_score(moec_plan **out, const moec_method *me, const moec_request *q, moec_err *err)
{
    moec_status st = MOEC_OK;
    const score_row *r = me->row;
    const int64_t layers = q->model->moe_layers, n = q->model->dims.experts;
    double *score = NULL;
    *out = NULL;
    MOEC_TRY(MOEC_NEW(score, (size_t)(layers * n), err)); /* both bounded by the config reader */
    for (int64_t l = 0; l < layers; l++) {
        if (r->mean)
            add_means(score + l * n, q->stats, r, l, n);
        for (int d = 0; !r->mean && d < q->stats->n_domains; d++)
            add_sums(score + l * n, q->stats, d, r, l, n);
    }
    MOEC_TRY(moec_select(out, me, q, score, err));
done:
    moec_free(score);
    return st;
}

static const moec_stat need_count[] = {MOEC_STAT_SELECTED};
static const moec_stat need_gate[] = {MOEC_STAT_SELECTED, MOEC_STAT_GATE_SUM};
static const moec_stat need_norm[] = {MOEC_STAT_SELECTED, MOEC_STAT_NORM_SUM};
static const moec_stat need_gnorm[] = {MOEC_STAT_SELECTED, MOEC_STAT_GNORM_SUM};
static const moec_stat need_ugnorm[] = {MOEC_STAT_SELECTED, MOEC_STAT_UGNORM_SUM};

static const score_row row_frequency = {MOEC_STAT_SELECTED, false}, row_gate = {MOEC_STAT_GATE_SUM, false},
                       row_ean_sum = {MOEC_STAT_NORM_SUM, false}, row_ean_mean = {MOEC_STAT_NORM_SUM, true},
                       row_reap = {MOEC_STAT_GNORM_SUM, true}, row_weighted_ean = {MOEC_STAT_GNORM_SUM, false},
                       row_easy_ep = {MOEC_STAT_UGNORM_SUM, false};

#define MOEC_SCORED(id, needed) \
    .kind = MOEC_PRUNE, .needs = needed, .n_needs = (int)MOEC_COUNT(needed), .row = &row_##id, .plan = plan_by_score

extern const moec_method moec_method_frequency, moec_method_gate, moec_method_ean_sum, moec_method_ean_mean,
    moec_method_reap, moec_method_weighted_ean, moec_method_easy_ep;

const moec_method moec_method_frequency = {
    .name = "frequency",
    .brief = "how often the router selects the expert",
    .paper = "baseline of many papers; here as in REAP the Experts: Why Pruning Prevails for One-Shot MoE compression",
    .arxiv = "2510.13999",
    .formula = "n_e",
    MOEC_SCORED(frequency, need_count),
};
const moec_method moec_method_gate = {
    .name = "gate",
    .brief = "sum of the weights with which the expert was applied (soft counting)",
    .paper = "SEER-MoE: Sparse Expert Efficiency through Regularization for Mixture-of-Experts",
    .arxiv = "2404.05089",
    .formula = "sum_t g_t[e]",
    MOEC_SCORED(gate, need_gate),
};
const moec_method moec_method_ean_sum = {
    .name = "ean-sum",
    .brief = "sum of the norms of the expert's outputs",
    .paper = "Finding Fantastic Experts in MoEs: A Unified Study for Expert Dropping Strategies and Observations",
    .arxiv = "2504.05586",
    .formula = "sum_t |y_t[e]|",
    MOEC_SCORED(ean_sum, need_norm),
};
const moec_method moec_method_ean_mean = {
    .name = "ean-mean",
    .brief = "mean norm of the expert's outputs over the tokens that select it",
    .paper = "How to Score Experts for One-Shot MoE Expert Pruning: A Unified Formulation and Selection Principle",
    .arxiv = "2606.15716",
    .formula = "sum_t |y_t[e]| / n_e",
    MOEC_SCORED(ean_mean, need_norm),
};
const moec_method moec_method_reap = {
    .name = "reap",
    .brief = "mean norm of the weighted output over the tokens that select the expert",
    .paper = "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression",
    .arxiv = "2510.13999",
    .formula = "sum_t g_t[e] |y_t[e]| / n_e",
    MOEC_SCORED(reap, need_gnorm),
};
const moec_method moec_method_weighted_ean = {
    .name = "weighted-ean",
    .brief = "sum of the norms of the weighted outputs",
    .paper = "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression",
    .arxiv = "2510.13999",
    .formula = "sum_t g_t[e] |y_t[e]|",
    MOEC_SCORED(weighted_ean, need_gnorm),
};
const moec_method moec_method_easy_ep = {
    .name = "easy-ep",
    .brief = "as weighted-ean, tokens weighted by how much the layer turns their residual stream",
    .paper = "Domain-Specific Pruning of Large Mixture-of-Experts Models with Few-shot Demonstrations",
    .arxiv = "2504.06792",
    .formula = "sum_t max(1 - cos(h_t, h_t + r_t), 0) g_t[e] |y_t[e]|",
    MOEC_SCORED(easy_ep, need_ugnorm),
};
