/* What an error of each column of a GGUF's matrices weighs: the mean square of what the column multiplies. */
#ifndef MOEC_RUN_GGUF_IMPORTANCE_H
#define MOEC_RUN_GGUF_IMPORTANCE_H

#include "calib/stats.h"
#include "run/gguf_model.h"

typedef struct moec_gguf_importance moec_gguf_importance;
enum { MOEC_GGUF_PRIOR = 32 }; /* tokens that the layer's mean counts as beside an expert's own */

/** Of every tensor of x. Of expert e of stacked experts, domains mixed with their weights w,
 *
 *    m[e,c] = (n[e] sum_d w S[d,e,c] / sum_d w N[d,e] + 32 M[c]) / (n[e] + 32)
 *
 *  with S = XIN_SQ (gate, up) or ACT_SQ (down), N = SELECTED, n[e] the tokens of domains whose weight is not 0, and M the same mean
 *  over all experts of the layer: an expert that few tokens reach is not weighed by chance, one that none reaches like the layer.
 *  In down M is the mean over columns as well, since columns are neurons, and those of one number have nothing in common in two
 *  experts. Other matrices have `square` of s->sensitivity. Neither where the statistics lack it.
 *  s may be of moec_stats_load_lean. Nothing is borrowed from s. MOEC_EFORMAT: statistics of another model, or what moec_stats_fetch
 *  refuses; MOEC_ENOMEM; from 64 MiB on the E (H + I) floats a MoE layer are in a file without a name in /tmp: MOEC_ENOFIT, MOEC_EIO.
 *  Free with moec_gguf_importance_free. Memory: moec_gguf_importance_memory. Shrinking with a prior of 32 tokens is ours. */
MOEC_API moec_status moec_gguf_importance_new(moec_gguf_importance **out, const moec_gguf_model *x, const moec_stats *s, moec_err *err)
    MOEC_USE_RESULT;
/** The same with other matrices from `other` (NULL: all 1) in place of s->sensitivity. */
MOEC_API moec_status moec_gguf_importance_with(moec_gguf_importance **out, const moec_gguf_model *x, const moec_stats *s,
                                               const moec_sensitivity *other, moec_err *err) MOEC_USE_RESULT;
/** Bytes that experts take while it is made, s not counted: below 64 MiB all of them, else those of one stacked tensor, and 8 bytes for
 *  each sum of a layer; and 16 MiB of sums, or one expert's of every domain where these are more. */
MOEC_API uint64_t moec_gguf_importance_memory(const moec_gguf_model *x, const moec_stats *s);
MOEC_API void moec_gguf_importance_free(moec_gguf_importance *p);
/** Of a tensor's row, counted over all but the innermost dimension; as many as the row has values. NULL: 1 everywhere. Borrowed. */
MOEC_API const float *moec_gguf_importance_row(const moec_gguf_importance *p, size_t tensor, int64_t row);
/** Rows up to hi of a tensor were asked for: where that is all of them, what a file holds is no longer in memory. */
MOEC_API void moec_gguf_importance_drop(const moec_gguf_importance *p, size_t tensor, int64_t hi);
/** Routed experts of all layers that no token reached. */
MOEC_API int64_t moec_gguf_importance_unseen(const moec_gguf_importance *p);

#endif
