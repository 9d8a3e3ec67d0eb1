/* Strict reader of the safetensors header, and the writer of one. No file is opened here: bytes in, index out. */
#include "ckpt/safetensors.h"

#include "base/json.h"
#include "base/mem.h"

#include <stdlib.h>
#include <string.h>

/* The reference implementation's own bound; real headers of the largest models stay under 20 MB. */
static const uint64_t max_header = 100u * 1000u * 1000u;

static uint64_t read_le64(const unsigned char *p)
{
    uint64_t v = 0;
    for (int i = 7; i >= 0; i--)
        v = v << 8 | p[i];
    return v;
}

static moec_status read_shape(moec_st_entry *e, uint64_t *bytes, const moec_json *shape, const char *what,
                              moec_err *err)
{
    size_t rank = moec_json_len(shape), n = 1;
    if (moec_json_type(shape) != MOEC_JSON_ARRAY || rank > MOEC_MAX_RANK)
        return moec_fail(err, MOEC_EFORMAT, "%s: tensor %.200s: shape is not a list of at most %d numbers", what, e->name,
                         MOEC_MAX_RANK);
    e->rank = (int)rank;
    for (size_t i = 0; i < rank; i++) {
        if (!moec_json_int(moec_json_at(shape, i), &e->dim[i]) || e->dim[i] < 0)
            return moec_fail(err, MOEC_EFORMAT, "%s: tensor %.200s: shape has a dimension that is not a number >= 0", what,
                             e->name);
        if (!moec_mul_size(&n, n, (size_t)e->dim[i]))
            return moec_fail(err, MOEC_EFORMAT, "%s: tensor %.200s: product of its shape overflows", what, e->name);
    }
    if (!moec_mul_size(&n, n, (size_t)moec_dtypes[e->dtype].bytes) || n > INT64_MAX)
        return moec_fail(err, MOEC_EFORMAT, "%s: tensor %.200s: size in bytes overflows", what, e->name);
    *bytes = n;
    return MOEC_OK;
}

static moec_status read_entry(moec_st_entry *e, const moec_json *v, uint64_t data_size, const char *what,
                              moec_err *err)
{
    const moec_json *offsets = moec_json_get(v, "data_offsets");
    const char *dtype = moec_json_string(moec_json_get(v, "dtype"));
    int64_t begin, end;
    uint64_t bytes = 0;
    if (!dtype || moec_json_len(v) != 3)
        return moec_fail(err, MOEC_EFORMAT, "%s: tensor %.200s: not {dtype, shape, data_offsets}", what, e->name);
    e->dtype = moec_dtype_find(dtype);
    if (e->dtype == MOEC_DTYPE_COUNT)
        return moec_fail(err, MOEC_EFORMAT, "%s: tensor %.200s: unknown dtype %.40s", what, e->name, dtype);
    moec_status st = read_shape(e, &bytes, moec_json_get(v, "shape"), what, err);
    if (st != MOEC_OK)
        return st;
    if (moec_json_type(offsets) != MOEC_JSON_ARRAY || moec_json_len(offsets) != 2 ||
        !moec_json_int(moec_json_at(offsets, 0), &begin) || !moec_json_int(moec_json_at(offsets, 1), &end))
        return moec_fail(err, MOEC_EFORMAT, "%s: tensor %.200s: data_offsets is not [begin, end]", what, e->name);
    if (begin < 0 || end < begin || (uint64_t)end > data_size)
        return moec_fail(err, MOEC_EFORMAT, "%s: tensor %.200s: data_offsets [%lld, %lld] do not lie in %llu bytes of data",
                         what, e->name, (long long)begin, (long long)end, (unsigned long long)data_size);
    if ((uint64_t)(end - begin) != bytes)
        return moec_fail(err, MOEC_EFORMAT, "%s: tensor %.200s: has %lld bytes, its shape and dtype need %llu", what,
                         e->name, (long long)(end - begin), (unsigned long long)bytes);
    e->begin = (uint64_t)begin;
    e->end = (uint64_t)end;
    return MOEC_OK;
}

static int by_offset(const void *a, const void *b)
{
    const moec_st_entry *x = a, *y = b;
    if (x->begin != y->begin)
        return x->begin < y->begin ? -1 : 1;
    if (x->end != y->end) /* empty tensors first, so that they do not look like an overlap */
        return x->end < y->end ? -1 : 1;
    return strcmp(x->name, y->name);
}

/* The data must be tiled exactly: no overlap (two tensors could not both be right), no hole (hidden bytes). */
static moec_status check_tiling(const moec_st_index *ix, uint64_t data_size, const char *what, moec_err *err)
{
    uint64_t at = 0;
    for (size_t i = 0; i < ix->n; i++) {
        const moec_st_entry *e = &ix->entry[i];
        if (e->begin != at)
            return moec_fail(err, MOEC_EFORMAT, "%s: tensor %.200s: begins at %llu, %s of the tensor before it", what,
                             e->name, (unsigned long long)e->begin, e->begin < at ? "within the bytes" : "past the end");
        at = e->end;
    }
    if (at != data_size)
        return moec_fail(err, MOEC_EFORMAT, "%s: %llu bytes of data, tensors cover %llu", what,
                         (unsigned long long)data_size, (unsigned long long)at);
    return MOEC_OK;
}

static moec_status read_metadata(moec_st_index *out, moec_json *v, const char *what, moec_err *err)
{
    void *it = NULL;
    const char *key;
    moec_json *value;
    if (moec_json_type(v) != MOEC_JSON_OBJECT)
        return moec_fail(err, MOEC_EFORMAT, "%s: __metadata__ is not an object", what);
    while (moec_json_each(v, &it, &key, &value))
        if (moec_json_type(value) != MOEC_JSON_STRING)
            return moec_fail(err, MOEC_EFORMAT, "%s: __metadata__ key %.60s: not a text", what, key);
    return moec_json_dump(&out->metadata, v, 0, err);
}

moec_status moec_st_parse(moec_st_index *out, const void *bytes, size_t size, uint64_t file_size, const char *what,
                          moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_json *root = NULL, *value;
    const char *key;
    void *it = NULL;
    memset(out, 0, sizeof *out);
    if (size < 8 || file_size < 8)
        return moec_fail(err, MOEC_EFORMAT, "%s: %llu bytes, too short for a safetensors file", what,
                         (unsigned long long)file_size);
    uint64_t n = read_le64(bytes);
    if (n > max_header)
        return moec_fail(err, MOEC_EFORMAT, "%s: header of %llu bytes, at most %llu are accepted", what,
                         (unsigned long long)n, (unsigned long long)max_header);
    if (n > file_size - 8 || n > size - 8)
        return moec_fail(err, MOEC_EFORMAT, "%s: header of %llu bytes is cut short by the end of the file", what,
                         (unsigned long long)n);
    out->data_at = 8 + n;
    if (n == 0 || ((const char *)bytes)[8] != '{') /* the format has no white space in front */
        return moec_fail(err, MOEC_EFORMAT, "%s: header is not a JSON object", what);
    MOEC_TRY(moec_json_parse(&root, (const char *)bytes + 8, (size_t)n, what, err));
    MOEC_TRY(MOEC_NEW(out->entry, moec_json_len(root), err));
    while (moec_json_each(root, &it, &key, &value)) {
        if (strcmp(key, "__metadata__") == 0) {
            MOEC_TRY(read_metadata(out, value, what, err));
            continue;
        }
        moec_st_entry *e = &out->entry[out->n];
        MOEC_TRY(moec_copy(&e->name, key, strlen(key), err));
        out->n++;
        MOEC_TRY(read_entry(e, value, file_size - out->data_at, what, err));
    }
    if (out->n > 1)
        qsort(out->entry, out->n, sizeof *out->entry, by_offset);
    MOEC_TRY(check_tiling(out, file_size - out->data_at, what, err));
done:
    moec_json_free(root);
    return st;
}

void moec_st_index_release(moec_st_index *ix)
{
    for (size_t i = 0; i < ix->n; i++)
        moec_free(ix->entry[i].name);
    moec_free(ix->entry);
    moec_free(ix->metadata);
    memset(ix, 0, sizeof *ix);
}

static moec_json *entry_json(const moec_st_entry *e)
{
    moec_json *o = moec_json_new_object(), *shape = moec_json_new_array(), *offsets = moec_json_new_array();
    for (int i = 0; i < e->rank; i++)
        moec_json_push(shape, moec_json_new_int(e->dim[i]));
    moec_json_push(offsets, moec_json_new_int((int64_t)e->begin));
    moec_json_push(offsets, moec_json_new_int((int64_t)e->end));
    moec_json_set(o, "dtype", moec_json_new_string(moec_dtypes[e->dtype].name));
    moec_json_set(o, "shape", shape);
    moec_json_set(o, "data_offsets", offsets);
    return o;
}

moec_status moec_st_header(char **out, size_t *len, const moec_st_entry *entry, size_t n, const char *metadata,
                           moec_err *err)
{
    static const char pt[] = "{\"format\":\"pt\"}"; /* what transformers asks for before it loads a file */
    moec_status st = MOEC_OK;
    moec_json *root = moec_json_new_object(), *meta = NULL;
    char *text = NULL;
    *out = NULL;
    if (!metadata)
        metadata = pt;
    MOEC_TRY(moec_json_parse(&meta, metadata, strlen(metadata), "safetensors metadata", err));
    moec_json_set(root, "__metadata__", meta);
    for (size_t i = 0; i < n; i++)
        moec_json_set(root, entry[i].name, entry_json(&entry[i]));
    MOEC_TRY(moec_json_dump(&text, root, 0, err));
    size_t used = strlen(text), padded = (used + 7) & ~(size_t)7;
    MOEC_TRY(moec_alloc((void **)out, padded + 8, 1, err));
    for (int i = 0; i < 8; i++)
        (*out)[i] = (char)(unsigned char)((uint64_t)padded >> (8 * i));
    memcpy(*out + 8, text, used);
    memset(*out + 8 + used, ' ', padded - used);
    *len = padded + 8;
done:
    moec_free(text);
    moec_json_free(root);
    return st;
}
