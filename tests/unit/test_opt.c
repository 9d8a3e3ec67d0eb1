/* Option rows: every kind, every way to write it, every way to get it wrong; help, man page, completion, JSON. */
#include "base/mem.h"
#include "base/opt.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

typedef struct params {
    bool flag, on;
    int64_t number, unset;
    double real, share;
    uint64_t size;
    const char *text;
    moec_opt_list list;
    int choice;
} params;

static const char *const colours[] = {"red", "green", "blue", NULL};
static const moec_opt rows[] = {
    {.kind = MOEC_OPT_HEADING, .help = "what is painted"},
    {"flag", 'f', MOEC_FLAG(params, flag), .help = "switch something"},
    {"on", 0, MOEC_FLAG(params, on), .fallback = "on", .help = "do something"},
    {"number", 'n', MOEC_INT(params, number), .fallback = "5", .lo = 1, .hi = 10, .value = "N", .help = "how many"},
    {"unset", 0, MOEC_INT(params, unset), .fallback = "-1", .lo = 0, .hi = 99, .value = "N", .help = "given or not"},
    {"real", 0, MOEC_REAL(params, real), .fallback = "0.5", .lo = -1, .hi = 1, .help = "how much"},
    {"share", 0, MOEC_SHARE(params, share), .fallback = "25%", .lo = 0.01, .hi = 0.9, .help = "which part"},
    {"size", 0, MOEC_SIZE(params, size), .fallback = "1MiB", .help = "how big"},
    {"text", 't', MOEC_TEXT(params, text), .value = "FILE", .help = "which file"},
    {.kind = MOEC_OPT_HEADING, .help = "with what"},
    {"list", 0, MOEC_LIST(params, list), .help = "which files"},
    {"choice", 0, MOEC_CHOICE(params, choice), .choices = colours, .fallback = "green", .help = "which colour"},
    {.kind = MOEC_OPT_END},
};
static const moec_verb verb = {
    .name = "paint", .args = "WALL [DOOR] [options]", .brief = "paints", .about = "Paints a wall.\n.and\\a 'door'",
    .examples = "moecompress paint w\nmoecompress paint w d", .opts = rows, .min_args = 1, .max_args = 2};

enum { ARGS = 16 };

/* Splits a line at blanks and parses it. Words stay valid until the next call. */
static moec_status parse(params *p, moec_opt_list *words, moec_err *err, const char *line)
{
    static char text[400];
    char *argv[ARGS + 1] = {NULL};
    int argc = 0;
    snprintf(text, sizeof text, "paint %s", line);
    for (char *save = NULL, *w = strtok_r(text, " ", &save); w && argc < ARGS; w = strtok_r(NULL, " ", &save))
        argv[argc++] = w;
    memset(p, 0xaa, sizeof *p);
    return moec_opt_parse(p, words, &verb, argc, argv, err);
}

static void accepts(params *p, const char *line)
{
    moec_opt_list words;
    moec_err err = {MOEC_OK, ""};
    if (parse(p, &words, &err, line) != MOEC_OK)
        fail_msg("%s: %s", line, err.text);
}

static void refuses(const char *line, const char *text)
{
    params p;
    moec_opt_list words;
    moec_err err = {MOEC_OK, ""};
    if (parse(&p, &words, &err, line) != MOEC_EINVAL)
        fail_msg("%s: was not refused", line);
    if (!strstr(err.text, text))
        fail_msg("%s: '%s' does not say '%s'", line, err.text, text);
}

static bool is(double got, double want)
{
    return fabs(got - want) < 1e-12;
}

static void defaults_are_set(void **state)
{
    (void)state;
    params p;
    accepts(&p, "wall");
    assert_false(p.flag);
    assert_true(p.on);
    assert_int_equal(p.number, 5);
    assert_int_equal(p.unset, -1);
    assert_true(is(p.real, 0.5));
    assert_true(is(p.share, 0.25));
    assert_int_equal(p.size, 1048576);
    assert_null(p.text);
    assert_int_equal(p.list.n, 0);
    assert_int_equal(p.choice, 1);
}

static void every_spelling_is_read(void **state)
{
    (void)state;
    params p;
    moec_opt_list words;
    moec_err err;
    accepts(&p, "w --flag --no-on --number 7 --real=-0.25 --share 0.5 --size 2GiB --text a.txt --choice=blue");
    assert_true(p.flag && !p.on);
    assert_int_equal(p.number, 7);
    assert_true(is(p.real, -0.25));
    assert_true(is(p.share, 0.5));
    assert_int_equal(p.size, INT64_C(2147483648));
    assert_string_equal(p.text, "a.txt");
    assert_int_equal(p.choice, 2);
    accepts(&p, "w --real -1 --share=90%");
    assert_true(is(p.real, -1));
    assert_true(is(p.share, 0.9));
    accepts(&p, "w -fn3 -t-odd");
    assert_true(p.flag);
    assert_int_equal(p.number, 3);
    assert_string_equal(p.text, "-odd");
    accepts(&p, "w --text=");
    assert_string_equal(p.text, "");
    assert_int_equal(parse(&p, &words, &err, "a -f -- --flag"), MOEC_OK);
    assert_int_equal(words.n, 2);
    assert_string_equal(words.at[1], "--flag");
    assert_int_equal(parse(&p, &words, &err, "- -f"), MOEC_OK);
    assert_string_equal(words.at[0], "-");
}

static void lists_take_several(void **state)
{
    (void)state;
    params p;
    moec_opt_list words;
    moec_err err;
    assert_int_equal(parse(&p, &words, &err, "w --list a b c -f --list d --list=e door"), MOEC_OK);
    assert_int_equal(p.list.n, 5);
    assert_string_equal(p.list.at[2], "c");
    assert_string_equal(p.list.at[4], "e");
    assert_int_equal(words.n, 2); /* --list=e took one value only */
    refuses("--list a w", "--list takes every word behind it");
}

static void mistakes_are_named(void **state)
{
    (void)state;
    refuses("", "a word is missing; usage: moecompress paint WALL");
    refuses("a b c", "'c' is one word too many");
    refuses("w --nmuber 3", "did you mean --number?");
    refuses("w --numb 3", "no option --numb"); /* no abbreviations */
    refuses("w --zzzzzz", "see moecompress paint --help");
    refuses("w -z", "no option -z");
    refuses("w --number", "--number: a value is missing (N)");
    refuses("w --number --flag", "a value is missing");
    refuses("w --number x", "'x' is not a whole number");
    refuses("w --number 3x", "not a whole number");
    refuses("w --number=", "not a whole number");
    refuses("w --number 1.5", "not a whole number");
    refuses("w --number 11", "11 is not in 1 .. 10");
    refuses("w --number 0", "not in 1 .. 10");
    refuses("w --unset -1", "not in 0 .. 99");
    refuses("w --number 99999999999999999999", "not in 1 .. 10");
    refuses("w --real nan", "not a number");
    refuses("w --real inf", "not a number");
    refuses("w --real 1.5", "not in -1 .. 1");
    refuses("w --share 95%", "not in 1% .. 90%");
    refuses("w --share 25", "not in 1% .. 90%");
    refuses("w --share 25percent", "not a share such as");
    refuses("w --size 12XB", "--size: '12XB' is not a size");
    refuses("w --choice black", "'black' is none of red, green, blue");
    refuses("w --number 2 --number 3", "--number is given twice");
    refuses("w --flag --no-flag", "--flag is given twice");
    refuses("w --flag=1", "--flag takes no value");
    refuses("w --no-number", "no option --no-number");
    refuses("w --=3", "no option --"); /* a heading has no name */
}

static void sizes_are_read(void **state)
{
    (void)state;
    static const struct { const char *text; uint64_t bytes; } good[] = {
        {"0", 0}, {"1048576", 1048576}, {"12GiB", UINT64_C(12) << 30}, {"500MB", UINT64_C(500000000)},
        {"1kB", 1000}, {"1KiB", 1024}, {"2TiB", UINT64_C(2) << 40}, {"3TB", UINT64_C(3000000000000)},
        {"1.5GiB", UINT64_C(3) << 29}, {"0.5kB", 500}, {"1.25 GiB", UINT64_C(5) << 28}, {"7B", 7}, {"2gb", 2000000000},
        {"18446744073709551615", UINT64_MAX}, {".5MiB", 524288},
    };
    static const char *const bad[] = {"", "GiB", "12G", "-1", "1.5", "1e3", "0x10", " 1", "1 ", "12GiBs", ".", "1.GiBB",
                                      "18446744073709551616", "99999999TiB", "nan", "1,5GiB"};
    moec_err err;
    uint64_t v;
    for (size_t i = 0; i < MOEC_COUNT(good); i++) {
        assert_int_equal(moec_size_parse(&v, good[i].text, &err), MOEC_OK);
        assert_int_equal(v, good[i].bytes);
    }
    for (size_t i = 0; i < MOEC_COUNT(bad); i++)
        if (moec_size_parse(&v, bad[i], &err) != MOEC_EINVAL)
            fail_msg("'%s' was read as %llu", bad[i], (unsigned long long)v);
    static const struct { uint64_t bytes; const char *text; } shown[] = {
        {0, "0 B"}, {1023, "1023 B"}, {1024, "1.00 KiB"}, {UINT64_C(5) << 28, "1.25 GiB"}, {UINT64_C(123) << 20, "123 MiB"},
        {(UINT64_C(1) << 30) - 1, "1.00 GiB"}, {UINT64_C(3) << 50, "3072 TiB"},
    };
    char buf[32];
    for (size_t i = 0; i < MOEC_COUNT(shown); i++)
        assert_string_equal(moec_size_text(buf, sizeof buf, shown[i].bytes), shown[i].text);
}

static void values_become_json(void **state)
{
    (void)state;
    params p;
    char *text;
    accepts(&p, "w --list a b --size 2kB --text f");
    moec_json *v = moec_opt_json(&p, &verb);
    assert_int_equal(moec_json_dump(&text, v, 0, NULL), MOEC_OK);
    assert_string_equal(text, "{\"flag\": false, \"on\": true, \"number\": 5, \"unset\": -1, \"real\": 0.5, "
                              "\"share\": 0.25, \"size\": 2000, \"text\": \"f\", \"list\": [\"a\", \"b\"], "
                              "\"choice\": \"green\"}");
    moec_free(text);
    moec_json_free(v);
}

typedef void printer(FILE *to);
static const moec_verb *const verbs[] = {&verb, NULL};

static void print_help(FILE *to)
{
    moec_opt_help(to, &verb);
}

static void print_man(FILE *to)
{
    moec_opt_man(to, verbs);
}

static void print_bash(FILE *to)
{
    moec_opt_bash(to, verbs);
}

static void shows(printer *print, const char *const *wanted)
{
    char *text = NULL;
    size_t n = 0;
    FILE *to = open_memstream(&text, &n);
    assert_non_null(to);
    print(to);
    fclose(to);
    for (; *wanted; wanted++)
        if (!strstr(text, *wanted))
            fail_msg("'%s' is not in:\n%s", *wanted, text);
    free(text);
}

static void help_comes_from_the_rows(void **state)
{
    (void)state;
    static const char *const help[] = {
        "usage: moecompress paint WALL [DOOR] [options]", "  -f, --flag", "      --no-on", "do not do something",
        "--number N", "(1 to 10; default 5)", "given or not (0 to 99)", "(1% to 90%; default 25%)", "--list VALUE...",
        "(red, green, blue; default green)", "what is painted:\n  -f, --flag",
        "\nwith what:\n      --list", "  -t, --text FILE", "  moecompress paint w d\n", "--help", NULL};
    static const char *const man[] = {".TH MOECOMPRESS 1", ".SS \"paint\"", "\\-\\-number N", ".I with what\n.TP\n.B \\-\\-list", "\n\\&.and\\ea 'door'",
                                      ".SH EXIT STATUS", NULL};
    static const char *const bash[] = {"paint)", "--flag --no-on --number", "--choice) choices=\"red green blue\"",
                                       "complete -o filenames -F _moecompress moecompress", NULL};
    shows(print_help, help);
    shows(print_man, man);
    shows(print_bash, bash);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(defaults_are_set),   cmocka_unit_test(every_spelling_is_read),
        cmocka_unit_test(lists_take_several), cmocka_unit_test(mistakes_are_named),
        cmocka_unit_test(sizes_are_read),     cmocka_unit_test(values_become_json),
        cmocka_unit_test(help_comes_from_the_rows),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
