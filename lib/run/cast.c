/* See cast.h. */
#include "run/cast.h"

#include "base/mem.h"
#include "model/config.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { NAME = 512, CHUNK = 4096, MX = 32 };

/* --- which tensors --------------------------------------------------------------------------------------------------- */

typedef struct caster {
    const moec_model *m;
    moec_cast *cast;
    bool *matrix; /* a plain matrix of the model that is no router */
    moec_dtype to;
    int32_t block[2]; /* of FP8 scales */
} caster;

static size_t index_of(const caster *k, const moec_tensor *t)
{
    return (size_t)(t - moec_ckpt_at(k->m->ckpt, 0));
}

static void mark(const caster *k, const moec_tensor *t)
{
    if (t)
        k->matrix[index_of(k, t)] = true;
}

static void mark_layer(const caster *k, const moec_layer *l)
{
    for (int i = 0; i < MOEC_MAT_COUNT; i++)
        if ((i < MOEC_MAT_ROUTER || i > MOEC_MAT_ROUTER_MAP) && i != MOEC_MAT_HEADS_ROUTER)
            mark(k, l->mat[i].of);
    mark(k, l->heads_in);
    mark(k, l->heads_out);
    for (int64_t e = 0; l->expert && e < k->m->dims.experts; e++) {
        mark(k, l->expert[e].gate.of);
        mark(k, l->expert[e].up.of);
        mark(k, l->expert[e].down.of);
    }
}

/* The tensor called as this one with `tail` instead of its last `cut` characters. */
static const moec_tensor *sibling(const caster *k, const moec_tensor *t, size_t cut, const char *tail)
{
    char name[NAME];
    snprintf(name, sizeof name, "%.*s%s", (int)(strlen(t->name) - cut), t->name, tail);
    return moec_ckpt_find(k->m->ckpt, name);
}

static void make(moec_cast *c, moec_dtype to, moec_weight w)
{
    c->made = true;
    c->weight = w;
    c->dtype = to;
    c->bytes = (uint64_t)(w.rows * w.cols) * (uint64_t)moec_dtypes[to].bytes;
}

static moec_status cast_fp8(const caster *k, const moec_tensor *t, moec_err *err)
{
    moec_weight w = moec_weight_of(t);
    w.scale = sibling(k, t, 0, "_scale_inv");
    if (!w.scale || t->rank != 2 || k->block[0] < 1 || k->block[1] < 1)
        return moec_fail(err, MOEC_EFORMAT, "tensor %s is F8_E4M3 without scales in blocks; it cannot be written in another "
                         "type", t->name);
    w.storage = MOEC_FP8;
    w.block_rows = k->block[0];
    w.block_cols = k->block[1];
    w.scale_cols = (int32_t)((w.cols + w.block_cols - 1) / w.block_cols);
    make(&k->cast[index_of(k, t)], k->to, w);
    k->cast[index_of(k, w.scale)].gone = true;
    return moec_weight_check(&w, err);
}

/* Blocks [E, rows, cols/32, 16] become [E, cols, rows], as transformers has them when they are not quantized. */
static moec_status cast_mxfp4(const caster *k, const moec_tensor *t, const moec_tensor *scale, size_t tail, moec_err *err)
{
    moec_cast *c = &k->cast[index_of(k, t)];
    const int64_t rows = t->dim[1], cols = t->dim[2] * MX;
    const moec_weight w = {.of = t, .scale = scale, .rows = t->dim[0] * rows, .cols = cols, .row_step = cols, .col_step = 1,
                           .storage = MOEC_MXFP4};
    make(c, k->to, w);
    c->turned = true;
    c->part_rows = rows;
    c->rank = 3;
    c->dim[0] = t->dim[0];
    c->dim[1] = cols;
    c->dim[2] = rows;
    k->cast[index_of(k, scale)].gone = true;
    moec_status st = moec_copy(&c->name, t->name, strlen(t->name) - tail, err);
    return st == MOEC_OK ? moec_weight_check(&w, err) : st;
}

static moec_status cast_tensor(const caster *k, size_t i, moec_err *err)
{
    static const char blocks[] = "_blocks";
    const moec_tensor *t = moec_ckpt_at(k->m->ckpt, i), *scale;
    const size_t n = strlen(t->name), tail = sizeof blocks - 1;
    if (t->dtype == MOEC_F8_E4M3)
        return cast_fp8(k, t, err);
    if (t->dtype == MOEC_U8 && t->rank == 4 && t->dim[3] == MX / 2 && n > tail && strcmp(t->name + n - tail, blocks) == 0 &&
        (scale = sibling(k, t, tail, "_scales")) != NULL)
        return cast_mxfp4(k, t, scale, tail, err);
    const bool real = t->dtype == MOEC_F32 || t->dtype == MOEC_F16 || t->dtype == MOEC_BF16 || t->dtype == MOEC_F64;
    if (k->matrix[i] && real && t->dtype != k->to && t->bytes > 0)
        make(&k->cast[i], k->to, moec_weight_of(t));
    return MOEC_OK;
}

static void as_it_is(moec_cast *c, const moec_tensor *t)
{
    *c = (moec_cast){.dtype = t->dtype, .rank = t->rank, .bytes = t->bytes};
    memcpy(c->dim, t->dim, sizeof c->dim);
}

moec_status moec_casts_new(moec_cast **out, const moec_model *m, const moec_plan *p, const moec_place *place, moec_err *err)
{
    moec_status st = MOEC_OK;
    const size_t n = moec_ckpt_count(m->ckpt);
    caster k = {.m = m, .to = p->dtype};
    MOEC_TRY(MOEC_NEW(k.cast, n, err));
    *out = k.cast;
    for (size_t i = 0; i < n; i++)
        as_it_is(&k.cast[i], moec_ckpt_at(m->ckpt, i));
    if (k.to == MOEC_DTYPE_COUNT)
        goto done;
    MOEC_TRY(MOEC_NEW(k.matrix, n, err));
    MOEC_TRY(moec_config_fp8_block(k.block, m, err));
    mark(&k, m->embedding.of);
    mark(&k, m->head.of);
    for (int64_t i = 0; i < m->dims.layers; i++)
        mark_layer(&k, &m->layer[i]);
    for (int64_t i = 0; i < m->mtp_layers; i++)
        mark_layer(&k, &m->mtp[i]);
    for (size_t i = 0; i < n; i++) { /* attention and dense matrices of MTP layers are bound to nothing */
        k.matrix[i] = k.matrix[i] || (place[i].mtp && place[i].role == MOEC_ROLE_OTHER &&
                                      moec_ckpt_at(m->ckpt, i)->rank == 2);
        MOEC_TRY(cast_tensor(&k, i, err));
    }
done:
    moec_free(k.matrix);
    return st;
}

void moec_casts_free(moec_cast *c, size_t n)
{
    for (size_t i = 0; c && i < n; i++)
        moec_free(c[i].name);
    moec_free(c);
}

/* --- values ---------------------------------------------------------------------------------------------------------- */

static moec_status store(unsigned char *out, const moec_cast *c, const float *x, int64_t n, int64_t stride, moec_err *err)
{
    for (int64_t i = 0; i < n; i++) {
        const float v = x[i * stride];
        if (c->dtype == MOEC_F32) {
            memcpy(out + 4 * i, &v, 4);
            continue;
        }
        const uint16_t h = c->dtype == MOEC_BF16 ? moec_to_bf16(v) : moec_to_f16(v);
        if (c->dtype == MOEC_F16 && isfinite(v) && (h & 0x7c00) == 0x7c00)
            return moec_fail(err, MOEC_ENUMERIC, "tensor %s: %g does not fit float16; --dtype bf16 holds it", c->weight.of->name,
                             (double)v);
        memcpy(out + 2 * i, &h, 2);
    }
    return MOEC_OK;
}

/* The pages of what was read are given back: a cast of a large model must not grow resident. */
static void drop_rows(const moec_weight *w, int64_t row, int64_t rows)
{
    moec_weight part = *w;
    part.at += row * part.row_step;
    part.rows = rows;
    moec_weight_drop(&part);
}

static moec_status make_rows(unsigned char *out, const moec_cast *c, int64_t at, int64_t n, moec_err *err)
{
    float buf[CHUNK];
    const moec_weight *w = &c->weight;
    const int64_t size = moec_dtypes[c->dtype].bytes, first = at / w->cols, end = at + n;
    moec_status st = MOEC_OK;
    while (st == MOEC_OK && at < end) {
        int64_t row = at / w->cols, col = at % w->cols, k = w->cols - col;
        k = k < CHUNK ? k : CHUNK;
        k = k < end - at ? k : end - at;
        moec_weight_read(buf, k, w, row, 1, col, k);
        st = store(out, c, buf, k, 1, err);
        out += k * size;
        at += k;
    }
    drop_rows(w, first, (end - 1) / w->cols - first + 1);
    return st;
}

/* Strips of 32 columns, whose lines are what the blocks hold, and their columns the lines that are wanted. */
static moec_status make_turned(unsigned char *out, const moec_cast *c, int64_t at, int64_t n, moec_err *err)
{
    const moec_weight *w = &c->weight;
    const int64_t size = moec_dtypes[c->dtype].bytes, rows = c->part_rows, end = at + n;
    int64_t have = -1;
    float *strip = NULL;
    moec_status st = MOEC_NEW(strip, (size_t)(rows * MX), err);
    while (st == MOEC_OK && at < end) {
        const int64_t line = at / rows, from = at % rows, expert = line / w->cols, col = line % w->cols;
        int64_t k = rows - from;
        k = k < end - at ? k : end - at;
        if (have != line / MX) { /* cols is a multiple of 32, so a strip never crosses experts */
            have = line / MX;
            moec_weight_read(strip, MX, w, expert * rows, rows, col / MX * MX, MX);
        }
        st = store(out, c, strip + from * MX + col % MX, k, MX, err);
        out += k * size;
        at += k;
    }
    moec_free(strip);
    return st;
}

moec_status moec_cast_make(void *out, void *cast, uint64_t from, size_t n, moec_err *err)
{
    const moec_cast *c = cast;
    const uint64_t size = (uint64_t)moec_dtypes[c->dtype].bytes;
    if (n == 0)
        return MOEC_OK;
    return (c->turned ? make_turned : make_rows)(out, c, (int64_t)(from / size), (int64_t)(n / size), err);
}
