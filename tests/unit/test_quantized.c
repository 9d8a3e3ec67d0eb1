/* Pruning quantized checkpoints: FP8 with its scales and MXFP4 blocks are cut with their experts, padded, and written in another
 * number format; damage to what was computed is found. */
#include "base/file.h"
#include "base/mem.h"
#include "run/apply.h"
#include "run/verify.h"
#include "support/forms.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

/* Experts in FP8 with blocks of 8 x 8 (ragged at the edges); config as DeepSeek's, with a list that names experts. */
static void make_fp8(void)
{
    forms_write_tiny("minimax_m2", 20, MOEC_BF16);
    forms_pool *x = forms_pool_of(".experts."), *all = forms_pool_of(NULL);
    uint32_t noise = 7;
    for (size_t i = 0; i < all->n; i++) {
        const moec_st_entry *e = &all->entry[i];
        if (!strstr(e->name, ".experts."))
            continue;
        unsigned char code[1024];
        float scale[64];
        char name[256];
        const int64_t blocks[2] = {(e->dim[0] + 7) / 8, (e->dim[1] + 7) / 8};
        for (int64_t v = 0; v < e->dim[0] * e->dim[1]; v++) {
            noise = noise * 1664525u + 1013904223u;
            code[v] = (unsigned char)((noise >> 24) % 0x7f);
        }
        for (int64_t v = 0; v < blocks[0] * blocks[1]; v++)
            scale[v] = 0.37f / (float)(v + 1 + (int64_t)(noise % 5));
        forms_pool_add(x, e->name, MOEC_F8_E4M3, 2, e->dim, code);
        snprintf(name, sizeof name, "%s_scale_inv", e->name);
        forms_pool_add(x, name, MOEC_F32, 2, blocks, scale);
    }
    forms_pool_key(x, "\"quantization_config\": {\"quant_method\": \"fp8\", \"weight_block_size\": [8, 8], \"modules_to_not_convert\": "
                "[\"lm_head\", \"model.layers.0.block_sparse_moe.experts.1.w1\", \"model.layers.0.block_sparse_moe.experts.6.w2\", "
                "\"model.layers.1.block_sparse_moe.experts.6\"]}");
    forms_pool_write(x);
    for (size_t i = 0; i < all->n; i++) {
        moec_free(all->entry[i].name);
        moec_free(all->data[i]);
    }
    moec_free(all->config);
    moec_free(all);
}

static moec_plan *plan_keeping(const moec_model *m, int64_t keep)
{
    moec_digest print;
    assert_int_equal(moec_ckpt_fingerprint(&print, m->ckpt, NULL), MOEC_OK);
    const moec_request q = forms_request(m, &print, keep);
    return forms_plan_of(&q);
}

static void keep_these(moec_plan *p)
{
    static const int32_t keep[] = {0, 2, 3, 5, 6};
    for (int64_t s = 0; s < p->n_sets; s++) {
        assert_int_equal(p->layer[s].n_keep, 5);
        memcpy(p->layer[s].keep, keep, sizeof keep);
    }
}

/* A value as BF16 holds it, nearest even, from its definition. */
static float as_bf16(float v)
{
    int e;
    float m = frexpf(v, &e);
    return v == 0.0f ? 0.0f : ldexpf(rintf(m * 256.0f), e - 8);
}

static void check_rounded(const moec_model *m, const moec_model *o, const moec_plan *p)
{
    float a[256], b[256];
    for (int64_t s = 0; s < p->n_sets; s++)
        for (int64_t k = 0; k < p->layer[s].n_keep; k++) {
            const moec_mlp *x = &moec_set_layer(m, s)->expert[p->layer[s].keep[k]], *y = &moec_set_layer(o, s)->expert[k];
            const moec_weight *w[3][2] = {{&x->gate, &y->gate}, {&x->up, &y->up}, {&x->down, &y->down}};
            for (int i = 0; i < 3; i++)
                for (int64_t r = 0; r < w[i][0]->rows; r++) {
                    const int64_t n = w[i][0]->cols;
                    assert_int_equal(w[i][1]->storage, MOEC_PLAIN);
                    assert_int_equal(w[i][1]->of->dtype, MOEC_BF16);
                    moec_weight_read(a, n, w[i][0], r, 1, 0, n);
                    moec_weight_read(b, n, w[i][1], r, 1, 0, n);
                    for (int64_t c = 0; c < n; c++)
                        assert_true(as_bf16(a[c]) == b[c]);
                }
        }
}

static void test_fp8(void **state)
{
    (void)state;
    make_fp8();
    moec_model *m = forms_open_dir(forms_source);
    moec_plan *p = plan_keeping(m, 5);
    assert_int_equal(m->layer[0].expert[0].gate.storage, MOEC_FP8);
    keep_these(p);
    moec_model *o = forms_apply(m, p);
    forms_same_experts(m, o, p);
    const moec_json *names = moec_json_path(moec_ckpt_config(o->ckpt), "quantization_config.modules_to_not_convert");
    assert_int_equal(moec_json_len(names), 3); /* expert 1 is gone, 6 is now 4 */
    assert_string_equal(moec_json_string(moec_json_at(names, 1)), "model.layers.0.block_sparse_moe.experts.4.w2");
    assert_string_equal(moec_json_string(moec_json_at(names, 2)), "model.layers.1.block_sparse_moe.experts.4");
    moec_model_close(o);
    p->pad = 8;
    o = forms_apply(m, p);
    forms_same_experts(m, o, p);
    forms_check_dead(o, p);
    assert_true(forms_value(o->layer[0].expert[7].down.scale, 0) == 1.0f);
    moec_model_close(o);
    p->pad = 0;
    p->dtype = MOEC_BF16;
    o = forms_apply(m, p);
    check_rounded(m, o, p);
    assert_null(moec_json_get(moec_ckpt_config(o->ckpt), "quantization_config"));
    for (size_t i = 0; i < moec_ckpt_count(o->ckpt); i++)
        assert_null(strstr(moec_ckpt_at(o->ckpt, i)->name, "_scale_inv"));
    moec_model_close(o);
    moec_plan_free(p);
    moec_model_close(m);
}

static void make_mxfp4(void)
{
    forms_write_tiny("gpt_oss", 64, MOEC_BF16);
    forms_pool *x = forms_pool_of(NULL), *y;
    size_t n = x->n;
    assert_int_equal(MOEC_NEW(y, 1, NULL), MOEC_OK);
    uint32_t noise = 9;
    for (size_t i = 0; i < n; i++) {
        const moec_st_entry *e = &x->entry[i];
        if (!strstr(e->name, ".experts.") || strstr(e->name, "_bias")) {
            forms_pool_add(y, e->name, e->dtype, e->rank, e->dim, x->data[i]);
        } else { /* [E, in, out] becomes [E, out, in/32, 16] */
            const int64_t dim[4] = {e->dim[0], e->dim[2], e->dim[1] / 32, 16};
            const int64_t values = dim[0] * dim[1] * dim[2] * 16;
            unsigned char *bytes;
            char name[256];
            assert_int_equal(MOEC_NEW(bytes, (size_t)values, NULL), MOEC_OK);
            for (int64_t v = 0; v < values; v++) {
                noise = noise * 1664525u + 1013904223u;
                bytes[v] = (unsigned char)(noise >> 24);
            }
            snprintf(name, sizeof name, "%s_blocks", e->name);
            forms_pool_add(y, name, MOEC_U8, 4, dim, bytes);
            for (int64_t v = 0; v < values / 16; v++)
                bytes[v] = (unsigned char)(120 + bytes[v] % 12);
            snprintf(name, sizeof name, "%s_scales", e->name);
            forms_pool_add(y, name, MOEC_U8, 3, dim, bytes);
            moec_free(bytes);
        }
        moec_free(x->entry[i].name);
        moec_free(x->data[i]);
    }
    y->config = x->config;
    moec_free(x);
    forms_pool_key(y, "\"quantization_config\": {\"quant_method\": \"mxfp4\", \"modules_to_not_convert\": [\"lm_head\"]},\n"
                "\"experts_per_token\": 2");
    forms_pool_write(y);
}

static void test_mxfp4(void **state)
{
    (void)state;
    make_mxfp4();
    moec_model *m = forms_open_dir(forms_source);
    moec_plan *p = plan_keeping(m, 5);
    assert_int_equal(m->layer[0].expert[0].gate.storage, MOEC_MXFP4);
    keep_these(p);
    p->pad = 6;
    moec_model *o = forms_apply(m, p);
    forms_same_experts(m, o, p);
    forms_check_dead(o, p);
    assert_int_equal(((const unsigned char *)o->layer[0].expert[5].gate.scale->data)[5 * 128 * 2], 127);
    moec_model_close(o);
    p->dtype = MOEC_BF16;
    o = forms_apply(m, p);
    check_rounded(m, o, p);
    forms_check_dead(o, p);
    assert_int_equal(o->layer[0].layout, MOEC_LAYOUT_IN_OUT_PAIRS);
    moec_model_close(o);
    moec_plan_free(p);
    p = plan_keeping(m, 1); /* top-k falls with it, under both of its names */
    o = forms_apply(m, p);
    assert_int_equal(forms_config_int(o, "num_experts_per_tok"), 1);
    assert_int_equal(forms_config_int(o, "experts_per_token"), 1);
    moec_model_close(o);
    moec_plan_free(p);
    moec_model_close(m);
}

/* Every allocation fails once while FP8 is cast and padded: a status comes back, nothing leaks (run under ASan). */
static void test_out_of_memory(void **state)
{
    (void)state;
    make_fp8();
    moec_model *m = forms_open_dir(forms_source);
    moec_plan *p = plan_keeping(m, 5);
    p->pad = 6;
    p->dtype = MOEC_F32;
    for (long k = 0;; k += 1 + k / 40) {
        moec_apply_result r;
        moec_err err = {MOEC_OK, ""};
        const moec_apply_options opt = {.out = forms_out, .resume = true};
        moec_test_allocs_left = k;
        moec_status st = moec_apply(&r, m, p, &opt, &err);
        moec_test_allocs_left = 0x7fffffffL;
        if (st == MOEC_OK)
            break;
        if (st != MOEC_ENOMEM)
            fail_msg("allocation %ld: code %d, %s", k, (int)st, err.text);
        assert_false(moec_path_exists(forms_out));
    }
    moec_plan_free(p);
    moec_model_close(m);
}

/* A byte of a dead expert and one of a cast value: verify names both. */
static void test_damage(void **state)
{
    (void)state;
    static const char *const names[] = {"model.layers.1.mlp.router.bias", "model.layers.0.mlp.experts.down_proj"};
    static const char *const says[] = {"a dead expert has", "the source (model.layers.0.mlp.experts.down_proj_blocks) has"};
    make_mxfp4();
    moec_model *m = forms_open_dir(forms_source);
    moec_plan *p = plan_keeping(m, 5);
    p->pad = 6;
    p->dtype = MOEC_F16;
    for (size_t i = 0; i < MOEC_COUNT(names); i++) {
        moec_model *o = forms_apply(m, p);
        moec_verify_report *r;
        const moec_tensor *t = moec_ckpt_find(o->ckpt, names[i]);
        const size_t k = (size_t)(t - moec_ckpt_at(o->ckpt, 0)), at = (size_t)moec_ckpt_offset(o->ckpt, k) + (i == 0 ? t->bytes - 1 : 9);
        char *bytes, *path = tiny_path(forms_out, moec_ckpt_shard_name(o->ckpt, moec_ckpt_shard_of(o->ckpt, k)));
        size_t len;
        moec_model_close(o);
        assert_int_equal(moec_file_read(&bytes, &len, path, 1 << 30, NULL), MOEC_OK);
        bytes[at] ^= 1;
        assert_int_equal(moec_file_write(path, bytes, len, NULL), MOEC_OK);
        const moec_verify_options check = {.source = m, .data = true};
        assert_int_equal(moec_verify(&r, forms_out, &check, NULL), MOEC_OK);
        assert_true(r->problems >= 2);
        if (!strstr(r->problem[0], says[i]) && !strstr(r->problem[1], says[i]) && !strstr(r->problem[2], says[i]))
            fail_msg("%s; %s", r->problem[0], r->problem[1]);
        moec_verify_free(r);
        moec_free(bytes);
        moec_free(path);
    }
    moec_plan_free(p);
    moec_model_close(m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_fp8), cmocka_unit_test(test_mxfp4), cmocka_unit_test(test_out_of_memory),
        cmocka_unit_test(test_damage),
    };
    return cmocka_run_group_tests(tests, forms_set_up, forms_tear_down);
}
