/* Which of llama.cpp's built-in pre-tokenizers a tokenizer.json describes: by its patterns, in order. */
#include "run/gguf_tokenizer.h"
#include "run/gguf_words.h"

#include <string.h>

enum { PARTS = 6 };

#define BLANKS "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
#define OTHERS "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|" BLANKS
#define SHORT "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
#define UPPER "\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}"
#define LOWER "\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}"

/* Patterns of Split nodes, with line breaks spelled out; a pattern that ends with U+2217: anything that begins so (character classes of
 * scripts, whose ranges are long and not always the same). Digits stands for the node of that name. */
static const struct {
    const char *name;
    const char *part[PARTS];
} rows[] = {
    {"qwen2", {SHORT "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}" OTHERS}},
    {"llama-bpe", {SHORT "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}" OTHERS}},
    {"gpt-4o", {"[^\\r\\n\\p{L}\\p{N}]?[" UPPER "]*[" LOWER "]+" SHORT "?|[^\\r\\n\\p{L}\\p{N}]?[" UPPER "]+[" LOWER "]*" SHORT
                "?|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|" BLANKS}},
    {"deepseek-v3", {"\\p{N}{1,3}", "[\344\270\200-\351\276\245\xe2\x88\x97",
                     "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
                     "| ?[\\p{P}\\p{S}]+[\\r\\n]*|" BLANKS}},
    {"deepseek-llm", {"[\\r\\n]", "\\s?[A-Za-z\xe2\x88\x97", "\\s?[!-/:-~\xe2\x88\x97", "\\s+$",
                      "[\344\270\200-\351\276\245\xe2\x88\x97", "Digits"}},
    {"deepseek-coder", {"[\\r\\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", "[\344\270\200-\351\276\245\xe2\x88\x97", "Digits"}},
    {"gpt-2", {"ByteLevel"}},
};

typedef struct found {
    const char *part[PARTS]; /* borrowed */
    int n;
    bool bytes, odd; /* a ByteLevel node; something that no row has */
} found;

static void push(found *f, const char *text)
{
    if (text && f->n < PARTS)
        f->part[f->n++] = text;
    else
        f->odd = true;
}

static void look(found *f, const moec_json *node, int depth)
{
    const char *type = moec_json_string(moec_json_get(node, "type"));
    bool regex = true, inverted = false;
    if (!type || depth > 4) {
        f->odd = true;
    } else if (strcmp(type, "Sequence") == 0) {
        const moec_json *all = moec_json_get(node, "pretokenizers");
        for (size_t i = 0; i < moec_json_len(all); i++)
            look(f, moec_json_at(all, i), depth + 1);
    } else if (strcmp(type, "ByteLevel") == 0) {
        moec_json_bool(moec_json_get(node, "use_regex"), &regex); /* on where it is not said */
        f->bytes = true;
        if (regex)
            push(f, "ByteLevel");
    } else if (strcmp(type, "Digits") == 0) {
        push(f, "Digits");
    } else if (strcmp(type, "Split") == 0) {
        moec_json_bool(moec_json_get(node, "invert"), &inverted);
        const char *behavior = moec_json_string(moec_json_get(node, "behavior"));
        f->odd |= inverted || !behavior || (strcmp(behavior, "Isolated") != 0 && strcmp(behavior, "Removed") != 0);
        push(f, moec_json_string(moec_json_path(node, "pattern.Regex")));
    } else {
        f->odd = true;
    }
}

/* Some files have line breaks in patterns as they are, others spell them "\\r" and "\\n". */
static bool matches(const char *want, const char *have)
{
    while (*want && *have) {
        const bool line = *have == '\r' || *have == '\n';
        if (line ? want[0] != '\\' || want[1] != (*have == '\r' ? 'r' : 'n') : *want != *have)
            break;
        want += line ? 2 : 1;
        have++;
    }
    return (!*want && !*have) || strncmp(want, "\xe2\x88\x97", 3) == 0; /* the sign for anything */
}

const char *moec_gguf_pre(const moec_json *pre_tokenizer)
{
    found f = {0};
    const char *name = NULL;
    look(&f, pre_tokenizer, 0);
    for (size_t i = 0; !name && !f.odd && f.bytes && i < MOEC_COUNT(rows); i++) {
        int n = 0;
        while (n < PARTS && n < f.n && rows[i].part[n] && matches(rows[i].part[n], f.part[n]))
            n++;
        if (n == f.n && (n == PARTS || !rows[i].part[n]))
            name = rows[i].name;
    }
    return name;
}

/* --- the other way --------------------------------------------------------------------------------------------------- */

#define CJK "[\344\270\200-\351\276\245\340\240\200-\344\270\200\352\260\200-\355\237\277]+"
#define WIDE "\xef\xbc\x81-\xef\xbc\x8f\xef\xbc\x9a-\xef\xbd\x9e\xe2\x80\x98-\xe2\x80\x9f\xe3\x80\x80-\xe3\x80\x82"

/* The whole of patterns that a row has the beginning of. */
static const struct {
    const char *name;
    int part;
    const char *whole;
} wholes[] = {
    {"deepseek-v3", 1, "[\344\270\200-\351\276\245\343\201\200-\343\202\237\343\202\240-\343\203\277]+"},
    {"deepseek-llm", 1, "\\s?[A-Za-z\\p{Lu}\\p{Ll}\\p{Lt}]+"},
    {"deepseek-llm", 2, "\\s?[!-/:-~" WIDE "]+"},
    {"deepseek-llm", 4, CJK},
    {"deepseek-coder", 3, CJK},
};
/* Names of the same patterns. */
static const struct {
    const char *name, *row;
} others[] = {{"llama3", "llama-bpe"}, {"llama-v3", "llama-bpe"},  {"dbrx", "llama-bpe"},          {"smaug-bpe", "llama-bpe"},
              {"glm4", "llama-bpe"},   {"chatglm-bpe", "llama-bpe"}, {"deepseek-r1-qwen", "qwen2"}, {"olmo", "gpt-2"},
              {"gpt2", "gpt-2"}};

static moec_json *bytes_node(bool regex)
{
    moec_json *o = moec_json_new_object();
    moec_json_set(o, "type", moec_json_new_string("ByteLevel"));
    moec_json_set(o, "add_prefix_space", moec_json_new_bool(false));
    moec_json_set(o, "trim_offsets", moec_json_new_bool(false));
    moec_json_set(o, "use_regex", moec_json_new_bool(regex));
    return o;
}

static moec_json *split_node(const char *pattern)
{
    moec_json *o = moec_json_new_object(), *regex = moec_json_new_object();
    if (strcmp(pattern, "Digits") == 0) {
        moec_json_set(o, "type", moec_json_new_string("Digits"));
        moec_json_set(o, "individual_digits", moec_json_new_bool(true));
        moec_json_free(regex);
        return o;
    }
    moec_json_set(regex, "Regex", moec_json_new_string(pattern));
    moec_json_set(o, "type", moec_json_new_string("Split"));
    moec_json_set(o, "pattern", regex);
    moec_json_set(o, "behavior", moec_json_new_string("Isolated"));
    moec_json_set(o, "invert", moec_json_new_bool(false));
    return o;
}

moec_json *moec_gguf_pre_node(const char *name)
{
    size_t row = 0;
    for (size_t i = 0; i < MOEC_COUNT(others); i++)
        if (strcmp(others[i].name, name) == 0)
            name = others[i].row;
    while (row < MOEC_COUNT(rows) && strcmp(rows[row].name, name) != 0)
        row++;
    if (row == MOEC_COUNT(rows))
        return NULL;
    if (strcmp(rows[row].part[0], "ByteLevel") == 0)
        return bytes_node(true);
    moec_json *o = moec_json_new_object(), *all = moec_json_new_array();
    for (int i = 0; i < PARTS && rows[row].part[i]; i++) {
        const char *part = rows[row].part[i];
        for (size_t k = 0; k < MOEC_COUNT(wholes); k++)
            if (wholes[k].part == i && strcmp(wholes[k].name, name) == 0)
                part = wholes[k].whole;
        moec_json_push(all, split_node(part));
    }
    moec_json_push(all, bytes_node(false));
    moec_json_set(o, "type", moec_json_new_string("Sequence"));
    moec_json_set(o, "pretokenizers", all);
    return o;
}
