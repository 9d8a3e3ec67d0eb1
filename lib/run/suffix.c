/* See suffix.h. */
#include "run/suffix.h"

#include "base/mem.h"
#include "calib/final.h"

#include <math.h>
#include <string.h>

moec_status moec_suffix_part(moec_corpus *out, const moec_corpus *c, int64_t most, moec_err *err)
{
    moec_status st = MOEC_OK;
    const double tokens = (double)moec_corpus_tokens(c);
    const double share = most > 0 && (double)most < tokens ? (double)most / tokens : 1.0;
    *out = (moec_corpus){0};
    MOEC_TRY(MOEC_NEW(out->domain, (size_t)c->n_domains, err));
    out->n_domains = c->n_domains;
    for (int d = 0; d < c->n_domains; d++) {
        moec_domain *dom = &out->domain[d];
        *dom = c->domain[d];
        dom->n_windows = (int64_t)ceil(share * (double)dom->n_windows);
        dom->n_ids = dom->start[dom->n_windows] - dom->start[0];
    }
done:
    return st;
}

double moec_suffix_scored(const moec_domain *d)
{
    return (double)(d->start[d->n_windows] - d->start[0] - d->n_windows);
}

/* --- memory ------------------------------------------------------------------------------------------------------------- */

/* What variants take at least beside the second run. */
static size_t second_bytes(const moec_suffix *s)
{
    const int64_t tokens = moec_corpus_tokens(s->text);
    moec_pass_plan plan;
    moec_pass_opts o = {.compute = s->compute, .max_memory = 1}; /* nothing fits that: the smallest arrangement comes back */
    const uint64_t resident = moec_resident_memory();
    const moec_status st = moec_pass_estimate(&plan, s->m, tokens, moec_pass_max_seq(s->text), &o, NULL);
    const size_t least = st == MOEC_ENOFIT && plan.bytes > resident ? (size_t)(plan.bytes - resident) : 0;
    return least + moec__score_bytes(s->m->dims.hidden, tokens, s->compute) + s->maker_bytes;
}

/* Of the second run. */
static moec_pass_opts second_opts(const moec_suffix *s)
{
    return (moec_pass_opts){.compute = s->compute, .max_memory = s->max_memory, .what = s->what,
                            .fixed_bytes = s->max_memory ? second_bytes(s) : 0};
}

moec_status moec_suffix_fit(const moec_suffix *s, moec_err *err)
{
    const int64_t tokens = moec_corpus_tokens(s->text);
    moec_pass_plan plan;
    moec_pass_opts o = second_opts(s);
    o.fixed_bytes += (size_t)tokens * (size_t)s->m->dims.hidden * sizeof(float); /* of the original; on disk if need be */
    return moec_pass_estimate(&plan, s->m, tokens, moec_pass_max_seq(s->text), &o, err);
}

/* What n variants that go on together take besides one, whose making comes before the rest. */
static size_t more_bytes(const moec_suffix *s, int n)
{
    const moec_dims *d = &s->m->dims;
    const size_t one = moec_hidden_bytes(moec_corpus_tokens(s->text), d->hidden, d->carried, false, 1, 0);
    return n > 1 ? (size_t)(n - 1) * one + s->maker_bytes : 0;
}

/* How many of n variants go on together: as many as have room for their states in memory; one always has. */
static int together(const moec_suffix *s, const moec_pass_opts *one, int n)
{
    const int64_t tokens = moec_corpus_tokens(s->text);
    moec_pass_plan plan;
    for (; n > 1; n = (n + 1) / 2) {
        moec_pass_opts o = *one;
        o.fixed_bytes += more_bytes(s, n);
        if (moec_pass_estimate(&plan, s->m, tokens, moec_pass_max_seq(s->text), &o, NULL) == MOEC_OK && plan.bytes <= plan.limit &&
            !plan.on_disk)
            break;
    }
    return n;
}

/* --- both runs of the original ------------------------------------------------------------------------------------------ */

moec_status moec_suffix_begin(moec_suffix *s, moec_err *err)
{
    moec_status st = MOEC_OK;
    MOEC_TRY(moec_final_run_before(&s->original, s->m, s->m, s->text, s->compute, s->max_memory, "original", err));
    const moec_pass_opts o = second_opts(s);
    MOEC_TRY(moec_pass_new(&s->pass, s->m, s->text, &o, err));
    MOEC_TRY(moec_pass_embed(s->pass, err));
done:
    return st;
}

moec_status moec_suffix_step(moec_suffix *s, int64_t layer, moec_err *err)
{
    return moec_pass_layer(s->pass, layer, NULL, NULL, NULL, err);
}

void moec_suffix_end(moec_suffix *s)
{
    moec_pass_free(s->pass);
    moec_final_free(s->original);
    s->pass = NULL;
    s->original = NULL;
}

/* --- variants ----------------------------------------------------------------------------------------------------------- */

/* Those that go on together. */
typedef struct set {
    moec_suffix *s;
    moec_variant *variant;  /* one for all: equal to the model but while a variant's own layer runs */
    moec_pass *pass;        /* of it */
    moec_hidden **states;   /* [n] the first is the pass's */
    moec_weight *head;      /* [n] */
    int n;
} set;

/* Back to what the model is. */
static void reset(moec_variant *v, const moec_model *m, int64_t at)
{
    v->model.embedding = m->embedding;
    v->model.head = m->head;
    if (at < 0 || at >= m->dims.layers)
        return;
    moec_mlp *expert = v->model.layer[at].expert;
    v->model.layer[at] = m->layer[at];
    v->model.layer[at].expert = expert;
    if (expert)
        memcpy(expert, m->layer[at].expert, (size_t)m->dims.experts * sizeof *expert);
}

/* States of the original in front of the layer. All passes have the same chunks. */
static moec_status copy_states(moec_hidden *to, const moec_pass *from, moec_err *err)
{
    moec_status st = MOEC_OK;
    const size_t carried = (size_t)from->m->dims.carried;
    for (int64_t i = 0; i < from->n_chunks; i++) {
        const moec_chunk *c = &from->chunk[i];
        float *old, *new;
        MOEC_TRY(moec_hidden_get(&old, from->hidden, 0, c->token, c->n, false, err));
        MOEC_TRY(moec_hidden_get(&new, to, 0, c->token, c->n, true, err));
        const float *beside = moec_hidden_beside(from->hidden, 0, c->token);
        memcpy(new, old, (size_t)(c->n * from->m->dims.hidden) * sizeof *new);
        if (beside)
            memcpy(moec_hidden_beside(to, 0, c->token), beside, (size_t)c->n * carried * sizeof *beside);
        MOEC_TRY(moec_hidden_put(to, 0, c->token, c->n, err));
    }
    moec_hidden_turn(to);
done:
    return st;
}

static void step(const set *g, int n)
{
    if (g->s->progress)
        moec_progress_step(g->s->progress, (uint64_t)(n * g->pass->n_tokens));
}

/* Variant i, whose weights are in place, through the layer that is its own. */
static moec_status run_own(set *g, int i, int64_t at, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_pass *p = g->pass;
    moec_hidden *own = p->hidden;
    p->hidden = g->states[i]; /* as if it were the pass's */
    MOEC_TRY(at == MOEC_SUFFIX_EMBED ? moec_pass_embed(p, err) : copy_states(p->hidden, g->s->pass, err));
    if (at >= 0)
        MOEC_TRY(moec_pass_layer(p, at, NULL, NULL, NULL, err));
    step(g, at >= 0);
done:
    p->hidden = own;
    return st;
}

/* KL of variant i to kl [domains]; states NULL: the original's. */
static moec_status score(double *kl, const set *g, moec_hidden *states, const moec_weight *head, moec_err *err)
{
    const moec_suffix *s = g->s;
    moec_scores scores = {0};
    moec_final made = *s->original;
    made.head = *head;
    made.quiet = s->progress != NULL;
    if (states) {
        made.store = states;
        made.workers = g->pass->plan.workers;
        made.max_tokens = g->pass->max_tokens;
    }
    const moec_status st = moec_score(&scores, &made, s->original, s->text, s->compute, s->max_memory, err);
    for (int d = 0; st == MOEC_OK && d < s->text->n_domains; d++) /* rounding may take a mean just below 0 */
        kl[d] = fmax(scores.domain[d].kl, 0.0);
    moec_scores_release(&scores);
    return st;
}

static moec_status make_room(set *g, const moec_pass_opts *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_dims *d = &g->s->m->dims;
    MOEC_TRY(moec_pass_new(&g->pass, &g->variant->model, g->s->text, o, err));
    g->states[0] = g->pass->hidden;
    for (int i = 1; i < g->n; i++)
        MOEC_TRY(moec_hidden_new(&g->states[i], g->pass->n_tokens, d->hidden, d->carried, NULL, false, g->pass->plan.workers,
                                 g->pass->max_tokens, err));
done:
    return st;
}

/* Variants [first, first + n). */
static moec_status run_set(double *kl, set *g, int first, int n, int64_t at, moec_suffix_fn *make, void *ctx, const moec_pass_opts *o,
                           moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_model *m = g->s->m;
    const int domains = g->s->text->n_domains;
    for (int i = 0; i < n; i++) {
        reset(g->variant, m, at);
        MOEC_TRY(make(ctx, g->variant, first + i, err));
        if (!g->pass) /* behind the first, whose making takes memory of its own */
            MOEC_TRY(make_room(g, o, err));
        g->head[i] = g->variant->model.head;
        MOEC_TRY(run_own(g, i, at, err));
    }
    reset(g->variant, m, at);
    for (int64_t l = at + 1; l < m->dims.layers; l++) {
        MOEC_TRY(moec_pass_layer_of(g->pass, l, g->states, n, err));
        step(g, n);
    }
    for (int i = 0; i < n; i++)
        MOEC_TRY(score(kl + (first + i) * domains, g, g->states[i], &g->head[i], err));
done:
    return st;
}

/* The head alone. */
static moec_status run_heads(double *kl, set *g, int n, int64_t at, moec_suffix_fn *make, void *ctx, moec_err *err)
{
    moec_status st = MOEC_OK;
    for (int i = 0; i < n; i++) {
        reset(g->variant, g->s->m, at);
        MOEC_TRY(make(ctx, g->variant, i, err));
        MOEC_TRY(score(kl + i * g->s->text->n_domains, g, NULL, &g->variant->model.head, err));
    }
done:
    return st;
}

moec_status moec_suffix_run(double *kl, moec_suffix *s, int64_t at, int n, moec_suffix_fn *make, void *ctx, moec_err *err)
{
    moec_status st = MOEC_OK;
    set g = {.s = s};
    moec_pass_opts o = {.compute = s->compute, .max_memory = s->max_memory, .what = s->what,
                        .fixed_bytes = moec__score_bytes(s->m->dims.hidden, moec_corpus_tokens(s->text), s->compute)};
    MOEC_TRY(moec_variant_new(&g.variant, s->m, err));
    if (at == s->m->dims.layers) {
        st = run_heads(kl, &g, n, at, make, ctx, err);
        goto done;
    }
    g.n = together(s, &o, n);
    MOEC_TRY(MOEC_NEW(g.states, (size_t)g.n, err));
    MOEC_TRY(MOEC_NEW(g.head, (size_t)g.n, err));
    o.fixed_bytes += more_bytes(s, g.n);
    for (int first = 0; first < n; first += g.n)
        MOEC_TRY(run_set(kl, &g, first, n - first < g.n ? n - first : g.n, at, make, ctx, &o, err));
done:
    for (int i = 1; g.states && i < g.n; i++)
        moec_hidden_free(g.states[i]);
    moec_free(g.states);
    moec_free(g.head);
    moec_pass_free(g.pass);
    moec_variant_free(g.variant);
    return st;
}
