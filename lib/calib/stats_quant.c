/* Kinds that are measured behind a calibration and not collected by it, what they were measured with, and what they say. */
#include "base/mem.h"
#include "calib/stats_internal.h"

#include <math.h>
#include <string.h>

static const char key[] = "quant_group";

void moec_stats_forget(moec_stats *s, moec_stat kind)
{
    for (int d = 0; d < s->n_domains; d++) {
        moec_free(s->domain[d].data[kind]);
        s->domain[d].data[kind] = NULL;
    }
}

moec_status moec_stats_collect(moec_stats *s, moec_stat kind, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_stats_forget(s, kind);
    for (int d = 0; st == MOEC_OK && d < s->n_domains; d++)
        st = moec__stat_new(&s->domain[d].data[kind], &s->meta, kind, err);
    return st;
}

/* --- their group --------------------------------------------------------------------------------------------------------- */

static int64_t group_of(const moec_json *options)
{
    int64_t group = -1;
    return moec_json_int(moec_json_get(options, key), &group) && group >= 0 ? group : -1;
}

/* The sets of options that were merged, NULL: the one that there is. */
static moec_json *merged_of(const moec_json *options)
{
    moec_json *merged = moec_json_get(options, "merged");
    return moec_json_type(merged) == MOEC_JSON_ARRAY ? merged : NULL;
}

int64_t moec_stats_quant_group(const moec_stats *s)
{
    moec_json *options;
    if (moec_json_parse(&options, s->meta.options, strlen(s->meta.options), "options", NULL) != MOEC_OK)
        return -1;
    const moec_json *merged = merged_of(options);
    int64_t group = merged ? group_of(moec_json_at(merged, 0)) : group_of(options);
    for (size_t i = 1; i < moec_json_len(merged); i++)
        group = group_of(moec_json_at(merged, i)) == group ? group : -1;
    moec_json_free(options);
    return group;
}

moec_status moec_stats_set_quant_group(moec_stats *s, int64_t group, moec_err *err)
{
    moec_json *options = NULL;
    char *text = NULL;
    moec_status st = moec_json_parse(&options, s->meta.options, strlen(s->meta.options), "options", err);
    const moec_json *merged = merged_of(options);
    for (size_t i = 0; i < moec_json_len(merged); i++)
        moec_json_set(moec_json_at(merged, i), key, moec_json_new_int(group));
    if (!merged)
        moec_json_set(options, key, moec_json_new_int(group));
    if (st == MOEC_OK)
        st = moec_json_dump(&text, options, 0, err);
    moec_json_free(options);
    if (st != MOEC_OK)
        return st;
    moec_free(s->meta.options);
    s->meta.options = text;
    return MOEC_OK;
}

/* --- what they say ------------------------------------------------------------------------------------------------------- */

static double sum_of(const moec_stats *s, moec_stat kind, int64_t l, int64_t first, int64_t step)
{
    const int64_t cells = moec_stat_cells(&s->meta, kind);
    double sum = 0.0;
    for (int d = 0; d < s->n_domains; d++) {
        const double *v = moec_stat_at(s, d, kind, l);
        for (int64_t i = first; v && i < cells; i += step)
            sum += v[i];
    }
    return sum;
}

moec_json *moec__stats_errors_json(const moec_stats *s)
{
    enum { PARTS = 4, ALL = 3, B = MOEC_QUANT_WIDTHS, TWO = 1 };
    static const int32_t width[B] = MOEC_QUANT_WIDTH_LIST;
    moec_json *o = moec_json_new_object(), *layers = moec_json_new_array();
    const int64_t group = moec_stats_quant_group(s);
    double tokens = 0.0;
    for (int d = 0; d < s->n_domains; d++)
        tokens += (double)s->domain[d].tokens;
    for (int64_t l = 0; l < s->meta.moe_layers; l++) {
        moec_json *row = moec_json_new_object();
        double lost[B], relative[B];
        for (int b = 0; b < B; b++) {
            lost[b] = sum_of(s, MOEC_STAT_QUANT_SQ, l, ALL * B + b, PARTS * B);
            relative[b] = sqrt(lost[b] / ((double)s->meta.hidden * tokens)); /* NAN becomes null */
        }
        const double kl = sum_of(s, MOEC_STAT_QUANT_KL, l, 0, 1);
        moec_json_set(row, "layer", moec_json_new_int(s->meta.moe_layer[l]));
        moec_json_set(row, "relative", moec_json_new_reals(relative, B));
        moec_json_set(row, "kl", moec_json_new_real(kl > 0 ? kl / tokens : (double)NAN));
        moec_json_set(row, "gain", moec_json_new_real(kl > 0 ? kl / lost[TWO] : (double)NAN));
        moec_json_push(layers, row);
    }
    moec_json_set(o, "group_size", group >= 0 ? moec_json_new_int(group) : moec_json_new_null());
    moec_json_set(o, "bits", moec_json_new_ints(width, B));
    moec_json_set(o, "layers", layers);
    return o;
}
