/* See variant.h. */
#include "model/variant.h"

#include "base/mem.h"

#include <string.h>

moec_status moec_variant_new(moec_variant **out, const moec_model *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_variant *v = NULL;
    const size_t layers = (size_t)m->dims.layers, experts = (size_t)m->dims.experts;
    *out = NULL;
    MOEC_TRY(MOEC_NEW(v, 1, err));
    v->model = *m;
    v->model.layer = NULL;
    MOEC_TRY(MOEC_NEW(v->removed, (size_t)m->sets, err));
    MOEC_TRY(MOEC_NEW(v->model.layer, layers, err));
    memcpy(v->model.layer, m->layer, layers * sizeof *m->layer);
    for (size_t i = 0; i < layers; i++)
        v->model.layer[i].expert = NULL; /* not to be freed when the next line fails */
    for (size_t i = 0; i < layers; i++)
        if (m->layer[i].expert) {
            MOEC_TRY(MOEC_NEW(v->model.layer[i].expert, experts, err));
            memcpy(v->model.layer[i].expert, m->layer[i].expert, experts * sizeof *m->layer[i].expert);
        }
    *out = v;
    v = NULL;
done:
    moec_variant_free(v);
    return st;
}

void moec_variant_free(moec_variant *v)
{
    if (!v)
        return;
    for (int64_t i = 0; v->model.layer && i < v->model.dims.layers; i++)
        moec_free(v->model.layer[i].expert);
    for (int64_t i = 0; v->removed && i < v->model.sets; i++)
        moec_free(v->removed[i]);
    moec_free(v->model.layer);
    moec_free(v->removed);
    moec_free(v);
}

moec_status moec_variant_keep(moec_variant *v, int64_t set, const int32_t *keep, int64_t n, moec_err *err)
{
    const moec_set *s = &v->model.set[set];
    moec_layer *l = s->kind == MOEC_SET_MTP ? NULL : &v->model.layer[s->layer];
    moec_status st = MOEC_OK;
    if (!l)
        return MOEC_OK;
    if (!v->removed[set])
        st = MOEC_NEW(v->removed[set], (size_t)v->model.dims.experts, err);
    if (st != MOEC_OK)
        return st;
    for (int64_t e = 0; e < v->model.dims.experts; e++)
        v->removed[set][e] = true;
    for (int64_t i = 0; i < n; i++)
        v->removed[set][keep[i]] = false;
    *(s->kind == MOEC_SET_HEADS ? &l->heads_removed : &l->removed) = v->removed[set];
    return MOEC_OK;
}

void moec_variant_top_k(moec_variant *v, int64_t k)
{
    moec_dims *d = &v->model.dims;
    if (d->slots == d->top_k && k < d->slots)
        d->slots = k;
    if (k < d->top_k)
        d->top_k = k;
}

void moec_variant_drop_groups(moec_variant *v)
{
    v->model.dims.groups = v->model.dims.top_groups = 1;
}

void moec_variant_keep_mass(moec_variant *v, double share)
{
    v->model.dims.keep_mass = share;
}
