/* Which of llama.cpp's built-in pre-tokenizers a tokenizer.json describes: by its patterns, in order. */
#include "run/gguf_tokenizer.h"

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
