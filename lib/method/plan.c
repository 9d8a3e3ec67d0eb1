/* Plans as text: writing, strict reading, checking against a model. */
#include "method/plan.h"

#include "base/file.h"
#include "base/mem.h"
#include "method/factor_plan.h"
#include "method/plan_quant.h"
#include "method/reader.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { VERSION = 1, MAX_LAYERS = MOEC_READ_MAX_LAYERS, MAX_EXPERTS = MOEC_READ_MAX_EXPERTS };
static const size_t max_file = (size_t)1 << 30;

/* Names of moec_set_kind in plans. */
static const char *const kinds[] = {
    [MOEC_SET_MOE] = "moe", [MOEC_SET_HEADS] = "attention", [MOEC_SET_MTP] = "mtp"};

static const struct dtype_name {
    const char *name;
    moec_dtype dtype;
} dtypes[] = {{"bf16", MOEC_BF16}, {"f16", MOEC_F16}, {"f32", MOEC_F32}};

/* Bits of moec_part in plans. */
static const struct part_name {
    const char *name;
    uint32_t bit;
} parts[] = {{"gate", MOEC_PART_GATE},     {"up", MOEC_PART_UP},
             {"down", MOEC_PART_DOWN},     {"router", MOEC_PART_ROUTER},
             {"router_bias", MOEC_PART_ROUTER_BIAS}, {"selection_bias", MOEC_PART_SELECTION_BIAS}};

const char *moec_set_name(moec_set_kind kind)
{
    return kinds[kind];
}

const char *moec_plan_dtype_name(moec_dtype t)
{
    for (size_t i = 0; i < MOEC_COUNT(dtypes); i++)
        if (dtypes[i].dtype == t)
            return dtypes[i].name;
    return NULL;
}

moec_dtype moec_plan_dtype(const char *name)
{
    for (size_t i = 0; i < MOEC_COUNT(dtypes); i++)
        if (strcmp(dtypes[i].name, name) == 0)
            return dtypes[i].dtype;
    return MOEC_DTYPE_COUNT;
}

static void release_layer(moec_plan_layer *l)
{
    moec_free(l->keep);
    moec_free(l->score);
    moec_free(l->unseen);
    moec_free(l->into);
    moec_free(l->guarded);
}

void moec_plan_free(moec_plan *p)
{
    if (!p)
        return;
    for (int64_t i = 0; p->layer && i < p->n_sets; i++)
        release_layer(&p->layer[i]);
    moec_free(p->layer);
    moec_free(p->options);
    moec_free(p->betas);
    moec_free(p->drop);
    moec_free(p->repair);
    moec_free(p->factor.error);
    moec_free(p->quant.expert);
    moec_free(p->quant.mat);
    moec_free(p->quant.error);
    moec_free(p);
}

static void set_text(char *to, size_t cap, const char *from)
{
    snprintf(to, cap, "%s", from ? from : "");
}

moec_status moec_plan_new(moec_plan **out, const moec_model *m, const char *method, const char *fingerprint,
                          moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_plan *p = NULL;
    *out = NULL;
    MOEC_TRY(MOEC_NEW(p, 1, err));
    set_text(p->model, sizeof p->model, fingerprint);
    set_text(p->model_type, sizeof p->model_type, m->family->model_type);
    set_text(p->method, sizeof p->method, method);
    MOEC_TRY(moec_copy(&p->options, "{}", 2, err));
    p->top_k = p->new_top_k = m->dims.top_k;
    p->dtype = MOEC_DTYPE_COUNT;
    p->n_layers = m->moe_layers;
    MOEC_TRY(MOEC_NEW(p->layer, (size_t)m->sets, err));
    for (int64_t i = 0; i < m->sets; i++) {
        const moec_set *s = &m->set[i];
        p->layer[p->n_sets++] = (moec_plan_layer){.kind = s->kind, .layer = s->layer, .n_experts = m->dims.experts,
                                                  .error_before = (double)NAN, .error_after = (double)NAN,
                                                  .load_shift = (double)NAN};
        if (s->kind == MOEC_SET_MTP)
            p->mtp = MOEC_PLAN_MTP_KEEP;
    }
    *out = p;
    p = NULL;
done:
    moec_plan_free(p);
    return st;
}

static moec_status keep_all_from(moec_plan *p, int64_t set, moec_err *err)
{
    moec_status st = MOEC_OK;
    for (int64_t i = set; st == MOEC_OK && i < p->n_sets; i++) {
        moec_plan_layer *l = &p->layer[i];
        moec_free(l->keep);
        l->n_keep = 0;
        st = MOEC_NEW(l->keep, (size_t)l->n_experts, err);
        while (st == MOEC_OK && l->n_keep < l->n_experts) {
            l->keep[l->n_keep] = (int32_t)l->n_keep;
            l->n_keep++;
        }
    }
    return st;
}

moec_status moec_plan_keep_all(moec_plan *p, moec_err *err)
{
    return keep_all_from(p, 0, err);
}

moec_status moec_plan_map(moec_plan *p, moec_err *err)
{
    p->mapped = true;
    p->new_top_k = p->top_k;
    return keep_all_from(p, p->n_layers, err);
}

moec_status moec_plan_whole(moec_plan **out, const moec_model *m, moec_err *err)
{
    moec_status st = moec_plan_new(out, m, "", NULL, err);
    if (st == MOEC_OK)
        st = moec_plan_keep_all(*out, err);
    if (st != MOEC_OK) {
        moec_plan_free(*out);
        *out = NULL;
    }
    return st;
}

void moec_plan_drop_mtp(moec_plan *p)
{
    while (p->n_sets > p->n_layers && p->layer[p->n_sets - 1].kind == MOEC_SET_MTP)
        release_layer(&p->layer[--p->n_sets]);
    p->mtp = MOEC_PLAN_MTP_DROP;
}

moec_status moec_plan_set_option(moec_plan *p, const char *key, moec_json *value, moec_err *err)
{
    moec_json *options = NULL;
    char *text = NULL;
    moec_status st = moec_json_parse(&options, p->options, strlen(p->options), "plan options", err);
    if (st != MOEC_OK) {
        moec_json_free(value);
        return st;
    }
    moec_json_set(options, key, value);
    st = moec_json_dump(&text, options, 0, err);
    moec_json_free(options);
    if (st == MOEC_OK) {
        moec_free(p->options);
        p->options = text;
    }
    return st;
}

/* --- writing --------------------------------------------------------------------------------------------------------- */

static void add_rewritten(moec_json *o, const moec_plan_layer *l)
{
    moec_json *a = moec_json_new_array();
    for (size_t i = 0; i < MOEC_COUNT(parts); i++)
        if (l->rewritten & parts[i].bit)
            moec_json_push(a, moec_json_new_string(parts[i].name));
    moec_json_set(o, "rewritten", a);
    if ((l->rewritten & MOEC_PART_ROUTER) && !isnan(l->load_shift)) {
        moec_json_set(o, "load_shift", moec_json_new_real(l->load_shift));
        moec_json_set(o, "router_refit", moec_json_new_bool(l->router_refit));
    }
    if (isnan(l->error_before) || isnan(l->error_after))
        return;
    a = moec_json_new_array();
    moec_json_push(a, moec_json_new_real(l->error_before));
    moec_json_push(a, moec_json_new_real(l->error_after));
    moec_json_set(o, "held_out", a);
}

/* Groups of two and more, in the order of those that were kept. */
static moec_json *merged_json(const moec_plan_layer *l)
{
    moec_json *a = moec_json_new_array();
    for (int64_t k = 0; k < l->n_keep; k++) {
        moec_json *group = moec_json_new_array();
        moec_json_push(group, moec_json_new_int(l->keep[k]));
        for (int32_t e = 0; e < l->n_experts; e++)
            if (e != l->keep[k] && l->into[e] == l->keep[k])
                moec_json_push(group, moec_json_new_int(e));
        if (moec_json_len(group) > 1)
            moec_json_push(a, group);
        else
            moec_json_free(group);
    }
    return a;
}

static moec_json *layer_json(const moec_plan *p, int64_t i)
{
    const moec_plan_layer *l = &p->layer[i];
    moec_json *o = moec_json_new_object();
    if (l->kind != MOEC_SET_MOE)
        moec_json_set(o, "kind", moec_json_new_string(kinds[l->kind]));
    moec_json_set(o, "layer", moec_json_new_int(l->layer));
    moec_json_set(o, "experts", moec_json_new_int(l->n_experts));
    moec_json_set(o, "keep", moec_json_new_ints(l->keep, l->n_keep));
    if (l->kind != MOEC_SET_MOE) { /* no token was seen there, none was protected */
        if (l->rewritten)
            add_rewritten(o, l);
        return o;
    }
    moec_json_set(o, "unseen", moec_json_new_ints(l->unseen, l->n_unseen));
    moec_json_set(o, "protected", moec_json_new_ints(l->guarded, l->n_guarded));
    if (l->score)
        moec_json_set(o, "score", moec_json_new_reals(l->score, l->n_experts));
    if (p->quant.format[0])
        moec_json_set(o, "bits", moec__quant_layer_to_json(p, i));
    if (l->into)
        moec_json_set(o, "merged", merged_json(l));
    if (l->rewritten)
        add_rewritten(o, l);
    return o;
}

/* Everything but the layers. */
static moec_status head_json(moec_json **out, const moec_plan *p, moec_err *err)
{
    moec_json *options = NULL, *repair = NULL, *o;
    const char *text = p->options ? p->options : "{}";
    moec_status st = moec_json_parse(&options, text, strlen(text), "plan options", err);
    if (st == MOEC_OK && p->repair)
        st = moec_json_parse(&repair, p->repair, strlen(p->repair), "plan repair", err);
    if (st != MOEC_OK) {
        moec_json_free(options);
        return st;
    }
    *out = o = moec_json_new_object();
    moec_json_set(o, "moecompress_plan", moec_json_new_int(VERSION));
    moec_json_set(o, "kind", moec_json_new_string(moec_plan_kind(p)));
    moec_json_set(o, "model", moec_json_new_string(p->model));
    moec_json_set(o, "model_type", moec_json_new_string(p->model_type));
    moec_json_set(o, "method", moec_json_new_string(p->method));
    moec_json_set(o, "options", options);
    moec_json_set(o, "stats", moec_json_new_string(p->stats));
    moec_json_set(o, "top_k", moec_json_new_int(p->top_k));
    moec_json_set(o, "new_top_k", moec_json_new_int(p->new_top_k));
    if (p->mtp != MOEC_PLAN_MTP_UNSAID)
        moec_json_set(o, "mtp", moec_json_new_string(p->mtp == MOEC_PLAN_MTP_DROP ? "drop" : "keep"));
    if (p->drop_groups)
        moec_json_set(o, "groups", moec_json_new_string("drop"));
    if (p->pad > 0)
        moec_json_set(o, "pad", moec_json_new_int(p->pad));
    if (p->dtype != MOEC_DTYPE_COUNT)
        moec_json_set(o, "dtype", moec_json_new_string(moec_plan_dtype_name(p->dtype)));
    if (p->betas)
        moec_json_set(o, "betas", moec_json_new_reals(p->betas, p->n_layers));
    if (p->width > 0)
        moec_json_set(o, "expert_width", moec_json_new_int(p->width));
    if (p->n_drop > 0)
        moec_json_set(o, "drop_layers", moec_json_new_ints(p->drop, p->n_drop));
    if (repair)
        moec_json_set(o, "repair", repair);
    if (p->weights[0])
        moec_json_set(o, "weights", moec_json_new_string(p->weights));
    if (p->expert_shards)
        moec_json_set(o, "expert_shards", moec_json_new_bool(true));
    if (p->mapped)
        moec_json_set(o, "emit", moec_json_new_string("map"));
    if (p->factor.kind != MOEC_FACTOR_NONE)
        moec_json_set(o, "factor", moec__factor_to_json(p));
    if (p->quant.format[0])
        moec_json_set(o, "quant", moec__quant_to_json(p));
    return MOEC_OK;
}

moec_status moec_plan_to_json(moec_json **out, const moec_plan *p, moec_err *err)
{
    *out = NULL;
    moec_status st = head_json(out, p, err);
    if (st != MOEC_OK)
        return st;
    moec_json *layers = moec_json_new_array(), *others = moec_json_new_array();
    for (int64_t i = 0; i < p->n_sets; i++)
        moec_json_push(i < p->n_layers ? layers : others, layer_json(p, i));
    moec_json_set(*out, "layers", layers);
    if (p->n_sets > p->n_layers)
        moec_json_set(*out, "others", others);
    else
        moec_json_free(others);
    return MOEC_OK;
}

typedef struct text_buf {
    char *at;
    size_t len, cap;
} text_buf;

static moec_status add_text(text_buf *b, const char *text, moec_err *err)
{
    size_t n = strlen(text);
    moec_status st = MOEC_GROW(b->at, b->cap, b->len + n + 1, err);
    if (st == MOEC_OK) {
        memcpy(b->at + b->len, text, n + 1);
        b->len += n;
    }
    return st;
}

/* Adds "text" of a value on one line and frees the value. */
static moec_status add_value(text_buf *b, moec_json *v, moec_err *err)
{
    char *text = NULL;
    moec_status st = moec_json_dump(&text, v, 0, err);
    if (st == MOEC_OK)
        st = add_text(b, text, err);
    moec_free(text);
    moec_json_free(v);
    return st;
}

/* "name": [ and one set a line. */
static moec_status add_sets(text_buf *b, const char *name, const moec_plan *p, int64_t first, int64_t end, moec_err *err)
{
    moec_status st = MOEC_OK;
    MOEC_TRY(add_text(b, name, err));
    for (int64_t i = first; i < end; i++) {
        MOEC_TRY(add_text(b, "    ", err));
        MOEC_TRY(add_value(b, layer_json(p, i), err));
        MOEC_TRY(add_text(b, i + 1 < end ? ",\n" : "\n", err));
    }
    MOEC_TRY(add_text(b, "  ]", err));
done:
    return st;
}

moec_status moec_plan_to_text(char **out, const moec_plan *p, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_json *head = NULL, *value;
    text_buf b = {NULL, 0, 0};
    const char *key;
    void *it = NULL;
    *out = NULL;
    MOEC_TRY(head_json(&head, p, err));
    MOEC_TRY(add_text(&b, "{\n", err));
    while (moec_json_each(head, &it, &key, &value)) {
        MOEC_TRY(add_text(&b, "  \"", err));
        MOEC_TRY(add_text(&b, key, err));
        MOEC_TRY(add_text(&b, "\": ", err));
        MOEC_TRY(add_value(&b, moec_json_clone(value), err));
        MOEC_TRY(add_text(&b, ",\n", err));
    }
    MOEC_TRY(add_sets(&b, "  \"layers\": [\n", p, 0, p->n_layers, err));
    if (p->n_sets > p->n_layers)
        MOEC_TRY(add_sets(&b, ",\n  \"others\": [\n", p, p->n_layers, p->n_sets, err));
    MOEC_TRY(add_text(&b, "\n}\n", err));
    *out = b.at;
    b.at = NULL;
done:
    moec_json_free(head);
    moec_free(b.at);
    return st;
}

/* --- reading --------------------------------------------------------------------------------------------------------- */

/* Ascending expert numbers; absent and not needed: none. */
static moec_status read_list(int32_t **out, int64_t *n, const moec_reader *r, const moec_json *o, const char *where,
                             const char *key, int64_t experts, bool needed)
{
    const moec_json *a = moec_json_get(o, key);
    *n = 0;
    if (!a && !needed)
        return MOEC_OK;
    size_t len = moec_json_len(a);
    if (moec_json_type(a) != MOEC_JSON_ARRAY || len > (size_t)experts || (needed && len == 0))
        return moec_fail(r->err, MOEC_EFORMAT, "%s: %s: %s is not a list of %d to %lld numbers", r->what, where,
                         key, needed, (long long)experts);
    moec_status st = MOEC_NEW(*out, len, r->err);
    for (size_t i = 0; st == MOEC_OK && i < len; i++) {
        int64_t v;
        if (!moec_json_int(moec_json_at(a, i), &v) || v < 0 || v >= experts)
            return moec_fail(r->err, MOEC_EFORMAT, "%s: %s: %s: entry %zu is not a number from 0 to %lld",
                             r->what, where, key, i, (long long)experts - 1);
        if (i > 0 && v <= (*out)[i - 1])
            return moec_fail(r->err, MOEC_EFORMAT, "%s: %s: %s: %lld stands behind %d; numbers must ascend", r->what,
                             where, key, (long long)v, (int)(*out)[i - 1]);
        (*out)[i] = (int32_t)v;
        ++*n;
    }
    return st;
}

static moec_status read_scores(moec_plan_layer *l, const moec_reader *r, const moec_json *o, const char *where)
{
    return moec_json_get(o, "score") ? moec__read_reals(&l->score, l->n_experts, r, o, where, "score") : MOEC_OK;
}

/* Only with two experts a token, each 0 to 1: a share of the larger weight. */
static moec_status read_betas(moec_plan *p, const moec_reader *r, const moec_json *root)
{
    moec_status st = MOEC_OK;
    if (!moec_json_get(root, "betas"))
        return MOEC_OK;
    if (p->top_k != 2 || p->new_top_k != 2)
        return moec_fail(r->err, MOEC_EFORMAT, "%s: betas are for two experts a token, top_k is %lld, new_top_k %lld",
                         r->what, (long long)p->top_k, (long long)p->new_top_k);
    MOEC_TRY(moec__read_reals(&p->betas, p->n_layers, r, root, "plan", "betas"));
    for (int64_t l = 0; l < p->n_layers; l++)
        if (!(p->betas[l] >= 0.0 && p->betas[l] <= 1.0))
            return moec_fail(r->err, MOEC_EFORMAT, "%s: betas: entry %lld is %g, expected 0 to 1", r->what, (long long)l,
                             p->betas[l]);
done:
    return st;
}

/* What became of the router, only where it is rewritten. */
static moec_status read_shift(moec_plan_layer *l, const moec_reader *r, const moec_json *o, const char *where)
{
    const moec_json *shift = moec_json_get(o, "load_shift"), *refit = moec_json_get(o, "router_refit");
    l->load_shift = (double)NAN;
    if (!shift && !refit)
        return MOEC_OK;
    if (!(l->rewritten & MOEC_PART_ROUTER) || !shift || !refit)
        return moec_fail(r->err, MOEC_EFORMAT, "%s: %s: load_shift and router_refit go together, with router in rewritten", r->what,
                         where);
    if (!moec_json_real(shift, &l->load_shift) || !(l->load_shift >= 0.0 && l->load_shift <= 1.0))
        return moec_fail(r->err, MOEC_EFORMAT, "%s: %s: load_shift is not a number from 0 to 1", r->what, where);
    if (!moec_json_bool(refit, &l->router_refit))
        return moec_fail(r->err, MOEC_EFORMAT, "%s: %s: router_refit is not true or false", r->what, where);
    return MOEC_OK;
}

/* One group: the expert that was kept, then what went into it. */
static moec_status read_group(moec_plan_layer *l, const moec_reader *r, const moec_json *a, const char *where)
{
    int64_t centre = -1;
    if (moec_json_type(a) != MOEC_JSON_ARRAY)
        return moec_fail(r->err, MOEC_EFORMAT, "%s: %s: merged: a group is not a list of experts", r->what, where);
    for (size_t i = 0; i < moec_json_len(a); i++) {
        int64_t e;
        if (!moec_json_int(moec_json_at(a, i), &e) || e < 0 || e >= l->n_experts || l->into[e] >= 0)
            return moec_fail(r->err, MOEC_EFORMAT, "%s: %s: merged: an entry is not an expert from 0 to %lld, each once", r->what,
                             where, (long long)l->n_experts - 1);
        centre = i == 0 ? e : centre;
        l->into[e] = (int32_t)centre;
    }
    return MOEC_OK;
}

static moec_status read_merged(moec_plan_layer *l, const moec_reader *r, const moec_json *o, const char *where)
{
    const moec_json *a = moec_json_get(o, "merged");
    moec_status st = MOEC_OK;
    if (!a)
        return st;
    if (moec_json_type(a) != MOEC_JSON_ARRAY || moec_json_len(a) > (size_t)l->n_experts)
        return moec_fail(r->err, MOEC_EFORMAT, "%s: %s: merged is not a list of groups", r->what, where);
    MOEC_TRY(MOEC_NEW(l->into, (size_t)l->n_experts, r->err));
    for (int64_t e = 0; e < l->n_experts; e++)
        l->into[e] = -1;
    for (size_t i = 0; i < moec_json_len(a); i++)
        MOEC_TRY(read_group(l, r, moec_json_at(a, i), where));
    for (int64_t k = 0; k < l->n_keep; k++)
        if (l->into[l->keep[k]] < 0)
            l->into[l->keep[k]] = l->keep[k];
    for (int64_t e = 0; e < l->n_experts; e++) {
        const int32_t to = l->into[e];
        bool kept = to < 0;
        for (int64_t k = 0; !kept && k < l->n_keep; k++)
            kept = l->keep[k] == to;
        if (!kept)
            return moec_fail(r->err, MOEC_EFORMAT, "%s: %s: merged: expert %d, into which %d went, is not kept", r->what, where,
                             (int)to, (int)e);
    }
done:
    return st;
}

static moec_status read_rewritten(moec_plan_layer *l, const moec_reader *r, const moec_json *o, const char *where)
{
    const moec_json *a = moec_json_get(o, "rewritten"), *h = moec_json_get(o, "held_out");
    l->error_before = l->error_after = (double)NAN;
    if (a && (moec_json_type(a) != MOEC_JSON_ARRAY || moec_json_len(a) > MOEC_COUNT(parts)))
        return moec_fail(r->err, MOEC_EFORMAT, "%s: %s: rewritten is not a list of names of weights", r->what, where);
    for (size_t i = 0; i < moec_json_len(a); i++) {
        const char *name = moec_json_string(moec_json_at(a, i));
        size_t k = 0;
        while (k < MOEC_COUNT(parts) && !(name && strcmp(parts[k].name, name) == 0))
            k++;
        if (k == MOEC_COUNT(parts))
            return moec_fail(r->err, MOEC_EFORMAT, "%s: %s: rewritten: %.40s is not gate, up, down, router, router_bias or "
                             "selection_bias", r->what, where, name ? name : "an entry");
        l->rewritten |= parts[k].bit;
    }
    if (h && (moec_json_len(h) != 2 || !moec_json_real(moec_json_at(h, 0), &l->error_before) ||
              !moec_json_real(moec_json_at(h, 1), &l->error_after)))
        return moec_fail(r->err, MOEC_EFORMAT, "%s: %s: held_out is not two numbers", r->what, where);
    return read_shift(l, r, o, where);
}

static moec_status read_layer(moec_plan_layer *l, const moec_reader *r, moec_json *o, int64_t i)
{
    static const char *const known[] = {"layer", "experts", "keep", "unseen", "protected", "score", "rewritten", "held_out",
                                        "load_shift", "router_refit", "merged", "bits"};
    moec_status st = MOEC_OK;
    char where[48];
    snprintf(where, sizeof where, "layers[%lld]", (long long)i);
    MOEC_TRY(moec__read_keys(r, o, where, known, MOEC_COUNT(known)));
    MOEC_TRY(moec__read_int(&l->layer, r, o, where, "layer", 0, MAX_LAYERS - 1));
    MOEC_TRY(moec__read_int(&l->n_experts, r, o, where, "experts", 1, MAX_EXPERTS));
    MOEC_TRY(read_list(&l->keep, &l->n_keep, r, o, where, "keep", l->n_experts, true));
    MOEC_TRY(read_list(&l->unseen, &l->n_unseen, r, o, where, "unseen", l->n_experts, false));
    MOEC_TRY(read_list(&l->guarded, &l->n_guarded, r, o, where, "protected", l->n_experts, false));
    MOEC_TRY(read_scores(l, r, o, where));
    MOEC_TRY(read_merged(l, r, o, where));
    MOEC_TRY(read_rewritten(l, r, o, where));
done:
    return st;
}

static moec_status read_layers(moec_plan *p, const moec_reader *r, const moec_json *a)
{
    size_t n = moec_json_len(a);
    if (moec_json_type(a) != MOEC_JSON_ARRAY || n < 1 || n > MAX_LAYERS)
        return moec_fail(r->err, MOEC_EFORMAT, "%s: layers is not a list of 1 to %d layers", r->what, MAX_LAYERS);
    moec_status st = MOEC_OK;
    for (size_t i = 0; st == MOEC_OK && i < n; i++) {
        p->n_sets = ++p->n_layers;
        st = read_layer(&p->layer[i], r, moec_json_at(a, i), (int64_t)i);
        if (st == MOEC_OK && i > 0 && p->layer[i].layer <= p->layer[i - 1].layer)
            st = moec_fail(r->err, MOEC_EFORMAT, "%s: layers[%zu] is layer %lld, behind layer %lld; layers must ascend",
                           r->what, i, (long long)p->layer[i].layer, (long long)p->layer[i - 1].layer);
    }
    return st;
}

static moec_status read_other(moec_plan_layer *l, const moec_reader *r, moec_json *o, size_t i)
{
    static const char *const known[] = {"kind", "layer", "experts", "keep", "rewritten"};
    moec_status st = MOEC_OK;
    char where[48], kind[16];
    snprintf(where, sizeof where, "others[%zu]", i);
    MOEC_TRY(moec__read_keys(r, o, where, known, MOEC_COUNT(known)));
    MOEC_TRY(moec__read_text(kind, sizeof kind, r, o, "kind", true));
    l->kind = strcmp(kind, kinds[MOEC_SET_MTP]) == 0 ? MOEC_SET_MTP : MOEC_SET_HEADS;
    if (strcmp(kind, kinds[l->kind]) != 0)
        return moec_fail(r->err, MOEC_EFORMAT, "%s: %s: kind is %s, expected attention or mtp", r->what, where, kind);
    MOEC_TRY(moec__read_int(&l->layer, r, o, where, "layer", 0, MAX_LAYERS - 1));
    MOEC_TRY(moec__read_int(&l->n_experts, r, o, where, "experts", 1, MAX_EXPERTS));
    MOEC_TRY(read_list(&l->keep, &l->n_keep, r, o, where, "keep", l->n_experts, true));
    MOEC_TRY(read_rewritten(l, r, o, where));
done:
    return st;
}

static moec_status read_others(moec_plan *p, const moec_reader *r, const moec_json *a)
{
    moec_status st = MOEC_OK;
    if (!a)
        return MOEC_OK;
    if (moec_json_type(a) != MOEC_JSON_ARRAY || moec_json_len(a) > MAX_LAYERS)
        return moec_fail(r->err, MOEC_EFORMAT, "%s: others is not a list of at most %d sets", r->what, MAX_LAYERS);
    for (size_t i = 0; st == MOEC_OK && i < moec_json_len(a); i++) {
        moec_plan_layer *l = &p->layer[p->n_sets++];
        st = read_other(l, r, moec_json_at(a, i), i);
        if (st == MOEC_OK && i > 0 && (l->kind < l[-1].kind || (l->kind == l[-1].kind && l->layer <= l[-1].layer)))
            st = moec_fail(r->err, MOEC_EFORMAT, "%s: others[%zu]: first attention, then mtp, and layers must ascend",
                           r->what, i);
    }
    return st;
}

/* A mapped layer's every row leads somewhere. */
static moec_status read_leads(const moec_plan *p, const moec_reader *r)
{
    for (int64_t i = 0; p->mapped && i < p->n_layers; i++) {
        const moec_plan_layer *l = &p->layer[i];
        for (int32_t e = 0; l->n_keep < l->n_experts && e < l->n_experts; e++)
            if (!l->into || l->into[e] < 0)
                return moec_fail(r->err, MOEC_EFORMAT, "%s: layers[%lld]: expert %d is neither kept nor merged, which \"emit\": "
                                 "\"map\" does not know", r->what, (long long)i, (int)e);
    }
    return MOEC_OK;
}

static moec_status read_sets(moec_plan *p, const moec_reader *r, const moec_json *root)
{
    const moec_json *layers = moec_json_get(root, "layers"), *others = moec_json_get(root, "others");
    size_t n = moec_json_len(layers), more = moec_json_len(others);
    moec_status st = MOEC_NEW(p->layer, (n > MAX_LAYERS ? 0 : n) + (more > MAX_LAYERS ? 0 : more), r->err);
    if (st == MOEC_OK)
        st = read_layers(p, r, layers);
    return st == MOEC_OK ? read_others(p, r, others) : st;
}

/* An optional text that is one of two words. */
static moec_status read_word(const char **out, const moec_reader *r, const moec_json *root, const char *key,
                             const char *const *words, size_t n)
{
    const moec_json *v = moec_json_get(root, key);
    const char *text = moec_json_string(v);
    *out = NULL;
    for (size_t i = 0; text && i < n && !*out; i++)
        if (strcmp(text, words[i]) == 0)
            *out = words[i];
    return *out || !v ? MOEC_OK : moec_fail(r->err, MOEC_EFORMAT, "%s: %s is %.40s, expected %s%s%s", r->what, key,
                                            text ? text : "no text", words[0], n > 1 ? " or " : "", n > 1 ? words[1] : "");
}

/* What is only there where it applies. */
static moec_status read_extras(moec_plan *p, const moec_reader *r, moec_json *root)
{
    static const char *const policies[] = {"keep", "drop"}, *const types[] = {"bf16", "f16", "f32"}, *const emits[] = {"map"};
    moec_status st = MOEC_OK;
    const char *word;
    MOEC_TRY(read_word(&word, r, root, "mtp", policies, 2));
    p->mtp = !word ? MOEC_PLAN_MTP_UNSAID : word == policies[1] ? MOEC_PLAN_MTP_DROP : MOEC_PLAN_MTP_KEEP;
    MOEC_TRY(read_word(&word, r, root, "groups", policies + 1, 1));
    p->drop_groups = word != NULL;
    MOEC_TRY(read_word(&word, r, root, "dtype", types, MOEC_COUNT(types)));
    p->dtype = word ? moec_plan_dtype(word) : MOEC_DTYPE_COUNT;
    MOEC_TRY(read_word(&word, r, root, "emit", emits, 1));
    p->mapped = word != NULL;
    if (moec_json_get(root, "expert_shards") && !moec_json_bool(moec_json_get(root, "expert_shards"), &p->expert_shards))
        return moec_fail(r->err, MOEC_EFORMAT, "%s: expert_shards is not true or false", r->what);
    if (moec_json_get(root, "pad"))
        MOEC_TRY(moec__read_int(&p->pad, r, root, "plan", "pad", 1, MAX_EXPERTS));
    if (moec_json_get(root, "expert_width"))
        MOEC_TRY(moec__read_int(&p->width, r, root, "plan", "expert_width", 1, 1 << 20));
    if (moec_json_get(root, "drop_layers"))
        MOEC_TRY(read_list(&p->drop, &p->n_drop, r, root, "plan", "drop_layers", MAX_LAYERS, true));
    MOEC_TRY(moec__read_text(p->weights, sizeof p->weights, r, root, "weights", false));
    moec_json *repair = moec_json_get(root, "repair");
    if (repair && moec_json_type(repair) != MOEC_JSON_OBJECT)
        return moec_fail(r->err, MOEC_EFORMAT, "%s: repair is not a JSON object", r->what);
    if (repair)
        MOEC_TRY(moec_json_dump(&p->repair, repair, 0, r->err));
done:
    return st;
}

static moec_status read_head(moec_plan *p, const moec_reader *r, const moec_json *root)
{
    moec_status st = MOEC_OK;
    int64_t version;
    const char *kind = moec_json_string(moec_json_get(root, "kind"));
    moec_json *options = moec_json_get(root, "options");
    MOEC_TRY(moec__read_int(&version, r, root, "plan", "moecompress_plan", VERSION, VERSION));
    if (!kind || (strcmp(kind, "prune") != 0 && strcmp(kind, "merge") != 0 && strcmp(kind, "factor") != 0 && strcmp(kind, "quantize") != 0))
        return moec_fail(r->err, MOEC_EFORMAT, "%s: kind is %.40s, expected prune, merge, factor or quantize", r->what,
                         kind ? kind : "missing");
    if (options && moec_json_type(options) != MOEC_JSON_OBJECT)
        return moec_fail(r->err, MOEC_EFORMAT, "%s: options is not a JSON object", r->what);
    MOEC_TRY(moec__read_text(p->model, sizeof p->model, r, root, "model", true));
    MOEC_TRY(moec__read_text(p->model_type, sizeof p->model_type, r, root, "model_type", false));
    MOEC_TRY(moec__read_text(p->method, sizeof p->method, r, root, "method", false));
    MOEC_TRY(moec__read_text(p->stats, sizeof p->stats, r, root, "stats", false));
    MOEC_TRY(moec__read_int(&p->top_k, r, root, "plan", "top_k", 1, MAX_EXPERTS));
    MOEC_TRY(moec__read_int(&p->new_top_k, r, root, "plan", "new_top_k", 1, p->top_k));
    MOEC_TRY(options ? moec_json_dump(&p->options, options, 0, r->err) : moec_copy(&p->options, "{}", 2, r->err));
done:
    return st;
}

moec_status moec_plan_from_json(moec_plan **out, moec_json *root, const char *what, moec_err *err)
{
    static const char *const known[] = {"moecompress_plan", "kind",   "model", "model_type", "method",
                                        "options",          "stats",  "top_k", "new_top_k",  "mtp",
                                        "groups",           "pad",    "dtype", "layers",     "betas",            "others",
                                        "expert_width",     "repair", "weights", "drop_layers", "factor", "quant",     "emit",
                                        "expert_shards"};
    moec_status st = MOEC_OK;
    moec_plan *p = NULL;
    const moec_reader r = {.what = what, .err = err};
    *out = NULL;
    MOEC_TRY(moec__read_keys(&r, root, "the plan", known, MOEC_COUNT(known)));
    MOEC_TRY(MOEC_NEW(p, 1, err));
    MOEC_TRY(read_head(p, &r, root));
    MOEC_TRY(read_extras(p, &r, root));
    MOEC_TRY(read_sets(p, &r, root));
    MOEC_TRY(read_leads(p, &r));
    MOEC_TRY(read_betas(p, &r, root));
    MOEC_TRY(moec__factor_read(p, &r, moec_json_get(root, "factor")));
    MOEC_TRY(moec__quant_read(p, &r, root));
    *out = p;
    p = NULL;
done:
    moec_plan_free(p);
    return st;
}

moec_status moec_plan_parse(moec_plan **out, const char *text, size_t len, const char *what, moec_err *err)
{
    moec_json *root = NULL;
    *out = NULL;
    moec_status st = moec_json_parse(&root, text, len, what, err);
    if (st == MOEC_OK)
        st = moec_plan_from_json(out, root, what, err);
    moec_json_free(root);
    return st;
}

moec_status moec_plan_read(moec_plan **out, const char *path, moec_err *err)
{
    char *text;
    size_t len;
    *out = NULL;
    moec_status st = moec_file_read(&text, &len, path, max_file, err);
    if (st == MOEC_OK) {
        st = moec_plan_parse(out, text, len, path, err);
        moec_free(text);
    }
    return st;
}
