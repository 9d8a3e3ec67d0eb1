/* Binds the tensors of a checkpoint to the roles its family names, once, with strict shapes. */
#include "model/model.h"

#include "base/mem.h"
#include "model/config.h"

#include <stdio.h>
#include <string.h>

/* A name template's first %d is the layer, its second the expert. */
static void expand(char *buf, size_t cap, const char *pattern, int64_t layer, int64_t expert)
{
    size_t n = 0;
    int64_t next = layer;
    for (const char *p = pattern; *p && n + 1 < cap; p++) {
        if (p[0] == '%' && p[1] == 'd') {
            int used = snprintf(buf + n, cap - n, "%lld", (long long)next);
            n += used > 0 ? (size_t)used : 0;
            next = expert;
            p++;
        } else {
            buf[n++] = *p;
        }
    }
    buf[n < cap ? n : cap - 1] = '\0';
}

typedef struct binder {
    moec_model *m;
    int64_t layer, expert;
} binder;

static moec_status bind(const moec_tensor **out, const binder *b, const char *pattern, int rank, int64_t d0, int64_t d1,
                        moec_err *err)
{
    char name[512], have[160], want[160];
    const int64_t dim[2] = {d0, d1};
    expand(name, sizeof name, pattern, b->layer, b->expert);
    const moec_tensor *t = moec_ckpt_find(b->m->ckpt, name);
    if (!t)
        return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is missing", moec_ckpt_dir(b->m->ckpt), name);
    if (t->rank != rank || t->dim[0] != d0 || (rank == 2 && t->dim[1] != d1))
        return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is %s, expected %s", moec_ckpt_dir(b->m->ckpt), name,
                         moec_shape_text(have, sizeof have, t->rank, t->dim),
                         moec_shape_text(want, sizeof want, rank, dim));
    if (t->dtype != MOEC_F32 && t->dtype != MOEC_F16 && t->dtype != MOEC_BF16)
        return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is %s, expected F32, F16 or BF16", moec_ckpt_dir(b->m->ckpt),
                         name, moec_dtypes[t->dtype].name);
    *out = t;
    return MOEC_OK;
}

/* "a.q_proj.weight" has its bias, if any, in "a.q_proj.bias". */
static moec_status bind_bias(const moec_tensor **out, const binder *b, const char *pattern, int64_t n, moec_err *err)
{
    static const char tail[] = ".weight";
    char bias[256], name[512];
    size_t len = strlen(pattern), cut = sizeof tail - 1;
    *out = NULL;
    if (len < cut || len >= sizeof bias || strcmp(pattern + len - cut, tail) != 0)
        return MOEC_OK;
    snprintf(bias, sizeof bias, "%.*s.bias", (int)(len - cut), pattern);
    expand(name, sizeof name, bias, b->layer, b->expert);
    if (!moec_ckpt_find(b->m->ckpt, name))
        return MOEC_OK;
    return bind(out, b, bias, 1, n, 0, err);
}

static moec_status bind_attention(moec_layer *l, const binder *b, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_family *f = b->m->family;
    const moec_dims *d = &b->m->dims;
    int64_t q = d->heads * d->head_dim, kv = d->kv_heads * d->head_dim;
    MOEC_TRY(bind(&l->norm_attn, b, f->norm_attn, 1, d->hidden, 0, err));
    MOEC_TRY(bind(&l->norm_mlp, b, f->norm_mlp, 1, d->hidden, 0, err));
    MOEC_TRY(bind(&l->q, b, f->q, 2, q, d->hidden, err));
    MOEC_TRY(bind(&l->k, b, f->k, 2, kv, d->hidden, err));
    MOEC_TRY(bind(&l->v, b, f->v, 2, kv, d->hidden, err));
    MOEC_TRY(bind(&l->o, b, f->o, 2, d->hidden, q, err));
    MOEC_TRY(bind_bias(&l->q_bias, b, f->q, q, err));
    MOEC_TRY(bind_bias(&l->k_bias, b, f->k, kv, err));
    MOEC_TRY(bind_bias(&l->v_bias, b, f->v, kv, err));
    MOEC_TRY(bind_bias(&l->o_bias, b, f->o, d->hidden, err));
    if (f->q_norm)
        MOEC_TRY(bind(&l->q_norm, b, f->q_norm, 1, d->head_dim, 0, err));
    if (f->k_norm)
        MOEC_TRY(bind(&l->k_norm, b, f->k_norm, 1, d->head_dim, 0, err));
done:
    return st;
}

static moec_status bind_mlp(moec_mlp *mlp, const binder *b, const char *gate, const char *up, const char *down,
                            int64_t width, moec_err *err)
{
    moec_status st = MOEC_OK;
    int64_t h = b->m->dims.hidden;
    MOEC_TRY(bind(&mlp->gate, b, gate, 2, width, h, err));
    MOEC_TRY(bind(&mlp->up, b, up, 2, width, h, err));
    MOEC_TRY(bind(&mlp->down, b, down, 2, h, width, err));
done:
    return st;
}

static moec_status bind_layer(moec_model *m, int64_t i, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_layer *l = &m->layer[i];
    const moec_family *f = m->family;
    const moec_dims *d = &m->dims;
    binder b = {m, i, 0};
    l->index = i;
    l->moe_index = -1;
    MOEC_TRY(bind_attention(l, &b, err));
    if (moec_config_is_dense(f, moec_ckpt_config(m->ckpt), i)) {
        if (d->dense_width < 1)
            MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "%s: config.json: %s is missing, layer %lld has no router and needs it",
                               moec_ckpt_dir(m->ckpt), f->key_dense_width, (long long)i));
        MOEC_TRY(bind_mlp(&l->dense, &b, f->dense_gate, f->dense_up, f->dense_down, d->dense_width, err));
        goto done;
    }
    l->moe_index = m->moe_layers++;
    MOEC_TRY(bind(&l->router, &b, f->router, 2, d->experts, d->hidden, err));
    MOEC_TRY(MOEC_NEW(l->expert, (size_t)d->experts, err));
    for (b.expert = 0; b.expert < d->experts; b.expert++)
        MOEC_TRY(bind_mlp(&l->expert[b.expert], &b, f->expert_gate, f->expert_up, f->expert_down, d->expert_width, err));
    /* One expert more than the config counts means that the config is not of these tensors. */
    char name[512];
    expand(name, sizeof name, f->expert_gate, i, d->experts);
    if (moec_ckpt_find(m->ckpt, name))
        st = moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is there, but config.json counts %lld experts",
                       moec_ckpt_dir(m->ckpt), name, (long long)d->experts);
done:
    return st;
}

static moec_status find_family(const moec_family **out, const moec_ckpt *c, moec_err *err)
{
    const char *type = moec_json_string(moec_json_get(moec_ckpt_config(c), "model_type"));
    char known[512] = "";
    if (!type)
        return moec_fail(err, MOEC_EFORMAT, "%s/config.json: model_type is missing", moec_ckpt_dir(c));
    *out = moec_family_find(type);
    if (*out)
        return MOEC_OK;
    const moec_family *f;
    for (int i = 0; (f = moec_family_at(i)) != NULL; i++) {
        size_t n = strlen(known);
        snprintf(known + n, sizeof known - n, "%s%s", i ? ", " : "", f->model_type);
    }
    return moec_fail(err, MOEC_EFORMAT, "%s/config.json: model_type %.60s is not known; known are: %s", moec_ckpt_dir(c),
                     type, known);
}

moec_status moec_model_open(moec_model **out, const char *dir, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_model *m = NULL;
    *out = NULL;
    MOEC_TRY(MOEC_NEW(m, 1, err));
    MOEC_TRY(moec_ckpt_open(&m->ckpt, dir, err));
    MOEC_TRY(find_family(&m->family, m->ckpt, err));
    const moec_family *f = m->family;
    moec_dims *d = &m->dims;
    st = moec_config_read(d, &m->key_experts, &m->key_top_k, f, moec_ckpt_config(m->ckpt), err);
    MOEC_TRY(moec_within(err, st, "%s", moec_ckpt_dir(m->ckpt)));
    binder b = {m, 0, 0};
    MOEC_TRY(bind(&m->embed, &b, f->embed, 2, d->vocab, d->hidden, err));
    MOEC_TRY(bind(&m->final_norm, &b, f->final_norm, 1, d->hidden, 0, err));
    m->head = m->embed;
    if (!d->tied)
        MOEC_TRY(bind(&m->head, &b, f->head, 2, d->vocab, d->hidden, err));
    MOEC_TRY(MOEC_NEW(m->layer, (size_t)d->layers, err));
    for (int64_t i = 0; i < d->layers; i++)
        MOEC_TRY(bind_layer(m, i, err));
    if (m->moe_layers == 0)
        MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "%s: no layer has a router, nothing to do here", dir));
    *out = m;
    m = NULL;
done:
    moec_model_close(m);
    return st;
}

void moec_model_close(moec_model *m)
{
    if (!m)
        return;
    for (int64_t i = 0; m->layer && i < m->dims.layers; i++)
        moec_free(m->layer[i].expert);
    moec_free(m->layer);
    moec_ckpt_close(m->ckpt);
    moec_free(m);
}

static void place(moec_place *all, const moec_model *m, const moec_tensor *t, moec_role role, int64_t layer,
                  int64_t expert)
{
    all[t - moec_ckpt_at(m->ckpt, 0)] = (moec_place){role, layer, expert};
}

moec_status moec_model_places(moec_place **out, const moec_model *m, moec_err *err)
{
    moec_status st = MOEC_NEW(*out, moec_ckpt_count(m->ckpt), err);
    if (st != MOEC_OK)
        return st;
    for (int64_t i = 0; i < m->dims.layers; i++) {
        const moec_layer *l = &m->layer[i];
        if (!l->router)
            continue;
        place(*out, m, l->router, MOEC_ROLE_ROUTER, i, -1);
        for (int64_t e = 0; e < m->dims.experts; e++) {
            place(*out, m, l->expert[e].gate, MOEC_ROLE_EXPERT, i, e);
            place(*out, m, l->expert[e].up, MOEC_ROLE_EXPERT, i, e);
            place(*out, m, l->expert[e].down, MOEC_ROLE_EXPERT, i, e);
        }
    }
    return MOEC_OK;
}

moec_status moec_model_rename_expert(char **out, const moec_model *m, const moec_tensor *t, moec_place at,
                                     int64_t new_expert, moec_err *err)
{
    const char *const pattern[] = {m->family->expert_gate, m->family->expert_up, m->family->expert_down};
    char name[512];
    *out = NULL;
    for (size_t i = 0; i < MOEC_COUNT(pattern); i++) {
        expand(name, sizeof name, pattern[i], at.layer, at.expert);
        if (strcmp(name, t->name) != 0)
            continue;
        expand(name, sizeof name, pattern[i], at.layer, new_expert);
        return moec_copy(out, name, strlen(name), err);
    }
    return moec_fail(err, MOEC_EINVAL, "tensor %s is not of layer %lld, expert %lld", t->name, (long long)at.layer,
                     (long long)at.expert);
}

static uint64_t values(const moec_tensor *t)
{
    return t->bytes / (uint64_t)moec_dtypes[t->dtype].bytes;
}

moec_status moec_model_sizes(moec_sizes *out, const moec_model *m, moec_err *err)
{
    moec_place *all;
    moec_status st = moec_model_places(&all, m, err);
    if (st != MOEC_OK)
        return st;
    memset(out, 0, sizeof *out);
    for (size_t i = 0; i < moec_ckpt_count(m->ckpt); i++) {
        const moec_tensor *t = moec_ckpt_at(m->ckpt, i);
        out->total += values(t);
        out->bytes += t->bytes;
        if (all[i].role == MOEC_ROLE_EXPERT) {
            out->routed += values(t);
            out->routed_bytes += t->bytes;
        }
    }
    uint64_t unused = (uint64_t)(m->dims.experts - m->dims.top_k), experts = (uint64_t)m->dims.experts;
    out->active = out->total - out->routed / experts * unused;
    if (!m->dims.tied)
        out->active -= values(m->embed); /* one row of it is looked up; tied, it is the head and is used */
    moec_free(all);
    return MOEC_OK;
}
