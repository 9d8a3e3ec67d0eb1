/* Groups of experts against what is worked out from all pairs, all partitions and the points themselves; ties, experts without a
 * mass, fixed ones, blocks; and the eigenpairs that spectral groups are made of. */
#include "method/group.h"

#include "base/mem.h"
#include "num/linalg.h"

#include <limits.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { MOST = 40, DIMS = 3, RESTARTS = 40 };

static uint64_t seed;

static double uniform(double low, double high)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return low + (high - low) * (double)(seed >> 40) / 16777216.0;
}

/* Experts as points, and what follows from them. */
typedef struct cloud {
    double point[MOST][DIMS], mass[MOST], d[MOST * MOST], squared[MOST * MOST], kernel[MOST * MOST];
    bool fixed[MOST];
    moec_group_task t;
} cloud;

static void fill(cloud *c)
{
    const int64_t n = c->t.n;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++) {
            double s = 0.0, k = 0.0;
            for (int x = 0; x < DIMS; x++) {
                s += (c->point[i][x] - c->point[j][x]) * (c->point[i][x] - c->point[j][x]);
                k += c->point[i][x] * c->point[j][x];
            }
            c->squared[i * n + j] = s;
            c->d[i * n + j] = sqrt(s);
            c->kernel[i * n + j] = k;
        }
}

static cloud *make(int64_t n, int64_t keep, int64_t blocks)
{
    cloud *c = calloc(1, sizeof *c);
    for (int64_t i = 0; i < n; i++) {
        c->mass[i] = uniform(0.1, 2.0);
        for (int x = 0; x < DIMS; x++)
            c->point[i][x] = uniform(-1.0, 1.0);
    }
    c->t = (moec_group_task){.n = n, .keep = keep, .blocks = blocks, .distance = c->d, .mass = c->mass, .fixed = c->fixed,
                             .seed = 3};
    fill(c);
    return c;
}

/* Any way by its number: 0 to 3 linkages, then nearest, pseudo, k-means, spectral (affinity exp(-d)). */
enum { NEAREST = 4, PSEUDO, KMEANS, SPECTRAL, WAYS };

static moec_status run(int32_t *centre, const cloud *c, int way, moec_err *err)
{
    moec_group_task t = c->t;
    double a[MOST * MOST], objective;
    switch (way) {
    case NEAREST: return moec_group_nearest(centre, &t, err);
    case PSEUDO: return moec_group_pseudo(centre, &t, t.n, err);
    case KMEANS: return moec_group_kmeans(centre, &objective, &t, c->kernel, RESTARTS, err);
    case SPECTRAL:
        for (int64_t i = 0; i < t.n * t.n; i++)
            a[i] = exp(-c->d[i]);
        return moec_group_spectral(centre, &t, a, RESTARTS, err);
    default:
        t.distance = way == MOEC_LINK_WARD ? c->squared : c->d;
        return moec_group_linkage(centre, NULL, &t, (moec_linkage)way, err);
    }
}

/* What holds for any grouping: centres of themselves, the largest mass, K in all and in blocks, fixed ones alone, centres without
 * a mass only by force. */
static void check_form(const cloud *c, const int32_t *centre)
{
    const moec_group_task *t = &c->t;
    const int64_t width = t->n / t->blocks;
    for (int64_t b = 0; b < t->blocks; b++) {
        int64_t groups = 0, live = 0, forced = 0, joined = 0;
        for (int64_t e = b * width; e < (b + 1) * width; e++) {
            live += c->mass[e] > 0.0 && !c->fixed[e];
            forced += centre[e] == e && c->mass[e] == 0.0 && !c->fixed[e];
            joined += centre[e] != e && c->mass[e] > 0.0;
            assert_in_range(centre[e], b * width, (b + 1) * width - 1);
            assert_int_equal(centre[centre[e]], centre[e]);
            groups += centre[e] == e;
            assert_true(c->mass[e] < c->mass[centre[e]] || (c->mass[e] == c->mass[centre[e]] && e >= centre[e]));
            if (c->fixed[e] || c->fixed[centre[e]])
                assert_int_equal(centre[e], e);
        }
        assert_int_equal(groups, t->keep / t->blocks);
        assert_true(forced == 0 || joined == 0);
        for (int64_t e = b * width; e < (b + 1) * width; e++) /* who has no mass is with one that has, where there is one */
            assert_true(live == 0 || centre[e] == e || c->mass[centre[e]] > 0.0);
    }
}

static void same_groups(const int32_t *a, const int32_t *b, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < i; j++)
            if ((a[i] == a[j]) != (b[i] == b[j]))
                fail_msg("%d and %d are together in one grouping only", (int)i, (int)j);
}

/* --- linkage --------------------------------------------------------------------------------------------------------- */

/* Of two groups given as labels, from all pairs of their members or from their weighted means. */
static double literal(const cloud *c, const int32_t *label, int32_t a, int32_t b, moec_linkage by)
{
    const int64_t n = c->t.n;
    double sum = 0.0, most = 0.0, least = (double)INFINITY, mean[3][DIMS] = {{0.0}}, mass[3] = {0.0}, error[3] = {0.0};
    int64_t pairs = 0;
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < n; j++)
            if (label[i] == a && label[j] == b) {
                const double d = c->d[i * n + j];
                sum += d;
                most = fmax(most, d);
                least = fmin(least, d);
                pairs++;
            }
        for (int g = 0; g < 3; g++)
            if ((label[i] == a && g != 1) || (label[i] == b && g != 0)) {
                mass[g] += c->mass[i];
                for (int x = 0; x < DIMS; x++)
                    mean[g][x] += c->mass[i] * c->point[i][x];
            }
    }
    for (int64_t i = 0; i < n; i++)
        for (int g = 0; g < 3; g++)
            for (int x = 0; x < DIMS; x++)
                if ((label[i] == a && g != 1) || (label[i] == b && g != 0)) {
                    const double v = c->point[i][x] - mean[g][x] / mass[g];
                    error[g] += c->mass[i] * v * v;
                }
    return by == MOEC_LINK_AVERAGE ? sum / (double)pairs : by == MOEC_LINK_COMPLETE ? most : by == MOEC_LINK_SINGLE ? least
         : error[2] - error[0] - error[1];
}

static void literal_linkage(int32_t *label, double *height, const cloud *c, moec_linkage by)
{
    const int32_t n = (int32_t)c->t.n;
    for (int32_t i = 0; i < n; i++)
        label[i] = i;
    for (int64_t groups = n; groups > c->t.keep; groups--) {
        int32_t first = 0, second = 0;
        double least = (double)INFINITY;
        for (int32_t a = 0; a < n; a++)
            for (int32_t b = a + 1; b < n; b++)
                if (label[a] == a && label[b] == b && literal(c, label, a, b, by) < least) {
                    least = literal(c, label, a, b, by);
                    first = a;
                    second = b;
                }
        *height++ = least;
        for (int32_t i = 0; i < n; i++)
            label[i] = label[i] == second ? first : label[i];
    }
}

static void test_linkage(void **state)
{
    (void)state;
    seed = 11;
    for (int trial = 0; trial < 12; trial++)
        for (int by = MOEC_LINK_AVERAGE; by <= MOEC_LINK_SINGLE; by++)
            for (int64_t keep = 1; keep <= 12; keep += 3) {
                cloud *c = make(12, keep, 1);
                int32_t label[MOST], centre[MOST];
                double want[MOST], height[MOST];
                moec_group_task t = c->t;
                t.distance = by == MOEC_LINK_WARD ? c->squared : c->d;
                literal_linkage(label, want, c, (moec_linkage)by);
                assert_int_equal(moec_group_linkage(centre, height, &t, (moec_linkage)by, NULL), MOEC_OK);
                check_form(c, centre);
                same_groups(centre, label, 12);
                for (int64_t i = 0; i < 12 - keep; i++)
                    assert_true(fabs(height[i] - want[i]) < 1e-12 * (1.0 + want[i]));
                free(c);
            }
}

/* On a line at 0 1 3 7 12, worked by hand. */
static void test_linkage_by_hand(void **state)
{
    static const double at[] = {0.0, 1.0, 3.0, 7.0, 12.0};
    static const double want[][4] = {[MOEC_LINK_AVERAGE] = {1.0, 2.5, 5.0, (12.0 + 11.0 + 9.0 + 7.0 + 6.0 + 4.0) / 6.0},
                                     [MOEC_LINK_WARD] = {0.5, 2.0 / 3.0 * 6.25, 12.5, 6.0 / 5.0 * 8.1666666666666667 * 8.1666666666666667},
                                     [MOEC_LINK_COMPLETE] = {1.0, 3.0, 5.0, 12.0},
                                     [MOEC_LINK_SINGLE] = {1.0, 2.0, 4.0, 5.0}};
    (void)state;
    for (int by = MOEC_LINK_AVERAGE; by <= MOEC_LINK_SINGLE; by++) {
        cloud *c = make(5, 1, 1);
        double height[4];
        int32_t centre[5];
        memset(c->point, 0, sizeof c->point);
        for (int i = 0; i < 5; i++) {
            c->point[i][0] = at[i];
            c->mass[i] = 1.0;
        }
        fill(c);
        moec_group_task t = c->t;
        t.distance = by == MOEC_LINK_WARD ? c->squared : c->d;
        assert_int_equal(moec_group_linkage(centre, height, &t, (moec_linkage)by, NULL), MOEC_OK);
        for (int i = 0; i < 4; i++)
            assert_true(fabs(height[i] - want[by][i]) < 1e-12);
        free(c);
    }
}

/* --- nearest and pseudo ---------------------------------------------------------------------------------------------- */

static void set_line(cloud *c, const double *at, const double *mass)
{
    memset(c->point, 0, sizeof c->point);
    for (int64_t i = 0; i < c->t.n; i++) {
        c->point[i][0] = at[i];
        c->mass[i] = mass[i];
    }
    fill(c);
}

static void expect(const cloud *c, int way, const int32_t *want)
{
    int32_t centre[MOST];
    moec_err err = {MOEC_OK, ""};
    if (run(centre, c, way, &err) != MOEC_OK)
        fail_msg("way %d: %s", way, err.text);
    for (int64_t i = 0; i < c->t.n; i++)
        if (centre[i] != want[i])
            fail_msg("way %d: expert %d is with %d, expected %d", way, (int)i, (int)centre[i], (int)want[i]);
}

static void test_centres(void **state)
{
    int32_t centre[7];
    (void)state;
    cloud *c = make(7, 2, 1);
    set_line(c, (const double[]){0, 1, 2, 3, 4, 5, 6}, (const double[]){1, 5, 1, 1, 1, 9, 1});
    expect(c, NEAREST, (const int32_t[]){1, 1, 1, 1, 5, 5, 5}); /* 3 is as near to both */
    c->t.fixed = NULL;
    assert_int_equal(moec_group_pseudo(centre, &c->t, 4, NULL), MOEC_OK); /* 5 takes 4, 6, then 3 */
    assert_memory_equal(centre, ((int32_t[]){1, 1, 1, 5, 5, 5, 5}), sizeof centre);
    assert_int_equal(moec_group_pseudo(centre, &c->t, 5, NULL), MOEC_OK); /* and 2 */
    assert_memory_equal(centre, ((int32_t[]){1, 1, 5, 5, 5, 5, 5}), sizeof centre);
    assert_int_equal(moec_group_pseudo(centre, &c->t, INT64_MAX, NULL), MOEC_OK);
    assert_memory_equal(centre, ((int32_t[]){5, 1, 5, 5, 5, 5, 5}), sizeof centre);
    assert_int_equal(moec_group_pseudo(centre, &c->t, 3, NULL), MOEC_EINVAL); /* 6 places for 7 */
    assert_int_equal(moec_group_pseudo(centre, &c->t, 0, NULL), MOEC_EINVAL);
    free(c);
}

/* --- k-means --------------------------------------------------------------------------------------------------------- */

static double error_of(const cloud *c, const int32_t *label)
{
    double sum = 0.0;
    for (int64_t g = 0; g < c->t.n; g++) {
        double mean[DIMS] = {0.0}, n = 0.0;
        for (int64_t i = 0; i < c->t.n; i++)
            for (int x = 0; x < DIMS && label[i] == g; x++) {
                mean[x] += c->point[i][x];
                n += x == 0;
            }
        for (int64_t i = 0; i < c->t.n; i++)
            for (int x = 0; x < DIMS && label[i] == g; x++)
                sum += (c->point[i][x] - mean[x] / n) * (c->point[i][x] - mean[x] / n);
    }
    return sum;
}

/* Least error of all partitions of n points into exactly k groups. */
static double best_error(const cloud *c, int32_t *label, int64_t at, int32_t used)
{
    double best = (double)INFINITY;
    if (at == c->t.n)
        return used == c->t.keep ? error_of(c, label) : best;
    for (int32_t g = 0; g <= used && g < c->t.keep; g++) {
        label[at] = g;
        best = fmin(best, best_error(c, label, at + 1, used + (g == used)));
    }
    return best;
}

static void test_kmeans(void **state)
{
    (void)state;
    seed = 5;
    for (int trial = 0; trial < 20; trial++)
        for (int64_t keep = 1; keep <= 3; keep++) {
            cloud *c = make(8, keep, 1);
            int32_t label[MOST], centre[MOST], again[MOST];
            double objective, second;
            assert_int_equal(moec_group_kmeans(centre, &objective, &c->t, c->kernel, RESTARTS, NULL), MOEC_OK);
            check_form(c, centre);
            const double best = best_error(c, label, 0, 0);
            assert_true(fabs(error_of(c, centre) - best) < 1e-12);
            assert_true(fabs(objective - best) < 1e-12);
            assert_int_equal(moec_group_kmeans(again, &second, &c->t, c->kernel, RESTARTS, NULL), MOEC_OK);
            assert_memory_equal(again, centre, 8 * sizeof *again);
            assert_memory_equal(&second, &objective, sizeof second);
            free(c);
        }
}

static void test_restarts(void **state)
{
    int32_t centre[MOST], first[MOST];
    double objective, least = (double)INFINITY, alone = 0.0;
    bool differ = false;
    (void)state;
    seed = 7;
    cloud *c = make(40, 8, 1);
    for (int restarts = 1; restarts <= 30; restarts++) { /* the first restarts are the same ones */
        assert_int_equal(moec_group_kmeans(centre, &objective, &c->t, c->kernel, restarts, NULL), MOEC_OK);
        assert_true(objective <= least);
        assert_true(fabs(objective - error_of(c, centre)) < 1e-9);
        least = objective;
        alone = restarts == 1 ? objective : alone;
    }
    assert_true(least < alone);
    c->t.seed = 0;
    assert_int_equal(moec_group_kmeans(first, NULL, &c->t, c->kernel, 1, NULL), MOEC_OK);
    for (c->t.seed = 1; c->t.seed < 20; c->t.seed++) {
        assert_int_equal(moec_group_kmeans(centre, NULL, &c->t, c->kernel, 1, NULL), MOEC_OK);
        differ = differ || memcmp(first, centre, 40 * sizeof *first) != 0;
    }
    assert_true(differ);
    assert_int_equal(moec_group_kmeans(centre, NULL, &c->t, c->kernel, 0, NULL), MOEC_EINVAL);
    assert_int_equal(moec_group_spectral(centre, &c->t, c->d, 0, NULL), MOEC_EINVAL);
    free(c);
}

/* --- spectral -------------------------------------------------------------------------------------------------------- */

static void test_spectral(void **state)
{
    double a[MOST * MOST] = {0.0};
    int32_t want[MOST], centre[MOST];
    (void)state;
    seed = 9;
    for (int64_t k = 1; k <= 5; k++)
        for (double noise = 0.0; noise < 0.1; noise += 0.04) {
            cloud *c = make(30, k, 1);
            for (int32_t i = 0; i < 30; i++)
                want[i] = (i * 7 + i / 3) % (int32_t)k;
            for (int i = 0; i < 30; i++)
                for (int j = 0; j <= i; j++)
                    a[i * 30 + j] = a[j * 30 + i] = want[i] == want[j] ? uniform(0.5, 1.0) : uniform(0.0, noise);
            assert_int_equal(moec_group_spectral(centre, &c->t, a, RESTARTS, NULL), MOEC_OK);
            check_form(c, centre);
            same_groups(centre, want, 30);
            free(c);
        }
    cloud *c = make(6, 3, 1); /* 5 is like none: a group of its own */
    memset(a, 0, sizeof a);
    for (int i = 0; i < 5; i++)
        for (int j = 0; j < 5; j++)
            a[i * 6 + j] = i / 3 == j / 3 ? 1.0 : 0.0;
    assert_int_equal(moec_group_spectral(centre, &c->t, a, RESTARTS, NULL), MOEC_OK);
    same_groups(centre, (const int32_t[]){0, 0, 0, 1, 1, 2}, 6);
    memset(a, 0, sizeof a); /* 1 and 4 are like none, which does not make them alike */
    for (int i = 0; i < 6; i++)
        for (int j = 0; j < 6; j++)
            a[i * 6 + j] = i != 1 && i != 4 && j != 1 && j != 4 && i / 3 == j / 3 ? 0.7 : 0.0;
    c->t.keep = 4;
    assert_int_equal(moec_group_spectral(centre, &c->t, a, RESTARTS, NULL), MOEC_OK);
    same_groups(centre, (const int32_t[]){0, 1, 0, 2, 3, 2}, 6);
    memset(a, 0, sizeof a);
    assert_int_equal(moec_group_spectral(centre, &c->t, a, RESTARTS, NULL), MOEC_OK);
    check_form(c, centre);
    free(c);
}

/* --- eigenpairs ------------------------------------------------------------------------------------------------------ */

static void test_eigen(void **state)
{
    double a[12 * 12], lost[12 * 12], values[12], vectors[12 * 12], again[12 * 12];
    moec_err err = {MOEC_OK, ""};
    (void)state;
    seed = 3;
    for (int64_t n = 1; n <= 12; n++)
        for (int64_t r = 0; r <= n; r++)
            for (int end = MOEC_EIGEN_LARGEST; end <= MOEC_EIGEN_SMALLEST; end++) {
                for (int64_t i = 0; i < n; i++)
                    for (int64_t j = 0; j <= i; j++)
                        a[i * n + j] = a[j * n + i] = uniform(-1.0, 1.0);
                for (int64_t i = 0; i < n * n; i++)
                    lost[i] = i % n > i / n ? (double)NAN : a[i]; /* not read */
                assert_int_equal(moec_eigen(values, vectors, lost, n, r, (moec_eigen_end)end, NULL), MOEC_OK);
                for (int64_t i = 0; i < n * n; i++)
                    assert_true(i % n <= i / n || isnan(lost[i]));
                memcpy(lost, a, sizeof lost);
                assert_int_equal(moec_eigen(values, again, lost, n, r, (moec_eigen_end)end, NULL), MOEC_OK);
                assert_memory_equal(vectors, again, (size_t)(r * n) * sizeof *again);
                for (int64_t v = 0; v < r; v++) {
                    const double *x = vectors + v * n;
                    double most = 0.0;
                    assert_true(v == 0 || (end == MOEC_EIGEN_LARGEST ? values[v] <= values[v - 1] : values[v] >= values[v - 1]));
                    for (int64_t i = 0; i < n; i++) {
                        double ax = 0.0;
                        for (int64_t j = 0; j < n; j++)
                            ax += a[i * n + j] * x[j];
                        assert_true(fabs(ax - values[v] * x[i]) < 1e-13 * (double)n);
                        most = fabs(x[i]) > fabs(most) ? x[i] : most;
                    }
                    assert_true(most > 0.0);
                    for (int64_t w = 0; w <= v; w++) {
                        double xy = 0.0;
                        for (int64_t i = 0; i < n; i++)
                            xy += x[i] * vectors[w * n + i];
                        assert_true(fabs(xy - (v == w ? 1.0 : 0.0)) < 1e-13 * (double)n);
                    }
                }
                if (r == n) { /* both ends have the trace */
                    double trace = 0.0;
                    for (int64_t i = 0; i < n; i++)
                        trace += a[i * n + i] - values[i];
                    assert_true(fabs(trace) < 1e-12);
                }
            }
    /* by hand: 2 1 / 1 2 has 3 with (1,1), 1 with (1,-1) */
    memcpy(a, (const double[]){2, 1, 1, 2}, 4 * sizeof *a);
    assert_int_equal(moec_eigen(values, vectors, a, 2, 1, MOEC_EIGEN_LARGEST, NULL), MOEC_OK);
    assert_true(fabs(values[0] - 3.0) < 1e-14 && fabs(vectors[0] - sqrt(0.5)) < 1e-14 && fabs(vectors[1] - sqrt(0.5)) < 1e-14);
    for (int i = 0; i < 4; i++) {
        memcpy(a, (const double[]){2, 1, 1, 2}, 4 * sizeof *a);
        a[i] = i < 2 ? (double)NAN : (double)INFINITY;
        assert_int_equal(moec_eigen(values, vectors, a, 2, 1, MOEC_EIGEN_SMALLEST, &err), i == 1 ? MOEC_OK : MOEC_ENUMERIC);
    }
    assert_non_null(strstr(err.text, "not finite"));
}

/* --- what all have in common ----------------------------------------------------------------------------------------- */

static void test_forms(void **state)
{
    int32_t centre[MOST];
    (void)state;
    seed = 21;
    for (int trial = 0; trial < 300; trial++)
        for (int way = 0; way < WAYS; way++) {
            const int64_t blocks = 1 + trial % 3, width = 4 + trial % 7, keep = 2 + trial / 3 % (width - 1);
            cloud *c = make(blocks * width, blocks * keep, blocks);
            for (int64_t e = 0; e < c->t.n; e++) {
                if (uniform(0, 1) < 0.3)
                    c->mass[e] = trial % 5 == 0 ? 0.0 : 1.0; /* ties, or none at all */
                if (trial % 2 && e > 0 && uniform(0, 1) < 0.3)
                    memcpy(c->point[e], c->point[e - 1], sizeof *c->point);
            }
            if (trial % 4 == 0) /* one of each block */
                for (int64_t b = 0; b < blocks; b++)
                    c->fixed[b * width + (int64_t)uniform(0, (double)width)] = true;
            fill(c);
            moec_err err = {MOEC_OK, ""};
            if (run(centre, c, way, &err) != MOEC_OK)
                fail_msg("trial %d, way %d: %s", trial, way, err.text);
            check_form(c, centre);
            free(c);
        }
}

static void test_ends(void **state)
{
    int32_t centre[MOST];
    (void)state;
    seed = 2;
    for (int way = 0; way < WAYS; way++) {
        cloud *c = make(9, 9, 3);
        c->mass[4] = 0.0;
        expect(c, way, (const int32_t[]){0, 1, 2, 3, 4, 5, 6, 7, 8});
        memset(c->fixed, true, sizeof c->fixed); /* all are, and are kept */
        expect(c, way, (const int32_t[]){0, 1, 2, 3, 4, 5, 6, 7, 8});
        free(c);
        c = make(1, 1, 1);
        expect(c, way, (const int32_t[]){0});
        free(c);
        c = make(9, 1, 1);
        c->mass[5] = 3.0;
        expect(c, way, (const int32_t[]){5, 5, 5, 5, 5, 5, 5, 5, 5});
        free(c);
        c = make(9, 4, 1); /* all alike */
        for (int i = 0; i < 9; i++) {
            memcpy(c->point[i], c->point[0], sizeof *c->point);
            c->mass[i] = 1.0;
        }
        fill(c);
        assert_int_equal(run(centre, c, way, NULL), MOEC_OK);
        check_form(c, centre);
        free(c);
    }
}

static void test_ties(void **state)
{
    (void)state;
    cloud *c = make(6, 3, 1); /* equal steps, equal masses: the first pair, and then what it left */
    set_line(c, (const double[]){0, 1, 2, 3, 4, 5}, (const double[]){1, 1, 1, 1, 1, 1});
    for (int by = MOEC_LINK_AVERAGE; by <= MOEC_LINK_COMPLETE; by++)
        expect(c, by, (const int32_t[]){0, 0, 2, 2, 4, 4});
    expect(c, MOEC_LINK_SINGLE, (const int32_t[]){0, 0, 0, 0, 4, 5});
    expect(c, NEAREST, (const int32_t[]){0, 1, 2, 2, 2, 2});
    expect(c, PSEUDO, (const int32_t[]){0, 1, 2, 0, 0, 0});
    free(c);
}

static void test_dead(void **state)
{
    double height[4];
    int32_t centre[6];
    (void)state;
    /* 1 and 4 were never selected. Without them 0 and 2 are the pair, and 3 and 5. */
    cloud *c = make(6, 2, 1);
    set_line(c, (const double[]){0, 4.9, 1, 6, 5.2, 7}, (const double[]){1, 0, 2, 2, 0, 1});
    for (int way = 0; way < WAYS; way++)
        if (way != PSEUDO)
            expect(c, way, (const int32_t[]){2, 3, 2, 3, 3, 3});
    moec_group_task t = c->t;
    assert_int_equal(moec_group_linkage(centre, height, &t, MOEC_LINK_SINGLE, NULL), MOEC_OK);
    assert_memory_equal(height, ((double[]){1.0, 1.0, 0.0, 0.0}), sizeof height);
    assert_int_equal(moec_group_pseudo(centre, &t, 3, NULL), MOEC_OK); /* they take up no place */
    assert_memory_equal(centre, ((int32_t[]){2, 3, 2, 3, 3, 2}), sizeof centre);
    /* with 3 fixed they are with 2: nobody joins 3, and 5 has to as well */
    c->fixed[3] = true;
    for (int way = 0; way < WAYS; way++)
        expect(c, way, (const int32_t[]){2, 2, 2, 3, 2, 2});
    /* one is fixed itself */
    c->fixed[3] = false;
    c->fixed[1] = true;
    for (int way = 0; way < WAYS; way++)
        expect(c, way, (const int32_t[]){2, 1, 2, 2, 2, 2});
    c->fixed[1] = false;
    /* fewer live than groups: the lowest of the others fill up, the last joins one that lives */
    c->t.keep = 5;
    for (int way = 0; way < WAYS; way++)
        expect(c, way, (const int32_t[]){0, 1, 2, 3, 3, 5});
    /* none lives */
    memset(c->mass, 0, sizeof c->mass);
    c->t.keep = 2;
    for (int way = 0; way < WAYS; way++)
        expect(c, way, (const int32_t[]){0, 1, 0, 1, 1, 1});
    /* none in the second block */
    c->t.blocks = 2;
    c->mass[1] = 1.0;
    for (int way = 0; way < WAYS; way++)
        expect(c, way, (const int32_t[]){1, 1, 1, 3, 3, 3});
    free(c);
}

/* Each block alone, with its own part of everything. */
static void test_blocks(void **state)
{
    (void)state;
    seed = 17;
    for (int trial = 0; trial < 20; trial++)
        for (int way = 0; way < KMEANS; way++) {
            cloud *c = make(21, 9, 3);
            int32_t all[21], part[7];
            double height[12], own[4];
            c->mass[8] = way < NEAREST ? 0.0 : c->mass[8]; /* of the second block's heights the last is then 0 */
            if (way < NEAREST)
                assert_int_equal(moec_group_linkage(all, height, &c->t, (moec_linkage)way, NULL), MOEC_OK);
            else
                assert_int_equal(run(all, c, way, NULL), MOEC_OK);
            for (int b = 0; b < 3; b++) {
                cloud *one = make(7, 3, 1);
                memcpy(one->point, c->point + 7 * b, 7 * sizeof *c->point);
                memcpy(one->mass, c->mass + 7 * b, 7 * sizeof *c->mass);
                fill(one);
                if (way < NEAREST) {
                    assert_int_equal(moec_group_linkage(part, own, &one->t, (moec_linkage)way, NULL), MOEC_OK);
                    assert_memory_equal(own, height + 4 * b, sizeof own);
                    assert_true(b == 1 ? own[3] == 0.0 && own[2] > 0.0 : own[3] > 0.0);
                } else {
                    assert_int_equal(run(part, one, way, NULL), MOEC_OK);
                }
                for (int i = 0; i < 7; i++)
                    assert_int_equal(all[7 * b + i], 7 * b + part[i]);
                free(one);
            }
            free(c);
        }
}

static void refuse(cloud *c, moec_status code, const char *says)
{
    for (int way = 0; way < WAYS; way++) {
        moec_err err = {MOEC_OK, ""};
        int32_t centre[MOST];
        assert_int_equal(run(centre, c, way, &err), code);
        if (!strstr(err.text, says))
            fail_msg("way %d: %s", way, err.text);
    }
}

static void test_refusals(void **state)
{
    static const int64_t form[][3] = {{0, 0, 1}, {6, 0, 1}, {6, 7, 1}, {6, 3, 0}, {6, 3, 2}, {6, 4, 4}, {6, -2, 2}};
    (void)state;
    cloud *c = make(6, 2, 1);
    for (size_t i = 0; i < MOEC_COUNT(form); i++) {
        c->t.n = form[i][0], c->t.keep = form[i][1], c->t.blocks = form[i][2];
        refuse(c, MOEC_EINVAL, "groups of");
    }
    c->t.n = 6, c->t.keep = 2, c->t.blocks = 1;
    c->fixed[1] = c->fixed[4] = true;
    refuse(c, MOEC_EINVAL, "experts 1, 4 are groups of their own");
    c->fixed[5] = true;
    refuse(c, MOEC_EINVAL, "experts 1, 4, 5 are");
    memset(c->fixed, 0, sizeof c->fixed);
    for (int bad = 0; bad < 3; bad++) {
        c->mass[3] = (const double[]){(double)NAN, (double)INFINITY, -1.0}[bad];
        refuse(c, MOEC_ENUMERIC, "mass of expert 3");
    }
    c->mass[3] = 1.0;
    c->d[2 * 6 + 4] = c->squared[2 * 6 + 4] = c->kernel[2 * 6 + 4] = (double)NAN;
    refuse(c, MOEC_ENUMERIC, "of experts 2 and 4 is");
    c->d[2 * 6 + 4] = c->squared[2 * 6 + 4] = -0.5;
    c->kernel[2 * 6 + 4] = 0.0;
    for (int way = 0; way < KMEANS; way++) {
        int32_t centre[6];
        assert_int_equal(run(centre, c, way, NULL), MOEC_ENUMERIC);
    }
    c->kernel[7] = -0.5;
    int32_t centre[6];
    assert_int_equal(run(centre, c, KMEANS, NULL), MOEC_ENUMERIC);
    free(c);
    /* finite, but no sum of them is */
    c = make(6, 2, 1);
    for (int i = 0; i < 36; i++)
        c->d[i] = c->squared[i] = c->kernel[i] = i % 7 ? 1.5e308 : 1.7e308;
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_group_linkage(centre, NULL, &c->t, MOEC_LINK_AVERAGE, &err), MOEC_ENUMERIC);
    assert_int_equal(moec_group_linkage(centre, NULL, &c->t, MOEC_LINK_SINGLE, NULL), MOEC_OK);
    assert_int_equal(moec_group_kmeans(centre, NULL, &c->t, c->kernel, 3, NULL), MOEC_ENUMERIC);
    assert_int_equal(moec_group_spectral(centre, &c->t, c->d, 3, NULL), MOEC_ENUMERIC);
    for (int i = 0; i < 6; i++)
        c->mass[i] = 1e200;
    assert_int_equal(moec_group_linkage(centre, NULL, &c->t, MOEC_LINK_WARD, NULL), MOEC_ENUMERIC);
    free(c);
}

static void test_no_memory(void **state)
{
    (void)state;
    seed = 4;
    cloud *c = make(8, 4, 2);
    for (int way = 0; way < WAYS; way++)
        for (long k = 0;; k++) {
            int32_t centre[8];
            moec_err err = {MOEC_OK, ""};
            moec_test_allocs_left = k;
            const moec_status st = run(centre, c, way, &err);
            moec_test_allocs_left = LONG_MAX;
            assert_true(st == MOEC_OK || (st == MOEC_ENOMEM && *err.text));
            if (st == MOEC_OK)
                break;
        }
    free(c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_linkage),  cmocka_unit_test(test_linkage_by_hand), cmocka_unit_test(test_centres),
        cmocka_unit_test(test_kmeans),   cmocka_unit_test(test_restarts),        cmocka_unit_test(test_spectral),
        cmocka_unit_test(test_eigen),    cmocka_unit_test(test_forms),           cmocka_unit_test(test_ends),
        cmocka_unit_test(test_ties),     cmocka_unit_test(test_dead),            cmocka_unit_test(test_blocks),
        cmocka_unit_test(test_refusals), cmocka_unit_test(test_no_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
