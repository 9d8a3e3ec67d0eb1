/* The router's real rule and the experts, each on the tokens that selected it. */
#include "base/mem.h"
#include "model/forward_parts.h"
#include "num/vec.h"

#include <string.h>

/* Logits of all tokens under one or two routers, in float32 whatever the compute mode: a flipped selection is a large error. */
static moec_status router_logits(float *const *out, const float *const *router, int n_routers, moec_forward *f,
                                 moec_scratch *s, int64_t n, moec_err *err)
{
    const moec_dims *d = &f->m->dims;
    for (int64_t at = 0; at < n; at += MOEC_BLOCK) {
        int64_t m = n - at < MOEC_BLOCK ? n - at : MOEC_BLOCK;
        moec_panel_pack(s->panel_in, s->x + at * d->hidden, d->hidden, NULL, m, d->hidden);
        for (int i = 0; i < n_routers; i++) {
            moec_status st = moec_gemm(s->panel_out, s->panel_in, m, d->hidden, router[i], MOEC_F32, d->experts,
                                       MOEC_COMPUTE_F32, s->gemm, err);
            if (st != MOEC_OK)
                return st;
            moec_panel_unpack(out[i] + at * d->experts, d->experts, s->panel_out, m, d->experts);
        }
    }
    return MOEC_OK;
}

/* The k largest of v[E], descending, the lowest index first on ties. */
static void top_k(int32_t *ids, const float *v, int64_t n_experts, int64_t k)
{
    int64_t have = 0;
    if (n_experts <= MOEC_ORDER_MOST) {
        int32_t all[MOEC_ORDER_MOST];
        moec_order(all, v, n_experts);
        memcpy(ids, all, (size_t)k * sizeof *ids);
        return;
    }
    for (int64_t e = 0; e < n_experts; e++) {
        if (have == k && !(v[e] > v[ids[k - 1]]))
            continue;
        int64_t i = have < k ? have++ : k - 1;
        for (; i > 0 && v[e] > v[ids[i - 1]]; i--)
            ids[i] = ids[i - 1];
        ids[i] = (int32_t)e;
    }
}

static void select_experts(const moec_forward *f, moec_scratch *s, int64_t n)
{
    const moec_dims *d = &f->m->dims;
    const bool sigmoid = f->m->family->score == MOEC_SCORE_SIGMOID;
    memcpy(s->scores, s->logits, (size_t)(n * d->experts) * sizeof *s->scores);
    for (int64_t t = 0; t < n; t++) {
        float *score = s->scores + t * d->experts, *gate = s->gates + t * d->top_k, sum = 0.0f;
        int32_t *ids = s->ids + t * d->top_k;
        if (sigmoid)
            moec_sigmoid(score, d->experts);
        else
            moec_softmax(score, d->experts);
        top_k(ids, score, d->experts, d->top_k);
        for (int64_t j = 0; j < d->top_k; j++) {
            gate[j] = score[ids[j]];
            sum += gate[j];
        }
        for (int64_t j = 0; d->renorm && j < d->top_k; j++)
            gate[j] /= sum;
    }
}

/* Tokens by expert, in token order: a counting sort over the selections. */
static void group_by_expert(const moec_forward *f, moec_scratch *s, int64_t n)
{
    const moec_dims *d = &f->m->dims;
    memset(s->count, 0, (size_t)d->experts * sizeof *s->count);
    for (int64_t i = 0; i < n * d->top_k; i++)
        s->count[s->ids[i]]++;
    s->first[0] = 0;
    for (int64_t e = 0; e < d->experts; e++)
        s->first[e + 1] = s->first[e] + s->count[e];
    memset(s->count, 0, (size_t)d->experts * sizeof *s->count);
    for (int64_t i = 0; i < n * d->top_k; i++) {
        int32_t e = s->ids[i], at = s->first[e] + s->count[e]++;
        s->token[at] = (int32_t)(i / d->top_k);
        s->slot[at] = (int32_t)i;
        s->weight[at] = s->gates[i];
    }
}

/* Sums of one panel matrix over its tokens: per feature, plain, weighted, absolute, squared, weighted squared. */
static void add_sums(double *sum, double *gsum, double *abs_sum, double *sq, double *gsq, const float *panels,
                     const float *g, int64_t n, int64_t width)
{
    for (int64_t t = 0; t < n; t++) {
        const float *lane = panels + t / MOEC_PANEL * width * MOEC_PANEL + t % MOEC_PANEL;
        double w = (double)g[t];
        for (int64_t i = 0; i < width; i++) {
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
}

static void watch_input(const moec_forward *f, moec_scratch *s, int64_t e, const float *act, const float *g, int64_t n)
{
    const moec_dims *d = &f->m->dims;
    float top = moec_abs_max(act, moec_panels(n) * d->expert_width * MOEC_PANEL); /* unused lanes are 0 */
    if (top > s->in_absmax[e])
        s->in_absmax[e] = top;
    if (!f->o.sums)
        return;
    add_sums(NULL, NULL, s->sums.xin_abs + e * d->hidden, s->sums.xin_sq + e * d->hidden, NULL, s->panel_in, g, n,
             d->hidden);
    add_sums(NULL, NULL, s->sums.act_abs + e * d->expert_width, s->sums.act_sq + e * d->expert_width,
             s->sums.gact_sq + e * d->expert_width, act, g, n, d->expert_width);
}

static void watch_output(const moec_forward *f, moec_scratch *s, int64_t e, const int32_t *slot, const float *g, int64_t n)
{
    const moec_dims *d = &f->m->dims;
    double sum_sq[MOEC_PANEL];
    float top[MOEC_PANEL];
    for (int64_t p = 0; p < moec_panels(n); p++) {
        const float *panel = s->panel_out + p * d->hidden * MOEC_PANEL;
        moec_panel_norms(sum_sq, top, panel, d->hidden);
        for (int64_t i = 0; i < MOEC_PANEL && p * MOEC_PANEL + i < n; i++) {
            s->y_norm[slot[p * MOEC_PANEL + i]] = (float)__builtin_sqrt(sum_sq[i]);
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
        add_sums(s->sums.y_sum + e * d->hidden, s->sums.gy_sum + e * d->hidden, NULL, NULL, NULL, s->panel_out, g, n,
                 d->hidden);
}

/* panel_out = down(silu(gate x) * (up x)) for n <= MOEC_BLOCK tokens in panel_in. */
static moec_status run_mlp(moec_forward *f, moec_scratch *s, const moec_mlp *w, int64_t n, moec_err *err)
{
    moec_status st = MOEC_OK;
    int64_t width = w->gate->dim[0], hidden = f->m->dims.hidden;
    MOEC_TRY(moec_gemm(s->panel_a, s->panel_in, n, hidden, w->gate->data, w->gate->dtype, width, f->o.compute, s->gemm,
                       err));
    MOEC_TRY(moec_gemm(s->panel_b, s->panel_in, n, hidden, w->up->data, w->up->dtype, width, f->o.compute, s->gemm, err));
    moec_silu_mul(s->panel_a, s->panel_b, moec_panels(n) * width * MOEC_PANEL);
    MOEC_TRY(moec_gemm(s->panel_out, s->panel_a, n, width, w->down->data, w->down->dtype, hidden, f->o.compute, s->gemm,
                       err));
done:
    return st;
}

static moec_status run_expert(moec_forward *f, moec_scratch *s, int64_t e, moec_err *err)
{
    const moec_dims *d = &f->m->dims;
    for (int64_t at = s->first[e]; at < s->first[e + 1]; at += MOEC_BLOCK) {
        int64_t n = s->first[e + 1] - at < MOEC_BLOCK ? s->first[e + 1] - at : MOEC_BLOCK;
        moec_panel_pack(s->panel_in, s->x, d->hidden, s->token + at, n, d->hidden);
        moec_status st = run_mlp(f, s, &f->layer->expert[e], n, err);
        if (st != MOEC_OK)
            return moec_within(err, st, "expert %lld", (long long)e);
        if (f->o.watch) {
            watch_input(f, s, e, s->panel_a, s->weight + at, n);
            watch_output(f, s, e, s->slot + at, s->weight + at, n);
        }
        moec_panel_scatter_add(s->r, d->hidden, s->token + at, s->weight + at, s->panel_out, n, d->hidden);
    }
    if (f->o.lean) {
        moec_pages_drop(f->layer->expert[e].gate->data, f->layer->expert[e].gate->bytes);
        moec_pages_drop(f->layer->expert[e].up->data, f->layer->expert[e].up->bytes);
        moec_pages_drop(f->layer->expert[e].down->data, f->layer->expert[e].down->bytes);
    }
    return MOEC_OK;
}

static moec_status run_dense(moec_forward *f, moec_scratch *s, int64_t n, moec_err *err)
{
    int64_t hidden = f->m->dims.hidden;
    for (int64_t at = 0; at < n; at += MOEC_BLOCK) {
        int64_t m = n - at < MOEC_BLOCK ? n - at : MOEC_BLOCK;
        moec_panel_pack(s->panel_in, s->x + at * hidden, hidden, NULL, m, hidden);
        moec_status st = run_mlp(f, s, &f->layer->dense, m, err);
        if (st != MOEC_OK)
            return st;
        moec_panel_unpack(s->r + at * hidden, hidden, s->panel_out, m, hidden);
    }
    return MOEC_OK;
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

moec_status moec__feed_forward(moec_forward *f, moec_scratch *s, const float *h, int64_t n, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_dims *d = &f->m->dims;
    for (int64_t t = 0; t < n; t++)
        moec_rms_norm(s->x + t * d->hidden, h + t * d->hidden, f->norm_mlp, d->hidden, (float)d->norm_eps);
    if (!f->layer->router)
        return run_dense(f, s, n, err);
    bool guess = f->o.watch && f->next_moe; /* what prefetching by the next router would have fetched */
    float *const out[] = {s->logits, s->scores};
    const float *const router[] = {f->router, f->next_router};
    MOEC_TRY(router_logits(out, router, guess ? 2 : 1, f, s, n, err));
    for (int64_t t = 0; guess && t < n; t++)
        top_k(s->next_ids + t * d->top_k, s->scores + t * d->experts, d->experts, d->top_k);
    select_experts(f, s, n);
    group_by_expert(f, s, n);
    memset(s->r, 0, (size_t)(n * d->hidden) * sizeof *s->r);
    if (f->o.watch)
        clear_watch(f, s);
    for (int64_t e = 0; e < d->experts; e++)
        MOEC_TRY(run_expert(f, s, e, err));
done:
    return st;
}
