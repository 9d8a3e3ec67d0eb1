/* The table of statistics: shape, unit, bounds and merge rule of every kind, and the arithmetic on blocks that follows
 * from it. */
#include "base/mem.h"
#include "calib/stats_internal.h"

#include <math.h>
#include <string.h>

#define U64 MOEC_CELL_U64
#define U32 MOEC_CELL_U32
#define F64 MOEC_CELL_F64
#define F32 MOEC_CELL_F32
#define I32 MOEC_CELL_I32
#define ADD MOEC_MERGE_ADD
#define MAX MOEC_MERGE_MAX
#define FOLLOW MOEC_MERGE_FOLLOW
#define ANY (-(double)INFINITY)

/* name, shape, cell, merge, tier, layers, start, low, unit, about */
const moec_stat_kind moec_stat_kinds[MOEC_STAT_COUNT] = {
    [MOEC_STAT_SELECTED] = {"selected", "E", U64, ADD, 0, 1, 0, 0, "tokens", "tokens that select expert e"},
    [MOEC_STAT_RANK] = {"rank", "Ek", U64, ADD, 0, 1, 0, 0, "tokens",
                        "tokens for which expert e is the j-th choice by weight, the last also for choices behind it"},
    [MOEC_STAT_GATE_SUM] = {"gate_sum", "E", F64, ADD, 0, 1, 0, 0, "weight",
                            "sum of the applied weight g over the tokens that select e"},
    [MOEC_STAT_GATE_SQ] = {"gate_sq", "E", F64, ADD, 0, 1, 0, 0, "weight^2", "sum of g^2"},
    [MOEC_STAT_GATE_TOP1_SUM] = {"gate_top1_sum", "E", F64, ADD, 0, 1, 0, 0, "weight",
                                 "sum of g over the tokens whose first choice is e"},
    [MOEC_STAT_PROB_SUM] = {"prob_sum", "E", F64, ADD, 0, 1, 0, 0, "score",
                            "sum of the full score (softmax, sigmoid or ReLU of the logits) over all tokens"},
    [MOEC_STAT_PROB_SEQ_SUM] = {"prob_seq_sum", "E", F64, ADD, 0, 1, 0, 0, "score",
                                "sum over sequences of the mean score"},
    [MOEC_STAT_LOGIT_SUM] = {"logit_sum", "E", F64, ADD, 0, 1, 0, ANY, "logit",
                             "sum of the router logit z over all tokens"},
    [MOEC_STAT_LOGIT_SQ] = {"logit_sq", "E", F64, ADD, 0, 1, 0, 0, "logit^2", "sum of z^2 over all tokens"},
    [MOEC_STAT_MARKER_TOP1] = {"marker_top1", "E", F64, ADD, 0, 1, 0, ANY, "logit",
                               "sum of z over the tokens where e has the largest logit"},
    [MOEC_STAT_MARKER_TOPK] = {"marker_topk", "E", F64, ADD, 0, 1, 0, ANY, "logit",
                               "sum of z over the tokens where e is among the k largest logits"},
    [MOEC_STAT_NORM_SUM] = {"norm_sum", "E", F64, ADD, 0, 1, 0, 0, "activation",
                            "sum of |y|, y the un-gated output of expert e, over the tokens that select e"},
    [MOEC_STAT_NORM_SQ] = {"norm_sq", "E", F64, ADD, 0, 1, 0, 0, "activation^2", "sum of |y|^2"},
    [MOEC_STAT_GNORM_SUM] = {"gnorm_sum", "E", F64, ADD, 0, 1, 0, 0, "activation", "sum of g |y|"},
    [MOEC_STAT_GNORM_SQ] = {"gnorm_sq", "E", F64, ADD, 0, 1, 0, 0, "activation^2", "sum of g^2 |y|^2"},
    [MOEC_STAT_UGNORM_SUM] = {"ugnorm_sum", "E", F64, ADD, 0, 1, 0, 0, "activation",
                              "sum of max(1 - cos(h, h+r), 0) g |y|, r the routed output"},
    [MOEC_STAT_OUT_ABSMAX] = {"out_absmax", "E", F32, MAX, 0, 1, 0, 0, "activation",
                              "largest |y_i| at the output of down_proj"},
    [MOEC_STAT_OUT_CHANNEL] = {"out_channel", "E", I32, FOLLOW, 0, 1, 0, 0, "channel",
                               "hidden channel of out_absmax, the lowest on ties"},
    [MOEC_STAT_IN_ABSMAX] = {"in_absmax", "E", F32, MAX, 0, 1, 0, 0, "activation",
                             "largest |a_i| at the input of down_proj"},
    [MOEC_STAT_COS_MOE] = {"cos_moe", "", F64, ADD, 0, 1, 0, ANY, "cosine",
                           "sum of cos(h, h+r), the residual stream before and after the MoE"},
    [MOEC_STAT_COS_BLOCK] = {"cos_block", "nn", F64, ADD, 0, 0, 0, ANY, "cosine",
                             "sum of cos(H_i, H_j) over sampled tokens, H_i the residual stream before layer i"},
    [MOEC_STAT_BLOCK_TOKENS] = {"block_tokens", "", U64, ADD, 0, 0, 0, 0, "tokens", "tokens summed into cos_block"},
    [MOEC_STAT_NORMS_RES] = {"norms_res", "3", F64, ADD, 0, 1, 0, 0, "activation",
                             "sums of |h|, |r| and |shared expert output|"},
    [MOEC_STAT_RATIO_HIST] = {"ratio_hist", "jr", U32, ADD, 0, 1, 0, 0, "tokens",
                              "histogram over [0,1] of the weight of choice j+1 over that of choice 1"},
    [MOEC_STAT_CUMGATE_HIST] = {"cumgate_hist", "kc", U32, ADD, 0, 1, 0, 0, "tokens",
                                "histogram over [0,1] of the share of the selected weight that stands before choice j"},
    [MOEC_STAT_TOPP_COUNT] = {"topp_count", "pf", U32, ADD, 0, 1, 0, 0, "tokens",
                              "tokens that need n experts to reach the share p = 0.05, 0.10 .. 1.00 of the score"},
    [MOEC_STAT_COACT] = {"coact", "EE", U64, ADD, 0, 1, 0, 0, "tokens", "tokens that select both experts"},
    [MOEC_STAT_TRANS] = {"trans", "EE", U64, ADD, 0, 2, 0, 0, "tokens",
                         "tokens that select e at this MoE layer and e' at the next"},
    [MOEC_STAT_PREFETCH_HIT] = {"prefetch_hit", "k", U64, ADD, 0, 2, 0, 0, "tokens",
                                "tokens whose j-th choice at the next MoE layer can be told from this one's input"},
    [MOEC_STAT_COS_ROUTER] = {"cos_router", "E", F64, ADD, 0, 1, 0, ANY, "cosine",
                              "sum of cos(x, w_e) over the tokens that select e"},
    [MOEC_STAT_COS_ROUTER_MAX] = {"cos_router_max", "E", F64, MAX, 0, 1, -1, ANY, "cosine",
                                  "largest cos(x, w_e) over the tokens that select e, -1 where there is none"},
    [MOEC_STAT_ACTIVE] = {"active", "f", U64, ADD, 0, 1, 0, 0, "tokens", "tokens that use n experts, n = 0 .. E"},
    [MOEC_STAT_NULL_SELECTED] = {"null_selected", "N", U64, ADD, 0, 1, 0, 0, "tokens",
                                 "tokens that select the i-th expert without a network"},
    [MOEC_STAT_NULL_GATE_SUM] = {"null_gate_sum", "N", F64, ADD, 0, 1, 0, 0, "weight",
                                 "sum of its applied weight over the tokens that select it"},
    [MOEC_STAT_PROB_SELECTED] = {"prob_selected", "E", F64, ADD, 0, 1, 0, 0, "score",
                                 "sum of the full score, before it is renormalised, over the tokens that select e"},
    [MOEC_STAT_LOGIT_GRAM] = {"logit_gram", "EE", F64, ADD, 1, 1, 0, ANY, "logit^2", "sum of z z^T over all tokens"},
    [MOEC_STAT_Y_SUM] = {"y_sum", "EH", F64, ADD, 1, 1, 0, ANY, "activation", "sum of y over the tokens that select e"},
    [MOEC_STAT_GY_SUM] = {"gy_sum", "EH", F64, ADD, 1, 1, 0, ANY, "activation", "sum of g y"},
    [MOEC_STAT_ACT_ABS] = {"act_abs", "EI", F64, ADD, 1, 1, 0, 0, "activation",
                           "sum of |a|, a the input of down_proj, over the tokens that select e"},
    [MOEC_STAT_ACT_SQ] = {"act_sq", "EI", F64, ADD, 1, 1, 0, 0, "activation^2", "sum of a^2"},
    [MOEC_STAT_GACT_SQ] = {"gact_sq", "EI", F64, ADD, 1, 1, 0, 0, "activation^2", "sum of g^2 a^2"},
    [MOEC_STAT_XIN_ABS] = {"xin_abs", "EH", F64, ADD, 1, 1, 0, 0, "activation",
                           "sum of |x|, x the expert's input, over the tokens that select e"},
    [MOEC_STAT_XIN_SQ] = {"xin_sq", "EH", F64, ADD, 1, 1, 0, 0, "activation^2", "sum of x^2"},
    [MOEC_STAT_QUANT_SQ] = {"quant_sq", "E45", F64, ADD, 2, 1, 0, 0, "relative",
                            "gate, up, down alone and all three at 1, 2, 3, 4, 8 bits: sum of g^2 |y - y_q|^2 / mean(h^2)"},
    [MOEC_STAT_QUANT_FRO] = {"quant_fro", "E5", F64, ADD, 2, 1, 0, 0, "activation",
                             "at 1, 2, 3, 4, 8 bits: sum over sequences of the root of the sum of g^2 |y - y_q|^2"},
    [MOEC_STAT_QUANT_KL] = {"quant_kl", "", F64, ADD, 2, 1, 0, 0, "nats",
                            "sum of KL to the original when the layer's experts alone have 2 bits; 0: not measured"},
};

typedef struct cell_row {
    size_t bytes;
    moec_dtype dtype;
} cell_row;
static const cell_row cells[] = {
    [U64] = {8, MOEC_U64}, [U32] = {4, MOEC_U32}, [F64] = {8, MOEC_F64}, [F32] = {4, MOEC_F32}, [I32] = {4, MOEC_I32},
};

size_t moec_cell_bytes(moec_cell c)
{
    return cells[c].bytes;
}

moec_dtype moec__cell_dtype(moec_cell c)
{
    return cells[c].dtype;
}

static int64_t axis(const moec_stats_meta *m, char letter)
{
    switch (letter) {
    case 'E': return m->experts;
    case 'N': return m->null_experts;
    case 'f': return m->experts + 1;
    case 'k': return m->top_k;
    case 'j': return m->top_k - 1;
    case 'H': return m->hidden;
    case 'I': return m->expert_width;
    case 'n': return m->layers + 1;
    case 'r': return 1024;
    case 'c': return 256;
    case 'p': return 20;
    default: return letter - '0';
    }
}

int64_t moec_stat_cells(const moec_stats_meta *m, moec_stat kind)
{
    int64_t n = 1;
    for (const char *c = moec_stat_kinds[kind].shape; *c; c++)
        n *= axis(m, *c);
    return n;
}

int64_t moec_stat_blocks(const moec_stats_meta *m, moec_stat kind)
{
    if (moec_stat_cells(m, kind) == 0)
        return 0;
    int layers = moec_stat_kinds[kind].layers;
    return layers == 0 ? 1 : m->moe_layers + 1 - layers;
}

int moec__stat_dims(const moec_stats_meta *m, moec_stat kind, int64_t dim[MOEC_STATS_MAX_RANK])
{
    int rank = 0;
    if (moec_stat_kinds[kind].layers > 0)
        dim[rank++] = moec_stat_blocks(m, kind);
    for (const char *c = moec_stat_kinds[kind].shape; *c; c++)
        dim[rank++] = axis(m, *c);
    return rank;
}

void moec__stat_reset(moec_stat kind, void *to, int64_t n)
{
    const moec_stat_kind *k = &moec_stat_kinds[kind];
    if (k->start == 0) {
        memset(to, 0, (size_t)n * cells[k->cell].bytes);
        return;
    }
    double *v = to; /* the only start that is not 0 is that of a float64 maximum */
    for (int64_t i = 0; i < n; i++)
        v[i] = k->start;
}

moec_status moec__stat_new(void **out, const moec_stats_meta *m, moec_stat kind, moec_err *err)
{
    const moec_stat_kind *k = &moec_stat_kinds[kind];
    size_t n;
    *out = NULL;
    if (!moec_mul_size(&n, (size_t)moec_stat_cells(m, kind), (size_t)moec_stat_blocks(m, kind)))
        return moec_fail(err, MOEC_ENOMEM, "%s: more cells than this machine can address", k->name);
    moec_status st = moec_alloc(out, n, cells[k->cell].bytes, err);
    if (st == MOEC_OK && *out && k->start != 0)
        moec__stat_reset(kind, *out, (int64_t)n);
    return moec_within(err, st, "%s", k->name);
}

/* ---- merging of cells: one function for each cell type and rule that the table holds ----------------------------- */

typedef void merge_fn(void *sum, const void *part, int64_t n, const float *lead_sum, const float *lead_part);

/* Counts stop at the top instead of starting again from 0. */
static void add_u64(void *sum, const void *part, int64_t n, const float *lead_sum, const float *lead_part)
{
    uint64_t *s = sum;
    const uint64_t *p = part;
    (void)lead_sum, (void)lead_part;
    for (int64_t i = 0; i < n; i++) {
        uint64_t v = s[i] + p[i];
        s[i] = v < p[i] ? UINT64_MAX : v;
    }
}

static void add_u32(void *sum, const void *part, int64_t n, const float *lead_sum, const float *lead_part)
{
    uint32_t *s = sum;
    const uint32_t *p = part;
    (void)lead_sum, (void)lead_part;
    for (int64_t i = 0; i < n; i++) {
        uint32_t v = s[i] + p[i];
        s[i] = v < p[i] ? UINT32_MAX : v;
    }
}

static void add_f64(void *sum, const void *part, int64_t n, const float *lead_sum, const float *lead_part)
{
    double *s = sum;
    const double *p = part;
    (void)lead_sum, (void)lead_part;
    for (int64_t i = 0; i < n; i++)
        s[i] += p[i];
}

/* A NaN on either side stays, so that the check before saving finds it. */
static void max_f64(void *sum, const void *part, int64_t n, const float *lead_sum, const float *lead_part)
{
    double *s = sum;
    const double *p = part;
    (void)lead_sum, (void)lead_part;
    for (int64_t i = 0; i < n; i++)
        s[i] = s[i] >= p[i] || isnan(s[i]) ? s[i] : p[i];
}

static void max_f32(void *sum, const void *part, int64_t n, const float *lead_sum, const float *lead_part)
{
    float *s = sum;
    const float *p = part;
    (void)lead_sum, (void)lead_part;
    for (int64_t i = 0; i < n; i++)
        s[i] = s[i] >= p[i] || isnan(s[i]) ? s[i] : p[i];
}

static void follow_i32(void *sum, const void *part, int64_t n, const float *lead_sum, const float *lead_part)
{
    int32_t *s = sum;
    const int32_t *p = part;
    for (int64_t i = 0; i < n; i++)
        if (lead_part[i] > lead_sum[i] || (lead_part[i] == lead_sum[i] && p[i] < s[i]))
            s[i] = p[i];
}

static merge_fn *const merges[][3] = {
    [U64] = {[ADD] = add_u64},
    [U32] = {[ADD] = add_u32},
    [F64] = {[ADD] = add_f64, [MAX] = max_f64},
    [F32] = {[MAX] = max_f32},
    [I32] = {[FOLLOW] = follow_i32},
};

void moec_stat_add(moec_stat kind, void *sum, const void *part, int64_t n, const void *lead_sum, const void *lead_part)
{
    merges[moec_stat_kinds[kind].cell][moec_stat_kinds[kind].merge](sum, part, n, lead_sum, lead_part);
}
