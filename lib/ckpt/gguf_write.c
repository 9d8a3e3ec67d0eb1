/* See gguf_write.h. */
#include "ckpt/gguf_write.h"

#include "base/file.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/par.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_FILES = 65535, MAX_KEY = 65535, PIECE = 4 << 20 };

typedef struct buffer {
    unsigned char *at;
    size_t n, cap;
} buffer;

typedef struct described {
    char *name;
    uint32_t type;
    int rank;
    int64_t dim[MOEC_GGUF_MAX_RANK];
    int64_t rows;
    size_t row;            /* bytes */
    uint64_t begin, bytes; /* within the data of its file */
} described;

typedef struct out_file {
    size_t first, n; /* tensors */
    buffer header;   /* padded */
    uint64_t data;   /* padded */
} out_file;

/* What moec_out_made is given for one tensor. */
typedef struct source {
    const described *tensor;
    size_t index;
    moec_gguf_rows_fn *rows;
    void *ctx;
} source;

struct moec_gguf_out {
    buffer keys; /* encoded */
    char **key;
    size_t n_keys, keys_cap;
    described *tensor;
    size_t n, cap;
    out_file *file;
    size_t files, files_cap;
    source *source;
    moec_err failed; /* the first thing that went wrong */
    bool closed;
};

moec_status moec_gguf_out_new(moec_gguf_out **out, moec_err *err)
{
    return MOEC_NEW(*out, 1, err);
}

void moec_gguf_out_free(moec_gguf_out *g)
{
    if (!g)
        return;
    for (size_t i = 0; i < g->n_keys; i++)
        moec_free(g->key[i]);
    for (size_t i = 0; i < g->n; i++)
        moec_free(g->tensor[i].name);
    for (size_t i = 0; i < g->files; i++)
        moec_free(g->file[i].header.at);
    moec_free(g->keys.at);
    moec_free(g->key);
    moec_free(g->tensor);
    moec_free(g->file);
    moec_free(g->source);
    moec_free(g);
}

/* --- bytes ----------------------------------------------------------------------------------------------------------- */

static moec_status put(buffer *b, const void *bytes, size_t n, moec_err *err)
{
    size_t end;
    if (!moec_add_size(&end, b->n, n))
        return moec_fail(err, MOEC_ENOMEM, "a GGUF header is too large");
    moec_status st = MOEC_GROW(b->at, b->cap, end, err);
    if (st == MOEC_OK && n > 0)
        memcpy(b->at + b->n, bytes, n);
    if (st == MOEC_OK)
        b->n = end;
    return st;
}

static moec_status put_little(buffer *b, uint64_t v, size_t n, moec_err *err)
{
    unsigned char bytes[8];
    for (size_t i = 0; i < n; i++)
        bytes[i] = (unsigned char)(v >> (8 * i));
    return put(b, bytes, n, err);
}

static moec_status put_string(buffer *b, const char *text, moec_err *err)
{
    const size_t n = strlen(text);
    moec_status st = put_little(b, n, 8, err);
    return st == MOEC_OK ? put(b, text, n, err) : st;
}

static uint64_t padded(uint64_t n)
{
    return (n + MOEC_GGUF_ALIGNMENT - 1) / MOEC_GGUF_ALIGNMENT * MOEC_GGUF_ALIGNMENT;
}

static moec_status pad(buffer *b, moec_err *err)
{
    static const unsigned char zeros[MOEC_GGUF_ALIGNMENT];
    return put(b, zeros, (size_t)(padded(b->n) - b->n), err);
}

/* --- keys ------------------------------------------------------------------------------------------------------------ */

/* Key and kind; of an array (kind of its items `item`, n of them) also those. False: something has failed. */
static bool begin_key(moec_gguf_out *g, const char *key, moec_gguf_kind kind, moec_gguf_kind item, uint64_t n)
{
    moec_status st = MOEC_OK;
    moec_err *err = &g->failed;
    const size_t len = strlen(key);
    if (err->code != MOEC_OK)
        return false;
    if (g->closed || len == 0 || len > MAX_KEY || strncmp(key, "split.", 6) == 0 || strcmp(key, "general.alignment") == 0) {
        st = moec_fail(err, MOEC_EINVAL, "key %.200s cannot be written", key);
        return false;
    }
    MOEC_TRY(MOEC_GROW(g->key, g->keys_cap, g->n_keys + 1, err));
    MOEC_TRY(moec_copy(&g->key[g->n_keys], key, len, err));
    g->n_keys++;
    MOEC_TRY(put_string(&g->keys, key, err));
    MOEC_TRY(put_little(&g->keys, kind, 4, err));
    if (kind == MOEC_GGUF_ARRAY) {
        MOEC_TRY(put_little(&g->keys, item, 4, err));
        MOEC_TRY(put_little(&g->keys, n, 8, err));
    }
done:
    return st == MOEC_OK;
}

/* What has failed is in g->failed, which begin_key and moec_gguf_out_close look at. */
static void put_value(moec_gguf_out *g, uint64_t v, size_t n)
{
    if (g->failed.code == MOEC_OK && put_little(&g->keys, v, n, &g->failed) != MOEC_OK)
        return;
}

static uint32_t bits_of(float v)
{
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    return bits;
}

static void put_utf8(moec_gguf_out *g, const char *text)
{
    if (g->failed.code == MOEC_OK && put_string(&g->keys, text, &g->failed) != MOEC_OK)
        return;
}

void moec_gguf_put_u32(moec_gguf_out *g, const char *key, uint32_t v)
{
    if (begin_key(g, key, MOEC_GGUF_U32, 0, 0))
        put_value(g, v, 4);
}

void moec_gguf_put_i32(moec_gguf_out *g, const char *key, int32_t v)
{
    if (begin_key(g, key, MOEC_GGUF_I32, 0, 0))
        put_value(g, (uint32_t)v, 4);
}

void moec_gguf_put_f32(moec_gguf_out *g, const char *key, float v)
{
    if (begin_key(g, key, MOEC_GGUF_F32, 0, 0))
        put_value(g, bits_of(v), 4);
}

void moec_gguf_put_bool(moec_gguf_out *g, const char *key, bool v)
{
    if (begin_key(g, key, MOEC_GGUF_BOOL, 0, 0))
        put_value(g, v, 1);
}

void moec_gguf_put_text(moec_gguf_out *g, const char *key, const char *utf8)
{
    if (begin_key(g, key, MOEC_GGUF_TEXT, 0, 0))
        put_utf8(g, utf8);
}

void moec_gguf_put_i32s(moec_gguf_out *g, const char *key, const int32_t *v, size_t n)
{
    if (begin_key(g, key, MOEC_GGUF_ARRAY, MOEC_GGUF_I32, n))
        for (size_t i = 0; i < n; i++)
            put_value(g, (uint32_t)v[i], 4);
}

void moec_gguf_put_u32s(moec_gguf_out *g, const char *key, const uint32_t *v, size_t n)
{
    if (begin_key(g, key, MOEC_GGUF_ARRAY, MOEC_GGUF_U32, n))
        for (size_t i = 0; i < n; i++)
            put_value(g, v[i], 4);
}

void moec_gguf_put_f32s(moec_gguf_out *g, const char *key, const float *v, size_t n)
{
    if (begin_key(g, key, MOEC_GGUF_ARRAY, MOEC_GGUF_F32, n))
        for (size_t i = 0; i < n; i++)
            put_value(g, bits_of(v[i]), 4);
}

void moec_gguf_put_bools(moec_gguf_out *g, const char *key, const bool *v, size_t n)
{
    if (begin_key(g, key, MOEC_GGUF_ARRAY, MOEC_GGUF_BOOL, n))
        for (size_t i = 0; i < n; i++)
            put_value(g, v[i], 1);
}

void moec_gguf_put_texts(moec_gguf_out *g, const char *key, const char *const *utf8, size_t n)
{
    if (begin_key(g, key, MOEC_GGUF_ARRAY, MOEC_GGUF_TEXT, n))
        for (size_t i = 0; i < n; i++)
            put_utf8(g, utf8[i]);
}

void moec_gguf_put_keys(moec_gguf_out *g, const moec_gguf_out *from)
{
    moec_status st = MOEC_OK;
    moec_err *err = &g->failed;
    if (err->code != MOEC_OK)
        return;
    if (g->closed || from->failed.code != MOEC_OK) {
        st = moec_fail(err, MOEC_EINVAL, "%s", g->closed ? "keys cannot be written behind the others" : from->failed.text);
        return;
    }
    MOEC_TRY(MOEC_GROW(g->key, g->keys_cap, g->n_keys + from->n_keys, err));
    for (size_t i = 0; i < from->n_keys; i++) {
        MOEC_TRY(moec_copy(&g->key[g->n_keys], from->key[i], strlen(from->key[i]), err));
        g->n_keys++;
    }
    MOEC_TRY(put(&g->keys, from->keys.at, from->keys.n, err));
done:
    return;
}

/* --- tensors --------------------------------------------------------------------------------------------------------- */

static moec_status describe(described *t, const char *name, uint32_t type, int rank, const int64_t *dim, moec_err *err)
{
    const moec_ggml_traits *traits = moec_ggml_type(type);
    const size_t len = strlen(name);
    size_t rows = 1, bytes;
    if (len == 0 || len > MOEC_GGUF_MAX_NAME)
        return moec_fail(err, MOEC_EINVAL, "tensor %.200s: its name has %zu bytes, GGUF allows 1 to %d", name, len,
                         MOEC_GGUF_MAX_NAME);
    if (!traits || rank < 1 || rank > MOEC_GGUF_MAX_RANK)
        return moec_fail(err, MOEC_EINVAL, "tensor %s: type %lu in %d dimensions cannot be written", name,
                         (unsigned long)type, rank);
    *t = (described){.type = type, .rank = rank};
    bool fits = true;
    for (int i = 0; i < rank; i++) {
        t->dim[i] = dim[i];
        fits = fits && dim[i] >= 0 && (i == 0 || moec_mul_size(&rows, rows, (size_t)dim[i]));
    }
    if (fits && dim[0] % traits->elements != 0)
        return moec_fail(err, MOEC_EINVAL, "tensor %s: rows of %lld, but %s comes in blocks of %lld", name, (long long)dim[0],
                         traits->name, (long long)traits->elements);
    if (!fits || !moec_mul_size(&t->row, (size_t)(dim[0] / traits->elements), traits->bytes) ||
        !moec_mul_size(&bytes, t->row, rows) || bytes > INT64_MAX / 2 || rows > INT64_MAX / 2)
        return moec_fail(err, MOEC_EINVAL, "tensor %s: its size overflows", name);
    t->rows = (int64_t)rows;
    t->bytes = bytes;
    return moec_copy(&t->name, name, len, err);
}

void moec_gguf_put_tensor(moec_gguf_out *g, const char *name, uint32_t type, int rank, const int64_t *dim)
{
    moec_status st = MOEC_OK;
    if (g->failed.code != MOEC_OK)
        return;
    if (g->closed) {
        st = moec_fail(&g->failed, MOEC_EINVAL, "tensor %s: the description is closed", name);
        return;
    }
    MOEC_TRY(MOEC_GROW(g->tensor, g->cap, g->n + 1, &g->failed));
    MOEC_TRY(describe(&g->tensor[g->n], name, type, rank, dim, &g->failed));
    g->n++;
done:
    return;
}

/* --- files ----------------------------------------------------------------------------------------------------------- */

static int by_text(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static moec_status check_unique(const moec_gguf_out *g, moec_err *err)
{
    moec_status st = MOEC_OK;
    const char **name = NULL;
    MOEC_TRY(MOEC_NEW(name, g->n > g->n_keys ? g->n : g->n_keys, err));
    for (int tensors = 0; tensors < 2; tensors++) {
        const size_t n = tensors ? g->n : g->n_keys;
        for (size_t i = 0; i < n; i++)
            name[i] = tensors ? g->tensor[i].name : g->key[i];
        if (n > 1)
            qsort(name, n, sizeof *name, by_text);
        for (size_t i = 1; i < n && st == MOEC_OK; i++)
            if (strcmp(name[i - 1], name[i]) == 0)
                st = moec_fail(err, MOEC_EINVAL, "%s %.200s is there twice", tensors ? "tensor" : "key", name[i]);
    }
done:
    moec_free(name);
    return st;
}

static moec_status lay_out(moec_gguf_out *g, uint64_t shard_bytes, moec_err *err)
{
    moec_status st = MOEC_OK;
    for (size_t i = 0; i < g->n || g->files == 0; i++) {
        out_file *f = g->files > 0 ? &g->file[g->files - 1] : NULL;
        const uint64_t bytes = i < g->n ? padded(g->tensor[i].bytes) : 0;
        if (!f || (shard_bytes > 0 && f->n > 0 && (f->data > shard_bytes || bytes > shard_bytes - f->data))) {
            MOEC_TRY(MOEC_GROW(g->file, g->files_cap, g->files + 1, err));
            f = &g->file[g->files++];
            *f = (out_file){.first = i};
        }
        if (i == g->n)
            break;
        if (bytes > INT64_MAX - f->data)
            return moec_fail(err, MOEC_EINVAL, "tensor %s: its file becomes too large", g->tensor[i].name);
        g->tensor[i].begin = f->data;
        f->data += bytes;
        f->n++;
    }
    if (g->files > MAX_FILES)
        st = moec_fail(err, MOEC_EINVAL, "%zu files, at most %d are possible: choose a larger shard size", g->files, MAX_FILES);
done:
    return st;
}

static moec_status put_split(buffer *b, const char *key, moec_gguf_kind kind, uint64_t v, size_t n, moec_err *err)
{
    moec_status st = MOEC_OK;
    MOEC_TRY(put_string(b, key, err));
    MOEC_TRY(put_little(b, kind, 4, err));
    MOEC_TRY(put_little(b, v, n, err));
done:
    return st;
}

static moec_status build_header(moec_gguf_out *g, size_t file, moec_err *err)
{
    moec_status st = MOEC_OK;
    out_file *f = &g->file[file];
    buffer *b = &f->header;
    const bool series = g->files > 1;
    MOEC_TRY(put(b, "GGUF", 4, err));
    MOEC_TRY(put_little(b, 3, 4, err));
    MOEC_TRY(put_little(b, f->n, 8, err));
    MOEC_TRY(put_little(b, (file == 0 ? g->n_keys : 0) + (series ? 3 : 0), 8, err));
    if (file == 0)
        MOEC_TRY(put(b, g->keys.at, g->keys.n, err));
    if (series) {
        MOEC_TRY(put_split(b, "split.no", MOEC_GGUF_U16, file, 2, err));
        MOEC_TRY(put_split(b, "split.count", MOEC_GGUF_U16, g->files, 2, err));
        MOEC_TRY(put_split(b, "split.tensors.count", MOEC_GGUF_I32, g->n, 4, err));
    }
    for (size_t i = f->first; i < f->first + f->n; i++) {
        const described *t = &g->tensor[i];
        MOEC_TRY(put_string(b, t->name, err));
        MOEC_TRY(put_little(b, (uint64_t)t->rank, 4, err));
        for (int k = 0; k < t->rank; k++)
            MOEC_TRY(put_little(b, (uint64_t)t->dim[k], 8, err));
        MOEC_TRY(put_little(b, t->type, 4, err));
        MOEC_TRY(put_little(b, t->begin, 8, err));
    }
    MOEC_TRY(pad(b, err));
done:
    return st;
}

moec_status moec_gguf_out_close(moec_gguf_out *g, uint64_t shard_bytes, moec_err *err)
{
    moec_status st = MOEC_OK;
    if (g->failed.code != MOEC_OK)
        return moec_fail(err, g->failed.code, "%s", g->failed.text);
    if (g->closed)
        return moec_fail(err, MOEC_EINVAL, "a GGUF description is closed twice");
    if (g->n > INT32_MAX)
        return moec_fail(err, MOEC_EINVAL, "%zu tensors do not fit into a GGUF", g->n);
    g->closed = true;
    MOEC_TRY(check_unique(g, err));
    MOEC_TRY(lay_out(g, shard_bytes, err));
    for (size_t i = 0; i < g->files; i++)
        MOEC_TRY(build_header(g, i, err));
done:
    return st;
}

size_t moec_gguf_out_files(const moec_gguf_out *g)
{
    return g->files;
}

uint64_t moec_gguf_out_size(const moec_gguf_out *g, size_t file)
{
    return g->file[file].header.n + g->file[file].data;
}

const void *moec_gguf_out_header(size_t *len, const moec_gguf_out *g, size_t file)
{
    *len = g->file[file].header.n;
    return g->file[file].header.at;
}

moec_status moec_gguf_out_name(char **out, const moec_gguf_out *g, const char *stem, size_t file, moec_err *err)
{
    return g->files > 1 ? moec_format(out, err, "%s-%05zu-of-%05zu.gguf", stem, file + 1, g->files)
                        : moec_format(out, err, "%s.gguf", stem);
}

/* --- through moec_writer --------------------------------------------------------------------------------------------- */

/* Bytes [from, from+n) of a tensor, which need not be whole rows: rows at the edges are made whole and cut. */
static moec_status make_bytes(void *out, void *ctx, uint64_t from, size_t n, moec_err *err)
{
    moec_status st = MOEC_OK;
    const source *s = ctx;
    const size_t row = s->tensor->row;
    const int64_t lo = (int64_t)(from / row), hi = (int64_t)((from + n + row - 1) / row);
    char *made = NULL;
    if (from % row == 0 && n % row == 0)
        return s->rows(out, s->ctx, s->index, lo, hi, err);
    MOEC_TRY(moec_alloc((void **)&made, (size_t)(hi - lo), row, err));
    MOEC_TRY(s->rows(made, s->ctx, s->index, lo, hi, err));
    memcpy(out, made + (from - (uint64_t)lo * row), n);
done:
    moec_free(made);
    return st;
}

moec_status moec_gguf_out_plan(moec_out *o, moec_gguf_out *g, const char *stem, moec_gguf_rows_fn *rows, void *ctx,
                               moec_err *err)
{
    moec_status st = MOEC_OK;
    char *name = NULL;
    if (!g->closed || g->source)
        return moec_fail(err, MOEC_EINVAL, "%s: its GGUF description is not closed, or planned already", stem);
    MOEC_TRY(MOEC_NEW(g->source, g->n, err));
    for (size_t i = 0; i < g->files; i++) {
        const out_file *f = &g->file[i];
        MOEC_TRY(moec_gguf_out_name(&name, g, stem, i, err));
        MOEC_TRY(moec_out_raw(o, name, f->header.at, f->header.n, f->data, err));
        for (size_t t = f->first; t < f->first + f->n; t++) {
            g->source[t] = (source){&g->tensor[t], t, rows, ctx};
            MOEC_TRY(moec_out_made(o, make_bytes, &g->source[t], 0, g->tensor[t].bytes, err));
            MOEC_TRY(moec_out_fill(o, "", 1, padded(g->tensor[t].bytes) - g->tensor[t].bytes, err));
        }
        moec_free(name);
        name = NULL;
    }
done:
    moec_free(name);
    return st;
}

/* --- one file -------------------------------------------------------------------------------------------------------- */

typedef struct writing {
    const moec_gguf_out *g;
    moec_gguf_rows_fn *rows;
    void *ctx;
    int fd;
    const char *path;
    size_t t;
} writing;

static moec_status write_at(int fd, const void *bytes, size_t n, uint64_t at, const char *path, moec_err *err)
{
    for (size_t done = 0; done < n;) {
        const ssize_t k = pwrite(fd, (const char *)bytes + done, n - done, (off_t)(at + done));
        if (k < 0 && errno != EINTR)
            return moec_fail_errno(err, errno, path);
        done += k > 0 ? (size_t)k : 0;
    }
    return MOEC_OK;
}

static moec_status write_rows(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    moec_status st = MOEC_OK;
    const writing *w = ctx;
    const described *t = &w->g->tensor[w->t];
    void *made = NULL;
    (void)worker;
    MOEC_TRY(moec_interrupted(err));
    MOEC_TRY(moec_alloc(&made, (size_t)(hi - lo), t->row, err));
    MOEC_TRY(w->rows(made, w->ctx, w->t, lo, hi, err));
    MOEC_TRY(write_at(w->fd, made, (size_t)(hi - lo) * t->row,
                      w->g->file[0].header.n + t->begin + (uint64_t)lo * t->row, w->path, err));
done:
    moec_free(made);
    return st;
}

moec_status moec_gguf_write(const char *path, const moec_gguf_out *g, moec_gguf_rows_fn *rows, void *ctx, moec_err *err)
{
    moec_status st = MOEC_OK;
    writing w = {g, rows, ctx, -1, NULL, 0};
    char *tmp = NULL;
    if (!g->closed || g->files != 1)
        return moec_fail(err, MOEC_EINVAL, "%s: its GGUF description is not closed, or of several files", path);
    MOEC_TRY(moec_format(&tmp, err, "%s.tmp", path));
    w.path = tmp;
    w.fd = open(tmp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (w.fd < 0 || ftruncate(w.fd, (off_t)moec_gguf_out_size(g, 0)) != 0) { /* what is not written, padding, is zero */
        st = moec_fail_errno(err, errno, tmp);
        goto done;
    }
    MOEC_TRY(write_at(w.fd, g->file[0].header.at, g->file[0].header.n, 0, tmp, err));
    for (w.t = 0; w.t < g->n; w.t++) {
        const described *t = &g->tensor[w.t];
        if (t->bytes > 0)
            MOEC_TRY(moec_par_for(t->rows, t->row < PIECE ? (int64_t)(PIECE / t->row) : 1, write_rows, &w, err));
    }
    MOEC_TRY(moec_file_publish(tmp, path, err));
done:
    if (w.fd >= 0)
        close(w.fd);
    if (w.fd >= 0 && st != MOEC_OK)
        unlink(tmp);
    moec_free(tmp);
    return st;
}
