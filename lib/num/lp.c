/* The border to GLPK: relaxation with rows, and branch and cut on what lp_greedy.c and lp_exact.c leave open.
 *
 * GLPK gets each problem as what a choice costs above a bound that is known already: with reduced costs d >= 0 of options, t what is
 * left of the budget and u_r what is above row r's least,
 *
 *     cost - L = sum_j d_j x_j + lambda t + sum_r mu_r u_r
 *
 * so that numbers are of the size of the gap, however large single costs are, and options of d above the gap can be left out: no
 * better choice has them. Groups with one option left are folded away, and sizes tightened again by the budget row's own scale. */
#include "num/lp_parts.h"

#include "base/log.h"
#include "base/mem.h"

#include <glpk.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <string.h>

static pthread_mutex_t glpk_lock = PTHREAD_MUTEX_INITIALIZER; /* GLPK has one state for all */

enum { PATIENCE = 2000, ENOUGH = 20000 }; /* nodes until a gap of LOOSE is as good as none, and until one of COARSE ends the search */
#define LOOSE 1e-6
#define COARSE 1e-4

typedef struct core {
    moec__lp *w;
    const double *value; /* [options] of the objective */
    bool sizes;          /* the objective is the size; there is no budget row */
    double gap;          /* options of more value are left out */
    double scale;        /* of the objective */
    int64_t n, groups;   /* options and groups in it */
    int *col;            /* [options] column, 0: none */
    int *over;           /* [rows of p] column of u_r, 0: the row is not in it */
    bool *slack;         /* [rows of p] u_r is basic */
    int64_t *single;     /* [groups of p] the one option that is left of a group, -1: there are more */
    int spare;           /* column of t */
    double unit;         /* t is the budget's rest times this */
    glp_prob *lp;
    int *index;          /* room for a row, and for values of all columns; from 1 on */
    double *factor;
    double start;        /* when GLPK began, of glp_time */
    double seconds;
    int nodes;
    moec_status stop;
    moec_err *err;
    bool given, closed;
} core;

static moec_status core_new(core *c, moec__lp *w, moec_err *err)
{
    moec_status st = MOEC_OK;
    const size_t options = (size_t)w->options, rows = (size_t)w->p->rows;
    *c = (core){.w = w, .err = err};
    MOEC_TRY(MOEC_NEW(c->col, options, err));
    MOEC_TRY(MOEC_NEW(c->over, rows, err));
    MOEC_TRY(MOEC_NEW(c->slack, rows, err));
    MOEC_TRY(MOEC_NEW(c->single, (size_t)w->p->groups, err));
    MOEC_TRY(MOEC_NEW(c->index, options + rows + 3, err));
    MOEC_TRY(MOEC_NEW(c->factor, options + rows + 3, err));
    for (size_t r = 0; r < rows; r++)
        c->slack[r] = true;
done:
    return st;
}

static void core_release(core *c)
{
    moec_free(c->col);
    moec_free(c->over);
    moec_free(c->slack);
    moec_free(c->single);
    moec_free(c->index);
    moec_free(c->factor);
}

/* ---- the program -------------------------------------------------------------------------------------------------------- */

/* Which options are in it. A choice that is known always is, so that GLPK can be given it. */
static void choose_options(core *c)
{
    const moec__lp *w = c->w;
    c->n = c->groups = 0;
    for (int64_t g = 0; g < w->p->groups; g++) {
        int64_t some = 0, one = -1;
        for (int64_t j = w->p->first[g]; j < w->p->first[g + 1]; j++) {
            const bool known = isfinite(w->best) && w->pick[g] == j;
            c->col[j] = known || (!w->out[j] && c->value[j] <= c->gap);
            some += c->col[j];
            one = c->col[j] ? j : one;
        }
        c->single[g] = some == 1 ? one : -1;
        for (int64_t j = w->p->first[g]; j < w->p->first[g + 1]; j++)
            c->col[j] = some > 1 && c->col[j] ? (int)++c->n : 0;
        c->groups += some > 1;
    }
}

/* Options as columns, and a row for each group: one of its options. */
static void add_groups(core *c)
{
    const moec__lp *w = c->w;
    int row = 0;
    glp_add_cols(c->lp, (int)c->n);
    if (c->groups > 0)
        glp_add_rows(c->lp, (int)c->groups);
    for (int64_t g = 0; g < w->p->groups; g++) {
        int n = 0;
        for (int64_t j = w->p->first[g]; j < w->p->first[g + 1]; j++) {
            if (!c->col[j])
                continue;
            c->index[++n] = c->col[j];
            c->factor[n] = 1.0;
            glp_set_col_kind(c->lp, c->col[j], GLP_BV);
            glp_set_obj_coef(c->lp, c->col[j], c->value[j] * c->scale);
            glp_set_col_stat(c->lp, c->col[j], w->basic[j] ? GLP_BS : GLP_NL);
        }
        if (n == 0)
            continue;
        glp_set_mat_row(c->lp, ++row, n, c->index, c->factor);
        glp_set_row_bnds(c->lp, row, GLP_FX, 1.0, 1.0);
        glp_set_row_stat(c->lp, row, GLP_NS);
    }
}

static int add_spare(core *c, double cost, int stat)
{
    const int col = glp_add_cols(c->lp, 1);
    glp_set_col_bnds(c->lp, col, GLP_LO, 0.0, 0.0);
    glp_set_obj_coef(c->lp, col, cost * c->scale);
    glp_set_col_stat(c->lp, col, stat);
    return col;
}

/* Row of n entries and one more, whose value is given. */
static void add_equation(core *c, int n, int col, double factor, double value)
{
    const int row = glp_add_rows(c->lp, 1);
    c->index[++n] = col;
    c->factor[n] = factor;
    glp_set_mat_row(c->lp, row, n, c->index, c->factor);
    glp_set_row_bnds(c->lp, row, GLP_FX, value, value);
    glp_set_row_stat(c->lp, row, GLP_NS);
}

/* sum of sizes + t = budget, sizes from the least of each group in the program on. Divided by what sizes come to, so that GLPK's
 * tolerances fit. */
static void add_budget(core *c)
{
    const moec__lp *w = c->w;
    int64_t left = w->budget, most = 1;
    int n = 0;
    for (int64_t g = 0; g < w->p->groups; g++) {
        int64_t least = INT64_MAX, from = w->p->first[g], to = w->p->first[g + 1];
        if (c->single[g] >= 0) {
            left -= w->size[c->single[g]];
            continue;
        }
        for (int64_t j = from; j < to; j++)
            least = c->col[j] && w->size[j] < least ? w->size[j] : least;
        left -= least;
        for (int64_t j = from; j < to; j++) {
            if (!c->col[j] || w->size[j] == least)
                continue;
            c->index[++n] = c->col[j];
            c->factor[n] = (double)(w->size[j] - least);
            most = w->size[j] - least > most ? w->size[j] - least : most;
        }
    }
    c->unit = 1.0 / (double)most;
    for (int i = 1; i <= n; i++)
        c->factor[i] *= c->unit;
    c->spare = add_spare(c, w->lambda / c->unit, w->tight ? GLP_NL : GLP_BS);
    add_equation(c, n, c->spare, 1.0, (double)left * c->unit);
}

/* sum of x - u_r = least, for the rows that options in the program are in. */
static void add_rows(core *c)
{
    const moec__lp *w = c->w;
    for (int64_t r = 0; r < w->p->rows; r++) {
        const moec_lp_row *row = &w->p->row[r];
        int64_t need = row->least;
        int n = 0;
        for (int64_t i = 0; i < row->n; i++) {
            const int64_t j = row->option[i];
            need -= c->single[w->group[j]] == j;
            if (!c->col[j])
                continue;
            c->index[++n] = c->col[j];
            c->factor[n] = 1.0;
        }
        c->over[r] = 0;
        if (n == 0 || (need <= 0 && !(w->mu[r] > 0.0)))
            continue;
        c->over[r] = add_spare(c, c->sizes ? 0.0 : w->mu[r], c->slack[r] ? GLP_BS : GLP_NL);
        add_equation(c, n, c->over[r], -1.0, (double)need);
    }
}

/* What is left of the time, in milliseconds of GLPK's parameters; 0: none. */
static int time_left(const core *c)
{
    if (!(c->seconds > 0.0))
        return INT_MAX;
    const double left = (c->seconds - glp_difftime(glp_time(), c->start)) * 1000.0;
    return left < 1.0 ? 0 : left < (double)INT_MAX ? (int)left : INT_MAX;
}

/* The relaxation's optimum. False: there is none, or no time. */
static bool relax(core *c)
{
    glp_smcp how;
    glp_init_smcp(&how);
    how.msg_lev = GLP_MSG_OFF;
    how.meth = GLP_DUALP;
    how.tol_dj = how.tol_bnd = 1e-9;
    how.tm_lim = time_left(c);
    if (how.tm_lim == 0)
        return false;
    const int rc = glp_simplex(c->lp, &how);
    if (rc == GLP_EBADB || rc == GLP_ESING || rc == GLP_ECOND) { /* the walk's basis does not fit: one of GLPK's own */
        glp_adv_basis(c->lp, 0);
        glp_simplex(c->lp, &how);
    }
    return glp_get_status(c->lp) == GLP_OPT;
}

static void build(core *c)
{
    choose_options(c);
    c->lp = glp_create_prob();
    glp_set_obj_dir(c->lp, GLP_MIN);
    add_groups(c);
    if (!c->sizes)
        add_budget(c);
    add_rows(c);
}

/* ---- relaxation with rows ------------------------------------------------------------------------------------------------ */

/* Multipliers and basis of the relaxation for w. The bound is made of them by our own arithmetic, and holds whatever GLPK's
 * tolerances were. */
static void take_multipliers(core *c)
{
    moec__lp *w = c->w;
    w->lambda = fmax(0.0, glp_get_col_dual(c->lp, c->spare) / c->scale * c->unit);
    w->tight = glp_get_col_stat(c->lp, c->spare) != GLP_BS;
    for (int64_t r = 0; r < w->p->rows; r++)
        if (c->over[r] > 0) {
            w->mu[r] = fmax(0.0, glp_get_col_dual(c->lp, c->over[r]) / c->scale);
            c->slack[r] = glp_get_col_stat(c->lp, c->over[r]) == GLP_BS;
        }
    for (int64_t j = 0; j < w->options; j++)
        w->basic[j] = c->col[j] > 0 ? glp_get_col_stat(c->lp, c->col[j]) == GLP_BS : c->single[w->group[j]] == j;
}

static void bound_with_rows(core *c)
{
    build(c);
    if (c->n > 0 && relax(c))
        take_multipliers(c);
}

/* ---- branching ----------------------------------------------------------------------------------------------------------- */

/* The choice that is known, for GLPK to improve. */
static void give_choice(core *c, glp_tree *tree)
{
    const moec__lp *w = c->w;
    double *x = c->factor;
    int64_t rest;
    moec__lp_rest(&rest, w, w->pick, w->met);
    memset(x, 0, (size_t)(glp_get_num_cols(c->lp) + 1) * sizeof *x);
    for (int64_t g = 0; g < w->p->groups; g++)
        if (c->col[w->pick[g]] > 0)
            x[c->col[w->pick[g]]] = 1.0;
    x[c->spare] = (double)rest * c->unit;
    for (int64_t r = 0; r < w->p->rows; r++)
        if (c->over[r] > 0)
            x[c->over[r]] = (double)(w->met[r] - w->p->row[r].least);
    glp_ios_heur_sol(tree, x);
}

/* Is the best choice within this share of what any could cost? */
static bool near_enough(const core *c, glp_tree *tree, double share)
{
    const int node = glp_ios_best_node(tree);
    if (node == 0 || glp_mip_status(c->lp) != GLP_FEAS)
        return false;
    const double gap = (glp_mip_obj_val(c->lp) - glp_ios_node_bound(tree, node)) / c->scale;
    return gap <= share * (c->w->base + c->w->bound);
}

static void on_event(glp_tree *tree, void *info)
{
    core *c = info;
    switch (glp_ios_reason(tree)) {
    case GLP_IHEUR:
        if (!c->given && isfinite(c->w->best))
            give_choice(c, tree);
        c->given = true;
        break;
    case GLP_ISELECT:
        c->stop = moec_interrupted(c->err);
        if (!c->sizes && ++c->nodes > PATIENCE)
            c->closed = near_enough(c, tree, LOOSE);
        if (c->stop != MOEC_OK || c->closed || (c->nodes > ENOUGH && near_enough(c, tree, COARSE)))
            glp_ios_terminate(tree);
        break;
    default:
        break;
    }
}

/* Takes GLPK's choice over where it is better. What passes its tolerances need not fit by whole numbers: then nothing is closed. */
static void take_choice(core *c, int64_t *pick)
{
    moec__lp *w = c->w;
    int64_t rest;
    if (glp_mip_status(c->lp) != GLP_OPT && glp_mip_status(c->lp) != GLP_FEAS)
        return;
    const bool was_closed = c->closed;
    c->closed = false;
    for (int64_t g = 0; g < w->p->groups; g++) {
        int64_t to = c->single[g];
        for (int64_t j = w->p->first[g]; j < w->p->first[g + 1]; j++)
            if (c->col[j] > 0 && glp_mip_col_val(c->lp, c->col[j]) > 0.5)
                to = j;
        if (to < 0)
            return;
        pick[g] = to;
    }
    if (!moec__lp_rest(&rest, w, pick, w->met) || (rest < 0 && !c->sizes))
        return;
    c->closed = was_closed;
    const double cost = moec__lp_cost(w, pick);
    if (!(cost < w->best))
        return;
    memcpy(w->pick, pick, (size_t)w->p->groups * sizeof *pick);
    w->best = cost;
}

static void branch(core *c)
{
    glp_iocp how;
    build(c);
    if (c->n == 0) { /* nothing that could be better */
        c->closed = true;
        return;
    }
    if (!relax(c)) {
        c->closed = glp_get_status(c->lp) == GLP_NOFEAS;
        return;
    }
    glp_init_iocp(&how);
    how.msg_lev = GLP_MSG_OFF;
    how.tol_obj = 1e-9;
    how.tol_int = 1e-9; /* sizes can be nearly alike */
    how.cb_func = on_event;
    how.cb_info = c;
    how.tm_lim = time_left(c);
    if (how.tm_lim > 0 && glp_intopt(c->lp, &how) == 0)
        c->closed = true;
}

/* ---- GLPK's state --------------------------------------------------------------------------------------------------------- */

static int quiet(void *info, const char *text)
{
    (void)info, (void)text;
    return 1;
}

static void gave_up(void *info)
{
    longjmp(*(jmp_buf *)info, 1);
}

/* One step under GLPK. What it would abort the program for, memory that it does not get, comes back here. */
static moec_status under_glpk(core *c, void (*step)(core *))
{
    jmp_buf back;
    if (setjmp(back) != 0) {
        glp_free_env(); /* and with it the problem */
        c->lp = NULL;
        return moec_fail(c->err, MOEC_ENOMEM, "GLPK gave up, most likely for want of memory");
    }
    glp_term_hook(quiet, NULL);
    glp_error_hook(gave_up, &back);
    step(c);
    glp_error_hook(NULL, NULL);
    return MOEC_OK;
}

static void leave_glpk(core *c)
{
    if (c->lp)
        glp_delete_prob(c->lp);
    c->lp = NULL;
    glp_term_hook(NULL, NULL);
}

/* ---- steps ---------------------------------------------------------------------------------------------------------------- */

static moec_status too_large(const moec__lp *w, int64_t least, moec_err *err)
{
    return moec_fail(err, MOEC_ENOFIT, "a budget of %lld: no choice takes less than %lld", (long long)w->p->budget, (long long)least);
}

/* A first choice where the walk found none: the smallest that meets the rows. */
static moec_status find_smallest(core *c, int64_t *room)
{
    moec__lp *w = c->w;
    moec_status st = MOEC_OK;
    int64_t rest, most = 1;
    for (int64_t j = 0; j < w->options; j++) {
        w->reduced[j] = (double)w->size[j];
        most = w->size[j] > most ? w->size[j] : most;
    }
    c->value = w->reduced;
    c->gap = (double)INFINITY;
    c->scale = 1.0 / (double)most;
    c->sizes = true;
    MOEC_TRY(under_glpk(c, branch));
    if (c->stop != MOEC_OK)
        MOEC_TRY(c->stop);
    if (c->n > 0)
        take_choice(c, room);
    else
        for (int64_t g = 0; g < w->p->groups; g++)
            w->pick[g] = c->single[g];
    const bool met = moec__lp_rest(&rest, w, w->pick, w->met);
    if (!met && c->closed)
        MOEC_TRY(moec_fail(c->err, MOEC_EINVAL, "rows that no choice meets together"));
    if (!met)
        MOEC_TRY(moec_fail(c->err, MOEC_ENOFIT, "no choice that meets the rows was found within %g seconds", c->seconds));
    if (rest < 0)
        MOEC_TRY(too_large(w, w->least + w->unit * (w->budget - rest), c->err));
    moec__lp_fill(w);
    moec__lp_weigh(w);
done:
    leave_glpk(c);
    c->sizes = c->closed = false;
    c->nodes = 0;
    return st;
}

/* Gap that is none; sums of many terms are not exact. */
static bool closed(const moec__lp *w)
{
    const double terms = w->best + w->lambda * (double)w->budget;
    return w->best - w->bound <= fmax(fmax(MOEC_LP_EXACT * w->best, 1e-14 * terms), 1e-290);
}

static void aim(core *c)
{
    c->value = c->w->reduced;
    c->gap = c->w->best - c->w->bound;
    c->scale = 1000.0 / c->gap;
}

static moec_status improve(core *c, int64_t *room)
{
    moec__lp *w = c->w;
    moec_status st = MOEC_OK;
    if (!closed(w))
        MOEC_TRY(moec__lp_polish(w, c->err));
    if (w->p->rows > 0 && !closed(w)) {
        const double lambda = w->lambda, bound = w->bound;
        aim(c);
        MOEC_TRY(under_glpk(c, bound_with_rows));
        leave_glpk(c);
        moec__lp_weigh(w);
        if (w->bound < bound) {
            w->lambda = lambda;
            memset(w->mu, 0, (size_t)w->p->rows * sizeof *w->mu);
            moec__lp_weigh(w);
        }
        MOEC_TRY(moec__lp_polish(w, c->err));
    }
    if (closed(w))
        c->closed = true;
    else
        MOEC_TRY(moec__lp_exact(&c->closed, w, c->err));
    if (c->closed)
        goto done;
    aim(c);
    MOEC_TRY(under_glpk(c, branch));
    MOEC_TRY(c->stop);
    if (c->n > 0)
        take_choice(c, room);
done:
    leave_glpk(c);
    return st;
}

static moec_status solve(moec_lp_answer *out, const moec_lp *p, double seconds, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec__lp w = {.p = NULL};
    core c = {.w = NULL};
    int64_t *room = NULL;
    MOEC_TRY(moec__lp_prepare(&w, p, err));
    if (w.budget < 0)
        MOEC_TRY(too_large(&w, w.least, err));
    MOEC_TRY(core_new(&c, &w, err));
    MOEC_TRY(MOEC_NEW(room, (size_t)p->groups, err));
    MOEC_TRY(MOEC_NEW(out->pick, (size_t)p->groups, err));
    c.start = glp_time();
    c.seconds = seconds;
    if (!moec__lp_greedy(&w))
        MOEC_TRY(find_smallest(&c, room));
    MOEC_TRY(improve(&c, room));
    memcpy(out->pick, w.pick, (size_t)p->groups * sizeof *out->pick);
    for (int64_t g = 0; g < p->groups; g++) {
        out->cost += p->cost[out->pick[g]];
        out->size += p->size[out->pick[g]];
    }
    out->bound = fmin(out->cost, w.base + w.bound);
    out->proven = c.closed || out->cost - out->bound <= 1e-9 * out->cost;
done:
    core_release(&c);
    moec__lp_release(&w);
    moec_free(room);
    if (st != MOEC_OK)
        moec_lp_answer_release(out);
    return st;
}

moec_status moec_lp_solve(moec_lp_answer *out, const moec_lp *p, double seconds, moec_err *err)
{
    *out = (moec_lp_answer){.pick = NULL};
    pthread_mutex_lock(&glpk_lock);
    const moec_status st = solve(out, p, seconds, err);
    pthread_mutex_unlock(&glpk_lock);
    return st;
}

void moec_lp_answer_release(moec_lp_answer *a)
{
    moec_free(a->pick);
    *a = (moec_lp_answer){.pick = NULL};
}
