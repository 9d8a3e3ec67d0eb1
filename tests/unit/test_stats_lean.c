/* Statistics whose sums stay in the file: every part of every kind is what the whole load has, damage and forged values are refused,
 * and what is computed from them is the same. */
#include "base/mem.h"
#include "calib/calibrate.h"
#include "calib/stats_internal.h"
#include "ckpt/seal.h"
#include "run/gguf_importance.h"
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
static char name_a[] = "z/%", name_b[] = "a";
static moec_domain domains[2];
static moec_corpus corpus = {2, domains};
static char *folder, *source, *stats_path, *bad_path;
static moec_model *model;

static int set_up(void **state)
{
    (void)state;
    const tiny_spec spec = {.family = "qwen3_moe", .layers = 3, .hidden = 32, .experts = 8, .width = 8, .untied = true};
    const moec_calibrate_opts o = {.options = "{}", .tier = 1};
    moec_err err = {MOEC_OK, ""};
    folder = tiny_folder();
    source = tiny_path(folder, "source");
    stats_path = tiny_path(folder, "stats.h5");
    bad_path = tiny_path(folder, "bad.h5");
    for (uint32_t i = 0, x = 7; i < N; i++) {
        x = x * 1664525u + 1013904223u;
        ids[i] = (int32_t)((x >> 8) % 60u);
    }
    domains[0] = (moec_domain){.name = name_a, .path = name_a, .weight = 1, .ids = ids, .n_ids = 26, .start = start_a, .n_windows = 2};
    domains[1] = (moec_domain){.name = name_b, .path = name_b, .weight = 2, .ids = ids + 26, .n_ids = 34, .start = start_b,
                               .n_windows = 2};
    if (tiny_write(source, &spec, &err) == MOEC_OK && moec_model_open(&model, source, &err) == MOEC_OK &&
        moec_calibrate(NULL, model, &corpus, stats_path, &o, &err) == MOEC_OK)
        return 0;
    fprintf(stderr, "%s\n", err.text);
    return 1;
}

static int tear_down(void **state)
{
    (void)state;
    moec_model_close(model);
    tiny_remove(folder);
    char *all[] = {folder, source, stats_path, bad_path};
    for (size_t i = 0; i < MOEC_COUNT(all); i++)
        moec_free(all[i]);
    return 0;
}

static moec_stats *load(bool lean)
{
    moec_err err = {MOEC_OK, ""};
    moec_stats *s;
    if ((lean ? moec_stats_load_lean : moec_stats_load)(&s, stats_path, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    return s;
}

/* All of a block at once and row by row; the first axis is that of rows. */
static void compare(const moec_stats *whole, const moec_stats *s, int d, moec_stat k, int64_t l)
{
    int64_t dim[MOEC_STATS_MAX_RANK];
    const int rank = moec__stat_dims(&whole->meta, k, dim), at = moec_stat_kinds[k].layers > 0;
    const int64_t rows = at < rank ? dim[at] : 1;
    const size_t bytes = (size_t)moec_stat_cells(&whole->meta, k) * moec_cell_bytes(moec_stat_kinds[k].cell), each = bytes / (size_t)rows;
    const char *want = moec_stat_at(whole, d, k, l);
    char *got;
    assert_int_equal(moec_alloc((void **)&got, bytes, 1, NULL), MOEC_OK);
    assert_int_equal(moec_stats_fetch(got, s, d, k, l, 0, rows, NULL), MOEC_OK);
    assert_memory_equal(got, want, bytes);
    for (int64_t r = 0; r < rows && r < 10; r++) {
        assert_int_equal(moec_stats_fetch(got, s, d, k, l, r, 1, NULL), MOEC_OK);
        assert_memory_equal(got, want + (size_t)r * each, each);
    }
    assert_int_equal(moec_stats_fetch(got, s, d, k, l, rows, 1, NULL), MOEC_EINVAL);
    assert_int_equal(moec_stats_fetch(got, s, d, k, l, 0, rows + 1, NULL), MOEC_EINVAL);
    assert_int_equal(moec_stats_fetch(got, s, d, k, l, -1, 1, NULL), MOEC_EINVAL);
    if (at)
        assert_int_equal(moec_stats_fetch(got, s, d, k, moec_stat_blocks(&whole->meta, k), 0, 1, NULL), MOEC_EINVAL);
    moec_free(got);
}

static void parts_are_those_of_the_whole(void **state)
{
    (void)state;
    moec_stats *whole = load(false), *s = load(true);
    double cell;
    assert_int_equal(s->n_domains, 2);
    for (int d = 0; d < 2; d++) {
        assert_string_equal(s->domain[d].name, whole->domain[d].name);
        assert_string_equal(s->domain[d].digest, whole->domain[d].digest);
        assert_true(s->domain[d].tokens == whole->domain[d].tokens);
    }
    for (int k = 0; k < MOEC_STAT_COUNT; k++) {
        const bool there = whole->domain[0].data[k] != NULL;
        assert_int_equal(moec_stats_holds(whole, (moec_stat)k), there);
        assert_int_equal(moec_stats_holds(s, (moec_stat)k), there);
        if (!there)
            assert_int_equal(moec_stats_fetch(&cell, s, 0, (moec_stat)k, 0, 0, 1, NULL), MOEC_EFORMAT);
        for (int d = 0; there && d < 2; d++) {
            assert_true((s->domain[d].data[k] != NULL) == (k == MOEC_STAT_SELECTED));
            for (int64_t l = 0; l < moec_stat_blocks(&whole->meta, (moec_stat)k); l++) {
                compare(whole, s, d, (moec_stat)k, l);
                compare(whole, whole, d, (moec_stat)k, l);
            }
        }
    }
    assert_true(moec_stats_memory(s) == 2 * 3 * 8 * sizeof(uint64_t) && moec_stats_memory(whole) > 100 * moec_stats_memory(s));
    assert_int_equal(moec_stats_check(s, model, NULL), MOEC_OK);
    assert_int_equal(moec_stats_save(s, bad_path, NULL), MOEC_EINVAL); /* most of it would be lost */
    assert_int_equal(moec_stats_merge(whole, s, NULL, NULL), MOEC_EINVAL);
    moec_stats_free(whole);
    moec_stats_free(s);
}

static void importance_is_the_same(void **state)
{
    (void)state;
    moec_stats *whole = load(false), *s = load(true);
    moec_gguf_model *x;
    moec_gguf_importance *p, *q;
    assert_int_equal(moec_gguf_model_new(&x, model, MOEC_GGML_F16, NULL), MOEC_OK);
    assert_int_equal(moec_gguf_importance_new(&p, x, whole, NULL), MOEC_OK);
    assert_int_equal(moec_gguf_importance_new(&q, x, s, NULL), MOEC_OK);
    moec_stats_free(s); /* nothing is borrowed */
    int found = 0;
    for (size_t i = 0; i < moec_gguf_model_count(x); i++) {
        const moec_gguf_tensor *t = moec_gguf_model_at(x, i);
        for (int64_t r = 0; r < t->dim[1] * t->dim[2]; r++) {
            const float *a = moec_gguf_importance_row(p, i, r), *b = moec_gguf_importance_row(q, i, r);
            assert_true(!a == !b);
            if (a)
                assert_memory_equal(a, b, (size_t)t->dim[0] * sizeof *a);
            found += a != NULL;
        }
        moec_gguf_importance_drop(q, i, t->dim[1] * t->dim[2]);
    }
    assert_int_equal(found, 3 * 8 * (8 + 8 + 32));
    assert_true(moec_gguf_importance_unseen(p) == moec_gguf_importance_unseen(q));
    moec_gguf_importance_free(p);
    moec_gguf_importance_free(q);
    moec_gguf_model_free(x);
    moec_stats_free(whole);
}

/* Bytes at `at` of a copy become `bytes`; sealed anew where asked. */
static void forge(const char *from, const void *bytes, size_t n, long at, bool seal)
{
    static char copy[1 << 20];
    FILE *f = fopen(from, "rb");
    assert_non_null(f);
    const size_t len = fread(copy, 1, sizeof copy, f);
    fclose(f);
    assert_true(len < sizeof copy && at >= 0 && (size_t)at + n <= len);
    memcpy(copy + at, bytes, n);
    f = fopen(bad_path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(copy, 1, len, f), len);
    assert_int_equal(fclose(f), 0);
    if (seal)
        assert_int_equal(moec_seal_write(bad_path, MOEC_STATS_TITLE, NULL), MOEC_OK);
}

/* Where a row of float64 stands in the file; sums of tier 1 are plain. */
static long place_of(const double *row, size_t n)
{
    static char bytes[1 << 20];
    FILE *f = fopen(stats_path, "rb");
    assert_non_null(f);
    const size_t len = fread(bytes, 1, sizeof bytes, f);
    fclose(f);
    for (size_t at = 0; at + n * sizeof *row <= len; at++)
        if (memcmp(bytes + at, row, n * sizeof *row) == 0)
            return (long)at;
    return -1;
}

static void damage_is_refused(void **state)
{
    (void)state;
    moec_err err = {MOEC_OK, ""};
    moec_stats *whole = load(false), *s;
    moec_gguf_model *x;
    moec_gguf_importance *p;
    double block[8 * 32];
    const double wrong[] = {(double)NAN, (double)INFINITY, -1.0};
    const uint64_t *n = moec_stat_at(whole, 1, MOEC_STAT_SELECTED, 2);
    int64_t e = 0;
    while (n[e] == 0)
        e++;
    const long at = place_of((const double *)moec_stat_at(whole, 1, MOEC_STAT_XIN_SQ, 2) + e * 32, 32);
    assert_true(at > 0);
    forge(stats_path, &wrong[2], sizeof wrong[0], at, false);
    assert_int_equal(moec_stats_load_lean(&s, bad_path, &err), MOEC_EFORMAT); /* its seal */
    assert_null(s);
    assert_int_equal(moec_gguf_model_new(&x, model, MOEC_GGML_F16, NULL), MOEC_OK);
    for (size_t i = 0; i < MOEC_COUNT(wrong); i++) {
        forge(stats_path, &wrong[i], sizeof wrong[i], at, true);
        assert_int_equal(moec_stats_load(&s, bad_path, &err), MOEC_EFORMAT);
        assert_int_equal(moec_stats_load_lean(&s, bad_path, &err), MOEC_OK);
        assert_int_equal(moec_stats_fetch(block, s, 1, MOEC_STAT_XIN_SQ, 1, 0, 8, &err), MOEC_OK);
        assert_int_equal(moec_stats_fetch(block, s, 1, MOEC_STAT_XIN_SQ, 2, 0, 8, &err), MOEC_EFORMAT);
        char place[80];
        snprintf(place, sizeof place, "xin_sq: layer 2, expert %d: is", (int)e);
        if (!strstr(err.text, place))
            fail_msg("%s lacks '%s'", err.text, place);
        assert_int_equal(moec_gguf_importance_new(&p, x, s, &err), MOEC_EFORMAT);
        assert_null(p);
        moec_stats_free(s);
    }
    moec_gguf_model_free(x);
    moec_stats_free(whole);
}

static void memory_may_run_out(void **state)
{
    (void)state;
    moec_status st = MOEC_ENOMEM;
    moec_gguf_model *x;
    assert_int_equal(moec_gguf_model_new(&x, model, MOEC_GGML_F16, NULL), MOEC_OK);
    for (long i = 0; st != MOEC_OK; i += 1 + i / 16) {
        moec_err err = {MOEC_OK, ""};
        moec_stats *s = NULL;
        moec_gguf_importance *p = NULL;
        moec_test_allocs_left = i;
        st = moec_stats_load_lean(&s, stats_path, &err);
        if (st == MOEC_OK)
            st = moec_gguf_importance_new(&p, x, s, &err);
        moec_test_allocs_left = LONG_MAX;
        if (st != MOEC_OK && st != MOEC_ENOMEM)
            fail_msg("%ld allocations: %s", i, err.text);
        moec_gguf_importance_free(p);
        moec_stats_free(s);
        assert_true(i < 100000);
    }
    moec_gguf_model_free(x);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(parts_are_those_of_the_whole), cmocka_unit_test(importance_is_the_same),
                                       cmocka_unit_test(damage_is_refused), cmocka_unit_test(memory_may_run_out)};
    moec_log_set(MOEC_QUIET);
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
