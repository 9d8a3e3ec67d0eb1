/* The byte pair encoding model: vocabulary, merge rules, and the merging of one piece of text into ids. Knows nothing
 * of JSON, normalizers or patterns. */
#ifndef MOEC_TEXT_BPE_H
#define MOEC_TEXT_BPE_H

#include "base/mem.h"
#include "text/table.h"
#include "text/tokenizer.h"
#include "text/utf8.h"

enum { MOEC__DIRECT = 0x800 }; /* characters of one or two bytes have their id in an array */

typedef struct moec__bpe {
    moec__words vocab;
    moec__pairs merges;   /* left << 32 | right  ->  rank << 32 | id of both joined */
    moec__pairs by_id;    /* id -> index in vocab.word */
    moec__pairs joinable; /* characters a, b (as ids) that some merge rule can bring together, a << 32 | b */
    int32_t direct[MOEC__DIRECT];
    int32_t byte_id[256]; /* <0x00> .. <0xFF>, -1 when absent or byte_fallback is off */
    bool has_unk, fuse_unk, ignore_merges;
    int32_t unk_id; /* -1: unk_token is named but not in the vocabulary */
    bool can_cut;   /* only single characters are ever merged, so `joinable` tells all */
} moec__bpe;

/** To be called once vocab and merges are filled and the flags set: makes direct, joinable and can_cut. MOEC_ENOMEM.
 */
moec_status moec__bpe_finish(moec__bpe *b, moec_err *err) MOEC_USE_RESULT;
void moec__bpe_release(moec__bpe *b);

/** Adds the rule left + right of this rank; the last of equal rules counts. MOEC_EFORMAT names an absent token. */
moec_status moec__bpe_add_merge(moec__bpe *b, const char *left, size_t n_left, const char *right, size_t n_right,
                                uint32_t rank, moec_err *err) MOEC_USE_RESULT;

/* Scratch memory of one thread and its cache of short pieces. */
typedef struct moec__merger moec__merger;
moec_status moec__merger_new(moec__merger **out, moec_err *err) MOEC_USE_RESULT;
void moec__merger_free(moec__merger *m);

/** Appends the ids of one piece of checked UTF-8. MOEC_EFORMAT: see moec_encode. */
moec_status moec__bpe_piece(moec_ids *out, moec__merger *m, const moec__bpe *b, const char *s, size_t n,
                            moec_err *err) MOEC_USE_RESULT;

static inline moec_status moec__ids_add(moec_ids *ids, int32_t id, moec_err *err)
{
    if (ids->n == ids->cap) {
        moec_status st = moec_grow((void **)&ids->id, &ids->cap, ids->n + 1, sizeof *ids->id, err);
        if (st != MOEC_OK)
            return st;
    }
    ids->id[ids->n++] = id;
    return MOEC_OK;
}

#endif
