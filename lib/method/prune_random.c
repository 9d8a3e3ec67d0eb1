/* Random scores: the baseline that every method has to beat. A score depends on seed, layer and expert alone, so plans
 * of one seed nest (25 % is part of 50 %), and any machine makes the same plan. */
#include "method/method.h"

#include "base/mem.h"
#include "base/random.h"

/* In [0, 1), 53 bits. */
static double uniform(uint64_t seed, uint64_t layer, uint64_t expert)
{
    return (double)(moec_mix64(moec_mix64(moec_mix64(seed) ^ layer) ^ expert) >> 11) * 0x1p-53;
}

static moec_status plan_random(moec_plan **out, const moec_method *me, const moec_request *q, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t layers = q->model->moe_layers, n = q->model->dims.experts;
    double *score = NULL;
    *out = NULL;
    MOEC_TRY(MOEC_NEW(score, (size_t)(layers * n), err));
    for (int64_t l = 0; l < layers; l++)
        for (int64_t e = 0; e < n; e++)
            score[l * n + e] = uniform((uint64_t)q->seed, (uint64_t)l, (uint64_t)e);
    MOEC_TRY(moec_select(out, me, q, score, err));
done:
    moec_free(score);
    return st;
}

extern const moec_method moec_method_random;
const moec_method moec_method_random = {
    .name = "random",
    .kind = MOEC_PRUNE,
    .brief = "a random choice by --seed; needs no statistics",
    .paper = "baseline",
    .formula = "splitmix64(seed, layer, expert)",
    .plan = plan_random,
};
