/* A model as llama.cpp reads it: which GGUF tensors there are, where their values come from, and the keys of its config. What an
 * architecture does on its own is a row of data in the family's file (moec_gguf_rules); what it cannot express is refused. */
#ifndef MOEC_RUN_GGUF_MODEL_H
#define MOEC_RUN_GGUF_MODEL_H

#include "ckpt/gguf_write.h"
#include "model/model.h"

typedef struct moec_gguf_model moec_gguf_model;

/** Makes the list of tensors. Matrices get `type` (MOEC_GGML_F32, F16 or BF16); routers, norms, biases and other vectors
 *  F32, as every reader expects. Experts that the checkpoint has in MXFP4 (gpt-oss) keep it, code by code.
 *
 *    blk.N.ffn_{gate,up,down}_exps.weight   [E, I, H], [E, H, I] for down: experts stacked, from whatever layout
 *    blk.N.ffn_{gate,up,down}_exps.bias     [E, I], [E, H]
 *    blk.N.attn_{q,k}.weight                where rules.permute: row h d + 2 i + s is row h d + s d/2 + i of the checkpoint
 *    blk.N.attn_k_b, attn_v_b .weight       the two parts of kv_b [heads (n + v), r]: k_b [heads, r, n] is each head's first n
 *                                           rows transposed, v_b [heads, v, r] its others
 *    shapes outermost first. Layers of multi-token prediction are left out, a tied head as well.
 *
 *  `m` is borrowed. Source of names and shapes: the Python package gguf 0.19 (constants.py) and llama.cpp's converters.
 *  @return MOEC_OK; MOEC_EINVAL: another type; the family has no row; the model does what llama.cpp's graph of the
 *          architecture does not (weights divided by their sum or not, a scale, sliding windows, dense layers elsewhere,
 *          clipped q, k and v, a kind of rope scaling): the text names it. MOEC_ENOMEM. Free with moec_gguf_model_free. */
MOEC_API moec_status moec_gguf_model_new(moec_gguf_model **out, const moec_model *m, uint32_t type, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_gguf_model_free(moec_gguf_model *x);

MOEC_API size_t moec_gguf_model_count(const moec_gguf_model *x);
/** Name, type and shape (innermost first) of tensor i; begin, bytes and data are not set. Borrowed. */
MOEC_API const moec_gguf_tensor *moec_gguf_model_at(const moec_gguf_model *x, size_t i);
/** Rows [lo, hi) of tensor i as float32, whatever type it shall have: what a quantizer begins with. Thread-safe.
 *  MOEC_ENUMERIC: a value that is not finite; MOEC_ENOMEM. Memory: of k_b a head. */
MOEC_API moec_status moec_gguf_model_read(float *out, const moec_gguf_model *x, size_t i, int64_t lo, int64_t hi, moec_err *err)
    MOEC_USE_RESULT;

/** Can tensor i be given another type? Matrices of two dimensions or more, but routers. */
MOEC_API bool moec_gguf_model_matrix(const moec_gguf_model *x, size_t i);
/** Does the checkpoint have tensor i in MXFP4 codes, which stay the same where its type is MXFP4? */
MOEC_API bool moec_gguf_model_codes(const moec_gguf_model *x, size_t i);
/** Tensor i gets `type`, any that moec_ggml_type knows. MOEC_EINVAL: it is no matrix, or a row is not whole blocks. */
MOEC_API moec_status moec_gguf_model_set_type(moec_gguf_model *x, size_t i, uint32_t type, moec_err *err) MOEC_USE_RESULT;
/** Gives back the mapped pages of rows [lo, hi) that moec_gguf_model_read has touched, whole experts or matrices. */
MOEC_API void moec_gguf_model_drop(const moec_gguf_model *x, size_t i, int64_t lo, int64_t hi);

/** Puts the keys (general.*, ARCH.*) and then all tensors; `name` is general.name. Errors are told by moec_gguf_out_close.
 *  Tokenizer keys may be put before or behind. */
MOEC_API void moec_gguf_model_describe(moec_gguf_out *g, const moec_gguf_model *x, const char *name);
/** moec_gguf_rows_fn whose ctx is the moec_gguf_model, for a description that begins with its tensors.
 *  Tensors are of the types of moec_gguf_model_new or keep their codes; MOEC_EINVAL: another type (run/gguf_quant.h writes these).
 *  MOEC_ENUMERIC also: a value is beyond F16. */
MOEC_API moec_status moec_gguf_model_rows(void *out, void *ctx, size_t t, int64_t lo, int64_t hi, moec_err *err);

#endif
