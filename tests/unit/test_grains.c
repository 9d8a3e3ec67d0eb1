/* Grains other than whole experts: hand-worked scores and choices, the score of a neuron against the error that its removal
 * makes, zeros in rows and patterns, OWL's shares, layers that are dropped, and what is refused. */
#include "base/file.h"
#include "base/mem.h"
#include "base/par.h"
#include "run/apply.h"
#include "run/thin.h"
#include "support/tiny.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

static char *folder, *source, *out, *work;
static moec_model *model;
static moec_digest print;
static char rule[] = "{}", empty[] = "{}";

static int set_up(void **state)
{
    (void)state;
    folder = tiny_folder();
    source = tiny_path(folder, "source");
    out = tiny_path(folder, "out");
    work = tiny_path(folder, "work");
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    moec_model_close(model);
    tiny_remove(folder);
    char *all[] = {folder, source, out, work};
    for (size_t i = 0; i < MOEC_COUNT(all); i++)
        moec_free(all[i]);
    return 0;
}

static void open_new(const tiny_spec *spec)
{
    moec_err err = {MOEC_OK, ""};
    moec_model_close(model);
    model = NULL;
    tiny_remove(source);
    tiny_remove(out);
    if (tiny_write(source, spec, &err) != MOEC_OK || moec_model_open(&model, source, &err) != MOEC_OK ||
        moec_ckpt_fingerprint(&print, model->ckpt, &err) != MOEC_OK)
        fail_msg("%s", err.text);
}

/* Statistics of the open model, every expert selected twice. */
static moec_stats *make(int domains)
{
    static const char *const names[] = {"a", "b"};
    moec_stats *s;
    moec_err err = {MOEC_OK, ""};
    char *text = NULL;
    int64_t layer[16];
    for (int64_t i = 0; i < model->moe_layers; i++)
        layer[i] = model->set[i].layer;
    assert_int_equal(moec_router_rule(&text, model, NULL), MOEC_OK);
    moec_stats_meta meta = {.router_rule = text ? text : rule, .options = empty, .compute = "f32",
                            .layers = model->dims.layers, .moe_layers = model->moe_layers, .experts = model->dims.experts,
                            .top_k = model->dims.top_k, .hidden = model->dims.hidden, .expert_width = model->dims.expert_width,
                            .moe_layer = layer, .tier = 1};
    snprintf(meta.model, sizeof meta.model, "%s", print.hex);
    snprintf(meta.model_type, sizeof meta.model_type, "%s", model->family->model_type);
    if (moec_stats_new(&s, &meta, domains, names, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    moec_free(text);
    for (int d = 0; d < domains; d++) {
        s->domain[d].weight = 1.0;
        *(uint64_t *)moec_stat_at(s, d, MOEC_STAT_BLOCK_TOKENS, 0) = 4;
        for (int64_t l = 0; l < model->moe_layers; l++)
            for (int64_t e = 0; e < model->dims.experts; e++) {
                ((uint64_t *)moec_stat_at(s, d, MOEC_STAT_SELECTED, l))[e] = 2;
                for (int64_t i = 0; i < model->dims.expert_width; i++) {
                    const int64_t at = e * model->dims.expert_width + i;
                    ((double *)moec_stat_at(s, d, MOEC_STAT_ACT_SQ, l))[at] = (double)((7 * i + e) % 11 + 1);
                    ((double *)moec_stat_at(s, d, MOEC_STAT_GACT_SQ, l))[at] = (double)((5 * i + e) % 11 + 1);
                    ((double *)moec_stat_at(s, d, MOEC_STAT_ACT_ABS, l))[at] = (double)((3 * i + e) % 11 + 1);
                }
                for (int64_t i = 0; i < model->dims.hidden; i++)
                    ((double *)moec_stat_at(s, d, MOEC_STAT_XIN_SQ, l))[e * model->dims.hidden + i] = (double)(i % 5 + 1);
            }
    }
    return s;
}

static moec_request request(const moec_stats *s, moec_grain grain)
{
    return (moec_request){.model = model, .fingerprint = print.hex, .stats = s, .stats_digest = "abc", .grain = grain};
}

static moec_plan *plan(const char *method, const moec_request *q)
{
    moec_plan *p;
    moec_err err = {MOEC_OK, ""};
    if (moec_method_plan(&p, MOEC_PRUNE, method, q, &err) != MOEC_OK)
        fail_msg("%s: %s", method, err.text);
    return p;
}

static void refuse(const char *method, const moec_request *q, moec_status want, const char *text)
{
    moec_plan *p = NULL;
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_method_plan(&p, MOEC_PRUNE, method, q, &err), want);
    assert_null(p);
    if (!strstr(err.text, text))
        fail_msg("%s: %s", method, err.text);
}

static void near_to(double got, double want)
{
    if (!(fabs(got - want) <= 1e-12 * (fabs(want) + 1e-300)))
        fail_msg("%.17g, expected %.17g", got, want);
}

/* --- neurons --------------------------------------------------------------------------------------------------------- */

static void test_neuron_scores(void **state)
{
    (void)state;
    open_new(&(tiny_spec){0});
    moec_stats *s = make(2);
    moec_request q = request(s, MOEC_GRAIN_NEURONS);
    const int64_t I = model->dims.expert_width;
    double g[64], u[64], d[64], score[64];
    bool seen;
    assert_true(I <= 64);
    for (int64_t j = 0; j < I; j++) {
        g[j] = 4.0;
        u[j] = 9.0;
        d[j] = (double)(j * j);
    }
    s->domain[1].weight = 3.0;
    ((uint64_t *)moec_stat_at(s, 1, MOEC_STAT_SELECTED, 0))[1] = 6;
    const struct { const char *name; moec_stat sum; bool by_down; } rows[] = {
        {"out-norm", MOEC_STAT_ACT_SQ, true}, {"gate-weighted", MOEC_STAT_GACT_SQ, true}, {"mean-abs", MOEC_STAT_ACT_ABS, false}};
    for (size_t k = 0; k < MOEC_COUNT(rows); k++) {
        const moec_method *me = moec_method_of_grain(MOEC_PRUNE, MOEC_GRAIN_NEURONS, rows[k].name);
        assert_non_null(me);
        assert_int_equal(moec_neurons_score(score, &seen, me, &q, 0, 1, g, u, d, NULL), MOEC_OK);
        assert_true(seen);
        for (int64_t j = 0; j < I; j++) { /* weights 1 and 3, 2 and 6 tokens */
            const double a = ((double *)moec_stat_at(s, 0, rows[k].sum, 0))[I + j], b = ((double *)moec_stat_at(s, 1, rows[k].sum, 0))[I + j];
            near_to(score[j], (a + 3.0 * b) / 20.0 * (rows[k].by_down ? (double)(j * j) : 1.0));
        }
        for (int dom = 0; dom < 2; dom++)
            ((uint64_t *)moec_stat_at(s, dom, MOEC_STAT_SELECTED, 0))[2] = 0;
        assert_int_equal(moec_neurons_score(score, &seen, me, &q, 0, 2, g, u, d, NULL), MOEC_OK);
        assert_false(seen);
        for (int64_t j = 0; j < I; j++)
            near_to(score[j], 6.0 * (double)j);
    }
    d[3] = (double)INFINITY;
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_neurons_score(score, &seen, moec_method_of_grain(MOEC_PRUNE, MOEC_GRAIN_NEURONS, "out-norm"), &q, 0, 1, g, u,
                                        d, &err), MOEC_ENUMERIC);
    assert_non_null(strstr(err.text, "expert 1: the score of neuron 3"));
    moec_stats_free(s);
}

static void test_neurons_kept(void **state)
{
    (void)state;
    const double score[] = {5, 1, 5, 9, 0, 5};
    int32_t keep[6];
    assert_int_equal(moec_neurons_keep(keep, score, 6, 3, NULL), MOEC_OK);
    const int32_t three[] = {0, 2, 3};
    assert_memory_equal(keep, three, sizeof three); /* ties to the lower */
    assert_int_equal(moec_neurons_keep(keep, score, 6, 6, NULL), MOEC_OK);
    for (int32_t i = 0; i < 6; i++)
        assert_int_equal(keep[i], i);
}

/* out-norm is the mean squared error that the expert's output has without the neuron, computed here token by token. */
static void test_score_is_the_error(void **state)
{
    (void)state;
    enum { T = 5, I = 12, H = 16 };
    open_new(&(tiny_spec){0});
    assert_int_equal(model->dims.expert_width, I);
    assert_int_equal(model->dims.hidden, H);
    moec_stats *s = make(1);
    const moec_mlp *x = &model->layer[model->set[0].layer].expert[3];
    float gate[I * H], up[I * H], down[H * I];
    moec_weight_read(gate, H, &x->gate, 0, I, 0, H);
    moec_weight_read(up, H, &x->up, 0, I, 0, H);
    moec_weight_read(down, I, &x->down, 0, H, 0, I);
    double a[T][I], d[I] = {0}, none[I], score[I];
    double *sum = (double *)moec_stat_at(s, 0, MOEC_STAT_ACT_SQ, 0) + 3 * I;
    memset(sum, 0, I * sizeof *sum);
    for (int t = 0; t < T; t++)
        for (int j = 0; j < I; j++) {
            double z = 0.0, v = 0.0;
            for (int c = 0; c < H; c++) {
                const double in = (double)((5 * t + 3 * c) % 7 - 3);
                z += in * (double)gate[j * H + c];
                v += in * (double)up[j * H + c];
            }
            a[t][j] = z / (1.0 + exp(-z)) * v;
            sum[j] += a[t][j] * a[t][j];
        }
    for (int j = 0; j < I; j++) {
        none[j] = 1.0;
        for (int r = 0; r < H; r++)
            d[j] += (double)down[r * I + j] * (double)down[r * I + j];
    }
    ((uint64_t *)moec_stat_at(s, 0, MOEC_STAT_SELECTED, 0))[3] = T;
    const moec_request q = request(s, MOEC_GRAIN_NEURONS);
    bool seen;
    assert_int_equal(moec_neurons_score(score, &seen, moec_method_of_grain(MOEC_PRUNE, MOEC_GRAIN_NEURONS, "out-norm"), &q, 0, 3, none,
                                        none, d, NULL), MOEC_OK);
    for (int gone = 0; gone < I; gone++) {
        double error = 0.0;
        for (int t = 0; t < T; t++)
            for (int r = 0; r < H; r++) {
                double with = 0.0, without = 0.0;
                for (int j = 0; j < I; j++) {
                    with += a[t][j] * (double)down[r * I + j];
                    without += j == gone ? 0.0 : a[t][j] * (double)down[r * I + j];
                }
                error += (with - without) * (with - without) / T;
            }
        if (fabs(error - score[gone]) > 1e-9 * (error + 1e-12))
            fail_msg("neuron %d: error %.17g, score %.17g", gone, error, score[gone]);
    }
    moec_stats_free(s);
}

static void test_width(void **state)
{
    (void)state;
    static const struct { double share; int64_t width, align, want; } rows[] = {
        {.share = 0.5, .want = 96}, {.share = 0.29, .want = 128}, {.share = 0.9, .want = 20}, {.share = 0.5, .align = 64, .want = 64},
        {.width = 100, .want = 100}, {.width = 128, .align = 64, .want = 128}, {.share = 0.0, .want = 192}};
    open_new(&(tiny_spec){.width = 192});
    moec_stats *s = make(1);
    moec_request q = request(s, MOEC_GRAIN_NEURONS);
    for (size_t i = 0; i < MOEC_COUNT(rows); i++) {
        q.share = rows[i].share;
        q.width = rows[i].width;
        q.align = rows[i].align;
        moec_plan *p = plan("out-norm", &q);
        assert_int_equal(p->width, rows[i].want);
        assert_int_equal(p->layer[0].n_keep, p->layer[0].n_experts);
        moec_plan_free(p);
    }
    q = request(s, MOEC_GRAIN_NEURONS);
    q.share = 1.0;
    refuse("out-norm", &q, MOEC_EINVAL, "no neuron would be left");
    q.share = 0.5;
    q.align = 256;
    refuse("out-norm", &q, MOEC_EINVAL, "--align 256: the experts have 192 neurons");
    q.align = 128;
    refuse("out-norm", &q, MOEC_EINVAL, "no neuron would be left");
    q.width = 100;
    refuse("out-norm", &q, MOEC_EINVAL, "no multiple of --align 128");
    q.align = 0;
    q.width = 193;
    refuse("out-norm", &q, MOEC_EINVAL, "the experts have 192");
    q.width = 16;
    refuse("out-norn", &q, MOEC_EINVAL, "of grain neurons; did you mean out-norm");
    q.keep = 2;
    refuse("out-norm", &q, MOEC_EINVAL, "--keep");
    q.keep = 0;
    q.stats = NULL;
    refuse("out-norm", &q, MOEC_EINVAL, "--stats");
    moec_free(s->domain[0].data[MOEC_STAT_ACT_SQ]);
    s->domain[0].data[MOEC_STAT_ACT_SQ] = NULL;
    q.stats = s;
    refuse("out-norm", &q, MOEC_EFORMAT, "--tier 1");
    moec_stats_free(s);
}

/* What follows the same key of the config is kept as it is, or the width is refused. */
static void test_shared_width(void **state)
{
    (void)state;
    static const struct { const char *family, *why; } rows[] = {
        {"deepseek_v3", NULL}, {"qwen2_moe", NULL}, {"jetmoe", "attention experts"}, {"llama4_text", "shared expert"},
        {"hunyuan_v1_moe", "shared expert"}, {"gpt_oss", NULL}, {"granitemoeshared", NULL}};
    for (size_t i = 0; i < MOEC_COUNT(rows); i++) {
        const tiny_spec spec = tiny_of(rows[i].family);
        moec_err err = {MOEC_OK, ""};
        int64_t shared = 0;
        open_new(&spec);
        const int64_t I = model->dims.expert_width;
        moec_status st = moec_plan_check_width(&shared, model, I / 2, &err);
        assert_int_equal(st, rows[i].why ? MOEC_EINVAL : MOEC_OK);
        if (rows[i].why && !strstr(err.text, rows[i].why))
            fail_msg("%s: %s", rows[i].family, err.text);
        if (strcmp(rows[i].family, "deepseek_v3") == 0) {
            assert_int_equal(shared * (I / 2), model->dims.shared_width);
            assert_int_equal(moec_plan_check_width(&shared, model, I - 1, &err), MOEC_EINVAL);
            assert_non_null(strstr(err.text, "no divisor"));
        }
    }
}

/* --- whole runs ------------------------------------------------------------------------------------------------------ */

static moec_digest run_thin(moec_plan *p, const char *method, const moec_request *q, moec_thin_tally *tally)
{
    moec_thin *t = NULL;
    moec_err err = {MOEC_OK, ""};
    moec_digest digest;
    moec_apply_result r;
    const moec_thin_opts o = {.work = work};
    if (moec_thin_run(&t, p, moec_method_of_grain(MOEC_PRUNE, q->grain, method), q, &o, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    *tally = moec_thin_count(t);
    const moec_apply_options opt = {.out = out, .overwrite = true, .weights = moec_thin_weights(t)};
    if (moec_apply(&r, model, p, &opt, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    memcpy(digest.hex, p->weights, sizeof p->weights);
    moec_thin_close(t, true);
    return digest;
}

/* Row by row against the source, in every layout, with biases. */
static void test_neurons_written(void **state)
{
    (void)state;
    static const char *const families[] = {"qwen3_moe", "granitemoe", "gpt_oss", "dbrx", "deepseek_v3", "qwen3_vl_moe"};
    for (size_t f = 0; f < MOEC_COUNT(families); f++) {
        tiny_spec spec = tiny_of(families[f]);
        spec.dtype = MOEC_BF16;
        open_new(&spec);
        moec_stats *s = make(1);
        moec_request q = request(s, MOEC_GRAIN_NEURONS);
        const int64_t I = model->dims.expert_width, H = model->dims.hidden, width = I / 2;
        moec_thin_tally tally;
        moec_model *m;
        moec_err err = {MOEC_OK, ""};
        q.width = width;
        moec_plan *p = plan("mean-abs", &q);
        const moec_digest one = run_thin(p, "mean-abs", &q, &tally);
        moec_par_set_threads(1);
        const moec_digest two = run_thin(p, "mean-abs", &q, &tally);
        moec_par_set_threads(0);
        assert_string_equal(one.hex, two.hex);
        if (moec_model_open(&m, out, &err) != MOEC_OK)
            fail_msg("%s", err.text);
        assert_int_equal(m->dims.expert_width, width);
        assert_int_equal(m->dims.shared_width, model->dims.shared_width);
        for (int64_t l = 0; l < model->moe_layers; l++)
            for (int64_t e = 0; e < model->dims.experts; e++) {
                double score[64];
                int32_t keep[64];
                for (int64_t j = 0; j < I; j++)
                    score[j] = ((double *)moec_stat_at(s, 0, MOEC_STAT_ACT_ABS, l))[e * I + j];
                assert_int_equal(moec_neurons_keep(keep, score, I, width, NULL), MOEC_OK);
                const moec_layer *x = &model->layer[model->set[l].layer], *y = &m->layer[m->set[l].layer];
                for (int64_t j = 0; j < width; j++)
                    for (int64_t c = 0; c < H; c++) {
                        float a[3], b[3];
                        moec_weight_read(&a[0], 1, &x->expert[e].gate, keep[j], 1, c, 1);
                        moec_weight_read(&b[0], 1, &y->expert[e].gate, j, 1, c, 1);
                        moec_weight_read(&a[1], 1, &x->expert[e].up, keep[j], 1, c, 1);
                        moec_weight_read(&b[1], 1, &y->expert[e].up, j, 1, c, 1);
                        moec_weight_read(&a[2], 1, &x->expert[e].down, c, 1, keep[j], 1);
                        moec_weight_read(&b[2], 1, &y->expert[e].down, c, 1, j, 1);
                        assert_memory_equal(a, b, sizeof a);
                    }
                for (int64_t j = 0; x->gate_up_bias && j < 2 * width; j++) {
                    const uint16_t *a = x->gate_up_bias->data, *b = y->gate_up_bias->data;
                    assert_int_equal(b[e * 2 * width + j], a[e * 2 * I + 2 * keep[j / 2] + j % 2]);
                }
            }
        moec_model_close(m);
        moec_plan_free(p);
        moec_stats_free(s);
    }
}

static void test_weights_written(void **state)
{
    (void)state;
    open_new(&(tiny_spec){.dtype = MOEC_BF16});
    moec_stats *s = make(1);
    static const struct { const char *method; int64_t some, of; } rows[] = {{"magnitude", 0, 0}, {"wanda", 2, 4}, {"owl", 0, 0}};
    ((uint64_t *)moec_stat_at(s, 0, MOEC_STAT_SELECTED, 0))[1] = 0;
    for (size_t i = 0; i < MOEC_COUNT(rows); i++) {
        moec_request q = request(s, MOEC_GRAIN_WEIGHTS);
        moec_thin_tally tally;
        q.share = 0.5;
        q.some = rows[i].some;
        q.of = rows[i].of;
        moec_plan *p = plan(rows[i].method, &q);
        (void)run_thin(p, rows[i].method, &q, &tally);
        assert_int_equal(tally.unseen, i == 0 ? 0 : 1);
        if (i < 2)
            assert_true(2 * tally.zeros >= tally.values && 2 * tally.zeros < tally.values + tally.values / 8);
        else
            assert_non_null(strstr(p->options, "\"ratios\""));
        moec_plan_free(p);
    }
    moec_request q = request(s, MOEC_GRAIN_WEIGHTS);
    q.some = 3;
    q.of = 7;
    refuse("wanda", &q, MOEC_EINVAL, "no multiples of 7");
    q.some = 4;
    q.of = 4;
    refuse("wanda", &q, MOEC_EINVAL, "expected N:M");
    q.some = 2;
    refuse("owl", &q, MOEC_EINVAL, "take wanda");
    moec_stats_free(s);
}

static void test_cut(void **state)
{
    (void)state;
    float w[] = {3, -1, 2, -4, 1, 5, 0.5f, -0.5f}, v[] = {3, -1, 2, -4, 1, 5, 0.5f, -0.5f}, same[] = {1, -1, 1, 1};
    const double s[] = {1, 1, 1, 1, 10, 1, 1, 1};
    double scratch[16];
    /* scores 3 1 2 4 10 5 .5 .5 */
    assert_int_equal(moec_weights_cut(w, 8, s, 0.5, 0, 0, scratch), 4);
    const float half[] = {3, 0, 0, -4, 1, 5, 0, 0};
    assert_memory_equal(w, half, sizeof half);
    assert_int_equal(moec_weights_cut(v, 8, s, 0.0, 2, 4, scratch), 4);
    const float pairs[] = {3, 0, 0, -4, 1, 5, 0, 0};
    assert_memory_equal(v, pairs, sizeof pairs);
    assert_int_equal(moec_weights_cut(same, 4, s, 0.5, 0, 0, scratch), 2); /* ties: the lower go */
    assert_true(same[0] == 0.0f && same[1] == 0.0f && same[2] == 1.0f && same[3] == 1.0f);
    assert_int_equal(moec_weights_cut(same, 4, s, 1.0, 0, 0, scratch), 4);
}

static void test_owl(void **state)
{
    (void)state;
    const double d[] = {1.0, 3.0, 2.0}, equal[] = {2.0, 2.0};
    double r[3];
    moec_weights_owl(r, d, 3, 0.5); /* D' = 0, .16, .08; mean .08 */
    near_to(r[0], 0.58);
    near_to(r[1], 0.42);
    near_to(r[2], 0.5);
    moec_weights_owl(r, equal, 2, 0.3);
    near_to(r[0], 0.3);
    near_to(r[1], 0.3);
    moec_weights_owl(r, d, 3, 0.05);
    near_to(r[1], 0.01);
}

/* What an earlier run has finished is taken over, of the same plan only. */
static void test_resume(void **state)
{
    (void)state;
    open_new(&(tiny_spec){0});
    moec_stats *s = make(1);
    moec_request q = request(s, MOEC_GRAIN_NEURONS);
    const moec_method *me = moec_method_of_grain(MOEC_PRUNE, MOEC_GRAIN_NEURONS, "out-norm");
    const moec_thin_opts o = {.work = work, .resume = true};
    char first[33] = "";
    for (int turn = 0; turn < 3; turn++) {
        moec_thin *t = NULL;
        moec_err err = {MOEC_OK, ""};
        q.width = turn < 2 ? 6 : 5;
        moec_plan *p = plan("out-norm", &q);
        if (moec_thin_run(&t, p, me, &q, &o, &err) != MOEC_OK)
            fail_msg("%s", err.text);
        if (turn == 0)
            memcpy(first, p->weights, sizeof first);
        assert_int_equal(strcmp(first, p->weights) == 0, turn < 2);
        assert_int_equal(moec_override_count(moec_thin_weights(t)), 3 * model->sets * model->dims.experts);
        moec_thin_close(t, turn == 2);
        moec_plan_free(p);
    }
    moec_stats_free(s);
}

/* --- layers ---------------------------------------------------------------------------------------------------------- */

/* Fewer workers under a bound, the same bytes; too tight a bound says what would do. */
static void test_memory(void **state)
{
    (void)state;
    tiny_spec spec = tiny_of("qwen3_moe");
    spec.dtype = MOEC_BF16;
    open_new(&spec);
    moec_stats *s = make(1);
    moec_request q = request(s, MOEC_GRAIN_NEURONS);
    q.width = model->dims.expert_width / 2;
    moec_plan *p = plan("mean-abs", &q);
    const moec_method *me = moec_method_of_grain(MOEC_PRUNE, q.grain, "mean-abs");
    moec_thin_opts o = {.work = work};
    moec_work_cost one, many, bound;
    moec_thin *t = NULL;
    moec_thin_tally tally;
    moec_err err = {MOEC_OK, ""};
    uint64_t bytes = 0;
    moec_par_set_threads(1);
    assert_int_equal(moec_thin_estimate(&one, p, model, &o, &err), MOEC_OK);
    moec_par_set_threads(4);
    assert_int_equal(moec_thin_estimate(&many, p, model, &o, &err), MOEC_OK);
    assert_true(many.memory >= one.memory + (3u << 20)); /* 1 MiB and more a worker */
    o.max_memory = one.memory + (many.memory - one.memory) / 2;
    assert_int_equal(moec_thin_estimate(&bound, p, model, &o, &err), MOEC_OK);
    assert_true(bound.memory <= o.max_memory);
    assert_int_equal(moec_thin_run(&t, p, me, &q, &o, &err), MOEC_OK);
    for (int64_t i = 0; i < p->n_layers; i++)
        bytes += 3u * 2u * (uint64_t)(p->layer[i].n_keep * model->dims.hidden * q.width);
    assert_int_equal(bound.disk, bytes);
    const moec_digest with = moec_hash_bytes(p->weights, strlen(p->weights));
    moec_thin_close(t, true);
    (void)run_thin(p, "mean-abs", &q, &tally);
    assert_string_equal(with.hex, moec_hash_bytes(p->weights, strlen(p->weights)).hex);
    moec_par_set_threads(0);
    o.max_memory = 1 << 20;
    assert_int_equal(moec_thin_run(&t, p, me, &q, &o, &err), MOEC_ENOFIT);
    assert_non_null(strstr(err.text, "is the least this run can do with"));
    assert_null(t);
    moec_plan_free(p);
    moec_stats_free(s);
}

static void test_blocks(void **state)
{
    (void)state;
    open_new(&(tiny_spec){.layers = 4});
    moec_stats *s = make(1);
    double *c = moec_stat_at(s, 0, MOEC_STAT_COS_BLOCK, 0);
    const double similar[] = {3.0, 3.6, 3.6, 2.0}; /* over 4 tokens */
    for (int i = 0; i < 4; i++)
        c[i * 5 + i + 1] = similar[i];
    moec_request q = request(s, MOEC_GRAIN_BLOCKS);
    q.drop = 1;
    moec_plan *p = plan("similarity", &q);
    assert_int_equal(p->n_drop, 1);
    assert_int_equal(p->drop[0], 1); /* ties: the lower */
    moec_plan_free(p);
    q.drop = 0;
    q.share = 0.75;
    p = plan("similarity", &q);
    assert_int_equal(p->n_drop, 3);
    assert_int_equal(p->drop[0], 0);
    assert_int_equal(p->drop[2], 2);
    assert_int_equal(moec_plan_layer_number(p, 3), 0);
    assert_int_equal(moec_plan_layer_number(p, 1), -1);
    assert_int_equal(moec_plan_layer_number(p, 5), 2);

    char *text;
    moec_plan *again;
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_plan_to_text(&text, p, NULL), MOEC_OK);
    if (moec_plan_parse(&again, text, strlen(text), "again", &err) != MOEC_OK)
        fail_msg("%s", err.text);
    assert_int_equal(again->n_drop, 3);
    assert_memory_equal(again->drop, p->drop, 3 * sizeof *p->drop);
    moec_free(text);
    moec_plan_free(again);

    moec_apply_result r;
    moec_model *m;
    const moec_apply_options opt = {.out = out};
    if (moec_apply(&r, model, p, &opt, &err) != MOEC_OK || moec_model_open(&m, out, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    assert_int_equal(m->dims.layers, 1);
    const moec_tensor *a = model->layer[3].mat[MOEC_MAT_ROUTER].of, *b = m->layer[0].mat[MOEC_MAT_ROUTER].of;
    assert_int_equal(a->bytes, b->bytes);
    assert_memory_equal(a->data, b->data, a->bytes);
    moec_model_close(m);
    p->drop[2] = 9;
    assert_int_equal(moec_plan_check(p, model, print.hex, &err), MOEC_EFORMAT);
    assert_non_null(strstr(err.text, "the model has 4"));
    moec_plan_free(p);
    q.share = 1.0;
    refuse("similarity", &q, MOEC_EINVAL, "the model has 4");
    *(uint64_t *)moec_stat_at(s, 0, MOEC_STAT_BLOCK_TOKENS, 0) = 0;
    q.share = 0.25;
    refuse("similarity", &q, MOEC_ENUMERIC, "no token");
    moec_stats_free(s);
}

/* --- top-k ----------------------------------------------------------------------------------------------------------- */

static void test_top_k(void **state)
{
    (void)state;
    static const struct { const char *family, *why; } rows[] = {
        {"qwen3_moe", NULL}, {"phimoe", "cannot change"}, {"jetmoe", "cannot change"}, {"remoe", "varies"}};
    for (size_t i = 0; i < MOEC_COUNT(rows); i++) {
        const tiny_spec spec = tiny_of(rows[i].family);
        moec_plan *p;
        moec_err err = {MOEC_OK, ""};
        open_new(&spec);
        assert_int_equal(moec_plan_new(&p, model, "", print.hex, NULL), MOEC_OK);
        assert_int_equal(moec_plan_keep_all(p, NULL), MOEC_OK);
        assert_int_equal(moec_plan_set_top_k(p, model, 1, &err), rows[i].why ? MOEC_EINVAL : MOEC_OK);
        if (rows[i].why && !strstr(err.text, rows[i].why))
            fail_msg("%s: %s", rows[i].family, err.text);
        if (!rows[i].why)
            assert_int_equal(moec_plan_set_top_k(p, model, 2, &err), MOEC_EINVAL);
        moec_plan_free(p);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_neuron_scores),  cmocka_unit_test(test_neurons_kept), cmocka_unit_test(test_score_is_the_error),
        cmocka_unit_test(test_width),          cmocka_unit_test(test_shared_width), cmocka_unit_test(test_neurons_written),
        cmocka_unit_test(test_weights_written), cmocka_unit_test(test_cut),         cmocka_unit_test(test_owl),
        cmocka_unit_test(test_resume),         cmocka_unit_test(test_blocks),         cmocka_unit_test(test_top_k),
        cmocka_unit_test(test_memory)};
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
