/* How many experts each layer keeps by what merging loses: one pass of the original over the text. See repair.h. */
#include "base/mem.h"
#include "run/lockstep.h"

#include <string.h>

static size_t sample_bytes(const moec_lockstep *u)
{
    const size_t each = (size_t)u->m->dims.hidden + (size_t)u->ld + 2 * (size_t)u->slots;
    return (size_t)u->n_fit * each * sizeof(float) + moec_merge_curve_bytes(u->m, u->n_fit, u->o->merge);
}

/* The sample of fitted tokens, and the pass that fills it. */
static moec_status make_room(moec_lockstep *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    const size_t n = (size_t)u->n_fit;
    const moec_pass_opts o = {.compute = u->o->compute, .watch = true, .max_memory = u->o->max_memory,
                              .fixed_bytes = sample_bytes(u), .what = "allocation"};
    MOEC_TRY(moec_pass_new(&u->first, u->m, u->o->corpus, &o, err));
    MOEC_TRY(moec__lockstep_chunks(u, err));
    MOEC_TRY(MOEC_NEW(u->x, n * (size_t)u->m->dims.hidden, err));
    MOEC_TRY(MOEC_NEW(u->logits, n * (size_t)u->ld, err));
    MOEC_TRY(MOEC_NEW(u->ids, n * (size_t)u->slots, err));
    MOEC_TRY(MOEC_NEW(u->gates, n * (size_t)u->slots, err));
done:
    return st;
}

static moec_status see(void *ctx, int worker, const moec_chunk *c, const moec_moe_view *v, moec_err *err)
{
    moec_lockstep *u = ctx;
    const int64_t H = u->m->dims.hidden;
    (void)worker;
    (void)err;
    for (int64_t s = 0; s < v->n_seq; s++) {
        const int64_t t = v->seq[s], n = v->seq[s + 1] - t, row = moec__lockstep_row(u, u->first, c, s);
        if (row >= u->n_fit)
            continue;
        memcpy(u->x + row * H, v->x + t * H, (size_t)(n * H) * sizeof *u->x);
        memcpy(u->logits + row * u->ld, v->logits + t * v->ld, (size_t)(n * u->ld) * sizeof *u->logits);
    }
    return MOEC_OK;
}

/* curve [E + 1] of a layer whose sample is there. */
static moec_status trace_layer(double *curve, moec_lockstep *u, const moec_layer *l, const moec_request *q, moec_err *err)
{
    const int64_t experts = u->m->dims.experts;
    const moec_merge_task t = {.model = u->m, .layer = l, .n = u->n_fit, .x = u->x, .logits = u->logits, .ld = u->ld, .ids = u->ids,
                               .gates = u->gates, .slots = u->slots, .texts = u->o->corpus->n_domains, .text = u->text,
                               .text_weight = u->text_weight, .keep = experts, .blocks = moec_request_groups(q),
                               .guarded = q->guard ? q->guard->flag + l->moe_index * experts : NULL, .seed = u->o->seed,
                               .progress = &u->first->progress};
    moec_status st = moec__lockstep_route(u, u->m, l, u->n_fit, err);
    if (st == MOEC_OK)
        st = moec_merge_curve(curve, &t, u->o->merge, err);
    return moec_within(err, st, "layer %lld", (long long)l->index);
}

/* Only a plan can hold counts that differ, where dead experts cannot be ruled out. */
static moec_status check_form(const moec_model *m, const moec_request *q, moec_err *err)
{
    moec_err why = {MOEC_OK, ""};
    if (q->plan_only || q->together <= 1 || moec_plan_check_pad(m, q->drop_groups, m->dims.experts, &why) == MOEC_OK)
        return MOEC_OK;
    return moec_fail(err, MOEC_EINVAL, "--allocation loss gives layers unequal numbers of experts, and clients load one count for all "
                     "layers; %s. --plan-only writes the plan, which eval MODEL --plan FILE measures", why.text);
}

moec_status moec_merge_counts(int64_t *out, const moec_model *m, const moec_request *q, const moec_repair_opts *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_lockstep u = {.m = m, .o = o, .ld = m->dims.experts + m->dims.null_experts, .slots = m->dims.slots};
    double *curve = NULL;
    int64_t keep;
    MOEC_TRY(moec_kept_experts(&keep, q, err));
    MOEC_TRY(moec_merge_curve_check(o->merge, err));
    MOEC_TRY(check_form(m, q, err));
    MOEC_TRY(MOEC_NEW(curve, (size_t)(m->moe_layers * (m->dims.experts + 1)), err));
    MOEC_TRY(moec_allocate_loss(out, q, keep, curve, err)); /* what is refused is refused at once */
    MOEC_TRY(moec__lockstep_place(&u, err));
    MOEC_TRY(make_room(&u, err));
    moec_pass_begin(u.first, 0);
    MOEC_TRY(moec_pass_embed(u.first, err));
    for (int64_t i = 0, done = 0; i < m->dims.layers && done < m->moe_layers; i++) {
        const moec_layer *l = &m->layer[i];
        MOEC_TRY(moec_pass_layer(u.first, i, l->expert ? see : NULL, NULL, &u, err));
        if (!l->expert)
            continue;
        MOEC_TRY(trace_layer(curve + l->moe_index * (m->dims.experts + 1), &u, l, q, err));
        done++;
    }
    moec_pass_end(u.first);
    MOEC_TRY(moec_allocate_loss(out, q, keep, curve, err));
done:
    moec_free(curve);
    moec__lockstep_release(&u);
    return st;
}
