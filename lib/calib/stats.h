/* Router statistics: what calibration collects and methods read. Everything is a sum, a count or a maximum, never a mean,
 * so that files from several runs, texts and machines merge by addition (maxima by maximum). One table, moec_stat_kinds,
 * says for every statistic its name, shape, unit, how it merges and the tier that switches it on.
 * Symbols: D domains, L MoE layers, E experts, N router rows without a network, k top-k, H hidden, I expert width. */
#ifndef MOEC_CALIB_STATS_H
#define MOEC_CALIB_STATS_H

#include "base/hash.h"
#include "base/json.h"
#include "calib/sensitivity.h"
#include "model/model.h"

typedef enum moec_stat {
    /* tier 0 */
    MOEC_STAT_SELECTED,      /* [L,E] u64   tokens that select e */
    MOEC_STAT_RANK,          /* [L,E,k] u64 tokens for which e is the j-th choice by weight; where a token may have more
                                            than k experts, the last also counts those behind */
    MOEC_STAT_GATE_SUM,      /* [L,E] f64   sum of the applied weight g over the tokens that select e */
    MOEC_STAT_GATE_SQ,       /* [L,E] f64   sum of g^2 */
    MOEC_STAT_GATE_TOP1_SUM, /* [L,E] f64   sum of g where e is the first choice */
    MOEC_STAT_PROB_SUM,      /* [L,E] f64   sum of the full score (softmax, sigmoid, ReLU) over all tokens */
    MOEC_STAT_PROB_SEQ_SUM,  /* [L,E] f64   sum over sequences of the mean score */
    MOEC_STAT_LOGIT_SUM,     /* [L,E] f64   sum of router logits z */
    MOEC_STAT_LOGIT_SQ,      /* [L,E] f64   sum of z^2 */
    MOEC_STAT_MARKER_TOP1,   /* [L,E] f64   sum of z where e is the first choice by logit (TCESS, Ka = 1) */
    MOEC_STAT_MARKER_TOPK,   /* [L,E] f64   sum of z where e is among the k largest logits (TCESS, Ka = k) */
    MOEC_STAT_NORM_SUM,      /* [L,E] f64   sum of |y|_2, y the un-gated expert output */
    MOEC_STAT_NORM_SQ,       /* [L,E] f64   sum of |y|^2 */
    MOEC_STAT_GNORM_SUM,     /* [L,E] f64   sum of g|y| */
    MOEC_STAT_GNORM_SQ,      /* [L,E] f64   sum of g^2 |y|^2 */
    MOEC_STAT_UGNORM_SUM,    /* [L,E] f64   sum of max(1 - cos(h, h+r), 0) g|y|, r the routed output (EASY-EP) */
    MOEC_STAT_OUT_ABSMAX,    /* [L,E] f32   max |y_i| at the output of down_proj */
    MOEC_STAT_OUT_CHANNEL,   /* [L,E] i32   channel of OUT_ABSMAX (the lowest on ties); follows OUT_ABSMAX in merging */
    MOEC_STAT_IN_ABSMAX,     /* [L,E] f32   max |a_i| at the input of down_proj */
    MOEC_STAT_COS_MOE,       /* [L] f64     sum of cos(h, h + MoE output) */
    MOEC_STAT_COS_BLOCK,     /* [N+1,N+1] f64 sum of cos(H_i, H_j) over sampled tokens, N = all layers */
    MOEC_STAT_BLOCK_TOKENS,  /* [] u64      how many tokens COS_BLOCK summed over */
    MOEC_STAT_NORMS_RES,     /* [L,3] f64   sum of |h|, |r|, |shared expert output| */
    MOEC_STAT_RATIO_HIST,    /* [L,k-1,1024] u32  histogram of w_(j+1)/w_(1), j = 1.. ; bin floor(1024 x), 1 in the last */
    MOEC_STAT_CUMGATE_HIST,  /* [L,k,256] u32     histogram of the cumulative sorted weight before the i-th choice over
                                                  the sum of the selected weights; bin floor(256 x), 1 in the last */
    MOEC_STAT_TOPP_COUNT,    /* [L,20,E+1] u32    tokens whose n experts of largest logit are the fewest that hold the
                                                  share p = 0.05 .. 1.00 of the sum of all E scores */
    MOEC_STAT_COACT,         /* [L,E,E] u64 tokens that select both (diagonal: SELECTED) */
    MOEC_STAT_TRANS,         /* [L-1,E,E] u64 tokens that select e at MoE layer l and e' at the next */
    MOEC_STAT_PREFETCH_HIT,  /* [L-1,k] u64 tokens whose j-th choice at the next MoE layer is among the k that its router
                                            would choose from this layer's router input */
    MOEC_STAT_COS_ROUTER,    /* [L,E] f64   sum of cos(x, w_e) over the tokens that select e */
    MOEC_STAT_COS_ROUTER_MAX, /* [L,E] f64  maximum of cos(x, w_e) over the tokens that select e; -1 where there is none */
    MOEC_STAT_ACTIVE,        /* [L,E+1] u64 tokens that use n experts; all at n = k unless their number varies */
    MOEC_STAT_NULL_SELECTED, /* [L,N] u64   tokens that select row E + i of the router, an expert without a network */
    MOEC_STAT_NULL_GATE_SUM, /* [L,N] f64   sum of its applied weight over these */
    MOEC_STAT_PROB_SELECTED, /* [L,E] f64   sum of the full score, before it is renormalised, over the tokens that select e */
    /* tier 1 */
    MOEC_STAT_LOGIT_GRAM,    /* [L,E,E] f64 sum of z z^T */
    MOEC_STAT_Y_SUM,         /* [L,E,H] f64 sum of y over the tokens that select e */
    MOEC_STAT_GY_SUM,        /* [L,E,H] f64 sum of g y */
    MOEC_STAT_ACT_ABS,       /* [L,E,I] f64 sum of |a| */
    MOEC_STAT_ACT_SQ,        /* [L,E,I] f64 sum of a^2 */
    MOEC_STAT_GACT_SQ,       /* [L,E,I] f64 sum of g^2 a^2; of a^2 where g multiplies the expert's input and is in a */
    MOEC_STAT_XIN_ABS,       /* [L,E,H] f64 sum of |x| over the tokens that select e */
    MOEC_STAT_XIN_SQ,        /* [L,E,H] f64 sum of x^2 */
    /* tier 2: what widths cost, added by moec_measure (lib/run), never by calibration alone; B: MOEC_QUANT_WIDTHS */
    MOEC_STAT_QUANT_SQ,      /* [L,E,4,B] f64 of gate, up, down alone and all three: sum of g^2 |y - y_q|^2 / mean(h'^2) */
    MOEC_STAT_QUANT_FRO,     /* [L,E,B] f64 sum over sequences of sqrt(sum of g^2 |y - y_q|^2) */
    MOEC_STAT_QUANT_KL,      /* [L] f64     sum of KL to the original when the layer's experts alone have 2 bits; 0: not measured;
                                            where part of the text was run: what that makes for all of it */
    MOEC_STAT_COUNT
} moec_stat;
enum { MOEC_QUANT_WIDTHS = 5 };
#define MOEC_QUANT_WIDTH_LIST {1, 2, 3, 4, 8}

typedef enum moec_cell { MOEC_CELL_U64, MOEC_CELL_U32, MOEC_CELL_F64, MOEC_CELL_F32, MOEC_CELL_I32 } moec_cell;
typedef enum moec_merge { MOEC_MERGE_ADD, MOEC_MERGE_MAX, MOEC_MERGE_FOLLOW } moec_merge;

typedef struct moec_stat_kind {
    const char *name;  /* HDF5 dataset name and what errors call it */
    const char *shape; /* per layer, one letter an axis: E N k H I, j = k-1, r = 1024, c = 256, p = 20, f = E+1, 3,
                          n = all layers + 1; "" a scalar */
    moec_cell cell;
    moec_merge merge;  /* FOLLOW: the value that belongs to the maximum of the kind before it is kept */
    int tier;
    int layers;        /* 1: one block per MoE layer; 2: one per pair of neighbouring MoE layers (L-1); 0: per model */
    double start;      /* value of a cell that has seen no token */
    double low;        /* no cell is below this; -INFINITY: any finite value */
    const char *unit;
    const char *about; /* one line */
} moec_stat_kind;
extern MOEC_API const moec_stat_kind moec_stat_kinds[MOEC_STAT_COUNT];

/* What a statistics file is about; two files merge only when model, rule and shape are equal. */
typedef struct moec_stats_meta {
    char model[33];        /* moec_ckpt_fingerprint */
    char model_type[64];
    char *router_rule;     /* JSON: score, renorm, top-k, ... */
    char *options;         /* JSON: seq_len, seed, compute mode, text digests */
    char compute[16];      /* "f32" or "bf16" */
    int64_t layers, moe_layers, experts, top_k, hidden, expert_width;
    int64_t null_experts;  /* N; in files it is part of router_rule */
    int64_t *moe_layer;    /* [moe_layers] index of each MoE layer among all */
    int tier;
} moec_stats_meta;

typedef struct moec_stats_domain {
    char *name;
    double weight;              /* used when domains are mixed; sums are stored unweighted */
    uint64_t tokens, sequences;
    char digest[33];            /* of token ids and window borders */
    void *data[MOEC_STAT_COUNT]; /* whole array of each kind, NULL when not collected */
} moec_stats_domain;

typedef struct moec_stats {
    moec_stats_meta meta;
    int n_domains;
    moec_stats_domain *domain;
    moec_sensitivity *sensitivity; /* of all domains together; NULL: not measured. Dropped where files are merged */
    struct moec_stats_lean *lean;  /* of moec_stats_load_lean: the open file; else NULL */
} moec_stats;

/** Statistics of no tokens: every cell at its kind's `start`, every kind up to meta->tier (0 or 1) collected. `meta` is copied;
 *  weights are 1. names: n_domains names of 1 to 200 bytes, all different.
 *  MOEC_EINVAL: a size out of range, router_rule or options not JSON or above 1 MiB, a name empty, too long or twice.
 *  MOEC_ENOMEM. Free with moec_stats_free. */
MOEC_API moec_status moec_stats_new(moec_stats **out, const moec_stats_meta *meta, int n_domains,
                                    const char *const *names, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_stats_free(moec_stats *s);
MOEC_API void moec_stats_meta_release(moec_stats_meta *m);

/** Cells of one layer's block of a kind, and number of blocks; 0 blocks where the kind does not apply (k = 1, L = 1, N = 0).
 *  Sizes in `meta` must be in range (those of moec_stats_new and moec_stats_load are). */
MOEC_API int64_t moec_stat_cells(const moec_stats_meta *m, moec_stat kind);
MOEC_API int64_t moec_stat_blocks(const moec_stats_meta *m, moec_stat kind);
MOEC_API size_t moec_cell_bytes(moec_cell c);
/** Block of MoE layer l in a domain (of a pair kind: that of l and l+1; of a kind per model: the whole, whatever l is), or
 *  NULL when not collected. */
MOEC_API void *moec_stat_at(const moec_stats *s, int domain, moec_stat kind, int64_t moe_layer);
/** Cell i of a block of a kind that counts (u64) or sums (f64). */
MOEC_API double moec_stat_cell(const void *block, moec_stat kind, int64_t i);

/** HDF5 file: /meta attributes, /domains/NAME attributes and datasets t0/KIND (chunked and compressed) and t1/KIND
 *  (plain), each with its unit, meaning and merge rule, and /gguf with the sensitivity; the same bytes for the same content. In NAME the bytes '/', '%',
 *  a leading '.' and control characters are written %XX. /meta's attribute kinds lists what is collected. The file's first
 *  512 bytes (an HDF5 user block) hold a checksum of the rest.
 *  Written aside as PATH.tmp and renamed. MOEC_EIO, MOEC_ENOFIT (disk full); MOEC_ENUMERIC: a cell is not finite or below
 *  its kind's bound (the text names domain, kind, layer and expert); MOEC_EINVAL: of moec_stats_load_lean. Nothing is written then. */
MOEC_API moec_status moec_stats_save(const moec_stats *s, const char *path, moec_err *err) MOEC_USE_RESULT;
/** MOEC_EIO; MOEC_EFORMAT: not ours, damaged (the checksum differs), another format version, a missing attribute or
 *  dataset, a dataset of another type or shape than the attributes say, sizes out of range, a count or sum that is
 *  negative or not finite. Kinds that are not known are passed over, those that the file does not list are NULL: files of
 *  older and newer programs can be read. Memory: what is read, at most some 1100 times the file's length. */
MOEC_API moec_status moec_stats_load(moec_stats **out, const char *path, moec_err *err) MOEC_USE_RESULT;
/** The same, but of the kinds only SELECTED is read: the others stay in the file, which is open until moec_stats_free, and their
 *  data is NULL. They are there in the right form, their values are checked when they are fetched. Such statistics can be asked by
 *  moec_stats_fetch, moec_stats_holds and moec_stats_check; they are not for methods, moec_stats_save and moec_stats_merge.
 *  Memory: 8 L E bytes a domain, and the sensitivity. */
MOEC_API moec_status moec_stats_load_lean(moec_stats **out, const char *path, moec_err *err) MOEC_USE_RESULT;
/** True when every domain, of which there is one at least, has the kind, in memory or in the file. */
MOEC_API bool moec_stats_holds(const moec_stats *s, moec_stat kind);
/** Rows first .. first + n - 1 of the block that moec_stat_at gives (of its first axis: experts where there are any; a block without
 *  axes has one row) into `out`, from memory or from the file. Not for use inside parallel loops. MOEC_EFORMAT: not collected, a value
 *  that moec_stats_load would refuse, or the file cannot be read any more; MOEC_EINVAL: beyond the block. */
MOEC_API moec_status moec_stats_fetch(void *out, const moec_stats *s, int domain, moec_stat kind, int64_t moe_layer, int64_t first,
                                      int64_t n, moec_err *err) MOEC_USE_RESULT;
/** Bytes of all cells in memory. */
MOEC_API uint64_t moec_stats_memory(const moec_stats *s);
/** The same as moec_stats_load from bytes in memory; `what` is what errors call them. */
MOEC_API moec_status moec_stats_load_memory(moec_stats **out, const void *bytes, size_t len, const char *what,
                                            moec_err *err) MOEC_USE_RESULT;

/** Adds `from` to `into`: domains of the same name add up, others are appended. Counts stop at the largest value of their
 *  type. A domain in both keeps the weight of `into` and gets the sum of both digests (as 128-bit numbers, so the order of
 *  merging does not matter; "merged" when one is not a digest). Options that differ become {"merged": [..]}, each once, in
 *  byte order; compute modes that differ become "mixed". Kinds that one of both lacks, and those of tier 2 where
 *  moec_stats_quant_group differs, are dropped, and sensitivity always ("gguf"), with their names in *dropped, separated by blanks, or "" (`dropped` may be NULL;
 *  free with moec_free).
 *  MOEC_EFORMAT when the models, router rules or shapes differ (the text says which); MOEC_EINVAL: one is of
 *  moec_stats_load_lean; MOEC_ENOMEM. `into` is unchanged on
 *  failure. */
MOEC_API moec_status moec_stats_merge(moec_stats *into, const moec_stats *from, char **dropped, moec_err *err)
    MOEC_USE_RESULT;
/** The model's routing rule as JSON text: what must be equal for statistics to add up. Free with moec_free. MOEC_ENOMEM. */
MOEC_API moec_status moec_router_rule(char **out, const moec_model *m, moec_err *err) MOEC_USE_RESULT;
/** MOEC_EFORMAT unless the statistics are of this model ("statistics of another model: ..."). MOEC_ENUMERIC as in
 *  moec_stats_save. Cost: one read of the statistics, and moec_ckpt_fingerprint. */
MOEC_API moec_status moec_stats_check(const moec_stats *s, const moec_model *m, moec_err *err) MOEC_USE_RESULT;

/** Collects a kind from now on: every domain has it, each cell at its `start`, whatever was there before. MOEC_ENOMEM: some
 *  domains may have it, and the kind counts as not collected. */
MOEC_API moec_status moec_stats_collect(moec_stats *s, moec_stat kind, moec_err *err) MOEC_USE_RESULT;
/** No domain has it any more. */
MOEC_API void moec_stats_forget(moec_stats *s, moec_stat kind);
/** "quant_group" of the options, columns that share a scale where kinds of tier 2 were measured (0: a whole row); of merged
 *  options the one that all have. -1: there is none, or they differ. */
MOEC_API int64_t moec_stats_quant_group(const moec_stats *s);
/** Sets it. MOEC_ENOMEM; then nothing is changed. */
MOEC_API moec_status moec_stats_set_quant_group(moec_stats *s, int64_t group, moec_err *err) MOEC_USE_RESULT;

/** Index of a domain. MOEC_EINVAL: there is none of that name; the nearest is suggested. */
MOEC_API moec_status moec_stats_domain_find(int *out, const moec_stats *s, const char *name, moec_err *err) MOEC_USE_RESULT;
/** How much domain d counts where all are mixed: its weight, 1 where it is the only one. */
MOEC_API double moec_stats_weight(const moec_stats *s, int d);
/** Adds to `out` [n], for each domain, weight times value [expert, i] of a kind [E,n] that is in memory. Returns the tokens that selected the
 *  expert, added up alike. */
MOEC_API double moec_stats_add_expert(double *out, const moec_stats *s, moec_stat kind, int64_t moe_layer, int64_t expert, int64_t n);
/** Sets domain[].weight from "NAME=W[,NAME=W]", W from 0 (the domain does not count) up; domains that are not named keep
 *  theirs. A name may hold '=' but no ','. MOEC_EINVAL: an entry without a weight, a weight negative or not finite, a
 *  name unknown (the nearest is suggested) or twice, nothing left above 0; then no weight is changed. */
MOEC_API moec_status moec_stats_set_weights(moec_stats *s, const char *spec, moec_err *err) MOEC_USE_RESULT;
/** Medians for skipping experts at run time: of MoE layer l and choice j = 2..k
 *
 *    beta[l][j-2] = median over tokens of w_(j) / w_(1)          w sorted by size, from RATIO_HIST
 *
 *  The median is where the count reaches half, linear inside its bin of 1/1024 (so within that of the middle token's
 *  ratio). Over all domains, counted with their weights where there are several. NAN where no token has a j-th expert.
 *  out: [moe_layers][top_k - 1]. Source: Lu et al., Not All Experts are Equal (arXiv:2402.14800), for k = 2; the other
 *  ranks are ours. MOEC_EFORMAT: RATIO_HIST was not collected. */
MOEC_API moec_status moec_stats_betas(double *out, const moec_stats *s, moec_err *err) MOEC_USE_RESULT;

/** Adds block `part` (cells of `kind`) into `sum` by the kind's rule; for FOLLOW kinds pass the maxima of both before they
 *  are merged in `lead_sum` and `lead_part`. */
MOEC_API void moec_stat_add(moec_stat kind, void *sum, const void *part, int64_t cells, const void *lead_sum,
                            const void *lead_part);

/** What `stats show` prints:
 *    {"meta": {..}, "kinds": [..],
 *     "domains": [{"name", "tokens", "sequences", "weight", "digest", "coverage": C, "layers": [R..]}],
 *     "coverage": C, "layers": [R..],             the last two over all domains together
 *     "betas": [[k-1 numbers or null] a layer],   moec_stats_betas
 *     "errors": {"group_size", "bits": [..],      where QUANT_SQ was measured, over all domains together
 *                "layers": [{"layer", "relative": [a number a width], "kl", "gain"}]},
 *     "gguf": {"tokens", "tensors", "measured"}}  where there is a sensitivity; tensors: how many, measured: of these have a KL
 *    C: {"experts", "floor", "below_floor", "never", "min", "below_floor_experts": [{"layer","expert","tokens"}],
 *        "never_experts": [{"layer","expert"}]}   counts over all layers; one never seen is in both lists (floor > 0)
 *    R: {"layer", "min", "median", "max", "below_floor", "never",          tokens that select an expert
 *        "cv": standard deviation over mean, "entropy": of the shares, 1 when all are equal, 0 when one has all,
 *        "top": [{"expert", "share"}]}            the 5 most selected; share of the layer's selections
 *    relative: sqrt(S / (H tokens)), S the sum of QUANT_SQ over experts, all three matrices: error of the layer's experts over
 *        the residual stream behind it, as if experts' errors were independent
 *    kl: QUANT_KL a token, nats; gain: QUANT_KL over S at 2 bits; null where it was not measured
 *  cv, entropy and share are null in a layer that no token has reached. */
MOEC_API moec_status moec_stats_describe(moec_json **out, const moec_stats *s, uint64_t floor, moec_err *err)
    MOEC_USE_RESULT;

#endif
