/* Grouped-query attention with rotary embedding, optional biases, q/k norms and a sliding window. Projections run on groups
 * of sequences; scores on blocks of queries, so that memory does not grow with the square of the length. */
#include "model/forward_parts.h"

#include "num/linalg.h"
#include "num/vec.h"

#include <math.h>
#include <string.h>

void moec__rope_fill(float *cos_out, float *sin_out, double *inv_freq, const moec_rope *rope, int64_t length)
{
    double scale;
    int64_t half = rope->width / 2;
    moec_rope_table(inv_freq, &scale, rope, length);
    for (int64_t t = 0; t < length; t++)
        for (int64_t i = 0; i < half; i++) {
            /* Rounded to float32 where transformers does, so that long positions agree. */
            double angle = (double)((float)t * (float)inv_freq[i]);
            cos_out[t * half + i] = (float)cos(angle) * (float)scale;
            sin_out[t * half + i] = (float)sin(angle) * (float)scale;
        }
}

/* Pairs (i, i + width/2) are rotated; entries from width on pass through. */
static void rotate(float *x, const float *c, const float *s, int64_t half)
{
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * c[i] - b * s[i];
        x[i + half] = b * c[i] + a * s[i];
    }
}

typedef struct heads {
    float *x;
    int64_t n_heads;
    const float *bias, *norm;
    bool rotated;
} heads;

/* Bias, norm and rotation of one token's heads. */
static void finish_token(const heads *h, float *x, const moec_dims *d, const float *c, const float *s)
{
    if (h->bias)
        moec_add(x, h->bias, h->n_heads * d->head_dim);
    for (int64_t i = 0; i < h->n_heads; i++) {
        float *head = x + i * d->head_dim;
        if (h->norm)
            moec_rms_norm(head, head, h->norm, d->head_dim, (float)d->norm_eps);
        if (h->rotated)
            rotate(head, c, s, d->rope.width / 2);
    }
}

/* Scores to weights, row by row. Later keys count as -infinity up to a whole vector, which spares the loops their rests. */
static void softmax_block(float *s, int64_t ld, int64_t q0, int64_t nq, int64_t k_lo, int64_t window)
{
    for (int64_t i = 0; i < nq; i++) {
        int64_t t = q0 + i, end = t + 1 - k_lo; /* keys up to and with t */
        int64_t begin = window > 0 && t - window + 1 > k_lo ? t - window + 1 - k_lo : 0;
        int64_t full = begin + (end - begin + 15) / 16 * 16;
        float *row = s + i * ld;
        if (begin > 0)
            memset(row, 0, (size_t)begin * sizeof *row);
        for (full = full < ld ? full : ld; end < full; end++)
            row[end] = -INFINITY;
        moec_softmax(row + begin, end - begin);
        if (end < ld)
            memset(row + end, 0, (size_t)(ld - end) * sizeof *row);
    }
}

static void attend(const moec_forward *f, moec_scratch *s, int64_t at, int64_t length)
{
    const moec_dims *d = &f->m->dims;
    int64_t ldq = d->heads * d->head_dim, ldk = d->kv_heads * d->head_dim, share = d->heads / d->kv_heads;
    float scale = 1.0f / sqrtf((float)d->head_dim);
    for (int64_t head = 0; head < d->heads; head++) {
        const float *q = s->q + at * ldq + head * d->head_dim;
        const float *k = s->k + at * ldk + head / share * d->head_dim;
        const float *v = s->v + at * ldk + head / share * d->head_dim;
        float *out = s->ctx + at * ldq + head * d->head_dim;
        for (int64_t q0 = 0; q0 < length; q0 += MOEC_QUERIES) {
            int64_t nq = length - q0 < MOEC_QUERIES ? length - q0 : MOEC_QUERIES;
            int64_t k_lo = d->window > 0 && q0 + 1 > d->window ? q0 + 1 - d->window : 0, nk = q0 + nq - k_lo;
            moec_sgemm(false, true, nq, nk, d->head_dim, scale, q + q0 * ldq, ldq, k + k_lo * ldk, ldk, 0.0f,
                       s->scores_qk, nk);
            softmax_block(s->scores_qk, nk, q0, nq, k_lo, d->window);
            moec_sgemm(false, false, nq, d->head_dim, nk, 1.0f, s->scores_qk, nk, v + k_lo * ldk, ldk, 0.0f,
                       out + q0 * ldq, ldq);
        }
    }
}

static moec_status project(moec_forward *f, moec_scratch *s, float *out, const float *panels, int64_t n,
                           const moec_tensor *w, moec_err *err)
{
    moec_status st = moec_gemm(s->panel_out, panels, n, w->dim[1], w->data, w->dtype, w->dim[0], f->o.compute, s->gemm,
                               err);
    if (st == MOEC_OK)
        moec_panel_unpack(out, w->dim[0], s->panel_out, n, w->dim[0]);
    return st;
}

/* Tables of a sequence: shared, but for dynamic scaling, where the frequencies depend on the sequence's own length. */
static void rope_of(const moec_forward *f, moec_scratch *s, int64_t length, const float **c, const float **sn)
{
    *c = f->rope_cos;
    *sn = f->rope_sin;
    if (s->rope_cos && length < f->o.max_seq) {
        moec__rope_fill(s->rope_cos, s->rope_sin, s->inv_freq, &f->m->dims.rope, length);
        *c = s->rope_cos;
        *sn = s->rope_sin;
    }
}

moec_status moec__attention(moec_forward *f, moec_scratch *s, float *h, const int64_t *seq, int64_t n_seq, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_dims *d = &f->m->dims;
    const moec_layer *l = f->layer;
    int64_t base = seq[0], n = seq[n_seq] - base, half = d->rope.width / 2;
    float *hidden = h + base * d->hidden;
    for (int64_t t = 0; t < n; t++)
        moec_rms_norm(s->x + t * d->hidden, hidden + t * d->hidden, f->norm_attn, d->hidden, (float)d->norm_eps);
    moec_panel_pack(s->panel_in, s->x, d->hidden, NULL, n, d->hidden);
    MOEC_TRY(project(f, s, s->q, s->panel_in, n, l->q, err));
    MOEC_TRY(project(f, s, s->k, s->panel_in, n, l->k, err));
    MOEC_TRY(project(f, s, s->v, s->panel_in, n, l->v, err));
    const heads kind[] = {{s->q, d->heads, f->q_bias, f->q_norm, true},
                          {s->k, d->kv_heads, f->k_bias, f->k_norm, true},
                          {s->v, d->kv_heads, f->v_bias, NULL, false}};
    for (int64_t i = 0; i < n_seq; i++) {
        const float *c, *sn;
        int64_t at = seq[i] - base, length = seq[i + 1] - seq[i];
        rope_of(f, s, length, &c, &sn);
        for (size_t j = 0; j < MOEC_COUNT(kind); j++)
            for (int64_t t = 0; t < length; t++)
                finish_token(&kind[j], kind[j].x + (at + t) * kind[j].n_heads * d->head_dim, d, c + t * half,
                             sn + t * half);
        attend(f, s, at, length);
    }
    int64_t width = d->heads * d->head_dim;
    moec_panel_pack(s->panel_in, s->ctx, width, NULL, n, width);
    MOEC_TRY(project(f, s, s->x, s->panel_in, n, l->o, err));
    for (int64_t t = 0; t < n && f->o_bias; t++)
        moec_add(s->x + t * d->hidden, f->o_bias, d->hidden);
    moec_add(hidden, s->x, n * d->hidden);
done:
    return st;
}
