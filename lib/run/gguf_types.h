/* Which block type each tensor of a GGUF gets: by an integer program over measured costs, by rules, or one for all. */
#ifndef MOEC_RUN_GGUF_TYPES_H
#define MOEC_RUN_GGUF_TYPES_H

#include "calib/sensitivity.h"
#include "run/gguf_model.h"

/* One of --types: tensors whose name matches get the type. */
typedef struct moec_gguf_rule {
    char *pattern;  /* extended regular expression, found anywhere in the name */
    moec_block type;
} moec_gguf_rule;

typedef struct moec_gguf_rules_list {
    moec_gguf_rule *at;
    size_t n;
    bool all;          /* the first is a bare type: for every matrix that no other rule names */
    moec_block usual;
} moec_gguf_rules_list;
/** "q4_k", "ffn_down_exps=q4_k,blk\.[0-3]\..*=q6_k": of several rules that match the last counts. MOEC_EINVAL: an unknown type (the
 *  nearest is named), a pattern that is no regular expression, an empty entry. Release with moec_gguf_rules_release. */
MOEC_API moec_status moec_gguf_rules_read(moec_gguf_rules_list *out, const char *text, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_gguf_rules_release(moec_gguf_rules_list *r);

typedef struct moec_gguf_types_request {
    const moec_sensitivity *sensitivity; /* NULL: rules alone */
    const moec_gguf_rules_list *rules;   /* NULL: none */
    uint32_t candidates;                 /* bit moec_block; 0: the types that rows take of q2_k q3_k q4_k q5_k q6_k q8_0 iq4_xs iq4_nl
                                            q4_1 q5_0 q5_1 mxfp4 and f16 */
    double bits;                         /* bytes of tensor data x 8 over values, at most; or 0 and */
    uint64_t target;                     /* bytes of all files, headers and padding counted, at most; both 0: rules alone */
    uint64_t fixed;                      /* bytes of the files that are not tensor data */
} moec_gguf_types_request;

typedef struct moec_gguf_types {
    moec_block *type;      /* [moec_gguf_model_count]; of tensors that stay F32 or keep the checkpoint's MXFP4: MOEC_BLOCK_COUNT */
    size_t n, fell_back;   /* tensors whose rows the asked type does not divide */
    uint64_t bytes;        /* of tensor data, padding counted */
    double bits, cost, bound; /* cost: sum of moec_sensitivity_cost, nats a token; NAN without sensitivity */
    bool proven;
} moec_gguf_types;

/** @return MOEC_OK; MOEC_ENOFIT: the budget is below the least possible (said), or the target is above the model at F16 (said);
 *          MOEC_EINVAL: bits or target without sensitivity, or one of another model, a rule that matches no tensor, candidates
 *          that leave a tensor none. MOEC_ENOMEM. Release with moec_gguf_types_release. */
MOEC_API moec_status moec_gguf_types_choose(moec_gguf_types *out, const moec_gguf_model *x, const moec_gguf_types_request *r, moec_err *err)
    MOEC_USE_RESULT;
MOEC_API void moec_gguf_types_release(moec_gguf_types *t);

#endif
