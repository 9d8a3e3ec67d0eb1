/* Experts that no method may remove: from a file, or found as super experts. */
#include "method/method.h"

#include "base/file.h"
#include "base/mem.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static moec_status guard_new(moec_guard *out, const moec_model *m, moec_err *err)
{
    *out = (moec_guard){.layers = m->moe_layers, .experts = m->dims.experts};
    return MOEC_NEW(out->flag, (size_t)(out->layers * out->experts), err);
}

void moec_guard_release(moec_guard *g)
{
    moec_free(g->flag);
    *g = (moec_guard){0};
}

static void protect(moec_guard *g, int64_t moe, int64_t expert)
{
    bool *flag = &g->flag[moe * g->experts + expert];
    g->count += !*flag;
    *flag = true;
}

/* `layer` and `expert` as a person wrote them. */
static moec_status protect_checked(moec_guard *g, const moec_model *m, int64_t layer, int64_t expert, const char *what,
                                   moec_err *err)
{
    if (layer < 0 || layer >= m->dims.layers || !m->layer[layer].expert)
        return moec_fail(err, MOEC_EFORMAT, "%s: layer %lld is no layer with experts (the model has layers 0 to %lld)",
                         what, (long long)layer, (long long)m->dims.layers - 1);
    if (expert < 0 || expert >= m->dims.experts)
        return moec_fail(err, MOEC_EFORMAT, "%s: layer %lld has experts 0 to %lld, not %lld", what, (long long)layer,
                         (long long)m->dims.experts - 1, (long long)expert);
    protect(g, m->layer[layer].moe_index, expert);
    return MOEC_OK;
}

/* Reads a decimal number, leaves *p behind it; false when there is none. */
static bool read_number(int64_t *out, const char **p)
{
    char *end;
    if (**p < '0' || **p > '9')
        return false;
    errno = 0;
    long long v = strtoll(*p, &end, 10);
    *out = v;
    *p = end;
    return errno == 0;
}

static moec_status parse_lines(moec_guard *g, const char *text, size_t len, const moec_model *m, const char *what,
                               moec_err *err)
{
    if (strlen(text) != len)
        return moec_fail(err, MOEC_EFORMAT, "%s: a NUL byte; expected lines 'LAYER EXPERT' or JSON", what);
    int line = 0;
    for (const char *p = text; *p; line++) {
        int64_t layer, expert;
        size_t n = strcspn(p, "\n");
        const char *next = p + n + (p[n] == '\n');
        p += strspn(p, " \t\r");
        if (*p != '\n' && *p != '\0' && *p != '#') {
            bool good = read_number(&layer, &p) && (*p == ' ' || *p == '\t');
            p += strspn(p, " \t");
            good = good && read_number(&expert, &p);
            p += strspn(p, " \t\r");
            if (!good || (*p != '\n' && *p != '\0' && *p != '#'))
                return moec_fail(err, MOEC_EFORMAT, "%s: line %d: expected 'LAYER EXPERT'", what, line + 1);
            char where[300];
            snprintf(where, sizeof where, "%s: line %d", what, line + 1);
            moec_status st = protect_checked(g, m, layer, expert, where, err);
            if (st != MOEC_OK)
                return st;
        }
        p = next;
    }
    return MOEC_OK;
}

static moec_status parse_object(moec_guard *g, moec_json *root, const moec_model *m, const char *what, moec_err *err)
{
    void *it = NULL;
    const char *key;
    moec_json *list;
    if (moec_json_type(root) != MOEC_JSON_OBJECT)
        return moec_fail(err, MOEC_EFORMAT, "%s: expected {\"LAYER\": [experts]}", what);
    while (moec_json_each(root, &it, &key, &list)) {
        const char *p = key;
        int64_t layer, expert;
        if (!read_number(&layer, &p) || *p || moec_json_type(list) != MOEC_JSON_ARRAY)
            return moec_fail(err, MOEC_EFORMAT, "%s: key %.40s: expected \"LAYER\": [experts]", what, key);
        for (size_t i = 0; i < moec_json_len(list); i++) {
            if (!moec_json_int(moec_json_at(list, i), &expert))
                return moec_fail(err, MOEC_EFORMAT, "%s: layer %s: entry %zu is not a whole number", what, key, i);
            moec_status st = protect_checked(g, m, layer, expert, what, err);
            if (st != MOEC_OK)
                return st;
        }
    }
    return MOEC_OK;
}

moec_status moec_guard_parse(moec_guard *out, const char *text, size_t len, const moec_model *m, const char *what,
                             moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_json *root = NULL;
    MOEC_TRY(guard_new(out, m, err));
    if (text[strspn(text, " \t\r\n")] == '{') {
        MOEC_TRY(moec_json_parse(&root, text, len, what, err));
        MOEC_TRY(parse_object(out, root, m, what, err));
    } else {
        MOEC_TRY(parse_lines(out, text, len, m, what, err));
    }
done:
    moec_json_free(root);
    if (st != MOEC_OK)
        moec_guard_release(out);
    return st;
}

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

/* A[l,e] over all domains into `out`; *n layers of the pool. */
static moec_status fill_pool(double *out, int64_t *n, const moec_model *m, const moec_stats *s, moec_err *err)
{
    const double last = rint(0.75 * (double)m->dims.layers);
    const int64_t experts = m->dims.experts;
    *n = 0;
    for (int64_t i = 0; i < m->dims.layers && (double)i < last; i++) {
        if (!m->layer[i].expert)
            continue;
        for (int64_t e = 0; e < experts; e++) {
            double top = 0.0;
            for (int d = 0; d < s->n_domains; d++) {
                double v = (double)((const float *)moec_stat_at(s, d, MOEC_STAT_OUT_ABSMAX, *n))[e];
                if (!isfinite(v))
                    return moec_fail(err, MOEC_ENUMERIC, "layer %lld: largest output of expert %lld is not finite",
                                     (long long)i, (long long)e);
                top = v > top ? v : top;
            }
            out[*n * experts + e] = top;
        }
        ++*n;
    }
    return MOEC_OK;
}

moec_status moec_guard_super(moec_guard *out, const moec_model *m, const moec_stats *stats, moec_err *err)
{
    moec_status st = MOEC_OK;
    double *pool = NULL, *sorted = NULL;
    int64_t layers = 0;
    *out = (moec_guard){0};
    if (!stats)
        return moec_fail(err, MOEC_EINVAL, "--protect super needs statistics; give a file made by calibrate with --stats");
    for (int d = 0; d < stats->n_domains; d++)
        if (!stats->domain[d].data[MOEC_STAT_OUT_ABSMAX])
            return moec_fail(err, MOEC_EFORMAT, "--protect super needs the statistic %s, which domain %s does not have",
                             moec_stat_kinds[MOEC_STAT_OUT_ABSMAX].name, stats->domain[d].name);
    MOEC_TRY(guard_new(out, m, err));
    size_t cells = (size_t)(m->moe_layers * m->dims.experts);
    MOEC_TRY(MOEC_NEW(pool, cells, err));
    MOEC_TRY(MOEC_NEW(sorted, cells, err));
    MOEC_TRY(fill_pool(pool, &layers, m, stats, err));
    int64_t n = layers * m->dims.experts;
    if (n == 0)
        goto done;
    memcpy(sorted, pool, (size_t)n * sizeof *pool);
    qsort(sorted, (size_t)n, sizeof *sorted, by_value);
    double high = percentile(sorted, n, 99.5), tenth = sorted[n - 1] / 10.0;
    for (int64_t i = 0; i < n; i++)
        if (pool[i] > high && pool[i] > tenth)
            protect(out, i / m->dims.experts, i % m->dims.experts);
done:
    moec_free(sorted);
    moec_free(pool);
    if (st != MOEC_OK)
        moec_guard_release(out);
    return st;
}

moec_status moec_guard_read(moec_guard *out, char **name, const char *spec, const moec_model *m,
                            const moec_stats *stats, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *text = NULL;
    size_t len;
    *out = (moec_guard){0};
    *name = NULL;
    if (strcmp(spec, "super") == 0) {
        MOEC_TRY(moec_guard_super(out, m, stats, err));
        MOEC_TRY(moec_copy(name, spec, strlen(spec), err));
    } else {
        MOEC_TRY(moec_file_read(&text, &len, spec, 64 << 20, err));
        MOEC_TRY(moec_guard_parse(out, text, len, m, spec, err));
        MOEC_TRY(moec_copy(name, moec_hash_bytes(text, len).hex, 32, err));
    }
done:
    moec_free(text);
    if (st != MOEC_OK)
        moec_guard_release(out);
    return st;
}
