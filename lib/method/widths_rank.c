/* Widths without errors: one for all, or two neighbouring ones of which what matters most has the higher; see widths.h. */
#include "method/widths_parts.h"

#include "base/log.h"
#include "base/mem.h"
#include "base/par.h"

#include <math.h>
#include <stdlib.h>

enum { BLOCK = 96 /* rows read at once */ };

/* ---- importance ------------------------------------------------------------------------------------------------------------ */

static moec_status wrong_grain(const moec__items *x, const char *knows, moec_err *err)
{
    return moec_fail(err, MOEC_EINVAL, "method %s tells %s apart; here widths are chosen by %s", x->me->name, knows,
                     moec_widths_grain_name(x->r->grain));
}

static moec_status by_frequency(double *out, const moec__items *x, moec_err *err)
{
    double *share = NULL;
    if (x->r->grain != MOEC_WIDTHS_EXPERT && x->r->grain != MOEC_WIDTHS_PROJECTION)
        return wrong_grain(x, "experts", err);
    moec_status st = MOEC_NEW(share, (size_t)x->experts, err);
    for (int64_t l = 0; st == MOEC_OK && l < x->layers; l++) {
        moec__widths_share(share, x->r->q->stats, MOEC_STAT_SELECTED, l, x->experts);
        for (int64_t c = 0; c < x->experts * 3; c++)
            out[moec__item_of(x, l, c / 3, c % 3)] = share[c / 3];
    }
    moec_free(share);
    return st;
}

static moec_status by_place(double *out, const moec__items *x, moec_err *err)
{
    (void)err;
    for (int64_t i = 0; i < x->n; i++)
        out[i] = -(double)x->layer[i];
    return MOEC_OK;
}

static moec_status by_projection(double *out, const moec__items *x, moec_err *err)
{
    static const double rank[] = {1.0, 0.0, 2.0};
    if (x->r->grain != MOEC_WIDTHS_PROJECTION && x->r->grain != MOEC_WIDTHS_LAYER_PROJECTION)
        return wrong_grain(x, "gate, up and down", err);
    for (int64_t i = 0; i < x->n; i++)
        out[i] = rank[i % 3];
    return MOEC_OK;
}

static moec_status by_turn(double *out, const moec__items *x, moec_err *err)
{
    const moec_stats *s = x->r->q->stats;
    (void)err;
    for (int64_t i = 0; i < x->n; i++) /* tokens are those of every layer: the sum orders as the mean does */
        out[i] = -moec__widths_sum(s, MOEC_STAT_COS_MOE, x->layer[i], 0);
    return MOEC_OK;
}

moec_status moec_widths_outlier(double *out, const moec_weight *w, moec_err *err)
{
    moec_status st = MOEC_OK;
    float *buf = NULL;
    double *sum = NULL, *most = NULL;
    size_t values;
    *out = 0.0;
    if (!moec_mul_size(&values, BLOCK, (size_t)w->cols))
        return moec_fail(err, MOEC_ENOMEM, "rows of %lld values", (long long)w->cols);
    MOEC_TRY(MOEC_NEW(buf, values, err));
    MOEC_TRY(MOEC_NEW(sum, (size_t)w->cols, err));
    MOEC_TRY(MOEC_NEW(most, (size_t)w->cols, err));
    for (int64_t r = 0; r < w->rows; r += BLOCK) {
        const int64_t rows = w->rows - r < BLOCK ? w->rows - r : BLOCK;
        moec_weight_read(buf, w->cols, w, r, rows, 0, w->cols);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < w->cols; j++) {
                const double v = fabs((double)buf[i * w->cols + j]);
                sum[j] += v;
                most[j] = v > most[j] ? v : most[j];
            }
    }
    for (int64_t j = 0; j < w->cols; j++) /* a column of zeros has no outlier */
        if (sum[j] > 0.0)
            *out = fmax(*out, most[j] * (double)w->rows / sum[j]);
done:
    moec_free(buf);
    moec_free(sum);
    moec_free(most);
    return st;
}

typedef struct scan {
    const moec__items *x;
    double *score; /* [layers, experts, 3] */
    moec_progress progress;
} scan;

static moec_status scan_experts(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    scan *s = ctx;
    moec_status st = MOEC_OK;
    const moec_model *m = s->x->r->q->model;
    (void)worker;
    for (int64_t i = lo; i < hi; i++) {
        const moec_mlp *mlp = &m->layer[m->set[i / s->x->experts].layer].expert[i % s->x->experts];
        const moec_weight *const part[] = {&mlp->gate, &mlp->up, &mlp->down};
        MOEC_TRY(moec_interrupted(err));
        for (int64_t p = 0; p < 3; p++)
            MOEC_TRY(moec_widths_outlier(&s->score[i * 3 + p], part[p], err));
        for (int64_t p = 0; p < 3; p++)
            moec_weight_drop(part[p]);
        moec_progress_step(&s->progress, 1);
    }
done:
    return st;
}

static moec_status by_outlier(double *out, const moec__items *x, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t experts = x->layers * x->experts;
    scan s = {.x = x};
    MOEC_TRY(MOEC_NEW(s.score, 3 * (size_t)experts, err));
    moec_progress_start(&s.progress, "reading weights", "experts", (uint64_t)experts, 0);
    MOEC_TRY(moec_par_for(experts, 1, scan_experts, &s, err));
    moec_progress_finish(&s.progress);
    for (int64_t c = 0; c < 3 * experts; c++) {
        double *to = &out[moec__item_of(x, c / 3 / x->experts, c / 3 % x->experts, c % 3)];
        *to = s.score[c] > *to ? s.score[c] : *to; /* scores are 1 and above, 0 of zeros */
    }
done:
    moec_progress_stop(&s.progress);
    moec_free(s.score);
    return st;
}

/* ---- choice ---------------------------------------------------------------------------------------------------------------- */

typedef struct ranked {
    int64_t item;
    double importance;
} ranked;

static int by_importance(const void *a, const void *b)
{
    const ranked *x = a, *y = b;
    if (x->importance > y->importance || x->importance < y->importance)
        return x->importance > y->importance ? -1 : 1;
    return x->item < y->item ? -1 : 1;
}

moec_status moec__widths_ranked(moec__items *x, const moec__widths_row *row, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t widths = x->r->n_widths;
    double *importance = NULL;
    ranked *order = NULL;
    MOEC_TRY(MOEC_NEW(importance, (size_t)x->n, err));
    MOEC_TRY(MOEC_NEW(order, (size_t)x->n, err));
    MOEC_TRY(row->importance(importance, x, err));
    int64_t low = moec__widths_largest(x), rest = x->budget;
    low = low < 0 ? 0 : low; /* bytes need not grow with widths; the least that is possible fits */
    for (int64_t i = 0; i < x->n; i++) {
        if (!isfinite(importance[i]))
            MOEC_TRY(moec_fail(err, MOEC_ENUMERIC, "MoE layer %lld: how much it matters is not finite", (long long)x->layer[i]));
        order[i] = (ranked){i, importance[i]};
        x->pick[i] = x->guarded[i] ? widths - 1 : low;
        rest -= x->size[i * widths + x->pick[i]];
    }
    qsort(order, (size_t)x->n, sizeof *order, by_importance);
    for (int64_t k = 0; low + 1 < widths && k < x->n; k++) {
        const int64_t i = order[k].item, more = x->size[i * widths + low + 1] - x->size[i * widths + low];
        if (x->guarded[i])
            continue;
        if (more > rest)
            break;
        rest -= more;
        x->pick[i] = low + 1;
    }
done:
    moec_free(importance);
    moec_free(order);
    return st;
}

/* ---- methods --------------------------------------------------------------------------------------------------------------- */

static const moec_stat need_count[] = {MOEC_STAT_SELECTED}, need_cos[] = {MOEC_STAT_COS_MOE};
static const moec__widths_row row_rtn = {.rounding = MOEC_ROUND_NEAREST}, row_clip = {.rounding = MOEC_ROUND_CLIP},
                              row_gptq = {.rounding = MOEC_ROUND_GPTQ},
                              row_frequency = {.rounding = MOEC_ROUND_GPTQ, .importance = by_frequency},
                              row_first = {.rounding = MOEC_ROUND_GPTQ, .importance = by_place},
                              row_projection = {.rounding = MOEC_ROUND_GPTQ, .importance = by_projection},
                              row_outlier = {.rounding = MOEC_ROUND_GPTQ, .importance = by_outlier},
                              row_turn = {.rounding = MOEC_ROUND_GPTQ, .importance = by_turn};

#define MOEC_BENCH .paper = "QuantMoE-Bench: Examining Post-Training Quantization for Mixture-of-Experts", .arxiv = "2406.08155"
extern const moec_method moec_method_quant_rtn, moec_method_quant_clip, moec_method_quant_gptq, moec_method_quant_frequency,
    moec_method_quant_first_blocks, moec_method_quant_projection, moec_method_quant_outlier, moec_method_quant_block_importance;

const moec_method moec_method_quant_rtn = {
    .name = "rtn",
    .kind = MOEC_QUANTIZE,
    .brief = "one width for all experts, rounding to nearest; needs no text",
    .paper = "baseline",
    .formula = "s = 2 max|w| / (2^b - 1)",
    .row = &row_rtn,
};
const moec_method moec_method_quant_clip = {
    .name = "clip",
    .kind = MOEC_QUANTIZE,
    .brief = "one width for all experts, rounding to nearest with scales by search",
    .paper = "baseline",
    .formula = "s = argmin sum_c m_c (w_c - w'_c)^2, m_c the mean square of input c",
    .row = &row_clip,
};
const moec_method moec_method_quant_gptq = {
    .name = "gptq",
    .kind = MOEC_QUANTIZE,
    .brief = "one width for all experts, rounding by GPTQ",
    .paper = "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    .arxiv = "2210.17323",
    .formula = "min tr((W - W') H (W - W')^T), H = sum_t g^2 x x^T",
    .row = &row_gptq,
};
const moec_method moec_method_quant_frequency = {
    .name = "frequency",
    .kind = MOEC_QUANTIZE,
    .brief = "the experts that are selected most get the higher of two neighbouring widths (H3); rounding by GPTQ",
    MOEC_BENCH,
    .formula = "n_e / sum_e n_e, of all layers in one list",
    .needs = need_count,
    .n_needs = 1,
    .row = &row_frequency,
};
const moec_method moec_method_quant_first_blocks = {
    .name = "first-blocks",
    .kind = MOEC_QUANTIZE,
    .brief = "the first MoE layers get the higher of two neighbouring widths (H4); rounding by GPTQ",
    MOEC_BENCH,
    .formula = "-l",
    .row = &row_first,
};
const moec_method moec_method_quant_projection = {
    .name = "projection",
    .kind = MOEC_QUANTIZE,
    .brief = "down, then gate, then up get the higher of two neighbouring widths (H5); rounding by GPTQ",
    MOEC_BENCH,
    .formula = "down > gate > up",
    .row = &row_projection,
};
const moec_method moec_method_quant_outlier = {
    .name = "outlier",
    .kind = MOEC_QUANTIZE,
    .brief = "matrices with a value far above the others of its column get the higher of two neighbouring widths (H6); needs no text to "
             "choose; rounding by GPTQ",
    MOEC_BENCH,
    .formula = "max_j max_i |W_ij| / mean_i |W_ij|",
    .row = &row_outlier,
};
const moec_method moec_method_quant_block_importance = {
    .name = "block-importance",
    .kind = MOEC_QUANTIZE,
    .brief = "the MoE layers that turn the residual stream most get the higher of two neighbouring widths (H7, measured where the paper "
             "trains a predictor); rounding by GPTQ",
    MOEC_BENCH,
    .formula = "-mean cos(h, h + r)",
    .needs = need_cos,
    .n_needs = 1,
    .row = &row_turn,
};
