/* See nested.h. */
#include "method/nested_parts.h"

#include "base/mem.h"

#include <math.h>
#include <string.h>

moec_status moec_nested_new(moec_qcodes *out, const moec_qgrid *g, int64_t rows, int64_t cols, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_qgrid one = *g;
    *out = (moec_qcodes){.rows = rows};
    if (g->bits < MOEC_NESTED_LEAST || g->bits > MOEC_QUANT_BITS || g->zeros)
        return moec_fail(err, MOEC_EINVAL, "nested codes of %d bits%s: 2 to %d without zero points are possible", g->bits,
                         g->zeros ? " with zero points" : "", MOEC_QUANT_BITS);
    one.bits = MOEC_NESTED_LEAST;
    MOEC_TRY(moec_qcodes_new(out, &one, rows, cols, err));
    MOEC_TRY(MOEC_NEW(out->plane, (size_t)(g->bits - MOEC_NESTED_LEAST), err));
    one.bits = 1;
    for (; out->planes < g->bits - MOEC_NESTED_LEAST; out->planes++)
        MOEC_TRY(moec_qcodes_new(&out->plane[out->planes], &one, rows, cols, err));
done:
    if (st != MOEC_OK)
        moec_qcodes_release(out);
    return st;
}

void moec_nested_restore(float *out, const moec_qcodes *c, int bits)
{
    moec_qcodes narrow = *c;
    narrow.planes = bits - MOEC_NESTED_LEAST;
    moec_quant_restore(out, &narrow, 0, c->rows);
}

/* --- scales over all widths ------------------------------------------------------------------------------------------- */

/* One group: n values, L = planes + 1 layers of codes; layer[l][i] is what scale l is multiplied by: u - 2, then -1/2 or 1/2. */
typedef struct group {
    const float *w, *m;
    int64_t n;
    int layers;
    moec_dtype type;
    float *layer[MOEC_NESTED_SCALES]; /* [n] */
    float scale[MOEC_NESTED_SCALES];
} group;

/* J of nested.h over 4^2, summed in float64. */
static double error_of(const group *g)
{
    double sum = 0.0;
    for (int64_t i = 0; i < g->n; i++) {
        double left = (double)g->w[i], all = 0.0, count = 1.0;
        for (int l = 0; l < g->layers; l++, count *= 4.0) {
            left -= (double)g->scale[l] * (double)g->layer[l][i];
            all += count * left * left;
        }
        sum += all * (double)g->m[i];
    }
    return sum;
}

/* Codes for the scales as they are: the base to nearest, then signs of what is left. */
static void code(group *g)
{
    for (int64_t i = 0; i < g->n; i++) {
        const float u = g->scale[0] != 0.0f ? rintf(g->w[i] / g->scale[0]) : 0.0f;
        g->layer[0][i] = fminf(fmaxf(u, -2.0f), 1.0f);
        float left = g->w[i] - g->scale[0] * g->layer[0][i];
        for (int l = 1; l < g->layers; l++) {
            g->layer[l][i] = (left >= 0.0f) == (g->scale[l] >= 0.0f) ? 0.5f : -0.5f;
            left -= g->scale[l] * g->layer[l][i];
        }
    }
}

bool moec__nested_solve(double *x, double a[MOEC_NESTED_SCALES][MOEC_NESTED_SCALES], int n)
{
    for (int k = 0; k < n; k++) {
        for (int j = 0; j < k; j++)
            a[k][k] -= a[k][j] * a[k][j];
        if (!(a[k][k] > 1e-12))
            return false;
        a[k][k] = sqrt(a[k][k]);
        for (int i = k + 1; i < n; i++) {
            for (int j = 0; j < k; j++)
                a[i][k] -= a[i][j] * a[k][j];
            a[i][k] /= a[k][k];
        }
    }
    for (int k = 0; k < n; k++) {
        for (int j = 0; j < k; j++)
            x[k] -= a[k][j] * x[j];
        x[k] /= a[k][k];
    }
    for (int k = n - 1; k >= 0; k--) {
        for (int j = k + 1; j < n; j++)
            x[k] -= a[j][k] * x[j];
        x[k] /= a[k][k];
    }
    return true;
}

/* The scales of least J for the codes as they are. Scale l is in all widths from l on: sums of 4^k from the larger of two on. */
static bool fit(group *g)
{
    double a[MOEC_NESTED_SCALES][MOEC_NESTED_SCALES] = {{0.0}}, x[MOEC_NESTED_SCALES] = {0.0}, from[MOEC_NESTED_SCALES];
    double sum = 0.0, count = 1.0, mass = 0.0;
    for (int l = 1; l < g->layers; l++)
        count *= 4.0;
    for (int l = g->layers - 1; l >= 0; l--, count /= 4.0)
        from[l] = sum += count;
    for (int64_t i = 0; i < g->n; i++)
        mass += (double)g->m[i];
    for (int p = 0; p < g->layers; p++) {
        for (int64_t i = 0; i < g->n; i++)
            x[p] += (double)g->m[i] * (double)g->w[i] * (double)g->layer[p][i];
        x[p] *= from[p] / mass;
        for (int q = 0; q <= p; q++) {
            for (int64_t i = 0; i < g->n; i++)
                a[p][q] += (double)g->m[i] * (double)g->layer[p][i] * (double)g->layer[q][i];
            a[p][q] *= from[p] / mass;
        }
    }
    if (!moec__nested_solve(x, a, g->layers))
        return false;
    for (int l = 0; l < g->layers; l++) {
        g->scale[l] = moec_quant_scale((float)x[l], g->type);
        if (!isfinite(g->scale[l]))
            return false;
    }
    return true;
}

static void take(group *g, moec_qcodes *c, int64_t at)
{
    for (int l = 0; l < g->layers; l++) {
        const moec_qcodes *from = moec__nested_layer(c, l);
        g->scale[l] = from->scale[at];
        for (int64_t i = 0; i < g->n; i++)
            g->layer[l][i] = (float)from->code[at * g->n + i] - (l == 0 ? 2.0f : 0.5f);
    }
}

static void give(const group *g, moec_qcodes *c, int64_t at)
{
    for (int l = 0; l < g->layers; l++) {
        moec_qcodes *to = moec__nested_layer(c, l);
        to->scale[at] = g->scale[l];
        for (int64_t i = 0; i < g->n; i++)
            to->code[at * g->n + i] = (uint8_t)(g->layer[l][i] + (l == 0 ? 2.0f : 0.5f));
    }
}

moec_status moec_nested_refit(moec_qcodes *c, const float *w, const float *importance, int64_t lo, int64_t hi, moec_err *err)
{
    enum { ROUNDS = 6 };
    moec_status st = MOEC_OK;
    const int64_t n = c->grid.group, groups = c->cols / n;
    float *room = NULL, *m = NULL;
    group g = {.n = n, .layers = c->planes + 1, .type = c->grid.scale_type};
    MOEC_TRY(MOEC_NEW(room, (size_t)(g.layers * n), err));
    MOEC_TRY(MOEC_NEW(m, (size_t)n, err));
    for (int l = 0; l < g.layers; l++)
        g.layer[l] = room + l * n;
    g.m = m;
    for (int64_t k = lo * groups; k < hi * groups; k++) {
        bool any = false;
        for (int64_t i = 0; i < n; i++) {
            m[i] = importance ? importance[k % groups * n + i] : 1.0f;
            any = any || m[i] > 0.0f;
        }
        for (int64_t i = 0; i < n && !any; i++)
            m[i] = 1.0f;
        g.w = w + k * n;
        take(&g, c, k);
        double best = error_of(&g);
        for (int round = 0; round <= ROUNDS && fit(&g); round++) {
            double error = error_of(&g);
            if (error < best) {
                best = error;
                give(&g, c, k);
            }
            if (round == ROUNDS)
                break;
            code(&g);
            error = error_of(&g);
            if (!(error < best))
                break;
            best = error;
            give(&g, c, k);
        }
    }
done:
    moec_free(room);
    moec_free(m);
    return st;
}

/* --- rounding --------------------------------------------------------------------------------------------------------- */

/* Step by step, to nearest: w, then what is left of it. left, back [rows,cols]. */
static moec_status steps(moec_qcodes *c, float *left, float *back, const float *w, moec_qrange range, const float *importance,
                         moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t n = c->rows * c->cols;
    memcpy(left, w, (size_t)n * sizeof *left);
    for (int l = 0; l <= c->planes; l++) {
        moec_qcodes only = *moec__nested_layer(c, l);
        only.planes = 0;
        MOEC_TRY(moec_quant_range(&only, left, range, importance, 0, c->rows, err));
        moec_quant_nearest(&only, left, 0, c->rows);
        moec_quant_restore(back, &only, 0, c->rows);
        for (int64_t i = 0; i < n; i++)
            left[i] -= back[i];
    }
done:
    return st;
}

moec_status moec_nested_round(moec_qcodes *c, double *loss, double *nearest, const float *w, moec_rounding how, const moec_gptq *g,
                              const float *importance, moec_err *err)
{
    moec_status st = MOEC_OK;
    const size_t n = (size_t)(c->rows * c->cols);
    float *left = NULL, *back = NULL;
    const float *m = g ? moec_gptq_importance(g) : importance;
    MOEC_TRY(MOEC_NEW(left, n, err));
    MOEC_TRY(MOEC_NEW(back, n, err));
    MOEC_TRY(steps(c, left, back, w, how == MOEC_ROUND_NEAREST ? MOEC_QRANGE_MINMAX : MOEC_QRANGE_CLIP, m, err));
    if (how != MOEC_ROUND_NEAREST)
        MOEC_TRY(moec_nested_refit(c, w, m, 0, c->rows, err));
    if (!g)
        goto done;
    moec_quant_restore(back, c, 0, c->rows);
    MOEC_TRY(moec_gptq_loss(nearest, g, w, back, c->rows, err));
    MOEC_TRY(moec__nested_sweep(c, w, g, err));
    moec_quant_restore(back, c, 0, c->rows);
    MOEC_TRY(moec_gptq_loss(loss, g, w, back, c->rows, err));
done:
    moec_free(left);
    moec_free(back);
    return st;
}
