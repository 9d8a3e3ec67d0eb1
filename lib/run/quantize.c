/* See quantize.h. Here: tokens, layers, the folder of work and its records. */
#include "base/file.h"
#include "base/mem.h"
#include "base/par.h"
#include "base/version.h"
#include "num/vec.h"
#include "run/quantize_parts.h"
#include "run/selected.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static const uint32_t matrices = MOEC_PART_GATE | MOEC_PART_UP | MOEC_PART_DOWN;

struct moec_quantizing {
    moec_work work;
    moec_quantize_report report;
    moec_json *modules; /* an array, one entry a matrix */
};

/* --- tokens ---------------------------------------------------------------------------------------------------------- */

static moec_status see_twin(void *ctx, int worker, const moec_chunk *c, const moec_moe_view *v, moec_err *err)
{
    moec_qrun *u = ctx;
    const int64_t H = u->m->dims.hidden;
    (void)worker;
    (void)err;
    memcpy(u->x + c->token * H, v->x, (size_t)(v->n * H) * sizeof *u->x);
    memcpy(u->ids + c->token * u->slots, v->ids, (size_t)(v->n * u->slots) * sizeof *u->ids);
    memcpy(u->gates + c->token * u->slots, v->gates, (size_t)(v->n * u->slots) * sizeof *u->gates);
    return MOEC_OK;
}

static moec_status see_original(void *ctx, int worker, const moec_chunk *c, const moec_moe_view *v, moec_err *err)
{
    moec_qrun *u = ctx;
    const int64_t H = u->m->dims.hidden;
    (void)worker;
    (void)err;
    memcpy(u->other + c->token * H, v->x, (size_t)(v->n * H) * sizeof *u->other);
    return MOEC_OK;
}

/* Where a matrix has its inputs from. */
static moec_qsource source_of(moec_mat which)
{
    switch (which) {
    case MOEC_MAT_O: case MOEC_MAT_CONV_OUT: case MOEC_MAT_DELTA_OUT: return MOEC_QS_MIXED;
    case MOEC_MAT_Q_B: return MOEC_QS_Q_B;
    case MOEC_MAT_KV_B: return MOEC_QS_KV_B;
    case MOEC_MAT_SHARED_GATE: case MOEC_MAT_SHARED_UP: case MOEC_MAT_SHARED_DOWN: return MOEC_QS_SHARED;
    case MOEC_MAT_DENSE_GATE: case MOEC_MAT_DENSE_UP: case MOEC_MAT_DENSE_DOWN: return MOEC_QS_DENSE;
    default: return MOEC_QS_MIXER;
    }
}

static moec_status take_input(void *ctx, int worker, const moec_chunk *c, moec_mat which, const float *panels, int64_t at, int64_t n,
                              int64_t cols, moec_err *err)
{
    moec_qrun *u = ctx;
    const moec_qsource s = source_of(which);
    (void)worker;
    (void)err;
    if (u->in_of[s] == which)
        moec_panel_unpack(u->in[s] + (c->token + at) * cols, cols, panels, n, cols);
    return MOEC_OK;
}

/* --- a layer's matrices and where they go ----------------------------------------------------------------------------- */

typedef struct layer_work {
    moec_qmatrices list;
    moec_qjob *job;      /* [list.n] */
    size_t others;       /* of these, those in front that are no experts' */
    moec_sheet *sheet;   /* of the others, then of packed experts */
    moec_draft draft;    /* of dense experts */
} layer_work;

static void layer_release(layer_work *w)
{
    moec_sheet_discard(w->sheet);
    moec_draft_release(&w->draft);
    moec_qmatrices_release(&w->list);
    moec_free(w->job);
}

static moec_status place_jobs(moec_qrun *u, layer_work *w, size_t from, size_t to, const char *file, bool find, moec_err *err)
{
    return moec__qplace(w->job + from, to - from, u->format, u->p->dtype, u->work->weights, find ? NULL : file, find ? NULL : &w->sheet, err);
}

static void show_jobs(moec_qrun *u, const layer_work *w, size_t from, size_t to)
{
    moec__qshow(&u->twin.variant->model.layer[u->l->index], w->job + from, to - from, u->format);
}

/* --- records --------------------------------------------------------------------------------------------------------- */

static const char *const ways[] = {"", "nearest", "clip", "gptq"};

static moec_json *say_job(const moec_qjob *j)
{
    moec_json *o = moec_json_new_object();
    moec_json_set(o, "module", moec_json_new_string(j->q->module ? j->q->module : j->q->source->of->name));
    moec_json_set(o, "layer", moec_json_new_int(j->q->layer));
    moec_json_set(o, "expert", moec_json_new_int(j->q->expert));
    moec_json_set(o, "matrix", moec_json_new_int(j->q->which));
    moec_json_set(o, "bits", moec_json_new_int(j->q->grid.bits));
    moec_json_set(o, "group_size", moec_json_new_int(j->q->grid.group));
    moec_json_set(o, "tokens", moec_json_new_int(j->tokens));
    moec_json_set(o, "method", moec_json_new_string(ways[j->way]));
    moec_json_set(o, "loss", moec_json_new_real(j->loss));
    moec_json_set(o, "loss_nearest", moec_json_new_real(j->nearest));
    moec_json_set(o, "loss_zero", moec_json_new_real(j->whole));
    return o;
}

static moec_status read_job(moec_qjob *j, const moec_json *o, const char *what, moec_err *err)
{
    int64_t expert = 0, which = 0, bits = 0, group = 0;
    const char *way = moec_json_string(moec_json_get(o, "method"));
    bool good = moec_json_int(moec_json_get(o, "expert"), &expert) && moec_json_int(moec_json_get(o, "matrix"), &which) &&
                moec_json_int(moec_json_get(o, "bits"), &bits) && moec_json_int(moec_json_get(o, "group_size"), &group) &&
                moec_json_int(moec_json_get(o, "tokens"), &j->tokens) && way && expert == j->q->expert && which == j->q->which &&
                bits == j->q->grid.bits && group == j->q->grid.group && j->tokens >= 0;
    for (size_t i = 0; way && i < MOEC_COUNT(ways); i++)
        if (strcmp(way, ways[i]) == 0)
            j->way = (moec_qway)i;
    if (!moec_json_real(moec_json_get(o, "loss"), &j->loss))
        j->loss = NAN;
    if (!moec_json_real(moec_json_get(o, "loss_nearest"), &j->nearest))
        j->nearest = NAN;
    if (!moec_json_real(moec_json_get(o, "loss_zero"), &j->whole))
        j->whole = NAN;
    return good && j->way != MOEC_QWAY_NONE ? MOEC_OK : moec_fail(err, MOEC_EFORMAT, "%s: damaged; --no-resume begins anew", what);
}

/* Jobs [from, to) as an earlier run did them, whose weights are those that the record was written for. */
static moec_status read_record(const moec_qrun *u, layer_work *w, size_t from, size_t to, const char *file, const char *name,
                               moec_err *err)
{
    moec_status st = MOEC_OK;
    char *path = NULL;
    moec_json *o = NULL;
    MOEC_TRY(moec_path_join(&path, u->work->folder.dir, name, err));
    MOEC_TRY(moec_work_record_read(&o, u->work, name, 1 << 28, file, err));
    const moec_json *list = moec_json_get(o, "matrices");
    if (moec_json_len(list) != to - from)
        MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "%s: damaged; --no-resume begins anew", path));
    for (size_t i = from; i < to; i++)
        MOEC_TRY(read_job(&w->job[i], moec_json_at(list, i - from), path, err));
done:
    moec_json_free(o);
    moec_free(path);
    return st;
}

static moec_json *say_jobs(const layer_work *w, size_t from, size_t to)
{
    moec_json *o = moec_json_new_object(), *list = moec_json_new_array();
    for (size_t i = from; i < to; i++)
        moec_json_push(list, say_job(&w->job[i]));
    moec_json_set(o, "matrices", list);
    return o;
}

/* Into the plan and the report. */
static void account(moec_qrun *u, moec_quantizing *q, const layer_work *w)
{
    double lost[3] = {0.0, 0.0, 0.0}, whole[3] = {0.0, 0.0, 0.0};
    for (size_t i = 0; i < w->list.n; i++) {
        const moec_qjob *j = &w->job[i];
        moec_json_push(q->modules, say_job(j));
        if (j->q->expert < 0)
            continue;
        q->report.matrices++;
        q->report.by_gptq += j->way == MOEC_QWAY_GPTQ;
        q->report.by_nearest += u->o->rounding == MOEC_ROUND_GPTQ && j->way != MOEC_QWAY_GPTQ;
        if (isfinite(j->loss) && isfinite(j->whole)) {
            lost[j->q->which] += j->loss;
            whole[j->q->which] += j->whole;
        }
    }
    if (u->l->moe_index < 0)
        return;
    for (int k = 0; u->p->quant.error && k < 3; k++)
        u->p->quant.error[3 * u->l->moe_index + k] = whole[k] > 0.0 ? lost[k] / whole[k] : 0.0;
    int64_t last = -1;
    for (size_t i = w->others; u->pass && i < w->list.n; i++) {
        const moec_qjob *j = &w->job[i];
        q->report.unseen += j->q->expert != last && j->tokens == 0;
        q->report.few += j->q->expert != last && j->tokens > 0 && j->tokens < u->m->dims.hidden;
        last = j->q->expert;
    }
}

/* --- rounding a layer -------------------------------------------------------------------------------------------------- */

/* Of which quantized matrices inputs are wanted: the mixer's, or those of a feed-forward part of all tokens. */
static bool want_inputs(moec_qrun *u, const layer_work *w, bool mixer)
{
    bool any = false;
    for (int s = 0; s < MOEC_QS_COUNT; s++)
        u->in_of[s] = MOEC_MAT_COUNT;
    for (size_t i = 0; i < w->others; i++) {
        const moec_mat which = (moec_mat)w->list.at[i].which;
        const moec_qsource s = source_of(which);
        const bool forward = s == MOEC_QS_SHARED || s == MOEC_QS_DENSE;
        if (forward == mixer || u->in_of[s] != MOEC_MAT_COUNT)
            continue;
        u->in_of[s] = s == MOEC_QS_SHARED ? MOEC_MAT_SHARED_GATE : s == MOEC_QS_DENSE ? MOEC_MAT_DENSE_GATE : which;
        any = true;
    }
    return any;
}

static moec_status fit_mixer(moec_qrun *u, layer_work *w, moec_err *err)
{
    moec_status st = MOEC_OK;
    for (int s = 0; s <= MOEC_QS_KV_B; s++) {
        moec_qjob *job[MOEC_MAT_COUNT];
        int n = 0;
        for (size_t i = 0; i < w->others; i++)
            if ((int)source_of((moec_mat)w->list.at[i].which) == s)
                job[n++] = &w->job[i];
        if (n > 0)
            MOEC_TRY(moec__qfit_linear(u, job, n, u->pass ? u->in[s] : NULL, job[0]->q->source->cols, err));
        moec_progress_step(&u->progress, (uint64_t)n);
    }
done:
    return st;
}

/* Shared expert, dense layer. */
static moec_status fit_common(moec_qrun *u, layer_work *w, moec_qsource s, moec_mat gate, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_weight *m = u->l->mat;
    const moec_mlp all = {m[gate], m[gate + 1], m[gate + 2]};
    moec_qjob *job[3] = {NULL};
    int n = 0;
    for (size_t i = 0; i < w->others; i++)
        if (source_of((moec_mat)w->list.at[i].which) == s) {
            job[w->list.at[i].which - (int)gate] = &w->job[i];
            n++;
        }
    const moec_qrows rows = {.x = u->in[s], .n = u->n};
    if (n > 0)
        MOEC_TRY(moec__qfit_mlp(u, 0, job, &all, -1, u->pass ? &rows : NULL, err));
    moec_progress_step(&u->progress, (uint64_t)n);
done:
    return st;
}

static moec_status fit_others(moec_qrun *u, layer_work *w, const char *file, const char *record, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t layer = u->l->index;
    MOEC_TRY(place_jobs(u, w, 0, w->others, file, false, err));
    if (u->pass && want_inputs(u, w, true))
        MOEC_TRY(moec_pass_look_inputs(u->pass, layer, NULL, take_input, true, u, err));
    MOEC_TRY(fit_mixer(u, w, err));
    for (size_t i = 0; i < w->others; i++) /* what mixes tokens is shown before the rest is looked at */
        if (source_of((moec_mat)w->list.at[i].which) < MOEC_QS_SHARED)
            show_jobs(u, w, i, i + 1);
    if (u->pass && want_inputs(u, w, false))
        MOEC_TRY(moec_pass_look_inputs(u->pass, layer, NULL, take_input, false, u, err));
    MOEC_TRY(fit_common(u, w, MOEC_QS_SHARED, MOEC_MAT_SHARED_GATE, err));
    MOEC_TRY(fit_common(u, w, MOEC_QS_DENSE, MOEC_MAT_DENSE_GATE, err));
    MOEC_TRY(moec_work_record_write(u->work, say_jobs(w, 0, w->others), w->sheet, record, err));
    moec_sheet *sheet = w->sheet;
    w->sheet = NULL;
    MOEC_TRY(moec_sheet_commit(sheet, u->work->weights, err));
done:
    return st;
}

typedef struct experts {
    moec_qrun *u;
    layer_work *w;
} experts;

static moec_status fit_expert(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const experts *a = ctx;
    moec_qrun *u = a->u;
    moec_status st = MOEC_OK;
    for (int64_t e = lo; e < hi; e++) {
        moec_qjob *job[3] = {NULL};
        int n = 0;
        MOEC_TRY(moec_interrupted(err));
        for (size_t i = a->w->others; i < a->w->list.n; i++)
            if (a->w->list.at[i].expert == e) {
                job[a->w->list.at[i].which] = &a->w->job[i];
                n++;
            }
        if (n == 0)
            continue;
        const int64_t first = u->pass ? u->first_of[e] : 0;
        const moec_qrows rows = {.x = u->x, .other = u->other, .token = u->token + first, .gate = u->gate + first,
                                 .n = u->pass ? u->first_of[e + 1] - first : 0};
        st = moec__qfit_mlp(u, worker, job, &u->l->expert[e], e, u->pass ? &rows : NULL, err);
        MOEC_TRY(moec_within(err, st, "layer %lld: expert %lld", (long long)u->l->index, (long long)e));
        moec_progress_step(&u->progress, (uint64_t)n);
    }
done:
    return st;
}

/* Of all tokens, as experts are given them. Where the weight multiplies their input it is left out here. */
static moec_status sum_layer(moec_qrun *u, moec_err *err)
{
    const int64_t H = u->m->dims.hidden;
    const double scale = u->m->dims.input_scale * u->m->dims.input_scale;
    const moec_status st = moec__qfit_gram(u->layer_h, u->x, u->n, H, u->o->compute, err);
    for (int64_t i = 0; scale != 1.0 && st == MOEC_OK && i < H; i++)
        for (int64_t j = 0; j <= i; j++)
            u->layer_h[i * H + j] *= scale;
    return st;
}

/* Dense: what is in the draft is the source's until an expert is written over. */
static moec_status place_experts(moec_qrun *u, layer_work *w, const char *file, bool find, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t set = u->l->moe_index;
    if (!u->format->dense)
        return place_jobs(u, w, w->others, w->list.n, file, find, err);
    MOEC_TRY(find ? moec_draft_reopen(&w->draft, u->work->weights, u->m, u->p, &u->twin.forms, set, matrices, err)
                  : moec_draft_new(&w->draft, u->work->weights, file, u->m, u->p, &u->twin.forms, set, matrices, err));
    for (size_t i = w->others; i < w->list.n; i++) {
        const moec_mlp *x = &w->draft.expert[w->list.at[i].expert];
        w->job[i].to = w->list.at[i].which == 0 ? x->gate : w->list.at[i].which == 1 ? x->up : x->down;
    }
done:
    return st;
}

static moec_status fit_experts(moec_qrun *u, layer_work *w, const char *file, const char *record, moec_err *err)
{
    moec_status st = MOEC_OK;
    experts a = {u, w};
    const int threads = moec_par_threads();
    MOEC_TRY(place_experts(u, w, file, false, err));
    if (u->pass) {
        MOEC_TRY(moec_pass_look(u->pass, u->l->index, see_twin, u, err));
        moec__selected_sort(u->first_of, u->token, u->gate, u->ids, u->gates, u->n, u->slots, u->m->dims.experts);
        MOEC_TRY(sum_layer(u, err));
    }
    moec_par_set_threads(u->workers);
    st = moec_par_for(u->m->dims.experts, 1, fit_expert, &a, err);
    moec_par_set_threads(threads);
    MOEC_TRY(st);
    moec_sheet **sheet = u->format->dense ? &w->draft.sheet : &w->sheet;
    MOEC_TRY(moec_work_record_write(u->work, say_jobs(w, w->others, w->list.n), *sheet, record, err));
    moec_sheet *done = *sheet;
    *sheet = NULL;
    MOEC_TRY(moec_sheet_commit(done, u->work->weights, err));
done:
    return st;
}

static moec_status run_layer(moec_qrun *u, moec_quantizing *q, int64_t layer, moec_err *err)
{
    moec_status st = MOEC_OK;
    layer_work w = {.sheet = NULL};
    char file[64], record[64];
    u->l = &u->m->layer[layer];
    if (u->first)
        MOEC_TRY(moec_pass_layer(u->first, layer, u->l->expert ? see_original : NULL, NULL, u, err));
    MOEC_TRY(moec_qmatrices_of(&w.list, u->m, u->p, layer, err));
    MOEC_TRY(MOEC_NEW(w.job, w.list.n, err));
    for (size_t i = 0; i < w.list.n; i++) {
        w.job[i].q = &w.list.at[i];
        w.others += w.list.at[i].expert < 0;
    }
    if (w.others > 0) {
        moec_work_file_name(file, layer, "-others.safetensors");
        moec_work_file_name(record, layer, "-others.json");
        if (moec_override_has(u->work->weights, file)) {
            MOEC_TRY(place_jobs(u, &w, 0, w.others, file, true, err));
            MOEC_TRY(read_record(u, &w, 0, w.others, file, record, err));
            moec_progress_step(&u->progress, w.others);
        } else {
            MOEC_TRY(fit_others(u, &w, file, record, err));
        }
        show_jobs(u, &w, 0, w.others);
    }
    if (w.list.n > w.others) {
        moec_work_file_name(file, layer, ".safetensors");
        moec_work_file_name(record, layer, ".json");
        if (moec_override_has(u->work->weights, file)) {
            MOEC_TRY(place_experts(u, &w, file, true, err));
            MOEC_TRY(read_record(u, &w, w.others, w.list.n, file, record, err));
            moec_progress_step(&u->progress, w.list.n - w.others);
        } else {
            MOEC_TRY(fit_experts(u, &w, file, record, err));
        }
        show_jobs(u, &w, w.others, w.list.n);
    }
    account(u, q, &w);
    if (u->pass && layer + 1 < u->m->dims.layers)
        MOEC_TRY(moec_pass_layer(u->pass, layer, NULL, NULL, u, err));
done:
    layer_release(&w);
    return st;
}

/* --- all of it ------------------------------------------------------------------------------------------------------- */

static int64_t larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* Columns of what each source gives, over all layers (0: no quantized matrix has it), and how many matrices and bytes there will be. */
static moec_status size_inputs(uint64_t *all, uint64_t *bytes, moec_qrun *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    *all = *bytes = 0;
    for (int64_t l = 0; l < u->m->dims.layers; l++) {
        moec_qmatrices list;
        MOEC_TRY(moec_qmatrices_of(&list, u->m, u->p, l, err));
        *all += list.n;
        for (size_t i = 0; i < list.n; i++) {
            const moec_weight *w = list.at[i].source;
            const int bits = u->format->dense ? 8 * (int)moec_dtypes[w->of->dtype].bytes : list.at[i].grid.bits + 1;
            *bytes += (uint64_t)(w->rows * w->cols) * (uint64_t)bits / 8;
            if (list.at[i].expert >= 0)
                continue;
            const moec_mat which = (moec_mat)list.at[i].which;
            const bool down = which == MOEC_MAT_SHARED_DOWN || which == MOEC_MAT_DENSE_DOWN;
            int64_t *cols = &u->in_cols[source_of(which)];
            *cols = larger(*cols, down ? u->m->dims.hidden : w->cols);
            if (source_of(which) >= MOEC_QS_SHARED) {
                u->wide = larger(u->wide, down ? w->cols : w->rows);
            } else {
                u->most_rows = larger(u->most_rows, w->rows);
                u->most_cols = larger(u->most_cols, w->cols);
            }
        }
        moec_qmatrices_release(&list);
    }
done:
    return st;
}

/* The least that the twin's pass can do with. */
static uint64_t least_of_twin(const moec_qrun *u, const moec_pass_opts *o)
{
    const uint64_t before = moec_resident_memory();
    moec_pass_opts least = *o;
    moec_pass_plan plan = {0};
    least.max_memory = 1; /* which is never enough */
    least.look = true;
    const moec_model *m = u->twin.variant ? &u->twin.variant->model : u->m;
    if (moec_pass_estimate(&plan, m, u->n, moec_pass_max_seq(u->o->corpus), &least, NULL) == MOEC_OK)
        return 0;
    return plan.bytes > before ? plan.bytes - before : 0;
}

/* Who runs text: the twin, or first the original, which leaves it `spare`. As many experts are rounded at a time as memory holds. */
static moec_status plan_pass(moec_pass_opts *o, uint64_t *spare, moec_pass_plan *plan, moec_qrun *u, moec_err *err)
{
    const size_t n = (size_t)u->n, H = (size_t)u->m->dims.hidden, picks = n * (size_t)u->slots;
    moec_status st;
    size_t inputs = 0;
    for (int s = 0; s < MOEC_QS_COUNT; s++)
        inputs += n * (size_t)u->in_cols[s];
    const size_t own = ((u->o->original ? 2 : 1) * n * H + 4 * picks + inputs) * sizeof(float) + H * H * sizeof(double);
    *o = (moec_pass_opts){.compute = u->o->compute, .watch = true, .look = !u->o->original, .max_memory = u->o->max_memory,
                           .what = "quantize"};
    *spare = u->o->original ? least_of_twin(u, o) : 0;
    for (u->workers = moec_par_threads();; u->workers--) {
        o->fixed_bytes = own + (size_t)*spare + moec__qfit_bytes(u, u->workers);
        st = moec_pass_estimate(plan, u->m, u->n, moec_pass_max_seq(u->o->corpus), o, err);
        if (st != MOEC_ENOFIT || u->workers == 1)
            return st;
    }
}

static moec_status make_room(moec_qrun *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    const size_t n = (size_t)u->n, H = (size_t)u->m->dims.hidden, picks = n * (size_t)u->slots;
    moec_pass_opts o;
    moec_pass_plan plan;
    uint64_t spare;
    MOEC_TRY(plan_pass(&o, &spare, &plan, u, err));
    if (u->o->original) {
        MOEC_TRY(moec_pass_new(&u->first, u->m, u->o->corpus, &o, err));
        const uint64_t counted = moec_resident_memory() + spare; /* what that has touched by now counts as resident */
        o.fixed_bytes = plan.bytes > counted ? (size_t)(plan.bytes - counted) : 0;
        o.look = true;
    }
    MOEC_TRY(moec_pass_new(&u->pass, &u->twin.variant->model, u->o->corpus, &o, err));
    if (u->o->original)
        MOEC_TRY(MOEC_NEW(u->other, n * H, err));
    MOEC_TRY(MOEC_NEW(u->x, n * H, err));
    MOEC_TRY(MOEC_NEW(u->ids, picks, err));
    MOEC_TRY(MOEC_NEW(u->gates, picks, err));
    MOEC_TRY(MOEC_NEW(u->token, picks, err));
    MOEC_TRY(MOEC_NEW(u->gate, picks, err));
    MOEC_TRY(MOEC_NEW(u->first_of, (size_t)u->m->dims.experts + 1, err));
    for (int s = 0; s < MOEC_QS_COUNT; s++)
        if (u->in_cols[s] > 0)
            MOEC_TRY(MOEC_NEW(u->in[s], n * (size_t)u->in_cols[s], err));
    MOEC_TRY(MOEC_NEW(u->layer_h, H * H, err));
done:
    return st;
}

static void release(moec_qrun *u)
{
    moec__qfit_end(u);
    moec_progress_stop(&u->progress);
    moec_pass_free(u->first);
    moec_pass_free(u->pass);
    moec_preview_release(&u->twin);
    moec_free(u->x);
    moec_free(u->other);
    moec_free(u->ids);
    moec_free(u->gates);
    moec_free(u->first_of);
    moec_free(u->token);
    moec_free(u->gate);
    moec_free(u->layer_h);
    for (int s = 0; s < MOEC_QS_COUNT; s++)
        moec_free(u->in[s]);
}

/* Everything that decides the result. */
static moec_status open_work(moec_qrun *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *plan = NULL;
    moec_digest words = {""};
    const moec_quantize_opts *o = u->o;
    MOEC_TRY(moec_plan_to_text(&plan, u->p, err));
    if (o->corpus)
        MOEC_TRY(moec_corpus_digest(&words, o->corpus, err));
    MOEC_TRY(moec_work_open(u->work, o->work, o->resume, true, err, "quantize 3 %s\n%s %d %d %.17g %d %d %d %d %d\n%s\n%s\n%s",
                            moec_version(), words.hex, (int)o->compute, (int)o->rounding, o->gptq.damp, o->gptq.act_order, o->gptq.sweeps,
                            o->weight_power, o->original, o->losses, o->fingerprint ? o->fingerprint : "",
                            moec_ckpt_config_text(u->m->ckpt), plan));
done:
    moec_free(plan);
    return st;
}

static bool runs_text(const moec_quantize_opts *o)
{
    return o->corpus && o->rounding != MOEC_ROUND_NEAREST;
}

static moec_status record(moec_qrun *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_digest digest;
    static const char *const roundings[] = {"nearest", "clip", "gptq"};
    MOEC_TRY(moec_plan_set_option(u->p, "rounding", moec_json_new_string(roundings[u->o->rounding]), err));
    if (runs_text(u->o)) {
        MOEC_TRY(moec_corpus_digest(&digest, u->o->corpus, err));
        MOEC_TRY(moec_plan_set_option(u->p, "text", moec_json_new_string(digest.hex), err));
        MOEC_TRY(moec_plan_set_option(u->p, "tokens", moec_json_new_int(u->n), err));
        MOEC_TRY(moec_plan_set_option(u->p, "weight_power", moec_json_new_int(u->o->weight_power), err));
        MOEC_TRY(moec_plan_set_option(u->p, "original_target", moec_json_new_bool(u->o->original), err));
    }
    if (u->o->rounding == MOEC_ROUND_GPTQ) {
        MOEC_TRY(moec_plan_set_option(u->p, "damp", moec_json_new_real(u->o->gptq.damp), err));
        MOEC_TRY(moec_plan_set_option(u->p, "act_order", moec_json_new_bool(u->o->gptq.act_order), err));
        MOEC_TRY(moec_plan_set_option(u->p, "sweeps", moec_json_new_int(u->o->gptq.sweeps), err));
    }
    MOEC_TRY(moec_preview_digest(&digest, u->p, u->work->weights, err));
    snprintf(u->p->weights, sizeof u->p->weights, "%s", digest.hex);
done:
    return st;
}

/* What can be refused without reading a weight; *all: matrices. */
static moec_status check(moec_qrun *u, uint64_t *all, uint64_t *bytes, moec_err *err)
{
    moec_status st = MOEC_OK;
    if (u->n > INT32_MAX)
        return moec_fail(err, MOEC_EINVAL, "quantize: more than 2^31 tokens");
    if (u->o->original && u->o->rounding != MOEC_ROUND_GPTQ)
        return moec_fail(err, MOEC_EINVAL, "quantize: the original's outputs are a target of gptq alone");
    MOEC_TRY(moec_qformat_take(&u->format, u->p->quant.format, err));
    if (u->format->check)
        MOEC_TRY(u->format->check(u->p, u->m, err));
    MOEC_TRY(size_inputs(all, bytes, u, err));
done:
    return st;
}

static moec_status begin(moec_qrun *u, moec_quantizing *q, moec_err *err)
{
    moec_status st = MOEC_OK;
    uint64_t all, bytes;
    MOEC_TRY(check(u, &all, &bytes, err));
    if (!u->o->corpus && u->o->rounding == MOEC_ROUND_GPTQ)
        MOEC_TRY(moec_fail(err, MOEC_EINVAL, "rounding gptq needs text to round by; give --text, or --rounding clip"));
    MOEC_TRY(moec_preview_begin(&u->twin, u->m, u->p, err));
    u->workers = moec_par_threads();
    MOEC_TRY(moec__qfit_begin(u, err));
    if (runs_text(u->o))
        MOEC_TRY(make_room(u, err));
    if (!u->p->quant.error && u->o->rounding == MOEC_ROUND_GPTQ) /* else no loss is taken */
        MOEC_TRY(MOEC_NEW(u->p->quant.error, 3 * (size_t)u->p->n_layers, err));
    MOEC_TRY(open_work(u, err));
    q->modules = moec_json_new_array();
    moec_progress_start(&u->progress, "quantize", "matrices", all, 0);
    if (u->pass)
        MOEC_TRY(moec_pass_embed(u->pass, err));
    if (u->first)
        MOEC_TRY(moec_pass_embed(u->first, err));
done:
    return st;
}

moec_status moec_quantizing_estimate(moec_work_cost *out, moec_plan *p, const moec_model *m, const moec_quantize_opts *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_qrun u = {.m = m, .p = p, .o = o, .n = o->corpus ? moec_corpus_tokens(o->corpus) : 0, .slots = m->dims.slots};
    moec_pass_plan pass = {.bytes = moec_resident_memory()};
    moec_pass_opts opts;
    uint64_t all, spare;
    *out = (moec_work_cost){0};
    MOEC_TRY(check(&u, &all, &out->disk, err));
    pass.bytes += moec__qfit_bytes(&u, moec_par_threads());
    if (runs_text(o)) {
        MOEC_TRY(plan_pass(&opts, &spare, &pass, &u, err));
        out->token_passes = (uint64_t)(u.n * m->dims.layers) * (o->original ? 3 : 2);
    }
    out->memory = pass.bytes;
done:
    return st;
}

moec_status moec_quantizing_run(moec_quantizing **out, moec_plan *p, const moec_model *m, const moec_quantize_opts *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_qrun u = {.m = m, .p = p, .o = o, .n = o->corpus ? moec_corpus_tokens(o->corpus) : 0, .slots = m->dims.slots};
    moec_quantizing *q = NULL;
    *out = NULL;
    MOEC_TRY(MOEC_NEW(q, 1, err));
    q->work.folder.lock = -1;
    u.work = &q->work;
    MOEC_TRY(begin(&u, q, err));
    for (int64_t l = 0; l < m->dims.layers; l++)
        MOEC_TRY(moec_work_interrupted(run_layer(&u, q, l, err), NULL, l, m->dims.layers, err));
    MOEC_TRY(moec_ckpt_unchanged(m->ckpt, err));
    MOEC_TRY(record(&u, err));
    moec_progress_finish(&u.progress);
    *out = q;
    q = NULL;
done:
    release(&u);
    if (q) {
        moec_work_abandon(&q->work);
        moec_json_free(q->modules);
    }
    moec_free(q);
    return st;
}

const moec_override *moec_quantizing_weights(const moec_quantizing *q)
{
    return q->work.weights;
}

moec_quantize_report moec_quantizing_report(const moec_quantizing *q)
{
    return q->report;
}

const moec_json *moec_quantizing_modules(const moec_quantizing *q)
{
    return q->modules;
}

moec_status moec_quantizing_keep(moec_quantizing *q, const char *dir, moec_err *err)
{
    return moec_work_keep(&q->work, dir, err);
}

void moec_quantizing_close(moec_quantizing *q, bool remove)
{
    if (!q)
        return;
    moec_work_close(&q->work, remove);
    moec_json_free(q->modules);
    moec_free(q);
}
