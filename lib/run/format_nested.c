/* Nested codes (method/nested.h): one file that is read at 2, 3 .. bits. For a matrix [rows, cols] of b bits in groups of g columns
 *
 *     nested_base   U8 [rows, cols / 4]         codes of 2 bits
 *     nested_scales    [b - 1, rows, cols / g]  in the plan's type: of the base, of each plane
 *     nested_planes U8 [b - 2, rows, cols / 8]  a bit a value; not there where b is 2
 *
 * The layout is ours, and nested.md says it in full. No other program reads it. */
#include "base/mem.h"
#include "method/nested.h"
#include "run/format_parts.h"

#include <string.h>

static int pieces(moec_piece out[MOEC_PIECES], const moec_qgrid *g, int64_t rows, int64_t cols)
{
    out[0] = (moec_piece){"nested_base", MOEC_U8, 2, {rows, cols / 4}};
    out[1] = (moec_piece){"nested_scales", g->scale_type, 3, {g->bits - 1, rows, cols / g->group}};
    out[2] = (moec_piece){"nested_planes", MOEC_U8, 3, {g->bits - 2, rows, cols / 8}};
    return g->bits > MOEC_NESTED_LEAST ? 3 : 2;
}

/* n codes of `bits` bits, the first in the lowest. */
static void pack(unsigned char *out, const uint8_t *code, int64_t n, int bits)
{
    const int each = 8 / bits;
    for (int64_t i = 0; i < n / each; i++) {
        unsigned byte = 0;
        for (int k = 0; k < each; k++)
            byte |= (unsigned)code[i * each + k] << (k * bits);
        out[i] = (unsigned char)byte;
    }
}

static void unpack(uint8_t *code, const unsigned char *in, int64_t n, int bits)
{
    const int each = 8 / bits;
    for (int64_t i = 0; i < n; i++)
        code[i] = (uint8_t)(in[i / each] >> (i % each * bits) & ((1 << bits) - 1));
}

static void put_scales(unsigned char *to, const float *scale, int64_t n, moec_dtype type)
{
    for (int64_t i = 0; i < n; i++) {
        const uint16_t h = type == MOEC_BF16 ? moec_to_bf16(scale[i]) : moec_to_f16(scale[i]);
        if (type == MOEC_F32)
            memcpy(to + 4 * i, &scale[i], 4);
        else
            memcpy(to + 2 * i, &h, 2);
    }
}

static void write(void *const *piece, const moec_qcodes *c)
{
    const int64_t n = c->rows * c->cols, scales = c->rows * (c->cols / c->grid.group);
    const int64_t size = moec_dtypes[c->grid.scale_type].bytes;
    pack(piece[0], c->code, n, 2);
    put_scales(piece[1], c->scale, scales, c->grid.scale_type);
    for (int p = 0; p < c->planes; p++) {
        put_scales((unsigned char *)piece[1] + (p + 1) * scales * size, c->plane[p].scale, scales, c->grid.scale_type);
        pack((unsigned char *)piece[2] + p * (n / 8), c->plane[p].code, n, 1);
    }
}

static moec_status read(moec_qcodes *c, const void *const *piece, moec_err *err)
{
    const int64_t n = c->rows * c->cols, scales = c->rows * (c->cols / c->grid.group);
    const int64_t size = moec_dtypes[c->grid.scale_type].bytes;
    (void)err;
    unpack(c->code, piece[0], n, 2);
    moec_dtypes[c->grid.scale_type].to_f32(c->scale, piece[1], scales);
    for (int p = 0; p < c->planes; p++) {
        moec_dtypes[c->grid.scale_type].to_f32(c->plane[p].scale, (const unsigned char *)piece[1] + (p + 1) * scales * size, scales);
        unpack(c->plane[p].code, (const unsigned char *)piece[2] + p * (n / 8), n, 1);
    }
    return MOEC_OK;
}

static moec_weight view(const moec_tensor *const *piece, const moec_qgrid *g, int64_t rows, int64_t cols)
{
    return (moec_weight){.of = piece[0], .scale = piece[1], .zero = g->bits > MOEC_NESTED_LEAST ? piece[2] : NULL, .rows = rows,
                         .cols = cols, .row_step = cols, .col_step = 1, .block_cols = (int32_t)g->group, .storage = MOEC_NESTED,
                         .bits = (uint8_t)g->bits};
}

/* Widths and groups are what the shapes say; read_bits is for whoever wants less. */
static moec_status config(moec_json *root, const moec_plan *p, const moec_model *m, moec_err *err)
{
    moec_json *q = moec_json_new_object();
    int most = 0;
    (void)err;
    for (int64_t i = 0; i < p->n_layers * m->dims.experts * 3; i++)
        most = p->quant.expert[i] <= MOEC_QUANT_BITS && p->quant.expert[i] > most ? p->quant.expert[i] : most;
    moec_json_set(q, "quant_method", moec_json_new_string(moec__format_nested.quant_method));
    moec_json_set(q, "version", moec_json_new_int(1));
    moec_json_set(q, "bits", moec_json_new_int(most));
    moec_json_set(q, "group_size", moec_json_new_int(p->quant.group));
    moec_json_set(q, "read_bits", moec_json_new_int(0));
    moec_json_set(root, "quantization_config", q);
    return MOEC_OK;
}

const moec_qformat moec__format_nested = {
    .name = "nested",
    .quant_method = "moecompress-nested",
    .about = "a base of 2 bits and planes of 1 bit more each: one file that is read at any width up to its own, for offloading runtimes",
    .loads = "moecompress alone (eval --read-bits; lib/run/nested.md says the layout)",
    .widths = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8,
    .grain = MOEC_WIDTHS_PROJECTION,
    .nested = true,
    .own_names = true,
    .scale_type = MOEC_DTYPE_COUNT,
    .row_multiple = 1,
    .col_multiple = 8,
    .group_multiple = 8,
    .pieces = pieces,
    .write = write,
    .read = read,
    .view = view,
    .config = config,
};
