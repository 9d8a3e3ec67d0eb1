/* The feed-forward half of a layer: the experts, each on the tokens that selected it, the shared ones, or a dense network. */
#include "base/log.h"
#include "base/mem.h"
#include "model/forward_parts.h"
#include "num/vec.h"

#include <string.h>

/* Tokens by expert, in token order: a counting sort over the selections; empty slots are passed over. */
static void group_by_expert(const moec_forward *f, moec_scratch *s, int64_t n)
{
    const int64_t experts = f->m->dims.experts, slots = f->m->dims.slots;
    memset(s->count, 0, (size_t)experts * sizeof *s->count);
    for (int64_t i = 0; i < n * slots; i++)
        if (s->ids[i] >= 0)
            s->count[s->ids[i]]++;
    s->first[0] = 0;
    for (int64_t e = 0; e < experts; e++)
        s->first[e + 1] = s->first[e] + s->count[e];
    memset(s->count, 0, (size_t)experts * sizeof *s->count);
    for (int64_t t = 0; t < n; t++)
        for (int64_t i = t * slots; i < (t + 1) * slots && s->ids[i] >= 0; i++) { /* empty ones are the last */
            int32_t e = s->ids[i], at = s->first[e] + s->count[e]++;
            s->token[at] = (int32_t)t;
            s->slot[at] = (int32_t)i;
            s->weight[at] = s->gates[i];
        }
}

/* Sums of one panel matrix over its tokens: per feature, plain, weighted, absolute, squared, weighted squared. */
typedef struct sums {
    double *sum, *gsum, *abs_sum, *sq, *gsq; /* [width] or NULL */
    const float *panels, *g;
    int64_t n, width;
} sums;

/* Features [lo, hi), whose tokens are added in order. */
static moec_status add_features(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const sums *a = ctx;
    double *sum = a->sum, *gsum = a->gsum, *abs_sum = a->abs_sum, *sq = a->sq, *gsq = a->gsq;
    (void)worker;
    (void)err;
    for (int64_t t = 0; t < a->n; t++) {
        const float *lane = a->panels + t / MOEC_PANEL * a->width * MOEC_PANEL + t % MOEC_PANEL;
        double w = (double)a->g[t];
        for (int64_t i = lo; i < hi; i++) {
            double v = (double)lane[i * MOEC_PANEL];
            if (sum)
                sum[i] += v;
            if (gsum)
                gsum[i] += w * v;
            if (abs_sum)
                abs_sum[i] += v < 0 ? -v : v;
            if (sq)
                sq[i] += v * v;
            if (gsq)
                gsq[i] += w * w * v * v;
        }
    }
    return MOEC_OK;
}

static void add_sums(const moec_forward *f, sums a)
{
    moec__share(f, a.width, 8 * a.n, add_features, &a);
}

/* What multiplies one block of an expert's tokens. */
typedef struct block {
    const int32_t *token, *slot;
    const float *g;    /* [n] weights as applied */
    const float *ones; /* [n] */
    int64_t e, n;
} block;

/* With the weight on the input, x and the activations carry it already: a and g a are one. */
static void watch_input(const moec_forward *f, moec_scratch *s, const block *b)
{
    const moec_dims *d = &f->m->dims;
    const float *act = s->panel_a, *g = f->m->family->weight_on_input ? b->ones : b->g;
    float top = moec_abs_max(act, moec_panels(b->n) * d->expert_width * MOEC_PANEL); /* unused lanes are 0 */
    if (top > s->in_absmax[b->e])
        s->in_absmax[b->e] = top;
    if (!f->o.sums)
        return;
    add_sums(f, (sums){NULL, NULL, s->sums.xin_abs + b->e * d->hidden, s->sums.xin_sq + b->e * d->hidden, NULL, s->panel_in, g,
                       b->n, d->hidden});
    add_sums(f, (sums){NULL, NULL, s->sums.act_abs + b->e * d->expert_width, s->sums.act_sq + b->e * d->expert_width,
                       s->sums.gact_sq + b->e * d->expert_width, act, g, b->n, d->expert_width});
}

/* What the expert's output is worth without its weight: 1, or 1 / g where g went in with the input. */
static float without_weight(const moec_forward *f, float g)
{
    return !f->m->family->weight_on_input ? 1.0f : g != 0.0f ? 1.0f / g : 0.0f;
}

static void sum_output(const moec_forward *f, moec_scratch *s, const block *b)
{
    const int64_t width = f->m->dims.hidden;
    double *y = s->sums.y_sum + b->e * width, *gy = s->sums.gy_sum + b->e * width;
    float inverse[MOEC_BLOCK];
    if (!f->m->family->weight_on_input) {
        add_sums(f, (sums){y, gy, NULL, NULL, NULL, s->panel_out, b->g, b->n, width});
        return;
    }
    for (int64_t i = 0; i < b->n; i++)
        inverse[i] = without_weight(f, b->g[i]);
    add_sums(f, (sums){gy, y, NULL, NULL, NULL, s->panel_out, inverse, b->n, width});
}

typedef struct norms {
    const float *panels;
    int64_t width;
    double sum_sq[MOEC_BLOCK];
    float top[MOEC_BLOCK];
} norms;

static moec_status take_norms(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    norms *a = ctx;
    (void)worker;
    (void)err;
    for (int64_t p = lo; p < hi; p++)
        moec_panel_norms(a->sum_sq + p * MOEC_PANEL, a->top + p * MOEC_PANEL, a->panels + p * a->width * MOEC_PANEL, a->width);
    return MOEC_OK;
}

static void watch_output(const moec_forward *f, moec_scratch *s, const block *b)
{
    const moec_dims *d = &f->m->dims;
    const int64_t e = b->e;
    norms all = {.panels = s->panel_out, .width = d->hidden};
    moec__share(f, moec_panels(b->n), d->hidden * MOEC_PANEL, take_norms, &all);
    for (int64_t p = 0; p < moec_panels(b->n); p++) {
        const float *panel = s->panel_out + p * d->hidden * MOEC_PANEL, *top = all.top + p * MOEC_PANEL;
        const double *sum_sq = all.sum_sq + p * MOEC_PANEL;
        for (int64_t i = 0; i < MOEC_PANEL && p * MOEC_PANEL + i < b->n; i++) {
            int64_t t = p * MOEC_PANEL + i;
            s->y_norm[b->slot[t]] = (float)__builtin_sqrt(sum_sq[i]) * without_weight(f, b->g[t]);
            if (!(top[i] >= s->out_absmax[e]) || top[i] == 0.0f)
                continue;
            int64_t c = 0;
            while (c < d->hidden - 1 && panel[c * MOEC_PANEL + i] != top[i] && panel[c * MOEC_PANEL + i] != -top[i])
                c++;
            if (top[i] > s->out_absmax[e] || (int32_t)c < s->out_channel[e])
                s->out_channel[e] = (int32_t)c;
            s->out_absmax[e] = top[i];
        }
    }
    if (f->o.sums)
        sum_output(f, s, b);
}

/* The matrices of an expert, a shared expert or a dense layer, and their biases, NULL where there is none. */
typedef struct mlp {
    const moec_weight *gate, *up, *down;
    const float *gate_bias, *up_bias, *down_bias;
} mlp;

/* Adds a bias to the lanes in use: the others must stay 0. */
static void add_bias(float *panels, const float *bias, int64_t n, int64_t width)
{
    for (int64_t p = 0; bias && p < moec_panels(n); p++) {
        int64_t lanes = n - p * MOEC_PANEL < MOEC_PANEL ? n - p * MOEC_PANEL : MOEC_PANEL;
        float *at = panels + p * width * MOEC_PANEL;
        for (int64_t i = 0; i < width; i++, at += MOEC_PANEL)
            for (int64_t lane = 0; lane < lanes; lane++)
                at[lane] += bias[i];
    }
}

/* Token i times scale[i]. */
static void scale_tokens(float *panels, const float *scale, int64_t n, int64_t width)
{
    for (int64_t p = 0; p < moec_panels(n); p++) {
        int64_t lanes = n - p * MOEC_PANEL < MOEC_PANEL ? n - p * MOEC_PANEL : MOEC_PANEL;
        float *at = panels + p * width * MOEC_PANEL;
        for (int64_t i = 0; i < width; i++, at += MOEC_PANEL)
            for (int64_t lane = 0; lane < lanes; lane++)
                at[lane] *= scale[p * MOEC_PANEL + lane];
    }
}

void moec_activate(float *gate, const float *up, int64_t n, const moec_model *m)
{
    if (m->family->activation == MOEC_ACT_SWIGLU_CLAMPED)
        moec_swiglu_clamped(gate, up, n, (float)m->dims.act_limit, (float)m->dims.act_alpha);
    else
        moec_silu_mul(gate, up, n);
}

typedef struct glu {
    const moec_forward *f;
    float *gate, *up;
    int64_t width;
} glu;

/* Panels [lo, hi): gate = act(gate) up. */
static moec_status activate(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const glu *a = ctx;
    const int64_t from = lo * a->width * MOEC_PANEL;
    (void)worker;
    (void)err;
    moec_activate(a->gate + from, a->up + from, (hi - lo) * a->width * MOEC_PANEL, a->f->m);
    return MOEC_OK;
}

/* panel_out = down(act(gate x, up x)) for n <= MOEC_BLOCK tokens in panel_in. */
static moec_status run_mlp(moec_forward *f, moec_scratch *s, const mlp *w, int64_t n, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_dims *d = &f->m->dims;
    const int64_t width = w->gate->rows;
    const bool shown = w->gate >= f->layer->mat && w->gate < f->layer->mat + MOEC_MAT_COUNT;
    glu both = {f, s->panel_a, s->panel_b, width};
    if (shown)
        MOEC_TRY(moec__tap(f, s, w->gate, s->panel_in, n, err));
    MOEC_TRY(moec_gemm_weight(s->panel_a, s->panel_in, n, w->gate, f->o.compute, s->gemm, err));
    add_bias(s->panel_a, w->gate_bias, n, width);
    MOEC_TRY(moec_gemm_weight(s->panel_b, s->panel_in, n, w->up, f->o.compute, s->gemm, err));
    add_bias(s->panel_b, w->up_bias, n, width);
    moec__share(f, moec_panels(n), width * MOEC_PANEL, activate, &both);
    if (shown)
        MOEC_TRY(moec__tap(f, s, w->down, s->panel_a, n, err));
    MOEC_TRY(moec_gemm_weight(s->panel_out, s->panel_a, n, w->down, f->o.compute, s->gemm, err));
    add_bias(s->panel_out, w->down_bias, n, d->hidden);
done:
    return st;
}

static mlp mlp_of_expert(const moec_forward *f, int64_t e)
{
    const moec_mlp *w = &f->layer->expert[e];
    const moec_dims *d = &f->m->dims;
    mlp m = {&w->gate, &w->up, &w->down, NULL, NULL, NULL};
    m.gate_bias = f->expert_gate_bias ? f->expert_gate_bias + e * d->expert_width : NULL;
    m.up_bias = f->expert_up_bias ? f->expert_up_bias + e * d->expert_width : NULL;
    m.down_bias = f->expert_down_bias ? f->expert_down_bias + e * d->hidden : NULL;
    return m;
}

static moec_status run_expert(moec_forward *f, moec_scratch *s, int64_t e, moec_err *err)
{
    const moec_dims *d = &f->m->dims;
    const bool on_input = f->m->family->weight_on_input;
    const mlp w = mlp_of_expert(f, e);
    moec_status st = f->o.lean ? moec__expert_check(f, e, err) : MOEC_OK;
    if (st != MOEC_OK)
        return st;
    float ones[MOEC_BLOCK];
    for (int i = 0; i < MOEC_BLOCK; i++)
        ones[i] = 1.0f;
    for (int64_t at = s->first[e]; at < s->first[e + 1]; at += MOEC_BLOCK) {
        int64_t n = s->first[e + 1] - at < MOEC_BLOCK ? s->first[e + 1] - at : MOEC_BLOCK;
        const block b = {s->token + at, s->slot + at, s->weight + at, ones, e, n};
        moec__share_pack(f, s->panel_in, s->x, d->hidden, b.token, n, d->hidden);
        for (int64_t i = 0; d->input_scale != 1.0 && i < moec_panels(n) * d->hidden * MOEC_PANEL; i++)
            s->panel_in[i] *= (float)d->input_scale;
        if (on_input)
            scale_tokens(s->panel_in, b.g, n, d->hidden);
        st = run_mlp(f, s, &w, n, err);
        if (st != MOEC_OK)
            return moec_within(err, st, "expert %lld", (long long)e);
        if (f->o.watch) {
            watch_input(f, s, &b);
            watch_output(f, s, &b);
        }
        moec__share_scatter(f, s->r, d->hidden, b.token, on_input ? ones : b.g, s->panel_out, n, d->hidden);
    }
    if (f->o.lean) {
        moec_weight_drop(w.gate);
        moec_weight_drop(w.up);
        moec_weight_drop(w.down);
    }
    return MOEC_OK;
}

static mlp mlp_of_layer(const moec_forward *f, moec_mat gate, moec_mat up, moec_mat down)
{
    const moec_weight *w = f->layer->mat;
    return (mlp){&w[gate], &w[up], &w[down], f->bias[gate], f->bias[up], f->bias[down]};
}

/* out [n,H] = the network of all tokens, times sigmoid(mix x) where there is a mix [1,H]. */
static moec_status run_all(moec_forward *f, moec_scratch *s, float *out, const mlp *w, const moec_weight *mix, int64_t n,
                           moec_err *err)
{
    moec_status st = MOEC_OK;
    int64_t hidden = f->m->dims.hidden;
    for (int64_t at = 0; at < n; at += MOEC_BLOCK) {
        int64_t m = n - at < MOEC_BLOCK ? n - at : MOEC_BLOCK;
        moec__share_pack(f, s->panel_in, s->x + at * hidden, hidden, NULL, m, hidden);
        MOEC_TRY(run_mlp(f, s, w, m, err));
        if (mix->of) { /* panels of one feature are one number a token, side by side */
            MOEC_TRY(moec_gemm_weight(s->panel_a, s->panel_in, m, mix, MOEC_COMPUTE_F32, s->gemm, err));
            moec_sigmoid(s->panel_a, m);
            scale_tokens(s->panel_out, s->panel_a, m, hidden);
        }
        moec__share_unpack(f, out + at * hidden, hidden, s->panel_out, m, hidden);
    }
done:
    return st;
}

/* With lean memory nothing else brings the next expert's pages in before they are wanted. */
static void prefetch_after(const moec_forward *f, const moec_scratch *s, int64_t e)
{
    for (e++; e < f->m->dims.experts; e++)
        if (s->first[e + 1] > s->first[e] || !__atomic_load_n(&f->expert_ok[e], __ATOMIC_RELAXED)) {
            const mlp w = mlp_of_expert(f, e);
            moec_weight_prefetch(w.gate);
            moec_weight_prefetch(w.up);
            moec_weight_prefetch(w.down);
            return;
        }
}

static void clear_watch(const moec_forward *f, moec_scratch *s)
{
    const moec_dims *d = &f->m->dims;
    size_t e = (size_t)d->experts, eh = e * (size_t)d->hidden * sizeof(double), ei = e * (size_t)d->expert_width * sizeof(double);
    memset(s->out_absmax, 0, e * sizeof *s->out_absmax);
    memset(s->in_absmax, 0, e * sizeof *s->in_absmax);
    memset(s->out_channel, 0, e * sizeof *s->out_channel);
    if (!f->o.sums)
        return;
    double *const by_hidden[] = {s->sums.y_sum, s->sums.gy_sum, s->sums.xin_abs, s->sums.xin_sq};
    double *const by_width[] = {s->sums.act_abs, s->sums.act_sq, s->sums.gact_sq};
    for (size_t i = 0; i < MOEC_COUNT(by_hidden); i++)
        memset(by_hidden[i], 0, eh);
    for (size_t i = 0; i < MOEC_COUNT(by_width); i++)
        memset(by_width[i], 0, ei);
}

/* r += g y of one token's expert without a network, y = a x + b v; v NULL: a copy. */
static void add_null(float *r, const float *x, const float *v, const float *mix, float g, float scale, int64_t hidden)
{
    float share[2] = {1.0f, 0.0f};
    double z[2] = {0.0, 0.0};
    if (v) {
        for (int64_t j = 0; j < hidden; j++) {
            z[0] += (double)mix[j] * (double)(scale * x[j]);
            z[1] += (double)mix[hidden + j] * (double)(scale * x[j]);
        }
        share[0] = (float)z[0];
        share[1] = (float)z[1];
        moec_softmax(share, 2);
    }
    for (int64_t j = 0; j < hidden; j++)
        r[j] += g * (share[0] * (scale * x[j]) + (v ? share[1] * v[j] : 0.0f));
}

typedef struct nulls {
    const moec_forward *f;
    moec_scratch *s;
} nulls;

/* Tokens [lo, hi). */
static moec_status add_nulls(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const nulls *a = ctx;
    const moec_forward *f = a->f;
    const moec_family *family = f->m->family;
    const int64_t hidden = f->m->dims.hidden, n = f->m->dims.null_experts;
    (void)worker;
    (void)err;
    for (int64_t t = lo; t < hi; t++)
        for (int64_t i = 0; i < family->n_tail; i++) {
            const float g = a->s->null_gates[t * n + i];
            const bool constant = family->tail[i] == MOEC_NULL_CONSTANT;
            if (g <= 0.0f || family->tail[i] == MOEC_NULL_ZERO)
                continue;
            add_null(a->s->r + t * hidden, a->s->x + t * hidden, constant ? f->constant + i * hidden : NULL,
                     constant ? f->constant_mix + 2 * i * hidden : NULL, g, (float)f->m->dims.input_scale, hidden);
        }
    return MOEC_OK;
}

/* Logits of this layer's router, and of the next one's where they are watched, with what is carried from the layer before;
 * this layer's are what the next one gets, 0 for removed experts. */
static moec_status all_logits(moec_forward *f, moec_scratch *s, bool guess, int64_t n, moec_err *err)
{
    moec_status st = MOEC_OK;
    float *const out[] = {s->logits, s->scores};
    const moec_router *const router[] = {&f->router, &f->next_router};
    const bool *removed = f->router.removed;
    const int64_t all = f->m->dims.carried;
    MOEC_TRY(moec__router_logits(out, router, guess ? 2 : 1, f, s, n, err));
    if (all == 0)
        goto done;
    if (f->layer->moe_index > 0)
        MOEC_TRY(moec__router_add_carried(s->logits, &f->router, s->carried, f, s, n, err));
    memcpy(s->carried, s->logits, (size_t)(n * all) * sizeof *s->carried);
    for (int64_t e = 0; removed && e < f->m->dims.experts; e++)
        for (int64_t t = 0; removed[e] && t < n; t++)
            s->carried[t * all + e] = 0.0f;
    if (guess)
        MOEC_TRY(moec__router_add_carried(s->scores, &f->next_router, s->carried, f, s, n, err));
done:
    return st;
}

static moec_status run_routed(moec_forward *f, moec_scratch *s, int64_t n, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_dims *d = &f->m->dims;
    bool guess = f->o.watch && f->next_router.layer; /* what prefetching by the next router would have fetched */
    MOEC_TRY(all_logits(f, s, guess, n, err));
    if (guess)
        moec__route(s->scores, s->next_ids, NULL, NULL, s->scores, &f->next_router, f->m, n);
    moec__route(s->scores, s->ids, s->gates, s->null_gates, s->logits, &f->router, f->m, n);
    group_by_expert(f, s, n);
    memset(s->r, 0, (size_t)(n * d->hidden) * sizeof *s->r);
    if (f->o.watch) {
        clear_watch(f, s);
        if (d->slots > d->top_k || d->null_experts > 0) /* what no expert fills must not be of an earlier chunk */
            memset(s->y_norm, 0, (size_t)(n * d->slots) * sizeof *s->y_norm);
    }
    for (int64_t e = 0; e < d->experts; e++) {
        MOEC_TRY(moec_interrupted(err));
        if (f->o.lean)
            prefetch_after(f, s, e);
        MOEC_TRY(run_expert(f, s, e, err));
    }
    nulls rest = {f, s};
    if (f->m->family->n_tail > 0)
        moec__share(f, n, d->hidden, add_nulls, &rest);
done:
    return st;
}

moec_status moec__feed_forward(moec_forward *f, moec_scratch *s, const float *h, int64_t n, moec_err *err)
{
    const int64_t hidden = f->m->dims.hidden;
    if (f->vec[MOEC_VEC_NORM_MLP])
        moec__share_norm(f, s->x, h, f->vec[MOEC_VEC_NORM_MLP], f->vec[MOEC_VEC_NORM_MLP_BIAS], n, hidden);
    else
        memcpy(s->x, h, (size_t)(n * hidden) * sizeof *s->x);
    if (!f->layer->expert) {
        const mlp dense = mlp_of_layer(f, MOEC_MAT_DENSE_GATE, MOEC_MAT_DENSE_UP, MOEC_MAT_DENSE_DOWN);
        const moec_weight none = {.of = NULL};
        return run_all(f, s, s->r, &dense, &none, n, err);
    }
    moec_status st = run_routed(f, s, n, err);
    if (st == MOEC_OK && f->layer->mat[MOEC_MAT_SHARED_GATE].of) {
        const mlp shared = mlp_of_layer(f, MOEC_MAT_SHARED_GATE, MOEC_MAT_SHARED_UP, MOEC_MAT_SHARED_DOWN);
        st = run_all(f, s, s->shared, &shared, &f->layer->mat[MOEC_MAT_SHARED_MIX], n, err);
        st = moec_within(err, st, "shared expert");
    }
    return st;
}
