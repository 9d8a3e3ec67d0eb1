/* What is done to one MoE layer of the twin: who stays or is merged, and the fit of what stays. See repair.h. */
#include "base/file.h"
#include "base/mem.h"
#include "method/choose.h"
#include "run/lockstep.h"
#include "run/thin.h"

#include <math.h>
#include <string.h>

static const double LAMBDA = 1e-2;
static const moec_router_opts ROUTER = {.lambda = 1e-3, .reach = 0.02};
/* Steps of a layer's matrices are this share of their size times the root of its relative error, FASTEST at most: a layer from which
 * little is missing must not be thrown about. */
static const double RATE = 0.1, FASTEST = 0.1;

/* Is the layer fitted as one block? Then one visit has all steps, gains nothing from a ridge solution to begin with, and the
 * router is fitted, too. */
static bool whole_layer(const moec_lockstep *u, const moec_plan_layer *pl)
{
    const moec_dims *d = &u->twin.variant->model.dims; /* experts may be narrower there */
    return 3 * pl->n_keep * d->expert_width * d->hidden <= MOEC_REPAIR_BLOCK_VALUES;
}

static uint32_t parts_of(const moec_lockstep *u, const moec_plan_layer *pl)
{
    const uint32_t all = MOEC_PART_GATE | MOEC_PART_UP | MOEC_PART_DOWN;
    const bool fitted = u->o->kind == MOEC_REPAIR_DEEP && !u->p->mapped && whole_layer(u, pl);
    const bool merged = u->o->merge && !u->o->tied && !u->p->mapped && u->o->merge->router != MOEC_ROW_KEEP;
    if (u->o->kind == MOEC_REPAIR_DEEP || u->o->merge || u->o->thin)
        return all | (fitted || merged ? MOEC_PART_ROUTER : 0);
    return u->o->kind == MOEC_REPAIR_RIDGE ? MOEC_PART_UP | MOEC_PART_DOWN : 0;
}

static bool is_plain(const moec_lockstep *u, int64_t set, uint32_t part)
{
    const moec_forms *f = &u->twin.forms;
    for (size_t i = 0; i < f->n; i++) {
        const moec_dtype t = f->cast[i].dtype;
        if (f->place[i].role != MOEC_ROLE_OTHER && f->place[i].set == set && (f->place[i].parts & part) && t != MOEC_F32 &&
            t != MOEC_BF16 && t != MOEC_F16)
            return false;
    }
    return true;
}

/* Can the rows of a set's router be refitted and written? */
static bool can_refit(const moec_lockstep *u, int64_t set)
{
    const moec_layer *l = moec_set_layer(u->m, set);
    const moec_repair_task t = {.model = u->m, .router = l->mat[MOEC_MAT_ROUTER]};
    return moec_repair_can_route(&t) && !l->mat[MOEC_MAT_ROUTER_IN].of && !l->mat[MOEC_MAT_ROUTER_MAP].of &&
           !u->m->family->weight_on_input && is_plain(u, set, MOEC_PART_ROUTER) &&
           moec_plan_slots(u->p, u->m, set).live == u->p->layer[set].n_keep;
}

bool moec__repair_fits(const moec_repair_opts *o)
{
    return o->kind != MOEC_REPAIR_NONE || o->merge;
}

uint32_t moec__repair_drafted(const moec_lockstep *u, int64_t set)
{
    const uint32_t parts = parts_of(u, &u->p->layer[set]);
    return u->o->router && can_refit(u, set) ? parts | MOEC_PART_ROUTER : parts;
}

int moec__repair_epochs(const moec_repair_opts *o)
{
    return o->kind != MOEC_REPAIR_DEEP ? 0 : o->epochs > 0 ? o->epochs : MOEC_REPAIR_EPOCHS;
}

static moec_ridge_opts ridge_opts(void)
{
    return (moec_ridge_opts){.sweeps = MOEC_REPAIR_RIDGE_SWEEPS, .lambda = LAMBDA, .dense = MOEC_REPAIR_DENSE,
                             .up_sweeps = MOEC_REPAIR_UP_SWEEPS, .up_steps = MOEC_REPAIR_UP_STEPS};
}

/* Other tokens of an expert, other best projections: one more sweep where the router changed. */
static moec_status refit_router(moec_repair_task *t, const moec_ridge_opts *ridge, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_ridge_opts once = *ridge;
    int64_t again = 0;
    bool taken;
    once.sweeps = 1;
    MOEC_TRY(moec_repair_router(&taken, t, NULL, &ROUTER, err));
    if (taken)
        MOEC_TRY(moec_repair_ridge(&again, t, &once, err));
    moec_note("layer %lld: router %s", (long long)t->layer->index, taken ? "refitted" : "stays");
done:
    return st;
}

/* `wanted`: of moec_repair_missing before anything was subtracted. */
static moec_status fit(moec_lockstep *u, const moec_plan_layer *pl, moec_repair_task *t, moec_repair_error wanted, moec_err *err)
{
    moec_status st = MOEC_OK;
    int64_t taken = 0, visits = 0;
    const moec_ridge_opts ridge = ridge_opts();
    const bool one = whole_layer(u, pl);
    const int epochs = moec__repair_epochs(u->o), each = one ? epochs : epochs % 2 == 0 ? 2 : 1; /* passes a visit */
    const double rate = RATE * sqrt(moec_repair_missing(t).fit / (wanted.fit + 1e-30));
    const moec_deep_opts deep = {.sweeps = each > 0 ? epochs / each : 0, .epochs = each, .batch = MOEC_REPAIR_BATCH,
                                 .rate = rate < FASTEST ? rate : FASTEST, .seed = u->o->seed, .block_values = MOEC_REPAIR_BLOCK_VALUES};
    if (u->o->kind == MOEC_REPAIR_RIDGE || (u->o->kind == MOEC_REPAIR_DEEP && !one))
        MOEC_TRY(moec_repair_ridge(&taken, t, &ridge, err));
    if (u->o->kind == MOEC_REPAIR_DEEP)
        MOEC_TRY(moec_repair_deep(&visits, t, &deep, err));
    if (u->o->kind == MOEC_REPAIR_DEEP && one && visits == 0) /* the steps were too bold for the held-out tokens */
        MOEC_TRY(moec_repair_ridge(&taken, t, &ridge, err));
    if (u->o->router && t->router.of)
        MOEC_TRY(refit_router(t, &ridge, err));
    else if (u->o->router)
        moec_note("layer %lld: its router cannot be refitted", (long long)t->layer->index);
    moec_note("layer %lld: %lld refits of projections of %lld experts taken, %lld visits", (long long)t->layer->index, (long long)taken,
              (long long)t->n_keep, (long long)visits);
done:
    return st;
}

/* [n_keep] logit biases of the kept experts, or NULL. */
static moec_status kept_bias(float **out, const moec_layer *l, const moec_plan_layer *pl, moec_err *err)
{
    const moec_tensor *b = l->bias[MOEC_MAT_ROUTER];
    moec_status st = b ? MOEC_NEW(*out, (size_t)pl->n_keep, err) : MOEC_OK;
    for (int64_t k = 0; st == MOEC_OK && b && k < pl->n_keep; k++)
        moec_dtypes[b->dtype].to_f32(&(*out)[k], (const char *)b->data + pl->keep[k] * moec_dtypes[b->dtype].bytes, 1);
    return st;
}

/* A down projection has as many unknowns in each row as the expert has neurons. */
static moec_status count_few(moec_lockstep *u, const moec_plan_layer *pl, moec_err *err)
{
    int64_t *tokens;
    moec_status st = MOEC_NEW(tokens, (size_t)pl->n_experts, err);
    if (st != MOEC_OK)
        return st;
    for (int64_t i = 0; i < u->n_fit * u->slots; i++)
        if (u->ids[i] >= 0 && u->ids[i] < pl->n_experts) /* others are null experts */
            tokens[u->ids[i]]++;
    for (int64_t k = 0; k < pl->n_keep; k++)
        u->few += tokens[pl->keep[k]] < u->twin.variant->model.dims.expert_width;
    u->seen += pl->n_keep;
    moec_free(tokens);
    return MOEC_OK;
}

/* The router's rows and who was selected, to be compared with what they are after the fit. */
typedef struct routed {
    float *rows;  /* [n_keep,H] */
    int32_t *ids; /* [n,slots] */
} routed;

static moec_status remember(routed *out, const moec_repair_task *t, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t hidden = t->model->dims.hidden;
    const size_t cells = (size_t)(t->n * t->slots);
    if (!t->router.of)
        return st;
    MOEC_TRY(MOEC_NEW(out->rows, (size_t)(t->n_keep * hidden), err));
    MOEC_TRY(MOEC_NEW(out->ids, cells, err));
    moec_weight_read(out->rows, hidden, &t->router, 0, t->n_keep, 0, hidden);
    memcpy(out->ids, t->ids, cells * sizeof *out->ids);
done:
    return st;
}

static moec_status compare(moec_plan_layer *pl, const routed *was, const moec_repair_task *t, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t hidden = t->model->dims.hidden;
    float *now = NULL;
    if (!t->router.of)
        return st;
    MOEC_TRY(MOEC_NEW(now, (size_t)(t->n_keep * hidden), err));
    moec_weight_read(now, hidden, &t->router, 0, t->n_keep, 0, hidden);
    pl->router_refit = memcmp(now, was->rows, (size_t)(t->n_keep * hidden) * sizeof *now) != 0;
    MOEC_TRY(moec_load_shift(&pl->load_shift, was->ids, t->ids, t->n, t->slots, pl->n_experts, err));
done:
    moec_free(now);
    return st;
}

/* Did any expert go into another? Where not, rows of the router stand for who they stood for. */
static bool any_merged(const moec_plan_layer *pl)
{
    for (int32_t e = 0; e < pl->n_experts; e++)
        if (pl->into[e] >= 0 && pl->into[e] != e)
            return true;
    return false;
}

/* Of a mapped plan: rows that share an expert select it once, with the sum of their weights. */
static void share_selections(moec_lockstep *u, const moec_plan_layer *pl)
{
    for (int64_t i = 0; i < u->n; i++) {
        int32_t *id = u->ids + i * u->slots;
        float *gate = u->gates + i * u->slots;
        for (int64_t s = 0; s < u->slots; s++) {
            int64_t first = 0;
            if (id[s] < 0 || id[s] >= pl->n_experts)
                continue;
            id[s] = pl->into[id[s]];
            while (id[first] != id[s])
                first++;
            if (first == s)
                continue;
            gate[first] += gate[s];
            gate[s] = 0.0f;
            id[s] = -1;
        }
    }
}

/* The task of a layer whose sample is there, on the twin's layer as the draft shows it. */
static moec_status solve(moec_lockstep *u, int64_t set, const moec_draft *d, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_plan_layer *pl = &u->p->layer[set];
    const moec_model *twin = &u->twin.variant->model;
    const moec_layer *l = &twin->layer[pl->layer];
    float *bias = NULL, *want = NULL;
    routed was = {0};
    bool refitted;
    const moec_ridge_opts ridge = ridge_opts();
    const moec_repair_error all = moec__lockstep_wanted(u);
    if (u->o->merge && u->o->merge->router == MOEC_ROW_LSE && d->router.of && any_merged(pl))
        MOEC_TRY(moec__merge_logits(&want, u, pl, err));
    for (int64_t e = 0; e < u->m->dims.experts; e++)
        for (int64_t i = 0; l->removed && l->removed[e] && i < u->n; i++)
            u->logits[i * u->ld + e] = -INFINITY;
    moec_route(u->logits, u->ids, u->gates, u->logits, twin, l, u->n);
    if (u->p->mapped)
        share_selections(u, pl);
    MOEC_TRY(count_few(u, pl, err));
    MOEC_TRY(kept_bias(&bias, l, pl, err));
    moec_repair_task t = {.model = twin, .layer = l, .keep = pl->keep, .n_keep = pl->n_keep, .n = u->n, .n_fit = u->n_fit,
                          .x = u->x, .rest = u->y, .weight = u->weight, .ids = u->ids, .gates = u->gates, .slots = u->slots,
                          .router_bias = bias, .progress = &u->progress};
    if (d->router.of && moec_plan_slots(u->p, u->m, set).live == pl->n_keep) { /* rows stand side by side */
        t.router = d->router;
        t.router.rows = pl->n_keep;
    }
    MOEC_TRY(moec_repair_start(&t, err));
    const moec_repair_error before = moec_repair_missing(&t);
    MOEC_TRY(remember(&was, &t, err));
    if (want)
        MOEC_TRY(moec_repair_router(&refitted, &t, want, &ROUTER, err));
    if (u->o->merge && u->o->merge->decide && u->o->kind != MOEC_REPAIR_NONE)
        MOEC_TRY(moec__merge_decide(u, pl, &t, &ridge, err));
    MOEC_TRY(fit(u, pl, &t, all, err));
    MOEC_TRY(compare(pl, &was, &t, err));
    const moec_repair_error after = moec_repair_missing(&t);
    const bool held = u->n_fit < u->n;
    const double whole = (held ? all.held : all.fit) + 1e-30; /* nothing may be wanted */
    pl->error_before = (held ? before.held : before.fit) / whole;
    pl->error_after = (held ? after.held : after.fit) / whole;
    if (!isfinite(pl->error_before) || !isfinite(pl->error_after))
        st = moec_fail(err, MOEC_ENUMERIC, "layer %lld: what its experts leave is not finite", (long long)pl->layer);
done:
    moec_free(was.rows);
    moec_free(was.ids);
    moec_free(bias);
    moec_free(want);
    return st;
}

/* Who stays, by a method that looks at the layer's tokens. */
static moec_status choose(moec_lockstep *u, int64_t set, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_plan_layer *pl = &u->p->layer[set];
    const moec_model *twin = &u->twin.variant->model;
    bool *guarded = NULL;
    MOEC_TRY(MOEC_NEW(guarded, (size_t)pl->n_experts, err));
    if (!pl->score)
        MOEC_TRY(MOEC_NEW(pl->score, (size_t)pl->n_experts, err));
    for (int64_t i = 0; i < pl->n_guarded; i++)
        guarded[pl->guarded[i]] = true;
    const moec_choice_task t = {.model = twin, .layer = &twin->layer[pl->layer], .n = u->n_fit, .x = u->x, .y = u->y,
                                .logits = u->logits, .ld = u->ld, .window = u->first->max_seq, .keep = pl->n_keep,
                                .groups = twin->dims.groups, .guarded = guarded, .top_k = u->p->new_top_k};
    MOEC_TRY(u->o->method->choose(pl->keep, pl->score, &t, err));
done:
    moec_free(guarded);
    return st;
}

/* The twin's layer as it is before the fit. */
static moec_status show_draft(moec_lockstep *u, int64_t set, moec_draft *draft, moec_err *err)
{
    moec_status st = MOEC_OK;
    char file[64];
    moec_work_file_name(file, u->p->layer[set].layer, ".safetensors");
    MOEC_TRY(moec_draft_new(draft, u->r->work.weights, file, u->m, u->p, &u->twin.forms, set, moec__repair_drafted(u, set), err));
    MOEC_TRY(moec_preview_set(&u->twin, u->p, set, draft, err));
    if (u->o->thin)
        MOEC_TRY(moec_thin_fill(&u->twin.draft[set], u->p, u->o->thin, u->o->request, set, u->workers, err));
done:
    return st;
}

static moec_status fit_layer(moec_lockstep *u, int64_t set, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_plan_layer *pl = &u->p->layer[set];
    if (u->o->merge)
        MOEC_TRY(moec__merge_draft(u, set, &u->twin.draft[set], err));
    MOEC_TRY(solve(u, set, &u->twin.draft[set], err));
    moec_sheet *sheet = u->twin.draft[set].sheet;
    MOEC_TRY(moec__record_write(u, pl, sheet, err));
    u->twin.draft[set].sheet = NULL;
    MOEC_TRY(moec_sheet_commit(sheet, u->r->work.weights, err));
done:
    return st;
}

/* The original has run the layer; the twin is in front of it. */
moec_status moec__repair_layer(moec_lockstep *u, int64_t set, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_plan_layer *pl = &u->p->layer[set];
    const bool fits = moec__repair_fits(u->o);
    moec_draft draft = {0};
    bool found;
    MOEC_TRY(moec__record_read(&found, u, pl, err));
    if (found && fits)
        MOEC_TRY(moec_draft_reopen(&draft, u->r->work.weights, u->m, u->p, &u->twin.forms, set, moec__repair_drafted(u, set), err));
    if (!found) {
        if (u->o->thin) /* the twin runs the layer when it looks, and has room for experts of its own width only */
            MOEC_TRY(show_draft(u, set, &draft, err));
        if (u->o->merge && u->o->merge->original)
            MOEC_TRY(moec__merge_layer(u, set, err));
        MOEC_TRY(moec__lockstep_look(u, pl->layer, err));
        if (u->o->method)
            MOEC_TRY(choose(u, set, err));
        if (u->o->merge && !u->o->merge->original)
            MOEC_TRY(moec__merge_layer(u, set, err));
    }
    if (found || !fits)
        MOEC_TRY(moec_preview_set(&u->twin, u->p, set, found && fits ? &draft : NULL, err));
    if (!found && fits && !u->o->thin)
        MOEC_TRY(show_draft(u, set, &draft, err));
    if (!found)
        MOEC_TRY(fits ? fit_layer(u, set, err) : moec__record_write(u, pl, NULL, err));
    if (fits)
        pl->rewritten = moec__repair_drafted(u, set);
done:
    moec_draft_release(&draft);
    return st;
}

moec_status moec__repair_identity(char **out, const moec_lockstep *u, moec_err *err)
{
    return moec_format(out, err, "%d %d %d %llu\n%d %d %d %d %d %d %d %g %g %g\n%d %g %g", (int)u->o->kind, (int)u->o->compute,
                       moec__repair_epochs(u->o), (unsigned long long)u->o->seed, MOEC_LOCKSTEP_EVERY, MOEC_REPAIR_RIDGE_SWEEPS,
                       MOEC_REPAIR_UP_SWEEPS, MOEC_REPAIR_UP_STEPS, MOEC_REPAIR_DENSE, MOEC_REPAIR_BATCH,
                       MOEC_REPAIR_BLOCK_VALUES, LAMBDA, RATE, FASTEST, (int)u->o->router, ROUTER.lambda, ROUTER.reach);
}
