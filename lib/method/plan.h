/* A plan: who is kept. Small, readable JSON that can be printed, edited, compared and applied later. */
#ifndef MOEC_METHOD_PLAN_H
#define MOEC_METHOD_PLAN_H

#include "base/json.h"
#include "model/model.h"

/* One set of experts: an MoE layer, attention experts or a multi-token-prediction layer. */
typedef struct moec_plan_layer {
    moec_set_kind kind;
    int64_t layer;      /* index among all layers; MTP: number in its tensors' names */
    int64_t n_experts;  /* before */
    int64_t n_keep;
    int32_t *keep;      /* [n_keep] ascending */
    double *score;      /* [n_experts] or NULL; higher is kept */
    int64_t n_unseen;   /* experts that no calibration token selected, */
    int32_t *unseen;    /* ascending; a zero score here means "never seen", not "small" */
    int64_t n_guarded;  /* experts that were kept whatever their score, */
    int32_t *guarded;   /* ascending (--protect) */
    int32_t *into;      /* [n_experts] kept expert that each was merged into (a kept one: itself), -1: it is only removed; NULL:
                           nothing was merged */
    uint32_t rewritten; /* moec_part bits: weights that are computed anew (repair), not copied */
    double error_before, error_after; /* of the layer on held-out tokens, without and with them (see repair.h); NAN: unknown */
    double load_shift;  /* where the router is among them: half the L1 distance between the shares of selections that kept experts
                           have by their old rows and by the new ones, 0 to 1; NAN: unknown or not rewritten */
    bool router_refit;  /* and whether its rows did change: those that did not help are not taken */
} moec_plan_layer;

/* What becomes of multi-token-prediction layers. */
typedef enum moec_plan_mtp { MOEC_PLAN_MTP_UNSAID, MOEC_PLAN_MTP_KEEP, MOEC_PLAN_MTP_DROP } moec_plan_mtp;

/* How experts' matrices are held; see factor.h. */
typedef enum moec_factor_kind {
    MOEC_FACTOR_NONE, MOEC_FACTOR_SVD, MOEC_FACTOR_ROWS, MOEC_FACTOR_BASE, MOEC_FACTOR_MPO, MOEC_FACTOR_PIVOT, MOEC_FACTOR_KINDS
} moec_factor_kind;
enum { MOEC_FACTOR_CORES = 5 }; /* most */

/* Experts of the MoE layers whose matrices are factored. [0]: gate and up, [1]: down. */
typedef struct moec_plan_factor {
    moec_factor_kind kind;
    bool kept;          /* the output has the factors, under names of their own; else their products, as large as before */
    int64_t rank[2];    /* svd, pivot, mc-smoe, base-delta */
    int64_t rows[2];    /* mc-smoe: rows that are kept whole */
    int64_t cores;      /* mpo: tensors of a train, */
    int64_t bond[2][MOEC_FACTOR_CORES - 1]; /* and the cores - 1 sizes between them */
    double *error;      /* [n_layers, 3] of gate, up and down: tr(D C D^T) / tr(W C W^T), D = W - W', summed over the experts; NULL */
} moec_plan_factor;

/* Matrices whose weights are in few bits; see quant.h, and format.h of lib/run. Every expert is kept. */
typedef struct moec_plan_quant {
    char format[24];    /* "gptq"; "": nothing is quantized */
    int64_t group;      /* asked; a matrix has moec_quant_group(group, columns, the format's) */
    bool zeros;
    moec_dtype scale_type;
    uint8_t *expert;    /* [n_layers, E, 3] bits of gate, up and down; 16: as it is */
    uint8_t *mat;       /* [n_mat_layers, MOEC_MAT_COUNT] of the other matrices of all layers; 0, 16: as it is */
    int64_t n_mat_layers;
    double *error;      /* [n_layers, 3] of gate, up and down: sum of L over sum of tr(W H W^T) (gptq.h, H a mean) over the experts; NULL */
} moec_plan_quant;

typedef struct moec_plan {
    char model[33];     /* fingerprint of the source; "": any model of this shape */
    char model_type[64];
    char method[64];
    char *options;      /* JSON of what the method was asked */
    char stats[33];     /* digest of the statistics file, "" when none */
    int64_t top_k, new_top_k;
    moec_plan_mtp mtp;  /* UNSAID where the model has no such layers */
    bool drop_groups;   /* the output chooses among all experts at once, not among groups of them */
    int64_t pad;        /* experts a layer in the output, dead ones behind the kept (of each group); 0: as many as are kept, and
                           where layers keep unequal numbers the plan can be measured but not applied */
    moec_dtype dtype;   /* weights are written in this type; MOEC_DTYPE_COUNT: as they are */
    int64_t width;      /* neurons that every expert keeps; 0: all */
    int32_t *drop;      /* [n_drop] ascending: layers that the output lacks, those behind them move up; their sets stay in */
    int64_t n_drop;     /* the plan, whole */
    char *repair;       /* JSON object of how weights were computed anew, NULL: none were */
    char weights[33];   /* moec_override_digest of these weights, "" when none */
    moec_plan_factor factor;
    moec_plan_quant quant;
    bool mapped;        /* the router keeps all its rows, and those of merged experts go to the one that they became: a table in
                           config.json says which (moec_plan_map) */
    bool expert_shards; /* experts' weights are in shards of their own, so that the others can be shared by several outputs */
    int64_t n_layers;   /* MoE layers, ascending */
    int64_t n_sets;     /* and behind them attention experts and the MTP layers that stay, in the order of model->set */
    moec_plan_layer *layer; /* [n_sets] */
    double *betas;      /* [n_layers] thresholds of dynamic skipping for config.json (moec_plan_betas), or NULL */
} moec_plan;

/** NULL-safe. */
MOEC_API void moec_plan_free(moec_plan *p);
/** A plan with its sets (index, n_experts; nothing kept yet) and top_k taken from a model; `fingerprint` may be NULL.
 *  MTP layers are kept. */
MOEC_API moec_status moec_plan_new(moec_plan **out, const moec_model *m, const char *method, const char *fingerprint,
                                   moec_err *err) MOEC_USE_RESULT;
/** A plan that keeps everything. */
MOEC_API moec_status moec_plan_whole(moec_plan **out, const moec_model *m, moec_err *err) MOEC_USE_RESULT;
/** Keeps every expert of every set. MOEC_ENOMEM. */
MOEC_API moec_status moec_plan_keep_all(moec_plan *p, moec_err *err) MOEC_USE_RESULT;
/** Makes it `mapped`: top-k as it was, attention experts and MTP layers whole. The layers' `into` must come to name a kept expert for
 *  every expert; layers may keep unequal numbers. MOEC_ENOMEM. */
MOEC_API moec_status moec_plan_map(moec_plan *p, moec_err *err) MOEC_USE_RESULT;
/** Does the output bring the Python file with which transformers runs it? Where it has factors or is `mapped`. */
MOEC_API bool moec_plan_brings_code(const moec_plan *p);
/** Number in the output of the expert that a row of a mapped plan's router leads to, `row` of MoE layer l. Where nobody was merged
 *  yet (a dry run) it is any that there is. */
MOEC_API int64_t moec_plan_leads_to(const moec_plan *p, int64_t l, int64_t row);
/** Number in the output of layer `layer` (of multi-token prediction, too, where it is numbered behind the others), -1 when
 *  it is dropped. */
MOEC_API int64_t moec_plan_layer_number(const moec_plan *p, int64_t layer);
/** Leaves the MTP layers out. */
MOEC_API void moec_plan_drop_mtp(moec_plan *p);
/** Adds options[key] (or replaces it); `value` is taken over in any case. MOEC_EFORMAT: options is not JSON; MOEC_ENOMEM. */
MOEC_API moec_status moec_plan_set_option(moec_plan *p, const char *key, moec_json *value, moec_err *err) MOEC_USE_RESULT;
/** {"moecompress_plan": 1, "kind": "prune"|"merge"|"factor"|"quantize", "model", "model_type", "method", "options", "stats", "top_k", "new_top_k",
 *  "layers": [{"layer", "experts", "keep", "unseen", "protected", "score"}]}; score only where there is one. Where they
 *  apply, in front of "layers": "mtp": "keep"|"drop", "groups": "drop", "pad": N, "dtype": "bf16"|"f16"|"f32",
 *  "betas": [one a layer] (0 to 1, only with top_k and new_top_k 2), "expert_width": N, "drop_layers": [..], "repair": {..},
 *  "weights": digest, "expert_shards": true, "emit": "map", "factor": {"kind": "svd"|"pivot"|"mc-smoe"|"base-delta"|"mpo", "emit": "dense"|"factored", "rank": [2], "rows": [2],
 *  "cores": n, "bonds": [2 (n - 1)], "error": [3 a layer]}, "quant": {"format", "group_size", "zero_points": true|false,
 *  "scale_dtype", "error": [3 a layer], "layers": count of all, "others": [{"layer", "q": bits, "o": bits, ..}]} with in each layer "bits": [one an expert, or
 *  [gate, up, down]];
 *  in a layer "merged": [[kept expert, others that went into it, ..], ..], "rewritten": ["gate", "up", "down", "router", "router_bias", "selection_bias"] and "held_out": [error before,
 *  after], and with "router" in it "load_shift": 0 to 1 and "router_refit": true|false, which go together; behind them
 *  "others": [{"kind": "attention"|"mtp", "layer", "experts", "keep", "rewritten"}], sets that calibration does not see. */
MOEC_API moec_status moec_plan_to_json(moec_json **out, const moec_plan *p, moec_err *err) MOEC_USE_RESULT;
/** The same as text, one layer a line, so that plans can be read and compared. Free with moec_free. */
MOEC_API moec_status moec_plan_to_text(char **out, const moec_plan *p, moec_err *err) MOEC_USE_RESULT;
/** From an edited or hostile file: MOEC_EFORMAT for a wrong version, kind or type, indices out of range, not ascending or
 *  repeated, an empty or missing layer, sets out of order, sizes out of range. Unknown keys are refused: an edit
 *  that is misspelt must not be silently without effect. Needed: moecompress_plan, kind, model, top_k, new_top_k,
 *  layers with layer, experts, keep. */
MOEC_API moec_status moec_plan_parse(moec_plan **out, const char *text, size_t len, const char *what, moec_err *err)
    MOEC_USE_RESULT;
MOEC_API moec_status moec_plan_from_json(moec_plan **out, moec_json *root, const char *what, moec_err *err) MOEC_USE_RESULT;
/** moec_plan_parse of a file. MOEC_EIO too. */
MOEC_API moec_status moec_plan_read(moec_plan **out, const char *path, moec_err *err) MOEC_USE_RESULT;
/** The plan fits this model: fingerprint (that of m), model_type where it is said, sets, expert counts, top-k as before, new
 *  top-k <= kept and unchanged where moec_top_k_may_shrink says no; one count of kept experts in all sets
 *  (no client loads anything else) unless they are padded to one or mapped; mapped: every expert leads to a kept one, and nothing
 *  but gate, up and down of merged experts changes; "mtp" said exactly where there are MTP layers;
 *  moec_plan_check_groups for every set and moec_plan_check_pad. MOEC_EFORMAT. */
MOEC_API moec_status moec_plan_check(const moec_plan *p, const moec_model *m, const char *fingerprint, moec_err *err)
    MOEC_USE_RESULT;
/** The same but for the one count: enough to measure a plan. */
MOEC_API moec_status moec_plan_check_shape(const moec_plan *p, const moec_model *m, const char *fingerprint, moec_err *err)
    MOEC_USE_RESULT;
/** Can `keep` experts be shared by the model's groups, top_k of them chosen? keep is a multiple of n_group, a group
 *  keeps two at least where its two best count (one elsewhere), and topk_group groups hold top_k. MOEC_EINVAL: no; the
 *  text names counts that work and --groups drop. True for models without groups and when all are kept. */
MOEC_API moec_status moec_plan_check_groups(const moec_model *m, int64_t keep, int64_t top_k, moec_err *err)
    MOEC_USE_RESULT;
/** Can a layer have experts that are never chosen? Exact only with a bias of -1e4 on the router's logits, or on scores
 *  that do not depend on each other (not a softmax over all: dead experts would share its denominator). Where the router
 *  chooses among groups that stay, pad is a multiple of their number, and every group holds the same number of dead experts
 *  behind its kept ones. That is exact, too: moec_plan_check_groups leaves each group the experts that it is judged by, and
 *  any topk_group groups hold top-k kept ones. It takes a client that gives -infinity to experts outside the chosen groups:
 *  transformers 5.23, and vLLM and SGLang in the paths written in PyTorch (read, not run). DeepSeek's first code and older
 *  transformers give 0: there experts outside win where score + bias inside is below 0, in the unpadded output live ones, here
 *  dead ones, too.
 *  MOEC_EINVAL: no, the text says why. */
MOEC_API moec_status moec_plan_check_pad(const moec_model *m, bool drop_groups, int64_t pad, moec_err *err)
    MOEC_USE_RESULT;

/** May top-k be smaller in the output? Not where attention experts are chosen with it (it is their number of heads),
 *  nor with sparsemixer, which is two draws, nor where no config key says it. */
MOEC_API bool moec_top_k_may_shrink(const moec_model *m);
/** A token uses k experts in the output. MOEC_EINVAL: k is above what it is now or would be, it may not shrink (said why), or
 *  the number of experts is not top-k's. */
MOEC_API moec_status moec_plan_set_top_k(moec_plan *p, const moec_model *m, int64_t k, moec_err *err) MOEC_USE_RESULT;
/** Experts a layer of the output has by config.json: pad, or what is kept, or as many as the source where they are mapped. */
MOEC_API int64_t moec_plan_experts(const moec_plan *p);
/** Fewest that a set keeps. */
MOEC_API int64_t moec_plan_least(const moec_plan *p);
/** Do all sets keep the same number? Where not, and nothing is padded, no client loads the output. */
MOEC_API bool moec_plan_even(const moec_plan *p);
/** Most that a set keeps. */
MOEC_API int64_t moec_plan_most(const moec_plan *p);
/** Experts that the MoE layers keep together. */
MOEC_API int64_t moec_plan_total(const moec_plan *p);
/** Dead experts in all sets. */
MOEC_API int64_t moec_plan_dead(const moec_plan *p);
/** The layer that holds a set's router and experts. */
MOEC_API const moec_layer *moec_set_layer(const moec_model *m, int64_t set);
/** "mtp", "attention", "moe". */
MOEC_API const char *moec_set_name(moec_set_kind kind);
/** Name of a dtype in options and plans ("bf16"), NULL when it is none of the three; and back (MOEC_DTYPE_COUNT). */
MOEC_API const char *moec_plan_dtype_name(moec_dtype t);
MOEC_API moec_dtype moec_plan_dtype(const char *name);

/* How a set's experts stand in the output: in groups of `size`, the first `live` of each kept ones, dead ones behind them. One
 * group where nothing is padded or the output's router has no groups. */
typedef struct moec_slots {
    int64_t live, size;
} moec_slots;
/** Of set l (index into p->layer) of a plan that fits the model. */
MOEC_API moec_slots moec_plan_slots(const moec_plan *p, const moec_model *m, int64_t l);
/** Which of the kept (index into keep) has number `number` in the output; -1: it is a dead expert. */
MOEC_API int64_t moec_slots_kept(moec_slots s, int64_t number);
/** Index of an expert of set l among those that are kept, or -1 when it is removed. */
MOEC_API int64_t moec_plan_kept(const moec_plan *p, int64_t l, int64_t expert);
/** New number of an expert of set l, or -1 when it is removed. */
MOEC_API int64_t moec_plan_number(const moec_plan *p, const moec_model *m, int64_t l, int64_t expert);
/** May every expert have `width` neurons? Not with attention experts, whose width is that of keys and values, nor where the
 *  width of another part of the model follows the same key. *shared: what key_shared_count must be in the output so that
 *  the shared expert stays as it is, -1: nothing follows. MOEC_EINVAL: no, the text says why. */
MOEC_API moec_status moec_plan_check_width(int64_t *shared, const moec_model *m, int64_t width, moec_err *err)
    MOEC_USE_RESULT;
/** The verb that makes such plans: "prune", "merge", "factor", "quantize". */
MOEC_API const char *moec_plan_kind(const moec_plan *p);
/** Were experts of any layer merged? */
MOEC_API bool moec_plan_merges(const moec_plan *p);
/** "svd", "pivot", "mc-smoe", "base-delta", "mpo"; "" for none. */
MOEC_API const char *moec_factor_name(moec_factor_kind kind);
/** Does any layer have weights that are computed anew? */
MOEC_API bool moec_plan_rewrites(const moec_plan *p);
/** Record of MoE layer `layer`, or NULL. */
MOEC_API const moec_plan_layer *moec_plan_find(const moec_plan *p, int64_t layer);

#endif
