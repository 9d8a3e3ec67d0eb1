/* Opens a folder, finds its family and binds its tensors to the roles the family names, once, with strict shapes. */
#include "model/model.h"

#include "base/mem.h"
#include "base/word.h"
#include "model/bind.h"
#include "model/config.h"
#include "model/forward.h"
#include "model/gguf_open.h"

#include <stdio.h>
#include <string.h>

/* The known model_type that looks most like one that is not known; NULL: none does. */
static const char *nearest_type(const char *type)
{
    enum { MOST = 256 };
    const char *names[MOST];
    size_t n = 0;
    const moec_family *f;
    for (int i = 0; (f = moec_family_at(i)) != NULL && n + 1 + MOEC_COUNT(f->alias) < MOST; i++) {
        names[n++] = f->model_type;
        for (size_t k = 0; k < MOEC_COUNT(f->alias) && f->alias[k]; k++)
            names[n++] = f->alias[k];
    }
    const char *near = moec_word_nearest(type, names, n);
    /* "llama" is no misspelt "llama4" but a model without experts */
    return near && strncmp(near, type, strlen(type)) == 0 ? NULL : near;
}

static moec_status find_family(const moec_family **out, const moec_ckpt *c, moec_err *err)
{
    const moec_json *config = moec_ckpt_config(c);
    const char *type = moec_json_string(moec_json_get(config, "model_type"));
    *out = moec_family_of(config);
    if (*out)
        return MOEC_OK;
    if (!type)
        return moec_fail(err, MOEC_EFORMAT, "%s/config.json: model_type is missing", moec_ckpt_dir(c));
    const char *near = nearest_type(type);
    return moec_fail(err, MOEC_EFORMAT, "%s/config.json: model_type %.60s is no Mixture-of-Experts family that is read%s%s; "
                     "`moecompress families` lists them", moec_ckpt_dir(c), type, near ? "; did you mean " : "",
                     near ? near : "");
}

/* Text-only checkpoints say "model.", multimodal ones put their language model under another name. */
static void find_prefix(moec_model *m)
{
    static const char *const prefixes[] = {"model.", "model.language_model.", "language_model.model."};
    const moec_binder b = {.m = m};
    for (size_t i = 0; i < MOEC_COUNT(prefixes); i++) {
        m->prefix = prefixes[i];
        if (moec__find(&b, m->family->embed))
            return;
    }
    m->prefix = prefixes[0];
}

/* Tied: as config.json says (the whole one, whose head it is, before the text model's), else when there is no head. */
static moec_status bind_head(moec_model *m, const moec_binder *b, moec_err *err)
{
    moec_dims *d = &m->dims;
    bool biased;
    const moec_json *said = moec_json_get(moec_ckpt_config(m->ckpt), "tie_word_embeddings");
    if (moec_json_absent(said))
        said = moec_json_get(m->config, "tie_word_embeddings");
    d->tied = !moec__find(b, m->family->head);
    if (!moec_json_absent(said) && !moec_json_bool(said, &d->tied))
        return moec_fail(err, MOEC_EFORMAT, "%s: config.json: tie_word_embeddings is neither true nor false",
                         moec_ckpt_dir(m->ckpt));
    m->head = m->embedding;
    moec_status st = d->tied ? MOEC_OK : moec__bind_matrix(&m->head, b, m->family->head, d->vocab, d->hidden, err);
    if (st == MOEC_OK)
        st = moec__bind_bias(&m->head_bias, b, m->family->head, d->vocab, err);
    if (st == MOEC_OK && moec_json_bool(moec_json_get(m->config, "lm_head_bias"), &biased) && biased && !m->head_bias)
        st = moec_fail(err, MOEC_ESHAPE, "%s: config.json: lm_head_bias is true, but the head has no bias",
                       moec_ckpt_dir(m->ckpt));
    return st;
}

/* Multi-token-prediction layers: as many as there are tensors of; what config.json counts may not be in the files. */
static moec_status bind_mtp(moec_model *m, const moec_binder *at, moec_err *err)
{
    enum { MOST = 16 };
    moec_status st = MOEC_OK;
    const moec_family *f = m->family;
    moec_binder b = *at;
    if (!f->key_mtp[0] && !f->mtp_layer)
        return MOEC_OK;
    MOEC_TRY(MOEC_NEW(m->mtp, MOST, err));
    b.mtp_layer = f->mtp_layer;
    for (int64_t i = 0; i < MOST; i++) {
        b.layer = f->mtp_layer ? i : m->dims.layers + i;
        if (!moec__find(&b, f->mat[MOEC_MAT_ROUTER]) && !moec__layout(&b))
            continue; /* none, or a dense one */
        moec_layer *l = &m->mtp[m->mtp_layers++];
        l->index = b.layer;
        l->moe_index = -1;
        MOEC_TRY(moec__bind_experts(l, &b, err));
    }
    int64_t said = m->mtp_layers; /* numbered as the others are, they could be layers that the config does not count */
    if (!f->mtp_layer && m->key_mtp && moec_json_int(moec_json_path(m->config, m->key_mtp), &said) && said < m->mtp_layers)
        st = moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is there, but config.json counts %lld layers and %lld of multi-token "
                       "prediction", moec_ckpt_dir(m->ckpt), m->mtp[said].mat[MOEC_MAT_ROUTER].of->name,
                       (long long)m->dims.layers, (long long)said);
done:
    return st;
}

/* A layer behind the last is one that would be left out in silence, unless it is of multi-token prediction. */
static moec_status no_more_layers(const moec_model *m, const moec_binder *at, moec_err *err)
{
    moec_binder b = *at;
    const moec_family *f = m->family;
    b.layer = m->dims.layers;
    const char *norm = f->vec[MOEC_VEC_NORM_MLP] ? f->vec[MOEC_VEC_NORM_MLP] : f->vec[MOEC_VEC_POST_MLP];
    const moec_tensor *more = moec__find(&b, norm);
    if (!more || (f->key_mtp[0] && !f->mtp_layer))
        return MOEC_OK;
    return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is there, but config.json counts %lld layers", moec_ckpt_dir(m->ckpt),
                     more->name, (long long)m->dims.layers);
}

static moec_status list_sets(moec_model *m, moec_err *err)
{
    const moec_dims *d = &m->dims;
    moec_status st = MOEC_NEW(m->set, (size_t)(2 * d->layers + m->mtp_layers), err);
    if (st != MOEC_OK)
        return st;
    for (int64_t i = 0; i < d->layers; i++)
        if (m->layer[i].expert)
            m->set[m->sets++] = (moec_set){MOEC_SET_MOE, i, &m->layer[i].mat[MOEC_MAT_ROUTER]};
    for (int64_t i = 0; i < d->layers; i++)
        if (m->layer[i].heads_in)
            m->set[m->sets++] = (moec_set){MOEC_SET_HEADS, i, &m->layer[i].mat[MOEC_MAT_HEADS_ROUTER]};
    for (int64_t i = 0; i < m->mtp_layers; i++)
        m->set[m->sets++] = (moec_set){MOEC_SET_MTP, m->mtp[i].index, &m->mtp[i].mat[MOEC_MAT_ROUTER]};
    return MOEC_OK;
}

/* Queries and keys are both normed by head, or both over all heads. */
static moec_status same_norms(const moec_model *m, const moec_layer *l, moec_err *err)
{
    const moec_tensor *q = l->vec[MOEC_VEC_Q_NORM], *k = l->vec[MOEC_VEC_K_NORM];
    const moec_dims *d = &m->dims;
    if (!q || !k || d->heads == 1 || k->dim[0] == (q->dim[0] == d->head_dim ? 1 : d->kv_heads) * d->head_dim)
        return MOEC_OK;
    return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s has %lld values beside %lld of %s: one is by head, the other is not",
                     moec_ckpt_dir(m->ckpt), k->name, (long long)k->dim[0], (long long)q->dim[0], q->name);
}

/* Optional tensors are used when they are there; then all layers of a kind must have them, else the checkpoint is
 * damaged. The feed-forward part is compared with a layer that is dense or not as this one is, the rest with any of the
 * same mixer. */
static moec_status same_parts(const moec_model *m, const moec_layer *l, const moec_layer *mixes, const moec_layer *feeds,
                              moec_err *err)
{
    const moec_tensor *have = NULL, *want = NULL;
    const moec_layer *first = mixes;
    for (int i = 0; i < MOEC_VEC_COUNT && !have && !want; i++) {
        first = i == MOEC_VEC_SELECTION_BIAS || i == MOEC_VEC_MOE_BIAS ? feeds : mixes;
        if (!l->vec[i] != !first->vec[i]) {
            have = l->vec[i];
            want = first->vec[i];
        }
    }
    for (int i = 0; i < MOEC_MAT_COUNT && !have && !want; i++) {
        first = i < MOEC_MAT_ROUTER ? mixes : feeds;
        if (!l->bias[i] != !first->bias[i] || !l->mat[i].of != !first->mat[i].of) {
            have = l->bias[i] && !first->bias[i] ? l->bias[i] : l->mat[i].of && !first->mat[i].of ? l->mat[i].of : NULL;
            want = have ? NULL : first->bias[i] && !l->bias[i] ? first->bias[i] : first->mat[i].of;
        }
    }
    if (have || want)
        return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is there, but layer %lld, which is of the same kind, has no such "
                         "tensor", moec_ckpt_dir(m->ckpt), have ? have->name : want->name,
                         (long long)(have ? first->index : l->index));
    if (!l->vec[MOEC_VEC_Q_NORM] != !l->vec[MOEC_VEC_K_NORM]) {
        have = l->vec[MOEC_VEC_Q_NORM] ? l->vec[MOEC_VEC_Q_NORM] : l->vec[MOEC_VEC_K_NORM];
        return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is there, its counterpart for %s is missing", moec_ckpt_dir(m->ckpt),
                         have->name, l->vec[MOEC_VEC_Q_NORM] ? "keys" : "queries");
    }
    return same_norms(m, l, err);
}

/* A bias that no role was bound to would be left out of the sum in silence, scales out of the product, and experts (beyond
 * those that are counted, or a second time under other names) would stay when others go. */
static moec_status no_loose_parts(const moec_model *m, moec_err *err)
{
    moec_place *place = NULL;
    bool *used = NULL;
    char layers[MOEC_NAME], front[64];
    moec_status st = MOEC_OK;
    const moec_binder b = {.m = m};
    const char *router = m->family->mat[MOEC_MAT_ROUTER];
    snprintf(front, sizeof front, "%.*s", (int)strcspn(router, "%"), router); /* "model.layers." */
    (void)moec__name(layers, NULL, &b, front, 0);
    MOEC_TRY(moec_model_places(&place, m, err));
    MOEC_TRY(moec_model_used(&used, m, err));
    for (size_t i = 0; i < moec_ckpt_count(m->ckpt); i++) {
        const char *name = moec_ckpt_at(m->ckpt, i)->name;
        if (used[i] || place[i].mtp ||
            strncmp(name, layers, strlen(layers)) != 0 ||
            (m->family->unread && strstr(name, m->family->unread)))
            continue;
        if (moec__ends_in(name, ".bias") || moec__ends_in(name, "_scale_inv") || strstr(name, ".experts."))
            MOEC_TRY(moec_fail(err, MOEC_ESHAPE, "%s: tensor %s: %s has no such %s beside its others", moec_ckpt_dir(m->ckpt),
                               name, m->family->model_type, moec__ends_in(name, ".bias") ? "bias" : "tensor"));
    }
done:
    moec_free(used);
    moec_free(place);
    return st;
}

static moec_status check_parts(const moec_model *m, moec_err *err)
{
    const moec_layer *mixes[MOEC_MIXER_HEADS + 1] = {NULL}, *feeds[MOEC_MIXER_HEADS + 1][2] = {{NULL}};
    for (int64_t i = 0; i < m->dims.layers; i++) {
        const moec_layer *l = &m->layer[i], **mix = &mixes[l->mixer], **feed = &feeds[l->mixer][l->expert != NULL];
        *mix = *mix ? *mix : l;
        *feed = *feed ? *feed : l;
        moec_status st = same_parts(m, l, *mix, *feed, err);
        if (st != MOEC_OK)
            return st;
    }
    const moec_tensor *bias = m->layer[0].vec[MOEC_VEC_NORM_ATTN_BIAS];
    if (bias && m->family->final_norm_bias && !m->final_norm_bias)
        return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is there, but %s is missing", moec_ckpt_dir(m->ckpt), bias->name,
                         m->family->final_norm_bias);
    return MOEC_OK;
}

static int64_t narrow(moec_weight *w, int bits)
{
    if (!w->of || w->storage != MOEC_NESTED)
        return 0;
    w->bits = w->bits > bits ? (uint8_t)bits : w->bits;
    return 1;
}

moec_status moec_model_read_bits(moec_model *m, int bits, moec_err *err)
{
    int64_t n = 0;
    if (bits < 2 || bits > 8)
        return moec_fail(err, MOEC_EINVAL, "nested codes have 2 to 8 bits, not %d", bits);
    for (int64_t i = 0; i < m->dims.layers; i++) {
        moec_layer *l = &m->layer[i];
        for (int k = 0; k < MOEC_MAT_COUNT; k++)
            n += narrow(&l->mat[k], bits);
        for (int64_t e = 0; l->expert && e < m->dims.experts; e++)
            n += narrow(&l->expert[e].gate, bits) + narrow(&l->expert[e].up, bits) + narrow(&l->expert[e].down, bits);
    }
    return n > 0 ? MOEC_OK : moec_fail(err, MOEC_EINVAL, "no matrix is nested: only what quantize --format nested wrote can be read in "
                                                         "fewer bits");
}

/* A GGUF with matrices in blocks. */
static bool in_blocks(const moec_ckpt *c)
{
    bool any = false;
    for (size_t i = 0; moec_ckpt_gguf(c) && i < moec_ckpt_count(c); i++)
        any = any || moec_ckpt_at(c, i)->dtype == MOEC_U8;
    return any;
}

static moec_status bind_all(moec_model *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_family *f = m->family;
    moec_dims *d = &m->dims;
    moec_binder b = {.m = m};
    MOEC_TRY(moec_config_fp8_block(b.fp8_block, m, err));
    MOEC_TRY(moec_config_packed(m, err));
    m->packed = m->packed || in_blocks(m->ckpt);
    MOEC_TRY(moec__bind_matrix(&m->embedding, &b, f->embed, d->vocab, d->hidden, err));
    if (m->embedding.storage != MOEC_PLAIN && m->embedding.storage != MOEC_BLOCKS)
        MOEC_TRY(moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is %s, expected F32, F16 or BF16", moec_ckpt_dir(m->ckpt),
                           m->embedding.of->name, moec_dtypes[m->embedding.of->dtype].name));
    MOEC_TRY(moec__bind(&m->final_norm, &b, f->final_norm, 1, &d->hidden, err));
    if (moec__find(&b, f->final_norm_bias))
        MOEC_TRY(moec__bind(&m->final_norm_bias, &b, f->final_norm_bias, 1, &d->hidden, err));
    MOEC_TRY(bind_head(m, &b, err));
    const moec_tensor *q_a = moec__find(&b, f->mat[MOEC_MAT_Q_A]);
    if (q_a && d->q_rank == 0) /* configs leave q_lora_rank out where it is the class's default */
        d->q_rank = moec__rows(q_a);
    MOEC_TRY(MOEC_NEW(m->layer, (size_t)d->layers, err));
    for (int64_t i = 0; i < d->layers; i++) {
        moec_layer *l = &m->layer[i];
        b.layer = l->index = i;
        l->moe_index = -1;
        MOEC_TRY(moec__bind_layer(l, &b, d, err));
        if (l->expert)
            l->moe_index = m->moe_layers++;
    }
    MOEC_TRY(check_parts(m, err));
    if (m->moe_layers == 0)
        MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "%s: no layer has a router, nothing to do here", moec_ckpt_dir(m->ckpt)));
    MOEC_TRY(no_more_layers(m, &b, err));
    MOEC_TRY(bind_mtp(m, &b, err));
    MOEC_TRY(list_sets(m, err));
    MOEC_TRY(no_loose_parts(m, err));
done:
    return st;
}

moec_status moec_model_open(moec_model **out, const char *dir, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_model *m = NULL;
    *out = NULL;
    MOEC_TRY(MOEC_NEW(m, 1, err));
    MOEC_TRY(moec_gguf_is(dir) ? moec_gguf_ckpt(&m->ckpt, dir, err) : moec_ckpt_open(&m->ckpt, dir, err));
    if (moec_json_get(moec_ckpt_config(m->ckpt), MOEC_CONFIG_FACTORS))
        MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "%s: its experts are factors, which transformers runs (trust_remote_code) and this "
                           "program only verifies; to measure it, make the same with --emit dense or as a plan for eval --plan", dir));
    if (moec_json_get(moec_ckpt_config(m->ckpt), MOEC_CONFIG_MAP))
        MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "%s: rows of its routers share experts (merge --emit map), which transformers runs "
                           "(trust_remote_code) and this program only verifies and inspects; to measure it, make the same with --emit "
                           "tied or as a plan for eval --plan", dir));
    MOEC_TRY(find_family(&m->family, m->ckpt, err));
    m->config = moec_json_get(moec_ckpt_config(m->ckpt), "text_config");
    if (!moec_json_absent(m->config) && moec_json_type(m->config) != MOEC_JSON_OBJECT)
        MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "%s/config.json: text_config is not an object", dir));
    m->config_at = "text_config.";
    if (moec_json_type(m->config) != MOEC_JSON_OBJECT) {
        m->config = moec_ckpt_config(m->ckpt);
        m->config_at = "";
    }
    find_prefix(m);
    st = moec_config_read(m, err);
    MOEC_TRY(moec_within(err, st, "%s", moec_ckpt_dir(m->ckpt)));
    MOEC_TRY(bind_all(m, err));
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
    for (int64_t i = 0; i < m->mtp_layers; i++)
        moec_free(m->mtp[i].expert);
    moec_free(m->layer);
    moec_free(m->mtp);
    moec_free(m->set);
    moec_ckpt_close(m->ckpt);
    moec_free(m);
}
