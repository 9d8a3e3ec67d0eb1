/* Experts' matrices of a plan of kind MOEC_FACTOR become factors, and these their products again, layer by layer in a folder of
 * computed weights. The original runs over text, and each layer's experts are fitted to the tokens that its router gives them. */
#ifndef MOEC_RUN_FACTOR_H
#define MOEC_RUN_FACTOR_H

#include "calib/pass.h"
#include "ckpt/override.h"
#include "method/factor.h"
#include "run/work.h"

typedef struct moec_factor_opts {
    const moec_corpus *corpus; /* NULL: no tokens, every C is the identity */
    moec_compute compute;      /* of the forward pass; factoring is in float64 */
    uint64_t max_memory;       /* 0: what the machine has */
    const char *work;          /* the folder is WORK.partial */
    bool resume;
} moec_factor_opts;

typedef struct moec_factoring moec_factoring;

/** Factors: fills the plan's factor.error and `weights`. For expert e, T its tokens, g_t its weight as applied:
 *
 *    gate, up   C = sum_{t in T} g_t^2 x_t x_t^T / sum_{t in T} g_t^2, x the expert's input
 *    down       the same of its activations act(gate x, up x), those of the original
 *
 *  each with half of its mean diagonal added to the diagonal; without tokens the identity. Gram matrices are summed in float32 over
 *  blocks of 256 tokens, in float64 over blocks. base-delta's m_e = sum_t g_t^2; all 1 where no token was seen.
 *  Factors are rounded to the output's type, and what is dense is the product of rounded ones, rounded again.
 *  The folder holds both, the plan's output the one or the other (factor.kept); a run that is stopped goes on behind the last
 *  file. Results do not depend on the number of threads.
 *  Multi-token-prediction layers, shared experts and attention experts stay as they are.
 *  @param out  the folder, to be given to moec_apply; moec_factoring_close.
 *  @return MOEC_OK; MOEC_EINVAL: quantized weights without plan->dtype; MOEC_EEXIST: another run is at work in the folder, or it
 *          holds finished layers of another one and resume is on; MOEC_EFORMAT: what an earlier run left is damaged;
 *          MOEC_ENUMERIC: a weight or an activation is not finite; MOEC_ENOFIT, MOEC_EINTR (can be resumed), MOEC_EIO, MOEC_ENOMEM.
 *  Cost: one forward pass, and for an expert of n tokens some n (H^2 + I^2 + 4 H I) + 20 H I (H + I) + 15 m^3 operations, m the
 *  lesser of H and I. Memory: the tokens' inputs n H floats, and for each thread some H^2 + I^2 + 5 m^2 + 8 H I doubles. Disk: dense experts and factors. */
MOEC_API moec_status moec_factoring_run(moec_factoring **out, moec_plan *p, const moec_model *m, const moec_factor_opts *o,
                                        moec_err *err) MOEC_USE_RESULT;
/** What that run would take; its tokens pass each layer once. MOEC_ENOFIT: max_memory is too little; MOEC_EINVAL, MOEC_ENOMEM. */
MOEC_API moec_status moec_factoring_estimate(moec_work_cost *out, moec_plan *p, const moec_model *m, const moec_factor_opts *o,
                                             moec_err *err) MOEC_USE_RESULT;
MOEC_API const moec_override *moec_factoring_weights(const moec_factoring *f);
/** Experts without a token, over all MoE layers; 0 without text. */
MOEC_API int64_t moec_factoring_unseen(const moec_factoring *f);
/** Moves the folder to `dir`, where it stays. MOEC_EIO. */
MOEC_API moec_status moec_factoring_keep(moec_factoring *f, const char *dir, moec_err *err) MOEC_USE_RESULT;
/** Releases it; `remove`: the folder goes, too. NULL-safe. */
MOEC_API void moec_factoring_close(moec_factoring *f, bool remove);

#endif
