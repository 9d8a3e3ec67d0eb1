/* See gguf_importance.h. */
#include "run/gguf_importance.h"

#include "base/mem.h"
#include "run/gguf_parts.h"

#include <string.h>

typedef struct place {
    const float *at; /* NULL: 1 */
    int64_t rows;    /* that share `cols` of them; 0: all */
    int64_t cols;
} place;

struct moec_gguf_importance {
    place *tensor; /* [n] */
    size_t n;
    float **owned; /* what places point into */
    size_t n_owned, cap;
    int64_t unseen;
};

/* --- experts --------------------------------------------------------------------------------------------------------- */

/* Sums of one kind over the experts of a MoE layer. */
typedef struct sums {
    const moec_stats *s;
    moec_stat kind;
    int64_t l, cols;
} sums;

/* Tokens that reached expert e: as many as there were, and weighted. */
static double reached(double *weighted, const sums *a, int64_t e)
{
    double n = 0.0;
    *weighted = 0.0;
    for (int d = 0; d < a->s->n_domains; d++) {
        const uint64_t *cells = moec_stat_at(a->s, d, MOEC_STAT_SELECTED, a->l);
        const double w = moec_stats_weight(a->s, d), k = cells ? (double)cells[e] : 0.0;
        n += w > 0.0 ? k : 0.0;
        *weighted += w * k;
    }
    return n;
}

static void add(double *sum, const sums *a, int64_t e)
{
    for (int d = 0; d < a->s->n_domains; d++) {
        const double *cells = moec_stat_at(a->s, d, a->kind, a->l), w = moec_stats_weight(a->s, d);
        for (int64_t c = 0; c < a->cols; c++)
            sum[c] += w * cells[e * a->cols + c];
    }
}

/* out [E,cols]; mean and own: [cols] of scratch. */
static void fill(float *out, double *mean, double *own, const sums *a, int64_t experts)
{
    double all = 0.0, weighted, middle = 0.0;
    memset(mean, 0, (size_t)a->cols * sizeof *mean);
    for (int64_t e = 0; e < experts; e++) {
        (void)reached(&weighted, a, e);
        all += weighted;
        add(mean, a, e);
    }
    for (int64_t c = 0; c < a->cols; c++) {
        mean[c] = all > 0.0 ? mean[c] / all : 1.0;
        middle += mean[c] / (double)a->cols;
    }
    for (int64_t c = 0; a->kind == MOEC_STAT_ACT_SQ && c < a->cols; c++)
        mean[c] = middle;
    for (int64_t e = 0; e < experts; e++) {
        const double n = reached(&weighted, a, e), own_share = n / (n + MOEC_GGUF_PRIOR);
        memset(own, 0, (size_t)a->cols * sizeof *own);
        add(own, a, e);
        for (int64_t c = 0; c < a->cols; c++)
            out[e * a->cols + c] = (float)(weighted > 0.0 ? own_share * own[c] / weighted + (1.0 - own_share) * mean[c] : mean[c]);
    }
}

static moec_status own(float **out, moec_gguf_importance *p, size_t n, moec_err *err)
{
    moec_status st = MOEC_OK;
    MOEC_TRY(MOEC_GROW(p->owned, p->cap, p->n_owned + 1, err));
    MOEC_TRY(MOEC_NEW(*out, n, err));
    p->owned[p->n_owned++] = *out;
done:
    return st;
}

static bool collected(const moec_stats *s, moec_stat kind)
{
    bool all = s->n_domains > 0;
    for (int d = 0; d < s->n_domains; d++)
        all = all && s->domain[d].data[kind] && s->domain[d].data[MOEC_STAT_SELECTED];
    return all;
}

static moec_status of_experts(moec_gguf_importance *p, const moec_gguf_model *x, size_t i, const moec_stats *s, moec_err *err)
{
    const moec_gguf_source *t = &x->source[i];
    const int64_t E = x->m->dims.experts;
    const sums a = {s, t->which == 2 ? MOEC_STAT_ACT_SQ : MOEC_STAT_XIN_SQ, t->layer->moe_index, t->what.dim[0]};
    double *scratch = NULL;
    float *made = NULL;
    moec_status st = MOEC_OK;
    if (!collected(s, a.kind))
        return MOEC_OK;
    p->tensor[i] = (place){.rows = t->what.dim[1], .cols = a.cols};
    for (size_t k = i; t->which == 1 && k-- > 0 && x->source[k].layer == t->layer;) /* up has gate's input; a bias may stand between */
        if (x->source[k].kind == MOEC_GGUF_STACK && x->source[k].which == 0) {
            p->tensor[i].at = p->tensor[k].at;
            return MOEC_OK;
        }
    MOEC_TRY(own(&made, p, (size_t)(E * a.cols), err));
    MOEC_TRY(MOEC_NEW(scratch, 2 * (size_t)a.cols, err));
    fill(made, scratch, scratch + a.cols, &a, E);
    p->tensor[i].at = made;
done:
    moec_free(scratch);
    return st;
}

/* --- the others ------------------------------------------------------------------------------------------------------ */

static moec_status of_matrix(moec_gguf_importance *p, const moec_gguf_model *x, size_t i, const moec_sensitivity *other, moec_err *err)
{
    const moec_gguf_tensor *t = &x->source[i].what;
    const moec_sensitive *row = other ? moec_sensitivity_find(other, t->name) : NULL;
    float *made = NULL;
    if (!row || !row->square)
        return MOEC_OK;
    if (row->cols != t->dim[0])
        return moec_fail(err, MOEC_EFORMAT, "statistics of another model: %s has %lld columns, the model's has %lld", t->name,
                         (long long)row->cols, (long long)t->dim[0]);
    const moec_status st = own(&made, p, (size_t)row->cols, err);
    for (int64_t c = 0; st == MOEC_OK && c < row->cols; c++)
        made[c] = (float)row->square[c];
    p->tensor[i] = (place){.at = made, .cols = row->cols};
    return st;
}

static moec_status check(const moec_gguf_model *x, const moec_stats *s, moec_err *err)
{
    const moec_dims *d = &x->m->dims;
    const moec_stats_meta *m = &s->meta;
    return m->experts == d->experts && m->hidden == d->hidden && m->expert_width == d->expert_width && m->moe_layers == x->m->moe_layers
               ? MOEC_OK
               : moec_fail(err, MOEC_EFORMAT, "statistics of another model: experts, their number or sizes are others");
}

static void count_unseen(moec_gguf_importance *p, const moec_stats *s)
{
    double weighted;
    for (int64_t l = 0; collected(s, MOEC_STAT_SELECTED) && l < s->meta.moe_layers; l++) {
        const sums a = {.s = s, .l = l};
        for (int64_t e = 0; e < s->meta.experts; e++)
            p->unseen += reached(&weighted, &a, e) <= 0.0;
    }
}

moec_status moec_gguf_importance_with(moec_gguf_importance **out, const moec_gguf_model *x, const moec_stats *s,
                                      const moec_sensitivity *other, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_gguf_importance *p = NULL;
    *out = NULL;
    MOEC_TRY(check(x, s, err));
    MOEC_TRY(MOEC_NEW(p, 1, err));
    p->n = x->n;
    MOEC_TRY(MOEC_NEW(p->tensor, x->n, err));
    for (size_t i = 0; i < x->n; i++)
        MOEC_TRY(x->source[i].kind == MOEC_GGUF_STACK ? of_experts(p, x, i, s, err) : of_matrix(p, x, i, other, err));
    count_unseen(p, s);
    *out = p;
    p = NULL;
done:
    moec_gguf_importance_free(p);
    return st;
}

moec_status moec_gguf_importance_new(moec_gguf_importance **out, const moec_gguf_model *x, const moec_stats *s, moec_err *err)
{
    return moec_gguf_importance_with(out, x, s, s->sensitivity, err);
}

void moec_gguf_importance_free(moec_gguf_importance *p)
{
    if (!p)
        return;
    for (size_t i = 0; i < p->n_owned; i++)
        moec_free(p->owned[i]);
    moec_free(p->owned);
    moec_free(p->tensor);
    moec_free(p);
}

const float *moec_gguf_importance_row(const moec_gguf_importance *p, size_t tensor, int64_t row)
{
    const place *t = &p->tensor[tensor];
    return t->at && t->rows > 0 ? t->at + row / t->rows * t->cols : t->at;
}

int64_t moec_gguf_importance_unseen(const moec_gguf_importance *p)
{
    return p->unseen;
}
