/* Inside of moec_gguf_model, shared by gguf_model.c (tensors) and gguf_keys.c (keys, what is refused). */
#ifndef MOEC_RUN_GGUF_PARTS_H
#define MOEC_RUN_GGUF_PARTS_H

#include "run/gguf_model.h"

typedef enum moec_gguf_source_kind {
    MOEC_GGUF_FLAT, MOEC_GGUF_MATRIX, MOEC_GGUF_STACK, MOEC_GGUF_STACK_BIAS, MOEC_GGUF_KEY_B, MOEC_GGUF_VALUE_B
} moec_gguf_source_kind;

typedef struct moec_gguf_source {
    moec_gguf_tensor what;
    moec_gguf_source_kind kind;
    const moec_tensor *tensor; /* FLAT */
    moec_weight weight;        /* MATRIX, KEY_B, VALUE_B */
    const moec_layer *layer;   /* STACK, STACK_BIAS */
    int which;                 /* of these: 0 gate, 1 up, 2 down */
    bool router;               /* MATRIX */
    bool codes;                /* STACK: MXFP4 in the checkpoint */
    int64_t heads;             /* FLAT, MATRIX: rows go in pairs within so many heads; 0: as they are */
} moec_gguf_source;

struct moec_gguf_model {
    const moec_model *m;
    const moec_gguf_rules *rules;
    uint32_t type;
    moec_gguf_source *source;
    size_t n, cap;
};

/** Can llama.cpp compute this model? MOEC_EINVAL. */
moec_status moec__gguf_check(const moec_gguf_model *x, moec_err *err) MOEC_USE_RESULT;

#endif
