/* One gradient step of a block of experts: forward and back through a batch by hand, and Adam, all in a few parallel loops
 * over pieces of fixed size, so that any number of threads adds in the same order.
 *
 *   rows    one for each token of the batch and piece that it selects, piece by piece, tokens ascending by place in the batch
 *   g, u    gate x, up x of a row; then what the loss changes by for them
 *   a       act(g, u);   f: down a; then what the loss changes by for f
 *   e       what a token is still missing, times -2 scale w: what the loss changes by for its output r
 *   q       what the loss changes by for the weight of a row; dz: for the logits of a token's kept experts */
#include "method/repair_parts.h"

#include "base/mem.h"
#include "base/par.h"
#include "num/linalg.h"

#include <math.h>
#include <string.h>

enum {
    NEURONS = 128, /* neurons, or rows of a matrix, that one thread takes at a time */
    ROWS = 64,     /* rows of a batch */
    TOKENS = 32,
    MATRICES = 3   /* of a piece */
};

struct moec_fit {
    const moec_repair_task *t;
    moec_piece *piece;
    int64_t pieces, width, most_pieces, most_width, most_batch;
    float *values, *moments, *biases; /* [most_values] [2, most_values] */
    int64_t n_values, most_values;
    moec_fit_matrix *matrix;          /* [MATRICES * most_pieces + 1] gate, up, down of each piece; the router */
    int64_t matrices;
    float *router;                    /* [K,H] in values, or NULL */
    int32_t *piece_of, *kept_of;      /* [E] numbers in the block and in task.keep; -1: none */
    float *rms;
    /* of a batch */
    const float *z;
    const int32_t *token;
    int64_t n, rows;
    int32_t *ids;                     /* [batch,slots] */
    float *gates;
    int32_t *row_of;                  /* [batch,slots] -1: none */
    int64_t *first;                   /* [most_pieces + 1] rows of a piece */
    int32_t *at;                      /* [rows] place in the batch */
    float *gate, *q;                  /* [rows] */
    float *x, *f;                     /* [rows,H] */
    float *g, *u, *a;                 /* [rows,width] */
    float *xb, *e, *score, *dz;       /* [batch,H] [batch,H] [batch,K] [batch,K] */
    double *loss;                     /* [batch] */
    double scale;
    float *grad;
    const moec_adam_factors *factors;
    moec_room room;
};

bool moec__fit_can_route(const moec_repair_task *t)
{
    const moec_family *y = t->model->family;
    return t->router.of && t->model->dims.null_experts == 0 &&
           (y->choice == MOEC_CHOOSE_TOP_K || y->choice == MOEC_CHOOSE_TOP_K_SOFTMAX) &&
           (y->score == MOEC_SCORE_SOFTMAX || y->score == MOEC_SCORE_SIGMOID);
}

/* --- memory --------------------------------------------------------------------------------------------------------------- */

static int64_t most_rows(int64_t slots, int64_t pieces, int64_t batch)
{
    return batch * (slots < pieces ? slots : pieces);
}

static int64_t max2(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* A thread's scratch: a band of a gradient; scores of all experts and logits of the kept ones for some tokens. */
static int64_t room_floats(const moec_dims *d, int64_t keep, int64_t width)
{
    return max2(NEURONS * max2(d->hidden, width), TOKENS * (d->experts + d->null_experts + keep + d->hidden));
}

size_t moec__fit_bytes(const moec_model *m, int64_t slots, int64_t keep, int64_t pieces, int64_t width, int64_t batch)
{
    const moec_dims *d = &m->dims;
    const size_t rows = (size_t)most_rows(slots, pieces, batch), H = (size_t)d->hidden, I = (size_t)width;
    return sizeof(float) * (3 * (size_t)(pieces * width + keep) * H * 3 + rows * (2 * H + 3 * I) +
                            (size_t)batch * (2 * H + 2 * (size_t)keep) +
                            (size_t)(moec_par_threads() * room_floats(d, keep, width)));
}

moec_status moec__fit_new(moec_fit **out, const moec_repair_task *t, int64_t pieces, int64_t width, int64_t batch, bool router,
                          moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_dims *d = &t->model->dims;
    const size_t rows = (size_t)most_rows(t->slots, pieces, batch), H = (size_t)d->hidden, I = (size_t)width;
    const size_t b = (size_t)batch, slots = (size_t)t->slots, K = router ? (size_t)t->n_keep : 0;
    moec_fit *f = NULL;
    *out = NULL;
    MOEC_TRY(MOEC_NEW(f, 1, err));
    f->t = t;
    f->most_pieces = pieces;
    f->most_width = width;
    f->most_batch = batch;
    f->most_values = pieces * moec__piece_values(t, width) + (int64_t)(K * H);
    MOEC_TRY(MOEC_NEW(f->piece, (size_t)pieces, err));
    MOEC_TRY(MOEC_NEW(f->values, (size_t)f->most_values, err));
    MOEC_TRY(MOEC_NEW(f->moments, 2 * (size_t)f->most_values, err));
    MOEC_TRY(MOEC_NEW(f->biases, (size_t)(pieces * moec__piece_biases(t)), err));
    MOEC_TRY(MOEC_NEW(f->matrix, (size_t)(MATRICES * pieces + 1), err));
    MOEC_TRY(MOEC_NEW(f->piece_of, (size_t)d->experts, err));
    MOEC_TRY(MOEC_NEW(f->kept_of, (size_t)d->experts, err));
    MOEC_TRY(MOEC_NEW(f->ids, b * slots, err));
    MOEC_TRY(MOEC_NEW(f->gates, b * slots, err));
    MOEC_TRY(MOEC_NEW(f->row_of, b * slots, err));
    MOEC_TRY(MOEC_NEW(f->first, (size_t)pieces + 1, err));
    MOEC_TRY(MOEC_NEW(f->at, rows, err));
    MOEC_TRY(MOEC_NEW(f->gate, rows, err));
    MOEC_TRY(MOEC_NEW(f->q, rows, err));
    MOEC_TRY(MOEC_NEW(f->x, rows * H, err));
    MOEC_TRY(MOEC_NEW(f->f, rows * H, err));
    MOEC_TRY(MOEC_NEW(f->g, rows * I, err));
    MOEC_TRY(MOEC_NEW(f->u, rows * I, err));
    MOEC_TRY(MOEC_NEW(f->a, rows * I, err));
    MOEC_TRY(MOEC_NEW(f->xb, router ? b * H : 0, err));
    MOEC_TRY(MOEC_NEW(f->e, b * H, err));
    MOEC_TRY(MOEC_NEW(f->score, b * K, err));
    MOEC_TRY(MOEC_NEW(f->dz, b * K, err));
    MOEC_TRY(MOEC_NEW(f->loss, b, err));
    MOEC_TRY(moec__room_new(&f->room, room_floats(d, (int64_t)K, width), err));
    f->router = router ? f->values : NULL; /* its place is known once the pieces are */
    *out = f;
    f = NULL;
done:
    moec__fit_free(f);
    return st;
}

void moec__fit_free(moec_fit *f)
{
    if (!f)
        return;
    void *const all[] = {f->piece, f->values, f->moments, f->biases, f->matrix, f->piece_of, f->kept_of, f->ids, f->gates,
                         f->row_of, f->first, f->at, f->gate, f->q, f->x, f->f, f->g, f->u, f->a, f->xb, f->e, f->score,
                         f->dz, f->loss, f->room.store};
    for (size_t i = 0; i < MOEC_COUNT(all); i++)
        moec_free(all[i]);
    moec_free(f);
}

float *moec__fit_values(const moec_fit *f, int64_t *n)
{
    *n = f->n_values;
    return f->values;
}

int64_t moec__fit_pieces(const moec_fit *f, const moec_piece **out)
{
    *out = f->piece;
    return f->pieces;
}

float *moec__fit_router(const moec_fit *f)
{
    return f->router;
}

int64_t moec__fit_pairs(const moec_fit *f)
{
    return f->rows;
}

static void add_matrix(moec_fit *f, float *w, int64_t rows, int64_t cols)
{
    const int64_t n = rows * cols;
    f->matrix[f->matrices++] = (moec_fit_matrix){w, rows, cols, (float)sqrt(moec_sum_sq(w, n) / (double)(n > 0 ? n : 1))};
}

moec_status moec__fit_read(moec_fit *f, int64_t first, int64_t n, int64_t neuron, int64_t width, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_repair_task *t = f->t;
    const int64_t hidden = t->model->dims.hidden, each = moec__piece_values(t, width);
    for (int64_t e = 0; e < t->model->dims.experts; e++)
        f->piece_of[e] = f->kept_of[e] = -1;
    for (int64_t i = 0; i < t->n_keep; i++)
        f->kept_of[t->keep[i]] = (int32_t)i;
    f->matrices = 0;
    f->pieces = n;
    f->width = width;
    for (int64_t i = 0; i < n; i++) {
        moec_piece *p = &f->piece[i];
        *p = (moec_piece){.expert = t->keep[first + i], .first = neuron, .width = width};
        f->piece_of[p->expert] = (int32_t)i;
        MOEC_TRY(moec__piece_read(p, t, f->values + i * each, f->biases + i * moec__piece_biases(t), err));
        add_matrix(f, p->gate, width, hidden);
        add_matrix(f, p->up, width, hidden);
        add_matrix(f, p->down, hidden, width);
    }
    f->n_values = n * each;
    if (f->router) {
        f->router = f->values + f->n_values;
        moec_weight_read(f->router, hidden, &t->router, 0, t->n_keep, 0, hidden);
        add_matrix(f, f->router, t->n_keep, hidden);
        f->n_values += t->n_keep * hidden;
        if (!moec_all_finite(f->router, t->n_keep * hidden))
            st = moec_fail(err, MOEC_ENUMERIC, "router: a value is NaN or infinite");
    }
    memset(f->moments, 0, 2 * (size_t)f->most_values * sizeof *f->moments);
done:
    return st;
}

/* --- routing -------------------------------------------------------------------------------------------------------------- */

typedef struct routing {
    moec_fit *f;
    const int32_t *token;  /* NULL: 0, 1, .. */
    int32_t *ids;
    float *gates, *x, *score; /* x [n,H], score [n,K]: kept for the way back, or NULL */
} routing;

static moec_status route_tokens(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const routing *a = ctx;
    const moec_repair_task *t = a->f->t;
    const int64_t hidden = t->model->dims.hidden, all = t->model->dims.experts, n = hi - lo, K = t->n_keep;
    float *score = moec__room_of(&a->f->room, worker), *logits = score + TOKENS * all, *own = logits + TOKENS * K;
    float *x = a->x ? a->x + lo * hidden : own;
    (void)err;
    for (int64_t i = 0; i < n; i++)
        memcpy(x + i * hidden, t->x + (a->token ? a->token[lo + i] : lo + i) * hidden, (size_t)hidden * sizeof *x);
    moec_sgemm(false, true, n, K, hidden, 1.0f, x, hidden, a->f->router, hidden, 0.0f, logits, K);
    for (int64_t i = 0; i < n * all; i++)
        score[i] = -INFINITY;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < K; j++)
            score[i * all + t->keep[j]] = logits[i * K + j] + (t->router_bias ? t->router_bias[j] : 0.0f);
    moec_route(score, a->ids + lo * t->slots, a->gates + lo * t->slots, score, t->model, t->layer, n);
    for (int64_t i = 0; a->score && i < n; i++)
        for (int64_t j = 0; j < K; j++)
            a->score[(lo + i) * K + j] = score[i * all + t->keep[j]];
    return MOEC_OK;
}

moec_status moec__fit_route(int32_t *ids, float *gates, moec_fit *f, moec_err *err)
{
    routing a = {.f = f, .ids = ids, .gates = gates};
    return moec_par_for(f->t->n, TOKENS, route_tokens, &a, err);
}

static moec_status choose(moec_fit *f, moec_err *err)
{
    const int64_t slots = f->t->slots;
    if (f->router) {
        routing a = {f, f->token, f->ids, f->gates, f->xb, f->score};
        return moec_par_for(f->n, TOKENS, route_tokens, &a, err);
    }
    for (int64_t i = 0; i < f->n; i++) {
        memcpy(f->ids + i * slots, f->t->ids + f->token[i] * slots, (size_t)slots * sizeof *f->ids);
        memcpy(f->gates + i * slots, f->t->gates + f->token[i] * slots, (size_t)slots * sizeof *f->gates);
    }
    return MOEC_OK;
}

/* Rows by piece: a counting sort. */
static void list_rows(moec_fit *f)
{
    const int64_t cells = f->n * f->t->slots;
    int64_t sum = 0;
    memset(f->first, 0, (size_t)(f->pieces + 1) * sizeof *f->first);
    for (int64_t i = 0; i < cells; i++)
        if (f->ids[i] >= 0 && f->piece_of[f->ids[i]] >= 0)
            f->first[f->piece_of[f->ids[i]]]++;
    for (int64_t p = 0; p <= f->pieces; p++) {
        const int64_t count = f->first[p];
        f->first[p] = sum;
        sum += count;
    }
    f->rows = sum;
    for (int64_t i = 0; i < cells; i++) {
        const int32_t p = f->ids[i] >= 0 ? f->piece_of[f->ids[i]] : -1;
        f->row_of[i] = -1;
        if (p < 0)
            continue;
        const int64_t row = f->first[p]++;
        f->row_of[i] = (int32_t)row;
        f->at[row] = (int32_t)(i / f->t->slots);
        f->gate[row] = f->gates[i];
    }
    for (int64_t p = f->pieces; p > 0; p--) /* each has become the next one's */
        f->first[p] = f->first[p - 1];
    f->first[0] = 0;
}

/* --- forward --------------------------------------------------------------------------------------------------------------- */

static int64_t bands(int64_t n)
{
    return (n + NEURONS - 1) / NEURONS;
}

/* Item i of pieces that have `n` rows or columns each, in bands. */
typedef struct item {
    const moec_piece *p;
    int64_t row, rows, lo, n; /* batch rows; band */
} item;

static item item_of(const moec_fit *f, int64_t i, int64_t n)
{
    const int64_t k = i / bands(n), lo = i % bands(n) * NEURONS;
    return (item){&f->piece[k], f->first[k], f->first[k + 1] - f->first[k], lo, n - lo < NEURONS ? n - lo : NEURONS};
}

static moec_status gather(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const moec_fit *f = ctx;
    const int64_t hidden = f->t->model->dims.hidden;
    (void)worker;
    (void)err;
    for (int64_t r = lo; r < hi; r++) {
        float *x = f->x + r * hidden;
        memcpy(x, f->t->x + f->token[f->at[r]] * hidden, (size_t)hidden * sizeof *x);
        for (int64_t j = 0; f->t->model->family->weight_on_input && j < hidden; j++)
            x[j] *= f->gate[r];
    }
    return MOEC_OK;
}

static void add_bias(float *out, int64_t ld, const float *bias, int64_t rows, int64_t n)
{
    for (int64_t r = 0; bias && r < rows; r++)
        moec_add(out + r * ld, bias, n);
}

static moec_status run_up(void *ctx, int worker, int64_t from, int64_t to, moec_err *err)
{
    const moec_fit *f = ctx;
    const int64_t hidden = f->t->model->dims.hidden, width = f->width;
    (void)worker;
    (void)err;
    for (int64_t k = from; k < to; k++) {
        const item i = item_of(f, k, width);
        const int64_t at = i.row * width + i.lo;
        const float *x = f->x + i.row * hidden;
        moec_sgemm(false, true, i.rows, i.n, hidden, 1.0f, x, hidden, i.p->gate + i.lo * hidden, hidden, 0.0f, f->g + at, width);
        moec_sgemm(false, true, i.rows, i.n, hidden, 1.0f, x, hidden, i.p->up + i.lo * hidden, hidden, 0.0f, f->u + at, width);
        add_bias(f->g + at, width, i.p->gate_bias ? i.p->gate_bias + i.lo : NULL, i.rows, i.n);
        add_bias(f->u + at, width, i.p->up_bias ? i.p->up_bias + i.lo : NULL, i.rows, i.n);
        for (int64_t r = 0; r < i.rows; r++) {
            memcpy(f->a + at + r * width, f->g + at + r * width, (size_t)i.n * sizeof *f->a);
            moec_activate(f->a + at + r * width, f->u + at + r * width, i.n, f->t->model);
        }
    }
    return MOEC_OK;
}

static moec_status run_down(void *ctx, int worker, int64_t from, int64_t to, moec_err *err)
{
    const moec_fit *f = ctx;
    const int64_t hidden = f->t->model->dims.hidden, width = f->width;
    (void)worker;
    (void)err;
    for (int64_t k = from; k < to; k++) {
        const item i = item_of(f, k, hidden);
        float *out = f->f + i.row * hidden + i.lo;
        moec_sgemm(false, true, i.rows, i.n, width, 1.0f, f->a + i.row * width, width, i.p->down + i.lo * width, width, 0.0f,
                   out, hidden);
        add_bias(out, hidden, i.p->down_bias ? i.p->down_bias + i.lo : NULL, i.rows, i.n);
    }
    return MOEC_OK;
}

/* --- back ------------------------------------------------------------------------------------------------------------------- */

/* Tokens [lo, hi): e = z - r, the loss, and what it changes by for every row's f and weight. */
static moec_status compare(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const moec_fit *f = ctx;
    const int64_t hidden = f->t->model->dims.hidden, slots = f->t->slots;
    const bool on_input = f->t->model->family->weight_on_input;
    (void)worker;
    (void)err;
    for (int64_t i = lo; i < hi; i++) {
        const double w = f->scale * (double)f->t->weight[f->token[i]];
        const int32_t *rows = f->row_of + i * slots;
        float *e = f->e + i * hidden;
        memcpy(e, f->z + f->token[i] * hidden, (size_t)hidden * sizeof *e);
        for (int64_t j = 0; j < slots; j++)
            if (rows[j] >= 0)
                moec_saxpy(e, on_input ? -1.0f : -f->gate[rows[j]], f->f + rows[j] * hidden, hidden);
        f->loss[i] = w * moec_sum_sq(e, hidden);
        for (int64_t j = 0; j < hidden; j++)
            e[j] *= (float)(-2.0 * w);
        for (int64_t j = 0; j < slots; j++) {
            float *out = f->f + rows[j] * hidden;
            if (rows[j] < 0)
                continue;
            if (f->router && !on_input)
                f->q[rows[j]] = moec_sdot(e, out, hidden);
            memset(out, 0, (size_t)hidden * sizeof *out);
            moec_saxpy(out, on_input ? 1.0f : f->gate[rows[j]], e, hidden);
        }
    }
    return MOEC_OK;
}

/* g and u become what the loss changes by for them. */
static moec_status back_up(void *ctx, int worker, int64_t from, int64_t to, moec_err *err)
{
    const moec_fit *f = ctx;
    const moec_dims *d = &f->t->model->dims;
    const int64_t hidden = d->hidden, width = f->width;
    const bool clamped = f->t->model->family->activation == MOEC_ACT_SWIGLU_CLAMPED;
    float *da = moec__room_of(&f->room, worker);
    (void)err;
    for (int64_t k = from; k < to; k++) {
        const item i = item_of(f, k, width);
        for (int64_t r = 0; r < i.rows; r += ROWS) {
            const int64_t n = i.rows - r < ROWS ? i.rows - r : ROWS, at = (i.row + r) * width + i.lo;
            moec_sgemm(false, false, n, i.n, hidden, 1.0f, f->f + (i.row + r) * hidden, hidden, i.p->down + i.lo, width, 0.0f,
                       da, i.n);
            for (int64_t j = 0; j < n; j++)
                if (clamped)
                    moec_swiglu_clamped_grad(f->g + at + j * width, f->u + at + j * width, da + j * i.n, i.n,
                                             (float)d->act_limit, (float)d->act_alpha);
                else
                    moec_silu_mul_grad(f->g + at + j * width, f->u + at + j * width, da + j * i.n, i.n);
        }
    }
    return MOEC_OK;
}

/* Weight on the input: q = x . what the loss changes by for the weighted input. A piece's rows in bands. */
static moec_status back_input(void *ctx, int worker, int64_t from, int64_t to, moec_err *err)
{
    const moec_fit *f = ctx;
    const int64_t hidden = f->t->model->dims.hidden, width = f->width;
    float *dx = moec__room_of(&f->room, worker);
    (void)err;
    for (int64_t k = from; k < to; k++)
        for (int64_t r = f->first[k]; r < f->first[k + 1]; r += ROWS) {
            const int64_t n = f->first[k + 1] - r < ROWS ? f->first[k + 1] - r : ROWS;
            const moec_piece *p = &f->piece[k];
            moec_sgemm(false, false, n, hidden, width, 1.0f, f->g + r * width, width, p->gate, hidden, 0.0f, dx, hidden);
            moec_sgemm(false, false, n, hidden, width, 1.0f, f->u + r * width, width, p->up, hidden, 1.0f, dx, hidden);
            for (int64_t j = 0; j < n; j++)
                f->q[r + j] = moec_sdot(dx + j * hidden, f->xb + f->at[r + j] * hidden, hidden);
        }
    return MOEC_OK;
}

/* From the weights to the logits. With scores s and factor c, weights are c s_e / sum of the selected s, or c s_e:
 *   softmax, renormalised   dg_e/dz_j = g_e (1[e=j] - g_j / c)        softmax, not   g_e (1[e=j] - s_j), j selected or not
 *   sigmoid, renormalised   the same times (1 - s_j)                  sigmoid, not   g_e (1 - s_e) 1[e=j] */
static void back_router(moec_fit *f)
{
    const moec_model *m = f->t->model;
    const int64_t slots = f->t->slots, K = f->t->n_keep;
    const bool soft = m->family->score == MOEC_SCORE_SOFTMAX;
    const bool shared = m->dims.renorm || m->family->choice == MOEC_CHOOSE_TOP_K_SOFTMAX;
    for (int64_t i = 0; i < f->n; i++) {
        const float *score = f->score + i * K, c = (float)m->dims.route_scale;
        float *dz = f->dz + i * K, mean = 0.0f; /* sum of g q */
        for (int64_t j = 0; j < slots; j++)
            if (f->row_of[i * slots + j] >= 0)
                mean += f->gates[i * slots + j] * f->q[f->row_of[i * slots + j]];
        for (int64_t j = 0; j < K; j++)
            dz[j] = soft && !shared ? -score[j] * mean : 0.0f;
        for (int64_t j = 0; j < slots; j++) {
            const int64_t row = f->row_of[i * slots + j];
            if (row < 0)
                continue;
            const int32_t k = f->kept_of[f->ids[i * slots + j]];
            const float g = f->gates[i * slots + j];
            dz[k] += g * (shared ? f->q[row] - mean / c : f->q[row]);
            dz[k] *= soft ? 1.0f : 1.0f - score[k];
        }
    }
}

/* --- the step ---------------------------------------------------------------------------------------------------------------- */

/* A matrix's gradient is left^T right over some rows of the batch. */
typedef struct factors {
    const float *left, *right;
    int64_t rows;
} factors;

static factors factors_of(const moec_fit *f, int64_t matrix)
{
    const int64_t hidden = f->t->model->dims.hidden, p = matrix / MATRICES, width = f->width;
    if (p == f->pieces)
        return (factors){f->dz, f->xb, f->n};
    const int64_t row = f->first[p], rows = f->first[p + 1] - row;
    const float *x = f->x + row * hidden, *a = f->a + row * width;
    switch (matrix % MATRICES) {
    case 0:
        return (factors){f->g + row * width, x, rows};
    case 1:
        return (factors){f->u + row * width, x, rows};
    default:
        return (factors){f->f + row * hidden, a, rows};
    }
}

static void step_band(const moec_fit *f, float *grad, const moec_fit_matrix *w, int64_t matrix, int64_t lo, int64_t n)
{
    const factors k = factors_of(f, matrix);
    const int64_t at = w->w - f->values + lo * w->cols;
    float *out = f->grad ? f->grad + at : grad;
    moec_sgemm(true, false, n, w->cols, k.rows, 1.0f, k.left + lo, w->rows, k.right, w->cols, 0.0f, out, w->cols);
    if (f->grad)
        return;
    moec_adam_factors a = *f->factors;
    a.rate *= w->rms;
    moec_adam(f->values + at, f->moments + at, f->moments + f->most_values + at, grad, n * w->cols, &a);
}

/* Bands of all matrices, counted through. */
static moec_status step(void *ctx, int worker, int64_t from, int64_t to, moec_err *err)
{
    const moec_fit *f = ctx;
    (void)err;
    for (int64_t k = from; k < to; k++) {
        int64_t m = 0, i = k;
        for (; i >= bands(f->matrix[m].rows); m++)
            i -= bands(f->matrix[m].rows);
        const int64_t lo = i * NEURONS, left = f->matrix[m].rows - lo;
        step_band(f, moec__room_of(&f->room, worker), &f->matrix[m], m, lo, left < NEURONS ? left : NEURONS);
    }
    return MOEC_OK;
}

moec_status moec__fit_batch(double *loss, float *grad, moec_fit *f, const float *z, const int32_t *token, int64_t n,
                            double scale, const moec_adam_factors *adam, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t hidden = f->t->model->dims.hidden;
    int64_t all = 0;
    f->z = z;
    f->token = token;
    f->n = n;
    f->scale = scale;
    f->grad = grad;
    f->factors = adam;
    MOEC_TRY(choose(f, err));
    list_rows(f);
    MOEC_TRY(moec_par_for(f->rows, ROWS, gather, f, err));
    MOEC_TRY(moec_par_for(f->pieces * bands(f->width), 1, run_up, f, err));
    MOEC_TRY(moec_par_for(f->pieces * bands(hidden), 1, run_down, f, err));
    MOEC_TRY(moec_par_for(n, TOKENS, compare, f, err));
    MOEC_TRY(moec_par_for(f->pieces * bands(f->width), 1, back_up, f, err));
    if (f->router && f->t->model->family->weight_on_input)
        MOEC_TRY(moec_par_for(f->pieces, 1, back_input, f, err));
    if (f->router)
        back_router(f);
    for (int64_t m = 0; m < f->matrices; m++)
        all += bands(f->matrix[m].rows);
    MOEC_TRY(moec_par_for(all, 1, step, f, err));
    *loss = 0.0;
    for (int64_t i = 0; i < n; i++)
        *loss += f->loss[i];
done:
    return st;
}
