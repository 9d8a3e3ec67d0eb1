/* Kernels in C for any machine. Vectors of four floats exist on every 64-bit target. */
#include "num/gemm_kernel.h"

#include <math.h>
#include <string.h>

typedef float quad __attribute__((vector_size(16)));

/* Nearest even; NaNs stay NaNs. Unlike the AVX512_BF16 instruction this keeps denormals. */
static float rounded(float v)
{
    uint32_t u;
    memcpy(&u, &v, sizeof u);
    if (isnan(v))
        u = (u & 0xffff0000U) | 0x00400000U;
    else
        u = (u + 0x7fffU + (u >> 16 & 1U)) & 0xffff0000U;
    memcpy(&v, &u, sizeof v);
    return v;
}

void moec__round_f32(void *out, const float *x, int64_t ldx, int64_t k)
{
    float *f = out;
    for (int64_t i = 0; i < k; i++)
        for (int j = 0; j < MOEC_PANEL; j++)
            f[i * MOEC_PANEL + j] = rounded(x[i * ldx + j]);
}

void moec__load_f32(void *out, const void *w, size_t stride, moec_dtype dtype, int rows, int kc)
{
    char *to = out;
    const char *from = w;
    for (int r = 0; r < rows; r++)
        moec_dtypes[dtype].to_f32((float *)(void *)(to + r * MOEC_W_STRIDE), from + (size_t)r * stride, kc);
    for (int r = rows; r % 4 != 0; r++)
        memset(to + r * MOEC_W_STRIDE, 0, (size_t)kc * sizeof(float));
}

void moec__load_rounded(void *out, const void *w, size_t stride, moec_dtype dtype, int rows, int kc)
{
    char *to = out;
    moec__load_f32(out, w, stride, dtype, rows, kc);
    if (dtype == MOEC_BF16)
        return;
    for (int r = 0; r < rows; r++) {
        float *f = (float *)(void *)(to + r * MOEC_W_STRIDE);
        for (int i = 0; i < kc; i++)
            f[i] = rounded(f[i]);
    }
}

/* 4 rows by 8 lanes: 8 accumulators, so that 16 registers are enough. */
static void tile_4x8(float *y, int64_t ld, const float *x, const float *w, int rows, int kc, bool first)
{
    enum { LD = MOEC_W_STRIDE / (int)sizeof(float) };
    quad sum[4][2] = {{{0}}};
    for (int i = 0; i < kc; i++) {
        quad a, b;
        memcpy(&a, x + i * 32, sizeof a);
        memcpy(&b, x + i * 32 + 4, sizeof b);
        for (int r = 0; r < 4; r++) {
            float v = w[r * LD + i];
            quad f = {v, v, v, v};
            sum[r][0] += f * a;
            sum[r][1] += f * b;
        }
    }
    for (int r = 0; r < rows && r < 4; r++) {
        quad old[2] = {{0}};
        if (!first)
            memcpy(old, y + r * ld, sizeof old);
        old[0] += sum[r][0];
        old[1] += sum[r][1];
        memcpy(y + r * ld, old, sizeof old);
    }
}

void moec__tile_generic(const moec_tile_job *job)
{
    enum { LD = MOEC_W_STRIDE / (int)sizeof(float) };
    const float *x = job->x, *w = job->w;
    for (int r = 0; r < job->rows; r += 4)
        for (int lane = 0; lane < job->lanes; lane += 8)
            tile_4x8(job->y + r * job->ld + lane, job->ld, x + lane, w + r * LD, job->rows - r, job->kc, job->first);
}

void moec__transpose_generic(float *out, int64_t ldo, const float *const *in, int64_t at, int rows, int cols)
{
    for (int j = 0; j < cols; j++)
        for (int i = 0; i < 16; i++)
            out[j * ldo + i] = i < rows ? in[i][at + j] : 0.0F;
}

void moec__add_rows_generic(float *y, int64_t ldy, const int32_t *at, const float *scale, const float *tile, int rows,
                            int cols)
{
    for (int i = 0; i < rows; i++) {
        float *to = y + (at ? at[i] : i) * ldy;
        for (int j = 0; j < cols; j++)
            to[j] += scale[i] * tile[i * 16 + j];
    }
}
