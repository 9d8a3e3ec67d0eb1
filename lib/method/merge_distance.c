/* Distances of experts; see merge.h. All but two come from a Gram matrix G [E,E] of rows that are made piece by piece in float64,
 *
 *     |a_i - a_j|^2 = G_ii + G_jj - 2 G_ij,   cos(a_i, a_j) = G_ij / sqrt(G_ii G_jj), 0 where a row is 0
 *
 * where differences count the mean over experts is taken out of each piece first: they are the same without it, and G has nothing
 * large in it that cancels. Logits are those of all tokens, outputs those of the sample. */
#include "method/all_outputs.h"
#include "method/merge_parts.h"

#include "base/mem.h"
#include "base/par.h"
#include "num/linalg.h"
#include "num/vec.h"

#include <math.h>
#include <string.h>

enum {
    TOKENS = 256,                 /* of a piece of logits */
    TILE_ROWS = 32,               /* of a piece of weights */
    TILE_COLS = 256,
    TILE = TILE_ROWS * TILE_COLS,
};

/* ---- Gram matrices ----------------------------------------------------------------------------------------------------- */

/* Writes the rows [E, width] of one piece; spare [width]. */
typedef moec_status rows_fn(const void *ctx, int64_t piece, double *rows, float *spare, moec_err *err);

typedef struct gram_room {
    double *rows;  /* [E, width] */
    double *mean;  /* [width] */
    double *gram;  /* [E,E] */
    float *spare;  /* [width] */
} gram_room;

typedef struct gram {
    int64_t experts, width;
    bool centre;      /* the mean over experts is taken out of every column */
    rows_fn *fn;
    const void *ctx;
    double *out;      /* [E,E] lower triangle, summed up */
    gram_room *room;  /* [threads] */
    int threads;
} gram;

static moec_status gram_open(gram *g, int64_t experts, int64_t width, bool centre, double *out, moec_err *err)
{
    moec_status st = MOEC_OK;
    const size_t e = (size_t)experts;
    *g = (gram){.experts = experts, .width = width, .centre = centre, .out = out, .threads = moec_par_threads()};
    memset(out, 0, e * e * sizeof *out);
    MOEC_TRY(MOEC_NEW(g->room, (size_t)g->threads, err));
    for (int i = 0; i < g->threads; i++) {
        MOEC_TRY(MOEC_NEW(g->room[i].rows, e * (size_t)width, err));
        MOEC_TRY(MOEC_NEW(g->room[i].mean, (size_t)width, err));
        MOEC_TRY(MOEC_NEW(g->room[i].gram, e * e, err));
        MOEC_TRY(MOEC_NEW(g->room[i].spare, (size_t)width, err));
    }
done:
    return st;
}

static void gram_close(gram *g)
{
    for (int i = 0; g->room && i < g->threads; i++) {
        moec_free(g->room[i].rows);
        moec_free(g->room[i].mean);
        moec_free(g->room[i].gram);
        moec_free(g->room[i].spare);
    }
    moec_free(g->room);
}

static void centre_columns(double *rows, double *mean, int64_t n, int64_t width)
{
    memset(mean, 0, (size_t)width * sizeof *mean);
    for (int64_t e = 0; e < n; e++)
        for (int64_t c = 0; c < width; c++)
            mean[c] += rows[e * width + c];
    for (int64_t c = 0; c < width; c++)
        mean[c] /= (double)n;
    for (int64_t e = 0; e < n; e++)
        for (int64_t c = 0; c < width; c++)
            rows[e * width + c] -= mean[c];
}

static moec_status gram_pieces(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const gram *g = ctx;
    gram_room *r = &g->room[worker];
    moec_status st = MOEC_OK;
    for (int64_t i = lo; i < hi; i++) {
        MOEC_TRY(moec_interrupted(err));
        MOEC_TRY(g->fn(g->ctx, i, r->rows, r->spare, err));
        if (g->centre)
            centre_columns(r->rows, r->mean, g->experts, g->width);
        moec_dsyrk(g->experts, g->width, r->rows, g->width, i == lo ? 0.0 : 1.0, r->gram);
    }
done:
    return st;
}

static moec_status gram_merge(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const gram *g = ctx;
    const double *mine = g->room[worker].gram;
    (void)lo;
    (void)hi;
    (void)err;
    for (int64_t i = 0; i < g->experts; i++)
        for (int64_t j = 0; j <= i; j++)
            g->out[i * g->experts + j] += mine[i * g->experts + j];
    return MOEC_OK;
}

/* Adds the pieces; `grain` of them are summed before they are added. */
static moec_status gram_add(gram *g, int64_t pieces, int64_t grain, rows_fn *fn, const void *ctx, moec_err *err)
{
    g->fn = fn;
    g->ctx = ctx;
    return moec_par_ordered(pieces, grain, gram_pieces, gram_merge, g, err);
}

/* Every entry from the lower triangle; NaN and infinity are found here. */
static moec_status gram_finish(double *g, int64_t n, moec_err *err)
{
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j <= i; j++) {
            if (!isfinite(g[i * n + j]))
                return moec_fail(err, MOEC_ENUMERIC, "experts %lld and %lld: what they are compared by is not finite", (long long)j,
                                 (long long)i);
            g[j * n + i] = g[i * n + j];
        }
    return MOEC_OK;
}

static double square_between(const double *g, int64_t n, int64_t i, int64_t j)
{
    const double d = g[i * n + i] + g[j * n + j] - 2.0 * g[i * n + j];
    return i == j || d < 0.0 ? 0.0 : d;
}

static double cosine_of(const double *g, int64_t n, int64_t i, int64_t j)
{
    const double size = sqrt(g[i * n + i]) * sqrt(g[j * n + j]);
    const double c = size > 0.0 ? g[i * n + j] / size : 0.0;
    return c > 1.0 ? 1.0 : c < -1.0 ? -1.0 : c;
}

/* ---- logits -------------------------------------------------------------------------------------------------------------- */

static moec_status logit_rows(const void *ctx, int64_t piece, double *rows, float *spare, moec_err *err)
{
    const moec_merge_task *t = ctx;
    const int64_t at = piece * TOKENS, m = t->n - at < TOKENS ? t->n - at : TOKENS, experts = t->model->dims.experts;
    (void)spare;
    if (m < TOKENS)
        memset(rows, 0, (size_t)(experts * TOKENS) * sizeof *rows);
    for (int64_t i = 0; i < m; i++) {
        const float *z = t->logits + (at + i) * t->ld;
        for (int64_t e = 0; e < experts; e++) {
            if (!isfinite(z[e]))
                return moec_fail(err, MOEC_ENUMERIC, "expert %lld: its router logit of token %lld is not finite", (long long)e,
                                 (long long)(at + i));
            rows[e * TOKENS + i] = (double)z[e];
        }
    }
    return MOEC_OK;
}

/* Z^T Z over all tokens. */
static moec_status gram_of_logits(double *out, const moec_merge_task *t, bool centre, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t experts = t->model->dims.experts;
    gram g;
    MOEC_TRY(gram_open(&g, experts, TOKENS, centre, out, err));
    MOEC_TRY(gram_add(&g, (t->n + TOKENS - 1) / TOKENS, 4, logit_rows, t, err));
    MOEC_TRY(gram_finish(out, experts, err));
done:
    gram_close(&g);
    return st;
}

static moec_status far_by_logits(double *d, double *kernel, const moec_merge_task *t, moec_merge_distance kind, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t n = t->model->dims.experts;
    double *z = NULL;
    (void)kernel;
    MOEC_TRY(MOEC_NEW(z, (size_t)(n * n), err));
    MOEC_TRY(gram_of_logits(z, t, kind == MOEC_FAR_CENTRED, err));
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++)
            d[i * n + j] = i == j ? 0.0 : 0.5 * (1.0 - cosine_of(z, n, i, j));
done:
    moec_free(z);
    return st;
}

/* ---- outputs of all experts on the sample -------------------------------------------------------------------------------- */

/* Every ceil(n / MOEC_MERGE_TOKENS)-th token. */
static moec_status take_sample(int32_t **row, int64_t *taken, const moec_merge_task *t, moec_err *err)
{
    const int64_t step = (t->n + MOEC_MERGE_TOKENS - 1) / MOEC_MERGE_TOKENS;
    *taken = (t->n + step - 1) / step;
    moec_status st = MOEC_NEW(*row, (size_t)*taken, err);
    for (int64_t i = 0; st == MOEC_OK && i < *taken; i++)
        (*row)[i] = (int32_t)(i * step);
    return st;
}

/* Outputs of one token as they are, or at length 1. */
typedef struct token_rows {
    const float *y; /* [m,E,H] */
    int64_t experts, hidden;
    bool unit;
} token_rows;

static moec_status output_rows(const void *ctx, int64_t piece, double *rows, float *spare, moec_err *err)
{
    const token_rows *o = ctx;
    const int64_t h = o->hidden;
    (void)spare;
    (void)err;
    for (int64_t e = 0; e < o->experts; e++) {
        const float *y = o->y + (piece * o->experts + e) * h;
        double *to = rows + e * h, sum = 0.0;
        for (int64_t c = 0; c < h; c++)
            sum += (double)y[c] * (double)y[c];
        const double over = !o->unit ? 1.0 : sum > 0.0 ? 1.0 / sqrt(sum) : 0.0; /* an output of 0 has cosine 0 with all */
        for (int64_t c = 0; c < h; c++)
            to[c] = over * (double)y[c];
    }
    return MOEC_OK;
}

typedef struct outputs_gram {
    gram g;
    token_rows o;
} outputs_gram;

static moec_status add_block(void *ctx, int64_t at, int64_t m, float *y, moec_err *err)
{
    outputs_gram *u = ctx;
    (void)at;
    u->o.y = y;
    return gram_add(&u->g, m, 16, output_rows, &u->o, err);
}

/* OUTPUT and OUTPUT_COSINE. */
static moec_status far_by_outputs(double *d, double *kernel, const moec_merge_task *t, moec_merge_distance kind, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t n = t->model->dims.experts, h = t->model->dims.hidden;
    const bool unit = kind == MOEC_FAR_OUTPUT_COSINE;
    int64_t taken = 0;
    int32_t *row = NULL;
    double *sum = NULL;
    outputs_gram u = {.o = {.experts = n, .hidden = h, .unit = unit}};
    MOEC_TRY(MOEC_NEW(sum, (size_t)(n * n), err));
    MOEC_TRY(take_sample(&row, &taken, t, err));
    MOEC_TRY(gram_open(&u.g, n, h, !unit, sum, err));
    MOEC_TRY(moec__all_outputs(t->model, t->layer, t->x, row, taken, add_block, &u, err));
    MOEC_TRY(gram_finish(sum, n, err));
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++) {
            const double far = unit ? 1.0 - sum[i * n + j] / (double)taken : square_between(sum, n, i, j) / (double)taken;
            d[i * n + j] = i == j || far < 0.0 ? 0.0 : far;
            if (kernel && unit)
                kernel[i * n + j] = sum[i * n + j] / (double)taken;
        }
done:
    gram_close(&u.g);
    moec_free(row);
    moec_free(sum);
    return st;
}

/* ---- mean outputs -------------------------------------------------------------------------------------------------------- */

typedef struct means {
    int64_t experts, hidden, at, m;
    const float *y;     /* [m,E,H] */
    const float *score; /* [sample,E] or NULL: 1 */
    double *sum;        /* [E,H] */
} means;

/* Each expert's tokens in their order, so it does not matter who adds them. */
static moec_status add_means(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const means *u = ctx;
    (void)worker;
    for (int64_t e = lo; e < hi; e++)
        for (int64_t i = 0; i < u->m; i++) {
            const float *y = u->y + (i * u->experts + e) * u->hidden;
            const double p = u->score ? (double)u->score[(u->at + i) * u->experts + e] : 1.0;
            double *sum = u->sum + e * u->hidden;
            for (int64_t c = 0; c < u->hidden; c++)
                sum[c] += p * (double)y[c];
        }
    return moec_interrupted(err);
}

static moec_status add_means_of_block(void *ctx, int64_t at, int64_t m, float *y, moec_err *err)
{
    means *u = ctx;
    u->at = at;
    u->m = m;
    u->y = y;
    return moec_par_for(u->experts, 1, add_means, u, err);
}

/* out [E,H] = mean over the sample of f_e, or of p_e f_e with the full score p. */
static moec_status mean_outputs(double *out, const moec_merge_task *t, bool gated, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t n = t->model->dims.experts, h = t->model->dims.hidden;
    int64_t taken = 0;
    int32_t *row = NULL;
    float *score = NULL;
    MOEC_TRY(take_sample(&row, &taken, t, err));
    if (gated) {
        MOEC_TRY(MOEC_NEW(score, (size_t)taken * (size_t)n, err));
        MOEC_TRY(moec__merge_scores(score, t, row, taken, false, err));
    }
    memset(out, 0, (size_t)(n * h) * sizeof *out);
    means u = {.experts = n, .hidden = h, .score = score, .sum = out};
    MOEC_TRY(moec__all_outputs(t->model, t->layer, t->x, row, taken, add_means_of_block, &u, err));
    for (int64_t i = 0; i < n * h; i++)
        out[i] /= (double)taken;
done:
    moec_free(row);
    moec_free(score);
    return st;
}

/* ---- a row for each expert ----------------------------------------------------------------------------------------------- */

typedef struct between {
    const double *rows; /* [n,width] */
    double *out;        /* [n,n] */
    int64_t n, width;
} between;

static moec_status measure(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const between *u = ctx;
    (void)worker;
    for (int64_t i = lo; i < hi; i++)
        for (int64_t j = 0; j < i; j++) {
            const double *a = u->rows + i * u->width, *b = u->rows + j * u->width;
            double sum = 0.0;
            for (int64_t c = 0; c < u->width; c++)
                sum += (a[c] - b[c]) * (a[c] - b[c]);
            u->out[i * u->n + j] = u->out[j * u->n + i] = sqrt(sum);
        }
    return moec_interrupted(err);
}

/* Euclidean distances of n rows. */
static moec_status between_rows(double *out, const double *rows, int64_t n, int64_t width, moec_err *err)
{
    between u = {.rows = rows, .out = out, .n = n, .width = width};
    for (int64_t i = 0; i < n; i++)
        out[i * n + i] = 0.0;
    return moec_par_for(n, 4, measure, &u, err);
}

static moec_status far_by_mean(double *d, double *kernel, const moec_merge_task *t, moec_merge_distance kind, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t n = t->model->dims.experts, h = t->model->dims.hidden;
    double *mean = NULL;
    (void)kernel;
    (void)kind;
    MOEC_TRY(MOEC_NEW(mean, (size_t)n * (size_t)h, err));
    MOEC_TRY(mean_outputs(mean, t, false, err));
    MOEC_TRY(between_rows(d, mean, n, h, err));
done:
    moec_free(mean);
    return st;
}

static moec_status far_by_router(double *d, double *kernel, const moec_merge_task *t, moec_merge_distance kind, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_weight *w = &t->layer->mat[MOEC_MAT_ROUTER];
    const int64_t n = t->model->dims.experts;
    float *one = NULL;
    double *rows = NULL;
    (void)kernel;
    (void)kind;
    MOEC_TRY(MOEC_NEW(one, (size_t)w->cols, err));
    MOEC_TRY(MOEC_NEW(rows, (size_t)n * (size_t)w->cols, err));
    for (int64_t e = 0; e < n; e++) {
        const int64_t row = t->layer->router_row ? t->layer->router_row[e] : e;
        if (row >= 0)
            moec_weight_read(one, w->cols, w, row, 1, 0, w->cols);
        for (int64_t c = 0; c < w->cols && row >= 0; c++)
            rows[e * w->cols + c] = (double)one[c];
    }
    MOEC_TRY(between_rows(d, rows, n, w->cols, err));
done:
    moec_free(one);
    moec_free(rows);
    return st;
}

/* ---- REAM's -------------------------------------------------------------------------------------------------------------- */

/* |unit z_i - unit z_j|; a column of 0 stays 0. */
static double between_units(const double *z, int64_t n, int64_t i, int64_t j)
{
    const double d = (z[i * n + i] > 0.0 ? 1.0 : 0.0) + (z[j * n + j] > 0.0 ? 1.0 : 0.0) - 2.0 * cosine_of(z, n, i, j);
    return i == j || d < 0.0 ? 0.0 : sqrt(d);
}

static moec_status far_by_gated(double *d, double *kernel, const moec_merge_task *t, moec_merge_distance kind, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t n = t->model->dims.experts, h = t->model->dims.hidden;
    double *z = NULL, *mean = NULL, *g = NULL, most = 0.0;
    (void)kernel;
    (void)kind;
    MOEC_TRY(MOEC_NEW(z, (size_t)(n * n), err));
    MOEC_TRY(MOEC_NEW(g, (size_t)(n * n), err));
    MOEC_TRY(MOEC_NEW(mean, (size_t)n * (size_t)h, err));
    MOEC_TRY(gram_of_logits(z, t, false, err));
    MOEC_TRY(mean_outputs(mean, t, true, err));
    moec_dsyrk(n, h, mean, h, 0.0, g);
    MOEC_TRY(gram_finish(g, n, err));
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < i; j++)
            most = fmax(most, between_units(z, n, i, j));
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++) {
            const double apart = most > 0.0 ? between_units(z, n, i, j) / most : 0.0; /* all alike */
            const double like = 0.5 * (0.5 * (1.0 + cosine_of(g, n, i, j)) + 1.0 - apart);
            d[i * n + j] = i == j ? 0.0 : fmax(1.0 - like, 0.0);
        }
done:
    moec_free(z);
    moec_free(g);
    moec_free(mean);
    return st;
}

/* ---- weights ------------------------------------------------------------------------------------------------------------- */

typedef struct tiles {
    const moec_layer *layer;
    int64_t experts, rows, cols; /* of gate and up */
    int64_t across, each;        /* tiles side by side, tiles of a matrix */
} tiles;

static moec_status weight_rows(const void *ctx, int64_t piece, double *rows, float *spare, moec_err *err)
{
    const tiles *u = ctx;
    const int64_t tile = piece % u->each, r = tile / u->across * TILE_ROWS, c = tile % u->across * TILE_COLS;
    const int64_t high = u->rows - r < TILE_ROWS ? u->rows - r : TILE_ROWS;
    const int64_t wide = u->cols - c < TILE_COLS ? u->cols - c : TILE_COLS;
    const bool up = piece >= u->each;
    memset(rows, 0, (size_t)(u->experts * TILE) * sizeof *rows);
    for (int64_t e = 0; e < u->experts; e++) {
        moec_weight_read(spare, wide, up ? &u->layer->expert[e].up : &u->layer->expert[e].gate, r, high, c, wide);
        if (!moec_all_finite(spare, high * wide))
            return moec_fail(err, MOEC_ENUMERIC, "expert %lld: a weight of its %s projection is not finite", (long long)e,
                             up ? "up" : "gate");
        for (int64_t i = 0; i < high * wide; i++)
            rows[e * TILE + i] = (double)spare[i];
    }
    return MOEC_OK;
}

static moec_status far_by_weights(double *d, double *kernel, const moec_merge_task *t, moec_merge_distance kind, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t n = t->model->dims.experts;
    const moec_mlp *x = t->layer->expert;
    tiles u = {.layer = t->layer, .experts = n, .rows = t->model->dims.expert_width, .cols = t->model->dims.hidden};
    double *sum = NULL;
    gram g = {0};
    (void)kernel;
    (void)kind;
    u.across = (u.cols + TILE_COLS - 1) / TILE_COLS;
    u.each = (u.rows + TILE_ROWS - 1) / TILE_ROWS * u.across;
    MOEC_TRY(MOEC_NEW(sum, (size_t)(n * n), err));
    MOEC_TRY(gram_open(&g, n, TILE, true, sum, err));
    MOEC_TRY(gram_add(&g, 2 * u.each, 1, weight_rows, &u, err));
    MOEC_TRY(gram_finish(sum, n, err));
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++)
            d[i * n + j] = sqrt(square_between(sum, n, i, j));
done:
    for (int64_t e = 0; e < n; e++) {
        moec_weight_drop(&x[e].gate);
        moec_weight_drop(&x[e].up);
    }
    gram_close(&g);
    moec_free(sum);
    return st;
}

/* ---- all of them --------------------------------------------------------------------------------------------------------- */

static const struct far_rule {
    moec_status (*fn)(double *d, double *kernel, const moec_merge_task *t, moec_merge_distance kind, moec_err *err);
    bool outputs, blind, square, kernel; /* runs experts; needs no tokens; is a square; makes the kernel, too */
} rules[MOEC_FAR_COUNT] = {
    [MOEC_FAR_LOGITS] = {.fn = far_by_logits},
    [MOEC_FAR_CENTRED] = {.fn = far_by_logits},
    [MOEC_FAR_MEAN_OUTPUT] = {.fn = far_by_mean, .outputs = true},
    [MOEC_FAR_OUTPUT_COSINE] = {.fn = far_by_outputs, .outputs = true, .kernel = true},
    [MOEC_FAR_OUTPUT] = {.fn = far_by_outputs, .outputs = true, .square = true},
    [MOEC_FAR_GATED] = {.fn = far_by_gated, .outputs = true},
    [MOEC_FAR_WEIGHTS] = {.fn = far_by_weights, .blind = true},
    [MOEC_FAR_ROUTER_ROWS] = {.fn = far_by_router, .blind = true},
};

bool moec__merge_is_square(moec_merge_distance kind)
{
    return rules[kind].square;
}

bool moec__merge_runs_experts(moec_merge_distance kind)
{
    return rules[kind].outputs;
}

/* kernel = -1/2 J d^2 J, J taking out the mean. */
static moec_status centre_squares(double *kernel, const double *d, int64_t n, bool square, moec_err *err)
{
    double *mean = NULL, all = 0.0;
    moec_status st = MOEC_NEW(mean, (size_t)n, err);
    if (st != MOEC_OK)
        return st;
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < n; j++) {
            const double v = d[i * n + j];
            kernel[i * n + j] = square ? v : v * v;
            mean[i] += kernel[i * n + j] / (double)n;
        }
        all += mean[i] / (double)n;
    }
    for (int64_t i = 0; i < n; i++) /* the same whichever of the two is first */
        for (int64_t j = 0; j < n; j++)
            kernel[i * n + j] = -0.5 * (kernel[i * n + j] - (mean[i] + mean[j]) + all);
    for (int64_t i = 0; i < n; i++) /* by rounding, or of distances that no points have: a length is not below 0 */
        kernel[i * n + i] = fmax(kernel[i * n + i], 0.0);
    moec_free(mean);
    return MOEC_OK;
}

moec_status moec_merge_distances(double *distance, double *kernel, const moec_merge_task *t, moec_merge_distance kind,
                                 moec_err *err)
{
    moec_status st = MOEC_OK;
    const struct far_rule *r = &rules[kind];
    const int64_t n = t->model->dims.experts;
    MOEC_TRY(moec__merge_check(t, r->blind, r->outputs, err));
    MOEC_TRY(r->fn(distance, kernel, t, kind, err));
    for (int64_t i = 0; i < n * n; i++)
        if (!isfinite(distance[i]))
            return moec_fail(err, MOEC_ENUMERIC, "experts %lld and %lld: their distance is not finite", (long long)(i / n),
                             (long long)(i % n));
    if (kernel && !r->kernel)
        MOEC_TRY(centre_squares(kernel, distance, n, r->square, err));
done:
    return st;
}

size_t moec__merge_distance_bytes(const moec_model *m)
{
    const size_t e = (size_t)m->dims.experts, h = (size_t)m->dims.hidden, width = h > TILE ? h : TILE;
    const size_t room = 8 * (e * width + width + e * e) + 4 * width;
    return moec__all_outputs_bytes(m) + room * (size_t)moec_par_threads() + 8 * (2 * e * e + e * h) +
           MOEC_MERGE_TOKENS * (4 + 4 * e);
}
