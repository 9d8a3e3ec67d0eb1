/* A mixture of attention heads (JetMoE, arXiv:2404.07413): the experts are pairs of query and output projections around keys
 * and values that all share.
 *
 *     e_1 .. e_k = the k largest of router x, by descending logit;  g = softmax of these k logits
 *     heads of expert j: softmax(scale q_j . K) V with q_j = In[e_j] x;   out = sum_j g_j Out[e_j] ctx_j + bias
 *
 * Each expert has as many query heads as there are key heads, head i of it using key head i. The order in which a token's
 * experts fill its k slots is of no consequence, each slot attending on its own: queries of slot j meet all keys. In
 * transformers (JetMoeAttention) the k slots lie one behind the other and keys are tiled; this is the same. */
#include "model/forward_parts.h"

#include "num/vec.h"

#include <math.h>
#include <string.h>

/* Where the arrays of one group lie in `work`: ids [n, slots]; list and slot [n], the tokens of one expert. */
typedef struct layout {
    float *logits, *gate, *rows;
    int32_t *ids, *list, *slot;
    size_t floats;
} layout;

static layout lay_out(float *at, const moec_model *m, const moec_layer *l, int64_t g)
{
    const moec_dims *d = &m->dims;
    int64_t slots = d->heads / d->kv_heads, experts = l->mat[MOEC_MAT_HEADS_ROUTER].rows, wide = d->kv_heads * d->head_dim;
    size_t n = (size_t)g, block = g < MOEC_BLOCK ? n : MOEC_BLOCK;
    size_t row = (size_t)(wide > d->hidden ? wide : d->hidden);
    const size_t size[] = {n * (size_t)experts, n * (size_t)slots, block * row, n * (size_t)slots, n, n};
    size_t from[MOEC_COUNT(size) + 1] = {0};
    for (size_t i = 0; i < MOEC_COUNT(size); i++)
        from[i + 1] = from[i] + (size[i] + 15) / 16 * 16;
    layout o = {.floats = from[MOEC_COUNT(size)]};
    if (at) {
        o.logits = at + from[0];
        o.gate = at + from[1];
        o.rows = at + from[2];
        o.ids = (int32_t *)(void *)(at + from[3]);
        o.list = (int32_t *)(void *)(at + from[4]);
        o.slot = (int32_t *)(void *)(at + from[5]);
    }
    return o;
}

size_t moec__work_heads(const moec_model *m, const moec_layer *l, int64_t g, int64_t max_seq)
{
    (void)max_seq;
    return lay_out(NULL, m, l, g).floats;
}

/* The k largest logits of each token and the softmax over them. */
static void choose(const layout *o, int64_t n, int64_t experts, int64_t slots)
{
    for (int64_t t = 0; t < n; t++) {
        const float *z = o->logits + t * experts;
        int32_t *ids = o->ids + t * slots;
        float *gate = o->gate + t * slots;
        int64_t have = 0;
        for (int64_t e = 0; e < experts; e++) {
            if (have == slots && !(z[e] > z[ids[slots - 1]]))
                continue;
            int64_t i = have < slots ? have++ : slots - 1;
            for (; i > 0 && z[e] > z[ids[i - 1]]; i--)
                ids[i] = ids[i - 1];
            ids[i] = (int32_t)e;
        }
        for (int64_t j = 0; j < slots; j++)
            gate[j] = z[ids[j]];
        moec_softmax(gate, slots);
    }
}

/* Tokens of the group that chose expert e, and the places t*slots + j where. */
static int64_t tokens_of(const layout *o, int64_t n, int64_t slots, int64_t e)
{
    int64_t count = 0;
    for (int64_t i = 0; i < n * slots; i++)
        if (o->ids[i] == e) {
            o->list[count] = (int32_t)(i / slots);
            o->slot[count++] = (int32_t)i;
        }
    return count;
}

/* Expert e of a stacked [E, rows, cols] tensor. */
static moec_weight expert_of(const moec_tensor *t, int64_t e)
{
    return (moec_weight){.of = t, .rows = t->dim[1], .cols = t->dim[2], .at = e * t->dim[1] * t->dim[2],
                         .row_step = t->dim[2], .col_step = 1};
}

/* Slot i of q = In[e] x of its token, for the tokens of expert e. */
static moec_status queries(moec_forward *f, moec_scratch *s, const layout *o, const float *x, int64_t e, int64_t count,
                           moec_err *err)
{
    const moec_weight w = expert_of(f->layer->heads_in, e);
    for (int64_t at = 0; at < count; at += MOEC_BLOCK) {
        int64_t m = count - at < MOEC_BLOCK ? count - at : MOEC_BLOCK;
        moec_panel_pack(s->panel_in, x, w.cols, o->list + at, m, w.cols);
        moec_status st = moec__project_view(f, s, o->rows, w.rows, s->panel_in, m, &w, NULL, err);
        if (st != MOEC_OK)
            return st;
        for (int64_t i = 0; i < m; i++)
            memcpy(s->q + o->slot[at + i] * w.rows, o->rows + i * w.rows, (size_t)w.rows * sizeof *s->q);
    }
    return MOEC_OK;
}

/* out += gate * Out[e] ctx for the slots of expert e. */
static moec_status outputs(moec_forward *f, moec_scratch *s, const layout *o, float *out, int64_t e, int64_t count,
                           moec_err *err)
{
    const moec_weight w = expert_of(f->layer->heads_out, e);
    for (int64_t at = 0; at < count; at += MOEC_BLOCK) {
        int64_t m = count - at < MOEC_BLOCK ? count - at : MOEC_BLOCK;
        moec_panel_pack(s->panel_in, s->ctx, w.cols, o->slot + at, m, w.cols);
        moec_status st = moec__project_view(f, s, o->rows, w.rows, s->panel_in, m, &w, NULL, err);
        if (st != MOEC_OK)
            return st;
        for (int64_t i = 0; i < m; i++) {
            float *to = out + o->list[at + i] * w.rows, by = o->gate[o->slot[at + i]];
            for (int64_t j = 0; j < w.rows; j++)
                to[j] += by * o->rows[i * w.rows + j];
        }
    }
    return MOEC_OK;
}

static void run_sequence(moec_forward *f, moec_scratch *s, int64_t at, int64_t length)
{
    const moec_dims *d = &f->m->dims;
    const float *c, *sn;
    int64_t half = d->rope.width / 2, ldq = d->heads * d->head_dim, ldk = d->kv_heads * d->head_dim;
    moec__rope_of(f, s, length, &c, &sn);
    for (int64_t t = 0; f->layer->rotated && t < length; t++) {
        for (int64_t i = 0; i < d->heads; i++)
            moec__rotate(s->q + (at + t) * ldq + i * d->head_dim, c + t * half, sn + t * half, half, f->m->family->rotation);
        for (int64_t i = 0; i < d->kv_heads; i++)
            moec__rotate(s->k + (at + t) * ldk + i * d->head_dim, c + t * half, sn + t * half, half, f->m->family->rotation);
    }
    const moec_heads h = {.q = s->q + at * ldq, .k = s->k + at * ldk, .v = s->v + at * ldk, .out = s->ctx + at * ldq,
                          .ldq = ldq, .ldk = ldk, .ldv = ldk, .ldo = ldq, .length = length, .heads = d->heads,
                          .kv_heads = d->kv_heads, .head_dim = d->head_dim, .value_dim = d->head_dim, .tiled = true};
    moec__attend(f, s, &h);
}

moec_status moec__mix_heads(moec_forward *f, moec_scratch *s, float *out, const float *x, const int64_t *seq, int64_t n_seq,
                            moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_dims *d = &f->m->dims;
    const layout o = lay_out(s->work, f->m, f->layer, f->group);
    const moec_weight *router = &f->layer->mat[MOEC_MAT_HEADS_ROUTER];
    int64_t base = seq[0], n = seq[n_seq] - base, slots = d->heads / d->kv_heads;
    moec_panel_pack(s->panel_in, x, d->hidden, NULL, n, d->hidden);
    MOEC_TRY(moec__project(f, s, s->k, n, MOEC_MAT_K, err));
    MOEC_TRY(moec__project(f, s, s->v, n, MOEC_MAT_V, err));
    /* In float32 whatever the compute mode, as every router: a flipped selection is a large error. */
    for (int64_t at = 0; at < n; at += MOEC_BLOCK) {
        int64_t m = n - at < MOEC_BLOCK ? n - at : MOEC_BLOCK;
        MOEC_TRY(moec_gemm_weight(s->panel_out, s->panel_in + at * d->hidden, m, router, MOEC_COMPUTE_F32, s->gemm, err));
        moec_panel_unpack(o.logits + at * router->rows, router->rows, s->panel_out, m, router->rows);
    }
    for (int64_t e = 0; f->layer->heads_removed && e < router->rows; e++)
        for (int64_t t = 0; f->layer->heads_removed[e] && t < n; t++)
            o.logits[t * router->rows + e] = -INFINITY;
    choose(&o, n, router->rows, slots);
    for (int64_t e = 0; e < router->rows; e++)
        MOEC_TRY(moec_within(err, queries(f, s, &o, x, e, tokens_of(&o, n, slots, e), err), "attention expert %lld",
                             (long long)e));
    for (int64_t i = 0; i < n_seq; i++)
        run_sequence(f, s, seq[i] - base, seq[i + 1] - seq[i]);
    for (int64_t t = 0; t < n; t++)
        if (f->vec[MOEC_VEC_HEADS_BIAS])
            memcpy(out + t * d->hidden, f->vec[MOEC_VEC_HEADS_BIAS], (size_t)d->hidden * sizeof *out);
        else
            memset(out + t * d->hidden, 0, (size_t)d->hidden * sizeof *out);
    for (int64_t e = 0; e < router->rows; e++)
        MOEC_TRY(moec_within(err, outputs(f, s, &o, out, e, tokens_of(&o, n, slots, e), err), "attention expert %lld",
                             (long long)e));
done:
    return st;
}
