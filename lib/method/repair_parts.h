/* What the ways of repair.h share: an expert's tokens, its weights in float32, its outputs. Private to lib/method and its
 * tests. */
#ifndef MOEC_METHOD_REPAIR_PARTS_H
#define MOEC_METHOD_REPAIR_PARTS_H

#include "method/repair.h"
#include "num/vec.h"

enum {
    MOEC_REPAIR_BLOCK = 256, /* tokens of an expert that one thread takes at a time */
};

/* --- repair_parts.c: tokens ------------------------------------------------------------------------------------------- */

/* The tokens that select an expert, in ascending order, hence fitted ones first: [0, n_fit). */
typedef struct moec_tokens {
    int32_t *token; /* [most] */
    float *gate;    /* [most] */
    int64_t n, n_fit;
} moec_tokens;

MOEC_API moec_status moec__picked_new(moec_tokens *out, int64_t most, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec__picked_release(moec_tokens *k);
/* By the selections ids and gates [n,slots] of the task or of others like them. */
MOEC_API void moec__picked_of(moec_tokens *k, const moec_repair_task *t, const int32_t *ids, const float *gates, int32_t expert);

/* --- pieces ------------------------------------------------------------------------------------------------------------ */

/* An expert, or neurons [first, first + width) of one, in float32. */
typedef struct moec_piece {
    int32_t expert;
    int64_t first, width;
    float *gate, *up, *down;            /* [width,H] [width,H] [H,width], side by side */
    float *gate_bias, *up_bias;         /* [width], or NULL */
    float *down_bias;                   /* [H], or NULL: none, or not the whole expert; it is the same before and after */
} moec_piece;

/* Values of a piece; floats of its biases. */
static inline int64_t moec__piece_values(const moec_repair_task *t, int64_t width)
{
    return 3 * t->model->dims.hidden * width;
}
static inline int64_t moec__piece_biases(const moec_repair_task *t)
{
    return 2 * t->model->dims.expert_width + t->model->dims.hidden;
}
/* Reads p->expert's neurons into `values` and `biases`. MOEC_ENUMERIC: a weight is not finite. */
MOEC_API moec_status moec__piece_read(moec_piece *p, const moec_repair_task *t, float *values, float *biases, moec_err *err)
    MOEC_USE_RESULT;
/* Values as the tensors will hold them; what is too large for F16 becomes infinite. */
MOEC_API void moec__round(float *x, int64_t n, moec_dtype dtype);
MOEC_API void moec__piece_round(const moec_piece *p, const moec_repair_task *t);
/* `parts`: of MOEC_PART_GATE, _UP and _DOWN; the others are as they were. The pages are given back, too. */
MOEC_API moec_status moec__piece_write(const moec_piece *p, const moec_repair_task *t, uint32_t parts, moec_err *err)
    MOEC_USE_RESULT;

/* Scratch for each thread. */
typedef struct moec_room {
    float *store;
    int64_t each; /* floats, a multiple of 16 */
} moec_room;
MOEC_API moec_status moec__room_new(moec_room *out, int64_t floats, moec_err *err) MOEC_USE_RESULT;
static inline float *moec__room_of(const moec_room *r, int worker)
{
    return r->store + worker * r->each;
}
/* Floats that moec__piece_act and moec__piece_add need, for pieces up to `width`. */
MOEC_API int64_t moec__piece_floats(const moec_repair_task *t, int64_t width);

/* x [n,H] of n <= MOEC_REPAIR_BLOCK tokens, from `from` [.,H]; with the weight on the input, times it. */
MOEC_API void moec__piece_input(float *x, const float *from, const moec_repair_task *t, const int32_t *token, const float *gate,
                                int64_t n);
/* act [n,width] = act(gate x, up x) of n <= MOEC_REPAIR_BLOCK tokens, and, unless NULL, slope [n,width]: what act changes by
 * with up x, 0 where that is cut. With the weight on the input it is in there, and *applied is NULL; else *applied is `gate`,
 * which is still to be applied. */
MOEC_API void moec__piece_act(float *act, float *slope, const float **applied, float *room, const moec_repair_task *t,
                              const moec_piece *p, const int32_t *token, const float *gate, int64_t n);
/* dst [n,H] of the tokens += sign * what the piece gives them. */
MOEC_API moec_status moec__piece_add(float *dst, float sign, const moec_repair_task *t, const moec_piece *p,
                                     const moec_tokens *k, const moec_room *room, moec_err *err) MOEC_USE_RESULT;

/* --- repair_step.c: gradients of one batch ----------------------------------------------------------------------------- */

typedef struct moec_fit_matrix {
    float *w;      /* first value; gradients and moments have the same place in theirs */
    int64_t rows, cols;
    float rms;     /* of what it was at first: steps are shares of it */
} moec_fit_matrix;

typedef struct moec_fit moec_fit;

/* Memory for blocks of up to `pieces` experts or neurons of one, with up to `values` weights, and batches of `batch` tokens.
 * `router`: the router's rows are fitted, too. The task stays borrowed. */
MOEC_API moec_status moec__fit_new(moec_fit **out, const moec_repair_task *t, int64_t pieces, int64_t width, int64_t batch,
                                   bool router, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec__fit_free(moec_fit *f);
/* Reads experts keep[first .. first + n), neurons [neuron, neuron + width) of each, and the router. Moments become 0. */
MOEC_API moec_status moec__fit_read(moec_fit *f, int64_t first, int64_t n, int64_t neuron, int64_t width, moec_err *err)
    MOEC_USE_RESULT;
/* All weights: the pieces' one after the other (gate, up, down), then the router's rows. */
MOEC_API float *moec__fit_values(const moec_fit *f, int64_t *n);
MOEC_API int64_t moec__fit_pieces(const moec_fit *f, const moec_piece **out);
/* Rows of the router, or NULL. */
MOEC_API float *moec__fit_router(const moec_fit *f);
/* loss = scale * sum_t w_t |z_t - r_t|^2 of a batch, z [n,H] by token, and its gradients, which go to grad (laid out as the
 * values are), or, where that is NULL, into a step of Adam with `factors` (rate: share of the root mean square). */
MOEC_API moec_status moec__fit_batch(double *loss, float *grad, moec_fit *f, const float *z, const int32_t *token, int64_t n,
                                     double scale, const moec_adam_factors *factors, moec_err *err) MOEC_USE_RESULT;
/* Token-expert pairs of the last batch. */
MOEC_API int64_t moec__fit_pairs(const moec_fit *f);
/* ids and gates [n,slots] of all tokens by the router's rows as they are. */
MOEC_API moec_status moec__fit_route(int32_t *ids, float *gates, moec_fit *f, moec_err *err) MOEC_USE_RESULT;
/* Can the router be fitted: are there rows, and is the choice the k best by softmax or sigmoid? */
MOEC_API bool moec__fit_can_route(const moec_repair_task *t);
/* Bytes of moec__fit_new. */
MOEC_API size_t moec__fit_bytes(const moec_model *m, int64_t slots, int64_t keep, int64_t pieces, int64_t width, int64_t batch);

/* --- repair_up.c: the closed-form step on an up projection ------------------------------------------------------------------ */

typedef struct moec_up moec_up;

/* Room for one expert of the layer, and the inputs of all fitted tokens, whitened. NULL, and MOEC_OK: they are 0 or not
 * finite. `square`: D^T D is made, which is less work up to I = 2 H. The task stays borrowed. */
MOEC_API moec_status moec__up_new(moec_up **out, const moec_repair_task *t, bool square, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec__up_free(moec_up *u);
/* [n,I] d (sqrt(w) g a) / d (up x) of the expert's tokens, to be filled before the next. */
MOEC_API float *moec__up_slope(const moec_up *u);
/* change [I,H] of p->up by `steps` conjugate gradients from 0, for r [n,H] = sqrt(w) rest; false: nothing can be done. */
MOEC_API moec_status moec__up_solve(bool *ok, float *change, moec_up *u, const moec_piece *p, const moec_tokens *k,
                                    const float *r, double lambda, int steps, moec_err *err) MOEC_USE_RESULT;
/* [n,I] scratch of the solution, free after it. */
MOEC_API float *moec__up_moved(const moec_up *u);
MOEC_API size_t moec__up_bytes(const moec_model *m, int64_t n);

/* --- repair_ridge.c ------------------------------------------------------------------------------------------------------- */

/* Bytes of moec_repair_ridge. */
MOEC_API size_t moec__ridge_bytes(const moec_model *m, int64_t n);

#endif
