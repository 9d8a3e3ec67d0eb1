/* What one expert's output loses at each width, on the tokens that select it. */
#include "base/log.h"
#include "base/mem.h"
#include "num/product.h"
#include "num/vec.h"
#include "run/measure_parts.h"

#include <math.h>
#include <string.h>

enum { B = MOEC_QUANT_WIDTHS, BLOCK = MOEC_MEASURE_BLOCK, PARTS = MOEC_MEASURE_PARTS };
enum { GATE, UP, DOWN, ALL };

/* What a thread needs for one. Codes of all widths are kept, so that what does not depend on the width is computed once. */
typedef struct bench {
    moec_qcodes code[B][3];
    float *w[3], *q[3];       /* as it is, what it becomes at the width at hand less that */
    float *x, *lost;          /* [BLOCK,H] input, what is lost of the output */
    float *gate, *up, *act;   /* [BLOCK,I] of the matrices as they are */
    float *qgate, *qup, *mix; /* [BLOCK,I] */
    float *bias;              /* [2,I] */
    double fro[B];            /* of the expert's tokens in window `window` */
    int64_t window;           /* -1: none */
} bench;

static void bench_release(bench *b)
{
    float *all[] = {b->w[0], b->w[1], b->w[2], b->q[0], b->q[1], b->q[2], b->x, b->lost,
                    b->gate, b->up, b->act, b->qgate, b->qup, b->mix, b->bias};
    for (size_t i = 0; i < MOEC_COUNT(all); i++)
        moec_free(all[i]);
    for (int i = 0; i < B; i++)
        for (int k = 0; k < 3; k++)
            moec_qcodes_release(&b->code[i][k]);
}

static moec_status bench_new(bench *b, const moec_measuring *u, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t H = u->m->dims.hidden, I = u->m->dims.expert_width;
    *b = (bench){.window = -1};
    for (int k = 0; k < 3; k++) {
        MOEC_TRY(MOEC_NEW(b->w[k], (size_t)(H * I), err));
        MOEC_TRY(MOEC_NEW(b->q[k], (size_t)(H * I), err));
        for (int i = 0; i < B; i++) {
            const moec_qgrid g = moec__measure_grid(u, k, moec__measure_width[i]);
            MOEC_TRY(moec_qcodes_new(&b->code[i][k], &g, k == DOWN ? H : I, k == DOWN ? I : H, err));
        }
    }
    float **const by_hidden[] = {&b->x, &b->lost};
    float **const by_width[] = {&b->gate, &b->up, &b->act, &b->qgate, &b->qup, &b->mix};
    for (size_t i = 0; i < MOEC_COUNT(by_hidden); i++)
        MOEC_TRY(MOEC_NEW(*by_hidden[i], (size_t)(BLOCK * H), err));
    for (size_t i = 0; i < MOEC_COUNT(by_width); i++)
        MOEC_TRY(MOEC_NEW(*by_width[i], (size_t)(BLOCK * I), err));
    MOEC_TRY(MOEC_NEW(b->bias, (size_t)(2 * I), err));
done:
    if (st != MOEC_OK)
        bench_release(b);
    return st;
}

size_t moec__measure_bytes(const moec_measuring *u)
{
    const size_t H = (size_t)u->m->dims.hidden, I = (size_t)u->m->dims.expert_width;
    size_t codes = 0;
    for (int k = 0; k < 3; k++)
        codes += B * (H * I + H * I / (size_t)moec__measure_grid(u, k, 2).group * sizeof(float));
    return codes + (6 * H * I + BLOCK * (2 * H + 6 * I) + 2 * I) * sizeof(float);
}

static moec_status load(const moec_measuring *u, bench *b, int64_t e, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_mlp *x = &u->l->expert[e];
    const moec_weight *const w[] = {&x->gate, &x->up, &x->down};
    for (int k = 0; k < 3; k++) {
        MOEC_TRY(moec_weight_read_all(b->w[k], w[k], err));
        moec_weight_drop(w[k]);
        for (int i = 0; i < B; i++)
            MOEC_TRY(moec__measure_quantize(&b->code[i][k], b->w[k], err));
    }
    if (u->l->gate_up_bias)
        moec_expert_bias(b->bias, b->bias + u->m->dims.expert_width, u->m, u->l, e);
done:
    return st;
}

/* out [tokens,rows] = or += in W^T. */
static void product(const moec_measuring *u, float *out, const float *in, const float *w, int64_t tokens, int64_t rows, int64_t cols,
                    bool add)
{
    moec_product(u->o->compute, false, true, tokens, rows, cols, in, cols, w, cols, add, out, rows);
}

static void add_bias(const moec_measuring *u, float *out, const float *bias, int64_t tokens)
{
    const int64_t I = u->m->dims.expert_width;
    for (int64_t t = 0; u->l->gate_up_bias && t < tokens; t++)
        moec_add(out + t * I, bias, I);
}

/* out = act(gate) up. */
static void activate(const moec_measuring *u, float *out, const float *gate, const float *up, int64_t tokens)
{
    const int64_t n = tokens * u->m->dims.expert_width;
    memcpy(out, gate, (size_t)n * sizeof *out);
    moec_activate(out, up, n, u->m);
}

static void end_window(const moec_measuring *u, bench *b, int64_t e)
{
    if (b->window < 0)
        return;
    double *fro = u->fro + (u->domain[b->window] * u->m->dims.experts + e) * B;
    for (int i = 0; i < B; i++) {
        fro[i] += sqrt(b->fro[i]);
        b->fro[i] = 0.0;
    }
}

/* Squares of what tokens [at, at + tokens) of the selections lose; lost[i] of all three at width i is kept for the windows. */
static void add_up(const moec_measuring *u, bench *b, int64_t e, int part, int width, int64_t at, int64_t tokens, double *all)
{
    const int64_t H = u->m->dims.hidden, E = u->m->dims.experts;
    const bool on_input = u->m->family->weight_on_input;
    for (int64_t t = 0; t < tokens; t++) {
        const int32_t token = u->token[at + t];
        const double g = on_input ? 1.0 : (double)u->gate[at + t], v = g * g * moec_sum_sq(b->lost + t * H, H);
        u->sq[((u->domain[u->window[token]] * E + e) * PARTS + part) * B + width] += v * (double)u->weight[token];
        if (all)
            all[t] = v;
    }
}

/* The widths' errors of these tokens belong to windows, one after the other. */
static void add_windows(const moec_measuring *u, bench *b, int64_t e, int64_t at, int64_t tokens, double all[B][BLOCK])
{
    for (int64_t t = 0; t < tokens; t++) {
        const int64_t window = u->window[u->token[at + t]];
        if (window != b->window) {
            end_window(u, b, e);
            b->window = window;
        }
        for (int i = 0; i < B; i++)
            b->fro[i] += all[i][t];
    }
}

static void gather(const moec_measuring *u, bench *b, int64_t at, int64_t tokens)
{
    const int64_t H = u->m->dims.hidden;
    const float scale = (float)u->m->dims.input_scale;
    for (int64_t t = 0; t < tokens; t++) {
        const float by = u->m->family->weight_on_input ? scale * u->gate[at + t] : scale, *x = u->x + u->token[at + t] * H;
        for (int64_t i = 0; i < H; i++)
            b->x[t * H + i] = x[i] * by;
    }
}

static void take_off(float *from, const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        from[i] -= x[i];
}

/* q = W' - W: products of differences are exact enough in either mode, differences of products are not. */
static void find_changes(bench *b, int width)
{
    for (int k = 0; k < 3; k++) {
        const moec_qcodes *c = &b->code[width][k];
        moec_quant_restore(b->q[k], c, 0, c->rows);
        take_off(b->q[k], b->w[k], c->rows * c->cols);
    }
}

/* out [tokens,I] = as it is with q in place of W added. */
static void change(const moec_measuring *u, bench *b, float *out, const float *as_it_is, int k, int64_t tokens)
{
    const int64_t H = u->m->dims.hidden, I = u->m->dims.expert_width;
    memcpy(out, as_it_is, (size_t)(tokens * I) * sizeof *out);
    product(u, out, b->x, b->q[k], tokens, I, H, true);
}

/* lost = or += W_down (mix - act). */
static void lose_inside(const moec_measuring *u, bench *b, int64_t tokens, bool add)
{
    const int64_t H = u->m->dims.hidden, I = u->m->dims.expert_width;
    take_off(b->mix, b->act, tokens * I);
    product(u, b->lost, b->mix, b->w[DOWN], tokens, H, I, add);
}

/* (W'_down - W_down) act; biases of down fall out. */
static void lose_down(const moec_measuring *u, bench *b, const float *act, int64_t tokens)
{
    product(u, b->lost, act, b->q[DOWN], tokens, u->m->dims.hidden, u->m->dims.expert_width, false);
}

/* BLOCK tokens at most. */
static void add_block(const moec_measuring *u, bench *b, int64_t e, int64_t at, int64_t tokens)
{
    const int64_t H = u->m->dims.hidden, I = u->m->dims.expert_width;
    double all[B][BLOCK];
    gather(u, b, at, tokens);
    product(u, b->gate, b->x, b->w[GATE], tokens, I, H, false);
    product(u, b->up, b->x, b->w[UP], tokens, I, H, false);
    add_bias(u, b->gate, b->bias, tokens);
    add_bias(u, b->up, b->bias + I, tokens);
    activate(u, b->act, b->gate, b->up, tokens);
    for (int i = 0; i < B; i++) {
        find_changes(b, i);
        change(u, b, b->qgate, b->gate, GATE, tokens);
        change(u, b, b->qup, b->up, UP, tokens);
        activate(u, b->mix, b->qgate, b->up, tokens);
        lose_inside(u, b, tokens, false);
        add_up(u, b, e, GATE, i, at, tokens, NULL);
        activate(u, b->mix, b->gate, b->qup, tokens);
        lose_inside(u, b, tokens, false);
        add_up(u, b, e, UP, i, at, tokens, NULL);
        lose_down(u, b, b->act, tokens);
        add_up(u, b, e, DOWN, i, at, tokens, NULL);
        activate(u, b->mix, b->qgate, b->qup, tokens);
        lose_down(u, b, b->mix, tokens);
        lose_inside(u, b, tokens, true);
        add_up(u, b, e, ALL, i, at, tokens, all[i]);
    }
    add_windows(u, b, e, at, tokens, all);
}

static moec_status check(const moec_measuring *u, int64_t e, moec_err *err)
{
    const int64_t E = u->m->dims.experts;
    for (int d = 0; d < u->corpus->n_domains; d++)
        for (int64_t i = 0; i < PARTS * B; i++)
            if (!isfinite(u->sq[(d * E + e) * PARTS * B + i]))
                return moec_fail(err, MOEC_ENUMERIC, "an error of the quantized expert is not finite");
    return MOEC_OK;
}

moec_status moec__measure_experts(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const moec_measuring *u = ctx;
    moec_measuring *shared = ctx;
    bench b;
    moec_status st = bench_new(&b, u, err);
    int64_t e = lo;
    (void)worker;
    if (st != MOEC_OK)
        return st;
    for (; e < hi; e++) {
        MOEC_TRY(moec_interrupted(err));
        if (u->first[e] < u->first[e + 1])
            MOEC_TRY(load(u, &b, e, err));
        b.window = -1;
        for (int64_t at = u->first[e]; at < u->first[e + 1]; at += BLOCK)
            add_block(u, &b, e, at, u->first[e + 1] - at < BLOCK ? u->first[e + 1] - at : BLOCK);
        end_window(u, &b, e);
        MOEC_TRY(check(u, e, err));
        moec_progress_step(&shared->progress, 1);
    }
done:
    bench_release(&b);
    return st == MOEC_OK ? st : moec_within(err, st, "layer %lld: expert %lld", (long long)u->l->index, (long long)e);
}
