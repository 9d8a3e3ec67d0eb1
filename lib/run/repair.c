/* See repair.h. */
#include "run/repair.h"

#include "base/file.h"
#include "base/mem.h"
#include "base/version.h"
#include "method/choose.h"
#include "method/repair.h"
#include "num/vec.h"
#include "run/preview.h"
#include "run/work.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum {
    EVERY = 8,                /* of the windows, one is held out */
    RIDGE_SWEEPS = 2, DENSE = 4096,
    UP_SWEEPS = 1, UP_STEPS = 3,
    EPOCHS = 6,               /* of gradient steps */
    BATCH = 256,
    BLOCK_VALUES = 1 << 22,
};
static const double LAMBDA = 1e-2;
static const moec_router_opts ROUTER = {.lambda = 1e-3, .reach = 0.02};
/* Steps of a layer's matrices are this share of their size times the root of its relative error, FASTEST at most: a layer from which
 * little is missing must not be thrown about. */
static const double RATE = 0.1, FASTEST = 0.1;

struct moec_repair {
    moec_work work;
};

/* Both models, and what one layer is to do. */
typedef struct run {
    const moec_model *m;
    moec_plan *p;
    const moec_repair_opts *o;
    moec_repair *r;
    moec_preview twin;
    moec_pass *first, *second; /* the original's, the twin's */
    int64_t *row;              /* [windows] where a window's tokens stand: fitted ones first, held-out ones behind */
    int64_t *window;           /* [chunks] number of a chunk's first window */
    int64_t n, n_fit, ld, slots;
    float *x, *y;              /* [n,H] */
    float *logits;             /* [n,ld] */
    float *weight;             /* [n] */
    int32_t *ids;              /* [n,slots] */
    float *gates;
    int64_t seen, few;         /* experts whose tokens were counted, and those with fewer of them than neurons */
    moec_progress progress;
} run;

static int64_t hidden_of(const run *u)
{
    return u->m->dims.hidden;
}

/* --- arrangement ----------------------------------------------------------------------------------------------------- */

/* Windows by number over all domains; which are held out depends on the text alone. */
static moec_status place_windows(run *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_corpus *c = u->o->corpus;
    int64_t windows = 0, held = 0, at = 0, w = 0;
    for (int d = 0; d < c->n_domains; d++)
        windows += c->domain[d].n_windows;
    MOEC_TRY(MOEC_NEW(u->row, (size_t)windows, err));
    for (int pass = 0; pass < 2; pass++) {
        w = 0;
        for (int d = 0; d < c->n_domains; d++)
            for (int64_t i = 0; i < c->domain[d].n_windows; i++, w++) {
                const bool out = windows > 1 && w % EVERY == (windows < EVERY ? windows - 1 : EVERY - 1);
                if (out != (pass == 1))
                    continue;
                u->row[w] = at;
                at += c->domain[d].start[i + 1] - c->domain[d].start[i];
                held += out ? c->domain[d].start[i + 1] - c->domain[d].start[i] : 0;
            }
    }
    u->n = at;
    u->n_fit = at - held;
done:
    return st;
}

static moec_status number_chunks(run *u, moec_err *err)
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
static size_t own_bytes(const run *u)
{
    const size_t n = (size_t)u->n;
    const size_t fit = moec_repair_bytes(u->m, u->n, u->slots, BLOCK_VALUES);
    const size_t router = u->o->router ? moec_repair_router_bytes(u->m, u->n, u->slots) : 0;
    return n * (2 * (size_t)hidden_of(u) + (size_t)u->ld + 1 + 3 * (size_t)u->slots) * sizeof(float) + (fit > router ? fit : router) +
           (u->o->method ? moec_choose_bytes(u->m) : 0);
}

/* Of the first pass. `spare`: the least that the second can do with is kept free for it. */
static moec_pass_opts pass_opts(uint64_t *spare, const run *u)
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

static moec_status make_room(run *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    const size_t n = (size_t)u->n, values = n * (size_t)hidden_of(u);
    uint64_t spare;
    moec_pass_opts o = pass_opts(&spare, u);
    MOEC_TRY(moec_pass_new(&u->first, u->m, u->o->corpus, &o, err));
    const uint64_t counted = moec_resident_memory() + spare; /* what the first one has touched by now counts as resident */
    o.fixed_bytes = u->first->plan.bytes > counted ? (size_t)(u->first->plan.bytes - counted) : 0;
    o.look = true;
    MOEC_TRY(moec_pass_new(&u->second, &u->twin.variant->model, u->o->corpus, &o, err));
    MOEC_TRY(number_chunks(u, err));
    MOEC_TRY(MOEC_NEW(u->x, values, err));
    MOEC_TRY(MOEC_NEW(u->y, values, err));
    MOEC_TRY(MOEC_NEW(u->logits, n * (size_t)u->ld, err));
    MOEC_TRY(MOEC_NEW(u->weight, n, err));
    MOEC_TRY(MOEC_NEW(u->ids, n * (size_t)u->slots, err));
    MOEC_TRY(MOEC_NEW(u->gates, n * (size_t)u->slots, err));
done:
    return st;
}

static void release(run *u)
{
    moec_progress_stop(&u->progress);
    moec_pass_free(u->first);
    moec_pass_free(u->second);
    moec_preview_release(&u->twin);
    moec_free(u->row);
    moec_free(u->window);
    moec_free(u->x);
    moec_free(u->y);
    moec_free(u->logits);
    moec_free(u->weight);
    moec_free(u->ids);
    moec_free(u->gates);
}

/* --- what a layer is to do ------------------------------------------------------------------------------------------- */

/* Row of the first token of a chunk's window; both passes have the same chunks. */
static int64_t row_of(const run *u, const moec_pass *p, const moec_chunk *c, int64_t seq)
{
    return u->row[u->window[c - p->chunk] + seq];
}

/* Where a norm stands behind the branch: the original's own output is wanted. */
static moec_status see_original(void *ctx, int worker, const moec_chunk *c, const moec_moe_view *v, moec_err *err)
{
    run *u = ctx;
    const int64_t H = hidden_of(u);
    (void)worker;
    (void)err;
    for (int64_t s = 0; s < v->n_seq; s++) {
        const int64_t t = v->seq[s], values = (v->seq[s + 1] - t) * H;
        float *y = u->y + row_of(u, u->first, c, s) * H;
        memcpy(y, v->r + t * H, (size_t)values * sizeof *y);
        if (v->shared)
            moec_add(y, v->shared + t * H, values);
    }
    return MOEC_OK;
}

/* One window of the twin: input, logits, weight, and what is left to the routed experts. */
static moec_status see_window(run *u, int64_t token, int64_t row, const moec_moe_view *v, int64_t t, int64_t n, moec_err *err)
{
    const int64_t H = hidden_of(u);
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
    run *u = ctx;
    moec_status st = MOEC_OK;
    (void)worker;
    for (int64_t s = 0; st == MOEC_OK && s < v->n_seq; s++)
        st = see_window(u, c->token + v->seq[s], row_of(u, u->second, c, s), v, v->seq[s], v->seq[s + 1] - v->seq[s], err);
    return st;
}

/* What is added to the experts' output whoever is chosen. */
static moec_status subtract_bias(run *u, const moec_layer *l, moec_err *err)
{
    const moec_tensor *t = l->vec[MOEC_VEC_MOE_BIAS];
    const int64_t H = hidden_of(u);
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
static void scale_weights(run *u)
{
    double sum = 0.0;
    for (int64_t i = 0; i < u->n_fit; i++)
        sum += (double)u->weight[i];
    for (int64_t i = 0; i < u->n; i++)
        u->weight[i] = (float)((double)u->weight[i] * (double)u->n_fit / sum);
}

/* Squares of y before anything is subtracted from it. */
static moec_repair_error wanted(const run *u)
{
    const int64_t H = hidden_of(u);
    moec_repair_error e = {0.0, 0.0};
    for (int64_t i = 0; i < u->n; i++)
        *(i < u->n_fit ? &e.fit : &e.held) += (double)u->weight[i] * moec_sum_sq(u->y + i * H, H);
    return e;
}

/* --- one layer ------------------------------------------------------------------------------------------------------- */

/* Is the layer fitted as one block? Then one visit has all steps, gains nothing from a ridge solution to begin with, and the
 * router is fitted, too. */
static bool whole_layer(const run *u, const moec_plan_layer *pl)
{
    const moec_dims *d = &u->m->dims;
    return 3 * pl->n_keep * d->expert_width * d->hidden <= BLOCK_VALUES;
}

static uint32_t parts_of(const run *u, const moec_plan_layer *pl)
{
    if (u->o->kind != MOEC_REPAIR_DEEP)
        return MOEC_PART_UP | MOEC_PART_DOWN;
    return MOEC_PART_GATE | MOEC_PART_UP | MOEC_PART_DOWN | (whole_layer(u, pl) ? MOEC_PART_ROUTER : 0);
}

static bool is_plain(const run *u, int64_t set, uint32_t part)
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
static bool can_refit(const run *u, int64_t set)
{
    const moec_layer *l = moec_set_layer(u->m, set);
    const moec_repair_task t = {.model = u->m, .router = l->mat[MOEC_MAT_ROUTER]};
    return moec_repair_can_route(&t) && !l->mat[MOEC_MAT_ROUTER_IN].of && !l->mat[MOEC_MAT_ROUTER_MAP].of &&
           !u->m->family->weight_on_input && is_plain(u, set, MOEC_PART_ROUTER) &&
           moec_plan_slots(u->p, u->m, set).live == u->p->layer[set].n_keep;
}

/* All that is in the draft of a set. */
static uint32_t drafted(const run *u, int64_t set)
{
    const uint32_t parts = parts_of(u, &u->p->layer[set]);
    return u->o->router && can_refit(u, set) ? parts | MOEC_PART_ROUTER : parts;
}

static int epochs_of(const moec_repair_opts *o)
{
    return o->kind != MOEC_REPAIR_DEEP ? 0 : o->epochs > 0 ? o->epochs : EPOCHS;
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
static moec_status fit(run *u, const moec_plan_layer *pl, moec_repair_task *t, moec_repair_error wanted, moec_err *err)
{
    moec_status st = MOEC_OK;
    int64_t taken = 0, visits = 0;
    const moec_ridge_opts ridge = {.sweeps = RIDGE_SWEEPS, .lambda = LAMBDA, .dense = DENSE,
                                   .up_sweeps = UP_SWEEPS, .up_steps = UP_STEPS};
    const bool one = whole_layer(u, pl);
    const int epochs = epochs_of(u->o), each = one ? epochs : epochs % 2 == 0 ? 2 : 1; /* passes a visit */
    const double rate = RATE * sqrt(moec_repair_missing(t).fit / (wanted.fit + 1e-30));
    const moec_deep_opts deep = {.sweeps = each > 0 ? epochs / each : 0, .epochs = each, .batch = BATCH,
                                 .rate = rate < FASTEST ? rate : FASTEST, .seed = u->o->seed, .block_values = BLOCK_VALUES};
    if (u->o->kind == MOEC_REPAIR_RIDGE || !one)
        MOEC_TRY(moec_repair_ridge(&taken, t, &ridge, err));
    if (u->o->kind == MOEC_REPAIR_DEEP)
        MOEC_TRY(moec_repair_deep(&visits, t, &deep, err));
    if (u->o->kind == MOEC_REPAIR_DEEP && one && visits == 0) /* the steps were too bold for the held-out tokens */
        MOEC_TRY(moec_repair_ridge(&taken, t, &ridge, err));
    if (u->o->router && t->router.of)
        MOEC_TRY(refit_router(t, &ridge, err));
    else if (u->o->router)
        moec_note("layer %lld: its router cannot be refitted", (long long)t->layer->index);
    moec_note("layer %lld: %lld of %lld projections refitted, %lld visits taken", (long long)t->layer->index, (long long)taken,
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
static moec_status count_few(run *u, const moec_plan_layer *pl, moec_err *err)
{
    int64_t *tokens;
    moec_status st = MOEC_NEW(tokens, (size_t)pl->n_experts, err);
    if (st != MOEC_OK)
        return st;
    for (int64_t i = 0; i < u->n_fit * u->slots; i++)
        if (u->ids[i] >= 0 && u->ids[i] < pl->n_experts) /* others are null experts */
            tokens[u->ids[i]]++;
    for (int64_t k = 0; k < pl->n_keep; k++)
        u->few += tokens[pl->keep[k]] < u->m->dims.expert_width;
    u->seen += pl->n_keep;
    moec_free(tokens);
    return MOEC_OK;
}

static void say_few(const run *u)
{
    if (u->few > 0)
        moec_warn("of %lld experts that were fitted %lld saw fewer of the %lld tokens than they have neurons (%lld): they stay near "
                  "their old weights, more text fits them better", (long long)u->seen, (long long)u->few, (long long)u->n_fit,
                  (long long)u->m->dims.expert_width);
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

/* The task of a layer whose sample is there, on the twin's layer as the draft shows it. */
static moec_status solve(run *u, int64_t set, const moec_draft *d, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_plan_layer *pl = &u->p->layer[set];
    const moec_model *twin = &u->twin.variant->model;
    const moec_layer *l = &twin->layer[pl->layer];
    float *bias = NULL;
    routed was = {0};
    scale_weights(u);
    for (int64_t e = 0; e < u->m->dims.experts; e++)
        for (int64_t i = 0; l->removed && l->removed[e] && i < u->n; i++)
            u->logits[i * u->ld + e] = -INFINITY;
    moec_route(u->logits, u->ids, u->gates, u->logits, twin, l, u->n);
    MOEC_TRY(count_few(u, pl, err));
    MOEC_TRY(kept_bias(&bias, l, pl, err));
    moec_repair_task t = {.model = twin, .layer = l, .keep = pl->keep, .n_keep = pl->n_keep, .n = u->n, .n_fit = u->n_fit,
                          .x = u->x, .rest = u->y, .weight = u->weight, .ids = u->ids, .gates = u->gates, .slots = u->slots,
                          .router_bias = bias, .progress = &u->progress};
    if (d->router.of && moec_plan_slots(u->p, u->m, set).live == pl->n_keep) { /* rows stand side by side */
        t.router = d->router;
        t.router.rows = pl->n_keep;
    }
    const moec_repair_error all = wanted(u);
    MOEC_TRY(moec_repair_start(&t, err));
    const moec_repair_error before = moec_repair_missing(&t);
    MOEC_TRY(remember(&was, &t, err));
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
    return st;
}

static void file_name(char out[64], int64_t layer, const char *end)
{
    snprintf(out, 64, "layer-%05lld.%s", (long long)layer, end);
}

/* What was found out about a layer stands beside its weights: errors, what the router did, who was chosen, and a hash
 * by which a later run knows the weights (of `sheet`; NULL: there are none). */
static moec_status write_record(const run *u, const moec_plan_layer *pl, const moec_sheet *sheet, moec_err *err)
{
    moec_status st = MOEC_OK;
    char name[64], *path = NULL, *text = NULL;
    moec_json *o = moec_json_new_object();
    if (u->o->kind != MOEC_REPAIR_NONE) {
        moec_json_set(o, "before", moec_json_new_real(pl->error_before));
        moec_json_set(o, "after", moec_json_new_real(pl->error_after));
    }
    if (!isnan(pl->load_shift)) {
        moec_json_set(o, "load_shift", moec_json_new_real(pl->load_shift));
        moec_json_set(o, "router_refit", moec_json_new_bool(pl->router_refit));
    }
    moec_json_set(o, "keep", moec_json_new_ints(pl->keep, pl->n_keep));
    if (pl->score)
        moec_json_set(o, "score", moec_json_new_reals(pl->score, pl->n_experts));
    if (sheet) {
        moec_digest hash;
        MOEC_TRY(moec_sheet_digest(&hash, sheet, err));
        moec_json_set(o, "weights", moec_json_new_string(hash.hex));
    }
    file_name(name, pl->layer, "json");
    MOEC_TRY(moec_path_join(&path, u->r->work.folder.dir, name, err));
    MOEC_TRY(moec_json_dump(&text, o, 0, err));
    MOEC_TRY(moec_file_write(path, text, strlen(text), err));
done:
    moec_json_free(o);
    moec_free(path);
    moec_free(text);
    return st;
}

static bool read_keep(moec_plan_layer *pl, const moec_json *v)
{
    const moec_json *keep = moec_json_get(v, "keep"), *score = moec_json_get(v, "score");
    moec_err none;
    if (moec_json_len(keep) != (size_t)pl->n_keep || (score && moec_json_len(score) != (size_t)pl->n_experts))
        return false;
    if (score && !pl->score && MOEC_NEW(pl->score, (size_t)pl->n_experts, &none) != MOEC_OK)
        return false;
    for (int64_t k = 0; k < pl->n_keep; k++) {
        int64_t e;
        if (!moec_json_int(moec_json_at(keep, (size_t)k), &e) || e >= pl->n_experts || e < (k > 0 ? pl->keep[k - 1] + 1 : 0))
            return false;
        pl->keep[k] = (int32_t)e;
    }
    for (int64_t e = 0; score && e < pl->n_experts; e++)
        if (!moec_json_real(moec_json_at(score, (size_t)e), &pl->score[e]))
            return false;
    return true;
}

/* Are the layer's weights the ones that the record was written for? */
static moec_status check_weights(const run *u, const moec_plan_layer *pl, const moec_json *record, moec_err *err)
{
    char name[64];
    moec_digest have = {""};
    const char *said = moec_json_string(moec_json_get(record, "weights"));
    file_name(name, pl->layer, "safetensors");
    moec_status st = moec_override_file_digest(&have, u->r->work.weights, name, err);
    if (st == MOEC_OK && (!said || strcmp(said, have.hex) != 0))
        st = moec_fail(err, MOEC_EFORMAT, "%s/%s: is not what was written there (its hash differs); --no-resume begins anew",
                       u->r->work.folder.dir, name);
    return st;
}

/* `found`: the layer was done by an earlier run. */
static moec_status read_record(bool *found, const run *u, moec_plan_layer *pl, moec_err *err)
{
    moec_status st = MOEC_OK;
    char name[64], *path = NULL;
    moec_json *v = NULL;
    file_name(name, pl->layer, "safetensors");
    *found = u->o->kind == MOEC_REPAIR_NONE || moec_override_has(u->r->work.weights, name);
    file_name(name, pl->layer, "json");
    MOEC_TRY(moec_path_join(&path, u->r->work.folder.dir, name, err));
    const bool there = moec_path_exists(path);
    if (*found && !there && u->o->kind != MOEC_REPAIR_NONE)
        MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "%s: is missing; --no-resume begins anew", path));
    *found = *found && there;
    if (!*found)
        goto done;
    MOEC_TRY(moec_json_read(&v, path, 1 << 24, err));
    const bool errors = u->o->kind == MOEC_REPAIR_NONE || (moec_json_real(moec_json_get(v, "before"), &pl->error_before) &&
                                                           moec_json_real(moec_json_get(v, "after"), &pl->error_after));
    const moec_json *shift = moec_json_get(v, "load_shift");
    const bool moved = !shift || (moec_json_real(shift, &pl->load_shift) && pl->load_shift >= 0.0 && pl->load_shift <= 1.0 &&
                                   moec_json_bool(moec_json_get(v, "router_refit"), &pl->router_refit));
    if (!errors || !moved || !read_keep(pl, v))
        MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "%s: damaged; --no-resume begins anew", path));
    if (u->o->kind != MOEC_REPAIR_NONE)
        MOEC_TRY(check_weights(u, pl, v, err));
done:
    moec_json_free(v);
    moec_free(path);
    return st;
}

/* Who stays, by a method that looks at the layer's tokens. */
static moec_status choose(run *u, int64_t set, moec_err *err)
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

static moec_status fit_layer(run *u, int64_t set, moec_draft *draft, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_plan_layer *pl = &u->p->layer[set];
    char file[64];
    file_name(file, pl->layer, "safetensors");
    MOEC_TRY(moec_draft_new(draft, u->r->work.weights, file, u->m, u->p, &u->twin.forms, set, drafted(u, set), err));
    MOEC_TRY(moec_preview_set(&u->twin, u->p, set, draft, err));
    MOEC_TRY(solve(u, set, &u->twin.draft[set], err));
    moec_sheet *sheet = u->twin.draft[set].sheet;
    MOEC_TRY(write_record(u, pl, sheet, err));
    u->twin.draft[set].sheet = NULL;
    MOEC_TRY(moec_sheet_commit(sheet, u->r->work.weights, err));
done:
    return st;
}

/* The original has run the layer; the twin is in front of it. */
static moec_status repair_layer(run *u, int64_t set, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_plan_layer *pl = &u->p->layer[set];
    const bool fits = u->o->kind != MOEC_REPAIR_NONE;
    moec_draft draft = {0};
    bool found;
    MOEC_TRY(read_record(&found, u, pl, err));
    if (found && fits)
        MOEC_TRY(moec_draft_reopen(&draft, u->r->work.weights, u->m, u->p, &u->twin.forms, set, drafted(u, set), err));
    if (!found) {
        MOEC_TRY(moec_pass_look(u->second, pl->layer, see_twin, u, err));
        MOEC_TRY(subtract_bias(u, &u->m->layer[pl->layer], err));
        if (u->o->method)
            MOEC_TRY(choose(u, set, err));
    }
    if (found || !fits)
        MOEC_TRY(moec_preview_set(&u->twin, u->p, set, found && fits ? &draft : NULL, err));
    if (!found)
        MOEC_TRY(fits ? fit_layer(u, set, &draft, err) : write_record(u, pl, NULL, err));
    if (fits)
        pl->rewritten = drafted(u, set);
done:
    moec_draft_release(&draft);
    return st;
}

static moec_status run_layer(run *u, int64_t layer, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_layer *l = &u->m->layer[layer];
    const bool post = l->expert && l->vec[MOEC_VEC_POST_MLP];
    MOEC_TRY(moec_pass_layer(u->first, layer, post ? see_original : NULL, NULL, u, err));
    if (l->expert)
        MOEC_TRY(repair_layer(u, l->moe_index, err));
    MOEC_TRY(moec_pass_layer(u->second, layer, NULL, NULL, NULL, err));
done:
    return st;
}

/* --- all of it ------------------------------------------------------------------------------------------------------- */

/* For a run of everything that decides the result. */
static moec_status open_work(run *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *plan = NULL, *text = NULL;
    moec_digest words;
    MOEC_TRY(moec_plan_to_text(&plan, u->p, err));
    MOEC_TRY(moec_corpus_digest(&words, u->o->corpus, err));
    MOEC_TRY(moec_format(&text, err, "repair 2 %s\n%s\n%s %s\n%d %d %d %llu\n%d %d %d %d %d %d %d %g %g %g\n%d %g %g\n%s",
                         moec_version(), u->o->fingerprint, words.hex, u->o->method ? u->o->method->name : "", (int)u->o->kind,
                         (int)u->o->compute, epochs_of(u->o), (unsigned long long)u->o->seed, EVERY, RIDGE_SWEEPS, UP_SWEEPS,
                         UP_STEPS, DENSE, BATCH, BLOCK_VALUES, LAMBDA, RATE, FASTEST, (int)u->o->router, ROUTER.lambda,
                         ROUTER.reach, plan));
    MOEC_TRY(moec_work_open(&u->r->work, u->o->work, text, u->o->resume, true, err));
done:
    moec_free(plan);
    moec_free(text);
    return st;
}

/* What the plan says of the repair. */
static moec_status record(run *u, moec_err *err)
{
    static const char *const names[] = {"none", "ridge", "deep"};
    moec_status st = MOEC_OK;
    moec_digest digest;
    moec_json *o = NULL;
    if (u->o->kind == MOEC_REPAIR_NONE)
        return MOEC_OK;
    o = moec_json_new_object();
    MOEC_TRY(moec_preview_digest(&digest, u->p, u->r->work.weights, err));
    snprintf(u->p->weights, sizeof u->p->weights, "%s", digest.hex);
    MOEC_TRY(moec_corpus_digest(&digest, u->o->corpus, err));
    moec_json_set(o, "method", moec_json_new_string(names[u->o->kind]));
    moec_json_set(o, "text", moec_json_new_string(digest.hex));
    moec_json_set(o, "tokens", moec_json_new_int(u->n));
    moec_json_set(o, "held_out_tokens", moec_json_new_int(u->n - u->n_fit));
    moec_json_set(o, "compute", moec_json_new_string(u->o->compute == MOEC_COMPUTE_BF16 ? "bf16" : "f32"));
    if (u->o->kind == MOEC_REPAIR_DEEP) {
        moec_json_set(o, "epochs", moec_json_new_int(epochs_of(u->o)));
        moec_json_set(o, "seed", moec_json_new_int((int64_t)u->o->seed));
    }
    if (u->o->router)
        moec_json_set(o, "router", moec_json_new_string("refit"));
    MOEC_TRY(moec_json_dump(&u->p->repair, o, 0, err));
done:
    moec_json_free(o);
    return st;
}

static uint64_t token_passes(const run *u)
{
    const uint64_t n = (uint64_t)u->n, used = (uint64_t)(u->n_fit * u->slots);
    const uint64_t sweeps = u->o->kind == MOEC_REPAIR_NONE ? 0 : RIDGE_SWEEPS, layer = 3 * n + used * (sweeps + (uint64_t)epochs_of(u->o));
    return layer * (uint64_t)u->m->dims.layers;
}

/* What needs no more than the plan and the text. */
static moec_status begin(run *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    if (u->m->family->n_tail > 0)
        return moec_fail(err, MOEC_EINVAL, "repair: %s has experts without a network, whose part in a layer's output it does not "
                         "take out", u->m->family->model_type);
    MOEC_TRY(moec_preview_begin(&u->twin, u->m, u->p, err));
    u->slots = u->twin.variant->model.dims.slots;
    u->ld = u->m->dims.experts + u->m->dims.null_experts;
    MOEC_TRY(place_windows(u, err));
    if (u->n > INT32_MAX || moec_plan_rewrites(u->p) || u->p->n_drop > 0)
        st = moec_fail(err, MOEC_EINVAL, u->n > INT32_MAX ? "repair: more than 2^31 tokens" : "repair: the plan has weights computed "
                       "anew, or drops layers");
done:
    return st;
}

moec_status moec_repair_estimate(moec_work_cost *out, moec_plan *p, const moec_model *m, const moec_repair_opts *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    run u = {.m = m, .p = p, .o = o};
    moec_pass_plan pass;
    uint64_t spare, all, largest;
    *out = (moec_work_cost){0};
    MOEC_TRY(begin(&u, err));
    for (int64_t i = 0; i < p->n_layers && o->kind != MOEC_REPAIR_NONE; i++) {
        MOEC_TRY(moec_draft_bytes(&all, &largest, m, p, &u.twin.forms, i, drafted(&u, i), err));
        out->disk += all;
    }
    const moec_pass_opts po = pass_opts(&spare, &u);
    MOEC_TRY(moec_pass_estimate(&pass, m, u.n, moec_pass_max_seq(o->corpus), &po, err));
    out->memory = pass.bytes;
    out->token_passes = token_passes(&u);
done:
    release(&u);
    return st;
}

moec_status moec_repair_run(moec_repair **out, moec_plan *p, const moec_model *m, const moec_repair_opts *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    run u = {.m = m, .p = p, .o = o};
    *out = NULL;
    MOEC_TRY(MOEC_NEW(u.r, 1, err));
    u.r->work.folder.lock = -1;
    MOEC_TRY(begin(&u, err));
    MOEC_TRY(make_room(&u, err)); /* nothing is left behind where there is none */
    MOEC_TRY(open_work(&u, err));
    moec_progress_start(&u.progress, "repair", "token passes", token_passes(&u), 0);
    MOEC_TRY(moec_pass_embed(u.first, err));
    MOEC_TRY(moec_pass_embed(u.second, err));
    for (int64_t l = 0; l < m->dims.layers; l++) {
        if ((st = run_layer(&u, l, err)) == MOEC_EINTR)
            st = moec_fail(err, st, "interrupted after %lld of %lld layers; the same command continues there", (long long)l,
                           (long long)m->dims.layers);
        if (st != MOEC_OK)
            goto done;
        u.progress.done = u.progress.total / (uint64_t)m->dims.layers * (uint64_t)(l + 1);
        moec_progress_step(&u.progress, 0);
    }
    MOEC_TRY(moec_ckpt_unchanged(m->ckpt, err));
    MOEC_TRY(record(&u, err));
    moec_progress_finish(&u.progress);
    say_few(&u);
    *out = u.r;
    u.r = NULL;
done:
    release(&u);
    moec_repair_close(u.r, false);
    return st;
}

const moec_override *moec_repair_weights(const moec_repair *r)
{
    return r->work.weights;
}

moec_status moec_repair_keep(moec_repair *r, const char *dir, moec_err *err)
{
    return moec_work_keep(&r->work, dir, err);
}

void moec_repair_close(moec_repair *r, bool remove)
{
    if (r)
        moec_work_close(&r->work, remove);
    moec_free(r);
}
