/* The layer pass: the demo model against values from transformers, and the laws that hold for any model: what a window's
 * states are does not depend on threads, on other windows, on memory planning or on where hidden states are kept. */
#include "base/file.h"
#include "base/mem.h"
#include "base/par.h"
#include "calib/calibrate.h"
#include "calib/eval.h"
#include "num/vec.h"
#include "tiny.h"
#include "unit/data/demo_expected.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define DEMO MOEC_SOURCE_DIR "/recipes/demo-model"

static void must(moec_status st, const moec_err *err)
{
    if (st != MOEC_OK)
        print_error("%s\n", err->text);
    assert_int_equal(st, MOEC_OK);
}

/* Windows of random ids in one or two domains. */
typedef struct text {
    moec_corpus corpus;
    moec_domain domain[2];
    char name[2][8];
    int64_t start[2][64];
    int32_t ids[16384];
    int64_t n;
} text;

static void add_window(text *x, int domain, const int32_t *ids, int64_t n)
{
    moec_domain *d = &x->domain[domain];
    if (d->n_windows == 0) {
        snprintf(x->name[domain], sizeof x->name[domain], "text%d", domain);
        *d = (moec_domain){.name = x->name[domain], .path = x->name[domain], .weight = 1.0, .ids = x->ids + x->n,
                           .start = x->start[domain]};
        x->corpus = (moec_corpus){domain + 1, x->domain};
    }
    memcpy(x->ids + x->n, ids, (size_t)n * sizeof *ids);
    x->n += n;
    d->n_ids += n;
    d->start[++d->n_windows] = d->n_ids;
}

static void random_windows(text *x, int domain, int n, int64_t shortest, int64_t longest, int64_t vocab)
{
    static uint32_t seed = 7;
    int32_t ids[512];
    for (int w = 0; w < n; w++) {
        int64_t length = shortest + (longest > shortest ? (w * 37 + 11) % (longest - shortest + 1) : 0);
        for (int64_t i = 0; i < length; i++) {
            seed = seed * 1664525U + 1013904223U;
            ids[i] = (int32_t)((seed >> 8) % (uint32_t)vocab);
        }
        add_window(x, domain, ids, length);
    }
}

static moec_pass_opts options(moec_compute compute)
{
    return (moec_pass_opts){.compute = compute, .watch = true, .what = "test"};
}

/* Hidden states behind the last layer; free with moec_free. *plan says how they were made. */
static float *states(const moec_model *m, const text *x, const moec_pass_opts *o, moec_pass_plan *plan)
{
    moec_err err = {MOEC_OK, ""};
    moec_pass *p;
    float *h = NULL;
    must(moec_pass_new(&p, m, &x->corpus, o, &err), &err);
    must(moec_pass_embed(p, &err), &err);
    moec_pass_begin(p, 0);
    for (int64_t i = 0; i < m->dims.layers; i++)
        must(moec_pass_layer(p, i, NULL, NULL, NULL, &err), &err);
    moec_pass_end(p);
    must(MOEC_NEW(h, (size_t)(x->n * m->dims.hidden), &err), &err);
    must(moec_hidden_read(h, p->hidden, 0, x->n, &err), &err);
    if (plan)
        *plan = p->plan;
    moec_pass_free(p);
    return h;
}

static moec_model *open_model(const char *dir)
{
    moec_err err = {MOEC_OK, ""};
    moec_model *m;
    must(moec_model_open(&m, dir, &err), &err);
    return m;
}

static moec_model *tiny_model(char **dir, const tiny_spec *spec)
{
    moec_err err = {MOEC_OK, ""};
    *dir = tiny_folder();
    must(tiny_write(*dir, spec, &err), &err);
    return open_model(*dir);
}

/* ---- against transformers ------------------------------------------------------------------------------------------ */

static float *demo_logits(moec_compute compute)
{
    moec_err err = {MOEC_OK, ""};
    moec_model *m = open_model(DEMO);
    text *x = calloc(1, sizeof *x);
    assert_non_null(x);
    add_window(x, 0, expected_ids, MOEC_COUNT(expected_ids));
    moec_pass_opts o = options(compute);
    float *h = states(m, x, &o, NULL), *norm = NULL, *panels = NULL, *z = NULL, *out = NULL;
    int64_t n = x->n, width = m->dims.hidden, vocab = m->dims.vocab;
    void *scratch = NULL;
    must(MOEC_NEW(norm, (size_t)width, &err), &err);
    must(MOEC_NEW(panels, (size_t)(moec_panels(n) * MOEC_PANEL * width), &err), &err);
    must(MOEC_NEW(z, (size_t)(moec_panels(n) * MOEC_PANEL * vocab), &err), &err);
    must(MOEC_NEW(out, (size_t)(n * vocab), &err), &err);
    must(moec_alloc(&scratch, moec_gemm_scratch_bytes(compute, n, width), 1, &err), &err);
    moec_dtypes[m->final_norm->dtype].to_f32(norm, m->final_norm->data, width);
    for (int64_t t = 0; t < n; t++)
        moec_rms_norm(h + t * width, h + t * width, norm, width, (float)m->dims.norm_eps);
    moec_panel_pack(panels, h, width, NULL, n, width);
    must(moec_gemm_weight(z, panels, n, &m->head, compute, scratch, &err), &err);
    moec_panel_unpack(out, vocab, z, n, vocab);
    moec_free(scratch);
    moec_free(z);
    moec_free(panels);
    moec_free(norm);
    moec_free(h);
    moec_model_close(m);
    free(x);
    return out;
}

static double loss_at(const float *z, int64_t vocab, int32_t id)
{
    double top = -INFINITY, sum = 0;
    for (int64_t i = 0; i < vocab; i++)
        top = fmax(top, (double)z[i]);
    for (int64_t i = 0; i < vocab; i++)
        sum += exp((double)z[i] - top);
    return top + log(sum) - (double)z[id];
}

static void demo_model_is_as_in_transformers(void **state)
{
    enum { VOCAB = 4096 };
    float *z = demo_logits(MOEC_COMPUTE_F32);
    (void)state;
    for (size_t t = 0; t < MOEC_COUNT(expected_ids); t++) {
        const float *row = z + t * VOCAB;
        int32_t top = 0;
        for (int32_t i = 1; i < VOCAB; i++)
            top = row[i] > row[top] ? i : top;
        assert_int_equal(top, expected_top[t]);
        if (t + 1 < MOEC_COUNT(expected_ids) && !(fabs(loss_at(row, VOCAB, expected_ids[t + 1]) - expected_loss[t]) <= 1e-4)) {
            print_error("position %zu: loss %.7f, expected %.7f\n", t, loss_at(row, VOCAB, expected_ids[t + 1]), expected_loss[t]);
            fail();
        }
    }
    moec_free(z);
}

static void bf16_is_close_to_f32(void **state)
{
    enum { VOCAB = 4096 };
    float *z = demo_logits(MOEC_COMPUTE_BF16);
    double sum = 0, most = 0;
    (void)state;
    for (size_t t = 0; t + 1 < MOEC_COUNT(expected_ids); t++) {
        double off = loss_at(z + t * VOCAB, VOCAB, expected_ids[t + 1]) - expected_loss[t];
        sum += off;
        most = fmax(most, fabs(off));
    }
    assert_true(fabs(sum / (double)MOEC_COUNT(expected_loss)) < 0.01 && most < 0.5 && most > 0.0);
    moec_free(z);
}

/* ---- laws ---------------------------------------------------------------------------------------------------------- */

static const tiny_spec tiny[] = {
    {.dense_layer = 2, .seed = 1},
    {.family = "mixtral", .untied = true, .hidden = 40, .width = 33, .experts = 5, .top_k = 3, .dtype = MOEC_BF16, .seed = 2},
    {.hidden = 72, .experts = 40, .top_k = 6, .heads = 3, .kv_heads = 1, .head_dim = 22, .dtype = MOEC_F16, .seed = 3},
};

static void same_states_for_any_number_of_threads(void **state)
{
    text *x = calloc(1, sizeof *x);
    (void)state;
    assert_non_null(x);
    random_windows(x, 0, 20, 3, 300, 64);
    random_windows(x, 1, 20, 3, 90, 64);
    for (size_t i = 0; i < MOEC_COUNT(tiny); i++)
        for (int mode = 0; mode < 2; mode++) {
            char *dir;
            moec_model *m = tiny_model(&dir, &tiny[i]);
            moec_pass_opts o = options((moec_compute)mode);
            float *first = NULL;
            for (int threads = 1; threads <= 5; threads += 1 + (threads > 2)) {
                moec_par_set_threads(threads);
                float *h = states(m, x, &o, NULL);
                if (first) {
                    assert_memory_equal(first, h, (size_t)(x->n * m->dims.hidden) * sizeof *h);
                    moec_free(h);
                } else {
                    first = h;
                }
            }
            moec_par_set_threads(0);
            moec_free(first);
            moec_model_close(m);
            tiny_remove(dir);
            moec_free(dir);
        }
    free(x);
}

static void a_window_is_the_same_alone_and_among_others(void **state)
{
    text *x = calloc(1, sizeof *x), *one = malloc(sizeof *one);
    (void)state;
    assert_true(x && one);
    random_windows(x, 0, 24, 2, 260, 64);
    for (size_t i = 0; i < MOEC_COUNT(tiny); i++)
        for (int mode = 0; mode < 2; mode++) {
            char *dir;
            moec_model *m = tiny_model(&dir, &tiny[i]);
            moec_pass_opts o = options((moec_compute)mode);
            float *all = states(m, x, &o, NULL);
            for (int64_t w = 0; w < x->domain[0].n_windows; w += 3) {
                int64_t at = x->start[0][w], n = x->start[0][w + 1] - at;
                memset(one, 0, sizeof *one);
                add_window(one, 0, x->ids + at, n);
                float *h = states(m, one, &o, NULL);
                assert_memory_equal(all + at * m->dims.hidden, h, (size_t)(n * m->dims.hidden) * sizeof *h);
                moec_free(h);
            }
            moec_free(all);
            moec_model_close(m);
            tiny_remove(dir);
            moec_free(dir);
        }
    free(x);
    free(one);
}

/* Limits just below what one arrangement needs make the planner resort to the next, until nothing fits. Each gives the same
 * bits. Needs are counted from what the process holds anyway, which changes between runs. */
static void memory_limits_change_no_bit(void **state)
{
    moec_err err = {MOEC_OK, ""};
    text *x = calloc(1, sizeof *x);
    uint64_t need[64], held;
    bool disk = false, lean = false, single = false;
    int n = 0;
    (void)state;
    assert_non_null(x);
    random_windows(x, 0, 14, 128, 128, 64);
    random_windows(x, 1, 14, 128, 128, 64);
    char *dir;
    moec_model *m = tiny_model(&dir, &(tiny_spec){.hidden = 64, .experts = 16, .width = 64, .layers = 2, .seed = 4});
    moec_pass_opts o = options(MOEC_COMPUTE_F32);
    moec_pass_plan plan;
    moec_par_set_threads(2);
    o.max_memory = (uint64_t)1 << 40;
    held = moec_resident_memory();
    while (n < 64 && moec_pass_estimate(&plan, m, x->n, 128, &o, &err) == MOEC_OK) {
        need[n++] = plan.bytes - held;
        o.max_memory = plan.bytes - 1;
    }
    assert_int_equal(err.code, MOEC_ENOFIT);
    assert_non_null(strstr(err.text, "is the least this run can do with"));
    assert_in_range(n, 4, 63);
    o.max_memory = 0;
    float *want = states(m, x, &o, &plan);
    assert_false(plan.on_disk || plan.lean);
    for (int i = 0; i < n; i++) {
        o.max_memory = need[i] + moec_resident_memory() + (256 << 10);
        float *h = states(m, x, &o, &plan);
        disk = disk || plan.on_disk;
        lean = lean || plan.lean;
        single = single || plan.workers == 1;
        assert_memory_equal(want, h, (size_t)(x->n * m->dims.hidden) * sizeof *h);
        moec_free(h);
    }
    assert_true(disk && lean && single);
    moec_par_set_threads(0);
    moec_free(want);
    moec_model_close(m);
    tiny_remove(dir);
    moec_free(dir);
    free(x);
}

/* ---- statistics ---------------------------------------------------------------------------------------------------- */

static char *statistics(size_t *n, const moec_model *m, const text *x, int threads, int tier, uint64_t max_memory)
{
    moec_err err = {MOEC_OK, ""};
    char *dir = tiny_folder(), *path = tiny_path(dir, "stats.h5"), *bytes;
    moec_calibrate_opts o = {.tier = tier, .max_memory = max_memory, .options = "{}", .resume = true, .checkpoint_every = 0};
    moec_par_set_threads(threads);
    must(moec_calibrate(NULL, m, &x->corpus, path, &o, &err), &err);
    moec_par_set_threads(0);
    must(moec_file_read(&bytes, n, path, (size_t)1 << 30, &err), &err);
    tiny_remove(dir);
    moec_free(path);
    moec_free(dir);
    return bytes;
}

static void same_statistics_for_any_number_of_threads(void **state)
{
    text *x = calloc(1, sizeof *x);
    (void)state;
    assert_non_null(x);
    random_windows(x, 0, 30, 3, 300, 64);
    random_windows(x, 1, 20, 3, 90, 64);
    for (size_t i = 0; i < MOEC_COUNT(tiny); i++)
        for (int tier = 0; tier < 2; tier++) {
            char *dir;
            moec_model *m = tiny_model(&dir, &tiny[i]);
            size_t n1, n2;
            char *one = statistics(&n1, m, x, 1, tier, 0), *two = statistics(&n2, m, x, 2, tier, 0);
            assert_int_equal(n1, n2);
            assert_memory_equal(one, two, n1);
            moec_free(one);
            moec_free(two);
            moec_model_close(m);
            tiny_remove(dir);
            moec_free(dir);
        }
    free(x);
}

/* ---- losses -------------------------------------------------------------------------------------------------------- */

static void a_model_is_equal_to_itself(void **state)
{
    moec_err err = {MOEC_OK, ""};
    moec_model *m = open_model(DEMO);
    text *x = calloc(1, sizeof *x);
    moec_final *a, *b;
    moec_scores s;
    double mean = 0;
    (void)state;
    assert_non_null(x);
    add_window(x, 0, expected_ids, MOEC_COUNT(expected_ids));
    must(moec_final_run(&a, m, &x->corpus, MOEC_COMPUTE_F32, 0, "a", &err), &err);
    must(moec_final_run(&b, m, &x->corpus, MOEC_COMPUTE_F32, 0, "b", &err), &err);
    must(moec_score(&s, a, b, &x->corpus, MOEC_COMPUTE_F32, 0, &err), &err);
    for (size_t t = 0; t < MOEC_COUNT(expected_loss); t++)
        mean += expected_loss[t] / (double)MOEC_COUNT(expected_loss);
    assert_true(fabs(s.overall.cross_entropy - mean) < 1e-5);
    assert_true(fabs(s.overall.kl) < 1e-6 && s.overall.top1 == 1.0 && s.has_base);
    assert_int_equal(s.overall.tokens, MOEC_COUNT(expected_loss));
    moec_scores_release(&s);
    moec_final_free(a);
    moec_final_free(b);
    moec_model_close(m);
    free(x);
}

static void an_id_outside_the_vocabulary_is_refused(void **state)
{
    moec_err err = {MOEC_OK, ""};
    char *dir;
    moec_model *m = tiny_model(&dir, &tiny[0]);
    float h[32];
    const int32_t ids[] = {3, 64}, low[] = {-1};
    (void)state;
    assert_int_equal(moec_forward_embed(h, m, ids, 2, &err), MOEC_EFORMAT);
    assert_non_null(strstr(err.text, "64"));
    assert_int_equal(moec_forward_embed(h, m, low, 1, NULL), MOEC_EFORMAT);
    moec_model_close(m);
    tiny_remove(dir);
    moec_free(dir);
}

/* Products large enough that all threads work in one chunk. */
static void threads_inside_a_chunk_change_no_bit(void **state)
{
    static const tiny_spec wide[] = {
        {.layers = 1, .experts = 4, .hidden = 1024, .width = 1024, .dtype = MOEC_BF16, .seed = 5},
        {.family = "deepseek_v3", .layers = 1, .experts = 4, .hidden = 1024, .width = 1024, .dtype = MOEC_BF16, .seed = 6},
    };
    text *x = calloc(1, sizeof *x);
    (void)state;
    assert_non_null(x);
    random_windows(x, 0, 4, 90, 300, 64);
    for (size_t i = 0; i < MOEC_COUNT(wide); i++) {
        char *dir, *base = NULL;
        moec_model *m = tiny_model(&dir, &wide[i]);
        moec_pass_opts o = options(MOEC_COMPUTE_F32);
        moec_pass_plan plan;
        size_t n_base = 0;
        for (int threads = 1; threads <= 3; threads++) {
            size_t n;
            char *bytes = statistics(&n, m, x, threads, 1, 0);
            moec_par_set_threads(threads);
            moec_free(states(m, x, &o, &plan));
            moec_par_set_threads(0);
            assert_int_equal(plan.workers, 1);
            assert_int_equal(plan.threads, threads);
            if (base) {
                assert_int_equal(n, n_base);
                assert_memory_equal(bytes, base, n);
                moec_free(bytes);
            } else {
                base = bytes;
                n_base = n;
            }
        }
        moec_free(base);
        moec_model_close(m);
        tiny_remove(dir);
        moec_free(dir);
    }
    free(x);
}

static void chunks_grow_with_the_experts(void **state)
{
    moec_dims d = {.hidden = 7168, .experts = 256, .top_k = 8, .expert_width = 2048};
    (void)state;
    assert_int_equal(moec_pass_chunk_tokens(&d, 16384, 2048), 16384);
    assert_int_equal(moec_pass_chunk_tokens(&d, 1 << 20, 2048), 16384);
    assert_int_equal(moec_pass_chunk_tokens(&d, 5000, 2048), 5000);
    d.hidden = 16384;
    assert_int_equal(moec_pass_chunk_tokens(&d, 1 << 20, 2048), 8192); /* 512 MiB */
    d.hidden = d.expert_width = 512; /* as small models always had them */
    assert_int_equal(moec_pass_chunk_tokens(&d, 16384, 2048), 2048);
    assert_int_equal(moec_pass_chunk_tokens(&d, 1 << 20, 2048), 4096);
    assert_int_equal(moec_pass_chunk_tokens(&d, 100, 90), 512);
}

/* A lean pass looks at an expert when it first reads it, another one at the start: the same is said. */
static void a_weight_that_is_not_finite_is_named(void **state)
{
    char *dir;
    moec_model *m = tiny_model(&dir, &tiny[0]);
    moec_weight *w = &m->layer[0].expert[5].down;
    const moec_tensor *good = w->of;
    moec_tensor bad = *good;
    float *values = malloc(bad.bytes), *h = calloc((size_t)(4 * m->dims.hidden), sizeof *h);
    const int64_t seq[] = {0, 4};
    (void)state;
    assert_true(values && h);
    memcpy(values, bad.data, bad.bytes);
    values[7] = NAN;
    bad.data = values;
    w->of = &bad;
    for (int lean = 0; lean < 2; lean++) {
        moec_err err = {MOEC_OK, ""};
        moec_forward *f;
        moec_forward_opts o = {.workers = 1, .max_tokens = 4, .max_seq = 4, .lean = lean};
        must(moec_forward_new(&f, m, &o, &err), &err);
        moec_status st = moec_forward_layer(f, 0, &err);
        assert_int_equal(st, lean ? MOEC_OK : MOEC_ENUMERIC);
        if (lean)
            st = moec_forward_chunk(f, 0, h, NULL, seq, 1, NULL, NULL, &err);
        assert_int_equal(st, MOEC_ENUMERIC);
        assert_non_null(strstr(err.text, "experts.5.down_proj.weight: value 7 is NaN or infinite"));
        moec_forward_free(f);
    }
    w->of = good;
    free(values);
    free(h);
    moec_model_close(m);
    tiny_remove(dir);
    moec_free(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(demo_model_is_as_in_transformers),
        cmocka_unit_test(bf16_is_close_to_f32),
        cmocka_unit_test(same_states_for_any_number_of_threads),
        cmocka_unit_test(a_window_is_the_same_alone_and_among_others),
        cmocka_unit_test(memory_limits_change_no_bit),
        cmocka_unit_test(same_statistics_for_any_number_of_threads),
        cmocka_unit_test(threads_inside_a_chunk_change_no_bit),
        cmocka_unit_test(chunks_grow_with_the_experts),
        cmocka_unit_test(a_weight_that_is_not_finite_is_named),
        cmocka_unit_test(a_model_is_equal_to_itself),
        cmocka_unit_test(an_id_outside_the_vocabulary_is_refused),
    };
    moec_log_set(MOEC_QUIET);
    return cmocka_run_group_tests_name("forward", tests, NULL, NULL);
}
