/* The choice of lp.h between its steps. Private to lib/num. */
#ifndef MOEC_NUM_LP_PARTS_H
#define MOEC_NUM_LP_PARTS_H

#include "num/lp.h"

#define MOEC_LP_EXACT 1e-12 /* gaps up to this share of the cost are none */

/* A step of a group along the lower convex hull of its options: option `lo` becomes `hi`. */
typedef struct moec__lp_step {
    int64_t group, lo, hi;
    int64_t size; /* of lo */
    double gain;  /* cost that a unit of size saves */
} moec__lp_step;

typedef struct moec__lp {
    const moec_lp *p;
    int64_t options;
    /* tightened: least sizes and their common divisor are out */
    int64_t *size;      /* [options] */
    int64_t budget, least, unit; /* size = least + unit * (sum of tightened sizes) */
    double *cost;       /* [options] above the least cost of the group */
    double base;        /* sum of these least costs */
    bool *out;          /* [options] another option of the group is no worse in any respect */
    int64_t *group;     /* [options] */
    int64_t *rows_at, *rows_of; /* [options+1], rows that option j is in */
    /* the walk along the hulls */
    moec__lp_step *step; /* [steps] by descending gain */
    int64_t steps;
    /* multipliers of budget and rows, and what comes of them */
    double lambda, *mu; /* mu: [rows] */
    double *reduced;    /* [options] what the relaxation loses when the option is taken */
    double bound;       /* no choice costs less, above base */
    bool *basic;        /* [options] of the relaxation's solution */
    bool tight;         /* it uses the whole budget */
    /* the best choice so far */
    int64_t *pick;      /* [groups] */
    int64_t *met;       /* [rows] */
    double best;        /* above base; INFINITY: none yet */
} moec__lp;

/* Checks p, tightens it and lets go of options that are no use. */
moec_status moec__lp_prepare(moec__lp *w, const moec_lp *p, moec_err *err) MOEC_USE_RESULT;
void moec__lp_release(moec__lp *w);
/* Solves the relaxation without rows (lambda, basic, tight; mu = 0), and makes a choice from it. False: none was found that meets the
 * rows. */
bool moec__lp_greedy(moec__lp *w);
/* Takes hull steps that still fit, those of most gain first, from the choice in `pick`. */
void moec__lp_fill(moec__lp *w);
/* reduced and bound from lambda and mu, whatever these are (0 and above). */
void moec__lp_weigh(moec__lp *w);
/* Changes `pick` for the better, or not. MOEC_ENOMEM. */
moec_status moec__lp_polish(moec__lp *w, moec_err *err) MOEC_USE_RESULT;
/* The best of all choices by dynamic programming, if that is little work and none of the rows stands in its way (then not `proven`).
 * MOEC_ENOMEM, MOEC_EINTR. */
moec_status moec__lp_exact(bool *proven, moec__lp *w, moec_err *err) MOEC_USE_RESULT;
/* Size left over by a choice, below 0: too large; false: it misses a row. met: [rows] or NULL. */
bool moec__lp_rest(int64_t *rest, const moec__lp *w, const int64_t *pick, int64_t *met);
bool moec__lp_in_row(const moec__lp *w, int64_t option, int64_t row);
/* Cost above base. */
double moec__lp_cost(const moec__lp *w, const int64_t *pick);

#endif
