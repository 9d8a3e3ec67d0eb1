/* See prune_tasks.h. */
#include "prune_tasks.h"

#include <math.h>
#include <string.h>

moec_status tool_tasks_check(const tool_tasks_params *t, const char *method, const char *stats, moec_err *err)
{
    if (!t->patterns != !t->task)
        return moec_fail(err, MOEC_EINVAL, "prune: --patterns STORE and --task NAME belong together");
    if (t->patterns && method)
        return moec_fail(err, MOEC_EINVAL, "prune: --patterns takes the place of --method %.40s; give one", method);
    if (t->task && strcmp(t->task, MOEC_TASK_NEAREST) == 0 && !stats)
        return moec_fail(err, MOEC_EINVAL, "prune: --task nearest needs the statistics of a prompt: --stats FILE");
    if ((t->weights || t->betas) && !stats)
        return moec_fail(err, MOEC_EINVAL, "prune: --%s needs --stats FILE", t->weights ? "domain-weight" : "betas");
    return MOEC_OK;
}

/* The ranking of a stored task. */
static moec_status plan_from_store(moec_plan **out, const tool_tasks_params *t, const moec_request *q, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_patterns *store = NULL;
    int task = 0, *order = NULL;
    double *distance = NULL;
    const bool nearest = strcmp(t->task, MOEC_TASK_NEAREST) == 0;
    MOEC_TRY(moec_patterns_read(&store, t->patterns, err));
    if (nearest) {
        MOEC_TRY(moec_within(err, moec_patterns_query(&order, &distance, store, q->stats, -1, err), "%s", t->patterns));
        task = order[0];
        moec_say("nearest task: %s (distance %.6g)", store->task[task].name, distance[0]);
    } else {
        MOEC_TRY(moec_within(err, moec_patterns_find(&task, store, t->task, err), "%s", t->patterns));
    }
    MOEC_TRY(moec_within(err, moec_patterns_plan(out, store, task, nearest ? distance[0] : (double)NAN, q, err), "%s",
                         t->patterns));
done:
    moec_free(order);
    moec_free(distance);
    moec_patterns_free(store);
    return st;
}

static moec_status record_weights(moec_plan *plan, const moec_stats *s, moec_err *err)
{
    moec_json *o = moec_json_new_object();
    for (int d = 0; d < s->n_domains; d++)
        moec_json_set(o, s->domain[d].name, moec_json_new_real(s->domain[d].weight));
    return moec_plan_set_option(plan, "domain_weights", o, err);
}

moec_status tool_tasks_plan(moec_plan **out, const tool_tasks_params *t, const char *method, const moec_request *q,
                            moec_err *err)
{
    moec_status st = MOEC_OK;
    MOEC_TRY(t->patterns ? plan_from_store(out, t, q, err) : moec_method_plan(out, MOEC_PRUNE, method, q, err));
    if (t->weights)
        MOEC_TRY(record_weights(*out, q->stats, err));
    if (t->betas)
        MOEC_TRY(moec_plan_betas(*out, q->stats, err));
done:
    return st;
}
