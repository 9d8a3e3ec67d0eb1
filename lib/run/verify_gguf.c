/* See verify_gguf.h. */
#include "run/verify_gguf.h"

#include "base/file.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/par.h"
#include "model/gguf_open.h"
#include "run/gguf_quant.h"
#include "run/gguf_tokenizer.h"

#include <ctype.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const double allowed[MOEC_BLOCK_COUNT] = {
    [MOEC_BLOCK_F16] = 0.0, [MOEC_BLOCK_BF16] = 0.0, [MOEC_BLOCK_Q8_0] = 0.03, [MOEC_BLOCK_Q6_K] = 0.1, [MOEC_BLOCK_Q5_0] = 0.2,
    [MOEC_BLOCK_Q5_1] = 0.2, [MOEC_BLOCK_Q5_K] = 0.2, [MOEC_BLOCK_Q4_0] = 0.4, [MOEC_BLOCK_Q4_1] = 0.4, [MOEC_BLOCK_Q4_K] = 0.4,
    [MOEC_BLOCK_IQ4_NL] = 0.4, [MOEC_BLOCK_IQ4_XS] = 0.4, [MOEC_BLOCK_MXFP4] = 0.4, [MOEC_BLOCK_Q3_K] = 0.6, [MOEC_BLOCK_Q2_K] = 0.85,
    [MOEC_BLOCK_TQ1_0] = 0.95, [MOEC_BLOCK_TQ2_0] = 0.95,
};

/* --- which file ------------------------------------------------------------------------------------------------------ */

static bool ends_so(const char *name, const char *end)
{
    const size_t n = strlen(name), k = strlen(end);
    return n > k && strcmp(name + n - k, end) == 0;
}

/* Does the name belong to a file behind the first of a series, "-00002-of-00005.gguf"? */
static bool goes_on(const char *name)
{
    static const char form[] = "-#####-of-#####.gguf";
    const size_t n = strlen(name), k = sizeof form - 1;
    if (n <= k)
        return false;
    for (size_t i = 0; i < k; i++)
        if (form[i] == '#' ? !isdigit((unsigned char)name[n - k + i]) : name[n - k + i] != form[i])
            return false;
    return strncmp(name + n - k, "-00001", 6) != 0;
}

/* The file itself, or in a folder the first of a series or the only one; NULL: there is none, or (*several) it is not the only one. */
static char *file_of(bool *several, const char *path)
{
    char **names = NULL, *out = NULL;
    size_t n = 0;
    moec_err err = {MOEC_OK, ""};
    if (moec_path_is_dir(path)) {
        if (moec_dir_list(&names, &n, path, &err) == MOEC_OK)
            for (size_t i = 0; i < n; i++) { /* sorted: the first of a series stands first */
                if (!ends_so(names[i], ".gguf"))
                    continue;
                *several = *several || (out && !goes_on(names[i]));
                if (!out && moec_path_join(&out, path, names[i], &err) != MOEC_OK)
                    out = NULL;
            }
        moec_names_free(names, n);
        return out;
    }
    return (moec_gguf_is(path) || ends_so(path, ".gguf")) && moec_copy(&out, path, strlen(path), &err) == MOEC_OK ? out : NULL;
}

bool moec_verify_gguf_is(const char *path)
{
    char *config = NULL;
    moec_err err = {MOEC_OK, ""};
    bool model = false;
    if (moec_path_is_dir(path) && moec_path_join(&config, path, "config.json", &err) == MOEC_OK)
        model = moec_path_exists(config);
    moec_free(config);
    bool several = false;
    char *file = model ? NULL : file_of(&several, path);
    moec_free(file);
    return file != NULL;
}

/* --- problems -------------------------------------------------------------------------------------------------------- */

static void problem(moec_verify_gguf_report *r, const char *fmt, ...) MOEC_PRINTF(2, 3);
static void problem(moec_verify_gguf_report *r, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    if (r->problems < MOEC_VERIFY_GGUF_SHOWN) {
        vsnprintf(r->problem[r->problems], sizeof r->problem[0], fmt, args);
        moec_plain_line(r->problem[r->problems]);
    }
    va_end(args);
    r->problems++;
}

/* --- keys ------------------------------------------------------------------------------------------------------------ */

/* Bytes of a value in the file; texts in an array have each their length. */
static size_t value_bytes(const moec_gguf_value *v)
{
    static const size_t size[MOEC_GGUF_KINDS] = {1, 1, 2, 2, 4, 4, 4, 1, 1, 0, 8, 8, 8};
    moec_gguf_texts it = {NULL, 0};
    const char *text;
    size_t len, sum = 0;
    if (v->kind != MOEC_GGUF_ARRAY)
        return v->kind == MOEC_GGUF_TEXT ? (size_t)v->n : size[v->kind];
    if (v->item != MOEC_GGUF_TEXT)
        return (size_t)v->n * size[v->item];
    while (moec_gguf_each_text(v, &it, &text, &len))
        sum += 8 + len;
    return sum;
}

static bool same_value(const moec_gguf_value *a, const moec_gguf_value *b)
{
    const bool counted = a->kind == MOEC_GGUF_ARRAY || a->kind == MOEC_GGUF_TEXT;
    return a->kind == b->kind && (!counted || (a->item == b->item && a->n == b->n)) && value_bytes(a) == value_bytes(b) &&
           memcmp(a->at, b->at, value_bytes(a)) == 0;
}

static moec_status check_keys(moec_verify_gguf_report *r, const moec_gguf *g, const moec_gguf_model *x, const moec_model *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_gguf_out *want = NULL;
    moec_gguf_index ix = {.value = NULL};
    size_t len;
    MOEC_TRY(moec_gguf_out_new(&want, err));
    moec_gguf_model_describe(want, x, "");
    MOEC_TRY(moec_gguf_tokenizer(want, m, err));
    MOEC_TRY(moec_gguf_out_close(want, 0, err));
    const void *front = moec_gguf_out_header(&len, want, 0);
    MOEC_TRY(moec_gguf_parse(&ix, front, len, moec_gguf_out_size(want, 0), "the expected keys", err));
    for (size_t i = 0; i < ix.n_values; i++) {
        const moec_gguf_value *v = &ix.value[i], *found = moec_gguf_find(moec_gguf_front(g), v->key);
        if (strcmp(v->key, "general.name") == 0 || strcmp(v->key, "general.file_type") == 0)
            continue;
        r->keys++;
        if (!found)
            problem(r, "key %s is missing", v->key);
        else if (!same_value(v, found))
            problem(r, "key %s is not what the source says", v->key);
    }
done:
    moec_gguf_index_release(&ix);
    moec_gguf_out_free(want);
    return st;
}

/* --- tensors --------------------------------------------------------------------------------------------------------- */

typedef struct comparison {
    const moec_gguf_model *x; /* NULL: no source */
    const moec_gguf_tensor *t;
    size_t index;             /* in x */
    int64_t rows, sampled;    /* there are, and of these are looked at, evenly */
    double *part;             /* [sampled][2] sums of squares, of the error and of the source; or in front one of these: */
} comparison;
static const double unlike = -1.0, wild = -2.0; /* a row that is not the source's, or not finite */

static moec_status stored(float *out, const moec_gguf_tensor *t, const unsigned char *row, moec_err *err)
{
    if (t->type == MOEC_GGML_F32) {
        memcpy(out, row, (size_t)t->dim[0] * sizeof *out);
        return MOEC_OK;
    }
    return moec_blocks_read(out, row, t->dim[0], moec_gguf_quant_block(t->type), err);
}

/* What a value must be where nothing is chosen. */
static float exact(float v, uint32_t type)
{
    float out = v;
    const uint16_t half = type == MOEC_GGML_F16 ? moec_to_f16(v) : moec_to_bf16(v);
    if (type == MOEC_GGML_F16)
        moec_dtypes[MOEC_F16].to_f32(&out, &half, 1);
    else if (type == MOEC_GGML_BF16)
        moec_dtypes[MOEC_BF16].to_f32(&out, &half, 1);
    return out;
}

static moec_status compare_rows(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    moec_status st = MOEC_OK;
    comparison *c = ctx;
    float *got = NULL, *want = NULL;
    const int64_t n = c->t->dim[0];
    const size_t row_bytes = c->rows > 0 ? (size_t)(c->t->bytes / (uint64_t)c->rows) : 0;
    const bool strict = c->t->type == MOEC_GGML_F32 || c->t->type == MOEC_GGML_F16 || c->t->type == MOEC_GGML_BF16 ||
                        (c->x && c->t->type == MOEC_GGML_MXFP4 && moec_gguf_model_codes(c->x, c->index));
    (void)worker;
    MOEC_TRY(moec_interrupted(err));
    MOEC_TRY(MOEC_NEW(got, (size_t)n, err));
    MOEC_TRY(MOEC_NEW(want, (size_t)n, err));
    for (int64_t k = lo; k < hi; k++) {
        const int64_t row = c->sampled == c->rows ? k : (int64_t)((double)k * ((double)c->rows / (double)c->sampled));
        double *part = c->part + 2 * k;
        MOEC_TRY(stored(got, c->t, (const unsigned char *)c->t->data + (size_t)row * row_bytes, err));
        if (c->x)
            MOEC_TRY(moec_gguf_model_read(want, c->x, c->index, row, row + 1, err));
        for (int64_t i = 0; i < n && part[0] >= 0.0; i++) {
            const double d = (double)got[i] - (double)want[i];
            if (!isfinite(got[i]))
                part[0] = wild;
            else if (c->x && strict && got[i] != exact(want[i], c->t->type))
                part[0] = unlike;
            else {
                part[0] += d * d;
                part[1] += (double)want[i] * (double)want[i];
            }
        }
    }
    if (c->x)
        moec_gguf_model_drop(c->x, c->index, 0, c->rows);
done:
    moec_free(want);
    moec_free(got);
    return st;
}

static void judge(moec_verify_gguf_report *r, const comparison *c)
{
    const char *name = c->t->name, *type = moec_ggml_type(c->t->type)->name;
    double error = 0.0, size = 0.0;
    const moec_block b = moec_gguf_quant_block(c->t->type);
    const double limit = c->x && b != MOEC_BLOCK_COUNT ? allowed[b] : 0.0, most = 2.5 * limit + 0.05;
    for (int64_t k = 0; k < c->sampled; k++) {
        const int64_t row = c->sampled == c->rows ? k : (int64_t)((double)k * ((double)c->rows / (double)c->sampled));
        if (c->part[2 * k] < 0.0) {
            if (c->part[2 * k] <= wild)
                problem(r, "%s: row %" PRId64 " (%s) has a value that is not finite", name, row, type);
            else
                problem(r, "%s: row %" PRId64 " (%s) is not the source's", name, row, type);
            return;
        }
        if (limit > 0.0 && c->part[2 * k] > most * most * c->part[2 * k + 1]) {
            problem(r, "%s: row %" PRId64 " differs by %.3g of its size, %s allows %.3g: damaged", name, row,
                    c->part[2 * k + 1] > 0.0 ? sqrt(c->part[2 * k] / c->part[2 * k + 1]) : HUGE_VAL, type, most);
            return;
        }
        error += c->part[2 * k];
        size += c->part[2 * k + 1];
    }
    if (!(limit > 0.0) || !(error > 0.0))
        return;
    const double relative = size > 0.0 ? sqrt(error / size) : HUGE_VAL;
    if (relative > limit)
        problem(r, "%s: differs by %.3g of its size, %s allows %.3g: damaged, or rows are not where they belong", name, relative, type, limit);
    if (relative / limit > r->worst) {
        r->worst = relative / limit;
        snprintf(r->worst_tensor, sizeof r->worst_tensor, "%s", name);
    }
}

/* x NULL: values alone. */
static moec_status check_values(moec_verify_gguf_report *r, const moec_gguf_tensor *t, const moec_gguf_model *x, size_t index, moec_err *err)
{
    moec_status st = MOEC_OK;
    comparison c = {.x = x, .t = t, .index = index, .rows = t->dim[1] * t->dim[2] * t->dim[3]};
    const int64_t experts = t->dim[2] * t->dim[3], least = experts > MOEC_VERIFY_GGUF_ROWS ? experts : MOEC_VERIFY_GGUF_ROWS;
    if (t->type != MOEC_GGML_F32 && moec_gguf_quant_block(t->type) == MOEC_BLOCK_COUNT) {
        problem(r, "%s: type %s is none that this program writes", t->name, moec_ggml_type(t->type)->name);
        return MOEC_OK;
    }
    if (t->bytes == 0) /* rows of nothing, of which there may be any number */
        return MOEC_OK;
    c.sampled = c.rows < least ? c.rows : least;
    MOEC_TRY(MOEC_NEW(c.part, 2 * (size_t)c.sampled, err));
    MOEC_TRY(moec_par_for(c.sampled, 16, compare_rows, &c, err));
    judge(r, &c);
    r->rows += (uint64_t)c.sampled;
    r->all_rows += (uint64_t)c.rows;
    moec_pages_drop(t->data, (size_t)t->bytes);
done:
    moec_free(c.part);
    return st;
}

static bool same_shape(const moec_gguf_tensor *a, const moec_gguf_tensor *b)
{
    bool same = a->rank == b->rank;
    for (int k = 0; k < MOEC_GGUF_MAX_RANK; k++)
        same = same && a->dim[k] == b->dim[k];
    return same;
}

static moec_status check_tensors(moec_verify_gguf_report *r, const moec_gguf *g, moec_gguf_model *x, moec_err *err)
{
    moec_status st = MOEC_OK;
    size_t known = 0;
    for (size_t i = 0; i < moec_gguf_model_count(x); i++) {
        const moec_gguf_tensor *want = moec_gguf_model_at(x, i), *t = moec_gguf_named(g, want->name);
        known += t != NULL;
        if (!t)
            problem(r, "tensor %s is missing", want->name);
        else if (!same_shape(t, want))
            problem(r, "tensor %s has another shape than in the source", want->name);
        else if (!moec_gguf_model_matrix(x, i) && t->type != MOEC_GGML_F32)
            problem(r, "tensor %s is %s; readers expect F32", want->name, moec_ggml_type(t->type)->name);
        else
            MOEC_TRY(check_values(r, t, x, i, err));
    }
    for (size_t i = 0; known < moec_gguf_count(g) && i < moec_gguf_count(g); i++) {
        bool found = false;
        for (size_t k = 0; k < moec_gguf_model_count(x) && !found; k++)
            found = strcmp(moec_gguf_model_at(x, k)->name, moec_gguf_at(g, i)->name) == 0;
        if (!found)
            problem(r, "tensor %s is not of the source", moec_gguf_at(g, i)->name);
    }
done:
    return st;
}

moec_status moec_verify_gguf(moec_verify_gguf_report **out, const char *path, const moec_model *source, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_verify_gguf_report *r = NULL;
    moec_gguf *g = NULL;
    moec_gguf_model *x = NULL;
    moec_err why = {MOEC_OK, ""};
    bool several = false;
    char *file = file_of(&several, path);
    *out = NULL;
    MOEC_TRY(MOEC_NEW(r, 1, err));
    r->against_source = source != NULL;
    if (source)
        MOEC_TRY(moec_gguf_model_new(&x, source, MOEC_GGML_F16, err));
    if (!file) {
        st = moec_fail(err, MOEC_EINVAL, "%s: no GGUF file, and no folder with one", path);
        goto done;
    }
    if (several) {
        st = moec_fail(err, MOEC_EINVAL, "%s: holds more than one GGUF; name the file, of a series the first", path);
        goto done;
    }
    st = moec_gguf_open(&g, file, &why);
    if (st == MOEC_EFORMAT) {
        problem(r, "%s", why.text);
        *out = r;
        r = NULL;
        st = MOEC_OK;
        goto done;
    }
    if (st != MOEC_OK) {
        st = moec_fail(err, st, "%s", why.text);
        goto done;
    }
    r->files = moec_gguf_files(g);
    r->tensors = moec_gguf_count(g);
    for (size_t i = 0; i < moec_gguf_count(g); i++)
        r->bytes += moec_gguf_at(g, i)->bytes;
    if (x) {
        MOEC_TRY(check_keys(r, g, x, source, err));
        MOEC_TRY(check_tensors(r, g, x, err));
    }
    for (size_t i = 0; !x && i < moec_gguf_count(g); i++)
        MOEC_TRY(check_values(r, moec_gguf_at(g, i), NULL, 0, err));
    *out = r;
    r = NULL;
done:
    moec_gguf_close(g);
    moec_gguf_model_free(x);
    moec_free(file);
    moec_free(r);
    return st;
}

moec_json *moec_verify_gguf_json(const moec_verify_gguf_report *r)
{
    moec_json *o = moec_json_new_object(), *list = moec_json_new_array();
    moec_json_set(o, "ok", moec_json_new_bool(r->problems == 0));
    moec_json_set(o, "format", moec_json_new_string("gguf"));
    moec_json_set(o, "against_source", moec_json_new_bool(r->against_source));
    moec_json_set(o, "files", moec_json_new_int((int64_t)r->files));
    moec_json_set(o, "tensors", moec_json_new_int((int64_t)r->tensors));
    moec_json_set(o, "keys", moec_json_new_int((int64_t)r->keys));
    moec_json_set(o, "bytes", moec_json_new_int((int64_t)r->bytes));
    moec_json_set(o, "rows", moec_json_new_int((int64_t)r->rows));
    moec_json_set(o, "all_rows", moec_json_new_int((int64_t)r->all_rows));
    moec_json_set(o, "worst", moec_json_new_real(r->worst));
    moec_json_set(o, "worst_tensor", moec_json_new_string(r->worst_tensor));
    for (uint64_t i = 0; i < r->problems && i < MOEC_VERIFY_GGUF_SHOWN; i++)
        moec_json_push(list, moec_json_new_string(r->problem[i]));
    moec_json_set(o, "problems", list);
    return o;
}
