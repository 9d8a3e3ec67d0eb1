/* See tiny_parts.h: config.json in the dialect of releases. */
#include "tiny_parts.h"

#include "base/mem.h"

#include <string.h>

#define YARN "\"type\": \"yarn\", \"factor\": 4.0, \"original_max_position_embeddings\": 16"

static const tiny_extra extras[] = {
    {.family = "gpt_oss", .qkv_bias = true, .o_bias = true, .router_bias = true,
     .keys = "{\"attention_bias\": true, \"swiglu_limit\": 7.0, \"rope_scaling\": {" YARN ", \"truncate\": false}}"},
    {.family = "deepseek_v3", .keys = "{\"rope_scaling\": {" YARN ", \"mscale\": 1.0, \"mscale_all_dim\": 1.0}, "
                                      "\"routed_scaling_factor\": 2.5}"},
    {.family = "deepseek_v2", .keys = "{\"topk_method\": \"group_limited_greedy\", \"norm_topk_prob\": false}"},
    {.family = "glm4_moe", .qkv_bias = true, .keys = "{\"attention_bias\": true, \"use_qk_norm\": true}"},
    {.family = "qwen2_moe", .qkv_bias = true, .keys = "{\"norm_topk_prob\": false}"},
    {.family = "olmoe", .whole_norms = true, .keys = "{\"clip_qkv\": 1.5, \"norm_topk_prob\": false}"},
    {.family = "minimax_m2", .whole_norms = true, .keys = "{\"rotary_dim\": 4}"},
    {.family = "flex_olmo", .whole_norms = true, .keys = "{\"pad_token_id\": null}"},
    {.family = "phimoe", .qkv_bias = true, .o_bias = true, .head_bias = true,
     .keys = "{\"attention_bias\": true, \"lm_head_bias\": true, \"router_jitter_noise\": 0.01}"},
    {.family = "granitemoe", .keys = "{\"embedding_multiplier\": 6.0, \"logits_scaling\": 2.0, \"residual_multiplier\": 0.25, "
                                     "\"attention_multiplier\": 0.125}"},
    {.family = "granitemoeshared", .keys = "{\"embedding_multiplier\": 6.0, \"logits_scaling\": 2.0, "
                                           "\"residual_multiplier\": 0.25, \"attention_multiplier\": 0.125}"},
    {.family = "llama4_text", .keys = "{\"floor_scale\": 4, \"attn_scale\": 0.1, \"use_qk_norm\": true, \"pad_token_id\": 0, "
                                      "\"attn_temperature_tuning\": true}"},
    {.family = "hunyuan_v1_moe", .keys = "{\"rope_scaling\": {\"type\": \"dynamic\", \"alpha\": 1000.0, \"factor\": 1.0}}"},
    {.family = "lfm2_moe", .keys = "{\"use_expert_bias\": true}"},
    {.family = "dots1", .keys = "{\"max_window_layers\": 1}"},
    {.family = "afmoe", .keys = "{\"mup_enabled\": true}"},
    {.family = "dbrx", .keys = "{\"rms_norm_eps\": null, \"attn_config\": {\"clip_qkv\": 1.5}}"},
    {.family = "adamoe", .null_experts = 2, .keys = "{\"num_null_experts\": 2}"},
    {.family = "remoe", .keys = "{\"moe_relu_routing\": true}"},
    {.family = "dynamic_moe", .keys = "{\"top_p_threshold\": 0.6, \"expert_frequency\": 2}"},
};

const tiny_extra *tiny_extra_of(const moec_family *f)
{
    static const tiny_extra none = {.keys = "{}"};
    for (size_t i = 0; i < MOEC_COUNT(extras); i++)
        if (strcmp(extras[i].family, f->model_type) == 0)
            return &extras[i];
    return &none;
}

bool tiny_is_dense(const tiny_spec *s, const moec_family *f, int64_t l)
{
    switch (f->dense) {
    case MOEC_DENSE_NONE:
        return false;
    case MOEC_DENSE_FREQUENCY:
        return l % 2 != 0;
    case MOEC_DENSE_FIRST_K:
    case MOEC_DENSE_NUM:
    case MOEC_DENSE_TYPES:
    case MOEC_DENSE_RANGE:
        return s->dense_layer == 1 && l == 0;
    case MOEC_DENSE_MLP_ONLY:
    case MOEC_DENSE_INTERLEAVED:
        break;
    }
    return s->dense_layer == l + 1;
}

bool tiny_is_own(int64_t l)
{
    return l % 2 == 0;
}

int64_t tiny_latent(const tiny_spec *s, int which)
{
    const int64_t sizes[] = {s->head_dim, s->head_dim / 4 * 2, s->head_dim - 2, s->head_dim + 2, s->head_dim + 4};
    return sizes[which];
}

/* --- setting keys ---------------------------------------------------------------------------------------------------- */

/* Value at a dotted path, objects on the way made as needed. */
static void set(moec_json *o, const char *path, moec_json *value)
{
    char key[64];
    const char *dot = strchr(path, '.');
    if (!dot || (size_t)(dot - path) >= sizeof key) {
        moec_json_set(o, path, value);
        return;
    }
    memcpy(key, path, (size_t)(dot - path));
    key[dot - path] = '\0';
    if (moec_json_type(moec_json_get(o, key)) != MOEC_JSON_OBJECT)
        moec_json_set(o, key, moec_json_new_object());
    set(moec_json_get(o, key), dot + 1, value);
}

static void set_int(moec_json *o, const char *path, int64_t value)
{
    if (path)
        set(o, path, moec_json_new_int(value));
}

static void set_keys(moec_json *o, const tiny_spec *s, const char *const *keys, int64_t value)
{
    for (int i = 0; i < MOEC_KEY_ALIASES && keys[i] && (i == 0 || s->both_keys); i++)
        set_int(o, keys[i], value);
}

static void merge(moec_json *into, moec_json *from)
{
    void *it = NULL;
    const char *key;
    moec_json *value;
    while (moec_json_each(from, &it, &key, &value)) {
        moec_json *old = moec_json_get(into, key);
        if (moec_json_type(old) == MOEC_JSON_OBJECT && moec_json_type(value) == MOEC_JSON_OBJECT)
            merge(old, value);
        else
            moec_json_set(into, key, moec_json_clone(value));
    }
}

/* --- parts ----------------------------------------------------------------------------------------------------------- */

static void set_sizes(moec_json *o, const tiny_spec *s, const moec_family *f)
{
    const bool nested = f->key_experts[0] && strchr(f->key_experts[0], '.'); /* DBRX, whose names are older */
    const struct { const char *key, *nested; int64_t value; } numbers[] = {
        {"num_hidden_layers", "n_layers", s->layers}, {"hidden_size", "d_model", s->hidden},
        {"vocab_size", "vocab_size", s->vocab},
        {"num_attention_heads", "n_heads", s->heads}, {"num_key_value_heads", "attn_config.kv_n_heads", s->kv_heads},
        {f->mixer == MOEC_MIXER_HEADS ? "kv_channels" : "head_dim", "head_dim", s->head_dim},
        {"max_position_embeddings", "max_seq_len", 512}};
    for (size_t i = 0; i < MOEC_COUNT(numbers); i++)
        if (f->mixer != MOEC_MIXER_LATENT || strcmp(numbers[i].key, "head_dim") != 0)
            set_int(o, nested ? numbers[i].nested : numbers[i].key, numbers[i].value);
    if (nested)
        set(o, "attn_config.rope_theta", moec_json_new_real(10000.0));
}

static void set_mixer(moec_json *o, const tiny_spec *s, const moec_family *f)
{
    static const char *const latent[] = {"qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank", "kv_lora_rank"};
    const struct { const char *key; int64_t value; } delta[] = {
        {"linear_num_key_heads", TINY_DELTA_KEY_HEADS}, {"linear_num_value_heads", TINY_DELTA_VALUE_HEADS},
        {"linear_key_head_dim", TINY_DELTA_KEY_DIM}, {"linear_value_head_dim", TINY_DELTA_VALUE_DIM},
        {"linear_conv_kernel_dim", TINY_TAPS}};
    if (f->mixer == MOEC_MIXER_LATENT) {
        for (size_t i = 0; i < MOEC_COUNT(latent); i++)
            set_int(o, latent[i], tiny_latent(s, (int)i));
        moec_json_set(o, "num_key_value_heads", moec_json_new_int(s->heads));
    }
    if (f->mixer == MOEC_MIXER_CONV)
        set_int(o, "conv_L_cache", TINY_TAPS);
    for (size_t i = 0; f->mixer == MOEC_MIXER_DELTA && i < MOEC_COUNT(delta); i++)
        set_int(o, delta[i].key, delta[i].value);
}

/* Kinds of layers, windows and chunks short enough to be seen. */
static void set_types(moec_json *o, const tiny_spec *s, const moec_family *f)
{
    const char *own = f->mixer == MOEC_MIXER_CONV ? "conv" : f->mixer == MOEC_MIXER_DELTA ? "linear_attention" : NULL;
    if (!own && f->window == MOEC_WINDOW_TYPES && f->types != MOEC_TYPES_SLIDE_EVEN_BELOW) {
        set_int(o, "sliding_window", 8);
        own = f->types == MOEC_TYPES_SLIDE_FROM ? NULL : "sliding_attention";
    }
    if (f->window == MOEC_WINDOW_CHUNK)
        set_int(o, "attention_chunk_size", 8);
    moec_json *types = moec_json_new_array(), *rotated = moec_json_new_array();
    for (int64_t i = 0; i < s->layers; i++) {
        moec_json_push(types, moec_json_new_string(own && tiny_is_own(i) ? own : "full_attention"));
        moec_json_push(rotated, moec_json_new_int(tiny_is_own(i)));
    }
    if (own)
        moec_json_set(o, "layer_types", moec_json_clone(types));
    if (f->nope == MOEC_NOPE_LIST)
        moec_json_set(o, "no_rope_layers", moec_json_clone(rotated));
    moec_json_free(types);
    moec_json_free(rotated);
}

static void set_dense(moec_json *o, const tiny_spec *s, const moec_family *f)
{
    moec_json *dense = moec_json_new_array(), *sparse = moec_json_new_array(), *types = moec_json_new_array();
    for (int64_t i = 0; i < s->layers; i++) {
        moec_json_push(tiny_is_dense(s, f, i) ? dense : sparse, moec_json_new_int(i));
        moec_json_push(types, moec_json_new_string(tiny_is_dense(s, f, i) ? "dense" : "sparse"));
    }
    if (f->dense == MOEC_DENSE_MLP_ONLY) {
        moec_json_set(o, "mlp_only_layers", moec_json_clone(dense));
        set_int(o, "decoder_sparse_step", 1);
    } else if (f->dense == MOEC_DENSE_FIRST_K) {
        set_int(o, "first_k_dense_replace", s->dense_layer == 1);
    } else if (f->dense == MOEC_DENSE_NUM) {
        set_int(o, "num_dense_layers", s->dense_layer == 1);
    } else if (f->dense == MOEC_DENSE_TYPES) {
        moec_json_set(o, "mlp_layer_types", moec_json_clone(types));
    } else if (f->dense == MOEC_DENSE_INTERLEAVED) {
        moec_json_set(o, "moe_layers", moec_json_clone(sparse));
    } else if (f->dense == MOEC_DENSE_RANGE) {
        set_int(o, "moe_layer_start_index", s->dense_layer == 1);
        set_int(o, "moe_layer_end_index", s->layers - 1);
        set_int(o, "moe_layer_interval", 1);
    }
    moec_json_free(dense);
    moec_json_free(sparse);
    moec_json_free(types);
}

static void set_experts(moec_json *o, const tiny_spec *s, const moec_family *f)
{
    if (!s->no_keys) {
        set_keys(o, s, f->key_experts, s->experts + f->n_tail);
        if (f->n_tail > 0) { /* MoE++ has a list of one */
            moec_json *list = moec_json_new_array();
            moec_json_push(list, moec_json_new_int(s->experts + f->n_tail));
            moec_json_set(o, f->key_experts[0], list);
        }
        set_keys(o, s, f->key_top_k, s->top_k);
    }
    for (int i = 0; i < MOEC_KEY_ALIASES; i++)
        set_int(o, f->key_expert_width[i], s->width);
    if (f->key_dense_width && (!f->key_expert_width[0] || strcmp(f->key_dense_width, f->key_expert_width[0]) != 0))
        set_int(o, f->key_dense_width, 2 * s->width);
    if (f->key_shared_count[0])
        set_int(o, f->key_shared_count[0], 1);
    set_int(o, f->key_shared_width, s->width);
    if (f->group != MOEC_GROUP_NONE) {
        set_int(o, f->key_groups, 2);
        set_int(o, f->key_top_groups, 1);
    }
    if (f->key_route_scale)
        set(o, f->key_route_scale, moec_json_new_real(1.5));
    set(o, f->key_renorm ? f->key_renorm : "norm_topk_prob",
        f->key_renorm ? moec_json_new_real(1.0) : moec_json_new_bool(true));
}

moec_status tiny_config(char **out, const tiny_spec *s, const moec_family *f, moec_err *err)
{
    const tiny_extra *extra = tiny_extra_of(f);
    moec_status st = MOEC_OK;
    moec_json *o = moec_json_new_object(), *names = moec_json_new_array(), *more = NULL;
    moec_json_push(names, moec_json_new_string(f->architecture));
    moec_json_set(o, "architectures", names);
    moec_json_set(o, "model_type", moec_json_new_string(f->model_type));
    set_sizes(o, s, f);
    set_experts(o, s, f);
    set_dense(o, s, f);
    set_mixer(o, s, f);
    set_types(o, s, f);
    moec_json_set(o, "hidden_act", moec_json_new_string("silu"));
    set(o, f->key_norm_eps ? f->key_norm_eps : "rms_norm_eps", moec_json_new_real(1e-6));
    moec_json_set(o, "rope_theta", moec_json_new_real(10000.0));
    moec_json_set(o, "tie_word_embeddings", moec_json_new_bool(!s->untied));
    moec_json_set(o, "torch_dtype", moec_json_new_string(s->dtype == MOEC_F32 ? "float32"
                                                         : s->dtype == MOEC_F16 ? "float16" : "bfloat16"));
    MOEC_TRY(moec_json_parse(&more, extra->keys, strlen(extra->keys), f->model_type, err));
    merge(o, more);
    MOEC_TRY(moec_json_dump(out, o, 2, err));
done:
    moec_json_free(more);
    moec_json_free(o);
    return st;
}
