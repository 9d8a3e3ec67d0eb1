/* config.json from the keys of a GGUF: the inverse of run/gguf_keys.c, for files that anybody may have written. */
#include "base/mem.h"
#include "model/gguf_names.h"
#include "model/gguf_read.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { KEY = 128, MAX_LAYERS = 4096, MAX_WIDTH = 1 << 24 };

/* --- keys ------------------------------------------------------------------------------------------------------------ */

static const moec_gguf_value *find(char full[KEY], const moec_gguf_reader *r, const char *key)
{
    snprintf(full, KEY, "%s.%s", r->f->gguf.arch, key);
    return moec_gguf_find(r->ix, full);
}

/* A whole number in [lo, hi]; `fallback` below lo: the key must be there. Some converters write one for each layer: they must
 * agree. */
static moec_status get_int(int64_t *out, const moec_gguf_reader *r, const char *key, int64_t fallback, int64_t lo, int64_t hi,
                           moec_err *err)
{
    char full[KEY];
    const moec_gguf_value *v = find(full, r, key);
    int64_t other;
    *out = fallback;
    if (!v && fallback < lo)
        return moec_fail(err, MOEC_EFORMAT, "%s: key %s is missing", r->path, full);
    if (!v)
        return MOEC_OK;
    bool whole = v->kind == MOEC_GGUF_ARRAY ? v->n > 0 && v->n <= MAX_LAYERS && moec_gguf_item_int(v, 0, out) : moec_gguf_int(v, out);
    for (uint64_t i = 1; whole && v->kind == MOEC_GGUF_ARRAY && i < v->n; i++)
        whole = moec_gguf_item_int(v, i, &other) && other == *out;
    if (!whole)
        return moec_fail(err, MOEC_EFORMAT, "%s: key %s is not one whole number for all layers", r->path, full);
    if (*out < lo || *out > hi)
        return moec_fail(err, MOEC_EFORMAT, "%s: key %s is %" PRId64 ", expected %" PRId64 " to %" PRId64, r->path, full, *out, lo, hi);
    return MOEC_OK;
}

/* A number in [lo, hi], as few digits of it as give the same float32: 1e-06, not 9.99999997e-07. NaN: it is not there. */
static moec_status get_real(double *out, const moec_gguf_reader *r, const char *key, double lo, double hi, moec_err *err)
{
    char full[KEY], text[40];
    const moec_gguf_value *v = find(full, r, key);
    *out = NAN;
    if (!v)
        return MOEC_OK;
    if (!moec_gguf_real(v, out) || !(*out >= lo && *out <= hi))
        return moec_fail(err, MOEC_EFORMAT, "%s: key %s is not a number from %g to %g", r->path, full, lo, hi);
    const float single = (float)*out;
    for (int digits = 1; digits <= 9; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, (double)single);
        if (strtof(text, NULL) == single)
            break;
    }
    *out = strtod(text, NULL);
    return MOEC_OK;
}

static moec_status get_bool(bool *out, const moec_gguf_reader *r, const char *key, moec_err *err)
{
    char full[KEY];
    const moec_gguf_value *v = find(full, r, key);
    *out = false;
    if (!v || moec_gguf_bool(v, out))
        return MOEC_OK;
    return moec_fail(err, MOEC_EFORMAT, "%s: key %s is neither true nor false", r->path, full);
}

static void set_int(moec_json *o, const char *key, int64_t v)
{
    moec_json_set(o, key, moec_json_new_int(v));
}

const moec_gguf_tensor *moec__gguf_first(const moec_gguf_reader *r, const char *name)
{
    char full[KEY];
    const moec_gguf_tensor *t = NULL;
    for (int64_t i = 0; !t && i < r->layers; i++) {
        snprintf(full, sizeof full, "blk.%" PRId64 ".%s", i, name);
        t = moec_gguf_named(r->g, full);
    }
    return t;
}

/* --- the family ------------------------------------------------------------------------------------------------------ */

/* Architectures that are read, once each. */
static void list_known(char *out, size_t cap)
{
    const moec_family *f, *g;
    size_t n = 0;
    out[0] = '\0';
    for (int i = 0; (f = moec_family_at(i)) != NULL; i++) {
        bool seen = !f->gguf.arch;
        for (int k = 0; !seen && k < i && (g = moec_family_at(k)) != NULL; k++)
            seen = g->gguf.arch && strcmp(g->gguf.arch, f->gguf.arch) == 0;
        if (!seen && n < cap)
            n += (size_t)snprintf(out + n, cap - n, "%s%s", n ? ", " : "", f->gguf.arch);
    }
}

/* Families may share an architecture, and then differ in how they score: 1 softmax, 2 sigmoid; without the key who corrects the
 * choice by a bias has sigmoids. */
static moec_status find_family(moec_gguf_reader *r, moec_err *err)
{
    char *arch = NULL, known[400];
    int64_t score;
    const moec_family *f;
    const moec_gguf_value *v = moec_gguf_find(r->ix, "general.architecture");
    if (!v)
        return moec_fail(err, MOEC_EFORMAT, "%s: key general.architecture is missing: no model", r->path);
    moec_status st = moec_gguf_text(&arch, v, err);
    if (st != MOEC_OK)
        return moec_within(err, st, "%s: general.architecture", r->path);
    moec_plain_line(arch);
    for (int i = 0; !r->f && (f = moec_family_at(i)) != NULL; i++)
        if (f->gguf.arch && strcmp(f->gguf.arch, arch) == 0)
            r->f = f;
    if (!r->f) {
        list_known(known, sizeof known);
        st = moec_fail(err, MOEC_EFORMAT, "%s: general.architecture is %.60s, which is not read (these are: %s)", r->path, arch, known);
        goto done;
    }
    MOEC_TRY(get_int(&r->blocks, r, "block_count", 0, 1, MAX_LAYERS, err));
    MOEC_TRY(get_int(&r->layers, r, "nextn_predict_layers", 0, 0, r->blocks - 1, err));
    r->layers = r->blocks - r->layers;
    const bool corrected = moec__gguf_first(r, moec_gguf_vecs[MOEC_VEC_SELECTION_BIAS]) != NULL;
    MOEC_TRY(get_int(&score, r, "expert_gating_func", 0, 0, 3, err));
    if (score == 0)
        score = corrected ? 2 : r->f->score == MOEC_SCORE_SIGMOID && !corrected ? 1 : 0;
    if (score == 3) /* softmax over those that are chosen, which a family's own rule says */
        score = 0;
    const moec_family *first = r->f;
    for (int i = 0; score > 0 && (f = moec_family_at(i)) != NULL; i++)
        if (f->gguf.arch && strcmp(f->gguf.arch, first->gguf.arch) == 0 && (f->score == MOEC_SCORE_SIGMOID) == (score == 2)) {
            r->f = f;
            goto done;
        }
    if (score > 0)
        st = moec_fail(err, MOEC_EFORMAT, "%s: %s scores experts by %s, which is not how its router is known to", r->path, arch,
                       score == 2 ? "sigmoids" : "softmax");
done:
    moec_free(arch);
    return st;
}

/* --- groups of keys -------------------------------------------------------------------------------------------------- */

/* The number that a key has, which must be a dimension of a tensor. */
static moec_status agree(const moec_gguf_reader *r, const char *key, int64_t value, const moec_gguf_tensor *t, int dim, moec_err *err)
{
    if (t->dim[dim] == value)
        return MOEC_OK;
    return moec_fail(err, MOEC_EFORMAT, "%s: key %s.%s is %" PRId64 ", but tensor %s has %" PRId64, r->path, r->f->gguf.arch, key, value,
                     t->name, t->dim[dim]);
}

static moec_status put_sizes(moec_json *o, moec_gguf_reader *r, moec_err *err)
{
    moec_status st = MOEC_OK;
    int64_t context, vocab;
    double eps;
    const moec_gguf_tensor *embed = moec_gguf_named(r->g, "token_embd.weight");
    if (!embed || embed->rank != 2 || embed->dim[1] < 1 || embed->dim[1] > 1 << 26)
        return moec_fail(err, MOEC_EFORMAT, "%s: tensor token_embd.weight is %s", r->path, embed ? "not a matrix" : "missing");
    MOEC_TRY(get_int(&r->hidden, r, "embedding_length", 0, 1, 1 << 20, err));
    MOEC_TRY(agree(r, "embedding_length", r->hidden, embed, 0, err));
    MOEC_TRY(get_int(&vocab, r, "vocab_size", embed->dim[1], 1, 1 << 26, err));
    MOEC_TRY(agree(r, "vocab_size", vocab, embed, 1, err));
    MOEC_TRY(get_int(&context, r, "context_length", 0, 1, INT64_C(1) << 40, err));
    MOEC_TRY(get_real(&eps, r, "attention.layer_norm_rms_epsilon", 1e-30, 0.999, err));
    if (isnan(eps))
        return moec_fail(err, MOEC_EFORMAT, "%s: key %s.attention.layer_norm_rms_epsilon is missing", r->path, r->f->gguf.arch);
    set_int(o, "hidden_size", r->hidden);
    set_int(o, "num_hidden_layers", r->layers);
    set_int(o, "vocab_size", vocab);
    set_int(o, "max_position_embeddings", context);
    moec_json_set(o, "rms_norm_eps", moec_json_new_real(eps));
    moec_json_set(o, "hidden_act", moec_json_new_string("silu"));
    moec_json_set(o, "tie_word_embeddings", moec_json_new_bool(!moec_gguf_named(r->g, "output.weight")));
done:
    return st;
}

/* Keys "_mla" are of the heads as they are trained; without them the plain ones are. */
static moec_status put_latent(moec_json *o, moec_gguf_reader *r, int64_t rope, moec_err *err)
{
    moec_status st = MOEC_OK;
    char full[KEY];
    int64_t key, q_rank;
    const bool both = find(full, r, "attention.key_length_mla") != NULL;
    MOEC_TRY(get_int(&r->kv_rank, r, "attention.kv_lora_rank", 0, 1, 1 << 16, err));
    MOEC_TRY(get_int(&q_rank, r, "attention.q_lora_rank", 0, 0, 1 << 16, err));
    MOEC_TRY(get_int(&key, r, both ? "attention.key_length_mla" : "attention.key_length", 0, 3, 1 << 16, err));
    MOEC_TRY(get_int(&r->value, r, both ? "attention.value_length_mla" : "attention.value_length", 0, 1, 1 << 16, err));
    r->nope = key - rope;
    if (r->nope < 1)
        return moec_fail(err, MOEC_EFORMAT, "%s: heads are %" PRId64 " wide, of which %" PRId64 " are rotated: none is left", r->path, key,
                         rope);
    set_int(o, "num_key_value_heads", r->heads);
    set_int(o, "kv_lora_rank", r->kv_rank);
    moec_json_set(o, "q_lora_rank", q_rank > 0 ? moec_json_new_int(q_rank) : moec_json_new_null());
    set_int(o, "qk_nope_head_dim", r->nope);
    set_int(o, "qk_rope_head_dim", rope);
    set_int(o, "v_head_dim", r->value);
done:
    return st;
}

static moec_status put_attention(moec_json *o, moec_gguf_reader *r, moec_err *err)
{
    moec_status st = MOEC_OK;
    int64_t kv, head, value, rope, window;
    const moec_family *f = r->f;
    MOEC_TRY(get_int(&r->heads, r, "attention.head_count", 0, 1, 1 << 16, err));
    set_int(o, "num_attention_heads", r->heads);
    r->latent = f->mixer == MOEC_MIXER_LATENT;
    if (r->latent) {
        MOEC_TRY(get_int(&rope, r, "rope.dimension_count", 0, 2, 1 << 16, err));
        MOEC_TRY(put_latent(o, r, rope, err));
    } else {
        MOEC_TRY(get_int(&kv, r, "attention.head_count_kv", r->heads, 1, 1 << 16, err));
        MOEC_TRY(get_int(&head, r, "attention.key_length", r->hidden / r->heads, 1, 1 << 16, err));
        MOEC_TRY(get_int(&value, r, "attention.value_length", head, 1, 1 << 16, err));
        MOEC_TRY(get_int(&rope, r, "rope.dimension_count", head, 2, 1 << 16, err));
        if (value != head || rope > head)
            return moec_fail(err, MOEC_EFORMAT, "%s: keys %" PRId64 " wide, %" PRId64 " of it rotated, and values %" PRId64 ": not read",
                             r->path, head, rope, value);
        set_int(o, "num_key_value_heads", kv);
        set_int(o, "head_dim", head);
        if (rope != head || f->default_partial_rotary > 0)
            moec_json_set(o, "partial_rotary_factor", moec_json_new_real((double)rope / (double)head));
    }
    if (f->gguf.window) {
        MOEC_TRY(get_int(&window, r, "attention.sliding_window", 0, 1, INT64_C(1) << 40, err));
        set_int(o, "sliding_window", window);
    }
    if (f->gguf.key_bias)
        moec_json_set(o, f->gguf.key_bias, moec_json_new_bool(moec__gguf_first(r, "attn_q.bias") != NULL));
    if (f->vec[MOEC_VEC_Q_NORM])
        moec_json_set(o, "use_qk_norm", moec_json_new_bool(moec__gguf_first(r, moec_gguf_vecs[MOEC_VEC_Q_NORM]) != NULL));
done:
    return st;
}

/* What a GGUF does not say of yarn stands in the family's default. */
static moec_status put_yarn(moec_json *scaling, const moec_gguf_reader *r, moec_err *err)
{
    moec_status st = MOEC_OK;
    int64_t original;
    double v;
    moec_json *own = NULL;
    static const struct { const char *key, *to; } rows[] = {
        {"rope.scaling.yarn_beta_fast", "beta_fast"}, {"rope.scaling.yarn_beta_slow", "beta_slow"}};
    if (r->f->default_rope) {
        bool truncate;
        MOEC_TRY(moec_json_parse(&own, r->f->default_rope, strlen(r->f->default_rope), "default rope", err));
        if (moec_json_bool(moec_json_path(own, "rope_scaling.truncate"), &truncate))
            moec_json_set(scaling, "truncate", moec_json_new_bool(truncate));
    }
    MOEC_TRY(get_int(&original, r, "rope.scaling.original_context_length", 0, 0, INT64_C(1) << 40, err));
    if (original > 0)
        set_int(scaling, "original_max_position_embeddings", original);
    for (size_t i = 0; i < MOEC_COUNT(rows); i++) {
        MOEC_TRY(get_real(&v, r, rows[i].key, 1e-6, 1e6, err));
        moec_json_set(scaling, rows[i].to, moec_json_new_real(isnan(v) ? (i == 0 ? 32.0 : 1.0) : v));
    }
    MOEC_TRY(get_real(&v, r, "rope.scaling.yarn_log_multiplier", 0, 1e6, err)); /* a tenth of mscale_all_dim */
    if (v > 0) {
        v = round(v * 1e7) / 1e6;
        moec_json_set(scaling, "mscale", moec_json_new_real(v));
        moec_json_set(scaling, "mscale_all_dim", moec_json_new_real(v));
    }
done:
    moec_json_free(own);
    return st;
}

static moec_status put_rope(moec_json *o, const moec_gguf_reader *r, moec_err *err)
{
    moec_status st = MOEC_OK;
    char full[KEY], *type = NULL;
    double theta, factor;
    const moec_gguf_value *v = find(full, r, "rope.scaling.type");
    moec_json *scaling = moec_json_new_object();
    MOEC_TRY(get_real(&theta, r, "rope.freq_base", 1.0001, 1e29, err));
    moec_json_set(o, "rope_theta", moec_json_new_real(isnan(theta) ? 10000.0 : theta)); /* llama.cpp's default */
    if (v)
        MOEC_TRY(moec_within(err, moec_gguf_text(&type, v, err), "%s: %s", r->path, full));
    if (!type || strcmp(type, "none") == 0) {
        moec_json_set(o, "rope_scaling", moec_json_new_null());
        goto done;
    }
    moec_plain_line(type);
    const bool yarn = strcmp(type, "yarn") == 0;
    if (!yarn && strcmp(type, "linear") != 0)
        MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "%s: %s is %.40s, expected none, linear or yarn", r->path, full, type));
    MOEC_TRY(get_real(&factor, r, "rope.scaling.factor", 1e-6, 1e8, err));
    if (isnan(factor))
        MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "%s: key %s.rope.scaling.factor is missing", r->path, r->f->gguf.arch));
    moec_json_set(scaling, "rope_type", moec_json_new_string(type));
    moec_json_set(scaling, "factor", moec_json_new_real(factor));
    if (yarn)
        MOEC_TRY(put_yarn(scaling, r, err));
    moec_json_set(o, "rope_scaling", scaling);
    scaling = NULL;
done:
    moec_json_free(scaling);
    moec_free(type);
    return st;
}

static moec_status put_groups(moec_json *o, const moec_gguf_reader *r, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_family *f = r->f;
    int64_t groups, used;
    MOEC_TRY(get_int(&groups, r, "expert_group_count", 1, 0, r->experts, err));
    MOEC_TRY(get_int(&used, r, "expert_group_used_count", 1, 0, r->experts, err));
    if (!f->key_groups)
        goto done;
    set_int(o, f->key_groups, groups > 0 ? groups : 1);
    set_int(o, f->key_top_groups, used > 0 ? used : 1);
    if (f->group == MOEC_GROUP_MAX)
        moec_json_set(o, "topk_method", moec_json_new_string(groups > 1 ? "group_limited_greedy" : "greedy"));
done:
    return st;
}

/* What a file says of the routing where its architecture reads it. */
static moec_status put_routing(moec_json *o, const moec_gguf_reader *r, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_family *f = r->f;
    double scale;
    bool norm = f->gguf.renorm == MOEC_GGUF_RENORM_ALWAYS;
    if (f->gguf.renorm == MOEC_GGUF_RENORM_KEY)
        MOEC_TRY(get_bool(&norm, r, "expert_weights_norm", err));
    if (f->renorm == MOEC_RENORM_KEY)
        moec_json_set(o, f->key_renorm ? f->key_renorm : "norm_topk_prob", moec_json_new_bool(norm));
    else if (f->choice == MOEC_CHOOSE_TOP_K && norm != (f->renorm == MOEC_RENORM_ALWAYS))
        MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "%s: expert_weights_norm is %s, which is not how %s routes", r->path,
                           norm ? "true" : "false", f->model_type));
    if (!f->gguf.routing_keys)
        goto done;
    MOEC_TRY(get_real(&scale, r, "expert_weights_scale", -1e9, 1e9, err));
    if (f->key_route_scale)
        moec_json_set(o, f->key_route_scale, moec_json_new_real(isnan(scale) || scale == 0 ? 1.0 : scale));
    MOEC_TRY(put_groups(o, r, err));
done:
    return st;
}

static moec_status put_experts(moec_json *o, moec_gguf_reader *r, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_family *f = r->f;
    int64_t used, width, dense, shared;
    const moec_gguf_tensor *gate = moec__gguf_first(r, "ffn_gate_exps.weight");
    const char *width_key = f->gguf.expert_width ? "expert_feed_forward_length" : "feed_forward_length";
    MOEC_TRY(get_int(&r->experts, r, "expert_count", 0, 1, 65535, err));
    if (!gate)
        return moec_fail(err, MOEC_EFORMAT, "%s: no layer has a tensor ffn_gate_exps.weight: %s", r->path,
                         moec__gguf_first(r, "ffn_gate.0.weight") ? "an expert has its own, as in files of 2023, which is not read"
                                                                  : "a model without experts");
    MOEC_TRY(agree(r, "expert_count", r->experts, gate, 2, err));
    MOEC_TRY(get_int(&used, r, "expert_used_count", 0, 1, r->experts, err));
    MOEC_TRY(get_int(&width, r, width_key, gate->dim[1], 1, MAX_WIDTH, err));
    MOEC_TRY(agree(r, width_key, width, gate, 1, err));
    set_int(o, f->key_experts[0], r->experts);
    set_int(o, f->key_top_k[0], used);
    set_int(o, f->key_expert_width[0], width);
    if (f->key_dense_width && f->gguf.expert_width) {
        MOEC_TRY(get_int(&dense, r, "feed_forward_length", width, 0, MAX_WIDTH, err));
        set_int(o, f->key_dense_width, dense);
    }
    if (f->key_shared_width) {
        const moec_gguf_tensor *t = moec__gguf_first(r, "ffn_gate_shexp.weight");
        MOEC_TRY(get_int(&shared, r, "expert_shared_feed_forward_length", t ? t->dim[1] : 0, 0, MAX_WIDTH, err));
        set_int(o, f->key_shared_width, shared);
    }
    if (f->gguf.routing_keys && f->key_shared_count[0]) {
        MOEC_TRY(get_int(&shared, r, "expert_shared_count", 0, 0, 4096, err));
        set_int(o, f->key_shared_count[0], shared);
    }
    if (f->gguf.dense_first) {
        MOEC_TRY(get_int(&dense, r, "leading_dense_block_count", 0, 0, r->layers - 1, err));
        set_int(o, "first_k_dense_replace", dense);
    }
    MOEC_TRY(put_routing(o, r, err));
done:
    return st;
}

/* Ids of special tokens are config keys too. */
static void put_ids(moec_json *o, const moec_gguf_reader *r)
{
    static const struct { const char *key, *to; } rows[] = {{"tokenizer.ggml.bos_token_id", "bos_token_id"},
                                                            {"tokenizer.ggml.eos_token_id", "eos_token_id"},
                                                            {"tokenizer.ggml.padding_token_id", "pad_token_id"}};
    int64_t id;
    for (size_t i = 0; i < MOEC_COUNT(rows); i++)
        if (moec_gguf_int(moec_gguf_find(r->ix, rows[i].key), &id) && id >= 0 && id <= INT32_MAX)
            set_int(o, rows[i].to, id);
}

static moec_status put_constants(moec_json *o, const moec_gguf_reader *r, moec_err *err)
{
    moec_json *more = NULL, *value;
    const char *key, *text = r->f->gguf.config;
    void *it = NULL;
    if (!text)
        return MOEC_OK;
    moec_status st = moec_json_parse(&more, text, strlen(text), "keys of a family", err);
    while (st == MOEC_OK && moec_json_each(more, &it, &key, &value))
        moec_json_set(o, key, moec_json_clone(value));
    moec_json_free(more);
    return st;
}

moec_status moec__gguf_config(char **out, moec_gguf_reader *r, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_json *o = moec_json_new_object(), *classes = moec_json_new_array();
    *out = NULL;
    MOEC_TRY(find_family(r, err));
    moec_json_push(classes, moec_json_new_string(r->f->architecture));
    moec_json_set(o, "architectures", classes);
    classes = NULL;
    moec_json_set(o, "model_type", moec_json_new_string(r->f->model_type));
    MOEC_TRY(put_sizes(o, r, err));
    MOEC_TRY(put_attention(o, r, err));
    MOEC_TRY(put_rope(o, r, err));
    MOEC_TRY(put_experts(o, r, err));
    put_ids(o, r);
    MOEC_TRY(put_constants(o, r, err));
    MOEC_TRY(moec_json_dump(out, o, 2, err));
done:
    moec_json_free(classes);
    moec_json_free(o);
    return st;
}
