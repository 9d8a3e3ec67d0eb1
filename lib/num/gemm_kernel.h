/* What one instruction set contributes to moec_gemm and to the panel copies. Private to lib/num; gemm.c drives, the
 * files gemm_*.c implement, and gemm.c's table says which implementation serves which mode.
 *
 * A TILE is 12 weight rows times one panel of 32 tokens: 24 accumulators of 16 floats, which together with two vectors
 * of activations and one broadcast weight fill 27 of the 32 AVX-512 registers. Every k step then loads 14 values for 24
 * multiply-adds, so that the multipliers and not the caches limit the speed.
 *
 * The weights of a tile pass through a small block in the first-level cache, [12][kc] in the form that the kernel
 * multiplies: this is where formats are converted and where short rows and missing rows are padded, so that kernels
 * never look outside the matrix. The block serves all panels of a token block, which is why that is cheap.
 *
 *     activations x     float[k][32]          or  bf16 pairs uint16[(k+1)/2][32][2]
 *     weight block w    float[12][STRIDE_F32] or  uint16[12][STRIDE_BF16], both STRIDE_BYTES apart
 *     output y          float[rows][ld]
 */
#ifndef MOEC_NUM_GEMM_KERNEL_H
#define MOEC_NUM_GEMM_KERNEL_H

#include "num/gemm.h"

enum {
    MOEC_TILE = 12,                                 /* weight rows */
    MOEC_KC_F32 = 512,                              /* k values of a weight block: 24 KiB, next to which 8 panels of */
    MOEC_KC_BF16 = 1024,                            /* activations (512 KiB) stay in the second-level cache */
    MOEC_W_STRIDE = 4 * MOEC_KC_F32 + 64,           /* bytes; the 64 keep rows out of each other's cache sets */
};

/** One panel of k features, ldx floats from one to the next, to the kernel's own form, rounding to bfloat16. Reads 32 floats of each. */
typedef void moec_round_fn(void *out, const float *x, int64_t ldx, int64_t k);

/** Fills the weight block: `rows` rows of kc values that lie `stride` bytes apart from w on. Rows up to the next
 *  multiple of 4 are zeroed, and for pairs an odd kc is padded with 0. */
typedef void moec_load_fn(void *out, const void *w, size_t stride, moec_dtype dtype, int rows, int kc);

typedef struct moec_tile_job {
    float *y;         /* [rows][ld] */
    int64_t ld;       /* MOEC_PANEL where y is a panel */
    const void *x;    /* this panel's activations from the k block's start on */
    const void *w;    /* weight block */
    int rows;         /* 1..12 */
    int kc;
    int lanes;        /* 16 or 32: lanes of x and y to compute; the others are left alone */
    bool first;       /* y is overwritten, not added to */
    const char *next; /* weights of a whole tile that will be wanted soon, or NULL; a kernel may ask the memory for */
    size_t stride;    /* them little by little, since many requests at once stall its own loads */
    int step;         /* half bytes of `next` per k value */
} moec_tile_job;

/** y[rows][lanes] = or += w . x. Sums over kc start at 0 and are added to y unless `first`. For any one output the
 *  operations and their order depend on kc only. */
typedef void moec_tile_fn(const moec_tile_job *job);

/** out[j*ldo + i] = in[i][at + j] for i < rows <= 16, j < cols <= 16; 0 for rows <= i < 16. Writes 16 floats for every
 *  j < cols. */
typedef void moec_transpose_fn(float *out, int64_t ldo, const float *const *in, int64_t at, int rows, int cols);

/** y[at[i]*ldy + j] += scale[i] * tile[i*16 + j] for i < rows, j < cols <= 16, in ascending i; `at` NULL: i itself. */
typedef void moec_add_rows_fn(float *y, int64_t ldy, const int32_t *at, const float *scale, const float *tile, int rows,
                              int cols);

typedef struct moec_kernel {
    const char *name;
    int kc;           /* k values per block; even */
    int x_bytes;      /* scratch bytes per activation; 0: the panels are read in place */
    moec_round_fn *round;
    moec_load_fn *load;
    moec_tile_fn *tile;
} moec_kernel;

/** Bytes of one panel of k features in the kernel's form. */
static inline int64_t moec__panel_bytes(const moec_kernel *kernel, int64_t k)
{
    return MOEC_PANEL * (kernel->x_bytes == 2 ? (k + 1) / 2 * 2 * (int)sizeof(uint16_t) : k * (int)sizeof(float));
}

/* gemm.c: the fastest of this machine */
const moec_kernel *moec__kernel(moec_compute mode);
moec_transpose_fn *moec__transpose(void);

/* gemm_generic.c */
moec_round_fn moec__round_f32;   /* bf16-rounded values kept as floats, for kernels without bf16 instructions */
moec_load_fn moec__load_f32, moec__load_rounded;
moec_tile_fn moec__tile_generic;
moec_transpose_fn moec__transpose_generic;
moec_add_rows_fn moec__add_rows_generic;

#if defined(__x86_64__)
/* gemm_x86.c */
moec_tile_fn moec__tile_avx2, moec__tile_avx512, moec__tile_avx512bf16;
moec_load_fn moec__load_f32_avx512, moec__load_avx512bf16;
moec_round_fn moec__round_avx512bf16;
moec_transpose_fn moec__transpose_avx512;
moec_add_rows_fn moec__add_rows_avx512;
#endif

#endif
