/* What the families' forms ask of pruning: stacked experts, biases, multi-token-prediction layers, attention experts, groups,
 * nested and listed numbers in config.json, padding, what clients load. */
#include "base/file.h"
#include "base/mem.h"
#include "calib/pass.h"
#include "model/variant.h"
#include "run/apply.h"
#include "run/draft.h"
#include "run/layout.h"
#include "run/verify.h"
#include "support/forms.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

static void test_families(void **state)
{
    (void)state;
    const moec_family *f;
    for (int i = 0; (f = moec_family_at(i)) != NULL; i++) {
        forms_write_tiny(f->model_type, 0, MOEC_F32);
        moec_model *m = forms_open_dir(forms_source);
        moec_digest print;
        assert_int_equal(moec_ckpt_fingerprint(&print, m->ckpt, NULL), MOEC_OK);
        const int64_t counts[] = {m->dims.experts / 2, m->dims.experts};
        for (size_t c = 0; c < MOEC_COUNT(counts); c++) {
            const moec_request q = forms_request(m, &print, counts[c]);
            moec_plan *p = forms_plan_of(&q);
            moec_model *o = forms_apply(m, p);
            forms_same_experts(m, o, p);
            if (counts[c] == m->dims.experts)
                assert_string_equal(moec_ckpt_config_text(m->ckpt), moec_ckpt_config_text(o->ckpt));
            moec_model_close(o);
            moec_plan_free(p);
        }
        moec_model_close(m);
    }
}

static void test_groups(void **state)
{
    (void)state;
    moec_digest print = {"0"};
    forms_write_tiny("deepseek_v2", 0, MOEC_F32);
    moec_model *m = forms_open_dir(forms_source); /* topk_method is group_limited_greedy */
    assert_true(m->dims.groups > 1);
    assert_int_equal(moec_ckpt_fingerprint(&print, m->ckpt, NULL), MOEC_OK);
    moec_request q = forms_request(m, &print, 5);
    forms_refuse_request(&q, "4, 6, 8");
    q.keep = 6;
    moec_plan *p = forms_plan_of(&q);
    for (int64_t k = 0; k < 6; k++)
        assert_int_equal(p->layer[0].keep[k] / 4, k / 3); /* three of each group of four */
    assert_int_equal(moec_plan_check(p, m, print.hex, NULL), MOEC_OK);
    memcpy(p->layer[0].keep, (const int32_t[]){0, 1, 2, 3, 4, 5}, 6 * sizeof(int32_t));
    assert_int_equal(moec_plan_check(p, m, print.hex, NULL), MOEC_EFORMAT);
    moec_plan_free(p);
    q.keep = 5;
    q.drop_groups = true;
    p = forms_plan_of(&q);
    moec_model *o = forms_apply(m, p);
    forms_same_experts(m, o, p);
    assert_int_equal(o->dims.groups, 1);
    assert_int_equal(forms_config_int(o, "n_group"), 1);
    assert_int_equal(forms_config_int(o, "topk_group"), 1);
    assert_string_equal(moec_json_string(moec_json_get(moec_ckpt_config(o->ckpt), "topk_method")), "greedy");
    moec_model_close(o);
    moec_plan_free(p);
    moec_model_close(m);
    forms_write_tiny("deepseek_v3", 0, MOEC_F32);
    m = forms_open_dir(forms_source);
    q = forms_request(m, &print, 2); /* one in each group: its two best are not there */
    forms_refuse_request(&q, "at least 2");
    moec_model_close(m);
}

/* Layer 3 of a model of three layers, made of layer 2. */
static void add_mtp(void)
{
    forms_pool *x = forms_pool_of(NULL);
    const size_t n = x->n;
    for (size_t i = 0; i < n; i++) {
        char name[256];
        const moec_st_entry *e = &x->entry[i];
        if (strncmp(e->name, "model.layers.2.", 15) != 0)
            continue;
        snprintf(name, sizeof name, "model.layers.3.%s", e->name + 15);
        forms_pool_add(x, name, e->dtype, e->rank, e->dim, x->data[i]);
    }
    const int64_t dim[2] = {1, 4};
    forms_pool_add(x, "model.layers.3.eh_proj.weight", MOEC_F32, 2, dim, "0123456789abcdef");
    forms_pool_key(x, "\"num_nextn_predict_layers\": 1");
    forms_pool_write(x);
}

static void test_mtp(void **state)
{
    (void)state;
    moec_digest print;
    char *text;
    forms_write_tiny("deepseek_v3", 0, MOEC_BF16);
    add_mtp();
    moec_model *m = forms_open_dir(forms_source);
    assert_int_equal(m->mtp_layers, 1);
    assert_int_equal(moec_ckpt_fingerprint(&print, m->ckpt, NULL), MOEC_OK);
    moec_request q = forms_request(m, &print, 4);
    moec_plan *p = forms_plan_of(&q);
    assert_int_equal(p->n_sets, p->n_layers + 1);
    assert_int_equal(moec_plan_to_text(&text, p, NULL), MOEC_OK);
    assert_non_null(strstr(text, "\"mtp\": \"keep\""));
    assert_non_null(strstr(text, "{\"kind\": \"mtp\", \"layer\": 3, \"experts\": 8, \"keep\": ["));
    moec_free(text);
    moec_model *o = forms_apply(m, p);
    forms_same_experts(m, o, p);
    assert_int_equal(o->mtp_layers, 1);
    assert_non_null(moec_ckpt_find(o->ckpt, "model.layers.3.eh_proj.weight"));
    assert_int_equal(forms_config_int(o, "num_nextn_predict_layers"), 1);
    moec_model_close(o);
    p->mtp = MOEC_PLAN_MTP_UNSAID; /* as a plan of an earlier version */
    assert_int_equal(moec_plan_check(p, m, print.hex, NULL), MOEC_EFORMAT);
    moec_plan_free(p);
    q.drop_mtp = true;
    p = forms_plan_of(&q);
    o = forms_apply(m, p);
    forms_same_experts(m, o, p);
    assert_int_equal(o->mtp_layers, 0);
    for (size_t i = 0; i < moec_ckpt_count(o->ckpt); i++)
        assert_null(strstr(moec_ckpt_at(o->ckpt, i)->name, "model.layers.3."));
    assert_int_equal(forms_config_int(o, "num_nextn_predict_layers"), 0);
    moec_model_close(o);
    moec_plan_free(p);
    moec_model_close(m);
}

/* Router rows of growing norm in a set that calibration does not see: the last ones stay, of equal ones the first. */
static void test_router_norm(void **state)
{
    (void)state;
    moec_digest print;
    static const float norm[8] = {3, 1, 2, 5, 5, 0, 5, 1};
    static const int32_t want[] = {0, 3, 4, 6};
    forms_write_tiny("jetmoe", 0, MOEC_F32);
    forms_pool *x = forms_pool_of(NULL);
    moec_model *m = forms_open_dir(forms_source);
    const moec_tensor *router = m->layer[1].mat[MOEC_MAT_HEADS_ROUTER].of;
    for (size_t i = 0; i < x->n; i++)
        if (strcmp(x->entry[i].name, router->name) == 0)
            for (int64_t v = 0; v < router->dim[0] * router->dim[1]; v++)
                ((float *)x->data[i])[v] = v % router->dim[1] == 0 ? -norm[v / router->dim[1]] : 0.0f;
    moec_model_close(m);
    forms_pool_write(x);
    m = forms_open_dir(forms_source);
    assert_int_equal(moec_ckpt_fingerprint(&print, m->ckpt, NULL), MOEC_OK);
    const moec_request q = forms_request(m, &print, 4), few = forms_request(m, &print, 1);
    moec_plan *p = forms_plan_of(&q);
    const moec_plan_layer *l = &p->layer[p->n_layers + 1];
    assert_int_equal(l->kind, MOEC_SET_HEADS);
    assert_int_equal(l->layer, 1);
    assert_memory_equal(l->keep, want, sizeof want);
    forms_refuse_request(&few, "top-k");
    moec_plan_free(p);
    moec_model_close(m);
}

static void test_pad(void **state)
{
    (void)state;
    static const char *const able[] = {"gpt_oss", "minimax_m2", "lfm2_moe", "afmoe"}, *const unable[] = {"qwen3_moe", "ernie4_5_moe"};
    moec_digest print;
    for (size_t i = 0; i < MOEC_COUNT(able); i++) {
        forms_write_tiny(able[i], 0, i % 2 ? MOEC_F32 : MOEC_BF16);
        moec_model *m = forms_open_dir(forms_source);
        assert_int_equal(moec_ckpt_fingerprint(&print, m->ckpt, NULL), MOEC_OK);
        moec_request q = forms_request(m, &print, 5);
        q.pad = 7;
        moec_plan *p = forms_plan_of(&q);
        p->layer[0].n_keep = 4; /* with a pad, layers may keep different numbers */
        moec_model *o = forms_apply(m, p);
        forms_same_experts(m, o, p);
        forms_check_dead(o, p);
        moec_model_close(o);
        assert_int_equal(moec_plan_dead(p), 2 * p->n_sets + 1);
        p->pad = 4;
        assert_int_equal(moec_plan_check(p, m, print.hex, NULL), MOEC_EFORMAT);
        moec_plan_free(p);
        q.pad = 9;
        forms_refuse_request(&q, "the model has 8");
        moec_model_close(m);
    }
    for (size_t i = 0; i < MOEC_COUNT(unable); i++) {
        forms_write_tiny(unable[i], 0, MOEC_F32);
        moec_model *m = forms_open_dir(forms_source);
        moec_request q = forms_request(m, &print, 5);
        q.pad = 8;
        forms_refuse_request(&q, "padding");
        moec_model_close(m);
    }
}

/* Group g of the output has pad / n_group places: the kept experts of group g, then dead ones. */
static void test_pad_groups(void **state)
{
    (void)state;
    static const int32_t six[] = {1, 2, 3, 4, 5, 7}, four[] = {0, 3, 5, 6};
    static const int64_t of_six[] = {-1, 0, 1, 2, 4, 5, -1, 6}, of_four[] = {0, -1, -1, 1, -1, 4, 5, -1};
    moec_digest print;
    forms_write_tiny("deepseek_v3", 0, MOEC_BF16);
    add_mtp();
    moec_model *m = forms_open_dir(forms_source);
    assert_int_equal(m->dims.groups, 2);
    assert_int_equal(moec_ckpt_fingerprint(&print, m->ckpt, NULL), MOEC_OK);
    moec_request q = forms_request(m, &print, 6);
    q.pad = 8;
    moec_plan *p = forms_plan_of(&q);
    assert_int_equal(p->n_sets, 3); /* two layers and the MTP layer */
    memcpy(p->layer[0].keep, six, sizeof six);
    p->layer[1].n_keep = 4; /* with a pad, layers may keep different numbers */
    memcpy(p->layer[1].keep, four, sizeof four);
    for (int64_t e = 0; e < 8; e++) {
        assert_int_equal(moec_plan_number(p, m, 0, e), of_six[e]);
        assert_int_equal(moec_plan_number(p, m, 1, e), of_four[e]);
    }
    const moec_slots s = moec_plan_slots(p, m, 1);
    for (int64_t e = 0; e < 8; e++)
        assert_int_equal(moec_slots_kept(s, e), e % 4 < 2 ? e / 4 * 2 + e % 4 : -1);
    moec_model *o = forms_apply(m, p);
    forms_same_experts(m, o, p);
    forms_check_dead(o, p);
    assert_int_equal(o->dims.groups, 2);
    moec_model_close(o);
    assert_int_equal(moec_plan_dead(p), 2 + 4 + 2);
    memcpy(p->layer[1].keep, six, 4 * sizeof *six); /* three of group 0, one of group 1 */
    assert_int_equal(moec_plan_check(p, m, print.hex, NULL), MOEC_EFORMAT);
    memcpy(p->layer[1].keep, four, sizeof four);
    assert_int_equal(moec_plan_check(p, m, print.hex, NULL), MOEC_OK);
    p->pad = 7;
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_plan_check(p, m, print.hex, &err), MOEC_EFORMAT);
    assert_non_null(strstr(err.text, "multiple of 2"));
    moec_plan_free(p);
    q.pad = 7;
    forms_refuse_request(&q, "multiple of 2");
    q.drop_groups = true; /* then any number, dead ones behind all others */
    p = forms_plan_of(&q);
    o = forms_apply(m, p);
    forms_same_experts(m, o, p);
    forms_check_dead(o, p);
    assert_int_equal(moec_plan_number(p, m, 0, p->layer[0].keep[5]), 5);
    moec_model_close(o);
    moec_plan_free(p);
    moec_model_close(m);
}

/* Experts of a part that this program does not know, as of a vision tower: copied whole, and counted for the warning. */
static void test_loose(void **state)
{
    (void)state;
    moec_digest print;
    const int64_t dim[1] = {4};
    moec_layout l;
    forms_write_tiny("qwen3_moe", 0, MOEC_F32);
    forms_pool *x = forms_pool_of(NULL);
    forms_pool_add(x, "visual.blocks.0.mlp.experts.0.w1.weight", MOEC_F32, 1, dim, "0123456789abcdef");
    forms_pool_write(x);
    moec_model *m = forms_open_dir(forms_source);
    assert_int_equal(moec_ckpt_fingerprint(&print, m->ckpt, NULL), MOEC_OK);
    const moec_request q = forms_request(m, &print, 4);
    moec_plan *p = forms_plan_of(&q);
    assert_int_equal(moec_layout_build(&l, m, p, NULL, NULL), MOEC_OK);
    assert_int_equal(l.loose, 1);
    moec_layout_release(&l);
    moec_model *o = forms_apply(m, p);
    assert_non_null(moec_ckpt_find(o->ckpt, "visual.blocks.0.mlp.experts.0.w1.weight"));
    moec_model_close(o);
    moec_plan_free(p);
    moec_model_close(m);
}

static void test_config_forms(void **state)
{
    (void)state;
    moec_digest print;
    forms_write_tiny("llama4_text", 0, MOEC_F32);
    forms_pool *x = forms_pool_of(NULL);
    char *nested;
    assert_int_equal(moec_format(&nested, NULL, "{\"model_type\": \"llama4\", \"text_config\": %s, \"vision\": {\"num_local_experts\": 3}}",
                                 x->config), MOEC_OK);
    moec_free(x->config);
    x->config = nested;
    forms_pool_write(x);
    moec_model *m = forms_open_dir(forms_source);
    assert_int_equal(moec_ckpt_fingerprint(&print, m->ckpt, NULL), MOEC_OK);
    moec_request q = forms_request(m, &print, 3);
    moec_plan *p = forms_plan_of(&q);
    moec_model *o = forms_apply(m, p);
    forms_same_experts(m, o, p);
    assert_int_equal(forms_config_int(o, "text_config.num_local_experts"), 3);
    assert_int_equal(forms_config_int(o, "vision.num_local_experts"), 3);
    moec_model_close(o);
    moec_plan_free(p);
    moec_model_close(m);
    forms_write_tiny("hunyuan_v1_moe", 0, MOEC_F32);
    x = forms_pool_of(NULL);
    forms_pool_edit(x, "num_experts", "[8, 8, 8]");
    forms_pool_edit(x, "moe_topk", "[2, 2, 2]");
    forms_pool_write(x);
    m = forms_open_dir(forms_source);
    assert_int_equal(moec_ckpt_fingerprint(&print, m->ckpt, NULL), MOEC_OK);
    q = forms_request(m, &print, 1);
    p = forms_plan_of(&q);
    o = forms_apply(m, p);
    forms_same_experts(m, o, p);
    assert_non_null(strstr(moec_ckpt_config_text(o->ckpt), "\"num_experts\": [1, 1, 1]"));
    assert_non_null(strstr(moec_ckpt_config_text(o->ckpt), "\"moe_topk\": [1, 1, 1]"));
    moec_model_close(o);
    moec_plan_free(p);
    moec_model_close(m);
}

static void test_compat(void **state)
{
    (void)state;
    static const struct { const char *family, *list; int64_t keep; moec_status st; const char *says; } rows[] = {
        {"qwen3_moe", "vllm,transformers", 4, MOEC_OK, ""},
        {"qwen3_moe", "vlm", 4, MOEC_EINVAL, "did you mean vllm"},
        {"qwen3_moe", "", 4, MOEC_EINVAL, "no such client"},
        {"qwen3_moe", "all", 4, MOEC_EFORMAT, "llama.cpp will not load the output (tokenizer)"},
        {"jetmoe", "vllm", 4, MOEC_EFORMAT, "vllm will not load the output (class)"}};
    moec_digest print;
    for (size_t i = 0; i < MOEC_COUNT(rows); i++) {
        moec_client c[MOEC_VERIFY_CLIENTS];
        moec_err err = {MOEC_OK, ""};
        int n;
        forms_write_tiny(rows[i].family, 0, MOEC_F32);
        moec_model *m = forms_open_dir(forms_source);
        assert_int_equal(moec_ckpt_fingerprint(&print, m->ckpt, NULL), MOEC_OK);
        const moec_request q = forms_request(m, &print, rows[i].keep);
        moec_plan *p = forms_plan_of(&q);
        assert_int_equal(moec_compat_check(c, &n, rows[i].list, m, p, &err), rows[i].st);
        if (!strstr(err.text, rows[i].says))
            fail_msg("\"%s\" does not say \"%s\"", err.text, rows[i].says);
        if (rows[i].st == MOEC_OK) {
            assert_int_equal(n, 2);
            assert_non_null(strstr(c[1].advice, "multiple of 8"));
            assert_string_equal(c[0].advice, "");
        }
        moec_plan_free(p);
        moec_model_close(m);
    }
}

/* MoE++'s own code makes routers as wide as it counts experts; exact slices are not. */
static void test_own_code(void **state)
{
    (void)state;
    moec_digest print;
    char *path;
    forms_write_tiny("MoE++", 0, MOEC_F32);
    assert_int_equal(moec_path_join(&path, forms_source, "modeling.py", NULL), MOEC_OK);
    assert_int_equal(moec_file_write(path, "#", 1, NULL), MOEC_OK);
    moec_free(path);
    moec_model *m = forms_open_dir(forms_source);
    assert_int_equal(moec_ckpt_fingerprint(&print, m->ckpt, NULL), MOEC_OK);
    moec_client c[MOEC_VERIFY_CLIENTS];
    assert_true(moec_clients(c, m) == 4 && c[0].loads && !c[1].loads && !c[2].loads && !c[3].loads);
    moec_request q = forms_request(m, &print, 4);
    moec_plan *p = forms_plan_of(&q);
    moec_err err = {MOEC_OK, ""};
    int n;
    assert_int_equal(moec_compat_check(c, &n, "transformers", m, p, &err), MOEC_EFORMAT);
    assert_non_null(strstr(err.text, "(router-width): the model's own Python files make routers of 8 x 8 hidden units, "
                                     "here are 96"));
    moec_model *o = forms_apply(m, p);
    assert_non_null(strstr(moec_ckpt_config_text(o->ckpt), "8\n  ]"));
    assert_int_equal(o->layer[1].mat[MOEC_MAT_ROUTER_IN].rows, 96);
    moec_model_close(o);
    moec_plan_free(p);
    q.pad = 8;
    forms_refuse_request(&q, "its router has no bias that could keep a dead expert");
    q.pad = 0;
    q.keep = 1;
    forms_refuse_request(&q, "fewer than this model's top-k of 2");
    q.keep = 4;
    q.drop_groups = true;
    forms_refuse_request(&q, "has no groups");
    moec_model_close(m);
}

/* ---- variants ---------------------------------------------------------------------------------------------------------- */

enum { TOKENS = 48 };

typedef struct seen {
    float logits[TOKENS * 32];
    int64_t n;
} seen;

static moec_status see_logits(void *ctx, int worker, const moec_chunk *c, const moec_moe_view *v, moec_err *err)
{
    seen *x = ctx;
    (void)worker;
    (void)err;
    assert_true(c->token == 0 && c->n == TOKENS && v->ld <= 32);
    x->n = c->n * v->ld;
    memcpy(x->logits, v->logits, (size_t)x->n * sizeof *x->logits);
    return MOEC_OK;
}

/* Hidden states behind the last layer; each layer is looked at twice before it is run, which must change nothing. */
static float *states_of(const moec_model *m)
{
    moec_err err = {MOEC_OK, ""};
    char name[] = "text";
    int32_t ids[TOKENS];
    int64_t start[] = {0, 7, TOKENS};
    for (int i = 0; i < TOKENS; i++)
        ids[i] = (i * i + 7 * i) % (int)m->dims.vocab;
    moec_domain domain = {.name = name, .path = name, .weight = 1, .ids = ids, .n_ids = TOKENS, .n_windows = 2, .start = start};
    const moec_corpus corpus = {1, &domain};
    const moec_pass_opts o = {.compute = MOEC_COMPUTE_F32, .watch = true, .look = true, .what = "test"};
    moec_pass *p;
    float *h;
    if (moec_pass_new(&p, m, &corpus, &o, &err) != MOEC_OK || moec_pass_embed(p, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    moec_pass_begin(p, 0);
    for (int64_t i = 0; i < m->dims.layers; i++) {
        seen look = {.n = 0}, run = {.n = 0};
        if (moec_pass_look(p, i, see_logits, &look, &err) != MOEC_OK ||
            moec_pass_look(p, i, see_logits, &look, &err) != MOEC_OK ||
            moec_pass_layer(p, i, see_logits, NULL, &run, &err) != MOEC_OK)
            fail_msg("%s", err.text);
        assert_int_equal(look.n, run.n);
        assert_memory_equal(look.logits, run.logits, (size_t)run.n * sizeof *run.logits);
    }
    moec_pass_end(p);
    assert_int_equal(MOEC_NEW(h, (size_t)(TOKENS * m->dims.hidden), NULL), MOEC_OK);
    assert_int_equal(moec_hidden_read(h, p->hidden, 0, TOKENS, NULL), MOEC_OK);
    moec_pass_free(p);
    return h;
}

/* What a masked model computes is what the sliced one does. */
static void check_mask(const char *what)
{
    moec_digest print;
    moec_variant *v;
    moec_model *m = forms_open_dir(forms_source);
    assert_int_equal(moec_ckpt_fingerprint(&print, m->ckpt, NULL), MOEC_OK);
    const moec_request q = forms_request(m, &print, m->dims.experts / 2);
    moec_plan *p = forms_plan_of(&q);
    moec_model *o = forms_apply(m, p);
    assert_int_equal(moec_variant_new(&v, m, NULL), MOEC_OK);
    for (int64_t s = 0; s < p->n_sets; s++)
        assert_int_equal(moec_variant_keep(v, s, p->layer[s].keep, p->layer[s].n_keep, NULL), MOEC_OK);
    moec_variant_top_k(v, p->new_top_k);
    float *want = states_of(o), *got = states_of(&v->model);
    double worst = 0, scale = 0;
    for (int64_t i = 0; i < TOKENS * m->dims.hidden; i++) {
        worst = fmax(worst, fabs((double)want[i] - (double)got[i]));
        scale = fmax(scale, fabs((double)want[i]));
    }
    if (!(worst <= 1e-5 * scale))
        fail_msg("%s: hidden states differ by %.2g of the largest", what, worst / scale);
    moec_free(want);
    moec_free(got);
    moec_variant_free(v);
    moec_plan_free(p);
    moec_model_close(o);
    moec_model_close(m);
}

static void test_masks(void **state)
{
    static const char *const more[] = {"\"moe_use_logits_norm\": true, \"moe_gate_norm_std\": 1.5",
                                       "\"moe_use_mixtral_gating\": true", "\"moe_feature_no_mul_topk\": true"};
    const moec_family *f;
    (void)state;
    for (int i = 0; (f = moec_family_at(i)) != NULL; i++) {
        forms_write_tiny(f->model_type, 0, MOEC_F32);
        check_mask(f->model_type);
    }
    for (size_t i = 0; i < MOEC_COUNT(more); i++) {
        forms_write_tiny("MoE++", 0, MOEC_F32);
        forms_pool *x = forms_pool_of(NULL);
        forms_pool_key(x, more[i]);
        forms_pool_write(x);
        check_mask(more[i]);
    }
}

static void same_values(const moec_weight *a, const moec_weight *b)
{
    float x[96], y[96];
    assert_true(a->rows == b->rows && a->cols == b->cols && a->cols <= 96);
    for (int64_t r = 0; r < a->rows; r++) {
        moec_weight_read(x, a->cols, a, r, 1, 0, a->cols);
        moec_weight_read(y, b->cols, b, r, 1, 0, b->cols);
        assert_memory_equal(x, y, (size_t)a->cols * sizeof *x);
    }
}

/* A draft has the bytes and the views of the output. */
static void test_drafts(void **state)
{
    static const struct { const char *family; int64_t keep, pad; } rows[] = {
        {"qwen3_moe", 4, 0}, {"gpt_oss", 5, 7}, {"deepseek_v3", 6, 8}, {"dbrx", 4, 0}, {"MoE++", 4, 0},
    };
    const uint32_t all = MOEC_PART_GATE | MOEC_PART_UP | MOEC_PART_DOWN | MOEC_PART_ROUTER | MOEC_PART_ROUTER_BIAS |
                         MOEC_PART_SELECTION_BIAS;
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(rows); i++) {
        moec_digest print;
        moec_forms forms;
        moec_override *w;
        moec_err err = {MOEC_OK, ""};
        char *sheets = tiny_folder();
        forms_write_tiny(rows[i].family, 0, MOEC_F32);
        moec_model *m = forms_open_dir(forms_source);
        assert_int_equal(moec_ckpt_fingerprint(&print, m->ckpt, NULL), MOEC_OK);
        moec_request q = forms_request(m, &print, rows[i].keep);
        q.pad = rows[i].pad;
        moec_plan *p = forms_plan_of(&q);
        moec_model *o = forms_apply(m, p);
        assert_int_equal(moec_forms_new(&forms, m, p, NULL), MOEC_OK);
        assert_int_equal(moec_override_open(&w, sheets, true, NULL), MOEC_OK);
        for (int64_t s = 0; s < p->n_sets; s++) {
            moec_draft d;
            if (moec_draft_new(&d, w, "set.safetensors", m, p, &forms, s, all, &err) != MOEC_OK)
                fail_msg("%s: %s", rows[i].family, err.text);
            const moec_layer *l = moec_set_layer(o, s);
            for (int64_t k = 0; k < d.n_keep; k++) {
                const moec_mlp *is = &l->expert[moec_plan_number(p, m, s, p->layer[s].keep[k])];
                same_values(&d.expert[k].gate, &is->gate);
                same_values(&d.expert[k].up, &is->up);
                same_values(&d.expert[k].down, &is->down);
            }
            assert_int_equal(d.router.of->bytes, l->mat[MOEC_MAT_ROUTER].of->bytes);
            assert_memory_equal(d.router.of->data, l->mat[MOEC_MAT_ROUTER].of->data, d.router.of->bytes);
            moec_draft_release(&d);
        }
        moec_override_close(w);
        moec_forms_release(&forms);
        moec_plan_free(p);
        moec_model_close(o);
        moec_model_close(m);
        tiny_remove(sheets);
        moec_free(sheets);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_families), cmocka_unit_test(test_groups), cmocka_unit_test(test_mtp),
        cmocka_unit_test(test_router_norm), cmocka_unit_test(test_pad), cmocka_unit_test(test_pad_groups),
        cmocka_unit_test(test_loose), cmocka_unit_test(test_config_forms), cmocka_unit_test(test_compat),
        cmocka_unit_test(test_own_code), cmocka_unit_test(test_masks), cmocka_unit_test(test_drafts),
    };
    return cmocka_run_group_tests(tests, forms_set_up, forms_tear_down);
}
