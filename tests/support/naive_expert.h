/* One expert by loops in float64, for tests. */
#ifndef MOEC_TESTS_NAIVE_EXPERT_H
#define MOEC_TESTS_NAIVE_EXPERT_H

#include "model/model.h"

enum { NAIVE_WIDTH = 64 }; /* most neurons */

/** Value i of a tensor; 0 where there is none. */
double naive_value(const moec_tensor *t, int64_t i);
/** out[t*ld ..] = down(act(gate x, up x)) of tokens x [n,H], biases included. */
void naive_expert(double *out, int64_t ld, const moec_model *m, const moec_layer *l, int64_t e, const float *x, int64_t n);

#endif
