/* Groups of experts from a matrix of distances: the ways of merging methods. Pure functions of small matrices; E experts, K groups.
 *
 * A grouping is written as centre[e]: the expert at the centre of e's group, centre[c] = c. All have exactly K groups. Every
 * argmin takes the lowest number on ties. Where `blocks` is above 1 the router chooses among that many equal blocks of
 * neighbouring experts: groups then stay inside a block and every block has K / blocks of them.
 * `fixed` [E] (or NULL): experts that are the centre of a group of their own, with nobody else in it.
 * `mass` [E]: weights, 0 for an expert that no token selected: groups are made without it, and at the end it joins that with the
 * nearest centre, fixed ones aside. It is a centre only where fewer than K have a mass (of those without the lowest numbers); it
 * then joins one without a mass only where none has one. Nearest by the inner products is least k_ii - 2 k_ij + k_jj, by the
 * affinity largest. */
#ifndef MOEC_METHOD_GROUP_H
#define MOEC_METHOD_GROUP_H

#include "base/err.h"

#include <stdbool.h>
#include <stdint.h>

typedef struct moec_group_task {
    int64_t n, keep;          /* E, K */
    int64_t blocks;           /* 1: none */
    const double *distance;   /* [E,E] symmetric, not below 0; squared for MOEC_LINK_WARD */
    const double *mass;       /* [E] not below 0: what a group's centre is chosen by, and weights of Ward */
    const bool *fixed;        /* [E] or NULL */
    uint64_t seed;            /* of restarts */
} moec_group_task;

/* All set centre [E], whose contents mean nothing on an error. MOEC_EINVAL: K out of range or not of the blocks' form; more fixed
 * than K, or K of them and others that have no group then (named); restarts below 1. MOEC_ENUMERIC: a mass, distance or affinity
 * that is not finite or below 0, an inner product that is not finite or below 0 on the diagonal, or values so large that sums
 * of them are not finite; the eigenvectors were not found. MOEC_ENOMEM. The centre of a group is its member of largest mass.
 * Nothing is done in parallel; the same task gives the same bytes. Memory: at most two matrices more. */

/** The K of largest mass are centres; every other expert joins the nearest. M-SMoE (arXiv 2310.01334, 3.2), MergeMoE. */
MOEC_API moec_status moec_group_nearest(int32_t *centre, const moec_group_task *t, moec_err *err) MOEC_USE_RESULT;
/** The same, but from the largest centre on each takes the size - 1 nearest that are free, until none is. MOEC_EINVAL: K
 *  groups of `size` do not hold E (in a block, fixed ones aside). REAM (arXiv 2604.04356): size 16. Departs: experts without
 *  a mass join the nearest centre behind that, whatever its size is, and do not take up a place. */
MOEC_API moec_status moec_group_pseudo(int32_t *centre, const moec_group_task *t, int64_t size, moec_err *err) MOEC_USE_RESULT;

/** Would the above refuse? Mass and distance are not read. */
MOEC_API moec_status moec_group_pseudo_fits(const moec_group_task *t, int64_t size, moec_err *err) MOEC_USE_RESULT;

typedef enum moec_linkage { MOEC_LINK_AVERAGE, MOEC_LINK_WARD, MOEC_LINK_COMPLETE, MOEC_LINK_SINGLE } moec_linkage;
/** Agglomeration: the two nearest groups become one until K are left.
 *
 *    average   d(a+b, c) = (n_a d_ac + n_b d_bc) / (n_a + n_b)                        HC-SMoE (arXiv 2410.08589)
 *    ward      on D_ab = m_a m_b / (m_a + m_b) * squared distance:
 *              D(a+b, c) = ((m_a + m_c) D_ac + (m_b + m_c) D_bc - m_c D_ab) / (m_a + m_b + m_c)
 *              with m = E[g^2], the output error of merging experts that are never selected together, with optimal weights
 *    complete, single   the larger, the smaller
 *
 *  n counts experts, m is t->mass; of pairs equally near that of the lowest a, then b, groups called by their lowest member.
 *  height [E - K] (or NULL): distance of each union, in order, a block behind the other; in each 0 behind them for every expert
 *  without a mass that joined. Cost: O(E^3). */
MOEC_API moec_status moec_group_linkage(int32_t *centre, double *height, const moec_group_task *t, moec_linkage linkage,
                                        moec_err *err) MOEC_USE_RESULT;
/** k-means in kernel form: of points of which only inner products are known, kernel [E,E] (positive semi-definite; t->distance
 *  is not read). |p_i - mean of C|^2 = k_ii - 2 mean_{j in C} k_ij + mean_{j,j' in C} k_jj'. k-means++ seeds, at most 100 rounds,
 *  a group that lost all members takes the point farthest from its own mean that has company there; every point weighs the same;
 *  the best of `restarts` by the sum of squared distances (*objective, or NULL; without fixed experts and such without a mass),
 *  the first of equal ones, in each block. Sub-MoE (arXiv 2506.23266, 3.1). Cost: restarts * rounds * E^2. */
MOEC_API moec_status moec_group_kmeans(int32_t *centre, double *objective, const moec_group_task *t, const double *kernel,
                                       int restarts, moec_err *err) MOEC_USE_RESULT;
/** Spectral: rows of the eigenvectors, as many as groups are made, of the normalised Laplacian I - S^-1/2 A S^-1/2 with the
 *  smallest eigenvalues (A = affinity [E,E] symmetric and not below 0, S its row sums, the diagonal in both as it is given),
 *  scaled to length 1, clustered by k-means as above. An expert with S = 0 is a component of its own. UNCURL
 *  (arXiv 2409.01483): affinity from router logits. Cost: E^3. */
MOEC_API moec_status moec_group_spectral(int32_t *centre, const moec_group_task *t, const double *affinity, int restarts,
                                         moec_err *err) MOEC_USE_RESULT;

#endif
