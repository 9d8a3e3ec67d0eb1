/* Super experts: found in statistics, and shown; see moec_super. */
#include "method/method.h"

#include "base/mem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Linear interpolation between the two nearest ranks. `v` is ascending. */
static double percentile(const double *v, int64_t n, double percent)
{
    double at = percent / 100.0 * (double)(n - 1);
    int64_t lo = (int64_t)floor(at), hi = lo + 1 < n ? lo + 1 : lo;
    return v[lo] + (v[hi] - v[lo]) * (at - (double)lo);
}

/* A[l,e] over all domains. */
static moec_status fill_absmax(moec_super *f, const moec_stats *s, moec_err *err)
{
    for (int64_t i = 0; i < f->layers * f->experts; i++) {
        const int64_t l = i / f->experts, e = i % f->experts;
        for (int d = 0; d < s->n_domains; d++) {
            double v = (double)((const float *)moec_stat_at(s, d, MOEC_STAT_OUT_ABSMAX, l))[e];
            if (!isfinite(v))
                return moec_fail(err, MOEC_ENUMERIC, "layer %lld: largest output of expert %lld is not finite",
                                 (long long)s->meta.moe_layer[l], (long long)e);
            f->absmax[i] = v > f->absmax[i] ? v : f->absmax[i];
        }
    }
    return MOEC_OK;
}

moec_status moec_super_find(moec_super *out, const moec_stats *s, moec_err *err)
{
    moec_status st = MOEC_OK;
    double *sorted = NULL;
    *out = (moec_super){.layers = s->meta.moe_layers, .experts = s->meta.experts,
                        .below = (int64_t)rint(0.75 * (double)s->meta.layers)};
    const size_t cells = (size_t)(out->layers * out->experts);
    for (int d = 0; d < s->n_domains; d++)
        if (!s->domain[d].data[MOEC_STAT_OUT_ABSMAX])
            return moec_fail(err, MOEC_EFORMAT, "super experts need the statistic %s, which domain %s does not have",
                             moec_stat_kinds[MOEC_STAT_OUT_ABSMAX].name, s->domain[d].name);
    MOEC_TRY(MOEC_NEW(out->absmax, cells, err));
    MOEC_TRY(MOEC_NEW(out->flag, cells, err));
    MOEC_TRY(MOEC_NEW(sorted, cells, err));
    MOEC_TRY(fill_absmax(out, s, err));
    while (out->pool_layers < out->layers && s->meta.moe_layer[out->pool_layers] < out->below)
        out->pool_layers++;
    const int64_t n = out->pool_layers * out->experts;
    if (n == 0)
        goto done;
    memcpy(sorted, out->absmax, (size_t)n * sizeof *sorted);
    qsort(sorted, (size_t)n, sizeof *sorted, by_value);
    out->percentile = percentile(sorted, n, 99.5);
    out->tenth = sorted[n - 1] / 10.0;
    for (int64_t i = 0; i < n; i++) {
        out->flag[i] = out->absmax[i] > out->percentile && out->absmax[i] > out->tenth;
        out->count += out->flag[i];
    }
done:
    moec_free(sorted);
    if (st != MOEC_OK)
        moec_super_release(out);
    return st;
}

void moec_super_release(moec_super *s)
{
    moec_free(s->absmax);
    moec_free(s->flag);
    *s = (moec_super){0};
}

/* --- for people and programs ----------------------------------------------------------------------------------------- */

typedef struct entry {
    double absmax;
    int64_t at;
} entry;

static int by_absmax(const void *a, const void *b)
{
    const entry *x = a, *y = b;
    if (x->absmax != y->absmax)
        return x->absmax > y->absmax ? -1 : 1;
    return (x->at > y->at) - (x->at < y->at);
}

/* Channel of the largest output: that of the domain which has it, the first of several. */
static moec_json *channel_json(const moec_stats *s, const moec_super *f, int64_t at)
{
    const int64_t l = at / f->experts, e = at % f->experts;
    for (int d = 0; d < s->n_domains; d++) {
        const int32_t *channel = moec_stat_at(s, d, MOEC_STAT_OUT_CHANNEL, l);
        if (channel && (double)((const float *)moec_stat_at(s, d, MOEC_STAT_OUT_ABSMAX, l))[e] == f->absmax[at])
            return moec_json_new_int(channel[e]);
    }
    return moec_json_new_null();
}

static moec_json *entry_json(const moec_stats *s, const moec_super *f, int64_t at)
{
    moec_json *o = moec_json_new_object();
    moec_json_set(o, "layer", moec_json_new_int(s->meta.moe_layer[at / f->experts]));
    moec_json_set(o, "expert", moec_json_new_int(at % f->experts));
    moec_json_set(o, "abs_max", moec_json_new_real(f->absmax[at]));
    moec_json_set(o, "channel", channel_json(s, f, at));
    moec_json_set(o, "in_pool", moec_json_new_bool(at / f->experts < f->pool_layers));
    moec_json_set(o, "protected", moec_json_new_bool(f->flag[at]));
    return o;
}

moec_status moec_super_describe(moec_json **out, const moec_stats *s, int64_t top, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_super f = {0};
    entry *order = NULL;
    *out = NULL;
    MOEC_TRY(moec_super_find(&f, s, err));
    const int64_t n = f.layers * f.experts;
    MOEC_TRY(MOEC_NEW(order, (size_t)n, err));
    for (int64_t i = 0; i < n; i++)
        order[i] = (entry){f.absmax[i], i};
    qsort(order, (size_t)n, sizeof *order, by_absmax);
    moec_json *o = moec_json_new_object(), *list = moec_json_new_array();
    moec_json_set(o, "percentile_99_5", moec_json_new_real(f.percentile));
    moec_json_set(o, "tenth_of_max", moec_json_new_real(f.tenth));
    moec_json_set(o, "threshold", moec_json_new_real(f.percentile > f.tenth ? f.percentile : f.tenth));
    moec_json_set(o, "pool_layers", moec_json_new_int(f.pool_layers));
    moec_json_set(o, "layers_below", moec_json_new_int(f.below));
    moec_json_set(o, "super", moec_json_new_int(f.count));
    for (int64_t i = 0; i < n; i++)
        if (i < top || f.flag[order[i].at])
            moec_json_push(list, entry_json(s, &f, order[i].at));
    moec_json_set(o, "experts", list);
    *out = o;
done:
    moec_free(order);
    moec_super_release(&f);
    return st;
}
