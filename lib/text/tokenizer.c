/* Reading of a whole tokenizer.json: model, added tokens, post-processor, and what asks about tokens. */
#include "text/stage.h"

#include "base/mem.h"

#include <stdlib.h>
#include <string.h>

#define MAX_FILE ((size_t)256 << 20)

/* ---- model ---- */

static moec_status read_id(int32_t *out, const moec_json *v, const char *token, moec_err *err)
{
    int64_t id;
    if (!moec_json_int(v, &id) || id < 0 || id >= INT32_MAX)
        return moec_fail(err, MOEC_EFORMAT, "token \"%.60s\": an id from 0 to %d was expected", token, INT32_MAX - 1);
    *out = (int32_t)id;
    return MOEC_OK;
}

static moec_status read_vocab(moec__bpe *b, moec_json *vocab, moec_err *err)
{
    moec_status st = MOEC_OK;
    const char *token;
    moec_json *v;
    int32_t id = 0;
    if (moec_json_type(vocab) != MOEC_JSON_OBJECT)
        return moec_fail(err, MOEC_EFORMAT, "setting vocab: an object of token: id was expected");
    for (void *it = NULL; moec_json_each(vocab, &it, &token, &v);) {
        MOEC_TRY(read_id(&id, v, token, err));
        const uint64_t *before = moec__pairs_get(&b->by_id, (uint32_t)id);
        if (before) {
            const char *other = b->vocab.bytes + b->vocab.word[*before].at;
            return moec_fail(err, MOEC_EFORMAT, "tokens \"%.60s\" and \"%.60s\" have the same id %d", other, token,
                             id);
        }
        MOEC_TRY(moec__pairs_set(&b->by_id, (uint32_t)id, b->vocab.n, err));
        MOEC_TRY(moec__words_add(&b->vocab, token, strlen(token), id, err));
    }
done:
    return st;
}

/* "a b" with exactly one space. */
static bool split_merge(const char *both, size_t n, size_t *n_left)
{
    const char *space = memchr(both, ' ', n);
    if (!space)
        return false;
    *n_left = (size_t)(space - both);
    return !memchr(space + 1, ' ', n - *n_left - 1);
}

static moec_status read_merges(moec__bpe *b, const moec_json *merges, moec_err *err)
{
    moec_status st = MOEC_OK;
    if (moec_json_type(merges) != MOEC_JSON_ARRAY || moec_json_len(merges) >= UINT32_MAX)
        return moec_fail(err, MOEC_EFORMAT, "setting merges: a list was expected");
    for (size_t i = 0; i < moec_json_len(merges); i++) {
        const moec_json *m = moec_json_at(merges, i);
        const char *both = moec_json_string(m);
        const char *left = moec_json_string(moec_json_at(m, 0)), *right = moec_json_string(moec_json_at(m, 1));
        size_t n_left = 0, n = moec_json_len(m);
        if (both && strncmp(both, "#version", 8) == 0) /* first line of the old merges.txt */
            continue;
        if (both && split_merge(both, n, &n_left))
            MOEC_TRY(moec__bpe_add_merge(b, both, n_left, both + n_left + 1, n - n_left - 1, (uint32_t)i, err));
        else if (!both && n == 2 && left && right)
            MOEC_TRY(moec__bpe_add_merge(b, left, strlen(left), right, strlen(right), (uint32_t)i, err));
        else
            return moec_fail(err, MOEC_EFORMAT, "merge %zu: \"left right\" or [left, right] was expected", i);
    }
done:
    return st;
}

/* Settings that change what a model does and that are not supported unless they are switched off. */
static moec_status refuse_others(const moec_json *node, moec_err *err)
{
    static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    double dropout = 0;
    for (size_t i = 0; i < MOEC_COUNT(affixes); i++)
        if (moec_json_len(moec_json_get(node, affixes[i])) > 0)
            return moec_fail(err, MOEC_EFORMAT, "setting %s is not supported", affixes[i]);
    const moec_json *v = moec_json_get(node, "dropout");
    if (v && moec_json_type(v) != MOEC_JSON_NULL && (!moec_json_real(v, &dropout) || dropout < 0.0 || dropout > 0.0))
        return moec_fail(err, MOEC_EFORMAT, "setting dropout is not supported: ids would depend on chance");
    return MOEC_OK;
}

static moec_status read_unknown(moec__bpe *b, const moec_json *node, moec_err *err)
{
    const moec_json *unk = moec_json_get(node, "unk_token");
    bool fallback = false;
    if (unk && moec_json_type(unk) != MOEC_JSON_NULL) {
        if (!moec_json_string(unk))
            return moec_fail(err, MOEC_EFORMAT, "setting unk_token: a string was expected");
        b->has_unk = true;
        b->unk_id = moec__words_find(&b->vocab, moec_json_string(unk), moec_json_len(unk));
    }
    moec_status st = moec__get_bool(&b->fuse_unk, node, "fuse_unk", false, err);
    if (st == MOEC_OK)
        st = moec__get_bool(&b->ignore_merges, node, "ignore_merges", false, err);
    if (st == MOEC_OK)
        st = moec__get_bool(&fallback, node, "byte_fallback", false, err);
    for (int i = 0; i < 256; i++) {
        static const char hex[] = "0123456789ABCDEF";
        char name[6] = {'<', '0', 'x', hex[i >> 4], hex[i & 15], '>'};
        b->byte_id[i] = fallback ? moec__words_find(&b->vocab, name, sizeof name) : -1;
    }
    return st;
}

static moec_status read_bpe(void *out, moec_json *node, int depth, moec_err *err)
{
    moec_status st;
    (void)depth;
    MOEC_TRY(refuse_others(node, err));
    MOEC_TRY(read_vocab(out, moec_json_get(node, "vocab"), err));
    MOEC_TRY(read_unknown(out, node, err));
    MOEC_TRY(read_merges(out, moec_json_get(node, "merges"), err));
    MOEC_TRY(moec__bpe_finish(out, err));
done:
    return st;
}

static const moec__kind models[] = {{"BPE", read_bpe}};

moec_status moec__read_model(moec__bpe *out, moec_json *node, moec_err *err)
{
    if (moec_json_type(node) != MOEC_JSON_OBJECT)
        return moec_fail(err, MOEC_EFORMAT, "model is missing");
    /* Files older than version 1.0 leave the type out. */
    if (!moec_json_get(node, "type"))
        return moec_within(err, read_bpe(out, node, 0, err), "model");
    return moec__read_kind(out, models, MOEC_COUNT(models), "model", node, 0, err);
}

/* ---- added tokens ---- */

/* The id is not read from the file: `tokenizers` takes the model's, or else counts on from the end of the vocabulary
 * or of the tokens added so far, and clients of the model have the ids that come of it. */
static moec_status choose_id(int32_t *out, const moec_tokenizer *t, const char *content, size_t n, moec_err *err)
{
    size_t size = t->bpe.vocab.n, behind = (size_t)(t->added_highest + 1);
    *out = moec__words_find(&t->bpe.vocab, content, n);
    if (*out >= 0)
        return MOEC_OK;
    size_t next = behind > size ? behind : size;
    if (next >= INT32_MAX)
        return moec_fail(err, MOEC_EFORMAT, "token \"%.60s\": no id is left for it", content);
    *out = (int32_t)next;
    return MOEC_OK;
}

static moec_status read_added_token(moec_tokenizer *t, moec_json *node, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec__added_token a = {0};
    const char *content;
    size_t n;
    MOEC_TRY(moec__get_text(&content, &n, node, "content", NULL, err));
    MOEC_TRY(read_id(&a.id, moec_json_get(node, "id"), content, err));
    MOEC_TRY(moec__get_bool(&a.special, node, "special", false, err));
    MOEC_TRY(moec__get_bool(&a.normalized, node, "normalized", !a.special, err));
    MOEC_TRY(moec__get_bool(&a.single_word, node, "single_word", false, err));
    MOEC_TRY(moec__get_bool(&a.lstrip, node, "lstrip", false, err));
    MOEC_TRY(moec__get_bool(&a.rstrip, node, "rstrip", false, err));
    if (n == 0)
        goto done;
    if (moec__words_find(&t->added_at, content, n) >= 0)
        return moec_fail(err, MOEC_EFORMAT, "token \"%.60s\" is there twice", content);
    MOEC_TRY(choose_id(&a.id, t, content, n, err));
    MOEC_TRY(moec__words_add(&t->added_at, content, n, (int32_t)t->n_added, err));
    MOEC_TRY(moec__pairs_set(&t->added_id, (uint32_t)a.id, t->n_added, err));
    t->added_highest = a.id > t->added_highest ? a.id : t->added_highest;
    MOEC_TRY(MOEC_GROW(t->added, t->cap_added, t->n_added + 1, err));
    a.n_content = n;
    MOEC_TRY(moec_copy(&a.content, content, n, err));
    t->added[t->n_added++] = a;
done:
    return st;
}

/* What a token is looked for by: its content, normalized where it says so. */
static moec_status set_find(moec_tokenizer *t, moec_encoder *e, moec__added_token *a, moec_err *err)
{
    moec__piece piece = {a->content, a->n_content, true};
    (void)t;
    moec_status st = a->normalized ? moec__normalize(&piece, e, piece, err) : MOEC_OK;
    if (st != MOEC_OK)
        return st;
    a->n_find = piece.n;
    return moec_copy(&a->find, piece.s, piece.n, err);
}

moec_status moec__read_added(moec_tokenizer *t, moec_json *node, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_encoder *e = NULL;
    if (node && moec_json_type(node) != MOEC_JSON_ARRAY)
        return moec_fail(err, MOEC_EFORMAT, "added_tokens: a list was expected");
    for (size_t i = 0; i < moec_json_len(node); i++)
        MOEC_TRY(moec_within(err, read_added_token(t, moec_json_at(node, i), err), "added_tokens"));
    MOEC_TRY(moec_encoder_new(&e, t, err));
    for (size_t i = 0; i < t->n_added; i++)
        MOEC_TRY(moec_within(err, set_find(t, e, &t->added[i], err), "added_tokens"));
    MOEC_TRY(moec__added_set_make(&t->raw, t->added, t->n_added, false, err));
    MOEC_TRY(moec__added_set_make(&t->normal, t->added, t->n_added, true, err));
done:
    moec_encoder_free(e);
    return st;
}

/* ---- post-processor ---- */

/* Appends the ids that special_tokens gives for a name. */
static moec_status special_ids(moec_ids *out, const moec_json *node, const char *name, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_json *ids = moec_json_get(moec_json_get(moec_json_get(node, "special_tokens"), name), "ids");
    int32_t id = 0;
    if (moec_json_type(ids) != MOEC_JSON_ARRAY)
        return moec_fail(err, MOEC_EFORMAT, "special_tokens: ids of \"%.60s\" are missing", name);
    for (size_t i = 0; i < moec_json_len(ids); i++) {
        MOEC_TRY(read_id(&id, moec_json_at(ids, i), name, err));
        MOEC_TRY(moec__ids_add(out, id, err));
    }
done:
    return st;
}

/* Puts front in front of *ids. */
static moec_status put_before(moec_ids *ids, moec_ids *front, moec_err *err)
{
    moec_status st = MOEC_OK;
    for (size_t i = 0; i < ids->n && st == MOEC_OK; i++)
        st = moec__ids_add(front, ids->id[i], err);
    moec_ids old = *ids;
    *ids = *front;
    *front = old;
    return st;
}

static moec_status read_template(void *out, moec_json *node, int depth, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_tokenizer *t = out;
    moec_ids front = {0};
    const moec_json *single = moec_json_get(node, "single");
    bool seen = false;
    (void)depth;
    if (moec_json_type(single) != MOEC_JSON_ARRAY)
        return moec_fail(err, MOEC_EFORMAT, "setting single: a list was expected");
    for (size_t i = 0; i < moec_json_len(single); i++) {
        const moec_json *part = moec_json_at(single, i);
        const char *text = moec_json_string(moec_json_get(moec_json_get(part, "Sequence"), "id"));
        const char *special = moec_json_string(moec_json_get(moec_json_get(part, "SpecialToken"), "id"));
        if (special) {
            MOEC_TRY(special_ids(seen ? &t->behind : &front, node, special, err));
        } else if (text && strcmp(text, "A") == 0 && !seen) {
            seen = true;
        } else {
            st = moec_fail(err, MOEC_EFORMAT, "setting single: part %zu is not supported", i);
            goto done;
        }
    }
    st = seen ? put_before(&t->before, &front, err)
              : moec_fail(err, MOEC_EFORMAT, "setting single: the text itself, sequence A, is missing");
done:
    moec_ids_release(&front);
    return st;
}

static moec_status read_nothing(void *out, moec_json *node, int depth, moec_err *err)
{
    (void)out;
    (void)node;
    (void)depth;
    (void)err;
    return MOEC_OK;
}

static moec_status read_processors(void *out, moec_json *node, int depth, moec_err *err);

static const moec__kind processors[] = {
    {"Sequence", read_processors},
    {"TemplateProcessing", read_template},
    {"ByteLevel", read_nothing}, /* moves offsets only */
};

static moec_status read_processors(void *out, moec_json *node, int depth, moec_err *err)
{
    const moec_json *list = moec_json_get(node, "processors");
    moec_status st = MOEC_OK;
    if (moec_json_type(list) != MOEC_JSON_ARRAY)
        return moec_fail(err, MOEC_EFORMAT, "post_processor: Sequence: setting processors: a list was expected");
    for (size_t i = 0; i < moec_json_len(list) && st == MOEC_OK; i++)
        st = moec__read_kind(out, processors, MOEC_COUNT(processors), "post_processor", moec_json_at(list, i),
                             depth + 1, err);
    return st;
}

moec_status moec__read_post_processor(moec_tokenizer *out, moec_json *node, moec_err *err)
{
    return moec__read_kind(out, processors, MOEC_COUNT(processors), "post_processor", node, 0, err);
}

/* ---- the whole ---- */

static void count_ids(moec_tokenizer *t)
{
    int32_t highest = -1;
    for (size_t i = 0; i < t->bpe.vocab.n; i++)
        if (t->bpe.vocab.word[i].id > highest)
            highest = t->bpe.vocab.word[i].id;
    t->vocab_size = (t->added_highest > highest ? t->added_highest : highest) + 1;
}

static moec_status read_all(moec_tokenizer *t, moec_json *file, moec_err *err)
{
    moec_status st = MOEC_OK;
    if (moec_json_type(file) != MOEC_JSON_OBJECT)
        return moec_fail(err, MOEC_EFORMAT, "an object was expected");
    MOEC_TRY(moec__read_normalizer(&t->normalize, moec_json_get(file, "normalizer"), err));
    MOEC_TRY(moec__read_pre_tokenizer(&t->split, moec_json_get(file, "pre_tokenizer"), err));
    MOEC_TRY(moec__read_decoder(&t->decode, moec_json_get(file, "decoder"), err));
    t->has_decoder = moec_json_type(moec_json_get(file, "decoder")) == MOEC_JSON_OBJECT;
    MOEC_TRY(moec__read_model(&t->bpe, moec_json_get(file, "model"), err));
    MOEC_TRY(moec__read_added(t, moec_json_get(file, "added_tokens"), err));
    MOEC_TRY(moec__read_post_processor(t, moec_json_get(file, "post_processor"), err));
    count_ids(t);
done:
    return st;
}

static moec_status build(moec_tokenizer **out, moec_json *file, const char *what, moec_err *err)
{
    *out = NULL;
    moec_tokenizer *t;
    moec_status st = MOEC_NEW(t, 1, err);
    if (st == MOEC_OK) {
        t->added_highest = -1;
        st = moec_within(err, read_all(t, file, err), "%s", what);
    }
    if (st == MOEC_OK)
        *out = t;
    else
        moec_tokenizer_free(t);
    return st;
}

moec_status moec_tokenizer_parse(moec_tokenizer **out, const char *json, size_t len, const char *what, moec_err *err)
{
    moec_json *file;
    *out = NULL;
    moec_status st = moec_json_parse(&file, json, len, what, err);
    if (st != MOEC_OK)
        return st;
    st = build(out, file, what, err);
    moec_json_free(file);
    return st;
}

moec_status moec_tokenizer_load(moec_tokenizer **out, const char *path, moec_err *err)
{
    moec_json *file;
    *out = NULL;
    moec_status st = moec_json_read(&file, path, MAX_FILE, err);
    if (st != MOEC_OK)
        return st;
    st = build(out, file, path, err);
    moec_json_free(file);
    return st;
}

void moec_tokenizer_free(moec_tokenizer *t)
{
    if (!t)
        return;
    moec_ids_release(&t->behind);
    moec_ids_release(&t->before);
    moec__added_set_release(&t->normal);
    moec__added_set_release(&t->raw);
    for (size_t i = 0; i < t->n_added; i++) {
        moec_free(t->added[i].find);
        moec_free(t->added[i].content);
    }
    moec_free(t->added);
    moec_free(t->added_id.slot);
    moec__words_release(&t->added_at);
    moec__bpe_release(&t->bpe);
    moec__stages_release(&t->decode);
    moec__stages_release(&t->split);
    moec__stages_release(&t->normalize);
    moec_free(t);
}

int32_t moec_tokenizer_vocab_size(const moec_tokenizer *t)
{
    return t->vocab_size;
}

int32_t moec_tokenizer_find(const moec_tokenizer *t, const char *token)
{
    int32_t at = moec__words_find(&t->added_at, token, strlen(token));
    return at >= 0 ? t->added[at].id : moec__words_find(&t->bpe.vocab, token, strlen(token));
}

const char *moec_tokenizer_token(const moec_tokenizer *t, int32_t id)
{
    const uint64_t *at = id < 0 ? NULL : moec__pairs_get(&t->added_id, (uint32_t)id);
    if (at)
        return t->added[*at].content;
    at = id < 0 ? NULL : moec__pairs_get(&t->bpe.by_id, (uint32_t)id);
    return at ? t->bpe.vocab.bytes + t->bpe.vocab.word[*at].at : NULL;
}

int32_t moec_tokenizer_bos(const moec_tokenizer *t)
{
    return t->before.n > 0 ? t->before.id[0] : -1;
}

int32_t moec_tokenizer_eos(const moec_tokenizer *t)
{
    return t->behind.n > 0 ? t->behind.id[0] : -1;
}
