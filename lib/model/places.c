/* What each tensor of a checkpoint is, for whoever rewrites or counts it. */
#include "base/mem.h"
#include "model/bind.h"
#include "model/forward.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct marker {
    const moec_model *m;
    moec_place *all;
} marker;

static moec_place *at(const marker *k, const moec_tensor *t)
{
    return &k->all[t - moec_ckpt_at(k->m->ckpt, 0)];
}

static void stack(const marker *k, const moec_tensor *t, int64_t set, uint32_t parts, int32_t width_axis)
{
    if (!t)
        return;
    moec_place *p = at(k, t);
    /* [1, E] counts its experts in the second dimension */
    const int32_t axis = t->rank == 2 && t->dim[0] == 1 && k->m->dims.experts != 1;
    const bool seen = p->role == MOEC_ROLE_STACK; /* gate and up in one */
    *p = (moec_place){.role = MOEC_ROLE_STACK, .weights = parts < MOEC_PART_ROUTER, .axis = axis, .set = set, .expert = -1,
                      .parts = parts | (seen ? p->parts : 0), .width_axis = width_axis};
}

/* The same of a router's tensor in which experts that always stay come behind the others; `across`: of its columns, too. */
static void tailed(const marker *k, const moec_tensor *t, int64_t set, uint32_t parts, int64_t across)
{
    if (!t)
        return;
    stack(k, t, set, parts, -1);
    at(k, t)->weights = false;
    at(k, t)->tail = k->m->family->n_tail;
    at(k, t)->across = across;
}

static void expert(const marker *k, const moec_tensor *t, int64_t set, int64_t e, size_t number_at, uint32_t parts,
                   int32_t width_axis)
{
    if (!t)
        return;
    moec_place *p = at(k, t);
    const bool seen = p->role == MOEC_ROLE_EXPERT; /* gate and up in one */
    *p = (moec_place){.role = MOEC_ROLE_EXPERT, .weights = true, .set = set, .expert = e, .number_at = number_at,
                      .parts = parts | (seen ? p->parts : 0), .width_axis = width_axis};
}

/* Are these names of one matrix, plain or in codes? */
static bool same_matrix(const char *pattern, const char *name)
{
    const size_t n = strlen(pattern) - (sizeof "weight" - 1);
    return strcmp(pattern, name) == 0 ||
           (moec__ends_in(pattern, ".weight") && strncmp(pattern, name, n) == 0 &&
            (strcmp(name + n, "qweight") == 0 || strcmp(name + n, "weight_packed") == 0 || strcmp(name + n, "nested_base") == 0 ||
             strncmp(name + n, "weight_", 7) == 0));
}

/* Where the expert's number stands in a tensor's name: the number of the second %d of the pattern that makes this name. */
static size_t number_in(const marker *k, const moec_layer *l, int64_t e, const moec_tensor *t, bool mtp)
{
    char name[MOEC_NAME];
    size_t found;
    const moec_family *f = k->m->family;
    const moec_binder b = {.m = k->m, .layer = l->index, .expert = e, .mtp_layer = mtp ? f->mtp_layer : NULL};
    for (int i = 0; i <= MOEC_LAYOUTS; i++) {
        const moec_expert_names *row = i < MOEC_LAYOUTS ? &f->experts[i] : &f->gguf.experts;
        const char *const pattern[] = {row->gate, row->up, row->down};
        for (size_t p = 0; p < MOEC_COUNT(pattern); p++)
            for (int n = 0; pattern[p] && moec__name(name, &found, &b, pattern[p], n); n++)
                if (same_matrix(name, t->name))
                    return found;
    }
    const char *const constant[] = {f->constant, f->constant_mix};
    for (size_t p = 0; p < MOEC_COUNT(constant); p++)
        if (constant[p] && moec__name(name, &found, &b, constant[p], 0) && strcmp(name, t->name) == 0)
            return found;
    return SIZE_MAX; /* not reached: the binder found it by one of these */
}

/* Which dimension of a matrix grows with the experts' width. */
static int32_t width_axis(moec_expert_layout layout, uint32_t part)
{
    const bool down = part == MOEC_PART_DOWN;
    switch (layout) {
    case MOEC_LAYOUT_SPLIT:
        return down ? 1 : 0;
    case MOEC_LAYOUT_OUT_IN:
        return down ? 2 : 1;
    case MOEC_LAYOUT_IN_OUT:
    case MOEC_LAYOUT_IN_OUT_PAIRS:
        return down ? 1 : 2;
    case MOEC_LAYOUT_MXFP4_PAIRS:
        return down ? 2 : 1;
    case MOEC_LAYOUT_FLAT:
        return 0;
    }
    return -1;
}

/* A router has no scales: the binder takes it in F32, F16 and BF16 only. */
static void mark_layer(const marker *k, const moec_layer *l, int64_t set, bool mtp)
{
    static const uint32_t part[] = {MOEC_PART_GATE, MOEC_PART_UP, MOEC_PART_DOWN};
    tailed(k, l->mat[MOEC_MAT_ROUTER].of, set, MOEC_PART_ROUTER, 0);
    /* the first layer's is not used */
    tailed(k, l->mat[MOEC_MAT_ROUTER_MAP].of, set, 0, l->moe_index > 0 ? set : set + 1);
    for (int64_t i = 0; i < k->m->family->n_tail; i++) {
        const moec_tensor *const t[] = {l->constant[i], l->constant_mix[i]};
        for (size_t p = 0; p < MOEC_COUNT(t) && t[p]; p++) {
            const int64_t e = k->m->dims.experts + i;
            expert(k, t[p], set, e, number_in(k, l, e, t[p], mtp), 0, -1);
            at(k, t[p])->weights = false; /* they stay whatever is pruned */
        }
    }
    stack(k, l->bias[MOEC_MAT_ROUTER], set, MOEC_PART_ROUTER_BIAS, -1);
    stack(k, l->vec[MOEC_VEC_SELECTION_BIAS], set, MOEC_PART_SELECTION_BIAS, -1);
    stack(k, l->gate_up_bias, set, MOEC_PART_GATE | MOEC_PART_UP, 1);
    stack(k, l->down_bias, set, MOEC_PART_DOWN, -1);
    for (int64_t e = 0; e < k->m->dims.experts; e++) {
        const moec_weight *const w[] = {&l->expert[e].gate, &l->expert[e].up, &l->expert[e].down};
        for (size_t i = 0; i < MOEC_COUNT(w); i++) {
            const int32_t axis = width_axis(l->layout, part[i]);
            if (l->layout != MOEC_LAYOUT_SPLIT) {
                stack(k, w[i]->of, set, part[i], axis);
                stack(k, w[i]->scale, set, part[i], axis);
                continue;
            }
            size_t number_at = number_in(k, l, e, w[i]->of, mtp);
            expert(k, w[i]->of, set, e, number_at, part[i], axis);
            expert(k, w[i]->scale, set, e, number_at, part[i], axis); /* its name begins with that of the weights */
            expert(k, w[i]->zero, set, e, number_at, part[i], axis);
        }
        if (l->layout != MOEC_LAYOUT_SPLIT)
            break; /* the views of the others are of the same tensors */
    }
}

/* Under their own prefix, or numbered as layers behind the last. */
static void mark_mtp(const marker *k)
{
    const moec_model *m = k->m;
    const moec_binder b = {.m = m};
    const char *own = m->family->mtp_prefix;
    char layer[MOEC_NAME];
    (void)moec__name(layer, NULL, &b, "model.layers.", 0);
    const char *prefix = own ? own : layer;
    for (size_t i = 0; i < moec_ckpt_count(m->ckpt); i++) {
        const char *name = moec_ckpt_at(m->ckpt, i)->name, *rest = name + strlen(prefix);
        if (strncmp(name, prefix, strlen(prefix)) == 0)
            k->all[i].mtp = own || (isdigit((unsigned char)*rest) && strtoll(rest, NULL, 10) >= m->dims.layers);
    }
}

/* The number of the layer in every name that begins as the router's does. */
static void mark_layers(const marker *k)
{
    const moec_binder b = {.m = k->m};
    const char *router = k->m->family->mat[MOEC_MAT_ROUTER];
    char pattern[64], front[MOEC_NAME];
    snprintf(pattern, sizeof pattern, "%.*s", (int)strcspn(router, "%"), router); /* "model.layers." */
    (void)moec__name(front, NULL, &b, pattern, 0);
    const size_t n = strlen(front);
    for (size_t i = 0; i < moec_ckpt_count(k->m->ckpt); i++) {
        const char *name = moec_ckpt_at(k->m->ckpt, i)->name, *digits = name + n;
        k->all[i].layer = -1;
        if (strncmp(name, front, n) == 0 && strspn(digits, "0123456789") > 0 && strspn(digits, "0123456789") < 10) {
            k->all[i].layer = strtoll(digits, NULL, 10);
            k->all[i].layer_at = n;
        }
    }
}

moec_status moec_model_places(moec_place **out, const moec_model *m, moec_err *err)
{
    moec_status st = MOEC_NEW(*out, moec_ckpt_count(m->ckpt), err);
    if (st != MOEC_OK)
        return st;
    const marker k = {m, *out};
    for (int64_t s = 0; s < m->sets; s++) {
        const moec_set *set = &m->set[s];
        if (set->kind == MOEC_SET_MOE) {
            mark_layer(&k, &m->layer[set->layer], s, false);
        } else if (set->kind == MOEC_SET_HEADS) {
            stack(&k, set->router->of, s, MOEC_PART_ROUTER, -1);
            stack(&k, m->layer[set->layer].heads_in, s, 0, -1);
            stack(&k, m->layer[set->layer].heads_out, s, 0, -1);
        } else {
            mark_layer(&k, &m->mtp[s - (m->sets - m->mtp_layers)], s, true);
        }
    }
    if (m->family->key_mtp[0] || m->family->mtp_prefix)
        mark_mtp(&k);
    mark_layers(&k);
    return MOEC_OK;
}

moec_status moec_model_rename_expert(char **out, const moec_tensor *t, moec_place place, int64_t new_expert, moec_err *err)
{
    *out = NULL;
    if (place.role != MOEC_ROLE_EXPERT || place.number_at >= strlen(t->name))
        return moec_fail(err, MOEC_EINVAL, "tensor %s has no expert number in its name", t->name);
    const char *rest = t->name + place.number_at;
    rest += strspn(rest, "0123456789");
    return moec_format(out, err, "%.*s%lld%s", (int)place.number_at, t->name, (long long)new_expert, rest);
}

moec_status moec_expert_module(char **out, const moec_model *m, int64_t layer, int64_t expert, int which, bool own, moec_err *err)
{
    static const char tail[] = ".weight";
    const moec_family *f = m->family;
    const moec_binder b = {.m = m, .layer = layer, .expert = expert};
    char name[MOEC_NAME];
    *out = NULL;
    for (int i = 0; i < MOEC_LAYOUTS && f->experts[i].gate; i++) {
        const moec_expert_names *n = &f->experts[i];
        if (n->layout != MOEC_LAYOUT_SPLIT || !n->up || (!own && !moec__ends_in(n->gate, ".gate_proj.weight")))
            continue;
        (void)moec__name(name, NULL, &b, which == 0 ? n->gate : which == 1 ? n->up : n->down, 0);
        return moec_copy(out, name, strlen(name) - (moec__ends_in(name, tail) ? sizeof tail - 1 : 0), err);
    }
    return moec_fail(err, MOEC_EINVAL, "%s: experts have no modules of their own", f->model_type);
}

/* --- counting -------------------------------------------------------------------------------------------------------- */

typedef struct used {
    bool *out;
    const moec_tensor *first;
} used;

static void mark_used(void *ctx, const moec_model *m, const moec_tensor *t)
{
    used *u = ctx;
    (void)m;
    if (t)
        u->out[t - u->first] = true;
}

bool moec__order_of_codes(const char *name)
{
    return moec__ends_in(name, ".g_idx") || moec__ends_in(name, ".weight_g_idx") || moec__ends_in(name, ".weight_shape");
}

moec_status moec_model_used(bool **out, const moec_model *m, moec_err *err)
{
    used u = {.first = moec_ckpt_at(m->ckpt, 0)};
    moec_status st = MOEC_NEW(u.out, moec_ckpt_count(m->ckpt), err);
    *out = u.out;
    if (st != MOEC_OK)
        return st;
    const moec_tensor *const single[] = {m->embedding.of, m->final_norm, m->final_norm_bias, m->head.of,
                                         m->head.scale, m->head_bias, m->head.zero};
    for (size_t i = 0; i < MOEC_COUNT(single); i++)
        mark_used(&u, m, single[i]);
    for (int64_t i = 0; i < m->dims.layers; i++)
        moec_layer_each(m, i, mark_used, &u);
    for (size_t i = 0; m->packed && i < moec_ckpt_count(m->ckpt); i++) /* looked at when codes are bound */
        u.out[i] = u.out[i] || moec__order_of_codes(moec_ckpt_at(m->ckpt, i)->name);
    return MOEC_OK;
}

/* Parameters of codes: what their view counts. */
typedef struct coded {
    uint64_t *values; /* [tensors] */
    const moec_tensor *first;
} coded;

static void count_view(const coded *c, const moec_weight *w)
{
    if (w->of && (w->storage == MOEC_GPTQ || w->storage == MOEC_PACKED || w->storage == MOEC_NESTED ||
                  w->storage == MOEC_BLOCKS))
        c->values[w->of - c->first] = (uint64_t)w->rows * (uint64_t)w->cols;
}

static void count_layer(const coded *c, const moec_model *m, const moec_layer *l)
{
    for (int i = 0; i < MOEC_MAT_COUNT; i++)
        count_view(c, &l->mat[i]);
    for (int64_t e = 0; l->expert && e < m->dims.experts; e++) {
        count_view(c, &l->expert[e].gate);
        count_view(c, &l->expert[e].up);
        count_view(c, &l->expert[e].down);
    }
}

static moec_status count_codes(uint64_t **out, const moec_model *m, moec_err *err)
{
    moec_status st = MOEC_NEW(*out, moec_ckpt_count(m->ckpt), err);
    const coded c = {*out, moec_ckpt_at(m->ckpt, 0)};
    if (st != MOEC_OK)
        return st;
    count_view(&c, &m->embedding);
    count_view(&c, &m->head);
    for (int64_t i = 0; i < m->dims.layers; i++)
        count_layer(&c, m, &m->layer[i]);
    for (int64_t i = 0; i < m->mtp_layers; i++)
        count_layer(&c, m, &m->mtp[i]);
    return MOEC_OK;
}

/* What lies beside codes. */
static bool beside_codes(const char *name)
{
    static const char *const tails[] = {".scales", ".qzeros", "g_idx", ".weight_scale", ".weight_zero_point", ".weight_shape",
                                        ".nested_scales", ".nested_planes"};
    for (size_t i = 0; i < MOEC_COUNT(tails); i++)
        if (moec__ends_in(name, tails[i]))
            return true;
    return false;
}

/* Parameters: block scales are none, a byte of MXFP4 is two. `codes`: of its view, 0: it holds none. */
static uint64_t values(const moec_tensor *t, const moec_model *m, uint64_t codes)
{
    if (codes > 0)
        return codes;
    if (m->packed && beside_codes(t->name))
        return 0;
    if (moec__ends_in(t->name, "_scale_inv") || (t->dtype == MOEC_U8 && moec__ends_in(t->name, "_scales")))
        return 0;
    if (t->dtype == MOEC_U8 && moec__ends_in(t->name, "_blocks"))
        return 2 * t->bytes;
    return t->bytes / (uint64_t)moec_dtypes[t->dtype].bytes;
}

moec_status moec_model_sizes(moec_sizes *out, const moec_model *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_place *all = NULL;
    bool *reads = NULL;
    uint64_t *codes = NULL;
    uint64_t routed = 0; /* of the forward pass, without multi-token prediction */
    memset(out, 0, sizeof *out);
    MOEC_TRY(moec_model_places(&all, m, err));
    MOEC_TRY(moec_model_used(&reads, m, err));
    MOEC_TRY(count_codes(&codes, m, err));
    for (size_t i = 0; i < moec_ckpt_count(m->ckpt); i++) {
        const moec_tensor *t = moec_ckpt_at(m->ckpt, i);
        const uint64_t n = values(t, m, codes[i]);
        out->total += n;
        out->bytes += t->bytes;
        out->active += reads[i] ? n : 0;
        if (!all[i].weights)
            continue;
        routed += reads[i] ? n : 0;
        out->routed += n;
        out->routed_bytes += t->bytes;
    }
    const int64_t chosen = m->dims.top_k < m->dims.experts ? m->dims.top_k : m->dims.experts;
    const uint64_t unused = (uint64_t)(m->dims.experts - chosen), experts = (uint64_t)m->dims.experts;
    out->active -= routed / experts * unused;
    const moec_tensor *rows = m->embedding.of;
    if (!m->dims.tied) /* one row of it is looked up; tied, it is the head and is used */
        out->active -= values(rows, m, codes[rows - moec_ckpt_at(m->ckpt, 0)]);
done:
    moec_free(codes);
    moec_free(reads);
    moec_free(all);
    return st;
}
