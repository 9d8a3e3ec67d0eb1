/* Decoders of quantized weights for AVX2 and AVX-512. As in gemm_x86.c each function carries its instruction set. */
#include "num/weight_kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))

/* F8_E4M3: the byte is extended with its sign and shifted so that sign and exponent lie where a float has them; the bits of
 * the extension between them are cut off. That is the value times 2^-120 (see tensor.c). NaN codes are not in weights that
 * anyone would compute with, so chunks that have one take the slow way. */
enum { SIGN_AND_REST = (int)0x87f00000U };

AVX2 static void fp8_avx2(float *out, const unsigned char *in, int64_t n, float scale)
{
    const __m256i low = _mm256_set1_epi8(0x7f), mask = _mm256_set1_epi32(SIGN_AND_REST);
    const __m256 power = _mm256_set1_ps(0x1p120F), s = _mm256_set1_ps(scale);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __m256i all = _mm256_loadu_si256((const __m256i *)(const void *)(in + i));
        if (_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_and_si256(all, low), low))) {
            moec__fp8_generic(out + i, in + i, 32, scale);
            continue;
        }
        for (int j = 0; j < 32; j += 8) {
            __m256i v = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(in + i + j)));
            __m256 f = _mm256_castsi256_ps(_mm256_and_si256(_mm256_slli_epi32(v, 20), mask));
            _mm256_storeu_ps(out + i + j, _mm256_mul_ps(_mm256_mul_ps(f, power), s));
        }
    }
    if (i < n)
        moec__fp8_generic(out + i, in + i, n - i, scale);
}

AVX512 static void fp8_avx512(float *out, const unsigned char *in, int64_t n, float scale)
{
    const __m512i low = _mm512_set1_epi8(0x7f), mask = _mm512_set1_epi32(SIGN_AND_REST);
    const __m512 power = _mm512_set1_ps(0x1p120F), s = _mm512_set1_ps(scale);
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        __m512i all = _mm512_loadu_si512(in + i);
        if (_mm512_cmpeq_epi8_mask(_mm512_and_si512(all, low), low)) {
            moec__fp8_generic(out + i, in + i, 64, scale);
            continue;
        }
#pragma GCC unroll 4
        for (int j = 0; j < 64; j += 16) {
            __m512i v = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)(in + i + j)));
            __m512 f = _mm512_castsi512_ps(_mm512_and_si512(_mm512_slli_epi32(v, 20), mask));
            _mm512_storeu_ps(out + i + j, _mm512_mul_ps(_mm512_mul_ps(f, power), s));
        }
    }
    if (i < n)
        moec__fp8_generic(out + i, in + i, n - i, scale);
}

/* MXFP4: q | q << 28 puts a byte b of a 64-bit lane q into the lane's lower half and b >> 4 into its upper half, so that the
 * low four bits of every 32-bit lane are one code, in order. Permutations look at those bits only. */
AVX2 static void mxfp4_avx2(float *out, const unsigned char *codes, const unsigned char *scales, int64_t blocks)
{
    const __m256 value = _mm256_setr_ps(0.0F, 0.5F, 1.0F, 1.5F, 2.0F, 3.0F, 4.0F, 6.0F); /* the sign comes from bit 3 */
    const __m256i minus = _mm256_set1_epi32(INT32_MIN);
    for (int64_t b = 0; b < blocks; b++, codes += MOEC_MX / 2) {
        __m256 table = _mm256_mul_ps(value, _mm256_set1_ps(moec__e8m0(scales[b])));
        for (int j = 0; j < 4; j++, out += 8) {
            int four;
            memcpy(&four, codes + 4 * j, sizeof four);
            __m256i q = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
            q = _mm256_or_si256(q, _mm256_slli_epi64(q, 28));
            __m256i sign = _mm256_and_si256(_mm256_slli_epi32(q, 28), minus);
            __m256 v = _mm256_permutevar8x32_ps(table, q);
            _mm256_storeu_ps(out, _mm256_xor_ps(v, _mm256_castsi256_ps(sign)));
        }
    }
}

AVX512 static void mxfp4_avx512(float *out, const unsigned char *codes, const unsigned char *scales, int64_t blocks)
{
    static const float e2m1[16] = MOEC_E2M1;
    const __m512 value = _mm512_loadu_ps(e2m1);
    for (int64_t b = 0; b < blocks; b++, codes += MOEC_MX / 2) {
        __m512 table = _mm512_mul_ps(value, _mm512_set1_ps(moec__e8m0(scales[b])));
        for (int j = 0; j < 2; j++, out += 16) {
            __m512i q = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(const void *)(codes + 8 * j)));
            q = _mm512_or_si512(q, _mm512_slli_epi64(q, 28));
            _mm512_storeu_ps(out, _mm512_permutexvar_ps(q, table));
        }
    }
}

const moec_decode moec__decode_avx2 = {fp8_avx2, mxfp4_avx2};
const moec_decode moec__decode_avx512 = {fp8_avx512, mxfp4_avx512};

#endif
