/* A GGUF file from anywhere: whatever is accepted describes ranges that lie in the file, in order and aligned, as long as their
 * shapes say; every value can be read to its end. Read as a model it ends in one whose tensors lie in the file, or in a code
 * with one line of text; so does its tokenizer. */
#include "base/log.h"
#include "base/mem.h"
#include "ckpt/gguf.h"
#include "model/model.h"
#include "run/gguf_words.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(bool holds)
{
    if (!holds)
        abort();
}

static void check_value(const moec_gguf_value *v, const uint8_t *data, size_t size)
{
    const uint8_t *end = data + size;
    int64_t n;
    double x;
    bool b;
    check(v->key && v->key[0] && v->at >= data && v->at <= end);
    const int kinds = moec_gguf_int(v, &n) + moec_gguf_real(v, &x) + moec_gguf_bool(v, &b);
    check(kinds == (v->kind != MOEC_GGUF_TEXT && v->kind != MOEC_GGUF_ARRAY));
    if (v->kind == MOEC_GGUF_TEXT)
        check(v->n <= (uint64_t)(end - v->at));
    if (v->kind != MOEC_GGUF_ARRAY)
        return;
    moec_gguf_texts it = {0};
    const char *text;
    size_t len;
    uint64_t texts = 0;
    while (moec_gguf_each_text(v, &it, &text, &len)) {
        check((const uint8_t *)text <= end && len <= (size_t)(end - (const uint8_t *)text));
        texts++;
    }
    check(texts == (v->item == MOEC_GGUF_TEXT ? v->n : 0));
    for (uint64_t i = 0; v->item != MOEC_GGUF_TEXT && i < v->n; i++)
        if (!moec_gguf_item_real(v, i, &x))
            check(moec_gguf_item_int(v, i, &n) || v->item == MOEC_GGUF_U64);
}

/* Unsigned values above INT64_MAX are no int64_t. */
static bool is_large(const moec_gguf_value *v)
{
    return v->kind == MOEC_GGUF_U64 && v->at[7] >= 128;
}

static void check_index(const moec_gguf_index *ix, const uint8_t *data, size_t size)
{
    uint64_t at = 0;
    check(ix->data_at % ix->alignment == 0);
    for (size_t i = 0; i < ix->n_values; i++) {
        check(moec_gguf_find(ix, ix->value[i].key) == &ix->value[i]); /* no key twice */
        if (!is_large(&ix->value[i]))
            check_value(&ix->value[i], data, size);
    }
    for (size_t i = 0; i < ix->n; i++) {
        const moec_gguf_tensor *t = &ix->tensor[i];
        const moec_ggml_traits *type = moec_ggml_type(t->type);
        check(type && t->rank >= 0 && t->rank <= MOEC_GGUF_MAX_RANK && t->dim[0] % type->elements == 0);
        uint64_t bytes = type->bytes;
        for (int k = 0; k < MOEC_GGUF_MAX_RANK; k++) {
            const uint64_t n = (uint64_t)(k == 0 ? t->dim[0] / type->elements : t->dim[k]);
            check(t->dim[k] >= 0 && !__builtin_mul_overflow(bytes, n, &bytes));
        }
        check(t->bytes == bytes && t->begin >= at && t->begin % ix->alignment == 0);
        if (bytes > 0)
            check(ix->data_at <= size && t->begin <= size - ix->data_at && bytes <= size - ix->data_at - t->begin);
        at = t->begin + t->bytes;
    }
}

static bool one_line(moec_status st, const moec_err *err)
{
    return err->code == st && err->text[0] != '\0' && !strchr(err->text, '\n');
}

/* All bytes of all matrices can be read; their values may be anything. */
static void check_model(const moec_model *m)
{
    moec_err err = {MOEC_OK, ""};
    moec_sizes sizes;
    for (size_t i = 0; i < moec_ckpt_count(m->ckpt); i++) {
        const moec_tensor *t = moec_ckpt_at(m->ckpt, i);
        volatile unsigned char sum = 0;
        for (size_t k = 0; k < t->bytes; k++)
            sum = (unsigned char)(sum + ((const unsigned char *)t->data)[k]);
    }
    const moec_mlp *e = &m->layer[m->set[0].layer].expert[0];
    check(moec_weight_check(&e->gate, NULL) == MOEC_OK && moec_weight_check(&e->down, NULL) == MOEC_OK);
    (void)moec_weight_nonfinite(&e->gate);
    (void)moec_weight_nonfinite(&m->layer[0].mat[MOEC_MAT_O]);
    (void)moec_weight_nonfinite(&m->embedding);
    check(moec_model_sizes(&sizes, m, &err) == MOEC_OK && sizes.total > 0);
}

static void read_model(const moec_gguf_index *ix, const uint8_t *data, size_t size)
{
    moec_err err = {MOEC_OK, ""};
    moec_model *m = NULL;
    moec_gguf_words words;
    char path[64];
    const int fd = memfd_create("input", MFD_CLOEXEC);
    check(fd >= 0 && write(fd, data, size) == (ssize_t)size);
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    moec_status st = moec_model_open(&m, path, &err);
    if (st == MOEC_OK)
        check_model(m);
    else
        check((st == MOEC_EFORMAT || st == MOEC_ESHAPE) && one_line(st, &err));
    moec_model_close(m);
    close(fd);
    st = moec_gguf_words_make(&words, ix, "input", &err);
    check(st == MOEC_OK || (st == MOEC_EFORMAT && one_line(st, &err)));
    moec_gguf_words_release(&words);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    moec_err err = {MOEC_OK, ""};
    moec_gguf_index ix;
    moec_status st = moec_gguf_parse(&ix, data, size, size, "input", &err);
    moec_log_set(MOEC_QUIET);
    if (st == MOEC_OK) {
        check_index(&ix, data, size);
        read_model(&ix, data, size);
    } else
        check(st == MOEC_EFORMAT && one_line(st, &err));
    moec_gguf_index_release(&ix);
    return 0;
}
