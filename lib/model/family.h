/* Model families as data: how a checkpoint of a family names its tensors, which config keys hold its numbers, and which
 * rule each step of its forward pass follows. A new family is one file with one moec_family and one line in
 * family_table.inc; no other file names a family. Symbols in comments: H hidden, E experts, k top-k, I expert width. */
#ifndef MOEC_MODEL_FAMILY_H
#define MOEC_MODEL_FAMILY_H

#include "base/err.h"
#include "base/json.h"

#include <stdbool.h>
#include <stdint.h>

typedef enum moec_router_score { MOEC_SCORE_SOFTMAX, MOEC_SCORE_SIGMOID } moec_router_score;
/* Are the k selected weights divided by their sum? By config key norm_topk_prob, always, never. */
typedef enum moec_renorm { MOEC_RENORM_KEY, MOEC_RENORM_ALWAYS, MOEC_RENORM_NEVER } moec_renorm;
/* Which layers have no router: none; those in mlp_only_layers or off the decoder_sparse_step. */
typedef enum moec_dense_rule { MOEC_DENSE_NONE, MOEC_DENSE_MLP_ONLY } moec_dense_rule;
/* Which layers slide: none; all when sliding_window is set; all when use_sliding_window is true as well. */
typedef enum moec_window_rule { MOEC_WINDOW_NONE, MOEC_WINDOW_ALL, MOEC_WINDOW_IF_USED } moec_window_rule;

enum { MOEC_KEY_ALIASES = 4 };

typedef struct moec_family {
    const char *model_type;   /* config.json's model_type */
    const char *architecture; /* config.json's architectures[0], for reports */
    const char *source;       /* where the layout and the arithmetic were taken from */

    /* Config keys: the first that is present wins, in reading and in writing. */
    const char *key_experts[MOEC_KEY_ALIASES], *key_top_k[MOEC_KEY_ALIASES], *key_expert_width[MOEC_KEY_ALIASES];
    const char *key_dense_width;
    int64_t default_experts, default_top_k; /* when no key is present; 0: the key is required */

    /* Tensor names. %d is the layer, then the expert. Optional ones may be absent from a checkpoint. */
    const char *embed, *final_norm, *head; /* head absent: tied to embed */
    const char *norm_attn, *norm_mlp;
    const char *q, *k, *v, *o;                     /* weights; "<name minus .weight>.bias" is used when present */
    const char *q_norm, *k_norm;                   /* optional; per head */
    const char *router;                            /* [E, H] */
    const char *expert_gate, *expert_up, *expert_down; /* [I, H] [I, H] [H, I] */
    const char *dense_gate, *dense_up, *dense_down;

    double default_rope_theta, default_norm_eps;
    moec_router_score score;
    moec_renorm renorm;
    bool renorm_default; /* value of norm_topk_prob when the key is absent */
    moec_dense_rule dense;
    moec_window_rule window;

    /* Clients that load this family when every layer has the same number of experts; what llama.cpp calls it. */
    bool loads_transformers, loads_vllm, loads_llama_cpp;
} moec_family;

/** The family whose model_type this is, or NULL. */
MOEC_API const moec_family *moec_family_find(const char *model_type);
/** Row i of the table, NULL behind the last. */
MOEC_API const moec_family *moec_family_at(int i);

#endif
