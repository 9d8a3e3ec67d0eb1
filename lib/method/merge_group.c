/* Who goes with whom: a recipe's distance, grouping and masses put together; see merge.h. */
#include "method/group_parts.h"
#include "method/merge_parts.h"

#include "base/mem.h"
#include "base/par.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- results and checks -------------------------------------------------------------------------------------------------- */

moec_status moec_merge_groups_new(moec_merge_groups *out, int64_t experts, moec_err *err)
{
    moec_status st = MOEC_OK;
    *out = (moec_merge_groups){0};
    if (experts < 1 || experts > INT32_MAX)
        return moec_fail(err, MOEC_EINVAL, "groups of %lld experts: there must be at least one", (long long)experts);
    MOEC_TRY(MOEC_NEW(out->centre, (size_t)experts, err));
    MOEC_TRY(MOEC_NEW(out->weight, (size_t)experts, err));
    MOEC_TRY(MOEC_NEW(out->saliency, (size_t)experts, err));
    MOEC_TRY(MOEC_NEW(out->distance, (size_t)experts, err));
done:
    if (st != MOEC_OK)
        moec_merge_groups_release(out);
    return st;
}

void moec_merge_groups_release(moec_merge_groups *g)
{
    moec_free(g->centre);
    moec_free(g->weight);
    moec_free(g->saliency);
    moec_free(g->distance);
    *g = (moec_merge_groups){0};
}

moec_status moec__merge_check(const moec_merge_task *t, bool blind, bool outputs, moec_err *err)
{
    const moec_dims *d = &t->model->dims;
    for (int64_t i = 0; i < d->null_experts; i++)
        if (moec_family_null(t->model->family, i) != MOEC_NULL_ZERO)
            return moec_fail(err, MOEC_EINVAL, "experts without a network give a part of the output here, whose weight changes "
                             "with who stays; merging does not follow it");
    if (outputs && t->model->family->weight_on_input)
        return moec_fail(err, MOEC_EINVAL, "the router's weights multiply the input of experts here, so that outputs depend on them; "
                         "choose a distance (logits, weights, router-rows) and masses (count, gate) without outputs");
    if (blind)
        return MOEC_OK;
    if (t->n < 1 || t->n > INT32_MAX || t->slots < 1 || t->ld < d->experts + d->null_experts)
        return moec_fail(err, MOEC_EINVAL, "%lld tokens with %lld logits and %lld places for experts each: nothing to look at",
                         (long long)t->n, (long long)t->ld, (long long)t->slots);
    return MOEC_OK;
}

static bool is_guarded(const moec_merge_task *t, int64_t e)
{
    return t->guarded && t->guarded[e];
}

static moec_status check_sizes(const moec_merge_task *t, moec_err *err)
{
    const int64_t experts = t->model->dims.experts;
    if (t->keep < 1 || t->keep > experts || t->blocks < 1 || experts % t->blocks != 0 || t->keep % t->blocks != 0)
        return moec_fail(err, MOEC_EINVAL, "%lld of %lld experts cannot stay, in %lld groups of the router", (long long)t->keep,
                         (long long)experts, (long long)t->blocks);
    const int64_t width = experts / t->blocks, stay = t->keep / t->blocks;
    for (int64_t b = 0; b < t->blocks; b++) {
        int64_t n = 0;
        for (int64_t e = b * width; e < (b + 1) * width; e++)
            n += is_guarded(t, e);
        if (n > stay)
            return moec_fail(err, MOEC_EINVAL, "%lld protected experts%s, of which %lld stay: keep more or protect fewer",
                             (long long)n, t->blocks > 1 ? " in a group of the router" : "", (long long)stay);
    }
    return MOEC_OK;
}

/* ---- groupings ----------------------------------------------------------------------------------------------------------- */

/* What a grouping reads. */
typedef enum matrix_kind { PLAIN, SQUARES, KERNEL, AFFINITY, NOTHING } matrix_kind;

/* `objective`: what the groups lose, of ways that have such a thing; or NULL. */
typedef moec_status way_fn(int32_t *centre, double *objective, const moec_group_task *g, const moec_merge_recipe *r,
                           const double *matrix, moec_err *err);

static moec_status by_nearest(int32_t *centre, double *objective, const moec_group_task *g, const moec_merge_recipe *r,
                              const double *matrix, moec_err *err)
{
    (void)objective;
    (void)r;
    (void)matrix;
    return moec_group_nearest(centre, g, err);
}

static moec_status by_pseudo(int32_t *centre, double *objective, const moec_group_task *g, const moec_merge_recipe *r,
                             const double *matrix, moec_err *err)
{
    (void)objective;
    (void)matrix;
    return moec_group_pseudo(centre, g, r->group_size, err);
}

/* Heights are what each union adds. */
static moec_status by_linkage(int32_t *centre, double *objective, const moec_group_task *g, const moec_merge_recipe *r,
                              const double *matrix, moec_err *err)
{
    const moec_linkage linkage = r->grouping == MOEC_BY_AVERAGE ? MOEC_LINK_AVERAGE : r->grouping == MOEC_BY_WARD ? MOEC_LINK_WARD
                                 : r->grouping == MOEC_BY_COMPLETE ? MOEC_LINK_COMPLETE : MOEC_LINK_SINGLE;
    double *height = NULL;
    moec_status st = MOEC_OK;
    (void)matrix;
    if (objective)
        MOEC_TRY(MOEC_NEW(height, (size_t)(g->n - g->keep), err));
    MOEC_TRY(moec_group_linkage(centre, height, g, linkage, err));
    for (int64_t i = 0; objective && i < g->n - g->keep; i++)
        *objective += height[i];
done:
    moec_free(height);
    return st;
}

static moec_status by_kmeans(int32_t *centre, double *objective, const moec_group_task *g, const moec_merge_recipe *r,
                             const double *matrix, moec_err *err)
{
    return moec_group_kmeans(centre, objective, g, matrix, r->restarts, err);
}

static moec_status by_spectral(int32_t *centre, double *objective, const moec_group_task *g, const moec_merge_recipe *r,
                               const double *matrix, moec_err *err)
{
    (void)objective;
    return moec_group_spectral(centre, g, matrix, r->restarts, err);
}

/* In each block the fixed ones stay, then the largest, the lowest number first on ties. */
static moec_status by_pruning(int32_t *centre, double *objective, const moec_group_task *g, const moec_merge_recipe *r,
                              const double *matrix, moec_err *err)
{
    const int64_t width = g->n / g->blocks;
    (void)objective;
    (void)r;
    (void)matrix;
    (void)err;
    for (int64_t e = 0; e < g->n; e++) {
        const bool fixed = g->fixed && g->fixed[e];
        int64_t before = 0;
        for (int64_t f = e / width * width; f < (e / width + 1) * width; f++) {
            const bool other = g->fixed && g->fixed[f];
            const bool more = g->mass[f] > g->mass[e] || (g->mass[f] == g->mass[e] && f < e);
            before += other != fixed ? other : more;
        }
        centre[e] = before < g->keep / g->blocks ? (int32_t)e : -1;
    }
    return MOEC_OK;
}

static const struct way {
    way_fn *fn;
    matrix_kind reads;
    bool loses; /* has an objective */
} ways[MOEC_BY_COUNT] = {
    [MOEC_BY_NEAREST] = {by_nearest, PLAIN, false},    [MOEC_BY_PSEUDO] = {by_pseudo, PLAIN, false},
    [MOEC_BY_AVERAGE] = {by_linkage, PLAIN, true},     [MOEC_BY_WARD] = {by_linkage, SQUARES, true},
    [MOEC_BY_COMPLETE] = {by_linkage, PLAIN, true},    [MOEC_BY_SINGLE] = {by_linkage, PLAIN, true},
    [MOEC_BY_KMEANS] = {by_kmeans, KERNEL, true},      [MOEC_BY_SPECTRAL] = {by_spectral, AFFINITY, false},
    [MOEC_BY_PRUNING] = {by_pruning, NOTHING, false},
};

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* m [n,n], squared distances, becomes exp(-m / median of the pairs); with a median of 0, 1 where it is 0 and else 0. */
static moec_status make_affinity(double *m, int64_t n, moec_err *err)
{
    double *sorted = NULL, median = 0.0;
    int64_t pairs = 0;
    moec_status st = MOEC_NEW(sorted, (size_t)(n * (n - 1) / 2), err);
    if (st != MOEC_OK)
        return st;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < i; j++)
            sorted[pairs++] = m[i * n + j];
    if (pairs > 0) {
        qsort(sorted, (size_t)pairs, sizeof *sorted, ascending);
        median = 0.5 * (sorted[(pairs - 1) / 2] + sorted[pairs / 2]);
    }
    for (int64_t i = 0; i < n * n; i++)
        m[i] = m[i] == 0.0 ? 1.0 : median > 0.0 ? exp(-m[i] / median) : 0.0;
    moec_free(sorted);
    return MOEC_OK;
}

/* distance [E,E] as the recipe has it, matrix [E,E] what its grouping reads; or the former is that. */
static moec_status make_matrices(double *distance, double *matrix, const moec_merge_task *t, const moec_merge_recipe *r,
                                 moec_err *err)
{
    const matrix_kind reads = ways[r->grouping].reads;
    const int64_t n = t->model->dims.experts;
    moec_status st = moec_merge_distances(distance, reads == KERNEL ? matrix : NULL, t, r->distance, err);
    if (st != MOEC_OK || reads == KERNEL)
        return st;
    memcpy(matrix, distance, (size_t)(n * n) * sizeof *matrix);
    for (int64_t i = 0; reads != PLAIN && !moec__merge_is_square(r->distance) && i < n * n; i++)
        matrix[i] *= matrix[i];
    return reads == AFFINITY ? make_affinity(matrix, n, err) : MOEC_OK;
}

/* What a grouping is made from. */
typedef struct matrices {
    double *distance, *read; /* [E,E]; see make_matrices */
} matrices;

static moec_status matrices_new(matrices *m, const moec_merge_task *t, const moec_merge_recipe *r, moec_err *err)
{
    moec_status st = MOEC_OK;
    const size_t n = (size_t)t->model->dims.experts;
    if (ways[r->grouping].reads == NOTHING)
        return st;
    MOEC_TRY(MOEC_NEW(m->distance, n * n, err));
    MOEC_TRY(MOEC_NEW(m->read, n * n, err));
    MOEC_TRY(make_matrices(m->distance, m->read, t, r, err));
done:
    return st;
}

static void matrices_release(matrices *m)
{
    moec_free(m->distance);
    moec_free(m->read);
}

static moec_group_task group_task(const matrices *m, const double *saliency, const moec_merge_task *t, const moec_merge_recipe *r)
{
    return (moec_group_task){.n = t->model->dims.experts, .keep = t->keep, .blocks = t->blocks, .mass = saliency,
                             .fixed = t->guarded, .seed = t->seed,
                             .distance = ways[r->grouping].reads == SQUARES ? m->read : m->distance};
}

static moec_status group_them(int32_t *centre, double *far, const double *saliency, const moec_merge_task *t,
                              const moec_merge_recipe *r, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t n = t->model->dims.experts;
    matrices m = {NULL, NULL};
    MOEC_TRY(matrices_new(&m, t, r, err));
    const moec_group_task g = group_task(&m, saliency, t, r);
    MOEC_TRY(ways[r->grouping].fn(centre, NULL, &g, r, m.read, err));
    for (int64_t e = 0; e < n; e++)
        far[e] = centre[e] == e ? 0.0 : m.distance && centre[e] >= 0 ? m.distance[e * n + centre[e]] : (double)NAN;
done:
    matrices_release(&m);
    return st;
}

/* ---- what fewer groups lose ---------------------------------------------------------------------------------------------- */

moec_status moec_merge_curve_check(const moec_merge_recipe *r, moec_err *err)
{
    char names[200] = "";
    size_t at = 0;
    if (ways[r->grouping].loses)
        return MOEC_OK;
    for (int i = 0; i < MOEC_BY_COUNT && at < sizeof names; i++)
        if (ways[i].loses)
            at += (size_t)snprintf(names + at, sizeof names - at, "%s%s", at > 0 ? ", " : "", moec_merge_grouping_names[i]);
    return moec_fail(err, MOEC_EINVAL, "--allocation loss: grouping=%s has no objective that says what fewer groups lose; those that "
                     "have one are %s", moec_merge_grouping_names[r->grouping], names);
}

typedef struct curve {
    const moec_merge_recipe *r;
    const moec_group_task *g;
    const double *read;
    int32_t *centre; /* [threads, E] */
    double *out;     /* [E + 1] */
} curve;

/* Points i: all experts less i + 1 of each block. */
static moec_status trace(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const curve *c = ctx;
    moec_status st = MOEC_OK;
    for (int64_t i = lo; i < hi; i++) {
        moec_group_task g = *c->g;
        g.keep -= (i + 1) * g.blocks;
        MOEC_TRY(moec_interrupted(err));
        MOEC_TRY(ways[c->r->grouping].fn(c->centre + worker * g.n, &c->out[g.keep], &g, c->r, c->read, err));
    }
done:
    return st;
}

/* Fewest groups of a block that its protected experts leave room for. */
static int64_t fewest(const moec_group_task *g)
{
    const int64_t width = g->n / g->blocks;
    int64_t most = 0;
    for (int64_t b = 0; b < g->blocks; b++) {
        int64_t fixed = 0;
        for (int64_t e = b * width; g->fixed && e < (b + 1) * width; e++)
            fixed += g->fixed[e];
        most = fixed > most ? fixed : most;
    }
    return most < width ? most + 1 : width;
}

/* Mean over the pairs of what the grouping goes by; 1 where all are 0, or where a layer's scale is not in it. */
static double scale_of(const matrices *m, const moec_group_task *g, const moec_merge_recipe *r)
{
    const int64_t n = g->n;
    const bool kernel = ways[r->grouping].reads == KERNEL;
    double sum = 0.0;
    if (r->distance == MOEC_FAR_LOGITS || r->distance == MOEC_FAR_CENTRED || r->distance == MOEC_FAR_OUTPUT_COSINE ||
        r->distance == MOEC_FAR_GATED)
        return 1.0;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < i; j++)
            sum += kernel ? m->read[i * n + i] - 2.0 * m->read[i * n + j] + m->read[j * n + j] : g->distance[i * n + j];
    return sum > 0.0 ? sum / (double)(n * (n - 1) / 2) : 1.0;
}

moec_status moec_merge_curve(double *out, const moec_merge_task *t, const moec_merge_recipe *r, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t n = t->model->dims.experts;
    double *saliency = NULL;
    int32_t *centre = NULL;
    matrices m = {NULL, NULL};
    moec_merge_task all = *t;
    all.keep = n;
    MOEC_TRY(moec_merge_curve_check(r, err));
    MOEC_TRY(moec__merge_check(t, false, moec__merge_runs_experts(r->distance), err));
    MOEC_TRY(check_sizes(&all, err));
    MOEC_TRY(MOEC_NEW(saliency, (size_t)n, err));
    MOEC_TRY(MOEC_NEW(centre, (size_t)(moec_par_threads() * n), err));
    MOEC_TRY(moec_merge_mass_of(saliency, t, r->saliency, err));
    MOEC_TRY(matrices_new(&m, t, r, err));
    const moec_group_task g = group_task(&m, saliency, &all, r);
    const int64_t least = fewest(&g), width = n / g.blocks;
    const double scale = scale_of(&m, &g, r);
    curve c = {.r = r, .g = &g, .read = m.read, .centre = centre, .out = out};
    for (int64_t k = 0; k <= n; k++)
        out[k] = k % g.blocks == 0 && k >= least * g.blocks ? 0.0 : (double)INFINITY;
    MOEC_TRY(moec_par_for(width - least, 1, trace, &c, err));
    for (int64_t k = least * g.blocks; k <= n; k += g.blocks) {
        out[k] /= scale;
        if (k > least * g.blocks && out[k] > out[k - g.blocks]) /* one more group never loses more; k-means may not find it */
            out[k] = out[k - g.blocks];
    }
done:
    moec_free(saliency);
    moec_free(centre);
    matrices_release(&m);
    return st;
}

size_t moec_merge_curve_bytes(const moec_model *m, int64_t n, const moec_merge_recipe *r)
{
    const size_t e = (size_t)m->dims.experts;
    return moec_merge_bytes(m, n, r) + (size_t)moec_par_threads() * 8 * (3 * e * e + 10 * e);
}

/* ---- weights in a group -------------------------------------------------------------------------------------------------- */

/* weight [E] holds masses and becomes shares; sum [E]. */
static void share_out(double *weight, double *sum, const int32_t *centre, int64_t n)
{
    int64_t c;
    for (int64_t e = 0; e < n; e++)
        if ((c = centre[e]) >= 0)
            sum[c] += weight[e];
    for (int64_t e = 0; e < n; e++) {
        if ((c = centre[e]) < 0 || sum[c] > 0.0)
            weight[e] = c < 0 ? 0.0 : weight[e] / sum[c];
        else
            weight[e] = -1.0; /* nobody has a mass */
    }
    for (int64_t e = 0; e < n; e++) /* now members of such a group are counted */
        if (weight[e] < 0.0)
            sum[centre[e]] += 1.0;
    for (int64_t e = 0; e < n; e++)
        if (weight[e] < 0.0)
            weight[e] = 1.0 / sum[centre[e]];
}

moec_status moec_merge_check(const moec_merge_task *t, const moec_merge_recipe *r, moec_err *err)
{
    moec_status st = MOEC_OK;
    const bool grouped = ways[r->grouping].reads != NOTHING;
    const moec_group_task g = {.n = t->model->dims.experts, .keep = t->keep, .blocks = t->blocks, .fixed = t->guarded};
    MOEC_TRY(moec__merge_check(t, true, (grouped && moec__merge_runs_experts(r->distance)) || moec__merge_mass_runs(r->saliency) ||
                                        moec__merge_mass_runs(r->weights), err));
    MOEC_TRY(check_sizes(t, err));
    if (t->keep < g.n && r->grouping == MOEC_BY_PSEUDO)
        MOEC_TRY(moec_group_pseudo_fits(&g, r->group_size, err));
    else if (t->keep < g.n && grouped)
        MOEC_TRY(moec_group_check(&g, err));
    MOEC_TRY(moec__merge_fill_check(r, t->layer->expert[0].gate.of != NULL, err));
done:
    return st;
}

moec_status moec_merge_group(moec_merge_groups *out, const moec_merge_task *t, const moec_merge_recipe *r, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t n = t->model->dims.experts;
    double *sum = NULL;
    MOEC_TRY(moec__merge_check(t, false, ways[r->grouping].reads != NOTHING && moec__merge_runs_experts(r->distance), err));
    MOEC_TRY(check_sizes(t, err));
    MOEC_TRY(MOEC_NEW(sum, (size_t)n, err));
    MOEC_TRY(moec_merge_mass_of(out->saliency, t, r->saliency, err));
    if (r->weights == r->saliency)
        memcpy(out->weight, out->saliency, (size_t)n * sizeof *out->weight);
    else
        MOEC_TRY(moec_merge_mass_of(out->weight, t, r->weights, err));
    for (int64_t e = 0; e < n; e++) { /* what stands where all stay */
        out->centre[e] = (int32_t)e;
        out->distance[e] = 0.0;
    }
    if (t->keep < n)
        MOEC_TRY(group_them(out->centre, out->distance, out->saliency, t, r, err));
    share_out(out->weight, sum, out->centre, n);
done:
    moec_free(sum);
    return st;
}

size_t moec_merge_bytes(const moec_model *m, int64_t n, const moec_merge_recipe *r)
{
    const size_t e = (size_t)m->dims.experts, mass = moec__merge_mass_bytes(m, n), far = moec__merge_distance_bytes(m);
    const size_t measure = mass > far ? mass : far, fill = moec__merge_fill_bytes(m, r);
    return (measure > fill ? measure : fill) + 8 * (8 * e * e + 4 * e); /* the groupings' matrices */
}
