/* compressed-tensors' "pack-quantized": for a matrix [rows, cols] in groups of g columns
 *
 *     weight_packed I32 [rows, cols b / 32]   codes in streams (num/bits.h) along the columns
 *     weight_scale      [rows, cols / g]      in the plan's type
 *     weight_shape  I64 [2]                   rows, cols
 *
 * Source: compressed-tensors 0.20.0; older ones pack 3, 5, 6 and 7 bits in another way. Its zero is the middle code, so that at 1 bit
 * the values are -s and 0, which our grid has not: 2 bits at least. */
#include "base/mem.h"
#include "num/bits.h"
#include "run/format_parts.h"

#include <stdio.h>
#include <string.h>

enum { BLOCK = 32, AS_IT_IS = 16 };

static int pieces(moec_piece out[MOEC_PIECES], const moec_qgrid *g, int64_t rows, int64_t cols)
{
    out[0] = (moec_piece){"weight_packed", MOEC_I32, 2, {rows, cols / BLOCK * g->bits}};
    out[1] = (moec_piece){"weight_scale", g->scale_type, 2, {rows, cols / g->group}};
    out[2] = (moec_piece){"weight_shape", MOEC_I64, 1, {2}};
    return 3;
}

static void put_scale(unsigned char *to, moec_dtype type, float s)
{
    const uint16_t h = type == MOEC_BF16 ? moec_to_bf16(s) : moec_to_f16(s);
    if (type == MOEC_F32)
        memcpy(to, &s, 4);
    else
        memcpy(to, &h, 2);
}

static void write(void *const *piece, const moec_qcodes *c)
{
    const int64_t n = c->rows * (c->cols / c->grid.group), shape[2] = {c->rows, c->cols};
    const int64_t words = c->cols / BLOCK * c->grid.bits;
    uint32_t word[8];
    for (int64_t r = 0; r < c->rows; r++)
        for (int64_t k = 0; k < c->cols / BLOCK; k++) {
            moec_bits_pack(word, c->code + r * c->cols + k * BLOCK, BLOCK, c->grid.bits);
            memcpy((unsigned char *)piece[0] + 4 * (r * words + k * c->grid.bits), word, 4 * (size_t)c->grid.bits);
        }
    for (int64_t i = 0; i < n; i++)
        put_scale((unsigned char *)piece[1] + i * moec_dtypes[c->grid.scale_type].bytes, c->grid.scale_type, c->scale[i]);
    memcpy(piece[2], shape, sizeof shape);
}

static moec_status read(moec_qcodes *c, const void *const *piece, moec_err *err)
{
    int64_t shape[2];
    const int64_t words = c->cols / BLOCK * c->grid.bits;
    uint32_t word[8];
    memcpy(shape, piece[2], sizeof shape);
    if (shape[0] != c->rows || shape[1] != c->cols)
        return moec_fail(err, MOEC_EFORMAT, "weight_shape: [%lld, %lld], expected [%lld, %lld]", (long long)shape[0],
                         (long long)shape[1], (long long)c->rows, (long long)c->cols);
    for (int64_t r = 0; r < c->rows; r++)
        for (int64_t k = 0; k < c->cols / BLOCK; k++) {
            memcpy(word, (const unsigned char *)piece[0] + 4 * (r * words + k * c->grid.bits), 4 * (size_t)c->grid.bits);
            moec_bits_unpack(c->code + r * c->cols + k * BLOCK, word, BLOCK, c->grid.bits);
        }
    moec_dtypes[c->grid.scale_type].to_f32(c->scale, piece[1], c->rows * (c->cols / c->grid.group));
    return MOEC_OK;
}

static moec_weight view(const moec_tensor *const *piece, const moec_qgrid *g, int64_t rows, int64_t cols)
{
    return (moec_weight){.of = piece[0], .scale = piece[1], .rows = rows, .cols = cols, .row_step = cols, .col_step = 1,
                         .block_cols = (int32_t)g->group, .storage = MOEC_PACKED, .bits = (uint8_t)g->bits};
}

/* --- config.json ----------------------------------------------------------------------------------------------------- */

static moec_json *group_of(int bits, int64_t group)
{
    moec_json *o = moec_json_new_object(), *w = moec_json_new_object();
    moec_json_set(w, "num_bits", moec_json_new_int(bits));
    moec_json_set(w, "type", moec_json_new_string("int"));
    moec_json_set(w, "symmetric", moec_json_new_bool(true));
    moec_json_set(w, "strategy", moec_json_new_string("group"));
    moec_json_set(w, "group_size", moec_json_new_int(group));
    moec_json_set(o, "targets", moec_json_new_array());
    moec_json_set(o, "weights", w);
    return o;
}

static moec_status add_target(moec_json *group, const char *pattern, moec_err *err)
{
    char *word = NULL;
    moec_status st = moec_format(&word, err, "re:%s", pattern);
    if (st == MOEC_OK)
        moec_json_push(moec_json_get(group, "targets"), moec_json_new_string(word));
    moec_free(word);
    return st;
}

/* group_0: the experts, found by that word; transformers takes the first group with it for all of them. Then one for each width and
 * group of the others. What no group names stays as it is. */
static moec_status groups_of(moec_json *groups, const moec_rules *rules, const char *experts, moec_err *err)
{
    moec_status st = MOEC_OK;
    size_t number[MOEC_QUANT_BITS + 1] = {0}; /* of the group of a width; a layer's matrices may have several sizes of groups */
    int64_t size[MOEC_QUANT_BITS + 1] = {0};
    char name[32];
    size_t n = 0;
    for (size_t i = 0; i < rules->n; i++) {
        const moec_rule *r = &rules->at[i];
        const bool same = !r->experts && number[r->bits] > 0 && size[r->bits] == r->group;
        if (r->experts && n > 0)
            continue;
        snprintf(name, sizeof name, "group_%zu", same ? number[r->bits] : n);
        if (!same)
            moec_json_set(groups, name, group_of(r->bits, r->group));
        if (!same && !r->experts) {
            number[r->bits] = n;
            size[r->bits] = r->group;
        }
        n += !same;
        MOEC_TRY(add_target(moec_json_get(groups, name), r->experts ? experts : r->pattern, err));
    }
done:
    return st;
}

static moec_status config(moec_json *root, const moec_plan *p, const moec_model *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_rules rules;
    char *front = NULL, *experts = NULL;
    moec_json *q = moec_json_new_object(), *groups = moec_json_new_object(), *ignore = moec_json_new_array();
    MOEC_TRY(moec__rules_of(&rules, p, m, err));
    moec_json_set(q, "quant_method", moec_json_new_string(moec__format_compressed.quant_method));
    moec_json_set(q, "format", moec_json_new_string("pack-quantized"));
    moec_json_set(q, "quantization_status", moec_json_new_string("compressed"));
    moec_json_push(ignore, moec_json_new_string("lm_head"));
    moec_json_set(q, "ignore", ignore);
    if ((st = moec__experts_pattern(&front, p, err)) == MOEC_OK && (st = moec_format(&experts, err, "%s\\..*", front)) == MOEC_OK)
        st = groups_of(groups, &rules, experts, err);
    moec_free(front);
    moec_free(experts);
    moec__rules_release(&rules);
    moec_json_set(q, "config_groups", groups);
    moec_json_set(root, "quantization_config", q);
    return st;
done:
    moec_json_free(q);
    moec_json_free(groups);
    moec_json_free(ignore);
    return st;
}

/* transformers 5.23 takes the experts' first scheme for all of them: another group in one of the projections would be read wrong
 * without a word. */
static moec_status check(const moec_plan *p, const moec_model *m, moec_err *err)
{
    const moec_qformat *f = &moec__format_compressed;
    const int64_t in = moec_qformat_grid(f, &p->quant, m->dims.hidden, 4).group;
    const int64_t down = moec_qformat_grid(f, &p->quant, m->dims.expert_width, 4).group;
    if (p->quant.expert[0] == AS_IT_IS)
        return moec_fail(err, MOEC_EINVAL, "--format compressed-tensors: no expert is quantized (16 bits); --format fake takes that");
    if (in != down && in > 0 && down > 0)
        return moec_fail(err, MOEC_EINVAL, "--format compressed-tensors: groups of %lld columns for gate and up, %lld for down, and "
                         "transformers reads one for all experts; --group-size %lld", (long long)in, (long long)down,
                         (long long)(in < down ? in : down));
    if (!m->family->loads_compressed)
        return moec_fail(err, MOEC_EINVAL, "--format compressed-tensors: transformers does not load experts of %s in codes, or it was not "
                         "tried; --format fake loads", m->family->model_type);
    return moec__check_text_model(m, p->quant.format, err);
}

const moec_qformat moec__format_compressed = {
    .name = "compressed-tensors",
    .quant_method = "compressed-tensors",
    .about = "compressed-tensors' packed codes, one width for all routed experts",
    .loads = "transformers with compressed-tensors installed",
    .widths = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8,
    .grain = MOEC_WIDTHS_MODEL,
    .own_names = true,
    .scale_type = MOEC_DTYPE_COUNT,
    .row_multiple = 1,
    .col_multiple = BLOCK,
    .group_multiple = 8,
    .pieces = pieces,
    .write = write,
    .read = read,
    .view = view,
    .config = config,
    .check = check,
};
