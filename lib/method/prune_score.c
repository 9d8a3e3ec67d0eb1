/* One scorer for the saliency methods, each a row of it. For MoE layer l, over the calibration tokens t that select expert e
 * (n of them), with g the weight that the model applies to the expert, y the expert's un-gated output, h the residual stream
 * before the layer, r the sum of g y over the selected experts and u = max(1 - cos(h, h + r), 0):
 *
 *    score[l,e] = sum_t u^q g^b |y|_2^c / n^(1-a)
 *
 * The sums are what calibration stores, so a row names its sum and says whether it is divided by n (a = 0) or not (a = 1).
 * Sums over all tokens or over first choices (seuf, unified, tcess) are further rows; the markers of tcess are divided by the
 * number T of tokens.
 *
 * One domain: the formula as it stands. Several domains, d with weight w_d:
 *    a = 1 (sums)   sum_d w_d score_d[l,e] / sum_e' score_d[l,e'], so that a long text does not outvote a short one
 *                   (EASY-EP's rule for mixed domains); a domain whose layer sums to 0 adds nothing;
 *    a = 0 (means)  sum_d w_d S_d[l,e] / sum_d w_d n_d[l,e]: sums and counts are pooled, since the mean of means would give
 *                   a domain in which an expert was hit twice the say of one in which it was hit a million times.
 *    markers        sum_d w_d S_d[l,e] / T_d: logits may be negative, so there is no share of their sum.
 * An expert that no token selected scores 0 and is reported as unseen.
 * Which rule: for pruning that shall suit any task the taxonomy finds the mean, gate-free scores best (a = b = 0: ean-mean,
 * msan); for one task, those that keep frequency and gate.
 * Source: the papers in the rows; the common form is the taxonomy of arXiv:2606.15716. Departs: sums are kept in
 * f64 and from the weight that the model really applies, where some of the papers' programs take the bare softmax. */
#include "method/method.h"

#include "base/mem.h"

/* What a sum is divided by; and how domains are mixed, above. */
typedef enum over { OVER_NONE, OVER_HITS, OVER_TOKENS } over;

typedef struct score_row {
    moec_stat sum;  /* sum_t u^q g^b |y|^c, f64, or SELECTED (u64) */
    over over;
} score_row;

static void add_sums(double *score, const moec_stats *s, int d, const score_row *r, int64_t l, int64_t n)
{
    const void *block = moec_stat_at(s, d, r->sum, l);
    double total = 0.0, weight = 1.0;
    if (s->n_domains > 1) {
        for (int64_t e = 0; e < n; e++)
            total += moec_stat_cell(block, r->sum, e);
        weight = total > 0.0 ? s->domain[d].weight / total : 0.0;
    }
    for (int64_t e = 0; e < n; e++)
        score[e] += weight * moec_stat_cell(block, r->sum, e);
}

static void add_means(double *score, const moec_stats *s, const score_row *r, int64_t l, int64_t n)
{
    for (int64_t e = 0; e < n; e++) {
        double sum = 0.0, count = 0.0;
        for (int d = 0; d < s->n_domains; d++) {
            double weight = moec_stats_weight(s, d);
            sum += weight * moec_stat_cell(moec_stat_at(s, d, r->sum, l), r->sum, e);
            count += weight * moec_stat_cell(moec_stat_at(s, d, MOEC_STAT_SELECTED, l), MOEC_STAT_SELECTED, e);
        }
        score[e] = count > 0.0 ? sum / count : 0.0;
    }
}

static void add_per_token(double *score, const moec_stats *s, int d, const score_row *r, int64_t l, int64_t n)
{
    const void *block = moec_stat_at(s, d, r->sum, l);
    const double tokens = (double)s->domain[d].tokens, weight = moec_stats_weight(s, d);
    for (int64_t e = 0; tokens > 0.0 && e < n; e++)
        score[e] += weight * moec_stat_cell(block, r->sum, e) / tokens;
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
        if (r->over == OVER_HITS)
            add_means(score + l * n, q->stats, r, l, n);
        for (int d = 0; r->over != OVER_HITS && d < q->stats->n_domains; d++)
            (r->over == OVER_TOKENS ? add_per_token : add_sums)(score + l * n, q->stats, d, r, l, n);
    }
    MOEC_TRY(moec_select(out, me, q, score, err));
done:
    moec_free(score);
    return st;
}

#define MOEC_NEED(id, kind) static const moec_stat need_##id[] = {MOEC_STAT_SELECTED, kind}
static const moec_stat need_count[] = {MOEC_STAT_SELECTED};
MOEC_NEED(gate, MOEC_STAT_GATE_SUM);
MOEC_NEED(norm, MOEC_STAT_NORM_SUM);
MOEC_NEED(norm_sq, MOEC_STAT_NORM_SQ);
MOEC_NEED(gnorm, MOEC_STAT_GNORM_SUM);
MOEC_NEED(gnorm_sq, MOEC_STAT_GNORM_SQ);
MOEC_NEED(ugnorm, MOEC_STAT_UGNORM_SUM);
MOEC_NEED(prob, MOEC_STAT_PROB_SUM);
MOEC_NEED(prob_seq, MOEC_STAT_PROB_SEQ_SUM);
MOEC_NEED(top1, MOEC_STAT_MARKER_TOP1);
MOEC_NEED(topk, MOEC_STAT_MARKER_TOPK);
MOEC_NEED(gate_top1, MOEC_STAT_GATE_TOP1_SUM);

static const score_row row_frequency = {MOEC_STAT_SELECTED, OVER_NONE}, row_gate = {MOEC_STAT_GATE_SUM, OVER_NONE},
                       row_ean_sum = {MOEC_STAT_NORM_SUM, OVER_NONE}, row_ean_mean = {MOEC_STAT_NORM_SUM, OVER_HITS},
                       row_msan = {MOEC_STAT_NORM_SQ, OVER_HITS}, row_reap = {MOEC_STAT_GNORM_SUM, OVER_HITS},
                       row_weighted_ean = {MOEC_STAT_GNORM_SUM, OVER_NONE}, row_energy = {MOEC_STAT_GNORM_SQ, OVER_NONE},
                       row_easy_ep = {MOEC_STAT_UGNORM_SUM, OVER_NONE}, row_unified = {MOEC_STAT_PROB_SUM, OVER_NONE},
                       row_seuf = {MOEC_STAT_PROB_SEQ_SUM, OVER_NONE}, row_tcess = {MOEC_STAT_MARKER_TOP1, OVER_TOKENS},
                       row_tcess_k = {MOEC_STAT_MARKER_TOPK, OVER_TOKENS},
                       row_tcess_prob = {MOEC_STAT_GATE_TOP1_SUM, OVER_TOKENS};

#define MOEC_SCORED(id, needed) \
    .kind = MOEC_PRUNE, .needs = needed, .n_needs = (int)MOEC_COUNT(needed), .row = &row_##id, .plan = plan_by_score

extern const moec_method moec_method_frequency, moec_method_gate, moec_method_ean_sum, moec_method_ean_mean,
    moec_method_msan, moec_method_reap, moec_method_weighted_ean, moec_method_energy, moec_method_easy_ep,
    moec_method_unified, moec_method_seuf, moec_method_tcess, moec_method_tcess_k, moec_method_tcess_prob;

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
    .brief = "sum of the weights with which the expert was applied (soft counting); also ESFT's gate score and Unified "
             "MoE Compression's Expert Drop for DeepSeek",
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
    .brief = "mean norm of the expert's outputs over the tokens that select it: the paper's choice for pruning that shall "
             "suit any task, free of the gate and of how often the text happens to use an expert",
    .paper = "How to Score Experts for One-Shot MoE Expert Pruning: A Unified Formulation and Selection Principle",
    .arxiv = "2606.15716",
    .formula = "sum_t |y_t[e]| / n_e",
    MOEC_SCORED(ean_mean, need_norm),
};
const moec_method moec_method_msan = {
    .name = "msan",
    .brief = "mean squared norm of the expert's outputs over the tokens that select it",
    .paper = "How to Score Experts for One-Shot MoE Expert Pruning: A Unified Formulation and Selection Principle",
    .arxiv = "2606.15716",
    .formula = "sum_t |y_t[e]|^2 / n_e",
    MOEC_SCORED(msan, need_norm_sq),
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
const moec_method moec_method_energy = {
    .name = "energy",
    .brief = "sum of the squared norms of the weighted outputs: what a layer's output loses in square when experts are dropped "
             "whose outputs are orthogonal",
    .paper = "not published; ours",
    .formula = "sum_t g_t[e]^2 |y_t[e]|^2",
    MOEC_SCORED(energy, need_gnorm_sq),
    .is_default = true,
};
const moec_method moec_method_easy_ep = {
    .name = "easy-ep",
    .brief = "as weighted-ean, tokens weighted by how much the layer turns their residual stream",
    .paper = "Domain-Specific Pruning of Large Mixture-of-Experts Models with Few-shot Demonstrations",
    .arxiv = "2504.06792",
    .formula = "sum_t max(1 - cos(h_t, h_t + r_t), 0) g_t[e] |y_t[e]|",
    MOEC_SCORED(easy_ep, need_ugnorm),
};
/* The source sums over sequences and divides by their number, which orders nothing. Its formula for DeepSeek, the applied weights
 * of the selected, is `gate`. */
const moec_method moec_method_unified = {
    .name = "unified",
    .brief = "sum of the router's full scores over all tokens, selected or not: Expert Drop as for Mixtral and Qwen (for DeepSeek "
             "the source sums applied weights: gate)",
    .paper = "Towards Efficient Mixture of Experts: A Holistic Study of Compression Techniques",
    .arxiv = "2406.02500",
    .formula = "sum_t s_t[e], s the softmax, sigmoid or ReLU of the logits",
    MOEC_SCORED(unified, need_prob),
};
const moec_method moec_method_seuf = {
    .name = "seuf",
    .brief = "expert attribution: the router's scores, every text window counting the same whatever its length",
    .paper = "SEUF: Is Unlearning One Expert Enough for Mixture-of-Experts LLMs?",
    .arxiv = "2411.18797",
    .formula = "sum_sequences 1/length sum_t s_t[e]",
    MOEC_SCORED(seuf, need_prob_seq),
};
/* Trap of the source: an expert that is often the first choice with a negative logit scores below one that never is, which has
 * 0. tcess-prob has no such case. */
const moec_method moec_method_tcess = {
    .name = "tcess",
    .brief = "mean raw logit over all tokens, 0 where the expert is not the first choice (Ka = 1); logits below 0 count against an "
             "expert",
    .paper = "PreMoe: Lightening MoEs on Constrained Memory by Expert Pruning and Retrieval",
    .arxiv = "2505.17639",
    .formula = "1/T sum_t z_t[e] where e = argmax z_t",
    MOEC_SCORED(tcess, need_top1),
};
const moec_method moec_method_tcess_k = {
    .name = "tcess-k",
    .brief = "as tcess, with the logits of the k largest (Ka = k)",
    .paper = "PreMoe: Lightening MoEs on Constrained Memory by Expert Pruning and Retrieval",
    .arxiv = "2505.17639",
    .formula = "1/T sum_t z_t[e] where z_t[e] is among the k largest",
    MOEC_SCORED(tcess_k, need_topk),
};
const moec_method moec_method_tcess_prob = {
    .name = "tcess-prob",
    .brief = "as tcess, with the applied weight in place of the logit, so that no score is below 0",
    .paper = "not published; ours, after PreMoe",
    .formula = "1/T sum_t g_t[e] where e is the first choice",
    MOEC_SCORED(tcess_prob, need_gate_top1),
};
