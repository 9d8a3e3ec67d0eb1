/* One pass over the text: what each matrix multiplies, as mean squares of columns, and under these the errors of all block types over
 * sampled rows. */
#include "run/gguf_measure_parts.h"

#include "base/mem.h"
#include "base/par.h"
#include "calib/final.h"

#include <math.h>
#include <string.h>

enum { EXPERT_ROWS = 64, OTHER_ROWS = 512, PIECE = 64, ERRORS = MOEC_GGUF_ERRORS, SUMS = ERRORS + 1, NORM_ROWS = 256 };

typedef struct inputs {
    moec_gguf_measuring *u;
    moec_pass *pass;
    int64_t at[MOEC_MAT_COUNT]; /* where a matrix's squares stand; -1: it is not shown, or nobody asks */
    int64_t n;                  /* of the unit */
    double *square;             /* [n] */
    double *part;               /* [workers][most] of the chunk that a worker has */
    int64_t most;
} inputs;

/* --- mean squares -------------------------------------------------------------------------------------------------------- */

static moec_status take(void *ctx, int worker, const moec_chunk *c, moec_mat which, const float *panels, int64_t at, int64_t n,
                        int64_t cols, moec_err *err)
{
    const inputs *v = ctx;
    (void)c;
    (void)at;
    (void)err;
    if (v->at[which] < 0)
        return MOEC_OK;
    double *to = v->part + worker * v->most + v->at[which];
    for (int64_t t = 0; t < n; t += MOEC_PANEL, panels += cols * MOEC_PANEL) {
        const int64_t lanes = n - t < MOEC_PANEL ? n - t : MOEC_PANEL;
        for (int64_t i = 0; i < cols; i++) {
            const float *x = panels + i * MOEC_PANEL;
            double sum = 0.0;
            for (int64_t j = 0; j < lanes; j++)
                sum += (double)x[j] * (double)x[j];
            to[i] += sum;
        }
    }
    return MOEC_OK;
}

static moec_status add_chunk(void *ctx, int worker, const moec_chunk *c, moec_err *err)
{
    const inputs *v = ctx;
    double *part = v->part + worker * v->most;
    (void)err;
    for (int64_t i = 0; i < v->n; i++) {
        v->square[i] += v->u->weight[c->domain] * part[i];
        part[i] = 0.0;
    }
    return MOEC_OK;
}

/* Sums become means. */
static void divide(const inputs *v)
{
    double weight = 0.0;
    for (int64_t i = 0; i < v->pass->n_chunks; i++)
        weight += v->u->weight[v->pass->chunk[i].domain] * (double)v->pass->chunk[i].n;
    for (int64_t i = 0; i < v->n; i++)
        v->square[i] /= weight;
}

static void begin_unit(inputs *v, int64_t unit)
{
    const moec_gguf_measuring *u = v->u;
    v->n = u->squares[unit];
    memset(v->square, 0, (size_t)v->n * sizeof *v->square);
    int64_t at = 0;
    for (moec_mat k = 0; unit < u->m->dims.layers && k < MOEC_MAT_COUNT; k++) {
        const moec_weight *w = &u->m->layer[unit].mat[k];
        v->at[k] = w->of ? at : -1;
        at += w->of ? w->cols : 0;
    }
}

static moec_status run_layer(inputs *v, int64_t layer, moec_err *err)
{
    begin_unit(v, layer);
    const moec_status st = moec_pass_layer_inputs(v->pass, layer, take, add_chunk, v, err);
    divide(v);
    return st;
}

/* What the head multiplies: normed states behind the last layer. */
static moec_status run_head(inputs *v, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t H = v->u->m->dims.hidden;
    moec_final *f = NULL;
    float *x = NULL;
    begin_unit(v, v->u->m->dims.layers);
    MOEC_TRY(moec__final_lend(&f, v->pass, err));
    MOEC_TRY(MOEC_NEW(x, (size_t)(NORM_ROWS * H), err));
    for (int64_t i = 0; i < v->pass->n_chunks; i++) {
        const moec_chunk *c = &v->pass->chunk[i];
        for (int64_t at = 0; at < c->n; at += NORM_ROWS) {
            const int64_t n = c->n - at < NORM_ROWS ? c->n - at : NORM_ROWS;
            MOEC_TRY(moec__final_rows(x, f, c->token + at, n, err));
            for (int64_t t = 0; t < n; t++)
                for (int64_t j = 0; j < H; j++)
                    v->part[j] += (double)x[t * H + j] * (double)x[t * H + j];
        }
        MOEC_TRY(add_chunk(v, 0, c, err));
    }
    divide(v);
done:
    moec_free(x);
    moec_final_free(f);
    return st;
}

/* --- errors -------------------------------------------------------------------------------------------------------------- */

/* Sampled rows first, first + step, ..: n of them of one tensor. */
typedef struct piece {
    size_t row;
    int64_t first, step, n;
} piece;

typedef struct errors {
    const moec_gguf_measuring *u;
    const double *square;
    piece *piece;
    double *sum; /* [pieces][SUMS] error of each type and probe, and sum of importance w^2 */
    size_t n, cap;
} errors;

/* Of `rows` rows from `from` on, about `most` in even steps. */
static moec_status sample(errors *a, size_t row, int64_t from, int64_t rows, int64_t most, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t n = rows < most ? rows : most, step = n > 0 ? rows / n : 1;
    for (int64_t at = 0; at < n; at += PIECE) {
        MOEC_TRY(MOEC_GROW(a->piece, a->cap, a->n + 1, err));
        a->piece[a->n++] = (piece){row, from + at * step, step, n - at < PIECE ? n - at : PIECE};
    }
done:
    return st;
}

/* Room of a piece. */
typedef struct bench {
    float *w, *q, *importance; /* [PIECE,cols] [PIECE,cols] [PIECE,cols] */
    void *bytes;               /* a row in a block type */
} bench;

static void add_errors(double *sum, const bench *b, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        const double d = (double)b->w[i] - (double)b->q[i];
        *sum += (double)b->importance[i] * d * d;
    }
}

static moec_status all_types(double *sum, const bench *b, int64_t rows, int64_t cols, bool weighted, moec_err *err)
{
    moec_status st = MOEC_OK;
    for (moec_block type = 0; type < MOEC_BLOCK_COUNT; type++) {
        if (moec_blocks_bytes(type, cols) < 0) {
            sum[type] = (double)NAN;
            continue;
        }
        for (int64_t r = 0; r < rows; r++) {
            MOEC_TRY(moec_blocks_write(b->bytes, b->w + r * cols, weighted ? b->importance + r * cols : NULL, cols, type, err));
            MOEC_TRY(moec_blocks_read(b->q + r * cols, b->bytes, cols, type, err));
        }
        add_errors(&sum[type], b, rows * cols);
    }
    for (int p = 0; p < MOEC_PROBES; p++) {
        memcpy(b->q, b->w, (size_t)(rows * cols) * sizeof *b->q);
        MOEC_TRY(moec__gguf_probe_rows(b->q, rows, cols, p, err));
        add_errors(&sum[MOEC_BLOCK_COUNT + p], b, rows * cols);
    }
    memset(b->q, 0, (size_t)(rows * cols) * sizeof *b->q);
    add_errors(&sum[ERRORS], b, rows * cols);
done:
    return st;
}

/* Importance of row `at` of the piece's tensor. False: 1 everywhere. */
static bool weigh(float *out, const errors *a, size_t row, int64_t at, int64_t cols)
{
    const moec_gguf_row *r = &a->u->row[row];
    const float *expert = moec_gguf_importance_row(a->u->importance, r->tensor, at);
    for (int64_t i = 0; i < cols; i++)
        out[i] = expert ? expert[i] : r->squares >= 0 ? (float)a->square[r->squares + i] : 1.0f;
    return expert || r->squares >= 0;
}

static moec_status measure_pieces(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const errors *a = ctx;
    moec_status st = MOEC_OK;
    const size_t room = (size_t)(PIECE * a->u->most_cols);
    bench b = {0};
    (void)worker;
    MOEC_TRY(MOEC_NEW(b.w, room, err));
    MOEC_TRY(MOEC_NEW(b.q, room, err));
    MOEC_TRY(MOEC_NEW(b.importance, room, err));
    MOEC_TRY(moec_alloc(&b.bytes, (size_t)a->u->most_cols, sizeof(float), err));
    for (int64_t i = lo; i < hi; i++) {
        const piece *p = &a->piece[i];
        const moec_gguf_source *s = moec__gguf_source(a->u, p->row);
        const int64_t cols = s->what.dim[0];
        bool weighted = false;
        MOEC_TRY(moec_interrupted(err));
        for (int64_t r = 0; r < p->n; r++) {
            const int64_t at = p->first + r * p->step;
            MOEC_TRY(moec_gguf_model_read(b.w + r * cols, a->u->x, a->u->row[p->row].tensor, at, at + 1, err));
            weighted = weigh(b.importance + r * cols, a, p->row, at, cols);
        }
        MOEC_TRY(moec_within(err, all_types(a->sum + i * SUMS, &b, p->n, cols, weighted, err), "%s", s->what.name));
    }
done:
    moec_free(b.w);
    moec_free(b.q);
    moec_free(b.importance);
    moec_free(b.bytes);
    return st;
}

/* Of one unit's rows, to error [rows][ERRORS]. */
static moec_status measure_unit(double *error, const inputs *v, int64_t unit, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_gguf_measuring *u = v->u;
    errors a = {.u = u, .square = v->square};
    const size_t first = u->first[unit], rows = u->rows[unit];
    double *sum = NULL;
    for (size_t i = first; i < first + rows; i++) {
        const moec_gguf_source *s = moec__gguf_source(u, i);
        const int64_t each = s->what.dim[1], n = s->what.dim[2];
        for (int64_t e = 0; s->kind == MOEC_GGUF_STACK && e < n; e++)
            MOEC_TRY(sample(&a, i, e * each, each, EXPERT_ROWS, err));
        if (s->kind != MOEC_GGUF_STACK)
            MOEC_TRY(sample(&a, i, 0, each * n, OTHER_ROWS, err));
    }
    MOEC_TRY(MOEC_NEW(a.sum, a.n * SUMS, err));
    MOEC_TRY(MOEC_NEW(sum, rows * SUMS, err));
    MOEC_TRY(moec_par_for((int64_t)a.n, 1, measure_pieces, &a, err));
    for (size_t i = 0; i < a.n; i++)
        for (int k = 0; k < SUMS; k++)
            sum[(a.piece[i].row - first) * SUMS + (size_t)k] += a.sum[i * SUMS + (size_t)k];
    for (size_t i = 0; i < rows; i++)
        for (size_t k = 0; k < ERRORS; k++) {
            const double lost = sum[i * SUMS + k], whole = sum[i * SUMS + ERRORS];
            error[i * ERRORS + k] = whole > 0.0 || isnan(lost) ? lost / whole : 0.0;
        }
done:
    moec_free(sum);
    moec_free(a.sum);
    moec_free(a.piece);
    return st;
}

static moec_status record(const inputs *v, int64_t unit, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_gguf_measuring *u = v->u;
    double *error = NULL;
    char square_name[64], error_name[64], file[64];
    MOEC_TRY(MOEC_NEW(error, u->rows[unit] * ERRORS, err));
    MOEC_TRY(measure_unit(error, v, unit, err));
    moec__gguf_names(square_name, file, "square", unit);
    moec__gguf_names(error_name, file, "error", unit);
    const moec_measured r[] = {{square_name, v->square, 1, {v->n}}, {error_name, error, 2, {(int64_t)u->rows[unit], ERRORS}}};
    st = moec__measure_record(u->work.weights, file, r, 2, err);
done:
    moec_free(error);
    return st;
}

/* --- the pass ------------------------------------------------------------------------------------------------------------ */

static void drop_tensor(void *ctx, const moec_model *m, const moec_tensor *t)
{
    (void)ctx;
    (void)m;
    moec_pages_drop(t->data, t->bytes);
}

static moec_status make_room(inputs *v, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_gguf_measuring *u = v->u;
    moec_pass_opts o = {.compute = u->o->compute, .max_memory = u->o->max_memory, .what = "inputs"};
    for (int64_t unit = 0; unit <= u->m->dims.layers; unit++)
        v->most = u->squares[unit] > v->most ? u->squares[unit] : v->most;
    o.worker_bytes = (size_t)v->most * sizeof(double);
    o.fixed_bytes = (size_t)v->most * sizeof(double) + (size_t)moec_par_threads() * (size_t)(4 * PIECE * u->most_cols) * sizeof(float);
    MOEC_TRY(moec_pass_new(&v->pass, u->m, u->corpus, &o, err));
    MOEC_TRY(MOEC_NEW(v->square, (size_t)v->most, err));
    MOEC_TRY(MOEC_NEW(v->part, (size_t)v->most * (size_t)v->pass->plan.workers, err));
done:
    return st;
}

static moec_status run(inputs *v, int64_t units, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_gguf_measuring *u = v->u;
    const int64_t L = u->m->dims.layers;
    MOEC_TRY(make_room(v, err));
    moec_pass_begin(v->pass, 0);
    MOEC_TRY(moec_pass_embed(v->pass, err));
    for (int64_t l = 0; l < units && l < L; l++) {
        if (moec__gguf_done(u, l, false)) {
            st = moec_pass_layer(v->pass, l, NULL, NULL, NULL, err);
        } else {
            st = run_layer(v, l, err);
            if (st == MOEC_OK)
                st = record(v, l, err);
            moec_layer_each(u->m, l, drop_tensor, NULL);
        }
        MOEC_TRY(moec_work_interrupted(st, "errors", l, u->m->dims.layers, err));
    }
    if (units > L) {
        MOEC_TRY(run_head(v, err));
        MOEC_TRY(moec_work_interrupted(record(v, L, err), "errors", L, u->m->dims.layers, err));
    }
    moec_pass_end(v->pass);
done:
    return st;
}

moec_status moec__gguf_errors(moec_gguf_measuring *u, moec_err *err)
{
    inputs v = {.u = u};
    int64_t units = 0; /* up to the last that is not done */
    for (int64_t unit = 0; unit <= u->m->dims.layers; unit++)
        units = moec__gguf_done(u, unit, false) ? units : unit + 1;
    const moec_status st = units > 0 ? run(&v, units, err) : MOEC_OK;
    moec_pass_free(v.pass);
    moec_free(v.square);
    moec_free(v.part);
    return st;
}
