/* Speed of moec_gemm against OpenBLAS and, with -DMOEC_BENCH_DNNL and -ldnnl, oneDNN, on one thread and on the expert
 * shapes of small MoE models. Weights are bf16 as in checkpoints; OpenBLAS gets them as floats, converted beforehand
 * and not counted. "hot" repeats one matrix, "cold" walks through 160 MB of them, as a layer pass does.
 *
 *     taskset -c 0 ./bench_gemm [seconds per figure [views]]     views: only moec_gemm_weight
 *
 * Unit: GFLOP per second of process CPU time, medians, so that other processes disturb little. */
#define _POSIX_C_SOURCE 200809L

#include "base/mem.h"
#include "base/par.h"
#include "num/gemm.h"
#include "num/linalg.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifdef MOEC_BENCH_DNNL
#include <dnnl.h>
#include <omp.h>
#endif

enum { MAX_REPS = 4000, MAX_TOKENS = 512, MANY_TOKENS = 16384, POOL_BYTES = 160 << 20 };

static double budget = 0.3; /* seconds per figure */

static double cpu_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct bench {
    int64_t n, rows, k;
    uint16_t *w;          /* pool of bf16 matrices */
    float *w32, *x, *y;   /* one matrix as floats; panels or rows, whichever the subject takes */
    void *scratch;
    moec_compute mode;
    int64_t matrices, turn; /* how many of the pool to walk through, and the next */
#ifdef MOEC_BENCH_DNNL
    dnnl_engine_t engine;
    dnnl_stream_t stream;
    dnnl_primitive_t primitive;
    dnnl_memory_t src, weights, dst;
#endif
} bench;

typedef void subject_fn(bench *b);

static void check(moec_status st, const moec_err *err)
{
    if (st != MOEC_OK) {
        fprintf(stderr, "bench: %s\n", err->text);
        exit(1);
    }
}

static void run_ours(bench *b)
{
    moec_err err = {MOEC_OK, ""};
    const uint16_t *w = b->w + b->turn++ % b->matrices * b->rows * b->k;
    check(moec_gemm(b->y, b->x, b->n, b->k, w, MOEC_BF16, b->rows, b->mode, b->scratch, &err), &err);
}

static void run_ours_f32(bench *b)
{
    moec_err err = {MOEC_OK, ""};
    check(moec_gemm(b->y, b->x, b->n, b->k, b->w32, MOEC_F32, b->rows, b->mode, b->scratch, &err), &err);
}

static void run_blas(bench *b)
{
    moec_sgemm(false, true, b->n, b->rows, b->k, 1.0F, b->x, b->k, b->w32, b->k, 0.0F, b->y, b->rows);
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Median time of one call. Short calls are timed in groups, since the clock itself costs about a microsecond. */
static double seconds_per_call(subject_fn *run, bench *b)
{
    static double took[MAX_REPS];
    int n = 0, group = (int)(2e8 / (2.0 * (double)b->n * (double)b->rows * (double)b->k)) + 1;
    double stop = cpu_seconds() + budget;
    run(b);
    while (n < 5 || (n < MAX_REPS && cpu_seconds() < stop)) {
        double start = cpu_seconds();
        for (int i = 0; i < group; i++)
            run(b);
        took[n++] = (cpu_seconds() - start) / group;
    }
    qsort(took, (size_t)n, sizeof *took, ascending);
    return took[n / 2];
}

static double gflops(subject_fn *run, bench *b)
{
    return 2e-9 * (double)b->n * (double)b->rows * (double)b->k / seconds_per_call(run, b);
}

#ifdef MOEC_BENCH_DNNL
static void must(dnnl_status_t st)
{
    if (st != dnnl_success) {
        fprintf(stderr, "bench: oneDNN status %d\n", (int)st);
        exit(1);
    }
}

static void run_dnnl(bench *b)
{
    dnnl_exec_arg_t args[] = {{DNNL_ARG_SRC, b->src}, {DNNL_ARG_WEIGHTS, b->weights}, {DNNL_ARG_DST, b->dst}};
    must(dnnl_primitive_execute(b->primitive, b->stream, 3, args));
    must(dnnl_stream_wait(b->stream));
}

/* dst[n, rows] = src[n, k] . weights[k, rows], the weights being W[rows, k] as stored, seen through strides. The
 * activations are bf16 already: their conversion is not counted, unlike in our figures. */
static double dnnl_gflops(bench *b)
{
    dnnl_dims_t src = {b->n, b->k}, weights = {b->k, b->rows}, dst = {b->n, b->rows};
    dnnl_dims_t src_step = {b->k, 1}, weights_step = {1, b->k}, dst_step = {b->rows, 1};
    dnnl_memory_desc_t ms, mw, md;
    dnnl_matmul_desc_t op;
    dnnl_primitive_desc_t pd;
    must(dnnl_memory_desc_init_by_strides(&ms, 2, src, dnnl_bf16, src_step));
    must(dnnl_memory_desc_init_by_strides(&mw, 2, weights, dnnl_bf16, weights_step));
    must(dnnl_memory_desc_init_by_strides(&md, 2, dst, dnnl_f32, dst_step));
    must(dnnl_matmul_desc_init(&op, &ms, &mw, NULL, &md));
    must(dnnl_engine_create(&b->engine, dnnl_cpu, 0));
    must(dnnl_stream_create(&b->stream, b->engine, dnnl_stream_default_flags));
    must(dnnl_primitive_desc_create(&pd, &op, NULL, b->engine, NULL));
    must(dnnl_primitive_create(&b->primitive, pd));
    must(dnnl_memory_create(&b->src, &ms, b->engine, b->w)); /* any finite bf16 values do */
    must(dnnl_memory_create(&b->weights, &mw, b->engine, b->w));
    must(dnnl_memory_create(&b->dst, &md, b->engine, b->y));
    double rate = gflops(run_dnnl, b);
    dnnl_memory_destroy(b->src);
    dnnl_memory_destroy(b->weights);
    dnnl_memory_destroy(b->dst);
    dnnl_primitive_destroy(b->primitive);
    dnnl_primitive_desc_destroy(pd);
    dnnl_stream_destroy(b->stream);
    dnnl_engine_destroy(b->engine);
    return rate;
}
#endif

static void fill(float *x, uint16_t *w, int64_t nx, int64_t nw)
{
    uint32_t seed = 1;
    for (int64_t i = 0; i < nw; i++) {
        seed = seed * 1664525U + 1013904223U;
        w[i] = (uint16_t)(0x3c00U | (seed >> 16 & 0x81ffU)); /* +-0.008 .. 0.03 */
    }
    for (int64_t i = 0; i < nx; i++) {
        seed = seed * 1664525U + 1013904223U;
        x[i] = (float)(seed >> 8) * 0x1p-23F - 1.0F;
    }
}

static void shape(bench *b, int64_t rows, int64_t k)
{
    static const int64_t tokens[] = {16, 32, 64, 128, 256, 512};
    b->rows = rows;
    b->k = k;
    moec_dtypes[MOEC_BF16].to_f32(b->w32, b->w, rows * k);
    for (size_t i = 0; i < MOEC_COUNT(tokens); i++) {
        int64_t all = (int64_t)POOL_BYTES / 2 / (rows * k);
        b->n = tokens[i];
        printf("[%4lld,%4lld] %6lld", (long long)rows, (long long)k, (long long)b->n);
        for (int mode = 0; mode < 2; mode++) {
            b->mode = mode ? MOEC_COMPUTE_BF16 : MOEC_COMPUTE_F32;
            b->matrices = 1;
            printf(" %8.1f", gflops(run_ours, b));
            b->matrices = all;
            printf(" %8.1f", gflops(run_ours, b));
            if (mode == 0)
                printf(" %8.1f %8.1f", gflops(run_ours_f32, b), gflops(run_blas, b));
        }
#ifdef MOEC_BENCH_DNNL
        printf(" %8.1f", dnnl_gflops(b));
#endif
        printf("\n");
        fflush(stdout);
    }
}

/* ---- views: the storages of checkpoints through moec_gemm_weight ------------------------------------------------- */

static moec_weight view; /* of the matrix whose turn it is */

static void run_view(bench *b)
{
    moec_err err = {MOEC_OK, ""};
    view.at = b->turn++ % b->matrices * b->rows * b->k;
    check(moec_gemm_weight(b->y, b->x, b->n, &view, b->mode, b->scratch, &err), &err);
}

static void views(bench *b, int64_t rows, int64_t k)
{
    static const int64_t tokens[] = {16, 64, 512};
    static const char *const names[] = {"moec_gemm bf16", "view bf16",           "view fp8 128x128",
                                        "view mxfp4",     "view [in, out] bf16", "view [in, 2*out]"};
    size_t n = (size_t)POOL_BYTES / 2;
    unsigned char *codes = (unsigned char *)b->w + n, *exponents = malloc(n / 16);
    float *scales = malloc(n / 16);
    for (size_t i = 0; i < n; i++)
        codes[i] = (unsigned char)(b->w[i] & 0xbf) ^ (unsigned char)(i * 37 & 0x80);
    for (size_t i = 0; exponents && scales && i < n / 64; i++) {
        scales[i] = 1e-4F;
        memset(exponents + i * 4, 120, 4);
    }
    moec_tensor bf16 = {.dtype = MOEC_BF16, .data = b->w, .bytes = n};
    moec_tensor fp8 = {.dtype = MOEC_F8_E4M3, .data = codes, .bytes = n}, mx = {.dtype = MOEC_U8, .data = codes, .bytes = n};
    moec_tensor f32 = {.dtype = MOEC_F32, .data = scales, .bytes = n / 16};
    moec_tensor e8m0 = {.dtype = MOEC_U8, .data = exponents, .bytes = n / 16};
    const moec_weight all[] = {
        [1] = {&bf16, NULL, rows, k, 0, k, 1, 0, 0, 0, MOEC_PLAIN},
        [2] = {&fp8, &f32, rows, k, 0, k, 1, 128, 128, (int32_t)(k / 128), MOEC_FP8},
        [3] = {&mx, &e8m0, rows, k, 0, k, 1, 0, 0, 0, MOEC_MXFP4},
        [4] = {&bf16, NULL, rows, k, 0, 1, rows, 0, 0, 0, MOEC_PLAIN},
        [5] = {&bf16, NULL, rows / 2, k, 0, 2, rows, 0, 0, 0, MOEC_PLAIN},
    };
    b->rows = rows;
    b->k = k;
    b->matrices = (int64_t)n / 2 / (rows * k);
    printf("\nviews of [%lld, %lld], cold: f32, bf16 for 16, 64 and 512 tokens\n", (long long)rows, (long long)k);
    for (size_t i = 0; i < MOEC_COUNT(names); i++) {
        printf("%-20s", names[i]);
        view = all[i];
        for (size_t t = 0; t < MOEC_COUNT(tokens); t++)
            for (int mode = 0; mode < 2; mode++) {
                b->n = tokens[t];
                b->mode = mode ? MOEC_COMPUTE_BF16 : MOEC_COMPUTE_F32;
                double rate = gflops(i ? run_view : run_ours, b);
                printf(" %8.1f", i == 5 ? rate / 2 : rate); /* half the rows */
                fflush(stdout);
            }
        printf("\n");
    }
    free(scales);
    free(exponents);
}

/* ---- panel copies: GB/s of read plus write ---------------------------------------------------------------------- */

static int32_t order[MANY_TOKENS];
static float scale[MANY_TOKENS];

static void run_pack(bench *b)
{
    moec_panel_pack(b->y, b->x, b->k, order, b->n, b->k);
}

static void run_unpack(bench *b)
{
    moec_panel_unpack(b->y, b->k, b->x, b->n, b->k);
}

static void run_scatter(bench *b)
{
    moec_panel_scatter_add(b->y, b->k, order, scale, b->x, b->n, b->k);
}

static void run_memcpy(bench *b)
{
    memcpy(b->y, b->x, (size_t)(b->n * b->k) * sizeof(float));
}

static void copies(bench *b)
{
    static const int64_t size[][2] = {{512, 512}, {512, 1024}, {512, 2048}, {512, 1000}, {MANY_TOKENS, 1024}};
    printf("\ncopies, GB/s read + write      memcpy     pack   unpack  scatter (3 streams)\n");
    for (size_t i = 0; i < MOEC_COUNT(size); i++) {
        b->n = size[i][0];
        b->k = size[i][1];
        b->rows = 100; /* only sizes the timing groups */
        for (int j = 0; j < b->n; j++) {
            order[j] = (int32_t)((j * 389 + 7) % b->n);
            scale[j] = 0.001F;
        }
        double bytes = 8e-9 * (double)b->n * (double)b->k;
        printf("%5lld tokens x %4lld        ", (long long)b->n, (long long)b->k);
        printf(" %8.1f", bytes / seconds_per_call(run_memcpy, b));
        printf(" %8.1f", bytes / seconds_per_call(run_pack, b));
        printf(" %8.1f", bytes / seconds_per_call(run_unpack, b));
        printf(" %8.1f\n", 1.5 * bytes / seconds_per_call(run_scatter, b));
    }
}

int main(int argc, char **argv)
{
    static const int64_t shapes[][2] = {{1024, 1024}, {512, 1024}, {1024, 512}, {1536, 2048}, {2048, 768}, {768, 2048}};
    moec_err err = {MOEC_OK, ""};
    bench b = {.matrices = 1};
    if (argc > 1)
        budget = atof(argv[1]);
    moec_par_set_threads(1);
    moec_linalg_init();
#ifdef MOEC_BENCH_DNNL
    omp_set_num_threads(1);
#endif
    check(MOEC_NEW(b.w, POOL_BYTES / 2, &err), &err);
    check(MOEC_NEW(b.w32, 2048 * 2048, &err), &err);
    check(MOEC_NEW(b.x, MANY_TOKENS * 1024, &err), &err);
    check(MOEC_NEW(b.y, MANY_TOKENS * 1024, &err), &err);
    check(moec_alloc(&b.scratch, moec_gemm_scratch_bytes(MOEC_COMPUTE_BF16, MAX_TOKENS, 7168), 1, &err), &err);
    fill(b.x, b.w, MANY_TOKENS * 1024, POOL_BYTES / 2);
    printf("GFLOP per cpu-s, 1 thread; kernels %s, %s\n", moec_gemm_kernel(MOEC_COMPUTE_F32),
           moec_gemm_kernel(MOEC_COMPUTE_BF16));
    printf("weights     tokens  f32 hot f32 cold  f32 w32 OpenBLAS bf16 hot bf16 cold  oneDNN bf16 hot\n");
    for (size_t i = 0; i < MOEC_COUNT(shapes) && argc <= 2; i++)
        shape(&b, shapes[i][0], shapes[i][1]);
    views(&b, 2048, 7168);
    views(&b, 768, 2048);
    if (argc <= 2)
        copies(&b);
    moec_free(b.scratch);
    moec_free(b.y);
    moec_free(b.x);
    moec_free(b.w32);
    moec_free(b.w);
    return 0;
}
