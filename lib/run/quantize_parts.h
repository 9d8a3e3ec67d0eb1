/* What quantize.c (layers, folder, records) and quantize_fit.c (Hessians, rounding) share. Private to them. */
#ifndef MOEC_RUN_QUANTIZE_PARTS_H
#define MOEC_RUN_QUANTIZE_PARTS_H

#include "run/preview.h"
#include "run/quantize.h"
#include "run/work.h"

/* How a matrix was rounded in the end. */
typedef enum moec_qway { MOEC_QWAY_NONE, MOEC_QWAY_NEAREST, MOEC_QWAY_CLIP, MOEC_QWAY_GPTQ } moec_qway;

/* One matrix that is rounded, and where it goes. */
typedef struct moec_qjob {
    const moec_qmatrix *q;
    moec_weight to;            /* dense: the output's values, writable; .of NULL: */
    const moec_tensor *piece[MOEC_PIECES]; /* tensors of the packed form */
    int64_t tokens;            /* that it was rounded by */
    moec_qway way;
    double loss, nearest, whole; /* moec_gptq_loss of what it is, of rounding to nearest, of all zeros; NAN: not known */
} moec_qjob;

/* Where matrices of a layer get their inputs from: those of one source have the same. */
typedef enum moec_qsource { MOEC_QS_MIXER, MOEC_QS_MIXED, MOEC_QS_Q_B, MOEC_QS_KV_B, MOEC_QS_SHARED, MOEC_QS_DENSE, MOEC_QS_COUNT } moec_qsource;

/* Inputs of some tokens: rows of x, of expert input where `token` is not NULL those rows, gate their weights (NULL: 1). */
typedef struct moec_qrows {
    const float *x;       /* [.,H] */
    const float *other;   /* the original's inputs of the same tokens, or NULL */
    const int32_t *token; /* [n] or NULL: 0 .. n-1 */
    const float *gate;    /* [n] or NULL: all 1 */
    int64_t n;
    int64_t step;         /* with token NULL: every step-th row; 0: 1 */
} moec_qrows;

typedef struct moec_qrun {
    const moec_model *m;
    moec_plan *p;
    const moec_quantize_opts *o;
    const moec_qformat *format;
    moec_work *work;
    moec_preview twin;
    moec_pass *first, *pass;  /* the original's (NULL: not run), the twin's; NULL: no text */
    int64_t n, slots;
    float *x, *other;         /* [n,H] input of the twin's experts; of the original's, NULL: not kept */
    int32_t *ids;             /* [n,slots] */
    float *gates;
    int64_t *first_of;        /* [E+1] the layer's selections by expert: */
    int32_t *token;           /* [n slots] */
    float *gate;
    float *in[MOEC_QS_COUNT]; /* [n, in_cols] */
    int64_t in_cols[MOEC_QS_COUNT];
    moec_mat in_of[MOEC_QS_COUNT]; /* who is asked for it in the layer at hand; MOEC_MAT_COUNT: nobody */
    double *layer_h;          /* [H,H] sum of x x^T over all tokens of the layer, lower triangle; NULL: not wanted */
    const moec_layer *l;      /* the source's */
    int64_t wide;             /* largest width of a shared or a dense part that is rounded, 0: none is */
    int64_t most_rows, most_cols; /* of what mixes tokens and is rounded */
    struct moec_qbench **bench; /* [moec_par_threads()] room of a worker of moec__qfit_mlp, or NULL */
    int workers;
    moec_progress progress;
} moec_qrun;

/* --- quantize_place.c ------------------------------------------------------------------------------------------------- */

/* Points jobs, whose q is set, at their tensors (dense ones in the plan's `dtype`): with `file` in a new sheet of that name, else those that are there. MOEC_EFORMAT: one is
 * missing or has another form; what moec_sheet_new returns. */
moec_status moec__qplace(moec_qjob *job, size_t jobs, const moec_qformat *f, moec_dtype dtype, const moec_override *weights,
                         const char *file, moec_sheet **sheet, moec_err *err) MOEC_USE_RESULT;
/* The layer of a variant computes with them from now on. */
void moec__qshow(moec_layer *l, const moec_qjob *job, size_t jobs, const moec_qformat *f);

/* --- quantize_fit.c --------------------------------------------------------------------------------------------------- */

typedef struct moec_qbench moec_qbench;
/* Before the first, behind the last call of moec__qfit_mlp, the number of threads being that of the whole run. */
moec_status moec__qfit_begin(moec_qrun *u, moec_err *err) MOEC_USE_RESULT;
void moec__qfit_end(moec_qrun *u);
/* What all below takes, so many calls of moec__qfit_mlp for routed experts at a time. */
size_t moec__qfit_bytes(const moec_qrun *u, int workers);
/* c [n,n] lower triangle = X^T X of all rows, in parallel. */
moec_status moec__qfit_gram(double *c, const float *x, int64_t rows, int64_t n, moec_compute compute, moec_err *err) MOEC_USE_RESULT;
/* Matrices with one input x [u->n, cols] of weight 1, in parallel. */
moec_status moec__qfit_linear(moec_qrun *u, moec_qjob *const *job, int jobs, const float *x, int64_t cols, moec_err *err) MOEC_USE_RESULT;
/* Gate, up and down (NULL: left as it is) of a feed-forward part whose matrices are `w`, by its tokens; `expert` -1: a shared or a dense
 * one. Any thread, `worker` its number. */
moec_status moec__qfit_mlp(moec_qrun *u, int worker, moec_qjob *const job[3], const moec_mlp *w, int64_t expert, const moec_qrows *rows,
                           moec_err *err) MOEC_USE_RESULT;

#endif
