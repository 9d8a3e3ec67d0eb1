/* Scores from an expert's own weights, W all values of its gate, up and down matrices together, N of them:
 *
 *    weight-norm   |W|_2                              baseline
 *    aimer         rms(W) / mean|W|                   1 over the paper's score
 *
 * AIMER = mean|W| / rms(W) lies between 1/sqrt(N), one value that is not 0, and 1, all of one magnitude. The paper's abstract
 * names the ratio and does not say which end goes; by its section 3, as quoted by others, the experts of the LARGER ratio are
 * removed: weights spread evenly. So the score is its inverse, 1 and more; an expert that is all zeros does nothing and scores 0.
 * Weights are read as they are stored, sums are float64, each expert's by one thread in order. Cost: one read of the experts. */
#include "method/method.h"

#include "base/log.h"
#include "base/mem.h"
#include "base/par.h"

#include <math.h>

enum { ROWS = 96, LANES = 8 }; /* read at once: what transposed views like best; sums side by side, so that none waits */

typedef double score_fn(double abs, double sq, double n);

static double score_norm(double abs, double sq, double n)
{
    (void)abs, (void)n;
    return sqrt(sq);
}

static double score_aimer(double abs, double sq, double n)
{
    return abs > 0.0 ? sqrt(sq / n) / (abs / n) : abs; /* a NaN comes through */
}

typedef struct scan {
    const moec_model *m;
    score_fn *score;
    double *out;
    moec_progress progress;
} scan;

/* Adds |W|_1 and |W|_2^2. */
static void add_weight(double *abs, double *sq, float *buf, const moec_weight *w)
{
    double a[LANES] = {0.0}, b[LANES] = {0.0};
    for (int64_t r = 0; r < w->rows; r += ROWS) {
        const int64_t rows = w->rows - r < ROWS ? w->rows - r : ROWS, n = rows * w->cols;
        moec_weight_read(buf, w->cols, w, r, rows, 0, w->cols);
        for (int64_t i = n / LANES * LANES; i < n; i++) {
            a[0] += fabs((double)buf[i]);
            b[0] += (double)buf[i] * (double)buf[i];
        }
        for (int64_t i = 0; i + LANES <= n; i += LANES)
            for (int64_t k = 0; k < LANES; k++) {
                const double v = (double)buf[i + k];
                a[k] += fabs(v);
                b[k] += v * v;
            }
    }
    for (int k = 0; k < LANES; k++) {
        *abs += a[k];
        *sq += b[k];
    }
}

static moec_status scan_experts(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    scan *s = ctx;
    moec_status st = MOEC_OK;
    const moec_model *m = s->m;
    const int64_t n = m->dims.experts;
    float *buf = NULL;
    (void)worker;
    for (int64_t i = lo; i < hi; i++) {
        const moec_mlp *x = &m->layer[m->set[i / n].layer].expert[i % n];
        const moec_weight *const part[] = {&x->gate, &x->up, &x->down};
        int64_t widest = 0;
        double abs = 0.0, sq = 0.0, count = 0.0;
        MOEC_TRY(moec_interrupted(err));
        for (size_t k = 0; k < MOEC_COUNT(part); k++)
            widest = part[k]->cols > widest ? part[k]->cols : widest;
        moec_free(buf);
        MOEC_TRY(MOEC_NEW(buf, ROWS * (size_t)widest, err));
        for (size_t k = 0; k < MOEC_COUNT(part); k++) {
            add_weight(&abs, &sq, buf, part[k]);
            count += (double)(part[k]->rows * part[k]->cols);
        }
        for (size_t k = 0; k < MOEC_COUNT(part); k++)
            moec_weight_drop(part[k]);
        s->out[i] = s->score(abs, sq, count);
        moec_progress_step(&s->progress, 1);
    }
done:
    moec_free(buf);
    return st;
}

typedef struct weight_row {
    score_fn *score;
} weight_row;

static moec_status plan_weights(moec_plan **out, const moec_method *me, const moec_request *q, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t cells = q->model->moe_layers * q->model->dims.experts;
    scan s = {.m = q->model, .score = ((const weight_row *)me->row)->score};
    *out = NULL;
    MOEC_TRY(MOEC_NEW(s.out, (size_t)cells, err));
    moec_progress_start(&s.progress, "reading weights", "experts", (uint64_t)cells, 0);
    MOEC_TRY(moec_par_for(cells, 1, scan_experts, &s, err));
    moec_progress_finish(&s.progress);
    MOEC_TRY(moec_select(out, me, q, s.out, err));
done:
    moec_progress_stop(&s.progress);
    moec_free(s.out);
    return st;
}

static const weight_row by_norm = {score_norm}, by_aimer = {score_aimer};

extern const moec_method moec_method_weight_norm, moec_method_aimer;
const moec_method moec_method_weight_norm = {
    .name = "weight-norm",
    .kind = MOEC_PRUNE,
    .brief = "Frobenius norm of the expert's three matrices together; needs no statistics",
    .paper = "baseline",
    .formula = "sqrt(|gate|^2 + |up|^2 + |down|^2)",
    .row = &by_norm,
    .plan = plan_weights,
};
const moec_method moec_method_aimer = {
    .name = "aimer",
    .brief = "how concentrated the expert's weights are; those spread most evenly are removed; needs no statistics",
    .kind = MOEC_PRUNE,
    .paper = "AIMER: Calibration-Free Task-Agnostic MoE Pruning",
    .arxiv = "2603.18492",
    .formula = "rms(W) / mean|W|, 1 over the paper's score, of which the largest are removed",
    .row = &by_aimer,
    .plan = plan_weights,
};
