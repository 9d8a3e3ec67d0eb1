/* Chooses the implementation of grid.h's operations once, by the CPU. */
#include "num/gemm_kernel.h"
#include "num/grid_table.h"
#include "num/simd.h"

#include <string.h>

static const moec_grid_table *table(void)
{
#ifdef MOEC_VEC_X86
    static const moec_grid_table *const by_isa[] = {
        [MOEC_ISA_GENERIC] = &moec__grid_generic,
        [MOEC_ISA_AVX2] = &moec__grid_avx2,
        [MOEC_ISA_AVX512] = &moec__grid_avx512,
        [MOEC_ISA_AVX512BF16] = &moec__grid_avx512,
    };
    _Static_assert(MOEC_COUNT(by_isa) == MOEC_ISA_COUNT, "one table per instruction set");
    return by_isa[moec__isa()];
#else
    return &moec__grid_generic;
#endif
}

void moec_grid_measure(moec_grid_sums *out, const float *x, const float *m, int64_t n, const float *s, const float *z, float top,
                       int count)
{
    table()->measure(out, x, m, n, s, z, top, count);
}

void moec_grid_scan(float (*xq)[2], float (*qq)[2], const float *x, const float *m, int64_t n, const float *s, float top, int count)
{
    table()->scan(xq, qq, x, m, n, s, top, count);
}

void moec_grid_codes(uint8_t *u, const float *x, int64_t n, float s, float z, float top)
{
    table()->codes(u, x, n, s, z, top);
}

void moec_grid_values(float *x, const uint8_t *u, int64_t n, float s, float z)
{
    table()->values(x, u, n, s, z);
}

void moec_grid_column(uint8_t *u, float *d, const float *v, const float *w, const float *s, const float *z, float top, double *loss,
                      double weight, double add, int64_t n)
{
    table()->column(u, d, v, w, s, z, top, loss, weight, add, n);
}

void moec_grid_difference(float *d, float *q, const float *w, const uint8_t *u, const float *s, const float *z, int64_t n)
{
    table()->difference(d, q, w, u, s, z, n);
}

bool moec_grid_step(uint8_t *u, float *d, float *change, const float *g, const float *s, const float *z, float top, float h,
                    float add, int64_t n)
{
    return table()->step(u, d, change, g, s, z, top, h, add, n);
}

void moec_grid_pull(float *y, const float *x, int64_t stride, const float *a, int64_t count, int64_t n)
{
    table()->pull(y, x, stride, a, count, n);
}

void moec_grid_turn(float *out, int64_t ldo, const float *in, int64_t ldi, int64_t rows, int64_t cols)
{
    enum { SIDE = 16 };
    moec_transpose_fn *turn = moec__transpose();
    for (int64_t r = 0; r < rows; r += SIDE) {
        const int high = rows - r < SIDE ? (int)(rows - r) : SIDE;
        const float *row[SIDE];
        for (int k = 0; k < high; k++)
            row[k] = in + (r + k) * ldi;
        for (int64_t c = 0; c < cols; c += SIDE)
            turn(out + c * ldo + r, ldo, row, c, high, cols - c < SIDE ? (int)(cols - c) : SIDE);
    }
}

/* 8 x 8 bytes, row i in x[i], transposed: squares of 4, 2 and 1 bytes change places with what lies across the diagonal. */
static void turn_square(uint64_t x[8])
{
    static const uint64_t low[] = {0x00000000ffffffff, 0x0000ffff0000ffff, 0x00ff00ff00ff00ff};
    for (int step = 0; step < 3; step++) {
        const int by = 4 >> step;
        for (int i = 0; i < 8; i++)
            if (!(i & by)) {
                const uint64_t swap = ((x[i] >> (8 * by)) ^ x[i + by]) & low[step];
                x[i + by] ^= swap;
                x[i] ^= swap << (8 * by);
            }
    }
}

void moec_grid_turn_codes(uint8_t *out, int64_t ldo, const uint8_t *in, int64_t ldi, int64_t rows, int64_t cols)
{
    enum { SIDE = 8 };
    const int64_t whole = rows / SIDE * SIDE, wide = cols / SIDE * SIDE;
    for (int64_t r = 0; r < whole; r += SIDE)
        for (int64_t c = 0; c < wide; c += SIDE) {
            uint64_t x[SIDE];
            for (int k = 0; k < SIDE; k++)
                memcpy(&x[k], in + (r + k) * ldi + c, SIDE);
            turn_square(x);
            for (int k = 0; k < SIDE; k++)
                memcpy(out + (c + k) * ldo + r, &x[k], SIDE);
        }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = r < whole ? wide : 0; c < cols; c++)
            out[c * ldo + r] = in[r * ldi + c];
}

void moec_grid_less(float *y, const float *x, const float *t, int64_t n)
{
    table()->less(y, x, t, n);
}

void moec_grid_dot(float *sum, const float *x, const float *y, float weight, int64_t n)
{
    table()->dot(sum, x, y, weight, n);
}

void moec_grid_squares(double *sum, const float *y, double weight, int64_t n)
{
    table()->squares(sum, y, weight, n);
}
