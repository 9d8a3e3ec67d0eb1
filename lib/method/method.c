/* The table of methods, and what is checked before any of them runs. */
#include "method/method.h"

#include "base/mem.h"
#include "base/word.h"

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

const moec_method *moec_method_find(moec_method_kind kind, const char *name)
{
    for (size_t i = 0; i < MOEC_COUNT(table); i++)
        if (table[i]->kind == kind && strcmp(table[i]->name, name) == 0)
            return table[i];
    return NULL;
}

static moec_json *text_or_null(const char *text)
{
    return text ? moec_json_new_string(text) : moec_json_new_null();
}

static moec_json *method_json(const moec_method *m)
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
    moec_json_set(o, "brief", moec_json_new_string(m->brief));
    moec_json_set(o, "paper", text_or_null(m->paper));
    moec_json_set(o, "arxiv", text_or_null(m->arxiv));
    moec_json_set(o, "formula", moec_json_new_string(m->formula));
    moec_json_set(o, "needs", needs);
    moec_json_set(o, "options", options);
    return o;
}

moec_json *moec_method_list(moec_method_kind kind)
{
    moec_json *list = moec_json_new_array();
    for (size_t i = 0; i < MOEC_COUNT(table); i++)
        if (table[i]->kind == kind)
            moec_json_push(list, method_json(table[i]));
    return list;
}

static moec_status unknown(moec_method_kind kind, const char *name, moec_err *err)
{
    const char *names[MOEC_COUNT(table)];
    size_t n = 0;
    for (size_t i = 0; i < MOEC_COUNT(table); i++)
        if (table[i]->kind == kind)
            names[n++] = table[i]->name;
    const char *near = moec_word_nearest(name, names, n);
    return moec_fail(err, MOEC_EINVAL, "--method %.60s: no such method%s%s; --methods lists them", name,
                     near ? "; did you mean " : "", near ? near : "");
}

static moec_status check_needs(const moec_method *me, const moec_request *q, moec_err *err)
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
                return moec_fail(err, MOEC_EFORMAT, "method %s needs the statistic %s, which domain %s does not have",
                                 me->name, moec_stat_kinds[me->needs[i]].name, q->stats->domain[d].name);
    return MOEC_OK;
}

moec_status moec_method_plan(moec_plan **out, moec_method_kind kind, const char *name, const moec_request *q,
                             moec_err *err)
{
    moec_status st = MOEC_OK;
    int64_t keep;
    *out = NULL;
    const moec_method *me = moec_method_find(kind, name);
    if (!me)
        return unknown(kind, name, err);
    MOEC_TRY(check_needs(me, q, err));
    MOEC_TRY(moec_kept_experts(&keep, q, err)); /* before the work, not after it */
    MOEC_TRY(moec_within(err, me->plan(out, me, q, err), "method %s", me->name));
done:
    return st;
}
