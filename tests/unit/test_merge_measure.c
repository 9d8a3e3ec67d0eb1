/* Masses and distances of experts against naive loops in float64. */
#include "merge_bench.h"
#include "naive_expert.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void near(double got, double want, double scale, const char *family, const char *what, int64_t i, int64_t j)
{
    if (!(fabs(got - want) <= 2e-6 * scale))
        fail_msg("%s, %s of %d, %d: %.9g is not %.9g", family, what, (int)i, (int)j, got, want);
}

/* The score that the router gives expert e before it chooses. */
static double naive_score(const bench *b, int64_t t, int64_t e)
{
    const float *z = b->logits + t * b->all;
    double sum = 0.0;
    if (b->m->family->score == MOEC_SCORE_SIGMOID)
        return 1.0 / (1.0 + exp(-(double)z[e]));
    for (int64_t i = 0; i < b->all; i++)
        sum += exp((double)z[i] - (double)z[e]);
    return 1.0 / sum;
}

static const double *output(const bench *b, int64_t t, int64_t e)
{
    return b->out + (t * b->experts + e) * b->hidden;
}

static double length(const double *v, int64_t n)
{
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++)
        sum += v[i] * v[i];
    return sqrt(sum);
}

/* ---- masses ------------------------------------------------------------------------------------------------------------- */

static void naive_mass(double *out, const bench *b, moec_merge_mass kind)
{
    for (int64_t e = 0; e < b->experts; e++) {
        double n = 0.0, sum = 0.0;
        for (int64_t i = 0; i < b->n * b->slots; i++) {
            if (b->ids[i] != e)
                continue;
            const int64_t t = i / b->slots;
            const double g = (double)b->gates[i], f = length(output(b, t, e), b->hidden), p = naive_score(b, t, e);
            n += 1.0;
            sum += kind == MOEC_MASS_GATE ? g : kind == MOEC_MASS_GATE_SQ ? g * g : kind == MOEC_MASS_REAP ? g * f
                   : kind == MOEC_MASS_ENERGY ? g * g * f * f : kind == MOEC_MASS_REAM ? p * p * f : 1.0;
        }
        if (kind == MOEC_MASS_EQUAL)
            sum = n > 0.0;
        else if (kind == MOEC_MASS_REAP || kind == MOEC_MASS_REAM)
            sum = n > 0.0 ? sum / n : 0.0;
        out[e] = sum;
    }
}

static const char *const families[] = {"qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe", "adamoe"};

static void sums(void **state)
{
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(families); i++) {
        bench b;
        bench_open(&b, families[i], 8, 2, i == 0 ? 3000 : 150); /* 3000: an expert has more than one piece */
        for (int k = 0; k < MOEC_MASS_KINDS; k++) {
            double got[BENCH_EXPERTS], want[BENCH_EXPERTS];
            bench_masses(got, &b, (moec_merge_mass)k);
            naive_mass(want, &b, (moec_merge_mass)k);
            for (int64_t e = 0; e < b.experts; e++)
                near(got[e], want[e], want[e], families[i], moec_merge_mass_names[k], e, e);
        }
        bench_close(&b);
    }
}

/* Several texts, one of them without a token: each counts by its weight, whatever its length and the size of its sums. */
static void texts(void **state)
{
    static const int64_t text[] = {0, 20, 20, 150}, first[] = {0, 20, 150}, of[] = {0, 2};
    static const double weight[] = {2.0, 7.0, 0.5};
    bench b;
    (void)state;
    bench_open(&b, "qwen3_moe", 8, 2, 150);
    for (int k = 0; k < MOEC_MASS_KINDS; k++) {
        const bool mean = k == MOEC_MASS_REAP || k == MOEC_MASS_REAM || k == MOEC_MASS_EQUAL;
        double got[BENCH_EXPERTS], part[BENCH_EXPERTS], count[BENCH_EXPERTS], want[BENCH_EXPERTS] = {0.0}, hits[BENCH_EXPERTS] = {0.0};
        bench all = b;
        all.t.texts = 3;
        all.t.text = text;
        all.t.text_weight = weight;
        bench_masses(got, &all, (moec_merge_mass)k);
        for (int i = 0; i < 2; i++) { /* the two that have tokens, each as a bench of its own */
            bench one = b;
            const double w = weight[of[i]];
            double sum = 0.0;
            one.n = first[i + 1] - first[i];
            one.ids += first[i] * b.slots;
            one.gates += first[i] * b.slots;
            one.logits += first[i] * b.all;
            one.out += first[i] * b.experts * b.hidden;
            naive_mass(part, &one, (moec_merge_mass)k);
            naive_mass(count, &one, MOEC_MASS_COUNT);
            for (int64_t e = 0; e < b.experts; e++)
                sum += part[e];
            for (int64_t e = 0; e < b.experts; e++) {
                want[e] += mean ? w * part[e] * count[e] : w * part[e] / sum;
                hits[e] += w * count[e];
            }
        }
        for (int64_t e = 0; e < b.experts; e++) {
            if (mean)
                want[e] = hits[e] > 0.0 ? want[e] / hits[e] : 0.0;
            near(got[e], want[e], want[e], "texts", moec_merge_mass_names[k], e, e);
        }
    }
    bench_close(&b);
}

/* ---- distances ---------------------------------------------------------------------------------------------------------- */

static double cosine(const double *a, const double *b, int64_t n)
{
    double ab = 0.0;
    for (int64_t i = 0; i < n; i++)
        ab += a[i] * b[i];
    const double size = length(a, n) * length(b, n);
    return size > 0.0 ? ab / size : 0.0;
}

static double apart(const double *a, const double *b, int64_t n)
{
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++)
        sum += (a[i] - b[i]) * (a[i] - b[i]);
    return sqrt(sum);
}

static double *logit_column(const bench *b, int64_t e, bool centre, bool unit)
{
    double *z = calloc((size_t)b->n, sizeof *z);
    for (int64_t t = 0; t < b->n; t++) {
        double mean = 0.0;
        for (int64_t i = 0; centre && i < b->experts; i++)
            mean += (double)b->logits[t * b->all + i] / (double)b->experts;
        z[t] = (double)b->logits[t * b->all + e] - mean;
    }
    const double size = length(z, b->n);
    for (int64_t t = 0; unit && t < b->n; t++)
        z[t] /= size;
    return z;
}

/* Weights of the router, or gate and up of an expert. */
static double naive_weights(const bench *b, int64_t i, int64_t j, bool router)
{
    static float a[BENCH_HIDDEN * NAIVE_WIDTH], c[BENCH_HIDDEN * NAIVE_WIDTH];
    double sum = 0.0;
    const moec_weight *r = &b->l->mat[MOEC_MAT_ROUTER];
    for (int part = 0; part < (router ? 1 : 2); part++) {
        const moec_mlp *ei = &b->l->expert[i], *ej = &b->l->expert[j];
        const moec_weight *wi = part ? &ei->up : &ei->gate, *wj = part ? &ej->up : &ej->gate;
        moec_weight_read(a, b->hidden, router ? r : wi, router ? i : 0, router ? 1 : wi->rows, 0, b->hidden);
        moec_weight_read(c, b->hidden, router ? r : wj, router ? j : 0, router ? 1 : wj->rows, 0, b->hidden);
        for (int64_t k = 0; k < (router ? 1 : wi->rows) * b->hidden; k++)
            sum += pow((double)a[k] - (double)c[k], 2.0);
    }
    return sqrt(sum);
}

static void mean_output(double *mean, const bench *b, int64_t e, int64_t step, bool gated)
{
    int64_t n = 0;
    memset(mean, 0, BENCH_HIDDEN * sizeof *mean);
    for (int64_t t = 0; t < b->n; t += step, n++)
        for (int64_t c = 0; c < b->hidden; c++)
            mean[c] += (gated ? naive_score(b, t, e) : 1.0) * output(b, t, e)[c];
    for (int64_t c = 0; c < b->hidden; c++)
        mean[c] /= (double)n;
}

static double naive_outputs(const bench *b, int64_t i, int64_t j, int64_t step, bool angle)
{
    double sum = 0.0;
    int64_t n = 0;
    for (int64_t t = 0; t < b->n; t += step, n++) {
        const double d = apart(output(b, t, i), output(b, t, j), b->hidden);
        sum += angle ? 1.0 - cosine(output(b, t, i), output(b, t, j), b->hidden) : d * d;
    }
    return sum / (double)n;
}

static double naive_logits(const bench *b, int64_t i, int64_t j, bool centre, bool unit)
{
    double *a = logit_column(b, i, centre, unit), *c = logit_column(b, j, centre, unit);
    const double d = unit ? apart(a, c, b->n) : 0.5 * (1.0 - cosine(a, c, b->n));
    free(a);
    free(c);
    return d;
}

static double naive_distance(const bench *b, moec_merge_distance kind, int64_t i, int64_t j)
{
    const int64_t step = (b->n + MOEC_MERGE_TOKENS - 1) / MOEC_MERGE_TOKENS;
    double x[BENCH_HIDDEN], y[BENCH_HIDDEN], most = 0.0;
    if (i == j)
        return 0.0;
    switch (kind) {
    case MOEC_FAR_LOGITS:
    case MOEC_FAR_CENTRED: return naive_logits(b, i, j, kind == MOEC_FAR_CENTRED, false);
    case MOEC_FAR_OUTPUT_COSINE:
    case MOEC_FAR_OUTPUT: return naive_outputs(b, i, j, step, kind == MOEC_FAR_OUTPUT_COSINE);
    case MOEC_FAR_WEIGHTS:
    case MOEC_FAR_ROUTER_ROWS: return naive_weights(b, i, j, kind == MOEC_FAR_ROUTER_ROWS);
    case MOEC_FAR_MEAN_OUTPUT:
        mean_output(x, b, i, step, false);
        mean_output(y, b, j, step, false);
        return apart(x, y, b->hidden);
    case MOEC_FAR_GATED:
        for (int64_t e = 0; e < b->experts; e++)
            for (int64_t f = 0; f < e; f++)
                most = fmax(most, naive_logits(b, e, f, false, true));
        mean_output(x, b, i, step, true);
        mean_output(y, b, j, step, true);
        return 1.0 - 0.5 * (0.5 * (1.0 + cosine(x, y, b->hidden)) + 1.0 - naive_logits(b, i, j, false, true) / most);
    case MOEC_FAR_COUNT: break;
    }
    fail();
    return 0.0;
}

/* Inner products whose squared distances are those of d: k_ii + k_jj - 2 k_ij. */
static void check_kernel(const bench *b, const double *d, const double *kernel, moec_merge_distance kind, const char *family)
{
    const int64_t n = b->experts;
    double most = 0.0, sum = 0.0;
    for (int64_t i = 0; i < n * n; i++)
        most = fmax(most, fabs(kernel[i]));
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++) {
            const double v = d[i * n + j], got = kernel[i * n + i] + kernel[j * n + j] - 2.0 * kernel[i * n + j];
            assert_true(kernel[i * n + j] == kernel[j * n + i]);
            near(got, kind == MOEC_FAR_OUTPUT_COSINE ? 2.0 * v : kind == MOEC_FAR_OUTPUT ? v : v * v, most, family, "kernel", i, j);
            sum += kernel[i * n + j];
        }
    if (kind != MOEC_FAR_OUTPUT_COSINE)
        near(sum, 0.0, most, family, "kernel's sum", 0, 0);
}

static void pairs(void **state)
{
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(families) + 1; i++) {
        bench b;
        const char *family = families[i % MOEC_COUNT(families)]; /* the first once more, with more tokens than are run */
        bench_open(&b, family, 8, 2, i == MOEC_COUNT(families) ? MOEC_MERGE_TOKENS + 901 : 150);
        for (int k = 0; k < MOEC_FAR_COUNT; k++) {
            double d[BENCH_EXPERTS * BENCH_EXPERTS], kernel[BENCH_EXPERTS * BENCH_EXPERTS];
            bench_distances(d, kernel, &b, (moec_merge_distance)k);
            for (int64_t e = 0; e < b.experts; e++)
                for (int64_t f = 0; f <= e; f++) {
                    const double want = naive_distance(&b, (moec_merge_distance)k, e, f);
                    near(d[e * b.experts + f], want, want, family, moec_merge_distance_names[k], e, f);
                    assert_true(d[f * b.experts + e] == d[e * b.experts + f]);
                }
            check_kernel(&b, d, kernel, (moec_merge_distance)k, family);
        }
        bench_close(&b);
    }
}

/* Cosines of router logits z = R x follow from the second moments of x: Z^T Z = R (X^T X) R^T. */
static void logits_from_inputs(void **state)
{
    bench b;
    double moments[BENCH_HIDDEN][BENCH_HIDDEN] = {{0.0}}, rows[BENCH_EXPERTS][BENCH_HIDDEN];
    double d[BENCH_EXPERTS * BENCH_EXPERTS], kernel[BENCH_EXPERTS * BENCH_EXPERTS];
    float row[BENCH_HIDDEN];
    (void)state;
    bench_open(&b, "qwen3_moe", 8, 2, 700);
    for (int64_t e = 0; e < b.experts; e++) {
        moec_weight_read(row, b.hidden, &b.l->mat[MOEC_MAT_ROUTER], e, 1, 0, b.hidden);
        for (int64_t c = 0; c < b.hidden; c++)
            rows[e][c] = (double)row[c];
    }
    for (int64_t t = 0; t < b.n; t++) {
        const float *x = b.x + t * b.hidden;
        for (int64_t e = 0; e < b.experts; e++) {
            double z = 0.0;
            for (int64_t c = 0; c < b.hidden; c++)
                z += rows[e][c] * (double)x[c];
            b.logits[t * b.all + e] = (float)z;
        }
        for (int64_t i = 0; i < b.hidden; i++)
            for (int64_t j = 0; j < b.hidden; j++)
                moments[i][j] += (double)x[i] * (double)x[j];
    }
    for (int centred = 0; centred < 2; centred++) {
        double gram[BENCH_EXPERTS][BENCH_EXPERTS];
        for (int64_t c = 0; centred && c < b.hidden; c++) {
            double mean = 0.0;
            for (int64_t e = 0; e < b.experts; e++)
                mean += rows[e][c] / (double)b.experts;
            for (int64_t e = 0; e < b.experts; e++)
                rows[e][c] -= mean;
        }
        for (int64_t e = 0; e < b.experts; e++)
            for (int64_t f = 0; f < b.experts; f++) {
                gram[e][f] = 0.0;
                for (int64_t i = 0; i < b.hidden; i++)
                    for (int64_t j = 0; j < b.hidden; j++)
                        gram[e][f] += rows[e][i] * moments[i][j] * rows[f][j];
            }
        bench_distances(d, kernel, &b, centred ? MOEC_FAR_CENTRED : MOEC_FAR_LOGITS);
        for (int64_t e = 0; e < b.experts; e++)
            for (int64_t f = 0; f < b.experts; f++)
                near(d[e * b.experts + f], 0.5 * (1.0 - gram[e][f] / sqrt(gram[e][e] * gram[f][f])), 1.0, "qwen3_moe", "moments", e,
                     f);
    }
    bench_close(&b);
}

/* An expert that gives nothing has cosine 0 with all, itself included. */
static void silent(void **state)
{
    bench b;
    bench_twin c;
    double d[BENCH_EXPERTS * BENCH_EXPERTS], kernel[BENCH_EXPERTS * BENCH_EXPERTS], mass[BENCH_EXPERTS];
    (void)state;
    bench_open(&b, "mixtral", 4, 2, 50);
    bench_copy(&c, &b, 0, 2);
    memset(c.store + 2 * b.m->dims.expert_width * b.hidden, 0, (size_t)(b.m->dims.expert_width * b.hidden) * sizeof *c.store);
    bench_run(&b);
    bench_distances(d, kernel, &b, MOEC_FAR_OUTPUT_COSINE);
    for (int64_t e = 0; e < 4; e++)
        assert_true(d[2 * 4 + e] == (e == 2 ? 0.0 : 1.0) && kernel[2 * 4 + e] == 0.0);
    bench_distances(d, kernel, &b, MOEC_FAR_GATED);
    assert_true(d[2 * 4 + 1] >= 0.25 && d[2 * 4 + 2] == 0.0);
    bench_masses(mass, &b, MOEC_MASS_ENERGY);
    assert_true(mass[2] == 0.0 && mass[1] > 0.0);
    bench_copy_free(&c);
    bench_close(&b);
}

/* Outputs whose squares are too large or small for float32 are compared all the same. */
static void wide_range(void **state)
{
    static const double sizes[] = {1e25, 1e-25};
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(sizes); i++) {
        bench b;
        bench_twin c;
        double d[BENCH_EXPERTS * BENCH_EXPERTS], kernel[BENCH_EXPERTS * BENCH_EXPERTS], mass[BENCH_EXPERTS], want[BENCH_EXPERTS];
        bench_open(&b, "mixtral", 4, 2, 50);
        bench_copy(&c, &b, 0, 2);
        for (int64_t k = 2 * b.m->dims.expert_width * b.hidden; k < 3 * b.m->dims.expert_width * b.hidden; k++)
            c.store[k] *= (float)sizes[i];
        bench_run(&b);
        bench_distances(d, kernel, &b, MOEC_FAR_OUTPUT_COSINE);
        assert_true(d[2] < 1e-12 && d[1] > 0.1);
        bench_masses(mass, &b, MOEC_MASS_ENERGY);
        naive_mass(want, &b, MOEC_MASS_ENERGY);
        for (int64_t e = 0; e < 4; e++)
            near(mass[e], want[e], want[e], "mixtral", "energy", e, e);
        bench_copy_free(&c);
        bench_close(&b);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sums),
        cmocka_unit_test(texts), cmocka_unit_test(pairs), cmocka_unit_test(logits_from_inputs), cmocka_unit_test(silent),
        cmocka_unit_test(wide_range),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
