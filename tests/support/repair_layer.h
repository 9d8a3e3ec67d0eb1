/* A small MoE layer in memory for the tests of repair, its outputs stated in float64, and targets to aim it at. */
#ifndef MOEC_TESTS_REPAIR_LAYER_H
#define MOEC_TESTS_REPAIR_LAYER_H

#include "method/repair_parts.h"

enum { EXPERTS = 6, HIDDEN = 24, WIDTH = 20, MOST_SLOTS = 4, EXPERT_VALUES = 3 * HIDDEN * WIDTH };

/* Of all random numbers. */
extern uint64_t repair_seed;

typedef struct rules {
    int64_t n, n_fit, keep, slots; /* 0: 600, 400, 4, 2 */
    moec_dtype dtype;              /* 0: F32 */
    moec_router_score score;
    moec_choice choice;
    double scale;                  /* 0: 1 */
    bool renorm, clamped, biased, on_input, pairs, router, router_bias;
} rules;

/* A layer whose tensors lie in a shared mapping, as drafts do. */
typedef struct fixture {
    rules r;
    moec_model model;
    moec_family family;
    moec_layer layer;
    moec_mlp expert[EXPERTS];
    moec_tensor gate_up, down, gate_up_bias, down_bias, router;
    bool removed[EXPERTS];
    int32_t keep[EXPERTS];
    unsigned char *map;
    size_t map_bytes, used;
    moec_repair_task task;
    float *x, *y, *rest, *weight, *gates, router_bias[EXPERTS];
    int32_t *ids;
} fixture;

float repair_uniform(float low, float high);
/* Roughly normal. */
float repair_normal(void);
moec_weight repair_view(const moec_tensor *t, int64_t at, int64_t rows, int64_t cols, int64_t row_step, int64_t col_step);
/* A layer by these rules, its tokens routed; free with the next. */
void repair_setup(fixture *f, rules r);
void repair_teardown(fixture *f);
/* An expert's weights as float64: gate, up, down, as moec_piece has them. */
void repair_weights(double *out, const fixture *f, int32_t e);
/* a = act(gate x, up x), x times `times`. */
void repair_act(double *a, const fixture *f, const double *w, int32_t e, const float *x, double times);
/* r += gate f_e(x) */
void repair_add(double *r, const fixture *f, const double *w, int32_t e, const float *x, double gate);
/* y = what the layer gives + noise; `rest` is y. */
void repair_aim(fixture *f, float noise);
/* Every value of a tensor is moved by about `size`. */
void repair_shake(const moec_tensor *t, float size);
/* rest is y minus what the layer gives, whatever was done to the layer. */
void repair_rest_is_right(const fixture *f, double tolerance);
void repair_start(fixture *f);

#endif
