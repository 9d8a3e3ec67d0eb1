/* The numbers of thresholds.h. */
#include "method/thresholds.h"

#include "base/file.h"
#include "base/mem.h"

#include <ctype.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

double moec_hist_total(const double *count, int64_t bins)
{
    double sum = 0.0;
    for (int64_t b = 0; b < bins; b++)
        sum += count[b];
    return sum;
}

double moec_hist_below(const double *count, int64_t bins, double x)
{
    const double total = moec_hist_total(count, bins), at = x * (double)bins;
    double below = 0.0;
    for (int64_t b = 0; b < bins && (double)b < at; b++)
        below += count[b] * (at - (double)b < 1.0 ? at - (double)b : 1.0);
    return total > 0.0 ? below / total : (double)NAN;
}

double moec_hist_quantile(const double *count, int64_t bins, double share)
{
    const double total = moec_hist_total(count, bins), want = share * total;
    double below = 0.0;
    if (!(total > 0.0))
        return (double)NAN;
    if (share <= 0.0)
        return 0.0;
    for (int64_t b = 0; b < bins; b++) {
        if (count[b] > 0.0 && below + count[b] >= want)
            return ((double)b + (want - below) / count[b]) / (double)bins;
        below += count[b];
    }
    return 1.0;
}

double moec_cache_loads(int64_t E, int64_t n, double p1, double q)
{
    const double e = (double)E, in = (double)n, out = (double)(E - n), pairs = e * (e - 1.0);
    const double both = out * (out - 1.0) / pairs, one = out * in / pairs;
    return p1 * (out / e) * (1.0 - q) + (1.0 - p1) * (2.0 * both * (1.0 - q) + both * q + 2.0 * one * (1.0 - q));
}

moec_status moec_cache_split(int32_t *size, const double *cost, int64_t layers, int64_t E, int64_t budget, moec_err *err)
{
    moec_status st = MOEC_OK;
    double *best = NULL, *next = NULL;
    int32_t *choice = NULL;
    size_t cells;
    if (budget < 0 || layers < 1 || E < 1 || budget > layers * E)
        return moec_fail(err, MOEC_EINVAL, "a cache of %lld experts: 0 to %lld are possible", (long long)budget, (long long)(layers * E));
    for (int64_t i = 0; i < layers * (E + 1); i++)
        if (!isfinite(cost[i]))
            return moec_fail(err, MOEC_EINVAL, "cache: a cost is not finite");
    if (!moec_mul_size(&cells, (size_t)layers, (size_t)(budget + 1)))
        return moec_fail(err, MOEC_ENOMEM, "a cache of %lld experts does not fit in memory", (long long)budget);
    MOEC_TRY(MOEC_NEW(best, (size_t)(budget + 1), err));
    MOEC_TRY(MOEC_NEW(next, (size_t)(budget + 1), err));
    MOEC_TRY(MOEC_NEW(choice, cells, err));
    for (int64_t j = 0; j <= budget; j++)
        best[j] = j == 0 ? 0.0 : (double)INFINITY;
    for (int64_t l = 0; l < layers; l++) {
        for (int64_t j = 0; j <= budget; j++) {
            next[j] = (double)INFINITY;
            for (int64_t k = 0; k <= E && k <= j; k++) {
                const double sum = best[j - k] + cost[l * (E + 1) + k];
                if (sum < next[j] || (k > 0 && sum == next[j] && isfinite(sum))) { /* more here: less in front */
                    next[j] = sum;
                    choice[l * (budget + 1) + j] = (int32_t)k;
                }
            }
        }
        double *swap = best;
        best = next;
        next = swap;
    }
    for (int64_t l = layers - 1, j = budget; l >= 0; l--) {
        size[l] = choice[l * (budget + 1) + j];
        j -= size[l];
    }
done:
    moec_free(best);
    moec_free(next);
    moec_free(choice);
    return st;
}

/* --- sensitivities ---------------------------------------------------------------------------------------------------- */

/* Cells first, first + step .. of a kind in a layer, over the domains by weight. */
static double sum_of(const moec_stats *s, moec_stat kind, int64_t l, int64_t first, int64_t step)
{
    const int64_t cells = moec_stat_cells(&s->meta, kind);
    double sum = 0.0;
    for (int d = 0; d < s->n_domains; d++) {
        const void *v = moec_stat_at(s, d, kind, l);
        for (int64_t i = first; v && i < cells; i += step)
            sum += moec_stats_weight(s, d) * moec_stat_cell(v, kind, i);
    }
    return sum;
}

moec_status moec_sensitivities(double *out, const moec_stats *s, moec_err *err)
{
    enum { ALL = 3, B = MOEC_QUANT_WIDTHS, PARTS = 4, TWO = 1 };
    static const moec_stat kinds[] = {MOEC_STAT_QUANT_KL, MOEC_STAT_QUANT_SQ, MOEC_STAT_NORM_SQ, MOEC_STAT_SELECTED, MOEC_STAT_NORMS_RES};
    double tokens = 0.0;
    for (int d = 0; d < s->n_domains; d++) {
        tokens += moec_stats_weight(s, d) * (double)s->domain[d].tokens;
        for (size_t k = 0; k < MOEC_COUNT(kinds); k++)
            if (!s->domain[d].data[kinds[k]])
                return moec_fail(err, MOEC_EFORMAT, "sensitivities of layers: the statistics lack %s; give --sensitivities FILE, or calibrate "
                                 "--errors --gains measures them", moec_stat_kinds[kinds[k]].name);
    }
    for (int64_t l = 0; l < s->meta.moe_layers; l++) {
        const double kl = sum_of(s, MOEC_STAT_QUANT_KL, l, 0, 1), lost = sum_of(s, MOEC_STAT_QUANT_SQ, l, ALL * B + TWO, PARTS * B);
        const double y = sum_of(s, MOEC_STAT_NORM_SQ, l, 0, 1) / sum_of(s, MOEC_STAT_SELECTED, l, 0, 1);
        const double h = sum_of(s, MOEC_STAT_NORMS_RES, l, 0, 3) / tokens;
        const double sens = kl / lost * (double)s->meta.hidden * 2.0 * y / (h * h);
        out[l] = kl > 0.0 && isfinite(sens) ? sens : (double)NAN;
    }
    return MOEC_OK;
}

static moec_status put(double *out, const moec_stats *s, int64_t layer, double v, const char *path, moec_err *err)
{
    for (int64_t l = 0; l < s->meta.moe_layers; l++) {
        if (s->meta.moe_layer[l] != layer)
            continue;
        if (!isnan(out[l]))
            return moec_fail(err, MOEC_EINVAL, "%s: layer %lld is there twice", path, (long long)layer);
        if (!isfinite(v) || v < 0.0)
            return moec_fail(err, MOEC_EINVAL, "%s: layer %lld: a sensitivity is a number from 0 up", path, (long long)layer);
        out[l] = v;
        return MOEC_OK;
    }
    return moec_fail(err, MOEC_EINVAL, "%s: layer %lld has no routed experts", path, (long long)layer);
}

static moec_status read_object(double *out, moec_json *root, const char *path, const moec_stats *s, moec_err *err)
{
    moec_status st = MOEC_OK;
    void *it = NULL;
    const char *key;
    moec_json *value;
    while (st == MOEC_OK && moec_json_each(root, &it, &key, &value)) {
        char *end;
        double v;
        const long long layer = strtoll(key, &end, 10);
        if (end == key || *end || !moec_json_real(value, &v))
            return moec_fail(err, MOEC_EINVAL, "%s: '%.40s' is not \"LAYER\": number", path, key);
        st = put(out, s, layer, v, path, err);
    }
    return st;
}

static moec_status read_array(double *out, moec_json *root, const char *path, const moec_stats *s, moec_err *err)
{
    moec_status st = MOEC_OK;
    if (moec_json_len(root) != (size_t)s->meta.moe_layers)
        return moec_fail(err, MOEC_EINVAL, "%s: %zu numbers, the model has %lld layers with routed experts", path, moec_json_len(root),
                         (long long)s->meta.moe_layers);
    for (int64_t l = 0; st == MOEC_OK && l < s->meta.moe_layers; l++) {
        double v = NAN;
        (void)moec_json_real(moec_json_at(root, (size_t)l), &v);
        st = put(out, s, s->meta.moe_layer[l], v, path, err);
    }
    return st;
}

static moec_status read_lines(double *out, char *text, const char *path, const moec_stats *s, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *rest = NULL;
    for (char *line = strtok_r(text, "\r\n", &rest); st == MOEC_OK && line; line = strtok_r(NULL, "\r\n", &rest)) {
        char *end, *last;
        const long long layer = strtoll(line, &end, 10);
        const double v = *end == ',' ? strtod(end + 1, &last) : (double)NAN;
        if (end == line || *end != ',' || last == end + 1 || last[strspn(last, " \t")])
            return moec_fail(err, MOEC_EINVAL, "%s: '%.40s' is not LAYER,NUMBER", path, line);
        st = put(out, s, layer, v, path, err);
    }
    return st;
}

moec_status moec_sensitivities_read(double *out, const char *path, const moec_stats *s, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *text = NULL;
    moec_json *root = NULL;
    size_t len;
    for (int64_t l = 0; l < s->meta.moe_layers; l++)
        out[l] = (double)NAN;
    MOEC_TRY(moec_file_read(&text, &len, path, 1 << 20, err));
    const char front = text[strspn(text, " \t\r\n")];
    if (front == '[' || front == '{') {
        MOEC_TRY(moec_json_parse(&root, text, len, path, err));
        MOEC_TRY((front == '[' ? read_array : read_object)(out, root, path, s, err));
    } else {
        MOEC_TRY(read_lines(out, text, path, s, err));
    }
    for (int64_t l = 0; l < s->meta.moe_layers; l++)
        if (isnan(out[l]))
            MOEC_TRY(moec_fail(err, MOEC_EINVAL, "%s: layer %lld is missing", path, (long long)s->meta.moe_layer[l]));
done:
    moec_json_free(root);
    moec_free(text);
    return st;
}
