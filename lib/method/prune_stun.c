/* STUN's first stage: experts that behave alike are one cluster, and one of each stays as it is. For experts i, j of a layer:
 *
 *    distance[i,j] = lambda1 |R_i - R_j|_2 - lambda2 a[i,j] / mean(a)
 *    R_i the router's row; a[i,j] how many tokens select both, its mean over the pairs i < j of the layer
 *
 * clustered to K (cluster.h). Of a cluster stays the member whose weights (gate, up, down, flattened) are nearest in L2 to the
 * cluster's mean, with its own router row. Two are equally near: the one that more tokens select stays, where statistics are
 * given, else the lower number. Score: how many experts a kept one stands for, 0 for the others.
 * lambda1 = 1, lambda2 = 0 is the paper's choice for Arctic, and needs no data.
 * Several domains: a is sum_d w_d a_d / mean(a_d) over sum_d w_d.
 * Protected experts are clusters of their own. Where the router has groups, each is clustered by itself.
 * Source: Lee et al., STUN (arXiv:2409.06211), section 4 and its repository. Departs: the same K in every layer, where the
 * source has one threshold for all and unequal counts, which no client loads; a counts all k choices (there the first two);
 * nothing is averaged in layers that come down to few clusters (kappa), so nothing but pruning is done.
 * Cost: seconds of clustering; one cluster's experts read twice, block by block, with one block in memory. */
#include "method/method.h"

#include "base/log.h"
#include "base/mem.h"
#include "base/par.h"
#include "method/cluster.h"

#include <math.h>
#include <string.h>

enum { ROWS = 32, LANES = 8 }; /* of a matrix in memory at once; sums side by side, so that none waits */

typedef struct stun {
    const moec_request *q;
    int64_t n, keep;
    double *score;    /* [layers * n] */
    int32_t *cluster; /* [layers * n] its lowest member in the layer, -1: protected or removed without a cluster */
    moec_progress progress;
} stun;

/* --- distances ------------------------------------------------------------------------------------------------------- */

static double distance_of(const float *x, const float *y, int64_t n)
{
    double sum[LANES] = {0.0}, all = 0.0;
    for (int64_t c = 0; c < n; c += LANES)
        for (int64_t k = 0; k < LANES && c + k < n; k++) {
            const double v = (double)x[c + k] - (double)y[c + k];
            sum[k] += v * v;
        }
    for (int k = 0; k < LANES; k++)
        all += sum[k];
    return sqrt(all);
}

static moec_status add_row_distance(double *d, const stun *s, int64_t layer, moec_err *err)
{
    const moec_weight *w = s->q->model->set[layer].router;
    float *rows = NULL;
    moec_status st = MOEC_NEW(rows, (size_t)(w->rows * w->cols), err);
    if (st != MOEC_OK)
        return st;
    moec_weight_read(rows, w->cols, w, 0, w->rows, 0, w->cols);
    for (int64_t i = 0; i < s->n; i++)
        for (int64_t j = 0; j < i; j++) {
            d[i * s->n + j] += s->q->lambda1 * distance_of(rows + i * w->cols, rows + j * w->cols, w->cols);
            d[j * s->n + i] = d[i * s->n + j];
        }
    moec_free(rows);
    return MOEC_OK;
}

static moec_status add_coactivation(double *d, const stun *s, int64_t layer, moec_err *err)
{
    const moec_stats *stats = s->q->stats;
    const int64_t n = s->n;
    double weights = 0.0;
    for (int k = 0; k < stats->n_domains; k++)
        weights += stats->domain[k].weight;
    for (int k = 0; k < stats->n_domains; k++) {
        const uint64_t *a = moec_stat_at(stats, k, MOEC_STAT_COACT, layer);
        double mean = 0.0;
        if (!(stats->domain[k].weight > 0.0))
            continue;
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < i; j++)
                mean += (double)a[i * n + j];
        mean /= (double)(n * (n - 1) / 2);
        if (!(mean > 0.0))
            return moec_fail(err, MOEC_EFORMAT, "layer %lld: no two experts were selected together in domain %s; --stun-lambda2 "
                             "needs that", (long long)s->q->model->set[layer].layer, stats->domain[k].name);
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < n; j++)
                d[i * n + j] -= s->q->lambda2 * stats->domain[k].weight / weights * (double)a[i * n + j] / mean;
    }
    return MOEC_OK;
}

/* --- clusters -------------------------------------------------------------------------------------------------------- */

static bool is_guarded(const stun *s, int64_t layer, int64_t e)
{
    return s->q->guard && s->q->guard->flag[layer * s->n + e];
}

/* Clusters of experts [first, first + width) that are not protected, so that `quota` stay of all. */
static moec_status cluster_group(stun *s, const double *d, int64_t layer, int64_t first, int64_t width, int64_t quota,
                                 moec_err *err)
{
    moec_status st = MOEC_OK;
    int32_t *member = NULL, *label = NULL, *cluster = s->cluster + layer * s->n;
    double *part = NULL;
    int64_t n = 0;
    MOEC_TRY(MOEC_NEW(member, (size_t)width, err));
    for (int64_t e = first; e < first + width; e++) {
        cluster[e] = -1;
        if (is_guarded(s, layer, e))
            quota--;
        else
            member[n++] = (int32_t)e;
    }
    if (quota < 1 || n == 0)
        goto done; /* all others go; too many protected are refused by moec_select */
    MOEC_TRY(MOEC_NEW(label, (size_t)n, err));
    MOEC_TRY(MOEC_NEW(part, (size_t)(n * n), err));
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++)
            part[i * n + j] = d[member[i] * s->n + member[j]];
    MOEC_TRY(moec_cluster(label, part, n, quota, err));
    for (int64_t i = 0; i < n; i++) {
        int64_t k = 0;
        while (label[k] != label[i])
            k++;
        cluster[member[i]] = member[k];
    }
done:
    moec_free(part);
    moec_free(label);
    moec_free(member);
    return st;
}

static moec_status cluster_layers(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    stun *s = ctx;
    moec_status st = MOEC_OK;
    const int64_t groups = s->keep == s->n ? 1 : moec_request_groups(s->q), width = s->n / groups;
    double *d = NULL;
    (void)worker;
    MOEC_TRY(MOEC_NEW(d, (size_t)(s->n * s->n), err));
    for (int64_t l = lo; l < hi; l++) {
        MOEC_TRY(moec_interrupted(err));
        memset(d, 0, (size_t)(s->n * s->n) * sizeof *d);
        if (s->q->lambda1 > 0.0)
            MOEC_TRY(add_row_distance(d, s, l, err));
        if (s->q->lambda2 > 0.0)
            MOEC_TRY(add_coactivation(d, s, l, err));
        for (int64_t g = 0; g < groups; g++)
            MOEC_TRY(moec_within(err, cluster_group(s, d, l, g * width, width, s->keep / groups, err), "layer %lld",
                                 (long long)s->q->model->set[l].layer));
    }
done:
    moec_free(d);
    return st;
}

/* --- who stands for a cluster ---------------------------------------------------------------------------------------- */

static double squares_from(const float *x, const double *mean, int64_t n)
{
    double sum[LANES] = {0.0}, all = 0.0;
    for (int64_t c = 0; c < n; c += LANES)
        for (int64_t k = 0; k < LANES && c + k < n; k++) {
            const double v = (double)x[c + k] - mean[c + k];
            sum[k] += v * v;
        }
    for (int k = 0; k < LANES; k++)
        all += sum[k];
    return all;
}

/* Gives rows [r, r + rows) back, where they lie together, and behind the last all: the system may have mapped more around. */
static void drop_rows(const moec_weight *w, int64_t r, int64_t rows)
{
    moec_weight some = *w;
    some.at += r * w->row_step;
    some.rows = rows;
    if (r + rows == w->rows)
        moec_weight_drop(w);
    else if (w->col_step == 1)
        moec_weight_drop(&some);
}

/* Adds each member's squared distance from the mean of one matrix. */
static moec_status add_distances(double *out, moec_mlp *expert, const int32_t *member, int64_t n, int part,
                                 moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t all = moec_mlp_matrix(&expert[member[0]], part)->rows, cols = moec_mlp_matrix(&expert[member[0]], part)->cols;
    float *buf = NULL;
    double *mean = NULL;
    MOEC_TRY(MOEC_NEW(buf, ROWS * (size_t)cols, err));
    MOEC_TRY(MOEC_NEW(mean, ROWS * (size_t)cols, err));
    for (int64_t r = 0; r < all; r += ROWS) {
        const int64_t rows = all - r < ROWS ? all - r : ROWS, cells = rows * cols;
        MOEC_TRY(moec_interrupted(err));
        memset(mean, 0, (size_t)cells * sizeof *mean);
        for (int64_t i = 0; i < n; i++) {
            moec_weight_read(buf, cols, moec_mlp_matrix(&expert[member[i]], part), r, rows, 0, cols);
            for (int64_t c = 0; c < cells; c++)
                mean[c] += (double)buf[c];
        }
        for (int64_t c = 0; c < cells; c++)
            mean[c] /= (double)n;
        for (int64_t i = 0; i < n; i++) {
            moec_weight_read(buf, cols, moec_mlp_matrix(&expert[member[i]], part), r, rows, 0, cols);
            out[i] += squares_from(buf, mean, cells);
            drop_rows(moec_mlp_matrix(&expert[member[i]], part), r, rows);
        }
    }
done:
    moec_free(mean);
    moec_free(buf);
    return st;
}

/* Tokens that select e in all domains; 0 when not known. */
static double times_selected(const moec_stats *s, int64_t layer, int64_t e)
{
    double n = 0.0;
    for (int d = 0; s && d < s->n_domains; d++) {
        const uint64_t *count = moec_stat_at(s, d, MOEC_STAT_SELECTED, layer);
        n += count ? (double)count[e] : 0.0;
    }
    return n;
}

static moec_status nearest(int32_t *out, const stun *s, int64_t layer, const int32_t *member, int64_t n, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_model *m = s->q->model;
    moec_mlp *expert = m->layer[m->set[layer].layer].expert;
    double *d = NULL;
    *out = member[0];
    if (n == 1)
        return MOEC_OK;
    if (n == 2) {
        if (times_selected(s->q->stats, layer, member[1]) > times_selected(s->q->stats, layer, member[0]))
            *out = member[1];
        return MOEC_OK;
    }
    MOEC_TRY(MOEC_NEW(d, (size_t)n, err));
    for (int part = 0; part < 3; part++)
        MOEC_TRY(add_distances(d, expert, member, n, part, err));
    for (int64_t i = 0, best = 0; i < n; i++) {
        if (!isfinite(d[i])) {
            st = moec_fail(err, MOEC_ENUMERIC, "layer %lld: weights of an expert like %d are not finite",
                           (long long)m->set[layer].layer, (int)member[i]);
            goto done;
        }
        best = d[i] < d[best] ? i : best;
        *out = member[best];
    }
done:
    moec_free(d);
    return st;
}

/* Scores of the clusters whose lowest members are layer * n + e, for these in [lo, hi). */
static moec_status choose(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    stun *s = ctx;
    moec_status st = MOEC_OK;
    int32_t *member = NULL, kept;
    (void)worker;
    MOEC_TRY(MOEC_NEW(member, (size_t)s->n, err));
    for (int64_t at = lo; at < hi; at++) {
        const int64_t layer = at / s->n, first = at % s->n;
        int64_t n = 0;
        for (int64_t e = first; e < s->n; e++)
            if (s->cluster[layer * s->n + e] == first)
                member[n++] = (int32_t)e;
        if (n > 0) {
            MOEC_TRY(nearest(&kept, s, layer, member, n, err));
            s->score[layer * s->n + kept] = (double)n;
        } else if (is_guarded(s, layer, first)) {
            s->score[at] = 1.0;
        }
        moec_progress_step(&s->progress, 1);
    }
done:
    moec_free(member);
    return st;
}

static moec_status check_request(const moec_method *me, const moec_request *q, moec_err *err)
{
    if (!(q->lambda1 >= 0.0 && q->lambda2 >= 0.0 && q->lambda1 + q->lambda2 > 0.0 && isfinite(q->lambda1 + q->lambda2)))
        return moec_fail(err, MOEC_EINVAL, "--stun-lambda1 and --stun-lambda2 are %g and %g: none may be below 0, one must be above",
                         q->lambda1, q->lambda2);
    if (q->lambda2 > 0.0 && !q->stats)
        return moec_fail(err, MOEC_EINVAL, "--stun-lambda2 needs statistics; give a file made by calibrate with --stats");
    for (int d = 0; q->lambda2 > 0.0 && d < q->stats->n_domains; d++)
        if (!q->stats->domain[d].data[MOEC_STAT_COACT])
            return moec_no_statistic(me, q->stats, d, MOEC_STAT_COACT, err);
    return MOEC_OK;
}

static moec_status plan_stun(moec_plan **out, const moec_method *me, const moec_request *q, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t layers = q->model->moe_layers, cells = layers * q->model->dims.experts;
    stun s = {.q = q, .n = q->model->dims.experts};
    *out = NULL;
    MOEC_TRY(check_request(me, q, err));
    MOEC_TRY(moec_kept_experts(&s.keep, q, err));
    MOEC_TRY(MOEC_NEW(s.score, (size_t)cells, err));
    MOEC_TRY(MOEC_NEW(s.cluster, (size_t)cells, err));
    MOEC_TRY(moec_par_for(layers, 1, cluster_layers, &s, err));
    moec_progress_start(&s.progress, "comparing weights", "experts", (uint64_t)cells, 0);
    MOEC_TRY(moec_par_for(cells, 1, choose, &s, err));
    moec_progress_finish(&s.progress);
    MOEC_TRY(moec_select(out, me, q, s.score, err));
done:
    moec_progress_stop(&s.progress);
    moec_free(s.cluster);
    moec_free(s.score);
    return st;
}

static const moec_opt stun_opts[] = {MOEC_STUN_ROWS(moec_request, lambda1, lambda2), {.kind = MOEC_OPT_END}};

extern const moec_method moec_method_stun;
const moec_method moec_method_stun = {
    .name = "stun",
    .kind = MOEC_PRUNE,
    .brief = "clusters of like router rows (or of experts that are selected together); of each the expert nearest to the mean of the "
             "weights stays, its score the size of its cluster; needs no statistics unless --stun-lambda2 is above 0",
    .paper = "STUN: Structured-Then-Unstructured Pruning for Scalable MoE Pruning",
    .arxiv = "2409.06211",
    .formula = "clusters by lambda1 |R_i - R_j| - lambda2 a_ij / mean(a)",
    .opts = stun_opts,
    .by_count = true,
    .plan = plan_stun,
};
