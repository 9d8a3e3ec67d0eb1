/* What block types cost: the line through two probes against numbers worked out by hand, the statistics file, what is refused in it. */
#include "base/mem.h"
#include "calib/stats_internal.h"
#include "tiny.h"

#include <limits.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static const double none = (double)NAN;

static double cost(double probe2, double kl2, double probe4, double kl4, double error)
{
    moec_sensitive s = {.probe = {probe2, probe4}, .kl = {kl2, kl4}};
    s.error[MOEC_BLOCK_Q4_0] = error;
    return moec_sensitivity_cost(&s, MOEC_BLOCK_Q4_0);
}

static void near(double got, double want)
{
    if (!(fabs(got - want) <= 1e-12 * fabs(want)))
        fail_msg("%.17g, expected %.17g", got, want);
}

static void costs_lie_on_a_line(void **state)
{
    (void)state;
    near(cost(0.1, 1e-2, 0.001, 1e-4, 0.01), 1e-3);   /* slope 1 */
    near(cost(0.1, 1e-2, 0.001, 1e-5, 0.01), sqrt(1e-7)); /* slope 3/2: halfway */
    near(cost(0.1, 1e-2, 0.001, 1e-5, 1e-5), 1e-8);   /* and beyond */
    near(cost(0.1, 1e-2, 0.001, 1e-5, 0.1), 1e-2);
    /* Slopes that are cut, through (0.01, 1e-3) in between: from 3 to 2, from 1/4 to 1/2 */
    near(cost(0.1, 1.0, 0.001, 1e-6, 0.1), 1e-1);
    near(cost(0.1, 1.0, 0.001, 1e-6, 1e-4), 1e-7);
    near(cost(0.1, 1e-3 * sqrt(sqrt(10.0)), 0.001, 1e-3 / sqrt(sqrt(10.0)), 1e-4), 1e-4);
    /* no slope: 1 */
    near(cost(0.1, 1e-3, 0.001, 1e-3, 1e-3), 1e-4);
    near(cost(0.1, 1e-4, 0.001, 1e-2, 1e-3), 1e-4);
    near(cost(0.1, 1e-2, none, none, 0.01), 1e-3);
    near(cost(0.1, none, 0.001, 1e-4, 0.01), 1e-3);
    near(cost(0.1, 1e-2, 0.001, 0.0, 0.01), 1e-3); /* too small to be seen */
}

static void costs_that_are_none(void **state)
{
    (void)state;
    assert_true(isnan(cost(0.1, none, 0.01, none, 0.01)));
    assert_true(isnan(cost(0.1, none, 0.01, none, 0.0)));
    assert_true(isnan(cost(0.1, 1e-2, 0.01, 1e-3, none)));
    assert_true(cost(0.1, 1e-2, 0.01, 1e-3, 0.0) == 0.0);
    assert_true(cost(0.1, 0.0, 0.01, 0.0, 0.01) == 0.0);
    assert_true(cost(0.0, 0.0, 0.0, 0.0, 0.0) == 0.0);
}

/* --- the statistics file ----------------------------------------------------------------------------------------------- */

static moec_stats *make_stats(void)
{
    static char rule[] = "{}", options[] = "{}";
    static int64_t layer[] = {0};
    const moec_stats_meta meta = {.model = "m", .model_type = "t", .router_rule = rule, .options = options, .compute = "f32", .layers = 1,
                                  .moe_layers = 1, .experts = 2, .top_k = 1, .hidden = 2, .expert_width = 2, .moe_layer = layer};
    const char *names[] = {"a"};
    moec_stats *s = NULL;
    assert_int_equal(moec_stats_new(&s, &meta, 1, names, NULL), MOEC_OK);
    assert_int_equal(moec_sensitivity_new(&s->sensitivity, 2, NULL), MOEC_OK);
    moec_sensitive *at = s->sensitivity->at;
    s->sensitivity->tokens = 7;
    assert_int_equal(moec_copy(&at[0].name, "blk.0.x.weight", 14, NULL), MOEC_OK);
    assert_int_equal(moec_copy(&at[1].name, "y", 1, NULL), MOEC_OK);
    at[0].cols = 3;
    at[1].cols = 5;
    assert_int_equal(MOEC_NEW(at[0].square, 3, NULL), MOEC_OK);
    for (int i = 0; i < 3; i++)
        at[0].square[i] = i * 0.5;
    at[0].error[MOEC_BLOCK_Q8_0] = 1e-5;
    at[1].probe[1] = 0.25;
    at[1].kl[0] = 0.125;
    return s;
}

static void same(const moec_sensitivity *a, const moec_sensitivity *b)
{
    assert_int_equal(a->n, b->n);
    assert_int_equal(a->tokens, b->tokens);
    for (size_t i = 0; i < a->n; i++) {
        const moec_sensitive *x = &a->at[i], *y = &b->at[i];
        assert_string_equal(x->name, y->name);
        assert_int_equal(x->cols, y->cols);
        assert_true(!x->square == !y->square);
        if (x->square)
            assert_memory_equal(x->square, y->square, (size_t)x->cols * sizeof *x->square);
        assert_memory_equal(x->error, y->error, sizeof x->error);
        assert_memory_equal(x->probe, y->probe, sizeof x->probe);
        assert_memory_equal(x->kl, y->kl, sizeof x->kl);
    }
    assert_ptr_equal(moec_sensitivity_find(a, "y"), &a->at[1]);
    assert_null(moec_sensitivity_find(a, "z"));
}

static void files_keep_it(void **state)
{
    (void)state;
    char *dir = tiny_folder(), *path = tiny_path(dir, "s.h5"), *dropped = NULL;
    moec_stats *s = make_stats(), *back;
    moec_err err = {MOEC_OK, ""};
    moec_json *about;
    int64_t v = 0;
    if (moec_stats_save(s, path, &err) != MOEC_OK || moec_stats_load(&back, path, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    same(s->sensitivity, back->sensitivity);
    assert_int_equal(moec_stats_describe(&about, back, 1, NULL), MOEC_OK);
    assert_true(moec_json_int(moec_json_get(moec_json_get(about, "gguf"), "measured"), &v) && v == 1);
    moec_json_free(about);
    assert_int_equal(moec_stats_merge(back, s, &dropped, NULL), MOEC_OK);
    assert_string_equal(dropped, "gguf");
    assert_null(back->sensitivity);
    moec_free(dropped);
    moec_stats_free(back);
    moec_sensitivity_free(s->sensitivity); /* none of it: as files were before */
    s->sensitivity = NULL;
    assert_int_equal(moec_stats_save(s, path, NULL), MOEC_OK);
    assert_int_equal(moec_stats_load(&back, path, NULL), MOEC_OK);
    assert_null(back->sensitivity);
    moec_stats_free(back);
    moec_stats_free(s);
    tiny_remove(dir);
    moec_free(path);
    moec_free(dir);
}

static void no_file_of(moec_stats *s, const char *why)
{
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_stats_save(s, "/nowhere/s.h5", &err), MOEC_ENUMERIC);
    if (!strstr(err.text, why))
        fail_msg("\"%s\" does not say \"%s\"", err.text, why);
    moec_stats_free(s);
}

static void wrong_numbers_are_refused(void **state)
{
    (void)state;
    moec_stats *s = make_stats();
    s->sensitivity->at[1].kl[1] = -1e-9;
    no_file_of(s, "gguf: y: ");
    s = make_stats();
    s->sensitivity->at[0].error[0] = HUGE_VAL;
    no_file_of(s, "blk.0.x.weight");
    s = make_stats();
    s->sensitivity->at[0].square[2] = none;
    no_file_of(s, "blk.0.x.weight");
    s = make_stats();
    s->sensitivity->at[1].cols = 0;
    no_file_of(s, "tensor 1 has no usable name");
    s = make_stats();
    s->sensitivity->at[0].name[3] = '\n';
    no_file_of(s, "tensor 0 has no usable name");
}

/* Every allocation of writing and reading fails once: no crash, no leak. */
static void memory_may_run_out(void **state)
{
    (void)state;
    char *dir = tiny_folder(), *path = tiny_path(dir, "s.h5");
    moec_stats *s = make_stats(), *back = NULL;
    moec_status st = MOEC_ENOMEM;
    for (long k = 0; st != MOEC_OK; k += 1 + k / 8) {
        moec_test_allocs_left = k;
        st = moec_stats_save(s, path, NULL);
        if (st == MOEC_OK)
            st = moec_stats_load(&back, path, NULL);
        moec_test_allocs_left = LONG_MAX;
        assert_true(st == MOEC_OK || st == MOEC_ENOMEM);
        assert_true(k < 100000);
    }
    same(s->sensitivity, back->sensitivity);
    moec_stats_free(s);
    moec_stats_free(back);
    tiny_remove(dir);
    moec_free(path);
    moec_free(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(costs_lie_on_a_line), cmocka_unit_test(costs_that_are_none),
                                       cmocka_unit_test(files_keep_it), cmocka_unit_test(wrong_numbers_are_refused),
                                       cmocka_unit_test(memory_may_run_out)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
