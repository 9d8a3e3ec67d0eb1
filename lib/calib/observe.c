/* Turns what one chunk did in one MoE layer into partial statistics. One function for each group of statistics; each walks
 * the chunk's tokens once, and all sums are float64. */
#include "calib/observe.h"

#include "base/mem.h"
#include "calib/stats_internal.h"
#include "num/vec.h"

#include <math.h>
#include <string.h>

enum { DIGITS = 256, RATIO_BINS = 1024, CUM_BINS = 256, SHARES = 20, GRAM_ROWS = 4 };

/* ---- partials ----------------------------------------------------------------------------------------------------- */

static bool has_block(const moec_stats_meta *m, moec_stat kind)
{
    const moec_stat_kind *k = &moec_stat_kinds[kind];
    return k->layers != 0 && k->tier <= m->tier && moec_stat_blocks(m, kind) > 0;
}

moec_status moec_partial_new(moec_partial **out, const moec_stats_meta *meta, moec_err *err)
{
    moec_status st = MOEC_OK;
    size_t experts = (size_t)meta->experts;
    MOEC_TRY(MOEC_NEW(*out, 1, err));
    (*out)->meta = *meta;
    MOEC_TRY(MOEC_NEW((*out)->order, experts, err));
    MOEC_TRY(MOEC_NEW((*out)->spare, experts, err));
    MOEC_TRY(MOEC_NEW((*out)->row, GRAM_ROWS * experts, err));
    for (int k = 0; k < MOEC_STAT_COUNT; k++)
        if (has_block(meta, (moec_stat)k))
            MOEC_TRY(moec_alloc(&(*out)->block[k], (size_t)moec_stat_cells(meta, (moec_stat)k),
                                moec_cell_bytes(moec_stat_kinds[k].cell), err));
done:
    if (st != MOEC_OK) {
        moec_partial_free(*out);
        *out = NULL;
    }
    return st;
}

void moec_partial_free(moec_partial *p)
{
    if (!p)
        return;
    for (int k = 0; k < MOEC_STAT_COUNT; k++)
        moec_free(p->block[k]);
    moec_free(p->row);
    moec_free(p->spare);
    moec_free(p->order);
    moec_free(p);
}

size_t moec_partial_bytes(const moec_stats_meta *meta)
{
    size_t n = sizeof(moec_partial) + (size_t)meta->experts * (2 * sizeof(uint64_t) + GRAM_ROWS * sizeof(double));
    for (int k = 0; k < MOEC_STAT_COUNT; k++)
        if (has_block(meta, (moec_stat)k))
            n += (size_t)moec_stat_cells(meta, (moec_stat)k) * moec_cell_bytes(moec_stat_kinds[k].cell);
    return n;
}

/* ---- who was selected, with what weight --------------------------------------------------------------------------- */

/* Experts of a token: empty slots are the last. */
static inline int64_t n_used(const int32_t *ids, int64_t slots)
{
    int64_t n = slots;
    while (n > 0 && ids[n - 1] < 0)
        n--;
    return n;
}

static void count_selected(moec_partial *p, const moec_event *ev)
{
    const int64_t k = p->meta.top_k, slots = ev->slots;
    uint64_t *selected = p->block[MOEC_STAT_SELECTED], *rank = p->block[MOEC_STAT_RANK];
    uint64_t *active = p->block[MOEC_STAT_ACTIVE];
    double *sum = p->block[MOEC_STAT_GATE_SUM], *sq = p->block[MOEC_STAT_GATE_SQ];
    double *top1 = p->block[MOEC_STAT_GATE_TOP1_SUM], *prob = p->block[MOEC_STAT_PROB_SELECTED];
    for (int64_t t = 0; t < ev->n; t++) {
        const int64_t used = n_used(ev->ids + t * slots, slots);
        for (int64_t j = 0; j < used; j++) {
            int64_t e = ev->ids[t * slots + j];
            double g = (double)ev->gates[t * slots + j];
            selected[e]++;
            rank[e * k + (j < k ? j : k - 1)]++;
            sum[e] += g;
            sq[e] += g * g;
            prob[e] += (double)ev->scores[t * ev->ld + e];
            if (j == 0)
                top1[e] += g;
        }
        active[used]++;
    }
}

static void count_nulls(moec_partial *p, const moec_event *ev)
{
    const int64_t n = p->meta.null_experts;
    uint64_t *selected = p->block[MOEC_STAT_NULL_SELECTED];
    double *sum = p->block[MOEC_STAT_NULL_GATE_SUM];
    for (int64_t i = 0; ev->null_gates && selected && i < ev->n * n; i++) {
        const double g = (double)ev->null_gates[i];
        if (g < 0.0)
            continue;
        selected[i % n]++;
        sum[i % n] += g;
    }
}

static int64_t bin_of(double part, double whole, int64_t bins)
{
    double x = whole > 0 ? part / whole * (double)bins : 0;
    return x >= (double)bins ? bins - 1 : x > 0 ? (int64_t)x : 0;
}

static void count_weights(moec_partial *p, const moec_event *ev)
{
    const int64_t k = p->meta.top_k, slots = ev->slots;
    uint32_t *ratio = p->block[MOEC_STAT_RATIO_HIST], *before = p->block[MOEC_STAT_CUMGATE_HIST];
    for (int64_t t = 0; t < ev->n; t++) {
        const float *g = ev->gates + t * slots;
        const int64_t used = n_used(ev->ids + t * slots, slots), first = used < k ? used : k;
        double sum = 0, so_far = 0;
        for (int64_t j = 0; j < used; j++)
            sum += (double)g[j];
        for (int64_t j = 0; j < first; j++) {
            before[j * CUM_BINS + bin_of(so_far, sum, CUM_BINS)]++;
            so_far += (double)g[j];
        }
        for (int64_t j = 1; j < first; j++) /* there is no block when k = 1 */
            ratio[(j - 1) * RATIO_BINS + bin_of((double)g[j], (double)g[0], RATIO_BINS)]++;
    }
}

/* Pairs within the token, with the layer before, and with what was guessed from the layer before. */
static void count_pairs(moec_partial *p, const moec_event *ev)
{
    const int64_t k = p->meta.top_k, slots = ev->slots, n_experts = p->meta.experts;
    uint64_t *coact = p->block[MOEC_STAT_COACT], *trans = p->block[MOEC_STAT_TRANS];
    uint64_t *hit = p->block[MOEC_STAT_PREFETCH_HIT];
    p->has_prev = ev->prev_ids && trans;
    p->has_guess = ev->guess_ids && hit;
    for (int64_t t = 0; t < ev->n; t++) {
        const int32_t *ids = ev->ids + t * slots;
        const int64_t used = n_used(ids, slots);
        for (int64_t i = 0; i < used; i++)
            for (int64_t j = 0; j < used; j++)
                coact[ids[i] * n_experts + ids[j]]++;
        for (int64_t i = 0; p->has_prev && i < slots; i++)
            for (int64_t j = 0; ev->prev_ids[t * slots + i] >= 0 && j < used; j++)
                trans[ev->prev_ids[t * slots + i] * n_experts + ids[j]]++;
        for (int64_t j = 0; p->has_guess && j < used; j++)
            for (int64_t i = 0; i < slots; i++)
                if (ev->guess_ids[t * slots + i] == ids[j]) {
                    hit[j < k ? j : k - 1]++;
                    break;
                }
    }
}

/* ---- scores and logits of all experts ----------------------------------------------------------------------------- */

static void sum_scores(moec_partial *p, const moec_event *ev)
{
    const int64_t n_experts = p->meta.experts;
    double *prob = p->block[MOEC_STAT_PROB_SUM], *by_seq = p->block[MOEC_STAT_PROB_SEQ_SUM], *seq = p->row;
    double *z_sum = p->block[MOEC_STAT_LOGIT_SUM], *z_sq = p->block[MOEC_STAT_LOGIT_SQ];
    for (int64_t s = 0; s < ev->n_seq; s++) {
        const int64_t lo = ev->seq[s], hi = ev->seq[s + 1];
        memset(seq, 0, (size_t)n_experts * sizeof *seq);
        for (int64_t t = lo; t < hi; t++) {
            const float *score = ev->scores + t * ev->ld, *z = ev->logits + t * ev->ld;
            for (int64_t e = 0; e < n_experts; e++) {
                double v = (double)z[e];
                seq[e] += (double)score[e];
                z_sum[e] += v;
                z_sq[e] += v * v;
            }
        }
        for (int64_t e = 0; lo < hi && e < n_experts; e++) {
            prob[e] += seq[e];
            by_seq[e] += seq[e] / (double)(hi - lo);
        }
    }
}

/* Number that ascends as the logit descends. */
static uint32_t descending_key(float z)
{
    uint32_t bits;
    float plain = z + 0.0f; /* -0 and 0 are one value */
    memcpy(&bits, &plain, sizeof bits);
    return bits >> 31 ? bits : ~bits & 0x7fffffffu;
}

/* Experts by descending logit, the lowest id first on ties, ids in the low half of `order`. Few are compared all with
 * all; for many a stable radix sort, byte by byte, whose cost is the same for all values and grows with E alone. */
static void sort_logits(uint64_t *order, uint64_t *spare, const float *z, int64_t n)
{
    uint32_t at[4][DIGITS];
    if (n <= MOEC_ORDER_MOST) {
        int32_t few[MOEC_ORDER_MOST];
        moec_order(few, z, n);
        for (int64_t e = 0; e < n; e++)
            order[e] = (uint64_t)(uint32_t)few[e];
        return;
    }
    memset(at, 0, sizeof at);
    for (int64_t e = 0; e < n; e++) {
        uint32_t key = descending_key(z[e]);
        order[e] = (uint64_t)key << 32 | (uint64_t)e;
        for (int d = 0; d < 4; d++)
            at[d][key >> (8 * d) & 255]++;
    }
    for (int d = 0; d < 4; d++) {
        uint32_t sum = 0;
        for (int i = 0; i < DIGITS; i++) {
            uint32_t count = at[d][i];
            at[d][i] = sum;
            sum += count;
        }
        for (int64_t e = 0; e < n; e++)
            spare[at[d][order[e] >> (32 + 8 * d) & 255]++] = order[e];
        uint64_t *swap = order;
        order = spare;
        spare = swap;
    }
}

static void rank_scores(moec_partial *p, const moec_event *ev)
{
    const int64_t n_experts = p->meta.experts, k = p->meta.top_k;
    double *top1 = p->block[MOEC_STAT_MARKER_TOP1], *topk = p->block[MOEC_STAT_MARKER_TOPK];
    uint32_t *need = p->block[MOEC_STAT_TOPP_COUNT];
    for (int64_t t = 0; t < ev->n; t++) {
        const float *z = ev->logits + t * ev->ld, *score = ev->scores + t * ev->ld;
        double total = 0, so_far = 0;
        sort_logits(p->order, p->spare, z, n_experts);
        for (int64_t i = 0; i < n_experts; i++)
            total += (double)score[p->order[i] & 0xffffffffu];
        for (int64_t i = 0; i < k; i++)
            topk[p->order[i] & 0xffffffffu] += (double)z[p->order[i] & 0xffffffffu];
        top1[p->order[0] & 0xffffffffu] += (double)z[p->order[0] & 0xffffffffu];
        int64_t n = 0;
        for (int share = 0; share < SHARES; share++) { /* the sums are in one order, so the last equals the total */
            while (so_far * SHARES < total * (share + 1) && n < n_experts)
                so_far += (double)score[p->order[n++] & 0xffffffffu];
            need[share * (n_experts + 1) + n]++;
        }
    }
}

/* Sum of z z^T: the upper triangle, four tokens at a time, then its mirror image. */
static void sum_gram(moec_partial *p, const moec_event *ev)
{
    const int64_t n = p->meta.experts;
    double *gram = p->block[MOEC_STAT_LOGIT_GRAM], *row = p->row;
    if (!gram)
        return;
    for (int64_t t0 = 0; t0 < ev->n; t0 += GRAM_ROWS) {
        for (int64_t i = 0; i < GRAM_ROWS; i++)
            for (int64_t e = 0; e < n; e++)
                row[i * n + e] = t0 + i < ev->n ? (double)ev->logits[(t0 + i) * ev->ld + e] : 0;
        for (int64_t e = 0; e < n; e++) {
            const double a = row[e], b = row[n + e], c = row[2 * n + e], d = row[3 * n + e];
            for (int64_t f = e; f < n; f++)
                gram[e * n + f] += (a * row[f] + b * row[n + f]) + (c * row[2 * n + f] + d * row[3 * n + f]);
        }
    }
    for (int64_t e = 0; e < n; e++)
        for (int64_t f = 0; f < e; f++)
            gram[e * n + f] = gram[f * n + e];
}

/* ---- norms and angles --------------------------------------------------------------------------------------------- */

static void sum_norms(moec_partial *p, const moec_event *ev)
{
    const int64_t slots = ev->slots, width = p->meta.hidden;
    const double part = ev->model ? ev->model->dims.residual_scale : 1.0;
    double *norm = p->block[MOEC_STAT_NORM_SUM], *norm_sq = p->block[MOEC_STAT_NORM_SQ];
    double *gnorm = p->block[MOEC_STAT_GNORM_SUM], *gnorm_sq = p->block[MOEC_STAT_GNORM_SQ];
    double *ugnorm = p->block[MOEC_STAT_UGNORM_SUM], *cos_moe = p->block[MOEC_STAT_COS_MOE];
    double *res = p->block[MOEC_STAT_NORMS_RES];
    double *cos_sum = p->block[MOEC_STAT_COS_ROUTER], *cos_max = p->block[MOEC_STAT_COS_ROUTER_MAX];
    for (int64_t t = 0; t < ev->n; t++) {
        double v[4]; /* h.h, h.r, r.r, x.x in float64: 1 - cos(h, h+r) of a small r would drown in float32 sums */
        moec_products(v, ev->h + t * width, ev->r + t * width, ev->x + t * width, width);
        const double r_norm = sqrt(v[2]);
        v[1] *= part;
        v[2] *= part * part;
        /* h.(h+r) and |h+r|^2 follow from the products; the latter may round to just below 0 when r = -h. */
        const double after = v[0] + 2 * v[1] + v[2], both = v[0] * after;
        const double cosine = both > 0 ? (v[0] + v[1]) / sqrt(both) : 0, u = fmax(1 - cosine, 0);
        const double x_norm = sqrt(v[3]);
        cos_moe[0] += cosine;
        res[0] += sqrt(v[0]);
        res[1] += r_norm;
        for (int64_t j = 0, used = n_used(ev->ids + t * slots, slots); j < used; j++) {
            const int64_t e = ev->ids[t * slots + j];
            const double g = (double)ev->gates[t * slots + j], y = (double)ev->y_norm[t * slots + j], gy = g * y;
            const double scale = x_norm * (double)ev->router_norm[e];
            const double z = (double)ev->logits[t * ev->ld + e] - (ev->router_bias ? (double)ev->router_bias[e] : 0);
            const double angle = scale > 0 ? z / scale : 0;
            norm[e] += y;
            norm_sq[e] += y * y;
            gnorm[e] += gy;
            gnorm_sq[e] += gy * gy;
            ugnorm[e] += u * gy;
            cos_sum[e] += angle;
            cos_max[e] = angle <= cos_max[e] ? cos_max[e] : angle; /* a NaN comes through and is found at saving */
        }
    }
}

static void sum_shared(moec_partial *p, const moec_event *ev)
{
    const int64_t width = p->meta.hidden;
    double *res = p->block[MOEC_STAT_NORMS_RES], v[4];
    for (int64_t t = 0; ev->shared && t < ev->n; t++) {
        const float *y = ev->shared + t * width;
        moec_products(v, y, y, y, width);
        res[2] += sqrt(v[0]);
    }
}

/* ---- the whole ---------------------------------------------------------------------------------------------------- */

/* Statistics that the layer pass has already summed over the chunk. */
static const void *summed(const moec_event *ev, moec_stat kind)
{
    switch (kind) {
    case MOEC_STAT_OUT_ABSMAX: return ev->out_absmax;
    case MOEC_STAT_OUT_CHANNEL: return ev->out_channel;
    case MOEC_STAT_IN_ABSMAX: return ev->in_absmax;
    case MOEC_STAT_Y_SUM: return ev->y_sum;
    case MOEC_STAT_GY_SUM: return ev->gy_sum;
    case MOEC_STAT_ACT_ABS: return ev->act_abs;
    case MOEC_STAT_ACT_SQ: return ev->act_sq;
    case MOEC_STAT_GACT_SQ: return ev->gact_sq;
    case MOEC_STAT_XIN_ABS: return ev->xin_abs;
    case MOEC_STAT_XIN_SQ: return ev->xin_sq;
    default: return NULL;
    }
}

void moec_observe(moec_partial *p, const moec_event *ev)
{
    for (int k = 0; k < MOEC_STAT_COUNT; k++) {
        const void *given = summed(ev, (moec_stat)k);
        int64_t cells = moec_stat_cells(&p->meta, (moec_stat)k);
        if (!p->block[k] || given == p->block[k])
            continue;
        if (given)
            memcpy(p->block[k], given, (size_t)cells * moec_cell_bytes(moec_stat_kinds[k].cell));
        else
            moec__stat_reset((moec_stat)k, p->block[k], cells);
    }
    count_selected(p, ev);
    count_nulls(p, ev);
    count_weights(p, ev);
    count_pairs(p, ev);
    sum_scores(p, ev);
    rank_scores(p, ev);
    sum_gram(p, ev);
    sum_norms(p, ev);
    sum_shared(p, ev);
}

void moec_stats_absorb(moec_stats *s, int domain, int64_t moe_layer, const moec_partial *p)
{
    void *sum[MOEC_STAT_COUNT] = {NULL};
    for (int k = 0; k < MOEC_STAT_COUNT; k++)
        sum[k] = moec_stat_at(s, domain, (moec_stat)k, moe_layer - (moec_stat_kinds[k].layers == 2));
    /* From the last kind to the first, so that a channel is decided before the maximum it follows changes. */
    for (int k = MOEC_STAT_COUNT - 1; k >= 0; k--) {
        bool filled = k == MOEC_STAT_TRANS ? p->has_prev : k == MOEC_STAT_PREFETCH_HIT ? p->has_guess : true;
        if (sum[k] && p->block[k] && filled)
            moec_stat_add((moec_stat)k, sum[k], p->block[k], moec_stat_cells(&s->meta, (moec_stat)k),
                          k > 0 ? sum[k - 1] : NULL, k > 0 ? p->block[k - 1] : NULL);
    }
}
