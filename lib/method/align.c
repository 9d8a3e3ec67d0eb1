/* Profits by blocks of rows, the assignment, then scale and sign of the pairs. Only profits are kept, whole or each row's best;
 * signs are found again for the pairs themselves. */
#include "method/align.h"

#include "base/log.h"
#include "base/mem.h"
#include "base/par.h"
#include "num/assign.h"
#include "num/linalg.h"
#include "num/vec.h"

#include <float.h>
#include <math.h>

enum { ROWS = 128, TOKENS = 512 }; /* neurons of a block; tokens of a piece of it */

typedef struct side {
    const moec_neurons *x;
    const float *h;      /* [n,I] activations, or NULL: the weights are compared */
    double *ratio;       /* [I] sqrt(|down| / |up|), which canonical up is more than up; 0 where either is 0 */
    double *mean, *norm; /* [I] of the activations; norm of what is left without the mean, 0: nothing is */
} side;

typedef struct aligner {
    side a, b;
    int64_t n, width, each; /* tokens, neurons, columns that a row can have */
    bool free;              /* scale and sign are */
    double *inner;          /* [I] what a pair's sign is that of */
    float *scratch;         /* [workers, ROWS (2 I + TOKENS)] */
    float *profit;          /* [I,each] */
    int32_t *col;           /* [I,each], NULL: each = I */
} aligner;

/* ---- weights ------------------------------------------------------------------------------------------------------------ */

static double bias_product(const float *a, const float *b, int64_t j, int64_t k)
{
    return a && b ? (double)a[j] * (double)b[k] : 0.0;
}

static void set_ratios(side *s)
{
    const moec_neurons *x = s->x;
    for (int64_t j = 0; j < x->width; j++) {
        const double up = moec_sum_sq(x->up + j * x->hidden, x->hidden) + bias_product(x->up_bias, x->up_bias, j, j);
        const double down = moec_sum_sq(x->down + j * x->hidden, x->hidden);
        s->ratio[j] = up > 0.0 && down > 0.0 ? sqrt(sqrt(down) / sqrt(up)) : 0.0;
    }
}

/* <up, up'> + <down, down'>, as they are or of the canonical ones, which are 0 where up or down is. */
static double inner_sum(const aligner *s, double up, double down, double ratio)
{
    if (!s->free)
        return up + down;
    return ratio > 0.0 ? ratio * up + down / ratio : 0.0;
}

static void rows_by_weights(const aligner *s, float *p, float *up, int64_t lo, int64_t rows)
{
    const moec_neurons *a = s->a.x, *b = s->b.x;
    const int64_t n = s->width, h = a->hidden;
    moec_sgemm(false, true, rows, n, h, 1.0f, a->up + lo * h, h, b->up, h, 0.0f, up, n);
    moec_sgemm(false, true, rows, n, h, 1.0f, a->down + lo * h, h, b->down, h, 0.0f, p, n);
    for (int64_t j = lo; j < lo + rows; j++) {
        float *u = up + (j - lo) * n, *d = p + (j - lo) * n;
        for (int64_t k = 0; k < n; k++) {
            const double both = (double)u[k] + bias_product(a->up_bias, b->up_bias, j, k);
            const double v = inner_sum(s, both, (double)d[k], s->a.ratio[j] * s->b.ratio[k]);
            d[k] = (float)((s->free ? fabs(v) : v) + bias_product(a->gate_bias, b->gate_bias, j, k));
        }
    }
    if (a->gate)
        moec_sgemm(false, true, rows, n, h, 1.0f, a->gate + lo * h, h, b->gate, h, 1.0f, p, n);
}

static double dot(const float *x, const float *y, int64_t n)
{
    double out[4];
    moec_products(out, x, y, x, n);
    return out[1];
}

/* Profit of neuron j of x with k of y. */
static double pair_by_weights(const aligner *s, const side *x, const side *y, int64_t j, int64_t k, double *inner)
{
    const moec_neurons *a = x->x, *b = y->x;
    const int64_t h = a->hidden, i = j * h, l = k * h;
    const double up = dot(a->up + i, b->up + l, h) + bias_product(a->up_bias, b->up_bias, j, k);
    *inner = inner_sum(s, up, dot(a->down + i, b->down + l, h), x->ratio[j] * y->ratio[k]);
    return (a->gate ? dot(a->gate + i, b->gate + l, h) : 0.0) + bias_product(a->gate_bias, b->gate_bias, j, k) +
           (s->free ? fabs(*inner) : *inner);
}

/* ---- activations -------------------------------------------------------------------------------------------------------- */

static void set_moments(side *s, int64_t n)
{
    const int64_t width = s->x->width;
    for (int64_t t = 0; t < n; t++)
        for (int64_t j = 0; j < width; j++)
            s->mean[j] += (double)s->h[t * width + j] / (double)n;
    for (int64_t t = 0; t < n; t++)
        for (int64_t j = 0; j < width; j++) {
            const double v = (double)s->h[t * width + j] - s->mean[j];
            s->norm[j] += v * v;
        }
    for (int64_t j = 0; j < width; j++) { /* what the mean's own rounding leaves is no variation */
        const double none = 1e-10 * fabs(s->mean[j]);
        s->norm[j] = s->norm[j] > (double)n * none * none ? sqrt(s->norm[j]) : 0.0;
    }
}

/* The mean is taken from one side only: the other's then falls out of the sum by itself. */
static void rows_by_activations(const aligner *s, float *p, float *centred, int64_t lo, int64_t rows)
{
    const int64_t width = s->width;
    for (int64_t t = 0; t < s->n; t += TOKENS) {
        const int64_t tokens = s->n - t < TOKENS ? s->n - t : TOKENS;
        for (int64_t i = 0; i < tokens; i++)
            for (int64_t j = 0; j < rows; j++)
                centred[i * ROWS + j] = (float)((double)s->a.h[(t + i) * width + lo + j] - s->a.mean[lo + j]);
        moec_sgemm(true, false, rows, width, tokens, 1.0f, centred, ROWS, s->b.h + t * width, width, t > 0 ? 1.0f : 0.0f, p,
                   width);
    }
    for (int64_t j = 0; j < rows; j++)
        for (int64_t k = 0; k < width; k++) {
            const double norm = s->a.norm[lo + j] * s->b.norm[k], v = norm > 0.0 ? (double)p[j * width + k] / norm : 0.0;
            p[j * width + k] = (float)(s->free ? fabs(v) : v);
        }
}

static double pairs_by_activations(const aligner *s, const int32_t *from)
{
    double sum = 0.0;
    for (int64_t j = 0; j < s->width; j++)
        s->inner[j] = 0.0;
    for (int64_t t = 0; t < s->n; t++) {
        const float *x = s->a.h + t * s->width, *y = s->b.h + t * s->width;
        for (int64_t j = 0; j < s->width; j++)
            s->inner[j] += ((double)x[j] - s->a.mean[j]) * ((double)y[from[j]] - s->b.mean[from[j]]);
    }
    for (int64_t j = 0; j < s->width; j++) {
        const double norm = s->a.norm[j] * s->b.norm[from[j]];
        s->inner[j] = norm > 0.0 ? s->inner[j] / norm : 0.0;
        sum += s->free ? fabs(s->inner[j]) : s->inner[j];
    }
    return sum;
}

/* ---- both --------------------------------------------------------------------------------------------------------------- */

/* Sum of profits of the order, with `inner` of its pairs. */
static double pairs_sum(const aligner *s, const int32_t *from)
{
    double sum = 0.0;
    if (s->a.h)
        return pairs_by_activations(s, from);
    for (int64_t j = 0; j < s->width; j++)
        sum += pair_by_weights(s, &s->a, &s->b, j, from[j], &s->inner[j]);
    return sum;
}

static double own_sum(const aligner *s, const side *x)
{
    double sum = 0.0, inner;
    for (int64_t j = 0; j < s->width; j++)
        sum += x->h ? (double)(x->norm[j] > 0.0) : pair_by_weights(s, x, x, j, j, &inner);
    return sum;
}

/* The `each` largest of p [n], of equal ones the first, by ascending column. */
static void keep_best(float *best, int32_t *col, int64_t each, const float *p, int64_t n)
{
    for (int64_t k = 0; k < n; k++) { /* by descending profit first */
        int64_t at = k < each ? k : each;
        if (at == each && !(p[k] > best[each - 1]))
            continue;
        for (at -= at == each; at > 0 && p[k] > best[at - 1]; at--) {
            best[at] = best[at - 1];
            col[at] = col[at - 1];
        }
        best[at] = p[k];
        col[at] = (int32_t)k;
    }
    for (int64_t k = 1; k < each; k++) {
        const int32_t c = col[k];
        int64_t at = k;
        for (; at > 0 && col[at - 1] > c; at--)
            col[at] = col[at - 1];
        col[at] = c;
    }
    for (int64_t k = 0; k < each; k++)
        best[k] = p[col[k]];
}

static moec_status block_profits(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const aligner *s = ctx;
    const int64_t n = s->width;
    moec_status st = MOEC_OK;
    float *scratch = s->scratch + worker * ROWS * (2 * n + TOKENS), *p = s->col ? scratch : s->profit + lo * n;
    MOEC_TRY(moec_interrupted(err));
    (s->a.h ? rows_by_activations : rows_by_weights)(s, p, scratch + ROWS * n, lo, hi - lo);
    if (!moec_all_finite(p, (hi - lo) * n))
        return moec_fail(err, MOEC_ENUMERIC, "alignment: a product of two neurons is not finite");
    for (int64_t j = lo; s->col && j < hi; j++)
        keep_best(s->profit + j * s->each, s->col + j * s->each, s->each, p + (j - lo) * n, n);
done:
    return st;
}

static moec_status finite_rows(const float *x, int64_t rows, int64_t n, const char *what, moec_err *err)
{
    for (int64_t i = 0; x && i < rows; i++)
        if (!moec_all_finite(x + i * n, n))
            return moec_fail(err, MOEC_ENUMERIC, "alignment: %s: row %lld is not finite", what, (long long)i);
    return MOEC_OK;
}

static moec_status prepare_side(side *s, int64_t n, moec_err *err)
{
    const moec_neurons *x = s->x;
    const size_t width = (size_t)x->width;
    moec_status st = MOEC_OK;
    MOEC_TRY(finite_rows(x->gate, x->width, x->hidden, "gate", err));
    MOEC_TRY(finite_rows(x->up, x->width, x->hidden, "up", err));
    MOEC_TRY(finite_rows(x->down, x->width, x->hidden, "down", err));
    MOEC_TRY(finite_rows(x->gate_bias, 1, x->width, "the gate's bias", err));
    MOEC_TRY(finite_rows(x->up_bias, 1, x->width, "up's bias", err));
    MOEC_TRY(finite_rows(s->h, n, x->width, "activations", err));
    MOEC_TRY(MOEC_NEW(s->ratio, width, err));
    MOEC_TRY(MOEC_NEW(s->mean, width, err));
    MOEC_TRY(MOEC_NEW(s->norm, width, err));
    set_ratios(s);
    if (s->h)
        set_moments(s, n);
done:
    return st;
}

static moec_status prepare(aligner *s, const moec_align_opts *o, moec_err *err)
{
    const moec_neurons *a = s->a.x, *b = s->b.x;
    moec_status st = MOEC_OK;
    size_t cells, scratch;
    if (a->width != b->width || a->hidden != b->hidden || !a->gate != !b->gate || a->scales != b->scales)
        return moec_fail(err, MOEC_EINVAL,
                         "alignment: experts of %lld and %lld neurons of %lld and %lld inputs, expected two alike",
                         (long long)a->width, (long long)b->width, (long long)a->hidden, (long long)b->hidden);
    if (a->width > o->dense && o->candidates < 1)
        return moec_fail(err, MOEC_EINVAL, "alignment: %lld candidates a neuron, expected at least 1", (long long)o->candidates);
    const bool sparse = a->width > o->dense && o->candidates < a->width;
    s->width = a->width;
    s->each = sparse ? o->candidates : a->width;
    s->free = o->canonical && a->scales && a->gate;
    if (!moec_mul_size(&cells, (size_t)s->width, (size_t)s->each) ||
        !moec_mul_size(&scratch, (size_t)moec_par_threads() * ROWS, 2 * (size_t)s->width + TOKENS))
        return moec_fail(err, MOEC_ENOMEM, "alignment: %lld neurons are too many", (long long)s->width);
    MOEC_TRY(prepare_side(&s->a, s->n, err));
    MOEC_TRY(prepare_side(&s->b, s->n, err));
    MOEC_TRY(MOEC_NEW(s->inner, (size_t)s->width, err));
    MOEC_TRY(MOEC_NEW(s->scratch, scratch, err));
    MOEC_TRY(MOEC_NEW(s->profit, cells, err));
    if (sparse)
        MOEC_TRY(MOEC_NEW(s->col, cells, err));
done:
    return st;
}

static void release(aligner *s)
{
    for (int k = 0; k < 2; k++) {
        const side *x = k ? &s->b : &s->a;
        moec_free(x->ratio);
        moec_free(x->mean);
        moec_free(x->norm);
    }
    moec_free(s->inner);
    moec_free(s->scratch);
    moec_free(s->profit);
    moec_free(s->col);
}

static float scale_of(const aligner *s, int64_t j, int64_t k)
{
    if (!s->free || !(s->a.ratio[j] > 0.0) || !(s->b.ratio[k] > 0.0))
        return 1.0f;
    const double r = s->b.ratio[k] / s->a.ratio[j];
    const float scale = r >= (double)FLT_MIN && r <= (double)FLT_MAX ? (float)r : 1.0f;
    return s->inner[j] < 0.0 ? -scale : scale;
}

static void set_identity(int32_t *from, int64_t n)
{
    for (int64_t j = 0; j < n; j++)
        from[j] = (int32_t)j;
}

static void finish(moec_alignment *out, const aligner *s)
{
    int32_t *const same = (int32_t *)s->scratch; /* has room for I, and the products are made */
    set_identity(same, s->width);
    const double before = pairs_sum(s, same), own = 0.5 * (own_sum(s, &s->a) + own_sum(s, &s->b));
    double after = pairs_sum(s, out->from);
    if (!(after > before)) {
        set_identity(out->from, s->width);
        after = pairs_sum(s, out->from);
    }
    for (int64_t j = 0; j < s->width; j++)
        out->scale[j] = scale_of(s, j, out->from[j]);
    out->fit = own > 0.0 ? after / own : 1.0;
    out->gain = own > 0.0 ? (after - before) / own : 0.0;
}

static moec_status align(moec_alignment *out, aligner *s, const moec_align_opts *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    MOEC_TRY(prepare(s, o, err));
    MOEC_TRY(moec_par_for(s->width, ROWS, block_profits, s, err));
    if (s->col)
        MOEC_TRY(moec_assign_sparse(out->from, s->col, s->profit, s->width, s->each, err));
    else
        MOEC_TRY(moec_assign(out->from, s->profit, s->width, err));
    finish(out, s);
done:
    release(s);
    return st;
}

moec_status moec_align_weights(moec_alignment *out, const moec_neurons *a, const moec_neurons *b, const moec_align_opts *o,
                               moec_err *err)
{
    aligner s = {.a = {.x = a}, .b = {.x = b}};
    return align(out, &s, o, err);
}

moec_status moec_align_activations(moec_alignment *out, const moec_neurons *a, const moec_neurons *b, const float *ha,
                                   const float *hb, int64_t n, const moec_align_opts *o, moec_err *err)
{
    aligner s = {.a = {.x = a, .h = ha}, .b = {.x = b, .h = hb}, .n = n};
    return align(out, &s, o, err);
}

size_t moec_align_bytes(int64_t width, const moec_align_opts *o)
{
    const bool sparse = width > o->dense && o->candidates < width;
    const size_t n = (size_t)width, each = sparse ? (size_t)o->candidates : n;
    size_t cells, scratch, own, all;
    if (!moec_mul_size(&cells, n, each) || !moec_mul_size(&cells, cells, sizeof(float) + (sparse ? sizeof(int32_t) : 0)) ||
        !moec_mul_size(&scratch, (size_t)moec_par_threads() * ROWS * sizeof(float), 2 * n + TOKENS) ||
        !moec_mul_size(&own, n, 7 * sizeof(double) + 80) || !moec_add_size(&all, cells, scratch) ||
        !moec_add_size(&all, all, own))
        return SIZE_MAX;
    return all;
}
