/* Grouped-query attention with whatever a family adds: biases, norms of q and k, clipping, partial and missing rotation, an
 * output gate, sinks. Projections run on groups of sequences, scores on blocks of queries. */
#include "model/forward_parts.h"

#include "num/vec.h"

#include <math.h>
#include <string.h>

/* What happens to the q or k vector of one token between its projection and the scores. */
typedef struct part {
    const moec_forward *f;
    int64_t heads;
    const float *norm; /* NULL: none */
    bool whole;        /* one norm over all heads */
} part;

static part part_of(const moec_forward *f, int64_t heads, moec_vec norm)
{
    const moec_tensor *t = f->layer->vec[norm];
    part p = {.f = f, .heads = heads, .norm = f->vec[norm]};
    int64_t n = 1;
    for (int i = 0; t && i < t->rank; i++)
        n *= t->dim[i];
    p.whole = t && n != f->m->dims.head_dim; /* checked: [d] or [heads*d]; with one head they are the same */
    return p;
}

static void normalize(const part *p, float *x)
{
    const moec_model *m = p->f->m;
    int64_t d = m->dims.head_dim;
    if (p->norm && p->whole)
        moec__norm(x, x, p->norm, NULL, m, 1, p->heads * d);
    else if (p->norm)
        moec__norm(x, x, p->norm, NULL, m, p->heads, d);
}

/* x / rms(x), head by head. */
static void normalize_plain(const part *p, float *x)
{
    const moec_dims *d = &p->f->m->dims;
    for (int64_t i = 0; i < p->heads; i++) {
        float *head = x + i * d->head_dim;
        float by = 1.0f / sqrtf((float)(moec_sum_sq(head, d->head_dim) / (double)d->head_dim) + (float)d->norm_eps);
        for (int64_t j = 0; j < d->head_dim; j++)
            head[j] *= by;
    }
}

static void clip(float *x, int64_t n, float most)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = x[i] > most ? most : x[i] < -most ? -most : x[i];
}

/* Norm, clipping and rotation of one token. */
static void finish_token(const part *p, float *x, const float *c, const float *s)
{
    const moec_family *fam = p->f->m->family;
    const moec_dims *d = &p->f->m->dims;
    if (fam->qk_norm == MOEC_QK_BEFORE)
        normalize(p, x);
    if (d->clip_qkv > 0.0)
        clip(x, p->heads * d->head_dim, (float)d->clip_qkv);
    for (int64_t i = 0; p->f->layer->rotated && i < p->heads; i++)
        moec__rotate(x + i * d->head_dim, c, s, d->rope.width / 2, fam->rotation);
    if (fam->qk_norm == MOEC_QK_AFTER)
        normalize(p, x);
    if (fam->qk_norm == MOEC_QK_L2_AFTER && d->qk_l2 && p->f->layer->rotated)
        normalize_plain(p, x);
}

/* Without positions, the scores of long sequences are sharpened instead (Llama 4). */
static void temper(float *q, const moec_dims *d, int64_t position)
{
    float by = (float)(1.0 + d->temper_scale * log1p(floor((double)(position + 1) / d->temper_floor)));
    for (int64_t i = 0; i < d->heads * d->head_dim; i++)
        q[i] *= by;
}

static void run_sequence(moec_forward *f, moec_scratch *s, int64_t at, int64_t length)
{
    const moec_dims *d = &f->m->dims;
    const float *c, *sn;
    int64_t half = d->rope.width / 2, ldq = d->heads * d->head_dim, ldk = d->kv_heads * d->head_dim;
    int64_t ldv = d->kv_heads * d->value_dim, ldo = d->heads * d->value_dim;
    const part q = part_of(f, d->heads, MOEC_VEC_Q_NORM), k = part_of(f, d->kv_heads, MOEC_VEC_K_NORM);
    moec__rope_of(f, s, length, &c, &sn);
    for (int64_t t = 0; t < length; t++) {
        finish_token(&q, s->q + (at + t) * ldq, c + t * half, sn + t * half);
        finish_token(&k, s->k + (at + t) * ldk, c + t * half, sn + t * half);
        if (d->clip_qkv > 0.0)
            clip(s->v + (at + t) * ldv, ldv, (float)d->clip_qkv);
        if (!f->layer->rotated && d->temper_floor > 0.0)
            temper(s->q + (at + t) * ldq, d, t);
    }
    const moec_heads h = {.q = s->q + at * ldq, .k = s->k + at * ldk, .v = s->v + at * ldv, .out = s->ctx + at * ldo,
                          .ldq = ldq, .ldk = ldk, .ldv = ldv, .ldo = ldo, .length = length, .heads = d->heads,
                          .kv_heads = d->kv_heads, .head_dim = d->head_dim, .value_dim = d->value_dim,
                          .sinks = f->vec[MOEC_VEC_SINKS]};
    moec__attend(f, s, &h);
}

/* Q whose heads are [query | gate] each, taken apart by blocks of tokens. */
static moec_status project_gated(moec_forward *f, moec_scratch *s, int64_t n, moec_err *err)
{
    const moec_dims *d = &f->m->dims;
    const moec_weight *w = &f->layer->mat[MOEC_MAT_Q];
    size_t head = (size_t)d->head_dim;
    for (int64_t at = 0; at < n; at += MOEC_BLOCK) {
        int64_t m = n - at < MOEC_BLOCK ? n - at : MOEC_BLOCK;
        moec_status st = moec__project_view(f, s, s->work, w->rows, s->panel_in + at * w->cols, m, w, f->bias[MOEC_MAT_Q],
                                            err);
        if (st != MOEC_OK)
            return st;
        for (int64_t i = 0; i < m * d->heads; i++) {
            const float *both = s->work + i * 2 * d->head_dim;
            int64_t to = (at * d->heads + i) * d->head_dim;
            memcpy(s->q + to, both, head * sizeof *both);
            memcpy(s->gate + to, both + head, head * sizeof *both);
        }
    }
    return MOEC_OK;
}

size_t moec__work_attention(const moec_model *m, const moec_layer *l, int64_t g, int64_t max_seq)
{
    int64_t block = g < MOEC_BLOCK ? g : MOEC_BLOCK;
    (void)max_seq;
    return m->family->gate_in_q ? (size_t)(block * l->mat[MOEC_MAT_Q].rows) : 0;
}

moec_status moec__mix_attention(moec_forward *f, moec_scratch *s, float *out, const float *x, const int64_t *seq,
                                int64_t n_seq, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_dims *d = &f->m->dims;
    bool in_q = f->m->family->gate_in_q, apart = f->layer->mat[MOEC_MAT_ATTN_GATE].of != NULL;
    int64_t base = seq[0], n = seq[n_seq] - base;
    moec__share_pack(f, s->panel_in, x, d->hidden, NULL, n, d->hidden);
    MOEC_TRY(in_q ? project_gated(f, s, n, err) : moec__project(f, s, s->q, n, MOEC_MAT_Q, err));
    MOEC_TRY(moec__project(f, s, s->k, n, MOEC_MAT_K, err));
    MOEC_TRY(moec__project(f, s, s->v, n, MOEC_MAT_V, err));
    if (apart)
        MOEC_TRY(moec__project(f, s, s->gate, n, MOEC_MAT_ATTN_GATE, err));
    for (int64_t i = 0; i < n_seq; i++)
        run_sequence(f, s, seq[i] - base, seq[i + 1] - seq[i]);
    if (in_q || apart)
        moec_mul_sigmoid(s->ctx, s->gate, n * d->heads * d->value_dim);
    st = moec__project_rows(f, s, out, s->ctx, n, MOEC_MAT_O, err);
done:
    return st;
}
