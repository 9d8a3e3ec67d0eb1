/* Thresholds and caches for runtimes: against enumeration, and against what tokens that were counted say themselves. */
#include "base/mem.h"
#include "method/thresholds.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static uint64_t seed = 11;

static double draw(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return (double)(seed >> 11) / 9007199254740992.0;
}

static void must(moec_status st, const moec_err *err)
{
    if (st != MOEC_OK)
        fail_msg("%s", err->text);
}

/* --- caches ----------------------------------------------------------------------------------------------------------- */

static void splits_are_the_best_of_all(void **state)
{
    enum { L = 3, E = 4 };
    (void)state;
    for (int run = 0; run < 50; run++) {
        double cost[L * (E + 1)];
        for (int i = 0; i < L * (E + 1); i++)
            cost[i] = run % 2 ? draw() : floor(3.0 * draw()); /* ties, too */
        for (int budget = 0; budget <= L * E; budget++) {
            double best = INFINITY, sum = 0.0;
            int32_t size[L], total = 0;
            for (int a = 0; a <= E; a++)
                for (int b = 0; b <= E; b++)
                    for (int c = 0; c <= E; c++)
                        if (a + b + c == budget)
                            best = fmin(best, cost[a] + cost[E + 1 + b] + cost[2 * (E + 1) + c]);
            assert_int_equal(moec_cache_split(size, cost, L, E, budget, NULL), MOEC_OK);
            for (int l = 0; l < L; l++) {
                assert_true(size[l] >= 0 && size[l] <= E);
                total += size[l];
                sum += cost[l * (E + 1) + size[l]];
            }
            assert_int_equal(total, budget);
            assert_true(fabs(sum - best) < 1e-12);
        }
        int32_t size[L];
        assert_int_equal(moec_cache_split(size, cost, L, E, L * E + 1, NULL), MOEC_EINVAL);
        assert_int_equal(moec_cache_split(size, cost, L, E, -1, NULL), MOEC_EINVAL);
        cost[3] = NAN;
        assert_int_equal(moec_cache_split(size, cost, L, E, 1, NULL), MOEC_EINVAL);
    }
}

/* The published formula's parts are chances of pairs of different experts. */
static void loads_are_those_of_pairs(void **state)
{
    (void)state;
    for (int E = 2; E <= 9; E++)
        for (int n = 0; n <= E; n++) {
            int both = 0, one = 0, pairs = 0;
            for (int a = 0; a < E; a++)
                for (int b = 0; b < E; b++) {
                    if (a == b)
                        continue;
                    pairs++;
                    both += a >= n && b >= n;
                    one += a >= n && b < n; /* as published: 2 of these are the chance of one missing */
                }
            const double A = (double)both / pairs, B = (double)one / pairs, p1 = 0.3, q = 0.6;
            const double want = p1 * (1.0 - (double)n / E) * (1.0 - q) + (1.0 - p1) * (2.0 * A * (1.0 - q) + A * q + 2.0 * B * (1.0 - q));
            assert_true(fabs(moec_cache_loads(E, n, p1, q) - want) < 1e-14);
        }
    assert_true(fabs(moec_cache_loads(8, 3, 0.25, 0.5) - (0.25 * 5.0 / 8 * 0.5 + 0.75 * (20.0 / 56 + 20.0 / 56 * 0.5 + 15.0 / 56))) < 1e-14);
    assert_true(moec_cache_loads(8, 8, 0.1, 0.2) == 0.0);
}

static void histograms_have_shares(void **state)
{
    const double count[4] = {1, 0, 2, 1}, none[2] = {0, 0};
    (void)state;
    assert_true(moec_hist_below(count, 4, 0.0) == 0.0 && moec_hist_below(count, 4, 1.0) == 1.0 && moec_hist_below(count, 4, 2.0) == 1.0);
    assert_true(moec_hist_below(count, 4, 0.125) == 0.125 && moec_hist_below(count, 4, 0.625) == 0.5);
    assert_true(moec_hist_quantile(count, 4, 0.125) == 0.125 && moec_hist_quantile(count, 4, 0.5) == 0.625);
    assert_true(moec_hist_quantile(count, 4, 0.0) == 0.0 && moec_hist_quantile(count, 4, 1.0) == 1.0);
    assert_true(moec_hist_quantile(count, 4, 0.25) == 0.25); /* the least */
    assert_true(isnan(moec_hist_below(none, 2, 0.5)) && isnan(moec_hist_quantile(none, 2, 0.5)));
}

/* --- files ------------------------------------------------------------------------------------------------------------ */

enum { L = 3, E = 5, TOKENS = 2000, RATIO = 1024, CUM = 256 };
static int64_t moe_layer[L] = {1, 2, 4};
static char rule[] = "{\"score\": \"softmax\", \"top_k\": 2}", options[] = "{\"seq_len\": 128}";
static double second[2][L][TOKENS]; /* weight of the second expert, of domain 0 and 1 */

static moec_stats *stats_of(int64_t k)
{
    const moec_stats_meta meta = {.model = "00112233445566778899aabbccddeeff", .model_type = "qwen3_moe", .router_rule = rule,
                                  .options = options, .compute = "f32", .layers = 5, .moe_layers = L, .experts = E, .top_k = k, .hidden = 8,
                                  .expert_width = 4, .moe_layer = moe_layer};
    const char *const names[] = {"code", "prose"};
    moec_stats *s;
    moec_err err = {MOEC_OK, ""};
    must(moec_stats_new(&s, &meta, 2, names, &err), &err);
    return s;
}

/* Tokens that are counted here as the observer counts them. */
static moec_stats *counted(void)
{
    moec_stats *s = stats_of(2);
    for (int d = 0; d < 2; d++) {
        s->domain[d].tokens = TOKENS;
        for (int l = 0; l < L; l++) {
            uint32_t *ratio = moec_stat_at(s, d, MOEC_STAT_RATIO_HIST, l), *before = moec_stat_at(s, d, MOEC_STAT_CUMGATE_HIST, l);
            uint64_t *selected = moec_stat_at(s, d, MOEC_STAT_SELECTED, l);
            double *marker = moec_stat_at(s, d, MOEC_STAT_MARKER_TOP1, l);
            for (int t = 0; t < TOKENS; t++) {
                const double w2 = second[d][l][t] = 0.5 * draw() * (l == 1 ? draw() : 1.0), w1 = 1.0 - w2;
                ratio[(int)fmin(w2 / w1 * RATIO, RATIO - 1)]++;
                before[0]++;
                before[CUM + (int)fmin(w1 * CUM, CUM - 1)]++;
            }
            for (int e = 0; e < E; e++) {
                selected[e] = 2 * TOKENS / E;
                marker[e] = (double)((e * 3 + d + l) % E) - 1.0;
            }
            if (l + 1 < L) {
                uint64_t *hit = moec_stat_at(s, d, MOEC_STAT_PREFETCH_HIT, l);
                hit[0] = TOKENS / 2;
                hit[1] = TOKENS / 4;
            }
        }
    }
    return s;
}

static double number(const moec_json *o, const char *key)
{
    double v;
    return moec_json_real(moec_json_get(o, key), &v) ? v : (double)NAN;
}

static const moec_json *layer_of(const moec_json *o, int l)
{
    const moec_json *row = moec_json_at(moec_json_get(o, "layers"), (size_t)l);
    assert_true(number(row, "layer") == (double)moe_layer[l]);
    return row;
}

/* Share of tokens of a layer (-1: of all) with test(w2, t); texts count 1 and 3. */
static double share(int l, bool (*test)(double w2, double t), double t)
{
    double sum = 0.0, all = 0.0;
    for (int d = 0; d < 2; d++)
        for (int i = 0; i < L; i++)
            for (int k = 0; (l < 0 || i == l) && k < TOKENS; k++) {
                sum += d == 0 ? test(second[d][i][k], t) : 3 * test(second[d][i][k], t);
                all += d == 0 ? 1 : 3;
            }
    return sum / all;
}

static bool below(double w2, double t)
{
    return w2 < t;
}

static bool high(double w2, double t)
{
    return 1.0 - w2 <= t;
}

static void files_say_what_tokens_do(void **state)
{
    moec_stats *s = counted();
    moec_json *o;
    moec_err err = {MOEC_OK, ""};
    const double sens[L] = {0.1, 0.5, 20.0};
    (void)state;
    must(moec_stats_set_weights(s, "prose=3", &err), &err);

    must(moec_odp_json(&o, s, &err), &err);
    assert_string_equal(moec_json_string(moec_json_get(o, "format")), "moecompress-odp");
    for (int l = 0; l < L; l++) {
        double m;
        assert_true(moec_json_real(moec_json_at(moec_json_get(layer_of(o, l), "median"), 0), &m));
        assert_true(fabs(share(l, below, m / (1.0 + m)) - 0.5) < 0.01);
    }
    moec_json_free(o);

    must(moec_adapmoe_json(&o, s, &(moec_adapmoe_opts){.loss = 0.005, .sensitivity = sens, .cache = 7}, &err), &err);
    double loads = 0.0, best = INFINITY, p1[L];
    int total = 0;
    for (int l = 0; l < L; l++) {
        const double t = number(layer_of(o, l), "threshold"), size = number(layer_of(o, l), "cache_size");
        assert_true(fabs(t - sqrt(0.005 / sens[l])) < 1e-12);
        p1[l] = number(layer_of(o, l), "one_expert");
        assert_true(fabs(p1[l] - share(l, below, t)) < 0.005);
        const double q = number(layer_of(o, l), "prefetch");
        assert_true(l == 0 ? isnan(q) : fabs(q - 0.375) < 1e-12);
        loads += moec_cache_loads(E, (int64_t)size, p1[l], l == 0 ? 0.0 : q);
        total += (int)size;
    }
    assert_int_equal(total, 7);
    for (int a = 0; a <= E; a++)
        for (int b = 0; b <= E; b++)
            if (7 - a - b >= 0 && 7 - a - b <= E)
                best = fmin(best, moec_cache_loads(E, a, p1[0], 0.0) + moec_cache_loads(E, b, p1[1], 0.375) +
                                      moec_cache_loads(E, 7 - a - b, p1[2], 0.375));
    assert_true(fabs(loads - best) < 1e-12 && fabs(number(o, "loads") - best) < 1e-12);
    moec_json_free(o);
    assert_int_equal(moec_adapmoe_json(&o, s, &(moec_adapmoe_opts){.loss = 0.005, .cache = -1}, &err), MOEC_EFORMAT); /* no gains */

    must(moec_hobbit_json(&o, s, &(moec_hobbit_opts){.t1 = 0.6, .t2 = 0.9}, &err), &err);
    for (int l = -1; l < L; l++) {
        const moec_json *row = l < 0 ? moec_json_get(o, "overall") : layer_of(o, l);
        const double h = 0.5 + 0.5 * share(l, high, 0.6), most = 0.5 + 0.5 * share(l, high, 0.9);
        assert_true(fabs(number(row, "high") - h) < 0.005 && fabs(number(row, "low") - (most - h)) < 0.005);
        assert_true(fabs(number(row, "skip") - (1.0 - most)) < 0.005);
    }
    moec_json_free(o);
    must(moec_hobbit_json(&o, s, &(moec_hobbit_opts){.t1 = NAN, .t2 = NAN, .high = 0.67, .low = 0.3}, &err), &err);
    assert_true(fabs(0.5 + 0.5 * share(-1, high, number(o, "t1")) - 0.67) < 0.005);
    assert_true(fabs(0.5 + 0.5 * share(-1, high, number(o, "t2")) - 0.97) < 0.005);
    moec_json_free(o);
    must(moec_hobbit_json(&o, s, &(moec_hobbit_opts){.t1 = NAN, .t2 = NAN, .high = 0.4, .low = 0.6}, &err), &err);
    assert_true(number(o, "t1") == 0.0 && number(moec_json_get(o, "overall"), "skip") == 0.0);
    moec_json_free(o);
    assert_int_equal(moec_hobbit_json(&o, s, &(moec_hobbit_opts){.t1 = 0.9, .t2 = 0.6}, &err), MOEC_EINVAL);
    assert_int_equal(moec_hobbit_json(&o, s, &(moec_hobbit_opts){.t1 = NAN, .t2 = NAN, .high = 0.8, .low = 0.3}, &err), MOEC_EINVAL);

    must(moec_premoe_json(&o, s, 3, &err), &err);
    for (int d = 0; d < 2; d++)
        for (int l = 0; l < L; l++) {
            const moec_json *one = moec_json_at(moec_json_get(o, "domains"), (size_t)d);
            const moec_json *experts = moec_json_get(layer_of(one, l), "experts");
            assert_int_equal(moec_json_len(experts), 3);
            for (int i = 0; i < 3; i++) { /* the i-th largest of values that are all different */
                int64_t e;
                double score;
                assert_true(moec_json_int(moec_json_at(experts, (size_t)i), &e));
                assert_int_equal((e * 3 + d + l) % E, E - 1 - i);
                assert_true(moec_json_real(moec_json_at(moec_json_get(layer_of(one, l), "score"), (size_t)i), &score));
                assert_true(fabs(score - (double)(E - 2 - i) / TOKENS) < 1e-15);
            }
        }
    moec_json_free(o);
    assert_int_equal(moec_premoe_json(&o, s, 1, &err), MOEC_EINVAL);
    assert_int_equal(moec_premoe_json(&o, s, E + 1, &err), MOEC_EINVAL);
    moec_stats_free(s);
}

/* Nothing was counted: null, never NaN; a rule of two experts for three. */
static void what_is_not_known_is_null(void **state)
{
    moec_stats *s = stats_of(3);
    moec_json *o;
    char *text;
    moec_err err = {MOEC_OK, ""};
    (void)state;
    must(moec_odp_json(&o, s, &err), &err);
    must(moec_json_dump(&text, o, 0, &err), &err);
    assert_non_null(strstr(text, "\"median\": [null, null]"));
    moec_free(text);
    moec_json_free(o);
    must(moec_hobbit_json(&o, s, &(moec_hobbit_opts){.t1 = 0.6, .t2 = 0.9}, &err), &err);
    assert_true(isnan(number(moec_json_get(o, "overall"), "high")));
    moec_json_free(o);
    assert_int_equal(moec_adapmoe_json(&o, s, &(moec_adapmoe_opts){.loss = 0.1, .cache = -1}, &err), MOEC_EINVAL);
    assert_non_null(strstr(err.text, "two experts a token, the model has 3"));
    moec_stats_forget(s, MOEC_STAT_CUMGATE_HIST);
    assert_int_equal(moec_hobbit_json(&o, s, &(moec_hobbit_opts){.t1 = 0.6, .t2 = 0.9}, &err), MOEC_EFORMAT);
    moec_stats_free(s);
}

static void sensitivities_are_read(void **state)
{
    static const struct { const char *text, *says; } cases[] = {
        {"1,0.5\n2,3\n4,7e-1\n", NULL}, {"[0.5, 3, 0.7]", NULL}, {" {\"4\": 0.7, \"1\": 0.5, \"2\": 3}", NULL},
        {"1,0.5\n2,3\n", "layer 4 is missing"}, {"1,0.5\n2,3\n3,1\n", "layer 3 has no routed"}, {"1,0.5\n1,3\n", "twice"},
        {"1,0.5\n2,-3\n", "from 0 up"}, {"1;0.5\n", "LAYER,NUMBER"}, {"1,0.5x\n", "LAYER,NUMBER"}, {"1,\n", "LAYER,NUMBER"},
        {"[0.5, 3]", "2 numbers"}, {"[0.5, 3, \"x\"]", "from 0 up"}, {"{\"a\": 1}", "LAYER"}, {"", "layer 1 is missing"}};
    moec_stats *s = stats_of(2);
    char path[] = "/tmp/moec-sens-XXXXXX";
    (void)state;
    close(mkstemp(path));
    for (size_t i = 0; i < MOEC_COUNT(cases); i++) {
        FILE *f = fopen(path, "w");
        double v[L];
        moec_err err = {MOEC_OK, ""};
        fputs(cases[i].text, f);
        fclose(f);
        const moec_status st = moec_sensitivities_read(v, path, s, &err);
        if (cases[i].says ? st != MOEC_EINVAL || !strstr(err.text, cases[i].says) : st != MOEC_OK)
            fail_msg("%s: %s", cases[i].text, err.text);
        if (!cases[i].says)
            assert_true(v[0] == 0.5 && v[1] == 3.0 && v[2] == 0.7);
    }
    unlink(path);
    moec_stats_free(s);
}

/* sens = KL / S  H  2 mean |y|^2 / mean(|h|)^2, of numbers made so that it is 2 l + 2. */
static void sensitivities_are_measured(void **state)
{
    moec_stats *s = stats_of(2);
    double v[L];
    (void)state;
    assert_int_equal(moec_sensitivities(v, s, NULL), MOEC_EFORMAT);
    assert_int_equal(moec_stats_collect(s, MOEC_STAT_QUANT_KL, NULL), MOEC_OK);
    assert_int_equal(moec_stats_collect(s, MOEC_STAT_QUANT_SQ, NULL), MOEC_OK);
    for (int l = 0; l < L; l++) {
        s->domain[0].tokens = 10;
        ((uint64_t *)moec_stat_at(s, 0, MOEC_STAT_SELECTED, l))[2] = 20;
        ((double *)moec_stat_at(s, 0, MOEC_STAT_NORM_SQ, l))[2] = 20.0 * 4.0;             /* |y|^2 is 4 */
        ((double *)moec_stat_at(s, 0, MOEC_STAT_NORMS_RES, l))[0] = 10.0 * 8.0;           /* |h| is 8 */
        ((double *)moec_stat_at(s, 0, MOEC_STAT_QUANT_SQ, l))[2 * 20 + 3 * 5 + 1] = 16.0; /* expert 2, all three, 2 bits */
        ((double *)moec_stat_at(s, 0, MOEC_STAT_QUANT_SQ, l))[2 * 20 + 3 * 5 + 2] = 99.0;
        *(double *)moec_stat_at(s, 0, MOEC_STAT_QUANT_KL, l) = l == 1 ? 0.0 : 32.0 * (l + 1);
    }
    assert_int_equal(moec_sensitivities(v, s, NULL), MOEC_OK);
    assert_true(fabs(v[0] - 2.0) < 1e-12 && isnan(v[1]) && fabs(v[2] - 6.0) < 1e-12);
    moec_stats_free(s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(splits_are_the_best_of_all), cmocka_unit_test(loads_are_those_of_pairs), cmocka_unit_test(histograms_have_shares),
        cmocka_unit_test(files_say_what_tokens_do),   cmocka_unit_test(what_is_not_known_is_null), cmocka_unit_test(sensitivities_are_read),
        cmocka_unit_test(sensitivities_are_measured),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
