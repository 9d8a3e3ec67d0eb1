/* See quant.h. */
#include "method/quant.h"

#include "base/mem.h"
#include "num/grid.h"
#include "num/vec.h"

#include <float.h>
#include <math.h>
#include <string.h>

static bool grid_is_one(const moec_qgrid *g)
{
    return g->bits >= 1 && g->bits <= MOEC_QUANT_BITS && g->group > 0 && !(g->zeros && g->bits == 1) &&
           (g->scale_type == MOEC_F16 || g->scale_type == MOEC_BF16 || g->scale_type == MOEC_F32);
}

moec_status moec_qcodes_new(moec_qcodes *out, const moec_qgrid *g, int64_t rows, int64_t cols, moec_err *err)
{
    moec_status st = MOEC_OK;
    size_t cells, scales;
    *out = (moec_qcodes){.grid = *g, .rows = rows, .cols = cols};
    if (!grid_is_one(g) || rows < 0 || cols < 0 || cols % g->group)
        return moec_fail(err, MOEC_EINVAL,
                         "grid of %d bits, groups of %lld in %lld columns: 1 to %d bits (from 2 with zero points), groups that divide "
                         "the columns and scales in F16, BF16 or F32 are possible",
                         g->bits, (long long)g->group, (long long)cols, MOEC_QUANT_BITS);
    if (!moec_mul_size(&cells, (size_t)rows, (size_t)cols) || !moec_mul_size(&scales, (size_t)rows, (size_t)(cols / g->group)))
        return moec_fail(err, MOEC_ENOMEM, "codes of %lld rows of %lld columns do not fit in memory", (long long)rows, (long long)cols);
    MOEC_TRY(MOEC_NEW(out->code, cells, err));
    MOEC_TRY(MOEC_NEW(out->scale, scales, err));
    if (g->zeros)
        MOEC_TRY(MOEC_NEW(out->zero, scales, err));
done:
    if (st != MOEC_OK)
        moec_qcodes_release(out);
    return st;
}

void moec_qcodes_release(moec_qcodes *c)
{
    for (int i = 0; i < c->planes; i++)
        moec_qcodes_release(&c->plane[i]);
    moec_free(c->plane);
    moec_free(c->code);
    moec_free(c->scale);
    moec_free(c->zero);
    *c = (moec_qcodes){0};
}

int64_t moec_quant_group(int64_t group, int64_t cols, int64_t least)
{
    int64_t g = group > 0 ? group : cols;
    if (cols <= 0 || least <= 0)
        return 0;
    for (;; g /= 2) {
        if (g <= cols && cols % g == 0 && g % least == 0)
            return g;
        if (g % 2)
            return 0;
    }
}

float moec_quant_zero(const moec_qcodes *c, int64_t at)
{
    return c->zero ? (float)c->zero[at] : c->grid.bits == 1 ? 0.5f : (float)(1 << (c->grid.bits - 1));
}

/* As moec_to_f16 and moec_to_bf16 do and back, without the way through words: it is done for every scale that is tried. */
static float to_type(float size, moec_dtype type)
{
    uint32_t bits;
    if (type == MOEC_F32)
        return size;
    if (type == MOEC_F16 && size < 0x1p-14f)
        return (size + 0.5f) - 0.5f; /* to a multiple of 2^-24 by the mantissa's end */
    const int drop = type == MOEC_F16 ? 13 : 16;
    memcpy(&bits, &size, sizeof bits);
    bits = (bits + (1u << (drop - 1)) - 1u + (bits >> drop & 1u)) >> drop << drop;
    memcpy(&size, &bits, sizeof bits);
    return type == MOEC_F16 && size > 65504.0f ? INFINITY : size;
}

float moec_quant_scale(float s, moec_dtype type)
{
    const float least = type == MOEC_F16 ? 0x1p-24f : type == MOEC_BF16 ? 0x1p-133f : FLT_TRUE_MIN;
    return copysignf(fmaxf(to_type(fabsf(s), type), least), s);
}

/* --- scales ------------------------------------------------------------------------------------------------------------ */

/* One group; where need be brought to values of about 1 by a power of two, so that squares neither overflow nor vanish, and filled
 * up with values that weigh nothing. */
typedef struct search {
    const moec_qgrid *grid;
    const float *x, *m; /* [filled] */
    float *room;        /* [filled] for x */
    int64_t n, filled;
    float mass, square;          /* sums of m and, where there are no zero points, of m x^2 */
    float top, power;            /* x = w power */
    float least, most;           /* of x and 0 */
    float s, z, error;           /* the best of what was tried: s of x, rounded to the type as a scale of w */
} search;

enum { STARTS = 3 }; /* at once */

static float power_of(float most)
{
    int e;
    frexpf(most, &e);
    return ldexpf(1.0f, e < -125 ? 126 : -e); /* below that all stays small, which only means a worse search */
}

static float rounded(const search *t, float s)
{
    return moec_quant_scale(s / t->power, t->grid->scale_type) * t->power;
}

/* Judges grids at once, each scale as it is stored. */
static void judge(search *t, moec_grid_sums *sums, const float *s, const float *z, int count)
{
    moec_grid_measure(sums, t->x, t->m, t->filled, s, z, t->top, count);
    for (int k = 0; k < count; k++)
        if (sums[k].error < t->error) {
            t->error = sums[k].error;
            t->s = s[k];
            t->z = z[k];
        }
}

/* Whether a rounded scale can be judged. */
static bool sound(const search *t, float s)
{
    return isfinite(s) && isfinite(1.0f / s) && isfinite(s / t->power);
}

/* Codes and their best scale in turn, as in Lloyd's algorithm, from each of some scales on; s and z are lost. */
static void refine(search *t, float *s, float *z, int count)
{
    enum { ROUNDS = 4 };
    for (int k = 0; k < ROUNDS && count > 0; k++) {
        moec_grid_sums sums[STARTS];
        int left = 0;
        judge(t, sums, s, z, count);
        for (int i = 0; i < count; i++) {
            if (!(sums[i].qq > 0.0f))
                continue;
            const float best = s[i] + sums[i].rq / sums[i].qq, next = rounded(t, best);
            if ((best > 0.0f) != (s[i] > 0.0f) || next == s[i] || !sound(t, next))
                continue;
            s[left] = next;
            z[left++] = z[i];
        }
        count = left;
    }
}

/* The error with the best scale for the codes. */
static float least_error(const moec_grid_sums *sums)
{
    return sums->qq > 0.0f ? sums->error - sums->rq * (sums->rq / sums->qq) : INFINITY;
}

/* Weighted mean of what has zero points, 0 of what has none, and the deviation from it. Measuring by a grid of one point, 0 or 1, is
 * the fastest loop at hand. */
static void spread(search *t, float *mean, float *deviation)
{
    const float point = t->grid->zeros ? 1.0f : 0.0f, one = 1.0f, z = -point;
    moec_grid_sums at;
    moec_grid_measure(&at, t->x, t->m, t->filled, &one, &z, 0.0f, 1);
    const float off = t->grid->zeros ? at.rq / at.qq : 0.0f;
    t->square = at.error;
    *mean = point + off;
    *deviation = sqrtf(fmaxf(at.error / t->mass - off * off, 0.0f));
}

/* Step of the best uniform grid for a Gaussian, in deviations (Max, IRE Trans. Information Theory 6, 1960, table II, for 2 to 5
 * bits; for more by the same calculation). */
static const float gaussian_step[MOEC_QUANT_BITS + 1] = {0, 1.596f, 0.9957f, 0.586f, 0.3352f, 0.1881f, 0.1041f, 0.0569f, 0.0308f};

/* Scales between `low` and `high` in even ratios, each judged by the error with the best scale for its codes; then the best of them
 * refined, once with the side that has one level more that of s > 0 and once that of s < 0, but for a side that is clearly worse. */
static void search_signs(search *t, float low, float high)
{
    enum { STEPS = 6 };
    static const float WORTH = 2.0f; /* times the least error so far: a side above that does not come down to it */
    const float z = (t->top + 1.0f) / 2.0f, ratio = powf(high / low, 1.0f / (STEPS - 1));
    float s[STEPS] = {low}, xq[STEPS][2], qq[STEPS][2], found[2] = {0.0f, 0.0f}, starts[2], zeros[2] = {z, z}, gain[2] = {0.0f, 0.0f};
    int count = 0;
    for (int k = 1; k < STEPS; k++)
        s[k] = s[k - 1] * ratio;
    moec_grid_scan(xq, qq, t->x, t->m, t->filled, s, t->top, STEPS);
    for (int k = 0; k < STEPS; k++)
        for (int i = 0; i < 2; i++) {
            const float best = xq[k][i] / qq[k][i];
            if (qq[k][i] > 0.0f && best * xq[k][i] > gain[i]) {
                gain[i] = best * xq[k][i];
                found[i] = rounded(t, i == 0 ? best : -best);
            }
        }
    const float error = fmaxf(t->square - fmaxf(gain[0], gain[1]), 0.0f), limit = WORTH * error + 1e-6f * t->square; /* what float32 loses */
    for (int i = 1; i >= 0; i--)
        if (gain[i] > 0.0f && t->square - gain[i] <= limit && sound(t, found[i]))
            starts[count++] = found[i];
    refine(t, starts, zeros, count);
}

/* Zero points that put the middle of the grid where the middle of the range or the mean of the values is. */
static void search_zeros(search *t, float low, float high, float mean)
{
    enum { STEPS = 6 };
    const float ratio = powf(high / low, 1.0f / (STEPS - 1)), middle = (t->least + t->most) / 2.0f;
    float s = low, best[2] = {0.0f, 0.0f}, error = INFINITY;
    for (int k = 0; k < STEPS; k++, s *= ratio) {
        const float at = fminf(fmaxf(floorf(t->top / 2.0f - mean / s), 0.0f), t->top), same[STARTS] = {s, s, s};
        const float zeros[STARTS] = {at, fminf(at + 1.0f, t->top), fminf(fmaxf(rintf(t->top / 2.0f - middle / s), 0.0f), t->top)};
        moec_grid_sums sums[STARTS];
        const int count = zeros[2] == zeros[0] || zeros[2] == zeros[1] ? 2 : 3;
        moec_grid_measure(sums, t->x, t->m, t->filled, same, zeros, t->top, count);
        for (int i = 0; i < count; i++) {
            const float left = least_error(&sums[i]);
            if (left < error && s + sums[i].rq / sums[i].qq > 0.0f) {
                error = left;
                best[0] = s + sums[i].rq / sums[i].qq;
                best[1] = zeros[i];
            }
        }
    }
    best[0] = rounded(t, best[0]);
    if (error < INFINITY && sound(t, best[0]))
        refine(t, &best[0], &best[1], 1);
    float starts[] = {t->s, t->s}, zeros[2];
    int count = 0;
    if (t->z > 0.0f)
        zeros[count++] = t->z - 1.0f;
    if (t->z < t->top)
        zeros[count++] = t->z + 1.0f;
    refine(t, starts, zeros, count);
}

static void extremes(float *least, float *most, const float *w, int64_t n)
{
    float lo = 0.0f, hi = 0.0f;
    for (int64_t i = 0; i < n; i++) {
        lo = w[i] < lo ? w[i] : lo;
        hi = w[i] > hi ? w[i] : hi;
    }
    *least = lo;
    *most = hi;
}

static float mean_size(const float *w, const float *m, int64_t n)
{
    double sum = 0.0, mass = 0.0;
    for (int64_t i = 0; i < n; i++) {
        sum += (double)m[i] * (double)fabsf(w[i]);
        mass += (double)m[i];
    }
    return (float)(sum / mass);
}

/* m [filled] of a group: its importance over the power of two above the largest; all 1 where there is none or it is all 0. Returns the
 * sum. */
static float weigh(float *m, const float *importance, int64_t n)
{
    const float largest = importance ? moec_abs_max(importance, n) : 0.0f, power = power_of(largest);
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++) {
        m[i] = largest > 0.0f ? importance[i] * power : 1.0f;
        sum += (double)m[i];
    }
    return (float)sum;
}

static void load(search *t, const float *w, float size)
{
    t->x = w;
    t->power = 1.0f;
    if (t->n == t->filled && size > 1e-10f && size < 1e10f)
        return;
    t->power = power_of(size);
    for (int64_t i = 0; i < t->n; i++)
        t->room[i] = w[i] * t->power;
    t->x = t->room;
}

/* Scale and zero point of one group. */
static void group_range(search *t, float *scale, float *zero, const float *w, moec_qrange how)
{
    const moec_qgrid *g = t->grid;
    float least = 0.0f, most = 0.0f, mean, deviation;
    moec_grid_sums sums;
    if (g->zeros)
        extremes(&least, &most, w, t->n);
    const float size = g->zeros ? fmaxf(-least, most) : moec_abs_max(w, t->n);
    *zero = g->zeros ? 0.0f : g->bits == 1 ? 0.5f : (t->top + 1.0f) / 2.0f;
    *scale = g->bits == 1 ? moec_quant_scale(0.0f, g->scale_type) : 1.0f; /* of one bit no code is 0 */
    if (size == 0.0f)
        return;
    if (g->bits == 1) {
        *scale = moec_quant_scale(2.0f * mean_size(w, t->m, t->n), g->scale_type);
        return;
    }
    *scale = moec_quant_scale(g->zeros ? most / t->top - least / t->top : 2.0f * (size / t->top), g->scale_type);
    if (g->zeros)
        *zero = fminf(rintf(-least / *scale), t->top);
    if (how == MOEC_QRANGE_MINMAX || !isfinite(*scale))
        return;
    load(t, w, size);
    t->least = least * t->power;
    t->most = most * t->power;
    spread(t, &mean, &deviation);
    t->s = *scale * t->power;
    t->z = *zero;
    t->error = INFINITY;
    if (g->zeros && sound(t, t->s)) /* without zero points search_signs tries it */
        judge(t, &sums, &t->s, &t->z, 1);
    const float high = g->zeros ? (t->most - t->least) / t->top : 2.0f * (size * t->power) / t->top;
    const float low = fmaxf(fminf(0.75f * gaussian_step[g->bits] * deviation, 0.8f * high), 1e-3f * high);
    if (g->zeros)
        search_zeros(t, low, high, mean);
    else
        search_signs(t, low, high);
    *scale = t->s / t->power;
    *zero = t->z;
}

moec_status moec_quant_range(moec_qcodes *c, const float *w, moec_qrange how, const float *importance, int64_t lo, int64_t hi,
                             moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t n = c->grid.group, groups = c->cols / n;
    float *m = NULL, *mass = NULL;
    search t = {.grid = &c->grid, .n = n, .top = (float)((1 << c->grid.bits) - 1)};
    t.filled = (n + MOEC_GRID_LANES - 1) / MOEC_GRID_LANES * MOEC_GRID_LANES;
    MOEC_TRY(MOEC_NEW(t.room, (size_t)t.filled, err));
    MOEC_TRY(MOEC_NEW(m, (size_t)(groups * t.filled), err));
    MOEC_TRY(MOEC_NEW(mass, (size_t)groups, err));
    for (int64_t j = 0; j < groups; j++)
        mass[j] = weigh(m + j * t.filled, importance && how == MOEC_QRANGE_CLIP ? importance + j * n : NULL, n);
    for (int64_t r = lo; r < hi; r++) {
        if (!moec_all_finite(w + r * c->cols, c->cols)) {
            st = moec_fail(err, MOEC_ENUMERIC, "row %lld of a matrix to be quantized is not finite", (long long)r);
            goto done;
        }
        for (int64_t j = 0; j < groups; j++) {
            float scale, zero;
            t.m = m + j * t.filled;
            t.mass = mass[j];
            group_range(&t, &scale, &zero, w + r * c->cols + j * n, how);
            if (!isfinite(scale)) {
                st = moec_fail(err, MOEC_ENUMERIC, "row %lld: the scale of columns %lld to %lld is too large for %s; formats with scales in BF16 or F32 hold it "
                               "(nested, fake, and compressed-tensors for a model in BF16)",
                               (long long)r, (long long)(j * n), (long long)((j + 1) * n - 1), moec_dtypes[c->grid.scale_type].name);
                goto done;
            }
            c->scale[r * groups + j] = scale;
            if (c->zero)
                c->zero[r * groups + j] = (uint8_t)zero;
        }
    }
done:
    moec_free(t.room);
    moec_free(m);
    moec_free(mass);
    return st;
}

/* --- codes ------------------------------------------------------------------------------------------------------------- */

void moec_quant_nearest(moec_qcodes *c, const float *w, int64_t lo, int64_t hi)
{
    const int64_t n = c->grid.group, groups = c->cols / n;
    const float top = (float)((1 << c->grid.bits) - 1);
    for (int64_t k = lo * groups; k < hi * groups; k++)
        moec_grid_codes(c->code + k * n, w + k * n, n, c->scale[k], moec_quant_zero(c, k), top);
}

void moec_quant_restore(float *out, const moec_qcodes *c, int64_t lo, int64_t hi)
{
    const int64_t n = c->grid.group, groups = c->cols / n;
    for (int64_t k = lo * groups; k < hi * groups; k++)
        moec_grid_values(out + k * n, c->code + k * n, n, c->scale[k], moec_quant_zero(c, k));
    for (int p = 0; p < c->planes; p++)
        for (int64_t k = lo * groups; k < hi * groups; k++)
            for (int64_t i = k * n; i < (k + 1) * n; i++)
                out[i] += c->plane[p].scale[k] * ((float)c->plane[p].code[i] - 0.5f);
}
