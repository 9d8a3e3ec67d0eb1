/* Scores from the router's rows alone, w_e of this model and v_e of the one it was fine-tuned from:
 *
 *    router-norm    |w_e|_2 - |v_e|_2       the published one: signed
 *    router-change  |w_e - v_e|_2           ours: a row that turned counts too
 *    router-row     |w_e|_2                 baseline, one checkpoint
 *
 * Experts of the lowest score are removed. Router biases are not looked at.
 * Source: Chowdhury et al. (ICML 2024) and github.com/nowazrabbani/MoE_Pruning. Departs: there a removed expert stays in the
 * router and gives zeros ("drop"); here its row goes and its tokens take their next choice ("redirect"), as clients need it. */
#include "method/method.h"

#include "base/log.h"
#include "base/mem.h"

#include <math.h>
#include <string.h>

typedef enum measure { MEASURE_NORM, MEASURE_CHANGE, MEASURE_ROW } measure;

moec_status moec_row_squares(double *out, const moec_weight *w, moec_err *err)
{
    float *row = NULL;
    moec_status st = MOEC_NEW(row, (size_t)w->cols, err);
    for (int64_t r = 0; st == MOEC_OK && r < w->rows; r++) {
        moec_weight_read(row, w->cols, w, r, 1, 0, w->cols);
        out[r] = 0.0;
        for (int64_t c = 0; c < w->cols; c++)
            out[r] += (double)row[c] * (double)row[c];
    }
    moec_free(row);
    return st;
}

/* |w_e - v_e|^2. */
static moec_status change_squares(double *out, const moec_weight *w, const moec_weight *v, moec_err *err)
{
    moec_status st = MOEC_OK;
    float *a = NULL;
    MOEC_TRY(MOEC_NEW(a, 2 * (size_t)w->cols, err));
    float *b = a + w->cols;
    for (int64_t r = 0; r < w->rows; r++) {
        moec_weight_read(a, w->cols, w, r, 1, 0, w->cols);
        moec_weight_read(b, w->cols, v, r, 1, 0, w->cols);
        out[r] = 0.0;
        for (int64_t c = 0; c < w->cols; c++) {
            const double d = (double)a[c] - (double)b[c];
            out[r] += d * d;
        }
    }
done:
    moec_free(a);
    return st;
}

static moec_status check_base(const moec_method *me, const moec_model *m, const moec_model *base, moec_err *err)
{
    if (!base)
        return moec_fail(err, MOEC_EINVAL, "it compares with the checkpoint before fine-tuning: --base DIR is missing");
    const struct {
        const char *name;
        int64_t have, want;
    } size[] = {
        {"layers", base->dims.layers, m->dims.layers},    {"layers with experts", base->moe_layers, m->moe_layers},
        {"experts", base->dims.experts, m->dims.experts}, {"hidden", base->dims.hidden, m->dims.hidden},
    };
    if (strcmp(base->family->model_type, m->family->model_type) != 0)
        return moec_fail(err, MOEC_EFORMAT, "--base: it is of type %s, the model is %s", base->family->model_type,
                         m->family->model_type);
    for (size_t i = 0; i < MOEC_COUNT(size); i++)
        if (size[i].have != size[i].want)
            return moec_fail(err, MOEC_EFORMAT, "--base: %s: it has %lld, the model has %lld", size[i].name,
                             (long long)size[i].have, (long long)size[i].want);
    for (int64_t l = 0; l < m->moe_layers; l++)
        if (base->set[l].layer != m->set[l].layer)
            return moec_fail(err, MOEC_EFORMAT, "--base: its layers with experts are others than the model's");
    for (int64_t l = 0; l < m->moe_layers; l++)
        if (base->set[l].router->cols != m->set[l].router->cols) /* one of two steps has a width of its own */
            return moec_fail(err, MOEC_EFORMAT, "--base: layer %lld: its router has %lld columns, the model's %lld",
                             (long long)m->set[l].layer, (long long)base->set[l].router->cols,
                             (long long)m->set[l].router->cols);
    if (m->family->score == MOEC_SCORE_SIGMOID && m->layer[m->set[0].layer].vec[MOEC_VEC_SELECTION_BIAS])
        moec_warn("method %s: this router also chooses by a selection bias, which changes in training and is not looked at",
                  me->name);
    return MOEC_OK;
}

/* A router that was frozen in fine-tuning says nothing. */
static moec_status check_frozen(const double *score, int64_t n, moec_err *err)
{
    int64_t same = 0;
    for (int64_t i = 0; i < n; i++)
        same += score[i] == 0.0;
    return 2 * same <= n ? MOEC_OK
                         : moec_fail(err, MOEC_EFORMAT, "--base: %lld of %lld differences of router rows are exactly 0: the router was "
                                     "frozen, or it is the same checkpoint", (long long)same, (long long)n);
}

static moec_status score_layer(double *score, double *old, measure what, const moec_request *q, int64_t l, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_weight *w = q->model->set[l].router, *v = what == MEASURE_ROW ? NULL : q->base->set[l].router;
    MOEC_TRY(what == MEASURE_CHANGE ? change_squares(score, w, v, err) : moec_row_squares(score, w, err));
    if (what == MEASURE_NORM)
        MOEC_TRY(moec_row_squares(old, v, err));
    for (int64_t e = 0; e < w->rows; e++)
        score[e] = sqrt(score[e]) - (what == MEASURE_NORM ? sqrt(old[e]) : 0.0);
done:
    return st;
}

static moec_status plan_router(moec_plan **out, const moec_method *me, const moec_request *q, moec_err *err)
{
    moec_status st = MOEC_OK;
    const measure what = *(const measure *)me->row;
    const int64_t layers = q->model->moe_layers, n = q->model->dims.experts;
    double *score = NULL, *old = NULL;
    *out = NULL;
    if (what != MEASURE_ROW)
        MOEC_TRY(check_base(me, q->model, q->base, err));
    MOEC_TRY(MOEC_NEW(score, (size_t)(layers * n), err));
    MOEC_TRY(MOEC_NEW(old, (size_t)n, err));
    for (int64_t l = 0; l < layers; l++)
        MOEC_TRY(score_layer(score + l * n, old, what, q, l, err));
    if (what != MEASURE_ROW)
        MOEC_TRY(check_frozen(score, layers * n, err));
    MOEC_TRY(moec_select(out, me, q, score, err));
done:
    moec_free(old);
    moec_free(score);
    return st;
}

static const measure norm = MEASURE_NORM, change = MEASURE_CHANGE, row = MEASURE_ROW;
static const moec_opt base_opts[] = {MOEC_BASE_ROW(moec_request, base_print), {.kind = MOEC_OPT_END}};

extern const moec_method moec_method_router_norm, moec_method_router_change, moec_method_router_row;
const moec_method moec_method_router_norm = {
    .name = "router-norm",
    .kind = MOEC_PRUNE,
    .brief = "how much the norm of the router's row grew in fine-tuning; needs --base, no statistics. Published for removed experts "
             "that give zeros; here their tokens take the next choice",
    .paper = "A Provably Effective Method for Pruning Experts in Fine-tuned Sparse Mixture-of-Experts",
    .arxiv = "2405.16646",
    .formula = "|w_e| - |w_e of --base|",
    .opts = base_opts,
    .row = &norm,
    .plan = plan_router,
};
const moec_method moec_method_router_change = {
    .name = "router-change",
    .kind = MOEC_PRUNE,
    .brief = "how far the router's row moved in fine-tuning; needs --base, no statistics",
    .paper = "not published; ours, after router-norm",
    .formula = "|w_e - w_e of --base|",
    .opts = base_opts,
    .row = &change,
    .plan = plan_router,
};
const moec_method moec_method_router_row = {
    .name = "router-row",
    .kind = MOEC_PRUNE,
    .brief = "norm of the router's row; needs no statistics",
    .paper = "baseline",
    .formula = "|w_e|",
    .row = &row,
    .plan = plan_router,
};
