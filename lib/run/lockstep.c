/* See lockstep.h. */
#include "run/lockstep.h"

#include "base/mem.h"
#include "method/choose.h"
#include "num/vec.h"

#include <string.h>

/* Windows by number over all domains; which are held out depends on the text alone. Of both parts the domains stand together. */
moec_status moec__lockstep_place(moec_lockstep *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_corpus *c = u->o->corpus;
    const int64_t every = MOEC_LOCKSTEP_EVERY;
    int64_t windows = 0, held = 0, at = 0, w = 0;
    for (int d = 0; d < c->n_domains; d++)
        windows += c->domain[d].n_windows;
    MOEC_TRY(MOEC_NEW(u->row, (size_t)windows, err));
    MOEC_TRY(MOEC_NEW(u->text, (size_t)c->n_domains + 1, err));
    MOEC_TRY(MOEC_NEW(u->text_weight, (size_t)c->n_domains, err));
    for (int pass = 0; pass < 2; pass++) {
        w = 0;
        for (int d = 0; d < c->n_domains; d++) {
            if (pass == 0) {
                u->text[d] = at;
                u->text_weight[d] = c->domain[d].weight;
            }
            for (int64_t i = 0; i < c->domain[d].n_windows; i++, w++) {
                const bool out = windows > 1 && w % every == (windows < every ? windows - 1 : every - 1);
                if (out != (pass == 1))
                    continue;
                u->row[w] = at;
                at += c->domain[d].start[i + 1] - c->domain[d].start[i];
                held += out ? c->domain[d].start[i + 1] - c->domain[d].start[i] : 0;
            }
        }
    }
    u->n = at;
    u->n_fit = u->text[c->n_domains] = at - held;
done:
    return st;
}

moec_status moec__lockstep_chunks(moec_lockstep *u, moec_err *err)
{
    moec_status st = MOEC_NEW(u->window, (size_t)u->first->n_chunks, err);
    int64_t w = 0;
    for (int64_t c = 0; st == MOEC_OK && c < u->first->n_chunks; c++) {
        u->window[c] = w;
        w += u->first->chunk[c].n_seq;
    }
    return st;
}

/* What is kept besides the two passes. */
static size_t own_bytes(const moec_lockstep *u)
{
    const size_t n = (size_t)u->n;
    const size_t fit = moec_repair_bytes(u->m, u->n, u->slots, MOEC_REPAIR_BLOCK_VALUES);
    const size_t router = u->o->router ? moec_repair_router_bytes(u->m, u->n, u->slots) : 0;
    const size_t thin = (size_t)u->workers * (size_t)u->thin_bytes, most = fit > router ? fit : router; /* one after the other */
    return n * (2 * (size_t)u->m->dims.hidden + (size_t)u->ld + 1 + 3 * (size_t)u->slots) * sizeof(float) +
           (most > thin ? most : thin) +
           (u->o->method ? moec_choose_bytes(u->m) : 0) + moec__merge_bytes(u);
}

/* Of the first pass. `spare`: the least that the second can do with is kept free for it. */
moec_pass_opts moec__lockstep_opts(uint64_t *spare, const moec_lockstep *u)
{
    moec_pass_opts o = {.compute = u->o->compute, .watch = true, .max_memory = u->o->max_memory, .what = "repair"};
    const uint64_t before = moec_resident_memory();
    moec_pass_opts least = o;
    moec_pass_plan second = {0};
    least.max_memory = 1;
    least.look = true;
    if (moec_pass_estimate(&second, &u->twin.variant->model, u->n, moec_pass_max_seq(u->o->corpus), &least, NULL) == MOEC_OK)
        second.bytes = before; /* a byte is never enough */
    *spare = second.bytes > before ? second.bytes - before : 0;
    o.fixed_bytes = own_bytes(u) + (size_t)*spare;
    return o;
}

moec_status moec__lockstep_room(moec_lockstep *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    const size_t n = (size_t)u->n, values = n * (size_t)u->m->dims.hidden;
    uint64_t spare;
    moec_pass_opts o = moec__lockstep_opts(&spare, u);
    MOEC_TRY(moec_pass_new(&u->first, u->m, u->o->corpus, &o, err));
    const uint64_t counted = moec_resident_memory() + spare; /* what the first one has touched by now counts as resident */
    o.fixed_bytes = u->first->plan.bytes > counted ? (size_t)(u->first->plan.bytes - counted) : 0;
    o.look = true;
    MOEC_TRY(moec_pass_new(&u->second, &u->twin.variant->model, u->o->corpus, &o, err));
    MOEC_TRY(moec__lockstep_chunks(u, err));
    MOEC_TRY(MOEC_NEW(u->x, values, err));
    MOEC_TRY(MOEC_NEW(u->y, values, err));
    MOEC_TRY(MOEC_NEW(u->logits, n * (size_t)u->ld, err));
    MOEC_TRY(MOEC_NEW(u->weight, n, err));
    MOEC_TRY(MOEC_NEW(u->ids, n * (size_t)u->slots, err));
    MOEC_TRY(MOEC_NEW(u->gates, n * (size_t)u->slots, err));
done:
    return st;
}

void moec__lockstep_release(moec_lockstep *u)
{
    moec_progress_stop(&u->progress);
    moec_pass_free(u->first);
    moec_pass_free(u->second);
    moec_preview_release(&u->twin);
    moec_free(u->row);
    moec_free(u->window);
    moec_free(u->text);
    moec_free(u->text_weight);
    moec_free(u->x);
    moec_free(u->y);
    moec_free(u->logits);
    moec_free(u->weight);
    moec_free(u->ids);
    moec_free(u->gates);
    moec_merge_groups_release(&u->groups);
}

/* --- what a layer is to do ------------------------------------------------------------------------------------------- */

int64_t moec__lockstep_row(const moec_lockstep *u, const moec_pass *p, const moec_chunk *c, int64_t seq)
{
    return u->row[u->window[c - p->chunk] + seq];
}

/* What is wanted where a norm stands behind the branch, the original's own output; what experts are grouped by, where that is what
 * the original's layer sees. */
static moec_status see_original(void *ctx, int worker, const moec_chunk *c, const moec_moe_view *v, moec_err *err)
{
    moec_lockstep *u = ctx;
    const int64_t H = u->m->dims.hidden;
    const bool post = u->m->layer[v->layer].vec[MOEC_VEC_POST_MLP], group = u->o->merge && u->o->merge->original;
    (void)worker;
    (void)err;
    for (int64_t s = 0; s < v->n_seq; s++) {
        const int64_t t = v->seq[s], n = v->seq[s + 1] - t, row = moec__lockstep_row(u, u->first, c, s);
        if (post)
            memcpy(u->y + row * H, v->r + t * H, (size_t)(n * H) * sizeof *u->y);
        if (post && v->shared)
            moec_add(u->y + row * H, v->shared + t * H, n * H);
        if (group) {
            memcpy(u->x + row * H, v->x + t * H, (size_t)(n * H) * sizeof *u->x);
            memcpy(u->logits + row * u->ld, v->logits + t * v->ld, (size_t)(n * u->ld) * sizeof *u->logits);
        }
    }
    return MOEC_OK;
}

/* One window of the twin: input, logits, weight, and what is left to the routed experts. */
static moec_status see_window(moec_lockstep *u, int64_t token, int64_t row, const moec_moe_view *v, int64_t t, int64_t n,
                              moec_err *err)
{
    const int64_t H = u->m->dims.hidden;
    const moec_layer *l = &u->m->layer[v->layer];
    const float scale = (float)(1.0 / u->m->dims.residual_scale);
    float *y = u->y + row * H, *after = u->x + row * H; /* x comes last */
    moec_status st = moec_hidden_read(after, u->first->hidden, token, n, err);
    if (st != MOEC_OK)
        return st;
    for (int64_t i = 0; i < n; i++)
        u->weight[row + i] = (float)((double)H / (moec_sum_sq(after + i * H, H) + 1e-30));
    for (int64_t i = 0; !l->vec[MOEC_VEC_POST_MLP] && i < n * H; i++)
        y[i] = (after[i] - v->h[t * H + i]) * scale;
    for (int64_t i = 0; v->shared && i < n * H; i++)
        y[i] -= v->shared[t * H + i];
    memcpy(u->x + row * H, v->x + t * H, (size_t)(n * H) * sizeof *u->x);
    memcpy(u->logits + row * u->ld, v->logits + t * v->ld, (size_t)(n * u->ld) * sizeof *u->logits);
    return MOEC_OK;
}

static moec_status see_twin(void *ctx, int worker, const moec_chunk *c, const moec_moe_view *v, moec_err *err)
{
    moec_lockstep *u = ctx;
    moec_status st = MOEC_OK;
    (void)worker;
    for (int64_t s = 0; st == MOEC_OK && s < v->n_seq; s++)
        st = see_window(u, c->token + v->seq[s], moec__lockstep_row(u, u->second, c, s), v, v->seq[s], v->seq[s + 1] - v->seq[s], err);
    return st;
}

/* What is added to the experts' output whoever is chosen. */
static moec_status subtract_bias(moec_lockstep *u, const moec_layer *l, moec_err *err)
{
    const moec_tensor *t = l->vec[MOEC_VEC_MOE_BIAS];
    const int64_t H = u->m->dims.hidden;
    float *bias = NULL;
    moec_status st = t ? MOEC_NEW(bias, (size_t)H, err) : MOEC_OK;
    if (st != MOEC_OK || !t)
        return st;
    moec_dtypes[t->dtype].to_f32(bias, t->data, H);
    for (int64_t i = 0; i < u->n * H; i++)
        u->y[i] -= bias[i % H];
    moec_free(bias);
    return MOEC_OK;
}

/* Weights of the fitted tokens are 1 on average. */
static void scale_weights(moec_lockstep *u)
{
    double sum = 0.0;
    for (int64_t i = 0; i < u->n_fit; i++)
        sum += (double)u->weight[i];
    for (int64_t i = 0; i < u->n; i++)
        u->weight[i] = (float)((double)u->weight[i] * (double)u->n_fit / sum);
}

moec_repair_error moec__lockstep_wanted(moec_lockstep *u)
{
    const int64_t H = u->m->dims.hidden;
    moec_repair_error e = {0.0, 0.0};
    scale_weights(u);
    for (int64_t i = 0; i < u->n; i++)
        *(i < u->n_fit ? &e.fit : &e.held) += (double)u->weight[i] * moec_sum_sq(u->y + i * H, H);
    return e;
}

moec_status moec__lockstep_first(moec_lockstep *u, int64_t layer, moec_err *err)
{
    const moec_layer *l = &u->m->layer[layer];
    const bool look = l->expert && (l->vec[MOEC_VEC_POST_MLP] || (u->o->merge && u->o->merge->original));
    return moec_pass_layer(u->first, layer, look ? see_original : NULL, NULL, u, err);
}

moec_status moec__lockstep_look(moec_lockstep *u, int64_t layer, moec_err *err)
{
    moec_status st = moec_pass_look(u->second, layer, see_twin, u, err);
    return st == MOEC_OK ? subtract_bias(u, &u->m->layer[layer], err) : st;
}

/* moec_route leaves scores where it is told to: logits are needed again. */
moec_status moec__lockstep_route(moec_lockstep *u, const moec_model *m, const moec_layer *l, int64_t n, moec_err *err)
{
    enum { ROWS = 256 };
    float *scores;
    moec_status st = MOEC_NEW(scores, (size_t)(ROWS * u->ld), err);
    for (int64_t i = 0; st == MOEC_OK && i < n; i += ROWS)
        moec_route(scores, u->ids + i * u->slots, u->gates + i * u->slots, u->logits + i * u->ld, m, l,
                   n - i < ROWS ? n - i : ROWS);
    moec_free(scores);
    return st;
}
