/* Groups by k-means on inner products, and spectral ones; see group.h. */
#include "method/group_parts.h"

#include "base/mem.h"
#include "base/random.h"
#include "num/linalg.h"

#include <math.h>
#include <string.h>

enum { ROUNDS = 100 };

typedef struct request {
    uint64_t seed;
    int restarts;
    double objective; /* sum over the blocks */
} request;

typedef struct kmeans {
    int64_t n, k;
    const double *kernel; /* [n,n] */
    double *cross;        /* [n,k] mean of k_ij over j in C */
    double *own;          /* [k] mean of k_jj' over j, j' in C */
    double *error;        /* [n] squared distance from the mean of its own group */
    int64_t *count;       /* [k] */
    int32_t *label, *before; /* [n] of this round and the last */
    uint64_t state;       /* of the generator */
} kmeans;

/* In [0, 1), 53 bits. */
static double draw(kmeans *m)
{
    const double u = (double)(moec_mix64(m->state) >> 11) * 0x1p-53;
    m->state += UINT64_C(0x9e3779b97f4a7c15);
    return u;
}

static double squared_distance(const kmeans *m, int64_t i, int64_t j)
{
    const double d = m->kernel[i * m->n + i] - 2.0 * m->kernel[i * m->n + j] + m->kernel[j * m->n + j];
    return d < 0.0 ? 0.0 : d; /* rounding; a NaN stays one */
}

/* k-means++: a point drawn by its squared distance from the nearest seed so far; where all are on seeds, the lowest one that
 * is none itself (label -1). */
static int64_t draw_seed(kmeans *m)
{
    double all = 0.0, sum = 0.0;
    int64_t chosen = -1;
    for (int64_t i = 0; i < m->n; i++)
        all += m->error[i];
    const double at = draw(m) * all;
    for (int64_t i = 0; i < m->n && all > 0.0; i++) {
        if (!(m->error[i] > 0.0))
            continue;
        chosen = i; /* the last one, should the sum not reach `at` */
        sum += m->error[i];
        if (sum > at)
            break;
    }
    for (int64_t i = 0; chosen < 0 && i < m->n; i++)
        if (m->before[i] < 0)
            chosen = i;
    return chosen;
}

/* Each point's label becomes its nearest seed. */
static void seed_groups(kmeans *m)
{
    for (int64_t i = 0; i < m->n; i++)
        m->before[i] = -1; /* not a seed */
    for (int32_t k = 0; k < m->k; k++) {
        const int64_t s = k == 0 ? (int64_t)(draw(m) * (double)m->n) : draw_seed(m);
        m->before[s] = k;
        for (int64_t i = 0; i < m->n; i++) {
            const double d = squared_distance(m, i, s);
            if (k == 0 || d < m->error[i]) {
                m->error[i] = d;
                m->label[i] = k;
            }
        }
        m->error[s] = 0.0;
        m->label[s] = k; /* also where it lies on an earlier one: no group begins without a member */
    }
}

static void find_means(kmeans *m)
{
    memset(m->cross, 0, (size_t)(m->n * m->k) * sizeof *m->cross);
    memset(m->own, 0, (size_t)m->k * sizeof *m->own);
    memset(m->count, 0, (size_t)m->k * sizeof *m->count);
    for (int64_t i = 0; i < m->n; i++) {
        m->count[m->label[i]]++;
        for (int64_t j = 0; j < m->n; j++)
            m->cross[i * m->k + m->label[j]] += m->kernel[i * m->n + j];
    }
    for (int64_t i = 0; i < m->n; i++) {
        for (int64_t c = 0; c < m->k; c++)
            m->cross[i * m->k + c] /= (double)m->count[c];
        m->own[m->label[i]] += m->cross[i * m->k + m->label[i]] / (double)m->count[m->label[i]];
    }
}

static double error_in(const kmeans *m, int64_t i, int64_t c)
{
    const double d = m->kernel[i * m->n + i] - 2.0 * m->cross[i * m->k + c] + m->own[c];
    return d < 0.0 ? 0.0 : d;
}

/* Groups without a member take the point that is farthest from its mean, of groups that have another. */
static void fill_groups(kmeans *m)
{
    memset(m->count, 0, (size_t)m->k * sizeof *m->count);
    for (int64_t i = 0; i < m->n; i++)
        m->count[m->label[i]]++;
    for (int32_t c = 0; c < m->k; c++) {
        int64_t farthest = -1;
        if (m->count[c] > 0)
            continue;
        for (int64_t i = 0; i < m->n; i++)
            if (m->count[m->label[i]] > 1 && (farthest < 0 || m->error[i] > m->error[farthest]))
                farthest = i;
        m->count[m->label[farthest]]--;
        m->count[c] = 1;
        m->label[farthest] = c;
        m->error[farthest] = 0.0;
    }
}

/* One restart from the seeds on; what is returned is the sum of squared distances from the means of the last labels. */
static double run(kmeans *m)
{
    double sum = 0.0;
    seed_groups(m);
    find_means(m);
    for (int round = 0; round < ROUNDS; round++) {
        memcpy(m->before, m->label, (size_t)m->n * sizeof *m->label);
        for (int64_t i = 0; i < m->n; i++) {
            m->label[i] = 0;
            m->error[i] = error_in(m, i, 0);
            for (int32_t c = 1; c < m->k; c++)
                if (error_in(m, i, c) < m->error[i]) {
                    m->error[i] = error_in(m, i, c);
                    m->label[i] = c;
                }
        }
        fill_groups(m);
        if (memcmp(m->before, m->label, (size_t)m->n * sizeof *m->label) == 0)
            break;
        find_means(m);
    }
    for (int64_t i = 0; i < m->n; i++)
        sum += error_in(m, i, m->label[i]);
    return sum;
}

static moec_status cluster(int32_t *label, const moec_group_part *p, void *ctx, moec_err *err)
{
    request *q = ctx;
    moec_status st = MOEC_OK;
    const size_t n = (size_t)p->n, k = (size_t)p->groups;
    double best = (double)INFINITY;
    kmeans m = {.n = p->n, .k = p->groups, .kernel = p->matrix};
    MOEC_TRY(MOEC_NEW(m.cross, n * k, err));
    MOEC_TRY(MOEC_NEW(m.own, k, err));
    MOEC_TRY(MOEC_NEW(m.error, n, err));
    MOEC_TRY(MOEC_NEW(m.count, k, err));
    MOEC_TRY(MOEC_NEW(m.label, n, err));
    MOEC_TRY(MOEC_NEW(m.before, n, err));
    for (int r = 0; r < q->restarts; r++) {
        m.state = moec_mix64(moec_mix64(moec_mix64(q->seed) ^ (uint64_t)p->block) ^ (uint64_t)r);
        const double sum = run(&m);
        if (sum < best) {
            best = sum;
            memcpy(label, m.label, n * sizeof *label);
        }
    }
    if (!isfinite(best)) /* no sum was: label is not set */
        st = moec_fail(err, MOEC_ENUMERIC, "inner products are so large that their sums are not finite; scale them down");
    q->objective += best;
done:
    moec_free(m.before);
    moec_free(m.label);
    moec_free(m.count);
    moec_free(m.error);
    moec_free(m.own);
    moec_free(m.cross);
    return st;
}

static moec_status run_request(int32_t *centre, double *objective, const moec_group_task *t, const moec_group_way *w,
                               moec_err *err)
{
    request *q = w->ctx;
    if (q->restarts < 1)
        return moec_fail(err, MOEC_EINVAL, "%d restarts of k-means: at least one is needed", q->restarts);
    moec_status st = moec_group_run(centre, t, w, err);
    if (objective)
        *objective = q->objective;
    return st;
}

moec_status moec_group_kmeans(int32_t *centre, double *objective, const moec_group_task *t, const double *kernel,
                              int restarts, moec_err *err)
{
    request q = {.seed = t->seed, .restarts = restarts};
    return run_request(centre, objective, t, &(moec_group_way){MOEC_GROUP_KERNEL, kernel, cluster, &q}, err);
}

/* --- spectral -------------------------------------------------------------------------------------------------------- */

/* a [n,n] becomes S^-1/2 A S^-1/2, of which the Laplacian's smallest eigenvalues are the largest. An expert that is like none
 * is a component of its own, with the eigenvalue 0 of the Laplacian that each component has. `root` is scratch [n]. */
static moec_status normalise(double *a, double *root, int64_t n, moec_err *err)
{
    for (int64_t i = 0; i < n; i++) {
        double sum = 0.0;
        for (int64_t j = 0; j < n; j++)
            sum += a[i * n + j];
        if (!isfinite(sum))
            return moec_fail(err, MOEC_ENUMERIC, "affinities are so large that their sums are not finite; scale them down");
        root[i] = sqrt(sum);
    }
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++) {
            if (root[i] > 0.0 && root[j] > 0.0)
                a[i * n + j] /= root[i] * root[j];
            else
                a[i * n + j] = i == j ? 1.0 : 0.0;
        }
    return MOEC_OK;
}

/* kernel [n,n] = inner products of the columns of vectors [k,n], each scaled to length 1; one that is 0 stays so. */
static void products_of_columns(double *kernel, const double *vectors, int64_t k, int64_t n)
{
    memset(kernel, 0, (size_t)(n * n) * sizeof *kernel);
    for (int64_t v = 0; v < k; v++)
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j <= i; j++)
                kernel[i * n + j] += vectors[v * n + i] * vectors[v * n + j];
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < i; j++) {
            const double both = sqrt(kernel[i * n + i]) * sqrt(kernel[j * n + j]);
            kernel[i * n + j] = kernel[j * n + i] = both > 0.0 ? kernel[i * n + j] / both : 0.0;
        }
    for (int64_t i = 0; i < n; i++)
        kernel[i * n + i] = kernel[i * n + i] > 0.0 ? 1.0 : 0.0;
}

static moec_status embed(int32_t *label, const moec_group_part *p, void *ctx, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t n = p->n, k = p->groups;
    double *root = NULL, *values = NULL, *vectors = NULL;
    MOEC_TRY(MOEC_NEW(root, (size_t)n, err));
    MOEC_TRY(MOEC_NEW(values, (size_t)k, err));
    MOEC_TRY(MOEC_NEW(vectors, (size_t)(k * n), err));
    MOEC_TRY(normalise(p->matrix, root, n, err));
    MOEC_TRY(moec_eigen(values, vectors, p->matrix, n, k, MOEC_EIGEN_LARGEST, err));
    products_of_columns(p->matrix, vectors, k, n);
    MOEC_TRY(cluster(label, p, ctx, err));
done:
    moec_free(vectors);
    moec_free(values);
    moec_free(root);
    return st;
}

moec_status moec_group_spectral(int32_t *centre, const moec_group_task *t, const double *affinity, int restarts, moec_err *err)
{
    request q = {.seed = t->seed, .restarts = restarts};
    return run_request(centre, NULL, t, &(moec_group_way){MOEC_GROUP_AFFINITY, affinity, embed, &q}, err);
}
