/* What it costs the model's output when one matrix of its GGUF alone stands on a probe's grid. */
#include "run/gguf_measure_parts.h"

#include "base/mem.h"
#include "base/par.h"
#include "run/suffix.h"

#include <math.h>
#include <string.h>

enum { ROWS = 256 }; /* of a matrix that are rounded at a time */

typedef struct probing {
    moec_gguf_measuring *u;
    moec_corpus part;    /* the windows that are run */
    moec_suffix suffix;
    int64_t unit;
    size_t first;        /* row of the first variant; each has MOEC_PROBES of them */
    moec_sheet *sheet;   /* where a variant's matrix is written, in float32: memory need not hold it */
} probing;

/* --- a matrix on the grid ------------------------------------------------------------------------------------------------ */

/* What is rounded in blocks of rows: matrices that lie one behind the other in `to`. */
typedef struct rounding {
    const moec_gguf_source *s;
    const moec_dims *d;
    float *to;
    int64_t rows, cols, blocks; /* of one matrix */
    int probe;
} rounding;

static moec_status round_blocks(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const rounding *a = ctx;
    moec_status st = MOEC_OK;
    (void)worker;
    for (int64_t i = lo; i < hi; i++) {
        const int64_t e = i / a->blocks, r = i % a->blocks * ROWS, n = a->rows - r < ROWS ? a->rows - r : ROWS;
        const moec_weight *from = a->s->kind == MOEC_GGUF_STACK ? moec_mlp_matrix(&a->s->layer->expert[e], a->s->which) : &a->s->weight;
        float *w = a->to + (e * a->rows + r) * a->cols;
        MOEC_TRY(moec_interrupted(err));
        moec_weight_read(w, a->cols, from, r, n, 0, a->cols);
        moec_weight_drop(from);
        MOEC_TRY(moec__gguf_probe_rows(w, n, a->cols, a->probe, err));
        moec_pages_drop(w, (size_t)(n * a->cols) * sizeof *w);
    }
done:
    return st;
}

/* kv_b with one of its halves on the grid, head by head; the keys' as the GGUF has them, transposed. */
static moec_status round_heads(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const rounding *a = ctx;
    moec_status st = MOEC_OK;
    const int64_t n = a->d->nope_dim, v = a->d->value_dim, r = a->cols;
    float *turned = NULL;
    (void)worker;
    MOEC_TRY(MOEC_NEW(turned, (size_t)(n * r), err));
    for (int64_t h = lo; h < hi; h++) {
        float *w = a->to + h * (n + v) * r;
        moec_weight_read(w, r, &a->s->weight, h * (n + v), n + v, 0, r);
        if (a->s->kind == MOEC_GGUF_VALUE_B) {
            MOEC_TRY(moec__gguf_probe_rows(w + n * r, v, r, a->probe, err));
            continue;
        }
        for (int64_t i = 0; i < n * r; i++)
            turned[i % r * n + i / r] = w[i];
        MOEC_TRY(moec__gguf_probe_rows(turned, r, n, a->probe, err));
        for (int64_t i = 0; i < n * r; i++)
            w[i] = turned[i % r * n + i / r];
    }
done:
    moec_free(turned);
    return st;
}

static moec_status write_matrix(const probing *p, size_t row, int probe, const moec_tensor *to, moec_err *err)
{
    const moec_gguf_source *s = moec__gguf_source(p->u, row);
    const bool halves = s->kind == MOEC_GGUF_KEY_B || s->kind == MOEC_GGUF_VALUE_B;
    const int64_t last = to->dim[to->rank - 1], rows = to->dim[to->rank - 2];
    float *out = (float *)(uintptr_t)to->data; /* a sheet's data may be written */
    rounding a = {s, &p->u->m->dims, out, rows, last, (rows + ROWS - 1) / ROWS, probe};
    const int64_t items = halves ? a.d->heads : a.blocks * (to->rank == 3 ? to->dim[0] : 1);
    return moec_within(err, moec_par_for(items, 1, halves ? round_heads : round_blocks, &a, err), "%s", s->what.name);
}

/* --- a variant ----------------------------------------------------------------------------------------------------------- */

static moec_tensor shape_of(const probing *p, size_t row)
{
    const moec_gguf_source *s = moec__gguf_source(p->u, row);
    moec_tensor t = {.name = "probe", .dtype = MOEC_F32, .rank = 2};
    if (s->kind == MOEC_GGUF_STACK) {
        t.rank = 3;
        t.dim[0] = s->what.dim[2];
        t.dim[1] = s->what.dim[1];
        t.dim[2] = s->what.dim[0];
    } else {
        t.dim[0] = s->weight.rows;
        t.dim[1] = s->weight.cols;
    }
    t.bytes = sizeof(float);
    for (int i = 0; i < t.rank; i++)
        t.bytes *= (size_t)t.dim[i];
    return t;
}

static void put_experts(moec_layer *l, int which, const moec_tensor *t)
{
    for (int64_t e = 0; e < t->dim[0]; e++) {
        *moec_mlp_matrix(&l->expert[e], which) =
            (moec_weight){.of = t, .rows = t->dim[1], .cols = t->dim[2], .at = e * t->dim[1] * t->dim[2], .row_step = t->dim[2],
                          .col_step = 1, .storage = MOEC_PLAIN};
    }
}

static moec_status make(void *ctx, moec_variant *v, int number, moec_err *err)
{
    probing *p = ctx;
    moec_status st = MOEC_OK;
    const moec_model *m = p->u->m;
    const int probe = number % MOEC_PROBES;
    const size_t row = p->first + (size_t)(number / MOEC_PROBES);
    const moec_gguf_row *r = &p->u->row[row];
    const bool global = p->unit == m->dims.layers; /* those are read to the end: a sheet for all probes */
    char name[64], file[64];
    moec_tensor t[MOEC_PROBES];
    static const char *const names[] = {"probe.0", "probe.1"};
    if (!global || probe == 0) {
        moec_sheet_discard(p->sheet);
        p->sheet = NULL;
        for (int i = 0; i < MOEC_PROBES; i++) {
            t[i] = shape_of(p, row);
            t[i].name = names[i];
        }
        moec__gguf_names(name, file, "kl", p->unit);
        MOEC_TRY(moec_sheet_new(&p->sheet, p->u->work.weights, file, t, global ? MOEC_PROBES : 1, err));
    }
    const moec_tensor *to = moec_sheet_at(p->sheet, global ? (size_t)probe : 0);
    MOEC_TRY(write_matrix(p, row, probe, to, err));
    if (!global && r->mat == MOEC_MAT_COUNT)
        put_experts(&v->model.layer[p->unit], moec__gguf_source(p->u, row)->which, to);
    else if (!global)
        v->model.layer[p->unit].mat[r->mat] = moec_weight_of(to);
    else if (!r->head)
        v->model.embedding = moec_weight_of(to); /* the model's own may be in blocks */
    if (global && (r->head || m->dims.tied))
        v->model.head = moec_weight_of(to);
done:
    return st;
}

/* --- a unit -------------------------------------------------------------------------------------------------------------- */

/* Variants of `rows` rows from `first` on, which differ at `at`; nats a token to kl [rows][MOEC_PROBES]. */
static moec_status run_rows(double *kl, probing *p, size_t first, size_t rows, int64_t at, moec_err *err)
{
    moec_status st = MOEC_OK;
    const size_t D = (size_t)p->part.n_domains, n = rows * MOEC_PROBES;
    double *each = NULL;
    p->first = first;
    MOEC_TRY(MOEC_NEW(each, n * D, err));
    st = moec_suffix_run(each, &p->suffix, at, (int)n, make, p, err);
    moec_sheet_discard(p->sheet); /* its name is the record's */
    p->sheet = NULL;
    for (size_t i = 0; st == MOEC_OK && i < n; i++) {
        double sum = 0.0, weight = 0.0;
        for (size_t d = 0; d < D; d++) {
            const double w = p->u->weight[d] * moec_suffix_scored(&p->part.domain[d]);
            sum += w * each[i * D + d];
            weight += w;
        }
        kl[i] = weight > 0.0 ? sum / weight : 0.0;
    }
done:
    moec_free(each);
    return st;
}

static moec_status measure_unit(probing *p, int64_t unit, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_gguf_measuring *u = p->u;
    const int64_t L = u->m->dims.layers;
    const size_t first = u->first[unit], rows = u->rows[unit];
    double *kl = NULL;
    char name[64], file[64];
    p->unit = unit;
    MOEC_TRY(MOEC_NEW(kl, rows * MOEC_PROBES, err));
    if (unit < L)
        MOEC_TRY(run_rows(kl, p, first, rows, unit, err));
    for (size_t i = 0; unit == L && i < rows; i++)
        MOEC_TRY(run_rows(kl + i * MOEC_PROBES, p, first + i, 1, u->row[first + i].head ? L : MOEC_SUFFIX_EMBED, err));
    moec__gguf_names(name, file, "kl", unit);
    const moec_measured r = {name, kl, 2, {(int64_t)rows, MOEC_PROBES}};
    st = moec__measure_record(u->work.weights, file, &r, 1, err);
done:
    moec_free(kl);
    return st;
}

/* --- all of them --------------------------------------------------------------------------------------------------------- */

static moec_status prepare(probing *p, const moec_gguf_measuring *u, moec_err *err)
{
    const moec_dims *d = &u->m->dims;
    const int64_t head = (d->nope_dim + d->value_dim) * d->kv_rank, block = ROWS * u->most_cols;
    p->suffix = (moec_suffix){.m = u->m, .text = &p->part, .compute = u->o->compute, .max_memory = u->o->max_memory, .what = "kl",
                              .maker_bytes = (size_t)moec_par_threads() * (size_t)(head > block ? head : block) * 3 * sizeof(float)};
    return moec_suffix_part(&p->part, u->corpus, u->o->tokens, err);
}

moec_status moec__gguf_kl_fit(const moec_gguf_measuring *u, moec_err *err)
{
    probing p = {0};
    moec_status st = prepare(&p, u, err);
    if (st == MOEC_OK)
        st = moec_suffix_fit(&p.suffix, err);
    moec_free(p.part.domain);
    return st;
}

/* A token through a layer, of all variants: of one unit. */
static uint64_t work_of(const probing *p, int64_t unit)
{
    const moec_gguf_measuring *u = p->u;
    const int64_t L = u->m->dims.layers, tokens = moec_corpus_tokens(&p->part);
    return (uint64_t)(tokens * MOEC_PROBES * (unit < L ? (int64_t)u->rows[unit] * (L - unit) : L)); /* of the whole model the embedding */
}

static moec_status run(probing *p, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_gguf_measuring *u = p->u;
    const int64_t L = u->m->dims.layers;
    uint64_t all = 0, done = 0;
    int64_t layers = 0; /* up to the last that is not done */
    for (int64_t unit = 0; unit <= L; unit++) {
        all += work_of(p, unit);
        done += moec__gguf_done(u, unit, true) ? work_of(p, unit) : 0;
        layers = unit == L || moec__gguf_done(u, unit, true) ? layers : unit + 1;
    }
    if (done == all)
        return MOEC_OK;
    MOEC_TRY(moec_suffix_begin(&p->suffix, err));
    p->suffix.progress = &u->progress;
    moec_progress_start(&u->progress, "kl", "token-layers", all, done);
    if (!moec__gguf_done(u, L, true))
        MOEC_TRY(moec_work_interrupted(measure_unit(p, L, err), "KL", 0, u->m->dims.layers, err));
    for (int64_t l = 0; l < layers; l++) {
        st = moec__gguf_done(u, l, true) ? MOEC_OK : measure_unit(p, l, err);
        if (st == MOEC_OK && l + 1 < layers)
            st = moec_suffix_step(&p->suffix, l, err);
        MOEC_TRY(moec_work_interrupted(st, "KL", l, u->m->dims.layers, err));
    }
    moec_progress_finish(&u->progress);
done:
    moec_progress_stop(&u->progress);
    return st;
}

moec_status moec__gguf_kl(moec_gguf_measuring *u, moec_err *err)
{
    probing p = {.u = u};
    moec_status st = prepare(&p, u, err);
    if (st == MOEC_OK)
        st = run(&p, err);
    moec_suffix_end(&p.suffix);
    moec_free(p.part.domain);
    return st;
}
