/* GGUF: what a front may not be and how it is said; what is written is read back, in one file, in a series, by moec_writer. Files
 * are made here byte by byte; tests/interop/test_gguf.py has a reader and a writer that we did not write. */
#include "base/file.h"
#include "base/mem.h"
#include "ckpt/gguf_write.h"
#include "tiny.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* --- bytes by hand ----------------------------------------------------------------------------------------------------- */

typedef struct bytes {
    unsigned char at[4096];
    size_t n;
} bytes;

static void num(bytes *b, uint64_t v, size_t n)
{
    for (size_t i = 0; i < n; i++)
        b->at[b->n++] = (unsigned char)(v >> (8 * i));
}

static void text(bytes *b, const char *s)
{
    num(b, strlen(s), 8);
    memcpy(b->at + b->n, s, strlen(s));
    b->n += strlen(s);
}

static void front(bytes *b, uint32_t version, uint64_t tensors, uint64_t keys)
{
    *b = (bytes){0};
    memcpy(b->at, "GGUF", 4);
    b->n = 4;
    num(b, version, 4);
    num(b, tensors, 8);
    num(b, keys, 8);
}

static void key(bytes *b, const char *name, uint32_t kind)
{
    text(b, name);
    num(b, kind, 4);
}

static void tensor(bytes *b, const char *name, int rank, uint64_t d0, uint64_t d1, uint32_t type, uint64_t at)
{
    text(b, name);
    num(b, (uint64_t)rank, 4);
    if (rank > 0)
        num(b, d0, 8);
    for (int i = 1; i < rank; i++)
        num(b, d1, 8);
    num(b, type, 4);
    num(b, at, 8);
}

static void data(bytes *b, size_t n)
{
    b->n = (b->n + 31) / 32 * 32 + n;
}

static void refused(const bytes *b, const char *part)
{
    moec_err err = {MOEC_OK, ""};
    moec_gguf_index ix;
    /* at its exact length, so that a sanitizer sees a byte too far */
    unsigned char *copy = malloc(b->n ? b->n : 1);
    assert_non_null(copy);
    memcpy(copy, b->at, b->n);
    assert_int_equal(moec_gguf_parse(&ix, copy, b->n, b->n, "input", &err), MOEC_EFORMAT);
    if (!strstr(err.text, part))
        fail_msg("'%s' is not in '%s'", part, err.text);
    moec_gguf_index_release(&ix);
    free(copy);
}

static void bad_fronts_are_refused(void **state)
{
    (void)state;
    bytes b;
    front(&b, 3, 0, 0);
    b.n = 23;
    refused(&b, "not a GGUF file");
    front(&b, 3, 0, 0);
    b.at[0] = 'g';
    refused(&b, "not a GGUF file");
    front(&b, 1, 0, 0);
    refused(&b, "version 1");
    front(&b, 4, 0, 0);
    refused(&b, "version 4");
    front(&b, UINT32_C(0x03000000), 0, 0);
    refused(&b, "big-endian");
    front(&b, 3, UINT64_MAX, 0);
    refused(&b, "do not fit");
    front(&b, 3, 0, UINT64_MAX / 14);
    refused(&b, "do not fit");
}

static void bad_keys_are_refused(void **state)
{
    (void)state;
    bytes b;
#define KEY(body, part)                                                                                                      \
    do {                                                                                                                     \
        front(&b, 3, 0, 1);                                                                                                  \
        body;                                                                                                                \
        refused(&b, part);                                                                                                   \
    } while (0)
    KEY((num(&b, UINT64_MAX, 8), num(&b, 0, 8)), "expected 1 to 65535");
    KEY((num(&b, 0, 8), num(&b, 0, 8)), "expected 1 to 65535");
    KEY((num(&b, 60000, 8), num(&b, 0, 8)), "cut short");
    KEY((num(&b, 2, 8), num(&b, 'a', 2), num(&b, 0, 8)), "NUL");
    KEY((key(&b, "abc", 13), num(&b, 0, 8)), "unknown kind 13");
    KEY((key(&b, "abc", MOEC_GGUF_U64), num(&b, 0, 4)), "abc is cut short");
    KEY((key(&b, "abc", MOEC_GGUF_BOOL), num(&b, 2, 1)), "neither 0 nor 1");
    KEY((key(&b, "abc", MOEC_GGUF_TEXT), num(&b, UINT64_MAX, 8)), "abc is cut short");
    KEY((key(&b, "abc", MOEC_GGUF_ARRAY), num(&b, MOEC_GGUF_ARRAY, 4), num(&b, 1, 8)), "array of arrays");
    KEY((key(&b, "abc", MOEC_GGUF_ARRAY), num(&b, 99, 4), num(&b, 1, 8)), "unknown kind");
    KEY((key(&b, "abc", MOEC_GGUF_ARRAY), num(&b, MOEC_GGUF_F64, 4), num(&b, UINT64_C(1) << 61, 8)), "cut short");
    KEY((key(&b, "abc", MOEC_GGUF_ARRAY), num(&b, MOEC_GGUF_TEXT, 4), num(&b, UINT64_MAX, 8)), "cut short");
    KEY((key(&b, "abc", MOEC_GGUF_ARRAY), num(&b, MOEC_GGUF_BOOL, 4), num(&b, 2, 8), num(&b, 0x301, 2)), "neither 0 nor 1");
    KEY((key(&b, "general.alignment", MOEC_GGUF_U32), num(&b, 24, 4)), "power of two");
    KEY((key(&b, "general.alignment", MOEC_GGUF_U32), num(&b, 0, 4)), "power of two");
    KEY((key(&b, "general.alignment", MOEC_GGUF_U64), num(&b, 32, 8)), "power of two");
#undef KEY
    front(&b, 3, 0, 2);
    for (int i = 0; i < 2; i++) {
        key(&b, "abc", MOEC_GGUF_U32);
        num(&b, 0, 4);
    }
    refused(&b, "key abc is there twice");
}

static void bad_tensors_are_refused(void **state)
{
    (void)state;
    static const struct {
        int rank;
        uint64_t d0, d1;
        uint32_t type;
        uint64_t at;
        const char *part;
    } cases[] = {
        {5, 1, 1, 0, 0, "5 dimensions"},
        {1, UINT64_MAX, 1, 0, 0, "too large"},
        {4, UINT64_C(1) << 40, UINT64_C(1) << 20, 0, 0, "overflows"},
        {4, 0, UINT64_C(1) << 40, 0, 0, "overflows"},    /* rows cannot be counted, even of no bytes */
        {4, 0, UINT64_C(1) << 20, 0, 0, "past the end"}, /* of no bytes: is taken, the second is not */
        {1, 8, 1, 4, 0, "unknown type 4"},
        {1, 8, 1, 999, 0, "unknown type 999"},
        {1, 48, 1, MOEC_GGML_Q8_0, 0, "blocks of 32"},
        {1, 8, 1, 0, 32, "begins at 32, expected 0"},
        {1, 17, 1, 0, 0, "past the end"},
    };
    bytes b;
    for (size_t i = 0; i < MOEC_COUNT(cases); i++) {
        const bool empty = cases[i].d0 == 0 && cases[i].d1 < UINT64_C(1) << 40;
        front(&b, 3, empty ? 2 : 1, 0);
        tensor(&b, "w", cases[i].rank, cases[i].d0, cases[i].d1, cases[i].type, cases[i].at);
        if (empty)
            tensor(&b, "v", 1, 99, 1, 0, 0);
        data(&b, 64);
        refused(&b, empty ? "v: reaches past" : cases[i].part);
    }
    front(&b, 3, 2, 0);
    tensor(&b, "w", 1, 8, 1, 0, 0);
    tensor(&b, "w", 1, 8, 1, 0, 32);
    data(&b, 64);
    refused(&b, "tensor w is there twice");
    front(&b, 3, 2, 0);
    tensor(&b, "w", 1, 9, 1, 0, 0);
    tensor(&b, "v", 1, 8, 1, 0, 32);
    data(&b, 64);
    refused(&b, "expected 64");
    front(&b, 3, 1, 0);
    tensor(&b, "w", 1, 8, 1, 0, 0);
    data(&b, 33);
    refused(&b, "behind the last tensor");
    front(&b, 3, 1, 0);
    tensor(&b, "a23456789b23456789c23456789d23456789e23456789f23456789g2345678901", 1, 8, 1, 0, 0);
    data(&b, 32);
    refused(&b, "expected 1 to 63");
}

/* Every prefix of a good file is refused: nothing is read past the end. */
static void cut_files_are_refused(void **state)
{
    (void)state;
    bytes b, c;
    front(&b, 3, 1, 3);
    key(&b, "a", MOEC_GGUF_ARRAY);
    num(&b, MOEC_GGUF_TEXT, 4);
    num(&b, 2, 8);
    text(&b, "one");
    text(&b, "");
    key(&b, "b", MOEC_GGUF_I16);
    num(&b, 0xfffe, 2);
    key(&b, "c", MOEC_GGUF_TEXT);
    text(&b, "hello");
    tensor(&b, "w", 2, 32, 3, MOEC_GGML_Q8_0, 0);
    data(&b, 102);
    moec_gguf_index ix;
    assert_int_equal(moec_gguf_parse(&ix, b.at, b.n, b.n, "input", NULL), MOEC_OK);
    int64_t v = 0;
    assert_true(moec_gguf_int(moec_gguf_find(&ix, "b"), &v) && v == -2);
    moec_gguf_texts it = {0};
    const char *s;
    size_t len;
    assert_true(moec_gguf_each_text(moec_gguf_find(&ix, "a"), &it, &s, &len) && len == 3 && memcmp(s, "one", 3) == 0);
    assert_true(moec_gguf_each_text(moec_gguf_find(&ix, "a"), &it, &s, &len) && len == 0);
    assert_false(moec_gguf_each_text(moec_gguf_find(&ix, "a"), &it, &s, &len));
    assert_int_equal(ix.tensor[0].bytes, 102);
    moec_gguf_index_release(&ix);
    for (size_t n = 0; n < b.n; n++) {
        c = b;
        c.n = n;
        refused(&c, "");
    }
}

/* --- there and back ---------------------------------------------------------------------------------------------------- */

enum { TENSORS = 5 };

/* Byte i of row r of tensor t. */
static unsigned char pattern(size_t t, int64_t r, size_t i)
{
    return (unsigned char)(t * 37 + (size_t)r * 11 + i);
}

static const int64_t dims[TENSORS][3] = {{5, 3, 2}, {32, 7, 1}, {1, 1, 1}, {300000, 9, 3}, {256, 4, 1}};
static const uint32_t kinds[TENSORS] = {MOEC_GGML_F32, MOEC_GGML_Q8_0, MOEC_GGML_F16, MOEC_GGML_I8, MOEC_GGML_Q4_K};

static size_t row_bytes(size_t t)
{
    const moec_ggml_traits *type = moec_ggml_type(kinds[t]);
    return (size_t)(dims[t][0] / type->elements) * type->bytes;
}

static moec_status rows(void *out, void *ctx, size_t t, int64_t lo, int64_t hi, moec_err *err)
{
    unsigned char *p = out;
    (void)ctx;
    (void)err;
    for (int64_t r = lo; r < hi; r++)
        for (size_t i = 0; i < row_bytes(t); i++)
            *p++ = pattern(t, r, i);
    return MOEC_OK;
}

static moec_gguf_out *describe(uint64_t shard_bytes)
{
    moec_gguf_out *g;
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_gguf_out_new(&g, &err), MOEC_OK);
    moec_gguf_put_text(g, "general.architecture", "qwen3moe");
    moec_gguf_put_u32(g, "a.u32", 4000000000u);
    moec_gguf_put_i32(g, "a.i32", -5);
    moec_gguf_put_f32(g, "a.f32", 0.1f);
    moec_gguf_put_bool(g, "a.bool", true);
    moec_gguf_put_texts(g, "a.texts", (const char *const[]){"x", "", "\xc3\xa4"}, 3);
    moec_gguf_put_i32s(g, "a.i32s", (const int32_t[]){1, -2}, 2);
    moec_gguf_put_u32s(g, "a.u32s", (const uint32_t[]){1, 2, 3}, 3);
    moec_gguf_put_f32s(g, "a.f32s", (const float[]){1.5f}, 1);
    moec_gguf_put_bools(g, "a.bools", (const bool[]){false, true}, 2);
    for (size_t t = 0; t < TENSORS; t++) {
        char name[8];
        snprintf(name, sizeof name, "t%zu", t);
        moec_gguf_put_tensor(g, name, kinds[t], dims[t][2] > 1 ? 3 : 2, dims[t]);
    }
    assert_int_equal(moec_gguf_out_close(g, shard_bytes, &err), MOEC_OK);
    return g;
}

static void check_file(const char *path, size_t files)
{
    moec_gguf *g;
    moec_err err = {MOEC_OK, ""};
    if (moec_gguf_open(&g, path, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    assert_int_equal(moec_gguf_files(g), files);
    assert_int_equal(moec_gguf_count(g), TENSORS);
    for (size_t t = 0; t < TENSORS; t++) {
        char name[8];
        snprintf(name, sizeof name, "t%zu", t);
        const moec_gguf_tensor *at = moec_gguf_named(g, name);
        assert_ptr_equal(at, moec_gguf_at(g, t));
        assert_int_equal(at->type, kinds[t]);
        assert_memory_equal(at->dim, dims[t], sizeof dims[t]);
        const unsigned char *p = at->data;
        for (int64_t r = 0; r < dims[t][1] * dims[t][2]; r++)
            for (size_t i = 0; i < row_bytes(t); i++)
                if (*p++ != pattern(t, r, i))
                    fail_msg("%s: byte %zu of row %d differs", name, i, (int)r);
    }
    assert_null(moec_gguf_named(g, "t9"));
    const moec_gguf_index *ix = moec_gguf_front(g);
    int64_t v = 0;
    double x = 0;
    bool yes = false;
    char *s = NULL;
    assert_true(moec_gguf_int(moec_gguf_find(ix, "a.u32"), &v) && v == 4000000000);
    assert_true(moec_gguf_int(moec_gguf_find(ix, "a.i32"), &v) && v == -5);
    assert_true(moec_gguf_real(moec_gguf_find(ix, "a.f32"), &x) && (float)x == 0.1f);
    assert_true(moec_gguf_bool(moec_gguf_find(ix, "a.bool"), &yes) && yes);
    assert_true(moec_gguf_item_int(moec_gguf_find(ix, "a.i32s"), 1, &v) && v == -2);
    assert_true(moec_gguf_item_int(moec_gguf_find(ix, "a.bools"), 1, &v) && v == 1);
    assert_false(moec_gguf_item_int(moec_gguf_find(ix, "a.i32s"), 2, &v));
    assert_true(moec_gguf_item_real(moec_gguf_find(ix, "a.f32s"), 0, &x) && x == 1.5);
    assert_int_equal(moec_gguf_text(&s, moec_gguf_find(ix, "general.architecture"), NULL), MOEC_OK);
    assert_string_equal(s, "qwen3moe");
    moec_free(s);
    moec_gguf_close(g);
}

static void what_is_written_is_read(void **state)
{
    (void)state;
    moec_err err = {MOEC_OK, ""};
    char *dir = tiny_folder(), *path = tiny_path(dir, "one.gguf");
    moec_gguf_out *g = describe(0);
    assert_int_equal(moec_gguf_write(path, g, rows, NULL, &err), MOEC_OK);
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    fseek(f, 0, SEEK_END);
    assert_int_equal((uint64_t)ftell(f), moec_gguf_out_size(g, 0));
    fclose(f);
    check_file(path, 1);
    moec_gguf_out_free(g);
    moec_free(path);
    tiny_remove(dir);
    moec_free(dir);
}

static void a_series_is_written_by_the_folder_writer(void **state)
{
    (void)state;
    static const struct { uint64_t shard; size_t files; } cases[] = {{0, 1}, {1, 5}, {400, 4}, {9000000, 1}};
    for (size_t i = 0; i < MOEC_COUNT(cases); i++) {
        moec_err err = {MOEC_OK, ""};
        char *dir = tiny_folder(), *out = tiny_path(dir, "out"), *name, *path;
        moec_gguf_out *g = describe(cases[i].shard);
        moec_out *o;
        moec_writer *w;
        assert_int_equal(moec_gguf_out_files(g), cases[i].files);
        assert_int_equal(moec_out_new(&o, &err), MOEC_OK);
        assert_int_equal(moec_gguf_out_plan(o, g, "m", rows, NULL, &err), MOEC_OK);
        assert_int_equal(moec_out_close(o, &err), MOEC_OK);
        const moec_writer_options opt = {.dir = out, .identity = "x"};
        assert_int_equal(moec_writer_open(&w, o, &opt, &err), MOEC_OK);
        if (moec_writer_run(w, &err) != MOEC_OK || moec_writer_publish(w, &err) != MOEC_OK)
            fail_msg("%s", err.text);
        moec_writer_close(w);
        assert_int_equal(moec_gguf_out_name(&name, g, "m", 0, &err), MOEC_OK);
        path = tiny_path(out, name);
        check_file(path, cases[i].files);
        moec_gguf *no;
        if (cases[i].files == 5) {
            char *second = tiny_path(out, "m-00002-of-00005.gguf"), *third = tiny_path(out, "m-00003-of-00005.gguf");
            assert_int_equal(moec_gguf_open(&no, second, &err), MOEC_EFORMAT);
            assert_non_null(strstr(err.text, "give the first"));
            err = (moec_err){MOEC_OK, ""};
            assert_int_equal(rename(third, second), 0);
            assert_int_equal(moec_gguf_open(&no, path, &err), MOEC_EFORMAT);
            assert_non_null(strstr(err.text, "says it is file 3 of 5"));
            moec_free(second);
            moec_free(third);
        }
        moec_free(name);
        moec_free(path);
        moec_out_free(o);
        moec_gguf_out_free(g);
        tiny_remove(dir);
        moec_free(out);
        moec_free(dir);
    }
}

static void bad_descriptions_are_refused(void **state)
{
    (void)state;
    static const int64_t ok[] = {32, 2}, odd[] = {33, 2}, huge[] = {INT64_MAX, 8}, less[] = {-1, 2};
    for (int i = 0; i < 9; i++) {
        moec_gguf_out *g;
        moec_err err = {MOEC_OK, ""};
        assert_int_equal(moec_gguf_out_new(&g, &err), MOEC_OK);
        switch (i) {
        case 0: moec_gguf_put_u32(g, "a", 1), moec_gguf_put_bool(g, "a", true); break;
        case 1: moec_gguf_put_u32(g, "", 1); break;
        case 2: moec_gguf_put_u32(g, "split.no", 1); break;
        case 3: moec_gguf_put_tensor(g, "a", 0, 2, ok), moec_gguf_put_tensor(g, "a", 0, 2, ok); break;
        case 4: moec_gguf_put_tensor(g, "a", MOEC_GGML_Q8_0, 2, odd); break;
        case 5: moec_gguf_put_tensor(g, "a", 0, 2, huge); break;
        case 6: moec_gguf_put_tensor(g, "a", 0, 2, less); break;
        case 7: moec_gguf_put_tensor(g, "a", 5, 2, ok); break;
        default: moec_gguf_put_tensor(g, "a", 0, 5, ok); break;
        }
        moec_gguf_put_u32(g, "later", 1); /* after a failure nothing is added and the first cause stays */
        assert_int_equal(moec_gguf_out_close(g, 0, &err), MOEC_EINVAL);
        assert_non_null(strstr(err.text, i == 1 || i == 2 ? "key" : " a"));
        moec_gguf_out_free(g);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bad_fronts_are_refused),
        cmocka_unit_test(bad_keys_are_refused),
        cmocka_unit_test(bad_tensors_are_refused),
        cmocka_unit_test(cut_files_are_refused),
        cmocka_unit_test(what_is_written_is_read),
        cmocka_unit_test(a_series_is_written_by_the_folder_writer),
        cmocka_unit_test(bad_descriptions_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
