/* See gguf_measure.h. */
#include "run/gguf_measure_parts.h"

#include "base/mem.h"
#include "base/par.h"
#include "base/version.h"
#include "run/suffix.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { GROUP = 32, LEAST_GROUP = 8 };

const int moec__gguf_probe_bits[MOEC_PROBES] = MOEC_PROBE_BITS;

const moec_gguf_source *moec__gguf_source(const moec_gguf_measuring *u, size_t row)
{
    return &u->x->source[u->row[row].tensor];
}

moec_qgrid moec__gguf_probe(int64_t cols, int b)
{
    const int64_t group = moec_quant_group(GROUP, cols, LEAST_GROUP);
    return (moec_qgrid){.bits = moec__gguf_probe_bits[b], .group = group > 0 ? group : cols, .scale_type = MOEC_F32};
}

moec_status moec__gguf_probe_rows(float *w, int64_t rows, int64_t cols, int b, moec_err *err)
{
    const moec_qgrid grid = moec__gguf_probe(cols, b);
    moec_qcodes c = {0};
    moec_status st = moec_qcodes_new(&c, &grid, rows, cols, err);
    if (st == MOEC_OK)
        st = moec__measure_quantize(&c, w, err);
    if (st == MOEC_OK)
        moec_quant_restore(w, &c, 0, rows);
    moec_qcodes_release(&c);
    return st;
}

void moec__gguf_names(char name[64], char file[64], const char *what, int64_t unit)
{
    snprintf(name, 64, "%s.%lld", what, (long long)unit);
    snprintf(file, 64, "%s-%05lld.safetensors", strcmp(what, "kl") == 0 ? "set" : "layer", (long long)unit);
}

bool moec__gguf_done(const moec_gguf_measuring *u, int64_t unit, bool kl)
{
    char name[64], file[64];
    moec__gguf_names(name, file, kl ? "kl" : "error", unit);
    return u->rows[unit] == 0 || moec_override_has(u->work.weights, file);
}

/* --- which matrices ------------------------------------------------------------------------------------------------------ */

static bool same_place(const moec_weight *a, const moec_weight *b)
{
    return a->of && a->of == b->of && a->at == b->at;
}

/* The layer's matrix that is shown in place of this one: up has gate's input. */
static moec_mat shown(moec_mat k)
{
    return k == MOEC_MAT_SHARED_UP ? MOEC_MAT_SHARED_GATE : k == MOEC_MAT_DENSE_UP ? MOEC_MAT_DENSE_GATE : k;
}

/* Where the mean squares of a layer's matrix stand in those of its unit: matrices in the order of moec_mat. */
static int64_t square_at(const moec_layer *l, moec_mat which)
{
    int64_t at = 0;
    for (moec_mat k = 0; k < which; k++)
        at += l->mat[k].of ? l->mat[k].cols : 0;
    return at;
}

/* The unit of a source. */
static int64_t place(moec_gguf_row *r, const moec_model *m, const moec_gguf_source *s)
{
    r->mat = MOEC_MAT_COUNT;
    r->squares = -1;
    if (s->kind == MOEC_GGUF_STACK)
        return s->layer->index;
    for (int64_t l = 0; l < m->dims.layers; l++)
        for (moec_mat k = 0; k < MOEC_MAT_COUNT; k++)
            if (same_place(&m->layer[l].mat[k], &s->weight)) {
                r->mat = k;
                if (s->kind != MOEC_GGUF_KEY_B) /* that multiplies queries of one head, which are not shown */
                    r->squares = square_at(&m->layer[l], shown(k));
                return l;
            }
    r->head = s->weight.of != m->embedding.of;
    if (r->head || m->dims.tied)
        r->squares = 0;
    return m->dims.layers;
}

static bool is_measured(const moec_gguf_source *s)
{
    return s->what.type == MOEC_GGML_F16 && s->what.rank >= 2;
}

static moec_status list_rows(moec_gguf_measuring *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_model *m = u->m;
    const size_t units = (size_t)m->dims.layers + 1;
    MOEC_TRY(moec_gguf_model_new(&u->x, m, MOEC_GGML_F16, err));
    MOEC_TRY(MOEC_NEW(u->row, u->x->n, err));
    MOEC_TRY(MOEC_NEW(u->first, units, err));
    MOEC_TRY(MOEC_NEW(u->rows, units, err));
    MOEC_TRY(MOEC_NEW(u->squares, units, err));
    for (int64_t l = 0; l < m->dims.layers; l++)
        u->squares[l] = square_at(&m->layer[l], MOEC_MAT_COUNT);
    u->squares[m->dims.layers] = m->dims.hidden;
    for (size_t i = 0; i < u->x->n; i++) {
        const moec_gguf_source *s = &u->x->source[i];
        if (!is_measured(s))
            continue;
        moec_gguf_row *r = &u->row[u->n];
        r->tensor = i;
        const int64_t unit = place(r, m, s);
        if (u->rows[unit]++ == 0)
            u->first[unit] = u->n;
        u->n++;
        u->most_cols = s->what.dim[0] > u->most_cols ? s->what.dim[0] : u->most_cols;
    }
done:
    return st;
}

/* --- all of it ----------------------------------------------------------------------------------------------------------- */

static moec_status weigh_domains(moec_gguf_measuring *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    double all = 0.0;
    MOEC_TRY(MOEC_NEW(u->weight, (size_t)u->corpus->n_domains, err));
    for (int d = 0; d < u->corpus->n_domains; d++) {
        int at;
        MOEC_TRY(moec_stats_domain_find(&at, u->s, u->corpus->domain[d].name, err));
        u->weight[d] = moec_stats_weight(u->s, at);
        all += u->weight[d];
    }
    for (int d = 0; all <= 0.0 && d < u->corpus->n_domains; d++)
        u->weight[d] = 1.0;
done:
    return st;
}

/* Everything that decides the result. */
static moec_status open_work(moec_gguf_measuring *u, moec_err *err)
{
    moec_digest words, weights;
    const moec_stats *s = u->s;
    const bool in = s->domain[0].data[MOEC_STAT_XIN_SQ] != NULL, act = s->domain[0].data[MOEC_STAT_ACT_SQ] != NULL;
    const moec_status st = moec_corpus_digest(&words, u->corpus, err);
    if (st != MOEC_OK)
        return st;
    weights = moec_hash_bytes(u->weight, (size_t)u->corpus->n_domains * sizeof *u->weight);
    return moec_work_open(&u->work, u->o->work, u->o->resume, true, err, "gguf-measure 1 %s\n%s %s %s %d %lld\n%s %d %d\n%s",
                          moec_version(), s->meta.model, words.hex, weights.hex, (int)u->o->compute, (long long)u->o->tokens,
                          s->meta.compute, in, act, moec_ckpt_config_text(u->m->ckpt));
}

/* One unit's records into its rows. */
static moec_status take_unit(moec_sensitivity *to, const moec_gguf_measuring *u, int64_t unit, moec_err *err)
{
    moec_status st = MOEC_OK;
    char name[64], file[64];
    const int64_t n = (int64_t)u->rows[unit], error_dim[] = {n, MOEC_GGUF_ERRORS}, kl_dim[] = {n, MOEC_PROBES};
    const moec_tensor *square, *error, *kl = NULL;
    moec__gguf_names(name, file, "square", unit);
    MOEC_TRY(moec_override_get(&square, u->work.weights, name, MOEC_F64, 1, &u->squares[unit], err));
    moec__gguf_names(name, file, "error", unit);
    MOEC_TRY(moec_override_get(&error, u->work.weights, name, MOEC_F64, 2, error_dim, err));
    moec__gguf_names(name, file, "kl", unit);
    if (u->o->tokens > 0)
        MOEC_TRY(moec_override_get(&kl, u->work.weights, name, MOEC_F64, 2, kl_dim, err));
    for (int64_t i = 0; i < n; i++) {
        const size_t at = u->first[unit] + (size_t)i;
        const moec_gguf_tensor *t = &moec__gguf_source(u, at)->what;
        const double *e = (const double *)error->data + i * MOEC_GGUF_ERRORS;
        moec_sensitive *r = &to->at[at];
        MOEC_TRY(moec_copy(&r->name, t->name, strlen(t->name), err));
        r->cols = t->dim[0];
        memcpy(r->error, e, sizeof r->error);
        memcpy(r->probe, e + MOEC_BLOCK_COUNT, sizeof r->probe);
        if (kl)
            memcpy(r->kl, (const double *)kl->data + i * MOEC_PROBES, sizeof r->kl);
        if (u->row[at].squares < 0)
            continue;
        MOEC_TRY(MOEC_NEW(r->square, (size_t)r->cols, err));
        memcpy(r->square, (const double *)square->data + u->row[at].squares, (size_t)r->cols * sizeof *r->square);
    }
done:
    return st;
}

static moec_status fill(moec_stats *s, const moec_gguf_measuring *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_sensitivity *made = NULL;
    moec_corpus part = {0};
    MOEC_TRY(moec_sensitivity_new(&made, u->n, err));
    if (u->o->tokens > 0) {
        MOEC_TRY(moec_suffix_part(&part, u->corpus, u->o->tokens, err));
        for (int d = 0; d < part.n_domains; d++)
            made->tokens += (int64_t)moec_suffix_scored(&part.domain[d]);
    }
    for (int64_t unit = 0; unit <= u->m->dims.layers; unit++)
        if (u->rows[unit] > 0)
            MOEC_TRY(take_unit(made, u, unit, err));
    moec_sensitivity_free(s->sensitivity);
    s->sensitivity = made;
    made = NULL;
done:
    moec_free(part.domain);
    moec_sensitivity_free(made);
    return st;
}

static void release(moec_gguf_measuring *u)
{
    moec_gguf_importance_free(u->importance);
    moec_gguf_model_free(u->x);
    moec_free(u->weight);
    moec_free(u->row);
    moec_free(u->first);
    moec_free(u->rows);
    moec_free(u->squares);
}

moec_status moec_gguf_measure_fit(const moec_model *m, const moec_corpus *corpus, const moec_gguf_measure_opts *o, moec_err *err)
{
    moec_gguf_measuring u = {.m = m, .corpus = corpus, .o = o};
    if (o->tokens < 0)
        return moec_fail(err, MOEC_EINVAL, "measure: the tokens must not be negative");
    moec_status st = list_rows(&u, err);
    if (st == MOEC_OK && o->tokens > 0)
        st = moec__gguf_kl_fit(&u, err);
    release(&u);
    return st;
}

moec_status moec_gguf_measure(moec_stats *s, const moec_model *m, const moec_corpus *corpus, const moec_gguf_measure_opts *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_gguf_measuring u = {.m = m, .s = s, .corpus = corpus, .o = o};
    u.work.folder.lock = -1;
    if (o->tokens < 0)
        return moec_fail(err, MOEC_EINVAL, "measure: the tokens must not be negative");
    MOEC_TRY(moec__measure_same_text(s, m, corpus, err));
    MOEC_TRY(list_rows(&u, err));
    MOEC_TRY(weigh_domains(&u, err));
    MOEC_TRY(moec_gguf_importance_with(&u.importance, u.x, s, NULL, err));
    if (o->tokens > 0)
        MOEC_TRY(moec__gguf_kl_fit(&u, err));
    MOEC_TRY(open_work(&u, err));
    MOEC_TRY(moec__gguf_errors(&u, err));
    if (o->tokens > 0)
        MOEC_TRY(moec__gguf_kl(&u, err));
    MOEC_TRY(moec_ckpt_unchanged(m->ckpt, err));
    MOEC_TRY(fill(s, &u, err));
done:
    if (st != MOEC_OK)
        moec_work_abandon(&u.work);
    else
        moec_work_close(&u.work, true);
    release(&u);
    return st;
}
