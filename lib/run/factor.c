/* See factor.h. */
#include "run/factor.h"

#include "base/mem.h"
#include "base/par.h"
#include "base/version.h"
#include "num/linalg.h"
#include "num/vec.h"
#include "run/preview.h"
#include "run/selected.h"
#include "run/work.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { BLOCK = 256, RECORD = 1 << 16 }; /* tokens whose Gram matrix is one product; bytes of a record at most */
static const double DAMP = 0.5; /* of the demo model's held-out KL; 0.2 to 1 are alike */
static const uint32_t matrices = MOEC_PART_GATE | MOEC_PART_UP | MOEC_PART_DOWN;

struct moec_factoring {
    moec_work work;
    int64_t unseen;
};

typedef struct run {
    const moec_model *m;
    moec_plan *p;
    moec_plan dense, kept; /* the plan with products, with factors: what it says of tensors */
    moec_forms forms, extra;
    const moec_factor_opts *o;
    moec_factoring *f;
    moec_pass *pass;       /* NULL: no text */
    int64_t n, slots;
    float *x;              /* [n,H] */
    int32_t *ids;          /* [n,slots] */
    float *gates;
    int64_t *first;        /* [E+1] the layer's selections by expert: */
    int32_t *token;        /* [n slots] */
    float *gate;
    double *lost, *whole;  /* [E,3] of the layer's experts */
    moec_factor_shape shape[2]; /* gate and up, down */
    moec_factor_piece piece[2][MOEC_FACTOR_PIECES];
    int pieces[2];
    float *base[3];        /* base-delta */
    const moec_layer *l;
    const moec_tensor *at[3][MOEC_FACTOR_PIECES]; /* the layer's factors, all experts' */
    moec_draft draft;
    moec_progress progress;
} run;

static int64_t hidden_of(const run *u)
{
    return u->m->dims.hidden;
}

static int64_t width_of(const run *u)
{
    return u->m->dims.expert_width;
}

/* --- tokens ---------------------------------------------------------------------------------------------------------- */

static moec_status see(void *ctx, int worker, const moec_chunk *c, const moec_moe_view *v, moec_err *err)
{
    run *u = ctx;
    const int64_t H = hidden_of(u);
    (void)worker;
    (void)err;
    memcpy(u->x + c->token * H, v->x, (size_t)(v->n * H) * sizeof *u->x);
    memcpy(u->ids + c->token * u->slots, v->ids, (size_t)(v->n * u->slots) * sizeof *u->ids);
    memcpy(u->gates + c->token * u->slots, v->gates, (size_t)(v->n * u->slots) * sizeof *u->gates);
    return MOEC_OK;
}

/* sum g^2 of an expert's tokens. */
static double mass_of(const run *u, int64_t e)
{
    double sum = 0.0;
    for (int64_t i = u->pass ? u->first[e] : 0; u->pass && i < u->first[e + 1]; i++)
        sum += (double)u->gate[i] * (double)u->gate[i];
    return sum;
}

/* --- an expert ------------------------------------------------------------------------------------------------------- */

/* What a worker needs for one. */
typedef struct bench {
    float *w[3], *back, *x, *act, *up, *gram, *bias, *piece[MOEC_FACTOR_PIECES];
    int32_t *index;
    double *in, *mid; /* [H,H] [I,I] C of gate and up, of down */
    double more[2];   /* what their diagonals have besides */
} bench;

static int64_t larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static void bench_release(bench *b)
{
    for (int k = 0; k < 3; k++)
        moec_free(b->w[k]);
    for (int k = 0; k < MOEC_FACTOR_PIECES; k++)
        moec_free(b->piece[k]);
    moec_free(b->back);
    moec_free(b->x);
    moec_free(b->act);
    moec_free(b->up);
    moec_free(b->gram);
    moec_free(b->bias);
    moec_free(b->index);
    moec_free(b->in);
    moec_free(b->mid);
}

/* `restore`: only what comes back is wanted. */
static moec_status bench_new(bench *b, const run *u, bool restore, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t H = hidden_of(u), I = width_of(u), most = larger(H, I);
    *b = (bench){.index = NULL};
    MOEC_TRY(MOEC_NEW(b->back, (size_t)(H * I), err));
    MOEC_TRY(MOEC_NEW(b->index, (size_t)most, err));
    for (int i = 0; i < MOEC_FACTOR_PIECES; i++) {
        const int64_t in = i < u->pieces[0] ? moec_factor_piece_values(&u->piece[0][i]) : 0;
        const int64_t down = i < u->pieces[1] ? moec_factor_piece_values(&u->piece[1][i]) : 0;
        MOEC_TRY(MOEC_NEW(b->piece[i], (size_t)larger(in, down), err));
    }
    for (int k = 0; k < 3 && !restore; k++)
        MOEC_TRY(MOEC_NEW(b->w[k], (size_t)(H * I), err));
    if (restore || !u->pass)
        goto done;
    MOEC_TRY(MOEC_NEW(b->x, (size_t)(BLOCK * H), err));
    MOEC_TRY(MOEC_NEW(b->act, (size_t)(BLOCK * I), err));
    MOEC_TRY(MOEC_NEW(b->up, (size_t)(BLOCK * I), err));
    MOEC_TRY(MOEC_NEW(b->gram, (size_t)(most * most), err));
    MOEC_TRY(MOEC_NEW(b->bias, (size_t)(2 * I), err));
    MOEC_TRY(MOEC_NEW(b->in, (size_t)(H * H), err));
    MOEC_TRY(MOEC_NEW(b->mid, (size_t)(I * I), err));
done:
    if (st != MOEC_OK)
        bench_release(b);
    return st;
}

static size_t bench_bytes(const moec_model *m)
{
    const size_t H = (size_t)m->dims.hidden, I = (size_t)m->dims.expert_width, most = H > I ? H : I, least = H + I - most;
    return (H * H + I * I + 5 * least * least + 8 * H * I) * sizeof(double) +
           (most * most + 6 * H * I + BLOCK * (H + 2 * I)) * sizeof(float);
}

/* c [n,n] += x^T x of `tokens` rows. */
static void add_gram(double *c, float *gram, const float *x, int64_t tokens, int64_t n)
{
    moec_sgemm(true, false, n, n, tokens, 1.0f, x, n, x, n, 0.0f, gram, n);
    for (int64_t i = 0; i < n * n; i++)
        c[i] += (double)gram[i];
}

static void scale_rows(float *x, const float *gate, int64_t tokens, int64_t n)
{
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < n; i++)
            x[t * n + i] *= gate[t];
}

/* Inputs of BLOCK tokens at most, and what they become between gate, up and down. */
static void add_block(const run *u, bench *b, int64_t e, int64_t at, int64_t tokens)
{
    const int64_t H = hidden_of(u), I = width_of(u);
    const bool on_input = u->m->family->weight_on_input;
    const float scale = (float)u->m->dims.input_scale, *gate = u->gate + at;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < H; i++)
            b->x[t * H + i] = u->x[u->token[at + t] * H + i] * scale;
    if (on_input)
        scale_rows(b->x, gate, tokens, H);
    moec_sgemm(false, true, tokens, I, H, 1.0f, b->x, H, b->w[0], H, 0.0f, b->act, I);
    moec_sgemm(false, true, tokens, I, H, 1.0f, b->x, H, b->w[1], H, 0.0f, b->up, I);
    if (u->l->gate_up_bias) {
        moec_expert_bias(b->bias, b->bias + I, u->m, u->l, e);
        for (int64_t t = 0; t < tokens; t++) {
            moec_add(b->act + t * I, b->bias, I);
            moec_add(b->up + t * I, b->bias + I, I);
        }
    }
    moec_activate(b->act, b->up, tokens * I, u->m);
    if (!on_input) {
        scale_rows(b->x, gate, tokens, H);
        scale_rows(b->act, gate, tokens, I);
    }
    add_gram(b->in, b->gram, b->x, tokens, H);
    add_gram(b->mid, b->gram, b->act, tokens, I);
}

/* c /= mass, with `more` on the diagonal. *out: c, or NULL where its inputs are all 0 and say nothing. */
static moec_status finish_c(const double **out, double *more, double *c, int64_t n, double mass, moec_err *err)
{
    for (int64_t i = 0; mass > 0.0 && i < n * n; i++)
        c[i] /= mass;
    const double first = c[0];
    *out = moec_factor_damp(c, n, DAMP) ? c : NULL;
    *more = c[0] - first;
    for (int64_t i = 0; !*out && i < n; i++)
        if (!isfinite(c[i * n + i]))
            return moec_fail(err, MOEC_ENUMERIC, "an activation is not finite");
    return MOEC_OK;
}

/* C of gate and up, and of down; NULL: nothing is known. */
static moec_status covariances(const double **in, const double **mid, const run *u, bench *b, int64_t e, moec_err *err)
{
    const int64_t H = hidden_of(u), I = width_of(u);
    *in = *mid = NULL;
    if (!u->pass || u->first[e] == u->first[e + 1])
        return MOEC_OK;
    memset(b->in, 0, (size_t)(H * H) * sizeof *b->in);
    memset(b->mid, 0, (size_t)(I * I) * sizeof *b->mid);
    for (int64_t at = u->first[e]; at < u->first[e + 1]; at += BLOCK)
        add_block(u, b, e, at, u->first[e + 1] - at < BLOCK ? u->first[e + 1] - at : BLOCK);
    const double mass = mass_of(u, e);
    moec_status st = finish_c(in, &b->more[0], b->in, H, mass, err);
    return st == MOEC_OK ? finish_c(mid, &b->more[1], b->mid, I, mass, err) : st;
}

/* An expert's part of a factor tensor, as one row. */
static moec_weight part_of(const run *u, int matrix, int piece, int64_t e)
{
    const moec_factor_piece *p = &u->piece[matrix == 2][piece];
    const int64_t n = moec_factor_piece_values(p);
    return (moec_weight){.of = u->at[matrix][piece], .rows = 1, .cols = n, .at = p->shared ? 0 : e * n, .row_step = n,
                         .col_step = 1, .storage = MOEC_PLAIN};
}

/* Values as their tensors hold them. */
static void read_parts(const run *u, bench *b, int matrix, int64_t e)
{
    for (int i = 0; i < u->pieces[matrix == 2]; i++) {
        const moec_weight to = part_of(u, matrix, i, e);
        if (u->piece[matrix == 2][i].index)
            memcpy(b->index, (const int32_t *)u->at[matrix][i]->data + to.at, (size_t)to.cols * sizeof *b->index);
        else
            moec_weight_read(b->piece[i], to.cols, &to, 0, 1, 0, to.cols);
    }
}

static moec_status write_parts(const run *u, const bench *b, int matrix, int64_t e, moec_err *err)
{
    moec_status st = MOEC_OK;
    for (int i = 0; st == MOEC_OK && i < u->pieces[matrix == 2]; i++) {
        const moec_weight to = part_of(u, matrix, i, e);
        if (u->piece[matrix == 2][i].index)
            memcpy((int32_t *)(uintptr_t)u->at[matrix][i]->data + to.at, b->index, (size_t)to.cols * sizeof *b->index);
        else if (!u->piece[matrix == 2][i].shared)
            st = moec_weight_write(&to, b->piece[i], to.cols, 0, 1, 0, to.cols, err);
    }
    return st;
}

/* Errors by C alone. */
static moec_status measure(run *u, const bench *b, int matrix, int64_t e, const double *c, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_factor_shape *s = &u->shape[matrix == 2];
    double lost, whole, plain_lost = 0.0, plain_whole = 0.0;
    const double more = c ? b->more[matrix == 2] : 0.0;
    MOEC_TRY(moec_factor_error(&lost, &whole, b->w[matrix], b->back, c, s->rows, s->cols, err));
    if (c)
        MOEC_TRY(moec_factor_error(&plain_lost, &plain_whole, b->w[matrix], b->back, NULL, s->rows, s->cols, err));
    u->lost[3 * e + matrix] = fmax(lost - more * plain_lost, 0.0);
    u->whole[3 * e + matrix] = fmax(whole - more * plain_whole, 0.0);
done:
    return st;
}

static moec_status factor_matrix(run *u, bench *b, int matrix, int64_t e, const double *c, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_factor_shape *s = &u->shape[matrix == 2];
    if (u->base[matrix])
        memcpy(b->piece[2], u->base[matrix], (size_t)(s->rows * s->cols) * sizeof *b->piece[2]);
    MOEC_TRY(moec_factor_matrix(b->piece, b->index, s, b->w[matrix], c, err));
    MOEC_TRY(write_parts(u, b, matrix, e, err));
    read_parts(u, b, matrix, e);
    MOEC_TRY(moec_factor_restore(b->back, (const float *const *)b->piece, b->index, s, err));
    MOEC_TRY(measure(u, b, matrix, e, c, err));
    moec_progress_step(&u->progress, 1);
done:
    return st;
}

static moec_status factor_experts(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    run *u = ctx;
    bench b;
    moec_status st = bench_new(&b, u, false, err);
    (void)worker;
    if (st != MOEC_OK)
        return st;
    for (int64_t e = lo; e < hi; e++) {
        const moec_mlp *x = &u->l->expert[e];
        const moec_weight *const w[] = {&x->gate, &x->up, &x->down};
        MOEC_TRY(moec_interrupted(err));
        for (int k = 0; k < 3; k++) {
            MOEC_TRY(moec_weight_read_all(b.w[k], w[k], err));
            moec_weight_drop(w[k]);
        }
        const double *in, *mid;
        MOEC_TRY(covariances(&in, &mid, u, &b, e, err));
        MOEC_TRY(factor_matrix(u, &b, 0, e, in, err));
        MOEC_TRY(factor_matrix(u, &b, 1, e, in, err));
        MOEC_TRY(factor_matrix(u, &b, 2, e, mid, err));
    }
done:
    bench_release(&b);
    return st == MOEC_OK ? st : moec_within(err, st, "layer %lld: expert %lld", (long long)u->l->index, (long long)lo);
}

/* --- base ------------------------------------------------------------------------------------------------------------ */

enum { BAND = 64 };

/* Band lo of rows of a layer's three bases. */
static moec_status mean_rows(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    run *u = ctx;
    moec_status st = MOEC_OK;
    const int64_t bands = (larger(hidden_of(u), width_of(u)) + BAND - 1) / BAND, matrix = lo / bands, r = lo % bands * BAND;
    const moec_factor_shape *s = &u->shape[matrix == 2];
    const int64_t cols = s->cols, rows = s->rows - r < BAND ? s->rows - r : BAND;
    double *sum = NULL, total = 0.0, all = 0.0;
    float *buf = NULL;
    (void)worker;
    (void)hi;
    if (rows <= 0)
        return MOEC_OK;
    MOEC_TRY(MOEC_NEW(sum, (size_t)(rows * cols), err));
    MOEC_TRY(MOEC_NEW(buf, (size_t)(rows * cols), err));
    for (int64_t e = 0; e < u->m->dims.experts; e++)
        all += mass_of(u, e);
    for (int64_t e = 0; e < u->m->dims.experts; e++) {
        const double mass = all > 0.0 ? mass_of(u, e) : 1.0;
        if (mass <= 0.0)
            continue;
        moec_weight_read(buf, cols, moec_mlp_matrix(&u->l->expert[e], matrix), r, rows, 0, cols);
        for (int64_t i = 0; i < rows * cols; i++)
            sum[i] += mass * (double)buf[i];
        total += mass;
    }
    for (int64_t i = 0; i < rows * cols; i++)
        buf[i] = (float)(sum[i] / total);
    const moec_weight to = {.of = u->at[matrix][2], .rows = s->rows, .cols = cols, .row_step = cols, .col_step = 1,
                            .storage = MOEC_PLAIN};
    MOEC_TRY(moec_weight_write(&to, buf, cols, r, rows, 0, cols, err));
    moec_weight_read(u->base[matrix] + r * cols, cols, &to, r, rows, 0, cols);
done:
    moec_free(sum);
    moec_free(buf);
    return st;
}

static moec_status make_bases(run *u, moec_err *err)
{
    if (u->p->factor.kind != MOEC_FACTOR_BASE)
        return MOEC_OK;
    return moec_par_for(3 * ((larger(hidden_of(u), width_of(u)) + BAND - 1) / BAND), 1, mean_rows, u, err);
}

/* --- a layer --------------------------------------------------------------------------------------------------------- */

static moec_json *say_factors(const run *u, int64_t set)
{
    moec_json *o = moec_json_new_object();
    int64_t unseen = 0;
    for (int64_t e = 0; u->pass && e < u->m->dims.experts; e++)
        unseen += u->first[e] == u->first[e + 1];
    moec_json_set(o, "unseen", moec_json_new_int(unseen));
    moec_json_set(o, "error", moec_json_new_reals(u->p->factor.error + 3 * set, 3));
    return o;
}

static moec_status take_factors(run *u, int64_t set, const char *file, const char *name, moec_err *err)
{
    moec_json *v;
    int64_t unseen = 0;
    moec_status st = moec_work_record_read(&v, &u->f->work, name, RECORD, file, err);
    bool good = moec_json_int(moec_json_get(v, "unseen"), &unseen) && unseen >= 0 && unseen <= u->m->dims.experts;
    for (size_t k = 0; k < 3; k++)
        good = good && moec_json_real(moec_json_at(moec_json_get(v, "error"), k), &u->p->factor.error[3 * (size_t)set + k]);
    if (st == MOEC_OK && !good)
        st = moec_fail(err, MOEC_EFORMAT, "%s/%s: damaged; --no-resume begins anew", u->f->work.folder.dir, name);
    u->f->unseen += unseen;
    moec_json_free(v);
    return st;
}

static moec_status take_dense(const run *u, const char *file, const char *name, moec_err *err)
{
    moec_json *v;
    const moec_status st = moec_work_record_read(&v, &u->f->work, name, RECORD, file, err);
    moec_json_free(v);
    return st;
}

/* Where the layer's factors are: in a sheet that is being made (not NULL), or in the folder. */
static moec_status find_factors(run *u, int64_t set, const moec_sheet *sheet, moec_err *err)
{
    moec_status st = MOEC_OK;
    size_t n = 0;
    for (size_t i = 0; st == MOEC_OK && i < u->extra.n_extra; i++) {
        const moec_extra *x = &u->extra.extra[i];
        if (x->set != set)
            continue;
        if (sheet)
            u->at[x->matrix][x->piece] = moec_sheet_at(sheet, n++);
        else
            st = moec_override_get(&u->at[x->matrix][x->piece], u->f->work.weights, x->key, x->form.dtype, x->form.rank,
                                   x->form.dim, err);
    }
    return st;
}

static moec_status make_factors(run *u, int64_t set, const char *file, const char *record, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_tensor t[3 * MOEC_FACTOR_PIECES];
    moec_sheet *sheet = NULL;
    size_t n = 0;
    for (size_t i = 0; i < u->extra.n_extra; i++) {
        const moec_extra *x = &u->extra.extra[i];
        if (x->set != set)
            continue;
        t[n] = (moec_tensor){.name = x->key, .dtype = x->form.dtype, .rank = x->form.rank, .bytes = (size_t)x->form.bytes};
        memcpy(t[n++].dim, x->form.dim, sizeof x->form.dim);
    }
    MOEC_TRY(moec_sheet_new(&sheet, u->f->work.weights, file, t, n, err));
    MOEC_TRY(find_factors(u, set, sheet, err));
    if (u->pass)
        moec__selected_sort(u->first, u->token, u->gate, u->ids, u->gates, u->n, u->slots, u->m->dims.experts);
    MOEC_TRY(make_bases(u, err));
    MOEC_TRY(moec_par_for(u->m->dims.experts, 1, factor_experts, u, err));
    for (int k = 0; k < 3; k++) {
        double lost = 0.0, whole = 0.0;
        for (int64_t e = 0; e < u->m->dims.experts; e++) {
            lost += u->lost[3 * e + k];
            whole += u->whole[3 * e + k];
        }
        u->p->factor.error[3 * set + k] = whole > 0.0 ? lost / whole : 0.0;
    }
    MOEC_TRY(moec_work_record_write(&u->f->work, say_factors(u, set), sheet, record, err));
    st = moec_sheet_commit(sheet, u->f->work.weights, err);
    sheet = NULL;
done:
    moec_sheet_discard(sheet);
    return st;
}

static moec_status restore_experts(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    run *u = ctx;
    bench b;
    moec_status st = bench_new(&b, u, true, err);
    (void)worker;
    if (st != MOEC_OK)
        return st;
    for (int64_t e = lo; e < hi; e++) {
        const moec_mlp *x = &u->draft.expert[e];
        const moec_weight *const w[] = {&x->gate, &x->up, &x->down};
        MOEC_TRY(moec_interrupted(err));
        for (int k = 0; k < 3; k++) {
            read_parts(u, &b, k, e);
            MOEC_TRY(moec_factor_restore(b.back, (const float *const *)b.piece, b.index, &u->shape[k == 2], err));
            MOEC_TRY(moec_weight_write(w[k], b.back, w[k]->cols, 0, w[k]->rows, 0, w[k]->cols, err));
            moec_weight_drop(w[k]);
        }
    }
done:
    bench_release(&b);
    return st;
}

static moec_status make_dense(run *u, int64_t set, const char *file, const char *record, moec_err *err)
{
    moec_status st = MOEC_OK;
    MOEC_TRY(find_factors(u, set, NULL, err));
    MOEC_TRY(moec_draft_new(&u->draft, u->f->work.weights, file, u->m, &u->dense, &u->forms, set, matrices, err));
    MOEC_TRY(moec_par_for(u->m->dims.experts, 1, restore_experts, u, err));
    MOEC_TRY(moec_work_record_write(&u->f->work, moec_json_new_object(), u->draft.sheet, record, err));
    moec_sheet *sheet = u->draft.sheet;
    u->draft.sheet = NULL;
    MOEC_TRY(moec_sheet_commit(sheet, u->f->work.weights, err));
done:
    moec_draft_release(&u->draft);
    return st;
}

static moec_status run_layer(run *u, int64_t layer, moec_err *err)
{
    moec_status st = MOEC_OK;
    char factors[64], record[64], dense[64], dense_record[64];
    u->l = &u->m->layer[layer];
    moec_work_file_name(factors, layer, "-factors.safetensors");
    moec_work_file_name(record, layer, "-factors.json");
    moec_work_file_name(dense, layer, ".safetensors");
    moec_work_file_name(dense_record, layer, ".json");
    const bool moe = u->l->expert != NULL, done = moe && moec_override_has(u->f->work.weights, factors);
    if (u->pass)
        MOEC_TRY(moec_pass_layer(u->pass, layer, moe && !done ? see : NULL, NULL, u, err));
    if (!moe)
        goto done;
    if (!done)
        MOEC_TRY(make_factors(u, u->l->moe_index, factors, record, err));
    else
        moec_progress_step(&u->progress, 3 * (uint64_t)u->m->dims.experts);
    MOEC_TRY(take_factors(u, u->l->moe_index, factors, record, err));
    st = moec_override_has(u->f->work.weights, dense) ? take_dense(u, dense, dense_record, err)
                                                      : make_dense(u, u->l->moe_index, dense, dense_record, err);
done:
    return st;
}

/* --- all of it ------------------------------------------------------------------------------------------------------- */

static moec_pass_opts pass_opts(const run *u)
{
    const size_t tokens = (size_t)(u->n * (hidden_of(u) + 4 * u->slots)) * sizeof(float);
    return (moec_pass_opts){.compute = u->o->compute, .watch = true, .max_memory = u->o->max_memory, .what = "factor",
                            .fixed_bytes = tokens + (size_t)moec_par_threads() * bench_bytes(u->m)};
}

static moec_status make_room(run *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    const size_t n = (size_t)u->n, H = (size_t)hidden_of(u), I = (size_t)width_of(u), E = (size_t)u->m->dims.experts;
    const size_t picks = n * (size_t)u->slots;
    MOEC_TRY(MOEC_NEW(u->lost, 3 * E, err));
    MOEC_TRY(MOEC_NEW(u->whole, 3 * E, err));
    for (int k = 0; u->p->factor.kind == MOEC_FACTOR_BASE && k < 3; k++)
        MOEC_TRY(MOEC_NEW(u->base[k], H * I, err));
    if (!u->o->corpus)
        return MOEC_OK;
    const moec_pass_opts o = pass_opts(u);
    MOEC_TRY(moec_pass_new(&u->pass, u->m, u->o->corpus, &o, err));
    MOEC_TRY(MOEC_NEW(u->x, n * H, err));
    MOEC_TRY(MOEC_NEW(u->ids, picks, err));
    MOEC_TRY(MOEC_NEW(u->gates, picks, err));
    MOEC_TRY(MOEC_NEW(u->token, picks, err));
    MOEC_TRY(MOEC_NEW(u->gate, picks, err));
    MOEC_TRY(MOEC_NEW(u->first, E + 1, err));
done:
    return st;
}

static void release(run *u)
{
    moec_progress_stop(&u->progress);
    moec_pass_free(u->pass);
    moec_forms_release(&u->forms);
    moec_forms_release(&u->extra);
    moec_draft_release(&u->draft);
    moec_free(u->x);
    moec_free(u->ids);
    moec_free(u->gates);
    moec_free(u->first);
    moec_free(u->token);
    moec_free(u->gate);
    moec_free(u->lost);
    moec_free(u->whole);
    for (int k = 0; k < 3; k++)
        moec_free(u->base[k]);
}

/* Everything that decides the result; whether factors are kept does not. */
static moec_status open_work(run *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *plan = NULL;
    moec_digest words = {""};
    MOEC_TRY(moec_plan_to_text(&plan, &u->kept, err));
    if (u->o->corpus)
        MOEC_TRY(moec_corpus_digest(&words, u->o->corpus, err));
    MOEC_TRY(moec_work_open(&u->f->work, u->o->work, u->o->resume, true, err, "factor 2 %s\n%s %d %d %g\n%s\n%s", moec_version(),
                            words.hex, (int)u->o->compute, BLOCK, DAMP, moec_ckpt_config_text(u->m->ckpt), plan));
done:
    moec_free(plan);
    return st;
}

static moec_status record(run *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_digest digest;
    if (u->o->corpus) {
        MOEC_TRY(moec_corpus_digest(&digest, u->o->corpus, err));
        MOEC_TRY(moec_plan_set_option(u->p, "text", moec_json_new_string(digest.hex), err));
        MOEC_TRY(moec_plan_set_option(u->p, "tokens", moec_json_new_int(u->n), err));
    }
    MOEC_TRY(moec_preview_digest(&digest, u->p, u->f->work.weights, err));
    snprintf(u->p->weights, sizeof u->p->weights, "%s", digest.hex);
done:
    return st;
}

static moec_status shapes(run *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    u->kept = u->dense = *u->p;
    u->kept.factor.kept = true;
    u->dense.factor.kept = false;
    for (int down = 0; down < 2; down++) {
        u->shape[down] = moec_factor_shape_of(&u->p->factor, u->m, down == 1);
        u->pieces[down] = moec_factor_pieces(u->piece[down], &u->shape[down]);
    }
    MOEC_TRY(moec_forms_new(&u->forms, u->m, &u->dense, err));
    MOEC_TRY(moec_forms_new(&u->extra, u->m, &u->kept, err));
done:
    return st;
}

moec_status moec_factoring_estimate(moec_work_cost *out, moec_plan *p, const moec_model *m, const moec_factor_opts *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    run u = {.m = m, .p = p, .o = o, .n = o->corpus ? moec_corpus_tokens(o->corpus) : 0, .slots = m->dims.slots};
    const moec_pass_opts po = pass_opts(&u);
    moec_pass_plan pass = {.bytes = moec_resident_memory() + po.fixed_bytes};
    uint64_t all, largest;
    *out = (moec_work_cost){.token_passes = (uint64_t)(u.n * m->dims.layers)};
    MOEC_TRY(shapes(&u, err));
    for (size_t i = 0; i < u.extra.n_extra; i++)
        out->disk += u.extra.extra[i].form.bytes;
    for (int64_t set = 0; set < m->moe_layers; set++) {
        MOEC_TRY(moec_draft_bytes(&all, &largest, m, &u.dense, &u.forms, set, matrices, err));
        out->disk += all;
    }
    if (o->corpus)
        MOEC_TRY(moec_pass_estimate(&pass, m, u.n, moec_pass_max_seq(o->corpus), &po, err));
    out->memory = pass.bytes;
done:
    release(&u);
    return st;
}

static moec_status begin(run *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    MOEC_TRY(shapes(u, err));
    MOEC_TRY(make_room(u, err));
    MOEC_TRY(open_work(u, err));
    if (!u->p->factor.error)
        MOEC_TRY(MOEC_NEW(u->p->factor.error, 3 * (size_t)u->p->n_layers, err));
    moec_progress_start(&u->progress, "factor", "matrices", 3 * (uint64_t)(u->m->moe_layers * u->m->dims.experts), 0);
    if (u->pass)
        MOEC_TRY(moec_pass_embed(u->pass, err));
done:
    return st;
}

moec_status moec_factoring_run(moec_factoring **out, moec_plan *p, const moec_model *m, const moec_factor_opts *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    run u = {.m = m, .p = p, .o = o, .n = o->corpus ? moec_corpus_tokens(o->corpus) : 0, .slots = m->dims.slots};
    *out = NULL;
    if (u.n > INT32_MAX)
        return moec_fail(err, MOEC_EINVAL, "factor: more than 2^31 tokens");
    MOEC_TRY(MOEC_NEW(u.f, 1, err));
    u.f->work.folder.lock = -1;
    MOEC_TRY(begin(&u, err));
    for (int64_t l = 0; l < m->dims.layers; l++)
        MOEC_TRY(moec_work_interrupted(run_layer(&u, l, err), NULL, l, m->dims.layers, err));
    MOEC_TRY(moec_ckpt_unchanged(m->ckpt, err));
    MOEC_TRY(record(&u, err));
    moec_progress_finish(&u.progress);
    *out = u.f;
    u.f = NULL;
done:
    release(&u);
    if (u.f)
        moec_work_abandon(&u.f->work);
    moec_free(u.f);
    return st;
}

const moec_override *moec_factoring_weights(const moec_factoring *f)
{
    return f->work.weights;
}

int64_t moec_factoring_unseen(const moec_factoring *f)
{
    return f->unseen;
}

moec_status moec_factoring_keep(moec_factoring *f, const char *dir, moec_err *err)
{
    return moec_work_keep(&f->work, dir, err);
}

void moec_factoring_close(moec_factoring *f, bool remove)
{
    if (f)
        moec_work_close(&f->work, remove);
    moec_free(f);
}
