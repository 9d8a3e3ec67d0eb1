/* blocks [TYPE]...: MB of BF16 input that one CPU second turns into blocks of each type (all when none is named), from a matrix of
 * 256 rows of 2048 values of a normal distribution: without importance, with it, and reading back (MB of BF16 of the same values).
 * Each row is widened to float32 first, as a run does. MOEC_KERNEL sets an upper limit to the instruction set. */
#include "base/random.h"
#include "num/blocks.h"
#include "num/tensor.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { ROWS = 256, COLS = 2048 };

static double cpu(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef enum what { PLAIN, WEIGHTED, READ } what;

static bool pass(uint8_t *out, float *row, const uint16_t *w, const float *importance, moec_block type, what how)
{
    const int64_t bytes = moec_blocks_bytes(type, COLS);
    bool good = true;
    for (int64_t r = 0; r < ROWS && good; r++)
        if (how == READ)
            good = moec_blocks_read(row, out + r * bytes, COLS, type, NULL) == MOEC_OK;
        else {
            moec_dtypes[MOEC_BF16].to_f32(row, w + r * COLS, COLS);
            good = moec_blocks_write(out + r * bytes, row, how == WEIGHTED ? importance : NULL, COLS, type, NULL) == MOEC_OK;
        }
    return good;
}

static double rate(uint8_t *out, float *row, const uint16_t *w, const float *importance, moec_block type, what how)
{
    double best = 0.0;
    for (int repeat = 0; repeat < 5; repeat++) {
        const double start = cpu();
        double done = 0.0;
        while (cpu() - start < 0.1) {
            if (!pass(out, row, w, importance, type, how))
                return 0.0;
            done += 2.0 * ROWS * COLS;
        }
        const double now = done / 1e6 / (cpu() - start);
        best = now > best ? now : best;
    }
    return best;
}

int main(int argc, char **argv)
{
    uint16_t *w = malloc(sizeof *w * ROWS * COLS);
    float row[COLS], importance[COLS];
    uint8_t *out = malloc((size_t)ROWS * COLS * 2);
    if (!w || !out)
        return 1;
    for (uint64_t i = 0; i < (uint64_t)ROWS * COLS; i++) {
        const double a = ((double)(moec_mix64(2 * i) >> 11) + 0.5) * 0x1p-53, b = (double)(moec_mix64(2 * i + 1) >> 11) * 0x1p-53;
        w[i] = moec_to_bf16((float)(0.02 * sqrt(-2.0 * log(a)) * cos(6.283185307179586 * b)));
    }
    for (uint64_t i = 0; i < COLS; i++)
        importance[i] = (float)exp((double)(moec_mix64(i + 1) >> 11) * 0x1p-53 * 4.0);
    printf("%-8s %10s %10s %10s   MB of BF16 per CPU second\n", "type", "write", "weighted", "read");
    for (int k = 0; k < MOEC_BLOCK_COUNT; k++) {
        bool wanted = argc == 1;
        for (int i = 1; i < argc; i++)
            wanted |= moec_blocks_find(argv[i]) == (moec_block)k;
        if (wanted)
            printf("%-8s %10.0f %10.0f %10.0f\n", moec_blocks[k].name, rate(out, row, w, importance, (moec_block)k, PLAIN),
                   rate(out, row, w, importance, (moec_block)k, WEIGHTED), rate(out, row, w, importance, (moec_block)k, READ));
    }
    free(w);
    free(out);
    return 0;
}
