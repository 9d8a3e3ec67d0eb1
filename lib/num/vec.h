/* Elementwise and row operations of the layer pass, compiled for several instruction sets and chosen at load time. On one
 * machine the same input gives the same bits, whatever the number of threads. */
#ifndef MOEC_NUM_VEC_H
#define MOEC_NUM_VEC_H

#include "num/tensor.h"

/** out[i] = x[i] * w[i] / sqrt(mean(x^2) + eps). out may be x. */
MOEC_API void moec_rms_norm(float *out, const float *x, const float *w, int64_t n, float eps);
/** y[i] = (x[i] - mean) / sqrt(var + eps) * w[i] + bias[i], var = mean((x - mean)^2), biased as in torch's LayerNorm; bias
 *  NULL: none. Two passes, so that a large mean does not cost digits. y may be x. */
MOEC_API void moec_layer_norm(float *y, const float *x, const float *w, const float *bias, int64_t n, float eps);
/** x = exp(x - max(x)) / sum, in place; n >= 1. exp to 2 units in the last place. */
MOEC_API void moec_softmax(float *x, int64_t n);
/** x[i] = 1 / (1 + exp(-x[i])). */
MOEC_API void moec_sigmoid(float *x, int64_t n);
/** x[i] = x[i] / (1 + exp(-x[i])). */
MOEC_API void moec_silu(float *x, int64_t n);
/** x[i] = x[i] / (1 + exp(-g[i])). g may be x. */
MOEC_API void moec_mul_sigmoid(float *x, const float *g, int64_t n);
/** gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i]. */
MOEC_API void moec_silu_mul(float *gate, const float *up, int64_t n);
/** The activation of gpt-oss (transformers, GptOssExperts): with g = min(gate[i], limit), u = up[i] cut to [-limit, limit],
 *  gate[i] = (u + 1) * g / (1 + exp(-alpha * g)). A NaN in either stays one. */
MOEC_API void moec_swiglu_clamped(float *gate, const float *up, int64_t n, float limit, float alpha);
/** Back through moec_silu_mul: with grad[i] what the loss changes by for the product, gate[i] and up[i], given as they went
 *  in, become what it changes by for them. */
MOEC_API void moec_silu_mul_grad(float *gate, float *up, const float *grad, int64_t n);
/** The same through moec_swiglu_clamped; 0 where a value was cut. */
MOEC_API void moec_swiglu_clamped_grad(float *gate, float *up, const float *grad, int64_t n, float limit, float alpha);

/* Factors of one step of Adam (Kingma and Ba, arXiv 1412.6980): m = keep1 m + (1-keep1) g, v = keep2 v + (1-keep2) g^2,
 * w -= rate m fix1 / (sqrt(v fix2) + eps), fix the corrections of the start, 1 / (1 - keep^step). */
typedef struct moec_adam_factors {
    float keep1, keep2, fix1, fix2, rate, eps;
} moec_adam_factors;
MOEC_API void moec_adam(float *w, float *m, float *v, const float *grad, int64_t n, const moec_adam_factors *f);

/** One token of a gated delta net on a state S [dk,dv]: S = decay S; S += k (x) d with d = beta (v - S^T k); v becomes
 *  S^T q. Sums over dk in float32, in one order for each column. */
MOEC_API void moec_delta_step(float *state, float *v, const float *q, const float *k, int64_t dk, int64_t dv, float decay,
                              float beta);
/** y[i] += x[i]. */
MOEC_API void moec_add(float *y, const float *x, int64_t n);
/** sum of x[i]^2 in 16 float32 partial sums that are added up in float64 every 4096 values. */
MOEC_API double moec_sum_sq(const float *x, int64_t n);
/** largest |x[i]|, 0 for n = 0. NaN is passed over. */
MOEC_API float moec_abs_max(const float *x, int64_t n);
/** True when every value is finite. */
MOEC_API bool moec_all_finite(const float *x, int64_t n);

/** out[0..n-1] = the indices of v by descending value, the lowest index first on ties; n <= MOEC_ORDER_MOST. All values are
 *  compared with all, which is faster than sorting while they are few and costs the same for any values. With a NaN among
 *  them the order means nothing, but every entry is an index below n. */
enum { MOEC_ORDER_MOST = 32 };
MOEC_API void moec_order(int32_t *out, const float *v, int64_t n);
/** h.h, h.r, r.r and x.x in float64. */
MOEC_API void moec_products(double out[4], const float *h, const float *r, const float *x, int64_t n);

/** One step along the shortest paths of an assignment (assign.h), over the row p [n] of profits: where base - p[j] - v[j] < d[j],
 *  in float64, d[j] becomes that and before[j] = row. v may be -inf: then d stays. low [ceil(n / MOEC_PATH_BLOCK)] becomes the
 *  least d of each block of columns. No sums: every instruction set gives the same bits. */
enum { MOEC_PATH_BLOCK = 64 };
MOEC_API void moec_path_step(double *low, double *d, int64_t *before, const double *v, const float *p, int64_t n, double base,
                             int64_t row);

/** Per lane of one panel float[width][32]: sum of squares and largest magnitude. */
MOEC_API void moec_panel_norms(double sum_sq[32], float abs_max[32], const float *panel, int64_t width);

/* Running log-sum-exp of 32 tokens over blocks of a vocabulary, for losses that never hold a whole row of logits. */
typedef struct moec_lse {
    double max[32], sum[32]; /* log sum exp = max + log(sum) */
    float top[32];           /* largest logit so far, */
    int32_t top_id[32];      /* and the lowest id that has it */
    double cross[32];        /* sum of exp(z - max) * (z - other): KL's cross term */
} moec_lse;
MOEC_API void moec_lse_start(moec_lse *s);
/** Adds rows [0, n) of logits panel z[n][32] that are ids first .. first+n-1; other: a second model's logits of the same
 *  shape, or NULL. */
MOEC_API void moec_lse_add(moec_lse *s, const float *z, const float *other, int64_t n, int32_t first);

#endif
