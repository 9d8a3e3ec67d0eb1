/* Sets up the memory of the forward pass, makes layers current, and runs a chunk through one. */
#include "model/forward.h"

#include "base/mem.h"
#include "base/par.h"
#include "model/forward_parts.h"
#include "num/linalg.h"
#include "num/vec.h"

#include <stdio.h>
#include <string.h>

static int64_t max2(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* Every array of one worker, as (where, count): one list serves allocation, accounting and release. */
typedef struct piece {
    void **at;
    size_t n, size;
} piece;
enum { MAX_PIECES = 48 };

static int list_scratch(piece *p, moec_scratch *s, const moec_model *m, const moec_forward_opts *o, int64_t group)
{
    const moec_dims *d = &m->dims;
    int k = 0;
    size_t n = (size_t)o->max_tokens, g = (size_t)group, H = (size_t)d->hidden, E = (size_t)d->experts;
    size_t I = (size_t)d->expert_width, K = (size_t)d->top_k, half = (size_t)d->rope.width / 2;
    int64_t q = d->heads * d->head_dim, kv = d->kv_heads * d->head_dim;
    int64_t width = max2(d->expert_width, d->dense_width);
    size_t block = (size_t)max2(MOEC_BLOCK, moec_panels(group) * MOEC_PANEL);
    size_t gemm = moec_gemm_scratch_bytes(o->compute, (int64_t)block, max2(max2(q, d->hidden), width));
    size_t gemm32 = moec_gemm_scratch_bytes(MOEC_COMPUTE_F32, MOEC_BLOCK, d->hidden);
    size_t sums = o->sums ? E : 0, seq = (size_t)o->max_seq, own = d->rope.kind == MOEC_ROPE_DYNAMIC ? seq : 0;
#define ADD(field, count) p[k++] = (piece){(void **)&s->field, (count), sizeof *s->field}
    ADD(x, n * H);
    ADD(r, n * H);
    ADD(panel_in, block * (size_t)max2(q, d->hidden));
    ADD(panel_a, MOEC_BLOCK * (size_t)width);
    ADD(panel_b, MOEC_BLOCK * (size_t)width);
    ADD(panel_out, block * (size_t)max2(max2(q, d->hidden), d->experts));
    ADD(q, g * (size_t)q);
    ADD(k, g * (size_t)kv);
    ADD(v, g * (size_t)kv);
    ADD(ctx, g * (size_t)q);
    ADD(scores_qk, MOEC_QUERIES * seq);
    ADD(rope_cos, own * half);
    ADD(rope_sin, own * half);
    ADD(inv_freq, half);
    ADD(logits, n * E);
    ADD(scores, n * E);
    ADD(ids, n * K);
    ADD(next_ids, n * K);
    ADD(gates, n * K);
    ADD(y_norm, n * K);
    ADD(count, E);
    ADD(first, E + 1);
    ADD(token, n * K);
    ADD(slot, n * K);
    ADD(weight, n * K);
    ADD(out_absmax, E);
    ADD(in_absmax, E);
    ADD(out_channel, E);
    ADD(sums.y_sum, sums * H);
    ADD(sums.gy_sum, sums * H);
    ADD(sums.xin_abs, sums * H);
    ADD(sums.xin_sq, sums * H);
    ADD(sums.act_abs, sums * I);
    ADD(sums.act_sq, sums * I);
    ADD(sums.gact_sq, sums * I);
#undef ADD
    p[k++] = (piece){&s->gemm, gemm > gemm32 ? gemm : gemm32, 1};
    return k;
}

static int list_shared(piece *p, moec_forward *f, const moec_model *m, const moec_forward_opts *o)
{
    const moec_dims *d = &m->dims;
    int k = 0;
    size_t H = (size_t)d->hidden, E = (size_t)d->experts, half = (size_t)d->rope.width / 2;
    size_t q = (size_t)(d->heads * d->head_dim), kv = (size_t)(d->kv_heads * d->head_dim), seq = (size_t)o->max_seq;
#define ADD(field, count) p[k++] = (piece){(void **)&f->field, (count), sizeof *f->field}
    ADD(norm_attn, H);
    ADD(norm_mlp, H);
    ADD(q_norm, (size_t)d->head_dim);
    ADD(k_norm, (size_t)d->head_dim);
    ADD(q_bias, q);
    ADD(k_bias, kv);
    ADD(v_bias, kv);
    ADD(o_bias, H);
    ADD(router, E * H);
    ADD(next_router, E * H);
    ADD(router_norm, E);
    ADD(rope_cos, seq * half);
    ADD(rope_sin, seq * half);
    ADD(scratch, (size_t)o->workers);
#undef ADD
    return k;
}

/* Tokens that run through attention together: whole sequences. */
static int64_t group_tokens(const moec_forward_opts *o)
{
    int64_t g = max2(o->max_seq, MOEC_GROUP);
    return g < o->max_tokens ? g : o->max_tokens;
}

size_t moec_forward_bytes(const moec_model *m, const moec_forward_opts *o)
{
    moec_scratch s;
    moec_forward f;
    piece p[MAX_PIECES];
    size_t worker = 0, sum = 0;
    int k = list_scratch(p, &s, m, o, group_tokens(o));
    for (int i = 0; i < k; i++)
        worker += p[i].n * p[i].size;
    k = list_shared(p, &f, m, o);
    for (int i = 0; i < k; i++)
        sum += p[i].n * p[i].size;
    return sum + worker * (size_t)o->workers;
}

static moec_status take(const piece *p, int k, moec_err *err)
{
    for (int i = 0; i < k; i++) {
        moec_status st = moec_alloc(p[i].at, p[i].n, p[i].size, err);
        if (st != MOEC_OK)
            return st;
    }
    return MOEC_OK;
}

static void give(const piece *p, int k)
{
    for (int i = 0; i < k; i++) {
        void *held = *p[i].at;
        *p[i].at = NULL;
        moec_free(held);
    }
}

moec_status moec_forward_new(moec_forward **out, const moec_model *m, const moec_forward_opts *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    piece p[MAX_PIECES];
    moec_forward *f = NULL;
    double *inv_freq = NULL;
    *out = NULL;
    if (o->max_tokens > INT32_MAX / m->dims.top_k) /* selections of a chunk are numbered by int32 */
        return moec_fail(err, MOEC_EINVAL, "%lld tokens of %lld selections each are too many for one chunk",
                         (long long)o->max_tokens, (long long)m->dims.top_k);
    moec_linalg_init();
    MOEC_TRY(MOEC_NEW(f, 1, err));
    f->m = m;
    f->o = *o;
    f->group = group_tokens(o);
    MOEC_TRY(take(p, list_shared(p, f, m, o), err));
    for (int w = 0; w < o->workers; w++)
        MOEC_TRY(take(p, list_scratch(p, &f->scratch[w], m, o, f->group), err));
    MOEC_TRY(MOEC_NEW(inv_freq, (size_t)m->dims.rope.width / 2, err));
    moec__rope_fill(f->rope_cos, f->rope_sin, inv_freq, &m->dims.rope, o->max_seq);
    *out = f;
    f = NULL;
done:
    moec_free(inv_freq);
    moec_forward_free(f);
    return st;
}

void moec_forward_free(moec_forward *f)
{
    piece p[MAX_PIECES];
    if (!f)
        return;
    for (int w = 0; f->scratch && w < f->o.workers; w++)
        give(p, list_scratch(p, &f->scratch[w], f->m, &f->o, f->group));
    give(p, list_shared(p, f, f->m, &f->o));
    moec_free(f);
}

moec_status moec_forward_embed(float *h, const moec_model *m, const int32_t *ids, int64_t n, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_tensor *t = m->embed;
    int64_t hidden = m->dims.hidden;
    size_t row = (size_t)hidden * (size_t)moec_dtypes[t->dtype].bytes;
    char *raw = NULL;
    MOEC_TRY(MOEC_NEW(raw, row, err));
    for (int64_t i = 0; i < n; i++) {
        if (ids[i] < 0 || ids[i] >= m->dims.vocab)
            MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "token id %d is outside the model's vocabulary of %lld", (int)ids[i],
                               (long long)m->dims.vocab));
        MOEC_TRY(moec_ckpt_read(raw, m->ckpt, t, (size_t)ids[i] * row, row, err));
        moec_dtypes[t->dtype].to_f32(h + i * hidden, raw, hidden);
    }
    if (!moec_all_finite(h, n * hidden))
        st = moec_fail(err, MOEC_ENUMERIC, "tensor %s holds a value that is not finite", t->name);
done:
    moec_free(raw);
    return st;
}

void moec_layer_each(const moec_model *m, int64_t layer,
                     void (*fn)(void *ctx, const moec_model *m, const moec_tensor *t), void *ctx)
{
    const moec_layer *l = &m->layer[layer];
    const moec_tensor *const single[] = {l->norm_attn, l->norm_mlp, l->q,      l->k,         l->v,        l->o,
                                         l->q_bias,    l->k_bias,   l->v_bias, l->o_bias,    l->q_norm,   l->k_norm,
                                         l->router,    l->dense.gate, l->dense.up, l->dense.down};
    for (size_t i = 0; i < MOEC_COUNT(single); i++)
        if (single[i])
            fn(ctx, m, single[i]);
    for (int64_t e = 0; l->expert && e < m->dims.experts; e++) {
        fn(ctx, m, l->expert[e].gate);
        fn(ctx, m, l->expert[e].up);
        fn(ctx, m, l->expert[e].down);
    }
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

typedef struct scan {
    const moec_forward *f;
    const moec_tensor **t;
    int64_t n;
} scan;

static void collect(void *ctx, const moec_model *m, const moec_tensor *t)
{
    scan *s = ctx;
    (void)m;
    s->t[s->n++] = t;
}

static moec_status scan_tensor(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const scan *s = ctx;
    (void)worker;
    for (int64_t i = lo; i < hi; i++) {
        int64_t bad = moec_tensor_nonfinite(s->t[i]);
        if (bad >= 0)
            return moec_fail(err, MOEC_ENUMERIC, "tensor %s: value %lld is NaN or infinite", s->t[i]->name,
                             (long long)bad);
        if (s->f->o.lean)
            moec_pages_drop(s->t[i]->data, s->t[i]->bytes);
    }
    return MOEC_OK;
}

static moec_status check_finite(const moec_forward *f, int64_t layer, moec_err *err)
{
    scan s = {.f = f};
    moec_status st = MOEC_NEW(s.t, (size_t)(3 * f->m->dims.experts + 16), err);
    if (st != MOEC_OK)
        return st;
    moec_layer_each(f->m, layer, collect, &s);
    st = moec_par_for(s.n, 1, scan_tensor, &s, err);
    moec_free(s.t);
    return st;
}

static void widen(float *out, const moec_tensor *t)
{
    if (t)
        moec_dtypes[t->dtype].to_f32(out, t->data, (int64_t)(t->bytes / (size_t)moec_dtypes[t->dtype].bytes));
}

moec_status moec_forward_layer(moec_forward *f, int64_t layer, moec_err *err)
{
    const moec_layer *l = &f->m->layer[layer];
    const moec_dims *d = &f->m->dims;
    moec_status st = check_finite(f, layer, err);
    if (st != MOEC_OK)
        return st;
    f->layer = l;
    f->next_moe = NULL;
    for (int64_t i = layer + 1; i < d->layers && !f->next_moe; i++)
        if (f->m->layer[i].router)
            f->next_moe = &f->m->layer[i];
    widen(f->norm_attn, l->norm_attn);
    widen(f->norm_mlp, l->norm_mlp);
    widen(f->q_norm, l->q_norm);
    widen(f->k_norm, l->k_norm);
    widen(f->q_bias, l->q_bias);
    widen(f->k_bias, l->k_bias);
    widen(f->v_bias, l->v_bias);
    widen(f->o_bias, l->o_bias);
    widen(f->router, l->router);
    if (f->next_moe)
        widen(f->next_router, f->next_moe->router);
    for (int64_t e = 0; l->router && e < d->experts; e++)
        f->router_norm[e] = (float)__builtin_sqrt(moec_sum_sq(f->router + e * d->hidden, d->hidden));
    return MOEC_OK;
}

static moec_status show(moec_forward *f, const moec_scratch *s, int worker, const float *h, const int64_t *seq,
                        int64_t n_seq, moec_watch_fn *watch, void *ctx, moec_err *err)
{
    moec_moe_view v = {.layer = f->layer->index, .n = seq[n_seq], .n_seq = n_seq, .seq = seq, .h = h, .x = s->x, .r = s->r};
    v.logits = s->logits;
    v.scores = s->scores;
    v.ids = s->ids;
    v.gates = s->gates;
    v.y_norm = s->y_norm;
    v.out_absmax = s->out_absmax;
    v.in_absmax = s->in_absmax;
    v.out_channel = s->out_channel;
    v.router = f->router;
    v.router_norm = f->router_norm;
    v.next_ids = f->next_moe ? s->next_ids : NULL;
    v.sums = f->o.sums ? &s->sums : NULL;
    return watch(ctx, worker, &v, err);
}

moec_status moec_forward_chunk(moec_forward *f, int worker, float *h, const int64_t *seq, int64_t n_seq,
                               moec_watch_fn *watch, void *ctx, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_scratch *s = &f->scratch[worker];
    int64_t n = seq[n_seq], hidden = f->m->dims.hidden;
    /* Absent biases and norms must read as absent, whatever an earlier layer had. */
    moec_forward view = *f;
    view.q_bias = f->layer->q_bias ? f->q_bias : NULL;
    view.k_bias = f->layer->k_bias ? f->k_bias : NULL;
    view.v_bias = f->layer->v_bias ? f->v_bias : NULL;
    view.o_bias = f->layer->o_bias ? f->o_bias : NULL;
    view.q_norm = f->layer->q_norm ? f->q_norm : NULL;
    view.k_norm = f->layer->k_norm ? f->k_norm : NULL;
    for (int64_t i = 0; i < n_seq;) {
        int64_t j = i + 1;
        while (j < n_seq && seq[j + 1] - seq[i] <= f->group)
            j++;
        MOEC_TRY(moec__attention(&view, s, h, seq + i, j - i, err));
        i = j;
    }
    MOEC_TRY(moec__feed_forward(&view, s, h, n, err));
    if (watch && f->layer->router)
        MOEC_TRY(show(f, s, worker, h, seq, n_seq, watch, ctx, err));
    moec_add(h, s->r, n * hidden);
    if (!moec_all_finite(h, n * hidden))
        st = moec_fail(err, MOEC_ENUMERIC, "layer %lld: its output is not finite", (long long)f->layer->index);
done:
    return st;
}
