/* Prune methods as functions from statistics to plans: the formulas on numbers small enough to do by hand, the laws (nesting,
 * permutation, mixing of domains, ties), protection, and refusals. */
#include "base/file.h"
#include "base/mem.h"
#include "method/method.h"
#include "support/tiny.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

enum { E = 8, L = 3 };

static char *folder, *base_folder;
static moec_model *model, *base;
static moec_digest print;
static int64_t moe_layer[L] = {0, 2, 3};
static char empty[] = "{}", *rule;

static int set_up(void **state)
{
    (void)state;
    moec_err err = {MOEC_OK, ""};
    const tiny_spec spec = {.layers = 4, .dense_layer = 2, .seed = 2}, other = {.layers = 4, .dense_layer = 2, .seed = 3};
    folder = tiny_folder();
    base_folder = tiny_folder();
    if (tiny_write(base_folder, &other, &err) != MOEC_OK || moec_model_open(&base, base_folder, &err) != MOEC_OK)
        return 1;
    return tiny_write(folder, &spec, &err) == MOEC_OK && moec_model_open(&model, folder, &err) == MOEC_OK &&
                   moec_ckpt_fingerprint(&print, model->ckpt, &err) == MOEC_OK &&
                   moec_router_rule(&rule, model, &err) == MOEC_OK
               ? 0 : 1;
}

static int tear_down(void **state)
{
    (void)state;
    moec_model_close(model);
    moec_model_close(base);
    tiny_remove(folder);
    tiny_remove(base_folder);
    moec_free(folder);
    moec_free(base_folder);
    moec_free(rule);
    return 0;
}

static uint64_t noise(uint64_t *x)
{
    *x ^= *x << 13;
    *x ^= *x >> 7;
    return *x ^= *x << 17;
}

/* Statistics of the model in which expert place[e] has what expert e has under the identity. */
static moec_stats *make(int domains, const int *place, uint64_t seed)
{
    static const char *const names[] = {"code", "prose", "maths"};
    moec_stats *s;
    moec_stats_meta meta = {.model_type = "qwen3_moe", .router_rule = rule, .options = empty, .compute = "f32",
                            .layers = 4, .moe_layers = L, .experts = E, .top_k = 2, .hidden = 16, .expert_width = 12,
                            .moe_layer = moe_layer};
    memcpy(meta.model, print.hex, sizeof meta.model);
    assert_int_equal(moec_stats_new(&s, &meta, domains, names, NULL), MOEC_OK);
    static const moec_stat sums[] = {MOEC_STAT_GATE_SUM, MOEC_STAT_NORM_SUM, MOEC_STAT_GNORM_SUM, MOEC_STAT_UGNORM_SUM,
                                     MOEC_STAT_NORM_SQ, MOEC_STAT_GNORM_SQ, MOEC_STAT_PROB_SUM, MOEC_STAT_PROB_SEQ_SUM,
                                     MOEC_STAT_MARKER_TOP1, MOEC_STAT_MARKER_TOPK, MOEC_STAT_GATE_TOP1_SUM};
    for (int d = 0; d < domains; d++) {
        s->domain[d].weight = 1.0;
        s->domain[d].tokens = 100;
        for (int64_t l = 0; l < L; l++)
            for (int e = 0; e < E; e++) {
                int to = place ? place[e] : e;
                ((uint64_t *)moec_stat_at(s, d, MOEC_STAT_SELECTED, l))[to] = 1 + noise(&seed) % 50;
                ((uint64_t *)moec_stat_at(s, d, MOEC_STAT_RANK, l))[2 * to] = 1000 + noise(&seed) % 50;
                for (size_t k = 0; k < MOEC_COUNT(sums); k++)
                    ((double *)moec_stat_at(s, d, sums[k], l))[to] = (double)(noise(&seed) % 10000) / 16.0;
                ((float *)moec_stat_at(s, d, MOEC_STAT_OUT_ABSMAX, l))[to] = (float)(noise(&seed) % 64) / 64.0f;
            }
    }
    return s;
}

static uint64_t *counts(const moec_stats *s, int d, int64_t l)
{
    return moec_stat_at(s, d, MOEC_STAT_SELECTED, l);
}

static double *sums(const moec_stats *s, int d, moec_stat kind, int64_t l)
{
    return moec_stat_at(s, d, kind, l);
}

static moec_request request(const moec_stats *s, int64_t keep)
{
    return (moec_request){.model = model, .fingerprint = print.hex, .stats = s, .stats_digest = "abc", .keep = keep,
                          .base = base, .lambda1 = 1.0};
}

static moec_plan *plan(const char *method, const moec_request *q)
{
    moec_plan *p;
    moec_err err = {MOEC_OK, ""};
    if (moec_method_plan(&p, MOEC_PRUNE, method, q, &err) != MOEC_OK)
        fail_msg("%s: %s", method, err.text);
    assert_int_equal(moec_plan_check(p, model, print.hex, NULL), MOEC_OK);
    return p;
}

static void near_to(double got, double want)
{
    if (!(fabs(got - want) <= 1e-12 * fabs(want)))
        fail_msg("%.17g, expected %.17g", got, want);
}

/* Each method's score of one domain is the formula on the raw numbers. */
static void test_formulas(void **state)
{
    (void)state;
    enum { SUM, MEAN, TOKENS };
    static const struct { const char *name; moec_stat sum; int over; } rows[] = {
        {"gate", MOEC_STAT_GATE_SUM, SUM}, {"ean-sum", MOEC_STAT_NORM_SUM, SUM},
        {"ean-mean", MOEC_STAT_NORM_SUM, MEAN}, {"reap", MOEC_STAT_GNORM_SUM, MEAN},
        {"weighted-ean", MOEC_STAT_GNORM_SUM, SUM}, {"easy-ep", MOEC_STAT_UGNORM_SUM, SUM},
        {"msan", MOEC_STAT_NORM_SQ, MEAN}, {"energy", MOEC_STAT_GNORM_SQ, SUM},
        {"unified", MOEC_STAT_PROB_SUM, SUM}, {"seuf", MOEC_STAT_PROB_SEQ_SUM, SUM},
        {"tcess", MOEC_STAT_MARKER_TOP1, TOKENS}, {"tcess-k", MOEC_STAT_MARKER_TOPK, TOKENS},
        {"tcess-prob", MOEC_STAT_GATE_TOP1_SUM, TOKENS}};
    moec_stats *s = make(1, NULL, 11);
    moec_request q = request(s, 5);
    for (size_t i = 0; i < MOEC_COUNT(rows); i++) {
        moec_plan *p = plan(rows[i].name, &q);
        for (int64_t l = 0; l < L; l++)
            for (int e = 0; e < E; e++)
                near_to(p->layer[l].score[e],
                        sums(s, 0, rows[i].sum, l)[e] / (rows[i].over == MEAN     ? (double)counts(s, 0, l)[e]
                                                         : rows[i].over == TOKENS ? 100.0 : 1.0));
        assert_string_equal(p->method, rows[i].name);
        assert_string_equal(p->stats, "abc");
        moec_plan_free(p);
    }
    moec_plan *p = plan("frequency", &q);
    for (int e = 0; e < E; e++)
        near_to(p->layer[1].score[e], (double)counts(s, 0, 1)[e]);
    moec_plan_free(p);
    moec_stats_free(s);
}

/* Sums are mixed as shares of their domain and layer, means from pooled sums and counts. */
static void test_domains(void **state)
{
    (void)state;
    moec_stats *s = make(2, NULL, 12);
    s->domain[0].weight = 3.0;
    s->domain[1].weight = 0.5;
    moec_request q = request(s, 4);
    moec_plan *easy = plan("easy-ep", &q), *reap = plan("reap", &q);
    for (int64_t l = 0; l < L; l++) {
        double total[2] = {0.0, 0.0};
        for (int d = 0; d < 2; d++)
            for (int e = 0; e < E; e++)
                total[d] += sums(s, d, MOEC_STAT_UGNORM_SUM, l)[e];
        for (int e = 0; e < E; e++) {
            near_to(easy->layer[l].score[e], 3.0 * sums(s, 0, MOEC_STAT_UGNORM_SUM, l)[e] / total[0] +
                                                 0.5 * sums(s, 1, MOEC_STAT_UGNORM_SUM, l)[e] / total[1]);
            double g = 3.0 * sums(s, 0, MOEC_STAT_GNORM_SUM, l)[e] + 0.5 * sums(s, 1, MOEC_STAT_GNORM_SUM, l)[e];
            near_to(reap->layer[l].score[e],
                    g / (3.0 * (double)counts(s, 0, l)[e] + 0.5 * (double)counts(s, 1, l)[e]));
        }
    }
    moec_plan_free(easy);
    moec_plan_free(reap);
    memset(sums(s, 1, MOEC_STAT_UGNORM_SUM, 0), 0, E * sizeof(double)); /* a domain that says nothing adds nothing */
    easy = plan("easy-ep", &q);
    for (int e = 0; e < E; e++)
        assert_true(isfinite(easy->layer[0].score[e]));
    moec_plan_free(easy);
    moec_stats_free(s);
}

static void test_unseen_and_ties(void **state)
{
    (void)state;
    moec_stats *s = make(2, NULL, 13);
    for (int d = 0; d < 2; d++) {
        counts(s, d, 0)[5] = 0;
        sums(s, d, MOEC_STAT_GNORM_SUM, 0)[5] = 0.0;
    }
    counts(s, 0, 0)[6] = 0; /* seen by the other domain */
    sums(s, 0, MOEC_STAT_GNORM_SUM, 0)[6] = 0.0;
    moec_request q = request(s, 7);
    moec_plan *p = plan("reap", &q);
    assert_int_equal(p->layer[0].n_unseen, 1);
    assert_int_equal(p->layer[0].unseen[0], 5);
    assert_int_equal(p->layer[1].n_unseen, 0);
    assert_int_equal(moec_plan_kept(p, 0, 5), -1);
    moec_plan_free(p);
    for (int d = 0; d < 2; d++)
        for (int e = 0; e < E; e++) {
            counts(s, d, 2)[e] = 4;
            sums(s, d, MOEC_STAT_GNORM_SUM, 2)[e] = 2.0;
        }
    q.keep = 3;
    p = plan("reap", &q);
    for (int32_t e = 0; e < 3; e++)
        assert_int_equal(p->layer[2].keep[e], e); /* ties stay with the lower number */
    moec_plan_free(p);
    moec_stats_free(s);
}

static void test_nesting_and_permutation(void **state)
{
    (void)state;
    static const int place[E] = {3, 0, 7, 5, 1, 6, 2, 4};
    moec_stats *s = make(2, NULL, 14), *t = make(2, place, 14);
    for (size_t i = 0; moec_method_at(i) && moec_method_at(i)->grain == MOEC_GRAIN_EXPERTS; i++) {
        const char *name = moec_method_at(i)->name;
        if (strcmp(name, "lu") == 0) /* looks at tokens: test_choose.c */
            continue;
        for (int64_t keep = 1; keep < E; keep++) {
            moec_request q = request(s, keep), r = request(s, keep + 1), u = request(t, keep);
            moec_plan *small = plan(name, &q), *large = plan(name, &r), *moved = plan(name, &u);
            for (int64_t l = 0; l < L; l++)
                for (int64_t k = 0; k < keep; k++) {
                    assert_true(moec_method_at(i)->by_count || moec_plan_kept(large, l, small->layer[l].keep[k]) >= 0);
                    if (moec_method_at(i)->n_needs > 0 && strcmp(name, "frequency") != 0) /* small counts tie */
                        assert_true(moec_plan_kept(moved, l, place[small->layer[l].keep[k]]) >= 0);
                }
            assert_int_equal(small->new_top_k, keep < 2 ? keep : 2);
            moec_plan_free(small);
            moec_plan_free(large);
            moec_plan_free(moved);
        }
    }
    moec_stats_free(s);
    moec_stats_free(t);
}

static void test_share(void **state)
{
    (void)state;
    moec_request q = request(NULL, 0);
    int64_t keep;
    static const struct { double share; int64_t keep; } rows[] = {{0.0, 8}, {0.125, 7}, {0.249, 7}, {0.25, 6}, {0.5, 4},
                                                                  {0.99, 1}};
    for (size_t i = 0; i < MOEC_COUNT(rows); i++) {
        q.share = rows[i].share;
        assert_int_equal(moec_kept_experts(&keep, &q, NULL), MOEC_OK);
        assert_int_equal(keep, rows[i].keep);
    }
    static const double bad[] = {1.0, -0.1, 1.1, 0.124, 1e-9}; /* the last two would remove nobody */
    for (size_t i = 0; i < MOEC_COUNT(bad); i++) {
        q.share = bad[i];
        assert_int_equal(moec_kept_experts(&keep, &q, NULL), MOEC_EINVAL);
    }
    q.share = (double)NAN;
    assert_int_equal(moec_kept_experts(&keep, &q, NULL), MOEC_EINVAL);
    q.keep = 9;
    assert_int_equal(moec_kept_experts(&keep, &q, NULL), MOEC_EINVAL);
}

/* The same on every machine, so the numbers stand here. */
static void test_random(void **state)
{
    (void)state;
    moec_request q = request(NULL, 4);
    moec_plan *a = plan("random", &q), *b = plan("random", &q);
    q.seed = 1;
    moec_plan *c = plan("random", &q);
    assert_memory_equal(a->layer[0].score, b->layer[0].score, E * sizeof(double));
    assert_memory_not_equal(a->layer[0].score, c->layer[0].score, E * sizeof(double));
    assert_memory_not_equal(a->layer[0].score, a->layer[1].score, E * sizeof(double));
    for (int e = 0; e < E; e++)
        assert_true(a->layer[0].score[e] >= 0.0 && a->layer[0].score[e] < 1.0);
    assert_int_equal(a->layer[0].n_unseen, 0);
    moec_plan_free(a);
    moec_plan_free(b);
    moec_plan_free(c);
}

static void refuse(const char *method, const moec_request *q, moec_status code, const char *says)
{
    moec_plan *p;
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_method_plan(&p, MOEC_PRUNE, method, q, &err), code);
    assert_null(p);
    if (!strstr(err.text, says))
        fail_msg("\"%s\" does not say \"%s\"", err.text, says);
}

static void test_refusals(void **state)
{
    (void)state;
    moec_stats *s = make(1, NULL, 15);
    moec_request q = request(s, 4), none = request(NULL, 4), nothing = request(NULL, 0);
    nothing.share = 1.0;
    refuse("reap", &none, MOEC_EINVAL, "needs statistics");
    refuse("reep", &q, MOEC_EINVAL, "reap");
    refuse("random", &nothing, MOEC_EINVAL, "no expert would be left");
    sums(s, 0, MOEC_STAT_GNORM_SUM, 1)[3] = (double)INFINITY;
    refuse("reap", &q, MOEC_ENUMERIC, "layer 2, expert 3"); /* second layer with experts is layer 2 */
    moec_free(s->domain[0].data[MOEC_STAT_GNORM_SUM]);
    s->domain[0].data[MOEC_STAT_GNORM_SUM] = NULL;
    refuse("reap", &q, MOEC_EFORMAT, moec_stat_kinds[MOEC_STAT_GNORM_SUM].name);
    s->meta.model[0] = s->meta.model[0] == 'x' ? 'y' : 'x';
    refuse("gate", &q, MOEC_EFORMAT, "model");
    moec_stats_free(s);
}

static void test_protect(void **state)
{
    (void)state;
    static const struct { const char *text; int64_t count; const char *says; } rows[] = {
        {"", 0, NULL},
        {"# nothing\n\n", 0, NULL},
        {"0 1\n2 7 # two\r\n  3\t0  \n0 1\n", 3, NULL},
        {"{\"0\": [1, 2], \"3\": [7]}", 3, NULL},
        {" \n{}", 0, NULL},
        {"0", -1, "line 1"},
        {"0 1\n0 1 2\n", -1, "line 2"},
        {"0 -1", -1, "line 1"},
        {"x 1", -1, "line 1"},
        {"1 0", -1, "layer 1 is no layer with experts"},
        {"0 8", -1, "0 to 7"},
        {"9 0", -1, "layer 9"},
        {"0 99999999999999999999", -1, "line 1"},
        {"{\"1\": [0]}", -1, "layer 1"},
        {"{\"0\": 3}", -1, "expected"},
        {"{\"0\": [0.5]}", -1, "whole number"},
        {"{\"a\": [0]}", -1, "key a"},
        {"{", -1, "JSON"},
    };
    for (size_t i = 0; i < MOEC_COUNT(rows); i++) {
        moec_guard g;
        moec_err err = {MOEC_OK, ""};
        moec_status st = moec_guard_parse(&g, rows[i].text, strlen(rows[i].text), model, "file", &err);
        assert_int_equal(st, rows[i].count < 0 ? MOEC_EFORMAT : MOEC_OK);
        if (rows[i].says && !strstr(err.text, rows[i].says))
            fail_msg("case %zu: \"%s\" does not say \"%s\"", i, err.text, rows[i].says);
        if (st == MOEC_OK)
            assert_int_equal(g.count, rows[i].count);
        moec_guard_release(&g);
    }
}

static void test_protected_are_kept(void **state)
{
    (void)state;
    moec_stats *s = make(1, NULL, 16);
    moec_guard g;
    assert_int_equal(moec_guard_parse(&g, "0 6\n0 2\n3 7", 11, model, "file", NULL), MOEC_OK);
    for (size_t i = 0; moec_method_at(i) && moec_method_at(i)->grain == MOEC_GRAIN_EXPERTS; i++) {
        moec_request q = request(s, 2);
        q.guard = &g;
        q.guard_name = "file";
        moec_plan *p = plan(moec_method_at(i)->name, &q);
        assert_int_equal(p->layer[0].keep[0], 2);
        assert_int_equal(p->layer[0].keep[1], 6);
        assert_int_equal(p->layer[0].n_guarded, 2);
        assert_int_equal(p->layer[1].n_guarded, 0);
        assert_true(moec_plan_kept(p, 2, 7) >= 0);
        moec_plan_free(p);
        q.keep = 1;
        refuse(moec_method_at(i)->name, &q, MOEC_EINVAL, "layer 0: 2 experts are protected");
    }
    moec_guard_release(&g);
    moec_stats_free(s);
}

/* 4 layers: the pool is layers 0 to 2, that is the first two with experts: 16 values. numpy's 99.5th percentile of 16
 * values lies 0.925 of the way between the two largest, so only the largest can be above it. */
static void test_super(void **state)
{
    (void)state;
    moec_stats *s = make(2, NULL, 17);
    moec_guard g;
    moec_err err = {MOEC_OK, ""};
    ((float *)moec_stat_at(s, 1, MOEC_STAT_OUT_ABSMAX, 1))[5] = 900.0f;
    ((float *)moec_stat_at(s, 0, MOEC_STAT_OUT_ABSMAX, 2))[1] = 5000.0f; /* large and late: harmless */
    assert_int_equal(moec_guard_super(&g, model, s, &err), MOEC_OK);
    assert_int_equal(g.count, 1);
    assert_true(g.flag[1 * E + 5]);
    moec_guard_release(&g);
    for (int d = 0; d < 2; d++)
        for (int64_t l = 0; l < L; l++)
            for (int e = 0; e < E; e++)
                ((float *)moec_stat_at(s, d, MOEC_STAT_OUT_ABSMAX, l))[e] = 3.0f;
    assert_int_equal(moec_guard_super(&g, model, s, &err), MOEC_OK);
    assert_int_equal(g.count, 0); /* none stands out */
    moec_guard_release(&g);
    moec_free(s->domain[1].data[MOEC_STAT_OUT_ABSMAX]);
    s->domain[1].data[MOEC_STAT_OUT_ABSMAX] = NULL;
    assert_int_equal(moec_guard_super(&g, model, s, &err), MOEC_EFORMAT);
    assert_non_null(strstr(err.text, moec_stat_kinds[MOEC_STAT_OUT_ABSMAX].name));
    assert_non_null(strstr(err.text, "prose"));
    assert_int_equal(moec_guard_super(&g, model, NULL, &err), MOEC_EINVAL);
    moec_stats_free(s);
}

/* Every row of the table can be listed and found, and says what a reader wants to know. */
static void check_rows(moec_method_kind kind)
{
    moec_json *list = moec_method_list(kind);
    const moec_method *m;
    size_t at = 0;
    for (size_t i = 0; (m = moec_method_at(i)) != NULL; i++) {
        if (m->kind != kind)
            continue;
        const moec_json *row = moec_json_at(list, at++);
        assert_ptr_equal(moec_method_of_grain(m->kind, m->grain, m->name), m);
        assert_string_equal(moec_json_string(moec_json_get(row, "grain")), moec_grain_name(m->grain));
        assert_string_equal(moec_json_string(moec_json_get(row, "name")), m->name);
        assert_true(m->brief && m->paper && m->formula && m->plan);
        assert_int_equal(moec_json_len(moec_json_get(row, "needs")), m->n_needs);
    }
    assert_int_equal(at, moec_json_len(list));
    assert_true(at > 0);
    moec_json_free(list);
}

static void test_table(void **state)
{
    (void)state;
    check_rows(MOEC_PRUNE);
    check_rows(MOEC_MERGE);
    assert_null(moec_method_find(MOEC_MERGE, "reap"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_formulas),   cmocka_unit_test(test_domains),
        cmocka_unit_test(test_unseen_and_ties), cmocka_unit_test(test_nesting_and_permutation),
        cmocka_unit_test(test_share),      cmocka_unit_test(test_random),
        cmocka_unit_test(test_refusals),   cmocka_unit_test(test_protect),
        cmocka_unit_test(test_protected_are_kept), cmocka_unit_test(test_super),
        cmocka_unit_test(test_table),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
