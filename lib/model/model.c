/* Opens a folder, finds its family and binds its tensors to the roles the family names, once, with strict shapes. */
#include "model/model.h"

#include "base/mem.h"
#include "model/bind.h"
#include "model/config.h"
#include "model/forward.h"

#include <stdio.h>
#include <string.h>

static moec_status find_family(const moec_family **out, const moec_ckpt *c, moec_err *err)
{
    const moec_json *config = moec_ckpt_config(c);
    const char *type = moec_json_string(moec_json_get(config, "model_type"));
    char known[1024] = "";
    *out = moec_family_of(config);
    if (*out)
        return MOEC_OK;
    if (!type)
        return moec_fail(err, MOEC_EFORMAT, "%s/config.json: model_type is missing", moec_ckpt_dir(c));
    const moec_family *f;
    for (int i = 0; (f = moec_family_at(i)) != NULL; i++) {
        size_t n = strlen(known);
        snprintf(known + n, sizeof known - n, "%s%s", i ? ", " : "", f->model_type);
    }
    return moec_fail(err, MOEC_EFORMAT, "%s/config.json: model_type %.60s is not known; known are: %s", moec_ckpt_dir(c),
                     type, known);
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

/* Tied: as config.json says (of the text model or of the whole), else when there is no head. */
static moec_status bind_head(moec_model *m, const moec_binder *b, moec_err *err)
{
    moec_dims *d = &m->dims;
    const moec_json *said = moec_json_get(m->config, "tie_word_embeddings");
    if (moec_json_type(said) == MOEC_JSON_NONE || moec_json_type(said) == MOEC_JSON_NULL)
        said = moec_json_get(moec_ckpt_config(m->ckpt), "tie_word_embeddings");
    d->tied = !moec__find(b, m->family->head);
    if (moec_json_type(said) != MOEC_JSON_NONE && moec_json_type(said) != MOEC_JSON_NULL && !moec_json_bool(said, &d->tied))
        return moec_fail(err, MOEC_EFORMAT, "%s: config.json: tie_word_embeddings is neither true nor false",
                         moec_ckpt_dir(m->ckpt));
    if (d->tied) {
        m->head = moec_weight_of(m->embed);
        return MOEC_OK;
    }
    moec_status st = moec__bind_matrix(&m->head, b, m->family->head, d->vocab, d->hidden, err);
    return st == MOEC_OK ? moec__bind_bias(&m->head_bias, b, m->family->head, d->vocab, err) : st;
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
        if (!moec__find(&b, f->mat[MOEC_MAT_ROUTER]))
            continue;
        moec_layer *l = &m->mtp[m->mtp_layers++];
        l->index = b.layer;
        l->moe_index = -1;
        MOEC_TRY(moec__bind_experts(l, &b, err));
    }
done:
    return st;
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

/* Optional tensors are used when they are there; then all layers of a kind must have them, else the checkpoint is damaged. */
static moec_status same_parts(const moec_model *m, const moec_layer *l, const moec_layer *first, moec_err *err)
{
    const moec_tensor *have = NULL, *want = NULL;
    for (int i = 0; i < MOEC_VEC_COUNT && !have && !want; i++)
        if (!l->vec[i] != !first->vec[i]) {
            have = l->vec[i];
            want = first->vec[i];
        }
    for (int i = 0; i < MOEC_MAT_COUNT && !have && !want; i++)
        if (!l->bias[i] != !first->bias[i] || !l->mat[i].of != !first->mat[i].of) {
            have = l->bias[i] && !first->bias[i] ? l->bias[i] : l->mat[i].of && !first->mat[i].of ? l->mat[i].of : NULL;
            want = have ? NULL : first->bias[i] && !l->bias[i] ? first->bias[i] : first->mat[i].of;
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
    return MOEC_OK;
}

/* A bias that no role was bound to would be left out of the sum in silence. */
static moec_status no_loose_bias(const moec_model *m, moec_err *err)
{
    moec_place *place = NULL;
    bool *used = NULL;
    char layers[MOEC_NAME];
    moec_status st = MOEC_OK;
    const moec_binder b = {.m = m};
    (void)moec__name(layers, NULL, &b, "model.layers.", 0);
    MOEC_TRY(moec_model_places(&place, m, err));
    MOEC_TRY(moec_model_used(&used, m, err));
    for (size_t i = 0; i < moec_ckpt_count(m->ckpt); i++) {
        const char *name = moec_ckpt_at(m->ckpt, i)->name;
        const size_t n = strlen(name);
        if (!used[i] && !place[i].mtp && strncmp(name, layers, strlen(layers)) == 0 && n > 5 &&
            strcmp(name + n - 5, ".bias") == 0)
            MOEC_TRY(moec_fail(err, MOEC_ESHAPE, "%s: tensor %s: %s has no such bias", moec_ckpt_dir(m->ckpt), name,
                               m->family->model_type));
    }
done:
    moec_free(used);
    moec_free(place);
    return st;
}

static moec_status check_parts(const moec_model *m, moec_err *err)
{
    const moec_layer *first[MOEC_MIXER_HEADS + 1][2] = {{NULL}};
    for (int64_t i = 0; i < m->dims.layers; i++) {
        const moec_layer *l = &m->layer[i], **f = &first[l->mixer][l->expert != NULL];
        *f = *f ? *f : l;
        moec_status st = same_parts(m, l, *f, err);
        if (st != MOEC_OK)
            return st;
    }
    return MOEC_OK;
}

static moec_status bind_all(moec_model *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_family *f = m->family;
    moec_dims *d = &m->dims;
    moec_binder b = {.m = m};
    const int64_t embed[2] = {d->vocab, d->hidden};
    const moec_json *config = moec_ckpt_config(m->ckpt);
    if (moec_json_path(config, "quantization_config.weight_block_size"))
        MOEC_TRY(moec_config_fp8_block(b.fp8_block, config, err));
    MOEC_TRY(moec__bind(&m->embed, &b, f->embed, 2, embed, err));
    MOEC_TRY(moec__bind(&m->final_norm, &b, f->final_norm, 1, &d->hidden, err));
    if (moec__find(&b, f->final_norm_bias))
        MOEC_TRY(moec__bind(&m->final_norm_bias, &b, f->final_norm_bias, 1, &d->hidden, err));
    MOEC_TRY(bind_head(m, &b, err));
    const moec_tensor *q_a = moec__find(&b, f->mat[MOEC_MAT_Q_A]);
    if (q_a && d->q_rank == 0) /* configs leave q_lora_rank out where it is the class's default */
        d->q_rank = q_a->dim[0];
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
    MOEC_TRY(bind_mtp(m, &b, err));
    MOEC_TRY(list_sets(m, err));
    MOEC_TRY(no_loose_bias(m, err));
done:
    return st;
}

moec_status moec_model_open(moec_model **out, const char *dir, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_model *m = NULL;
    *out = NULL;
    MOEC_TRY(MOEC_NEW(m, 1, err));
    MOEC_TRY(moec_ckpt_open(&m->ckpt, dir, err));
    MOEC_TRY(find_family(&m->family, m->ckpt, err));
    m->config = moec_json_get(moec_ckpt_config(m->ckpt), "text_config");
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
