/* See pass.h. */
#include "calib/pass.h"

#include "base/file.h"
#include "base/mem.h"
#include "base/opt.h"
#include "base/par.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    EACH = 512,              /* tokens an expert of a heavy layer should get from a chunk, on average */
    TILES = 1 << 20,         /* values of an expert's matrix above which its products keep many threads busy */
};
static const double HEAVY = 0x1p30;      /* values of a layer's experts from which reading them again and again costs */
static const int64_t WIDEST = 1LL << 29; /* bytes of one [tokens, H] array */

int64_t moec_pass_chunk_tokens(const moec_dims *d, int64_t n_tokens, int64_t max_seq)
{
    int64_t c = n_tokens / 8;
    c = c < 512 ? 512 : c > 4096 ? 4096 : c;
    if (d->experts > 0 && 3.0 * (double)d->experts * (double)d->hidden * (double)d->expert_width >= HEAVY) {
        int64_t much = EACH * d->experts / (d->top_k > 0 ? d->top_k : 1), most = WIDEST / (d->hidden * (int64_t)sizeof(float));
        much = much > most ? most : much;
        much = much > n_tokens ? n_tokens : much;
        c = c < much ? much : c;
    }
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
    int64_t target = moec_pass_chunk_tokens(&p->m->dims, p->n_tokens, p->max_seq), token = 0;
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
            uint64_t all = 0, one = 0;
            for (int64_t e = 0; e < m->dims.experts; e++) {
                uint64_t b = moec_expert_bytes(l, e);
                all += b;
                one = b > one ? b : one;
            }
            /* biases and shared scales may make the shares uneven, never more than the layer has */
            bytes = (bytes > all ? bytes - all : 0) + one * (uint64_t)workers;
        }
        most = bytes > most ? bytes : most;
    }
    return most;
}

typedef struct work {
    const moec_model *m;
    const moec_pass_opts *o;
    int64_t n_tokens, max_seq, max_tokens;
    uint64_t resident;
} work;

static moec_forward_opts forward_opts(const work *w, const moec_pass_plan *a)
{
    return (moec_forward_opts){w->o->compute, a->workers, w->max_tokens, w->max_seq, w->o->watch, w->o->sums, a->lean,
                               a->threads / a->workers};
}

static uint64_t arrangement(const work *w, const moec_pass_plan *a)
{
    const moec_pass_opts *o = w->o;
    moec_forward_opts fo = forward_opts(w, a);
    uint64_t own = moec_forward_bytes(w->m, &fo) + o->fixed_bytes + o->worker_bytes * (uint64_t)a->workers;
    if (o->look)
        own += (uint64_t)a->workers * (uint64_t)(w->max_tokens * (w->m->dims.hidden + w->m->dims.carried)) * sizeof(float);
    uint64_t states = moec_hidden_bytes(w->n_tokens, w->m->dims.hidden, w->m->dims.carried, a->on_disk, a->workers,
                                        w->max_tokens);
    own += states;
    /* 12 MiB a thread: OpenBLAS's and the C library's own buffers and stacks */
    own += layer_memory(w->m, a->lean, a->workers) + (uint64_t)a->threads * (12u << 20) + (4u << 20);
    uint64_t later = o->after_bytes ? o->after_bytes + states : 0;
    return w->resident + (own > later ? own : later);
}

/* Tries one number of workers and threads: in memory, with hidden states on disk, lean, both. */
static bool try_ways(moec_pass_plan *a, moec_pass_plan *least, const work *w, int workers, int threads, int from, int to)
{
    a->workers = workers;
    a->threads = threads;
    for (int way = from; way < to; way++) {
        a->on_disk = way == 1 || way == 3;
        a->lean = way >= 2;
        a->bytes = arrangement(w, a);
        if (a->bytes <= a->limit)
            return true;
        if (a->bytes < least->bytes)
            *least = *a;
    }
    return false;
}

/* From fast to frugal: disk for the hidden states costs little, giving pages back costs re-reading, threads cost most. Large
 * products share well among all threads, which spares the memory of all but one chunk and reads each expert once for all;
 * small ones do not, and there every thread has a chunk of its own while there is memory. */
static bool arrange(moec_pass_plan *a, moec_pass_plan *least, const work *w)
{
    const moec_dims *d = &w->m->dims;
    int64_t chunks = (w->n_tokens + w->max_tokens - 1) / w->max_tokens;
    int threads = moec_par_threads() < 1 ? 1 : moec_par_threads();
    int workers = threads < chunks ? threads : chunks < 1 ? 1 : (int)chunks;
    if (d->experts > 0 && (double)d->hidden * (double)d->expert_width >= TILES) {
        if (chunks >= 2 * (int64_t)threads && try_ways(a, least, w, workers, workers, 0, 2))
            return true;
    } else {
        for (; workers > 1; workers = (workers + 1) / 2)
            if (try_ways(a, least, w, workers, workers, 0, 4))
                return true;
    }
    for (; threads >= 1; threads = threads > 1 ? (threads + 1) / 2 : 0)
        if (try_ways(a, least, w, 1, threads, 0, 4))
            return true;
    return false;
}

moec_status moec_pass_estimate(moec_pass_plan *out, const moec_model *m, int64_t n_tokens, int64_t max_seq,
                               const moec_pass_opts *o, moec_err *err)
{
    uint64_t spare = moec_available_memory();
    work w = {m, o, n_tokens, max_seq, moec_pass_chunk_tokens(&m->dims, n_tokens, max_seq), moec_resident_memory()};
    uint64_t limit = o->max_memory ? o->max_memory : spare ? w.resident + spare / 10 * 9 : UINT64_MAX;
    moec_pass_plan a = {.limit = limit}, least = {.bytes = UINT64_MAX};
    if (arrange(&a, &least, &w)) {
        *out = a;
        return MOEC_OK;
    }
    *out = least;
    out->limit = limit;
    if (!o->max_memory) /* an estimate against what happens to be free refuses nothing */
        return MOEC_OK;
    char have[32], need[32];
    return moec_fail(err, MOEC_ENOFIT, "--max-memory %s is too little: %s is the least this run can do with",
                     moec_size_text(have, sizeof have, limit), moec_size_text_up(need, sizeof need, least.bytes));
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
    const char *dir = o->dir ? o->dir : moec_scratch_dir();
    moec_note("%d threads, %d chunks at a time of %lld in all, hidden states %s%s, about %.2f GiB of memory", p->plan.threads,
              p->plan.workers, (long long)p->n_chunks,
              p->plan.on_disk ? "on disk" : "in memory", p->plan.lean ? ", experts given back after use" : "",
              (double)p->plan.bytes / 0x1p30);
    MOEC_TRY(moec_hidden_new(&p->hidden, p->n_tokens, m->dims.hidden, m->dims.carried, p->plan.on_disk ? dir : NULL,
                             o->keep && o->dir, p->plan.workers, p->max_tokens, err));
    work w = {m, o, p->n_tokens, p->max_seq, p->max_tokens, 0};
    moec_forward_opts fo = forward_opts(&w, &p->plan);
    MOEC_TRY(moec_forward_new(&p->forward, m, &fo, err));
    if (o->look)
        MOEC_TRY(MOEC_NEW(p->look, (size_t)p->plan.workers, err));
    for (int i = 0; o->look && i < p->plan.workers; i++)
        MOEC_TRY(MOEC_NEW(p->look[i], (size_t)p->max_tokens * (size_t)(m->dims.hidden + m->dims.carried), err));
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
    for (int i = 0; p->look && i < p->plan.workers; i++)
        moec_free(p->look[i]);
    moec_free(p->look);
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
    bool look;             /* states stay as they are */
    moec_take_fn *take;    /* NULL: inputs are not shown */
    bool mix_only;
    moec_hidden *const *states; /* NULL: the pass's own */
    int n_states;
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

/* One chunk after the other, all threads inside it. */
static moec_status in_turn(int64_t n, moec_range_fn *fn, moec_range_fn *sum, job *j, moec_err *err)
{
    moec_status st = MOEC_OK;
    for (int64_t i = 0; i < n && st == MOEC_OK; i++) {
        st = fn(j, 0, i, i + 1, err);
        if (st == MOEC_OK && sum)
            st = sum(j, 0, i, i + 1, err);
    }
    return st;
}

static moec_status limit_workers(moec_pass *p, moec_range_fn *fn, moec_range_fn *sum, job *j, moec_err *err)
{
    /* The planner may have decided for fewer threads than there are; scratch exists for that many only. */
    const int64_t n = p->n_chunks * (j->states ? j->n_states : 1);
    int threads = moec_par_threads();
    moec_par_set_threads(p->plan.threads);
    moec_status st = p->plan.workers == 1 ? in_turn(n, fn, sum, j, err)
                     : sum                ? moec_par_ordered(n, 1, fn, sum, j, err)
                                          : moec_par_for(n, 1, fn, j, err);
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

static moec_status take_inputs(void *ctx, int worker, moec_mat which, const float *panels, int64_t at, int64_t n, int64_t cols,
                               moec_err *err)
{
    const job *j = ctx;
    return j->take(j->ctx, worker, j->now, which, panels, at, n, cols, err);
}

/* On a copy, which is left behind. */
static moec_status look_chunk(job *j, int worker, const float *h, const float *beside, moec_err *err)
{
    const moec_dims *d = &j->p->m->dims;
    float *mine = j->p->look[worker], *carried = beside ? mine + j->now->n * d->hidden : NULL;
    memcpy(mine, h, (size_t)(j->now->n * d->hidden) * sizeof *mine);
    if (carried)
        memcpy(carried, beside, (size_t)(j->now->n * d->carried) * sizeof *carried);
    if (j->take)
        moec_forward_tap(j->p->forward, worker, take_inputs, j, j->mix_only);
    const moec_status st = moec_forward_chunk(j->p->forward, worker, mine, carried, j->now->seq, j->now->n_seq,
                                              j->see ? see_view : NULL, j, err);
    moec_forward_tap(j->p->forward, worker, NULL, NULL, false);
    return st;
}

static moec_status run_chunk(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    moec_status st = MOEC_OK;
    job j = *(const job *)ctx;
    moec_pass *p = j.p;
    for (int64_t i = lo; i < hi; i++) {
        moec_hidden *states = j.states ? j.states[i / p->n_chunks] : p->hidden;
        float *h;
        j.now = &p->chunk[i % p->n_chunks];
        MOEC_TRY(moec_interrupted(err));
        MOEC_TRY(moec_hidden_get(&h, states, worker, j.now->token, j.now->n, false, err));
        float *beside = moec_hidden_beside(states, worker, j.now->token);
        if (j.look) {
            MOEC_TRY(look_chunk(&j, worker, h, beside, err));
            continue;
        }
        if (j.take)
            moec_forward_tap(p->forward, worker, take_inputs, &j, false);
        st = moec_forward_chunk(p->forward, worker, h, beside, j.now->seq, j.now->n_seq, j.see ? see_view : NULL, &j, err);
        moec_forward_tap(p->forward, worker, NULL, NULL, false);
        MOEC_TRY(st);
        MOEC_TRY(moec_hidden_put(states, worker, j.now->token, j.now->n, err));
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
    bool lean;
} ahead;

static void prefetch_one(void *ctx, const moec_model *m, const moec_tensor *t)
{
    (void)ctx;
    (void)m;
    moec_pages_prefetch(t->data, t->bytes);
}

/* On a thread of its own: asking for more than the disk's queue holds blocks the asker. Where memory is short, so is the page
 * cache: experts that come a layer early would only push out what is wanted now. */
static void *prefetch_layer(void *ctx)
{
    const ahead *a = ctx;
    (a->lean ? moec_layer_each_common : moec_layer_each)(a->m, a->layer, prefetch_one, NULL);
    return NULL;
}

static void drop_one(void *ctx, const moec_model *m, const moec_tensor *t)
{
    (void)ctx;
    (void)m;
    moec_pages_drop(t->data, t->bytes);
}

moec_status moec_pass_look(moec_pass *p, int64_t layer, moec_see_fn *see, void *ctx, moec_err *err)
{
    return moec_pass_look_inputs(p, layer, see, NULL, false, ctx, err);
}

moec_status moec_pass_look_inputs(moec_pass *p, int64_t layer, moec_see_fn *see, moec_take_fn *take, bool mix_only, void *ctx,
                                  moec_err *err)
{
    job j = {.p = p, .layer = layer, .see = see, .ctx = ctx, .look = true, .take = take, .mix_only = mix_only};
    moec_status st = moec_forward_layer(p->forward, layer, err);
    return st == MOEC_OK ? limit_workers(p, run_chunk, NULL, &j, err) : st;
}

static moec_status go_on(job *j, bool sum, moec_err *err)
{
    moec_pass *p = j->p;
    ahead next = {p->m, j->layer + 1, p->plan.lean};
    pthread_t thread;
    bool started = j->layer + 1 < p->m->dims.layers && pthread_create(&thread, NULL, prefetch_layer, &next) == 0;
    moec_status st = moec_forward_layer(p->forward, j->layer, err);
    if (st == MOEC_OK)
        st = limit_workers(p, run_chunk, sum ? sum_chunk : NULL, j, err);
    if (started)
        pthread_join(thread, NULL);
    moec_layer_each(p->m, j->layer, drop_one, NULL);
    for (int i = 0; st == MOEC_OK && i < (j->states ? j->n_states : 1); i++)
        moec_hidden_turn(j->states ? j->states[i] : p->hidden);
    return st;
}

moec_status moec_pass_layer(moec_pass *p, int64_t layer, moec_see_fn *see, moec_sum_fn *sum, void *ctx, moec_err *err)
{
    job j = {.p = p, .layer = layer, .see = see, .sum = sum, .ctx = ctx};
    return go_on(&j, sum && p->m->layer[layer].expert, err);
}

moec_status moec_pass_layer_inputs(moec_pass *p, int64_t layer, moec_take_fn *take, moec_sum_fn *sum, void *ctx, moec_err *err)
{
    job j = {.p = p, .layer = layer, .take = take, .sum = sum, .ctx = ctx};
    return go_on(&j, sum != NULL, err);
}

moec_status moec_pass_layer_of(moec_pass *p, int64_t layer, moec_hidden *const *states, int n, moec_err *err)
{
    job j = {.p = p, .layer = layer, .states = states, .n_states = n};
    return go_on(&j, false, err);
}
