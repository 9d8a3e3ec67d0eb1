/* See gguf_tokenizer.h; which pre-tokenizer it is says gguf_pre.c. */
#include "run/gguf_tokenizer.h"

#include "base/file.h"
#include "base/log.h"
#include "base/mem.h"
#include "run/gguf_words.h"
#include "text/tokenizer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const size_t max_file = (size_t)256 << 20;

/* llama.h's llama_token_type */
enum { NORMAL = 1, UNKNOWN = 2, CONTROL = 3, USER = 4, UNUSED = 5, BYTE = 6 };

typedef struct job {
    moec_gguf_out *g;
    const moec_model *m;
    moec_tokenizer *t;
    moec_json *file, *config, *generation; /* config, generation: NULL where there is none */
    bool pieces;                           /* as SentencePiece has it, "llama" */
    int32_t unknown;
    size_t rows;
} job;

/* A file of the folder, or NULL where it is not there. `reals`: with huge numbers in it, of which none is looked at. */
static moec_status read_if(moec_json **out, const char *dir, const char *name, bool reals, moec_err *err)
{
    char *path = NULL;
    moec_status st = MOEC_OK;
    MOEC_TRY(moec_path_join(&path, dir, name, err));
    if (moec_path_exists(path))
        MOEC_TRY(reals ? moec_json_read_reals(out, path, max_file, err) : moec_json_read(out, path, max_file, err));
done:
    moec_free(path);
    return st;
}

/* --- tokens ---------------------------------------------------------------------------------------------------------- */

static bool is_byte(const char *token)
{
    return strlen(token) == 6 && strncmp(token, "<0x", 3) == 0 && token[5] == '>';
}

static void put_kinds(job *j, int32_t *kind, const char **token)
{
    const moec_json *added = moec_json_get(j->file, "added_tokens");
    for (size_t i = 0; i < j->rows; i++)
        kind[i] = !moec_tokenizer_token(j->t, (int32_t)i) ? UNUSED
                  : (int32_t)i == j->unknown && j->pieces ? UNKNOWN
                  : j->pieces && is_byte(token[i])        ? BYTE
                                                          : NORMAL;
    for (size_t i = 0; i < moec_json_len(added); i++) {
        const moec_json *one = moec_json_at(added, i);
        const char *text = moec_json_string(moec_json_get(one, "content"));
        bool special = false;
        moec_json_bool(moec_json_get(one, "special"), &special);
        const int32_t id = text ? moec_tokenizer_find(j->t, text) : -1;
        if (id >= 0 && kind[id] != UNKNOWN)
            kind[id] = special ? CONTROL : USER;
    }
    moec_gguf_put_i32s(j->g, "tokenizer.ggml.token_type", kind, j->rows);
}

static moec_status put_tokens(job *j, moec_err *err)
{
    moec_status st = MOEC_OK;
    enum { PAD_BYTES = 32 };
    char *pads = NULL;
    const char **token = NULL;
    int32_t *kind = NULL;
    MOEC_TRY(MOEC_NEW(token, j->rows, err));
    MOEC_TRY(MOEC_NEW(kind, j->rows, err));
    MOEC_TRY(moec_alloc((void **)&pads, j->rows, PAD_BYTES, err));
    for (size_t i = 0; i < j->rows; i++) {
        token[i] = moec_tokenizer_token(j->t, (int32_t)i);
        if (!token[i]) {
            snprintf(pads + i * PAD_BYTES, PAD_BYTES, "[PAD%zu]", i);
            token[i] = pads + i * PAD_BYTES;
        }
    }
    moec_gguf_put_texts(j->g, "tokenizer.ggml.tokens", token, j->rows);
    put_kinds(j, kind, token);
done:
    moec_free(token);
    moec_free(kind);
    moec_free(pads);
    return st;
}

/* --- merges ---------------------------------------------------------------------------------------------------------- */

/* "left right" of an entry in either form; free with moec_free. */
static moec_status merge_text(char **out, const moec_json *merge, moec_err *err)
{
    const char *both = moec_json_string(merge);
    return both ? moec_copy(out, both, strlen(both), err)
                : moec_format(out, err, "%s %s", moec_json_string(moec_json_at(merge, 0)),
                              moec_json_string(moec_json_at(merge, 1)));
}

static moec_status put_merges(job *j, const moec_json *merges, moec_err *err)
{
    moec_status st = MOEC_OK;
    const size_t n = moec_json_len(merges);
    size_t used = 0;
    char **text = NULL;
    MOEC_TRY(MOEC_NEW(text, n, err));
    for (size_t i = 0; i < n; i++) {
        const char *both = moec_json_string(moec_json_at(merges, i));
        if (both && strncmp(both, "#version", 8) == 0) /* first line of the old merges.txt */
            continue;
        MOEC_TRY(merge_text(&text[used], moec_json_at(merges, i), err));
        used++;
    }
    moec_gguf_put_texts(j->g, "tokenizer.ggml.merges", (const char *const *)text, used);
done:
    for (size_t i = 0; text && i < used; i++)
        moec_free(text[i]);
    moec_free(text);
    return st;
}

/* A token has the rank of the first merge that makes it. */
static moec_status put_scores(job *j, const moec_json *merges, moec_err *err)
{
    moec_status st = MOEC_OK;
    float *score = NULL;
    char *text = NULL;
    MOEC_TRY(MOEC_NEW(score, j->rows, err));
    for (size_t i = moec_json_len(merges); i-- > 0;) {
        MOEC_TRY(merge_text(&text, moec_json_at(merges, i), err));
        char *space = strchr(text, ' ');
        if (space) {
            memmove(space, space + 1, strlen(space)); /* with its NUL */
            const int32_t id = moec_tokenizer_find(j->t, text);
            if (id >= 0)
                score[id] = -(float)(i + 1);
        }
        moec_free(text);
        text = NULL;
    }
    moec_gguf_put_f32s(j->g, "tokenizer.ggml.scores", score, j->rows);
done:
    moec_free(text);
    moec_free(score);
    return st;
}

/* --- special ids ------------------------------------------------------------------------------------------------------- */

/* Of "bos" and the like: the token that tokenizer_config.json names, else the id of config.json or generation_config.json. */
static int32_t special_id(const job *j, const char *what)
{
    char key[32], id_key[32];
    int64_t id;
    snprintf(key, sizeof key, "%s_token", what);
    snprintf(id_key, sizeof id_key, "%s_token_id", what);
    const moec_json *v = moec_json_get(j->config, key);
    const char *text = moec_json_string(v) ? moec_json_string(v) : moec_json_string(moec_json_get(v, "content"));
    if (text && moec_tokenizer_find(j->t, text) >= 0)
        return moec_tokenizer_find(j->t, text);
    const moec_json *from[] = {moec_json_get(j->m->config, id_key), moec_json_get(j->generation, id_key)};
    for (size_t i = 0; i < MOEC_COUNT(from); i++) {
        v = moec_json_type(from[i]) == MOEC_JSON_ARRAY ? moec_json_at(from[i], 0) : from[i];
        if (moec_json_int(v, &id) && id >= 0 && (uint64_t)id < j->rows)
            return (int32_t)id;
    }
    return -1;
}

static void put_special(job *j)
{
    static const struct {
        const char *what, *key;
    } rows[] = {{"bos", "tokenizer.ggml.bos_token_id"}, {"eos", "tokenizer.ggml.eos_token_id"},
                {"unk", "tokenizer.ggml.unknown_token_id"}, {"pad", "tokenizer.ggml.padding_token_id"}};
    for (size_t i = 0; i < MOEC_COUNT(rows); i++) {
        int32_t id = special_id(j, rows[i].what);
        if (i == 2 && id < 0)
            id = j->unknown;
        if (id >= 0)
            moec_gguf_put_u32(j->g, rows[i].key, (uint32_t)id);
    }
    moec_gguf_put_bool(j->g, "tokenizer.ggml.add_bos_token", moec_tokenizer_bos(j->t) >= 0);
    moec_gguf_put_bool(j->g, "tokenizer.ggml.add_eos_token", moec_tokenizer_eos(j->t) >= 0);
}

static moec_status put_template(job *j, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *path = NULL, *bytes = NULL;
    size_t len;
    const moec_json *v = moec_json_get(j->config, "chat_template");
    const char *text = moec_json_string(v);
    for (size_t i = 0; !text && moec_json_type(v) == MOEC_JSON_ARRAY && i < moec_json_len(v); i++) {
        const char *name = moec_json_string(moec_json_get(moec_json_at(v, i), "name"));
        if (name && strcmp(name, "default") == 0)
            text = moec_json_string(moec_json_get(moec_json_at(v, i), "template"));
    }
    if (!text) {
        MOEC_TRY(moec_path_join(&path, moec_ckpt_dir(j->m->ckpt), "chat_template.jinja", err));
        if (moec_path_exists(path))
            MOEC_TRY(moec_file_read(&bytes, &len, path, (size_t)8 << 20, err));
        text = bytes;
    }
    if (text)
        moec_gguf_put_text(j->g, "tokenizer.chat_template", text);
done:
    moec_free(path);
    moec_free(bytes);
    return st;
}

/* --- the whole ------------------------------------------------------------------------------------------------------- */

/* Does a text get a blank put in front? By a Prepend of the normalizer, or Metaspace of the pre-tokenizer. */
static bool puts_blank(const moec_json *node, int depth)
{
    const char *type = moec_json_string(moec_json_get(node, "type"));
    const char *scheme = moec_json_string(moec_json_get(node, "prepend_scheme"));
    bool prefix = true;
    if (!type || depth > 4)
        return false;
    if (strcmp(type, "Prepend") == 0)
        return true;
    if (strcmp(type, "Metaspace") == 0) {
        moec_json_bool(moec_json_get(node, "add_prefix_space"), &prefix);
        return scheme ? strcmp(scheme, "never") != 0 : prefix;
    }
    const char *const lists[] = {"normalizers", "pretokenizers"};
    for (size_t k = 0; k < MOEC_COUNT(lists); k++)
        for (size_t i = 0; i < moec_json_len(moec_json_get(node, lists[k])); i++)
            if (puts_blank(moec_json_at(moec_json_get(node, lists[k]), i), depth + 1))
                return true;
    return false;
}

static void put_pre(job *j)
{
    const char *pre = moec_gguf_pre(moec_json_get(j->file, "pre_tokenizer"));
    bool whole = false;
    moec_json_bool(moec_json_path(j->file, "model.ignore_merges"), &whole);
    if (!pre)
        moec_warn("tokenizer.json: its pre-tokenizer is none that llama.cpp is known to have; \"default\" is written, and "
                  "some texts will be cut into other tokens");
    else if (strcmp(pre, "llama-bpe") == 0 && !whole) /* that name also means ignore_merges and a BOS */
        pre = "dbrx";
    moec_gguf_put_text(j->g, "tokenizer.ggml.pre", pre ? pre : "default");
}

static moec_status put_all(job *j, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_json *merges = moec_json_path(j->file, "model.merges");
    const char *unk = moec_json_string(moec_json_path(j->file, "model.unk_token"));
    if (moec_tokenizer_vocab_size(j->t) > j->m->dims.vocab)
        return moec_fail(err, MOEC_EFORMAT, "tokenizer.json has ids up to %d, the embedding %lld rows",
                         moec_tokenizer_vocab_size(j->t) - 1, (long long)j->m->dims.vocab);
    j->rows = (size_t)j->m->dims.vocab;
    j->unknown = unk ? moec_tokenizer_find(j->t, unk) : -1;
    moec_json_bool(moec_json_path(j->file, "model.byte_fallback"), &j->pieces);
    moec_gguf_put_text(j->g, "tokenizer.ggml.model", j->pieces ? "llama" : "gpt2");
    if (j->pieces)
        moec_gguf_put_text(j->g, "tokenizer.ggml.pre", "default");
    else
        put_pre(j);
    MOEC_TRY(put_tokens(j, err));
    MOEC_TRY(j->pieces ? put_scores(j, merges, err) : put_merges(j, merges, err));
    put_special(j);
    if (j->pieces)
        moec_gguf_put_bool(j->g, "tokenizer.ggml.add_space_prefix",
                           puts_blank(moec_json_get(j->file, "normalizer"), 0) ||
                               puts_blank(moec_json_get(j->file, "pre_tokenizer"), 0));
    MOEC_TRY(put_template(j, err));
done:
    return st;
}

/* Of a model that is a GGUF itself. */
static moec_status from_gguf(job *j, const moec_model *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_gguf_words w = {0};
    const char *path = moec_ckpt_dir(m->ckpt);
    MOEC_TRY(moec_gguf_words_of(&w, m, err));
    if (!w.tokenizer)
        goto done;
    MOEC_TRY(moec_tokenizer_parse(&j->t, w.tokenizer, strlen(w.tokenizer), path, err));
    MOEC_TRY(moec_json_parse(&j->file, w.tokenizer, strlen(w.tokenizer), path, err));
    MOEC_TRY(moec_json_parse(&j->config, w.config, strlen(w.config), path, err));
    MOEC_TRY(moec_json_parse(&j->generation, w.generation, strlen(w.generation), path, err));
done:
    moec_gguf_words_release(&w);
    return st;
}

moec_status moec_gguf_tokenizer(moec_gguf_out *g, const moec_model *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    job j = {.g = g, .m = m};
    char *path = NULL;
    const char *dir = moec_ckpt_dir(m->ckpt);
    MOEC_TRY(moec_path_join(&path, dir, "tokenizer.json", err));
    if (moec_ckpt_gguf(m->ckpt)) {
        MOEC_TRY(from_gguf(&j, m, err));
        MOEC_TRY(moec_within(err, j.t ? put_all(&j, err) : MOEC_OK, "%s", dir));
        if (!j.t)
            moec_gguf_put_text(g, "tokenizer.ggml.model", "no_vocab");
        goto done;
    }
    if (!moec_path_exists(path)) {
        moec_warn("%s: is not there; the GGUF gets no tokenizer", path);
        moec_gguf_put_text(g, "tokenizer.ggml.model", "no_vocab");
        goto done;
    }
    MOEC_TRY(moec_tokenizer_load(&j.t, path, err));
    MOEC_TRY(moec_json_read(&j.file, path, max_file, err));
    MOEC_TRY(read_if(&j.config, dir, "tokenizer_config.json", true, err));
    MOEC_TRY(read_if(&j.generation, dir, "generation_config.json", false, err));
    MOEC_TRY(moec_within(err, put_all(&j, err), "%s", dir));
done:
    moec_tokenizer_free(j.t);
    moec_json_free(j.file);
    moec_json_free(j.config);
    moec_json_free(j.generation);
    moec_free(path);
    return st;
}
