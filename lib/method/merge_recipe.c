/* The settings of a merge by name. */
#include "base/opt.h"
#include "base/word.h"
#include "method/merge.h"

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *const moec_merge_distance_names[] = {
    [MOEC_FAR_LOGITS] = "logits", [MOEC_FAR_CENTRED] = "centred-logits", [MOEC_FAR_MEAN_OUTPUT] = "mean-output",
    [MOEC_FAR_OUTPUT_COSINE] = "output-cosine", [MOEC_FAR_OUTPUT] = "output", [MOEC_FAR_GATED] = "gated",
    [MOEC_FAR_WEIGHTS] = "weights", [MOEC_FAR_ROUTER_ROWS] = "router-rows", [MOEC_FAR_COUNT] = NULL};
const char *const moec_merge_grouping_names[] = {
    [MOEC_BY_NEAREST] = "nearest", [MOEC_BY_PSEUDO] = "pseudo", [MOEC_BY_AVERAGE] = "average", [MOEC_BY_WARD] = "ward",
    [MOEC_BY_COMPLETE] = "complete", [MOEC_BY_SINGLE] = "single", [MOEC_BY_KMEANS] = "kmeans", [MOEC_BY_SPECTRAL] = "spectral",
    [MOEC_BY_PRUNING] = "pruning", [MOEC_BY_COUNT] = NULL};
const char *const moec_merge_mass_names[] = {
    [MOEC_MASS_COUNT] = "count", [MOEC_MASS_GATE] = "gate", [MOEC_MASS_GATE_SQ] = "gate-sq", [MOEC_MASS_REAP] = "reap",
    [MOEC_MASS_ENERGY] = "energy", [MOEC_MASS_REAM] = "ream", [MOEC_MASS_EQUAL] = "equal", [MOEC_MASS_KINDS] = NULL};
const char *const moec_merge_align_names[] = {
    [MOEC_ALIGN_NONE] = "none", [MOEC_ALIGN_PLAIN] = "plain", [MOEC_ALIGN_CANONICAL] = "canonical",
    [MOEC_ALIGN_ACTIVATIONS] = "activations", [MOEC_ALIGN_COUNT] = NULL};
const char *const moec_merge_fill_names[] = {
    [MOEC_FILL_AVERAGE] = "average", [MOEC_FILL_SUBSPACE] = "subspace", [MOEC_FILL_SEGMENTS] = "segments",
    [MOEC_FILL_COUNT] = NULL};
const char *const moec_merge_router_names[] = {
    [MOEC_ROW_KEEP] = "keep", [MOEC_ROW_MEAN] = "mean", [MOEC_ROW_WEIGHTED] = "weighted", [MOEC_ROW_ADD] = "add",
    [MOEC_ROW_LSE] = "lse", [MOEC_ROW_COUNT] = NULL};
static const char *const switches[] = {"off", "on", NULL};

typedef enum setting_kind { NAMED, SWITCH, COUNT, REAL } setting_kind;

/* What a setting belongs to, where not to every merge. */
typedef struct owner {
    const char *name;
    bool (*is)(const moec_merge_recipe *r);
} owner;

static bool is_grouped(const moec_merge_recipe *r)
{
    return r->grouping != MOEC_BY_PRUNING;
}

static bool is_pseudo(const moec_merge_recipe *r)
{
    return r->grouping == MOEC_BY_PSEUDO;
}

static bool is_means(const moec_merge_recipe *r)
{
    return r->grouping == MOEC_BY_KMEANS || r->grouping == MOEC_BY_SPECTRAL;
}

static bool is_whole(const moec_merge_recipe *r)
{
    return r->fill != MOEC_FILL_SEGMENTS;
}

static bool is_subspace(const moec_merge_recipe *r)
{
    return r->fill == MOEC_FILL_SUBSPACE;
}

static bool is_segments(const moec_merge_recipe *r)
{
    return r->fill == MOEC_FILL_SEGMENTS;
}

static bool is_response(const moec_merge_recipe *r)
{
    return is_segments(r) && r->segment.response;
}

static const owner grouped = {"groupings other than pruning", is_grouped}, pseudo = {"grouping=pseudo", is_pseudo},
                   means = {"grouping=kmeans and spectral", is_means}, whole = {"fill=average and subspace", is_whole},
                   subspace = {"fill=subspace", is_subspace}, segments = {"fill=segments", is_segments},
                   response = {"fill=segments with segment-response=on", is_response};

typedef struct setting {
    const char *key;
    setting_kind kind;
    size_t offset;
    const char *const *names;
    double lo, hi;
    const owner *of; /* NULL: every merge */
} setting;

#define AT(field) offsetof(moec_merge_recipe, field)
static const setting settings[] = {
    {"distance", NAMED, AT(distance), moec_merge_distance_names, 0, 0, &grouped},
    {"grouping", NAMED, AT(grouping), moec_merge_grouping_names, 0, 0, NULL},
    {"saliency", NAMED, AT(saliency), moec_merge_mass_names, 0, 0, NULL},
    {"weights", NAMED, AT(weights), moec_merge_mass_names, 0, 0, NULL},
    {"align", NAMED, AT(align), moec_merge_align_names, 0, 0, &whole},
    {"fill", NAMED, AT(fill), moec_merge_fill_names, 0, 0, NULL},
    {"router", NAMED, AT(router), moec_merge_router_names, 0, 0, NULL},
    {"original", SWITCH, AT(original), switches, 0, 0, NULL},
    {"decide", SWITCH, AT(decide), switches, 0, 0, NULL},
    {"group-size", COUNT, AT(group_size), NULL, 2, 65535, &pseudo},
    {"restarts", COUNT, AT(restarts), NULL, 1, 10000, &means},
    {"rank", REAL, AT(rank), NULL, 0, 1, &subspace},
    {"whiten", SWITCH, AT(whiten), switches, 0, 0, &subspace},
    {"alpha", REAL, AT(segment.alpha), NULL, -1, 1, &segments},
    {"segment-gate", REAL, AT(segment.gate), NULL, 0, 1e6, &segments},
    {"segment-up", REAL, AT(segment.up), NULL, 0, 1e6, &segments},
    {"segment-down", REAL, AT(segment.down), NULL, 0, 1e6, &segments},
    {"segment-canonical", SWITCH, AT(segment.canonical), switches, 0, 0, &segments},
    {"segment-response", SWITCH, AT(segment.response), switches, 0, 0, &segments},
    {"segment-same-norm", SWITCH, AT(segment.same_norm), switches, 0, 0, &segments},
    {"segment-sum-same-source", SWITCH, AT(segment.sum_same_source), switches, 0, 0, &segments},
    {"segment-rounds", COUNT, AT(segment.rounds), NULL, 1, 10000, &response},
};

/* Which of them; -1. */
static int index_of(const char *const *names, const char *word, size_t len)
{
    for (int i = 0; names[i]; i++)
        if (strlen(names[i]) == len && memcmp(names[i], word, len) == 0)
            return i;
    return -1;
}

static moec_status refuse(const char *key, const char *const *names, const char *word, moec_err *err)
{
    char list[300];
    size_t at = 0, n = 0;
    for (; names[n]; n++) {
        const int more = snprintf(list + at, sizeof list - at, "%s%s", n > 0 ? ", " : "", names[n]);
        at = more > 0 && at + (size_t)more < sizeof list ? at + (size_t)more : sizeof list - 1;
    }
    return moec_fail(err, MOEC_EINVAL, "%s=%.60s: is none of %s", key, word, list);
}

static moec_status set_value(moec_merge_recipe *r, const setting *s, const char *word, moec_err *err)
{
    char *at = (char *)r + s->offset, *end;
    if (s->names) {
        const int i = index_of(s->names, word, strlen(word));
        if (i < 0)
            return refuse(s->key, s->names, word, err);
        if (s->kind == SWITCH)
            *(bool *)at = i == 1;
        else
            memcpy(at, &i, sizeof i); /* an enum without negative values is an unsigned int here: the same bytes */
        return MOEC_OK;
    }
    const double v = strtod(word, &end);
    if (end == word || *end || !(v >= s->lo && v <= s->hi) || (s->kind == COUNT && v != (double)(int64_t)v))
        return moec_fail(err, MOEC_EINVAL, "%s=%.60s: is no %snumber from %g to %g", s->key, word, s->kind == COUNT ? "whole " : "",
                         s->lo, s->hi);
    if (s->kind == REAL)
        *(double *)(void *)at = v;
    else
        *(int *)(void *)at = (int)v;
    return MOEC_OK;
}

moec_status moec_merge_set(moec_merge_recipe *r, const char *spec, moec_err *err)
{
    char key[40], word[80];
    const char *names[sizeof settings / sizeof *settings];
    const size_t n = sizeof settings / sizeof *settings, len = strcspn(spec, "=");
    if (spec[len] != '=' || len >= sizeof key || strlen(spec + len + 1) >= sizeof word)
        return moec_fail(err, MOEC_EINVAL, "--set %.100s: is not KEY=VALUE", spec);
    snprintf(key, sizeof key, "%.*s", (int)len, spec);
    snprintf(word, sizeof word, "%s", spec + len + 1);
    for (size_t i = 0; i < n; i++) {
        names[i] = settings[i].key;
        if (strcmp(settings[i].key, key) == 0)
            return moec_within(err, set_value(r, &settings[i], word, err), "--set");
    }
    const char *near = moec_word_nearest(key, names, n);
    return moec_fail(err, MOEC_EINVAL, "--set %s: there is no such setting%s%s; merge --methods lists them", key,
                     near ? "; did you mean " : "", near ? near : "");
}

bool moec_merge_applies(const char **of, const moec_merge_recipe *r, const char *key)
{
    const size_t len = strcspn(key, "=");
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
        const setting *s = &settings[i];
        if (strlen(s->key) != len || memcmp(s->key, key, len) != 0)
            continue;
        if (of)
            *of = s->of ? s->of->name : "every merge";
        return !s->of || s->of->is(r);
    }
    return true;
}

moec_json *moec_merge_json(const moec_merge_recipe *r)
{
    moec_json *o = moec_json_new_object();
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
        const setting *s = &settings[i];
        const char *at = (const char *)r + s->offset;
        if ((s->of == &segments || s->of == &response) && !is_segments(r))
            continue;
        int word = 0;
        if (s->kind == NAMED)
            memcpy(&word, at, sizeof word);
        moec_json_set(o, s->key, s->kind == NAMED    ? moec_json_new_string(s->names[word])
                                 : s->kind == SWITCH ? moec_json_new_bool(*(const bool *)at)
                                 : s->kind == REAL   ? moec_json_new_real(*(const double *)(const void *)at)
                                                     : moec_json_new_int(*(const int *)(const void *)at));
    }
    return o;
}

void moec_merge_settings(char *out, size_t size)
{
    size_t at = 0;
    out[0] = '\0';
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
        const setting *s = &settings[i];
        char values[200] = "";
        size_t v = 0;
        for (size_t k = 0; s->names && s->names[k] && v < sizeof values - 1; k++) {
            const int more = snprintf(values + v, sizeof values - v, "%s%s", k > 0 ? "|" : "", s->names[k]);
            v = more > 0 && v + (size_t)more < sizeof values ? v + (size_t)more : sizeof values - 1;
        }
        if (!s->names)
            snprintf(values, sizeof values, "%g..%g", s->lo, s->hi);
        const int more = snprintf(out + at, size - at, "%s%s=%s", i > 0 ? "\n" : "", s->key, values);
        at = more > 0 && at + (size_t)more < size ? at + (size_t)more : size - 1;
    }
}
