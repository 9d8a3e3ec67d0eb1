/* Merging the experts of a layer: one engine, of which published methods are settings (moec_merge_recipe).
 *
 *     distance x grouping -> who goes with whom;  alignment x weights x fill -> one expert a group;  router rule -> its row
 *
 * What is left of an error is then for repair (repair.h), which fits the merged experts as it fits pruned ones.
 * Symbols: n tokens, H hidden, I expert width, E experts, K groups; f_e(x) output of expert e without its weight, g_e the weight
 * it has for a token (0 where it is not selected), z router logits. */
#ifndef MOEC_METHOD_MERGE_H
#define MOEC_METHOD_MERGE_H

#include "base/json.h"
#include "base/log.h"
#include "method/align.h"
#include "method/group.h"
#include "model/model.h"

/* Distances of experts i and j. Outputs are those of all experts on the same sample of tokens, whoever selects them. */
typedef enum moec_merge_distance {
    MOEC_FAR_LOGITS,        /* 1/2 (1 - cos(z_i, z_j)) over all tokens, from Z^T Z: M-SMoE */
    MOEC_FAR_CENTRED,       /* the same of z - mean over experts, which softmax does not see */
    MOEC_FAR_MEAN_OUTPUT,   /* |mean f_i - mean f_j|: HC-SMoE */
    MOEC_FAR_OUTPUT_COSINE, /* mean over tokens of 1 - cos(f_i(x), f_j(x)), with the Gram matrix of the cosines as kernel: Sub-MoE */
    MOEC_FAR_OUTPUT,        /* mean |f_i(x) - f_j(x)|^2, made on f_e - mean over experts of f_e, in float64 */
    MOEC_FAR_GATED,         /* 1 - 1/2 ((1 + cos of mean p_e f_e)/2 + 1 - |unit z_i - unit z_j| / largest), p the full score: REAM */
    MOEC_FAR_WEIGHTS,       /* |[up, gate]_i - [up, gate]_j|: MergeMoE */
    MOEC_FAR_ROUTER_ROWS,   /* |r_i - r_j| of the router's rows less their mean; needs no tokens */
    MOEC_FAR_COUNT
} moec_merge_distance;

typedef enum moec_merge_grouping {
    MOEC_BY_NEAREST, MOEC_BY_PSEUDO, MOEC_BY_AVERAGE, MOEC_BY_WARD, MOEC_BY_COMPLETE, MOEC_BY_SINGLE, MOEC_BY_KMEANS,
    MOEC_BY_SPECTRAL, MOEC_BY_PRUNING /* K experts of largest saliency stay, the others have no group */, MOEC_BY_COUNT
} moec_merge_grouping;

/* A sum over the tokens that select e: saliency (who is a centre), mass (of Ward) and weight in a group. */
typedef enum moec_merge_mass {
    MOEC_MASS_COUNT,    /* 1: frequency */
    MOEC_MASS_GATE,     /* g */
    MOEC_MASS_GATE_SQ,  /* g^2: error-optimal for experts that are never selected together */
    MOEC_MASS_REAP,     /* mean of g |f| */
    MOEC_MASS_ENERGY,   /* g^2 |f|^2 */
    MOEC_MASS_REAM,     /* mean of p^2 |f|, p the full score */
    MOEC_MASS_EQUAL,    /* 1 for each that is selected at all */
    MOEC_MASS_KINDS
} moec_merge_mass;

typedef enum moec_merge_align {
    MOEC_ALIGN_NONE, MOEC_ALIGN_PLAIN, MOEC_ALIGN_CANONICAL, MOEC_ALIGN_ACTIVATIONS, MOEC_ALIGN_COUNT
} moec_merge_align;

/* What becomes of a group's router row. */
typedef enum moec_merge_router {
    MOEC_ROW_KEEP,  /* the centre's */
    MOEC_ROW_MEAN,  /* mean of the members' */
    MOEC_ROW_WEIGHTED, /* mean by the weights of the merge */
    MOEC_ROW_ADD,   /* DERN: the centre's, and each dropped expert's times the share of its neurons that the group took */
    MOEC_ROW_LSE,   /* ridge fit to log sum exp of the members' logits (moec_router_*, repair.h) */
    MOEC_ROW_COUNT
} moec_merge_router;

typedef enum moec_merge_fill {
    MOEC_FILL_AVERAGE,   /* sum w_e W_e of the aligned members, per matrix */
    MOEC_FILL_SUBSPACE,  /* Sub-MoE: that, projected on the r leading left singular vectors of [W_1 .. W_n] (all of them: the
                            average itself) */
    MOEC_FILL_SEGMENTS,  /* DERN: neurons of dropped experts go to kept experts one by one */
    MOEC_FILL_COUNT
} moec_merge_fill;

/* Of MOEC_FILL_SEGMENTS. */
typedef struct moec_segment_opts {
    double alpha;           /* a neuron is passed on when its compatibility is above this */
    double gate, up, down;  /* weights of the three cosines in it, sum 1 after scaling */
    bool canonical;         /* up and down scaled to equal norms, joint sign free */
    bool response;          /* centres begin as the I neurons of the pool with the largest response bound max|gate| + min|gate|, and
                               spherical k-means runs; else they begin as the kept expert's own and keep their places */
    bool same_norm;         /* members are scaled to their cluster's mean norm */
    bool sum_same_source;   /* down columns of members from one expert add up: an expert's output is a sum */
    int rounds;             /* of k-means, at most */
} moec_segment_opts;

typedef struct moec_merge_recipe {
    moec_merge_distance distance;
    moec_merge_grouping grouping;
    moec_merge_mass saliency;     /* of centres, and the mass of Ward */
    moec_merge_mass weights;
    moec_merge_align align;
    moec_merge_fill fill;
    moec_merge_router router;
    bool original;                /* groups are formed on what the original's layer sees, not behind layers that are merged already */
    bool decide;                  /* merged or only pruned: each group takes what repair gets further with on held-out tokens */
    int group_size;               /* pseudo: 16 */
    int restarts;                 /* k-means, spectral: 32 */
    double rank;                  /* subspace: share of min(rows, columns) that stays; 1: all */
    bool whiten;                  /* subspace: of W C^1/2, C the second moments of each expert's input (Sub-MoE's intra-expert variant) */
    moec_segment_opts segment;
} moec_merge_recipe;

/* One MoE layer on tokens. All borrowed. */
typedef struct moec_merge_task {
    const moec_model *model;
    const moec_layer *layer;  /* all experts there, with the source's weights */
    int64_t n;                /* tokens, fitted ones only */
    const float *x;           /* [n,H] */
    const float *logits;      /* [n,ld] of all experts */
    int64_t ld;
    const int32_t *ids;       /* [n,slots] selections among all experts, -1: empty */
    const float *gates;       /* [n,slots] */
    int64_t slots;
    int64_t texts;            /* the tokens are of so many texts, one behind the other; 0 and 1: one */
    const int64_t *text;      /* [texts + 1] first token of each, and n; a text may have none */
    const double *text_weight;/* [texts] > 0 */
    int64_t keep, blocks;     /* K; the router's groups, 1: none */
    const bool *guarded;      /* [E] stay as they are, or NULL */
    uint64_t seed;
    moec_progress *progress;  /* or NULL */
} moec_merge_task;

/* Who goes with whom. */
typedef struct moec_merge_groups {
    int32_t *centre;          /* [E] the expert that e goes into, -1: it is only removed */
    double *weight;           /* [E] in its group: sums to 1 over each group */
    double *saliency;         /* [E] */
    double *distance;         /* [E] to its centre, 0 for centres, NAN where none was made */
} moec_merge_groups;
MOEC_API moec_status moec_merge_groups_new(moec_merge_groups *out, int64_t experts, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_merge_groups_release(moec_merge_groups *g);

enum { MOEC_MERGE_TOKENS = 4096 }; /* of the sample on which all experts run */

/** Sums over tokens, for each expert: out [E]. ENERGY, REAP and REAM run the selected experts, on all of t's tokens; the means are
 *  over the tokens that select e, 0 for an expert without any. Sums in float64.
 *  Several texts d of weight w_d are mixed as prune mixes domains (prune_score.c), with S_d the sum and n_d the count of one:
 *      sums   sum_d w_d S_d[e] / sum_e' S_d[e'] (a text whose sums are all 0 adds nothing): a long text does not outvote a short one
 *      means  sum_d w_d S_d[e] / sum_d w_d n_d[e]
 *  Errors: moec_merge_group. */
MOEC_API moec_status moec_merge_mass_of(double *out, const moec_merge_task *t, moec_merge_mass kind, moec_err *err)
    MOEC_USE_RESULT;
/** distance [E,E], OUTPUT's being squares; kernel [E,E] or NULL: inner products whose squared distances they are, for k-means
 *  (OUTPUT_COSINE: Gram of cosines, d^2 = 2 - 2 cos; others: double-centred -1/2 d^2, no entry of its diagonal below 0). An output
 *  or column of logits that is 0 has cosine 0 with all; its distance from itself is 0 all the same. Sums in float64. Without
 *  tokens WEIGHTS and ROUTER_ROWS can still be had. Errors: moec_merge_group. */
MOEC_API moec_status moec_merge_distances(double *distance, double *kernel, const moec_merge_task *t, moec_merge_distance kind,
                                          moec_err *err) MOEC_USE_RESULT;
/** The groups of a recipe: exactly t->keep centres. A sample of at most MOEC_MERGE_TOKENS tokens, whole windows at even distances
 *  not being needed: every ceil(n / MOEC_MERGE_TOKENS)-th.
 *  Experts that no token selected have weight 0 (all of a group: equal weights). Ward and spectral grouping take squares of
 *  distances (OUTPUT's as they are); the affinity is exp(-d^2 / median of d^2 over the pairs).
 *  MOEC_EINVAL: keep out of range, more guarded experts than stay, weights on the input of experts with a distance of outputs or a
 *  mass of outputs, experts without a network that give anything but 0, no tokens, what the grouping refuses (group.h);
 *  MOEC_ENUMERIC: an output, a gate, a logit that is looked at or a weight that is compared is not finite; MOEC_ENOMEM, MOEC_EINTR.
 *  Cost: all experts on the sample (distances of outputs), the selected ones on all tokens (masses of outputs), E^3.
 *  Same result on any number of threads. */
MOEC_API moec_status moec_merge_group(moec_merge_groups *out, const moec_merge_task *t, const moec_merge_recipe *r, moec_err *err)
    MOEC_USE_RESULT;
/** What these two would refuse and can be known before any token is run: t with model, layer, keep, blocks and guarded only, the
 *  rest is not read. MOEC_EINVAL as they say: keep, guarded experts, groups of the grouping, outputs where there can be none,
 *  activations of experts without a gate, rank 0, segments whose parts all have weight 0. Cost: nothing. */
MOEC_API moec_status moec_merge_check(const moec_merge_task *t, const moec_merge_recipe *r, moec_err *err) MOEC_USE_RESULT;
/** What fewer and fewer groups lose: out [E + 1], out[k] the objective of the recipe's grouping into k groups (t->keep is not read).
 *
 *    kmeans                          sum of squared distances from the groups' means
 *    average, ward, complete, single sum of the heights of the unions made
 *
 *  of the experts that some token selects; out[E] = 0, and no value is above that of fewer groups (k-means may not find what it
 *  should: then that one stands). INFINITY where there are no k groups: not a multiple of t->blocks, too few for the guarded
 *  experts. Cosine distances (logits, centred-logits, output-cosine, gated) compare between layers as they are; the others have the
 *  scale of a layer's outputs or weights, and the curve is divided by their mean over the pairs (as the grouping reads them: squared
 *  for kmeans and ward). MOEC_EINVAL: moec_merge_curve_check, else errors of moec_merge_group. Cost: one distance matrix, E groupings
 *  shared out among the threads. Same result on any number of them. */
MOEC_API moec_status moec_merge_curve(double *out, const moec_merge_task *t, const moec_merge_recipe *r, moec_err *err)
    MOEC_USE_RESULT;
/** MOEC_EINVAL: the recipe's grouping has no objective; those that have one are named. */
MOEC_API moec_status moec_merge_curve_check(const moec_merge_recipe *r, moec_err *err) MOEC_USE_RESULT;
/** Bytes that moec_merge_curve needs. */
MOEC_API size_t moec_merge_curve_bytes(const moec_model *m, int64_t n, const moec_merge_recipe *r);
/** Bytes that moec_merge_group and moec_merge_fill_all need. */
MOEC_API size_t moec_merge_bytes(const moec_model *m, int64_t n, const moec_merge_recipe *r);

/* Where merged weights go: writable views. */
typedef struct moec_merge_target {
    const moec_mlp *expert;   /* [E], of the centres */
    moec_weight router;       /* writable; .of NULL: rows stay */
    const moec_tensor *gate_up_bias, *down_bias; /* [., 2I], [., H] writable; NULL: there are none */
    const int32_t *row;       /* [E] of a centre, in these three; -1 */
} moec_merge_target;

typedef struct moec_merge_tally {
    int64_t merged, aligned;    /* experts that went into another; of these moved by alignment */
    int64_t moved, dropped;     /* segments: neurons passed on, thrown away */
    double gain;                /* mean of moec_alignment.gain */
} moec_merge_tally;

/** Writes the merged experts of all groups of two and more (AVERAGE, SUBSPACE), or of all kept experts that took neurons
 *  (SEGMENTS), and their router rows. Weights are averaged in float32, rounded once. Guarded experts and groups of one are not
 *  written. AVERAGE with alignment: every member is aligned to the centre; where no alignment moves the sum of profits above that
 *  of the order as it is, that order stays.
 *  AVERAGE: W = sum_e w_e P_e(W_e), biases likewise (the down bias as it stands).
 *  SUBSPACE: U U^T W per matrix (biases as in AVERAGE), U [rows, r] the leading eigenvectors of sum_e W_e W_e^T, r = ceil(rank *
 *  min(rows, columns)); whiten: of sum_e W_e C_e W_e^T, C_e = sum of v v^T over the inputs v that the matrix has for the tokens that
 *  select e (where no token selects any of a group: as without). This is the union decomposition of Sub-MoE (arXiv 2506.23266,
 *  3.2) without making it, equal to its SVD (tests/interop/test_merge_fill.py). rank 1 is AVERAGE, at its cost. Members without
 *  weight count in U, as in the paper.
 *  SEGMENTS: see moec_segment_opts and merge_segments.c; DERN (arXiv 2509.10377). Neurons of experts with saliency 0 are thrown
 *  away; a member of a cluster counts by its expert's saliency. A neuron takes its biases of gate and up with it; the down bias is the
 *  mean of the kept expert's and of those whose neurons it took, by saliency times the share of their neurons. The router's ADD rule
 *  is made here, LSE by the caller's repair.
 *  Router: rows only; biases of logits and of the selection stay the centre's. ADD with AVERAGE or SUBSPACE adds the members' rows.
 *  MOEC_EINVAL: F8 or packed target; groups that are none (a centre that goes elsewhere, weights that do not add up to 1); rank 0;
 *  segments whose parts all have weight 0; activations wanted (alignment by them, whiten) without tokens or of experts without a
 *  gate; MOEC_ENUMERIC: a weight is not finite, or too large for the target's type; MOEC_ENOMEM, MOEC_EINTR (some groups are
 *  written).
 *  Cost: see moec_align_weights for each member that is aligned; segments: 2 I^2 K (E - K) 2 H operations, and each round of
 *  k-means 2 I n 2 H for a pool of n neurons; subspace: rows^3.
 *  Memory: a group's centre, member and sum in float32, and alignment's; subspace: 16 rows^2 bytes a matrix; segments: 4 experts or
 *  4 blocks of 4096 neurons. Same result on any number of threads. */
MOEC_API moec_status moec_merge_fill_all(moec_merge_tally *out, const moec_merge_target *to, const moec_merge_task *t,
                                         const moec_merge_groups *g, const moec_merge_recipe *r, moec_err *err) MOEC_USE_RESULT;

/* Names of the settings' values, as options and plans have them; NULL behind the last. */
extern MOEC_API const char *const moec_merge_distance_names[], *const moec_merge_grouping_names[], *const moec_merge_mass_names[],
    *const moec_merge_align_names[], *const moec_merge_fill_names[], *const moec_merge_router_names[];
/** Changes one setting: "KEY=VALUE", keys and values as moec_merge_settings lists them. MOEC_EINVAL: no such key (the nearest is
 *  suggested) or value (those that there are are named). */
MOEC_API moec_status moec_merge_set(moec_merge_recipe *r, const char *spec, moec_err *err) MOEC_USE_RESULT;
/** Does a setting change anything beside the recipe's others? If not, *of (or NULL) is what it belongs to, as "fill=subspace".
 *  `key`: may be followed by "=.."; one that there is not belongs everywhere. */
MOEC_API bool moec_merge_applies(const char **of, const moec_merge_recipe *r, const char *key);
/** {"distance": "logits", ..}: all settings that mean something with this fill. */
MOEC_API moec_json *moec_merge_json(const moec_merge_recipe *r);
/** "KEY=A|B|C", a line a setting, into out [size]. */
MOEC_API void moec_merge_settings(char *out, size_t size);

#endif
