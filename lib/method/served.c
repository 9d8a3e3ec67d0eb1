/* See served.h. */
#include "method/served.h"

#include "base/mem.h"

#include <math.h>

void moec_served_release(moec_served *v)
{
    moec_free(v->expert);
    moec_free(v->share);
    moec_free(v->layer_lost);
    moec_free(v->lost);
    *v = (moec_served){0};
}

static double part(double of, double whole)
{
    return whole > 0.0 ? of / whole : (double)NAN;
}

/* Value e of SELECTED or GATE_SUM; a block that was not collected counts as nothing. */
static double selections(const void *block, int64_t e)
{
    return block ? (double)((const uint64_t *)block)[e] : 0.0;
}

static double gates(const void *block, int64_t e)
{
    return block ? ((const double *)block)[e] : 0.0;
}

typedef struct sums {
    double removed, all;
} sums;

/* Shares of one sum of a domain in a layer; row: where the layer's removed experts begin in out->share. */
static sums add_layer(moec_served *out, const moec_plan *p, const moec_stats *s, int64_t l, int d, int64_t row, bool gate)
{
    const void *block = moec_stat_at(s, d, gate ? MOEC_STAT_GATE_SUM : MOEC_STAT_SELECTED, l);
    double (*value)(const void *, int64_t) = gate ? gates : selections;
    sums t = {0.0, 0.0};
    for (int64_t e = 0; e < p->layer[l].n_experts; e++)
        t.all += value(block, e);
    for (int64_t i = row; i < out->n && out->expert[i].set == l; i++) {
        moec_share *share = &out->share[i * out->domains + d];
        const double v = value(block, out->expert[i].expert);
        t.removed += v;
        *(gate ? &share->gate : &share->selected) = part(v, t.all);
    }
    moec_share *lost = &out->layer_lost[l * out->domains + d];
    *(gate ? &lost->gate : &lost->selected) = part(t.removed, t.all);
    return t;
}

static void add_domain(moec_served *out, const moec_plan *p, const moec_stats *s, int d, bool gate)
{
    sums total = {0.0, 0.0};
    for (int64_t l = 0, row = 0; l < p->n_layers; l++) {
        const sums t = add_layer(out, p, s, l, d, row, gate);
        total.removed += t.removed;
        total.all += t.all;
        row += p->layer[l].n_experts - p->layer[l].n_keep;
    }
    *(gate ? &out->lost[d].gate : &out->lost[d].selected) = part(total.removed, total.all);
}

static void list_removed(moec_served *out, const moec_plan *p)
{
    int64_t i = 0;
    for (int64_t l = 0; l < p->n_layers; l++)
        for (int64_t e = 0; e < p->layer[l].n_experts; e++)
            if (moec_plan_kept(p, l, e) < 0)
                out->expert[i++] = (moec_served_expert){.set = l, .expert = (int32_t)e, .most = -1};
}

static void find_most(moec_served *out)
{
    for (int64_t i = 0; i < out->n; i++) {
        double best = 0.0;
        for (int d = 0; d < out->domains; d++)
            if (out->share[i * out->domains + d].selected > best) {
                best = out->share[i * out->domains + d].selected;
                out->expert[i].most = d;
            }
    }
}

moec_status moec_served_by(moec_served *out, const moec_plan *p, const moec_stats *s, moec_err *err)
{
    moec_status st = MOEC_OK;
    *out = (moec_served){.domains = s->n_domains, .layers = p->n_layers};
    for (int64_t l = 0; l < p->n_layers; l++) {
        if (p->n_layers != s->meta.moe_layers || p->layer[l].n_experts != s->meta.experts ||
            p->layer[l].layer != s->meta.moe_layer[l])
            return moec_fail(err, MOEC_EFORMAT, "the plan's layers and experts are not those of the statistics");
        out->n += p->layer[l].n_experts - p->layer[l].n_keep;
    }
    MOEC_TRY(MOEC_NEW(out->expert, (size_t)out->n, err));
    MOEC_TRY(MOEC_NEW(out->share, (size_t)out->n * (size_t)s->n_domains, err));
    MOEC_TRY(MOEC_NEW(out->layer_lost, (size_t)p->n_layers * (size_t)s->n_domains, err));
    MOEC_TRY(MOEC_NEW(out->lost, (size_t)s->n_domains, err));
    list_removed(out, p);
    for (int d = 0; d < s->n_domains; d++) {
        add_domain(out, p, s, d, false);
        add_domain(out, p, s, d, true);
    }
    find_most(out);
done:
    if (st != MOEC_OK)
        moec_served_release(out);
    return st;
}
