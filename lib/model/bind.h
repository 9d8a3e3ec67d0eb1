/* Finds the tensors of a family in a checkpoint and checks their shapes; private to model.c and bind*.c. */
#ifndef MOEC_MODEL_BIND_H
#define MOEC_MODEL_BIND_H

#include "model/model.h"
#include "num/blocks.h"

enum { MOEC_NAME = 512 };

/* Where names are looked up. */
typedef struct moec_binder {
    const moec_model *m;
    const char *mtp_layer; /* NULL, or what stands for "model.layers.%d." */
    int64_t layer, expert;
    int32_t fp8_block[2];  /* 0: not an FP8 checkpoint */
} moec_binder;

/** The n-th alternative of a pattern under this layer, expert and prefix; false: there is no n-th. `number_at`: where the
 *  expert's number stands (SIZE_MAX: nowhere); may be NULL. */
bool moec__name(char buf[MOEC_NAME], size_t *number_at, const moec_binder *b, const char *pattern, int n);
/** The tensor of the first alternative that is there, of "X.weight" also its codes "X.qweight" or "X.weight_packed" where config.json
 *  says that some are; NULL: none, or no pattern. */
const moec_tensor *moec__find(const moec_binder *b, const char *pattern);
/** Rows of the matrix that a found tensor is or has the codes of. */
int64_t moec__rows(const moec_tensor *t);
/** A tensor of exactly this shape in F32, F16 or BF16. MOEC_ESHAPE. */
moec_status moec__bind(const moec_tensor **out, const moec_binder *b, const char *pattern, int rank, const int64_t *dim,
                       moec_err *err) MOEC_USE_RESULT;
/** A [rows, cols] matrix, plain, FP8 with its block scales, or in codes of few bits. MOEC_ESHAPE; MOEC_EFORMAT: FP8 and no block size
 *  in the config, codes whose groups are not of neighbouring columns. */
moec_status moec__bind_matrix(moec_weight *out, const moec_binder *b, const char *pattern, int64_t rows, int64_t cols,
                              moec_err *err) MOEC_USE_RESULT;
/** Rows [at, at+rows) of a bound matrix. MOEC_ESHAPE: FP8, whose scales belong to whole blocks of rows. */
moec_status moec__cut(moec_weight *out, const moec_weight *all, const moec_binder *b, int64_t at, int64_t rows,
                      moec_err *err) MOEC_USE_RESULT;
/** "<pattern minus .weight>.bias" of n values if it is there, else NULL. MOEC_ESHAPE. */
moec_status moec__bind_bias(const moec_tensor **out, const moec_binder *b, const char *pattern, int64_t n, moec_err *err)
    MOEC_USE_RESULT;
/** Rows of a router and their bias if there is one: never FP8, as its blocks of 128 rows could not be cut. MOEC_ESHAPE. */
moec_status moec__bind_router(moec_layer *l, const moec_binder *b, moec_mat which, int64_t rows, moec_err *err)
    MOEC_USE_RESULT;
/** Router, selection bias and experts of an MoE layer. MOEC_ESHAPE, MOEC_EFORMAT, MOEC_ENOMEM. */
moec_status moec__bind_experts(moec_layer *l, const moec_binder *b, moec_err *err) MOEC_USE_RESULT;
/** Everything of layer l->index; shared_width of dims is set where the config left it open. MOEC_ESHAPE, MOEC_EFORMAT,
 *  MOEC_ENOMEM. */
moec_status moec__bind_layer(moec_layer *l, const moec_binder *b, moec_dims *dims, moec_err *err) MOEC_USE_RESULT;
/** The row of the family's layouts that this layer's experts have; NULL: none of their tensors is there. */
const moec_expert_names *moec__layout(const moec_binder *b);

/** Of a GGUF: the type in a name "X.weight_q4_k"; MOEC_BLOCK_COUNT: none, or no GGUF. */
moec_block moec__block_of(const moec_model *m, const char *name);
/** Does a tensor's name end so? */
bool moec__ends_in(const char *name, const char *tail);
/* Is it the order of columns, or the shape, beside packed codes? */
bool moec__order_of_codes(const char *name);

#endif
