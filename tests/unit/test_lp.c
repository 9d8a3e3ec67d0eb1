/* Choice under a budget against all choices of small problems and against exact dynamic programming on larger ones; ties, limits,
 * and what is refused. */
#include "base/mem.h"
#include "base/random.h"
#include "num/lp.h"

#include <glpk.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { GROUPS = 1024, MOST = GROUPS * 4 };

/* A problem with room. */
typedef struct problem {
    moec_lp p;
    int64_t first[GROUPS + 1], size[MOST], option[2][MOST];
    double cost[MOST];
    moec_lp_row row[2];
} problem;

static uint64_t state;
static uint64_t draw(void)
{
    state += UINT64_C(0x9e3779b97f4a7c15);
    return moec_mix64(state);
}
static double uniform(void)
{
    return (double)(draw() >> 11) * 0x1p-53;
}

static void start(problem *a, int64_t groups, int64_t each, int64_t budget)
{
    memset(&a->p, 0, sizeof a->p);
    for (int64_t g = 0; g <= groups; g++)
        a->first[g] = g * each;
    a->p = (moec_lp){.groups = groups, .first = a->first, .cost = a->cost, .size = a->size, .budget = budget, .row = a->row};
}

/* PMQ's: widths 1, 2, 3, errors that fall by some factor a bit, weights of any size; at least one group has option 1, one option 2. */
static void pmq(problem *a, int64_t groups, int64_t budget)
{
    start(a, groups, 3, budget);
    a->p.rows = 2;
    for (int64_t g = 0; g < groups; g++) {
        const double weight = exp(4.0 * uniform()), fall = 2.0 + 4.0 * uniform();
        for (int64_t b = 0; b < 3; b++) {
            a->size[3 * g + b] = b + 1;
            a->cost[3 * g + b] = weight * (0.8 + 0.4 * uniform()) / pow(fall, (double)b);
        }
    }
    for (int r = 0; r < 2; r++) {
        for (int64_t g = 0; g < groups; g++)
            a->option[r][g] = 3 * g + r + 1;
        a->row[r] = (moec_lp_row){a->option[r], groups, 1};
    }
}

static bool meets(const moec_lp *p, const int64_t *pick)
{
    for (int64_t r = 0; r < p->rows; r++) {
        int64_t n = 0;
        for (int64_t i = 0; i < p->row[r].n; i++)
            for (int64_t g = 0; g < p->groups; g++)
                n += pick[g] == p->row[r].option[i];
        if (n < p->row[r].least)
            return false;
    }
    return true;
}

/* Best of all choices of up to 12 groups; how many come within 1e-9 of it. */
static int64_t all_choices(const moec_lp *p, double *best, int64_t *pick)
{
    int64_t at[12], near = 0;
    *best = (double)INFINITY;
    for (int64_t g = 0; g < p->groups; g++)
        at[g] = p->first[g];
    for (;;) {
        double cost = 0.0;
        int64_t size = 0, g = 0;
        for (int64_t i = 0; i < p->groups; i++) {
            cost += p->cost[at[i]];
            size += p->size[at[i]];
        }
        if (size <= p->budget && cost <= *best * (1.0 + 1e-9) && meets(p, at)) {
            near = cost < *best * (1.0 - 1e-9) ? 1 : near + 1;
            if (cost < *best) {
                *best = cost;
                memcpy(pick, at, (size_t)p->groups * sizeof *pick);
            }
        }
        while (g < p->groups && ++at[g] == p->first[g + 1])
            at[g] = p->first[g], g++;
        if (g == p->groups)
            return near;
    }
}

static void check_answer(const moec_lp *p, const moec_lp_answer *a)
{
    double cost = 0.0;
    int64_t size = 0;
    for (int64_t g = 0; g < p->groups; g++) {
        assert_true(a->pick[g] >= p->first[g] && a->pick[g] < p->first[g + 1]);
        cost += p->cost[a->pick[g]];
        size += p->size[a->pick[g]];
    }
    assert_true(cost <= a->cost && cost >= a->cost);
    assert_int_equal(size, a->size);
    assert_true(size <= p->budget);
    assert_true(a->bound <= a->cost);
    assert_true(meets(p, a->pick));
}

static void solve(moec_lp_answer *out, const moec_lp *p)
{
    moec_err err = {MOEC_OK, ""};
    if (moec_lp_solve(out, p, 0.0, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    check_answer(p, out);
}

static void same_as_all(const problem *a)
{
    double best;
    int64_t pick[12];
    moec_lp_answer got;
    moec_err err = {MOEC_OK, ""};
    const int64_t near = all_choices(&a->p, &best, pick);
    if (isinf(best)) {
        const moec_status st = moec_lp_solve(&got, &a->p, 0.0, &err);
        assert_true(st == MOEC_ENOFIT || (st == MOEC_EINVAL && strstr(err.text, "together")));
        return;
    }
    solve(&got, &a->p);
    assert_true(got.proven);
    if (!(fabs(got.cost - best) <= 1e-9 * best) || got.bound > best * (1.0 + 1e-12))
        fail_msg("cost %.17g bound %.17g, best is %.17g", got.cost, got.bound, best);
    if (near == 1)
        assert_memory_equal(got.pick, pick, (size_t)a->p.groups * sizeof *pick);
    moec_lp_answer_release(&got);
}

static problem one;

static void test_pmq(void **unused)
{
    (void)unused;
    state = 1;
    for (int i = 0; i < 2100; i++) {
        pmq(&one, 8, 12 + i % 9);
        same_as_all(&one);
    }
}

/* Anything: group sizes, sizes and costs that tie or are 0, costs that differ by 10^12, rows of any options. */
static void test_any(void **unused)
{
    (void)unused;
    state = 2;
    for (int i = 0; i < 3000; i++) {
        const int64_t groups = 1 + (int64_t)(draw() % 6);
        const double span = i % 3 == 0 ? 28.0 : 3.0;
        const int64_t scale = i % 2 ? 1 : 12345678;
        start(&one, groups, 1, 0);
        int64_t n = 0;
        for (int64_t g = 0; g < groups; g++) {
            for (int64_t k = 1 + (int64_t)(draw() % 4); k > 0; k--, n++) {
                one.size[n] = scale * (int64_t)(draw() % (i % 5 ? 9 : 900)) + (int64_t)(draw() % 2 * 1000);
                one.cost[n] = i % 4 == 0 ? (double)(draw() % 4) : exp(span * uniform());
                one.p.budget += one.size[n] / 3;
            }
            one.first[g + 1] = n;
        }
        one.p.rows = i % 2 && groups > 1 ? (int64_t)(draw() % 3) : 0;
        for (int r = 0; r < one.p.rows; r++) {
            int64_t m = 0, has = 0, last = -1;
            for (int64_t j = 0; j < n; j++)
                if (draw() % 2)
                    one.option[r][m++] = j;
            for (int64_t k = 0; k < m; k++)
                for (int64_t g = 0; g < groups; g++)
                    if (one.option[r][k] >= one.first[g] && one.option[r][k] < one.first[g + 1] && g != last)
                        has++, last = g;
            one.row[r] = (moec_lp_row){one.option[r], m, has > 0 ? (int64_t)(draw() % (uint64_t)(has + 1)) : 0};
        }
        same_as_all(&one);
    }
}

/* Least cost by dynamic programming over what is spent, with a mask of rows that are met by one at least. */
static double exact(const moec_lp *p)
{
    const int64_t states = p->budget + 1;
    double *now = NULL, *next = NULL, best = (double)INFINITY;
    assert_int_equal(MOEC_NEW(now, (size_t)states * 4, NULL), MOEC_OK);
    assert_int_equal(MOEC_NEW(next, (size_t)states * 4, NULL), MOEC_OK);
    for (int64_t i = 0; i < states * 4; i++)
        now[i] = i == 0 ? 0.0 : (double)INFINITY;
    for (int64_t g = 0; g < p->groups; g++) {
        for (int64_t i = 0; i < states * 4; i++)
            next[i] = (double)INFINITY;
        for (int64_t j = p->first[g]; j < p->first[g + 1]; j++) {
            int64_t mask = 0;
            for (int64_t r = 0; r < p->rows; r++)
                for (int64_t i = 0; i < p->row[r].n; i++)
                    mask |= p->row[r].option[i] == j ? INT64_C(1) << r : 0;
            for (int64_t s = 0; s + p->size[j] < states; s++)
                for (int64_t m = 0; m < 4; m++) {
                    double *to = &next[(s + p->size[j]) * 4 + (m | mask)];
                    *to = fmin(*to, now[s * 4 + m] + p->cost[j]);
                }
        }
        double *const swap = now;
        now = next;
        next = swap;
    }
    for (int64_t s = 0; s < states; s++)
        best = fmin(best, now[s * 4 + (1 << p->rows) - 1]);
    moec_free(now);
    moec_free(next);
    return best;
}

static void test_large(void **unused)
{
    (void)unused;
    state = 3;
    for (int i = 0; i < 8; i++) {
        moec_lp_answer got, again;
        if (i < 4) { /* 16 x 64 x 4: equal sizes, then sizes of their own */
            start(&one, 1024, 4, 0);
            for (int64_t g = 0; g < 1024; g++) {
                const double weight = exp(6.0 * uniform());
                const int64_t unit = i < 2 ? 1 : 4 + (int64_t)(draw() % 7);
                for (int64_t b = 0; b < 4; b++) {
                    one.size[4 * g + b] = unit * (b + 1);
                    one.cost[4 * g + b] = weight * (0.8 + 0.4 * uniform()) * pow(0.3, (double)b);
                }
                one.p.budget += unit * (i % 2 ? 2 : 3) + (int64_t)(draw() % 2);
            }
        } else {
            pmq(&one, i % 2 ? 128 : 512, i % 2 ? 132 : 600 + 100 * i); /* 132: rows cost something */
        }
        solve(&got, &one.p);
        const double best = exact(&one.p);
        if (!(fabs(got.cost - best) <= 1e-6 * best) || !got.proven)
            fail_msg("%d: %.17g, best is %.17g", i, got.cost, best);
        print_message("problem %d: cost %.9g, exact %.9g, bound %.9g\n", i, got.cost, best, got.bound);
        assert_true(got.bound <= best * (1.0 + 1e-12));
        solve(&again, &one.p);
        assert_memory_equal(got.pick, again.pick, (size_t)one.p.groups * sizeof *got.pick);
        moec_lp_answer_release(&got);
        moec_lp_answer_release(&again);
    }
}

/* Matrices of two kinds whose bytes at 2, 3, 4 and 8 bits differ, as gate/up and down projections' do: few sums of sizes meet a
 * budget, so the LP's bound is far below the best choice and branching hardly ends. unit: bytes in what sizes are counted by here. */
static void bytes(problem *a, int64_t groups, double bits, int64_t unit)
{
    static const int64_t width[] = {2, 3, 4, 8}, extra[] = {3, 35, 7, 11};
    int64_t budget = 0;
    start(a, groups, 4, 0);
    for (int64_t g = 0; g < groups; g++) {
        const double weight = exp(5.0 * uniform()), fall = 3.0 + 2.0 * uniform();
        const bool down = g % 3 == 2;
        for (int64_t b = 0; b < 4; b++) {
            a->size[4 * g + b] = unit * (width[b] * 24 + (down ? extra[b] : 5));
            a->cost[4 * g + b] = weight * (0.9 + 0.2 * uniform()) * pow(fall, -(double)width[b]);
        }
        budget += (int64_t)(bits * 24.0) + (down ? 12 : 5);
    }
    a->p.budget = unit * budget + unit / 2;
}

static void test_bytes(void **unused)
{
    (void)unused;
    state = 8;
    for (int i = 0; i < 60; i++) {
        bytes(&one, 8, 2.2 + 0.05 * i, i % 2 ? 1 : 40961);
        if (i % 3 == 0) { /* one of the first half at 8 bits, two of the second at 3 */
            one.p.rows = 2;
            for (int64_t k = 0; k < 4; k++) {
                one.option[0][k] = 4 * k + 3;
                one.option[1][k] = 4 * (k + 4) + 1;
            }
            one.row[0] = (moec_lp_row){one.option[0], 4, 1};
            one.row[1] = (moec_lp_row){one.option[1], 4, 2};
        }
        same_as_all(&one);
    }
    for (int i = 0; i < 6; i++) {
        moec_lp_answer got;
        static problem small;
        const uint64_t from = state;
        bytes(&one, 192, 2.15 + 0.35 * i, 5120);
        solve(&got, &one.p);
        state = from;
        bytes(&small, 192, 2.15 + 0.35 * i, 1);
        const double best = exact(&small.p);
        if (!(fabs(got.cost - best) <= 1e-12 * best) || !got.proven)
            fail_msg("%d: %.17g, best is %.17g", i, got.cost, best);
        print_message("bytes %d: cost %.9g, gap to the LP %.1e\n", i, got.cost, (got.cost - got.bound) / got.cost);
        moec_lp_answer_release(&got);
    }
}

/* Sizes without order, costs that fall by what they add: dynamic programming has too many states, branching takes over. */
static void test_subset_sum(void **unused)
{
    (void)unused;
    state = 9;
    moec_lp_answer got, again;
    start(&one, 64, 4, 0);
    for (int64_t g = 0; g < 64; g++)
        for (int64_t b = 0; b < 4; b++) {
            one.size[4 * g + b] = (b + 1) * 1000000007 + (int64_t)(1e9 * uniform());
            one.cost[4 * g + b] = 1e10 - (double)one.size[4 * g + b];
            one.p.budget += one.size[4 * g + b] / 4;
        }
    solve(&got, &one.p);
    assert_true(got.cost - got.bound <= 1e-6 * got.cost);
    solve(&again, &one.p);
    assert_memory_equal(got.pick, again.pick, 64 * sizeof *got.pick);
    moec_lp_answer_release(&got);
    moec_lp_answer_release(&again);
}

/* An option that costs 10^13 times what others do does not blur them. */
static void test_outlier(void **unused)
{
    (void)unused;
    state = 4;
    for (int i = 0; i < 50; i++) {
        pmq(&one, 8, 16);
        const int64_t g = (int64_t)(draw() % 8);
        one.cost[3 * g] *= 1e13;
        one.cost[3 * g + 1] *= 1e12;
        same_as_all(&one);
    }
}

static void test_ties(void **unused)
{
    (void)unused;
    moec_lp_answer got;
    start(&one, 4, 3, 6); /* all groups alike: the first get more */
    for (int64_t j = 0; j < 12; j++) {
        one.size[j] = j % 3 + 1;
        one.cost[j] = (double)(4 - 2 * (j % 3)) / 2.0;
    }
    solve(&got, &one.p);
    const int64_t want[] = {2, 3, 6, 9};
    assert_memory_equal(got.pick, want, sizeof want);
    moec_lp_answer_release(&got);
    for (int64_t j = 0; j < 12; j++) /* options alike: the first */
        one.size[j] = 1, one.cost[j] = 1.0;
    solve(&got, &one.p);
    for (int64_t g = 0; g < 4; g++)
        assert_int_equal(got.pick[g], 3 * g);
    moec_lp_answer_release(&got);
    for (int64_t j = 0; j < 12; j++) /* free: the smallest */
        one.size[j] = 3 - j % 3, one.cost[j] = 0.0;
    solve(&got, &one.p);
    assert_int_equal(got.size, 4);
    assert_true(got.proven && !(got.cost > 0.0) && !(got.bound > 0.0));
    moec_lp_answer_release(&got);
}

static void refuse(moec_status code, const char *says)
{
    moec_lp_answer got;
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_lp_solve(&got, &one.p, 0.0, &err), code);
    assert_null(got.pick);
    if (!strstr(err.text, says))
        fail_msg("\"%s\" does not say \"%s\"", err.text, says);
}

static void test_refused(void **unused)
{
    (void)unused;
    moec_lp_answer got;
    state = 5;
    pmq(&one, 8, 7);
    refuse(MOEC_ENOFIT, "no choice takes less than 8");
    one.p.budget = 10; /* 8 and 2 + 1 for the rows */
    refuse(MOEC_ENOFIT, "no choice takes less than 11");
    one.p.budget = INT64_MIN;
    refuse(MOEC_ENOFIT, "no choice takes less than 8");
    one.p.budget = 11;
    solve(&got, &one.p);
    moec_lp_answer_release(&got);
    one.row[1].least = 9;
    refuse(MOEC_EINVAL, "row 1 asks for 9 of its 8 groups");
    one.row[1].least = 8; /* all at 3 and one at 2 */
    refuse(MOEC_EINVAL, "no choice meets together");
    one.row[1].least = 1;
    one.option[1][3] = 24;
    refuse(MOEC_EINVAL, "row 1: option 24");
    one.option[1][3] = 2;
    refuse(MOEC_EINVAL, "row 1 has option 2 twice");
    one.p.rows = 0;
    one.first[3] = one.first[2];
    refuse(MOEC_EINVAL, "group 2 has no options");
    start(&one, 8, 3, 100);
    one.cost[5] = (double)NAN;
    refuse(MOEC_ENUMERIC, "option 5");
    one.cost[5] = -1.0;
    refuse(MOEC_ENUMERIC, "option 5");
    one.cost[5] = 1.0;
    one.size[7] = -1;
    refuse(MOEC_EINVAL, "option 7: size -1");
    one.size[7] = one.size[20] = INT64_MAX;
    refuse(MOEC_EINVAL, "2^63");
    start(&one, 0, 3, 100);
    refuse(MOEC_EINVAL, "0 groups");
}

/* Sizes of exabytes. */
static void test_huge(void **unused)
{
    (void)unused;
    state = 6;
    for (int i = 0; i < 50; i++) {
        pmq(&one, 8, 12 + i % 9);
        for (int64_t j = 0; j < 24; j++)
            one.size[j] *= INT64_C(1) << 55;
        one.p.budget = (one.p.budget << 55) + i;
        same_as_all(&one);
    }
}

static void test_no_memory(void **unused)
{
    (void)unused;
    state = 7;
    pmq(&one, 8, 16);
    for (long k = 0;; k++) {
        moec_lp_answer got;
        moec_err err = {MOEC_OK, ""};
        moec_test_allocs_left = k;
        const moec_status st = moec_lp_solve(&got, &one.p, 0.0, &err);
        moec_test_allocs_left = __LONG_MAX__;
        moec_lp_answer_release(&got);
        if (st == MOEC_OK)
            break;
        assert_int_equal(st, MOEC_ENOMEM);
    }
}

/* GLPK aborts where it gets no memory. */
static void test_no_memory_for_glpk(void **unused)
{
    enum { EACH = 4, SHARE = 512 };
    moec_lp_answer got;
    moec_err err = {MOEC_OK, ""};
    (void)unused;
    state = 8;
    start(&one, GROUPS, EACH, (int64_t)GROUPS * 1500000);
    for (int64_t j = 0; j < MOST; j++) {
        one.size[j] = 1000000 + (int64_t)(draw() % 900000);
        one.cost[j] = uniform();
    }
    for (int r = 0; r < 2; r++) {
        for (int64_t i = 0; i < SHARE; i++)
            one.option[r][i] = (r * SHARE + i) * EACH + 2;
        one.row[r] = (moec_lp_row){one.option[r], SHARE, 400};
    }
    one.p.row = one.row;
    one.p.rows = 2;
    glp_mem_limit(1);
    assert_int_equal(moec_lp_solve(&got, &one.p, 0.0, &err), MOEC_ENOMEM);
    glp_mem_limit(1000);
    assert_int_equal(moec_lp_solve(&got, &one.p, 1.0, &err), MOEC_OK);
    moec_lp_answer_release(&got);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pmq),     cmocka_unit_test(test_any),  cmocka_unit_test(test_large),
        cmocka_unit_test(test_outlier), cmocka_unit_test(test_ties), cmocka_unit_test(test_refused),
        cmocka_unit_test(test_huge),    cmocka_unit_test(test_no_memory), cmocka_unit_test(test_bytes),
        cmocka_unit_test(test_subset_sum), cmocka_unit_test(test_no_memory_for_glpk),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
