/* Widths by integer programming over measured errors: costs, programs, and the methods that are rows of them; see widths.h. */
#include "method/widths_parts.h"

#include "base/mem.h"
#include "num/lp.h"

#include <math.h>

static const int measured[MOEC_QUANT_WIDTHS] = MOEC_QUANT_WIDTH_LIST;

double moec__widths_sum(const moec_stats *s, moec_stat kind, int64_t layer, int64_t cell)
{
    double sum = 0.0;
    for (int d = 0; d < s->n_domains; d++) {
        const double *at = moec_stat_at(s, d, kind, layer), tokens = (double)s->domain[d].tokens;
        if (s->n_domains == 1)
            return at[cell];
        sum += tokens > 0.0 ? s->domain[d].weight * at[cell] / tokens : 0.0;
    }
    return sum;
}

void moec__widths_share(double *out, const moec_stats *s, moec_stat kind, int64_t layer, int64_t experts)
{
    for (int64_t e = 0; e < experts; e++)
        out[e] = 0.0;
    for (int d = 0; d < s->n_domains; d++) {
        const void *block = moec_stat_at(s, d, kind, layer);
        double all = 0.0;
        for (int64_t e = 0; e < experts; e++)
            all += moec_stat_cell(block, kind, e);
        for (int64_t e = 0; all > 0.0 && e < experts; e++)
            out[e] += moec_stats_weight(s, d) * moec_stat_cell(block, kind, e) / all;
    }
}

/* ---- costs ---------------------------------------------------------------------------------------------------------------- */

static moec_status pmq_costs(double *out, int slots, const moec__widths_row *row, const moec__items *x, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_stats *s = x->r->q->stats;
    const moec_widths_request *r = x->r;
    const double alpha = isnan(r->alpha) ? row->alpha : r->alpha, beta = isnan(r->beta) ? row->beta : r->beta,
                 gamma = isnan(r->gamma) ? row->gamma : r->gamma;
    double *f = NULL, *w = NULL;
    (void)slots;
    MOEC_TRY(MOEC_NEW(f, (size_t)x->experts, err));
    MOEC_TRY(MOEC_NEW(w, (size_t)x->experts, err));
    for (int64_t l = 0; l < x->layers; l++) {
        moec__widths_share(f, s, MOEC_STAT_SELECTED, l, x->experts);
        moec__widths_share(w, s, MOEC_STAT_PROB_SELECTED, l, x->experts);
        for (int64_t e = 0; e < x->experts; e++)
            for (int64_t b = 0; b < MOEC_QUANT_WIDTHS; b++)
                *out++ = pow(f[e], alpha) * pow(w[e], beta) *
                         pow(moec__widths_sum(s, MOEC_STAT_QUANT_FRO, l, e * MOEC_QUANT_WIDTHS + b), gamma);
    }
done:
    moec_free(f);
    moec_free(w);
    return st;
}

/* QUANT_SQ of all layers, times a factor of each. */
static void squares(double *out, int slots, const moec__items *x, const double *factor)
{
    for (int64_t l = 0; l < x->layers; l++)
        for (int64_t e = 0; e < x->experts; e++)
            for (int64_t p = slots == 1 ? 3 : 0; p < (slots == 1 ? 4 : 3); p++)
                for (int64_t b = 0; b < MOEC_QUANT_WIDTHS; b++)
                    *out++ = factor[l] * moec__widths_sum(x->r->q->stats, MOEC_STAT_QUANT_SQ, l, (e * 4 + p) * MOEC_QUANT_WIDTHS + b);
}

/* KL that a unit of the layer's error costs; of layers where it was not measured the mean of the others, 1 where it was of none. */
static void find_gains(double *gain, const moec__items *x)
{
    const moec_stats *s = x->r->q->stats;
    double mean = 0.0;
    int64_t n = 0;
    bool have = true;
    for (int d = 0; d < s->n_domains; d++)
        have = have && s->domain[d].data[MOEC_STAT_QUANT_KL];
    for (int64_t l = 0; l < x->layers; l++) {
        double error = 0.0;
        for (int64_t e = 0; e < x->experts; e++)
            error += moec__widths_sum(s, MOEC_STAT_QUANT_SQ, l, (e * 4 + 3) * MOEC_QUANT_WIDTHS + 1); /* 2 bits, as the KL */
        const double kl = have ? moec__widths_sum(s, MOEC_STAT_QUANT_KL, l, 0) : 0.0;
        gain[l] = kl > 0.0 && error > 0.0 ? kl / error : 0.0;
        mean += gain[l];
        n += gain[l] > 0.0;
    }
    for (int64_t l = 0; l < x->layers; l++)
        if (!(gain[l] > 0.0))
            gain[l] = n > 0 ? mean / (double)n : 1.0;
}

static moec_status direct_costs(double *out, int slots, const moec__widths_row *row, const moec__items *x, moec_err *err)
{
    double *gain = NULL;
    moec_status st = MOEC_NEW(gain, (size_t)x->layers, err);
    (void)row;
    if (st == MOEC_OK) {
        find_gains(gain, x);
        squares(out, slots, x, gain);
    }
    moec_free(gain);
    return st;
}

static moec_status gemq_costs(double *out, int slots, const moec__widths_row *row, const moec__items *x, moec_err *err)
{
    double *factor = NULL;
    moec_status st = MOEC_NEW(factor, (size_t)x->layers, err);
    (void)row;
    for (int64_t l = 0; st == MOEC_OK && l < x->layers; l++) {
        const double h = moec__widths_sum(x->r->q->stats, MOEC_STAT_NORMS_RES, l, 0),
                     routed = moec__widths_sum(x->r->q->stats, MOEC_STAT_NORMS_RES, l, 1);
        factor[l] = routed > 0.0 ? h / routed * (h / routed) : 0.0;
    }
    if (st == MOEC_OK)
        squares(out, slots, x, factor);
    moec_free(factor);
    return st;
}

/* ---- programs ------------------------------------------------------------------------------------------------------------- */

typedef struct program {
    moec__items *x;
    const double *table;   /* costs of widths.h, [layers, experts, slots, MOEC_QUANT_WIDTHS] */
    int at[MOEC_WIDTHS_MOST]; /* where a candidate stands in it; -1: no error */
    double *item;          /* [items, n_widths] */
    int64_t *first, *size; /* of the program at hand */
    double *cost;
    int64_t *width;        /* [options] index of a width */
    int64_t *member;       /* [2 rows a layer] their options */
    moec_lp_row *row;
} program;

static moec_status find_widths(program *u, moec_err *err)
{
    const moec_widths_request *r = u->x->r;
    for (int i = 0; i < r->n_widths; i++) {
        u->at[i] = -1;
        for (int b = 0; b < MOEC_QUANT_WIDTHS; b++)
            if (measured[b] == r->width[i])
                u->at[i] = b;
        if (u->at[i] < 0 && r->width[i] != 16)
            return moec_fail(err, MOEC_EFORMAT, "statistics without errors at %d bits, which method %s needs: they are of 1, 2, 3, 4 and 8; "
                             "leave that width out, or take a method that needs no errors, such as gptq", r->width[i], u->x->me->name);
    }
    return MOEC_OK;
}

static moec_status sum_items(program *u, int slots, moec_err *err)
{
    const moec__items *x = u->x;
    const int64_t widths = x->r->n_widths;
    double all = 0.0;
    for (int64_t c = 0; c < x->layers * x->experts * slots; c++) {
        const int64_t l = c / slots / x->experts, e = c / slots % x->experts, i = moec__item_of(x, l, e, slots == 1 ? 0 : c % slots);
        for (int64_t b = 0; b < widths; b++) {
            const double cost = u->at[b] < 0 ? 0.0 : u->table[c * MOEC_QUANT_WIDTHS + u->at[b]];
            if (!isfinite(cost) || cost < 0.0)
                return moec_fail(err, MOEC_ENUMERIC, "MoE layer %lld, expert %lld: cost %g at %d bits", (long long)l, (long long)e, cost,
                                 x->r->width[b]);
            u->item[i * widths + b] += cost;
            all += cost;
        }
    }
    if (!(all > 0.0))
        return moec_fail(err, MOEC_EFORMAT, "method %s: statistics without quantization errors above 0: calibrate --errors adds them",
                         x->me->name);
    return MOEC_OK;
}

/* The options of items [lo, hi): a protected one has the last only. */
static int64_t list_options(program *u, int64_t lo, int64_t hi)
{
    const moec__items *x = u->x;
    const int64_t widths = x->r->n_widths;
    int64_t n = 0;
    for (int64_t i = lo; i < hi; i++) {
        u->first[i - lo] = n;
        for (int64_t b = x->guarded[i] ? widths - 1 : 0; b < widths; b++, n++) {
            u->size[n] = x->size[i * widths + b];
            u->cost[n] = u->item[i * widths + b];
            u->width[n] = b;
        }
    }
    u->first[hi - lo] = n;
    return n;
}

/* For each layer one expert at 3 bits or more and one at 2, of the widths that are offered. */
static int64_t list_rows(program *u, int64_t lo, int64_t hi)
{
    const moec__items *x = u->x;
    int64_t rows = 0, members = 0;
    for (int64_t i = lo, end; i < hi; i = end) {
        end = i;
        while (end < hi && x->layer[end] == x->layer[i])
            end++;
        for (int high = 0; high < 2; high++) {
            const int64_t from = members;
            for (int64_t j = u->first[i - lo]; j < u->first[end - lo]; j++)
                if (high ? x->r->width[u->width[j]] >= 3 : x->r->width[u->width[j]] == 2)
                    u->member[members++] = j;
            if (members > from)
                u->row[rows++] = (moec_lp_row){u->member + from, members - from, 1};
        }
    }
    return rows;
}

static moec_status solve_items(program *u, int64_t lo, int64_t hi, int64_t budget, bool rows, double seconds, moec_err *err)
{
    moec__items *x = u->x;
    moec_err first = {MOEC_OK, ""};
    moec_lp_answer a;
    list_options(u, lo, hi);
    moec_lp p = {.groups = hi - lo, .first = u->first, .cost = u->cost, .size = u->size, .budget = budget, .row = u->row,
                 .rows = rows ? list_rows(u, lo, hi) : 0};
    moec_status st = moec_lp_solve(&a, &p, seconds, &first);
    if (p.rows > 0 && (st == MOEC_ENOFIT || st == MOEC_EINVAL)) { /* no choice has them */
        p.rows = 0;
        st = moec_lp_solve(&a, &p, seconds, err);
    } else if (st != MOEC_OK) {
        st = moec_fail(err, st, "%s", first.text);
    }
    if (st != MOEC_OK)
        return st;
    for (int64_t i = lo; i < hi; i++)
        x->pick[i] = u->width[a.pick[i - lo]];
    x->cost += a.cost;
    x->bound += a.proven ? a.cost : a.bound; /* that of the LP is lower, where it is not whole */
    x->proven = x->proven && a.proven;
    moec_lp_answer_release(&a);
    return MOEC_OK;
}

moec_status moec__widths_program(moec__items *x, const moec__widths_row *row, moec_err *err)
{
    moec_status st = MOEC_OK;
    program u = {.x = x};
    double *table = NULL;
    const moec_widths_request *r = x->r;
    const bool experts = r->grain == MOEC_WIDTHS_EXPERT;
    const int slots = r->grain == MOEC_WIDTHS_PROJECTION || r->grain == MOEC_WIDTHS_LAYER_PROJECTION ? 3 : 1;
    const size_t options = (size_t)x->n * (size_t)r->n_widths;
    const int64_t parts = row->by_layer && experts ? x->layers : 1, each = x->n / parts;
    const double seconds = (r->seconds > 0.0 ? r->seconds : 10.0) / (double)parts;
    MOEC_TRY(find_widths(&u, err));
    MOEC_TRY(MOEC_NEW(table, (size_t)(x->layers * x->experts * slots * MOEC_QUANT_WIDTHS), err));
    MOEC_TRY(MOEC_NEW(u.item, options, err));
    MOEC_TRY(MOEC_NEW(u.first, (size_t)x->n + 1, err));
    MOEC_TRY(MOEC_NEW(u.size, options, err));
    MOEC_TRY(MOEC_NEW(u.cost, options, err));
    MOEC_TRY(MOEC_NEW(u.width, options, err));
    MOEC_TRY(MOEC_NEW(u.member, options, err));
    MOEC_TRY(MOEC_NEW(u.row, 2 * (size_t)x->layers, err));
    MOEC_TRY(row->costs(table, slots, row, x, err));
    u.table = table;
    MOEC_TRY(sum_items(&u, slots, err));
    x->cost = x->bound = 0.0;
    x->proven = true;
    for (int64_t k = 0; k < parts; k++)
        MOEC_TRY(moec_within(err, solve_items(&u, k * each, (k + 1) * each, x->budget / parts, row->rows && experts, seconds, err),
                             "method %s", x->me->name));
done:
    moec_free(table);
    moec_free(u.item);
    moec_free(u.first);
    moec_free(u.size);
    moec_free(u.cost);
    moec_free(u.width);
    moec_free(u.member);
    moec_free(u.row);
    return st;
}

/* ---- methods -------------------------------------------------------------------------------------------------------------- */

static const moec_stat need_pmq[] = {MOEC_STAT_SELECTED, MOEC_STAT_PROB_SELECTED, MOEC_STAT_QUANT_FRO},
                       need_sq[] = {MOEC_STAT_QUANT_SQ}, need_gemq[] = {MOEC_STAT_NORMS_RES, MOEC_STAT_QUANT_SQ};
static const moec__widths_row
    row_direct = {.rounding = MOEC_ROUND_GPTQ, .costs = direct_costs, .gains = true},
    row_gemq = {.rounding = MOEC_ROUND_GPTQ, .costs = gemq_costs},
    row_pmq = {.rounding = MOEC_ROUND_GPTQ, .costs = pmq_costs, .whole = true, .by_layer = true, .rows = true, .alpha = 1.0, .beta = 1.5,
               .gamma = 1.0},
    row_pmq_paper = {.rounding = MOEC_ROUND_GPTQ, .costs = pmq_costs, .whole = true, .by_layer = true, .rows = true, .alpha = 1.0,
                     .beta = 1.0, .gamma = 2.0},
    row_pmq_global = {.rounding = MOEC_ROUND_GPTQ, .costs = pmq_costs, .whole = true, .rows = true, .alpha = 1.0, .beta = 1.5,
                      .gamma = 1.0};

#define MOEC_PROGRAM(id, needed) .kind = MOEC_QUANTIZE, .needs = needed, .n_needs = (int)MOEC_COUNT(needed), .row = &row_##id
extern const moec_method moec_method_quant_direct, moec_method_quant_pmq, moec_method_quant_pmq_paper, moec_method_quant_pmq_global,
    moec_method_quant_gemq;

const moec_method moec_method_quant_direct = {
    .name = "direct",
    .brief = "integer program over all layers: each width's squared error as measured, weighted by what an error of its layer costs at "
             "the model's output; rounding by GPTQ",
    .paper = "not published; ours",
    .formula = "min sum gain_l sum_t g^2 |y - y_b|^2 / mean(h'^2), sum of sizes <= budget; gain_l: KL of the layer at 2 bits over its "
               "error there, 1 where not measured",
    MOEC_PROGRAM(direct, need_sq),
    .is_default = true,
};
const moec_method moec_method_quant_pmq = {
    .name = "pmq",
    .brief = "pre-loading mixed-precision quantization as its code has it: a program for each layer, one expert at 3 bits or more and "
             "one at 2; rounding by GPTQ",
    .paper = "Mixture Compressor for Mixture-of-Experts LLMs Gains More",
    .arxiv = "2410.06270",
    .formula = "min sum_e f_e w_e^1.5 sum_sequences |F - F_eb|_F, f, w: shares of the layer's selections and of their scores",
    MOEC_PROGRAM(pmq, need_pmq),
};
const moec_method moec_method_quant_pmq_paper = {
    .name = "pmq-paper",
    .brief = "as pmq, with the exponents that the paper prints",
    .paper = "Mixture Compressor for Mixture-of-Experts LLMs Gains More",
    .arxiv = "2410.06270",
    .formula = "min sum_e f_e w_e (sum_sequences |F - F_eb|_F)^2",
    MOEC_PROGRAM(pmq_paper, need_pmq),
};
const moec_method moec_method_quant_pmq_global = {
    .name = "pmq-global",
    .brief = "as pmq, one program over all layers",
    .paper = "not published; ours, after Mixture Compressor",
    .formula = "min sum_l sum_e f_le w_le^1.5 sum_sequences |F - F_leb|_F",
    MOEC_PROGRAM(pmq_global, need_pmq),
};
const moec_method moec_method_quant_gemq = {
    .name = "gemq-like",
    .brief = "integer program over all layers: errors against the size of the layer's routed output, which stands for the paper's "
             "coefficients by gradients; rounding by GPTQ",
    .paper = "after GEMQ",
    .arxiv = "2605.23078",
    .formula = "min sum (|h|_l / |r|_l)^2 sum_t g^2 |y - y_b|^2 / mean(h'^2), |h|, |r|: sums of norms of residual stream and routed "
               "output",
    MOEC_PROGRAM(gemq, need_gemq),
};
