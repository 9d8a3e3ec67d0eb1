/* See pass.h. */
#include "calib/pass.h"

#include "base/mem.h"
#include "base/opt.h"
#include "base/par.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int64_t moec_pass_chunk_tokens(int64_t n_tokens, int64_t max_seq)
{
    int64_t c = n_tokens / 8;
    c = c < 512 ? 512 : c > 4096 ? 4096 : c;
    return c < max_seq ? max_seq : c;
}

int64_t moec_pass_max_seq(const moec_corpus *corpus)
{
    int64_t most = 0;
    for (int d = 0; d < corpus->n_domains; d++)
        for (int64_t w = 0; w < corpus->domain[d].n_windows; w++) {
            int64_t n = corpus->domain[d].start[w + 1] - corpus->domain[d].start[w];
            most = n > most ? n : most;
        }
    return most;
}

static moec_status cut_chunks(moec_pass *p, const moec_corpus *corpus, moec_err *err)
{
    moec_status st = MOEC_OK;
    int64_t windows = 0;
    for (int d = 0; d < corpus->n_domains; d++) {
        const moec_domain *dom = &corpus->domain[d];
        windows += dom->n_windows;
        p->n_tokens += dom->start[dom->n_windows] - dom->start[0];
    }
    p->max_seq = moec_pass_max_seq(corpus);
    int64_t target = moec_pass_chunk_tokens(p->n_tokens, p->max_seq), token = 0;
    MOEC_TRY(MOEC_NEW(p->chunk, (size_t)windows, err));
    MOEC_TRY(MOEC_NEW(p->seq, (size_t)windows * 2, err)); /* at worst one window a chunk, with two offsets */
    int64_t *seq = p->seq;
    for (int d = 0; d < corpus->n_domains; d++) {
        const moec_domain *dom = &corpus->domain[d];
        for (int64_t w = 0; w < dom->n_windows;) {
            moec_chunk *c = &p->chunk[p->n_chunks++];
            *c = (moec_chunk){.domain = d, .token = token, .seq = seq, .ids = dom->ids + dom->start[w]};
            int64_t w0 = w;
            *seq++ = 0;
            do {
                *seq++ = dom->start[++w] - dom->start[w0];
                c->n_seq++;
            } while (w < dom->n_windows && dom->start[w + 1] - dom->start[w0] <= target);
            c->n = dom->start[w] - dom->start[w0];
            token += c->n;
            p->max_tokens = c->n > p->max_tokens ? c->n : p->max_tokens;
        }
    }
done:
    return st;
}

/* Weights that are resident while a layer runs. */
static uint64_t layer_memory(const moec_model *m, bool lean, int workers)
{
    uint64_t most = 0;
    for (int64_t i = 0; i < m->dims.layers; i++) {
        uint64_t bytes = moec_layer_bytes(m, i);
        const moec_layer *l = &m->layer[i];
        if (lean && l->expert) {
            uint64_t one = l->expert[0].gate->bytes + l->expert[0].up->bytes + l->expert[0].down->bytes;
            bytes = bytes - one * (uint64_t)m->dims.experts + one * (uint64_t)workers;
        }
        most = bytes > most ? bytes : most;
    }
    return most;
}

static uint64_t arrangement(const moec_model *m, int64_t n_tokens, int64_t max_seq, int64_t max_tokens,
                            const moec_pass_opts *o, const moec_pass_plan *a, uint64_t resident)
{
    moec_forward_opts fo = {o->compute, a->workers, max_tokens, max_seq, o->watch, o->sums, a->lean};
    uint64_t own = moec_forward_bytes(m, &fo) + o->fixed_bytes + o->worker_bytes * (uint64_t)a->workers;
    uint64_t states = moec_hidden_bytes(n_tokens, m->dims.hidden, a->on_disk, a->workers, max_tokens);
    own += states;
    /* 12 MiB a worker: OpenBLAS's and the C library's own buffers and stacks */
    own += layer_memory(m, a->lean, a->workers) + (uint64_t)a->workers * (12u << 20) + (4u << 20);
    uint64_t later = o->after_bytes ? o->after_bytes + states : 0;
    return resident + (own > later ? own : later);
}

moec_status moec_pass_estimate(moec_pass_plan *out, const moec_model *m, int64_t n_tokens, int64_t max_seq,
                               const moec_pass_opts *o, moec_err *err)
{
    uint64_t resident = moec_resident_memory(), spare = moec_available_memory();
    int64_t max_tokens = moec_pass_chunk_tokens(n_tokens, max_seq);
    int64_t chunks = (n_tokens + max_tokens - 1) / max_tokens;
    int threads = moec_par_threads() < chunks ? moec_par_threads() : (int)chunks;
    threads = threads < 1 ? 1 : threads;
    uint64_t limit = o->max_memory ? o->max_memory : spare ? resident + spare / 10 * 9 : UINT64_MAX;
    moec_pass_plan a = {.limit = limit}, best = {.bytes = UINT64_MAX};
    /* From fast to frugal: disk for the hidden states costs little, giving pages back costs re-reading, threads cost most. */
    for (a.workers = threads; a.workers >= 1; a.workers = a.workers > 1 ? (a.workers + 1) / 2 : 0)
        for (int way = 0; way < 4; way++) {
            a.on_disk = way == 1 || way == 3;
            a.lean = way >= 2;
            a.bytes = arrangement(m, n_tokens, max_seq, max_tokens, o, &a, resident);
            if (a.bytes <= limit) {
                *out = a;
                return MOEC_OK;
            }
            if (a.bytes < best.bytes)
                best = a;
        }
    *out = best;
    out->limit = limit;
    if (!o->max_memory) /* an estimate against what happens to be free refuses nothing */
        return MOEC_OK;
    char have[32], need[32];
    return moec_fail(err, MOEC_ENOFIT, "--max-memory %s is too little: %s is the least this run can do with",
                     moec_size_text(have, sizeof have, limit), moec_size_text(need, sizeof need, best.bytes));
}

moec_status moec_pass_new(moec_pass **out, const moec_model *m, const moec_corpus *corpus, const moec_pass_opts *o,
                          moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_pass *p = NULL;
    *out = NULL;
    MOEC_TRY(MOEC_NEW(p, 1, err));
    p->m = m;
    p->o = *o;
    MOEC_TRY(cut_chunks(p, corpus, err));
    MOEC_TRY(moec_pass_estimate(&p->plan, m, p->n_tokens, p->max_seq, o, err));
    const char *tmp = getenv("TMPDIR"), *dir = o->dir ? o->dir : tmp && *tmp ? tmp : "/tmp";
    moec_note("%d threads, hidden states %s%s, about %.2f GiB of memory", p->plan.workers,
              p->plan.on_disk ? "on disk" : "in memory", p->plan.lean ? ", experts given back after use" : "",
              (double)p->plan.bytes / 0x1p30);
    MOEC_TRY(moec_hidden_new(&p->hidden, p->n_tokens, m->dims.hidden, p->plan.on_disk ? dir : NULL, o->keep && o->dir,
                             p->plan.workers, p->max_tokens, err));
    moec_forward_opts fo = {o->compute, p->plan.workers, p->max_tokens, p->max_seq, o->watch, o->sums, p->plan.lean};
    MOEC_TRY(moec_forward_new(&p->forward, m, &fo, err));
    *out = p;
    p = NULL;
done:
    moec_pass_free(p);
    return st;
}

void moec_pass_free(moec_pass *p)
{
    if (!p)
        return;
    moec_progress_stop(&p->progress);
    moec_forward_free(p->forward);
    moec_hidden_free(p->hidden);
    moec_free(p->chunk);
    moec_free(p->seq);
    moec_free(p);
}

void moec_pass_begin(moec_pass *p, int64_t first_layer)
{
    uint64_t n = (uint64_t)p->n_tokens;
    moec_progress_start(&p->progress, p->o.what, "token-layers", n * (uint64_t)p->m->dims.layers,
                        n * (uint64_t)first_layer);
}

void moec_pass_end(moec_pass *p)
{
    moec_progress_finish(&p->progress);
}

typedef struct job {
    moec_pass *p;
    int64_t layer;
    moec_see_fn *see;
    moec_sum_fn *sum;
    void *ctx;
    const moec_chunk *now; /* of one call */
} job;

static moec_status embed_chunk(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_pass *p = ((job *)ctx)->p;
    for (int64_t i = lo; i < hi; i++) {
        const moec_chunk *c = &p->chunk[i];
        float *h;
        MOEC_TRY(moec_interrupted(err));
        MOEC_TRY(moec_hidden_get(&h, p->hidden, worker, c->token, c->n, true, err));
        MOEC_TRY(moec_forward_embed(h, p->m, c->ids, c->n, err));
        MOEC_TRY(moec_hidden_put(p->hidden, worker, c->token, c->n, err));
    }
done:
    return st;
}

static moec_status limit_workers(moec_pass *p, moec_range_fn *fn, moec_range_fn *sum, job *j, moec_err *err)
{
    /* The planner may have decided for fewer threads than there are; scratch exists for that many only. */
    int threads = moec_par_threads();
    moec_par_set_threads(p->plan.workers);
    moec_status st = sum ? moec_par_ordered(p->n_chunks, 1, fn, sum, j, err) : moec_par_for(p->n_chunks, 1, fn, j, err);
    moec_par_set_threads(threads);
    return st;
}

moec_status moec_pass_embed(moec_pass *p, moec_err *err)
{
    job j = {.p = p};
    moec_status st = limit_workers(p, embed_chunk, NULL, &j, err);
    if (st == MOEC_OK)
        moec_hidden_turn(p->hidden);
    return st;
}

static moec_status see_view(void *ctx, int worker, const moec_moe_view *v, moec_err *err)
{
    const job *j = ctx;
    return j->see(j->ctx, worker, j->now, v, err);
}

static moec_status run_chunk(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    moec_status st = MOEC_OK;
    job j = *(const job *)ctx;
    moec_pass *p = j.p;
    for (int64_t i = lo; i < hi; i++) {
        float *h;
        j.now = &p->chunk[i];
        MOEC_TRY(moec_interrupted(err));
        MOEC_TRY(moec_hidden_get(&h, p->hidden, worker, j.now->token, j.now->n, false, err));
        MOEC_TRY(moec_forward_chunk(p->forward, worker, h, j.now->seq, j.now->n_seq, j.see ? see_view : NULL, &j, err));
        MOEC_TRY(moec_hidden_put(p->hidden, worker, j.now->token, j.now->n, err));
        moec_progress_step(&p->progress, (uint64_t)j.now->n);
    }
done:
    return st;
}

static moec_status sum_chunk(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const job *j = ctx;
    moec_status st = MOEC_OK;
    for (int64_t i = lo; i < hi && st == MOEC_OK; i++)
        st = j->sum(j->ctx, worker, &j->p->chunk[i], err);
    return st;
}

typedef struct ahead {
    const moec_model *m;
    int64_t layer;
} ahead;

static void prefetch_one(void *ctx, const moec_model *m, const moec_tensor *t)
{
    (void)ctx;
    (void)m;
    moec_pages_prefetch(t->data, t->bytes);
}

/* On a thread of its own: asking for more than the disk's queue holds blocks the asker. */
static void *prefetch_layer(void *ctx)
{
    const ahead *a = ctx;
    moec_layer_each(a->m, a->layer, prefetch_one, NULL);
    return NULL;
}

static void drop_one(void *ctx, const moec_model *m, const moec_tensor *t)
{
    (void)ctx;
    (void)m;
    moec_pages_drop(t->data, t->bytes);
}

moec_status moec_pass_layer(moec_pass *p, int64_t layer, moec_see_fn *see, moec_sum_fn *sum, void *ctx, moec_err *err)
{
    job j = {.p = p, .layer = layer, .see = see, .sum = sum, .ctx = ctx};
    bool moe = p->m->layer[layer].router != NULL;
    ahead next = {p->m, layer + 1};
    pthread_t thread;
    bool started = layer + 1 < p->m->dims.layers && pthread_create(&thread, NULL, prefetch_layer, &next) == 0;
    moec_status st = moec_forward_layer(p->forward, layer, err);
    if (st == MOEC_OK)
        st = limit_workers(p, run_chunk, sum && moe ? sum_chunk : NULL, &j, err);
    if (started)
        pthread_join(thread, NULL);
    moec_layer_each(p->m, layer, drop_one, NULL);
    if (st == MOEC_OK)
        moec_hidden_turn(p->hidden);
    return st;
}
