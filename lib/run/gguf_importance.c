/* See gguf_importance.h. */
#include "run/gguf_importance.h"

#include "base/file.h"
#include "base/log.h"
#include "base/mem.h"
#include "run/gguf_parts.h"

#include <string.h>

/* MAPPED: bytes from which experts' means are in a file; STEP: of statistics that are fetched at once, of all domains. */
enum { MAPPED = 64 << 20, STEP = 16 << 20 };

typedef struct place {
    const float *at; /* NULL: 1 */
    int64_t rows;    /* that share `cols` of them; 0: all */
    int64_t cols;
} place;

struct moec_gguf_importance {
    place *tensor; /* [n] */
    size_t n;
    float *experts; /* what places of stacks point into; a mapped file where `mapped` */
    size_t n_experts, filled;
    int64_t n_of; /* experts of a layer */
    bool mapped;
    float **owned; /* what the others point into */
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

/* What one MoE layer's sums are worked on in. */
typedef struct bench {
    double *own;  /* [E,cols] weighted sums over domains */
    double *mean; /* [cols] */
    double *part; /* [D,step,cols] of the statistics */
    int64_t step; /* experts that are fetched at once */
} bench;

static int64_t step_of(const moec_stats *s, int64_t experts, int64_t cols)
{
    const int64_t n = STEP / (int64_t)sizeof(double) / s->n_domains / cols;
    return n < 1 ? 1 : n > experts ? experts : n;
}

/* own and the sum of it over experts, in the order of experts and for each of domains, however many are fetched at once. */
static moec_status add_all(bench *b, const sums *a, int64_t experts, moec_err *err)
{
    moec_status st = MOEC_OK;
    memset(b->mean, 0, (size_t)a->cols * sizeof *b->mean);
    memset(b->own, 0, (size_t)(experts * a->cols) * sizeof *b->own);
    for (int64_t lo = 0; lo < experts; lo += b->step) {
        const int64_t n = experts - lo < b->step ? experts - lo : b->step;
        MOEC_TRY(moec_interrupted(err));
        for (int d = 0; d < a->s->n_domains; d++)
            MOEC_TRY(moec_stats_fetch(b->part + d * b->step * a->cols, a->s, d, a->kind, a->l, lo, n, err));
        for (int64_t e = lo; e < lo + n; e++)
            for (int d = 0; d < a->s->n_domains; d++) {
                const double *cells = b->part + (d * b->step + e - lo) * a->cols, w = moec_stats_weight(a->s, d);
                double *own = b->own + e * a->cols;
                for (int64_t c = 0; c < a->cols; c++) {
                    own[c] += w * cells[c];
                    b->mean[c] += w * cells[c];
                }
            }
    }
done:
    return st;
}

/* out [E,cols]. */
static moec_status fill(float *out, bench *b, const sums *a, int64_t experts, moec_err *err)
{
    moec_status st = MOEC_OK;
    double all = 0.0, weighted, middle = 0.0, *mean = b->mean;
    MOEC_TRY(add_all(b, a, experts, err));
    for (int64_t e = 0; e < experts; e++) {
        (void)reached(&weighted, a, e);
        all += weighted;
    }
    for (int64_t c = 0; c < a->cols; c++) {
        mean[c] = all > 0.0 ? mean[c] / all : 1.0;
        middle += mean[c] / (double)a->cols;
    }
    for (int64_t c = 0; a->kind == MOEC_STAT_ACT_SQ && c < a->cols; c++)
        mean[c] = middle;
    for (int64_t e = 0; e < experts; e++) {
        const double n = reached(&weighted, a, e), own_share = n / (n + MOEC_GGUF_PRIOR), *own = b->own + e * a->cols;
        for (int64_t c = 0; c < a->cols; c++)
            out[e * a->cols + c] = (float)(weighted > 0.0 ? own_share * own[c] / weighted + (1.0 - own_share) * mean[c] : mean[c]);
    }
done:
    return st;
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
    return moec_stats_holds(s, kind) && moec_stats_holds(s, MOEC_STAT_SELECTED);
}

static moec_stat kind_of(const moec_gguf_source *t)
{
    return t->which == 2 ? MOEC_STAT_ACT_SQ : MOEC_STAT_XIN_SQ;
}

/* The gate of the layer whose up is tensor i: it has the same input; a bias may stand between. i: there is none, or this is no up. */
static size_t gate_of(const moec_gguf_model *x, size_t i)
{
    const moec_gguf_source *t = &x->source[i];
    for (size_t k = i; t->which == 1 && k-- > 0 && x->source[k].layer == t->layer;)
        if (x->source[k].kind == MOEC_GGUF_STACK && x->source[k].which == 0)
            return k;
    return i;
}

/* Means of all experts of the model, and of a layer's at most. */
static void count_experts(uint64_t *all, uint64_t *most, const moec_gguf_model *x, const moec_stats *s)
{
    *all = *most = 0;
    for (size_t i = 0; i < x->n; i++) {
        const moec_gguf_source *t = &x->source[i];
        if (t->kind != MOEC_GGUF_STACK || !collected(s, kind_of(t)) || gate_of(x, i) != i)
            continue;
        const uint64_t n = (uint64_t)x->m->dims.experts * (uint64_t)t->what.dim[0];
        *all += n;
        *most = n > *most ? n : *most;
    }
}

uint64_t moec_gguf_importance_memory(const moec_gguf_model *x, const moec_stats *s)
{
    uint64_t all, most, part = 0;
    count_experts(&all, &most, x, s);
    for (size_t i = 0; i < x->n; i++)
        if (x->source[i].kind == MOEC_GGUF_STACK && collected(s, kind_of(&x->source[i]))) {
            const int64_t cols = x->source[i].what.dim[0];
            const uint64_t n = (uint64_t)(step_of(s, x->m->dims.experts, cols) * cols * s->n_domains);
            part = n > part ? n : part;
        }
    return (most + part) * sizeof(double) + (all * sizeof(float) < MAPPED ? all : most) * sizeof(float);
}

static moec_status new_experts(moec_gguf_importance *p, const moec_gguf_model *x, const moec_stats *s, moec_err *err)
{
    uint64_t all, most;
    count_experts(&all, &most, x, s);
    p->n_experts = (size_t)all;
    p->n_of = x->m->dims.experts;
    p->mapped = all * sizeof(float) >= MAPPED;
    return p->mapped ? moec_file_scratch((void **)&p->experts, (size_t)all * sizeof(float), "what experts' columns weigh", err)
                     : MOEC_NEW(p->experts, (size_t)all, err);
}

static void drop(const moec_gguf_importance *p, const float *at, int64_t n)
{
    if (p->mapped)
        moec_pages_drop(at, (size_t)n * sizeof *at);
}

static moec_status of_experts(moec_gguf_importance *p, const moec_gguf_model *x, size_t i, const moec_stats *s, moec_err *err)
{
    const moec_gguf_source *t = &x->source[i];
    const int64_t E = x->m->dims.experts;
    const sums a = {s, kind_of(t), t->layer->moe_index, t->what.dim[0]};
    bench b = {.step = 0};
    moec_status st = MOEC_OK;
    if (!collected(s, a.kind))
        return MOEC_OK;
    p->tensor[i] = (place){.rows = t->what.dim[1], .cols = a.cols};
    if (gate_of(x, i) != i) {
        p->tensor[i].at = p->tensor[gate_of(x, i)].at;
        return MOEC_OK;
    }
    float *made = p->experts + p->filled;
    p->filled += (size_t)(E * a.cols);
    b.step = step_of(s, E, a.cols);
    MOEC_TRY(MOEC_NEW(b.own, (size_t)(E * a.cols), err));
    MOEC_TRY(MOEC_NEW(b.mean, (size_t)a.cols, err));
    MOEC_TRY(MOEC_NEW(b.part, (size_t)(s->n_domains * b.step * a.cols), err));
    MOEC_TRY(fill(made, &b, &a, E, err));
    drop(p, p->experts, (int64_t)p->n_experts);
    p->tensor[i].at = made;
done:
    moec_free(b.part);
    moec_free(b.mean);
    moec_free(b.own);
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
    MOEC_TRY(new_experts(p, x, s, err));
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
    if (p->mapped)
        moec_file_scratch_free(p->experts, p->n_experts * sizeof *p->experts);
    else
        moec_free(p->experts);
    moec_free(p->owned);
    moec_free(p->tensor);
    moec_free(p);
}

const float *moec_gguf_importance_row(const moec_gguf_importance *p, size_t tensor, int64_t row)
{
    const place *t = &p->tensor[tensor];
    return t->at && t->rows > 0 ? t->at + row / t->rows * t->cols : t->at;
}

void moec_gguf_importance_drop(const moec_gguf_importance *p, size_t tensor, int64_t hi)
{
    const place *t = &p->tensor[tensor];
    if (t->at && t->rows > 0 && hi == t->rows * p->n_of)
        drop(p, p->experts, (int64_t)p->n_experts);
}

int64_t moec_gguf_importance_unseen(const moec_gguf_importance *p)
{
    return p->unseen;
}
