/* From scores to who is kept; see moec_select. */
#include "method/method.h"

#include "base/mem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* What the model's form asks of the number that is kept. */
static moec_status check_form(const moec_request *q, int64_t keep, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_model *m = q->model;
    const int64_t k = m->dims.top_k;
    if (keep < k && !moec_top_k_may_shrink(m))
        return moec_fail(err, MOEC_EINVAL, "keeping %lld experts is fewer than this model's top-k of %lld, which its router or "
                         "attention is built for; keep at least %lld", (long long)keep, (long long)k, (long long)k);
    if (q->drop_groups && m->dims.groups <= 1)
        return moec_fail(err, MOEC_EINVAL, "--groups drop: the router of this model has no groups");
    if (q->pad > 0 && q->pad < keep)
        return moec_fail(err, MOEC_EINVAL, "--pad-to %lld: %lld experts are kept", (long long)q->pad, (long long)keep);
    if (!q->drop_groups)
        MOEC_TRY(moec_plan_check_groups(m, keep, k < keep ? k : keep, err));
    if (q->pad > 0)
        MOEC_TRY(moec_plan_check_pad(m, q->drop_groups, q->pad, err));
done:
    return st;
}

moec_status moec_kept_experts(int64_t *out, const moec_request *q, moec_err *err)
{
    int64_t n = q->model->dims.experts;
    if (q->keep < 0 || q->keep > n)
        return moec_fail(err, MOEC_EINVAL, "--keep %lld: the model has %lld experts in a layer", (long long)q->keep,
                         (long long)n);
    if (!(q->share >= 0.0 && q->share <= 1.0))
        return moec_fail(err, MOEC_EINVAL, "--remove %g: expected a share from 0 to 1", q->share);
    *out = q->keep > 0 ? q->keep : n - (int64_t)floor((double)n * q->share + 1e-9);
    if (q->keep == 0 && q->share > 0.0 && *out == n)
        return moec_fail(err, MOEC_EINVAL, "--remove %g%%: is less than one expert of a layer's %lld; the smallest step is %.4g%%",
                         q->share * 100.0, (long long)n, ceil(1e4 / (double)n - 1e-9) / 100.0);
    if (*out < 1)
        return moec_fail(err, MOEC_EINVAL, "--remove %g%%: no expert would be left of %lld", q->share * 100.0,
                         (long long)n);
    return check_form(q, *out, err);
}

static int by_rank(const void *a, const void *b)
{
    const moec_rank *x = a, *y = b;
    if (x->guarded != y->guarded)
        return x->guarded ? -1 : 1;
    if (x->score != y->score)
        return x->score > y->score ? -1 : 1;
    return x->expert < y->expert ? -1 : 1;
}

void moec_rank_sort(moec_rank *order, int64_t n)
{
    qsort(order, (size_t)n, sizeof *order, by_rank);
}

static int by_number(const void *a, const void *b)
{
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

static moec_status list_guarded(moec_plan_layer *l, const moec_request *q, int64_t moe, moec_rank *order, moec_err *err)
{
    moec_status st = MOEC_NEW(l->guarded, (size_t)l->n_experts, err);
    for (int64_t e = 0; st == MOEC_OK && q->guard && e < l->n_experts; e++)
        if (q->guard->flag[moe * q->guard->experts + e]) {
            order[e].guarded = true;
            l->guarded[l->n_guarded++] = (int32_t)e;
        }
    return st;
}

/* An expert is unseen when no domain has a token that selected it. */
static moec_status list_unseen(moec_plan_layer *l, const moec_stats *s, int64_t moe, moec_err *err)
{
    moec_status st = MOEC_NEW(l->unseen, (size_t)l->n_experts, err);
    if (st != MOEC_OK || !s || s->n_domains == 0)
        return st;
    for (int d = 0; d < s->n_domains; d++)
        if (!moec_stat_at(s, d, MOEC_STAT_SELECTED, moe))
            return MOEC_OK; /* not known */
    for (int64_t e = 0; e < l->n_experts; e++) {
        bool seen = false;
        for (int d = 0; d < s->n_domains && !seen; d++)
            seen = ((const uint64_t *)moec_stat_at(s, d, MOEC_STAT_SELECTED, moe))[e] > 0;
        if (!seen)
            l->unseen[l->n_unseen++] = (int32_t)e;
    }
    return st;
}

/* Keeps the first `keep` of an order, of each group of experts the same number. */
static moec_status keep_first(moec_plan_layer *l, moec_rank *order, int64_t keep, int64_t groups, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t width = l->n_experts / groups, quota = keep / groups;
    int64_t *taken = NULL;
    MOEC_TRY(MOEC_NEW(taken, (size_t)groups, err));
    MOEC_TRY(MOEC_NEW(l->keep, (size_t)keep, err));
    moec_rank_sort(order, l->n_experts);
    for (int64_t i = 0; i < l->n_experts && l->n_keep < keep; i++) {
        const int64_t g = order[i].expert / width;
        if (taken[g] < quota) {
            taken[g]++;
            l->keep[l->n_keep++] = order[i].expert;
        } else if (order[i].guarded) {
            st = moec_fail(err, MOEC_EINVAL, "layer %lld: more than %lld experts of group %lld are protected, and every group "
                           "keeps %lld", (long long)l->layer, (long long)quota, (long long)g, (long long)quota);
            goto done;
        }
    }
    qsort(l->keep, (size_t)l->n_keep, sizeof *l->keep, by_number);
done:
    moec_free(taken);
    return st;
}

int64_t moec_request_groups(const moec_request *q)
{
    return q->drop_groups || q->model->dims.groups < 1 ? 1 : q->model->dims.groups;
}

/* Groups that share what is kept. */
static int64_t groups_of(const moec_request *q, int64_t keep)
{
    return keep == q->model->dims.experts ? 1 : moec_request_groups(q);
}

static moec_status select_layer(moec_plan_layer *l, const moec_request *q, int64_t moe, int64_t keep,
                                const double *score, moec_err *err)
{
    moec_status st = MOEC_OK;
    size_t n = (size_t)l->n_experts;
    moec_rank *order = NULL;
    MOEC_TRY(MOEC_NEW(order, n, err));
    MOEC_TRY(MOEC_NEW(l->score, n, err));
    for (size_t e = 0; e < n; e++) {
        if (!isfinite(score[e])) {
            st = moec_fail(err, MOEC_ENUMERIC, "layer %lld: the score of expert %zu is not finite", (long long)l->layer,
                           e);
            goto done;
        }
        order[e] = (moec_rank){.expert = (int32_t)e, .score = score[e]};
        l->score[e] = score[e];
    }
    MOEC_TRY(list_guarded(l, q, moe, order, err));
    MOEC_TRY(list_unseen(l, q->stats, moe, err));
    if (l->n_guarded > keep) {
        st = moec_fail(err, MOEC_EINVAL, "layer %lld: %lld experts are protected, only %lld are kept",
                       (long long)l->layer, (long long)l->n_guarded, (long long)keep);
        goto done;
    }
    MOEC_TRY(keep_first(l, order, keep, groups_of(q, keep), err));
done:
    moec_free(order);
    return st;
}

/* A set that calibration does not see: by the norm of the router's rows. A row that is small hardly moves its expert's logit
 * whatever the token, so that expert is chosen by accident more than by need. */
static moec_status select_unseen(moec_plan_layer *l, const moec_request *q, const moec_weight *router, int64_t keep,
                                 moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_rank *order = NULL;
    double *sum = NULL;
    MOEC_TRY(MOEC_NEW(order, (size_t)l->n_experts, err));
    MOEC_TRY(MOEC_NEW(sum, (size_t)router->rows, err));
    MOEC_TRY(moec_row_squares(sum, router, err));
    for (int64_t e = 0; e < l->n_experts; e++) {
        if (!isfinite(sum[e])) {
            st = moec_fail(err, MOEC_ENUMERIC, "%s layer %lld: row %lld of the router is not finite", moec_set_name(l->kind),
                           (long long)l->layer, (long long)e);
            goto done;
        }
        order[e] = (moec_rank){.expert = (int32_t)e, .score = sum[e]};
    }
    MOEC_TRY(keep_first(l, order, keep, l->kind == MOEC_SET_HEADS ? 1 : groups_of(q, keep), err));
done:
    moec_free(sum);
    moec_free(order);
    return st;
}

/* What was asked, for the record; nothing of where files lay or how many threads ran. */
static moec_status record_options(moec_plan *p, const moec_method *me, const moec_request *q, int64_t keep, moec_err *err)
{
    static const char *const allocations[] = {
        [MOEC_ALLOCATE_UNIFORM] = "uniform", [MOEC_ALLOCATE_GLOBAL] = "global", [MOEC_ALLOCATE_MASS] = "mass",
        [MOEC_ALLOCATE_LOSS] = "loss"};
    const moec_verb own = {.opts = me->opts};
    moec_json *o = me->opts ? moec_opt_json(q, &own) : moec_json_new_object();
    moec_json_set(o, "keep", moec_json_new_int(keep));
    moec_json_set(o, "seed", moec_json_new_int(q->seed));
    moec_json_set(o, "protect", q->guard_name ? moec_json_new_string(q->guard_name) : moec_json_new_null());
    if (q->allocation != MOEC_ALLOCATE_UNIFORM) {
        moec_json_set(o, "allocation", moec_json_new_string(allocations[q->allocation]));
        moec_json_set(o, "min_experts", moec_json_new_int(q->least));
    }
    if (q->allocation == MOEC_ALLOCATE_LOSS)
        moec_json_set(o, "allocation_layers", moec_json_new_int(q->together));
    moec_free(p->options);
    p->options = NULL;
    moec_status st = moec_json_dump(&p->options, o, 0, err);
    moec_json_free(o);
    return st;
}

/* Layers that keep unequal numbers are padded to the largest, where that is exact. */
static moec_status settle_counts(moec_plan *p, const moec_request *q, const int64_t *count, moec_err *err)
{
    int64_t least = count[0], most = count[0];
    moec_err why = {MOEC_OK, ""};
    p->pad = q->pad;
    for (int64_t i = 1; i < p->n_layers; i++) {
        least = count[i] < least ? count[i] : least;
        most = count[i] > most ? count[i] : most;
    }
    if (least == most || q->pad > 0)
        return MOEC_OK;
    if (moec_plan_check_pad(q->model, q->drop_groups, most, &why) == MOEC_OK)
        p->pad = most;
    else if (!q->plan_only)
        return moec_fail(err, MOEC_EINVAL, "layers would keep %lld to %lld experts, and clients load one count for all layers; %s. "
                         "--plan-only writes the plan, which eval MODEL --plan FILE measures", (long long)least,
                         (long long)most, why.text);
    return MOEC_OK;
}

/* Experts that each layer keeps. */
static moec_status counts_of(int64_t *out, const moec_method *me, const moec_request *q, int64_t keep, const double *score,
                             moec_err *err)
{
    for (int64_t l = 0; l < q->model->moe_layers; l++)
        out[l] = q->allocation == MOEC_ALLOCATE_LOSS ? q->counts[l] : keep;
    return q->allocation == MOEC_ALLOCATE_UNIFORM || q->allocation == MOEC_ALLOCATE_LOSS ? MOEC_OK
           : moec_allocate(out, me, q, keep, score, err);
}

moec_status moec_select(moec_plan **out, const moec_method *me, const moec_request *q, const double *score,
                        moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_plan *p = NULL;
    int64_t keep, *count = NULL;
    *out = NULL;
    MOEC_TRY(moec_kept_experts(&keep, q, err));
    MOEC_TRY(MOEC_NEW(count, (size_t)q->model->moe_layers, err));
    MOEC_TRY(counts_of(count, me, q, keep, score, err));
    MOEC_TRY(moec_plan_new(&p, q->model, me->name, q->fingerprint, err));
    MOEC_TRY(record_options(p, me, q, keep, err));
    if (q->drop_mtp && p->mtp != MOEC_PLAN_MTP_UNSAID)
        moec_plan_drop_mtp(p);
    p->drop_groups = q->drop_groups;
    MOEC_TRY(settle_counts(p, q, count, err));
    if (q->stats_digest) {
        size_t n = strlen(q->stats_digest);
        memcpy(p->stats, q->stats_digest, n < sizeof p->stats ? n : sizeof p->stats - 1);
    }
    for (int64_t i = 0; i < p->n_layers; i++)
        MOEC_TRY(select_layer(&p->layer[i], q, i, count[i], score + i * q->model->dims.experts, err));
    for (int64_t i = p->n_layers; i < p->n_sets; i++)
        MOEC_TRY(select_unseen(&p->layer[i], q, q->model->set[i].router, keep, err));
    if (p->new_top_k > moec_plan_least(p))
        p->new_top_k = moec_plan_least(p);
    *out = p;
    p = NULL;
done:
    moec_plan_free(p);
    moec_free(count);
    return st;
}

void moec_plan_drop_scores(moec_plan *p)
{
    for (int64_t i = 0; i < p->n_layers; i++) {
        moec_free(p->layer[i].score);
        p->layer[i].score = NULL;
    }
}

moec_status moec_plan_counts(moec_plan **out, const moec_method *me, const moec_request *q, moec_err *err)
{
    moec_status st = MOEC_OK;
    double *score = NULL;
    *out = NULL;
    MOEC_TRY(MOEC_NEW(score, (size_t)(q->model->moe_layers * q->model->dims.experts), err));
    MOEC_TRY(moec_select(out, me, q, score, err));
    moec_plan_drop_scores(*out);
done:
    moec_free(score);
    return st;
}
