/* Merged experts by the recipe's way, then the router's rows of the groups. */
#include "method/merge_parts.h"

#include "base/mem.h"
#include "base/par.h"

#include <math.h>

/* --- what can be filled ----------------------------------------------------------------------------------------------------- */

static moec_status check_view(const moec_weight *w, const char *what, int64_t expert, moec_err *err)
{
    if (w->of && (w->storage != MOEC_PLAIN ||
                  (w->of->dtype != MOEC_F32 && w->of->dtype != MOEC_BF16 && w->of->dtype != MOEC_F16)))
        return moec_fail(err, MOEC_EINVAL, "merge: %s of expert %lld is %s, expected F32, BF16 or F16 to write to", what,
                         (long long)expert, w->storage != MOEC_PLAIN ? "quantized" : moec_dtypes[w->of->dtype].name);
    return MOEC_OK;
}

static moec_status check_target(const moec_filling *f, moec_err *err)
{
    moec_status st = MOEC_OK;
    for (int64_t e = 0; e < f->experts; e++) {
        const moec_mlp *to = &f->to->expert[e];
        if (!moec__fill_open(f, e))
            continue;
        MOEC_TRY(check_view(&to->gate, "gate", e, err));
        MOEC_TRY(check_view(&to->up, "up", e, err));
        MOEC_TRY(check_view(&to->down, "down", e, err));
    }
    MOEC_TRY(check_view(&f->to->router, "the router's row", 0, err));
    for (int i = 0; i < 2; i++) {
        const moec_tensor *bias = i == 0 ? f->to->gate_up_bias : f->to->down_bias;
        const moec_weight w = bias ? moec_weight_of(bias) : (moec_weight){0};
        MOEC_TRY(check_view(&w, i == 0 ? "bias of gate and up" : "bias of down", 0, err));
    }
done:
    return st;
}

static moec_status check_groups(const moec_filling *f, moec_err *err)
{
    const moec_merge_groups *g = f->g;
    for (int64_t c = 0; c < f->experts; c++) {
        double sum = 0.0;
        int64_t members = 0;
        if (g->centre[c] < -1 || g->centre[c] >= f->experts || (g->centre[c] >= 0 && g->centre[g->centre[c]] != g->centre[c]))
            return moec_fail(err, MOEC_EINVAL, "merge: expert %lld goes to %d, expected -1 or an expert that stays", (long long)c,
                             (int)g->centre[c]);
        if (f->r->fill == MOEC_FILL_SEGMENTS && !(g->saliency[c] >= 0.0 && isfinite(g->saliency[c])))
            return moec_fail(err, MOEC_EINVAL, "merge: expert %lld has saliency %g, expected a number from 0", (long long)c,
                             g->saliency[c]);
        for (int64_t e = 0; e < f->experts; e++)
            if (g->centre[e] == c) {
                sum += g->weight[e];
                members++;
            }
        if (members > 1 && !(fabs(sum - 1.0) < 1e-6))
            return moec_fail(err, MOEC_EINVAL, "merge: weights in the group of expert %lld add up to %g, expected 1",
                             (long long)c, sum);
    }
    return MOEC_OK;
}

static bool wants_activations(const moec_merge_recipe *r)
{
    return r->fill != MOEC_FILL_SEGMENTS &&
           (r->align == MOEC_ALIGN_ACTIVATIONS || (r->fill == MOEC_FILL_SUBSPACE && r->rank < 1.0 && r->whiten));
}

moec_status moec__merge_fill_check(const moec_merge_recipe *r, bool gated, moec_err *err)
{
    const moec_segment_opts *s = &r->segment;
    if (wants_activations(r) && !gated)
        return moec_fail(err, MOEC_EINVAL, "activations are wanted of experts that have no gate; align=canonical and whiten=off do "
                         "without");
    if (r->fill == MOEC_FILL_SUBSPACE && !(r->rank > 0.0))
        return moec_fail(err, MOEC_EINVAL, "rank=%g: nothing would be left of the experts, give a share above 0, as rank=0.5", r->rank);
    if (r->fill == MOEC_FILL_SEGMENTS && !((gated ? s->gate : 0.0) + s->up + s->down > 0.0))
        return moec_fail(err, MOEC_EINVAL, "segments: gate, up and down all have weight 0 in the similarity; give some, as "
                         "segment-up=0.5 segment-down=0.5");
    return MOEC_OK;
}

static moec_status check(const moec_filling *f, moec_err *err)
{
    moec_status st = MOEC_OK;
    MOEC_TRY(moec__merge_fill_check(f->r, f->gated, err));
    if (wants_activations(f->r) && f->t->n < 1)
        return moec_fail(err, MOEC_EINVAL, "activations are wanted, but there are no tokens");
    MOEC_TRY(check_groups(f, err));
    MOEC_TRY(check_target(f, err));
done:
    return st;
}

/* --- the router ------------------------------------------------------------------------------------------------------------- */

/* What expert e's row counts in that of centre c. */
static double row_weight(const moec_filling *f, int64_t c, int64_t e, int64_t members)
{
    const bool inside = f->g->centre[e] == c;
    switch (f->r->router) {
    case MOEC_ROW_MEAN:
        return inside ? 1.0 / (double)members : 0.0;
    case MOEC_ROW_WEIGHTED:
        return inside ? members > 1 ? f->g->weight[e] : 1.0 : 0.0;
    case MOEC_ROW_ADD: /* of a merged expert the group took all neurons */
        return f->took && e != c ? (double)f->took[e * f->experts + c] / (double)f->width : (double)inside;
    case MOEC_ROW_KEEP:
    case MOEC_ROW_LSE:
    case MOEC_ROW_COUNT:
        break;
    }
    return e == c;
}

static moec_status fill_row(const moec_filling *f, int64_t c, double *sum, float *row, moec_err *err)
{
    const moec_layer *l = f->t->layer;
    const moec_weight *from = &l->mat[MOEC_MAT_ROUTER];
    const int64_t cols = from->cols;
    int64_t members = 0, others = 0;
    for (int64_t e = 0; e < f->experts; e++)
        members += f->g->centre[e] == c;
    for (int64_t i = 0; i < cols; i++)
        sum[i] = 0.0;
    for (int64_t e = 0; e < f->experts; e++) {
        const double weight = row_weight(f, c, e, members);
        const int64_t at = l->router_row ? l->router_row[e] : e;
        if (!(weight > 0.0) || at < 0)
            continue;
        moec_weight_read(row, cols, from, at, 1, 0, cols);
        for (int64_t i = 0; i < cols; i++)
            sum[i] += weight * (double)row[i];
        others += e != c;
    }
    if (others == 0) /* as it is */
        return MOEC_OK;
    for (int64_t i = 0; i < cols; i++)
        row[i] = (float)sum[i];
    return moec_within(err, moec_weight_write(&f->to->router, row, cols, f->to->row[c], 1, 0, cols, err),
                       "router's row of expert %lld", (long long)c);
}

static moec_status fill_router(const moec_filling *f, moec_err *err)
{
    moec_status st = MOEC_OK;
    double *sum = NULL;
    float *row = NULL;
    if (!f->to->router.of || f->r->router == MOEC_ROW_KEEP || f->r->router == MOEC_ROW_LSE)
        return MOEC_OK;
    MOEC_TRY(MOEC_NEW(sum, (size_t)f->to->router.cols, err));
    MOEC_TRY(MOEC_NEW(row, (size_t)f->to->router.cols, err));
    for (int64_t c = 0; c < f->experts; c++)
        if (moec__fill_open(f, c) && f->to->row[c] >= 0)
            MOEC_TRY(fill_row(f, c, sum, row, err));
done:
    moec_free(sum);
    moec_free(row);
    return st;
}

/* --- merge.h ---------------------------------------------------------------------------------------------------------------- */

static int64_t larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

moec_status moec_merge_fill_all(moec_merge_tally *out, const moec_merge_target *to, const moec_merge_task *t,
                                const moec_merge_groups *g, const moec_merge_recipe *r, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_dims *d = &t->model->dims;
    moec_filling f = {.to = to, .t = t, .g = g, .r = r, .tally = out, .experts = d->experts, .hidden = d->hidden,
                      .width = d->expert_width};
    *out = (moec_merge_tally){.merged = 0};
    f.gated = t->layer->expert[0].gate.of != NULL;
    f.scales = f.gated && t->model->family->activation == MOEC_ACT_SWIGLU;
    f.biased = t->layer->gate_up_bias != NULL;
    MOEC_TRY(check(&f, err));
    MOEC_TRY(moec__room_new(&f.room, MOEC_MERGE_BAND * larger(f.hidden, f.width), err));
    if (r->fill == MOEC_FILL_SEGMENTS) {
        MOEC_TRY(MOEC_NEW(f.took, (size_t)(f.experts * f.experts), err));
        MOEC_TRY(moec__fill_segments(&f, err));
    } else {
        MOEC_TRY(moec__fill_average(&f, err));
    }
    MOEC_TRY(fill_router(&f, err));
    out->gain = f.alignments > 0 ? f.gain / (double)f.alignments : 0.0;
done:
    moec_free(f.took);
    moec_free(f.room.store);
    return moec_within(err, st, "merge");
}

size_t moec__merge_fill_bytes(const moec_model *m, const moec_merge_recipe *r)
{
    const size_t E = (size_t)m->dims.experts, room = MOEC_MERGE_BAND * (size_t)larger(m->dims.hidden, m->dims.expert_width);
    return (r->fill == MOEC_FILL_SEGMENTS ? moec__fill_segments_bytes(m) : moec__fill_average_bytes(m, r)) + E * E * sizeof(int32_t) +
           (size_t)moec_par_threads() * room * sizeof(float);
}
