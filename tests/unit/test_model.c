/* Binding a checkpoint to a family: what is refused and how it is said, config spellings, sizes, names, rotary tables. */
#include "base/file.h"
#include "base/mem.h"
#include "ckpt/safetensors.h"
#include "model/model.h"
#include "tiny.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void must(moec_status st, const moec_err *err)
{
    if (st != MOEC_OK)
        print_error("%s\n", err->text);
    assert_int_equal(st, MOEC_OK);
}

/* A tiny model in a folder of its own, to be damaged. */
static char *made(const tiny_spec *spec)
{
    moec_err err = {MOEC_OK, ""};
    char *dir = tiny_folder();
    must(tiny_write(dir, spec, &err), &err);
    return dir;
}

static void unmake(char *dir)
{
    tiny_remove(dir);
    moec_free(dir);
}

static char *read_file(const char *dir, const char *name, size_t *n)
{
    moec_err err = {MOEC_OK, ""};
    char *path = tiny_path(dir, name), *bytes;
    must(moec_file_read(&bytes, n, path, (size_t)1 << 30, &err), &err);
    moec_free(path);
    return bytes;
}

static void write_file(const char *dir, const char *name, const void *bytes, size_t n)
{
    moec_err err = {MOEC_OK, ""};
    char *path = tiny_path(dir, name);
    must(moec_file_write(path, bytes, n, &err), &err);
    moec_free(path);
}

/* Sets a key of config.json to JSON text; NULL drops it. */
static void set_config(const char *dir, const char *key, const char *json)
{
    moec_err err = {MOEC_OK, ""};
    size_t n;
    moec_json *o, *value = NULL;
    char *text = read_file(dir, "config.json", &n), *word = NULL, *at;
    must(moec_json_parse(&o, text, n, "config.json", &err), &err);
    moec_free(text);
    if (json) {
        must(moec_json_parse(&value, json, strlen(json), "value", &err), &err);
        moec_json_set(o, key, value);
    } else {
        must(moec_format(&word, NULL, "\"%s\"", key), &err);
    }
    must(moec_json_dump(&text, o, 2, &err), &err);
    if (word && (at = strstr(text, word)) != NULL)
        at[1] = '_'; /* another key now, which nobody reads */
    write_file(dir, "config.json", text, strlen(text));
    moec_free(word);
    moec_free(text);
    moec_json_free(o);
}

typedef struct change {
    const char *name, *rename; /* tensor whose name ends so; its new whole name, "" to drop it, NULL to keep it */
    int64_t d0, d1;            /* new shape; 0: as it was */
    moec_dtype dtype;          /* new dtype, F64: as it was */
} change;

/* Writes the header anew with one tensor changed, and zeros as data. */
static void change_tensor(const char *dir, const change *c)
{
    moec_err err = {MOEC_OK, ""};
    moec_st_index ix = {0};
    size_t n, len, kept = 0, tail = strlen(c->name);
    uint64_t at = 0;
    bool found = false;
    char *bytes = read_file(dir, "model.safetensors", &n), *head, *data, *own = NULL;
    must(moec_st_parse(&ix, bytes, n, n, "model.safetensors", &err), &err);
    for (size_t i = 0; i < ix.n; i++) {
        moec_st_entry *e = &ix.entry[i];
        size_t l = strlen(e->name);
        if (!found && l >= tail && strcmp(e->name + l - tail, c->name) == 0) {
            found = true;
            if (c->rename && !*c->rename) {
                moec_free(e->name);
                continue;
            }
            if (c->rename) {
                must(moec_copy(&own, c->rename, strlen(c->rename), &err), &err);
                moec_free(e->name);
                e->name = own;
            }
            e->dim[0] = c->d0 ? c->d0 : e->dim[0];
            e->dim[1] = c->d1 ? c->d1 : e->dim[1];
            e->dtype = c->dtype != MOEC_F64 ? c->dtype : e->dtype;
        }
        uint64_t values = 1;
        for (int r = 0; r < e->rank; r++)
            values *= (uint64_t)e->dim[r];
        e->begin = at;
        e->end = at += values * (uint64_t)moec_dtypes[e->dtype].bytes;
        ix.entry[kept++] = *e;
    }
    ix.n = kept;
    assert_true(found);
    must(moec_st_header(&head, &len, ix.entry, kept, NULL, &err), &err);
    must(MOEC_NEW(data, len + at, &err), &err);
    memcpy(data, head, len);
    write_file(dir, "model.safetensors", data, len + at);
    moec_free(data);
    moec_free(head);
    moec_st_index_release(&ix);
    moec_free(bytes);
}

static void refused(char *dir, moec_status want, const char *text)
{
    moec_err err = {MOEC_OK, ""};
    moec_model *m = NULL;
    assert_int_equal(moec_model_open(&m, dir, &err), want);
    assert_null(m);
    if (!strstr(err.text, text))
        print_error("\"%s\" does not say \"%s\"\n", err.text, text);
    assert_non_null(strstr(err.text, text));
    unmake(dir);
}

static moec_model *opened(const char *dir)
{
    moec_err err = {MOEC_OK, ""};
    moec_model *m;
    must(moec_model_open(&m, dir, &err), &err);
    return m;
}

/* ---- refusals ------------------------------------------------------------------------------------------------------ */

static void tensors_that_do_not_fit_are_named(void **state)
{
    static const struct {
        change c;
        const char *text;
    } cases[] = {
        {{"layers.1.mlp.gate.weight", "", 0, 0, MOEC_F64}, "tensor model.layers.1.mlp.gate.weight is missing"},
        {{"layers.2.mlp.experts.7.up_proj.weight", "", 0, 0, MOEC_F64}, "experts.7.up_proj.weight is missing"},
        {{"embed_tokens.weight", "model.other.weight", 0, 0, MOEC_F64}, "tensor model.embed_tokens.weight is missing"},
        {{"layers.0.self_attn.k_norm.weight", "", 0, 0, MOEC_F64}, "q_norm.weight is there, its counterpart for keys is missing"},
        {{"layers.1.self_attn.k_norm.weight", "", 0, 0, MOEC_F64},
         "0.self_attn.k_norm.weight is there, but layer 1, which is of the same kind, has no such tensor"},
        {{"layers.0.mlp.gate.weight", NULL, 9, 0, MOEC_F64}, "gate.weight is [9, 16], expected [8, 16]"},
        {{"layers.1.self_attn.k_proj.weight", NULL, 16, 17, MOEC_F64}, "k_proj.weight is [16, 17], expected [16, 16]"},
        {{"layers.1.mlp.experts.3.down_proj.weight", NULL, 12, 16, MOEC_F64}, "down_proj.weight is [12, 16], expected [16, 12]"},
        {{"layers.0.input_layernorm.weight", NULL, 15, 0, MOEC_F64}, "input_layernorm.weight is [15], expected [16]"},
        {{"layers.1.mlp.experts.3.down_proj.weight", NULL, 0, 0, MOEC_I32}, "is I32, expected F32, F16 or BF16"},
        {{"layers.2.self_attn.q_proj.weight", NULL, 0, 0, MOEC_F8_E4M3}, "q_proj.weight_scale_inv are missing"},
        {{"model.norm.weight", "model.layers.1.mlp.experts.8.gate_proj.weight", 0, 0, MOEC_F64}, "norm.weight is missing"},
        {{"layers.0.mlp.gate.weight", NULL, 0, 0, MOEC_F8_E4M3}, "gate.weight is F8_E4M3, expected F32, F16 or BF16"},
    };
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(cases); i++) {
        char *dir = made(&(tiny_spec){.seed = 1});
        change_tensor(dir, &cases[i].c);
        refused(dir, MOEC_ESHAPE, cases[i].text);
    }
}

static void one_expert_too_many_is_noticed(void **state)
{
    char *dir = made(&(tiny_spec){.seed = 1, .untied = true});
    (void)state;
    set_config(dir, "tie_word_embeddings", "true"); /* the head's tensor is spare now */
    change_tensor(dir, &(change){.name = "lm_head.weight", .rename = "model.layers.1.mlp.experts.8.gate_proj.weight"});
    refused(dir, MOEC_ESHAPE, "experts.8.gate_proj.weight is there, but config.json counts 8 experts");
}

/* What no role is bound to would be left out of the sums in silence, and whole experts would stay when others go. */
static void contradictions_are_noticed(void **state)
{
    static const struct {
        const char *family, *key, *json;
        change c;
        const char *text;
    } cases[] = {
        {"qwen3_moe", "num_hidden_layers", "2", {0}, "model.layers.2.post_attention_layernorm.weight is there, but config.json counts 2 "
                                                     "layers"},
        {"flex_olmo", "num_hidden_layers", "1", {0}, "config.json counts 1 layers"},
        {"dbrx", "n_layers", "1", {0}, "config.json counts 1 layers"},
        {"deepseek_v3", "n_shared_experts", "0", {0}, "by config.json n_shared_experts is 0"},
        {"glm4_moe", NULL, NULL, {.name = "layers.0.self_attn.k_proj.bias", .rename = "spare"}, "k_proj.bias is there, but layer 0"},
        {"qwen3_moe", NULL, NULL, {.name = "layers.1.self_attn.k_norm.weight", .d0 = 16}, "one is by head"},
        {"qwen3_next", NULL, NULL, {.name = "in_proj_qkvz.weight", .rename = "spare"}, "in_proj_qkvz.weight is missing"},
        {"phimoe", NULL, NULL, {.name = "model.norm.bias", .rename = "spare"}, "model.norm.bias is missing"},
        {"phimoe", NULL, NULL, {.name = "lm_head.bias", .rename = "spare"}, "lm_head_bias is true"},
        {"qwen3_moe", "tie_word_embeddings", "true", {.name = "lm_head.weight",
         .rename = "model.layers.1.mlp.experts.99.up_proj.weight"}, "has no such tensor beside its others"},
        {"qwen3_moe", "tie_word_embeddings", "true", {.name = "lm_head.weight",
         .rename = "model.layers.1.mlp.experts.gate_up_proj"}, "has no such tensor beside its others"},
        {"qwen2_moe", "tie_word_embeddings", "true", {.name = "lm_head.weight",
         .rename = "model.layers.1.mlp.shared_expert_gate.bias"}, "has no such bias beside its others"},
        {"deepseek_v3", "tie_word_embeddings", "true", {.name = "lm_head.weight",
         .rename = "model.layers.1.self_attn.o_proj.weight_scale_inv"}, "has no such tensor beside its others"},
    };
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(cases); i++) {
        tiny_spec spec = tiny_of(cases[i].family);
        spec.untied = true;
        char *dir = made(&spec);
        if (cases[i].key)
            set_config(dir, cases[i].key, cases[i].json);
        if (cases[i].c.name)
            change_tensor(dir, &cases[i].c);
        refused(dir, MOEC_ESHAPE, cases[i].text);
    }
}

/* A prediction layer has a router and experts, and is counted: else it may be a layer that the config forgot. */
static void prediction_layers_are_whole_and_counted(void **state)
{
    const tiny_spec spec = tiny_of("deepseek_v3");
    char *dir = made(&spec);
    (void)state;
    set_config(dir, "num_hidden_layers", "2");
    set_config(dir, "num_nextn_predict_layers", "0");
    refused(dir, MOEC_ESHAPE, "is there, but config.json counts 2 layers and 0 of multi-token prediction");
    dir = made(&spec);
    set_config(dir, "num_hidden_layers", "2");
    set_config(dir, "num_nextn_predict_layers", "1");
    change_tensor(dir, &(change){.name = "layers.2.mlp.gate.weight", .rename = "spare"});
    refused(dir, MOEC_ESHAPE, "layers.2.mlp.gate.weight is missing");
}

static void a_list_of_equal_numbers_is_a_number(void **state)
{
    const tiny_spec spec = tiny_of("mixtral");
    char *dir = made(&spec);
    (void)state;
    set_config(dir, "sliding_window", "[5, 5, 5]");
    moec_model *m = opened(dir);
    assert_int_equal(m->layer[0].window, 5);
    moec_model_close(m);
    unmake(dir);
}

static void configs_that_make_no_sense_are_refused(void **state)
{
    static const struct {
        const char *key, *json, *text;
    } cases[] = {
        {"model_type", "\"gpt17\"", "model_type gpt17 is no Mixture-of-Experts family that is read; `moecompress families`"},
        {"model_type", "\"qwen3_moee\"", "that is read; did you mean qwen3_moe;"},
        {"model_type", NULL, "model_type is missing"},
        {"num_experts_per_tok", "9", "num_experts_per_tok is 9, more than the 8 experts"},
        {"num_experts_per_tok", "0", "num_experts_per_tok is 0, expected 1 to"},
        {"num_experts", "\"eight\"", "num_experts is not a whole number"},
        {"num_experts", "2.5", "num_experts is not a whole number"},
        {"num_hidden_layers", NULL, "num_hidden_layers is missing"},
        {"num_hidden_layers", "-3", "num_hidden_layers is -3"},
        {"hidden_size", "99999999", "hidden_size is 99999999"},
        {"num_key_value_heads", "3", "no multiple of num_key_value_heads"},
        {"hidden_act", "\"gelu\"", "hidden_act is gelu, expected silu"},
        {"quantization_config", "{\"quant_method\": \"awq\"}", "quantized by AWQ, which is not read; use the unquantized release"},
        {"quantization_config", "{\"quant_method\": \"gptq\", \"checkpoint_format\": \"marlin\"}", "checkpoint_format marlin is not read"},
        {"quantization_config", "{\"quant_method\": \"auto-round\"}", "packing_format is missing and is not read"},
        {"quantization_config", "{\"quant_method\": \"auto-round\", \"packing_format\": \"auto_round:auto_awq\"}",
         "packing_format auto_round:auto_awq is not read"},
        {"quantization_config", "{\"quant_method\": \"compressed-tensors\", \"format\": \"int-quantized\"}",
         "format int-quantized is not read"},
        {"rms_norm_eps", "-1", "rms_norm_eps is -1"},
        {"quantization_config", "{\"quant_method\": \"bitsandbytes\"}", "quantized by bitsandbytes"},
        {"quantization_config", "{\"quant_method\": \"mine\"}", "quant_method mine is not read"},
        {"quantization_config", "{\"quant_method\": \"fp8\"}", "weight_block_size is not two numbers"},
        {"num_hash_layers", "2", "hash-routed"},
        {"num_hash_layers", "\"2\"", "num_hash_layers is not a whole number"},
        {"scoring_func", "\"sigmoid\"", "scoring_func is sigmoid, which is not how qwen3_moe routes"},
        {"text_config", "\"x\"", "text_config is not an object"},
        {"attn_config", "[1]", "attn_config is not an object"},
        {"layer_types", "[\"full_attention\", \"chunked_attention\", \"full_attention\"]",
         "layer_types: layer 1 is chunked_attention, which is not known for qwen3_moe"},
        {"mlp_layer_types", "[\"dense\", \"sparse\", \"moe\"]", "mlp_layer_types: layer 2 is moe"},
        {"num_experts", "[8, 8, 6]", "num_experts differs between layers (entry 2)"},
        {"num_experts", "[]", "neither a whole number nor a list"},
        {"rope_scaling", "{\"type\": \"spiral\", \"factor\": 2}", "rope type spiral is not known"},
        {"rope_scaling", "{\"type\": \"linear\", \"factor\": -2}", "out of range"},
        {"rope_theta", "0", "out of range"},
        {"mlp_only_layers", "[0, 1, 2]", "layer 0 has no router by config.json"},
        {"mlp_only_layers", "3", "mlp_only_layers is not a list"},
        {"mlp_only_layers", "[0, \"1\"]", "mlp_only_layers holds something that is not a whole number"},
        {"decoder_sparse_step", "\"1\"", "decoder_sparse_step is not a whole number"},
        {"decoder_sparse_step", "0", "decoder_sparse_step is 0, expected 1 to"},
        {"norm_topk_prob", "1", "norm_topk_prob is neither true nor false"},
        {"tie_word_embeddings", "\"yes\"", "tie_word_embeddings is neither true nor false"},
        {"use_sliding_window", "0", "use_sliding_window is neither true nor false"},
        {"sliding_window", "\"4096\"", "sliding_window is not a whole number"},
        {"hidden_act", "7", "hidden_act is not a text"},
        {"quantization_config", "\"gptq\"", "quantization_config has no quant_method"},
        {"rms_norm_eps", "\"1e-6\"", "rms_norm_eps is not a number"},
        {"rope_theta", "\"1e6\"", "rope: rope_theta is not a number"},
        {"rope_scaling", "\"linear\"", "rope_scaling is not an object"},
        {"rope_scaling", "{\"rope_type\": 3}", "rope type is not a text"},
        {"rope_scaling", "{\"rope_type\": \"yarn\", \"factor\": \"4\"}", "rope: factor is not a number"},
        {"rope_scaling", "{\"rope_type\": \"yarn\", \"factor\": 4, \"truncate\": 1}", "truncate is neither true nor false"},
        {"max_position_embeddings", "2048.5", "max_position_embeddings is not a whole number"},
        {"head_dim", "65536", "expected at most"},
    };
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(cases); i++) {
        char *dir = made(&(tiny_spec){.seed = 1});
        set_config(dir, cases[i].key, cases[i].json);
        refused(dir, strstr(cases[i].text, "has no router by") ? MOEC_ESHAPE : MOEC_EFORMAT,
                cases[i].text);
    }
    refused(made(&(tiny_spec){.layers = 1, .dense_layer = 1}), MOEC_EFORMAT, "no layer has a router");
    char *dir = made(&(tiny_spec){.dense_layer = 2}); /* a width of 0 would match tensors without values */
    set_config(dir, "intermediate_size", "null");
    refused(dir, MOEC_EFORMAT, "intermediate_size is missing");
}

/* Keys that only one family has, with the class's default where it is left out. */
static void keys_of_a_family_are_read_as_its_class_does(void **state)
{
    static const struct {
        const char *family, *key, *json, *text; /* text: of the refusal */
    } bad[] = {
        {"deepseek_v2", "topk_method", "\"noaux_tc\"", "topk_method is noaux_tc, expected greedy or group_limited_greedy"},
        {"jetmoe", "kv_channels", NULL, "expected [512, 32]"}, /* keys and values of two heads of 128 values */
    };
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(bad); i++) {
        const tiny_spec spec = tiny_of(bad[i].family);
        char *dir = made(&spec);
        set_config(dir, bad[i].key, bad[i].json);
        if (strcmp(bad[i].family, "jetmoe") == 0)
            set_config(dir, "head_dim", NULL);
        refused(dir, bad[i].json ? MOEC_EFORMAT : MOEC_ESHAPE, bad[i].text);
    }
    char *dir = made(&(tiny_spec){.seed = 1}); /* qwen3_moe */
    set_config(dir, "use_sliding_window", "true");
    moec_model *m = opened(dir);
    assert_int_equal(m->layer[0].window, 4096);
    moec_model_close(m);
    unmake(dir);
}

/* Its releases say "LLLG" beside layer_types; without these the pattern has to be a number. */
static void a_pattern_of_layers_may_be_a_text_beside_their_types(void **state)
{
    const tiny_spec spec = tiny_of("exaone_moe");
    char *dir = made(&spec);
    (void)state;
    set_config(dir, "sliding_window_pattern", "\"LLLG\"");
    set_config(dir, "rope_theta", NULL);
    moec_model *m = opened(dir);
    assert_int_equal(m->layer[0].window, 8);
    assert_int_equal(m->layer[1].window, 0);
    assert_true(m->dims.rope.theta == 10000.0);
    moec_model_close(m);
    set_config(dir, "layer_types", NULL);
    refused(dir, MOEC_EFORMAT, "sliding_window_pattern is not a whole number");
}

/* ERNIE's has no experts: it is known by its names and copied. */
static void a_dense_prediction_layer_is_known_by_its_names(void **state)
{
    const tiny_spec spec = tiny_of("ernie4_5_moe");
    moec_err err = {MOEC_OK, ""};
    moec_place *place;
    char *dir = made(&spec);
    size_t marked = 0;
    (void)state;
    set_config(dir, "tie_word_embeddings", "true"); /* the head's tensor is spare now */
    change_tensor(dir, &(change){.name = "lm_head.weight", .rename = "model.mtp_block.0.mlp.gate_proj.weight"});
    moec_model *m = opened(dir);
    assert_int_equal(m->mtp_layers, 0);
    must(moec_model_places(&place, m, &err), &err);
    for (size_t i = 0; i < moec_ckpt_count(m->ckpt); i++)
        marked += place[i].mtp;
    assert_int_equal(marked, 1);
    moec_free(place);
    moec_model_close(m);
    unmake(dir);
}

/* The list is searched for each layer: millions of elements must be an error, not a long time. */
/* MoE++: what its config says of the experts must be true of the tensors, and its code can do no more than this. */
static void carried_logits_need_their_parts(void **state)
{
    static const struct {
        const char *key, *json;
        change c; /* name NULL: the tensors are as they should be */
        moec_status want;
        const char *text;
    } bad[] = {
        {.key = "num_experts", .json = "[12, 12, 10]", .want = MOEC_EFORMAT,
         .text = "num_experts differs between layers (entry 2)"},
        {.key = "num_experts", .json = "[]", .want = MOEC_EFORMAT,
         .text = "num_experts is neither a whole number nor a list"},
        {.key = "num_experts", .json = "[4]", .want = MOEC_EFORMAT,
         .text = "num_experts is 4, expected 5 to 65535"},
        {.key = "num_experts", .json = "[11]", .want = MOEC_ESHAPE,
         .text = "wg.2.weight is [12, 96], expected [11, 96]"},
        {.key = "moe_expert_interval", .json = "2", .want = MOEC_EFORMAT,
         .text = "moe_expert_interval is 2, expected 1 to 1"},
        {.key = "moe_2layer_gate", .json = "false", .want = MOEC_ESHAPE,
         .text = "wg.0.weight is there, but by config.json moe_2layer_gate is false"},
        {.key = "moe_gate_norm_std", .json = "0", .want = MOEC_EFORMAT,
         .text = "moe_gate_norm_std is 0, expected"},
        {.c = {"1.mlp.moe.gate.wg.0.weight", "", 0, 0, MOEC_F64}, .want = MOEC_ESHAPE,
         .text = "layers.1.mlp.moe.gate.wg.0.weight is missing"},
        {.c = {"2.mlp.moe.gate.gate_map.weight", "", 0, 0, MOEC_F64}, .want = MOEC_ESHAPE,
         .text = "gate_map.weight is missing"},
        {.c = {"0.mlp.moe.gate.gate_map.weight", NULL, 12, 8, MOEC_F64}, .want = MOEC_ESHAPE,
         .text = "is [12, 8], expected [12, 12]"},
        {.c = {"experts.experts.9.constant", "", 0, 0, MOEC_F64}, .want = MOEC_ESHAPE,
         .text = "experts.9.constant is missing"},
        {.c = {"experts.experts.8.wg.weight", NULL, 3, 0, MOEC_F64}, .want = MOEC_ESHAPE,
         .text = "expected [2, 32]"},
        {.c = {"experts.experts.7.up_proj.weight", "", 0, 0, MOEC_F64}, .want = MOEC_ESHAPE,
         .text = "experts.7.up_proj.weight is missing"},
        {.c = {"experts.experts.7.up_proj.weight", NULL, 12, 0, MOEC_F64}, .want = MOEC_ESHAPE,
         .text = "is [12, 32], expected [32, 32]"},
    };
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(bad); i++) {
        const tiny_spec spec = tiny_of("MoE++");
        char *dir = made(&spec);
        if (bad[i].key)
            set_config(dir, bad[i].key, bad[i].json);
        if (bad[i].key && strcmp(bad[i].key, "moe_gate_norm_std") == 0)
            set_config(dir, "moe_use_logits_norm", "true");
        if (bad[i].c.name)
            change_tensor(dir, &bad[i].c);
        refused(dir, bad[i].want, bad[i].text);
    }
}

static void endless_lists_are_refused(void **state)
{
    enum { N = 1000000 };
    char *dir = made(&(tiny_spec){.seed = 1}), *list = malloc(2 * N + 2);
    (void)state;
    assert_non_null(list);
    for (size_t i = 0; i < N; i++)
        memcpy(list + 2 * i, i ? ",9" : "[9", 2);
    memcpy(list + 2 * N, "]", 2);
    set_config(dir, "mlp_only_layers", list);
    free(list);
    refused(dir, MOEC_EFORMAT, "mlp_only_layers has 1000000 elements");
}

/* ---- what is bound ------------------------------------------------------------------------------------------------- */

static void heads_are_tied_or_their_own(void **state)
{
    (void)state;
    for (int untied = 0; untied < 2; untied++) {
        char *dir = made(&(tiny_spec){.untied = untied == 1, .seed = 5});
        moec_model *m = opened(dir);
        assert_int_equal(m->dims.tied, !untied);
        assert_true((m->head.of == m->embedding.of) == !untied);
        moec_model_close(m);
        if (!untied) {
            set_config(dir, "tie_word_embeddings", "false");
            refused(dir, MOEC_ESHAPE, "tensor lm_head.weight is missing");
        } else {
            unmake(dir);
        }
    }
}

static void both_config_dialects_are_read(void **state)
{
    const struct {
        tiny_spec spec;
        const char *drop, *set, *experts;
    } cases[] = {
        {{.seed = 1}, NULL, NULL, "num_experts"},
        {{.seed = 1}, "num_experts", "num_local_experts", "num_local_experts"},
        {{.seed = 1, .both_keys = true}, NULL, NULL, "num_experts"},
        {{.seed = 1, .family = "mixtral"}, NULL, NULL, "num_local_experts"},
        {{.seed = 1, .family = "mixtral", .no_keys = true}, NULL, NULL, NULL},
    };
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(cases); i++) {
        char *dir = made(&cases[i].spec);
        if (cases[i].drop)
            set_config(dir, cases[i].drop, NULL);
        if (cases[i].set)
            set_config(dir, cases[i].set, "8");
        moec_model *m = opened(dir);
        assert_int_equal(m->dims.experts, 8);
        assert_int_equal(m->dims.top_k, 2);
        if (cases[i].experts)
            assert_string_equal(m->key_experts, cases[i].experts);
        else
            assert_null(m->key_experts);
        moec_model_close(m);
        unmake(dir);
    }
}

static void dense_layers_follow_the_config(void **state)
{
    char *dir = made(&(tiny_spec){.dense_layer = 2, .seed = 9});
    moec_model *m = opened(dir);
    (void)state;
    assert_int_equal(m->moe_layers, 2);
    assert_null(m->layer[1].mat[MOEC_MAT_ROUTER].of);
    assert_null(m->layer[1].expert);
    assert_non_null(m->layer[1].mat[MOEC_MAT_DENSE_GATE].of);
    assert_int_equal(m->layer[0].moe_index, 0);
    assert_int_equal(m->layer[1].moe_index, -1);
    assert_int_equal(m->layer[2].moe_index, 1);
    moec_model_close(m);
    unmake(dir);
}

static void sizes_add_up(void **state)
{
    moec_err err = {MOEC_OK, ""};
    moec_sizes s;
    (void)state;
    for (int untied = 0; untied < 2; untied++) {
        char *dir = made(&(tiny_spec){.untied = untied == 1, .dtype = MOEC_BF16});
        moec_model *m = opened(dir);
        uint64_t expert = 3 * 16 * 12, routed = 3 * 8 * expert, embed = 64 * 16;
        uint64_t attention = 16 * (32 + 16 + 16 + 32) + 8 + 8 + 16 + 16, rest = 3 * (attention + 8 * 16) + 16 + embed;
        must(moec_model_sizes(&s, m, &err), &err);
        assert_int_equal(s.routed, routed);
        assert_int_equal(s.total, routed + rest + (untied ? embed : 0));
        assert_int_equal(s.active, 3 * 2 * expert + rest);
        assert_int_equal(s.bytes, 2 * s.total);
        assert_int_equal(s.routed_bytes, 2 * routed);
        moec_model_close(m);
        unmake(dir);
    }
}

static void experts_are_renamed_by_role(void **state)
{
    static const struct {
        const char *family, *from, *to;
    } cases[] = {
        {"qwen3_moe", "model.layers.2.mlp.experts.7.up_proj.weight", "model.layers.2.mlp.experts.0.up_proj.weight"},
        {"mixtral", "model.layers.2.block_sparse_moe.experts.7.w2.weight", "model.layers.2.block_sparse_moe.experts.0.w2.weight"},
    };
    moec_err err = {MOEC_OK, ""};
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(cases); i++) {
        char *dir = made(&(tiny_spec){.family = cases[i].family, .seed = 3}), *name;
        moec_model *m = opened(dir);
        moec_place *all;
        must(moec_model_places(&all, m, &err), &err);
        const moec_tensor *t = moec_ckpt_find(m->ckpt, cases[i].from), *first = moec_ckpt_at(m->ckpt, 0);
        assert_non_null(t);
        moec_place at = all[t - first];
        assert_int_equal(at.role, MOEC_ROLE_EXPERT);
        assert_int_equal(m->set[at.set].layer, 2);
        assert_int_equal(at.expert, 7);
        assert_int_equal(all[m->layer[1].mat[MOEC_MAT_ROUTER].of - first].role, MOEC_ROLE_STACK);
        assert_false(all[m->layer[1].mat[MOEC_MAT_ROUTER].of - first].weights);
        assert_int_equal(all[m->embedding.of - first].role, MOEC_ROLE_OTHER);
        must(moec_model_rename_expert(&name, t, at, 0, &err), &err);
        assert_string_equal(name, cases[i].to);
        moec_free(name);
        assert_int_equal(moec_model_rename_expert(&name, m->embedding.of, all[m->embedding.of - first], 0, &err), MOEC_EINVAL);
        moec_free(all);
        moec_model_close(m);
        unmake(dir);
    }
}

/* ---- rotary tables ------------------------------------------------------------------------------------------------- */

static moec_rope rope(const char *config, int64_t width)
{
    moec_err err = {MOEC_OK, ""};
    moec_json *o;
    moec_rope r;
    must(moec_json_parse(&o, config, strlen(config), "config", &err), &err);
    must(moec_rope_read(&r, o, width, 0, 10000.0, &err), &err);
    moec_json_free(o);
    return r;
}

static void near(double got, double want)
{
    if (fabs(got - want) > 1e-12 * fabs(want)) {
        print_error("%.17g, expected %.17g\n", got, want);
        fail();
    }
}

static void plain_tables(void **state)
{
    static const char *const same[] = {"{}", "{\"rope_theta\": 10000}", "{\"rope_scaling\": null, \"rope_theta\": 10000.0}",
                                       "{\"rope_parameters\": {\"rope_type\": \"default\", \"rope_theta\": 10000}}"};
    double f[8], scale;
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(same); i++) {
        moec_rope r = rope(same[i], 16);
        moec_rope_table(f, &scale, &r, 100);
        near(scale, 1.0);
        for (int k = 0; k < 8; k++)
            near(f[k], pow(10000.0, -k / 8.0));
    }
    moec_rope half = rope("{\"partial_rotary_factor\": 0.5}", 16);
    assert_int_equal(half.width, 8);
}

static void linear_and_dynamic_tables(void **state)
{
    double f[8], scale;
    (void)state;
    moec_rope r = rope("{\"rope_scaling\": {\"type\": \"linear\", \"factor\": 4}, \"rope_theta\": 500}", 16);
    moec_rope_table(f, &scale, &r, 10);
    for (int k = 0; k < 8; k++)
        near(f[k], pow(500.0, -k / 8.0) / 4.0);
    r = rope("{\"rope_scaling\": {\"type\": \"dynamic\", \"factor\": 2}, \"max_position_embeddings\": 64}", 16);
    moec_rope_table(f, &scale, &r, 64);
    for (int k = 0; k < 8; k++)
        near(f[k], pow(10000.0, -k / 8.0));
    moec_rope_table(f, &scale, &r, 128); /* base times (2 * 128/64 - 1)^(16/14) */
    for (int k = 0; k < 8; k++)
        near(f[k], pow(10000.0 * pow(3.0, 16.0 / 14.0), -k / 8.0));
}

static void yarn_and_llama3_tables(void **state)
{
    double f[32], scale;
    (void)state;
    moec_rope r = rope("{\"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 8, \"original_max_position_embeddings\": 4096},"
                       " \"max_position_embeddings\": 32768}", 64);
    moec_rope_table(f, &scale, &r, 100);
    near(scale, 0.1 * log(8.0) + 1.0);
    near(f[0], 1.0); /* fast waves are kept, slow ones stretched, those between lie between */
    near(f[31], pow(10000.0, -31.0 / 32.0) / 8.0);
    for (int k = 0; k < 32; k++) {
        double plain = pow(10000.0, -k / 32.0);
        assert_true(f[k] <= plain * (1.0 + 1e-12) && f[k] >= plain / 8.0 * (1.0 - 1e-12));
    }
    r = rope("{\"rope_parameters\": {\"rope_type\": \"yarn\", \"factor\": 8, \"original_max_position_embeddings\": 4096,"
             " \"attention_factor\": 0.5, \"rope_theta\": 10000}}", 64);
    moec_rope_table(f, &scale, &r, 100);
    near(scale, 0.5);
    r = rope("{\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 1, \"high_freq_factor\": 4,"
             " \"original_max_position_embeddings\": 8192}, \"rope_theta\": 500000}", 64);
    moec_rope_table(f, &scale, &r, 100);
    near(scale, 1.0);
    for (int k = 0; k < 32; k++) {
        double plain = pow(500000.0, -k / 32.0), wave = 2.0 * 3.14159265358979323846 / plain;
        double t = (8192.0 / wave - 1.0) / 3.0;
        near(f[k], wave < 2048.0 ? plain : wave > 8192.0 ? plain / 8.0 : (1.0 - t) * plain / 8.0 + t * plain);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tensors_that_do_not_fit_are_named),
        cmocka_unit_test(one_expert_too_many_is_noticed),
        cmocka_unit_test(contradictions_are_noticed),
        cmocka_unit_test(prediction_layers_are_whole_and_counted),
        cmocka_unit_test(a_list_of_equal_numbers_is_a_number),
        cmocka_unit_test(configs_that_make_no_sense_are_refused),
        cmocka_unit_test(keys_of_a_family_are_read_as_its_class_does),
        cmocka_unit_test(a_pattern_of_layers_may_be_a_text_beside_their_types),
        cmocka_unit_test(a_dense_prediction_layer_is_known_by_its_names),
        cmocka_unit_test(carried_logits_need_their_parts),
        cmocka_unit_test(endless_lists_are_refused),
        cmocka_unit_test(heads_are_tied_or_their_own),
        cmocka_unit_test(both_config_dialects_are_read),
        cmocka_unit_test(dense_layers_follow_the_config),
        cmocka_unit_test(sizes_add_up),
        cmocka_unit_test(experts_are_renamed_by_role),
        cmocka_unit_test(plain_tables),
        cmocka_unit_test(linear_and_dynamic_tables),
        cmocka_unit_test(yarn_and_llama3_tables),
    };
    return cmocka_run_group_tests_name("model", tests, NULL, NULL);
}
