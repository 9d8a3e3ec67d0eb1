/* Parallel loops whose results do not depend on the number of threads: chunks come from `grain`, never from the thread
 * count, and ordered merging adds partial results in chunk order. The only file with an OpenMP pragma is par.c.
 * What runs in them takes up to 1 MB of stack (num/product.h): less than threads get by default with glibc, more than with musl, and
 * OMP_STACKSIZE may not say less. */
#ifndef MOEC_BASE_PAR_H
#define MOEC_BASE_PAR_H

#include "base/err.h"

#include <stdint.h>

/** Work on [lo, hi). `worker` is in [0, moec_par_threads()): an index for per-thread scratch memory. */
typedef moec_status moec_range_fn(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err);

/** Runs fn over [0, n) in chunks of `grain`, in parallel; serial (worker 0) when called from inside another
 *  parallel loop or when one chunk is all there is. On failure the error of the lowest failing chunk is kept. */
MOEC_API moec_status moec_par_for(int64_t n, int64_t grain, moec_range_fn *fn, void *ctx, moec_err *err) MOEC_USE_RESULT;

/** As moec_par_for, and after its chunk each worker calls merge(ctx, worker, lo, hi) in ascending chunk order, one
 *  at a time. merge is not called for a chunk that failed nor for any later one. */
MOEC_API moec_status moec_par_ordered(int64_t n, int64_t grain, moec_range_fn *fn, moec_range_fn *merge, void *ctx,
                                      moec_err *err) MOEC_USE_RESULT;

/** Number of workers of an outermost loop: what was set, else the CPUs this process may use. */
MOEC_API int moec_par_threads(void);
MOEC_API void moec_par_set_threads(int n);

/** True inside a parallel loop of more than one worker. */
MOEC_API int moec_par_inside(void);

#endif
