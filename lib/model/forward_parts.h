/* Inside of the forward pass, shared by forward.c, attention.c and moe.c only. */
#ifndef MOEC_MODEL_FORWARD_PARTS_H
#define MOEC_MODEL_FORWARD_PARTS_H

#include "model/forward.h"

enum {
    MOEC_BLOCK = 256,    /* tokens of one matrix product inside an expert */
    MOEC_QUERIES = 64,   /* query rows of one attention score block */
    MOEC_GROUP = 512,    /* tokens whose attention projections run together, unless one sequence is longer */
};

/* One worker's memory. g: tokens of an attention group, n: tokens of a chunk. */
typedef struct moec_scratch {
    float *x, *r;                   /* [n,H] normed input, routed output */
    float *panel_in, *panel_a, *panel_b, *panel_out; /* panels: [g or BLOCK] x widest use */
    float *q, *k, *v, *ctx;         /* [g, heads*d] [g, kv*d] [g, kv*d] [g, heads*d] */
    float *scores_qk;               /* [QUERIES, max_seq] */
    float *rope_cos, *rope_sin;     /* [max_seq, width/2] where a sequence needs its own table, else NULL */
    double *inv_freq;               /* [width/2] */
    float *logits, *scores;         /* [n,E] */
    int32_t *ids, *next_ids;        /* [n,k] */
    float *gates, *y_norm;          /* [n,k] */
    int32_t *count, *first;         /* [E], [E+1] */
    int32_t *token, *slot;          /* [n*k] tokens and slots by expert */
    float *weight;                  /* [n*k] gate of each slot, by expert */
    float *out_absmax, *in_absmax;  /* [E] */
    int32_t *out_channel;           /* [E] */
    void *gemm;                     /* scratch of moec_gemm */
    moec_expert_sums sums;
} moec_scratch;

struct moec_forward {
    const moec_model *m;
    moec_forward_opts o;
    const moec_layer *layer, *next_moe; /* current; the next one with a router, or NULL */
    int64_t group;                      /* tokens that an attention group may hold */
    float *norm_attn, *norm_mlp, *q_norm, *k_norm, *q_bias, *k_bias, *v_bias, *o_bias; /* float32 of the current layer */
    float *router, *next_router, *router_norm;                                        /* [E,H] [E,H] [E] */
    float *rope_cos, *rope_sin;                                                       /* [max_seq, width/2] */
    moec_scratch *scratch; /* [workers] */
};

/* cos and sin of a sequence of `length` tokens into [length, width/2] tables. */
void moec__rope_fill(float *cos_out, float *sin_out, double *inv_freq, const moec_rope *rope, int64_t length);
/* h += attention(norm(h)) for the sequences of one group. */
moec_status moec__attention(moec_forward *f, moec_scratch *s, float *h, const int64_t *seq, int64_t n_seq, moec_err *err)
    MOEC_USE_RESULT;
/* s->x = norm(h); s->r = feed-forward of x, routed or dense; the router's results into s. */
moec_status moec__feed_forward(moec_forward *f, moec_scratch *s, const float *h, int64_t n, moec_err *err) MOEC_USE_RESULT;

#endif
