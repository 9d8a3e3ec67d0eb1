/* Groups of experts by a recipe: what every one promises, what must not matter, and what is refused. */
#include "base/mem.h"
#include "base/par.h"
#include "merge_bench.h"

#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* What holds of all groups. */
static void group(moec_merge_groups *g, const bench *b, const moec_merge_recipe *r)
{
    moec_err err = {MOEC_OK, ""};
    moec_merge_groups again;
    const size_t bytes = (size_t)b->experts * sizeof *g->weight;
    int64_t centres = 0;
    assert_int_equal(moec_merge_groups_new(g, b->experts, &err), MOEC_OK);
    assert_int_equal(moec_merge_groups_new(&again, b->experts, &err), MOEC_OK);
    moec_par_set_threads(1);
    if (moec_merge_group(g, &b->t, r, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    moec_par_set_threads(3);
    assert_int_equal(moec_merge_group(&again, &b->t, r, &err), MOEC_OK);
    moec_par_set_threads(0);
    assert_memory_equal(g->centre, again.centre, (size_t)b->experts * sizeof *g->centre);
    assert_memory_equal(g->weight, again.weight, bytes);
    assert_memory_equal(g->saliency, again.saliency, bytes);
    assert_memory_equal(g->distance, again.distance, bytes);
    moec_merge_groups_release(&again);
    for (int64_t e = 0; e < b->experts; e++) {
        const int64_t c = g->centre[e], width = b->experts / b->t.blocks;
        double sum = 0.0;
        if (c < 0) {
            assert_true(g->weight[e] == 0.0 && isnan(g->distance[e]) && r->grouping == MOEC_BY_PRUNING);
            continue;
        }
        assert_true(g->centre[c] == c && c / width == e / width);
        assert_true(c == e ? g->distance[e] == 0.0 : g->distance[e] >= 0.0);
        assert_true(c == e || !b->t.guarded || (!b->t.guarded[c] && !b->t.guarded[e]));
        centres += c == e;
        for (int64_t f = 0; f < b->experts; f++)
            sum += g->centre[f] == c ? g->weight[f] : 0.0;
        assert_true(fabs(sum - 1.0) < 1e-12);
    }
    assert_int_equal(centres, b->t.keep);
}

/* ---- groups ------------------------------------------------------------------------------------------------------------- */

/* An expert and its copy with permuted neurons are the same function: every distance of outputs is 0, and they go together. */
static void twins(void **state)
{
    static const moec_merge_distance kinds[] = {MOEC_FAR_MEAN_OUTPUT, MOEC_FAR_OUTPUT_COSINE, MOEC_FAR_OUTPUT, MOEC_FAR_GATED};
    static const moec_merge_grouping ways[] = {MOEC_BY_AVERAGE, MOEC_BY_WARD, MOEC_BY_COMPLETE, MOEC_BY_SINGLE, MOEC_BY_KMEANS};
    bench b;
    bench_twin c;
    double d[BENCH_EXPERTS * BENCH_EXPERTS], kernel[BENCH_EXPERTS * BENCH_EXPERTS];
    (void)state;
    bench_open(&b, "qwen3_moe", 8, 2, 300);
    bench_copy(&c, &b, 4, 1);
    for (size_t k = 0; k < MOEC_COUNT(kinds); k++) {
        if (kinds[k] == MOEC_FAR_GATED) { /* the router counts, too */
            for (int64_t t = 0; t < b.n; t++)
                b.logits[t * b.all + 1] = b.logits[t * b.all + 4];
            bench_route(&b);
        }
        bench_distances(d, kernel, &b, kinds[k]);
        double most = 0.0;
        for (int64_t i = 0; i < 64; i++)
            most = fmax(most, d[i]);
        assert_true(d[1 * 8 + 4] <= 1e-6 * most);
        bench_distances(d, kernel, &b, MOEC_FAR_WEIGHTS);
        assert_true(d[1 * 8 + 4] > 0.1 * d[1 * 8 + 3]); /* which weights do not show */
        for (size_t w = 0; w < MOEC_COUNT(ways); w++) {
            const moec_merge_recipe r = {.distance = kinds[k], .grouping = ways[w], .saliency = MOEC_MASS_GATE_SQ,
                                         .weights = MOEC_MASS_GATE_SQ, .restarts = 32};
            moec_merge_groups g;
            b.t.keep = 7;
            group(&g, &b, &r);
            assert_true(g.centre[1] == g.centre[4]);
            assert_true(fabs(g.weight[1] - g.saliency[1] / (g.saliency[1] + g.saliency[4])) < 1e-12);
            assert_true(g.distance[1] + g.distance[4] <= 1e-6 * most);
            for (int64_t e = 0; e < 8; e++)
                assert_true(e == 1 || e == 4 || g.centre[e] == e);
            moec_merge_groups_release(&g);
        }
    }
    bench_copy_free(&c);
    bench_close(&b);
}

/* All groupings keep what every grouping promises; with guarded experts and in blocks, too. */
static void every_way(void **state)
{
    static const bool guarded[BENCH_EXPERTS] = {[2] = true, [5] = true};
    bench b;
    (void)state;
    bench_open(&b, "qwen3_moe", 8, 2, 200);
    for (int way = 0; way < MOEC_BY_COUNT; way++)
        for (int far = 0; far < MOEC_FAR_COUNT; far++)
            for (int with = 0; with < 3; with++) {
                const moec_merge_recipe r = {.distance = (moec_merge_distance)far, .grouping = (moec_merge_grouping)way,
                                             .saliency = MOEC_MASS_REAP, .weights = MOEC_MASS_COUNT, .group_size = 16, .restarts = 8};
                moec_merge_groups g;
                double mass[BENCH_EXPERTS];
                b.t.guarded = with == 1 ? guarded : NULL;
                b.t.blocks = with == 2 ? 2 : 1;
                b.t.keep = 4;
                group(&g, &b, &r);
                bench_masses(mass, &b, MOEC_MASS_REAP);
                assert_memory_equal(mass, g.saliency, 8 * sizeof *mass);
                for (int64_t e = 0; e < 8; e++)
                    assert_true(b.t.guarded == NULL || !guarded[e] || g.centre[e] == e);
                moec_merge_groups_release(&g);
            }
    b.t = (moec_merge_task){.model = b.m, .layer = b.l, .n = b.n, .x = b.x, .logits = b.logits, .ld = b.all, .ids = b.ids,
                            .gates = b.gates, .slots = b.slots, .keep = 8, .blocks = 1};
    for (int way = 0; way < MOEC_BY_COUNT; way++) { /* all stay */
        const moec_merge_recipe r = {.distance = MOEC_FAR_OUTPUT, .grouping = (moec_merge_grouping)way};
        moec_merge_groups g;
        group(&g, &b, &r);
        for (int64_t e = 0; e < 8; e++)
            assert_true(g.centre[e] == e && g.weight[e] == 1.0 && g.distance[e] == 0.0);
        moec_merge_groups_release(&g);
    }
    bench_close(&b);
}

/* ---- what fewer groups lose ---------------------------------------------------------------------------------------------- */

static void curve(double *out, const bench *b, const moec_merge_recipe *r)
{
    double again[BENCH_EXPERTS + 1];
    moec_err err = {MOEC_OK, ""};
    moec_par_set_threads(1);
    if (moec_merge_curve(out, &b->t, r, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    moec_par_set_threads(3);
    assert_int_equal(moec_merge_curve(again, &b->t, r, &err), MOEC_OK);
    moec_par_set_threads(0);
    assert_memory_equal(out, again, (size_t)(b->experts + 1) * sizeof *out);
}

/* Least sum of squared distances from the means of exactly k groups: experts from `e` on join one of `used` groups or begin one. */
static double best_partition(int *label, int64_t e, int64_t used, int64_t k, int64_t n, const double *kernel)
{
    double lowest = (double)INFINITY;
    if (e == n) {
        double sum = 0.0;
        for (int64_t c = 0; used == k && c < k; c++) {
            double size = 0.0, all = 0.0;
            for (int64_t i = 0; i < n; i++) {
                size += label[i] == c;
                sum += label[i] == c ? kernel[i * n + i] : 0.0;
                for (int64_t j = 0; j < n; j++)
                    all += label[i] == c && label[j] == c ? kernel[i * n + j] : 0.0;
            }
            sum -= all / size;
        }
        return used == k ? sum : (double)INFINITY;
    }
    for (int c = 0; c <= used && c < k; c++) {
        label[e] = c;
        const double v = best_partition(label, e + 1, c == used ? used + 1 : used, k, n, kernel);
        lowest = v < lowest ? v : lowest;
    }
    return lowest;
}

/* k-means: near the best of all partitions, and its own objective. Linkages: what the one dendrogram adds up to. Distances with a
 * scale: over their mean. */
static void losses(void **state)
{
    static const bool guarded[BENCH_EXPERTS] = {[2] = true, [5] = true};
    static const moec_merge_grouping linkage[] = {MOEC_BY_AVERAGE, MOEC_BY_WARD, MOEC_BY_COMPLETE, MOEC_BY_SINGLE};
    enum { N = 7 };
    double d[N * N], kernel[N * N], got[N + 1], mass[N], height[N];
    moec_err err = {MOEC_OK, ""};
    bench b;
    (void)state;
    bench_open(&b, "qwen3_moe", N, 2, 200);
    moec_merge_recipe r = {.distance = MOEC_FAR_OUTPUT_COSINE, .grouping = MOEC_BY_KMEANS, .restarts = 64};
    bench_distances(d, kernel, &b, r.distance);
    bench_masses(mass, &b, r.saliency);
    curve(got, &b, &r);
    assert_true(isinf(got[0]) && got[N] == 0.0);
    for (int64_t k = 1; k < N; k++) {
        int label[N];
        int32_t centre[N];
        double own = 0.0;
        const double best = best_partition(label, 0, 0, k, N, kernel);
        const moec_group_task g = {.n = N, .keep = k, .blocks = 1, .mass = mass, .seed = b.t.seed};
        assert_int_equal(moec_group_kmeans(centre, &own, &g, kernel, r.restarts, &err), MOEC_OK);
        if (!(got[k] >= best - 1e-9 && got[k] <= 1.01 * best + 1e-9 && got[k] == (k > 1 && got[k - 1] < own ? got[k - 1] : own)))
            fail_msg("%d groups lose %.17g; at best %.17g, by themselves %.17g", (int)k, got[k], best, own);
    }
    for (size_t w = 0; w < MOEC_COUNT(linkage); w++) {
        const bool ward = linkage[w] == MOEC_BY_WARD;
        double sum = 0.0, mean = 0.0;
        int32_t centre[N];
        r = (moec_merge_recipe){.distance = MOEC_FAR_MEAN_OUTPUT, .grouping = linkage[w], .saliency = MOEC_MASS_GATE};
        bench_distances(d, kernel, &b, r.distance);
        bench_masses(mass, &b, r.saliency);
        for (int64_t i = 0; ward && i < N * N; i++)
            d[i] *= d[i];
        for (int64_t i = 0; i < N * N; i++)
            mean += d[i] / (N * (N - 1));
        const moec_group_task g = {.n = N, .keep = 1, .blocks = 1, .distance = d, .mass = mass};
        assert_int_equal(moec_group_linkage(centre, height, &g, (moec_linkage)w, &err), MOEC_OK);
        curve(got, &b, &r);
        for (int64_t k = N - 1; k >= 1; k--) {
            sum += height[N - 1 - k];
            assert_true(fabs(got[k] - sum / mean) < 1e-9 * sum / mean);
        }
    }
    b.t.guarded = guarded;
    curve(got, &b, &r);
    for (int64_t k = 0; k <= N; k++)
        assert_true(isinf(got[k]) == (k < 3) && (k < 4 || got[k] <= got[k - 1]));
    for (int way = 0; way < MOEC_BY_COUNT; way++) {
        r.grouping = (moec_merge_grouping)way;
        if (way == MOEC_BY_KMEANS || (way >= MOEC_BY_AVERAGE && way <= MOEC_BY_SINGLE))
            continue;
        assert_int_equal(moec_merge_curve(got, &b.t, &r, &err), MOEC_EINVAL);
        assert_non_null(strstr(err.text, "those that have one are average, ward, complete, single, kmeans"));
        err = (moec_err){MOEC_OK, ""};
    }
    bench_close(&b);
    bench_open(&b, "qwen3_moe", 8, 2, 100);
    double blocks[9];
    b.t.blocks = 2;
    r.grouping = MOEC_BY_AVERAGE;
    curve(blocks, &b, &r);
    for (int64_t k = 0; k <= 8; k++)
        assert_true(isinf(blocks[k]) == (k % 2 == 1 || k == 0) && (k < 4 || k % 2 == 1 || blocks[k] < blocks[k - 2]));
    bench_close(&b);
}

/* ------------------------------------------------------------------------------------------------------------------------- */

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Each grouping gets the matrix that it asks for: distances, their squares, inner products or affinities. */
static void matrices(void **state)
{
    enum { N = 12, PAIRS = N * (N - 1) / 2 };
    bench b;
    moec_err err = {MOEC_OK, ""};
    (void)state;
    bench_open(&b, "qwen3_moe", N, 2, 200);
    for (int far = 0; far < MOEC_FAR_COUNT; far++) {
        double d[N * N], kernel[N * N], squares[N * N], affinity[N * N], sorted[PAIRS], mass[N];
        int64_t pairs = 0;
        bench_distances(d, kernel, &b, (moec_merge_distance)far);
        bench_masses(mass, &b, MOEC_MASS_GATE_SQ);
        for (int64_t i = 0; i < N; i++)
            for (int64_t j = 0; j < N; j++) {
                squares[i * N + j] = far == MOEC_FAR_OUTPUT ? d[i * N + j] : d[i * N + j] * d[i * N + j];
                if (j < i)
                    sorted[pairs++] = squares[i * N + j];
            }
        qsort(sorted, PAIRS, sizeof *sorted, ascending);
        for (int64_t i = 0; i < N * N; i++) /* an even number of pairs: the mean of the two in the middle */
            affinity[i] = exp(-squares[i] / (0.5 * (sorted[PAIRS / 2 - 1] + sorted[PAIRS / 2])));
        for (int way = 0; way < MOEC_BY_PRUNING; way++) {
            const moec_merge_recipe r = {.distance = (moec_merge_distance)far, .grouping = (moec_merge_grouping)way, .group_size = 3,
                                         .saliency = MOEC_MASS_GATE_SQ, .weights = MOEC_MASS_GATE, .restarts = 8};
            moec_group_task t = {.n = N, .keep = 5, .blocks = 1, .distance = way == MOEC_BY_WARD ? squares : d, .mass = mass,
                                 .seed = b.t.seed};
            int32_t centre[N];
            moec_merge_groups g;
            moec_status st = MOEC_OK;
            switch (r.grouping) {
            case MOEC_BY_NEAREST: st = moec_group_nearest(centre, &t, &err); break;
            case MOEC_BY_PSEUDO: st = moec_group_pseudo(centre, &t, 3, &err); break;
            case MOEC_BY_AVERAGE: st = moec_group_linkage(centre, NULL, &t, MOEC_LINK_AVERAGE, &err); break;
            case MOEC_BY_WARD: st = moec_group_linkage(centre, NULL, &t, MOEC_LINK_WARD, &err); break;
            case MOEC_BY_COMPLETE: st = moec_group_linkage(centre, NULL, &t, MOEC_LINK_COMPLETE, &err); break;
            case MOEC_BY_SINGLE: st = moec_group_linkage(centre, NULL, &t, MOEC_LINK_SINGLE, &err); break;
            case MOEC_BY_KMEANS: st = moec_group_kmeans(centre, NULL, &t, kernel, 8, &err); break;
            case MOEC_BY_SPECTRAL: st = moec_group_spectral(centre, &t, affinity, 8, &err); break;
            case MOEC_BY_PRUNING:
            case MOEC_BY_COUNT: fail();
            }
            assert_int_equal(st, MOEC_OK);
            b.t.keep = 5;
            group(&g, &b, &r);
            assert_memory_equal(g.centre, centre, sizeof centre);
            for (int64_t e = 0; e < N; e++)
                assert_true(g.distance[e] == d[e * N + centre[e]]);
            moec_merge_groups_release(&g);
        }
    }
    bench_close(&b);
}

/* Experts that no token selects: weight 0 beside others, equal shares among themselves, never a centre while another can be. */
static void dead(void **state)
{
    bench b;
    moec_merge_groups g;
    moec_merge_recipe r = {.distance = MOEC_FAR_OUTPUT, .grouping = MOEC_BY_NEAREST, .saliency = MOEC_MASS_COUNT,
                           .weights = MOEC_MASS_ENERGY, .restarts = 4, .group_size = 16};
    (void)state;
    bench_open(&b, "qwen3_moe", 8, 2, 100);
    for (int64_t t = 0; t < b.n; t++)
        for (int64_t e = 4; e < 8; e++)
            b.logits[t * b.all + e] = -20.0f;
    bench_route(&b);
    for (int way = 0; way < MOEC_BY_COUNT; way++) {
        r.grouping = (moec_merge_grouping)way;
        b.t.keep = 3;
        group(&g, &b, &r);
        for (int64_t e = 4; e < 8; e++)
            assert_true(g.centre[e] != e && g.weight[e] == 0.0 && g.saliency[e] == 0.0);
        moec_merge_groups_release(&g);
        b.t.keep = 6; /* the four, and two of the others */
        group(&g, &b, &r);
        for (int64_t e = 0; e < 8; e++) {
            assert_true((g.centre[e] == e) == (e < 6));
            assert_true(e >= 6 || g.weight[e] >= 0.25);
        }
        moec_merge_groups_release(&g);
    }
    b.t.blocks = 2; /* one has only dead ones */
    b.t.keep = 2;
    r.grouping = MOEC_BY_NEAREST;
    group(&g, &b, &r);
    for (int64_t e = 4; e < 8; e++)
        assert_true(g.centre[e] == 4 && g.weight[e] == 0.25);
    moec_merge_groups_release(&g);
    bench_close(&b);
}

/* Equal masses: the lowest numbers. */
static void ties(void **state)
{
    static const bool guarded[BENCH_EXPERTS] = {[6] = true};
    bench b;
    moec_merge_groups g;
    moec_merge_recipe r = {.distance = MOEC_FAR_OUTPUT, .grouping = MOEC_BY_PRUNING, .saliency = MOEC_MASS_EQUAL,
                           .weights = MOEC_MASS_EQUAL};
    (void)state;
    bench_open(&b, "qwen3_moe", 8, 2, 100);
    b.t.keep = 4;
    group(&g, &b, &r);
    for (int64_t e = 0; e < 8; e++)
        assert_true(g.saliency[e] == 1.0 && g.centre[e] == (e < 4 ? e : -1));
    moec_merge_groups_release(&g);
    b.t.blocks = 2;
    b.t.guarded = guarded;
    group(&g, &b, &r);
    for (int64_t e = 0; e < 8; e++)
        assert_true(g.centre[e] == (e == 0 || e == 1 || e == 4 || e == 6 ? e : -1));
    moec_merge_groups_release(&g);
    b.t.guarded = NULL;
    b.t.blocks = 1;
    for (int64_t e = 1; e < 8; e++) /* all outputs the same, and hence all distances 0 */
        b.l->expert[e] = b.l->expert[0];
    for (r.grouping = MOEC_BY_NEAREST; r.grouping < MOEC_BY_PRUNING; r.grouping++)
        for (r.distance = MOEC_FAR_MEAN_OUTPUT; r.distance <= MOEC_FAR_OUTPUT; r.distance++) {
            r.group_size = 16;
            r.restarts = 4;
            group(&g, &b, &r);
            for (int64_t e = 0; e < 8; e++)
                assert_true(g.distance[e] < 1e-9);
            moec_merge_groups_release(&g);
        }
    bench_close(&b);
}

/* ---- what is refused ---------------------------------------------------------------------------------------------------- */

static void expect_error(const bench *b, const moec_merge_recipe *r, moec_status code, const char *text)
{
    moec_merge_groups g;
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_merge_groups_new(&g, b->experts, &err), MOEC_OK);
    assert_int_equal(moec_merge_group(&g, &b->t, r, &err), code);
    if (!strstr(err.text, text))
        fail_msg("%s", err.text);
    moec_merge_groups_release(&g);
}

static void refused(void **state)
{
    static const bool guarded[BENCH_EXPERTS] = {[0] = true, [2] = true, [4] = true};
    bench b;
    moec_merge_groups g;
    moec_err err = {MOEC_OK, ""};
    double d[BENCH_EXPERTS * BENCH_EXPERTS];
    moec_merge_recipe r = {.distance = MOEC_FAR_OUTPUT, .grouping = MOEC_BY_NEAREST, .saliency = MOEC_MASS_GATE,
                           .weights = MOEC_MASS_GATE};
    (void)state;
    bench_open(&b, "qwen3_moe", 6, 2, 40);
    const moec_merge_task good = b.t;
    b.t.keep = 7;
    expect_error(&b, &r, MOEC_EINVAL, "7 of 6 experts");
    b.t.keep = 0;
    expect_error(&b, &r, MOEC_EINVAL, "0 of 6 experts");
    b.t.keep = 3;
    b.t.blocks = 2;
    expect_error(&b, &r, MOEC_EINVAL, "in 2 groups of the router");
    b.t = good;
    b.t.guarded = guarded;
    b.t.keep = 2;
    expect_error(&b, &r, MOEC_EINVAL, "3 protected experts, of which 2 stay");
    b.t.blocks = 2;
    expect_error(&b, &r, MOEC_EINVAL, "2 protected experts in a group of the router, of which 1 stay");
    b.t = good;
    b.t.n = 0;
    expect_error(&b, &r, MOEC_EINVAL, "0 tokens");
    assert_int_equal(moec_merge_distances(d, NULL, &b.t, MOEC_FAR_ROUTER_ROWS, &err), MOEC_OK); /* needs none */
    assert_int_equal(moec_merge_distances(d, NULL, &b.t, MOEC_FAR_WEIGHTS, &err), MOEC_OK);
    b.t = good;
    b.logits[7] = -INFINITY;
    r.distance = MOEC_FAR_CENTRED;
    expect_error(&b, &r, MOEC_ENUMERIC, "expert 1: its router logit of token 1 is not finite");
    r.distance = MOEC_FAR_OUTPUT;
    b.x[20 * b.hidden] = 3e38f;
    expect_error(&b, &r, MOEC_ENUMERIC, "its output of token 20 is not finite");
    r.distance = MOEC_FAR_WEIGHTS;
    r.saliency = MOEC_MASS_REAP;
    expect_error(&b, &r, MOEC_ENUMERIC, "its output of token 20 is not finite");
    b.gates[3] = NAN;
    r.saliency = MOEC_MASS_GATE;
    expect_error(&b, &r, MOEC_ENUMERIC, "not finite");
    assert_int_equal(moec_merge_groups_new(&g, 0, &err), MOEC_EINVAL);
    bench_close(&b);
    bench_open(&b, "llama4", 6, 1, 40);
    r.distance = MOEC_FAR_OUTPUT;
    expect_error(&b, &r, MOEC_EINVAL, "multiply the input");
    r.saliency = MOEC_MASS_REAM;
    r.distance = MOEC_FAR_LOGITS;
    expect_error(&b, &r, MOEC_EINVAL, "multiply the input");
    r.saliency = MOEC_MASS_GATE;
    group(&g, &b, &r);
    moec_merge_groups_release(&g);
    bench_close(&b);
    bench_open(&b, "MoE++", 6, 1, 40);
    expect_error(&b, &r, MOEC_EINVAL, "without a network");
    bench_close(&b);
}

static void out_of_memory(void **state)
{
    static const moec_merge_recipe recipes[] = {
        {.distance = MOEC_FAR_OUTPUT, .grouping = MOEC_BY_WARD, .saliency = MOEC_MASS_REAM, .weights = MOEC_MASS_GATE},
        {.distance = MOEC_FAR_GATED, .grouping = MOEC_BY_KMEANS, .restarts = 2},
        {.distance = MOEC_FAR_WEIGHTS, .grouping = MOEC_BY_SPECTRAL, .restarts = 2},
    };
    bench b;
    (void)state;
    bench_open(&b, "qwen3_moe", 6, 2, 40);
    moec_par_set_threads(2);
    for (size_t i = 0; i < MOEC_COUNT(recipes); i++) {
        moec_status st = MOEC_ENOMEM;
        for (long k = 0; st != MOEC_OK; k++) {
            moec_merge_groups g;
            moec_err err = {MOEC_OK, ""};
            moec_test_allocs_left = k;
            st = moec_merge_groups_new(&g, b.experts, &err);
            if (st == MOEC_OK)
                st = moec_merge_group(&g, &b.t, &recipes[i], &err);
            moec_test_allocs_left = __LONG_MAX__;
            moec_merge_groups_release(&g);
            assert_true(st == MOEC_OK || st == MOEC_ENOMEM);
            assert_true(k < 1000);
        }
        st = recipes[i].grouping == MOEC_BY_SPECTRAL ? MOEC_OK : MOEC_ENOMEM;
        for (long k = 0; st != MOEC_OK; k++) {
            double lost[BENCH_EXPERTS + 1];
            moec_err err = {MOEC_OK, ""};
            moec_test_allocs_left = k;
            st = moec_merge_curve(lost, &b.t, &recipes[i], &err);
            moec_test_allocs_left = __LONG_MAX__;
            assert_true((st == MOEC_OK || st == MOEC_ENOMEM) && k < 1000);
        }
    }
    moec_par_set_threads(0);
    bench_close(&b);
}

/* Last: a signal that came does not go away. */
static void interrupted(void **state)
{
    moec_merge_recipe r = {.grouping = MOEC_BY_NEAREST, .saliency = MOEC_MASS_GATE, .weights = MOEC_MASS_GATE};
    bench b;
    (void)state;
    bench_open(&b, "qwen3_moe", 6, 2, 40);
    moec_catch_signals();
    raise(SIGTERM);
    for (r.distance = 0; r.distance < MOEC_FAR_COUNT; r.distance++)
        expect_error(&b, &r, MOEC_EINTR, "interrupted");
    r.grouping = MOEC_BY_PRUNING;
    r.saliency = MOEC_MASS_REAM;
    expect_error(&b, &r, MOEC_EINTR, "interrupted");
    bench_close(&b);
}

static void names(void **state)
{
    static const struct {
        const char *const *names;
        int n;
    } all[] = {{moec_merge_distance_names, MOEC_FAR_COUNT}, {moec_merge_grouping_names, MOEC_BY_COUNT},
               {moec_merge_mass_names, MOEC_MASS_KINDS},    {moec_merge_align_names, MOEC_ALIGN_COUNT},
               {moec_merge_fill_names, MOEC_FILL_COUNT},    {moec_merge_router_names, MOEC_ROW_COUNT}};
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(all); i++) {
        assert_null(all[i].names[all[i].n]);
        for (int k = 0; k < all[i].n; k++) {
            assert_non_null(all[i].names[k]);
            for (int j = 0; j < k; j++)
                assert_string_not_equal(all[i].names[k], all[i].names[j]);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(twins), cmocka_unit_test(every_way),
        cmocka_unit_test(losses), cmocka_unit_test(matrices), cmocka_unit_test(dead),
        cmocka_unit_test(ties), cmocka_unit_test(refused), cmocka_unit_test(out_of_memory), cmocka_unit_test(names),
        cmocka_unit_test(interrupted),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
