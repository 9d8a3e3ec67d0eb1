/* See gguf_model.h. Tensors here; keys in gguf_keys.c. */
#include "run/gguf_parts.h"

#include "base/mem.h"
#include "model/gguf_names.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

/* --- the list -------------------------------------------------------------------------------------------------------- */

/* A new source; the caller says what it is of. `layer` -1: of the whole model. */
static moec_status add(moec_gguf_source **out, moec_gguf_model *x, int64_t layer, const char *name, const char *suffix,
                       uint32_t type, moec_err *err)
{
    moec_status st = MOEC_OK;
    MOEC_TRY(MOEC_GROW(x->source, x->cap, x->n + 1, err));
    moec_gguf_source *s = &x->source[x->n];
    *s = (moec_gguf_source){.what = {.type = type, .dim = {1, 1, 1, 1}}};
    MOEC_TRY(layer < 0 ? moec_format(&s->what.name, err, "%s%s", name, suffix)
                       : moec_format(&s->what.name, err, "blk.%" PRId64 ".%s%s", layer, name, suffix));
    x->n++;
    *out = s;
done:
    return st;
}

static void shape(moec_gguf_source *s, int rank, int64_t d0, int64_t d1, int64_t d2)
{
    s->what.rank = rank;
    s->what.dim[0] = d0;
    s->what.dim[1] = d1;
    s->what.dim[2] = d2;
}

static int64_t values_of(const moec_tensor *t)
{
    int64_t n = 1;
    for (int i = 0; i < t->rank; i++)
        n *= t->dim[i];
    return n;
}

static moec_status add_flat(moec_gguf_model *x, int64_t layer, const char *name, const char *suffix, const moec_tensor *t,
                            int64_t heads, moec_err *err)
{
    moec_gguf_source *s;
    moec_status st = add(&s, x, layer, name, suffix, MOEC_GGML_F32, err);
    if (st != MOEC_OK)
        return st;
    s->kind = MOEC_GGUF_FLAT;
    s->tensor = t;
    s->heads = heads;
    shape(s, 1, values_of(t), 1, 1);
    return MOEC_OK;
}

static moec_status add_matrix(moec_gguf_model *x, int64_t layer, const char *name, const moec_weight *w, int64_t heads,
                              uint32_t type, moec_err *err)
{
    moec_gguf_source *s;
    moec_status st = add(&s, x, layer, name, ".weight", type, err);
    if (st != MOEC_OK)
        return st;
    s->kind = MOEC_GGUF_MATRIX;
    s->weight = *w;
    s->heads = heads;
    shape(s, 2, w->cols, w->rows, 1);
    return MOEC_OK;
}

/* kv_b in two parts, the keys' transposed, so that queries can be brought into the latent space instead. */
static moec_status add_latent(moec_gguf_model *x, const moec_layer *l, moec_err *err)
{
    const moec_dims *d = &x->m->dims;
    moec_gguf_source *s;
    moec_status st = MOEC_OK;
    for (int values = 0; values < 2; values++) {
        MOEC_TRY(add(&s, x, l->index, values ? "attn_v_b" : "attn_k_b", ".weight", x->type, err));
        s->kind = values ? MOEC_GGUF_VALUE_B : MOEC_GGUF_KEY_B;
        s->weight = l->mat[MOEC_MAT_KV_B];
        if (values)
            shape(s, 3, d->kv_rank, d->value_dim, d->heads);
        else
            shape(s, 3, d->nope_dim, d->kv_rank, d->heads);
    }
done:
    return st;
}

static moec_status refuse(const moec_gguf_model *x, int64_t layer, const char *what, moec_err *err)
{
    return moec_fail(err, MOEC_EINVAL, "layer %" PRId64 ": llama.cpp's %s has no place for %s", layer, x->rules->arch, what);
}

static moec_status add_mats(moec_gguf_model *x, const moec_layer *l, moec_err *err)
{
    moec_status st = MOEC_OK;
    for (int k = 0; k < MOEC_MAT_COUNT; k++) {
        const moec_weight *w = &l->mat[k];
        const int64_t heads = !x->rules->permute ? 0 : k == MOEC_MAT_Q ? x->m->dims.heads : k == MOEC_MAT_K ? x->m->dims.kv_heads : 0;
        if (!w->of)
            continue;
        if (k == MOEC_MAT_KV_B && !l->bias[k])
            MOEC_TRY(add_latent(x, l, err));
        else if (!moec_gguf_mats[k])
            return refuse(x, l->index, w->of->name, err);
        else if (k == MOEC_MAT_SHARED_MIX)
            MOEC_TRY(add_flat(x, l->index, moec_gguf_mats[k], ".weight", w->of, 0, err));
        else
            MOEC_TRY(add_matrix(x, l->index, moec_gguf_mats[k], w, heads, k == MOEC_MAT_ROUTER ? MOEC_GGML_F32 : x->type, err));
        if (k == MOEC_MAT_ROUTER)
            x->source[x->n - 1].router = true;
        if (l->bias[k])
            MOEC_TRY(add_flat(x, l->index, moec_gguf_mats[k], ".bias", l->bias[k], heads, err));
    }
done:
    return st;
}

static moec_status add_vecs(moec_gguf_model *x, const moec_layer *l, moec_err *err)
{
    moec_status st = MOEC_OK;
    for (int k = 0; k < MOEC_VEC_COUNT; k++) {
        if (!l->vec[k])
            continue;
        if (k == MOEC_VEC_NORM_MLP)
            MOEC_TRY(add_flat(x, l->index, x->rules->mlp_norm ? x->rules->mlp_norm : "ffn_norm", ".weight", l->vec[k], 0, err));
        else if (moec_gguf_vecs[k])
            MOEC_TRY(add_flat(x, l->index, moec_gguf_vecs[k], "", l->vec[k], 0, err));
        else
            return refuse(x, l->index, l->vec[k]->name, err);
    }
done:
    return st;
}

static const moec_weight *matrix_of(const moec_layer *l, int which, int64_t e)
{
    return moec_mlp_matrix(&l->expert[e], which);
}

static bool all_mxfp4(const moec_layer *l, int which, int64_t experts)
{
    bool all = true;
    for (int64_t e = 0; e < experts; e++)
        all = all && matrix_of(l, which, e)->storage == MOEC_MXFP4;
    return all;
}

static moec_status add_experts(moec_gguf_model *x, const moec_layer *l, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_dims *d = &x->m->dims;
    if (!l->expert)
        return MOEC_OK;
    if (l->heads_in || l->constant[0] || l->router_row)
        return refuse(x, l->index, "attention experts, constant experts or a router of shared rows", err);
    for (int k = 0; k < 3; k++) {
        moec_gguf_source *s;
        const int64_t in = k == 2 ? d->expert_width : d->hidden, out = k == 2 ? d->hidden : d->expert_width;
        MOEC_TRY(add(&s, x, l->index, moec_gguf_experts[k], ".weight", all_mxfp4(l, k, d->experts) ? MOEC_GGML_MXFP4 : x->type, err));
        s->kind = MOEC_GGUF_STACK;
        s->codes = s->what.type == MOEC_GGML_MXFP4;
        s->layer = l;
        s->which = k;
        shape(s, 3, in, out, d->experts);
        if (!(k == 2 ? l->down_bias : l->gate_up_bias))
            continue;
        MOEC_TRY(add(&s, x, l->index, moec_gguf_experts[k], ".bias", MOEC_GGML_F32, err));
        s->kind = MOEC_GGUF_STACK_BIAS;
        s->layer = l;
        s->which = k;
        shape(s, 2, out, d->experts, 1);
    }
done:
    return st;
}

static moec_status add_all(moec_gguf_model *x, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_model *m = x->m;
    MOEC_TRY(add_matrix(x, -1, "token_embd", &m->embedding, 0, x->type, err));
    if (m->final_norm_bias || m->head_bias)
        return moec_fail(err, MOEC_EINVAL, "llama.cpp's %s has no bias at the last norm or the head", x->rules->arch);
    MOEC_TRY(add_flat(x, -1, "output_norm", ".weight", m->final_norm, 0, err));
    if (!m->dims.tied)
        MOEC_TRY(add_matrix(x, -1, "output", &m->head, 0, x->type, err));
    for (int64_t i = 0; i < m->dims.layers; i++) {
        MOEC_TRY(add_vecs(x, &m->layer[i], err));
        MOEC_TRY(add_mats(x, &m->layer[i], err));
        MOEC_TRY(add_experts(x, &m->layer[i], err));
    }
done:
    return st;
}

static moec_status no_such_family(const moec_model *m, moec_err *err)
{
    char list[400] = "";
    size_t at = 0;
    const moec_family *f;
    for (int i = 0; (f = moec_family_at(i)) != NULL; i++)
        if (f->gguf.arch && at < sizeof list)
            at += (size_t)snprintf(list + at, sizeof list - at, "%s%s", at > 0 ? ", " : "", f->model_type);
    return moec_fail(err, MOEC_EINVAL, "%s: no GGUF is written of this family yet (llama.cpp's own converter may do it); of these it is: %s", m->family->model_type, list);
}

moec_status moec_gguf_model_new(moec_gguf_model **out, const moec_model *m, uint32_t type, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_gguf_model *x = NULL;
    *out = NULL;
    if (!m->family->gguf.arch)
        return no_such_family(m, err);
    if (type != MOEC_GGML_F32 && type != MOEC_GGML_F16 && type != MOEC_GGML_BF16)
        return moec_fail(err, MOEC_EINVAL, "GGUF type %lu: only F32, F16 and BF16 are written", (unsigned long)type);
    MOEC_TRY(MOEC_NEW(x, 1, err));
    x->m = m;
    x->rules = &m->family->gguf;
    x->type = type;
    MOEC_TRY(moec__gguf_check(x, err));
    MOEC_TRY(add_all(x, err));
    *out = x;
    x = NULL;
done:
    moec_gguf_model_free(x);
    return st;
}

void moec_gguf_model_free(moec_gguf_model *x)
{
    if (!x)
        return;
    for (size_t i = 0; i < x->n; i++)
        moec_free(x->source[i].what.name);
    moec_free(x->source);
    moec_free(x);
}

size_t moec_gguf_model_count(const moec_gguf_model *x)
{
    return x->n;
}

const moec_gguf_tensor *moec_gguf_model_at(const moec_gguf_model *x, size_t i)
{
    return &x->source[i].what;
}

bool moec_gguf_model_matrix(const moec_gguf_model *x, size_t i)
{
    const moec_gguf_source *s = &x->source[i];
    return s->kind != MOEC_GGUF_FLAT && s->kind != MOEC_GGUF_STACK_BIAS && !s->router;
}

bool moec_gguf_model_codes(const moec_gguf_model *x, size_t i)
{
    return x->source[i].codes;
}

moec_status moec_gguf_model_set_type(moec_gguf_model *x, size_t i, uint32_t type, moec_err *err)
{
    moec_gguf_tensor *t = &x->source[i].what;
    const moec_ggml_traits *traits = moec_ggml_type(type);
    if (!traits || !moec_gguf_model_matrix(x, i))
        return moec_fail(err, MOEC_EINVAL, "%s: no such type, or not a matrix that can be quantized", t->name);
    if (t->dim[0] % traits->elements != 0)
        return moec_fail(err, MOEC_EINVAL, "%s: its rows of %" PRId64 " are not whole blocks of %s", t->name, t->dim[0], traits->name);
    t->type = type;
    return MOEC_OK;
}

/* --- values ---------------------------------------------------------------------------------------------------------- */

/* Of n rows in `heads` heads: the checkpoint's row that stands at r in pairs. */
static int64_t paired(int64_t r, int64_t n, int64_t heads)
{
    const int64_t d = n / heads, i = r % d; /* heads > 0 */
    return r - i + (i % 2) * (d / 2) + i / 2;
}

static void read_flat(float *out, const moec_gguf_source *s)
{
    const moec_tensor *t = s->tensor;
    const int size = moec_dtypes[t->dtype].bytes;
    const int64_t n = s->what.dim[0];
    if (s->heads == 0)
        moec_dtypes[t->dtype].to_f32(out, t->data, n);
    for (int64_t i = 0; s->heads > 0 && i < n; i++)
        moec_dtypes[t->dtype].to_f32(&out[i], (const char *)t->data + paired(i, n, s->heads) * size, 1);
}

/* One expert's bias; gate and up stand in turns in one tensor (MOEC_LAYOUT_IN_OUT_PAIRS and its MXFP4 twin). */
static void read_bias(float *out, const moec_gguf_source *s, int64_t e)
{
    const moec_layer *l = s->layer;
    const moec_tensor *t = s->which == 2 ? l->down_bias : l->gate_up_bias;
    const int32_t *rows = s->which == 2 ? l->down_bias_row : l->gate_up_bias_row;
    const int64_t n = s->what.dim[0], size = moec_dtypes[t->dtype].bytes, row = rows ? rows[e] : e, each = s->which == 2 ? 1 : 2;
    if (row < 0) {
        memset(out, 0, (size_t)n * sizeof *out);
        return;
    }
    const char *from = (const char *)t->data + row * n * each * size + (s->which == 1 ? size : 0);
    for (int64_t i = 0; i < n; i++)
        moec_dtypes[t->dtype].to_f32(&out[i], from + i * each * size, 1);
}

static moec_status read_key_b(float *out, const moec_gguf_source *s, const moec_dims *d, int64_t lo, int64_t hi, moec_err *err)
{
    float *head = NULL;
    const int64_t n = d->nope_dim, r = d->kv_rank;
    moec_status st = MOEC_NEW(head, (size_t)(n * r), err);
    for (int64_t row = lo; st == MOEC_OK && row < hi; row++) {
        if (row == lo || row % r == 0)
            moec_weight_read(head, r, &s->weight, row / r * (n + d->value_dim), n, 0, r);
        for (int64_t i = 0; i < n; i++)
            *out++ = head[i * r + row % r];
    }
    moec_free(head);
    return st;
}

static moec_status read_rows(float *out, const moec_gguf_model *x, const moec_gguf_source *s, int64_t lo, int64_t hi,
                             moec_err *err)
{
    const moec_dims *d = &x->m->dims;
    const int64_t n = s->what.dim[0], each = s->what.dim[1];
    if (s->kind == MOEC_GGUF_KEY_B)
        return read_key_b(out, s, d, lo, hi, err);
    for (int64_t r = lo, step; r < hi; r += step, out += step * n) {
        step = 1;
        switch (s->kind) {
        case MOEC_GGUF_FLAT:
            read_flat(out, s);
            break;
        case MOEC_GGUF_STACK_BIAS:
            read_bias(out, s, r);
            break;
        case MOEC_GGUF_STACK: /* up to the end of the expert */
            step = each - r % each < hi - r ? each - r % each : hi - r;
            moec_weight_read(out, n, matrix_of(s->layer, s->which, r / each), r % each, step, 0, n);
            break;
        case MOEC_GGUF_VALUE_B:
            moec_weight_read(out, n, &s->weight, r / each * (d->nope_dim + each) + d->nope_dim + r % each, 1, 0, n);
            break;
        default:
            step = s->heads > 0 ? 1 : hi - r;
            moec_weight_read(out, n, &s->weight, s->heads > 0 ? paired(r, each, s->heads) : r, step, 0, n);
            break;
        }
    }
    return MOEC_OK;
}

moec_status moec_gguf_model_read(float *out, const moec_gguf_model *x, size_t i, int64_t lo, int64_t hi, moec_err *err)
{
    const moec_gguf_source *s = &x->source[i];
    const int64_t n = s->what.dim[0] * (hi - lo);
    moec_status st = read_rows(out, x, s, lo, hi, err);
    for (int64_t k = 0; st == MOEC_OK && k < n; k++)
        if (!isfinite(out[k]))
            st = moec_fail(err, MOEC_ENUMERIC, "%s: row %" PRId64 " has a value that is not finite", s->what.name,
                           lo + k / s->what.dim[0]);
    return st;
}

void moec_gguf_model_drop(const moec_gguf_model *x, size_t i, int64_t lo, int64_t hi)
{
    const moec_gguf_source *s = &x->source[i];
    const int64_t each = s->what.dim[1];
    if (s->kind == MOEC_GGUF_MATRIX || s->kind == MOEC_GGUF_KEY_B || s->kind == MOEC_GGUF_VALUE_B)
        moec_weight_drop(&s->weight);
    for (int64_t e = lo / each; s->kind == MOEC_GGUF_STACK && e * each < hi; e++)
        moec_weight_drop(matrix_of(s->layer, s->which, e));
    if (hi == each * s->what.dim[2] * s->what.dim[3])
        moec_ckpt_drop(x->m->ckpt); /* what was mapped around matrices that were dropped before: 64 KiB for each of some 40,000 */
}

static moec_status to_half(uint16_t *out, const float *in, int64_t n, bool bf16, const char *name, moec_err *err)
{
    for (int64_t i = 0; i < n; i++) {
        out[i] = bf16 ? moec_to_bf16(in[i]) : moec_to_f16(in[i]);
        if ((out[i] & 0x7fff) == (bf16 ? 0x7f80 : 0x7c00))
            return moec_fail(err, MOEC_ENUMERIC, "%s: %g is beyond what %s holds", name, (double)in[i], bf16 ? "BF16" : "F16");
    }
    return MOEC_OK;
}

/* Rows of stacked MXFP4 as ggml has it: of 32 values the scale, then 16 bytes whose low halves are the first 16 values and whose
 * high halves are the others; in the checkpoint neighbours share a byte. Codes and scales mean the same. */
static moec_status repack(unsigned char *out, const moec_gguf_source *s, int64_t lo, int64_t hi, moec_err *err)
{
    const int64_t n = s->what.dim[0], each = s->what.dim[1];
    for (int64_t r = lo; r < hi; r++) {
        const moec_weight *w = matrix_of(s->layer, s->which, r / each);
        const int64_t first = (w->at + r % each * w->row_step) / 32;
        for (int64_t b = first; b < first + n / 32; b++) {
            const unsigned char *in = (const unsigned char *)w->of->data + b * 16;
            const unsigned char scale = ((const unsigned char *)w->scale->data)[b];
            if (scale == 255)
                return moec_fail(err, MOEC_ENUMERIC, "%s: row %" PRId64 " has a value that is not finite", s->what.name, r);
            *out++ = scale;
            for (int i = 0; i < 16; i++) {
                const int shift = i % 2 * 4;
                *out++ = (unsigned char)((in[i / 2] >> shift & 15) | (in[8 + i / 2] >> shift & 15) << 4);
            }
        }
    }
    return MOEC_OK;
}

moec_status moec_gguf_model_rows(void *out, void *ctx, size_t t, int64_t lo, int64_t hi, moec_err *err)
{
    const moec_gguf_model *x = ctx;
    const moec_gguf_source *s = &x->source[t];
    const int64_t n = s->what.dim[0];
    float *made = NULL;
    moec_status st = MOEC_OK;
    if (s->what.type == MOEC_GGML_F32)
        return moec_gguf_model_read(out, x, t, lo, hi, err);
    if (s->what.type == MOEC_GGML_MXFP4 && s->codes)
        return repack(out, s, lo, hi, err);
    if (s->what.type != MOEC_GGML_F16 && s->what.type != MOEC_GGML_BF16)
        return moec_fail(err, MOEC_EINVAL, "%s: its type is written by a quantizer", s->what.name);
    MOEC_TRY(moec_alloc((void **)&made, (size_t)(hi - lo), (size_t)n * sizeof *made, err));
    MOEC_TRY(moec_gguf_model_read(made, x, t, lo, hi, err));
    MOEC_TRY(to_half(out, made, n * (hi - lo), s->what.type == MOEC_GGML_BF16, s->what.name, err));
done:
    moec_free(made);
    return st;
}
