/* The front of a GGUF file from anywhere: whatever is accepted describes ranges that lie in the file, in order and aligned, as
 * long as their shapes say; and every value can be read to its end. */
#include "ckpt/gguf.h"

#include <stdlib.h>
#include <string.h>

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

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    moec_err err = {MOEC_OK, ""};
    moec_gguf_index ix;
    moec_status st = moec_gguf_parse(&ix, data, size, size, "input", &err);
    if (st == MOEC_OK)
        check_index(&ix, data, size);
    else
        check(st == MOEC_EFORMAT && err.code == st && err.text[0] != '\0' && !strchr(err.text, '\n'));
    moec_gguf_index_release(&ix);
    return 0;
}
