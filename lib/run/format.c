/* See format.h: the table, and what a plan's widths make of a model's matrices. */
#include "run/format.h"

#include "base/mem.h"
#include "base/word.h"
#include "run/format_parts.h"

#include <stdio.h>
#include <string.h>

enum { AS_IT_IS = 16 };

static const moec_qformat *const formats[] = {&moec__format_gptq, &moec__format_gptq_dynamic, &moec__format_gptq_server,
                                              &moec__format_compressed, &moec__format_nested, &moec__format_fake};

const moec_qformat *moec_qformat_at(size_t i)
{
    return i < MOEC_COUNT(formats) ? formats[i] : NULL;
}

const moec_qformat *moec_qformat_find(const char *name)
{
    for (size_t i = 0; i < MOEC_COUNT(formats); i++)
        if (strcmp(formats[i]->name, name) == 0)
            return formats[i];
    return NULL;
}

moec_status moec_qformat_take(const moec_qformat **out, const char *name, moec_err *err)
{
    const char *names[MOEC_COUNT(formats) + 1];
    char list[160] = "";
    *out = moec_qformat_find(name);
    if (*out)
        return MOEC_OK;
    for (size_t i = 0, at = 0; i < MOEC_COUNT(formats); i++) {
        names[i] = formats[i]->name;
        at += (size_t)snprintf(list + at, at < sizeof list ? sizeof list - at : 0, "%s, ", names[i]);
    }
    names[MOEC_COUNT(formats)] = "gguf"; /* quantize's other way: gguf_quant.h */
    const char *near = moec_word_nearest(name, names, MOEC_COUNT(names));
    return moec_fail(err, MOEC_EINVAL, "no format %.40s%s%s; there are %sand gguf", name, near ? "; did you mean " : "", near ? near : "", list);
}

/* --- matrices -------------------------------------------------------------------------------------------------------- */

/* Of a matrix, 0: there is none. In dense files a group may be anything, but of few columns scales would say all there is: whole rows
 * then. */
static int64_t group_of(const moec_qformat *f, const moec_plan_quant *q, int64_t cols)
{
    const int64_t group = moec_quant_group(q->group, cols, f->dense && q->group < f->group_multiple ? 1 : f->group_multiple);
    return group == 0 && f->dense ? cols : group;
}

moec_qgrid moec_qformat_grid(const moec_qformat *f, const moec_plan_quant *q, int64_t cols, int bits)
{
    return (moec_qgrid){.bits = bits, .group = group_of(f, q, cols), .zeros = f->zeros && q->zeros,
                        .scale_type = q->scale_type};
}

moec_weight moec_qformat_view(const moec_qformat *f, const moec_tensor *const *piece, const moec_qgrid *g, int64_t rows, int64_t cols)
{
    return f->view(piece, g, rows, cols);
}

static bool shape_fits(const moec_qformat *f, const moec_plan_quant *q, int64_t rows, int64_t cols)
{
    return rows % f->row_multiple == 0 && cols % f->col_multiple == 0 && group_of(f, q, cols) > 0;
}

/* Routers decide, and are small. */
static bool never(moec_mat which)
{
    return (which >= MOEC_MAT_ROUTER && which <= MOEC_MAT_ROUTER_MAP) || which == MOEC_MAT_HEADS_ROUTER || which == MOEC_MAT_SHARED_MIX;
}

bool moec_qformat_takes(const moec_qformat *f, const moec_plan_quant *q, const moec_layer *l, moec_mat which)
{
    static const char tail[] = ".weight";
    const moec_weight *w = &l->mat[which];
    if (never(which) || !w->of || w->storage != MOEC_PLAIN || w->of->rank != 2 || w->at != 0 || w->col_step != 1 ||
        w->row_step != w->cols || w->of->dim[0] != w->rows || w->of->dim[1] != w->cols)
        return false;
    const size_t n = strlen(w->of->name);
    return n > sizeof tail && strcmp(w->of->name + n - (sizeof tail - 1), tail) == 0 && shape_fits(f, q, w->rows, w->cols);
}

uint64_t moec_qformat_bytes(const moec_qformat *f, const moec_plan_quant *q, const moec_model *m, int which, int bits)
{
    const moec_weight *w = moec_mlp_matrix(&m->layer[m->set[0].layer].expert[0], which);
    if (bits == AS_IT_IS || f->dense) {
        const uint64_t size = w->storage == MOEC_PLAIN ? (uint64_t)moec_dtypes[w->of->dtype].bytes : 2;
        return (uint64_t)w->rows * (uint64_t)w->cols * size;
    }
    const moec_qgrid g = moec_qformat_grid(f, q, w->cols, bits);
    moec_piece piece[MOEC_PIECES];
    uint64_t bytes = 0;
    const int n = g.group > 0 ? f->pieces(piece, &g, w->rows, w->cols) : 0;
    for (int i = 0; i < n; i++)
        bytes += moec__piece_bytes(&piece[i]);
    return bytes;
}

uint64_t moec__piece_bytes(const moec_piece *p)
{
    uint64_t n = (uint64_t)moec_dtypes[p->dtype].bytes;
    for (int k = 0; k < p->rank; k++)
        n *= (uint64_t)p->dim[k];
    return n;
}

static moec_status add(moec_qmatrices *q, const moec_model *m, const moec_plan *p, moec_qmatrix x, int bits, moec_err *err)
{
    static const char tail[] = ".weight";
    if (bits == 0 || bits == AS_IT_IS)
        return MOEC_OK;
    x.grid = moec_qformat_grid(q->format, &p->quant, x.source->cols, bits);
    q->at[q->n++] = x;
    char **module = &q->at[q->n - 1].module;
    if (q->format->dense)
        return MOEC_OK;
    if (x.expert >= 0)
        return moec_expert_module(module, m, x.layer, x.expert, x.which, q->format->own_names, err);
    return moec_copy(module, x.source->of->name, strlen(x.source->of->name) - (sizeof tail - 1), err);
}

moec_status moec_qmatrices_of(moec_qmatrices *out, const moec_model *m, const moec_plan *p, int64_t layer, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_layer *l = &m->layer[layer];
    const moec_plan_quant *q = &p->quant;
    const int64_t E = l->expert ? m->dims.experts : 0;
    *out = (moec_qmatrices){0};
    MOEC_TRY(moec_qformat_take(&out->format, q->format, err));
    MOEC_TRY(MOEC_NEW(out->at, MOEC_MAT_COUNT + 3 * (size_t)E, err));
    for (int i = 0; q->mat && i < MOEC_MAT_COUNT; i++) {
        const moec_qmatrix x = {.layer = layer, .expert = -1, .which = i, .source = &l->mat[i]};
        MOEC_TRY(add(out, m, p, x, q->mat[layer * MOEC_MAT_COUNT + i], err));
    }
    for (int64_t k = 0; k < 3 * E; k++) {
        const moec_qmatrix x = {.layer = layer, .expert = k / 3, .which = (int)(k % 3),
                                .source = moec_mlp_matrix(&l->expert[k / 3], k % 3)};
        MOEC_TRY(add(out, m, p, x, q->expert[l->moe_index * 3 * E + k], err));
    }
done:
    if (st != MOEC_OK)
        moec_qmatrices_release(out);
    return st;
}

void moec_qmatrices_release(moec_qmatrices *q)
{
    for (size_t i = 0; i < q->n; i++)
        moec_free(q->at[i].module);
    moec_free(q->at);
    *q = (moec_qmatrices){0};
}

/* --- a plan ---------------------------------------------------------------------------------------------------------- */

enum { MATRICES = MOEC_PART_GATE | MOEC_PART_UP | MOEC_PART_DOWN };

/* A layer that stays as it is has no weights among those that are computed. */
static uint32_t rewritten(const moec_qformat *f, const moec_plan *p, int64_t layer)
{
    const int64_t n = 3 * p->layer[0].n_experts;
    for (int64_t i = layer * n; f->dense && i < (layer + 1) * n; i++)
        if (p->quant.expert[i] != AS_IT_IS)
            return MATRICES;
    return 0;
}

void moec_qformat_mark(moec_plan *p, const moec_qformat *f)
{
    for (int64_t i = 0; i < p->n_layers; i++)
        p->layer[i].rewritten = rewritten(f, p, i);
}

/* All of a layer, or of the model, as the clients of the format load them. */
static moec_status check_grain(const moec_qformat *f, const moec_plan *p, const moec_model *m, moec_err *err)
{
    const int64_t each = 3 * m->dims.experts, span = f->grain == MOEC_WIDTHS_MODEL ? p->n_layers * each : each;
    if (f->grain != MOEC_WIDTHS_LAYER && f->grain != MOEC_WIDTHS_MODEL)
        return MOEC_OK;
    for (int64_t i = 0; i < p->n_layers * each; i++)
        if (p->quant.expert[i] != p->quant.expert[i / span * span])
            return moec_fail(err, MOEC_EFORMAT, "plan: layer %lld: %d and %d bits; clients of %s load one width for all experts of "
                             "%s; gptq has one for each matrix", (long long)p->layer[i / each].layer,
                             p->quant.expert[i / span * span], p->quant.expert[i], f->name,
                             f->grain == MOEC_WIDTHS_MODEL ? "the model" : "a layer");
    return MOEC_OK;
}

static bool has_width(const moec_qformat *f, int bits)
{
    return bits == 0 || bits == AS_IT_IS || (bits <= MOEC_QUANT_BITS && (f->widths >> bits & 1));
}

static moec_status check_experts(const moec_qformat *f, const moec_plan *p, const moec_model *m, moec_err *err)
{
    const int64_t each = 3 * m->dims.experts;
    for (int64_t i = 0; i < p->n_layers * each; i++) {
        const moec_layer *l = &m->layer[p->layer[i / each].layer];
        const moec_weight *w = moec_mlp_matrix(&l->expert[i % each / 3], i % 3);
        const int bits = p->quant.expert[i];
        if (!has_width(f, bits))
            return moec_fail(err, MOEC_EFORMAT, "plan: layer %lld: %d bits, which %s has not; fake has 1 to 8", (long long)l->index,
                             bits, f->name);
        if (bits != AS_IT_IS && !shape_fits(f, &p->quant, w->rows, w->cols))
            return moec_fail(err, MOEC_EFORMAT, "plan: layer %lld: %s holds matrices whose rows are a multiple of %lld, columns of "
                             "%lld, groups of %lld, not [%lld, %lld] in groups of %lld; another --group-size%s",
                             (long long)l->index, f->name, (long long)f->row_multiple, (long long)f->col_multiple,
                             (long long)f->group_multiple, (long long)w->rows, (long long)w->cols, (long long)p->quant.group,
                             f->dense ? "" : ", or --format fake");
        if (!f->dense && bits == AS_IT_IS && l->layout != MOEC_LAYOUT_SPLIT)
            return moec_fail(err, MOEC_EFORMAT, "plan: layer %lld: its experts are one tensor, and %s takes them apart only when all "
                             "are quantized", (long long)l->index, f->name);
    }
    return MOEC_OK;
}

static moec_status check_others(const moec_qformat *f, const moec_plan *p, const moec_model *m, moec_err *err)
{
    const moec_plan_quant *q = &p->quant;
    for (int64_t i = 0; q->mat && i < q->n_mat_layers * MOEC_MAT_COUNT; i++) {
        const moec_layer *l = &m->layer[i / MOEC_MAT_COUNT];
        const moec_mat which = (moec_mat)(i % MOEC_MAT_COUNT);
        if (q->mat[i] == 0 || q->mat[i] == AS_IT_IS)
            continue;
        if (!has_width(f, q->mat[i]) || !moec_qformat_takes(f, q, l, which))
            return moec_fail(err, MOEC_EFORMAT, "plan: quant: others: layer %lld: %s does not take %s at %d bits in groups of %lld",
                             (long long)l->index, f->name, l->mat[which].of ? l->mat[which].of->name : "what is not there", q->mat[i],
                             (long long)q->group);
    }
    return MOEC_OK;
}

static moec_status check_marks(const moec_qformat *f, const moec_plan *p, moec_err *err)
{
    for (int64_t i = 0; i < p->n_layers; i++)
        if (p->layer[i].rewritten != rewritten(f, p, i))
            return moec_fail(err, MOEC_EFORMAT, "plan: layer %lld: format %s goes with %s in \"rewritten\"",
                             (long long)p->layer[i].layer, f->name, rewritten(f, p, i) ? "gate, up and down" : "nothing");
    return MOEC_OK;
}

moec_status moec_qformat_check(const moec_plan *p, const moec_model *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_plan_quant *q = &p->quant;
    const moec_qformat *f;
    if (!q->format[0])
        return MOEC_OK;
    f = moec_qformat_find(q->format);
    if (!f)
        return moec_fail(err, MOEC_EFORMAT, "plan: quant: format %s is none that is known", q->format);
    if (q->zeros && !f->zeros)
        return moec_fail(err, MOEC_EFORMAT, "plan: quant: format %s is written without zero points; gptq and fake have them", f->name);
    if (f->scale_type != MOEC_DTYPE_COUNT && !f->dense && q->scale_type != f->scale_type)
        return moec_fail(err, MOEC_EFORMAT, "plan: quant: scale_dtype is %s, format %s has %s", moec_plan_dtype_name(q->scale_type),
                         f->name, moec_plan_dtype_name(f->scale_type));
    MOEC_TRY(check_marks(f, p, err));
    MOEC_TRY(check_grain(f, p, m, err));
    if (f->check)
        MOEC_TRY(f->check(p, m, err));
    MOEC_TRY(check_experts(f, p, m, err));
    MOEC_TRY(check_others(f, p, m, err));
done:
    return st;
}
