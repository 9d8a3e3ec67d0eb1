/* Experts that no method may remove: from a file, or found as super experts. */
#include "method/method.h"

#include "base/file.h"
#include "base/mem.h"

#include <errno.h>
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

moec_status moec_guard_super(moec_guard *out, const moec_model *m, const moec_stats *stats, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_super found = {0};
    *out = (moec_guard){0};
    if (!stats)
        return moec_fail(err, MOEC_EINVAL, "--protect super needs statistics; give a file made by calibrate with --stats");
    if (stats->meta.moe_layers != m->moe_layers || stats->meta.experts != m->dims.experts)
        return moec_fail(err, MOEC_EFORMAT, "--protect super: the statistics are of another model");
    MOEC_TRY(moec_within(err, moec_super_find(&found, stats, err), "--protect super"));
    MOEC_TRY(guard_new(out, m, err));
    memcpy(out->flag, found.flag, (size_t)(found.layers * found.experts) * sizeof *found.flag);
    out->count = found.count;
done:
    moec_super_release(&found);
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
