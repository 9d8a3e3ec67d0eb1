/* Reads config.json in both dialects (transformers 4 and 5). Scalars come from here; what the tensors can tell, they do. */
#include "model/config.h"

#include <math.h>
#include <string.h>

static moec_status read_int(int64_t *out, const moec_json *config, const char *key, int64_t fallback, int64_t lo,
                            int64_t hi, moec_err *err)
{
    const moec_json *v = moec_json_get(config, key);
    moec_json_kind kind = moec_json_type(v);
    if (kind == MOEC_JSON_NONE || kind == MOEC_JSON_NULL) {
        if (fallback < lo)
            return moec_fail(err, MOEC_EFORMAT, "config.json: %s is missing", key);
        *out = fallback;
        return MOEC_OK;
    }
    if (!moec_json_int(v, out))
        return moec_fail(err, MOEC_EFORMAT, "config.json: %s is not a whole number", key);
    if (*out < lo || *out > hi)
        return moec_fail(err, MOEC_EFORMAT, "config.json: %s is %lld, expected %lld to %lld", key, (long long)*out,
                         (long long)lo, (long long)hi);
    return MOEC_OK;
}

/* Value of the first key of the list that is present; *found is that key, or NULL when the default was taken. */
static moec_status read_alias(int64_t *out, const char **found, const moec_json *config, const char *const *keys,
                              int64_t fallback, int64_t hi, moec_err *err)
{
    *found = NULL;
    for (int i = 0; i < MOEC_KEY_ALIASES && keys[i] && !*found; i++)
        if (moec_json_get(config, keys[i]))
            *found = keys[i];
    return read_int(out, config, *found ? *found : keys[0], fallback, 1, hi, err);
}

static bool read_bool(const moec_json *config, const char *key, bool fallback)
{
    bool v = fallback;
    (void)moec_json_bool(moec_json_get(config, key), &v); /* null and absent: the default */
    return v;
}

static moec_status read_attention(moec_dims *d, const moec_json *config, moec_err *err)
{
    moec_status st = MOEC_OK;
    MOEC_TRY(read_int(&d->heads, config, "num_attention_heads", 0, 1, 1 << 16, err));
    MOEC_TRY(read_int(&d->kv_heads, config, "num_key_value_heads", d->heads, 1, 1 << 16, err));
    MOEC_TRY(read_int(&d->head_dim, config, "head_dim", d->hidden / d->heads, 1, 1 << 16, err));
    if (d->heads % d->kv_heads != 0)
        st = moec_fail(err, MOEC_EFORMAT, "config.json: num_attention_heads %lld is no multiple of num_key_value_heads %lld",
                       (long long)d->heads, (long long)d->kv_heads);
done:
    return st;
}

static moec_status read_window(moec_dims *d, const moec_family *f, const moec_json *config, moec_err *err)
{
    d->window = 0;
    if (f->window == MOEC_WINDOW_NONE ||
        (f->window == MOEC_WINDOW_IF_USED && !read_bool(config, "use_sliding_window", false)))
        return MOEC_OK;
    return read_int(&d->window, config, "sliding_window", 0, 0, INT64_C(1) << 40, err);
}

static moec_status read_experts(moec_dims *d, const char **key_experts, const char **key_top_k, const moec_family *f,
                                const moec_json *config, moec_err *err)
{
    moec_status st = MOEC_OK;
    const char *unused;
    MOEC_TRY(read_alias(&d->experts, key_experts, config, f->key_experts, f->default_experts, 65535, err));
    MOEC_TRY(read_alias(&d->top_k, key_top_k, config, f->key_top_k, f->default_top_k, 65535, err));
    MOEC_TRY(read_alias(&d->expert_width, &unused, config, f->key_expert_width, 0, 1 << 24, err));
    d->dense_width = 0;
    if (f->key_dense_width)
        MOEC_TRY(read_int(&d->dense_width, config, f->key_dense_width, 0, 0, 1 << 24, err));
    if (d->top_k > d->experts)
        st = moec_fail(err, MOEC_EFORMAT, "config.json: %s is %lld, more than the %lld experts of a layer",
                       *key_top_k ? *key_top_k : f->key_top_k[0], (long long)d->top_k, (long long)d->experts);
    d->renorm = f->renorm == MOEC_RENORM_ALWAYS ||
                (f->renorm == MOEC_RENORM_KEY && read_bool(config, "norm_topk_prob", f->renorm_default));
done:
    return st;
}

moec_status moec_config_read(moec_dims *out, const char **key_experts, const char **key_top_k, const moec_family *f,
                             const moec_json *config, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_dims *d = out;
    memset(d, 0, sizeof *d);
    if (moec_json_type(moec_json_get(config, "quantization_config")) == MOEC_JSON_OBJECT)
        return moec_fail(err, MOEC_EFORMAT,
                         "config.json: quantization_config: quantized checkpoints are not read; use the unquantized release");
    const char *act = moec_json_string(moec_json_get(config, "hidden_act"));
    if (act && strcmp(act, "silu") != 0)
        return moec_fail(err, MOEC_EFORMAT, "config.json: hidden_act is %.40s, expected silu", act);
    MOEC_TRY(read_int(&d->layers, config, "num_hidden_layers", 0, 1, 4096, err));
    MOEC_TRY(read_int(&d->hidden, config, "hidden_size", 0, 1, 1 << 20, err));
    MOEC_TRY(read_int(&d->vocab, config, "vocab_size", 0, 1, 1 << 26, err));
    MOEC_TRY(read_attention(d, config, err));
    MOEC_TRY(read_window(d, f, config, err));
    MOEC_TRY(read_experts(d, key_experts, key_top_k, f, config, err));
    d->tied = read_bool(config, "tie_word_embeddings", false);
    d->norm_eps = f->default_norm_eps;
    (void)moec_json_real(moec_json_get(config, "rms_norm_eps"), &d->norm_eps);
    if (!(d->norm_eps > 0.0 && d->norm_eps < 1.0)) {
        st = moec_fail(err, MOEC_EFORMAT, "config.json: rms_norm_eps is %g, expected above 0 and below 1", d->norm_eps);
        goto done;
    }
    MOEC_TRY(moec_rope_read(&d->rope, config, d->head_dim, f->default_rope_theta, err));
done:
    return st;
}

bool moec_config_is_dense(const moec_family *f, const moec_json *config, int64_t layer)
{
    if (f->dense == MOEC_DENSE_NONE)
        return false;
    const moec_json *list = moec_json_get(config, "mlp_only_layers");
    int64_t step = 1, v;
    for (size_t i = 0; i < moec_json_len(list); i++)
        if (moec_json_int(moec_json_at(list, i), &v) && v == layer)
            return true;
    if (!moec_json_int(moec_json_get(config, "decoder_sparse_step"), &step) || step < 1)
        step = 1;
    return (layer + 1) % step != 0;
}
