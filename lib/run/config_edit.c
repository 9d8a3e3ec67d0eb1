/* The edits in config.json: values are replaced where they stand, every other byte stays. */
#include "run/layout.h"

#include "base/mem.h"
#include "method/factor.h"
#include "model/config.h"
#include "run/format.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_PATH = 256 };

/* The text as it is being edited, and what it said before. */
typedef struct editor {
    char **text;
    const moec_model *m;
    const moec_json *root;
    const char *at; /* "" or "text_config." */
} editor;

static void full_path(char path[MAX_PATH], const editor *e, const char *key)
{
    snprintf(path, MAX_PATH, "%s%s", e->at, key);
}

static const moec_json *value_at(const editor *e, const char *key)
{
    char path[MAX_PATH];
    full_path(path, e, key);
    return moec_json_path(e->root, path);
}

/* Takes the new text over. */
static moec_status take(const editor *e, moec_status st, char *next)
{
    if (st == MOEC_OK) {
        moec_free(*e->text);
        *e->text = next;
    }
    return st;
}

static moec_status edit(const editor *e, const char *path, const char *value, moec_err *err)
{
    char *next = NULL;
    moec_status st = moec_json_edit(&next, *e->text, path, value, err);
    return take(e, st, next);
}

/* Where the value of a path stands in the text: a byte that no JSON text has marks the place. */
static moec_status find(size_t *at, size_t *len, const editor *e, const char *path, moec_err *err)
{
    char *marked;
    moec_status st = moec_json_edit(&marked, *e->text, path, "\x01", err);
    if (st != MOEC_OK)
        return st;
    *at = (size_t)(strchr(marked, '\x01') - marked);
    *len = strlen(*e->text) - (strlen(marked) - 1);
    moec_free(marked);
    return MOEC_OK;
}

/* Puts a key in front of the others of its object: the family's default was in force, and is no longer right. */
static moec_status insert(const editor *e, const char *key, const char *value, moec_err *err)
{
    char object[MAX_PATH], *next = NULL;
    full_path(object, e, key);
    char *dot = strrchr(object, '.');
    const char *name = dot ? dot + 1 : object, *text = *e->text;
    size_t at = strcspn(text, "{"), len;
    moec_status st = MOEC_OK;
    if (dot) {
        *dot = '\0';
        st = find(&at, &len, e, object, err);
    }
    if (st != MOEC_OK)
        return st;
    if (text[at] != '{')
        return moec_fail(err, MOEC_EFORMAT, "config.json: %s is not a JSON object", dot ? object : "it");
    st = moec_format(&next, err, "%.*s{\n  \"%s\": %s,%s", (int)at, text, name, value, text + at + 1);
    return take(e, st, next);
}

/* The text of a list of numbers with another number in place of each. */
static moec_status set_entries(char **out, const char *list, size_t len, const char *number, moec_err *err)
{
    moec_status st = MOEC_NEW(*out, len * strlen(number) + 1, err);
    if (st != MOEC_OK)
        return st;
    char *to = *out;
    for (const char *p = list; p < list + len;) {
        const size_t old = strspn(p, "+-.0123456789eE"), n = old > 0 ? strlen(number) : 1;
        memcpy(to, old > 0 ? number : p, n);
        to += n;
        p += old > 0 ? old : 1;
    }
    return MOEC_OK;
}

/* Sets a number where a key stands; a list, one entry a layer, gets all its entries set. */
static moec_status set_value(const editor *e, const char *key, int64_t value, moec_err *err)
{
    moec_status st = MOEC_OK;
    char path[MAX_PATH], number[32], *list = NULL;
    size_t at, len;
    full_path(path, e, key);
    snprintf(number, sizeof number, "%lld", (long long)value);
    if (moec_json_type(value_at(e, key)) == MOEC_JSON_ARRAY) {
        MOEC_TRY(find(&at, &len, e, path, err));
        MOEC_TRY(set_entries(&list, *e->text + at, len, number, err));
    }
    MOEC_TRY(edit(e, path, list ? list : number, err));
done:
    moec_free(list);
    return st;
}

/* Sets a number under every alias that is there; when none is, the family's default was in force and the first is added. */
static moec_status set_number(const editor *e, const char *const *keys, int n, int64_t value, moec_err *err)
{
    moec_status st = MOEC_OK;
    char number[32];
    bool found = false;
    for (int i = 0; i < n && keys[i]; i++)
        if (value_at(e, keys[i])) {
            found = true;
            MOEC_TRY(set_value(e, keys[i], value, err));
        }
    snprintf(number, sizeof number, "%lld", (long long)value);
    if (!found && keys[0])
        MOEC_TRY(insert(e, keys[0], number, err));
done:
    return st;
}

static moec_status drop_groups(const editor *e, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_family *f = e->m->family;
    char path[MAX_PATH];
    MOEC_TRY(set_number(e, &f->key_groups, 1, 1, err));
    MOEC_TRY(set_number(e, &f->key_top_groups, 1, 1, err));
    const char *method = moec_json_string(value_at(e, "topk_method"));
    full_path(path, e, "topk_method");
    if (method && strcmp(method, "group_limited_greedy") == 0)
        MOEC_TRY(edit(e, path, "\"greedy\"", err));
done:
    return st;
}

/* "betas": {"0": x, ..}, layers numbered as in the model: the key that Lu et al.'s modelling code reads. */
static moec_status set_betas(const editor *e, const moec_plan *p, moec_err *err)
{
    char number[24], path[MAX_PATH], *text = NULL;
    moec_json *o = moec_json_new_object();
    for (int64_t l = 0; l < p->n_layers; l++) {
        snprintf(number, sizeof number, "%lld", (long long)p->layer[l].layer);
        moec_json_set(o, number, moec_json_new_real(p->betas[l]));
    }
    moec_status st = moec_json_dump(&text, o, 0, err);
    moec_json_free(o);
    full_path(path, e, "betas");
    if (st == MOEC_OK)
        st = value_at(e, "betas") ? edit(e, path, text, err) : insert(e, "betas", text, err);
    moec_free(text);
    return st;
}

/* --- modules that a quantization leaves out -------------------------------------------------------------------------- */

/* The number behind `word` in a name, if there is one and a dot or the end behind it. */
static const char *number_behind(int64_t *out, const char **end, const char *name, const char *word)
{
    for (const char *p = strstr(name, word); p; p = strstr(p + 1, word)) {
        const char *digits = p + strlen(word);
        size_t n = strspn(digits, "0123456789");
        if (n > 0 && n < 10 && (digits[n] == '.' || digits[n] == '\0')) {
            *out = strtoll(digits, NULL, 10);
            *end = digits + n;
            return digits;
        }
    }
    return NULL;
}

/* The set that "..layers.L...experts.E.." of an MTP layer or another belongs to; -1: none. */
static int64_t set_of(const moec_model *m, const char *name, int64_t layer)
{
    const char *mtp = m->family->mtp_prefix;
    const bool is_mtp = mtp && strncmp(name, mtp, strlen(mtp)) == 0;
    for (int64_t i = 0; i < m->sets; i++)
        if (m->set[i].layer == layer && m->set[i].kind != MOEC_SET_HEADS &&
            (!mtp || is_mtp == (m->set[i].kind == MOEC_SET_MTP)))
            return i;
    return -1;
}

/* One entry under the new numbers. *out NULL: the expert is gone. */
static moec_status renumber(char **out, bool *changed, const char *name, const moec_model *m, const moec_plan *p,
                            moec_err *err)
{
    int64_t layer, expert;
    const char *end, *skip, *digits = number_behind(&expert, &end, name, ".experts.");
    *out = NULL;
    if (digits && number_behind(&layer, &skip, name, "layers.")) {
        const int64_t set = set_of(m, name, layer);
        const bool stays = set >= 0 && set < p->n_sets;
        int64_t number = stays ? moec_plan_number(p, m, set, expert) : -1;
        if (set >= 0 && expert < m->dims.experts && number != expert) {
            *changed = true;
            return number < 0 ? MOEC_OK : moec_format(out, err, "%.*s%lld%s", (int)(digits - name), name,
                                                      (long long)number, end);
        }
    }
    return moec_copy(out, name, strlen(name), err);
}

/* The same of the layer's number; *name NULL: it is gone. */
static moec_status renumber_layer(char **name, bool *changed, const moec_model *m, const moec_plan *p, moec_err *err)
{
    int64_t layer;
    const char *end, *own = m->family->mtp_prefix;
    char *was = *name;
    const char *digits = was ? number_behind(&layer, &end, was, "layers.") : NULL;
    if (!digits || (own && strncmp(was, own, strlen(own)) == 0))
        return MOEC_OK;
    const int64_t number = moec_plan_layer_number(p, layer);
    if (number == layer)
        return MOEC_OK;
    *changed = true;
    *name = NULL;
    moec_status st = number < 0 ? MOEC_OK : moec_format(name, err, "%.*s%lld%s", (int)(digits - was), was, (long long)number, end);
    moec_free(was);
    return st;
}

static moec_status renumber_list(const editor *e, const char *path, const moec_plan *p, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_json *old = moec_json_path(e->root, path);
    moec_json *list = moec_json_new_array();
    bool changed = false;
    char *name = NULL, *text = NULL;
    for (size_t i = 0; moec_json_type(old) == MOEC_JSON_ARRAY && i < moec_json_len(old); i++) {
        const moec_json *entry = moec_json_at(old, i);
        if (!moec_json_string(entry)) {
            moec_json_push(list, moec_json_clone(entry));
            continue;
        }
        MOEC_TRY(renumber(&name, &changed, moec_json_string(entry), e->m, p, err));
        MOEC_TRY(renumber_layer(&name, &changed, e->m, p, err));
        if (name)
            moec_json_push(list, moec_json_new_string(name));
        moec_free(name);
        name = NULL;
    }
    if (changed) {
        MOEC_TRY(moec_json_dump(&text, list, 0, err));
        MOEC_TRY(edit(e, path, text, err));
    }
done:
    moec_free(name);
    moec_free(text);
    moec_json_free(list);
    return st;
}

/* Cuts a key and its value out, with the comma behind them or, of the last one, in front. */
static moec_status cut(const editor *e, const char *path, moec_err *err)
{
    static const char space[] = " \t\r\n";
    char *next = NULL;
    size_t at, len;
    moec_status st = find(&at, &len, e, path, err);
    if (st != MOEC_OK)
        return st;
    const char *text = *e->text, *end = text + at + len, *begin = text + at;
    while (*begin != ':')
        begin--;
    while (*begin != '"')
        begin--; /* at the quote behind the key */
    begin -= strlen(strrchr(path, '.') ? strrchr(path, '.') + 1 : path) + 1; /* the quote in front of the key */
    end += strspn(end, space);
    if (*end == ',') {
        end++;
        end += strspn(end, space);
    } else {
        while (begin > text && strchr(space, begin[-1]))
            begin--;
        begin -= begin > text && begin[-1] == ',';
        end = text + at + len;
    }
    st = moec_format(&next, err, "%.*s%s", (int)(begin - text), text, end);
    return take(e, st, next);
}

/* The quantization's object may stand beside the model's numbers or at the top. */
static moec_status edit_quantization(const editor *e, const moec_plan *p, moec_err *err)
{
    static const char *const lists[] = {"modules_to_not_convert", "ignore", "ignored_layers"};
    const char *const places[] = {"", e->at};
    moec_status st = MOEC_OK;
    char path[MAX_PATH];
    for (int k = 0; k < (e->at[0] ? 2 : 1); k++) {
        snprintf(path, sizeof path, "%squantization_config", places[k]);
        if (!moec_json_path(e->root, path))
            continue;
        if (p->dtype != MOEC_DTYPE_COUNT || p->quant.format[0]) {
            MOEC_TRY(cut(e, path, err));
            continue;
        }
        for (size_t i = 0; i < MOEC_COUNT(lists); i++) {
            snprintf(path, sizeof path, "%squantization_config.%s", places[k], lists[i]);
            if (moec_json_path(e->root, path))
                MOEC_TRY(renumber_list(e, path, p, err));
        }
    }
done:
    return st;
}

static moec_status edit_dtype(const editor *e, moec_dtype dtype, moec_err *err)
{
    static const char *const keys[] = {"torch_dtype", "dtype"};
    const char *const places[] = {"", e->at};
    const char *word = dtype == MOEC_BF16 ? "\"bfloat16\"" : dtype == MOEC_F16 ? "\"float16\"" : "\"float32\"";
    moec_status st = MOEC_OK;
    char path[MAX_PATH];
    for (int k = 0; k < (e->at[0] ? 2 : 1); k++)
        for (size_t i = 0; i < MOEC_COUNT(keys); i++) {
            snprintf(path, sizeof path, "%s%s", places[k], keys[i]);
            if (moec_json_string(moec_json_path(e->root, path)))
                MOEC_TRY(edit(e, path, word, err));
        }
done:
    return st;
}

/* --- layers that are dropped ----------------------------------------------------------------------------------------- */

static bool one_of(const char *key, const char *const *list, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (strcmp(key, list[i]) == 0)
            return true;
    return false;
}

/* Lists of layers' numbers. */
static bool lists_numbers(const char *key)
{
    static const char *const keys[] = {"mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices"};
    return one_of(key, keys, MOEC_COUNT(keys));
}

/* Lists with an entry for each layer: any of that length but those that have nothing to do with layers. Clients take longer
 * ones of the first three. */
static bool lists_layers(const char *key, size_t n, size_t layers)
{
    static const char *const known[] = {"layer_types", "mlp_layer_types", "no_rope_layers"};
    const size_t len = strlen(key);
    if (one_of(key, known, MOEC_COUNT(known)))
        return n >= layers;
    return n == layers && strcmp(key, "architectures") != 0 && !(len >= 8 && strstr(key, "token_id"));
}

static moec_status cut_list(const editor *e, const char *key, const moec_json *old, const moec_plan *p, moec_err *err)
{
    char path[MAX_PATH], *text = NULL;
    moec_json *list = moec_json_new_array();
    const bool numbers = lists_numbers(key);
    for (size_t i = 0; i < moec_json_len(old); i++) {
        int64_t v = (int64_t)i;
        const moec_json *entry = moec_json_at(old, i);
        if (numbers && !moec_json_int(entry, &v))
            continue;
        const int64_t number = moec_plan_layer_number(p, v);
        if (number >= 0)
            moec_json_push(list, numbers ? moec_json_new_int(number) : moec_json_clone(entry));
    }
    moec_status st = moec_json_dump(&text, list, 0, err);
    full_path(path, e, key);
    if (st == MOEC_OK)
        st = edit(e, path, text, err);
    moec_json_free(list);
    moec_free(text);
    return st;
}

/* Layers below `layer` that stay. */
static int64_t stay_below(const moec_plan *p, int64_t layer)
{
    int64_t n = layer;
    for (int64_t i = 0; i < p->n_drop && p->drop[i] < layer; i++)
        n--;
    return n;
}

/* How many layers, or which, begin or end a kind; where the rule's key is absent, the family's default was in force. */
static moec_status move_bounds(const editor *e, const moec_plan *p, moec_err *err)
{
    static const char *const counts[] = {"first_k_dense_replace", "num_dense_layers", "moe_layer_start_index",
                                         "max_window_layers"};
    const moec_dense_rule rule = e->m->family->dense;
    const char *own = rule == MOEC_DENSE_FIRST_K ? counts[0] : rule == MOEC_DENSE_NUM ? counts[1]
                      : rule == MOEC_DENSE_RANGE ? counts[2] : NULL;
    const int64_t fallback = e->m->family->default_dense;
    moec_status st = MOEC_OK;
    int64_t v;
    for (size_t i = 0; i < MOEC_COUNT(counts); i++)
        if (moec_json_int(value_at(e, counts[i]), &v) && v < e->m->dims.layers && stay_below(p, v) != v)
            MOEC_TRY(set_value(e, counts[i], stay_below(p, v), err));
    if (own && !value_at(e, own) && !value_at(e, "mlp_layer_types") && stay_below(p, fallback) != fallback)
        MOEC_TRY(set_number(e, &own, 1, stay_below(p, fallback), err));
    if (moec_json_int(value_at(e, "moe_layer_end_index"), &v) && v >= 0 && v < e->m->dims.layers)
        MOEC_TRY(set_value(e, "moe_layer_end_index", stay_below(p, v + 1) - 1, err));
done:
    return st;
}

/* Under the edited config every layer that stays is what it was. */
static moec_status check_layers(const editor *e, const moec_plan *p, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_json *root = NULL;
    moec_model after = *e->m;
    MOEC_TRY(moec_json_parse(&root, *e->text, strlen(*e->text), "config.json of the output", err));
    after.config = e->at[0] ? moec_json_get(root, "text_config") : root;
    after.dims.layers -= p->n_drop;
    for (int64_t i = 0; i < e->m->dims.layers; i++) {
        moec_layer was = {.index = i}, is = {.index = moec_plan_layer_number(p, i)};
        if (is.index < 0)
            continue;
        moec_config_layer(&was, e->m);
        moec_config_layer(&is, &after);
        const bool dense = moec_config_is_dense(&after, is.index) != moec_config_is_dense(e->m, i);
        if (dense || was.mixer != is.mixer || was.window != is.window || was.chunk != is.chunk || was.rotated != is.rotated) {
            st = moec_fail(err, MOEC_EFORMAT, "layer %lld would be layer %lld of the output, which by a rule of config.json that "
                           "counts layers %s; drop other layers", (long long)i, (long long)is.index,
                           dense ? "has experts where this one has none, or none where it has them"
                                 : "attends to other tokens or mixes them in another way");
            goto done;
        }
    }
done:
    moec_json_free(root);
    return st;
}

static moec_status drop_layers(const editor *e, const moec_plan *p, moec_err *err)
{
    static const char *const keys[] = {"num_hidden_layers", "n_layers"};
    const int64_t layers = e->m->dims.layers;
    moec_status st = MOEC_OK;
    moec_json *root = NULL, *value;
    void *it = NULL;
    const char *key;
    MOEC_TRY(set_number(e, keys, MOEC_COUNT(keys), layers - p->n_drop, err));
    MOEC_TRY(move_bounds(e, p, err));
    MOEC_TRY(moec_json_parse(&root, *e->text, strlen(*e->text), "config.json", err)); /* lists as they are by now */
    moec_json *object = e->at[0] ? moec_json_get(root, "text_config") : root;
    while (moec_json_each(object, &it, &key, &value))
        if (moec_json_type(value) == MOEC_JSON_ARRAY && strlen(key) < MAX_PATH / 2 &&
            (lists_numbers(key) || lists_layers(key, moec_json_len(value), (size_t)layers)))
            MOEC_TRY(cut_list(e, key, value, p, err));
    MOEC_TRY(check_layers(e, p, err));
done:
    moec_json_free(root);
    return st;
}

static moec_status set_width(const editor *e, int64_t width, moec_err *err)
{
    int64_t shared;
    moec_status st = MOEC_OK;
    MOEC_TRY(moec_plan_check_width(&shared, e->m, width, err));
    MOEC_TRY(set_number(e, e->m->family->key_expert_width, MOEC_KEY_ALIASES, width, err));
    if (shared >= 0)
        MOEC_TRY(set_number(e, e->m->family->key_shared_count, MOEC_KEY_ALIASES, shared, err));
done:
    return st;
}

/* {"LAYER": [expert of each of the router's rows, ..], ..} */
static moec_json *map_of(const moec_plan *p)
{
    moec_json *o = moec_json_new_object();
    char number[24];
    for (int64_t i = 0; i < p->n_layers; i++) {
        moec_json *a = moec_json_new_array();
        for (int64_t e = 0; e < p->layer[i].n_experts; e++)
            moec_json_push(a, moec_json_new_int(moec_plan_leads_to(p, i, e)));
        snprintf(number, sizeof number, "%lld", (long long)p->layer[i].layer);
        moec_json_set(o, number, a);
    }
    return o;
}

/* Which code runs the output, and what it needs: shapes of factors, or the map. The source's own auto_map would have another class
 * read them. */
static moec_status say_code(const editor *e, const moec_plan *p, moec_err *err)
{
    static const char code[] = "{\"AutoModelForCausalLM\": \"modeling_moecompress.CompressedForCausalLM\"}";
    moec_status st = MOEC_OK;
    char *text = NULL;
    moec_json *o = p->mapped ? map_of(p) : moec_factor_config(p, e->m);
    MOEC_TRY(moec_json_dump(&text, o, 0, err));
    MOEC_TRY(insert(e, p->mapped ? MOEC_CONFIG_MAP : MOEC_CONFIG_FACTORS, text, err)); /* such a source would not have been opened */
    MOEC_TRY(value_at(e, "auto_map") ? edit(e, "auto_map", code, err) : insert(e, "auto_map", code, err));
done:
    moec_json_free(o);
    moec_free(text);
    return st;
}

/* What the format has to say, behind the source's own quantization, which is gone. Keys at the top, wherever the model's are. */
static moec_status say_quantized(const editor *e, const moec_plan *p, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_qformat *f = moec_qformat_find(p->quant.format);
    const editor top = {.text = e->text, .m = e->m, .root = e->root, .at = ""};
    moec_json *root = moec_json_new_object(), *value;
    char *text = NULL;
    const char *key;
    void *it = NULL;
    if (f && f->config)
        MOEC_TRY(f->config(root, p, e->m, err));
    while (moec_json_each(root, &it, &key, &value)) {
        MOEC_TRY(moec_json_dump(&text, value, 1, err));
        MOEC_TRY(insert(&top, key, text, err));
        moec_free(text);
        text = NULL;
    }
done:
    moec_free(text);
    moec_json_free(root);
    return st;
}

moec_status moec_config_edited(char **out, const moec_model *m, const moec_plan *p, moec_err *err)
{
    moec_status st = MOEC_OK;
    const char *text = moec_ckpt_config_text(m->ckpt);
    const editor e = {.text = out, .m = m, .root = moec_ckpt_config(m->ckpt), .at = m->config_at ? m->config_at : ""};
    const int64_t experts = moec_plan_experts(p);
    MOEC_TRY(moec_copy(out, text, strlen(text), err));
    if (experts != m->dims.experts)
        MOEC_TRY(set_number(&e, m->family->key_experts, MOEC_KEY_ALIASES, experts + m->family->n_tail, err));
    if (p->new_top_k != m->dims.top_k)
        MOEC_TRY(set_number(&e, m->family->key_top_k, MOEC_KEY_ALIASES, p->new_top_k, err));
    if (p->drop_groups)
        MOEC_TRY(drop_groups(&e, err));
    if (p->mtp == MOEC_PLAN_MTP_DROP && m->key_mtp)
        MOEC_TRY(set_number(&e, m->family->key_mtp, MOEC_KEY_ALIASES, 0, err));
    if (p->betas)
        MOEC_TRY(set_betas(&e, p, err));
    if (p->width > 0 && p->width != m->dims.expert_width)
        MOEC_TRY(set_width(&e, p->width, err));
    if (p->n_drop > 0)
        MOEC_TRY(drop_layers(&e, p, err));
    if (moec_plan_brings_code(p))
        MOEC_TRY(say_code(&e, p, err));
    MOEC_TRY(edit_quantization(&e, p, err));
    if (p->dtype != MOEC_DTYPE_COUNT)
        MOEC_TRY(edit_dtype(&e, p->dtype, err));
    if (p->quant.format[0])
        MOEC_TRY(say_quantized(&e, p, err));
done:
    if (st != MOEC_OK) {
        moec_free(*out);
        *out = NULL;
    }
    return st;
}
