/* Layer-wise choice of experts against all subsets of a naive layer in float64, and its greedy form against a naive greedy. */
#include "method/choose.h"

#include "base/mem.h"
#include "base/par.h"
#include "model/forward.h"
#include "naive_expert.h"
#include "tiny.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { MOST = 32, WIDE = 64 };

static uint64_t seed;

static double uniform(double low, double high)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return low + (high - low) * (double)(seed >> 40) / 16777216.0;
}

/* ---- a layer with tokens ------------------------------------------------------------------------------------------------ */

typedef struct bench {
    char *dir;
    moec_model *m;
    const moec_layer *l;
    int64_t n, experts, all, hidden;
    float *x, *y, *logits;
    double *out; /* [n,E,H] */
    moec_choice_task t;
} bench;

/* Weights of a token under `in` [E], by the rules of the families here; with groups moec_route's word is taken. */
static void naive_gates(double *g, const bench *b, int64_t t, const bool *in)
{
    const moec_dims *d = &b->m->dims;
    const moec_family *how = b->m->family;
    const float *z = b->logits + t * b->all;
    double s[MOST], v[MOST], sum = 0.0, top = 0.0;
    memset(g, 0, (size_t)b->experts * sizeof *g);
    if (d->groups > 1 && b->t.groups > 1) {
        float masked[MOST], gates[MOST];
        int32_t ids[MOST];
        bool removed[MOST];
        moec_layer l = *b->l;
        l.removed = removed;
        for (int64_t e = 0; e < b->experts; e++) {
            removed[e] = !in[e];
            masked[e] = in[e] ? z[e] : -INFINITY;
        }
        moec_route(masked, ids, gates, masked, b->m, &l, 1);
        for (int64_t j = 0; j < d->slots && ids[j] >= 0; j++)
            g[ids[j]] = (double)gates[j];
        return;
    }
    for (int64_t e = 0; e < b->experts; e++)
        sum += in[e] ? exp((double)z[e]) : 0.0;
    for (int64_t e = 0; e < b->experts; e++) {
        s[e] = how->score == MOEC_SCORE_SIGMOID ? 1.0 / (1.0 + exp(-(double)z[e])) : exp((double)z[e]) / sum;
        v[e] = in[e] ? s[e] + naive_value(b->l->vec[MOEC_VEC_SELECTION_BIAS], e) : -HUGE_VAL;
    }
    for (int64_t k = 0; k < b->t.top_k; k++) {
        int64_t best = 0;
        for (int64_t e = 1; e < b->experts; e++)
            best = v[e] > v[best] ? e : best;
        g[best] = s[best];
        top += s[best];
        v[best] = -HUGE_VAL;
    }
    const bool normal = d->renorm || how->choice == MOEC_CHOOSE_TOP_K_SOFTMAX;
    for (int64_t e = 0; e < b->experts; e++)
        g[e] *= (normal ? 1.0 / (top + d->renorm_eps) : 1.0) * d->route_scale;
}

/* r of a token, into r [H]. */
static void naive_output(double *r, const bench *b, int64_t t, const bool *in)
{
    double g[MOST];
    naive_gates(g, b, t, in);
    for (int64_t c = 0; c < b->hidden; c++) {
        r[c] = 0.0;
        for (int64_t e = 0; e < b->experts; e++)
            r[c] += g[e] == 0.0 ? 0.0 : g[e] * b->out[(t * b->experts + e) * b->hidden + c];
    }
}

static double naive_loss(const bench *b, const bool *in)
{
    double loss = 0.0, sum = 0.0, r[WIDE];
    for (int64_t t = 0; t < b->n; t++) {
        naive_output(r, b, t, in);
        for (int64_t c = 0; c < b->hidden; c++)
            sum += pow((double)b->y[t * b->hidden + c] - r[c], 2.0);
        if ((t + 1) % b->t.window == 0 || t == b->n - 1) {
            loss += sqrt(sum);
            sum = 0.0;
        }
    }
    return loss;
}

/* duplicate: expert 1 becomes a copy of expert 4, in weights and nearly in logits. */
static void bench_open(bench *b, const char *family, int64_t experts, int64_t top_k, int64_t n, bool duplicate)
{
    moec_err err = {MOEC_OK, ""};
    const tiny_spec spec = {.family = family, .layers = 2, .experts = experts, .top_k = top_k, .seed = 5};
    memset(b, 0, sizeof *b);
    seed = 88172645463325252u;
    b->dir = tiny_folder();
    assert_int_equal(tiny_write(b->dir, &spec, &err), MOEC_OK);
    if (moec_model_open(&b->m, b->dir, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    b->l = &b->m->layer[1];
    assert_non_null(b->l->expert);
    b->n = n;
    b->experts = b->m->dims.experts;
    b->all = b->experts + b->m->dims.null_experts;
    b->hidden = b->m->dims.hidden;
    assert_true(b->experts <= MOST && b->hidden <= WIDE && b->m->dims.expert_width <= WIDE && b->all <= MOST);
    if (duplicate)
        b->l->expert[1] = b->l->expert[4];
    b->x = calloc((size_t)(n * b->hidden), sizeof *b->x);
    b->y = calloc((size_t)(n * b->hidden), sizeof *b->y);
    b->logits = calloc((size_t)(n * b->all), sizeof *b->logits);
    b->out = calloc((size_t)(n * b->experts * b->hidden), sizeof *b->out);
    for (int64_t i = 0; i < n * b->hidden; i++)
        b->x[i] = (float)uniform(-4.0, 4.0);
    for (int64_t t = 0; t < n; t++) {
        for (int64_t e = 0; e < b->all; e++)
            b->logits[t * b->all + e] = (float)uniform(-2.0, 2.0);
        if (duplicate)
            b->logits[t * b->all + 1] = b->logits[t * b->all + 4] - (t % 2 ? 0.001f : -0.001f);
    }
    for (int64_t e = 0; e < b->experts; e++)
        naive_expert(b->out + e * b->hidden, b->experts * b->hidden, b->m, b->l, e, b->x, n);
    b->t = (moec_choice_task){.model = b->m, .layer = b->l, .n = n, .x = b->x, .y = b->y, .logits = b->logits, .ld = b->all,
                              .window = 16, .keep = experts / 2, .groups = 1, .top_k = b->m->dims.top_k};
}

/* What is wanted: what the whole layer gives, and a little else. */
static void want(bench *b, double noise)
{
    bool in[MOST];
    double r[WIDE];
    memset(in, true, sizeof in);
    for (int64_t t = 0; t < b->n; t++) {
        naive_output(r, b, t, in);
        for (int64_t c = 0; c < b->hidden; c++)
            b->y[t * b->hidden + c] = (float)(r[c] + uniform(-noise, noise));
    }
}

static void bench_close(bench *b)
{
    moec_model_close(b->m);
    tiny_remove(b->dir);
    moec_free(b->dir);
    free(b->x);
    free(b->y);
    free(b->logits);
    free(b->out);
}

/* ---- naive choices ------------------------------------------------------------------------------------------------------ */

static bool allowed(const bench *b, const bool *in)
{
    for (int64_t g = 0, e = 0; g < b->t.groups; g++) {
        int64_t n = 0;
        for (; e < (g + 1) * b->experts / b->t.groups; e++) {
            n += in[e];
            if (b->t.guarded && b->t.guarded[e] && !in[e])
                return false;
        }
        if (n != b->t.keep / b->t.groups)
            return false;
    }
    return true;
}

static void naive_best(bool *best, const bench *b)
{
    double least = HUGE_VAL;
    for (int64_t mask = 0; mask < (int64_t)1 << b->experts; mask++) {
        bool in[MOST];
        for (int64_t e = 0; e < b->experts; e++)
            in[e] = mask >> e & 1;
        if (!allowed(b, in))
            continue;
        double loss = naive_loss(b, in);
        if (loss < least) {
            least = loss;
            memcpy(best, in, sizeof in);
        }
    }
    assert_true(least < HUGE_VAL);
}

static void naive_greedy(double *score, const bench *b)
{
    bool in[MOST];
    int64_t left[MOST];
    const int64_t width = b->experts / b->t.groups;
    memset(in, true, sizeof in);
    for (int64_t e = 0; e < b->experts; e++) {
        score[e] = (double)b->experts;
        left[e / width] = width;
    }
    for (int64_t gone = 0; gone < b->experts - b->t.keep; gone++) {
        double least = HUGE_VAL;
        int64_t best = -1;
        for (int64_t e = 0; e < b->experts; e++) {
            if (!in[e] || (b->t.guarded && b->t.guarded[e]) || left[e / width] == b->t.keep / b->t.groups)
                continue;
            in[e] = false;
            double loss = naive_loss(b, in);
            in[e] = true;
            if (loss < least) {
                least = loss;
                best = e;
            }
        }
        assert_true(best >= 0);
        in[best] = false;
        left[best / width]--;
        score[best] = (double)(gone + 1);
    }
}

/* ---- running ------------------------------------------------------------------------------------------------------------ */

typedef struct result {
    int32_t keep[MOST];
    double score[MOST];
} result;

static void run(result *r, const bench *b, int threads)
{
    moec_err err = {MOEC_OK, ""};
    memset(r, 0, sizeof *r);
    moec_par_set_threads(threads);
    if (moec_choose_lu(r->keep, r->score, &b->t, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    moec_par_set_threads(0);
}

/* The same with one thread and with three; kept are those with score E. */
static void choose(result *r, const bench *b)
{
    result again;
    int64_t n = 0;
    run(r, b, 1);
    run(&again, b, 3);
    assert_memory_equal(r, &again, sizeof again);
    for (int64_t e = 0; e < b->experts; e++)
        if (r->score[e] == (double)b->experts)
            assert_int_equal(r->keep[n++], e);
    assert_int_equal(n, b->t.keep);
}

static void expect_best(const bench *b)
{
    result r;
    bool best[MOST];
    choose(&r, b);
    naive_best(best, b);
    for (int64_t e = 0; e < b->experts; e++)
        assert_true(r.score[e] == (best[e] ? (double)b->experts : 0.0));
}

static void expect_greedy(const bench *b)
{
    result r;
    double score[MOST];
    choose(&r, b);
    naive_greedy(score, b);
    for (int64_t e = 0; e < b->experts; e++)
        assert_true(r.score[e] == score[e]);
}

static const char *const families[] = {"qwen3_moe", "olmoe", "mixtral", "gpt_oss", "deepseek_v3", "glm4_moe"};

static void all_subsets(void **state)
{
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(families); i++) {
        static const bool guarded[MOST] = {[2] = true, [5] = true};
        bench b;
        bench_open(&b, families[i], 6, 2, 90, false); /* the last window is short */
        b.t.keep = 3;
        for (double noise = 0.001; noise < 1000.0; noise *= 4.0) { /* from a small part of what is wanted to most of it */
            want(&b, noise);
            b.t.window = 16;
            expect_best(&b);
            b.t.window = 1;
            expect_best(&b);
        }
        b.t.window = 16;
        want(&b, 0.01);
        b.t.guarded = guarded;
        expect_best(&b);
        b.t.keep = 2; /* nobody else */
        expect_best(&b);
        b.t.guarded = NULL;
        b.t.keep = 1; /* fewer than a token has */
        b.t.top_k = 1;
        expect_best(&b);
        b.t.keep = 6;
        b.t.top_k = 2;
        expect_best(&b);
        bench_close(&b);
    }
}

static void greedy(void **state)
{
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(families); i++) {
        static const bool guarded[MOST] = {[0] = true, [7] = true, [17] = true};
        bench b;
        bench_open(&b, families[i], 18, 4, 70, false); /* 48620 subsets */
        b.t.keep = 9;
        want(&b, 0.01);
        expect_greedy(&b);
        bench_close(&b);
        bench_open(&b, families[i], 24, 2, 50, false);
        b.t.keep = 9;
        b.t.guarded = guarded;
        want(&b, 0.1);
        expect_greedy(&b);
        bench_close(&b);
    }
}

static void groups(void **state)
{
    static const bool guarded[MOST] = {[1] = true, [3] = true};
    bench b;
    (void)state;
    bench_open(&b, "deepseek_v3", 8, 2, 80, false);
    b.t.groups = b.m->dims.groups;
    assert_true(b.t.groups > 1);
    b.t.keep = 4;
    want(&b, 0.01);
    expect_best(&b);
    b.t.guarded = guarded;
    expect_best(&b);
    bench_close(&b);
    bench_open(&b, "deepseek_v3", 24, 2, 40, false);
    b.t.groups = b.m->dims.groups;
    b.t.keep = 12;
    want(&b, 0.01);
    expect_greedy(&b);
    bench_close(&b);
    bench_open(&b, "deepseek_v3", 24, 1, 40, false); /* a group's second best counts, which is not selected */
    b.t.groups = b.m->dims.groups;
    b.t.keep = 12;
    want(&b, 0.01);
    expect_greedy(&b);
    bench_close(&b);
}

/* Two experts do the same: one of them is the first to go, and the other takes its place. */
static void twins(void **state)
{
    bench b;
    result r;
    (void)state;
    bench_open(&b, "qwen3_moe", 6, 1, 96, true);
    want(&b, 0.0);
    b.t.keep = 5;
    choose(&r, &b);
    assert_true((r.score[1] == 0.0) != (r.score[4] == 0.0)); /* which of them is a matter of rounding */
    bench_close(&b);
    bench_open(&b, "qwen3_moe", 20, 1, 96, true);
    want(&b, 0.0);
    b.t.keep = 10;
    choose(&r, &b);
    assert_true((r.score[1] == 1.0) != (r.score[4] == 1.0));
    bench_close(&b);
}

/* Experts that nobody selects leave nothing behind: they go, lowest number first. */
static void unused(void **state)
{
    bench b;
    result r;
    (void)state;
    bench_open(&b, "qwen3_moe", 20, 2, 64, false);
    for (int64_t t = 0; t < b.n; t++)
        for (int64_t e = 0; e < b.experts; e += 3)
            b.logits[t * b.all + e] = -20.0f;
    want(&b, 0.0);
    b.t.keep = 10;
    choose(&r, &b);
    for (int64_t e = 0; e < b.experts; e += 3)
        assert_true(r.score[e] == (double)(e / 3 + 1));
    bench_close(&b);
    bench_open(&b, "qwen3_moe", 6, 1, 64, false);
    for (int64_t t = 0; t < b.n; t++)
        b.logits[t * b.all + 3] = 20.0f;
    want(&b, 0.0);
    choose(&r, &b); /* of the subsets with 3 the first */
    assert_true(r.keep[0] == 0 && r.keep[1] == 1 && r.keep[2] == 3);
    bench_close(&b);
}

/* More tokens than are looked at: only those of the windows at even distances count. */
static void many_tokens(void **state)
{
    enum { N = 5000, WINDOW = 100, WINDOWS = N / WINDOW, TAKEN = MOEC_LU_TOKENS / WINDOW };
    bench b, some;
    result r, of_some;
    (void)state;
    bench_open(&b, "qwen3_moe", 6, 2, N, false);
    want(&b, 0.01);
    b.t.window = WINDOW;
    choose(&r, &b);
    some = b;
    some.x = calloc((size_t)(N * b.hidden), sizeof *b.x);
    some.y = calloc((size_t)(N * b.hidden), sizeof *b.y);
    some.logits = calloc((size_t)(N * b.all), sizeof *b.logits);
    for (int64_t i = 0; i < TAKEN; i++) {
        const int64_t from = i * WINDOWS / TAKEN * WINDOW, to = i * WINDOW;
        memcpy(some.x + to * b.hidden, b.x + from * b.hidden, (size_t)(WINDOW * b.hidden) * sizeof *b.x);
        memcpy(some.y + to * b.hidden, b.y + from * b.hidden, (size_t)(WINDOW * b.hidden) * sizeof *b.y);
        memcpy(some.logits + to * b.all, b.logits + from * b.all, (size_t)(WINDOW * b.all) * sizeof *b.logits);
    }
    some.t.x = some.x;
    some.t.y = some.y;
    some.t.logits = some.logits;
    some.t.n = TAKEN * WINDOW;
    choose(&of_some, &some);
    assert_memory_equal(&r, &of_some, sizeof r);
    b.t.window = N; /* longer than all that is looked at */
    choose(&r, &b);
    free(some.x);
    free(some.y);
    free(some.logits);
    bench_close(&b);
}

static void expect_error(const bench *b, moec_status code, const char *text)
{
    result r;
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_choose_lu(r.keep, r.score, &b->t, &err), code);
    if (!strstr(err.text, text))
        fail_msg("%s", err.text);
}

static void refused(void **state)
{
    static const bool guarded[MOST] = {[0] = true, [2] = true, [4] = true};
    bench b;
    (void)state;
    bench_open(&b, "qwen3_moe", 6, 2, 40, false);
    want(&b, 0.0);
    const moec_choice_task good = b.t;
    b.t.guarded = guarded;
    b.t.keep = 2;
    expect_error(&b, MOEC_EINVAL, "3 protected experts, of which 2 stay");
    b.t.groups = 2;
    b.t.guarded = guarded;
    expect_error(&b, MOEC_EINVAL, "2 protected experts in a group, of which 1 stay");
    b.t = good;
    b.t.top_k = 4;
    expect_error(&b, MOEC_EINVAL, "4 experts a token");
    b.t = good;
    b.t.n = 0;
    expect_error(&b, MOEC_EINVAL, "0 tokens");
    b.t = good;
    b.y[7] = INFINITY;
    expect_error(&b, MOEC_ENUMERIC, "is not finite");
    b.x[20 * b.hidden] = 3e38f;
    expect_error(&b, MOEC_ENUMERIC, "its output of token 20 is not finite");
    assert_true(moec_choose_bytes(b.m) > 0);
    bench_close(&b);
    bench_open(&b, "llama4", 6, 1, 40, false);
    expect_error(&b, MOEC_EINVAL, "multiply the input");
    bench_close(&b);
    bench_open(&b, "MoE++", 6, 1, 40, false);
    expect_error(&b, MOEC_EINVAL, "without a network");
    bench_close(&b);
}

static void out_of_memory(void **state)
{
    bench b;
    result r;
    moec_status st = MOEC_ENOMEM;
    (void)state;
    bench_open(&b, "qwen3_moe", 6, 2, 40, false);
    want(&b, 0.0);
    moec_par_set_threads(2);
    for (long k = 0; st != MOEC_OK; k++) {
        moec_err err = {MOEC_OK, ""};
        moec_test_allocs_left = k;
        st = moec_choose_lu(r.keep, r.score, &b.t, &err);
        moec_test_allocs_left = __LONG_MAX__;
        assert_true(st == MOEC_OK || st == MOEC_ENOMEM);
        assert_true(k < 1000);
    }
    moec_par_set_threads(0);
    bench_close(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(all_subsets), cmocka_unit_test(greedy), cmocka_unit_test(groups), cmocka_unit_test(twins),
        cmocka_unit_test(unused), cmocka_unit_test(many_tokens), cmocka_unit_test(refused), cmocka_unit_test(out_of_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
