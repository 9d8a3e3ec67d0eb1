/* See bind.h: the experts of a layer in every layout. */
#include "base/mem.h"
#include "model/bind.h"

#include <stdio.h>
#include <string.h>

/* Shapes of gate (with up, where they are one) and down in a layout of stacked experts; rank of both. */
static int stacked_shapes(int64_t gate[3], int64_t down[3], moec_expert_layout layout, const moec_dims *d)
{
    const int64_t E = d->experts, I = d->expert_width, H = d->hidden;
    const bool out_in = layout == MOEC_LAYOUT_OUT_IN;
    if (layout == MOEC_LAYOUT_FLAT) {
        gate[0] = down[0] = E * I;
        gate[1] = down[1] = H;
        return 2;
    }
    gate[0] = down[0] = E;
    gate[1] = out_in ? 2 * I : H;
    gate[2] = out_in ? H : 2 * I;
    down[1] = out_in ? H : I;
    down[2] = out_in ? I : H;
    return 3;
}

/* Two layouts may share their names; then the shapes tell them apart. */
static bool fits(const moec_binder *b, const moec_expert_names *row)
{
    int64_t dim[2][3];
    const moec_tensor *const t[] = {moec__find(b, row->gate), moec__find(b, row->down)};
    if (row->layout == MOEC_LAYOUT_SPLIT || row->layout == MOEC_LAYOUT_MXFP4_PAIRS)
        return true;
    const int rank = stacked_shapes(dim[0], dim[1], row->layout, &b->m->dims);
    for (int i = 0; i < 2; i++)
        if (!t[i] || t[i]->rank != rank || memcmp(t[i]->dim, dim[i], (size_t)rank * sizeof *dim[i]) != 0)
            return false;
    return true;
}

const moec_expert_names *moec__layout(const moec_binder *b)
{
    const moec_expert_names *row = b->m->family->experts, *named = NULL;
    moec_binder first = *b;
    if (moec_ckpt_gguf(b->m->ckpt) && b->m->family->gguf.experts.gate)
        return &b->m->family->gguf.experts;
    first.expert = 0;
    for (int i = 0; i < MOEC_LAYOUTS && row[i].gate; i++) {
        if (!moec__find(&first, row[i].gate))
            continue;
        if (fits(&first, &row[i]))
            return &row[i];
        named = named ? named : &row[i];
    }
    return named;
}

/* --- one tensor an expert -------------------------------------------------------------------------------------------- */

static moec_status bind_split(moec_layer *l, const moec_binder *at, const moec_expert_names *names, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_binder b = *at;
    const moec_dims *d = &b.m->dims;
    for (b.expert = 0; b.expert < d->experts; b.expert++) {
        moec_mlp *e = &l->expert[b.expert];
        if (names->up) {
            MOEC_TRY(moec__bind_matrix(&e->gate, &b, names->gate, d->expert_width, d->hidden, err));
            MOEC_TRY(moec__bind_matrix(&e->up, &b, names->up, d->expert_width, d->hidden, err));
        } else {
            moec_weight both;
            MOEC_TRY(moec__bind_matrix(&both, &b, names->gate, 2 * d->expert_width, d->hidden, err));
            MOEC_TRY(moec__cut(&e->gate, &both, &b, 0, d->expert_width, err));
            MOEC_TRY(moec__cut(&e->up, &both, &b, d->expert_width, d->expert_width, err));
        }
        MOEC_TRY(moec__bind_matrix(&e->down, &b, names->down, d->hidden, d->expert_width, err));
    }
    /* One expert more than the config counts means that the config is not of these tensors. */
    const moec_tensor *more = moec__find(&b, names->gate);
    if (more)
        st = moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is there, but config.json counts %lld experts",
                       moec_ckpt_dir(b.m->ckpt), more->name, (long long)d->experts);
done:
    return st;
}

/* --- all experts in one tensor --------------------------------------------------------------------------------------- */

static moec_weight part(const moec_tensor *t, int64_t rows, int64_t cols, int64_t at, int64_t row_step, int64_t col_step)
{
    return (moec_weight){.of = t, .rows = rows, .cols = cols, .at = at, .row_step = row_step, .col_step = col_step};
}

/* Views of expert e in gate_up and down (or gate, up and down) of a layout. */
static moec_mlp view(moec_expert_layout layout, const moec_tensor *gate, const moec_tensor *up, const moec_tensor *down,
                     const moec_dims *d, int64_t e)
{
    const int64_t I = d->expert_width, H = d->hidden, fused = e * 2 * I * H, one = e * I * H;
    switch (layout) {
    case MOEC_LAYOUT_OUT_IN:
        return (moec_mlp){part(gate, I, H, fused, H, 1), part(gate, I, H, fused + I * H, H, 1), part(down, H, I, one, I, 1)};
    case MOEC_LAYOUT_IN_OUT:
        return (moec_mlp){part(gate, I, H, fused, 1, 2 * I), part(gate, I, H, fused + I, 1, 2 * I),
                          part(down, H, I, one, 1, H)};
    case MOEC_LAYOUT_IN_OUT_PAIRS:
        return (moec_mlp){part(gate, I, H, fused, 2, 2 * I), part(gate, I, H, fused + 1, 2, 2 * I),
                          part(down, H, I, one, 1, H)};
    case MOEC_LAYOUT_MXFP4_PAIRS: /* out-in, as the blocks run along the input */
        return (moec_mlp){part(gate, I, H, fused, 2 * H, 1), part(gate, I, H, fused + H, 2 * H, 1),
                          part(down, H, I, one, I, 1)};
    case MOEC_LAYOUT_FLAT:
        return (moec_mlp){part(gate, I, H, one, H, 1), part(up, I, H, one, H, 1), part(down, H, I, one, 1, H)};
    case MOEC_LAYOUT_SPLIT:
        break;
    }
    return (moec_mlp){0};
}

static moec_status bind_stacked(moec_layer *l, const moec_binder *b, const moec_expert_names *n, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_dims *d = &b->m->dims;
    const bool flat = n->layout == MOEC_LAYOUT_FLAT;
    int64_t gate_dim[3], down_dim[3];
    const int rank = stacked_shapes(gate_dim, down_dim, n->layout, d);
    const moec_tensor *gate, *up = NULL, *down;
    MOEC_TRY(moec__bind(&gate, b, n->gate, rank, gate_dim, err));
    if (flat)
        MOEC_TRY(moec__bind(&up, b, n->up, 2, gate_dim, err));
    MOEC_TRY(moec__bind(&down, b, n->down, rank, down_dim, err));
    for (int64_t e = 0; e < d->experts; e++)
        l->expert[e] = view(n->layout, gate, up, down, d, e);
done:
    return st;
}

/* --- MXFP4 ----------------------------------------------------------------------------------------------------------- */

/* Blocks [E, rows, cols/32, 16] and scales [E, rows, cols/32], all U8. */
static moec_status bind_blocks(const moec_tensor **blocks, const moec_tensor **scales, const moec_binder *b,
                               const char *pattern, int64_t rows, int64_t cols, moec_err *err)
{
    static const char tail[] = "_blocks";
    char name[MOEC_NAME], have[160], want[160];
    const int64_t dim[4] = {b->m->dims.experts, rows, cols / 32, 16};
    const moec_tensor *found[2];
    found[0] = moec__find(b, pattern);
    if (!found[0] || cols % 32 != 0)
        return moec_fail(err, MOEC_ESHAPE, "%s: layer %lld: %s", moec_ckpt_dir(b->m->ckpt), (long long)b->layer,
                         found[0] ? "MXFP4 experts need widths that are multiples of 32"
                                  : "a tensor of MXFP4 blocks is missing");
    snprintf(name, sizeof name, "%.*s_scales", (int)(strlen(found[0]->name) - (sizeof tail - 1)), found[0]->name);
    found[1] = moec_ckpt_find(b->m->ckpt, name);
    if (!found[1])
        return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is missing", moec_ckpt_dir(b->m->ckpt), name);
    for (int i = 0; i < 2; i++) {
        const moec_tensor *t = found[i];
        if (t->dtype != MOEC_U8 || t->rank != 4 - i || memcmp(t->dim, dim, (size_t)(4 - i) * sizeof *dim) != 0)
            return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is %s %s, expected U8 %s", moec_ckpt_dir(b->m->ckpt), t->name,
                             moec_dtypes[t->dtype].name, moec_shape_text(have, sizeof have, t->rank, t->dim),
                             moec_shape_text(want, sizeof want, 4 - i, dim));
    }
    *blocks = found[0];
    *scales = found[1];
    return MOEC_OK;
}

static moec_status bind_mxfp4(moec_layer *l, const moec_binder *b, const moec_expert_names *n, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_dims *d = &b->m->dims;
    const moec_tensor *gate, *down, *gate_scale, *down_scale;
    MOEC_TRY(bind_blocks(&gate, &gate_scale, b, n->gate, 2 * d->expert_width, d->hidden, err));
    MOEC_TRY(bind_blocks(&down, &down_scale, b, n->down, d->hidden, d->expert_width, err));
    for (int64_t e = 0; e < d->experts; e++) {
        moec_mlp *x = &l->expert[e];
        *x = view(n->layout, gate, NULL, down, d, e);
        x->gate.storage = x->up.storage = x->down.storage = MOEC_MXFP4;
        x->gate.scale = x->up.scale = gate_scale;
        x->down.scale = down_scale;
    }
done:
    return st;
}

/* --- a layer --------------------------------------------------------------------------------------------------------- */

/* A config may say that there is no selection bias; else a family that has one must have it here. */
static bool says_no(const moec_json *config, const char *key)
{
    bool v = true;
    return moec_json_bool(moec_json_path(config, key), &v) && !v;
}

static moec_status bind_selection(moec_layer *l, const moec_binder *b, moec_err *err)
{
    const char *pattern = b->m->family->vec[MOEC_VEC_SELECTION_BIAS];
    const moec_tensor *t = moec__find(b, pattern);
    if (!pattern || (!t && (says_no(b->m->config, "use_expert_bias") || says_no(b->m->config, "use_routing_bias"))))
        return MOEC_OK;
    const int64_t flat[2] = {1, b->m->dims.experts};
    const bool wide = t && t->rank == 2;
    return moec__bind(&l->vec[MOEC_VEC_SELECTION_BIAS], b, pattern, wide ? 2 : 1, wide ? flat : flat + 1, err);
}

moec_status moec__bind_router(moec_layer *l, const moec_binder *b, moec_mat which, int64_t rows, moec_err *err)
{
    const int64_t dim[2] = {rows, b->m->dims.hidden};
    const char *pattern = b->m->family->mat[which];
    const moec_tensor *t;
    moec_status st = moec__bind(&t, b, pattern, 2, dim, err);
    if (st != MOEC_OK)
        return st;
    l->mat[which] = moec_weight_of(t);
    return moec__bind_bias(&l->bias[which], b, pattern, rows, err);
}

/* A matrix in F32, F16 or BF16: routers are never cut inside an FP8 block. */
static moec_status bind_plain(moec_weight *out, const moec_binder *b, moec_mat which, int64_t rows, int64_t cols,
                              moec_err *err)
{
    const int64_t dim[2] = {rows, cols};
    const moec_tensor *t;
    moec_status st = moec__bind(&t, b, b->m->family->mat[which], 2, dim, err);
    if (st == MOEC_OK)
        *out = moec_weight_of(t);
    return st;
}

/* v and mix of the constants among the experts behind the others. */
static moec_status bind_constants(moec_layer *l, const moec_binder *at, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_binder b = *at;
    const moec_family *f = b.m->family;
    const int64_t mix[2] = {2, b.m->dims.hidden};
    for (int i = 0; i < f->n_tail; i++) {
        b.expert = b.m->dims.experts + i;
        if (f->tail[i] != MOEC_NULL_CONSTANT)
            continue;
        MOEC_TRY(moec__bind(&l->constant[i], &b, f->constant, 1, mix + 1, err));
        MOEC_TRY(moec__bind(&l->constant_mix[i], &b, f->constant_mix, 2, mix, err));
    }
done:
    return st;
}

/* A router whose last rows stand for experts without a network; in one or two steps, the first as wide as it is. */
static moec_status bind_tailed(moec_layer *l, const moec_binder *b, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_family *f = b->m->family;
    const moec_dims *d = &b->m->dims;
    const int64_t all = d->experts + d->null_experts;
    const moec_tensor *in = moec__find(b, f->mat[MOEC_MAT_ROUTER_IN]);
    int64_t width = d->hidden;
    if (in && !d->router_in)
        return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is there, but by config.json %s is false",
                         moec_ckpt_dir(b->m->ckpt), in->name, f->key_router_in);
    if (d->router_in) {
        width = in && in->rank == 2 && in->dim[0] > 0 ? in->dim[0] : 1;
        MOEC_TRY(bind_plain(&l->mat[MOEC_MAT_ROUTER_IN], b, MOEC_MAT_ROUTER_IN, width, d->hidden, err));
    }
    moec_weight *rows = &l->mat[MOEC_MAT_ROUTER], *null_rows = &l->mat[MOEC_MAT_ROUTER_NULL];
    MOEC_TRY(bind_plain(rows, b, MOEC_MAT_ROUTER, all, width, err));
    *null_rows = *rows;
    rows->rows = d->experts;
    null_rows->rows = d->null_experts;
    null_rows->at = d->experts * rows->row_step;
    if (f->mat[MOEC_MAT_ROUTER_MAP])
        MOEC_TRY(bind_plain(&l->mat[MOEC_MAT_ROUTER_MAP], b, MOEC_MAT_ROUTER_MAP, all, all, err));
    MOEC_TRY(bind_constants(l, b, err));
done:
    return st;
}

static moec_status bind_routers(moec_layer *l, const moec_binder *b, moec_err *err)
{
    if (b->m->family->n_tail > 0)
        return bind_tailed(l, b, err);
    moec_status st = moec__bind_router(l, b, MOEC_MAT_ROUTER, b->m->dims.experts, err);
    if (st == MOEC_OK && b->m->family->mat[MOEC_MAT_ROUTER_NULL])
        st = moec__bind_router(l, b, MOEC_MAT_ROUTER_NULL, b->m->dims.null_experts, err);
    return st;
}

moec_status moec__bind_experts(moec_layer *l, const moec_binder *b, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_family *f = b->m->family;
    const moec_dims *d = &b->m->dims;
    const int64_t gate_bias[2] = {d->experts, 2 * d->expert_width}, down_bias[2] = {d->experts, d->hidden};
    const moec_expert_names *names = moec__layout(b);
    MOEC_TRY(bind_routers(l, b, err));
    MOEC_TRY(bind_selection(l, b, err));
    MOEC_TRY(MOEC_NEW(l->expert, (size_t)d->experts, err));
    if (!names)
        names = &f->experts[0]; /* whose first tensor is then named as missing */
    l->layout = names->layout;
    if (names->layout == MOEC_LAYOUT_SPLIT)
        MOEC_TRY(bind_split(l, b, names, err));
    else if (names->layout == MOEC_LAYOUT_MXFP4_PAIRS)
        MOEC_TRY(bind_mxfp4(l, b, names, err));
    else
        MOEC_TRY(bind_stacked(l, b, names, err));
    if (names->gate_bias)
        MOEC_TRY(moec__bind(&l->gate_up_bias, b, names->gate_bias, 2, gate_bias, err));
    if (names->down_bias)
        MOEC_TRY(moec__bind(&l->down_bias, b, names->down_bias, 2, down_bias, err));
done:
    return st;
}
