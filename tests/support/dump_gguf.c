/* dump_gguf FILE: keys and tensors of a GGUF, a line each, tensors with the FNV-1a hash of their bytes.
 * dump_gguf FILE STEM SHARD_BYTES: also writes it again as STEM.gguf or as a series, keys of the kinds that we write. */
#include "base/file.h"
#include "base/mem.h"
#include "ckpt/gguf_write.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void print_value(const moec_gguf_value *v)
{
    int64_t n;
    double x;
    bool b;
    moec_gguf_texts it = {0};
    const char *text, *sep = " ";
    size_t len;
    printf("key %s", v->key);
    if (moec_gguf_int(v, &n))
        printf(" %" PRId64, n);
    else if (moec_gguf_bool(v, &b))
        printf(" %s", b ? "true" : "false");
    else if (moec_gguf_real(v, &x))
        printf(" %.*g", v->kind == MOEC_GGUF_F64 && x == 0.1 ? 15 : 17, x);
    else if (v->kind == MOEC_GGUF_TEXT)
        printf(" text of %" PRIu64, v->n);
    while (moec_gguf_each_text(v, &it, &text, &len))
        printf("%s%zu", sep, len);
    for (uint64_t i = 0; v->kind == MOEC_GGUF_ARRAY && i < v->n; i++) {
        if (moec_gguf_item_int(v, i, &n))
            printf(" %" PRId64, n);
        else if (moec_gguf_item_real(v, i, &x))
            printf(" %.17g", x);
    }
    printf("\n");
}

static void print_tensor(const moec_gguf_tensor *t)
{
    uint64_t h = UINT64_C(0xcbf29ce484222325);
    for (uint64_t i = 0; i < t->bytes; i++)
        h = (h ^ ((const unsigned char *)t->data)[i]) * UINT64_C(0x100000001b3);
    printf("tensor %s %s ", t->name, moec_ggml_type(t->type)->name);
    for (int i = 0; i < t->rank; i++)
        printf("%s%" PRId64, i ? "x" : "", t->dim[i]);
    printf(" %016" PRIx64 "\n", h);
}

/* --- the copy -------------------------------------------------------------------------------------------------------- */

static void put_texts(moec_gguf_out *o, const moec_gguf_value *v)
{
    moec_gguf_texts it = {0};
    const char *text;
    size_t len;
    char **all = calloc((size_t)v->n + 1, sizeof *all);
    for (size_t i = 0; moec_gguf_each_text(v, &it, &text, &len); i++)
        if (moec_copy(&all[i], text, len, NULL) != MOEC_OK)
            abort();
    moec_gguf_put_texts(o, v->key, (const char *const *)all, (size_t)v->n);
    for (size_t i = 0; i < v->n; i++)
        moec_free(all[i]);
    free(all);
}

static void put_key(moec_gguf_out *o, const moec_gguf_value *v)
{
    int64_t n = 0;
    double x = 0;
    bool yes = false;
    char *text = NULL;
    moec_gguf_int(v, &n);
    moec_gguf_real(v, &x);
    moec_gguf_bool(v, &yes);
    if (v->kind == MOEC_GGUF_U32) {
        moec_gguf_put_u32(o, v->key, (uint32_t)n);
    } else if (v->kind == MOEC_GGUF_I32) {
        moec_gguf_put_i32(o, v->key, (int32_t)n);
    } else if (v->kind == MOEC_GGUF_F32) {
        moec_gguf_put_f32(o, v->key, (float)x);
    } else if (v->kind == MOEC_GGUF_BOOL) {
        moec_gguf_put_bool(o, v->key, yes);
    } else if (v->kind == MOEC_GGUF_TEXT && moec_gguf_text(&text, v, NULL) == MOEC_OK) {
        moec_gguf_put_text(o, v->key, text);
        moec_free(text);
    } else if (v->kind == MOEC_GGUF_ARRAY && v->item == MOEC_GGUF_TEXT) {
        put_texts(o, v);
    } else if (v->kind == MOEC_GGUF_ARRAY && v->item == MOEC_GGUF_I32) {
        int32_t *all = calloc((size_t)v->n + 1, sizeof *all);
        for (uint64_t i = 0; moec_gguf_item_int(v, i, &n); i++)
            all[i] = (int32_t)n;
        moec_gguf_put_i32s(o, v->key, all, (size_t)v->n);
        free(all);
    } else if (v->kind == MOEC_GGUF_ARRAY && v->item == MOEC_GGUF_BOOL) {
        bool *all = calloc((size_t)v->n + 1, sizeof *all);
        for (uint64_t i = 0; moec_gguf_item_int(v, i, &n); i++)
            all[i] = n != 0;
        moec_gguf_put_bools(o, v->key, all, (size_t)v->n);
        free(all);
    }
}

static moec_status rows(void *out, void *ctx, size_t t, int64_t lo, int64_t hi, moec_err *err)
{
    const moec_gguf_tensor *from = moec_gguf_at(ctx, t);
    int64_t all = from->dim[1] * from->dim[2] * from->dim[3];
    const size_t row = all > 0 ? (size_t)from->bytes / (size_t)all : 0;
    (void)err;
    memcpy(out, (const char *)from->data + (size_t)lo * row, (size_t)(hi - lo) * row);
    return MOEC_OK;
}

static moec_status copy(moec_gguf *g, const char *stem, uint64_t shard, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_gguf_out *o = NULL;
    moec_out *list = NULL;
    moec_writer *w = NULL;
    char *path = NULL, *folder = NULL;
    const moec_gguf_index *ix = moec_gguf_front(g);
    MOEC_TRY(moec_gguf_out_new(&o, err));
    for (size_t i = 0; i < ix->n_values; i++)
        put_key(o, &ix->value[i]);
    for (size_t i = 0; i < moec_gguf_count(g); i++) {
        const moec_gguf_tensor *t = moec_gguf_at(g, i);
        moec_gguf_put_tensor(o, t->name, t->type, t->rank, t->dim);
    }
    MOEC_TRY(moec_gguf_out_close(o, shard, err));
    if (moec_gguf_out_files(o) == 1) {
        MOEC_TRY(moec_gguf_out_name(&path, o, stem, 0, err));
        MOEC_TRY(moec_gguf_write(path, o, rows, g, err));
    } else { /* into STEM.dir, then beside STEM */
        MOEC_TRY(moec_format(&folder, err, "%s.dir", stem));
        MOEC_TRY(moec_out_new(&list, err));
        MOEC_TRY(moec_gguf_out_plan(list, o, moec_path_base(stem), rows, g, err));
        MOEC_TRY(moec_out_close(list, err));
        const moec_writer_options opt = {.dir = folder, .identity = "copy"};
        MOEC_TRY(moec_writer_open(&w, list, &opt, err));
        MOEC_TRY(moec_writer_run(w, err));
        MOEC_TRY(moec_writer_publish(w, err));
        for (size_t i = 0; i < moec_gguf_out_files(o); i++) {
            char from[4096], to[4096];
            snprintf(to, sizeof to, "%s-%05zu-of-%05zu.gguf", stem, i + 1, moec_gguf_out_files(o));
            snprintf(from, sizeof from, "%s/%s", folder, moec_path_base(to));
            if (rename(from, to) != 0)
                MOEC_TRY(moec_fail(err, MOEC_EIO, "%s: cannot be moved", from));
        }
    }
done:
    moec_writer_close(w);
    moec_out_free(list);
    moec_gguf_out_free(o);
    moec_free(path);
    moec_free(folder);
    return st;
}

int main(int argc, char **argv)
{
    moec_err err = {MOEC_OK, ""};
    moec_gguf *g = NULL;
    if (argc != 2 && argc != 4)
        return 2;
    moec_status st = moec_gguf_open(&g, argv[1], &err);
    if (st == MOEC_OK) {
        const moec_gguf_index *ix = moec_gguf_front(g);
        for (size_t i = 0; i < ix->n_values; i++)
            print_value(&ix->value[i]);
        for (size_t i = 0; i < moec_gguf_count(g); i++)
            print_tensor(moec_gguf_at(g, i));
    }
    if (st == MOEC_OK && argc == 4)
        st = copy(g, argv[2], strtoull(argv[3], NULL, 10), &err);
    if (st != MOEC_OK)
        fprintf(stderr, "dump_gguf: %s\n", err.text);
    moec_gguf_close(g);
    return st == MOEC_OK ? 0 : 1;
}
