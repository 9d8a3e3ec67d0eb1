/* Loops over values and the points of a grid that they are rounded to, for quantization; compiled for several instruction sets and
 * chosen at load time.
 *
 *     value = s (u - z),   u = 0 .. top whole;   u of x: x / s + z, cut to [0, top], to the nearest, halves to even
 *
 * A column is a vector of one value for each row of a matrix, with a scale of its own for each; its length is a multiple of
 * MOEC_GRID_LANES. No multiplication is fused with an addition and sums are in MOEC_GRID_LANES partial sums everywhere, so that
 * every instruction set gives the same bits. NaN rounds to 0. Safe from several threads. */
#ifndef MOEC_NUM_GRID_H
#define MOEC_NUM_GRID_H

#include "base/err.h"

#include <stdbool.h>
#include <stdint.h>

enum { MOEC_GRID_LANES = 16 };

typedef struct moec_grid_sums {
    float error; /* sum of m r^2,  r = x - s q,  q = u - z */
    float rq;    /* sum of m r q */
    float qq;    /* sum of m q^2: s + rq / qq is the best scale for these u, with the error  error - rq^2 / qq */
} moec_grid_sums;

/** out [count] of x [n] with weights m [n] rounded to grids of scales s [count] and zero points z [count] with one top; n a multiple of
 *  MOEC_GRID_LANES. Here x s^-1 is taken for x / s. Several at once take less time than one after the other. */
MOEC_API void moec_grid_measure(moec_grid_sums *out, const float *x, const float *m, int64_t n, const float *s, const float *z, float top,
                                int count);
/** For scales s [count] > 0 and z = (top + 1) / 2 with top odd: xq = sum m x q and qq = sum m q^2 of x and m as above, [k][0] for s_k and
 *  [k][1] for -s_k, q with its sign turned. For these u +-xq / qq is the best scale, with the error  sum m x^2 - xq^2 / qq. A third of
 *  the operations of moec_grid_measure; what rounding takes from the difference is 2^-22 of sum m x^2. */
MOEC_API void moec_grid_scan(float (*xq)[2], float (*qq)[2], const float *x, const float *m, int64_t n, const float *s, float top,
                             int count);
/** u of x [n], and back; any n. */
MOEC_API void moec_grid_codes(uint8_t *u, const float *x, int64_t n, float s, float z, float top);
MOEC_API void moec_grid_values(float *x, const uint8_t *u, int64_t n, float s, float z);

/** One column [n]: u of v; d = w - value; loss += weight (v - value)^2 - add (w - value)^2, this by float32. d may
 *  be v or w. */
MOEC_API void moec_grid_column(uint8_t *u, float *d, const float *v, const float *w, const float *s, const float *z, float top,
                               double *loss, double weight, double add, int64_t n);
/** d = w - value and q = u - z of a column [n]. Either may be NULL. */
MOEC_API void moec_grid_difference(float *d, float *q, const float *w, const uint8_t *u, const float *s, const float *z, int64_t n);
/** One step of descent in a column k: d [n] = w - value is its error, g = (D H)_k, h = H_kk. u goes to the best value with all other
 *  columns as they are where both d H d^T and that without `add` on the diagonal fall; d follows, change = d new - d old.
 *  Returns whether any changed. */
MOEC_API bool moec_grid_step(uint8_t *u, float *d, float *change, const float *g, const float *s, const float *z, float top, float h,
                             float add, int64_t n);
/** y += sum_i a_i x_i for `count` columns x_i [n] that lie `stride` apart. */
MOEC_API void moec_grid_pull(float *y, const float *x, int64_t stride, const float *a, int64_t count, int64_t n);
/** out = in [rows,cols] transposed, rows ldo and ldi apart; ldo at least rows rounded up to a multiple of MOEC_GRID_LANES: what lies
 *  behind the last value of a row becomes 0 up to there. */
MOEC_API void moec_grid_turn(float *out, int64_t ldo, const float *in, int64_t ldi, int64_t rows, int64_t cols);
/** The same of codes; any ldo >= rows, nothing is written behind a row. */
MOEC_API void moec_grid_turn_codes(uint8_t *out, int64_t ldo, const uint8_t *in, int64_t ldi, int64_t rows, int64_t cols);
/** y -= x t and sum += x y, by rows. */
MOEC_API void moec_grid_less(float *y, const float *x, const float *t, int64_t n);
MOEC_API void moec_grid_dot(float *sum, const float *x, const float *y, float weight, int64_t n);
/** sum += weight y^2 by rows. */
MOEC_API void moec_grid_squares(double *sum, const float *y, double weight, int64_t n);

#endif
