/* Routers: logits, scores, who is chosen and with what weight. One pipeline for all families; which way it takes is in the
 * family's rules (score, choice, group) and the config's numbers.
 *
 *   logits z = W x + b, or W tanh(V x); where they are carried, plus M z', z' those of the MoE layer before
 *   z over its standard deviation, times another, where the config says so; what is carried is z as it was
 *   scores s = softmax(z), sigmoid(z) or max(z, 0), over all E + N rows
 *   choice c = s + selection bias, experts outside the best groups at 0 or -infinity
 *   chosen by c, weighted by s (or by the rule of the choice), renormalised over the true experts, times route_scale
 *
 * Sources: transformers' modeling_*.py of the families; Dynamic-MoE (arXiv 2403.07652) for top-p, ReMoE (arXiv 2412.14711)
 * for the positive ones, AdaMoE (arXiv 2406.13233) and MoE++ (arXiv 2410.07348) for null experts, the latter's released
 * code for carried logits, sparsemixer from modeling_phimoe.py. */
#include "model/forward_parts.h"
#include "num/vec.h"

#include <math.h>
#include <string.h>

enum { MOST_GROUPS = 65536, BITS = 64 }; /* config.c reads up to 65535 experts */

/* ---- weights and logits ---------------------------------------------------------------------------------------------- */

static void widen(float *out, const moec_tensor *t, int64_t n)
{
    moec_dtypes[t->dtype].to_f32(out, t->data, n);
}

static float *read_whole(float *store, const moec_weight *w)
{
    if (!w->of)
        return NULL;
    moec_weight_read(store, w->cols, w, 0, w->rows, 0, w->cols);
    return store;
}

static void load_selection(moec_router *r, const moec_model *m, const moec_layer *l)
{
    r->removed = l->removed;
    r->selection = NULL;
    if (!l->vec[MOEC_VEC_SELECTION_BIAS])
        return;
    r->selection = r->selection_store;
    widen(r->selection, l->vec[MOEC_VEC_SELECTION_BIAS], m->dims.experts);
    for (int64_t e = 0; r->removed && e < m->dims.experts; e++)
        if (r->removed[e]) /* a score of 0 with a bias could still win */
            r->selection[e] = -INFINITY;
}

void moec__router_load(moec_router *r, const moec_model *m, const moec_layer *l)
{
    const moec_dims *d = &m->dims;
    r->layer = l;
    r->rows = r->bias = r->selection = r->in = r->map = NULL;
    if (!l)
        return;
    const moec_weight *rows = &l->mat[MOEC_MAT_ROUTER], *null_rows = &l->mat[MOEC_MAT_ROUTER_NULL];
    r->width = rows->cols;
    r->rows = r->rows_store;
    if (!l->router_row)
        moec_weight_read(r->rows, r->width, rows, 0, d->experts, 0, r->width);
    for (int64_t e = 0; l->router_row && e < d->experts; e++)
        if (l->router_row[e] >= 0)
            moec_weight_read(r->rows + e * r->width, r->width, rows, l->router_row[e], 1, 0, r->width);
        else
            memset(r->rows + e * r->width, 0, (size_t)r->width * sizeof *r->rows);
    if (d->null_experts > 0)
        moec_weight_read(r->rows + d->experts * r->width, r->width, null_rows, 0, d->null_experts, 0, r->width);
    r->in = read_whole(r->in_store, &l->mat[MOEC_MAT_ROUTER_IN]);
    r->map = read_whole(r->map_store, &l->mat[MOEC_MAT_ROUTER_MAP]);
    if (l->bias[MOEC_MAT_ROUTER] || l->bias[MOEC_MAT_ROUTER_NULL]) {
        r->bias = r->bias_store;
        memset(r->bias, 0, (size_t)(d->experts + d->null_experts) * sizeof *r->bias);
        if (l->bias[MOEC_MAT_ROUTER])
            widen(r->bias, l->bias[MOEC_MAT_ROUTER], d->experts);
        if (l->bias[MOEC_MAT_ROUTER_NULL])
            widen(r->bias + d->experts, l->bias[MOEC_MAT_ROUTER_NULL], d->null_experts);
    }
    load_selection(r, m, l);
    for (int64_t e = 0; r->norm && e < d->experts; e++)
        r->norm[e] = r->in || r->map ? 0.0f : (float)sqrt(moec_sum_sq(r->rows + e * r->width, r->width));
}

static moec_status tanh_panels(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    float *x = ctx;
    (void)worker;
    (void)err;
    for (int64_t i = lo; i < hi; i++)
        x[i] = tanhf(x[i]);
    return MOEC_OK;
}

/* panel_out = logits of m <= MOEC_BLOCK tokens in panel_in, without the bias. */
static moec_status block_logits(const moec_router *r, moec_forward *f, moec_scratch *s, int64_t m, moec_err *err)
{
    const moec_dims *d = &f->m->dims;
    const int64_t all = d->experts + d->null_experts;
    const float *x = s->panel_in;
    if (r->in) {
        moec_status st = moec_gemm(s->panel_a, x, m, d->hidden, r->in, MOEC_F32, r->width, MOEC_COMPUTE_F32, s->gemm, err);
        if (st != MOEC_OK)
            return st;
        moec__share(f, moec_panels(m) * MOEC_PANEL * r->width, 1, tanh_panels, s->panel_a);
        x = s->panel_a;
    }
    return moec_gemm(s->panel_out, x, m, r->width, r->rows, MOEC_F32, all, MOEC_COMPUTE_F32, s->gemm, err);
}

moec_status moec__router_add_carried(float *logits, const moec_router *r, const float *before, moec_forward *f,
                                     moec_scratch *s, int64_t n, moec_err *err)
{
    const int64_t all = f->m->dims.carried;
    int32_t token[MOEC_BLOCK];
    float ones[MOEC_BLOCK];
    for (int i = 0; i < MOEC_BLOCK; i++) {
        token[i] = i;
        ones[i] = 1.0f;
    }
    for (int64_t at = 0; r->map && at < n; at += MOEC_BLOCK) {
        int64_t m = n - at < MOEC_BLOCK ? n - at : MOEC_BLOCK;
        moec__share_pack(f, s->panel_in, before + at * all, all, NULL, m, all);
        moec_status st = moec_gemm(s->panel_out, s->panel_in, m, all, r->map, MOEC_F32, all, MOEC_COMPUTE_F32, s->gemm, err);
        if (st != MOEC_OK)
            return st;
        moec__share_scatter(f, logits + at * all, all, token, ones, s->panel_out, m, all);
    }
    return MOEC_OK;
}

moec_status moec__router_logits(float *const *out, const moec_router *const *router, int n_routers, moec_forward *f,
                                moec_scratch *s, int64_t n, moec_err *err)
{
    const moec_dims *d = &f->m->dims;
    const int64_t all = d->experts + d->null_experts;
    for (int64_t at = 0; at < n; at += MOEC_BLOCK) {
        int64_t m = n - at < MOEC_BLOCK ? n - at : MOEC_BLOCK;
        moec__share_pack(f, s->panel_in, s->x + at * d->hidden, d->hidden, NULL, m, d->hidden);
        for (int i = 0; i < n_routers; i++) {
            moec_status st = block_logits(router[i], f, s, m, err);
            if (st != MOEC_OK)
                return st;
            moec_panel_unpack(out[i] + at * all, all, s->panel_out, m, all);
            for (int64_t t = at; router[i]->bias && t < at + m; t++)
                moec_add(out[i] + t * all, router[i]->bias, all);
            for (int64_t e = 0; router[i]->removed && e < d->experts; e++)
                for (int64_t t = at; router[i]->removed[e] && t < at + m; t++)
                    out[i][t * all + e] = -INFINITY;
        }
    }
    return MOEC_OK;
}

/* ---- choosing -------------------------------------------------------------------------------------------------------- */

/* How one token's experts are compared. */
typedef struct chooser {
    const float *v;             /* [all] logits or scores */
    const float *bias;          /* [experts] or NULL */
    int64_t experts, all;       /* rows of true experts, and with the null ones */
    int64_t groups, group_size; /* groups 1: no limit */
    float outside;              /* value of an expert whose group was not kept */
    uint64_t *kept;             /* bit for each group */
} chooser;

static inline bool is_kept(const chooser *c, int64_t group)
{
    return c->kept[group / BITS] >> (group % BITS) & 1;
}

static inline float biased(const chooser *c, int64_t e)
{
    return c->bias && e < c->experts ? c->v[e] + c->bias[e] : c->v[e];
}

static inline float value(const chooser *c, int64_t e)
{
    return c->groups > 1 && e < c->experts && !is_kept(c, e / c->group_size) ? c->outside : biased(c, e);
}

/* A group is as good as its best expert, or as its two best together. */
static float group_value(const chooser *c, int64_t group, moec_group_rule rule)
{
    float best = -INFINITY, second = -INFINITY;
    for (int64_t e = group * c->group_size; e < (group + 1) * c->group_size; e++) {
        float v = biased(c, e);
        if (v > best) {
            second = best;
            best = v;
        } else if (v > second) {
            second = v;
        }
    }
    return rule == MOEC_GROUP_TOP2 && c->group_size > 1 ? best + second : best;
}

/* Keeps the best groups, the lowest number first on ties. */
static void keep_groups(chooser *c, int64_t top_groups, moec_group_rule rule)
{
    memset(c->kept, 0, (size_t)((c->groups + BITS - 1) / BITS) * sizeof *c->kept);
    for (int64_t i = 0; i < top_groups; i++) {
        int64_t best = -1;
        float most = 0.0f;
        for (int64_t g = 0; g < c->groups; g++) {
            if (is_kept(c, g))
                continue;
            float v = group_value(c, g, rule);
            if (best < 0 || v > most) {
                best = g;
                most = v;
            }
        }
        c->kept[best / BITS] |= (uint64_t)1 << (best % BITS);
    }
}

/* The k largest, descending, the lowest index first on ties. */
static void top_k(int32_t *ids, const chooser *c, int64_t k)
{
    int64_t have = 0;
    float least = 0.0f;
    if (c->all <= MOEC_ORDER_MOST && !c->bias && c->groups <= 1) {
        int32_t all[MOEC_ORDER_MOST];
        moec_order(all, c->v, c->all);
        memcpy(ids, all, (size_t)k * sizeof *ids);
        return;
    }
    for (int64_t e = 0; e < c->all; e++) {
        float v = value(c, e);
        if (have == k && !(v > least))
            continue;
        int64_t i = have < k ? have++ : k - 1;
        for (; i > 0 && v > value(c, ids[i - 1]); i--)
            ids[i] = ids[i - 1];
        ids[i] = (int32_t)e;
        least = value(c, ids[have - 1]);
    }
}

/* The fewest largest scores that hold more than p together, the one that exceeds it included; all when they never do.
 * Sums in float32, as the source's cumsum. Returns how many. */
static int64_t top_p(int32_t *ids, const float *score, int64_t n, float p, int64_t most)
{
    int64_t have = 0, last = -1;
    float sum = 0.0f;
    while (have < most && !(sum > p)) {
        int64_t best = -1;
        for (int64_t e = 0; e < n; e++) { /* the next one behind `last` in descending order */
            bool behind = last < 0 || score[e] < score[last] || (score[e] == score[last] && e > last);
            if (behind && (best < 0 || score[e] > score[best]))
                best = e;
        }
        if (best < 0) /* the rest is no number */
            break;
        ids[have++] = (int32_t)best;
        sum += score[best];
        last = best;
    }
    return have;
}

/* PhiMoE's two draws. Draw: the largest logit left; its weight is its softmax over those left whose distance from it,
 * relative to the larger of their magnitude and it, is at most 2 * jitter. Each weight stands for itself: together they
 * reach up to 2. */
static int64_t sparsemixer(int32_t *ids, float *gates, const float *z, int64_t n, float jitter, int64_t k)
{
    int64_t draws = k < 2 ? k : 2;
    draws = draws < n ? draws : n;
    for (int64_t j = 0; j < draws; j++) {
        const int64_t gone = j > 0 ? ids[0] : -1;
        int64_t best = -1;
        for (int64_t e = 0; e < n; e++)
            if (e != gone && (best < 0 || z[e] > z[best]))
                best = e;
        const float top = z[best];
        float sum = 0.0f;
        for (int64_t e = 0; e < n; e++) {
            float size = fabsf(z[e]) > top ? fabsf(z[e]) : top;
            bool cut = (top - z[e]) / size > 2.0f * jitter; /* 0/0 compares false, as in the source: kept */
            sum += e == gone || cut ? 0.0f : expf(z[e] - top);
        }
        ids[j] = (int32_t)best;
        if (gates)
            gates[j] = 1.0f / sum;
    }
    return draws;
}

/* ---- one token ------------------------------------------------------------------------------------------------------- */

/* What does nothing takes no part in a sum of weights. */
static void void_zeros(float *gates, const int32_t *ids, int64_t n, const moec_model *m)
{
    for (int64_t j = 0; j < n; j++)
        if (ids[j] >= m->dims.experts && moec_family_null(m->family, ids[j] - m->dims.experts) == MOEC_NULL_ZERO)
            gates[j] = 0.0f;
}

/* Null experts leave, their weights go to null_gates; the true ones close up. Returns how many. */
static int64_t drop_null(int32_t *ids, float *gates, float *null_gates, int64_t n, const moec_dims *d)
{
    int64_t kept = 0;
    for (int64_t i = 0; null_gates && i < d->null_experts; i++)
        null_gates[i] = -1.0f;
    for (int64_t j = 0; j < n; j++)
        if (ids[j] < d->experts) {
            ids[kept] = ids[j];
            if (gates)
                gates[kept] = gates[j];
            kept++;
        } else if (null_gates && gates) {
            null_gates[ids[j] - d->experts] = gates[j];
        }
    return kept;
}

static void renormalise(float *gates, int64_t n, const moec_dims *d)
{
    float sum = 0.0f;
    for (int64_t j = 0; j < n; j++)
        sum += gates[j];
    sum += (float)d->renorm_eps;
    if (sum < (float)d->renorm_min)
        sum = (float)d->renorm_min;
    for (int64_t j = 0; j < n && sum != 0.0f; j++) /* all 0: they stay so */
        gates[j] /= sum;
}

/* By descending gate, the lowest id first on ties. Nearly sorted as it comes. */
static void sort_gates(int32_t *ids, float *gates, int64_t n)
{
    for (int64_t j = 1; j < n; j++) {
        const float g = gates[j];
        const int32_t id = ids[j];
        int64_t i = j;
        for (; i > 0 && (g > gates[i - 1] || (g == gates[i - 1] && id < ids[i - 1])); i--) {
            ids[i] = ids[i - 1];
            gates[i] = gates[i - 1];
        }
        ids[i] = id;
        gates[i] = g;
    }
}

/* The fewest largest gates that hold a share of their sum; what is renormalised keeps its sum. */
static void cut_mass(int32_t *ids, float *gates, int64_t n, const moec_dims *d, bool normalised)
{
    double sum = 0.0, kept = 0.0;
    int64_t stay = 0;
    for (int64_t j = 0; j < n; j++)
        sum += (double)gates[j];
    while (stay < n && (stay == 0 || kept < d->keep_mass * sum))
        kept += (double)gates[stay++];
    for (int64_t j = 0; normalised && j < stay && kept > 0.0; j++)
        gates[j] = (float)((double)gates[j] * sum / kept);
    for (int64_t j = stay; j < n; j++) {
        ids[j] = -1;
        gates[j] = 0.0f;
    }
}

/* out = z over its standard deviation, times another. Experts that are not to be chosen, at -infinity, have no part in it. */
static void normalise(float *out, const float *z, int64_t n, double target)
{
    double sum = 0, square = 0;
    int64_t live = 0;
    for (int64_t e = 0; e < n; e++)
        if (z[e] != -INFINITY) {
            sum += (double)z[e];
            live++;
        }
    for (int64_t e = 0; e < n; e++)
        if (z[e] != -INFINITY) {
            double off = (double)z[e] - sum / (double)live;
            square += off * off;
        }
    const float by = (float)(sqrt(square / (double)(live - 1)) / target);
    for (int64_t e = 0; e < n; e++)
        out[e] = z[e] / by;
}

static void score_all(float *score, int64_t n, moec_router_score how)
{
    if (how == MOEC_SCORE_SOFTMAX)
        moec_softmax(score, n);
    else if (how == MOEC_SCORE_SIGMOID)
        moec_sigmoid(score, n);
    else
        for (int64_t e = 0; e < n; e++)
            score[e] = score[e] <= 0.0f ? 0.0f : score[e]; /* NaN stays */
}

static moec_choice choice_of(const moec_model *m)
{
    return m->dims.top_k_softmax ? MOEC_CHOOSE_TOP_K_SOFTMAX : m->family->choice;
}

/* Choices that logits decide; they set the weights, too, but for those that are scores. Scores rise with their logits, so
 * without bias and groups the larger logit has the larger score, also where float32 scores of 1 or 0 cannot tell them
 * apart. */
static int64_t by_logits(int32_t *ids, float *gates, const chooser *c, const moec_model *m, int64_t k)
{
    if (choice_of(m) == MOEC_CHOOSE_SPARSEMIXER)
        return sparsemixer(ids, gates, c->v, c->all, (float)m->dims.jitter, k);
    top_k(ids, c, k);
    if (gates && choice_of(m) == MOEC_CHOOSE_TOP_K_SOFTMAX) {
        for (int64_t j = 0; j < k; j++)
            gates[j] = c->v[ids[j]];
        moec_softmax(gates, k);
    }
    return k;
}

static int64_t by_scores(int32_t *ids, chooser *c, const moec_model *m, int64_t slots)
{
    const moec_dims *d = &m->dims;
    int64_t n = 0;
    if (m->family->choice == MOEC_CHOOSE_TOP_P)
        return top_p(ids, c->v, c->all, (float)d->top_p, slots);
    if (m->family->choice == MOEC_CHOOSE_POSITIVE) {
        for (int64_t e = 0; e < c->all && n < slots; e++)
            if (!(c->v[e] <= 0.0f))
                ids[n++] = (int32_t)e;
        return n;
    }
    if (c->groups > 1)
        keep_groups(c, d->top_groups, m->family->group);
    top_k(ids, c, slots);
    return slots;
}

/* Does the choice follow from the logits alone? */
static bool logits_decide(const moec_router *r, const moec_model *m)
{
    const moec_choice how = choice_of(m);
    if (how == MOEC_CHOOSE_TOP_K)
        return !r->selection && m->dims.groups <= 1 && m->family->score != MOEC_SCORE_RELU; /* ReLU is flat */
    return how == MOEC_CHOOSE_TOP_K_SOFTMAX || how == MOEC_CHOOSE_SPARSEMIXER;
}

/* `score` may be `z`: what z decides is read before. */
static void route_token(float *score, int32_t *ids, float *gates, float *null_gates, const float *z, const moec_router *r,
                        const moec_model *m, uint64_t *kept)
{
    const moec_dims *d = &m->dims;
    const int64_t all = d->experts + d->null_experts, slots = d->slots;
    const bool early = logits_decide(r, m), weighted = early && choice_of(m) != MOEC_CHOOSE_TOP_K;
    if (d->logit_std > 0.0) {
        normalise(score, z, all, d->logit_std);
        z = score;
    }
    chooser c = {.v = early ? z : score, .experts = d->experts, .all = all, .groups = 1, .kept = kept};
    int64_t n = early ? by_logits(ids, gates, &c, m, slots) : 0;
    if (gates || !early) {
        if (score != z)
            memcpy(score, z, (size_t)all * sizeof *score);
        score_all(score, all, m->family->score);
    }
    if (!early) {
        c.bias = r->selection;
        c.groups = d->groups;
        c.group_size = d->experts / d->groups;
        c.outside = m->family->group == MOEC_GROUP_TOP2 ? -INFINITY : 0.0f;
        n = by_scores(ids, &c, m, slots);
    }
    for (int64_t j = 0; gates && !weighted && j < n; j++)
        gates[j] = score[ids[j]];
    if (gates && d->renorm && d->null_experts > 0)
        void_zeros(gates, ids, n, m);
    if (gates && d->renorm)
        renormalise(gates, n, d);
    for (int64_t j = 0; gates && d->route_scale != 1.0 && j < n; j++)
        gates[j] *= (float)d->route_scale;
    if (d->null_experts > 0)
        n = drop_null(ids, gates, null_gates, n, d);
    for (int64_t j = n; j < slots; j++)
        ids[j] = -1;
    if (!gates)
        return;
    memset(gates + n, 0, (size_t)(slots - n) * sizeof *gates);
    sort_gates(ids, gates, n);
    if (d->keep_mass > 0.0)
        cut_mass(ids, gates, n, d, d->renorm || choice_of(m) == MOEC_CHOOSE_TOP_K_SOFTMAX);
}

void moec__route(float *scores, int32_t *ids, float *gates, float *null_gates, const float *logits, const moec_router *r,
                 const moec_model *m, int64_t n)
{
    const int64_t nulls = m->dims.null_experts, all = m->dims.experts + nulls, slots = m->dims.slots;
    uint64_t kept[MOST_GROUPS / BITS];
    for (int64_t t = 0; t < n; t++)
        route_token(scores + t * all, ids + t * slots, gates ? gates + t * slots : NULL,
                    null_gates ? null_gates + t * nulls : NULL, logits + t * all, r, m, kept);
}

void moec_route(float *scores, int32_t *ids, float *gates, const float *logits, const moec_model *m, const moec_layer *l,
                int64_t n)
{
    float selection[MOST_GROUPS];
    moec_router r = {.layer = l, .selection_store = selection, .removed = l->removed};
    load_selection(&r, m, l);
    moec__route(scores, ids, gates, NULL, logits, &r, m, n);
}
