/* Quantizes a model, layer by layer in a folder of computed weights: a twin, quantized so far, runs over text; in each layer first
 * what mixes tokens is rounded (by the inputs that it has in the twin), then, behind that, the shared and the dense feed-forward part,
 * gate and up of every routed expert on the tokens that the twin's router gives it, and down on what those make of them.
 *
 *     H_e = sum over tokens of g^a x x^T,   a = 0, 1 or 2, g the expert's weight as applied (2: the squared error of the block)
 *
 * blended with the layer's (gptq.h). Original inputs: with `original` the target is the original's output, W X for X the original's
 * inputs of the same tokens, as GPTAQ (Li et al., arXiv:2504.02692) has it; we take it in closed form, W* = W (X X'^T)(X' X'^T)^-1
 * rounded by H = X' X'^T, damped alike. */
#ifndef MOEC_RUN_QUANTIZE_H
#define MOEC_RUN_QUANTIZE_H

#include "calib/pass.h"
#include "ckpt/override.h"
#include "method/gptq.h"
#include "run/format.h"

typedef enum moec_rounding { MOEC_ROUND_NEAREST, MOEC_ROUND_CLIP, MOEC_ROUND_GPTQ } moec_rounding;

typedef struct moec_quantize_opts {
    const moec_corpus *corpus; /* NULL: no tokens; then rounding is NEAREST, or CLIP without importance */
    moec_compute compute;
    moec_rounding rounding;
    moec_gptq_opts gptq;
    int weight_power;          /* a: 0, 1, 2 */
    bool original;             /* targets are the original's */
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

/** Quantizes as plan->quant says: fills its error and plan->weights, and writes MODULES.jsonl beside the weights, a line a matrix:
 *  {"layer", "expert", "matrix", "bits", "group_size", "tokens", "method": "gptq"|"clip"|"nearest", "loss", "loss_nearest"},
 *  losses relative to tr(W H W^T).
 *  @return MOEC_OK; MOEC_EINVAL: rounding by tokens without text, a quantized source; MOEC_EEXIST, MOEC_EFORMAT, MOEC_ENUMERIC,
 *          MOEC_ENOFIT, MOEC_EINTR (can be resumed), MOEC_EIO, MOEC_ENOMEM as moec_factoring_run.
 *  Cost: three forward passes (four with `original`), and for an expert of n tokens n (H^2 + I^2)/1 + what gptq.h says. Memory: n H
 *  floats for n tokens, and for each thread some 12 H^2 + 8 H I bytes. Disk: the quantized weights. */
MOEC_API moec_status moec_quantizing_run(moec_quantizing **out, moec_plan *p, const moec_model *m, const moec_quantize_opts *o,
                                         moec_err *err) MOEC_USE_RESULT;
MOEC_API const moec_override *moec_quantizing_weights(const moec_quantizing *q);
MOEC_API moec_quantize_report moec_quantizing_report(const moec_quantizing *q);
/** Moves the folder to `dir`, where it stays. MOEC_EIO. */
MOEC_API moec_status moec_quantizing_keep(moec_quantizing *q, const char *dir, moec_err *err) MOEC_USE_RESULT;
/** Releases it; `remove`: the folder goes, too. NULL-safe. */
MOEC_API void moec_quantizing_close(moec_quantizing *q, bool remove);

#endif
