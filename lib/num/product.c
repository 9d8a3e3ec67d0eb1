/* Blocking of plain products. Loop order, outermost first: columns of B by 8 panels of 32; k by what a weight block of the kernels
 * holds; tiles of 12 rows of A; panels. As in gemm.c the part of B stays in the second-level cache while all of A passes by, a tile's
 * rows of A stay in the first level. */
#include "num/product.h"

#include "num/gemm_kernel.h"
#include "num/linalg.h"
#include "num/simd.h"

#include <string.h>

enum {
    PANELS = 8,
    COLUMNS = PANELS * MOEC_PANEL,
    STRIP = 4 * MOEC_TILE, /* rows of A that are turned together: three cache lines */
    PART = 64,             /* k values that pass through float32 on their way to bfloat16; even */
    HALF = 16,             /* of a transpose */
    SUM = 512,             /* rows of X whose products moec_gram sums in float32 */
};

/* Part of B in the kernel's form, panel by panel. 512 KiB are what MOEC_KC_* values of 8 panels take in either form. */
typedef struct columns {
    const moec_kernel *kernel;
    int panels, kc;
    _Alignas(64) char at[PANELS * MOEC_KC_F32 * MOEC_PANEL * sizeof(float)];
} columns;

static int least(int64_t n, int most)
{
    return n < most ? (int)n : most;
}

/* out [kc,32]: columns of B, 0 behind the last. b: the first of them at the first k. */
static void copy_rows(float *out, const float *b, int64_t ldb, int cols, int kc)
{
    for (int i = 0; i < kc; i++, out += MOEC_PANEL, b += ldb) {
        if (cols == MOEC_PANEL) {
            memcpy(out, b, MOEC_PANEL * sizeof *out);
            continue;
        }
        memcpy(out, b, (size_t)cols * sizeof *out);
        memset(out + cols, 0, (size_t)(MOEC_PANEL - cols) * sizeof *out);
    }
}

/* b: column 0 at the first k. */
static void load_columns(columns *to, const float *b, int64_t ldb, bool turned, int cols, int kc)
{
    _Alignas(64) float part[PART * MOEC_PANEL];
    const moec_kernel *kernel = to->kernel;
    to->panels = (cols + MOEC_PANEL - 1) / MOEC_PANEL;
    to->kc = kc;
    for (int p = 0; p < to->panels; p++, b += turned ? MOEC_PANEL * ldb : MOEC_PANEL) {
        char *panel = to->at + p * moec__panel_bytes(kernel, kc);
        const int wide = least(cols - p * MOEC_PANEL, MOEC_PANEL);
        if (kernel->round && !turned && wide == MOEC_PANEL) {
            kernel->round(panel, b, ldb, kc);
            continue;
        }
        for (int i = 0, some; i < kc; i += some) {
            void *out = panel + moec__panel_bytes(kernel, i); /* i is even */
            float *plain = kernel->round ? part : out;
            some = least(kc - i, PART);
            if (turned)
                moec_panel_pack(plain, b + i, ldb, NULL, wide, some);
            else
                copy_rows(plain, b + i * ldb, ldb, wide, some);
            if (kernel->round)
                kernel->round(out, part, MOEC_PANEL, some);
        }
    }
}

/* Weight blocks of `rows` columns of A [k,..], one tile behind the other. a: the first of them at the first k. */
static void load_turned(const moec_kernel *kernel, char *strip, const float *a, int64_t lda, int rows, int kc)
{
    _Alignas(64) float part[STRIP * PART];
    moec_transpose_fn *turn = moec__transpose();
    const int value = kernel->x_bytes == 2 ? 2 : 4;
    for (int i = 0; i < kc; i += PART) {
        const int some = least(kc - i, PART);
        for (int j = 0; j < some; j += HALF) {
            const float *row[HALF];
            for (int h = 0; h < HALF && j + h < some; h++)
                row[h] = a + (i + j + h) * lda;
            for (int r = 0; r < rows; r += HALF)
                turn(part + r * PART + j, PART, row, r, least(some - j, HALF), least(rows - r, HALF));
        }
        for (int r = 0; r < rows; r += MOEC_TILE)
            kernel->load(strip + (size_t)r * MOEC_W_STRIDE + i * value, part + r * PART, PART * sizeof *part, MOEC_F32,
                         least(rows - r, MOEC_TILE), some);
    }
}

/* c [rows,..] = or += a weight block times all columns. next: rows of A, lda apart, that will be loaded next, or NULL. */
static void multiply_tile(const columns *b, const char *block, int rows, int cols, const float *next, int64_t lda, bool add, float *c,
                          int64_t ldc)
{
    for (int p = 0; p < b->panels; p++) {
        const int wide = least(cols - p * MOEC_PANEL, MOEC_PANEL);
        float edge[MOEC_TILE * MOEC_PANEL];
        moec_tile_job job = {.y = c + p * MOEC_PANEL, .ld = ldc, .x = b->at + p * moec__panel_bytes(b->kernel, b->kc), .w = block,
                             .rows = rows, .kc = b->kc, .lanes = MOEC_PANEL, .first = !add, .next = (const char *)(p == 0 ? next : NULL),
                             .stride = (size_t)lda * sizeof *next, .step = 2 * sizeof *next};
        if (wide == MOEC_PANEL) {
            b->kernel->tile(&job);
            continue;
        }
        job.y = edge;
        job.ld = MOEC_PANEL;
        job.lanes = wide > MOEC_PANEL / 2 ? MOEC_PANEL : MOEC_PANEL / 2;
        job.first = true;
        b->kernel->tile(&job);
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < wide; i++) {
                float *to = c + r * ldc + p * MOEC_PANEL + i;
                *to = edge[r * MOEC_PANEL + i] + (add ? *to : 0.0f);
            }
    }
}

void moec_product(moec_compute mode, bool transa, bool transb, int64_t m, int64_t n, int64_t k, const float *a, int64_t lda,
                  const float *b, int64_t ldb, bool add, float *c, int64_t ldc)
{
    _Alignas(64) char strip[STRIP * MOEC_W_STRIDE];
    columns part;
    const moec_kernel *kernel = part.kernel = moec__kernel(mode);
    if (moec__isa() == MOEC_ISA_GENERIC) {
        moec_sgemm(transa, transb, m, n, k, 1.0f, a, lda, b, ldb, add ? 1.0f : 0.0f, c, ldc);
        return;
    }
    if (k == 0 && !add)
        for (int64_t i = 0; i < m; i++)
            memset(c + i * ldc, 0, (size_t)n * sizeof *c);
    for (int64_t j = 0; j < n; j += COLUMNS)
        for (int64_t k0 = 0; k0 < k; k0 += kernel->kc) {
            const int cols = least(n - j, COLUMNS), kc = least(k - k0, kernel->kc);
            load_columns(&part, b + (transb ? j * ldb + k0 : k0 * ldb + j), ldb, transb, cols, kc);
            for (int64_t i = 0; i < m; i += STRIP) {
                const int rows = least(m - i, STRIP);
                if (transa)
                    load_turned(kernel, strip, a + k0 * lda + i, lda, rows, kc);
                for (int r = 0; r < rows; r += MOEC_TILE) {
                    const int some = least(rows - r, MOEC_TILE);
                    char *block = transa ? strip + (size_t)r * MOEC_W_STRIDE : strip;
                    if (!transa)
                        kernel->load(block, a + (i + r) * lda + k0, (size_t)lda * sizeof *a, MOEC_F32, some, kc);
                    const float *next = transa || m - i - r < 2 * MOEC_TILE ? NULL : a + (i + r + MOEC_TILE) * lda + k0;
                    multiply_tile(&part, block, some, cols, next, lda, add || k0 > 0, c + (i + r) * ldc + j, ldc);
                }
            }
        }
}

/* c [rows,cols], whose first row is `below` rows below its first column's, = beta c + part [rows,ld] up to the diagonal. */
static void add_part(double *c, int64_t n, const float *part, int64_t ld, int rows, int cols, int64_t below, double beta)
{
    for (int r = 0; r < rows; r++) {
        const int wide = least(below + r + 1, cols);
        for (int i = 0; i < wide; i++)
            c[r * n + i] = (beta == 0.0 ? 0.0 : beta * c[r * n + i]) + (double)part[r * ld + i];
    }
}

/* The same with the tile's products for part. */
static void add_tile(const columns *b, const char *block, int rows, int cols, int64_t below, double beta, double *c, int64_t n)
{
    float part[MOEC_TILE * MOEC_PANEL];
    for (int p = 0; p < b->panels && p * MOEC_PANEL < below + rows; p++) {
        const moec_tile_job job = {.y = part, .ld = MOEC_PANEL, .x = b->at + p * moec__panel_bytes(b->kernel, b->kc), .w = block,
                                   .rows = rows, .kc = b->kc, .lanes = MOEC_PANEL, .first = true};
        b->kernel->tile(&job);
        add_part(c + p * MOEC_PANEL, n, part, MOEC_PANEL, rows, least(cols - p * MOEC_PANEL, MOEC_PANEL), below - p * MOEC_PANEL, beta);
    }
}

/* k0: sums before it are in c already. */
static double before(int64_t k0, double beta)
{
    return k0 > 0 ? 1.0 : beta;
}

static void gram_generic(double *c, int64_t n, const float *x, int64_t ldx, int64_t k, double beta)
{
    float part[STRIP * COLUMNS];
    for (int64_t j = 0; j < n; j += COLUMNS)
        for (int64_t k0 = 0; k0 < k; k0 += SUM)
            for (int64_t i = j; i < n; i += STRIP) {
                const int rows = least(n - i, STRIP), cols = least(n - j, COLUMNS);
                const float *at = x + k0 * ldx;
                moec_sgemm(true, false, rows, cols, least(k - k0, SUM), 1.0f, at + i, ldx, at + j, ldx, 0.0f, part, COLUMNS);
                add_part(c + i * n + j, n, part, COLUMNS, rows, cols, i - j, before(k0, beta));
            }
}

void moec_gram(double *c, int64_t n, const float *x, int64_t ldx, int64_t k, double beta, moec_compute mode)
{
    _Alignas(64) char strip[STRIP * MOEC_W_STRIDE];
    columns part;
    const moec_kernel *kernel = part.kernel = moec__kernel(mode);
    if (k == 0 && beta != 1.0)
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j <= i; j++)
                c[i * n + j] = beta == 0.0 ? 0.0 : beta * c[i * n + j];
    if (moec__isa() == MOEC_ISA_GENERIC) {
        gram_generic(c, n, x, ldx, k, beta);
        return;
    }
    for (int64_t j = 0; j < n; j += COLUMNS)
        for (int64_t k0 = 0; k0 < k; k0 += SUM) {
            const int cols = least(n - j, COLUMNS);
            load_columns(&part, x + k0 * ldx + j, ldx, false, cols, least(k - k0, SUM));
            for (int64_t i = j; i < n; i += STRIP) {
                const int rows = least(n - i, STRIP);
                load_turned(kernel, strip, x + k0 * ldx + i, ldx, rows, part.kc);
                for (int r = 0; r < rows; r += MOEC_TILE)
                    add_tile(&part, strip + (size_t)r * MOEC_W_STRIDE, least(rows - r, MOEC_TILE), cols, i + r - j, before(k0, beta),
                             c + (i + r) * n + j, n);
            }
        }
}
