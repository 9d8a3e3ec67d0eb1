/* See imatrix.h. */
#include "run/imatrix.h"

#include "base/file.h"
#include "base/mem.h"
#include "ckpt/gguf_write.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { MATRICES = 3 };
static const char *const matrix_names[MATRICES] = {"gate", "up", "down"};

typedef struct job {
    const moec_stats *s;
    uint64_t windows, tokens;
    int64_t layers, experts;
} job;

static moec_stat kind_of(int matrix)
{
    return matrix == 2 ? MOEC_STAT_ACT_SQ : MOEC_STAT_XIN_SQ;
}

static int64_t width_of(const job *j, int matrix)
{
    return matrix == 2 ? j->s->meta.expert_width : j->s->meta.hidden;
}

/* What llama-quantize is told of an expert: mean squares and how many tokens they are of. `work`: [width]. */
static double expert_means(double *work, const job *j, int64_t layer, int matrix, int64_t e)
{
    const int64_t width = width_of(j, matrix);
    memset(work, 0, (size_t)width * sizeof *work);
    double n = moec_stats_add_expert(work, j->s, kind_of(matrix), layer, e, width);
    const double count = fmax(1, round(n));
    if (n <= 0 && matrix < 2) {
        memset(work, 0, (size_t)width * sizeof *work);
        for (int64_t k = 0; k < j->experts; k++)
            n += moec_stats_add_expert(work, j->s, kind_of(matrix), layer, k, width);
    }
    if (n <= 0)
        return 0;
    for (int64_t i = 0; i < width; i++)
        work[i] /= n;
    return count;
}

static moec_status check(job *j, moec_err *err)
{
    const moec_stat kinds[] = {MOEC_STAT_SELECTED, MOEC_STAT_XIN_SQ, MOEC_STAT_ACT_SQ};
    for (int d = 0; d < j->s->n_domains; d++) {
        for (size_t k = 0; k < MOEC_COUNT(kinds); k++)
            if (!moec_stat_at(j->s, d, kinds[k], 0))
                return moec_fail(err, MOEC_EINVAL, "the statistics have no %s, which an importance matrix is made of: "
                                 "calibrate with --tier 1", moec_stat_kinds[kinds[k]].name);
        if (moec_stats_weight(j->s, d) > 0) {
            j->windows += j->s->domain[d].sequences;
            j->tokens += j->s->domain[d].tokens;
        }
    }
    if (j->tokens == 0)
        return moec_fail(err, MOEC_EINVAL, "the statistics are of no tokens");
    if (j->windows == 0)
        j->windows = 1;
    if (j->windows > INT32_MAX)
        j->windows = INT32_MAX;
    return MOEC_OK;
}

/* "blk.3.ffn_up_exps.weight" */
static void entry_name(char out[64], const job *j, int64_t layer, int matrix)
{
    snprintf(out, 64, "blk.%lld.ffn_%s_exps.weight", (long long)j->s->meta.moe_layer[layer], matrix_names[matrix]);
}

/* --- GGUF ------------------------------------------------------------------------------------------------------------ */

/* Tensors in pairs: in_sum2 and counts of matrix m of layer l are 2 (3 l + m) and the next. A row is an expert. */
static moec_status make_rows(void *out, void *ctx, size_t t, int64_t lo, int64_t hi, moec_err *err)
{
    const job *j = ctx;
    const int matrix = (int)(t / 2 % MATRICES);
    const int64_t layer = (int64_t)(t / 2 / MATRICES), width = width_of(j, matrix);
    const bool counts = t % 2 == 1;
    float *to = out;
    double *work = NULL;
    moec_status st = MOEC_NEW(work, (size_t)width, err);
    if (st != MOEC_OK)
        return st;
    for (int64_t e = lo; e < hi; e++) {
        const double n = expert_means(work, j, layer, matrix, e);
        if (counts)
            *to++ = (float)n;
        for (int64_t i = 0; !counts && i < width; i++)
            *to++ = (float)((double)(float)n * work[i]);
    }
    moec_free(work);
    return MOEC_OK;
}

static moec_status put_names(moec_gguf_out *g, const job *j, moec_err *err)
{
    const char **name = NULL;
    moec_status st = MOEC_NEW(name, (size_t)j->s->n_domains, err);
    if (st != MOEC_OK)
        return st;
    for (int d = 0; d < j->s->n_domains; d++)
        name[d] = j->s->domain[d].name;
    moec_gguf_put_texts(g, "imatrix.datasets", name, (size_t)j->s->n_domains);
    moec_free(name);
    return MOEC_OK;
}

static moec_status write_gguf(const char *path, job *j, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_gguf_out *g = NULL;
    const uint64_t size = j->tokens / j->windows;
    MOEC_TRY(moec_gguf_out_new(&g, err));
    moec_gguf_put_text(g, "general.type", "imatrix");
    MOEC_TRY(put_names(g, j, err));
    moec_gguf_put_u32(g, "imatrix.chunk_count", (uint32_t)j->windows);
    moec_gguf_put_u32(g, "imatrix.chunk_size", size < 1 ? 1 : size > UINT32_MAX ? UINT32_MAX : (uint32_t)size);
    for (int64_t l = 0; l < j->layers; l++) {
        for (int m = 0; m < MATRICES; m++) {
            char name[64], full[80];
            const int64_t sums[2] = {width_of(j, m), j->experts}, counts[2] = {1, j->experts};
            entry_name(name, j, l, m);
            snprintf(full, sizeof full, "%s.in_sum2", name);
            moec_gguf_put_tensor(g, full, MOEC_GGML_F32, 2, sums);
            snprintf(full, sizeof full, "%s.counts", name);
            moec_gguf_put_tensor(g, full, MOEC_GGML_F32, 2, counts);
        }
    }
    MOEC_TRY(moec_gguf_out_close(g, 0, err));
    MOEC_TRY(moec_gguf_write(path, g, make_rows, j, err));
done:
    moec_gguf_out_free(g);
    return st;
}

/* --- DAT ------------------------------------------------------------------------------------------------------------- */

typedef struct text {
    char *at;
    size_t n, cap;
} text;

static moec_status put(text *b, const void *bytes, size_t n, moec_err *err)
{
    moec_status st = MOEC_GROW(b->at, b->cap, b->n + n, err);
    if (st == MOEC_OK && n > 0) {
        memcpy(b->at + b->n, bytes, n);
        b->n += n;
    }
    return st;
}

static moec_status put_int(text *b, uint64_t v, moec_err *err)
{
    const unsigned char bytes[4] = {(unsigned char)v, (unsigned char)(v >> 8), (unsigned char)(v >> 16),
                                    (unsigned char)(v >> 24)};
    return put(b, bytes, sizeof bytes, err);
}

static moec_status put_float(text *b, float v, moec_err *err)
{
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    return put_int(b, bits, err);
}

static moec_status put_entry(text *b, const job *j, int64_t layer, int matrix, double *work, moec_err *err)
{
    moec_status st = MOEC_OK;
    char name[64];
    const int64_t width = width_of(j, matrix);
    if (width > INT32_MAX / j->experts)
        return moec_fail(err, MOEC_EINVAL, "%lld experts of %lld values are too many for the old form of importance matrices",
                         (long long)j->experts, (long long)width);
    entry_name(name, j, layer, matrix);
    MOEC_TRY(put_int(b, strlen(name), err));
    MOEC_TRY(put(b, name, strlen(name), err));
    MOEC_TRY(put_int(b, j->windows, err));
    MOEC_TRY(put_int(b, (uint64_t)(width * j->experts), err));
    for (int64_t e = 0; e < j->experts; e++) {
        const bool known = expert_means(work, j, layer, matrix, e) > 0;
        for (int64_t i = 0; i < width; i++)
            MOEC_TRY(put_float(b, (float)((double)j->windows * (known ? work[i] : 1)), err));
    }
done:
    return st;
}

static moec_status write_dat(const char *path, const job *j, moec_err *err)
{
    moec_status st = MOEC_OK;
    text b = {0}, names = {0};
    double *work = NULL;
    const int64_t widest = j->s->meta.hidden > j->s->meta.expert_width ? j->s->meta.hidden : j->s->meta.expert_width;
    MOEC_TRY(MOEC_NEW(work, (size_t)widest, err));
    MOEC_TRY(put_int(&b, (uint64_t)j->layers * MATRICES, err));
    for (int64_t l = 0; l < j->layers; l++)
        for (int m = 0; m < MATRICES; m++)
            MOEC_TRY(put_entry(&b, j, l, m, work, err));
    for (int d = 0; d < j->s->n_domains; d++) {
        if (d > 0)
            MOEC_TRY(put(&names, ",", 1, err));
        MOEC_TRY(put(&names, j->s->domain[d].name, strlen(j->s->domain[d].name), err));
    }
    MOEC_TRY(put_int(&b, j->windows, err));
    MOEC_TRY(put_int(&b, names.n, err));
    MOEC_TRY(put(&b, names.at, names.n, err));
    MOEC_TRY(moec_file_write(path, b.at, b.n, err));
done:
    moec_free(work);
    moec_free(b.at);
    moec_free(names.at);
    return st;
}

moec_status moec_imatrix_write(const char *path, const moec_stats *s, moec_imatrix_form form, moec_err *err)
{
    job j = {.s = s, .layers = s->meta.moe_layers, .experts = s->meta.experts};
    moec_status st = check(&j, err);
    if (st != MOEC_OK)
        return st;
    return form == MOEC_IMATRIX_DAT ? write_dat(path, &j, err) : write_gguf(path, &j, err);
}
