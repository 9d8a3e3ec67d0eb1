/* Writes statistics as a sealed HDF5 file. What stands where is listed here and read back, in the same order, in
 * stats_load.c. */
#include "base/file.h"
#include "base/mem.h"
#include "base/version.h"
#include "calib/stats_internal.h"
#include "ckpt/seal.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* ---- domain names as HDF5 link names ------------------------------------------------------------------------------ */

/* '/' separates, "." is the group itself, control characters would drive a terminal that lists the file. */
static bool plain_byte(const char *name, const char *c)
{
    return *c != '/' && *c != '%' && (unsigned char)*c >= 0x20 && *c != 0x7f && !(*c == '.' && c == name);
}

moec_status moec__stats_name_encode(char **out, const char *name, moec_err *err)
{
    moec_status st = MOEC_NEW(*out, 3 * strlen(name) + 1, err);
    if (st != MOEC_OK)
        return st;
    char *to = *out;
    for (const char *c = name; *c; c++) {
        if (plain_byte(name, c))
            *to++ = *c;
        else
            to += snprintf(to, 4, "%%%02X", (unsigned char)*c);
    }
    *to = '\0';
    return MOEC_OK;
}

static int hex_digit(char c)
{
    static const char digits[] = "0123456789ABCDEF";
    const char *at = c ? strchr(digits, c) : NULL;
    return at ? (int)(at - digits) : -1;
}

moec_status moec__stats_name_decode(char **out, const char *link, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *again = NULL;
    MOEC_TRY(MOEC_NEW(*out, strlen(link) + 1, err));
    char *to = *out;
    for (const char *c = link; *c; c++) {
        int high = *c == '%' ? hex_digit(c[1]) : -1, low = high >= 0 ? hex_digit(c[2]) : -1;
        *to++ = (char)(low >= 0 ? high * 16 + low : *c);
        c += low >= 0 ? 2 : 0;
    }
    *to = '\0';
    MOEC_TRY(moec__stats_name_check(*out, MOEC_EFORMAT, err));
    MOEC_TRY(moec__stats_name_encode(&again, *out, err));
    if (strcmp(again, link) != 0) /* two spellings of one name must not make two domains */
        st = moec_fail(err, MOEC_EFORMAT, "domain %s: not written as this format writes names", link);
done:
    moec_free(again);
    if (st != MOEC_OK) {
        moec_free(*out);
        *out = NULL;
    }
    return st;
}

/* ---- values ------------------------------------------------------------------------------------------------------- */

/* Index of the first cell that is not finite or below its bound, or -1; *value is that cell. */
static int64_t bad_f64(double *value, const void *cells, int64_t n, double low, double high)
{
    const double *v = cells;
    (void)high;
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(v[i]) || v[i] < low) {
            *value = v[i];
            return i;
        }
    return -1;
}

static int64_t bad_f32(double *value, const void *cells, int64_t n, double low, double high)
{
    const float *v = cells;
    (void)high;
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(v[i]) || (double)v[i] < low) {
            *value = (double)v[i];
            return i;
        }
    return -1;
}

static int64_t bad_i32(double *value, const void *cells, int64_t n, double low, double high)
{
    const int32_t *v = cells;
    for (int64_t i = 0; i < n; i++)
        if (v[i] < low || v[i] > high) {
            *value = v[i];
            return i;
        }
    return -1;
}

/* Counts have no wrong values. */
static int64_t (*const bad_cell[])(double *value, const void *cells, int64_t n, double low, double high) = {
    [MOEC_CELL_U64] = NULL, [MOEC_CELL_U32] = NULL, [MOEC_CELL_F64] = bad_f64, [MOEC_CELL_F32] = bad_f32,
    [MOEC_CELL_I32] = bad_i32,
};

/* "layer 3, expert 7" as far as the kind has them; `at` is an index into the whole array. */
static void place_text(char *buf, size_t cap, const moec_stats_meta *m, moec_stat kind, int64_t at)
{
    const moec_stat_kind *k = &moec_stat_kinds[kind];
    int64_t cells = moec_stat_cells(m, kind), layer = m->moe_layer[k->layers ? at / cells : 0];
    if (k->layers == 0)
        snprintf(buf, cap, "cell %lld", (long long)at);
    else if (k->shape[0] == 'E')
        snprintf(buf, cap, "layer %lld, expert %lld", (long long)layer,
                 (long long)(at % cells / (cells / m->experts)));
    else
        snprintf(buf, cap, "layer %lld", (long long)layer);
}

moec_status moec__stats_cells_check(const moec_stats *s, int d, moec_stat kind, const void *cells, int64_t from, int64_t n,
                                    moec_status code, moec_err *err)
{
    const moec_stat_kind *row = &moec_stat_kinds[kind];
    double value = 0;
    char place[64];
    if (!bad_cell[row->cell])
        return MOEC_OK;
    const int64_t at = bad_cell[row->cell](&value, cells, n, row->low, (double)(s->meta.hidden - 1));
    if (at < 0)
        return MOEC_OK;
    place_text(place, sizeof place, &s->meta, kind, from + at);
    return moec_fail(err, code, "domain %s: %s: %s: is %g, expected a finite number%s", s->domain[d].name, row->name, place, value,
                     row->cell == MOEC_CELL_I32 ? " of a channel"
                     : row->low == 0            ? " that is not negative"
                                                : "");
}

moec_status moec__stats_values_check(const moec_stats *s, moec_status code, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_stats_meta *m = &s->meta;
    for (int d = 0; d < s->n_domains; d++)
        for (int k = 0; k < MOEC_STAT_COUNT; k++)
            if (s->domain[d].data[k])
                MOEC_TRY(moec__stats_cells_check(s, d, (moec_stat)k, s->domain[d].data[k], 0,
                                                 moec_stat_cells(m, (moec_stat)k) * moec_stat_blocks(m, (moec_stat)k), code, err));
    if (s->sensitivity)
        st = moec__stats_gguf_check(s->sensitivity, code, err);
done:
    return st;
}

/* ---- the file ----------------------------------------------------------------------------------------------------- */

/* Names of the kinds that the file holds: a reader can tell "not collected" from "lost". */
static moec_status put_kinds(moec_h5 *h, const moec_stats *s, moec_err *err)
{
    char text[(MOEC_STAT_COUNT + 1) * 32];
    size_t at = 0;
    text[0] = '\0';
    for (int k = 0; k < MOEC_STAT_COUNT; k++)
        if (moec__stats_has(s, (moec_stat)k))
            at += (size_t)snprintf(text + at, sizeof text - at, "%s%s", at ? " " : "", moec_stat_kinds[k].name);
    if (s->sensitivity)
        snprintf(text + at, sizeof text - at, "%s" MOEC_STATS_GGUF, at ? " " : "");
    return moec_h5_put_text(h, "/meta", "kinds", text, err);
}

static moec_status put_meta(moec_h5 *h, const moec_stats *s, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_stats_meta *m = &s->meta;
    MOEC_TRY(moec_h5_group(h, "/meta", err));
    MOEC_TRY(moec_h5_put_int(h, "/meta", "format_version", MOEC_STATS_FORMAT, err));
    MOEC_TRY(moec_h5_put_text(h, "/meta", "written_by", moec_version(), err));
    MOEC_TRY(moec_h5_put_text(h, "/meta", "model", m->model, err));
    MOEC_TRY(moec_h5_put_text(h, "/meta", "model_type", m->model_type, err));
    MOEC_TRY(moec_h5_put_text(h, "/meta", "router_rule", m->router_rule, err));
    MOEC_TRY(moec_h5_put_text(h, "/meta", "options", m->options, err));
    MOEC_TRY(moec_h5_put_text(h, "/meta", "compute", m->compute, err));
    for (int i = 0; i < MOEC_SIZE_ROWS; i++) {
        int64_t v = *(const int64_t *)(const void *)((const char *)m + moec__size_rows[i].offset);
        MOEC_TRY(moec_h5_put_int(h, "/meta", moec__size_rows[i].name, v, err));
    }
    MOEC_TRY(moec_h5_put_ints(h, "/meta", "moe_layer", m->moe_layer, m->moe_layers, err));
    MOEC_TRY(moec_h5_put_int(h, "/meta", "tier", m->tier, err));
    MOEC_TRY(put_kinds(h, s, err));
done:
    return st;
}

static moec_status put_kind(moec_h5 *h, const char *group, const moec_stats *s, int domain, moec_stat kind, moec_err *err)
{
    static const char *const rule[] = {
        [MOEC_MERGE_ADD] = "add", [MOEC_MERGE_MAX] = "max", [MOEC_MERGE_FOLLOW] = "follow the kind before"};
    const moec_stat_kind *k = &moec_stat_kinds[kind];
    moec_status st = MOEC_OK;
    char *path = NULL;
    int64_t dim[MOEC_STATS_MAX_RANK];
    int rank = moec__stat_dims(&s->meta, kind, dim);
    MOEC_TRY(moec_format(&path, err, "%s/t%d/%s", group, k->tier, k->name));
    /* Tier 1 is large and hardly compresses; packing it would take longer than a checkpoint may. */
    MOEC_TRY((k->tier == 0 ? moec_h5_put_array : moec_h5_put_plain)(h, path, moec__cell_dtype(k->cell), rank, dim,
                                                                    s->domain[domain].data[kind], err));
    MOEC_TRY(moec_h5_put_text(h, path, "unit", k->unit, err));
    MOEC_TRY(moec_h5_put_text(h, path, "about", k->about, err));
    MOEC_TRY(moec_h5_put_text(h, path, "merge", rule[k->merge], err));
done:
    moec_free(path);
    return st;
}

static bool has_tier(const moec_stats *s, int tier)
{
    for (int k = 0; k < MOEC_STAT_COUNT; k++)
        if (moec_stat_kinds[k].tier == tier && moec__stats_has(s, (moec_stat)k))
            return true;
    return false;
}

static moec_status put_domain(moec_h5 *h, const moec_stats *s, int domain, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_stats_domain *d = &s->domain[domain];
    char *link = NULL, *group = NULL, *tier = NULL;
    MOEC_TRY(moec__stats_name_encode(&link, d->name, err));
    MOEC_TRY(moec_format(&group, err, "/domains/%s", link));
    MOEC_TRY(moec_h5_group(h, group, err));
    MOEC_TRY(moec_h5_put_int(h, group, "tokens", (int64_t)d->tokens, err));
    MOEC_TRY(moec_h5_put_int(h, group, "sequences", (int64_t)d->sequences, err));
    MOEC_TRY(moec_h5_put_real(h, group, "weight", d->weight, err));
    MOEC_TRY(moec_h5_put_text(h, group, "digest", d->digest, err));
    for (int t = 0; t <= MOEC_STATS_MAX_TIER + 1; t++) {
        if (t > s->meta.tier && !has_tier(s, t))
            continue;
        moec_free(tier);
        MOEC_TRY(moec_format(&tier, err, "%s/t%d", group, t));
        MOEC_TRY(moec_h5_group(h, tier, err));
        for (int k = 0; k < MOEC_STAT_COUNT; k++)
            if (moec_stat_kinds[k].tier == t && moec__stats_has(s, (moec_stat)k))
                MOEC_TRY(put_kind(h, group, s, domain, (moec_stat)k, err));
    }
done:
    moec_free(tier);
    moec_free(group);
    moec_free(link);
    return st;
}

static moec_status put_all(const moec_stats *s, const char *path, moec_err *err)
{
    moec_h5 *h;
    moec_status st = moec_h5_create(&h, path, err);
    if (st != MOEC_OK)
        return st;
    MOEC_TRY(put_meta(h, s, err));
    MOEC_TRY(moec_h5_group(h, "/domains", err));
    for (int d = 0; d < s->n_domains; d++)
        MOEC_TRY(put_domain(h, s, d, err));
    if (s->sensitivity)
        MOEC_TRY(moec__stats_gguf_put(h, s, err));
done:;
    /* Of two failures the first is the cause. */
    moec_status closed = moec_h5_close(h, st == MOEC_OK ? err : NULL);
    return st == MOEC_OK ? closed : st;
}

static moec_status check_domains(const moec_stats *s, moec_err *err)
{
    for (int i = 0; i < s->n_domains; i++) {
        const moec_stats_domain *d = &s->domain[i];
        moec_status st = moec__stats_name_check(d->name, MOEC_EINVAL, err);
        if (st != MOEC_OK)
            return st;
        if (d->tokens > INT64_MAX || d->sequences > INT64_MAX || !isfinite(d->weight) || d->weight < 0)
            return moec_fail(err, MOEC_EINVAL, "domain %s: tokens, sequences or weight out of range", d->name);
    }
    return MOEC_OK;
}

moec_status moec_stats_save(const moec_stats *s, const char *path, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *tmp = NULL;
    bool made = false;
    if (s->lean)
        return moec__stats_lean_refuse(err);
    MOEC_TRY(moec__stats_meta_check(&s->meta, MOEC_EINVAL, err));
    MOEC_TRY(check_domains(s, err));
    MOEC_TRY(moec__stats_values_check(s, MOEC_ENUMERIC, err));
    MOEC_TRY(moec_format(&tmp, err, "%s.tmp", path));
    made = true;
    MOEC_TRY(put_all(s, tmp, err));
    MOEC_TRY(moec_seal_write(tmp, MOEC_STATS_TITLE, err));
    MOEC_TRY(moec_file_publish(tmp, path, err));
    made = false;
done:
    if (made)
        unlink(tmp);
    moec_free(tmp);
    return st;
}
