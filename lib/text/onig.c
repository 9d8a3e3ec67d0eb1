/* Oniguruma to PCRE2. Most constructs are the same; the tables below hold those that are not. Source: Oniguruma's
 * doc/RE and doc/UNICODE_PROPERTIES against pcre2pattern(3), each row compared by tests/interop/test_tokenizer.py. */
#include "text/onig.h"

#include "base/mem.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#define BORDER "(?<=[" MOEC__WORD_ALONE "])"
#define NO_BORDER "(?<![" MOEC__WORD_ALONE "])"
#define AHEAD "(?=[" MOEC__WORD_ALONE "])"
#define NOT_AHEAD "(?![" MOEC__WORD_ALONE "])"

/* Letters behind a backslash: what they become outside and inside brackets; NULL: cannot be said there. Other letters
 * are refused, so that none passes with another meaning (\h and \v mean other things in PCRE2). */
static const struct escape {
    char letter;
    const char *outside, *inside;
} escapes[] = {
    {'s', "\\p{White_Space}", "\\p{White_Space}"}, /* PCRE2's own \s has U+180E as well */
    {'S', "\\P{White_Space}", "\\P{White_Space}"},
    {'d', "\\p{Nd}", "\\p{Nd}"},
    {'D', "\\P{Nd}", "\\P{Nd}"},
    {'w', "[" MOEC__WORD_ALONE "]", MOEC__WORD_CLASS},
    {'W', "[^" MOEC__WORD_ALONE "]", NULL},
    {'h', "[0-9A-Fa-f]", "0-9A-Fa-f"},
    {'H', "[^0-9A-Fa-f]", NULL},
    {'b', "(?:" BORDER NOT_AHEAD "|" NO_BORDER AHEAD ")", "\\x08"},
    {'B', "(?:" BORDER AHEAD "|" NO_BORDER NOT_AHEAD ")", NULL},
    {'v', "\\x0b", "\\x0b"},
    {'n', "\\n", "\\n"},
    {'r', "\\r", "\\r"},
    {'t', "\\t", "\\t"},
    {'f', "\\f", "\\f"},
    {'a', "\\a", "\\a"},
    {'e', "\\e", "\\e"},
    {'A', "\\A", NULL},
    {'z', "\\z", NULL},
    {'Z', "\\Z", NULL},
    {'G', "\\G", NULL},
};

/* Property names of more than two letters that are no script. */
static const struct property {
    const char *onig, *pcre;
} properties[] = {
    {"Any", "Any"},
    {"ASCII", "ASCII"},
    {"Alphabetic", "Alphabetic"},
    {"Alpha", "Alphabetic"},
    {"Uppercase", "Uppercase"},
    {"Upper", "Uppercase"},
    {"Lowercase", "Lowercase"},
    {"Lower", "Lowercase"},
    {"White_Space", "White_Space"},
    {"Space", "White_Space"},
    {"Digit", "Nd"},
    {"Emoji", "Emoji"},
    {"Extended_Pictographic", "Extended_Pictographic"},
    {"Ideographic", "Ideographic"},
    {"Join_Control", "Join_Control"},
    {"Letter", "L"},
    {"Uppercase_Letter", "Lu"},
    {"Lowercase_Letter", "Ll"},
    {"Titlecase_Letter", "Lt"},
    {"Modifier_Letter", "Lm"},
    {"Other_Letter", "Lo"},
    {"Mark", "M"},
    {"Nonspacing_Mark", "Mn"},
    {"Spacing_Mark", "Mc"},
    {"Enclosing_Mark", "Me"},
    {"Number", "N"},
    {"Decimal_Number", "Nd"},
    {"Letter_Number", "Nl"},
    {"Other_Number", "No"},
    {"Punctuation", "P"},
    {"Symbol", "S"},
    {"Separator", "Z"},
    {"Other", "C"},
};

typedef struct rewrite {
    moec__buf *out;
    const char *s;
    size_t n, i;      /* pattern and place in it */
    size_t atom;      /* where in *out the last atom begins */
    bool has_atom;    /* something that a quantifier may follow */
    bool quantified;  /* the atom has its quantifier already */
    size_t group[64]; /* where in *out the open groups begin */
    size_t depth;
} rewrite;

static moec_status put(rewrite *r, const char *text, moec_err *err)
{
    return moec__buf_add(r->out, text, strlen(text), err);
}

static moec_status refuse(const rewrite *r, const char *what, moec_err *err)
{
    return moec_fail(err, MOEC_EFORMAT, "regular expression: %s at byte %zu is not supported", what, r->i + 1);
}

static void begin_atom(rewrite *r)
{
    r->atom = r->out->n;
    r->has_atom = true;
    r->quantified = false;
}

/* \p{Name}, \P{Name}, \p{^Name}; r->i is at the letter. */
static moec_status put_property(rewrite *r, moec_err *err)
{
    moec_status st = MOEC_OK;
    char name[64];
    bool negated = r->s[r->i] == 'P';
    size_t from = r->i + 2, len;
    const char *end = from < r->n && r->s[r->i + 1] == '{' ? memchr(r->s + from, '}', r->n - from) : NULL;
    if (!end)
        return refuse(r, "a property without {name}", err);
    if (r->s[from] == '^') {
        negated = !negated;
        from++;
    }
    len = (size_t)(end - r->s) - from;
    if (len == 0 || len >= sizeof name)
        return refuse(r, "a property of this name", err);
    memcpy(name, r->s + from, len);
    name[len] = '\0';
    const char *prefix = len > 2 ? "sc:" : "",
               *known = name; /* a bare script name means Script_Extensions to PCRE2 */
    for (size_t k = 0; k < MOEC_COUNT(properties); k++) {
        if (strcasecmp(properties[k].onig, name) == 0) {
            prefix = "";
            known = properties[k].pcre;
        }
    }
    MOEC_TRY(put(r, negated ? "\\P{" : "\\p{", err));
    MOEC_TRY(put(r, prefix, err));
    MOEC_TRY(put(r, known, err));
    MOEC_TRY(put(r, "}", err));
    r->i = (size_t)(end - r->s) + 1;
done:
    return st;
}

/* \xHH, \x{H...}, \uHHHH; r->i is at the letter. */
static moec_status put_code(rewrite *r, moec_err *err)
{
    moec_status st = MOEC_OK;
    size_t k = r->i + 1, want = r->s[r->i] == 'u' ? 4 : 2, digits = 0;
    bool braces = want == 2 && k < r->n && r->s[k] == '{';
    char code[12] = "";
    if (braces) {
        k++;
        want = 8;
    }
    while (digits < want && k < r->n && isxdigit((unsigned char)r->s[k]))
        code[digits++] = r->s[k++];
    if (digits == 0 || (braces && (k >= r->n || r->s[k] != '}')) || (want == 4 && digits < 4))
        return refuse(r, "a character code of this form", err);
    if (want == 2 && strtoul(code, NULL, 16) > 0x7f) /* a raw byte of UTF-8 to Oniguruma */
        return refuse(r, "\\x with a byte above 7F", err);
    MOEC_TRY(put(r, "\\x{", err));
    MOEC_TRY(put(r, code, err));
    MOEC_TRY(put(r, "}", err));
    r->i = k + braces;
done:
    return st;
}

/* r->i is at the backslash. */
static moec_status put_escape(rewrite *r, bool inside, moec_err *err)
{
    if (++r->i >= r->n)
        return refuse(r, "a backslash at the end", err);
    unsigned char c = (unsigned char)r->s[r->i];
    if (c == 'p' || c == 'P')
        return put_property(r, err);
    if (c == 'x' || c == 'u')
        return put_code(r, err);
    if (!isalnum(c)) { /* itself; with all bytes of it */
        char both[6] = "\\";
        size_t len = moec__utf8_len(c);
        memcpy(both + 1, r->s + r->i, len);
        r->i += len;
        return c < 0x80 ? moec__buf_add(r->out, both, 1 + len, err) : moec__buf_add(r->out, both + 1, len, err);
    }
    for (size_t k = 0; k < MOEC_COUNT(escapes); k++) {
        const char *text = inside ? escapes[k].inside : escapes[k].outside;
        if (escapes[k].letter == (char)c && text) {
            r->i++;
            return put(r, text, err);
        }
    }
    char what[32] = "escape \\? in this place";
    what[8] = (char)c;
    return refuse(r, what, err);
}

/* [...]; r->i is at the bracket. */
static moec_status put_class(rewrite *r, moec_err *err)
{
    moec_status st = MOEC_OK;
    MOEC_TRY(put(r, "[", err));
    if (++r->i < r->n && r->s[r->i] == '^') {
        MOEC_TRY(put(r, "^", err));
        r->i++;
    }
    if (r->i < r->n && r->s[r->i] == ']')
        return refuse(r, "an empty class", err);
    while (r->i < r->n && r->s[r->i] != ']') {
        if (r->s[r->i] == '[')
            return refuse(r, "a class inside a class", err);
        if (r->s[r->i] == '&' && r->i + 1 < r->n && r->s[r->i + 1] == '&')
            return refuse(r, "an intersection of classes (&&)", err);
        if (r->s[r->i] == '\\')
            MOEC_TRY(put_escape(r, true, err));
        else
            MOEC_TRY(moec__buf_add(r->out, r->s + r->i++, 1, err));
    }
    if (r->i++ >= r->n)
        return refuse(r, "a class without end", err);
    MOEC_TRY(put(r, "]", err));
done:
    return st;
}

/* (?imx-imx: and (?imx-imx); r->i is behind "(?". Ruby's m is s elsewhere. */
static moec_status put_flags(rewrite *r, bool at_start, moec_err *err)
{
    moec_status st = MOEC_OK;
    for (; r->i < r->n && r->s[r->i] != ':' && r->s[r->i] != ')'; r->i++) {
        char c = r->s[r->i];
        if (c != 'i' && c != 'm' && c != '-')
            return refuse(r, "a group of this kind", err);
        MOEC_TRY(put(r, c == 'm' ? "s" : c == 'i' ? "i" : "-", err));
    }
    if (r->i >= r->n)
        return refuse(r, "a group without end", err);
    if (r->s[r->i] == ')') {
        /* In the middle of an alternative Ruby lets it swallow the alternatives that follow. */
        if (!at_start)
            return refuse(r, "an option that does not begin a group", err);
        r->depth--;
    }
    MOEC_TRY(moec__buf_add(r->out, r->s + r->i++, 1, err));
done:
    return st;
}

/* r->i is at the opening parenthesis. */
static moec_status put_group(rewrite *r, moec_err *err)
{
    static const char *const kinds[] = {"?:", "?=", "?!", "?<=", "?<!", "?>"};
    moec_status st = MOEC_OK;
    bool at_start = !r->has_atom;
    if (r->depth >= MOEC_COUNT(r->group))
        return refuse(r, "nesting deeper than 64 groups", err);
    r->group[r->depth++] = r->out->n;
    r->has_atom = false;
    r->i++;
    MOEC_TRY(put(r, "(", err));
    if (r->i >= r->n || (r->s[r->i] != '?' && r->s[r->i] != '*'))
        goto done;
    for (size_t k = 0; k < MOEC_COUNT(kinds); k++) {
        size_t len = strlen(kinds[k]);
        if (r->n - r->i >= len && memcmp(r->s + r->i, kinds[k], len) == 0) {
            r->i += len;
            st = put(r, kinds[k], err);
            goto done;
        }
    }
    if (r->s[r->i++] == '*')
        return refuse(r, "a group of this kind", err);
    MOEC_TRY(put(r, "?", err));
    MOEC_TRY(put_flags(r, at_start, err));
done:
    return st;
}

/* True when an interval {n}, {n,}, {,m} or {n,m} begins at r->i; *end is behind it, *one tells the first form. */
static bool is_interval(const rewrite *r, size_t *end, bool *one)
{
    size_t k = r->i + 1, digits = 0;
    for (; k < r->n && isdigit((unsigned char)r->s[k]); k++)
        digits++;
    *one = k < r->n && r->s[k] == '}';
    if (k < r->n && r->s[k] == ',')
        for (k++; k < r->n && isdigit((unsigned char)r->s[k]); k++)
            digits++;
    *end = k + 1;
    return k < r->n && r->s[k] == '}' && digits > 0;
}

/* A quantifier with its lazy or possessive mark. What has one already is put in a group first, which is what Ruby
 * means by a second one; so it is with the + of {n,m}+, which is no possessive mark there, and with the ? of {n}?. */
static moec_status put_quantifier(rewrite *r, size_t end, bool interval, bool one, moec_err *err)
{
    moec_status st = MOEC_OK;
    if (r->quantified) {
        MOEC_TRY(put(r, "xxx)", err));
        memmove(r->out->p + r->atom + 3, r->out->p + r->atom, r->out->n - 4 - r->atom);
        memcpy(r->out->p + r->atom, "(?:", 3);
    }
    if (interval && r->s[r->i + 1] == ',') {
        MOEC_TRY(put(r, "{0", err));
        r->i++;
    }
    MOEC_TRY(moec__buf_add(r->out, r->s + r->i, end - r->i, err));
    r->i = end;
    bool lazy = end < r->n && r->s[end] == '?' && !one, greedy = end < r->n && r->s[end] == '+' && !interval;
    if (lazy || greedy)
        MOEC_TRY(moec__buf_add(r->out, r->s + r->i++, 1, err));
    r->quantified = true;
done:
    return st;
}

static moec_status put_next(rewrite *r, moec_err *err)
{
    char c = r->s[r->i];
    size_t end = r->i + 1;
    bool one = false, interval = c == '{' && is_interval(r, &end, &one);
    if (interval || c == '?' || c == '*' || c == '+')
        return r->has_atom ? put_quantifier(r, end, interval, one, err)
                           : refuse(r, "a quantifier behind nothing", err);
    if (c == '(')
        return put_group(r, err);
    if (c == ')') {
        if (r->depth == 0)
            return refuse(r, "a closing parenthesis without an opening one", err);
        r->i++;
        begin_atom(r);
        r->atom = r->group[--r->depth];
        return put(r, ")", err);
    }
    if (c == '|') {
        r->has_atom = false;
        r->i++;
        return put(r, "|", err);
    }
    begin_atom(r);
    if (c == '\\')
        return put_escape(r, false, err);
    if (c == '[')
        return put_class(r, err);
    size_t len = moec__utf8_len((unsigned char)c);
    r->i += len;
    return moec__buf_add(r->out, r->s + r->i - len, len, err);
}

moec_status moec__onig_to_pcre(moec__buf *out, const char *pattern, size_t n, moec_err *err)
{
    moec_status st = MOEC_OK;
    rewrite r = {.out = out, .s = pattern, .n = n};
    while (r.i < n)
        MOEC_TRY(put_next(&r, err));
    MOEC_TRY(moec__buf_add(out, "", 1, err));
    out->n--;
done:
    return st;
}
