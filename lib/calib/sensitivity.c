/* See sensitivity.h. */
#include "calib/sensitivity.h"

#include "base/mem.h"

#include <math.h>
#include <string.h>

moec_status moec_sensitivity_new(moec_sensitivity **out, size_t n, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_sensitivity *s = NULL;
    *out = NULL;
    MOEC_TRY(MOEC_NEW(s, 1, err));
    MOEC_TRY(MOEC_NEW(s->at, n, err));
    s->n = n;
    for (size_t i = 0; i < n; i++) {
        for (int b = 0; b < MOEC_BLOCK_COUNT; b++)
            s->at[i].error[b] = (double)NAN;
        for (int b = 0; b < MOEC_PROBES; b++)
            s->at[i].probe[b] = s->at[i].kl[b] = (double)NAN;
    }
    *out = s;
    s = NULL;
done:
    moec_sensitivity_free(s);
    return st;
}

void moec_sensitivity_free(moec_sensitivity *s)
{
    if (!s)
        return;
    for (size_t i = 0; s->at && i < s->n; i++) {
        moec_free(s->at[i].name);
        moec_free(s->at[i].square);
    }
    moec_free(s->at);
    moec_free(s);
}

const moec_sensitive *moec_sensitivity_find(const moec_sensitivity *s, const char *name)
{
    for (size_t i = 0; i < s->n; i++)
        if (s->at[i].name && strcmp(s->at[i].name, name) == 0)
            return &s->at[i];
    return NULL;
}

double moec_sensitivity_cost(const moec_sensitive *s, moec_block type)
{
    static const double flattest = 0.5, steepest = 2.0;
    const double error = s->error[type];
    double x[MOEC_PROBES], y[MOEC_PROBES], slope = 1.0;
    int n = 0;
    for (int b = 0; b < MOEC_PROBES; b++) /* a probe that changes nothing, or nothing that can be measured, has no logarithm */
        if (s->kl[b] > 0.0 && s->probe[b] > 0.0) {
            x[n] = log(s->probe[b]);
            y[n++] = log(s->kl[b]);
        }
    const bool ran = n > 0 || s->kl[0] >= 0.0 || s->kl[1] >= 0.0;
    if (!ran || isnan(error))
        return (double)NAN;
    if (n == 0 || error <= 0.0)
        return 0.0;
    if (n == 2 && fabs(x[0] - x[1]) > 0.0 && (y[0] - y[1]) / (x[0] - x[1]) > 0.0)
        slope = fmin(fmax((y[0] - y[1]) / (x[0] - x[1]), flattest), steepest);
    if (n == 2) { /* a line of another slope than theirs goes through their middle */
        x[0] = (x[0] + x[1]) / 2.0;
        y[0] = (y[0] + y[1]) / 2.0;
    }
    return exp(y[0] + slope * (log(error) - x[0]));
}
