/* Plans as text: writing, strict reading, checking against a model. */
#include "method/plan.h"

#include "base/file.h"
#include "base/mem.h"

#include <stdio.h>
#include <string.h>

enum { VERSION = 1, MAX_LAYERS = 4096, MAX_EXPERTS = 65535 };
static const size_t max_file = (size_t)1 << 30;

void moec_plan_free(moec_plan *p)
{
    if (!p)
        return;
    for (int64_t i = 0; p->layer && i < p->n_layers; i++) {
        moec_free(p->layer[i].keep);
        moec_free(p->layer[i].score);
        moec_free(p->layer[i].unseen);
        moec_free(p->layer[i].guarded);
    }
    moec_free(p->layer);
    moec_free(p->options);
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
    MOEC_TRY(MOEC_NEW(p->layer, (size_t)m->moe_layers, err));
    for (int64_t l = 0; l < m->dims.layers; l++)
        if (m->layer[l].router)
            p->layer[p->n_layers++] = (moec_plan_layer){.layer = l, .n_experts = m->dims.experts};
    *out = p;
    p = NULL;
done:
    moec_plan_free(p);
    return st;
}

/* --- writing --------------------------------------------------------------------------------------------------------- */

static moec_json *int_list(const int32_t *v, int64_t n)
{
    moec_json *a = moec_json_new_array();
    for (int64_t i = 0; i < n; i++)
        moec_json_push(a, moec_json_new_int(v[i]));
    return a;
}

static moec_json *layer_json(const moec_plan_layer *l)
{
    moec_json *o = moec_json_new_object();
    moec_json_set(o, "layer", moec_json_new_int(l->layer));
    moec_json_set(o, "experts", moec_json_new_int(l->n_experts));
    moec_json_set(o, "keep", int_list(l->keep, l->n_keep));
    moec_json_set(o, "unseen", int_list(l->unseen, l->n_unseen));
    moec_json_set(o, "protected", int_list(l->guarded, l->n_guarded));
    if (l->score) {
        moec_json *a = moec_json_new_array();
        for (int64_t e = 0; e < l->n_experts; e++)
            moec_json_push(a, moec_json_new_real(l->score[e]));
        moec_json_set(o, "score", a);
    }
    return o;
}

/* Everything but the layers. */
static moec_status head_json(moec_json **out, const moec_plan *p, moec_err *err)
{
    moec_json *options = NULL, *o;
    const char *text = p->options ? p->options : "{}";
    moec_status st = moec_json_parse(&options, text, strlen(text), "plan options", err);
    if (st != MOEC_OK)
        return st;
    *out = o = moec_json_new_object();
    moec_json_set(o, "moecompress_plan", moec_json_new_int(VERSION));
    moec_json_set(o, "kind", moec_json_new_string("prune"));
    moec_json_set(o, "model", moec_json_new_string(p->model));
    moec_json_set(o, "model_type", moec_json_new_string(p->model_type));
    moec_json_set(o, "method", moec_json_new_string(p->method));
    moec_json_set(o, "options", options);
    moec_json_set(o, "stats", moec_json_new_string(p->stats));
    moec_json_set(o, "top_k", moec_json_new_int(p->top_k));
    moec_json_set(o, "new_top_k", moec_json_new_int(p->new_top_k));
    return MOEC_OK;
}

moec_status moec_plan_to_json(moec_json **out, const moec_plan *p, moec_err *err)
{
    *out = NULL;
    moec_status st = head_json(out, p, err);
    if (st != MOEC_OK)
        return st;
    moec_json *layers = moec_json_new_array();
    for (int64_t i = 0; i < p->n_layers; i++)
        moec_json_push(layers, layer_json(&p->layer[i]));
    moec_json_set(*out, "layers", layers);
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
    MOEC_TRY(add_text(&b, "  \"layers\": [\n", err));
    for (int64_t i = 0; i < p->n_layers; i++) {
        MOEC_TRY(add_text(&b, "    ", err));
        MOEC_TRY(add_value(&b, layer_json(&p->layer[i]), err));
        MOEC_TRY(add_text(&b, i + 1 < p->n_layers ? ",\n" : "\n", err));
    }
    MOEC_TRY(add_text(&b, "  ]\n}\n", err));
    *out = b.at;
    b.at = NULL;
done:
    moec_json_free(head);
    moec_free(b.at);
    return st;
}

/* --- reading --------------------------------------------------------------------------------------------------------- */

typedef struct reader {
    const char *what;
    moec_err *err;
} reader;

static moec_status check_keys(const reader *r, moec_json *o, const char *where, const char *const *known, size_t n)
{
    void *it = NULL;
    const char *key;
    moec_json *value;
    if (moec_json_type(o) != MOEC_JSON_OBJECT)
        return moec_fail(r->err, MOEC_EFORMAT, "%s: %s is not a JSON object", r->what, where);
    while (moec_json_each(o, &it, &key, &value)) {
        size_t i = 0;
        while (i < n && strcmp(key, known[i]) != 0)
            i++;
        if (i == n)
            return moec_fail(r->err, MOEC_EFORMAT, "%s: %s: unknown key %.60s", r->what, where, key);
    }
    return MOEC_OK;
}

static moec_status read_int(int64_t *out, const reader *r, const moec_json *o, const char *where, const char *key,
                            int64_t lo, int64_t hi)
{
    if (!moec_json_int(moec_json_get(o, key), out))
        return moec_fail(r->err, MOEC_EFORMAT, "%s: %s: %s is not a whole number", r->what, where, key);
    if (*out < lo || *out > hi)
        return moec_fail(r->err, MOEC_EFORMAT, "%s: %s: %s is %lld, expected %lld to %lld", r->what, where, key,
                         (long long)*out, (long long)lo, (long long)hi);
    return MOEC_OK;
}

/* An optional text; a needed one when `needed`. */
static moec_status read_text(char *out, size_t cap, const reader *r, const moec_json *o, const char *key, bool needed)
{
    const moec_json *v = moec_json_get(o, key);
    const char *text = moec_json_string(v);
    out[0] = '\0';
    if (!v && !needed)
        return MOEC_OK;
    if (!text)
        return moec_fail(r->err, MOEC_EFORMAT, "%s: %s is not a text", r->what, key);
    if (strlen(text) != moec_json_len(v) || strlen(text) >= cap)
        return moec_fail(r->err, MOEC_EFORMAT, "%s: %s is longer than %zu bytes", r->what, key, cap - 1);
    set_text(out, cap, text);
    return MOEC_OK;
}

/* Ascending expert numbers; absent and not needed: none. */
static moec_status read_list(int32_t **out, int64_t *n, const reader *r, const moec_json *o, const char *where,
                             const char *key, int64_t experts, bool needed)
{
    const moec_json *a = moec_json_get(o, key);
    *n = 0;
    if (!a && !needed)
        return MOEC_OK;
    size_t len = moec_json_len(a);
    if (moec_json_type(a) != MOEC_JSON_ARRAY || len > (size_t)experts || (needed && len == 0))
        return moec_fail(r->err, MOEC_EFORMAT, "%s: %s: %s is not a list of %d to %lld expert numbers", r->what, where,
                         key, needed, (long long)experts);
    moec_status st = MOEC_NEW(*out, len, r->err);
    for (size_t i = 0; st == MOEC_OK && i < len; i++) {
        int64_t v;
        if (!moec_json_int(moec_json_at(a, i), &v) || v < 0 || v >= experts)
            return moec_fail(r->err, MOEC_EFORMAT, "%s: %s: %s: entry %zu is not an expert number from 0 to %lld",
                             r->what, where, key, i, (long long)experts - 1);
        if (i > 0 && v <= (*out)[i - 1])
            return moec_fail(r->err, MOEC_EFORMAT, "%s: %s: %s: %lld stands behind %d; numbers must ascend", r->what,
                             where, key, (long long)v, (int)(*out)[i - 1]);
        (*out)[i] = (int32_t)v;
        ++*n;
    }
    return st;
}

static moec_status read_scores(moec_plan_layer *l, const reader *r, const moec_json *o, const char *where)
{
    const moec_json *a = moec_json_get(o, "score");
    if (!a)
        return MOEC_OK;
    if (moec_json_type(a) != MOEC_JSON_ARRAY || moec_json_len(a) != (size_t)l->n_experts)
        return moec_fail(r->err, MOEC_EFORMAT, "%s: %s: score is not a list of %lld numbers", r->what, where,
                         (long long)l->n_experts);
    moec_status st = MOEC_NEW(l->score, (size_t)l->n_experts, r->err);
    for (int64_t e = 0; st == MOEC_OK && e < l->n_experts; e++)
        if (!moec_json_real(moec_json_at(a, (size_t)e), &l->score[e]))
            return moec_fail(r->err, MOEC_EFORMAT, "%s: %s: score %lld is not a number", r->what, where, (long long)e);
    return st;
}

static moec_status read_layer(moec_plan_layer *l, const reader *r, moec_json *o, int64_t i)
{
    static const char *const known[] = {"layer", "experts", "keep", "unseen", "protected", "score"};
    moec_status st = MOEC_OK;
    char where[48];
    snprintf(where, sizeof where, "layers[%lld]", (long long)i);
    MOEC_TRY(check_keys(r, o, where, known, MOEC_COUNT(known)));
    MOEC_TRY(read_int(&l->layer, r, o, where, "layer", 0, MAX_LAYERS - 1));
    MOEC_TRY(read_int(&l->n_experts, r, o, where, "experts", 1, MAX_EXPERTS));
    MOEC_TRY(read_list(&l->keep, &l->n_keep, r, o, where, "keep", l->n_experts, true));
    MOEC_TRY(read_list(&l->unseen, &l->n_unseen, r, o, where, "unseen", l->n_experts, false));
    MOEC_TRY(read_list(&l->guarded, &l->n_guarded, r, o, where, "protected", l->n_experts, false));
    MOEC_TRY(read_scores(l, r, o, where));
done:
    return st;
}

static moec_status read_layers(moec_plan *p, const reader *r, const moec_json *root)
{
    const moec_json *a = moec_json_get(root, "layers");
    size_t n = moec_json_len(a);
    if (moec_json_type(a) != MOEC_JSON_ARRAY || n < 1 || n > MAX_LAYERS)
        return moec_fail(r->err, MOEC_EFORMAT, "%s: layers is not a list of 1 to %d layers", r->what, MAX_LAYERS);
    moec_status st = MOEC_NEW(p->layer, n, r->err);
    for (size_t i = 0; st == MOEC_OK && i < n; i++) {
        p->n_layers++;
        st = read_layer(&p->layer[i], r, moec_json_at(a, i), (int64_t)i);
        if (st == MOEC_OK && i > 0 && p->layer[i].layer <= p->layer[i - 1].layer)
            st = moec_fail(r->err, MOEC_EFORMAT, "%s: layers[%zu] is layer %lld, behind layer %lld; layers must ascend",
                           r->what, i, (long long)p->layer[i].layer, (long long)p->layer[i - 1].layer);
    }
    return st;
}

static moec_status read_head(moec_plan *p, const reader *r, const moec_json *root)
{
    moec_status st = MOEC_OK;
    int64_t version;
    const char *kind = moec_json_string(moec_json_get(root, "kind"));
    moec_json *options = moec_json_get(root, "options");
    MOEC_TRY(read_int(&version, r, root, "plan", "moecompress_plan", VERSION, VERSION));
    if (!kind || strcmp(kind, "prune") != 0)
        return moec_fail(r->err, MOEC_EFORMAT, "%s: kind is %.40s, expected prune", r->what, kind ? kind : "missing");
    if (options && moec_json_type(options) != MOEC_JSON_OBJECT)
        return moec_fail(r->err, MOEC_EFORMAT, "%s: options is not a JSON object", r->what);
    MOEC_TRY(read_text(p->model, sizeof p->model, r, root, "model", true));
    MOEC_TRY(read_text(p->model_type, sizeof p->model_type, r, root, "model_type", false));
    MOEC_TRY(read_text(p->method, sizeof p->method, r, root, "method", false));
    MOEC_TRY(read_text(p->stats, sizeof p->stats, r, root, "stats", false));
    MOEC_TRY(read_int(&p->top_k, r, root, "plan", "top_k", 1, MAX_EXPERTS));
    MOEC_TRY(read_int(&p->new_top_k, r, root, "plan", "new_top_k", 1, p->top_k));
    MOEC_TRY(options ? moec_json_dump(&p->options, options, 0, r->err) : moec_copy(&p->options, "{}", 2, r->err));
done:
    return st;
}

moec_status moec_plan_from_json(moec_plan **out, moec_json *root, const char *what, moec_err *err)
{
    static const char *const known[] = {"moecompress_plan", "kind",  "model", "model_type", "method",
                                        "options",          "stats", "top_k", "new_top_k",  "layers"};
    moec_status st = MOEC_OK;
    moec_plan *p = NULL;
    const reader r = {.what = what, .err = err};
    *out = NULL;
    MOEC_TRY(check_keys(&r, root, "the plan", known, MOEC_COUNT(known)));
    MOEC_TRY(MOEC_NEW(p, 1, err));
    MOEC_TRY(read_head(p, &r, root));
    MOEC_TRY(read_layers(p, &r, root));
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

/* --- checking -------------------------------------------------------------------------------------------------------- */

static moec_status check_layer(const moec_plan *p, int64_t i, const moec_model *m, moec_err *err)
{
    const moec_plan_layer *l = &p->layer[i];
    if (l->layer >= m->dims.layers || !m->layer[l->layer].router)
        return moec_fail(err, MOEC_EFORMAT, "plan: layer %lld is no layer with experts in this model",
                         (long long)l->layer);
    if (l->n_experts != m->dims.experts)
        return moec_fail(err, MOEC_EFORMAT, "plan: layer %lld is for %lld experts, the model has %lld",
                         (long long)l->layer, (long long)l->n_experts, (long long)m->dims.experts);
    if (l->n_keep != p->layer[0].n_keep)
        return moec_fail(err, MOEC_EFORMAT,
                         "plan: layer %lld keeps %lld experts, layer %lld keeps %lld; clients load one count for all layers",
                         (long long)l->layer, (long long)l->n_keep, (long long)p->layer[0].layer,
                         (long long)p->layer[0].n_keep);
    return MOEC_OK;
}

moec_status moec_plan_check(const moec_plan *p, const moec_model *m, const char *fingerprint, moec_err *err)
{
    moec_status st = MOEC_OK;
    if (p->model[0] && strcmp(p->model, fingerprint) != 0)
        return moec_fail(err, MOEC_EFORMAT, "plan: it is for another model (fingerprint %s, this one has %s)", p->model,
                         fingerprint);
    if (p->n_layers != m->moe_layers)
        return moec_fail(err, MOEC_EFORMAT, "plan: it has %lld layers, the model has %lld with experts",
                         (long long)p->n_layers, (long long)m->moe_layers);
    for (int64_t i = 0; i < p->n_layers; i++)
        if ((st = check_layer(p, i, m, err)) != MOEC_OK)
            return st;
    if (p->top_k != m->dims.top_k)
        return moec_fail(err, MOEC_EFORMAT, "plan: top_k is %lld, the model has %lld", (long long)p->top_k,
                         (long long)m->dims.top_k);
    if (p->new_top_k > p->layer[0].n_keep)
        return moec_fail(err, MOEC_EFORMAT, "plan: new_top_k is %lld, more than the %lld experts that are kept",
                         (long long)p->new_top_k, (long long)p->layer[0].n_keep);
    return MOEC_OK;
}

int64_t moec_plan_number(const moec_plan *p, int64_t l, int64_t expert)
{
    const moec_plan_layer *pl = &p->layer[l];
    int64_t lo = 0, hi = pl->n_keep;
    while (lo < hi) {
        int64_t mid = lo + (hi - lo) / 2;
        if (pl->keep[mid] == expert)
            return mid;
        if (pl->keep[mid] < expert)
            lo = mid + 1;
        else
            hi = mid;
    }
    return -1;
}

const moec_plan_layer *moec_plan_find(const moec_plan *p, int64_t layer)
{
    for (int64_t i = 0; i < p->n_layers; i++)
        if (p->layer[i].layer == layer)
            return &p->layer[i];
    return NULL;
}
