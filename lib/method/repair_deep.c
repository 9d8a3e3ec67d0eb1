/* See moec_repair_deep. */
#include "method/repair_parts.h"

#include "base/mem.h"
#include "base/par.h"
#include "base/random.h"

#include <math.h>
#include <string.h>

enum { BATCH_GUESS = 1024 }; /* tokens of a batch in moec_repair_bytes */

typedef struct deep {
    moec_repair_task *t;
    const moec_deep_opts *o;
    moec_fit *fit;
    bool route;
    float *z;              /* [n,H] what the block is to give; after the fit what is missing then */
    int32_t *ids;          /* [n,slots] new selections, where the router is fitted */
    float *gates;
    int32_t *token, *order; /* [n] tokens of the block, ascending; the fitted ones in random order */
    int64_t n, n_fit;
    moec_tokens k;         /* of one expert */
    moec_room room;
    uint64_t drawn;        /* state of the generator */
} deep;

static uint64_t draw(deep *d)
{
    d->drawn += UINT64_C(0x9e3779b97f4a7c15);
    return moec_mix64(d->drawn);
}

/* Fisher and Yates. The remainder's preference for small numbers is below 2^-32. */
static void shuffle(deep *d)
{
    for (int64_t i = d->n_fit - 1; i > 0; i--) {
        const int64_t j = (int64_t)(draw(d) % (uint64_t)(i + 1));
        const int32_t swap = d->order[i];
        d->order[i] = d->order[j];
        d->order[j] = swap;
    }
}

/* --- blocks --------------------------------------------------------------------------------------------------------------- */

typedef struct sizes {
    int64_t experts, width; /* of a block: several whole ones, or neurons of one */
} sizes;

static sizes sizes_of(const moec_dims *d, int64_t keep, int64_t block_values)
{
    const int64_t neuron = 3 * d->hidden;
    int64_t n = block_values / (neuron * d->expert_width), width = block_values / neuron;
    if (n > 0)
        return (sizes){n < keep ? n : keep, d->expert_width};
    return (sizes){1, width > 0 ? width : 1};
}

static bool in_block(const moec_repair_task *t, const moec_piece *p, int64_t pieces, int64_t token)
{
    for (int64_t j = token * t->slots; j < (token + 1) * t->slots; j++)
        for (int64_t i = 0; i < pieces; i++)
            if (t->ids[j] == p[i].expert)
                return true;
    return false;
}

static void list_tokens(deep *d)
{
    const moec_repair_task *t = d->t;
    const moec_piece *p;
    const int64_t pieces = moec__fit_pieces(d->fit, &p);
    d->n = d->n_fit = 0;
    for (int64_t i = 0; i < t->n; i++) {
        if (d->route || in_block(t, p, pieces, i))
            d->token[d->n++] = (int32_t)i;
        if (i + 1 == t->n_fit)
            d->n_fit = d->n;
    }
    memcpy(d->order, d->token, (size_t)d->n_fit * sizeof *d->order);
}

/* z += sign * what the block gives by these selections. */
static moec_status add_block(deep *d, float sign, const int32_t *ids, const float *gates, moec_err *err)
{
    const moec_piece *p;
    const int64_t pieces = moec__fit_pieces(d->fit, &p);
    moec_status st = MOEC_OK;
    for (int64_t i = 0; i < pieces && st == MOEC_OK; i++) {
        moec__picked_of(&d->k, d->t, ids, gates, p[i].expert);
        st = moec__piece_add(d->z, sign, d->t, &p[i], &d->k, &d->room, err);
    }
    return st;
}

/* sum_t w_t |v_t|^2 over tokens [lo, hi) of the block. */
static double weighted(const deep *d, const float *v, int64_t lo, int64_t hi)
{
    const int64_t hidden = d->t->model->dims.hidden;
    double sum = 0.0;
    for (int64_t i = lo; i < hi; i++)
        sum += (double)d->t->weight[d->token[i]] * moec_sum_sq(v + d->token[i] * hidden, hidden);
    return sum;
}

static void copy_rows(const deep *d, float *to, const float *from)
{
    const int64_t hidden = d->t->model->dims.hidden;
    for (int64_t i = 0; i < d->n; i++)
        memcpy(to + d->token[i] * hidden, from + d->token[i] * hidden, (size_t)hidden * sizeof *to);
}

/* --- a visit --------------------------------------------------------------------------------------------------------------- */

static moec_adam_factors factors_of(const moec_deep_opts *o, int64_t step, int64_t steps)
{
    static const double pi = 3.14159265358979323846, keep1 = 0.9, keep2 = 0.98;
    const int64_t warm = steps / 20 > 1 ? steps / 20 : 1;
    const double rate = step < warm ? (double)(step + 1) / (double)warm
                                    : 0.5 * (1.0 + cos(pi * (double)(step - warm) / (double)(steps - warm)));
    return (moec_adam_factors){
        .keep1 = (float)keep1,
        .keep2 = (float)keep2,
        .fix1 = (float)(1.0 / (1.0 - pow(keep1, (double)(step + 1)))),
        .fix2 = (float)(1.0 / (1.0 - pow(keep2, (double)(step + 1)))),
        .rate = (float)(o->rate * rate),
        .eps = 1e-12f,
    };
}

/* Batches of one pass differ by one token at most: a last one of a few would be a step as long as the others, and blind. */
static moec_status fit(deep *d, double norm, int64_t width, moec_err *err)
{
    const int64_t batches = (d->n_fit + d->o->batch - 1) / d->o->batch, steps = batches * d->o->epochs;
    const int64_t all = d->t->model->dims.expert_width;
    moec_status st = MOEC_OK;
    double loss;
    for (int64_t s = 0; s < steps; s++) {
        const int64_t b = s % batches, lo = b * d->n_fit / batches, n = (b + 1) * d->n_fit / batches - lo;
        const moec_adam_factors adam = factors_of(d->o, s, steps);
        if (b == 0)
            shuffle(d);
        MOEC_TRY(moec_interrupted(err));
        MOEC_TRY(moec__fit_batch(&loss, NULL, d->fit, d->z, d->order + lo, n, (double)d->n_fit / ((double)n * norm), &adam,
                                 err));
        if (d->t->progress)
            moec_progress_step(d->t->progress, (uint64_t)(moec__fit_pairs(d->fit) * width / all));
    }
done:
    return st;
}

static void round_values(const deep *d)
{
    const moec_piece *p;
    const int64_t pieces = moec__fit_pieces(d->fit, &p);
    for (int64_t i = 0; i < pieces; i++)
        moec__piece_round(&p[i], d->t);
    if (d->route)
        moec__round(moec__fit_router(d->fit), d->t->n_keep * d->t->model->dims.hidden, d->t->router.of->dtype);
}

static moec_status take(deep *d, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_repair_task *t = d->t;
    const moec_piece *p;
    const int64_t pieces = moec__fit_pieces(d->fit, &p), hidden = t->model->dims.hidden;
    for (int64_t i = 0; i < pieces; i++)
        MOEC_TRY(moec__piece_write(&p[i], t, MOEC_PART_GATE | MOEC_PART_UP | MOEC_PART_DOWN, err));
    copy_rows(d, t->rest, d->z);
    if (d->route) {
        MOEC_TRY(moec_weight_write(&t->router, moec__fit_router(d->fit), hidden, 0, t->n_keep, 0, hidden, err));
        memcpy(t->ids, d->ids, (size_t)(t->n * t->slots) * sizeof *t->ids);
        memcpy(t->gates, d->gates, (size_t)(t->n * t->slots) * sizeof *t->gates);
    }
done:
    return st;
}

static moec_status visit(int64_t *taken, deep *d, int64_t first, int64_t n, int64_t neuron, int64_t width, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_repair_task *t = d->t;
    int64_t values;
    MOEC_TRY(moec__fit_read(d->fit, first, n, neuron, width, err));
    list_tokens(d);
    copy_rows(d, d->z, t->rest);
    MOEC_TRY(add_block(d, 1.0f, t->ids, t->gates, err));
    const double norm = weighted(d, d->z, 0, d->n_fit);
    if (!(norm > 0.0)) /* no tokens, or nothing to give */
        goto done;
    MOEC_TRY(fit(d, norm, width, err));
    round_values(d);
    const float *v = moec__fit_values(d->fit, &values);
    if (!moec_all_finite(v, values)) /* diverged, or beyond float16 */
        goto done;
    if (d->route)
        MOEC_TRY(moec__fit_route(d->ids, d->gates, d->fit, err));
    MOEC_TRY(add_block(d, -1.0f, d->route ? d->ids : t->ids, d->route ? d->gates : t->gates, err));
    const int64_t lo = d->n > d->n_fit ? d->n_fit : 0;
    if (weighted(d, d->z, lo, d->n) < weighted(d, t->rest, lo, d->n)) {
        MOEC_TRY(take(d, err));
        *taken += 1;
    }
done:
    return st;
}

static moec_status sweep(int64_t *taken, deep *d, const sizes *s, moec_err *err)
{
    const int64_t all = d->t->model->dims.expert_width, keep = d->t->n_keep;
    moec_status st = MOEC_OK;
    for (int64_t i = 0; i < keep && st == MOEC_OK; i += s->experts)
        for (int64_t at = 0; at < all && st == MOEC_OK; at += s->width)
            st = visit(taken, d, i, keep - i < s->experts ? keep - i : s->experts, at,
                       all - at < s->width ? all - at : s->width, err);
    return st;
}

moec_status moec_repair_deep(int64_t *taken, moec_repair_task *t, const moec_deep_opts *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_dims *m = &t->model->dims;
    const sizes s = sizes_of(m, t->n_keep, o->block_values);
    const int64_t batch = o->batch < t->n_fit ? o->batch : t->n_fit;
    const size_t n = (size_t)t->n, cells = n * (size_t)t->slots;
    deep d = {.t = t, .o = o, .drawn = o->seed};
    *taken = 0;
    if (o->batch < 1)
        return moec_fail(err, MOEC_EINVAL, "repair: batches of %lld tokens", (long long)o->batch);
    if (t->n_fit == 0 || t->n_keep == 0)
        return MOEC_OK;
    d.route = s.experts == t->n_keep && s.width == m->expert_width && moec__fit_can_route(t);
    MOEC_TRY(moec__fit_new(&d.fit, t, s.experts, s.width, batch, d.route, err));
    MOEC_TRY(MOEC_NEW(d.z, n * (size_t)m->hidden, err));
    MOEC_TRY(MOEC_NEW(d.token, n, err));
    MOEC_TRY(MOEC_NEW(d.order, n, err));
    MOEC_TRY(MOEC_NEW(d.ids, d.route ? cells : 0, err));
    MOEC_TRY(MOEC_NEW(d.gates, d.route ? cells : 0, err));
    MOEC_TRY(moec__picked_new(&d.k, t->n, err));
    MOEC_TRY(moec__room_new(&d.room, moec__piece_floats(t, s.width), err));
    for (int i = 0; i < o->sweeps; i++)
        MOEC_TRY(sweep(taken, &d, &s, err));
done:
    moec__fit_free(d.fit);
    moec_free(d.z);
    moec_free(d.token);
    moec_free(d.order);
    moec_free(d.ids);
    moec_free(d.gates);
    moec__picked_release(&d.k);
    moec_free(d.room.store);
    return st;
}

static size_t deep_bytes(const moec_model *m, int64_t n, int64_t slots, int64_t block_values)
{
    const moec_dims *d = &m->dims;
    const sizes s = sizes_of(d, d->experts, block_values);
    const size_t tokens = (size_t)n, cell = sizeof(int32_t) + sizeof(float);
    const size_t room = (size_t)moec_par_threads() * MOEC_REPAIR_BLOCK * 2 * (size_t)(d->hidden + s.width) * sizeof(float);
    return room + moec__fit_bytes(m, slots, d->experts, s.experts, s.width, n < BATCH_GUESS ? n : BATCH_GUESS) +
           tokens * ((size_t)d->hidden * sizeof(float) + (size_t)slots * cell + 2 * cell);
}

size_t moec_repair_bytes(const moec_model *m, int64_t n, int64_t slots, int64_t block_values)
{
    const size_t steps = deep_bytes(m, n, slots, block_values), closed = moec__ridge_bytes(m, n);
    return steps > closed ? steps : closed;
}
