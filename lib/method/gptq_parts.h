/* What gptq.c has made of a Hessian, for gptq_round.c and gptq_sweep.c. Private to lib/method.
 *
 * Rounding works on the transposed matrix: a column of W is a row here, `lanes` values of as many rows of W one behind the other
 * (num/grid.h), so that every loop runs along them. */
#ifndef MOEC_METHOD_GPTQ_PARTS_H
#define MOEC_METHOD_GPTQ_PARTS_H

#include "method/gptq.h"

struct moec_gptq {
    int64_t n;
    moec_gptq_opts opts;
    /* [n,n+1]: row i holds row i of the lower triangle of H as given, i+1 values, and behind it row i of an upper triangle, n-i values,
     * for the factor. Two triangles in one block: these are the largest things here, and new pages cost as much as the factor does. */
    double *cells;
    float *importance;  /* [n] diagonal of H */
    /* H + diag(added) = U^T diag(variance) U with rows and columns in the order in which they are NOT rounded: the last first. So U
     * is upper and of unit diagonal, the ordinary factor (the A of gptq.h, transposed and turned round); the value that column k is
     * rounded from is that of w plus the errors of those behind it times row k of U. */
    int64_t *order;     /* [n] columns of W, that which is rounded last first */
    double *variance;   /* [n] in this order */
    double *added;      /* [n] by column of W */
    bool apart;         /* what was added is so much that H's own loss drowns in it, or H is replaced by the identity */
    /* for sweeps: H + diag(added) over its mean diagonal, and `added` over the same */
    bool sweeps;        /* the rest is there */
    float *metric;      /* [n,n] */
    float *share;       /* [n] */
};

/* Row i of H as given, i+1 values. */
static inline double *moec__gptq_given(const moec_gptq *g, int64_t i)
{
    return g->cells + i * (g->n + 1);
}

/* U_ik, k >= i: floats over the first half of where the doubles of a row were. */
static inline float *moec__gptq_factor(const moec_gptq *g, int64_t i, int64_t k)
{
    return (float *)(void *)(g->cells + i * (g->n + 1) + 1 + i) + (k - i);
}

/* Floats from one row of U to the next. */
static inline int64_t moec__gptq_stride(const moec_gptq *g)
{
    return 2 * g->n + 3;
}

/** loss [lanes] += d H d^T for each of `lanes` rows d, by H as it was given, in float64; d [n,lanes]. MOEC_ENOMEM. */
moec_status moec__gptq_loss(double *loss, const moec_gptq *g, const double *d, int64_t lanes, moec_err *err) MOEC_USE_RESULT;

/* Some rows of a matrix while they are rounded. */
typedef struct moec_gptq_work {
    const moec_gptq *g;
    int64_t lanes, group; /* lanes: rows, filled up to a multiple of MOEC_GRID_LANES with rows of 0 */
    float top;
    moec_dtype scale_type;
    bool positive;        /* scales must be: there are zero points */
    float *w, *d;         /* [n,lanes] weights; weights less values, or in g->order what becomes that */
    float *s, *z;         /* [n/group,lanes] */
    uint8_t *code;        /* [n,lanes] */
} moec_gptq_work;

/** One sweep of coordinate descent over all columns and scales; d, s and code follow. MOEC_ENOMEM. */
moec_status moec__gptq_sweep(moec_gptq_work *k, moec_err *err) MOEC_USE_RESULT;

#endif
