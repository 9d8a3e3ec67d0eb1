/* A store of expert patterns (PreMoe): for each task, who matters in every layer, so that one small file serves any task with
 * any number of experts, and the task that is nearest to a prompt.
 *
 *    marker   m_t[e]    = z_t[e] if e has the largest logit z_t of the layer, else 0
 *    TCESS    s[l,e]    = (1/T) sum_t m_t[e]                            MARKER_TOP1 / tokens
 *    ranking  [l]       = experts by descending s[l,.], ties to the lower number
 *    key      [e]       = s[first MoE layer, e]
 *    nearest(q)         = argmin over tasks of |key - q|_2
 *
 * Several domains in one task: s = sum_d w_d M_d / sum_d w_d T_d, with the domains' weights.
 * File: {"moecompress_patterns": 1, "model": fingerprint, "model_type", "layers", "experts", "top_k",
 *        "tasks": [{"name", "tokens", "stats": digest of the statistics file, "key": [E], "ranking": [[E] a layer],
 *                   "score": [[E] a layer]}]}
 * Source: PreMoe: Lightening MoEs on Constrained Memory by Expert Pruning and Retrieval (arXiv:2505.17639), and its repository:
 * Ka = 1, no threshold. Departs: its value of an entry maps ranks of layer 0 to ranks of layer l, which is the same as each
 * layer's own ranking; distances are not squared. As there, logits are summed as they are: an expert that is often first
 * with a negative logit ranks behind one that never is. */
#ifndef MOEC_METHOD_PATTERNS_H
#define MOEC_METHOD_PATTERNS_H

#include "calib/stats.h"
#include "method/method.h"

typedef struct moec_task {
    char *name;
    uint64_t tokens;
    char stats[33];   /* digest of the statistics file, "" when not known */
    int32_t *ranking; /* [layers * experts] */
    double *score;    /* [layers * experts]; its first layer is the key */
} moec_task;

typedef struct moec_patterns {
    char model[33], model_type[64];
    int64_t layers, experts, top_k; /* MoE layers, experts of a layer, experts of a token */
    int n_tasks;
    moec_task *task;
} moec_patterns;

/** The name by which prune asks for the nearest task; no task can have it. */
#define MOEC_TASK_NEAREST "nearest"

/** A store without tasks for the model that `about` is of. MOEC_ENOMEM. Free with moec_patterns_free. */
MOEC_API moec_status moec_patterns_new(moec_patterns **out, const moec_stats_meta *about, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_patterns_free(moec_patterns *p);

/** Adds a task from statistics: of domain `domain`, or of all together (-1). `digest` is that of the file.
 *  MOEC_EINVAL: a name empty, above 200 bytes, with control characters, not UTF-8 or "nearest"; every weight 0.
 *  MOEC_EEXIST: the task is there and `replace` is false. MOEC_EFORMAT: statistics of another model or shape, without
 *  tokens, without MARKER_TOP1; MOEC_ENUMERIC: a score is not finite; MOEC_ENOMEM. `p` is unchanged on failure. */
MOEC_API moec_status moec_patterns_add(moec_patterns *p, const moec_stats *s, int domain, const char *name,
                                       const char *digest, bool replace, moec_err *err) MOEC_USE_RESULT;

/** One JSON line. Free with moec_free. MOEC_ENOMEM. */
MOEC_API moec_status moec_patterns_to_text(char **out, const moec_patterns *p, moec_err *err) MOEC_USE_RESULT;
/** Through PATH.tmp. MOEC_EIO, MOEC_ENOFIT, MOEC_ENOMEM. */
MOEC_API moec_status moec_patterns_save(const moec_patterns *p, const char *path, moec_err *err) MOEC_USE_RESULT;
/** From a hostile text. MOEC_EFORMAT: another version, an unknown, missing or mistyped key, a size out of range, a list of
 *  another length, a ranking that is not the order of its scores (so not a permutation either), a key that is not the
 *  first layer's scores, a task twice, no task at all. What is allocated is bounded by the text's length. */
MOEC_API moec_status moec_patterns_parse(moec_patterns **out, const char *text, size_t len, const char *what, moec_err *err)
    MOEC_USE_RESULT;
/** The same of a file of at most 1 GiB. MOEC_EIO too. */
MOEC_API moec_status moec_patterns_read(moec_patterns **out, const char *path, moec_err *err) MOEC_USE_RESULT;

/** Index of a task. MOEC_EINVAL: there is none of that name; the nearest name is suggested. */
MOEC_API moec_status moec_patterns_find(int *out, const moec_patterns *p, const char *name, moec_err *err) MOEC_USE_RESULT;
/** Distances of the statistics' key (`domain` as in moec_patterns_add) to every task; *out: task indices by ascending
 *  distance, ties in the store's order; *distance in the same order. Both [n_tasks], free with moec_free. Errors as
 *  moec_patterns_add. */
MOEC_API moec_status moec_patterns_query(int **out, double **distance, const moec_patterns *p, const moec_stats *s,
                                         int domain, moec_err *err) MOEC_USE_RESULT;
/** The plan that keeps the first K of each layer's ranking (moec_select does: protected experts and groups count as for
 *  any method). method is "tcess", stats the task's digest, options get "task" and, where `distance` is not NAN,
 *  "distance". q->stats is not looked at.
 *  MOEC_EFORMAT: a store of another model or shape; else as moec_select. */
MOEC_API moec_status moec_patterns_plan(moec_plan **out, const moec_patterns *p, int task, double distance,
                                        const moec_request *q, moec_err *err) MOEC_USE_RESULT;

#endif
