/* See moec_repair_router. Rows of tokens carry the root of their weight, so that sums over tokens are plain products. */
#include "method/repair_parts.h"

#include "base/mem.h"
#include "base/par.h"
#include "num/linalg.h"

#include <math.h>
#include <string.h>

enum {
    TILE = 192,         /* of the Gram matrix and of the right-hand sides */
    DEPTH = 1024,       /* tokens that are summed in float32 */
    TOKENS = 64,        /* that one thread takes at a time */
    SOLVED = 16,        /* rows of the router, likewise */
    GROWTHS = 30,       /* of mu by 10, until the matrix can be factorised */
    AHEAD = 1 << 24,    /* values of experts' outputs that are kept at once */
    LEAST = 64          /* tokens that they are of, at least */
};
static const float FARTHEST = 3.0f; /* that a token may want a logit to move */

typedef struct router_fit {
    moec_repair_task *t;
    const moec_router_opts *o;
    int64_t hidden, keep;
    moec_fit *route;          /* of repair_step.c: chooses by rows */
    float *rows;              /* [K,H] its rows */
    float *change;            /* [n_fit,K] that the logits want to move by */
    float *xs, *cs;           /* [DEPTH,H] [DEPTH,K] a block of tokens */
    double *gram, *diagonal;  /* [H,H] [H] */
    double *right;            /* [K,H] right-hand sides, then what the rows move by */
    float *values, *biases;   /* of one expert */
    moec_tokens k;
    moec_room room, piece_room;
} router_fit;

static bool shifts(const moec_model *m)
{
    return m->family->score == MOEC_SCORE_SOFTMAX; /* a number added to all logits of a token changes nothing */
}

/* --- what groups want -------------------------------------------------------------------------------------------------------- */

typedef struct grouping {
    float *out;
    const moec_router_groups *g;
    const float *z;
    int64_t ld, keep;
    bool soft;
} grouping;

static double share_of(const moec_router_groups *g, int64_t i)
{
    return g->share ? g->share[i] : 1.0;
}

/* log sum s exp z */
static double sum_logit(const moec_router_groups *g, const float *z, int64_t lo, int64_t hi)
{
    double top = (double)-INFINITY, sum = 0.0;
    for (int64_t i = lo; i < hi; i++)
        top = fmax(top, (double)z[g->member[i]]);
    for (int64_t i = lo; i < hi && top > (double)-INFINITY; i++)
        sum += share_of(g, i) * exp((double)z[g->member[i]] - top);
    return top + log(sum);
}

/* Where s = 1, max z as it is: the sigmoid's inverse would lose it where the score is 1 in float64. */
static double best_logit(const moec_router_groups *g, const float *z, int64_t lo, int64_t hi)
{
    double best = (double)-INFINITY;
    for (int64_t i = lo; i < hi; i++) {
        const double v = (double)z[g->member[i]], s = share_of(g, i) / (1.0 + exp(-v));
        best = fmax(best, share_of(g, i) == 1.0 ? v : log(s) - log1p(-s));
    }
    return best;
}

static moec_status group_tokens(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const grouping *a = ctx;
    (void)worker;
    (void)err;
    for (int64_t t = lo; t < hi; t++)
        for (int64_t k = 0; k < a->keep; k++)
            a->out[t * a->keep + k] = (float)(a->soft ? sum_logit : best_logit)(a->g, a->z + t * a->ld, a->g->first[k],
                                                                               a->g->first[k + 1]);
    return MOEC_OK;
}

moec_status moec_router_group(float *out, const moec_router_groups *g, int64_t n_keep, const float *z, int64_t ld, int64_t n,
                              const moec_model *m, moec_err *err)
{
    grouping a = {out, g, z, ld, n_keep, m->family->score == MOEC_SCORE_SOFTMAX};
    if (!a.soft && m->family->score != MOEC_SCORE_SIGMOID)
        return moec_fail(err, MOEC_EINVAL, "router: experts' scores are neither softmax nor sigmoid, a group has none");
    for (int64_t k = 0; k < n_keep; k++)
        for (int64_t i = g->first[k]; i <= g->first[k + 1]; i++)
            if (g->first[k] >= g->first[k + 1] || (i < g->first[k + 1] && !(share_of(g, i) > 0.0 && share_of(g, i) <= 1.0)))
                return moec_fail(err, MOEC_EINVAL, "router: group %lld has no members, or a share that is not above 0 and at "
                                 "most 1", (long long)k);
    return moec_par_for(n, TOKENS, group_tokens, &a, err);
}

/* --- what tokens want -------------------------------------------------------------------------------------------------------- */

/* change = what is wanted - what the rows give. */
typedef struct difference {
    const router_fit *a;
    const float *want;
} difference;

static moec_status differ(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const difference *d = ctx;
    const router_fit *a = d->a;
    const moec_repair_task *t = a->t;
    const int64_t K = a->keep, H = a->hidden;
    float *out = a->change + lo * K;
    (void)worker;
    (void)err;
    memcpy(out, d->want + lo * K, (size_t)((hi - lo) * K) * sizeof *out);
    moec_sgemm(false, true, hi - lo, K, H, -1.0f, t->x + lo * H, H, a->rows, H, 1.0f, out, K);
    for (int64_t i = 0; t->router_bias && i < hi - lo; i++)
        moec_saxpy(out + i * K, -1.0f, t->router_bias, K);
    for (int64_t i = 0; shifts(t->model) && i < hi - lo; i++) {
        double sum = 0.0;
        for (int64_t k = 0; k < K; k++)
            sum += (double)out[i * K + k];
        for (int64_t k = 0; k < K; k++)
            out[i * K + k] -= (float)(sum / (double)K);
    }
    return MOEC_OK;
}

/* Tokens [first, first + n) and what their experts give: [slots,n,H] times the weights. */
typedef struct ahead {
    const router_fit *a;
    moec_repair_task part; /* the task of these tokens alone */
    int64_t first;
    float *given;
    double *small;         /* [threads][slots * (slots + 1)] */
    const int32_t *row_of; /* [E] row of an expert in the router */
} ahead;

static void list_slot(moec_tokens *k, const moec_repair_task *t, int32_t expert, int64_t slot)
{
    k->n = 0;
    for (int64_t i = 0; i < t->n; i++)
        if (t->ids[i * t->slots + slot] == expert) {
            k->token[k->n] = (int32_t)i;
            k->gate[k->n++] = t->gates[i * t->slots + slot];
        }
    k->n_fit = k->n;
}

static moec_status look(const ahead *h, moec_err *err)
{
    moec_status st = MOEC_OK;
    router_fit a = *h->a;
    const moec_repair_task *t = &h->part;
    memset(h->given, 0, (size_t)(t->slots * t->n * a.hidden) * sizeof *h->given);
    for (int64_t e = 0; e < t->n_keep; e++) {
        moec_piece p = {.expert = t->keep[e], .width = t->model->dims.expert_width};
        bool there = false;
        MOEC_TRY(moec_interrupted(err));
        for (int64_t j = 0; j < t->slots; j++) {
            list_slot(&a.k, t, p.expert, j);
            if (a.k.n == 0)
                continue;
            if (!there)
                MOEC_TRY(moec__piece_read(&p, t, a.values, a.biases, err));
            there = true;
            MOEC_TRY(moec__piece_add(h->given + j * t->n * a.hidden, 1.0f, t, &p, &a.k, &a.piece_room, err));
        }
    }
done:
    return st;
}

/* s of token i and the expert in a slot; 1 where it does not matter. */
static float one_less_score(const ahead *h, int64_t i, int64_t slot)
{
    const moec_repair_task *t = &h->part;
    const int64_t H = h->a->hidden, k = h->row_of[t->ids[i * t->slots + slot]];
    if (t->model->family->score != MOEC_SCORE_SIGMOID)
        return 1.0f;
    const float z = moec_sdot(h->a->rows + k * H, t->x + i * H, H) + (t->router_bias ? t->router_bias[k] : 0.0f);
    return 1.0f / (1.0f + expf(z));
}

/* given of token i becomes dr/dz. *size: |y|^2. Returns how many slots are taken, in `slot`. */
static int64_t derive(double *size, int32_t *slot, const ahead *h, int64_t i, float *r)
{
    const moec_repair_task *t = &h->part;
    const int64_t H = h->a->hidden;
    const float by = (float)t->model->dims.route_scale;
    const bool shared = t->model->family->score == MOEC_SCORE_SOFTMAX || t->model->dims.renorm ||
                        t->model->family->choice == MOEC_CHOOSE_TOP_K_SOFTMAX;
    int64_t n = 0;
    memset(r, 0, (size_t)H * sizeof *r);
    for (int64_t j = 0; j < t->slots; j++)
        if (t->ids[i * t->slots + j] >= 0) {
            slot[n++] = (int32_t)j;
            moec_add(r, h->given + (j * t->n + i) * H, H);
        }
    for (int64_t a = 0; a < n; a++) {
        float *g = h->given + (slot[a] * t->n + i) * H;
        const float s = one_less_score(h, i, slot[a]);
        if (shared)
            moec_saxpy(g, -t->gates[i * t->slots + slot[a]] / by, r, H);
        for (int64_t j = 0; s != 1.0f && j < H; j++)
            g[j] *= s;
    }
    moec_add(r, t->rest + i * H, H);
    *size = moec_sum_sq(r, H);
    return n;
}

static moec_status wish(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const ahead *h = ctx;
    const moec_repair_task *t = &h->part;
    const int64_t H = h->a->hidden, slots = t->slots;
    float *r = moec__room_of(&h->a->room, worker);
    int32_t *slot = (int32_t *)(void *)(r + H); /* as wide as a float */
    double *m = h->small + worker * slots * (slots + 1), *b = m + slots * slots, size;
    (void)err;
    for (int64_t i = lo; i < hi; i++) {
        const int64_t n = derive(&size, slot, h, i, r);
        for (int64_t a = 0; a < n; a++) {
            const float *ja = h->given + (slot[a] * t->n + i) * H;
            for (int64_t c = 0; c <= a; c++)
                m[a * n + c] = (double)moec_sdot(ja, h->given + (slot[c] * t->n + i) * H, H);
            m[a * n + a] += h->a->o->reach * size;
            b[a] = (double)moec_sdot(ja, t->rest + i * H, H);
        }
        if (n == 0 || !moec_cholesky(m, n))
            continue;
        moec_cholesky_solve(b, m, n, 1);
        for (int64_t a = 0; a < n; a++)
            h->a->change[(h->first + i) * h->a->keep + h->row_of[t->ids[i * slots + slot[a]]]] =
                fmaxf(-FARTHEST, fminf(FARTHEST, (float)b[a]));
    }
    return MOEC_OK;
}

static int64_t ahead_tokens(int64_t hidden, int64_t slots, int64_t n)
{
    const int64_t fit = AHEAD / (hidden * slots), most = fit > LEAST ? fit : LEAST;
    return most < n ? most : n;
}

static moec_status wishes(router_fit *a, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_repair_task *t = a->t;
    const int64_t H = a->hidden, each = ahead_tokens(H, t->slots, t->n_fit);
    int32_t *row_of = NULL;
    ahead h = {.a = a, .part = *t};
    MOEC_TRY(MOEC_NEW(row_of, (size_t)t->model->dims.experts, err));
    for (int64_t k = 0; k < t->n_keep; k++)
        row_of[t->keep[k]] = (int32_t)k;
    h.row_of = row_of;
    MOEC_TRY(MOEC_NEW(h.given, (size_t)(t->slots * H) * (size_t)each, err));
    MOEC_TRY(MOEC_NEW(h.small, (size_t)moec_par_threads() * (size_t)t->slots * (size_t)(t->slots + 1), err));
    for (int64_t at = 0; at < t->n_fit; at += each) {
        h.first = at;
        h.part.n = h.part.n_fit = t->n_fit - at < each ? t->n_fit - at : each;
        h.part.x = t->x + at * H;
        h.part.rest = t->rest + at * H;
        h.part.ids = t->ids + at * t->slots;
        h.part.gates = t->gates + at * t->slots;
        MOEC_TRY(look(&h, err));
        MOEC_TRY(moec_par_for(h.part.n, TOKENS, wish, &h, err));
    }
done:
    moec_free(h.given);
    moec_free(h.small);
    moec_free(row_of);
    return st;
}

/* --- the rows ------------------------------------------------------------------------------------------------------------------ */

/* Tokens of one block, with the root of their weight. */
typedef struct block {
    const router_fit *a;
    int64_t at, n;
} block;

static moec_status weigh(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const block *b = ctx;
    const router_fit *a = b->a;
    (void)worker;
    (void)err;
    for (int64_t i = lo; i < hi; i++) {
        const int64_t token = b->at + i;
        const float root = sqrtf(a->t->weight[token]), *x = a->t->x + token * a->hidden, *c = a->change + token * a->keep;
        for (int64_t j = 0; j < a->hidden; j++)
            a->xs[i * a->hidden + j] = root * x[j];
        for (int64_t j = 0; j < a->keep; j++)
            a->cs[i * a->keep + j] = root * c[j];
    }
    return MOEC_OK;
}

static int64_t tiles(int64_t n)
{
    return (n + TILE - 1) / TILE;
}

static int64_t edge(int64_t at, int64_t n)
{
    return n - at < TILE ? n - at : TILE;
}

/* Tiles of the Gram matrix on and above its diagonal, behind them those of the right-hand sides, of one block. */
static moec_status sum_tiles(void *ctx, int worker, int64_t from, int64_t to, moec_err *err)
{
    const block *b = ctx;
    const router_fit *a = b->a;
    const int64_t H = a->hidden, wide = tiles(H);
    float *part = moec__room_of(&a->room, worker);
    for (int64_t k = from; k < to; k++) {
        const bool right = k >= wide * wide;
        const int64_t i = (right ? k / wide - wide : k / wide) * TILE, j = k % wide * TILE;
        const int64_t left = right ? a->keep : H, rows = edge(i, left), cols = edge(j, H);
        double *out = (right ? a->right : a->gram) + i * H + j;
        if (!right && i > j)
            continue;
        moec_sgemm(true, false, rows, cols, b->n, 1.0f, (right ? a->cs : a->xs) + i, left, a->xs + j, H, 0.0f, part, cols);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < cols; c++)
                out[r * H + c] += (double)part[r * cols + c];
    }
    return moec_interrupted(err);
}

static moec_status mirror(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const router_fit *a = ctx;
    (void)worker;
    (void)err;
    for (int64_t i = lo; i < hi; i++)
        for (int64_t j = 0; j < i; j++)
            a->gram[i * a->hidden + j] = a->gram[j * a->hidden + i];
    return MOEC_OK;
}

/* The factor goes below the diagonal, the sums above it stay. *ok false: no mu helped, since they are not finite or 0. */
static moec_status factorise(bool *ok, router_fit *a, moec_err *err)
{
    const int64_t H = a->hidden;
    moec_status st = MOEC_OK;
    double mu = 0.0;
    for (int64_t j = 0; j < H; j++)
        mu += a->diagonal[j] = a->gram[j * H + j];
    mu *= (a->o->lambda > 0.0 ? a->o->lambda : 1e-12) / (double)H;
    *ok = false;
    for (int i = 0; i < GROWTHS && mu > 0.0 && st == MOEC_OK && !*ok; i++, mu *= 10.0) {
        st = moec_par_for(H, TILE, mirror, a, err);
        for (int64_t j = 0; j < H; j++)
            a->gram[j * H + j] = a->diagonal[j] + mu;
        *ok = st == MOEC_OK && moec_cholesky(a->gram, H);
    }
    return st;
}

static moec_status solve_rows(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const router_fit *a = ctx;
    float *row = a->rows + lo * a->hidden;
    double *move = a->right + lo * a->hidden;
    (void)worker;
    (void)err;
    moec_cholesky_solve(move, a->gram, a->hidden, hi - lo);
    for (int64_t i = 0; i < (hi - lo) * a->hidden; i++)
        row[i] = (float)((double)row[i] + move[i]);
    return MOEC_OK;
}

/* rows become the new ones. */
static moec_status solve(bool *ok, router_fit *a, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t wide = tiles(a->hidden);
    for (int64_t at = 0; at < a->t->n_fit; at += DEPTH) {
        block b = {a, at, a->t->n_fit - at < DEPTH ? a->t->n_fit - at : DEPTH};
        MOEC_TRY(moec_par_for(b.n, TOKENS, weigh, &b, err));
        MOEC_TRY(moec_par_for(wide * (wide + tiles(a->keep)), 1, sum_tiles, &b, err));
    }
    MOEC_TRY(factorise(ok, a, err));
    if (*ok)
        MOEC_TRY(moec_par_for(a->keep, SOLVED, solve_rows, a, err));
done:
    return st;
}

/* --- whether they are taken ------------------------------------------------------------------------------------------------------ */

/* Tokens [lo, hi) by other selections: rest [hi - lo, H] of them follows. */
static moec_status reroute(float *rest, router_fit *a, int64_t lo, int64_t hi, const int32_t *ids, const float *gates, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_repair_task *t = a->t;
    moec_repair_task part = *t;
    part.x = t->x + lo * a->hidden;
    part.n = hi - lo;
    part.n_fit = 0;
    for (int64_t k = 0; k < t->n_keep && hi > lo; k++) {
        moec_piece p = {.expert = t->keep[k], .width = t->model->dims.expert_width};
        MOEC_TRY(moec_interrupted(err));
        MOEC_TRY(moec__piece_read(&p, t, a->values, a->biases, err));
        moec__picked_of(&a->k, &part, t->ids + lo * t->slots, t->gates + lo * t->slots, p.expert);
        MOEC_TRY(moec__piece_add(rest, 1.0f, &part, &p, &a->k, &a->piece_room, err));
        moec__picked_of(&a->k, &part, ids + lo * t->slots, gates + lo * t->slots, p.expert);
        MOEC_TRY(moec__piece_add(rest, -1.0f, &part, &p, &a->k, &a->piece_room, err));
    }
done:
    return st;
}

static double weighted(const router_fit *a, const float *rest, int64_t lo, int64_t hi)
{
    double sum = 0.0;
    for (int64_t i = lo; i < hi; i++)
        sum += (double)a->t->weight[i] * moec_sum_sq(rest + (i - lo) * a->hidden, a->hidden);
    return sum;
}

static moec_status judge(bool *taken, router_fit *a, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_repair_task *t = a->t;
    const int64_t H = a->hidden, lo = t->n > t->n_fit ? t->n_fit : 0;
    const size_t cells = (size_t)(t->n * t->slots), seen = (size_t)((t->n - lo) * H);
    int32_t *ids = NULL;
    float *gates = NULL, *rest = NULL;
    MOEC_TRY(MOEC_NEW(ids, cells, err));
    MOEC_TRY(MOEC_NEW(gates, cells, err));
    MOEC_TRY(MOEC_NEW(rest, seen, err));
    memcpy(rest, t->rest + lo * H, seen * sizeof *rest);
    MOEC_TRY(moec__fit_route(ids, gates, a->route, err));
    MOEC_TRY(reroute(rest, a, lo, t->n, ids, gates, err));
    if (!(weighted(a, rest, lo, t->n) < weighted(a, t->rest + lo * H, lo, t->n)))
        goto done;
    MOEC_TRY(reroute(t->rest, a, 0, lo, ids, gates, err));
    MOEC_TRY(moec_weight_write(&t->router, a->rows, H, 0, a->keep, 0, H, err));
    memcpy(t->rest + lo * H, rest, seen * sizeof *rest);
    memcpy(t->ids, ids, cells * sizeof *ids);
    memcpy(t->gates, gates, cells * sizeof *gates);
    *taken = true;
done:
    moec_free(ids);
    moec_free(gates);
    moec_free(rest);
    return st;
}

/* --- all of it -------------------------------------------------------------------------------------------------------------------- */

bool moec_repair_can_route(const moec_repair_task *t)
{
    return moec__fit_can_route(t) && t->router.cols == t->model->dims.hidden;
}

static int64_t room_floats(const moec_dims *d, int64_t slots)
{
    const int64_t wish_floats = d->hidden + slots, tile = TILE * TILE;
    return wish_floats > tile ? wish_floats : tile;
}

size_t moec_repair_router_bytes(const moec_model *m, int64_t n, int64_t slots)
{
    const moec_dims *d = &m->dims;
    const size_t H = (size_t)d->hidden, K = (size_t)d->experts, I = (size_t)d->expert_width, t = (size_t)n;
    const size_t room = (size_t)room_floats(d, slots) + MOEC_REPAIR_BLOCK * 2 * (H + I);
    const size_t ahead_values = (size_t)(slots * ahead_tokens(d->hidden, slots, n)) * H;
    return sizeof(double) * (H * H + K * H + H) + sizeof(float) * (t * (K + H + 2 * (size_t)slots + 2) + DEPTH * (H + K)) +
           sizeof(float) * (ahead_values + 3 * H * I + 3 * K * H + (size_t)moec_par_threads() * room);
}

static moec_status make_room(router_fit *a, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_repair_task *t = a->t;
    const size_t H = (size_t)a->hidden, K = (size_t)a->keep;
    const int64_t width = t->model->dims.expert_width;
    MOEC_TRY(moec__fit_new(&a->route, t, 1, 1, 1, true, err));
    MOEC_TRY(moec__fit_read(a->route, 0, 1, 0, 1, err));
    a->rows = moec__fit_router(a->route);
    MOEC_TRY(MOEC_NEW(a->change, (size_t)t->n_fit * K, err));
    MOEC_TRY(MOEC_NEW(a->xs, DEPTH * H, err));
    MOEC_TRY(MOEC_NEW(a->cs, DEPTH * K, err));
    MOEC_TRY(MOEC_NEW(a->gram, H * H, err));
    MOEC_TRY(MOEC_NEW(a->diagonal, H, err));
    MOEC_TRY(MOEC_NEW(a->right, K * H, err));
    MOEC_TRY(MOEC_NEW(a->values, (size_t)moec__piece_values(t, width), err));
    MOEC_TRY(MOEC_NEW(a->biases, (size_t)moec__piece_biases(t), err));
    MOEC_TRY(moec__picked_new(&a->k, t->n, err));
    MOEC_TRY(moec__room_new(&a->room, room_floats(&t->model->dims, t->slots), err));
    MOEC_TRY(moec__room_new(&a->piece_room, moec__piece_floats(t, width), err));
done:
    return st;
}

static void release(router_fit *a)
{
    moec__fit_free(a->route);
    moec_free(a->change);
    moec_free(a->xs);
    moec_free(a->cs);
    moec_free(a->gram);
    moec_free(a->diagonal);
    moec_free(a->right);
    moec_free(a->values);
    moec_free(a->biases);
    moec__picked_release(&a->k);
    moec_free(a->room.store);
    moec_free(a->piece_room.store);
}

moec_status moec_repair_router(bool *taken, moec_repair_task *t, const float *want, const moec_router_opts *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    router_fit a = {.t = t, .o = o, .hidden = t->model->dims.hidden, .keep = t->n_keep};
    difference d = {&a, want};
    bool ok = false;
    *taken = false;
    if (t->n_fit == 0 || t->n_keep == 0 || !moec_repair_can_route(t) || (!want && t->model->family->weight_on_input))
        return MOEC_OK;
    MOEC_TRY(make_room(&a, err));
    if (want)
        MOEC_TRY(moec_par_for(t->n_fit, TOKENS, differ, &d, err));
    else
        MOEC_TRY(wishes(&a, err));
    MOEC_TRY(solve(&ok, &a, err));
    if (!ok)
        goto done;
    moec__round(a.rows, a.keep * a.hidden, t->router.of->dtype);
    if (moec_all_finite(a.rows, a.keep * a.hidden)) /* and within float16 */
        MOEC_TRY(judge(taken, &a, err));
done:
    release(&a);
    return st;
}

moec_status moec_load_shift(double *out, const int32_t *before, const int32_t *after, int64_t n, int64_t slots, int64_t experts,
                            moec_err *err)
{
    int64_t *count = NULL, all[2] = {0, 0};
    moec_status st = MOEC_NEW(count, 2 * (size_t)experts, err);
    *out = 0.0;
    for (int64_t i = 0; st == MOEC_OK && i < n * slots; i++)
        for (int k = 0; k < 2; k++) {
            const int32_t e = k == 0 ? before[i] : after[i];
            count[k * experts + (e < 0 ? 0 : e)] += e >= 0;
            all[k] += e >= 0;
        }
    for (int64_t e = 0; st == MOEC_OK && all[0] > 0 && all[1] > 0 && e < experts; e++)
        *out += 0.5 * fabs((double)count[e] / (double)all[0] - (double)count[experts + e] / (double)all[1]);
    moec_free(count);
    return st;
}
