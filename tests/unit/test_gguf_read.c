/* A GGUF as a model: views of blocks and of paired rows, models that give back what the checkpoint has, files that are wrong in one
 * place. Whole conversions are compared by tests/interop/test_gguf_convert.py. */
#include "base/file.h"
#include "base/log.h"
#include "base/mem.h"
#include "model/gguf_open.h"
#include "num/blocks.h"
#include "run/convert.h"
#include "run/gguf_model.h"
#include "run/gguf_tokenizer.h"
#include "run/gguf_words.h"
#include "tiny.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* --- views ----------------------------------------------------------------------------------------------------------- */

static void parts_of_rows_are_those_of_the_whole(void **state)
{
    (void)state;
    enum { ROWS = 8, COLS = 512 };
    static float w[ROWS * COLS], whole[ROWS * COLS], part[ROWS * COLS];
    static unsigned char bytes[ROWS * COLS * 4];
    unsigned seed = 3;
    for (int i = 0; i < ROWS * COLS; i++) {
        seed = seed * 1103515245U + 12345U;
        w[i] = (float)((int)(seed >> 16 & 1023) - 512) / 256.0F;
    }
    for (int type = 0; type < MOEC_BLOCK_COUNT; type++) {
        const int64_t row = moec_blocks_bytes((moec_block)type, COLS);
        for (int r = 0; r < ROWS; r++) {
            assert_int_equal(moec_blocks_write(bytes + r * row, w + r * COLS, NULL, COLS, (moec_block)type, NULL), MOEC_OK);
            assert_int_equal(moec_blocks_read(whole + r * COLS, bytes + r * row, COLS, (moec_block)type, NULL), MOEC_OK);
        }
        const moec_tensor t = {.name = "w", .dtype = MOEC_U8, .rank = 2, .dim = {ROWS, row}, .data = bytes, .bytes = (size_t)(ROWS * row)};
        moec_weight v = {.of = &t, .rows = ROWS - 2, .cols = COLS, .at = 2 * COLS, .row_step = COLS, .col_step = 1,
                         .storage = MOEC_BLOCKS, .block = (uint8_t)type};
        assert_int_equal(moec_weight_check(&v, NULL), MOEC_OK);
        static const int cuts[][2] = {{0, 512}, {0, 1}, {511, 1}, {31, 2}, {32, 32}, {5, 300}, {255, 2}, {256, 256}, {250, 262}};
        for (size_t c = 0; c < MOEC_COUNT(cuts); c++) {
            moec_weight_read(part, COLS, &v, 1, 3, cuts[c][0], cuts[c][1]);
            for (int r = 0; r < 3; r++)
                assert_memory_equal(part + r * COLS, whole + (r + 3) * COLS + cuts[c][0], (size_t)cuts[c][1] * sizeof *part);
        }
        assert_int_equal(moec_weight_bytes(&v), (uint64_t)(ROWS - 2) * (uint64_t)row);
        assert_int_equal(moec_weight_nonfinite(&v), -1);
        v.rows = ROWS - 1; /* one too many */
        assert_int_equal(moec_weight_check(&v, NULL), MOEC_EINVAL);
        v = (moec_weight){.of = &t, .rows = ROWS, .cols = COLS - 1, .row_step = COLS - 1, .col_step = 1, .storage = MOEC_BLOCKS,
                          .block = (uint8_t)type};
        assert_int_equal(moec_weight_check(&v, NULL), MOEC_EINVAL);
    }
}

static void paired_rows_are_read_in_their_order(void **state)
{
    (void)state;
    static const float lies[8] = {0, 1, 2, 3, 10, 11, 12, 13}; /* two heads of four: 0 2 1 3 */
    static const float want[8] = {0, 2, 1, 3, 10, 12, 11, 13};
    float out[8];
    const moec_tensor t = {.name = "q", .dtype = MOEC_F32, .rank = 2, .dim = {8, 1}, .data = lies, .bytes = sizeof lies};
    moec_weight v = moec_weight_of(&t);
    v.paired = 4;
    assert_int_equal(moec_weight_check(&v, NULL), MOEC_OK);
    moec_weight_read(out, 1, &v, 0, 8, 0, 1);
    assert_memory_equal(out, want, sizeof want);
    moec_weight_read(out, 1, &v, 5, 2, 0, 1);
    assert_memory_equal(out, want + 5, 2 * sizeof *want);
    v.paired = 3;
    assert_int_equal(moec_weight_check(&v, NULL), MOEC_EINVAL);
}

/* --- models ---------------------------------------------------------------------------------------------------------- */

static void write_gguf(const char *dir, const char *path)
{
    moec_err err = {MOEC_OK, ""};
    moec_model *m;
    moec_gguf_model *x;
    moec_gguf_out *g;
    if (moec_model_open(&m, dir, &err) != MOEC_OK || moec_gguf_model_new(&x, m, MOEC_GGML_F32, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    assert_int_equal(moec_gguf_out_new(&g, &err), MOEC_OK);
    moec_gguf_model_describe(g, x, "tiny");
    assert_int_equal(moec_gguf_out_close(g, 0, &err), MOEC_OK);
    assert_int_equal(moec_gguf_write(path, g, moec_gguf_model_rows, x, &err), MOEC_OK);
    moec_gguf_out_free(g);
    moec_gguf_model_free(x);
    moec_model_close(m);
}

static void same_matrix(const moec_weight *a, const moec_weight *b)
{
    assert_int_equal(a->of != NULL, b->of != NULL);
    if (!a->of)
        return;
    assert_int_equal(a->rows, b->rows);
    assert_int_equal(a->cols, b->cols);
    float *x, *y;
    const size_t n = (size_t)(a->rows * a->cols);
    assert_int_equal(MOEC_NEW(x, 2 * n, NULL), MOEC_OK);
    y = x + n;
    assert_int_equal(moec_weight_read_all(x, a, NULL), MOEC_OK);
    assert_int_equal(moec_weight_read_all(y, b, NULL), MOEC_OK);
    if (memcmp(x, y, n * sizeof *x) != 0)
        fail_msg("%s and %s differ", a->of->name, b->of->name);
    moec_free(x);
}

static void same_model(const moec_model *a, const moec_model *b)
{
    assert_ptr_equal(a->family, b->family);
    assert_int_equal(a->dims.layers, b->dims.layers);
    assert_int_equal(a->dims.top_k, b->dims.top_k);
    assert_int_equal(a->dims.renorm, b->dims.renorm);
    assert_true(a->dims.norm_eps == b->dims.norm_eps && a->dims.score_scale == b->dims.score_scale);
    assert_true(a->dims.rope.theta == b->dims.rope.theta && a->dims.rope.width == b->dims.rope.width);
    assert_true(a->dims.route_scale == b->dims.route_scale && a->dims.groups == b->dims.groups);
    same_matrix(&a->embedding, &b->embedding);
    same_matrix(&a->head, &b->head);
    for (int64_t i = 0; i < a->dims.layers; i++) {
        const moec_layer *x = &a->layer[i], *y = &b->layer[i];
        assert_int_equal(x->window, y->window);
        for (int k = 0; k < MOEC_MAT_COUNT; k++)
            same_matrix(&x->mat[k], &y->mat[k]);
        assert_int_equal(x->expert != NULL, y->expert != NULL);
        for (int64_t e = 0; x->expert && e < a->dims.experts; e++) {
            same_matrix(&x->expert[e].gate, &y->expert[e].gate);
            same_matrix(&x->expert[e].up, &y->expert[e].up);
            same_matrix(&x->expert[e].down, &y->expert[e].down);
        }
    }
}

static void models_come_back(void **state)
{
    (void)state;
    static const char *const families[] = {"qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss", "glm4_moe"};
    for (size_t i = 0; i < MOEC_COUNT(families); i++) {
        char *dir = tiny_folder(), *folder = tiny_path(dir, "hf"), *path = tiny_path(dir, "m.gguf"), *out = tiny_path(dir, "out");
        moec_err err = {MOEC_OK, ""};
        moec_model *m, *g, *back;
        moec_convert_result r;
        tiny_spec spec = tiny_of(families[i]);
        if (i < 2)
            spec.dense_layer = 0;
        assert_int_equal(moec_dir_make(folder, &err), MOEC_OK);
        assert_int_equal(tiny_write(folder, &spec, &err), MOEC_OK);
        write_gguf(folder, path);
        assert_true(moec_gguf_is(path) && !moec_gguf_is(folder));
        assert_int_equal(moec_model_open(&m, folder, &err), MOEC_OK);
        if (moec_model_open(&g, path, &err) != MOEC_OK)
            fail_msg("%s: %s", families[i], err.text);
        assert_non_null(moec_ckpt_gguf(g->ckpt));
        assert_false(g->packed);
        same_model(m, g);
        moec_sizes a, b;
        assert_int_equal(moec_model_sizes(&a, g, &err), MOEC_OK);
        const moec_convert_options o = {.out = out, .dtype = MOEC_DTYPE_COUNT, .shard_bytes = 20000};
        if (moec_convert(&r, g, &o, &err) != MOEC_OK || moec_model_open(&back, out, &err) != MOEC_OK)
            fail_msg("%s: %s", families[i], err.text);
        assert_int_equal(r.dtype, MOEC_F32);
        assert_true(r.shards > 1);
        same_model(m, back);
        assert_int_equal(moec_model_sizes(&b, back, &err), MOEC_OK);
        assert_true(a.total == b.total && a.active == b.active && a.routed == b.routed);
        assert_int_equal(moec_convert(&r, back, &o, &err), MOEC_EINVAL); /* a folder */
        moec_model_close(back);
        moec_model_close(g);
        moec_model_close(m);
        tiny_remove(dir);
        moec_free(out);
        moec_free(path);
        moec_free(folder);
        moec_free(dir);
    }
}

/* --- files that are wrong -------------------------------------------------------------------------------------------- */

/* Where `what` stands in the file. */
static char *place(char *bytes, size_t n, const char *what)
{
    char *at = memmem(bytes, n, what, strlen(what));
    if (!at)
        fail_msg("%s is not in the file", what);
    return at;
}

static void wrong_files_are_refused(void **state)
{
    (void)state;
    char *dir = tiny_folder(), *folder = tiny_path(dir, "hf"), *path = tiny_path(dir, "m.gguf"), *bytes;
    moec_err err = {MOEC_OK, ""};
    size_t n;
    const tiny_spec spec = {.family = "qwen3_moe"};
    assert_int_equal(moec_dir_make(folder, &err), MOEC_OK);
    assert_int_equal(tiny_write(folder, &spec, &err), MOEC_OK);
    write_gguf(folder, path);
    assert_int_equal(moec_file_read(&bytes, &n, path, 1 << 24, &err), MOEC_OK);
    static const struct {
        const char *at;      /* what is changed: at its end, `skip` bytes on */
        int skip;
        const char *to;      /* bytes */
        size_t len;
        const char *said;
    } cases[] = {
        {"qwen3moe.expert_used", 0, "-", 1, "qwen3moe.expert_used_count is missing"},
        {"qwen3moe.expert_used_count", 4, "\x09", 1, "expert_used_count is 9, expected 1 to 8"},
        {"qwen3moe.expert_count", 4, "\x07", 1, "expert_count is 7, but tensor blk.0.ffn_gate_exps.weight has 8"},
        {"qwen3moe.expert_feed_forward_length", 4, "\x0b", 1, "has 12"},
        {"qwen3moe.embedding_length", 4, "\x11", 1, "embedding_length is 17, but tensor token_embd.weight has 16"},
        {"qwen3moe.attention.head_count", 4, "\0", 1, "head_count is 0, expected 1 to"},
        {"qwen3moe.attention.head_count", 4, "\x05", 1, "multiple"},
        {"qwen3moe.block_count", 4, "\x02", 1, "block_count is 2"},
        {"qwen3moe.block_count", 4, "\x04", 1, "is missing"},
        {"qwen3moe.attention.layer_norm_rms_epsilon", 4, "\0\0\x80\xff", 4, "is not a number from"},
        {"qwen3moe.rope.freq_base", 4, "\0\0\0\0", 4, "rope.freq_base is not a number"},
        {"general.architecture", 12, "qwen9", 5, "qwen9moe, which is not read (these are: "},
        {"blk.1.attn_q.", 0, "W", 1, "tensor blk.1.attn_q.Weight is not known"},
        {"blk.1.attn_k.weight", 4, "\x09", 1, NULL}, /* a longer row: tensors would lie otherwise */
    };
    for (size_t i = 0; i < MOEC_COUNT(cases); i++) {
        moec_model *m;
        char *copy;
        assert_int_equal(moec_copy(&copy, bytes, n, &err), MOEC_OK);
        memcpy(place(copy, n, cases[i].at) + strlen(cases[i].at) + cases[i].skip, cases[i].to, cases[i].len);
        assert_int_equal(moec_file_write(path, copy, n, &err), MOEC_OK);
        moec_status st = moec_model_open(&m, path, &err);
        if (st == MOEC_OK || moec_exit_code(st) != 3 || (cases[i].said && !strstr(err.text, cases[i].said)))
            fail_msg("case %zu: %d %s", i, (int)st, st == MOEC_OK ? "is taken" : err.text);
        moec_free(copy);
    }
    moec_free(bytes);
    tiny_remove(dir);
    moec_free(path);
    moec_free(folder);
    moec_free(dir);
}

/* --- tokenizers ------------------------------------------------------------------------------------------------------ */

static void pre_tokenizers_go_both_ways(void **state)
{
    (void)state;
    static const char *const names[] = {"qwen2", "llama-bpe", "gpt-4o", "deepseek-v3", "deepseek-llm", "deepseek-coder", "gpt-2"};
    for (size_t i = 0; i < MOEC_COUNT(names); i++) {
        moec_json *v = moec_gguf_pre_node(names[i]);
        assert_non_null(v);
        const char *name = moec_gguf_pre(v);
        if (!name || strcmp(name, names[i]) != 0)
            fail_msg("%s becomes %s", names[i], name ? name : "nothing");
        moec_json_free(v);
    }
    assert_null(moec_gguf_pre_node("bert-bpe"));
}

/* Texts of a GGUF whose only keys are a tokenizer's; NULL where they are refused, then err says why. */
static moec_status words_of(moec_gguf_words *out, const char *kind, const char *const *token, size_t n, const char *const *merge,
                            size_t n_merges, const float *score, moec_err *err)
{
    char *dir = tiny_folder(), *path = tiny_path(dir, "t.gguf");
    moec_gguf_out *g;
    moec_gguf *back;
    assert_int_equal(moec_gguf_out_new(&g, err), MOEC_OK);
    moec_gguf_put_text(g, "tokenizer.ggml.model", kind);
    moec_gguf_put_text(g, "tokenizer.ggml.pre", "qwen2");
    moec_gguf_put_texts(g, "tokenizer.ggml.tokens", token, n);
    if (merge)
        moec_gguf_put_texts(g, "tokenizer.ggml.merges", merge, n_merges);
    if (score)
        moec_gguf_put_f32s(g, "tokenizer.ggml.scores", score, n);
    moec_gguf_put_u32(g, "tokenizer.ggml.bos_token_id", 1);
    assert_int_equal(moec_gguf_out_close(g, 0, err), MOEC_OK);
    assert_int_equal(moec_gguf_write(path, g, moec_gguf_model_rows, NULL, err), MOEC_OK);
    assert_int_equal(moec_gguf_open(&back, path, err), MOEC_OK);
    moec_status st = moec_gguf_words_make(out, moec_gguf_front(back), "t.gguf", err);
    moec_gguf_close(back);
    moec_gguf_out_free(g);
    tiny_remove(dir);
    moec_free(path);
    moec_free(dir);
    return st;
}

static void vocabularies_are_checked(void **state)
{
    (void)state;
    static const char *const token[] = {"a", "b", "ab", "c"}, *const twice[] = {"a", "b", "a"}, *const odd[] = {"a", "b", "\xff"};
    static const char *const merge[] = {"a b"}, *const absent[] = {"a d"}, *const none[] = {"a c"};
    static const float score[] = {0, 0, -1, 0}, nan[] = {0, 0, __builtin_nanf(""), 0};
    static const struct {
        const char *kind;
        const char *const *token;
        size_t n;
        const char *const *merge;
        const float *score;
        const char *said; /* NULL: good */
    } cases[] = {
        {"gpt2", token, 4, merge, NULL, NULL},
        {"llama", token, 4, NULL, score, NULL},
        {"bert", token, 4, merge, NULL, "bert; gpt2 and llama are read"},
        {"gpt2", twice, 3, merge, NULL, "spelled alike"},
        {"gpt2", odd, 3, NULL, NULL, "not UTF-8"},
        {"gpt2", token, 4, absent, NULL, "merge 0 is not of two tokens"},
        {"gpt2", token, 4, none, NULL, "merge 0 gives no token"},
        {"gpt2", token, 4, NULL, NULL, "merges is missing"},
        {"gpt2", token, 1, merge, NULL, "bos_token_id is no id of the 1 tokens"},
        {"llama", token, 4, NULL, NULL, "scores is missing"},
        {"llama", token, 4, NULL, nan, "score of token 2"},
    };
    for (size_t i = 0; i < MOEC_COUNT(cases); i++) {
        moec_err err = {MOEC_OK, ""};
        moec_gguf_words w;
        moec_status st = words_of(&w, cases[i].kind, cases[i].token, cases[i].n, cases[i].merge, 1, cases[i].score, &err);
        if (st != (cases[i].said ? MOEC_EFORMAT : MOEC_OK) || (cases[i].said && !strstr(err.text, cases[i].said)))
            fail_msg("case %zu: %s", i, st == MOEC_OK ? "is taken" : err.text);
        if (st == MOEC_OK)
            assert_non_null(strstr(w.tokenizer, "\"merges\""));
        moec_gguf_words_release(&w);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(parts_of_rows_are_those_of_the_whole),
        cmocka_unit_test(paired_rows_are_read_in_their_order),
        cmocka_unit_test(models_come_back),
        cmocka_unit_test(wrong_files_are_refused),
        cmocka_unit_test(pre_tokenizers_go_both_ways),
        cmocka_unit_test(vocabularies_are_checked),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
