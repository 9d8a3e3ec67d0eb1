/* Checks a GGUF of this program against the model it was made of. */
#ifndef MOEC_RUN_VERIFY_GGUF_H
#define MOEC_RUN_VERIFY_GGUF_H

#include "base/json.h"
#include "run/gguf_model.h"

enum { MOEC_VERIFY_GGUF_SHOWN = 20, MOEC_VERIFY_GGUF_ROWS = 4096 };

typedef struct moec_verify_gguf_report {
    bool against_source;
    uint64_t files, tensors, keys, bytes;      /* keys that were compared; bytes of tensor data */
    uint64_t rows, all_rows;                   /* compared, and there are */
    double worst;                              /* largest relative error of a tensor over what its type allows; 0: nothing was compared */
    char worst_tensor[64];
    uint64_t problems;                         /* 0: all is well */
    char problem[MOEC_VERIFY_GGUF_SHOWN][300]; /* the first ones */
} moec_verify_gguf_report;

/** Is it a GGUF, or a folder with one? */
MOEC_API bool moec_verify_gguf_is(const char *path);
/** Opens the file, or the first of its series (a folder: the one in it), strictly. Then, with a source: every tensor of
 *  moec_gguf_model there with its shape and no other; keys of moec_gguf_model_describe and moec_gguf_tokenizer equal to the bit, but for
 *  general.name and general.file_type; F32 where it must be. Of every tensor at least 4096 rows and one of each expert (all, where it has
 *  fewer), evenly spread, are decoded: F32 and MXFP4 codes equal the source, F16 and BF16 the source rounded; of other types
 *
 *    sqrt(sum (w_q - w)^2 / sum w^2) over these rows is at most 0.03 (q8_0), 0.1 (q6_k), 0.2 (q5), 0.4 (q4, iq4, mxfp4), 0.6 (q3_k),
 *    0.85 (q2_k), 0.95 (tq1_0, tq2_0)
 *
 *  and of one row at most 2.5 times that and 0.05;
 *  which is two to four times what rounding takes of common weights: damage and rows at the wrong place give 1 and more. Without a source:
 *  rows must be finite. Whatever is wrong with the file is a problem in the report, not an error.
 *  @return MOEC_OK (look at out->problems); MOEC_EINVAL: no GGUF is written of the source; MOEC_EIO, MOEC_ENOMEM, MOEC_EINTR. Free with
 *          moec_free. Memory: a row, and of k_b a head, for each thread. */
MOEC_API moec_status moec_verify_gguf(moec_verify_gguf_report **out, const char *path, const moec_model *source, moec_err *err) MOEC_USE_RESULT;
/** {"ok", "format": "gguf", "against_source", "files", "tensors", "keys", "bytes", "rows", "all_rows", "worst", "worst_tensor", "problems"} */
MOEC_API moec_json *moec_verify_gguf_json(const moec_verify_gguf_report *r);

#endif
