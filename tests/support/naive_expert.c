#include "naive_expert.h"

#include <math.h>
#include <stdlib.h>

double naive_value(const moec_tensor *t, int64_t i)
{
    float f = 0.0f;
    if (t)
        moec_dtypes[t->dtype].to_f32(&f, (const char *)t->data + i * moec_dtypes[t->dtype].bytes, 1);
    return (double)f;
}

static double *matrix(const moec_weight *w)
{
    float *f = calloc((size_t)(w->rows * w->cols), sizeof *f);
    double *d = calloc((size_t)(w->rows * w->cols), sizeof *d);
    moec_weight_read(f, w->cols, w, 0, w->rows, 0, w->cols);
    for (int64_t i = 0; i < w->rows * w->cols; i++)
        d[i] = (double)f[i];
    free(f);
    return d;
}

void naive_expert(double *out, int64_t ld, const moec_model *m, const moec_layer *l, int64_t e, const float *x, int64_t n)
{
    const moec_mlp *w = &l->expert[e];
    const moec_dims *d = &m->dims;
    const int64_t wide = d->expert_width, h = d->hidden;
    double *gate = matrix(&w->gate), *up = matrix(&w->up), *down = matrix(&w->down);
    const bool clamped = m->family->activation == MOEC_ACT_SWIGLU_CLAMPED; /* then gate and up lie in turns */
    for (int64_t t = 0; t < n; t++) {
        double a[NAIVE_WIDTH];
        for (int64_t i = 0; i < wide; i++) {
            double g = naive_value(l->gate_up_bias, e * 2 * wide + 2 * i), u = naive_value(l->gate_up_bias, e * 2 * wide + 2 * i + 1);
            for (int64_t c = 0; c < h; c++) {
                g += gate[i * h + c] * (double)x[t * h + c];
                u += up[i * h + c] * (double)x[t * h + c];
            }
            if (clamped) {
                g = fmin(g, d->act_limit);
                u = 1.0 + fmax(fmin(u, d->act_limit), -d->act_limit);
            }
            a[i] = u * g / (1.0 + exp(clamped ? -d->act_alpha * g : -g));
        }
        for (int64_t c = 0; c < h; c++) {
            double *to = &out[t * ld + c];
            *to = naive_value(l->down_bias, e * h + c);
            for (int64_t i = 0; i < wide; i++)
                *to += down[c * wide + i] * a[i];
        }
    }
    free(gate);
    free(up);
    free(down);
}
