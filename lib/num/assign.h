/* Linear assignment: which permutation has the largest sum. */
#ifndef MOEC_NUM_ASSIGN_H
#define MOEC_NUM_ASSIGN_H

#include "base/err.h"

#include <stdint.h>

/** to = argmax over permutations of sum_i profit[i, to[i]].
 *  Shortest augmenting paths with potentials after column reduction and augmenting row reduction (Jonker and Volgenant,
 *  Computing 38, 1987, the LAPJV of their paper), in float64 on the float32 profits. Of several best permutations one, always
 *  the same. One thread.
 *  @param to [n]; profit [n,n], row-major.
 *  MOEC_ENUMERIC: a profit is not finite; MOEC_ENOMEM. Cost: O(n^3) at worst, far less as a rule. Memory: 7 n values: the matrix
 *  is not copied. */
MOEC_API moec_status moec_assign(int32_t *to, const float *profit, int64_t n, moec_err *err) MOEC_USE_RESULT;

/** The same where row i can only have the columns col[i*each ..], ascending and distinct, with profit[i*each ..]: the best
 *  among permutations of as many rows as can be matched so; rows that cannot get the columns that are left over, in order.
 *  Errors as moec_assign; MOEC_EINVAL: a column out of range. Memory: O(n). */
MOEC_API moec_status moec_assign_sparse(int32_t *to, const int32_t *col, const float *profit, int64_t n, int64_t each,
                                        moec_err *err) MOEC_USE_RESULT;

#endif
