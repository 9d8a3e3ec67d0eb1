/* The best choice of a small core, by dynamic programming over lists of states (Pisinger, A Minimal Algorithm for the Multiple-Choice
 * Knapsack Problem, European Journal of Operational Research 83, 1995; here the core is not widened step by step but is all that the
 * reduced costs leave).
 *
 * A choice that is better than the best so far has only options of a reduced cost below the gap: the core. With s_j what of a size is
 * above the group's least in the core, v_j = cost + lambda size above the group's least, and B what those least sizes leave of the
 * budget, a choice costs sum v + lambda (B - sum s) and something that is the same for all. A state is a pair (sum s, sum v) of the
 * groups so far. One falls away if
 *     sum s > B, or
 *     another one is no larger and costs no more (sum v - lambda sum s), or
 *     sum v + lambda max(0, B - sum s - the most that later groups can add) is above the best choice so far.
 * Rows are left out: the best choice without them that meets them all the same is the best with them, too; else they are for GLPK.
 * Nothing is rounded but the sums of v. */
#include "num/lp_parts.h"

#include "base/log.h"
#include "base/mem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { STATES = 4000000 }; /* of all groups together; 32 MB */
static const double most_steps = 5e7; /* for each state of a stage, options squared of the next: looks for the next sum; 0.06 s */

typedef struct member {
    int64_t option, size; /* s_j */
    double value;         /* v_j */
} member;

/* A group of more than one option in the core: member[first] .. member[first + n - 1]. */
typedef struct stage {
    int64_t group, first, n;
    int64_t most;  /* its largest s_j */
    double loss;   /* its second least v_j */
    size_t at, to; /* its states, of all */
} stage;

typedef struct sum {
    int64_t size;
    double value;
} sum;

typedef struct way {
    uint32_t from, member; /* state of the stage before, counted from its first; member of this stage likewise */
} way;

typedef struct exact {
    moec__lp *w;
    member *member; /* [options] */
    stage *stage;   /* [groups] */
    int64_t stages;
    int64_t *pick;  /* [groups] */
    int64_t budget; /* B */
    double best;    /* of the best choice so far, less what is the same for all */
    sum *now, *next; /* of the last stage and of the one at hand, by rising size */
    size_t room_now, room_next;
    way *way;       /* of the states of all stages */
    size_t ways, room;
    uint32_t *head; /* [options of a group] state that it is to be added to */
} exact;

/* Stages with the dearest changes first: their lists are short, and what makes them long comes last. */
static int by_loss(const void *a, const void *b)
{
    const stage *x = a, *y = b;
    if (x->loss < y->loss || x->loss > y->loss)
        return x->loss > y->loss ? -1 : 1;
    return x->group < y->group ? -1 : 1;
}

/* The core; groups with one option are taken off the budget. */
static void list_core(exact *x)
{
    const moec__lp *w = x->w;
    const double gap = w->best - w->bound;
    int64_t members = 0, rest;
    x->budget = w->budget;
    x->best = 0.0;
    for (int64_t g = 0; g < w->p->groups; g++) {
        stage s = {.group = g, .first = members, .loss = (double)INFINITY};
        int64_t size = INT64_MAX, known = members;
        double least = (double)INFINITY;
        for (int64_t j = w->p->first[g]; j < w->p->first[g + 1]; j++) {
            if (w->pick[g] != j && (w->out[j] || w->reduced[j] > gap))
                continue;
            const double value = w->cost[j] + w->lambda * (double)w->size[j];
            size = w->size[j] < size ? w->size[j] : size;
            s.loss = fmin(s.loss, fmax(value, least));
            least = fmin(least, value);
            known = w->pick[g] == j ? members : known;
            x->member[members++] = (member){j, w->size[j], value};
        }
        s.n = members - s.first;
        s.loss -= least;
        for (int64_t i = s.first; i < members; i++) {
            x->member[i].size -= size;
            x->member[i].value -= least;
            s.most = x->member[i].size > s.most ? x->member[i].size : s.most;
        }
        x->budget -= size;
        x->best += x->member[known].value;
        x->pick[g] = w->pick[g];
        if (s.n > 1)
            x->stage[x->stages++] = s;
    }
    moec__lp_rest(&rest, w, w->pick, NULL);
    x->best = (x->best + w->lambda * (double)rest) * (1.0 + 1e-12);
    qsort(x->stage, (size_t)x->stages, sizeof *x->stage, by_loss);
}

/* Of the sums that the options make of the last stage's the one of least size, of these the one of least value, of these the one of
 * the first option; -1: there are no more. */
static int64_t next_sum(sum *out, const exact *x, const stage *s, size_t states)
{
    int64_t at = -1;
    for (int64_t o = 0; o < s->n; o++) {
        if (x->head[o] == states)
            continue;
        const member *m = &x->member[s->first + o];
        const sum *from = &x->now[x->head[o]], to = {from->size + m->size, from->value + m->value};
        if (at < 0 || to.size < out->size || (to.size == out->size && to.value < out->value)) {
            *out = to;
            at = o;
        }
    }
    return at;
}

/* later: the most that sizes of the stages after it come to. */
static moec_status add_stage(exact *x, stage *s, size_t *states, int64_t later, moec_err *err)
{
    moec_status st = MOEC_OK;
    size_t n = 0;
    sum to = {0, 0.0};
    s->at = x->ways;
    memset(x->head, 0, (size_t)s->n * sizeof *x->head);
    for (int64_t o; (o = next_sum(&to, x, s, *states)) >= 0;) {
        const way w = {x->head[o]++, (uint32_t)o};
        const int64_t rest = x->budget - to.size;
        if (rest < 0)
            break;
        if (n > 0 && to.value - x->next[n - 1].value >= x->w->lambda * (double)(to.size - x->next[n - 1].size))
            continue;
        if (to.value + (rest > later ? x->w->lambda * (double)(rest - later) : 0.0) > x->best)
            continue;
        MOEC_TRY(MOEC_GROW(x->next, x->room_next, n + 1, err));
        MOEC_TRY(MOEC_GROW(x->way, x->room, x->ways + 1, err));
        x->next[n++] = to;
        x->way[x->ways++] = w;
    }
    s->to = x->ways;
    sum *const swap = x->now;
    const size_t room = x->room_now;
    x->now = x->next;
    x->room_now = x->room_next;
    x->next = swap;
    x->room_next = room;
    *states = n;
done:
    return st;
}

/* The last of the final states costs least: the way to it. */
static void follow(exact *x, size_t states)
{
    size_t at = states - 1;
    for (int64_t k = x->stages - 1; k >= 0; k--) {
        const stage *s = &x->stage[k];
        const way w = x->way[s->at + at];
        x->pick[s->group] = x->member[s->first + w.member].option;
        at = w.from;
    }
}

/* Takes the pick if it is better, by more than the order of a sum makes: of choices alike the walk's stays. False: it would be, but
 * misses a row. */
static bool take_pick(exact *x)
{
    moec__lp *w = x->w;
    const double cost = moec__lp_cost(w, x->pick);
    int64_t rest;
    if (!(cost < w->best * (1.0 - MOEC_LP_EXACT)))
        return true;
    if (!moec__lp_rest(&rest, w, x->pick, w->met) || rest < 0)
        return false;
    memcpy(w->pick, x->pick, (size_t)w->p->groups * sizeof *x->pick);
    w->best = cost;
    return true;
}

/* finished: it was not too much. */
static moec_status run(bool *finished, exact *x, moec_err *err)
{
    moec_status st = MOEC_OK;
    size_t states = 1;
    int64_t later = 0;
    double steps = 0.0;
    MOEC_TRY(MOEC_GROW(x->now, x->room_now, 1, err));
    x->now[0] = (sum){0, 0.0};
    for (int64_t k = 0; k < x->stages; k++)
        later += x->stage[k].most;
    for (int64_t k = 0; k < x->stages && states > 0; k++) {
        stage *s = &x->stage[k];
        steps += (double)states * (double)s->n * (double)s->n;
        if (steps > most_steps || x->ways + states * (size_t)s->n > STATES)
            goto done;
        later -= s->most;
        MOEC_TRY(moec_interrupted(err));
        MOEC_TRY(add_stage(x, s, &states, later, err));
    }
    *finished = true;
    if (states > 0)
        follow(x, states);
done:
    return st;
}

moec_status moec__lp_exact(bool *proven, moec__lp *w, moec_err *err)
{
    moec_status st = MOEC_OK;
    exact x = {.w = w};
    int64_t most = 1;
    *proven = false;
    for (int64_t g = 0; g < w->p->groups; g++)
        most = w->p->first[g + 1] - w->p->first[g] > most ? w->p->first[g + 1] - w->p->first[g] : most;
    MOEC_TRY(MOEC_NEW(x.member, (size_t)w->options, err));
    MOEC_TRY(MOEC_NEW(x.stage, (size_t)w->p->groups, err));
    MOEC_TRY(MOEC_NEW(x.pick, (size_t)w->p->groups, err));
    MOEC_TRY(MOEC_NEW(x.head, (size_t)most, err));
    list_core(&x);
    MOEC_TRY(run(proven, &x, err));
    *proven = *proven && take_pick(&x);
done:
    moec_free(x.member);
    moec_free(x.stage);
    moec_free(x.pick);
    moec_free(x.head);
    moec_free(x.now);
    moec_free(x.next);
    moec_free(x.way);
    return st;
}
