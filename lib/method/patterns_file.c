/* The store as JSON: written whole, read strictly. */
#include "method/patterns_internal.h"

#include "base/file.h"
#include "base/mem.h"
#include "method/reader.h"

#include <stdio.h>
#include <string.h>

enum { VERSION = 1 };
static const size_t max_file = (size_t)1 << 30;

/* --- writing --------------------------------------------------------------------------------------------------------- */

static moec_json *task_json(const moec_patterns *p, const moec_task *t)
{
    moec_json *o = moec_json_new_object(), *ranking = moec_json_new_array(), *score = moec_json_new_array();
    for (int64_t l = 0; l < p->layers; l++) {
        moec_json_push(ranking, moec_json_new_ints(t->ranking + l * p->experts, p->experts));
        moec_json_push(score, moec_json_new_reals(t->score + l * p->experts, p->experts));
    }
    moec_json_set(o, "name", moec_json_new_string(t->name));
    moec_json_set(o, "tokens", moec_json_new_int(t->tokens > INT64_MAX ? INT64_MAX : (int64_t)t->tokens));
    moec_json_set(o, "stats", moec_json_new_string(t->stats));
    moec_json_set(o, "key", moec_json_new_reals(t->score, p->experts));
    moec_json_set(o, "ranking", ranking);
    moec_json_set(o, "score", score);
    return o;
}

moec_status moec_patterns_to_text(char **out, const moec_patterns *p, moec_err *err)
{
    moec_json *o = moec_json_new_object(), *tasks = moec_json_new_array();
    char *text = NULL;
    for (int i = 0; i < p->n_tasks; i++)
        moec_json_push(tasks, task_json(p, &p->task[i]));
    moec_json_set(o, "moecompress_patterns", moec_json_new_int(VERSION));
    moec_json_set(o, "model", moec_json_new_string(p->model));
    moec_json_set(o, "model_type", moec_json_new_string(p->model_type));
    moec_json_set(o, "layers", moec_json_new_int(p->layers));
    moec_json_set(o, "experts", moec_json_new_int(p->experts));
    moec_json_set(o, "top_k", moec_json_new_int(p->top_k));
    moec_json_set(o, "tasks", tasks);
    *out = NULL;
    moec_status st = moec_json_dump(&text, o, 0, err);
    moec_json_free(o);
    if (st == MOEC_OK)
        st = moec_format(out, err, "%s\n", text);
    moec_free(text);
    return st;
}

moec_status moec_patterns_save(const moec_patterns *p, const char *path, moec_err *err)
{
    char *text;
    moec_status st = moec_patterns_to_text(&text, p, err);
    if (st == MOEC_OK)
        st = moec_file_write(path, text, strlen(text), err);
    moec_free(text);
    return st;
}

/* --- reading --------------------------------------------------------------------------------------------------------- */

/* o[key] is a list with a list of E for each layer: looked at before anything of that size is allocated. */
static moec_status check_table(const moec_patterns *p, const moec_reader *r, const moec_json *o, const char *key)
{
    const moec_json *rows = moec_json_get(o, key);
    bool whole = moec_json_type(rows) == MOEC_JSON_ARRAY && moec_json_len(rows) == (size_t)p->layers;
    for (size_t l = 0; whole && l < (size_t)p->layers; l++) {
        const moec_json *row = moec_json_at(rows, l);
        whole = moec_json_type(row) == MOEC_JSON_ARRAY && moec_json_len(row) == (size_t)p->experts;
    }
    return whole ? MOEC_OK : moec_fail(r->err, MOEC_EFORMAT, "%s: %s is not %lld lists of %lld numbers", r->what, key,
                                       (long long)p->layers, (long long)p->experts);
}

static moec_status read_score(moec_task *t, const moec_patterns *p, const moec_reader *r, const moec_json *rows)
{
    const size_t n = (size_t)p->experts, cells = (size_t)p->layers * n;
    moec_status st = MOEC_NEW(t->score, cells, r->err);
    for (size_t i = 0; st == MOEC_OK && i < cells; i++)
        if (!moec_json_real(moec_json_at(moec_json_at(rows, i / n), i % n), &t->score[i]))
            return moec_fail(r->err, MOEC_EFORMAT, "%s: score[%zu]: entry %zu is not a number", r->what, i / n, i % n);
    return st;
}

/* Strictly descending places make it a permutation, too. */
static moec_status read_ranking(moec_task *t, const moec_patterns *p, const moec_reader *r, const moec_json *rows)
{
    const size_t n = (size_t)p->experts, cells = (size_t)p->layers * n;
    moec_status st = MOEC_NEW(t->ranking, cells, r->err);
    for (size_t i = 0; st == MOEC_OK && i < cells; i++) {
        const double *score = t->score + i / n * n;
        int64_t e;
        if (!moec_json_int(moec_json_at(moec_json_at(rows, i / n), i % n), &e) || e < 0 || e >= p->experts)
            return moec_fail(r->err, MOEC_EFORMAT, "%s: ranking[%zu]: entry %zu is not an expert number from 0 to %lld",
                             r->what, i / n, i % n, (long long)p->experts - 1);
        t->ranking[i] = (int32_t)e;
        const int32_t before = i % n > 0 ? t->ranking[i - 1] : -1;
        if (before >= 0 && !moec__task_before(score[before], before, score[e], (int32_t)e))
            return moec_fail(r->err, MOEC_EFORMAT, "%s: ranking[%zu]: expert %lld stands behind %d, which its score does not "
                             "allow: every expert once, by descending score, ties by number", r->what, i / n, (long long)e,
                             (int)before);
    }
    return st;
}

static moec_status check_key(const moec_task *t, const moec_patterns *p, const moec_reader *r, const moec_json *o)
{
    double *key = NULL;
    moec_status st = moec__read_reals(&key, p->experts, r, o, "task", "key");
    for (int64_t e = 0; st == MOEC_OK && e < p->experts; e++)
        if (key[e] != t->score[e])
            st = moec_fail(r->err, MOEC_EFORMAT, "%s: key: entry %lld is not the first layer's score", r->what, (long long)e);
    moec_free(key);
    return st;
}

static moec_status read_task(moec_task *t, const moec_patterns *p, const moec_reader *r, moec_json *o)
{
    static const char *const known[] = {"name", "tokens", "stats", "key", "ranking", "score"};
    moec_status st = MOEC_OK;
    char name[MOEC_TASK_MAX_NAME + 1];
    int64_t tokens;
    MOEC_TRY(moec__read_keys(r, o, "it", known, MOEC_COUNT(known)));
    MOEC_TRY(moec__read_text(name, sizeof name, r, o, "name", true));
    MOEC_TRY(moec_within(r->err, moec__task_name_check(name, MOEC_EFORMAT, r->err), "%s", r->what));
    MOEC_TRY(moec_copy(&t->name, name, strlen(name), r->err));
    MOEC_TRY(moec__read_int(&tokens, r, o, name, "tokens", 1, INT64_MAX));
    t->tokens = (uint64_t)tokens;
    MOEC_TRY(moec__read_text(t->stats, sizeof t->stats, r, o, "stats", true));
    MOEC_TRY(check_table(p, r, o, "score"));
    MOEC_TRY(check_table(p, r, o, "ranking"));
    MOEC_TRY(read_score(t, p, r, moec_json_get(o, "score")));
    MOEC_TRY(read_ranking(t, p, r, moec_json_get(o, "ranking")));
    MOEC_TRY(check_key(t, p, r, o));
done:
    return st;
}

static moec_status read_tasks(moec_patterns *p, const moec_reader *r, const moec_json *root)
{
    moec_status st = MOEC_OK;
    const moec_json *tasks = moec_json_get(root, "tasks");
    const size_t n = moec_json_len(tasks);
    moec_task t = {0};
    if (moec_json_type(tasks) != MOEC_JSON_ARRAY || n > MOEC_TASK_MAX)
        return moec_fail(r->err, MOEC_EFORMAT, "%s: tasks is not a list of at most %d tasks", r->what, MOEC_TASK_MAX);
    if (n == 0)
        return moec_fail(r->err, MOEC_EFORMAT, "%s: the store is empty: it has no task", r->what);
    for (size_t i = 0; i < n; i++) {
        char at[32];
        snprintf(at, sizeof at, "tasks[%zu]", i);
        const moec_reader in = {.what = at, .err = r->err};
        MOEC_TRY(moec_within(r->err, read_task(&t, p, &in, moec_json_at(tasks, i)), "%s", r->what));
        st = moec__patterns_push(p, &t, false, r->err);
        if (st == MOEC_EEXIST)
            st = moec_fail(r->err, MOEC_EFORMAT, "%s: task %s is there twice", r->what, t.name);
        if (st != MOEC_OK)
            goto done;
    }
done:
    moec__task_release(&t);
    return st;
}

static moec_status read_store(moec_patterns *p, const moec_reader *r, moec_json *root)
{
    static const char *const known[] = {"moecompress_patterns", "model", "model_type", "layers", "experts", "top_k", "tasks"};
    moec_status st = MOEC_OK;
    int64_t version;
    MOEC_TRY(moec__read_keys(r, root, "the store", known, MOEC_COUNT(known)));
    MOEC_TRY(moec__read_int(&version, r, root, "store", "moecompress_patterns", VERSION, VERSION));
    MOEC_TRY(moec__read_text(p->model, sizeof p->model, r, root, "model", true));
    MOEC_TRY(moec__read_text(p->model_type, sizeof p->model_type, r, root, "model_type", true));
    MOEC_TRY(moec__read_int(&p->layers, r, root, "store", "layers", 1, MOEC_READ_MAX_LAYERS));
    MOEC_TRY(moec__read_int(&p->experts, r, root, "store", "experts", 1, MOEC_READ_MAX_EXPERTS));
    MOEC_TRY(moec__read_int(&p->top_k, r, root, "store", "top_k", 1, p->experts));
    MOEC_TRY(read_tasks(p, r, root));
done:
    return st;
}

moec_status moec_patterns_parse(moec_patterns **out, const char *text, size_t len, const char *what, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_json *root = NULL;
    moec_patterns *p = NULL;
    const moec_reader r = {.what = what, .err = err};
    *out = NULL;
    MOEC_TRY(moec_json_parse(&root, text, len, what, err));
    MOEC_TRY(MOEC_NEW(p, 1, err));
    MOEC_TRY(read_store(p, &r, root));
    *out = p;
    p = NULL;
done:
    moec_patterns_free(p);
    moec_json_free(root);
    return st;
}

moec_status moec_patterns_read(moec_patterns **out, const char *path, moec_err *err)
{
    char *text;
    size_t len;
    *out = NULL;
    moec_status st = moec_file_read(&text, &len, path, max_file, err);
    if (st == MOEC_OK) {
        st = moec_patterns_parse(out, text, len, path, err);
        moec_free(text);
    }
    return st;
}
