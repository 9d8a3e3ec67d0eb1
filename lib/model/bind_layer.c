/* See bind.h: what a layer has besides experts. */
#include "model/bind.h"

#include "model/config.h"

#include <string.h>

/* A matrix of the family's names, with its bias. */
static moec_status take(moec_layer *l, const moec_binder *b, moec_mat which, int64_t rows, int64_t cols, moec_err *err)
{
    const char *pattern = b->m->family->mat[which];
    moec_status st = moec__bind_matrix(&l->mat[which], b, pattern, rows, cols, err);
    return st == MOEC_OK ? moec__bind_bias(&l->bias[which], b, pattern, rows, err) : st;
}

/* A vector of n values; `needed`: an error when it is not there. */
static moec_status take_vec(moec_layer *l, const moec_binder *b, moec_vec which, int64_t n, bool needed, moec_err *err)
{
    const char *pattern = b->m->family->vec[which];
    if (!pattern || (!needed && !moec__find(b, pattern)))
        return MOEC_OK;
    return moec__bind(&l->vec[which], b, pattern, 1, &n, err);
}

/* --- attention ------------------------------------------------------------------------------------------------------- */

/* Norm of q or k: per head, or over all heads when it is that long. */
static moec_status take_head_norm(moec_layer *l, const moec_binder *b, moec_vec which, int64_t heads, moec_err *err)
{
    const moec_tensor *t = moec__find(b, b->m->family->vec[which]);
    const int64_t d = b->m->dims.head_dim;
    return take_vec(l, b, which, t && t->rank == 1 && t->dim[0] != d ? heads * d : d, false, err);
}

/* q, k and v in one matrix, or k and v where queries come from elsewhere. */
static moec_status take_joined(moec_layer *l, const moec_binder *b, int64_t q, int64_t k, int64_t v, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_weight all;
    const moec_tensor *bias;
    MOEC_TRY(moec__bind_matrix(&all, b, b->m->family->qkv, q + k + v, b->m->dims.hidden, err));
    MOEC_TRY(moec__bind_bias(&bias, b, b->m->family->qkv, q + k + v, err));
    if (bias)
        MOEC_TRY(moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is not known", moec_ckpt_dir(b->m->ckpt), bias->name));
    if (q > 0)
        MOEC_TRY(moec__cut(&l->mat[MOEC_MAT_Q], &all, b, 0, q, err));
    MOEC_TRY(moec__cut(&l->mat[MOEC_MAT_K], &all, b, q, k, err));
    MOEC_TRY(moec__cut(&l->mat[MOEC_MAT_V], &all, b, q + k, v, err));
done:
    return st;
}

static moec_status bind_attention(moec_layer *l, const moec_binder *b, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_family *f = b->m->family;
    const moec_dims *d = &b->m->dims;
    const int64_t q = d->heads * d->head_dim, k = d->kv_heads * d->head_dim, v = d->kv_heads * d->value_dim;
    if (f->qkv) {
        MOEC_TRY(take_joined(l, b, q, k, v, err));
    } else {
        MOEC_TRY(take(l, b, MOEC_MAT_Q, f->gate_in_q ? 2 * q : q, d->hidden, err));
        MOEC_TRY(take(l, b, MOEC_MAT_K, k, d->hidden, err));
        MOEC_TRY(take(l, b, MOEC_MAT_V, v, d->hidden, err));
    }
    if (moec_ckpt_gguf(b->m->ckpt) && f->gguf.permute)
        l->mat[MOEC_MAT_Q].paired = l->mat[MOEC_MAT_K].paired = (int32_t)d->head_dim; /* even: the rope has been read */
    MOEC_TRY(take(l, b, MOEC_MAT_O, d->hidden, d->heads * d->value_dim, err));
    if (f->mat[MOEC_MAT_ATTN_GATE])
        MOEC_TRY(take(l, b, MOEC_MAT_ATTN_GATE, d->heads * d->value_dim, d->hidden, err));
    MOEC_TRY(take_head_norm(l, b, MOEC_VEC_Q_NORM, d->heads, err));
    MOEC_TRY(take_head_norm(l, b, MOEC_VEC_K_NORM, d->kv_heads, err));
    MOEC_TRY(take_vec(l, b, MOEC_VEC_SINKS, d->heads, true, err));
done:
    return st;
}

static moec_status bind_latent(moec_layer *l, const moec_binder *b, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_dims *d = &b->m->dims;
    if (d->q_rank > 0) {
        MOEC_TRY(take(l, b, MOEC_MAT_Q_A, d->q_rank, d->hidden, err));
        MOEC_TRY(take_vec(l, b, MOEC_VEC_Q_A_NORM, d->q_rank, true, err));
        MOEC_TRY(take(l, b, MOEC_MAT_Q_B, d->heads * d->head_dim, d->q_rank, err));
    } else {
        MOEC_TRY(take(l, b, MOEC_MAT_Q, d->heads * d->head_dim, d->hidden, err));
    }
    MOEC_TRY(take(l, b, MOEC_MAT_KV_A, d->kv_rank + d->head_dim - d->nope_dim, d->hidden, err));
    MOEC_TRY(take_vec(l, b, MOEC_VEC_KV_A_NORM, d->kv_rank, true, err));
    MOEC_TRY(take(l, b, MOEC_MAT_KV_B, d->heads * (d->nope_dim + d->value_dim), d->kv_rank, err));
    MOEC_TRY(take(l, b, MOEC_MAT_O, d->hidden, d->heads * d->value_dim, err));
done:
    return st;
}

/* [experts, kv*d, H] and [experts, H, kv*d] of JetMoE's attention experts; keys and values are shared. */
static moec_status bind_heads(moec_layer *l, const moec_binder *b, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_family *f = b->m->family;
    const moec_dims *d = &b->m->dims;
    const int64_t kv = d->kv_heads * d->head_dim, in[3] = {d->experts, kv, d->hidden}, out[3] = {d->experts, d->hidden, kv};
    MOEC_TRY(take_joined(l, b, 0, kv, kv, err));
    MOEC_TRY(moec__bind_router(l, b, MOEC_MAT_HEADS_ROUTER, d->experts, err));
    if (l->bias[MOEC_MAT_HEADS_ROUTER])
        MOEC_TRY(moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is not known", moec_ckpt_dir(b->m->ckpt),
                           l->bias[MOEC_MAT_HEADS_ROUTER]->name));
    MOEC_TRY(moec__bind(&l->heads_in, b, f->heads_in, 3, in, err));
    MOEC_TRY(moec__bind(&l->heads_out, b, f->heads_out, 3, out, err));
    MOEC_TRY(take_vec(l, b, MOEC_VEC_HEADS_BIAS, d->hidden, false, err));
done:
    return st;
}

/* --- other mixers ---------------------------------------------------------------------------------------------------- */

static moec_status take_conv(moec_layer *l, const moec_binder *b, int64_t channels, moec_err *err)
{
    const int64_t dim[3] = {channels, 1, b->m->dims.conv_taps};
    return moec__bind(&l->vec[MOEC_VEC_CONV], b, b->m->family->vec[MOEC_VEC_CONV], 3, dim, err);
}

static moec_status bind_conv(moec_layer *l, const moec_binder *b, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t H = b->m->dims.hidden;
    MOEC_TRY(take(l, b, MOEC_MAT_CONV_IN, 3 * H, H, err));
    MOEC_TRY(take_conv(l, b, H, err));
    MOEC_TRY(take(l, b, MOEC_MAT_CONV_OUT, H, H, err));
done:
    return st;
}

static moec_status bind_delta(moec_layer *l, const moec_binder *b, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_dims *d = &b->m->dims;
    const int64_t k = d->delta_key_heads * d->delta_key_dim, v = d->delta_value_heads * d->delta_value_dim;
    const int64_t heads = d->delta_value_heads, H = d->hidden;
    if (!b->m->family->mat[MOEC_MAT_DELTA_QKV] || moec__find(b, b->m->family->mat[MOEC_MAT_DELTA_QKVZ])) {
        MOEC_TRY(take(l, b, MOEC_MAT_DELTA_QKVZ, 2 * k + 2 * v, H, err));
        MOEC_TRY(take(l, b, MOEC_MAT_DELTA_BA, 2 * heads, H, err));
    } else {
        MOEC_TRY(take(l, b, MOEC_MAT_DELTA_QKV, 2 * k + v, H, err));
        MOEC_TRY(take(l, b, MOEC_MAT_DELTA_Z, v, H, err));
        MOEC_TRY(take(l, b, MOEC_MAT_DELTA_B, heads, H, err));
        MOEC_TRY(take(l, b, MOEC_MAT_DELTA_A, heads, H, err));
    }
    MOEC_TRY(take_conv(l, b, 2 * k + v, err));
    MOEC_TRY(take_vec(l, b, MOEC_VEC_DELTA_A_LOG, heads, true, err));
    MOEC_TRY(take_vec(l, b, MOEC_VEC_DELTA_DT_BIAS, heads, true, err));
    MOEC_TRY(take_vec(l, b, MOEC_VEC_DELTA_NORM, d->delta_value_dim, true, err));
    MOEC_TRY(take(l, b, MOEC_MAT_DELTA_OUT, H, v, err));
done:
    return st;
}

static moec_status bind_mixer(moec_layer *l, const moec_binder *b, moec_err *err)
{
    static moec_status (*const binders[])(moec_layer *, const moec_binder *, moec_err *) = {
        [MOEC_MIXER_ATTENTION] = bind_attention, [MOEC_MIXER_LATENT] = bind_latent, [MOEC_MIXER_CONV] = bind_conv,
        [MOEC_MIXER_DELTA] = bind_delta, [MOEC_MIXER_HEADS] = bind_heads};
    return binders[l->mixer](l, b, err);
}

/* --- feed-forward ---------------------------------------------------------------------------------------------------- */

/* Shared experts: as wide as their tensors say, which must be what the config says where it does. */
static moec_status bind_shared(moec_layer *l, const moec_binder *b, moec_dims *dims, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_family *f = b->m->family;
    const int64_t H = dims->hidden;
    const moec_tensor *joined = moec__find(b, f->shared_gate_up), *gate = moec__find(b, f->mat[MOEC_MAT_SHARED_GATE]);
    int64_t width = dims->shared_width, count;
    if (!f->mat[MOEC_MAT_SHARED_DOWN] || (!joined && !gate && width == 0))
        return MOEC_OK;
    for (int i = 0; width == 0 && i < MOEC_KEY_ALIASES && f->key_shared_count[i]; i++)
        if (moec_json_int(moec_json_path(b->m->config, f->key_shared_count[i]), &count) && count == 0)
            return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is there, but by config.json %s is 0",
                             moec_ckpt_dir(b->m->ckpt), (joined ? joined : gate)->name, f->key_shared_count[i]);
    if (width == 0)
        width = joined ? moec__rows(joined) / 2 : moec__rows(gate);
    if (f->shared_gate_up) {
        moec_weight all;
        MOEC_TRY(moec__bind_matrix(&all, b, f->shared_gate_up, 2 * width, H, err));
        MOEC_TRY(moec__cut(&l->mat[MOEC_MAT_SHARED_GATE], &all, b, 0, width, err));
        MOEC_TRY(moec__cut(&l->mat[MOEC_MAT_SHARED_UP], &all, b, width, width, err));
    } else {
        MOEC_TRY(take(l, b, MOEC_MAT_SHARED_GATE, width, H, err));
        MOEC_TRY(take(l, b, MOEC_MAT_SHARED_UP, width, H, err));
    }
    MOEC_TRY(take(l, b, MOEC_MAT_SHARED_DOWN, H, width, err));
    if (f->mat[MOEC_MAT_SHARED_MIX])
        MOEC_TRY(moec__bind_matrix(&l->mat[MOEC_MAT_SHARED_MIX], b, f->mat[MOEC_MAT_SHARED_MIX], 1, H, err)); /* no bias */
    dims->shared_width = width;
done:
    return st;
}

static moec_status bind_dense(moec_layer *l, const moec_binder *b, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_dims *d = &b->m->dims;
    const moec_tensor *router = moec__find(b, b->m->family->mat[MOEC_MAT_ROUTER]);
    if (router)
        return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is there, but layer %lld has no router by config.json",
                         moec_ckpt_dir(b->m->ckpt), router->name, (long long)l->index);
    if (d->dense_width < 1)
        return moec_fail(err, MOEC_EFORMAT, "%s: config.json: %s is missing, layer %lld has no router and needs it",
                         moec_ckpt_dir(b->m->ckpt),
                         b->m->family->key_dense_width ? b->m->family->key_dense_width : "its width", (long long)l->index);
    MOEC_TRY(take(l, b, MOEC_MAT_DENSE_GATE, d->dense_width, d->hidden, err));
    MOEC_TRY(take(l, b, MOEC_MAT_DENSE_UP, d->dense_width, d->hidden, err));
    MOEC_TRY(take(l, b, MOEC_MAT_DENSE_DOWN, d->hidden, d->dense_width, err));
done:
    return st;
}

moec_status moec__bind_layer(moec_layer *l, const moec_binder *b, moec_dims *dims, moec_err *err)
{
    static const struct { moec_vec which; bool needed; } norms[] = {
        {MOEC_VEC_NORM_ATTN, true}, {MOEC_VEC_NORM_ATTN_BIAS, false}, {MOEC_VEC_NORM_MLP, true},
        {MOEC_VEC_NORM_MLP_BIAS, false}, {MOEC_VEC_POST_ATTN, true}, {MOEC_VEC_POST_MLP, true}};
    moec_status st = MOEC_OK;
    moec_config_layer(l, b->m);
    for (size_t i = 0; i < MOEC_COUNT(norms); i++)
        MOEC_TRY(take_vec(l, b, norms[i].which, dims->hidden, norms[i].needed, err));
    MOEC_TRY(bind_mixer(l, b, err));
    if (moec_config_is_dense(b->m, l->index)) {
        MOEC_TRY(bind_dense(l, b, err));
        goto done;
    }
    MOEC_TRY(moec__bind_experts(l, b, err));
    MOEC_TRY(bind_shared(l, b, dims, err));
    MOEC_TRY(take_vec(l, b, MOEC_VEC_MOE_BIAS, dims->hidden, false, err));
done:
    return st;
}
