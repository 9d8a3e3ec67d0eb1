/* See all_outputs.h. The experts of a block are shared out among the threads, each expert to one. */
#include "method/all_outputs.h"

#include "base/log.h"
#include "base/mem.h"
#include "base/par.h"
#include "num/vec.h"

enum { BLOCK_FLOATS = 1 << 27 }; /* most values of y */

/* ---- one expert ------------------------------------------------------------------------------------------------------ */

size_t moec__expert_room_bytes(const moec_model *m, int64_t tokens)
{
    const size_t h = (size_t)m->dims.hidden, i = (size_t)m->dims.expert_width;
    return 4 * ((size_t)tokens * (2 * i + h) + 2 * i + h);
}

moec_status moec__expert_room_new(moec_expert_room *r, const moec_model *m, int64_t tokens, moec_err *err)
{
    moec_status st = MOEC_OK;
    const size_t n = (size_t)tokens, h = (size_t)m->dims.hidden, i = (size_t)m->dims.expert_width;
    *r = (moec_expert_room){0};
    MOEC_TRY(MOEC_NEW(r->a, n * i, err));
    MOEC_TRY(MOEC_NEW(r->b, n * i, err));
    MOEC_TRY(MOEC_NEW(r->out, n * h, err));
    MOEC_TRY(MOEC_NEW(r->gate_bias, i, err));
    MOEC_TRY(MOEC_NEW(r->up_bias, i, err));
    MOEC_TRY(MOEC_NEW(r->down_bias, h, err));
done:
    if (st != MOEC_OK)
        moec__expert_room_release(r);
    return st;
}

void moec__expert_room_release(moec_expert_room *r)
{
    void *const all[] = {r->a, r->b, r->out, r->gate_bias, r->up_bias, r->down_bias};
    for (size_t i = 0; i < MOEC_COUNT(all); i++)
        moec_free(all[i]);
    *r = (moec_expert_room){0};
}

void moec__expert_input(float *panels, const float *x, const int32_t *row, int64_t n, const moec_model *m)
{
    const moec_dims *d = &m->dims;
    moec_panel_pack(panels, x, d->hidden, row, n, d->hidden);
    for (int64_t i = 0; d->input_scale != 1.0 && i < moec_panels(n) * d->hidden * MOEC_PANEL; i++)
        panels[i] *= (float)d->input_scale;
}

static void add_bias(float *panels, const float *bias, int64_t n, int64_t width)
{
    for (int64_t i = 0; i < moec_panels(n) * width; i++)
        for (int64_t lane = 0; lane < MOEC_PANEL; lane++)
            panels[i * MOEC_PANEL + lane] += bias[i % width]; /* lanes without a token are never looked at */
}

moec_status moec__expert_run(moec_expert_room *r, const float *x, int64_t n, const moec_model *m, const moec_layer *l, int64_t e,
                             moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_mlp *w = &l->expert[e];
    const moec_dims *d = &m->dims;
    const int64_t wide = d->expert_width, values = moec_panels(n) * wide * MOEC_PANEL;
    MOEC_TRY(moec_gemm_weight(r->a, x, n, &w->gate, MOEC_COMPUTE_F32, NULL, err));
    MOEC_TRY(moec_gemm_weight(r->b, x, n, &w->up, MOEC_COMPUTE_F32, NULL, err));
    if (l->gate_up_bias) {
        moec_expert_bias(r->gate_bias, r->up_bias, m, l, e);
        add_bias(r->a, r->gate_bias, n, wide);
        add_bias(r->b, r->up_bias, n, wide);
    }
    moec_activate(r->a, r->b, values, m);
    MOEC_TRY(moec_gemm_weight(r->out, r->a, n, &w->down, MOEC_COMPUTE_F32, NULL, err));
    if (l->down_bias) {
        moec_expert_down_bias(r->down_bias, m, l, e);
        add_bias(r->out, r->down_bias, n, d->hidden);
    }
done:
    moec_weight_drop(&w->gate);
    moec_weight_drop(&w->up);
    moec_weight_drop(&w->down);
    return st;
}

/* ---- all of them ----------------------------------------------------------------------------------------------------- */

typedef struct outputs {
    const moec_model *model;
    const moec_layer *layer;
    const int32_t *row;      /* [n] */
    int64_t at, m;           /* current block: first token, tokens */
    float *x, *y;            /* its panels [block,H]; [block,E,H] */
    moec_expert_room *room;  /* [threads] */
    int threads;
} outputs;

static int64_t block_of(const moec_dims *d)
{
    const int64_t fit = BLOCK_FLOATS / (d->experts * d->hidden) / MOEC_PANEL * MOEC_PANEL;
    return fit < MOEC_PANEL ? MOEC_PANEL : fit > MOEC_OUTPUTS_BLOCK ? MOEC_OUTPUTS_BLOCK : fit;
}

size_t moec__all_outputs_bytes(const moec_model *m)
{
    const int64_t block = block_of(&m->dims);
    return 4 * (size_t)(block * m->dims.hidden) * (1 + (size_t)m->dims.experts) +
           moec__expert_room_bytes(m, block) * (size_t)moec_par_threads();
}

static moec_status run_experts(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    outputs *u = ctx;
    moec_status st = MOEC_OK;
    const int64_t hidden = u->model->dims.hidden, ld = u->model->dims.experts * hidden;
    moec_expert_room *r = &u->room[worker];
    for (int64_t e = lo; e < hi; e++) {
        MOEC_TRY(moec_interrupted(err));
        MOEC_TRY(moec_within(err, moec__expert_run(r, u->x, u->m, u->model, u->layer, e, err), "expert %lld", (long long)e));
        moec_panel_unpack(u->y + e * hidden, ld, r->out, u->m, hidden);
        for (int64_t i = 0; i < u->m; i++)
            if (!moec_all_finite(u->y + i * ld + e * hidden, hidden))
                return moec_fail(err, MOEC_ENUMERIC, "expert %lld: its output of token %lld is not finite", (long long)e,
                                 (long long)u->row[u->at + i]);
    }
done:
    return st;
}

moec_status moec__all_outputs(const moec_model *m, const moec_layer *l, const float *x, const int32_t *row, int64_t n,
                              moec_outputs_fn *fn, void *ctx, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_dims *d = &m->dims;
    outputs u = {.model = m, .layer = l, .row = row, .threads = moec_par_threads()};
    int64_t block = block_of(d);
    if (block > moec_panels(n) * MOEC_PANEL)
        block = moec_panels(n) * MOEC_PANEL;
    MOEC_TRY(MOEC_NEW(u.x, (size_t)(block * d->hidden), err));
    MOEC_TRY(MOEC_NEW(u.y, (size_t)(block * d->hidden) * (size_t)d->experts, err));
    MOEC_TRY(MOEC_NEW(u.room, (size_t)u.threads, err));
    for (int i = 0; i < u.threads; i++)
        MOEC_TRY(moec__expert_room_new(&u.room[i], m, block, err));
    for (u.at = 0; u.at < n; u.at += block) {
        u.m = n - u.at < block ? n - u.at : block;
        moec__expert_input(u.x, x, row + u.at, u.m, m);
        MOEC_TRY(moec_par_for(d->experts, 1, run_experts, &u, err));
        MOEC_TRY(fn(ctx, u.at, u.m, u.y, err));
    }
done:
    for (int i = 0; u.room && i < u.threads; i++)
        moec__expert_room_release(&u.room[i]);
    moec_free(u.room);
    moec_free(u.x);
    moec_free(u.y);
    return st;
}
