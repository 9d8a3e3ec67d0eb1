/* Texts to windows: arguments, cutting, choosing, .ids files, errors, failing allocations. */
#include "base/file.h"
#include "base/mem.h"
#include "text/corpus.h"

#include <limits.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define DEMO MOEC_SOURCE_DIR "/recipes/demo-model/tokenizer.json"

/* One id for each letter: a is 0; "." is 26; bos is 27. */
static const char letters_json[] = "{\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{"
                                   "\"SpecialToken\":{\"id\":\"s\"}},{\"Sequence\":{\"id\":\"A\"}}],"
                                   "\"special_tokens\":{\"s\":{\"ids\":[27]}}},\"model\":{\"vocab\":{\"a\":0,\"b\":1,"
                                   "\"c\":2,\"d\":3,\"e\":4,\"f\":5,\"g\":6,\"h\":7,\"i\":8,"
                                   "\"j\":9,\"k\":10,\"l\":11,\"m\":12,\".\":26,\"<s>\":27},\"merges\":[]}}";

static char folder[64];

static int make_folder(void **state)
{
    moec_err err;
    snprintf(folder, sizeof folder, "/tmp/moec-text-%ld", (long)getpid());
    *state = NULL;
    return moec_dir_make(folder, &err) == MOEC_OK ? 0 : -1;
}

static int remove_folder(void **state)
{
    moec_err err;
    (void)state;
    return moec_dir_remove(folder, &err) == MOEC_OK ? 0 : -1;
}

/* Path of a file in the folder; one of a few buffers in turn. */
static const char *put(const char *name, const char *text)
{
    static char paths[8][200];
    static int turn;
    char *path = paths[turn++ % 8];
    moec_err err = {MOEC_OK, ""};
    snprintf(path, sizeof paths[0], "%s/%s", folder, name);
    if (text && moec_file_write(path, text, strlen(text), &err) != MOEC_OK)
        fail_msg("%s", err.text);
    return path;
}

static moec_tokenizer *letters(void)
{
    moec_err err = {MOEC_OK, ""};
    moec_tokenizer *t = NULL;
    if (moec_tokenizer_parse(&t, letters_json, sizeof letters_json - 1, "letters", &err) != MOEC_OK)
        fail_msg("%s", err.text);
    return t;
}

static moec_corpus_opts options(int64_t seq_len)
{
    return (moec_corpus_opts){.vocab = 28, .seq_len = seq_len, .seed = -1, .bos = -1};
}

static moec_corpus read_all(const char *const *args, int n, const moec_corpus_opts *o)
{
    moec_err err = {MOEC_OK, ""};
    moec_corpus c;
    moec_tokenizer *t = letters();
    if (moec_corpus_read(&c, args, n, t, o, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    moec_tokenizer_free(t);
    return c;
}

/* The windows of a domain, "0 1|2 3". */
static const char *windows_of(const moec_domain *d)
{
    static char text[10000];
    size_t at = 0;
    text[0] = '\0';
    assert_int_equal(d->start[0], 0);
    assert_int_equal(d->start[d->n_windows], d->n_ids);
    for (int64_t w = 0; w < d->n_windows; w++)
        for (int64_t i = d->start[w]; i < d->start[w + 1]; i++)
            at += (size_t)snprintf(text + at, sizeof text - at, "%s%d",
                                   i > d->start[w] ? " "
                                   : w             ? "|"
                                                   : "",
                                   d->ids[i]);
    return text;
}

static void assert_windows(const char *path, const moec_corpus_opts *o, const char *want)
{
    moec_corpus c = read_all((const char *const[]){path}, 1, o);
    assert_int_equal(c.n_domains, 1);
    assert_string_equal(windows_of(&c.domain[0]), want);
    moec_corpus_release(&c);
}

static void assert_refused(const char *const *args, int n, const moec_corpus_opts *o, moec_status code,
                           const char *want)
{
    moec_err err = {MOEC_OK, ""};
    moec_corpus c;
    moec_tokenizer *t = letters();
    assert_int_equal(moec_corpus_read(&c, args, n, t, o, &err), code);
    assert_int_equal(c.n_domains, 0);
    assert_null(c.domain);
    if (!strstr(err.text, want))
        fail_msg("\"%s\" is not in \"%s\"", want, err.text);
    moec_tokenizer_free(t);
}

static void a_text_is_cut_into_windows(void **state)
{
    (void)state;
    moec_corpus_opts o = options(3);
    assert_windows(put("t.txt", "abcdefgh"), &o, "0 1 2|3 4 5|6 7");
    assert_windows(put("t.txt", "abcdefg"), &o, "0 1 2|3 4 5"); /* one id predicts nothing */
    assert_windows(put("t.txt", "ab"), &o, "0 1");
    o.max_windows = 2;
    assert_windows(put("t.txt", "abcdefgh"), &o, "0 1 2|3 4 5");
    o.max_windows = 9;
    assert_windows(put("t.txt", "abcdefgh"), &o, "0 1 2|3 4 5|6 7");
    o.max_windows = 0;
    o.max_tokens = 5;
    assert_windows(put("t.txt", "abcdefgh"), &o, "0 1 2|3 4");
    o.max_tokens = 4; /* a window of one id is not made of the rest */
    assert_windows(put("t.txt", "abcdefgh"), &o, "0 1 2");
    o = options(3);
    o.add_bos = true;
    assert_windows(put("t.txt", "abcde"), &o, "27 0 1|27 2 3|27 4");
    o.bos = 26;
    o.max_tokens = 5;
    assert_windows(put("t.txt", "abcdefgh"), &o, "26 0 1|26 2");
}

static void what_is_lost_is_counted(void **state)
{
    (void)state;
    moec_corpus_opts o = options(3);
    const char *path = put("t.txt", "abc\xff"
                                    "def.");
    moec_corpus c = read_all(&path, 1, &o); /* U+FFFD is no token of this vocabulary */
    assert_int_equal(c.domain[0].n_invalid, 1);
    assert_int_equal(c.domain[0].n_dropped, 1);
    assert_int_equal(moec_corpus_tokens(&c), 6);
    moec_corpus_release(&c);
}

static void ids_files_hold_windows(void **state)
{
    (void)state;
    moec_corpus_opts o = options(3);
    const char *path = put("w.ids", "1 2 3\n\n4 5\t6  7\r\n8\n9 10 11 12 13 0");
    moec_err err = {MOEC_OK, ""};
    moec_corpus c;
    bool needs = true;
    assert_int_equal(moec_corpus_needs_tokenizer(&needs, &path, 1, &err), MOEC_OK);
    assert_false(needs);
    o.add_bos = true; /* no bos is added to them */
    assert_int_equal(moec_corpus_read(&c, &path, 1, NULL, &o, &err), MOEC_OK);
    assert_string_equal(windows_of(&c.domain[0]), "1 2 3|4 5 6|9 10 11|12 13 0");
    assert_int_equal(c.domain[0].n_dropped, 2);
    assert_string_equal(c.domain[0].name, "w");
    moec_corpus_release(&c);
    static const struct {
        const char *text, *want;
    } rows[] = {
        {"1 2\n3 x4\n", "w.ids: line 2: \"x4\" is not a token id from 0 to 27"},
        {"1 -2\n", "line 1: \"-2\""},
        {"1 2\n\n\n28 1", "line 4: \"28\""},
        {"1 99999999999999999999999999", "line 1: \"99999"},
        {"1 2.5", "\"2.5\""},
        {"1\n2\n", "w.ids: 2 tokens, at least 2 in one window"},
        {"\n", "w.ids: 0 tokens"},
    };
    for (size_t i = 0; i < MOEC_COUNT(rows); i++) {
        path = put("w.ids", rows[i].text);
        assert_refused(&path, 1, &o, MOEC_EFORMAT, rows[i].want);
    }
    path = put("t.txt", "abc");
    assert_int_equal(moec_corpus_needs_tokenizer(&needs, &path, 1, &err), MOEC_OK);
    assert_true(needs);
    assert_int_equal(moec_corpus_read(&c, &path, 1, NULL, &o, &err), MOEC_EINVAL);
}

static void arguments_give_names_and_weights(void **state)
{
    (void)state;
    moec_corpus_opts o = options(4);
    char named[300], weighted[300], both[300], odd[300];
    put("plain.x.txt", "abc");
    put("odd=1:2", "def");
    snprintf(named, sizeof named, "code=%s", put("plain.x.txt", NULL));
    snprintf(weighted, sizeof weighted, "%s:2.5e-1", put("plain.x.txt", NULL));
    snprintf(both, sizeof both, "n:1=%s:3", put("plain.x.txt", NULL));
    snprintf(odd, sizeof odd, "strange=%s", put("odd=1:2", NULL));
    const char *args[] = {named, weighted, both, put("odd=1:2", NULL), odd};
    static const char *const names[] = {"code", "plain.x", "n:1", "odd=1:2", "strange"};
    static const double weights[] = {1, 0.25, 3, 1, 1};
    moec_corpus c = read_all(args, 5, &o);
    assert_int_equal(c.n_domains, 5);
    for (int i = 0; i < 5; i++) {
        assert_string_equal(c.domain[i].name, names[i]);
        assert_true(fabs(c.domain[i].weight - weights[i]) < 1e-15);
        assert_string_equal(windows_of(&c.domain[i]), i < 3 ? "0 1 2" : "3 4 5");
    }
    moec_corpus_release(&c);
}

static void a_folder_gives_its_files(void **state)
{
    (void)state;
    char inner[200], arg[220], nested[260];
    moec_err err;
    moec_corpus_opts o = options(4);
    snprintf(inner, sizeof inner, "%s/inner", folder);
    assert_int_equal(moec_dir_make(inner, &err), MOEC_OK);
    snprintf(arg, sizeof arg, "%s:2", inner);
    assert_refused((const char *const[]){inner}, 1, &o, MOEC_EINVAL, "no file in this folder");
    put("inner/zz.txt", "abc");
    put("inner/b.ids", "1 2");
    put("inner/a.txt", "def");
    put("inner/readme.md", "no");
    put("inner/.hidden.txt", "no");
    snprintf(nested, sizeof nested, "%s/more.txt", inner);
    assert_int_equal(moec_dir_make(nested, &err), MOEC_OK);
    moec_corpus c = read_all((const char *const[]){arg}, 1, &o);
    assert_int_equal(c.n_domains, 3);
    assert_string_equal(c.domain[0].name, "a");
    assert_string_equal(c.domain[1].name, "b");
    assert_string_equal(c.domain[2].name, "zz");
    assert_true(c.domain[2].weight > 1.99 && c.domain[2].weight < 2.01);
    moec_corpus_release(&c);
    snprintf(arg, sizeof arg, "name=%s", inner);
    assert_refused((const char *const[]){arg}, 1, &o, MOEC_EINVAL, "a folder has no name");
}

static void bad_arguments_are_refused(void **state)
{
    (void)state;
    moec_corpus_opts o = options(4);
    char zero[300], minus[300], same[300], empty[300];
    const char *path = put("t.txt", "abcdef");
    snprintf(zero, sizeof zero, "%s:0", path);
    snprintf(minus, sizeof minus, "%s:-1", path);
    snprintf(same, sizeof same, "t=%s", path);
    snprintf(empty, sizeof empty, "=%s", path);
    assert_refused(NULL, 0, &o, MOEC_EINVAL, "at least one text");
    assert_refused((const char *const[]){zero}, 1, &o, MOEC_EINVAL, "weight \"0\"");
    assert_refused((const char *const[]){minus}, 1, &o, MOEC_EINVAL, "weight \"-1\"");
    assert_refused((const char *const[]){empty}, 1, &o, MOEC_EINVAL, "name=path");
    assert_refused((const char *const[]){""}, 1, &o, MOEC_EINVAL, "name=path");
    assert_refused((const char *const[]){"x="}, 1, &o, MOEC_EINVAL, "name=path");
    assert_refused((const char *const[]){path, same}, 2, &o, MOEC_EINVAL, "are both domain \"t\"");
    assert_refused((const char *const[]){"/no/such/file"}, 1, &o, MOEC_EIO, "/no/such/file");
    assert_refused((const char *const[]){"a=/no/such/file:2"}, 1, &o, MOEC_EIO, "/no/such/file: ");
    path = put("t.txt", "");
    assert_refused(&path, 1, &o, MOEC_EFORMAT, "t.txt: 0 tokens");
    path = put("t.txt", "abcdef.");
    o.vocab = 26;
    assert_refused(&path, 1, &o, MOEC_EFORMAT, "tokenizer and model disagree");
    o = options(1);
    assert_refused(&path, 1, &o, MOEC_EINVAL, "windows of 1 tokens");
    o = options(4);
    o.max_tokens = -1;
    assert_refused(&path, 1, &o, MOEC_EINVAL, "negative limit");
    o = options(4);
    o.vocab = 0;
    assert_refused(&path, 1, &o, MOEC_EINVAL, "a model with 0 ids");
    o = options(4);
    o.add_bos = true;
    o.bos = 28;
    assert_refused(&path, 1, &o, MOEC_EFORMAT, "beginning of text is id 28");
    o = options(4);
    o.max_tokens = 1;
    assert_refused(&path, 1, &o, MOEC_EINVAL, "1 tokens are too few");
}

static void tokens_are_divided_by_weight(void **state)
{
    (void)state;
    char text[201], a[300], b[300], c[300];
    memset(text, 'a', 200);
    text[200] = '\0';
    snprintf(a, sizeof a, "a=%s:1", put("long1.txt", text));
    snprintf(b, sizeof b, "b=%s:3", put("long2.txt", text));
    snprintf(c, sizeof c, "c=%s:6", put("short.txt", "abcdefgh"));
    const char *args[] = {a, b, c};
    moec_corpus_opts o = options(16);
    static const struct {
        int64_t total, want[3];
    } rows[] = {
        {108, {25, 75, 8}}, /* c has only 8; the others share 100 as 1 : 3 */
        {20, {3, 9, 8}},    /* of the same 12 */
        {21, {3, 10, 8}},   /* 3.25 and 9.75: the larger fraction gets the id that is left */
        {10000, {200, 200, 8}}, {300, {92, 200, 8}},
    };
    for (size_t i = 0; i < MOEC_COUNT(rows); i++) {
        o.max_tokens = rows[i].total;
        for (o.seed = -1; o.seed < 2; o.seed++) {
            moec_corpus all = read_all(args, 3, &o);
            for (int k = 0; k < 3; k++) /* one id may be left over, for it makes no window */
                assert_in_range(all.domain[k].n_ids, rows[i].want[k] - (rows[i].want[k] % 16 == 1), rows[i].want[k]);
            assert_true(moec_corpus_tokens(&all) <= rows[i].total);
            moec_corpus_release(&all);
        }
    }
}

static void a_seed_chooses_windows_the_same_way(void **state)
{
    (void)state;
    char text[121], args_a[300], args_b[300];
    for (int i = 0; i < 120; i++)
        text[i] = (char)('a' + i / 10);
    text[120] = '\0';
    snprintf(args_a, sizeof args_a, "x=%s", put("long.txt", text));
    snprintf(args_b, sizeof args_b, "y=%s", put("long2.txt", text));
    moec_corpus_opts o = options(10);
    o.max_windows = 4;
    o.seed = 5;
    const char *args[] = {args_a, args_b};
    char first[2000];
    moec_digest one, two;
    moec_err err;
    moec_corpus c = read_all(args, 1, &o);
    snprintf(first, sizeof first, "%s", windows_of(&c.domain[0]));
    assert_int_equal(moec_corpus_digest(&one, &c, &err), MOEC_OK);
    for (int64_t w = 1; w < 4; w++) /* in the order of the file, none twice */
        assert_true(c.domain[0].ids[c.domain[0].start[w]] > c.domain[0].ids[c.domain[0].start[w - 1]]);
    moec_corpus_release(&c);
    c = read_all(args, 2, &o); /* another domain changes nothing */
    assert_string_equal(windows_of(&c.domain[0]), first);
    assert_int_equal(moec_corpus_digest(&two, &c, &err), MOEC_OK);
    assert_string_not_equal(one.hex, two.hex);
    moec_corpus_release(&c);
    c = read_all(args, 1, &o);
    assert_int_equal(moec_corpus_digest(&two, &c, &err), MOEC_OK);
    assert_string_equal(one.hex, two.hex);
    moec_corpus_release(&c);
    int same = 0;
    for (o.seed = 6; o.seed < 16; o.seed++) {
        c = read_all(args, 1, &o);
        same += strcmp(windows_of(&c.domain[0]), first) == 0;
        moec_corpus_release(&c);
    }
    assert_true(same < 5);
}

/* Reading only as far as a limit needs must give what reading everything gives. */
static void a_limit_gives_the_beginning_of_a_real_text(void **state)
{
    (void)state;
    moec_err err = {MOEC_OK, ""};
    moec_tokenizer *t = NULL;
    const char *path = MOEC_SOURCE_DIR "/recipes/demo-model/samples.txt";
    moec_corpus all, some;
    moec_corpus_opts o = {.vocab = 4096, .seq_len = 128, .seed = -1, .bos = -1};
    assert_int_equal(moec_tokenizer_load(&t, DEMO, &err), MOEC_OK);
    assert_int_equal(moec_corpus_read(&all, &path, 1, t, &o, &err), MOEC_OK);
    assert_true(all.domain[0].n_windows > 100);
    for (int64_t n = 1; n < 60; n += 7) {
        o.max_windows = n;
        o.max_tokens = 0;
        assert_int_equal(moec_corpus_read(&some, &path, 1, t, &o, &err), MOEC_OK);
        assert_int_equal(some.domain[0].n_windows, n);
        assert_memory_equal(some.domain[0].ids, all.domain[0].ids, (size_t)some.domain[0].n_ids * sizeof(int32_t));
        moec_corpus_release(&some);
        o.max_windows = 0;
        o.max_tokens = n * 100 + 50;
        assert_int_equal(moec_corpus_read(&some, &path, 1, t, &o, &err), MOEC_OK);
        assert_int_equal(some.domain[0].n_ids, o.max_tokens);
        assert_memory_equal(some.domain[0].ids, all.domain[0].ids, (size_t)some.domain[0].n_ids * sizeof(int32_t));
        moec_corpus_release(&some);
    }
    moec_corpus_release(&all);
    moec_tokenizer_free(t);
}

static void survives_every_failed_allocation(void **state)
{
    (void)state;
    char inner[200];
    moec_err err = {MOEC_OK, ""};
    snprintf(inner, sizeof inner, "%s/oom", folder);
    assert_int_equal(moec_dir_make(inner, &err), MOEC_OK);
    put("oom/a.txt", "abcdefgh\xff");
    put("oom/b.ids", "1 2 3 4");
    char named[300];
    snprintf(named, sizeof named, "n=%s:2", put("oom/a.txt", NULL));
    const char *args[] = {inner, named};
    moec_corpus_opts o = options(3);
    o.max_tokens = 12;
    o.seed = 1;
    moec_tokenizer *t = letters();
    moec_status st = MOEC_ENOMEM;
    long k = 0;
    for (; st == MOEC_ENOMEM && k < 10000; k++) {
        moec_corpus c;
        moec_digest d;
        moec_test_allocs_left = k;
        st = moec_corpus_read(&c, args, 2, t, &o, &err);
        if (st == MOEC_OK)
            st = moec_corpus_digest(&d, &c, &err);
        moec_test_allocs_left = LONG_MAX;
        moec_corpus_release(&c);
    }
    if (st != MOEC_OK)
        fail_msg("%s", err.text);
    assert_true(k > 20);
    moec_tokenizer_free(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_text_is_cut_into_windows),
        cmocka_unit_test(what_is_lost_is_counted),
        cmocka_unit_test(ids_files_hold_windows),
        cmocka_unit_test(arguments_give_names_and_weights),
        cmocka_unit_test(a_folder_gives_its_files),
        cmocka_unit_test(bad_arguments_are_refused),
        cmocka_unit_test(tokens_are_divided_by_weight),
        cmocka_unit_test(a_seed_chooses_windows_the_same_way),
        cmocka_unit_test(a_limit_gives_the_beginning_of_a_real_text),
        cmocka_unit_test(survives_every_failed_allocation),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
