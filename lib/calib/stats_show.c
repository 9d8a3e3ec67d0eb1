/* Statistics as JSON for people: how much of each expert the calibration text has seen, and how evenly. */
#include "base/mem.h"
#include "calib/stats_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { TOP = 5 };

/* Tokens of every expert of every layer, in one domain or in all. */
typedef struct coverage {
    const moec_stats_meta *meta;
    uint64_t floor;
    uint64_t *tokens; /* [L,E] */
    uint64_t *sorted; /* [E] scratch */
} coverage;

static int by_value(const void *a, const void *b)
{
    const uint64_t *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

static moec_json *json_count(uint64_t v)
{
    return moec_json_new_int(v > INT64_MAX ? INT64_MAX : (int64_t)v);
}

/* The TOP most selected experts, the lowest id first on ties; `count` is a scratch copy. */
static moec_json *top_experts(uint64_t *count, int64_t n, double total)
{
    moec_json *list = moec_json_new_array();
    for (int i = 0; i < TOP && i < n; i++) {
        int64_t best = 0;
        for (int64_t e = 1; e < n; e++)
            if (count[e] > count[best])
                best = e;
        if (count[best] == 0)
            break;
        moec_json *one = moec_json_new_object();
        moec_json_set(one, "expert", moec_json_new_int(best));
        moec_json_set(one, "share", moec_json_new_real((double)count[best] / total));
        moec_json_push(list, one);
        count[best] = 0;
    }
    return list;
}

static moec_json *layer_row(const coverage *c, int64_t l)
{
    int64_t n = c->meta->experts, below = 0, never = 0;
    const uint64_t *t = c->tokens + l * n;
    double total = 0, sq = 0, entropy = 0;
    for (int64_t e = 0; e < n; e++) {
        total += (double)t[e];
        below += t[e] < c->floor;
        never += t[e] == 0;
    }
    double mean = total / (double)n;
    for (int64_t e = 0; e < n; e++) {
        double share = total > 0 ? (double)t[e] / total : 0, off = (double)t[e] - mean;
        sq += off * off;
        entropy -= share > 0 ? share * log(share) : 0;
    }
    memcpy(c->sorted, t, (size_t)n * sizeof *t);
    qsort(c->sorted, (size_t)n, sizeof *t, by_value);
    uint64_t low_mid = c->sorted[(n - 1) / 2], high_mid = c->sorted[n / 2];
    moec_json *row = moec_json_new_object();
    moec_json_set(row, "layer", moec_json_new_int(c->meta->moe_layer[l]));
    moec_json_set(row, "min", json_count(c->sorted[0]));
    moec_json_set(row, "median", moec_json_new_real(((double)low_mid + (double)high_mid) / 2));
    moec_json_set(row, "max", json_count(c->sorted[n - 1]));
    moec_json_set(row, "below_floor", moec_json_new_int(below));
    moec_json_set(row, "never", moec_json_new_int(never));
    /* NAN becomes null. A single expert is as even as can be. */
    double even = n > 1 ? entropy / log((double)n) : 1;
    moec_json_set(row, "cv", moec_json_new_real(total > 0 ? sqrt(sq / (double)n) / mean : (double)NAN));
    moec_json_set(row, "entropy", moec_json_new_real(total > 0 ? even : (double)NAN));
    memcpy(c->sorted, t, (size_t)n * sizeof *t);
    moec_json_set(row, "top", top_experts(c->sorted, n, total));
    return row;
}

static moec_json *expert_entry(const coverage *c, int64_t at, bool with_tokens)
{
    moec_json *one = moec_json_new_object();
    moec_json_set(one, "layer", moec_json_new_int(c->meta->moe_layer[at / c->meta->experts]));
    moec_json_set(one, "expert", moec_json_new_int(at % c->meta->experts));
    if (with_tokens)
        moec_json_set(one, "tokens", json_count(c->tokens[at]));
    return one;
}

static moec_json *coverage_json(const coverage *c)
{
    int64_t n = c->meta->moe_layers * c->meta->experts, below = 0, never = 0;
    uint64_t least = UINT64_MAX;
    moec_json *o = moec_json_new_object(), *low = moec_json_new_array(), *none = moec_json_new_array();
    for (int64_t i = 0; i < n; i++) {
        least = c->tokens[i] < least ? c->tokens[i] : least;
        if (c->tokens[i] < c->floor) {
            below++;
            moec_json_push(low, expert_entry(c, i, true));
        }
        if (c->tokens[i] == 0) {
            never++;
            moec_json_push(none, expert_entry(c, i, false));
        }
    }
    moec_json_set(o, "experts", moec_json_new_int(n));
    moec_json_set(o, "floor", json_count(c->floor));
    moec_json_set(o, "below_floor", moec_json_new_int(below));
    moec_json_set(o, "never", moec_json_new_int(never));
    moec_json_set(o, "min", json_count(least));
    moec_json_set(o, "below_floor_experts", low);
    moec_json_set(o, "never_experts", none);
    return o;
}

static void put_coverage(moec_json *o, const coverage *c)
{
    moec_json *layers = moec_json_new_array();
    for (int64_t l = 0; l < c->meta->moe_layers; l++)
        moec_json_push(layers, layer_row(c, l));
    moec_json_set(o, "coverage", coverage_json(c));
    moec_json_set(o, "layers", layers);
}

/* A JSON text as a value; statistics hold only texts that parse. */
static moec_json *embedded(const char *text)
{
    moec_json *v;
    return moec_json_parse(&v, text, strlen(text), "options", NULL) == MOEC_OK ? v : moec_json_new_string(text);
}

static moec_json *meta_json(const moec_stats_meta *m)
{
    moec_json *o = moec_json_new_object(), *moe = moec_json_new_array();
    moec_json_set(o, "model", moec_json_new_string(m->model));
    moec_json_set(o, "model_type", moec_json_new_string(m->model_type));
    moec_json_set(o, "router_rule", embedded(m->router_rule));
    moec_json_set(o, "options", embedded(m->options));
    moec_json_set(o, "compute", moec_json_new_string(m->compute));
    for (int i = 0; i < MOEC_SIZE_ROWS; i++) {
        int64_t v = *(const int64_t *)(const void *)((const char *)m + moec__size_rows[i].offset);
        moec_json_set(o, moec__size_rows[i].name, moec_json_new_int(v));
    }
    for (int64_t l = 0; l < m->moe_layers; l++)
        moec_json_push(moe, moec_json_new_int(m->moe_layer[l]));
    moec_json_set(o, "moe_layer", moe);
    moec_json_set(o, "tier", moec_json_new_int(m->tier));
    return o;
}

static moec_json *domain_json(const coverage *c, const moec_stats_domain *d, bool selected)
{
    moec_json *o = moec_json_new_object();
    moec_json_set(o, "name", moec_json_new_string(d->name));
    moec_json_set(o, "tokens", json_count(d->tokens));
    moec_json_set(o, "sequences", json_count(d->sequences));
    moec_json_set(o, "weight", moec_json_new_real(d->weight));
    moec_json_set(o, "digest", moec_json_new_string(d->digest));
    if (selected)
        put_coverage(o, c);
    return o;
}

static moec_status put_betas(moec_json *o, const moec_stats *s, moec_err *err)
{
    const int64_t each = s->meta.top_k - 1;
    double *beta = NULL;
    moec_status st = MOEC_NEW(beta, (size_t)(s->meta.moe_layers * each), err);
    if (st == MOEC_OK)
        st = moec_stats_betas(beta, s, err);
    moec_json *layers = moec_json_new_array();
    for (int64_t l = 0; st == MOEC_OK && l < s->meta.moe_layers; l++)
        moec_json_push(layers, moec_json_new_reals(beta + l * each, each));
    moec_json_set(o, "betas", layers);
    moec_free(beta);
    return st;
}

moec_status moec_stats_describe(moec_json **out, const moec_stats *s, uint64_t floor, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_stats_meta *m = &s->meta;
    coverage one = {.meta = m, .floor = floor}, all = one;
    size_t n = (size_t)m->moe_layers * (size_t)m->experts;
    bool selected = moec__stats_has(s, MOEC_STAT_SELECTED);
    *out = NULL;
    MOEC_TRY(MOEC_NEW(all.tokens, n, err));
    MOEC_TRY(MOEC_NEW(all.sorted, (size_t)m->experts, err));
    one.sorted = all.sorted;
    *out = moec_json_new_object();
    moec_json *domains = moec_json_new_array(), *kinds = moec_json_new_array();
    moec_json_set(*out, "meta", meta_json(m));
    for (int k = 0; k < MOEC_STAT_COUNT; k++)
        if (moec__stats_has(s, (moec_stat)k))
            moec_json_push(kinds, moec_json_new_string(moec_stat_kinds[k].name));
    moec_json_set(*out, "kinds", kinds);
    for (int d = 0; d < s->n_domains; d++) {
        one.tokens = s->domain[d].data[MOEC_STAT_SELECTED];
        moec_json_push(domains, domain_json(&one, &s->domain[d], selected));
        if (selected)
            moec_stat_add(MOEC_STAT_SELECTED, all.tokens, one.tokens, (int64_t)n, NULL, NULL);
    }
    moec_json_set(*out, "domains", domains);
    if (selected)
        put_coverage(*out, &all);
    if (moec__stats_has(s, MOEC_STAT_RATIO_HIST) && m->top_k > 1)
        MOEC_TRY(put_betas(*out, s, err));
    if (moec__stats_has(s, MOEC_STAT_QUANT_SQ))
        moec_json_set(*out, "errors", moec__stats_errors_json(s));
    if (s->sensitivity)
        moec_json_set(*out, "gguf", moec__stats_gguf_json(s->sensitivity));
done:
    moec_free(all.sorted);
    moec_free(all.tokens);
    return st;
}
