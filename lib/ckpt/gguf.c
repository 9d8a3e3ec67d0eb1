/* Strict reader of the front of a GGUF file. No file is opened here: bytes in, index out. */
#include "ckpt/gguf.h"

#include "base/mem.h"

#include <stdlib.h>
#include <string.h>

static const moec_ggml_traits types[MOEC_GGML_COUNT] = {
    [MOEC_GGML_F32] = {"F32", 1, 4}, [MOEC_GGML_F16] = {"F16", 1, 2}, [MOEC_GGML_BF16] = {"BF16", 1, 2},
    [MOEC_GGML_F64] = {"F64", 1, 8}, [MOEC_GGML_I8] = {"I8", 1, 1}, [MOEC_GGML_I16] = {"I16", 1, 2},
    [MOEC_GGML_I32] = {"I32", 1, 4}, [MOEC_GGML_I64] = {"I64", 1, 8},
    [MOEC_GGML_Q4_0] = {"Q4_0", 32, 18}, [MOEC_GGML_Q4_1] = {"Q4_1", 32, 20}, [MOEC_GGML_Q5_0] = {"Q5_0", 32, 22},
    [MOEC_GGML_Q5_1] = {"Q5_1", 32, 24}, [MOEC_GGML_Q8_0] = {"Q8_0", 32, 34}, [MOEC_GGML_Q8_1] = {"Q8_1", 32, 40},
    [MOEC_GGML_Q2_K] = {"Q2_K", 256, 84}, [MOEC_GGML_Q3_K] = {"Q3_K", 256, 110}, [MOEC_GGML_Q4_K] = {"Q4_K", 256, 144},
    [MOEC_GGML_Q5_K] = {"Q5_K", 256, 176}, [MOEC_GGML_Q6_K] = {"Q6_K", 256, 210}, [MOEC_GGML_Q8_K] = {"Q8_K", 256, 292},
    [MOEC_GGML_IQ2_XXS] = {"IQ2_XXS", 256, 66}, [MOEC_GGML_IQ2_XS] = {"IQ2_XS", 256, 74},
    [MOEC_GGML_IQ3_XXS] = {"IQ3_XXS", 256, 98}, [MOEC_GGML_IQ1_S] = {"IQ1_S", 256, 50},
    [MOEC_GGML_IQ4_NL] = {"IQ4_NL", 32, 18}, [MOEC_GGML_IQ3_S] = {"IQ3_S", 256, 110},
    [MOEC_GGML_IQ2_S] = {"IQ2_S", 256, 82}, [MOEC_GGML_IQ4_XS] = {"IQ4_XS", 256, 136},
    [MOEC_GGML_IQ1_M] = {"IQ1_M", 256, 56}, [MOEC_GGML_TQ1_0] = {"TQ1_0", 256, 54}, [MOEC_GGML_TQ2_0] = {"TQ2_0", 256, 66},
    [MOEC_GGML_MXFP4] = {"MXFP4", 32, 17}, [MOEC_GGML_NVFP4] = {"NVFP4", 64, 36}, [MOEC_GGML_Q1_0] = {"Q1_0", 128, 18},
    [MOEC_GGML_Q2_0] = {"Q2_0", 64, 18},
};

const moec_ggml_traits *moec_ggml_type(uint32_t type)
{
    return type < MOEC_GGML_COUNT && types[type].name ? &types[type] : NULL;
}

uint64_t moec_gguf_padded_bytes(const moec_gguf_tensor *t)
{
    const moec_ggml_traits *traits = moec_ggml_type(t->type);
    const uint64_t n = (uint64_t)(t->dim[0] / traits->elements) * traits->bytes * (uint64_t)(t->dim[1] * t->dim[2] * t->dim[3]);
    return (n + MOEC_GGUF_ALIGNMENT - 1) / MOEC_GGUF_ALIGNMENT * MOEC_GGUF_ALIGNMENT;
}

/* Bytes of a value; 0: it says itself how long it is. */
static const size_t kind_bytes[MOEC_GGUF_KINDS] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

/* --- a reader that cannot leave its bytes ------------------------------------------------------------------------------ */

typedef struct cursor {
    const unsigned char *at;
    size_t left;
    const char *what; /* for error texts */
    moec_err *err;
} cursor;

static moec_status cut(const cursor *c, const char *in)
{
    return moec_fail(c->err, MOEC_EFORMAT, "%s: %s is cut short by the end of the file", c->what, in);
}

static uint64_t little(const unsigned char *p, size_t n)
{
    uint64_t v = 0;
    for (size_t i = n; i-- > 0;)
        v = v << 8 | p[i];
    return v;
}

static moec_status take(const unsigned char **out, cursor *c, uint64_t n, const char *in)
{
    if (n > c->left)
        return cut(c, in);
    *out = c->at;
    c->at += n;
    c->left -= (size_t)n;
    return MOEC_OK;
}

static moec_status take_u32(uint32_t *out, cursor *c, const char *in)
{
    const unsigned char *p = NULL;
    moec_status st = take(&p, c, 4, in);
    if (st == MOEC_OK)
        *out = (uint32_t)little(p, 4);
    return st;
}

static moec_status take_u64(uint64_t *out, cursor *c, const char *in)
{
    const unsigned char *p = NULL;
    moec_status st = take(&p, c, 8, in);
    if (st == MOEC_OK)
        *out = little(p, 8);
    return st;
}

/* A key or a name, as a string of ours. */
static moec_status take_name(char **out, cursor *c, uint64_t longest, const char *in)
{
    moec_status st = MOEC_OK;
    uint64_t n = 0;
    const unsigned char *p = NULL;
    MOEC_TRY(take_u64(&n, c, in));
    if (n == 0 || n > longest)
        return moec_fail(c->err, MOEC_EFORMAT, "%s: %s of %llu bytes, expected 1 to %llu", c->what, in, (unsigned long long)n,
                         (unsigned long long)longest);
    MOEC_TRY(take(&p, c, n, in));
    if (memchr(p, 0, (size_t)n))
        return moec_fail(c->err, MOEC_EFORMAT, "%s: %s holds a NUL", c->what, in);
    MOEC_TRY(moec_copy(out, (const char *)p, (size_t)n, c->err));
done:
    return st;
}

/* --- values ---------------------------------------------------------------------------------------------------------- */

static moec_status take_bools(const moec_gguf_value *v, const cursor *c, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++)
        if (v->at[i] > 1)
            return moec_fail(c->err, MOEC_EFORMAT, "%s: key %.200s: a bool that is neither 0 nor 1", c->what, v->key);
    return MOEC_OK;
}

static moec_status take_array(moec_gguf_value *v, cursor *c)
{
    moec_status st = MOEC_OK;
    uint32_t item = 0;
    size_t bytes = 0;
    MOEC_TRY(take_u32(&item, c, v->key));
    MOEC_TRY(take_u64(&v->n, c, v->key));
    if (item >= MOEC_GGUF_KINDS || item == MOEC_GGUF_ARRAY)
        return moec_fail(c->err, MOEC_EFORMAT, "%s: key %.200s: array of %s", c->what, v->key,
                         item == MOEC_GGUF_ARRAY ? "arrays, which llama.cpp does not read" : "an unknown kind");
    v->item = (moec_gguf_kind)item;
    if (v->item == MOEC_GGUF_TEXT) {
        v->at = c->at;
        for (uint64_t i = 0; i < v->n; i++) {
            const unsigned char *p = NULL;
            uint64_t n = 0;
            MOEC_TRY(take_u64(&n, c, v->key));
            MOEC_TRY(take(&p, c, n, v->key));
        }
        return MOEC_OK;
    }
    if (v->n > SIZE_MAX || !moec_mul_size(&bytes, (size_t)v->n, kind_bytes[item]))
        return cut(c, v->key);
    MOEC_TRY(take(&v->at, c, bytes, v->key));
    if (v->item == MOEC_GGUF_BOOL)
        st = take_bools(v, c, v->n);
done:
    return st;
}

static moec_status take_value(moec_gguf_value *v, cursor *c)
{
    moec_status st = MOEC_OK;
    uint32_t kind = 0;
    MOEC_TRY(take_u32(&kind, c, v->key));
    if (kind >= MOEC_GGUF_KINDS)
        return moec_fail(c->err, MOEC_EFORMAT, "%s: key %.200s: unknown kind %lu of value", c->what, v->key,
                         (unsigned long)kind);
    v->kind = (moec_gguf_kind)kind;
    if (v->kind == MOEC_GGUF_ARRAY)
        return take_array(v, c);
    if (v->kind == MOEC_GGUF_TEXT) {
        MOEC_TRY(take_u64(&v->n, c, v->key));
        return take(&v->at, c, v->n, v->key);
    }
    MOEC_TRY(take(&v->at, c, kind_bytes[kind], v->key));
    if (v->kind == MOEC_GGUF_BOOL)
        st = take_bools(v, c, 1);
done:
    return st;
}

/* --- tensors --------------------------------------------------------------------------------------------------------- */

static moec_status take_tensor(moec_gguf_tensor *t, cursor *c)
{
    moec_status st = MOEC_OK;
    uint32_t rank = 0;
    size_t blocks = 1, bytes = 0, values = 1;
    MOEC_TRY(take_name(&t->name, c, MOEC_GGUF_MAX_NAME, "name of a tensor"));
    MOEC_TRY(take_u32(&rank, c, t->name));
    if (rank > MOEC_GGUF_MAX_RANK)
        return moec_fail(c->err, MOEC_EFORMAT, "%s: tensor %s: %lu dimensions, at most %d are possible", c->what, t->name,
                         (unsigned long)rank, MOEC_GGUF_MAX_RANK);
    t->rank = (int)rank;
    for (uint32_t i = 0; i < MOEC_GGUF_MAX_RANK; i++) {
        uint64_t n = 1;
        if (i < rank)
            MOEC_TRY(take_u64(&n, c, t->name));
        if (n > INT64_MAX)
            return moec_fail(c->err, MOEC_EFORMAT, "%s: tensor %s: a dimension is too large", c->what, t->name);
        t->dim[i] = (int64_t)n;
        /* An empty dimension must not hide that the others overflow: whoever counts rows multiplies some of them. */
        if (!moec_mul_size(&values, values, n > 0 ? (size_t)n : 1) || values > INT64_MAX)
            return moec_fail(c->err, MOEC_EFORMAT, "%s: tensor %s: its size overflows", c->what, t->name);
    }
    MOEC_TRY(take_u32(&t->type, c, t->name));
    MOEC_TRY(take_u64(&t->begin, c, t->name));
    const moec_ggml_traits *type = moec_ggml_type(t->type);
    if (!type)
        return moec_fail(c->err, MOEC_EFORMAT, "%s: tensor %s: unknown type %lu", c->what, t->name, (unsigned long)t->type);
    if (t->dim[0] % type->elements != 0)
        return moec_fail(c->err, MOEC_EFORMAT, "%s: tensor %s: rows of %lld, but %s comes in blocks of %lld", c->what, t->name,
                         (long long)t->dim[0], type->name, (long long)type->elements);
    blocks = (size_t)(t->dim[0] / type->elements);
    for (int i = 1; i < MOEC_GGUF_MAX_RANK; i++)
        blocks *= (size_t)t->dim[i]; /* at most as many as values */
    if (!moec_mul_size(&bytes, blocks, type->bytes) || bytes > INT64_MAX / 2)
        return moec_fail(c->err, MOEC_EFORMAT, "%s: tensor %s: its size overflows", c->what, t->name);
    t->bytes = bytes;
done:
    return st;
}

static uint64_t padded(uint64_t n, uint64_t alignment)
{
    return (n + alignment - 1) & ~(alignment - 1);
}

static moec_status read_alignment(moec_gguf_index *ix, const char *what, moec_err *err)
{
    const moec_gguf_value *v = moec_gguf_find(ix, "general.alignment");
    int64_t n = MOEC_GGUF_ALIGNMENT;
    if (v && (v->kind != MOEC_GGUF_U32 || !moec_gguf_int(v, &n) || n < 1 || n > 65536 || (n & (n - 1)) != 0))
        return moec_fail(err, MOEC_EFORMAT, "%s: general.alignment is not a power of two up to 65536", what);
    ix->alignment = (uint64_t)n;
    return MOEC_OK;
}

static moec_status check_tiling(const moec_gguf_index *ix, uint64_t file_size, const char *what, moec_err *err)
{
    uint64_t at = 0, end = 0;
    const uint64_t data = file_size > ix->data_at ? file_size - ix->data_at : 0;
    for (size_t i = 0; i < ix->n; i++) {
        const moec_gguf_tensor *t = &ix->tensor[i];
        if (t->begin != at)
            return moec_fail(err, MOEC_EFORMAT, "%s: tensor %s: begins at %llu, expected %llu, behind the one before it", what,
                             t->name, (unsigned long long)t->begin, (unsigned long long)at);
        if (at > data || t->bytes > data - at)
            return moec_fail(err, MOEC_EFORMAT, "%s: tensor %s: reaches past the end of the file", what, t->name);
        end = at + t->bytes;
        at = padded(end, ix->alignment);
    }
    if (data > at)
        return moec_fail(err, MOEC_EFORMAT, "%s: %llu bytes behind the last tensor", what, (unsigned long long)(data - at));
    return MOEC_OK;
}

/* --- the whole ------------------------------------------------------------------------------------------------------- */

static int by_text(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static moec_status check_unique(const char **name, size_t n, const char *of, const char *what, moec_err *err)
{
    if (n > 1)
        qsort(name, n, sizeof *name, by_text);
    for (size_t i = 1; i < n; i++)
        if (strcmp(name[i - 1], name[i]) == 0)
            return moec_fail(err, MOEC_EFORMAT, "%s: %s %.200s is there twice", what, of, name[i]);
    return MOEC_OK;
}

static moec_status check_names(const moec_gguf_index *ix, const char *what, moec_err *err)
{
    moec_status st = MOEC_OK;
    const char **name = NULL;
    MOEC_TRY(MOEC_NEW(name, ix->n > ix->n_values ? ix->n : ix->n_values, err));
    for (size_t i = 0; i < ix->n_values; i++)
        name[i] = ix->value[i].key;
    MOEC_TRY(check_unique(name, ix->n_values, "key", what, err));
    for (size_t i = 0; i < ix->n; i++)
        name[i] = ix->tensor[i].name;
    MOEC_TRY(check_unique(name, ix->n, "tensor", what, err));
done:
    moec_free(name);
    return st;
}

static moec_status take_front(moec_gguf_index *ix, uint64_t *n, uint64_t *n_values, cursor *c)
{
    moec_status st = MOEC_OK;
    const unsigned char *magic = NULL;
    if (c->left < 24 || memcmp(c->at, "GGUF", 4) != 0)
        return moec_fail(c->err, MOEC_EFORMAT, "%s: not a GGUF file", c->what);
    MOEC_TRY(take(&magic, c, 4, "magic"));
    MOEC_TRY(take_u32(&ix->version, c, "version"));
    if (ix->version != 0 && (ix->version & 0xffff) == 0)
        return moec_fail(c->err, MOEC_EFORMAT, "%s: big-endian GGUF, only little-endian is read", c->what);
    if (ix->version != 2 && ix->version != 3)
        return moec_fail(c->err, MOEC_EFORMAT, "%s: GGUF version %lu, only 2 and 3 are read", c->what,
                         (unsigned long)ix->version);
    MOEC_TRY(take_u64(n, c, "number of tensors"));
    MOEC_TRY(take_u64(n_values, c, "number of keys"));
    /* A key takes 14 bytes at least, a tensor 25: nothing is allocated for more than there can be. */
    if (*n_values > c->left / 14 || *n > c->left / 25)
        return moec_fail(c->err, MOEC_EFORMAT, "%s: %llu keys and %llu tensors do not fit into its bytes", c->what,
                         (unsigned long long)*n_values, (unsigned long long)*n);
done:
    return st;
}

moec_status moec_gguf_parse(moec_gguf_index *out, const void *bytes, size_t size, uint64_t file_size, const char *what,
                            moec_err *err)
{
    moec_status st = MOEC_OK;
    cursor c = {bytes, size, what, err};
    uint64_t n = 0, n_values = 0;
    *out = (moec_gguf_index){.alignment = MOEC_GGUF_ALIGNMENT};
    MOEC_TRY(take_front(out, &n, &n_values, &c));
    MOEC_TRY(MOEC_NEW(out->value, (size_t)n_values, err));
    MOEC_TRY(MOEC_NEW(out->tensor, (size_t)n, err));
    for (uint64_t i = 0; i < n_values; i++) {
        moec_gguf_value *v = &out->value[out->n_values++];
        MOEC_TRY(take_name(&v->key, &c, 65535, "key"));
        MOEC_TRY(take_value(v, &c));
    }
    MOEC_TRY(read_alignment(out, what, err));
    for (uint64_t i = 0; i < n; i++)
        MOEC_TRY(take_tensor(&out->tensor[out->n++], &c));
    MOEC_TRY(check_names(out, what, err));
    out->data_at = padded(size - c.left, out->alignment);
    MOEC_TRY(check_tiling(out, file_size, what, err));
done:
    return st;
}

void moec_gguf_index_release(moec_gguf_index *ix)
{
    for (size_t i = 0; i < ix->n_values; i++)
        moec_free(ix->value[i].key);
    for (size_t i = 0; i < ix->n; i++)
        moec_free(ix->tensor[i].name);
    moec_free(ix->value);
    moec_free(ix->tensor);
    *ix = (moec_gguf_index){0};
}

/* --- getters --------------------------------------------------------------------------------------------------------- */

const moec_gguf_value *moec_gguf_find(const moec_gguf_index *ix, const char *key)
{
    for (size_t i = 0; i < ix->n_values; i++)
        if (strcmp(ix->value[i].key, key) == 0)
            return &ix->value[i];
    return NULL;
}

static bool int_at(moec_gguf_kind kind, const unsigned char *p, int64_t *out)
{
    const size_t n = kind_bytes[kind];
    const uint64_t v = little(p, n);
    switch (kind) {
    case MOEC_GGUF_U8: case MOEC_GGUF_U16: case MOEC_GGUF_U32: case MOEC_GGUF_U64:
        *out = (int64_t)v;
        return v <= INT64_MAX;
    case MOEC_GGUF_I8: case MOEC_GGUF_I16: case MOEC_GGUF_I32: case MOEC_GGUF_I64: {
        const uint64_t sign = UINT64_C(1) << (8 * n - 1);
        *out = (int64_t)((v ^ sign) - sign); /* two's complement of the width */
        return true;
    }
    default:
        return false;
    }
}

static bool real_at(moec_gguf_kind kind, const unsigned char *p, double *out)
{
    if (kind == MOEC_GGUF_F32) {
        const uint32_t bits = (uint32_t)little(p, 4);
        float x;
        memcpy(&x, &bits, sizeof x);
        *out = (double)x;
        return true;
    }
    if (kind == MOEC_GGUF_F64) {
        const uint64_t bits = little(p, 8);
        memcpy(out, &bits, sizeof *out);
        return true;
    }
    return false;
}

bool moec_gguf_int(const moec_gguf_value *v, int64_t *out)
{
    return v && int_at(v->kind, v->at, out);
}

bool moec_gguf_real(const moec_gguf_value *v, double *out)
{
    return v && real_at(v->kind, v->at, out);
}

bool moec_gguf_bool(const moec_gguf_value *v, bool *out)
{
    if (!v || v->kind != MOEC_GGUF_BOOL)
        return false;
    *out = v->at[0] == 1;
    return true;
}

moec_status moec_gguf_text(char **out, const moec_gguf_value *v, moec_err *err)
{
    if (!v || v->kind != MOEC_GGUF_TEXT || memchr(v->at, 0, (size_t)v->n))
        return moec_fail(err, MOEC_EFORMAT, "key %.200s is not a text", v ? v->key : "(absent)");
    return moec_copy(out, (const char *)v->at, (size_t)v->n, err);
}

bool moec_gguf_item_int(const moec_gguf_value *v, uint64_t i, int64_t *out)
{
    if (v && v->kind == MOEC_GGUF_ARRAY && v->item == MOEC_GGUF_BOOL && i < v->n) {
        *out = v->at[i];
        return true;
    }
    return v && v->kind == MOEC_GGUF_ARRAY && i < v->n && kind_bytes[v->item] > 0 &&
           int_at(v->item, v->at + i * kind_bytes[v->item], out);
}

bool moec_gguf_item_real(const moec_gguf_value *v, uint64_t i, double *out)
{
    return v && v->kind == MOEC_GGUF_ARRAY && i < v->n && kind_bytes[v->item] > 0 &&
           real_at(v->item, v->at + i * kind_bytes[v->item], out);
}

/* Lengths are not checked again: the texts were walked when the file was parsed. */
bool moec_gguf_each_text(const moec_gguf_value *v, moec_gguf_texts *it, const char **text, size_t *len)
{
    if (!v || v->kind != MOEC_GGUF_ARRAY || v->item != MOEC_GGUF_TEXT || it->seen == v->n)
        return false;
    const unsigned char *p = it->seen == 0 ? v->at : it->next;
    *len = (size_t)little(p, 8);
    *text = (const char *)p + 8;
    it->next = p + 8 + *len;
    it->seen++;
    return true;
}
