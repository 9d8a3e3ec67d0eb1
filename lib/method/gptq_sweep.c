/* Coordinate descent on codes and scales in the metric of a Hessian. */
#include "method/gptq_parts.h"

#include "base/mem.h"
#include "num/grid.h"
#include "num/product.h"

#include <math.h>
#include <string.h>

enum { LEAF = 32, BLOCK = 128, CHUNK = 128 };

typedef struct sweep {
    moec_gptq_work *k;
    int64_t lo, hi;  /* columns whose gradient is at hand: whole groups */
    float *grad;     /* [hi-lo,lanes] of d (H + diag(added)), of groups that are not done */
    float *change;   /* [LEAF,lanes] */
    float *q, *hq;   /* [group,lanes] u - z of a group; [hi-lo,lanes] its product with H */
    float *sums;     /* [4,lanes] of a group: q g, q H q, added q d, added q^2 */
    float *t;        /* [lanes] what a scale changes by */
} sweep;

/* c [hi-lo,lanes] = or += rows [lo, hi) of the metric, columns [from, to), times x [to-from,lanes]. */
static void times_metric(const moec_gptq_work *k, int64_t lo, int64_t hi, int64_t from, int64_t to, const float *x, bool add, float *c)
{
    const moec_gptq *g = k->g;
    moec_product(g->opts.compute, false, false, hi - lo, k->lanes, to - from, g->metric + lo * g->n + from, g->n, x, k->lanes, add, c,
                 k->lanes);
}

/* Columns [lo, hi) of a group that begins at `from`: each code in turn to where the loss is least. The gradient of what is not done
 * follows at the end. */
static void descend(sweep *w, int64_t from, int64_t lo, int64_t hi)
{
    const moec_gptq_work *k = w->k;
    const int64_t lanes = k->lanes;
    bool any = false;
    for (int64_t r = 0; r < lanes; r += CHUNK) { /* few enough rows for the first-level cache */
        const int64_t chunk = lanes - r < CHUNK ? lanes - r : CHUNK;
        for (int64_t c = lo; c < hi; c++) {
            const float *row = k->g->metric + c * k->g->n;
            const int64_t j = c / k->group;
            float now[CHUNK];
            memcpy(now, w->grad + (c - w->lo) * lanes + r, (size_t)chunk * sizeof *now);
            moec_grid_pull(now, w->change + r, lanes, row + lo, c - lo, chunk);
            any |= moec_grid_step(k->code + c * lanes + r, k->d + c * lanes + r, w->change + (c - lo) * lanes + r, now,
                                  k->s + j * lanes + r, k->z + j * lanes + r, k->top, row[c], k->g->share[c], chunk);
        }
    }
    if (any)
        times_metric(k, from, w->hi, lo, hi, w->change, true, w->grad + (from - w->lo) * lanes);
}

/* The scale of row r in place of s: with d - t q for d the loss changes by -2 t qg + t^2 qhq, least at t = qg / qhq. As for
 * codes, the loss with and without what was added must both fall. */
static float new_scale(const moec_gptq_work *k, float s, const float *sums, int64_t r)
{
    const float qg = sums[r], qhq = sums[k->lanes + r], qd = sums[2 * k->lanes + r], qq = sums[3 * k->lanes + r];
    if (!(qhq > 0.0f))
        return s;
    const float to = moec_quant_scale(s + qg / qhq, k->scale_type), t = to - s;
    if (!isfinite(to) || (k->positive && to <= 0.0f))
        return s;
    const float damped = t * (t * qhq - 2.0f * qg), given = damped - t * (t * qq - 2.0f * qd);
    return damped < 0.0f && given <= 0.0f ? to : s;
}

/* Least squares of the scales of group j, codes and other scales as they are; the gradient of the groups behind it follows. */
static void refit(sweep *w, int64_t j)
{
    const moec_gptq_work *k = w->k;
    const int64_t lanes = k->lanes, lo = j * k->group;
    float *s = k->s + j * lanes;
    memset(w->sums, 0, 4 * (size_t)lanes * sizeof *w->sums);
    for (int64_t c = lo; c < lo + k->group; c++)
        moec_grid_difference(NULL, w->q + (c - lo) * lanes, NULL, k->code + c * lanes, s, k->z + j * lanes, lanes);
    times_metric(k, lo, w->hi, lo, lo + k->group, w->q, false, w->hq);
    for (int64_t c = lo; c < lo + k->group; c++) {
        const float *q = w->q + (c - lo) * lanes;
        moec_grid_dot(w->sums, q, w->grad + (c - w->lo) * lanes, 1.0f, lanes);
        moec_grid_dot(w->sums + lanes, q, w->hq + (c - lo) * lanes, 1.0f, lanes);
        moec_grid_dot(w->sums + 2 * lanes, q, k->d + c * lanes, k->g->share[c], lanes);
        moec_grid_dot(w->sums + 3 * lanes, q, q, k->g->share[c], lanes);
    }
    for (int64_t r = 0; r < lanes; r++) {
        const float to = new_scale(k, s[r], w->sums, r);
        w->t[r] = to - s[r];
        s[r] = to;
    }
    for (int64_t c = lo; c < lo + k->group; c++)
        moec_grid_less(k->d + c * lanes, w->q + (c - lo) * lanes, w->t, lanes);
    for (int64_t c = lo + k->group; c < w->hi; c++)
        moec_grid_less(w->grad + (c - w->lo) * lanes, w->hq + (c - lo) * lanes, w->t, lanes);
}

moec_status moec__gptq_sweep(moec_gptq_work *k, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t n = k->g->n, lanes = k->lanes;
    const int64_t block = k->group >= BLOCK ? k->group : BLOCK / k->group * k->group;
    sweep w = {.k = k};
    MOEC_TRY(MOEC_NEW(w.grad, (size_t)block * (size_t)lanes, err));
    MOEC_TRY(MOEC_NEW(w.hq, (size_t)block * (size_t)lanes, err));
    MOEC_TRY(MOEC_NEW(w.q, (size_t)k->group * (size_t)lanes, err));
    MOEC_TRY(MOEC_NEW(w.change, LEAF * (size_t)lanes, err));
    MOEC_TRY(MOEC_NEW(w.sums, 4 * (size_t)lanes, err));
    MOEC_TRY(MOEC_NEW(w.t, (size_t)lanes, err));
    for (w.lo = 0; w.lo < n; w.lo = w.hi) {
        w.hi = w.lo + block < n ? w.lo + block : n;
        times_metric(k, w.lo, w.hi, 0, n, k->d, false, w.grad);
        for (int64_t c = w.lo; c < w.hi; c += k->group) {
            for (int64_t lo = c; lo < c + k->group; lo += LEAF)
                descend(&w, c, lo, lo + LEAF < c + k->group ? lo + LEAF : c + k->group);
            refit(&w, c / k->group);
        }
    }
done:
    moec_free(w.grad);
    moec_free(w.hq);
    moec_free(w.q);
    moec_free(w.change);
    moec_free(w.sums);
    moec_free(w.t);
    return st;
}
