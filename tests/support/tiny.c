/* See tiny.h. */
#include "tiny.h"

#include "base/file.h"
#include "base/mem.h"
#include "ckpt/safetensors.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { NAME = 256 };

typedef struct maker {
    tiny_spec s;
    const moec_family *f;
    const char *dir;
    moec_st_entry *entry;
    size_t n, cap;
    uint64_t state;
} maker;

static uint64_t next(uint64_t *state)
{
    uint64_t x = *state += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

/* --- the list of tensors --------------------------------------------------------------------------------------------- */

static moec_status add(maker *m, const char *pattern, int64_t layer, int64_t expert, int64_t d0, int64_t d1, moec_err *err)
{
    moec_status st = MOEC_OK;
    char name[NAME];
    size_t n = 0;
    int64_t number = layer;
    if (!pattern)
        return MOEC_OK;
    for (const char *p = pattern; *p && n + 24 < sizeof name; p++) {
        if (p[0] == '%' && p[1] == 'd') {
            n += (size_t)snprintf(name + n, sizeof name - n, "%lld", (long long)number);
            number = expert;
            p++;
        } else {
            name[n++] = *p;
        }
    }
    name[n] = '\0';
    MOEC_TRY(MOEC_GROW(m->entry, m->cap, m->n + 1, err));
    moec_st_entry *e = &m->entry[m->n];
    *e = (moec_st_entry){.dtype = m->s.dtype, .rank = d1 ? 2 : 1, .dim = {d0, d1}};
    if (m->s.router_f32 && pattern == m->f->router)
        e->dtype = MOEC_F32;
    e->end = (uint64_t)(d0 * (d1 ? d1 : 1)) * (uint64_t)moec_dtypes[e->dtype].bytes;
    MOEC_TRY(moec_copy(&e->name, name, n, err));
    m->n++;
done:
    return st;
}

static moec_status add_layer(maker *m, int64_t l, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_family *f = m->f;
    const tiny_spec *s = &m->s;
    const int64_t q = s->heads * s->head_dim, kv = s->kv_heads * s->head_dim;
    MOEC_TRY(add(m, f->norm_attn, l, 0, s->hidden, 0, err));
    if (s->dense_layer == l + 1) {
        MOEC_TRY(add(m, f->dense_gate, l, 0, 2 * s->width, s->hidden, err));
        MOEC_TRY(add(m, f->dense_up, l, 0, 2 * s->width, s->hidden, err));
        MOEC_TRY(add(m, f->dense_down, l, 0, s->hidden, 2 * s->width, err));
    } else {
        for (int64_t e = 0; e < s->experts; e++) {
            MOEC_TRY(add(m, f->expert_down, l, e, s->hidden, s->width, err));
            MOEC_TRY(add(m, f->expert_gate, l, e, s->width, s->hidden, err));
            MOEC_TRY(add(m, f->expert_up, l, e, s->width, s->hidden, err));
        }
        MOEC_TRY(add(m, f->router, l, 0, s->experts, s->hidden, err));
    }
    MOEC_TRY(add(m, f->norm_mlp, l, 0, s->hidden, 0, err));
    MOEC_TRY(add(m, f->q, l, 0, q, s->hidden, err));
    MOEC_TRY(add(m, f->k, l, 0, kv, s->hidden, err));
    MOEC_TRY(add(m, f->v, l, 0, kv, s->hidden, err));
    MOEC_TRY(add(m, f->o, l, 0, s->hidden, q, err));
    MOEC_TRY(add(m, f->q_norm, l, 0, s->head_dim, 0, err));
    MOEC_TRY(add(m, f->k_norm, l, 0, s->head_dim, 0, err));
done:
    return st;
}

static moec_status list(maker *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    MOEC_TRY(add(m, m->f->embed, 0, 0, m->s.vocab, m->s.hidden, err));
    for (int64_t l = 0; l < m->s.layers; l++)
        MOEC_TRY(add_layer(m, l, err));
    MOEC_TRY(add(m, m->f->final_norm, 0, 0, m->s.hidden, 0, err));
    if (m->s.untied)
        MOEC_TRY(add(m, m->f->head, 0, 0, m->s.vocab, m->s.hidden, err));
done:
    return st;
}

/* --- values ---------------------------------------------------------------------------------------------------------- */

/* k/64, |k| <= 32, or near 1 for vectors (norms): exact in F32, F16 and BF16. */
static void put(unsigned char *to, moec_dtype dtype, float v)
{
    uint32_t bits;
    uint16_t half;
    memcpy(&bits, &v, sizeof bits);
    if (dtype == MOEC_F32) {
        memcpy(to, &bits, sizeof bits);
        return;
    }
    half = (uint16_t)(bits >> 16);
    if (dtype == MOEC_F16)
        half = v == 0.0f ? 0 : (uint16_t)((bits >> 16 & 0x8000) | (((bits >> 23 & 0xff) - 112) << 10) | (bits >> 13 & 0x3ff));
    memcpy(to, &half, sizeof half);
}

static void fill(unsigned char *to, const moec_st_entry *e, uint64_t *state)
{
    size_t width = (size_t)moec_dtypes[e->dtype].bytes;
    for (size_t i = 0; i < (e->end - e->begin) / width; i++) {
        int k = (int)(next(state) % 65) - 32;
        put(to + i * width, e->dtype, e->rank == 1 ? 1.0f + (float)k / 128.0f : (float)k / 64.0f);
    }
}

/* --- files ----------------------------------------------------------------------------------------------------------- */

static moec_status write_text(const maker *m, const char *name, const char *text, moec_err *err)
{
    char *path;
    moec_status st = moec_path_join(&path, m->dir, name, err);
    if (st == MOEC_OK)
        st = moec_file_write(path, text, strlen(text), err);
    moec_free(path);
    return st;
}

static moec_status write_shard(maker *m, const char *name, size_t lo, size_t hi, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *head = NULL, *bytes = NULL, *path = NULL;
    size_t len, at = 0;
    for (size_t i = lo; i < hi; i++) {
        uint64_t n = m->entry[i].end - m->entry[i].begin;
        m->entry[i].begin = at;
        m->entry[i].end = at += n;
    }
    MOEC_TRY(moec_st_header(&head, &len, m->entry + lo, hi - lo, NULL, err));
    MOEC_TRY(MOEC_NEW(bytes, len + at, err));
    memcpy(bytes, head, len);
    for (size_t i = lo; i < hi; i++)
        fill((unsigned char *)bytes + len + m->entry[i].begin, &m->entry[i], &m->state);
    MOEC_TRY(moec_path_join(&path, m->dir, name, err));
    MOEC_TRY(moec_file_write(path, bytes, len + at, err));
done:
    moec_free(path);
    moec_free(bytes);
    moec_free(head);
    return st;
}

static moec_status write_tensors(maker *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    char name[64], *text = NULL;
    moec_json *index = moec_json_new_object(), *map = moec_json_new_object(), *meta = moec_json_new_object();
    int64_t total = 0, values = 0;
    if (m->s.shards == 0) {
        MOEC_TRY(write_shard(m, "model.safetensors", 0, m->n, err));
        goto done;
    }
    for (int64_t s = 0; s < m->s.shards; s++) {
        size_t lo = m->n * (size_t)s / (size_t)m->s.shards, hi = m->n * (size_t)(s + 1) / (size_t)m->s.shards;
        snprintf(name, sizeof name, "model-%05lld-of-%05lld.safetensors", (long long)s + 1, (long long)m->s.shards);
        MOEC_TRY(write_shard(m, name, lo, hi, err));
        for (size_t i = lo; i < hi; i++) {
            moec_json_set(map, m->entry[i].name, moec_json_new_string(name));
            total += (int64_t)(m->entry[i].end - m->entry[i].begin);
            values += (int64_t)(m->entry[i].end - m->entry[i].begin) / moec_dtypes[m->entry[i].dtype].bytes;
        }
    }
    moec_json_set(meta, "total_size", moec_json_new_int(total));
    moec_json_set(meta, "total_parameters", moec_json_new_int(values));
    moec_json_set(index, "metadata", moec_json_clone(meta));
    moec_json_set(index, "weight_map", moec_json_clone(map));
    MOEC_TRY(moec_json_dump(&text, index, 2, err));
    MOEC_TRY(write_text(m, "model.safetensors.index.json", text, err));
done:
    moec_free(text);
    moec_json_free(meta);
    moec_json_free(map);
    moec_json_free(index);
    return st;
}

static void set_keys(moec_json *o, const maker *m, const char *const *keys, int64_t value)
{
    for (int i = 0; i < MOEC_KEY_ALIASES && keys[i] && (i == 0 || m->s.both_keys); i++)
        moec_json_set(o, keys[i], moec_json_new_int(value));
}

static moec_status write_config(const maker *m, moec_err *err)
{
    const tiny_spec *s = &m->s;
    char *text = NULL;
    moec_json *o = moec_json_new_object(), *names = moec_json_new_array(), *dense = moec_json_new_array();
    const struct { const char *key; int64_t value; } numbers[] = {
        {"num_hidden_layers", s->layers}, {"hidden_size", s->hidden}, {"vocab_size", s->vocab},
        {"num_attention_heads", s->heads}, {"num_key_value_heads", s->kv_heads}, {"head_dim", s->head_dim},
        {"max_position_embeddings", 512}};
    moec_json_push(names, moec_json_new_string(m->f->architecture));
    moec_json_set(o, "architectures", names);
    moec_json_set(o, "model_type", moec_json_new_string(m->f->model_type));
    for (size_t i = 0; i < MOEC_COUNT(numbers); i++)
        moec_json_set(o, numbers[i].key, moec_json_new_int(numbers[i].value));
    if (!s->no_keys) {
        set_keys(o, m, m->f->key_experts, s->experts);
        set_keys(o, m, m->f->key_top_k, s->top_k);
    }
    set_keys(o, m, m->f->key_expert_width, s->width);
    if (m->f->key_dense_width)
        moec_json_set(o, m->f->key_dense_width, moec_json_new_int(2 * s->width));
    if (s->dense_layer > 0)
        moec_json_push(dense, moec_json_new_int(s->dense_layer - 1));
    if (m->f->dense == MOEC_DENSE_MLP_ONLY) {
        moec_json_set(o, "mlp_only_layers", moec_json_clone(dense));
        moec_json_set(o, "decoder_sparse_step", moec_json_new_int(1));
    }
    moec_json_set(o, "hidden_act", moec_json_new_string("silu"));
    moec_json_set(o, "norm_topk_prob", moec_json_new_bool(true));
    moec_json_set(o, "rms_norm_eps", moec_json_new_real(1e-6));
    moec_json_set(o, "rope_theta", moec_json_new_real(10000.0));
    moec_json_set(o, "tie_word_embeddings", moec_json_new_bool(!s->untied));
    moec_json_set(o, "torch_dtype", moec_json_new_string(s->dtype == MOEC_F32 ? "float32"
                                                         : s->dtype == MOEC_F16 ? "float16" : "bfloat16"));
    moec_status st = moec_json_dump(&text, o, 2, err);
    if (st == MOEC_OK)
        st = write_text(m, "config.json", text, err);
    moec_free(text);
    moec_json_free(dense);
    moec_json_free(o);
    return st;
}

static void set_defaults(tiny_spec *s)
{
    const struct { int64_t *at, value; } defaults[] = {
        {&s->layers, 3}, {&s->experts, 8}, {&s->top_k, 2}, {&s->hidden, 16}, {&s->heads, 4}, {&s->kv_heads, 2},
        {&s->head_dim, 8}, {&s->width, 12}, {&s->vocab, 64}};
    for (size_t i = 0; i < MOEC_COUNT(defaults); i++)
        if (*defaults[i].at == 0)
            *defaults[i].at = defaults[i].value;
    if (!s->family)
        s->family = "qwen3_moe";
    if (s->dtype == MOEC_F64)
        s->dtype = MOEC_F32;
}

moec_status tiny_write(const char *dir, const tiny_spec *spec, moec_err *err)
{
    moec_status st = MOEC_OK;
    maker m = {.s = *spec, .dir = dir, .state = spec->seed};
    set_defaults(&m.s);
    m.f = moec_family_find(m.s.family);
    if (!m.f)
        return moec_fail(err, MOEC_EINVAL, "no family %s", m.s.family);
    if (!m.f->head)
        m.s.untied = false;
    MOEC_TRY(moec_dir_make(dir, err));
    MOEC_TRY(list(&m, err));
    MOEC_TRY(write_tensors(&m, err));
    MOEC_TRY(write_config(&m, err));
    MOEC_TRY(write_text(&m, "generation_config.json", "{\n  \"eos_token_id\": 0\n}\n", err));
    MOEC_TRY(write_text(&m, "README.md", "A small random model.\n", err));
done:
    for (size_t i = 0; i < m.n; i++)
        moec_free(m.entry[i].name);
    moec_free(m.entry);
    return st;
}

/* --- folders --------------------------------------------------------------------------------------------------------- */

char *tiny_folder(void)
{
    char *path;
    const char *base = getenv("TMPDIR");
    if (moec_format(&path, NULL, "%s/moec-tiny-XXXXXX", base ? base : "/tmp") != MOEC_OK || !mkdtemp(path)) {
        perror("tiny_folder");
        exit(1);
    }
    return path;
}

void tiny_remove(const char *dir)
{
    moec_err err = {MOEC_OK, ""};
    if (moec_dir_remove(dir, &err) != MOEC_OK)
        fprintf(stderr, "%s\n", err.text);
}

char *tiny_path(const char *dir, const char *name)
{
    char *path;
    if (moec_path_join(&path, dir, name, NULL) != MOEC_OK)
        exit(1);
    return path;
}
