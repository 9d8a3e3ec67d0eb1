/* Reading of tokenizer.json's normalizers and pre-tokenizers: one row a type, one function a row. */
#include "text/stage.h"

#include "base/mem.h"
#include "text/onig.h"

#include <string.h>

moec_status moec__new_stage(moec__stage **out, moec__stages *s, moec_err *err)
{
    *out = NULL;
    if (s->n >= MOEC__MAX_STAGES)
        return moec_fail(err, MOEC_EFORMAT, "more than %d nodes", MOEC__MAX_STAGES);
    *out = &s->at[s->n++];
    **out = (moec__stage){0};
    return MOEC_OK;
}

void moec__stages_release(moec__stages *s)
{
    for (size_t i = 0; i < s->n; i++) {
        moec__pattern_free(s->at[i].pattern);
        moec_free(s->at[i].calm);
        moec_free(s->at[i].text);
    }
    s->n = 0;
}

moec_status moec__get_bool(bool *out, const moec_json *node, const char *key, bool otherwise, moec_err *err)
{
    const moec_json *v = moec_json_get(node, key);
    *out = otherwise;
    if (!v || moec_json_bool(v, out))
        return MOEC_OK;
    return moec_fail(err, MOEC_EFORMAT, "setting %s: true or false was expected", key);
}

moec_status moec__get_text(const char **out, size_t *n, const moec_json *node, const char *key, const char *otherwise,
                           moec_err *err)
{
    const moec_json *v = moec_json_get(node, key);
    *out = v ? moec_json_string(v) : otherwise;
    if (!*out)
        return moec_fail(err, MOEC_EFORMAT, "setting %s: a string was expected", key);
    *n = v ? moec_json_len(v) : strlen(*out);
    return MOEC_OK;
}

moec_status moec__get_choice(int *out, const moec_json *node, const char *key, const char *const *names, int n,
                             moec_err *err)
{
    const char *text;
    size_t len;
    moec_status st = moec__get_text(&text, &len, node, key, names[0], err);
    if (st != MOEC_OK)
        return st;
    for (*out = 0; *out < n; ++*out)
        if (strcmp(names[*out], text) == 0)
            return MOEC_OK;
    return moec_fail(err, MOEC_EFORMAT, "setting %s: \"%.60s\" is not supported", key, text);
}

moec_status moec__get_pattern(moec__pattern **out, const moec_json *node, moec_err *err)
{
    const moec_json *pattern = moec_json_get(node, "pattern");
    const moec_json *literal = moec_json_get(pattern, "String"), *regex = moec_json_get(pattern, "Regex");
    if (moec_json_string(literal))
        return moec__pattern_literal(out, moec_json_string(literal), moec_json_len(literal), err);
    if (moec_json_string(regex))
        return moec__pattern_regex(out, moec_json_string(regex), moec_json_len(regex), err);
    return moec_fail(err, MOEC_EFORMAT, "setting pattern: {\"String\": text} or {\"Regex\": text} was expected");
}

static moec_status set_text(moec__stage *stage, const char *text, size_t n, moec_err *err)
{
    stage->n_text = n;
    return moec_copy(&stage->text, text, n, err);
}

moec_status moec__read_kind(void *out, const moec__kind *kinds, size_t n_kinds, const char *where, moec_json *node,
                            int depth, moec_err *err)
{
    if (moec_json_absent(node))
        return MOEC_OK;
    const char *type = moec_json_string(moec_json_get(node, "type"));
    if (!type)
        return moec_fail(err, MOEC_EFORMAT, "%s: an object with a \"type\" was expected", where);
    if (depth > MOEC__MAX_NESTING)
        return moec_fail(err, MOEC_EFORMAT, "%s: nested deeper than %d", where, MOEC__MAX_NESTING);
    for (size_t i = 0; i < n_kinds; i++)
        if (strcmp(kinds[i].type, type) == 0) /* a sequence has prefixed its members' errors already */
            return strcmp(type, "Sequence") == 0
                       ? kinds[i].read(out, node, depth, err)
                       : moec_within(err, kinds[i].read(out, node, depth, err), "%s: %s", where, type);
    return moec_fail(err, MOEC_EFORMAT, "%s: type \"%.60s\" is not supported", where, type);
}

/* ---- normalizers ---- */

static moec_status read_form(moec__stages *out, moec__form form, moec_err *err)
{
    moec__stage *stage;
    moec_status st = moec__new_stage(&stage, out, err);
    if (st != MOEC_OK)
        return st;
    stage->rewrite = moec__run_form;
    stage->form = form;
    return form == MOEC__NFC ? moec__calm_new(&stage->calm, err) : MOEC_OK;
}

#define READ_FORM(name, form) \
    static moec_status name(void *out, moec_json *node, int depth, moec_err *err) \
    { \
        (void)node; \
        (void)depth; \
        return read_form(out, form, err); \
    }
READ_FORM(read_nfc, MOEC__NFC)
READ_FORM(read_nfd, MOEC__NFD)
READ_FORM(read_nfkc, MOEC__NFKC)
READ_FORM(read_nfkd, MOEC__NFKD)

static moec_status read_prepend(void *out, moec_json *node, int depth, moec_err *err)
{
    moec_status st;
    moec__stage *stage;
    const char *text;
    size_t n;
    (void)depth;
    MOEC_TRY(moec__new_stage(&stage, out, err));
    stage->rewrite = moec__run_prepend;
    MOEC_TRY(moec__get_text(&text, &n, node, "prepend", NULL, err));
    MOEC_TRY(set_text(stage, text, n, err));
done:
    return st;
}

/* Both a normalizer and a decoder. */
static moec_status read_replace(moec__stage **stage, moec__stages *out, moec_json *node, moec_err *err)
{
    moec_status st;
    const char *text;
    size_t n;
    MOEC_TRY(moec__new_stage(stage, out, err));
    MOEC_TRY(moec__get_pattern(&(*stage)->pattern, node, err));
    MOEC_TRY(moec__get_text(&text, &n, node, "content", NULL, err));
    MOEC_TRY(set_text(*stage, text, n, err));
done:
    return st;
}

static moec_status read_replace_normalizer(void *out, moec_json *node, int depth, moec_err *err)
{
    moec__stage *stage;
    (void)depth;
    moec_status st = read_replace(&stage, out, node, err);
    if (st == MOEC_OK)
        stage->rewrite = moec__run_replace;
    return st;
}

static moec_status read_lower(void *out, moec_json *node, int depth, moec_err *err)
{
    moec__stage *stage;
    (void)node;
    (void)depth;
    moec_status st = moec__new_stage(&stage, out, err);
    if (st == MOEC_OK)
        stage->rewrite = moec__run_lower;
    return st;
}

static moec_status read_strip(void *out, moec_json *node, int depth, moec_err *err)
{
    moec_status st;
    moec__stage *stage;
    (void)depth;
    MOEC_TRY(moec__new_stage(&stage, out, err));
    stage->rewrite = moec__run_strip;
    MOEC_TRY(moec__get_bool(&stage->left, node, "strip_left", true, err));
    MOEC_TRY(moec__get_bool(&stage->right, node, "strip_right", true, err));
done:
    return st;
}

static moec_status read_byte_normalizer(void *out, moec_json *node, int depth, moec_err *err)
{
    moec__stage *stage;
    (void)node;
    (void)depth;
    moec_status st = moec__new_stage(&stage, out, err);
    if (st == MOEC_OK)
        stage->rewrite = moec__run_byte_form;
    return st;
}

static moec_status read_normalizers(void *out, moec_json *node, int depth, moec_err *err);

static const moec__kind normalizers[] = {
    {"Sequence", read_normalizers},
    {"NFC", read_nfc},
    {"NFD", read_nfd},
    {"NFKC", read_nfkc},
    {"NFKD", read_nfkd},
    {"Prepend", read_prepend},
    {"Replace", read_replace_normalizer},
    {"Lowercase", read_lower},
    {"Strip", read_strip},
    {"ByteLevel", read_byte_normalizer},
};

/* Members of a sequence under `key`. */
static moec_status read_members(void *out, const moec__kind *kinds, size_t n_kinds, const char *where,
                                moec_json *node, const char *key, int depth, moec_err *err)
{
    const moec_json *list = moec_json_get(node, key);
    if (moec_json_type(list) != MOEC_JSON_ARRAY)
        return moec_fail(err, MOEC_EFORMAT, "%s: Sequence: setting %s: a list was expected", where, key);
    for (size_t i = 0; i < moec_json_len(list); i++) {
        moec_status st = moec__read_kind(out, kinds, n_kinds, where, moec_json_at(list, i), depth + 1, err);
        if (st != MOEC_OK)
            return st;
    }
    return MOEC_OK;
}

static moec_status read_normalizers(void *out, moec_json *node, int depth, moec_err *err)
{
    return read_members(out, normalizers, MOEC_COUNT(normalizers), "normalizer", node, "normalizers", depth, err);
}

moec_status moec__read_normalizer(moec__stages *out, moec_json *node, moec_err *err)
{
    return moec__read_kind(out, normalizers, MOEC_COUNT(normalizers), "normalizer", node, 0, err);
}

/* ---- pre-tokenizers ---- */

static const char *const behaviours[] = {
    [MOEC__ISOLATED] = "Isolated",
    [MOEC__REMOVED] = "Removed",
    [MOEC__MERGED_WITH_PREVIOUS] = "MergedWithPrevious",
    [MOEC__MERGED_WITH_NEXT] = "MergedWithNext",
    [MOEC__CONTIGUOUS] = "Contiguous",
};

/* A split stage without its pattern. */
static moec_status new_split(moec__stage **out, moec__stages *s, moec__behaviour behaviour, bool invert,
                             moec_err *err)
{
    moec_status st = moec__new_stage(out, s, err);
    if (st != MOEC_OK)
        return st;
    (*out)->split = moec__run_split;
    (*out)->behaviour = behaviour;
    (*out)->invert = invert;
    return MOEC_OK;
}

static moec_status add_split(moec__stages *out, const char *regex, moec__behaviour behaviour, bool invert,
                             moec_err *err)
{
    moec__stage *stage;
    moec_status st = new_split(&stage, out, behaviour, invert, err);
    return st == MOEC_OK ? moec__pattern_regex(&stage->pattern, regex, strlen(regex), err) : st;
}

static moec_status read_split(void *out, moec_json *node, int depth, moec_err *err)
{
    moec_status st;
    moec__stage *stage;
    int behaviour;
    bool invert;
    (void)depth;
    if (!moec_json_get(node, "behavior"))
        return moec_fail(err, MOEC_EFORMAT, "setting behavior is missing");
    MOEC_TRY(moec__get_choice(&behaviour, node, "behavior", behaviours, MOEC_COUNT(behaviours), err));
    MOEC_TRY(moec__get_bool(&invert, node, "invert", false, err));
    MOEC_TRY(new_split(&stage, out, (moec__behaviour)behaviour, invert, err));
    MOEC_TRY(moec__get_pattern(&stage->pattern, node, err));
done:
    return st;
}

static moec_status read_byte_level(void *out, moec_json *node, int depth, moec_err *err)
{
    /* The words of GPT-2: contractions, letters, digits and the rest, each with a space in front. */
    static const char words[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
    moec_status st;
    moec__stage *stage;
    bool prefix, regex;
    const moec__stages *so_far = out;
    size_t before = 0;
    (void)depth;
    for (size_t i = 0; i < so_far->n; i++)
        before += so_far->at[i].split == moec__run_bytes;
    if (before >= 4) /* each may double the text */
        return moec_fail(err, MOEC_EFORMAT, "more than 4 of them are not supported");
    MOEC_TRY(moec__get_bool(&prefix, node, "add_prefix_space", true, err));
    MOEC_TRY(moec__get_bool(&regex, node, "use_regex", true, err));
    if (prefix) {
        MOEC_TRY(moec__new_stage(&stage, out, err));
        stage->split = moec__run_prefix;
        MOEC_TRY(set_text(stage, " ", 1, err));
    }
    if (regex)
        MOEC_TRY(add_split(out, words, MOEC__ISOLATED, false, err));
    MOEC_TRY(moec__new_stage(&stage, out, err));
    stage->split = moec__run_bytes;
done:
    return st;
}

static moec_status read_digits(void *out, moec_json *node, int depth, moec_err *err)
{
    bool each;
    (void)depth;
    moec_status st = moec__get_bool(&each, node, "individual_digits", false, err);
    return st == MOEC_OK ? add_split(out, "\\p{N}", each ? MOEC__ISOLATED : MOEC__CONTIGUOUS, false, err) : st;
}

/* Older files say add_prefix_space where newer ones say prepend_scheme. */
static moec_status get_scheme(moec__scheme *out, moec_json *node, moec_err *err)
{
    static const char *const schemes[] = {
        [MOEC__ALWAYS] = "always", [MOEC__FIRST] = "first", [MOEC__NEVER] = "never"};
    bool prefix;
    int scheme = MOEC__ALWAYS;
    moec_status st = moec__get_choice(&scheme, node, "prepend_scheme", schemes, MOEC_COUNT(schemes), err);
    if (st == MOEC_OK)
        st = moec__get_bool(&prefix, node, "add_prefix_space", true, err);
    if (st == MOEC_OK && !prefix && scheme != MOEC__NEVER)
        st = moec_fail(err, MOEC_EFORMAT, "settings add_prefix_space and prepend_scheme contradict each other");
    *out = (moec__scheme)scheme;
    return st;
}

static moec_status get_replacement(moec__stage *stage, moec_json *node, moec_err *err)
{
    const char *text;
    size_t n;
    moec_status st = moec__get_text(&text, &n, node, "replacement", NULL, err);
    if (st != MOEC_OK)
        return st;
    if (n == 0 || n != moec__utf8_len((unsigned char)text[0]))
        return moec_fail(err, MOEC_EFORMAT, "setting replacement: one character was expected");
    return set_text(stage, text, n, err);
}

static moec_status read_metaspace(void *out, moec_json *node, int depth, moec_err *err)
{
    moec_status st;
    moec__stage *stage, *cut;
    bool split;
    (void)depth;
    MOEC_TRY(moec__new_stage(&stage, out, err));
    stage->split = moec__run_metaspace;
    MOEC_TRY(get_replacement(stage, node, err));
    MOEC_TRY(get_scheme(&stage->scheme, node, err));
    MOEC_TRY(moec__get_bool(&split, node, "split", true, err));
    if (split) {
        MOEC_TRY(new_split(&cut, out, MOEC__MERGED_WITH_NEXT, false, err));
        MOEC_TRY(moec__pattern_literal(&cut->pattern, stage->text, stage->n_text, err));
    }
done:
    return st;
}

static moec_status read_whitespace(void *out, moec_json *node, int depth, moec_err *err)
{
    (void)node;
    (void)depth;
    return add_split(out, "[" MOEC__WORD_CLASS "\\p{Join_Control}]+|[^" MOEC__WORD_CLASS "\\p{Join_Control}\\s]+",
                     MOEC__REMOVED, true, err);
}

static moec_status read_whitespace_split(void *out, moec_json *node, int depth, moec_err *err)
{
    (void)node;
    (void)depth;
    return add_split(out, "\\s", MOEC__REMOVED, false, err);
}

static moec_status read_punctuation(void *out, moec_json *node, int depth, moec_err *err)
{
    int behaviour;
    (void)depth;
    moec_status st = moec__get_choice(&behaviour, node, "behavior", behaviours, MOEC_COUNT(behaviours), err);
    return st == MOEC_OK ? add_split(out, "[\\p{P}$+<=>^`|~]", (moec__behaviour)behaviour, false, err) : st;
}

static moec_status read_delimiter(void *out, moec_json *node, int depth, moec_err *err)
{
    moec_status st;
    moec__stage *stage;
    const char *text;
    size_t n;
    (void)depth;
    MOEC_TRY(moec__get_text(&text, &n, node, "delimiter", NULL, err));
    MOEC_TRY(new_split(&stage, out, MOEC__REMOVED, false, err));
    MOEC_TRY(moec__pattern_literal(&stage->pattern, text, n, err));
done:
    return st;
}

static moec_status read_pre_tokenizers(void *out, moec_json *node, int depth, moec_err *err);

static const moec__kind pre_tokenizers[] = {
    {"Sequence", read_pre_tokenizers},
    {"Split", read_split},
    {"ByteLevel", read_byte_level},
    {"Digits", read_digits},
    {"Metaspace", read_metaspace},
    {"Whitespace", read_whitespace},
    {"WhitespaceSplit", read_whitespace_split},
    {"Punctuation", read_punctuation},
    {"CharDelimiterSplit", read_delimiter},
};

static moec_status read_pre_tokenizers(void *out, moec_json *node, int depth, moec_err *err)
{
    return read_members(out, pre_tokenizers, MOEC_COUNT(pre_tokenizers), "pre_tokenizer", node, "pretokenizers",
                        depth, err);
}

moec_status moec__read_pre_tokenizer(moec__stages *out, moec_json *node, moec_err *err)
{
    return moec__read_kind(out, pre_tokenizers, MOEC_COUNT(pre_tokenizers), "pre_tokenizer", node, 0, err);
}

/* ---- decoders ---- */

static moec_status new_join(moec__stage **stage, moec__stages *out, moec__join_fn *join, moec_err *err)
{
    moec_status st = moec__new_stage(stage, out, err);
    if (st == MOEC_OK)
        (*stage)->join = join;
    return st;
}

#define READ_JOIN(name, fn) \
    static moec_status name(void *out, moec_json *node, int depth, moec_err *err) \
    { \
        moec__stage *stage; \
        (void)node; \
        (void)depth; \
        return new_join(&stage, out, fn, err); \
    }
READ_JOIN(read_byte_decoder, moec__join_bytes)
READ_JOIN(read_fallback, moec__join_fallback)
READ_JOIN(read_fuse, moec__join_fuse)

static moec_status read_metaspace_decoder(void *out, moec_json *node, int depth, moec_err *err)
{
    moec_status st;
    moec__stage *stage;
    (void)depth;
    MOEC_TRY(new_join(&stage, out, moec__join_metaspace, err));
    MOEC_TRY(get_replacement(stage, node, err));
    MOEC_TRY(get_scheme(&stage->scheme, node, err));
done:
    return st;
}

static moec_status read_replace_decoder(void *out, moec_json *node, int depth, moec_err *err)
{
    moec__stage *stage;
    (void)depth;
    moec_status st = read_replace(&stage, out, node, err);
    if (st == MOEC_OK)
        stage->join = moec__join_replace;
    return st;
}

static moec_status read_strip_decoder(void *out, moec_json *node, int depth, moec_err *err)
{
    moec_status st;
    moec__stage *stage;
    const char *text;
    size_t n;
    (void)depth;
    MOEC_TRY(new_join(&stage, out, moec__join_strip, err));
    MOEC_TRY(moec__get_text(&text, &n, node, "content", NULL, err));
    MOEC_TRY(set_text(stage, text, n, err));
    if (!moec_json_int(moec_json_get(node, "start"), &stage->start) ||
        !moec_json_int(moec_json_get(node, "stop"), &stage->stop) || stage->start < 0 || stage->stop < 0)
        st = moec_fail(err, MOEC_EFORMAT, "settings start and stop: numbers of characters were expected");
done:
    return st;
}

static moec_status read_decoders(void *out, moec_json *node, int depth, moec_err *err);

static const moec__kind decoders[] = {
    {"Sequence", read_decoders},       {"ByteLevel", read_byte_decoder}, {"Metaspace", read_metaspace_decoder},
    {"Replace", read_replace_decoder}, {"ByteFallback", read_fallback},  {"Fuse", read_fuse},
    {"Strip", read_strip_decoder},
};

static moec_status read_decoders(void *out, moec_json *node, int depth, moec_err *err)
{
    return read_members(out, decoders, MOEC_COUNT(decoders), "decoder", node, "decoders", depth, err);
}

moec_status moec__read_decoder(moec__stages *out, moec_json *node, moec_err *err)
{
    return moec__read_kind(out, decoders, MOEC_COUNT(decoders), "decoder", node, 0, err);
}
