/* Reads a statistics file. The seal turns damage into one clear refusal before HDF5 parses a byte; everything behind it
 * is still checked, since whoever can write a file can seal it. */
#include "base/file.h"
#include "base/mem.h"
#include "calib/stats_internal.h"
#include "ckpt/seal.h"

#include <stdio.h>
#include <string.h>

enum { LINK_BYTES = 3 * MOEC_STATS_MAX_NAME };

/* A text attribute into a fixed field. */
static moec_status get_field(char *out, size_t cap, moec_h5 *h, const char *path, const char *name, moec_err *err)
{
    char *text;
    moec_status st = moec_h5_get_text(&text, h, path, name, cap - 1, err);
    if (st == MOEC_OK)
        snprintf(out, cap, "%s", text);
    moec_free(text);
    return st;
}

/* N stands in the router's rule, which is JSON as moec__stats_meta_check found. */
static moec_status get_null_experts(moec_stats_meta *m, moec_err *err)
{
    moec_json *rule;
    moec_status st = moec_json_parse(&rule, m->router_rule, strlen(m->router_rule), "router_rule", err);
    if (st != MOEC_OK)
        return st;
    const moec_json *said = moec_json_get(rule, "null_experts");
    if (said && (!moec_json_int(said, &m->null_experts) || m->null_experts < 0 || m->null_experts > 65536))
        st = moec_fail(err, MOEC_EFORMAT, "router_rule: null_experts is no number from 0 to 65536");
    moec_json_free(rule);
    return st;
}

static moec_status get_meta(moec_stats_meta *m, moec_h5 *h, moec_err *err)
{
    moec_status st = MOEC_OK;
    int64_t v;
    MOEC_TRY(moec_h5_get_int(&v, h, "/meta", "format_version", INT64_MIN, INT64_MAX, err));
    if (v != MOEC_STATS_FORMAT) {
        st = moec_fail(err, MOEC_EFORMAT, "statistics of format version %lld, this program reads version %d",
                       (long long)v, MOEC_STATS_FORMAT);
        goto done;
    }
    MOEC_TRY(get_field(m->model, sizeof m->model, h, "/meta", "model", err));
    MOEC_TRY(get_field(m->model_type, sizeof m->model_type, h, "/meta", "model_type", err));
    MOEC_TRY(moec_h5_get_text(&m->router_rule, h, "/meta", "router_rule", MOEC_STATS_MAX_TEXT, err));
    MOEC_TRY(moec_h5_get_text(&m->options, h, "/meta", "options", MOEC_STATS_MAX_TEXT, err));
    MOEC_TRY(get_field(m->compute, sizeof m->compute, h, "/meta", "compute", err));
    for (int i = 0; i < MOEC_SIZE_ROWS; i++)
        MOEC_TRY(moec_h5_get_int(moec__size_of(&moec__size_rows[i], m), h, "/meta", moec__size_rows[i].name, 1,
                                 moec__size_rows[i].high, err));
    MOEC_TRY(MOEC_NEW(m->moe_layer, (size_t)m->moe_layers, err));
    MOEC_TRY(moec_h5_get_ints(m->moe_layer, h, "/meta", "moe_layer", m->moe_layers, err));
    MOEC_TRY(moec_h5_get_int(&v, h, "/meta", "tier", 0, MOEC_STATS_MAX_TIER, err));
    m->tier = (int)v;
    MOEC_TRY(moec__stats_meta_check(m, MOEC_EFORMAT, err));
    MOEC_TRY(get_null_experts(m, err));
done:
    return st;
}

/* Which kinds the file says it holds. Kinds that this program does not know are passed over. */
static moec_status get_kinds(bool has[MOEC_STAT_COUNT], bool *gguf, const moec_stats_meta *m, moec_h5 *h, moec_err *err)
{
    char *text;
    moec_status st = moec_h5_get_text(&text, h, "/meta", "kinds", MOEC_STATS_MAX_TEXT, err);
    if (st != MOEC_OK)
        return st;
    for (const char *word = text; *word;) {
        size_t n = strcspn(word, " ");
        *gguf |= n == strlen(MOEC_STATS_GGUF) && memcmp(MOEC_STATS_GGUF, word, n) == 0;
        for (int k = 0; k < MOEC_STAT_COUNT; k++)
            if (strlen(moec_stat_kinds[k].name) == n && memcmp(moec_stat_kinds[k].name, word, n) == 0)
                has[k] = moec_stat_blocks(m, (moec_stat)k) > 0 &&
                         (moec_stat_kinds[k].tier <= m->tier || moec_stat_kinds[k].tier > MOEC_STATS_MAX_TIER);
        word += n + (word[n] == ' ');
    }
    moec_free(text);
    return MOEC_OK;
}

moec_status moec__stat_path(char **out, const char *group, moec_stat kind, moec_err *err)
{
    return moec_format(out, err, "%s/t%d/%s", group, moec_stat_kinds[kind].tier, moec_stat_kinds[kind].name);
}

/* out NULL: it is only looked at. */
static moec_status get_kind(void **out, moec_h5 *h, const char *group, const moec_stats_meta *m, moec_stat kind,
                            moec_err *err)
{
    char *path;
    int64_t dim[MOEC_STATS_MAX_RANK];
    const moec_dtype type = moec__cell_dtype(moec_stat_kinds[kind].cell);
    int rank = moec__stat_dims(m, kind, dim);
    moec_status st = moec__stat_path(&path, group, kind, err);
    if (st == MOEC_OK)
        st = out ? moec_h5_get_array(out, h, path, type, rank, dim, err) : moec_h5_get_part(NULL, h, path, type, rank, dim, NULL, NULL, err);
    moec_free(path);
    return st;
}

/* lean: where kinds stay in the file. */
static moec_status get_domain(moec_stats_domain *d, moec_h5 *h, const char *link, const moec_stats_meta *m,
                              const bool has[MOEC_STAT_COUNT], struct moec_stats_lean *lean, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *group = NULL;
    int64_t v;
    MOEC_TRY(moec__stats_name_decode(&d->name, link, err));
    MOEC_TRY(moec_format(&group, err, "/domains/%s", link));
    MOEC_TRY(moec_h5_get_int(&v, h, group, "tokens", 0, INT64_MAX, err));
    d->tokens = (uint64_t)v;
    MOEC_TRY(moec_h5_get_int(&v, h, group, "sequences", 0, INT64_MAX, err));
    d->sequences = (uint64_t)v;
    MOEC_TRY(moec_h5_get_real(&d->weight, h, group, "weight", err));
    if (d->weight < 0) {
        st = moec_fail(err, MOEC_EFORMAT, "domain %s: weight is %g, expected a number >= 0", d->name, d->weight);
        goto done;
    }
    MOEC_TRY(get_field(d->digest, sizeof d->digest, h, group, "digest", err));
    for (int k = 0; k < MOEC_STAT_COUNT; k++)
        if (has[k])
            MOEC_TRY(get_kind(lean && k != MOEC_STAT_SELECTED ? NULL : &d->data[k], h, group, m, (moec_stat)k, err));
    if (lean) {
        lean->group[lean->n_groups++] = group;
        group = NULL;
    }
done:
    moec_free(group);
    return st;
}

static moec_status read_all(moec_stats **out, moec_h5 *file, bool lean, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_stats *s = NULL;
    char **link = NULL;
    size_t n = 0;
    bool has[MOEC_STAT_COUNT] = {false}, gguf = false;
    *out = NULL;
    MOEC_TRY(MOEC_NEW(s, 1, err));
    MOEC_TRY(get_meta(&s->meta, file, err));
    MOEC_TRY(get_kinds(has, &gguf, &s->meta, file, err));
    MOEC_TRY(moec_h5_list(&link, &n, file, "/domains", MOEC_STATS_MAX_DOMAINS, LINK_BYTES, err));
    MOEC_TRY(MOEC_NEW(s->domain, n, err));
    if (lean) {
        MOEC_TRY(MOEC_NEW(s->lean, 1, err));
        MOEC_TRY(MOEC_NEW(s->lean->group, n, err));
        memcpy(s->lean->there, has, sizeof has);
    }
    for (size_t i = 0; i < n; i++) {
        s->n_domains++;
        MOEC_TRY(get_domain(&s->domain[i], file, link[i], &s->meta, has, s->lean, err));
    }
    if (gguf)
        MOEC_TRY(moec__stats_gguf_get(&s->sensitivity, file, err));
    MOEC_TRY(moec__stats_values_check(s, MOEC_EFORMAT, err));
    *out = s;
    s = NULL;
done:
    moec_names_free(link, n);
    moec_stats_free(s);
    return st;
}

moec_status moec__stats_read(moec_stats **out, moec_h5 *file, moec_err *err)
{
    return read_all(out, file, false, err);
}

/* Not every text of what is below names the file. */
static moec_status named(moec_status st, const char *what, moec_err *err)
{
    return st != MOEC_OK && err && !strstr(err->text, what) ? moec_within(err, st, "%s", what) : st;
}

static moec_status read_and_close(moec_stats **out, moec_h5 *h, const char *what, moec_err *err)
{
    moec_status st = moec__stats_read(out, h, err), closed = moec_h5_close(h, st == MOEC_OK ? err : NULL);
    if (st == MOEC_OK && closed != MOEC_OK) {
        moec_stats_free(*out);
        *out = NULL;
        st = closed;
    }
    return named(st, what, err);
}

moec_status moec_stats_load(moec_stats **out, const char *path, moec_err *err)
{
    moec_h5 *h = NULL;
    *out = NULL;
    moec_status st = moec_seal_check(path, MOEC_STATS_TITLE, err);
    if (st == MOEC_OK)
        st = moec_h5_open(&h, path, err);
    return st == MOEC_OK ? read_and_close(out, h, path, err) : st;
}

moec_status moec_stats_load_lean(moec_stats **out, const char *path, moec_err *err)
{
    moec_h5 *h = NULL;
    *out = NULL;
    moec_status st = moec_seal_check(path, MOEC_STATS_TITLE, err);
    if (st == MOEC_OK)
        st = moec_h5_open(&h, path, err);
    if (st != MOEC_OK)
        return st;
    st = named(read_all(out, h, true, err), path, err);
    if (st != MOEC_OK) {
        const moec_status closed = moec_h5_close(h, NULL);
        (void)closed; /* the first failure is the cause */
        return st;
    }
    (*out)->lean->file = h;
    return MOEC_OK;
}

moec_status moec_stats_load_memory(moec_stats **out, const void *bytes, size_t len, const char *what, moec_err *err)
{
    moec_h5 *h = NULL;
    *out = NULL;
    moec_status st = moec_seal_check_bytes(bytes, len, MOEC_STATS_TITLE, what, err);
    if (st == MOEC_OK)
        st = moec_h5_open_image(&h, bytes, len, what, err);
    return st == MOEC_OK ? read_and_close(out, h, what, err) : st;
}
