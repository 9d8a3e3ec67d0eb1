/* What experts give for tokens, whoever selects them: float32, without the router's weight. Private to lib/method and its
 * tests. Symbols: E experts, H hidden, I expert width. */
#ifndef MOEC_METHOD_ALL_OUTPUTS_H
#define MOEC_METHOD_ALL_OUTPUTS_H

#include "model/forward.h"

/* ---- one expert -------------------------------------------------------------------------------------------------------- */

enum { MOEC_OUTPUTS_BLOCK = 512 }; /* tokens that run together, at most */

/* One thread's memory: panels of gemm.h for up to so many tokens as it was made for. */
typedef struct moec_expert_room {
    float *a, *b, *out;                     /* [tokens,I] [tokens,I] [tokens,H] */
    float *gate_bias, *up_bias, *down_bias; /* [I] [I] [H] */
} moec_expert_room;

MOEC_API moec_status moec__expert_room_new(moec_expert_room *r, const moec_model *m, int64_t tokens, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec__expert_room_release(moec_expert_room *r);
MOEC_API size_t moec__expert_room_bytes(const moec_model *m, int64_t tokens);

/** Panels of rows `row` [n] of x [.., H], as the model scales the experts' input. */
MOEC_API void moec__expert_input(float *panels, const float *x, const int32_t *row, int64_t n, const moec_model *m);
/** r->out = output of expert e for n tokens, biases included; then the expert's mapped pages are given back. x: of
 *  moec__expert_input. Unused lanes hold anything. Errors of moec_gemm_weight. Safe from several threads, each with its room. */
MOEC_API moec_status moec__expert_run(moec_expert_room *r, const float *x, int64_t n, const moec_model *m, const moec_layer *l,
                                      int64_t e, moec_err *err) MOEC_USE_RESULT;

/* ---- all of them --------------------------------------------------------------------------------------------------------- */

/* Receives y [m,E,H] of rows row[at .. at + m); may write there. Called on the caller's thread. */
typedef moec_status moec_outputs_fn(void *ctx, int64_t at, int64_t m, float *y, moec_err *err);

/** Runs all experts on rows `row` [n] of x, a block of tokens at a time: memory does not grow with n. Blocks depend on the model
 *  alone, and so does what fn sees.
 *  MOEC_ENUMERIC: an output is not finite (names expert and row); MOEC_ENOMEM, MOEC_EINTR, what fn returns.
 *  Cost: 6 n E H I operations; weights are read once a block. */
MOEC_API moec_status moec__all_outputs(const moec_model *m, const moec_layer *l, const float *x, const int32_t *row, int64_t n,
                                       moec_outputs_fn *fn, void *ctx, moec_err *err) MOEC_USE_RESULT;
/** Bytes that it needs. */
MOEC_API size_t moec__all_outputs_bytes(const moec_model *m);

#endif
