/* Growing and filling of the tables; the lookups that encoding makes are in the header or below. */
#include "text/table.h"

#include "base/mem.h"

static moec_status pairs_resize(moec__pairs *t, int log2, moec_err *err)
{
    moec__pairs bigger = {.n = t->n, .mask = ((size_t)1 << log2) - 1, .shift = 64 - log2};
    moec_status st = MOEC_NEW(bigger.slot, bigger.mask + 1, err);
    if (st != MOEC_OK)
        return st;
    for (size_t i = 0; i <= bigger.mask; i++)
        bigger.slot[i].key = MOEC__NO_KEY;
    for (size_t k = 0; t->slot && k <= t->mask; k++) {
        if (t->slot[k].key == MOEC__NO_KEY)
            continue;
        size_t i = t->slot[k].key * 0x9e3779b97f4a7c15u >> bigger.shift;
        while (bigger.slot[i & bigger.mask].key != MOEC__NO_KEY)
            i++;
        bigger.slot[i & bigger.mask] = t->slot[k];
    }
    moec_free(t->slot);
    *t = bigger;
    return MOEC_OK;
}

moec_status moec__pairs_set(moec__pairs *t, uint64_t key, uint64_t value, moec_err *err)
{
    if (!t->slot || 2 * (t->n + 1) > t->mask + 1) {
        moec_status st = pairs_resize(t, t->slot ? 64 - t->shift + 1 : 6, err);
        if (st != MOEC_OK)
            return st;
    }
    size_t i = key * 0x9e3779b97f4a7c15u >> t->shift;
    while (t->slot[i & t->mask].key != MOEC__NO_KEY && t->slot[i & t->mask].key != key)
        i++;
    struct moec__pair *p = &t->slot[i & t->mask];
    t->n += p->key == MOEC__NO_KEY;
    p->key = key;
    p->value = value;
    return MOEC_OK;
}

static moec_status words_resize(moec__words *t, size_t slots, moec_err *err)
{
    struct moec__slot *slot;
    moec_status st = MOEC_NEW(slot, slots, err);
    if (st != MOEC_OK)
        return st;
    for (size_t k = 0; k < t->n; k++) {
        uint64_t h = moec__hash(t->bytes + t->word[k].at, t->word[k].len);
        size_t i = h & (slots - 1);
        while (slot[i].index != 0)
            i = (i + 1) & (slots - 1);
        slot[i] = (struct moec__slot){(uint32_t)(h >> 32), (uint32_t)k + 1};
    }
    moec_free(t->slot);
    t->slot = slot;
    t->mask = slots - 1;
    return MOEC_OK;
}

moec_status moec__words_add(moec__words *t, const char *s, size_t n, int32_t id, moec_err *err)
{
    moec_status st = MOEC_OK;
    if (n >= UINT32_MAX || t->n >= UINT32_MAX - 1)
        return moec_fail(err, MOEC_EFORMAT, "a token of %zu bytes or a vocabulary of %zu tokens is too large", n,
                         t->n);
    if (!t->slot || 2 * (t->n + 1) > t->mask + 1)
        MOEC_TRY(words_resize(t, t->slot ? 2 * (t->mask + 1) : 64, err));
    MOEC_TRY(MOEC_GROW(t->word, t->cap, t->n + 1, err));
    MOEC_TRY(MOEC_GROW(t->bytes, t->cap_bytes, t->n_bytes + n + 1, err));
    memcpy(t->bytes + t->n_bytes, s, n);
    t->bytes[t->n_bytes + n] = '\0';
    t->word[t->n] = (struct moec__word){t->n_bytes, (uint32_t)n, id};
    t->n_bytes += n + 1;
    uint64_t h = moec__hash(s, n);
    size_t i = h & t->mask;
    while (t->slot[i].index != 0)
        i = (i + 1) & t->mask;
    t->slot[i] = (struct moec__slot){(uint32_t)(h >> 32), (uint32_t)++t->n};
done:
    return st;
}

int32_t moec__words_find(const moec__words *t, const char *s, size_t n)
{
    if (t->n == 0)
        return -1;
    uint64_t h = moec__hash(s, n);
    for (size_t i = h & t->mask; t->slot[i].index != 0; i = (i + 1) & t->mask) {
        if (t->slot[i].hash != (uint32_t)(h >> 32))
            continue;
        const struct moec__word *w = &t->word[t->slot[i].index - 1];
        if (w->len == n && memcmp(t->bytes + w->at, s, n) == 0)
            return w->id;
    }
    return -1;
}

void moec__words_release(moec__words *t)
{
    moec_free(t->bytes);
    moec_free(t->slot);
    moec_free(t->word);
    *t = (moec__words){0};
}
