/* The operations of vec.h as one instruction set implements them. Private to lib/num. */
#ifndef MOEC_NUM_VEC_TABLE_H
#define MOEC_NUM_VEC_TABLE_H

#include "num/vec.h"

typedef struct moec_vec_table {
    void (*rms_norm)(float *out, const float *x, const float *w, int64_t n, float eps);
    void (*layer_norm)(float *y, const float *x, const float *w, const float *bias, int64_t n, float eps);
    void (*softmax)(float *x, int64_t n);
    void (*sigmoid)(float *x, int64_t n);
    void (*silu)(float *x, int64_t n);
    void (*mul_sigmoid)(float *x, const float *g, int64_t n);
    void (*silu_mul)(float *gate, const float *up, int64_t n);
    void (*swiglu_clamped)(float *gate, const float *up, int64_t n, float limit, float alpha);
    void (*silu_mul_grad)(float *gate, float *up, const float *grad, int64_t n);
    void (*swiglu_clamped_grad)(float *gate, float *up, const float *grad, int64_t n, float limit, float alpha);
    void (*adam)(float *w, float *m, float *v, const float *grad, int64_t n, const moec_adam_factors *f);
    void (*delta_step)(float *state, float *v, const float *q, const float *k, int64_t dk, int64_t dv, float decay,
                       float beta);
    void (*add)(float *y, const float *x, int64_t n);
    double (*sum_sq)(const float *x, int64_t n);
    float (*abs_max)(const float *x, int64_t n);
    bool (*all_finite)(const float *x, int64_t n);
    void (*order)(int32_t *out, const float *v, int64_t n);
    void (*products)(double out[4], const float *h, const float *r, const float *x, int64_t n);
    void (*path_step)(double *low, double *d, int64_t *before, const double *v, const float *p, int64_t n, double base,
                      int64_t row);
    void (*panel_norms)(double sum_sq[32], float abs_max[32], const float *panel, int64_t width);
    void (*lse_add)(moec_lse *s, const float *z, const float *other, int64_t n, int32_t first);
} moec_vec_table;

extern const moec_vec_table moec__vec_generic;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) /* clang has no target pragma; it gets the plain one */
#define MOEC_VEC_X86 1
extern const moec_vec_table moec__vec_avx2, moec__vec_avx512;
#endif

#endif
