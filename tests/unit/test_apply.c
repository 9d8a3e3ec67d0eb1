/* Plans carried out: what stays is the source's bytes, what changes is exactly what the plan says, in both families, every
 * dtype, one file and many; and the laws: all kept changes nothing, threads do not matter. */
#include "base/file.h"
#include "base/mem.h"
#include "base/par.h"
#include "ckpt/writer.h"
#include "run/apply.h"
#include "support/tiny.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

static char *folder, *source, *out, *other;

static int set_up(void **state)
{
    (void)state;
    folder = tiny_folder();
    source = tiny_path(folder, "source");
    out = tiny_path(folder, "out");
    other = tiny_path(folder, "other");
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    tiny_remove(folder);
    char *all[] = {folder, source, out, other};
    for (size_t i = 0; i < MOEC_COUNT(all); i++)
        moec_free(all[i]);
    return 0;
}

static moec_model *open_new(const tiny_spec *spec)
{
    moec_model *m;
    moec_err err = {MOEC_OK, ""};
    tiny_remove(source);
    tiny_remove(out);
    tiny_remove(other);
    if (tiny_write(source, spec, &err) != MOEC_OK || moec_model_open(&m, source, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    return m;
}

/* Another set of the same size in every layer. */
static moec_plan *make(const moec_model *m, int64_t keep, uint64_t seed)
{
    moec_plan *p;
    moec_digest print;
    assert_int_equal(moec_ckpt_fingerprint(&print, m->ckpt, NULL), MOEC_OK);
    assert_int_equal(moec_plan_new(&p, m, "test", print.hex, NULL), MOEC_OK);
    for (int64_t l = 0; l < p->n_layers; l++) {
        moec_plan_layer *pl = &p->layer[l];
        assert_int_equal(MOEC_NEW(pl->keep, (size_t)keep, NULL), MOEC_OK);
        for (int64_t e = 0; e < pl->n_experts; e++) {
            int64_t left = pl->n_experts - e, need = keep - pl->n_keep;
            seed = seed * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
            if ((int64_t)(seed >> 33) % left < need)
                pl->keep[pl->n_keep++] = (int32_t)e;
        }
        assert_int_equal(pl->n_keep, keep);
    }
    if (p->new_top_k > keep)
        p->new_top_k = keep;
    return p;
}

static void apply_to(const char *dir, const moec_model *m, const moec_plan *p)
{
    moec_apply_result r;
    moec_err err = {MOEC_OK, ""};
    const moec_apply_options opt = {.out = dir, .resume = true};
    if (moec_apply(&r, m, p, &opt, &err) != MOEC_OK)
        fail_msg("%s", err.text);
}

static char *read_text(const char *dir, const char *name, size_t *len)
{
    char *path = tiny_path(dir, name), *bytes;
    moec_err err = {MOEC_OK, ""};
    if (moec_file_read(&bytes, len, path, 1 << 30, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    moec_free(path);
    return bytes;
}

static void same_file(const char *a, const char *b, const char *name)
{
    size_t n, k;
    char *x = read_text(a, name, &n), *y = read_text(b, name, &k);
    if (n != k || memcmp(x, y, n) != 0)
        fail_msg("%s differs between %s and %s", name, a, b);
    moec_free(x);
    moec_free(y);
}

static void same_folder(const char *a, const char *b)
{
    char **x, **y;
    size_t n, k;
    assert_int_equal(moec_dir_list(&x, &n, a, NULL), MOEC_OK);
    assert_int_equal(moec_dir_list(&y, &k, b, NULL), MOEC_OK);
    assert_int_equal(n, k);
    for (size_t i = 0; i < n; i++) {
        assert_string_equal(x[i], y[i]);
        same_file(a, b, x[i]);
    }
    moec_names_free(x, n);
    moec_names_free(y, k);
}

static void same_bytes(const moec_tensor *a, const moec_tensor *b)
{
    assert_int_equal(a->dtype, b->dtype);
    assert_int_equal(a->bytes, b->bytes);
    assert_int_equal(a->rank, b->rank);
    assert_memory_equal(a->dim, b->dim, (size_t)a->rank * sizeof a->dim[0]);
    assert_memory_equal(a->data, b->data, a->bytes);
}

/* The output through the model's own eyes: expert k of a layer is expert keep[k] of the source, and so are router rows. */
static void check_output(const moec_model *m, const moec_plan *p)
{
    moec_model *o;
    moec_err err = {MOEC_OK, ""};
    if (moec_model_open(&o, out, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    assert_int_equal(o->dims.experts, p->layer[0].n_keep);
    assert_int_equal(o->dims.top_k, p->new_top_k);
    for (int64_t l = 0; l < p->n_layers; l++) {
        const moec_plan_layer *pl = &p->layer[l];
        const moec_layer *a = &m->layer[pl->layer], *b = &o->layer[pl->layer];
        const moec_tensor *ra = a->mat[MOEC_MAT_ROUTER].of, *rb = b->mat[MOEC_MAT_ROUTER].of;
        size_t row = ra->bytes / (size_t)ra->dim[0];
        assert_int_equal(rb->bytes, row * (size_t)pl->n_keep);
        for (int64_t k = 0; k < pl->n_keep; k++) {
            same_bytes(b->expert[k].gate.of, a->expert[pl->keep[k]].gate.of);
            same_bytes(b->expert[k].up.of, a->expert[pl->keep[k]].up.of);
            same_bytes(b->expert[k].down.of, a->expert[pl->keep[k]].down.of);
            assert_memory_equal((const char *)rb->data + (size_t)k * row, (const char *)ra->data + (size_t)pl->keep[k] * row,
                                row);
        }
        same_bytes(a->mat[MOEC_MAT_Q].of, b->mat[MOEC_MAT_Q].of);
        same_bytes(a->vec[MOEC_VEC_NORM_MLP], b->vec[MOEC_VEC_NORM_MLP]);
    }
    same_bytes(m->embedding.of, o->embedding.of);
    same_bytes(m->head.of, o->head.of);
    if (m->dims.layers > 1 && m->layer[1].mat[MOEC_MAT_DENSE_UP].of)
        same_bytes(m->layer[1].mat[MOEC_MAT_DENSE_UP].of, o->layer[1].mat[MOEC_MAT_DENSE_UP].of);
    moec_model_close(o);
}

static void test_forms(void **state)
{
    (void)state;
    static const tiny_spec specs[] = {
        {.family = "qwen3_moe", .seed = 1},
        {.family = "qwen3_moe", .dtype = MOEC_BF16, .shards = 3, .seed = 2},
        {.family = "qwen3_moe", .dtype = MOEC_BF16, .router_f32 = true, .shards = 2, .untied = true, .seed = 3},
        {.family = "qwen3_moe", .dense_layer = 2, .dtype = MOEC_F16, .seed = 4},
        {.family = "mixtral", .untied = true, .dtype = MOEC_F16, .seed = 5},
        {.family = "mixtral", .untied = true, .shards = 5, .seed = 6},
        {.family = "mixtral", .experts = 12, .top_k = 3, .shards = 1, .untied = true, .seed = 7},
    };
    for (size_t i = 0; i < MOEC_COUNT(specs); i++) {
        moec_model *m = open_new(&specs[i]);
        for (int64_t keep = 1; keep <= m->dims.experts; keep += i < 2 ? 1 : 3) {
            moec_plan *p = make(m, keep, (uint64_t)keep + 100 * i);
            tiny_remove(out);
            apply_to(out, m, p);
            check_output(m, p);
            same_file(source, out, "generation_config.json");
            same_file(source, out, "README.md");
            moec_plan_free(p);
        }
        moec_model_close(m);
    }
}

/* Keeping all of them changes no tensor and no file; only the manifest is new. */
static void test_keep_all(void **state)
{
    (void)state;
    const tiny_spec spec = {.dtype = MOEC_BF16, .shards = 3, .seed = 8};
    moec_model *m = open_new(&spec), *o;
    moec_plan *p = make(m, 8, 1);
    apply_to(out, m, p);
    assert_int_equal(moec_model_open(&o, out, NULL), MOEC_OK);
    assert_int_equal(moec_ckpt_count(o->ckpt), moec_ckpt_count(m->ckpt));
    for (size_t i = 0; i < moec_ckpt_count(m->ckpt); i++) { /* the same order, too */
        assert_string_equal(moec_ckpt_at(m->ckpt, i)->name, moec_ckpt_at(o->ckpt, i)->name);
        same_bytes(moec_ckpt_at(m->ckpt, i), moec_ckpt_at(o->ckpt, i));
    }
    static const char *const files[] = {"config.json", "model.safetensors.index.json", "generation_config.json"};
    for (size_t i = 0; i < MOEC_COUNT(files); i++)
        same_file(source, out, files[i]);
    moec_model_close(o);
    moec_plan_free(p);
    moec_model_close(m);
}

static void test_same_bytes(void **state)
{
    (void)state;
    const tiny_spec spec = {.shards = 4, .hidden = 64, .width = 96, .vocab = 5000, .seed = 9};
    moec_model *m = open_new(&spec);
    moec_plan *p = make(m, 5, 2);
    moec_par_set_threads(1);
    apply_to(out, m, p);
    moec_par_set_threads(2);
    apply_to(other, m, p);
    moec_par_set_threads(0);
    same_folder(out, other);
    moec_plan_free(p);
    moec_model_close(m);
}

/* One tensor a shard: shards of removed experts vanish, the others are renumbered without holes. */
static void test_renumbered_shards(void **state)
{
    (void)state;
    const tiny_spec spec = {.layers = 1, .experts = 4, .top_k = 1, .shards = 23, .seed = 10}; /* 12 of them experts */
    moec_model *m = open_new(&spec), *o;
    moec_plan *p = make(m, 2, 3);
    assert_int_equal(moec_ckpt_count(m->ckpt), 23);
    apply_to(out, m, p);
    assert_int_equal(moec_model_open(&o, out, NULL), MOEC_OK);
    assert_int_equal(moec_ckpt_shards(o->ckpt), 17);
    for (size_t s = 0; s < 17; s++) {
        char name[64];
        snprintf(name, sizeof name, "model-%05zu-of-00017.safetensors", s + 1);
        assert_string_equal(moec_ckpt_shard_name(o->ckpt, s), name);
    }
    moec_model_close(o);
    check_output(m, p);
    moec_plan_free(p);
    moec_model_close(m);
}

static int64_t int_at(const char *dir, const char *file, const char *a, const char *b)
{
    char *path = tiny_path(dir, file);
    moec_json *v;
    int64_t n = -1;
    assert_int_equal(moec_json_read(&v, path, 1 << 24, NULL), MOEC_OK);
    moec_json_int(b ? moec_json_get(moec_json_get(v, a), b) : moec_json_get(v, a), &n);
    moec_json_free(v);
    moec_free(path);
    return n;
}

static void test_numbers(void **state)
{
    (void)state;
    const tiny_spec both = {.both_keys = true, .shards = 2, .seed = 11}, none = {.family = "mixtral", .no_keys = true,
                                                                                 .untied = true, .seed = 12};
    moec_model *m = open_new(&both);
    moec_plan *p = make(m, 1, 4);
    moec_sizes sizes;
    apply_to(out, m, p);
    assert_int_equal(int_at(out, "config.json", "num_experts", NULL), 1);
    assert_int_equal(int_at(out, "config.json", "num_local_experts", NULL), 1);
    assert_int_equal(int_at(out, "config.json", "num_experts_per_tok", NULL), 1);
    moec_plan_free(p);
    moec_model_close(m);
    assert_int_equal(moec_model_open(&m, out, NULL), MOEC_OK);
    assert_int_equal(moec_model_sizes(&sizes, m, NULL), MOEC_OK);
    assert_int_equal(int_at(out, "model.safetensors.index.json", "metadata", "total_size"), sizes.bytes);
    assert_int_equal(int_at(out, "model.safetensors.index.json", "metadata", "total_parameters"), sizes.total);
    moec_model_close(m);
    m = open_new(&none); /* the family's defaults were in force; now they must be written down */
    p = make(m, 1, 5);
    apply_to(out, m, p);
    assert_int_equal(int_at(out, "config.json", "num_local_experts", NULL), 1);
    assert_int_equal(int_at(out, "config.json", "num_experts_per_tok", NULL), 1);
    check_output(m, p);
    moec_plan_free(p);
    moec_model_close(m);
}

/* A tensor that a shard holds and the index does not list is one like others; the output's index lists all. */
static void test_unlisted(void **state)
{
    static const char *const name[] = {"model.layers.1.mlp.experts.3.up_proj.weight", "model.norm.weight",
                                       "model.layers.0.mlp.gate.weight"};
    (void)state;
    const tiny_spec spec = {.shards = 3, .seed = 15};
    moec_json *index, *kept = moec_json_new_object(), *value;
    moec_model *m = open_new(&spec), *o;
    const size_t n = moec_ckpt_count(m->ckpt);
    char *path = tiny_path(source, "model.safetensors.index.json"), *text;
    void *it = NULL;
    const char *key;
    moec_model_close(m);
    assert_int_equal(moec_json_read(&index, path, 1 << 20, NULL), MOEC_OK);
    while (moec_json_each(moec_json_get(index, "weight_map"), &it, &key, &value))
        if (strcmp(key, name[0]) != 0 && strcmp(key, name[1]) != 0 && strcmp(key, name[2]) != 0)
            moec_json_set(kept, key, moec_json_new_string(moec_json_string(value)));
    assert_int_equal(moec_json_len(kept), n - MOEC_COUNT(name));
    moec_json_set(index, "weight_map", kept);
    assert_int_equal(moec_json_dump(&text, index, 0, NULL), MOEC_OK);
    assert_int_equal(moec_file_write(path, text, strlen(text), NULL), MOEC_OK);
    moec_json_free(index);
    moec_free(text);
    moec_free(path);
    for (int64_t keep = 4; keep <= 8; keep += 4) {
        moec_err err = {MOEC_OK, ""};
        tiny_remove(out);
        if (moec_model_open(&m, source, &err) != MOEC_OK)
            fail_msg("%s", err.text);
        moec_plan *p = make(m, keep, 7);
        apply_to(out, m, p);
        check_output(m, p);
        assert_int_equal(moec_model_open(&o, out, NULL), MOEC_OK);
        assert_int_equal(moec_json_len(moec_json_get(moec_ckpt_index(o->ckpt), "weight_map")), moec_ckpt_count(o->ckpt));
        assert_non_null(moec_ckpt_find(o->ckpt, "model.norm.weight"));
        moec_model_close(o);
        moec_plan_free(p);
        moec_model_close(m);
    }
}

/* config.json is edited, not rewritten: odd spacing, unknown keys, number spellings and a missing last newline survive. */
static void test_config_text(void **state)
{
    (void)state;
    const tiny_spec spec = {.seed = 13};
    size_t n;
    moec_model_close(open_new(&spec));
    char *text = read_text(source, "config.json", &n), *edited, *path = tiny_path(source, "config.json"), *tail;
    assert_int_equal(moec_format(&edited, NULL, "{\t\"odd\" :[1e5,  1.50, {\"num_experts\": 8}],\r\n%s", text + 1), MOEC_OK);
    assert_int_equal(moec_file_write(path, edited, strlen(edited), NULL), MOEC_OK);
    moec_model *m;
    assert_int_equal(moec_model_open(&m, source, NULL), MOEC_OK);
    moec_plan *p = make(m, 4, 6);
    apply_to(out, m, p);
    moec_free(text);
    text = read_text(out, "config.json", &n);
    tail = strstr(edited, "\"num_experts\": 8,");
    assert_non_null(tail);
    tail[15] = '4';
    assert_string_equal(text, edited);
    moec_plan_free(p);
    moec_model_close(m);
    moec_free(text);
    moec_free(edited);
    moec_free(path);
}

static void put(const char *name, const char *text)
{
    char *path = tiny_path(source, name);
    assert_int_equal(moec_file_write(path, text, strlen(text), NULL), MOEC_OK);
    moec_free(path);
}

static bool is_there(const char *name)
{
    char *path = tiny_path(out, name);
    bool there = moec_path_exists(path);
    moec_free(path);
    return there;
}

/* A folder as a hub cache has it: links to blobs, other formats, folders, things that lead nowhere. */
static void test_side_files(void **state)
{
    (void)state;
    static const char *const copied[] = {"tokenizer.json", "chat_template.jinja", "modeling_x.py", ".gitattributes",
                                         "training_args.bin", "model.safetensors.notes"};
    static const char *const left[] = {"pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "x.gguf",
                                       "consolidated.00.pth", "consolidated.safetensors", "nowhere", "original", ".git"};
    const tiny_spec spec = {.seed = 14};
    moec_model_close(open_new(&spec));
    for (size_t i = 0; i < MOEC_COUNT(copied); i++)
        put(copied[i], copied[i]);
    for (size_t i = 0; i < 5; i++)
        put(left[i], "x");
    char *dangling = tiny_path(source, "nowhere"), *original = tiny_path(source, "original"), *git = tiny_path(source, ".git");
    char *blob = tiny_path(folder, "blob"), *linked = tiny_path(source, "vocab.json"), *pipe_path = tiny_path(source, "fifo");
    assert_int_equal(symlink("/does/not/exist", dangling), 0);
    assert_int_equal(moec_dir_make(original, NULL), MOEC_OK);
    assert_int_equal(moec_dir_make(git, NULL), MOEC_OK);
    assert_int_equal(moec_file_write(blob, "blob", 4, NULL), MOEC_OK);
    assert_int_equal(symlink("../blob", linked), 0);
    assert_int_equal(mkfifo(pipe_path, 0666), 0);
    moec_model *m;
    assert_int_equal(moec_model_open(&m, source, NULL), MOEC_OK);
    moec_plan *p = make(m, 4, 7);
    apply_to(out, m, p);
    for (size_t i = 0; i < MOEC_COUNT(copied); i++)
        same_file(source, out, copied[i]);
    for (size_t i = 0; i < MOEC_COUNT(left); i++)
        assert_false(is_there(left[i]));
    assert_false(is_there("fifo"));
    same_file(source, out, "vocab.json");
    struct stat s;
    char *copy = tiny_path(out, "vocab.json");
    assert_int_equal(lstat(copy, &s), 0);
    assert_true(S_ISREG(s.st_mode)); /* the bytes, not the link */
    char *all[] = {dangling, original, git, blob, linked, pipe_path, copy};
    for (size_t i = 0; i < MOEC_COUNT(all); i++)
        moec_free(all[i]);
    moec_plan_free(p);
    moec_model_close(m);
}

static void test_refusals(void **state)
{
    (void)state;
    const tiny_spec spec = {.seed = 15};
    moec_model *m = open_new(&spec);
    moec_plan *p = make(m, 4, 8);
    moec_apply_result r;
    moec_err err = {MOEC_OK, ""};
    moec_apply_options opt = {.out = source, .overwrite = true};
    assert_int_equal(moec_apply(&r, m, p, &opt, &err), MOEC_EINVAL);
    opt = (moec_apply_options){.out = out, .max_memory = 1 << 20};
    assert_int_equal(moec_apply(&r, m, p, &opt, &err), MOEC_ENOFIT);
    opt = (moec_apply_options){.out = out};
    p->layer[0].n_experts = 7;
    assert_int_equal(moec_apply(&r, m, p, &opt, &err), MOEC_EFORMAT);
    p->layer[0].n_experts = 8;
    assert_int_equal(moec_apply_estimate(&r, m, p, &opt, &err), MOEC_OK);
    assert_false(moec_path_exists(out));
    uint64_t disk = r.disk_bytes, bytes = r.output_bytes;
    apply_to(out, m, p);
    assert_int_equal(moec_apply(&r, m, p, &opt, &err), MOEC_EEXIST);
    char **names;
    size_t n;
    uint64_t there = 0;
    assert_int_equal(moec_dir_list(&names, &n, out, NULL), MOEC_OK);
    for (size_t i = 0; i < n; i++) {
        size_t len;
        char *text = read_text(out, names[i], &len);
        if (strcmp(names[i], MOEC_MANIFEST) != 0)
            there += len;
        moec_free(text);
    }
    assert_int_equal(there, disk); /* what the dry run promises */
    moec_model *o;
    assert_int_equal(moec_model_open(&o, out, NULL), MOEC_OK);
    assert_int_equal(moec_ckpt_bytes(o->ckpt), bytes);
    moec_model_close(o);
    moec_names_free(names, n);
    moec_plan_free(p);
    moec_model_close(m);
}

/* Every allocation fails once: a status comes back, nothing has the final name, nothing leaks (run under ASan). */
static void test_out_of_memory(void **state)
{
    (void)state;
    const tiny_spec spec = {.layers = 1, .experts = 3, .top_k = 1, .shards = 2, .seed = 16};
    moec_model *m = open_new(&spec);
    moec_plan *p = make(m, 2, 9);
    moec_par_set_threads(1);
    for (long k = 0;; k++) {
        moec_apply_result r;
        moec_err err = {MOEC_OK, ""};
        const moec_apply_options opt = {.out = out, .resume = true};
        moec_test_allocs_left = k;
        moec_status st = moec_apply(&r, m, p, &opt, &err);
        moec_test_allocs_left = 0x7fffffffL;
        if (st == MOEC_OK)
            break;
        if (st != MOEC_ENOMEM)
            fail_msg("allocation %ld: code %d, %s", k, (int)st, err.text);
        assert_false(moec_path_exists(out));
    }
    moec_par_set_threads(0);
    check_output(m, p);
    moec_plan_free(p);
    moec_model_close(m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_forms),   cmocka_unit_test(test_keep_all),   cmocka_unit_test(test_same_bytes),
        cmocka_unit_test(test_renumbered_shards), cmocka_unit_test(test_numbers), cmocka_unit_test(test_config_text),
        cmocka_unit_test(test_unlisted),
        cmocka_unit_test(test_side_files), cmocka_unit_test(test_refusals), cmocka_unit_test(test_out_of_memory),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
