/* Every statistic of moec_observe against a plain recomputation from random events, token by token, in the words of its
 * definition; and absorbing of partials. */
#include "base/mem.h"
#include "calib/observe.h"

#include <limits.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* ---- random events ------------------------------------------------------------------------------------------------ */

static uint64_t seed;

static uint64_t next_u64(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

static float uniform(float low, float high)
{
    return low + (high - low) * (float)(next_u64() >> 40) / 16777216.0f;
}

typedef struct sample {
    moec_event ev;
    float *h, *x, *r, *shared, *logits, *scores, *gates, *y_norm, *out_absmax, *in_absmax, *router_norm, *router_bias;
    int32_t *ids, *prev, *guess, *channel;
    int64_t seq[6];
    double *tier1[7];
} sample;

enum { LAYERS = 3 };

static void *must(size_t n, size_t size)
{
    void *p;
    assert_int_equal(moec_alloc(&p, n, size, NULL), MOEC_OK);
    return p;
}

static void distinct(int32_t *ids, int64_t k, int64_t experts)
{
    for (int64_t j = 0; j < k; j++) {
        bool again = true;
        while (again) {
            ids[j] = (int32_t)(next_u64() % (uint64_t)experts);
            again = false;
            for (int64_t i = 0; i < j; i++)
                again = again || ids[i] == ids[j];
        }
    }
}

static float *floats(int64_t n, float low, float high)
{
    float *v = must((size_t)n, sizeof *v);
    for (int64_t i = 0; i < n; i++)
        v[i] = uniform(low, high);
    return v;
}

static int descending(const void *a, const void *b)
{
    const float *x = a, *y = b;
    return (*x < *y) - (*x > *y);
}

/* `slots` at least k: in some tokens they stay empty; `ld` at least E: columns of null experts. */
static void make_wide(sample *s, const moec_stats_meta *m, int64_t n, bool first, int64_t slots, int64_t ld)
{
    const int64_t E = m->experts, k = slots, H = m->hidden;
    *s = (sample){.seq = {0, n / 3, n / 3, n - 1, n}}; /* one sequence is empty */
    s->shared = floats(n * H, -1, 1);
    s->router_bias = floats(E, -1, 1);
    s->h = floats(n * H, -2, 2);
    s->x = floats(n * H, -1, 1);
    s->r = floats(n * H, -0.3f, 0.3f);
    s->logits = floats(n * ld, -4, 4);
    s->scores = floats(n * ld, 0, 1);
    s->gates = floats(n * k, 0, 1);
    s->y_norm = floats(n * k, 0, 3);
    s->out_absmax = floats(E, 0, 9);
    s->in_absmax = floats(E, 0, 9);
    s->router_norm = floats(E, 0.5f, 2);
    s->ids = must((size_t)(n * k), sizeof *s->ids);
    s->prev = must((size_t)(n * k), sizeof *s->prev);
    s->guess = must((size_t)(n * k), sizeof *s->guess);
    s->channel = must((size_t)E, sizeof *s->channel);
    for (int64_t e = 0; e < E; e++)
        s->channel[e] = (int32_t)(next_u64() % (uint64_t)H);
    for (int64_t t = 0; t < n; t++) {
        qsort(s->gates + t * k, (size_t)k, sizeof(float), descending);
        distinct(s->ids + t * k, k, E);
        distinct(s->prev + t * k, k, E);
        distinct(s->guess + t * k, k, E);
        for (int64_t e = 0; e < E; e++) /* scores that follow the logits, as softmax and sigmoid do */
            s->scores[t * ld + e] = 1.0f / (1.0f + expf(-s->logits[t * ld + e]));
        if (E > 3) { /* ties, and both zeros */
            s->logits[t * ld + 3] = s->logits[t * ld + 1];
            s->scores[t * ld + 3] = s->scores[t * ld + 1];
        }
    }
    if (n > 2 && E > 2) {
        s->logits[0] = -0.0f, s->logits[2] = 0.0f;
        s->scores[0] = s->scores[2] = 0.5f;
        for (int64_t j = 0; j < k; j++)
            s->gates[k + j] = 0; /* a token whose weights are all 0 */
        memset(s->h + H, 0, (size_t)H * sizeof(float));
        memset(s->x + H, 0, (size_t)H * sizeof(float));
        for (int64_t i = 0; i < H; i++)
            s->r[2 * H + i] = -s->h[2 * H + i];
    }
    for (int64_t t = 0; slots > m->top_k && t < n; t++)
        for (int64_t j = t % (slots + 1); j < slots; j++) { /* as many as the token's number, none in the first */
            s->ids[t * slots + j] = -1;
            s->gates[t * slots + j] = s->y_norm[t * slots + j] = 0;
            s->prev[t * slots + slots - 1 - j] = s->guess[t * slots + slots - 1 - j] = -1;
        }
    for (int i = 0; i < 7; i++) {
        int64_t cells = E * (i < 4 ? H : m->expert_width);
        s->tier1[i] = must((size_t)cells, sizeof(double));
        for (int64_t c = 0; c < cells; c++)
            s->tier1[i][c] = (double)uniform(0, 5);
    }
    s->ev = (moec_event){
        .n = n, .seq = s->seq, .n_seq = 4, .h = s->h, .x = s->x, .r = s->r, .logits = s->logits, .scores = s->scores,
        .shared = s->shared, .slots = slots, .ld = ld, .router_bias = s->router_bias, .ids = s->ids, .gates = s->gates, .y_norm = s->y_norm, .out_absmax = s->out_absmax, .out_channel = s->channel,
        .in_absmax = s->in_absmax, .router_norm = s->router_norm, .prev_ids = first ? NULL : s->prev,
        .guess_ids = first ? NULL : s->guess, .y_sum = s->tier1[0], .gy_sum = s->tier1[1], .xin_abs = s->tier1[2],
        .xin_sq = s->tier1[3], .act_abs = s->tier1[4], .act_sq = s->tier1[5], .gact_sq = s->tier1[6],
    };
}

static void make_sample(sample *s, const moec_stats_meta *m, int64_t n, bool first)
{
    make_wide(s, m, n, first, m->top_k, m->experts);
}

static void free_sample(sample *s)
{
    void *all[] = {s->h, s->x, s->r, s->logits, s->scores, s->gates, s->y_norm, s->out_absmax, s->in_absmax,
                   s->router_norm, s->ids, s->prev, s->guess, s->channel, s->shared, s->router_bias};
    for (size_t i = 0; i < MOEC_COUNT(all); i++)
        moec_free(all[i]);
    for (int i = 0; i < 7; i++)
        moec_free(s->tier1[i]);
}

/* ---- the naive recomputation: one cell at a time ------------------------------------------------------------------- */

static bool selects(const moec_event *ev, int64_t k, int64_t t, int64_t e)
{
    for (int64_t j = 0; j < k; j++)
        if (ev->ids[t * k + j] == e)
            return true;
    return false;
}

static int64_t place_of(const int32_t *ids, int64_t k, int64_t e)
{
    for (int64_t j = 0; j < k; j++)
        if (ids[j] == e)
            return j;
    return -1;
}

/* How many experts stand before e by logit. */
static int64_t logit_rank(const moec_event *ev, int64_t E, int64_t t, int64_t e)
{
    const float *z = ev->logits + t * ev->ld;
    int64_t before = 0;
    for (int64_t f = 0; f < E; f++)
        before += z[f] > z[e] || (z[f] == z[e] && f < e);
    return before;
}

static double dot(const float *a, const float *b, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += (double)a[i] * (double)b[i];
    return sum;
}

static double cos_after(const moec_event *ev, int64_t H, int64_t t)
{
    const float *h = ev->h + t * H, *r = ev->r + t * H;
    double hs = 0, ss = 0, hh = dot(h, h, H), part = ev->model ? ev->model->dims.residual_scale : 1;
    for (int64_t i = 0; i < H; i++) {
        double s = (double)h[i] + part * (double)r[i];
        hs += (double)h[i] * s;
        ss += s * s;
    }
    return hh * ss > 0 ? hs / (sqrt(hh) * sqrt(ss)) : 0;
}

static double cos_router(const moec_event *ev, const moec_stats_meta *m, int64_t t, int64_t e)
{
    const float *x = ev->x + t * m->hidden;
    double scale = sqrt(dot(x, x, m->hidden)) * (double)ev->router_norm[e];
    return scale > 0 ? ((double)ev->logits[t * ev->ld + e] - (double)ev->router_bias[e]) / scale : 0;
}

/* Value of kind `kind`, one number a token, for an [E] statistic. */
static double of_expert(const moec_event *ev, const moec_stats_meta *m, moec_stat kind, int64_t t, int64_t e)
{
    const int64_t E = m->experts, k = m->top_k, slots = ev->slots, j = place_of(ev->ids + t * slots, slots, e);
    const double z = (double)ev->logits[t * ev->ld + e], s = (double)ev->scores[t * ev->ld + e];
    const double g = j < 0 ? 0 : (double)ev->gates[t * slots + j], y = j < 0 ? 0 : (double)ev->y_norm[t * slots + j];
    switch (kind) {
    case MOEC_STAT_SELECTED: return j >= 0;
    case MOEC_STAT_GATE_SUM: return g;
    case MOEC_STAT_GATE_SQ: return g * g;
    case MOEC_STAT_GATE_TOP1_SUM: return j == 0 ? g : 0;
    case MOEC_STAT_PROB_SUM: return s;
    case MOEC_STAT_PROB_SELECTED: return j >= 0 ? s : 0;
    case MOEC_STAT_LOGIT_SUM: return z;
    case MOEC_STAT_LOGIT_SQ: return z * z;
    case MOEC_STAT_MARKER_TOP1: return logit_rank(ev, E, t, e) == 0 ? z : 0;
    case MOEC_STAT_MARKER_TOPK: return logit_rank(ev, E, t, e) < k ? z : 0;
    case MOEC_STAT_NORM_SUM: return y;
    case MOEC_STAT_NORM_SQ: return y * y;
    case MOEC_STAT_GNORM_SUM: return g * y;
    case MOEC_STAT_GNORM_SQ: return g * g * y * y;
    case MOEC_STAT_UGNORM_SUM: return fmax(1 - cos_after(ev, m->hidden, t), 0) * g * y;
    case MOEC_STAT_COS_ROUTER: return j >= 0 ? cos_router(ev, m, t, e) : 0;
    default: fail(); return 0;
    }
}

static const moec_stat per_expert[] = {
    MOEC_STAT_SELECTED, MOEC_STAT_GATE_SUM, MOEC_STAT_GATE_SQ, MOEC_STAT_GATE_TOP1_SUM, MOEC_STAT_PROB_SUM,
    MOEC_STAT_PROB_SELECTED,
    MOEC_STAT_LOGIT_SUM, MOEC_STAT_LOGIT_SQ, MOEC_STAT_MARKER_TOP1, MOEC_STAT_MARKER_TOPK, MOEC_STAT_NORM_SUM,
    MOEC_STAT_NORM_SQ, MOEC_STAT_GNORM_SUM, MOEC_STAT_GNORM_SQ, MOEC_STAT_UGNORM_SUM, MOEC_STAT_COS_ROUTER,
};

static void assert_close(double got, double want, double atol)
{
    if (!(fabs(got - want) <= atol + 1e-12 * fabs(want)))
        fail_msg("got %.17g, want %.17g", got, want);
}

static double cell(const moec_partial *p, moec_stat kind, int64_t i)
{
    const void *b = p->block[kind];
    switch (moec_stat_kinds[kind].cell) {
    case MOEC_CELL_U64: return (double)((const uint64_t *)b)[i];
    case MOEC_CELL_U32: return (double)((const uint32_t *)b)[i];
    case MOEC_CELL_F64: return ((const double *)b)[i];
    case MOEC_CELL_F32: return (double)((const float *)b)[i];
    case MOEC_CELL_I32: return (double)((const int32_t *)b)[i];
    }
    return 0;
}

static void check_per_expert(const moec_partial *p, const moec_event *ev, const moec_stats_meta *m)
{
    for (size_t i = 0; i < MOEC_COUNT(per_expert); i++)
        for (int64_t e = 0; e < m->experts; e++) {
            double want = 0;
            for (int64_t t = 0; t < ev->n; t++)
                want += of_expert(ev, m, per_expert[i], t, e);
            assert_close(cell(p, per_expert[i], e), want, 1e-11);
        }
    for (int64_t e = 0; e < m->experts; e++) {
        double seq = 0, top = -1;
        for (int64_t s = 0; s < ev->n_seq; s++) {
            double sum = 0;
            for (int64_t t = ev->seq[s]; t < ev->seq[s + 1]; t++)
                sum += (double)ev->scores[t * ev->ld + e];
            seq += ev->seq[s + 1] > ev->seq[s] ? sum / (double)(ev->seq[s + 1] - ev->seq[s]) : 0;
        }
        for (int64_t t = 0; t < ev->n; t++)
            if (selects(ev, ev->slots, t, e))
                top = fmax(top, cos_router(ev, m, t, e));
        assert_close(cell(p, MOEC_STAT_PROB_SEQ_SUM, e), seq, 1e-12);
        assert_close(cell(p, MOEC_STAT_COS_ROUTER_MAX, e), top, 1e-12);
        assert_close(cell(p, MOEC_STAT_OUT_ABSMAX, e), (double)ev->out_absmax[e], 0);
        assert_close(cell(p, MOEC_STAT_IN_ABSMAX, e), (double)ev->in_absmax[e], 0);
        assert_close(cell(p, MOEC_STAT_OUT_CHANNEL, e), (double)ev->out_channel[e], 0);
    }
}

/* Tokens with at most n experts for share (i+1)/20, minus those with at most n-1. */
static void check_shares(const moec_partial *p, const moec_event *ev, const moec_stats_meta *m)
{
    const int64_t E = m->experts;
    double *want = must((size_t)(20 * (E + 1)), sizeof *want);
    for (int64_t t = 0; t < ev->n; t++)
        for (int i = 0; i < 20; i++) {
            double total = 0, sum = 0;
            int64_t n = 0;
            for (int pass = 0; pass < 2; pass++)
                for (int64_t place = 0; place < E; place++)
                    for (int64_t e = 0; e < E; e++)
                        if (logit_rank(ev, E, t, e) == place) {
                            double s = (double)ev->scores[t * ev->ld + e];
                            if (pass == 0)
                                total += s;
                            else if (20 * sum < total * (i + 1)) {
                                sum += s;
                                n++;
                            }
                        }
            want[i * (E + 1) + n]++;
        }
    for (int64_t i = 0; i < 20 * (E + 1); i++)
        assert_close(cell(p, MOEC_STAT_TOPP_COUNT, i), want[i], 0);
    moec_free(want);
}

static void check_histograms(const moec_partial *p, const moec_event *ev, const moec_stats_meta *m)
{
    const int64_t k = m->top_k, slots = ev->slots;
    double *ratio = must((size_t)(k * 1024), sizeof *ratio), *before = must((size_t)(k * 256), sizeof *before);
    for (int64_t t = 0; t < ev->n; t++)
        for (int64_t j = 0; j < k && ev->ids[t * slots + j] >= 0; j++) {
            double sum = 0, part = 0, g0 = (double)ev->gates[t * slots];
            for (int64_t i = 0; i < slots; i++) {
                sum += (double)ev->gates[t * slots + i];
                part += i < j ? (double)ev->gates[t * slots + i] : 0;
            }
            double a = g0 > 0 ? floor(1024 * ((double)ev->gates[t * slots + j] / g0)) : 0;
            double b = sum > 0 ? floor(256 * (part / sum)) : 0;
            if (j > 0)
                ratio[(j - 1) * 1024 + (int)fmin(a, 1023)]++;
            before[j * 256 + (int)fmin(b, 255)]++;
        }
    for (int64_t i = 0; i < k * 256; i++)
        assert_close(cell(p, MOEC_STAT_CUMGATE_HIST, i), before[i], 0);
    for (int64_t i = 0; i < (k - 1) * 1024; i++)
        assert_close(cell(p, MOEC_STAT_RATIO_HIST, i), ratio[i], 0);
    moec_free(before);
    moec_free(ratio);
}

static void check_pairs(const moec_partial *p, const moec_event *ev, const moec_stats_meta *m)
{
    const int64_t E = m->experts, k = m->top_k, slots = ev->slots;
    for (int64_t a = 0; a < E; a++)
        for (int64_t b = 0; b < E; b++) {
            double both = 0, after = 0, gram = 0;
            for (int64_t t = 0; t < ev->n; t++) {
                both += selects(ev, slots, t, a) && selects(ev, slots, t, b);
                after += ev->prev_ids && place_of(ev->prev_ids + t * slots, slots, a) >= 0 && selects(ev, slots, t, b);
                gram += (double)ev->logits[t * ev->ld + a] * (double)ev->logits[t * ev->ld + b];
            }
            assert_close(cell(p, MOEC_STAT_COACT, a * E + b), both, 0);
            assert_close(cell(p, MOEC_STAT_TRANS, a * E + b), after, 0);
            if (m->tier > 0)
                assert_close(cell(p, MOEC_STAT_LOGIT_GRAM, a * E + b), gram, 1e-11);
        }
    for (int64_t j = 0; j < k; j++) {
        double hit = 0;
        const int64_t end = j < k - 1 ? j + 1 : slots; /* the last counts those behind it, too */
        for (int64_t t = 0; t < ev->n; t++)
            for (int64_t i = j; i < end && ev->ids[t * slots + i] >= 0; i++)
                hit += ev->guess_ids && place_of(ev->guess_ids + t * slots, slots, ev->ids[t * slots + i]) >= 0;
        assert_close(cell(p, MOEC_STAT_PREFETCH_HIT, j), hit, 0);
        for (int64_t e = 0; e < E; e++) {
            double rank = 0;
            for (int64_t t = 0; t < ev->n; t++)
                for (int64_t i = j; i < end; i++)
                    rank += ev->ids[t * slots + i] == e;
            assert_close(cell(p, MOEC_STAT_RANK, e * k + j), rank, 0);
        }
    }
}

static void check_active(const moec_partial *p, const moec_event *ev, const moec_stats_meta *m)
{
    for (int64_t n = 0; n <= m->experts; n++) {
        double want = 0;
        for (int64_t t = 0; t < ev->n; t++) {
            int64_t used = 0;
            for (int64_t e = 0; e < m->experts; e++)
                used += selects(ev, ev->slots, t, e);
            want += used == n;
        }
        assert_close(cell(p, MOEC_STAT_ACTIVE, n), want, 0);
    }
}

static void check_layer_sums(const moec_partial *p, const moec_event *ev, const moec_stats_meta *m)
{
    double cosine = 0, h = 0, r = 0, shared = 0;
    for (int64_t t = 0; t < ev->n; t++) {
        cosine += cos_after(ev, m->hidden, t);
        h += sqrt(dot(ev->h + t * m->hidden, ev->h + t * m->hidden, m->hidden));
        r += sqrt(dot(ev->r + t * m->hidden, ev->r + t * m->hidden, m->hidden));
        if (ev->shared)
            shared += sqrt(dot(ev->shared + t * m->hidden, ev->shared + t * m->hidden, m->hidden));
    }
    assert_close(cell(p, MOEC_STAT_COS_MOE, 0), cosine, 1e-11);
    assert_close(cell(p, MOEC_STAT_NORMS_RES, 0), h, 1e-11);
    assert_close(cell(p, MOEC_STAT_NORMS_RES, 1), r, 1e-11);
    assert_close(cell(p, MOEC_STAT_NORMS_RES, 2), shared, 1e-11);
    const double *given[] = {ev->y_sum, ev->gy_sum, ev->xin_abs, ev->xin_sq, ev->act_abs, ev->act_sq, ev->gact_sq};
    const moec_stat kind[] = {MOEC_STAT_Y_SUM, MOEC_STAT_GY_SUM, MOEC_STAT_XIN_ABS, MOEC_STAT_XIN_SQ, MOEC_STAT_ACT_ABS,
                              MOEC_STAT_ACT_SQ, MOEC_STAT_GACT_SQ};
    for (size_t i = 0; m->tier > 0 && i < MOEC_COUNT(kind); i++)
        assert_memory_equal(p->block[kind[i]], given[i], (size_t)moec_stat_cells(m, kind[i]) * sizeof(double));
}

/* ---- tests -------------------------------------------------------------------------------------------------------- */

static int64_t moe_layer[LAYERS] = {1, 2, 4};
static char rule[] = "{}";

static moec_stats_meta make_meta(int64_t E, int64_t k, int64_t H, int tier)
{
    return (moec_stats_meta){.model = "0123", .model_type = "t", .router_rule = rule, .options = rule, .compute = "f32",
                             .layers = 5, .moe_layers = LAYERS, .experts = E, .top_k = k, .hidden = H,
                             .expert_width = 11, .moe_layer = moe_layer, .tier = tier};
}

static void observes_as_defined(void **state)
{
    static const struct {
        int64_t E, k, H, n;
        int tier;
        int64_t slots, nulls; /* slots 0: k */
    } cases[] = {{7, 3, 37, 23, 1, 0, 0}, {16, 4, 32, 50, 0, 0, 0}, {1, 1, 1, 5, 1, 0, 0},   {130, 9, 64, 12, 1, 0, 0},
                 {5, 5, 6, 9, 0, 0, 0},   {8, 1, 3, 40, 1, 0, 0},   {8, 2, 16, 40, 1, 8, 0}, {6, 1, 9, 30, 1, 6, 0},
                 {40, 3, 8, 60, 0, 40, 7}, {9, 4, 5, 20, 1, 0, 3}};
    const moec_model scaled = {.dims = {.residual_scale = 0.22}};
    (void)state;
    seed = 88172645463325252u;
    for (size_t i = 0; i < MOEC_COUNT(cases); i++) {
        moec_stats_meta m = make_meta(cases[i].E, cases[i].k, cases[i].H, cases[i].tier);
        moec_partial *p;
        sample s;
        assert_int_equal(moec_partial_new(&p, &m, NULL), MOEC_OK);
        for (int round = 0; round < 2; round++) { /* the second overwrites what the first left */
            make_wide(&s, &m, cases[i].n, round == 1, cases[i].slots ? cases[i].slots : m.top_k, m.experts + cases[i].nulls);
            if (i % 2)
                s.ev.shared = NULL;
            else
                s.ev.model = &scaled;
            moec_observe(p, &s.ev);
            assert_int_equal(p->has_prev, round == 0);
            assert_int_equal(p->has_guess, round == 0);
            check_per_expert(p, &s.ev, &m);
            check_shares(p, &s.ev, &m);
            check_histograms(p, &s.ev, &m);
            check_pairs(p, &s.ev, &m);
            check_active(p, &s.ev, &m);
            check_layer_sums(p, &s.ev, &m);
            free_sample(&s);
        }
        moec_partial_free(p);
    }
}

/* A histogram holds each token once; an empty chunk leaves the start values; blocks may be filled in place. */
static void keeps_its_laws(void **state)
{
    (void)state;
    seed = 42;
    moec_stats_meta m = make_meta(6, 2, 10, 1);
    moec_partial *p;
    sample s;
    assert_int_equal(moec_partial_new(&p, &m, NULL), MOEC_OK);
    assert_true(moec_partial_bytes(&m) > sizeof *p);
    make_sample(&s, &m, 30, false);
    double *own = p->block[MOEC_STAT_Y_SUM];
    for (int64_t i = 0; i < 60; i++)
        own[i] = (double)i;
    s.ev.y_sum = own;
    s.ev.xin_sq = NULL;
    moec_observe(p, &s.ev);
    for (int64_t i = 0; i < 60; i++) {
        assert_close(own[i], (double)i, 0);
        assert_close(cell(p, MOEC_STAT_XIN_SQ, i), 0, 0);
    }
    for (int share = 0; share < 20; share++) {
        double sum = 0;
        for (int64_t n = 0; n < 7; n++)
            sum += cell(p, MOEC_STAT_TOPP_COUNT, share * 7 + n);
        assert_close(sum, 30, 0);
    }
    s.ev.n = s.ev.n_seq = 0;
    moec_observe(p, &s.ev);
    for (int64_t e = 0; e < 6; e++) {
        assert_close(cell(p, MOEC_STAT_SELECTED, e), 0, 0);
        assert_close(cell(p, MOEC_STAT_COS_ROUTER_MAX, e), -1, 0);
    }
    free_sample(&s);
    moec_partial_free(p);
}

/* 1 - cos(h, h+r) of a routed output a million times smaller than the stream still has its digits. */
static void small_outputs_keep_their_digits(void **state)
{
    (void)state;
    seed = 7;
    moec_stats_meta m = make_meta(4, 1, 256, 0);
    moec_partial *p;
    sample s;
    assert_int_equal(moec_partial_new(&p, &m, NULL), MOEC_OK);
    make_sample(&s, &m, 1, true);
    for (int64_t i = 0; i < 256; i++) { /* r at a right angle to h: 1 - cos is tan^2 / 2 */
        s.h[i] = i % 2 ? 1.0f : 0.0f;
        s.r[i] = i % 2 ? 0.0f : 1e-6f;
    }
    s.gates[0] = s.y_norm[0] = 1;
    moec_observe(p, &s.ev);
    double got = cell(p, MOEC_STAT_UGNORM_SUM, s.ids[0]);
    assert_true(fabs(got - 0.5e-12) < 1e-3 * 0.5e-12);
    free_sample(&s);
    moec_partial_free(p);
}

/* Rows of the router without a network: those with a weight of 0 or more were selected. */
static void counts_what_has_no_network(void **state)
{
    (void)state;
    seed = 5;
    moec_stats_meta m = make_meta(4, 2, 8, 0);
    m.null_experts = 3;
    const float gates[] = {-1, 0, 0.25f, -1, -1, -1, 0.5f, -1, 0.5f};
    const double tokens[] = {1, 1, 2}, sums[] = {0.5, 0, 0.75};
    moec_partial *p;
    sample s;
    assert_int_equal(moec_partial_new(&p, &m, NULL), MOEC_OK);
    make_sample(&s, &m, 3, true);
    s.ev.null_gates = gates;
    moec_observe(p, &s.ev);
    for (int64_t i = 0; i < 3; i++) {
        assert_close(cell(p, MOEC_STAT_NULL_SELECTED, i), tokens[i], 0);
        assert_close(cell(p, MOEC_STAT_NULL_GATE_SUM, i), sums[i], 0);
    }
    free_sample(&s);
    moec_partial_free(p);
}

static void absorbs_into_the_right_places(void **state)
{
    (void)state;
    seed = 1234567;
    moec_stats_meta m = make_meta(7, 3, 20, 1);
    static const char *const names[] = {"a", "b"};
    moec_stats *s;
    moec_partial *p;
    sample one, two;
    assert_int_equal(moec_stats_new(&s, &m, 2, names, NULL), MOEC_OK);
    assert_int_equal(moec_partial_new(&p, &m, NULL), MOEC_OK);
    make_sample(&one, &m, 20, false);
    make_sample(&two, &m, 31, false);
    one.out_absmax[0] = two.out_absmax[0] = 3; /* a tie: the lower channel */
    one.channel[0] = 9, two.channel[0] = 4;
    one.out_absmax[1] = 5, two.out_absmax[1] = 2;
    one.channel[1] = 8, two.channel[1] = 1;
    one.out_absmax[2] = 1, two.out_absmax[2] = 2;
    one.channel[2] = 3, two.channel[2] = 6;
    moec_observe(p, &one.ev);
    moec_stats_absorb(s, 1, 2, p);
    moec_observe(p, &two.ev);
    moec_stats_absorb(s, 1, 2, p);
    for (int64_t e = 0; e < 7; e++) {
        const uint64_t *n = moec_stat_at(s, 1, MOEC_STAT_SELECTED, 2);
        double want = 0;
        for (int64_t t = 0; t < 31; t++)
            want += (t < 20 && selects(&one.ev, 3, t, e)) + selects(&two.ev, 3, t, e);
        assert_close((double)n[e], want, 0);
        assert_int_equal(((uint64_t *)moec_stat_at(s, 0, MOEC_STAT_SELECTED, 2))[e], 0);
        assert_int_equal(((uint64_t *)moec_stat_at(s, 1, MOEC_STAT_SELECTED, 1))[e], 0);
    }
    const int32_t *channel = moec_stat_at(s, 1, MOEC_STAT_OUT_CHANNEL, 2);
    const float *top = moec_stat_at(s, 1, MOEC_STAT_OUT_ABSMAX, 2);
    assert_int_equal(channel[0], 4);
    assert_int_equal(channel[1], 8);
    assert_int_equal(channel[2], 6);
    assert_true(top[0] == 3 && top[1] == 5 && top[2] == 2);
    uint64_t pairs = 0, others = 0;
    for (int64_t i = 0; i < 49; i++) {
        pairs += ((uint64_t *)moec_stat_at(s, 1, MOEC_STAT_TRANS, 1))[i];
        others += ((uint64_t *)moec_stat_at(s, 1, MOEC_STAT_TRANS, 0))[i];
    }
    assert_int_equal(pairs, 51 * 9);
    assert_int_equal(others, 0);
    assert_null(moec_stat_at(s, 1, MOEC_STAT_TRANS, 2));
    two.ev.prev_ids = two.ev.guess_ids = NULL; /* the first layer has no pair before it */
    moec_observe(p, &two.ev);
    moec_stats_absorb(s, 1, 0, p);
    for (int64_t i = 0; i < 49; i++)
        assert_int_equal(((uint64_t *)moec_stat_at(s, 1, MOEC_STAT_TRANS, 0))[i], 0);
    free_sample(&two);
    free_sample(&one);
    moec_partial_free(p);
    moec_stats_free(s);
}

static void survives_every_allocation_failure(void **state)
{
    (void)state;
    moec_stats_meta m = make_meta(4, 2, 8, 1);
    moec_status st = MOEC_ENOMEM;
    for (long i = 0; st == MOEC_ENOMEM; i++) {
        moec_partial *p;
        moec_err err = {MOEC_OK, ""};
        moec_test_allocs_left = i;
        st = moec_partial_new(&p, &m, &err);
        moec_test_allocs_left = LONG_MAX;
        assert_true(st == MOEC_OK ? p != NULL : p == NULL && err.text[0]);
        moec_partial_free(p);
    }
    assert_int_equal(st, MOEC_OK);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(observes_as_defined),
        cmocka_unit_test(keeps_its_laws),
        cmocka_unit_test(small_outputs_keep_their_digits),
        cmocka_unit_test(counts_what_has_no_network), cmocka_unit_test(absorbs_into_the_right_places),
        cmocka_unit_test(survives_every_allocation_failure),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
