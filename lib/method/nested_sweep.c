/* Coordinate descent on nested codes and their scales for all widths at once; see nested_parts.h. With d_k = W_k - W of a row, k the widths,
 *
 *     J = sum over k of 4^k d_k M d_k^T,     M = H + diag(added) of the rounding
 *
 * A column's codes are a path from the base down: each width's value adds a step to the narrower one's, so that the change of J is a sum
 * along the path, and all paths of 2^b are looked at. The scales of a group are in J as in nested.h, with M in place of the diagonal. */
#include "method/gptq_parts.h"
#include "method/nested_parts.h"

#include "base/mem.h"
#include "num/product.h"

#include <math.h>
#include <string.h>

enum { PANEL = 128, L = MOEC_NESTED_SCALES, INNER = 2 };

typedef struct sweep {
    moec_qcodes *c;
    const float *metric; /* [n,n] */
    int64_t n, group;
    int layers;
    moec_compute compute;
    float count[L];      /* 4^k over the largest */
    float *d[L];         /* [PANEL,n] W_k - W */
    float *grad[L];      /* [PANEL,group] d_k M in the group at hand */
    float *value[L];     /* [group] what scale l is multiplied by in a row, for refit */
    float *product;      /* [group] */
} sweep;

/* The best path of a column. */
typedef struct path {
    int layers;
    const float *scale, *now, *grad, *count; /* of each layer: scale; value as it is less w; gradient; weight */
    float h, w;
    float best;
    uint8_t code[L], found[L];
} path;

static void walk(path *p, int l, float value, float cost)
{
    const int codes = l == 0 ? 4 : 2;
    for (int u = 0; u < codes; u++) {
        const float v = value + p->scale[l] * ((float)u - (l == 0 ? 2.0f : 0.5f)), t = v - p->w - p->now[l];
        const float all = cost + p->count[l] * t * (p->h * t + 2.0f * p->grad[l]);
        p->code[l] = (uint8_t)u;
        if (l + 1 < p->layers) {
            walk(p, l + 1, v, all);
        } else if (all < p->best) {
            p->best = all;
            memcpy(p->found, p->code, (size_t)p->layers);
        }
    }
}

/* Columns of group j in row r of the matrix, number i of the panel. */
static void descend(sweep *s, const float *w, int64_t i, int64_t r, int64_t j)
{
    const int64_t lo = j * s->group, groups = s->n / s->group;
    float scale[L], now[L], grad[L];
    for (int l = 0; l < s->layers; l++)
        scale[l] = moec__nested_layer(s->c, l)->scale[r * groups + j];
    for (int64_t k = 0; k < s->group; k++) {
        const int64_t at = r * s->n + lo + k;
        const float *row = s->metric + (lo + k) * s->n + lo;
        for (int l = 0; l < s->layers; l++) {
            now[l] = s->d[l][i * s->n + lo + k];
            grad[l] = s->grad[l][i * s->group + k];
        }
        path p = {.layers = s->layers, .scale = scale, .now = now, .grad = grad, .count = s->count, .h = row[k], .w = w[at],
                  .best = INFINITY};
        walk(&p, 0, 0.0f, 0.0f);
        if (!(p.best < 0.0f))
            continue;
        float value = 0.0f;
        for (int l = 0; l < s->layers; l++) {
            value += scale[l] * ((float)p.found[l] - (l == 0 ? 2.0f : 0.5f));
            const float d = value - p.w, t = d - now[l];
            moec__nested_layer(s->c, l)->code[at] = p.found[l];
            s->d[l][i * s->n + lo + k] = d;
            for (int64_t q = 0; q < s->group && t != 0.0f; q++)
                s->grad[l][i * s->group + q] += t * row[q];
        }
    }
}

/* d of a row's group from its codes and scales. */
static void differences(sweep *s, const float *w, int64_t i, int64_t r, int64_t j)
{
    const int64_t lo = j * s->group, groups = s->n / s->group;
    for (int64_t k = lo; k < lo + s->group; k++) {
        float value = 0.0f;
        for (int l = 0; l < s->layers; l++) {
            const moec_qcodes *c = moec__nested_layer(s->c, l);
            value += c->scale[r * groups + j] * ((float)c->code[r * s->n + k] - (l == 0 ? 2.0f : 0.5f));
            s->d[l][i * s->n + k] = value - w[r * s->n + k];
        }
    }
}

/* Scales of group j in row r: where J falls. Scale p is in all widths from p on. */
static void refit(sweep *s, const float *w, int64_t i, int64_t r, int64_t j)
{
    const int64_t lo = j * s->group, groups = s->n / s->group, n = s->group;
    double a[L][L] = {{0.0}}, full[L][L], x[L] = {0.0}, from[L], sum = 0.0, change = 0.0, t[L];
    for (int l = s->layers - 1; l >= 0; l--)
        from[l] = sum += (double)s->count[l];
    for (int p = 0; p < s->layers; p++)
        for (int64_t k = 0; k < n; k++)
            s->value[p][k] = (float)moec__nested_layer(s->c, p)->code[r * s->n + lo + k] - (p == 0 ? 2.0f : 0.5f);
    for (int p = 0; p < s->layers; p++) {
        for (int64_t k = 0; k < n; k++) {
            const float *row = s->metric + (lo + k) * s->n + lo;
            float y = 0.0f;
            for (int64_t q = 0; q < n; q++)
                y += row[q] * s->value[p][q];
            s->product[k] = y;
        }
        for (int q = 0; q < s->layers; q++) {
            double y = 0.0;
            for (int64_t k = 0; k < n; k++)
                y += (double)s->product[k] * (double)s->value[q][k];
            full[p][q] = a[p][q] = y * (p > q ? from[p] : from[q]);
        }
        for (int l = p; l < s->layers; l++) {
            double y = 0.0;
            for (int64_t k = 0; k < n; k++)
                y += (double)s->grad[l][i * n + k] * (double)s->value[p][k];
            x[p] -= (double)s->count[l] * y;
        }
    }
    double right[L];
    memcpy(right, x, sizeof right);
    if (!moec__nested_solve(x, a, s->layers))
        return;
    float to[L];
    for (int p = 0; p < s->layers; p++) {
        const float was = moec__nested_layer(s->c, p)->scale[r * groups + j];
        to[p] = moec_quant_scale(was + (float)x[p], s->c->grid.scale_type);
        t[p] = (double)to[p] - (double)was;
        if (!isfinite(to[p]))
            return;
    }
    for (int p = 0; p < s->layers; p++) {
        change -= 2.0 * t[p] * right[p];
        for (int q = 0; q < s->layers; q++)
            change += t[p] * t[q] * full[p][q];
    }
    if (!(change < 0.0)) /* rounded scales may be worse than those that are there */
        return;
    for (int p = 0; p < s->layers; p++)
        moec__nested_layer(s->c, p)->scale[r * groups + j] = to[p];
    differences(s, w, i, r, j);
}

static void gradients(sweep *s, int64_t rows, int64_t j)
{
    for (int l = 0; l < s->layers; l++)
        moec_product(s->compute, false, true, rows, s->group, s->n, s->d[l], s->n, s->metric + j * s->group * s->n, s->n, false,
                     s->grad[l], s->group);
}

static void panel(sweep *s, const float *w, int64_t lo, int64_t rows, int sweeps)
{
    const int64_t groups = s->n / s->group;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < groups; j++)
            differences(s, w, i, lo + i, j);
    for (int k = 0; k < sweeps; k++)
        for (int64_t j = 0; j < groups; j++) {
            gradients(s, rows, j);
            for (int64_t i = 0; i < rows; i++) {
                for (int again = 0; again < INNER; again++)
                    descend(s, w, i, lo + i, j);
                refit(s, w, i, lo + i, j);
            }
        }
}

moec_status moec__nested_sweep(moec_qcodes *c, const float *w, const moec_gptq *g, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t most = c->rows < PANEL ? c->rows : PANEL;
    sweep s = {.c = c, .metric = g->metric, .n = c->cols, .group = c->grid.group, .layers = c->planes + 1,
               .compute = g->opts.compute};
    if (!g->sweeps || c->cols == 0)
        return MOEC_OK;
    for (int l = 0; l < s.layers; l++) {
        s.count[l] = ldexpf(1.0f, 2 * (l - c->planes));
        MOEC_TRY(MOEC_NEW(s.d[l], (size_t)(most * s.n), err));
        MOEC_TRY(MOEC_NEW(s.grad[l], (size_t)(most * s.group), err));
        MOEC_TRY(MOEC_NEW(s.value[l], (size_t)s.group, err));
    }
    MOEC_TRY(MOEC_NEW(s.product, (size_t)s.group, err));
    for (int64_t lo = 0; lo < c->rows; lo += PANEL)
        panel(&s, w, lo, c->rows - lo < PANEL ? c->rows - lo : PANEL, 2 * g->opts.sweeps);
done:
    for (int l = 0; l < L; l++) {
        moec_free(s.d[l]);
        moec_free(s.grad[l]);
        moec_free(s.value[l]);
    }
    moec_free(s.product);
    return st;
}
