/* See repair_parts.h; and the functions of repair.h that are of no one way. */
#include "method/repair_parts.h"

#include "base/mem.h"
#include "base/par.h"
#include "num/linalg.h"

#include <math.h>
#include <string.h>

enum { BAND = 64 }; /* rows of a matrix that one thread reads or writes */

/* --- tokens ------------------------------------------------------------------------------------------------------------- */

moec_status moec__picked_new(moec_tokens *out, int64_t most, moec_err *err)
{
    moec_status st = MOEC_OK;
    *out = (moec_tokens){.n = 0};
    MOEC_TRY(MOEC_NEW(out->token, (size_t)most, err));
    MOEC_TRY(MOEC_NEW(out->gate, (size_t)most, err));
done:
    return st;
}

void moec__picked_release(moec_tokens *k)
{
    moec_free(k->token);
    moec_free(k->gate);
}

void moec__picked_of(moec_tokens *k, const moec_repair_task *t, const int32_t *ids, const float *gates, int32_t expert)
{
    k->n = k->n_fit = 0;
    for (int64_t i = 0; i < t->n; i++) {
        for (int64_t j = i * t->slots; j < (i + 1) * t->slots; j++)
            if (ids[j] == expert) {
                k->token[k->n] = (int32_t)i;
                k->gate[k->n++] = gates[j];
                break; /* an expert is selected once */
            }
        if (i + 1 == t->n_fit)
            k->n_fit = k->n;
    }
}

/* --- reading and writing ------------------------------------------------------------------------------------------------ */

/* A part of a view and the floats that it becomes or that become it. */
typedef struct transfer {
    const moec_weight *view;
    float *values; /* [rows,cols] */
    int64_t r, c, cols;
} transfer;

static moec_status read_band(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const transfer *a = ctx;
    float *out = a->values + lo * a->cols;
    (void)worker;
    moec_weight_read(out, a->cols, a->view, a->r + lo, hi - lo, a->c, a->cols);
    if (!moec_all_finite(out, (hi - lo) * a->cols))
        return moec_fail(err, MOEC_ENUMERIC, "tensor %s: a value is NaN or infinite", a->view->of->name);
    return MOEC_OK;
}

static moec_status write_band(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const transfer *a = ctx;
    (void)worker;
    return moec_weight_write(a->view, a->values + lo * a->cols, a->cols, a->r + lo, hi - lo, a->c, a->cols, err);
}

static void read_bias(moec_piece *p, const moec_repair_task *t, float *biases)
{
    const moec_dims *d = &t->model->dims;
    p->gate_bias = p->up_bias = p->down_bias = NULL;
    if (t->layer->gate_up_bias) {
        moec_expert_bias(biases, biases + d->expert_width, t->model, t->layer, p->expert);
        p->gate_bias = biases + p->first;
        p->up_bias = biases + d->expert_width + p->first;
    }
    if (t->layer->down_bias && p->width == d->expert_width) {
        p->down_bias = biases + 2 * d->expert_width;
        moec_expert_down_bias(p->down_bias, t->model, t->layer, p->expert);
    }
}

moec_status moec__piece_read(moec_piece *p, const moec_repair_task *t, float *values, float *biases, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t hidden = t->model->dims.hidden, part = hidden * p->width;
    const moec_mlp *e = &t->layer->expert[p->expert];
    p->gate = values;
    p->up = values + part;
    p->down = values + 2 * part;
    read_bias(p, t, biases);
    transfer gate = {&e->gate, p->gate, p->first, 0, hidden}, up = {&e->up, p->up, p->first, 0, hidden};
    transfer down = {&e->down, p->down, 0, p->first, p->width};
    MOEC_TRY(moec_par_for(p->width, BAND, read_band, &gate, err));
    MOEC_TRY(moec_par_for(p->width, BAND, read_band, &up, err));
    MOEC_TRY(moec_par_for(hidden, BAND, read_band, &down, err));
    moec_weight_drop(&e->gate);
    moec_weight_drop(&e->up);
    moec_weight_drop(&e->down);
done:
    return moec_within(err, st, "expert %lld", (long long)p->expert);
}

moec_status moec__piece_write(const moec_piece *p, const moec_repair_task *t, uint32_t parts, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t hidden = t->model->dims.hidden;
    const moec_mlp *e = &t->layer->expert[p->expert];
    transfer gate = {&e->gate, p->gate, p->first, 0, hidden}, up = {&e->up, p->up, p->first, 0, hidden};
    transfer down = {&e->down, p->down, 0, p->first, p->width};
    if (parts & MOEC_PART_GATE)
        MOEC_TRY(moec_par_for(p->width, BAND, write_band, &gate, err));
    if (parts & MOEC_PART_UP)
        MOEC_TRY(moec_par_for(p->width, BAND, write_band, &up, err));
    if (parts & MOEC_PART_DOWN)
        MOEC_TRY(moec_par_for(hidden, BAND, write_band, &down, err));
    moec_weight_drop(&e->gate);
    moec_weight_drop(&e->up);
    moec_weight_drop(&e->down);
done:
    return moec_within(err, st, "expert %lld", (long long)p->expert);
}

void moec__round(float *x, int64_t n, moec_dtype dtype)
{
    enum { PART = 512 };
    uint16_t part[PART];
    for (int64_t at = 0; at < n && (dtype == MOEC_BF16 || dtype == MOEC_F16); at += PART) {
        const int64_t k = n - at < PART ? n - at : PART;
        for (int64_t i = 0; i < k; i++)
            part[i] = dtype == MOEC_BF16 ? moec_to_bf16(x[at + i]) : moec_to_f16(x[at + i]);
        moec_dtypes[dtype].to_f32(x + at, part, k);
    }
}

void moec__piece_round(const moec_piece *p, const moec_repair_task *t)
{
    const int64_t part = t->model->dims.hidden * p->width;
    const moec_mlp *e = &t->layer->expert[p->expert];
    moec__round(p->gate, part, e->gate.of->dtype);
    moec__round(p->up, part, e->up.of->dtype);
    moec__round(p->down, part, e->down.of->dtype);
}

/* --- outputs ------------------------------------------------------------------------------------------------------------ */

moec_status moec__room_new(moec_room *out, int64_t floats, moec_err *err)
{
    out->each = (floats + 15) / 16 * 16;
    return MOEC_NEW(out->store, (size_t)moec_par_threads() * (size_t)out->each, err);
}

int64_t moec__piece_floats(const moec_repair_task *t, int64_t width)
{
    return MOEC_REPAIR_BLOCK * 2 * (t->model->dims.hidden + width);
}

/* out [n,rows] = x w^T + bias */
static void product(float *out, const float *x, const float *w, const float *bias, int64_t n, int64_t rows, int64_t cols)
{
    moec_sgemm(false, true, n, rows, cols, 1.0f, x, cols, w, cols, 0.0f, out, rows);
    for (int64_t i = 0; bias && i < n; i++)
        moec_add(out + i * rows, bias, rows);
}

void moec__piece_input(float *x, const float *from, const moec_repair_task *t, const int32_t *token, const float *gate, int64_t n)
{
    const int64_t hidden = t->model->dims.hidden;
    for (int64_t i = 0; i < n; i++) {
        memcpy(x + i * hidden, from + token[i] * hidden, (size_t)hidden * sizeof *x);
        for (int64_t j = 0; t->model->family->weight_on_input && j < hidden; j++)
            x[i * hidden + j] *= gate[i];
    }
}

void moec__piece_act(float *act, float *slope, const float **applied, float *room, const moec_repair_task *t, const moec_piece *p,
                     const int32_t *token, const float *gate, int64_t n)
{
    const moec_dims *d = &t->model->dims;
    const int64_t hidden = d->hidden, values = n * p->width;
    float *x = room, *up = room + MOEC_REPAIR_BLOCK * hidden, *of_gate = up + MOEC_REPAIR_BLOCK * p->width;
    moec__piece_input(x, t->x, t, token, gate, n);
    product(act, x, p->gate, p->gate_bias, n, p->width, hidden);
    product(up, x, p->up, p->up_bias, n, p->width, hidden);
    if (slope)
        memcpy(of_gate, act, (size_t)values * sizeof *act);
    moec_activate(act, up, values, t->model);
    for (int64_t i = 0; slope && i < values; i++)
        slope[i] = 1.0f;
    if (slope && t->model->family->activation == MOEC_ACT_SWIGLU_CLAMPED)
        moec_swiglu_clamped_grad(of_gate, up, slope, values, (float)d->act_limit, (float)d->act_alpha);
    else if (slope)
        moec_silu_mul_grad(of_gate, up, slope, values);
    if (slope)
        memcpy(slope, up, (size_t)values * sizeof *up);
    *applied = t->model->family->weight_on_input ? NULL : gate;
}

typedef struct adding {
    float *dst, sign;
    const moec_repair_task *t;
    const moec_piece *p;
    const moec_tokens *k;
    const moec_room *room;
} adding;

/* One block of tokens, which are all different. */
static moec_status add_block(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const adding *a = ctx;
    const int64_t hidden = a->t->model->dims.hidden, n = hi - lo, block = MOEC_REPAIR_BLOCK;
    float *room = moec__room_of(a->room, worker), *out = room + block * (hidden + a->p->width), *act = out + block * hidden;
    const float *gate;
    moec_status st = moec_interrupted(err);
    if (st != MOEC_OK)
        return st;
    moec__piece_act(act, NULL, &gate, room, a->t, a->p, a->k->token + lo, a->k->gate + lo, n);
    product(out, act, a->p->down, a->p->down_bias, n, hidden, a->p->width);
    for (int64_t i = 0; i < n; i++)
        moec_saxpy(a->dst + a->k->token[lo + i] * hidden, gate ? a->sign * gate[i] : a->sign, out + i * hidden, hidden);
    return MOEC_OK;
}

moec_status moec__piece_add(float *dst, float sign, const moec_repair_task *t, const moec_piece *p, const moec_tokens *k,
                            const moec_room *room, moec_err *err)
{
    adding a = {dst, sign, t, p, k, room};
    return moec_par_for(k->n, MOEC_REPAIR_BLOCK, add_block, &a, err);
}

/* --- repair.h ----------------------------------------------------------------------------------------------------------- */

moec_status moec_repair_start(moec_repair_task *t, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t width = t->model->dims.expert_width;
    float *values = NULL, *biases = NULL;
    moec_room room = {.store = NULL};
    moec_tokens k = {.n = 0};
    MOEC_TRY(moec__picked_new(&k, t->n, err));
    MOEC_TRY(moec__room_new(&room, moec__piece_floats(t, width), err));
    MOEC_TRY(MOEC_NEW(values, (size_t)moec__piece_values(t, width), err));
    MOEC_TRY(MOEC_NEW(biases, (size_t)moec__piece_biases(t), err));
    for (int64_t i = 0; i < t->n_keep; i++) {
        moec_piece p = {.expert = t->keep[i], .width = width};
        MOEC_TRY(moec_interrupted(err));
        moec__picked_of(&k, t, t->ids, t->gates, p.expert);
        if (k.n == 0)
            continue;
        MOEC_TRY(moec__piece_read(&p, t, values, biases, err));
        MOEC_TRY(moec__piece_add(t->rest, -1.0f, t, &p, &k, &room, err));
    }
done:
    moec_free(values);
    moec_free(biases);
    moec_free(room.store);
    moec__picked_release(&k);
    return st;
}

moec_repair_error moec_repair_missing(const moec_repair_task *t)
{
    const int64_t hidden = t->model->dims.hidden;
    moec_repair_error sum = {0.0, 0.0};
    for (int64_t i = 0; i < t->n; i++)
        *(i < t->n_fit ? &sum.fit : &sum.held) += (double)t->weight[i] * moec_sum_sq(t->rest + i * hidden, hidden);
    return sum;
}
