/* Parsing of option rows into a struct, and the values back out as JSON. Help, man page and completion are opt_help.c. */
#include "base/opt.h"

#include "base/word.h"

#include <ctype.h>
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

enum { ROWS_MAX = 128 };

typedef struct parser {
    char *params;
    const moec_verb *verb;
    moec_opt_list *words;
    int argc, at; /* at: next argument to be read */
    char **argv;
    bool seen[ROWS_MAX];
    const char *list; /* a LIST option that took words, for the hint when words are missing */
    moec_err *err;
} parser;

static void *field(void *params, const moec_opt *row)
{
    return (char *)params + row->offset;
}

static const void *const_field(const void *params, const moec_opt *row)
{
    return (const char *)params + row->offset;
}

/* --- values ------------------------------------------------------------------------------------------------------- */

static bool parse_real(double *out, const char *text, const char **rest)
{
    char *end;
    if (isspace((unsigned char)*text) || *text == '\0')
        return false;
    *out = strtod(text, &end);
    *rest = end;
    return end != text && isfinite(*out);
}

static bool has_range(const moec_opt *row)
{
    return row->lo < row->hi || row->lo > 0 || row->lo < 0;
}

static moec_status set_int(int64_t *out, const moec_opt *row, const char *text, bool checked, moec_err *err)
{
    char *end;
    errno = 0;
    long long v = isspace((unsigned char)*text) ? 0 : strtoll(text, &end, 10);
    if (*text == '\0' || isspace((unsigned char)*text) || end == text || *end != '\0')
        return moec_fail(err, MOEC_EINVAL, "--%s: '%s' is not a whole number", row->name, text);
    if (errno == ERANGE && !has_range(row))
        return moec_fail(err, MOEC_EINVAL, "--%s: %s is too large", row->name, text);
    if (errno == ERANGE || (checked && has_range(row) && ((double)v < row->lo || (double)v > row->hi)))
        return moec_fail(err, MOEC_EINVAL, "--%s: %s is not in %.15g .. %.15g", row->name, text, row->lo, row->hi);
    *out = v;
    return MOEC_OK;
}

static moec_status set_real(double *out, const moec_opt *row, const char *text, bool checked, moec_err *err)
{
    const char *rest;
    double v;
    if (!parse_real(&v, text, &rest) || *rest != '\0')
        return moec_fail(err, MOEC_EINVAL, "--%s: '%s' is not a number", row->name, text);
    if (checked && has_range(row) && (v < row->lo || v > row->hi))
        return moec_fail(err, MOEC_EINVAL, "--%s: %s is not in %.15g .. %.15g", row->name, text, row->lo, row->hi);
    *out = v;
    return MOEC_OK;
}

moec_status moec_share_parse(double *out, const char *text, moec_err *err)
{
    const char *rest;
    double v;
    bool number = parse_real(&v, text, &rest);
    if (number && strcmp(rest, "%") == 0)
        v /= 100.0;
    else if (!number || *rest != '\0')
        return moec_fail(err, MOEC_EINVAL, "'%s' is not a share such as 25%% or 0.25", text);
    *out = v;
    return MOEC_OK;
}

static moec_status set_share(double *out, const moec_opt *row, const char *text, bool checked, moec_err *err)
{
    double v, lo = has_range(row) ? row->lo : 0.0, hi = has_range(row) ? row->hi : 1.0;
    moec_status st = moec_within(err, moec_share_parse(&v, text, err), "--%s", row->name);
    if (st != MOEC_OK)
        return st;
    if (checked && (v < lo || v > hi))
        return moec_fail(err, MOEC_EINVAL, "--%s: %s is not in %.15g%% .. %.15g%%", row->name, text, lo * 100.0,
                         hi * 100.0);
    *out = v;
    return MOEC_OK;
}

static moec_status set_choice(int *out, const moec_opt *row, const char *text, moec_err *err)
{
    char known[600] = "";
    for (int i = 0; row->choices[i]; i++) {
        if (strcmp(row->choices[i], text) == 0) {
            *out = i;
            return MOEC_OK;
        }
        size_t n = strlen(known);
        snprintf(known + n, sizeof known - n, "%s%s", i > 0 ? ", " : "", row->choices[i]);
    }
    return moec_fail(err, MOEC_EINVAL, "--%s: '%s' is none of %s", row->name, text, known);
}

static bool is_true(const char *text)
{
    return text && (strcmp(text, "on") == 0 || strcmp(text, "true") == 0 || strcmp(text, "yes") == 0 ||
                    strcmp(text, "1") == 0);
}

/* checked: by the user, so the range holds; a default may lie outside, as a mark for "not given". */
static moec_status set_value(void *params, const moec_opt *row, const char *text, bool checked, moec_err *err)
{
    void *to = field(params, row);
    moec_opt_list *list;
    moec_status st;
    switch (row->kind) {
    case MOEC_OPT_FLAG:
        *(bool *)to = is_true(text);
        return MOEC_OK;
    case MOEC_OPT_INT:
        return set_int(to, row, text, checked, err);
    case MOEC_OPT_REAL:
        return set_real(to, row, text, checked, err);
    case MOEC_OPT_SIZE:
        st = moec_size_parse(to, text, err);
        return moec_within(err, st, "--%s", row->name);
    case MOEC_OPT_SHARE:
        return set_share(to, row, text, checked, err);
    case MOEC_OPT_TEXT:
        *(const char **)to = text;
        return MOEC_OK;
    case MOEC_OPT_LIST:
        list = to;
        if (list->n >= MOEC_OPT_LIST_MAX)
            return moec_fail(err, MOEC_EINVAL, "--%s: more than %d values", row->name, (int)MOEC_OPT_LIST_MAX);
        list->at[list->n++] = text;
        return MOEC_OK;
    case MOEC_OPT_CHOICE:
        return set_choice(to, row, text, err);
    case MOEC_OPT_END:
    case MOEC_OPT_HEADING:
        break;
    }
    return moec_fail(err, MOEC_EINVAL, "--%s: option of unknown kind", row->name);
}

static size_t field_size(moec_opt_kind kind)
{
    static const size_t size[] = {
        [MOEC_OPT_END] = 0,
        [MOEC_OPT_HEADING] = 0,
        [MOEC_OPT_FLAG] = sizeof(bool),
        [MOEC_OPT_INT] = sizeof(int64_t),
        [MOEC_OPT_REAL] = sizeof(double),
        [MOEC_OPT_SIZE] = sizeof(uint64_t),
        [MOEC_OPT_SHARE] = sizeof(double),
        [MOEC_OPT_TEXT] = sizeof(const char *),
        [MOEC_OPT_LIST] = sizeof(moec_opt_list),
        [MOEC_OPT_CHOICE] = sizeof(int),
    };
    return size[kind];
}

static moec_status set_defaults(void *params, const moec_verb *verb, moec_err *err)
{
    int n = 0;
    for (const moec_opt *row = verb->opts; row->kind != MOEC_OPT_END; row++, n++) {
        if (row->kind == MOEC_OPT_HEADING)
            continue;
        memset(field(params, row), 0, field_size(row->kind));
        moec_status st = row->fallback ? set_value(params, row, row->fallback, false, err) : MOEC_OK;
        if (st != MOEC_OK)
            return moec_within(err, st, "default");
    }
    return n <= ROWS_MAX ? MOEC_OK : moec_fail(err, MOEC_EINVAL, "%s: %d options are too many", verb->name, n);
}

/* --- arguments ---------------------------------------------------------------------------------------------------- */

static bool is_number(const char *text)
{
    const char *rest;
    double v;
    return parse_real(&v, text, &rest) && (*rest == '\0' || strcmp(rest, "%") == 0);
}

/* "-" is a word, "-1" a number; a value that begins with a dash and is neither is written --name=value. */
static bool looks_like_option(const char *text)
{
    return text[0] == '-' && text[1] != '\0' && !is_number(text);
}

static moec_status unknown_option(const parser *p, const char *name, size_t len)
{
    const char *names[2 * ROWS_MAX];
    size_t n = 0;
    char word[64];
    for (const moec_opt *row = p->verb->opts; row->kind != MOEC_OPT_END && n < MOEC_COUNT(names); row++)
        if (row->kind != MOEC_OPT_HEADING)
            names[n++] = row->name;
    snprintf(word, sizeof word, "%.*s", (int)(len < 63 ? len : 63), name);
    const char *near = moec_word_nearest(word, names, n);
    if (near)
        return moec_fail(p->err, MOEC_EINVAL, "%s: no option --%s; did you mean --%s?", p->verb->name, word, near);
    return moec_fail(p->err, MOEC_EINVAL, "%s: no option --%s; see moecompress %s --help", p->verb->name, word,
                     p->verb->name);
}

static moec_status mark_seen(parser *p, const moec_opt *row)
{
    size_t i = (size_t)(row - p->verb->opts);
    if (p->seen[i] && row->kind != MOEC_OPT_LIST)
        return moec_fail(p->err, MOEC_EINVAL, "--%s is given twice", row->name);
    if (!p->seen[i] && row->kind == MOEC_OPT_LIST) /* given values replace a default */
        ((moec_opt_list *)field(p->params, row))->n = 0;
    p->seen[i] = true;
    return MOEC_OK;
}

static bool is_choice(const moec_opt *row, const char *text)
{
    for (const char *const *c = row->choices; c && *c; c++)
        if (strcmp(*c, text) == 0)
            return true;
    return false;
}

/* inline_value: what stood behind '=' or a letter, or NULL. */
static moec_status take_value(parser *p, const moec_opt *row, const char *inline_value)
{
    moec_status st = mark_seen(p, row);
    if (st != MOEC_OK)
        return st;
    if (inline_value)
        return set_value(p->params, row, inline_value, true, p->err);
    if (row->bare && (p->at >= p->argc || !is_choice(row, p->argv[p->at])))
        return set_value(p->params, row, row->bare, true, p->err);
    if (p->at >= p->argc || looks_like_option(p->argv[p->at]))
        return moec_fail(p->err, MOEC_EINVAL, "--%s: a value is missing (%s)", row->name,
                         row->value ? row->value : "VALUE");
    st = set_value(p->params, row, p->argv[p->at++], true, p->err);
    while (st == MOEC_OK && row->kind == MOEC_OPT_LIST && p->at < p->argc && !looks_like_option(p->argv[p->at])) {
        st = set_value(p->params, row, p->argv[p->at++], true, p->err);
        p->list = row->name;
    }
    return st;
}

static moec_status take_long(parser *p, const char *arg)
{
    const char *equals = strchr(arg, '=');
    size_t len = equals ? (size_t)(equals - arg) : strlen(arg);
    for (const moec_opt *row = p->verb->opts; row->kind != MOEC_OPT_END; row++) {
        if (row->kind == MOEC_OPT_HEADING)
            continue;
        bool flag = row->kind == MOEC_OPT_FLAG;
        bool is = strlen(row->name) == len && memcmp(row->name, arg, len) == 0;
        bool is_no = flag && len > 3 && memcmp(arg, "no-", 3) == 0 && strlen(row->name) == len - 3 &&
                     memcmp(row->name, arg + 3, len - 3) == 0;
        if (!is && !is_no)
            continue;
        if (!flag)
            return take_value(p, row, equals ? equals + 1 : NULL);
        if (equals)
            return moec_fail(p->err, MOEC_EINVAL, "--%.*s takes no value", (int)len, arg);
        *(bool *)field(p->params, row) = is;
        return mark_seen(p, row);
    }
    return unknown_option(p, arg, len);
}

/* "-q", "-qv", "-o FILE", "-oFILE". */
static moec_status take_letters(parser *p, const char *letters)
{
    for (; *letters; letters++) {
        const moec_opt *row = p->verb->opts;
        while (row->kind != MOEC_OPT_END && row->letter != *letters)
            row++;
        if (row->kind == MOEC_OPT_END)
            return moec_fail(p->err, MOEC_EINVAL, "%s: no option -%c; see moecompress %s --help", p->verb->name,
                             *letters, p->verb->name);
        if (row->kind != MOEC_OPT_FLAG)
            return take_value(p, row, letters[1] ? letters + 1 : NULL);
        moec_status st = mark_seen(p, row);
        if (st != MOEC_OK)
            return st;
        *(bool *)field(p->params, row) = true;
    }
    return MOEC_OK;
}

static moec_status take_word(parser *p, const char *word)
{
    int most = p->verb->max_args < 0 || p->verb->max_args > MOEC_OPT_LIST_MAX ? MOEC_OPT_LIST_MAX : p->verb->max_args;
    if (p->words->n >= most)
        return moec_fail(p->err, MOEC_EINVAL, "%s: '%s' is one word too many; usage: moecompress %s %s", p->verb->name,
                         word, p->verb->name, p->verb->args);
    p->words->at[p->words->n++] = word;
    return MOEC_OK;
}

moec_status moec_opt_parse(void *params, moec_opt_list *words, const moec_verb *verb, int argc, char **argv,
                           moec_err *err)
{
    parser p = {.params = params, .verb = verb, .words = words, .argc = argc, .at = 1, .argv = argv, .err = err};
    words->n = 0;
    moec_status st = set_defaults(params, verb, err);
    for (bool options = true; st == MOEC_OK && p.at < argc;) {
        const char *arg = argv[p.at++];
        if (options && strcmp(arg, "--") == 0)
            options = false;
        else if (options && arg[0] == '-' && arg[1] == '-')
            st = take_long(&p, arg + 2);
        else if (options && arg[0] == '-' && arg[1] != '\0')
            st = take_letters(&p, arg + 1);
        else
            st = take_word(&p, arg);
    }
    if (st != MOEC_OK || words->n >= verb->min_args)
        return st;
    if (p.list)
        return moec_fail(err, MOEC_EINVAL, "%s: a word is missing (--%s takes every word behind it, so it goes last); "
                         "usage: moecompress %s %s", verb->name, p.list, verb->name, verb->args);
    return moec_fail(err, MOEC_EINVAL, "%s: a word is missing; usage: moecompress %s %s", verb->name, verb->name,
                     verb->args);
}

/* --- values as JSON ----------------------------------------------------------------------------------------------- */

static moec_json *value_json(const void *params, const moec_opt *row)
{
    const void *at = const_field(params, row);
    const char *text;
    const moec_opt_list *list;
    moec_json *array;
    switch (row->kind) {
    case MOEC_OPT_FLAG:
        return moec_json_new_bool(*(const bool *)at);
    case MOEC_OPT_INT:
        return moec_json_new_int(*(const int64_t *)at);
    case MOEC_OPT_SIZE:
        return moec_json_new_int((int64_t)(*(const uint64_t *)at & INT64_MAX));
    case MOEC_OPT_REAL:
    case MOEC_OPT_SHARE:
        return moec_json_new_real(*(const double *)at);
    case MOEC_OPT_TEXT:
        text = *(const char *const *)at;
        return text ? moec_json_new_string(text) : moec_json_new_null();
    case MOEC_OPT_LIST:
        list = at;
        array = moec_json_new_array();
        for (int i = 0; i < list->n; i++)
            moec_json_push(array, moec_json_new_string(list->at[i]));
        return array;
    case MOEC_OPT_CHOICE:
        return moec_json_new_string(row->choices[*(const int *)at]);
    case MOEC_OPT_END:
    case MOEC_OPT_HEADING:
        break;
    }
    return moec_json_new_null();
}

moec_json *moec_opt_json(const void *params, const moec_verb *verb)
{
    moec_json *out = moec_json_new_object();
    for (const moec_opt *row = verb->opts; row->kind != MOEC_OPT_END; row++)
        if (row->kind != MOEC_OPT_HEADING)
            moec_json_set(out, row->name, value_json(params, row));
    return out;
}

/* --- sizes -------------------------------------------------------------------------------------------------------- */

static const struct { const char *name; uint64_t bytes; } units[] = {
    {"B", 1},
    {"kB", UINT64_C(1000)},           {"KiB", UINT64_C(1) << 10},
    {"MB", UINT64_C(1000000)},        {"MiB", UINT64_C(1) << 20},
    {"GB", UINT64_C(1000000000)},     {"GiB", UINT64_C(1) << 30},
    {"TB", UINT64_C(1000000000000)},  {"TiB", UINT64_C(1) << 40},
};

static uint64_t unit_bytes(const char *name)
{
    for (size_t i = 0; i < MOEC_COUNT(units); i++)
        if (strcasecmp(units[i].name, name) == 0)
            return units[i].bytes;
    return *name == '\0' ? 1 : 0;
}

moec_status moec_size_parse(uint64_t *out, const char *text, moec_err *err)
{
    const char *p = text;
    uint64_t whole = 0, part = 0, scale = 1;
    bool fits = true, digits = false;
    for (; isdigit((unsigned char)*p); p++, digits = true)
        fits = fits && !__builtin_mul_overflow(whole, UINT64_C(10), &whole) &&
               !__builtin_add_overflow(whole, (uint64_t)(*p - '0'), &whole);
    if (*p == '.')
        for (p++; isdigit((unsigned char)*p); p++, digits = true)
            if (scale < UINT64_C(1000000)) { /* further digits are less than a byte of a MiB or noise */
                part = part * 10 + (uint64_t)(*p - '0');
                scale *= 10;
            }
    if (p[0] == ' ' && p[1] != '\0')
        p++;
    uint64_t unit = unit_bytes(p), rest;
    if (!digits || unit == 0 || (unit == 1 && part > 0))
        return moec_fail(err, MOEC_EINVAL, "'%s' is not a size such as 12GiB, 500MB or 1048576 (KiB MiB GiB TiB, kB MB GB "
                         "TB)", text);
    rest = unit / scale * part + unit % scale * part / scale;
    if (!fits || __builtin_mul_overflow(whole, unit, &whole) || __builtin_add_overflow(whole, rest, out))
        return moec_fail(err, MOEC_EINVAL, "'%s' is more than 16777216 TiB", text);
    return MOEC_OK;
}

static const char *size_text(char *buf, size_t cap, uint64_t bytes, bool up)
{
    static const char *const names[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    size_t i = 0;
    double v = (double)bytes;
    for (; v >= (up ? 1023.0 : 1023.5) && i + 1 < MOEC_COUNT(names); i++)
        v /= 1024.0;
    const int places = i == 0 ? 0 : v < (up ? 9.99 : 9.995) ? 2 : v < (up ? 99.9 : 99.95) ? 1 : 0;
    const double unit = places == 2 ? 100.0 : places == 1 ? 10.0 : 1.0;
    snprintf(buf, cap, "%.*f %s", places, up ? ceil(v * unit) / unit : v, names[i]);
    return buf;
}

const char *moec_size_text(char *buf, size_t cap, uint64_t bytes)
{
    return size_text(buf, cap, bytes, false);
}

const char *moec_size_text_up(char *buf, size_t cap, uint64_t bytes)
{
    return size_text(buf, cap, bytes, true);
}
