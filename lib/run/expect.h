/* What the bytes of an output's shards must be, found anew from the source, the plan and the headers of the output: the
 * check shares nothing with the list by which the output was written but the rules for a tensor's fate. */
#ifndef MOEC_RUN_EXPECT_H
#define MOEC_RUN_EXPECT_H

#include "run/layout.h"

typedef struct moec_expect moec_expect;

/** All borrowed until moec_expect_free. The plan must fit the source (moec_plan_check). `weights`: tensors that were computed
 *  anew; with NULL only their names, types and shapes are checked. MOEC_ENOMEM; MOEC_EFORMAT: `weights` lacks one. */
MOEC_API moec_status moec_expect_new(moec_expect **out, const moec_model *source, const moec_plan *p,
                                     const moec_override *weights, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_expect_free(moec_expect *x);
/** Adds the next shard by the front of its file (at least its whole header; borrowed).
 *  MOEC_ESHAPE: a tensor that should not be there, or of another dtype or shape, or twice; what moec_st_parse returns. */
MOEC_API moec_status moec_expect_shard(moec_expect *x, const void *front, size_t size, uint64_t file_size,
                                       const char *name, moec_err *err) MOEC_USE_RESULT;
/** MOEC_ESHAPE: a tensor that no shard has (the text names the first). */
MOEC_API moec_status moec_expect_all(const moec_expect *x, moec_err *err) MOEC_USE_RESULT;
/** Tensors that were computed anew and have nothing to be compared with. */
MOEC_API uint64_t moec_expect_unknown(const moec_expect *x);
/** Compares bytes [lo, hi) of a shard file with the source: a moec_check_fn with the moec_expect as context. MOEC_EIO: they
 *  differ (tensor and byte named), or the source cannot be read. Cost: one read of both. */
MOEC_API moec_status moec_expect_range(void *x, size_t s, const unsigned char *file, uint64_t lo, uint64_t hi,
                                       moec_err *err) MOEC_USE_RESULT;

#endif
