/* Reading and writing views of weights. Rows that lie in one piece are converted in place; a transposed matrix is read along
 * its lines, 16 columns of the view at a time, and turned in registers; quantized rows are decoded block by block. */
#include "num/weight.h"

#include "base/mem.h"
#include "num/blocks.h"
#include "num/gemm_kernel.h"
#include "num/simd.h"
#include "num/vec.h"
#include "num/weight_kernel.h"

#include <math.h>
#include <string.h>

enum {
    SIDE = 16,       /* of the square that moec_transpose_fn turns */
    SPREAD = 96,     /* view rows of a transposed matrix taken at once: whole cache lines even of bytes, but for the ends */
    NEAR = 4,        /* row steps up to this are read whole and thinned out */
    GATHER = 64,     /* values collected one by one before they are converted */
    SCALES = 64,     /* block scales of FP8 held as floats */
    LOOK = 96 * 64,  /* values examined at once */
};

/* ---- decoders --------------------------------------------------------------------------------------------------- */

void moec__fp8_generic(float *out, const unsigned char *in, int64_t n, float scale)
{
    moec_dtypes[MOEC_F8_E4M3].to_f32(out, in, n);
    for (int64_t i = 0; i < n; i++)
        out[i] *= scale;
}

static void mxfp4_generic(float *out, const unsigned char *codes, const unsigned char *scales, int64_t blocks)
{
    static const float e2m1[16] = MOEC_E2M1;
    for (int64_t b = 0; b < blocks; b++) {
        float scale = moec__e8m0(scales[b]), table[16];
        for (int i = 0; i < 16; i++)
            table[i] = e2m1[i] * scale;
        for (int i = 0; i < MOEC_MX / 2; i++) {
            unsigned char byte = codes[b * (MOEC_MX / 2) + i];
            out[b * MOEC_MX + 2 * i] = table[byte & 15];
            out[b * MOEC_MX + 2 * i + 1] = table[byte >> 4];
        }
    }
}

static const moec_decode *decode(void)
{
    static const moec_decode generic = {moec__fp8_generic, mxfp4_generic};
#if defined(__x86_64__)
    if (moec__isa() >= MOEC_ISA_AVX512)
        return &moec__decode_avx512;
    if (moec__isa() == MOEC_ISA_AVX2)
        return &moec__decode_avx2;
#endif
    return &generic;
}

/* ---- views ------------------------------------------------------------------------------------------------------ */

moec_weight moec_weight_of(const moec_tensor *t)
{
    moec_weight w = {.of = t, .rows = t ? 1 : 0, .cols = t ? 1 : 0, .col_step = 1};
    for (int i = 0; t && i + 1 < t->rank; i++)
        w.rows *= t->dim[i];
    if (t && t->rank > 0)
        w.cols = t->dim[t->rank - 1];
    w.row_step = w.cols;
    return w;
}

static bool in_streams(const moec_weight *w)
{
    return w->storage == MOEC_GPTQ || w->storage == MOEC_PACKED;
}

/* Values of a tensor: bytes hold two of MXFP4. */
static int64_t values_of(const moec_weight *w)
{
    if (w->storage == MOEC_NESTED || w->storage == MOEC_BLOCKS)
        return w->of->dim[0] * w->cols;
    if (in_streams(w))
        return w->of->dim[w->storage == MOEC_GPTQ] * w->cols;
    return w->storage == MOEC_MXFP4 ? (int64_t)w->of->bytes * 2
                                    : (int64_t)(w->of->bytes / (size_t)moec_dtypes[w->of->dtype].bytes);
}

/* at + rows*row_step + cols*col_step, or -1 where that is more than an int64_t holds. */
static int64_t place(const moec_weight *w, int64_t row, int64_t col)
{
    int64_t down, right, sum;
    if (__builtin_mul_overflow(row, w->row_step, &down) || __builtin_mul_overflow(col, w->col_step, &right) ||
        __builtin_add_overflow(down, right, &sum) || __builtin_add_overflow(sum, w->at, &sum))
        return -1;
    return sum;
}

/* Scales [first, end) of the view. */
typedef struct range {
    int64_t first, end;
} range;

static range scales_of(const moec_weight *w)
{
    if (w->storage == MOEC_MXFP4)
        return (range){w->at / MOEC_MX, place(w, w->rows - 1, w->cols - 1) / MOEC_MX + 1};
    int64_t row = w->at / w->row_step, last = (row + w->rows - 1) / w->block_rows;
    return (range){row / w->block_rows * w->scale_cols, last * w->scale_cols + (w->cols - 1) / w->block_cols + 1};
}

/* For a view whose values are inside the tensor. */
static bool scales_suffice(const moec_weight *w)
{
    int64_t n = (int64_t)(w->scale->bytes / (size_t)moec_dtypes[w->scale->dtype].bytes);
    if (w->storage == MOEC_FP8 && (w->at / w->row_step + w->rows - 1) / w->block_rows > n / w->scale_cols)
        return false; /* and the product in scales_of cannot overflow below */
    return scales_of(w).end <= n;
}

static bool plain_ok(const moec_weight *w)
{
    return moec_dtypes[w->of->dtype].to_f32 != NULL && w->of->dtype != MOEC_F8_E8M0;
}

static bool fp8_ok(const moec_weight *w)
{
    return w->of->dtype == MOEC_F8_E4M3 && w->scale && w->col_step == 1 && w->block_rows > 0 && w->block_cols > 0 &&
           w->row_step >= w->cols && w->row_step > 0 && w->at % w->row_step == 0 &&
           w->scale_cols > (w->cols - 1) / w->block_cols &&
           (w->scale->dtype == MOEC_F32 || w->scale->dtype == MOEC_BF16 || w->scale->dtype == MOEC_F16 ||
            w->scale->dtype == MOEC_F8_E8M0);
}

static bool mxfp4_ok(const moec_weight *w)
{
    return w->of->dtype == MOEC_U8 && w->scale && (w->scale->dtype == MOEC_U8 || w->scale->dtype == MOEC_F8_E8M0) &&
           w->col_step == 1 && w->at % MOEC_MX == 0 && w->row_step % MOEC_MX == 0 && w->cols % MOEC_MX == 0;
}

static bool is_float(const moec_tensor *t)
{
    return t->dtype == MOEC_F32 || t->dtype == MOEC_BF16 || t->dtype == MOEC_F16;
}

static bool has_form(const moec_tensor *t, int64_t rows, int64_t cols)
{
    return t->rank == 2 && t->dim[0] == rows && t->dim[1] == cols &&
           (uint64_t)t->bytes >= (uint64_t)rows * (uint64_t)cols * (uint64_t)moec_dtypes[t->dtype].bytes;
}

/* Codes, scales and zero points as both forms have them. Dimensions of a tensor have a product that its bytes hold. */
static bool streams_ok(const moec_weight *w)
{
    const bool gptq = w->storage == MOEC_GPTQ;
    const int64_t b = w->bits, group = w->block_cols;
    if (w->of->dtype != MOEC_I32 || w->of->rank != 2 || b < 1 || b > 8 || group < 1 || w->cols % group != 0 || !w->scale ||
        !is_float(w->scale) || w->col_step != 1 || w->row_step != w->cols || w->at % w->cols != 0 || w->cols > INT64_MAX / 16 ||
        w->zero_more > 1)
        return false;
    const int64_t rows = w->of->dim[gptq], words = (w->cols * b + 31) / 32, groups = w->cols / group;
    if (rows > INT64_MAX / 16 / w->cols || w->rows > rows || w->at / w->cols > rows - w->rows)
        return false;
    const int64_t zero_words = (rows * b + 31) / 32;
    if (gptq)
        return w->cols * b % 32 == 0 && has_form(w->of, words, rows) && has_form(w->scale, groups, rows) && w->zero &&
               w->zero->dtype == MOEC_I32 && rows * b % 32 == 0 && has_form(w->zero, groups, zero_words);
    return has_form(w->of, rows, words) && has_form(w->scale, rows, groups) &&
           (!w->zero || (w->zero->dtype == MOEC_I32 && has_form(w->zero, zero_words, groups)));
}

static bool has_layers(const moec_tensor *t, int64_t least, int64_t rows, int64_t cols)
{
    return t->rank == 3 && t->dim[0] >= least && t->dim[1] == rows && t->dim[2] == cols &&
           t->bytes / (size_t)moec_dtypes[t->dtype].bytes / (size_t)rows / (size_t)cols >= (size_t)t->dim[0];
}

static bool nested_ok(const moec_weight *w)
{
    const int64_t group = w->block_cols, more = (int64_t)w->bits - 2;
    if (w->of->dtype != MOEC_U8 || w->of->rank != 2 || more < 0 || more > 6 || group < 1 || w->cols % group != 0 || w->cols % 8 != 0 ||
        !w->scale || !is_float(w->scale) || w->col_step != 1 || w->row_step != w->cols || w->at % w->cols != 0)
        return false;
    const int64_t rows = w->of->dim[0];
    return rows <= INT64_MAX / 16 / w->cols && w->rows <= rows && w->at / w->cols <= rows - w->rows &&
           has_form(w->of, rows, w->cols / 4) && has_layers(w->scale, more + 1, rows, w->cols / group) &&
           (more == 0 || (w->zero && w->zero->dtype == MOEC_U8 && has_layers(w->zero, more, rows, w->cols / 8)));
}

static bool blocks_ok(const moec_weight *w)
{
    const int64_t bytes = w->block < MOEC_BLOCK_COUNT ? moec_blocks_bytes((moec_block)w->block, w->cols) : -1;
    return w->of->dtype == MOEC_U8 && w->of->rank == 2 && bytes > 0 && w->of->dim[0] >= 0 && w->col_step == 1 &&
           w->row_step == w->cols && w->at % w->cols == 0 && w->of->dim[0] <= INT64_MAX / 16 / w->cols &&
           has_form(w->of, w->of->dim[0], bytes);
}

static bool pairs_ok(const moec_weight *w)
{
    return w->paired == 0 || (w->paired > 0 && w->paired % 2 == 0 && w->rows % w->paired == 0 && w->col_step == 1 &&
                              (w->storage == MOEC_PLAIN || w->storage == MOEC_BLOCKS));
}

moec_status moec_weight_check(const moec_weight *w, moec_err *err)
{
    if (!w || !w->of)
        return moec_fail(err, MOEC_EINVAL, "weight: there is no such matrix");
    const char *name = w->of->name ? w->of->name : "weight";
    if (w->of->dtype >= MOEC_DTYPE_COUNT || (w->scale && w->scale->dtype >= MOEC_DTYPE_COUNT))
        return moec_fail(err, MOEC_EINVAL, "%s: of no known dtype", name);
    if (w->rows < 0 || w->cols < 0 || w->at < 0 || w->row_step < 0 || w->col_step < 0)
        return moec_fail(err, MOEC_EINVAL, "%s: [%lld, %lld] from %lld in steps of %lld and %lld, expected none below 0",
                         name, (long long)w->rows, (long long)w->cols, (long long)w->at, (long long)w->row_step,
                         (long long)w->col_step);
    if (w->rows == 0 || w->cols == 0)
        return MOEC_OK;
    bool ok = w->storage == MOEC_PLAIN ? plain_ok(w) : w->storage == MOEC_FP8     ? fp8_ok(w)
                                                     : w->storage == MOEC_MXFP4  ? mxfp4_ok(w)
                                                     : w->storage == MOEC_NESTED ? nested_ok(w)
                                                     : w->storage == MOEC_BLOCKS ? blocks_ok(w)
                                                                                 : in_streams(w) && streams_ok(w);
    if (!ok || !pairs_ok(w))
        return moec_fail(err, MOEC_EINVAL, "%s: %s [%lld, %lld] is no view of storage %d that values can be read from", name,
                         moec_dtypes[w->of->dtype].name, (long long)w->rows, (long long)w->cols, (int)w->storage);
    int64_t last = place(w, w->rows - 1, w->cols - 1);
    if (last < 0 || last >= values_of(w))
        return moec_fail(err, MOEC_EINVAL, "%s: [%lld, %lld] from %lld on reaches beyond its %lld values", name,
                         (long long)w->rows, (long long)w->cols, (long long)w->at, (long long)values_of(w));
    if ((w->storage == MOEC_FP8 || w->storage == MOEC_MXFP4) && !scales_suffice(w))
        return moec_fail(err, MOEC_EINVAL, "%s: %s [%lld, %lld] needs more scales than its tensor of %zu bytes has", name,
                         moec_dtypes[w->of->dtype].name, (long long)w->rows, (long long)w->cols, w->scale->bytes);
    return MOEC_OK;
}

/* ---- plain ------------------------------------------------------------------------------------------------------ */

/* A block of a view and where it goes. */
typedef struct block {
    float *out;
    int64_t ld, r, rows, c, cols;
} block;

static const unsigned char *at_value(const moec_weight *w, int64_t r, int64_t c)
{
    int64_t i = w->at + r * w->row_step + c * w->col_step;
    return (const unsigned char *)w->of->data + i * moec_dtypes[w->of->dtype].bytes;
}

static void read_rows(const block *b, const moec_weight *w)
{
    for (int64_t i = 0; i < b->rows; i++) {
        const unsigned char *from = at_value(w, b->r + i, b->c);
        if (w->of->dtype == MOEC_F8_E4M3)
            decode()->fp8(b->out + i * b->ld, from, b->cols, 1.0F);
        else
            moec_dtypes[w->of->dtype].to_f32(b->out + i * b->ld, from, b->cols);
    }
}

/* View column c from row r on: n values that lie up to NEAR apart. */
static void take_line(float *line, const moec_weight *w, int64_t r, int64_t c, int n)
{
    float wide[NEAR * SPREAD];
    int step = n > 1 ? (int)w->row_step : 1;
    moec_dtypes[w->of->dtype].to_f32(step == 1 ? line : wide, at_value(w, r, c), (int64_t)(n - 1) * step + 1);
    if (step == 2)
        for (int i = 0; i < n; i++)
            line[i] = wide[2 * i];
    else if (step > 2)
        for (int i = 0; i < n; i++)
            line[i] = wide[step * i];
}

/* Turns n <= SPREAD rows of m <= SIDE lines into place. */
static void put_lines(float *out, int64_t ld, float (*line)[SPREAD], int m, int n)
{
    moec_transpose_fn *turn = moec__transpose();
    _Alignas(64) float tile[SIDE * SIDE];
    const float *in[SIDE];
    for (int j = 0; j < SIDE; j++)
        in[j] = line[j];
    for (int i = 0; i < n; i += SIDE) {
        int rows = n - i < SIDE ? n - i : SIDE;
        if (m == SIDE) {
            turn(out + i * ld, ld, in, i, m, rows);
            continue;
        }
        turn(tile, SIDE, in, i, m, rows);
        for (int k = 0; k < rows; k++)
            memcpy(out + (i + k) * ld, tile + k * SIDE, (size_t)m * sizeof *out);
    }
}

/* Lines lie far apart, mostly on pages of their own, where no hardware foresees them: each is asked for while the one that
 * lies SIDE columns before it is converted. */
static void read_turned(const block *b, const moec_weight *w)
{
    _Alignas(64) float line[SIDE][SPREAD];
    int64_t size = moec_dtypes[w->of->dtype].bytes;
    for (int64_t r = 0; r < b->rows; r += SPREAD) {
        int n = b->rows - r < SPREAD ? (int)(b->rows - r) : SPREAD;
        int64_t bytes = ((n - 1) * w->row_step + 1) * size;
        for (int64_t c = 0; c < b->cols; c += SIDE) {
            int m = b->cols - c < SIDE ? (int)(b->cols - c) : SIDE;
            for (int j = 0; j < m; j++) {
                if (b->c + c + j + SIDE < w->cols) {
                    const unsigned char *soon = at_value(w, b->r + r, b->c + c + j + SIDE);
                    for (int64_t i = 0; i < bytes; i += 64)
                        __builtin_prefetch(soon + i);
                    __builtin_prefetch(soon + bytes - 1);
                }
                take_line(line[j], w, b->r + r, b->c + c + j, n);
            }
            put_lines(b->out + r * b->ld + c, b->ld, line, m, n);
        }
    }
}

static void read_scattered(const block *b, const moec_weight *w)
{
    unsigned char raw[GATHER * sizeof(double)];
    size_t size = (size_t)moec_dtypes[w->of->dtype].bytes;
    for (int64_t i = 0; i < b->rows; i++)
        for (int64_t c = 0; c < b->cols; c += GATHER) {
            int n = b->cols - c < GATHER ? (int)(b->cols - c) : GATHER;
            for (int j = 0; j < n; j++)
                memcpy(raw + (size_t)j * size, at_value(w, b->r + i, b->c + c + j), size);
            moec_dtypes[w->of->dtype].to_f32(b->out + i * b->ld + c, raw, n);
        }
}

/* ---- quantized -------------------------------------------------------------------------------------------------- */

static void read_fp8(const block *b, const moec_weight *w)
{
    const moec_dtype_traits *kind = &moec_dtypes[w->scale->dtype];
    const moec_decode *d = decode();
    float scale[SCALES];
    int64_t row0 = w->at / w->row_step + b->r, end = b->c + b->cols;
    for (int64_t c = b->c; c < end;) { /* as many columns as there is room for scales */
        int64_t first = c / w->block_cols, stop = (first + SCALES) * w->block_cols, known = -1;
        stop = stop < end ? stop : end;
        for (int64_t i = 0; i < b->rows; i++) {
            int64_t band = (row0 + i) / w->block_rows, edge = first * w->block_cols;
            const unsigned char *from = at_value(w, b->r + i, 0);
            if (band != known)
                kind->to_f32(scale, (const char *)w->scale->data + (band * w->scale_cols + first) * kind->bytes,
                             (stop - 1) / w->block_cols - first + 1);
            known = band;
            for (int64_t at = c, s = 0; at < stop; at = edge, s++) {
                edge = edge + w->block_cols < stop ? edge + w->block_cols : stop;
                d->fp8(b->out + i * b->ld + (at - b->c), from + at, edge - at, scale[s]);
            }
        }
        c = stop;
    }
}

static void read_mxfp4(const block *b, const moec_weight *w)
{
    const moec_decode *d = decode();
    const unsigned char *codes = w->of->data, *scales = w->scale->data;
    float part[MOEC_MX];
    for (int64_t i = 0; i < b->rows; i++) {
        int64_t at = w->at + (b->r + i) * w->row_step + b->c, end = at + b->cols;
        float *out = b->out + i * b->ld;
        while (at < end) {
            int64_t mx = at / MOEC_MX, skip = at % MOEC_MX, whole = (end - at) / MOEC_MX;
            if (skip == 0 && whole > 0) {
                d->mxfp4(out, codes + mx * (MOEC_MX / 2), scales + mx, whole);
                out += whole * MOEC_MX;
                at += whole * MOEC_MX;
                continue;
            }
            int64_t n = MOEC_MX - skip < end - at ? MOEC_MX - skip : end - at;
            d->mxfp4(part, codes + mx * (MOEC_MX / 2), scales + mx, 1);
            memcpy(out, part + skip, (size_t)n * sizeof *out);
            out += n;
            at += n;
        }
    }
}

/* Codes of the block of 32 whose first word is words[0], `step` words apart. */
static inline void unpack(uint8_t *code, const unsigned char *words, int64_t step, int64_t n, int bits)
{
    uint32_t word[9] = {0};
    for (int64_t i = 0; i < n; i++)
        memcpy(&word[i], words + 4 * i * step, 4);
    for (int i = 0; i < 32; i++) {
        const int at = i * bits, k = at / 32, shift = at % 32;
        code[i] = (uint8_t)(((((uint64_t)word[k + 1] << 32) | word[k]) >> shift) & ((1u << bits) - 1));
    }
}

static void unpack_by(uint8_t *code, const unsigned char *words, int64_t step, int64_t n, int bits)
{
    switch (bits) { /* so that shifts are constants */
    case 2: unpack(code, words, step, n, 2); break;
    case 3: unpack(code, words, step, n, 3); break;
    case 4: unpack(code, words, step, n, 4); break;
    case 8: unpack(code, words, step, n, 8); break;
    default: unpack(code, words, step, n, bits);
    }
}

/* Number i of a stream whose words lie `step` words apart. */
static int code_at(const unsigned char *words, int64_t step, int64_t i, int bits)
{
    uint32_t low, high = 0;
    const int64_t k = i * bits / 32;
    const int shift = (int)(i * bits % 32);
    memcpy(&low, words + 4 * k * step, 4);
    if (shift + bits > 32)
        memcpy(&high, words + 4 * (k + 1) * step, 4);
    return (int)(((((uint64_t)high << 32) | low) >> shift) & ((1u << bits) - 1));
}

/* Scale and zero point of group j of row r of the tensor. */
static void grid_at(float *scale, float *zero, const moec_weight *w, int64_t r, int64_t j)
{
    const bool gptq = w->storage == MOEC_GPTQ;
    const moec_dtype_traits *kind = &moec_dtypes[w->scale->dtype];
    const int64_t i = gptq ? j * w->scale->dim[1] + r : r * w->scale->dim[1] + j;
    kind->to_f32(scale, (const char *)w->scale->data + i * kind->bytes, 1);
    int z = 1 << (w->bits - 1);
    if (w->zero) {
        const unsigned char *data = w->zero->data;
        z = gptq ? code_at(data + 4 * j * w->zero->dim[1], 1, r, w->bits) : code_at(data + 4 * j, w->zero->dim[1], r, w->bits);
        z = (z + w->zero_more) & ((1 << w->bits) - 1);
    }
    *zero = (float)z;
}

static void read_streams(const block *b, const moec_weight *w)
{
    const bool gptq = w->storage == MOEC_GPTQ;
    const int64_t row0 = w->at / w->cols + b->r, end = b->c + b->cols, bits = w->bits, words = (w->cols * bits + 31) / 32;
    const int64_t step = gptq ? w->of->dim[1] : 1;
    uint8_t code[32];
    float scale = 0.0F, zero = 0.0F;
    for (int64_t at = b->c / 32 * 32; at < end; at += 32) {
        const int64_t first = at * bits / 32, n = words - first < bits ? words - first : bits;
        const int64_t lo = at < b->c ? b->c : at, hi = at + 32 < end ? at + 32 : end;
        for (int64_t i = 0; i < b->rows; i++) {
            const int64_t word = gptq ? first * step + row0 + i : (row0 + i) * words + first;
            float *out = b->out + i * b->ld - b->c;
            unpack_by(code, (const unsigned char *)w->of->data + 4 * word, step, n, w->bits);
            for (int64_t c = lo, stop; c < hi; c = stop) { /* group by group */
                const int64_t group = c / w->block_cols;
                stop = (group + 1) * w->block_cols < hi ? (group + 1) * w->block_cols : hi;
                grid_at(&scale, &zero, w, row0 + i, group);
                for (int64_t k = c; k < stop; k++)
                    out[k] = scale * ((float)code[k - at] - zero);
            }
        }
    }
}

/* Scales of `layer` of groups [first, end) of row r of the tensor, SCALES at most. */
static void nested_scales(float *out, const moec_weight *w, int64_t layer, int64_t r, int64_t first, int64_t end)
{
    const moec_dtype_traits *kind = &moec_dtypes[w->scale->dtype];
    const int64_t i = (layer * w->scale->dim[1] + r) * w->scale->dim[2] + first;
    kind->to_f32(out, (const char *)w->scale->data + i * kind->bytes, end - first);
}

/* Columns [c, stop) of row r of the tensor, whose groups have room in `scale`. */
static void read_nested_row(float *out, const moec_weight *w, int64_t r, int64_t c, int64_t stop)
{
    float scale[SCALES];
    const int64_t group = w->block_cols, first = c / group, end = (stop - 1) / group + 1;
    const unsigned char *base = (const unsigned char *)w->of->data + r * (w->cols / 4);
    nested_scales(scale, w, 0, r, first, end);
    for (int64_t k = c; k < stop; k++)
        out[k - c] = scale[k / group - first] * (float)((base[k / 4] >> (2 * (k % 4)) & 3) - 2);
    for (int64_t p = 1; p <= w->bits - 2; p++) {
        const unsigned char *plane = (const unsigned char *)w->zero->data + ((p - 1) * w->zero->dim[1] + r) * (w->cols / 8);
        nested_scales(scale, w, p, r, first, end);
        for (int64_t k = c; k < stop; k++)
            out[k - c] += scale[k / group - first] * ((float)(plane[k / 8] >> (k % 8) & 1) - 0.5F);
    }
}

static void read_nested(const block *b, const moec_weight *w)
{
    const int64_t row0 = w->at / w->cols + b->r, end = b->c + b->cols;
    for (int64_t i = 0; i < b->rows; i++)
        for (int64_t c = b->c, stop; c < end; c = stop) {
            stop = (c / w->block_cols + SCALES) * w->block_cols;
            stop = stop < end ? stop : end;
            read_nested_row(b->out + i * b->ld + (c - b->c), w, row0 + i, c, stop);
        }
}

/* A block whose ends are not wanted goes through a buffer. */
static void read_blocks(const block *b, const moec_weight *w)
{
    enum { MOST = 256 };
    const moec_block type = (moec_block)w->block;
    const int64_t each = moec_blocks[type].elements, row0 = w->at / w->cols + b->r;
    float part[MOST];
    for (int64_t i = 0; i < b->rows; i++) {
        const unsigned char *row = (const unsigned char *)w->of->data + (row0 + i) * moec_blocks_bytes(type, w->cols);
        float *out = b->out + i * b->ld;
        for (int64_t at = b->c, end = b->c + b->cols, n; at < end; at += n, out += n) {
            const int64_t skip = at % each, whole = (end - at) / each * each;
            const unsigned char *from = row + at / each * moec_blocks[type].bytes;
            n = skip == 0 && whole > 0 ? whole : each - skip < end - at ? each - skip : end - at;
            if (skip == 0 && whole > 0) {
                (void)!moec_blocks_read(out, from, whole, type, NULL); /* whole blocks: nothing can fail */
            } else {
                (void)!moec_blocks_read(part, from, each, type, NULL);
                memcpy(out, part + skip, (size_t)n * sizeof *out);
            }
        }
    }
}

/* Row by row, each from where it lies. */
static void read_paired(const block *b, const moec_weight *w)
{
    moec_weight one = *w;
    one.paired = 0;
    for (int64_t i = 0; i < b->rows; i++) {
        const int64_t r = b->r + i, in = r % w->paired, half = w->paired / 2;
        moec_weight_read(b->out + i * b->ld, b->ld, &one, r - in + in % half * 2 + in / half, 1, b->c, b->cols);
    }
}

void moec_weight_read(float *out, int64_t ld, const moec_weight *w, int64_t r, int64_t rows, int64_t c, int64_t cols)
{
    const block b = {out, ld, r, rows, c, cols};
    if (rows <= 0 || cols <= 0)
        return;
    if (w->paired > 0)
        read_paired(&b, w);
    else if (w->storage == MOEC_BLOCKS)
        read_blocks(&b, w);
    else if (w->storage == MOEC_FP8)
        read_fp8(&b, w);
    else if (w->storage == MOEC_MXFP4)
        read_mxfp4(&b, w);
    else if (w->storage == MOEC_NESTED)
        read_nested(&b, w);
    else if (in_streams(w))
        read_streams(&b, w);
    else if (w->col_step == 1 || cols == 1)
        read_rows(&b, w);
    else if (w->row_step > 0 && w->row_step <= NEAR && rows > 1)
        read_turned(&b, w);
    else
        read_scattered(&b, w);
}

moec_status moec_weight_read_all(float *out, const moec_weight *w, moec_err *err)
{
    for (int64_t r = 0; r < w->rows; r += SPREAD)
        moec_weight_read(out + r * w->cols, w->cols, w, r, w->rows - r < SPREAD ? w->rows - r : SPREAD, 0, w->cols);
    if (!moec_all_finite(out, w->rows * w->cols))
        return moec_fail(err, MOEC_ENUMERIC, "tensor %s: a value is NaN or infinite", w->of->name);
    return MOEC_OK;
}

/* ---- writing ---------------------------------------------------------------------------------------------------- */

/* One value as its tensor holds it; false: it cannot. */
static bool put_value(unsigned char *to, moec_dtype dtype, float v)
{
    if (!isfinite(v))
        return false;
    if (dtype == MOEC_F32) {
        memcpy(to, &v, sizeof v);
        return true;
    }
    const uint16_t h = dtype == MOEC_BF16 ? moec_to_bf16(v) : moec_to_f16(v);
    if ((h & 0x7fff) == (dtype == MOEC_BF16 ? 0x7f80 : 0x7c00)) /* rounded up to infinity */
        return false;
    memcpy(to, &h, sizeof h);
    return true;
}

moec_status moec_weight_write(const moec_weight *w, const float *in, int64_t ld, int64_t r, int64_t rows, int64_t c,
                              int64_t cols, moec_err *err)
{
    const char *name = w->of->name ? w->of->name : "weight";
    const moec_dtype dtype = w->of->dtype;
    if (w->storage != MOEC_PLAIN || w->paired > 0 || (dtype != MOEC_F32 && dtype != MOEC_BF16 && dtype != MOEC_F16))
        return moec_fail(err, MOEC_EINVAL, "tensor %s: values can be written as plain F32, BF16 and F16 only", name);
    const int64_t step = w->col_step * moec_dtypes[dtype].bytes;
    for (int64_t i = 0; i < rows; i++) {
        unsigned char *to = (unsigned char *)w->of->data + (w->at + (r + i) * w->row_step + c * w->col_step) *
                                                               (int64_t)moec_dtypes[dtype].bytes;
        for (int64_t j = 0; j < cols; j++)
            if (!put_value(to + j * step, dtype, in[i * ld + j]))
                return moec_fail(err, MOEC_ENUMERIC, "tensor %s: %g at (%lld, %lld) is no %s value", name,
                                 (double)in[i * ld + j], (long long)(r + i), (long long)(c + j), moec_dtypes[dtype].name);
    }
    return MOEC_OK;
}

/* ---- looking, counting, paging ---------------------------------------------------------------------------------- */

/* Formats in which a value is finite exactly when its bits say so. Of the others the float32 value counts, the product with
 * the scale included, since that is what computing takes. */
static bool seen_in_bits(const moec_weight *w)
{
    moec_dtype d = w->of->dtype;
    return w->storage == MOEC_PLAIN && w->col_step == 1 && w->paired == 0 &&
           (d == MOEC_F32 || d == MOEC_F16 || d == MOEC_BF16 || d == MOEC_F8_E4M3 || d == MOEC_F8_E5M2);
}

static int64_t nonfinite_bits(const moec_weight *w)
{
    bool whole = w->row_step == w->cols;
    int64_t rows = whole ? 1 : w->rows, cols = whole ? w->rows * w->cols : w->cols;
    for (int64_t r = 0; r < rows; r++) {
        moec_tensor row = {.dtype = w->of->dtype, .data = at_value(w, r, 0),
                           .bytes = (size_t)cols * (size_t)moec_dtypes[w->of->dtype].bytes};
        int64_t bad = moec_tensor_nonfinite(&row);
        if (bad >= 0)
            return r * cols + bad;
    }
    return -1;
}

/* The first bad value of rows [r, end), in which there is one. */
static int64_t first_of(const moec_weight *w, int64_t r, int64_t end, float *buf)
{
    for (; r < end; r++)
        for (int64_t c = 0; c < w->cols; c += LOOK) {
            int64_t n = w->cols - c < LOOK ? w->cols - c : LOOK;
            moec_weight_read(buf, n, w, r, 1, c, n);
            for (int64_t i = 0; i < n; i++)
                if (!isfinite(buf[i]))
                    return r * w->cols + c + i;
        }
    return -1;
}

int64_t moec_weight_nonfinite(const moec_weight *w)
{
    _Alignas(64) float buf[LOOK];
    if (!w->of || w->rows <= 0 || w->cols <= 0 || (w->storage == MOEC_PLAIN && !moec_dtypes[w->of->dtype].to_f32))
        return -1;
    if (seen_in_bits(w))
        return nonfinite_bits(w);
    int64_t tall = w->col_step == 1 ? 4 : SPREAD, wide = LOOK / tall;
    for (int64_t r = 0; r < w->rows; r += tall) {
        int64_t rows = w->rows - r < tall ? w->rows - r : tall;
        for (int64_t c = 0; c < w->cols; c += wide) {
            int64_t cols = w->cols - c < wide ? w->cols - c : wide;
            moec_weight_read(buf, cols, w, r, rows, c, cols);
            if (!moec_all_finite(buf, rows * cols))
                return first_of(w, r, r + rows, buf);
        }
    }
    return -1;
}

uint64_t moec_weight_bytes(const moec_weight *w)
{
    if (!w->of || w->rows <= 0 || w->cols <= 0)
        return 0;
    if (in_streams(w)) {
        const uint64_t all = (uint64_t)w->of->dim[w->storage == MOEC_GPTQ];
        return (w->of->bytes + w->scale->bytes + (w->zero ? w->zero->bytes : 0)) * (uint64_t)w->rows / (all ? all : 1);
    }
    if (w->storage == MOEC_BLOCKS)
        return (uint64_t)w->rows * (uint64_t)moec_blocks_bytes((moec_block)w->block, w->cols);
    uint64_t values = (uint64_t)w->rows * (uint64_t)w->cols;
    if (w->storage == MOEC_NESTED)
        return values / 8 * w->bits + values / (uint64_t)w->block_cols * (uint64_t)(w->bits - 1) *
                                          (uint64_t)moec_dtypes[w->scale->dtype].bytes;
    if (w->storage == MOEC_MXFP4)
        return values / 2 + values / MOEC_MX;
    uint64_t bytes = values * (uint64_t)moec_dtypes[w->of->dtype].bytes;
    if (w->storage == MOEC_PLAIN)
        return bytes;
    int64_t row = w->at / w->row_step;
    int64_t down = (row + w->rows - 1) / w->block_rows - row / w->block_rows + 1, right = (w->cols - 1) / w->block_cols + 1;
    return bytes + (uint64_t)down * (uint64_t)right * (uint64_t)moec_dtypes[w->scale->dtype].bytes;
}

static void for_pages(const moec_weight *w, void (*advise)(const void *at, size_t n))
{
    if (!w->of || w->rows <= 0 || w->cols <= 0)
        return;
    if (in_streams(w)) { /* streams of all rows lie in turns, or these are small */
        advise(w->of->data, w->of->bytes);
        advise(w->scale->data, w->scale->bytes);
        if (w->zero)
            advise(w->zero->data, w->zero->bytes);
        return;
    }
    if (w->storage == MOEC_NESTED) { /* of planes those that are read */
        advise(w->of->data, w->of->bytes);
        advise(w->scale->data, w->scale->bytes);
        if (w->bits > 2)
            advise(w->zero->data, w->zero->bytes / (size_t)w->zero->dim[0] * (size_t)(w->bits - 2));
        return;
    }
    if (w->storage == MOEC_BLOCKS) {
        const int64_t row = moec_blocks_bytes((moec_block)w->block, w->cols);
        advise((const char *)w->of->data + w->at / w->cols * row, (size_t)(w->rows * row));
        return;
    }
    int64_t last = place(w, w->rows - 1, w->cols - 1), size = moec_dtypes[w->of->dtype].bytes;
    if (w->storage == MOEC_MXFP4)
        advise((const char *)w->of->data + w->at / 2, (size_t)(last / 2 - w->at / 2 + 1));
    else
        advise((const char *)w->of->data + w->at * size, (size_t)((last - w->at + 1) * size));
    if (w->storage != MOEC_PLAIN) {
        range s = scales_of(w);
        size = moec_dtypes[w->scale->dtype].bytes;
        advise((const char *)w->scale->data + s.first * size, (size_t)((s.end - s.first) * size));
    }
}

void moec_weight_drop(const moec_weight *w)
{
    for_pages(w, moec_pages_drop);
}

void moec_weight_prefetch(const moec_weight *w)
{
    for_pages(w, moec_pages_prefetch);
}
