/* The tensors of one layer as the forward pass has them: each once, however many views look into it. */
#include "base/mem.h"
#include "base/par.h"
#include "model/forward_parts.h"

#include <string.h>

typedef void each_fn(void *ctx, const moec_model *m, const moec_tensor *t);

/* The matrices of an MLP, and in which order their tensors are named. */
static void mlp_views(const moec_weight *out[3], const moec_mlp *e)
{
    out[0] = &e->gate;
    out[1] = &e->up;
    out[2] = &e->down;
}

/* The tensors that a view looks into. */
enum { VALUES, SCALES, ZEROS, TENSORS };
static const moec_tensor *tensor_of(const moec_weight *w, int which)
{
    return which == VALUES ? w->of : which == SCALES ? w->scale : w->zero;
}

/* Experts' tensors, one of a view's. Stacked ones are shared by all experts, gate and up may be one. */
static void each_expert(const moec_model *m, const moec_layer *l, int which, each_fn *fn, void *ctx)
{
    for (int64_t e = 0; l->expert && e < m->dims.experts; e++) {
        const moec_weight *w[3], *first[3];
        mlp_views(w, &l->expert[e]);
        mlp_views(first, &l->expert[0]);
        for (int i = 0; i < 3; i++) {
            const moec_tensor *t = tensor_of(w[i], which), *stacked = tensor_of(first[i], which);
            const moec_tensor *beside = i == 1 ? tensor_of(w[0], which) : NULL;
            if (t && t != beside && (e == 0 || t != stacked))
                fn(ctx, m, t);
        }
    }
}

/* The same of matrices; several may be parts of one tensor (q, k and v). */
static void each_matrix(const moec_model *m, const moec_layer *l, int which, each_fn *fn, void *ctx)
{
    for (moec_mat i = 0; i < MOEC_MAT_COUNT; i++) {
        const moec_tensor *t = tensor_of(&l->mat[i], which);
        bool seen = false;
        for (moec_mat j = 0; j < i; j++)
            seen |= t == tensor_of(&l->mat[j], which);
        if (t && !seen)
            fn(ctx, m, t);
    }
}

void moec_layer_each_common(const moec_model *m, int64_t layer, each_fn *fn, void *ctx)
{
    const moec_layer *l = &m->layer[layer];
    const moec_tensor *const stacked[] = {l->gate_up_bias, l->down_bias, l->heads_in, l->heads_out};
    for (moec_vec i = 0; i < MOEC_VEC_COUNT; i++)
        if (l->vec[i])
            fn(ctx, m, l->vec[i]);
    for (moec_mat i = 0; i < MOEC_MAT_COUNT; i++) {
        bool seen = false; /* a bias of q, k and v together */
        for (moec_mat j = 0; j < i; j++)
            seen |= l->bias[i] == l->bias[j];
        if (l->bias[i] && !seen)
            fn(ctx, m, l->bias[i]);
    }
    for (int which = 0; which < TENSORS; which++)
        each_matrix(m, l, which, fn, ctx);
    for (size_t i = 0; i < MOEC_COUNT(stacked); i++)
        if (stacked[i])
            fn(ctx, m, stacked[i]);
    for (int i = 0; i < m->family->n_tail; i++)
        if (l->constant[i]) {
            fn(ctx, m, l->constant[i]);
            fn(ctx, m, l->constant_mix[i]);
        }
}

void moec_layer_each(const moec_model *m, int64_t layer, each_fn *fn, void *ctx)
{
    const moec_layer *l = &m->layer[layer];
    moec_layer_each_common(m, layer, fn, ctx);
    for (int which = 0; which < TENSORS; which++)
        each_expert(m, l, which, fn, ctx);
}

static void add_bytes(void *ctx, const moec_model *m, const moec_tensor *t)
{
    (void)m;
    *(uint64_t *)ctx += t->bytes;
}

uint64_t moec_layer_bytes(const moec_model *m, int64_t layer)
{
    uint64_t sum = 0;
    moec_layer_each(m, layer, add_bytes, &sum);
    return sum;
}

uint64_t moec_expert_bytes(const moec_layer *l, int64_t expert)
{
    const moec_mlp *e = &l->expert[expert];
    return moec_weight_bytes(&e->gate) + moec_weight_bytes(&e->up) + moec_weight_bytes(&e->down);
}

static int64_t row_of(const int32_t *row, int64_t expert)
{
    return row ? row[expert] : expert;
}

/* Rows [., 2I], gate and up side by side or in turns as in gate_up. */
void moec_expert_bias(float *gate, float *up, const moec_model *m, const moec_layer *l, int64_t expert)
{
    enum { PART = 512 };
    float both[PART];
    const moec_tensor *t = l->gate_up_bias;
    const int64_t width = m->dims.expert_width, size = moec_dtypes[t->dtype].bytes, row = row_of(l->gate_up_bias_row, expert);
    const bool pairs = l->layout == MOEC_LAYOUT_IN_OUT_PAIRS || l->layout == MOEC_LAYOUT_MXFP4_PAIRS;
    if (row < 0) {
        memset(gate, 0, (size_t)width * sizeof *gate);
        memset(up, 0, (size_t)width * sizeof *up);
        return;
    }
    for (int64_t at = 0; at < 2 * width; at += PART) {
        const int64_t n = 2 * width - at < PART ? 2 * width - at : PART;
        moec_dtypes[t->dtype].to_f32(both, (const char *)t->data + (row * 2 * width + at) * size, n);
        for (int64_t i = 0, c = at; i < n; i++, c++)
            ((pairs ? c % 2 : c >= width) ? up : gate)[pairs ? c / 2 : c % width] = both[i];
    }
}

void moec_expert_down_bias(float *out, const moec_model *m, const moec_layer *l, int64_t expert)
{
    const moec_tensor *t = l->down_bias;
    const int64_t hidden = m->dims.hidden, row = row_of(l->down_bias_row, expert);
    if (row < 0)
        memset(out, 0, (size_t)hidden * sizeof *out);
    else
        moec_dtypes[t->dtype].to_f32(out, (const char *)t->data + row * hidden * moec_dtypes[t->dtype].bytes, hidden);
}

/* --- are they finite? -------------------------------------------------------------------------------------------------- */

/* A piece of work: bytes [at, at + n) of a tensor, or a quantized matrix, whose values are codes times scales. A stacked
 * tensor is many pieces, so that all threads have some of it. */
enum { SLICE = 8 << 20 };
typedef struct part {
    const moec_tensor *t;
    size_t at, n;
    const moec_weight *w;
} part;
typedef struct scan {
    part *part; /* NULL: they are counted */
    int64_t n;
    bool lean;
} scan;

static void add_part(scan *s, part p)
{
    if (s->part)
        s->part[s->n] = p;
    s->n++;
}

static void add_slices(void *ctx, const moec_model *m, const moec_tensor *t)
{
    (void)m;
    for (size_t at = 0; at < t->bytes; at += SLICE)
        add_part(ctx, (part){.t = t, .at = at, .n = t->bytes - at < SLICE ? t->bytes - at : SLICE});
}

static void list_parts(scan *s, const moec_model *m, int64_t layer)
{
    const moec_layer *l = &m->layer[layer];
    s->n = 0;
    /* of quantized ones only the scales can tell anything */
    (s->lean ? moec_layer_each_common : moec_layer_each)(m, layer, add_slices, s);
    for (moec_mat i = 0; i < MOEC_MAT_COUNT; i++)
        if (l->mat[i].scale)
            add_part(s, (part){.w = &l->mat[i]});
    for (int64_t e = 0; l->expert && !s->lean && e < m->dims.experts; e++) {
        const moec_weight *w[3];
        mlp_views(w, &l->expert[e]);
        for (int i = 0; i < 3; i++)
            if (w[i]->scale)
                add_part(s, (part){.w = w[i]});
    }
}

static moec_status refuse(const moec_tensor *t, int64_t value, moec_err *err)
{
    return moec_fail(err, MOEC_ENUMERIC, "tensor %s: value %lld is NaN or infinite", t->name, (long long)value);
}

static moec_status check_view(const moec_weight *w, moec_err *err)
{
    int64_t bad = moec_weight_nonfinite(w);
    return bad < 0 ? MOEC_OK
                   : refuse(w->of, w->at + bad / w->cols * w->row_step + bad % w->cols * w->col_step, err);
}

static moec_status scan_parts(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const scan *s = ctx;
    (void)worker;
    for (int64_t i = lo; i < hi; i++) {
        const part *p = &s->part[i];
        if (p->w) {
            moec_status st = check_view(p->w, err);
            if (st != MOEC_OK)
                return st;
            if (s->lean)
                moec_weight_drop(p->w);
            continue;
        }
        moec_tensor slice = *p->t;
        slice.data = (const char *)p->t->data + p->at;
        slice.bytes = p->n;
        int64_t bad = moec_tensor_nonfinite(&slice);
        if (bad >= 0)
            return refuse(p->t, bad + (int64_t)(p->at / (size_t)moec_dtypes[p->t->dtype].bytes), err);
        if (s->lean)
            moec_pages_drop(slice.data, slice.bytes);
    }
    return MOEC_OK;
}

moec_status moec__layer_check(const moec_model *m, int64_t layer, bool lean, moec_err *err)
{
    scan s = {.lean = lean};
    list_parts(&s, m, layer);
    moec_status st = MOEC_NEW(s.part, (size_t)s.n, err);
    if (st != MOEC_OK)
        return st;
    list_parts(&s, m, layer);
    st = moec_par_for(s.n, 1, scan_parts, &s, err);
    moec_free(s.part);
    return st;
}

enum { BAND = 1 << 20 }; /* values of an expert's matrix that one thread looks at */

static moec_status check_bands(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    moec_weight band = *(const moec_weight *)ctx;
    (void)worker;
    band.at += lo * band.row_step;
    band.rows = hi - lo;
    return check_view(&band, err);
}

moec_status moec__expert_check(moec_forward *f, int64_t e, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_weight *w[3];
    if (__atomic_load_n(&f->expert_ok[e], __ATOMIC_RELAXED))
        return MOEC_OK;
    mlp_views(w, &f->layer->expert[e]);
    for (int i = 0; i < 3; i++) {
        moec_weight view = *w[i];
        int64_t grain = view.cols > 0 && view.cols < BAND ? BAND / view.cols : 1;
        MOEC_TRY(moec_par_for(view.rows, grain, check_bands, &view, err));
    }
    __atomic_store_n(&f->expert_ok[e], 1, __ATOMIC_RELAXED);
done:
    return st;
}
