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
    {'W', "[^" MOEC__WORD_ALONE "]", "[^" MOEC__WORD_CLASS "]"},
    {'h', "[0-9A-Fa-f]", "0-9A-Fa-f"},
    {'H', "[^0-9A-Fa-f]", "[^0-9A-Fa-f]"},
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

/* Pairs that are one character as well to Oniguruma under (?i) (sharp s, the ligatures of f and st), never to PCRE2. */
static const char *const folded[] = {"ss", "ff", "fi", "fl", "st"};

static const char *const cased[] = {"Lu", "Ll", "Lt", "Uppercase", "Lowercase", "Mn"};

typedef struct rewrite {
    moec__buf *out;
    const char *s;
    size_t n, i;      /* pattern and place in it */
    size_t atom;      /* where in *out the last atom begins */
    bool has_atom;    /* something that a quantifier may follow */
    bool quantified;  /* the atom has its quantifier already */
    size_t group[64]; /* where in *out the open groups begin */
    bool nocase, outer_nocase[64]; /* under (?i); in front of each open group */
    size_t depth;
    int letter; /* the last atom, when it was an ASCII letter, in lower case; else 0 */
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
static moec_status put_property(rewrite *r, bool inside, moec_err *err)
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
    /* Under (?i) Oniguruma folds a class's properties, PCRE2 only its characters. Letters and marks gain by it what is
     * the same but for case as U+0345. */
    bool either = strcmp(known, "L") == 0 || strcmp(known, "M") == 0, folds = inside && r->nocase;
    for (size_t k = 0; k < MOEC_COUNT(cased) && folds; k++)
        if (strcmp(known, cased[k]) == 0 || (either && negated))
            return refuse(r, "a property that knows case, in a class under (?i),", err);
    MOEC_TRY(put(r, negated ? "\\P{" : "\\p{", err));
    MOEC_TRY(put(r, prefix, err));
    MOEC_TRY(put(r, known, err));
    MOEC_TRY(put(r, either && folds ? "}\\x{345}" : "}", err));
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
        return put_property(r, inside, err);
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

/* What was read of [...] up to the next && or its end: items that may stand side by side in one class of PCRE2, and
 * alternatives of one character each that may not. */
typedef struct side {
    moec__buf plain, others;
} side;

static moec_status put_other(moec__buf *others, const moec__buf *one, moec_err *err)
{
    moec_status st = MOEC_OK;
    if (others->n > 0)
        MOEC_TRY(moec__buf_add(others, "|", 1, err));
    MOEC_TRY(moec__buf_add(others, one->p, one->n, err));
done:
    return st;
}

/* Appends an expression that matches one character of the side: [plain], or (?:[plain]|others). */
static moec_status put_side(moec__buf *out, const side *s, bool negated, moec_err *err)
{
    moec_status st = MOEC_OK;
    if (s->others.n > 0)
        MOEC_TRY(moec__buf_add(out, "(?:", 3, err));
    if (s->plain.n > 0) {
        MOEC_TRY(moec__buf_add(out, negated ? "[^" : "[", negated ? 2 : 1, err));
        MOEC_TRY(moec__buf_add(out, s->plain.p, s->plain.n, err));
        MOEC_TRY(moec__buf_add(out, s->others.n > 0 ? "]|" : "]", s->others.n > 0 ? 2 : 1, err));
    }
    if (s->others.n > 0) {
        MOEC_TRY(moec__buf_add(out, s->others.p, s->others.n, err));
        MOEC_TRY(moec__buf_add(out, ")", 1, err));
    }
done:
    return st;
}

static bool at_and(const rewrite *r)
{
    return r->i + 1 < r->n && r->s[r->i] == '&' && r->s[r->i + 1] == '&';
}

static moec_status read_class(rewrite *r, side *out, int depth, moec_err *err);

/* One item of a class. *open tells that a - behind it would make a range of it. */
static moec_status read_item(rewrite *r, side *s, bool *open, int depth, moec_err *err)
{
    char c = r->s[r->i], next = r->i + 1 < r->n ? r->s[r->i + 1] : ']';
    bool was_open = *open;
    *open = false;
    if (c == '[' && next == ':')
        return refuse(r, "a POSIX bracket", err);
    if (c == '[')
        return read_class(r, s, depth + 1, err);
    moec__buf *out = r->out, one = {0};
    if (c == '\\' && (next == 'W' || next == 'H')) { /* complements of several things: no item of a plain class */
        r->out = &one;
        moec_status st = put_escape(r, true, err);
        r->out = out;
        if (st == MOEC_OK)
            st = put_other(&s->others, &one, err);
        moec_free(one.p);
        return st;
    }
    r->out = &s->plain;
    moec_status st = MOEC_OK;
    if (c == '\\') {
        st = put_escape(r, true, err);
        *open = true;
    } else {
        r->i++;
        bool range = c == '-' && was_open && next != ']';
        if (range && (next == '[' || at_and(r))) /* Oniguruma forgets the item in front, too */
            st = refuse(r, "a range to a class", err);
        else if ((c == '-' && !range) || (c == '^' && s->plain.n == 0))
            st = put(r, "\\", err);
        if (st == MOEC_OK)
            st = moec__buf_add(r->out, &c, 1, err);
        *open = c != '-';
    }
    r->out = out;
    return st;
}

/* [...] inside or outside of another; r->i is at the bracket. A list of items is appended to out->plain, anything else
 * to out->others: PCRE2 before 10.45 has neither classes in classes nor intersections, so these become lookaheads at
 * the one character. */
static moec_status read_class(rewrite *r, side *out, int depth, moec_err *err)
{
    moec_status st = MOEC_OK;
    side now = {0};
    moec__buf all = {0}; /* (?:(?!(?:(?=side)(?=side)side))(?s:.)) or a part of it */
    bool negated = r->i + 1 < r->n && r->s[r->i + 1] == '^', open = false, ands = false;
    if (depth > 16)
        return refuse(r, "a class in classes, deeper than 16,", err);
    r->i += 1 + negated;
    if (r->i < r->n && r->s[r->i] == ']')
        return refuse(r, "an empty class", err);
    while (r->i < r->n && r->s[r->i] != ']') {
        if (!at_and(r)) {
            MOEC_TRY(read_item(r, &now, &open, depth, err));
            continue;
        }
        r->i += 2;
        if (now.plain.n + now.others.n == 0 || r->i >= r->n || r->s[r->i] == ']' || at_and(r)) {
            st = refuse(r, "an intersection (&&) with nothing", err);
            goto done;
        }
        MOEC_TRY(moec__buf_add(&all, "(?=", 3, err));
        MOEC_TRY(put_side(&all, &now, false, err));
        MOEC_TRY(moec__buf_add(&all, ")", 1, err));
        now.plain.n = now.others.n = 0;
        open = false;
        ands = true;
    }
    if (r->i++ >= r->n) {
        st = refuse(r, "a class without end", err);
        goto done;
    }
    if (!ands && now.others.n == 0 && !negated) {
        MOEC_TRY(moec__buf_add(&out->plain, now.plain.p, now.plain.n, err));
        goto done;
    }
    MOEC_TRY(put_side(&all, &now, negated && !ands && now.others.n == 0, err));
    bool simple = !ands && now.others.n == 0;
    if (!simple && r->nocase) { /* case is folded before or behind the set operations, which differs */
        st = refuse(r, "a class of classes under (?i)", err);
        goto done;
    }
    now.plain.n = 0;
    MOEC_TRY(moec__buf_add(&now.plain, simple ? "" : negated ? "(?:(?!" : "(?:", simple ? 0 : negated ? 6 : 3, err));
    MOEC_TRY(moec__buf_add(&now.plain, all.p, all.n, err));
    if (!simple)
        MOEC_TRY(moec__buf_add(&now.plain, negated ? ")(?s:.))" : ")", negated ? 8 : 1, err));
    MOEC_TRY(put_other(&out->others, &now.plain, err));
done:
    moec_free(all.p);
    moec_free(now.others.p);
    moec_free(now.plain.p);
    return st;
}

/* A class that is an atom of the expression; r->i is at the bracket. */
static moec_status put_class(rewrite *r, moec_err *err)
{
    side whole = {0};
    moec_status st = read_class(r, &whole, 0, err);
    if (st == MOEC_OK && whole.others.n > 0) /* one alternative, in parentheses or brackets of its own */
        st = moec__buf_add(r->out, whole.others.p, whole.others.n, err);
    else if (st == MOEC_OK)
        st = put_side(r->out, &whole, false, err);
    moec_free(whole.others.p);
    moec_free(whole.plain.p);
    return st;
}

/* (?imx-imx: and (?imx-imx); r->i is behind "(?". Ruby's m is s elsewhere. */
static moec_status put_flags(rewrite *r, bool at_start, moec_err *err)
{
    moec_status st = MOEC_OK;
    bool on = true;
    for (; r->i < r->n && r->s[r->i] != ':' && r->s[r->i] != ')'; r->i++) {
        char c = r->s[r->i];
        on = on && c != '-';
        r->nocase = c == 'i' ? on : r->nocase;
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
    r->outer_nocase[r->depth] = r->nocase;
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
    if (interval || strchr("?*+()|", c))
        r->letter = 0;
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
        r->nocase = r->outer_nocase[r->depth];
        return put(r, ")", err);
    }
    if (c == '|') {
        r->has_atom = false;
        r->i++;
        return put(r, "|", err);
    }
    begin_atom(r);
    int before = r->letter;
    r->letter = isalpha((unsigned char)c) ? tolower((unsigned char)c) : 0;
    for (size_t k = 0; k < MOEC_COUNT(folded) && r->nocase && before; k++)
        if (folded[k][0] == before && folded[k][1] == r->letter)
            return refuse(r, "a pair of letters that fold to one character, under (?i),", err);
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
