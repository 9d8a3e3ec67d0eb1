/* Every family of the table, on the small checkpoint of tests/support/tiny.h: it opens, runs, gives the logits that
 * transformers gives (tests/interop/make_expected.py), and the same bits for any number of threads, alone or among others. */
#include "base/log.h"
#include "base/mem.h"
#include "base/par.h"
#include "calib/final.h"
#include "tiny.h"
#include "unit/data/families_expected.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void must(moec_status st, const moec_err *err)
{
    if (st != MOEC_OK)
        print_error("%s\n", err->text);
    assert_int_equal(st, MOEC_OK);
}

static moec_model *open_family(char **dir, const char *family)
{
    moec_err err = {MOEC_OK, ""};
    moec_model *m;
    const tiny_spec spec = tiny_of(family);
    *dir = tiny_folder();
    must(tiny_write(*dir, &spec, &err), &err);
    must(moec_model_open(&m, *dir, &err), &err);
    return m;
}

static void close_family(moec_model *m, char *dir)
{
    moec_model_close(m);
    tiny_remove(dir);
    moec_free(dir);
}

/* Windows of `ids` that end at `ends`, as one domain. */
typedef struct text {
    moec_corpus corpus;
    moec_domain domain;
    char name[8];
    int64_t start[8];
    int32_t ids[256];
} text;

static void set_text(text *x, const int64_t *ends, size_t n, const int32_t *ids)
{
    memset(x, 0, sizeof *x);
    memcpy(x->name, "text", sizeof "text");
    memcpy(x->ids, ids, (size_t)ends[n - 1] * sizeof *ids);
    memcpy(x->start + 1, ends, n * sizeof *ends);
    x->domain = (moec_domain){.name = x->name, .path = x->name, .weight = 1.0, .ids = x->ids, .n_ids = ends[n - 1],
                              .n_windows = (int64_t)n, .start = x->start};
    x->corpus = (moec_corpus){1, &x->domain};
}

/* Final hidden states behind the norm, [tokens, hidden]; `f` may be NULL. */
static float *final_states(const moec_model *m, const text *x, moec_final **f)
{
    moec_err err = {MOEC_OK, ""};
    moec_final *own;
    float *rows = NULL;
    must(moec_final_run(&own, m, &x->corpus, MOEC_COMPUTE_F32, 0, "test", &err), &err);
    must(MOEC_NEW(rows, (size_t)(x->domain.n_ids * m->dims.hidden), &err), &err);
    must(moec__final_rows(rows, own, 0, x->domain.n_ids, &err), &err);
    if (f)
        *f = own;
    else
        moec_final_free(own);
    return rows;
}

static const families_row *expected_of(const char *family)
{
    for (size_t i = 0; i < MOEC_COUNT(families_expected); i++)
        if (strcmp(families_expected[i].family, family) == 0)
            return &families_expected[i];
    return NULL;
}

/* The logits that families_expected.h has: of token (37 i + 3) mod T for id (29 i + 1) mod vocab. */
static double worst_logit(const moec_model *m, const text *x, const families_row *want)
{
    moec_final *f;
    float *rows = final_states(m, x, &f), head[1024];
    const int64_t H = m->dims.hidden;
    double worst = 0, scale = 0;
    assert_true(H <= (int64_t)MOEC_COUNT(head));
    for (size_t i = 0; i < MOEC_COUNT(want->logit); i++) {
        int64_t t = (37 * (int64_t)i + 3) % x->domain.n_ids, v = (29 * (int64_t)i + 1) % m->dims.vocab;
        double z = f->bias ? (double)f->bias[v] : 0.0;
        moec_weight_read(head, H, &f->head, v, 1, 0, H);
        for (int64_t j = 0; j < H; j++)
            z += (double)rows[t * H + j] * (double)head[j];
        assert_true(isfinite(z));
        worst = fmax(worst, fabs(z - (double)want->logit[i]));
        scale = fmax(scale, fabs((double)want->logit[i]));
    }
    moec_final_free(f);
    moec_free(rows);
    return worst / scale;
}

static void logits_are_those_of_transformers(void **state)
{
    text x;
    int wrong = 0;
    (void)state;
    set_text(&x, families_ends, MOEC_COUNT(families_ends), families_ids);
    for (int i = 0; moec_family_at(i); i++) {
        const char *family = moec_family_at(i)->model_type;
        const families_row *want = expected_of(family);
        char *dir;
        moec_model *m = open_family(&dir, family);
        if (!want && strcmp(family, "qwen3_vl_moe_text") == 0) {
            ; /* transformers loads it as a part of a multimodal model only; tests/interop/test_families.py has it */
        } else if (!want) {
            print_error("%s: not in families_expected.h, run tests/interop/make_expected.py\n", family);
            wrong++;
        } else {
            double off = worst_logit(m, &x, want);
            if (!(off <= 1e-4)) {
                print_error("%s: logits differ by %.2g of the largest\n", family, off);
                wrong++;
            }
        }
        close_family(m, dir);
    }
    assert_int_equal(wrong, 0);
}

static void same_states_for_any_number_of_threads(void **state)
{
    text x;
    (void)state;
    set_text(&x, families_ends, MOEC_COUNT(families_ends), families_ids);
    for (int i = 0; moec_family_at(i); i++) {
        char *dir;
        moec_model *m = open_family(&dir, moec_family_at(i)->model_type);
        float *first = NULL;
        for (int threads = 1; threads <= 3; threads++) {
            moec_par_set_threads(threads);
            float *rows = final_states(m, &x, NULL);
            if (first)
                assert_memory_equal(first, rows, (size_t)(x.domain.n_ids * m->dims.hidden) * sizeof *rows);
            else
                first = rows;
            if (rows != first)
                moec_free(rows);
        }
        moec_par_set_threads(0);
        moec_free(first);
        close_family(m, dir);
    }
}

static void a_window_is_the_same_alone_and_among_others(void **state)
{
    text x, one;
    (void)state;
    set_text(&x, families_ends, MOEC_COUNT(families_ends), families_ids);
    for (int i = 0; moec_family_at(i); i++) {
        char *dir;
        moec_model *m = open_family(&dir, moec_family_at(i)->model_type);
        float *all = final_states(m, &x, NULL);
        for (size_t w = 0; w < MOEC_COUNT(families_ends); w++) {
            int64_t at = x.start[w], n = x.start[w + 1] - at;
            set_text(&one, &n, 1, families_ids + at);
            float *rows = final_states(m, &one, NULL);
            assert_memory_equal(all + at * m->dims.hidden, rows, (size_t)(n * m->dims.hidden) * sizeof *rows);
            moec_free(rows);
        }
        moec_free(all);
        close_family(m, dir);
    }
}

/* Every set has a router of E rows, every part of a stack and every expert's tensor is one of E. */
static void places_add_up(void **state)
{
    moec_err err = {MOEC_OK, ""};
    (void)state;
    for (int i = 0; moec_family_at(i); i++) {
        char *dir;
        moec_model *m = open_family(&dir, moec_family_at(i)->model_type);
        moec_place *place;
        bool *used;
        assert_true(m->moe_layers > 0 && m->sets >= m->moe_layers);
        for (int64_t s = 0; s < m->sets; s++)
            assert_int_equal(m->set[s].router->rows, m->dims.experts);
        must(moec_model_places(&place, m, &err), &err);
        must(moec_model_used(&used, m, &err), &err);
        for (size_t t = 0; t < moec_ckpt_count(m->ckpt); t++) {
            const moec_tensor *tensor = moec_ckpt_at(m->ckpt, t);
            if (!used[t])
                print_error("%s: %s is not used\n", m->family->model_type, tensor->name);
            assert_true(used[t]);
            if (place[t].role == MOEC_ROLE_STACK)
                assert_int_equal((tensor->dim[place[t].axis] - place[t].tail) % m->dims.experts, 0);
            if (place[t].role != MOEC_ROLE_OTHER)
                assert_in_range(place[t].set, 0, m->sets - 1);
        }
        moec_free(place);
        moec_free(used);
        close_family(m, dir);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(logits_are_those_of_transformers),
        cmocka_unit_test(same_states_for_any_number_of_threads),
        cmocka_unit_test(a_window_is_the_same_alone_and_among_others),
        cmocka_unit_test(places_add_up),
    };
    moec_log_set(MOEC_QUIET);
    return cmocka_run_group_tests_name("families", tests, NULL, NULL);
}
