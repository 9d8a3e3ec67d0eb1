/* An MoE layer of a tiny checkpoint with random tokens, for the tests of merging, and what merging measures of it. */
#ifndef MOEC_TESTS_MERGE_BENCH_H
#define MOEC_TESTS_MERGE_BENCH_H

#include "method/merge.h"

enum { BENCH_EXPERTS = 32, BENCH_HIDDEN = 64 }; /* most of them */

typedef struct bench {
    char *dir;
    moec_model *m;
    const moec_layer *l;
    int64_t n, experts, all, hidden, slots;
    float *x, *logits, *gates;
    int32_t *ids;
    double *out; /* [n,E,H] */
    moec_merge_task t;
} bench;

/** Layer 1 of two. Ends the test on failure. */
void bench_open(bench *b, const char *family, int64_t experts, int64_t top_k, int64_t n);
void bench_close(bench *b);
/** After a change: selections and gates by the logits; outputs by the weights. */
void bench_route(bench *b);
void bench_run(bench *b);

/* A second copy of an expert's weights, its neurons in another order; its views point into here. Shared memory, as a file's is:
 * what reads weights gives their pages back. */
typedef struct bench_twin {
    moec_tensor gate, up, down;
    float *store;
    size_t bytes;
} bench_twin;

void bench_copy(bench_twin *c, bench *b, int64_t of, int64_t to);
void bench_copy_free(bench_twin *c);

/** moec_merge_mass_of and moec_merge_distances, with one thread and with three: the test fails where they differ. */
void bench_masses(double *out, const bench *b, moec_merge_mass kind);
void bench_distances(double *d, double *kernel, const bench *b, moec_merge_distance kind);

#endif
