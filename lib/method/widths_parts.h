/* Widths by methods of kind MOEC_QUANTIZE, between their steps. Private to lib/method. */
#ifndef MOEC_METHOD_WIDTHS_PARTS_H
#define MOEC_METHOD_WIDTHS_PARTS_H

#include "method/widths.h"

enum { MOEC_WIDTHS_MOST = 8 };

/* What has one width each, in order of layers, experts, matrices. */
typedef struct moec__items {
    const moec_method *me;
    const moec_widths_request *r;
    int64_t layers, experts, n;
    int64_t *size;   /* [n, n_widths] in the budget's unit: bits of codes, or bytes */
    int64_t *layer;  /* [n] the first, of MoE layers */
    bool *guarded;   /* [n] has the largest candidate */
    int64_t budget;
    int64_t *pick;   /* [n] index of its width */
    double cost, bound;
    bool proven;
} moec__items;

/* Constants of a method (moec_method.row). */
typedef struct moec__widths_row {
    moec_rounding rounding;
    /* Either costs of a program: [layers, experts, slots, MOEC_QUANT_WIDTHS], of each matrix (3 slots) or of whole experts (1); */
    moec_status (*costs)(double *out, int slots, const struct moec__widths_row *row, const moec__items *x, moec_err *err);
    bool whole;             /* of whole experts only */
    bool by_layer, rows;    /* pmq's */
    double alpha, beta, gamma;
    /* or how much each item matters; neither: uniform. */
    moec_status (*importance)(double *out, const moec__items *x, moec_err *err);
    bool gains;             /* costs are scaled by what errors of the layer cost at the logits, where that was measured */
} moec__widths_row;

/* Item of a matrix (0 gate, 1 up, 2 down). */
int64_t moec__item_of(const moec__items *x, int64_t layer, int64_t expert, int64_t matrix);
/* sum over domains of a float64 statistic's cell, as widths.h says. */
double moec__widths_sum(const moec_stats *s, moec_stat kind, int64_t layer, int64_t cell);
/* [experts] shares of the layer that experts have of a count or sum. */
void moec__widths_share(double *out, const moec_stats *s, moec_stat kind, int64_t layer, int64_t experts);
/* Fills x->pick by a program, by importance. */
moec_status moec__widths_program(moec__items *x, const moec__widths_row *row, moec_err *err) MOEC_USE_RESULT;
moec_status moec__widths_ranked(moec__items *x, const moec__widths_row *row, moec_err *err) MOEC_USE_RESULT;
/* The largest index of a width that all items without protection can have; -1: none. */
int64_t moec__widths_largest(const moec__items *x);

#endif
