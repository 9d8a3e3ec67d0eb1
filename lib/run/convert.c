/* See convert.h. */
#include "run/convert.h"

#include "base/log.h"
#include "base/mem.h"
#include "base/version.h"
#include "ckpt/writer.h"
#include "run/gguf_words.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { BUFFER = 16384, SLAB = 32 };

/* A tensor of the output. Of stacked experts, value (e, x, s + y sources) is value (y, x) of matrix s of expert e. */
typedef struct piece {
    char *name;
    moec_dtype dtype;
    int rank;
    int64_t dim[3];
    uint64_t bytes;
    moec_weight w;           /* of one matrix */
    const moec_layer *stack; /* of stacked ones, or NULL */
    int sources, first;      /* of a stack: gate and up, or down alone */
} piece;

typedef struct job {
    const moec_model *m;
    const moec_convert_options *opt;
    moec_dtype dtype;
    piece *piece;
    size_t n, cap;
    uint64_t bytes;
    size_t shards;
    moec_out *files;
    char *config, *index;
    moec_gguf_words words;
} job;

/* --- values ---------------------------------------------------------------------------------------------------------- */

static moec_status put(unsigned char *out, const float *in, int64_t n, const piece *p, moec_err *err)
{
    for (int64_t i = 0; i < n; i++) {
        bool ok = isfinite(in[i]);
        if (p->dtype == MOEC_F32) {
            memcpy(out + 4 * i, &in[i], 4);
        } else {
            const uint16_t h = p->dtype == MOEC_BF16 ? moec_to_bf16(in[i]) : moec_to_f16(in[i]);
            ok = ok && (h & 0x7fff) != (p->dtype == MOEC_BF16 ? 0x7f80 : 0x7c00);
            memcpy(out + 2 * i, &h, 2);
        }
        if (!ok)
            return moec_fail(err, MOEC_ENUMERIC, "tensor %s: %g is no value of %s", p->name, (double)in[i], moec_dtypes[p->dtype].name);
    }
    return MOEC_OK;
}

static moec_status make_matrix(unsigned char *out, const piece *p, int64_t at, int64_t n, moec_err *err)
{
    float buf[BUFFER];
    const int64_t cols = p->w.cols, size = moec_dtypes[p->dtype].bytes;
    while (n > 0) {
        const int64_t r = at / cols, c = at % cols, whole = n / cols < BUFFER / cols ? n / cols : BUFFER / cols;
        int64_t rows = 1, take = cols - c < n ? cols - c : n;
        take = take < BUFFER ? take : BUFFER;
        if (c == 0 && whole > 1) {
            rows = whole;
            take = cols;
        }
        moec_weight_read(buf, take, &p->w, r, rows, c, take);
        moec_status st = put(out, buf, rows * take, p, err);
        if (st != MOEC_OK)
            return st;
        out += rows * take * size;
        at += rows * take;
        n -= rows * take;
    }
    return MOEC_OK;
}

static const moec_weight *source(const piece *p, int64_t e, int s)
{
    return moec_mlp_matrix(&p->stack->expert[e], p->first + s);
}

/* Columns of an expert become rows: SLAB at a time. */
static moec_status make_stack(unsigned char *out, const piece *p, int64_t at, int64_t n, moec_err *err)
{
    const int64_t X = p->dim[1], width = p->dim[2], Y = width / p->sources, size = moec_dtypes[p->dtype].bytes;
    float *slab = NULL, *line = NULL;
    moec_status st = MOEC_OK;
    int64_t known = -1; /* which slab is there */
    MOEC_TRY(moec_alloc((void **)&slab, (size_t)width, SLAB * sizeof *slab, err));
    MOEC_TRY(MOEC_NEW(line, (size_t)width, err));
    while (n > 0) {
        const int64_t row = at / width, e = row / X, x = row % X, k = at % width, take = width - k < n ? width - k : n;
        const int64_t begin = x / SLAB * SLAB, cols = X - begin < SLAB ? X - begin : SLAB, id = e * X + begin;
        for (int s = 0; id != known && s < p->sources; s++)
            moec_weight_read(slab + s * Y * SLAB, SLAB, source(p, e, s), 0, Y, begin, cols);
        if (known >= 0 && known / X != e)
            for (int s = 0; s < p->sources; s++)
                moec_weight_drop(source(p, e - 1, s));
        known = id;
        for (int64_t i = 0; i < width; i++)
            line[i] = slab[(i % p->sources * Y + i / p->sources) * SLAB + x - begin];
        MOEC_TRY(put(out, line + k, take, p, err));
        out += take * size;
        at += take;
        n -= take;
    }
done:
    moec_free(slab);
    moec_free(line);
    return st;
}

/* moec_make_fn */
static moec_status make(void *out, void *ctx, uint64_t from, size_t n, moec_err *err)
{
    const piece *p = ctx;
    const int64_t size = moec_dtypes[p->dtype].bytes, at = (int64_t)from / size, values = (int64_t)n / size;
    moec_status st = p->stack ? make_stack(out, p, at, values, err) : make_matrix(out, p, at, values, err);
    moec_weight_drop(&p->w); /* what other threads still read of it comes back from the page cache */
    return st;
}

/* --- the list -------------------------------------------------------------------------------------------------------- */

static moec_status add(piece **out, job *j, const char *name, size_t len, moec_dtype dtype, int rank, const int64_t *dim, moec_err *err)
{
    moec_status st = MOEC_OK;
    MOEC_TRY(MOEC_GROW(j->piece, j->cap, j->n + 1, err));
    piece *p = &j->piece[j->n];
    *p = (piece){.dtype = dtype, .rank = rank, .bytes = (uint64_t)moec_dtypes[dtype].bytes};
    MOEC_TRY(moec_copy(&p->name, name, len, err));
    j->n++;
    for (int i = 0; i < rank; i++) {
        p->dim[i] = dim[i];
        p->bytes *= (uint64_t)dim[i]; /* of tensors that lie in a file: far below 2^64 */
    }
    j->bytes += p->bytes;
    *out = p;
done:
    return st;
}

/* "X.weight_q4_k" is written as "X.weight". */
static moec_status add_matrix(job *j, const moec_weight *w, moec_err *err)
{
    if (!w->of)
        return MOEC_OK;
    const char *name = w->of->name, *mark = w->storage == MOEC_BLOCKS ? strstr(name, ".weight_") : NULL;
    const int64_t dim[2] = {w->rows, w->cols};
    piece *p;
    moec_status st = add(&p, j, name, mark ? (size_t)(mark - name) + sizeof ".weight" - 1 : strlen(name), j->dtype, 2, dim, err);
    if (st == MOEC_OK)
        p->w = *w;
    return st;
}

static moec_status add_plain(job *j, const moec_tensor *t, moec_dtype dtype, moec_err *err)
{
    piece *p;
    if (!t)
        return MOEC_OK;
    moec_status st = add(&p, j, t->name, strlen(t->name), dtype, t->rank, t->dim, err);
    if (st == MOEC_OK)
        p->w = moec_weight_of(t);
    return st;
}

/* gpt-oss: gate and up in turns in one tensor, down in another, inputs outside. */
static moec_status add_stacks(job *j, const moec_layer *l, const moec_expert_names *names, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_dims *d = &j->m->dims;
    const char *const pattern[2] = {names->gate, names->down};
    const int64_t dim[2][3] = {{d->experts, d->hidden, 2 * d->expert_width}, {d->experts, d->expert_width, d->hidden}};
    for (int k = 0; k < 2; k++) {
        char name[256];
        piece *p;
        const char *number = strchr(pattern[k], '%');
        const int n = snprintf(name, sizeof name, "%.*s%" PRId64 "%s", (int)(number - pattern[k]), pattern[k], l->index, number + 2);
        MOEC_TRY(add(&p, j, name, (size_t)n, j->dtype, 3, dim[k], err));
        p->stack = l;
        p->sources = k == 0 ? 2 : 1;
        p->first = k == 0 ? 0 : 2;
    }
    MOEC_TRY(add_plain(j, l->gate_up_bias, j->dtype, err));
    MOEC_TRY(add_plain(j, l->down_bias, j->dtype, err));
done:
    return st;
}

static moec_status add_experts(job *j, const moec_layer *l, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_family *f = j->m->family;
    if (!l->expert)
        return MOEC_OK;
    for (int i = 0; f->gguf.experts.gate && i < MOEC_LAYOUTS; i++)
        if (f->experts[i].gate && f->experts[i].layout == MOEC_LAYOUT_IN_OUT_PAIRS)
            return add_stacks(j, l, &f->experts[i], err);
    for (int64_t e = 0; e < j->m->dims.experts; e++) {
        MOEC_TRY(add_matrix(j, &l->expert[e].gate, err));
        MOEC_TRY(add_matrix(j, &l->expert[e].up, err));
        MOEC_TRY(add_matrix(j, &l->expert[e].down, err));
    }
done:
    return st;
}

static moec_status add_all(job *j, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_model *m = j->m;
    MOEC_TRY(add_matrix(j, &m->embedding, err));
    for (int64_t i = 0; i < m->dims.layers; i++) {
        const moec_layer *l = &m->layer[i];
        for (int k = 0; k < MOEC_VEC_COUNT; k++)
            MOEC_TRY(add_plain(j, l->vec[k], k == MOEC_VEC_SELECTION_BIAS ? MOEC_F32 : j->dtype, err));
        for (int k = 0; k < MOEC_MAT_COUNT; k++) {
            MOEC_TRY(add_matrix(j, &l->mat[k], err));
            MOEC_TRY(add_plain(j, l->bias[k], j->dtype, err));
        }
        MOEC_TRY(add_experts(j, l, err));
    }
    MOEC_TRY(add_plain(j, m->final_norm, j->dtype, err));
    if (!m->dims.tied)
        MOEC_TRY(add_matrix(j, &m->head, err));
done:
    return st;
}

/* --- files ----------------------------------------------------------------------------------------------------------- */

static void shard_name(char *out, size_t cap, const job *j, size_t s)
{
    if (j->shards == 1)
        snprintf(out, cap, "model.safetensors");
    else
        snprintf(out, cap, "model-%05zu-of-%05zu.safetensors", s + 1, j->shards);
}

/* Does piece i begin a new file, after `bytes` of the current one? */
static bool begins(const job *j, size_t i, uint64_t bytes)
{
    return i == 0 || (j->opt->shard_bytes > 0 && bytes > 0 && bytes + j->piece[i].bytes > j->opt->shard_bytes);
}

static moec_status lay_out(job *j, moec_err *err)
{
    moec_status st = MOEC_OK;
    uint64_t bytes = 0;
    size_t s = 0;
    char name[64];
    moec_json *index = moec_json_new_object(), *map = moec_json_new_object(), *meta = moec_json_new_object();
    for (size_t i = 0; i < j->n; i++) {
        if (begins(j, i, bytes)) {
            j->shards++;
            bytes = 0;
        }
        bytes += j->piece[i].bytes;
    }
    for (size_t i = 0; i < j->n; i++) {
        piece *p = &j->piece[i];
        if (begins(j, i, bytes)) {
            shard_name(name, sizeof name, j, s++);
            MOEC_TRY(moec_out_shard(j->files, name, NULL, err));
            bytes = 0;
        }
        MOEC_TRY(moec_out_tensor(j->files, p->name, p->dtype, p->rank, p->dim, err));
        MOEC_TRY(moec_out_made(j->files, make, p, 0, p->bytes, err));
        moec_json_set(map, p->name, moec_json_new_string(name));
        bytes += p->bytes;
    }
    moec_json_set(meta, "total_size", moec_json_new_int((int64_t)j->bytes));
    moec_json_set(index, "metadata", meta);
    moec_json_set(index, "weight_map", map);
    meta = map = NULL;
    if (j->shards > 1)
        MOEC_TRY(moec_json_dump(&j->index, index, 2, err));
done:
    moec_json_free(meta);
    moec_json_free(map);
    moec_json_free(index);
    return st;
}

static moec_status add_text(job *j, const char *name, const char *text, moec_err *err)
{
    return text ? moec_out_text(j->files, name, text, strlen(text), err) : MOEC_OK;
}

static moec_status side_files(job *j, moec_err *err)
{
    static const char *const words[] = {[MOEC_F32] = "float32", [MOEC_F16] = "float16", [MOEC_BF16] = "bfloat16"};
    moec_status st = MOEC_OK;
    moec_json *config = moec_json_clone(moec_ckpt_config(j->m->ckpt));
    moec_json_set(config, "torch_dtype", moec_json_new_string(words[j->dtype]));
    MOEC_TRY(moec_json_dump(&j->config, config, 2, err));
    MOEC_TRY(moec_gguf_words_of(&j->words, j->m, err));
    MOEC_TRY(add_text(j, "config.json", j->config, err));
    MOEC_TRY(add_text(j, "model.safetensors.index.json", j->index, err));
    MOEC_TRY(add_text(j, "tokenizer.json", j->words.tokenizer, err));
    MOEC_TRY(add_text(j, "tokenizer_config.json", j->words.config, err));
    MOEC_TRY(add_text(j, "generation_config.json", j->words.generation, err));
done:
    moec_json_free(config);
    return st;
}

static moec_status write_all(const job *j, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_writer *w = NULL;
    moec_model *made = NULL;
    moec_digest print;
    char *identity = NULL;
    MOEC_TRY(moec_ckpt_fingerprint(&print, j->m->ckpt, err));
    MOEC_TRY(moec_format(&identity, err, "%s\nconvert\n%s\n%s\n%" PRIu64, moec_version(), print.hex, moec_dtypes[j->dtype].name,
                         j->opt->shard_bytes));
    const moec_writer_options o = {.dir = j->opt->out, .source = moec_ckpt_dir(j->m->ckpt), .identity = identity,
                                   .overwrite = j->opt->overwrite, .resume = j->opt->resume};
    MOEC_TRY(moec_writer_open(&w, j->files, &o, err));
    MOEC_TRY(moec_writer_run(w, err));
    st = moec_ckpt_unchanged(j->m->ckpt, err);
    if (st == MOEC_OK)
        st = moec_within(err, moec_model_open(&made, moec_writer_dir(w), err), "verifying the output");
    if (st != MOEC_OK) {
        moec_writer_discard(w);
        goto done;
    }
    MOEC_TRY(moec_writer_publish(w, err));
done:
    moec_model_close(made);
    moec_writer_close(w);
    moec_free(identity);
    return st;
}

static moec_dtype choose(const moec_model *m, moec_dtype asked)
{
    const moec_weight *w = &m->layer[m->set[0].layer].expert[0].gate;
    return asked != MOEC_DTYPE_COUNT ? asked : w->storage == MOEC_PLAIN ? w->of->dtype : MOEC_BF16;
}

moec_status moec_convert(moec_convert_result *result, const moec_model *m, const moec_convert_options *opt, moec_err *err)
{
    moec_status st = MOEC_OK;
    job j = {.m = m, .opt = opt, .dtype = choose(m, opt->dtype)};
    *result = (moec_convert_result){.dtype = j.dtype, .source_bytes = moec_ckpt_bytes(m->ckpt), .quantized = m->packed};
    if (!moec_ckpt_gguf(m->ckpt))
        return moec_fail(err, MOEC_EINVAL, "%s: a folder already; a GGUF is converted", moec_ckpt_dir(m->ckpt));
    if (j.dtype != MOEC_F32 && j.dtype != MOEC_F16 && j.dtype != MOEC_BF16)
        return moec_fail(err, MOEC_EINVAL, "dtype %s: expected F32, F16 or BF16", moec_dtypes[j.dtype].name);
    MOEC_TRY(moec_out_new(&j.files, err));
    MOEC_TRY(add_all(&j, err));
    MOEC_TRY(lay_out(&j, err));
    MOEC_TRY(side_files(&j, err));
    MOEC_TRY(moec_out_close(j.files, err));
    result->bytes = j.bytes;
    result->tensors = j.n;
    result->shards = j.shards;
    result->disk_bytes = moec_out_total(j.files);
    result->tokenizer = j.words.tokenizer != NULL;
    if (!j.words.tokenizer)
        moec_warn("%s: has no vocabulary; the folder gets no tokenizer", moec_ckpt_dir(m->ckpt));
    if (opt->out)
        MOEC_TRY(write_all(&j, err));
done:
    moec_out_free(j.files);
    for (size_t i = 0; i < j.n; i++)
        moec_free(j.piece[i].name);
    moec_free(j.piece);
    moec_free(j.config);
    moec_free(j.index);
    moec_gguf_words_release(&j.words);
    return st;
}
