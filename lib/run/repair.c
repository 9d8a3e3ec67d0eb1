/* See repair.h. */
#include "run/lockstep.h"

#include "base/file.h"
#include "base/mem.h"
#include "base/par.h"
#include "base/version.h"
#include "run/thin.h"

#include <stdio.h>
#include <string.h>

static void say_few(const moec_lockstep *u)
{
    if (u->few > 0 && u->o->kind != MOEC_REPAIR_NONE)
        moec_warn("of %lld experts that were fitted %lld saw fewer of the %lld tokens than they have neurons (%lld): they stay near "
                  "their old weights, more text fits them better", (long long)u->seen, (long long)u->few, (long long)u->n_fit,
                  (long long)u->twin.variant->model.dims.expert_width);
}

static moec_status run_layer(moec_lockstep *u, int64_t layer, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_layer *l = &u->m->layer[layer];
    MOEC_TRY(moec__lockstep_first(u, layer, err));
    if (l->expert)
        MOEC_TRY(moec__repair_layer(u, l->moe_index, err));
    MOEC_TRY(moec_pass_layer(u->second, layer, NULL, NULL, NULL, err));
done:
    return st;
}

/* --- all of it ------------------------------------------------------------------------------------------------------- */

static moec_json *weights(const moec_corpus *c)
{
    moec_json *a = moec_json_new_array();
    for (int d = 0; d < c->n_domains; d++)
        moec_json_push(a, moec_json_new_real(c->domain[d].weight));
    return a;
}

/* For a run of everything that decides the result. */
static moec_status open_work(moec_lockstep *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *plan = NULL, *rule = NULL, *merge = NULL;
    moec_json *settings = NULL;
    moec_digest words;
    MOEC_TRY(moec_plan_to_text(&plan, u->p, err));
    MOEC_TRY(moec_corpus_digest(&words, u->o->corpus, err));
    MOEC_TRY(moec__repair_identity(&rule, u, err));
    if (u->o->merge) {
        settings = moec_merge_json(u->o->merge);
        moec_json_set(settings, "texts", weights(u->o->corpus)); /* the digest leaves them out */
        if (u->o->tied) /* no keep list says how many groups there are */
            moec_json_set(settings, "tied", moec_json_new_long_ints(u->o->tied, u->p->n_layers));
        MOEC_TRY(moec_json_dump(&merge, settings, 0, err));
    }
    MOEC_TRY(moec_work_open(&u->r->work, u->o->work, u->o->resume, true, err, "repair 6 %s\n%s\n%s %s\n%s\n%s\n%s\n%s", moec_version(),
                            u->o->fingerprint, words.hex, u->o->method ? u->o->method->name : "", rule, merge ? merge : "",
                            moec_ckpt_config_text(u->m->ckpt), plan));
done:
    moec_json_free(settings);
    moec_free(merge);
    moec_free(rule);
    moec_free(plan);
    return st;
}

/* What the plan says of the repair. */
static moec_status record(moec_lockstep *u, moec_err *err)
{
    static const char *const names[] = {"none", "ridge", "deep"};
    moec_status st = MOEC_OK;
    moec_digest digest;
    moec_json *o = NULL;
    if (!moec__repair_fits(u->o))
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
        moec_json_set(o, "epochs", moec_json_new_int(moec__repair_epochs(u->o)));
        moec_json_set(o, "seed", moec_json_new_int((int64_t)u->o->seed));
    }
    if (u->o->router)
        moec_json_set(o, "router", moec_json_new_string("refit"));
    MOEC_TRY(moec_json_dump(&u->p->repair, o, 0, err));
done:
    moec_json_free(o);
    return st;
}

static uint64_t token_passes(const moec_lockstep *u)
{
    const uint64_t n = (uint64_t)u->n, used = (uint64_t)(u->n_fit * u->slots);
    const uint64_t sweeps = u->o->kind == MOEC_REPAIR_NONE ? 0 : MOEC_REPAIR_RIDGE_SWEEPS;
    const uint64_t layer = 3 * n + used * (sweeps + (uint64_t)moec__repair_epochs(u->o));
    return layer * (uint64_t)u->m->dims.layers;
}

/* As many as have room where a layer is fitted later on, one at least. */
static moec_status count_workers(moec_lockstep *u, moec_err *err)
{
    moec_status st = moec_thin_worker_bytes(&u->thin_bytes, u->p, u->m, &u->twin.forms, err);
    if (st != MOEC_OK)
        return st;
    const uint64_t room = moec_repair_bytes(u->m, u->n, u->slots, MOEC_REPAIR_BLOCK_VALUES) / u->thin_bytes;
    const int64_t threads = moec_par_threads();
    u->workers = room < 1 ? 1 : room < (uint64_t)threads ? (int64_t)room : threads;
    return MOEC_OK;
}

/* What was asked for, as repair.h says that it goes together. */
static moec_status check_plan(const moec_lockstep *u, moec_err *err)
{
    const moec_repair_opts *o = u->o;
    if (u->n > INT32_MAX)
        return moec_fail(err, MOEC_EINVAL, "repair: more than 2^31 tokens");
    if ((!o->thin && moec_plan_rewrites(u->p)) || u->p->n_drop > 0)
        return moec_fail(err, MOEC_EINVAL, "repair: the plan has weights computed anew, or drops layers");
    if (o->thin && (o->thin->grain != MOEC_GRAIN_NEURONS || u->p->width < 1 || o->kind == MOEC_REPAIR_NONE || o->method || o->merge))
        return moec_fail(err, MOEC_EINVAL, "repair: only neurons are taken out before a layer is fitted, and nothing else is then");
    return MOEC_OK;
}

/* What needs no more than the plan and the text. */
static moec_status begin(moec_lockstep *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    if (u->m->family->n_tail > 0)
        return moec_fail(err, MOEC_EINVAL, "repair: %s has experts without a network, whose part in a layer's output it does not "
                         "take out", u->m->family->model_type);
    if (u->o->tied && (!u->o->merge || u->o->kind != MOEC_REPAIR_NONE || u->o->router))
        return moec_fail(err, MOEC_EINVAL, "repair: experts that share weights are merged and not fitted, and their router stays");
    if (u->p->mapped && (!u->o->merge || u->o->tied || u->o->router || u->o->merge->decide))
        return moec_fail(err, MOEC_EINVAL, "repair: mapped experts are merged, each into another one, and their router stays");
    MOEC_TRY(moec_preview_begin(&u->twin, u->m, u->p, err));
    u->slots = u->twin.variant->model.dims.slots;
    u->ld = u->m->dims.experts + u->m->dims.null_experts;
    MOEC_TRY(moec__lockstep_place(u, err));
    MOEC_TRY(check_plan(u, err));
    if (u->o->merge)
        MOEC_TRY(moec__merge_possible(u, err));
    if (u->o->thin)
        st = count_workers(u, err);
done:
    return st;
}

moec_status moec_repair_estimate(moec_work_cost *out, moec_plan *p, const moec_model *m, const moec_repair_opts *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_lockstep u = {.m = m, .p = p, .o = o};
    moec_pass_plan pass;
    uint64_t spare, all, largest;
    *out = (moec_work_cost){0};
    MOEC_TRY(begin(&u, err));
    for (int64_t i = 0; i < (o->thin ? p->n_sets : p->n_layers) && moec__repair_fits(o); i++) {
        MOEC_TRY(moec_draft_bytes(&all, &largest, m, p, &u.twin.forms, i, moec__repair_drafted(&u, i), err));
        out->disk += all;
    }
    const moec_pass_opts po = moec__lockstep_opts(&spare, &u);
    MOEC_TRY(moec_pass_estimate(&pass, m, u.n, moec_pass_max_seq(o->corpus), &po, err));
    out->memory = pass.bytes;
    out->token_passes = token_passes(&u);
done:
    moec__lockstep_release(&u);
    return st;
}

moec_status moec_repair_run(moec_repair **out, moec_plan *p, const moec_model *m, const moec_repair_opts *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_lockstep u = {.m = m, .p = p, .o = o};
    *out = NULL;
    MOEC_TRY(MOEC_NEW(u.r, 1, err));
    u.r->work.folder.lock = -1;
    MOEC_TRY(begin(&u, err));
    MOEC_TRY(moec__lockstep_room(&u, err)); /* nothing is left behind where there is none */
    MOEC_TRY(open_work(&u, err));
    moec_progress_start(&u.progress, o->merge ? "merge" : "repair", "token passes", token_passes(&u), 0);
    MOEC_TRY(moec_pass_embed(u.first, err));
    MOEC_TRY(moec_pass_embed(u.second, err));
    for (int64_t l = 0; l < m->dims.layers; l++) {
        MOEC_TRY(moec_work_interrupted(run_layer(&u, l, err), NULL, l, m->dims.layers, err));
        u.progress.done = u.progress.total / (uint64_t)m->dims.layers * (uint64_t)(l + 1);
        moec_progress_step(&u.progress, 0);
    }
    for (int64_t i = p->n_layers; o->thin && i < p->n_sets; i++) /* what is not run gets its width all the same */
        MOEC_TRY(moec_thin_make(u.r->work.weights, p, &u.twin.forms, o->thin, o->request, i, u.workers, err));
    MOEC_TRY(moec_ckpt_unchanged(m->ckpt, err));
    MOEC_TRY(record(&u, err));
    moec_progress_finish(&u.progress);
    say_few(&u);
    *out = u.r;
    u.r = NULL;
done:
    moec__lockstep_release(&u);
    if (u.r)
        moec_work_abandon(&u.r->work);
    moec_free(u.r);
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
