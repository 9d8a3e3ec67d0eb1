/* The table of methods, and what is checked before any of them runs. */
#include "method/method.h"

#include "base/mem.h"
#include "base/word.h"

#include <stdio.h>
#include <string.h>

#define MOEC_METHOD(id) extern const moec_method moec_method_##id;
#include "method/method_table.inc"
#undef MOEC_METHOD

static const moec_method *const table[] = {
#define MOEC_METHOD(id) &moec_method_##id,
#include "method/method_table.inc"
#undef MOEC_METHOD
};

const moec_method *moec_method_at(size_t i)
{
    return i < MOEC_COUNT(table) ? table[i] : NULL;
}

const char *moec_grain_name(moec_grain g)
{
    static const char *const names[MOEC_GRAIN_COUNT] = {"experts", "neurons", "weights", "blocks"};
    return names[g];
}

const moec_method *moec_method_of_grain(moec_method_kind kind, moec_grain grain, const char *name)
{
    for (size_t i = 0; i < MOEC_COUNT(table); i++)
        if (table[i]->kind == kind && table[i]->grain == grain && strcmp(table[i]->name, name) == 0)
            return table[i];
    return NULL;
}

const moec_method *moec_method_find(moec_method_kind kind, const char *name)
{
    return moec_method_of_grain(kind, MOEC_GRAIN_EXPERTS, name);
}

static moec_json *text_or_null(const char *text)
{
    return text ? moec_json_new_string(text) : moec_json_new_null();
}

moec_json *moec_method_json(const moec_method *m)
{
    moec_json *o = moec_json_new_object(), *needs = moec_json_new_array(), *options = moec_json_new_array();
    for (int i = 0; i < m->n_needs; i++)
        moec_json_push(needs, moec_json_new_string(moec_stat_kinds[m->needs[i]].name));
    for (const moec_opt *r = m->opts; r && r->kind != MOEC_OPT_END; r++) {
        moec_json *row = moec_json_new_object();
        moec_json_set(row, "name", moec_json_new_string(r->name));
        moec_json_set(row, "default", text_or_null(r->fallback));
        moec_json_set(row, "help", text_or_null(r->help));
        moec_json_push(options, row);
    }
    moec_json_set(o, "name", moec_json_new_string(m->name));
    moec_json_set(o, "grain", moec_json_new_string(moec_grain_name(m->grain)));
    moec_json_set(o, "brief", moec_json_new_string(m->brief));
    moec_json_set(o, "paper", text_or_null(m->paper));
    moec_json_set(o, "arxiv", text_or_null(m->arxiv));
    moec_json_set(o, "formula", moec_json_new_string(m->formula));
    moec_json_set(o, "needs", needs);
    moec_json_set(o, "options", options);
    moec_json_set(o, "default", moec_json_new_bool(m->is_default));
    moec_json_set(o, "by_count", moec_json_new_bool(m->by_count));
    return o;
}

moec_json *moec_method_list(moec_method_kind kind)
{
    moec_json *list = moec_json_new_array();
    for (size_t i = 0; i < MOEC_COUNT(table); i++)
        if (table[i]->kind == kind)
            moec_json_push(list, moec_method_json(table[i]));
    return list;
}

/* Names of the methods of a grain: an array, whose length comes back, and in one text. */
static size_t names_of(const char **names, char *text, size_t size, moec_method_kind kind, moec_grain grain)
{
    size_t n = 0, at = 0;
    text[0] = '\0';
    for (size_t i = 0; i < MOEC_COUNT(table); i++)
        if (table[i]->kind == kind && table[i]->grain == grain) {
            names[n++] = table[i]->name;
            const int more = snprintf(text + at, size - at, "%s%s", n > 1 ? ", " : "", table[i]->name);
            at = more > 0 && at + (size_t)more < size ? at + (size_t)more : size - 1;
        }
    return n;
}

static moec_status unknown(moec_method_kind kind, moec_grain grain, const char *name, moec_err *err)
{
    const char *names[MOEC_COUNT(table)];
    char text[600];
    const size_t n = names_of(names, text, sizeof text, kind, grain);
    for (size_t i = 0; i < MOEC_COUNT(table); i++)
        if (table[i]->kind == kind && strcmp(table[i]->name, name) == 0)
            return moec_fail(err, MOEC_EINVAL, "--method %s goes with --grain %s; the methods of --grain %s are %s", name,
                             moec_grain_name(table[i]->grain), moec_grain_name(grain), text);
    const char *near = moec_word_nearest(name, names, n);
    return moec_fail(err, MOEC_EINVAL, "--method %.60s: no such method%s%s%s%s; --methods lists them", name,
                     grain != MOEC_GRAIN_EXPERTS ? " of grain " : "", grain != MOEC_GRAIN_EXPERTS ? moec_grain_name(grain) : "",
                     near ? "; did you mean " : "", near ? near : "");
}

moec_status moec_method_take(const moec_method **out, moec_method_kind kind, moec_grain grain, const char *name, moec_err *err)
{
    *out = name ? moec_method_of_grain(kind, grain, name) : NULL;
    for (size_t i = 0; !name && !*out && i < MOEC_COUNT(table); i++)
        if (table[i]->kind == kind && table[i]->grain == grain && table[i]->is_default)
            *out = table[i];
    return *out ? MOEC_OK : unknown(kind, grain, name ? name : "", err);
}

moec_status moec_method_check_stats(const moec_method *me, const moec_request *q, moec_err *err)
{
    if (me->n_needs > 0 && !q->stats)
        return moec_fail(err, MOEC_EINVAL, "method %s needs statistics; give a file made by calibrate with --stats",
                         me->name);
    if (!q->stats)
        return MOEC_OK;
    moec_status st = moec_stats_check(q->stats, q->model, err);
    if (st != MOEC_OK)
        return st;
    for (int i = 0; i < me->n_needs; i++)
        for (int d = 0; d < q->stats->n_domains; d++)
            if (!q->stats->domain[d].data[me->needs[i]])
                return moec_no_statistic(me, q->stats, d, me->needs[i], err);
    return MOEC_OK;
}

moec_status moec_no_statistic(const moec_method *me, const moec_stats *s, int domain, moec_stat kind, moec_err *err)
{
    if (moec_stat_kinds[kind].tier == 2)
        return moec_fail(err, MOEC_EFORMAT, "method %s: statistics without quantization errors (%s of domain %s): calibrate --errors "
                         "adds them", me->name, moec_stat_kinds[kind].name, s->domain[domain].name);
    return moec_fail(err, MOEC_EFORMAT, "method %s needs the statistic %s, which domain %s does not have; calibrate --tier %d "
                     "collects it", me->name, moec_stat_kinds[kind].name, s->domain[domain].name,
                     moec_stat_kinds[kind].tier);
}

/* What goes with which method. */
static moec_status check_options(const moec_method *me, const moec_request *q, moec_err *err)
{
    if (me->by_count && q->allocation != MOEC_ALLOCATE_UNIFORM)
        return moec_fail(err, MOEC_EINVAL, "--allocation: method %s cuts every layer to one number of experts; only uniform goes "
                         "with it", me->name);
    if (q->allocation == MOEC_ALLOCATE_LOSS && !q->counts)
        return moec_fail(err, MOEC_EINVAL, "--allocation loss is by what merging loses: the counts are missing");
    if (q->least > 0 && q->allocation == MOEC_ALLOCATE_UNIFORM)
        return moec_fail(err, MOEC_EINVAL, "--min-experts is for an --allocation other than uniform");
    return MOEC_OK;
}

moec_status moec_method_plan(moec_plan **out, moec_method_kind kind, const char *name, const moec_request *q,
                             moec_err *err)
{
    moec_status st = MOEC_OK;
    int64_t keep;
    *out = NULL;
    const moec_method *me;
    MOEC_TRY(moec_method_take(&me, kind, q->grain, name, err));
    if (!me->plan)
        return moec_fail(err, MOEC_EINVAL, "method %s chooses widths; it makes no plan by itself", me->name);
    MOEC_TRY(check_options(me, q, err));
    MOEC_TRY(moec_method_check_stats(me, q, err));
    if (me->grain == MOEC_GRAIN_EXPERTS)
        MOEC_TRY(moec_kept_experts(&keep, q, err)); /* before the work, not after it */
    MOEC_TRY(moec_within(err, me->plan(out, me, q, err), "method %s", me->name));
done:
    return st;
}

/* The plan of another share by the scores that the first one recorded. */
static moec_status next_plan(moec_plan **out, const moec_method *me, const moec_plan *first, const moec_request *q,
                             moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t n = q->model->dims.experts;
    double *score = NULL;
    *out = NULL;
    MOEC_TRY(MOEC_NEW(score, (size_t)(first->n_layers * n), err));
    for (int64_t l = 0; l < first->n_layers; l++)
        memcpy(score + l * n, first->layer[l].score, (size_t)n * sizeof *score);
    MOEC_TRY(moec_within(err, moec_select(out, me, q, score, err), "method %s", me->name));
done:
    moec_free(score);
    return st;
}

moec_status moec_method_plans(moec_plan **out, moec_method_kind kind, const char *name, const moec_request *q,
                              const double *share, int n, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_request one = *q;
    const moec_method *me;
    for (int i = 0; i < n; i++)
        out[i] = NULL;
    MOEC_TRY(moec_method_take(&me, kind, MOEC_GRAIN_EXPERTS, name, err));
    if (me->by_count && n > 1)
        return moec_fail(err, MOEC_EINVAL, "method %s makes no ranking: its plans of different shares need not be contained in each "
                         "other; ask for one share at a time", me->name);
    one.keep = 0;
    for (int i = 0; i < n; i++) {
        int64_t keep;
        if (i > 0 && !(share[i] > share[i - 1]))
            return moec_fail(err, MOEC_EINVAL, "--remove: %g%% stands behind %g%%; shares must ascend", share[i] * 100.0,
                             share[i - 1] * 100.0);
        one.share = share[i];
        MOEC_TRY(moec_within(err, moec_kept_experts(&keep, &one, err), "--remove %g%%", share[i] * 100.0));
    }
    for (int i = 0; i < n; i++) {
        one.share = share[i];
        MOEC_TRY(moec_within(err, i == 0 ? moec_method_plan(&out[0], kind, name, &one, err)
                                         : next_plan(&out[i], me, out[0], &one, err), "--remove %g%%", share[i] * 100.0));
    }
done:
    for (int i = 0; st != MOEC_OK && i < n; i++) {
        moec_plan_free(out[i]);
        out[i] = NULL;
    }
    return st;
}
