/* From final hidden states to losses: logits by blocks of tokens and of the vocabulary, sums by window. */
#include "calib/eval.h"

#include "base/mem.h"
#include "base/par.h"
#include "calib/final.h"
#include "num/vec.h"

#include <math.h>
#include <string.h>

enum { TOKENS = 256, VOCAB = 1024, PANELS = TOKENS / MOEC_PANEL };

/* One side's memory of one worker. */
typedef struct side {
    float *rows, *panels, *logits;
    void *gemm;
    moec_lse lse[PANELS];
} side;

typedef struct worker {
    side model, base;
} worker;

typedef struct run {
    const moec_final *model, *base;
    const moec_corpus *corpus;
    moec_compute compute;
    bool lean;            /* give the heads' pages back after each block */
    const int32_t *next;  /* [tokens] id that follows, -1 at the end of a window */
    float *nll, *kl;      /* [tokens] */
    unsigned char *same;  /* [tokens] */
    worker *w;
    moec_progress progress;
} run;

static moec_status side_new(side *s, const moec_final *f, moec_compute compute, moec_err *err)
{
    moec_status st = MOEC_OK;
    size_t n = TOKENS * (size_t)f->hidden;
    MOEC_TRY(MOEC_NEW(s->rows, n, err));
    MOEC_TRY(MOEC_NEW(s->panels, n, err));
    MOEC_TRY(MOEC_NEW(s->logits, (size_t)TOKENS * VOCAB, err));
    MOEC_TRY(moec_alloc(&s->gemm, moec_gemm_scratch_bytes(compute, TOKENS, f->hidden), 1, err));
done:
    return st;
}

static size_t side_bytes(int64_t hidden, moec_compute compute)
{
    return TOKENS * (2 * (size_t)hidden + VOCAB) * sizeof(float) + moec_gemm_scratch_bytes(compute, TOKENS, hidden);
}

size_t moec__score_bytes(int64_t hidden, int64_t n_tokens, moec_compute compute)
{
    size_t token = sizeof(int32_t) + 2 * sizeof(float) + 1; /* next, nll, kl, same */
    return 2 * side_bytes(hidden, compute) + (size_t)n_tokens * token;
}

static void side_free(side *s)
{
    moec_free(s->rows);
    moec_free(s->panels);
    moec_free(s->logits);
    moec_free(s->gemm);
}

static moec_status load_rows(side *s, const moec_final *f, int64_t at, int64_t n, moec_err *err)
{
    moec_status st = moec__final_rows(s->rows, f, at, n, err);
    if (st != MOEC_OK)
        return st;
    moec_panel_pack(s->panels, s->rows, f->hidden, NULL, n, f->hidden);
    for (int p = 0; p < PANELS; p++)
        moec_lse_start(&s->lse[p]);
    return MOEC_OK;
}

static uint64_t head_bytes(const moec_final *f)
{
    return f ? moec_weight_bytes(&f->head) : 0;
}

/* Logits of ids first .. first + rows - 1, for the block of tokens whose panels are loaded. */
static moec_status logits(side *s, const moec_final *f, int64_t n, int64_t first, int64_t rows, const run *r, moec_err *err)
{
    moec_weight w = f->head;
    w.at += first * w.row_step;
    w.rows = rows;
    moec_status st = moec_gemm_weight(s->logits, s->panels, n, &w, r->compute, s->gemm, err);
    for (int64_t p = 0; f->bias && p < moec_panels(n); p++)
        for (int64_t v = 0; v < rows; v++)
            for (int64_t lane = 0; lane < MOEC_PANEL; lane++)
                s->logits[(p * rows + v) * MOEC_PANEL + lane] += f->bias[first + v];
    if (r->lean)
        moec_weight_drop(&w);
    return st;
}

static void add_block(run *r, worker *w, int64_t at, int64_t n, int64_t first, int64_t rows)
{
    for (int64_t p = 0; p < moec_panels(n); p++) {
        const float *z = w->model.logits + p * rows * MOEC_PANEL;
        moec_lse_add(&w->model.lse[p], z, NULL, rows, (int32_t)first);
        if (r->base)
            moec_lse_add(&w->base.lse[p], w->base.logits + p * rows * MOEC_PANEL, z, rows, (int32_t)first);
        for (int64_t i = 0; i < MOEC_PANEL && p * MOEC_PANEL + i < n; i++) {
            int64_t t = at + p * MOEC_PANEL + i, next = r->next[t];
            if (next >= first && next < first + rows)
                r->nll[t] = z[(next - first) * MOEC_PANEL + i]; /* the logit for now */
        }
    }
}

static double log_sum(const moec_lse *l, int64_t lane)
{
    return l->max[lane] + log(l->sum[lane]);
}

static moec_status score_block(void *ctx, int wi, int64_t lo, int64_t hi, moec_err *err)
{
    moec_status st = MOEC_OK;
    run *r = ctx;
    worker *w = &r->w[wi];
    int64_t n = hi - lo;
    MOEC_TRY(moec_interrupted(err));
    MOEC_TRY(load_rows(&w->model, r->model, lo, n, err));
    if (r->base)
        MOEC_TRY(load_rows(&w->base, r->base, lo, n, err));
    for (int64_t v = 0; v < r->model->vocab; v += VOCAB) {
        int64_t rows = r->model->vocab - v < VOCAB ? r->model->vocab - v : VOCAB;
        MOEC_TRY(logits(&w->model, r->model, n, v, rows, r, err));
        if (r->base)
            MOEC_TRY(logits(&w->base, r->base, n, v, rows, r, err));
        add_block(r, w, lo, n, v, rows);
    }
    for (int64_t i = 0; i < n; i++) {
        const moec_lse *m = &w->model.lse[i / MOEC_PANEL], *b = &w->base.lse[i / MOEC_PANEL];
        int64_t lane = i % MOEC_PANEL, t = lo + i;
        if (r->next[t] < 0)
            continue;
        r->nll[t] = (float)(log_sum(m, lane) - (double)r->nll[t]);
        if (r->base) {
            r->kl[t] = (float)(b->cross[lane] / b->sum[lane] - log_sum(b, lane) + log_sum(m, lane));
            r->same[t] = b->top_id[lane] == m->top_id[lane];
        }
    }
    moec_progress_step(&r->progress, (uint64_t)n);
done:
    return st;
}

/* Means and the ratio estimator's standard errors of one span of windows. */
typedef struct tally {
    double n, sum[3];
    double nn, sn[3], ss[3]; /* sums over windows of n^2, S n, S^2 */
    int64_t windows;
} tally;

static void tally_window(tally *a, const run *r, int64_t at, int64_t length)
{
    double s[3] = {0, 0, 0}, n = (double)(length - 1);
    for (int64_t t = at; t < at + length - 1; t++) {
        s[0] += (double)r->nll[t];
        s[1] += r->base ? (double)r->kl[t] : 0.0;
        s[2] += r->base ? (double)r->same[t] : 0.0;
    }
    a->n += n;
    a->nn += n * n;
    a->windows++;
    for (int i = 0; i < 3; i++) {
        a->sum[i] += s[i];
        a->sn[i] += s[i] * n;
        a->ss[i] += s[i] * s[i];
    }
}

static void tally_join(tally *into, const tally *from)
{
    into->n += from->n;
    into->nn += from->nn;
    into->windows += from->windows;
    for (int i = 0; i < 3; i++) {
        into->sum[i] += from->sum[i];
        into->sn[i] += from->sn[i];
        into->ss[i] += from->ss[i];
    }
}

static moec_score_sum finish(const tally *a)
{
    double mean[3], se[3];
    for (int i = 0; i < 3; i++) {
        mean[i] = a->n > 0 ? a->sum[i] / a->n : 0.0;
        double square = a->ss[i] - 2.0 * mean[i] * a->sn[i] + mean[i] * mean[i] * a->nn, w = (double)a->windows;
        se[i] = a->windows > 1 && square > 0 ? sqrt(w / (w - 1.0) * square) / a->n : 0.0;
    }
    return (moec_score_sum){.tokens = (uint64_t)a->n, .cross_entropy = mean[0], .kl = mean[1], .top1 = mean[2],
                            .cross_entropy_se = se[0], .kl_se = se[1], .top1_se = se[2]};
}

static moec_status add_up(moec_scores *out, const run *r, moec_err *err)
{
    moec_status st = MOEC_NEW(out->domain, (size_t)r->corpus->n_domains, err);
    if (st != MOEC_OK)
        return st;
    out->has_base = r->base != NULL;
    tally all = {0};
    int64_t at = 0;
    for (int d = 0; d < r->corpus->n_domains; d++) {
        const moec_domain *dom = &r->corpus->domain[d];
        tally mine = {0};
        for (int64_t w = 0; w < dom->n_windows; w++) {
            int64_t length = dom->start[w + 1] - dom->start[w];
            tally_window(&mine, r, at, length);
            at += length;
        }
        out->domain[d] = finish(&mine);
        if (!isfinite(out->domain[d].cross_entropy) || !isfinite(out->domain[d].kl)) /* finite states, overflowing logits */
            return moec_fail(err, MOEC_ENUMERIC, "text %s: the loss is not finite", dom->name);
        tally_join(&all, &mine);
    }
    out->overall = finish(&all);
    return MOEC_OK;
}

static moec_status list_next(int32_t **out, const moec_corpus *c, int64_t tokens, moec_err *err)
{
    moec_status st = MOEC_NEW(*out, (size_t)tokens, err);
    int64_t at = 0;
    for (int d = 0; st == MOEC_OK && d < c->n_domains; d++) {
        const moec_domain *dom = &c->domain[d];
        for (int64_t w = 0; w < dom->n_windows; w++)
            for (int64_t t = dom->start[w]; t < dom->start[w + 1]; t++)
                (*out)[at++] = t + 1 < dom->start[w + 1] ? dom->ids[t + 1] : -1;
    }
    return st;
}

/* Threads and page policy under a limit: fewer threads cost time, giving pages back costs re-reading the heads. */
static int choose(run *r, uint64_t max_memory)
{
    int workers = moec_par_threads();
    uint64_t heads = head_bytes(r->model) + head_bytes(r->base), limit = max_memory / 10 * 9;
    uint64_t used = moec_resident_memory() + moec__score_bytes(0, r->model->tokens, r->compute);
    uint64_t each = 1 << 20; /* stacks and the C library's own */
    const moec_final *const both[] = {r->model, r->base};
    for (int i = 0; i < 2 && both[i]; i++)
        each += side_bytes(both[i]->hidden, r->compute) + 2 * VOCAB * (head_bytes(both[i]) / (uint64_t)both[i]->vocab);
    if (max_memory == 0)
        return workers;
    r->lean = used + heads + each * (uint64_t)workers > limit;
    while (r->lean && workers > 1 && used + each * (uint64_t)workers > limit)
        workers--;
    return workers;
}

moec_status moec_score(moec_scores *out, const moec_final *model, const moec_final *base, const moec_corpus *corpus,
                       moec_compute compute, uint64_t max_memory, moec_err *err)
{
    moec_status st = MOEC_OK;
    run r = {.model = model, .base = base, .corpus = corpus, .compute = compute};
    int32_t *next = NULL;
    int threads = moec_par_threads(), workers = choose(&r, max_memory);
    memset(out, 0, sizeof *out);
    if (base && base->vocab != model->vocab)
        return moec_fail(err, MOEC_EFORMAT, "vocabularies differ: %lld ids, the base model has %lld",
                         (long long)model->vocab, (long long)base->vocab);
    size_t n = (size_t)model->tokens;
    MOEC_TRY(list_next(&next, corpus, model->tokens, err));
    r.next = next;
    MOEC_TRY(MOEC_NEW(r.nll, n, err));
    MOEC_TRY(MOEC_NEW(r.kl, base ? n : 0, err));
    MOEC_TRY(MOEC_NEW(r.same, base ? n : 0, err));
    MOEC_TRY(MOEC_NEW(r.w, (size_t)workers, err));
    for (int i = 0; i < workers; i++) {
        MOEC_TRY(side_new(&r.w[i].model, model, compute, err));
        if (base)
            MOEC_TRY(side_new(&r.w[i].base, base, compute, err));
    }
    if (!model->quiet)
        moec_progress_start(&r.progress, "score", "tokens", n, 0);
    moec_par_set_threads(workers); /* scratch exists for that many only */
    st = moec_par_for(model->tokens, TOKENS, score_block, &r, err);
    moec_par_set_threads(threads);
    MOEC_TRY(st);
    moec_progress_finish(&r.progress);
    MOEC_TRY(add_up(out, &r, err));
done:
    moec_progress_stop(&r.progress);
    if (st != MOEC_OK)
        moec_scores_release(out);
    for (int i = 0; r.w && i < workers; i++) {
        side_free(&r.w[i].model);
        side_free(&r.w[i].base);
    }
    moec_free(r.w);
    moec_free(r.nll);
    moec_free(r.kl);
    moec_free(r.same);
    moec_free(next);
    return st;
}

void moec_scores_release(moec_scores *s)
{
    moec_free(s->domain);
    memset(s, 0, sizeof *s);
}

static moec_json *sum_json(const moec_score_sum *s, bool has_base)
{
    moec_json *o = moec_json_new_object();
    moec_json_set(o, "cross_entropy", moec_json_new_real(s->cross_entropy));
    moec_json_set(o, "perplexity", moec_json_new_real(exp(s->cross_entropy)));
    moec_json_set(o, "tokens", moec_json_new_int((int64_t)s->tokens));
    moec_json_set(o, "stderr", moec_json_new_real(s->cross_entropy_se));
    if (has_base) {
        moec_json_set(o, "kl", moec_json_new_real(s->kl));
        moec_json_set(o, "kl_stderr", moec_json_new_real(s->kl_se));
        moec_json_set(o, "top1", moec_json_new_real(s->top1));
        moec_json_set(o, "top1_stderr", moec_json_new_real(s->top1_se));
    }
    return o;
}

moec_json *moec_scores_json(const moec_scores *s, const moec_corpus *corpus)
{
    moec_json *o = moec_json_new_object(), *domains = moec_json_new_object();
    moec_json_set(o, "overall", sum_json(&s->overall, s->has_base));
    for (int d = 0; d < corpus->n_domains; d++)
        moec_json_set(domains, corpus->domain[d].name, sum_json(&s->domain[d], s->has_base));
    moec_json_set(o, "domains", domains);
    return o;
}
