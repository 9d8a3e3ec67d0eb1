/* What widths cost: errors against loops in float64 over every selection, gains against a whole run of a model whose layer is in two
 * bits, threads, and what is refused. */
#include "base/mem.h"
#include "base/par.h"
#include "calib/calibrate.h"
#include "calib/eval.h"
#include "method/quant.h"
#include "model/variant.h"
#include "run/measure.h"
#include "support/naive_expert.h"
#include "support/tiny.h"

#include <limits.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <cmocka.h>

enum { N = 100, B = MOEC_QUANT_WIDTHS, GROUP = 8 };
static const int width[] = MOEC_QUANT_WIDTH_LIST;
static int32_t ids[N];
static int64_t start_a[] = {0, 23, 46, 69}, start_b[] = {0, 17, 31};
static char name_a[] = "z", name_b[] = "a"; /* files list domains by name, texts as they are given */
static moec_domain domains[2];
static moec_corpus corpus = {2, domains};
static char *folder, *source, *stats_path, *work;
static moec_model *model;

static int set_up(void **state)
{
    (void)state;
    folder = tiny_folder();
    source = tiny_path(folder, "source");
    stats_path = tiny_path(folder, "stats.h5");
    work = tiny_path(folder, "work");
    for (uint32_t i = 0, x = 7; i < N; i++) {
        x = x * 1664525u + 1013904223u;
        ids[i] = (int32_t)((x >> 8) % 60u);
    }
    domains[0] = (moec_domain){.name = name_a, .path = name_a, .weight = 1, .ids = ids, .n_ids = 69, .start = start_a, .n_windows = 3};
    domains[1] = (moec_domain){.name = name_b, .path = name_b, .weight = 2, .ids = ids + 69, .n_ids = 31, .start = start_b,
                               .n_windows = 2};
    return 0;
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

static moec_measure_opts opts(bool gains, int64_t gain_tokens)
{
    return (moec_measure_opts){.group = GROUP, .gains = gains, .gain_tokens = gain_tokens, .work = work, .resume = true};
}

static moec_stats *calibrated(const char *family)
{
    moec_err err = {MOEC_OK, ""};
    const tiny_spec spec = tiny_of(family);
    const moec_calibrate_opts o = {.options = "{}"};
    moec_stats *s = NULL;
    moec_model_close(model);
    model = NULL;
    tiny_remove(source);
    if (tiny_write(source, &spec, &err) != MOEC_OK || moec_model_open(&model, source, &err) != MOEC_OK ||
        moec_calibrate(NULL, model, &corpus, stats_path, &o, &err) != MOEC_OK || moec_stats_load(&s, stats_path, &err) != MOEC_OK)
        fail_msg("%s: %s", family, err.text);
    return s;
}

static void measure(moec_stats *s, const moec_measure_opts *o)
{
    moec_err err = {MOEC_OK, ""};
    if (moec_measure(s, model, &corpus, o, &err) != MOEC_OK)
        fail_msg("%s", err.text);
}

/* --- a matrix of the grid ---------------------------------------------------------------------------------------------- */

typedef struct matrix {
    moec_tensor t;
    moec_weight w;
    float *v;
} matrix;

static matrix grid_of(const moec_weight *w, int bits)
{
    matrix m;
    moec_qcodes c;
    const int64_t group = moec_quant_group(GROUP, w->cols, 8);
    const moec_qgrid g = {.bits = bits, .group = group > 0 ? group : w->cols, .scale_type = MOEC_F32};
    m.v = mmap(NULL, (size_t)(w->rows * w->cols) * sizeof *m.v, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(m.v != MAP_FAILED); /* shared: a pass gives pages back, which are those of a file as a rule */
    for (int64_t r = 0; r < w->rows; r += 96)
        moec_weight_read(m.v + r * w->cols, w->cols, w, r, w->rows - r < 96 ? w->rows - r : 96, 0, w->cols);
    assert_int_equal(moec_qcodes_new(&c, &g, w->rows, w->cols, NULL), MOEC_OK);
    assert_int_equal(moec_quant_range(&c, m.v, MOEC_QRANGE_CLIP, NULL, 0, w->rows, NULL), MOEC_OK);
    moec_quant_nearest(&c, m.v, 0, w->rows);
    moec_quant_restore(m.v, &c, 0, w->rows);
    moec_qcodes_release(&c);
    m.t = (moec_tensor){.name = "w", .dtype = MOEC_F32, .rank = 2, .dim = {w->rows, w->cols}, .data = m.v,
                        .bytes = (size_t)(w->rows * w->cols) * sizeof(float)};
    return m;
}

static void let_go(matrix *m)
{
    munmap(m->v, m->t.bytes);
}

static moec_weight view_of(matrix *m)
{
    return moec_weight_of(&m->t);
}

/* --- errors ------------------------------------------------------------------------------------------------------------- */

/* What a layer saw, and the states behind it. */
typedef struct seen {
    float *x, *gates, *after;
    int32_t *ids;
} seen;

static moec_status see(void *ctx, int worker, const moec_chunk *c, const moec_moe_view *v, moec_err *err)
{
    seen *s = ctx;
    const int64_t H = model->dims.hidden, slots = model->dims.slots;
    (void)worker;
    (void)err;
    memcpy(s->x + c->token * H, v->x, (size_t)(v->n * H) * sizeof *s->x);
    memcpy(s->ids + c->token * slots, v->ids, (size_t)(v->n * slots) * sizeof *s->ids);
    memcpy(s->gates + c->token * slots, v->gates, (size_t)(v->n * slots) * sizeof *s->gates);
    return MOEC_OK;
}

static double square(const double *a, const double *b, int64_t n)
{
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++)
        sum += (a[i] - b[i]) * (a[i] - b[i]);
    return sum;
}

static void near(double got, double want, double scale, const char *what, int64_t layer, int64_t e)
{
    if (!(fabs(got - want) <= scale * fabs(want) + 1e-12))
        fail_msg("%s of layer %lld, expert %lld: %.12g, wanted %.12g", what, (long long)layer, (long long)e, got, want);
}

/* One expert, one choice of matrices (bits of `part`), one width. */
static void check_expert(const moec_stats *s, const moec_layer *l, int64_t e, int part, int b, const seen *v)
{
    static const int which[] = {1, 2, 4, 7};
    const int64_t H = model->dims.hidden, slots = model->dims.slots;
    const bool on_input = model->family->weight_on_input;
    moec_mlp experts[64];
    moec_layer changed = *l;
    moec_weight *const w[] = {&experts[e].gate, &experts[e].up, &experts[e].down};
    matrix grid[3];
    double y[64], q[64];
    float x[64];
    int64_t at = 0;
    memcpy(experts, l->expert, (size_t)model->dims.experts * sizeof *experts);
    changed.expert = experts;
    for (int k = 0; k < 3; k++) {
        grid[k] = grid_of(w[k], width[b]);
        if (which[part] & 1 << k)
            *w[k] = view_of(&grid[k]);
    }
    for (int d = 0; d < corpus.n_domains; d++) {
        const moec_domain *dom = &domains[d];
        double sq = 0.0, fro = 0.0;
        int to;
        for (int64_t win = 0; win < dom->n_windows; win++) {
            double lost = 0.0;
            for (int64_t t = dom->start[win]; t < dom->start[win + 1]; t++, at++)
                for (int64_t j = 0; j < slots; j++) {
                    const double g = (double)v->gates[at * slots + j];
                    if (v->ids[at * slots + j] != e)
                        continue;
                    for (int64_t i = 0; i < H; i++)
                        x[i] = v->x[at * H + i] * (float)(model->dims.input_scale * (on_input ? g : 1.0));
                    naive_expert(y, H, model, l, e, x, 1);
                    naive_expert(q, H, model, &changed, e, x, 1);
                    double mean = 0.0;
                    for (int64_t i = 0; i < H; i++)
                        mean += (double)v->after[at * H + i] * (double)v->after[at * H + i] / (double)H;
                    const double one = (on_input ? 1.0 : g * g) * square(y, q, H);
                    sq += one / mean;
                    lost += one;
                }
            fro += sqrt(lost);
        }
        assert_int_equal(moec_stats_domain_find(&to, s, dom->name, NULL), MOEC_OK);
        const double *got = moec_stat_at(s, to, MOEC_STAT_QUANT_SQ, l->moe_index);
        const double *f = moec_stat_at(s, to, MOEC_STAT_QUANT_FRO, l->moe_index);
        near(got[(e * 4 + part) * B + b], sq, 2e-4, "quant_sq", l->index, e);
        if (part == 3)
            near(f[e * B + b], fro, 2e-4, "quant_fro", l->index, e);
    }
    for (int k = 0; k < 3; k++)
        let_go(&grid[k]);
}

static void test_errors(void **state)
{
    (void)state;
    static const char *const family[] = {"qwen3_moe", "gpt_oss", "llama4_text", "deepseek_v3", "dynamic_moe"};
    for (size_t i = 0; i < MOEC_COUNT(family); i++) {
        moec_err err = {MOEC_OK, ""};
        moec_stats *s = calibrated(family[i]);
        const moec_measure_opts o = opts(false, 0);
        const moec_pass_opts po = {.watch = true, .what = "test"};
        moec_pass *p;
        measure(s, &o);
        assert_null(s->domain[0].data[MOEC_STAT_QUANT_KL]);
        assert_int_equal(moec_stats_quant_group(s), GROUP);
        const size_t values = (size_t)(N * model->dims.hidden), picks = (size_t)(N * model->dims.slots);
        seen v = {calloc(values, 4), calloc(picks, 4), calloc(values, 4), calloc(picks, 4)};
        assert_int_equal(moec_pass_new(&p, model, &corpus, &po, &err), MOEC_OK);
        assert_int_equal(moec_pass_embed(p, &err), MOEC_OK);
        for (int64_t l = 0; l < model->dims.layers; l++) {
            assert_int_equal(moec_pass_layer(p, l, see, NULL, &v, &err), MOEC_OK);
            assert_int_equal(moec_hidden_read(v.after, p->hidden, 0, N, &err), MOEC_OK);
            for (int64_t e = 0; model->layer[l].expert && e < model->dims.experts; e++)
                for (int part = 0; part < 4; part++)
                    for (int b = part == 3 ? 0 : 2; b < (part == 3 ? B : 3); b++)
                        check_expert(s, &model->layer[l], e, part, b, &v);
        }
        moec_pass_free(p);
        free(v.x);
        free(v.gates);
        free(v.after);
        free(v.ids);
        moec_stats_free(s);
    }
}

/* --- gains -------------------------------------------------------------------------------------------------------------- */

/* KL of each domain, over `c`, of the model whose layer `l` is in two bits. */
static void kl_of(double out[2], const moec_final *original, const moec_corpus *c, int64_t l)
{
    moec_err err = {MOEC_OK, ""};
    moec_variant *v;
    moec_final *f;
    moec_scores scores;
    const int64_t E = model->dims.experts;
    matrix *m = calloc((size_t)(3 * E), sizeof *m);
    assert_int_equal(moec_variant_new(&v, model, &err), MOEC_OK);
    for (int64_t e = 0; e < E; e++) {
        moec_mlp *x = &v->model.layer[l].expert[e];
        moec_weight *const w[] = {&x->gate, &x->up, &x->down};
        for (int k = 0; k < 3; k++) {
            m[3 * e + k] = grid_of(w[k], 2);
            *w[k] = view_of(&m[3 * e + k]);
        }
    }
    assert_int_equal(moec_final_run(&f, &v->model, c, MOEC_COMPUTE_F32, 0, "test", &err), MOEC_OK);
    assert_int_equal(moec_score(&scores, f, original, c, MOEC_COMPUTE_F32, 0, &err), MOEC_OK);
    for (int d = 0; d < 2; d++)
        out[d] = scores.domain[d].kl;
    moec_scores_release(&scores);
    moec_final_free(f);
    moec_variant_free(v);
    for (int64_t i = 0; i < 3 * E; i++)
        let_go(&m[i]);
    free(m);
}

static void test_gains(void **state)
{
    (void)state;
    static const char *const family[] = {"qwen3_moe", "gpt_oss", "MoE++"}; /* the last carries logits along */
    static const double scored[] = {66, 29};
    for (size_t i = 0; i < MOEC_COUNT(family); i++)
        for (int some = 0; some < 2; some++) {
            moec_err err = {MOEC_OK, ""};
            moec_stats *s = calibrated(family[i]);
            const moec_measure_opts o = opts(true, some ? 60 : 0); /* 60 of 100 tokens: two windows of each */
            moec_domain part[2] = {domains[0], domains[1]};
            const moec_corpus c = {2, part};
            moec_final *original;
            measure(s, &o);
            part[0].n_windows = some ? 2 : 3;
            assert_int_equal(moec_final_run(&original, model, &c, MOEC_COMPUTE_F32, 0, "test", &err), MOEC_OK);
            for (int64_t l = 0; l < model->dims.layers; l++) {
                double want[2];
                if (!model->layer[l].expert)
                    continue;
                kl_of(want, original, &c, l);
                for (int d = 0; d < 2; d++) {
                    int to;
                    assert_int_equal(moec_stats_domain_find(&to, s, domains[d].name, NULL), MOEC_OK);
                    const double *kl = moec_stat_at(s, to, MOEC_STAT_QUANT_KL, model->layer[l].moe_index);
                    near(*kl, want[d] * scored[d], 1e-6, "quant_kl", l, d);
                }
            }
            moec_final_free(original);
            moec_stats_free(s);
        }
}

/* --- the rest ----------------------------------------------------------------------------------------------------------- */

static void same(const moec_stats *a, const moec_stats *b)
{
    for (moec_stat k = MOEC_STAT_QUANT_SQ; k <= MOEC_STAT_QUANT_KL; k++)
        for (int d = 0; d < a->n_domains; d++)
            assert_memory_equal(a->domain[d].data[k], b->domain[d].data[k],
                                (size_t)(moec_stat_cells(&a->meta, k) * moec_stat_blocks(&a->meta, k)) * sizeof(double));
}

static void test_threads(void **state)
{
    (void)state;
    moec_stats *s[2];
    const moec_measure_opts o = opts(true, 0);
    const int had = moec_par_threads();
    for (int i = 0; i < 2; i++) {
        s[i] = calibrated("qwen3_moe");
        moec_par_set_threads(1 + 2 * i);
        measure(s[i], &o);
        moec_par_set_threads(had);
    }
    same(s[0], s[1]);
    const moec_measure_opts again = opts(false, 0); /* leaves gains of the same group */
    measure(s[1], &again);
    same(s[0], s[1]);
    moec_measure_opts other = again;
    other.group = 0;
    measure(s[1], &other);
    assert_null(s[1]->domain[0].data[MOEC_STAT_QUANT_KL]);
    assert_int_equal(moec_stats_quant_group(s[1]), 0);
    moec_stats_free(s[0]);
    moec_stats_free(s[1]);
}

/* What a width costs a layer's experts together; single tokens may be routed otherwise. 8 bits too, whose errors are smaller than
 * what bfloat16 does to an output: a difference of outputs would be all noise. */
static void test_bf16(void **state)
{
    (void)state;
    moec_stats *s[2];
    for (int i = 0; i < 2; i++) {
        moec_measure_opts o = opts(false, 0);
        o.compute = i == 0 ? MOEC_COMPUTE_F32 : MOEC_COMPUTE_BF16;
        s[i] = calibrated("qwen3_moe");
        measure(s[i], &o);
    }
    for (int64_t l = 0; l < model->dims.layers; l++)
        for (int k = 0; k < 4 * B && model->layer[l].expert; k++) {
            double sum[2] = {0.0, 0.0};
            for (int i = 0; i < 2; i++)
                for (int64_t e = 0; e < model->dims.experts; e++)
                    for (int d = 0; d < 2; d++)
                        sum[i] += ((const double *)moec_stat_at(s[i], d, MOEC_STAT_QUANT_SQ, model->layer[l].moe_index))[e * 4 * B + k];
            if (!(fabs(sum[1] - sum[0]) <= 0.02 * sum[0]))
                fail_msg("layer %d, part %d at %d bits: %.6g in bfloat16, %.6g in float32", (int)l, k / B, width[k % B], sum[1], sum[0]);
        }
    moec_stats_free(s[0]);
    moec_stats_free(s[1]);
}

static void refused(moec_stats *s, const moec_corpus *c, moec_measure_opts o, moec_status want, const char *why)
{
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_measure(s, model, c, &o, &err), want);
    if (!strstr(err.text, why))
        fail_msg("\"%s\" does not say \"%s\"", err.text, why);
    assert_null(s->domain[0].data[MOEC_STAT_QUANT_SQ]);
}

static void test_refusals(void **state)
{
    (void)state;
    moec_stats *s = calibrated("qwen3_moe");
    moec_domain less[2] = {domains[0], domains[1]};
    moec_corpus c = {2, less};
    moec_measure_opts o = opts(false, 0);
    less[1].n_windows = 1;
    refused(s, &c, o, MOEC_EINVAL, "is other text");
    c.n_domains = 1;
    refused(s, &c, o, MOEC_EINVAL, "1 texts, the statistics have 2");
    o.group = -1;
    refused(s, &corpus, o, MOEC_EINVAL, "negative");
    o = opts(false, 0);
    o.max_memory = 1 << 20;
    refused(s, &corpus, o, MOEC_ENOFIT, "is too little");
    s->meta.model[0] = s->meta.model[0] == '0' ? '1' : '0';
    refused(s, &corpus, opts(false, 0), MOEC_EFORMAT, "another model");
    moec_stats_free(s);
}

/* Every allocation fails once, or nearly every one: no crash, no leak, and statistics as they were. */
static void test_memory(void **state)
{
    (void)state;
    moec_stats *s = calibrated("qwen3_moe");
    moec_measure_opts o = opts(true, 60);
    moec_status st = MOEC_ENOMEM;
    const int had = moec_par_threads();
    o.resume = false;
    moec_par_set_threads(1);
    for (long k = 0; st != MOEC_OK; k += 1 + k / 16) {
        moec_err err = {MOEC_OK, ""};
        moec_test_allocs_left = k;
        st = moec_measure(s, model, &corpus, &o, &err);
        moec_test_allocs_left = LONG_MAX;
        if (st != MOEC_OK && st != MOEC_ENOMEM)
            fail_msg("%ld allocations: %s", k, err.text);
        assert_true(k < 1000000);
    }
    moec_par_set_threads(had);
    moec_stats *t = calibrated("qwen3_moe");
    o.resume = true;
    measure(t, &o);
    same(s, t);
    moec_stats_free(s);
    moec_stats_free(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_errors), cmocka_unit_test(test_gains), cmocka_unit_test(test_threads),
                                       cmocka_unit_test(test_bf16), cmocka_unit_test(test_refusals), cmocka_unit_test(test_memory)};
    moec_log_set(MOEC_QUIET);
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
