/* Hessians of matrices from their inputs, and the rounding of one linear or feed-forward part. */
#include "base/mem.h"
#include "base/par.h"
#include "method/nested.h"
#include "num/grid.h"
#include "num/linalg.h"
#include "num/product.h"
#include "num/vec.h"
#include "run/quantize_parts.h"

#include <math.h>
#include <string.h>

enum { BLOCK = 256, STRIPE = 256, SOME_ROWS = 256 };

static int64_t larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* --- inputs ---------------------------------------------------------------------------------------------------------- */

typedef struct stripes {
    double *c;
    const float *x;
    int64_t rows, n;
    moec_compute compute;
} stripes;

/* Rows [lo, hi) of stripes. */
static moec_status gram_stripe(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const stripes *a = ctx;
    moec_status st = MOEC_OK;
    float *part = NULL;
    (void)worker;
    MOEC_TRY(MOEC_NEW(part, (size_t)(STRIPE * a->n), err));
    for (int64_t s = lo; s < hi; s++) {
        const int64_t r = s * STRIPE, h = a->n - r < STRIPE ? a->n - r : STRIPE, cols = r + h;
        for (int64_t i = r; i < r + h; i++)
            memset(a->c + i * a->n, 0, (size_t)cols * sizeof *a->c);
        for (int64_t t = 0; t < a->rows; t += BLOCK) {
            const int64_t k = a->rows - t < BLOCK ? a->rows - t : BLOCK;
            const float *x = a->x + t * a->n;
            moec_product(a->compute, true, false, h, cols, k, x + r, a->n, x, a->n, false, part, cols);
            for (int64_t i = 0; i < h; i++)
                for (int64_t j = 0; j < cols; j++)
                    a->c[(r + i) * a->n + j] += (double)part[i * cols + j];
        }
    }
done:
    moec_free(part);
    return st;
}

moec_status moec__qfit_gram(double *c, const float *x, int64_t rows, int64_t n, moec_compute compute, moec_err *err)
{
    stripes a = {c, x, rows, n, compute};
    return moec_par_for((n + STRIPE - 1) / STRIPE, 1, gram_stripe, &a, err);
}

/* --- one matrix ------------------------------------------------------------------------------------------------------ */

static moec_status put(const moec_qrun *u, const moec_qjob *j, const moec_qcodes *c, const float *back, moec_err *err)
{
    void *piece[MOEC_PIECES] = {NULL};
    if (j->to.of)
        return moec_weight_write(&j->to, back, c->cols, 0, c->rows, 0, c->cols, err);
    for (int i = 0; i < MOEC_PIECES && j->piece[i]; i++)
        piece[i] = (void *)(uintptr_t)j->piece[i]->data;
    u->format->write(piece, c);
    for (int i = 0; i < MOEC_PIECES && j->piece[i]; i++)
        moec_pages_drop(j->piece[i]->data, j->piece[i]->bytes);
    return MOEC_OK;
}

/* tr(W H W^T) = sum over i of w_i (2 sum_{j<i} H_ij w_j + H_ii w_i), of many rows by SOME_ROWS or more: a report's share needs no more.
 * h: lower triangle. */
static moec_status energy(double *out, const moec_qrun *u, const double *h, const float *w, int64_t rows, int64_t n, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t step = rows < SOME_ROWS ? 1 : rows / SOME_ROWS, some = (rows + step - 1) / step;
    float *part = NULL, *y = NULL;
    double sum = 0.0;
    MOEC_TRY(MOEC_NEW(part, (size_t)(STRIPE * n), err));
    MOEC_TRY(MOEC_NEW(y, (size_t)(some * STRIPE), err));
    for (int64_t lo = 0, hi; lo < n; lo = hi) {
        hi = lo + STRIPE < n ? lo + STRIPE : n;
        for (int64_t i = lo; i < hi; i++) {
            float *row = part + (i - lo) * hi;
            for (int64_t j = 0; j < i; j++)
                row[j] = (float)h[i * n + j];
            row[i] = (float)(h[i * n + i] / 2.0);
            memset(row + i + 1, 0, (size_t)(hi - i - 1) * sizeof *row);
        }
        moec_product(u->o->compute, false, true, some, hi - lo, hi, w, step * n, part, hi, false, y, hi - lo);
        for (int64_t r = 0; r < some; r++)
            sum += (double)moec_sdot(y + r * (hi - lo), w + r * step * n + lo, hi - lo);
    }
    *out = some > 0 ? 2.0 * sum * (double)rows / (double)some : 0.0;
done:
    moec_free(part);
    moec_free(y);
    return st;
}

/* moec_gptq_new in the mode of the run. */
static moec_status new_factor(moec_gptq **out, const moec_qrun *u, const double *h, int64_t n, moec_err *err)
{
    moec_gptq_opts opts = u->o->gptq;
    opts.compute = u->o->compute;
    return moec_gptq_new(out, h, n, &opts, err);
}

/* By what a matrix is rounded: g and the h that it is of (GPTQ), importance alone, or neither. */
typedef struct metric {
    const moec_gptq *g;
    const double *h;
    const float *importance;
} metric;

/* Whether all codes are those of rounding to nearest with the scales that c has. */
static bool all_nearest(const moec_qcodes *c, const float *w)
{
    const int64_t n = c->grid.group, groups = c->rows * (c->cols / n);
    const float top = (float)((1 << c->grid.bits) - 1);
    uint8_t code[BLOCK];
    for (int64_t k = 0; k < groups; k++)
        for (int64_t i = 0; i < n; i += BLOCK) {
            const int64_t at = k * n + i, some = n - i < BLOCK ? n - i : BLOCK;
            moec_grid_codes(code, w + at, some, c->scale[k], moec_quant_zero(c, k), top);
            if (memcmp(code, c->code + at, (size_t)some) != 0)
                return false;
        }
    return true;
}

/* Rounds w; leaves what it became in back, as the output has it. */
static moec_status round_matrix(const moec_qrun *u, moec_qjob *j, const float *w, const metric *by, float *back, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t rows = j->q->source->rows, cols = j->q->source->cols;
    const moec_rounding how = u->o->rounding;
    moec_qcodes c = {0};
    bool better = false; /* than rounding to nearest */
    j->loss = j->nearest = j->whole = NAN;
    if (u->format->nested) {
        MOEC_TRY(moec_nested_new(&c, &j->q->grid, rows, cols, err));
        MOEC_TRY(moec_nested_round(&c, &j->loss, &j->nearest, w, how, by->g, by->importance, err));
        if (by->g)
            MOEC_TRY(energy(&j->whole, u, by->h, w, rows, cols, err));
        better = j->loss < j->nearest;
        goto rounded;
    }
    MOEC_TRY(moec_qcodes_new(&c, &j->q->grid, rows, cols, err));
    MOEC_TRY(moec_quant_range(&c, w, how == MOEC_ROUND_NEAREST ? MOEC_QRANGE_MINMAX : MOEC_QRANGE_CLIP,
                              by->g ? moec_gptq_importance(by->g) : by->importance, 0, rows, err));
    if (by->g) {
        MOEC_TRY(moec_gptq_round(&c, &j->loss, u->o->losses ? &j->nearest : NULL, by->g, w, err));
        MOEC_TRY(energy(&j->whole, u, by->h, w, rows, cols, err));
        better = !all_nearest(&c, w);
    } else {
        moec_quant_nearest(&c, w, 0, rows);
    }
rounded:
    j->way = by->g ? (better ? MOEC_QWAY_GPTQ : MOEC_QWAY_CLIP) : how == MOEC_ROUND_NEAREST ? MOEC_QWAY_NEAREST : MOEC_QWAY_CLIP;
    moec_quant_restore(back, &c, 0, rows);
    MOEC_TRY(put(u, j, &c, back, err));
    if (j->to.of) { /* rounded once more, to the output's type */
        moec_weight_read(back, cols, &j->to, 0, rows, 0, cols);
        moec_weight_drop(&j->to);
    }
done:
    moec_qcodes_release(&c);
    return st == MOEC_OK ? st : moec_within(err, st, "%s", j->q->source->of->name);
}

/* --- one linear part ------------------------------------------------------------------------------------------------- */

typedef struct slabs {
    const moec_qrun *u;
    moec_qjob *const *job;
    const metric *by;
} slabs;

/* Job by job: their rows are rounded apart from each other, but what is written is whole matrices. */
static moec_status round_jobs(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const slabs *a = ctx;
    moec_status st = MOEC_OK;
    float *w = NULL, *back = NULL;
    (void)worker;
    for (int64_t i = lo; i < hi; i++) {
        const moec_weight *from = a->job[i]->q->source;
        const size_t n = (size_t)(from->rows * from->cols);
        MOEC_TRY(MOEC_NEW(w, n, err));
        MOEC_TRY(MOEC_NEW(back, n, err));
        MOEC_TRY(moec_weight_read_all(w, from, err));
        MOEC_TRY(round_matrix(a->u, a->job[i], w, a->by, back, err));
        moec_free(w);
        moec_free(back);
        w = back = NULL;
    }
done:
    moec_free(w);
    moec_free(back);
    return st;
}

static void diagonal(float *out, const double *h, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = (float)h[i * n + i];
}

moec_status moec__qfit_linear(moec_qrun *u, moec_qjob *const *job, int jobs, const float *x, int64_t cols, moec_err *err)
{
    moec_status st = MOEC_OK;
    double *h = NULL;
    float *importance = NULL;
    moec_gptq *g = NULL;
    if (x && u->o->rounding != MOEC_ROUND_NEAREST) {
        MOEC_TRY(MOEC_NEW(h, (size_t)(cols * cols), err));
        MOEC_TRY(moec__qfit_gram(h, x, u->n, cols, u->o->compute, err));
        moec_gptq_blend(h, (double)u->n, u->n, NULL, 0.0, cols);
        if (u->o->rounding == MOEC_ROUND_GPTQ) {
            MOEC_TRY(new_factor(&g, u, h, cols, err));
        } else {
            MOEC_TRY(MOEC_NEW(importance, (size_t)cols, err));
            diagonal(importance, h, cols);
        }
    }
    for (int i = 0; i < jobs; i++)
        job[i]->tokens = x ? u->n : 0;
    const metric by = {g, h, importance};
    slabs a = {u, job, &by};
    MOEC_TRY(moec_par_for(jobs, 1, round_jobs, &a, err));
done:
    moec_gptq_free(g);
    moec_free(h);
    moec_free(importance);
    return st;
}

/* --- one feed-forward part ------------------------------------------------------------------------------------------- */

/* Room of one worker, kept from expert to expert. */
struct moec_qbench {
    int64_t width;        /* I that there is room for */
    float *w[3], *back[3];
    /* With tokens: */
    float *x, *act, *up;  /* [BLOCK,H] [BLOCK,I] [BLOCK,I] */
    float *bias, *importance;
    double *h, *layer;    /* [max(H,I)^2] [I,I] */
    moec_gptq *g[2];      /* of `columns` columns: what gate and up, and what down was rounded by */
    int64_t columns[2];
    /* With the original's inputs: these, what its expert makes of them, and what gate and up or down are to be. */
    float *x_o, *act_o, *up_o, *target[2];
};

static void bench_free(moec_qbench *b)
{
    if (!b)
        return;
    for (int k = 0; k < 3; k++) {
        moec_free(b->w[k]);
        moec_free(b->back[k]);
    }
    void *const all[] = {b->x, b->act, b->up, b->bias, b->importance, b->h, b->layer,
                         b->x_o, b->act_o, b->up_o, b->target[0], b->target[1]};
    for (size_t i = 0; i < MOEC_COUNT(all); i++)
        moec_free(all[i]);
    moec_gptq_free(b->g[0]);
    moec_gptq_free(b->g[1]);
    moec_free(b);
}

static moec_status bench_new(moec_qbench **out, int64_t H, int64_t I, bool tokens, bool original, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t most = larger(H, I);
    moec_qbench *b = NULL;
    MOEC_TRY(MOEC_NEW(b, 1, err));
    b->width = I;
    for (int k = 0; k < 3; k++) {
        MOEC_TRY(MOEC_NEW(b->w[k], (size_t)(H * I), err));
        MOEC_TRY(MOEC_NEW(b->back[k], (size_t)(H * I), err));
    }
    if (tokens) {
        MOEC_TRY(MOEC_NEW(b->x, (size_t)(BLOCK * H), err));
        MOEC_TRY(MOEC_NEW(b->act, (size_t)(BLOCK * I), err));
        MOEC_TRY(MOEC_NEW(b->up, (size_t)(BLOCK * I), err));
        MOEC_TRY(MOEC_NEW(b->bias, (size_t)(2 * I), err));
        MOEC_TRY(MOEC_NEW(b->importance, (size_t)most, err));
        MOEC_TRY(MOEC_NEW(b->h, (size_t)(most * most), err));
        MOEC_TRY(MOEC_NEW(b->layer, (size_t)(I * I), err));
    }
    if (tokens && original) {
        MOEC_TRY(MOEC_NEW(b->x_o, (size_t)(BLOCK * H), err));
        MOEC_TRY(MOEC_NEW(b->act_o, (size_t)(BLOCK * I), err));
        MOEC_TRY(MOEC_NEW(b->up_o, (size_t)(BLOCK * I), err));
        MOEC_TRY(MOEC_NEW(b->target[0], (size_t)(H * I), err));
        MOEC_TRY(MOEC_NEW(b->target[1], (size_t)(H * I), err));
    }
    *out = b;
    b = NULL;
done:
    bench_free(b);
    return st;
}

/* This worker's, with room for such a part. */
static moec_status bench_of(moec_qbench **out, moec_qrun *u, int worker, int64_t I, bool tokens, bool original, moec_err *err)
{
    moec_qbench **b = &u->bench[worker];
    if (*b && ((*b)->width < I || (tokens && !(*b)->x) || (original && !(*b)->x_o))) {
        bench_free(*b);
        *b = NULL;
    }
    moec_status st = *b ? MOEC_OK : bench_new(b, u->m->dims.hidden, I, tokens, original, err);
    *out = *b;
    return st;
}

moec_status moec__qfit_begin(moec_qrun *u, moec_err *err)
{
    return MOEC_NEW(u->bench, (size_t)moec_par_threads(), err);
}

void moec__qfit_end(moec_qrun *u)
{
    for (int i = 0; u->bench && i < moec_par_threads(); i++)
        bench_free(u->bench[i]);
    moec_free(u->bench);
    u->bench = NULL;
}

static size_t bench_bytes(const moec_qrun *u, size_t I)
{
    const size_t H = (size_t)u->m->dims.hidden, most = H > I ? H : I;
    const size_t always = 6 * H * I * sizeof(float);
    if (u->o->rounding == MOEC_ROUND_NEAREST || !u->o->corpus)
        return always;
    const size_t tokens = (BLOCK * (H + 2 * I) + 2 * I + most) * sizeof(float) + (most * most + I * I) * sizeof(double);
    const size_t factors = u->o->rounding == MOEC_ROUND_GPTQ ? 12 * (H * H + I * I) : 0;
    return always + tokens + factors + (u->o->original ? (BLOCK * (H + 2 * I) + 2 * H * I) * sizeof(float) : 0);
}

/* Codes and scales of a matrix, and what gptq.h and energy() say. */
static size_t rounding_bytes(const moec_qrun *u, size_t rows, size_t cols)
{
    const size_t lanes = rows < 1024 ? rows + 64 : 1024, codes = rows * cols + rows * cols / 8;
    if (u->format->nested) /* eight bits at most: nested.h */
        return 8 * codes + 8 * rows * cols + 7 * 1024 * cols;
    const size_t some = rows < 2 * SOME_ROWS ? rows : 2 * SOME_ROWS;
    return codes + (u->o->rounding == MOEC_ROUND_GPTQ ? 16 * cols * lanes + STRIPE * (some + cols) * sizeof(float) : 0);
}

static size_t forward_bytes(const moec_qrun *u, size_t I)
{
    const size_t H = (size_t)u->m->dims.hidden, in = rounding_bytes(u, I, H), down = rounding_bytes(u, H, I);
    return in > down ? in : down;
}

size_t moec__qfit_bytes(const moec_qrun *u, int workers)
{
    const size_t I = (size_t)u->m->dims.expert_width, wide = (size_t)u->wide, threads = (size_t)moec_par_threads();
    const size_t rows = (size_t)u->most_rows, cols = (size_t)u->most_cols;
    size_t most = (size_t)workers * forward_bytes(u, I);
    if (wide > 0 && forward_bytes(u, wide) > most)
        most = forward_bytes(u, wide);
    if (rows > 0) {
        const size_t linear = 20 * cols * cols + threads * (rounding_bytes(u, rows, cols) + 8 * rows * cols);
        most = linear > most ? linear : most;
    }
    return (size_t)workers * bench_bytes(u, I) + (wide > I ? bench_bytes(u, wide) : 0) + most;
}

static void scale_rows(float *x, const float *by, int64_t tokens, int64_t n)
{
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < n; i++)
            x[t * n + i] *= by[t];
}

/* x_o -= x. */
static void take_off(float *x_o, const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        x_o[i] -= x[i];
}

static int64_t row_at(const moec_qrows *r, int64_t i)
{
    return r->token ? r->token[i] : i * (r->step > 1 ? r->step : 1);
}

/* Weight of a token in the Hessian, its root: g^(a/2). Where the weight multiplies the input it is in x. */
static void roots(float *out, const moec_qrun *u, const moec_qrows *r, int64_t at, int64_t n)
{
    for (int64_t t = 0; t < n; t++) {
        const float g = r->gate && !u->m->family->weight_on_input ? r->gate[at + t] : 1.0f;
        out[t] = u->o->weight_power == 2 ? g : u->o->weight_power == 1 ? sqrtf(fmaxf(g, 0.0f)) : 1.0f;
    }
}

static double mass_of(const moec_qrun *u, const moec_qrows *r)
{
    double sum = 0.0;
    float root[BLOCK];
    for (int64_t at = 0; at < r->n; at += BLOCK) {
        const int64_t n = r->n - at < BLOCK ? r->n - at : BLOCK;
        roots(root, u, r, at, n);
        for (int64_t t = 0; t < n; t++)
            sum += (double)root[t] * (double)root[t];
    }
    return sum;
}

static void gather(float *out, const float *from, const moec_qrun *u, const moec_qrows *r, int64_t at, int64_t n, bool routed)
{
    const int64_t H = u->m->dims.hidden;
    const float scale = routed ? (float)u->m->dims.input_scale : 1.0f;
    for (int64_t t = 0; t < n; t++) {
        const float *x = from + row_at(r, at + t) * H;
        const float by = scale * (routed && r->gate && u->m->family->weight_on_input ? r->gate[at + t] : 1.0f);
        for (int64_t i = 0; i < H; i++)
            out[t * H + i] = x[i] * by;
    }
}

/* Sums over the rows' inputs into h. */
static void sum_inputs(const moec_qrun *u, moec_qbench *b, const moec_qrows *r, bool routed)
{
    const int64_t H = u->m->dims.hidden;
    float root[BLOCK];
    for (int64_t at = 0; at < r->n; at += BLOCK) {
        const int64_t n = r->n - at < BLOCK ? r->n - at : BLOCK;
        gather(b->x, r->x, u, r, at, n, routed);
        roots(root, u, r, at, n);
        scale_rows(b->x, root, n, H);
        moec_gram(b->h, H, b->x, H, n, at == 0 ? 0.0 : 1.0, u->o->compute);
    }
}

/* act [n,I] = act(gate x, up x). */
static void activate(const moec_qrun *u, const moec_qbench *b, float *act, float *up, const float *x, float *const w[3], int64_t n,
                     int64_t I, bool biased)
{
    const int64_t H = u->m->dims.hidden;
    moec_product(u->o->compute, false, true, n, I, H, x, H, w[0], H, false, act, I);
    moec_product(u->o->compute, false, true, n, I, H, x, H, w[1], H, false, up, I);
    for (int64_t t = 0; biased && t < n; t++) {
        moec_add(act + t * I, b->bias, I);
        moec_add(up + t * I, b->bias + I, I);
    }
    moec_activate(act, up, n * I, u->m);
}

/* The original's inputs (or activations) of a block in x_o, the quantized one's in x, become their difference, and both get their roots. */
static void differ(float *x_o, float *x, const float *root, int64_t tokens, int64_t n)
{
    take_off(x_o, x, tokens * n);
    scale_rows(x_o, root, tokens, n);
    scale_rows(x, root, tokens, n);
}

/* target [rows,n] += share (x_o W^T)^T x over a block; z [tokens,rows] is lost. */
static void add_lost(const moec_qrun *u, float *target, float *z, const float *x_o, const float *x, const float *w, float share,
                     int64_t tokens, int64_t rows, int64_t n)
{
    moec_product(u->o->compute, false, true, tokens, rows, n, x_o, n, w, n, false, z, rows);
    for (int64_t i = 0; i < tokens * rows; i++)
        z[i] *= share;
    moec_product(u->o->compute, true, false, rows, n, tokens, z, rows, x, n, true, target, n);
}

/* Sums over what down is given, by gate and up as they are now, into h; where the target is the original's, what down loses into
 * target[0], without the factor. `kept`: that is left to the caller, who finds act_o and act as they are in that sum; at most BLOCK rows. */
static void sum_activations(const moec_qrun *u, moec_qbench *b, double *h, const moec_qrows *r, int64_t I, int64_t expert, float share,
                            bool kept)
{
    const bool biased = expert >= 0 && u->l->gate_up_bias;
    const int64_t H = u->m->dims.hidden;
    float root[BLOCK];
    if (biased)
        moec_expert_bias(b->bias, b->bias + I, u->m, u->l, expert);
    for (int64_t at = 0; at < r->n; at += BLOCK) {
        const int64_t n = r->n - at < BLOCK ? r->n - at : BLOCK;
        gather(b->x, r->x, u, r, at, n, expert >= 0);
        activate(u, b, b->act, b->up, b->x, b->back, n, I, biased);
        roots(root, u, r, at, n);
        if (r->other) {
            gather(b->x_o, r->other, u, r, at, n, expert >= 0);
            activate(u, b, b->act_o, b->up_o, b->x_o, b->w, n, I, biased);
            differ(b->act_o, b->act, root, n, I);
            if (!kept)
                add_lost(u, b->target[0], b->x_o, b->act_o, b->act, b->w[2], share, n, H, I);
        } else {
            scale_rows(b->act, root, n, I);
        }
        moec_gram(h, I, b->act, I, n, at == 0 ? 0.0 : 1.0, u->o->compute);
    }
}

/* What a token of the expert counts in the sum that its target goes by: as in moec_gptq_blend, and less where few tokens say where
 * the target lies. Left whole, that correction did harm below some 10 tokens a column. */
static float share_of(double mass, int64_t tokens, int64_t n, bool blended)
{
    const double lambda = !blended || tokens >= 2 * n ? 1.0 : (double)tokens / ((double)tokens + (double)n / 8.0);
    const double sure = (double)tokens / ((double)tokens + 8.0 * (double)n);
    return mass > 0.0 ? (float)(sure * lambda / mass) : 0.0f;
}

/* What rounding needs of h: a factor, which stays the bench's, or the diagonal. */
static moec_status prepare(metric *by, const moec_qrun *u, moec_qbench *b, int which, int64_t n, moec_err *err)
{
    moec_gptq **g = &b->g[which];
    moec_status st = MOEC_OK;
    *by = (metric){.h = b->h};
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(b->h[i * n + i]))
            return moec_fail(err, MOEC_ENUMERIC, "an activation is not finite");
    if (u->o->rounding != MOEC_ROUND_GPTQ) {
        diagonal(b->importance, b->h, n);
        by->importance = b->importance;
        return MOEC_OK;
    }
    if (*g && b->columns[which] == n) {
        st = moec_gptq_renew(*g, b->h, err);
    } else {
        moec_gptq_free(*g);
        st = new_factor(g, u, b->h, n, err);
        b->columns[which] = n;
    }
    by->g = *g;
    return st;
}

/* target[k] = W + share sum (W (x_o - x)) x^T (H + damp)^-1 for gate and up. The factor is applied to tokens or to rows of the sum, which
 * ever are fewer. */
static moec_status aim_in(const moec_qrun *u, moec_qbench *b, moec_qjob *const job[3], const moec_qrows *r, bool routed, float share,
                          const moec_gptq *g, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t H = u->m->dims.hidden;
    int64_t rows = 0;
    float root[BLOCK];
    for (int k = 0; k < 2; k++) {
        if (job[k])
            memset(b->target[k], 0, (size_t)(job[k]->q->source->rows * H) * sizeof *b->target[k]);
        rows += job[k] ? job[k]->q->source->rows : 0;
    }
    const bool by_token = r->n < rows;
    for (int64_t at = 0; at < r->n; at += BLOCK) {
        const int64_t n = r->n - at < BLOCK ? r->n - at : BLOCK;
        gather(b->x, r->x, u, r, at, n, routed);
        gather(b->x_o, r->other, u, r, at, n, routed);
        roots(root, u, r, at, n);
        differ(b->x_o, b->x, root, n, H);
        if (by_token)
            MOEC_TRY(moec_gptq_solve(b->x, g, n, err));
        for (int k = 0; k < 2; k++)
            if (job[k])
                add_lost(u, b->target[k], b->act, b->x_o, b->x, b->w[k], share, n, job[k]->q->source->rows, H);
    }
    for (int k = 0; k < 2; k++) {
        if (job[k] && !by_token)
            MOEC_TRY(moec_gptq_solve(b->target[k], g, job[k]->q->source->rows, err));
        if (job[k])
            moec_add(b->target[k], b->w[k], job[k]->q->source->rows * H);
    }
done:
    return st;
}

/* Gate and up, of one Hessian. */
static moec_status fit_in(moec_qrun *u, moec_qbench *b, moec_qjob *const job[3], int64_t expert, const moec_qrows *r, double mass,
                          bool weighed, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t H = u->m->dims.hidden;
    const double *layer = expert >= 0 ? u->layer_h : NULL;
    const bool aimed = weighed && r->other;
    metric by = {0};
    if (weighed) {
        sum_inputs(u, b, r, expert >= 0);
        moec_gptq_blend(b->h, mass, r->n, layer, (double)u->n, H);
        MOEC_TRY(prepare(&by, u, b, 0, H, err));
    }
    if (aimed)
        MOEC_TRY(aim_in(u, b, job, r, expert >= 0, share_of(mass, r->n, H, layer), by.g, err));
    for (int k = 0; k < 2; k++) {
        if (!job[k])
            continue;
        job[k]->tokens = r->n;
        MOEC_TRY(round_matrix(u, job[k], aimed ? b->target[k] : b->w[k], &by, b->back[k], err));
    }
done:
    return st;
}

static moec_status fit_down(moec_qrun *u, moec_qbench *b, moec_qjob *job, int64_t I, int64_t expert, const moec_qrows *r, double mass,
                            bool weighed, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t H = u->m->dims.hidden, want = I < u->n ? I : u->n;
    const moec_qrows all = {.x = u->x, .n = want, .step = want > 0 ? u->n / want : 1};
    /* An expert of few tokens: what the layer's other tokens would make of it counts, too. */
    const bool lean = expert >= 0 && r->n < 2 * I && want > 0, aimed = weighed && r->other;
    const bool by_token = aimed && r->n <= BLOCK && r->n < H; /* the factor is applied to tokens, not to the rows of their sum */
    const float share = share_of(mass, r->n, I, lean);
    metric by = {0};
    if (aimed)
        memset(b->target[0], 0, (size_t)(H * I) * sizeof *b->target[0]);
    if (weighed) {
        if (lean)
            sum_activations(u, b, b->layer, &all, I, expert, 0.0f, false);
        sum_activations(u, b, b->h, r, I, expert, share, by_token);
        moec_gptq_blend(b->h, mass, r->n, lean ? b->layer : NULL, (double)want, I);
        MOEC_TRY(prepare(&by, u, b, 1, I, err));
    }
    if (aimed) {
        if (by_token) {
            MOEC_TRY(moec_gptq_solve(b->act, by.g, r->n, err));
            add_lost(u, b->target[0], b->x_o, b->act_o, b->act, b->w[2], share, r->n, H, I);
        } else {
            MOEC_TRY(moec_gptq_solve(b->target[0], by.g, H, err));
        }
        moec_add(b->target[0], b->w[2], H * I);
    }
    job->tokens = r->n;
    MOEC_TRY(round_matrix(u, job, aimed ? b->target[0] : b->w[2], &by, b->back[2], err));
done:
    return st;
}

static moec_status fit(moec_qrun *u, moec_qbench *b, moec_qjob *const job[3], const moec_mlp *w, int64_t expert, const moec_qrows *r,
                       bool weighed, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t H = u->m->dims.hidden, I = w->gate.rows;
    const moec_weight *const from[] = {&w->gate, &w->up, &w->down};
    const double mass = weighed ? mass_of(u, r) : 0.0;
    for (int k = 0; k < 3; k++) {
        MOEC_TRY(moec_weight_read_all(b->w[k], from[k], err));
        if (!job[k])
            memcpy(b->back[k], b->w[k], (size_t)(H * I) * sizeof *b->w[k]);
        moec_weight_drop(from[k]);
    }
    if (job[0] || job[1])
        MOEC_TRY(fit_in(u, b, job, expert, r, mass, weighed, err));
    if (job[2])
        MOEC_TRY(fit_down(u, b, job[2], I, expert, r, mass, weighed, err));
done:
    return st;
}

moec_status moec__qfit_mlp(moec_qrun *u, int worker, moec_qjob *const job[3], const moec_mlp *w, int64_t expert, const moec_qrows *rows,
                           moec_err *err)
{
    moec_qbench *b;
    const bool weighed = rows && u->o->rounding != MOEC_ROUND_NEAREST;
    const moec_qrows none = {.n = 0};
    moec_status st = bench_of(&b, u, worker, w->gate.rows, weighed, weighed && rows->other, err);
    return st == MOEC_OK ? fit(u, b, job, w, expert, rows ? rows : &none, weighed, err) : st;
}
