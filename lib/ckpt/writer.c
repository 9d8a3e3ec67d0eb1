/* Carries a moec_out out: pieces of all shards are copied, read back and checked in parallel, hashed in order, and each
 * shard is synced and renamed as soon as its last piece is done. */
#include "ckpt/writer.h"

#include "base/file.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/par.h"
#include "ckpt/out.h"
#include "ckpt/place.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <threads.h>
#include <unistd.h>

/* PIECE: copied, read back, checked and hashed while it is in the second-level cache. FLUSH: what the disk is told to begin
 * with at once. */
enum { PIECE = 1 << 20, FLUSH = 8 << 20, BUFFER = 256 << 10 };
static const double note_every = 5.0; /* seconds between two states of a journal */

typedef struct shard_state {
    char *tmp, *path;
    int fd;
    unsigned char *map;
    uint64_t size;
    moec_hash *hash;
    bool there;        /* complete since an earlier run: checked and hashed, not written */
    char *journal;     /* of a raw shard: says how much of it is written, and the hash of that */
    uint64_t from, upto; /* written and hashed: by an earlier run, by now */
    double noted;      /* when the journal was written */
    mtx_t copying;     /* the kernel lets one thread at a time write a file; the others shall sleep, not spin */
    bool has_mutex;
    atomic_int stage;
} shard_state;

/* Of a shard: pieces are still to come; all are hashed, it waits for its final name; somebody gives it the name. */
enum { OPEN, HASHED, NAMED };

typedef struct piece {
    size_t s;
    uint64_t lo, hi;
} piece;

typedef struct file_state {
    const char *name;
    uint64_t bytes;
    moec_digest hash;
} file_state;

struct moec_writer {
    moec_out *o;
    moec_writer_options opt;
    moec_place_out place;
    shard_state *shard;
    piece *piece;
    size_t n_pieces;
    file_state *file; /* [n_shards + n_files] */
    size_t n_files;
    atomic_bool wrong; /* a check failed */
    moec_progress progress;
};

/* --- copying --------------------------------------------------------------------------------------------------------- */

static moec_status write_all(int fd, const void *bytes, size_t n, uint64_t at, const char *what, moec_err *err)
{
    for (size_t done = 0; done < n;) {
        ssize_t w = pwrite(fd, (const char *)bytes + done, n - done, (off_t)(at + done));
        if (w < 0 && errno == EINTR)
            continue;
        if (w < 0)
            return moec_fail_errno(err, errno, what);
        done += (size_t)w;
    }
    return MOEC_OK;
}

static moec_status copy_buffered(int to, uint64_t at, int fd, uint64_t from, uint64_t length, const char *what,
                                 moec_err *err)
{
    moec_status st = MOEC_OK;
    char *buf = NULL;
    MOEC_TRY(MOEC_NEW(buf, length < BUFFER ? (size_t)length : BUFFER, err));
    while (length > 0) {
        ssize_t n = pread(fd, buf, length < BUFFER ? (size_t)length : BUFFER, (off_t)from);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            st = moec_fail_errno(err, errno, what);
        else if (n == 0)
            st = moec_fail(err, MOEC_EIO, "%s: its source ends early; it was changed while it was read", what);
        else
            st = write_all(to, buf, (size_t)n, at, what, err);
        if (st != MOEC_OK)
            break;
        at += (uint64_t)n;
        from += (uint64_t)n;
        length -= (uint64_t)n;
    }
done:
    moec_free(buf);
    return st;
}

moec_status moec_copy_range(int to, uint64_t at, int fd, uint64_t from, uint64_t length, const char *what,
                            moec_err *err)
{
    static const uint64_t worth_a_call = 32 << 10; /* below this the two plain calls cost less */
    while (length >= worth_a_call) {
        off_t in = (off_t)from, out = (off_t)at;
        ssize_t n = copy_file_range(fd, &in, to, &out, (size_t)length, 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && (errno == ENOSPC || errno == EDQUOT || errno == EFBIG || errno == EIO))
            return moec_fail_errno(err, errno, what);
        if (n <= 0) /* not between these two file systems: the plain way says what is wrong, if anything is */
            break;
        from += (uint64_t)n;
        at += (uint64_t)n;
        length -= (uint64_t)n;
    }
    return length > 0 ? copy_buffered(to, at, fd, from, length, what, err) : MOEC_OK;
}

/* Bytes [skip, skip + n) of a segment that is made, in buf. */
static moec_status make_bytes(unsigned char *buf, const moec_segment *g, uint64_t skip, size_t n, moec_err *err)
{
    if (g->make)
        return g->make(buf, g->ctx, g->from + skip, n, err);
    for (size_t i = 0; i < n; i++)
        buf[i] = g->fill[(skip + i) % g->fill_size];
    return MOEC_OK;
}

/* What is made may take long: only the writing of it is done one thread at a time. */
static moec_status make_range(shard_state *state, uint64_t at, const moec_segment *g, uint64_t skip, uint64_t length, moec_err *err)
{
    moec_status st = MOEC_OK;
    unsigned char *buf = NULL;
    MOEC_TRY(MOEC_NEW(buf, BUFFER, err));
    while (length > 0) {
        /* a piece of the file may begin inside a value; what is made begins at one */
        uint64_t back = skip % 8, n = length + back < BUFFER ? length + back : BUFFER;
        uint64_t whole = (n + 7) / 8 * 8;
        if (whole > g->length - (skip - back))
            whole = g->length - (skip - back);
        MOEC_TRY(make_bytes(buf, g, skip - back, (size_t)whole, err));
        mtx_lock(&state->copying);
        st = write_all(state->fd, buf + back, (size_t)(n - back), at, state->tmp, err);
        mtx_unlock(&state->copying);
        MOEC_TRY(st);
        at += n - back;
        skip += n - back;
        length -= n - back;
    }
done:
    moec_free(buf);
    return st;
}

/* Index of the segment that holds byte `at` of the data. */
static size_t segment_at(const moec_shard_plan *s, uint64_t at)
{
    size_t lo = 0, hi = s->n_segments;
    while (hi - lo > 1) {
        size_t mid = lo + (hi - lo) / 2;
        if (s->segment[mid].at <= at)
            lo = mid;
        else
            hi = mid;
    }
    return lo;
}

/* Bytes [lo, hi) of the shard file. */
static moec_status copy_piece(shard_state *state, const moec_shard_plan *s, uint64_t lo, uint64_t hi,
                              moec_err *err)
{
    moec_status st = MOEC_OK;
    uint64_t head = s->header_len;
    if (lo < head) {
        uint64_t end = hi < head ? hi : head;
        MOEC_TRY(write_all(state->fd, s->header + lo, (size_t)(end - lo), lo, state->tmp, err));
        lo = end;
    }
    if (lo >= hi)
        return MOEC_OK;
    for (size_t i = segment_at(s, lo - head); lo < hi; i++) {
        const moec_segment *g = &s->segment[i];
        uint64_t skip = lo - head - g->at, n = g->length - skip;
        if (n > hi - lo)
            n = hi - lo;
        if (g->fd < 0) {
            MOEC_TRY(make_range(state, lo, g, skip, n, err));
        } else {
            mtx_lock(&state->copying);
            st = moec_copy_range(state->fd, lo, g->fd, g->from + skip, n, state->tmp, err);
            mtx_unlock(&state->copying);
            MOEC_TRY(st);
        }
        lo += n;
    }
done:
    return st;
}

/* --- shards ---------------------------------------------------------------------------------------------------------- */

/* Takes the disk space before the first byte is copied: a disk that is too full says so now, and writing the pages back
 * later costs far less than when the file system has to find room for each. */
static moec_status reserve(const shard_state *s, moec_err *err)
{
    int failed;
    do
        failed = fallocate(s->fd, 0, 0, (off_t)s->size);
    while (failed != 0 && errno == EINTR);
    if (failed != 0 && (errno == EOPNOTSUPP || errno == ENOSYS || errno == EINVAL)) /* a file system without it */
        failed = ftruncate(s->fd, (off_t)s->size);
    return failed != 0 ? moec_fail_errno(err, errno, s->tmp) : MOEC_OK;
}

/* Says in the journal how far the file is. Without it a run that is stopped only begins further in front. */
static void note(shard_state *s)
{
    char line[64];
    moec_err why = {MOEC_OK, ""};
    const int n = snprintf(line, sizeof line, "%llu %s\n", (unsigned long long)s->upto, moec_hash_digest(s->hash).hex);
    s->noted = moec_now();
    if (s->upto > s->from && s->upto < s->size && moec_file_write(s->journal, line, (size_t)n, &why) != MOEC_OK)
        moec_note("%s", why.text);
}

/* Takes up what the journal says is written and whose hash is that; pieces are whole ones, so that the same follow. */
static moec_status take_up(shard_state *s, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_err why = {MOEC_OK, ""};
    char *text = NULL, *end;
    size_t len;
    if (moec_file_read(&text, &len, s->journal, 64, &why) != MOEC_OK)
        return MOEC_OK;
    const uint64_t upto = strtoull(text, &end, 10);
    if (*end == ' ' && upto % PIECE == 0 && upto < s->size) {
        for (uint64_t at = 0; at < upto; at += PIECE) {
            MOEC_TRY(moec_interrupted(err));
            moec_hash_add(s->hash, s->map + at, PIECE);
            moec_pages_drop(s->map + at, PIECE);
        }
        const moec_digest found = moec_hash_digest(s->hash);
        if (strncmp(end + 1, found.hex, strlen(found.hex)) == 0)
            s->from = upto;
        else {
            moec_say("%s: what an interrupted run wrote is damaged; it is written anew", s->tmp);
            moec_hash_free(s->hash);
            s->hash = NULL;
            MOEC_TRY(moec_hash_new(&s->hash, err));
        }
    }
done:
    moec_free(text);
    return st;
}

static moec_status open_shard(shard_state *s, const moec_writer *w, size_t i, moec_err *err)
{
    moec_status st = MOEC_OK;
    const char *name = moec_out_shard_name(w->o, i);
    s->size = moec_out_size(w->o, i);
    if (!(s->has_mutex = mtx_init(&s->copying, mtx_plain) == thrd_success))
        return moec_fail(err, MOEC_ENOMEM, "out of memory: no room for a lock");
    MOEC_TRY(moec_path_join(&s->path, w->place.partial, name, err));
    MOEC_TRY(moec_format(&s->tmp, err, "%s.tmp", s->path));
    MOEC_TRY(moec_hash_new(&s->hash, err));
    s->there = moec_path_exists(s->path); /* only complete ones were left there */
    if (w->o->shard[i].raw)
        MOEC_TRY(moec_format(&s->journal, err, "%s.journal", s->path));
    const bool begun = s->journal && moec_path_exists(s->journal);
    s->fd = s->there ? open(s->path, O_RDONLY | O_CLOEXEC)
                     : open(s->tmp, O_RDWR | O_CREAT | (begun ? 0 : O_TRUNC) | O_CLOEXEC, 0666);
    if (s->fd < 0) {
        st = moec_fail_errno(err, errno, s->tmp);
        goto done;
    }
    if (!s->there)
        MOEC_TRY(reserve(s, err));
    void *map = mmap(NULL, (size_t)s->size, PROT_READ, MAP_SHARED, s->fd, 0);
    if (map == MAP_FAILED)
        st = moec_fail_errno(err, errno, s->tmp);
    else
        s->map = map;
    if (s->map && begun && !s->there)
        MOEC_TRY(take_up(s, err));
    s->noted = moec_now();
done:
    return st;
}

static void close_shard(shard_state *s)
{
    if (s->map)
        munmap(s->map, (size_t)s->size);
    if (s->fd >= 0)
        close(s->fd);
    s->map = NULL;
    s->fd = -1;
}

static moec_status finish_shard(shard_state *s, moec_err *err)
{
    moec_status st = MOEC_OK;
    if (!s->there && fsync(s->fd) != 0)
        st = moec_fail_errno(err, errno, s->tmp);
    close_shard(s);
    if (st == MOEC_OK && !s->there && rename(s->tmp, s->path) != 0)
        st = moec_fail_errno(err, errno, s->path);
    if (st == MOEC_OK && s->journal && unlink(s->journal) != 0 && errno != ENOENT)
        st = moec_fail_errno(err, errno, s->journal);
    return st;
}

/* Gives one shard that waits for it its final name. Done by whichever worker comes next, so that syncing one shard goes
 * on beside the copying of others. */
static moec_status finish_waiting(moec_writer *w, bool *any, moec_err *err)
{
    *any = false;
    for (size_t i = 0; i < w->o->n_shards; i++) {
        int stage = HASHED;
        if (atomic_compare_exchange_strong(&w->shard[i].stage, &stage, NAMED)) {
            *any = true;
            return finish_shard(&w->shard[i], err);
        }
    }
    return MOEC_OK;
}

/* Lets the disk begin at once, so that the sync at the end finds little left. Advice: whether it worked is no matter, and
 * pieces of the stretch that other workers still write are left to the sync. */
static void flush(const shard_state *s, const piece *p)
{
    uint64_t lo = p->lo / FLUSH * FLUSH;
    if (p->hi % FLUSH == 0 || p->hi == s->size)
        (void)sync_file_range(s->fd, (off_t)lo, (off_t)(p->hi - lo), SYNC_FILE_RANGE_WRITE);
}

static moec_status do_piece(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    (void)worker;
    moec_status st = MOEC_OK;
    moec_writer *w = ctx;
    bool any;
    for (int64_t i = lo; i < hi; i++) {
        const piece *p = &w->piece[i];
        shard_state *s = &w->shard[p->s];
        MOEC_TRY(moec_interrupted(err));
        MOEC_TRY(finish_waiting(w, &any, err));
        if (!s->there && p->lo >= s->from) {
            MOEC_TRY(copy_piece(s, &w->o->shard[p->s], p->lo, p->hi, err));
            flush(s, p);
        }
        if (w->opt.check && (st = w->opt.check(w->opt.ctx, p->s, s->map, p->lo, p->hi, err)) != MOEC_OK) {
            atomic_store(&w->wrong, st != MOEC_EINTR);
            goto done;
        }
    }
done:
    return st;
}

/* In order of the pieces: the hash of a file is a chain. */
static moec_status hash_piece(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    (void)worker;
    (void)err;
    moec_writer *w = ctx;
    for (int64_t i = lo; i < hi; i++) {
        const piece *p = &w->piece[i];
        shard_state *s = &w->shard[p->s];
        if (p->lo >= s->from)
            moec_hash_add(s->hash, s->map + p->lo, (size_t)(p->hi - p->lo));
        s->upto = p->hi;
        moec_pages_drop(s->map + p->lo, (size_t)(p->hi - p->lo));
        moec_progress_step(&w->progress, p->hi - p->lo);
        if (s->journal && p->hi < s->size && moec_now() - s->noted > note_every)
            note(s);
        if (p->hi == s->size)
            atomic_store(&s->stage, HASHED);
    }
    return MOEC_OK;
}

/* The pieces of as many shards as there are workers take turns, since two workers cannot write one file at once. */
static moec_status cut_pieces(moec_writer *w, moec_err *err)
{
    const size_t shards = w->o->n_shards, lanes = (size_t)moec_par_threads();
    size_t n = 0;
    for (size_t i = 0; i < shards; i++)
        n += (size_t)((w->shard[i].size + PIECE - 1) / PIECE);
    moec_status st = MOEC_NEW(w->piece, n, err);
    for (size_t first = 0; st == MOEC_OK && first < shards; first += lanes) {
        size_t end = first + lanes < shards ? first + lanes : shards;
        bool more = true;
        for (uint64_t lo = 0; more; lo += PIECE) {
            more = false;
            for (size_t i = first; i < end; i++) {
                uint64_t size = w->shard[i].size;
                if (lo >= size)
                    continue;
                w->piece[w->n_pieces++] = (piece){.s = i, .lo = lo, .hi = size - lo < PIECE ? size : lo + PIECE};
                more = true;
            }
        }
    }
    return st;
}

static moec_status write_shards(moec_writer *w, moec_err *err)
{
    moec_status st = MOEC_OK;
    bool any = true;
    uint64_t total = 0, skipped = 0;
    for (size_t i = 0; i < w->o->n_shards; i++) {
        MOEC_TRY(open_shard(&w->shard[i], w, i, err));
        total += w->shard[i].size;
        skipped += w->shard[i].there ? w->shard[i].size : w->shard[i].from;
    }
    if (skipped > 0)
        moec_say("%s: continuing; %llu of %llu bytes were already written", w->place.partial,
                 (unsigned long long)skipped, (unsigned long long)total);
    MOEC_TRY(cut_pieces(w, err));
    moec_progress_start(&w->progress, "writing", "bytes", total, 0);
    st = moec_par_ordered((int64_t)w->n_pieces, 1, do_piece, hash_piece, w, err);
    for (size_t i = 0; st != MOEC_OK && i < w->o->n_shards; i++)
        if (w->shard[i].journal && w->shard[i].map && !w->shard[i].there)
            note(&w->shard[i]);
    MOEC_TRY(st);
    while (any)
        MOEC_TRY(finish_waiting(w, &any, err));
    moec_progress_finish(&w->progress);
    for (size_t i = 0; i < w->o->n_shards; i++)
        w->file[w->n_files++] = (file_state){.name = moec_out_shard_name(w->o, i), .bytes = w->shard[i].size,
                                             .hash = moec_hash_digest(w->shard[i].hash)};
done:
    return st;
}

/* --- side files ------------------------------------------------------------------------------------------------------ */

static moec_status copy_file(const char *to, const char *from, uint64_t *bytes, moec_err *err)
{
    moec_status st = MOEC_OK;
    struct stat info;
    int in = open(from, O_RDONLY | O_CLOEXEC), out = -1;
    if (in < 0 || fstat(in, &info) != 0) {
        st = moec_fail_errno(err, errno, from);
        goto done;
    }
    out = open(to, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (out < 0) {
        st = moec_fail_errno(err, errno, to);
        goto done;
    }
    *bytes = (uint64_t)info.st_size;
    MOEC_TRY(moec_copy_range(out, 0, in, 0, *bytes, to, err));
    if (fsync(out) != 0)
        st = moec_fail_errno(err, errno, to);
done:
    if (out >= 0 && close(out) != 0 && st == MOEC_OK)
        st = moec_fail_errno(err, errno, to);
    if (in >= 0)
        close(in);
    return st;
}

static moec_status write_file(moec_writer *w, const moec_file_plan *f, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *path = NULL;
    file_state *done_file = &w->file[w->n_files];
    done_file->name = f->name;
    MOEC_TRY(moec_interrupted(err));
    MOEC_TRY(moec_path_join(&path, w->place.partial, f->name, err));
    if (f->path)
        MOEC_TRY(copy_file(path, f->path, &done_file->bytes, err));
    else
        MOEC_TRY(moec_file_write(path, f->bytes, (size_t)f->len, err));
    MOEC_TRY(moec_file_digest(&done_file->hash, &done_file->bytes, path, err));
    w->n_files++;
done:
    moec_free(path);
    return st;
}

moec_status moec_file_digest(moec_digest *out, uint64_t *bytes, const char *path, moec_err *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    *bytes = 0;
    if (fd < 0)
        return moec_fail_errno(err, errno, path);
    moec_status st = moec_hash_file(out, bytes, fd, 0, path, err);
    close(fd);
    return st;
}

/* --- the writer ------------------------------------------------------------------------------------------------------ */

/* What makes two runs the same: the caller's text, and every byte range that is copied where. */
static moec_status identity(moec_digest *out, const moec_out *o, const char *text, moec_err *err)
{
    moec_hash *h;
    moec_status st = moec_hash_new(&h, err);
    if (st != MOEC_OK)
        return st;
    moec_hash_text(h, text);
    for (size_t i = 0; i < o->n_shards; i++) {
        const moec_shard_plan *s = &o->shard[i];
        moec_hash_text(h, s->name);
        moec_hash_add(h, s->header, s->header_len);
        for (size_t j = 0; j < s->n_segments; j++) {
            const moec_segment *g = &s->segment[j];
            const uint64_t range[2] = {g->from, g->length};
            moec_hash_add(h, range, sizeof range);
            if (g->fd < 0)
                moec_hash_add(h, g->fill, sizeof g->fill);
        }
    }
    *out = moec_hash_digest(h);
    moec_hash_free(h);
    return MOEC_OK;
}

static bool is_complete(void *ctx, const char *name, uint64_t size)
{
    const moec_out *o = ctx;
    for (size_t i = 0; i < o->n_shards; i++)
        if (strcmp(name, o->shard[i].name) == 0)
            return size == moec_out_size(o, i);
    for (size_t i = 0; i < o->n_shards; i++) { /* NAME.tmp and NAME.journal of one in the middle */
        const size_t n = strlen(o->shard[i].name);
        if (o->shard[i].raw && strncmp(name, o->shard[i].name, n) == 0)
            return (strcmp(name + n, ".tmp") == 0 && size == moec_out_size(o, i)) || strcmp(name + n, ".journal") == 0;
    }
    return false;
}

moec_status moec_writer_open(moec_writer **out, moec_out *o, const moec_writer_options *opt, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_writer *w = NULL;
    moec_digest id;
    char mark[64];
    *out = NULL;
    if (!o->closed)
        return moec_fail(err, MOEC_EINVAL, "the list of output files is not closed");
    if (opt->magic && (o->n_shards != 1 || o->n_files > 0))
        return moec_fail(err, MOEC_EINVAL, "%s: one file cannot hold a list of several", opt->dir);
    MOEC_TRY(MOEC_NEW(w, 1, err));
    w->o = o;
    w->opt = *opt;
    w->place.lock = -1;
    MOEC_TRY(MOEC_NEW(w->shard, o->n_shards, err));
    for (size_t i = 0; i < o->n_shards; i++)
        w->shard[i].fd = -1;
    MOEC_TRY(MOEC_NEW(w->file, o->n_shards + o->n_files, err));
    MOEC_TRY(identity(&id, o, opt->identity, err));
    snprintf(mark, sizeof mark, "%s\n", id.hex);
    /* beside the bytes themselves: the unused end of each file's last block, folder, manifest */
    uint64_t need = moec_out_total(o) + (o->n_shards + o->n_files + 2) * 8192 + (1 << 20);
    MOEC_TRY(moec_place_take(&w->place, opt, mark, need, is_complete, o, err));
    *out = w;
    w = NULL;
done:
    moec_writer_close(w);
    return st;
}

moec_status moec_writer_run(moec_writer *w, moec_err *err)
{
    moec_status st = MOEC_OK;
    MOEC_TRY(write_shards(w, err));
    for (size_t i = 0; i < w->o->n_files; i++)
        MOEC_TRY(write_file(w, &w->o->file[i], err));
    MOEC_TRY(moec_dir_sync(w->place.partial, err));
done:
    if (atomic_load(&w->wrong))
        moec_writer_discard(w); /* or the next run would take it up */
    return st;
}

const char *moec_writer_dir(const moec_writer *w)
{
    return w->place.partial;
}

size_t moec_writer_files(const moec_writer *w)
{
    return w->n_files;
}

const char *moec_writer_file(uint64_t *bytes, moec_digest *hash, const moec_writer *w, size_t i)
{
    *bytes = w->file[i].bytes;
    *hash = w->file[i].hash;
    return w->file[i].name;
}

moec_status moec_writer_add(moec_writer *w, const char *name, const char *bytes, size_t len, moec_err *err)
{
    char *path;
    moec_status st = moec_path_join(&path, w->place.partial, name, err);
    if (st == MOEC_OK)
        st = moec_file_write(path, bytes, len, err);
    moec_free(path);
    return st;
}

moec_status moec_writer_publish(moec_writer *w, moec_err *err)
{
    return moec_place_publish(&w->place, w->opt.magic ? moec_out_shard_name(w->o, 0) : NULL, err);
}

void moec_writer_discard(moec_writer *w)
{
    moec_err why = {MOEC_OK, ""};
    if (moec_dir_remove(w->place.partial, &why) != MOEC_OK)
        moec_warn("%s: could not be removed: %s", w->place.partial, why.text);
}

void moec_writer_close(moec_writer *w)
{
    if (!w)
        return;
    for (size_t i = 0; w->shard && i < w->o->n_shards; i++) {
        shard_state *s = &w->shard[i];
        close_shard(s);
        if (s->has_mutex)
            mtx_destroy(&s->copying);
        moec_hash_free(s->hash);
        moec_free(s->journal);
        moec_free(s->tmp);
        moec_free(s->path);
    }
    moec_free(w->shard);
    moec_free(w->piece);
    moec_free(w->file);
    moec_place_release(&w->place);
    moec_free(w);
}
