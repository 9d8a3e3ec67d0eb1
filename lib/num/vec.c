/* Chooses the implementation of vec.h's operations once, by the CPU. */
#include "num/vec.h"

#include "num/simd.h"
#include "num/vec_table.h"

#include <math.h>
#include <string.h>

static const moec_vec_table *table(void)
{
#ifdef MOEC_VEC_X86
    static const moec_vec_table *const by_isa[] = {
        [MOEC_ISA_GENERIC] = &moec__vec_generic,
        [MOEC_ISA_AVX2] = &moec__vec_avx2,
        [MOEC_ISA_AVX512] = &moec__vec_avx512,
        [MOEC_ISA_AVX512BF16] = &moec__vec_avx512,
    };
    _Static_assert(MOEC_COUNT(by_isa) == MOEC_ISA_COUNT, "one table per instruction set");
    return by_isa[moec__isa()];
#else
    return &moec__vec_generic;
#endif
}

void moec_rms_norm(float *out, const float *x, const float *w, int64_t n, float eps)
{
    table()->rms_norm(out, x, w, n, eps);
}

void moec_layer_norm(float *y, const float *x, const float *w, const float *bias, int64_t n, float eps)
{
    table()->layer_norm(y, x, w, bias, n, eps);
}

void moec_softmax(float *x, int64_t n)
{
    table()->softmax(x, n);
}

void moec_sigmoid(float *x, int64_t n)
{
    table()->sigmoid(x, n);
}

void moec_silu(float *x, int64_t n)
{
    table()->silu(x, n);
}

void moec_mul_sigmoid(float *x, const float *g, int64_t n)
{
    table()->mul_sigmoid(x, g, n);
}

void moec_silu_mul(float *gate, const float *up, int64_t n)
{
    table()->silu_mul(gate, up, n);
}

void moec_swiglu_clamped(float *gate, const float *up, int64_t n, float limit, float alpha)
{
    table()->swiglu_clamped(gate, up, n, limit, alpha);
}

void moec_silu_mul_grad(float *gate, float *up, const float *grad, int64_t n)
{
    table()->silu_mul_grad(gate, up, grad, n);
}

void moec_swiglu_clamped_grad(float *gate, float *up, const float *grad, int64_t n, float limit, float alpha)
{
    table()->swiglu_clamped_grad(gate, up, grad, n, limit, alpha);
}

void moec_adam(float *w, float *m, float *v, const float *grad, int64_t n, const moec_adam_factors *f)
{
    table()->adam(w, m, v, grad, n, f);
}

void moec_delta_step(float *state, float *v, const float *q, const float *k, int64_t dk, int64_t dv, float decay, float beta)
{
    table()->delta_step(state, v, q, k, dk, dv, decay, beta);
}

void moec_add(float *y, const float *x, int64_t n)
{
    table()->add(y, x, n);
}

double moec_sum_sq(const float *x, int64_t n)
{
    return table()->sum_sq(x, n);
}

float moec_abs_max(const float *x, int64_t n)
{
    return table()->abs_max(x, n);
}

bool moec_all_finite(const float *x, int64_t n)
{
    return table()->all_finite(x, n);
}

void moec_order(int32_t *out, const float *v, int64_t n)
{
    table()->order(out, v, n);
}

void moec_products(double out[4], const float *h, const float *r, const float *x, int64_t n)
{
    table()->products(out, h, r, x, n);
}

void moec_path_step(double *low, double *d, int64_t *before, const double *v, const float *p, int64_t n, double base,
                    int64_t row)
{
    table()->path_step(low, d, before, v, p, n, base, row);
}

void moec_panel_norms(double sum_sq[32], float abs_max[32], const float *panel, int64_t width)
{
    table()->panel_norms(sum_sq, abs_max, panel, width);
}

void moec_lse_start(moec_lse *s)
{
    memset(s, 0, sizeof *s);
    for (int i = 0; i < 32; i++) {
        s->max[i] = -INFINITY;
        s->top[i] = -INFINITY;
    }
}

void moec_lse_add(moec_lse *s, const float *z, const float *other, int64_t n, int32_t first)
{
    table()->lse_add(s, z, other, n, first);
}
