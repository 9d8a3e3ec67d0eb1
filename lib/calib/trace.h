/* The routing trace: who was selected, with what weight, for every token in order. Far larger than the statistics and not
 * mergeable, so it is a file of its own, for simulations that need the order (caching, prefetching, re-cut token sets). */
#ifndef MOEC_CALIB_TRACE_H
#define MOEC_CALIB_TRACE_H

#include "calib/pass.h"

typedef struct moec_trace moec_trace;

/** Room for one layer of T tokens. dir: where finished layers wait as layer.N.trace until moec_trace_finish.
 *  Memory: T (12 k + 4) bytes, k = moec_dims.slots. MOEC_ENOMEM. Free with moec_trace_free. */
MOEC_API moec_status moec_trace_new(moec_trace **out, const moec_model *m, int64_t n_tokens, const char *dir, moec_err *err)
    MOEC_USE_RESULT;
MOEC_API void moec_trace_free(moec_trace *t);
MOEC_API size_t moec_trace_bytes(const moec_model *m, int64_t n_tokens);

/** Takes one chunk's routing; from any worker. */
MOEC_API void moec_trace_see(moec_trace *t, const moec_chunk *c, const moec_moe_view *v);
/** Writes the layer to its waiting file. MOEC_EIO, MOEC_ENOFIT. */
MOEC_API moec_status moec_trace_keep(moec_trace *t, int64_t layer, moec_err *err) MOEC_USE_RESULT;
/** All layers are kept: writes the HDF5 file.
 *      /tokens/id, sequence, position [T] i32   /tokens/domain [T] i32, names in attribute `domains`
 *      /layer_N/ids [T,k] i32, gates [T,k] f32, y_norm [T,k] f32 (by descending gate; a token of fewer experts has -1, 0, 0
 *      behind them), one_minus_cos [T] f32
 *  one_minus_cos is 1 - cos(h, h + r) of the residual stream before and after the routed output, the model's residual
 *  multiplier included.
 *  MOEC_EIO, MOEC_ENOFIT, MOEC_EFORMAT (a waiting file is gone). */
MOEC_API moec_status moec_trace_finish(moec_trace *t, const moec_corpus *corpus, const char *path, moec_err *err)
    MOEC_USE_RESULT;

#endif
