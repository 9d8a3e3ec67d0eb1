/* See cluster.h. */
#include "method/cluster.h"

#include "base/mem.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

typedef struct pair {
    double d;
    int32_t i, j; /* i < j */
} pair;

typedef struct linkage {
    const double *distance;
    int64_t n, k, n_pairs;
    pair *pairs;               /* ascending: the order in which they are the smallest, since values only become infinite */
    double *v;                 /* [n, n] */
    int32_t *label, *next, *last; /* members of a cluster are a list that begins at the one it is called by */
} linkage;

static int by_distance(const void *a, const void *b)
{
    const pair *x = a, *y = b;
    if (x->d != y->d)
        return x->d < y->d ? -1 : 1;
    if (x->i != y->i)
        return x->i < y->i ? -1 : 1;
    return (x->j > y->j) - (x->j < y->j);
}

/* Largest of V[c,to] for c in the cluster of a. */
static double farthest(const linkage *l, int32_t a, int32_t to)
{
    double most = -(double)INFINITY;
    for (int32_t c = l->label[a]; c >= 0; c = l->next[c])
        most = fmax(most, l->v[c * l->n + to]);
    return most;
}

static void close_off(linkage *l, int32_t a, int32_t to)
{
    for (int32_t c = l->label[a]; c >= 0; c = l->next[c])
        l->v[c * l->n + to] = l->v[to * l->n + c] = (double)INFINITY;
}

static void unite(linkage *l, int32_t a, int32_t b)
{
    const int32_t into = l->label[a], from = l->label[b];
    l->next[l->last[into]] = from;
    l->last[into] = l->last[from];
    for (int32_t c = from; c >= 0; c = l->next[c])
        l->label[c] = into;
}

/* Runs the loop for one theta; true when it came down to k clusters. */
static bool run(linkage *l, double theta)
{
    int64_t clusters = l->n;
    memcpy(l->v, l->distance, (size_t)(l->n * l->n) * sizeof *l->v);
    for (int32_t i = 0; i < l->n; i++) {
        l->label[i] = l->last[i] = i;
        l->next[i] = -1;
    }
    for (int64_t p = 0; p < l->n_pairs && l->pairs[p].d < theta && clusters > l->k; p++) {
        const int32_t i = l->pairs[p].i, j = l->pairs[p].j;
        if (l->label[i] == l->label[j] || isinf(l->v[i * l->n + j]))
            continue; /* in one cluster nothing tests the pair again */
        if (fmax(farthest(l, i, j), farthest(l, j, i)) < theta) {
            close_off(l, i, j);
            close_off(l, j, i);
            unite(l, i, j);
            clusters--;
        } else {
            l->v[i * l->n + j] = l->v[j * l->n + i] = (double)INFINITY;
        }
    }
    return clusters <= l->k;
}

/* The smallest theta of the sorted distances, infinity behind them, that reaches k, by bisection; leaves its clusters. */
static void bisect(linkage *l)
{
    int64_t lo = -1, hi = l->n_pairs; /* lo does not reach k; at infinity nothing is ever closed off between clusters */
    while (hi - lo > 1) {
        const int64_t mid = lo + (hi - lo) / 2;
        if (run(l, l->pairs[mid].d))
            hi = mid;
        else
            lo = mid;
    }
    run(l, hi < l->n_pairs ? l->pairs[hi].d : (double)INFINITY);
}

/* Labels in the order of the lowest members. */
static void number(int32_t *out, const linkage *l)
{
    int32_t clusters = 0;
    for (int64_t i = 0; i < l->n; i++) {
        int64_t first = 0;
        while (l->label[first] != l->label[i])
            first++;
        out[i] = first < i ? out[first] : clusters++;
    }
}

moec_status moec_cluster(int32_t *out, const double *distance, int64_t n, int64_t k, moec_err *err)
{
    moec_status st = MOEC_OK;
    linkage l = {.distance = distance, .n = n, .k = k};
    if (k < 1 || k > n)
        return moec_fail(err, MOEC_EINVAL, "%lld clusters of %lld: out of range", (long long)k, (long long)n);
    const size_t cells = (size_t)n;
    MOEC_TRY(MOEC_NEW(l.pairs, cells * (cells - 1) / 2, err));
    MOEC_TRY(MOEC_NEW(l.v, cells * cells, err));
    MOEC_TRY(MOEC_NEW(l.label, cells, err));
    MOEC_TRY(MOEC_NEW(l.next, cells, err));
    MOEC_TRY(MOEC_NEW(l.last, cells, err));
    for (int32_t i = 0; i < n; i++)
        for (int32_t j = i + 1; j < n; j++) {
            const double d = distance[i * n + j];
            if (!isfinite(d)) {
                st = moec_fail(err, MOEC_ENUMERIC, "the distance between %d and %d is not finite", (int)i, (int)j);
                goto done;
            }
            l.pairs[l.n_pairs++] = (pair){d, i, j};
        }
    if (l.n_pairs > 0)
        qsort(l.pairs, (size_t)l.n_pairs, sizeof *l.pairs, by_distance);
    bisect(&l);
    number(out, &l);
done:
    moec_free(l.last);
    moec_free(l.next);
    moec_free(l.label);
    moec_free(l.v);
    moec_free(l.pairs);
    return st;
}
