/* The leading left singular vectors of several matrices side by side, [W_1 .. W_n] = U S V^T, as eigenvectors of
 * sum_e W_e W_e^T: its size is that of one matrix, whatever n. What the union decomposition makes of weighted V's is then
 *
 *     U_r S_r sum_e w_e V_e^T = U_r U_r^T sum_e w_e W_e
 *
 * and with W_e replaced by W_e S_e, S_e S_e^T = C_e (and S_e^-1 put behind), the same with sum_e W_e C_e W_e^T: S_e cancels. C_e is a
 * sum of v v^T over tokens, so W_e C_e W_e^T is the Gram matrix of the outputs W_e v, and C_e is not made either. */
#include "method/merge_parts.h"

#include "base/mem.h"
#include "base/par.h"
#include "num/linalg.h"

#include <math.h>
#include <string.h>

enum { KINDS = 3, BLOCK = 128, TOKENS = 1024, BAND = 128 };
enum { DOWN, GATE, UP }; /* the largest first, so that threads end together */

typedef struct space {
    float *gram;     /* [n,n] lower triangle, or */
    double *wide;    /* the same where tokens weigh, */
    double *vectors; /* [r,n] and what it is decomposed into */
    float *basis;    /* [r,n] */
    int64_t n, r;    /* rows of the matrix; vectors that are made */
    bool rest;       /* they span what is taken away */
} space;

struct moec_subspace {
    const moec_filling *f;
    space of[KINDS];
    moec_room room;
    float *x, *act, *up, *pre[KINDS]; /* [TOKENS,.] whitening */
};

static size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* How many leading vectors stay. */
static int64_t rank_of(double share, int64_t rows, int64_t cols)
{
    const int64_t least = rows < cols ? rows : cols, r = (int64_t)ceil(share * (double)least);
    return r < 1 ? 1 : r > least ? least : r;
}

static moec_status space_new(space *s, int64_t rows, int64_t cols, const moec_merge_recipe *by, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t r = rank_of(by->rank, rows, cols);
    size_t cells;
    s->n = rows;
    s->rest = 2 * r > rows;
    s->r = s->rest ? rows - r : r;
    if (!moec_mul_size(&cells, (size_t)rows, (size_t)rows))
        return moec_fail(err, MOEC_ENOMEM, "subspace: %lld rows are too many", (long long)rows);
    if (by->whiten) {
        MOEC_TRY(MOEC_NEW(s->wide, cells, err));
        MOEC_TRY(MOEC_NEW(s->vectors, (size_t)(s->r * rows), err));
    } else {
        MOEC_TRY(MOEC_NEW(s->gram, cells, err));
    }
    MOEC_TRY(MOEC_NEW(s->basis, (size_t)(s->r * rows), err));
done:
    return st;
}

static size_t room_floats(size_t hidden, size_t width)
{
    return BLOCK * larger(hidden, width);
}

moec_status moec__subspace_new(moec_subspace **out, const moec_filling *f, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t h = f->hidden, width = f->width;
    moec_subspace *s = NULL;
    *out = NULL;
    MOEC_TRY(MOEC_NEW(s, 1, err));
    s->f = f;
    MOEC_TRY(space_new(&s->of[DOWN], h, width, f->r, err));
    MOEC_TRY(space_new(&s->of[UP], width, h, f->r, err));
    if (f->gated)
        MOEC_TRY(space_new(&s->of[GATE], width, h, f->r, err));
    MOEC_TRY(moec__room_new(&s->room, (int64_t)room_floats((size_t)h, (size_t)width), err));
    if (f->r->whiten) {
        MOEC_TRY(MOEC_NEW(s->x, (size_t)(TOKENS * h), err));
        MOEC_TRY(MOEC_NEW(s->act, (size_t)(TOKENS * width), err));
        MOEC_TRY(MOEC_NEW(s->up, (size_t)(TOKENS * width), err));
        for (int k = 0; k < KINDS; k++)
            MOEC_TRY(MOEC_NEW(s->pre[k], (size_t)(TOKENS * s->of[k].n), err));
    }
    *out = s;
    s = NULL;
done:
    moec__subspace_free(s);
    return st;
}

void moec__subspace_free(moec_subspace *s)
{
    if (!s)
        return;
    for (int k = 0; k < KINDS; k++) {
        moec_free(s->of[k].gram);
        moec_free(s->of[k].wide);
        moec_free(s->of[k].vectors);
        moec_free(s->of[k].basis);
        moec_free(s->pre[k]);
    }
    moec_free(s->room.store);
    moec_free(s->x);
    moec_free(s->act);
    moec_free(s->up);
    moec_free(s);
}

void moec__subspace_clear(moec_subspace *s)
{
    for (int k = 0; k < KINDS; k++) {
        const size_t cells = (size_t)s->of[k].n * (size_t)s->of[k].n;
        if (s->of[k].gram)
            memset(s->of[k].gram, 0, cells * sizeof(float));
        if (s->of[k].wide)
            memset(s->of[k].wide, 0, cells * sizeof(double));
    }
}

/* --- Gram matrices ---------------------------------------------------------------------------------------------------------- */

/* A A^T of a [n,depth], or A^T A of a [depth,n]. */
typedef struct gram {
    const moec_subspace *s;
    space *to;
    const float *a;
    int64_t depth;
    bool columns;
} gram;

static moec_status gram_rows(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const gram *g = ctx;
    const int64_t n = g->to->n, ld = g->columns ? n : g->depth;
    float *part = moec__room_of(&g->s->room, worker), *sum = g->to->gram ? g->to->gram + lo * n : NULL;
    moec_status st = moec_interrupted(err);
    if (st != MOEC_OK)
        return st;
    moec_sgemm(g->columns, !g->columns, hi - lo, hi, g->depth, 1.0f, g->a + lo * (g->columns ? 1 : ld), ld, g->a, ld,
               sum ? 1.0f : 0.0f, sum ? sum : part, sum ? n : hi);
    for (int64_t i = lo; !sum && i < hi; i++)
        for (int64_t j = 0; j <= i; j++)
            g->to->wide[i * n + j] += (double)part[(i - lo) * hi + j];
    return MOEC_OK;
}

static moec_status add_gram(moec_subspace *s, int kind, const float *a, int64_t depth, bool columns, moec_err *err)
{
    gram g = {s, &s->of[kind], a, depth, columns};
    return moec_par_for(g.to->n, BLOCK, gram_rows, &g, err);
}

typedef struct passing {
    moec_subspace *s;
    const moec_rows *w;
} passing;

/* Outputs of the three matrices, biases left out, for some of the tokens in s->x. */
static moec_status pass_some(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const passing *p = ctx;
    moec_subspace *s = p->s;
    const int64_t h = s->f->hidden, width = s->f->width;
    (void)worker;
    (void)err;
    moec__rows_act(s->act + lo * width, s->up + lo * width, s->pre[GATE] + lo * width, s->pre[UP] + lo * width, p->w, s->f,
                   s->x + lo * h, hi - lo);
    moec_sgemm(false, false, hi - lo, h, width, 1.0f, s->act + lo * width, width, p->w->down, h, 0.0f, s->pre[DOWN] + lo * h, h);
    return MOEC_OK;
}

static moec_status add_outputs(moec_subspace *s, const moec_rows *w, int64_t n, moec_err *err)
{
    moec_status st = MOEC_OK;
    passing p = {s, w};
    MOEC_TRY(moec_par_for(n, BAND, pass_some, &p, err));
    for (int k = 0; k < KINDS; k++)
        MOEC_TRY(add_gram(s, k, s->pre[k], n, true, err));
done:
    return st;
}

/* Of all tokens that select the expert, TOKENS at a time. */
static moec_status add_selected(moec_subspace *s, const moec_rows *w, int32_t expert, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_merge_task *t = s->f->t;
    const int64_t h = s->f->hidden;
    int64_t n = 0;
    for (int64_t i = 0; i < t->n; i++) {
        int64_t at = i * t->slots;
        while (at < (i + 1) * t->slots && t->ids[at] != expert)
            at++;
        if (at < (i + 1) * t->slots) {
            const float by = t->model->family->weight_on_input ? t->gates[at] : 1.0f;
            for (int64_t j = 0; j < h; j++)
                s->x[n * h + j] = by * t->x[i * h + j];
            n++;
        }
        if (n == TOKENS || (n > 0 && i + 1 == t->n)) {
            MOEC_TRY(add_outputs(s, w, n, err));
            n = 0;
        }
    }
done:
    return st;
}

moec_status moec__subspace_add(moec_subspace *s, const moec_rows *w, int32_t expert, bool whiten, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t h = s->f->hidden, width = s->f->width;
    if (whiten)
        return add_selected(s, w, expert, err);
    if (w->gate)
        MOEC_TRY(add_gram(s, GATE, w->gate, h, false, err));
    MOEC_TRY(add_gram(s, UP, w->up, h, false, err));
    MOEC_TRY(add_gram(s, DOWN, w->down, width, true, err)); /* down lies transposed */
done:
    return st;
}

/* --- projection ------------------------------------------------------------------------------------------------------------- */

/* In float32, but not where tokens weigh: their outlier channels leave eigenvalues that differ by more than its digits hold. */
static moec_status find_basis(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    moec_subspace *s = ctx;
    moec_status st = MOEC_OK;
    (void)worker;
    for (int64_t k = lo; k < hi; k++) {
        space *to = &s->of[k];
        const moec_eigen_end end = to->rest ? MOEC_EIGEN_SMALLEST : MOEC_EIGEN_LARGEST;
        if (to->n == 0)
            continue;
        MOEC_TRY(moec_interrupted(err));
        if (to->gram) {
            MOEC_TRY(moec_eigenspace(to->basis, to->gram, to->n, to->r, end, err));
            continue;
        }
        MOEC_TRY(moec_eigen(NULL, to->vectors, to->wide, to->n, to->r, end, err));
        for (int64_t i = 0; i < to->r * to->n; i++)
            to->basis[i] = (float)to->vectors[i];
    }
done:
    return st;
}

typedef struct projecting {
    const moec_subspace *s;
    const space *by;
    float *w; /* [n,cols], or transposed [rows,n] */
    int64_t cols;
} projecting;

/* Columns [lo, hi) of w := B^T B w, or w - B^T B w. */
static moec_status project_columns(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const projecting *p = ctx;
    const int64_t n = p->by->n, r = p->by->r, m = hi - lo;
    float *part = moec__room_of(&p->s->room, worker), *w = p->w + lo;
    (void)err;
    moec_sgemm(false, false, r, m, n, 1.0f, p->by->basis, n, w, p->cols, 0.0f, part, m);
    moec_sgemm(true, false, n, m, r, p->by->rest ? -1.0f : 1.0f, p->by->basis, n, part, m, p->by->rest ? 1.0f : 0.0f, w, p->cols);
    return MOEC_OK;
}

/* The same of the transposed: its rows [lo, hi). */
static moec_status project_rows(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const projecting *p = ctx;
    const int64_t n = p->by->n, r = p->by->r, m = hi - lo;
    float *part = moec__room_of(&p->s->room, worker), *w = p->w + lo * n;
    (void)err;
    moec_sgemm(false, true, m, r, n, 1.0f, w, n, p->by->basis, n, 0.0f, part, r);
    moec_sgemm(false, false, m, n, r, p->by->rest ? -1.0f : 1.0f, part, r, p->by->basis, n, p->by->rest ? 1.0f : 0.0f, w, n);
    return MOEC_OK;
}

moec_status moec__subspace_project(moec_subspace *s, moec_rows *w, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t h = s->f->hidden, width = s->f->width;
    projecting gate = {s, &s->of[GATE], w->gate, h}, up = {s, &s->of[UP], w->up, h}, down = {s, &s->of[DOWN], w->down, h};
    MOEC_TRY(moec_par_for(KINDS, 1, find_basis, s, err));
    if (w->gate)
        MOEC_TRY(moec_par_for(h, BLOCK, project_columns, &gate, err));
    MOEC_TRY(moec_par_for(h, BLOCK, project_columns, &up, err));
    MOEC_TRY(moec_par_for(width, BLOCK, project_rows, &down, err));
done:
    return st;
}

size_t moec__subspace_bytes(const moec_model *m, const moec_merge_recipe *r)
{
    const size_t h = (size_t)m->dims.hidden, width = (size_t)m->dims.expert_width, threads = (size_t)moec_par_threads();
    const size_t size = r->whiten ? sizeof(double) : sizeof(float), cells = h * h + 2 * width * width;
    const size_t solving = threads > 1 ? cells : larger(h, width) * larger(h, width); /* moec_eigen needs twice that */
    const size_t bases = cells / 2 + h + 2 * width, tokens = r->whiten ? TOKENS * (2 * h + 4 * width) : 0;
    return (cells + 2 * solving) * size + bases * (sizeof(float) + (r->whiten ? sizeof(double) : 0)) +
           sizeof(float) * (threads * room_floats(h, width) + tokens);
}
