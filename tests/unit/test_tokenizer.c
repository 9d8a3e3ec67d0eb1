/* The tokenizer: ids of the demo model (as `tokenizers` 0.23.3 gives them; tests/interop/test_tokenizer.py compares
 * many more), each node on small tables, merging against a plain reference, hostile files and texts, failing
 * allocations. */
#include "base/mem.h"
#include "base/par.h"
#include "text/tokenizer.h"

#include <limits.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define DEMO MOEC_SOURCE_DIR "/recipes/demo-model/tokenizer.json"

/* A whole file from its parts; `more` are further model settings, each with a comma behind. */
#define FILE_OF(normalizer, pre, more, vocab, merges) \
    "{\"normalizer\":" normalizer ",\"pre_tokenizer\":" pre ",\"model\":{\"type\":\"BPE\"," more "\"vocab\":{" vocab \
    "},\"merges\":[" merges "]}}"
#define LETTERS "\"a\":0,\"b\":1,\"c\":2,\"d\":3,\" \":4,\"-\":5"

static moec_tokenizer *load_text(const char *json)
{
    moec_err err = {MOEC_OK, ""};
    moec_tokenizer *t = NULL;
    if (moec_tokenizer_parse(&t, json, strlen(json), "t.json", &err) != MOEC_OK)
        fail_msg("%s", err.text);
    return t;
}

/* Ids as text, "1 2 3"; the error's text when encoding fails. */
static const char *ids_of(const moec_tokenizer *t, const char *text, size_t len, bool special)
{
    static char line[20000];
    moec_err err = {MOEC_OK, ""};
    moec_encoder *e = NULL;
    moec_ids ids = {0};
    moec_encode_opts opts = {.add_special = special};
    size_t at = 0;
    line[0] = '\0';
    assert_int_equal(moec_encoder_new(&e, t, &err), MOEC_OK);
    if (moec_encode(&ids, NULL, e, text, len, &opts, &err) != MOEC_OK)
        snprintf(line, sizeof line, "%s", err.text);
    for (size_t i = 0; i < ids.n && at < sizeof line - 16; i++)
        at += (size_t)snprintf(line + at, sizeof line - at, i ? " %d" : "%d", ids.id[i]);
    moec_ids_release(&ids);
    moec_encoder_free(e);
    return line;
}

static void assert_ids(const char *json, const char *text, const char *want)
{
    moec_tokenizer *t = load_text(json);
    assert_string_equal(ids_of(t, text, strlen(text), false), want);
    moec_tokenizer_free(t);
}

static void assert_refused(const char *json, moec_status code, const char *want)
{
    moec_err err = {MOEC_OK, ""};
    moec_tokenizer *t = NULL;
    assert_int_equal(moec_tokenizer_parse(&t, json, strlen(json), "t.json", &err), code);
    assert_null(t);
    if (!strstr(err.text, want))
        fail_msg("\"%s\" is not in \"%s\"", want, err.text);
}

static void demo_ids_are_those_of_tokenizers(void **state)
{
    (void)state;
    static const struct {
        const char *text, *ids;
    } rows[] = {
        {"Hello, world!", "42 288 621 14 296 270 707 3"},
        {"def f(x):\n    return x + 1\n", "381 286 10 90 623 281 590 1206 800 223 19 201"},
        {"Grüße aus Köln, e\xcc\x81", "41 84 804 2688 71 1897 885 1628 78 80 14 2313"},
        {"日本語 👍🏽", "3702 101 1028 108 1307 255 223 175 256 242 238 175 256 240 124"},
        {"<|im_start|>user\nhi<|im_end|>", "1 1629 201 74 75 2"},
        {"   \n\n  a1234", "281 299 223 265 19 20 21 22"},
        {"", ""},
    };
    moec_err err = {MOEC_OK, ""};
    moec_tokenizer *t = NULL;
    assert_int_equal(moec_tokenizer_load(&t, DEMO, &err), MOEC_OK);
    assert_int_equal(moec_tokenizer_vocab_size(t), 4096);
    assert_int_equal(moec_tokenizer_find(t, "<|endoftext|>"), 0);
    assert_int_equal(moec_tokenizer_find(t, "no such token"), -1);
    assert_string_equal(moec_tokenizer_token(t, 1), "<|im_start|>");
    assert_null(moec_tokenizer_token(t, 4096));
    assert_null(moec_tokenizer_token(t, -1));
    assert_int_equal(moec_tokenizer_bos(t), -1);
    assert_int_equal(moec_tokenizer_eos(t), -1);
    for (size_t i = 0; i < MOEC_COUNT(rows); i++)
        assert_string_equal(ids_of(t, rows[i].text, strlen(rows[i].text), true), rows[i].ids);
    moec_tokenizer_free(t);
}

static void demo_text_comes_back(void **state)
{
    (void)state;
    moec_err err = {MOEC_OK, ""};
    moec_tokenizer *t = NULL;
    moec_encoder *e = NULL;
    moec_ids ids = {0};
    char *text = NULL;
    size_t len = 0;
    static const char said[] = "Ünïcode, 日本語 and 👍\n\tcode(); \0 NUL";
    assert_int_equal(moec_tokenizer_load(&t, DEMO, &err), MOEC_OK);
    assert_int_equal(moec_encoder_new(&e, t, &err), MOEC_OK);
    assert_int_equal(moec_encode(&ids, NULL, e, said, sizeof said, NULL, &err), MOEC_OK);
    assert_int_equal(moec_decode(&text, &len, t, ids.id, ids.n, false, &err), MOEC_OK);
    assert_int_equal(len, sizeof said);
    assert_memory_equal(text, said, len);
    moec_free(text);
    assert_int_equal(moec_decode(&text, &len, t, (const int32_t[]){1, ids.id[0]}, 2, true, &err), MOEC_OK);
    assert_null(strstr(text, "im_start"));
    moec_free(text);
    assert_int_equal(moec_decode(&text, &len, t, (const int32_t[]){1, 99999}, 2, true, &err), MOEC_EINVAL);
    assert_string_equal(err.text, "id 99999 is of no token");
    moec_ids_release(&ids);
    moec_encoder_free(e);
    moec_tokenizer_free(t);
}

static void a_limit_gives_the_beginning(void **state)
{
    (void)state;
    moec_err err = {MOEC_OK, ""};
    moec_tokenizer *t = NULL;
    moec_encoder *e = NULL;
    moec_ids all = {0}, some = {0};
    static const char text[] = "The quick brown fox <|endoftext|> jumps over the lazy dog. 1234 ??? and so on and on";
    assert_int_equal(moec_tokenizer_load(&t, DEMO, &err), MOEC_OK);
    assert_int_equal(moec_encoder_new(&e, t, &err), MOEC_OK);
    assert_int_equal(moec_encode(&all, NULL, e, text, sizeof text - 1, NULL, &err), MOEC_OK);
    for (size_t k = 1; k < all.n; k++) {
        moec_encode_opts opts = {.max_ids = k};
        some.n = 0;
        assert_int_equal(moec_encode(&some, NULL, e, text, sizeof text - 1, &opts, &err), MOEC_OK);
        assert_in_range(some.n, k, k + 8);
        assert_memory_equal(some.id, all.id, some.n * sizeof *some.id);
    }
    moec_ids_release(&all);
    moec_ids_release(&some);
    moec_encoder_free(e);
    moec_tokenizer_free(t);
}

/* Unicode 14, table 3-8, and what Python does with the same bytes. */
static void ill_formed_text_is_repaired_and_counted(void **state)
{
    (void)state;
    static const struct {
        const char *bytes, *same;
        int n;
    } rows[] = {
        {"a\xff"
         "b",
         "a\xef\xbf\xbd"
         "b",
         1},
        {"\xc0\xaf", "\xef\xbf\xbd\xef\xbf\xbd", 2},
        {"\xed\xa0\x80", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd", 3},
        {"\xe2\x82", "\xef\xbf\xbd", 1},
        {"x\xf0\x9f\x98y", "x\xef\xbf\xbdy", 1},
        {"\xf4\x91\x92\x93\xff"
         "A\x80\xbf"
         "B",
         "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"
         "A\xef\xbf\xbd\xef\xbf\xbd"
         "B",
         7},
        {"\xe1\x80\xe2\xf0\x91\x92\xf1\xbf"
         "A",
         "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"
         "A",
         4},
    };
    moec_err err = {MOEC_OK, ""};
    moec_tokenizer *t = NULL;
    moec_encoder *e = NULL;
    assert_int_equal(moec_tokenizer_load(&t, DEMO, &err), MOEC_OK);
    assert_int_equal(moec_encoder_new(&e, t, &err), MOEC_OK);
    for (size_t i = 0; i < MOEC_COUNT(rows); i++) {
        moec_ids got = {0}, want = {0};
        uint64_t bad = 100;
        assert_int_equal(moec_encode(&got, &bad, e, rows[i].bytes, strlen(rows[i].bytes), NULL, &err), MOEC_OK);
        assert_int_equal(bad, 100 + rows[i].n);
        assert_int_equal(moec_encode(&want, NULL, e, rows[i].same, strlen(rows[i].same), NULL, &err), MOEC_OK);
        assert_int_equal(got.n, want.n);
        assert_memory_equal(got.id, want.id, got.n * sizeof *got.id);
        moec_ids_release(&got);
        moec_ids_release(&want);
    }
    moec_encoder_free(e);
    moec_tokenizer_free(t);
}

static void merges_go_by_rank_then_from_the_left(void **state)
{
    (void)state;
#define MODEL(more, merges) FILE_OF("null", "null", more, LETTERS ",\"ab\":6,\"bc\":7,\"abc\":8,\"aa\":9", merges)
    assert_ids(MODEL("", "\"a b\""), "abcab", "6 2 6");
    assert_ids(MODEL("", "[\"b\",\"c\"],[\"a\",\"b\"]"), "abcab", "0 7 6");
    assert_ids(MODEL("", "[\"a\",\"b\"],[\"b\",\"c\"],[\"ab\",\"c\"]"), "abc", "8");
    assert_ids(MODEL("", "[\"a\",\"a\"]"), "aaaaa", "9 9 0");
    assert_ids(MODEL("", "\"#version: 0.2\",\"a b\",\"b c\",\"a b\""), "abc",
               "0 7"); /* the later of two equal rules counts */
    assert_ids(MODEL("\"ignore_merges\":true,", ""), "abc", "8");
    assert_ids(MODEL("\"ignore_merges\":false,", ""), "abc", "0 1 2");
    assert_ids(MODEL("\"dropout\":0.0,\"continuing_subword_prefix\":\"\",\"end_of_word_suffix\":null,", ""), "ad",
               "0 3");
#undef MODEL
}

static void unknown_characters(void **state)
{
    (void)state;
#define VOCAB LETTERS ",\"<unk>\":10,\"<0xC3>\":11,\"<0xA9>\":12,\"<0x7A>\":13"
    assert_ids(FILE_OF("null", "null", "", VOCAB, ""), "aXb", "0 1"); /* dropped */
    assert_ids(FILE_OF("null", "null", "\"unk_token\":\"<unk>\",", VOCAB, ""), "aXYb", "0 10 10 1");
    assert_ids(FILE_OF("null", "null", "\"unk_token\":\"<unk>\",\"fuse_unk\":true,", VOCAB, ""), "aXYb", "0 10 1");
    assert_ids(
        FILE_OF("null", "null", "\"unk_token\":\"<unk>\",\"fuse_unk\":true,\"byte_fallback\":true,", VOCAB, ""),
        "aX\xc3\xa9YYzb", "0 11 12 13 10 1"); /* unk comes behind the bytes, as in `tokenizers` */
    assert_ids(FILE_OF("null", "null", "\"unk_token\":\"<unk>\",\"byte_fallback\":true,", VOCAB, ""),
               "aX\xc3\xa9YYzb", "0 11 12 10 10 13 10 1");
    assert_ids(FILE_OF("null", "null", "\"unk_token\":\"none\",", VOCAB, ""), "aX",
               "model: unk_token is needed, but is not in the vocabulary");
#undef VOCAB
}

static void splits_do_what_they_are_called(void **state)
{
    (void)state;
    static const char *const behaviours[] = {"Isolated", "Removed", "MergedWithPrevious", "MergedWithNext",
                                             "Contiguous"};
    /* "a--b-c": rules that join what stays together */
    static const char *const want[] = {"0 5 5 1 5 2", "0 1 2", "20 5 21 2", "0 5 22 23", "0 24 1 5 2"};
    for (size_t i = 0; i < MOEC_COUNT(behaviours); i++) {
        char json[2000];
        snprintf(json, sizeof json,
                 "{\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"String\":\"-\"},\"behavior\":\"%s\","
                 "\"invert\":false},"
                 "\"model\":{\"vocab\":{" LETTERS ",\"a-\":20,\"b-\":21,\"-b\":22,\"-c\":23,\"--\":24},"
                 "\"merges\":[\"a -\",\"b -\",\"- b\",\"- c\",\"- -\"]}}",
                 behaviours[i]);
        assert_ids(json, "a--b-c", want[i]);
    }
#define SP(scheme, split) \
    "{\"type\":\"Metaspace\",\"replacement\":\"_\",\"prepend_scheme\":\"" scheme "\",\"split\":" split "}"
#define VOCAB LETTERS ",\"_\":9"
    assert_ids(FILE_OF("null", SP("always", "true"), "", VOCAB, ""), "a b", "9 0 9 1");
    assert_ids(FILE_OF("null", SP("never", "false"), "", VOCAB, ""), "a b", "0 9 1");
    assert_ids(FILE_OF("null", SP("first", "true"), "", VOCAB, ""), " a", "9 0");
    assert_ids(FILE_OF("{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Prepend\",\"prepend\":\"_\"},{\"type\":"
                       "\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"_\"}]}",
                       "null", "", VOCAB, ""),
               " a b", "9 9 0 9 1");
#undef VOCAB
#undef SP
    assert_ids(FILE_OF("{\"type\":\"NFC\"}", "null", "", "\"\xc3\xa9\":0,\"\xe1\xbb\x87\":1", ""),
               "e\xcc\x81"
               "e\xcc\x82\xcc\xa3\xc3\xa9",
               "0 1 0");
    assert_ids(FILE_OF("{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Strip\"},{\"type\":\"Lowercase\"}]}",
                       "null", "", LETTERS, ""),
               "\xc2\xa0 A-B \n", "0 5 1");
}

static void added_tokens(void **state)
{
    (void)state;
    static const char json[] =
        "{\"added_tokens\":["
        "{\"id\":9,\"content\":\"<s>\",\"special\":true},{\"id\":9,\"content\":\"<s>>\",\"special\":true},"
        "{\"id\":9,\"content\":\"<l>\",\"special\":true,\"lstrip\":true},{\"id\":9,\"content\":\"<r>\",\"special\":"
        "true,\"rstrip\":true},"
        "{\"id\":9,\"content\":\"<w>\",\"special\":true,\"single_word\":true},{\"id\":9,\"content\":\"AB\","
        "\"special\":false,\"normalized\":true}],"
        "\"normalizer\":{\"type\":\"Lowercase\"},"
        "\"post_processor\":{\"type\":\"Sequence\",\"processors\":[{\"type\":\"ByteLevel\"},{\"type\":"
        "\"TemplateProcessing\","
        "\"single\":[{\"SpecialToken\":{\"id\":\"<s>\",\"type_id\":0}},{\"Sequence\":{\"id\":\"A\",\"type_id\":0}},"
        "{\"SpecialToken\":{\"id\":\"e\",\"type_id\":0}}],\"special_tokens\":{\"<s>\":{\"ids\":[6]},\"e\":{\"ids\":["
        "7,3]}}}]},"
        "\"model\":{\"vocab\":{" LETTERS "},\"merges\":[]}}";
    static const struct {
        const char *text, *ids;
        bool special;
    } rows[] = {
        {"a<s>b", "0 6 1", false},
        {"<s>><s>", "7 6", false},
        {"a  <l> b", "0 8 4 1", false},
        {"a <r>  b", "0 4 9 1", false},
        {"a<w>b <w> -<w>", "0 1 4 10 4 5 10", false},
        {"aBcAb", "11 2 11", false},
        {"<r> <l>c", "9 8 2", false},
        {"", "", false},
        {"", "6 7 3", true},
        {"a", "6 0 7 3", true},
        {"<s", "", false},
    };
    moec_tokenizer *t = load_text(json);
    assert_int_equal(moec_tokenizer_vocab_size(t), 12);
    assert_int_equal(moec_tokenizer_bos(t), 6);
    assert_int_equal(moec_tokenizer_eos(t), 7);
    for (size_t i = 0; i < MOEC_COUNT(rows); i++)
        assert_string_equal(ids_of(t, rows[i].text, strlen(rows[i].text), rows[i].special), rows[i].ids);
    moec_tokenizer_free(t);
}

/* ---- against a plain reference ---- */

static uint32_t next(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

enum { RULES = 40, LETTER_COUNT = 5, LONGEST = 700 };

/* The rule of lowest rank first, leftmost on ties, by looking at everything again after each step. */
static size_t merge_plainly(int32_t *id, size_t n, int32_t (*rule)[3])
{
    for (;;) {
        size_t best = n, rank = RULES;
        for (size_t i = 0; i + 1 < n; i++)
            for (size_t r = 0; r < rank; r++)
                if (rule[r][0] == id[i] && rule[r][1] == id[i + 1]) {
                    best = i;
                    rank = r;
                }
        if (best == n)
            return n;
        id[best] = rule[rank][2];
        memmove(id + best + 1, id + best + 2, (n - best - 2) * sizeof *id);
        n--;
    }
}

/* Random rules over a few letters; tokens are numbered as they arise. */
static char *random_file(int32_t (*rule)[3], uint32_t *seed)
{
    static char token[LETTER_COUNT + RULES][512], json[200000];
    size_t at = 0, n = LETTER_COUNT;
    for (int i = 0; i < LETTER_COUNT; i++)
        snprintf(token[i], sizeof token[i], "%c", 'a' + i);
    for (size_t r = 0; r < RULES;) {
        uint32_t a = next(seed) % (uint32_t)n, b = next(seed) % (uint32_t)n;
        char both[1024];
        snprintf(both, sizeof both, "%s%s", token[a], token[b]);
        bool there = strlen(both) > 12;
        for (size_t k = 0; k < n; k++)
            there = there || strcmp(token[k], both) == 0;
        if (there)
            continue;
        memcpy(token[n], both, strlen(both) + 1);
        rule[r][0] = (int32_t)a;
        rule[r][1] = (int32_t)b;
        rule[r++][2] = (int32_t)n++;
    }
    for (size_t r = RULES - 1; r > 0; r--) { /* ranks need not follow the order in which tokens arise */
        size_t other = next(seed) % (r + 1);
        for (int k = 0; k < 3; k++) {
            int32_t x = rule[r][k];
            rule[r][k] = rule[other][k];
            rule[other][k] = x;
        }
    }
    at += (size_t)snprintf(json + at, sizeof json - at, "{\"model\":{\"vocab\":{");
    for (size_t i = 0; i < n; i++)
        at += (size_t)snprintf(json + at, sizeof json - at, "%s\"%s\":%zu", i ? "," : "", token[i], i);
    at += (size_t)snprintf(json + at, sizeof json - at, "},\"merges\":[");
    for (size_t r = 0; r < RULES; r++)
        at += (size_t)snprintf(json + at, sizeof json - at, "%s\"%s %s\"", r ? "," : "", token[rule[r][0]],
                               token[rule[r][1]]);
    snprintf(json + at, sizeof json - at, "]}}");
    return json;
}

static void merging_equals_the_plain_way(void **state)
{
    (void)state;
    uint32_t seed = 7;
    for (int round = 0; round < 60; round++) {
        int32_t rule[RULES][3];
        moec_err err = {MOEC_OK, ""};
        moec_encoder *e = NULL;
        moec_tokenizer *t = load_text(random_file(rule, &seed));
        assert_int_equal(moec_encoder_new(&e, t, &err), MOEC_OK);
        for (int k = 0; k < 60; k++) {
            char text[LONGEST];
            int32_t want[LONGEST];
            moec_ids got = {0};
            size_t n = 1 + next(&seed) % (k % 2 ? 60 : LONGEST - 1);
            uint32_t letters = 1 + next(&seed) % LETTER_COUNT;
            for (size_t i = 0; i < n; i++) {
                want[i] = (int32_t)(next(&seed) % letters);
                text[i] = (char)('a' + want[i]);
            }
            size_t left = merge_plainly(want, n, rule);
            assert_int_equal(moec_encode(&got, NULL, e, text, n, NULL, &err), MOEC_OK);
            assert_int_equal(got.n, left);
            assert_memory_equal(got.id, want, left * sizeof *want);
            moec_ids_release(&got);
        }
        moec_encoder_free(e);
        moec_tokenizer_free(t);
    }
}

static void classes_of_classes(void **state)
{
    (void)state;
    /* What the class matches is taken away; the rest shows what it did not. */
#define REST(regex, text, want) \
    assert_ids(FILE_OF("null", \
                       "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" regex "\"},\"behavior\":\"Removed\"}", "", \
                       "\"a\":0,\"b\":1,\"c\":2,\"x\":3,\"[\":4,\"-\":5,\"\xe4\xb8\xad\":6,\"\xe3\x80\x82\":7", ""), \
               text, want)
#define ALL "abcx[-\xe4\xb8\xad\xe3\x80\x82"
    REST("[a-c&&[^b]]", ALL, "1 3 4 5 6 7");
    REST("[a-c&&b-x&&[^b]]", ALL, "0 1 3 4 5 6 7");
    REST("[^a-c&&b-x]+", ALL, "1 2"); /* ^ holds for the whole intersection */
    REST("[a[bc]-]", ALL, "3 4 6 7");
    REST("[^a[bc]]", ALL, "0 1 2");
    REST("[^[^a]]+", "aab", "1");
    REST("[\\\\p{L}&&[^\\\\p{Han}]]+", ALL, "4 5 6 7"); /* Kimi-K2's */
    REST("\\\\p{Han}", ALL, "0 1 2 3 4 5 7");               /* by script, not by script extensions */
    REST("[\\\\W&&[^-]]", ALL, "0 1 2 3 5 6");
    REST("[a&b]", ALL, "2 3 4 5 6 7");
    REST("(?:(?i:A)|[b&&[ab]]){2}", ALL, "2 3 4 5 6 7");
#undef ALL
#undef REST
}

/* ---- hostile files and texts ---- */

static void bad_files_are_refused_with_a_reason(void **state)
{
    (void)state;
#define NORM(node) FILE_OF(node, "null", "", LETTERS, "")
#define PRE(node) FILE_OF("null", node, "", LETTERS, "")
#define SPLIT(regex) PRE("{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" regex "\"},\"behavior\":\"Isolated\"}")
    static const struct {
        const char *json, *want;
    } rows[] = {
        {"", "t.json: JSON line"},
        {"[]", "t.json: an object was expected"},
        {"{}", "t.json: model is missing"},
        {NORM("{\"type\":\"Precompiled\"}"), "t.json: normalizer: type \"Precompiled\" is not supported"},
        {NORM("{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Nmt\"}]}"),
         "normalizer: type \"Nmt\" is not supported"},
        {NORM("{\"type\":\"Sequence\"}"), "normalizer: Sequence: setting normalizers: a list was expected"},
        {NORM("{\"type\":\"Prepend\"}"), "normalizer: Prepend: setting prepend: a string was expected"},
        {NORM("{\"type\":\"Strip\",\"strip_left\":1}"), "setting strip_left: true or false was expected"},
        {NORM("7"), "normalizer: an object with a \"type\" was expected"},
        {PRE("{\"type\":\"X\"}"), "t.json: pre_tokenizer: type \"X\" is not supported"},
        {PRE("{\"type\":\"Split\",\"pattern\":{\"String\":\"x\"},\"behavior\":\"Sideways\"}"),
         "setting behavior: \"Sideways\""},
        {PRE("{\"type\":\"Split\",\"pattern\":\"x\",\"behavior\":\"Isolated\"}"), "setting pattern"},
        {PRE("{\"type\":\"Metaspace\",\"replacement\":\"__\"}"), "setting replacement: one character was expected"},
        {PRE("{\"type\":\"Metaspace\",\"replacement\":\"_\",\"add_prefix_space\":false}"), "contradict each other"},
        {SPLIT("("), "regular expression: missing closing parenthesis"},
        {SPLIT("a)"), "a closing parenthesis without an opening one"},
        {SPLIT("[a"), "a class without end"},
        {SPLIT("[a&&]"), "an intersection (&&) with nothing"},
        {SPLIT("[&&a]"), "an intersection (&&) with nothing"},
        {SPLIT("(?i:[a&&[b]])"), "a class of classes under (?i)"},
        {SPLIT("(?i:a|xST)"), "a pair of letters that fold to one character"},
        {SPLIT("(?i:[\\\\p{Lu}])"), "a property that knows case"},
        {SPLIT("(?i:[\\\\P{L}])"), "a property that knows case"},
        {SPLIT("[a-[b]]"), "a range to a class"},
        {SPLIT("[a&&[]"), "an empty class"},
        {SPLIT("[[a]"), "a class without end"},
        {SPLIT("[[:alpha:]]"), "a POSIX bracket"},
        {SPLIT("[[[[[[[[[[[[[[[[[[[[a]]]]]]]]]]]]]]]]]]]]"), "deeper than 16"},
        {SPLIT("\\\\q"), "escape \\q in this place"},
        {SPLIT("\\\\p{Nonsense}"), "regular expression"},
        {SPLIT("*a"), "a quantifier behind nothing"},
        {SPLIT("a(?i)b|c"), "an option that does not begin a group"},
        {SPLIT("(?x)a"), "a group of this kind"},
        {SPLIT("\\\\"), "a backslash at the end"},
        {FILE_OF("null", "null", "\"dropout\":0.1,", LETTERS, ""), "setting dropout is not supported"},
        {FILE_OF("null", "null", "\"end_of_word_suffix\":\"</w>\",", LETTERS, ""),
         "setting end_of_word_suffix is not supported"},
        {FILE_OF("null", "null", "", "\"a\":-1", ""), "model: BPE: token \"a\": an id from 0"},
        {FILE_OF("null", "null", "", "\"a\":2147483647", ""), "token \"a\": an id from 0"},
        {FILE_OF("null", "null", "", "\"a\":1.5", ""), "token \"a\": an id from 0"},
        {FILE_OF("null", "null", "", "\"a\":1,\"b\":1", ""), "tokens \"a\" and \"b\" have the same id 1"},
        {FILE_OF("null", "null", "", "\"a\":1,\"a\":2", ""), "duplicate"},
        {FILE_OF("null", "null", "", LETTERS, "\"a x\""),
         "merge 0 (\"a\" + \"x\"): token \"x\" is not in the vocabulary"},
        {FILE_OF("null", "null", "", LETTERS, "[\"a\",\"b\"]"), "token \"ab\" is not in the vocabulary"},
        {FILE_OF("null", "null", "", LETTERS, "\"a  b\""), "merge 0: \"left right\""},
        {FILE_OF("null", "null", "", LETTERS, "[\"a\"]"), "merge 0: \"left right\""},
        {FILE_OF("null", "null", "", LETTERS, "7"), "merge 0: \"left right\""},
        {"{\"model\":{\"type\":\"WordPiece\"}}", "model: type \"WordPiece\" is not supported"},
        {"{\"model\":{\"vocab\":{},\"merges\":[]},\"decoder\":{\"type\":\"CTC\"}}",
         "decoder: type \"CTC\" is not supported"},
        {"{\"model\":{\"vocab\":{},\"merges\":[]},\"post_processor\":{\"type\":\"Bert\"}}",
         "post_processor: type \"Bert\""},
        {"{\"model\":{\"vocab\":{},\"merges\":[]},\"added_tokens\":[{\"id\":0,\"content\":\"x\"},{\"id\":1,"
         "\"content\":\"x\"}]}",
         "added_tokens: token \"x\" is there twice"},
        {"{\"model\":{\"vocab\":{},\"merges\":[]},\"added_tokens\":{}}", "added_tokens: a list was expected"},
    };
    for (size_t i = 0; i < MOEC_COUNT(rows); i++)
        assert_refused(rows[i].json, MOEC_EFORMAT, rows[i].want);
    moec_err err;
    moec_tokenizer *t = NULL;
    assert_int_equal(moec_tokenizer_load(&t, "/no/such/tokenizer.json", &err), MOEC_EIO);
    assert_null(t);
#undef NORM
#undef PRE
#undef SPLIT
}

static void nesting_is_bounded(void **state)
{
    (void)state;
    char json[20000];
    size_t at = (size_t)snprintf(json, sizeof json, "{\"normalizer\":");
    for (int i = 0; i < 100; i++)
        at += (size_t)snprintf(json + at, sizeof json - at, "{\"type\":\"Sequence\",\"normalizers\":[");
    at += (size_t)snprintf(json + at, sizeof json - at, "{\"type\":\"NFC\"}");
    for (int i = 0; i < 100; i++)
        at += (size_t)snprintf(json + at, sizeof json - at, "]}");
    snprintf(json + at, sizeof json - at, ",\"model\":{\"vocab\":{},\"merges\":[]}}");
    assert_refused(json, MOEC_EFORMAT, "nested deeper than 16");
    at = (size_t)snprintf(json, sizeof json,
                          "{\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Lowercase\"}");
    for (int i = 0; i < 100; i++)
        at += (size_t)snprintf(json + at, sizeof json - at, ",{\"type\":\"Lowercase\"}");
    snprintf(json + at, sizeof json - at, "]},\"model\":{\"vocab\":{},\"merges\":[]}}");
    assert_refused(json, MOEC_EFORMAT, "more than 64 nodes");
}

static void endless_backtracking_is_an_error(void **state)
{
    (void)state;
    moec_tokenizer *t = load_text(
        FILE_OF("null", "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"(a|aa|a+)+[bc]d\"},\"behavior\":\"Isolated\"}",
                "", LETTERS, ""));
    char text[200];
    memset(text, 'a', sizeof text);
    memcpy(text + sizeof text - 2, "-d", 2); /* without a d PCRE2 sees at once that nothing matches */
    const char *said = ids_of(t, text, sizeof text, false);
    if (!strstr(said, "cannot be matched at byte 0"))
        fail_msg("%s", said);
    assert_string_equal(ids_of(t, "abd", 3, false), "0 1 3"); /* the tokenizer is as good as before */
    moec_tokenizer_free(t);
    assert_ids(FILE_OF("null", "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"x*\"},\"behavior\":\"Isolated\"}", "",
                       LETTERS, ""),
               "abc", "0 1 2");
    assert_ids(
        FILE_OF("{\"type\":\"Replace\",\"pattern\":{\"Regex\":\"\"},\"content\":\"-\"}", "null", "", LETTERS, ""),
        "ab", "5 0 5 1 5");
}

static void text_does_not_grow_without_bound(void **state)
{
    (void)state;
    char json[20000];
    size_t at = (size_t)snprintf(json, sizeof json,
                                 "{\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Lowercase\"}");
    for (int i = 0; i < 60; i++)
        at += (size_t)snprintf(
            json + at, sizeof json - at,
            ",{\"type\":\"Replace\",\"pattern\":{\"String\":\"a\"},\"content\":\"aaaaaaaaaaaaaaaaaaaa\"}");
    snprintf(json + at, sizeof json - at, "]},\"model\":{\"vocab\":{" LETTERS "},\"merges\":[]}}");
    moec_tokenizer *t = load_text(json);
    const char *said = ids_of(t, "aaaa", 4, false);
    if (!strstr(said, "4 bytes of text become more than"))
        fail_msg("%s", said);
    moec_tokenizer_free(t);
    at = (size_t)snprintf(json, sizeof json,
                          "{\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"ByteLevel\"}");
    for (int i = 0; i < 20; i++)
        at += (size_t)snprintf(json + at, sizeof json - at, ",{\"type\":\"ByteLevel\"}");
    snprintf(json + at, sizeof json - at, "]},\"model\":{\"vocab\":{},\"merges\":[]}}");
    assert_refused(json, MOEC_EFORMAT, "ByteLevel: more than 4");
}

static void a_long_word_takes_no_quadratic_time(void **state)
{
    (void)state;
    enum { N = 1 << 20 };
    char *text = NULL;
    moec_err err = {MOEC_OK, ""};
    moec_encoder *e = NULL;
    moec_ids ids = {0};
    assert_int_equal(MOEC_NEW(text, (size_t)N, &err), MOEC_OK);
    memset(text, 'a', N);
    moec_tokenizer *t = load_text(FILE_OF("null", "null", "", LETTERS ",\"aa\":6,\"aaaa\":7", "\"a a\",\"aa aa\""));
    assert_int_equal(moec_encoder_new(&e, t, &err), MOEC_OK);
    assert_int_equal(moec_encode(&ids, NULL, e, text, N, NULL, &err), MOEC_OK);
    assert_int_equal(ids.n, N / 4);
    for (size_t i = 0; i < ids.n; i++)
        assert_int_equal(ids.id[i], 7);
    moec_ids_release(&ids);
    moec_encoder_free(e);
    moec_tokenizer_free(t);
    t = load_text(FILE_OF("{\"type\":\"NFC\"}", "null", "", LETTERS, "")); /* marks that have to be sorted */
    assert_int_equal(moec_encoder_new(&e, t, &err), MOEC_OK);
    for (size_t i = 0; i + 4 <= N; i += 4)
        memcpy(text + i, "\xcc\x81\xcc\xa3", 4);
    assert_int_equal(moec_encode(&ids, NULL, e, text, N, NULL, &err), MOEC_OK);
    assert_int_equal(ids.n, 0);
    moec_encoder_free(e);
    moec_tokenizer_free(t);
    moec_ids_release(&ids);
    moec_free(text);
}

/* ---- threads and memory ---- */

typedef struct shared {
    const moec_tokenizer *t;
    size_t n[64];
} shared;

static moec_status encode_some(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    shared *s = ctx;
    (void)worker;
    for (int64_t i = lo; i < hi; i++) {
        moec_encoder *e;
        moec_ids ids = {0};
        moec_status st = moec_encoder_new(&e, s->t, err);
        if (st != MOEC_OK)
            return st;
        for (int k = 0; k < 50 && st == MOEC_OK; k++)
            st = moec_encode(&ids, NULL, e, "The same text, naïvely, in every thread: 12345 語", 52, NULL, err);
        s->n[i] = ids.n;
        moec_ids_release(&ids);
        moec_encoder_free(e);
        if (st != MOEC_OK)
            return st;
    }
    return MOEC_OK;
}

static void one_tokenizer_serves_many_threads(void **state)
{
    (void)state;
    moec_err err = {MOEC_OK, ""};
    moec_tokenizer *t = NULL;
    shared s = {0};
    int before = moec_par_threads();
    assert_int_equal(moec_tokenizer_load(&t, DEMO, &err), MOEC_OK);
    s.t = t;
    moec_par_set_threads(4);
    assert_int_equal(moec_par_for(64, 1, encode_some, &s, &err), MOEC_OK);
    moec_par_set_threads(before);
    for (int i = 1; i < 64; i++)
        assert_int_equal(s.n[i], s.n[0]);
    moec_tokenizer_free(t);
}

static const char everything[] =
    "{\"added_tokens\":[{\"id\":9,\"content\":\"<s>\",\"special\":true,\"single_word\":true},"
    "{\"id\":10,\"content\":\"QQ\",\"special\":false,\"normalized\":true,\"lstrip\":true}],"
    "\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFKC\"},{\"type\":\"Lowercase\"},{\"type\":"
    "\"Strip\"},"
    "{\"type\":\"Prepend\",\"prepend\":\"_\"},{\"type\":\"Replace\",\"pattern\":{\"Regex\":\"d+\"},\"content\":\"c\"}"
    "]},"
    "\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Digits\"},{\"type\":\"Metaspace\","
    "\"replacement\":\"_\"},"
    "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"\\\\bc\"},\"behavior\":\"Contiguous\"},{\"type\":\"ByteLevel\"}]},"
    "\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"x\"}},{\"Sequence\":"
    "{\"id\":\"A\"}}],"
    "\"special_tokens\":{\"x\":{\"ids\":[0]}}},"
    "\"decoder\":{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Replace\",\"pattern\":{\"String\":\"a\"},"
    "\"content\":\" \"},"
    "{\"type\":\"ByteFallback\"},{\"type\":\"Metaspace\",\"replacement\":\"_\"},{\"type\":\"Strip\",\"content\":\" "
    "\",\"start\":1,\"stop\":1},"
    "{\"type\":\"Fuse\"},{\"type\":\"ByteLevel\"}]},"
    "\"model\":{\"byte_fallback\":true,\"unk_token\":\"-\",\"vocab\":{" LETTERS ",\"<0x5F>\":6,\"ab\":7,\"abc\":8},"
    "\"merges\":[\"a b\",\"ab c\"]}}";

static moec_status do_everything(moec_err *err)
{
    static const char text[] =
        "ab c<s>e\xcc\x81\xcc\xa3 \xff 123 qq _abcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabc ddd";
    moec_status st = MOEC_OK;
    moec_tokenizer *t = NULL;
    moec_encoder *e = NULL;
    moec_ids ids = {0};
    char *back = NULL;
    size_t len = 0;
    uint64_t bad = 0;
    moec_encode_opts opts = {.add_special = true};
    MOEC_TRY(moec_tokenizer_parse(&t, everything, sizeof everything - 1, "t.json", err));
    MOEC_TRY(moec_encoder_new(&e, t, err));
    MOEC_TRY(moec_encode(&ids, &bad, e, text, sizeof text - 1, &opts, err));
    MOEC_TRY(moec_decode(&back, &len, t, ids.id, ids.n, false, err));
done:
    moec_free(back);
    moec_ids_release(&ids);
    moec_encoder_free(e);
    moec_tokenizer_free(t);
    return st;
}

static void survives_every_failed_allocation(void **state)
{
    (void)state;
    moec_err err = {MOEC_OK, ""};
    moec_status st = MOEC_ENOMEM;
    long k = 0;
    for (; st == MOEC_ENOMEM && k < 100000; k++) {
        moec_test_allocs_left = k;
        err = (moec_err){MOEC_OK, ""};
        st = do_everything(&err);
        moec_test_allocs_left = LONG_MAX;
        if (st != MOEC_OK) {
            assert_int_equal(err.code, st);
            assert_true(err.text[0] != '\0');
        }
    }
    if (st != MOEC_OK)
        fail_msg("%s", err.text);
    assert_true(k > 50);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(demo_ids_are_those_of_tokenizers),
        cmocka_unit_test(demo_text_comes_back),
        cmocka_unit_test(a_limit_gives_the_beginning),
        cmocka_unit_test(ill_formed_text_is_repaired_and_counted),
        cmocka_unit_test(merges_go_by_rank_then_from_the_left),
        cmocka_unit_test(unknown_characters),
        cmocka_unit_test(splits_do_what_they_are_called),
        cmocka_unit_test(classes_of_classes),
        cmocka_unit_test(added_tokens),
        cmocka_unit_test(merging_equals_the_plain_way),
        cmocka_unit_test(bad_files_are_refused_with_a_reason),
        cmocka_unit_test(nesting_is_bounded),
        cmocka_unit_test(endless_backtracking_is_an_error),
        cmocka_unit_test(text_does_not_grow_without_bound),
        cmocka_unit_test(a_long_word_takes_no_quadratic_time),
        cmocka_unit_test(one_tokenizer_serves_many_threads),
        cmocka_unit_test(survives_every_failed_allocation),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
