/* The store: building, asking, planning. Its file is read and written in patterns_file.c. */
#include "method/patterns_internal.h"

#include "base/mem.h"
#include "base/word.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void moec__task_release(moec_task *t)
{
    moec_free(t->name);
    moec_free(t->ranking);
    moec_free(t->score);
}

void moec_patterns_free(moec_patterns *p)
{
    if (!p)
        return;
    for (int i = 0; i < p->n_tasks; i++)
        moec__task_release(&p->task[i]);
    moec_free(p->task);
    moec_free(p);
}

moec_status moec_patterns_new(moec_patterns **out, const moec_stats_meta *about, moec_err *err)
{
    moec_status st = MOEC_NEW(*out, 1, err);
    if (st != MOEC_OK)
        return st;
    snprintf((*out)->model, sizeof (*out)->model, "%s", about->model);
    snprintf((*out)->model_type, sizeof (*out)->model_type, "%s", about->model_type);
    (*out)->layers = about->moe_layers;
    (*out)->experts = about->experts;
    (*out)->top_k = about->top_k;
    return MOEC_OK;
}

moec_status moec__task_name_check(const char *name, moec_status code, moec_err *err)
{
    const size_t n = strlen(name);
    bool plain = n > 0 && n <= MOEC_TASK_MAX_NAME;
    for (size_t i = 0; i < n && plain; i++)
        plain = (unsigned char)name[i] >= 0x20 && name[i] != 0x7f;
    moec_json *text = moec_json_new_string(name); /* another text where the name is not UTF-8 */
    const char *back = moec_json_string(text);
    const moec_status st = back ? MOEC_OK : moec_fail(err, MOEC_ENOMEM, "out of memory");
    plain = plain && back && strcmp(back, name) == 0;
    moec_json_free(text);
    if (st != MOEC_OK)
        return st;
    if (!plain)
        return moec_fail(err, code, "the task's name '%.60s' is not 1 to %d bytes of UTF-8 without control characters", name,
                         MOEC_TASK_MAX_NAME);
    if (strcmp(name, MOEC_TASK_NEAREST) == 0)
        return moec_fail(err, code, "a task cannot be called %s: this asks for the nearest one", name);
    return MOEC_OK;
}

static moec_status check_about(const moec_patterns *p, const char *model, int64_t layers, int64_t experts, int64_t top_k,
                               moec_err *err)
{
    const struct {
        const char *name;
        int64_t have, want;
    } size[] = {{"MoE layers", p->layers, layers}, {"experts", p->experts, experts}, {"top-k", p->top_k, top_k}};
    for (size_t i = 0; i < MOEC_COUNT(size); i++)
        if (size[i].have != size[i].want)
            return moec_fail(err, MOEC_EFORMAT, "patterns of another model: %s is %lld there, %lld here", size[i].name,
                             (long long)size[i].have, (long long)size[i].want);
    if (strcmp(p->model, model) != 0)
        return moec_fail(err, MOEC_EFORMAT, "patterns of another model: fingerprint %s there, %s here", p->model, model);
    return MOEC_OK;
}

static moec_status check_stats(const moec_patterns *p, const moec_stats *s, moec_err *err)
{
    const moec_stats_meta *m = &s->meta;
    return check_about(p, m->model, m->moe_layers, m->experts, m->top_k, err);
}

/* --- TCESS ----------------------------------------------------------------------------------------------------------- */

/* Weights and tokens of the domains that count. */
typedef struct texts {
    const moec_stats *s;
    int first, end;
    double total;     /* sum of weight * tokens */
    uint64_t tokens;
} texts;

static double weight_of(const texts *t, int d)
{
    return t->end - t->first > 1 ? t->s->domain[d].weight : 1.0;
}

static moec_status choose_texts(texts *out, const moec_stats *s, int domain, moec_err *err)
{
    *out = (texts){.s = s, .first = domain < 0 ? 0 : domain, .end = domain < 0 ? s->n_domains : domain + 1};
    double weights = 0.0;
    for (int d = out->first; d < out->end; d++) {
        if (!moec_stat_at(s, d, MOEC_STAT_MARKER_TOP1, 0))
            return moec_fail(err, MOEC_EFORMAT, "patterns need the statistic %s, which domain %s does not have",
                             moec_stat_kinds[MOEC_STAT_MARKER_TOP1].name, s->domain[d].name);
        const double w = weight_of(out, d);
        weights += w;
        out->total += w * (double)s->domain[d].tokens;
        out->tokens += w > 0.0 ? s->domain[d].tokens : 0;
    }
    if (out->end > out->first && !(weights > 0.0))
        return moec_fail(err, MOEC_EINVAL, "the weights of all domains are 0");
    if (!(out->total > 0.0))
        return moec_fail(err, MOEC_EFORMAT, "the statistics have no tokens");
    return MOEC_OK;
}

static moec_status score_layer(double *out, const texts *t, int64_t l, moec_err *err)
{
    const int64_t n = t->s->meta.experts;
    memset(out, 0, (size_t)n * sizeof *out);
    for (int d = t->first; d < t->end; d++) {
        const double *marker = moec_stat_at(t->s, d, MOEC_STAT_MARKER_TOP1, l), w = weight_of(t, d);
        for (int64_t e = 0; e < n; e++)
            out[e] += w * marker[e];
    }
    for (int64_t e = 0; e < n; e++) {
        out[e] /= t->total;
        if (!isfinite(out[e]))
            return moec_fail(err, MOEC_ENUMERIC, "layer %lld: the score of expert %lld is not finite",
                             (long long)t->s->meta.moe_layer[l], (long long)e);
    }
    return MOEC_OK;
}

/* --- building -------------------------------------------------------------------------------------------------------- */

typedef struct place {
    double score;
    int32_t expert;
} place;

static int by_place(const void *a, const void *b)
{
    const place *x = a, *y = b;
    return moec__task_before(x->score, x->expert, y->score, y->expert) ? -1 : 1;
}

static moec_status rank_layers(moec_task *t, int64_t layers, int64_t experts, moec_err *err)
{
    place *order = NULL;
    moec_status st = MOEC_NEW(order, (size_t)experts, err);
    for (int64_t l = 0; st == MOEC_OK && l < layers; l++) {
        for (int64_t e = 0; e < experts; e++)
            order[e] = (place){t->score[l * experts + e], (int32_t)e};
        qsort(order, (size_t)experts, sizeof *order, by_place);
        for (int64_t e = 0; e < experts; e++)
            t->ranking[l * experts + e] = order[e].expert;
    }
    moec_free(order);
    return st;
}

static int index_of(const moec_patterns *p, const char *name)
{
    for (int i = 0; i < p->n_tasks; i++)
        if (strcmp(p->task[i].name, name) == 0)
            return i;
    return -1;
}

moec_status moec__patterns_push(moec_patterns *p, moec_task *t, bool replace, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int at = index_of(p, t->name);
    if (at >= 0 && !replace)
        return moec_fail(err, MOEC_EEXIST, "task %s is already there", t->name);
    if (at >= 0) {
        moec__task_release(&p->task[at]);
        p->task[at] = *t;
    } else {
        if (p->n_tasks >= MOEC_TASK_MAX)
            return moec_fail(err, MOEC_EINVAL, "more than %d tasks", MOEC_TASK_MAX);
        size_t room = (size_t)p->n_tasks;
        MOEC_TRY(MOEC_GROW(p->task, room, room + 1, err));
        p->task[p->n_tasks++] = *t;
    }
    *t = (moec_task){0};
done:
    return st;
}

moec_status moec_patterns_add(moec_patterns *p, const moec_stats *s, int domain, const char *name, const char *digest,
                              bool replace, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_task t = {0};
    texts from;
    const size_t cells = (size_t)p->layers * (size_t)p->experts;
    MOEC_TRY(moec__task_name_check(name, MOEC_EINVAL, err));
    MOEC_TRY(check_stats(p, s, err));
    MOEC_TRY(choose_texts(&from, s, domain, err));
    t.tokens = from.tokens;
    snprintf(t.stats, sizeof t.stats, "%s", digest ? digest : "");
    MOEC_TRY(moec_copy(&t.name, name, strlen(name), err));
    MOEC_TRY(MOEC_NEW(t.score, cells, err));
    MOEC_TRY(MOEC_NEW(t.ranking, cells, err));
    for (int64_t l = 0; l < p->layers; l++)
        MOEC_TRY(score_layer(t.score + l * p->experts, &from, l, err));
    MOEC_TRY(rank_layers(&t, p->layers, p->experts, err));
    MOEC_TRY(moec__patterns_push(p, &t, replace, err));
done:
    moec__task_release(&t);
    return st;
}

/* --- asking ---------------------------------------------------------------------------------------------------------- */

moec_status moec_patterns_find(int *out, const moec_patterns *p, const char *name, moec_err *err)
{
    *out = index_of(p, name);
    if (*out >= 0)
        return MOEC_OK;
    const char **names = NULL;
    moec_status st = MOEC_NEW(names, (size_t)p->n_tasks, err);
    if (st != MOEC_OK)
        return st;
    for (int i = 0; i < p->n_tasks; i++)
        names[i] = p->task[i].name;
    const char *near = moec_word_nearest(name, names, (size_t)p->n_tasks);
    st = moec_fail(err, MOEC_EINVAL, "the store has no task %.60s%s%.60s; stats store show lists its %d", name,
                   near ? "; did you mean " : "", near ? near : "", p->n_tasks);
    moec_free(names);
    return st;
}

static double distance_of(const double *a, const double *b, int64_t n)
{
    double sum = 0.0;
    for (int64_t e = 0; e < n; e++)
        sum += (a[e] - b[e]) * (a[e] - b[e]);
    return sqrt(sum);
}

moec_status moec_patterns_query(int **out, double **distance, const moec_patterns *p, const moec_stats *s, int domain,
                                moec_err *err)
{
    moec_status st = MOEC_OK;
    double *key = NULL;
    texts from;
    *out = NULL;
    *distance = NULL;
    MOEC_TRY(check_stats(p, s, err));
    MOEC_TRY(choose_texts(&from, s, domain, err));
    MOEC_TRY(MOEC_NEW(key, (size_t)p->experts, err));
    MOEC_TRY(MOEC_NEW(*out, (size_t)p->n_tasks, err));
    MOEC_TRY(MOEC_NEW(*distance, (size_t)p->n_tasks, err));
    MOEC_TRY(score_layer(key, &from, 0, err));
    for (int i = 0; i < p->n_tasks; i++) { /* insertion: stable, and there are few tasks */
        const double d = distance_of(key, p->task[i].score, p->experts);
        int at = i;
        for (; at > 0 && (*distance)[at - 1] > d; at--) {
            (*distance)[at] = (*distance)[at - 1];
            (*out)[at] = (*out)[at - 1];
        }
        (*distance)[at] = d;
        (*out)[at] = i;
    }
done:
    moec_free(key);
    if (st != MOEC_OK) {
        moec_free(*out);
        moec_free(*distance);
        *out = NULL;
        *distance = NULL;
    }
    return st;
}

moec_status moec_patterns_plan(moec_plan **out, const moec_patterns *p, int task, double distance, const moec_request *q,
                               moec_err *err)
{
    static const moec_method stored = {.name = "tcess", .kind = MOEC_PRUNE};
    moec_status st = MOEC_OK;
    moec_plan *plan = NULL;
    const moec_task *t = &p->task[task];
    moec_request own = *q;
    *out = NULL;
    own.stats = NULL;
    own.stats_digest = t->stats;
    MOEC_TRY(check_about(p, q->fingerprint, q->model->moe_layers, q->model->dims.experts, q->model->dims.top_k, err));
    MOEC_TRY(moec_select(&plan, &stored, &own, t->score, err));
    MOEC_TRY(moec_plan_set_option(plan, "task", moec_json_new_string(t->name), err));
    if (isfinite(distance))
        MOEC_TRY(moec_plan_set_option(plan, "distance", moec_json_new_real(distance), err));
    *out = plan;
    plan = NULL;
done:
    moec_plan_free(plan);
    return st;
}
