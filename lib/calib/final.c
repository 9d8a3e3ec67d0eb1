/* Final hidden states: made by the layer pass, kept in memory or on disk, saved as and read from a reference file. */
#include "base/file.h"
#include "base/mem.h"
#include "calib/final.h"
#include "ckpt/safetensors.h"
#include "num/vec.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* A head is the largest tensor there is, so it is read in slices whose pages are given back. */
enum { SLICE = 4 << 20 };

static moec_status check_finite(const moec_tensor *t, moec_err *err)
{
    size_t width = (size_t)moec_dtypes[t->dtype].bytes;
    for (size_t at = 0; at < t->bytes; at += SLICE) {
        moec_tensor part = *t;
        part.data = (const char *)t->data + at;
        part.bytes = t->bytes - at < SLICE ? t->bytes - at : SLICE;
        int64_t bad = moec_tensor_nonfinite(&part);
        moec_pages_drop(part.data, part.bytes);
        if (bad >= 0)
            return moec_fail(err, MOEC_ENUMERIC, "tensor %s: value %lld is NaN or infinite", t->name,
                             (long long)bad + (long long)(at / width));
    }
    return MOEC_OK;
}

static moec_status take_head(moec_final *f, const moec_model *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    MOEC_TRY(check_finite(m->head, err));
    MOEC_TRY(check_finite(m->final_norm, err));
    f->head = m->head->data;
    f->dtype = m->head->dtype;
    f->vocab = m->dims.vocab;
    f->hidden = m->dims.hidden;
    f->eps = (float)m->dims.norm_eps;
    MOEC_TRY(MOEC_NEW(f->norm, (size_t)m->dims.hidden, err));
    moec_dtypes[m->final_norm->dtype].to_f32(f->norm, m->final_norm->data, m->dims.hidden);
done:
    return st;
}

/* What a pass over `next` takes at least, besides what is resident now. */
static size_t least_bytes(const moec_model *next, const moec_corpus *corpus, moec_compute compute)
{
    moec_pass_plan plan;
    moec_pass_opts o = {.compute = compute, .max_memory = 1}; /* nothing fits that: the smallest arrangement comes back */
    o.fixed_bytes = moec__score_bytes(next->dims.hidden, moec_corpus_tokens(corpus), compute);
    uint64_t resident = moec_resident_memory();
    moec_status st = moec_pass_estimate(&plan, next, moec_corpus_tokens(corpus), moec_pass_max_seq(corpus), &o, NULL);
    return st == MOEC_ENOFIT && plan.bytes > resident ? (size_t)(plan.bytes - resident) : 0;
}

moec_status moec_final_run(moec_final **out, const moec_model *m, const moec_corpus *corpus, moec_compute compute,
                           uint64_t max_memory, const char *what, moec_err *err)
{
    return moec_final_run_before(out, NULL, m, corpus, compute, max_memory, what, err);
}

moec_status moec_final_run_before(moec_final **out, const moec_model *next, const moec_model *m, const moec_corpus *corpus,
                                  moec_compute compute, uint64_t max_memory, const char *what, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_digest print;
    moec_final *f = NULL;
    moec_pass *p = NULL;
    moec_pass_opts o = {.compute = compute, .max_memory = max_memory, .what = what};
    *out = NULL;
    o.fixed_bytes = moec__score_bytes(m->dims.hidden, moec_corpus_tokens(corpus), compute);
    o.after_bytes = next && max_memory ? least_bytes(next, corpus, compute) : 0;
    MOEC_TRY(MOEC_NEW(f, 1, err));
    MOEC_TRY(take_head(f, m, err));
    MOEC_TRY(moec_ckpt_fingerprint(&print, m->ckpt, err));
    memcpy(f->model, print.hex, sizeof f->model);
    MOEC_TRY(moec_pass_new(&p, m, corpus, &o, err));
    moec_pass_begin(p, 0);
    MOEC_TRY(moec_pass_embed(p, err));
    for (int64_t i = 0; i < m->dims.layers; i++)
        MOEC_TRY(moec_pass_layer(p, i, NULL, NULL, NULL, err));
    moec_pass_end(p);
    f->tokens = p->n_tokens;
    f->store = p->hidden;
    f->workers = p->plan.workers;
    f->max_tokens = p->max_tokens;
    p->hidden = NULL;
    *out = f;
    f = NULL;
done:
    moec_pass_free(p);
    moec_final_free(f);
    return st;
}

int64_t moec_final_vocab(const moec_final *f)
{
    return f->vocab;
}

void moec_final_free(moec_final *f)
{
    if (!f)
        return;
    moec_hidden_free(f->store);
    moec_free(f->norm);
    if (f->map)
        munmap(f->map, f->map_size);
    moec_free(f);
}

moec_status moec__final_rows(float *out, const moec_final *f, int64_t at, int64_t n, moec_err *err)
{
    if (f->rows) { /* a reference file holds them normed, perhaps unaligned */
        size_t row = (size_t)f->hidden * sizeof *out;
        memcpy(out, f->rows + (size_t)at * row, (size_t)n * row);
        if (f->map)
            moec_pages_drop(f->rows + (size_t)at * row, (size_t)n * row);
        if (!moec_all_finite(out, n * f->hidden))
            return moec_fail(err, MOEC_ENUMERIC, "reference file: a hidden state is not finite");
        return MOEC_OK;
    }
    moec_status st = moec_hidden_read(out, f->store, at, n, err);
    for (int64_t i = 0; st == MOEC_OK && i < n; i++)
        moec_rms_norm(out + i * f->hidden, out + i * f->hidden, f->norm, f->hidden, f->eps);
    return st;
}

static moec_status write_rows(int fd, const moec_final *f, const char *what, moec_err *err)
{
    enum { ROWS = 1024 };
    moec_status st = MOEC_OK;
    float *x = NULL;
    size_t row = (size_t)f->hidden * sizeof *x;
    MOEC_TRY(moec_alloc((void **)&x, ROWS, row, err));
    for (int64_t at = 0; at < f->tokens; at += ROWS) {
        int64_t n = f->tokens - at < ROWS ? f->tokens - at : ROWS;
        MOEC_TRY(moec__final_rows(x, f, at, n, err));
        MOEC_TRY(moec_write_all(fd, x, (size_t)n * row, what, err));
    }
done:
    moec_free(x);
    return st;
}

static moec_status reference_header(char **out, size_t *len, const moec_final *f, const moec_corpus *corpus, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_digest text;
    char *meta = NULL, hidden[] = "hidden", head[] = "head";
    moec_json *o = moec_json_new_object();
    uint64_t rows = (uint64_t)f->tokens * (uint64_t)f->hidden * sizeof(float);
    uint64_t w = (uint64_t)f->vocab * (uint64_t)f->hidden * (uint64_t)moec_dtypes[f->dtype].bytes;
    moec_st_entry entry[2] = {{.name = hidden, .dtype = MOEC_F32, .rank = 2, .dim = {f->tokens, f->hidden}, .end = rows},
                              {.name = head, .dtype = f->dtype, .rank = 2, .dim = {f->vocab, f->hidden}, .begin = rows,
                               .end = rows + w}};
    MOEC_TRY(moec_corpus_digest(&text, corpus, err));
    moec_json_set(o, "format", moec_json_new_string("moecompress reference 1"));
    moec_json_set(o, "model", moec_json_new_string(f->model));
    moec_json_set(o, "text", moec_json_new_string(text.hex));
    MOEC_TRY(moec_json_dump(&meta, o, 0, err));
    MOEC_TRY(moec_st_header(out, len, entry, 2, meta, err));
done:
    moec_free(meta);
    moec_json_free(o);
    return st;
}

moec_status moec_final_save(const moec_final *f, const moec_corpus *corpus, const char *path, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *tmp = NULL, *header = NULL;
    size_t len, head = (size_t)f->vocab * (size_t)f->hidden * (size_t)moec_dtypes[f->dtype].bytes;
    int fd = -1;
    if (moec_path_exists(path))
        return moec_fail(err, MOEC_EEXIST, "%s: is there already", path);
    MOEC_TRY(reference_header(&header, &len, f, corpus, err));
    MOEC_TRY(moec_format(&tmp, err, "%s.tmp", path));
    fd = open(tmp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) {
        st = moec_fail_errno(err, errno, tmp);
        goto done;
    }
    MOEC_TRY(moec_write_all(fd, header, len, tmp, err));
    MOEC_TRY(write_rows(fd, f, tmp, err));
    for (size_t at = 0; at < head; at += SLICE) {
        size_t n = head - at < SLICE ? head - at : SLICE;
        MOEC_TRY(moec_write_all(fd, (const char *)f->head + at, n, tmp, err));
        moec_pages_drop((const char *)f->head + at, n);
    }
    MOEC_TRY(moec_file_publish(tmp, path, err));
done:
    if (fd >= 0) {
        close(fd);
        if (st != MOEC_OK)
            unlink(tmp);
    }
    moec_free(tmp);
    moec_free(header);
    return st;
}

/* The two tensors of a reference file, checked against the corpus. */
static moec_status bind_reference(moec_final *f, const moec_st_index *ix, const moec_corpus *corpus, const char *path,
                                  moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_digest text;
    moec_json *meta = NULL;
    const moec_st_entry *hidden = NULL, *head = NULL;
    MOEC_TRY(moec_corpus_digest(&text, corpus, err));
    for (size_t i = 0; i < ix->n; i++) {
        hidden = strcmp(ix->entry[i].name, "hidden") == 0 ? &ix->entry[i] : hidden;
        head = strcmp(ix->entry[i].name, "head") == 0 ? &ix->entry[i] : head;
    }
    if (ix->metadata)
        MOEC_TRY(moec_json_parse(&meta, ix->metadata, strlen(ix->metadata), path, err));
    const char *format = moec_json_string(moec_json_get(meta, "format")), *made = moec_json_string(moec_json_get(meta, "text"));
    const char *model = moec_json_string(moec_json_get(meta, "model"));
    if (!format || strcmp(format, "moecompress reference 1") != 0 || !made || !model || strlen(model) != 32 || !hidden ||
        !head || hidden->rank != 2 || head->rank != 2 || hidden->dtype != MOEC_F32 || !moec_dtypes[head->dtype].to_f32 ||
        head->dtype == MOEC_F64 || hidden->dim[1] != head->dim[1] || hidden->dim[1] < 1 || head->dim[0] < 1 ||
        head->dim[0] > INT32_MAX) {
        st = moec_fail(err, MOEC_EFORMAT, "%s: not a reference file of moecompress eval", path);
        goto done;
    }
    if (strcmp(made, text.hex) != 0 || hidden->dim[0] != moec_corpus_tokens(corpus)) {
        st = moec_fail(err, MOEC_EFORMAT, "%s: was made from other text or windows; give the same --text, --seq-len and "
                       "--max-windows as then", path);
        goto done;
    }
    memcpy(f->model, model, sizeof f->model);
    f->tokens = hidden->dim[0];
    f->hidden = hidden->dim[1];
    f->vocab = head->dim[0];
    f->dtype = head->dtype;
    f->rows = (const char *)f->map + ix->data_at + hidden->begin;
    f->head = (const char *)f->map + ix->data_at + head->begin;
    moec_tensor whole = {.name = "head", .dtype = head->dtype, .data = f->head, .bytes = (size_t)(head->end - head->begin)};
    MOEC_TRY(moec_within(err, check_finite(&whole, err), "%s", path));
done:
    moec_json_free(meta);
    return st;
}

moec_status moec_final_load(moec_final **out, const moec_corpus *corpus, const char *path, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_final *f = NULL;
    moec_st_index ix = {0};
    struct stat info;
    *out = NULL;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe must not make this wait */
    if (fd < 0 || fstat(fd, &info) != 0) {
        st = moec_fail_errno(err, errno, path);
        goto done;
    }
    if (!S_ISREG(info.st_mode) || info.st_size < 8) {
        st = moec_fail(err, MOEC_EFORMAT, "%s: not a reference file of moecompress eval", path);
        goto done;
    }
    MOEC_TRY(MOEC_NEW(f, 1, err));
    f->map_size = (size_t)info.st_size;
    f->map = mmap(NULL, f->map_size, PROT_READ, MAP_SHARED, fd, 0);
    if (f->map == MAP_FAILED) {
        f->map = NULL;
        st = moec_fail_errno(err, errno, path);
        goto done;
    }
    MOEC_TRY(moec_st_parse(&ix, f->map, f->map_size, f->map_size, path, err));
    MOEC_TRY(bind_reference(f, &ix, corpus, path, err));
    *out = f;
    f = NULL;
done:
    moec_st_index_release(&ix);
    moec_final_free(f);
    if (fd >= 0)
        close(fd);
    return st;
}
