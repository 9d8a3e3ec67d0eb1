/* Neurons inside experts: how many, their scores, and who stays; see grain.h. */
#include "method/grain.h"

#include "base/mem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { ALIGN = 16, ALIGN_FROM = 64 };

typedef struct neuron_row {
    moec_stat sum;
    bool by_down; /* times |d_j|^2 */
} neuron_row;

moec_status moec_neurons_width(int64_t *out, const moec_request *q, moec_err *err)
{
    const int64_t I = q->model->dims.expert_width;
    int64_t shared, width = q->width > 0 ? q->width : I - (int64_t)floor((double)I * q->share + 1e-9);
    const int64_t align = q->align > 0 ? q->align : q->width == 0 && width >= ALIGN_FROM && width < I ? ALIGN : 1;
    if (width > I)
        return moec_fail(err, MOEC_EINVAL, "keeping %lld neurons: the experts have %lld", (long long)width, (long long)I);
    if (align > I)
        return moec_fail(err, MOEC_EINVAL, "--align %lld: the experts have %lld neurons", (long long)align, (long long)I);
    if (q->width > 0 && width % align != 0)
        return moec_fail(err, MOEC_EINVAL, "--keep-width %lld is no multiple of --align %lld", (long long)width, (long long)align);
    width = width / align * align;
    if (width < 1)
        return moec_fail(err, MOEC_EINVAL, "no neuron would be left of %lld in steps of %lld; remove fewer", (long long)I,
                         (long long)align);
    *out = width;
    return width < I ? moec_plan_check_width(&shared, q->model, width, err) : MOEC_OK;
}

moec_status moec_neurons_score(double *score, bool *seen, const moec_method *me, const moec_request *q, int64_t set,
                               int64_t expert, const double *g, const double *u, const double *d, moec_err *err)
{
    const neuron_row *row = me->row;
    const int64_t I = q->model->dims.expert_width;
    const bool watched = q->model->set[set].kind == MOEC_SET_MOE;
    const double n = watched ? moec_grain_sum(score, q->stats, row->sum, set, expert, I) : 0.0;
    *seen = n > 0.0;
    for (int64_t j = 0; j < I; j++) {
        score[j] = !*seen ? sqrt(g[j]) * sqrt(u[j]) * sqrt(d[j]) : score[j] / n * (row->by_down ? d[j] : 1.0);
        if (!isfinite(score[j]))
            return moec_fail(err, MOEC_ENUMERIC, "layer %lld: expert %lld: the score of neuron %lld is not finite",
                             (long long)q->model->set[set].layer, (long long)expert, (long long)j);
    }
    return MOEC_OK;
}

typedef struct rank {
    int32_t neuron;
    double score;
} rank;

static int by_score(const void *a, const void *b)
{
    const rank *x = a, *y = b;
    if (x->score != y->score)
        return x->score > y->score ? -1 : 1;
    return (x->neuron > y->neuron) - (x->neuron < y->neuron);
}

static int by_number(const void *a, const void *b)
{
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

moec_status moec_neurons_keep(int32_t *keep, const double *score, int64_t n, int64_t width, moec_err *err)
{
    rank *order = NULL;
    moec_status st = MOEC_NEW(order, (size_t)n, err);
    if (st != MOEC_OK)
        return st;
    for (int64_t j = 0; j < n; j++)
        order[j] = (rank){(int32_t)j, score[j]};
    qsort(order, (size_t)n, sizeof *order, by_score);
    for (int64_t j = 0; j < width; j++)
        keep[j] = order[j].neuron;
    qsort(keep, (size_t)width, sizeof *keep, by_number);
    moec_free(order);
    return MOEC_OK;
}

static moec_status plan_neurons(moec_plan **out, const moec_method *me, const moec_request *q, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_plan *p = NULL;
    int64_t width;
    *out = NULL;
    MOEC_TRY(moec_neurons_width(&width, q, err));
    MOEC_TRY(moec_grain_plan(&p, me, q, err));
    MOEC_TRY(moec_plan_set_option(p, "keep_width", moec_json_new_int(width), err));
    p->width = width;
    for (int64_t i = 0; i < p->n_sets; i++)
        p->layer[i].rewritten = MOEC_PART_GATE | MOEC_PART_UP | MOEC_PART_DOWN;
    *out = p;
    p = NULL;
done:
    moec_plan_free(p);
    return st;
}

static const moec_stat need_sq[] = {MOEC_STAT_SELECTED, MOEC_STAT_ACT_SQ};
static const moec_stat need_gsq[] = {MOEC_STAT_SELECTED, MOEC_STAT_GACT_SQ};
static const moec_stat need_abs[] = {MOEC_STAT_SELECTED, MOEC_STAT_ACT_ABS};
static const neuron_row row_out_norm = {MOEC_STAT_ACT_SQ, true}, row_gate_weighted = {MOEC_STAT_GACT_SQ, true},
                        row_mean_abs = {MOEC_STAT_ACT_ABS, false};

#define MOEC_NEURONS(id, needed)                                                                                       \
    .kind = MOEC_PRUNE, .grain = MOEC_GRAIN_NEURONS, .needs = needed, .n_needs = (int)MOEC_COUNT(needed), .row = &row_##id, \
    .plan = plan_neurons

extern const moec_method moec_method_out_norm, moec_method_gate_weighted, moec_method_mean_abs;

const moec_method moec_method_out_norm = {
    .name = "out-norm",
    .brief = "neurons by the error that the expert's output has without them",
    .paper = "unpublished: the exact squared error of one neuron; slimming as in SlimMoE: Structured Compression of Large MoE Models "
             "via Expert Slimming and Distillation",
    .arxiv = "2506.18349",
    .formula = "sum_t a_j^2 / n_e |d_j|^2",
    MOEC_NEURONS(out_norm, need_sq),
};
const moec_method moec_method_gate_weighted = {
    .name = "gate-weighted",
    .brief = "neurons by the error that the weighted output has without them",
    .paper = "unpublished: as out-norm with the router's weight",
    .formula = "sum_t g_t^2 a_j^2 / n_e |d_j|^2",
    MOEC_NEURONS(gate_weighted, need_gsq),
    .is_default = true,
};
const moec_method moec_method_mean_abs = {
    .name = "mean-abs",
    .brief = "neurons by their mean absolute activation",
    .paper = "Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design",
    .arxiv = "2410.19123",
    .formula = "sum_t |a_j| / n_e",
    MOEC_NEURONS(mean_abs, need_abs),
};
