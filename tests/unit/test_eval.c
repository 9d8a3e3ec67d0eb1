/* Losses against a plain double-precision computation from the same final states; reference files; standard errors. */
#include "calib/final.h"

#include "base/file.h"
#include "base/mem.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define DEMO MOEC_SOURCE_DIR "/recipes/demo-model"

/* Two domains with windows of unequal length. */
static int32_t ids_a[90], ids_b[41];
static int64_t start_a[] = {0, 32, 64, 90}, start_b[] = {0, 32, 41};
static char name_a[] = "a", name_b[] = "b";
static moec_domain domains[2];
static moec_corpus corpus = {2, domains};

static int set_up(void **state)
{
    uint32_t x = 7;
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(ids_a) + MOEC_COUNT(ids_b); i++) {
        x = x * 1664525u + 1013904223u;
        int32_t id = (int32_t)((x >> 8) % 4000u);
        if (i < MOEC_COUNT(ids_a))
            ids_a[i] = id;
        else
            ids_b[i - MOEC_COUNT(ids_a)] = id;
    }
    domains[0] = (moec_domain){.name = name_a, .path = name_a, .weight = 1, .ids = ids_a, .n_ids = 90, .start = start_a,
                               .n_windows = 3};
    domains[1] = (moec_domain){.name = name_b, .path = name_b, .weight = 1, .ids = ids_b, .n_ids = 41, .start = start_b,
                               .n_windows = 2};
    return 0;
}

static moec_final *run_demo(const char *dir, moec_model **m)
{
    moec_err err = {MOEC_OK, ""};
    moec_final *f = NULL;
    assert_int_equal(moec_model_open(m, dir, &err), MOEC_OK);
    assert_int_equal(moec_final_run(&f, *m, &corpus, MOEC_COMPUTE_F32, 0, "test", &err), MOEC_OK);
    return f;
}

/* log-probabilities of one token in double precision. */
static void log_probs(double *out, const moec_final *f, int64_t t)
{
    moec_err err = {MOEC_OK, ""};
    float *x = malloc((size_t)f->hidden * sizeof *x), *w = malloc((size_t)f->hidden * sizeof *w);
    double top = -INFINITY, sum = 0;
    assert_int_equal(moec__final_rows(x, f, t, 1, &err), MOEC_OK);
    for (int64_t v = 0; v < f->vocab; v++) {
        moec_weight_read(w, f->hidden, &f->head, v, 1, 0, f->hidden);
        out[v] = 0;
        for (int64_t i = 0; i < f->hidden; i++)
            out[v] += (double)x[i] * (double)w[i];
        out[v] += f->bias ? (double)f->bias[v] : 0.0;
        top = fmax(top, out[v]);
    }
    for (int64_t v = 0; v < f->vocab; v++)
        sum += exp(out[v] - top);
    for (int64_t v = 0; v < f->vocab; v++)
        out[v] -= top + log(sum);
    free(x);
    free(w);
}

static int64_t argmax(const double *v, int64_t n)
{
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        best = v[i] > v[best] ? i : best;
    return best;
}

/* A second model: the first with its states perturbed, so that KL is neither 0 nor large. */
static moec_final *perturbed(const moec_final *f)
{
    moec_err err = {MOEC_OK, ""};
    moec_final *g = calloc(1, sizeof *g);
    *g = *f;
    g->store = NULL;
    g->norm = NULL;
    g->bias = NULL;
    float *x = malloc((size_t)(f->tokens * f->hidden) * sizeof *x);
    assert_int_equal(moec__final_rows(x, f, 0, f->tokens, &err), MOEC_OK);
    for (int64_t i = 0; i < f->tokens * f->hidden; i++)
        x[i] += 0.2f * sinf((float)i);
    g->rows = (const char *)x;
    return g;
}

static void check_against_double(const moec_scores *s, const moec_final *m, const moec_final *b)
{
    double *pm = malloc((size_t)m->vocab * sizeof *pm), *pb = malloc((size_t)b->vocab * sizeof *pb);
    double ce[2] = {0, 0}, kl[2] = {0, 0}, same[2] = {0, 0}, n[2] = {0, 0};
    int64_t t = 0;
    for (int d = 0; d < 2; d++)
        for (int64_t w = 0; w < domains[d].n_windows; w++)
            for (int64_t i = domains[d].start[w]; i < domains[d].start[w + 1]; i++, t++) {
                if (i + 1 == domains[d].start[w + 1])
                    continue;
                log_probs(pm, m, t);
                log_probs(pb, b, t);
                ce[d] -= pm[domains[d].ids[i + 1]];
                for (int64_t v = 0; v < m->vocab; v++)
                    kl[d] += exp(pb[v]) * (pb[v] - pm[v]);
                same[d] += argmax(pm, m->vocab) == argmax(pb, m->vocab);
                n[d]++;
            }
    for (int d = 0; d < 2; d++) {
        assert_int_equal(s->domain[d].tokens, (uint64_t)n[d]);
        assert_true(fabs(s->domain[d].cross_entropy - ce[d] / n[d]) < 2e-5);
        assert_true(fabs(s->domain[d].kl - kl[d] / n[d]) < 2e-5);
        assert_true(fabs(s->domain[d].top1 - same[d] / n[d]) < 1e-12);
    }
    assert_true(fabs(s->overall.cross_entropy - (ce[0] + ce[1]) / (n[0] + n[1])) < 2e-5);
    assert_true(s->overall.kl > 0.001);
    free(pm);
    free(pb);
}

static void losses_equal_double_precision(void **state)
{
    (void)state;
    moec_err err = {MOEC_OK, ""};
    moec_model *model;
    moec_scores s;
    moec_final *base = run_demo(DEMO, &model), *other = perturbed(base);
    assert_int_equal(moec_score(&s, other, base, &corpus, MOEC_COMPUTE_F32, 0, &err), MOEC_OK);
    assert_true(s.has_base);
    check_against_double(&s, other, base);
    /* pages given back or not: the same */
    moec_scores lean;
    assert_int_equal(moec_score(&lean, other, base, &corpus, MOEC_COMPUTE_F32, 1, &err), MOEC_OK);
    assert_memory_equal(&lean.overall, &s.overall, sizeof s.overall);
    moec_scores_release(&lean);
    moec_scores_release(&s);
    free((void *)(uintptr_t)other->rows);
    free(other);
    moec_final_free(base);
    moec_model_close(model);
}

static void a_model_equals_itself(void **state)
{
    (void)state;
    moec_err err = {MOEC_OK, ""};
    moec_model *model;
    moec_scores s;
    moec_final *f = run_demo(DEMO, &model);
    assert_int_equal(moec_score(&s, f, f, &corpus, MOEC_COMPUTE_F32, 0, &err), MOEC_OK);
    assert_true(fabs(s.overall.kl) < 1e-9);
    assert_true(s.overall.top1 == 1.0);
    moec_scores_release(&s);
    assert_int_equal(moec_score(&s, f, NULL, &corpus, MOEC_COMPUTE_F32, 0, &err), MOEC_OK);
    assert_false(s.has_base);
    moec_json *j = moec_scores_json(&s, &corpus);
    assert_null(moec_json_get(moec_json_get(j, "overall"), "kl"));
    assert_non_null(moec_json_get(moec_json_get(moec_json_get(j, "domains"), "b"), "perplexity"));
    moec_json_free(j);
    moec_scores_release(&s);
    moec_final_free(f);
    moec_model_close(model);
}

static void standard_error_is_the_ratio_estimators(void **state)
{
    (void)state;
    moec_err err = {MOEC_OK, ""};
    moec_model *model;
    moec_scores s;
    moec_final *f = run_demo(DEMO, &model);
    double *p = malloc((size_t)f->vocab * sizeof *p), sum[5], n[5], total = 0, count = 0, square = 0;
    int64_t t = 0;
    int k = 0;
    assert_int_equal(moec_score(&s, f, NULL, &corpus, MOEC_COMPUTE_F32, 0, &err), MOEC_OK);
    for (int d = 0; d < 2; d++)
        for (int64_t w = 0; w < domains[d].n_windows; w++, k++) {
            sum[k] = n[k] = 0;
            for (int64_t i = domains[d].start[w]; i < domains[d].start[w + 1]; i++, t++) {
                if (i + 1 == domains[d].start[w + 1])
                    continue;
                log_probs(p, f, t);
                sum[k] -= p[domains[d].ids[i + 1]];
                n[k]++;
            }
            total += sum[k];
            count += n[k];
        }
    for (int i = 0; i < 5; i++)
        square += pow(sum[i] - total / count * n[i], 2);
    assert_true(fabs(s.overall.cross_entropy_se - sqrt(5.0 / 4.0 * square) / count) < 1e-5);
    free(p);
    moec_scores_release(&s);
    moec_final_free(f);
    moec_model_close(model);
}

static void reference_file_stands_for_the_model(void **state)
{
    (void)state;
    moec_err err = {MOEC_OK, ""};
    char dir[] = "/tmp/moec-eval-XXXXXX", path[64];
    moec_model *model;
    moec_final *loaded = NULL;
    moec_scores a, b;
    assert_non_null(mkdtemp(dir));
    snprintf(path, sizeof path, "%s/ref", dir);
    moec_final *f = run_demo(DEMO, &model), *other = perturbed(f);
    assert_int_equal(moec_final_save(f, &corpus, path, &err), MOEC_OK);
    assert_int_equal(moec_final_save(f, &corpus, path, &err), MOEC_EEXIST);
    assert_int_equal(moec_final_load(&loaded, &corpus, path, &err), MOEC_OK);
    assert_int_equal(moec_score(&a, other, f, &corpus, MOEC_COMPUTE_F32, 0, &err), MOEC_OK);
    assert_int_equal(moec_score(&b, other, loaded, &corpus, MOEC_COMPUTE_F32, 0, &err), MOEC_OK);
    assert_memory_equal(&a.overall, &b.overall, sizeof a.overall);
    moec_final_free(loaded);
    ids_a[3]++; /* other text */
    assert_int_equal(moec_final_load(&loaded, &corpus, path, &err), MOEC_EFORMAT);
    ids_a[3]--;
    assert_int_equal(truncate(path, 1000), 0);
    assert_int_equal(moec_final_load(&loaded, &corpus, path, &err), MOEC_EFORMAT);
    assert_int_equal(moec_final_load(&loaded, &corpus, DEMO "/config.json", &err), MOEC_EFORMAT);
    assert_int_equal(moec_final_load(&loaded, &corpus, DEMO "/model-00001-of-00003.safetensors", &err), MOEC_EFORMAT);
    assert_null(loaded);
    moec_scores_release(&a);
    moec_scores_release(&b);
    free((void *)(uintptr_t)other->rows);
    free(other);
    moec_final_free(f);
    moec_model_close(model);
    assert_int_equal(moec_dir_remove(dir, &err), MOEC_OK);
}

/* A head with a bias and divided logits, behind a LayerNorm: as computed in double precision, and from a reference file. */
static void bias_and_divisor_are_part_of_the_head(void **state)
{
    (void)state;
    moec_err err = {MOEC_OK, ""};
    char dir[] = "/tmp/moec-eval-XXXXXX", path[64];
    moec_model *model;
    moec_final *loaded = NULL;
    moec_scores a, b;
    float plain, now;
    assert_non_null(mkdtemp(dir));
    snprintf(path, sizeof path, "%s/ref", dir);
    moec_final *f = run_demo(DEMO, &model), *other = perturbed(f);
    float *x = malloc((size_t)f->hidden * sizeof *x);
    assert_int_equal(moec__final_rows(x, f, 5, 1, &err), MOEC_OK);
    plain = x[3];
    f->divisor = 3.0f;
    assert_int_equal(moec__final_rows(x, f, 5, 1, &err), MOEC_OK);
    assert_true(fabsf(x[3] - plain / 3.0f) <= 1e-6f * fabsf(plain));
    f->layer_norm = true;
    assert_int_equal(MOEC_NEW(f->norm_bias, (size_t)f->hidden, &err), MOEC_OK);
    assert_int_equal(moec__final_rows(x, f, 5, 1, &err), MOEC_OK);
    now = x[3];
    f->norm_bias[3] = 6.0f;
    assert_int_equal(moec__final_rows(x, f, 5, 1, &err), MOEC_OK);
    assert_true(fabsf(x[3] - now - 2.0f) < 1e-5f);
    free(x);
    assert_int_equal(MOEC_NEW(f->bias, (size_t)f->vocab, &err), MOEC_OK);
    for (int64_t v = 0; v < f->vocab; v++)
        f->bias[v] = sinf((float)v);
    assert_int_equal(moec_score(&a, other, f, &corpus, MOEC_COMPUTE_F32, 0, &err), MOEC_OK);
    check_against_double(&a, other, f);
    assert_int_equal(moec_final_save(f, &corpus, path, &err), MOEC_OK);
    assert_int_equal(moec_final_load(&loaded, &corpus, path, &err), MOEC_OK);
    assert_int_equal(moec_score(&b, other, loaded, &corpus, MOEC_COMPUTE_F32, 0, &err), MOEC_OK);
    assert_memory_equal(&a.overall, &b.overall, sizeof a.overall);
    moec_scores_release(&a);
    moec_scores_release(&b);
    moec_final_free(loaded);
    free((void *)(uintptr_t)other->rows);
    free(other);
    moec_final_free(f);
    moec_model_close(model);
    assert_int_equal(moec_dir_remove(dir, &err), MOEC_OK);
}

/* Finite states whose logits overflow, and states of a reference file that are not finite: no number is printed for them. */
static void losses_that_are_not_finite_are_errors(void **state)
{
    moec_err err = {MOEC_OK, ""};
    moec_scores s;
    float *rows = calloc(131 * 4, sizeof *rows), head[4096 * 4];
    (void)state;
    assert_non_null(rows);
    for (int i = 0; i < 131 * 4; i++)
        rows[i] = 1e30f;
    for (int i = 0; i < 4096 * 4; i++)
        head[i] = i % 2 ? 1e30f : -1e30f;
    const moec_tensor t = {.name = "head", .dtype = MOEC_F32, .rank = 2, .dim = {4096, 4}, .data = head, .bytes = sizeof head};
    moec_final f = {.tokens = 131, .hidden = 4, .vocab = 4096, .rows = (const char *)rows, .head = moec_weight_of(&t)};
    assert_int_equal(moec_score(&s, &f, NULL, &corpus, MOEC_COMPUTE_F32, 0, &err), MOEC_ENUMERIC);
    assert_non_null(strstr(err.text, "the loss is not finite"));
    rows[9] = NAN;
    assert_int_equal(moec_score(&s, &f, NULL, &corpus, MOEC_COMPUTE_F32, 0, &err), MOEC_ENUMERIC);
    assert_non_null(strstr(err.text, "hidden state is not finite"));
    free(rows);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(losses_equal_double_precision),
        cmocka_unit_test(a_model_equals_itself),
        cmocka_unit_test(standard_error_is_the_ratio_estimators),
        cmocka_unit_test(reference_file_stands_for_the_model),
        cmocka_unit_test(bias_and_divisor_are_part_of_the_head),
        cmocka_unit_test(losses_that_are_not_finite_are_errors),
    };
    return cmocka_run_group_tests(tests, set_up, NULL);
}
