/* Blocking and dispatch of moec_gemm, and the copies between token-major rows and panels.
 *
 * Loop order, outermost first: token blocks of 8 panels; k blocks; tiles of 12 weight rows; panels. A k block of 8
 * panels stays in the second-level cache while all weight rows pass by, a weight block in the first level while it
 * meets the 8 panels. The k blocks have the same borders in every call and their sums meet in y in ascending order:
 * that is what makes a token's result independent of batch, threads and the row range it is computed in. */
#include "num/gemm.h"

#include "base/par.h"
#include "num/gemm_kernel.h"
#include "num/simd.h"

#include <string.h>

enum {
    BLOCK = 8,                 /* panels that share a converted weight block */
    SPAN = 4 * BLOCK,          /* panels whose activations are converted before the row blocks start */
    STRIP = 8,                 /* tiles of a transposed view to read together: 96 rows use up the lines they touch */
    PART = 96 * 64,            /* values of a view read to float32 at once, to stay in the first-level cache */
    TASK_TILES = 4,            /* least tiles of a parallel task: each task reads all of its activations */
    TASK_FLOP = 4000000,       /* least work of a parallel task */
    SERIAL_FLOP = 2000000,     /* waking the other threads costs more than products below this */
};

/* What an instruction set uses for F32 and for BF16. Without bf16 instructions both operands are rounded and then
 * multiplied as floats, which differs from the instruction in the last bits of a sum only. */
static const moec_kernel kernels[MOEC_ISA_COUNT][2] = {
    [MOEC_ISA_GENERIC] = {{"generic", MOEC_KC_F32, 0, NULL, moec__load_f32, moec__tile_generic},
                          {"generic", MOEC_KC_F32, 4, moec__round_f32, moec__load_rounded, moec__tile_generic}},
#if defined(__x86_64__)
    [MOEC_ISA_AVX2] = {{"avx2", MOEC_KC_F32, 0, NULL, moec__load_f32, moec__tile_avx2},
                       {"avx2", MOEC_KC_F32, 4, moec__round_f32, moec__load_rounded, moec__tile_avx2}},
    [MOEC_ISA_AVX512] = {{"avx512", MOEC_KC_F32, 0, NULL, moec__load_f32_avx512, moec__tile_avx512},
                         {"avx512", MOEC_KC_F32, 4, moec__round_f32, moec__load_rounded, moec__tile_avx512}},
    [MOEC_ISA_AVX512BF16] = {{"avx512", MOEC_KC_F32, 0, NULL, moec__load_f32_avx512, moec__tile_avx512},
                             {"avx512bf16", MOEC_KC_BF16, 2, moec__round_avx512bf16, moec__load_avx512bf16,
                              moec__tile_avx512bf16}},
#endif
};

const moec_kernel *moec__kernel(moec_compute mode)
{
    return &kernels[moec__isa()][mode == MOEC_COMPUTE_BF16];
}

const char *moec_gemm_kernel(moec_compute mode)
{
    return moec__kernel(mode)->name;
}

/* ---- product ---------------------------------------------------------------------------------------------------- */

typedef struct product {
    const moec_kernel *kernel;
    float *y;              /* panels of this span */
    const float *x;        /* as the caller gave them */
    char *scratch;         /* x in the kernel's form, when that is another one */
    int64_t n, k, rows;    /* n: tokens of this span */
    int64_t tiles;
    const char *w;
    size_t stride;         /* bytes from one weight row to the next */
    moec_dtype dtype;
    const moec_weight *view; /* read through moec_weight_read instead of w, stride and dtype; or NULL */
    int strip;             /* tiles of the view to read together; with 1, w, stride and step say what to ask memory for */
    int step;              /* half bytes from one value of a view's row to the next */
} product;

size_t moec_gemm_scratch_bytes(moec_compute mode, int64_t n, int64_t k)
{
    const moec_kernel *kernel = moec__kernel(mode);
    int64_t panels = moec_panels(n) < SPAN ? moec_panels(n) : SPAN;
    return kernel->x_bytes == 0 ? 0 : (size_t)(panels * moec__panel_bytes(kernel, k));
}

/* Unused lanes are 0 even where the kernel left them out, or multiplied 0 by an infinite weight. */
static void clear_lanes(float *y, int rows, int used)
{
    for (int r = 0; r < rows; r++)
        memset(y + r * MOEC_PANEL + used, 0, sizeof(float) * (size_t)(MOEC_PANEL - used));
}

/* One weight block times every panel of the token block. `job` has what all panels share. */
static void multiply_tile(const product *p, moec_tile_job *job, int64_t panel0, int64_t panels, int64_t row, int64_t k0)
{
    const moec_kernel *kernel = p->kernel;
    const char *x = kernel->x_bytes ? p->scratch : (const char *)p->x;
    int64_t x_panel = moec__panel_bytes(kernel, p->k), x_value = MOEC_PANEL * (kernel->x_bytes == 2 ? 2 : 4);
    for (int64_t i = panel0; i < panel0 + panels; i++) {
        int64_t tokens = p->n - i * MOEC_PANEL;
        job->lanes = tokens > MOEC_PANEL / 2 ? MOEC_PANEL : MOEC_PANEL / 2;
        job->x = x + i * x_panel + k0 * x_value;
        job->y = p->y + (i * p->rows + row) * MOEC_PANEL;
        kernel->tile(job);
        job->next = NULL; /* asked for by now */
        if (tokens < MOEC_PANEL)
            clear_lanes(job->y, job->rows, (int)tokens);
    }
}

/* Rows of tiles [t0, t1) for one token block. */
static void multiply_block(const product *p, int64_t panel0, int64_t panels, int64_t t0, int64_t t1)
{
    _Alignas(64) char block[MOEC_TILE * MOEC_W_STRIDE];
    int size = moec_dtypes[p->dtype].bytes;
    for (int64_t k0 = 0; k0 < p->k; k0 += p->kernel->kc) {
        int kc = p->k - k0 < p->kernel->kc ? (int)(p->k - k0) : p->kernel->kc;
        for (int64_t t = t0; t < t1; t++) {
            int64_t row = t * MOEC_TILE, left = p->rows - row;
            const char *w = p->w + (size_t)row * p->stride + k0 * size;
            moec_tile_job job = {.ld = MOEC_PANEL, .w = block, .kc = kc, .first = k0 == 0, .stride = p->stride, .step = 2 * size,
                                 .rows = left < MOEC_TILE ? (int)left : MOEC_TILE};
            if (t + 1 < t1 && left >= 2 * MOEC_TILE)
                job.next = w + MOEC_TILE * p->stride;
            p->kernel->load(block, w, p->stride, p->dtype, job.rows, kc);
            multiply_tile(p, &job, panel0, panels, row, k0);
        }
    }
}

/* Weight blocks of `rows` rows of the view, one tile behind the other, through float32. Parts are whole vectors of the
 * kernel's form long, so that it does not matter that they come one by one. */
static void load_strip(const product *p, char *strip, int64_t row, int rows, int64_t k0, int kc)
{
    _Alignas(64) float part[PART];
    int wide = p->strip > 1 ? PART / (STRIP * MOEC_TILE) : 256, value = p->kernel->x_bytes == 2 ? 2 : 4;
    for (int i = 0; i < kc; i += wide) {
        int cols = kc - i < wide ? kc - i : wide;
        moec_weight_read(part, wide, p->view, row, rows, k0 + i, cols);
        for (int r = 0; r < rows; r += MOEC_TILE)
            p->kernel->load(strip + (size_t)r * MOEC_W_STRIDE + i * value, part + r * wide, (size_t)wide * sizeof *part,
                            MOEC_F32, rows - r < MOEC_TILE ? rows - r : MOEC_TILE, cols);
    }
}

/* As multiply_block, for views that kernels cannot load themselves. */
static void multiply_view(const product *p, int64_t panel0, int64_t panels, int64_t t0, int64_t t1)
{
    _Alignas(64) char strip[STRIP * MOEC_TILE * MOEC_W_STRIDE];
    for (int64_t k0 = 0; k0 < p->k; k0 += p->kernel->kc) {
        int kc = p->k - k0 < p->kernel->kc ? (int)(p->k - k0) : p->kernel->kc;
        for (int64_t t = t0; t < t1; t += p->strip) {
            int64_t row = t * MOEC_TILE, end = (t1 - t < p->strip ? t1 : t + p->strip) * MOEC_TILE;
            int rows = (int)((end < p->rows ? end : p->rows) - row);
            load_strip(p, strip, row, rows, k0, kc);
            for (int r = 0; r < rows; r += MOEC_TILE) {
                moec_tile_job job = {.ld = MOEC_PANEL, .w = strip + (size_t)r * MOEC_W_STRIDE, .kc = kc, .first = k0 == 0,
                                     .rows = rows - r < MOEC_TILE ? rows - r : MOEC_TILE,
                                     .stride = p->stride, .step = p->step};
                if (p->strip == 1 && t + 1 < t1 && p->rows - row >= 2 * MOEC_TILE)
                    job.next = p->w + (size_t)(row + MOEC_TILE) * p->stride + k0 * p->step / 2;
                multiply_tile(p, &job, panel0, panels, row + r, k0);
            }
        }
    }
}

/* Items are tiles of the first token block, then of the second, and so on. */
static moec_status multiply(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const product *p = ctx;
    int64_t panels = moec_panels(p->n);
    (void)worker;
    (void)err;
    while (lo < hi) {
        int64_t panel0 = lo / p->tiles * BLOCK, t0 = lo % p->tiles;
        int64_t t1 = p->tiles - t0 < hi - lo ? p->tiles : t0 + hi - lo;
        (p->view ? multiply_view : multiply_block)(p, panel0, panels - panel0 < BLOCK ? panels - panel0 : BLOCK, t0, t1);
        lo += t1 - t0;
    }
    return MOEC_OK;
}

static moec_status round_panels(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const product *p = ctx;
    int64_t bytes = moec__panel_bytes(p->kernel, p->k);
    (void)worker;
    (void)err;
    for (int64_t i = lo; i < hi; i++)
        p->kernel->round(p->scratch + i * bytes, p->x + i * p->k * MOEC_PANEL, MOEC_PANEL, p->k);
    return MOEC_OK;
}

static moec_status run_span(product *p, moec_err *err)
{
    moec_status st = MOEC_OK;
    int64_t panels = moec_panels(p->n), items = (panels + BLOCK - 1) / BLOCK * p->tiles;
    int64_t in_block = panels < BLOCK ? panels : BLOCK;
    double tile_flop = 2.0 * MOEC_TILE * MOEC_PANEL * (double)p->k * (double)in_block;
    bool serial = tile_flop * (double)items < SERIAL_FLOP || moec_par_inside() || moec_par_threads() == 1;
    int64_t grain = (int64_t)(TASK_FLOP / tile_flop) + 1;
    int least = p->strip > TASK_TILES ? p->strip : TASK_TILES;
    if (grain < least)
        grain = least;
    if (p->kernel->round)
        MOEC_TRY(moec_par_for(panels, serial ? panels : 1, round_panels, p, err));
    MOEC_TRY(moec_par_for(items, serial ? items : grain, multiply, p, err));
done:
    return st;
}

/* Everything but n, y, x and tiles is in p. */
static moec_status run(product *p, float *y, const float *x, int64_t n, moec_err *err)
{
    if (n < 0 || p->k < 0 || p->rows < 0)
        return moec_fail(err, MOEC_EINVAL, "gemm: [%lld, %lld] for %lld tokens", (long long)p->rows, (long long)p->k,
                         (long long)n);
    if (n == 0 || p->rows == 0)
        return MOEC_OK;
    if (p->k == 0) {
        memset(y, 0, (size_t)(moec_panels(n) * p->rows * MOEC_PANEL) * sizeof *y);
        return MOEC_OK;
    }
    p->tiles = (p->rows + MOEC_TILE - 1) / MOEC_TILE;
    int64_t span = p->kernel->round ? SPAN * MOEC_PANEL : n;
    for (int64_t at = 0; at < n; at += span) {
        p->n = n - at < span ? n - at : span;
        p->x = x + at * p->k;
        p->y = y + at * p->rows;
        moec_status st = run_span(p, err);
        if (st != MOEC_OK)
            return st;
    }
    return MOEC_OK;
}

static bool kernels_load(moec_dtype dtype)
{
    return dtype == MOEC_F32 || dtype == MOEC_F16 || dtype == MOEC_BF16;
}

moec_status moec_gemm(float *y, const float *x, int64_t n, int64_t k, const void *w, moec_dtype dtype, int64_t rows,
                      moec_compute mode, void *scratch, moec_err *err)
{
    product p = {.kernel = moec__kernel(mode), .scratch = scratch, .k = k, .rows = rows, .w = w, .dtype = dtype};
    if (!kernels_load(dtype))
        return moec_fail(err, MOEC_EINVAL, "gemm: weights are %s, expected F32, F16 or BF16",
                         dtype < MOEC_DTYPE_COUNT ? moec_dtypes[dtype].name : "of no known dtype");
    p.stride = (size_t)k * (size_t)moec_dtypes[dtype].bytes;
    return run(&p, y, x, n, err);
}

moec_status moec_gemm_weight(float *y, const float *x, int64_t n, const moec_weight *w, moec_compute mode, void *scratch,
                             moec_err *err)
{
    moec_status st = moec_weight_check(w, err);
    if (st != MOEC_OK)
        return moec_within(err, st, "gemm");
    product p = {.kernel = moec__kernel(mode), .scratch = scratch, .k = w->cols, .rows = w->rows, .view = w};
    if (w->of->dtype == MOEC_F64)
        return moec_fail(err, MOEC_EINVAL, "gemm: weights are F64, expected a format of at most 32 bits");
    p.strip = w->col_step == 1 ? 1 : STRIP;
    p.step = w->storage == MOEC_GPTQ || w->storage == MOEC_PACKED || w->storage == MOEC_NESTED || w->storage == MOEC_BLOCKS ? 0
             : w->storage == MOEC_MXFP4 ? 1
                                        : 2 * moec_dtypes[w->of->dtype].bytes;
    p.stride = (size_t)w->row_step * (size_t)p.step / 2;
    if (w->rows > 0 && w->cols > 0) /* else `at` may be anything */
        p.w = (const char *)w->of->data + w->at * p.step / 2;
    if (w->storage == MOEC_PLAIN && w->col_step == 1 && w->paired == 0 && kernels_load(w->of->dtype)) {
        p.view = NULL;
        p.dtype = w->of->dtype;
    }
    return run(&p, y, x, n, err);
}

/* ---- panels ----------------------------------------------------------------------------------------------------- */

enum { HALF = 16 }; /* tokens and features of one transpose */

moec_transpose_fn *moec__transpose(void)
{
#if defined(__x86_64__)
    if (moec__isa() >= MOEC_ISA_AVX512)
        return moec__transpose_avx512;
#endif
    return moec__transpose_generic;
}

static moec_add_rows_fn *add_rows(void)
{
#if defined(__x86_64__)
    if (moec__isa() >= MOEC_ISA_AVX512)
        return moec__add_rows_avx512;
#endif
    return moec__add_rows_generic;
}

static int at_most(int64_t n, int most)
{
    return n < most ? (int)(n > 0 ? n : 0) : most;
}

void moec_panel_pack(float *out, const float *x, int64_t ldx, const int32_t *at, int64_t n, int64_t width)
{
    moec_transpose_fn *turn = moec__transpose();
    for (int64_t t0 = 0; t0 < n; t0 += MOEC_PANEL, out += width * MOEC_PANEL) {
        const float *row[MOEC_PANEL];
        int tokens = at_most(n - t0, MOEC_PANEL);
        for (int i = 0; i < tokens; i++)
            row[i] = x + (at ? at[t0 + i] : t0 + i) * ldx;
        /* 16 rows at a time: the hardware foresees that many streams, but not 32. */
        for (int h = 0; h < MOEC_PANEL; h += HALF)
            for (int64_t f = 0; f < width; f += HALF)
                turn(out + f * MOEC_PANEL + h, MOEC_PANEL, row + h, f, at_most(tokens - h, HALF),
                     at_most(width - f, HALF));
    }
}

/* Features [f, f+cols) of tokens [t, t+tokens) of a panel, both at most 16, to out[token*ldo + feature]. Always writes
 * 16 features. */
static void take_tile(float *out, int64_t ldo, moec_transpose_fn *turn, const float *panel, int64_t f, int cols, int t,
                      int tokens)
{
    const float *row[HALF];
    for (int i = 0; i < cols; i++)
        row[i] = panel + (f + i) * MOEC_PANEL;
    turn(out, ldo, row, t, cols, tokens);
}

void moec_panel_unpack(float *y, int64_t ldy, const float *panels, int64_t n, int64_t width)
{
    moec_transpose_fn *turn = moec__transpose();
    _Alignas(64) float tile[HALF * HALF];
    for (int64_t t0 = 0; t0 < n; t0 += HALF) {
        const float *panel = panels + t0 / MOEC_PANEL * width * MOEC_PANEL;
        int tokens = at_most(n - t0, HALF), t = (int)(t0 % MOEC_PANEL);
        int64_t f = 0;
        for (; f + HALF <= width; f += HALF)
            take_tile(y + t0 * ldy + f, ldy, turn, panel, f, HALF, t, tokens);
        if (f == width)
            continue;
        take_tile(tile, HALF, turn, panel, f, (int)(width - f), t, tokens);
        for (int i = 0; i < tokens; i++)
            memcpy(y + (t0 + i) * ldy + f, tile + i * HALF, (size_t)(width - f) * sizeof *y);
    }
}

void moec_panel_scatter_add(float *y, int64_t ldy, const int32_t *at, const float *scale, const float *panels,
                            int64_t n, int64_t width)
{
    moec_transpose_fn *turn = moec__transpose();
    moec_add_rows_fn *add = add_rows();
    _Alignas(64) float tile[HALF * HALF];
    for (int64_t t0 = 0; t0 < n; t0 += HALF) {
        const float *panel = panels + t0 / MOEC_PANEL * width * MOEC_PANEL;
        int tokens = at_most(n - t0, HALF);
        for (int64_t f = 0; f < width; f += HALF) {
            int cols = at_most(width - f, HALF);
            take_tile(tile, HALF, turn, panel, f, cols, (int)(t0 % MOEC_PANEL), tokens);
            if (at)
                add(y + f, ldy, at + t0, scale + t0, tile, tokens, cols);
            else
                add(y + t0 * ldy + f, ldy, NULL, scale + t0, tile, tokens, cols);
        }
    }
}
