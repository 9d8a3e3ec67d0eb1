/* See stats_store.h. */
#include "stats_store.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

typedef struct store_job {
    const tool_store_params *p;
    const tool_common *common;
    const char *store, *file;
} store_job;

/* The statistics, their digest, and the domain that was asked for (-1: all). */
static moec_status load(moec_stats **out, moec_digest *digest, int *domain, const store_job *j, moec_err *err)
{
    moec_status st = MOEC_OK;
    uint64_t bytes;
    *domain = -1;
    MOEC_TRY(moec_stats_load(out, j->file, err));
    MOEC_TRY(moec_file_digest(digest, &bytes, j->file, err));
    if (j->p->domain)
        MOEC_TRY(moec_within(err, moec_stats_domain_find(domain, *out, j->p->domain, err), "%s", j->file));
done:
    return st;
}

/* --- add -------------------------------------------------------------------------------------------------------------- */

static moec_status add_tasks(moec_patterns *store, moec_json *names, const store_job *j, const moec_stats *s, int domain,
                             const char *digest, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int n = j->p->by_domain && domain < 0 ? s->n_domains : 1;
    for (int i = 0; i < n; i++) {
        const int d = j->p->by_domain && domain < 0 ? i : domain;
        const char *name = j->p->by_domain ? s->domain[d].name : j->p->task;
        st = moec_patterns_add(store, s, d, name, digest, j->common->overwrite, err);
        if (st == MOEC_EEXIST)
            st = moec_fail(err, st, "%s: task %.200s is already there; --overwrite replaces it", j->store, name);
        if (st != MOEC_OK)
            return st == MOEC_EEXIST ? st : moec_within(err, st, "%s", j->file);
        moec_json_push(names, moec_json_new_string(name));
    }
    return st;
}

static moec_status print_added(const moec_patterns *store, const moec_json *names, const store_job *j, double began,
                               moec_err *err)
{
    const int64_t n = (int64_t)moec_json_len(names);
    moec_say("%s: %" PRId64 " task%s added, %d in all", j->store, n, tool_s(n), store->n_tasks);
    if (!j->common->json)
        return MOEC_OK;
    moec_json *o = moec_json_new_object();
    moec_json_set(o, "output", moec_json_new_string(j->store));
    moec_json_set(o, "bytes", tool_bytes_json(tool_file_bytes(j->file), j->store));
    moec_json_set(o, "added", moec_json_clone(names));
    moec_json_set(o, "tasks", moec_json_new_int(store->n_tasks));
    moec_json_set(o, "seconds", moec_json_new_real(moec_now() - began));
    moec_json_set(o, "peak_memory_bytes", moec_json_new_int((int64_t)moec_peak_memory()));
    return tool_print_json(o, err);
}

static moec_status add(const store_job *j, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_stats *s = NULL;
    moec_patterns *store = NULL;
    moec_json *names = moec_json_new_array();
    moec_digest digest;
    int domain;
    const double began = moec_now();
    if (!j->p->task == !j->p->by_domain)
        MOEC_TRY(moec_fail(err, MOEC_EINVAL, "stats store add: give --task NAME, or --by-domain for a task of each text"));
    MOEC_TRY(load(&s, &digest, &domain, j, err));
    MOEC_TRY(tool_may_write(j->store, TOOL_FILE_PATTERNS, true, err));
    MOEC_TRY(moec_path_exists(j->store) ? moec_patterns_read(&store, j->store, err)
                                        : moec_patterns_new(&store, &s->meta, err));
    MOEC_TRY(add_tasks(store, names, j, s, domain, digest.hex, err));
    MOEC_TRY(moec_patterns_save(store, j->store, err));
    MOEC_TRY(print_added(store, names, j, began, err));
done:
    moec_json_free(names);
    moec_patterns_free(store);
    moec_stats_free(s);
    return st;
}

/* --- show, query ------------------------------------------------------------------------------------------------------ */

/* For a terminal: what a file says may hold control characters. */
static const char *plain(char *out, size_t size, const char *text)
{
    snprintf(out, size, "%s", text);
    moec_plain_line(out);
    return out;
}

static moec_status show_json(const moec_patterns *store, moec_err *err)
{
    moec_json *o = moec_json_new_object(), *tasks = moec_json_new_array();
    for (int i = 0; i < store->n_tasks; i++) {
        const moec_task *t = &store->task[i];
        moec_json *one = moec_json_new_object();
        moec_json_set(one, "name", moec_json_new_string(t->name));
        moec_json_set(one, "tokens", moec_json_new_int((int64_t)t->tokens));
        moec_json_set(one, "stats", moec_json_new_string(t->stats));
        moec_json_push(tasks, one);
    }
    moec_json_set(o, "model", moec_json_new_string(store->model));
    moec_json_set(o, "model_type", moec_json_new_string(store->model_type));
    moec_json_set(o, "layers", moec_json_new_int(store->layers));
    moec_json_set(o, "experts", moec_json_new_int(store->experts));
    moec_json_set(o, "top_k", moec_json_new_int(store->top_k));
    moec_json_set(o, "tasks", tasks);
    return tool_print_json(o, err);
}

static moec_status show(const store_job *j, moec_err *err)
{
    moec_patterns *store = NULL;
    moec_status st = moec_patterns_read(&store, j->store, err);
    char a[256], b[256];
    if (st != MOEC_OK)
        return st;
    if (j->common->json) {
        st = show_json(store, err);
    } else {
        printf("%-10s %s %s\n%-10s %" PRId64 " layers with %" PRId64 " experts of which a token uses %" PRId64 "\n", "model",
               plain(a, sizeof a, store->model_type), plain(b, sizeof b, store->model), "", store->layers, store->experts,
               store->top_k);
        for (int i = 0; i < store->n_tasks; i++)
            printf("%-10s %s: %" PRIu64 " tokens of statistics %s\n", i ? "" : "tasks",
                   plain(a, sizeof a, store->task[i].name), store->task[i].tokens, plain(b, sizeof b, store->task[i].stats));
    }
    moec_patterns_free(store);
    return st;
}

static moec_status query_json(const moec_patterns *store, const int *order, const double *distance, moec_err *err)
{
    moec_json *o = moec_json_new_object(), *tasks = moec_json_new_array();
    for (int i = 0; i < store->n_tasks; i++) {
        moec_json *one = moec_json_new_object();
        moec_json_set(one, "name", moec_json_new_string(store->task[order[i]].name));
        moec_json_set(one, "distance", moec_json_new_real(distance[i]));
        moec_json_push(tasks, one);
    }
    moec_json_set(o, "nearest", moec_json_new_string(store->task[order[0]].name));
    moec_json_set(o, "distance", moec_json_new_real(distance[0]));
    moec_json_set(o, "tasks", tasks);
    return tool_print_json(o, err);
}

static moec_status query(const store_job *j, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_stats *s = NULL;
    moec_patterns *store = NULL;
    moec_digest digest;
    int domain, *order = NULL;
    double *distance = NULL;
    char name[256];
    MOEC_TRY(moec_patterns_read(&store, j->store, err));
    MOEC_TRY(load(&s, &digest, &domain, j, err));
    MOEC_TRY(moec_within(err, moec_patterns_query(&order, &distance, store, s, domain, err), "%s", j->file));
    if (j->common->json) {
        MOEC_TRY(query_json(store, order, distance, err));
    } else {
        printf("%12s  %s\n", "distance", "task");
        for (int i = 0; i < store->n_tasks; i++)
            printf("%12.6g  %s%s\n", distance[i], plain(name, sizeof name, store->task[order[i]].name),
                   i ? "" : "  (nearest)");
    }
done:
    moec_free(order);
    moec_free(distance);
    moec_patterns_free(store);
    moec_stats_free(s);
    return st;
}

moec_status tool_store(const tool_store_params *p, const tool_common *common, const moec_opt_list *words, moec_err *err)
{
    static const struct {
        const char *name, *args;
        int words;
        bool adds, domain;
        moec_status (*run)(const store_job *j, moec_err *err);
    } verbs[] = {{"add", "STORE FILE", 4, true, true, add}, {"show", "STORE", 3, false, false, show},
                 {"query", "STORE FILE", 4, false, true, query}};
    for (size_t i = 0; i < MOEC_COUNT(verbs); i++) {
        if (strcmp(words->at[1], verbs[i].name) != 0)
            continue;
        if (words->n != verbs[i].words)
            return moec_fail(err, MOEC_EINVAL, "stats store %s: takes %s", verbs[i].name, verbs[i].args);
        if ((!verbs[i].adds && (p->task || p->by_domain)) || (!verbs[i].domain && p->domain))
            return moec_fail(err, MOEC_EINVAL, "stats store %s: does not take %s", verbs[i].name,
                             p->task ? "--task" : p->by_domain ? "--by-domain" : "--domain");
        const store_job j = {.p = p, .common = common, .store = words->at[2], .file = words->n > 3 ? words->at[3] : NULL};
        return verbs[i].run(&j, err);
    }
    return moec_fail(err, MOEC_EINVAL, "stats store: '%.40s' is none of add, show and query", words->at[1]);
}
