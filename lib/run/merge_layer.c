/* Merging the experts of one layer of the twin: who goes with whom, by what the layer sees, and the merged weights. See merge.h. */
#include "base/mem.h"
#include "base/par.h"
#include "method/repair_parts.h"
#include "run/lockstep.h"

#include <stdio.h>
#include <string.h>

/* Of moec__merge_decide, beside what the fits in it take. */
static size_t decide_bytes(const moec_lockstep *u)
{
    const moec_repair_task t = {.model = u->m};
    const size_t n = (size_t)u->n, hidden = (size_t)u->m->dims.hidden;
    const int64_t width = u->m->dims.expert_width;
    return n * (2 * hidden * sizeof(float) + sizeof(int32_t) + sizeof(float)) +
           sizeof(float) * (size_t)(3 * moec__piece_values(&t, width) + 2 * moec__piece_biases(&t) +
                                    moec_par_threads() * (moec__piece_floats(&t, width) + 15));
}

size_t moec__merge_bytes(const moec_lockstep *u)
{
    const moec_merge_recipe *r = u->o->merge;
    if (!r)
        return 0;
    const size_t want = r->router == MOEC_ROW_LSE ? (size_t)(u->n * u->m->dims.experts) * sizeof(float) : 0;
    const size_t merge = moec_merge_bytes(u->m, u->n, r);
    const size_t decide = r->decide && u->o->kind != MOEC_REPAIR_NONE ? decide_bytes(u) : 0; /* when merging is done */
    return want + (merge > decide ? merge : decide);
}

/* --- groups ------------------------------------------------------------------------------------------------------------- */

/* The sample as the layer's router sees it with all experts there. */
static moec_merge_task task_of(moec_lockstep *u, const moec_plan_layer *pl, bool *guarded)
{
    const moec_model *twin = &u->twin.variant->model;
    for (int64_t i = 0; i < pl->n_guarded; i++)
        guarded[pl->guarded[i]] = true;
    return (moec_merge_task){.model = twin, .layer = &u->m->layer[pl->layer], .n = u->n_fit, .x = u->x, .logits = u->logits,
                             .ld = u->ld, .ids = u->ids, .gates = u->gates, .slots = u->slots,
                             .texts = u->o->corpus->n_domains, .text = u->text, .text_weight = u->text_weight, .keep = pl->n_keep,
                             .blocks = twin->dims.groups, .guarded = guarded, .seed = u->o->seed, .progress = &u->progress};
}

/* Kept are the centres; of tied experts all are, whatever their group. */
static moec_status note_groups(moec_lockstep *u, moec_plan_layer *pl, moec_err *err)
{
    int64_t n = 0;
    moec_status st = pl->into ? MOEC_OK : MOEC_NEW(pl->into, (size_t)pl->n_experts, err);
    if (st == MOEC_OK && !pl->score)
        st = MOEC_NEW(pl->score, (size_t)pl->n_experts, err);
    for (int32_t e = 0; st == MOEC_OK && e < pl->n_experts; e++) {
        pl->into[e] = u->groups.centre[e];
        pl->score[e] = u->groups.saliency[e];
        if (!u->o->tied && pl->into[e] == e)
            pl->keep[n++] = e;
        if (u->p->mapped && pl->into[e] < 0)
            st = moec_fail(err, MOEC_EINVAL, "expert %d joins nobody, so its row of the router would lead nowhere; without --emit map "
                           "it is pruned", (int)e);
    }
    return st;
}

moec_status moec__merge_possible(moec_lockstep *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    bool *guarded = NULL;
    for (int64_t i = 0; i < u->p->n_layers; i++) {
        const moec_plan_layer *pl = &u->p->layer[i];
        moec_free(guarded);
        guarded = NULL;
        MOEC_TRY(MOEC_NEW(guarded, (size_t)pl->n_experts, err));
        moec_merge_task t = task_of(u, pl, guarded);
        if (u->o->tied)
            t.keep = u->o->tied[i];
        MOEC_TRY(moec_within(err, moec_merge_check(&t, u->o->merge, err), "layer %lld", (long long)pl->layer));
    }
done:
    moec_free(guarded);
    return st;
}

moec_status moec__merge_layer(moec_lockstep *u, int64_t set, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_plan_layer *pl = &u->p->layer[set];
    bool *guarded = NULL;
    MOEC_TRY(MOEC_NEW(guarded, (size_t)pl->n_experts, err));
    if (!u->groups.centre)
        MOEC_TRY(moec_merge_groups_new(&u->groups, pl->n_experts, err));
    MOEC_TRY(moec__lockstep_route(u, &u->twin.variant->model, &u->m->layer[pl->layer], u->n, err));
    moec_merge_task t = task_of(u, pl, guarded);
    if (u->o->tied)
        t.keep = u->o->tied[set];
    MOEC_TRY(moec_merge_group(&u->groups, &t, u->o->merge, err));
    MOEC_TRY(note_groups(u, pl, err));
done:
    moec_free(guarded);
    return moec_within(err, st, "layer %lld", (long long)pl->layer);
}

/* --- weights ------------------------------------------------------------------------------------------------------------ */

static moec_status copy_matrix(const moec_weight *to, const moec_weight *from, moec_err *err)
{
    float *row;
    moec_status st = MOEC_NEW(row, (size_t)from->cols, err);
    for (int64_t r = 0; st == MOEC_OK && r < from->rows; r++) {
        moec_weight_read(row, from->cols, from, r, 1, 0, from->cols);
        st = moec_weight_write(to, row, from->cols, r, 1, 0, from->cols, err);
    }
    moec_free(row);
    return st;
}

static int64_t bias_floats(const moec_model *m)
{
    return 2 * m->dims.expert_width + m->dims.hidden;
}

/* Biases of an expert to out [bias_floats], those of gate and up as they lie. */
static void read_biases(float *out, const moec_layer *l, int64_t expert)
{
    const moec_tensor *const bias[] = {l->gate_up_bias, l->down_bias};
    const int32_t *const row[] = {l->gate_up_bias_row, l->down_bias_row};
    for (size_t i = 0; i < MOEC_COUNT(bias); i++)
        if (bias[i]) {
            const moec_weight w = moec_weight_of(bias[i]);
            moec_weight_read(out, w.cols, &w, row[i] ? row[i][expert] : expert, 1, 0, w.cols);
            out += w.cols;
        }
}

static moec_status write_biases(const moec_layer *l, int64_t expert, const float *from, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_tensor *const bias[] = {l->gate_up_bias, l->down_bias};
    const int32_t *const row[] = {l->gate_up_bias_row, l->down_bias_row};
    for (size_t i = 0; st == MOEC_OK && i < MOEC_COUNT(bias); i++)
        if (bias[i]) {
            const moec_weight w = moec_weight_of(bias[i]);
            st = moec_weight_write(&w, from, w.cols, row[i] ? row[i][expert] : expert, 1, 0, w.cols, err);
            from += w.cols;
        }
    return st;
}

/* Every member gets what its centre has. */
static moec_status copy_tied(const moec_lockstep *u, const moec_plan_layer *pl, const moec_draft *d, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_layer *l = &u->twin.variant->model.layer[pl->layer]; /* which has the draft's biases */
    float *biases = NULL;
    MOEC_TRY(MOEC_NEW(biases, (size_t)bias_floats(u->m), err));
    for (int64_t e = 0; e < pl->n_experts; e++) {
        const int32_t c = u->groups.centre[e];
        if (c < 0 || c == e)
            continue;
        if (d->expert[e].gate.of)
            MOEC_TRY(copy_matrix(&d->expert[e].gate, &d->expert[c].gate, err));
        MOEC_TRY(copy_matrix(&d->expert[e].up, &d->expert[c].up, err));
        MOEC_TRY(copy_matrix(&d->expert[e].down, &d->expert[c].down, err));
        read_biases(biases, l, c);
        MOEC_TRY(write_biases(l, e, biases, err));
    }
done:
    moec_free(biases);
    return st;
}

moec_status moec__merge_draft(moec_lockstep *u, int64_t set, const moec_draft *d, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_plan_layer *pl = &u->p->layer[set];
    moec_mlp *expert = NULL;
    bool *guarded = NULL;
    moec_merge_tally tally;
    MOEC_TRY(MOEC_NEW(expert, (size_t)pl->n_experts, err));
    MOEC_TRY(MOEC_NEW(guarded, (size_t)pl->n_experts, err));
    for (int64_t k = 0; k < pl->n_keep; k++)
        expert[pl->keep[k]] = d->expert[k];
    const moec_merge_target to = {.expert = expert, .router = d->router, .gate_up_bias = d->gate_up_bias, .down_bias = d->down_bias,
                                  .row = d->row};
    if (u->o->merge->original) /* selections are the original's still, the inputs no longer */
        MOEC_TRY(moec__lockstep_route(u, &u->twin.variant->model, &u->m->layer[pl->layer], u->n, err));
    const moec_merge_task t = task_of(u, pl, guarded);
    MOEC_TRY(moec_merge_fill_all(&tally, &to, &t, &u->groups, u->o->merge, err));
    if (u->o->tied)
        MOEC_TRY(copy_tied(u, pl, d, err));
    moec_note("layer %lld: %lld experts merged, %lld aligned (gain %.3g); %lld neurons passed on, %lld thrown away",
              (long long)pl->layer, (long long)tally.merged, (long long)tally.aligned, tally.gain, (long long)tally.moved,
              (long long)tally.dropped);
done:
    moec_free(expert);
    moec_free(guarded);
    return moec_within(err, st, "layer %lld", (long long)pl->layer);
}

/* --- router --------------------------------------------------------------------------------------------------------------- */

moec_status moec__merge_logits(float **want, const moec_lockstep *u, const moec_plan_layer *pl, moec_err *err)
{
    moec_status st = MOEC_OK;
    int64_t *first = NULL, n = 0;
    int32_t *member = NULL;
    *want = NULL;
    MOEC_TRY(MOEC_NEW(first, (size_t)pl->n_keep + 1, err));
    MOEC_TRY(MOEC_NEW(member, (size_t)pl->n_experts, err));
    MOEC_TRY(MOEC_NEW(*want, (size_t)(u->n_fit * pl->n_keep), err));
    for (int64_t k = 0; k < pl->n_keep; k++) {
        first[k] = n;
        for (int32_t e = 0; e < pl->n_experts; e++)
            if (pl->into[e] == pl->keep[k])
                member[n++] = e;
    }
    first[pl->n_keep] = n;
    const moec_router_groups g = {.first = first, .member = member};
    MOEC_TRY(moec_router_group(*want, &g, pl->n_keep, u->logits, u->ld, u->n_fit, &u->twin.variant->model, err));
done:
    moec_free(first);
    moec_free(member);
    return st;
}

/* --- merged or only pruned -------------------------------------------------------------------------------------------------- */

/* One expert with its members, tried both ways. */
typedef struct trial {
    moec_repair_task *t, one, source; /* the layer's; of this expert alone; of the weights that it had */
    moec_tokens k;
    moec_room room;
    int64_t hidden, values;
    float *merged, *own, *fitted;     /* [values] pieces */
    float *biases, *given;            /* of a piece; [bias_floats] that merging gave */
    float *before, *after;            /* [n,H] what is missing on its tokens: at first, and with the merged one fitted */
} trial;

static void save_rest(float *to, const trial *a)
{
    for (int64_t i = 0; i < a->k.n; i++)
        memcpy(to + i * a->hidden, a->t->rest + a->k.token[i] * a->hidden, (size_t)a->hidden * sizeof *to);
}

static void load_rest(const trial *a, const float *from)
{
    for (int64_t i = 0; i < a->k.n; i++)
        memcpy(a->t->rest + a->k.token[i] * a->hidden, from + i * a->hidden, (size_t)a->hidden * sizeof *from);
}

/* Held-out error of the layer with this expert fitted as it stands (of the fitted tokens where none is held out). */
static moec_status fitted_error(double *out, trial *a, const moec_ridge_opts *ridge, moec_err *err)
{
    int64_t taken;
    moec_status st = moec_repair_ridge(&taken, &a->one, ridge, err);
    const moec_repair_error e = moec_repair_missing(a->t);
    *out = a->t->n_fit < a->t->n ? e.held : e.fit;
    return st;
}

static moec_status try_expert(bool *merge, trial *a, int32_t expert, const moec_ridge_opts *ridge, moec_err *err)
{
    moec_status st = MOEC_OK;
    const uint32_t all = MOEC_PART_GATE | MOEC_PART_UP | MOEC_PART_DOWN;
    const int64_t width = a->t->model->dims.expert_width;
    moec_piece merged = {.expert = expert, .width = width}, own = merged, fitted = merged;
    double with, without;
    moec__picked_of(&a->k, a->t, a->t->ids, a->t->gates, expert);
    a->one.keep = &expert;
    a->one.n_keep = 1;
    a->one.progress = NULL;
    save_rest(a->before, a);
    read_biases(a->given, a->t->layer, expert);
    MOEC_TRY(moec__piece_read(&merged, a->t, a->merged, a->biases, err));
    MOEC_TRY(fitted_error(&with, a, ridge, err));
    MOEC_TRY(moec__piece_read(&fitted, a->t, a->fitted, a->biases, err));
    save_rest(a->after, a);
    load_rest(a, a->before);
    MOEC_TRY(moec__piece_add(a->t->rest, 1.0f, a->t, &merged, &a->k, &a->room, err));
    MOEC_TRY(moec__piece_read(&own, &a->source, a->own, a->biases, err));
    MOEC_TRY(moec__piece_add(a->t->rest, -1.0f, a->t, &own, &a->k, &a->room, err));
    MOEC_TRY(moec__piece_write(&own, a->t, all, err));
    read_biases(a->biases, a->source.layer, expert);
    MOEC_TRY(write_biases(a->t->layer, expert, a->biases, err));
    MOEC_TRY(fitted_error(&without, a, ridge, err));
    *merge = with < without;
    if (*merge) {
        MOEC_TRY(moec__piece_write(&fitted, a->t, all, err));
        MOEC_TRY(write_biases(a->t->layer, expert, a->given, err));
        load_rest(a, a->after);
    }
done:
    return st;
}

moec_status moec__merge_decide(moec_lockstep *u, moec_plan_layer *pl, moec_repair_task *t, const moec_ridge_opts *ridge, moec_err *err)
{
    moec_status st = MOEC_OK;
    const size_t n = (size_t)t->n;
    const moec_ridge_opts down = {.sweeps = 1, .lambda = ridge->lambda, .dense = ridge->dense};
    int64_t tried = 0, merged = 0;
    trial a = {.t = t, .one = *t, .source = *t, .hidden = u->m->dims.hidden,
               .values = moec__piece_values(t, u->m->dims.expert_width)};
    a.source.layer = &u->m->layer[pl->layer];
    MOEC_TRY(moec__picked_new(&a.k, t->n, err));
    MOEC_TRY(moec__room_new(&a.room, moec__piece_floats(t, u->m->dims.expert_width), err));
    MOEC_TRY(MOEC_NEW(a.merged, (size_t)a.values, err));
    MOEC_TRY(MOEC_NEW(a.own, (size_t)a.values, err));
    MOEC_TRY(MOEC_NEW(a.fitted, (size_t)a.values, err));
    MOEC_TRY(MOEC_NEW(a.biases, (size_t)moec__piece_biases(t), err));
    MOEC_TRY(MOEC_NEW(a.given, (size_t)bias_floats(u->m), err));
    MOEC_TRY(MOEC_NEW(a.before, n * (size_t)a.hidden, err));
    MOEC_TRY(MOEC_NEW(a.after, n * (size_t)a.hidden, err));
    for (int64_t k = 0; k < pl->n_keep; k++) {
        const int32_t e = pl->keep[k];
        bool alone = true, merge;
        for (int32_t j = 0; alone && j < pl->n_experts; j++)
            alone = j == e || pl->into[j] != e;
        if (alone)
            continue;
        MOEC_TRY(try_expert(&merge, &a, e, &down, err));
        for (int32_t j = 0; !merge && j < pl->n_experts; j++)
            pl->into[j] = j != e && pl->into[j] == e ? -1 : pl->into[j];
        tried++;
        merged += merge;
    }
    moec_note("layer %lld: %lld of %lld groups gain by merging, the others are pruned", (long long)pl->layer, (long long)merged,
              (long long)tried);
done:
    moec_free(a.merged);
    moec_free(a.own);
    moec_free(a.fitted);
    moec_free(a.biases);
    moec_free(a.given);
    moec_free(a.before);
    moec_free(a.after);
    moec_free(a.room.store);
    moec__picked_release(&a.k);
    return st;
}
