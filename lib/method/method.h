/* Methods as data: what each is called, where it was published, its formula, what statistics it needs, and the function that
 * makes a plan. A new method is one moec_method in a file of its own (or a row beside its kin) and one line in
 * method_table.inc. */
#ifndef MOEC_METHOD_METHOD_H
#define MOEC_METHOD_METHOD_H

#include "base/opt.h"
#include "calib/stats.h"
#include "method/plan.h"

typedef enum moec_method_kind { MOEC_PRUNE, MOEC_MERGE, MOEC_FACTOR, MOEC_QUANTIZE } moec_method_kind;

/* Experts that are kept whatever their score: flag[l*experts + e] for MoE layer l. */
typedef struct moec_guard {
    int64_t layers, experts, count;
    bool *flag;
} moec_guard;

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
    int64_t pad;               /* experts a layer in the output, dead ones behind the kept; 0: none */
} moec_request;

typedef struct moec_method {
    const char *name;
    moec_method_kind kind;
    const char *brief;           /* one line */
    const char *paper, *arxiv;   /* title; number, or NULL */
    const char *formula;
    const moec_stat *needs;      /* [n_needs] */
    int n_needs;
    const moec_opt *opts;        /* options of its own, up to MOEC_OPT_END, or NULL */
    const void *row;             /* constants of a method that shares its function with others */
    moec_status (*plan)(moec_plan **out, const struct moec_method *me, const moec_request *q, moec_err *err);
} moec_method;

/** The method of this kind and name, or NULL. */
MOEC_API const moec_method *moec_method_find(moec_method_kind kind, const char *name);
/** Row i of the table, NULL behind the last. */
MOEC_API const moec_method *moec_method_at(size_t i);
/** [{"name", "brief", "paper", "arxiv", "formula", "needs", "options"}] of one kind. */
MOEC_API moec_json *moec_method_list(moec_method_kind kind);

/** Makes a plan. Checks first that the statistics are of this model and hold what the method needs.
 *  @return MOEC_OK; MOEC_EINVAL: no statistics where some are needed, share or keep out of range, nothing kept, more experts
 *          protected than kept, unknown method (the nearest is suggested); MOEC_EFORMAT: statistics of another model, a
 *          dataset that is missing (named); MOEC_ENUMERIC: a score is not finite (layer and expert named). */
MOEC_API moec_status moec_method_plan(moec_plan **out, moec_method_kind kind, const char *name, const moec_request *q,
                                      moec_err *err) MOEC_USE_RESULT;

/** Who is kept, from scores: the tail that all prune methods share.
 *
 *    K = keep, or E - floor(E * share + 1e-9)      (the 1e-9 undoes what 0.29*100 = 28.999.. loses)
 *    kept: protected experts, then by descending score, ties to the lower index; the same K in every layer
 *
 *  Where the router chooses among groups of experts, each group keeps K / n_group. Sets that calibration does not see
 *  (attention experts, multi-token-prediction layers) keep the K experts whose router rows have the largest norm.
 *  The share is floored as REAP's int() does. Experts that no token selected are listed as unseen where the statistics say
 *  so. top-k falls to K when K is smaller.
 *  @param score [MoE layers * E], taken over into the plan by copy.
 *  Errors: moec_method_plan. Cost: O(L E log E). Same result on any number of threads. */
MOEC_API moec_status moec_select(moec_plan **out, const moec_method *me, const moec_request *q, const double *score,
                                 moec_err *err) MOEC_USE_RESULT;
/** K of the formula above. MOEC_EINVAL: out of range, or not of the model's form: top-k that cannot shrink, groups that
 *  cannot share K, padding that is not exact. */
MOEC_API moec_status moec_kept_experts(int64_t *out, const moec_request *q, moec_err *err) MOEC_USE_RESULT;

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
 *  repository. Departs: max/10 is not floored, which would protect everything where outputs stay below 10.
 *  MOEC_EFORMAT: OUT_ABSMAX was not collected; MOEC_ENUMERIC: it is not finite. */
MOEC_API moec_status moec_guard_super(moec_guard *out, const moec_model *m, const moec_stats *stats, moec_err *err)
    MOEC_USE_RESULT;
MOEC_API void moec_guard_release(moec_guard *g);

#endif
