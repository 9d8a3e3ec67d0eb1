/* OpenMP lives here and nowhere else. */
#include "base/par.h"

#include <omp.h>
#include <sched.h>
#include <unistd.h>

static int n_threads; /* 0: not set */

int moec_par_threads(void)
{
    if (n_threads > 0)
        return n_threads;
    cpu_set_t set; /* what this process may use, not what the machine has */
    long n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : n > 1024 ? 1024 : (int)n; /* the call fails where there are more CPUs than the set has room for */
}

void moec_par_set_threads(int n)
{
    n_threads = n > 0 ? n : 0;
}

int moec_par_inside(void)
{
    return omp_in_parallel();
}

typedef struct loop {
    int64_t n, grain, chunks, failed; /* failed: lowest chunk that failed, `chunks` when none */
    moec_range_fn *fn, *merge;
    void *ctx;
    moec_err first;
} loop;

static int64_t chunk_end(const loop *l, int64_t k)
{
    return l->n - k * l->grain > l->grain ? (k + 1) * l->grain : l->n;
}

static void note_failure(loop *l, int64_t k, const moec_err *mine)
{
#pragma omp critical(moec_par_failure)
    if (k < l->failed) {
        l->failed = k;
        l->first = *mine;
    }
}

static int64_t lowest_failure(loop *l)
{
    int64_t f;
#pragma omp critical(moec_par_failure)
    f = l->failed;
    return f;
}

static void run_one(loop *l, moec_range_fn *fn, int64_t k)
{
    moec_err mine = {MOEC_OK, ""};
    if (lowest_failure(l) < k) /* the result is lost anyway */
        return;
    if ((mine.code = fn(l->ctx, omp_get_thread_num(), k * l->grain, chunk_end(l, k), &mine)) != MOEC_OK)
        note_failure(l, k, &mine);
}

static moec_status run(loop *l, moec_err *err)
{
    if (l->n <= 0)
        return MOEC_OK;
    if (l->grain < 1)
        l->grain = 1;
    l->chunks = (l->n - 1) / l->grain + 1;
    l->failed = l->chunks;
    if (l->chunks == 1 || omp_in_parallel() || moec_par_threads() == 1) {
        /* Worker 0 of a nested loop is a lie only as far as scratch goes: callers that nest own theirs. */
        moec_err mine = {MOEC_OK, ""};
        for (int64_t k = 0; k < l->chunks; k++) {
            moec_status st = l->fn(l->ctx, 0, k * l->grain, chunk_end(l, k), &mine);
            if (st == MOEC_OK && l->merge)
                st = l->merge(l->ctx, 0, k * l->grain, chunk_end(l, k), &mine);
            if (st != MOEC_OK)
                return moec_fail(err, st, "%s", mine.text);
        }
        return MOEC_OK;
    }
    int threads = l->chunks < moec_par_threads() ? (int)l->chunks : moec_par_threads();
    if (l->merge) {
#pragma omp parallel for ordered schedule(dynamic, 1) num_threads(threads)
        for (int64_t k = 0; k < l->chunks; k++) {
            run_one(l, l->fn, k);
#pragma omp ordered
            if (lowest_failure(l) > k)
                run_one(l, l->merge, k);
        }
    } else {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
        for (int64_t k = 0; k < l->chunks; k++)
            run_one(l, l->fn, k);
    }
    return l->failed < l->chunks ? moec_fail(err, l->first.code, "%s", l->first.text) : MOEC_OK;
}

moec_status moec_par_for(int64_t n, int64_t grain, moec_range_fn *fn, void *ctx, moec_err *err)
{
    loop l = {.n = n, .grain = grain, .fn = fn, .ctx = ctx};
    return run(&l, err);
}

moec_status moec_par_ordered(int64_t n, int64_t grain, moec_range_fn *fn, moec_range_fn *merge, void *ctx,
                             moec_err *err)
{
    loop l = {.n = n, .grain = grain, .fn = fn, .merge = merge, .ctx = ctx};
    return run(&l, err);
}
