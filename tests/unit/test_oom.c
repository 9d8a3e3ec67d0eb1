/* Public operations with the k-th allocation and all later ones failing, for rising k: each run ends in MOEC_ENOMEM with a
 * text or, once there were enough, in MOEC_OK; what leaks on the way a sanitizer build reports. */
#include "base/file.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/par.h"
#include "calib/calibrate.h"
#include "calib/eval.h"
#include "method/method.h"
#include "method/patterns.h"
#include "method/served.h"
#include "run/gguf_model.h"
#include "run/gguf_tokenizer.h"
#include "run/imatrix.h"
#include "tiny.h"

#include <limits.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#define DEMO MOEC_SOURCE_DIR "/recipes/demo-model"

typedef struct setting {
    char *dir, *stats;
    moec_model *model;
    moec_corpus corpus; /* 300 tokens */
} setting;

typedef moec_status operation(setting *s, moec_err *err);

/* Every k up to `dense`, then about `dense` more spread over all allocations there are: a run near the end costs as much as a
 * whole one. */
static void fails_cleanly(setting *s, operation *run, long dense)
{
    static const long plenty = LONG_MAX / 2;
    moec_err err = {MOEC_OK, ""};
    moec_test_allocs_left = plenty;
    moec_status st = run(s, &err);
    long all = plenty - moec_test_allocs_left, done = 0;
    moec_test_allocs_left = LONG_MAX;
    if (st != MOEC_OK)
        print_error("%s\n", err.text);
    assert_int_equal(st, MOEC_OK);
    assert_true(all > 0);
    for (long k = 0; k <= all; done++) {
        err = (moec_err){MOEC_OK, ""};
        moec_test_allocs_left = k < all ? k : LONG_MAX; /* continuing takes other allocations than beginning */
        st = run(s, &err);
        moec_test_allocs_left = LONG_MAX;
        if ((st != MOEC_ENOMEM && st != MOEC_OK) || (st != MOEC_OK && (err.code != st || !*err.text)) || (k == all && st != MOEC_OK))
            fail_msg("allocation %ld of %ld fails: status %d, \"%s\"", k + 1, all, (int)st, err.text);
        long step = k < dense ? 1 : 1 + all / dense;
        k = k < all && k + step > all ? all : k + step;
    }
    print_message("%ld allocations, %ld runs\n", all, done);
}

static moec_status open_model(setting *s, moec_err *err)
{
    moec_model *m;
    moec_sizes sizes;
    (void)s;
    moec_status st = moec_model_open(&m, DEMO, err);
    if (st == MOEC_OK)
        st = moec_model_sizes(&sizes, m, err);
    moec_model_close(m);
    return st;
}

static moec_status read_corpus(setting *s, moec_err *err)
{
    moec_status st = MOEC_OK;
    const char *arg[] = {"a=" DEMO "/samples.txt:2", "b=" DEMO "/samples.txt"};
    const moec_corpus_opts o = {.vocab = 4096, .seq_len = 64, .max_tokens = 300, .seed = -1, .bos = -1};
    moec_tokenizer *tok = NULL;
    moec_corpus_release(&s->corpus);
    MOEC_TRY(moec_tokenizer_load(&tok, DEMO "/tokenizer.json", err));
    MOEC_TRY(moec_corpus_read(&s->corpus, arg, 2, tok, &o, err));
done:
    moec_tokenizer_free(tok);
    return st;
}

static moec_status calibrate(setting *s, moec_err *err)
{
    /* Checkpoints after each layer and none continued, so that every run goes the whole way. */
    const moec_calibrate_opts o = {.options = "{}", .checkpoint_every = 0};
    return moec_calibrate(NULL, s->model, &s->corpus, s->stats, &o, err);
}

static moec_status continue_calibration(setting *s, moec_err *err)
{
    const moec_calibrate_opts o = {.options = "{}", .checkpoint_every = 0, .resume = true};
    return moec_calibrate(NULL, s->model, &s->corpus, s->stats, &o, err);
}

static moec_status evaluate(setting *s, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_final *f = NULL;
    moec_scores scores = {0};
    MOEC_TRY(moec_final_run(&f, s->model, &s->corpus, MOEC_COMPUTE_F32, 0, "test", err));
    MOEC_TRY(moec_score(&scores, f, f, &s->corpus, MOEC_COMPUTE_F32, 0, err));
done:
    moec_scores_release(&scores);
    moec_final_free(f);
    return st;
}

static moec_status write_gguf(setting *s, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_model *m = NULL;
    moec_gguf_model *x = NULL;
    moec_gguf_out *g = NULL;
    moec_gguf *back = NULL;
    char path[4096];
    snprintf(path, sizeof path, "%s/model.gguf", s->dir);
    MOEC_TRY(moec_model_open(&m, DEMO, err));
    MOEC_TRY(moec_gguf_model_new(&x, m, MOEC_GGML_BF16, err));
    MOEC_TRY(moec_gguf_out_new(&g, err));
    moec_gguf_model_describe(g, x, "demo");
    MOEC_TRY(moec_gguf_tokenizer(g, m, err));
    MOEC_TRY(moec_gguf_out_close(g, 0, err));
    MOEC_TRY(moec_gguf_write(path, g, moec_gguf_model_rows, x, err));
    MOEC_TRY(moec_gguf_open(&back, path, err));
done:
    moec_gguf_close(back);
    moec_gguf_out_free(g);
    moec_gguf_model_free(x);
    moec_model_close(m);
    return st;
}

static moec_status export_imatrix(setting *s, moec_err *err)
{
    moec_stats *stats = NULL;
    moec_status st = MOEC_OK;
    char path[4096];
    snprintf(path, sizeof path, "%s/imatrix", s->dir);
    MOEC_TRY(moec_stats_load(&stats, s->stats, err));
    MOEC_TRY(moec_imatrix_write(path, stats, MOEC_IMATRIX_GGUF, err));
    MOEC_TRY(moec_imatrix_write(path, stats, MOEC_IMATRIX_DAT, err));
done:
    moec_stats_free(stats);
    return st;
}

static void opening_a_model(void **state)
{
    fails_cleanly(*state, open_model, 60);
}

static void writing_a_gguf(void **state)
{
    fails_cleanly(*state, write_gguf, 60);
}

static void exporting_an_imatrix(void **state)
{
    setting *s = *state;
    const moec_calibrate_opts o = {.options = "{}", .tier = 1};
    assert_int_equal(moec_calibrate(NULL, s->model, &s->corpus, s->stats, &o, NULL), MOEC_OK);
    fails_cleanly(*state, export_imatrix, 60);
}

static void reading_text(void **state)
{
    fails_cleanly(*state, read_corpus, 30);
}

static void evaluating(void **state)
{
    fails_cleanly(*state, evaluate, 30);
}

static void calibrating(void **state)
{
    setting *s = *state;
    moec_err err = {MOEC_OK, ""};
    char *want, *got;
    size_t n_want, n_got;
    fails_cleanly(s, calibrate, 20);
    assert_int_equal(moec_file_read(&want, &n_want, s->stats, (size_t)1 << 30, &err), MOEC_OK);
    fails_cleanly(s, continue_calibration, 20);
    assert_int_equal(moec_file_read(&got, &n_got, s->stats, (size_t)1 << 30, &err), MOEC_OK);
    assert_int_equal(n_got, n_want);
    assert_memory_equal(got, want, n_got);
    moec_free(want);
    moec_free(got);
}

static moec_status parse_plan(setting *s, moec_err *err)
{
    static const char text[] = "{\"moecompress_plan\": 1, \"kind\": \"prune\", \"model\": \"\", \"top_k\": 2, \"new_top_k\": 2, "
                               "\"layers\": [{\"layer\": 0, \"experts\": 4, \"keep\": [0, 2, 3]}, "
                               "{\"layer\": 2, \"experts\": 4, \"keep\": [1, 2, 3]}]}";
    char *again = NULL;
    moec_plan *plan = NULL;
    moec_status st = MOEC_OK;
    (void)s;
    MOEC_TRY(moec_plan_parse(&plan, text, strlen(text), "plan", err));
    MOEC_TRY(moec_plan_to_text(&again, plan, err));
done:
    moec_plan_free(plan);
    moec_free(again);
    return st;
}

static void parsing_a_plan(void **state)
{
    fails_cleanly(*state, parse_plan, 200);
}

/* A store built, written, read, asked and planned from, and what the plan's removed experts served. */
static moec_status use_patterns(setting *s, moec_err *err)
{
    static char rule[] = "{}";
    static int64_t at[] = {0, 1, 2, 3};
    static const char *const names[] = {"a", "b"};
    moec_stats_meta meta = {.model = "m", .model_type = "t", .router_rule = rule, .options = rule, .compute = "f32", .layers = 4,
                            .moe_layers = 4, .experts = s->model->dims.experts, .top_k = s->model->dims.top_k, .hidden = 8,
                            .expert_width = 8, .moe_layer = at};
    const moec_request q = {.model = s->model, .fingerprint = "m", .keep = 8};
    moec_stats *stats = NULL;
    moec_patterns *p = NULL, *back = NULL;
    moec_plan *plan = NULL;
    moec_served served = {0};
    char *text = NULL;
    int *order = NULL;
    double *distance = NULL;
    moec_status st = MOEC_OK;
    MOEC_TRY(moec_stats_new(&stats, &meta, 2, names, err));
    stats->domain[0].tokens = stats->domain[1].tokens = 3;
    MOEC_TRY(moec_stats_set_weights(stats, "a=2,b=0.5", err));
    MOEC_TRY(moec_patterns_new(&p, &stats->meta, err));
    MOEC_TRY(moec_patterns_add(p, stats, 0, "one", "", false, err));
    MOEC_TRY(moec_patterns_add(p, stats, -1, "all", "", false, err));
    MOEC_TRY(moec_patterns_to_text(&text, p, err));
    MOEC_TRY(moec_patterns_parse(&back, text, strlen(text), "store", err));
    MOEC_TRY(moec_patterns_query(&order, &distance, back, stats, -1, err));
    MOEC_TRY(moec_patterns_plan(&plan, back, order[0], distance[0], &q, err));
    MOEC_TRY(moec_served_by(&served, plan, stats, err));
done:
    moec_served_release(&served);
    moec_free(order);
    moec_free(distance);
    moec_plan_free(plan);
    moec_free(text);
    moec_patterns_free(back);
    moec_patterns_free(p);
    moec_stats_free(stats);
    return st;
}

static void using_patterns(void **state)
{
    fails_cleanly(*state, use_patterns, 200);
}

/* Methods that read weights, cluster, and share out over layers. */
static moec_status make_plans(setting *s, moec_err *err)
{
    static const double share[] = {0.25, 0.5};
    moec_status st = MOEC_OK;
    moec_plan *p[2] = {NULL, NULL};
    moec_request q = {.model = s->model, .share = 0.5, .lambda1 = 1.0, .plan_only = true};
    MOEC_TRY(moec_method_plan(&p[0], MOEC_PRUNE, "stun", &q, err));
    moec_plan_free(p[0]);
    q.allocation = MOEC_ALLOCATE_MASS;
    MOEC_TRY(moec_method_plans(p, MOEC_PRUNE, "router-row", &q, share, 2, err));
    moec_plan_free(p[1]);
    moec_plan_free(p[0]);
    MOEC_TRY(moec_method_plan(&p[0], MOEC_PRUNE, "aimer", &q, err));
    moec_plan_free(p[0]);
done:
    return st;
}

static void planning(void **state)
{
    moec_par_set_threads(1);
    fails_cleanly(*state, make_plans, 60);
    moec_par_set_threads(0);
}

static int set_up(void **state)
{
    static setting s;
    moec_err err = {MOEC_OK, ""};
    s.dir = tiny_folder();
    s.stats = tiny_path(s.dir, "stats.h5");
    *state = &s;
    return moec_model_open(&s.model, DEMO, &err) == MOEC_OK && read_corpus(&s, &err) == MOEC_OK ? 0 : -1;
}

static int tear_down(void **state)
{
    setting *s = *state;
    moec_corpus_release(&s->corpus);
    moec_model_close(s->model);
    tiny_remove(s->dir);
    moec_free(s->stats);
    moec_free(s->dir);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(opening_a_model), cmocka_unit_test(reading_text),   cmocka_unit_test(evaluating),
        cmocka_unit_test(calibrating),     cmocka_unit_test(parsing_a_plan),
        cmocka_unit_test(using_patterns),  cmocka_unit_test(planning),
        cmocka_unit_test(writing_a_gguf),  cmocka_unit_test(exporting_an_imatrix),
    };
    moec_log_set(MOEC_QUIET);
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
