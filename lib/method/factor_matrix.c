/* Factoring one matrix and back; see factor.h. */
#include "method/factor.h"

#include "base/mem.h"
#include "num/linalg.h"

#include <math.h>
#include <string.h>

bool moec_factor_damp(double *c, int64_t n, double share)
{
    double trace = 0.0;
    for (int64_t i = 0; i < n; i++)
        trace += c[i * n + i];
    if (!(trace > 0.0) || !isfinite(trace))
        return false;
    for (int64_t i = 0; i < n; i++)
        c[i * n + i] += share * trace / (double)n;
    return true;
}

static moec_status doubles(double **out, const float *w, int64_t n, moec_err *err)
{
    moec_status st = MOEC_NEW(*out, (size_t)n, err);
    for (int64_t i = 0; st == MOEC_OK && i < n; i++)
        (*out)[i] = (double)w[i];
    return st;
}

/* out [rows,cols] = w c, or w itself. */
static moec_status times_c(double **out, const double *w, const double *c, int64_t rows, int64_t cols, moec_err *err)
{
    moec_status st = MOEC_NEW(*out, (size_t)(rows * cols), err);
    if (st != MOEC_OK)
        return st;
    if (c)
        moec_dgemm(false, false, rows, cols, cols, 1.0, w, cols, c, cols, 0.0, *out, cols);
    else
        memcpy(*out, w, (size_t)(rows * cols) * sizeof *w);
    return MOEC_OK;
}

/* g [rows,rows] = w c w^T */
static moec_status inner(double *g, const double *w, const double *c, int64_t rows, int64_t cols, moec_err *err)
{
    double *wc = NULL;
    moec_status st = times_c(&wc, w, c, rows, cols, err);
    if (st == MOEC_OK)
        moec_dgemm(false, true, rows, rows, cols, 1.0, wc, cols, w, cols, 0.0, g, rows);
    moec_free(wc);
    return st;
}

/* Of a tall w = Q R: W C W^T = Q (R C R^T) Q^T, so vectors of the small matrix in the middle do. */
static moec_status lead_tall(double *p, const double *w, const double *c, int64_t rows, int64_t cols, int64_t r, moec_err *err)
{
    moec_status st = MOEC_OK;
    double *q = NULL, *tri = NULL, *g = NULL, *u = NULL;
    MOEC_TRY(MOEC_NEW(q, (size_t)(rows * cols), err));
    MOEC_TRY(MOEC_NEW(tri, (size_t)(cols * cols), err));
    MOEC_TRY(MOEC_NEW(g, (size_t)(cols * cols), err));
    MOEC_TRY(MOEC_NEW(u, (size_t)(r * cols), err));
    memcpy(q, w, (size_t)(rows * cols) * sizeof *q);
    MOEC_TRY(moec_qr(tri, q, rows, cols, err));
    MOEC_TRY(inner(g, tri, c, cols, cols, err));
    MOEC_TRY(moec_eigen(NULL, u, g, cols, r, MOEC_EIGEN_LARGEST, err));
    moec_dgemm(false, true, r, rows, cols, 1.0, u, cols, q, cols, 0.0, p, rows);
done:
    moec_free(q);
    moec_free(tri);
    moec_free(g);
    moec_free(u);
    return st;
}

moec_status moec_factor_lead(double *p, const double *w, const double *c, int64_t rows, int64_t cols, int64_t r, moec_err *err)
{
    moec_status st = MOEC_OK;
    double *g = NULL;
    if (rows > cols && r <= cols)
        return lead_tall(p, w, c, rows, cols, r, err);
    MOEC_TRY(MOEC_NEW(g, (size_t)(rows * rows), err));
    MOEC_TRY(inner(g, w, c, rows, cols, err));
    MOEC_TRY(moec_eigen(NULL, p, g, rows, r, MOEC_EIGEN_LARGEST, err));
done:
    moec_free(g);
    return st;
}

/* out[o] = s_o C s_o^T */
static moec_status row_errors(double *out, const double *s, const double *c, int64_t rows, int64_t cols, moec_err *err)
{
    double *sc = NULL;
    moec_status st = times_c(&sc, s, c, rows, cols, err);
    for (int64_t o = 0; st == MOEC_OK && o < rows; o++) {
        out[o] = 0.0;
        for (int64_t i = 0; i < cols; i++)
            out[o] += sc[o * cols + i] * s[o * cols + i];
    }
    moec_free(sc);
    return st;
}

moec_status moec_factor_rows(int32_t *row, int64_t keep, const double *s, const double *c, int64_t rows, int64_t cols,
                             moec_err *err)
{
    moec_status st = MOEC_OK;
    double *error = NULL;
    moec_rank *order = NULL;
    bool *kept = NULL;
    MOEC_TRY(MOEC_NEW(error, (size_t)rows, err));
    MOEC_TRY(MOEC_NEW(order, (size_t)rows, err));
    MOEC_TRY(MOEC_NEW(kept, (size_t)rows, err));
    MOEC_TRY(row_errors(error, s, c, rows, cols, err));
    for (int64_t o = 0; o < rows; o++)
        order[o] = (moec_rank){.expert = (int32_t)o, .score = error[o]};
    moec_rank_sort(order, rows);
    for (int64_t k = 0; k < keep; k++)
        kept[order[k].expert] = true;
    for (int64_t o = 0, k = 0; o < rows; o++)
        if (kept[o])
            row[k++] = (int32_t)o;
done:
    moec_free(error);
    moec_free(order);
    moec_free(kept);
    return st;
}

/* a [rows,r] = p^T, b [r,cols] = p w. */
static moec_status project(float *a, float *b, const double *p, const double *w, const moec_factor_shape *s, moec_err *err)
{
    double *pw = NULL;
    const int64_t r = s->rank;
    moec_status st = MOEC_NEW(pw, (size_t)(r * s->cols), err);
    if (st != MOEC_OK)
        return st;
    moec_dgemm(false, false, r, s->cols, s->rows, 1.0, p, s->rows, w, s->cols, 0.0, pw, s->cols);
    for (int64_t i = 0; i < r * s->cols; i++)
        b[i] = (float)pw[i];
    for (int64_t o = 0; o < s->rows; o++)
        for (int64_t k = 0; k < r; k++)
            a[o * r + k] = (float)p[k * s->rows + o];
    moec_free(pw);
    return MOEC_OK;
}

static moec_status low_rank(float *const *piece, const moec_factor_shape *s, const double *w, const double *c, moec_err *err)
{
    double *p = NULL;
    moec_status st = MOEC_OK;
    MOEC_TRY(MOEC_NEW(p, (size_t)(s->rank * s->rows), err));
    MOEC_TRY(moec_factor_lead(p, w, c, s->rows, s->cols, s->rank, err));
    MOEC_TRY(project(piece[0], piece[1], p, w, s, err));
done:
    moec_free(p);
    return st;
}

/* out = w - a b */
static moec_status left_over(double *out, const float *a, const float *b, const double *w, const moec_factor_shape *s, moec_err *err)
{
    moec_status st = MOEC_OK;
    double *left = NULL, *right = NULL;
    MOEC_TRY(doubles(&left, a, s->rows * s->rank, err));
    MOEC_TRY(doubles(&right, b, s->rank * s->cols, err));
    memcpy(out, w, (size_t)(s->rows * s->cols) * sizeof *out);
    moec_dgemm(false, false, s->rows, s->cols, s->rank, -1.0, left, s->rank, right, s->cols, 1.0, out, s->cols);
done:
    moec_free(left);
    moec_free(right);
    return st;
}

static moec_status with_rows(float *const *piece, int32_t *index, const moec_factor_shape *s, const double *w, const double *c,
                             moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t n = s->rows;
    double *p = NULL, *rest = NULL;
    MOEC_TRY(MOEC_NEW(p, (size_t)(s->rank * n), err));
    MOEC_TRY(MOEC_NEW(rest, (size_t)(n * s->cols), err));
    MOEC_TRY(moec_factor_lead(p, w, c, n, s->cols, s->rank, err));
    MOEC_TRY(project(piece[0], piece[1], p, w, s, err));
    MOEC_TRY(left_over(rest, piece[0], piece[1], w, s, err));
    MOEC_TRY(moec_factor_rows(index, s->keep, rest, c, n, s->cols, err));
    memcpy(rest, w, (size_t)(n * s->cols) * sizeof *rest);
    for (int64_t k = 0; k < s->keep; k++)
        memset(rest + index[k] * s->cols, 0, (size_t)s->cols * sizeof *rest);
    MOEC_TRY(moec_factor_lead(p, rest, c, n, s->cols, s->rank, err));
    MOEC_TRY(project(piece[0], piece[1], p, w, s, err));
    MOEC_TRY(left_over(rest, piece[0], piece[1], w, s, err));
    for (int64_t k = 0; k < s->keep; k++)
        for (int64_t i = 0; i < s->cols; i++)
            piece[2][k * s->cols + i] = (float)rest[index[k] * s->cols + i];
done:
    moec_free(p);
    moec_free(rest);
    return st;
}

/* --- rows and combinations of them ------------------------------------------------------------------------------------ */

/* Rows of v [rows,r] in the order in which each is the farthest from those before it (ties: the lower), the first r of `index`;
 * behind them the others, ascending. part [r,rows]: R of that QR by rows of v; v is used up. */
static void pivots(int32_t *index, double *part, double *v, int64_t rows, int64_t r, bool *taken)
{
    for (int64_t k = 0; k < r; k++) {
        double best = -1.0, size;
        int64_t pick = 0;
        for (int64_t o = 0; o < rows; o++) {
            double norm = 0.0;
            for (int64_t i = 0; !taken[o] && i < r; i++)
                norm += v[o * r + i] * v[o * r + i];
            if (!taken[o] && norm > best) {
                best = norm;
                pick = o;
            }
        }
        taken[pick] = true;
        index[k] = (int32_t)pick;
        double *u = v + pick * r;
        size = sqrt(best);
        part[k * rows + pick] = size;
        for (int64_t i = 0; i < r; i++)
            u[i] = size > 0.0 ? u[i] / size : 0.0;
        for (int64_t o = 0; o < rows; o++) {
            double dot = 0.0;
            for (int64_t i = 0; !taken[o] && i < r; i++)
                dot += u[i] * v[o * r + i];
            for (int64_t i = 0; !taken[o] && i < r; i++)
                v[o * r + i] -= dot * u[i];
            if (!taken[o])
                part[k * rows + o] = dot;
        }
    }
    for (int64_t o = 0, k = r; o < rows; o++)
        if (!taken[o])
            index[k++] = (int32_t)o;
}

static moec_status pivot(float *const *piece, int32_t *index, const moec_factor_shape *s, const double *w, const double *c,
                         moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t n = s->rows, r = s->rank, cols = s->cols;
    double *p = NULL, *v = NULL, *part = NULL, *b = NULL, *own = NULL, *x = NULL;
    bool *taken = NULL;
    MOEC_TRY(MOEC_NEW(p, (size_t)(r * n), err));
    MOEC_TRY(MOEC_NEW(v, (size_t)(n * r), err));
    MOEC_TRY(MOEC_NEW(part, (size_t)(r * n), err));
    MOEC_TRY(MOEC_NEW(b, (size_t)(r * cols), err));
    MOEC_TRY(MOEC_NEW(own, (size_t)(n * cols), err));
    MOEC_TRY(MOEC_NEW(x, (size_t)r, err));
    MOEC_TRY(MOEC_NEW(taken, (size_t)n, err));
    MOEC_TRY(moec_factor_lead(p, w, c, n, cols, r, err));
    moec_dgemm(false, false, r, cols, n, 1.0, p, n, w, cols, 0.0, b, cols);
    moec_dgemm(true, false, n, cols, r, 1.0, p, n, b, cols, 0.0, own, cols);
    for (int64_t o = 0; o < n; o++)
        for (int64_t k = 0; k < r; k++)
            v[o * r + k] = p[k * n + o];
    pivots(index, part, v, n, r, taken);
    for (int64_t k = 0; k < r; k++)
        for (int64_t i = 0; i < cols; i++)
            piece[1][k * cols + i] = (float)own[index[k] * cols + i];
    for (int64_t o = r; o < n; o++) { /* R11 x = R12's column */
        for (int64_t k = r - 1; k >= 0; k--) {
            double sum = part[k * n + index[o]];
            for (int64_t j = k + 1; j < r; j++)
                sum -= part[k * n + index[j]] * x[j];
            x[k] = part[k * n + index[k]] > 0.0 ? sum / part[k * n + index[k]] : 0.0;
        }
        for (int64_t k = 0; k < r; k++)
            piece[0][(o - r) * r + k] = (float)x[k];
    }
done:
    moec_free(p);
    moec_free(v);
    moec_free(part);
    moec_free(b);
    moec_free(own);
    moec_free(x);
    moec_free(taken);
    return st;
}

static moec_status unpivot(float *w, const float *const *piece, const int32_t *index, const moec_factor_shape *s, moec_err *err)
{
    const int64_t r = s->rank, rest = s->rows - r;
    float *others = NULL;
    moec_status st = MOEC_NEW(others, (size_t)(rest * s->cols), err);
    if (st != MOEC_OK)
        return st;
    moec_sgemm(false, false, rest, s->cols, r, 1.0f, piece[0], r, piece[1], s->cols, 0.0f, others, s->cols);
    for (int64_t k = 0; k < s->rows; k++)
        memcpy(w + index[k] * s->cols, k < r ? piece[1] + k * s->cols : others + (k - r) * s->cols, (size_t)s->cols * sizeof *w);
    moec_free(others);
    return MOEC_OK;
}

/* --- tensor trains --------------------------------------------------------------------------------------------------- */

/* Where value (o, i) of the matrix stands in the tensor (o_1 i_1)(o_2 i_2).. */
static int64_t train_at(const moec_factor_shape *s, int64_t o, int64_t i)
{
    int64_t at = 0, step = 1;
    for (int64_t m = s->cores - 1; m >= 0; m--) {
        at += (o % s->out[m] * s->in[m] + i % s->in[m]) * step;
        step *= s->out[m] * s->in[m];
        o /= s->out[m];
        i /= s->in[m];
    }
    return at;
}

/* m [rows,cols] ~ core [rows,r] times next [r,cols]; next may not be m. */
static moec_status cut(float *core, double *next, const double *m, int64_t rows, int64_t cols, int64_t r, moec_err *err)
{
    moec_status st = MOEC_OK;
    const bool wide = rows <= cols;
    const int64_t n = wide ? rows : cols;
    double *v = NULL, *g = NULL, *u = NULL;
    MOEC_TRY(MOEC_NEW(v, (size_t)(r * n), err));
    MOEC_TRY(MOEC_NEW(g, (size_t)(n * n), err));
    moec_dgemm(!wide, wide, n, n, wide ? cols : rows, 1.0, m, cols, m, cols, 0.0, g, n);
    MOEC_TRY(moec_eigen(NULL, v, g, n, r, MOEC_EIGEN_LARGEST, err));
    if (wide) {
        moec_dgemm(false, false, r, cols, rows, 1.0, v, rows, m, cols, 0.0, next, cols);
        for (int64_t k = 0; k < r; k++)
            for (int64_t o = 0; o < rows; o++)
                core[o * r + k] = (float)v[k * rows + o];
        goto done;
    }
    MOEC_TRY(MOEC_NEW(u, (size_t)(rows * r), err));
    moec_dgemm(false, true, rows, r, cols, 1.0, m, cols, v, cols, 0.0, u, r);
    for (int64_t k = 0; k < r; k++) { /* u = U S: what comes next is cut by the size of S V^T, so S belongs there */
        double size = 0.0;
        for (int64_t o = 0; o < rows; o++)
            size += u[o * r + k] * u[o * r + k];
        size = sqrt(size);
        for (int64_t o = 0; o < rows; o++)
            core[o * r + k] = size > 0.0 ? (float)(u[o * r + k] / size) : 0.0f;
        for (int64_t i = 0; i < cols; i++)
            next[k * cols + i] = size * v[k * cols + i];
    }
done:
    moec_free(v);
    moec_free(g);
    moec_free(u);
    return st;
}

static moec_status train(float *const *piece, const moec_factor_shape *s, const double *w, moec_err *err)
{
    moec_status st = MOEC_OK;
    double *now = NULL, *next = NULL;
    int64_t cols = s->rows * s->cols;
    MOEC_TRY(MOEC_NEW(now, (size_t)cols, err));
    for (int64_t o = 0; o < s->rows; o++)
        for (int64_t i = 0; i < s->cols; i++)
            now[train_at(s, o, i)] = w[o * s->cols + i];
    for (int64_t m = 0; m + 1 < s->cores; m++) {
        const int64_t each = s->out[m] * s->in[m];
        cols /= each;
        MOEC_TRY(MOEC_NEW(next, (size_t)(s->bond[m + 1] * cols), err));
        MOEC_TRY(cut(piece[m], next, now, s->bond[m] * each, cols, s->bond[m + 1], err));
        moec_free(now);
        now = next;
        next = NULL;
    }
    for (int64_t i = 0; i < s->bond[s->cores - 1] * cols; i++)
        piece[s->cores - 1][i] = (float)now[i];
done:
    moec_free(now);
    moec_free(next);
    return st;
}

static moec_status untrain(float *w, const float *const *piece, const moec_factor_shape *s, moec_err *err)
{
    moec_status st = MOEC_OK;
    float *now = NULL, *next = NULL;
    int64_t rows = s->out[0] * s->in[0];
    MOEC_TRY(MOEC_NEW(now, (size_t)(rows * s->bond[1]), err));
    memcpy(now, piece[0], (size_t)(rows * s->bond[1]) * sizeof *now);
    for (int64_t m = 1; m < s->cores; m++) {
        const int64_t cols = s->out[m] * s->in[m] * s->bond[m + 1];
        MOEC_TRY(MOEC_NEW(next, (size_t)(rows * cols), err));
        moec_sgemm(false, false, rows, cols, s->bond[m], 1.0f, now, s->bond[m], piece[m], cols, 0.0f, next, cols);
        moec_free(now);
        now = next;
        next = NULL;
        rows *= s->out[m] * s->in[m];
    }
    for (int64_t o = 0; o < s->rows; o++)
        for (int64_t i = 0; i < s->cols; i++)
            w[o * s->cols + i] = now[train_at(s, o, i)];
done:
    moec_free(now);
    moec_free(next);
    return st;
}

/* --- all kinds ------------------------------------------------------------------------------------------------------- */

moec_status moec_factor_matrix(float *const *piece, int32_t *index, const moec_factor_shape *s, const float *w, const double *c,
                               moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t n = s->rows * s->cols;
    double *wd = NULL;
    MOEC_TRY(doubles(&wd, w, n, err));
    for (int64_t i = 0; s->kind == MOEC_FACTOR_BASE && i < n; i++)
        wd[i] -= (double)piece[2][i];
    if (s->kind == MOEC_FACTOR_MPO)
        MOEC_TRY(train(piece, s, wd, err));
    else if (s->kind == MOEC_FACTOR_PIVOT)
        MOEC_TRY(pivot(piece, index, s, wd, c, err));
    else if (s->kind == MOEC_FACTOR_ROWS && s->keep > 0)
        MOEC_TRY(with_rows(piece, index, s, wd, c, err));
    else
        MOEC_TRY(low_rank(piece, s, wd, c, err));
done:
    moec_free(wd);
    return st;
}

moec_status moec_factor_restore(float *w, const float *const *piece, const int32_t *index, const moec_factor_shape *s,
                                moec_err *err)
{
    const int64_t n = s->rows * s->cols;
    const int64_t listed = s->kind == MOEC_FACTOR_PIVOT ? s->rows : s->kind == MOEC_FACTOR_ROWS ? s->keep : 0;
    for (int64_t k = 0; k < listed; k++) /* they may come from a file */
        if (index[k] < 0 || index[k] >= s->rows)
            return moec_fail(err, MOEC_EFORMAT, "factors: row %d of %lld is listed", (int)index[k], (long long)s->rows);
    if (s->kind == MOEC_FACTOR_MPO)
        return untrain(w, piece, s, err);
    if (s->kind == MOEC_FACTOR_PIVOT)
        return unpivot(w, piece, index, s, err);
    if (s->kind == MOEC_FACTOR_BASE)
        memcpy(w, piece[2], (size_t)n * sizeof *w);
    moec_sgemm(false, false, s->rows, s->cols, s->rank, 1.0f, piece[0], s->rank, piece[1], s->cols,
               s->kind == MOEC_FACTOR_BASE ? 1.0f : 0.0f, w, s->cols);
    for (int64_t k = 0; s->kind == MOEC_FACTOR_ROWS && k < s->keep; k++)
        moec_saxpy(w + index[k] * s->cols, 1.0f, piece[2] + k * s->cols, s->cols);
    return MOEC_OK;
}

moec_status moec_factor_error(double *lost, double *whole, const float *w, const float *v, const double *c, int64_t rows,
                              int64_t cols, moec_err *err)
{
    moec_status st = MOEC_OK;
    double *d = NULL, *each = NULL;
    *lost = *whole = 0.0;
    MOEC_TRY(doubles(&d, w, rows * cols, err));
    MOEC_TRY(MOEC_NEW(each, (size_t)rows, err));
    MOEC_TRY(row_errors(each, d, c, rows, cols, err));
    for (int64_t o = 0; o < rows; o++)
        *whole += each[o];
    for (int64_t i = 0; i < rows * cols; i++)
        d[i] -= (double)v[i];
    MOEC_TRY(row_errors(each, d, c, rows, cols, err));
    for (int64_t o = 0; o < rows; o++)
        *lost += each[o];
done:
    moec_free(d);
    moec_free(each);
    return st;
}
