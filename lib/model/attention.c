/* What every mixer with a softmax over keys shares: rotary tables and rotation, and causal attention of one sequence. Scores
 * exist for a block of queries and the keys these can see, so memory does not grow with the square of the length. */
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

void moec__rope_of(const moec_forward *f, moec_scratch *s, int64_t length, const float **c, const float **sn)
{
    *c = f->rope_cos;
    *sn = f->rope_sin;
    if (s->rope_cos && length < f->o.max_seq) { /* the shared tables are those of the longest sequence */
        moec__rope_fill(s->rope_cos, s->rope_sin, s->inv_freq, &f->m->dims.rope, length);
        *c = s->rope_cos;
        *sn = s->rope_sin;
    }
}

void moec__rotate(float *x, const float *c, const float *s, int64_t half, moec_rotation how)
{
    if (how == MOEC_ROTATE_PAIRS) {
        for (int64_t i = 0; i < half; i++) {
            float a = x[2 * i], b = x[2 * i + 1];
            x[2 * i] = a * c[i] - b * s[i];
            x[2 * i + 1] = b * c[i] + a * s[i];
        }
        return;
    }
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * c[i] - b * s[i];
        x[i + half] = b * c[i] + a * s[i];
    }
}

/* First key that query t sees. */
static int64_t first_key(const moec_layer *l, int64_t t)
{
    int64_t window = l->window > 0 && t + 1 > l->window ? t + 1 - l->window : 0;
    int64_t chunk = l->chunk > 0 ? t / l->chunk * l->chunk : 0;
    return window > chunk ? window : chunk;
}

/* Scores [nq, nk] of queries q0.. and keys k_lo.. to weights, row by row. Keys behind the query count as -infinity up to a
 * whole vector, which spares the loops their rests; rows have ld >= nk + 1 floats, rounded up to one. A sink is a score
 * without a key: it takes its share of the softmax and is dropped. */
static void softmax_block(float *s, int64_t ld, int64_t q0, int64_t nq, int64_t k_lo, int64_t nk, const moec_layer *l,
                          const float *sink)
{
    for (int64_t i = 0; i < nq; i++) {
        int64_t t = q0 + i, end = t + 1 - k_lo, last = end; /* keys up to and with t */
        int64_t begin = first_key(l, t) - k_lo;
        float *row = s + i * ld;
        if (begin > 0)
            memset(row, 0, (size_t)begin * sizeof *row);
        if (sink)
            row[last++] = *sink;
        int64_t full = begin + (last - begin + 15) / 16 * 16;
        for (full = full < ld ? full : ld; last < full; last++)
            row[last] = -INFINITY;
        moec_softmax(row + begin, last - begin);
        if (end < nk)
            memset(row + end, 0, (size_t)(nk - end) * sizeof *row);
    }
}

typedef struct attention {
    const moec_forward *f;
    moec_scratch *s;
    const moec_heads *h;
    int64_t blocks; /* of queries; the last, which see the most keys, come first */
} attention;

/* Items are blocks of queries of the first head, then of the second, and so on. */
static moec_status attend(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const attention *a = ctx;
    const moec_forward *f = a->f;
    const moec_heads *h = a->h;
    int64_t share = h->heads / h->kv_heads, v_step = h->v_step ? h->v_step : h->value_dim;
    float scale = (float)f->m->dims.score_scale, *scores = a->s->scores_qk + worker * MOEC_QUERIES * (f->o.max_seq + 16);
    (void)err;
    for (int64_t i = lo; i < hi; i++) {
        int64_t head = i / a->blocks, q0 = (a->blocks - 1 - i % a->blocks) * MOEC_QUERIES;
        int64_t from = h->tiled ? head % h->kv_heads : head / share;
        const float *q = h->q + head * h->head_dim, *k = h->k + from * h->head_dim, *v = h->v + from * v_step;
        float *out = h->out + head * h->value_dim;
        int64_t nq = h->length - q0 < MOEC_QUERIES ? h->length - q0 : MOEC_QUERIES;
        int64_t k_lo = first_key(f->layer, q0), nk = q0 + nq - k_lo, ld = (nk + 16) / 16 * 16;
        moec_sgemm(false, true, nq, nk, h->head_dim, scale, q + q0 * h->ldq, h->ldq, k + k_lo * h->ldk, h->ldk, 0.0f, scores,
                   ld);
        softmax_block(scores, ld, q0, nq, k_lo, nk, f->layer, h->sinks ? h->sinks + head : NULL);
        moec_sgemm(false, false, nq, h->value_dim, nk, 1.0f, scores, ld, v + k_lo * h->ldv, h->ldv, 0.0f, out + q0 * h->ldo,
                   h->ldo);
    }
    return MOEC_OK;
}

void moec__attend(const moec_forward *f, moec_scratch *s, const moec_heads *h)
{
    attention a = {f, s, h, (h->length + MOEC_QUERIES - 1) / MOEC_QUERIES};
    moec__share(f, h->heads * a.blocks, MOEC_QUERIES * h->length, attend, &a);
}
