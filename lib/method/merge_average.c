/* Members of a group, brought into the centre's order, to one expert: the weighted mean of their matrices, and with a subspace
 * its projection. */
#include "method/merge_parts.h"

#include "base/mem.h"
#include "base/par.h"
#include "num/linalg.h"

#include <math.h>
#include <string.h>

enum { BAND = 64, TOKENS = 256 };

typedef struct averager {
    moec_filling *f;
    moec_rows sum, centre, member;
    moec_subspace *space;      /* NULL: not projected */
    moec_alignment order;
    float *acts[2];            /* [tokens,I] of centre and member; NULL: not aligned by them */
    int64_t tokens, every;
    moec_room room;            /* for those */
    double *weight;            /* [E] of the group's members, 0 of others */
} averager;

static const moec_align_opts aligning = {.dense = MOEC_ALIGN_DENSE, .candidates = MOEC_ALIGN_CANDIDATES};

static int64_t sample_step(int64_t n)
{
    return n > MOEC_MERGE_TOKENS ? (n + MOEC_MERGE_TOKENS - 1) / MOEC_MERGE_TOKENS : 1;
}

static moec_status averager_new(averager *a, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_filling *f = a->f;
    const size_t width = (size_t)f->width;
    MOEC_TRY(moec__rows_new(&a->sum, f, f->width, err));
    MOEC_TRY(moec__rows_new(&a->member, f, f->width, err));
    MOEC_TRY(MOEC_NEW(a->weight, (size_t)f->experts, err));
    if (f->r->align != MOEC_ALIGN_NONE) {
        MOEC_TRY(moec__rows_new(&a->centre, f, f->width, err));
        MOEC_TRY(MOEC_NEW(a->order.from, width, err));
        MOEC_TRY(MOEC_NEW(a->order.scale, width, err));
    }
    if (f->r->align == MOEC_ALIGN_ACTIVATIONS) {
        a->every = sample_step(f->t->n);
        a->tokens = (f->t->n + a->every - 1) / a->every;
        MOEC_TRY(MOEC_NEW(a->acts[0], (size_t)a->tokens * width, err));
        MOEC_TRY(MOEC_NEW(a->acts[1], (size_t)a->tokens * width, err));
        MOEC_TRY(moec__room_new(&a->room, TOKENS * (f->hidden + f->width), err));
    }
    if (f->r->fill == MOEC_FILL_SUBSPACE && f->r->rank < 1.0)
        MOEC_TRY(moec__subspace_new(&a->space, f, err));
done:
    return st;
}

static void averager_release(averager *a)
{
    moec__rows_release(&a->sum);
    moec__rows_release(&a->centre);
    moec__rows_release(&a->member);
    moec__subspace_free(a->space);
    moec_free(a->order.from);
    moec_free(a->order.scale);
    moec_free(a->acts[0]);
    moec_free(a->acts[1]);
    moec_free(a->room.store);
    moec_free(a->weight);
}

/* --- alignment -------------------------------------------------------------------------------------------------------------- */

typedef struct acting {
    const averager *a;
    const moec_rows *w;
    float *out;
} acting;

static moec_status act_some(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const acting *c = ctx;
    const moec_filling *f = c->a->f;
    float *x = moec__room_of(&c->a->room, worker), *up = x + TOKENS * f->hidden;
    (void)err;
    for (int64_t i = lo; i < hi; i++)
        memcpy(x + (i - lo) * f->hidden, f->t->x + i * c->a->every * f->hidden, (size_t)f->hidden * sizeof *x);
    moec__rows_act(c->out + lo * f->width, up, NULL, NULL, c->w, f, x, hi - lo);
    return MOEC_OK;
}

static moec_status activations(const averager *a, const moec_rows *w, float *out, moec_err *err)
{
    acting c = {a, w, out};
    return moec_par_for(a->tokens, TOKENS, act_some, &c, err);
}

/* The member takes the centre's order. */
static moec_status align_member(averager *a, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_filling *f = a->f;
    const moec_neurons to = moec__rows_neurons(&a->centre, f), from = moec__rows_neurons(&a->member, f);
    moec_align_opts o = aligning;
    bool moved = false;
    o.canonical = f->r->align != MOEC_ALIGN_PLAIN;
    if (a->tokens > 0) {
        MOEC_TRY(activations(a, &a->member, a->acts[1], err));
        MOEC_TRY(moec_align_activations(&a->order, &to, &from, a->acts[0], a->acts[1], a->tokens, &o, err));
    } else {
        MOEC_TRY(moec_align_weights(&a->order, &to, &from, &o, err));
    }
    for (int64_t j = 0; j < f->width && !moved; j++)
        moved = a->order.from[j] != j;
    f->tally->aligned += moved;
    f->gain += a->order.gain;
    f->alignments++;
    MOEC_TRY(moec__rows_apply(&a->member, f, &a->order, err));
done:
    return st;
}

/* --- mean ------------------------------------------------------------------------------------------------------------------- */

typedef struct adding {
    moec_rows *sum;
    const moec_rows *x;
    int64_t hidden;
    float weight;
} adding;

static void add_part(float *sum, const float *x, float weight, int64_t lo, int64_t n)
{
    for (int64_t i = lo; sum && i < lo + n; i++)
        sum[i] += weight * x[i];
}

static moec_status add_some(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const adding *a = ctx;
    const int64_t at = lo * a->hidden, n = (hi - lo) * a->hidden;
    (void)worker;
    (void)err;
    add_part(a->sum->gate, a->x->gate, a->weight, at, n);
    add_part(a->sum->up, a->x->up, a->weight, at, n);
    add_part(a->sum->down, a->x->down, a->weight, at, n);
    add_part(a->sum->gate_bias, a->x->gate_bias, a->weight, lo, hi - lo);
    add_part(a->sum->up_bias, a->x->up_bias, a->weight, lo, hi - lo);
    return MOEC_OK;
}

static moec_status add_member(averager *a, const moec_rows *x, int32_t e, moec_err *err)
{
    const moec_filling *f = a->f;
    adding c = {&a->sum, x, f->hidden, (float)f->g->weight[e]};
    a->weight[e] = f->g->weight[e];
    return moec_par_for(f->width, BAND, add_some, &c, err);
}

static bool selected(const moec_merge_task *t, int32_t e)
{
    for (int64_t i = 0; i < t->n * t->slots; i++)
        if (t->ids[i] == e)
            return true;
    return false;
}

/* Whitening needs tokens: of one member at least. */
static bool can_whiten(const moec_filling *f, int32_t centre)
{
    for (int32_t e = 0; f->r->whiten && e < f->experts; e++)
        if (f->g->centre[e] == centre && selected(f->t, e))
            return true;
    return false;
}

static moec_status fill_group(averager *a, int32_t centre, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_filling *f = a->f;
    const bool align = f->r->align != MOEC_ALIGN_NONE, whiten = a->space && can_whiten(f, centre);
    for (size_t i = 0; i < 5; i++) {
        float *const part[] = {a->sum.gate, a->sum.up, a->sum.down, a->sum.gate_bias, a->sum.up_bias};
        if (part[i])
            memset(part[i], 0, (size_t)(f->width * (i < 3 ? f->hidden : 1)) * sizeof(float));
    }
    memset(a->weight, 0, (size_t)f->experts * sizeof *a->weight);
    if (a->space)
        moec__subspace_clear(a->space);
    if (align)
        MOEC_TRY(moec__rows_read_expert(&a->centre, f, centre, err));
    if (a->tokens > 0)
        MOEC_TRY(activations(a, &a->centre, a->acts[0], err));
    for (int32_t e = 0; e < f->experts; e++) {
        const moec_rows *x = align && e == centre ? &a->centre : &a->member;
        if (f->g->centre[e] != centre)
            continue;
        f->tally->merged += e != centre;
        if (!(f->g->weight[e] > 0.0) && !a->space)
            continue;
        if (x == &a->member)
            MOEC_TRY(moec__rows_read_expert(&a->member, f, e, err));
        if (align && e != centre)
            MOEC_TRY(align_member(a, err));
        if (f->g->weight[e] > 0.0)
            MOEC_TRY(add_member(a, x, e, err));
        if (a->space)
            MOEC_TRY(moec__subspace_add(a->space, x, e, whiten, err));
    }
    if (a->space)
        MOEC_TRY(moec__subspace_project(a->space, &a->sum, err));
    MOEC_TRY(moec__rows_write(&a->sum, f, centre, err));
    MOEC_TRY(moec__down_bias_write(f, centre, a->weight, err));
done:
    return moec_within(err, st, "group of expert %d", (int)centre);
}

moec_status moec__fill_average(moec_filling *f, moec_err *err)
{
    moec_status st = MOEC_OK;
    averager a = {.f = f};
    MOEC_TRY(averager_new(&a, err));
    for (int32_t c = 0; c < f->experts; c++) {
        int64_t members = 0;
        for (int64_t e = 0; e < f->experts; e++)
            members += f->g->centre[e] == c;
        if (members > 1 && moec__fill_open(f, c))
            MOEC_TRY(fill_group(&a, c, err));
    }
done:
    averager_release(&a);
    return st;
}

size_t moec__fill_average_bytes(const moec_model *m, const moec_merge_recipe *r)
{
    const size_t width = (size_t)m->dims.expert_width, floats = 3 * moec__rows_floats(m, (int64_t)width);
    const size_t acts = (size_t)moec_par_threads() * TOKENS * ((size_t)m->dims.hidden + width) + 2 * MOEC_MERGE_TOKENS * width;
    return sizeof(float) * (floats + acts) + moec_align_bytes((int64_t)width, &aligning) +
           (r->fill == MOEC_FILL_SUBSPACE ? moec__subspace_bytes(m, r) : 0);
}
