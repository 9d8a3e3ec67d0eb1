/* Reads config.json in both dialects (transformers 4 and 5). Scalars come from here; what the tensors can tell, they do. */
#include "model/config.h"

#include <string.h>

enum { MAX_LAYERS = 4096, MAX_ATTENTION = 1 << 17 }; /* real models: up to 94 layers, 24576 values */

static bool is_absent(const moec_json *v)
{
    return moec_json_type(v) == MOEC_JSON_NONE || moec_json_type(v) == MOEC_JSON_NULL;
}

static moec_status read_int(int64_t *out, const moec_json *config, const char *key, int64_t fallback, int64_t lo,
                            int64_t hi, moec_err *err)
{
    const moec_json *v = moec_json_get(config, key);
    if (is_absent(v)) {
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
        if (!is_absent(moec_json_get(config, keys[i])))
            *found = keys[i];
    return read_int(out, config, *found ? *found : keys[0], fallback, 1, hi, err);
}

/* null and absent: the default. */
static moec_status read_bool(bool *out, const moec_json *config, const char *key, bool fallback, moec_err *err)
{
    const moec_json *v = moec_json_get(config, key);
    *out = fallback;
    if (is_absent(v) || moec_json_bool(v, out))
        return MOEC_OK;
    return moec_fail(err, MOEC_EFORMAT, "config.json: %s is neither true nor false", key);
}

static moec_status read_attention(moec_dims *d, const moec_json *config, moec_err *err)
{
    moec_status st = MOEC_OK;
    MOEC_TRY(read_int(&d->heads, config, "num_attention_heads", 0, 1, 1 << 16, err));
    MOEC_TRY(read_int(&d->kv_heads, config, "num_key_value_heads", d->heads, 1, 1 << 16, err));
    MOEC_TRY(read_int(&d->head_dim, config, "head_dim", d->hidden / d->heads, 1, 1 << 16, err));
    if (d->heads * d->head_dim > MAX_ATTENTION)
        MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "config.json: %lld heads of %lld values, expected at most %d values in all",
                           (long long)d->heads, (long long)d->head_dim, MAX_ATTENTION));
    if (d->heads % d->kv_heads != 0)
        st = moec_fail(err, MOEC_EFORMAT, "config.json: num_attention_heads %lld is no multiple of num_key_value_heads %lld",
                       (long long)d->heads, (long long)d->kv_heads);
done:
    return st;
}

static moec_status read_window(moec_dims *d, const moec_family *f, const moec_json *config, moec_err *err)
{
    bool used = true;
    moec_status st = MOEC_OK;
    d->window = 0;
    if (f->window == MOEC_WINDOW_NONE)
        return MOEC_OK;
    if (f->window == MOEC_WINDOW_IF_USED)
        st = read_bool(&used, config, "use_sliding_window", false, err);
    if (st == MOEC_OK)
        st = read_int(&d->window, config, "sliding_window", 0, 0, INT64_C(1) << 40, err);
    if (!used)
        d->window = 0;
    return st;
}

/* mlp_only_layers: layer numbers, those that do not exist included, as configs of pruned models have them. */
static moec_status read_dense(const moec_family *f, const moec_json *config, moec_err *err)
{
    int64_t step, v;
    const moec_json *list = moec_json_get(config, "mlp_only_layers");
    if (f->dense == MOEC_DENSE_NONE)
        return MOEC_OK;
    if (!is_absent(list) && moec_json_type(list) != MOEC_JSON_ARRAY)
        return moec_fail(err, MOEC_EFORMAT, "config.json: mlp_only_layers is not a list");
    size_t n = moec_json_len(list);
    if (n > MAX_LAYERS) /* it is searched for every layer */
        return moec_fail(err, MOEC_EFORMAT, "config.json: mlp_only_layers has %zu elements, expected at most %d", n, MAX_LAYERS);
    for (size_t i = 0; i < n; i++)
        if (!moec_json_int(moec_json_at(list, i), &v))
            return moec_fail(err, MOEC_EFORMAT, "config.json: mlp_only_layers holds something that is not a whole number");
    return read_int(&step, config, "decoder_sparse_step", 1, 1, MAX_LAYERS, err);
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
    d->renorm = f->renorm == MOEC_RENORM_ALWAYS;
    if (st == MOEC_OK && f->renorm == MOEC_RENORM_KEY)
        st = read_bool(&d->renorm, config, "norm_topk_prob", f->renorm_default, err);
done:
    return st;
}

/* What this program cannot compute. */
static moec_status refuse_unsupported(const moec_json *config, moec_err *err)
{
    const moec_json *act = moec_json_get(config, "hidden_act");
    const char *name = moec_json_string(act);
    if (!is_absent(moec_json_get(config, "quantization_config")))
        return moec_fail(err, MOEC_EFORMAT,
                         "config.json: quantization_config: quantized checkpoints are not read; use the unquantized release");
    if (!is_absent(act) && !name)
        return moec_fail(err, MOEC_EFORMAT, "config.json: hidden_act is not a text");
    if (name && strcmp(name, "silu") != 0)
        return moec_fail(err, MOEC_EFORMAT, "config.json: hidden_act is %.40s, expected silu", name);
    return MOEC_OK;
}

static moec_status read_eps(double *out, const moec_json *config, double fallback, moec_err *err)
{
    const moec_json *v = moec_json_get(config, "rms_norm_eps");
    *out = fallback;
    if (!is_absent(v) && !moec_json_real(v, out))
        return moec_fail(err, MOEC_EFORMAT, "config.json: rms_norm_eps is not a number");
    if (!(*out > 0.0 && *out < 1.0))
        return moec_fail(err, MOEC_EFORMAT, "config.json: rms_norm_eps is %g, expected above 0 and below 1", *out);
    return MOEC_OK;
}

moec_status moec_config_read(moec_dims *out, const char **key_experts, const char **key_top_k, const moec_family *f,
                             const moec_json *config, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_dims *d = out;
    memset(d, 0, sizeof *d);
    MOEC_TRY(refuse_unsupported(config, err));
    MOEC_TRY(read_int(&d->layers, config, "num_hidden_layers", 0, 1, MAX_LAYERS, err));
    MOEC_TRY(read_int(&d->hidden, config, "hidden_size", 0, 1, 1 << 20, err));
    MOEC_TRY(read_int(&d->vocab, config, "vocab_size", 0, 1, 1 << 26, err));
    MOEC_TRY(read_attention(d, config, err));
    MOEC_TRY(read_window(d, f, config, err));
    MOEC_TRY(read_experts(d, key_experts, key_top_k, f, config, err));
    MOEC_TRY(read_dense(f, config, err));
    MOEC_TRY(read_bool(&d->tied, config, "tie_word_embeddings", false, err));
    MOEC_TRY(read_eps(&d->norm_eps, config, f->default_norm_eps, err));
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
