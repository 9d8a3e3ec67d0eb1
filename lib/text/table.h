/* Two hash tables for the tokenizer: bytes to id, and 64-bit key to 64-bit value. Open addressing, at most half full;
 * they only grow, and only while a tokenizer is loaded. */
#ifndef MOEC_TEXT_TABLE_H
#define MOEC_TEXT_TABLE_H

#include "base/err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/** Spreads a short byte string over 64 bits; not for use against somebody who searches for collisions. */
static inline uint64_t moec__hash(const char *s, size_t n)
{
    uint64_t h = n * 0x9e3779b97f4a7c15u, w;
    for (; n >= 8; s += 8, n -= 8) {
        memcpy(&w, s, 8);
        h = (h ^ w) * 0xff51afd7ed558ccdu;
        h ^= h >> 32;
    }
    w = 0;
    if (n > 0)
        memcpy(&w, s, n);
    h = (h ^ w) * 0xc4ceb9fe1a85ec53u;
    return h ^ h >> 29;
}

#define MOEC__NO_KEY UINT64_MAX
typedef struct moec__pairs {
    struct moec__pair {
        uint64_t key, value;
    } * slot;
    size_t n, mask; /* mask + 1 slots */
    int shift;
} moec__pairs;

/** Sets a key (not MOEC__NO_KEY), replacing what was there. MOEC_ENOMEM. */
moec_status moec__pairs_set(moec__pairs *t, uint64_t key, uint64_t value, moec_err *err) MOEC_USE_RESULT;

/** Borrowed, or NULL. */
static inline const uint64_t *moec__pairs_get(const moec__pairs *t, uint64_t key)
{
    if (t->n == 0)
        return NULL;
    for (size_t i = key * 0x9e3779b97f4a7c15u >> t->shift;; i++) {
        const struct moec__pair *p = &t->slot[i & t->mask];
        if (p->key == key)
            return &p->value;
        if (p->key == MOEC__NO_KEY)
            return NULL;
    }
}

typedef struct moec__words {
    struct moec__word {
        size_t at; /* in bytes.p, NUL behind */
        uint32_t len;
        int32_t id;
    } * word;
    size_t n, cap;
    struct moec__slot {
        uint32_t hash, index; /* index + 1; 0: free */
    } * slot;
    size_t mask;
    char *bytes;
    size_t n_bytes, cap_bytes;
} moec__words;

/** Adds a word that is not there yet. MOEC_ENOMEM. */
moec_status moec__words_add(moec__words *t, const char *s, size_t n, int32_t id, moec_err *err) MOEC_USE_RESULT;
/** Its id, or -1. */
int32_t moec__words_find(const moec__words *t, const char *s, size_t n);
void moec__words_release(moec__words *t);

#endif
