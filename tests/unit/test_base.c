/* The base layer: errors, memory, parallel loops, JSON, files, hashes. */
#include "base/err.h"
#include "base/file.h"
#include "base/hash.h"
#include "base/json.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/par.h"
#include "base/version.h"
#include "base/word.h"

#include <errno.h>
#include <limits.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

/* --- errors ------------------------------------------------------------------------------------------------------- */

static void errors_keep_text_and_code(void **state)
{
    (void)state;
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_fail(&err, MOEC_ESHAPE, "w is [%d], expected [%d]", 3, 4), MOEC_ESHAPE);
    assert_int_equal(err.code, MOEC_ESHAPE);
    assert_string_equal(err.text, "w is [3], expected [4]");
    assert_int_equal(moec_within(&err, MOEC_ESHAPE, "layer %d", 7), MOEC_ESHAPE);
    assert_string_equal(err.text, "layer 7: w is [3], expected [4]");
    assert_int_equal(moec_within(&err, MOEC_OK, "nothing"), MOEC_OK);
    assert_string_equal(err.text, "layer 7: w is [3], expected [4]");
    assert_int_equal(moec_fail(NULL, MOEC_EIO, "nobody listens"), MOEC_EIO);
    assert_int_equal(moec_within(NULL, MOEC_EIO, "nobody listens"), MOEC_EIO);
}

static void errors_are_one_bounded_line(void **state)
{
    (void)state;
    moec_err err;
    char longer[3000];
    memset(longer, 'x', sizeof longer - 1);
    longer[sizeof longer - 1] = '\0';
    moec_fail(&err, MOEC_EFORMAT, "%s", longer);
    assert_int_equal(strlen(err.text), sizeof err.text - 1);
    moec_fail(&err, MOEC_EFORMAT, "name 'a\nb\x1b[2Jc'");
    assert_string_equal(err.text, "name 'a?b?[2Jc'");
}

static void controls_do_not_reach_the_terminal(void **state)
{
    moec_err err;
    (void)state;
    moec_fail(&err, MOEC_EFORMAT, "a\x1b[2Jb\nc\xc2\x9b" "2Jd \xc3\xa9 \xc2\xa9");
    assert_string_equal(err.text, "a?[2Jb?c??2Jd \xc3\xa9 \xc2\xa9");
}

static void every_status_has_an_exit_code(void **state)
{
    (void)state;
    static const int want[MOEC_STATUS_COUNT] = {0, 2, 1, 3, 3, 3, 3, 4, 4, 5};
    for (int s = 0; s < MOEC_STATUS_COUNT; s++)
        assert_int_equal(moec_exit_code((moec_status)s), want[s]);
    assert_int_equal(moec_exit_code((moec_status)99), 1);
}

/* --- memory ------------------------------------------------------------------------------------------------------- */

static void memory_is_zeroed_and_aligned(void **state)
{
    (void)state;
    static const size_t sizes[] = {1, 63, 64, 65, 4096, 1 << 20, (1 << 20) + 1, 3 << 20};
    for (size_t i = 0; i < MOEC_COUNT(sizes); i++) {
        char *p;
        moec_err err = {MOEC_OK, ""};
        assert_int_equal(MOEC_NEW(p, sizes[i], &err), MOEC_OK);
        assert_int_equal((uintptr_t)p % 64, 0);
        for (size_t k = 0; k < sizes[i]; k++)
            assert_int_equal(p[k], 0);
        memset(p, 1, sizes[i]); /* the next block of this size must not show it */
        moec_free(p);
    }
    void *none = &none;
    assert_int_equal(moec_alloc(&none, 0, 8, NULL), MOEC_OK);
    assert_null(none);
    moec_free(NULL);
}

static void overflow_is_refused(void **state)
{
    (void)state;
    moec_err err = {MOEC_OK, ""};
    void *p = &err;
    size_t n, cap = 0;
    assert_int_equal(moec_alloc(&p, SIZE_MAX / 2, 3, &err), MOEC_ENOMEM);
    assert_null(p);
    assert_int_equal(moec_alloc(&p, SIZE_MAX - 10, 1, &err), MOEC_ENOMEM);
    assert_int_equal(moec_grow(&p, &cap, SIZE_MAX / 4, 8, &err), MOEC_ENOMEM);
    assert_null(p);
    assert_int_equal(cap, 0);
    assert_false(moec_mul_size(&n, SIZE_MAX, 2));
    assert_false(moec_add_size(&n, SIZE_MAX, 1));
    assert_true(moec_mul_size(&n, 6, 7) && n == 42);
    assert_true(moec_add_size(&n, 40, 2) && n == 42);
}

static void arrays_grow(void **state)
{
    (void)state;
    int *a = NULL;
    size_t cap = 0;
    for (size_t i = 0; i < 1000; i++) {
        assert_int_equal(MOEC_GROW(a, cap, i + 1, NULL), MOEC_OK);
        assert_true(cap > i);
        a[i] = (int)i;
    }
    for (int i = 0; i < 1000; i++)
        assert_int_equal(a[i], i);
    moec_free(a);
}

static void texts_are_copied_and_made(void **state)
{
    (void)state;
    char *t;
    assert_int_equal(moec_copy(&t, "abc\0def", 7, NULL), MOEC_OK);
    assert_memory_equal(t, "abc\0def", 8);
    moec_free(t);
    assert_int_equal(moec_copy(&t, NULL, 0, NULL), MOEC_OK);
    assert_string_equal(t, "");
    moec_free(t);
    assert_int_equal(moec_format(&t, NULL, "%s-%03d", "x", 7), MOEC_OK);
    assert_string_equal(t, "x-007");
    moec_free(t);
}

static moec_status build_something(moec_err *err)
{
    char *a = NULL, *b = NULL;
    int *c = NULL;
    size_t cap = 0;
    moec_status st = MOEC_OK;
    MOEC_TRY(moec_copy(&a, "one", 3, err));
    MOEC_TRY(moec_format(&b, err, "%s two", a));
    MOEC_TRY(MOEC_GROW(c, cap, 10, err));
    MOEC_TRY(MOEC_GROW(c, cap, 1000, err));
done:
    moec_free(c);
    moec_free(b);
    moec_free(a);
    return st;
}

static void survives_every_allocation_failure(void **state)
{
    (void)state;
    moec_err err = {MOEC_OK, ""};
    moec_status st = MOEC_ENOMEM;
    long k = 0;
    for (; st == MOEC_ENOMEM && k < 100; k++) {
        moec_test_allocs_left = k;
        st = build_something(&err);
        moec_test_allocs_left = LONG_MAX;
    }
    assert_int_equal(st, MOEC_OK);
    assert_int_equal(k, 5); /* four allocations, each of which failed once */
    assert_non_null(strstr(err.text, "out of memory"));
}

static void peak_memory_is_plausible(void **state)
{
    (void)state;
    assert_true(moec_peak_memory() > UINT64_C(500000));
    assert_true(moec_peak_memory() < UINT64_C(1) << 40);
}

/* --- parallel loops ----------------------------------------------------------------------------------------------- */

typedef struct sums {
    int64_t chunk_lo[64], merged[2000];
    double partial[64][2], total;
    int64_t n_merged, fail_from, grain;
    int inside, covered[2000];
} sums;

static moec_status add_range(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    sums *s = ctx;
    double v = 0;
    if (lo >= s->fail_from)
        return moec_fail(err, MOEC_ENUMERIC, "chunk at %lld", (long long)lo);
    for (int64_t i = lo; i < hi; i++) {
        v += 1.0 / (double)(i + 1);
        s->covered[i]++;
    }
    s->partial[worker][0] = v;
    return MOEC_OK;
}

static moec_status merge_range(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    sums *s = ctx;
    (void)hi;
    (void)err;
    s->total += s->partial[worker][0];
    s->merged[s->n_merged++] = lo;
    return MOEC_OK;
}

static double ordered_sum(int threads, int64_t n, int64_t grain)
{
    static sums s;
    memset(&s, 0, sizeof s);
    s.fail_from = INT64_MAX;
    moec_par_set_threads(threads);
    assert_int_equal(moec_par_ordered(n, grain, add_range, merge_range, &s, NULL), MOEC_OK);
    moec_par_set_threads(0);
    assert_int_equal(s.n_merged, (n + grain - 1) / grain);
    for (int64_t k = 0; k < s.n_merged; k++)
        assert_int_equal(s.merged[k], k * grain);
    for (int64_t i = 0; i < n; i++)
        assert_int_equal(s.covered[i], 1);
    return s.total;
}

static void sums_do_not_depend_on_threads(void **state)
{
    (void)state;
    static const int64_t grains[] = {1, 7, 100, 1999, 2000, 5000};
    for (size_t g = 0; g < MOEC_COUNT(grains); g++) {
        double one = ordered_sum(1, 2000, grains[g]);
        for (int threads = 2; threads <= 9; threads++) {
            double many = ordered_sum(threads, 2000, grains[g]);
            assert_memory_equal(&one, &many, sizeof one);
        }
    }
}

static void first_failure_is_reported(void **state)
{
    (void)state;
    for (int threads = 1; threads <= 8; threads++) {
        static sums s;
        moec_err err = {MOEC_OK, ""};
        memset(&s, 0, sizeof s);
        s.fail_from = 30;
        moec_par_set_threads(threads);
        assert_int_equal(moec_par_for(100, 10, add_range, &s, &err), MOEC_ENUMERIC);
        assert_string_equal(err.text, "chunk at 30");
        assert_int_equal(err.code, MOEC_ENUMERIC);
        memset(&s, 0, sizeof s);
        s.fail_from = 30;
        assert_int_equal(moec_par_ordered(100, 10, add_range, merge_range, &s, &err), MOEC_ENUMERIC);
        assert_string_equal(err.text, "chunk at 30");
        assert_int_equal(s.n_merged, 3);
        moec_par_set_threads(0);
    }
}

static moec_status inner(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    sums *s = ctx;
    (void)err;
    (void)hi;
    assert_int_equal(worker, 0); /* a nested loop is serial */
    __atomic_add_fetch(&s->covered[lo], 1, __ATOMIC_RELAXED);
    return MOEC_OK;
}

static moec_status outer(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    sums *s = ctx;
    (void)lo;
    (void)hi;
    if (worker < 0 || worker >= moec_par_threads())
        return moec_fail(err, MOEC_EINVAL, "worker %d", worker);
    if (moec_par_inside())
        __atomic_store_n(&s->inside, 1, __ATOMIC_RELAXED);
    return moec_par_for(5, 1, inner, s, err);
}

static void nested_loops_are_serial(void **state)
{
    (void)state;
    static sums s;
    moec_err err = {MOEC_OK, ""};
    moec_par_set_threads(3);
    assert_int_equal(moec_par_for(10, 1, outer, &s, &err), MOEC_OK);
    for (int i = 0; i < 5; i++)
        assert_int_equal(s.covered[i], 10);
    assert_true(s.inside);
    assert_false(moec_par_inside());
    assert_int_equal(moec_par_threads(), 3);
    moec_par_set_threads(0);
    assert_true(moec_par_threads() >= 1);
    assert_int_equal(moec_par_for(0, 1, inner, &s, &err), MOEC_OK);
}

/* --- JSON --------------------------------------------------------------------------------------------------------- */

static void json_reads_and_writes(void **state)
{
    (void)state;
    static const char text[] = "{\"b\":1,\"a\":[true,null,-2.5,\"x\\u00e4\"],\"big\":9007199254740993}";
    moec_json *v;
    assert_int_equal(moec_json_parse(&v, text, strlen(text), "t", NULL), MOEC_OK);
    int64_t i;
    double d;
    bool b;
    assert_int_equal(moec_json_type(v), MOEC_JSON_OBJECT);
    assert_int_equal(moec_json_len(v), 3);
    assert_true(moec_json_int(moec_json_get(v, "big"), &i) && i == INT64_C(9007199254740993));
    const moec_json *a = moec_json_get(v, "a");
    assert_int_equal(moec_json_len(a), 4);
    assert_true(moec_json_bool(moec_json_at(a, 0), &b) && b);
    assert_int_equal(moec_json_type(moec_json_at(a, 1)), MOEC_JSON_NULL);
    assert_true(moec_json_real(moec_json_at(a, 2), &d) && d < -2.4 && d > -2.6);
    assert_false(moec_json_int(moec_json_at(a, 2), &i));
    assert_string_equal(moec_json_string(moec_json_at(a, 3)), "x\xc3\xa4");
    assert_int_equal(moec_json_len(moec_json_at(a, 3)), 3);
    assert_null(moec_json_at(a, 4));
    assert_null(moec_json_get(v, "none"));
    assert_int_equal(moec_json_type(NULL), MOEC_JSON_NONE);
    assert_null(moec_json_string(NULL));
    void *it = NULL;
    const char *key;
    moec_json *value;
    char order[32] = "";
    while (moec_json_each(v, &it, &key, &value))
        snprintf(order + strlen(order), sizeof order - strlen(order), "%s,", key);
    assert_string_equal(order, "b,a,big,");
    char *again;
    assert_int_equal(moec_json_dump(&again, v, 0, NULL), MOEC_OK);
    moec_json *w;
    assert_int_equal(moec_json_parse(&w, again, strlen(again), "again", NULL), MOEC_OK);
    moec_json_free(w);
    moec_free(again);
    moec_json_free(v);
}

static void json_refuses(void **state)
{
    (void)state;
    static const char *const bad[] = {
        "", "{", "{\"a\":1,}", "{\"a\":1}x", "{\"a\":1,\"a\":2}", "[1 2]", "nul", "\"\xff\"", "\"\\ud800\"", "1e999",
        "99999999999999999999", "{'a':1}", "[01]", "NaN", "\"a\nb\"",
    };
    for (size_t i = 0; i < MOEC_COUNT(bad); i++) {
        moec_json *v;
        moec_err err = {MOEC_OK, ""};
        assert_int_equal(moec_json_parse(&v, bad[i], strlen(bad[i]), "f.json", &err), MOEC_EFORMAT);
        assert_null(v);
        assert_memory_equal(err.text, "f.json: JSON line ", 18);
    }
    char *deep = malloc(200001);
    assert_non_null(deep);
    memset(deep, '[', 200000);
    deep[200000] = '\0';
    moec_json *v;
    assert_int_equal(moec_json_parse(&v, deep, 200000, "deep", NULL), MOEC_EFORMAT);
    free(deep);
}

static void json_is_built(void **state)
{
    (void)state;
    moec_json *o = moec_json_new_object(), *a = moec_json_new_array();
    moec_json_push(a, moec_json_new_int(-3));
    moec_json_push(a, moec_json_new_real((double)NAN));
    moec_json_push(a, moec_json_new_bool(false));
    moec_json_set(o, "z", a);
    moec_json_set(o, "a", moec_json_new_string("\xff bad"));
    moec_json_set(o, "n", moec_json_new_null());
    moec_json *copy = moec_json_clone(o);
    moec_json_free(o);
    char *text;
    assert_int_equal(moec_json_dump(&text, copy, 0, NULL), MOEC_OK);
    assert_string_equal(text, "{\"z\": [-3, null, false], \"a\": \"(not UTF-8)\", \"n\": null}");
    moec_free(text);
    moec_json_set(copy, "lost", NULL); /* what a failed builder would hand over */
    assert_int_equal(moec_json_dump(&text, copy, 0, NULL), MOEC_ENOMEM);
    assert_null(text);
    assert_int_equal(moec_json_dump(&text, copy, 2, NULL), MOEC_OK);
    moec_free(text);
    moec_json_free(copy);
}

/* Names of files become keys: one that is not UTF-8 is no reason to report a lack of memory. */
static void json_keys_may_be_any_bytes(void **state)
{
    moec_err err = {MOEC_OK, ""};
    moec_json *o = moec_json_new_object();
    char *text;
    (void)state;
    moec_json_set(o, "caf\xe9", moec_json_new_int(1));
    moec_json_set(o, "caf\xc3\xa9", moec_json_new_int(2));
    assert_int_equal(moec_json_dump(&text, o, 0, &err), MOEC_OK);
    assert_string_equal(text, "{\"caf?\": 1, \"caf\xc3\xa9\": 2}");
    moec_free(text);
    moec_json_free(o);
}

static void json_reals_survive(void **state)
{
    (void)state;
    static const double reals[] = {0.1, 1.0 / 3.0, 1e-300, 1.7976931348623157e308, 10000000.0, -0.0, 5e-324};
    for (size_t i = 0; i < MOEC_COUNT(reals); i++) {
        moec_json *v = moec_json_new_real(reals[i]), *w;
        char *text;
        double back;
        assert_int_equal(moec_json_dump(&text, v, 0, NULL), MOEC_OK);
        assert_int_equal(moec_json_parse(&w, text, strlen(text), "real", NULL), MOEC_OK);
        assert_true(moec_json_real(w, &back));
        assert_memory_equal(&back, &reals[i], sizeof back);
        moec_json_free(v);
        moec_json_free(w);
        moec_free(text);
    }
}

static void json_edits_one_value_only(void **state)
{
    (void)state;
    static const char text[] = "{\n  \"num\" : 8,\t\"deep\": { \"num\": [1, {\"x\": \"}\"}], \"k\":\"a\\\"b\" },\r\n"
                               "  \"last\":1e5 }\n";
    static const struct { const char *path, *value, *want; } cases[] = {
        {"num", "16", "{\n  \"num\" : 16,\t\"deep\": { \"num\": [1, {\"x\": \"}\"}], \"k\":\"a\\\"b\" },\r\n"
                      "  \"last\":1e5 }\n"},
        {"deep.num", "2", "{\n  \"num\" : 8,\t\"deep\": { \"num\": 2, \"k\":\"a\\\"b\" },\r\n  \"last\":1e5 }\n"},
        {"deep.k", "null", "{\n  \"num\" : 8,\t\"deep\": { \"num\": [1, {\"x\": \"}\"}], \"k\":null },\r\n"
                           "  \"last\":1e5 }\n"},
        {"last", "[1]", "{\n  \"num\" : 8,\t\"deep\": { \"num\": [1, {\"x\": \"}\"}], \"k\":\"a\\\"b\" },\r\n"
                        "  \"last\":[1] }\n"},
    };
    for (size_t i = 0; i < MOEC_COUNT(cases); i++) {
        char *out;
        assert_int_equal(moec_json_edit(&out, text, cases[i].path, cases[i].value, NULL), MOEC_OK);
        assert_string_equal(out, cases[i].want);
        moec_free(out);
    }
    static const char *const absent[] = {"nu", "x", "deep.x", "num.x", "deep.num.x", "numm"};
    for (size_t i = 0; i < MOEC_COUNT(absent); i++) {
        char *out;
        assert_int_equal(moec_json_edit(&out, text, absent[i], "1", NULL), MOEC_EINVAL);
        assert_null(out);
    }
}

/* --- files -------------------------------------------------------------------------------------------------------- */

static char folder[64];

static int make_folder(void **state)
{
    (void)state;
    strcpy(folder, "base-test-XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static int drop_folder(void **state)
{
    (void)state;
    return moec_dir_remove(folder, NULL) == MOEC_OK && !moec_path_exists(folder) ? 0 : -1;
}

static char *in_folder(const char *name)
{
    char *path;
    assert_int_equal(moec_path_join(&path, folder, name, NULL), MOEC_OK);
    return path;
}

static void files_are_written_whole(void **state)
{
    (void)state;
    char *path = in_folder("f"), *tmp = in_folder("f.tmp"), *text;
    size_t len;
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_file_write(path, "one\0two", 7, &err), MOEC_OK);
    assert_false(moec_path_exists(tmp));
    assert_int_equal(moec_file_read(&text, &len, path, 7, &err), MOEC_OK);
    assert_int_equal(len, 7);
    assert_memory_equal(text, "one\0two", 8);
    moec_free(text);
    assert_int_equal(moec_file_read(&text, &len, path, 6, &err), MOEC_EFORMAT);
    assert_null(text);
    assert_int_equal(moec_file_write(path, "", 0, &err), MOEC_OK);
    assert_int_equal(moec_file_read(&text, &len, path, 0, &err), MOEC_OK);
    assert_int_equal(len, 0);
    moec_free(text);
    assert_int_equal(moec_file_read(&text, &len, "no/such/file", 10, &err), MOEC_EIO);
    assert_string_equal(err.text, "no/such/file: No such file or directory");
    assert_int_equal(moec_file_read(&text, &len, folder, 10, &err), MOEC_EFORMAT);
    assert_int_equal(moec_file_write("no/such/file", "x", 1, &err), MOEC_EIO);
    assert_int_equal(moec_fail_errno(&err, ENOSPC, "there"), MOEC_ENOFIT);
    assert_int_equal(moec_fail_errno(&err, EDQUOT, "there"), MOEC_ENOFIT);
    assert_int_equal(moec_fail_errno(&err, EACCES, "there"), MOEC_EIO);
    moec_free(tmp);
    moec_free(path);
}

static void paths_are_taken_apart(void **state)
{
    (void)state;
    static const struct { const char *dir, *name, *want; } cases[] = {
        {"a", "b", "a/b"}, {"a/", "b", "a/b"}, {"/", "b", "/b"}, {"", "b", "b"}, {NULL, "b", "b"}};
    for (size_t i = 0; i < MOEC_COUNT(cases); i++) {
        char *path;
        assert_int_equal(moec_path_join(&path, cases[i].dir, cases[i].name, NULL), MOEC_OK);
        assert_string_equal(path, cases[i].want);
        moec_free(path);
    }
    assert_string_equal(moec_path_base("a/b.c"), "b.c");
    assert_string_equal(moec_path_base("b.c"), "b.c");
    assert_true(moec_path_is_plain("model.safetensors"));
    assert_true(moec_path_is_plain("..a"));
    static const char *const not_plain[] = {"", ".", "..", "../a", "a/b", "/a", "a/"};
    for (size_t i = 0; i < MOEC_COUNT(not_plain); i++)
        assert_false(moec_path_is_plain(not_plain[i]));
}

static void folders_are_made_listed_removed(void **state)
{
    (void)state;
    char *deep = in_folder("x/y/z"), *x = in_folder("x"), *link = in_folder("x/link"), *keep = in_folder("keep");
    char *in_keep = in_folder("keep/file"), **names;
    size_t n;
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_dir_make(deep, &err), MOEC_OK);
    assert_int_equal(moec_dir_make(deep, &err), MOEC_OK);
    assert_int_equal(moec_dir_make(keep, &err), MOEC_OK);
    assert_int_equal(moec_file_write(in_keep, "x", 1, &err), MOEC_OK);
    assert_int_equal(moec_dir_make(in_keep, &err), MOEC_EEXIST);
    assert_int_equal(symlink("../keep", link), 0);
    assert_int_equal(moec_dir_list(&names, &n, x, &err), MOEC_OK);
    assert_int_equal(n, 2);
    assert_string_equal(names[0], "link");
    assert_string_equal(names[1], "y");
    moec_names_free(names, n);
    assert_int_equal(moec_dir_remove(x, &err), MOEC_OK);
    assert_false(moec_path_exists(x));
    assert_true(moec_path_exists(in_keep)); /* links are removed, not followed */
    assert_int_equal(moec_dir_remove(x, &err), MOEC_OK);
    assert_int_equal(moec_dir_list(&names, &n, x, &err), MOEC_EIO);
    uint64_t free_bytes = 0;
    assert_int_equal(moec_disk_free(&free_bytes, "base-test-not/there/yet", &err), MOEC_OK);
    assert_true(free_bytes > 0);
    moec_free(in_keep);
    moec_free(keep);
    moec_free(link);
    moec_free(x);
    moec_free(deep);
}

/* --- hashes, words, log ------------------------------------------------------------------------------------------- */

static void hashes_are_xxh3(void **state)
{
    (void)state;
    /* Values that the xxhsum program prints for these inputs. */
    assert_string_equal(moec_hash_bytes("", 0).hex, "99aa06d3014798d86001c324468d497f");
    assert_string_equal(moec_hash_bytes("abc", 3).hex, "06b05ab6733a618578af5f94892f3950");
    moec_hash *h;
    assert_int_equal(moec_hash_new(&h, NULL), MOEC_OK);
    moec_hash_add(h, "a", 1);
    moec_hash_add(h, NULL, 0);
    moec_hash_add(h, "bc", 2);
    assert_string_equal(moec_hash_digest(h).hex, moec_hash_bytes("abc", 3).hex);
    moec_hash_free(h);
    moec_digest digest[2];
    for (int i = 0; i < 2; i++) {
        assert_int_equal(moec_hash_new(&h, NULL), MOEC_OK);
        moec_hash_text(h, i ? "a" : "ab");
        moec_hash_text(h, i ? "bc" : "c");
        digest[i] = moec_hash_digest(h);
        moec_hash_free(h);
    }
    assert_string_not_equal(digest[0].hex, digest[1].hex);
    moec_hash_free(NULL);
}

static void near_words_are_found(void **state)
{
    (void)state;
    static const char *const names[] = {"inspect", "calibrate", "prune", "eval"};
    assert_int_equal(moec_word_distance("kitten", "sitting"), 3);
    assert_int_equal(moec_word_distance("ab", "ba"), 1);
    assert_int_equal(moec_word_distance("", "abc"), 3);
    assert_string_equal(moec_word_nearest("calibarte", names, 4), "calibrate");
    assert_string_equal(moec_word_nearest("prun", names, 4), "prune");
    assert_null(moec_word_nearest("zzz", names, 4));
    assert_null(moec_word_nearest("", names, 4));
    char longer[300];
    memset(longer, 'a', sizeof longer - 1);
    longer[sizeof longer - 1] = '\0';
    assert_null(moec_word_nearest(longer, names, 4));
}

static void signals_set_the_flag(void **state)
{
    (void)state;
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_interrupted(&err), MOEC_OK);
    moec_catch_signals();
    raise(SIGTERM);
    assert_int_equal(moec_interrupted(&err), MOEC_EINTR);
    assert_string_equal(err.text, "interrupted");
}

static void clock_and_version(void **state)
{
    (void)state;
    double t = moec_now();
    assert_true(moec_now() >= t);
    assert_non_null(strchr(moec_version(), '.'));
}

/* Pages that are given back hold what was written when they are touched again. */
static void scratch_keeps_its_bytes(void **state)
{
    (void)state;
    enum { BYTES = 100001 };
    unsigned char *at;
    void *none;
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_file_scratch((void **)&at, BYTES, "a test", &err), MOEC_OK);
    for (int i = 0; i < BYTES; i++)
        assert_int_equal(at[i], 0);
    for (int i = 0; i < BYTES; i++)
        at[i] = (unsigned char)(i * 7);
    moec_pages_drop(at + 5000, 60001);
    for (int i = 0; i < BYTES; i++)
        assert_int_equal(at[i], (unsigned char)(i * 7));
    moec_file_scratch_free(at, BYTES);
    moec_file_scratch_free(NULL, BYTES);
    assert_int_equal(moec_file_scratch(&none, (size_t)INT64_MAX - 4095, "far too much", &err), MOEC_ENOFIT);
    assert_null(none);
    assert_non_null(strstr(err.text, "a temporary file for far too much"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(errors_keep_text_and_code),
        cmocka_unit_test(errors_are_one_bounded_line),
        cmocka_unit_test(controls_do_not_reach_the_terminal),
        cmocka_unit_test(every_status_has_an_exit_code),
        cmocka_unit_test(memory_is_zeroed_and_aligned),
        cmocka_unit_test(overflow_is_refused),
        cmocka_unit_test(arrays_grow),
        cmocka_unit_test(texts_are_copied_and_made),
        cmocka_unit_test(survives_every_allocation_failure),
        cmocka_unit_test(peak_memory_is_plausible),
        cmocka_unit_test(sums_do_not_depend_on_threads),
        cmocka_unit_test(first_failure_is_reported),
        cmocka_unit_test(nested_loops_are_serial),
        cmocka_unit_test(json_reads_and_writes),
        cmocka_unit_test(json_refuses),
        cmocka_unit_test(json_is_built),
        cmocka_unit_test(json_keys_may_be_any_bytes),
        cmocka_unit_test(json_reals_survive),
        cmocka_unit_test(json_edits_one_value_only),
        cmocka_unit_test_setup_teardown(files_are_written_whole, make_folder, drop_folder),
        cmocka_unit_test(paths_are_taken_apart),
        cmocka_unit_test_setup_teardown(folders_are_made_listed_removed, make_folder, drop_folder),
        cmocka_unit_test(scratch_keeps_its_bytes),
        cmocka_unit_test(hashes_are_xxh3),
        cmocka_unit_test(near_words_are_found),
        cmocka_unit_test(clock_and_version),
        cmocka_unit_test(signals_set_the_flag), /* last: the flag stays set */
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
