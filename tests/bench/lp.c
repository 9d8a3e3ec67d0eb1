/* Widths of 48 x 128 experts as a choice under one budget: seconds of CPU, gap to the LP's bound.    lp [SEED] */
#include "base/mem.h"
#include "base/random.h"
#include "num/lp.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { LAYERS = 48, EXPERTS = 128, GROUPS = LAYERS * EXPERTS, WIDTHS = 4, OPTIONS = GROUPS * WIDTHS };

static int64_t first[GROUPS + 1], size[OPTIONS], option[2 * LAYERS][EXPERTS];
static double cost[OPTIONS];
static moec_lp_row row[2 * LAYERS];
static uint64_t state;

static double uniform(void)
{
    state += UINT64_C(0x9e3779b97f4a7c15);
    return (double)(moec_mix64(state) >> 11) * 0x1p-53;
}

/* Errors fall by 3 to 5 a bit, experts' weights vary by e^4, layers' by e^2. vary: sizes are 0.4 to 1 of 128. */
static int64_t make(bool vary, double bits)
{
    double budget = 0.0;
    for (int g = 0; g < GROUPS; g++) {
        static double layer;
        if (g % EXPERTS == 0)
            layer = exp(2.0 * uniform());
        const double weight = layer * exp(4.0 * uniform()), fall = 3.0 + 2.0 * uniform();
        const int64_t unit = vary ? 52 + (int64_t)(76.0 * uniform()) : 128;
        for (int b = 0; b < WIDTHS; b++) {
            size[WIDTHS * g + b] = unit * (b + 1);
            cost[WIDTHS * g + b] = weight * (0.9 + 0.2 * uniform()) * pow(fall, (double)-b);
        }
        first[g] = WIDTHS * g;
        budget += bits * (double)unit;
    }
    first[GROUPS] = OPTIONS;
    for (int r = 0; r < 2 * LAYERS; r++) {
        for (int e = 0; e < EXPERTS; e++)
            option[r][e] = first[r / 2 * EXPERTS + e] + 1 + r % 2;
        row[r] = (moec_lp_row){option[r], EXPERTS, 1};
    }
    return (int64_t)budget;
}

/* Bytes at 2, 3, 4 and 8 bits of matrices of two kinds, down projections padded differently. */
static int64_t make_bytes(int groups, double bits)
{
    static const int width[WIDTHS] = {2, 3, 4, 8}, pad[WIDTHS] = {1, 32, 1, 5};
    double budget = 0.0;
    for (int g = 0; g < groups; g++) {
        const double weight = exp(6.0 * uniform()), fall = 3.0 + 2.0 * uniform();
        for (int b = 0; b < WIDTHS; b++) {
            size[WIDTHS * g + b] = 2048 * 768 / 8 * width[b] + 2048 * 768 / 64 + (g % 3 == 2 ? 2048 * pad[b] : 0);
            cost[WIDTHS * g + b] = weight * (0.9 + 0.2 * uniform()) * pow(fall, (double)-width[b]);
        }
        first[g] = WIDTHS * g;
        budget += 2048.0 * 768.0 / 8.0 * (bits + 0.125);
    }
    first[groups] = WIDTHS * groups;
    return (int64_t)budget;
}

static int solve(const char *what, const moec_lp *p)
{
    moec_lp_answer a;
    moec_err err = {MOEC_OK, ""};
    struct timespec from, to;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &from);
    if (moec_lp_solve(&a, p, 60.0, &err) != MOEC_OK) {
        fprintf(stderr, "%s: %s\n", what, err.text);
        return 1;
    }
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &to);
    printf("| %-40s | %.3f | %.9g | %.1e | %s |\n", what,
           (double)(to.tv_sec - from.tv_sec) + 1e-9 * (double)(to.tv_nsec - from.tv_nsec), a.cost, (a.cost - a.bound) / a.cost,
           a.proven ? "yes" : "no");
    moec_lp_answer_release(&a);
    return 0;
}

int main(int argc, char **argv)
{
    state = argc > 1 ? (uint64_t)strtoull(argv[1], NULL, 10) : 1;
    int failed = 0;
    moec_lp p = {.groups = GROUPS, .first = first, .cost = cost, .size = size, .row = row};
    printf("| 6144 experts, 4 widths | CPU s | cost | gap | proven |\n|---|---|---|---|---|\n");
    p.budget = make(false, 2.473);
    failed += solve("equal sizes, 2.473 bits", &p);
    p.rows = 2 * LAYERS;
    failed += solve("the same, PMQ's rows a layer", &p);
    p.budget = make(false, 1.03);
    failed += solve("equal sizes, 1.03 bits, rows that bind", &p);
    p.rows = 0;
    p.budget = make(true, 2.473);
    failed += solve("sizes of their own, 2.473 bits", &p);
    p.budget = make(true, 2.1);
    failed += solve("sizes of their own, 2.1 bits", &p);
    p.budget = make(true, 3.0);
    p.rows = 2 * LAYERS;
    failed += solve("sizes of their own, 3 bits, rows", &p);
    p.rows = 0;
    p.groups = 4 * 16 * 3;
    p.budget = make_bytes(4 * 16 * 3, 2.5);
    failed += solve("4 x 16 x 3 matrices, bytes, 2.5 bits", &p);
    p.groups = 16 * 64;
    p.budget = make_bytes(16 * 64, 2.5);
    failed += solve("16 x 64 matrices, bytes, 2.5 bits", &p);
    p.groups = GROUPS;
    p.budget = make_bytes(GROUPS, 2.5);
    failed += solve("48 x 128 matrices, bytes, 2.5 bits", &p);
    return failed > 0;
}
