/* Groups of experts from a matrix of distances: the ways of merging methods. Pure functions of small matrices; E experts, K groups.
 *
 * A grouping is written as centre[e]: the expert at the centre of e's group, centre[c] = c. All have exactly K groups. Every
 * argmin takes the lowest number on ties. Where `blocks` is above 1 the router chooses among that many equal blocks of
 * neighbouring experts: groups then stay inside a block and every block has K / blocks of them.
 * `fixed` [E] (or NULL): experts that are the centre of a group of their own, with nobody else in it.
 * `mass` [E]: weights, 0 for an expert that no token selected: it is put into the nearest group at the end, and is a centre
 * only where fewer than K have a mass (of those the lowest numbers). */
#ifndef MOEC_METHOD_GROUP_H
#define MOEC_METHOD_GROUP_H

#include "base/err.h"

#include <stdbool.h>
#include <stdint.h>

typedef struct moec_group_task {
    int64_t n, keep;          /* E, K */
    int64_t blocks;           /* 1: none */
    const double *distance;   /* [E,E] symmetric, not below 0; squared for moec_group_ward */
    const double *mass;       /* [E] not below 0: what a group's centre is chosen by, and weights of Ward */
    const bool *fixed;        /* [E] or NULL */
    uint64_t seed;            /* of restarts */
} moec_group_task;

/* All: MOEC_EINVAL: K out of range or not of the blocks' form, more fixed than K (named); MOEC_ENUMERIC: a distance or mass that
 * is not finite or below 0; MOEC_ENOMEM. The centre of a group is its member of largest mass. */

/** The K of largest mass are centres; every other expert joins the nearest. M-SMoE (arXiv 2310.01334, 3.2), MergeMoE. */
MOEC_API moec_status moec_group_nearest(int32_t *centre, const moec_group_task *t, moec_err *err) MOEC_USE_RESULT;
/** The same, but from the largest centre on each takes the size - 1 nearest that are free, until none is. MOEC_EINVAL: K
 *  groups of `size` do not hold E. REAM (arXiv 2604.04356): size 16. */
MOEC_API moec_status moec_group_pseudo(int32_t *centre, const moec_group_task *t, int64_t size, moec_err *err) MOEC_USE_RESULT;

typedef enum moec_linkage { MOEC_LINK_AVERAGE, MOEC_LINK_WARD, MOEC_LINK_COMPLETE, MOEC_LINK_SINGLE } moec_linkage;
/** Agglomeration: the two nearest groups become one until K are left.
 *
 *    average   d(a+b, c) = (n_a d_ac + n_b d_bc) / (n_a + n_b)                        HC-SMoE (arXiv 2410.08589)
 *    ward      on D_ab = m_a m_b / (m_a + m_b) * squared distance:
 *              D(a+b, c) = ((m_a + m_c) D_ac + (m_b + m_c) D_bc - m_c D_ab) / (m_a + m_b + m_c)
 *              with m = E[g^2], the output error of merging experts that are never selected together, with optimal weights
 *    complete, single   the larger, the smaller
 *
 *  height [E - K] (or NULL): distance of each union, in order. Cost: O(E^3). */
MOEC_API moec_status moec_group_linkage(int32_t *centre, double *height, const moec_group_task *t, moec_linkage linkage,
                                        moec_err *err) MOEC_USE_RESULT;
/** k-means in kernel form: of points of which only inner products are known, kernel [E,E] (positive semi-definite; t->distance
 *  is not read). |p_i - mean of C|^2 = k_ii - 2 mean_{j in C} k_ij + mean_{j,j' in C} k_jj'. k-means++ seeds, at most 100 rounds,
 *  a group that lost all members takes the point farthest from its own; the best of `restarts` by the sum of squared distances
 *  (*objective, or NULL), the first of equal ones. Sub-MoE (arXiv 2506.23266, 3.1). Cost: restarts * rounds * E^2. */
MOEC_API moec_status moec_group_kmeans(int32_t *centre, double *objective, const moec_group_task *t, const double *kernel,
                                       int restarts, moec_err *err) MOEC_USE_RESULT;
/** Spectral: rows of the K eigenvectors of the normalised Laplacian I - S^-1/2 A S^-1/2 with the smallest eigenvalues (A =
 *  affinity [E,E] symmetric and not below 0, S its row sums), scaled to length 1, clustered by k-means as above. UNCURL
 *  (arXiv 2409.01483): affinity from router logits. Cost: E^3. */
MOEC_API moec_status moec_group_spectral(int32_t *centre, const moec_group_task *t, const double *affinity, int restarts,
                                         moec_err *err) MOEC_USE_RESULT;

#endif
