/* Opening checkpoint folders: what a safetensors header, an index and a folder may not be, and how it is said. Files are made
 * here byte by byte; reading and writing back of good ones is test_writer's. */
#include "base/file.h"
#include "base/mem.h"
#include "ckpt/ckpt.h"
#include "ckpt/safetensors.h"
#include "tiny.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

/* A whole file: length word, header, n_data zeros. claim: what the length word says; 0: the truth. */
static char *safetensors(size_t *len, const char *header, size_t n_data, uint64_t claim)
{
    size_t n = strlen(header);
    char *bytes = calloc(1, 8 + n + n_data);
    assert_non_null(bytes);
    for (int i = 0; i < 8; i++)
        bytes[i] = (char)(unsigned char)((claim ? claim : n) >> (8 * i));
    memcpy(bytes + 8, header, n);
    *len = 8 + n + n_data;
    return bytes;
}

static void put(const char *dir, const char *name, const void *bytes, size_t n)
{
    moec_err err = {MOEC_OK, ""};
    char *path = tiny_path(dir, name);
    assert_int_equal(moec_file_write(path, bytes, n, &err), MOEC_OK);
    moec_free(path);
}

static void put_text(const char *dir, const char *name, const char *text)
{
    put(dir, name, text, strlen(text));
}

static void put_shard(const char *dir, const char *name, const char *header, size_t n_data)
{
    size_t n;
    char *bytes = safetensors(&n, header, n_data, 0);
    put(dir, name, bytes, n);
    free(bytes);
}

#define A "\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}"
#define B(begin, end) "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[" begin "," end "]}"

static void bad_headers_are_refused(void **state)
{
    static const struct {
        const char *header;
        size_t n_data;
        uint64_t claim;
        const char *text;
    } cases[] = {
        {"{" A "}", 8, 1000000, "cut short"},
        {"{" A "}", 8, UINT64_MAX, "at most 100000000"},
        {"{" A "}", 8, 100000001, "at most 100000000"},
        {"", 8, 0, "not a JSON object"},
        {" {" A "}", 8, 0, "not a JSON object"},
        {"[]", 0, 0, "not a JSON object"},
        {"{" A ",}", 8, 0, "JSON line 1"},
        {"{" A "," A "}", 8, 0, "duplicate"},
        {"{" A "} x", 8, 0, "JSON line 1"},
        {"{\"a\":[]}", 0, 0, "tensor a: not {dtype, shape, data_offsets}"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8],\"more\":1}}", 8, 0, "not {dtype, shape, data_offsets}"},
        {"{\"a\":{\"dtype\":\"F33\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, 0, "unknown dtype F33"},
        {"{\"a\":{\"dtype\":4,\"shape\":[2],\"data_offsets\":[0,8]}}", 8, 0, "not {dtype, shape, data_offsets}"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,2],\"data_offsets\":[0,8]}}", 8, 0, "at most 8"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":2,\"data_offsets\":[0,8]}}", 8, 0, "shape is not a list"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]}}", 8, 0, "not a number >= 0"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2.0],\"data_offsets\":[0,8]}}", 8, 0, "not a number >= 0"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[99999999999999999999],\"data_offsets\":[0,8]}}", 8, 0, "too big integer"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,8]}}", 8, 0, "overflows"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904],\"data_offsets\":[0,8]}}", 8, 0, "overflows"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0]}}", 8, 0, "not [begin, end]"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]}}", 8, 0, "do not lie in"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[-8,0]}}", 8, 0, "do not lie in"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,16]}}", 8, 0, "do not lie in"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,8]}}", 8, 0, "its shape and dtype need 12"},
        {"{" A "," B("4", "8") "}", 8, 0, "tensor b: begins at 4, within the bytes"},
        {"{" A "," B("12", "16") "}", 16, 0, "tensor b: begins at 12, past the end"},
        {"{" A "}", 9, 0, "9 bytes of data, tensors cover 8"},
        {"{\"__metadata__\":{\"a\":1}," A "}", 8, 0, "__metadata__ key a: not a text"},
        {"{\"__metadata__\":[]," A "}", 8, 0, "__metadata__ is not an object"},
    };
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(cases); i++) {
        moec_st_index ix;
        moec_err err = {MOEC_OK, ""};
        size_t n;
        char *bytes = safetensors(&n, cases[i].header, cases[i].n_data, cases[i].claim);
        assert_int_equal(moec_st_parse(&ix, bytes, n, n, "x.safetensors", &err), MOEC_EFORMAT);
        if (!strstr(err.text, cases[i].text) || strncmp(err.text, "x.safetensors: ", 15) != 0)
            fail_msg("case %zu: \"%s\" does not say \"%s\"", i, err.text, cases[i].text);
        moec_st_index_release(&ix);
        free(bytes);
    }
}

/* The reason must survive a name as long as the error text. */
static void long_names_leave_room_for_the_reason(void **state)
{
    moec_st_index ix;
    moec_err err = {MOEC_OK, ""};
    char header[4000];
    size_t n;
    (void)state;
    snprintf(header, sizeof header, "{\"%03000d\":{\"dtype\":\"F33\",\"shape\":[2],\"data_offsets\":[0,8]}}", 1);
    char *bytes = safetensors(&n, header, 8, 0);
    assert_int_equal(moec_st_parse(&ix, bytes, n, n, "x", &err), MOEC_EFORMAT);
    assert_non_null(strstr(err.text, "unknown dtype F33"));
    moec_st_index_release(&ix);
    free(bytes);
}

static void empty_tensors_and_padding_are_fine(void **state)
{
    static const char header[] = "{\"z\":{\"dtype\":\"F32\",\"shape\":[0,5],\"data_offsets\":[8,8]}," A
                                 ",\"y\":{\"dtype\":\"I64\",\"shape\":[0],\"data_offsets\":[0,0]}}   ";
    moec_st_index ix;
    moec_err err = {MOEC_OK, ""};
    size_t n;
    char *bytes = safetensors(&n, header, 8, 0);
    (void)state;
    assert_int_equal(moec_st_parse(&ix, bytes, n, n, "x", &err), MOEC_OK);
    assert_int_equal(ix.n, 3);
    assert_string_equal(ix.entry[0].name, "y");
    assert_string_equal(ix.entry[1].name, "a");
    moec_st_index_release(&ix);
    free(bytes);
}

/* --- folders -------------------------------------------------------------------------------------------------------- */

static void refused(char *dir, moec_status want, const char *text)
{
    moec_ckpt *c;
    moec_err err = {MOEC_OK, ""};
    moec_status st = moec_ckpt_open(&c, dir, &err);
    if (st != want || !strstr(err.text, text))
        fail_msg("status %d, \"%s\" does not say \"%s\"", (int)st, err.text, text);
    assert_null(c);
    tiny_remove(dir);
    moec_free(dir);
}

static char *folder(const char *config)
{
    char *dir = tiny_folder();
    if (config)
        put_text(dir, "config.json", config);
    return dir;
}

static void folders_that_are_no_checkpoint(void **state)
{
    (void)state;
    char *dir = folder(NULL);
    refused(dir, MOEC_EFORMAT, "no config.json");
    refused(folder("{}"), MOEC_EFORMAT, "neither model.safetensors nor");
    refused(folder("[]"), MOEC_EFORMAT, "config.json: not a JSON object");
    refused(folder("{"), MOEC_EFORMAT, "config.json: JSON line 1");
    dir = folder("{}");
    put_text(dir, "model.safetensors", "short");
    refused(dir, MOEC_EFORMAT, "not a safetensors file");
    moec_ckpt *c;
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_ckpt_open(&c, "/nowhere/at/all", &err), MOEC_EIO);
    assert_int_equal(moec_ckpt_open(&c, "/dev/null", &err), MOEC_EFORMAT);
}

/* A named pipe without a writer would block a plain open for ever. */
static void pipes_are_not_waited_for(void **state)
{
    static const char *const names[] = {"config.json", "model.safetensors"};
    (void)state;
    for (int i = 0; i < 2; i++) {
        char *dir = folder(i ? "{}" : NULL), *path = tiny_path(dir, names[i]);
        assert_int_equal(mkfifo(path, 0600), 0);
        moec_free(path);
        refused(dir, MOEC_EFORMAT, i ? "not a safetensors file" : "not a regular file");
    }
}

static char *sharded(const char *index)
{
    char *dir = folder("{}");
    put_shard(dir, "one.safetensors", "{" A "}", 8);
    put_shard(dir, "two.safetensors", "{" B("0", "4") "}", 4);
    put_text(dir, "model.safetensors.index.json", index);
    return dir;
}

static void indexes_are_checked_against_their_shards(void **state)
{
    static const struct {
        const char *index, *text;
    } cases[] = {
        {"{}", "no weight_map"},
        {"{\"weight_map\": {}}", "no weight_map"},
        {"{\"weight_map\": [\"one.safetensors\"]}", "no weight_map"},
        {"{\"weight_map\": {\"a\": 1}}", "its file is not a text"},
        {"{\"weight_map\": {\"a\": \"../one.safetensors\"}}", "outside the folder"},
        {"{\"weight_map\": {\"a\": \"/etc/passwd\"}}", "outside the folder"},
        {"{\"weight_map\": {\"a\": \"\"}}", "outside the folder"},
        {"{\"weight_map\": {\"a\": \"three.safetensors\"}}", "three.safetensors: shard is missing"},
        {"{\"weight_map\": {\"a\": \"two.safetensors\"}}", "tensor a is not in two.safetensors"},
        {"{\"weight_map\": {\"a\": \"one.safetensors\", \"b\": \"one.safetensors\"}}", "tensor b is not in one.safetensors"},
        {"{\"weight_map\": {\"a\": \"config.json\"}}", "config.json: not a safetensors file"},
    };
    moec_ckpt *c;
    moec_err err = {MOEC_OK, ""};
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(cases); i++)
        refused(sharded(cases[i].index), MOEC_EFORMAT, cases[i].text);
    char *dir = sharded("{\"weight_map\": {\"b\": \"two.safetensors\", \"a\": \"one.safetensors\"}}");
    assert_int_equal(moec_ckpt_open(&c, dir, &err), MOEC_OK);
    assert_int_equal(moec_ckpt_count(c), 2);
    assert_int_equal(moec_ckpt_bytes(c), 12);
    assert_string_equal(moec_ckpt_shard_name(c, moec_ckpt_shard_of(c, 1)), "two.safetensors");
    assert_null(moec_ckpt_find(c, "c"));
    moec_ckpt_close(c);
    put_shard(dir, "two.safetensors", "{" A "," B("8", "12") "}", 12);
    refused(dir, MOEC_EFORMAT, "tensor a is in two shards");
}

/* transformers loads model.safetensors, others what the index names: nobody can say which model this is. */
static void two_models_in_one_folder_are_refused(void **state)
{
    moec_ckpt *c;
    moec_err err = {MOEC_OK, ""};
    (void)state;
    char *dir = sharded("{\"weight_map\": {\"b\": \"two.safetensors\", \"a\": \"one.safetensors\"}}");
    put_shard(dir, "model.safetensors", "{" A "}", 8);
    refused(dir, MOEC_EFORMAT, "clients differ");
    dir = sharded("{\"weight_map\": {\"a\": \"model.safetensors\"}}"); /* an index of one shard is usual */
    put_shard(dir, "model.safetensors", "{" A "}", 8);
    assert_int_equal(moec_ckpt_open(&c, dir, &err), MOEC_OK);
    moec_ckpt_close(c);
    tiny_remove(dir);
    moec_free(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bad_headers_are_refused),
        cmocka_unit_test(long_names_leave_room_for_the_reason),
        cmocka_unit_test(empty_tensors_and_padding_are_fine),
        cmocka_unit_test(folders_that_are_no_checkpoint),
        cmocka_unit_test(pipes_are_not_waited_for),
        cmocka_unit_test(indexes_are_checked_against_their_shards),
        cmocka_unit_test(two_models_in_one_folder_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
