/* Repair against its definitions in float64: outputs, the ridge solution, every gradient by differences; what is planted is
 * found again; what held-out tokens deny is not taken; layouts, dtypes and threads make no difference. */
#include "base/hash.h"
#include "base/mem.h"
#include "base/par.h"
#include "repair_layer.h"
#include "num/linalg.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static int64_t run_both(fixture *f, int sweeps, double lambda, int64_t dense, int up_steps)
{
    moec_err err = {MOEC_OK, ""};
    int64_t taken = -1;
    const moec_ridge_opts o = {.sweeps = sweeps, .lambda = lambda, .dense = dense, .up_sweeps = sweeps, .up_steps = up_steps};
    moec_status st = moec_repair_ridge(&taken, &f->task, &o, &err);
    if (st != MOEC_OK)
        print_error("%s\n", err.text);
    assert_int_equal(st, MOEC_OK);
    return taken;
}

/* Down projections alone. */
static int64_t run_ridge(fixture *f, int sweeps, double lambda, int64_t dense)
{
    return run_both(f, sweeps, lambda, dense, 0);
}

static const rules kinds[] = {
    {.renorm = true},
    {.scale = 2.5, .slots = 3},
    {.score = MOEC_SCORE_SIGMOID, .renorm = true, .scale = 1.7, .router_bias = true},
    {.score = MOEC_SCORE_SIGMOID, .on_input = true, .slots = 1},
    {.score = MOEC_SCORE_SIGMOID, .on_input = true, .slots = 3, .renorm = true},
    {.choice = MOEC_CHOOSE_TOP_K_SOFTMAX, .clamped = true, .biased = true, .router_bias = true},
    {.choice = MOEC_CHOOSE_TOP_K_SOFTMAX, .clamped = true, .biased = true, .pairs = true, .slots = 4},
    {.renorm = true, .keep = 1, .slots = 1},
    {.keep = EXPERTS, .slots = 4, .pairs = true},
};

static void start_subtracts_the_layer(void **state)
{
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(kinds); i++) {
        fixture f;
        repair_setup(&f, kinds[i]);
        repair_aim(&f, 0.1f);
        repair_start(&f);
        repair_rest_is_right(&f, 1e-4);
        double sum[2] = {0, 0};
        for (int64_t t = 0; t < f.r.n; t++)
            for (int64_t h = 0; h < HIDDEN; h++)
                sum[t >= f.r.n_fit] += (double)f.weight[t] * (double)f.rest[t * HIDDEN + h] * (double)f.rest[t * HIDDEN + h];
        moec_repair_error e = moec_repair_missing(&f.task);
        assert_true(fabs(e.fit - sum[0]) < 1e-5 * sum[0] && fabs(e.held - sum[1]) < 1e-5 * sum[1]);
        repair_teardown(&f);
    }
}

/* ---- ridge -------------------------------------------------------------------------------------------------------------- */

/* Solves a x = b for n unknowns and m right-hand sides b [n,m], in place, by elimination with pivots. */
static void solve(double *a, double *b, int64_t n, int64_t m)
{
    for (int64_t c = 0; c < n; c++) {
        int64_t best = c;
        for (int64_t r = c; r < n; r++)
            best = fabs(a[r * n + c]) > fabs(a[best * n + c]) ? r : best;
        for (int64_t j = 0; j < n; j++) {
            double v = a[c * n + j];
            a[c * n + j] = a[best * n + j];
            a[best * n + j] = v;
        }
        for (int64_t j = 0; j < m; j++) {
            double v = b[c * m + j];
            b[c * m + j] = b[best * m + j];
            b[best * m + j] = v;
        }
        for (int64_t r = 0; r < n; r++) {
            double k = r == c ? 0 : a[r * n + c] / a[c * n + c];
            for (int64_t j = 0; j < n; j++)
                a[r * n + j] -= k * a[c * n + j];
            for (int64_t j = 0; j < m; j++)
                b[r * m + j] -= k * b[c * m + j];
        }
    }
    for (int64_t r = 0; r < n; r++)
        for (int64_t j = 0; j < m; j++)
            b[r * m + j] /= a[r * n + r];
}

/* The projections that all kept experts have together: the change that minimises the error plus, where `lambda` is not 0, the
 * penalty of each expert. change [keep,WIDTH,HIDDEN] */
static void joint_solution(double *change, const fixture *f, double lambda)
{
    const int64_t n = f->r.keep * WIDTH;
    double *a = calloc((size_t)(n * n), sizeof *a), *b = malloc((size_t)n * sizeof *b);
    assert_true(a && b);
    memset(change, 0, (size_t)(n * HIDDEN) * sizeof *change);
    double (*w)[EXPERT_VALUES] = malloc(EXPERTS * sizeof *w);
    assert_non_null(w);
    for (int32_t e = 0; e < EXPERTS; e++)
        repair_weights(w[e], f, e);
    for (int64_t t = 0; t < f->r.n_fit; t++) {
        memset(b, 0, (size_t)n * sizeof *b);
        for (int64_t k = 0; k < f->r.keep; k++)
            for (int64_t j = t * f->r.slots; j < (t + 1) * f->r.slots; j++)
                if (f->ids[j] == f->keep[k]) {
                    const double g = (double)f->gates[j];
                    repair_act(b + k * WIDTH, f, w[f->keep[k]], f->keep[k], f->x + t * HIDDEN, f->r.on_input ? g : 1);
                    for (int64_t i = 0; i < WIDTH; i++)
                        b[k * WIDTH + i] *= f->r.on_input ? 1 : g;
                }
        for (int64_t i = 0; i < n; i++) {
            for (int64_t j = 0; j < n; j++)
                a[i * n + j] += (double)f->weight[t] * b[i] * b[j];
            for (int64_t h = 0; h < HIDDEN; h++)
                change[i * HIDDEN + h] += (double)f->weight[t] * b[i] * (double)f->rest[t * HIDDEN + h];
        }
    }
    for (int64_t k = 0; k < f->r.keep; k++) {
        double trace = 0;
        for (int64_t i = k * WIDTH; i < (k + 1) * WIDTH; i++)
            trace += a[i * n + i];
        for (int64_t i = k * WIDTH; i < (k + 1) * WIDTH; i++)
            a[i * n + i] += lambda / WIDTH * trace;
    }
    solve(a, change, n, HIDDEN);
    free(w);
    free(a);
    free(b);
}

/* Largest difference between the change that took place and the one wanted, relative to the largest wanted. */
static double off_by(const fixture *f, double (*old)[EXPERT_VALUES], const double *change)
{
    double w[EXPERT_VALUES], most = 0, off = 0;
    for (int64_t k = 0; k < f->r.keep; k++) {
        repair_weights(w, f, f->keep[k]);
        assert_memory_equal(w, old[f->keep[k]], 2 * HIDDEN * WIDTH * sizeof *w);
        for (int64_t h = 0; h < HIDDEN; h++)
            for (int64_t i = 0; i < WIDTH; i++) {
                const int64_t at = 2 * HIDDEN * WIDTH + h * WIDTH + i;
                const double want = change[(k * WIDTH + i) * HIDDEN + h];
                most = fmax(most, fabs(want));
                off = fmax(off, fabs(w[at] - old[f->keep[k]][at] - want));
            }
    }
    return off / most;
}

static void ridge_solves_its_normal_equations(void **state)
{
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(kinds); i++)
        for (int dense = 0; dense < 2; dense++) {
            fixture f;
            double old[EXPERTS][EXPERT_VALUES], change[EXPERTS * WIDTH * HIDDEN];
            rules r = kinds[i];
            r.keep = r.slots = 1;
            repair_setup(&f, r);
            repair_aim(&f, 0.01f);
            repair_shake(&f.down, 0.2f);
            repair_start(&f);
            for (int32_t e = 0; e < EXPERTS; e++)
                repair_weights(old[e], &f, e);
            joint_solution(change, &f, 0.05);
            assert_int_equal(run_ridge(&f, 1, 0.05, dense ? WIDTH : 1), 1);
            assert_true(off_by(&f, old, change) < (dense ? 1e-4 : 1e-3));
            repair_rest_is_right(&f, 1e-4);
            repair_teardown(&f);
        }
}

/* ---- up projections -------------------------------------------------------------------------------------------------------- */

/* Slopes of an expert's neurons by their up input for one token, times `out`; inputs as repair_act has them. */
static void slopes(double *s, const fixture *f, const double *w, int32_t e, const float *x, double times, double out)
{
    enum { UP = HIDDEN * WIDTH };
    double low[WIDTH], high[WIDTH], v[EXPERT_VALUES], square = 0;
    const double h = 1e-6;
    for (int64_t j = 0; j < HIDDEN; j++)
        square += times * times * (double)x[j] * (double)x[j];
    memcpy(v, w, sizeof v);
    for (int sign = -1; sign <= 1; sign += 2) { /* up + h x / |x|^2 moves every up input by h */
        for (int64_t i = 0; i < UP; i++)
            v[UP + i] = w[UP + i] + sign * h * times * (double)x[i % HIDDEN] / square;
        repair_act(sign < 0 ? low : high, f, v, e, x, times);
    }
    for (int64_t i = 0; i < WIDTH; i++)
        s[i] = out * (high[i] - low[i]) / (2 * h);
}

/* The change of one expert's up projection that minimises sum w |rest - D S change x|^2 + lambda |change|^2, the latter in the
 * coordinates that moec_repair_ridge states: by its normal equations of all I H unknowns. */
static void up_solution(double *change, const fixture *f, double lambda)
{
    enum { N = WIDTH * HIDDEN };
    const int32_t e = f->keep[0];
    double *a = calloc((size_t)N * N, sizeof *a), w[EXPERT_VALUES], dd[WIDTH][WIDTH] = {{0}}, cov[HIDDEN][HIDDEN] = {{0}};
    double s[WIDTH], scale[WIDTH] = {0}, mean = 0, weight = 0;
    assert_non_null(a);
    repair_weights(w, f, e);
    const double *down = w + 2 * N;
    memset(change, 0, N * sizeof *change);
    for (int i = 0; i < WIDTH; i++)
        for (int j = 0; j < WIDTH; j++)
            for (int h = 0; h < HIDDEN; h++)
                dd[i][j] += down[h * WIDTH + i] * down[h * WIDTH + j];
    for (int64_t t = 0; t < f->r.n_fit; t++) {
        const float *x = f->x + t * HIDDEN;
        const double g = (double)f->gates[t], in = f->r.on_input ? g : 1, wt = (double)f->weight[t];
        slopes(s, f, w, e, x, in, f->r.on_input ? 1 : g);
        weight += wt;
        for (int h = 0; h < HIDDEN; h++)
            for (int k = 0; k < HIDDEN; k++)
                cov[h][k] += wt * (double)x[h] * (double)x[k];
        for (int i = 0; i < WIDTH; i++) {
            double pull = 0;
            scale[i] += wt * s[i] * s[i] * dd[i][i];
            for (int h = 0; h < HIDDEN; h++)
                pull += down[h * WIDTH + i] * (double)f->rest[t * HIDDEN + h];
            for (int h = 0; h < HIDDEN; h++) {
                change[i * HIDDEN + h] += wt * s[i] * pull * in * (double)x[h];
                for (int j = 0; j < WIDTH; j++)
                    for (int k = 0; k < HIDDEN; k++)
                        a[(i * HIDDEN + h) * N + j * HIDDEN + k] +=
                            wt * s[i] * s[j] * dd[i][j] * in * in * (double)x[h] * (double)x[k];
            }
        }
    }
    for (int i = 0; i < WIDTH; i++)
        mean += scale[i] / WIDTH;
    for (int i = 0; i < WIDTH; i++)
        scale[i] += 0.01 * mean;
    mean = 0;
    for (int h = 0; h < HIDDEN; h++)
        mean += cov[h][h] / weight / HIDDEN;
    for (int i = 0; i < WIDTH; i++)
        for (int h = 0; h < HIDDEN; h++)
            for (int k = 0; k < HIDDEN; k++)
                a[(i * HIDDEN + h) * N + i * HIDDEN + k] +=
                    lambda * scale[i] * (cov[h][k] / weight + (h == k ? 0.01 * mean : 0));
    solve(a, change, N, 1);
    free(a);
}

static void up_solves_its_normal_equations(void **state)
{
    enum { N = WIDTH * HIDDEN };
    (void)state;
    for (size_t i = 0; i < 2 * MOEC_COUNT(kinds); i++) {
        fixture f;
        double want[N], w[EXPERT_VALUES], most = 0, off = 0;
        float values[EXPERT_VALUES], biases[2 * WIDTH + HIDDEN], change[N];
        moec_err err = {MOEC_OK, ""};
        moec_up *up;
        moec_tokens k;
        bool ok;
        rules r = kinds[i / 2];
        r.keep = r.slots = 1;
        r.n = r.n_fit = 150;
        repair_setup(&f, r);
        repair_aim(&f, 0.01f);
        repair_shake(&f.gate_up, 0.1f);
        repair_start(&f);
        up_solution(want, &f, 0.05);
        repair_weights(w, &f, f.keep[0]);
        moec_piece p = {.expert = f.keep[0], .width = WIDTH};
        assert_int_equal(moec__piece_read(&p, &f.task, values, biases, &err), MOEC_OK);
        assert_int_equal(moec__picked_new(&k, f.r.n, &err), MOEC_OK);
        moec__picked_of(&k, &f.task, f.ids, f.gates, p.expert);
        assert_int_equal(moec__up_new(&up, &f.task, i % 2, &err), MOEC_OK);
        float *rest = malloc((size_t)(f.r.n * HIDDEN) * sizeof *rest);
        assert_true(up && rest && k.n == f.r.n);
        for (int64_t t = 0; t < f.r.n; t++) {
            const float root = sqrtf(f.weight[t]);
            double s[WIDTH];
            const double g = (double)f.gates[t];
            slopes(s, &f, w, p.expert, f.x + t * HIDDEN, f.r.on_input ? g : 1, f.r.on_input ? 1 : g);
            for (int j = 0; j < WIDTH; j++)
                moec__up_slope(up)[t * WIDTH + j] = root * (float)s[j];
            for (int h = 0; h < HIDDEN; h++)
                rest[t * HIDDEN + h] = root * f.rest[t * HIDDEN + h];
        }
        assert_int_equal(moec__up_solve(&ok, change, up, &p, &k, rest, 0.05, 300, &err), MOEC_OK);
        assert_true(ok);
        for (int j = 0; j < N; j++) {
            most = fmax(most, fabs(want[j]));
            off = fmax(off, fabs((double)change[j] - want[j]));
        }
        if (!(off < 1e-3 * most))
            print_error("kind %zu: off by %g of %g\n", i / 2, off, most);
        assert_true(most > 0 && off < 1e-3 * most);
        free(rest);
        moec__up_free(up);
        moec__picked_release(&k);
        repair_teardown(&f);
    }
}

/* What was moved in the up projections is found, or most of it; gates stay; rest is what the tensors leave. */
static void up_and_down_lower_the_error(void **state)
{
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(kinds); i++)
        for (int dtype = 0; dtype < 3; dtype++) {
            static const moec_dtype types[] = {MOEC_F32, MOEC_BF16, MOEC_F16};
            fixture f;
            double old[EXPERTS][EXPERT_VALUES], w[EXPERT_VALUES];
            rules r = kinds[i];
            r.n = 1200;
            r.dtype = types[dtype];
            repair_setup(&f, r);
            repair_aim(&f, 0.01f);
            for (int64_t e = 0; e < EXPERTS; e++) /* only up */
                for (int64_t c = 0; c < WIDTH * HIDDEN; c++) {
                    float v;
                    moec_weight_read(&v, 1, &f.expert[e].up, c / HIDDEN, 1, c % HIDDEN, 1);
                    v += 0.1f * repair_normal();
                    assert_int_equal(moec_weight_write(&f.expert[e].up, &v, 1, c / HIDDEN, 1, c % HIDDEN, 1, NULL), MOEC_OK);
                }
            for (int32_t e = 0; e < EXPERTS; e++)
                repair_weights(old[e], &f, e);
            repair_start(&f);
            const double before = moec_repair_missing(&f.task).held;
            assert_true(run_both(&f, 4, 0.01, i % 2 ? WIDTH : 1, 6) > 0);
            const double after = moec_repair_missing(&f.task).held;
            if (!(after < 0.2 * before))
                print_error("kind %zu, type %d: %g of the error is left\n", i, dtype, after / before);
            assert_true(after < 0.2 * before);
            repair_rest_is_right(&f, 1e-3);
            for (int32_t e = 0; e < EXPERTS; e++) {
                repair_weights(w, &f, e);
                assert_memory_equal(w, old[e], HIDDEN * WIDTH * sizeof *w);
            }
            repair_teardown(&f);
        }
}

static void sweeps_meet_in_the_joint_solution(void **state)
{
    fixture f;
    double old[EXPERTS][EXPERT_VALUES], change[EXPERTS * WIDTH * HIDDEN];
    (void)state;
    repair_setup(&f, (rules){.keep = 2, .slots = 2, .renorm = true, .n = 1200});
    repair_aim(&f, 0.001f);
    repair_shake(&f.down, 0.2f);
    repair_start(&f);
    for (int32_t e = 0; e < EXPERTS; e++)
        repair_weights(old[e], &f, e);
    joint_solution(change, &f, 0.0);
    assert_true(run_ridge(&f, 60, 1e-6, WIDTH) > 4);
    assert_true(off_by(&f, old, change) < 0.02);
    repair_rest_is_right(&f, 1e-3);
    repair_teardown(&f);
}

static void ridge_finds_what_was_planted(void **state)
{
    fixture f;
    double planted[EXPERTS][EXPERT_VALUES], w[EXPERT_VALUES];
    (void)state;
    repair_setup(&f, (rules){.keep = 3, .slots = 1});
    repair_aim(&f, 0.0f);
    for (int32_t e = 0; e < EXPERTS; e++)
        repair_weights(planted[e], &f, e);
    repair_shake(&f.down, 0.3f);
    repair_start(&f);
    const double before = moec_repair_missing(&f.task).held;
    assert_int_equal(run_ridge(&f, 1, 1e-9, WIDTH), 3);
    assert_true(moec_repair_missing(&f.task).held < 1e-6 * before);
    for (int64_t k = 0; k < 3; k++) {
        repair_weights(w, &f, f.keep[k]);
        for (int i = 0; i < EXPERT_VALUES; i++)
            assert_true(fabs(w[i] - planted[f.keep[k]][i]) < 1e-3);
    }
    repair_teardown(&f);
}

static moec_digest digest_of(const fixture *f)
{
    moec_hash *h;
    assert_int_equal(moec_hash_new(&h, NULL), MOEC_OK);
    moec_hash_add(h, f->map, f->map_bytes);
    moec_hash_add(h, f->rest, (size_t)(f->r.n * HIDDEN) * sizeof *f->rest);
    moec_hash_add(h, f->ids, (size_t)(f->r.n * f->r.slots) * sizeof *f->ids);
    moec_hash_add(h, f->gates, (size_t)(f->r.n * f->r.slots) * sizeof *f->gates);
    moec_digest d = moec_hash_digest(h);
    moec_hash_free(h);
    return d;
}

static bool same(moec_digest a, moec_digest b)
{
    return strcmp(a.hex, b.hex) == 0;
}

static int64_t run_deep(fixture *f, moec_deep_opts o)
{
    moec_err err = {MOEC_OK, ""};
    int64_t taken = -1;
    o.sweeps = o.sweeps ? o.sweeps : 1;
    o.batch = o.batch ? o.batch : 64;
    o.block_values = o.block_values ? o.block_values : 1 << 30;
    moec_status st = moec_repair_deep(&taken, &f->task, &o, &err);
    if (st != MOEC_OK)
        print_error("%s\n", err.text);
    assert_int_equal(st, MOEC_OK);
    return taken;
}

/* Fitted tokens want the opposite of what held-out ones do. */
static void held_out_tokens_can_refuse(void **state)
{
    (void)state;
    for (int router = 0; router < 2; router++) {
        fixture f;
        repair_setup(&f, (rules){.renorm = true, .router = router});
        repair_aim(&f, 0.0f);
        for (int64_t i = 0; i < f.r.n_fit * HIDDEN; i++)
            f.y[i] = f.rest[i] = -f.y[i];
        repair_start(&f);
        for (int64_t i = f.r.n_fit * HIDDEN; i < f.r.n * HIDDEN; i++)
            f.rest[i] = 1e-4f * repair_normal();
        const moec_digest before = digest_of(&f);
        assert_int_equal(run_both(&f, 2, 0.01, WIDTH, 3), 0);
        assert_true(same(before, digest_of(&f)));
        assert_int_equal(run_deep(&f, (moec_deep_opts){.epochs = 3, .rate = 0.02}), 0);
        assert_true(same(before, digest_of(&f)));
        assert_int_equal(run_deep(&f, (moec_deep_opts){.epochs = 1, .rate = 1e30}), 0); /* whatever comes of it */
        assert_true(same(before, digest_of(&f)));
        repair_teardown(&f);
    }
}

/* Three tokens cannot say much: directions that they do not have stay, and an expert without any stays altogether. */
static void few_tokens_change_little(void **state)
{
    fixture f;
    double old[EXPERTS][EXPERT_VALUES], w[EXPERT_VALUES], moved = 0, size = 0;
    (void)state;
    repair_setup(&f, (rules){.keep = 3, .slots = 1, .n = 60, .n_fit = 60});
    for (int64_t t = 0; t < 60; t++) /* experts 1 and 2; 3 has none */
        f.ids[t] = t < 3 ? 1 : 2;
    repair_aim(&f, 0.0f);
    repair_shake(&f.down, 0.1f);
    repair_start(&f);
    for (int32_t e = 0; e < EXPERTS; e++)
        repair_weights(old[e], &f, e);
    const double before = moec_repair_missing(&f.task).fit;
    assert_int_equal(run_ridge(&f, 1, 0.01, WIDTH), 2);
    assert_true(moec_repair_missing(&f.task).fit < before);
    repair_weights(w, &f, 1);
    for (int i = 2 * HIDDEN * WIDTH; i < EXPERT_VALUES; i++) {
        moved += (w[i] - old[1][i]) * (w[i] - old[1][i]);
        size += 0.1 * 0.1;
    }
    assert_true(moved > 0 && moved < 0.3 * size); /* 3 of 20 directions, and no more than was shaken */
    repair_weights(w, &f, 3);
    assert_memory_equal(w, old[3], sizeof w);
    run_deep(&f, (moec_deep_opts){.epochs = 4, .rate = 0.01, .block_values = EXPERT_VALUES});
    repair_weights(w, &f, 3);
    assert_memory_equal(w, old[3], sizeof w);
    repair_rest_is_right(&f, 1e-4);
    repair_teardown(&f);
}

/* ---- gradients ---------------------------------------------------------------------------------------------------------- */

/* Routing of one token by the definition. */
static void naive_route(int32_t *ids, double *gates, const fixture *f, const double *router, const float *x)
{
    const rules *r = &f->r;
    double s[EXPERTS], z[EXPERTS], sum = 0, total = 0;
    bool used[EXPERTS] = {false};
    for (int64_t k = 0; k < r->keep; k++) {
        z[k] = r->router_bias ? (double)f->router_bias[k] : 0;
        for (int64_t j = 0; j < HIDDEN; j++)
            z[k] += router[k * HIDDEN + j] * (double)x[j];
        total += exp(z[k]);
    }
    for (int64_t k = 0; k < r->keep; k++)
        s[k] = r->score == MOEC_SCORE_SIGMOID ? 1 / (1 + exp(-z[k])) : exp(z[k]) / total;
    for (int64_t j = 0; j < r->slots; j++) {
        int64_t best = -1;
        ids[j] = -1;
        for (int64_t k = 0; k < r->keep; k++)
            if (!used[k] && (best < 0 || z[k] > z[best]))
                best = k;
        if (best < 0)
            continue;
        used[best] = true;
        ids[j] = (int32_t)best;
        gates[j] = s[best];
        sum += s[best];
    }
    for (int64_t j = 0; j < r->slots; j++)
        gates[j] *= r->scale / (r->renorm || r->choice == MOEC_CHOOSE_TOP_K_SOFTMAX ? sum : 1);
}

/* The loss of a batch with these weights, laid out as moec__fit_values has them. */
static double naive_loss(const fixture *f, const double *v, const int32_t *token, int64_t n, double scale)
{
    double loss = 0, r[HIDDEN], gates[MOST_SLOTS];
    int32_t ids[MOST_SLOTS];
    for (int64_t i = 0; i < n; i++) {
        const float *x = f->x + token[i] * HIDDEN;
        memset(r, 0, sizeof r);
        for (int64_t j = 0; j < f->r.slots; j++) { /* experts' numbers are those in keep */
            const int32_t id = f->ids[token[i] * f->r.slots + j];
            ids[j] = id < 0 ? -1 : id - (f->r.keep < EXPERTS);
            gates[j] = (double)f->gates[token[i] * f->r.slots + j];
        }
        if (f->r.router)
            naive_route(ids, gates, f, v + f->r.keep * EXPERT_VALUES, x);
        for (int64_t j = 0; j < f->r.slots; j++)
            if (ids[j] >= 0)
                repair_add(r, f, v + ids[j] * EXPERT_VALUES, f->keep[ids[j]], x, gates[j]);
        for (int64_t h = 0; h < HIDDEN; h++)
            loss += scale * (double)f->weight[token[i]] * pow((double)f->y[token[i] * HIDDEN + h] - r[h], 2);
    }
    return loss;
}

static void check_matrix(const fixture *f, double *v, const float *grad, int64_t at, int64_t n, const int32_t *token, int64_t b,
                         const char *name)
{
    double most = 0;
    for (int64_t i = at; i < at + n; i++)
        most = fmax(most, fabs((double)grad[i]));
    assert_true(most > 0);
    for (int k = 0; k < 5; k++) {
        const int64_t i = at + (int64_t)repair_uniform(0.0f, (float)n) % n;
        const double was = v[i], h = 1e-5;
        v[i] = was + h;
        double up = naive_loss(f, v, token, b, 0.37);
        v[i] = was - h;
        double slope = (up - naive_loss(f, v, token, b, 0.37)) / (2 * h);
        v[i] = was;
        if (fabs(slope - (double)grad[i]) > 1e-3 * most)
            print_error("%s, value %lld: %g, expected %g\n", name, (long long)i, (double)grad[i], slope);
        assert_true(fabs(slope - (double)grad[i]) <= 1e-3 * most);
    }
}

static void gradients_are_differences(void **state)
{
    enum { BATCH = 30 };
    (void)state;
    for (size_t i = 0; i < 2 * MOEC_COUNT(kinds); i++) {
        fixture f;
        moec_fit *fit;
        moec_err err = {MOEC_OK, ""};
        int64_t n;
        int32_t token[BATCH];
        double loss;
        rules r = kinds[i / 2];
        r.router = i % 2;
        repair_setup(&f, r);
        repair_aim(&f, 1.0f);
        for (int32_t t = 0; t < BATCH; t++)
            token[t] = t * 7 % 600;
        assert_int_equal(moec__fit_new(&fit, &f.task, f.r.keep, WIDTH, BATCH, r.router, &err), MOEC_OK);
        assert_int_equal(moec__fit_read(fit, 0, f.r.keep, 0, WIDTH, &err), MOEC_OK);
        const float *values = moec__fit_values(fit, &n);
        float *grad = malloc((size_t)n * sizeof *grad);
        double *v = malloc((size_t)n * sizeof *v);
        assert_true(grad && v);
        for (int64_t k = 0; k < n; k++)
            v[k] = (double)values[k];
        assert_int_equal(moec__fit_batch(&loss, grad, fit, f.y, token, BATCH, 0.37, NULL, &err), MOEC_OK);
        assert_true(fabs(loss - naive_loss(&f, v, token, BATCH, 0.37)) < 1e-4 * loss);
        for (int64_t k = 0; k < f.r.keep; k++) {
            check_matrix(&f, v, grad, k * EXPERT_VALUES, HIDDEN * WIDTH, token, BATCH, "gate");
            check_matrix(&f, v, grad, k * EXPERT_VALUES + HIDDEN * WIDTH, HIDDEN * WIDTH, token, BATCH, "up");
            check_matrix(&f, v, grad, k * EXPERT_VALUES + 2 * HIDDEN * WIDTH, HIDDEN * WIDTH, token, BATCH, "down");
        }
        if (r.router && f.r.keep > 1)
            check_matrix(&f, v, grad, f.r.keep * EXPERT_VALUES, f.r.keep * HIDDEN, token, BATCH, "router");
        free(grad);
        free(v);
        moec__fit_free(fit);
        repair_teardown(&f);
    }
}

/* ---- deep --------------------------------------------------------------------------------------------------------------- */

static double layer_error(const fixture *f)
{
    return moec_repair_missing(&f->task).held;
}

static void deep_lowers_the_error(void **state)
{
    static const struct {
        int64_t block;
        bool router;
    } how[] = {{1 << 30, true}, {1 << 30, false}, {EXPERT_VALUES, false}, {2 * EXPERT_VALUES, false},
               {EXPERT_VALUES / 3, false}};
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(how) * MOEC_COUNT(kinds); i++) {
        fixture f;
        rules r = kinds[i / MOEC_COUNT(how)];
        const size_t k = i % MOEC_COUNT(how);
        r.router = how[k].router;
        r.n = 900;
        repair_setup(&f, r);
        repair_aim(&f, 0.01f);
        repair_shake(&f.gate_up, 0.1f);
        repair_shake(&f.down, 0.1f);
        repair_start(&f);
        double before = layer_error(&f), first = before;
        for (int s = 0; s < 2; s++) {
            run_deep(&f, (moec_deep_opts){.epochs = 12, .rate = 0.02, .batch = 48, .seed = 5, .block_values = how[k].block});
            assert_true(layer_error(&f) <= before * (1 + 1e-5));
            before = layer_error(&f);
            repair_rest_is_right(&f, 1e-3);
        }
        if (!(before < 0.5 * first))
            print_error("kind %zu, way %zu: %g of the error is left\n", i / MOEC_COUNT(how), k, before / first);
        assert_true(before < 0.5 * first);
        repair_teardown(&f);
    }
}

/* Threads, layouts, types. */
static moec_digest repaired(rules r, int threads, double *held, float *values)
{
    fixture f;
    moec_par_set_threads(threads);
    repair_seed = 4711;
    repair_setup(&f, r);
    if (r.pairs) { /* the same matrices as those of a plain layout with this seed */
        enum { PART = HIDDEN * WIDTH };
        fixture plain;
        float v[PART];
        repair_seed = 4711;
        r.pairs = false;
        repair_setup(&plain, r);
        for (int e = 0; e < EXPERTS; e++) {
            const moec_weight *from[] = {&plain.expert[e].gate, &plain.expert[e].up, &plain.expert[e].down};
            const moec_weight *to[] = {&f.expert[e].gate, &f.expert[e].up, &f.expert[e].down};
            for (int i = 0; i < 3; i++) {
                moec_weight_read(v, from[i]->cols, from[i], 0, from[i]->rows, 0, from[i]->cols);
                assert_int_equal(moec_weight_write(to[i], v, to[i]->cols, 0, to[i]->rows, 0, to[i]->cols, NULL), MOEC_OK);
            }
        }
        repair_teardown(&plain);
    }
    for (int64_t i = 0; i < f.r.n * HIDDEN; i++)
        f.y[i] = f.rest[i] = repair_normal();
    repair_start(&f);
    run_both(&f, 2, 0.01, WIDTH, 3);
    run_both(&f, 1, 0.02, 1, 2);
    run_deep(&f, (moec_deep_opts){.epochs = 3, .rate = 0.01, .seed = 1});
    run_deep(&f, (moec_deep_opts){.epochs = 2, .rate = 0.01, .seed = 2, .block_values = EXPERT_VALUES / 2});
    *held = layer_error(&f);
    if (values)
        moec_weight_read(values, WIDTH, &f.expert[2].down, 0, HIDDEN, 0, WIDTH);
    moec_digest d = digest_of(&f);
    repair_rest_is_right(&f, 1e-3);
    repair_teardown(&f);
    moec_par_set_threads(0);
    return d;
}

static void threads_make_no_difference(void **state)
{
    static const rules list[] = {
        {.renorm = true, .n = 3000, .router = true},
        {.score = MOEC_SCORE_SIGMOID, .on_input = true, .slots = 3, .n = 2000, .router = true},
        {.choice = MOEC_CHOOSE_TOP_K_SOFTMAX, .clamped = true, .biased = true, .pairs = true, .dtype = MOEC_BF16, .router = true},
    };
    double held;
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(list); i++)
        assert_true(same(repaired(list[i], 1, &held, NULL), repaired(list[i], 2, &held, NULL)));
}

static void layouts_make_no_difference(void **state)
{
    double one, other;
    float a[HIDDEN * WIDTH], b[HIDDEN * WIDTH];
    (void)state;
    rules r = {.renorm = true, .router = true};
    repaired(r, 0, &one, a);
    r.pairs = true;
    repaired(r, 0, &other, b);
    assert_true(fabs(one - other) <= 1e-6 * one);
    for (int i = 0; i < HIDDEN * WIDTH; i++)
        assert_true(fabsf(a[i] - b[i]) <= 1e-5f);
}

/* What is taken is measured as it is stored: rest agrees with the tensors of two bytes. */
static void short_types_are_repaired(void **state)
{
    static const moec_dtype type[] = {MOEC_BF16, MOEC_F16};
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(type); i++) {
        fixture f;
        repair_setup(&f, (rules){.renorm = true, .dtype = type[i], .router = true});
        repair_aim(&f, 0.01f);
        repair_shake(&f.down, 0.15f);
        repair_start(&f);
        const double before = layer_error(&f);
        assert_true(run_ridge(&f, 3, 0.001, WIDTH) > 0);
        assert_true(layer_error(&f) < 0.3 * before);
        repair_rest_is_right(&f, 1e-4);
        run_deep(&f, (moec_deep_opts){.epochs = 4, .rate = 0.005});
        repair_rest_is_right(&f, 1e-4);
        repair_teardown(&f);
    }
}

static void bad_weights_are_named(void **state)
{
    fixture f;
    moec_err err = {MOEC_OK, ""};
    int64_t taken;
    (void)state;
    repair_setup(&f, (rules){.renorm = true});
    repair_aim(&f, 0.1f);
    repair_start(&f);
    const float bad = NAN;
    memcpy((char *)f.expert[2].down.of->data + 4 * f.expert[2].down.at, &bad, sizeof bad);
    const moec_ridge_opts o = {.sweeps = 1, .lambda = 0.01, .dense = 100};
    assert_int_equal(moec_repair_ridge(&taken, &f.task, &o, &err), MOEC_ENUMERIC);
    assert_non_null(strstr(err.text, "expert 2"));
    const moec_deep_opts d = {.sweeps = 1, .epochs = 1, .batch = 8, .rate = 0.1, .block_values = 1};
    assert_int_equal(moec_repair_deep(&taken, &f.task, &d, &err), MOEC_ENUMERIC);
    assert_int_equal(moec_repair_start(&f.task, &err), MOEC_ENUMERIC);
    assert_true(moec_repair_bytes(&f.model, 1000, 2, 1 << 20) > 1000 * HIDDEN * sizeof(float));
    repair_teardown(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(start_subtracts_the_layer),
        cmocka_unit_test(ridge_solves_its_normal_equations),
        cmocka_unit_test(sweeps_meet_in_the_joint_solution),
        cmocka_unit_test(ridge_finds_what_was_planted),
        cmocka_unit_test(up_solves_its_normal_equations),
        cmocka_unit_test(up_and_down_lower_the_error),
        cmocka_unit_test(held_out_tokens_can_refuse),
        cmocka_unit_test(few_tokens_change_little),
        cmocka_unit_test(gradients_are_differences),
        cmocka_unit_test(deep_lowers_the_error),
        cmocka_unit_test(threads_make_no_difference),
        cmocka_unit_test(layouts_make_no_difference),
        cmocka_unit_test(short_types_are_repaired),
        cmocka_unit_test(bad_weights_are_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
