/* What of lp.h needs no solver: checks, tightening, the walk along the groups' lower convex hulls, Lagrangian bounds.
 *
 * Taking the hulls' steps by descending gain until one does not fit solves the LP relaxation without rows (Sinha and Zoltners, The
 * Multiple-Choice Knapsack Problem, Operations Research 27, 1979): lambda is the gain of the first that does not fit. For any
 * lambda, mu >= 0
 *
 *     L = sum_g m_g - lambda budget + sum_r mu_r least_r,   m_g = min over options j of g of c_j + lambda s_j - sum_{r of j} mu_r
 *
 * bounds the cost from below, and what an option is above m_g (its reduced cost) a choice with it costs above L. */
#include "num/lp_parts.h"

#include "base/mem.h"

#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- checks ------------------------------------------------------------------------------------------------------------ */

static moec_status check_options(const moec_lp *p, int64_t options, moec_err *err)
{
    for (int64_t j = 0; j < options; j++) {
        if (!isfinite(p->cost[j]) || p->cost[j] < 0.0)
            return moec_fail(err, MOEC_ENUMERIC, "option %lld: cost %g, expected a finite one of 0 or above", (long long)j, p->cost[j]);
        if (p->size[j] < 0)
            return moec_fail(err, MOEC_EINVAL, "option %lld: size %lld, expected 0 or above", (long long)j, (long long)p->size[j]);
    }
    return MOEC_OK;
}

static moec_status check_groups(const moec_lp *p, moec_err *err)
{
    int64_t most = 0;
    double cost = 0.0;
    if (p->groups < 1 || p->groups >= INT_MAX / 4 || p->first[0] != 0)
        return moec_fail(err, MOEC_EINVAL, "%lld groups, expected 1 to %d", (long long)p->groups, INT_MAX / 4 - 1);
    for (int64_t g = 0; g < p->groups; g++)
        if (p->first[g + 1] <= p->first[g] || p->first[g + 1] >= INT_MAX / 4)
            return moec_fail(err, MOEC_EINVAL, "group %lld has no options, or one beyond number %d", (long long)g, INT_MAX / 4 - 1);
    moec_status st = check_options(p, p->first[p->groups], err);
    if (st != MOEC_OK)
        return st;
    for (int64_t g = 0; g < p->groups; g++) {
        int64_t size = 0;
        double dear = 0.0;
        for (int64_t j = p->first[g]; j < p->first[g + 1]; j++) {
            size = p->size[j] > size ? p->size[j] : size;
            dear = p->cost[j] > dear ? p->cost[j] : dear;
        }
        cost += dear;
        if (__builtin_add_overflow(most, size, &most))
            return moec_fail(err, MOEC_EINVAL, "sizes that add up to more than 2^63");
    }
    if (!(cost < 1e300))
        return moec_fail(err, MOEC_ENUMERIC, "costs that add up to more than 1e300");
    return MOEC_OK;
}

/* Lists the rows of every option; `seen`: [groups], the last row that had an option of it. */
static moec_status list_rows(moec__lp *w, int64_t *seen, moec_err *err)
{
    const moec_lp *p = w->p;
    moec_status st = MOEC_OK;
    int64_t all = 0;
    for (int64_t g = 0; g < p->groups; g++)
        seen[g] = -1;
    for (int64_t r = 0; r < p->rows; r++) {
        int64_t groups = 0;
        for (int64_t i = 0; i < p->row[r].n; i++) {
            const int64_t j = p->row[r].option[i];
            if (j < 0 || j >= w->options)
                return moec_fail(err, MOEC_EINVAL, "row %lld: option %lld, there are %lld", (long long)r, (long long)j,
                                 (long long)w->options);
            groups += seen[w->group[j]] != r;
            seen[w->group[j]] = r;
            w->rows_at[j + 1]++;
        }
        if (groups < p->row[r].least)
            return moec_fail(err, MOEC_EINVAL, "row %lld asks for %lld of its %lld groups", (long long)r, (long long)p->row[r].least,
                             (long long)groups);
        if (__builtin_add_overflow(all, p->row[r].n, &all) || all >= INT_MAX / 4)
            return moec_fail(err, MOEC_EINVAL, "rows have more than %d options", INT_MAX / 4);
    }
    MOEC_TRY(MOEC_NEW(w->rows_of, (size_t)all, err));
    for (int64_t j = 0; j < w->options; j++)
        w->rows_at[j + 1] += w->rows_at[j];
    for (int64_t r = p->rows - 1; r >= 0; r--)
        for (int64_t i = 0; i < p->row[r].n; i++)
            w->rows_of[--w->rows_at[p->row[r].option[i] + 1]] = r;
    /* every start has moved to its place, one too far on: shift */
    memmove(w->rows_at, w->rows_at + 1, (size_t)w->options * sizeof *w->rows_at);
    w->rows_at[w->options] = all;
    for (int64_t j = 0; j < w->options; j++)
        for (int64_t i = w->rows_at[j] + 1; i < w->rows_at[j + 1]; i++)
            if (w->rows_of[i] == w->rows_of[i - 1])
                return moec_fail(err, MOEC_EINVAL, "row %lld has option %lld twice", (long long)w->rows_of[i], (long long)j);
done:
    return st;
}

/* ---- tightening -------------------------------------------------------------------------------------------------------- */

static void tighten(moec__lp *w)
{
    const moec_lp *p = w->p;
    int64_t unit = 0;
    for (int64_t g = 0; g < p->groups; g++) {
        int64_t size = INT64_MAX;
        double cost = (double)INFINITY;
        for (int64_t j = p->first[g]; j < p->first[g + 1]; j++) {
            size = p->size[j] < size ? p->size[j] : size;
            cost = p->cost[j] < cost ? p->cost[j] : cost;
        }
        w->least += size;
        w->base += cost;
        for (int64_t j = p->first[g]; j < p->first[g + 1]; j++) {
            w->size[j] = p->size[j] - size;
            w->cost[j] = p->cost[j] - cost;
            for (int64_t a = w->size[j], b; a != 0; a = b) /* unit = gcd(unit, size) */
                b = unit % a, unit = a;
        }
    }
    w->unit = unit > 0 ? unit : 1;
    for (int64_t j = 0; j < w->options; j++)
        w->size[j] /= w->unit;
    w->budget = p->budget < w->least ? -1 : (p->budget - w->least) / w->unit;
}

typedef struct point {
    int64_t option, size;
    double cost;
} point;

static int by_size(const void *a, const void *b)
{
    const point *x = a, *y = b;
    if (x->size != y->size)
        return x->size < y->size ? -1 : 1;
    if (x->cost < y->cost || x->cost > y->cost)
        return x->cost < y->cost ? -1 : 1;
    return x->option < y->option ? -1 : 1;
}

static double gain_of(const moec__lp *w, int64_t lo, int64_t hi)
{
    return (w->cost[lo] - w->cost[hi]) / (double)(w->size[hi] - w->size[lo]);
}

/* Options that are smaller or cheaper than all others, and the hull of these as steps. Options of rows always stay: being of a row
 * can be what they are taken for. order: [options of the group]. */
static void filter_group(moec__lp *w, int64_t g, point *order)
{
    const moec_lp *p = w->p;
    const int64_t n = p->first[g + 1] - p->first[g], from = w->steps;
    double cheapest = (double)INFINITY;
    int64_t last = -1;
    for (int64_t k = 0; k < n; k++) {
        const int64_t j = p->first[g] + k;
        order[k] = (point){j, w->size[j], w->cost[j]};
    }
    qsort(order, (size_t)n, sizeof *order, by_size);
    for (int64_t k = 0; k < n; k++) {
        const int64_t j = order[k].option;
        if (!(w->cost[j] < cheapest)) {
            w->out[j] = w->rows_at[j + 1] == w->rows_at[j];
            continue;
        }
        cheapest = w->cost[j];
        int64_t lo = last;
        while (w->steps > from && w->step[w->steps - 1].gain < gain_of(w, w->step[w->steps - 1].hi, j))
            lo = w->step[--w->steps].lo;
        if (lo >= 0)
            w->step[w->steps++] = (moec__lp_step){g, lo, j, w->size[lo], gain_of(w, lo, j)};
        last = j;
    }
}

/* Of one group a hull's steps stand in its order: gains never rise, and equal ones go by size. */
static int by_gain(const void *a, const void *b)
{
    const moec__lp_step *x = a, *y = b;
    if (x->gain > y->gain || x->gain < y->gain)
        return x->gain > y->gain ? -1 : 1;
    if (x->group != y->group)
        return x->group < y->group ? -1 : 1;
    return x->size < y->size ? -1 : 1;
}

moec_status moec__lp_prepare(moec__lp *w, const moec_lp *p, moec_err *err)
{
    moec_status st = MOEC_OK;
    int64_t *seen = NULL;
    point *order = NULL;
    *w = (moec__lp){.p = p, .best = (double)INFINITY};
    MOEC_TRY(check_groups(p, err));
    w->options = p->first[p->groups];
    const size_t n = (size_t)w->options, groups = (size_t)p->groups;
    MOEC_TRY(MOEC_NEW(w->size, n, err));
    MOEC_TRY(MOEC_NEW(w->cost, n, err));
    MOEC_TRY(MOEC_NEW(w->out, n, err));
    MOEC_TRY(MOEC_NEW(w->group, n, err));
    MOEC_TRY(MOEC_NEW(w->rows_at, n + 1, err));
    MOEC_TRY(MOEC_NEW(w->step, n, err));
    MOEC_TRY(MOEC_NEW(w->mu, (size_t)p->rows, err));
    MOEC_TRY(MOEC_NEW(w->reduced, n, err));
    MOEC_TRY(MOEC_NEW(w->basic, n, err));
    MOEC_TRY(MOEC_NEW(w->pick, groups, err));
    MOEC_TRY(MOEC_NEW(w->met, (size_t)p->rows, err));
    MOEC_TRY(MOEC_NEW(seen, groups, err));
    MOEC_TRY(MOEC_NEW(order, n, err));
    for (int64_t g = 0; g < p->groups; g++)
        for (int64_t j = p->first[g]; j < p->first[g + 1]; j++)
            w->group[j] = g;
    MOEC_TRY(list_rows(w, seen, err));
    tighten(w);
    for (int64_t g = 0; g < p->groups; g++)
        filter_group(w, g, order);
    qsort(w->step, (size_t)w->steps, sizeof *w->step, by_gain);
done:
    moec_free(seen);
    moec_free(order);
    return st;
}

void moec__lp_release(moec__lp *w)
{
    void *const all[] = {w->size, w->cost, w->out, w->group, w->rows_at, w->rows_of, w->step, w->mu, w->reduced, w->basic, w->pick,
                         w->met};
    for (size_t i = 0; i < MOEC_COUNT(all); i++)
        moec_free(all[i]);
    *w = (moec__lp){.p = NULL};
}

/* ---- choices ----------------------------------------------------------------------------------------------------------- */

bool moec__lp_rest(int64_t *rest, const moec__lp *w, const int64_t *pick, int64_t *met)
{
    const moec_lp *p = w->p;
    *rest = w->budget;
    for (int64_t r = 0; met && r < p->rows; r++)
        met[r] = 0;
    for (int64_t g = 0; g < p->groups; g++) {
        *rest -= w->size[pick[g]];
        for (int64_t i = w->rows_at[pick[g]]; met && i < w->rows_at[pick[g] + 1]; i++)
            met[w->rows_of[i]]++;
    }
    for (int64_t r = 0; met && r < p->rows; r++)
        if (met[r] < p->row[r].least)
            return false;
    return true;
}

double moec__lp_cost(const moec__lp *w, const int64_t *pick)
{
    double cost = 0.0;
    for (int64_t g = 0; g < w->p->groups; g++)
        cost += w->cost[pick[g]];
    return cost;
}

bool moec__lp_in_row(const moec__lp *w, int64_t j, int64_t r)
{
    for (int64_t i = w->rows_at[j]; i < w->rows_at[j + 1]; i++)
        if (w->rows_of[i] == r)
            return true;
    return false;
}

/* May option `from` give way to `to` without a row falling short that does not already? */
static bool may_leave(const moec__lp *w, int64_t from, int64_t to)
{
    for (int64_t i = w->rows_at[from]; i < w->rows_at[from + 1]; i++) {
        const int64_t r = w->rows_of[i];
        if (w->met[r] <= w->p->row[r].least && !moec__lp_in_row(w, to, r))
            return false;
    }
    return true;
}

static void move(moec__lp *w, int64_t to, int64_t *rest)
{
    const int64_t from = w->pick[w->group[to]];
    for (int64_t i = w->rows_at[from]; i < w->rows_at[from + 1]; i++)
        w->met[w->rows_of[i]]--;
    for (int64_t i = w->rows_at[to]; i < w->rows_at[to + 1]; i++)
        w->met[w->rows_of[i]]++;
    *rest += w->size[from] - w->size[to];
    w->pick[w->group[to]] = to;
}

static void fill(moec__lp *w, int64_t *rest)
{
    for (int64_t k = 0; k < w->steps; k++) {
        const moec__lp_step *s = &w->step[k];
        if (w->pick[s->group] == s->lo && w->size[s->hi] - w->size[s->lo] <= *rest && may_leave(w, s->lo, s->hi))
            move(w, s->hi, rest);
    }
}

void moec__lp_fill(moec__lp *w)
{
    int64_t rest;
    if (moec__lp_rest(&rest, w, w->pick, w->met))
        fill(w, &rest);
    w->best = moec__lp_cost(w, w->pick);
}

/* Meets the rows by the changes that the relaxation likes best. */
static bool meet_rows(moec__lp *w, int64_t *rest)
{
    for (int64_t r = 0; r < w->p->rows; r++)
        while (w->met[r] < w->p->row[r].least) {
            int64_t to = -1;
            for (int64_t i = 0; i < w->p->row[r].n; i++) {
                const int64_t j = w->p->row[r].option[i], from = w->pick[w->group[j]];
                if (!moec__lp_in_row(w, from, r) && may_leave(w, from, j) && (to < 0 || w->reduced[j] < w->reduced[to]))
                    to = j;
            }
            if (to < 0)
                return false;
            move(w, to, rest);
        }
    return true;
}

bool moec__lp_greedy(moec__lp *w)
{
    const moec_lp *p = w->p;
    int64_t rest;
    memset(w->basic, 0, (size_t)w->options * sizeof *w->basic);
    for (int64_t g = 0; g < p->groups; g++) { /* the smallest option, of these the cheapest, of these the first */
        int64_t to = p->first[g];
        for (int64_t j = to + 1; j < p->first[g + 1]; j++)
            if (w->size[j] < w->size[to] || (w->size[j] == w->size[to] && w->cost[j] < w->cost[to]))
                to = j;
        w->pick[g] = to;
    }
    moec__lp_rest(&rest, w, w->pick, w->met);
    w->lambda = 0.0;
    w->tight = false;
    for (int64_t k = 0; k < w->steps; k++) {
        const moec__lp_step *s = &w->step[k];
        if (w->size[s->hi] - w->size[s->lo] > rest) {
            w->lambda = s->gain;
            w->tight = w->basic[s->hi] = true;
            break;
        }
        move(w, s->hi, &rest);
    }
    for (int64_t g = 0; g < p->groups; g++)
        w->basic[w->pick[g]] = true;
    moec__lp_weigh(w);
    if (!meet_rows(w, &rest))
        return false;
    for (int64_t k = w->steps - 1; rest < 0 && k >= 0; k--) { /* back down, what gains least first */
        const moec__lp_step *s = &w->step[k];
        if (w->pick[s->group] == s->hi && may_leave(w, s->hi, s->lo))
            move(w, s->lo, &rest);
    }
    if (rest < 0)
        return false;
    fill(w, &rest);
    w->best = moec__lp_cost(w, w->pick);
    return true;
}

/* ---- bounds ------------------------------------------------------------------------------------------------------------ */

void moec__lp_weigh(moec__lp *w)
{
    const moec_lp *p = w->p;
    w->bound = -w->lambda * (double)w->budget;
    for (int64_t r = 0; r < p->rows; r++)
        w->bound += w->mu[r] * (double)p->row[r].least;
    for (int64_t g = 0; g < p->groups; g++) {
        double least = (double)INFINITY;
        for (int64_t j = p->first[g]; j < p->first[g + 1]; j++) {
            w->reduced[j] = w->cost[j] + w->lambda * (double)w->size[j];
            for (int64_t i = w->rows_at[j]; i < w->rows_at[j + 1]; i++)
                w->reduced[j] -= w->mu[w->rows_of[i]];
            if (!w->out[j] && w->reduced[j] < least)
                least = w->reduced[j];
        }
        w->bound += least;
        for (int64_t j = p->first[g]; j < p->first[g + 1]; j++)
            w->reduced[j] -= least;
    }
}
