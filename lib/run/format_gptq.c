/* GPTQ's tensors: for a matrix [rows, cols] in groups of g columns
 *
 *     qweight I32 [cols b / 32, rows]    codes in streams (num/bits.h) along the columns, one for each row
 *     qzeros  I32 [cols / g, rows b / 32] zero points in streams along the rows: less one, 2^(b-1) - 1 throughout; with zero points
 *                                        as they are
 *     scales  F16 [cols / g, rows]
 *     g_idx   I32 [cols]                 c / g; of gptq-dynamic and gptq-server, whose readers may ask for it
 *
 * Source: AutoGPTQ's first format ("gptq", zero points less one) and its second ("gptq_v2"), as GPTQModel 7 and auto-round 0.16.1
 * read them. In the first a zero point of 0 would wrap, so none are written there but the middle. auto-round does not ask for g_idx.
 * 1, 5, 6 and 7 bits have no kernel that is found everywhere. */
#include "base/mem.h"
#include "num/bits.h"
#include "run/format_parts.h"

#include <stdio.h>
#include <string.h>

enum { BLOCK = 32, AS_IT_IS = 16 };

static int pieces(moec_piece out[MOEC_PIECES], const moec_qgrid *g, int64_t rows, int64_t cols)
{
    out[0] = (moec_piece){"qweight", MOEC_I32, 2, {cols / BLOCK * g->bits, rows}};
    out[1] = (moec_piece){"qzeros", MOEC_I32, 2, {cols / g->group, rows / BLOCK * g->bits}};
    out[2] = (moec_piece){"scales", MOEC_F16, 2, {cols / g->group, rows}};
    return 3;
}

static int pieces_ordered(moec_piece out[MOEC_PIECES], const moec_qgrid *g, int64_t rows, int64_t cols)
{
    const int n = pieces(out, g, rows, cols);
    out[n] = (moec_piece){"g_idx", MOEC_I32, 1, {cols}};
    return n + 1;
}

/* What qzeros says of rows [32 k, 32 k + 32) in group j. */
static void zeros_of(uint8_t out[BLOCK], const moec_qcodes *c, int64_t k, int64_t j)
{
    const int64_t groups = c->cols / c->grid.group;
    memset(out, (1 << (c->grid.bits - 1)) - 1, BLOCK);
    for (int64_t i = 0; c->grid.zeros && i < BLOCK; i++)
        out[i] = c->zero[(k * BLOCK + i) * groups + j];
}

static void write(void *const *piece, const moec_qcodes *c)
{
    const int bits = c->grid.bits;
    const int64_t rows = c->rows, groups = c->cols / c->grid.group, blocks = rows / BLOCK;
    unsigned char *weight = piece[0], *zero = piece[1], *scale = piece[2];
    uint32_t word[8];
    uint8_t point[BLOCK];
    for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < c->cols / BLOCK; k++) {
            moec_bits_pack(word, c->code + r * c->cols + k * BLOCK, BLOCK, bits);
            for (int i = 0; i < bits; i++)
                memcpy(weight + 4 * ((k * bits + i) * rows + r), &word[i], 4);
        }
    for (int64_t k = 0; k < groups * blocks; k++) {
        zeros_of(point, c, k % blocks, k / blocks);
        moec_bits_pack(word, point, BLOCK, bits);
        memcpy(zero + 4 * k * bits, word, 4 * (size_t)bits);
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < groups; j++) {
            const uint16_t s = moec_to_f16(c->scale[r * groups + j]);
            memcpy(scale + 2 * (j * rows + r), &s, 2);
        }
}

static void write_ordered(void *const *piece, const moec_qcodes *c)
{
    unsigned char *order = piece[3];
    write(piece, c);
    for (int64_t i = 0; i < c->cols; i++) {
        const int32_t group = (int32_t)(i / c->grid.group);
        memcpy(order + 4 * i, &group, 4);
    }
}

static moec_status read_zeros(moec_qcodes *c, const unsigned char *zero, moec_err *err)
{
    const int bits = c->grid.bits;
    const int64_t groups = c->cols / c->grid.group, blocks = c->rows / BLOCK;
    uint32_t word[8], want[8];
    uint8_t point[BLOCK];
    memset(point, (1 << (bits - 1)) - 1, sizeof point);
    moec_bits_pack(want, point, BLOCK, bits);
    for (int64_t k = 0; k < groups * blocks; k++) {
        memcpy(word, zero + 4 * k * bits, 4 * (size_t)bits);
        if (!c->grid.zeros && memcmp(word, want, 4 * (size_t)bits) != 0)
            return moec_fail(err, MOEC_EFORMAT, "qzeros: a zero point that is not the middle of %d bits", bits);
        moec_bits_unpack(point, word, BLOCK, bits);
        for (int64_t i = 0; c->grid.zeros && i < BLOCK; i++)
            c->zero[(k % blocks * BLOCK + i) * groups + k / blocks] = point[i];
    }
    return MOEC_OK;
}

static moec_status read(moec_qcodes *c, const void *const *piece, moec_err *err)
{
    const int bits = c->grid.bits;
    const int64_t rows = c->rows, groups = c->cols / c->grid.group;
    const unsigned char *weight = piece[0], *scale = piece[2];
    uint32_t word[8];
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t k = 0; k < c->cols / BLOCK; k++) {
            for (int i = 0; i < bits; i++)
                memcpy(&word[i], weight + 4 * ((k * bits + i) * rows + r), 4);
            moec_bits_unpack(c->code + r * c->cols + k * BLOCK, word, BLOCK, bits);
        }
        for (int64_t j = 0; j < groups; j++)
            moec_dtypes[MOEC_F16].to_f32(&c->scale[r * groups + j], scale + 2 * (j * rows + r), 1);
    }
    return read_zeros(c, piece[1], err);
}

static moec_status read_ordered(moec_qcodes *c, const void *const *piece, moec_err *err)
{
    const unsigned char *order = piece[3];
    for (int64_t i = 0; i < c->cols; i++) {
        int32_t group;
        memcpy(&group, order + 4 * i, 4);
        if (group != i / c->grid.group)
            return moec_fail(err, MOEC_EFORMAT, "g_idx: column %lld is in group %ld, expected %lld", (long long)i, (long)group,
                             (long long)(i / c->grid.group));
    }
    return read(c, piece, err);
}

static moec_weight view(const moec_tensor *const *piece, const moec_qgrid *g, int64_t rows, int64_t cols)
{
    return (moec_weight){.of = piece[0], .scale = piece[2], .zero = piece[1], .rows = rows, .cols = cols, .row_step = cols,
                         .col_step = 1, .block_cols = (int32_t)g->group, .storage = MOEC_GPTQ, .bits = (uint8_t)g->bits,
                         .zero_more = !g->zeros};
}

/* --- config.json ----------------------------------------------------------------------------------------------------- */

static moec_json *width(const moec_rule *r)
{
    moec_json *o = moec_json_new_object();
    moec_json_set(o, "bits", moec_json_new_int(r->bits));
    if (r->bits != AS_IT_IS)
        moec_json_set(o, "group_size", moec_json_new_int(r->group));
    return o;
}

static moec_json *common(const moec_plan *p, const moec_model *m, const moec_rules *rules, const char *method)
{
    moec_json *q = moec_json_new_object();
    const int bits = moec__usual_bits(p, m);
    int64_t group = 0;
    for (size_t i = 0; i < rules->n; i++)
        group = group == 0 && rules->at[i].experts && rules->at[i].bits == bits ? rules->at[i].group : group;
    moec_json_set(q, "quant_method", moec_json_new_string(method));
    moec_json_set(q, "bits", moec_json_new_int(bits));
    moec_json_set(q, "group_size", moec_json_new_int(group));
    moec_json_set(q, "sym", moec_json_new_bool(!p->quant.zeros));
    return q;
}

/* AutoRound's: of extra_config the first pattern that is found in a module's name counts, so that the last one leaves everything
 * else as it is: attention, routers, shared experts and their gates. */
static moec_status config_rounded(moec_json *root, const moec_plan *p, const moec_model *m, moec_err *err)
{
    moec_rules rules;
    moec_status st = moec__rules_of(&rules, p, m, err);
    if (st != MOEC_OK)
        return st;
    moec_json *q = common(p, m, &rules, moec__format_gptq.quant_method), *extra = moec_json_new_object(), *rest = moec_json_new_object();
    moec_json_set(q, "packing_format", moec_json_new_string(p->quant.zeros ? "auto_round:gptqmodel" : "auto_round:auto_gptq"));
    moec_json_set(q, "data_type", moec_json_new_string("int"));
    moec_json_set(q, "autoround_version", moec_json_new_string("0.16.1"));
    moec_json_set(q, "block_name_to_quantize", moec_json_new_string("model.layers"));
    for (size_t i = 0; i < rules.n; i++)
        moec_json_set(extra, rules.at[i].pattern, width(&rules.at[i]));
    moec_json_set(rest, "bits", moec_json_new_int(AS_IT_IS));
    moec_json_set(extra, ".*", rest);
    moec_json_set(q, "extra_config", extra);
    moec_json_set(root, "quantization_config", q);
    moec__rules_release(&rules);
    return MOEC_OK;
}

/* "-:^(?!EXPERTS(?:\.|$)|Q|..)": what is neither an expert nor one of the quantized others. */
static moec_status rest_pattern(char **out, const moec_plan *p, const moec_rules *rules, moec_err *err)
{
    char *experts = NULL;
    moec_status st = moec__experts_pattern(&experts, p, err);
    if (st == MOEC_OK)
        st = moec_format(out, err, "-:^(?!%s(?:\\.|$)", experts);
    moec_free(experts);
    for (size_t i = 0; st == MOEC_OK && i < rules->n; i++) {
        char *was = *out;
        if (rules->at[i].experts)
            continue;
        st = moec_format(out, err, "%s|%s", was, rules->at[i].pattern + 1);
        moec_free(was);
    }
    if (st == MOEC_OK) {
        char *was = *out;
        st = moec_format(out, err, "%s)", was);
        moec_free(was);
    }
    return st;
}

/* GPTQModel's `dynamic`: patterns are matched from a name's start, "-:" leaves as it is. Those stand first: GPTQModel tries them first,
 * servers take the first that matches. */
static moec_status config_dynamic(moec_json *root, const moec_plan *p, const moec_model *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_rules rules = {0};
    moec_json *q = NULL, *dynamic = moec_json_new_object();
    char *pattern = NULL;
    MOEC_TRY(moec__rules_of(&rules, p, m, err));
    MOEC_TRY(rest_pattern(&pattern, p, &rules, err));
    moec_json_set(dynamic, pattern, moec_json_new_object());
    for (int left = 1; left >= 0; left--)
        for (size_t i = 0; i < rules.n; i++) {
            const moec_rule *r = &rules.at[i];
            if ((r->bits == AS_IT_IS) != (left == 1))
                continue;
            moec_free(pattern);
            pattern = NULL;
            MOEC_TRY(moec_format(&pattern, err, "%s:%s", left ? "-" : "+", r->pattern));
            moec_json_set(dynamic, pattern, left ? moec_json_new_object() : width(r));
        }
    q = common(p, m, &rules, moec__format_gptq_dynamic.quant_method);
    moec_json_set(q, "desc_act", moec_json_new_bool(false));
    moec_json_set(q, "checkpoint_format", moec_json_new_string("gptq"));
    moec_json_set(q, "pack_dtype", moec_json_new_string("int32"));
    moec_json_set(q, "lm_head", moec_json_new_bool(false));
    moec_json_set(q, "dynamic", dynamic);
    moec_json_set(root, "quantization_config", q);
    dynamic = NULL;
done:
    moec_json_free(dynamic);
    moec_free(pattern);
    moec__rules_release(&rules);
    return st;
}

/* --- checks ---------------------------------------------------------------------------------------------------------- */

/* auto-round takes transformers' stacked experts apart; which families it does that to was tried. */
static moec_status check(const moec_plan *p, const moec_model *m, moec_err *err)
{
    if (!m->family->loads_gptq)
        return moec_fail(err, MOEC_EINVAL, "--format %s: transformers with auto-round does not load experts of %s in codes, or it was not "
                         "tried; --format fake loads", p->quant.format, m->family->model_type);
    return moec__check_text_model(m, p->quant.format, err);
}

/* Servers ask for one width and group of all experts of a layer. */
static moec_status check_server(const moec_plan *p, const moec_model *m, moec_err *err)
{
    const moec_qformat *f = &moec__format_gptq_server;
    const int64_t in = moec_qformat_grid(f, &p->quant, m->dims.hidden, 4).group;
    const int64_t down = moec_qformat_grid(f, &p->quant, m->dims.expert_width, 4).group;
    if (in != down && in > 0 && down > 0)
        return moec_fail(err, MOEC_EINVAL, "--format gptq-server: groups of %lld columns for gate and up, %lld for down, and servers have "
                         "one; --group-size %lld", (long long)in, (long long)down, (long long)(in < down ? in : down));
    return check(p, m, err);
}

#define TENSORS .scale_type = MOEC_F16, .row_multiple = BLOCK, .col_multiple = BLOCK, .view = view
#define ORDERED TENSORS, .pieces = pieces_ordered, .write = write_ordered, .read = read_ordered

const moec_qformat moec__format_gptq = {
    .name = "gptq",
    .quant_method = "auto-round",
    .about = "GPTQ's tensors, a width for each matrix, zero points where asked, config.json as AutoRound writes it",
    .loads = "transformers with auto-round installed (from_pretrained, nothing else needed)",
    .widths = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 8,
    .grain = MOEC_WIDTHS_PROJECTION,
    .zeros = true,
    .group_multiple = 8,
    .config = config_rounded,
    .check = check,
    TENSORS,
    .pieces = pieces,
    .write = write,
    .read = read,
};
const moec_qformat moec__format_gptq_dynamic = {
    .name = "gptq-dynamic",
    .quant_method = "gptq",
    .about = "the same tensors and g_idx, the order of columns; config.json as GPTQModel writes it (dynamic)",
    .loads = "GPTQModel (from its source, not run); transformers with auto-round by quantization_config=AutoRoundConfig()",
    .widths = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 8,
    .grain = MOEC_WIDTHS_PROJECTION,
    .group_multiple = 8,
    .config = config_dynamic,
    .check = check,
    ORDERED,
};
const moec_qformat moec__format_gptq_server = {
    .name = "gptq-server",
    .quant_method = "gptq",
    .about = "as gptq-dynamic, with one width of 4 or 8 bits for all experts of a layer",
    .loads = "vLLM, SGLang (from their source, not run); GPTQModel; transformers with auto-round by quantization_config=AutoRoundConfig()",
    .widths = 1 << 4 | 1 << 8,
    .grain = MOEC_WIDTHS_LAYER,
    .group_multiple = 32,
    .config = config_dynamic,
    .check = check_server,
    ORDERED,
};
