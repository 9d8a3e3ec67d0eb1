/* Time of quantizing one SwiGLU expert by GPTQ, for bench_gptq.py.
 *
 *   gptq HIDDEN WIDTH TOKENS BITS GROUP SWEEPS bf16|f32 REPEAT IN
 *
 * IN holds float32: gate and up [WIDTH,HIDDEN], down [HIDDEN,WIDTH], the inputs of gate and up [TOKENS,HIDDEN], of down [TOKENS,WIDTH].
 * Prints medians in CPU seconds and wall seconds of: the Hessians, their factors, the scales by search, the rounding, what it costs to
 * know the whole loss of rounding to nearest too, and all but that; then the sum of losses and of losses of rounding to nearest. One
 * thread. Memory is had before and used again for every expert. */
#include "base/par.h"
#include "method/gptq.h"
#include "num/product.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { HESSIAN, FACTOR, SCALES, ROUNDING, NEAREST, ALL, STAGES, MOST = 99 };

static double now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int ascending(const void *x, const void *y)
{
    const double a = *(const double *)x, b = *(const double *)y;
    return (a > b) - (a < b);
}

static double took[2][STAGES][MOST], from[2];

static void start(void)
{
    from[0] = now(CLOCK_PROCESS_CPUTIME_ID);
    from[1] = now(CLOCK_MONOTONIC);
}

static void stop(int stage, int run)
{
    const double to[2] = {now(CLOCK_PROCESS_CPUTIME_ID), now(CLOCK_MONOTONIC)};
    for (int k = 0; k < 2; k++) {
        took[k][stage][run] += to[k] - from[k];
        if (stage != NEAREST)
            took[k][ALL][run] += to[k] - from[k];
    }
}

static void *need(size_t n)
{
    void *p = malloc(n);
    if (!p)
        exit(4);
    return p;
}

static void check(moec_status st, const moec_err *err)
{
    if (st != MOEC_OK) {
        fprintf(stderr, "gptq: %s\n", err->text);
        exit(1);
    }
}

typedef struct kind {
    int64_t rows, cols;
    double *h;
    moec_gptq *g;
} kind;

static void quantize(kind *k, double sum[2], const float *const *w, int matrices, const float *x, int64_t tokens,
                     const moec_qgrid *grid, int sweeps, moec_compute mode, int run)
{
    moec_err err = {MOEC_OK, ""};
    moec_gptq_opts opts = MOEC_GPTQ_DEFAULTS;
    opts.sweeps = sweeps;
    opts.compute = mode;
    if (!k->h)
        k->h = need((size_t)(k->cols * k->cols) * sizeof *k->h);
    start();
    moec_gram(k->h, k->cols, x, k->cols, tokens, 0.0, mode);
    stop(HESSIAN, run);
    start();
    check(k->g ? moec_gptq_renew(k->g, k->h, &err) : moec_gptq_new(&k->g, k->h, k->cols, &opts, &err), &err);
    stop(FACTOR, run);
    for (int i = 0; i < matrices; i++) {
        moec_qcodes c, again;
        double loss, nearest;
        check(moec_qcodes_new(&c, grid, k->rows, k->cols, &err), &err);
        start();
        check(moec_quant_range(&c, w[i], MOEC_QRANGE_CLIP, moec_gptq_importance(k->g), 0, k->rows, &err), &err);
        stop(SCALES, run);
        check(moec_qcodes_new(&again, grid, k->rows, k->cols, &err), &err);
        memcpy(again.scale, c.scale, (size_t)(k->rows * (k->cols / grid->group)) * sizeof *c.scale);
        start();
        check(moec_gptq_round(&c, &loss, NULL, k->g, w[i], &err), &err);
        stop(ROUNDING, run);
        start();
        check(moec_gptq_round(&again, &loss, &nearest, k->g, w[i], &err), &err);
        stop(NEAREST, run);
        if (memcmp(c.code, again.code, (size_t)(k->rows * k->cols)) != 0)
            exit(1);
        sum[0] += loss;
        sum[1] += nearest;
        moec_qcodes_release(&c);
        moec_qcodes_release(&again);
    }
}

int main(int argc, char **argv)
{
    if (argc != 10) {
        fprintf(stderr, "usage: gptq HIDDEN WIDTH TOKENS BITS GROUP SWEEPS bf16|f32 REPEAT IN\n");
        return 2;
    }
    const int64_t hidden = atol(argv[1]), width = atol(argv[2]), tokens = atol(argv[3]), cells = hidden * width;
    const moec_qgrid grid = {.bits = atoi(argv[4]), .group = atol(argv[5]), .scale_type = MOEC_F16};
    const moec_compute mode = strcmp(argv[7], "bf16") == 0 ? MOEC_COMPUTE_BF16 : MOEC_COMPUTE_F32;
    const int sweeps = atoi(argv[6]), repeat = atoi(argv[8]) < MOST ? atoi(argv[8]) : MOST;
    const size_t all = (size_t)(3 * cells + tokens * (hidden + width));
    float *data = need(all * sizeof *data);
    FILE *f = fopen(argv[9], "rb");
    double sum[2] = {0, 0};
    if (!f || fread(data, sizeof *data, all, f) != all)
        return 1;
    fclose(f);
    const float *w[3] = {data, data + cells, data + 2 * cells}, *x = data + 3 * cells;
    kind kinds[2] = {{.rows = width, .cols = hidden}, {.rows = hidden, .cols = width}};
    moec_par_set_threads(1);
    for (int run = 0; run < repeat; run++) {
        sum[0] = sum[1] = 0.0;
        quantize(&kinds[0], sum, w, 2, x, tokens, &grid, sweeps, mode, run);
        quantize(&kinds[1], sum, w + 2, 1, x + tokens * hidden, tokens, &grid, sweeps, mode, run);
    }
    for (int run = 0; run < repeat; run++) /* that call did all of it again */
        for (int k = 0; k < 2; k++)
            took[k][NEAREST][run] -= took[k][ROUNDING][run];
    for (int k = 0; k < 2; k++)
        for (int stage = 0; stage < STAGES; stage++) {
            qsort(took[k][stage], (size_t)repeat, sizeof(double), ascending);
            printf("%.6f ", took[k][stage][repeat / 2]);
        }
    printf("%.9g %.9g\n", sum[0], sum[1]);
    for (int k = 0; k < 2; k++) {
        moec_gptq_free(kinds[k].g);
        free(kinds[k].h);
    }
    free(data);
    return 0;
}
