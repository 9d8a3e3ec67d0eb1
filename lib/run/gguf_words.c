/* See gguf_words.h. */
#include "run/gguf_words.h"

#include "base/file.h"
#include "base/log.h"
#include "base/mem.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* llama.h's llama_token_type */
enum { NORMAL = 1, UNKNOWN = 2, CONTROL = 3, USER = 4, UNUSED = 5, BYTE = 6 };
enum { LONGEST = 1024 };

typedef struct word {
    const char *at; /* in the file */
    size_t len;
    float score;
    int kind;
} word;

typedef struct job {
    const moec_gguf_index *ix;
    const char *path;
    word *word;
    uint32_t *sorted; /* by spelling */
    size_t n;
    bool pieces;      /* as SentencePiece has it */
    char *pre;        /* NULL: not said */
    bool guessed;
} job;

static const moec_gguf_value *key(const job *j, const char *name)
{
    char full[96];
    snprintf(full, sizeof full, "tokenizer.ggml.%s", name);
    return moec_gguf_find(j->ix, full);
}

/* --- tokens ---------------------------------------------------------------------------------------------------------- */

static int order(const char *a, size_t a_len, const char *b, size_t b_len)
{
    if (a_len != b_len)
        return a_len < b_len ? -1 : 1;
    return memcmp(a, b, a_len);
}

static _Thread_local const word *sort_base; /* qsort has no context argument */

static int by_spelling(const void *a, const void *b)
{
    const word *x = &sort_base[*(const uint32_t *)a], *y = &sort_base[*(const uint32_t *)b];
    return order(x->at, x->len, y->at, y->len);
}

/* Id of a spelling, or -1. */
static int64_t find(const job *j, const char *text, size_t len)
{
    size_t lo = 0, hi = j->n;
    while (lo < hi) {
        const size_t mid = lo + (hi - lo) / 2;
        const word *w = &j->word[j->sorted[mid]];
        const int d = order(text, len, w->at, w->len);
        if (d == 0)
            return j->sorted[mid];
        if (d < 0)
            hi = mid;
        else
            lo = mid + 1;
    }
    return -1;
}

/* A padding id without a token: "[PAD7]". */
static bool is_padding(const job *j, size_t id)
{
    char name[32];
    const int n = snprintf(name, sizeof name, "[PAD%zu]", id);
    const word *w = &j->word[id];
    return w->kind == UNUSED && order(name, (size_t)n, w->at, w->len) == 0;
}

static moec_status read_kinds(job *j, moec_err *err)
{
    const moec_gguf_value *kinds = key(j, "token_type"), *scores = key(j, "scores");
    if ((kinds && (kinds->kind != MOEC_GGUF_ARRAY || kinds->n != j->n)) || (scores && (scores->kind != MOEC_GGUF_ARRAY || scores->n != j->n)))
        return moec_fail(err, MOEC_EFORMAT, "%s: tokenizer.ggml.token_type or scores is no list as long as that of the tokens", j->path);
    if (j->pieces && !scores)
        return moec_fail(err, MOEC_EFORMAT, "%s: key tokenizer.ggml.scores is missing", j->path);
    for (size_t i = 0; i < j->n; i++) {
        int64_t kind = NORMAL;
        double score = 0;
        if ((kinds && !moec_gguf_item_int(kinds, i, &kind)) || kind < 0 || kind > BYTE ||
            (scores && (!moec_gguf_item_real(scores, i, &score) || isnan(score))))
            return moec_fail(err, MOEC_EFORMAT, "%s: type or score of token %zu is not one", j->path, i);
        j->word[i].kind = (int)kind;
        j->word[i].score = (float)score;
    }
    return MOEC_OK;
}

static moec_status read_words(job *j, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_gguf_value *tokens = key(j, "tokens");
    moec_gguf_texts it = {0};
    const char *text;
    size_t len, i = 0;
    if (!tokens || tokens->kind != MOEC_GGUF_ARRAY || tokens->item != MOEC_GGUF_TEXT || tokens->n == 0 || tokens->n > 1 << 26)
        return moec_fail(err, MOEC_EFORMAT, "%s: key tokenizer.ggml.tokens is %s", j->path, tokens ? "no list of texts" : "missing");
    j->n = (size_t)tokens->n;
    MOEC_TRY(MOEC_NEW(j->word, j->n, err));
    MOEC_TRY(MOEC_NEW(j->sorted, j->n, err));
    while (i < j->n && moec_gguf_each_text(tokens, &it, &text, &len)) {
        if (memchr(text, '\0', len))
            return moec_fail(err, MOEC_EFORMAT, "%s: token %zu has a NUL in it", j->path, i);
        j->sorted[i] = (uint32_t)i;
        j->word[i++] = (word){.at = text, .len = len};
    }
    MOEC_TRY(read_kinds(j, err));
    sort_base = j->word;
    qsort(j->sorted, j->n, sizeof *j->sorted, by_spelling);
    for (i = 1; i < j->n; i++)
        if (by_spelling(&j->sorted[i - 1], &j->sorted[i]) == 0)
            return moec_fail(err, MOEC_EFORMAT, "%s: tokens %lu and %lu are spelled alike", j->path, (unsigned long)j->sorted[i - 1],
                             (unsigned long)j->sorted[i]);
done:
    return st;
}

/* A JSON string; NULL: it is no UTF-8, for which moec_json_new_string has another text. */
static moec_json *text_node(const char *text)
{
    moec_json *v = moec_json_new_string(text);
    const char *back = moec_json_string(v);
    if (back && strcmp(back, text) == 0)
        return v;
    moec_json_free(v);
    return NULL;
}

/* The spelling of an id; NULL: it is no UTF-8. */
static moec_json *spelled(const job *j, size_t id)
{
    char *copy = NULL;
    moec_json *v = NULL;
    if (moec_copy(&copy, j->word[id].at, j->word[id].len, NULL) == MOEC_OK)
        v = text_node(copy);
    moec_free(copy);
    return v;
}

static moec_status put_vocab(moec_json *model, const job *j, moec_err *err)
{
    moec_json *vocab = moec_json_new_object();
    moec_status st = MOEC_OK;
    for (size_t i = 0; st == MOEC_OK && i < j->n; i++) {
        moec_json *v = is_padding(j, i) ? NULL : spelled(j, i);
        if (v)
            moec_json_set(vocab, moec_json_string(v), moec_json_new_int((int64_t)i));
        else if (!is_padding(j, i))
            st = moec_fail(err, MOEC_EFORMAT, "%s: token %zu is not UTF-8", j->path, i);
        moec_json_free(v);
    }
    moec_json_set(model, "vocab", vocab);
    return st;
}

static moec_status put_added(moec_json *file, const job *j, moec_err *err)
{
    static const char *const off[] = {"single_word", "lstrip", "rstrip", "normalized"};
    moec_json *all = moec_json_new_array();
    moec_json_set(file, "added_tokens", all);
    for (size_t i = 0; i < j->n; i++) {
        const int kind = j->word[i].kind;
        if ((kind != CONTROL && kind != USER && (kind != UNKNOWN || !j->pieces)) || j->word[i].len == 0)
            continue;
        moec_json *o = moec_json_new_object(), *text = spelled(j, i);
        if (!text) {
            moec_json_free(o);
            return moec_fail(err, MOEC_EFORMAT, "%s: token %zu is not UTF-8", j->path, i);
        }
        moec_json_set(o, "id", moec_json_new_int((int64_t)i));
        moec_json_set(o, "content", text);
        for (size_t k = 0; k < MOEC_COUNT(off); k++)
            moec_json_set(o, off[k], moec_json_new_bool(false));
        moec_json_set(o, "special", moec_json_new_bool(kind != USER));
        moec_json_push(all, o);
    }
    return MOEC_OK;
}

/* --- merges ---------------------------------------------------------------------------------------------------------- */

static void push_merge(moec_json *merges, const job *j, size_t left, size_t right)
{
    moec_json *pair = moec_json_new_array();
    moec_json_push(pair, spelled(j, left));
    moec_json_push(pair, spelled(j, right));
    moec_json_push(merges, pair);
}

static moec_status put_merges(moec_json *model, const job *j, moec_err *err)
{
    const moec_gguf_value *v = key(j, "merges");
    moec_gguf_texts it = {0};
    const char *text;
    size_t len, i = 0;
    moec_json *merges = moec_json_new_array();
    moec_json_set(model, "merges", merges);
    if (!v || v->kind != MOEC_GGUF_ARRAY || (v->item != MOEC_GGUF_TEXT && v->n > 0))
        return moec_fail(err, MOEC_EFORMAT, "%s: key tokenizer.ggml.merges is %s", j->path, v ? "no list of texts" : "missing");
    for (; moec_gguf_each_text(v, &it, &text, &len); i++) {
        const char *space = len > 2 ? memchr(text + 1, ' ', len - 2) : NULL; /* a token may begin with one */
        const size_t n = space ? (size_t)(space - text) : 0;
        const int64_t left = find(j, text, n), right = space ? find(j, space + 1, len - n - 1) : -1;
        char joined[2 * LONGEST];
        if (left < 0 || right < 0 || len > sizeof joined)
            return moec_fail(err, MOEC_EFORMAT, "%s: merge %zu is not of two tokens", j->path, i);
        memcpy(joined, text, n);
        memcpy(joined + n, space + 1, len - n - 1);
        if (find(j, joined, len - 1) < 0)
            return moec_fail(err, MOEC_EFORMAT, "%s: merge %zu gives no token", j->path, i);
        push_merge(merges, j, (size_t)left, (size_t)right);
    }
    return MOEC_OK;
}

typedef struct merge {
    float score;
    uint32_t whole, left, right;
} merge;

static int by_score(const void *a, const void *b)
{
    const merge *x = a, *y = b;
    if (x->score != y->score)
        return x->score > y->score ? -1 : 1;
    if (x->whole != y->whole)
        return x->whole < y->whole ? -1 : 1;
    return x->left != y->left ? (x->left < y->left ? -1 : 1) : x->right < y->right ? -1 : x->right > y->right;
}

static bool merges_to(const word *w)
{
    return w->kind == NORMAL || w->kind == USER;
}

static moec_status put_pairs(moec_json *model, const job *j, moec_err *err)
{
    moec_status st = MOEC_OK;
    merge *all = NULL;
    size_t n = 0, cap = 0;
    for (size_t i = 0; i < j->n; i++) {
        const word *w = &j->word[i];
        for (size_t k = 1; merges_to(w) && w->len <= LONGEST && k < w->len; k++) {
            if (((unsigned char)w->at[k] & 0xc0) == 0x80) /* inside a character */
                continue;
            const int64_t left = find(j, w->at, k), right = left < 0 ? -1 : find(j, w->at + k, w->len - k);
            if (right < 0 || !merges_to(&j->word[left]) || !merges_to(&j->word[right]))
                continue;
            MOEC_TRY(MOEC_GROW(all, cap, n + 1, err));
            all[n++] = (merge){w->score, (uint32_t)i, (uint32_t)left, (uint32_t)right};
        }
    }
    if (n > 1)
        qsort(all, n, sizeof *all, by_score);
    moec_json *merges = moec_json_new_array();
    moec_json_set(model, "merges", merges);
    for (size_t i = 0; i < n; i++)
        push_merge(merges, j, all[i].left, all[i].right);
done:
    moec_free(all);
    return st;
}

/* --- nodes ----------------------------------------------------------------------------------------------------------- */

/* {"type": type, key: value} or without a second key. */
static moec_json *node(const char *type, const char *name, moec_json *value)
{
    moec_json *o = moec_json_new_object();
    moec_json_set(o, "type", moec_json_new_string(type));
    if (name)
        moec_json_set(o, name, value);
    return o;
}

static moec_json *replace(const char *from, const char *to)
{
    moec_json *o = node("Replace", "pattern", moec_json_new_object());
    moec_json_set(moec_json_get(o, "pattern"), "String", moec_json_new_string(from));
    moec_json_set(o, "content", moec_json_new_string(to));
    return o;
}

static const char blank[] = "\342\226\201";

static moec_json *pieces_normalizer(bool prefix)
{
    moec_json *all = moec_json_new_array();
    if (prefix)
        moec_json_push(all, node("Prepend", "prepend", moec_json_new_string(blank)));
    moec_json_push(all, replace(" ", blank));
    return node("Sequence", "normalizers", all);
}

static moec_json *pieces_decoder(bool prefix)
{
    moec_json *all = moec_json_new_array(), *strip;
    moec_json_push(all, replace(blank, " "));
    moec_json_push(all, node("ByteFallback", NULL, NULL));
    moec_json_push(all, node("Fuse", NULL, NULL));
    if (prefix) {
        strip = node("Strip", "content", moec_json_new_string(" "));
        moec_json_set(strip, "start", moec_json_new_int(1));
        moec_json_set(strip, "stop", moec_json_new_int(0));
        moec_json_push(all, strip);
    }
    return node("Sequence", "decoders", all);
}

/* The id of a key, -1: none. */
static moec_status special(int64_t *id, const job *j, const char *name, moec_err *err)
{
    const moec_gguf_value *v = key(j, name);
    *id = -1;
    if (!v || (moec_gguf_int(v, id) && *id == -1) || (moec_gguf_int(v, id) && *id == UINT32_MAX)) { /* both are said for none */
        *id = -1;
        return MOEC_OK;
    }
    if (moec_gguf_int(v, id) && *id >= 0 && (uint64_t)*id < j->n)
        return MOEC_OK;
    return moec_fail(err, MOEC_EFORMAT, "%s: tokenizer.ggml.%s is no id of the %zu tokens", j->path, name, j->n);
}

static bool flag(const job *j, const char *name, bool fallback)
{
    bool v = fallback;
    (void)moec_gguf_bool(key(j, name), &v);
    return v;
}

static moec_json *template_item(const char *type, moec_json *id, int type_id)
{
    moec_json *inner = moec_json_new_object(), *o = moec_json_new_object();
    moec_json_set(inner, "id", id);
    moec_json_set(inner, "type_id", moec_json_new_int(type_id));
    moec_json_set(o, type, inner);
    return o;
}

static void one_sequence(moec_json *list, const job *j, const char *name, int type_id, int64_t bos, int64_t eos)
{
    if (bos >= 0)
        moec_json_push(list, template_item("SpecialToken", spelled(j, (size_t)bos), type_id));
    moec_json_push(list, template_item("Sequence", moec_json_new_string(name), type_id));
    if (eos >= 0)
        moec_json_push(list, template_item("SpecialToken", spelled(j, (size_t)eos), type_id));
}

/* bos and eos around a text; -1: none. */
static moec_json *post_processor(const job *j, int64_t bos, int64_t eos)
{
    moec_json *o = node("TemplateProcessing", NULL, NULL), *single = moec_json_new_array(), *pair = moec_json_new_array();
    moec_json *table = moec_json_new_object();
    one_sequence(single, j, "A", 0, bos, eos);
    one_sequence(pair, j, "A", 0, bos, eos);
    one_sequence(pair, j, "B", 1, bos, eos);
    const int64_t ids[] = {bos, eos};
    for (size_t i = 0; i < MOEC_COUNT(ids); i++) {
        moec_json *text = ids[i] < 0 ? NULL : spelled(j, (size_t)ids[i]);
        if (!text)
            continue;
        moec_json *entry = moec_json_new_object(), *list = moec_json_new_array(), *names = moec_json_new_array();
        moec_json_push(list, moec_json_new_int(ids[i]));
        moec_json_push(names, moec_json_clone(text));
        moec_json_set(entry, "id", moec_json_clone(text));
        moec_json_set(entry, "ids", list);
        moec_json_set(entry, "tokens", names);
        moec_json_set(table, moec_json_string(text), entry);
        moec_json_free(text);
    }
    moec_json_set(o, "single", single);
    moec_json_set(o, "pair", pair);
    moec_json_set(o, "special_tokens", table);
    return o;
}

/* Everything but tokens: what a text goes through. */
static void put_nodes(moec_json *file, job *j)
{
    moec_json *pre = j->pieces || !j->pre ? NULL : moec_gguf_pre_node(j->pre);
    if (j->pieces) {
        const bool prefix = flag(j, "add_space_prefix", true);
        moec_json_set(file, "normalizer", pieces_normalizer(prefix));
        moec_json_set(file, "pre_tokenizer", moec_json_new_null());
        moec_json_set(file, "decoder", pieces_decoder(prefix));
        return;
    }
    j->guessed = pre == NULL;
    if (!pre)
        pre = moec_gguf_pre_node("gpt-2");
    const bool nfc = j->pre && (strcmp(j->pre, "qwen2") == 0 || strcmp(j->pre, "deepseek-r1-qwen") == 0);
    moec_json_set(file, "normalizer", nfc ? node("NFC", NULL, NULL) : moec_json_new_null());
    moec_json_set(file, "pre_tokenizer", pre);
    moec_json *decoder = node("ByteLevel", "add_prefix_space", moec_json_new_bool(false));
    moec_json_set(decoder, "trim_offsets", moec_json_new_bool(false));
    moec_json_set(decoder, "use_regex", moec_json_new_bool(false));
    moec_json_set(file, "decoder", decoder);
}

static moec_status make_file(char **out, job *j, moec_err *err)
{
    moec_status st = MOEC_OK;
    int64_t bos, eos, unk;
    moec_json *file = moec_json_new_object(), *model = moec_json_new_object();
    const bool ignores = !j->pieces && j->pre && (strcmp(j->pre, "llama-bpe") == 0 || strncmp(j->pre, "llama", 5) == 0);
    moec_json_set(file, "version", moec_json_new_string("1.0"));
    moec_json_set(file, "truncation", moec_json_new_null());
    moec_json_set(file, "padding", moec_json_new_null());
    MOEC_TRY(special(&bos, j, "bos_token_id", err));
    MOEC_TRY(special(&eos, j, "eos_token_id", err));
    MOEC_TRY(special(&unk, j, "unknown_token_id", err));
    MOEC_TRY(put_added(file, j, err));
    put_nodes(file, j);
    bos = flag(j, "add_bos_token", j->pieces || ignores) ? bos : -1;
    eos = flag(j, "add_eos_token", false) ? eos : -1;
    moec_json_set(file, "post_processor", bos >= 0 || eos >= 0 ? post_processor(j, bos, eos) : moec_json_new_null());
    moec_json_set(model, "type", moec_json_new_string("BPE"));
    moec_json_set(model, "dropout", moec_json_new_null());
    moec_json_set(model, "unk_token", j->pieces && unk >= 0 ? spelled(j, (size_t)unk) : moec_json_new_null());
    moec_json_set(model, "continuing_subword_prefix", moec_json_new_null());
    moec_json_set(model, "end_of_word_suffix", moec_json_new_null());
    moec_json_set(model, "fuse_unk", moec_json_new_bool(j->pieces));
    moec_json_set(model, "byte_fallback", moec_json_new_bool(j->pieces));
    moec_json_set(model, "ignore_merges", moec_json_new_bool(ignores));
    MOEC_TRY(put_vocab(model, j, err));
    MOEC_TRY(j->pieces ? put_pairs(model, j, err) : put_merges(model, j, err));
    moec_json_set(file, "model", model);
    model = NULL;
    MOEC_TRY(moec_json_dump(out, file, 1, err));
done:
    moec_json_free(model);
    moec_json_free(file);
    return st;
}

/* --- beside it ------------------------------------------------------------------------------------------------------- */

static moec_status make_configs(moec_gguf_words *out, const job *j, moec_err *err)
{
    static const struct { const char *key, *token, *id; } rows[] = {
        {"bos_token_id", "bos_token", "bos_token_id"}, {"eos_token_id", "eos_token", "eos_token_id"},
        {"unknown_token_id", "unk_token", NULL}, {"padding_token_id", "pad_token", "pad_token_id"}};
    moec_status st = MOEC_OK;
    moec_json *config = moec_json_new_object(), *generation = moec_json_new_object();
    char *text = NULL;
    int64_t id, eot;
    moec_json_set(config, "tokenizer_class", moec_json_new_string("PreTrainedTokenizerFast"));
    moec_json_set(config, "clean_up_tokenization_spaces", moec_json_new_bool(false));
    for (size_t i = 0; i < MOEC_COUNT(rows); i++) {
        MOEC_TRY(special(&id, j, rows[i].key, err));
        moec_json_set(config, rows[i].token, id >= 0 ? spelled(j, (size_t)id) : moec_json_new_null());
        if (id < 0 || !rows[i].id)
            continue;
        moec_json *ids = moec_json_new_int(id);
        MOEC_TRY(special(&eot, j, "eot_token_id", err));
        if (i == 1 && eot >= 0 && eot != id) { /* a turn ends with another token than a text */
            const int32_t both[] = {(int32_t)id, (int32_t)eot};
            moec_json_free(ids);
            ids = moec_json_new_ints(both, 2);
        }
        moec_json_set(generation, rows[i].id, ids);
    }
    moec_json_set(config, "add_bos_token", moec_json_new_bool(flag(j, "add_bos_token", j->pieces)));
    moec_json_set(config, "add_eos_token", moec_json_new_bool(flag(j, "add_eos_token", false)));
    const moec_gguf_value *chat = moec_gguf_find(j->ix, "tokenizer.chat_template");
    if (chat) {
        MOEC_TRY(moec_within(err, moec_gguf_text(&text, chat, err), "%s: tokenizer.chat_template", j->path));
        moec_json *v = text_node(text);
        if (!v) {
            st = moec_fail(err, MOEC_EFORMAT, "%s: tokenizer.chat_template is not UTF-8", j->path);
            goto done;
        }
        moec_json_set(config, "chat_template", v);
    }
    MOEC_TRY(moec_json_dump(&out->config, config, 2, err));
    MOEC_TRY(moec_json_dump(&out->generation, generation, 2, err));
done:
    moec_free(text);
    moec_json_free(config);
    moec_json_free(generation);
    return st;
}

moec_status moec_gguf_words_make(moec_gguf_words *out, const moec_gguf_index *keys, const char *path, moec_err *err)
{
    moec_status st = MOEC_OK;
    job j = {.ix = keys, .path = path};
    char *kind = NULL;
    moec_tokenizer *t = NULL;
    *out = (moec_gguf_words){0};
    const moec_gguf_value *v = key(&j, "model"), *pre = key(&j, "pre");
    if (!v)
        return MOEC_OK;
    MOEC_TRY(moec_within(err, moec_gguf_text(&kind, v, err), "%s: tokenizer.ggml.model", path));
    moec_plain_line(kind);
    if (strcmp(kind, "no_vocab") == 0 || strcmp(kind, "none") == 0)
        goto done;
    j.pieces = strcmp(kind, "llama") == 0;
    if (!j.pieces && strcmp(kind, "gpt2") != 0)
        MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "%s: tokenizer.ggml.model is %.60s; gpt2 and llama are read", path, kind));
    if (pre) {
        MOEC_TRY(moec_within(err, moec_gguf_text(&j.pre, pre, err), "%s: tokenizer.ggml.pre", path));
        moec_plain_line(j.pre);
    }
    MOEC_TRY(read_words(&j, err));
    MOEC_TRY(make_file(&out->tokenizer, &j, err));
    MOEC_TRY(moec_within(err, moec_tokenizer_parse(&t, out->tokenizer, strlen(out->tokenizer), "its tokenizer", err), "%s", path));
    MOEC_TRY(make_configs(out, &j, err));
    out->guessed = j.guessed;
done:
    moec_tokenizer_free(t);
    moec_free(kind);
    moec_free(j.pre);
    moec_free(j.word);
    moec_free(j.sorted);
    return st;
}

void moec_gguf_words_release(moec_gguf_words *w)
{
    moec_free(w->tokenizer);
    moec_free(w->config);
    moec_free(w->generation);
    *w = (moec_gguf_words){0};
}

moec_status moec_gguf_words_of(moec_gguf_words *out, const moec_model *m, moec_err *err)
{
    const char *path = moec_ckpt_dir(m->ckpt);
    moec_status st = moec_gguf_words_make(out, moec_gguf_front(moec_ckpt_gguf(m->ckpt)), path, err);
    if (st == MOEC_OK && out->guessed)
        moec_warn("%s: its pre-tokenizer is not known; GPT-2's is taken, and some texts will be cut into other tokens", path);
    return st;
}

moec_status moec_model_tokenizer(moec_tokenizer **out, const moec_model *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_gguf_words w = {0};
    char *path = NULL;
    const char *dir = moec_ckpt_dir(m->ckpt);
    *out = NULL;
    if (moec_ckpt_gguf(m->ckpt)) {
        MOEC_TRY(moec_gguf_words_of(&w, m, err));
        if (w.tokenizer)
            MOEC_TRY(moec_tokenizer_parse(out, w.tokenizer, strlen(w.tokenizer), dir, err));
        goto done;
    }
    MOEC_TRY(moec_path_join(&path, dir, "tokenizer.json", err));
    if (moec_path_exists(path))
        MOEC_TRY(moec_tokenizer_load(out, path, err));
done:
    moec_gguf_words_release(&w);
    moec_free(path);
    return st;
}
