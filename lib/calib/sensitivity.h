/* What each of ggml's block types costs each matrix of a model, measured once over text (run/gguf_measure.h) and kept in the
 * statistics file, so that types for any file size are chosen without touching weights (run/gguf_types.h). */
#ifndef MOEC_CALIB_SENSITIVITY_H
#define MOEC_CALIB_SENSITIVITY_H

#include "num/blocks.h"

#include <stddef.h>

/* Widths at which a matrix is put into the model to see what that does to its output. */
enum { MOEC_PROBES = 2 };
#define MOEC_PROBE_BITS {2, 4}

typedef struct moec_sensitive {
    char *name;                     /* of the GGUF tensor: "blk.3.attn_q.weight", "blk.3.ffn_down_exps.weight" */
    int64_t cols;
    double *square;                 /* [cols] mean square of what a column multiplies; NULL where the statistics have it for each
                                       expert (XIN_SQ, ACT_SQ) or nothing is multiplied (embeddings) */
    double error[MOEC_BLOCK_COUNT]; /* sum of importance (w - w_q)^2 over sum of importance w^2, rows sampled; NAN: the block does
                                       not divide a row */
    double probe[MOEC_PROBES];      /* the same of the probes */
    double kl[MOEC_PROBES];         /* nats a token: KL(original || the model with this matrix alone at that probe); NAN: not run */
} moec_sensitive;

typedef struct moec_sensitivity {
    int64_t tokens; /* that kl was measured over */
    size_t n;
    moec_sensitive *at; /* [n] in the order of the GGUF */
} moec_sensitivity;

/** Room for n rows, zeroed, kl and error NAN. MOEC_ENOMEM. Free with moec_sensitivity_free (NULL-safe). */
MOEC_API moec_status moec_sensitivity_new(moec_sensitivity **out, size_t n, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_sensitivity_free(moec_sensitivity *s);
/** By the tensor's name, or NULL. */
MOEC_API const moec_sensitive *moec_sensitivity_find(const moec_sensitivity *s, const char *name);
/** Expected KL, nats a token, of the model with this matrix alone in `type`: log KL is taken as linear in log error through both
 *  probes, its slope kept within 1/2 .. 2 (1 where only one was run or they do not rise; such a line goes through their middle); a
 *  probe whose KL is 0 is passed over; 0 where the error is 0 or all KL are. NAN: kl was not run,
 *  or the type does not divide the rows. Costs of several matrices are taken to add up. */
MOEC_API double moec_sensitivity_cost(const moec_sensitive *s, moec_block type);

#endif
