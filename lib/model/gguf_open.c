/* See gguf_open.h: tensors; keys in gguf_config.c. */
#include "model/gguf_open.h"

#include "base/file.h"
#include "base/log.h"
#include "base/mem.h"
#include "model/gguf_names.h"
#include "model/gguf_read.h"
#include "num/blocks.h"

#include <ctype.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { NAME = 256 };

/* What is computed into memory: the whole of a tensor as F32, or of two in a form. */
typedef enum form { WIDEN, LATENT, TURNS } form;
typedef struct made {
    form form;
    size_t tensor; /* of the list */
    uint64_t at;   /* in the memory */
    const moec_gguf_tensor *a, *b;
} made;

typedef struct job {
    moec_gguf_reader r;
    moec_ckpt_parts parts;
    size_t files_cap;
    made *made;
    size_t n_made, made_cap;
    uint64_t bytes; /* of what is made */
    size_t skipped;
} job;

/* --- one tensor ------------------------------------------------------------------------------------------------------ */

static moec_dtype plain_type(const moec_gguf_tensor *t)
{
    return t->type == MOEC_GGML_F32    ? MOEC_F32
           : t->type == MOEC_GGML_F16  ? MOEC_F16
           : t->type == MOEC_GGML_BF16 ? MOEC_BF16
                                       : MOEC_DTYPE_COUNT;
}

static moec_block block_type(const moec_gguf_tensor *t)
{
    for (int i = 0; i < MOEC_BLOCK_COUNT; i++)
        if (moec_blocks[i].ggml == (int)t->type && plain_type(t) == MOEC_DTYPE_COUNT)
            return (moec_block)i;
    return MOEC_BLOCK_COUNT;
}

static moec_status check_type(const job *j, const moec_gguf_tensor *t, int rank, moec_err *err)
{
    if (plain_type(t) == MOEC_DTYPE_COUNT && block_type(t) == MOEC_BLOCK_COUNT)
        return moec_fail(err, MOEC_EFORMAT, "%s: tensor %s has type %s, which is not read", j->r.path, t->name,
                         moec_ggml_type(t->type)->name);
    for (int i = 0; i < MOEC_GGUF_MAX_RANK; i++)
        if (t->dim[i] < 1 || (i >= rank && t->dim[i] != 1))
            return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s has %" PRId64 " in dimension %d, expected %s", j->r.path, t->name,
                             t->dim[i], i, i >= rank ? "1" : "some");
    return MOEC_OK;
}

/* A new tensor whose name is the first alternative of a pattern, with `tail` in place of what stands behind its last `cut` letters. */
static moec_status add(moec_tensor **out, job *j, const char *pattern, int64_t layer, int64_t expert, size_t cut, const char *tail,
                       moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_ckpt_parts *p = &j->parts;
    char name[NAME];
    size_t len = 0, n = strcspn(pattern, "|");
    int64_t number = layer;
    for (size_t i = 0; i < n - cut && len + 24 < NAME; i++) {
        if (pattern[i] != '%') {
            name[len++] = pattern[i];
            continue;
        }
        len += (size_t)snprintf(name + len, NAME - len, "%" PRId64, number);
        number = expert;
        i++; /* the d */
    }
    MOEC_TRY(MOEC_GROW(p->tensor, p->cap, p->n + 1, err));
    MOEC_TRY(MOEC_GROW(p->file, j->files_cap, p->n + 1, err));
    char *copy;
    MOEC_TRY(moec_format(&copy, err, "%.*s%s", (int)len, name, tail));
    p->file[p->n] = 0;
    *out = &p->tensor[p->n++];
    **out = (moec_tensor){.name = copy};
done:
    return st;
}

static moec_status make(job *j, moec_tensor *t, form f, const moec_gguf_tensor *a, const moec_gguf_tensor *b, int64_t rows,
                        int64_t cols, moec_err *err)
{
    moec_status st = MOEC_OK;
    size_t bytes;
    t->dtype = MOEC_F32;
    t->rank = rows > 0 ? 2 : 1;
    t->dim[0] = rows > 0 ? rows : cols;
    t->dim[1] = cols;
    if (!moec_mul_size(&bytes, (size_t)(rows > 0 ? rows : 1), (size_t)cols) || !moec_mul_size(&bytes, bytes, sizeof(float)) ||
        bytes > SIZE_MAX / 4 - j->bytes)
        return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is too large", j->r.path, a->name);
    t->bytes = bytes;
    MOEC_TRY(MOEC_GROW(j->made, j->made_cap, j->n_made + 1, err));
    j->made[j->n_made++] = (made){f, (size_t)(t - j->parts.tensor), j->bytes, a, b};
    j->bytes += bytes;
done:
    return st;
}

/* Rows [at, at + rows) of a tensor, counted over all dimensions but the innermost; rows 0: a vector. */
static void view(job *j, moec_tensor *t, const moec_gguf_tensor *from, int64_t at, int64_t rows)
{
    const moec_block block = block_type(from);
    const int64_t cols = from->dim[0], row = block < MOEC_BLOCK_COUNT ? moec_blocks_bytes(block, cols)
                                                                      : cols * moec_dtypes[plain_type(from)].bytes;
    t->dtype = block < MOEC_BLOCK_COUNT ? MOEC_U8 : plain_type(from);
    t->rank = rows > 0 ? 2 : 1;
    t->dim[0] = rows > 0 ? rows : cols;
    t->dim[1] = block < MOEC_BLOCK_COUNT ? row : cols;
    t->bytes = (size_t)((rows > 0 ? rows : 1) * row);
    t->data = (const char *)from->data + at * row;
    j->parts.file[t - j->parts.tensor] = (uint32_t)from->file;
}

/* A vector, or a small matrix that is never in blocks: `rows` 0 or as many as it has. */
static moec_status add_plain(job *j, const char *pattern, int64_t layer, size_t cut, const char *tail, const moec_gguf_tensor *from,
                             int64_t rows, moec_err *err)
{
    moec_tensor *t;
    moec_status st = check_type(j, from, rows > 1 ? 2 : 1, err);
    if (st == MOEC_OK)
        st = add(&t, j, pattern, layer, -1, cut, tail, err);
    if (st != MOEC_OK)
        return st;
    if (block_type(from) < MOEC_BLOCK_COUNT)
        return make(j, t, WIDEN, from, NULL, rows, from->dim[0], err);
    view(j, t, from, 0, rows);
    return MOEC_OK;
}

/* A matrix, or number `expert` of a stack. Names of matrices end with ".weight", and in blocks go on with the type. */
static moec_status add_matrix(job *j, const char *pattern, int64_t layer, int64_t expert, const moec_gguf_tensor *from, moec_err *err)
{
    char tail[24] = "";
    moec_tensor *t;
    moec_status st = check_type(j, from, expert < 0 ? 2 : 3, err);
    const moec_block block = block_type(from);
    if (st != MOEC_OK)
        return st;
    if (block < MOEC_BLOCK_COUNT)
        snprintf(tail, sizeof tail, "_%s", moec_blocks[block].name);
    st = add(&t, j, pattern, layer, expert, 0, tail, err);
    if (st == MOEC_OK)
        view(j, t, from, (expert < 0 ? 0 : expert) * from->dim[1], from->dim[1]);
    return st;
}

/* --- a layer --------------------------------------------------------------------------------------------------------- */

static bool is(const char *name, const char *front, const char *tail)
{
    const size_t n = strlen(front);
    return strncmp(name, front, n) == 0 && strcmp(name + n, tail) == 0;
}

static const moec_gguf_tensor *sibling(const job *j, int64_t layer, const char *name)
{
    char full[NAME];
    snprintf(full, sizeof full, "blk.%" PRId64 ".%s", layer, name);
    return moec_gguf_named(j->r.g, full);
}

static moec_status unknown(const job *j, const moec_gguf_tensor *t, moec_err *err)
{
    return moec_fail(err, MOEC_EFORMAT, "%s: tensor %s is not known for %s", j->r.path, t->name, j->r.f->gguf.arch);
}

/* Names of an expert's own tensors: as releases have them. */
static const moec_expert_names *expert_names(const moec_family *f)
{
    if (f->gguf.experts.gate)
        return &f->gguf.experts;
    for (int i = 0; i < MOEC_LAYOUTS; i++)
        if (f->experts[i].layout == MOEC_LAYOUT_SPLIT && f->experts[i].up)
            return &f->experts[i];
    return NULL;
}

static moec_status add_experts(bool *taken, job *j, int64_t layer, const char *name, const moec_gguf_tensor *t, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_expert_names *n = expert_names(j->r.f);
    const moec_gguf_tensor *up;
    moec_tensor *both;
    *taken = false;
    for (int k = 0; k < 3; k++) {
        const char *const pattern = k == 0 ? n->gate : k == 1 ? n->up : n->down;
        if (is(name, moec_gguf_experts[k], ".weight")) {
            *taken = true;
            if (t->dim[2] != j->r.experts)
                return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s has %" PRId64 " experts, expected %" PRId64, j->r.path, t->name,
                                 t->dim[2], j->r.experts);
            for (int64_t e = 0; e < j->r.experts; e++)
                MOEC_TRY(add_matrix(j, pattern, layer, e, t, err));
        } else if (is(name, moec_gguf_experts[k], ".bias") && n->gate_bias) {
            *taken = true;
            MOEC_TRY(check_type(j, t, 2, err));
            if (t->dim[1] != j->r.experts)
                return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s has %" PRId64 " experts, expected %" PRId64, j->r.path, t->name,
                                 t->dim[1], j->r.experts);
            if (k == 2)
                MOEC_TRY(add_plain(j, n->down_bias, layer, 0, "", t, t->dim[1], err));
            if (k != 0)
                continue;
            up = sibling(j, layer, "ffn_up_exps.bias");
            if (!up || up->dim[0] != t->dim[0] || up->dim[1] != t->dim[1])
                return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s has no ffn_up_exps.bias of its shape beside it", j->r.path, t->name);
            MOEC_TRY(check_type(j, up, 2, err));
            MOEC_TRY(add(&both, j, n->gate_bias, layer, -1, 0, "", err));
            MOEC_TRY(make(j, both, TURNS, t, up, t->dim[1], 2 * t->dim[0], err));
        }
    }
done:
    return st;
}

static bool has_shape(const moec_gguf_tensor *t, int64_t d0, int64_t d1, int64_t d2)
{
    return t->dim[0] == d0 && t->dim[1] == d1 && t->dim[2] == d2 && t->dim[3] == 1;
}

/* kv_b as it is, or of its two parts. */
static moec_status add_latent(bool *taken, job *j, int64_t layer, const char *name, const moec_gguf_tensor *t, moec_err *err)
{
    const moec_gguf_reader *r = &j->r;
    const moec_gguf_tensor *whole = sibling(j, layer, "attn_kv_b.weight"), *values = sibling(j, layer, "attn_v_b.weight");
    moec_tensor *joined;
    const char *pattern = r->f->mat[MOEC_MAT_KV_B];
    *taken = r->latent && (strcmp(name, "attn_kv_b.weight") == 0 || strcmp(name, "attn_k_b.weight") == 0 ||
                           strcmp(name, "attn_v_b.weight") == 0);
    if (!*taken || (whole && t != whole) || t == values)
        return MOEC_OK;
    if (t == whole)
        return add_matrix(j, pattern, layer, -1, t, err);
    moec_status st = check_type(j, t, 3, err);
    if (st == MOEC_OK && !values)
        st = moec_fail(err, MOEC_EFORMAT, "%s: tensor %s has no attn_v_b.weight beside it", r->path, t->name);
    if (st == MOEC_OK)
        st = check_type(j, values, 3, err);
    if (st == MOEC_OK && (!has_shape(t, r->nope, r->kv_rank, r->heads) || !has_shape(values, r->kv_rank, r->value, r->heads)))
        st = moec_fail(err, MOEC_ESHAPE, "%s: tensors %s and attn_v_b.weight are not of %" PRId64 " heads of %" PRId64 " and %" PRId64
                       " in rank %" PRId64, r->path, t->name, r->heads, r->nope, r->value, r->kv_rank);
    if (st == MOEC_OK)
        st = add(&joined, j, pattern, layer, -1, 0, "", err);
    return st == MOEC_OK ? make(j, joined, LATENT, t, values, r->heads * (r->nope + r->value), r->kv_rank, err) : st;
}

static moec_status add_in_layer(job *j, int64_t layer, const char *name, const moec_gguf_tensor *t, moec_err *err)
{
    const moec_family *f = j->r.f;
    const char *mlp_norm = f->gguf.mlp_norm ? f->gguf.mlp_norm : "ffn_norm";
    bool taken;
    moec_status st = add_experts(&taken, j, layer, name, t, err);
    if (st != MOEC_OK || taken)
        return st;
    st = add_latent(&taken, j, layer, name, t, err);
    if (st != MOEC_OK || taken)
        return st;
    if (is(name, mlp_norm, ".weight"))
        return add_plain(j, f->vec[MOEC_VEC_NORM_MLP], layer, 0, "", t, 0, err);
    for (int k = 0; k < MOEC_VEC_COUNT; k++)
        if (moec_gguf_vecs[k] && f->vec[k] &&
            (strcmp(name, moec_gguf_vecs[k]) == 0 || /* some files have it without ".bias" */
             (k == MOEC_VEC_SELECTION_BIAS && strcmp(name, "exp_probs_b") == 0)))
            return add_plain(j, f->vec[k], layer, 0, "", t, 0, err);
    for (int k = 0; k < MOEC_MAT_COUNT; k++) {
        if (!moec_gguf_mats[k] || !f->mat[k])
            continue;
        if (is(name, moec_gguf_mats[k], ".bias") && (k != MOEC_MAT_Q || !f->gguf.permute) && (k != MOEC_MAT_K || !f->gguf.permute))
            return add_plain(j, f->mat[k], layer, sizeof "weight" - 1, "bias", t, 0, err);
        if (!is(name, moec_gguf_mats[k], ".weight"))
            continue;
        if (k == MOEC_MAT_ROUTER || k == MOEC_MAT_SHARED_MIX)
            return add_plain(j, f->mat[k], layer, 0, "", t, t->dim[1], err);
        return add_matrix(j, f->mat[k], layer, -1, t, err);
    }
    return unknown(j, t, err);
}

static moec_status add_one(job *j, const moec_gguf_tensor *t, moec_err *err)
{
    const moec_family *f = j->r.f;
    const char *digits = t->name + 4;
    const size_t n = strncmp(t->name, "blk.", 4) == 0 ? strspn(digits, "0123456789") : 0;
    if (strcmp(t->name, "token_embd.weight") == 0)
        return add_matrix(j, f->embed, -1, -1, t, err);
    if (strcmp(t->name, "output.weight") == 0)
        return add_matrix(j, f->head, -1, -1, t, err);
    if (strcmp(t->name, "output_norm.weight") == 0)
        return add_plain(j, f->final_norm, -1, 0, "", t, 0, err);
    if (n == 0 || n > 6 || digits[n] != '.')
        return unknown(j, t, err);
    const int64_t layer = strtoll(digits, NULL, 10);
    if (layer >= j->r.blocks)
        return moec_fail(err, MOEC_EFORMAT, "%s: tensor %s is there, but block_count is %" PRId64, j->r.path, t->name, j->r.blocks);
    if (layer >= j->r.layers) { /* multi-token prediction */
        j->skipped++;
        return MOEC_OK;
    }
    return add_in_layer(j, layer, digits + n + 1, t, err);
}

/* --- what is made ---------------------------------------------------------------------------------------------------- */

/* Row `row` of a tensor, as float32. */
static void read_row(float *out, const moec_gguf_tensor *t, int64_t row)
{
    const moec_block block = block_type(t);
    const moec_dtype plain = plain_type(t);
    const int64_t n = t->dim[0];
    if (block < MOEC_BLOCK_COUNT)
        (void)!moec_blocks_read(out, (const char *)t->data + row * moec_blocks_bytes(block, n), n, block, NULL); /* whole blocks */
    else if (plain < MOEC_DTYPE_COUNT)
        moec_dtypes[plain].to_f32(out, (const char *)t->data + row * n * moec_dtypes[plain].bytes, n);
}

static void fill(float *out, float *line, const made *m, const moec_gguf_reader *r)
{
    if (m->form == WIDEN) {
        for (int64_t i = 0; i < m->a->dim[1]; i++)
            read_row(out + i * m->a->dim[0], m->a, i);
    } else if (m->form == TURNS) {
        for (int64_t i = 0; i < 2 * m->a->dim[1]; i++) {
            const int64_t n = m->a->dim[0];
            read_row(line, i % 2 ? m->b : m->a, i / 2);
            for (int64_t k = 0; k < n; k++)
                out[i / 2 * 2 * n + 2 * k + i % 2] = line[k];
        }
    } else {
        for (int64_t h = 0; h < r->heads; h++, out += (r->nope + r->value) * r->kv_rank) {
            for (int64_t k = 0; k < r->kv_rank; k++) {
                read_row(line, m->a, h * r->kv_rank + k);
                for (int64_t i = 0; i < r->nope; i++)
                    out[i * r->kv_rank + k] = line[i];
            }
            for (int64_t i = 0; i < r->value; i++)
                read_row(out + (r->nope + i) * r->kv_rank, m->b, h * r->value + i);
        }
    }
}

/* A mapped file without a name: its pages are given back when memory is short, and given back pages are not lost. */
static moec_status fill_all(job *j, moec_err *err)
{
    moec_status st = MOEC_OK;
    float *line = NULL;
    int64_t longest = 1;
    void *map = NULL;
    if (j->n_made == 0)
        return MOEC_OK;
    MOEC_TRY(moec_file_scratch(&map, (size_t)j->bytes, "what a GGUF has in another form", err));
    j->parts.made = map;
    j->parts.made_bytes = (size_t)j->bytes;
    for (size_t i = 0; i < j->n_made; i++)
        longest = j->made[i].a->dim[0] > longest ? j->made[i].a->dim[0] : longest;
    MOEC_TRY(MOEC_NEW(line, (size_t)longest, err));
    for (size_t i = 0; i < j->n_made; i++) {
        MOEC_TRY(moec_interrupted(err));
        void *at = (char *)map + j->made[i].at;
        j->parts.tensor[j->made[i].tensor].data = at;
        fill(at, line, &j->made[i], &j->r);
    }
done:
    moec_free(line);
    return st;
}

/* --- all of it ------------------------------------------------------------------------------------------------------- */

bool moec_gguf_is(const char *path)
{
    char magic[4] = {0};
    struct stat info; /* opening a pipe would wait */
    FILE *f = stat(path, &info) == 0 && S_ISREG(info.st_mode) ? fopen(path, "rb") : NULL;
    const bool is = f && fread(magic, 1, sizeof magic, f) == sizeof magic && memcmp(magic, "GGUF", sizeof magic) == 0;
    if (f)
        fclose(f);
    return is;
}

moec_status moec_gguf_ckpt_of(moec_ckpt **out, moec_gguf *g, const char *path, moec_err *err)
{
    moec_status st = MOEC_OK;
    job j = {.r = {.path = path, .g = g, .ix = moec_gguf_front(g)}, .parts = {.gguf = g}};
    *out = NULL;
    MOEC_TRY(moec__gguf_config(&j.parts.config, &j.r, err));
    for (size_t i = 0; i < moec_gguf_count(g); i++)
        MOEC_TRY(add_one(&j, moec_gguf_at(g, i), err));
    if (j.skipped > 0)
        moec_note("%s: %zu tensors of multi-token prediction are left out", path, j.skipped);
    MOEC_TRY(fill_all(&j, err));
    MOEC_TRY(moec_ckpt_of_gguf(out, path, &j.parts, err));
done:
    moec_free(j.made);
    moec_ckpt_parts_release(&j.parts);
    return st;
}

moec_status moec_gguf_ckpt(moec_ckpt **out, const char *path, moec_err *err)
{
    moec_gguf *g;
    *out = NULL;
    moec_status st = moec_gguf_open(&g, path, err);
    return st == MOEC_OK ? moec_gguf_ckpt_of(out, g, path, err) : st;
}
