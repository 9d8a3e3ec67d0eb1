/* How many experts each layer keeps, out of one total; see moec_allocate and moec_allocate_loss. */
#include "method/method.h"

#include "base/mem.h"

#include <math.h>
#include <stdlib.h>

enum { MASS_LEAST = 4 }; /* of the NLLB-200 repository */

/* The experts of one rank, one of each group; units with the smallest keys are kept. */
typedef struct unit {
    double key;
    int64_t layer, rank;
} unit;

static int by_key(const void *a, const void *b)
{
    const unit *x = a, *y = b;
    if (x->key != y->key)
        return x->key < y->key ? -1 : 1;
    if (x->layer != y->layer)
        return x->layer < y->layer ? -1 : 1;
    return (x->rank > y->rank) - (x->rank < y->rank);
}

/* Fewest experts of a layer: top-k, what was asked, and what the router's groups need. */
static moec_status least_of(int64_t *out, const moec_request *q, int64_t keep, moec_err *err)
{
    const moec_model *m = q->model;
    const int64_t groups = moec_request_groups(q), k = m->dims.top_k;
    const int64_t asked = q->least > 0 ? q->least : q->allocation == MOEC_ALLOCATE_MASS ? MASS_LEAST : 1;
    int64_t n = asked > k ? asked : k;
    n = (n + groups - 1) / groups * groups;
    while (groups > 1 && n < keep && moec_plan_check_groups(m, n, k, NULL) != MOEC_OK)
        n += groups;
    *out = n;
    if (n <= keep)
        return MOEC_OK;
    return moec_fail(err, MOEC_EINVAL, "--allocation: every layer keeps at least %lld experts (top-k %lld, --min-experts %lld), and "
                     "only %lld are kept in the mean", (long long)n, (long long)k, (long long)asked, (long long)keep);
}

/* Shares of the layer's scores, best first. */
static moec_status rank_layer(moec_rank *order, const moec_method *me, const moec_request *q, int64_t l, const double *score,
                              moec_err *err)
{
    const int64_t n = q->model->dims.experts;
    const long long layer = q->model->set[l].layer;
    double total = 0.0;
    for (int64_t e = 0; e < n; e++) {
        if (!isfinite(score[e]))
            return moec_fail(err, MOEC_ENUMERIC, "layer %lld: the score of expert %lld is not finite", layer, (long long)e);
        if (score[e] < 0.0)
            return moec_fail(err, MOEC_EINVAL, "--allocation shares out what scores sum to, and method %s has scores below 0 (layer "
                             "%lld, expert %lld: %g); only uniform goes with it", me->name, layer, (long long)e, score[e]);
        total += score[e];
    }
    if (!isfinite(total))
        return moec_fail(err, MOEC_ENUMERIC, "layer %lld: the sum of the scores is not finite", layer);
    for (int64_t e = 0; e < n; e++)
        order[e] = (moec_rank){.expert = (int32_t)e, .score = total > 0.0 ? score[e] / total : 1.0 / (double)n,
                               .guarded = q->guard && q->guard->flag[l * n + e]};
    moec_rank_sort(order, n);
    return MOEC_OK;
}

/* The units of a layer: value[r] is the sum of the shares of rank r of every group. *forced: ranks that are kept whatever
 * their value, at least `least` experts. */
static void value_units(double *value, int64_t *taken, int64_t *forced, const moec_rank *order, int64_t n, int64_t groups,
                        int64_t least)
{
    *forced = least / groups;
    for (int64_t r = 0; r < n / groups; r++)
        value[r] = 0.0;
    for (int64_t g = 0; g < groups; g++)
        taken[g] = 0;
    for (int64_t i = 0; i < n; i++) {
        const int64_t r = taken[order[i].expert / (n / groups)]++;
        value[r] += order[i].score;
        if (order[i].guarded && r + 1 > *forced)
            *forced = r + 1;
    }
}

moec_status moec_allocate(int64_t *out, const moec_method *me, const moec_request *q, int64_t keep, const double *score,
                          moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t layers = q->model->moe_layers, n = q->model->dims.experts, groups = moec_request_groups(q);
    const int64_t ranks = n / groups, budget = layers * (keep / groups), most = q->pad > 0 ? q->pad / groups : ranks;
    moec_rank *order = NULL;
    unit *pool = NULL;
    double *value = NULL;
    int64_t *taken = NULL, least, forced, all_forced = 0;
    MOEC_TRY(least_of(&least, q, keep, err));
    MOEC_TRY(MOEC_NEW(order, (size_t)n, err));
    MOEC_TRY(MOEC_NEW(value, (size_t)ranks, err));
    MOEC_TRY(MOEC_NEW(taken, (size_t)groups, err));
    MOEC_TRY(MOEC_NEW(pool, (size_t)(layers * ranks), err));
    for (int64_t l = 0; l < layers; l++) {
        double mass = 0.0;
        MOEC_TRY(rank_layer(order, me, q, l, score + l * n, err));
        value_units(value, taken, &forced, order, n, groups, least);
        all_forced += forced;
        for (int64_t r = 0; r < ranks; r++) {
            unit *u = &pool[l * ranks + r];
            mass += r < forced ? 0.0 : value[r];
            *u = (unit){.layer = l, .rank = r, .key = q->allocation == MOEC_ALLOCATE_MASS ? mass : -value[r]};
            if (r < forced)
                u->key = -(double)INFINITY;
            else if (r >= most)
                u->key = (double)INFINITY;
        }
        out[l] = 0;
    }
    if (all_forced > budget) {
        st = moec_fail(err, MOEC_EINVAL, "--allocation: protected experts and %lld a layer are %lld in all, more than the %lld that are "
                       "kept", (long long)least, (long long)(all_forced * groups), (long long)(budget * groups));
        goto done;
    }
    qsort(pool, (size_t)(layers * ranks), sizeof *pool, by_key);
    for (int64_t i = 0; i < budget; i++)
        out[pool[i].layer] += groups;
done:
    moec_free(pool);
    moec_free(taken);
    moec_free(value);
    moec_free(order);
    return st;
}

/* Of the layers [first, last) the one that loses least when it gives `step` up; -1: none may. */
static int64_t cheapest(const int64_t *keep, int64_t first, int64_t last, const double *curve, int64_t n, int64_t step, int64_t least)
{
    int64_t best = -1;
    double lowest = (double)INFINITY;
    for (int64_t l = first; l < last; l++) {
        const double *c = curve + l * (n + 1);
        if (keep[l] - step < least)
            continue;
        const double more = c[keep[l] - step] - c[keep[l]];
        if (more < lowest || (best >= 0 && more == lowest && keep[l] > keep[best])) {
            lowest = more;
            best = l;
        }
    }
    return best;
}

moec_status moec_allocate_loss(int64_t *out, const moec_request *q, int64_t keep, const double *curve, moec_err *err)
{
    const int64_t layers = q->model->moe_layers, n = q->model->dims.experts, step = moec_request_groups(q);
    const int64_t most = q->pad > 0 ? q->pad : n;
    int64_t least;
    moec_status st = least_of(&least, q, keep, err);
    if (st != MOEC_OK)
        return st;
    if (q->together < 1)
        return moec_fail(err, MOEC_EINVAL, "--allocation-layers %lld: at least 1", (long long)q->together);
    for (int64_t i = 0; i < layers * (n + 1); i++)
        if (isnan(curve[i]))
            return moec_fail(err, MOEC_ENUMERIC, "--allocation loss: what %lld groups of layer %lld lose is not a number",
                             (long long)(i % (n + 1)), (long long)q->model->set[i / (n + 1)].layer);
    for (int64_t first = 0, last; first < layers; first = last) {
        last = layers - first > q->together ? first + q->together : layers;
        for (int64_t l = first; l < last; l++)
            out[l] = most;
        for (int64_t over = (last - first) * (most - keep); over > 0; over -= step) {
            const int64_t l = cheapest(out, first, last, curve, n, step, least);
            if (l < 0)
                return moec_fail(err, MOEC_EINVAL, "--allocation loss: protected experts leave layer %lld and those that share "
                                 "with it more than %lld experts each; keep more or protect fewer", (long long)q->model->set[first].layer,
                                 (long long)keep);
            out[l] -= step;
        }
    }
    return MOEC_OK;
}
