/* A GGUF file (or the first of a series) as a checkpoint: config.json made from its keys, tensors under the names that the family's
 * releases have, as views of the mapped file. An expert's matrix is a part of the stack of its layer. Matrices in blocks are U8
 * tensors of rows of bytes called "X.weight_q4_k" and the like, as GPTQ's codes are "X.qweight"; binding makes MOEC_BLOCKS of
 * them. Rows of q and k in the order of rotated pairs are read in theirs by moec_weight.paired.
 * What is no view lies in a temporary file that is gone when the program ends: attn_k_b and attn_v_b joined to kv_b, biases of gate and
 * up in turns, vectors and routers in blocks as F32. */
#ifndef MOEC_MODEL_GGUF_OPEN_H
#define MOEC_MODEL_GGUF_OPEN_H

#include "ckpt/ckpt.h"
#include "model/family.h"

/** Is `path` a file that begins as GGUF does? */
MOEC_API bool moec_gguf_is(const char *path);

/** Opens a GGUF as a checkpoint. Architectures: those of the families that have moec_gguf_rules. Layers of multi-token prediction are
 *  left out.
 *  @return MOEC_OK; what moec_gguf_open returns; MOEC_EFORMAT: an architecture that is not read (the text lists those that are),
 *          a key missing, of the wrong kind, out of range or at odds with a tensor's shape, a kind of rope scaling or a routing
 *          that the family has not, a tensor that is not known or in a number format that is not read (moec_blocks, F32, F16 and
 *          BF16 are); MOEC_ESHAPE: a tensor of another shape; MOEC_ENOMEM, MOEC_ENOFIT, MOEC_EIO: of the temporary file.
 *  Cost: the keys and names; of latent attention all of kv_b is read and written once. */
MOEC_API moec_status moec_gguf_ckpt(moec_ckpt **out, const char *path, moec_err *err) MOEC_USE_RESULT;
/** The same of one that is open; it is taken over, also after failure. `path` is for messages. */
MOEC_API moec_status moec_gguf_ckpt_of(moec_ckpt **out, moec_gguf *g, const char *path, moec_err *err) MOEC_USE_RESULT;

#endif
