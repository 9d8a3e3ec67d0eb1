/* Plans as text: what is written comes back; everything that is not a plan, or not of this model, is refused with a place. */
#include "base/file.h"
#include "base/mem.h"
#include "method/plan.h"
#include "support/tiny.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

static char *folder;
static moec_model *model;
static moec_digest print;

static int set_up(void **state)
{
    (void)state;
    moec_err err = {MOEC_OK, ""};
    const tiny_spec spec = {.layers = 4, .dense_layer = 2, .seed = 1};
    folder = tiny_folder();
    return tiny_write(folder, &spec, &err) == MOEC_OK && moec_model_open(&model, folder, &err) == MOEC_OK &&
                   moec_ckpt_fingerprint(&print, model->ckpt, &err) == MOEC_OK
               ? 0 : 1;
}

static int tear_down(void **state)
{
    (void)state;
    moec_model_close(model);
    tiny_remove(folder);
    moec_free(folder);
    return 0;
}

/* Keeps the experts of a bit set in each layer. */
static moec_plan *make(unsigned keep)
{
    moec_plan *p;
    assert_int_equal(moec_plan_new(&p, model, "test", print.hex, NULL), MOEC_OK);
    for (int64_t l = 0; l < p->n_layers; l++) {
        assert_int_equal(MOEC_NEW(p->layer[l].keep, 8, NULL), MOEC_OK);
        for (int32_t e = 0; e < 8; e++)
            if (keep >> e & 1)
                p->layer[l].keep[p->layer[l].n_keep++] = e;
    }
    return p;
}

static void test_round_trip(void **state)
{
    (void)state;
    moec_plan *p = make(0xb2), *back;
    char *text, *again;
    moec_json *json;
    assert_int_equal(p->n_layers, 3);
    assert_int_equal(p->layer[1].layer, 2); /* layer 1 is dense */
    assert_int_equal(MOEC_NEW(p->layer[0].score, 8, NULL), MOEC_OK);
    for (int e = 0; e < 8; e++)
        p->layer[0].score[e] = 1.0 / (3.0 + e);
    assert_int_equal(MOEC_NEW(p->layer[0].unseen, 8, NULL), MOEC_OK);
    p->layer[0].unseen[p->layer[0].n_unseen++] = 3;
    assert_int_equal(moec_plan_to_text(&text, p, NULL), MOEC_OK);
    assert_int_equal(moec_plan_parse(&back, text, strlen(text), "plan", NULL), MOEC_OK);
    assert_int_equal(moec_plan_to_text(&again, back, NULL), MOEC_OK);
    assert_string_equal(text, again);
    assert_memory_equal(p->layer[0].score, back->layer[0].score, 8 * sizeof(double));
    assert_int_equal(moec_plan_check(back, model, print.hex, NULL), MOEC_OK);
    moec_plan_free(back);
    assert_int_equal(moec_plan_to_json(&json, p, NULL), MOEC_OK);
    assert_int_equal(moec_plan_from_json(&back, json, "json", NULL), MOEC_OK);
    assert_int_equal(moec_plan_kept(back, 0, 1), 0);
    assert_int_equal(moec_plan_kept(back, 0, 2), -1);
    assert_int_equal(moec_plan_kept(back, 0, 7), 3);
    assert_ptr_equal(moec_plan_find(back, 2), &back->layer[1]);
    assert_null(moec_plan_find(back, 1));
    moec_json_free(json);
    moec_plan_free(back);
    moec_free(text);
    moec_free(again);
    moec_plan_free(p);
}

#define HEAD "{\"moecompress_plan\": 1, \"kind\": \"prune\", \"model\": \"\", \"top_k\": 2, \"new_top_k\": 2, "
#define LAYER(keep) "{\"layer\": 0, \"experts\": 4, \"keep\": " keep "}"

#define OTHER(kind, layer) "{\"kind\": \"" kind "\", \"layer\": " layer ", \"experts\": 4, \"keep\": [0, 2]}"

#define SHIFTED(part, more)                                                                                            \
    HEAD "\"layers\": [{\"layer\": 0, \"experts\": 4, \"keep\": [0], \"rewritten\": [" part "], " more "}]}"

/* What became of the router. */
static void test_shift(void **state)
{
    (void)state;
    static const char text[] = SHIFTED("\"down\", \"router\"", "\"held_out\": [0.5, 0.25], \"load_shift\": 0.125, \"router_refit\": true");
    moec_plan *p, *again;
    char *first, *second;
    assert_int_equal(moec_plan_parse(&p, text, sizeof text - 1, "plan", NULL), MOEC_OK);
    assert_true(p->layer[0].load_shift == 0.125 && p->layer[0].router_refit);
    assert_int_equal(moec_plan_to_text(&first, p, NULL), MOEC_OK);
    assert_non_null(strstr(first, "\"load_shift\""));
    assert_int_equal(moec_plan_parse(&again, first, strlen(first), "plan", NULL), MOEC_OK);
    assert_int_equal(moec_plan_to_text(&second, again, NULL), MOEC_OK);
    assert_string_equal(first, second);
    moec_free(first);
    moec_free(second);
    moec_plan_free(again);
    p->layer[0].rewritten = MOEC_PART_DOWN; /* it is of the router */
    assert_int_equal(moec_plan_to_text(&first, p, NULL), MOEC_OK);
    assert_null(strstr(first, "load_shift"));
    moec_free(first);
    moec_plan_free(p);
    p = make(0x0f);
    assert_true(p->layer[0].load_shift != p->layer[0].load_shift); /* NAN */
    moec_plan_free(p);
}

#define MERGED(keep, merged)                                                                                           \
    "{\"moecompress_plan\": 1, \"kind\": \"merge\", \"model\": \"\", \"top_k\": 2, \"new_top_k\": 2, "               \
    "\"layers\": [{\"layer\": 0, \"experts\": 6, \"keep\": " keep ", \"merged\": " merged "}]}"

#define MAPPED(keep, merged)                                                                                           \
    "{\"moecompress_plan\": 1, \"kind\": \"merge\", \"model\": \"\", \"top_k\": 2, \"new_top_k\": 2, \"emit\": \"map\", "    \
    "\"layers\": [{\"layer\": 0, \"experts\": 6, \"keep\": " keep ", \"merged\": " merged "}]}"

/* Where the rows of a router lead. */
static void test_mapped(void **state)
{
    (void)state;
    static const int64_t leads[6] = {0, 1, 1, 1, 2, 2};
    moec_plan *p, *again;
    char *text;
    assert_int_equal(moec_plan_parse(&p, MAPPED("[0, 2, 5]", "[[2, 1, 3], [5, 4]]"), sizeof MAPPED("[0, 2, 5]", "[[2, 1, 3], [5, 4]]") - 1,
                                     "plan", NULL), MOEC_OK);
    assert_true(p->mapped && moec_plan_brings_code(p));
    assert_int_equal(moec_plan_experts(p), 6);
    for (int64_t e = 0; e < 6; e++)
        assert_int_equal(moec_plan_leads_to(p, 0, e), leads[e]);
    assert_int_equal(moec_plan_to_text(&text, p, NULL), MOEC_OK);
    assert_non_null(strstr(text, "\"emit\": \"map\""));
    assert_int_equal(moec_plan_parse(&again, text, strlen(text), "plan", NULL), MOEC_OK);
    assert_true(again->mapped);
    moec_free(text);
    moec_plan_free(again);
    moec_plan_free(p);
}

/* Who went into whom. */
static void test_merged(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        int32_t into[6];
        const char *says;
    } good[] = {
        {MERGED("[0, 2, 5]", "[[2, 1, 3], [5, 4]]"), {0, 2, 2, 2, 5, 5}, "\"merged\": [[2, 1, 3], [5, 4]]"},
        {MERGED("[0, 2, 5]", "[[5, 4], [2, 3]]"), {0, -1, 2, 2, 5, 5}, "\"merged\": [[2, 3], [5, 4]]"}, /* 1 is only removed */
        {MERGED("[0, 2, 5]", "[]"), {0, -1, 2, -1, -1, 5}, "\"merged\": []"},
        {MERGED("[0, 2, 5]", "[[0], []]"), {0, -1, 2, -1, -1, 5}, "\"merged\": []"},
        {MERGED("[0, 1, 2, 3, 4, 5]", "[[4, 0, 5]]"), {4, 1, 2, 3, 4, 4}, "\"merged\": [[4, 0, 5]]"}, /* tied: all are there */
    };
    for (size_t i = 0; i < MOEC_COUNT(good); i++) {
        moec_plan *p, *again;
        char *first, *second;
        assert_int_equal(moec_plan_parse(&p, good[i].text, strlen(good[i].text), "plan", NULL), MOEC_OK);
        assert_non_null(p->layer[0].into);
        assert_memory_equal(p->layer[0].into, good[i].into, sizeof good[i].into);
        assert_true(moec_plan_merges(p));
        assert_int_equal(moec_plan_to_text(&first, p, NULL), MOEC_OK);
        if (!strstr(first, good[i].says) || !strstr(first, "\"kind\": \"merge\""))
            fail_msg("case %zu: %s", i, first);
        assert_int_equal(moec_plan_parse(&again, first, strlen(first), "plan", NULL), MOEC_OK);
        assert_memory_equal(again->layer[0].into, good[i].into, sizeof good[i].into);
        assert_int_equal(moec_plan_to_text(&second, again, NULL), MOEC_OK);
        assert_string_equal(first, second);
        moec_free(first);
        moec_free(second);
        moec_plan_free(again);
        moec_plan_free(p);
    }
    moec_plan *p = make(0x0f);
    char *text;
    assert_false(moec_plan_merges(p));
    assert_null(p->layer[0].into);
    assert_int_equal(moec_plan_to_text(&text, p, NULL), MOEC_OK);
    assert_null(strstr(text, "merged"));
    assert_non_null(strstr(text, "\"kind\": \"prune\""));
    moec_free(text);
    moec_plan_free(p);
}

/* What is only there where it applies is written as it was read, and nowhere else. */
static void test_extras(void **state)
{
    (void)state;
    static const char text[] = HEAD "\"mtp\": \"keep\", \"groups\": \"drop\", \"pad\": 3, \"dtype\": \"f16\", \"betas\": [0.25], \"layers\": ["
        LAYER("[0, 1]") "], \"others\": [" OTHER("attention", "0") ", " OTHER("mtp", "0") "]}";
    moec_plan *p, *again;
    char *first, *second;
    assert_int_equal(moec_plan_parse(&p, text, sizeof text - 1, "plan", NULL), MOEC_OK);
    assert_int_equal(p->n_layers, 1);
    assert_int_equal(p->n_sets, 3);
    assert_int_equal(p->layer[1].kind, MOEC_SET_HEADS);
    assert_int_equal(p->layer[2].kind, MOEC_SET_MTP);
    assert_int_equal(p->dtype, MOEC_F16);
    assert_true(p->drop_groups && p->mtp == MOEC_PLAN_MTP_KEEP && p->pad == 3);
    assert_true(p->betas && p->betas[0] == 0.25);
    assert_int_equal(moec_plan_experts(p), 3);
    assert_int_equal(moec_plan_dead(p), 3);
    assert_int_equal(moec_plan_to_text(&first, p, NULL), MOEC_OK);
    assert_int_equal(moec_plan_parse(&again, first, strlen(first), "plan", NULL), MOEC_OK);
    assert_int_equal(moec_plan_to_text(&second, again, NULL), MOEC_OK);
    assert_string_equal(first, second);
    moec_plan_drop_mtp(p);
    assert_int_equal(p->n_sets, 2);
    moec_free(first);
    moec_free(second);
    moec_plan_free(again);
    moec_plan_free(p);
    p = make(0x0f);
    assert_int_equal(moec_plan_to_text(&first, p, NULL), MOEC_OK);
    static const char *const keys[] = {"mtp", "groups", "pad", "dtype", "betas", "others", "kind\": \"moe"};
    for (size_t i = 0; i < MOEC_COUNT(keys); i++)
        assert_null(strstr(first, keys[i]));
    moec_free(first);
    moec_plan_free(p);
}

static void test_hostile(void **state)
{
    (void)state;
    static const struct { const char *text, *says; } bad[] = {
        {"", "JSON"},
        {"[]", "not a JSON object"},
        {"{}", "moecompress_plan"},
        {"{\"moecompress_plan\": 2}", "expected 1"},
        {"{\"moecompress_plan\": 1.0}", "whole number"},
        {"{\"moecompress_plan\": 1}", "kind"},
        {"{\"moecompress_plan\": 1, \"kind\": \"melt\"}", "melt"},
        {"{\"moecompress_plan\": 1, \"kind\": \"merge\"}", "model"},
        {"{\"moecompress_plan\": 1, \"kind\": \"prune\"}", "model"},
        {HEAD "\"layers\": []}", "layers"},
        {HEAD "\"layers\": {}}", "layers"},
        {HEAD "\"layres\": []}", "unknown key layres"},
        {HEAD "\"options\": 3, \"layers\": []}", "options"},
        {HEAD "\"method\": 3, \"layers\": []}", "method"},
        {HEAD "\"layers\": [7]}", "layers[0]"},
        {HEAD "\"layers\": [" LAYER("[]") "]}", "keep"},
        {HEAD "\"layers\": [" LAYER("[0, 4]") "]}", "from 0 to 3"},
        {HEAD "\"layers\": [" LAYER("[-1]") "]}", "from 0 to 3"},
        {HEAD "\"layers\": [" LAYER("[0, 0]") "]}", "ascend"},
        {HEAD "\"layers\": [" LAYER("[2, 1]") "]}", "ascend"},
        {HEAD "\"layers\": [" LAYER("[0, 1, 2, 3, 3]") "]}", "list"},
        {HEAD "\"layers\": [" LAYER("[0.5]") "]}", "number"},
        {HEAD "\"layers\": [" LAYER("[0, 1]") ", " LAYER("[0, 1]") "]}", "layers must ascend"},
        {HEAD "\"layers\": [{\"layer\": 0, \"experts\": 4, \"keep\": [0], \"score\": [1, 2]}]}", "score"},
        {HEAD "\"layers\": [{\"layer\": 0, \"experts\": 99999999, \"keep\": [0]}]}", "experts"},
        {HEAD "\"layers\": [{\"layer\": 0, \"experts\": 4, \"keep\": [0], \"kept\": []}]}", "unknown key kept"},
        {HEAD "\"mtp\": \"yes\", \"layers\": []}", "mtp is yes, expected keep or drop"},
        {HEAD "\"groups\": \"keep\", \"layers\": []}", "expected drop"},
        {HEAD "\"dtype\": \"int4\", \"layers\": []}", "dtype is int4"},
        {HEAD "\"dtype\": 4, \"layers\": []}", "dtype is no text"},
        {HEAD "\"pad\": 0, \"layers\": []}", "pad is 0"},
        {HEAD "\"betas\": [0.5, 0.5], \"layers\": [" LAYER("[0]") "]}", "betas is not a list of 1 numbers"},
        {HEAD "\"betas\": {\"0\": 0.5}, \"layers\": [" LAYER("[0]") "]}", "betas is not a list of 1 numbers"},
        {HEAD "\"betas\": [null], \"layers\": [" LAYER("[0]") "]}", "betas 0 is not a number"},
        {HEAD "\"betas\": [1.5], \"layers\": [" LAYER("[0]") "]}", "betas: entry 0 is 1.5, expected 0 to 1"},
        {HEAD "\"betas\": [-1], \"layers\": [" LAYER("[0]") "]}", "expected 0 to 1"},
        {"{\"moecompress_plan\": 1, \"kind\": \"prune\", \"model\": \"\", \"top_k\": 2, \"new_top_k\": 1, \"betas\": [0.5], "
         "\"layers\": [" LAYER("[0]") "]}", "two experts a token"},
        {HEAD "\"others\": 3, \"layers\": [" LAYER("[0]") "]}", "others is not a list"},
        {HEAD "\"others\": [3], \"layers\": [" LAYER("[0]") "]}", "others[0]"},
        {HEAD "\"others\": [" OTHER("heads", "1") "], \"layers\": [" LAYER("[0]") "]}", "kind is heads"},
        {HEAD "\"others\": [" OTHER("mtp", "1") ", " OTHER("attention", "2") "], \"layers\": [" LAYER("[0]") "]}",
         "first attention"},
        {HEAD "\"others\": [" OTHER("mtp", "1") ", " OTHER("mtp", "1") "], \"layers\": [" LAYER("[0]") "]}", "must ascend"},
        {HEAD "\"others\": [{\"kind\": \"mtp\", \"layer\": 0, \"experts\": 4, \"keep\": [4]}], \"layers\": [" LAYER("[0]") "]}",
         "others[0]: keep"},
        {HEAD "\"others\": [{\"kind\": \"mtp\", \"layer\": 0, \"experts\": 4, \"keep\": [0], \"score\": []}], "
         "\"layers\": [" LAYER("[0]") "]}", "unknown key score"},
        {SHIFTED("\"router\"", "\"load_shift\": 1.5, \"router_refit\": true"), "load_shift is not a number from 0 to 1"},
        {SHIFTED("\"router\"", "\"load_shift\": -0.1, \"router_refit\": true"), "load_shift is not a number from 0 to 1"},
        {SHIFTED("\"router\"", "\"load_shift\": \"1\", \"router_refit\": true"), "load_shift is not a number from 0 to 1"},
        {SHIFTED("\"router\"", "\"load_shift\": 0.5, \"router_refit\": 1"), "router_refit is not true or false"},
        {SHIFTED("\"router\"", "\"load_shift\": 0.5"), "go together"},
        {SHIFTED("\"router\"", "\"router_refit\": false"), "go together"},
        {SHIFTED("\"down\"", "\"load_shift\": 0.5, \"router_refit\": true"), "with router in rewritten"},
        {MAPPED("[0, 2, 5]", "[[2, 1, 3]]"), "expert 4 is neither kept nor merged"},
        {MAPPED("[0, 2, 5]", "[]"), "expert 1 is neither kept nor merged"},
        {MERGED("[0, 2, 5]", "[[1, 3]]"), "expert 1, into which 1 went, is not kept"},
        {MERGED("[0, 2, 5]", "[[1]]"), "expert 1, into which 1 went, is not kept"},
        {MERGED("[0, 2, 5]", "[[2, 6]]"), "not an expert from 0 to 5, each once"},
        {MERGED("[0, 2, 5]", "[[2, -1]]"), "not an expert from 0 to 5, each once"},
        {MERGED("[0, 2, 5]", "[[2, 1], [5, 1]]"), "not an expert from 0 to 5, each once"},
        {MERGED("[0, 2, 5]", "[[2, 2]]"), "not an expert from 0 to 5, each once"},
        {MERGED("[0, 2, 5]", "[[2, 1.5]]"), "not an expert from 0 to 5, each once"},
        {MERGED("[0, 2, 5]", "[[2, \"1\"]]"), "not an expert from 0 to 5, each once"},
        {MERGED("[0, 2, 5]", "[[2, [1]]]"), "not an expert from 0 to 5, each once"},
        {MERGED("[0, 2, 5]", "[2, 1]"), "merged: a group is not a list of experts"},
        {MERGED("[0, 2, 5]", "{\"2\": [1]}"), "merged is not a list of groups"},
        {MERGED("[0, 2, 5]", "null"), "merged is not a list of groups"},
        {MERGED("[0, 2, 5]", "[[], [], [], [], [], [], []]"), "merged is not a list of groups"},
        {"{\"moecompress_plan\": 1, \"kind\": \"prune\", \"model\": \"\", \"top_k\": 2, \"new_top_k\": 3, \"layers\": []}",
         "new_top_k"},
        {"{\"moecompress_plan\": 1, \"kind\": \"prune\", \"model\": \"0123456789012345678901234567890123\", \"top_k\": 2, "
         "\"new_top_k\": 2, \"layers\": []}", "longer"},
    };
    for (size_t i = 0; i < MOEC_COUNT(bad); i++) {
        moec_plan *p = (moec_plan *)&folder;
        moec_err err = {MOEC_OK, ""};
        assert_int_equal(moec_plan_parse(&p, bad[i].text, strlen(bad[i].text), "x.json", &err), MOEC_EFORMAT);
        assert_null(p);
        if (!strstr(err.text, bad[i].says) || !strstr(err.text, "x.json"))
            fail_msg("case %zu: \"%s\" does not say \"%s\"", i, err.text, bad[i].says);
    }
}

static void refuse(moec_plan *p, const char *says)
{
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_plan_check(p, model, print.hex, &err), MOEC_EFORMAT);
    if (!strstr(err.text, says))
        fail_msg("\"%s\" does not say \"%s\"", err.text, says);
    moec_plan_free(p);
}

static void test_other_model(void **state)
{
    (void)state;
    moec_plan *p = make(0x0f);
    p->model[0] = '\0'; /* any model of this shape */
    assert_int_equal(moec_plan_check(p, model, print.hex, NULL), MOEC_OK);
    memset(p->model, 'a', 32);
    refuse(p, "another model");
    p = make(0x0f);
    snprintf(p->model_type, sizeof p->model_type, "mixtral");
    refuse(p, "a model of type mixtral, this one is qwen3_moe");
    p = make(0x0f);
    p->model_type[0] = '\0'; /* need not be said */
    assert_int_equal(moec_plan_check(p, model, print.hex, NULL), MOEC_OK);
    moec_plan_free(p);
    p = make(0x0f);
    p->layer[2].n_keep = 3;
    refuse(p, "one count");
    p = make(0x0f);
    p->layer[0].n_experts = 9;
    refuse(p, "9 experts");
    p = make(0x0f);
    p->layer[1].layer = 1; /* the dense one */
    refuse(p, "no layer with experts");
    p = make(0x0f);
    p->layer[2].layer = 4000;
    refuse(p, "no layer with experts");
    p = make(0x01);
    refuse(p, "more than the 1 experts");
    p = make(0x0f);
    p->top_k = 3;
    refuse(p, "top_k");
    p = make(0x0f);
    p->mtp = MOEC_PLAN_MTP_KEEP;
    refuse(p, "no multi-token-prediction");
    p = make(0x0f);
    p->drop_groups = true;
    refuse(p, "no groups");
    p = make(0x0f);
    p->pad = 6;
    refuse(p, "padding");
    p = make(0x0f);
    moec_free(p->layer[2].keep);
    p->n_layers = p->n_sets = 2;
    refuse(p, "2 layers");
}

/* A plan stands in a folder with others: one layer a line, so that a changed layer is a changed line. */
static void test_lines(void **state)
{
    (void)state;
    moec_plan *p = make(0x3c);
    char *text;
    int lines = 0;
    assert_int_equal(moec_plan_to_text(&text, p, NULL), MOEC_OK);
    for (const char *c = text; *c; c++)
        lines += *c == '\n';
    assert_int_equal(lines, 1 + 9 + 1 + 3 + 2);
    moec_free(text);
    moec_plan_free(p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_extras),
        cmocka_unit_test(test_shift),
        cmocka_unit_test(test_merged), cmocka_unit_test(test_mapped),
        cmocka_unit_test(test_hostile),
        cmocka_unit_test(test_other_model),
        cmocka_unit_test(test_lines),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
