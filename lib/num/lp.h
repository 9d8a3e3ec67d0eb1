/* Choice of one option a group under a budget, and what is asked besides: the border to GLPK. No other file sees glpk.h.
 *
 *     minimise    sum_g cost[x_g]
 *     subject to  sum_g size[x_g] <= budget,   x_g one of the options of group g,
 *                 for each row r: at least `least` groups of it take one of its options
 *
 * (the multiple-choice knapsack problem with covering rows). The LP relaxation gives a bound, dynamic programming or branch and cut
 * the answer. */
#ifndef MOEC_NUM_LP_H
#define MOEC_NUM_LP_H

#include "base/err.h"

#include <stdbool.h>
#include <stdint.h>

/* At least `least` of these n options are taken. */
typedef struct moec_lp_row {
    const int64_t *option; /* [n] */
    int64_t n, least;
} moec_lp_row;

typedef struct moec_lp {
    int64_t groups;
    const int64_t *first;  /* [groups+1] options first[g] .. first[g+1]-1 are those of group g, at least one */
    const double *cost;    /* of each option, finite, 0 and above */
    const int64_t *size;   /* of each option, 0 and above */
    int64_t budget;
    const moec_lp_row *row;
    int64_t rows;
} moec_lp;

typedef struct moec_lp_answer {
    int64_t *pick;         /* [groups] option of each group */
    double cost, bound;    /* of the picks; no choice costs less than `bound` */
    int64_t size;
    bool proven;           /* cost - bound is 0 up to 1e-9 of cost, or the gap was closed by dynamic programming or branching */
} moec_lp_answer;

/** Solves it. How: options that another of the group beats in cost and size fall away (if no row names them); each group's least size
 *  is taken from budget and sizes, and their common divisor out; the greedy walk along the groups' convex hulls gives the LP's optimum
 *  without rows and a first choice, which dynamic programming over the groups that are nearest to changing makes better; rows' part in
 *  the bound comes from GLPK's simplex, started from the walk's basis. Options whose reduced cost is above the gap then fall away, and
 *  exact dynamic programming finds the best of what is left. Where that has too many states, or its choice misses a row, GLPK gets
 *  it with basis and incumbent and closes the gap by branching; from 2000 nodes on a relative gap of 1e-6 is enough, from 20000 on it
 *  stops at 1e-4, not `proven`. When `seconds` are over (0: no limit) the best so far is returned, not `proven`.
 *  Of options alike the first is taken, of groups alike the first get more; the same problem has the same answer unless time ended it.
 *  48 x 128 groups of 4: 0.005 to 0.08 s; sizes in bytes, of several kinds: 0.02 s; with rows that bind besides: seconds.
 *  @return MOEC_OK; MOEC_ENOFIT: no choice fits; the text says the least size that does; MOEC_EINVAL: a row asks for more than it
 *          has groups, rows that cannot be met together, an option in it that there is not or twice, an empty group, a size below
 *          0, sizes that add up to 2^63; MOEC_ENUMERIC: a cost is not finite or below 0; MOEC_EINTR; MOEC_ENOMEM.
 *  Release with moec_lp_answer_release. One thread; GLPK is not entered by two at once (a lock). */
MOEC_API moec_status moec_lp_solve(moec_lp_answer *out, const moec_lp *p, double seconds, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_lp_answer_release(moec_lp_answer *a);

#endif
