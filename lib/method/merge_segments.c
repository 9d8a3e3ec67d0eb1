/* Neurons of dropped experts go one by one to the kept expert that has a neuron like them; there the pool is clustered back to the
 * expert's width. Neither the matrix of similarities nor a pool in float32 is ever whole: neurons are read by blocks, again in each
 * round, and of similarities each neuron's best is kept.
 *
 *     sim(s, s') = a_gate cos(gate, gate') + a_up cos(up, up') + a_down cos(down, down')
 *     canonical:   a_gate cos(gate, gate') + |a_up cos(up, up') + a_down cos(down, down')|, up and down turned by the sign inside
 *
 * A cluster's gate, up and down are means by the weights of the members' experts, each matrix on its own (what its norm is of, the
 * paper's Eq. 11 leaves open here):
 *
 *     same_norm   mean |v| times the direction of sum w v / |v|; else sum w v / sum w
 *     canonical   up and down are first scaled, product kept, to the ratio of norms that the cluster's first centre has
 *     one source  with sum_same_source, members from one expert are first made one neuron: mean directions of gate and up times their
 *                 mean norms, and the sum of their down columns (scaled by what |up| was more than the mean, where up is linear);
 *                 then canonical scaling again
 *
 * A cluster of one is its member, bit for bit. One without members keeps its centre; with sum_same_source it becomes silent, since
 * its neuron's output was added elsewhere. */
#include "method/merge_parts.h"

#include "base/mem.h"
#include "base/par.h"
#include "num/linalg.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { NEURONS = 4096, SEGMENTS = 256, PLACES = 32, PARTS = 3 };
enum { GATE, UP, DOWN };

/* Where a neuron is most at home. */
typedef struct home {
    int32_t at;    /* place */
    float value, sign;
} home;

typedef struct cluster {
    double coef[PARTS], norm[PARTS], weight; /* of the first member; sums over members */
    double ratio;                            /* sqrt(|down| / |up|) of its first centre, 0: of none */
    int64_t count;
} cluster;

typedef struct segments {
    moec_filling *f;
    double part[PARTS];              /* a */
    bool canonical;
    int64_t joint, own, cols, most;  /* columns whose products are one sum, those behind them; neurons of a block */
    moec_rows raw, centre, sum;
    float *unit[2];                  /* [most,cols] */
    float *product;                  /* [workers, SEGMENTS, most] once, or twice where there are columns of their own */
    float *pair;                     /* [workers, 3H] one neuron */
    double *weight;                  /* [E] of a member by its expert */
    int32_t *dropped, *taker;        /* [E] */
    int64_t n_dropped, n_takers;
    moec_neuron_id *who;             /* [most of: neurons dropped, taken; a pool] */
    home *home;                      /* the same */
    cluster *cluster;                /* [I] */
    int32_t *first, *order;          /* [I + 1], [most] members of a block by cluster */
} segments;

static int64_t larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* --- similarities ----------------------------------------------------------------------------------------------------------- */

static float *row_of(const moec_rows *x, int part, int64_t i, int64_t hidden)
{
    float *const m = part == GATE ? x->gate : part == UP ? x->up : x->down;
    return m ? m + i * hidden : NULL;
}

static double norm_of(const float *x, int64_t n)
{
    return x ? sqrt(moec_sum_sq(x, n)) : 0.0;
}

typedef struct turning {
    const segments *s;
    const moec_rows *from;
    float *to;
} turning;

/* Unit vectors times the roots of their parts' weights, the parts of the joint sum in front. */
static moec_status make_units(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const turning *a = ctx;
    const segments *s = a->s;
    const int64_t h = s->f->hidden;
    static const int order[PARTS] = {UP, DOWN, GATE};
    (void)worker;
    (void)err;
    for (int64_t i = lo; i < hi; i++) {
        float *out = a->to + i * s->cols;
        for (int k = 0; k < PARTS; k++) {
            const float *x = row_of(a->from, order[k], i, h);
            if (!(s->part[order[k]] > 0.0))
                continue;
            const double norm = norm_of(x, h), by = norm > 0.0 ? sqrt(s->part[order[k]]) / norm : 0.0;
            for (int64_t j = 0; j < h; j++)
                *out++ = (float)(by * (double)x[j]);
        }
    }
    return MOEC_OK;
}

static moec_status units_of(const segments *s, const moec_rows *from, float *to, int64_t n, moec_err *err)
{
    turning a = {s, from, to};
    return moec_par_for(n, PLACES, make_units, &a, err);
}

/* Rows of unit[0] against the n first of unit[1], which are places at, at + 1, ... */
typedef struct comparing {
    const segments *s;
    home *home;
    int64_t n, at;
} comparing;

static moec_status compare_some(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const comparing *c = ctx;
    const segments *s = c->s;
    const int64_t ld = s->cols, rows = hi - lo;
    float *p = s->product + worker * SEGMENTS * s->most * (s->own > 0 ? 2 : 1), *own = s->own > 0 ? p + SEGMENTS * s->most : NULL;
    const float *a = s->unit[0] + lo * ld, *b = s->unit[1];
    const moec_status st = moec_interrupted(err);
    if (st != MOEC_OK)
        return st;
    moec_sgemm(false, true, rows, c->n, s->joint, 1.0f, a, ld, b, ld, 0.0f, p, c->n);
    if (own)
        moec_sgemm(false, true, rows, c->n, s->own, 1.0f, a + s->joint, ld, b + s->joint, ld, 0.0f, own, c->n);
    for (int64_t i = 0; i < rows; i++) {
        home best = c->home[lo + i];
        for (int64_t k = 0; k < c->n; k++) {
            const float v = p[i * c->n + k], value = (s->canonical ? fabsf(v) : v) + (own ? own[i * c->n + k] : 0.0f);
            if (best.at < 0 || value > best.value)
                best = (home){(int32_t)(c->at + k), value, s->canonical && v < 0.0f ? -1.0f : 1.0f};
        }
        c->home[lo + i] = best;
    }
    return MOEC_OK;
}

static moec_status compare(const segments *s, home *h, int64_t rows, int64_t n, int64_t at, moec_err *err)
{
    comparing c = {s, h, n, at};
    return moec_par_for(rows, SEGMENTS, compare_some, &c, err);
}

/* Each dropped neuron's home among all neurons of the takers, whose places are numbered through. */
static moec_status find_homes(segments *s, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t width = s->f->width, n = s->n_dropped * width, all = s->n_takers * width;
    moec_neuron_id *const taken = s->who + n;
    for (int64_t i = 0; i < n; i++) {
        s->who[i] = (moec_neuron_id){s->dropped[i / width], (int32_t)(i % width)};
        s->home[i] = (home){-1, 0.0f, 1.0f};
    }
    for (int64_t i = 0; i < all; i++)
        taken[i] = (moec_neuron_id){s->taker[i / width], (int32_t)(i % width)};
    for (int64_t lo = 0; lo < n; lo += s->most) {
        const int64_t rows = n - lo < s->most ? n - lo : s->most;
        MOEC_TRY(moec__rows_read(&s->raw, s->f, s->who + lo, rows, err));
        MOEC_TRY(units_of(s, &s->raw, s->unit[0], rows, err));
        for (int64_t at = 0; at < all; at += s->most) {
            const int64_t cols = all - at < s->most ? all - at : s->most;
            MOEC_TRY(moec__rows_read(&s->raw, s->f, taken + at, cols, err));
            MOEC_TRY(units_of(s, &s->raw, s->unit[1], cols, err));
            MOEC_TRY(compare(s, s->home + lo, rows, cols, at, err));
        }
    }
done:
    return st;
}

/* --- means of clusters ------------------------------------------------------------------------------------------------------ */

/* One member of a cluster, its rows times by[]. */
typedef struct member {
    const float *row[PARTS];
    float bias[2], by[PARTS];
    double weight;
} member;

static double ratio_of(const float *up_row, const float *down_row, int64_t hidden)
{
    const double up = norm_of(up_row, hidden), down = norm_of(down_row, hidden);
    return up > 0.0 && down > 0.0 ? sqrt(down / up) : 0.0;
}

/* Up and down are brought to the ratio that c has. */
static void balance(member *m, const cluster *c, double ratio)
{
    const double scale = ratio > 0.0 && c->ratio > 0.0 ? ratio / c->ratio : 1.0;
    m->by[UP] *= (float)scale;
    m->by[DOWN] *= (float)(1.0 / scale);
}

/* Row i of the block as a member of c. */
static member member_of(const segments *s, const cluster *c, const home *h, int64_t i, int32_t expert)
{
    const int64_t hidden = s->f->hidden;
    member m = {.by = {1.0f, h->sign, h->sign}, .weight = s->weight[expert]};
    if (s->canonical)
        balance(&m, c, ratio_of(row_of(&s->raw, UP, i, hidden), row_of(&s->raw, DOWN, i, hidden), hidden));
    for (int k = 0; k < PARTS; k++)
        m.row[k] = row_of(&s->raw, k, i, hidden);
    if (s->f->biased) {
        m.bias[GATE] = s->raw.gate_bias[i];
        m.bias[UP] = s->raw.up_bias[i];
    }
    return m;
}

static void add_member(const segments *s, int64_t at, const member *m)
{
    const int64_t h = s->f->hidden;
    cluster *c = &s->cluster[at];
    double coef[PARTS];
    for (int k = 0; k < PARTS; k++) {
        const double norm = fabs((double)m->by[k]) * norm_of(m->row[k], h);
        coef[k] = !s->f->r->segment.same_norm ? m->weight : norm > 0.0 ? m->weight / norm : 0.0;
        c->norm[k] += norm;
    }
    for (int k = 0; k < PARTS; k++) {
        float *sum = row_of(&s->sum, k, at, h);
        if (!sum)
            continue;
        /* the first is kept as it is until a second comes */
        const float keep = c->count == 1 ? (float)c->coef[k] : 1.0f, by = c->count > 0 ? (float)coef[k] * m->by[k] : m->by[k];
        for (int64_t j = 0; j < h; j++)
            sum[j] = c->count > 0 ? keep * sum[j] + by * m->row[k][j] : by * m->row[k][j];
        float *bias = !s->f->biased || k == DOWN ? NULL : k == GATE ? &s->sum.gate_bias[at] : &s->sum.up_bias[at];
        if (bias)
            *bias = c->count > 0 ? keep * *bias + by * m->bias[k] : by * m->bias[k];
    }
    if (c->count == 0)
        memcpy(c->coef, coef, sizeof coef);
    c->weight += m->weight;
    c->count++;
}

/* The members all[0 .. n) of one expert as one neuron in `pair` [3H], a member of c. */
static member sum_of(const segments *s, const cluster *c, const member *all, int64_t n, float *pair)
{
    const int64_t h = s->f->hidden;
    member out = {.by = {1.0f, 1.0f, 1.0f}, .weight = all->weight};
    double mean[PARTS] = {0.0, 0.0, 0.0};
    memset(pair, 0, (size_t)(PARTS * h) * sizeof *pair);
    for (int k = GATE; k <= UP; k++) {
        double norm = 0.0;
        if (!all->row[k])
            continue;
        for (int64_t i = 0; i < n; i++) {
            const double one = fabs((double)all[i].by[k]) * norm_of(all[i].row[k], h);
            const float by = one > 0.0 ? (float)((double)all[i].by[k] / one) : 0.0f;
            for (int64_t j = 0; j < h; j++)
                pair[k * h + j] += by * all[i].row[k][j];
            out.bias[k] += by * all[i].bias[k];
            mean[k] += one / (double)n;
        }
        norm = norm_of(pair + k * h, h);
        const float by = norm > 0.0 ? (float)(mean[k] / norm) : 0.0f;
        for (int64_t j = 0; j < h; j++)
            pair[k * h + j] *= by;
        out.bias[k] *= by;
        out.row[k] = pair + k * h;
    }
    for (int64_t i = 0; i < n; i++) {
        const double more = fabs((double)all[i].by[UP]) * norm_of(all[i].row[UP], h);
        const float by = s->f->scales && mean[UP] > 0.0 ? (float)(more / mean[UP]) : 1.0f;
        for (int64_t j = 0; j < h; j++)
            pair[DOWN * h + j] += by * all[i].by[DOWN] * all[i].row[DOWN][j];
    }
    out.row[DOWN] = pair + DOWN * h;
    if (s->canonical)
        balance(&out, c, ratio_of(out.row[UP], out.row[DOWN], h));
    return out;
}

typedef struct gathering {
    const segments *s;
    int64_t lo; /* first member of the block */
} gathering;

/* The block's members of clusters [lo, hi), in order. */
static moec_status gather_some(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const gathering *g = ctx;
    const segments *s = g->s;
    const home *h = s->home + g->lo;
    const moec_neuron_id *who = s->who + g->lo;
    moec_status st = MOEC_OK;
    size_t room = 0;
    member *all = NULL;
    for (int64_t c = lo; c < hi; c++)
        for (int64_t i = s->first[c], end; i < s->first[c + 1]; i = end) {
            const int32_t *order = s->order;
            for (end = i + 1; end < s->first[c + 1] && who[order[end]].expert == who[order[i]].expert;)
                end++;
            MOEC_TRY(MOEC_GROW(all, room, (size_t)(end - i), err));
            for (int64_t k = i; k < end; k++)
                all[k - i] = member_of(s, &s->cluster[c], &h[order[k]], order[k], who[order[k]].expert);
            if (s->f->r->segment.sum_same_source && end - i > 1)
                all[0] = sum_of(s, &s->cluster[c], all, end - i, s->pair + worker * PARTS * s->f->hidden);
            for (int64_t k = 0; k < (s->f->r->segment.sum_same_source ? 1 : end - i); k++)
                add_member(s, c, &all[k]);
        }
done:
    moec_free(all);
    return st;
}

/* Members [lo, lo + n) of the pool, which s->raw holds, by the clusters in s->home. */
static moec_status gather(const segments *s, int64_t lo, int64_t n, moec_err *err)
{
    gathering g = {s, lo};
    const int64_t width = s->f->width;
    memset(s->first, 0, (size_t)(width + 1) * sizeof *s->first);
    for (int64_t i = 0; i < n; i++)
        s->first[s->home[lo + i].at]++;
    for (int64_t c = 0, sum = 0; c <= width; c++) { /* ends, which become starts as they are filled from behind */
        sum += s->first[c];
        s->first[c] = (int32_t)sum;
    }
    for (int64_t i = n - 1; i >= 0; i--)
        s->order[--s->first[s->home[lo + i].at]] = (int32_t)i;
    return moec_par_for(width, PLACES, gather_some, &g, err);
}

static void scale_row(float *to, const float *from, double by, int64_t n)
{
    for (int64_t j = 0; to && j < n; j++)
        to[j] = (float)(by * (double)from[j]);
}

/* Sums become centres. */
static void finish_means(const segments *s)
{
    const int64_t h = s->f->hidden;
    for (int64_t c = 0; c < s->f->width; c++) {
        const cluster *x = &s->cluster[c];
        for (int k = 0; k < PARTS && x->count > 0; k++) {
            const float *sum = row_of(&s->sum, k, c, h);
            double by = 1.0;
            if (x->count > 1 && s->f->r->segment.same_norm) {
                const double norm = norm_of(sum, h);
                by = norm > 0.0 ? x->norm[k] / (double)x->count / norm : 0.0;
            } else if (x->count > 1) {
                by = 1.0 / x->weight;
            }
            scale_row(row_of(&s->centre, k, c, h), sum, by, h);
            if (s->f->biased && k != DOWN)
                scale_row(k == GATE ? &s->centre.gate_bias[c] : &s->centre.up_bias[c],
                          k == GATE ? &s->sum.gate_bias[c] : &s->sum.up_bias[c], by, 1);
        }
    }
}

static void silence_empty(const segments *s)
{
    for (int64_t c = 0; c < s->f->width; c++)
        if (s->cluster[c].count == 0)
            memset(row_of(&s->centre, DOWN, c, s->f->hidden), 0, (size_t)s->f->hidden * sizeof(float));
}

/* --- the pool of one taker ---------------------------------------------------------------------------------------------------- */

/* Where the block that begins at lo ends: whole experts, as many as there is room for. */
static int64_t block_end(const segments *s, int64_t lo, int64_t n)
{
    int64_t end = lo;
    while (end < n) {
        int64_t next = end + 1;
        while (next < n && s->who[next].expert == s->who[end].expert)
            next++;
        if (next - lo > s->most)
            break;
        end = next;
    }
    return end;
}

typedef struct response {
    float bound;
    int32_t member;
} response;

static int by_bound(const void *a, const void *b)
{
    const response *x = a, *y = b;
    return x->bound != y->bound ? (x->bound < y->bound) - (x->bound > y->bound) : (x->member > y->member) - (x->member < y->member);
}

static float response_bound(const float *x, int64_t n)
{
    float low = INFINITY, high = 0.0f;
    for (int64_t j = 0; j < n; j++) {
        low = fminf(low, fabsf(x[j]));
        high = fmaxf(high, fabsf(x[j]));
    }
    return high + low;
}

/* Places of neurons that do not begin as centres go to those of other experts that do, in order. *centre [I]: members. */
static moec_status first_centres(moec_neuron_id *centre, segments *s, int64_t n, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t width = s->f->width;
    response *all = NULL;
    bool *begins = NULL;
    MOEC_TRY(MOEC_NEW(all, (size_t)n, err));
    MOEC_TRY(MOEC_NEW(begins, (size_t)n, err));
    for (int64_t lo = 0, end; lo < n; lo = end) {
        end = block_end(s, lo, n);
        MOEC_TRY(moec__rows_read(&s->raw, s->f, s->who + lo, end - lo, err));
        for (int64_t i = lo; i < end; i++)
            all[i] = (response){response_bound(row_of(&s->raw, s->f->gated ? GATE : UP, i - lo, s->f->hidden), s->f->hidden),
                                (int32_t)i};
    }
    qsort(all, (size_t)n, sizeof *all, by_bound);
    for (int64_t i = 0; i < width; i++)
        begins[all[i].member] = true;
    for (int64_t c = 0, other = width; c < width; c++) { /* the expert's own are the first of the pool */
        if (!begins[c])
            while (!begins[other])
                other++;
        centre[c] = s->who[begins[c] ? c : other++];
    }
done:
    moec_free(all);
    moec_free(begins);
    return st;
}

static void clear_sums(const segments *s)
{
    for (int64_t c = 0; c < s->f->width; c++)
        s->cluster[c] = (cluster){.ratio = s->cluster[c].ratio};
}

/* A round over the pool [n]: who goes where, unless that is settled, and the sums. *changed: somebody moved. */
static moec_status pool_round(segments *s, int64_t n, bool settled, bool *changed, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t width = s->f->width;
    home *old = NULL;
    *changed = false;
    clear_sums(s);
    MOEC_TRY(MOEC_NEW(old, (size_t)s->most, err));
    if (!settled)
        MOEC_TRY(units_of(s, &s->centre, s->unit[1], width, err));
    for (int64_t lo = 0, end; lo < n; lo = end) {
        end = block_end(s, lo, n);
        MOEC_TRY(moec__rows_read(&s->raw, s->f, s->who + lo, end - lo, err));
        if (!settled) {
            MOEC_TRY(units_of(s, &s->raw, s->unit[0], end - lo, err));
            memcpy(old, s->home + lo, (size_t)(end - lo) * sizeof *old);
            for (int64_t i = lo; i < end; i++)
                s->home[i] = (home){-1, 0.0f, 1.0f};
            MOEC_TRY(compare(s, s->home + lo, end - lo, width, 0, err));
            for (int64_t i = lo; i < end; i++)
                *changed |= s->home[i].at != old[i - lo].at || s->home[i].sign != old[i - lo].sign;
        }
        MOEC_TRY(gather(s, lo, end - lo, err));
    }
done:
    moec_free(old);
    return st;
}

/* Its own and those of the experts whose neurons it took, by their weights and the share that it took. */
static moec_status fill_down_bias(const segments *s, int32_t expert, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_filling *f = s->f;
    double *weight = NULL, all = 0.0;
    MOEC_TRY(MOEC_NEW(weight, (size_t)f->experts, err));
    for (int64_t e = 0; e < f->experts; e++) {
        weight[e] = s->weight[e] * (e == expert ? 1.0 : (double)f->took[e * f->experts + expert] / (double)f->width);
        all += weight[e];
    }
    for (int64_t e = 0; e < f->experts; e++)
        weight[e] /= all; /* its own is above 0 */
    MOEC_TRY(moec__down_bias_write(f, expert, weight, err));
done:
    moec_free(weight);
    return st;
}

static moec_status fill_taker(segments *s, int32_t expert, int64_t n, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_segment_opts *o = &s->f->r->segment;
    const int64_t width = s->f->width;
    moec_neuron_id *centre = NULL;
    bool changed = true;
    MOEC_TRY(MOEC_NEW(centre, (size_t)width, err));
    for (int64_t i = 0; i < width; i++)
        centre[i] = s->who[i];
    if (o->response)
        MOEC_TRY(first_centres(centre, s, n, err));
    MOEC_TRY(moec__rows_read(&s->centre, s->f, centre, width, err));
    for (int64_t c = 0; c < width; c++)
        s->cluster[c].ratio = ratio_of(row_of(&s->centre, UP, c, s->f->hidden),
                                       row_of(&s->centre, DOWN, c, s->f->hidden), s->f->hidden);
    for (int64_t i = 0; o->response && i < n; i++)
        s->home[i].at = -1;
    for (int k = 0; k < (o->response ? o->rounds : 1) && changed; k++) {
        MOEC_TRY(pool_round(s, n, !o->response, &changed, err));
        if (changed || !o->response)
            finish_means(s);
    }
    if (o->sum_same_source)
        silence_empty(s);
    MOEC_TRY(moec__rows_write(&s->centre, s->f, expert, err));
    MOEC_TRY(fill_down_bias(s, expert, err));
done:
    moec_free(centre);
    return st;
}

/* --- all of them -------------------------------------------------------------------------------------------------------------- */

static void choose_parts(segments *s)
{
    const moec_segment_opts *o = &s->f->r->segment;
    const double all = (s->f->gated ? o->gate : 0.0) + o->up + o->down;
    s->part[GATE] = s->f->gated ? o->gate / all : 0.0;
    s->part[UP] = o->up / all;
    s->part[DOWN] = o->down / all;
    s->canonical = o->canonical && s->f->scales;
    for (int k = 0; k < PARTS; k++)
        *(s->canonical && k == GATE ? &s->own : &s->joint) += s->part[k] > 0.0 ? s->f->hidden : 0;
    s->cols = s->joint + s->own;
}

/* A kept expert that no token selects counts next to nothing in its clusters, not nothing at all. */
static void choose_experts(segments *s)
{
    const moec_filling *f = s->f;
    double most = 0.0;
    for (int64_t e = 0; e < f->experts; e++)
        most = fmax(most, f->g->saliency[e]);
    for (int32_t e = 0; e < f->experts; e++) {
        const double share = most > 0.0 ? f->g->saliency[e] / most : 0.0;
        s->weight[e] = fmax(share, (double)FLT_EPSILON);
        if (moec__fill_open(f, e))
            s->taker[s->n_takers++] = e;
        else if (f->g->centre[e] != e && share > 0.0)
            s->dropped[s->n_dropped++] = e;
        else if (f->g->centre[e] != e)
            f->tally->dropped += f->width;
    }
}

static moec_status segments_new(segments *s, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_filling *f = s->f;
    const int64_t workers = moec_par_threads();
    const size_t experts = (size_t)f->experts, width = (size_t)f->width;
    size_t cells, all;
    s->most = larger(f->width, NEURONS);
    MOEC_TRY(MOEC_NEW(s->weight, experts, err));
    MOEC_TRY(MOEC_NEW(s->dropped, experts, err));
    MOEC_TRY(MOEC_NEW(s->taker, experts, err));
    choose_parts(s);
    choose_experts(s);
    if (!moec_mul_size(&cells, (size_t)s->most, (size_t)s->cols) || !moec_mul_size(&all, experts, width) || all > INT32_MAX)
        return moec_fail(err, MOEC_ENOMEM, "merge: %lld neurons of %zu experts are too many", (long long)f->width, experts);
    MOEC_TRY(moec__rows_new(&s->raw, f, s->most, err));
    MOEC_TRY(moec__rows_new(&s->centre, f, f->width, err));
    MOEC_TRY(moec__rows_new(&s->sum, f, f->width, err));
    MOEC_TRY(MOEC_NEW(s->unit[0], cells, err));
    MOEC_TRY(MOEC_NEW(s->unit[1], cells, err));
    MOEC_TRY(MOEC_NEW(s->product, (size_t)(workers * SEGMENTS * s->most * (s->own > 0 ? 2 : 1)), err));
    MOEC_TRY(MOEC_NEW(s->pair, (size_t)(workers * PARTS * f->hidden), err));
    MOEC_TRY(MOEC_NEW(s->who, all, err));
    MOEC_TRY(MOEC_NEW(s->home, all, err));
    MOEC_TRY(MOEC_NEW(s->cluster, width, err));
    MOEC_TRY(MOEC_NEW(s->first, width + 1, err));
    MOEC_TRY(MOEC_NEW(s->order, (size_t)s->most, err));
done:
    return st;
}

static void segments_release(segments *s)
{
    moec__rows_release(&s->raw);
    moec__rows_release(&s->centre);
    moec__rows_release(&s->sum);
    void *const all[] = {s->weight, s->dropped, s->taker, s->unit[0], s->unit[1], s->product, s->pair, s->who, s->home,
                         s->cluster, s->first, s->order};
    for (size_t i = 0; i < MOEC_COUNT(all); i++)
        moec_free(all[i]);
}

/* What goes to taker r, behind its own neurons, from the homes of all. n: their number. */
static int64_t make_pool(segments *s, const home *homes, int64_t taker)
{
    const int64_t width = s->f->width, all = s->n_dropped * width;
    int64_t n = 0;
    for (; n < width; n++) {
        s->who[n] = (moec_neuron_id){s->taker[taker], (int32_t)n};
        s->home[n] = (home){(int32_t)n, 1.0f, 1.0f};
    }
    for (int64_t i = 0; i < all; i++)
        if (homes[i].at >= 0 && homes[i].at / width == taker) {
            s->who[n] = (moec_neuron_id){s->dropped[i / width], (int32_t)(i % width)};
            s->home[n++] = (home){(int32_t)(homes[i].at % width), homes[i].value, homes[i].sign};
        }
    return n;
}

/* Neurons that nobody is like enough to have no home. */
static void count_moved(segments *s, home *homes)
{
    moec_filling *f = s->f;
    for (int64_t o = 0; o < s->n_dropped; o++) {
        int64_t moved = 0;
        for (int64_t j = 0; j < f->width; j++) {
            home *h = &homes[o * f->width + j];
            if (!(fmin((double)h->value, 1.0) > f->r->segment.alpha)) { /* a cosine of 1 may be rounded up */
                h->at = -1;
                continue;
            }
            f->took[s->dropped[o] * f->experts + s->taker[h->at / f->width]]++;
            moved++;
        }
        f->tally->merged += moved > 0;
        f->tally->moved += moved;
        f->tally->dropped += f->width - moved;
    }
}

moec_status moec__fill_segments(moec_filling *f, moec_err *err)
{
    moec_status st = MOEC_OK;
    segments s = {.f = f};
    home *homes = NULL;
    MOEC_TRY(segments_new(&s, err));
    if (s.n_takers == 0 || s.n_dropped == 0) {
        f->tally->dropped += s.n_dropped * f->width;
        goto done;
    }
    MOEC_TRY(find_homes(&s, err));
    MOEC_TRY(MOEC_NEW(homes, (size_t)(s.n_dropped * f->width), err));
    memcpy(homes, s.home, (size_t)(s.n_dropped * f->width) * sizeof *homes);
    count_moved(&s, homes);
    for (int64_t r = 0; r < s.n_takers; r++) {
        const int64_t n = make_pool(&s, homes, r);
        if (n > f->width)
            MOEC_TRY(fill_taker(&s, s.taker[r], n, err));
    }
done:
    moec_free(homes);
    segments_release(&s);
    return st;
}

size_t moec__fill_segments_bytes(const moec_model *m)
{
    const int64_t width = m->dims.expert_width, most = larger(width, NEURONS), workers = moec_par_threads();
    const size_t hidden = (size_t)m->dims.hidden, all = (size_t)m->dims.experts * (size_t)width;
    return sizeof(float) * (moec__rows_floats(m, most) + 2 * moec__rows_floats(m, width) + 2 * (size_t)most * 3 * hidden +
                            (size_t)workers * (2 * SEGMENTS * (size_t)most + PARTS * hidden)) +
           all * (sizeof(moec_neuron_id) + 2 * sizeof(home) + sizeof(response) + 1) +
           (size_t)most * (sizeof(home) + sizeof(int32_t)) + (size_t)width * (sizeof(cluster) + sizeof(moec_neuron_id) + 4);
}
