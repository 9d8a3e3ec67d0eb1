/* Sets up the memory of the forward pass, makes layers current, and runs a chunk through one. */
#include "model/forward.h"

#include "base/log.h"
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
enum { MAX_PIECES = 2 * (MOEC_VEC_COUNT + MOEC_MAT_COUNT) + 64 };

typedef struct mixer {
    moec_mix_fn *run;
    size_t (*work)(const moec_model *m, const moec_layer *l, int64_t g, int64_t max_seq);
} mixer;
static const mixer mixers[] = {
    [MOEC_MIXER_ATTENTION] = {moec__mix_attention, moec__work_attention},
    [MOEC_MIXER_LATENT] = {moec__mix_latent, moec__work_latent},
    [MOEC_MIXER_CONV] = {moec__mix_conv, moec__work_conv},
    [MOEC_MIXER_DELTA] = {moec__mix_delta, moec__work_delta},
    [MOEC_MIXER_HEADS] = {moec__mix_heads, moec__work_heads},
};

size_t moec__mix_work_floats(const moec_model *m, int64_t g, int64_t max_seq)
{
    size_t most = 0;
    for (int64_t i = 0; i < m->dims.layers; i++) {
        size_t n = mixers[m->layer[i].mixer].work(m, &m->layer[i], g, max_seq);
        most = n > most ? n : most;
    }
    return most;
}

/* What the layers of a model ask for, as the widest of each kind. */
typedef struct needs {
    int64_t in, in_block, mid, out;      /* widths of panel_in by group and by block, of panel_a and panel_b, of panel_out */
    int64_t q, k, v, ctx, gate;          /* floats a token */
    bool scores, shared, gate_up_bias, down_bias;
} needs;

/* Does a mixer pack its input for the whole group, so that several matrices can share the panels? */
static bool packs_group(moec_mat i)
{
    switch (i) {
    case MOEC_MAT_Q:
    case MOEC_MAT_K:
    case MOEC_MAT_V:
    case MOEC_MAT_ATTN_GATE:
    case MOEC_MAT_Q_A:
    case MOEC_MAT_Q_B:
    case MOEC_MAT_KV_A:
    case MOEC_MAT_KV_B:
    case MOEC_MAT_HEADS_ROUTER:
        return true;
    default:
        return false;
    }
}

static void add_layer(needs *a, const moec_model *m, const moec_layer *l)
{
    const moec_dims *d = &m->dims;
    bool latent = l->mixer == MOEC_MIXER_LATENT, attends = l->mixer == MOEC_MIXER_ATTENTION, heads = l->mixer == MOEC_MIXER_HEADS;
    for (moec_mat i = 0; i < MOEC_MAT_COUNT; i++) {
        if (!l->mat[i].of)
            continue;
        int64_t *in = packs_group(i) ? &a->in : &a->in_block;
        *in = max2(*in, l->mat[i].cols);
        a->out = max2(a->out, l->mat[i].rows);
    }
    if (latent) /* the panels of two inputs at once */
        a->in = max2(a->in, max2(d->hidden, d->q_rank) + d->kv_rank);
    if (heads) {
        a->in_block = max2(a->in_block, d->kv_heads * d->head_dim);
        a->out = max2(a->out, max2(d->kv_heads * d->head_dim, d->hidden));
    }
    a->mid = max2(a->mid, l->mat[MOEC_MAT_ROUTER_IN].rows);
    a->mid = max2(a->mid, max2(l->mat[MOEC_MAT_SHARED_DOWN].cols, l->mat[MOEC_MAT_DENSE_DOWN].cols));
    a->scores |= latent || attends || heads;
    if (attends || heads) {
        a->q = d->heads * d->head_dim;
        a->k = d->kv_heads * d->head_dim;
        a->v = d->kv_heads * d->value_dim;
    }
    if (latent || attends || heads)
        a->ctx = d->heads * d->value_dim;
    if (attends && (m->family->gate_in_q || l->mat[MOEC_MAT_ATTN_GATE].of))
        a->gate = d->heads * d->value_dim;
    a->shared |= l->mat[MOEC_MAT_SHARED_DOWN].of != NULL;
    a->gate_up_bias |= l->gate_up_bias != NULL;
    a->down_bias |= l->down_bias != NULL;
}

static needs needs_of(const moec_model *m)
{
    const moec_dims *d = &m->dims;
    needs a = {.in = d->hidden, .in_block = max2(d->hidden, d->expert_width), .mid = d->expert_width,
               .out = max2(max2(d->hidden, d->expert_width), d->experts + d->null_experts)};
    for (int64_t i = 0; i < d->layers; i++)
        add_layer(&a, m, &m->layer[i]);
    return a;
}

static int list_scratch(piece *p, moec_scratch *s, const moec_model *m, const moec_forward_opts *o, int64_t group)
{
    const moec_dims *d = &m->dims;
    const needs a = needs_of(m);
    int k = 0;
    size_t n = (size_t)o->max_tokens, g = (size_t)group, H = (size_t)d->hidden, E = (size_t)d->experts;
    size_t I = (size_t)d->expert_width, K = (size_t)d->slots, half = (size_t)d->rope.width / 2;
    size_t threads = (size_t)max2(o->threads, 1);
    size_t rows = E + (size_t)d->null_experts, in_group = (size_t)(moec_panels(group) * MOEC_PANEL * a.in);
    size_t in_block = MOEC_BLOCK * (size_t)a.in_block;
    int64_t widest = max2(max2(a.in, a.in_block), a.mid);
    size_t gemm = moec_gemm_scratch_bytes(o->compute, MOEC_BLOCK, widest);
    size_t gemm32 = moec_gemm_scratch_bytes(MOEC_COMPUTE_F32, MOEC_BLOCK, widest);
    size_t sums = o->sums ? E : 0, seq = (size_t)o->max_seq, own = moec_rope_by_length(&d->rope) ? seq : 0;
#define ADD(field, count) p[k++] = (piece){(void **)&s->field, (count), sizeof *s->field}
    ADD(x, n * H);
    ADD(r, n * H);
    ADD(shared, a.shared ? n * H : 0);
    ADD(panel_in, in_group > in_block ? in_group : in_block);
    ADD(panel_a, MOEC_BLOCK * (size_t)a.mid);
    ADD(panel_b, MOEC_BLOCK * (size_t)a.mid);
    ADD(panel_out, MOEC_BLOCK * (size_t)a.out);
    ADD(q, g * (size_t)a.q);
    ADD(k, g * (size_t)a.k);
    ADD(v, g * (size_t)a.v);
    ADD(ctx, g * (size_t)a.ctx);
    ADD(gate, g * (size_t)a.gate);
    ADD(work, moec__mix_work_floats(m, group, o->max_seq));
    ADD(scores_qk, a.scores ? threads * MOEC_QUERIES * (seq + 16) : 0);
    ADD(rope_cos, own * half);
    ADD(rope_sin, own * half);
    ADD(inv_freq, half);
    ADD(logits, n * rows);
    ADD(scores, n * rows);
    ADD(ids, n * K);
    ADD(next_ids, n * K);
    ADD(gates, n * K);
    ADD(null_gates, n * (size_t)d->null_experts);
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

/* Numbers in a tensor, 0 for none. */
static int64_t count_of(const moec_tensor *t)
{
    return t ? (int64_t)(t->bytes / (size_t)moec_dtypes[t->dtype].bytes) : 0;
}

static int list_router(piece *p, moec_router *r, const moec_model *m)
{
    const moec_dims *d = &m->dims;
    size_t E = (size_t)d->experts, rows = E + (size_t)d->null_experts, C = (size_t)d->carried;
    int64_t width = 0, in = 0;
    bool bias = false, selection = false;
    for (int64_t i = 0; i < d->layers; i++) {
        width = max2(width, m->layer[i].mat[MOEC_MAT_ROUTER].cols);
        in = max2(in, m->layer[i].mat[MOEC_MAT_ROUTER_IN].rows);
        bias |= m->layer[i].bias[MOEC_MAT_ROUTER] != NULL || m->layer[i].bias[MOEC_MAT_ROUTER_NULL] != NULL;
        selection |= m->layer[i].vec[MOEC_VEC_SELECTION_BIAS] != NULL;
    }
    p[0] = (piece){(void **)&r->rows_store, rows * (size_t)width, sizeof(float)};
    p[1] = (piece){(void **)&r->bias_store, bias ? rows : 0, sizeof(float)};
    p[2] = (piece){(void **)&r->selection_store, selection ? E : 0, sizeof(float)};
    p[3] = (piece){(void **)&r->norm, E, sizeof(float)};
    p[4] = (piece){(void **)&r->in_store, (size_t)(in * d->hidden), sizeof(float)};
    p[5] = (piece){(void **)&r->map_store, C * C, sizeof(float)};
    return 6;
}

static int list_shared(piece *p, moec_forward *f, const moec_model *m, const moec_forward_opts *o)
{
    const moec_dims *d = &m->dims;
    const needs a = needs_of(m);
    int k = 0;
    size_t half = (size_t)d->rope.width / 2, seq = (size_t)o->max_seq;
    size_t EI = (size_t)(d->experts * d->expert_width), EH = (size_t)(d->experts * d->hidden);
    size_t tail = m->family->constant ? (size_t)m->family->n_tail : 0;
    for (moec_vec i = 0; i < MOEC_VEC_COUNT; i++) {
        int64_t most = 0;
        for (int64_t j = 0; j < d->layers; j++)
            most = max2(most, count_of(m->layer[j].vec[i]));
        p[k++] = (piece){(void **)&f->vec_store[i], (size_t)most, sizeof(float)};
    }
    for (moec_mat i = 0; i < MOEC_MAT_COUNT; i++) {
        int64_t most = 0;
        for (int64_t j = 0; j < d->layers; j++)
            most = max2(most, count_of(m->layer[j].bias[i]));
        p[k++] = (piece){(void **)&f->bias_store[i], (size_t)most, sizeof(float)};
    }
    k += list_router(p + k, &f->router, m);
    k += list_router(p + k, &f->next_router, m);
#define ADD(field, count) p[k++] = (piece){(void **)&f->field, (count), sizeof *f->field}
    ADD(expert_gate_bias, a.gate_up_bias ? EI : 0);
    ADD(expert_up_bias, a.gate_up_bias ? EI : 0);
    ADD(expert_down_bias, a.down_bias ? EH : 0);
    ADD(constant, tail * (size_t)d->hidden);
    ADD(constant_mix, 2 * tail * (size_t)d->hidden);
    ADD(rope_cos, a.scores ? seq * half : 0);
    ADD(rope_sin, a.scores ? seq * half : 0);
    ADD(expert_ok, o->lean ? (size_t)d->experts : 0);
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
    if (o->max_tokens > INT32_MAX / m->dims.slots) /* selections of a chunk are numbered by int32 */
        return moec_fail(err, MOEC_EINVAL, "%lld tokens of %lld selections each are too many for one chunk",
                         (long long)o->max_tokens, (long long)m->dims.slots);
    if (m->dims.exact_tokens > 0 && o->max_seq > m->dims.exact_tokens)
        return moec_fail(err, MOEC_EINVAL, "windows of %lld tokens: %s attends sparsely behind %lld (%s), which is not computed; "
                         "take --seq-len %lld or less", (long long)o->max_seq, m->family->model_type,
                         (long long)m->dims.exact_tokens, m->family->key_exact_tokens, (long long)m->dims.exact_tokens);
    moec_linalg_init();
    MOEC_TRY(MOEC_NEW(f, 1, err));
    f->m = m;
    f->o = *o;
    f->group = group_tokens(o);
    MOEC_TRY(take(p, list_shared(p, f, m, o), err));
    for (int w = 0; w < o->workers; w++)
        MOEC_TRY(take(p, list_scratch(p, &f->scratch[w], m, o, f->group), err));
    MOEC_TRY(MOEC_NEW(inv_freq, (size_t)m->dims.rope.width / 2, err));
    if (f->rope_cos)
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

static void scale(float *x, float by, int64_t n)
{
    for (int64_t i = 0; by != 1.0f && i < n; i++)
        x[i] *= by;
}

moec_status moec_forward_embed(float *h, const moec_model *m, const int32_t *ids, int64_t n, moec_err *err)
{
    moec_status st = MOEC_OK;
    int64_t hidden = m->dims.hidden;
    const moec_weight one = {.of = m->embedding.of, .rows = 1, .cols = hidden, .row_step = hidden, .col_step = 1,
                             .storage = m->embedding.storage, .block = m->embedding.block};
    const size_t row = (size_t)moec_weight_bytes(&one);
    char *raw = NULL;
    MOEC_TRY(MOEC_NEW(raw, row, err));
    for (int64_t i = 0; i < n; i++) {
        if (ids[i] < 0 || ids[i] >= m->dims.vocab)
            MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "token id %d is outside the model's vocabulary of %lld", (int)ids[i],
                               (long long)m->dims.vocab));
        MOEC_TRY(moec_ckpt_read(raw, m->ckpt, one.of, (size_t)ids[i] * row, row, err));
        const moec_tensor read = {.dtype = one.of->dtype, .data = raw, .rank = 2, .dim = {1, (int64_t)row}, .bytes = row};
        moec_weight line = one;
        line.of = &read;
        moec_weight_read(h + i * hidden, hidden, &line, 0, 1, 0, hidden);
    }
    scale(h, (float)m->dims.embed_scale, n * hidden);
    if (!moec_all_finite(h, n * hidden))
        st = moec_fail(err, MOEC_ENUMERIC, "tensor %s holds a value that is not finite", one.of->name);
done:
    moec_free(raw);
    return st;
}

void moec__norm(float *y, const float *x, const float *w, const float *bias, const moec_model *m, int64_t n, int64_t width)
{
    float eps = (float)m->dims.norm_eps;
    for (int64_t t = 0; t < n; t++)
        if (m->family->norm == MOEC_NORM_LAYER)
            moec_layer_norm(y + t * width, x + t * width, w, bias, width, eps);
        else
            moec_rms_norm(y + t * width, x + t * width, w, width, eps); /* where it is stored minus 1, see widen_layer */
}

void moec_forward_tap(moec_forward *f, int worker, moec_tap_fn *tap, void *ctx, bool mix_only)
{
    moec_scratch *s = &f->scratch[worker];
    s->tap = tap;
    s->tap_ctx = ctx;
    s->mix_only = mix_only;
}

moec_status moec__tap(moec_forward *f, moec_scratch *s, const moec_weight *w, const float *panels, int64_t n, moec_err *err)
{
    const moec_weight *mat = f->layer->mat;
    if (!s->tap)
        return MOEC_OK;
    for (moec_mat i = 0; i < MOEC_MAT_COUNT; i++)
        if (mat[i].of == w->of && mat[i].at == w->at) { /* the first heads of latent attention stand for all of them */
            const int64_t at = s->tapped[i];
            s->tapped[i] += n;
            return s->tap(s->tap_ctx, (int)(s - f->scratch), i, panels, at, n, w->cols, err);
        }
    return MOEC_OK;
}

moec_status moec__project_view(moec_forward *f, moec_scratch *s, float *out, int64_t ldo, const float *panels, int64_t n,
                               const moec_weight *w, const float *bias, moec_err *err)
{
    /* In blocks, for which weights are read anew anyhow (see moec_gemm), so that panel_out stays small. */
    for (int64_t at = 0; at < n; at += MOEC_BLOCK) {
        int64_t m = n - at < MOEC_BLOCK ? n - at : MOEC_BLOCK;
        moec_status st = moec__tap(f, s, w, panels + at * w->cols, m, err);
        if (st == MOEC_OK)
            st = moec_gemm_weight(s->panel_out, panels + at * w->cols, m, w, f->o.compute, s->gemm, err);
        if (st != MOEC_OK)
            return st;
        moec__share_unpack(f, out + at * ldo, ldo, s->panel_out, m, w->rows);
        for (int64_t t = at; bias && t < at + m; t++)
            moec_add(out + t * ldo, bias, w->rows);
    }
    return MOEC_OK;
}

moec_status moec__project(moec_forward *f, moec_scratch *s, float *out, int64_t n, moec_mat which, moec_err *err)
{
    const moec_weight *w = &f->layer->mat[which];
    return moec__project_view(f, s, out, w->rows, s->panel_in, n, w, f->bias[which], err);
}

moec_status moec__project_rows(moec_forward *f, moec_scratch *s, float *out, const float *x, int64_t n, moec_mat which,
                               moec_err *err)
{
    const moec_weight *w = &f->layer->mat[which];
    for (int64_t at = 0; at < n; at += MOEC_BLOCK) {
        int64_t m = n - at < MOEC_BLOCK ? n - at : MOEC_BLOCK;
        moec__share_pack(f, s->panel_in, x + at * w->cols, w->cols, NULL, m, w->cols);
        moec_status st = moec__project_view(f, s, out + at * w->rows, w->rows, s->panel_in, m, w, f->bias[which], err);
        if (st != MOEC_OK)
            return st;
    }
    return MOEC_OK;
}

/* --- layers ----------------------------------------------------------------------------------------------------------- */

static void widen(float **out, float *store, const moec_tensor *t)
{
    *out = t ? store : NULL; /* an absent one must read as absent, whatever an earlier layer had */
    if (t)
        moec_dtypes[t->dtype].to_f32(store, t->data, count_of(t));
}

static void widen_layer(moec_forward *f, const moec_layer *l)
{
    static const moec_vec plus1[] = {MOEC_VEC_NORM_ATTN, MOEC_VEC_NORM_MLP, MOEC_VEC_POST_ATTN, MOEC_VEC_POST_MLP,
                                     MOEC_VEC_Q_NORM, MOEC_VEC_K_NORM};
    const moec_dims *d = &f->m->dims;
    for (moec_vec i = 0; i < MOEC_VEC_COUNT; i++)
        widen(&f->vec[i], f->vec_store[i], l->vec[i]);
    for (moec_mat i = 0; i < MOEC_MAT_COUNT; i++)
        widen(&f->bias[i], f->bias_store[i], l->bias[i]);
    for (size_t i = 0; f->m->family->norm == MOEC_NORM_RMS_PLUS1 && i < MOEC_COUNT(plus1); i++)
        for (int64_t j = 0; j < count_of(l->vec[plus1[i]]); j++)
            f->vec[plus1[i]][j] += 1.0f;
    for (int64_t i = 0; l->expert && i < f->m->family->n_tail; i++)
        if (l->constant[i]) {
            const moec_tensor *v = l->constant[i], *mix = l->constant_mix[i];
            moec_dtypes[v->dtype].to_f32(f->constant + i * d->hidden, v->data, d->hidden);
            moec_dtypes[mix->dtype].to_f32(f->constant_mix + 2 * i * d->hidden, mix->data, 2 * d->hidden);
        }
    /* Whether experts have biases is asked of the model; a layer without them adds 0. */
    size_t EI = (size_t)(d->experts * d->expert_width), EH = (size_t)(d->experts * d->hidden);
    for (int64_t e = 0; l->gate_up_bias && e < d->experts; e++)
        moec_expert_bias(f->expert_gate_bias + e * d->expert_width, f->expert_up_bias + e * d->expert_width, f->m, l, e);
    for (int64_t e = 0; l->down_bias && e < d->experts; e++)
        moec_expert_down_bias(f->expert_down_bias + e * d->hidden, f->m, l, e);
    if (!l->gate_up_bias && f->expert_gate_bias) {
        memset(f->expert_gate_bias, 0, EI * sizeof(float));
        memset(f->expert_up_bias, 0, EI * sizeof(float));
    }
    if (!l->down_bias && f->expert_down_bias)
        memset(f->expert_down_bias, 0, EH * sizeof(float));
}

moec_status moec_forward_layer(moec_forward *f, int64_t layer, moec_err *err)
{
    const moec_layer *l = &f->m->layer[layer];
    moec_status st = moec__layer_check(f->m, layer, f->o.lean, err);
    if (st != MOEC_OK)
        return st;
    f->layer = l;
    if (f->o.lean)
        memset(f->expert_ok, 0, (size_t)f->m->dims.experts);
    widen_layer(f, l);
    f->router.layer = f->next_router.layer = NULL;
    if (l->expert)
        moec__router_load(&f->router, f->m, l);
    for (int64_t i = layer + 1; i < f->m->dims.layers && !f->next_router.layer; i++)
        if (f->m->layer[i].expert)
            moec__router_load(&f->next_router, f->m, &f->m->layer[i]);
    return MOEC_OK;
}

/* --- chunks ----------------------------------------------------------------------------------------------------------- */

static bool has_shared(const moec_layer *l)
{
    return l->expert && l->mat[MOEC_MAT_SHARED_DOWN].of;
}

static moec_status show(moec_forward *f, const moec_scratch *s, int worker, const float *h, const int64_t *seq,
                        int64_t n_seq, moec_watch_fn *watch, void *ctx, moec_err *err)
{
    moec_moe_view v = {.layer = f->layer->index, .n = seq[n_seq], .n_seq = n_seq, .seq = seq, .h = h, .x = s->x, .r = s->r};
    v.shared = has_shared(f->layer) ? s->shared : NULL;
    v.ld = f->m->dims.experts + f->m->dims.null_experts;
    v.logits = s->logits;
    v.scores = s->scores;
    v.ids = s->ids;
    v.gates = s->gates;
    v.null_gates = f->m->dims.null_experts > 0 ? s->null_gates : NULL;
    v.y_norm = s->y_norm;
    v.out_absmax = s->out_absmax;
    v.in_absmax = s->in_absmax;
    v.out_channel = s->out_channel;
    v.router = f->router.in ? NULL : f->router.rows;
    v.router_norm = f->router.norm;
    v.router_bias = f->router.bias;
    v.next_ids = f->next_router.layer ? s->next_ids : NULL;
    v.sums = f->o.sums ? &s->sums : NULL;
    return watch(ctx, worker, &v, err);
}

/* h += scale * norm(branch), the norm where the layer has one. The branch is overwritten. */
static void add_branch(const moec_forward *f, float *h, float *branch, moec_vec post, int64_t n)
{
    int64_t hidden = f->m->dims.hidden;
    if (f->vec[post])
        moec__share_norm(f, branch, branch, f->vec[post], NULL, n, hidden);
    scale(branch, (float)f->m->dims.residual_scale, n * hidden);
    moec__share_add(f, h, branch, n, hidden);
}

/* The token mixer on the sequences of one group. */
static moec_status mix_group(moec_forward *f, moec_scratch *s, float *h, const int64_t *seq, int64_t n_seq, moec_err *err)
{
    int64_t hidden = f->m->dims.hidden, n = seq[n_seq] - seq[0];
    float *mine = h + seq[0] * hidden;
    if (f->vec[MOEC_VEC_NORM_ATTN])
        moec__share_norm(f, s->x, mine, f->vec[MOEC_VEC_NORM_ATTN], f->vec[MOEC_VEC_NORM_ATTN_BIAS], n, hidden);
    else
        memcpy(s->x, mine, (size_t)(n * hidden) * sizeof *mine);
    moec_status st = mixers[f->layer->mixer].run(f, s, s->x, s->x, seq, n_seq, err);
    if (st == MOEC_OK)
        add_branch(f, mine, s->x, MOEC_VEC_POST_ATTN, n);
    return st;
}

moec_status moec_forward_chunk(moec_forward *f, int worker, float *h, float *carried, const int64_t *seq, int64_t n_seq,
                               moec_watch_fn *watch, void *ctx, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_scratch *s = &f->scratch[worker];
    int64_t n = seq[n_seq], hidden = f->m->dims.hidden;
    s->carried = carried;
    memset(s->tapped, 0, sizeof s->tapped);
    for (int64_t i = 0; i < n_seq;) {
        int64_t j = i + 1;
        while (j < n_seq && seq[j + 1] - seq[i] <= f->group)
            j++;
        MOEC_TRY(moec_interrupted(err));
        MOEC_TRY(mix_group(f, s, h, seq + i, j - i, err));
        i = j;
    }
    if (s->mix_only)
        goto done;
    MOEC_TRY(moec__feed_forward(f, s, h, n, err));
    if (watch && f->layer->expert)
        MOEC_TRY(show(f, s, worker, h, seq, n_seq, watch, ctx, err));
    if (has_shared(f->layer))
        moec__share_add(f, s->r, s->shared, n, hidden);
    for (int64_t t = 0; f->vec[MOEC_VEC_MOE_BIAS] && t < n; t++)
        moec_add(s->r + t * hidden, f->vec[MOEC_VEC_MOE_BIAS], hidden);
    add_branch(f, h, s->r, MOEC_VEC_POST_MLP, n);
    if (!moec_all_finite(h, n * hidden))
        st = moec_fail(err, MOEC_ENUMERIC, "layer %lld: its output is not finite", (long long)f->layer->index);
done:
    return st;
}
