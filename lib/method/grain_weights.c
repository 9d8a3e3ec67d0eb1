/* Single weights set to zero, in rows or in N of M neighbours; see grain.h. */
#include "method/grain.h"

#include "base/mem.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static const double lambda = 0.08;

int moec_weights_rule(const moec_method *me)
{
    return *(const int *)me->row;
}

static void ones(double *s, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        s[i] = 1.0;
}

static void roots(double *s, int64_t n, double tokens)
{
    for (int64_t i = 0; i < n; i++)
        s[i] = sqrt(s[i] / tokens);
}

/* Of the inputs of all experts of a layer together. */
static double sum_all(double *out, const moec_request *q, int64_t set, int64_t n)
{
    double tokens = 0.0;
    memset(out, 0, (size_t)n * sizeof *out);
    for (int d = 0; d < q->stats->n_domains; d++) {
        const double w = moec_stats_weight(q->stats, d);
        const double *sum = moec_stat_at(q->stats, d, MOEC_STAT_XIN_SQ, set);
        const uint64_t *count = moec_stat_at(q->stats, d, MOEC_STAT_SELECTED, set);
        for (int64_t e = 0; e < q->model->dims.experts; e++) {
            for (int64_t i = 0; i < n; i++)
                out[i] += w * sum[e * n + i];
            tokens += w * (double)count[e];
        }
    }
    return tokens;
}

void moec_weights_scales(double *in, double *mid, bool *seen, const moec_method *me, const moec_request *q, int64_t set,
                         int64_t expert)
{
    const int64_t H = q->model->dims.hidden, I = q->model->dims.expert_width;
    *seen = true;
    if (moec_weights_rule(me) == MOEC_WEIGHTS_MAGNITUDE || q->model->set[set].kind != MOEC_SET_MOE) {
        ones(in, H);
        ones(mid, I);
        return;
    }
    double n = moec_grain_sum(in, q->stats, MOEC_STAT_XIN_SQ, set, expert, H);
    (void)moec_grain_sum(mid, q->stats, MOEC_STAT_ACT_SQ, set, expert, I);
    if (n > 0.0) {
        roots(in, H, n);
        roots(mid, I, n);
        return;
    }
    *seen = false;
    ones(mid, I);
    n = sum_all(in, q, set, H);
    if (n > 0.0)
        roots(in, H, n);
    else
        ones(in, H);
}

static void swap(double *a, double *b)
{
    const double t = *a;
    *a = *b;
    *b = t;
}

/* The k-th smallest (from 0) of v[n], which is put in another order: Hoare's selection with the middle as pivot. */
static double kth(double *v, int64_t n, int64_t k)
{
    int64_t lo = 0, hi = n - 1;
    while (lo < hi) {
        const double pivot = v[lo + (hi - lo) / 2];
        int64_t i = lo, j = hi;
        while (i <= j) {
            while (v[i] < pivot)
                i++;
            while (v[j] > pivot)
                j--;
            if (i <= j)
                swap(&v[i++], &v[j--]);
        }
        if (k <= j)
            hi = j;
        else if (k >= i)
            lo = i;
        else
            break;
    }
    return v[k];
}

/* Zeros the `cut` lowest scores of a run. */
static void zero_lowest(float *w, const double *score, int64_t n, int64_t cut, double *order)
{
    if (cut <= 0)
        return;
    memcpy(order, score, (size_t)n * sizeof *order);
    const double limit = kth(order, n, cut - 1);
    for (int64_t i = 0; i < n; i++)
        if (score[i] < limit) {
            w[i] = 0.0f;
            cut--;
        }
    for (int64_t i = 0; i < n && cut > 0; i++)
        if (score[i] == limit) {
            w[i] = 0.0f;
            cut--;
        }
}

int64_t moec_weights_cut(float *w, int64_t n, const double *s, double share, int64_t some, int64_t of, double *scratch)
{
    double *score = scratch, *order = scratch + n;
    int64_t zeros = 0;
    for (int64_t i = 0; i < n; i++)
        score[i] = fabs((double)w[i]) * s[i];
    if (of > 0)
        for (int64_t i = 0; i + of <= n; i += of)
            zero_lowest(w + i, score + i, of, of - some, order);
    else
        zero_lowest(w, score, n, (int64_t)floor((double)n * share + 1e-9), order);
    for (int64_t i = 0; i < n; i++)
        zeros += w[i] == 0.0f;
    return zeros;
}

void moec_weights_owl(double *ratio, const double *d, int64_t n, double share)
{
    double lo = d[0], hi = d[0], mean = 0.0;
    for (int64_t i = 1; i < n; i++) {
        lo = d[i] < lo ? d[i] : lo;
        hi = d[i] > hi ? d[i] : hi;
    }
    for (int64_t i = 0; i < n; i++) {
        ratio[i] = hi > lo ? (d[i] - lo) / (hi - lo) * 2.0 * lambda : 0.0;
        mean += ratio[i] / (double)n;
    }
    for (int64_t i = 0; i < n; i++) {
        ratio[i] = share - (ratio[i] - mean);
        if (ratio[i] <= 0.0)
            ratio[i] = share > 0.0 ? 0.01 : 0.0;
        ratio[i] = ratio[i] > 1.0 ? 1.0 : ratio[i];
    }
}

static moec_status plan_weights(moec_plan **out, const moec_method *me, const moec_request *q, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_plan *p = NULL;
    const moec_dims *d = &q->model->dims;
    char pattern[48];
    *out = NULL;
    if (q->of > 0 && (q->some < 1 || q->some >= q->of))
        return moec_fail(err, MOEC_EINVAL, "--pattern %lld:%lld: expected N:M with N from 1 to M - 1", (long long)q->some,
                         (long long)q->of);
    if (q->of > 0 && (d->hidden % q->of != 0 || d->expert_width % q->of != 0))
        return moec_fail(err, MOEC_EINVAL, "--pattern %lld:%lld: rows of %lld and %lld weights are no multiples of %lld",
                         (long long)q->some, (long long)q->of, (long long)d->hidden, (long long)d->expert_width,
                         (long long)q->of);
    if (q->of > 0 && moec_weights_rule(me) == MOEC_WEIGHTS_OWL)
        return moec_fail(err, MOEC_EINVAL, "owl gives each layer a share of its own, which --pattern fixes; take wanda");
    MOEC_TRY(moec_grain_plan(&p, me, q, err));
    snprintf(pattern, sizeof pattern, "%lld:%lld", (long long)q->some, (long long)q->of);
    MOEC_TRY(q->of > 0 ? moec_plan_set_option(p, "pattern", moec_json_new_string(pattern), err)
                       : moec_plan_set_option(p, "sparsity", moec_json_new_real(q->share), err));
    for (int64_t i = 0; i < p->n_sets; i++)
        if (p->layer[i].kind != MOEC_SET_HEADS)
            p->layer[i].rewritten = MOEC_PART_GATE | MOEC_PART_UP | MOEC_PART_DOWN;
    *out = p;
    p = NULL;
done:
    moec_plan_free(p);
    return st;
}

static const moec_stat need_inputs[] = {MOEC_STAT_SELECTED, MOEC_STAT_XIN_SQ, MOEC_STAT_ACT_SQ};
static const int rule_magnitude = MOEC_WEIGHTS_MAGNITUDE, rule_wanda = MOEC_WEIGHTS_WANDA, rule_owl = MOEC_WEIGHTS_OWL;

#define MOEC_SPARSE(id) .kind = MOEC_PRUNE, .grain = MOEC_GRAIN_WEIGHTS, .row = &rule_##id, .plan = plan_weights
#define MOEC_SPARSE_SEEN(id) MOEC_SPARSE(id), .needs = need_inputs, .n_needs = (int)MOEC_COUNT(need_inputs)

extern const moec_method moec_method_magnitude, moec_method_wanda, moec_method_owl;

const moec_method moec_method_magnitude = {
    .name = "magnitude",
    .brief = "zeros where weights are smallest, in each row",
    .paper = "Learning both Weights and Connections for Efficient Neural Networks",
    .arxiv = "1506.02626",
    .formula = "|W_oi|",
    MOEC_SPARSE(magnitude),
};
const moec_method moec_method_wanda = {
    .name = "wanda",
    .brief = "zeros where weight times input is smallest, in each row",
    .paper = "A Simple and Effective Pruning Approach for Large Language Models",
    .arxiv = "2306.11695",
    .formula = "|W_oi| sqrt(E x_i^2)",
    MOEC_SPARSE_SEEN(wanda),
    .is_default = true,
};
const moec_method moec_method_owl = {
    .name = "owl",
    .brief = "as wanda, fewer zeros in layers with more outliers",
    .paper = "Outlier Weighed Layerwise Sparsity: A Missing Secret Sauce for Pruning LLMs to High Sparsity",
    .arxiv = "2310.05175",
    .formula = "|W_oi| sqrt(E x_i^2), share_l = S - (D'_l - mean D')",
    MOEC_SPARSE_SEEN(owl),
};
