/* Time of assignments and alignments, for bench_align.py.
 *
 *   align matrix I REPEAT IN                         moec_assign on profits [I,I] of file IN, float32
 *   align experts I HIDDEN CANDIDATES broad|even     moec_align_weights on two random SwiGLU experts; CANDIDATES 0: dense
 *
 * Prints the median process CPU seconds, the sum of profits or the fit, and the peak memory in bytes beyond the input. */
#include "base/mem.h"
#include "base/par.h"
#include "base/random.h"
#include "method/align.h"
#include "num/assign.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double cpu(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int ascending(const void *x, const void *y)
{
    const double a = *(const double *)x, b = *(const double *)y;
    return (a > b) - (a < b);
}

static int bench_matrix(int64_t n, int repeat, const char *file)
{
    float *p = malloc((size_t)(n * n) * sizeof *p);
    int32_t *to = malloc((size_t)n * sizeof *to);
    double *took = calloc((size_t)repeat, sizeof *took), sum = 0.0;
    FILE *f = fopen(file, "rb");
    if (!p || !to || !took || !f || fread(p, sizeof *p, (size_t)(n * n), f) != (size_t)(n * n))
        return 1;
    fclose(f);
    const uint64_t before = moec_peak_memory();
    for (int k = 0; k < repeat; k++) {
        took[k] = cpu();
        if (moec_assign(to, p, n, NULL) != MOEC_OK)
            return 1;
        took[k] = cpu() - took[k];
    }
    qsort(took, (size_t)repeat, sizeof *took, ascending);
    for (int64_t i = 0; i < n; i++)
        sum += (double)p[i * n + to[i]];
    printf("%.6f %.17g %llu\n", took[repeat / 2], sum, (unsigned long long)(moec_peak_memory() - before));
    free(p);
    free(to);
    free(took);
    return 0;
}

/* Neurons of one length, or of lengths spread as exp(normal). */
static float *neurons(uint64_t seed, const double *length, int64_t width, int64_t hidden)
{
    float *x = malloc((size_t)(width * hidden) * sizeof *x);
    for (int64_t i = 0; x && i < width * hidden; i++) {
        double s = 0.0;
        for (int k = 0; k < 4; k++) /* four uniform numbers of one draw: near enough to normal */
            s += (double)(moec_mix64(seed + (uint64_t)i) >> (16 * k) & 0xffff) / 65536.0 - 0.5;
        x[i] = (float)(s * sqrt(3.0) * length[i / hidden]);
    }
    return x;
}

static int bench_experts(int64_t width, int64_t hidden, int64_t candidates, bool broad)
{
    double *length = malloc((size_t)width * sizeof *length);
    moec_neurons x[2];
    for (int64_t j = 0; j < width; j++) {
        const double u = (double)(moec_mix64((uint64_t)j) >> 11) * 0x1p-53 + 1e-9, v = (double)(moec_mix64(~(uint64_t)j) >> 11);
        length[j] = broad ? exp(sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v * 0x1p-53)) : 1.0;
    }
    for (uint64_t k = 0; k < 2; k++) {
        const uint64_t from = k << 40;
        x[k] = (moec_neurons){.gate = neurons(from, length, width, hidden),
                              .up = neurons(from | UINT64_C(1) << 60, length, width, hidden),
                              .down = neurons(from | UINT64_C(2) << 60, length, width, hidden),
                              .width = width, .hidden = hidden, .scales = true};
    }
    const moec_align_opts o = {true, candidates > 0 ? 0 : width, candidates};
    moec_alignment out = {.from = malloc((size_t)width * sizeof *out.from), .scale = malloc((size_t)width * sizeof *out.scale)};
    moec_err err = {MOEC_OK, ""};
    const uint64_t before = moec_peak_memory();
    const double start = cpu();
    if (moec_align_weights(&out, &x[0], &x[1], &o, &err) != MOEC_OK) {
        fprintf(stderr, "align: %s\n", err.text);
        return 1;
    }
    printf("%.6f %.17g %llu\n", cpu() - start, out.fit, (unsigned long long)(moec_peak_memory() - before));
    return 0; /* the rest goes with the process */
}

int main(int argc, char **argv)
{
    moec_par_set_threads(1);
    if (argc == 5 && strcmp(argv[1], "matrix") == 0)
        return bench_matrix(atol(argv[2]), atoi(argv[3]), argv[4]);
    if (argc == 6 && strcmp(argv[1], "experts") == 0)
        return bench_experts(atol(argv[2]), atol(argv[3]), atol(argv[4]), strcmp(argv[5], "broad") == 0);
    fprintf(stderr, "usage: align matrix I REPEAT IN | align experts I HIDDEN CANDIDATES broad|even\n");
    return 2;
}
