/* The closed-form step on an expert's up projection: see moec_repair_ridge. In coordinates in which the problem's matrix has a
 * diagonal of about 1, few steps of conjugate gradients do: inputs are whitened by the layer's covariance, and each neuron is
 * scaled by what it moves. */
#include "method/repair_parts.h"

#include "base/mem.h"
#include "base/par.h"
#include "num/linalg.h"

#include <math.h>
#include <string.h>

enum {
    TILE = 192,   /* of the covariance, and columns of a gradient */
    ROWS = 384,   /* of a gradient */
    DEPTH = 1024, /* tokens that are summed in float32 */
    SOLVED = 128, /* right-hand sides that one thread takes at a time */
    BAND = 64
};
static const double FLOOR = 1e-2; /* of the mean diagonal, of the covariance and of the neurons' scales */

struct moec_up {
    const moec_repair_task *t;
    const moec_piece *p;
    const moec_tokens *k;
    const float *r;       /* [n,H] */
    int64_t hidden, width;
    double *cov, *inverse; /* [H,H] while the inputs are whitened */
    float *turn;          /* [H,H] W, lower triangle: W W^T = covariance^-1 */
    float *white;         /* [n_fit,H] W^T x */
    float *slope, *v;     /* [n,I] */
    float *scale;         /* [I] of the neurons' coordinates */
    float *square;        /* [I,I] D^T D, or NULL: D and D^T are applied one after the other */
    float *x, *res, *dir, *image; /* [I,H] of conjugate gradients */
    double *dot;          /* [I] */
    moec_room room;
};

static int64_t tiles(int64_t n, int64_t of)
{
    return (n + of - 1) / of;
}

static int64_t edge(int64_t at, int64_t n, int64_t of)
{
    return n - at < of ? n - at : of;
}

/* --- whitening ------------------------------------------------------------------------------------------------------------- */

/* Tiles of sum_t w_t x_t x_t^T on and above the diagonal, with their mirror images. */
static moec_status sum_tiles(void *ctx, int worker, int64_t from, int64_t to, moec_err *err)
{
    const moec_up *u = ctx;
    const moec_repair_task *t = u->t;
    const int64_t H = u->hidden, wide = tiles(H, TILE);
    float *part = moec__room_of(&u->room, worker), *strip = part + TILE * TILE;
    for (int64_t k = from; k < to; k++) {
        const int64_t i = k / wide * TILE, j = k % wide * TILE, rows = edge(i, H, TILE), cols = edge(j, H, TILE);
        for (int64_t at = 0; i <= j && at < t->n_fit; at += DEPTH) {
            const int64_t m = edge(at, t->n_fit, DEPTH);
            for (int64_t s = 0; s < m; s++)
                for (int64_t c = 0; c < rows; c++)
                    strip[s * rows + c] = t->weight[at + s] * t->x[(at + s) * H + i + c];
            moec_sgemm(true, false, rows, cols, m, 1.0f, strip, rows, t->x + at * H + j, H, 0.0f, part, cols);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t c = 0; c < cols; c++)
                    u->cov[(i + r) * H + j + c] += (double)part[r * cols + c];
        }
        for (int64_t r = i; i <= j && r < i + rows; r++)
            for (int64_t c = j; c < j + cols; c++)
                u->cov[c * H + r] = u->cov[r * H + c];
    }
    return moec_interrupted(err);
}

static moec_status invert_rows(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const moec_up *u = ctx;
    (void)worker;
    for (int64_t i = lo; i < hi; i++)
        u->inverse[i * u->hidden + i] = 1.0;
    moec_cholesky_solve(u->inverse + lo * u->hidden, u->cov, u->hidden, hi - lo);
    return moec_interrupted(err);
}

static moec_status whiten_rows(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const moec_up *u = ctx;
    const int64_t H = u->hidden;
    (void)worker;
    for (int64_t j = 0; j < H; j += TILE) /* above j the columns are 0 */
        moec_sgemm(false, false, hi - lo, edge(j, H, TILE), H - j, 1.0f, u->t->x + lo * H + j, H, u->turn + j * H + j, H, 0.0f,
                   u->white + lo * H + j, H);
    return moec_interrupted(err);
}

/* False: the covariance is 0 or not finite. */
static moec_status whiten(bool *ok, moec_up *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t H = u->hidden, wide = tiles(H, TILE);
    double mean = 0.0, weight = 0.0;
    *ok = false;
    MOEC_TRY(moec_par_for(wide * wide, 1, sum_tiles, u, err));
    for (int64_t t = 0; t < u->t->n_fit; t++)
        weight += (double)u->t->weight[t];
    for (int64_t i = 0; i < H; i++)
        mean += u->cov[i * H + i] / weight / (double)H;
    if (!(mean > 0.0) || !isfinite(mean))
        goto done;
    for (int64_t i = 0; i < H; i++)
        for (int64_t j = 0; j < H; j++)
            u->cov[i * H + j] = u->cov[i * H + j] / weight + (i == j ? FLOOR * mean : 0.0);
    if (!moec_cholesky(u->cov, H))
        goto done;
    MOEC_TRY(moec_par_for(H, SOLVED, invert_rows, u, err));
    if (!moec_cholesky(u->inverse, H))
        goto done;
    for (int64_t i = 0; i < H; i++)
        for (int64_t j = 0; j <= i; j++)
            u->turn[i * H + j] = (float)u->inverse[i * H + j];
    MOEC_TRY(moec_par_for(u->t->n_fit, MOEC_REPAIR_BLOCK, whiten_rows, u, err));
    *ok = true;
done:
    return st;
}

/* --- the matrix ------------------------------------------------------------------------------------------------------------ */

/* y[i] *= slope scale, rows lo.. of the expert's tokens. */
static void scale_rows(const moec_up *u, float *y, int64_t lo, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < u->width; j++)
            y[i * u->width + j] *= u->slope[(lo + i) * u->width + j] * u->scale[j];
}

/* v = S D^T r of tokens [lo, hi), S their slopes in the neurons' coordinates. */
static moec_status look_back(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const moec_up *u = ctx;
    float *v = u->v + lo * u->width;
    (void)worker;
    moec_sgemm(false, false, hi - lo, u->width, u->hidden, 1.0f, u->r + lo * u->hidden, u->hidden, u->p->down, u->width, 0.0f, v,
               u->width);
    scale_rows(u, v, lo, hi - lo);
    return moec_interrupted(err);
}

/* v = S D^T D S (direction x'). */
static moec_status push(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const moec_up *u = ctx;
    const int64_t H = u->hidden, I = u->width, n = hi - lo;
    float *x = moec__room_of(&u->room, worker), *y = x + MOEC_REPAIR_BLOCK * H, *v = u->v + lo * I;
    moec__piece_input(x, u->white, u->t, u->k->token + lo, u->k->gate + lo, n);
    moec_sgemm(false, true, n, I, H, 1.0f, x, H, u->dir, H, 0.0f, y, I);
    scale_rows(u, y, lo, n);
    if (u->square) {
        moec_sgemm(false, false, n, I, I, 1.0f, y, I, u->square, I, 0.0f, v, I);
    } else {
        moec_sgemm(false, true, n, H, I, 1.0f, y, I, u->p->down, I, 0.0f, x, H);
        moec_sgemm(false, false, n, I, H, 1.0f, x, H, u->p->down, I, 0.0f, v, I);
    }
    scale_rows(u, v, lo, n);
    return moec_interrupted(err);
}

/* Tiles of image = sum_t v_t x'_t^T. */
static moec_status pull(void *ctx, int worker, int64_t from, int64_t to, moec_err *err)
{
    const moec_up *u = ctx;
    const int64_t H = u->hidden, I = u->width, wide = tiles(H, TILE), n = u->k->n_fit;
    float *strip = moec__room_of(&u->room, worker);
    for (int64_t k = from; k < to; k++) {
        const int64_t i = k / wide * ROWS, j = k % wide * TILE, rows = edge(i, I, ROWS), cols = edge(j, H, TILE);
        for (int64_t at = 0; at < n; at += DEPTH) {
            const int64_t m = edge(at, n, DEPTH);
            for (int64_t s = 0; s < m; s++) {
                memcpy(strip + s * cols, u->white + u->k->token[at + s] * H + j, (size_t)cols * sizeof *strip);
                for (int64_t c = 0; u->t->model->family->weight_on_input && c < cols; c++)
                    strip[s * cols + c] *= u->k->gate[at + s];
            }
            moec_sgemm(true, false, rows, cols, m, 1.0f, u->v + at * I + i, I, strip, cols, at > 0 ? 1.0f : 0.0f,
                       u->image + i * H + j, H);
        }
    }
    return moec_interrupted(err);
}

static moec_status pull_all(moec_up *u, moec_err *err)
{
    return moec_par_for(tiles(u->width, ROWS) * tiles(u->hidden, TILE), 1, pull, u, err);
}

/* Columns of D^T D. */
static moec_status square_rows(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const moec_up *u = ctx;
    (void)worker;
    moec_sgemm(true, false, hi - lo, u->width, u->hidden, 1.0f, u->p->down + lo, u->width, u->p->down, u->width, 0.0f,
               u->square + lo * u->width, u->width);
    return moec_interrupted(err);
}

/* dot[i] = |D_i|^2 sum_t slope_ti^2, the diagonal of the problem for inputs of covariance 1. */
static moec_status diagonal(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const moec_up *u = ctx;
    double slope[BAND] = {0}, down[BAND] = {0};
    (void)worker;
    for (int64_t t = 0; t < u->k->n_fit; t++)
        for (int64_t i = lo; i < hi; i++)
            slope[i - lo] += (double)u->slope[t * u->width + i] * (double)u->slope[t * u->width + i];
    for (int64_t h = 0; h < u->hidden; h++)
        for (int64_t i = lo; i < hi; i++)
            down[i - lo] += (double)u->p->down[h * u->width + i] * (double)u->p->down[h * u->width + i];
    for (int64_t i = lo; i < hi; i++)
        u->dot[i] = slope[i - lo] * down[i - lo];
    return moec_interrupted(err);
}

static double total(const moec_up *u)
{
    double sum = 0.0;
    for (int64_t i = 0; i < u->width; i++)
        sum += u->dot[i];
    return sum;
}

/* --- conjugate gradients --------------------------------------------------------------------------------------------------- */

typedef struct row_step {
    moec_up *u;
    float factor;
} row_step;

/* dot = direction . image, the penalty added to the image before. */
static moec_status curvature(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const row_step *a = ctx;
    moec_up *u = a->u;
    const int64_t H = u->hidden;
    (void)worker;
    (void)err;
    for (int64_t i = lo; i < hi; i++) {
        moec_saxpy(u->image + i * H, a->factor, u->dir + i * H, H);
        u->dot[i] = (double)moec_sdot(u->dir + i * H, u->image + i * H, H);
    }
    return MOEC_OK;
}

static moec_status advance(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const row_step *a = ctx;
    moec_up *u = a->u;
    const int64_t H = u->hidden;
    (void)worker;
    (void)err;
    for (int64_t i = lo; i < hi; i++) {
        moec_saxpy(u->x + i * H, a->factor, u->dir + i * H, H);
        moec_saxpy(u->res + i * H, -a->factor, u->image + i * H, H);
        u->dot[i] = moec_sum_sq(u->res + i * H, H);
    }
    return MOEC_OK;
}

static moec_status turn_direction(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const row_step *a = ctx;
    moec_up *u = a->u;
    (void)worker;
    (void)err;
    for (int64_t i = lo * u->hidden; i < hi * u->hidden; i++)
        u->dir[i] = u->res[i] + a->factor * u->dir[i];
    return MOEC_OK;
}

static moec_status solve(moec_up *u, double lambda, int steps, moec_err *err)
{
    moec_status st = MOEC_OK;
    const size_t bytes = (size_t)(u->width * u->hidden) * sizeof(float);
    double rr = 0.0, first;
    MOEC_TRY(pull_all(u, err));
    memset(u->x, 0, bytes);
    memcpy(u->res, u->image, bytes);
    memcpy(u->dir, u->image, bytes);
    for (int64_t i = 0; i < u->width; i++)
        rr += moec_sum_sq(u->res + i * u->hidden, u->hidden);
    first = rr;
    for (int s = 0; s < steps && rr > 1e-12 * first; s++) {
        MOEC_TRY(moec_par_for(u->k->n_fit, MOEC_REPAIR_BLOCK, push, u, err));
        MOEC_TRY(pull_all(u, err));
        row_step a = {u, (float)lambda};
        MOEC_TRY(moec_par_for(u->width, BAND, curvature, &a, err));
        const double curve = total(u);
        if (!(curve > 0.0))
            break;
        a.factor = (float)(rr / curve);
        MOEC_TRY(moec_par_for(u->width, BAND, advance, &a, err));
        a.factor = (float)(total(u) / rr);
        rr = total(u);
        MOEC_TRY(moec_par_for(u->width, BAND, turn_direction, &a, err));
    }
done:
    return st;
}

/* --- in and out ------------------------------------------------------------------------------------------------------------- */

typedef struct going_back {
    const moec_up *u;
    float *change;
} going_back;

/* Rows of the change in the coordinates of the weights. */
static moec_status change_rows(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const going_back *a = ctx;
    const moec_up *u = a->u;
    const int64_t H = u->hidden;
    (void)worker;
    for (int64_t j = 0; j < H; j += TILE) {
        const int64_t cols = edge(j, H, TILE);
        moec_sgemm(false, true, hi - lo, cols, j + cols, 1.0f, u->x + lo * H, H, u->turn + j * H, H, 0.0f, a->change + lo * H + j,
                   H);
    }
    for (int64_t i = lo; i < hi; i++)
        for (int64_t j = 0; j < H; j++)
            a->change[i * H + j] *= u->scale[i];
    return moec_interrupted(err);
}

moec_status moec__up_solve(bool *ok, float *change, moec_up *u, const moec_piece *p, const moec_tokens *k, const float *r,
                           double lambda, int steps, moec_err *err)
{
    moec_status st = MOEC_OK;
    going_back back = {u, change};
    *ok = false;
    u->p = p;
    u->k = k;
    u->r = r;
    MOEC_TRY(moec_par_for(u->width, BAND, diagonal, u, err));
    const double mean = total(u) / (double)u->width;
    if (!(mean > 0.0) || !isfinite(mean))
        goto done;
    for (int64_t i = 0; i < u->width; i++)
        u->scale[i] = (float)(1.0 / sqrt(u->dot[i] + FLOOR * mean));
    if (u->square)
        MOEC_TRY(moec_par_for(u->width, BAND, square_rows, u, err));
    MOEC_TRY(moec_par_for(k->n_fit, MOEC_REPAIR_BLOCK, look_back, u, err));
    MOEC_TRY(solve(u, lambda, steps, err));
    MOEC_TRY(moec_par_for(u->width, BAND, change_rows, &back, err));
    *ok = true;
done:
    return st;
}

float *moec__up_slope(const moec_up *u)
{
    return u->slope;
}

float *moec__up_moved(const moec_up *u)
{
    return u->v;
}

static int64_t room_floats(const moec_dims *d)
{
    const int64_t block = MOEC_REPAIR_BLOCK * (d->hidden + d->expert_width), tile = TILE * (TILE + DEPTH);
    return block > tile ? block : tile;
}

size_t moec__up_bytes(const moec_model *m, int64_t n)
{
    const moec_dims *d = &m->dims;
    const size_t H = (size_t)d->hidden, I = (size_t)d->expert_width, t = (size_t)n;
    return sizeof(float) * (t * (H + 2 * I) + H * H + 4 * H * I + (I <= 2 * H ? I * I : 0) + 3 * I) + sizeof(double) * 2 * H * H +
           sizeof(float) * (size_t)moec_par_threads() * (size_t)room_floats(d);
}

moec_status moec__up_new(moec_up **out, const moec_repair_task *t, bool square, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_dims *d = &t->model->dims;
    const size_t H = (size_t)d->hidden, I = (size_t)d->expert_width, n = (size_t)t->n;
    moec_up *u = NULL;
    bool ok;
    *out = NULL;
    MOEC_TRY(MOEC_NEW(u, 1, err));
    u->t = t;
    u->hidden = d->hidden;
    u->width = d->expert_width;
    MOEC_TRY(moec__room_new(&u->room, room_floats(d), err));
    MOEC_TRY(MOEC_NEW(u->cov, H * H, err));
    MOEC_TRY(MOEC_NEW(u->inverse, H * H, err));
    MOEC_TRY(MOEC_NEW(u->turn, H * H, err));
    MOEC_TRY(MOEC_NEW(u->white, (size_t)t->n_fit * H, err));
    MOEC_TRY(whiten(&ok, u, err));
    if (!ok)
        goto done;
    moec_free(u->cov);
    moec_free(u->inverse);
    u->cov = u->inverse = NULL;
    MOEC_TRY(MOEC_NEW(u->slope, n * I, err));
    MOEC_TRY(MOEC_NEW(u->v, n * I, err));
    MOEC_TRY(MOEC_NEW(u->scale, I, err));
    MOEC_TRY(MOEC_NEW(u->square, square ? I * I : 0, err));
    MOEC_TRY(MOEC_NEW(u->x, I * H, err));
    MOEC_TRY(MOEC_NEW(u->res, I * H, err));
    MOEC_TRY(MOEC_NEW(u->dir, I * H, err));
    MOEC_TRY(MOEC_NEW(u->image, I * H, err));
    MOEC_TRY(MOEC_NEW(u->dot, I, err));
    *out = u;
    u = NULL;
done:
    moec__up_free(u);
    return st;
}

void moec__up_free(moec_up *u)
{
    if (!u)
        return;
    moec_free(u->cov);
    moec_free(u->inverse);
    moec_free(u->turn);
    moec_free(u->white);
    moec_free(u->slope);
    moec_free(u->v);
    moec_free(u->scale);
    moec_free(u->square);
    moec_free(u->x);
    moec_free(u->res);
    moec_free(u->dir);
    moec_free(u->image);
    moec_free(u->dot);
    moec_free(u->room.store);
    moec_free(u);
}
