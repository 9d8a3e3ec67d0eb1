/* Settings of a merge by name: what --set takes and refuses, what a plan says of them, and what --methods prints. */
#include "base/mem.h"
#include "method/merge.h"
#include "method/method.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static moec_merge_recipe preset(const char *name)
{
    const moec_method *m = moec_method_find(MOEC_MERGE, name);
    assert_non_null(m);
    return *(const moec_merge_recipe *)m->row;
}

static void set(moec_merge_recipe *r, const char *spec)
{
    moec_err err = {MOEC_OK, ""};
    if (moec_merge_set(r, spec, &err) != MOEC_OK)
        fail_msg("%s: %s", spec, err.text);
}

static char *json_of(const moec_merge_recipe *r)
{
    char *text;
    moec_json *o = moec_merge_json(r);
    assert_int_equal(moec_json_dump(&text, o, 0, NULL), MOEC_OK);
    moec_json_free(o);
    return text;
}

static void every_setting_is_set(void **state)
{
    (void)state;
    moec_merge_recipe r = preset("m-smoe");
    static const char *const specs[] = {
        "distance=router-rows", "grouping=spectral", "saliency=equal", "weights=gate-sq", "align=activations", "fill=segments",
        "router=lse", "original=off", "decide=on", "group-size=65535", "restarts=10000", "rank=0.25", "whiten=on", "alpha=-1",
        "segment-gate=1e6", "segment-up=0.125", "segment-down=2", "segment-canonical=on", "segment-response=on",
        "segment-same-norm=off", "segment-sum-same-source=on", "segment-rounds=1"};
    assert_true(r.original && !r.decide && !r.whiten);
    for (size_t i = 0; i < MOEC_COUNT(specs); i++)
        set(&r, specs[i]);
    assert_int_equal(r.distance, MOEC_FAR_ROUTER_ROWS);
    assert_int_equal(r.grouping, MOEC_BY_SPECTRAL);
    assert_int_equal(r.saliency, MOEC_MASS_EQUAL);
    assert_int_equal(r.weights, MOEC_MASS_GATE_SQ);
    assert_int_equal(r.align, MOEC_ALIGN_ACTIVATIONS);
    assert_int_equal(r.fill, MOEC_FILL_SEGMENTS);
    assert_int_equal(r.router, MOEC_ROW_LSE);
    assert_true(!r.original && r.decide && r.whiten);
    assert_int_equal(r.group_size, 65535);
    assert_int_equal(r.restarts, 10000);
    assert_true(r.rank == 0.25 && r.segment.alpha == -1.0 && r.segment.gate == 1e6);
    assert_true(r.segment.up == 0.125 && r.segment.down == 2.0);
    assert_true(r.segment.canonical && r.segment.response && !r.segment.same_norm && r.segment.sum_same_source);
    assert_int_equal(r.segment.rounds, 1);
    set(&r, "rank=1");
    set(&r, "rank=1e-3");
    assert_true(r.rank == 1e-3);
}

static void every_name_is_taken_and_said(void **state)
{
    (void)state;
    const struct {
        const char *key;
        const char *const *names;
    } named[] = {{"distance", moec_merge_distance_names}, {"grouping", moec_merge_grouping_names}, {"saliency", moec_merge_mass_names},
                 {"weights", moec_merge_mass_names},      {"align", moec_merge_align_names},       {"fill", moec_merge_fill_names},
                 {"router", moec_merge_router_names}};
    for (size_t i = 0; i < MOEC_COUNT(named); i++)
        for (int k = 0; named[i].names[k]; k++) {
            moec_merge_recipe r = preset("hc-smoe"), again = r;
            char spec[80], want[90], *text;
            snprintf(spec, sizeof spec, "%s=%s", named[i].key, named[i].names[k]);
            snprintf(want, sizeof want, "\"%s\": \"%s\"", named[i].key, named[i].names[k]);
            set(&r, spec);
            text = json_of(&r);
            if (!strstr(text, want))
                fail_msg("%s is not in %s", want, text);
            moec_free(text);
            set(&again, spec);
            assert_memory_equal(&r, &again, sizeof r);
        }
}

static void others_are_refused(void **state)
{
    (void)state;
    static const struct { const char *spec, *says; } bad[] = {
        {"", "--set : is not KEY=VALUE"},
        {"distance", "is not KEY=VALUE"},
        {"=logits", "no such setting"},
        {"a-key-that-is-longer-than-any-key-that-there-is=1", "is not KEY=VALUE"},
        {"distance=a-value-that-is-longer-than-any-value-that-there-is-of-anything-that-can-be-set-at-all", "is not KEY=VALUE"},
        {"foo=1", "--set foo: there is no such setting; merge --methods lists them"},
        {"wieghts=gate", "did you mean weights"},
        {"distanc=logits", "did you mean distance"},
        {"Distance=logits", "no such setting"},
        {" distance=logits", "no such setting"},
        {"distance=logit", "distance=logit: is none of logits, centred-logits, mean-output, output-cosine, output, gated, weights, router-rows"},
        {"distance=logits ", "is none of"},
        {"distance=Logits", "is none of"},
        {"distance=", "is none of"},
        {"distance=output=", "is none of"},
        {"distance=0", "is none of"},
        {"whiten=1", "is none of off, on"},
        {"whiten=true", "is none of off, on"},
        {"group-size=1", "is no whole number from 2 to 65535"},
        {"group-size=65536", "is no whole number from 2 to 65535"},
        {"restarts=0", "is no whole number from 1 to 10000"},
        {"restarts=2.5", "is no whole number"},
        {"restarts=1e99", "is no whole number"},
        {"restarts=", "is no whole number"},
        {"restarts=3 ", "is no whole number"},
        {"rank=-0.1", "is no number from 0 to 1"},
        {"rank=nan", "is no number"},
        {"rank=inf", "is no number"},
        {"rank=1,0", "is no number"},
        {"alpha=1.01", "is no number from -1 to 1"},
        {"segment-up=-1", "is no number from 0 to 1e+06"},
    };
    for (size_t i = 0; i < MOEC_COUNT(bad); i++) {
        moec_merge_recipe r = preset("dern");
        const moec_merge_recipe before = r;
        moec_err err = {MOEC_OK, ""};
        assert_int_equal(moec_merge_set(&r, bad[i].spec, &err), MOEC_EINVAL);
        if (!strstr(err.text, bad[i].says) || strchr(err.text, '\n'))
            fail_msg("case %zu: \"%s\" does not say \"%s\"", i, err.text, bad[i].says);
        assert_memory_equal(&r, &before, sizeof r);
        assert_int_equal(moec_merge_set(&r, bad[i].spec, NULL), MOEC_EINVAL);
    }
}

/* What means nothing with a fill is not said. */
static void json_has_what_applies(void **state)
{
    (void)state;
    moec_merge_recipe r = preset("dern");
    char *text = json_of(&r);
    static const char *const of_segments[] = {"\"alpha\"", "\"segment-gate\"", "\"segment-rounds\": 30", "\"segment-same-norm\": true"};
    for (size_t i = 0; i < MOEC_COUNT(of_segments); i++)
        assert_non_null(strstr(text, of_segments[i]));
    moec_free(text);
    set(&r, "fill=average");
    text = json_of(&r);
    assert_null(strstr(text, "segment"));
    assert_null(strstr(text, "alpha"));
    assert_non_null(strstr(text, "\"restarts\": 32"));
    assert_non_null(strstr(text, "\"rank\": 1.0"));
    moec_free(text);
}

static void settings_belong_somewhere(void **state)
{
    (void)state;
    static const struct {
        const char *method, *set, *key, *of; /* of NULL: it applies */
    } cases[] = {
        {"m-smoe", "", "restarts", "grouping=kmeans and spectral"},
        {"sub-moe", "", "restarts", NULL},
        {"m-smoe", "grouping=spectral", "restarts=3", NULL},
        {"ream", "", "group-size", NULL},
        {"ream", "grouping=nearest", "group-size=2", "grouping=pseudo"},
        {"sub-moe", "", "rank", NULL},
        {"sub-moe", "", "whiten", NULL},
        {"hc-smoe", "", "rank=1", "fill=subspace"},
        {"hc-smoe", "", "alpha", "fill=segments"},
        {"dern", "", "alpha", NULL},
        {"dern", "", "segment-up", NULL},
        {"dern", "", "segment-rounds", "fill=segments with segment-response=on"},
        {"dern", "segment-response=on", "segment-rounds", NULL},
        {"dern", "", "align", "fill=average and subspace"},
        {"dern", "", "distance", "groupings other than pruning"},
        {"dern", "", "saliency", NULL},
        {"m-smoe", "", "segment", NULL}, /* is no setting */
        {"m-smoe", "", "", NULL},
    };
    for (size_t i = 0; i < MOEC_COUNT(cases); i++) {
        moec_merge_recipe r = preset(cases[i].method);
        const char *of = NULL;
        if (*cases[i].set)
            set(&r, cases[i].set);
        assert_int_equal(moec_merge_applies(&of, &r, cases[i].key), !cases[i].of);
        assert_int_equal(moec_merge_applies(NULL, &r, cases[i].key), !cases[i].of);
        if (cases[i].of)
            assert_string_equal(of, cases[i].of);
    }
}

/* The list names every key and value that is taken, a line a setting, and is cut where there is no room. */
static void list_of_settings(void **state)
{
    (void)state;
    char list[2000], cut[2000];
    moec_merge_settings(list, sizeof list);
    int lines = 1;
    for (const char *c = list; *c; c++)
        lines += *c == '\n';
    assert_int_equal(lines, 22);
    assert_non_null(strstr(list, "\nfill=average|subspace|segments\n"));
    assert_non_null(strstr(list, "\nwhiten=off|on\n"));
    assert_non_null(strstr(list, "\nrank=0..1\n"));
    assert_true(strncmp(list, "distance=logits|", 16) == 0);
    for (char *line = strtok(list, "\n"); line; line = strtok(NULL, "\n")) {
        char key[40];
        const size_t n = strcspn(line, "=");
        snprintf(key, sizeof key, "%.*s", (int)n, line);
        for (char *v = line + n + 1; v && !strstr(line, ".."); v = strchr(v, '|') ? strchr(v, '|') + 1 : NULL) {
            moec_merge_recipe r = preset("adaptive");
            char spec[80];
            snprintf(spec, sizeof spec, "%s=%.*s", key, (int)strcspn(v, "|"), v);
            set(&r, spec);
        }
    }
    moec_merge_settings(list, sizeof list);
    for (size_t size = 1; size < 300; size++) {
        memset(cut, 'x', sizeof cut);
        moec_merge_settings(cut, size);
        assert_true(strlen(cut) < size);
        assert_memory_equal(cut, list, strlen(cut));
        assert_int_equal(cut[size], 'x');
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_setting_is_set),
        cmocka_unit_test(every_name_is_taken_and_said),
        cmocka_unit_test(others_are_refused),
        cmocka_unit_test(json_has_what_applies),
        cmocka_unit_test(settings_belong_somewhere),
        cmocka_unit_test(list_of_settings),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
