/* How many experts layers keep by what merging loses, against all ways to share a budget out. */
#include "method/method.h"

#include "base/mem.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { LAYERS = 5, EXPERTS = 12 };

typedef struct scene {
    moec_model m;
    moec_set set[LAYERS];
    moec_request q;
    double curve[LAYERS * (EXPERTS + 1)];
    int64_t got[LAYERS];
} scene;

static double uniform(void)
{
    static uint64_t seed = 88172645463325252;
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return (double)(seed >> 40) / 16777216.0;
}

static void begin(scene *s, int64_t layers, int64_t experts, int64_t top_k, int64_t together)
{
    *s = (scene){.m = {.moe_layers = layers, .dims = {.experts = experts, .top_k = top_k}}};
    for (int64_t l = 0; l < layers; l++)
        s->set[l].layer = l;
    s->m.set = s->set;
    s->q = (moec_request){.model = &s->m, .allocation = MOEC_ALLOCATE_LOSS, .together = together};
}

static double *at(scene *s, int64_t l, int64_t k)
{
    return &s->curve[l * (s->m.dims.experts + 1) + k];
}

/* Each step down costs more than the one before; some cost nothing. */
static void bend(scene *s)
{
    for (int64_t l = 0; l < s->m.moe_layers; l++) {
        double step = 0.0;
        const double steep = uniform() * 3.0;
        *at(s, l, s->m.dims.experts) = 0.0;
        for (int64_t k = s->m.dims.experts - 1; k >= 0; k--) {
            step += uniform() < 0.3 ? 0.0 : steep * uniform();
            *at(s, l, k) = *at(s, l, k + 1) + step;
        }
    }
}

/* The least that layers [l, last) lose with `budget` experts. */
static double best(scene *s, int64_t l, int64_t last, int64_t least, int64_t budget)
{
    double lowest = (double)INFINITY;
    if (l == last)
        return budget == 0 ? 0.0 : (double)INFINITY;
    for (int64_t k = least; k <= s->m.dims.experts && k <= budget; k++) {
        const double v = *at(s, l, k) + best(s, l + 1, last, least, budget - k);
        lowest = v < lowest ? v : lowest;
    }
    return lowest;
}

static void allocate(scene *s, int64_t keep)
{
    moec_err err = {MOEC_OK, ""};
    if (moec_allocate_loss(s->got, &s->q, keep, s->curve, &err) != MOEC_OK)
        fail_msg("%s", err.text);
}

static void optimal(void **state)
{
    (void)state;
    for (int round = 0; round < 300; round++) {
        scene s;
        const int64_t together = 1 + round % 4, top_k = 1 + round % 3, least = round % 5;
        begin(&s, LAYERS, 8, top_k, together);
        s.q.least = least;
        bend(&s);
        for (int64_t keep = least > top_k ? least : top_k; keep <= 8; keep++) {
            allocate(&s, keep);
            for (int64_t first = 0; first < LAYERS; first += together) {
                const int64_t last = first + together < LAYERS ? first + together : LAYERS;
                int64_t sum = 0;
                double lost = 0.0;
                for (int64_t l = first; l < last; l++) {
                    assert_true(s.got[l] >= top_k && s.got[l] >= least && s.got[l] <= 8);
                    sum += s.got[l];
                    lost += *at(&s, l, s.got[l]);
                }
                assert_int_equal(sum, keep * (last - first));
                const double want = best(&s, first, last, least > top_k ? least : top_k, sum);
                if (fabs(lost - want) > 1e-12 * (1.0 + want))
                    fail_msg("round %d: layers %d to %d lose %g, %g would do", round, (int)first, (int)last - 1, lost, want);
            }
        }
    }
}

static void expect(const scene *s, int64_t a, int64_t b)
{
    if (s->got[0] != a || s->got[1] != b)
        fail_msg("%d and %d, not %d and %d", (int)s->got[0], (int)s->got[1], (int)a, (int)b);
}

static void by_hand(void **state)
{
    static const double steep[] = {90, 50, 20, 10, 4, 0}, flat[] = {15, 10, 6, 3, 1, 0}; /* steps from 5: 4 6 10; 1 2 3 4 */
    scene s;
    (void)state;
    begin(&s, 2, 5, 1, 2);
    memcpy(at(&s, 0, 0), steep, sizeof steep);
    memcpy(at(&s, 1, 0), flat, sizeof flat);
    allocate(&s, 4);
    expect(&s, 5, 3);
    allocate(&s, 3); /* 1 2 3, then 4 of either: who keeps more gives */
    expect(&s, 4, 2);
    s.q.least = 3;
    allocate(&s, 3);
    expect(&s, 3, 3);
    s.q.least = 0;
    s.q.pad = 4;
    allocate(&s, 3);
    expect(&s, 4, 2);
    s.q.pad = 0;
    s.m.dims.top_k = 3;
    allocate(&s, 4);
    expect(&s, 5, 3);
    memset(s.curve, 0, sizeof s.curve); /* nothing is lost: even, the lower layer first */
    s.m.dims.top_k = 1;
    allocate(&s, 3);
    expect(&s, 3, 3);
}

/* The router's groups go down together, and there is no curve between their multiples. */
static void groups(void **state)
{
    scene s;
    (void)state;
    begin(&s, 2, 8, 2, 2);
    s.m.dims.groups = 2;
    s.m.dims.top_groups = 1;
    s.m.family = &(const moec_family){.model_type = "test"};
    for (int64_t k = 0; k <= 8; k++) {
        *at(&s, 0, k) = k % 2 == 0 ? (double)(8 - k) : (double)INFINITY;
        *at(&s, 1, k) = k % 2 == 0 ? 3.0 * (double)(8 - k) : (double)INFINITY;
    }
    allocate(&s, 6);
    expect(&s, 4, 8);
}

static void refusals(void **state)
{
    moec_err err = {MOEC_OK, ""};
    scene s;
    (void)state;
    begin(&s, 2, 5, 2, 2);
    bend(&s);
    assert_int_equal(moec_allocate_loss(s.got, &s.q, 1, s.curve, &err), MOEC_EINVAL);
    assert_non_null(strstr(err.text, "every layer keeps at least 2 experts"));
    err = (moec_err){MOEC_OK, ""};
    for (int64_t k = 0; k < 4; k++)
        *at(&s, 0, k) = *at(&s, 1, k) = (double)INFINITY;
    assert_int_equal(moec_allocate_loss(s.got, &s.q, 4, s.curve, &err), MOEC_OK);
    assert_int_equal(moec_allocate_loss(s.got, &s.q, 3, s.curve, &err), MOEC_EINVAL);
    assert_non_null(strstr(err.text, "protected experts leave layer 0"));
    err = (moec_err){MOEC_OK, ""};
    s.q.together = 0;
    assert_int_equal(moec_allocate_loss(s.got, &s.q, 4, s.curve, &err), MOEC_EINVAL);
    s.q.together = 2;
    *at(&s, 1, 4) = (double)NAN;
    err = (moec_err){MOEC_OK, ""};
    assert_int_equal(moec_allocate_loss(s.got, &s.q, 4, s.curve, &err), MOEC_ENUMERIC);
    assert_non_null(strstr(err.text, "4 groups of layer 1"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(optimal),
        cmocka_unit_test(by_hand),
        cmocka_unit_test(groups),
        cmocka_unit_test(refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
