/* Methods as data: what each is called, where it was published, its formula, what statistics it needs, and the function that
 * makes a plan. A new method is one moec_method in a file of its own (or a row beside its kin) and one line in
 * method_table.inc. */
#ifndef MOEC_METHOD_METHOD_H
#define MOEC_METHOD_METHOD_H

#include "base/opt.h"
#include "calib/stats.h"
#include "method/plan.h"

typedef enum moec_method_kind { MOEC_PRUNE, MOEC_MERGE, MOEC_FACTOR, MOEC_QUANTIZE } moec_method_kind;
/* What a prune method takes away: whole experts, neurons inside all experts, single weights (zeros), whole layers. */
typedef enum moec_grain {
    MOEC_GRAIN_EXPERTS, MOEC_GRAIN_NEURONS, MOEC_GRAIN_WEIGHTS, MOEC_GRAIN_BLOCKS, MOEC_GRAIN_COUNT
} moec_grain;
/** "experts", "neurons", "weights", "blocks". */
MOEC_API const char *moec_grain_name(moec_grain g);

/* Experts that are kept whatever their score: flag[l*experts + e] for MoE layer l. */
typedef struct moec_guard {
    int64_t layers, experts, count;
    bool *flag;
} moec_guard;

/* How many experts each layer keeps; see moec_allocate. */
typedef enum moec_allocation { MOEC_ALLOCATE_UNIFORM, MOEC_ALLOCATE_GLOBAL, MOEC_ALLOCATE_MASS, MOEC_ALLOCATE_LOSS } moec_allocation;

/* What a plan is asked for. All borrowed. */
typedef struct moec_request {
    const moec_model *model;
    const char *fingerprint;   /* of the model */
    const moec_stats *stats;   /* NULL: none */
    const char *stats_digest;  /* of the statistics file, or NULL */
    const moec_guard *guard;   /* NULL: nothing is protected */
    const char *guard_name;    /* how the protection was asked for: "super", a digest; recorded in the plan, or NULL */
    double share;              /* of the experts of each layer that is removed; used when keep is 0 */
    int64_t keep;              /* experts kept in each layer */
    int64_t seed;
    bool drop_mtp;             /* multi-token-prediction layers are left out, where there are any */
    bool drop_groups;          /* groups of experts are given up; else each keeps the same number */
    int64_t pad;               /* experts a layer in the output, dead ones behind the kept; 0: none, or where layers come out
                                  unequal as many as the largest keeps */
    moec_allocation allocation;
    int64_t least;             /* --min-experts: each layer keeps so many at least; 0: by the allocation */
    int64_t together;          /* loss: layers in a row that share what they keep */
    const int64_t *counts;     /* [MoE layers] loss: what moec_allocate_loss gave */
    bool plan_only;            /* nothing is written but the plan: layers may keep unequal numbers that no client loads */
    const moec_model *base;    /* the checkpoint that router-norm and router-change compare with, or NULL */
    const char *base_print;    /* its fingerprint */
    double lambda1, lambda2;   /* stun: weights of router-row distance and of co-activation */
    moec_grain grain;          /* of the others but experts (see grain.h) `share` is of neurons, weights or layers */
    int64_t width, align;      /* neurons: how many each expert keeps (0: by share); a multiple of this (0: by width) */
    int64_t some, of;          /* weights: `some` of every `of` neighbours stay (N:M); 0, 0: by share */
    double ratio, keep_rows;   /* factor: share of the experts' bytes that stays; of each matrix's rows that mc-smoe keeps whole */
    int64_t rank, cores;       /* instead of the ratio, 0: by ratio; tensors of a train */
    bool kept;                 /* factors are written, not their products */
    moec_dtype dtype;          /* of the output; MOEC_DTYPE_COUNT: as it is */
    int64_t drop;              /* blocks: layers to drop; 0: by share */
} moec_request;

/* Options of single methods: rows for the method (T: moec_request) and for a verb that fills the request in. */
#define MOEC_BASE_ROW(T, field)                                                                                        \
    {.name = "base", MOEC_TEXT(T, field), .value = "DIR",                                                              \
     .help = "router-norm, router-change: the checkpoint before fine-tuning, of the same shape"}
#define MOEC_STUN_ROWS(T, rows, coact)                                                                                 \
    {.name = "stun-lambda1", MOEC_REAL(T, rows), .lo = 0, .hi = 1e6, .fallback = "1", .value = "X",                    \
     .help = "stun: weight of the distance between router rows"},                                                      \
    {.name = "stun-lambda2", MOEC_REAL(T, coact), .lo = 0, .hi = 1e6, .fallback = "0", .value = "X",                   \
     .help = "stun: weight of co-activation, over its mean in the layer; above 0 needs --stats"}

struct moec_choice_task;

typedef struct moec_method {
    const char *name;
    moec_method_kind kind;
    moec_grain grain;
    const char *brief;           /* one line */
    const char *paper, *arxiv;   /* title; number, or NULL */
    const char *formula;
    const moec_stat *needs;      /* [n_needs] */
    int n_needs;
    const moec_opt *opts;        /* options of its own, up to MOEC_OPT_END, or NULL */
    const void *row;             /* constants of a method that shares its function with others */
    bool is_default;             /* of its kind and grain: taken where none is named */
    bool by_count;               /* who is kept depends on how many are: one count for all layers, plans need not nest */
    /* NULL: of kind MOEC_QUANTIZE, see widths.h */
    moec_status (*plan)(moec_plan **out, const struct moec_method *me, const moec_request *q, moec_err *err);
    /* Of a method that looks at tokens, layer by layer (see choose.h and run/repair.h); its plan has the counts only. NULL: the
     * plan says it all. */
    moec_status (*choose)(int32_t *keep, double *score, const struct moec_choice_task *t, moec_err *err);
} moec_method;

/** The method of this kind and name that takes whole experts, or NULL. */
MOEC_API const moec_method *moec_method_find(moec_method_kind kind, const char *name);
/** The same of any grain. */
MOEC_API const moec_method *moec_method_of_grain(moec_method_kind kind, moec_grain grain, const char *name);
/** The same, where name is NULL the default of the grain. MOEC_EINVAL: it is a method of another grain (those of this one are
 *  named), or there is none of that name (the nearest is suggested). */
MOEC_API moec_status moec_method_take(const moec_method **out, moec_method_kind kind, moec_grain grain, const char *name,
                                      moec_err *err) MOEC_USE_RESULT;
/** Row i of the table, NULL behind the last. */
MOEC_API const moec_method *moec_method_at(size_t i);
/** [{"name", "grain", "brief", "paper", "arxiv", "formula", "needs", "options", "default", "by_count"}] of one
 *  kind. */
MOEC_API moec_json *moec_method_list(moec_method_kind kind);
/** One entry of that. */
MOEC_API moec_json *moec_method_json(const moec_method *m);

/** Makes a plan by the method of q->grain that moec_method_take gives for this name. Checks first that the statistics are of this model and hold what
 *  the method needs.
 *  @return MOEC_OK; MOEC_EINVAL: no statistics where some are needed, share or keep out of range, nothing kept, more experts
 *          protected than kept, unknown method (the nearest is suggested); MOEC_EFORMAT: statistics of another model, a
 *          dataset that is missing (named); MOEC_ENUMERIC: a score is not finite (layer and expert named). */
MOEC_API moec_status moec_method_plan(moec_plan **out, moec_method_kind kind, const char *name, const moec_request *q,
                                      moec_err *err) MOEC_USE_RESULT;
/** Nested plans: out[i] removes share[i] (ascending; q->share and q->keep are not read), all from one ranking, so that the
 *  experts kept by a plan are kept by every plan before it. Scores are computed once. out: [n], NULL on failure.
 *  Errors: moec_method_plan; MOEC_EINVAL: shares that do not ascend, a method whose choice is no ranking (stun). */
MOEC_API moec_status moec_method_plans(moec_plan **out, moec_method_kind kind, const char *name, const moec_request *q,
                                       const double *share, int n, moec_err *err) MOEC_USE_RESULT;

/** q's statistics are of its model and hold what the method needs. MOEC_EINVAL: there are none and it needs some; MOEC_EFORMAT,
 *  MOEC_ENUMERIC as moec_method_plan. */
MOEC_API moec_status moec_method_check_stats(const moec_method *me, const moec_request *q, moec_err *err) MOEC_USE_RESULT;
/** MOEC_EFORMAT with a text that names the method, the dataset, the domain that lacks it and the tier that collects it. */
MOEC_API moec_status moec_no_statistic(const moec_method *me, const moec_stats *s, int domain, moec_stat kind, moec_err *err);

/** Who is kept, from scores: the tail that all prune methods share.
 *
 *    K = keep, or E - floor(E * share + 1e-9)      (the 1e-9 undoes what 0.29*100 = 28.999.. loses)
 *    kept: protected experts, then by descending score, ties to the lower index; the same K in every layer
 *
 *  Where the router chooses among groups of experts, each group keeps K / n_group. Sets that calibration does not see
 *  (attention experts, multi-token-prediction layers) keep the K experts whose router rows have the largest norm.
 *  The share is floored as REAP's int() does; one above 0 that is less than an expert is refused. Experts that no token selected are listed as unseen where the statistics say
 *  so. top-k falls to K when K is smaller.
 *  Where q->allocation is not uniform, K is the mean over the layers (moec_allocate; loss: q->counts); layers that come out unequal
 *  are padded to the largest, or where the router has nothing that rules dead experts out, refused unless q->plan_only.
 *  @param score [MoE layers * E], taken over into the plan by copy.
 *  Errors: moec_method_plan. Cost: O(L E log E). Same result on any number of threads. */
MOEC_API moec_status moec_select(moec_plan **out, const moec_method *me, const moec_request *q, const double *score,
                                 moec_err *err) MOEC_USE_RESULT;
/** A plan of a method that looks at tokens: counts, protection and what calibration saw, no scores; who is kept is chosen while the
 *  layers run. Errors: moec_select. */
MOEC_API moec_status moec_plan_counts(moec_plan **out, const moec_method *me, const moec_request *q, moec_err *err)
    MOEC_USE_RESULT;
/** Forgets the scores of a plan's layers. */
MOEC_API void moec_plan_drop_scores(moec_plan *p);
/** K of the formula above. MOEC_EINVAL: out of range, a share above 0 that removes nobody, or not of the model's form: top-k that cannot shrink, groups that
 *  cannot share K, padding that is not exact. */
MOEC_API moec_status moec_kept_experts(int64_t *out, const moec_request *q, moec_err *err) MOEC_USE_RESULT;

/** How many experts each MoE layer keeps, L*K in all:
 *
 *    s[l,e]  = score[l,e] / sum_e' score[l,e']        (1/E where all are 0); r = rank in the layer, protected first
 *    global    the L*K largest s of all layers in one pool
 *    mass      the L*K smallest c[l,r] = sum of s over the ranks up to and with r: a layer keeps experts while the mass that
 *              they hold stays below a threshold t common to all, t being what makes the total come out
 *
 *  Each layer keeps at least max(top-k, q->least; for mass 4 unless q->least says otherwise) and all that is protected,
 *  whatever their s; for mass these do not count in c. At most q->pad where that is given. Ties go to the lower layer. Where
 *  the router chooses among groups, the r-th of every group stand or fall together, with the sum of their s.
 *  Source: global: He et al., Towards Efficient Mixture of Experts (arXiv:2406.02500), its global Expert Drop. mass: Koishekenov
 *  et al., Memory-efficient NLLB-200 (arXiv:2212.09811), and its repository's "global threshold". Departs: global's scores are
 *  normalised, without which layers of large scores would keep all; mass finds t exactly where the source steps by 0.001 and
 *  cuts the last layer off.
 *  @param out [MoE layers]. MOEC_EINVAL: a score below 0, more needed than L*K; MOEC_ENUMERIC: a score is not finite.
 *  Cost: O(L E log(L E)). Plans of smaller K are contained in those of larger K. */
MOEC_API moec_status moec_allocate(int64_t *out, const moec_method *me, const moec_request *q, int64_t keep,
                                   const double *score, moec_err *err) MOEC_USE_RESULT;

/** How many experts each MoE layer keeps by what merging loses, q->together layers in a row sharing what they keep (the last of them
 *  may be fewer): as many times K as they are. With c[l,k] the objective of a grouping of layer l into k groups (moec_merge_curve),
 *
 *    k_l = E (q->pad where that is given); until sum k_l = K times the layers:
 *        the layer with the smallest c[l,k_l-1] - c[l,k_l] gives one up
 *
 *  of equal ones that which keeps most, then the lower. Each keeps at least max(top-k, q->least). Where the router chooses among
 *  groups, one of each of them goes at a time. The sum of c is the least there is where curves are convex.
 *  Source: Sub-MoE (arXiv:2506.23266, 3.1), which shares K among two layers and does not say how; this is our reading.
 *  @param out [MoE layers]. curve: [MoE layers, E + 1], INFINITY where there cannot be so few groups.
 *  MOEC_EINVAL: more needed than K; q->together below 1; MOEC_ENUMERIC: a curve has a NAN. Cost: O(L E together). */
MOEC_API moec_status moec_allocate_loss(int64_t *out, const moec_request *q, int64_t keep, const double *curve, moec_err *err)
    MOEC_USE_RESULT;

/* An expert's place in its layer: protected ones first, then by descending score, ties to the lower number. */
typedef struct moec_rank {
    int32_t expert;
    bool guarded;
    double score;
} moec_rank;
MOEC_API void moec_rank_sort(moec_rank *order, int64_t n);
/** Groups of experts that each keep the same number; 1: none. */
MOEC_API int64_t moec_request_groups(const moec_request *q);

/** out[r] = sum of squares of row r, read as it is stored, summed in float64 in order. MOEC_ENOMEM. */
MOEC_API moec_status moec_row_squares(double *out, const moec_weight *w, moec_err *err) MOEC_USE_RESULT;

/** Reads what --protect names: "super", or a file with lines "LAYER EXPERT" ('#' begins a comment), or JSON
 *  {"LAYER": [experts]}; layers count from 0 over all layers.
 *  *name: how it was asked for (recorded in plans): "super" or the digest of the file; free with moec_free.
 *  MOEC_EFORMAT: a line that is not two numbers, a layer without experts, an expert out of range; MOEC_EINVAL: super without
 *  statistics; MOEC_EIO. Release with moec_guard_release. */
MOEC_API moec_status moec_guard_read(moec_guard *out, char **name, const char *spec, const moec_model *m,
                                     const moec_stats *stats, moec_err *err) MOEC_USE_RESULT;
/** The same from text. `what` names it in errors. */
MOEC_API moec_status moec_guard_parse(moec_guard *out, const char *text, size_t len, const moec_model *m,
                                      const char *what, moec_err *err) MOEC_USE_RESULT;
/** Super experts:
 *
 *    pool  = {A[l,e] : layer index l < round(0.75 * layers)},  A = largest |output of down_proj| (OUT_ABSMAX)
 *    super = A > percentile(pool, 99.5) and A > max(pool) / 10     (e in the pool)
 *
 *  The percentile interpolates linearly; round goes to even, as Python's. Later layers have large but harmless outputs.
 *  Source: Su et al., Unveiling Super Experts in Mixture-of-Experts Large Language Models (ICLR 2026), and its
 *  repository. Departs: max/10 is not floored, which would protect everything where outputs stay below 10; shared experts
 *  are not in the pool. */
typedef struct moec_super {
    double percentile, tenth;   /* 99.5th percentile and max/10 of the pool; super is above both. 0: the pool is empty */
    int64_t layers, experts;    /* MoE layers, experts in each */
    int64_t pool_layers, below; /* MoE layers of the pool, and the layer number that ends it */
    int64_t count;              /* super experts */
    double *absmax;             /* [layers * experts] over all domains */
    bool *flag;                 /* [layers * experts] super */
} moec_super;
/** MOEC_EFORMAT: OUT_ABSMAX was not collected; MOEC_ENUMERIC: it is not finite. Release with moec_super_release. */
MOEC_API moec_status moec_super_find(moec_super *out, const moec_stats *stats, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_super_release(moec_super *s);
/** {"percentile_99_5", "tenth_of_max", "threshold", "pool_layers", "layers_below", "super": n,
 *   "experts": [{"layer", "expert", "abs_max", "channel", "in_pool", "protected"}]}: all super experts and the `top` largest,
 *  by descending abs_max. channel: of the hidden state, null when not collected. Errors: moec_super_find. */
MOEC_API moec_status moec_super_describe(moec_json **out, const moec_stats *stats, int64_t top, moec_err *err)
    MOEC_USE_RESULT;
/** Protects the super experts. MOEC_EINVAL: no statistics; MOEC_EFORMAT: of another shape; moec_super_find. */
MOEC_API moec_status moec_guard_super(moec_guard *out, const moec_model *m, const moec_stats *stats, moec_err *err)
    MOEC_USE_RESULT;
MOEC_API void moec_guard_release(moec_guard *g);

#endif
