/* Tensors in another number format than the source's: which are cast, what they are called and shaped, and their bytes. */
#ifndef MOEC_RUN_CAST_H
#define MOEC_RUN_CAST_H

#include "method/plan.h"
#include "model/model.h"

/* What a tensor of the source is before a plan's keep lists: itself, or cast. */
typedef struct moec_cast {
    bool gone;          /* it is no tensor of the output: scales, once the values are multiplied by them */
    bool made;          /* its bytes are computed, not copied */
    bool turned;        /* made from MXFP4 blocks: each expert's matrix is transposed, [in, out] as transformers has it */
    char *name;         /* NULL: the source's */
    moec_dtype dtype;
    int rank;
    int64_t dim[MOEC_MAX_RANK];
    uint64_t bytes;
    moec_weight weight; /* made: the values row by row; turned: of all experts, rows side by side */
    int64_t part_rows;  /* turned: rows of an expert */
} moec_cast;

/** By index in the checkpoint. Without a dtype in the plan every cast is the tensor itself. With one: FP8 and MXFP4 tensors
 *  become that type, and so do plain matrices of the model but routers; vectors (norms, biases, selection biases) stay.
 *  MOEC_ENOMEM; MOEC_EFORMAT: a quantized tensor of a form that is not known. Free with moec_casts_free. */
MOEC_API moec_status moec_casts_new(moec_cast **out, const moec_model *m, const moec_plan *p, const moec_place *place,
                                    moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_casts_free(moec_cast *c, size_t n);
/** Bytes [from, from+n) of a made tensor, whole values: a moec_make_fn with the moec_cast as context. Rounds to nearest
 *  even. MOEC_ENOMEM; MOEC_ENUMERIC: a value that is too large for F16. Thread-safe. */
MOEC_API moec_status moec_cast_make(void *out, void *cast, uint64_t from, size_t n, moec_err *err);

#endif
