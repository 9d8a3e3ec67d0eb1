/* Kernels for AVX2+FMA, AVX-512 and AVX512_BF16. Each function carries its instruction set in a target attribute, so
 * the file needs no compiler flags and its code is only reached through the tables in gemm.c. */
#include "num/gemm_kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define AVX512BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")))
#define INLINE static inline __attribute__((always_inline))

enum { LD = MOEC_W_STRIDE / (int)sizeof(float), LANE = 16 };

/* ---- AVX2: 6 rows by 16 lanes, 12 accumulators of 8 floats ---------------------------------------------------- */

AVX2 INLINE void tile_6x16(float *y, int64_t ld, const float *x, const float *w, int rows, int kc, bool first)
{
    __m256 sum[6][2];
#pragma GCC unroll 6
    for (int r = 0; r < 6; r++)
        sum[r][0] = sum[r][1] = _mm256_setzero_ps();
    for (int i = 0; i < kc; i++) {
        __m256 a = _mm256_loadu_ps(x + i * 32), b = _mm256_loadu_ps(x + i * 32 + 8);
#pragma GCC unroll 6
        for (int r = 0; r < 6; r++) {
            __m256 f = _mm256_broadcast_ss(w + r * LD + i);
            sum[r][0] = _mm256_fmadd_ps(f, a, sum[r][0]);
            sum[r][1] = _mm256_fmadd_ps(f, b, sum[r][1]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < 6; r++)
        if (r < rows)
            for (int h = 0; h < 2; h++) {
                float *to = y + r * ld + h * 8;
                _mm256_storeu_ps(to, first ? sum[r][h] : _mm256_add_ps(_mm256_loadu_ps(to), sum[r][h]));
            }
}

AVX2 void moec__tile_avx2(const moec_tile_job *job)
{
    const float *x = job->x, *w = job->w;
    for (int r = 0; r < job->rows; r += 6)
        for (int lane = 0; lane < job->lanes; lane += 16)
            tile_6x16(job->y + r * job->ld + lane, job->ld, x + lane, w + r * LD, job->rows - r, job->kc, job->first);
}

/* ---- AVX-512, float ------------------------------------------------------------------------------------------- */

enum { STEPS = 16 }; /* steps of a tile's loop between two rounds of prefetches */

/* Asks for one cache line of each row of the next tile. */
AVX512 INLINE void ask(const moec_tile_job *job, int bytes)
{
    const char *p = job->next;
    if (p)
        for (int r = 0; r < MOEC_TILE; r++)
            _mm_prefetch(p + (size_t)r * job->stride + bytes, _MM_HINT_T1);
}

/* y (+)= sum for `height` rows of `width` vectors; height and width are constants where this is inlined. */
AVX512 INLINE void put(const moec_tile_job *job, __m512 sum[MOEC_TILE][2], int height, int width)
{
#pragma GCC unroll 12
    for (int r = 0; r < height; r++) {
        if (r >= job->rows)
            return;
#pragma GCC unroll 2
        for (int h = 0; h < width; h++) {
            float *to = job->y + r * job->ld + h * LANE;
            _mm512_storeu_ps(to, job->first ? sum[r][h] : _mm512_add_ps(_mm512_loadu_ps(to), sum[r][h]));
        }
    }
}

AVX512 INLINE void tile_f32(const moec_tile_job *job, int height, int width)
{
    const float *x = job->x, *w = job->w;
    __m512 sum[MOEC_TILE][2];
#pragma GCC unroll 12
    for (int r = 0; r < height; r++)
        sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int from = 0; from < job->kc; from += STEPS) {
        int end = job->kc - from < STEPS ? job->kc : from + STEPS;
        ask(job, from * job->step / 2);
#pragma GCC unroll 1
        for (int i = from; i < end; i++) {
            __m512 a = _mm512_loadu_ps(x + i * 32), b = width > 1 ? _mm512_loadu_ps(x + i * 32 + LANE) : a;
#pragma GCC unroll 12
            for (int r = 0; r < height; r++) {
                __m512 f = _mm512_set1_ps(w[r * LD + i]);
                sum[r][0] = _mm512_fmadd_ps(f, a, sum[r][0]);
                if (width > 1)
                    sum[r][1] = _mm512_fmadd_ps(f, b, sum[r][1]);
            }
        }
    }
    put(job, sum, height, width);
}

AVX512 void moec__tile_avx512(const moec_tile_job *job)
{
    bool wide = job->lanes > LANE;
    if (job->rows > 8)
        wide ? tile_f32(job, 12, 2) : tile_f32(job, 12, 1);
    else if (job->rows > 4)
        wide ? tile_f32(job, 8, 2) : tile_f32(job, 8, 1);
    else
        wide ? tile_f32(job, 4, 2) : tile_f32(job, 4, 1);
}

/* 16 values from any format, of which those not in m are 0 and not read. */
AVX512 INLINE __m512 get16(const char *p, moec_dtype dtype, __mmask16 m)
{
    if (dtype == MOEC_F32)
        return _mm512_maskz_loadu_ps(m, p);
    __m256i h = _mm256_maskz_loadu_epi16(m, p);
    return dtype == MOEC_F16 ? _mm512_cvtph_ps(h)
                             : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

AVX512 INLINE __mmask16 head(int n)
{
    unsigned mask = n >= LANE ? 0xffffU : (1U << n) - 1U;
    return (__mmask16)mask;
}

AVX512 INLINE void load_f32(float *to, const char *from, size_t stride, moec_dtype dtype, int rows, int kc)
{
    int size = dtype == MOEC_F32 ? 4 : 2;
    for (int r = 0; r < rows; r++, to += LD, from += stride) {
        int i = 0;
        for (; i + LANE <= kc; i += LANE)
            _mm512_store_ps(to + i, get16(from + i * size, dtype, (__mmask16)0xffff));
        if (i < kc)
            _mm512_store_ps(to + i, get16(from + i * size, dtype, head(kc - i)));
    }
    for (int r = rows; r % 4 != 0; r++, to += LD)
        memset(to, 0, (size_t)kc * sizeof(float));
}

AVX512 void moec__load_f32_avx512(void *out, const void *w, size_t stride, moec_dtype dtype, int rows, int kc)
{
    if (dtype == MOEC_F32)
        load_f32(out, w, stride, MOEC_F32, rows, kc);
    else if (dtype == MOEC_F16)
        load_f32(out, w, stride, MOEC_F16, rows, kc);
    else
        load_f32(out, w, stride, MOEC_BF16, rows, kc);
}

/* ---- AVX512_BF16: every 32-bit lane holds two neighbours in k -------------------------------------------------- */

AVX512BF16 INLINE void tile_bf16(const moec_tile_job *job, int height, int width)
{
    const char *x = job->x, *w = job->w;
    int pairs = (job->kc + 1) / 2;
    __m512 sum[MOEC_TILE][2];
#pragma GCC unroll 12
    for (int r = 0; r < height; r++)
        sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int from = 0; from < pairs; from += STEPS) {
        int end = pairs - from < STEPS ? pairs : from + STEPS;
        ask(job, from * job->step);
#pragma GCC unroll 1
        for (int i = from; i < end; i++) {
            __m512i a = _mm512_loadu_si512(x + i * 128), b = width > 1 ? _mm512_loadu_si512(x + i * 128 + 64) : a;
#pragma GCC unroll 12
            for (int r = 0; r < height; r++) {
                int pair;
                memcpy(&pair, w + r * MOEC_W_STRIDE + i * 4, sizeof pair);
                __m512bh f = (__m512bh)_mm512_set1_epi32(pair);
                sum[r][0] = _mm512_dpbf16_ps(sum[r][0], f, (__m512bh)a);
                if (width > 1)
                    sum[r][1] = _mm512_dpbf16_ps(sum[r][1], f, (__m512bh)b);
            }
        }
    }
    put(job, sum, height, width);
}

AVX512BF16 void moec__tile_avx512bf16(const moec_tile_job *job)
{
    bool wide = job->lanes > LANE;
    if (job->rows > 8)
        wide ? tile_bf16(job, 12, 2) : tile_bf16(job, 12, 1);
    else if (job->rows > 4)
        wide ? tile_bf16(job, 8, 2) : tile_bf16(job, 8, 1);
    else
        wide ? tile_bf16(job, 4, 2) : tile_bf16(job, 4, 1);
}

/* 32 values from any format as bf16; those at n and beyond are 0 and not read. */
AVX512BF16 INLINE __m512i get32(const char *p, moec_dtype dtype, int n)
{
    if (dtype == MOEC_BF16)
        return _mm512_maskz_loadu_epi16(n >= 32 ? 0xffffffffU : (1U << n) - 1U, p);
    __m512 low = get16(p, dtype, head(n));
    __m512 high = n > LANE ? get16(p + LANE * (dtype == MOEC_F32 ? 4 : 2), dtype, head(n - LANE)) : _mm512_setzero_ps();
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

AVX512BF16 INLINE void load_bf16(char *to, const char *from, size_t stride, moec_dtype dtype, int rows, int kc)
{
    int size = dtype == MOEC_F32 ? 4 : 2;
    for (int r = 0; r < rows; r++, to += MOEC_W_STRIDE, from += stride) {
        int i = 0;
        for (; i + 32 <= kc; i += 32)
            _mm512_store_si512(to + i * 2, get32(from + i * size, dtype, 32));
        if (i < kc)
            _mm512_store_si512(to + i * 2, get32(from + i * size, dtype, kc - i));
    }
    for (int r = rows; r % 4 != 0; r++, to += MOEC_W_STRIDE)
        memset(to, 0, (size_t)(kc + 1) / 2 * 4);
}

AVX512BF16 void moec__load_avx512bf16(void *out, const void *w, size_t stride, moec_dtype dtype, int rows, int kc)
{
    if (dtype == MOEC_F32)
        load_bf16(out, w, stride, MOEC_F32, rows, kc);
    else if (dtype == MOEC_F16)
        load_bf16(out, w, stride, MOEC_F16, rows, kc);
    else
        load_bf16(out, w, stride, MOEC_BF16, rows, kc);
}

AVX512BF16 void moec__round_avx512bf16(void *out, const float *x, int64_t ldx, int64_t k)
{
    /* cvtne2 puts the row of the even k into the low half; this deals the two halves out alternately. */
    const __m512i deal = _mm512_add_epi16(
        _mm512_set1_epi32(16 << 16),
        _mm512_mullo_epi32(_mm512_set1_epi32(0x10001),
                           _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)));
    char *to = out;
    for (int64_t i = 0; i < k; i += 2, x += 2 * ldx, to += 128) {
        bool whole = i + 1 < k;
        for (int h = 0; h < 2; h++) {
            __m512 even = _mm512_loadu_ps(x + h * LANE);
            __m512 odd = whole ? _mm512_loadu_ps(x + ldx + h * LANE) : _mm512_setzero_ps();
            __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
            _mm512_storeu_si512(to + h * 64, _mm512_permutexvar_epi16(deal, both));
        }
    }
}

/* ---- AVX-512 panel copies --------------------------------------------------------------------------------------- */

/* Lane group g (4 floats) of v[4b + j] becomes column 4g + j of rows 4b .. 4b+3. */
AVX512 INLINE void within_groups(__m512 v[16])
{
#pragma GCC unroll 4
    for (int b = 0; b < 16; b += 4) {
        __m512 a = _mm512_unpacklo_ps(v[b], v[b + 1]), c = _mm512_unpackhi_ps(v[b], v[b + 1]);
        __m512 d = _mm512_unpacklo_ps(v[b + 2], v[b + 3]), e = _mm512_unpackhi_ps(v[b + 2], v[b + 3]);
        v[b] = _mm512_shuffle_ps(a, d, 0x44);
        v[b + 1] = _mm512_shuffle_ps(a, d, 0xee);
        v[b + 2] = _mm512_shuffle_ps(c, e, 0x44);
        v[b + 3] = _mm512_shuffle_ps(c, e, 0xee);
    }
}

/* Transposes the 4x4 arrangement of lane groups, for every j. */
AVX512 INLINE void between_groups(__m512 v[16])
{
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512 a = _mm512_shuffle_f32x4(v[j], v[4 + j], 0x44), c = _mm512_shuffle_f32x4(v[j], v[4 + j], 0xee);
        __m512 d = _mm512_shuffle_f32x4(v[8 + j], v[12 + j], 0x44), e = _mm512_shuffle_f32x4(v[8 + j], v[12 + j], 0xee);
        v[j] = _mm512_shuffle_f32x4(a, d, 0x88);
        v[4 + j] = _mm512_shuffle_f32x4(a, d, 0xdd);
        v[8 + j] = _mm512_shuffle_f32x4(c, e, 0x88);
        v[12 + j] = _mm512_shuffle_f32x4(c, e, 0xdd);
    }
}

AVX512 void moec__transpose_avx512(float *out, int64_t ldo, const float *const *in, int64_t at, int rows, int cols)
{
    __m512 v[16];
    if (rows == 16 && cols == 16) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            v[i] = _mm512_loadu_ps(in[i] + at);
    } else {
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            v[i] = i < rows ? _mm512_maskz_loadu_ps(head(cols), in[i] + at) : _mm512_setzero_ps();
    }
    within_groups(v);
    between_groups(v);
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++)
        if (j < cols)
            _mm512_storeu_ps(out + j * ldo, v[j]);
}

AVX512 void moec__add_rows_avx512(float *y, int64_t ldy, const int32_t *at, const float *scale, const float *tile,
                                  int rows, int cols)
{
    __mmask16 m = head(cols);
    for (int i = 0; i < rows; i++) {
        float *to = y + (at ? at[i] : i) * ldy;
        __m512 old = _mm512_maskz_loadu_ps(m, to), v = _mm512_loadu_ps(tile + i * LANE);
        _mm512_mask_storeu_ps(to, m, _mm512_fmadd_ps(_mm512_set1_ps(scale[i]), v, old));
    }
}

#endif
