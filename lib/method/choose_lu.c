/* Layer-wise pruning by what the layer gives without some of its experts. See choose.h.
 *
 * With g the weights that all experts together give a token and h those under a subset S, c = g - h, and d = y - sum g_e y_e
 *
 *     |y - r_S|^2 = |d|^2 + 2 sum_e c_e <d, y_e> + sum_e sum_f c_e c_f <y_e, y_f>
 *
 * so that a token which S does not touch costs nothing and has no rounding, where |y|^2 - 2 <y, r> + |r|^2 would cancel.
 *
 * The outputs of all experts are made for a block of tokens (all_outputs.h) and become inner products before the next block; then
 * subsets are tried in parallel, each by itself. */
#include "method/choose.h"

#include "base/log.h"
#include "base/mem.h"
#include "base/par.h"
#include "method/all_outputs.h"
#include "num/linalg.h"
#include "num/vec.h"

#include <math.h>
#include <string.h>

enum {
    BATCH = 64,              /* tokens that are routed together */
    SUBSETS_A_CHUNK = 16,
};

/* One thread's memory. */
typedef struct work {
    float *rest;                     /* [H] d */
    float *gram;                     /* [E,E] */
    float *logits;                   /* [BATCH, all] then scores */
    int32_t *ids;                    /* [BATCH, slots] */
    float *gates;
    int32_t *token;                  /* [BATCH] whose these are */
    double *c;                       /* [E] all 0 between tokens */
    int32_t *touched;                /* [2 slots] experts with an entry in c */
    bool *in, *removed;              /* [E] the subset; its complement, for the router */
    double *term;                    /* [n] */
} work;

typedef struct lu {
    const moec_choice_task *t;
    moec_model model;                /* as it is afterwards */
    int64_t experts, all, slots, hidden;
    int64_t n, window;               /* tokens looked at */
    int32_t *row;                    /* [n] of the task's arrays */
    int64_t pair;                    /* E (E+1) / 2 */
    int64_t at;                      /* current block: first token, */
    const float *y;                  /* [.., E,H] outputs */
    float *gram, *cross;             /* [n,pair] lower triangle, [n,E] */
    double *rest_sq;                 /* [n] */
    int32_t *ids;                    /* [n,slots] with all experts */
    float *gates;
    bool *in;                        /* [E] who is still there */
    double *term;                    /* [n] with these, */
    bool *picked;                    /* [n,E] and who is selected */
    bool local;                      /* tokens that do not select an expert do not notice its removal */
    int32_t *candidate;              /* [E] */
    double *loss;                    /* of the candidates, or of the subsets */
    int64_t width, stay;             /* experts of a group, those of them that stay */
    int64_t *left, *choices;         /* [groups] experts still there; subsets of each group */
    int threads;
    work *w;                         /* [threads] */
} lu;

/* ---- sizes and memory ------------------------------------------------------------------------------------------------ */

size_t moec_choose_bytes(const moec_model *m)
{
    const moec_dims *d = &m->dims;
    const size_t n = MOEC_LU_TOKENS, e = (size_t)d->experts, h = (size_t)d->hidden, slots = (size_t)d->slots;
    const size_t all = e + (size_t)d->null_experts;
    const size_t shared = 4 * n * (e * (e + 1) / 2 + e + 2 * slots + 1) + n * (e + 16) + 8 * MOEC_LU_SUBSETS;
    const size_t one = 4 * (h + e * e + BATCH * (all + 2 * slots + 1) + 2 * slots) + 8 * (e + n) + 2 * e;
    return shared + one * (size_t)moec_par_threads() + moec__all_outputs_bytes(m);
}

static moec_status new_work(work *w, const lu *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    const size_t e = (size_t)u->experts, h = (size_t)u->hidden, slots = (size_t)u->slots;
    MOEC_TRY(MOEC_NEW(w->rest, h, err));
    MOEC_TRY(MOEC_NEW(w->gram, e * e, err));
    MOEC_TRY(MOEC_NEW(w->logits, BATCH * (size_t)u->all, err));
    MOEC_TRY(MOEC_NEW(w->ids, BATCH * slots, err));
    MOEC_TRY(MOEC_NEW(w->gates, BATCH * slots, err));
    MOEC_TRY(MOEC_NEW(w->token, BATCH, err));
    MOEC_TRY(MOEC_NEW(w->c, e, err));
    MOEC_TRY(MOEC_NEW(w->touched, 2 * slots, err));
    MOEC_TRY(MOEC_NEW(w->in, e, err));
    MOEC_TRY(MOEC_NEW(w->removed, e, err));
    MOEC_TRY(MOEC_NEW(w->term, (size_t)u->n, err));
done:
    return st;
}

static void free_work(work *w)
{
    void *const all[] = {w->rest, w->gram, w->logits, w->ids, w->gates, w->token, w->c, w->touched, w->in, w->removed, w->term};
    for (size_t i = 0; i < MOEC_COUNT(all); i++)
        moec_free(all[i]);
}

static moec_status new_arrays(lu *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    const size_t n = (size_t)u->n, e = (size_t)u->experts, groups = (size_t)u->t->groups;
    MOEC_TRY(MOEC_NEW(u->gram, n * (size_t)u->pair, err));
    MOEC_TRY(MOEC_NEW(u->cross, n * e, err));
    MOEC_TRY(MOEC_NEW(u->rest_sq, n, err));
    MOEC_TRY(MOEC_NEW(u->ids, n * (size_t)u->slots, err));
    MOEC_TRY(MOEC_NEW(u->gates, n * (size_t)u->slots, err));
    MOEC_TRY(MOEC_NEW(u->in, e, err));
    MOEC_TRY(MOEC_NEW(u->term, n, err));
    MOEC_TRY(MOEC_NEW(u->picked, n * e, err));
    MOEC_TRY(MOEC_NEW(u->candidate, e, err));
    MOEC_TRY(MOEC_NEW(u->left, groups, err));
    MOEC_TRY(MOEC_NEW(u->choices, groups, err));
    MOEC_TRY(MOEC_NEW(u->w, (size_t)u->threads, err));
    for (int i = 0; i < u->threads; i++)
        MOEC_TRY(new_work(&u->w[i], u, err));
done:
    return st;
}

static void release(lu *u)
{
    for (int i = 0; u->w && i < u->threads; i++)
        free_work(&u->w[i]);
    void *const all[] = {u->row, u->gram, u->cross, u->rest_sq, u->ids, u->gates, u->in, u->term, u->picked,
                         u->candidate, u->loss, u->left, u->choices, u->w};
    for (size_t i = 0; i < MOEC_COUNT(all); i++)
        moec_free(all[i]);
}

/* ---- what is asked for ----------------------------------------------------------------------------------------------- */

static moec_status check_guard(const moec_choice_task *t, moec_err *err)
{
    const int64_t width = t->model->dims.experts / t->groups;
    for (int64_t g = 0; t->guarded && g < t->groups; g++) {
        int64_t n = 0;
        for (int64_t e = g * width; e < (g + 1) * width; e++)
            n += t->guarded[e];
        if (n > t->keep / t->groups)
            return moec_fail(err, MOEC_EINVAL, "%lld protected experts%s, of which %lld stay", (long long)n,
                             t->groups > 1 ? " in a group" : "", (long long)(t->keep / t->groups));
    }
    return MOEC_OK;
}

static moec_status check_task(const moec_choice_task *t, moec_err *err)
{
    const moec_dims *d = &t->model->dims;
    if (t->model->family->weight_on_input)
        return moec_fail(err, MOEC_EINVAL, "the router's weights multiply the input of experts here: what an expert gives depends "
                         "on them, and this method needs outputs that do not");
    for (int64_t i = 0; i < d->null_experts; i++)
        if (moec_family_null(t->model->family, i) != MOEC_NULL_ZERO)
            return moec_fail(err, MOEC_EINVAL, "experts without a network give a part of the output here, whose weight changes with who "
                             "stays; this method does not follow it");
    if (t->n < 1 || t->n > INT32_MAX || t->window < 1 || t->ld < d->experts + d->null_experts)
        return moec_fail(err, MOEC_EINVAL, "%lld tokens in windows of %lld with %lld logits each: nothing to look at",
                         (long long)t->n, (long long)t->window, (long long)t->ld);
    if (t->keep < 1 || t->keep > d->experts || t->groups < 1 || d->experts % t->groups != 0 || t->keep % t->groups != 0)
        return moec_fail(err, MOEC_EINVAL, "%lld of %lld experts cannot stay, in %lld groups", (long long)t->keep,
                         (long long)d->experts, (long long)t->groups);
    if (t->top_k < 1 || t->top_k > t->keep)
        return moec_fail(err, MOEC_EINVAL, "%lld experts a token, of %lld that stay", (long long)t->top_k, (long long)t->keep);
    return check_guard(t, err);
}

/* Does a token's routing stay the same when an expert goes that it does not select? Scores that are shares of all experts'
 * change, unless the weights are normalised behind the choice; groups are as good as their best; deviations are those of all. */
static bool is_local(const moec_model *m)
{
    const moec_dims *d = &m->dims;
    const bool own = m->family->score != MOEC_SCORE_SOFTMAX;
    if (d->groups > 1 || d->logit_std > 0.0)
        return false;
    if (d->top_k_softmax || m->family->choice == MOEC_CHOOSE_TOP_K_SOFTMAX)
        return true;
    return m->family->choice == MOEC_CHOOSE_TOP_K && (own || (d->renorm && d->renorm_eps == 0.0 && d->renorm_min == 0.0));
}

/* Tokens: all, or whole windows at even distances. */
static moec_status take_tokens(lu *u, moec_err *err)
{
    const moec_choice_task *t = u->t;
    u->window = t->window < MOEC_LU_TOKENS ? t->window : MOEC_LU_TOKENS;
    const int64_t windows = t->n / u->window, taken = MOEC_LU_TOKENS / u->window;
    u->n = t->n <= MOEC_LU_TOKENS ? t->n : taken * u->window;
    moec_status st = MOEC_NEW(u->row, (size_t)u->n, err);
    for (int64_t i = 0; st == MOEC_OK && i < u->n; i++)
        u->row[i] = (int32_t)(u->n == t->n ? i : i / u->window * windows / taken * u->window + i % u->window);
    return st;
}

static moec_status start(lu *u, const moec_choice_task *t, moec_err *err)
{
    u->t = t;
    u->model = *t->model;
    moec_dims *d = &u->model.dims;
    d->slots = d->slots == d->top_k ? t->top_k : d->slots;
    d->top_k = t->top_k;
    if (t->groups == 1) /* what is left has no even groups */
        d->groups = d->top_groups = 1;
    u->experts = d->experts;
    u->all = d->experts + d->null_experts;
    u->slots = d->slots;
    u->hidden = d->hidden;
    u->pair = d->experts * (d->experts + 1) / 2;
    u->width = d->experts / t->groups;
    u->stay = t->keep / t->groups;
    u->local = is_local(&u->model);
    u->threads = moec_par_threads();
    moec_status st = take_tokens(u, err);
    return st == MOEC_OK ? new_arrays(u, err) : st;
}

/* ---- routing --------------------------------------------------------------------------------------------------------- */

/* Routes the m tokens of w->token with the experts of w->in; results in w->ids, w->gates. */
static void route_batch(const lu *u, work *w, int64_t m)
{
    moec_layer layer = *u->t->layer;
    for (int64_t e = 0; e < u->experts; e++)
        w->removed[e] = !w->in[e];
    layer.removed = w->removed;
    for (int64_t i = 0; i < m; i++) {
        float *z = w->logits + i * u->all;
        memcpy(z, u->t->logits + u->row[w->token[i]] * u->t->ld, (size_t)u->all * sizeof *z);
        for (int64_t e = 0; e < u->experts; e++)
            if (!w->in[e])
                z[e] = -INFINITY;
    }
    moec_route(w->logits, w->ids, w->gates, w->logits, &u->model, &layer, m);
}

/* Tokens [lo, hi) with all experts. */
static moec_status route_all(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    lu *u = ctx;
    work *w = &u->w[worker];
    (void)err;
    memset(w->in, true, (size_t)u->experts * sizeof *w->in);
    for (int64_t at = lo; at < hi; at += BATCH) {
        const int64_t m = hi - at < BATCH ? hi - at : BATCH;
        for (int64_t i = 0; i < m; i++)
            w->token[i] = (int32_t)(at + i);
        route_batch(u, w, m);
        memcpy(u->ids + at * u->slots, w->ids, (size_t)(m * u->slots) * sizeof *u->ids);
        memcpy(u->gates + at * u->slots, w->gates, (size_t)(m * u->slots) * sizeof *u->gates);
    }
    return MOEC_OK;
}

/* ---- inner products of the outputs of all experts ---------------------------------------------------------------------- */

/* Tokens [lo, hi) of the block. */
static moec_status multiply(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    lu *u = ctx;
    work *w = &u->w[worker];
    const int64_t n = u->experts, h = u->hidden;
    moec_status st = MOEC_OK;
    for (int64_t i = lo; i < hi; i++) {
        const int64_t t = u->at + i;
        const float *y = u->y + i * n * h, *wanted = u->t->y + u->row[t] * h;
        MOEC_TRY(moec_interrupted(err));
        for (int64_t c = 0; c < h; c++) {
            double rest = (double)wanted[c];
            for (int64_t j = t * u->slots; j < (t + 1) * u->slots && u->ids[j] >= 0; j++)
                rest -= (double)u->gates[j] * (double)y[u->ids[j] * h + c];
            w->rest[c] = (float)rest;
        }
        u->rest_sq[t] = moec_sum_sq(w->rest, h);
        moec_sgemm(false, false, n, 1, h, 1.0f, y, h, w->rest, 1, 0.0f, u->cross + t * n, 1);
        moec_sgemm(false, true, n, n, h, 1.0f, y, h, y, h, 0.0f, w->gram, n);
        for (int64_t e = 0; e < n; e++)
            memcpy(u->gram + t * u->pair + e * (e + 1) / 2, w->gram + e * n, (size_t)(e + 1) * sizeof *w->gram);
    }
done:
    return st;
}

static moec_status multiply_block(void *ctx, int64_t at, int64_t m, float *y, moec_err *err)
{
    lu *u = ctx;
    u->at = at;
    u->y = y;
    return moec_par_for(m, 8, multiply, u, err);
}

static moec_status look(lu *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    MOEC_TRY(moec_par_for(u->n, BATCH, route_all, u, err));
    MOEC_TRY(moec__all_outputs(&u->model, u->t->layer, u->t->x, u->row, u->n, multiply_block, u, err));
done:
    return st;
}

/* ---- the loss of a subset -------------------------------------------------------------------------------------------- */

/* Adds sign times the weights of one token to w->c; entries that get their first one are listed. */
static int64_t add_gates(work *w, int64_t listed, const int32_t *ids, const float *gates, int64_t slots, double sign)
{
    for (int64_t j = 0; j < slots && ids[j] >= 0; j++) {
        int64_t i = 0;
        while (i < listed && w->touched[i] != ids[j])
            i++;
        if (i == listed)
            w->touched[listed++] = ids[j];
        w->c[ids[j]] += sign * (double)gates[j];
    }
    return listed;
}

/* |y - r_S|^2 of token t from its weights under S. */
static double square_of(const lu *u, work *w, int64_t t, const int32_t *ids, const float *gates)
{
    const float *gram = u->gram + t * u->pair, *cross = u->cross + t * u->experts;
    int64_t n = add_gates(w, 0, u->ids + t * u->slots, u->gates + t * u->slots, u->slots, 1.0);
    n = add_gates(w, n, ids, gates, u->slots, -1.0);
    double sum = u->rest_sq[t];
    for (int64_t i = 0; i < n; i++) {
        const int64_t e = w->touched[i];
        double inner = (double)cross[e] + 0.5 * w->c[e] * (double)gram[e * (e + 1) / 2 + e];
        for (int64_t j = 0; j < i && w->c[e] != 0.0; j++) {
            const int64_t f = w->touched[j], high = e > f ? e : f, low = e > f ? f : e;
            inner += w->c[f] * (double)gram[high * (high + 1) / 2 + low];
        }
        sum += 2.0 * w->c[e] * inner;
    }
    for (int64_t i = 0; i < n; i++)
        w->c[w->touched[i]] = 0.0;
    return sum < 0.0 ? 0.0 : sum; /* by rounding; NaN stays */
}

static void finish_batch(const lu *u, work *w, int64_t m, bool *picked)
{
    route_batch(u, w, m);
    for (int64_t i = 0; i < m; i++) {
        const int64_t t = w->token[i];
        const int32_t *ids = w->ids + i * u->slots;
        w->term[t] = square_of(u, w, t, ids, w->gates + i * u->slots);
        for (int64_t j = 0; picked && j < u->slots && ids[j] >= 0; j++)
            picked[t * u->experts + ids[j]] = true;
    }
}

/* loss(S) for the S of w->in, its terms in w->term. gone >= 0: S is u->in without this one, whose terms and selections are
 * known. picked [n,E], all false: receives who is selected; or NULL. */
static double loss_of(const lu *u, work *w, int64_t gone, bool *picked)
{
    int64_t m = 0;
    double loss = 0.0;
    for (int64_t t = 0; t < u->n; t++) {
        if (gone >= 0 && u->local && !u->picked[t * u->experts + gone]) {
            w->term[t] = u->term[t];
            continue;
        }
        w->token[m++] = (int32_t)t;
        if (m == BATCH) {
            finish_batch(u, w, m, picked);
            m = 0;
        }
    }
    finish_batch(u, w, m, picked);
    for (int64_t t = 0; t < u->n;) {
        double sum = 0.0;
        for (const int64_t end = t + u->window; t < end && t < u->n; t++)
            sum += w->term[t];
        loss += sqrt(sum);
    }
    return loss;
}

static moec_status least(int64_t *out, const double *loss, int64_t n, moec_err *err)
{
    *out = 0;
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(loss[i]))
            return moec_fail(err, MOEC_ENUMERIC, "the error that remains is not finite: outputs of experts are too large, or what is "
                             "wanted is not finite");
        *out = loss[i] < loss[*out] ? i : *out;
    }
    return MOEC_OK;
}

/* ---- all subsets ----------------------------------------------------------------------------------------------------- */

/* n over k, or MOEC_LU_SUBSETS + 1 where it is more than MOEC_LU_SUBSETS. */
static int64_t binomial(int64_t n, int64_t k)
{
    int64_t c = 1;
    k = k > n - k ? n - k : k;
    for (int64_t i = 1; i <= k; i++) {
        c = c * (n - k + i) / i; /* rises with i, so it can stop */
        if (c > MOEC_LU_SUBSETS)
            return MOEC_LU_SUBSETS + 1;
    }
    return c;
}

static bool is_guarded(const lu *u, int64_t e)
{
    return u->t->guarded && u->t->guarded[e];
}

/* Experts of a group that may go. */
static int64_t free_in(const lu *u, int64_t g)
{
    int64_t n = 0;
    for (int64_t e = g * u->width; e < (g + 1) * u->width; e++)
        n += !is_guarded(u, e);
    return n;
}

/* How many subsets there are, at most MOEC_LU_SUBSETS + 1; u->choices of each group. */
static int64_t count_subsets(lu *u)
{
    int64_t all = 1;
    for (int64_t g = 0; g < u->t->groups; g++) {
        const int64_t n = free_in(u, g);
        u->choices[g] = binomial(n, u->stay - (u->width - n));
        all = all * u->choices[g] > MOEC_LU_SUBSETS ? MOEC_LU_SUBSETS + 1 : all * u->choices[g];
    }
    return all;
}

/* Subset number `rank` in lexicographic order: the last group runs fastest, and in a group the last experts. */
static void subset_at(bool *in, const lu *u, int64_t rank)
{
    for (int64_t g = u->t->groups - 1; g >= 0; g--) {
        int64_t place = rank % u->choices[g], n = free_in(u, g), k = u->stay - (u->width - n);
        rank /= u->choices[g];
        for (int64_t e = g * u->width; e < (g + 1) * u->width; e++) {
            in[e] = true;
            if (is_guarded(u, e))
                continue;
            n--; /* free ones behind e */
            const int64_t with = k > 0 ? binomial(n, k - 1) : 0;
            in[e] = place < with;
            k -= in[e];
            place -= in[e] ? 0 : with;
        }
    }
}

static moec_status try_subsets(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    lu *u = ctx;
    moec_status st = MOEC_OK;
    work *w = &u->w[worker];
    for (int64_t i = lo; i < hi; i++) {
        MOEC_TRY(moec_interrupted(err));
        subset_at(w->in, u, i);
        u->loss[i] = loss_of(u, w, -1, NULL);
    }
done:
    return st;
}

static moec_status choose_among_all(lu *u, double *score, int64_t subsets, moec_err *err)
{
    moec_status st = MOEC_OK;
    int64_t best;
    MOEC_TRY(MOEC_NEW(u->loss, (size_t)subsets, err));
    MOEC_TRY(moec_par_for(subsets, SUBSETS_A_CHUNK, try_subsets, u, err));
    MOEC_TRY(least(&best, u->loss, subsets, err));
    subset_at(u->in, u, best);
    for (int64_t e = 0; e < u->experts; e++)
        score[e] = u->in[e] ? (double)u->experts : 0.0;
done:
    return st;
}

/* ---- one after the other --------------------------------------------------------------------------------------------- */

static moec_status try_without(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    lu *u = ctx;
    moec_status st = MOEC_OK;
    work *w = &u->w[worker];
    for (int64_t i = lo; i < hi; i++) {
        MOEC_TRY(moec_interrupted(err));
        memcpy(w->in, u->in, (size_t)u->experts * sizeof *w->in);
        w->in[u->candidate[i]] = false;
        u->loss[i] = loss_of(u, w, u->candidate[i], NULL);
    }
done:
    return st;
}

/* Terms and selections of those that are there. */
static void settle(lu *u)
{
    work *w = &u->w[0];
    memset(u->picked, false, (size_t)(u->n * u->experts) * sizeof *u->picked);
    memcpy(w->in, u->in, (size_t)u->experts * sizeof *w->in);
    (void)loss_of(u, w, -1, u->picked);
    memcpy(u->term, w->term, (size_t)u->n * sizeof *u->term);
}

static moec_status choose_by_steps(lu *u, double *score, moec_err *err)
{
    moec_status st = MOEC_OK;
    MOEC_TRY(MOEC_NEW(u->loss, (size_t)u->experts, err));
    memset(u->in, true, (size_t)u->experts * sizeof *u->in);
    for (int64_t e = 0; e < u->experts; e++)
        score[e] = (double)u->experts;
    for (int64_t g = 0; g < u->t->groups; g++)
        u->left[g] = u->width;
    for (int64_t gone = 0; gone < u->experts - u->t->keep; gone++) {
        int64_t n = 0, best;
        for (int64_t e = 0; e < u->experts; e++)
            if (u->in[e] && !is_guarded(u, e) && u->left[e / u->width] > u->stay)
                u->candidate[n++] = (int32_t)e;
        settle(u);
        MOEC_TRY(moec_par_for(n, 1, try_without, u, err));
        MOEC_TRY(least(&best, u->loss, n, err));
        best = u->candidate[best];
        u->in[best] = false;
        u->left[best / u->width]--;
        score[best] = (double)(gone + 1);
    }
done:
    return st;
}

moec_status moec_choose_lu(int32_t *keep, double *score, const moec_choice_task *t, moec_err *err)
{
    moec_status st = MOEC_OK;
    lu u = {.t = t};
    MOEC_TRY(check_task(t, err));
    if (t->keep == t->model->dims.experts) {
        for (int32_t e = 0; e < t->keep; e++) {
            keep[e] = e;
            score[e] = (double)t->keep;
        }
        return MOEC_OK;
    }
    MOEC_TRY(start(&u, t, err));
    MOEC_TRY(look(&u, err));
    const int64_t subsets = count_subsets(&u);
    if (subsets <= MOEC_LU_SUBSETS)
        MOEC_TRY(choose_among_all(&u, score, subsets, err));
    else
        MOEC_TRY(choose_by_steps(&u, score, err));
    for (int64_t e = 0, n = 0; e < u.experts; e++)
        if (u.in[e])
            keep[n++] = (int32_t)e;
done:
    release(&u);
    return st;
}
