/* What it costs the model's output when the experts of one layer have 2 bits, layer by layer. */
#include "run/measure_parts.h"

#include "base/mem.h"
#include "base/par.h"
#include "run/suffix.h"

#include <stdio.h>
#include <string.h>

enum { BITS = 2 };

typedef struct gains {
    moec_measuring *u;
    const moec_model *m;
    moec_corpus part;       /* the windows that are run; domains are the corpus's but for their number of windows */
    moec_suffix suffix;
    const moec_layer *l;
    const moec_mlp *expert; /* [E] of the layer in 2 bits: where they are written */
    moec_sheet *sheet;      /* what they lie in */
} gains;

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
static moec_status quantize_layer(void *ctx, moec_variant *v, int number, moec_err *err)
{
    gains *g = ctx;
    moec_status st = MOEC_OK;
    const int64_t E = g->m->dims.experts, H = g->m->dims.hidden, I = g->m->dims.expert_width;
    static const char *const name[] = {"gate", "up", "down"};
    char record[64], file[64];
    moec_tensor t[3];
    (void)number; /* there is one */
    for (int k = 0; k < 3; k++) {
        t[k] = (moec_tensor){.name = name[k], .dtype = MOEC_F32, .rank = 3, .dim = {E, k == 2 ? H : I, k == 2 ? I : H},
                             .bytes = (size_t)(E * H * I) * sizeof(float)};
    }
    moec__measure_gain_name(record, file, g->l->moe_index);
    MOEC_TRY(moec_sheet_new(&g->sheet, g->u->work.weights, file, t, 3, err));
    moec_mlp *x = v->model.layer[g->l->index].expert;
    for (int64_t e = 0; e < E; e++) {
        moec_weight *const w[] = {&x[e].gate, &x[e].up, &x[e].down};
        for (int k = 0; k < 3; k++)
            *w[k] = (moec_weight){.of = moec_sheet_at(g->sheet, (size_t)k), .rows = t[k].dim[1], .cols = t[k].dim[2], .at = e * H * I,
                                  .row_step = t[k].dim[2], .col_step = 1, .storage = MOEC_PLAIN};
    }
    g->expert = x;
    st = moec_par_for(E, 1, quantize_experts, g, err);
done:
    return st;
}

/* --- its cost ----------------------------------------------------------------------------------------------------------- */

static moec_status measure_layer(gains *g, moec_err *err)
{
    moec_status st = MOEC_OK;
    double *kl;
    char name[64], file[64];
    const int n = g->part.n_domains;
    MOEC_TRY(MOEC_NEW(kl, (size_t)n, err));
    st = moec_suffix_run(kl, &g->suffix, g->l->index, 1, quantize_layer, g, err);
    moec_sheet_discard(g->sheet); /* its name is the record's */
    g->sheet = NULL;
    for (int d = 0; st == MOEC_OK && d < n; d++)
        kl[d] *= moec_suffix_scored(&g->u->corpus->domain[d]);
    moec__measure_gain_name(name, file, g->l->moe_index);
    const moec_measured v = {name, kl, 1, {n}};
    if (st == MOEC_OK)
        st = moec__measure_record(g->u->work.weights, file, &v, 1, err);
    moec_free(kl);
done:
    return st;
}

/* --- all of them -------------------------------------------------------------------------------------------------------- */

static bool layer_done(const moec_measuring *u, int64_t layer)
{
    char name[64], file[64];
    moec__measure_gain_name(name, file, u->m->layer[layer].moe_index);
    return !u->m->layer[layer].expert || moec_override_has(u->work.weights, file);
}

static moec_status prepare(gains *g, moec_err *err)
{
    const moec_measure_opts *o = g->u->o;
    const size_t H = (size_t)g->m->dims.hidden, I = (size_t)g->m->dims.expert_width;
    g->suffix = (moec_suffix){.m = g->m, .text = &g->part, .compute = o->compute, .max_memory = o->max_memory, .what = "gains",
                              .maker_bytes = 3 * H * I * sizeof(float)}; /* an expert as it is run */
    return moec_suffix_part(&g->part, g->u->corpus, o->gain_tokens, err);
}

moec_status moec__measure_gains_fit(moec_measuring *u, moec_err *err)
{
    gains g = {.u = u, .m = u->m};
    moec_status st = prepare(&g, err);
    if (st == MOEC_OK)
        st = moec_suffix_fit(&g.suffix, err);
    moec_free(g.part.domain);
    return st;
}

static moec_status run(gains *g, int64_t layers, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_measuring *u = g->u;
    MOEC_TRY(moec_suffix_begin(&g->suffix, err));
    for (int64_t l = 0; l < layers; l++) {
        g->l = &g->m->layer[l];
        st = layer_done(u, l) ? MOEC_OK : measure_layer(g, err);
        if (g->l->expert)
            moec_note("gains: layer %lld is done", (long long)l);
        if (st == MOEC_OK && l + 1 < layers)
            st = moec_suffix_step(&g->suffix, l, err);
        MOEC_TRY(moec_work_interrupted(st, "gains", l, g->m->dims.layers, err));
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
    moec_status st = layers > 0 ? prepare(&g, err) : MOEC_OK;
    if (st == MOEC_OK && layers > 0)
        st = run(&g, layers, err);
    moec_suffix_end(&g.suffix);
    moec_free(g.part.domain);
    return st;
}
