/* Gated delta net (Qwen3-Next, Qwen3.5): linear attention whose state is corrected instead of only added to. Per value head,
 * with a state S [dk,dv] that is 0 at the start of a sequence, and key head h / (value heads / key heads):
 *
 *   q, k, v = silu(conv(W x))      q, k of length 1 (eps 1e-6), q times dk^-1/2
 *   S <- exp(-exp(A_log) softplus(a + dt_bias)) S
 *   S <- S + k (x) sigmoid(b) (v - S^T k)
 *   o  = S^T q                     y = RMSnorm(o) * w * silu(z)
 *
 * Computed token by token; transformers runs blocks of 64 tokens with triangular matrices, which is the same in exact
 * arithmetic. Source: transformers, modeling_qwen3_next.py, torch_recurrent_gated_delta_rule. */
#include "model/forward_parts.h"
#include "num/vec.h"

#include <math.h>
#include <string.h>

/* Where a block's rows lie in scratch->work. */
typedef struct delta {
    int64_t key_heads, value_heads, dk, dv, taps;
    int64_t keys, values;   /* widths of all heads */
    int64_t channels, wide; /* q, k, v; and z */
    float *raw;             /* [BLOCK, wide] rows q | k | v | z */
    float *qkv;             /* [BLOCK, channels] behind the convolution; o takes the place of v */
    float *ba;              /* [BLOCK, 2*value_heads] sigmoid(b) | decay */
    float *row;             /* [wide] */
    float *state;           /* [value_heads, dk, dv] */
    float *weight, *past;   /* [taps, channels] [taps-1, channels] */
} delta;

static size_t delta_layout(delta *w, const moec_dims *d, float *at)
{
    *w = (delta){.key_heads = d->delta_key_heads, .value_heads = d->delta_value_heads, .dk = d->delta_key_dim,
                 .dv = d->delta_value_dim, .taps = d->conv_taps};
    w->keys = w->key_heads * w->dk;
    w->values = w->value_heads * w->dv;
    w->channels = 2 * w->keys + w->values;
    w->wide = w->channels + w->values;
    const struct {
        float **to;
        int64_t n;
    } piece[] = {
        {&w->raw, MOEC_BLOCK * w->wide},      {&w->qkv, MOEC_BLOCK * w->channels},
        {&w->ba, MOEC_BLOCK * 2 * w->value_heads}, {&w->row, w->wide},
        {&w->state, w->value_heads * w->dk * w->dv},
        {&w->weight, w->taps * w->channels},  {&w->past, (w->taps - 1) * w->channels},
    };
    size_t sum = 0;
    for (size_t i = 0; i < MOEC_COUNT(piece); i++) {
        *piece[i].to = at ? at + sum : NULL;
        sum += (size_t)piece[i].n;
    }
    return sum;
}

size_t moec__work_delta(const moec_model *m, const moec_layer *l, int64_t g, int64_t max_seq)
{
    delta w;
    (void)l, (void)g, (void)max_seq;
    return delta_layout(&w, &m->dims, NULL);
}

/* Rows by key head, [q | k | its v | its z] and [its b | its a], become [all q | k | v | z] and [b | a]. */
static void ungroup(const delta *w, int64_t n)
{
    const int64_t m = w->value_heads / w->key_heads, mv = m * w->dv;
    for (int64_t t = 0; t < n; t++) {
        float *row = w->raw + t * w->wide, *ba = w->ba + t * 2 * w->value_heads;
        const float *from = w->row;
        memcpy(w->row, row, (size_t)w->wide * sizeof *row);
        for (int64_t h = 0; h < w->key_heads; h++) {
            memcpy(row + h * w->dk, from, (size_t)w->dk * sizeof *row);
            memcpy(row + w->keys + h * w->dk, from + w->dk, (size_t)w->dk * sizeof *row);
            memcpy(row + 2 * w->keys + h * mv, from + 2 * w->dk, (size_t)mv * sizeof *row);
            memcpy(row + w->channels + h * mv, from + 2 * w->dk + mv, (size_t)mv * sizeof *row);
            from += 2 * w->dk + 2 * mv;
        }
        memcpy(w->row, ba, (size_t)(2 * w->value_heads) * sizeof *ba); /* wide >= 2 * value heads */
        for (int64_t h = 0; h < w->key_heads; h++) {
            memcpy(ba + h * m, w->row + 2 * h * m, (size_t)m * sizeof *ba);
            memcpy(ba + w->value_heads + h * m, w->row + (2 * h + 1) * m, (size_t)m * sizeof *ba);
        }
    }
}

static moec_status project_view(moec_forward *f, moec_scratch *s, float *out, int64_t ldo, int64_t n, moec_mat which,
                                moec_err *err)
{
    return moec__project_view(f, s, out, ldo, s->panel_in, n, &f->layer->mat[which], f->bias[which], err);
}

/* raw and ba of a block whose input is in panel_in. */
static moec_status project_in(moec_forward *f, moec_scratch *s, const delta *w, int64_t n, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t heads = w->value_heads;
    if (f->layer->mat[MOEC_MAT_DELTA_QKVZ].of) {
        MOEC_TRY(project_view(f, s, w->raw, w->wide, n, MOEC_MAT_DELTA_QKVZ, err));
        MOEC_TRY(project_view(f, s, w->ba, 2 * heads, n, MOEC_MAT_DELTA_BA, err));
        ungroup(w, n);
    } else {
        MOEC_TRY(project_view(f, s, w->raw, w->wide, n, MOEC_MAT_DELTA_QKV, err));
        MOEC_TRY(project_view(f, s, w->raw + w->channels, w->wide, n, MOEC_MAT_DELTA_Z, err));
        MOEC_TRY(project_view(f, s, w->ba, 2 * heads, n, MOEC_MAT_DELTA_B, err));
        MOEC_TRY(project_view(f, s, w->ba + heads, 2 * heads, n, MOEC_MAT_DELTA_A, err));
    }
done:
    return st;
}

static double softplus(double x)
{
    return x > 20.0 ? x : log1p(exp(x));
}

static void gates(const moec_forward *f, const delta *w, int64_t n)
{
    const float *a_log = f->vec[MOEC_VEC_DELTA_A_LOG], *dt = f->vec[MOEC_VEC_DELTA_DT_BIAS];
    for (int64_t t = 0; t < n; t++) {
        float *b = w->ba + t * 2 * w->value_heads, *a = b + w->value_heads;
        moec_sigmoid(b, w->value_heads);
        for (int64_t h = 0; h < w->value_heads; h++)
            a[h] = (float)exp(-exp((double)a_log[h]) * softplus((double)a[h] + (double)dt[h]));
    }
}

static void unit_length(float *x, int64_t n, double scale)
{
    float by = (float)(scale / sqrt(moec_sum_sq(x, n) + 1e-6));
    for (int64_t i = 0; i < n; i++)
        x[i] *= by;
}

/* q, k, v of tokens [t0, t1) of the block, which are of one sequence. */
static void convolve(const delta *w, int64_t t0, int64_t t1)
{
    const moec_conv conv = {w->weight, w->past, w->channels, w->taps};
    moec__convolve(w->qkv + t0 * w->channels, w->channels, w->raw + t0 * w->wide, w->wide, t1 - t0, &conv);
    moec_silu(w->qkv + t0 * w->channels, (t1 - t0) * w->channels);
    for (int64_t t = t0; t < t1; t++)
        for (int64_t h = 0; h < 2 * w->key_heads; h++)
            unit_length(w->qkv + t * w->channels + h * w->dk, w->dk, h < w->key_heads ? 1.0 / sqrt((double)w->dk) : 1.0);
}

/* Head by head, so that one state stays in the first cache while tokens pass. */
static void recur(const delta *w, int64_t t0, int64_t t1)
{
    const int64_t m = w->value_heads / w->key_heads;
    for (int64_t h = 0; h < w->value_heads; h++) {
        float *state = w->state + h * w->dk * w->dv;
        for (int64_t t = t0; t < t1; t++) {
            float *row = w->qkv + t * w->channels;
            const float *q = row + h / m * w->dk, *ba = w->ba + t * 2 * w->value_heads;
            moec_delta_step(state, row + 2 * w->keys + h * w->dv, q, q + w->keys, w->dk, w->dv, ba[w->value_heads + h], ba[h]);
        }
    }
}

/* Normed and gated output into the place of z. */
static void finish(const moec_forward *f, const delta *w, int64_t n)
{
    const float *norm = f->vec[MOEC_VEC_DELTA_NORM], eps = (float)f->m->dims.norm_eps;
    for (int64_t t = 0; t < n; t++) {
        float *o = w->qkv + t * w->channels + 2 * w->keys;
        for (int64_t h = 0; h < w->value_heads; h++)
            moec_rms_norm(o + h * w->dv, o + h * w->dv, norm, w->dv, eps);
        moec_silu_mul(w->raw + t * w->wide + w->channels, o, w->values);
    }
}

moec_status moec__mix_delta(moec_forward *f, moec_scratch *s, float *out, const float *x, const int64_t *seq, int64_t n_seq,
                            moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t width = f->m->dims.hidden, first = seq[0], total = seq[n_seq];
    delta w;
    int64_t seq_at = 0;
    delta_layout(&w, &f->m->dims, s->work);
    moec__taps_by_token(w.weight, f->vec[MOEC_VEC_CONV], w.channels, w.taps);
    for (int64_t at = first; at < total; at += MOEC_BLOCK) {
        int64_t end = total - at < MOEC_BLOCK ? total : at + MOEC_BLOCK, n = end - at;
        bool fresh;
        moec_panel_pack(s->panel_in, x + (at - first) * width, width, NULL, n, width);
        MOEC_TRY(project_in(f, s, &w, n, err));
        gates(f, &w, n);
        for (int64_t t = at, next; t < end; t = next) {
            next = moec__block_part(&seq_at, &fresh, seq, t, end);
            if (fresh) {
                memset(w.past, 0, (size_t)((w.taps - 1) * w.channels) * sizeof *w.past);
                memset(w.state, 0, (size_t)(w.value_heads * w.dk * w.dv) * sizeof *w.state);
            }
            convolve(&w, t - at, next - at);
            recur(&w, t - at, next - at);
        }
        finish(f, &w, n);
        moec_panel_pack(s->panel_in, w.raw + w.channels, w.wide, NULL, n, w.values);
        MOEC_TRY(moec__project(f, s, out + (at - first) * width, n, MOEC_MAT_DELTA_OUT, err));
    }
done:
    return st;
}
