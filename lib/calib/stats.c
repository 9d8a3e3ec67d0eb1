/* Statistics in memory: making, freeing, merging. Files are stats_save.c's and stats_load.c's business. */
#include "base/file.h"
#include "base/mem.h"
#include "calib/stats_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const moec_size_row moec__size_rows[MOEC_SIZE_ROWS] = {
    {"layers", offsetof(moec_stats_meta, layers), 4096},
    {"moe_layers", offsetof(moec_stats_meta, moe_layers), 4096},
    {"experts", offsetof(moec_stats_meta, experts), 65536},
    {"top_k", offsetof(moec_stats_meta, top_k), 65536},
    {"hidden", offsetof(moec_stats_meta, hidden), 1 << 20},
    {"expert_width", offsetof(moec_stats_meta, expert_width), 1 << 20},
};

int64_t *moec__size_of(const moec_size_row *row, moec_stats_meta *m)
{
    return (int64_t *)(void *)((char *)m + row->offset);
}

static moec_status check_json(const char *name, const char *text, moec_status code, moec_err *err)
{
    moec_json *v;
    if (strlen(text) > MOEC_STATS_MAX_TEXT)
        return moec_fail(err, code, "%s: %zu bytes, at most %d were expected", name, strlen(text), MOEC_STATS_MAX_TEXT);
    if (moec_json_parse(&v, text, strlen(text), name, err) != MOEC_OK)
        return err ? moec_fail(err, code, "%s", err->text) : code;
    moec_json_free(v);
    return MOEC_OK;
}

moec_status moec__stats_meta_check(const moec_stats_meta *m, moec_status code, moec_err *err)
{
    for (int i = 0; i < MOEC_SIZE_ROWS; i++) {
        const moec_size_row *row = &moec__size_rows[i];
        int64_t v = *(const int64_t *)(const void *)((const char *)m + row->offset);
        if (v < 1 || v > row->high)
            return moec_fail(err, code, "%s is %lld, expected 1 to %lld", row->name, (long long)v, (long long)row->high);
    }
    if (m->top_k > m->experts)
        return moec_fail(err, code, "top_k is %lld, more than the %lld experts", (long long)m->top_k,
                         (long long)m->experts);
    if (m->moe_layers > m->layers)
        return moec_fail(err, code, "moe_layers is %lld, more than the %lld layers", (long long)m->moe_layers,
                         (long long)m->layers);
    for (int64_t l = 0, above = 0; l < m->moe_layers; above = m->moe_layer[l++] + 1)
        if (m->moe_layer[l] < above || m->moe_layer[l] >= m->layers)
            return moec_fail(err, code, "moe_layer[%lld] is %lld, expected ascending numbers below %lld", (long long)l,
                             (long long)m->moe_layer[l], (long long)m->layers);
    if (m->tier < 0 || m->tier > MOEC_STATS_MAX_TIER)
        return moec_fail(err, code, "tier is %d, expected 0 to %d", m->tier, MOEC_STATS_MAX_TIER);
    if (!m->router_rule || !m->options)
        return moec_fail(err, code, "router_rule and options must be JSON texts");
    moec_status st = check_json("router_rule", m->router_rule, code, err);
    return st == MOEC_OK ? check_json("options", m->options, code, err) : st;
}

moec_status moec__stats_name_check(const char *name, moec_status code, moec_err *err)
{
    size_t n = name ? strlen(name) : 0;
    if (n < 1 || n > MOEC_STATS_MAX_NAME)
        return moec_fail(err, code, "a domain's name has %zu bytes, expected 1 to %d", n, MOEC_STATS_MAX_NAME);
    return MOEC_OK;
}

void moec_stats_meta_release(moec_stats_meta *m)
{
    moec_free(m->router_rule);
    moec_free(m->options);
    moec_free(m->moe_layer);
    m->router_rule = m->options = NULL;
    m->moe_layer = NULL;
}

moec_status moec__stats_meta_copy(moec_stats_meta *out, const moec_stats_meta *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    *out = *m;
    out->router_rule = out->options = NULL;
    out->moe_layer = NULL;
    MOEC_TRY(moec_copy(&out->router_rule, m->router_rule, strlen(m->router_rule), err));
    MOEC_TRY(moec_copy(&out->options, m->options, strlen(m->options), err));
    MOEC_TRY(MOEC_NEW(out->moe_layer, (size_t)m->moe_layers, err));
    memcpy(out->moe_layer, m->moe_layer, (size_t)m->moe_layers * sizeof *m->moe_layer);
done:
    if (st != MOEC_OK)
        moec_stats_meta_release(out);
    return st;
}

static void free_domain(moec_stats_domain *d)
{
    moec_free(d->name);
    for (int k = 0; k < MOEC_STAT_COUNT; k++)
        moec_free(d->data[k]);
}

void moec_stats_free(moec_stats *s)
{
    if (!s)
        return;
    for (int i = 0; i < s->n_domains; i++)
        free_domain(&s->domain[i]);
    moec_free(s->domain);
    moec_sensitivity_free(s->sensitivity);
    moec__stats_lean_free(s->lean);
    moec_stats_meta_release(&s->meta);
    moec_free(s);
}

static moec_status check_names(int n, const char *const *names, moec_err *err)
{
    if (n < 0 || n > MOEC_STATS_MAX_DOMAINS)
        return moec_fail(err, MOEC_EINVAL, "%d domains, expected 0 to %d", n, MOEC_STATS_MAX_DOMAINS);
    for (int i = 0; i < n; i++) {
        moec_status st = moec__stats_name_check(names[i], MOEC_EINVAL, err);
        if (st != MOEC_OK)
            return st;
        for (int j = 0; j < i; j++)
            if (strcmp(names[i], names[j]) == 0)
                return moec_fail(err, MOEC_EINVAL, "two domains are called %s", names[i]);
    }
    return MOEC_OK;
}

static moec_status new_domain(moec_stats_domain *d, const moec_stats_meta *m, const char *name, moec_err *err)
{
    d->weight = 1;
    moec_status st = moec_copy(&d->name, name, strlen(name), err);
    for (int k = 0; st == MOEC_OK && k < MOEC_STAT_COUNT; k++)
        if (moec_stat_kinds[k].tier <= m->tier)
            st = moec__stat_new(&d->data[k], m, (moec_stat)k, err);
    return st;
}

moec_status moec_stats_new(moec_stats **out, const moec_stats_meta *meta, int n_domains, const char *const *names,
                           moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_stats *s = NULL;
    *out = NULL;
    MOEC_TRY(moec__stats_meta_check(meta, MOEC_EINVAL, err));
    MOEC_TRY(check_names(n_domains, names, err));
    MOEC_TRY(MOEC_NEW(s, 1, err));
    MOEC_TRY(moec__stats_meta_copy(&s->meta, meta, err));
    MOEC_TRY(MOEC_NEW(s->domain, (size_t)n_domains, err));
    for (; s->n_domains < n_domains; s->n_domains++) {
        st = new_domain(&s->domain[s->n_domains], meta, names[s->n_domains], err);
        if (st != MOEC_OK) {
            s->n_domains++; /* what it has got so far is freed with the rest */
            goto done;
        }
    }
    *out = s;
    s = NULL;
done:
    moec_stats_free(s);
    return moec_within(err, st, "statistics");
}

bool moec__stats_has(const moec_stats *s, moec_stat kind)
{
    if (moec_stat_blocks(&s->meta, kind) == 0)
        return false;
    for (int i = 0; i < s->n_domains; i++)
        if (!s->domain[i].data[kind])
            return false;
    return s->n_domains > 0 || moec_stat_kinds[kind].tier <= s->meta.tier;
}

double moec_stat_cell(const void *block, moec_stat kind, int64_t i)
{
    return moec_stat_kinds[kind].cell == MOEC_CELL_U64 ? (double)((const uint64_t *)block)[i] : ((const double *)block)[i];
}

void *moec_stat_at(const moec_stats *s, int domain, moec_stat kind, int64_t moe_layer)
{
    char *data = s->domain[domain].data[kind];
    int64_t block = moec_stat_kinds[kind].layers == 0 ? 0 : moe_layer;
    if (!data || block < 0 || block >= moec_stat_blocks(&s->meta, kind))
        return NULL;
    size_t bytes = (size_t)moec_stat_cells(&s->meta, kind) * moec_cell_bytes(moec_stat_kinds[kind].cell);
    return data + (size_t)block * bytes;
}

/* ---- merging ------------------------------------------------------------------------------------------------------ */

static moec_status refuse(const char *what, moec_err *err)
{
    return moec_fail(err, MOEC_EFORMAT, "the statistics do not belong together: %s differs", what);
}

static moec_status check_same(const moec_stats_meta *a, const moec_stats_meta *b, moec_err *err)
{
    if (strcmp(a->model, b->model) != 0)
        return refuse("the model", err);
    if (strcmp(a->model_type, b->model_type) != 0)
        return refuse("model_type", err);
    if (strcmp(a->router_rule, b->router_rule) != 0)
        return refuse("router_rule", err);
    for (int i = 0; i < MOEC_SIZE_ROWS; i++) {
        size_t at = moec__size_rows[i].offset;
        if (memcmp((const char *)a + at, (const char *)b + at, sizeof(int64_t)) != 0)
            return refuse(moec__size_rows[i].name, err);
    }
    if (memcmp(a->moe_layer, b->moe_layer, (size_t)a->moe_layers * sizeof *a->moe_layer) != 0)
        return refuse("moe_layer", err);
    return MOEC_OK;
}

static bool parse_digest(uint64_t half[2], const char *hex)
{
    if (strlen(hex) != 32 || strspn(hex, "0123456789abcdef") != 32)
        return false;
    for (int i = 0; i < 2; i++) {
        char text[17] = "";
        memcpy(text, hex + 16 * i, 16);
        half[i] = strtoull(text, NULL, 16);
    }
    return true;
}

void moec__digest_add(char sum[33], const char *part)
{
    uint64_t a[2] = {0, 0}, b[2] = {0, 0};
    if ((*sum && !parse_digest(a, sum)) || (*part && !parse_digest(b, part))) {
        snprintf(sum, 33, "merged");
        return;
    }
    if (!*sum && !*part)
        return;
    uint64_t low = a[1] + b[1], high = a[0] + b[0] + (low < a[1]);
    snprintf(sum, 33, "%016llx%016llx", (unsigned long long)high, (unsigned long long)low);
}

/* Adds each option set of a text to a list: the text itself, or the members of {"merged": [..]}. */
static moec_status collect_options(char ***list, size_t *n, size_t *cap, const char *text, moec_err *err)
{
    moec_json *v;
    moec_status st = moec_json_parse(&v, text, strlen(text), "options", err);
    if (st != MOEC_OK)
        return st;
    moec_json *merged = moec_json_get(v, "merged");
    size_t count = moec_json_type(merged) == MOEC_JSON_ARRAY ? moec_json_len(merged) : 1;
    for (size_t i = 0; st == MOEC_OK && i < count; i++) {
        const moec_json *one = moec_json_type(merged) == MOEC_JSON_ARRAY ? moec_json_at(merged, i) : v;
        st = MOEC_GROW(*list, *cap, *n + 1, err);
        if (st == MOEC_OK)
            st = moec_json_dump(&(*list)[*n], one, 0, err);
        *n += st == MOEC_OK;
    }
    moec_json_free(v);
    return st;
}

static int by_bytes(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* One text for two: the same one when equal, else the set of all that went in, so that merging in any order and grouping
 * gives the same bytes. A set too large for a file is replaced by the text of `a`. */
static moec_status merge_options(char **out, const char *a, const char *b, moec_err *err)
{
    moec_status st = MOEC_OK;
    char **list = NULL, *text = NULL;
    size_t n = 0, cap = 0, at = 0, size = sizeof "{\"merged\": []}";
    *out = NULL;
    if (strcmp(a, b) == 0)
        return moec_copy(out, a, strlen(a), err);
    MOEC_TRY(collect_options(&list, &n, &cap, a, err));
    MOEC_TRY(collect_options(&list, &n, &cap, b, err));
    qsort(list, n, sizeof *list, by_bytes);
    for (size_t i = 0; i < n; i++)
        size += strlen(list[i]) + 2;
    MOEC_TRY(MOEC_NEW(text, size, err));
    at = (size_t)snprintf(text, size, "{\"merged\": [");
    size_t distinct = 0;
    for (size_t i = 0; i < n; i++)
        if (i == 0 || strcmp(list[i - 1], list[i]) != 0)
            at += (size_t)snprintf(text + at, size - at, "%s%s", distinct++ ? ", " : "", list[i]);
    at += (size_t)snprintf(text + at, size - at, "]}");
    const char *chosen = distinct == 1 ? list[0] : at > MOEC_STATS_MAX_TEXT ? a : text;
    MOEC_TRY(moec_copy(out, chosen, strlen(chosen), err));
done:
    moec_free(text);
    if (list)
        moec_names_free(list, n);
    return st;
}

static moec_stats_domain *find_domain(const moec_stats *s, const char *name)
{
    for (int i = 0; i < s->n_domains; i++)
        if (strcmp(s->domain[i].name, name) == 0)
            return &s->domain[i];
    return NULL;
}

static moec_status copy_domain(moec_stats_domain *out, const moec_stats_domain *d, const moec_stats_meta *m,
                               const bool keep[MOEC_STAT_COUNT], moec_err *err)
{
    *out = *d;
    memset(out->data, 0, sizeof out->data);
    moec_status st = moec_copy(&out->name, d->name, strlen(d->name), err);
    for (int k = 0; st == MOEC_OK && k < MOEC_STAT_COUNT; k++) {
        if (!keep[k])
            continue;
        st = moec__stat_new(&out->data[k], m, (moec_stat)k, err);
        if (st == MOEC_OK)
            memcpy(out->data[k], d->data[k],
                   (size_t)(moec_stat_cells(m, (moec_stat)k) * moec_stat_blocks(m, (moec_stat)k)) *
                       moec_cell_bytes(moec_stat_kinds[k].cell));
    }
    return st;
}

/* Files hold these as signed 64-bit numbers. */
static uint64_t add_capped(uint64_t a, uint64_t b)
{
    return a > INT64_MAX - (b < INT64_MAX ? b : INT64_MAX) ? INT64_MAX : a + b;
}

static void add_domain(moec_stats_domain *into, const moec_stats_domain *from, const moec_stats_meta *m)
{
    /* From the last kind to the first, so that a channel is decided before the maximum it follows changes. */
    for (int k = MOEC_STAT_COUNT - 1; k >= 0; k--)
        if (into->data[k])
            moec_stat_add((moec_stat)k, into->data[k], from->data[k],
                          moec_stat_cells(m, (moec_stat)k) * moec_stat_blocks(m, (moec_stat)k),
                          k > 0 ? into->data[k - 1] : NULL, k > 0 ? from->data[k - 1] : NULL);
    into->tokens = add_capped(into->tokens, from->tokens);
    into->sequences = add_capped(into->sequences, from->sequences);
    moec__digest_add(into->digest, from->digest);
}

/* What a merge needs before it may touch `into`. */
typedef struct merge_plan {
    bool keep[MOEC_STAT_COUNT];
    char dropped[(MOEC_STAT_COUNT + 1) * 32];
    char *options, *dropped_text;
    moec_stats_domain *domain; /* those of `into`, then copies of the new ones */
    int n_domains;
} merge_plan;

static moec_status plan_merge(merge_plan *p, const moec_stats *into, const moec_stats *from, moec_err *err)
{
    moec_status st = MOEC_OK;
    size_t at = 0;
    int most = into->n_domains + from->n_domains;
    if (most > MOEC_STATS_MAX_DOMAINS)
        return moec_fail(err, MOEC_EFORMAT, "%d domains together, at most %d fit a file", most, MOEC_STATS_MAX_DOMAINS);
    for (int k = 0; k < MOEC_STAT_COUNT; k++) {
        bool a = moec__stats_has(into, (moec_stat)k), b = moec__stats_has(from, (moec_stat)k);
        const bool apart = moec_stat_kinds[k].tier > MOEC_STATS_MAX_TIER &&
                           moec_stats_quant_group(into) != moec_stats_quant_group(from);
        p->keep[k] = a && b && !apart;
        if ((a || b) && !p->keep[k])
            at += (size_t)snprintf(p->dropped + at, sizeof p->dropped - at, "%s%s", at ? " " : "",
                                   moec_stat_kinds[k].name);
    }
    if (into->sensitivity || from->sensitivity)
        at += (size_t)snprintf(p->dropped + at, sizeof p->dropped - at, "%s" MOEC_STATS_GGUF, at ? " " : "");
    MOEC_TRY(moec_copy(&p->dropped_text, p->dropped, at, err));
    MOEC_TRY(merge_options(&p->options, into->meta.options, from->meta.options, err));
    MOEC_TRY(MOEC_NEW(p->domain, (size_t)most, err));
    if (into->n_domains > 0)
        memcpy(p->domain, into->domain, (size_t)into->n_domains * sizeof *p->domain);
    p->n_domains = into->n_domains;
    for (int i = 0; i < from->n_domains; i++)
        if (!find_domain(into, from->domain[i].name))
            MOEC_TRY(copy_domain(&p->domain[p->n_domains++], &from->domain[i], &from->meta, p->keep, err));
done:
    return st;
}

moec_status moec_stats_merge(moec_stats *into, const moec_stats *from, char **dropped, moec_err *err)
{
    merge_plan p = {.n_domains = 0};
    if (dropped)
        *dropped = NULL;
    moec_status st = into->lean || from->lean ? moec__stats_lean_refuse(err) : check_same(&into->meta, &from->meta, err);
    if (st == MOEC_OK)
        st = plan_merge(&p, into, from, err);
    if (st != MOEC_OK) {
        for (int i = into->n_domains; i < p.n_domains; i++)
            free_domain(&p.domain[i]);
        moec_free(p.domain);
        moec_free(p.options);
        moec_free(p.dropped_text);
        return st;
    }
    for (int i = 0; i < into->n_domains; i++) {
        for (int k = 0; k < MOEC_STAT_COUNT; k++)
            if (!p.keep[k]) {
                moec_free(p.domain[i].data[k]);
                p.domain[i].data[k] = NULL;
            }
        const moec_stats_domain *more = find_domain(from, p.domain[i].name);
        if (more)
            add_domain(&p.domain[i], more, &into->meta);
    }
    moec_free(into->domain);
    into->domain = p.domain;
    into->n_domains = p.n_domains;
    moec_sensitivity_free(into->sensitivity);
    into->sensitivity = NULL;
    moec_free(into->meta.options);
    into->meta.options = p.options;
    if (from->meta.tier < into->meta.tier)
        into->meta.tier = from->meta.tier;
    if (strcmp(into->meta.compute, from->meta.compute) != 0)
        snprintf(into->meta.compute, sizeof into->meta.compute, "mixed");
    if (dropped)
        *dropped = p.dropped_text;
    else
        moec_free(p.dropped_text);
    return MOEC_OK;
}
