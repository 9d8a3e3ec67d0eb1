/* Sums over the tokens that select an expert; see merge.h. Where outputs count, an expert's tokens run in pieces that are shared
 * out among the threads; the sums of pieces are added in their order. */
#include "method/all_outputs.h"
#include "method/merge_parts.h"

#include "base/mem.h"
#include "base/par.h"

#include <math.h>
#include <string.h>

enum { BATCH = 64 /* tokens that are routed together */ };

typedef enum mass_factor { ONE, GATE, GATE_SQ, SCORE_SQ } mass_factor;

/* A kind is sum factor |f|^power, over how many there are where `mean`. */
static const struct mass_rule {
    mass_factor factor;
    int power;
    bool mean;
} rules[MOEC_MASS_KINDS] = {
    [MOEC_MASS_COUNT] = {ONE, 0, false},       [MOEC_MASS_GATE] = {GATE, 0, false},
    [MOEC_MASS_GATE_SQ] = {GATE_SQ, 0, false}, [MOEC_MASS_REAP] = {GATE, 1, true},
    [MOEC_MASS_ENERGY] = {GATE_SQ, 2, false},  [MOEC_MASS_REAM] = {SCORE_SQ, 1, true},
    [MOEC_MASS_EQUAL] = {ONE, 0, true},
};

/* ---- scores ------------------------------------------------------------------------------------------------------------ */

typedef struct score_room {
    float *z;      /* [BATCH, E+N] */
    int32_t *ids;  /* [BATCH, slots] */
    float *gates;
} score_room;

typedef struct scores {
    const moec_merge_task *t;
    const int32_t *row;
    bool selected;
    float *out;
    score_room *room; /* [threads] */
} scores;

static moec_status score_tokens(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const scores *s = ctx;
    const moec_merge_task *t = s->t;
    const moec_dims *d = &t->model->dims;
    const int64_t all = d->experts + d->null_experts;
    score_room *r = &s->room[worker];
    moec_status st = moec_interrupted(err);
    if (st != MOEC_OK)
        return st;
    for (int64_t i = lo; i < hi; i++)
        memcpy(r->z + (i - lo) * all, t->logits + (s->row ? s->row[i] : i) * t->ld, (size_t)all * sizeof *r->z);
    moec_route(r->z, r->ids, r->gates, r->z, t->model, t->layer, hi - lo);
    for (int64_t i = lo; i < hi; i++) {
        const float *p = r->z + (i - lo) * all;
        if (!s->selected) {
            memcpy(s->out + i * d->experts, p, (size_t)d->experts * sizeof *p);
            continue;
        }
        const int32_t *ids = t->ids + (s->row ? s->row[i] : i) * t->slots;
        for (int64_t j = 0; j < t->slots; j++)
            s->out[i * t->slots + j] = ids[j] < 0 ? 0.0f : p[ids[j]];
    }
    return MOEC_OK;
}

moec_status moec__merge_scores(float *out, const moec_merge_task *t, const int32_t *row, int64_t n, bool selected, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_dims *d = &t->model->dims;
    const int threads = moec_par_threads();
    scores s = {.t = t, .row = row, .selected = selected, .out = out};
    MOEC_TRY(MOEC_NEW(s.room, (size_t)threads, err));
    for (int i = 0; i < threads; i++) {
        MOEC_TRY(MOEC_NEW(s.room[i].z, BATCH * (size_t)(d->experts + d->null_experts), err));
        MOEC_TRY(MOEC_NEW(s.room[i].ids, BATCH * (size_t)d->slots, err));
        MOEC_TRY(MOEC_NEW(s.room[i].gates, BATCH * (size_t)d->slots, err));
    }
    MOEC_TRY(moec_par_for(n, BATCH, score_tokens, &s, err));
done:
    for (int i = 0; s.room && i < threads; i++) {
        moec_free(s.room[i].z);
        moec_free(s.room[i].ids);
        moec_free(s.room[i].gates);
    }
    moec_free(s.room);
    return st;
}

/* ---- sums without outputs ------------------------------------------------------------------------------------------------ */

static double factor_of(const moec_merge_task *t, mass_factor kind, const float *score, int64_t at)
{
    const double v = kind == ONE ? 1.0 : kind == SCORE_SQ ? (double)score[at] : (double)t->gates[at];
    return kind == GATE_SQ || kind == SCORE_SQ ? v * v : v;
}

static void count_selections(int64_t *count, const moec_merge_task *t)
{
    memset(count, 0, (size_t)t->model->dims.experts * sizeof *count);
    for (int64_t i = 0; i < t->n * t->slots; i++)
        if (t->ids[i] >= 0)
            count[t->ids[i]]++;
}

static void add_factors(double *out, const moec_merge_task *t, mass_factor kind, const float *score)
{
    memset(out, 0, (size_t)t->model->dims.experts * sizeof *out);
    for (int64_t i = 0; i < t->n * t->slots; i++)
        if (t->ids[i] >= 0)
            out[t->ids[i]] += factor_of(t, kind, score, i);
}

/* ---- sums with outputs --------------------------------------------------------------------------------------------------- */

/* Selections [first, first + n) of the list are of one expert. */
typedef struct piece {
    int32_t expert;
    int64_t first, n;
} piece;

typedef struct norms {
    const moec_merge_task *t;
    int64_t before;         /* tokens of the texts before this one */
    int power;
    int32_t *token;         /* [selections] by experts, ascending in each */
    double *factor;         /* [selections] */
    piece *piece;           /* [pieces] */
    double *sum;            /* [pieces] */
    int64_t pieces;
    moec_expert_room *room; /* [threads] */
    float **x;              /* [threads] panels */
    int threads;
} norms;

/* |f|^2 of the tokens of one panel, in float64: outputs of any size that float32 holds have one. */
static void square_panel(double sum[MOEC_PANEL], const float *panel, int64_t width)
{
    memset(sum, 0, MOEC_PANEL * sizeof *sum);
    for (int64_t c = 0; c < width; c++)
        for (int64_t lane = 0; lane < MOEC_PANEL; lane++)
            sum[lane] += (double)panel[c * MOEC_PANEL + lane] * (double)panel[c * MOEC_PANEL + lane];
}

static moec_status run_piece(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const norms *u = ctx;
    const moec_merge_task *t = u->t;
    const int64_t hidden = t->model->dims.hidden;
    moec_status st = MOEC_OK;
    for (int64_t k = lo; k < hi; k++) {
        const piece *p = &u->piece[k];
        double sum_sq[MOEC_PANEL];
        MOEC_TRY(moec_interrupted(err));
        moec__expert_input(u->x[worker], t->x, u->token + p->first, p->n, t->model);
        st = moec__expert_run(&u->room[worker], u->x[worker], p->n, t->model, t->layer, p->expert, err);
        MOEC_TRY(moec_within(err, st, "expert %d", (int)p->expert));
        u->sum[k] = 0.0;
        for (int64_t i = 0; i < p->n; i++) {
            const int64_t lane = i % MOEC_PANEL;
            if (lane == 0)
                square_panel(sum_sq, u->room[worker].out + i * hidden, hidden);
            if (!isfinite(sum_sq[lane]))
                return moec_fail(err, MOEC_ENUMERIC, "expert %d: its output of token %d is not finite", (int)p->expert,
                                 (int)(u->before + u->token[p->first + i]));
            u->sum[k] += u->factor[p->first + i] * (u->power == 2 ? sum_sq[lane] : sqrt(sum_sq[lane]));
        }
    }
done:
    return st;
}

/* Lists of the experts' tokens, cut into pieces. */
static moec_status list_selections(norms *u, const int64_t *count, mass_factor kind, const float *score, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_merge_task *t = u->t;
    const int64_t experts = t->model->dims.experts;
    int64_t *at = NULL, all = 0;
    for (int64_t e = 0; e < experts; e++) {
        all += count[e];
        u->pieces += (count[e] + MOEC_OUTPUTS_BLOCK - 1) / MOEC_OUTPUTS_BLOCK;
    }
    MOEC_TRY(MOEC_NEW(at, (size_t)experts, err));
    MOEC_TRY(MOEC_NEW(u->token, (size_t)all, err));
    MOEC_TRY(MOEC_NEW(u->factor, (size_t)all, err));
    MOEC_TRY(MOEC_NEW(u->piece, (size_t)u->pieces, err));
    MOEC_TRY(MOEC_NEW(u->sum, (size_t)u->pieces, err));
    all = u->pieces = 0;
    for (int64_t e = 0; e < experts; all += count[e++]) {
        at[e] = all;
        for (int64_t i = 0; i < count[e]; i += MOEC_OUTPUTS_BLOCK) {
            const int64_t rest = count[e] - i;
            u->piece[u->pieces++] = (piece){(int32_t)e, all + i, rest < MOEC_OUTPUTS_BLOCK ? rest : MOEC_OUTPUTS_BLOCK};
        }
    }
    for (int64_t i = 0; i < t->n * t->slots; i++) {
        if (t->ids[i] < 0)
            continue;
        const int64_t to = at[t->ids[i]]++;
        u->token[to] = (int32_t)(i / t->slots);
        u->factor[to] = factor_of(t, kind, score, i);
    }
done:
    moec_free(at);
    return st;
}

static moec_status add_norms(double *out, const moec_merge_task *t, int64_t before, const struct mass_rule *r, const int64_t *count,
                             const float *score, moec_err *err)
{
    moec_status st = MOEC_OK;
    norms u = {.t = t, .before = before, .power = r->power, .threads = moec_par_threads()};
    MOEC_TRY(list_selections(&u, count, r->factor, score, err));
    MOEC_TRY(MOEC_NEW(u.room, (size_t)u.threads, err));
    MOEC_TRY(MOEC_NEW(u.x, (size_t)u.threads, err));
    for (int i = 0; i < u.threads; i++) {
        MOEC_TRY(moec__expert_room_new(&u.room[i], t->model, MOEC_OUTPUTS_BLOCK, err));
        MOEC_TRY(MOEC_NEW(u.x[i], (size_t)(MOEC_OUTPUTS_BLOCK * t->model->dims.hidden), err));
    }
    MOEC_TRY(moec_par_for(u.pieces, 1, run_piece, &u, err));
    memset(out, 0, (size_t)t->model->dims.experts * sizeof *out);
    for (int64_t k = 0; k < u.pieces; k++)
        out[u.piece[k].expert] += u.sum[k];
done:
    for (int i = 0; i < u.threads; i++) {
        if (u.room)
            moec__expert_room_release(&u.room[i]);
        if (u.x)
            moec_free(u.x[i]);
    }
    void *const all[] = {u.token, u.factor, u.piece, u.sum, u.room, u.x};
    for (size_t i = 0; i < MOEC_COUNT(all); i++)
        moec_free(all[i]);
    return st;
}

/* ---- both ---------------------------------------------------------------------------------------------------------------- */

bool moec__merge_mass_runs(moec_merge_mass kind)
{
    return rules[kind].power > 0;
}

/* Of one text, `before` tokens behind the first: sum [E] and count [E]. */
static moec_status sum_up(double *sum, int64_t *count, const moec_merge_task *t, int64_t before, const struct mass_rule *r,
                          moec_err *err)
{
    moec_status st = MOEC_OK;
    float *score = NULL;
    count_selections(count, t);
    if (r->factor == SCORE_SQ) {
        size_t values;
        if (!moec_mul_size(&values, (size_t)t->n, (size_t)t->slots))
            MOEC_TRY(moec_fail(err, MOEC_ENOMEM, "scores of %lld tokens", (long long)t->n));
        MOEC_TRY(MOEC_NEW(score, values, err));
        MOEC_TRY(moec__merge_scores(score, t, NULL, t->n, true, err));
    }
    if (r->power > 0)
        MOEC_TRY(add_norms(sum, t, before, r, count, score, err));
    else
        add_factors(sum, t, r->factor, score);
done:
    moec_free(score);
    return st;
}

static moec_merge_task task_of_text(const moec_merge_task *t, int64_t d)
{
    moec_merge_task one = *t;
    const int64_t at = t->text[d];
    one.n = t->text[d + 1] - at;
    one.x += at * t->model->dims.hidden;
    one.logits += at * t->ld;
    one.ids += at * t->slots;
    one.gates += at * t->slots;
    return one;
}

/* What a text's sums count. */
static double weight_of(const double *sum, int64_t n, double weight, bool mean)
{
    double all = 0.0;
    if (mean)
        return weight;
    for (int64_t e = 0; e < n; e++)
        all += sum[e];
    return all > 0.0 ? weight / all : 0.0;
}

moec_status moec_merge_mass_of(double *out, const moec_merge_task *t, moec_merge_mass kind, moec_err *err)
{
    moec_status st = MOEC_OK;
    const struct mass_rule *r = &rules[kind];
    const int64_t experts = t->model->dims.experts, texts = t->texts > 1 ? t->texts : 1;
    int64_t *count = NULL;
    double *sum = NULL, *hits = NULL;
    MOEC_TRY(moec__merge_check(t, false, r->power > 0, err));
    MOEC_TRY(MOEC_NEW(count, (size_t)experts, err));
    MOEC_TRY(MOEC_NEW(sum, (size_t)experts, err));
    MOEC_TRY(MOEC_NEW(hits, (size_t)experts, err));
    memset(out, 0, (size_t)experts * sizeof *out);
    for (int64_t d = 0; d < texts; d++) {
        const moec_merge_task one = texts > 1 ? task_of_text(t, d) : *t;
        if (one.n < 1)
            continue;
        MOEC_TRY(sum_up(sum, count, &one, texts > 1 ? t->text[d] : 0, r, err));
        const double weight = texts > 1 ? weight_of(sum, experts, t->text_weight[d], r->mean) : 1.0;
        for (int64_t e = 0; e < experts; e++) {
            out[e] += weight * sum[e];
            hits[e] += weight * (double)count[e];
        }
    }
    for (int64_t e = 0; e < experts; e++) {
        if (r->mean && hits[e] > 0.0)
            out[e] /= hits[e];
        if (!isfinite(out[e]))
            MOEC_TRY(moec_fail(err, MOEC_ENUMERIC, "expert %lld: a weight or score of the router for it is not finite",
                               (long long)e));
    }
done:
    moec_free(count);
    moec_free(sum);
    moec_free(hits);
    return st;
}

size_t moec__merge_mass_bytes(const moec_model *m, int64_t n)
{
    const moec_dims *d = &m->dims;
    const size_t selections = (size_t)n * (size_t)d->slots, e = (size_t)d->experts, slots = (size_t)d->slots;
    const size_t pieces = selections / MOEC_OUTPUTS_BLOCK + e;
    const size_t one = moec__expert_room_bytes(m, MOEC_OUTPUTS_BLOCK) + 4 * MOEC_OUTPUTS_BLOCK * (size_t)d->hidden +
                       4 * BATCH * (e + (size_t)d->null_experts + 2 * slots);
    return selections * (4 + 4 + 8) + pieces * (sizeof(piece) + 8) + 32 * e + one * (size_t)moec_par_threads();
}
