/* What a tokenizer consists of once its file is read: flat lists of stages that rewrite, split or join text. Nodes of
 * the file become one or more stages (nodes.c); encode.c and decode.c run them. */
#ifndef MOEC_TEXT_STAGE_H
#define MOEC_TEXT_STAGE_H

#include "base/json.h"
#include "text/added.h"
#include "text/bpe.h"
#include "text/unicode.h"

typedef enum moec__behaviour {
    MOEC__ISOLATED,
    MOEC__REMOVED,
    MOEC__MERGED_WITH_PREVIOUS,
    MOEC__MERGED_WITH_NEXT,
    MOEC__CONTIGUOUS
} moec__behaviour;

typedef enum moec__scheme { MOEC__ALWAYS, MOEC__FIRST, MOEC__NEVER } moec__scheme;

typedef struct moec__stage moec__stage;
typedef struct moec__tokens moec__tokens;

/* Text between two stages. `first` tells that it begins where the input begins. */
typedef struct moec__piece {
    const char *s;
    size_t n;
    bool first;
} moec__piece;

/* Normalizers: append what becomes of in->s to *out; may clear in->first. */
typedef moec_status moec__rewrite_fn(moec__buf *out, moec__piece *in, const moec__stage *stage, moec__matcher *m,
                                     moec_err *err);
/* Pre-tokenizers: hand pieces to stage k + 1 by moec__pass_on; k is the place of the stage. */
typedef moec_status moec__split_fn(moec_encoder *e, size_t k, moec__piece in, moec_err *err);
/* Decoders: turn the list of tokens into another one. */
typedef moec_status moec__join_fn(moec__tokens *out, const moec__tokens *in, const moec__stage *stage,
                                  moec__matcher *m, moec_err *err);

struct moec__stage {
    moec__rewrite_fn *rewrite; /* one of the three */
    moec__split_fn *split;
    moec__join_fn *join;
    moec__pattern *pattern;
    moec__behaviour behaviour;
    moec__scheme scheme;
    moec__form form;
    moec__calm *calm;
    bool invert, left, right;
    char *text; /* what is put in */
    size_t n_text;
    int64_t start, stop; /* characters that the decoder Strip takes */
};

enum { MOEC__MAX_STAGES = 64, MOEC__MAX_NESTING = 16 };
typedef struct moec__stages {
    moec__stage at[MOEC__MAX_STAGES];
    size_t n;
} moec__stages;

/* The list of tokens a decoder works on: token i is buf.p[end[i-1]] .. buf.p[end[i] - 1]. */
struct moec__tokens {
    moec__buf buf;
    size_t *end;
    size_t n, cap;
};
moec_status moec__tokens_add(moec__tokens *t, const char *s, size_t n, moec_err *err) MOEC_USE_RESULT;
void moec__tokens_release(moec__tokens *t);

struct moec_tokenizer {
    moec__stages normalize, split, decode;
    bool has_decoder;
    moec__bpe bpe;
    moec__added_token *added;
    size_t n_added, cap_added;
    moec__words added_at;        /* content -> index in added */
    moec__pairs added_id;        /* id -> index in added; of two with one id the later */
    int32_t added_highest;       /* -1: none */
    moec__added_set raw, normal; /* looked for in front of and behind the normalizer */
    moec_ids before, behind;     /* what the post-processor adds */
    int32_t vocab_size;
};

struct moec_encoder {
    const moec_tokenizer *t;
    moec__matcher *matcher;
    moec__merger *merger;
    moec__buf rewritten[2];              /* by the normalizers, in turns */
    moec__buf scratch[MOEC__MAX_STAGES]; /* one for each pre-tokenizer that rewrites */
    moec_ids *out;
    size_t limit; /* out->n at which to stop */
};

/* Reading of the nodes. Each appends to the stages or fails with MOEC_EFORMAT. */
moec_status moec__read_normalizer(moec__stages *out, moec_json *node, moec_err *err) MOEC_USE_RESULT;
moec_status moec__read_pre_tokenizer(moec__stages *out, moec_json *node, moec_err *err) MOEC_USE_RESULT;
moec_status moec__read_decoder(moec__stages *out, moec_json *node, moec_err *err) MOEC_USE_RESULT;
moec_status moec__read_post_processor(moec_tokenizer *out, moec_json *node, moec_err *err) MOEC_USE_RESULT;
moec_status moec__read_model(moec__bpe *out, moec_json *node, moec_err *err) MOEC_USE_RESULT;
moec_status moec__read_added(moec_tokenizer *out, moec_json *node, moec_err *err) MOEC_USE_RESULT;
void moec__stages_release(moec__stages *s);

/* Kinds of node by name: every union of nodes in the file is one such table. */
typedef struct moec__kind {
    const char *type;
    moec_status (*read)(void *out, moec_json *node, int depth, moec_err *err);
} moec__kind;
/** Calls the reader of node's "type". MOEC_EFORMAT "WHERE: type "X" is not supported". */
moec_status moec__read_kind(void *out, const moec__kind *kinds, size_t n_kinds, const char *where, moec_json *node,
                            int depth, moec_err *err) MOEC_USE_RESULT;

/* Settings of a node; an absent one is `otherwise`. MOEC_EFORMAT "setting X: ..." when it is of another type. */
moec_status moec__get_bool(bool *out, const moec_json *node, const char *key, bool otherwise,
                           moec_err *err) MOEC_USE_RESULT;
/** Borrowed; otherwise NULL: the setting is required. */
moec_status moec__get_text(const char **out, size_t *n, const moec_json *node, const char *key, const char *otherwise,
                           moec_err *err) MOEC_USE_RESULT;
/** Index in names[n] of a string setting; an absent one is index 0. */
moec_status moec__get_choice(int *out, const moec_json *node, const char *key, const char *const *names, int n,
                             moec_err *err) MOEC_USE_RESULT;
/** A "pattern": {"String": ...} or {"Regex": ...}. Owned by the caller. */
moec_status moec__get_pattern(moec__pattern **out, const moec_json *node, moec_err *err) MOEC_USE_RESULT;

/** The next unused stage, or MOEC_EFORMAT when there are too many. */
moec_status moec__new_stage(moec__stage **out, moec__stages *s, moec_err *err) MOEC_USE_RESULT;

/* Stages (stages.c). */
moec__rewrite_fn moec__run_form, moec__run_prepend, moec__run_replace, moec__run_lower, moec__run_strip,
    moec__run_byte_form;
moec__split_fn moec__run_split, moec__run_bytes, moec__run_prefix, moec__run_metaspace;
moec__join_fn moec__join_bytes, moec__join_metaspace, moec__join_replace, moec__join_fallback, moec__join_fuse,
    moec__join_strip;

/** Gives a piece to stage k, or to the model behind the last one. Empty pieces vanish. */
moec_status moec__pass_on(moec_encoder *e, size_t k, moec__piece piece, moec_err *err) MOEC_USE_RESULT;
/** All normalizers over a piece; *out points into e or is the piece itself. */
moec_status moec__normalize(moec__piece *out, moec_encoder *e, moec__piece in, moec_err *err) MOEC_USE_RESULT;

/** Character that stands for a byte in byte-level text, as UTF-8 of *n bytes; and the byte of a character, or -1. */
const char *moec__byte_char(size_t *n, unsigned char byte);
int moec__char_byte(uint32_t cp);

#endif
