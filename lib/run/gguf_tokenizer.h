/* tokenizer.ggml.* of a GGUF from a folder's tokenizer.json, tokenizer_config.json and generation_config.json. */
#ifndef MOEC_RUN_GGUF_TOKENIZER_H
#define MOEC_RUN_GGUF_TOKENIZER_H

#include "ckpt/gguf_write.h"
#include "model/model.h"

/** Puts into `g`
 *
 *    model        "gpt2" for byte-level BPE, "llama" for BPE with byte_fallback, which is what SentencePiece becomes
 *    pre          name of llama.cpp's twin of the pre-tokenizer, found by its patterns; gpt2 only
 *    tokens       [vocab] as spelled in the file; ids that no token has are "[PADn]", type unused
 *    token_type   1 normal, 3 control (special), 4 user-defined (added, not special), 5 unused, 6 byte ("<0x0A>", llama), 2 the
 *                 unknown one
 *    merges       "left right", in order
 *    scores       llama only: minus the rank of the merge that makes the token, 0 of a single piece: llama.cpp merges the pair of
 *                 best score first, BPE that of lowest rank
 *    bos_token_id, eos_token_id, unknown_token_id, padding_token_id   of tokenizer_config.json, else of config.json, generation_config.json
 *    add_bos_token, add_eos_token, add_space_prefix                   as the post-processor and the normalizer do it
 *    tokenizer.chat_template                                          tokenizer_config.json's, or chat_template.jinja
 *
 *  Of a model that is a GGUF itself, the tokenizer.json that run/gguf_words.h makes of it is taken.
 *  A folder without tokenizer.json gets tokenizer.ggml.model "no_vocab" and a warning. A pre-tokenizer whose patterns are not
 *  known gets "default" and a warning: llama.cpp then cuts some texts elsewhere.
 *  Source: the tokenizer.json of released models, llama.cpp's names of pre-tokenizers.
 *  @return MOEC_OK; MOEC_EIO; MOEC_EFORMAT: tokenizer.json is not a BPE of the form that moec_tokenizer_load reads, or has
 *          more ids than the embedding has rows; MOEC_ENOMEM. What the keys themselves do wrong, moec_gguf_out_close says. */
MOEC_API moec_status moec_gguf_tokenizer(moec_gguf_out *g, const moec_model *m, moec_err *err) MOEC_USE_RESULT;

/** Name of llama.cpp's twin of a pre_tokenizer node, or NULL. */
MOEC_API const char *moec_gguf_pre(const moec_json *pre_tokenizer);

#endif
