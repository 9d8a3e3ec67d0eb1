/* See thin.h. */
#include "run/thin.h"

#include "base/file.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/opt.h"
#include "base/par.h"
#include "base/version.h"
#include "run/preview.h"
#include "run/work.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { BLOCK = 96 }; /* rows that are read at once: what transposed matrices are read fastest by */
static const uint32_t matrices = MOEC_PART_GATE | MOEC_PART_UP | MOEC_PART_DOWN;
static const double outlier = 5.0; /* M of OWL */

struct moec_thin {
    moec_work work;
    moec_thin_tally tally;
    uint64_t *zeros; /* [sets] */
};

/* One set at a time. */
typedef struct job {
    const moec_model *m;
    moec_plan *p;
    const moec_method *me;
    const moec_request *q;
    moec_forms forms;
    moec_thin *t;
    int64_t set;
    const moec_layer *l;
    moec_draft draft;
    double share;     /* of the set's weights */
    uint64_t *count;  /* [E] zeros; outliers */
    double *sum;      /* [E] of scores */
    double limit;     /* above it a score is an outlier */
    int64_t grain;    /* experts that a worker takes at once: as many workers as memory allows */
} job;

static int64_t larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* --- neurons --------------------------------------------------------------------------------------------------------- */

/* Squared norms of rows, or of columns. */
static void norms(double *out, const moec_weight *w, bool columns, float *buf)
{
    memset(out, 0, (size_t)(columns ? w->cols : w->rows) * sizeof *out);
    for (int64_t r = 0; r < w->rows; r += BLOCK) {
        const int64_t n = w->rows - r < BLOCK ? w->rows - r : BLOCK;
        moec_weight_read(buf, w->cols, w, r, n, 0, w->cols);
        for (int64_t i = 0; i < n; i++)
            for (int64_t c = 0; c < w->cols; c++)
                out[columns ? c : r + i] += (double)buf[i * w->cols + c] * (double)buf[i * w->cols + c];
    }
}

/* Rows keep[0..width-1] of a matrix. */
static moec_status take_rows(const moec_weight *to, const moec_weight *from, const int32_t *keep, float *buf, moec_err *err)
{
    moec_status st = MOEC_OK;
    int64_t done = 0;
    for (int64_t r = 0; st == MOEC_OK && r < from->rows; r += BLOCK) {
        const int64_t n = from->rows - r < BLOCK ? from->rows - r : BLOCK, cols = from->cols;
        int64_t kept = 0;
        moec_weight_read(buf, cols, from, r, n, 0, cols);
        for (; done + kept < to->rows && keep[done + kept] < r + n; kept++)
            memmove(buf + kept * cols, buf + (keep[done + kept] - r) * cols, (size_t)cols * sizeof *buf);
        st = moec_weight_write(to, buf, cols, done, kept, 0, cols, err);
        done += kept;
    }
    return st;
}

static moec_status take_columns(const moec_weight *to, const moec_weight *from, const int32_t *keep, float *buf, moec_err *err)
{
    moec_status st = MOEC_OK;
    for (int64_t r = 0; st == MOEC_OK && r < from->rows; r += BLOCK) {
        const int64_t n = from->rows - r < BLOCK ? from->rows - r : BLOCK;
        moec_weight_read(buf, from->cols, from, r, n, 0, from->cols);
        for (int64_t i = 0; i < n; i++)
            for (int64_t c = 0; c < to->cols; c++)
                buf[i * from->cols + c] = buf[i * from->cols + keep[c]]; /* keep[c] >= c */
        st = moec_weight_write(to, buf, from->cols, r, n, 0, to->cols, err);
    }
    return st;
}

/* Biases of gate and up lie as their columns do: in pairs, or first all of gate. */
static moec_status take_bias(const job *j, int64_t e, const int32_t *keep, float *buf, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t I = j->m->dims.expert_width, width = j->p->width;
    const bool pairs = j->l->layout == MOEC_LAYOUT_IN_OUT_PAIRS || j->l->layout == MOEC_LAYOUT_MXFP4_PAIRS;
    if (!j->draft.gate_up_bias)
        return MOEC_OK;
    const moec_weight from = moec_weight_of(j->l->gate_up_bias), to = moec_weight_of(j->draft.gate_up_bias);
    moec_weight_read(buf, 2 * I, &from, e, 1, 0, 2 * I);
    for (int64_t c = 0; st == MOEC_OK && c < width; c++)
        for (int64_t up = 0; st == MOEC_OK && up < 2; up++)
            st = moec_weight_write(&to, &buf[pairs ? 2 * keep[c] + up : up * I + keep[c]], 1, e, 1,
                                   pairs ? 2 * c + up : up * width + c, 1, err);
    return st;
}

static moec_status thin_expert(const job *j, int64_t e, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t H = j->m->dims.hidden, I = j->m->dims.expert_width;
    const moec_mlp *from = &j->l->expert[e], *to = &j->draft.expert[e];
    float *buf = NULL;
    double *norm = NULL, *score;
    int32_t *keep = NULL;
    bool seen;
    MOEC_TRY(MOEC_NEW(buf, (size_t)(BLOCK * larger(H, I)), err));
    MOEC_TRY(MOEC_NEW(norm, (size_t)(4 * I), err));
    MOEC_TRY(MOEC_NEW(keep, (size_t)j->p->width, err));
    score = norm + 3 * I;
    norms(norm, &from->gate, false, buf);
    norms(norm + I, &from->up, false, buf);
    norms(norm + 2 * I, &from->down, true, buf);
    MOEC_TRY(moec_neurons_score(score, &seen, j->me, j->q, j->set, e, norm, norm + I, norm + 2 * I, err));
    MOEC_TRY(moec_neurons_keep(keep, score, I, j->p->width, err));
    MOEC_TRY(take_rows(&to->gate, &from->gate, keep, buf, err));
    MOEC_TRY(take_rows(&to->up, &from->up, keep, buf, err));
    MOEC_TRY(take_columns(&to->down, &from->down, keep, buf, err));
    MOEC_TRY(take_bias(j, e, keep, buf, err));
done:
    moec_free(buf);
    moec_free(norm);
    moec_free(keep);
    return st;
}

/* --- weights --------------------------------------------------------------------------------------------------------- */

typedef struct inputs {
    double *in, *mid, *scratch; /* [H] [I] [2 max] */
    float *buf;
} inputs;

static moec_status inputs_new(inputs *x, const moec_model *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t H = m->dims.hidden, I = m->dims.expert_width;
    *x = (inputs){0};
    MOEC_TRY(MOEC_NEW(x->buf, (size_t)(BLOCK * larger(H, I)), err));
    MOEC_TRY(MOEC_NEW(x->in, (size_t)(H + I + 2 * larger(H, I)), err));
    x->mid = x->in + H;
    x->scratch = x->mid + I;
done:
    return st;
}

static void inputs_release(inputs *x)
{
    moec_free(x->buf);
    moec_free(x->in);
}

static moec_status cut_expert(const job *j, int64_t e, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_mlp *to = &j->draft.expert[e];
    const moec_weight *const w[] = {&to->gate, &to->up, &to->down};
    inputs x;
    bool seen;
    MOEC_TRY(inputs_new(&x, j->m, err));
    moec_weights_scales(x.in, x.mid, &seen, j->me, j->q, j->set, e);
    for (size_t k = 0; k < MOEC_COUNT(w); k++)
        for (int64_t r = 0; r < w[k]->rows; r += BLOCK) {
            const int64_t n = w[k]->rows - r < BLOCK ? w[k]->rows - r : BLOCK, cols = w[k]->cols;
            moec_weight_read(x.buf, cols, w[k], r, n, 0, cols);
            for (int64_t i = 0; i < n; i++)
                (void)moec_weights_cut(x.buf + i * cols, cols, k == 2 ? x.mid : x.in, j->share, j->q->some, j->q->of, x.scratch);
            MOEC_TRY(moec_weight_write(w[k], x.buf, cols, r, n, 0, cols, err));
        }
done:
    inputs_release(&x);
    return st;
}

/* Sum of an expert's scores, and how many are above j->limit. */
static moec_status weigh_expert(const job *j, int64_t e, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_mlp *from = &j->l->expert[e];
    const moec_weight *const w[] = {&from->gate, &from->up, &from->down};
    inputs x;
    bool seen;
    j->sum[e] = 0.0;
    j->count[e] = 0;
    MOEC_TRY(inputs_new(&x, j->m, err));
    moec_weights_scales(x.in, x.mid, &seen, j->me, j->q, j->set, e);
    for (size_t k = 0; k < MOEC_COUNT(w); k++)
        for (int64_t r = 0; r < w[k]->rows; r++) {
            const double *s = k == 2 ? x.mid : x.in;
            if (r % BLOCK == 0)
                moec_weight_read(x.buf, w[k]->cols, w[k], r, w[k]->rows - r < BLOCK ? w[k]->rows - r : BLOCK, 0, w[k]->cols);
            for (int64_t c = 0; c < w[k]->cols; c++) {
                const double score = fabs((double)x.buf[r % BLOCK * w[k]->cols + c]) * s[c];
                j->sum[e] += score;
                j->count[e] += score > j->limit;
            }
        }
    if (!isfinite(j->sum[e]))
        st = moec_fail(err, MOEC_ENUMERIC, "layer %lld: expert %lld: a score is not finite", (long long)j->l->index, (long long)e);
done:
    inputs_release(&x);
    return st;
}

/* --- experts side by side -------------------------------------------------------------------------------------------- */

static void drop(const moec_mlp *e)
{
    moec_weight_drop(&e->gate);
    moec_weight_drop(&e->up);
    moec_weight_drop(&e->down);
}

static moec_status each(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    moec_status st = MOEC_OK;
    const job *j = ctx;
    (void)worker;
    for (int64_t e = lo; st == MOEC_OK && e < hi; e++) {
        st = moec_interrupted(err);
        if (st == MOEC_OK)
            st = j->me->grain == MOEC_GRAIN_NEURONS ? thin_expert(j, e, err) : cut_expert(j, e, err);
        drop(&j->l->expert[e]);
        drop(&j->draft.expert[e]);
    }
    return st;
}

static moec_status weigh(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    moec_status st = MOEC_OK;
    const job *j = ctx;
    (void)worker;
    for (int64_t e = lo; st == MOEC_OK && e < hi; e++) {
        st = moec_interrupted(err);
        if (st == MOEC_OK)
            st = weigh_expert(j, e, err);
        drop(&j->l->expert[e]);
    }
    return st;
}

static moec_status zeros(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const job *j = ctx;
    float *buf = NULL;
    moec_status st = MOEC_NEW(buf, (size_t)(BLOCK * larger(j->m->dims.hidden, j->m->dims.expert_width)), err);
    (void)worker;
    for (int64_t e = lo; st == MOEC_OK && e < hi; e++) {
        const moec_mlp *x = &j->draft.expert[e];
        const moec_weight *const w[] = {&x->gate, &x->up, &x->down};
        st = moec_interrupted(err);
        j->count[e] = 0;
        for (size_t k = 0; st == MOEC_OK && k < MOEC_COUNT(w); k++)
            for (int64_t r = 0; r < w[k]->rows; r += BLOCK) {
                const int64_t n = w[k]->rows - r < BLOCK ? w[k]->rows - r : BLOCK;
                moec_weight_read(buf, w[k]->cols, w[k], r, n, 0, w[k]->cols);
                for (int64_t i = 0; i < n * w[k]->cols; i++)
                    j->count[e] += buf[i] == 0.0f;
            }
        drop(x);
    }
    moec_free(buf);
    return st;
}

/* --- sets ------------------------------------------------------------------------------------------------------------ */

static bool was_seen(const moec_request *q, int64_t set, int64_t e)
{
    if (q->model->set[set].kind != MOEC_SET_MOE)
        return false;
    if (!q->stats)
        return true; /* nobody asked */
    for (int d = 0; d < q->stats->n_domains; d++)
        if (((const uint64_t *)moec_stat_at(q->stats, d, MOEC_STAT_SELECTED, set))[e] > 0)
            return true;
    return false;
}

int64_t moec_thin_unseen(const moec_plan *p, const moec_method *me, const moec_request *q)
{
    int64_t n = 0;
    for (int64_t i = 0; i < p->n_sets; i++)
        for (int64_t e = 0; p->layer[i].rewritten && me->n_needs > 0 && e < q->model->dims.experts; e++)
            n += !was_seen(q, i, e);
    return n;
}

/* The set's weights into a file, if they are not there. */
static moec_status make_file(job *j, moec_override *weights, const moec_forms *forms, moec_err *err)
{
    moec_status st = MOEC_OK;
    char file[48];
    snprintf(file, sizeof file, "set-%05lld.safetensors", (long long)j->set);
    j->l = moec_set_layer(j->m, j->set);
    if (moec_override_has(weights, file))
        return moec_draft_reopen(&j->draft, weights, j->m, j->p, forms, j->set, matrices, err);
    MOEC_TRY(moec_draft_new(&j->draft, weights, file, j->m, j->p, forms, j->set, matrices, err));
    MOEC_TRY(moec_par_for(j->m->dims.experts, j->grain, each, j, err));
    moec_sheet *sheet = j->draft.sheet;
    j->draft.sheet = NULL;
    MOEC_TRY(moec_sheet_commit(sheet, weights, err));
done:
    return st;
}

static moec_status make_set(job *j, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t E = j->m->dims.experts;
    MOEC_TRY(make_file(j, j->t->work.weights, &j->forms, err));
    MOEC_TRY(moec_par_for(E, j->grain, zeros, j, err));
    for (int64_t e = 0; e < E; e++) {
        j->t->tally.zeros += j->count[e];
        j->t->zeros[j->set] += j->count[e];
        j->t->tally.values += 3 * (uint64_t)(j->draft.expert[e].gate.rows * j->m->dims.hidden);
    }
done:
    moec_draft_release(&j->draft);
    return st;
}

/* A job of one set, and of so many experts for each worker that there are no more than `workers`. */
static job job_of(moec_plan *p, const moec_method *me, const moec_request *q, int64_t set, int64_t workers)
{
    return (job){.m = q->model, .p = p, .me = me, .q = q, .set = set, .l = moec_set_layer(q->model, set),
                 .grain = workers >= moec_par_threads() ? 1 : (q->model->dims.experts + workers - 1) / workers};
}

moec_status moec_thin_fill(const moec_draft *d, moec_plan *p, const moec_method *me, const moec_request *q, int64_t set,
                           int64_t workers, moec_err *err)
{
    job j = job_of(p, me, q, set, workers);
    j.draft = *d;
    return moec_par_for(j.m->dims.experts, j.grain, each, &j, err);
}

moec_status moec_thin_make(moec_override *weights, moec_plan *p, const moec_forms *forms, const moec_method *me,
                           const moec_request *q, int64_t set, int64_t workers, moec_err *err)
{
    job j = job_of(p, me, q, set, workers);
    moec_status st = make_file(&j, weights, forms, err);
    moec_draft_release(&j.draft);
    return st;
}

/* Outliers of a layer, in percent. */
static moec_status outliers(double *out, job *j, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t E = j->m->dims.experts;
    const double values = 3.0 * (double)E * (double)j->m->dims.hidden * (double)j->m->dims.expert_width;
    double sum = 0.0, count = 0.0;
    j->l = moec_set_layer(j->m, j->set);
    j->limit = (double)INFINITY;
    MOEC_TRY(moec_par_for(E, j->grain, weigh, j, err));
    for (int64_t e = 0; e < E; e++)
        sum += j->sum[e];
    j->limit = outlier * sum / values;
    MOEC_TRY(moec_par_for(E, j->grain, weigh, j, err));
    for (int64_t e = 0; e < E; e++)
        count += (double)j->count[e];
    *out = 100.0 * count / values;
done:
    return st;
}

/* Each layer's share of zeros: [sets]. */
static moec_status shares(double *out, job *j, moec_err *err)
{
    moec_status st = MOEC_OK;
    double *d = NULL;
    for (int64_t i = 0; i < j->p->n_sets; i++)
        out[i] = j->q->share;
    if (j->me->grain != MOEC_GRAIN_WEIGHTS || moec_weights_rule(j->me) != MOEC_WEIGHTS_OWL)
        return MOEC_OK;
    MOEC_TRY(MOEC_NEW(d, (size_t)j->p->n_layers, err));
    for (j->set = 0; j->set < j->p->n_layers; j->set++)
        MOEC_TRY(outliers(&d[j->set], j, err));
    moec_weights_owl(out, d, j->p->n_layers, j->q->share);
    MOEC_TRY(moec_plan_set_option(j->p, "ratios", moec_json_new_reals(out, j->p->n_layers), err));
done:
    moec_free(d);
    return st;
}

/* --- memory ---------------------------------------------------------------------------------------------------------- */

/* `all`: bytes of an output's set. */
static uint64_t worker_bytes(const moec_model *m, const moec_plan *p, uint64_t all)
{
    const uint64_t H = (uint64_t)m->dims.hidden, I = (uint64_t)m->dims.expert_width, most = H > I ? H : I;
    uint64_t expert = 0;
    for (int64_t i = 0; i < p->n_sets; i++)
        for (int64_t e = 0; p->layer[i].rewritten && e < m->dims.experts; e++) {
            const uint64_t b = moec_expert_bytes(moec_set_layer(m, i), e);
            expert = b > expert ? b : expert;
        }
    return BLOCK * most * sizeof(float) + (H + 6 * I + 2 * most) * sizeof(double) + expert + all / (uint64_t)m->dims.experts +
           (1u << 20); /* and a stack */
}

/* Bytes of all output, of its largest tensor, and of a worker. */
static moec_status measure(uint64_t *disk, uint64_t *largest, uint64_t *worker, const moec_plan *p, const moec_model *m,
                           const moec_forms *forms, moec_err *err)
{
    moec_status st = MOEC_OK;
    uint64_t most = 0;
    *disk = *largest = *worker = 0;
    for (int64_t i = 0; i < p->n_sets; i++) {
        uint64_t all = 0, one = 0;
        if (p->layer[i].rewritten)
            MOEC_TRY(moec_draft_bytes(&all, &one, m, p, forms, i, matrices, err));
        *disk += all;
        most = all > most ? all : most;
        *largest = one > *largest ? one : *largest;
    }
    *worker = worker_bytes(m, p, most);
done:
    return st;
}

moec_status moec_thin_worker_bytes(uint64_t *out, const moec_plan *p, const moec_model *m, const moec_forms *forms, moec_err *err)
{
    uint64_t disk, largest;
    return measure(&disk, &largest, out, p, m, forms, err);
}

/* *workers: how many there may be. */
static moec_status estimate(moec_work_cost *out, int64_t *workers, const moec_plan *p, const moec_model *m,
                            const moec_forms *forms, const moec_thin_opts *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    uint64_t each, largest;
    char have[32], need[32];
    *out = (moec_work_cost){0};
    MOEC_TRY(measure(&out->disk, &largest, &each, p, m, forms, err));
    const uint64_t before = moec_resident_memory() + (4u << 20);
    const int64_t threads = moec_par_threads();
    for (*workers = threads < m->dims.experts ? threads : m->dims.experts; *workers > 0; --*workers) {
        const uint64_t busy = (uint64_t)*workers * each;
        out->memory = before + (busy > largest ? busy : largest);
        if (o->max_memory == 0 || out->memory <= o->max_memory)
            return MOEC_OK;
    }
    st = moec_fail(err, MOEC_ENOFIT, "--max-memory %s is too little: %s is the least this run can do with",
                   moec_size_text(have, sizeof have, o->max_memory), moec_size_text_up(need, sizeof need, out->memory));
done:
    return st;
}

moec_status moec_thin_estimate(moec_work_cost *out, const moec_plan *p, const moec_model *m, const moec_thin_opts *o,
                               moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_forms forms = {0};
    int64_t workers;
    MOEC_TRY(moec_forms_new(&forms, m, p, err));
    MOEC_TRY(estimate(out, &workers, p, m, &forms, o, err));
done:
    moec_forms_release(&forms);
    return st;
}

/* --- all of it ------------------------------------------------------------------------------------------------------- */

static moec_status open_work(job *j, const moec_thin_opts *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *plan = NULL;
    MOEC_TRY(moec_plan_to_text(&plan, j->p, err));
    MOEC_TRY(moec_work_open(&j->t->work, o->work, o->resume, false, err, "thin 1 %s\n%s", moec_version(), plan));
done:
    moec_free(plan);
    return st;
}

moec_status moec_thin_run(moec_thin **out, moec_plan *p, const moec_method *me, const moec_request *q, const moec_thin_opts *o,
                          moec_err *err)
{
    moec_status st = MOEC_OK;
    job j = {.m = q->model, .p = p, .me = me, .q = q};
    moec_progress progress = {0};
    moec_digest digest;
    double *share = NULL;
    const size_t E = (size_t)q->model->dims.experts;
    moec_work_cost cost;
    int64_t workers;
    *out = NULL;
    MOEC_TRY(MOEC_NEW(j.t, 1, err));
    j.t->work.folder.lock = -1;
    MOEC_TRY(MOEC_NEW(j.t->zeros, (size_t)p->n_sets, err));
    j.t->tally.set_zeros = j.t->zeros;
    MOEC_TRY(MOEC_NEW(j.count, E, err));
    MOEC_TRY(MOEC_NEW(j.sum, E, err));
    MOEC_TRY(MOEC_NEW(share, (size_t)p->n_sets, err));
    MOEC_TRY(moec_forms_new(&j.forms, q->model, p, err));
    MOEC_TRY(estimate(&cost, &workers, p, q->model, &j.forms, o, err));
    j.grain = (q->model->dims.experts + workers - 1) / workers;
    if (workers >= moec_par_threads())
        j.grain = 1; /* shares out better */
    MOEC_TRY(open_work(&j, o, err));
    MOEC_TRY(shares(share, &j, err));
    moec_progress_start(&progress, "thinning", "layers", (uint64_t)p->n_sets, 0);
    for (j.set = 0; j.set < p->n_sets; j.set++) {
        j.share = share[j.set];
        if (p->layer[j.set].rewritten)
            MOEC_TRY(make_set(&j, err));
        moec_progress_step(&progress, 1);
    }
    MOEC_TRY(moec_ckpt_unchanged(q->model->ckpt, err));
    MOEC_TRY(moec_preview_digest(&digest, p, j.t->work.weights, err));
    snprintf(p->weights, sizeof p->weights, "%s", digest.hex);
    j.t->tally.unseen = moec_thin_unseen(p, me, q);
    moec_progress_finish(&progress);
    *out = j.t;
    j.t = NULL;
done:
    moec_progress_stop(&progress);
    moec_forms_release(&j.forms);
    moec_free(j.count);
    moec_free(j.sum);
    moec_free(share);
    moec_thin_close(j.t, false);
    return st;
}

const moec_override *moec_thin_weights(const moec_thin *t)
{
    return t->work.weights;
}

moec_thin_tally moec_thin_count(const moec_thin *t)
{
    return t->tally;
}

moec_status moec_thin_keep(moec_thin *t, const char *dir, moec_err *err)
{
    return moec_work_keep(&t->work, dir, err);
}

void moec_thin_close(moec_thin *t, bool remove)
{
    if (!t)
        return;
    moec_work_close(&t->work, remove);
    moec_free(t->zeros);
    moec_free(t);
}
