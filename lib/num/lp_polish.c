/* A better choice from a good one: of the groups that can change at the least cost, the best changes together, by dynamic programming
 * over what they leave of the budget. With reduced costs d a choice costs sum d + lambda rest above the bound, so groups whose second
 * best d is small are where the optimum differs from the walk (the core of Balas and Zemel, and Pisinger, A Minimal Algorithm for the
 * Multiple-Choice Knapsack Problem, European Journal of Operational Research 83, 1995). Branching alone takes long to find such a
 * choice. */
#include "num/lp_parts.h"

#include "base/mem.h"

#include <math.h>
#include <stdlib.h>

enum { CORE = 192, STATES = 4096 };

typedef struct candidate {
    int64_t group;
    double loss; /* of its best other option */
} candidate;

/* Best way to some rest, of the groups so far. */
typedef struct reach {
    double value; /* of sum d, from the choice at hand; INFINITY: none */
    int64_t rest;
} reach;

typedef struct polish {
    moec__lp *w;
    candidate *order;      /* [groups] */
    reach *now, *next;     /* [STATES] by rest */
    int32_t *before;       /* [core, STATES] state that a way came from */
    int64_t *taken;        /* [core, STATES] and the option that it took */
    int64_t *spare;        /* [rows] how many groups may still leave it */
    int64_t core, unit;    /* groups; rest that a state spans */
} polish;

static int by_loss(const void *a, const void *b)
{
    const candidate *x = a, *y = b;
    if (x->loss < y->loss || x->loss > y->loss)
        return x->loss < y->loss ? -1 : 1;
    return x->group < y->group ? -1 : 1;
}

static void choose_core(polish *u)
{
    const moec__lp *w = u->w;
    int64_t n = 0, most = 0;
    for (int64_t g = 0; g < w->p->groups; g++) {
        double loss = (double)INFINITY;
        for (int64_t j = w->p->first[g]; j < w->p->first[g + 1]; j++)
            if (j != w->pick[g] && !w->out[j])
                loss = fmin(loss, w->reduced[j]);
        if (loss < (double)INFINITY)
            u->order[n++] = (candidate){g, loss};
    }
    qsort(u->order, (size_t)n, sizeof *u->order, by_loss);
    u->core = n < CORE ? n : CORE;
    for (int64_t k = 0; k < u->core; k++)
        for (int64_t g = u->order[k].group, j = w->p->first[g]; j < w->p->first[g + 1]; j++) {
            const int64_t by = llabs(w->size[j] - w->size[w->pick[g]]);
            most = !w->out[j] && by > most ? by : most;
        }
    u->unit = 1 + most / (STATES / 8);
}

/* May the group take `to` whatever other groups do? */
static bool may_take(const polish *u, int64_t from, int64_t to)
{
    const moec__lp *w = u->w;
    for (int64_t i = w->rows_at[from]; i < w->rows_at[from + 1]; i++)
        if (u->spare[w->rows_of[i]] <= 0 && !moec__lp_in_row(w, to, w->rows_of[i]))
            return false;
    return true;
}

/* State of a rest, -1: too far off. Half of them are of rests below 0, which later groups may make up for. */
static int64_t state_of(const polish *u, int64_t rest)
{
    const int64_t at = rest / u->unit - (rest % u->unit < 0) + STATES / 2;
    return at >= 0 && at < STATES ? at : -1;
}

static void take(polish *u, int64_t k, int64_t option, int64_t from, double value, int64_t rest)
{
    const int64_t to = state_of(u, rest);
    if (to < 0 || !(value < u->next[to].value))
        return;
    u->next[to] = (reach){value, rest};
    u->before[k * STATES + to] = (int32_t)from;
    u->taken[k * STATES + to] = option;
}

static void add_group(polish *u, int64_t k)
{
    const moec__lp *w = u->w;
    const int64_t g = u->order[k].group, pick = w->pick[g];
    for (int64_t s = 0; s < STATES; s++)
        u->next[s].value = (double)INFINITY;
    for (int64_t j = w->p->first[g]; j < w->p->first[g + 1]; j++) {
        if (j != pick && (w->out[j] || !may_take(u, pick, j)))
            continue;
        const double more = w->reduced[j] - w->reduced[pick];
        const int64_t size = w->size[j] - w->size[pick];
        for (int64_t s = 0; s < STATES; s++)
            if (u->now[s].value < (double)INFINITY)
                take(u, k, j, s, u->now[s].value + more, u->now[s].rest - size);
    }
    for (int64_t i = w->rows_at[pick]; i < w->rows_at[pick + 1]; i++)
        u->spare[w->rows_of[i]]--;
    reach *const swap = u->now;
    u->now = u->next;
    u->next = swap;
}

/* The way to the best rest that fits, if that is better than to change nothing. */
static void take_best(polish *u, double least)
{
    moec__lp *w = u->w;
    int64_t at = -1;
    for (int64_t s = 0; s < STATES; s++) {
        const double value = u->now[s].value + w->lambda * (double)u->now[s].rest;
        if (u->now[s].value < (double)INFINITY && u->now[s].rest >= 0 && value < least) {
            least = value;
            at = s;
        }
    }
    if (at < 0)
        return;
    for (int64_t k = u->core - 1; k >= 0; k--) {
        w->pick[u->order[k].group] = u->taken[k * STATES + at];
        at = u->before[k * STATES + at];
    }
    w->best = moec__lp_cost(w, w->pick);
}

moec_status moec__lp_polish(moec__lp *w, moec_err *err)
{
    moec_status st = MOEC_OK;
    polish u = {.w = w};
    int64_t rest;
    MOEC_TRY(MOEC_NEW(u.order, (size_t)w->p->groups, err));
    MOEC_TRY(MOEC_NEW(u.now, STATES, err));
    MOEC_TRY(MOEC_NEW(u.next, STATES, err));
    MOEC_TRY(MOEC_NEW(u.spare, (size_t)w->p->rows, err));
    moec__lp_rest(&rest, w, w->pick, w->met);
    for (int64_t r = 0; r < w->p->rows; r++)
        u.spare[r] = w->met[r] - w->p->row[r].least;
    choose_core(&u);
    MOEC_TRY(MOEC_NEW(u.before, (size_t)u.core * STATES, err));
    MOEC_TRY(MOEC_NEW(u.taken, (size_t)u.core * STATES, err));
    for (int64_t s = 0; s < STATES; s++)
        u.now[s].value = (double)INFINITY;
    if (u.core > 0 && state_of(&u, rest) >= 0) {
        u.now[state_of(&u, rest)] = (reach){0.0, rest};
        for (int64_t k = 0; k < u.core; k++)
            add_group(&u, k);
        take_best(&u, w->lambda * (double)rest);
    }
done:
    moec_free(u.order);
    moec_free(u.now);
    moec_free(u.next);
    moec_free(u.before);
    moec_free(u.taken);
    moec_free(u.spare);
    return st;
}
