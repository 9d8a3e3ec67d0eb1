/* Neurons of experts to and from float32 rows, whatever form their matrices have. */
#include "method/merge_parts.h"

#include "base/mem.h"
#include "base/par.h"
#include "num/linalg.h"

#include <string.h>

size_t moec__rows_floats(const moec_model *m, int64_t most)
{
    return (size_t)most * (3 * (size_t)m->dims.hidden + 2);
}

moec_status moec__rows_new(moec_rows *out, const moec_filling *f, int64_t most, moec_err *err)
{
    moec_status st = MOEC_OK;
    size_t part, all;
    *out = (moec_rows){.most = most};
    if (!moec_mul_size(&part, (size_t)most, (size_t)f->hidden) || !moec_mul_size(&all, part, f->gated ? 3 : 2) ||
        !moec_add_size(&all, all, 2 * (size_t)most))
        return moec_fail(err, MOEC_ENOMEM, "merge: %lld neurons are too many", (long long)most);
    MOEC_TRY(MOEC_NEW(out->store, all, err));
    out->up = out->store;
    out->down = out->up + part;
    out->gate = f->gated ? out->down + part : NULL;
    if (f->biased) {
        out->gate_bias = out->store + all - 2 * most;
        out->up_bias = out->gate_bias + most;
    }
done:
    return st;
}

void moec__rows_release(moec_rows *x)
{
    moec_free(x->store);
    *x = (moec_rows){.most = 0};
}

/* --- biases --------------------------------------------------------------------------------------------------------------- */

/* Biases of gate (column 0) and up (column 1) of part e of a stack, [I,2]: they lie as the columns of their matrices do. */
static moec_weight bias_view(const moec_filling *f, const moec_tensor *of, int64_t e)
{
    const moec_expert_layout layout = f->t->layer->layout;
    const bool pairs = layout == MOEC_LAYOUT_IN_OUT_PAIRS || layout == MOEC_LAYOUT_MXFP4_PAIRS;
    return (moec_weight){.of = of, .rows = f->width, .cols = 2, .at = e * 2 * f->width, .row_step = pairs ? 2 : 1,
                         .col_step = pairs ? 1 : f->width};
}

moec_status moec__down_bias_write(const moec_filling *f, int32_t expert, const double *weight, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t h = f->hidden;
    float *row = NULL;
    double *sum = NULL;
    if (!f->t->layer->down_bias || !f->to->down_bias)
        return MOEC_OK;
    const moec_weight to = moec_weight_of(f->to->down_bias);
    MOEC_TRY(MOEC_NEW(row, (size_t)h, err));
    MOEC_TRY(MOEC_NEW(sum, (size_t)h, err));
    for (int64_t e = 0; e < f->experts; e++) {
        if (!(weight[e] > 0.0))
            continue;
        moec_expert_down_bias(row, f->t->model, f->t->layer, e);
        if (!moec_all_finite(row, h))
            MOEC_TRY(moec_fail(err, MOEC_ENUMERIC, "expert %lld: a bias is NaN or infinite", (long long)e));
        for (int64_t i = 0; i < h; i++)
            sum[i] += weight[e] * (double)row[i];
    }
    for (int64_t i = 0; i < h; i++)
        row[i] = (float)sum[i];
    MOEC_TRY(moec_weight_write(&to, row, h, f->to->row[expert], 1, 0, h, err));
done:
    moec_free(row);
    moec_free(sum);
    return moec_within(err, st, "down bias of expert %d", (int)expert);
}

/* --- reading -------------------------------------------------------------------------------------------------------------- */

typedef struct reading {
    const moec_filling *f;
    const moec_neuron_id *who;
    moec_rows *x;
} reading;

/* Rows [at, at + n) are neurons [first, first + n) of one expert. */
static void read_run(const reading *a, float *scratch, int64_t at, int32_t expert, int64_t first, int64_t n)
{
    const moec_filling *f = a->f;
    const moec_mlp *e = &f->t->layer->expert[expert];
    const int64_t h = f->hidden;
    if (a->x->gate)
        moec_weight_read(a->x->gate + at * h, h, &e->gate, first, n, 0, h);
    moec_weight_read(a->x->up + at * h, h, &e->up, first, n, 0, h);
    moec_weight_read(scratch, n, &e->down, 0, h, first, n);
    for (int64_t j = 0; j < n; j++)
        for (int64_t i = 0; i < h; i++)
            a->x->down[(at + j) * h + i] = scratch[i * n + j];
    if (!f->biased)
        return;
    const int32_t *row = f->t->layer->gate_up_bias_row;
    const moec_weight bias = bias_view(f, f->t->layer->gate_up_bias, row ? row[expert] : expert);
    moec_weight_read(a->x->gate_bias + at, 1, &bias, first, n, 0, 1);
    moec_weight_read(a->x->up_bias + at, 1, &bias, first, n, 1, 1);
}

static moec_status read_some(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const reading *a = ctx;
    const moec_rows *x = a->x;
    const int64_t h = a->f->hidden, n = (hi - lo) * h;
    for (int64_t i = lo, end; i < hi; i = end) {
        const moec_neuron_id w = a->who[i];
        for (end = i + 1; end < hi && a->who[end].expert == w.expert && a->who[end].neuron == w.neuron + end - i;)
            end++;
        read_run(a, moec__room_of(&a->f->room, worker), i, w.expert, w.neuron, end - i);
    }
    if ((x->gate && !moec_all_finite(x->gate + lo * h, n)) || !moec_all_finite(x->up + lo * h, n) ||
        !moec_all_finite(x->down + lo * h, n) ||
        (x->up_bias && !(moec_all_finite(x->gate_bias + lo, hi - lo) && moec_all_finite(x->up_bias + lo, hi - lo))))
        return moec_fail(err, MOEC_ENUMERIC, "expert %d: a weight is NaN or infinite", (int)a->who[lo].expert);
    return MOEC_OK;
}

static void drop(const moec_mlp *e)
{
    if (e->gate.of)
        moec_weight_drop(&e->gate);
    moec_weight_drop(&e->up);
    moec_weight_drop(&e->down);
}

moec_status moec__rows_read(moec_rows *x, const moec_filling *f, const moec_neuron_id *who, int64_t n, moec_err *err)
{
    reading a = {f, who, x};
    const moec_status st = moec_par_for(n, MOEC_MERGE_BAND, read_some, &a, err);
    for (int64_t i = 0; i < n; i++)
        if (i + 1 == n || who[i + 1].expert != who[i].expert)
            drop(&f->t->layer->expert[who[i].expert]);
    return st;
}

moec_status moec__rows_read_expert(moec_rows *x, const moec_filling *f, int32_t expert, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_neuron_id *who = NULL;
    MOEC_TRY(moec_interrupted(err));
    MOEC_TRY(MOEC_NEW(who, (size_t)f->width, err));
    for (int64_t j = 0; j < f->width; j++)
        who[j] = (moec_neuron_id){expert, (int32_t)j};
    MOEC_TRY(moec__rows_read(x, f, who, f->width, err));
done:
    moec_free(who);
    return st;
}

/* --- writing -------------------------------------------------------------------------------------------------------------- */

typedef struct writing {
    const moec_filling *f;
    const moec_rows *x;
    const moec_mlp *e;
    moec_weight bias;
} writing;

static moec_status write_in(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const writing *a = ctx;
    const int64_t h = a->f->hidden, n = hi - lo;
    moec_status st = MOEC_OK;
    (void)worker;
    if (a->x->gate)
        MOEC_TRY(moec_weight_write(&a->e->gate, a->x->gate + lo * h, h, lo, n, 0, h, err));
    MOEC_TRY(moec_weight_write(&a->e->up, a->x->up + lo * h, h, lo, n, 0, h, err));
    if (a->bias.of) {
        MOEC_TRY(moec_weight_write(&a->bias, a->x->gate_bias + lo, 1, lo, n, 0, 1, err));
        MOEC_TRY(moec_weight_write(&a->bias, a->x->up_bias + lo, 1, lo, n, 1, 1, err));
    }
done:
    return st;
}

static moec_status write_down(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const writing *a = ctx;
    const int64_t h = a->f->hidden, width = a->f->width;
    float *scratch = moec__room_of(&a->f->room, worker);
    for (int64_t j = 0; j < width; j++)
        for (int64_t i = lo; i < hi; i++)
            scratch[(i - lo) * width + j] = a->x->down[j * h + i];
    return moec_weight_write(&a->e->down, scratch, width, lo, hi - lo, 0, width, err);
}

moec_status moec__rows_write(const moec_rows *x, const moec_filling *f, int32_t expert, moec_err *err)
{
    moec_status st = MOEC_OK;
    writing a = {.f = f, .x = x, .e = &f->to->expert[expert]};
    if (f->biased && f->to->gate_up_bias)
        a.bias = bias_view(f, f->to->gate_up_bias, f->to->row[expert]);
    MOEC_TRY(moec_par_for(f->width, MOEC_MERGE_BAND, write_in, &a, err));
    MOEC_TRY(moec_par_for(f->hidden, MOEC_MERGE_BAND, write_down, &a, err));
done:
    drop(a.e);
    return moec_within(err, st, "expert %d", (int)expert);
}

/* --- in memory ------------------------------------------------------------------------------------------------------------ */

/* Row `to` of x becomes factor times row `at` of y, which are [.,H] or [.] for a bias. */
static void put_row(float *x, int64_t to, const float *y, int64_t at, int64_t n, float factor)
{
    for (int64_t i = 0; x && i < n; i++)
        x[to * n + i] = factor * y[at * n + i];
}

static void put_neuron(const moec_rows *x, int64_t to, const moec_rows *y, int64_t at, int64_t hidden, float scale)
{
    put_row(x->gate, to, y->gate, at, hidden, 1.0f);
    put_row(x->up, to, y->up, at, hidden, scale);
    put_row(x->down, to, y->down, at, hidden, 1.0f / scale);
    put_row(x->gate_bias, to, y->gate_bias, at, 1, 1.0f);
    put_row(x->up_bias, to, y->up_bias, at, 1, scale);
}

/* Cycle by cycle: the neuron that a place loses first is kept aside until the cycle is closed. */
moec_status moec__rows_apply(moec_rows *x, const moec_filling *f, const moec_alignment *a, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_rows aside = {.most = 0};
    bool *done = NULL;
    MOEC_TRY(moec__rows_new(&aside, f, 1, err));
    MOEC_TRY(MOEC_NEW(done, (size_t)f->width, err));
    for (int64_t first = 0; first < f->width; first++) {
        if (done[first])
            continue;
        put_neuron(&aside, 0, x, first, f->hidden, 1.0f);
        int64_t j = first;
        for (; a->from[j] != first; j = a->from[j]) {
            put_neuron(x, j, x, a->from[j], f->hidden, a->scale[j]);
            done[j] = true;
        }
        put_neuron(x, j, &aside, 0, f->hidden, a->scale[j]);
        done[j] = true;
    }
done:
    moec_free(done);
    moec__rows_release(&aside);
    return st;
}

moec_neurons moec__rows_neurons(const moec_rows *x, const moec_filling *f)
{
    return (moec_neurons){.gate = x->gate, .up = x->up, .down = x->down, .gate_bias = x->gate_bias, .up_bias = x->up_bias,
                          .width = f->width, .hidden = f->hidden, .scales = f->scales};
}

void moec__rows_act(float *act, float *up, float *pre_gate, float *pre_up, const moec_rows *w, const moec_filling *f,
                    const float *x, int64_t n)
{
    const int64_t h = f->hidden, width = f->width;
    moec_sgemm(false, true, n, width, h, 1.0f, x, h, w->gate, h, 0.0f, act, width);
    moec_sgemm(false, true, n, width, h, 1.0f, x, h, w->up, h, 0.0f, up, width);
    if (pre_gate)
        memcpy(pre_gate, act, (size_t)(n * width) * sizeof *act);
    if (pre_up)
        memcpy(pre_up, up, (size_t)(n * width) * sizeof *up);
    for (int64_t i = 0; w->gate_bias && i < n; i++) {
        moec_add(act + i * width, w->gate_bias, width);
        moec_add(up + i * width, w->up_bias, width);
    }
    moec_activate(act, up, n * width, f->t->model);
}
