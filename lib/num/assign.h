/* Linear assignment: which permutation has the largest sum. */
#ifndef MOEC_NUM_ASSIGN_H
#define MOEC_NUM_ASSIGN_H

#include "base/err.h"

#include <stdint.h>

/** to = argmax over permutations of sum_i profit[i, to[i]].
 *  Shortest augmenting paths with potentials, row after row, in float64 on the float32 profits. Of several best permutations
 *  one, always the same. One thread.
 *  @param to [n]; profit [n,n], row-major.
 *  MOEC_ENUMERIC: a profit is not finite; MOEC_ENOMEM. Cost: O(n^3) at worst, far less as a rule. Memory: 48 n bytes: the matrix
 *  is not copied.
 *  Source: Jonker and Volgenant, Computing 38, 1987, the augmentation of their LAPJV. Departs: without the reductions before
 *  it, which save nothing once the loop over a row is vectorised. */
MOEC_API moec_status moec_assign(int32_t *to, const float *profit, int64_t n, moec_err *err) MOEC_USE_RESULT;

/** The same where row i can only have the columns col[i*each ..], ascending and distinct, with profit[i*each ..]: the best
 *  among permutations of as many rows as can be matched so; rows that cannot get the columns that are left over, in order.
 *  MOEC_ENUMERIC and MOEC_ENOMEM as above; MOEC_EINVAL: a row's columns are not such, or more than 2^30 - 1 rows. Cost: n paths
 *  of at most n each log n steps, far less as a rule. Memory: 80 n bytes. */
MOEC_API moec_status moec_assign_sparse(int32_t *to, const int32_t *col, const float *profit, int64_t n, int64_t each,
                                        moec_err *err) MOEC_USE_RESULT;

#endif
