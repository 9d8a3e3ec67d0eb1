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
/** "q4_k", "ffn_down_exps=q4_k,blk\.[0-3]\..*=q6_k": of several rules that match the last counts; a comma within [] or {} is the
 *  pattern's. MOEC_EINVAL: an unknown type (the nearest is named), a pattern that is no regular expression, an empty entry, a bare
 *  type that is not the first. MOEC_ENOMEM. Release with moec_gguf_rules_release. */
MOEC_API moec_status moec_gguf_rules_read(moec_gguf_rules_list *out, const char *text, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_gguf_rules_release(moec_gguf_rules_list *r);
/** "q2_k,q4_k" as bits. MOEC_EINVAL: an unknown type (the nearest is named). */
MOEC_API moec_status moec_gguf_candidates_read(uint32_t *out, const char *text, moec_err *err) MOEC_USE_RESULT;

typedef struct moec_gguf_types_request {
    const moec_sensitivity *sensitivity; /* NULL: rules alone */
    const moec_gguf_rules_list *rules;   /* NULL: none */
    uint32_t candidates;                 /* bit moec_block; 0: the types that rows take of q2_k q3_k q4_k q5_k q6_k q8_0 iq4_xs iq4_nl
                                            q4_1 q5_0 q5_1 mxfp4 and f16; below 3 bits a value tq1_0 and tq2_0, too,
                                            which few of llama.cpp's backends but the CPU's have */
    double bits;                         /* bytes of matrices, padded to 32 each, x 8 over their values, at most; or 0 and */
    uint64_t target;                     /* bytes of all files, headers and padding counted, at most; both 0: rules alone */
    uint64_t fixed;                      /* bytes of the files that are not tensor data */
    bool pair;                           /* gate and up of a layer's experts share a type, which vLLM needs */
} moec_gguf_types_request;

/* Matrices are what moec_gguf_model_matrix says; all else stays F32. Of experts whose codes are MXFP4 in the checkpoint, keeping them
 * is a candidate besides (cost 0), and of the others those that take less; a bare type in rules that does not take less leaves them as
 * they are, a pattern replaces them unless it says mxfp4. */
typedef struct moec_gguf_types {
    moec_block *type;      /* [moec_gguf_model_count]; of tensors that stay F32 or keep the checkpoint's MXFP4: MOEC_BLOCK_COUNT */
    moec_block *asked;     /* [moec_gguf_model_count] what a rule says, or MOEC_BLOCK_COUNT; other than `type` where rows do not take it */
    size_t n, fell_back;   /* tensors whose rows the asked type does not divide */
    uint64_t bytes;        /* of tensor data, padding counted */
    double bits, cost, bound; /* bits: of matrices; cost: sum of moec_sensitivity_cost, nats a token, NAN without sensitivity; bound: no
                                 choice costs less */
    bool proven;
} moec_gguf_types;

/** @return MOEC_OK; MOEC_ENOFIT: the budget is below the least possible (said), or above the model at F16 (said);
 *          MOEC_EINVAL: bits or target without sensitivity, or one of another model, neither and no type for all, a rule that matches no
 *          tensor, candidates that leave a tensor none. MOEC_ENOMEM, MOEC_EINTR. Release with moec_gguf_types_release.
 *  Cost: moec_lp_solve of a group a matrix. */
MOEC_API moec_status moec_gguf_types_choose(moec_gguf_types *out, const moec_gguf_model *x, const moec_gguf_types_request *r, moec_err *err)
    MOEC_USE_RESULT;
/** Whether the budget of a request is possible, before costs are measured: sensitivity is not looked at. Errors of moec_gguf_types_choose. */
MOEC_API moec_status moec_gguf_types_possible(const moec_gguf_model *x, const moec_gguf_types_request *r, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_gguf_types_release(moec_gguf_types *t);
/** Gives the tensors of the model their types. Errors of moec_gguf_model_set_type. */
MOEC_API moec_status moec_gguf_types_set(moec_gguf_model *x, const moec_gguf_types *t, moec_err *err) MOEC_USE_RESULT;

#endif
