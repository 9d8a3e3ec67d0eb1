/* Gated short convolution (LFM2): [B | C | u] = W_in x, y = C * conv(B * u), out = W_out y, the convolution causal and
 * depthwise over the last few tokens of the sequence. Source: transformers, modeling_lfm2_moe.py,
 * Lfm2MoeShortConv.slow_forward. Also the convolution itself, which delta nets have, too. */
#include "model/forward_parts.h"
#include "num/vec.h"

#include <string.h>

void moec__taps_by_token(float *out, const float *w, int64_t channels, int64_t taps)
{
    for (int64_t c = 0; c < channels; c++)
        for (int64_t j = 0; j < taps; j++)
            out[j * channels + c] = w[c * taps + j];
}

/* The row i tokens before the first. */
static float *before(const moec_conv *v, int64_t i)
{
    return v->past + (v->taps - 1 - i) * v->channels;
}

static const float *row_at(const moec_conv *v, const float *x, int64_t ldx, int64_t t)
{
    return t >= 0 ? x + t * ldx : before(v, -t);
}

void moec__convolve(float *y, int64_t ldy, const float *x, int64_t ldx, int64_t n, const moec_conv *v)
{
    const int64_t width = v->channels, taps = v->taps;
    for (int64_t t = 0; t < n; t++) {
        float *to = y + t * ldy;
        for (int64_t j = 0; j < taps; j++) {
            const float *from = row_at(v, x, ldx, t - (taps - 1) + j), *w = v->weight + j * width;
            for (int64_t c = 0; c < width; c++)
                to[c] = (j ? to[c] : 0.0f) + w[c] * from[c];
        }
    }
    for (int64_t i = taps - 1; i > 0; i--) /* from the oldest on: a short block moves older rows up */
        memmove(before(v, i), row_at(v, x, ldx, n - i), (size_t)width * sizeof *x);
}

/* Tokens of the group are computed by blocks, whatever sequences they are of; what a sequence needs of the block before is
 * carried along. */
int64_t moec__block_part(int64_t *seq_at, bool *fresh, const int64_t *seq, int64_t at, int64_t end)
{
    while (seq[*seq_at + 1] <= at)
        ++*seq_at;
    *fresh = at == seq[*seq_at];
    return seq[*seq_at + 1] < end ? seq[*seq_at + 1] : end;
}

size_t moec__work_conv(const moec_model *m, const moec_layer *l, int64_t g, int64_t max_seq)
{
    (void)l, (void)g, (void)max_seq;
    return (size_t)m->dims.hidden * (size_t)(4 * MOEC_BLOCK + 2 * m->dims.conv_taps - 1);
}

moec_status moec__mix_conv(moec_forward *f, moec_scratch *s, float *out, const float *x, const int64_t *seq, int64_t n_seq,
                           moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t width = f->m->dims.hidden, taps = f->m->dims.conv_taps, first = seq[0], total = seq[n_seq];
    float *in = s->work, *y = in + 3 * MOEC_BLOCK * width, *weight = y + MOEC_BLOCK * width; /* in: rows [B | C | u] */
    const moec_conv conv = {weight, weight + taps * width, width, taps};
    int64_t seq_at = 0;
    moec__taps_by_token(weight, f->vec[MOEC_VEC_CONV], width, taps);
    for (int64_t at = first; at < total; at += MOEC_BLOCK) {
        int64_t end = total - at < MOEC_BLOCK ? total : at + MOEC_BLOCK, n = end - at;
        bool fresh;
        moec_panel_pack(s->panel_in, x + (at - first) * width, width, NULL, n, width);
        MOEC_TRY(moec__project(f, s, in, n, MOEC_MAT_CONV_IN, err));
        for (int64_t t = 0; t < n; t++) {
            float *b = in + 3 * t * width, *u = b + 2 * width;
            for (int64_t c = 0; c < width; c++)
                u[c] *= b[c];
        }
        for (int64_t t = at, next; t < end; t = next) {
            next = moec__block_part(&seq_at, &fresh, seq, t, end);
            if (fresh)
                memset(conv.past, 0, (size_t)((taps - 1) * width) * sizeof *conv.past);
            moec__convolve(y + (t - at) * width, width, in + 3 * (t - at) * width + 2 * width, 3 * width, next - t, &conv);
        }
        for (int64_t t = 0; t < n; t++) {
            const float *gate = in + 3 * t * width + width;
            for (int64_t c = 0; c < width; c++)
                y[t * width + c] *= gate[c];
        }
        moec_panel_pack(s->panel_in, y, width, NULL, n, width);
        MOEC_TRY(moec__project(f, s, out + (at - first) * width, n, MOEC_MAT_CONV_OUT, err));
    }
done:
    return st;
}
