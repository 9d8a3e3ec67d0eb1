/* Inside of moec_final, shared by final.c, eval.c and what compares the states of a pass that goes on (run/suffix.c). */
#ifndef MOEC_CALIB_FINAL_H
#define MOEC_CALIB_FINAL_H

#include "calib/eval.h"

struct moec_final {
    char model[33];
    int64_t tokens, hidden, vocab;
    moec_hidden *store;   /* un-normed states, or NULL: */
    bool lent;            /* store is a pass's and stays there */
    bool quiet;           /* scoring it is a step of work that has a progress line */
    const char *rows;     /* normed states in a mapped reference file */
    int workers;
    int64_t max_tokens;
    float *norm, *norm_bias, eps; /* final norm for `store`; norm_bias NULL: none */
    bool layer_norm;      /* LayerNorm, not RMS */
    float divisor;        /* of logits: normed states of `store` and `bias` are divided by it; those of a file already are */
    moec_weight head;     /* [vocab, hidden] in a mapped file */
    moec_tensor tensor;   /* what `head` is a view of when it lies in a reference file */
    float *bias;          /* [vocab] added to logits, NULL: none */
    void *map;
    size_t map_size;
};

/* What moec_score takes with one worker and a base of the same width, heads apart. */
MOEC_API size_t moec__score_bytes(int64_t hidden, int64_t n_tokens, moec_compute compute);
/** The states that a pass has behind its last layer, which stay the pass's: `p` outlives *out, and does not go on meanwhile.
 *  Errors of moec_final_run. Free with moec_final_free. */
MOEC_API moec_status moec__final_lend(moec_final **out, const moec_pass *p, moec_err *err) MOEC_USE_RESULT;
/* Normed rows [at, at+n). */
moec_status moec__final_rows(float *out, const moec_final *f, int64_t at, int64_t n, moec_err *err) MOEC_USE_RESULT;

#endif
