/* Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values of all heads come from one short vector a token.
 *
 *     q = Wq x, or Wq_b norm(Wq_a x)                      per head [nope | rope]
 *     [c | r] = Wkv_a x;  [k | v] = Wkv_b norm(c)         per head [nope | dv]; r is one rotated key part for all heads
 *
 * Keys and values are built, not absorbed into queries and outputs. Absorbing costs a token and head what building does, with
 * the same matrices: kv_rank * (nope + dv). But then each pair of tokens costs kv_rank + rope and kv_rank multiply-adds (576
 * and 512 in DeepSeek-V3) in place of nope + rope and dv (192 and 128). With all tokens as queries that is slower at any
 * length; it is for decoding, where one query meets keys of which only the latents are kept. Measured with OpenBLAS, CPU time
 * of absorbed over built at 512, 1024, 2048, 4096 tokens: 2.1, 2.6, 2.8, 2.9 (tests/bench/latent_forms.py).
 *
 * 128 heads of 2048 tokens would be 200 MB of q and as much of k and v, so that only a block of heads exists at a time: q, k
 * and v of it take BLOCK_BYTES. What remains is ctx, heads * dv floats a token: 134 MB for DeepSeek-V3 at 2048 tokens, and
 * q_a and kv_a, 17 MB, which are also held as panels. */
#include "model/forward_parts.h"

#include "num/vec.h"

#include <string.h>

enum { BLOCK_BYTES = 24 << 20 };

/* Heads whose q, k and v exist together. */
static int64_t block_heads(const moec_dims *d, int64_t g)
{
    int64_t each = g * (2 * d->head_dim + d->nope_dim + d->value_dim) * (int64_t)sizeof(float);
    int64_t n = each > 0 ? BLOCK_BYTES / each : 1;
    return n < 1 ? 1 : n < d->heads ? n : d->heads;
}

/* Where the arrays of one group lie in `work`. */
typedef struct layout {
    float *q_a, *kv_a, *q, *kv, *k;
    size_t floats;
} layout;

static layout lay_out(float *at, const moec_model *m, int64_t g)
{
    const moec_dims *d = &m->dims;
    int64_t block = block_heads(d, g);
    size_t n = (size_t)g;
    const size_t size[] = {n * (size_t)d->q_rank, n * (size_t)(d->kv_rank + d->rope.width),
                           n * (size_t)(block * d->head_dim), n * (size_t)(block * (d->nope_dim + d->value_dim)),
                           n * (size_t)(block * d->head_dim)};
    size_t from[MOEC_COUNT(size) + 1] = {0};
    for (size_t i = 0; i < MOEC_COUNT(size); i++)
        from[i + 1] = from[i] + (size[i] + 15) / 16 * 16;
    layout o = {.floats = from[MOEC_COUNT(size)]};
    if (at) {
        o.q_a = at + from[0];
        o.kv_a = at + from[1];
        o.q = at + from[2];
        o.kv = at + from[3];
        o.k = at + from[4];
    }
    return o;
}

size_t moec__work_latent(const moec_model *m, const moec_layer *l, int64_t g, int64_t max_seq)
{
    (void)l;
    (void)max_seq;
    return lay_out(NULL, m, g).floats;
}

/* Rows of heads [from, from + n) of a matrix whose rows are heads of `width`. */
static moec_weight head_rows(const moec_weight *w, int64_t from, int64_t n, int64_t width)
{
    moec_weight part = *w;
    part.at += from * width * w->row_step;
    part.rows = n * width;
    return part;
}

/* The latents of the group: q_a and c normed, the shared key part rotated. Leaves the panels of q's input (x or q_a) at the
 * start of panel_in and those of c at *kv. */
static moec_status make_latents(moec_forward *f, moec_scratch *s, const layout *o, const float **kv, const float *x,
                                const int64_t *seq, int64_t n_seq, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_dims *d = &f->m->dims;
    int64_t n = seq[n_seq] - seq[0], ld = d->kv_rank + d->rope.width, half = d->rope.width / 2;
    float *second = s->panel_in + moec_panels(n) * MOEC_PANEL * (d->q_rank > d->hidden ? d->q_rank : d->hidden);
    moec__share_pack(f, s->panel_in, x, d->hidden, NULL, n, d->hidden);
    MOEC_TRY(moec__project(f, s, o->kv_a, n, MOEC_MAT_KV_A, err));
    for (int64_t i = 0; i < n_seq; i++) {
        const float *c, *sn;
        moec__rope_of(f, s, seq[i + 1] - seq[i], &c, &sn);
        for (int64_t t = 0; t < seq[i + 1] - seq[i]; t++) {
            float *row = o->kv_a + (seq[i] - seq[0] + t) * ld;
            moec_rms_norm(row, row, f->vec[MOEC_VEC_KV_A_NORM], d->kv_rank, (float)d->latent_eps);
            if (f->layer->rotated)
                moec__rotate(row + d->kv_rank, c + t * half, sn + t * half, half, f->m->family->rotation);
        }
    }
    moec__share_pack(f, second, o->kv_a, ld, NULL, n, d->kv_rank);
    *kv = second;
    if (d->q_rank == 0)
        goto done;
    MOEC_TRY(moec__project(f, s, o->q_a, n, MOEC_MAT_Q_A, err));
    for (int64_t t = 0; t < n; t++)
        moec_rms_norm(o->q_a + t * d->q_rank, o->q_a + t * d->q_rank, f->vec[MOEC_VEC_Q_A_NORM], d->q_rank,
                      (float)d->latent_eps);
    moec__share_pack(f, s->panel_in, o->q_a, d->q_rank, NULL, n, d->q_rank);
done:
    return st;
}

/* One sequence under a block of heads, whose q and kv are there. */
typedef struct sequence {
    const moec_forward *f;
    const layout *o;
    const float *cos, *sin;
    int64_t at, heads, ldq, ldv;
} sequence;

/* Rotated queries in place, and keys from their two parts, for tokens [lo, hi). */
static moec_status finish_tokens(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const sequence *r = ctx;
    const moec_dims *d = &r->f->m->dims;
    const layout *o = r->o;
    int64_t half = d->rope.width / 2, lds = d->kv_rank + d->rope.width;
    (void)worker;
    (void)err;
    for (int64_t t = lo; t < hi; t++) {
        const float *kv = o->kv + (r->at + t) * r->ldv, *shared = o->kv_a + (r->at + t) * lds + d->kv_rank;
        float *q = o->q + (r->at + t) * r->ldq + d->nope_dim, *k = o->k + t * r->ldq;
        for (int64_t h = 0; h < r->heads; h++, q += d->head_dim, k += d->head_dim) {
            if (r->f->layer->rotated)
                moec__rotate(q, r->cos + t * half, r->sin + t * half, half, r->f->m->family->rotation);
            memcpy(k, kv + h * (d->nope_dim + d->value_dim), (size_t)d->nope_dim * sizeof *k);
            memcpy(k + d->nope_dim, shared, (size_t)d->rope.width * sizeof *k);
        }
    }
    return MOEC_OK;
}

static void run_sequence(moec_forward *f, moec_scratch *s, const layout *o, int64_t at, int64_t length, int64_t first,
                         int64_t heads)
{
    const moec_dims *d = &f->m->dims;
    sequence r = {.f = f, .o = o, .at = at, .heads = heads, .ldq = heads * d->head_dim,
                  .ldv = heads * (d->nope_dim + d->value_dim)};
    const float *kv = o->kv + at * r.ldv, *sinks = f->vec[MOEC_VEC_SINKS];
    moec__rope_of(f, s, length, &r.cos, &r.sin);
    moec__share(f, length, r.ldq + r.ldv, finish_tokens, &r);
    const moec_heads all = {.q = o->q + at * r.ldq, .k = o->k, .v = kv + d->nope_dim,
                            .out = s->ctx + (at * d->heads + first) * d->value_dim, .ldq = r.ldq, .ldk = r.ldq,
                            .ldv = r.ldv, .ldo = d->heads * d->value_dim, .length = length, .heads = heads,
                            .kv_heads = heads, .head_dim = d->head_dim, .value_dim = d->value_dim,
                            .v_step = d->nope_dim + d->value_dim, .sinks = sinks ? sinks + first : NULL};
    moec__attend(f, s, &all);
}

moec_status moec__mix_latent(moec_forward *f, moec_scratch *s, float *out, const float *x, const int64_t *seq, int64_t n_seq,
                             moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_dims *d = &f->m->dims;
    const layout o = lay_out(s->work, f->m, f->group);
    moec_mat which = d->q_rank > 0 ? MOEC_MAT_Q_B : MOEC_MAT_Q;
    const moec_weight *wq = &f->layer->mat[which], *wkv = &f->layer->mat[MOEC_MAT_KV_B];
    int64_t n = seq[n_seq] - seq[0], built = d->nope_dim + d->value_dim, block = block_heads(d, f->group);
    const float *kv = NULL, *q_bias = f->bias[which], *kv_bias = f->bias[MOEC_MAT_KV_B];
    MOEC_TRY(make_latents(f, s, &o, &kv, x, seq, n_seq, err));
    for (int64_t first = 0; first < d->heads; first += block) {
        int64_t heads = d->heads - first < block ? d->heads - first : block;
        moec_weight q_rows = head_rows(wq, first, heads, d->head_dim), kv_rows = head_rows(wkv, first, heads, built);
        MOEC_TRY(moec__project_view(f, s, o.q, q_rows.rows, s->panel_in, n, &q_rows,
                                    q_bias ? q_bias + first * d->head_dim : NULL, err));
        MOEC_TRY(moec__project_view(f, s, o.kv, kv_rows.rows, kv, n, &kv_rows, kv_bias ? kv_bias + first * built : NULL,
                                    err));
        for (int64_t i = 0; i < n_seq; i++)
            run_sequence(f, s, &o, seq[i] - seq[0], seq[i + 1] - seq[i], first, heads);
    }
    st = moec__project_rows(f, s, out, s->ctx, n, MOEC_MAT_O, err);
done:
    return st;
}
