/* Every rule of routing against a plain float64 statement of it, on random logits with ties, biases, groups and null experts;
 * and the edges: one expert, all experts, thresholds that nothing or everything passes. */
#include "base/mem.h"
#include "model/forward_parts.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { MOST = 300, TOKENS = 40 };

static uint64_t seed = 88172645463325252u;

static float uniform(float low, float high)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return low + (high - low) * (float)(seed >> 40) / 16777216.0f;
}

typedef struct rules {
    moec_router_score score;
    moec_choice choice;
    moec_group_rule group;
    int64_t experts, nulls, k, groups, top_groups;
    bool renorm, biased;
    double eps, min, scale, top_p, jitter;
    float coarse; /* logits are multiples of this: ties; 0: not */
} rules;

/* ---- the naive statement ----------------------------------------------------------------------------------------------- */

typedef struct chosen {
    int64_t n;
    int32_t id[MOST];
    double gate[MOST];
} chosen;

static void score_of(double *s, const float *z, int64_t n, moec_router_score how)
{
    double sum = 0, top = -INFINITY;
    for (int64_t e = 0; e < n; e++)
        top = fmax(top, (double)z[e]);
    for (int64_t e = 0; e < n; e++)
        sum += exp((double)z[e] - top);
    for (int64_t e = 0; e < n; e++)
        s[e] = how == MOEC_SCORE_SOFTMAX   ? exp((double)z[e] - top) / sum
               : how == MOEC_SCORE_SIGMOID ? 1 / (1 + exp(-(double)z[e]))
                                           : fmax((double)z[e], 0);
}

/* The one that stands at `place` by descending value, the lowest index first on ties. */
static int64_t at_place(const double *v, int64_t n, int64_t place)
{
    for (int64_t e = 0; e < n; e++) {
        int64_t before = 0;
        for (int64_t f = 0; f < n; f++)
            before += v[f] > v[e] || (v[f] == v[e] && f < e);
        if (before == place)
            return e;
    }
    fail();
    return 0;
}

static void limit_groups(double *v, const rules *r)
{
    double of[MOST];
    int64_t size = r->experts / r->groups;
    for (int64_t g = 0; g < r->groups; g++) {
        double *in = v + g * size;
        of[g] = in[at_place(in, size, 0)] + (r->group == MOEC_GROUP_TOP2 ? in[at_place(in, size, 1)] : 0);
    }
    for (int64_t place = r->top_groups; place < r->groups; place++) {
        int64_t g = at_place(of, r->groups, place);
        for (int64_t e = g * size; e < (g + 1) * size; e++)
            v[e] = r->group == MOEC_GROUP_TOP2 ? -INFINITY : 0;
    }
}

static void naive_sparsemixer(chosen *c, const float *z, int64_t n, double jitter, int64_t k)
{
    double left[MOST];
    for (int64_t e = 0; e < n; e++)
        left[e] = (double)z[e];
    for (c->n = 0; c->n < k && c->n < 2 && c->n < n; c->n++) {
        int64_t best = at_place(left, n, 0);
        double sum = 0, top = left[best];
        for (int64_t e = 0; e < n; e++) /* of those drawn already exp gives 0 */
            sum += (top - (double)z[e]) / fmax(fabs((double)z[e]), top) > 2 * jitter ? 0 : exp(left[e] - top);
        c->id[c->n] = (int32_t)best;
        c->gate[c->n] = 1 / sum;
        left[best] = -INFINITY;
    }
}

static void choose(chosen *c, const double *s, const float *z, const float *bias, const rules *r)
{
    int64_t all = r->experts + r->nulls;
    double v[MOST], sum = 0;
    c->n = 0;
    if (r->choice == MOEC_CHOOSE_SPARSEMIXER) {
        naive_sparsemixer(c, z, all, r->jitter, r->k);
        return;
    }
    for (int64_t e = 0; e < all; e++)
        v[e] = r->choice == MOEC_CHOOSE_TOP_K_SOFTMAX ? (double)z[e] : s[e] + (bias && e < r->experts ? (double)bias[e] : 0);
    if (r->groups > 1)
        limit_groups(v, r);
    for (int64_t place = 0; place < all; place++) {
        int64_t e = at_place(v, all, place);
        if (r->choice == MOEC_CHOOSE_POSITIVE ? s[e] <= 0 : r->choice == MOEC_CHOOSE_TOP_P ? sum > r->top_p : place >= r->k)
            break;
        c->id[c->n] = (int32_t)e;
        c->gate[c->n++] = r->choice == MOEC_CHOOSE_TOP_K_SOFTMAX ? exp((double)z[e] - v[at_place(v, all, 0)]) : s[e];
        sum += c->gate[c->n - 1];
    }
    for (int64_t j = 0; r->choice == MOEC_CHOOSE_TOP_K_SOFTMAX && j < c->n; j++)
        c->gate[j] /= sum;
}

static void naive(chosen *out, const double *s, const float *z, const float *bias, const rules *r)
{
    chosen c;
    double sum = 0;
    choose(&c, s, z, bias, r);
    out->n = 0;
    for (int64_t j = 0; j < c.n; j++)
        if (c.id[j] < r->experts) {
            out->id[out->n] = c.id[j];
            out->gate[out->n++] = c.gate[j];
            sum += c.gate[j];
        }
    for (int64_t j = 0; j < out->n; j++) {
        if (r->renorm && sum > 0)
            out->gate[j] /= fmax(sum + r->eps, r->min);
        out->gate[j] *= r->scale;
    }
}

/* ---- comparison -------------------------------------------------------------------------------------------------------- */

static double gate_of(const chosen *c, int32_t id)
{
    for (int64_t j = 0; j < c->n; j++)
        if (c->id[j] == id)
            return c->gate[j];
    fail_msg("expert %d should not have been chosen", (int)id);
    return 0;
}

static void check_token(const int32_t *ids, const float *gates, int64_t slots, const chosen *want)
{
    int64_t n = 0;
    for (int64_t j = 0; j < slots; j++) {
        if (ids[j] < 0) {
            assert_true(gates[j] == 0.0f);
            continue;
        }
        assert_int_equal(j, n); /* no hole */
        n++;
        assert_true(fabs((double)gates[j] - gate_of(want, ids[j])) <= 2e-6 * fmax(1, fabs(gate_of(want, ids[j]))));
        if (j > 0)
            assert_true(gates[j] < gates[j - 1] || (gates[j] == gates[j - 1] && ids[j] > ids[j - 1]));
    }
    assert_int_equal(n, want->n);
}

static void same_set(const int32_t *a, const int32_t *b, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        bool found = false;
        for (int64_t j = 0; j < n; j++)
            found = found || a[i] == b[j];
        assert_true(found);
    }
}

typedef struct fixture {
    moec_family family;
    moec_model model;
    moec_router router;
    float *logits, *scores, *gates, *bias;
    int32_t *ids, *guess;
    int64_t all, slots;
} fixture;

static void *must(size_t n, size_t size)
{
    void *p;
    assert_int_equal(moec_alloc(&p, n, size, NULL), MOEC_OK);
    return p;
}

static void setup(fixture *x, const rules *r)
{
    bool varies = r->choice == MOEC_CHOOSE_TOP_P || r->choice == MOEC_CHOOSE_POSITIVE;
    memset(x, 0, sizeof *x);
    x->family = (moec_family){.score = r->score, .choice = r->choice, .group = r->group};
    x->all = r->experts + r->nulls;
    x->slots = varies ? r->experts : r->k;
    x->model.family = &x->family;
    x->model.dims = (moec_dims){.experts = r->experts, .null_experts = r->nulls, .top_k = r->k, .slots = x->slots,
                                .groups = r->groups, .top_groups = r->top_groups, .renorm = r->renorm,
                                .renorm_eps = r->eps, .renorm_min = r->min, .route_scale = r->scale, .top_p = r->top_p,
                                .jitter = r->jitter};
    x->logits = must((size_t)(TOKENS * x->all), sizeof(float));
    x->scores = must((size_t)(TOKENS * x->all), sizeof(float));
    x->gates = must((size_t)(TOKENS * x->slots), sizeof(float));
    x->ids = must((size_t)(TOKENS * x->slots), sizeof(int32_t));
    x->guess = must((size_t)(TOKENS * x->slots), sizeof(int32_t));
    x->bias = must((size_t)r->experts, sizeof(float));
    for (int64_t e = 0; e < r->experts; e++)
        x->bias[e] = r->coarse > 0 ? 0.25f * floorf(uniform(-2, 3)) : uniform(-0.3f, 0.4f);
    x->router.selection = r->biased ? x->bias : NULL;
    for (int64_t i = 0; i < TOKENS * x->all; i++) {
        float z = uniform(-4, 4);
        x->logits[i] = r->coarse > 0 ? r->coarse * roundf(z / r->coarse) : z;
    }
}

static void teardown(fixture *x)
{
    void *all[] = {x->logits, x->scores, x->gates, x->ids, x->guess, x->bias};
    for (size_t i = 0; i < MOEC_COUNT(all); i++)
        moec_free(all[i]);
}

static void check(const rules *r)
{
    fixture x;
    setup(&x, r);
    moec__route(x.scores, x.ids, x.gates, NULL, x.logits, &x.router, &x.model, TOKENS);
    for (int64_t t = 0; t < TOKENS; t++) {
        double s[MOST];
        chosen want;
        score_of(s, x.logits + t * x.all, x.all, r->score);
        for (int64_t e = 0; e < x.all; e++)
            assert_true(fabs((double)x.scores[t * x.all + e] - s[e]) <= 1e-6 * fmax(1, s[e]));
        naive(&want, s, x.logits + t * x.all, x.router.selection, r);
        check_token(x.ids + t * x.slots, x.gates + t * x.slots, x.slots, &want);
    }
    /* ids alone are the same ones, also where the scores take the place of the logits */
    moec__route(x.logits, x.guess, NULL, NULL, x.logits, &x.router, &x.model, TOKENS);
    for (int64_t t = 0; t < TOKENS; t++)
        same_set(x.ids + t * x.slots, x.guess + t * x.slots, x.slots);
    teardown(&x);
}

/* ---- tests -------------------------------------------------------------------------------------------------------------- */

#define PLAIN .groups = 1, .top_groups = 1, .scale = 1

static void top_k_of_all_kinds(void **state)
{
    static const rules list[] = {
        {PLAIN, .experts = 8, .k = 2, .renorm = true},
        {PLAIN, .experts = 128, .k = 8},
        {PLAIN, .experts = 40, .k = 6, .coarse = 0.5f, .renorm = true},
        {PLAIN, .experts = 16, .k = 4, .coarse = 1.0f},
        {PLAIN, .experts = 1, .k = 1, .renorm = true},
        {PLAIN, .experts = 7, .k = 7},
        {PLAIN, .experts = 33, .k = 33, .renorm = true},
        {PLAIN, .score = MOEC_SCORE_SIGMOID, .experts = 16, .k = 1},
        {PLAIN, .score = MOEC_SCORE_SIGMOID, .experts = 64, .k = 6, .biased = true, .renorm = true, .eps = 1e-20},
        {PLAIN, .score = MOEC_SCORE_SIGMOID, .experts = 32, .k = 4, .biased = true, .renorm = true, .eps = 0.5, .coarse = 0.5f},
        {PLAIN, .experts = 64, .k = 6, .biased = true, .renorm = true, .min = 0.9},
        {PLAIN, .score = MOEC_SCORE_RELU, .experts = 12, .k = 4, .renorm = true, .coarse = 0.5f},
        {PLAIN, .choice = MOEC_CHOOSE_TOP_K_SOFTMAX, .experts = 32, .k = 4},
        {PLAIN, .choice = MOEC_CHOOSE_TOP_K_SOFTMAX, .experts = 40, .k = 8, .coarse = 0.5f},
        {PLAIN, .choice = MOEC_CHOOSE_TOP_K_SOFTMAX, .experts = 5, .k = 5},
        {PLAIN, .choice = MOEC_CHOOSE_TOP_K_SOFTMAX, .experts = 3, .k = 1},
    };
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(list); i++)
        check(&list[i]);
}

static void groups_limit_the_choice(void **state)
{
    static const rules list[] = {
        {.group = MOEC_GROUP_MAX, .experts = 16, .k = 4, .groups = 4, .top_groups = 2, .scale = 16},
        {.group = MOEC_GROUP_MAX, .experts = 160, .k = 6, .groups = 8, .top_groups = 3, .scale = 1},
        {.group = MOEC_GROUP_MAX, .experts = 12, .k = 2, .groups = 12, .top_groups = 2, .scale = 1, .coarse = 1.0f},
        {.score = MOEC_SCORE_SIGMOID, .group = MOEC_GROUP_TOP2, .experts = 256, .k = 8, .groups = 8, .top_groups = 4,
         .scale = 2.5, .biased = true, .renorm = true, .eps = 1e-20},
        {.score = MOEC_SCORE_SIGMOID, .group = MOEC_GROUP_TOP2, .experts = 16, .k = 4, .groups = 4, .top_groups = 2, .scale = 1,
         .biased = true, .coarse = 1.0f},
        {.score = MOEC_SCORE_SIGMOID, .group = MOEC_GROUP_TOP2, .experts = 6, .k = 2, .groups = 3, .top_groups = 1, .scale = 1},
        {.score = MOEC_SCORE_SIGMOID, .group = MOEC_GROUP_TOP2, .experts = 6, .k = 6, .groups = 3, .top_groups = 3, .scale = 1},
    };
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(list); i++)
        check(&list[i]);
}

static void null_experts_leave_their_slots_empty(void **state)
{
    static const rules list[] = {
        {PLAIN, .experts = 8, .nulls = 8, .k = 4, .renorm = true},
        {PLAIN, .experts = 3, .nulls = 60, .k = 3, .renorm = true}, /* most tokens have none */
        {PLAIN, .experts = 4, .nulls = 2, .k = 6, .renorm = true},  /* k above the number of true ones */
        {PLAIN, .experts = 8, .nulls = 5, .k = 4, .coarse = 1.0f},
    };
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(list); i++)
        check(&list[i]);
}

/* Four experts and behind them two constants, a copy and nothing. Logits whose softmax is in the ratios 1 : 2 : .. are chosen
 * by hand: two are taken, nothing's weight is left out of the sum, and who has no network leaves the slots. */
static void what_has_no_network_keeps_its_weight(void **state)
{
    static const struct { int best, next; bool softmax; float gate, null_best, null_next; } rows[] = {
        {1, 3, false, 2.0f / 3.0f, -1, -1},     /* two true ones, the better one twice the other */
        {1, 4, false, 2.0f / 3.0f, -1, 1.0f / 3.0f}, /* a true one and a constant */
        {6, 1, false, 1.0f / 3.0f, 2.0f / 3.0f, -1}, /* the copy and a true one */
        {7, 1, false, 1.0f, 0.0f, -1},          /* nothing and a true one, which has all the weight */
        {1, 7, false, 1.0f, -1, 0.0f},
        {7, 5, false, 0.0f, 0.0f, 1.0f},        /* no true one at all */
        {7, 1, true, 1.0f / 3.0f, 2.0f / 3.0f, -1}, /* the softmax over the two keeps nothing's share */
    };
    const moec_family family = {.tail = {MOEC_NULL_CONSTANT, MOEC_NULL_CONSTANT, MOEC_NULL_COPY, MOEC_NULL_ZERO}, .n_tail = 4};
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(rows); i++)
        for (int spread = 0; spread < 2; spread++) {
            float z[8] = {-9, -9, -9, -9, -9, -9, -9, -9}, scores[8], gates[2], nulls[4];
            int32_t id[2];
            moec_router r = {.rows = NULL};
            moec_model m = {.family = &family};
            m.dims = (moec_dims){.experts = 4, .null_experts = 4, .top_k = 2, .slots = 2, .groups = 1, .top_groups = 1,
                                 .route_scale = 1, .renorm = !rows[i].softmax, .top_k_softmax = rows[i].softmax};
            z[rows[i].best] = logf(2.0f);
            z[rows[i].next] = 0.0f;
            if (spread) { /* three times the logits, brought back to the deviation that they had */
                double sum = 0, square = 0;
                for (int e = 0; e < 8; e++)
                    sum += (double)z[e] / 8;
                for (int e = 0; e < 8; e++)
                    square += ((double)z[e] - sum) * ((double)z[e] - sum) / 7;
                m.dims.logit_std = sqrt(square);
                for (int e = 0; e < 8; e++)
                    z[e] *= 3;
            }
            moec__route(scores, id, gates, nulls, z, &r, &m, 1);
            const int best = rows[i].best, next = rows[i].next, first = best < 4 ? best : next;
            assert_int_equal(id[0], first < 4 ? first : -1);
            assert_int_equal(id[1], best < 4 && next < 4 ? next : -1);
            assert_true(fabsf(gates[0] - rows[i].gate) < 1e-6f);
            for (int e = 4; e < 8; e++) {
                float want = e == best ? rows[i].null_best : e == next ? rows[i].null_next : -1.0f;
                assert_true(fabsf(nulls[e - 4] - want) < 1e-6f);
            }
        }
}

static void their_number_varies(void **state)
{
    static const rules list[] = {
        {PLAIN, .choice = MOEC_CHOOSE_TOP_P, .experts = 16, .k = 2, .top_p = 0.4},
        {PLAIN, .choice = MOEC_CHOOSE_TOP_P, .experts = 70, .k = 2, .top_p = 0.9},
        {PLAIN, .choice = MOEC_CHOOSE_TOP_P, .experts = 16, .k = 2, .top_p = 0.0},
        {PLAIN, .choice = MOEC_CHOOSE_TOP_P, .experts = 16, .k = 2, .top_p = 0.6, .renorm = true},
        {PLAIN, .choice = MOEC_CHOOSE_TOP_P, .experts = 1, .k = 1, .top_p = 0.4},
        {PLAIN, .score = MOEC_SCORE_RELU, .choice = MOEC_CHOOSE_POSITIVE, .experts = 12, .k = 2},
        {PLAIN, .score = MOEC_SCORE_RELU, .choice = MOEC_CHOOSE_POSITIVE, .experts = 2, .k = 1, .coarse = 2.0f},
        {PLAIN, .score = MOEC_SCORE_RELU, .choice = MOEC_CHOOSE_POSITIVE, .experts = 40, .k = 2, .coarse = 0.5f},
    };
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(list); i++)
        check(&list[i]);
}

/* Thresholds that are met exactly, never, and by all; ties are cut at the lowest numbers. */
static void edges_of_top_p(void **state)
{
    rules r = {PLAIN, .choice = MOEC_CHOOSE_TOP_P, .experts = 4, .k = 2, .top_p = 0.5};
    fixture x;
    (void)state;
    setup(&x, &r);
    memset(x.logits, 0, sizeof(float) * 4 * TOKENS); /* four scores of exactly 0.25 */
    moec__route(x.scores, x.ids, x.gates, NULL, x.logits, &x.router, &x.model, 1);
    const int32_t three[] = {0, 1, 2, -1}; /* 0.5 does not exceed 0.5 */
    assert_memory_equal(x.ids, three, sizeof three);
    assert_true(x.gates[2] == 0.25f && x.gates[3] == 0.0f);
    x.model.dims.top_p = 1.0;
    moec__route(x.scores, x.ids, x.gates, NULL, x.logits, &x.router, &x.model, 1);
    const int32_t four[] = {0, 1, 2, 3};
    assert_memory_equal(x.ids, four, sizeof four);
    x.model.dims.top_p = 0.0;
    moec__route(x.scores, x.ids, x.gates, NULL, x.logits, &x.router, &x.model, 1);
    const int32_t one[] = {0, -1, -1, -1};
    assert_memory_equal(x.ids, one, sizeof one);
    teardown(&x);
}

static void sparsemixer_draws_twice(void **state)
{
    static const rules list[] = {
        {PLAIN, .choice = MOEC_CHOOSE_SPARSEMIXER, .experts = 16, .k = 2, .jitter = 0.01},
        {PLAIN, .choice = MOEC_CHOOSE_SPARSEMIXER, .experts = 16, .k = 2, .jitter = 0.3},
        {PLAIN, .choice = MOEC_CHOOSE_SPARSEMIXER, .experts = 5, .k = 2, .jitter = 0.2, .coarse = 0.5f},
        {PLAIN, .choice = MOEC_CHOOSE_SPARSEMIXER, .experts = 2, .k = 2, .jitter = 0.01},
        {PLAIN, .choice = MOEC_CHOOSE_SPARSEMIXER, .experts = 1, .k = 1, .jitter = 0.01},
        {PLAIN, .choice = MOEC_CHOOSE_SPARSEMIXER, .experts = 9, .k = 1, .jitter = 0.1},
    };
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(list); i++)
        check(&list[i]);
}

/* transformers 5.23, modeling_phimoe.sparsemixer(scores, 0.1, False) on these logits. */
static void sparsemixer_as_in_transformers(void **state)
{
    rules r = {PLAIN, .choice = MOEC_CHOOSE_SPARSEMIXER, .experts = 4, .k = 2, .jitter = 0.1};
    static const float logits[2][4] = {{2.0f, 1.9f, 1.5f, -1.0f}, {-1.0f, -0.95f, -3.0f, -0.9f}};
    static const int32_t ids[2][2] = {{1, 0}, {1, 3}};
    static const float gates[2][2] = {{1.0f, 0.524979174f}, {0.512497425f, 0.350131869f}};
    fixture x;
    (void)state;
    setup(&x, &r);
    memcpy(x.logits, logits, sizeof logits);
    moec__route(x.scores, x.ids, x.gates, NULL, x.logits, &x.router, &x.model, 2);
    for (int t = 0; t < 2; t++)
        for (int j = 0; j < 2; j++) {
            assert_int_equal(x.ids[2 * t + j], ids[t][j]);
            assert_true(fabsf(x.gates[2 * t + j] - gates[t][j]) < 1e-6f);
        }
    teardown(&x);
}

/* A sum of 0 divides nothing; saturated scores still know the larger logit. */
static void nothing_is_divided_by_zero(void **state)
{
    rules r = {PLAIN, .score = MOEC_SCORE_RELU, .experts = 6, .k = 2, .renorm = true};
    fixture x;
    (void)state;
    setup(&x, &r);
    for (int i = 0; i < 6; i++)
        x.logits[i] = -1.0f;
    moec__route(x.scores, x.ids, x.gates, NULL, x.logits, &x.router, &x.model, 1);
    assert_true(x.gates[0] == 0.0f && x.gates[1] == 0.0f);
    assert_int_equal(x.ids[0], 0);
    x.family.score = MOEC_SCORE_SIGMOID;
    x.logits[3] = 30.0f, x.logits[5] = 40.0f, x.logits[1] = 25.0f;
    moec__route(x.scores, x.ids, x.gates, NULL, x.logits, &x.router, &x.model, 1);
    assert_int_equal(x.ids[0], 3); /* equal weights: the lowest number first */
    assert_int_equal(x.ids[1], 5);
    teardown(&x);
}

/* With logits that are no numbers every id is still one of an expert, once each. */
static void survives_what_is_no_number(void **state)
{
    static const rules list[] = {
        {PLAIN, .experts = 8, .k = 3},
        {PLAIN, .experts = 50, .k = 5, .biased = true, .renorm = true},
        {.score = MOEC_SCORE_SIGMOID, .group = MOEC_GROUP_TOP2, .experts = 16, .k = 4, .groups = 4, .top_groups = 2, .scale = 1},
        {PLAIN, .choice = MOEC_CHOOSE_TOP_P, .experts = 16, .k = 2, .top_p = 0.4},
        {PLAIN, .score = MOEC_SCORE_RELU, .choice = MOEC_CHOOSE_POSITIVE, .experts = 12, .k = 2},
        {PLAIN, .choice = MOEC_CHOOSE_SPARSEMIXER, .experts = 5, .k = 2, .jitter = 0.1},
        {PLAIN, .choice = MOEC_CHOOSE_TOP_K_SOFTMAX, .experts = 40, .k = 4},
    };
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(list); i++) {
        fixture x;
        setup(&x, &list[i]);
        for (int64_t j = 0; j < TOKENS * x.all; j += 1 + j / x.all) /* a whole row first, then ever fewer */
            x.logits[j] = j % 3 ? NAN : INFINITY;
        moec__route(x.scores, x.ids, x.gates, NULL, x.logits, &x.router, &x.model, TOKENS);
        bool poisoned = false;
        for (int64_t t = 0; t < TOKENS; t++)
            for (int64_t j = 0; j < x.slots; j++) {
                int32_t id = x.ids[t * x.slots + j];
                assert_true(id >= -1 && id < x.all);
                for (int64_t o = 0; id >= 0 && o < j; o++)
                    assert_true(x.ids[t * x.slots + o] != id);
                poisoned = poisoned || (t == 0 && !isfinite(x.gates[j]));
            }
        assert_true(poisoned); /* or a broken model would look well */
        teardown(&x);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(top_k_of_all_kinds),
        cmocka_unit_test(groups_limit_the_choice),
        cmocka_unit_test(null_experts_leave_their_slots_empty),
        cmocka_unit_test(what_has_no_network_keeps_its_weight),
        cmocka_unit_test(their_number_varies),
        cmocka_unit_test(edges_of_top_p),
        cmocka_unit_test(sparsemixer_draws_twice),
        cmocka_unit_test(sparsemixer_as_in_transformers),
        cmocka_unit_test(nothing_is_divided_by_zero),
        cmocka_unit_test(survives_what_is_no_number),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
