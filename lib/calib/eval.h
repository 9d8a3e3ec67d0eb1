/* Quality of a model on text: cross-entropy and perplexity, and against a base model KL divergence and top-1 agreement, each
 * with a standard error, per domain and over all. Logits exist for one block of the vocabulary at a time. */
#ifndef MOEC_CALIB_EVAL_H
#define MOEC_CALIB_EVAL_H

#include "calib/pass.h"

/**
 * Final hidden states of every token and the head that turns them into logits: z = W norm(h). What one side of an evaluation
 * needs, and all that a reference file keeps: exact, and far smaller than stored log-probabilities (hidden instead of
 * vocabulary many floats a token).
 */
typedef struct moec_final moec_final;

/** Runs the layer pass over the corpus. `what` names the progress line. Errors of moec_pass_*; MOEC_ENUMERIC when the
 *  head or the final norm is not finite. The model is borrowed. Free with moec_final_free. */
MOEC_API moec_status moec_final_run(moec_final **out, const moec_model *m, const moec_corpus *corpus, moec_compute compute,
                                    uint64_t max_memory, const char *what, moec_err *err)
    MOEC_USE_RESULT;
/** The same, so arranged that the states can be kept while `next` is run under the same limit: what would not fit then is
 *  refused now. */
MOEC_API moec_status moec_final_run_before(moec_final **out, const moec_model *next, const moec_model *m,
                                           const moec_corpus *corpus, moec_compute compute, uint64_t max_memory,
                                           const char *what, moec_err *err) MOEC_USE_RESULT;
/** Rows of the head. */
MOEC_API int64_t moec_final_vocab(const moec_final *f);
/** A safetensors file: hidden F32 [tokens, hidden], head [vocab, hidden], with the corpus digest and the model's
 *  fingerprint in its metadata. MOEC_EIO, MOEC_ENOFIT, MOEC_EEXIST. */
MOEC_API moec_status moec_final_save(const moec_final *f, const moec_corpus *corpus, const char *path, moec_err *err)
    MOEC_USE_RESULT;
/** MOEC_EFORMAT: not such a file, or made from other text, windows or token limits than `corpus`; MOEC_ENUMERIC; MOEC_EIO,
 *  MOEC_ENOMEM. */
MOEC_API moec_status moec_final_load(moec_final **out, const moec_corpus *corpus, const char *path, moec_err *err)
    MOEC_USE_RESULT;
MOEC_API void moec_final_free(moec_final *f);

typedef struct moec_score_sum {
    uint64_t tokens;                /* scored: all but the first of each window */
    double cross_entropy, kl, top1; /* nats, nats, share of tokens with the same most likely id */
    /* Standard errors of the three means. Tokens of one window depend on each other, so windows are the sampling units:
     * se = sqrt(W/(W-1) sum_w (S_w - mean n_w)^2) / N, the ratio estimator's; 0 for one window. */
    double cross_entropy_se, kl_se, top1_se;
} moec_score_sum;

typedef struct moec_scores {
    bool has_base;
    moec_score_sum overall;
    moec_score_sum *domain; /* [corpus->n_domains] */
} moec_scores;

/** Scores `model` (and compares with `base` unless NULL) on the corpus both were run on.
 *      CE  = mean of log sum exp z - z[next id]
 *      KL  = mean of sum p_base (log p_base - log p_model)
 *  max_memory: when the heads would not stay below it, their pages are given back block by block, and as few threads work as
 *  must; 0: no limit.
 *  MOEC_EFORMAT when the vocabularies differ; MOEC_ENUMERIC when a loss is not finite; MOEC_EINTR, MOEC_EIO, MOEC_ENOMEM.
 *  Release with moec_scores_release. */
MOEC_API moec_status moec_score(moec_scores *out, const moec_final *model, const moec_final *base,
                                const moec_corpus *corpus, moec_compute compute, uint64_t max_memory, moec_err *err)
    MOEC_USE_RESULT;
MOEC_API void moec_scores_release(moec_scores *s);
/** {"overall": {"cross_entropy", "perplexity", "tokens", "stderr", "kl", "kl_stderr", "top1", "top1_stderr"},
 *  "domains": ..} */
MOEC_API moec_json *moec_scores_json(const moec_scores *s, const moec_corpus *corpus);

#endif
