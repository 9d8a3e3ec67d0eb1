/* Quantizes a model, layer by layer in a folder of computed weights: a twin, quantized so far, runs over text; in each layer first
 * what mixes tokens is rounded (by the inputs that it has in the twin), then, behind that, the shared and the dense feed-forward part,
 * gate and up of every routed expert on the tokens that the twin's router gives it, and down on what those make of them.
 *
 *     H_e = sum over tokens of g^a x x^T,   a = 0, 1 or 2, g the expert's weight as applied (2: the squared error of the block)
 *
 * blended with the layer's (gptq.h). Original inputs: with `original` the target is the original's output, W x_o for x_o the original's
 * input of the same token, as GPTAQ (Li et al., arXiv:2504.02692) has it; we take it in closed form and then round it by H as usual:
 *
 *     W* = W + c W (sum over the expert's tokens of g^a (x_o - x) x^T) (H + damp)^-1,   c = lambda / mass n / (n + 8 columns)
 *
 * for its n tokens, lambda and mass those of the blend: on the layer's other tokens W* is to do what W does, and the fewer the tokens,
 * the less of the correction is taken. */
#ifndef MOEC_RUN_QUANTIZE_H
#define MOEC_RUN_QUANTIZE_H

#include "calib/pass.h"
#include "ckpt/override.h"
#include "method/gptq.h"
#include "run/format.h"
#include "run/work.h"

typedef struct moec_quantize_opts {
    const moec_corpus *corpus; /* NULL: no tokens; then rounding is NEAREST, or CLIP without importance */
    moec_compute compute;      /* of the forward passes and of all that is summed over tokens or rounded by them */
    moec_rounding rounding;
    moec_gptq_opts gptq;       /* its `compute` is not read: it is the above */
    int weight_power;          /* a: a token of router weight g counts g^a, 0, 1 or 2, in an expert's Hessian; at 2 L is the error of the
                                  layer's output, but few tokens have most of the say: 1 does better on text that was not seen */
    bool original;             /* targets are the original's; with GPTQ only */
    bool losses;               /* those of rounding to nearest are wanted beside GPTQ's: a tenth more time without sweeps */
    uint64_t max_memory;
    const char *work;          /* the folder is WORK.partial */
    bool resume;
    const char *fingerprint;   /* of the model */
} moec_quantize_opts;

/* What came of it, over all routed experts. */
typedef struct moec_quantize_report {
    int64_t matrices, by_gptq, by_nearest; /* of routed experts; by_nearest: GPTQ was asked and rounding to nearest was better */
    int64_t unseen, few;       /* experts without tokens; with fewer than columns */
} moec_quantize_report;

typedef struct moec_quantizing moec_quantizing;

/** Quantizes as plan->quant says: fills its error and plan->weights.
 *  @return MOEC_OK; MOEC_EINVAL: rounding by tokens without text, a quantized source; MOEC_EEXIST, MOEC_EFORMAT, MOEC_ENUMERIC,
 *          MOEC_ENOFIT, MOEC_EINTR (can be resumed), MOEC_EIO, MOEC_ENOMEM as moec_factoring_run.
 *  Cost: two forward passes, three with `original`, and up to two more where other matrices than experts' are quantized; for an expert
 *  of n tokens n (H^2 + I^2 + 4 H I) operations in o->compute, with `original` n (2 H^2 + 16 H I) more, for up to I tokens of the layer
 *  where it has fewer than 2 I, and what gptq.h says. Memory: the passes, n H floats for n tokens (twice that with `original`), and for
 *  each thread some 20 H^2 + 20 I^2 + 30 H I bytes. Disk: the quantized weights. */
MOEC_API moec_status moec_quantizing_run(moec_quantizing **out, moec_plan *p, const moec_model *m, const moec_quantize_opts *o,
                                         moec_err *err) MOEC_USE_RESULT;
/** What that run would take; nothing is read. Errors of moec_quantizing_run that are known at the start. */
MOEC_API moec_status moec_quantizing_estimate(moec_work_cost *out, moec_plan *p, const moec_model *m, const moec_quantize_opts *o,
                                              moec_err *err) MOEC_USE_RESULT;
MOEC_API const moec_override *moec_quantizing_weights(const moec_quantizing *q);
MOEC_API moec_quantize_report moec_quantizing_report(const moec_quantizing *q);
/** [{"module", "layer", "expert": -1 where it is none's, "matrix", "bits", "group_size", "tokens", "method": "gptq"|"clip"|"nearest",
 *  "loss", "loss_nearest", "loss_zero"}], an entry a matrix; losses are L of gptq.h of what it became, of rounding to nearest and of
 *  zeros, by the blended Hessian and with `original` against W*; null where no Hessian was taken, and loss_nearest without `losses`;
 *  loss_zero of more than 511 rows is by 256 or more of them, evenly taken. Borrowed. */
MOEC_API const moec_json *moec_quantizing_modules(const moec_quantizing *q);
/** Moves the folder to `dir`, where it stays. MOEC_EIO. */
MOEC_API moec_status moec_quantizing_keep(moec_quantizing *q, const char *dir, moec_err *err) MOEC_USE_RESULT;
/** Releases it; `remove`: the folder goes, too. NULL-safe. */
MOEC_API void moec_quantizing_close(moec_quantizing *q, bool remove);

#endif
