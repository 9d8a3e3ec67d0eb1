/* What nested.c and nested_sweep.c share. Private to lib/method. */
#ifndef MOEC_METHOD_NESTED_PARTS_H
#define MOEC_METHOD_NESTED_PARTS_H

#include "method/nested.h"

/* Codes of 2 bits, then planes: what scale number l belongs to. */
static inline moec_qcodes *moec__nested_layer(moec_qcodes *c, int l)
{
    return l == 0 ? c : &c->plane[l - 1];
}

/** a x = b for a symmetric positive definite a [n,n] (lower triangle, lost), x = b before; false: it is not. */
bool moec__nested_solve(double *x, double a[MOEC_NESTED_SCALES][MOEC_NESTED_SCALES], int n);

/** Coordinate descent on all codes of a column at once, then all scales of a group by least squares, both in the metric of g and for the
 *  sum over widths of 4^k L; twice as often as g has sweeps through all columns. MOEC_ENOMEM. */
moec_status moec__nested_sweep(moec_qcodes *c, const float *w, const moec_gptq *g, moec_err *err) MOEC_USE_RESULT;

#endif
