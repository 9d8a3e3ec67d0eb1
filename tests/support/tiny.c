/* See tiny.h: tensors and files. */
#include "tiny.h"

#include "base/file.h"
#include "base/mem.h"
#include "tiny_parts.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { NAME = 256 };

/* What a tensor's values are: k/64 for |k| <= 32; the same around 1, or around 0, in steps of 1/128. */
typedef enum fill_kind { FILL_MATRIX, FILL_SCALE, FILL_SMALL } fill_kind;

typedef struct maker {
    tiny_spec s;
    const moec_family *f;
    const tiny_extra *extra;
    const char *dir;
    moec_st_entry *entry;
    fill_kind *kind; /* of each entry */
    size_t n, cap, kind_cap;
    int64_t layer;
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

typedef struct shape { int64_t d[3]; } shape; /* up to the first 0 */
#define DIM(...) ((shape){{__VA_ARGS__}})

/* Tensor of the first alternative of a pattern, in the current layer; no pattern: nothing. `tail` replaces ".weight". */
static moec_status add_as(maker *m, const char *pattern, const char *tail, int64_t expert, shape dim, fill_kind kind,
                          moec_err *err)
{
    moec_status st = MOEC_OK;
    char name[NAME];
    size_t n = 0, len = pattern ? strcspn(pattern, "|") : 0;
    int64_t number = m->layer;
    if (!pattern)
        return MOEC_OK;
    if (tail)
        len -= strlen(".weight");
    for (const char *p = pattern; p < pattern + len && n + 32 < sizeof name; p++) {
        if (p[0] == '%' && p[1] == 'd') {
            n += (size_t)snprintf(name + n, sizeof name - n, "%lld", (long long)number);
            number = expert;
            p++;
        } else {
            name[n++] = *p;
        }
    }
    n += (size_t)snprintf(name + n, sizeof name - n, "%s", tail ? tail : "");
    MOEC_TRY(MOEC_GROW(m->entry, m->cap, m->n + 1, err));
    MOEC_TRY(MOEC_GROW(m->kind, m->kind_cap, m->n + 1, err));
    moec_st_entry *e = &m->entry[m->n];
    *e = (moec_st_entry){.dtype = m->s.dtype};
    e->end = 1;
    for (int i = 0; i < 3 && dim.d[i] > 0; i++) {
        e->dim[e->rank++] = dim.d[i];
        e->end *= (uint64_t)dim.d[i];
    }
    if (m->s.router_f32 && pattern == m->f->mat[MOEC_MAT_ROUTER])
        e->dtype = MOEC_F32;
    e->end *= (uint64_t)moec_dtypes[e->dtype].bytes;
    m->kind[m->n] = kind;
    MOEC_TRY(moec_copy(&e->name, name, n, err));
    m->n++;
done:
    return st;
}

static moec_status add(maker *m, const char *pattern, shape dim, moec_err *err)
{
    return add_as(m, pattern, NULL, 0, dim, FILL_MATRIX, err);
}

static moec_status add_mat(maker *m, moec_mat which, int64_t rows, int64_t cols, bool bias, moec_err *err)
{
    const char *pattern = m->f->mat[which];
    moec_status st = add(m, pattern, DIM(rows, cols), err);
    if (st == MOEC_OK && bias)
        st = add_as(m, pattern, ".bias", 0, DIM(rows), FILL_SMALL, err);
    return st;
}

static moec_status add_vec(maker *m, moec_vec which, int64_t n, fill_kind kind, moec_err *err)
{
    return add_as(m, m->f->vec[which], NULL, 0, DIM(n), kind, err);
}

static moec_status add_norm(maker *m, moec_vec which, int64_t n, moec_err *err)
{
    return add_vec(m, which, n, m->f->norm == MOEC_NORM_RMS_PLUS1 ? FILL_SMALL : FILL_SCALE, err);
}

/* --- mixers */

static moec_status add_attention(maker *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    const tiny_spec *s = &m->s;
    const moec_family *f = m->f;
    const tiny_extra *x = m->extra;
    const int64_t q = s->heads * s->head_dim, kv = s->kv_heads * s->head_dim;
    if (f->qkv) {
        MOEC_TRY(add(m, f->qkv, DIM(q + 2 * kv, s->hidden), err));
    } else {
        MOEC_TRY(add_mat(m, MOEC_MAT_Q, f->gate_in_q ? 2 * q : q, s->hidden, x->qkv_bias, err));
        MOEC_TRY(add_mat(m, MOEC_MAT_K, kv, s->hidden, x->qkv_bias, err));
        MOEC_TRY(add_mat(m, MOEC_MAT_V, kv, s->hidden, x->qkv_bias, err));
    }
    MOEC_TRY(add_mat(m, MOEC_MAT_O, s->hidden, q, x->o_bias, err));
    MOEC_TRY(add_mat(m, MOEC_MAT_ATTN_GATE, q, s->hidden, false, err));
    MOEC_TRY(add_norm(m, MOEC_VEC_Q_NORM, x->whole_norms ? q : s->head_dim, err));
    MOEC_TRY(add_norm(m, MOEC_VEC_K_NORM, x->whole_norms ? kv : s->head_dim, err));
    MOEC_TRY(add_vec(m, MOEC_VEC_SINKS, s->heads, FILL_SMALL, err));
done:
    return st;
}

static moec_status add_latent(maker *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    const tiny_spec *s = &m->s;
    const int64_t nope = tiny_latent(s, TINY_LATENT_NOPE), rope = tiny_latent(s, TINY_LATENT_ROPE),
                  value = tiny_latent(s, TINY_LATENT_VALUE), q = tiny_latent(s, TINY_Q_RANK), kv = tiny_latent(s, TINY_KV_RANK);
    MOEC_TRY(add_mat(m, MOEC_MAT_Q_A, q, s->hidden, false, err));
    MOEC_TRY(add_vec(m, MOEC_VEC_Q_A_NORM, q, FILL_SCALE, err));
    MOEC_TRY(add_mat(m, MOEC_MAT_Q_B, s->heads * (nope + rope), q, false, err));
    MOEC_TRY(add_mat(m, MOEC_MAT_KV_A, kv + rope, s->hidden, false, err));
    MOEC_TRY(add_vec(m, MOEC_VEC_KV_A_NORM, kv, FILL_SCALE, err));
    MOEC_TRY(add_mat(m, MOEC_MAT_KV_B, s->heads * (nope + value), kv, false, err));
    MOEC_TRY(add_mat(m, MOEC_MAT_O, s->hidden, s->heads * value, false, err));
done:
    return st;
}

static moec_status add_heads(maker *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    const tiny_spec *s = &m->s;
    const int64_t kv = s->kv_heads * s->head_dim;
    MOEC_TRY(add(m, m->f->qkv, DIM(2 * kv, s->hidden), err));
    MOEC_TRY(add_mat(m, MOEC_MAT_HEADS_ROUTER, s->experts, s->hidden, false, err));
    MOEC_TRY(add(m, m->f->heads_in, DIM(s->experts, kv, s->hidden), err));
    MOEC_TRY(add(m, m->f->heads_out, DIM(s->experts, s->hidden, kv), err));
    MOEC_TRY(add_vec(m, MOEC_VEC_HEADS_BIAS, s->hidden, FILL_SMALL, err));
done:
    return st;
}

static moec_status add_conv(maker *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t h = m->s.hidden;
    MOEC_TRY(add_mat(m, MOEC_MAT_CONV_IN, 3 * h, h, false, err));
    MOEC_TRY(add(m, m->f->vec[MOEC_VEC_CONV], DIM(h, 1, TINY_TAPS), err));
    MOEC_TRY(add_mat(m, MOEC_MAT_CONV_OUT, h, h, false, err));
done:
    return st;
}

static moec_status add_delta(maker *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t h = m->s.hidden, k = TINY_DELTA_KEY_HEADS * TINY_DELTA_KEY_DIM, heads = TINY_DELTA_VALUE_HEADS,
                  v = heads * TINY_DELTA_VALUE_DIM;
    if (m->f->mat[MOEC_MAT_DELTA_QKVZ]) {
        MOEC_TRY(add_mat(m, MOEC_MAT_DELTA_QKVZ, 2 * k + 2 * v, h, false, err));
        MOEC_TRY(add_mat(m, MOEC_MAT_DELTA_BA, 2 * heads, h, false, err));
    } else {
        MOEC_TRY(add_mat(m, MOEC_MAT_DELTA_QKV, 2 * k + v, h, false, err));
        MOEC_TRY(add_mat(m, MOEC_MAT_DELTA_Z, v, h, false, err));
        MOEC_TRY(add_mat(m, MOEC_MAT_DELTA_B, heads, h, false, err));
        MOEC_TRY(add_mat(m, MOEC_MAT_DELTA_A, heads, h, false, err));
    }
    MOEC_TRY(add(m, m->f->vec[MOEC_VEC_CONV], DIM(2 * k + v, 1, TINY_TAPS), err));
    MOEC_TRY(add_vec(m, MOEC_VEC_DELTA_A_LOG, heads, FILL_SMALL, err));
    MOEC_TRY(add_vec(m, MOEC_VEC_DELTA_DT_BIAS, heads, FILL_SMALL, err));
    MOEC_TRY(add_vec(m, MOEC_VEC_DELTA_NORM, TINY_DELTA_VALUE_DIM, FILL_SCALE, err));
    MOEC_TRY(add_mat(m, MOEC_MAT_DELTA_OUT, h, v, false, err));
done:
    return st;
}

static moec_status add_mixer(maker *m, moec_err *err)
{
    static moec_status (*const own[])(maker *, moec_err *) = {
        [MOEC_MIXER_ATTENTION] = add_attention, [MOEC_MIXER_LATENT] = add_latent, [MOEC_MIXER_CONV] = add_conv,
        [MOEC_MIXER_DELTA] = add_delta, [MOEC_MIXER_HEADS] = add_heads};
    const bool mixed = m->f->mixer == MOEC_MIXER_CONV || m->f->mixer == MOEC_MIXER_DELTA;
    return mixed && !tiny_is_own(m->layer) ? add_attention(m, err) : own[m->f->mixer](m, err);
}

/* --- feed-forward */

/* The family's first layout that is not quantized. */
static const moec_expert_names *layout(const moec_family *f)
{
    const moec_expert_names *n = f->experts;
    return n->layout == MOEC_LAYOUT_MXFP4_PAIRS ? n + 1 : n;
}

static moec_status add_experts(maker *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_expert_names *n = layout(m->f);
    const int64_t E = m->s.experts, I = m->s.width, H = m->s.hidden;
    switch (n->layout) {
    case MOEC_LAYOUT_SPLIT:
        for (int64_t e = 0; e < E; e++) {
            MOEC_TRY(add_as(m, n->down, NULL, e, DIM(H, I), FILL_MATRIX, err));
            MOEC_TRY(add_as(m, n->gate, NULL, e, DIM(n->up ? I : 2 * I, H), FILL_MATRIX, err));
            MOEC_TRY(add_as(m, n->up, NULL, e, DIM(I, H), FILL_MATRIX, err));
        }
        break;
    case MOEC_LAYOUT_OUT_IN:
        MOEC_TRY(add(m, n->gate, DIM(E, 2 * I, H), err));
        MOEC_TRY(add(m, n->down, DIM(E, H, I), err));
        break;
    case MOEC_LAYOUT_FLAT:
        MOEC_TRY(add(m, n->gate, DIM(E * I, H), err));
        MOEC_TRY(add(m, n->up, DIM(E * I, H), err));
        MOEC_TRY(add(m, n->down, DIM(E * I, H), err));
        break;
    case MOEC_LAYOUT_IN_OUT:
    case MOEC_LAYOUT_IN_OUT_PAIRS:
    case MOEC_LAYOUT_MXFP4_PAIRS:
        MOEC_TRY(add(m, n->gate, DIM(E, H, 2 * I), err));
        MOEC_TRY(add(m, n->down, DIM(E, I, H), err));
        break;
    }
    MOEC_TRY(add_as(m, n->gate_bias, NULL, 0, DIM(E, 2 * I), FILL_SMALL, err));
    MOEC_TRY(add_as(m, n->down_bias, NULL, 0, DIM(E, H), FILL_SMALL, err));
done:
    return st;
}

/* A router in two steps with what it carries, and the constants among the experts without a network. */
static moec_status add_tail(maker *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_family *f = m->f;
    const int64_t E = m->s.experts, all = E + f->n_tail, H = m->s.hidden, R = f->router_in_each * all;
    MOEC_TRY(add_mat(m, MOEC_MAT_ROUTER_IN, R, H, false, err));
    MOEC_TRY(add_as(m, f->mat[MOEC_MAT_ROUTER], NULL, 0, DIM(all, R), FILL_SMALL, err));
    MOEC_TRY(add_as(m, f->mat[MOEC_MAT_ROUTER_MAP], NULL, 0, DIM(all, all), FILL_SMALL, err));
    for (int i = 0; i < f->n_tail; i++)
        if (f->tail[i] == MOEC_NULL_CONSTANT) {
            MOEC_TRY(add_as(m, f->constant, NULL, E + i, DIM(H), FILL_MATRIX, err));
            MOEC_TRY(add_as(m, f->constant_mix, NULL, E + i, DIM(2, H), FILL_MATRIX, err));
        }
done:
    return st;
}

static moec_status add_moe(maker *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    const tiny_spec *s = &m->s;
    const int64_t I = s->width, H = s->hidden;
    const bool shared = m->f->key_shared_count[0] || m->f->key_shared_width || m->f->default_shared || !m->f->shared_gate_up;
    MOEC_TRY(add_experts(m, err));
    if (m->f->n_tail > 0)
        MOEC_TRY(add_tail(m, err));
    else
        MOEC_TRY(add_mat(m, MOEC_MAT_ROUTER, s->experts, H, m->extra->router_bias, err));
    MOEC_TRY(add_mat(m, MOEC_MAT_ROUTER_NULL, m->extra->null_experts, H, false, err));
    if (m->f->vec[MOEC_VEC_SELECTION_BIAS])
        MOEC_TRY(add_as(m, m->f->vec[MOEC_VEC_SELECTION_BIAS], NULL, 0,
                        m->f->key_renorm_min ? DIM(1, s->experts) : DIM(s->experts), FILL_SMALL, err)); /* ERNIE's has two */
    MOEC_TRY(add_vec(m, MOEC_VEC_MOE_BIAS, H, FILL_SMALL, err));
    if (!shared)
        goto done;
    MOEC_TRY(add(m, m->f->shared_gate_up, DIM(2 * I, H), err));
    if (!m->f->shared_gate_up) {
        MOEC_TRY(add_mat(m, MOEC_MAT_SHARED_GATE, I, H, false, err));
        MOEC_TRY(add_mat(m, MOEC_MAT_SHARED_UP, I, H, false, err));
    }
    MOEC_TRY(add_mat(m, MOEC_MAT_SHARED_DOWN, H, I, false, err));
    MOEC_TRY(add_mat(m, MOEC_MAT_SHARED_MIX, 1, H, false, err));
done:
    return st;
}

static moec_status add_dense(maker *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t F = m->f->key_dense_width && m->f->key_expert_width[0] &&
                      strcmp(m->f->key_dense_width, m->f->key_expert_width[0]) == 0 ? m->s.width : 2 * m->s.width;
    MOEC_TRY(add_mat(m, MOEC_MAT_DENSE_GATE, F, m->s.hidden, false, err));
    MOEC_TRY(add_mat(m, MOEC_MAT_DENSE_UP, F, m->s.hidden, false, err));
    MOEC_TRY(add_mat(m, MOEC_MAT_DENSE_DOWN, m->s.hidden, F, false, err));
done:
    return st;
}

static moec_status add_layer(maker *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t H = m->s.hidden;
    MOEC_TRY(add_norm(m, MOEC_VEC_NORM_ATTN, H, err));
    MOEC_TRY(add_vec(m, MOEC_VEC_NORM_ATTN_BIAS, H, FILL_SMALL, err));
    MOEC_TRY(tiny_is_dense(&m->s, m->f, m->layer) ? add_dense(m, err) : add_moe(m, err));
    MOEC_TRY(add_norm(m, MOEC_VEC_NORM_MLP, H, err));
    MOEC_TRY(add_vec(m, MOEC_VEC_NORM_MLP_BIAS, H, FILL_SMALL, err));
    MOEC_TRY(add_norm(m, MOEC_VEC_POST_ATTN, H, err));
    MOEC_TRY(add_norm(m, MOEC_VEC_POST_MLP, H, err));
    MOEC_TRY(add_mixer(m, err));
done:
    return st;
}

static moec_status list(maker *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    const fill_kind norm = m->f->norm == MOEC_NORM_RMS_PLUS1 ? FILL_SMALL : FILL_SCALE;
    MOEC_TRY(add(m, m->f->embed, DIM(m->s.vocab, m->s.hidden), err));
    for (m->layer = 0; m->layer < m->s.layers; m->layer++)
        MOEC_TRY(add_layer(m, err));
    MOEC_TRY(add_as(m, m->f->final_norm, NULL, 0, DIM(m->s.hidden), norm, err));
    MOEC_TRY(add_as(m, m->f->final_norm_bias, NULL, 0, DIM(m->s.hidden), FILL_SMALL, err));
    if (m->s.untied) {
        MOEC_TRY(add(m, m->f->head, DIM(m->s.vocab, m->s.hidden), err));
        if (m->extra->head_bias)
            MOEC_TRY(add_as(m, m->f->head, ".bias", 0, DIM(m->s.vocab), FILL_SMALL, err));
    }
done:
    return st;
}

/* --- values ---------------------------------------------------------------------------------------------------------- */

/* One value, exact in F32, F16 and BF16. */
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

static void fill(unsigned char *to, const moec_st_entry *e, fill_kind kind, uint64_t *state)
{
    size_t width = (size_t)moec_dtypes[e->dtype].bytes;
    for (size_t i = 0; i < (e->end - e->begin) / width; i++) {
        float k = (float)((int)(next(state) % 65) - 32);
        put(to + i * width, e->dtype, kind == FILL_MATRIX ? k / 64.0f : k / 128.0f + (kind == FILL_SCALE ? 1.0f : 0.0f));
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
        fill((unsigned char *)bytes + len + m->entry[i].begin, &m->entry[i], m->kind[i], &m->state);
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

static moec_status write_config(const maker *m, moec_err *err)
{
    char *text = NULL;
    moec_status st = tiny_config(&text, &m->s, m->f, err);
    if (st == MOEC_OK)
        st = write_text(m, "config.json", text, err);
    moec_free(text);
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
    m.extra = tiny_extra_of(m.f);
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
    moec_free(m.kind);
    return st;
}

tiny_spec tiny_of(const char *family)
{
    const moec_family *f = moec_family_find(family);
    const bool one_dense = f && f->dense != MOEC_DENSE_NONE;
    return (tiny_spec){.family = family, .hidden = 32, .width = 16, .layers = 3, .untied = f && f->head,
                       .dense_layer = one_dense ? 1 : 0, .seed = 11};
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
