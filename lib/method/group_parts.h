/* What the ways of grouping experts share: checks, blocks, experts that are fixed or without a mass. Private to
 * lib/method/group*.c. */
#ifndef MOEC_METHOD_GROUP_PARTS_H
#define MOEC_METHOD_GROUP_PARTS_H

#include "method/group.h"

/* What a matrix [E,E] holds, and how far two experts are from each other by it. */
typedef enum moec_group_matrix {
    MOEC_GROUP_DISTANCE, /* d_ij */
    MOEC_GROUP_KERNEL,   /* k_ii - 2 k_ij + k_jj */
    MOEC_GROUP_AFFINITY  /* -a_ij */
} moec_group_matrix;

/* Experts of one block that are left to be grouped: not fixed, with a mass. */
typedef struct moec_group_part {
    int64_t n, groups;  /* 1 <= groups < n */
    int64_t block;
    int32_t *member;    /* [n] ascending */
    double *mass;       /* [n] */
    double *matrix;     /* [n,n] theirs alone; may be overwritten */
} moec_group_part;

/* Sets label [n] to numbers below n, the same for the members of one group and no other, so that there are p->groups groups. */
typedef moec_status moec_group_fn(int32_t *label, const moec_group_part *p, void *ctx, moec_err *err);

typedef struct moec_group_way {
    moec_group_matrix kind;
    const double *matrix; /* [E,E] */
    moec_group_fn *fn;    /* not called for a block where every expert with a mass is a group of its own */
    void *ctx;
} moec_group_way;

/** MOEC_EINVAL as group.h says of all ways. */
moec_status moec_group_check(const moec_group_task *t, moec_err *err) MOEC_USE_RESULT;
/** How many of a block are fixed. */
int64_t moec_group_fixed(const moec_group_task *t, int64_t block);
/** The checks and then block by block: groups of those with a mass, their centres, the rest. */
moec_status moec_group_run(int32_t *centre, const moec_group_task *t, const moec_group_way *w, moec_err *err) MOEC_USE_RESULT;

#endif
