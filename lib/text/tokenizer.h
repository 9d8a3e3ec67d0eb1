/* Text to token ids and back, as a Hugging Face tokenizer.json describes it. Reads the nodes the file holds
 * (normalizer, pre_tokenizer, BPE model, added tokens, post_processor, decoder), never a family name; a node it does
 * not know is an error that names it. Whatever loads here gives the ids of the Python package `tokenizers`. */
#ifndef MOEC_TEXT_TOKENIZER_H
#define MOEC_TEXT_TOKENIZER_H

#include "base/err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Never changes after it is made: any number of threads may share one. */
typedef struct moec_tokenizer moec_tokenizer;
/* Scratch memory, regex state and a cache of words seen. One thread at a time; make one for each thread. */
typedef struct moec_encoder moec_encoder;

/* A growing array of ids. Zero-initialise; release with moec_ids_release. */
typedef struct moec_ids {
    int32_t *id;
    size_t n, cap;
} moec_ids;
MOEC_API void moec_ids_release(moec_ids *ids);

/**
 * Reads a tokenizer.json of at most 256 MiB.
 *
 * model          BPE: vocab, merges ("a b" or ["a","b"]), byte_fallback, fuse_unk, unk_token, ignore_merges
 * normalizer     null, Sequence, NFC, NFD, NFKC, NFKD, Prepend, Replace, Lowercase, Strip, ByteLevel
 * pre_tokenizer  null, Sequence, Split, ByteLevel, Digits, Metaspace, Whitespace, WhitespaceSplit, Punctuation,
 *                CharDelimiterSplit
 * post_processor null, Sequence, TemplateProcessing, ByteLevel
 * decoder        null, Sequence, ByteLevel, Metaspace, Replace, ByteFallback, Fuse, Strip
 *
 * @param out   the tokenizer; owned by the caller, free with moec_tokenizer_free.
 * @return MOEC_OK;
 *         MOEC_EIO when the file cannot be read;
 *         MOEC_EFORMAT when it is no JSON, a node or a setting is not supported (the text names it), a token id is
 *         negative, not below 2^31-1 or given twice, a merge names an absent token, a regular expression does not
 *         compile or would mean something else in PCRE2 than in Oniguruma;
 *         MOEC_ENOMEM.
 * Cost: linear in the file.
 * The ids written beside added tokens are checked but not used: like `tokenizers`, a token that the model has keeps its
 * id there, any other gets the next free one in the order of the file.
 * Source: the node descriptions of the `tokenizers` documentation; ids compared with version 0.23.3.
 */
MOEC_API moec_status moec_tokenizer_load(moec_tokenizer **out, const char *path, moec_err *err) MOEC_USE_RESULT;
/** As moec_tokenizer_load, from memory; `what` stands for the file name in messages. No MOEC_EIO. */
MOEC_API moec_status moec_tokenizer_parse(moec_tokenizer **out, const char *json, size_t len, const char *what,
                                          moec_err *err) MOEC_USE_RESULT;
/** NULL-safe. Every encoder of it must be gone. */
MOEC_API void moec_tokenizer_free(moec_tokenizer *t);

/** Highest id of any token plus 1; the model's embedding may have more rows. */
MOEC_API int32_t moec_tokenizer_vocab_size(const moec_tokenizer *t);
/** Id of a token by its spelling in the file (byte-level spelling, not plain text), or -1. */
MOEC_API int32_t moec_tokenizer_find(const moec_tokenizer *t, const char *token);
/** Spelling of an id in the file, borrowed, or NULL when no token has this id. */
MOEC_API const char *moec_tokenizer_token(const moec_tokenizer *t, int32_t id);
/** First id that the post-processor puts in front of a text, or -1 when it puts none. */
MOEC_API int32_t moec_tokenizer_bos(const moec_tokenizer *t);
/** First id that the post-processor puts behind a text, or -1. */
MOEC_API int32_t moec_tokenizer_eos(const moec_tokenizer *t);

/** @param t   borrowed; must outlive the encoder.  MOEC_ENOMEM. Free with moec_encoder_free. */
MOEC_API moec_status moec_encoder_new(moec_encoder **out, const moec_tokenizer *t, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_encoder_free(moec_encoder *e);

typedef struct moec_encode_opts {
    bool add_special; /* let the post-processor add its ids (bos, eos) */
    size_t max_ids;   /* stop soon after this many ids of text; 0: the whole text. The ids given are those of the
                         whole text, cut off; some more than max_ids may come */
} moec_encode_opts;

/**
 * Appends the ids of `text` to *ids.
 *
 * Bytes that are not UTF-8 do not fail: every maximal ill-formed part becomes U+FFFD, as Python's
 * bytes.decode("utf-8", "replace") does it, and *n_invalid is raised by the number of such parts.
 *
 * @param ids        appended to; on failure holds what was there before.
 * @param n_invalid  raised; may be NULL.
 * @param text       len bytes, NUL bytes allowed; borrowed.
 * @param opts       NULL: no special ids, whole text.
 * @return MOEC_OK;
 *         MOEC_EFORMAT when a pattern needs more steps or memory than is sensible on this text (it backtracks without
 *         bound), when unk_token is needed but not in the vocabulary, or when one word has more than 2^30 characters;
 *         MOEC_ENOMEM.
 * Cost: linear in the text for ordinary patterns; n log n in the longest stretch that no merge rule can cut. A pattern
 * whose match fails from every starting place after a long look ahead (`\s+$` on a long run of blanks) costs the square of
 * that run, as in `tokenizers`. Memory: one copy of the text for each stage that rewrites it.
 *
 * Departs from `tokenizers` 0.23.3 in these: character classes follow PCRE2's Unicode (10.42: 14), so code points that
 * are younger, and of the older ones 38 in \p{Alphabetic}, 5 in \p{Lowercase}, 2 in \p{Mn}, may fall into others;
 * of two added tokens that normalize to the same text it takes either, this takes the one spelled so or the first.
 * Normal forms agree with it, which means Unicode 9.
 */
MOEC_API moec_status moec_encode(moec_ids *ids, uint64_t *n_invalid, moec_encoder *e, const char *text, size_t len,
                                 const moec_encode_opts *opts, moec_err *err) MOEC_USE_RESULT;

/**
 * Text of ids by the file's decoder (none: tokens joined by spaces). Bytes that form no UTF-8 become U+FFFD.
 *
 * @param out           *len bytes with a NUL behind; owned by the caller, free with moec_free.
 * @param skip_special  leave out added tokens that are marked special.
 * @return MOEC_OK; MOEC_EINVAL when an id names no token; MOEC_EFORMAT when a Replace pattern fails; MOEC_ENOMEM.
 */
MOEC_API moec_status moec_decode(char **out, size_t *len, const moec_tokenizer *t, const int32_t *ids, size_t n,
                                 bool skip_special, moec_err *err) MOEC_USE_RESULT;

#endif
