/* What rounding needs of a Hessian. */
#include "method/gptq_parts.h"

#include "base/mem.h"
#include "num/linalg.h"
#include "num/product.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const double FLOOR = 1e-6;      /* of the largest diagonal entry */
static const double MOST_LEFT = 500.0; /* a diagonal entry over its variance, for a factor by float32 */

void moec_gptq_blend(double *h, double mass, int64_t tokens, const double *layer, double layer_mass, int64_t n)
{
    const bool own = mass > 0.0, shared = layer && layer_mass > 0.0;
    double lambda = tokens >= 2 * n ? 1.0 : (double)tokens / ((double)tokens + (double)n / 8.0);
    if (!own || !shared)
        lambda = own ? 1.0 : 0.0;
    const double a = own ? lambda / mass : 0.0, b = shared ? (1.0 - lambda) / layer_mass : 0.0;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j <= i; j++) {
            const double x = a > 0.0 ? a * h[i * n + j] : 0.0; /* what no token made may hold anything */
            h[i * n + j] = own || shared ? (b > 0.0 ? x + b * layer[i * n + j] : x) : (double)(i == j);
        }
}

/* --- the factor -------------------------------------------------------------------------------------------------------- */

typedef struct key {
    double value;
    int64_t column;
} key;

static int descending(const void *x, const void *y)
{
    const key *a = x, *b = y;
    if (a->value != b->value)
        return a->value > b->value ? -1 : 1;
    return a->column < b->column ? -1 : 1;
}

static double diagonal(const moec_gptq *g, int64_t i)
{
    return moec__gptq_given(g, i)[i];
}

static moec_status take(moec_gptq *g, const double *h, moec_err *err)
{
    const int64_t n = g->n;
    for (int64_t i = 0; i < n; i++) {
        double *row = moec__gptq_given(g, i);
        int bad = 0;
        for (int64_t j = 0; j <= i; j++) {
            row[j] = h[i * n + j];
            bad |= !(fabs(row[j]) <= DBL_MAX);
        }
        if (bad)
            return moec_fail(err, MOEC_ENUMERIC, "Hessian of %lld columns: row %lld is not finite", (long long)n, (long long)i);
        g->importance[i] = (float)fmin(fmax(row[i], 0.0), (double)FLT_MAX);
    }
    return MOEC_OK;
}

static moec_status find_order(moec_gptq *g, moec_err *err)
{
    key *keys = NULL;
    moec_status st = MOEC_NEW(keys, (size_t)g->n, err);
    if (st != MOEC_OK)
        return st;
    for (int64_t i = 0; i < g->n; i++)
        keys[i] = (key){diagonal(g, i), i};
    if (g->opts.act_order)
        qsort(keys, (size_t)g->n, sizeof *keys, descending);
    for (int64_t i = 0; i < g->n; i++)
        g->order[g->n - 1 - i] = keys[i].column;
    moec_free(keys);
    return MOEC_OK;
}

/* Upper triangle of H + diag(added) in g->order, to where the factor will be. Of the two places that say H_ij only one is there, so
 * half of a row comes from a row of H and half from a column: what H has in its rows goes first, the rest is then written over, some
 * columns at a time, lest each value cost a cache line. */
static void turned(const moec_gptq *g)
{
    enum { COLUMNS = 32 };
    const int64_t n = g->n, lda = n + 1, *order = g->order;
    double *to = g->cells + 1;
    for (int64_t p = 0; p < n; p++) {
        const int64_t i = order[p];
        const double *row = moec__gptq_given(g, i);
        to[p * lda + p] = row[i] + g->added[i];
        for (int64_t q = p + 1; q < n; q++)
            to[p * lda + q] = row[order[q] < i ? order[q] : i];
    }
    for (int64_t q0 = 0; q0 < n; q0 += COLUMNS) {
        const int64_t end = q0 + COLUMNS < n ? q0 + COLUMNS : n;
        const double *row[COLUMNS];
        for (int64_t q = q0; q < end; q++)
            row[q - q0] = moec__gptq_given(g, order[q]);
        for (int64_t p = 0; p < end; p++) {
            const int64_t j = order[p];
            for (int64_t q = p < q0 ? q0 : p + 1; q < end; q++) {
                const int64_t i = order[q];
                const double value = row[q - q0][j < i ? j : i];
                to[p * lda + q] = j < i ? value : to[p * lda + q];
            }
        }
    }
}

/* Row i of U from i on becomes `row`: through memcpy, as doubles were there. */
static void put(moec_gptq *g, int64_t i, const float *row)
{
    memcpy(moec__gptq_factor(g, i, i), row, (size_t)(g->n - i) * sizeof *row);
}

static void identity(moec_gptq *g, float *row)
{
    memset(row, 0, (size_t)g->n * sizeof *row);
    row[0] = 1.0f;
    for (int64_t k = 0; k < g->n; k++) {
        put(g, k, row);
        g->variance[k] = 1.0;
        g->added[k] = 0.0;
    }
    g->apart = true;
}

/* The factor over what turned() left, all of it in float64. False: there is none. */
static bool decompose(moec_gptq *g, float *row)
{
    const int64_t n = g->n;
    if (!moec_cholesky_upper(g->cells + 1, n, n + 1))
        return false;
    for (int64_t k = 0; k < n; k++) {
        const double *u = g->cells + k * (n + 1) + 1 + k, inverse = 1.0 / u[0];
        g->variance[k] = u[0] * u[0];
        row[0] = 1.0f;
        for (int64_t j = 1; j < n - k; j++)
            row[j] = (float)(u[j] * inverse);
        put(g, k, row);
    }
    return true;
}

/* The same at nearly twice the speed where no variance is below 1 / MOST_LEFT of its column's diagonal entry, else *found is false and what
 * was there is lost. By strips of rows: products in float32, of up to SUM rows summed in float64, so that what is wrong is of the size
 * of what is wrong in H (moec_gram), relative to a variance at most MOST_LEFT times that; the triangle of a strip and what is behind it
 * in float64. `scale`: a power of two that makes H of size 1, lest float32's range be left. */
static moec_status decompose_fast(bool *found, moec_gptq *g, double scale, moec_err *err)
{
    enum { STRIP = 64, SUM = 512 };
    moec_status st = MOEC_OK;
    const int64_t n = g->n, lda = n + 1, stride = moec__gptq_stride(g);
    double *tile = NULL;
    float *part = NULL, *left = NULL;
    MOEC_TRY(MOEC_NEW(tile, STRIP * (size_t)n, err));
    MOEC_TRY(MOEC_NEW(part, STRIP * (size_t)n, err));
    MOEC_TRY(MOEC_NEW(left, STRIP * SUM, err));
    *found = true;
    for (int64_t lo = 0, hi; *found && lo < n; lo = hi) {
        hi = lo + STRIP < n ? lo + STRIP : n;
        const int64_t high = hi - lo, wide = n - lo;
        for (int64_t i = 0; i < high; i++)
            for (int64_t j = i; j < wide; j++)
                tile[i * wide + j] = g->cells[(lo + i) * lda + 1 + lo + j] * scale;
        for (int64_t p = 0, end; p < lo; p = end) {
            end = p + SUM < lo ? p + SUM : lo;
            for (int64_t k = p; k < end; k++) {
                const float *u = moec__gptq_factor(g, k, lo), by = (float)(g->variance[k] * scale);
                for (int64_t i = 0; i < high; i++)
                    left[(k - p) * high + i] = by * u[i];
            }
            moec_product(MOEC_COMPUTE_F32, true, false, high, wide, end - p, left, high, moec__gptq_factor(g, p, lo), stride, false, part,
                         wide);
            for (int64_t i = 0; i < high; i++)
                for (int64_t j = i; j < wide; j++)
                    tile[i * wide + j] -= (double)part[i * wide + j];
        }
        *found = moec_cholesky_upper(tile, high, wide);
        for (int64_t i = 0; i < high; i++)
            *found = *found && MOST_LEFT * tile[i * wide + i] * tile[i * wide + i] >= g->cells[(lo + i) * lda + 1 + lo + i] * scale;
        if (*found && hi < n)
            moec_dtrsm_upper(tile + high, wide, tile, wide, high, n - hi);
        for (int64_t i = 0; *found && i < high; i++) {
            const double *from = tile + i * wide + i, inverse = 1.0 / from[0];
            g->variance[lo + i] = from[0] * from[0] / scale;
            part[0] = 1.0f;
            for (int64_t j = 1; j < wide - i; j++)
                part[j] = (float)(from[j] * inverse);
            put(g, lo + i, part);
        }
    }
done:
    moec_free(tile);
    moec_free(part);
    moec_free(left);
    return st;
}

/* Adds the damping and factors, with ten times as much where there is no factor. */
static moec_status factor(moec_gptq *g, moec_err *err)
{
    const int64_t n = g->n;
    moec_status st = MOEC_OK;
    double largest = 0.0, mean = 0.0, damp = g->opts.damp;
    float *row = NULL;
    bool found;
    int power;
    MOEC_TRY(MOEC_NEW(row, (size_t)n, err));
    for (int64_t i = 0; i < n; i++) {
        largest = fmax(largest, diagonal(g, i));
        mean += diagonal(g, i) / (double)n;
    }
    g->apart = false;
    if (n == 0)
        goto done;
    if (!(largest > 0.0) || !(mean > 0.0) || !isfinite(mean)) {
        identity(g, row);
        goto done;
    }
    (void)frexp(largest, &power);
    for (;; damp = damp > 0.0 ? 10.0 * damp : FLOOR) {
        if (damp > 1e6) {
            identity(g, row);
            break;
        }
        for (int64_t i = 0; i < n; i++)
            g->added[i] = fmax(FLOOR * largest - diagonal(g, i), 0.0) + damp * mean;
        turned(g);
        MOEC_TRY(decompose_fast(&found, g, ldexp(1.0, -power), err));
        if (!found) {
            turned(g);
            found = decompose(g, row);
        }
        if (found) {
            g->apart = damp > 0.2;
            break;
        }
    }
done:
    moec_free(row);
    return st;
}

static moec_status make_metric(moec_gptq *g, moec_err *err)
{
    enum { TILE = 64 };
    moec_status st = MOEC_OK;
    const int64_t n = g->n;
    double mean = 0.0;
    for (int64_t i = 0; i < n; i++)
        mean += (diagonal(g, i) + g->added[i]) / (double)n;
    g->sweeps = g->opts.sweeps > 0 && !g->apart && mean > 0.0; /* a Hessian of 0 leaves nothing to descend on */
    if (!g->sweeps)
        return MOEC_OK;
    if (!g->metric)
        MOEC_TRY(MOEC_NEW(g->metric, (size_t)n * (size_t)n, err));
    if (!g->share)
        MOEC_TRY(MOEC_NEW(g->share, (size_t)n, err));
    for (int64_t i = 0; i < n; i++) {
        const double *row = moec__gptq_given(g, i);
        for (int64_t j = 0; j < i; j++)
            g->metric[i * n + j] = (float)(row[j] / mean);
        g->metric[i * n + i] = (float)((row[i] + g->added[i]) / mean);
        g->share[i] = (float)(g->added[i] / mean);
    }
    for (int64_t i0 = 0; i0 < n; i0 += TILE) /* the other triangle */
        for (int64_t j0 = 0; j0 <= i0; j0 += TILE)
            for (int64_t j = j0; j < n && j < j0 + TILE; j++)
                for (int64_t i = i0 > j ? i0 : j + 1; i < n && i < i0 + TILE; i++)
                    g->metric[j * n + i] = g->metric[i * n + j];
done:
    return st;
}

moec_status moec_gptq_new(moec_gptq **out, const double *h, int64_t n, const moec_gptq_opts *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_gptq *g = NULL;
    size_t cells;
    *out = NULL;
    if (n < 0 || n > INT32_MAX / 2 - 2 || !moec_mul_size(&cells, (size_t)n, (size_t)n + 1) || !(o->damp >= 0.0) || o->sweeps < 0)
        return moec_fail(err, MOEC_EINVAL, "GPTQ of %lld columns with damping %g and %d sweeps: none may be below 0", (long long)n,
                         o->damp, o->sweeps);
    MOEC_TRY(MOEC_NEW(g, 1, err));
    g->n = n;
    g->opts = *o;
    MOEC_TRY(MOEC_NEW(g->cells, cells, err));
    MOEC_TRY(MOEC_NEW(g->importance, (size_t)n, err));
    MOEC_TRY(MOEC_NEW(g->order, (size_t)n, err));
    MOEC_TRY(MOEC_NEW(g->variance, (size_t)n, err));
    MOEC_TRY(MOEC_NEW(g->added, (size_t)n, err));
    MOEC_TRY(moec_gptq_renew(g, h, err));
    *out = g;
    g = NULL;
done:
    moec_gptq_free(g);
    return st;
}

moec_status moec_gptq_renew(moec_gptq *g, const double *h, moec_err *err)
{
    moec_status st = MOEC_OK;
    MOEC_TRY(take(g, h, err));
    MOEC_TRY(find_order(g, err));
    MOEC_TRY(factor(g, err));
    MOEC_TRY(make_metric(g, err));
done:
    return st;
}

void moec_gptq_free(moec_gptq *g)
{
    if (!g)
        return;
    moec_free(g->cells);
    moec_free(g->importance);
    moec_free(g->order);
    moec_free(g->variance);
    moec_free(g->added);
    moec_free(g->metric);
    moec_free(g->share);
    moec_free(g);
}

const float *moec_gptq_importance(const moec_gptq *g)
{
    return g->importance;
}

/* --- the loss ---------------------------------------------------------------------------------------------------------- */

enum { BLOCK = 128, LANES = 256 };

/* d H d^T = sum over i of d_i (2 sum_{j<i} H_ij d_j + H_ii d_i): the lower triangle, some rows of it at a time. */
moec_status moec__gptq_loss(double *loss, const moec_gptq *g, const double *d, int64_t lanes, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t n = g->n;
    double *part = NULL, *y = NULL;
    MOEC_TRY(MOEC_NEW(part, BLOCK * (size_t)n, err));
    MOEC_TRY(MOEC_NEW(y, BLOCK * (size_t)lanes, err));
    for (int64_t lo = 0, hi; lo < n; lo = hi) {
        hi = lo + BLOCK < n ? lo + BLOCK : n;
        for (int64_t i = lo; i < hi; i++) {
            double *row = part + (i - lo) * hi;
            memcpy(row, moec__gptq_given(g, i), (size_t)i * sizeof *row);
            row[i] = diagonal(g, i) / 2.0;
            memset(row + i + 1, 0, (size_t)(hi - i - 1) * sizeof *row);
        }
        moec_dgemm(false, false, hi - lo, lanes, hi, 2.0, part, hi, d, lanes, 0.0, y, lanes);
        for (int64_t i = lo; i < hi; i++)
            for (int64_t r = 0; r < lanes; r++)
                loss[r] += d[i * lanes + r] * y[(i - lo) * lanes + r];
    }
done:
    moec_free(part);
    moec_free(y);
    return st;
}

moec_status moec_gptq_loss(double *out, const moec_gptq *g, const float *w, const float *v, int64_t rows, moec_err *err)
{
    moec_status st = MOEC_OK;
    double *d = NULL, sum = 0.0;
    MOEC_TRY(MOEC_NEW(d, (size_t)g->n * LANES, err));
    for (int64_t lo = 0; lo < rows; lo += LANES) {
        const int64_t lanes = rows - lo < LANES ? rows - lo : LANES;
        double loss[LANES] = {0};
        for (int64_t r = 0; r < lanes; r++)
            for (int64_t c = 0; c < g->n; c++) {
                const int64_t k = (lo + r) * g->n + c;
                d[c * lanes + r] = (double)w[k] - (double)v[k];
            }
        MOEC_TRY(moec__gptq_loss(loss, g, d, lanes, err));
        for (int64_t r = 0; r < lanes; r++)
            sum += loss[r];
    }
    *out = sum;
done:
    moec_free(d);
    return st;
}
