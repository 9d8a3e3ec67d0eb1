/* What changed weights cost a model's output, change by change. The original runs once to its end; then once more, and in front of each
 * layer variants of the model that differ in this layer alone take over its states and go on alone, all of them together, so that the
 * layers behind are read once. Shared by measure_gain.c and gguf_measure_kl.c. */
#ifndef MOEC_RUN_SUFFIX_H
#define MOEC_RUN_SUFFIX_H

#include "calib/eval.h"
#include "model/variant.h"

typedef struct moec_suffix {
    const moec_model *m;
    const moec_corpus *text;
    moec_compute compute;
    uint64_t max_memory;
    size_t maker_bytes;      /* what making a variant takes */
    const char *what;        /* in notes */
    moec_final *original;    /* the first run's end */
    moec_pass *pass;         /* the second run */
    moec_progress *progress; /* steps of a layer and a token; NULL: none */
} moec_suffix;

/** The first windows of each domain, its share of so many tokens (0: all), one window at least. The rest is borrowed from c; free
 *  out->domain with moec_free. MOEC_ENOMEM. */
moec_status moec_suffix_part(moec_corpus *out, const moec_corpus *c, int64_t tokens, moec_err *err) MOEC_USE_RESULT;
/** Tokens that predict something: all but the first of each window. */
double moec_suffix_scored(const moec_domain *d);
/** MOEC_ENOFIT: it will not fit the limit, which is better known before hours of work. s: m to maker_bytes. */
moec_status moec_suffix_fit(const moec_suffix *s, moec_err *err) MOEC_USE_RESULT;
/** First run, and the second up to the first layer. Release with moec_suffix_end, also after failure. Errors of moec_final_run. */
moec_status moec_suffix_begin(moec_suffix *s, moec_err *err) MOEC_USE_RESULT;
/** The second run through a layer. */
moec_status moec_suffix_step(moec_suffix *s, int64_t layer, moec_err *err) MOEC_USE_RESULT;
void moec_suffix_end(moec_suffix *s);

/* Where variants differ besides layers: -1, in the embedding; dims.layers, in the head. */
enum { MOEC_SUFFIX_EMBED = -1 };
/** Puts variant `number`'s weights into v, which is equal to the model: into layer `at`, where they are read before the next call;
 *  into the embedding or the head, where they are read until moec_suffix_run is back. */
typedef moec_status moec_suffix_fn(void *ctx, moec_variant *v, int number, moec_err *err);
/** KL(original || variant) in nats a token to kl [n][domains], of each of n variants; none is below 0. The second run stands in front of
 *  layer `at`. How many variants fit max_memory together changes no result. */
moec_status moec_suffix_run(double *kl, moec_suffix *s, int64_t at, int n, moec_suffix_fn *make, void *ctx, moec_err *err) MOEC_USE_RESULT;

#endif
