/* What is made from router statistics beside a score: the pattern store (built, written, read from hostile bytes, asked,
 * planned from), what removed experts served, weights of domains, and the medians of dynamic skipping. Numbers by hand. */
#include "base/file.h"
#include "base/mem.h"
#include "method/betas.h"
#include "method/patterns.h"
#include "method/served.h"
#include "run/apply.h"
#include "run/layout.h"
#include "support/tiny.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { E = 8, L = 3, BINS = 1024 };

static char *folder, *source, *out;
static moec_model *model;
static moec_digest print;
static int64_t moe_layer[L] = {0, 2, 3};
static char empty[] = "{}", *rule;

static int set_up(void **state)
{
    (void)state;
    const tiny_spec spec = {.layers = 4, .dense_layer = 2, .seed = 5};
    folder = tiny_folder();
    source = tiny_path(folder, "source");
    out = tiny_path(folder, "out");
    return tiny_write(source, &spec, NULL) == MOEC_OK && moec_model_open(&model, source, NULL) == MOEC_OK &&
                   moec_ckpt_fingerprint(&print, model->ckpt, NULL) == MOEC_OK &&
                   moec_router_rule(&rule, model, NULL) == MOEC_OK
               ? 0 : 1;
}

static int tear_down(void **state)
{
    (void)state;
    moec_model_close(model);
    tiny_remove(folder);
    char *all[] = {folder, source, out, rule};
    for (size_t i = 0; i < MOEC_COUNT(all); i++)
        moec_free(all[i]);
    return 0;
}

/* Two domains without a token, of the model. */
static moec_stats *blank(int64_t top_k)
{
    static const char *const names[] = {"code", "prose"};
    moec_stats *s;
    moec_stats_meta meta = {.model_type = "qwen3_moe", .router_rule = rule, .options = empty, .compute = "f32",
                            .layers = 4, .moe_layers = L, .experts = E, .top_k = top_k, .hidden = 16, .expert_width = 12,
                            .moe_layer = moe_layer};
    memcpy(meta.model, print.hex, sizeof meta.model);
    assert_int_equal(moec_stats_new(&s, &meta, 2, names, NULL), MOEC_OK);
    return s;
}

static double *marker(moec_stats *s, int d, int64_t l)
{
    return moec_stat_at(s, d, MOEC_STAT_MARKER_TOP1, l);
}

/* code: 4 tokens, sums 8 - 2e, so that experts rank by number; prose: 2 tokens, sums e, so the other way round. */
static moec_stats *marked(void)
{
    moec_stats *s = blank(2);
    s->domain[0].tokens = 4;
    s->domain[1].tokens = 2;
    for (int64_t l = 0; l < L; l++)
        for (int e = 0; e < E; e++) {
            marker(s, 0, l)[e] = 8.0 - 2.0 * e;
            marker(s, 1, l)[e] = e;
        }
    marker(s, 0, 1)[6] = 100.0;
    marker(s, 0, 2)[3] = marker(s, 0, 2)[2]; /* a tie */
    return s;
}

static moec_patterns *store_of(const moec_stats *s)
{
    moec_patterns *p;
    assert_int_equal(moec_patterns_new(&p, &s->meta, NULL), MOEC_OK);
    assert_int_equal(moec_patterns_add(p, s, 0, "code", "abc", false, NULL), MOEC_OK);
    assert_int_equal(moec_patterns_add(p, s, 1, "prose", NULL, false, NULL), MOEC_OK);
    assert_int_equal(moec_patterns_add(p, s, -1, "both", "def", false, NULL), MOEC_OK);
    return p;
}

/* --- the store -------------------------------------------------------------------------------------------------------- */

static void test_add(void **state)
{
    (void)state;
    static const int32_t second[E] = {6, 0, 1, 2, 3, 4, 5, 7};
    moec_stats *s = marked();
    moec_patterns *p = store_of(s);
    assert_int_equal(p->n_tasks, 3);
    for (int e = 0; e < E; e++) {
        assert_true(p->task[0].score[e] == 2.0 - 0.5 * e);       /* (8 - 2e) / 4 */
        assert_true(p->task[1].score[e] == 0.5 * e);             /* e / 2 */
        assert_true(p->task[2].score[e] == (8.0 - e) / 6.0);     /* (8 - 2e + e) / (4 + 2) */
        assert_int_equal(p->task[0].ranking[e], e);
        assert_int_equal(p->task[1].ranking[e], E - 1 - e);
        assert_int_equal(p->task[0].ranking[E + e], second[e]);
        assert_int_equal(p->task[0].ranking[2 * E + e], e);      /* the tie stays with the lower number */
    }
    assert_true(p->task[0].tokens == 4 && p->task[2].tokens == 6);
    assert_string_equal(p->task[0].stats, "abc");
    s->domain[0].weight = 0.0; /* what does not count adds no tokens either */
    assert_int_equal(moec_patterns_add(p, s, -1, "both", "", true, NULL), MOEC_OK);
    assert_int_equal(p->n_tasks, 3);
    assert_memory_equal(p->task[2].score, p->task[1].score, sizeof(double[L * E]));
    assert_int_equal(p->task[2].tokens, 2);
    moec_patterns_free(p);
    moec_stats_free(s);
}

static void refuse_add(moec_patterns *p, const moec_stats *s, const char *name, moec_status code, const char *says)
{
    moec_err err = {MOEC_OK, ""};
    const int n = p->n_tasks;
    assert_int_equal(moec_patterns_add(p, s, -1, name, "", false, &err), code);
    assert_int_equal(p->n_tasks, n);
    if (!strstr(err.text, says))
        fail_msg("\"%s\" does not say \"%s\"", err.text, says);
}

static void test_add_refusals(void **state)
{
    (void)state;
    static const char *const names[] = {"", "a\nb", "\xff", "\x7f"};
    char longest[202];
    moec_stats *s = marked(), *other = blank(3);
    moec_patterns *p = store_of(s);
    memset(longest, 'x', sizeof longest);
    longest[201] = '\0';
    for (size_t i = 0; i < MOEC_COUNT(names); i++)
        refuse_add(p, s, names[i], MOEC_EINVAL, "name");
    refuse_add(p, s, longest, MOEC_EINVAL, "name");
    refuse_add(p, s, "nearest", MOEC_EINVAL, "nearest");
    refuse_add(p, s, "code", MOEC_EEXIST, "already");
    refuse_add(p, other, "new", MOEC_EFORMAT, "top-k is 2 there, 3 here");
    s->meta.model[0] = s->meta.model[0] == 'x' ? 'y' : 'x';
    refuse_add(p, s, "new", MOEC_EFORMAT, "fingerprint");
    memcpy(s->meta.model, print.hex, sizeof s->meta.model);
    s->domain[0].weight = s->domain[1].weight = 0.0;
    refuse_add(p, s, "new", MOEC_EINVAL, "weights");
    s->domain[0].weight = 1.0;
    marker(s, 0, 1)[3] = (double)INFINITY;
    refuse_add(p, s, "new", MOEC_ENUMERIC, "layer 2: the score of expert 3"); /* second layer with experts is layer 2 */
    s->domain[0].tokens = 0;
    refuse_add(p, s, "new", MOEC_EFORMAT, "no tokens");
    moec_free(s->domain[1].data[MOEC_STAT_MARKER_TOP1]);
    s->domain[1].data[MOEC_STAT_MARKER_TOP1] = NULL;
    refuse_add(p, s, "new", MOEC_EFORMAT, "marker_top1, which domain prose");
    moec_patterns_free(p);
    moec_stats_free(other);
    moec_stats_free(s);
}

static void test_store_round_trip(void **state)
{
    (void)state;
    moec_stats *s = marked();
    for (int e = 0; e < E; e++) /* no short decimals, negative ones too */
        marker(s, 0, 2)[e] = sin(e + 1.0) / 3.0;
    moec_patterns *p = store_of(s), *back;
    char *text, *again, *path = tiny_path(folder, "store.json");
    assert_int_equal(moec_patterns_to_text(&text, p, NULL), MOEC_OK);
    assert_int_equal(moec_patterns_save(p, path, NULL), MOEC_OK);
    assert_int_equal(moec_patterns_read(&back, path, NULL), MOEC_OK);
    assert_int_equal(moec_patterns_to_text(&again, back, NULL), MOEC_OK);
    assert_string_equal(text, again);
    for (int t = 0; t < 3; t++) {
        assert_memory_equal(p->task[t].score, back->task[t].score, sizeof(double[L * E]));
        assert_memory_equal(p->task[t].ranking, back->task[t].ranking, sizeof(int32_t[L * E]));
    }
    moec_free(path);
    moec_free(text);
    moec_free(again);
    moec_patterns_free(p);
    moec_patterns_free(back);
    moec_stats_free(s);
}

#define STORE(head, tasks)                                                                                             \
    "{\"moecompress_patterns\": 1, \"model\": \"m\", \"model_type\": \"t\", " head ", \"tasks\": [" tasks "]}"
#define HEAD "\"layers\": 2, \"experts\": 3, \"top_k\": 2"
#define TASK(name, key, ranking, score)                                                                                \
    "{\"name\": " name ", \"tokens\": 7, \"stats\": \"\", \"key\": " key ", \"ranking\": " ranking ", \"score\": " score "}"
#define KEY "[0.5, 1, 0.5]"
#define RANKING "[[1, 0, 2], [2, 1, 0]]"
#define SCORE "[[0.5, 1, 0.5], [-1, 0, 1e300]]"
#define GOOD TASK("\"a\"", KEY, RANKING, SCORE)

static void test_hostile(void **state)
{
    (void)state;
    static const struct { const char *text, *says; } rows[] = {
        {STORE(HEAD, GOOD), NULL},
        {STORE(HEAD, GOOD ", " TASK("\"b\"", KEY, RANKING, SCORE)), NULL},
        {"", "JSON"},
        {"[]", "not a JSON object"},
        {"{}", "moecompress_patterns"},
        {"{\"moecompress_patterns\": 2}", "moecompress_patterns is 2"},
        {"{\"moecompress_patterns\": 1}", "model"},
        {STORE(HEAD ", \"more\": 1", GOOD), "unknown key more"},
        {STORE(HEAD, ""), "empty"},
        {STORE(HEAD, GOOD ", " GOOD), "task a is there twice"},
        {STORE(HEAD, "3"), "tasks[0]"},
        {STORE("\"layers\": 0, \"experts\": 3, \"top_k\": 2", GOOD), "layers is 0"},
        {STORE("\"layers\": 5000, \"experts\": 3, \"top_k\": 2", GOOD), "layers is 5000"},
        {STORE("\"layers\": 4096, \"experts\": 65535, \"top_k\": 2", GOOD), "not 4096 lists of 65535"},
        {STORE("\"layers\": 2, \"experts\": 65536, \"top_k\": 2", GOOD), "experts is 65536"},
        {STORE("\"layers\": 2, \"experts\": 3, \"top_k\": 4", GOOD), "top_k is 4"},
        {STORE("\"layers\": 1, \"experts\": 3, \"top_k\": 2", GOOD), "not 1 lists of 3"},
        {STORE(HEAD, TASK("\"\"", KEY, RANKING, SCORE)), "name"},
        {STORE(HEAD, TASK("\"nearest\"", KEY, RANKING, SCORE)), "nearest"},
        {STORE(HEAD, TASK("\"a\\n\"", KEY, RANKING, SCORE)), "name"},
        {STORE(HEAD, TASK("\"a\\u0000\"", KEY, RANKING, SCORE)), "JSON"},
        {STORE(HEAD, TASK("4", KEY, RANKING, SCORE)), "name is not a text"},
        {STORE(HEAD, TASK("\"a\"", "[0.5, 1]", RANKING, SCORE)), "key is not a list of 3"},
        {STORE(HEAD, TASK("\"a\"", "[0.5, 1, 0.4]", RANKING, SCORE)), "key: entry 2"},
        {STORE(HEAD, TASK("\"a\"", "{}", RANKING, SCORE)), "key is not a list"},
        {STORE(HEAD, TASK("\"a\"", KEY, "[[1, 0, 2]]", SCORE)), "ranking is not 2 lists of 3"},
        {STORE(HEAD, TASK("\"a\"", KEY, "[[1, 0, 2], [2, 1]]", SCORE)), "ranking is not 2 lists of 3"},
        {STORE(HEAD, TASK("\"a\"", KEY, "[[1, 0, 2], [2, 1, 1]]", SCORE)), "ranking[1]: expert 1 stands behind 1"},
        {STORE(HEAD, TASK("\"a\"", KEY, "[[1, 2, 0], [2, 1, 0]]", SCORE)), "ranking[0]: expert 0 stands behind 2"},
        {STORE(HEAD, TASK("\"a\"", KEY, "[[1, 0, 3], [2, 1, 0]]", SCORE)), "ranking[0]: entry 2"},
        {STORE(HEAD, TASK("\"a\"", KEY, "[[1, 0, -1], [2, 1, 0]]", SCORE)), "ranking[0]: entry 2"},
        {STORE(HEAD, TASK("\"a\"", KEY, "[[1, 0, 2.0], [2, 1, 0]]", SCORE)), "ranking[0]: entry 2"},
        {STORE(HEAD, TASK("\"a\"", KEY, RANKING, "[[0.5, 1, 0.5], [-1, 0, 1e999]]")), "JSON"},
        {STORE(HEAD, TASK("\"a\"", KEY, RANKING, "[[0.5, 1, 0.5], [-1, 0, null]]")), "score[1]: entry 2"},
        {STORE(HEAD, TASK("\"a\"", KEY, RANKING, "[0.5, 1]")), "score is not 2 lists of 3"},
        {STORE(HEAD, "{\"name\": \"a\"}"), "tokens"},
        {STORE(HEAD, "{\"name\": \"a\", \"tokens\": 0}"), "tokens is 0"},
        {STORE(HEAD, "{\"nome\": \"a\"}"), "unknown key nome"},
    };
    for (size_t i = 0; i < MOEC_COUNT(rows); i++) {
        moec_patterns *p;
        moec_err err = {MOEC_OK, ""};
        moec_status st = moec_patterns_parse(&p, rows[i].text, strlen(rows[i].text), "store", &err);
        if (st != (rows[i].says ? MOEC_EFORMAT : MOEC_OK) || (rows[i].says && (p || !strstr(err.text, rows[i].says))))
            fail_msg("case %zu: status %d, \"%s\" does not say \"%s\"", i, (int)st, err.text, rows[i].says);
        if (st != MOEC_OK)
            assert_int_equal(moec_patterns_parse(&p, rows[i].text, strlen(rows[i].text), "store", NULL), st);
        moec_patterns_free(p);
    }
}

/* One byte of a good store changed, cut or doubled: read as a store that writes and reads the same, or refused. */
static void test_mutations(void **state)
{
    (void)state;
    static const char bytes[] = "0123456789-.eE,:[]{}\" \\x";
    static const char good[] = STORE(HEAD, GOOD);
    char text[sizeof good + 1];
    for (size_t at = 0; at < sizeof good - 1; at++)
        for (size_t k = 0; k < sizeof bytes + 1; k++) {
            size_t n = sizeof good - 1;
            memcpy(text, good, n);
            if (k < sizeof bytes - 1) {
                text[at] = bytes[k];
            } else if (k == sizeof bytes - 1) {
                memmove(text + at, text + at + 1, --n - at);
            } else {
                memmove(text + at + 1, text + at, n++ - at);
            }
            moec_patterns *p, *again;
            char *first, *second;
            moec_err err = {MOEC_OK, ""};
            if (moec_patterns_parse(&p, text, n, "store", &err) != MOEC_OK) {
                assert_int_equal(err.code, MOEC_EFORMAT);
                continue;
            }
            assert_int_equal(moec_patterns_to_text(&first, p, NULL), MOEC_OK);
            assert_int_equal(moec_patterns_parse(&again, first, strlen(first), "again", NULL), MOEC_OK);
            assert_int_equal(moec_patterns_to_text(&second, again, NULL), MOEC_OK);
            assert_string_equal(first, second);
            moec_free(first);
            moec_free(second);
            moec_patterns_free(again);
            moec_patterns_free(p);
        }
}

static void test_query(void **state)
{
    (void)state;
    moec_stats *s = marked(), *prompt = marked();
    moec_patterns *p = store_of(s);
    int *order, task;
    double *distance;
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_patterns_query(&order, &distance, p, prompt, 1, NULL), MOEC_OK);
    assert_int_equal(order[0], 1);
    assert_true(distance[0] == 0.0);
    double far = 0.0, mid = 0.0; /* code: e/2 - (2 - e/2); both: e/2 - (8 - e)/6 */
    for (int e = 0; e < E; e++) {
        far += (e - 2.0) * (e - 2.0);
        mid += (e / 2.0 - (8.0 - e) / 6.0) * (e / 2.0 - (8.0 - e) / 6.0);
    }
    assert_int_equal(order[1], 2);
    assert_true(fabs(distance[1] - sqrt(mid)) < 1e-12);
    assert_int_equal(order[2], 0);
    assert_true(fabs(distance[2] - sqrt(far)) < 1e-12);
    moec_free(order);
    moec_free(distance);
    assert_int_equal(moec_patterns_find(&task, p, "prose", NULL), MOEC_OK);
    assert_int_equal(task, 1);
    assert_int_equal(moec_patterns_find(&task, p, "porse", &err), MOEC_EINVAL);
    assert_non_null(strstr(err.text, "did you mean prose"));
    prompt->meta.model[0] = '?';
    assert_int_equal(moec_patterns_query(&order, &distance, p, prompt, -1, &err), MOEC_EFORMAT);
    assert_true(!order && !distance);
    moec_patterns_free(p);
    moec_stats_free(prompt);
    moec_stats_free(s);
}

static void test_store_plan(void **state)
{
    (void)state;
    moec_stats *s = marked();
    moec_patterns *p = store_of(s);
    moec_plan *plan;
    moec_err err = {MOEC_OK, ""};
    moec_request q = {.model = model, .fingerprint = print.hex};
    for (q.keep = 1; q.keep <= E; q.keep++)
        for (int t = 0; t < 3; t++) {
            assert_int_equal(moec_patterns_plan(&plan, p, t, t ? 0.25 : (double)NAN, &q, NULL), MOEC_OK);
            assert_int_equal(moec_plan_check(plan, model, print.hex, NULL), MOEC_OK);
            for (int64_t l = 0; l < L; l++)
                for (int64_t r = 0; r < E; r++)
                    assert_int_equal(moec_plan_kept(plan, l, p->task[t].ranking[l * E + r]) >= 0, r < q.keep);
            assert_string_equal(plan->method, "tcess");
            assert_string_equal(plan->stats, p->task[t].stats);
            assert_non_null(strstr(plan->options, t == 0 ? "\"task\": \"code\"" : "\"distance\": 0.25"));
            assert_true(t != 0 || !strstr(plan->options, "distance"));
            moec_plan_free(plan);
        }
    q.keep = 9;
    assert_int_equal(moec_patterns_plan(&plan, p, 0, (double)NAN, &q, &err), MOEC_EINVAL);
    assert_null(plan);
    q.keep = 4;
    q.fingerprint = "another";
    assert_int_equal(moec_patterns_plan(&plan, p, 0, (double)NAN, &q, &err), MOEC_EFORMAT);
    assert_non_null(strstr(err.text, "another"));
    q.fingerprint = print.hex;
    p->experts = 4; /* of another shape */
    assert_int_equal(moec_patterns_plan(&plan, p, 0, (double)NAN, &q, &err), MOEC_EFORMAT);
    assert_non_null(strstr(err.text, "experts is 4 there, 8 here"));
    p->experts = E;
    moec_patterns_free(p);
    moec_stats_free(s);
}

/* --- domains ----------------------------------------------------------------------------------------------------------- */

static void test_weights(void **state)
{
    (void)state;
    static const struct { const char *spec; double code, prose; const char *says; } rows[] = {
        {"code=2", 2.0, 1.0, NULL}, {"prose=0.25,code=0", 0.0, 0.25, NULL}, {"code=1e3,prose=1", 1000.0, 1.0, NULL},
        {"", 1, 1, "NAME=WEIGHT"}, {"code", 1, 1, "NAME=WEIGHT"}, {"code=", 1, 1, "NAME=WEIGHT"}, {"=1", 1, 1, "NAME=WEIGHT"},
        {"code=1,", 1, 1, "NAME=WEIGHT"}, {"code=x", 1, 1, "not a weight"}, {"code=-1", 1, 1, "not a weight"},
        {"code=nan", 1, 1, "not a weight"}, {"code=inf", 1, 1, "not a weight"}, {"code=1 ", 1, 1, "not a weight"},
        {"code=1,code=2", 1, 1, "twice"}, {"cide=1", 1, 1, "did you mean code"}, {"code=0,prose=0", 1, 1, "are 0"},
    };
    for (size_t i = 0; i < MOEC_COUNT(rows); i++) {
        moec_stats *s = blank(2);
        moec_err err = {MOEC_OK, ""};
        assert_int_equal(moec_stats_set_weights(s, rows[i].spec, &err), rows[i].says ? MOEC_EINVAL : MOEC_OK);
        assert_true(s->domain[0].weight == rows[i].code && s->domain[1].weight == rows[i].prose);
        if (rows[i].says && !strstr(err.text, rows[i].says))
            fail_msg("case %zu: \"%s\" does not say \"%s\"", i, err.text, rows[i].says);
        moec_stats_free(s);
    }
}

/* Keeps the experts of a bit set in each layer. */
static moec_plan *keeping(unsigned keep)
{
    moec_plan *p;
    assert_int_equal(moec_plan_new(&p, model, "test", print.hex, NULL), MOEC_OK);
    for (int64_t l = 0; l < p->n_layers; l++) {
        assert_int_equal(MOEC_NEW(p->layer[l].keep, E, NULL), MOEC_OK);
        for (int32_t e = 0; e < E; e++)
            if (keep >> e & 1)
                p->layer[l].keep[p->layer[l].n_keep++] = e;
    }
    return p;
}

static void test_served(void **state)
{
    (void)state;
    moec_stats *s = blank(2);
    moec_plan *p = keeping(0x3f); /* experts 6 and 7 go */
    moec_served v;
    for (int64_t l = 0; l < 2; l++) /* no token reaches the third layer */
        for (int e = 0; e < E; e++) {
            ((uint64_t *)moec_stat_at(s, 0, MOEC_STAT_SELECTED, l))[e] = (uint64_t)e + 1;    /* 36 in all */
            ((uint64_t *)moec_stat_at(s, 1, MOEC_STAT_SELECTED, l))[e] = e == 6 ? 9 : l == 0; /* 16, and 9 */
            ((double *)moec_stat_at(s, 0, MOEC_STAT_GATE_SUM, l))[e] = e == 7 ? 3.0 : 1.0;   /* 10 */
        }
    moec_free(s->domain[1].data[MOEC_STAT_GATE_SUM]);
    s->domain[1].data[MOEC_STAT_GATE_SUM] = NULL;
    assert_int_equal(moec_served_by(&v, p, s, NULL), MOEC_OK);
    assert_int_equal(v.n, 6);
    assert_true(v.expert[0].set == 0 && v.expert[0].expert == 6 && v.expert[3].set == 1 && v.expert[3].expert == 7);
    assert_true(v.share[0].selected == 7.0 / 36.0 && v.share[1].selected == 9.0 / 16.0);
    assert_true(v.share[2].selected == 8.0 / 36.0 && v.share[2].gate == 0.3 && v.share[3].selected == 1.0 / 16.0);
    assert_true(isnan(v.share[1].gate) && isnan(v.lost[1].gate)); /* not collected */
    assert_true(v.expert[0].most == 1 && v.expert[1].most == 0 && v.expert[3].most == 0 && v.expert[4].most == -1);
    assert_true(v.layer_lost[0].selected == 15.0 / 36.0 && v.layer_lost[0].gate == 0.4);
    assert_true(v.layer_lost[3].selected == 1.0 && isnan(v.layer_lost[4].selected));
    assert_true(v.lost[0].selected == 30.0 / 72.0 && v.lost[1].selected == 19.0 / 25.0 && v.lost[0].gate == 0.4);
    moec_served_release(&v);
    moec_plan_free(p);
    p = keeping(0xff);
    assert_int_equal(moec_served_by(&v, p, s, NULL), MOEC_OK);
    assert_true(v.n == 0 && v.lost[0].selected == 0.0);
    moec_served_release(&v);
    s->meta.experts = 4;
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_served_by(&v, p, s, &err), MOEC_EFORMAT);
    s->meta.experts = E;
    moec_plan_free(p);
    moec_stats_free(s);
}

/* --- betas ------------------------------------------------------------------------------------------------------------- */

static uint32_t *ratios(moec_stats *s, int d, int64_t l)
{
    return moec_stat_at(s, d, MOEC_STAT_RATIO_HIST, l);
}

static void test_medians(void **state)
{
    (void)state;
    moec_stats *s = blank(3);
    double beta[L * 2];
    ratios(s, 0, 0)[512] = 4;              /* half of 4 is the middle of the bin */
    ratios(s, 0, 0)[BINS + 100] = 1;       /* rank 3: 1, then 3 of which one is missing to 2 */
    ratios(s, 0, 0)[BINS + 200] = 3;
    ratios(s, 0, 1)[10] = 2;               /* 2 and 2: the end of the first bin */
    ratios(s, 1, 1)[20] = 2;
    ratios(s, 0, 2)[1023] = 1;
    assert_int_equal(moec_stats_betas(beta, s, NULL), MOEC_OK);
    assert_true(beta[0] == 512.5 / 1024.0);
    assert_true(beta[1] == (200.0 + 1.0 / 3.0) / 1024.0);
    assert_true(beta[2] == 11.0 / 1024.0);
    assert_true(isnan(beta[3]) && isnan(beta[5]));
    assert_true(beta[4] == 1023.5 / 1024.0);
    s->domain[1].weight = 3.0;             /* 2 against 6: half is 4 */
    assert_int_equal(moec_stats_betas(beta, s, NULL), MOEC_OK);
    assert_true(beta[2] == (20.0 + 2.0 / 6.0) / 1024.0);
    moec_json *about;
    assert_int_equal(moec_stats_describe(&about, s, 1, NULL), MOEC_OK);
    const moec_json *rows = moec_json_get(about, "betas");
    double shown;
    assert_int_equal(moec_json_len(rows), L);
    assert_true(moec_json_real(moec_json_at(moec_json_at(rows, 0), 0), &shown) && shown == 512.5 / 1024.0);
    assert_int_equal(moec_json_type(moec_json_at(moec_json_at(rows, 1), 1)), MOEC_JSON_NULL);
    moec_json_free(about);
    moec_free(s->domain[1].data[MOEC_STAT_RATIO_HIST]);
    s->domain[1].data[MOEC_STAT_RATIO_HIST] = NULL;
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_stats_betas(beta, s, &err), MOEC_EFORMAT);
    assert_non_null(strstr(err.text, "ratio_hist, which domain prose"));
    moec_stats_free(s);
}

/* From the statistics through the plan's text into config.json, whose other bytes stay. */
static void test_betas_in_config(void **state)
{
    (void)state;
    moec_stats *s = blank(2);
    moec_plan *p = keeping(0x0f), *back;
    moec_err err = {MOEC_OK, ""};
    char *text, *config;
    moec_json *root;
    double x;
    for (int64_t l = 0; l < L; l++)
        ratios(s, 0, l)[256 * l] = 2;
    assert_int_equal(moec_plan_betas(p, s, NULL), MOEC_OK);
    assert_int_equal(moec_plan_to_text(&text, p, NULL), MOEC_OK);
    assert_int_equal(moec_plan_parse(&back, text, strlen(text), "plan", &err), MOEC_OK);
    assert_memory_equal(p->betas, back->betas, sizeof(double[L]));
    assert_int_equal(moec_config_edited(&config, model, back, NULL), MOEC_OK);
    assert_int_equal(moec_json_parse(&root, config, strlen(config), "config", NULL), MOEC_OK);
    const moec_json *betas = moec_json_get(root, "betas");
    assert_int_equal(moec_json_len(betas), L);
    assert_true(moec_json_real(moec_json_get(betas, "2"), &x) && x == 256.5 / 1024.0); /* layer 1 has no router */
    assert_true(moec_json_real(moec_json_get(betas, "3"), &x) && x == 512.5 / 1024.0);
    moec_apply_result r;
    const moec_apply_options opt = {.out = out};
    assert_int_equal(moec_apply(&r, model, back, &opt, &err), MOEC_OK); /* which verifies */
    moec_model *pruned;
    assert_int_equal(moec_model_open(&pruned, out, &err), MOEC_OK);
    moec_plan *next;
    assert_int_equal(moec_plan_new(&next, pruned, "test", NULL, NULL), MOEC_OK);
    assert_int_equal(MOEC_NEW(next->betas, L, NULL), MOEC_OK);
    moec_free(config);
    assert_int_equal(moec_config_edited(&config, pruned, next, NULL), MOEC_OK); /* the key is there now: replaced */
    assert_non_null(strstr(config, "\"betas\": {\"0\": 0.0, \"2\": 0.0, \"3\": 0.0}"));
    moec_plan_free(next);
    moec_model_close(pruned);
    moec_json_free(root);
    moec_free(config);
    moec_free(text);
    moec_plan_free(back);
    p->new_top_k = 1;
    assert_int_equal(moec_plan_betas(p, s, &err), MOEC_EINVAL);
    assert_non_null(strstr(err.text, "top-k is 2, the output's 1"));
    p->new_top_k = 2;
    ratios(s, 0, 1)[256] = 0;
    assert_int_equal(moec_plan_betas(p, s, &err), MOEC_EFORMAT);
    assert_non_null(strstr(err.text, "layer 2"));
    moec_plan_free(p);
    moec_stats_free(s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_add),        cmocka_unit_test(test_add_refusals), cmocka_unit_test(test_store_round_trip),
        cmocka_unit_test(test_hostile),    cmocka_unit_test(test_mutations),    cmocka_unit_test(test_query),
        cmocka_unit_test(test_store_plan), cmocka_unit_test(test_weights),      cmocka_unit_test(test_served),
        cmocka_unit_test(test_medians),    cmocka_unit_test(test_betas_in_config),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
