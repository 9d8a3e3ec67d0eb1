/* Merging of a piece: the rule of lowest rank first, the leftmost place on ties, until no rule applies. Short words
 * are scanned and remembered, long stretches are cut where no rule reaches across and merged with a heap. */
#include "text/bpe.h"

enum {
    SHORT_WORD = 48,   /* characters that are scanned rather than kept in a heap */
    CACHED_BYTES = 48, /* longest piece that is remembered */
    CACHE_SLOTS = 1 << 15,
    CACHE_BYTES = 1 << 19, /* of remembered pieces */
    CACHE_IDS = 1 << 17,
    WORD_LIMIT = 1 << 30 /* characters of one stretch, so that a place fits 32 bits */
};
#define NO_RANK UINT32_MAX

typedef struct slot {
    uint32_t hash, at, ids;
    uint16_t len, n; /* len 0: free */
} slot;

/* Keys and ids are appended; when one of the areas is full, everything is forgotten. */
typedef struct cache {
    slot *slot;
    char *bytes;
    int32_t *ids;
    uint32_t n, n_bytes, n_ids;
} cache;

struct moec__merger {
    cache cache;
    int32_t *sym; /* the characters of the stretch in hand, then what they merged into */
    size_t n_sym, cap_sym;
    uint32_t *rank; /* of the pair that begins at this place, NO_RANK: none */
    size_t cap_rank;
    int32_t *joined; /* its id once merged */
    size_t cap_joined;
    uint32_t *prev, *next; /* places still alive */
    size_t cap_prev, cap_next;
    uint64_t *heap; /* rank << 32 | place; entries are not removed when they become stale */
    size_t n_heap, cap_heap;
};

moec_status moec__merger_new(moec__merger **out, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec__merger *m = NULL;
    MOEC_TRY(MOEC_NEW(m, 1, err));
    MOEC_TRY(MOEC_NEW(m->cache.slot, CACHE_SLOTS, err));
    MOEC_TRY(MOEC_NEW(m->cache.bytes, CACHE_BYTES, err));
    MOEC_TRY(MOEC_NEW(m->cache.ids, CACHE_IDS, err));
    *out = m;
    return MOEC_OK;
done:
    moec__merger_free(m);
    *out = NULL;
    return st;
}

void moec__merger_free(moec__merger *m)
{
    if (!m)
        return;
    moec_free(m->heap);
    moec_free(m->next);
    moec_free(m->prev);
    moec_free(m->joined);
    moec_free(m->rank);
    moec_free(m->sym);
    moec_free(m->cache.ids);
    moec_free(m->cache.bytes);
    moec_free(m->cache.slot);
    moec_free(m);
}

/* The slot of these bytes, or the free one where they belong. */
static slot *cache_find(cache *c, const char *s, size_t n, uint64_t h)
{
    for (size_t i = h;; i++) {
        slot *at = &c->slot[i % CACHE_SLOTS];
        if (at->len == 0 || (at->hash == (uint32_t)(h >> 32) && at->len == n && memcmp(c->bytes + at->at, s, n) == 0))
            return at;
    }
}

static void cache_add(cache *c, const char *s, size_t n, uint64_t h, const int32_t *ids, size_t n_ids)
{
    if (c->n >= CACHE_SLOTS / 2 || c->n_bytes + n > CACHE_BYTES || c->n_ids + n_ids > CACHE_IDS) {
        memset(c->slot, 0, CACHE_SLOTS * sizeof *c->slot);
        c->n = c->n_bytes = c->n_ids = 0;
    }
    slot *at = cache_find(c, s, n, h);
    *at = (slot){(uint32_t)(h >> 32), c->n_bytes, c->n_ids, (uint16_t)n, (uint16_t)n_ids};
    memcpy(c->bytes + c->n_bytes, s, n);
    if (n_ids > 0)
        memcpy(c->ids + c->n_ids, ids, n_ids * sizeof *ids);
    c->n++;
    c->n_bytes += (uint32_t)n;
    c->n_ids += (uint32_t)n_ids;
}

static moec_status add_all(moec_ids *out, const int32_t *id, size_t n, moec_err *err)
{
    if (n == 0)
        return MOEC_OK;
    moec_status st = MOEC_GROW(out->id, out->cap, out->n + n, err);
    if (st == MOEC_OK) {
        memcpy(out->id + out->n, id, n * sizeof *id);
        out->n += n;
    }
    return st;
}

static uint32_t look_up(int32_t *joined, const moec__bpe *b, int32_t left, int32_t right)
{
    const uint64_t *v = moec__pairs_get(&b->merges, (uint64_t)(uint32_t)left << 32 | (uint32_t)right);
    if (!v)
        return NO_RANK;
    *joined = (int32_t)(uint32_t)*v;
    return (uint32_t)(*v >> 32);
}

/* sym[0..n) in place; returns what is left. n <= SHORT_WORD. */
static size_t merge_short(int32_t *sym, size_t n, const moec__bpe *b)
{
    uint32_t rank[SHORT_WORD];
    int32_t joined[SHORT_WORD] = {0};
    for (size_t i = 0; i + 1 < n; i++)
        rank[i] = look_up(&joined[i], b, sym[i], sym[i + 1]);
    while (n > 1) {
        size_t at = 0;
        for (size_t i = 1; i + 1 < n; i++)
            if (rank[i] < rank[at])
                at = i;
        if (rank[at] == NO_RANK)
            break;
        sym[at] = joined[at];
        n--;
        for (size_t i = at + 1; i < n; i++) {
            sym[i] = sym[i + 1];
            rank[i] = rank[i + 1];
            joined[i] = joined[i + 1];
        }
        if (at > 0)
            rank[at - 1] = look_up(&joined[at - 1], b, sym[at - 1], sym[at]);
        if (at + 1 < n)
            rank[at] = look_up(&joined[at], b, sym[at], sym[at + 1]);
    }
    return n;
}

static moec_status heap_push(moec__merger *m, uint64_t key, moec_err *err)
{
    moec_status st = MOEC_GROW(m->heap, m->cap_heap, m->n_heap + 1, err);
    if (st != MOEC_OK)
        return st;
    size_t i = m->n_heap++;
    for (; i > 0 && m->heap[(i - 1) / 2] > key; i = (i - 1) / 2)
        m->heap[i] = m->heap[(i - 1) / 2];
    m->heap[i] = key;
    return MOEC_OK;
}

static uint64_t heap_pop(moec__merger *m)
{
    uint64_t top = m->heap[0], last = m->heap[--m->n_heap];
    size_t i = 0, n = m->n_heap;
    for (size_t k; (k = 2 * i + 1) < n; i = k) {
        k += k + 1 < n && m->heap[k + 1] < m->heap[k];
        if (m->heap[k] >= last)
            break;
        m->heap[i] = m->heap[k];
    }
    if (n > 0)
        m->heap[i] = last;
    return top;
}

/* Ranks the pair that begins at place i and queues it. Places stand in for positions: both grow from left to right.
 */
static moec_status queue_pair(moec__merger *m, const moec__bpe *b, size_t i, moec_err *err)
{
    uint32_t k = m->next[i];
    m->rank[i] = k == NO_RANK ? NO_RANK : look_up(&m->joined[i], b, m->sym[i], m->sym[k]);
    return m->rank[i] == NO_RANK ? MOEC_OK : heap_push(m, (uint64_t)m->rank[i] << 32 | i, err);
}

static moec_status merge_long(moec__merger *m, const moec__bpe *b, moec_err *err)
{
    moec_status st = MOEC_OK;
    size_t n = m->n_sym, kept = 0;
    MOEC_TRY(MOEC_GROW(m->rank, m->cap_rank, n, err));
    MOEC_TRY(MOEC_GROW(m->joined, m->cap_joined, n, err));
    MOEC_TRY(MOEC_GROW(m->prev, m->cap_prev, n, err));
    MOEC_TRY(MOEC_GROW(m->next, m->cap_next, n, err));
    m->n_heap = 0;
    for (size_t i = 0; i < n; i++) {
        m->prev[i] = i == 0 ? NO_RANK : (uint32_t)i - 1;
        m->next[i] = i + 1 == n ? NO_RANK : (uint32_t)i + 1;
    }
    for (size_t i = 0; i < n; i++)
        MOEC_TRY(queue_pair(m, b, i, err));
    while (m->n_heap > 0) {
        uint64_t top = heap_pop(m);
        uint32_t i = (uint32_t)top;
        if (m->rank[i] != (uint32_t)(top >> 32)) /* the pair here is another one by now */
            continue;
        uint32_t gone = m->next[i], after = m->next[gone];
        m->sym[i] = m->joined[i];
        m->rank[gone] = NO_RANK;
        m->next[i] = after;
        if (after != NO_RANK)
            m->prev[after] = i;
        if (m->prev[i] != NO_RANK)
            MOEC_TRY(queue_pair(m, b, m->prev[i], err));
        MOEC_TRY(queue_pair(m, b, i, err));
    }
    for (uint32_t i = 0; i != NO_RANK; i = m->next[i])
        m->sym[kept++] = m->sym[i];
    m->n_sym = kept;
done:
    return st;
}

/* Merges what was gathered in m->sym, appends it and empties m->sym. s[0..n) is its text when that alone decides the
 * result, else n is 0. */
static moec_status close_stretch(moec_ids *out, moec__merger *m, const moec__bpe *b, const char *s, size_t n,
                                 moec_err *err)
{
    moec_status st = MOEC_OK;
    uint64_t h = 0;
    bool cached = n > 0 && n <= CACHED_BYTES && m->n_sym > 2;
    if (cached) {
        h = moec__hash(s, n);
        const slot *at = cache_find(&m->cache, s, n, h);
        if (at->len != 0) {
            st = add_all(out, m->cache.ids + at->ids, at->n, err);
            goto done;
        }
    }
    if (m->n_sym <= SHORT_WORD)
        m->n_sym = merge_short(m->sym, m->n_sym, b);
    else
        MOEC_TRY(merge_long(m, b, err));
    MOEC_TRY(add_all(out, m->sym, m->n_sym, err));
    if (cached)
        cache_add(&m->cache, s, n, h, m->sym, m->n_sym);
done:
    m->n_sym = 0;
    return st;
}

/* What moec__bpe_piece does with one piece, between its characters. */
typedef struct piece {
    moec_ids *out;
    moec__merger *m;
    const moec__bpe *b;
    const char *s;
    size_t from;       /* where the stretch in hand begins */
    bool cut, waiting; /* waiting: an unk is seen and not yet written, so that the next may fuse with it */
} piece;

static moec_status gather(piece *p, int32_t id, moec_err *err)
{
    moec__merger *m = p->m;
    if (m->n_sym >= WORD_LIMIT)
        return moec_fail(err, MOEC_EFORMAT, "a word of more than %d characters", WORD_LIMIT);
    moec_status st = MOEC_GROW(m->sym, m->cap_sym, m->n_sym + 1, err);
    if (st == MOEC_OK)
        m->sym[m->n_sym++] = id;
    return st;
}

/* A character of the vocabulary that begins at s[i]. */
static moec_status take_known(piece *p, int32_t id, size_t i, moec_err *err)
{
    moec__merger *m = p->m;
    if (p->cut) {
        if (m->n_sym == 0) {
            p->from = i;
        } else if (!moec__pairs_get(&p->b->joinable, (uint64_t)(uint32_t)m->sym[m->n_sym - 1] << 32 | (uint32_t)id)) {
            moec_status st = close_stretch(p->out, m, p->b, p->s + p->from, i - p->from, err);
            if (st != MOEC_OK)
                return st;
            p->from = i;
        }
    }
    return gather(p, id, err);
}

/* An id that is not merged with its neighbours where pieces are cut: a byte or unk. */
static moec_status take_other(piece *p, int32_t id, size_t i, moec_err *err)
{
    moec_status st = MOEC_OK;
    if (!p->cut)
        return gather(p, id, err);
    if (p->m->n_sym > 0)
        st = close_stretch(p->out, p->m, p->b, p->s + p->from, i - p->from, err);
    return st == MOEC_OK ? moec__ids_add(p->out, id, err) : st;
}

static moec_status take_unknown(piece *p, size_t i, size_t n, moec_err *err)
{
    const moec__bpe *b = p->b;
    moec_status st = MOEC_OK;
    bool bytes = true;
    for (size_t k = 0; k < n; k++)
        bytes = bytes && b->byte_id[(unsigned char)p->s[i + k]] >= 0;
    if (bytes) {
        /* A waiting unk stays waiting and so comes behind these bytes: `tokenizers` does it this way. */
        for (size_t k = 0; k < n && st == MOEC_OK; k++)
            st = take_other(p, b->byte_id[(unsigned char)p->s[i + k]], i, err);
        return st;
    }
    if (!b->has_unk) /* the character is dropped */
        return MOEC_OK;
    if (b->unk_id < 0)
        return moec_fail(err, MOEC_EFORMAT, "model: unk_token is needed, but is not in the vocabulary");
    if (p->waiting && !b->fuse_unk)
        st = take_other(p, b->unk_id, i, err);
    else if (p->cut && p->m->n_sym > 0) /* unk separates, even though it is written later */
        st = close_stretch(p->out, p->m, b, p->s + p->from, i - p->from, err);
    p->waiting = true;
    return st;
}

static int32_t char_id(const moec__bpe *b, const char *s, size_t n)
{
    return n < 3 ? b->direct[moec__utf8_get(s)] : moec__words_find(&b->vocab, s, n);
}

static moec_status merge_piece(moec_ids *out, moec__merger *m, const moec__bpe *b, const char *s, size_t n, bool cut,
                               moec_err *err)
{
    moec_status st = MOEC_OK;
    piece p = {out, m, b, s, 0, cut, false};
    m->n_sym = 0;
    for (size_t i = 0, len; i < n; i += len) {
        len = moec__utf8_len((unsigned char)s[i]);
        int32_t id = char_id(b, s + i, len);
        if (id < 0) {
            MOEC_TRY(take_unknown(&p, i, len, err));
            continue;
        }
        if (p.waiting) {
            p.waiting = false;
            MOEC_TRY(take_other(&p, b->unk_id, i, err));
        }
        MOEC_TRY(take_known(&p, id, i, err));
    }
    if (p.waiting)
        MOEC_TRY(take_other(&p, b->unk_id, n, err));
    if (m->n_sym > 0)
        MOEC_TRY(close_stretch(out, m, b, s + p.from, cut ? n - p.from : 0, err));
done:
    return st;
}

moec_status moec__bpe_piece(moec_ids *out, moec__merger *m, const moec__bpe *b, const char *s, size_t n,
                            moec_err *err)
{
    if (b->ignore_merges) {
        int32_t whole = moec__words_find(&b->vocab, s, n);
        if (whole >= 0)
            return moec__ids_add(out, whole, err);
    }
    if (n > CACHED_BYTES)
        return merge_piece(out, m, b, s, n, b->can_cut, err);
    uint64_t h = moec__hash(s, n);
    const slot *at = cache_find(&m->cache, s, n, h);
    if (at->len != 0)
        return add_all(out, m->cache.ids + at->ids, at->n, err);
    size_t before = out->n;
    moec_status st = merge_piece(out, m, b, s, n, false, err);
    if (st == MOEC_OK)
        cache_add(&m->cache, s, n, h, out->id + before, out->n - before);
    return st;
}
