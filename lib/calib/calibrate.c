/* See calibrate.h. */
#include "calib/calibrate.h"

#include "base/file.h"
#include "base/mem.h"
#include "base/version.h"
#include "calib/observe.h"
#include "calib/state.h"
#include "calib/trace.h"
#include "num/vec.h"

#include <math.h>
#include <string.h>

enum { SAMPLES = 64 }; /* tokens of the block similarity matrix, shared by the domains, but 8 each at least */

typedef struct job {
    const moec_model *m;
    moec_stats *stats;
    moec_carry carry;
    moec_partial **partial; /* [workers] */
    int workers;
    moec_trace *trace; /* NULL: not wanted */
} job;

moec_status moec_calibrate_meta(moec_stats_meta *out, const moec_model *m, const moec_calibrate_opts *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_digest print;
    const moec_dims *d = &m->dims;
    memset(out, 0, sizeof *out);
    MOEC_TRY(moec_ckpt_fingerprint(&print, m->ckpt, err));
    memcpy(out->model, print.hex, sizeof out->model);
    strncpy(out->model_type, m->family->model_type, sizeof out->model_type - 1);
    strncpy(out->compute, o->compute == MOEC_COMPUTE_BF16 ? "bf16" : "f32", sizeof out->compute - 1);
    MOEC_TRY(moec_router_rule(&out->router_rule, m, err));
    MOEC_TRY(moec_copy(&out->options, o->options ? o->options : "{}", strlen(o->options ? o->options : "{}"), err));
    out->layers = d->layers;
    out->moe_layers = m->moe_layers;
    out->experts = d->experts;
    out->null_experts = d->null_experts;
    out->top_k = d->top_k < d->experts ? d->top_k : d->experts; /* null experts may be among the k */
    out->hidden = d->hidden;
    out->expert_width = d->expert_width;
    out->tier = o->tier;
    MOEC_TRY(MOEC_NEW(out->moe_layer, (size_t)m->moe_layers, err));
    for (int64_t i = 0; i < d->layers; i++)
        if (m->layer[i].moe_index >= 0)
            out->moe_layer[m->layer[i].moe_index] = i;
done:
    if (st != MOEC_OK)
        moec_stats_meta_release(out);
    return st;
}

static int64_t samples_each(int n_domains)
{
    int64_t each = SAMPLES / (n_domains > 0 ? n_domains : 1);
    return each < 8 ? 8 : each;
}

/* What is kept besides the pass: statistics, selections of the layer before, samples. */
static size_t calibrate_bytes(const moec_stats_meta *meta, int64_t slots, int n_domains, int64_t n_tokens)
{
    size_t sum = 0, d = (size_t)n_domains;
    for (int k = 0; k < MOEC_STAT_COUNT; k++)
        if (moec_stat_kinds[k].tier <= meta->tier)
            sum += d * (size_t)moec_stat_cells(meta, (moec_stat)k) * (size_t)moec_stat_blocks(meta, (moec_stat)k) *
                   moec_cell_bytes(moec_stat_kinds[k].cell);
    sum += 2 * (size_t)n_tokens * (size_t)slots * sizeof(int32_t);
    return sum + (size_t)(meta->layers + 1) * d * (size_t)samples_each(n_domains) * (size_t)meta->hidden * sizeof(float);
}

/* Evenly spaced tokens of each domain. */
static moec_status carry_new(moec_carry *c, const moec_model *m, const moec_corpus *corpus, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_dims *d = &m->dims;
    int64_t each = samples_each(corpus->n_domains), base = 0;
    memset(c, 0, sizeof *c);
    c->n_tokens = moec_corpus_tokens(corpus);
    c->slots = d->slots;
    c->hidden = d->hidden;
    c->layers = d->layers;
    size_t ids = (size_t)c->n_tokens * (size_t)d->slots, most = (size_t)each * (size_t)corpus->n_domains;
    MOEC_TRY(MOEC_NEW(c->prev, ids, err));
    MOEC_TRY(MOEC_NEW(c->guess, ids, err));
    MOEC_TRY(MOEC_NEW(c->sample, most, err));
    MOEC_TRY(MOEC_NEW(c->sample_domain, most, err));
    for (int i = 0; i < corpus->n_domains; i++) {
        const moec_domain *dom = &corpus->domain[i];
        int64_t n = dom->start[dom->n_windows] - dom->start[0], take = n < each ? n : each;
        for (int64_t j = 0; j < take; j++) {
            c->sample[c->n_samples] = base + (2 * j + 1) * n / (2 * take);
            c->sample_domain[c->n_samples++] = i;
        }
        base += n;
    }
    MOEC_TRY(moec_alloc((void **)&c->state, (size_t)(c->layers + 1) * (size_t)c->n_samples, (size_t)c->hidden * sizeof(float),
                        err));
done:
    return st;
}

static void carry_release(moec_carry *c)
{
    moec_free(c->prev);
    moec_free(c->guess);
    moec_free(c->sample);
    moec_free(c->sample_domain);
    moec_free(c->state);
    memset(c, 0, sizeof *c);
}

static moec_status take_samples(moec_carry *c, const moec_hidden *hidden, int64_t point, moec_err *err)
{
    moec_status st = MOEC_OK;
    for (int64_t s = 0; s < c->n_samples && st == MOEC_OK; s++)
        st = moec_hidden_read(c->state + (point * c->n_samples + s) * c->hidden, hidden, c->sample[s], 1, err);
    return st;
}

static double dot(const float *a, const float *b, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += (double)a[i] * (double)b[i];
    return sum;
}

/* Cosines of every two points of the residual stream, each computed once: the matrix is symmetric. */
static moec_status add_block_cosines(moec_stats *stats, const moec_carry *c, moec_err *err)
{
    moec_status st = MOEC_OK;
    int64_t points = c->layers + 1;
    double *square = NULL;
    MOEC_TRY(MOEC_NEW(square, (size_t)points, err));
    for (int64_t s = 0; s < c->n_samples; s++) {
        double *sum = moec_stat_at(stats, c->sample_domain[s], MOEC_STAT_COS_BLOCK, 0);
        uint64_t *n = moec_stat_at(stats, c->sample_domain[s], MOEC_STAT_BLOCK_TOKENS, 0);
        MOEC_TRY(moec_interrupted(err));
        for (int64_t i = 0; i < points; i++) {
            const float *a = c->state + (i * c->n_samples + s) * c->hidden;
            square[i] = dot(a, a, c->hidden);
            for (int64_t j = 0; j <= i; j++) {
                double both = square[i] * square[j];
                double cosine = both > 0 ? dot(a, c->state + (j * c->n_samples + s) * c->hidden, c->hidden) / sqrt(both) : 0.0;
                sum[i * points + j] += cosine;
                if (j < i)
                    sum[j * points + i] += cosine;
            }
        }
        ++*n;
    }
done:
    moec_free(square);
    return st;
}

static moec_status see(void *ctx, int worker, const moec_chunk *c, const moec_moe_view *v, moec_err *err)
{
    job *j = ctx;
    moec_carry *carry = &j->carry;
    int32_t *prev = carry->prev + c->token * carry->slots, *guess = carry->guess + c->token * carry->slots;
    bool first = j->m->layer[v->layer].moe_index == 0;
    (void)err;
    moec_event ev = {.model = j->m, .moe_layer = j->m->layer[v->layer].moe_index, .n = v->n, .seq = v->seq,
                     .n_seq = v->n_seq};
    ev.h = v->h;
    ev.x = v->x;
    ev.r = v->r;
    ev.shared = v->shared;
    ev.slots = carry->slots;
    ev.ld = v->ld;
    ev.logits = v->logits;
    ev.scores = v->scores;
    ev.ids = v->ids;
    ev.gates = v->gates;
    ev.null_gates = v->null_gates;
    ev.y_norm = v->y_norm;
    ev.out_absmax = v->out_absmax;
    ev.out_channel = v->out_channel;
    ev.in_absmax = v->in_absmax;
    ev.router = v->router;
    ev.router_norm = v->router_norm;
    ev.router_bias = v->router_bias;
    ev.prev_ids = first ? NULL : prev;
    ev.guess_ids = first ? NULL : guess;
    if (v->sums) {
        ev.y_sum = v->sums->y_sum;
        ev.gy_sum = v->sums->gy_sum;
        ev.xin_abs = v->sums->xin_abs;
        ev.xin_sq = v->sums->xin_sq;
        ev.act_abs = v->sums->act_abs;
        ev.act_sq = v->sums->act_sq;
        ev.gact_sq = v->sums->gact_sq;
    }
    moec_observe(j->partial[worker], &ev);
    if (j->trace)
        moec_trace_see(j->trace, c, v);
    memcpy(prev, v->ids, (size_t)(v->n * carry->slots) * sizeof *prev);
    if (v->next_ids)
        memcpy(guess, v->next_ids, (size_t)(v->n * carry->slots) * sizeof *guess);
    return MOEC_OK;
}

typedef struct layer_job {
    job *j;
    int64_t moe_layer;
} layer_job;

static moec_status see_layer(void *ctx, int worker, const moec_chunk *c, const moec_moe_view *v, moec_err *err)
{
    return see(((layer_job *)ctx)->j, worker, c, v, err);
}

static moec_status sum_layer(void *ctx, int worker, const moec_chunk *c, moec_err *err)
{
    layer_job *l = ctx;
    (void)err;
    moec_stats_absorb(l->j->stats, c->domain, l->moe_layer, l->j->partial[worker]);
    return MOEC_OK;
}

static moec_status stats_for(moec_stats **out, const moec_stats_meta *meta, const moec_corpus *corpus, moec_err *err)
{
    moec_status st = MOEC_OK;
    const char **names = NULL;
    MOEC_TRY(MOEC_NEW(names, (size_t)corpus->n_domains, err));
    for (int i = 0; i < corpus->n_domains; i++)
        names[i] = corpus->domain[i].name;
    MOEC_TRY(moec_stats_new(out, meta, corpus->n_domains, names, err));
    for (int i = 0; i < corpus->n_domains; i++) {
        const moec_domain *from = &corpus->domain[i];
        moec_stats_domain *to = &(*out)->domain[i];
        moec_digest digest;
        moec_corpus one = {1, corpus->domain + i};
        MOEC_TRY(moec_corpus_digest(&digest, &one, err));
        memcpy(to->digest, digest.hex, sizeof to->digest);
        to->weight = from->weight;
        to->tokens = (uint64_t)(from->start[from->n_windows] - from->start[0]);
        to->sequences = (uint64_t)from->n_windows;
    }
done:
    moec_free(names);
    return st;
}

/* Digest of all that decides the result, so that a checkpoint of another run is not continued. */
static moec_status run_id(moec_digest *out, const moec_model *m, const moec_stats_meta *meta, const moec_corpus *corpus,
                          bool traced, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_hash *h = NULL;
    moec_digest text;
    MOEC_TRY(moec_corpus_digest(&text, corpus, err));
    MOEC_TRY(moec_hash_new(&h, err));
    moec_hash_text(h, "calibrate 4");
    moec_hash_text(h, moec_version());
    moec_hash_text(h, meta->model);
    moec_hash_text(h, moec_ckpt_config_text(m->ckpt)); /* the fingerprint is of the tensors alone */
    moec_hash_text(h, meta->options);
    moec_hash_text(h, meta->compute);
    moec_hash_text(h, meta->tier ? "1" : "0");
    moec_hash_text(h, traced ? "trace" : "");
    moec_hash_text(h, text.hex);
    for (int i = 0; i < corpus->n_domains; i++)
        moec_hash_add(h, &corpus->domain[i].weight, sizeof corpus->domain[i].weight);
    *out = moec_hash_digest(h);
done:
    moec_hash_free(h);
    return st;
}

static moec_status run_layers(job *j, moec_pass *p, moec_checkpoint *cp, const moec_calibrate_opts *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    double saved = moec_now();
    int64_t n = j->m->dims.layers;
    for (int64_t i = cp->layers_done; i < n; i++) {
        layer_job l = {j, j->m->layer[i].moe_index};
        st = moec_pass_layer(p, i, see_layer, sum_layer, &l, err);
        MOEC_TRY(moec_within(err, st, "%s", moec_ckpt_dir(j->m->ckpt)));
        if (l.moe_layer >= 0 && j->trace)
            MOEC_TRY(moec_trace_keep(j->trace, i, err));
        MOEC_TRY(take_samples(&j->carry, p->hidden, i + 1, err));
        /* States on disk are overwritten two layers later, so there each layer needs its checkpoint. */
        if (i + 1 < n && (p->plan.on_disk || moec_now() - saved >= o->checkpoint_every)) {
            MOEC_TRY(moec_checkpoint_save(cp, i + 1, j->stats, &j->carry, p->hidden, err));
            saved = moec_now();
        }
    }
done:
    return st;
}

static moec_status begin(job *j, moec_pass *p, moec_checkpoint *cp, const moec_stats_meta *meta, const moec_corpus *corpus,
                         moec_err *err)
{
    moec_status st = MOEC_OK;
    if (cp->layers_done > 0 && cp->layers_done < j->m->dims.layers) {
        moec_err why = {MOEC_OK, ""};
        st = moec_checkpoint_load(cp, &j->stats, &j->carry, p->hidden, &why);
        if (st == MOEC_ENOMEM || st == MOEC_ENOFIT) /* nothing is wrong with the checkpoint: leave it for a better day */
            return moec_fail(err, st, "%s", why.text);
        if (st == MOEC_OK) {
            moec_say("continuing at layer %lld of %lld", (long long)cp->layers_done, (long long)j->m->dims.layers);
            moec_pass_begin(p, cp->layers_done);
            return MOEC_OK;
        }
        moec_warn("%s; starting anew", why.text);
        moec_stats_free(j->stats);
        j->stats = NULL;
    }
    if (cp->layers_done > 0) /* or a kill would leave it pointing at states that are overwritten now */
        MOEC_TRY(moec_checkpoint_restart(cp, err));
    moec_hidden_set_side(p->hidden, 0);
    MOEC_TRY(stats_for(&j->stats, meta, corpus, err));
    moec_pass_begin(p, 0);
    MOEC_TRY(moec_pass_embed(p, err));
    MOEC_TRY(take_samples(&j->carry, p->hidden, 0, err));
done:
    return st;
}

static moec_pass_opts pass_opts(const moec_model *m, const moec_stats_meta *meta, const moec_corpus *corpus,
                                const moec_calibrate_opts *o, const char *dir)
{
    int64_t tokens = moec_corpus_tokens(corpus);
    moec_pass_opts po = {.compute = o->compute, .watch = true, .sums = o->tier > 0, .max_memory = o->max_memory,
                         .worker_bytes = moec_partial_bytes(meta), .dir = dir, .keep = true, .what = "calibrate"};
    po.fixed_bytes = calibrate_bytes(meta, m->dims.slots, corpus->n_domains, tokens) +
                     (o->trace ? moec_trace_bytes(m, tokens) : 0);
    return po;
}

moec_status moec_calibrate_plan(moec_pass_plan *out, size_t *statistics, const moec_model *m, const moec_corpus *corpus,
                                const moec_calibrate_opts *o, moec_err *err)
{
    moec_stats_meta meta;
    moec_status st = moec_calibrate_meta(&meta, m, o, err);
    if (st != MOEC_OK)
        return st;
    moec_pass_opts po = pass_opts(m, &meta, corpus, o, NULL);
    *statistics = calibrate_bytes(&meta, m->dims.slots, corpus->n_domains, moec_corpus_tokens(corpus));
    st = moec_pass_estimate(out, m, moec_corpus_tokens(corpus), moec_pass_max_seq(corpus), &po, err);
    moec_stats_meta_release(&meta);
    return st;
}

static moec_status refuse_existing(const char *path, const char *trace, moec_err *err)
{
    const char *there = moec_path_exists(path) ? path : trace && moec_path_exists(trace) ? trace : NULL;
    return there ? moec_fail(err, MOEC_EEXIST, "%s: is there already; --overwrite replaces it", there) : MOEC_OK;
}

bool moec_calibrate_unfinished(const char *path)
{
    char *dir;
    if (moec_format(&dir, NULL, "%s.partial", path) != MOEC_OK)
        return false;
    bool there = moec_path_is_dir(dir);
    moec_free(dir);
    return there;
}

moec_status moec_calibrate_forget(const char *path, moec_err *err)
{
    moec_checkpoint cp;
    moec_status st = moec_checkpoint_open(&cp, path, "", false, err);
    if (st == MOEC_OK)
        st = moec_checkpoint_remove(&cp, err);
    moec_checkpoint_release(&cp);
    return st;
}

static moec_status observe_all(moec_stats **out, job *j, const moec_corpus *corpus, const char *path,
                               const moec_calibrate_opts *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_stats_meta meta;
    moec_checkpoint cp = {.lock = -1};
    bool cleared = false;
    moec_pass *p = NULL;
    moec_digest id;
    MOEC_TRY(moec_calibrate_meta(&meta, j->m, o, err));
    MOEC_TRY(run_id(&id, j->m, &meta, corpus, o->trace != NULL, err));
    MOEC_TRY(moec_checkpoint_open(&cp, path, id.hex, o->resume, err));
    if (o->keep_existing && !cp.same) /* else an interrupted run of this id left them, with its folder */
        MOEC_TRY(refuse_existing(path, o->trace, err));
    cleared = cp.layers_done == 0;
    if (cleared)
        MOEC_TRY(moec_checkpoint_clear(&cp, err));
    moec_pass_opts po = pass_opts(j->m, &meta, corpus, o, cp.dir);
    /* The pass plans with what is resident now, so what is in fixed_bytes must not exist before. */
    MOEC_TRY(moec_pass_new(&p, j->m, corpus, &po, err));
    MOEC_TRY(carry_new(&j->carry, j->m, corpus, err));
    if (o->trace)
        MOEC_TRY(moec_trace_new(&j->trace, j->m, j->carry.n_tokens, cp.dir, err));
    j->workers = p->plan.workers;
    MOEC_TRY(MOEC_NEW(j->partial, (size_t)j->workers, err));
    for (int i = 0; i < j->workers; i++)
        MOEC_TRY(moec_partial_new(&j->partial[i], &meta, err));
    MOEC_TRY(begin(j, p, &cp, &meta, corpus, err));
    MOEC_TRY(run_layers(j, p, &cp, o, err));
    moec_pass_end(p);
    MOEC_TRY(add_block_cosines(j->stats, &j->carry, err));
    if ((st = moec_ckpt_unchanged(j->m->ckpt, err)) != MOEC_OK) {
        moec_status removed = moec_checkpoint_remove(&cp, NULL); /* it may be of two models */
        (void)removed;
        goto done;
    }
    if (j->trace)
        MOEC_TRY(moec_trace_finish(j->trace, corpus, o->trace, err));
    MOEC_TRY(moec_stats_save(j->stats, path, err));
    MOEC_TRY(moec_checkpoint_remove(&cp, err));
    *out = j->stats;
    j->stats = NULL;
done:
    if (st != MOEC_OK && !p && cleared) { /* refused before it began: leave nothing behind */
        moec_err ignored;
        moec_status removed = moec_checkpoint_remove(&cp, &ignored);
        (void)removed;
    }
    if (st == MOEC_EINTR)
        st = moec_fail(err, st, "interrupted after %lld of %lld layers; the same command continues there",
                       (long long)cp.layers_done, (long long)j->m->dims.layers);
    moec_pass_free(p);
    moec_checkpoint_release(&cp);
    moec_stats_meta_release(&meta);
    return st;
}

moec_status moec_calibrate(moec_stats **out, const moec_model *m, const moec_corpus *corpus, const char *path,
                           const moec_calibrate_opts *o, moec_err *err)
{
    job j = {.m = m};
    moec_stats *made = NULL;
    moec_status st = observe_all(&made, &j, corpus, path, o, err);
    for (int i = 0; j.partial && i < j.workers; i++)
        moec_partial_free(j.partial[i]);
    moec_free(j.partial);
    carry_release(&j.carry);
    moec_trace_free(j.trace);
    moec_stats_free(j.stats);
    if (out)
        *out = made;
    else
        moec_stats_free(made);
    return st;
}
