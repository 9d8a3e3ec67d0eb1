/* Repair of an MoE layer whose experts were thinned out: the weights of the experts that stay are fitted so that the layer
 * gives again what it is wanted to give, on calibration tokens, under the routing that it has now.
 *
 *     r_t = sum over the experts e that token t selects of g_t[e] f_e(x_t)        f_e(x) = down(act(gate x, up x))
 *     error = sum_t w_t |y_t - r_t|^2 / sum_t w_t |y_t|^2
 *
 * Experts are fitted one after the other against what the others leave (block Gauss-Seidel), in sweeps: memory is one expert
 * and the tokens, whatever the number of experts. Tokens come in two parts: those that are fitted to, and behind them
 * the held-out ones, which decide whether a change is taken. Results do not depend on the number of threads.
 * Symbols: n tokens, H hidden, I expert width, K experts that stay. */
#ifndef MOEC_METHOD_REPAIR_H
#define MOEC_METHOD_REPAIR_H

#include "base/log.h"
#include "model/forward.h"

typedef struct moec_repair_task {
    const moec_model *model;   /* dims and rules */
    const moec_layer *layer;   /* expert[e] of every kept e: plain F32, BF16 or F16 views of tensors in a shared mapping of a
                                  file, read and written in place, their pages given back; `removed` as for moec_route */
    const int32_t *keep;       /* [n_keep] ascending */
    int64_t n_keep;
    int64_t n, n_fit;          /* tokens; the first n_fit are fitted to */
    const float *x;            /* [n,H] input of router and experts */
    float *rest;               /* [n,H] y - r, kept up to date by the functions below */
    const float *weight;       /* [n] w, above 0 */
    int32_t *ids;              /* [n,slots] selected experts (numbers of the source, all of them kept); -1: empty slot */
    float *gates;              /* [n,slots] weights as applied */
    int64_t slots;
    moec_weight router;        /* [n_keep,H] writable rows of the kept experts, or .of NULL: routing stays as it is */
    const float *router_bias;  /* [n_keep] of the logits, or NULL */
    moec_progress *progress;   /* stepped by tokens of an expert times passes over them; NULL: none */
} moec_repair_task;

/* sum_t w_t |rest_t|^2 of both parts. */
typedef struct moec_repair_error {
    double fit, held;
} moec_repair_error;

/** rest := rest - r: what is wanted becomes what is missing. Call once, with `rest` holding y. MOEC_ENOMEM, MOEC_EINTR. */
MOEC_API moec_status moec_repair_start(moec_repair_task *t, moec_err *err) MOEC_USE_RESULT;
/** What is missing now. */
MOEC_API moec_repair_error moec_repair_missing(const moec_repair_task *t);

typedef struct moec_ridge_opts {
    int sweeps;     /* over all experts */
    double lambda;  /* of the mean diagonal of the expert's Gram matrix */
    int64_t dense;  /* widest I that is solved by Cholesky factorisation; wider ones by conjugate gradients */
    int up_sweeps;  /* the first ones, in which up projections are fitted, too */
    int up_steps;   /* of conjugate gradients on one; 0: up projections stay */
} moec_ridge_opts;

/** New down projections D and up projections U of the experts that stay, in closed form: the layer's output is linear in each
 *  while the other stays. In turn for each expert e, with a_t = act(gate x_t, up x_t), b_t = g_t a_t and the tokens T of e that
 *  are fitted to, first
 *
 *      D' = argmin sum_{t in T} w_t |rest_t - (D' - D) b_t|^2 + mu |D' - D|^2,   mu = lambda / I * trace(sum_t w_t b_t b_t^T)
 *
 *  i.e. D' = D + (B rest)^T (A + mu)^-1, solved for the change: with few tokens it stays near what is there. Then, in the first
 *  up_sweeps sweeps, with S_t = diag(d b_t / d (up x_t)), up_steps steps of conjugate gradients from U' = U towards
 *
 *      U' = argmin sum_{t in T} w_t |rest_t - D S_t (U' - U) x_t|^2 + lambda |C^-1 (U' - U) W^-T|^2
 *
 *  in the coordinates Q = C^-1 (U' - U) W^-T, in which the diagonal of the problem's matrix is about 1: W W^T = (V + 0.01
 *  trace(V) / H)^-1 whitens the layer's inputs, V = sum_t w_t x_t x_t^T / sum_t w_t over all fitted tokens of the layer, W lower
 *  triangular; C is diagonal, c_i^-2 = l_i + 0.01 mean(l), l_i = |D_i|^2 sum_{t in T} w_t S_t[i]^2, D_i a column. Plain
 *  coordinates need several times the steps. After few of them U' lies between U and the minimum, which serves as a penalty, too.
 *  S_t is g_t silu(gate x); where the activation cuts up x it is 0, and the problem is the linearised one.
 *  Each is taken when the held-out error of the expert's tokens drops (where no held-out token selects it: when the fitted error
 *  does), the error being that of the weights as rounded to the tensor's type, through the activation itself. The Gram matrix
 *  is summed in float32 by blocks of tokens and in float64 over blocks; factorised in float64, mu times 10 until that succeeds.
 *  It is made anew in each sweep: kept, the factors of all experts would be as large as their weights in float64. With I above
 *  `dense`, conjugate gradients for each row of D on its own and without a Gram matrix start from no change and end at a relative
 *  residual of 1e-4 or 50 steps. With the weight on the input, a_t = act(gate g x, up g x), x_t is g x in the problem of U and
 *  g is 1 otherwise.
 *  An expert without fitted tokens stays as it is. Gate projections and biases stay as they are.
 *  *taken: changes of a projection, over all sweeps. Progress: a step of n_e an expert and sweep.
 *  MOEC_ENOMEM; MOEC_EINTR: experts visited before are changed, and `rest` says so; MOEC_ENUMERIC: a weight of the input is
 *  not finite (a solution that is not, or too large for F16, is not taken).
 *  Cost a sweep: 2 n_e (2 H I + I^2/2 + 2 H I) + I^3/3 + 2 H I^2 operations for an expert of n_e tokens, a step of conjugate
 *  gradients 4 n_e H I; with up 8 n_e H I + up_steps n_e (4 H I + 2 I^2) + H^2 I + 2 H I^2 more (I above 2 H: 8 H I a
 *  step for 4 H I + 2 I^2), and once for the layer 2 n H^2 + 8/3 H^3. Memory: n (H + I), 4 H I floats, H I + 2 I^2 doubles where
 *  dense; with up n (H + 2 I) + H^2 + 4 H I + I^2 (none where I is above 2 H) floats, and 2 H^2 doubles.
 *  Source: D is the refit of MergeMoE (arXiv 2510.14436, its T1), applied here to pruning, towards the old weights and with a
 *  held-out test. The step on U is unpublished. */
MOEC_API moec_status moec_repair_ridge(int64_t *taken, moec_repair_task *t, const moec_ridge_opts *o, moec_err *err)
    MOEC_USE_RESULT;

typedef struct moec_deep_opts {
    int sweeps;           /* over all blocks */
    int epochs;           /* over a block's tokens in each */
    int64_t batch;        /* tokens of a step */
    double rate;          /* step, as a share of the matrix's root mean square; falls to 0 by a cosine over all steps */
    uint64_t seed;        /* of the order of tokens */
    int64_t block_values; /* most weights that are fitted together */
} moec_deep_opts;

/** Gate, up and down of the experts that stay, by gradient steps on the layer's own error. A block is as many experts, in
 *  order, as have block_values weights together, one at least; of an expert that is larger, as many of its neurons. In turn
 *  for each block, the others fixed, with T the fitted tokens that select one of its experts: `epochs` passes over T in random
 *  batches, Adam (0.9, 0.98) with gradients by hand on
 *
 *      L = sum_{t in batch} w_t |z_t - sum_{e in block} g_t[e] f_e(x_t)|^2 / sum_{t in T} w_t |z_t|^2 * |T| / |batch|,
 *      z_t = rest_t + what the block gives before the visit
 *
 *  Where one block holds the whole layer, task.router is there and the family chooses the k best by softmax or sigmoid, the
 *  router's rows are fitted too: every batch is routed by the rows as they are then, and with r_t the routed output, s the
 *  score, gamma the factor on the weights (1 in most families)
 *
 *      dr/dz_e = g_e f_e - (g_e / gamma) r            softmax, renormalised (or over the chosen): selected e
 *                g_e f_e - s_e r                      softmax, not: all e, g_e = 0 where it is not selected
 *                (1 - s_e) (g_e f_e - (g_e / gamma) r), (1 - s_e) g_e f_e     sigmoid, renormalised or not: selected e
 *
 *  with d f_e(g_e x) / dg_e for f_e where the weight is on the input. Models with null experts keep their router. ids and gates
 *  are the new ones afterwards.
 *  A visit is taken when the held-out error of the block's tokens drops (of all tokens when routing changed; where none is
 *  held out, when the fitted error does), measured on weights as rounded to the tensors' types; else everything is as before
 *  it, bit for bit. Steps are shares of each matrix's root mean square before the visit; the first twentieth of them rises to
 *  `rate`. Batches of an epoch differ by one token at most. Moments of Adam start anew with each visit. Biases stay.
 *  *taken: visits that were. Progress: the selections of each batch, by the share of neurons that a block has.
 *  Errors as moec_repair_ridge; MOEC_EINVAL: a batch below 1.
 *  Cost a sweep: (3 epochs + 2) times the experts' part of the layer's forward pass, and some 6 values of memory traffic a
 *  weight and step. Memory: n H floats, 3 for each value of a block, and a batch's rows.
 *  Unpublished: layer-wise distillation of pruned experts. */
MOEC_API moec_status moec_repair_deep(int64_t *taken, moec_repair_task *t, const moec_deep_opts *o, moec_err *err)
    MOEC_USE_RESULT;

/* Which experts of the source a kept one stands for: those it was merged from, or itself alone. */
typedef struct moec_router_groups {
    const int64_t *first;  /* [n_keep + 1] offsets of kept k's members, one at least */
    const int32_t *member; /* [first[n_keep]] numbers in the source */
    const double *share;   /* beside member: what it hands of its score, above 0 and at most 1; NULL: all */
} moec_router_groups;

/** Logits out [n,n_keep] with which kept experts are chosen as their members were, from the source's z [n,ld] (biases included):
 *
 *     softmax   log sum_j share_j exp z_j: the softmax over groups is then the members' probability together
 *     sigmoid   logit of max_j share_j sigmoid(z_j), i.e. max z_j where shares are 1; sums of scores above 1 have no logit
 *
 *  A group of one keeps its own logit. Selection biases have no part in it: a merged expert is to keep that of the member whose
 *  row it starts from. Sums in float64. MOEC_EINVAL: scores of another kind, a group without members, a share out of range.
 *  Cost: an exponential a member and token. */
MOEC_API moec_status moec_router_group(float *out, const moec_router_groups *g, int64_t n_keep, const float *z, int64_t ld,
                                       int64_t n, const moec_model *m, moec_err *err) MOEC_USE_RESULT;

typedef struct moec_router_opts {
    double lambda; /* of the mean diagonal of the Gram matrix; 0: 1e-12 */
    double reach;  /* of |y|^2, beside the squares of what a token's output changes by; above 0 */
} moec_router_opts;

/** New rows of the router of the experts that stay, in closed form, from task.router's r0 and fitted tokens:
 *
 *     r_C = argmin sum_t w_t (c_tC - (r_C - r0_C) . x_t)^2 + mu |r_C - r0_C|^2,   mu = lambda / H * trace(sum_t w_t x_t x_t^T)
 *
 *  where c [n_fit,n_keep] is what the logits want to move by: one Cholesky factorisation for all rows. With `want` [n_fit,n_keep]
 *  (moec_router_group's, say) c = want - logits now, under softmax less its mean over C, since a number added to all
 *  logits of a token changes nothing. Without, c is what would make each token's own output best, by one step of Gauss and Newton
 *  with the selection as it is: over the selected experts
 *
 *     c_t = argmin |rest_t - sum_e c_te dr_t/dz_e|^2 + reach |y_t|^2 |c_t|^2      dr/dz as for moec_repair_deep
 *
 *  within -3 to 3, and 0 for the others. All tokens are routed anew by the rows as rounded to the tensor's type, and these are taken,
 *  with ids, gates and rest, when the held-out error drops (of the fitted tokens where none is held out); else everything is as
 *  before, bit for bit. Nothing is done where moec_repair_can_route says no, nor without `want` where the weight is on the input.
 *  MOEC_ENOMEM; MOEC_EINTR: rest, ids and gates may be of neither state; MOEC_ENUMERIC: a weight of the input is not finite.
 *  Cost: n_fit H^2 + H^3/3 + 2 n_fit K H operations, and the experts' part of a forward pass once for fitted tokens (without
 *  `want`), twice for held-out ones, and twice for fitted ones if taken. Memory: moec_repair_router_bytes.
 *  Unpublished. For merged groups the log-sum-exp is exact with the experts tied; for experts that are only left out, handing a removed
 *  one's probability to those that are like it (shares by regression of outputs) was worse than nothing behind a ridge
 *  solution, which has made up for it already; hence the second form. */
MOEC_API moec_status moec_repair_router(bool *taken, moec_repair_task *t, const float *want, const moec_router_opts *o,
                                        moec_err *err) MOEC_USE_RESULT;
/** Are there rows that can be fitted: one matrix on the experts' input, the k best by softmax or sigmoid, no null experts? */
MOEC_API bool moec_repair_can_route(const moec_repair_task *t);
/** Bytes that moec_repair_router needs besides the task's own arrays. */
MOEC_API size_t moec_repair_router_bytes(const moec_model *m, int64_t n, int64_t slots);

/** Half the L1 distance between how n tokens' selections are shared among experts by `before` and by `after` [n,slots], 0 to 1; 0
 *  without selections. -1: empty. MOEC_ENOMEM. */
MOEC_API moec_status moec_load_shift(double *out, const int32_t *before, const int32_t *after, int64_t n, int64_t slots,
                                     int64_t experts, moec_err *err) MOEC_USE_RESULT;

/** Bytes that the two need besides the task's own arrays, with batches of up to 1024 tokens and `dense` of up to 4096. */
MOEC_API size_t moec_repair_bytes(const moec_model *m, int64_t n, int64_t slots, int64_t block_values);

#endif
