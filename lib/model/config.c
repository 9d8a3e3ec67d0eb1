/* Reads config.json in both dialects (transformers 4 and 5). Scalars come from here; what the tensors can tell, they do. */
#include "model/config.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { MAX_LAYERS = 4096, MAX_ATTENTION = 1 << 17 }; /* real models: up to 94 layers, 24576 values */

/* --- one value ------------------------------------------------------------------------------------------------------- */

/* The first key of "a|b.c|d" that is there; NULL: none. *key is it, in buf. */
static const moec_json *find_key(const char **key, char *buf, size_t cap, const moec_json *config, const char *keys)
{
    const moec_json *found = NULL;
    *key = NULL;
    for (const char *p = keys; p && *p && !found;) {
        size_t n = strcspn(p, "|");
        snprintf(buf, cap, "%.*s", (int)n, p);
        const moec_json *v = moec_json_path(config, buf);
        if (!moec_json_absent(v)) {
            found = v;
            *key = buf;
        }
        p += n + (p[n] == '|');
    }
    return found;
}

static const char *first_key(char *buf, size_t cap, const char *keys)
{
    snprintf(buf, cap, "%.*s", (int)strcspn(keys, "|"), keys);
    return buf;
}

/* A number, or a list of one for each layer: they must agree, as the experts of all layers are of one shape. */
static moec_status whole(int64_t *out, const moec_json *v, const char *key, moec_err *err)
{
    int64_t other;
    if (moec_json_type(v) != MOEC_JSON_ARRAY) {
        if (!moec_json_int(v, out))
            return moec_fail(err, MOEC_EFORMAT, "config.json: %s is not a whole number", key);
        return MOEC_OK;
    }
    size_t n = moec_json_len(v);
    if (n == 0 || n > MAX_LAYERS || !moec_json_int(moec_json_at(v, 0), out))
        return moec_fail(err, MOEC_EFORMAT, "config.json: %s is neither a whole number nor a list of them", key);
    for (size_t i = 1; i < n; i++)
        if (!moec_json_int(moec_json_at(v, i), &other) || other != *out)
            return moec_fail(err, MOEC_EFORMAT, "config.json: %s differs between layers (entry %zu); only models with the "
                             "same number in all layers are read", key, i);
    return MOEC_OK;
}

/* The whole number under the first of the keys that is there. */
static moec_status read_int(int64_t *out, const moec_json *config, const char *keys, int64_t fallback, int64_t lo,
                            int64_t hi, moec_err *err)
{
    char buf[160];
    const char *key;
    const moec_json *v = find_key(&key, buf, sizeof buf, config, keys);
    if (!v) {
        if (fallback < lo)
            return moec_fail(err, MOEC_EFORMAT, "config.json: %s is missing", first_key(buf, sizeof buf, keys));
        *out = fallback;
        return MOEC_OK;
    }
    moec_status st = whole(out, v, key, err);
    if (st == MOEC_OK && (*out < lo || *out > hi))
        st = moec_fail(err, MOEC_EFORMAT, "config.json: %s is %lld, expected %lld to %lld", key, (long long)*out,
                       (long long)lo, (long long)hi);
    return st;
}

/* Value of the first key of a family's list that is present; *found is that key, or NULL when the default was taken. */
static moec_status read_alias(int64_t *out, const char **found, const moec_json *config, const char *const *keys,
                              int64_t fallback, int64_t lo, int64_t hi, moec_err *err)
{
    *found = NULL;
    for (int i = 0; i < MOEC_KEY_ALIASES && keys[i] && !*found; i++)
        if (!moec_json_absent(moec_json_path(config, keys[i])))
            *found = keys[i];
    return read_int(out, config, *found ? *found : keys[0], fallback, lo, hi, err);
}

/* null and absent: the default. */
static moec_status read_bool(bool *out, const moec_json *config, const char *key, bool fallback, moec_err *err)
{
    const moec_json *v = moec_json_path(config, key);
    *out = fallback;
    if (moec_json_absent(v) || moec_json_bool(v, out))
        return MOEC_OK;
    return moec_fail(err, MOEC_EFORMAT, "config.json: %s is neither true nor false", key);
}

/* A finite number in [lo, hi]; null and absent: the default, which need not be in the range. */
static moec_status read_real(double *out, const moec_json *config, const char *keys, double fallback, double lo, double hi,
                             moec_err *err)
{
    char buf[160];
    const char *key;
    const moec_json *v = find_key(&key, buf, sizeof buf, config, keys);
    *out = fallback;
    if (!v)
        return MOEC_OK;
    if (!moec_json_real(v, out))
        return moec_fail(err, MOEC_EFORMAT, "config.json: %s is not a number", key);
    if (!(*out >= lo && *out <= hi))
        return moec_fail(err, MOEC_EFORMAT, "config.json: %s is %g, expected %g to %g", key, *out, lo, hi);
    return MOEC_OK;
}

/* --- groups of values ------------------------------------------------------------------------------------------------ */

static moec_status read_latent(moec_dims *d, const moec_json *c, moec_err *err)
{
    moec_status st = MOEC_OK;
    int64_t rope;
    MOEC_TRY(read_int(&d->nope_dim, c, "qk_nope_head_dim", 0, 1, 1 << 16, err));
    MOEC_TRY(read_int(&rope, c, "qk_rope_head_dim", 0, 2, 1 << 16, err));
    MOEC_TRY(read_int(&d->value_dim, c, "v_head_dim", 0, 1, 1 << 16, err));
    MOEC_TRY(read_int(&d->kv_rank, c, "kv_lora_rank", 0, 1, 1 << 16, err));
    MOEC_TRY(read_int(&d->q_rank, c, "q_lora_rank", 0, 0, 1 << 16, err));
    d->head_dim = d->nope_dim + rope;
    d->kv_heads = d->heads; /* every head has its own key and value, made from the latent one */
done:
    return st;
}

static moec_status read_attention(moec_dims *d, const moec_family *f, const moec_json *c, moec_err *err)
{
    moec_status st = MOEC_OK;
    const bool by_top_k = f->mixer == MOEC_MIXER_HEADS; /* k chosen experts of kv_heads queries each */
    const int64_t kv_default = f->default_kv_heads ? f->default_kv_heads : by_top_k ? 0 : -1; /* -1: as many as heads */
    MOEC_TRY(read_int(&d->kv_heads, c, "num_key_value_heads|attn_config.kv_n_heads", kv_default, by_top_k ? 1 : -1, 1 << 16,
                      err));
    if (by_top_k)
        d->heads = d->kv_heads * d->top_k;
    else
        MOEC_TRY(read_int(&d->heads, c, "num_attention_heads|n_heads", 0, 1, 1 << 16, err));
    d->kv_heads = d->kv_heads < 0 ? d->heads : d->kv_heads;
    if (f->mixer == MOEC_MIXER_LATENT) {
        MOEC_TRY(read_latent(d, c, err));
    } else {
        MOEC_TRY(read_int(&d->head_dim, c, by_top_k ? "kv_channels|head_dim" : "head_dim",
                          f->default_head_dim ? f->default_head_dim : d->hidden / d->heads, 1, 1 << 16, err));
        d->value_dim = d->head_dim;
    }
    if (d->kv_heads < 1 || d->heads % d->kv_heads != 0)
        MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "config.json: num_attention_heads %lld is no multiple of num_key_value_heads "
                           "%lld", (long long)d->heads, (long long)d->kv_heads));
    if (d->heads * d->head_dim > MAX_ATTENTION || d->heads * d->value_dim > MAX_ATTENTION)
        MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "config.json: %lld heads of %lld values, expected at most %d values in all",
                           (long long)d->heads, (long long)d->head_dim, MAX_ATTENTION));
    MOEC_TRY(read_real(&d->clip_qkv, c, "clip_qkv|attn_config.clip_qkv", 0.0, 0.0, 1e30, err));
    if (f->qk_norm == MOEC_QK_L2_AFTER)
        MOEC_TRY(read_bool(&d->qk_l2, c, "use_qk_norm", true, err));
done:
    return st;
}

/* Scaling of scores; needs the rope. */
static moec_status read_scales(moec_dims *d, const moec_family *f, const moec_json *c, moec_err *err)
{
    moec_status st = MOEC_OK;
    bool mup, tempered = false;
    MOEC_TRY(read_real(&d->embed_scale, c, "embedding_multiplier", 1.0, -1e9, 1e9, err));
    MOEC_TRY(read_bool(&mup, c, "mup_enabled", false, err));
    if (mup)
        d->embed_scale *= sqrt((double)d->hidden);
    MOEC_TRY(read_real(&d->residual_scale, c, "residual_multiplier", 1.0, -1e9, 1e9, err));
    MOEC_TRY(read_real(&d->logit_scale, c, "logits_scaling", 1.0, 1e-9, 1e9, err));
    MOEC_TRY(read_real(&d->score_scale, c, "attention_multiplier",
                       f->default_score_scale != 0.0 ? f->default_score_scale : 1.0 / sqrt((double)d->head_dim), -1e9, 1e9,
                       err));
    if (f->mixer == MOEC_MIXER_LATENT && d->rope.kind != MOEC_ROPE_DEFAULT && d->rope.mscale_all != 0.0 &&
        d->rope.factor > 1.0) {
        double m = 0.1 * d->rope.mscale_all * log(d->rope.factor) + 1.0;
        d->score_scale *= m * m;
    }
    if (f->nope == MOEC_NOPE_LIST)
        MOEC_TRY(read_bool(&tempered, c, "attn_temperature_tuning", true, err));
    if (tempered) {
        MOEC_TRY(read_real(&d->temper_floor, c, "floor_scale", 8192.0, 1e-9, 1e12, err));
        MOEC_TRY(read_real(&d->temper_scale, c, "attn_scale", 0.1, -1e9, 1e9, err));
    }
    MOEC_TRY(read_real(&d->act_limit, c, "swiglu_limit", 7.0, 1e-9, 1e30, err));
    MOEC_TRY(read_real(&d->act_alpha, c, "swiglu_alpha", 1.702, -1e9, 1e9, err));
done:
    return st;
}

/* Keys of layers that are no attention. */
static moec_status read_mixer(moec_dims *d, const moec_family *f, const moec_json *c, moec_err *err)
{
    moec_status st = MOEC_OK;
    if (f->mixer == MOEC_MIXER_CONV)
        MOEC_TRY(read_int(&d->conv_taps, c, "conv_L_cache", 3, 1, 64, err));
    if (f->mixer != MOEC_MIXER_DELTA)
        goto done;
    MOEC_TRY(read_int(&d->conv_taps, c, "linear_conv_kernel_dim", 4, 1, 64, err));
    MOEC_TRY(read_int(&d->delta_key_heads, c, "linear_num_key_heads", 16, 1, 1 << 12, err));
    MOEC_TRY(read_int(&d->delta_value_heads, c, "linear_num_value_heads", 32, 1, 1 << 12, err));
    MOEC_TRY(read_int(&d->delta_key_dim, c, "linear_key_head_dim", 128, 1, 1 << 12, err));
    MOEC_TRY(read_int(&d->delta_value_dim, c, "linear_value_head_dim", 128, 1, 1 << 12, err));
    if (d->delta_value_heads % d->delta_key_heads != 0)
        st = moec_fail(err, MOEC_EFORMAT, "config.json: linear_num_value_heads %lld is no multiple of linear_num_key_heads "
                       "%lld", (long long)d->delta_value_heads, (long long)d->delta_key_heads);
done:
    return st;
}

static moec_status read_groups(moec_dims *d, const moec_family *f, const moec_json *c, moec_err *err)
{
    moec_status st = MOEC_OK;
    const char *method = moec_json_string(moec_json_path(c, "topk_method"));
    d->groups = d->top_groups = 1;
    if (f->group == MOEC_GROUP_NONE || (f->group == MOEC_GROUP_MAX && (!method || strcmp(method, "greedy") == 0)))
        return MOEC_OK;
    if (f->group == MOEC_GROUP_MAX && strcmp(method, "group_limited_greedy") != 0)
        return moec_fail(err, MOEC_EFORMAT, "config.json: topk_method is %.40s, expected greedy or group_limited_greedy",
                         method);
    const bool said = !moec_json_absent(moec_json_path(c, f->key_groups)) || f->default_groups == 0;
    MOEC_TRY(read_int(&d->groups, c, f->key_groups, said ? 1 : f->default_groups, 1, d->experts, err));
    MOEC_TRY(read_int(&d->top_groups, c, f->key_top_groups, f->default_top_groups ? f->default_top_groups : 1, 1, d->groups,
                      err));
    if (d->experts % d->groups != 0)
        MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "config.json: %s %lld does not divide the %lld experts of a layer",
                           f->key_groups, (long long)d->groups, (long long)d->experts));
    if (d->groups > 1 && d->top_k > d->top_groups * (d->experts / d->groups))
        st = moec_fail(err, MOEC_EFORMAT, "config.json: %lld experts a token, but %s %lld groups hold %lld",
                       (long long)d->top_k, f->key_top_groups, (long long)d->top_groups,
                       (long long)(d->top_groups * (d->experts / d->groups)));
    if (st == MOEC_OK && d->groups > 1 && f->group == MOEC_GROUP_TOP2 && d->experts / d->groups < 2)
        st = moec_fail(err, MOEC_EFORMAT, "config.json: %s %lld leaves one expert a group, two are needed", f->key_groups,
                       (long long)d->groups);
done:
    return st;
}

/* norm_topk_prob, or a family's own key, which may be a norm's order: 1 (others are not in use), null for none. */
static moec_status read_renorm(moec_dims *d, const moec_family *f, const moec_json *c, moec_err *err)
{
    const char *key = f->key_renorm ? f->key_renorm : "norm_topk_prob";
    double order;
    moec_status st = MOEC_OK;
    d->renorm = f->renorm == MOEC_RENORM_ALWAYS;
    if (f->renorm == MOEC_RENORM_KEY) {
        const moec_json *v = moec_json_path(c, key);
        if (!f->key_renorm || !moec_json_real(v, &order))
            MOEC_TRY(read_bool(&d->renorm, c, key, f->default_renorm, err));
        else if (order == 1.0)
            d->renorm = true;
        else
            MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "config.json: %s is %g, expected 1, true, false or null", key, order));
    }
    d->renorm_eps = f->renorm_eps;
    if (f->key_renorm_min)
        MOEC_TRY(read_real(&d->renorm_min, c, f->key_renorm_min, 1e-12, 0.0, 1.0, err));
    d->route_scale = 1.0;
    if (f->key_route_scale)
        MOEC_TRY(read_real(&d->route_scale, c, f->key_route_scale,
                           f->default_route_scale != 0.0 ? f->default_route_scale : 1.0, -1e9, 1e9, err));
    if (f->choice == MOEC_CHOOSE_SPARSEMIXER)
        MOEC_TRY(read_real(&d->jitter, c, "router_jitter_noise", 0.01, 0.0, 1e9, err));
    if (f->choice == MOEC_CHOOSE_TOP_P)
        MOEC_TRY(read_real(&d->top_p, c, "top_p_threshold", 0.4, 0.0, 1.0, err));
done:
    return st;
}

/* What a config may change of how its family's router decides, and of what the experts then get. */
static moec_status read_gate(moec_dims *d, const moec_family *f, const moec_json *c, moec_err *err)
{
    moec_status st = MOEC_OK;
    bool plain = true, used = false;
    int64_t every;
    d->input_scale = 1.0;
    if (f->key_top_k_softmax)
        MOEC_TRY(read_bool(&d->top_k_softmax, c, f->key_top_k_softmax, false, err));
    d->renorm = d->renorm && !d->top_k_softmax;
    if (f->key_input_plain)
        MOEC_TRY(read_bool(&plain, c, f->key_input_plain, false, err));
    if (!plain && !d->top_k_softmax)
        d->input_scale = (double)d->top_k;
    if (f->key_logit_std)
        MOEC_TRY(read_bool(&used, c, f->key_logit_std_used, false, err));
    if (used)
        MOEC_TRY(read_real(&d->logit_std, c, f->key_logit_std, 1.0, 1e-9, 1e9, err));
    if (f->key_router_in)
        MOEC_TRY(read_bool(&d->router_in, c, f->key_router_in, true, err));
    if (f->mat[MOEC_MAT_ROUTER_MAP]) { /* logits go from layer to layer, so no layer may be without */
        d->carried = d->experts + d->null_experts;
        MOEC_TRY(read_int(&every, c, "moe_expert_interval", 1, 1, 1, err));
    }
done:
    return st;
}

static moec_status read_experts(moec_model *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    const char *unused;
    const moec_family *f = m->family;
    const moec_json *c = m->config;
    moec_dims *d = &m->dims;
    int64_t shared = 0;
    MOEC_TRY(read_alias(&d->experts, &m->key_experts, c, f->key_experts, f->default_experts, 1 + f->n_tail, 65535, err));
    d->experts -= f->n_tail;
    d->null_experts = f->n_tail;
    MOEC_TRY(read_alias(&d->top_k, &m->key_top_k, c, f->key_top_k, f->default_top_k, 1, 65535, err));
    MOEC_TRY(read_alias(&d->expert_width, &unused, c, f->key_expert_width, 0, 1, 1 << 24, err));
    if (f->key_dense_width)
        MOEC_TRY(read_int(&d->dense_width, c, f->key_dense_width, 0, 0, 1 << 24, err));
    if (f->key_shared_count[0])
        MOEC_TRY(read_alias(&shared, &unused, c, f->key_shared_count, f->default_shared, 0, 1 << 12, err));
    d->shared_width = shared * d->expert_width;
    if (f->key_shared_width)
        MOEC_TRY(read_int(&d->shared_width, c, f->key_shared_width, d->shared_width, 0, 1 << 24, err));
    if (f->mat[MOEC_MAT_ROUTER_NULL])
        MOEC_TRY(read_int(&d->null_experts, c, "num_null_experts|num_null_expert|null_expert_num", 0, 0, 65535, err));
    if (d->top_k > d->experts + d->null_experts)
        MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "config.json: %s is %lld, more than the %lld experts of a layer",
                           m->key_top_k ? m->key_top_k : f->key_top_k[0], (long long)d->top_k, (long long)d->experts));
    const bool varies = f->choice == MOEC_CHOOSE_TOP_P || f->choice == MOEC_CHOOSE_POSITIVE;
    d->slots = varies ? d->experts : d->top_k;
    MOEC_TRY(read_groups(d, f, c, err));
    MOEC_TRY(read_renorm(d, f, c, err));
    MOEC_TRY(read_gate(d, f, c, err));
done:
    return st;
}

/* --- lists ----------------------------------------------------------------------------------------------------------- */

static moec_status check_list(const moec_json *c, const char *key, bool words, int64_t least, moec_err *err)
{
    const moec_json *list = moec_json_path(c, key);
    int64_t v;
    if (moec_json_absent(list))
        return MOEC_OK;
    if (moec_json_type(list) != MOEC_JSON_ARRAY)
        return moec_fail(err, MOEC_EFORMAT, "config.json: %s is not a list", key);
    size_t n = moec_json_len(list);
    if (n > MAX_LAYERS) /* it is searched for every layer */
        return moec_fail(err, MOEC_EFORMAT, "config.json: %s has %zu elements, expected at most %d", key, n, MAX_LAYERS);
    if ((int64_t)n < least)
        return moec_fail(err, MOEC_EFORMAT, "config.json: %s has %zu elements for %lld layers", key, n, (long long)least);
    for (size_t i = 0; i < n; i++) {
        const moec_json *one = moec_json_at(list, i);
        if (words ? !moec_json_string(one) : !moec_json_int(one, &v))
            return moec_fail(err, MOEC_EFORMAT, "config.json: %s holds something that is not a %s", key,
                             words ? "text" : "whole number");
    }
    return MOEC_OK;
}

static const char *const full = "full_attention", *const sliding = "sliding_attention", *const chunked = "chunked_attention";

/* Kinds of layers that this program can compute, for this family. */
static moec_status check_types(const moec_model *m, moec_err *err)
{
    const moec_json *list = moec_json_path(m->config, "layer_types");
    const char *own = m->family->mixer == MOEC_MIXER_CONV    ? "conv"
                      : m->family->mixer == MOEC_MIXER_DELTA ? "linear_attention"
                      : m->family->key_exact_tokens          ? "indexed_attention"
                                                             : full;
    for (int64_t i = 0; i < m->dims.layers && i < (int64_t)moec_json_len(list); i++) {
        const char *type = moec_json_string(moec_json_at(list, (size_t)i));
        if (strcmp(type, full) != 0 && strcmp(type, sliding) != 0 && strcmp(type, own) != 0 &&
            strcmp(type, "attention") != 0 && (strcmp(type, chunked) != 0 || m->family->window != MOEC_WINDOW_CHUNK))
            return moec_fail(err, MOEC_EFORMAT, "config.json: layer_types: layer %lld is %.40s, which is not known for %s",
                             (long long)i, type, m->family->model_type);
    }
    list = moec_json_path(m->config, "mlp_layer_types");
    for (size_t i = 0; i < moec_json_len(list); i++) {
        const char *type = moec_json_string(moec_json_at(list, i));
        if (strcmp(type, "dense") != 0 && strcmp(type, "sparse") != 0)
            return moec_fail(err, MOEC_EFORMAT, "config.json: mlp_layer_types: layer %zu is %.40s, expected dense or sparse", i,
                             type);
    }
    return MOEC_OK;
}

static moec_status check_lists(const moec_model *m, moec_err *err)
{
    static const struct { const char *key; bool words, all_layers; } lists[] = {
        {"layer_types", true, true}, {"mlp_layer_types", true, true}, {"no_rope_layers", false, false},
        {"mlp_only_layers", false, false}, {"moe_layers", false, false}};
    static const char *const steps[] = {"decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval",
                                        "full_attention_interval", "global_attn_every_n_layers", "no_rope_layer_interval",
                                        "expert_frequency"};
    static const char *const numbers[] = {"first_k_dense_replace", "num_dense_layers", "moe_layer_start_index",
                                          "moe_layer_end_index", "max_window_layers"};
    moec_status st = MOEC_OK;
    int64_t v;
    for (size_t i = 0; i < MOEC_COUNT(lists); i++)
        MOEC_TRY(check_list(m->config, lists[i].key, lists[i].words, lists[i].all_layers ? m->dims.layers : 0, err));
    const moec_json *no_rope = moec_json_path(m->config, "no_rope_layers");
    if (moec_json_len(no_rope) > 0 && (int64_t)moec_json_len(no_rope) < m->dims.layers)
        MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "config.json: no_rope_layers has %zu elements for %lld layers",
                           moec_json_len(no_rope), (long long)m->dims.layers));
    for (size_t i = 0; i < MOEC_COUNT(steps); i++)
        MOEC_TRY(read_int(&v, m->config, steps[i], 1, 1, MAX_LAYERS, err));
    for (size_t i = 0; i < MOEC_COUNT(numbers); i++)
        MOEC_TRY(read_int(&v, m->config, numbers[i], 0, -1, INT64_C(1) << 40, err));
    /* beside layer_types, which says the same, it may be a text: "LLLG" in EXAONE's releases */
    if (m->family->key_full_every && moec_json_absent(moec_json_path(m->config, "layer_types")))
        MOEC_TRY(read_int(&v, m->config, m->family->key_full_every, 1, 1, MAX_LAYERS, err));
    MOEC_TRY(read_int(&v, m->config, "sliding_window", 0, 0, INT64_C(1) << 40, err));
    MOEC_TRY(read_int(&v, m->config, "attention_chunk_size", 0, 0, INT64_C(1) << 40, err));
    bool used;
    MOEC_TRY(read_bool(&used, m->config, "use_sliding_window", false, err));
    MOEC_TRY(check_types(m, err));
done:
    return st;
}

/* A whole number (or a list of equal ones) that read_int took, or the default. */
static int64_t number(const moec_model *m, const char *key, int64_t fallback)
{
    const moec_json *found = moec_json_path(m->config, key);
    int64_t v;
    return !moec_json_absent(found) && whole(&v, found, key, NULL) == MOEC_OK ? v : fallback;
}

/* The same for a window: null says that there is none, absent that the default holds. */
static int64_t size_of(const moec_model *m, const char *key, int64_t fallback)
{
    return number(m, key, moec_json_type(moec_json_path(m->config, key)) == MOEC_JSON_NULL ? 0 : fallback);
}

/* Entry of a list of texts, or NULL. */
static const char *word_at(const moec_model *m, const char *key, int64_t i)
{
    const moec_json *list = moec_json_path(m->config, key);
    return i < (int64_t)moec_json_len(list) ? moec_json_string(moec_json_at(list, (size_t)i)) : NULL;
}

static bool in_list(const moec_json *list, int64_t value)
{
    int64_t v;
    for (size_t i = 0; i < moec_json_len(list); i++)
        if (moec_json_int(moec_json_at(list, i), &v) && v == value)
            return true;
    return false;
}

/* --- by layer -------------------------------------------------------------------------------------------------------- */

static bool is_rotated(const moec_model *m, int64_t i)
{
    const moec_json *list = moec_json_path(m->config, "no_rope_layers");
    int64_t v = 1;
    if (m->family->nope != MOEC_NOPE_LIST)
        return true;
    if (moec_json_len(list) > 0)
        return moec_json_int(moec_json_at(list, (size_t)i), &v) && v != 0;
    return (i + 1) % number(m, "no_rope_layer_interval", 4) != 0;
}

/* What a layer is when layer_types does not say it; NULL: not full, in the family's own way. */
static const char *default_type(const moec_model *m, int64_t i)
{
    const moec_family *f = m->family;
    bool used = true;
    int64_t n;
    switch (f->types) {
    case MOEC_TYPES_FULL:
        break;
    case MOEC_TYPES_FULL_EVERY:
        n = f->key_full_every ? number(m, f->key_full_every, f->full_every) : f->full_every;
        return (i + 1) % n == 0 ? full : NULL;
    case MOEC_TYPES_SLIDE_FROM:
        return i >= number(m, "max_window_layers", INT64_MAX) ? sliding : full;
    case MOEC_TYPES_SLIDE_EVEN_BELOW:
        (void)moec_json_bool(moec_json_path(m->config, "use_sliding_window"), &used);
        return used && !moec_json_absent(moec_json_path(m->config, "use_sliding_window")) && i % 2 == 0 &&
               i < number(m, "max_window_layers", 28) ? sliding : full;
    }
    if (f->window == MOEC_WINDOW_CHUNK)
        return is_rotated(m, i) ? chunked : full;
    return full;
}

void moec_config_layer(moec_layer *l, const moec_model *m)
{
    const moec_family *f = m->family;
    const char *type = word_at(m, "layer_types", l->index);
    bool used = true;
    if (!type)
        type = default_type(m, l->index);
    const bool is_full = type && (strcmp(type, full) == 0 || strcmp(type, "attention") == 0);
    const bool slides = !type || strcmp(type, sliding) == 0;
    l->mixer = f->mixer;
    if (f->mixer == MOEC_MIXER_CONV || f->mixer == MOEC_MIXER_DELTA)
        l->mixer = is_full ? MOEC_MIXER_ATTENTION : f->mixer;
    int64_t window = size_of(m, "sliding_window", f->default_window);
    if (f->window == MOEC_WINDOW_IF_USED)
        used = moec_json_bool(moec_json_path(m->config, "use_sliding_window"), &used) && used;
    if (f->window == MOEC_WINDOW_ALL || (f->window == MOEC_WINDOW_IF_USED && used) ||
        (f->window == MOEC_WINDOW_TYPES && slides))
        l->window = window;
    if (f->window == MOEC_WINDOW_CHUNK && type && strcmp(type, chunked) == 0)
        l->chunk = size_of(m, "attention_chunk_size", f->default_chunk);
    l->rotated = is_rotated(m, l->index);
    /* without a window no layer slides, and then all are rotated */
    if (f->nope == MOEC_NOPE_ON_FULL && is_full && window > 0)
        l->rotated = false;
}

bool moec_config_is_dense(const moec_model *m, int64_t i)
{
    const moec_json *c = m->config;
    const moec_dense_rule rule = m->family->dense;
    const char *type = word_at(m, "mlp_layer_types", i);
    if (type && (rule == MOEC_DENSE_FIRST_K || rule == MOEC_DENSE_NUM || rule == MOEC_DENSE_TYPES))
        return strcmp(type, "dense") == 0;
    int64_t n, last = number(m, "moe_layer_end_index", -1);
    const moec_json *list;
    switch (rule) {
    case MOEC_DENSE_NONE:
        return false;
    case MOEC_DENSE_FIRST_K:
        return i < number(m, "first_k_dense_replace", m->family->default_dense);
    case MOEC_DENSE_NUM:
        return i < number(m, "num_dense_layers", m->family->default_dense);
    case MOEC_DENSE_TYPES:
        return i == 0;
    case MOEC_DENSE_MLP_ONLY:
        return in_list(moec_json_path(c, "mlp_only_layers"), i) || (i + 1) % number(m, "decoder_sparse_step", 1) != 0;
    case MOEC_DENSE_INTERLEAVED:
        list = moec_json_path(c, "moe_layers");
        n = number(m, "interleave_moe_layer_step", 1);
        return moec_json_absent(list) ? (i + 1) % n != 0 : !in_list(list, i);
    case MOEC_DENSE_RANGE:
        last = last < 0 ? m->dims.layers - 1 : last;
        return i < number(m, "moe_layer_start_index", m->family->default_dense) || i > last ||
               (i + 1) % number(m, "moe_layer_interval", 1) != 0;
    case MOEC_DENSE_FREQUENCY:
        return i % number(m, "expert_frequency", 1) != 0;
    }
    return false;
}

/* --- all of it ------------------------------------------------------------------------------------------------------- */

static moec_status read_block(int32_t block[2], const moec_json *config, moec_err *err)
{
    const moec_json *size = moec_json_path(config, "quantization_config.weight_block_size");
    int64_t v;
    for (size_t i = 0; i < 2; i++) {
        if (moec_json_len(size) != 2 || !moec_json_int(moec_json_at(size, i), &v) || v < 1 || v > 1 << 16)
            return moec_fail(err, MOEC_EFORMAT, "config.json: quantization_config: weight_block_size is not two numbers from "
                             "1 to 65536 (FP8 without block scales is not read; use the unquantized release)");
        block[i] = (int32_t)v;
    }
    return MOEC_OK;
}

moec_status moec_config_fp8_block(int32_t block[2], const moec_model *m, moec_err *err)
{
    const moec_json *const configs[] = {moec_ckpt_config(m->ckpt), m->config};
    block[0] = block[1] = 0;
    for (size_t i = 0; i < MOEC_COUNT(configs); i++)
        if (moec_json_path(configs[i], "quantization_config.weight_block_size"))
            return read_block(block, configs[i], err);
    return MOEC_OK;
}

/* GPTQ's own codes, under its name or AutoRound's; *zero_more: zero points are stored less one, as its first format has them. */
static moec_status read_gptq(bool *zero_more, const moec_json *q, bool rounded, moec_err *err)
{
    const char *format = moec_json_string(moec_json_get(q, rounded ? "packing_format" : "checkpoint_format"));
    static const struct { const char *name; bool less; } rounds[] = {
        {"auto_round:auto_gptq", true}, {"auto_round:gptqmodel", false}, {"auto_round", false}},
        plain[] = {{"gptq", true}, {"gptq_v2", false}};
    for (size_t i = 0; rounded && format && i < MOEC_COUNT(rounds); i++)
        if (strcmp(format, rounds[i].name) == 0) {
            *zero_more = rounds[i].less;
            return MOEC_OK;
        }
    for (size_t i = 0; !rounded && i < MOEC_COUNT(plain); i++)
        if (!format || strcmp(format, plain[i].name) == 0) {
            *zero_more = plain[i].less;
            return MOEC_OK;
        }
    return moec_fail(err, MOEC_EFORMAT, "config.json: quantization_config: %s %.40s is not read (GPTQ's two are); use the unquantized "
                     "release", rounded ? "packing_format" : "checkpoint_format", format ? format : "is missing and");
}

/* compressed-tensors: weights alone, in packed codes. */
static moec_status read_packed(const moec_json *q, moec_err *err)
{
    const char *format = moec_json_string(moec_json_get(q, "format"));
    if (format && strcmp(format, "pack-quantized") == 0)
        return MOEC_OK;
    return moec_fail(err, MOEC_EFORMAT, "config.json: quantization_config: compressed-tensors' format %.40s is not read "
                     "(pack-quantized is); use the unquantized release", format ? format : "is missing and");
}

/* Nested: one layout, and the width to read at. */
static moec_status read_nested(int *bits, const moec_json *q, moec_err *err)
{
    moec_status st = MOEC_OK;
    int64_t version, width;
    MOEC_TRY(read_int(&version, q, "version", 1, 1, 1, err));
    MOEC_TRY(read_int(&width, q, "read_bits", 0, 0, 8, err));
    if (width == 1)
        return moec_fail(err, MOEC_EFORMAT, "config.json: quantization_config: read_bits is 1, expected 2 to 8, or 0 for all");
    *bits = (int)width;
done:
    return st;
}

moec_status moec_config_packed(moec_model *m, moec_err *err)
{
    const moec_json *q = moec_json_get(moec_ckpt_config(m->ckpt), "quantization_config");
    if (moec_json_absent(q))
        q = moec_json_get(m->config, "quantization_config");
    const char *method = moec_json_string(moec_json_get(q, "quant_method"));
    const bool rounded = method && strcmp(method, "auto-round") == 0, gptq = method && strcmp(method, "gptq") == 0;
    const bool compressed = method && strcmp(method, "compressed-tensors") == 0;
    const bool nested = method && strcmp(method, "moecompress-nested") == 0;
    m->packed = rounded || gptq || compressed || nested;
    m->zero_more = false;
    m->read_bits = 0;
    if (nested)
        return read_nested(&m->read_bits, q, err);
    return rounded || gptq ? read_gptq(&m->zero_more, q, rounded, err) : compressed ? read_packed(q, err) : MOEC_OK;
}

/* Quantized checkpoints: FP8 in blocks, MXFP4 and codes of few bits are read; of the others the text says what to do. */
static moec_status check_quantization(const moec_json *config, moec_err *err)
{
    static const struct { const char *method, *advice; } known[] = {
        {"bitsandbytes", "bitsandbytes"}, {"awq", "AWQ"}, {"modelopt", "ModelOpt"}, {"hqq", "HQQ"}, {"aqlm", "AQLM"},
        {"quark", "Quark"},
        {"torchao", "torchao"}, {"eetq", "EETQ"}, {"fbgemm_fp8", "FBGEMM FP8"}};
    const moec_json *q = moec_json_get(config, "quantization_config");
    int32_t block[2];
    if (moec_json_absent(q))
        return MOEC_OK;
    const char *method = moec_json_string(moec_json_get(q, "quant_method"));
    if (moec_json_type(q) != MOEC_JSON_OBJECT || !method)
        return moec_fail(err, MOEC_EFORMAT, "config.json: quantization_config has no quant_method; use the unquantized "
                         "release");
    /* moec_config_packed says more */
    static const char *const read[] = {"mxfp4", "gptq", "auto-round", "compressed-tensors", "moecompress-nested"};
    for (size_t i = 0; i < MOEC_COUNT(read); i++)
        if (strcmp(method, read[i]) == 0)
            return MOEC_OK;
    if (strcmp(method, "fp8") == 0)
        return read_block(block, config, err);
    for (size_t i = 0; i < MOEC_COUNT(known); i++)
        if (strcmp(known[i].method, method) == 0)
            return moec_fail(err, MOEC_EFORMAT, "config.json: the checkpoint is quantized by %s, which is not read; use the "
                             "unquantized release, or its FP8 (block scales) or MXFP4 one", known[i].advice);
    return moec_fail(err, MOEC_EFORMAT, "config.json: quant_method %.40s is not read (fp8 with block scales, mxfp4, gptq and "
                     "compressed-tensors' packed codes are); use the unquantized release", method);
}

/* What this program cannot compute. */
static moec_status refuse_unsupported(const moec_model *m, moec_err *err)
{
    static const char *const acts[] = {"hidden_act", "activation_function", "ffn_config.ffn_act_fn.name"};
    static const char *const parts[] = {"attn_config", "ffn_config"};
    static const char *const scores[] = {[MOEC_SCORE_SOFTMAX] = "softmax", [MOEC_SCORE_SIGMOID] = "sigmoid"};
    int64_t n;
    moec_status st = MOEC_OK;
    for (size_t i = 0; i < MOEC_COUNT(parts); i++) {
        const moec_json *part = moec_json_get(m->config, parts[i]);
        if (!moec_json_absent(part) && moec_json_type(part) != MOEC_JSON_OBJECT)
            return moec_fail(err, MOEC_EFORMAT, "config.json: %s is not an object", parts[i]);
    }
    for (size_t i = 0; i < MOEC_COUNT(acts); i++) {
        const moec_json *act = moec_json_path(m->config, acts[i]);
        const char *name = moec_json_string(act);
        if (!moec_json_absent(act) && !name)
            return moec_fail(err, MOEC_EFORMAT, "config.json: %s is not a text", acts[i]);
        if (name && strcmp(name, "silu") != 0 && strcmp(name, "swish") != 0)
            return moec_fail(err, MOEC_EFORMAT, "config.json: %s is %.40s, expected silu", acts[i], name);
    }
    /* dots.llm1 has "noaux_tc" here, which is no score */
    const char *score = moec_json_string(moec_json_get(m->config, "scoring_func"));
    for (size_t i = 0; i < MOEC_COUNT(scores); i++)
        if (score && strcmp(score, scores[i]) == 0 && m->family->score != (moec_router_score)i)
            return moec_fail(err, MOEC_EFORMAT, "config.json: scoring_func is %s, which is not how %s routes", score,
                             m->family->model_type);
    MOEC_TRY(read_int(&n, m->config, "num_hash_layers", 0, 0, MAX_LAYERS, err));
    if (n > 0)
        st = moec_fail(err, MOEC_EFORMAT, "config.json: num_hash_layers is %lld: hash-routed layers choose experts by the "
                       "token's number, so no expert of them can be dropped or merged by what a router says",
                       (long long)n);
done:
    return st;
}

/* Rotary positions by the config's keys, or by the family's where it has none. */
static moec_status read_rope(moec_dims *d, const moec_family *f, const moec_json *c, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_json *own = NULL;
    double theta;
    const bool said = !moec_json_absent(moec_json_get(c, "rope_scaling")) ||
                      !moec_json_absent(moec_json_get(c, "rope_parameters"));
    MOEC_TRY(read_real(&theta, c, "attn_config.rope_theta", f->default_rope_theta, 1.0, 1e30, err));
    if (f->default_rope && !said)
        MOEC_TRY(moec_json_parse(&own, f->default_rope, strlen(f->default_rope), "default rope", err));
    MOEC_TRY(moec_rope_read(&d->rope, own ? own : c, f->mixer == MOEC_MIXER_LATENT ? d->head_dim - d->nope_dim : d->head_dim,
                            f->default_partial_rotary, theta, err));
done:
    moec_json_free(own);
    return st;
}

static moec_status read_mtp(moec_model *m, moec_err *err)
{
    int64_t layers = 0;
    if (!m->family->key_mtp[0])
        return MOEC_OK;
    return read_alias(&layers, &m->key_mtp, m->config, m->family->key_mtp, 0, 0, 16, err);
}

moec_status moec_config_read(moec_model *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_dims *d = &m->dims;
    const moec_family *f = m->family;
    const moec_json *c = m->config;
    memset(d, 0, sizeof *d);
    MOEC_TRY(check_quantization(moec_ckpt_config(m->ckpt), err));
    MOEC_TRY(check_quantization(c, err));
    MOEC_TRY(refuse_unsupported(m, err));
    MOEC_TRY(read_int(&d->layers, c, "num_hidden_layers|n_layers", 0, 1, MAX_LAYERS, err));
    MOEC_TRY(read_int(&d->hidden, c, "hidden_size|d_model", 0, 1, 1 << 20, err));
    MOEC_TRY(read_int(&d->vocab, c, "vocab_size", 0, 1, 1 << 26, err));
    MOEC_TRY(read_experts(m, err));
    MOEC_TRY(read_attention(d, f, c, err));
    MOEC_TRY(read_mixer(d, f, c, err));
    MOEC_TRY(check_lists(m, err));
    MOEC_TRY(read_mtp(m, err));
    if (f->key_exact_tokens)
        MOEC_TRY(read_int(&d->exact_tokens, c, f->key_exact_tokens, f->default_exact_tokens, 1, INT64_C(1) << 40, err));
    MOEC_TRY(read_real(&d->norm_eps, c, f->key_norm_eps ? f->key_norm_eps : "rms_norm_eps", f->default_norm_eps, 1e-30, 0.999,
                       err));
    d->latent_eps = f->latent_norm_eps > 0.0 ? f->latent_norm_eps : d->norm_eps;
    MOEC_TRY(read_rope(d, f, c, err));
    MOEC_TRY(read_scales(d, f, c, err));
done:
    return st;
}
