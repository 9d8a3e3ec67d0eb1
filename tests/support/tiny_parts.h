/* Shared by tiny.c (tensors) and tiny_config.c (config.json) only. */
#ifndef MOEC_TESTS_TINY_PARTS_H
#define MOEC_TESTS_TINY_PARTS_H

#include "tiny.h"

#include "ckpt/safetensors.h"

/* What a family's config and checkpoint have that its descriptor does not tell. */
typedef struct tiny_extra {
    const char *family;
    const char *keys;      /* JSON object of config keys */
    bool qkv_bias, o_bias, router_bias, head_bias;
    bool whole_norms;      /* of q and k: over all heads */
    int64_t null_experts;
} tiny_extra;

/** The row of a family; one without anything when it has none. */
const tiny_extra *tiny_extra_of(const moec_family *f);
/** Has layer l no router? */
bool tiny_is_dense(const tiny_spec *s, const moec_family *f, int64_t l);
/** Is layer l one of the family's own kind (convolution, delta net, sliding, chunked), not full attention? */
bool tiny_is_own(int64_t l);
/** Sizes of latent attention, the delta net and shared experts that follow from the others. */
enum { TINY_LATENT_NOPE, TINY_LATENT_ROPE, TINY_LATENT_VALUE, TINY_Q_RANK, TINY_KV_RANK };
int64_t tiny_latent(const tiny_spec *s, int which);
enum { TINY_DELTA_KEY_HEADS = 2, TINY_DELTA_VALUE_HEADS = 4, TINY_DELTA_KEY_DIM = 6, TINY_DELTA_VALUE_DIM = 5, TINY_TAPS = 3 };
/** Text of config.json; free with moec_free. */
moec_status tiny_config(char **out, const tiny_spec *s, const moec_family *f, moec_err *err) MOEC_USE_RESULT;

#endif
