/* Clustering of the experts of a layer by distance. */
#ifndef MOEC_METHOD_CLUSTER_H
#define MOEC_METHOD_CLUSTER_H

#include "base/err.h"

#include <stdint.h>

/** Partial complete linkage down to exactly k clusters. With V the distances (symmetric; the diagonal is not read):
 *
 *    while the smallest V[i,j] < theta and there are more than k clusters, A that of i, B that of j:
 *        T = {V[c,j] : c in A} and {V[c,i] : c in B}
 *        max T < theta: A and B become one, and T is set to infinity; else V[i,j] is set to infinity
 *
 *  so only the distances from i to B and from j to A are tested, not all between A and B. theta is the smallest of the
 *  distances, or infinity, found by bisection, at which k clusters are reached. Ties go to the lowest i, then the lowest j.
 *  Source: STUN (arXiv:2409.06211) and its repository. Departs: it has one theta for all layers, found by steps, and takes the
 *  counts that result; here every layer has its own and stops at k.
 *  @param out [n] cluster of each, numbered by its lowest member. distance: [n, n], finite, may be below 0. 1 <= k <= n.
 *  MOEC_ENUMERIC: a distance is not finite; MOEC_EINVAL: k out of range; MOEC_ENOMEM. Cost: O(n^2 log n) and, for each of some
 *  2 log2(n) trials, O(n^2 times the size of a cluster). */
MOEC_API moec_status moec_cluster(int32_t *out, const double *distance, int64_t n, int64_t k, moec_err *err) MOEC_USE_RESULT;

#endif
