/* Keys of a GGUF from a model's numbers, and what llama.cpp's graphs cannot compute. */
#include "run/gguf_parts.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>

/* --- what is refused --------------------------------------------------------------------------------------------------- */

static bool is_one(double x)
{
    return fabs(x - 1) < 1e-9;
}

static int64_t dense_layers(const moec_model *m)
{
    int64_t n = 0;
    for (int64_t i = 0; i < m->dims.layers; i++)
        n += m->layer[i].expert == NULL;
    return n;
}

static moec_status check_layers(const moec_gguf_model *x, moec_err *err)
{
    const moec_model *m = x->m;
    const int64_t dense = dense_layers(m);
    if (dense > 0 && !x->rules->dense_first)
        return moec_fail(err, MOEC_EINVAL, "%" PRId64 " layer%s no experts; llama.cpp's %s has them in every layer", dense,
                         dense == 1 ? " has" : "s have", x->rules->arch);
    for (int64_t i = 0; i < m->dims.layers; i++) {
        const moec_layer *l = &m->layer[i];
        if ((l->expert == NULL) != (i < dense))
            return moec_fail(err, MOEC_EINVAL, "layer %" PRId64 ": llama.cpp's %s has layers without experts only in front", i,
                             x->rules->arch);
        if (!l->rotated || l->chunk > 0)
            return moec_fail(err, MOEC_EINVAL, "layer %" PRId64 ": llama.cpp's %s rotates every layer and has no chunks", i,
                             x->rules->arch);
        if (l->window > 0 && l->window < m->dims.rope.max_positions && (!x->rules->window || i % 2 != 0))
            return moec_fail(err, MOEC_EINVAL, "layer %" PRId64 ": llama.cpp's %s has no sliding window here", i,
                             x->rules->arch);
        if (l->window == 0 && x->rules->window && i % 2 == 0)
            return moec_fail(err, MOEC_EINVAL, "layer %" PRId64 ": llama.cpp's %s has a sliding window here", i, x->rules->arch);
    }
    return MOEC_OK;
}

moec_status moec__gguf_check(const moec_gguf_model *x, moec_err *err)
{
    const moec_gguf_rules *r = x->rules;
    const moec_dims *d = &x->m->dims;
    const char *arch = r->arch;
    const bool sums = x->m->family->choice == MOEC_CHOOSE_TOP_K && r->renorm != MOEC_GGUF_RENORM_KEY;
    if (sums && d->renorm != (r->renorm == MOEC_GGUF_RENORM_ALWAYS))
        return moec_fail(err, MOEC_EINVAL, "norm_topk_prob is %s; llama.cpp's %s %s the weights of experts by their sum",
                         d->renorm ? "true" : "false", arch, d->renorm ? "never divides" : "always divides");
    if (!r->routing_keys && (!is_one(d->route_scale) || d->groups > 1))
        return moec_fail(err, MOEC_EINVAL, "llama.cpp's %s has no scale of experts' weights and no groups", arch);
    if (d->groups > 1 && x->m->family->group != MOEC_GROUP_TOP2)
        return moec_fail(err, MOEC_EINVAL, "n_group is %" PRId64 ", chosen by their best expert; llama.cpp takes their two best",
                         d->groups);
    if (d->clip_qkv > 0)
        return moec_fail(err, MOEC_EINVAL, "clip_qkv is %g; llama.cpp's %s does not cut q, k and v", d->clip_qkv, arch);
    if (r->equal_heads && (d->kv_heads != d->heads || d->heads * d->head_dim != d->hidden))
        return moec_fail(err, MOEC_EINVAL, "%" PRId64 " key heads of %" PRId64 "; llama.cpp's %s has as many as heads (%" PRId64 "), together as "
                         "wide as the hidden size", d->kv_heads, d->head_dim, arch, d->heads);
    if (!is_one(d->embed_scale) || !is_one(d->residual_scale) || !is_one(d->logit_scale) || !is_one(d->input_scale) ||
        d->null_experts > 0 || d->logit_std > 0)
        return moec_fail(err, MOEC_EINVAL, "llama.cpp's %s has no scales of embeddings, residuals, logits or inputs", arch);
    if (x->m->family->activation == MOEC_ACT_SWIGLU_CLAMPED && (!is_one(d->act_limit / 7) || fabs(d->act_alpha - 1.702) > 1e-6))
        return moec_fail(err, MOEC_EINVAL, "llama.cpp's %s computes with a limit of 7 and an alpha of 1.702", arch);
    if (d->rope.kind != MOEC_ROPE_DEFAULT && d->rope.kind != MOEC_ROPE_LINEAR && d->rope.kind != MOEC_ROPE_YARN)
        return moec_fail(err, MOEC_EINVAL, "rope scaling other than linear and yarn is not written to a GGUF yet");
    return check_layers(x, err);
}

/* --- keys ------------------------------------------------------------------------------------------------------------ */

typedef struct keys {
    moec_gguf_out *g;
    const char *arch;
    char name[128];
} keys;

static const char *named(keys *k, const char *key)
{
    snprintf(k->name, sizeof k->name, "%s.%s", k->arch, key);
    return k->name;
}

/* Sizes of a model are far below 2^32: its tensors would not fit otherwise. */
static void put_size(keys *k, const char *key, int64_t v)
{
    moec_gguf_put_u32(k->g, named(k, key), v > UINT32_MAX ? UINT32_MAX : (uint32_t)v);
}

static void put_real(keys *k, const char *key, double v)
{
    moec_gguf_put_f32(k->g, named(k, key), (float)v);
}

static void put_attention(keys *k, const moec_gguf_model *x)
{
    const moec_dims *d = &x->m->dims;
    const bool latent = x->m->layer[0].mixer == MOEC_MIXER_LATENT;
    put_size(k, "attention.head_count", d->heads);
    put_size(k, "attention.head_count_kv", latent ? 1 : d->kv_heads);
    put_real(k, "attention.layer_norm_rms_epsilon", d->norm_eps);
    if (latent) { /* heads that share one key and value in the latent space */
        put_size(k, "attention.key_length", d->kv_rank + d->rope.width);
        put_size(k, "attention.value_length", d->kv_rank);
        put_size(k, "attention.key_length_mla", d->head_dim);
        put_size(k, "attention.value_length_mla", d->value_dim);
        put_size(k, "attention.kv_lora_rank", d->kv_rank);
        if (d->q_rank > 0)
            put_size(k, "attention.q_lora_rank", d->q_rank);
    } else {
        put_size(k, "attention.key_length", d->head_dim);
        put_size(k, "attention.value_length", d->value_dim);
    }
    if (x->rules->window)
        put_size(k, "attention.sliding_window", x->m->layer[0].window);
}

static void put_rope(keys *k, const moec_rope *r)
{
    put_size(k, "rope.dimension_count", r->width);
    put_real(k, "rope.freq_base", r->theta);
    if (r->kind == MOEC_ROPE_DEFAULT)
        return;
    moec_gguf_put_text(k->g, named(k, "rope.scaling.type"), r->kind == MOEC_ROPE_YARN ? "yarn" : "linear");
    put_real(k, "rope.scaling.factor", r->factor);
    if (r->kind != MOEC_ROPE_YARN)
        return;
    if (r->original > 0)
        put_size(k, "rope.scaling.original_context_length", (int64_t)r->original);
    if (r->beta_fast > 0)
        put_real(k, "rope.scaling.yarn_beta_fast", r->beta_fast);
    if (r->beta_slow > 0)
        put_real(k, "rope.scaling.yarn_beta_slow", r->beta_slow);
    if (r->mscale_all > 0) /* llama.cpp takes a tenth of it here */
        put_real(k, "rope.scaling.yarn_log_multiplier", 0.1 * r->mscale_all);
}

static void put_experts(keys *k, const moec_gguf_model *x)
{
    const moec_dims *d = &x->m->dims;
    const moec_gguf_rules *r = x->rules;
    put_size(k, "feed_forward_length", r->expert_width && d->dense_width > 0 ? d->dense_width : d->expert_width);
    put_size(k, "expert_count", d->experts);
    put_size(k, "expert_used_count", d->top_k);
    if (r->expert_width)
        put_size(k, "expert_feed_forward_length", d->expert_width);
    if (d->shared_width > 0 && !r->routing_keys)
        put_size(k, "expert_shared_feed_forward_length", d->shared_width);
    if (r->dense_first)
        put_size(k, "leading_dense_block_count", dense_layers(x->m));
    if (!r->routing_keys)
        return;
    put_size(k, "expert_shared_count", d->shared_width / d->expert_width);
    put_size(k, "expert_gating_func", x->m->family->score == MOEC_SCORE_SIGMOID ? 2 : 1);
    put_real(k, "expert_weights_scale", d->route_scale);
    moec_gguf_put_bool(k->g, named(k, "expert_weights_norm"), d->renorm);
    if (d->groups > 1) {
        put_size(k, "expert_group_count", d->groups);
        put_size(k, "expert_group_used_count", d->top_groups);
    }
}

/* llama.h's llama_ftype: the type that most values of matrices have. */
static uint32_t file_type(const moec_gguf_model *x)
{
    static const struct {
        uint32_t type, file;
    } known[] = {{MOEC_GGML_F32, 0}, {MOEC_GGML_F16, 1}, {MOEC_GGML_Q4_0, 2}, {MOEC_GGML_Q4_1, 3}, {MOEC_GGML_Q8_0, 7},
                 {MOEC_GGML_Q5_0, 8}, {MOEC_GGML_Q5_1, 9}, {MOEC_GGML_Q2_K, 10}, {MOEC_GGML_Q3_K, 12}, {MOEC_GGML_Q4_K, 15},
                 {MOEC_GGML_Q5_K, 17}, {MOEC_GGML_Q6_K, 18}, {MOEC_GGML_IQ4_NL, 25}, {MOEC_GGML_IQ4_XS, 30}, {MOEC_GGML_BF16, 32},
                 {MOEC_GGML_TQ1_0, 36}, {MOEC_GGML_TQ2_0, 37}, {MOEC_GGML_MXFP4, 38}};
    double values[MOEC_GGML_COUNT] = {0}, most = -1.0;
    uint32_t file = 0;
    for (size_t i = 0; i < x->n; i++) {
        const moec_gguf_tensor *t = &x->source[i].what;
        if (moec_gguf_model_matrix(x, i))
            values[t->type] += (double)t->dim[0] * (double)t->dim[1] * (double)t->dim[2];
    }
    for (size_t i = 0; i < MOEC_COUNT(known); i++)
        if (values[known[i].type] > most) {
            most = values[known[i].type];
            file = known[i].file;
        }
    return file;
}

void moec_gguf_model_describe(moec_gguf_out *g, const moec_gguf_model *x, const char *name)
{
    const moec_dims *d = &x->m->dims;
    keys k = {.g = g, .arch = x->rules->arch};
    moec_gguf_put_text(g, "general.architecture", k.arch);
    moec_gguf_put_text(g, "general.type", "model");
    moec_gguf_put_text(g, "general.name", name);
    moec_gguf_put_u32(g, "general.file_type", file_type(x));
    moec_gguf_put_u32(g, "general.quantization_version", 2);
    put_size(&k, "block_count", d->layers);
    put_size(&k, "context_length", d->rope.max_positions);
    put_size(&k, "embedding_length", d->hidden);
    put_size(&k, "vocab_size", d->vocab);
    put_attention(&k, x);
    put_rope(&k, &d->rope);
    put_experts(&k, x);
    for (size_t i = 0; i < x->n; i++) {
        const moec_gguf_tensor *t = &x->source[i].what;
        moec_gguf_put_tensor(g, t->name, t->type, t->rank, t->dim);
    }
}
