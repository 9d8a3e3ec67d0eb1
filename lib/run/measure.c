/* See measure.h. */
#include "run/measure_parts.h"

#include "base/file.h"
#include "base/mem.h"
#include "base/par.h"
#include "base/version.h"
#include "num/vec.h"
#include "run/selected.h"

#include <stdio.h>
#include <string.h>

enum { B = MOEC_QUANT_WIDTHS, PARTS = MOEC_MEASURE_PARTS, LEAST_GROUP = 8 };

const int moec__measure_width[MOEC_QUANT_WIDTHS] = MOEC_QUANT_WIDTH_LIST;

/* --- a matrix ---------------------------------------------------------------------------------------------------------- */

moec_qgrid moec__measure_grid(const moec_measuring *u, int k, int bits)
{
    const int64_t cols = k == 2 ? u->m->dims.expert_width : u->m->dims.hidden;
    const int64_t group = u->o->group > 0 ? moec_quant_group(u->o->group, cols, LEAST_GROUP) : 0;
    return (moec_qgrid){.bits = bits, .group = group > 0 ? group : cols, .scale_type = MOEC_F32};
}

moec_status moec__measure_quantize(moec_qcodes *c, const float *w, moec_err *err)
{
    moec_status st = moec_quant_range(c, w, MOEC_QRANGE_CLIP, NULL, 0, c->rows, err);
    if (st == MOEC_OK)
        moec_quant_nearest(c, w, 0, c->rows);
    return st;
}

/* --- records ------------------------------------------------------------------------------------------------------------ */

static void layer_names(char sq[64], char fro[64], char file[64], int64_t moe_layer)
{
    snprintf(sq, 64, "quant_sq.%lld", (long long)moe_layer);
    snprintf(fro, 64, "quant_fro.%lld", (long long)moe_layer);
    snprintf(file, 64, "layer-%05lld.safetensors", (long long)moe_layer);
}

void moec__measure_gain_name(char name[64], char file[64], int64_t moe_layer)
{
    snprintf(name, 64, "quant_kl.%lld", (long long)moe_layer);
    snprintf(file, 64, "set-%05lld.safetensors", (long long)moe_layer);
}

static size_t cells_of(const moec_measured *v)
{
    size_t n = 1;
    for (int i = 0; i < v->rank; i++)
        n *= (size_t)v->dim[i];
    return n;
}

moec_status moec__measure_record(moec_override *to, const char *file, const moec_measured *v, size_t n, moec_err *err)
{
    moec_tensor t[2] = {{.name = NULL}};
    moec_sheet *sheet = NULL;
    for (size_t i = 0; i < n; i++) {
        t[i] = (moec_tensor){.name = v[i].name, .dtype = MOEC_F64, .rank = v[i].rank, .bytes = cells_of(&v[i]) * sizeof(double)};
        memcpy(t[i].dim, v[i].dim, sizeof v[i].dim);
    }
    moec_status st = moec_sheet_new(&sheet, to, file, t, n, err);
    if (st != MOEC_OK)
        return st;
    for (size_t i = 0; i < n; i++)
        memcpy((void *)(uintptr_t)moec_sheet_at(sheet, i)->data, v[i].data, t[i].bytes); /* a sheet's data may be written */
    return moec_sheet_commit(sheet, to, err);
}

/* --- tokens ------------------------------------------------------------------------------------------------------------- */

static moec_status see(void *ctx, int worker, const moec_chunk *c, const moec_moe_view *v, moec_err *err)
{
    moec_measuring *u = ctx;
    const int64_t H = u->m->dims.hidden;
    (void)worker;
    (void)err;
    memcpy(u->x + c->token * H, v->x, (size_t)(v->n * H) * sizeof *u->x);
    memcpy(u->ids + c->token * u->slots, v->ids, (size_t)(v->n * u->slots) * sizeof *u->ids);
    memcpy(u->gates + c->token * u->slots, v->gates, (size_t)(v->n * u->slots) * sizeof *u->gates);
    return MOEC_OK;
}

/* 1 / mean square of the states behind the layer, one chunk of tokens. */
static moec_status weigh(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    enum { ROWS = 256 };
    moec_measuring *u = ctx;
    const int64_t H = u->m->dims.hidden;
    float *h;
    (void)worker;
    moec_status st = MOEC_NEW(h, (size_t)(ROWS * H), err);
    for (int64_t at = lo; st == MOEC_OK && at < hi; at += ROWS) {
        const int64_t n = hi - at < ROWS ? hi - at : ROWS;
        st = moec_hidden_read(h, u->pass->hidden, at, n, err);
        for (int64_t i = 0; st == MOEC_OK && i < n; i++)
            u->weight[at + i] = (float)((double)H / (moec_sum_sq(h + i * H, H) + 1e-30));
    }
    moec_free(h);
    return st;
}

static void number_windows(moec_measuring *u)
{
    int64_t at = 0;
    int32_t number = 0;
    for (int d = 0; d < u->corpus->n_domains; d++) {
        const moec_domain *dom = &u->corpus->domain[d];
        for (int64_t w = 0; w < dom->n_windows; w++, number++) {
            u->domain[number] = d;
            for (int64_t t = dom->start[w]; t < dom->start[w + 1]; t++)
                u->window[at++] = number;
        }
    }
}

/* --- a layer ------------------------------------------------------------------------------------------------------------ */

static bool layer_done(const moec_measuring *u, int64_t layer)
{
    char sq[64], fro[64], file[64];
    layer_names(sq, fro, file, u->m->layer[layer].moe_index);
    return !u->m->layer[layer].expert || moec_override_has(u->work.weights, file);
}

static moec_status measure_layer(moec_measuring *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t E = u->m->dims.experts, D = u->corpus->n_domains;
    char sq[64], fro[64], file[64];
    layer_names(sq, fro, file, u->l->moe_index);
    memset(u->sq, 0, (size_t)(D * E * PARTS * B) * sizeof *u->sq);
    memset(u->fro, 0, (size_t)(D * E * B) * sizeof *u->fro);
    moec__selected_sort(u->first, u->token, u->gate, u->ids, u->gates, u->n, u->slots, E);
    MOEC_TRY(moec_par_for(u->n, 4096, weigh, u, err));
    MOEC_TRY(moec_par_for(E, 1, moec__measure_experts, u, err));
    const moec_measured v[] = {{sq, u->sq, 4, {D, E, PARTS, B}}, {fro, u->fro, 3, {D, E, B}}};
    st = moec__measure_record(u->work.weights, file, v, 2, err);
done:
    return st;
}

static moec_status run_layer(moec_measuring *u, int64_t layer, moec_err *err)
{
    const bool done = layer_done(u, layer);
    u->l = &u->m->layer[layer];
    moec_status st = moec_pass_layer(u->pass, layer, done ? NULL : see, NULL, u, err);
    if (done && u->l->expert)
        moec_progress_step(&u->progress, (uint64_t)u->m->dims.experts);
    return st == MOEC_OK && !done ? measure_layer(u, err) : st;
}

/* --- the pass ----------------------------------------------------------------------------------------------------------- */

static size_t own_bytes(const moec_measuring *u, int threads)
{
    const size_t n = (size_t)u->n, H = (size_t)u->m->dims.hidden, D = (size_t)u->corpus->n_domains;
    const size_t cells = D * (size_t)u->m->dims.experts * (PARTS + 1) * B;
    return (n * H + 4 * n * (size_t)u->slots + 2 * n) * sizeof(float) + cells * sizeof(double) +
           (size_t)threads * moec__measure_bytes(u);
}

/* Threads that measure experts: as many as have room beside the smallest pass. */
static int choose_threads(const moec_measuring *u, moec_pass_opts *o)
{
    int threads = moec_par_threads();
    moec_pass_plan plan;
    for (;; threads = (threads + 1) / 2) {
        o->fixed_bytes = own_bytes(u, threads);
        if (threads <= 1 || moec_pass_estimate(&plan, u->m, u->n, moec_pass_max_seq(u->corpus), o, NULL) == MOEC_OK)
            return threads < 1 ? 1 : threads;
    }
}

static moec_status make_room(moec_measuring *u, int *threads, moec_err *err)
{
    moec_status st = MOEC_OK;
    const size_t n = (size_t)u->n, E = (size_t)u->m->dims.experts, D = (size_t)u->corpus->n_domains;
    const size_t picks = n * (size_t)u->slots;
    size_t windows = 0;
    moec_pass_opts o = {.compute = u->o->compute, .watch = true, .max_memory = u->o->max_memory, .what = "measure"};
    for (size_t d = 0; d < D; d++)
        windows += (size_t)u->corpus->domain[d].n_windows;
    *threads = choose_threads(u, &o);
    MOEC_TRY(moec_pass_new(&u->pass, u->m, u->corpus, &o, err));
    MOEC_TRY(MOEC_NEW(u->x, n * (size_t)u->m->dims.hidden, err));
    MOEC_TRY(MOEC_NEW(u->ids, picks, err));
    MOEC_TRY(MOEC_NEW(u->gates, picks, err));
    MOEC_TRY(MOEC_NEW(u->token, picks, err));
    MOEC_TRY(MOEC_NEW(u->gate, picks, err));
    MOEC_TRY(MOEC_NEW(u->weight, n, err));
    MOEC_TRY(MOEC_NEW(u->window, n, err));
    MOEC_TRY(MOEC_NEW(u->domain, windows, err));
    MOEC_TRY(MOEC_NEW(u->first, E + 1, err));
    MOEC_TRY(MOEC_NEW(u->sq, D * E * PARTS * B, err));
    MOEC_TRY(MOEC_NEW(u->fro, D * E * B, err));
    number_windows(u);
done:
    return st;
}

static void release_room(moec_measuring *u)
{
    moec_progress_stop(&u->progress);
    moec_pass_free(u->pass);
    moec_free(u->x);
    moec_free(u->ids);
    moec_free(u->gates);
    moec_free(u->token);
    moec_free(u->gate);
    moec_free(u->weight);
    moec_free(u->window);
    moec_free(u->domain);
    moec_free(u->first);
    moec_free(u->sq);
    moec_free(u->fro);
    u->pass = NULL;
}

static moec_status measure_errors(moec_measuring *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    int64_t layers = 0; /* up to the last that is not done */
    int threads = 1;
    const int had = moec_par_threads();
    for (int64_t l = 0; l < u->m->dims.layers; l++)
        layers = layer_done(u, l) ? layers : l + 1;
    if (layers == 0)
        return MOEC_OK;
    MOEC_TRY(make_room(u, &threads, err));
    moec_progress_start(&u->progress, "measure", "experts", (uint64_t)(u->m->moe_layers * u->m->dims.experts), 0);
    moec_par_set_threads(threads);
    st = moec_pass_embed(u->pass, err);
    for (int64_t l = 0; st == MOEC_OK && l < layers; l++)
        st = moec_work_interrupted(run_layer(u, l, err), "errors", l, u->m->dims.layers, err);
    moec_par_set_threads(had);
    if (st == MOEC_OK)
        moec_progress_finish(&u->progress);
done:
    release_room(u);
    return st;
}

/* --- all of it ---------------------------------------------------------------------------------------------------------- */

/* The domain of the statistics that is domain d of the corpus. */
static moec_status find_domain(int *out, const moec_stats *s, const moec_corpus *corpus, int d, moec_err *err)
{
    const moec_corpus one = {1, corpus->domain + d};
    moec_digest digest;
    moec_status st = moec_stats_domain_find(out, s, corpus->domain[d].name, err);
    if (st == MOEC_OK)
        st = moec_corpus_digest(&digest, &one, err);
    if (st == MOEC_OK && strcmp(digest.hex, s->domain[*out].digest) != 0)
        st = moec_fail(err, MOEC_EINVAL, "text %s: is other text, or cut otherwise, than that of the statistics; give the same --text, "
                       "--seq-len, --max-windows and --tokens as then", corpus->domain[d].name);
    return st;
}

moec_status moec__measure_same_text(const moec_stats *s, const moec_model *m, const moec_corpus *corpus, moec_err *err)
{
    moec_status st = MOEC_OK;
    int at;
    if (moec_corpus_tokens(corpus) > INT32_MAX)
        return moec_fail(err, MOEC_EINVAL, "measure: more than 2^31 tokens");
    if (corpus->n_domains != s->n_domains)
        return moec_fail(err, MOEC_EINVAL, "measure: %d texts, the statistics have %d; give the same --text as then",
                         corpus->n_domains, s->n_domains);
    MOEC_TRY(moec_stats_check(s, m, err));
    for (int d = 0; d < corpus->n_domains; d++)
        MOEC_TRY(find_domain(&at, s, corpus, d, err));
done:
    return st;
}

/* Everything that decides the result. */
static moec_status open_work(moec_measuring *u, const moec_stats *s, moec_err *err)
{
    moec_digest words;
    const moec_status st = moec_corpus_digest(&words, u->corpus, err);
    if (st != MOEC_OK)
        return st;
    return moec_work_open(&u->work, u->o->work, u->o->resume, true, err, "measure 2 %s\n%s %s %d %d %lld %lld\n%s", moec_version(),
                          s->meta.model, words.hex, (int)u->o->compute, MOEC_MEASURE_BLOCK, (long long)u->o->group,
                          (long long)u->o->gain_tokens, moec_ckpt_config_text(u->m->ckpt));
}

/* One layer's records into block l of every domain. */
static moec_status take_layer(moec_stats *s, const moec_measuring *u, int64_t l, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t E = u->m->dims.experts, D = u->corpus->n_domains;
    char sq_name[64], fro_name[64], kl_name[64], file[64];
    const int64_t sq_dim[] = {D, E, PARTS, B}, fro_dim[] = {D, E, B}, kl_dim[] = {D};
    const moec_tensor *sq, *fro, *kl = NULL;
    layer_names(sq_name, fro_name, file, l);
    moec__measure_gain_name(kl_name, file, l);
    MOEC_TRY(moec_override_get(&sq, u->work.weights, sq_name, MOEC_F64, 4, sq_dim, err));
    MOEC_TRY(moec_override_get(&fro, u->work.weights, fro_name, MOEC_F64, 3, fro_dim, err));
    if (u->o->gains)
        MOEC_TRY(moec_override_get(&kl, u->work.weights, kl_name, MOEC_F64, 1, kl_dim, err));
    for (int d = 0; s && d < D; d++) {
        int to;
        MOEC_TRY(moec_stats_domain_find(&to, s, u->corpus->domain[d].name, err));
        const size_t sq_bytes = (size_t)(E * PARTS * B) * sizeof(double), fro_bytes = (size_t)(E * B) * sizeof(double);
        memcpy(moec_stat_at(s, to, MOEC_STAT_QUANT_SQ, l), (const char *)sq->data + (size_t)d * sq_bytes, sq_bytes);
        memcpy(moec_stat_at(s, to, MOEC_STAT_QUANT_FRO, l), (const char *)fro->data + (size_t)d * fro_bytes, fro_bytes);
        if (kl)
            memcpy(moec_stat_at(s, to, MOEC_STAT_QUANT_KL, l), (const char *)kl->data + (size_t)d * sizeof(double), sizeof(double));
    }
done:
    return st;
}

static moec_status fill(moec_stats *s, const moec_measuring *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    const bool same = moec_stats_quant_group(s) == u->o->group;
    for (int64_t l = 0; l < u->m->moe_layers; l++) /* before anything of s changes */
        MOEC_TRY(take_layer(NULL, u, l, err));
    MOEC_TRY(moec_stats_set_quant_group(s, u->o->group, err));
    MOEC_TRY(moec_stats_collect(s, MOEC_STAT_QUANT_SQ, err));
    MOEC_TRY(moec_stats_collect(s, MOEC_STAT_QUANT_FRO, err));
    if (u->o->gains)
        MOEC_TRY(moec_stats_collect(s, MOEC_STAT_QUANT_KL, err));
    else if (!same)
        moec_stats_forget(s, MOEC_STAT_QUANT_KL);
    for (int64_t l = 0; l < u->m->moe_layers; l++)
        MOEC_TRY(take_layer(s, u, l, err));
done:
    return st;
}

moec_status moec_measure(moec_stats *s, const moec_model *m, const moec_corpus *corpus, const moec_measure_opts *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_measuring u = {.m = m, .corpus = corpus, .o = o, .n = moec_corpus_tokens(corpus), .slots = m->dims.slots};
    u.work.folder.lock = -1;
    if (o->group < 0 || o->gain_tokens < 0)
        return moec_fail(err, MOEC_EINVAL, "measure: the group and the gains' tokens must not be negative");
    MOEC_TRY(moec__measure_same_text(s, m, corpus, err));
    if (o->gains)
        MOEC_TRY(moec__measure_gains_fit(&u, err));
    MOEC_TRY(open_work(&u, s, err));
    MOEC_TRY(measure_errors(&u, err));
    if (o->gains)
        MOEC_TRY(moec__measure_gains(&u, err));
    MOEC_TRY(moec_ckpt_unchanged(m->ckpt, err));
    MOEC_TRY(fill(s, &u, err));
done:
    if (st != MOEC_OK)
        moec_work_abandon(&u.work);
    else
        moec_work_close(&u.work, true);
    return st;
}
