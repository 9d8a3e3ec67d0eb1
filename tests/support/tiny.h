/* Small random checkpoints of any family of the table, for tests: names come from the family's patterns (first alternative,
 * first layout that is not quantized), values are multiples of 1/128 that every dtype holds exactly, everything follows from
 * the seed. What a pattern cannot tell (which matrices have biases, keys of one family) is a table in tiny_config.c. */
#ifndef MOEC_TESTS_TINY_H
#define MOEC_TESTS_TINY_H

#include "model/model.h"

typedef struct tiny_spec {
    const char *family; /* model_type; NULL: qwen3_moe */
    int64_t layers, experts, top_k, hidden, heads, kv_heads, head_dim, width, vocab; /* 0: 3, 8, 2, 16, 4, 2, 8, 12, 64 */
    int64_t dense_layer; /* 1 + index of a layer without a router, 0: none; families whose first layers are dense: 1 or 0;
                            Dynamic-MoE: every second one whatever this says */
    moec_dtype dtype;    /* of all tensors; 0 (F64) means F32 */
    bool router_f32;     /* routers are F32 among the others */
    bool untied;
    int64_t shards;      /* 0: one model.safetensors, else so many shards and an index */
    bool both_keys;      /* config.json counts the experts under every alias */
    bool no_keys;        /* and under none: the family's default must be 8 and 2 */
    uint64_t seed;
} tiny_spec;

/** Writes config.json, safetensors, generation_config.json and a side file into a new or empty folder. */
moec_status tiny_write(const char *dir, const tiny_spec *spec, moec_err *err) MOEC_USE_RESULT;
/** The checkpoint of a family that tests/unit/test_families.c runs and transformers has run: every kind of layer that the family
 *  has is in it. */
tiny_spec tiny_of(const char *family);
/** A new empty folder below TMPDIR or /tmp; free with moec_free after tiny_remove. Ends the test program on failure. */
char *tiny_folder(void);
void tiny_remove(const char *dir);
/** "DIR/NAME"; free with moec_free. */
char *tiny_path(const char *dir, const char *name);

#endif
