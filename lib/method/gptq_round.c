/* Rounding by GPTQ in the form of LDLQ, and its choice against rounding to nearest. */
#include "method/gptq_parts.h"

#include "base/mem.h"
#include "num/grid.h"
#include "num/product.h"

#include <math.h>
#include <string.h>

enum { LEAF = 32, BLOCK = 64, PANEL = 256, CHUNK = 128 };

typedef struct rounding {
    moec_gptq_work k;
    uint8_t *other;       /* [n,lanes] codes of rounding to nearest */
    float *y;             /* [BLOCK,lanes] */
    double *loss, *best;  /* [lanes] of GPTQ; of rounding to nearest, then of what is returned */
    double *sum, *added;  /* [lanes] damped loss, and the share of what was added to the diagonal in it */
    double *exact;        /* [n,lanes] for moec__gptq_loss; NULL where the factor says the loss */
} rounding;

/* --- rows of W to lanes and back ---------------------------------------------------------------------------------------- */

static void load_rows(rounding *t, const moec_qcodes *c, const float *w, int64_t lo, int64_t rows)
{
    const int64_t n = c->cols, lanes = t->k.lanes, groups = n / t->k.group;
    moec_grid_turn(t->k.w, lanes, w + lo * n, n, rows, n);
    for (int64_t r = 0; r < lanes; r++)
        for (int64_t j = 0; j < groups; j++) {
            t->k.s[j * lanes + r] = r < rows ? c->scale[(lo + r) * groups + j] : 1.0f;
            t->k.z[j * lanes + r] = r < rows ? moec_quant_zero(c, (lo + r) * groups + j) : 0.0f;
        }
    for (int64_t j = 0; j < n; j++) /* the rest may hold an earlier panel */
        for (int64_t r = rows; r < lanes; r++)
            t->k.w[j * lanes + r] = 0.0f;
}

static void store_rows(moec_qcodes *c, const rounding *t, int64_t lo, int64_t rows)
{
    const int64_t n = c->cols, lanes = t->k.lanes, groups = n / t->k.group;
    moec_grid_turn_codes(c->code + lo * n, n, t->k.code, lanes, n, rows);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < groups; j++)
            c->scale[(lo + r) * groups + j] = t->k.s[j * lanes + r];
}

/* Row r of `code` becomes that of `other`. */
static void take_nearest(rounding *t, int64_t r)
{
    for (int64_t j = 0; j < t->k.g->n; j++)
        t->k.code[j * t->k.lanes + r] = t->other[j * t->k.lanes + r];
}

/* Unlike fmax: what is no number stays so. */
static double not_below_0(double loss)
{
    return loss < 0.0 ? 0.0 : loss;
}

/* --- the loss ---------------------------------------------------------------------------------------------------------- */

/* By H as given, of d in g->order. */
static moec_status exact_loss(rounding *t, double *loss, moec_err *err)
{
    const moec_gptq *g = t->k.g;
    const int64_t lanes = t->k.lanes;
    memset(loss, 0, (size_t)lanes * sizeof *loss);
    for (int64_t k = 0; k < g->n; k++)
        for (int64_t r = 0; r < lanes; r++)
            t->exact[g->order[k] * lanes + r] = (double)t->k.d[k * lanes + r];
    return moec__gptq_loss(loss, g, t->exact, lanes, err);
}

/* y = columns [lo, hi) of d U^T. */
static void times_factor(rounding *t, int64_t lo, int64_t hi)
{
    const moec_gptq *g = t->k.g;
    const int64_t lanes = t->k.lanes, width = hi - lo;
    float corner[BLOCK * BLOCK]; /* what lies below the diagonal is not of the factor */
    for (int64_t k = lo; k < hi; k++) {
        float *row = corner + (k - lo) * width;
        memset(row, 0, (size_t)(k - lo) * sizeof *row);
        memcpy(row + k - lo, moec__gptq_factor(g, k, k), (size_t)(hi - k) * sizeof *row);
    }
    moec_product(MOEC_COMPUTE_F32, false, false, width, lanes, width, corner, width, t->k.d + lo * lanes, lanes, false, t->y, lanes);
    if (hi < g->n)
        moec_product(g->opts.compute, false, false, width, lanes, g->n - hi, moec__gptq_factor(g, lo, hi), moec__gptq_stride(g),
                     t->k.d + hi * lanes, lanes, true, t->y, lanes);
}

static bool all_less(const double *a, const double *b, int64_t n)
{
    bool all = true;
    for (int64_t i = 0; i < n; i++)
        all = all && a[i] < b[i];
    return all;
}

/* best: the loss of d in g->order by H as given, sum_k variance_k (d U^T)_k^2 less what was added to the diagonal, which is in `added`.
 * The terms are not negative and the first are the largest: with enough > 0 the sum ends when it is above t->loss in as many rows. */
static void sum_loss(rounding *t, int64_t enough)
{
    const moec_gptq *g = t->k.g;
    const int64_t n = g->n, lanes = t->k.lanes;
    memset(t->sum, 0, (size_t)lanes * sizeof *t->sum);
    for (int64_t lo = 0, hi; lo < n; lo = hi) {
        hi = lo + BLOCK < n ? lo + BLOCK : n;
        times_factor(t, lo, hi);
        for (int64_t k = lo; k < hi; k++)
            moec_grid_squares(t->sum, t->y + (k - lo) * lanes, g->variance[k], lanes);
        for (int64_t r = 0; r < lanes; r++)
            t->best[r] = not_below_0(t->sum[r] - t->added[r]);
        if (enough > 0 && all_less(t->loss, t->best, enough))
            break;
    }
}

/* Codes to `other`, d in g->order, loss to best. */
static moec_status by_nearest(rounding *t, int64_t rows, bool whole, moec_err *err)
{
    const moec_gptq *g = t->k.g;
    const int64_t lanes = t->k.lanes;
    memset(t->added, 0, (size_t)lanes * sizeof *t->added);
    for (int64_t k = 0; k < g->n; k++) {
        const int64_t c = g->order[k], j = c / t->k.group;
        moec_grid_column(t->other + c * lanes, t->k.d + k * lanes, t->k.w + c * lanes, t->k.w + c * lanes, t->k.s + j * lanes,
                         t->k.z + j * lanes, t->k.top, t->added, 0.0, -g->added[c], lanes);
    }
    if (t->exact)
        return exact_loss(t, t->best, err);
    sum_loss(t, whole ? 0 : rows);
    return MOEC_OK;
}

/* --- GPTQ -------------------------------------------------------------------------------------------------------------- */

/* Columns [lo, hi) of g->order, at most LEAF, some rows of W at a time so that all of theirs stays in the first-level cache. */
static void round_leaf(rounding *t, int64_t lo, int64_t hi)
{
    const moec_gptq *g = t->k.g;
    const int64_t lanes = t->k.lanes;
    for (int64_t r = 0; r < lanes; r += CHUNK) {
        const int64_t chunk = lanes - r < CHUNK ? lanes - r : CHUNK;
        for (int64_t k = hi - 1; k >= lo; k--) {
            const int64_t c = g->order[k], j = c / t->k.group;
            float *d = t->k.d + k * lanes + r;
            moec_grid_pull(d, d + lanes, lanes, moec__gptq_factor(g, k, k) + 1, hi - k - 1, chunk);
            moec_grid_column(t->k.code + c * lanes + r, d, d, t->k.w + c * lanes + r, t->k.s + j * lanes + r, t->k.z + j * lanes + r,
                             t->k.top, t->loss + r, g->variance[k], g->added[c], chunk);
        }
    }
}

/* Rounds columns [lo, hi) of g->order, the last first. d holds the values that they are rounded from, but for what columns of this
 * range contribute, and then their errors. By halves, so that nearly all is products of large matrices. */
static void round_columns(rounding *t, int64_t lo, int64_t hi)
{
    const moec_gptq *g = t->k.g;
    const int64_t lanes = t->k.lanes;
    float *d = t->k.d;
    if (hi - lo <= LEAF) {
        round_leaf(t, lo, hi);
        return;
    }
    const int64_t middle = hi - (hi - lo + 2 * LEAF - 1) / (2 * LEAF) * LEAF;
    round_columns(t, middle, hi);
    moec_product(g->opts.compute, false, false, middle - lo, lanes, hi - middle, moec__gptq_factor(g, lo, middle),
                 moec__gptq_stride(g), d + middle * lanes, lanes, true, d + lo * lanes, lanes);
    round_columns(t, lo, middle);
}

/* Codes to `code`, d in g->order, loss. */
static moec_status by_gptq(rounding *t, moec_err *err)
{
    const moec_gptq *g = t->k.g;
    const int64_t lanes = t->k.lanes;
    memset(t->loss, 0, (size_t)lanes * sizeof *t->loss);
    for (int64_t k = 0; k < g->n; k++)
        memcpy(t->k.d + k * lanes, t->k.w + g->order[k] * lanes, (size_t)lanes * sizeof *t->k.d);
    if (g->n > 0)
        round_columns(t, 0, g->n);
    if (t->exact)
        return exact_loss(t, t->loss, err);
    for (int64_t r = 0; r < lanes; r++)
        t->loss[r] = not_below_0(t->loss[r]);
    return MOEC_OK;
}

/* --- sweeps ------------------------------------------------------------------------------------------------------------ */

/* d of every column by the codes; in g->order or as they lie. */
static void find_errors(rounding *t, bool ordered)
{
    const moec_gptq *g = t->k.g;
    const int64_t lanes = t->k.lanes;
    for (int64_t k = 0; k < g->n; k++) {
        const int64_t c = ordered ? g->order[k] : k, j = c / t->k.group;
        moec_grid_difference(t->k.d + k * lanes, NULL, t->k.w + c * lanes, t->k.code + c * lanes, t->k.s + j * lanes,
                             t->k.z + j * lanes, lanes);
    }
}

static moec_status by_sweeps(rounding *t, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_gptq *g = t->k.g;
    const int64_t lanes = t->k.lanes;
    find_errors(t, false);
    for (int k = 0; k < g->opts.sweeps; k++)
        MOEC_TRY(moec__gptq_sweep(&t->k, err));
    find_errors(t, true);
    memset(t->added, 0, (size_t)lanes * sizeof *t->added);
    for (int64_t k = 0; k < g->n; k++)
        moec_grid_squares(t->added, t->k.d + k * lanes, g->added[g->order[k]], lanes);
    sum_loss(t, 0);
done:
    return st;
}

/* --- a matrix ---------------------------------------------------------------------------------------------------------- */

static int64_t whole_lanes(int64_t rows)
{
    return (rows + MOEC_GRID_LANES - 1) / MOEC_GRID_LANES * MOEC_GRID_LANES;
}

static moec_status open_rounding(rounding *t, const moec_qcodes *c, const moec_gptq *g, int64_t rows, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t lanes = whole_lanes(rows);
    const size_t cells = (size_t)g->n * (size_t)lanes, scales = (size_t)(g->n / c->grid.group) * (size_t)lanes;
    *t = (rounding){.k = {.g = g, .group = c->grid.group, .top = (float)((1 << c->grid.bits) - 1),
                          .scale_type = c->grid.scale_type, .positive = c->grid.zeros}};
    MOEC_TRY(MOEC_NEW(t->k.w, cells, err));
    MOEC_TRY(MOEC_NEW(t->k.d, cells, err));
    MOEC_TRY(MOEC_NEW(t->k.s, scales, err));
    MOEC_TRY(MOEC_NEW(t->k.z, scales, err));
    MOEC_TRY(MOEC_NEW(t->k.code, cells, err));
    MOEC_TRY(MOEC_NEW(t->other, cells, err));
    MOEC_TRY(MOEC_NEW(t->y, BLOCK * (size_t)lanes, err));
    MOEC_TRY(MOEC_NEW(t->loss, (size_t)lanes, err));
    MOEC_TRY(MOEC_NEW(t->best, (size_t)lanes, err));
    MOEC_TRY(MOEC_NEW(t->added, (size_t)lanes, err));
    MOEC_TRY(MOEC_NEW(t->sum, (size_t)lanes, err));
    if (g->apart)
        MOEC_TRY(MOEC_NEW(t->exact, cells, err));
done:
    return st;
}

static void close_rounding(rounding *t)
{
    moec_free(t->k.w);
    moec_free(t->k.d);
    moec_free(t->k.s);
    moec_free(t->k.z);
    moec_free(t->k.code);
    moec_free(t->other);
    moec_free(t->y);
    moec_free(t->loss);
    moec_free(t->best);
    moec_free(t->added);
    moec_free(t->sum);
    moec_free(t->exact);
}

static moec_status round_rows(rounding *t, moec_qcodes *c, double *loss, double *nearest, const float *w, int64_t lo, int64_t rows,
                              moec_err *err)
{
    moec_status st = MOEC_OK;
    t->k.lanes = whole_lanes(rows);
    load_rows(t, c, w, lo, rows);
    MOEC_TRY(by_gptq(t, err));
    MOEC_TRY(by_nearest(t, rows, nearest != NULL, err));
    for (int64_t r = 0; r < rows; r++) {
        if (nearest)
            *nearest += t->best[r];
        if (t->loss[r] < t->best[r])
            t->best[r] = t->loss[r];
        else
            take_nearest(t, r);
    }
    if (t->k.g->sweeps)
        MOEC_TRY(by_sweeps(t, err));
    for (int64_t r = 0; r < rows; r++)
        *loss += t->best[r];
    store_rows(c, t, lo, rows);
done:
    return st;
}

moec_status moec_gptq_round(moec_qcodes *c, double *loss, double *nearest, const moec_gptq *g, const float *w, moec_err *err)
{
    moec_status st = MOEC_OK;
    rounding t = {0};
    *loss = 0.0;
    if (nearest)
        *nearest = 0.0;
    if (c->cols != g->n)
        return moec_fail(err, MOEC_EINVAL, "GPTQ: a matrix of %lld columns and a Hessian of %lld", (long long)c->cols, (long long)g->n);
    const int64_t panels = (c->rows + PANEL - 1) / PANEL, most = panels > 0 ? (c->rows + panels - 1) / panels : 0;
    MOEC_TRY(open_rounding(&t, c, g, most, err));
    for (int64_t lo = 0; lo < c->rows; lo += most)
        MOEC_TRY(round_rows(&t, c, loss, nearest, w, lo, c->rows - lo < most ? c->rows - lo : most, err));
    if (!isfinite(*loss) || (nearest && !isfinite(*nearest)))
        st = moec_fail(err, MOEC_ENUMERIC, "GPTQ: the loss is not finite; weights or Hessian are too large for float32");
done:
    close_rounding(&t);
    return st;
}
