/* What of a model becomes a GGUF: names of pre-tokenizers, the tokenizer of the SentencePiece kind, what is refused. Tensors and keys of
 * whole models are compared by tests/interop/test_gguf_model.py. */
#include "base/file.h"
#include "base/mem.h"
#include "run/gguf_model.h"
#include "run/gguf_tokenizer.h"
#include "tiny.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define SPLIT(regex) "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" regex "\"},\"behavior\":\"Isolated\",\"invert\":false}"
#define BYTES "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":false}"
#define SEQ(list) "{\"type\":\"Sequence\",\"pretokenizers\":[" list "]}"
#define TAIL "| ?[^\\\\s\\\\p{L}\\\\p{N}]+[\\\\r\\\\n]*|\\\\s*[\\\\r\\\\n]+|\\\\s+(?!\\\\S)|\\\\s+"
#define HEAD "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?\\\\p{L}+|"

static void pre_tokenizers_are_recognised(void **state)
{
    (void)state;
    static const struct {
        const char *json, *name;
    } cases[] = {
        {SEQ(SPLIT(HEAD "\\\\p{N}" TAIL) "," BYTES), "qwen2"},
        {SEQ(SPLIT(HEAD "\\\\p{N}{1,3}" TAIL) "," BYTES), "llama-bpe"},
        {SEQ(SPLIT(HEAD "\\\\p{N}{1,2}" TAIL) "," BYTES), NULL},
        {SEQ(SPLIT(HEAD "\\\\p{N}" TAIL)), NULL}, /* no bytes */
        {SEQ("{\"type\":\"Whitespace\"}," SPLIT(HEAD "\\\\p{N}" TAIL) "," BYTES), NULL},
        /* gpt-oss's and DeepSeek-V3's, the latter with its line breaks as the file has them */
        {SEQ(SPLIT("[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?[\\\\p{Lu}\\\\p{Lt}\\\\p{Lm}\\\\p{Lo}\\\\p{M}]*[\\\\p{Ll}\\\\p{Lm}\\\\p{Lo}\\\\p{M}]+(?i:'s"
                   "|'t|'re|'ve|'m|'ll|'d)?|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?[\\\\p{Lu}\\\\p{Lt}\\\\p{Lm}\\\\p{Lo}\\\\p{M}]+[\\\\p{Ll}\\\\p{Lm}"
                   "\\\\p{Lo}\\\\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\\\\p{N}{1,3}| ?[^\\\\s\\\\p{L}\\\\p{N}]+[\\\\r\\\\n/]*|\\\\s*[\\\\r\\\\n]+|"
                   "\\\\s+(?!\\\\S)|\\\\s+") "," BYTES),
         "gpt-4o"},
        {SEQ(SPLIT("\\\\p{N}{1,3}") "," SPLIT("[\344\270\200-\351\276\245\343\201\200-\343\202\237\343\202\240-\343\203\277]+") ","
             SPLIT("[!\\\"#$%&'()*+,\\\\-./:;<=>?@\\\\[\\\\\\\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\\\p{L}\\\\p{P}\\\\p{S}]?[\\\\p{L}\\\\p{M}]+| "
                   "?[\\\\p{P}\\\\p{S}]+[\\r\\n]*|\\\\s*[\\r\\n]+|\\\\s+(?!\\\\S)|\\\\s+") "," BYTES),
         "deepseek-v3"},
        {SEQ(SPLIT("[\\r\\n]") "," SPLIT("\\\\s?[A-Za-z\302\265]+") "," SPLIT("\\\\s?[!-/:-~\357\274\201]+") "," SPLIT("\\\\s+$") ","
             SPLIT("[\344\270\200-\351\276\245]+") ",{\"type\":\"Digits\",\"individual_digits\":true}," BYTES),
         "deepseek-llm"},
        {"{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true}", "gpt-2"},
        {"{\"type\":\"ByteLevel\",\"use_regex\":false}", NULL},
        {"null", NULL},
        {"{}", NULL},
    };
    for (size_t i = 0; i < MOEC_COUNT(cases); i++) {
        moec_json *v;
        moec_err err = {MOEC_OK, ""};
        if (moec_json_parse(&v, cases[i].json, strlen(cases[i].json), "case", &err) != MOEC_OK)
            fail_msg("case %zu: %s", i, err.text);
        const char *name = moec_gguf_pre(v);
        if ((!name != !cases[i].name) || (name && strcmp(name, cases[i].name) != 0))
            fail_msg("case %zu: %s, expected %s", i, name ? name : "nothing", cases[i].name ? cases[i].name : "nothing");
        moec_json_free(v);
    }
}

static void put(const char *dir, const char *name, const char *text)
{
    char *path = tiny_path(dir, name);
    assert_int_equal(moec_file_write(path, text, strlen(text), NULL), MOEC_OK);
    moec_free(path);
}

static int64_t int_of(const moec_gguf_index *ix, const char *key)
{
    int64_t v = -99;
    bool b = false;
    if (moec_gguf_bool(moec_gguf_find(ix, key), &b))
        return b;
    moec_gguf_int(moec_gguf_find(ix, key), &v);
    return v;
}

/* Six pieces, three bytes, merges a+b=ab (first), ab+c=abc, b+c=bc; ids 9.. of the 64 rows have no token. */
static void pieces_have_ranks_for_scores(void **state)
{
    (void)state;
    char *dir = tiny_folder(), *path = tiny_path(dir, "m.gguf");
    moec_err err = {MOEC_OK, ""};
    moec_model *m;
    moec_gguf_out *g;
    moec_gguf *back;
    const tiny_spec spec = {.family = "mixtral"};
    assert_int_equal(tiny_write(dir, &spec, &err), MOEC_OK);
    put(dir, "tokenizer.json",
        "{\"version\":\"1.0\",\"added_tokens\":[{\"id\":0,\"content\":\"<unk>\",\"special\":true},{\"id\":1,\"content\":\"<s>\","
        "\"special\":true},{\"id\":9,\"content\":\"<user>\",\"special\":false}],\"normalizer\":{\"type\":\"Prepend\",\"prepend\":\"\342\226\201\"},"
        "\"pre_tokenizer\":null,\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"<s>\",\"type_id\":0}},"
        "{\"Sequence\":{\"id\":\"A\",\"type_id\":0}}],\"pair\":[],\"special_tokens\":{\"<s>\":{\"id\":\"<s>\",\"ids\":[1],\"tokens\":[\"<s>\"]}}},"
        "\"decoder\":null,\"model\":{\"type\":\"BPE\",\"unk_token\":\"<unk>\",\"fuse_unk\":true,\"byte_fallback\":true,"
        "\"vocab\":{\"<unk>\":0,\"<s>\":1,\"<0x0A>\":2,\"a\":3,\"b\":4,\"c\":5,\"ab\":6,\"abc\":7,\"bc\":8},"
        "\"merges\":[\"a b\",[\"ab\",\"c\"],\"b c\",\"a bc\"]}}");
    put(dir, "tokenizer_config.json", "{\"bos_token\":{\"content\":\"<s>\"},\"model_max_length\":1000000000000000019884624838656,"
        "\"chat_template\":[{\"name\":\"tools\",\"template\":\"T\"},{\"name\":\"default\",\"template\":\"D\"}]}");
    assert_int_equal(moec_model_open(&m, dir, &err), MOEC_OK);
    assert_int_equal(moec_gguf_out_new(&g, &err), MOEC_OK);
    if (moec_gguf_tokenizer(g, m, &err) != MOEC_OK || moec_gguf_out_close(g, 0, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    assert_int_equal(moec_gguf_write(path, g, moec_gguf_model_rows, NULL, &err), MOEC_OK);
    assert_int_equal(moec_gguf_open(&back, path, &err), MOEC_OK);
    const moec_gguf_index *ix = moec_gguf_front(back);
    static const float scores[] = {0, 0, 0, 0, 0, 0, -1, -2, -3, 0};
    static const int kinds[] = {2, 3, 6, 1, 1, 1, 1, 1, 1, 4, 5};
    for (size_t i = 0; i < MOEC_COUNT(kinds); i++) {
        double x = 1;
        int64_t k = 0;
        assert_true(moec_gguf_item_int(moec_gguf_find(ix, "tokenizer.ggml.token_type"), i, &k) && k == kinds[i]);
        if (i < MOEC_COUNT(scores))
            assert_true(moec_gguf_item_real(moec_gguf_find(ix, "tokenizer.ggml.scores"), i, &x) && (float)x == scores[i]);
    }
    assert_int_equal(moec_gguf_find(ix, "tokenizer.ggml.tokens")->n, 64);
    assert_int_equal(int_of(ix, "tokenizer.ggml.bos_token_id"), 1);
    assert_int_equal(int_of(ix, "tokenizer.ggml.unknown_token_id"), 0);
    assert_int_equal(int_of(ix, "tokenizer.ggml.add_bos_token"), 1);
    assert_int_equal(int_of(ix, "tokenizer.ggml.add_space_prefix"), 1);
    assert_null(moec_gguf_find(ix, "tokenizer.ggml.merges"));
    char *text;
    assert_int_equal(moec_gguf_text(&text, moec_gguf_find(ix, "tokenizer.chat_template"), &err), MOEC_OK);
    assert_string_equal(text, "D");
    moec_free(text);
    moec_gguf_close(back);
    moec_gguf_out_free(g);
    moec_model_close(m);
    moec_free(path);
    tiny_remove(dir);
    moec_free(dir);
}

static void refused(const char *family, uint32_t type, const char *part)
{
    char *dir = tiny_folder();
    moec_err err = {MOEC_OK, ""};
    moec_model *m;
    moec_gguf_model *x;
    const tiny_spec spec = tiny_of(family);
    assert_int_equal(tiny_write(dir, &spec, &err), MOEC_OK);
    assert_int_equal(moec_model_open(&m, dir, &err), MOEC_OK);
    assert_int_equal(moec_gguf_model_new(&x, m, type, &err), MOEC_EINVAL);
    assert_null(x);
    if (!strstr(err.text, part))
        fail_msg("%s: '%s' is not in '%s'", family, part, err.text);
    moec_model_close(m);
    tiny_remove(dir);
    moec_free(dir);
}

static void models_that_llama_cpp_computes_otherwise_are_refused(void **state)
{
    (void)state;
    refused("qwen3_moe", MOEC_GGML_F32, "has them in every layer");
    refused("olmoe", MOEC_GGML_F32, "clip_qkv");
    refused("deepseek_v2", MOEC_GGML_F32, "two best");
    refused("mixtral", MOEC_GGML_Q4_K, "only F32, F16 and BF16");
    refused("jetmoe", MOEC_GGML_F32, "no GGUF is written");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pre_tokenizers_are_recognised),
        cmocka_unit_test(pieces_have_ranks_for_scores),
        cmocka_unit_test(models_that_llama_cpp_computes_otherwise_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
