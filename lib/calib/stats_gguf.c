/* Sensitivities of a GGUF's matrices in the statistics file: /gguf, and what is told of them.
 *
 *   attributes: tokens, tensors (n), name_bytes, square_values, types (names of ggml's types, columns of error), probe_bits
 *   name    u8  [name_bytes]      names, each with a line feed behind it
 *   size    i64 [n,2]             columns, and how many of these have a mean square: none or all
 *   square  f64 [square_values]   row by row; not there where nothing has one
 *   error   f64 [n,types]         NAN: the block does not divide a row
 *   probe   f64 [n,probes]
 *   kl      f64 [n,probes]        NAN: not run */
#include "base/mem.h"
#include "calib/stats_internal.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { MAX_ROWS = 1 << 16, MAX_NAME = 200, MAX_COLS = 1 << 30, MAX_TYPES = 256 };
static const char group[] = "/" MOEC_STATS_GGUF;

/* --- values ----------------------------------------------------------------------------------------------------------- */

static bool usable(const double *v, int64_t n, bool may_lack)
{
    for (int64_t i = 0; i < n; i++)
        if (!(v[i] >= 0.0 && isfinite(v[i])) && !(may_lack && isnan(v[i])))
            return false;
    return true;
}

moec_status moec__stats_gguf_check(const moec_sensitivity *v, moec_status code, moec_err *err)
{
    if (v->n < 1 || v->n > MAX_ROWS || v->tokens < 0)
        return moec_fail(err, code, "gguf: %zu tensors, %lld tokens: out of range", v->n, (long long)v->tokens);
    for (size_t i = 0; i < v->n; i++) {
        const moec_sensitive *r = &v->at[i];
        const size_t len = r->name ? strlen(r->name) : 0;
        if (len < 1 || len > MAX_NAME || strchr(r->name, '\n') || r->cols < 1 || r->cols > MAX_COLS)
            return moec_fail(err, code, "gguf: tensor %zu has no usable name or number of columns", i);
        if ((r->square && !usable(r->square, r->cols, false)) || !usable(r->error, MOEC_BLOCK_COUNT, true) ||
            !usable(r->probe, MOEC_PROBES, true) || !usable(r->kl, MOEC_PROBES, true))
            return moec_fail(err, code, "gguf: %s: a number is not finite or negative", r->name);
    }
    return MOEC_OK;
}

moec_json *moec__stats_gguf_json(const moec_sensitivity *v)
{
    moec_json *o = moec_json_new_object();
    int64_t measured = 0;
    for (size_t i = 0; i < v->n; i++)
        measured += !isnan(v->at[i].kl[0]);
    moec_json_set(o, "tokens", moec_json_new_int(v->tokens));
    moec_json_set(o, "tensors", moec_json_new_int((int64_t)v->n));
    moec_json_set(o, "measured", moec_json_new_int(measured));
    return o;
}

/* --- arrays ----------------------------------------------------------------------------------------------------------- */

/* Where the arrays of a file are while it is written or read. */
typedef struct arrays {
    int64_t n, name_bytes, square_values, types;
    uint8_t *name;
    int64_t *size;
    double *square, *error, *probe, *kl;
} arrays;

static void release(arrays *a)
{
    void *const all[] = {a->name, a->size, a->square, a->error, a->probe, a->kl};
    for (size_t i = 0; i < MOEC_COUNT(all); i++)
        moec_free(all[i]);
}

/* One array of a file: what, where, and its extents. */
typedef struct part {
    const char *path, *about;
    moec_dtype dtype;
    void **at;
    int rank;
    int64_t dim[2];
} part;
enum { PARTS = 6 };

static void list_parts(part out[PARTS], arrays *a)
{
    const part all[PARTS] = {
        {"/gguf/name", "names of tensors, each with a line feed behind it", MOEC_U8, (void **)&a->name, 1, {a->name_bytes}},
        {"/gguf/size", "columns, columns with a mean square", MOEC_I64, (void **)&a->size, 2, {a->n, 2}},
        {"/gguf/square", "mean square of what a column multiplies", MOEC_F64, (void **)&a->square, 1, {a->square_values}},
        {"/gguf/error", "weighted squared error over squares, for each of types", MOEC_F64, (void **)&a->error, 2, {a->n, a->types}},
        {"/gguf/probe", "the same of the plain grid, for each of probe_bits", MOEC_F64, (void **)&a->probe, 2, {a->n, MOEC_PROBES}},
        {"/gguf/kl", "nats a token with the tensor alone at each of probe_bits", MOEC_F64, (void **)&a->kl, 2, {a->n, MOEC_PROBES}},
    };
    memcpy(out, all, sizeof all);
}

static bool is_there(const part *p)
{
    return p->dim[0] > 0;
}

/* --- writing ---------------------------------------------------------------------------------------------------------- */

static moec_status fill_arrays(arrays *a, const moec_sensitivity *v, moec_err *err)
{
    moec_status st = MOEC_OK;
    a->n = (int64_t)v->n;
    a->types = MOEC_BLOCK_COUNT;
    for (size_t i = 0; i < v->n; i++) {
        a->name_bytes += (int64_t)strlen(v->at[i].name) + 1;
        a->square_values += v->at[i].square ? v->at[i].cols : 0;
    }
    MOEC_TRY(MOEC_NEW(a->name, (size_t)a->name_bytes, err));
    MOEC_TRY(MOEC_NEW(a->size, 2 * v->n, err));
    MOEC_TRY(MOEC_NEW(a->square, (size_t)a->square_values, err));
    MOEC_TRY(MOEC_NEW(a->error, v->n * MOEC_BLOCK_COUNT, err));
    MOEC_TRY(MOEC_NEW(a->probe, v->n * MOEC_PROBES, err));
    MOEC_TRY(MOEC_NEW(a->kl, v->n * MOEC_PROBES, err));
    uint8_t *name = a->name;
    double *square = a->square;
    for (size_t i = 0; i < v->n; i++) {
        const moec_sensitive *r = &v->at[i];
        const size_t len = strlen(r->name);
        memcpy(name, r->name, len);
        name[len] = '\n';
        name += len + 1;
        a->size[2 * i] = r->cols;
        a->size[2 * i + 1] = r->square ? r->cols : 0;
        if (r->square) {
            memcpy(square, r->square, (size_t)r->cols * sizeof *square);
            square += r->cols;
        }
        memcpy(a->error + i * MOEC_BLOCK_COUNT, r->error, sizeof r->error);
        memcpy(a->probe + i * MOEC_PROBES, r->probe, sizeof r->probe);
        memcpy(a->kl + i * MOEC_PROBES, r->kl, sizeof r->kl);
    }
done:
    return st;
}

/* "f16 bf16 q4_0 ..": the columns of error by name, so that a later program with more types reads them. */
static void types_text(char *out, size_t cap)
{
    size_t at = 0;
    for (int b = 0; b < MOEC_BLOCK_COUNT; b++)
        at += (size_t)snprintf(out + at, cap - at, "%s%s", b ? " " : "", moec_blocks[b].name);
}

moec_status moec__stats_gguf_put(moec_h5 *h, const moec_stats *s, moec_err *err)
{
    static const int64_t bits[MOEC_PROBES] = MOEC_PROBE_BITS;
    const moec_sensitivity *v = s->sensitivity;
    moec_status st = MOEC_OK;
    arrays a = {0};
    part p[PARTS];
    char types[MOEC_BLOCK_COUNT * 16];
    types_text(types, sizeof types);
    MOEC_TRY(fill_arrays(&a, v, err));
    MOEC_TRY(moec_h5_group(h, group, err));
    MOEC_TRY(moec_h5_put_int(h, group, "tokens", v->tokens, err));
    MOEC_TRY(moec_h5_put_int(h, group, "tensors", a.n, err));
    MOEC_TRY(moec_h5_put_int(h, group, "name_bytes", a.name_bytes, err));
    MOEC_TRY(moec_h5_put_int(h, group, "square_values", a.square_values, err));
    MOEC_TRY(moec_h5_put_text(h, group, "types", types, err));
    MOEC_TRY(moec_h5_put_ints(h, group, "probe_bits", bits, MOEC_PROBES, err));
    list_parts(p, &a);
    for (int i = 0; i < PARTS; i++) {
        if (!is_there(&p[i]))
            continue;
        MOEC_TRY(moec_h5_put_array(h, p[i].path, p[i].dtype, p[i].rank, p[i].dim, *p[i].at, err));
        MOEC_TRY(moec_h5_put_text(h, p[i].path, "about", p[i].about, err));
    }
done:
    release(&a);
    return st;
}

/* --- reading ---------------------------------------------------------------------------------------------------------- */

/* Columns of error, which types they are: MOEC_BLOCK_COUNT for one that is not known. */
static moec_status read_types(moec_block type[MAX_TYPES], int64_t *n, moec_h5 *h, moec_err *err)
{
    char *text, one[32];
    moec_status st = moec_h5_get_text(&text, h, group, "types", MAX_TYPES * sizeof one, err);
    *n = 0;
    if (st != MOEC_OK)
        return st;
    for (const char *word = text; *word && *n < MAX_TYPES;) {
        const size_t len = strcspn(word, " ");
        snprintf(one, sizeof one, "%.*s", len < sizeof one ? (int)len : 0, word);
        type[(*n)++] = moec_blocks_find(one);
        word += len + (word[len] == ' ');
    }
    moec_free(text);
    return *n > 0 ? MOEC_OK : moec_fail(err, MOEC_EFORMAT, "%s: no types", group);
}

static moec_status read_arrays(arrays *a, moec_h5 *h, moec_err *err)
{
    static const int64_t want[MOEC_PROBES] = MOEC_PROBE_BITS;
    moec_status st = MOEC_OK;
    part p[PARTS];
    int64_t bits[MOEC_PROBES];
    MOEC_TRY(moec_h5_get_int(&a->n, h, group, "tensors", 1, MAX_ROWS, err));
    MOEC_TRY(moec_h5_get_int(&a->name_bytes, h, group, "name_bytes", 1, MAX_ROWS * (MAX_NAME + 1), err));
    MOEC_TRY(moec_h5_get_int(&a->square_values, h, group, "square_values", 0, INT32_MAX, err));
    MOEC_TRY(moec_h5_get_ints(bits, h, group, "probe_bits", MOEC_PROBES, err));
    for (int i = 0; i < MOEC_PROBES; i++)
        if (bits[i] != want[i])
            return moec_fail(err, MOEC_EFORMAT, "%s: probes of %lld bits, this program reads %lld", group, (long long)bits[i],
                             (long long)want[i]);
    list_parts(p, a);
    for (int i = 0; i < PARTS; i++)
        if (is_there(&p[i]))
            MOEC_TRY(moec_h5_get_array(p[i].at, h, p[i].path, p[i].dtype, p[i].rank, p[i].dim, err));
done:
    return st;
}

static moec_status malformed(const char *what, moec_err *err)
{
    return moec_fail(err, MOEC_EFORMAT, "%s: %s", group, what);
}

static moec_status fill_rows(moec_sensitivity *v, const arrays *a, const moec_block *type, moec_err *err)
{
    moec_status st = MOEC_OK;
    int64_t name = 0, square = 0;
    for (int64_t i = 0; i < a->n; i++) {
        moec_sensitive *r = &v->at[i];
        const uint8_t *end = name < a->name_bytes ? memchr(a->name + name, '\n', (size_t)(a->name_bytes - name)) : NULL;
        const int64_t cols = a->size[2 * i], squares = a->size[2 * i + 1];
        if (!end)
            return malformed("fewer names than tensors", err);
        if (cols < 1 || cols > MAX_COLS || (squares != 0 && squares != cols) || squares > a->square_values - square)
            return malformed("sizes that do not belong together", err);
        const int64_t len = end - (a->name + name);
        MOEC_TRY(moec_copy(&r->name, (const char *)a->name + name, (size_t)len, err));
        if (strlen(r->name) != (size_t)len)
            return malformed("a name with a zero byte", err);
        name += len + 1;
        r->cols = cols;
        if (squares) {
            MOEC_TRY(MOEC_NEW(r->square, (size_t)cols, err));
            memcpy(r->square, a->square + square, (size_t)cols * sizeof *r->square);
            square += cols;
        }
        for (int64_t k = 0; k < a->types; k++)
            if (type[k] != MOEC_BLOCK_COUNT)
                r->error[type[k]] = a->error[i * a->types + k];
        memcpy(r->probe, a->probe + i * MOEC_PROBES, sizeof r->probe);
        memcpy(r->kl, a->kl + i * MOEC_PROBES, sizeof r->kl);
    }
    if (name != a->name_bytes || square != a->square_values)
        return malformed("more names or squares than tensors", err);
done:
    return st;
}

moec_status moec__stats_gguf_get(moec_sensitivity **out, moec_h5 *h, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_block type[MAX_TYPES];
    moec_sensitivity *v = NULL;
    arrays a = {0};
    int64_t tokens;
    *out = NULL;
    MOEC_TRY(moec_h5_get_int(&tokens, h, group, "tokens", 0, INT64_MAX, err));
    MOEC_TRY(read_types(type, &a.types, h, err));
    MOEC_TRY(read_arrays(&a, h, err));
    MOEC_TRY(moec_sensitivity_new(&v, (size_t)a.n, err));
    v->tokens = tokens;
    MOEC_TRY(fill_rows(v, &a, type, err));
    *out = v;
    v = NULL;
done:
    release(&a);
    moec_sensitivity_free(v);
    return st;
}
