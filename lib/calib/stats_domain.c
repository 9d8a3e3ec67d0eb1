/* Domains by name and weight, and the medians that are taken over all of them. */
#include "base/mem.h"
#include "base/word.h"
#include "calib/stats_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { RATIO_BINS = 1024 };

moec_status moec_stats_domain_find(int *out, const moec_stats *s, const char *name, moec_err *err)
{
    for (*out = 0; *out < s->n_domains; ++*out)
        if (strcmp(s->domain[*out].name, name) == 0)
            return MOEC_OK;
    const char **names = NULL;
    moec_status st = MOEC_NEW(names, (size_t)s->n_domains, err);
    if (st != MOEC_OK)
        return st;
    for (int d = 0; d < s->n_domains; d++)
        names[d] = s->domain[d].name;
    const char *near = moec_word_nearest(name, names, (size_t)s->n_domains);
    st = moec_fail(err, MOEC_EINVAL, "the statistics have no domain %.60s%s%.60s; stats show lists their %d", name,
                   near ? "; did you mean " : "", near ? near : "", s->n_domains);
    moec_free(names);
    return st;
}

/* One "NAME=W", which is cut in two. */
static moec_status read_weight(double *weight, const moec_stats *s, char *entry, moec_err *err)
{
    char *sign = strrchr(entry, '='), *end;
    int d;
    if (!sign || sign == entry || !sign[1])
        return moec_fail(err, MOEC_EINVAL, "'%.60s' is not NAME=WEIGHT", entry);
    *sign = '\0';
    moec_status st = moec_stats_domain_find(&d, s, entry, err);
    if (st != MOEC_OK)
        return st;
    if (weight[d] >= 0.0)
        return moec_fail(err, MOEC_EINVAL, "domain %.60s is there twice", entry);
    weight[d] = strtod(sign + 1, &end);
    if (*end || !isfinite(weight[d]) || weight[d] < 0.0)
        return moec_fail(err, MOEC_EINVAL, "domain %.60s: '%.40s' is not a weight: a number from 0 up", entry, sign + 1);
    return MOEC_OK;
}

double moec_stats_weight(const moec_stats *s, int d)
{
    return s->n_domains > 1 ? s->domain[d].weight : 1.0;
}

double moec_stats_add_expert(double *out, const moec_stats *s, moec_stat kind, int64_t moe_layer, int64_t expert, int64_t n)
{
    double tokens = 0.0;
    for (int d = 0; d < s->n_domains; d++) {
        const double w = moec_stats_weight(s, d);
        const double *sum = (const double *)moec_stat_at(s, d, kind, moe_layer) + expert * n;
        const uint64_t *count = moec_stat_at(s, d, MOEC_STAT_SELECTED, moe_layer);
        for (int64_t i = 0; i < n; i++)
            out[i] += w * sum[i];
        tokens += w * (double)count[expert];
    }
    return tokens;
}

moec_status moec_stats_set_weights(moec_stats *s, const char *spec, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *text = NULL, *next;
    double *weight = NULL, sum = 0.0;
    MOEC_TRY(moec_copy(&text, spec, strlen(spec), err));
    MOEC_TRY(MOEC_NEW(weight, (size_t)s->n_domains, err));
    for (int d = 0; d < s->n_domains; d++)
        weight[d] = -1.0; /* not named */
    for (char *entry = text; entry; entry = next) {
        next = strchr(entry, ',');
        if (next)
            *next++ = '\0';
        MOEC_TRY(read_weight(weight, s, entry, err));
    }
    for (int d = 0; d < s->n_domains; d++) {
        weight[d] = weight[d] >= 0.0 ? weight[d] : s->domain[d].weight;
        sum += weight[d];
    }
    if (!(sum > 0.0 && isfinite(sum))) {
        st = moec_fail(err, MOEC_EINVAL, "the weights of all domains are 0 or too large");
        goto done;
    }
    for (int d = 0; d < s->n_domains; d++)
        s->domain[d].weight = weight[d];
done:
    moec_free(weight);
    moec_free(text);
    return st;
}

/* Of a histogram of the range 0 to 1. */
static double median(const double *count, int64_t bins)
{
    double total = 0.0, below = 0.0;
    for (int64_t b = 0; b < bins; b++)
        total += count[b];
    for (int64_t b = 0; b < bins && total > 0.0; b++) {
        if (count[b] > 0.0 && below + count[b] >= total / 2.0)
            return ((double)b + (total / 2.0 - below) / count[b]) / (double)bins;
        below += count[b];
    }
    return (double)NAN;
}

moec_status moec_stats_betas(double *out, const moec_stats *s, moec_err *err)
{
    const int64_t each = s->meta.top_k - 1;
    for (int d = 0; d < s->n_domains; d++)
        if (each > 0 && !s->domain[d].data[MOEC_STAT_RATIO_HIST])
            return moec_fail(err, MOEC_EFORMAT, "betas need the statistic %s, which domain %s does not have",
                             moec_stat_kinds[MOEC_STAT_RATIO_HIST].name, s->domain[d].name);
    for (int64_t i = 0; i < s->meta.moe_layers * each; i++) {
        double count[RATIO_BINS] = {0};
        for (int d = 0; d < s->n_domains; d++) {
            const uint32_t *block = moec_stat_at(s, d, MOEC_STAT_RATIO_HIST, i / each);
            const double weight = moec_stats_weight(s, d);
            for (int64_t b = 0; b < RATIO_BINS; b++)
                count[b] += weight * (double)block[i % each * RATIO_BINS + b];
        }
        out[i] = median(count, RATIO_BINS);
    }
    return MOEC_OK;
}
