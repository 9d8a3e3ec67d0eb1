/* See moec_repair_ridge. Rows of b and of the residual carry the root of the token's weight, so that sums over tokens are plain
 * products of the two and errors plain squares. */
#include "method/repair_parts.h"

#include "base/mem.h"
#include "base/par.h"
#include "num/linalg.h"

#include <math.h>
#include <string.h>

enum {
    TILE = 192,        /* of the Gram matrix and of the right-hand sides */
    DEPTH = 1024,      /* tokens that are summed in float32 */
    RIGHT = 64,        /* rows of D that one thread takes at a time */
    SOLVED = 128,      /* the same of the factor's solutions */
    GROWTHS = 30,      /* of mu by 10, until the matrix can be factorised */
    STEPS = 50,        /* of conjugate gradients */
    DENSE_GUESS = 4096 /* widest dense problem in moec_repair_bytes */
};

typedef struct ridge {
    moec_repair_task *t;
    const moec_ridge_opts *o;
    moec_tokens k;
    moec_piece p;
    int64_t hidden, width;
    float *values, *biases;
    float *b;              /* [n,I] sqrt(w) g a of the expert's tokens */
    float *r;              /* [n,H] sqrt(w) rest */
    double *was, *now;     /* [n] their squares before and after */
    double *gram, *factor; /* [I,I] */
    double *right;         /* [H,I] right-hand sides, then the change */
    float *change;         /* [H,I] or [I,H] as rounded to the tensor's type */
    moec_up *up;           /* NULL: up projections stay */
    bool with_up;          /* in this sweep */
    double mu;
    moec_room room;
} ridge;

/* --- sums over tokens ------------------------------------------------------------------------------------------------------ */

/* sqrt(w) g, or sqrt(w) with the weight on the input. */
static float factor_of(const ridge *a, const float *gate, int64_t i)
{
    const float root = sqrtf(a->t->weight[a->k.token[i]]);
    return gate ? root * a->k.gate[i] : root;
}

/* b and slopes of tokens [lo, hi). */
static moec_status features(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const ridge *a = ctx;
    float *b = a->b + lo * a->width, *slope = a->with_up ? moec__up_slope(a->up) + lo * a->width : NULL;
    const float *gate;
    moec__piece_act(b, slope, &gate, moec__room_of(&a->room, worker), a->t, &a->p, a->k.token + lo, a->k.gate + lo, hi - lo);
    for (int64_t i = 0; i < hi - lo; i++) {
        const float scale = factor_of(a, gate, lo + i);
        for (int64_t j = i * a->width; j < (i + 1) * a->width; j++)
            b[j] *= scale;
        for (int64_t j = i * a->width; slope && j < (i + 1) * a->width; j++)
            slope[j] *= scale;
    }
    return moec_interrupted(err);
}

/* r of tokens [lo, hi), and its squares. */
static moec_status take_rest(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const ridge *a = ctx;
    (void)worker;
    (void)err;
    for (int64_t i = lo; i < hi; i++) {
        const int64_t token = a->k.token[i];
        const float root = sqrtf(a->t->weight[token]), *rest = a->t->rest + token * a->hidden;
        float *r = a->r + i * a->hidden;
        for (int64_t j = 0; j < a->hidden; j++)
            r[j] = root * rest[j];
        a->was[i] = moec_sum_sq(r, a->hidden);
    }
    return MOEC_OK;
}

/* out [rows,cols] with ld = sum over fitted tokens of x[t,..rows] y[t,..cols], by blocks of DEPTH. */
static void outer(double *out, int64_t ld, float *part, const float *x, int64_t ldx, int64_t rows, const float *y, int64_t ldy,
                  int64_t cols, int64_t n)
{
    for (int64_t i = 0; i < rows; i++)
        memset(out + i * ld, 0, (size_t)cols * sizeof *out);
    for (int64_t at = 0; at < n; at += DEPTH) {
        const int64_t m = n - at < DEPTH ? n - at : DEPTH;
        moec_sgemm(true, false, rows, cols, m, 1.0f, x + at * ldx, ldx, y + at * ldy, ldy, 0.0f, part, cols);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < cols; j++)
                out[i * ld + j] += (double)part[i * cols + j];
    }
}

static int64_t tiles(int64_t n)
{
    return (n + TILE - 1) / TILE;
}

static int64_t edge(int64_t at, int64_t n)
{
    return n - at < TILE ? n - at : TILE;
}

/* Tiles of the Gram matrix on and above its diagonal, with their mirror images, and behind them those of the right-hand sides. */
static moec_status sum_tiles(void *ctx, int worker, int64_t from, int64_t to, moec_err *err)
{
    const ridge *a = ctx;
    const int64_t width = a->width, wide = tiles(width);
    float *part = moec__room_of(&a->room, worker);
    for (int64_t k = from; k < to; k++) {
        const int64_t i = k / wide * TILE, j = k % wide * TILE;
        if (k >= wide * wide) {
            const int64_t h = i - wide * TILE;
            outer(a->right + h * width + j, width, part, a->r + h, a->hidden, edge(h, a->hidden), a->b + j, width,
                  edge(j, width), a->k.n_fit);
        } else if (i <= j) {
            outer(a->gram + i * width + j, width, part, a->b + i, width, edge(i, width), a->b + j, width, edge(j, width),
                  a->k.n_fit);
            for (int64_t r = i; r < i + edge(i, width); r++)
                for (int64_t c = j; c < j + edge(j, width); c++)
                    a->gram[c * width + r] = a->gram[r * width + c];
        }
    }
    return moec_interrupted(err);
}

/* --- the two solvers -------------------------------------------------------------------------------------------------------- */

static moec_status solve_rows(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const ridge *a = ctx;
    (void)worker;
    (void)err;
    moec_cholesky_solve(a->right + lo * a->width, a->factor, a->width, hi - lo);
    return MOEC_OK;
}

/* False: no mu helped, since the sums are not finite. */
static bool factorise(ridge *a)
{
    const int64_t n = a->width;
    double mu = a->mu;
    for (int i = 0; i < GROWTHS; i++, mu *= 10.0) {
        memcpy(a->factor, a->gram, (size_t)(n * n) * sizeof *a->factor);
        for (int64_t j = 0; j < n; j++)
            a->factor[j * n + j] += mu;
        if (moec_cholesky(a->factor, n))
            return true;
    }
    return false;
}

/* With D' = D + change; false: nothing can be done. */
static moec_status solve_dense(bool *ok, ridge *a, moec_err *err)
{
    const int64_t wide = tiles(a->width);
    moec_status st = moec_par_for(wide * (wide + tiles(a->hidden)), 1, sum_tiles, a, err);
    if (st != MOEC_OK)
        return st;
    *ok = factorise(a);
    if (!*ok)
        return MOEC_OK;
    st = moec_par_for(a->hidden, SOLVED, solve_rows, a, err);
    for (int64_t i = 0; i < a->hidden * a->width; i++)
        a->change[i] = (float)a->right[i];
    return st;
}

/* Conjugate gradients of some rows of D at once, each row its own system with the matrix A + mu, which is never formed. */
typedef struct cg {
    float *x, *r, *p, *q; /* [RIGHT,I] solution, residual, direction, matrix times direction */
    float *u;             /* [RIGHT,n_fit] */
    double rr[RIGHT], goal[RIGHT];
} cg;

static void times_matrix(const ridge *a, cg *c, int64_t rows)
{
    const int64_t I = a->width, n = a->k.n_fit;
    moec_sgemm(false, true, rows, n, I, 1.0f, c->p, I, a->b, I, 0.0f, c->u, n);
    moec_sgemm(false, false, rows, I, n, 1.0f, c->u, n, a->b, I, 0.0f, c->q, I);
    moec_saxpy(c->q, (float)a->mu, c->p, rows * I);
}

/* One step of every row that is not there yet; false: all are. */
static bool cg_step(const ridge *a, cg *c, int64_t rows)
{
    const int64_t I = a->width;
    bool more = false;
    times_matrix(a, c, rows);
    for (int64_t i = 0; i < rows; i++) {
        float *r = c->r + i * I, *p = c->p + i * I;
        const double pq = (double)moec_sdot(p, c->q + i * I, I);
        if (!(c->rr[i] > c->goal[i]) || !(pq > 0.0)) {
            c->rr[i] = 0.0;
            continue;
        }
        const float alpha = (float)(c->rr[i] / pq);
        moec_saxpy(c->x + i * I, alpha, p, I);
        moec_saxpy(r, -alpha, c->q + i * I, I);
        const double rr = moec_sum_sq(r, I);
        const float beta = (float)(rr / c->rr[i]);
        for (int64_t j = 0; j < I; j++)
            p[j] = r[j] + beta * p[j];
        c->rr[i] = rr;
        more |= rr > c->goal[i];
    }
    return more;
}

static moec_status cg_rows(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const ridge *a = ctx;
    const int64_t I = a->width, n = a->k.n_fit, rows = hi - lo;
    float *room = moec__room_of(&a->room, worker);
    cg c = {.x = a->change + lo * I, .r = room, .p = room + RIGHT * I, .q = room + 2 * RIGHT * I, .u = room + 3 * RIGHT * I};
    moec_sgemm(true, false, rows, I, n, 1.0f, a->r + lo, a->hidden, a->b, I, 0.0f, c.r, I);
    memcpy(c.p, c.r, (size_t)(rows * I) * sizeof *c.p);
    memset(c.x, 0, (size_t)(rows * I) * sizeof *c.x);
    for (int64_t i = 0; i < rows; i++) {
        c.rr[i] = moec_sum_sq(c.r + i * I, I);
        c.goal[i] = 1e-8 * c.rr[i];
    }
    moec_status st = moec_interrupted(err);
    for (int s = 0; s < STEPS && st == MOEC_OK && cg_step(a, &c, rows); s++)
        st = moec_interrupted(err);
    return st;
}

/* --- a visit ------------------------------------------------------------------------------------------------------------------ */

/* What is to be taken from r: moved [n,I] times down^T [I,H]. */
typedef struct movement {
    const ridge *a;
    const float *moved, *down;
} movement;

static moec_status look_ahead(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const movement *m = ctx;
    const ridge *a = m->a;
    const int64_t H = a->hidden, I = a->width;
    (void)worker;
    (void)err;
    moec_sgemm(false, true, hi - lo, H, I, -1.0f, m->moved + lo * I, I, m->down, I, 1.0f, a->r + lo * H, H);
    for (int64_t i = lo; i < hi; i++)
        a->now[i] = moec_sum_sq(a->r + i * H, H);
    return MOEC_OK;
}

/* Rows of a matrix that changes: what it becomes as its tensor will hold it, and the change that this is. */
typedef struct changing {
    float *values, *change;
    int64_t cols;
    moec_dtype dtype;
} changing;

static moec_status round_change(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const changing *a = ctx;
    (void)worker;
    (void)err;
    for (int64_t h = lo; h < hi; h++) {
        float *d = a->values + h * a->cols, *c = a->change + h * a->cols;
        moec_add(c, d, a->cols);
        moec__round(c, a->cols, a->dtype);
        for (int64_t j = 0; j < a->cols; j++) {
            const float now = c[j];
            c[j] = now - d[j];
            d[j] = now;
        }
    }
    return MOEC_OK;
}

static bool is_better(const ridge *a)
{
    double was = 0.0, now = 0.0;
    for (int64_t i = a->k.n > a->k.n_fit ? a->k.n_fit : 0; i < a->k.n; i++) {
        was += a->was[i];
        now += a->now[i];
    }
    return now < was;
}

/* What is missing with the change, the root of the weight taken out again. */
static moec_status put_rest(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const ridge *a = ctx;
    (void)worker;
    (void)err;
    for (int64_t i = lo; i < hi; i++) {
        const int64_t token = a->k.token[i];
        const float inverse = 1.0f / sqrtf(a->t->weight[token]);
        float *rest = a->t->rest + token * a->hidden;
        for (int64_t j = 0; j < a->hidden; j++)
            rest[j] = inverse * a->r[i * a->hidden + j];
    }
    return MOEC_OK;
}

static double trace(const ridge *a)
{
    double sum = 0.0;
    for (int64_t i = 0; i < a->k.n_fit; i++)
        sum += moec_sum_sq(a->b + i * a->width, a->width);
    return sum;
}

/* Takes the change of `part`, or, where it does not help or there is none (m NULL), goes back to what was. */
static moec_status judge(int64_t *taken, ridge *a, movement *m, uint32_t part, moec_err *err)
{
    moec_status st = MOEC_OK;
    if (m)
        MOEC_TRY(moec_par_for(a->k.n, MOEC_REPAIR_BLOCK, look_ahead, m, err));
    if (m && is_better(a)) {
        MOEC_TRY(moec__piece_write(&a->p, a->t, part, err));
        MOEC_TRY(moec_par_for(a->k.n, MOEC_REPAIR_BLOCK, put_rest, a, err));
        memcpy(a->was, a->now, (size_t)a->k.n * sizeof *a->was);
        *taken += 1;
    } else {
        MOEC_TRY(moec__piece_read(&a->p, a->t, a->values, a->biases, err));
        MOEC_TRY(moec_par_for(a->k.n, MOEC_REPAIR_BLOCK, take_rest, a, err));
    }
done:
    return st;
}

static moec_status refit_down(int64_t *taken, ridge *a, moec_err *err)
{
    moec_status st = MOEC_OK;
    movement m = {a, a->b, a->change};
    changing c = {a->p.down, a->change, a->width, a->t->layer->expert[a->p.expert].down.of->dtype};
    const double sum = trace(a);
    bool ok = true;
    if (!(sum > 0.0)) /* without activations */
        goto done;
    a->mu = a->o->lambda / (double)a->width * sum;
    if (!(a->mu > 0.0)) /* without a penalty the matrix may be singular */
        a->mu = 1e-12 / (double)a->width * sum;
    if (a->width <= a->o->dense)
        MOEC_TRY(solve_dense(&ok, a, err));
    else
        MOEC_TRY(moec_par_for(a->hidden, RIGHT, cg_rows, a, err));
    if (!ok)
        goto done;
    MOEC_TRY(moec_par_for(a->hidden, RIGHT, round_change, &c, err));
    ok = moec_all_finite(a->p.down, a->hidden * a->width); /* else diverged, or beyond float16 */
    MOEC_TRY(judge(taken, a, ok ? &m : NULL, MOEC_PART_DOWN, err));
done:
    return st;
}

/* What b changes by with the change of up. */
static moec_status move_features(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const ridge *a = ctx;
    const int64_t H = a->hidden, I = a->width, n = hi - lo;
    float *moved = moec__up_moved(a->up) + lo * I, *room = moec__room_of(&a->room, worker);
    const float *slope = moec__up_slope(a->up) + lo * I, *b = a->b + lo * I, *gate;
    if (a->t->model->family->activation == MOEC_ACT_SWIGLU) { /* linear in up */
        moec__piece_input(room, a->t->x, a->t, a->k.token + lo, a->k.gate + lo, n);
        moec_sgemm(false, true, n, I, H, 1.0f, room, H, a->change, H, 0.0f, moved, I);
        for (int64_t i = 0; i < n * I; i++)
            moved[i] *= slope[i];
        return moec_interrupted(err);
    }
    moec__piece_act(moved, NULL, &gate, room, a->t, &a->p, a->k.token + lo, a->k.gate + lo, n);
    for (int64_t i = 0; i < n; i++) {
        const float scale = factor_of(a, gate, lo + i);
        for (int64_t j = i * I; j < (i + 1) * I; j++)
            moved[j] = scale * moved[j] - b[j];
    }
    return moec_interrupted(err);
}

static moec_status refit_up(int64_t *taken, ridge *a, moec_err *err)
{
    moec_status st = MOEC_OK;
    movement m = {a, moec__up_moved(a->up), a->p.down};
    changing c = {a->p.up, a->change, a->hidden, a->t->layer->expert[a->p.expert].up.of->dtype};
    bool ok;
    MOEC_TRY(moec__up_solve(&ok, a->change, a->up, &a->p, &a->k, a->r, a->o->lambda, a->o->up_steps, err));
    if (!ok)
        goto done;
    MOEC_TRY(moec_par_for(a->width, RIGHT, round_change, &c, err));
    ok = moec_all_finite(a->p.up, a->hidden * a->width);
    if (ok)
        MOEC_TRY(moec_par_for(a->k.n, MOEC_REPAIR_BLOCK, move_features, a, err));
    MOEC_TRY(judge(taken, a, ok ? &m : NULL, MOEC_PART_UP, err));
done:
    return st;
}

static moec_status visit(int64_t *taken, ridge *a, int32_t expert, moec_err *err)
{
    moec_status st = MOEC_OK;
    MOEC_TRY(moec_interrupted(err));
    moec__picked_of(&a->k, a->t, a->t->ids, a->t->gates, expert);
    if (a->t->progress)
        moec_progress_step(a->t->progress, (uint64_t)a->k.n);
    if (a->k.n_fit == 0)
        goto done;
    a->p = (moec_piece){.expert = expert, .width = a->width};
    MOEC_TRY(moec__piece_read(&a->p, a->t, a->values, a->biases, err));
    MOEC_TRY(moec_par_for(a->k.n, MOEC_REPAIR_BLOCK, features, a, err));
    MOEC_TRY(moec_par_for(a->k.n, MOEC_REPAIR_BLOCK, take_rest, a, err));
    MOEC_TRY(refit_down(taken, a, err));
    if (a->with_up)
        MOEC_TRY(refit_up(taken, a, err));
done:
    return st;
}

static int64_t room_floats(const moec_dims *d, int64_t n, bool dense)
{
    const int64_t act = MOEC_REPAIR_BLOCK * 2 * (d->hidden + d->expert_width), tile = TILE * TILE;
    const int64_t rows = RIGHT * (3 * d->expert_width + n), solve = dense ? tile : rows;
    return act > solve ? act : solve;
}

size_t moec__ridge_bytes(const moec_model *m, int64_t n)
{
    const moec_dims *d = &m->dims;
    const size_t H = (size_t)d->hidden, I = (size_t)d->expert_width, t = (size_t)n;
    const bool dense = d->expert_width <= DENSE_GUESS;
    return sizeof(float) * (4 * H * I + t * (H + I + 2)) + sizeof(double) * (2 * t + (dense ? 2 * I * I + H * I : 0)) +
           sizeof(float) * (size_t)moec_par_threads() * (size_t)room_floats(d, n, dense) + moec__up_bytes(m, n);
}

moec_status moec_repair_ridge(int64_t *taken, moec_repair_task *t, const moec_ridge_opts *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_dims *m = &t->model->dims;
    const size_t n = (size_t)t->n, H = (size_t)m->hidden, I = (size_t)m->expert_width;
    const bool dense = m->expert_width <= o->dense;
    ridge a = {.t = t, .o = o, .hidden = m->hidden, .width = m->expert_width};
    *taken = 0;
    MOEC_TRY(moec__picked_new(&a.k, t->n, err));
    MOEC_TRY(moec__room_new(&a.room, room_floats(m, t->n_fit, dense), err));
    MOEC_TRY(MOEC_NEW(a.values, (size_t)moec__piece_values(t, m->expert_width), err));
    MOEC_TRY(MOEC_NEW(a.biases, (size_t)moec__piece_biases(t), err));
    MOEC_TRY(MOEC_NEW(a.b, n * I, err));
    MOEC_TRY(MOEC_NEW(a.r, n * H, err));
    MOEC_TRY(MOEC_NEW(a.was, n, err));
    MOEC_TRY(MOEC_NEW(a.now, n, err));
    MOEC_TRY(MOEC_NEW(a.change, H * I, err));
    MOEC_TRY(MOEC_NEW(a.gram, dense ? I * I : 0, err));
    MOEC_TRY(MOEC_NEW(a.factor, dense ? I * I : 0, err));
    MOEC_TRY(MOEC_NEW(a.right, dense ? H * I : 0, err));
    if (o->up_steps > 0 && o->up_sweeps > 0)
        MOEC_TRY(moec__up_new(&a.up, t, m->expert_width <= 2 * m->hidden, err));
    for (int s = 0; s < o->sweeps; s++) {
        a.with_up = a.up && s < o->up_sweeps;
        for (int64_t i = 0; i < t->n_keep; i++)
            MOEC_TRY(visit(taken, &a, t->keep[i], err));
    }
done:
    moec_free(a.values);
    moec_free(a.biases);
    moec_free(a.b);
    moec_free(a.r);
    moec_free(a.was);
    moec_free(a.now);
    moec_free(a.change);
    moec_free(a.gram);
    moec_free(a.factor);
    moec_free(a.right);
    moec_free(a.room.store);
    moec__up_free(a.up);
    moec__picked_release(&a.k);
    return st;
}
