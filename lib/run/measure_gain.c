/* What it costs the model's output when the experts of one layer have 2 bits, layer by layer. The original runs once to its end; then
 * once more, and at each MoE layer a second model, equal but for this layer's experts, takes over its states and goes on alone. */
#include "run/measure_parts.h"

#include "base/mem.h"
#include "base/par.h"
#include "calib/eval.h"
#include "calib/final.h"
#include "model/variant.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { BITS = 2 };

typedef struct gains {
    moec_measuring *u;
    const moec_model *m;
    moec_corpus part;       /* the windows that are run; domains are the corpus's but for their number of windows */
    moec_final *original;
    moec_pass *pass;        /* the original's, again */
    const moec_layer *l;
    const moec_mlp *expert; /* [E] of the layer in 2 bits: where they are written */
} gains;

/* --- which text --------------------------------------------------------------------------------------------------------- */

static moec_status choose_windows(gains *g, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_corpus *c = g->u->corpus;
    const double tokens = (double)moec_corpus_tokens(c), most = (double)g->u->o->gain_tokens;
    const double share = most > 0.0 && most < tokens ? most / tokens : 1.0;
    MOEC_TRY(MOEC_NEW(g->part.domain, (size_t)c->n_domains, err));
    g->part.n_domains = c->n_domains;
    for (int d = 0; d < c->n_domains; d++) {
        moec_domain *dom = &g->part.domain[d];
        *dom = c->domain[d];
        dom->n_windows = (int64_t)ceil(share * (double)dom->n_windows);
        dom->n_ids = dom->start[dom->n_windows] - dom->start[0];
    }
done:
    return st;
}

/* Tokens that predict something: all but the first of each window. */
static double scored(const moec_domain *d)
{
    return (double)(d->start[d->n_windows] - d->start[0] - d->n_windows);
}

/* --- the layer in few bits ---------------------------------------------------------------------------------------------- */

static moec_status write_matrix(const gains *g, const moec_weight *to, const moec_weight *from, int k, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_qgrid grid = moec__measure_grid(g->u, k, BITS);
    moec_qcodes c = {0};
    float *w = NULL;
    MOEC_TRY(MOEC_NEW(w, (size_t)(from->rows * from->cols), err));
    MOEC_TRY(moec_weight_read_all(w, from, err));
    moec_weight_drop(from);
    MOEC_TRY(moec_qcodes_new(&c, &grid, from->rows, from->cols, err));
    MOEC_TRY(moec__measure_quantize(&c, w, err));
    moec_quant_restore(w, &c, 0, c.rows);
    MOEC_TRY(moec_weight_write(to, w, to->cols, 0, to->rows, 0, to->cols, err));
    moec_weight_drop(to);
done:
    moec_free(w);
    moec_qcodes_release(&c);
    return st;
}

static moec_status quantize_experts(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const gains *g = ctx;
    moec_status st = MOEC_OK;
    (void)worker;
    for (int64_t e = lo; e < hi; e++) {
        const moec_mlp *to = &g->expert[e], *from = &g->l->expert[e];
        MOEC_TRY(moec_interrupted(err));
        MOEC_TRY(write_matrix(g, &to->gate, &from->gate, 0, err));
        MOEC_TRY(write_matrix(g, &to->up, &from->up, 1, err));
        MOEC_TRY(write_matrix(g, &to->down, &from->down, 2, err));
    }
done:
    return st == MOEC_OK ? st : moec_within(err, st, "layer %lld: expert %lld", (long long)g->l->index, (long long)lo);
}

/* A file for a whole layer's experts in float32, which memory need not hold, and the variant that has them. */
static moec_status quantize_layer(moec_variant **out, moec_sheet **sheet, gains *g, const char *file, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t E = g->m->dims.experts, H = g->m->dims.hidden, I = g->m->dims.expert_width;
    static const char *const name[] = {"gate", "up", "down"};
    moec_tensor t[3];
    *out = NULL;
    *sheet = NULL;
    for (int k = 0; k < 3; k++) {
        t[k] = (moec_tensor){.name = name[k], .dtype = MOEC_F32, .rank = 3, .dim = {E, k == 2 ? H : I, k == 2 ? I : H},
                             .bytes = (size_t)(E * H * I) * sizeof(float)};
    }
    MOEC_TRY(moec_sheet_new(sheet, g->u->work.weights, file, t, 3, err));
    MOEC_TRY(moec_variant_new(out, g->m, err));
    moec_mlp *x = (*out)->model.layer[g->l->index].expert;
    for (int64_t e = 0; e < E; e++) {
        moec_weight *const w[] = {&x[e].gate, &x[e].up, &x[e].down};
        for (int k = 0; k < 3; k++)
            *w[k] = (moec_weight){.of = moec_sheet_at(*sheet, (size_t)k), .rows = t[k].dim[1], .cols = t[k].dim[2], .at = e * H * I,
                                  .row_step = t[k].dim[2], .col_step = 1, .storage = MOEC_PLAIN};
    }
    g->expert = x;
    st = moec_par_for(E, 1, quantize_experts, g, err);
done:
    return st;
}

/* --- its cost ----------------------------------------------------------------------------------------------------------- */

/* States of the original in front of the layer. Both passes have the same chunks. */
static moec_status copy_states(moec_pass *to, const moec_pass *from, moec_err *err)
{
    moec_status st = MOEC_OK;
    const size_t carried = (size_t)from->m->dims.carried;
    for (int64_t i = 0; i < from->n_chunks; i++) {
        const moec_chunk *c = &from->chunk[i];
        float *old, *new;
        MOEC_TRY(moec_hidden_get(&old, from->hidden, 0, c->token, c->n, false, err));
        MOEC_TRY(moec_hidden_get(&new, to->hidden, 0, c->token, c->n, true, err));
        const float *beside = moec_hidden_beside(from->hidden, 0, c->token);
        memcpy(new, old, (size_t)(c->n * from->m->dims.hidden) * sizeof *new);
        if (beside)
            memcpy(moec_hidden_beside(to->hidden, 0, c->token), beside, (size_t)c->n * carried * sizeof *beside);
        MOEC_TRY(moec_hidden_put(to->hidden, 0, c->token, c->n, err));
    }
    moec_hidden_turn(to->hidden);
done:
    return st;
}

static moec_status record(const gains *g, const moec_scores *s, int64_t moe_layer, moec_err *err)
{
    double *kl;
    char name[64], file[64];
    const int n = g->part.n_domains;
    moec_status st = MOEC_NEW(kl, (size_t)n, err);
    moec__measure_gain_name(name, file, moe_layer);
    for (int d = 0; st == MOEC_OK && d < n; d++) /* rounding may take a mean just below 0 */
        kl[d] = fmax(s->domain[d].kl, 0.0) * scored(&g->u->corpus->domain[d]);
    const moec_measured v = {name, kl, 1, {n}};
    if (st == MOEC_OK)
        st = moec__measure_record(g->u, file, &v, 1, err);
    moec_free(kl);
    return st;
}

static moec_status measure_layer(gains *g, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_variant *v = NULL;
    moec_sheet *sheet = NULL;
    moec_pass *pass = NULL;
    moec_final *made = NULL;
    moec_scores scores = {0};
    char name[64], file[64];
    const moec_pass_opts o = {.compute = g->u->o->compute, .max_memory = g->u->o->max_memory, .what = "gains",
                              .fixed_bytes = moec__score_bytes(g->m->dims.hidden, g->pass->n_tokens, g->u->o->compute)};
    moec__measure_gain_name(name, file, g->l->moe_index);
    MOEC_TRY(quantize_layer(&v, &sheet, g, file, err));
    MOEC_TRY(moec_pass_new(&pass, &v->model, &g->part, &o, err));
    MOEC_TRY(copy_states(pass, g->pass, err));
    for (int64_t l = g->l->index; l < g->m->dims.layers; l++)
        MOEC_TRY(moec_pass_layer(pass, l, NULL, NULL, NULL, err));
    MOEC_TRY(moec__final_lend(&made, pass, err));
    MOEC_TRY(moec_score(&scores, made, g->original, &g->part, g->u->o->compute, g->u->o->max_memory, err));
    moec_sheet_discard(sheet); /* its name is the record's */
    sheet = NULL;
    st = record(g, &scores, g->l->moe_index, err);
done:
    moec_scores_release(&scores);
    moec_final_free(made);
    moec_pass_free(pass);
    moec_variant_free(v);
    moec_sheet_discard(sheet);
    return st;
}

/* --- all of them -------------------------------------------------------------------------------------------------------- */

static bool layer_done(const moec_measuring *u, int64_t layer)
{
    char name[64], file[64];
    moec__measure_gain_name(name, file, u->m->layer[layer].moe_index);
    return !u->m->layer[layer].expert || moec_override_has(u->work.weights, file);
}

/* What a layer's second pass takes at least beside the first. */
static size_t second_bytes(const gains *g)
{
    const size_t H = (size_t)g->m->dims.hidden, I = (size_t)g->m->dims.expert_width;
    const int64_t tokens = moec_corpus_tokens(&g->part);
    moec_pass_plan plan;
    moec_pass_opts o = {.compute = g->u->o->compute, .max_memory = 1}; /* nothing fits that: the smallest arrangement comes back */
    const uint64_t resident = moec_resident_memory();
    const moec_status st = moec_pass_estimate(&plan, g->m, tokens, moec_pass_max_seq(&g->part), &o, NULL);
    const size_t least = st == MOEC_ENOFIT && plan.bytes > resident ? (size_t)(plan.bytes - resident) : 0;
    return least + moec__score_bytes((int64_t)H, tokens, g->u->o->compute) + 3 * H * I * sizeof(float); /* an expert as it is run */
}

/* Of the original's second run. */
static moec_pass_opts first_opts(const gains *g)
{
    const moec_measure_opts *o = g->u->o;
    return (moec_pass_opts){.compute = o->compute, .max_memory = o->max_memory, .what = "gains",
                            .fixed_bytes = o->max_memory ? second_bytes(g) : 0};
}

moec_status moec__measure_gains_fit(moec_measuring *u, moec_err *err)
{
    gains g = {.u = u, .m = u->m};
    moec_pass_plan plan;
    moec_status st = choose_windows(&g, err);
    if (st == MOEC_OK) {
        const int64_t tokens = moec_corpus_tokens(&g.part);
        moec_pass_opts o = first_opts(&g);
        o.fixed_bytes += (size_t)tokens * (size_t)u->m->dims.hidden * sizeof(float); /* of the original; on disk if need be */
        st = moec_pass_estimate(&plan, u->m, tokens, moec_pass_max_seq(&g.part), &o, err);
    }
    moec_free(g.part.domain);
    return st;
}

static moec_status run(gains *g, int64_t layers, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_measuring *u = g->u;
    const moec_measure_opts *o = u->o;
    MOEC_TRY(moec_final_run_before(&g->original, g->m, g->m, &g->part, o->compute, o->max_memory, "original", err));
    const moec_pass_opts po = first_opts(g);
    MOEC_TRY(moec_pass_new(&g->pass, g->m, &g->part, &po, err));
    MOEC_TRY(moec_pass_embed(g->pass, err));
    for (int64_t l = 0; l < layers; l++) {
        g->l = &g->m->layer[l];
        st = layer_done(u, l) ? MOEC_OK : measure_layer(g, err);
        if (g->l->expert)
            moec_note("gains: layer %lld is done", (long long)l);
        if (st == MOEC_OK && l + 1 < layers)
            st = moec_pass_layer(g->pass, l, NULL, NULL, NULL, err);
        if (st == MOEC_EINTR)
            st = moec_fail(err, st, "interrupted while measuring gains, after %lld of %lld layers; the same command continues there",
                           (long long)l, (long long)g->m->dims.layers);
        MOEC_TRY(st);
    }
done:
    return st;
}

moec_status moec__measure_gains(moec_measuring *u, moec_err *err)
{
    gains g = {.u = u, .m = u->m};
    int64_t layers = 0; /* up to the last that is not done */
    for (int64_t l = 0; l < u->m->dims.layers; l++)
        layers = layer_done(u, l) ? layers : l + 1;
    moec_status st = layers > 0 ? choose_windows(&g, err) : MOEC_OK;
    if (st == MOEC_OK && layers > 0)
        st = run(&g, layers, err);
    moec_pass_free(g.pass);
    moec_final_free(g.original);
    moec_free(g.part.domain);
    return st;
}
