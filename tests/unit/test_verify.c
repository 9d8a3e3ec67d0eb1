/* verify finds what is wrong: every kind of damage done to a good output is named, nothing else is, and no damage crashes. */
#include "base/file.h"
#include "base/mem.h"
#include "ckpt/writer.h"
#include "method/plan.h"
#include "run/apply.h"
#include "run/verify.h"
#include "support/tiny.h"

#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

static char *folder, *source, *out;
static moec_model *model;

static void make_output(void)
{
    moec_plan *p;
    moec_digest print;
    moec_apply_result r;
    moec_err err = {MOEC_OK, ""};
    const moec_apply_options opt = {.out = out};
    tiny_remove(out);
    assert_int_equal(moec_ckpt_fingerprint(&print, model->ckpt, NULL), MOEC_OK);
    assert_int_equal(moec_plan_new(&p, model, "test", print.hex, NULL), MOEC_OK);
    for (int64_t l = 0; l < p->n_layers; l++) {
        static const int32_t keep[] = {1, 2, 4, 6, 7};
        assert_int_equal(moec_copy((char **)&p->layer[l].keep, (const char *)keep, sizeof keep, NULL), MOEC_OK);
        p->layer[l].n_keep = MOEC_COUNT(keep);
    }
    if (moec_apply(&r, model, p, &opt, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    moec_plan_free(p);
}

static int set_up(void **state)
{
    (void)state;
    moec_err err = {MOEC_OK, ""};
    const tiny_spec spec = {.shards = 3, .dtype = MOEC_BF16, .seed = 21};
    folder = tiny_folder();
    source = tiny_path(folder, "source");
    out = tiny_path(folder, "out");
    return tiny_write(source, &spec, &err) == MOEC_OK && moec_model_open(&model, source, &err) == MOEC_OK ? 0 : 1;
}

static int tear_down(void **state)
{
    (void)state;
    moec_model_close(model);
    tiny_remove(folder);
    moec_free(folder);
    moec_free(source);
    moec_free(out);
    return 0;
}

/* Number of problems; one of them must say `says`. */
static uint64_t verify(const moec_model *against, const char *says)
{
    moec_verify_report *r;
    moec_err err = {MOEC_OK, ""};
    const moec_verify_options opt = {.source = against, .data = true};
    if (moec_verify(&r, out, &opt, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    bool said = !says;
    for (uint64_t i = 0; i < r->problems && i < MOEC_VERIFY_SHOWN; i++)
        said = said || strstr(r->problem[i], says);
    if (!said)
        fail_msg("%d problems, the first \"%s\"; none says \"%s\"", (int)r->problems, r->problem[0], says);
    moec_json *json = moec_verify_json(r);
    bool ok;
    assert_true(moec_json_bool(moec_json_get(json, "ok"), &ok));
    assert_int_equal(ok, r->problems == 0);
    moec_json_free(json);
    uint64_t n = r->problems;
    moec_verify_free(r);
    return n;
}

static void flip(const char *name, off_t at)
{
    char *path = tiny_path(out, name);
    unsigned char byte;
    struct stat s;
    int fd = open(path, O_RDWR);
    assert_int_equal(fstat(fd, &s), 0);
    if (at < 0)
        at += s.st_size;
    assert_int_equal(pread(fd, &byte, 1, at), 1);
    byte ^= 0x10;
    assert_int_equal(pwrite(fd, &byte, 1, at), 1);
    close(fd);
    moec_free(path);
}

static void replace(const char *name, const char *old, const char *with)
{
    char *path = tiny_path(out, name), *text, *edited;
    size_t len;
    assert_int_equal(moec_file_read(&text, &len, path, 1 << 24, NULL), MOEC_OK);
    char *at = strstr(text, old);
    assert_non_null(at);
    assert_int_equal(moec_format(&edited, NULL, "%.*s%s%s", (int)(at - text), text, with, at + strlen(old)), MOEC_OK);
    assert_int_equal(moec_file_write(path, edited, strlen(edited), NULL), MOEC_OK);
    moec_free(edited);
    moec_free(text);
    moec_free(path);
}

static void test_good(void **state)
{
    (void)state;
    make_output();
    assert_int_equal(verify(model, NULL), 0);
    assert_int_equal(verify(NULL, NULL), 0);
}

static void test_bytes(void **state)
{
    (void)state;
    static const char *const shards[] = {"model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
                                         "model-00003-of-00003.safetensors"};
    for (size_t s = 0; s < MOEC_COUNT(shards); s++)
        for (off_t back = 1; back < 6000; back += 977) {
            make_output();
            flip(shards[s], -back);
            verify(model, "of its data is");
            assert_true(verify(model, "its hash is") >= 2);
            verify(NULL, "its hash is");
        }
}

/* Header bytes: whatever becomes of them, it is noticed. */
static void test_header(void **state)
{
    (void)state;
    for (off_t at = 0; at < 400; at += 13) {
        make_output();
        flip("model-00001-of-00003.safetensors", at);
        assert_true(verify(model, NULL) > 0);
    }
}

static void test_files(void **state)
{
    (void)state;
    char *stray = tiny_path(out, "extra.txt"), *gone = tiny_path(out, "README.md"), *manifest = tiny_path(out, MOEC_MANIFEST);
    char *shard = tiny_path(out, "model-00002-of-00003.safetensors");
    make_output();
    assert_int_equal(moec_file_write(stray, "x", 1, NULL), MOEC_OK);
    assert_int_equal(verify(model, "extra.txt is a stray file"), 1);
    make_output();
    assert_int_equal(unlink(gone), 0);
    verify(model, "README.md is missing");
    make_output();
    flip("README.md", 3);
    verify(model, "README.md: its hash is");
    make_output();
    assert_int_equal(unlink(manifest), 0);
    verify(model, "moecompress.json is missing");
    verify(NULL, "moecompress.json is missing");
    make_output();
    assert_int_equal(moec_file_write(manifest, "{\"plan\": 3", 10, NULL), MOEC_OK);
    verify(model, "moecompress.json");
    make_output();
    assert_int_equal(unlink(shard), 0);
    verify(model, "model-00002-of-00003.safetensors");
    make_output();
    assert_int_equal(truncate(shard, 100), 0);
    assert_true(verify(model, NULL) > 0);
    tiny_remove(out);
    assert_true(verify(model, NULL) > 0);
    moec_free(stray);
    moec_free(gone);
    moec_free(manifest);
    moec_free(shard);
}

static void test_numbers(void **state)
{
    (void)state;
    make_output();
    replace("config.json", "\"num_experts_per_tok\": 2", "\"num_experts_per_tok\": 1");
    verify(model, "top-k 1");
    make_output();
    replace("config.json", "\"rms_norm_eps\"", "\"rms_norm_eqs\"");
    verify(model, "config.json is not the source's");
    verify(NULL, "config.json: its hash");
    make_output();
    replace("config.json", "\"num_experts\": 5", "\"num_experts\": 4");
    assert_true(verify(model, NULL) > 0);
    make_output();
    replace("model.safetensors.index.json", "\"total_size\": ", "\"total_size\": 1");
    verify(model, "total_size");
    make_output();
    replace("model.safetensors.index.json", "\"model.norm.weight\": \"model-00003", "\"model.norm.weight\": \"model-00001");
    assert_true(verify(model, NULL) > 0);
    make_output();
    replace(MOEC_MANIFEST, "\"keep\": [1, 2, 4", "\"keep\": [0, 2, 4"); /* the plan says other experts than are there */
    verify(model, "of its data is");
}

/* Two experts exchanged: shapes and names are right, the bytes are the wrong ones. */
static void test_other_expert(void **state)
{
    (void)state;
    moec_model *o;
    make_output();
    assert_int_equal(moec_model_open(&o, out, NULL), MOEC_OK);
    const moec_tensor *a = o->layer[0].expert[1].up.of, *b = o->layer[0].expert[3].up.of;
    char *x, *path = tiny_path(out, moec_ckpt_shard_name(o->ckpt, moec_ckpt_shard_of(o->ckpt, (size_t)(a - moec_ckpt_at(o->ckpt, 0)))));
    assert_int_equal(moec_copy(&x, b->data, b->bytes, NULL), MOEC_OK);
    int fd = open(path, O_RDWR);
    assert_int_equal(pwrite(fd, x, a->bytes, (off_t)moec_ckpt_offset(o->ckpt, (size_t)(a - moec_ckpt_at(o->ckpt, 0)))),
                     (ssize_t)a->bytes);
    close(fd);
    moec_free(x);
    moec_free(path);
    moec_model_close(o);
    verify(model, "experts.1.up_proj.weight: byte");
}

static void test_other_source(void **state)
{
    (void)state;
    char *dir = tiny_path(folder, "other");
    const tiny_spec spec = {.shards = 3, .dtype = MOEC_BF16, .seed = 22};
    moec_model *other;
    assert_int_equal(tiny_write(dir, &spec, NULL), MOEC_OK);
    assert_int_equal(moec_model_open(&other, dir, NULL), MOEC_OK);
    make_output();
    verify(other, "is not the source");
    moec_model_close(other);
    moec_free(dir);
}

static void test_clients(void **state)
{
    (void)state;
    moec_client c[MOEC_VERIFY_CLIENTS];
    int n = moec_clients(c, model);
    assert_true(n >= 3);
    for (int i = 0; i < n; i++)
        assert_true(c[i].name && c[i].reason[0]);
    assert_true(c[0].loads);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_good),         cmocka_unit_test(test_bytes),  cmocka_unit_test(test_header),
        cmocka_unit_test(test_files),        cmocka_unit_test(test_numbers), cmocka_unit_test(test_other_expert),
        cmocka_unit_test(test_other_source), cmocka_unit_test(test_clients),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
