/* What block types cost the matrices of a GGUF: threads, folders, text that is another, allocations that fail, and the importance of
 * experts that few tokens reached. Numbers are compared with transformers' by tests/interop/test_gguf_measure.py. */
#include "base/mem.h"
#include "base/par.h"
#include "calib/calibrate.h"
#include "run/gguf_importance.h"
#include "run/gguf_measure.h"
#include "support/tiny.h"

#include <limits.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { N = 60 };
static int32_t ids[N];
static int64_t start_a[] = {0, 13, 26}, start_b[] = {0, 17, 34};
static char name_a[] = "z", name_b[] = "a"; /* files list domains by name, texts as they are given */
static moec_domain domains[2];
static moec_corpus corpus = {2, domains};
static char *folder, *source, *stats_path, *work;
static moec_model *model;

static int set_up(void **state)
{
    (void)state;
    const tiny_spec spec = {.family = "qwen3_moe", .layers = 2, .hidden = 32, .experts = 8, .width = 8, .untied = true};
    moec_err err = {MOEC_OK, ""};
    folder = tiny_folder();
    source = tiny_path(folder, "source");
    stats_path = tiny_path(folder, "stats.h5");
    work = tiny_path(folder, "work");
    for (uint32_t i = 0, x = 7; i < N; i++) {
        x = x * 1664525u + 1013904223u;
        ids[i] = (int32_t)((x >> 8) % 60u);
    }
    domains[0] = (moec_domain){.name = name_a, .path = name_a, .weight = 1, .ids = ids, .n_ids = 26, .start = start_a, .n_windows = 2};
    domains[1] = (moec_domain){.name = name_b, .path = name_b, .weight = 2, .ids = ids + 26, .n_ids = 34, .start = start_b,
                               .n_windows = 2};
    return tiny_write(source, &spec, &err) == MOEC_OK && moec_model_open(&model, source, &err) == MOEC_OK ? 0 : 1;
}

static int tear_down(void **state)
{
    (void)state;
    moec_model_close(model);
    tiny_remove(folder);
    char *all[] = {folder, source, stats_path, work};
    for (size_t i = 0; i < MOEC_COUNT(all); i++)
        moec_free(all[i]);
    return 0;
}

static moec_stats *calibrated(void)
{
    moec_err err = {MOEC_OK, ""};
    const moec_calibrate_opts o = {.options = "{}", .tier = 1};
    moec_stats *s = NULL;
    if (moec_calibrate(NULL, model, &corpus, stats_path, &o, &err) != MOEC_OK || moec_stats_load(&s, stats_path, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    return s;
}

static moec_gguf_measure_opts opts(int64_t tokens)
{
    return (moec_gguf_measure_opts){.tokens = tokens, .work = work, .resume = true};
}

static void measure(moec_stats *s, int64_t tokens)
{
    moec_err err = {MOEC_OK, ""};
    const moec_gguf_measure_opts o = opts(tokens);
    if (moec_gguf_measure(s, model, &corpus, &o, &err) != MOEC_OK)
        fail_msg("%s", err.text);
}

static void same(const moec_stats *a, const moec_stats *b)
{
    const moec_sensitivity *x = a->sensitivity, *y = b->sensitivity;
    assert_int_equal(x->n, y->n);
    assert_int_equal(x->tokens, y->tokens);
    for (size_t i = 0; i < x->n; i++) {
        assert_string_equal(x->at[i].name, y->at[i].name);
        assert_true(!x->at[i].square == !y->at[i].square);
        if (x->at[i].square)
            assert_memory_equal(x->at[i].square, y->at[i].square, (size_t)x->at[i].cols * sizeof(double));
        assert_memory_equal(x->at[i].error, y->at[i].error, sizeof x->at[i].error);
        assert_memory_equal(x->at[i].probe, y->at[i].probe, sizeof x->at[i].probe);
        assert_memory_equal(x->at[i].kl, y->at[i].kl, sizeof x->at[i].kl);
    }
}

static void results_stay(void **state)
{
    (void)state;
    moec_stats *s[2];
    const int had = moec_par_threads();
    for (int i = 0; i < 2; i++) {
        s[i] = calibrated();
        moec_par_set_threads(i ? 3 : 1);
        measure(s[i], 40);
        moec_par_set_threads(had);
    }
    same(s[0], s[1]);
    const moec_sensitivity *x = s[0]->sensitivity;
    assert_int_equal(x->tokens, 60 - 4); /* every window: one at least of each text, and two thirds of two are two */
    assert_int_equal(x->n, 2 + 2 * 7);
    for (size_t i = 0; i < x->n; i++) {
        assert_true(x->at[i].kl[0] >= 0.0 && x->at[i].kl[1] >= 0.0 && x->at[i].probe[0] > x->at[i].probe[1]);
        assert_true(isnan(x->at[i].error[MOEC_BLOCK_Q4_K]) && x->at[i].error[MOEC_BLOCK_F16] >= 0.0);
    }
    measure(s[1], 0); /* errors alone */
    assert_true(isnan(s[1]->sensitivity->at[0].kl[0]) && s[1]->sensitivity->tokens == 0);
    moec_stats_free(s[0]);
    moec_stats_free(s[1]);
}

static void refused(moec_stats *s, const moec_corpus *c, moec_gguf_measure_opts o, moec_status want, const char *why)
{
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_gguf_measure(s, model, c, &o, &err), want);
    if (!strstr(err.text, why))
        fail_msg("\"%s\" does not say \"%s\"", err.text, why);
    assert_null(s->sensitivity);
}

static void refusals(void **state)
{
    (void)state;
    moec_stats *s = calibrated();
    moec_domain less[2] = {domains[0], domains[1]};
    const moec_corpus c = {2, less};
    moec_gguf_measure_opts o = opts(40);
    less[1].n_windows = 1;
    refused(s, &c, o, MOEC_EINVAL, "is other text");
    o.max_memory = 1 << 20;
    refused(s, &corpus, o, MOEC_ENOFIT, "is too little");
    refused(s, &corpus, opts(-1), MOEC_EINVAL, "negative");
    s->meta.model[0] = s->meta.model[0] == '0' ? '1' : '0';
    refused(s, &corpus, opts(40), MOEC_EFORMAT, "another model");
    moec_stats_free(s);
}

/* Every allocation fails once, or nearly every one: no crash, no leak, statistics as they were; and what was done is taken over. */
static void memory_may_run_out(void **state)
{
    (void)state;
    moec_stats *s = calibrated(), *t = calibrated();
    moec_status st = MOEC_ENOMEM;
    const int had = moec_par_threads();
    const moec_gguf_measure_opts o = opts(20);
    moec_par_set_threads(1);
    for (long k = 0; st != MOEC_OK; k += 1 + k / 8) {
        moec_err err = {MOEC_OK, ""};
        moec_test_allocs_left = k;
        st = moec_gguf_measure(s, model, &corpus, &o, &err);
        moec_test_allocs_left = LONG_MAX;
        if (st != MOEC_OK && st != MOEC_ENOMEM)
            fail_msg("%ld allocations: %s", k, err.text);
        assert_true(st == MOEC_OK || !s->sensitivity);
        assert_true(k < 1000000);
    }
    moec_par_set_threads(had);
    measure(t, 20);
    same(s, t);
    moec_stats_free(s);
    moec_stats_free(t);
}

/* (n m + 32 M) / (n + 32), with m and M by loops over the statistics. */
static void importance_is_shrunk(void **state)
{
    (void)state;
    moec_stats *s = calibrated();
    moec_gguf_model *x;
    moec_gguf_importance *p;
    const int64_t E = 8, H = 32, I = 8;
    for (int d = 0; d < 2; d++) { /* expert 3 of layer 0 is never reached */
        ((uint64_t *)moec_stat_at(s, d, MOEC_STAT_SELECTED, 0))[3] = 0;
        memset((double *)moec_stat_at(s, d, MOEC_STAT_XIN_SQ, 0) + 3 * H, 0, (size_t)H * sizeof(double));
        memset((double *)moec_stat_at(s, d, MOEC_STAT_ACT_SQ, 0) + 3 * I, 0, (size_t)I * sizeof(double));
    }
    assert_int_equal(moec_gguf_model_new(&x, model, MOEC_GGML_F16, NULL), MOEC_OK);
    assert_int_equal(moec_gguf_importance_new(&p, x, s, NULL), MOEC_OK);
    int found = 0;
    for (size_t i = 0; i < moec_gguf_model_count(x); i++) {
        const moec_gguf_tensor *t = moec_gguf_model_at(x, i);
        const bool down = strcmp(t->name, "blk.0.ffn_down_exps.weight") == 0;
        if (strcmp(t->name, "blk.0.attn_q.weight") == 0)
            assert_null(moec_gguf_importance_row(p, i, 0)); /* no sensitivity */
        if (!down && strcmp(t->name, "blk.0.ffn_up_exps.weight") != 0)
            continue;
        found++;
        const moec_stat kind = down ? MOEC_STAT_ACT_SQ : MOEC_STAT_XIN_SQ;
        const int64_t cols = down ? I : H, rows = down ? H : I;
        double sum[32] = {0}, all = 0.0, flat = 0.0;
        for (int d = 0; d < 2; d++)
            for (int64_t e = 0; e < E; e++) {
                all += moec_stats_weight(s, d) * (double)((uint64_t *)moec_stat_at(s, d, MOEC_STAT_SELECTED, 0))[e];
                for (int64_t c = 0; c < cols; c++)
                    sum[c] += moec_stats_weight(s, d) * ((double *)moec_stat_at(s, d, kind, 0))[e * cols + c];
            }
        for (int64_t c = 0; c < cols; c++)
            flat += sum[c] / all / (double)cols;
        for (int64_t e = 0; e < E; e++) {
            const float *row = moec_gguf_importance_row(p, i, e * rows + rows - 1);
            for (int64_t c = 0; c < cols; c++) {
                double n = 0.0, weighted = 0.0, own = 0.0;
                for (int d = 0; d < 2; d++) {
                    const double k = (double)((uint64_t *)moec_stat_at(s, d, MOEC_STAT_SELECTED, 0))[e], w = moec_stats_weight(s, d);
                    n += k;
                    weighted += w * k;
                    own += w * ((double *)moec_stat_at(s, d, kind, 0))[e * cols + c];
                }
                const double layer = down ? flat : sum[c] / all;
                const double want = ((weighted > 0.0 ? n * own / weighted : 0.0) + 32.0 * layer) / (n + 32.0);
                if (fabs((double)row[c] - want) > 1e-6 * want)
                    fail_msg("%s, expert %d: %g, expected %g", t->name, (int)e, (double)row[c], want);
            }
        }
    }
    assert_int_equal(found, 2);
    assert_true(moec_gguf_importance_unseen(p) >= 1);
    moec_gguf_importance_free(p);
    moec_gguf_model_free(x);
    moec_stats_free(s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(results_stay), cmocka_unit_test(refusals), cmocka_unit_test(memory_may_run_out),
                                       cmocka_unit_test(importance_is_shrunk)};
    moec_log_set(MOEC_QUIET);
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
