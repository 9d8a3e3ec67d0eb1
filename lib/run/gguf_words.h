/* The inverse of run/gguf_tokenizer.h: tokenizer.json and what stands beside it from tokenizer.ggml.* of a GGUF. */
#ifndef MOEC_RUN_GGUF_WORDS_H
#define MOEC_RUN_GGUF_WORDS_H

#include "model/model.h"
#include "text/tokenizer.h"

typedef struct moec_gguf_words {
    char *tokenizer;  /* text of tokenizer.json; NULL: the file has no vocabulary ("no_vocab", or no such keys) */
    char *config;     /* of tokenizer_config.json, with the chat template */
    char *generation; /* of generation_config.json */
    bool guessed;     /* the pre-tokenizer is not known by its name */
} moec_gguf_words;

/** Makes them. Of the kinds of vocabulary two are read:
 *
 *    "gpt2"   byte-level BPE: tokens and merges as they stand; the pre-tokenizer by its name in llama.cpp (run/gguf_pre.c). A name that
 *             is not known gets GPT-2's, which `guessed` tells: some texts are then cut into other tokens. deepseek-llm's class of letters is
 *             written as \p{Lu}\p{Ll}\p{Lt}, which is that of the release but for a few rare scripts. qwen2's texts are brought to
 *             NFC, as releases do it; other normalizers are not in the file and not made.
 *    "llama"  SentencePiece's BPE with bytes: a token is made by every pair of tokens whose spellings join to its own, pairs ranked by
 *             the token's score, then its id, as transformers converts tokenizer.model. Tokens of more than 1024 bytes are not made.
 *
 *  Control tokens and the unknown one become special added tokens, user-defined ones added tokens, unused "[PADn]" none. A post-
 *  processor puts bos and eos where add_bos_token and add_eos_token say so (without the key: bos for llama and llama-bpe).
 *  @return MOEC_OK; MOEC_EFORMAT: another kind; a key missing, of another kind or length than the tokens; a spelling twice, with a
 *          NUL or no UTF-8; a merge of tokens that are not there; an id out of range; what moec_tokenizer_parse refuses. MOEC_ENOMEM.
 *  Release with moec_gguf_words_release, also after failure. `path` is for messages. */
MOEC_API moec_status moec_gguf_words_make(moec_gguf_words *out, const moec_gguf_index *keys, const char *path, moec_err *err)
    MOEC_USE_RESULT;
MOEC_API void moec_gguf_words_release(moec_gguf_words *w);
/** The same of a model that is open from a GGUF, with a warning where the pre-tokenizer is guessed. */
MOEC_API moec_status moec_gguf_words_of(moec_gguf_words *out, const moec_model *m, moec_err *err) MOEC_USE_RESULT;

/** The tokenizer of a model: of its folder's tokenizer.json or of its GGUF; NULL: it has none. Free with moec_tokenizer_free.
 *  MOEC_EIO, MOEC_ENOMEM, MOEC_EFORMAT. */
MOEC_API moec_status moec_model_tokenizer(moec_tokenizer **out, const moec_model *m, moec_err *err) MOEC_USE_RESULT;

/** The pre_tokenizer node that moec_gguf_pre knows by a name, or one of its other names; NULL: not known. The caller's. */
MOEC_API moec_json *moec_gguf_pre_node(const char *name);

#endif
