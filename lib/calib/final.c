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

static moec_status check_head(const moec_weight *w, moec_err *err)
{
    if (!w->scale)
        return check_finite(w->of, err);
    int64_t bad = moec_weight_nonfinite(w);
    return bad < 0 ? MOEC_OK
                   : moec_fail(err, MOEC_ENUMERIC, "tensor %s: value %lld is NaN or infinite", w->of->name, (long long)bad);
}

/* n numbers of a small tensor as float32, checked. */
static moec_status take_vector(float **out, const moec_tensor *t, int64_t n, moec_err *err)
{
    moec_status st = MOEC_OK;
    MOEC_TRY(check_finite(t, err));
    MOEC_TRY(MOEC_NEW(*out, (size_t)n, err));
    moec_dtypes[t->dtype].to_f32(*out, t->data, n);
done:
    return st;
}

static moec_status take_head(moec_final *f, const moec_model *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    MOEC_TRY(check_head(&m->head, err));
    f->head = m->head;
    f->vocab = m->dims.vocab;
    f->hidden = m->dims.hidden;
    f->eps = (float)m->dims.norm_eps;
    f->layer_norm = m->family->norm == MOEC_NORM_LAYER;
    f->divisor = (float)m->dims.logit_scale;
    MOEC_TRY(take_vector(&f->norm, m->final_norm, m->dims.hidden, err));
    for (int64_t i = 0; m->family->norm == MOEC_NORM_RMS_PLUS1 && i < m->dims.hidden; i++)
        f->norm[i] += 1.0f;
    if (m->final_norm_bias)
        MOEC_TRY(take_vector(&f->norm_bias, m->final_norm_bias, m->dims.hidden, err));
    if (m->head_bias)
        MOEC_TRY(take_vector(&f->bias, m->head_bias, m->dims.vocab, err));
    for (int64_t i = 0; f->bias && f->divisor != 1.0f && i < m->dims.vocab; i++)
        f->bias[i] /= f->divisor;
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

/* All of it but the states. */
static moec_status new_final(moec_final **out, const moec_model *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_digest print;
    moec_final *f = NULL;
    *out = NULL;
    MOEC_TRY(MOEC_NEW(f, 1, err));
    MOEC_TRY(take_head(f, m, err));
    MOEC_TRY(moec_ckpt_fingerprint(&print, m->ckpt, err));
    memcpy(f->model, print.hex, sizeof f->model);
    *out = f;
    f = NULL;
done:
    moec_final_free(f);
    return st;
}

static void take_states(moec_final *f, const moec_pass *p)
{
    f->tokens = p->n_tokens;
    f->store = p->hidden;
    f->workers = p->plan.workers;
    f->max_tokens = p->max_tokens;
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
    moec_final *f = NULL;
    moec_pass *p = NULL;
    moec_pass_opts o = {.compute = compute, .max_memory = max_memory, .what = what};
    *out = NULL;
    o.fixed_bytes = moec__score_bytes(m->dims.hidden, moec_corpus_tokens(corpus), compute);
    o.after_bytes = next && max_memory ? least_bytes(next, corpus, compute) : 0;
    MOEC_TRY(new_final(&f, m, err));
    MOEC_TRY(moec_pass_new(&p, m, corpus, &o, err));
    moec_pass_begin(p, 0);
    MOEC_TRY(moec_pass_embed(p, err));
    for (int64_t i = 0; i < m->dims.layers; i++)
        MOEC_TRY(moec_pass_layer(p, i, NULL, NULL, NULL, err));
    moec_pass_end(p);
    take_states(f, p);
    p->hidden = NULL;
    *out = f;
    f = NULL;
done:
    moec_pass_free(p);
    moec_final_free(f);
    return st;
}

moec_status moec__final_lend(moec_final **out, const moec_pass *p, moec_err *err)
{
    moec_status st = new_final(out, p->m, err);
    if (st != MOEC_OK)
        return st;
    take_states(*out, p);
    (*out)->lent = true;
    return MOEC_OK;
}

int64_t moec_final_vocab(const moec_final *f)
{
    return f->vocab;
}

void moec_final_free(moec_final *f)
{
    if (!f)
        return;
    if (!f->lent)
        moec_hidden_free(f->store);
    moec_free(f->norm);
    moec_free(f->norm_bias);
    moec_free(f->bias);
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
    for (int64_t i = 0; st == MOEC_OK && i < n; i++) {
        float *row = out + i * f->hidden;
        if (f->layer_norm)
            moec_layer_norm(row, row, f->norm, f->norm_bias, f->hidden, f->eps);
        else
            moec_rms_norm(row, row, f->norm, f->hidden, f->eps);
        for (int64_t j = 0; f->divisor != 1.0f && j < f->hidden; j++)
            row[j] /= f->divisor;
    }
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

/* Does the head lie in its file as a plain matrix, so that its bytes can be copied? */
static bool is_whole(const moec_weight *w)
{
    return w->storage == MOEC_PLAIN && w->paired == 0 && w->at == 0 && w->col_step == 1 && w->row_step == w->cols;
}

static moec_status write_head(int fd, const moec_final *f, const char *what, moec_err *err)
{
    moec_status st = MOEC_OK;
    float *rows = NULL;
    const char *data = f->head.of->data;
    size_t row = (size_t)f->hidden * sizeof *rows, n_rows = SLICE / row + 1;
    if (is_whole(&f->head)) {
        size_t size = (size_t)f->vocab * (size_t)f->hidden * (size_t)moec_dtypes[f->head.of->dtype].bytes;
        for (size_t at = 0; at < size; at += SLICE) {
            size_t n = size - at < SLICE ? size - at : SLICE;
            MOEC_TRY(moec_write_all(fd, data + at, n, what, err));
            moec_pages_drop(data + at, n);
        }
        goto done;
    }
    MOEC_TRY(moec_alloc((void **)&rows, n_rows, row, err));
    for (int64_t at = 0; at < f->vocab; at += (int64_t)n_rows) {
        int64_t n = f->vocab - at < (int64_t)n_rows ? f->vocab - at : (int64_t)n_rows;
        moec_weight_read(rows, f->hidden, &f->head, at, n, 0, f->hidden);
        MOEC_TRY(moec_write_all(fd, rows, (size_t)n * row, what, err));
    }
done:
    moec_free(rows);
    return st;
}

/* Format 2 is format 1 with head_bias, which a reader of format 1 would leave out unnoticed. Both are divided by the model's
 * divisor of logits already, the states as well. */
static const char format_1[] = "moecompress reference 1", format_2[] = "moecompress reference 2";

static moec_status reference_header(char **out, size_t *len, const moec_final *f, const moec_corpus *corpus, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_digest text;
    char *meta = NULL, hidden[] = "hidden", head[] = "head", bias[] = "head_bias";
    moec_json *o = moec_json_new_object();
    moec_dtype dtype = is_whole(&f->head) ? f->head.of->dtype : MOEC_F32;
    uint64_t rows = (uint64_t)f->tokens * (uint64_t)f->hidden * sizeof(float);
    uint64_t b = rows + (f->bias ? (uint64_t)f->vocab * sizeof(float) : 0);
    uint64_t w = b + (uint64_t)f->vocab * (uint64_t)f->hidden * (uint64_t)moec_dtypes[dtype].bytes;
    moec_st_entry entry[3] = {{.name = hidden, .dtype = MOEC_F32, .rank = 2, .dim = {f->tokens, f->hidden}, .end = rows},
                              {.name = head, .dtype = dtype, .rank = 2, .dim = {f->vocab, f->hidden}, .begin = b, .end = w},
                              {.name = bias, .dtype = MOEC_F32, .rank = 1, .dim = {f->vocab}, .begin = rows, .end = b}};
    MOEC_TRY(moec_corpus_digest(&text, corpus, err));
    moec_json_set(o, "format", moec_json_new_string(f->bias ? format_2 : format_1));
    moec_json_set(o, "model", moec_json_new_string(f->model));
    moec_json_set(o, "text", moec_json_new_string(text.hex));
    MOEC_TRY(moec_json_dump(&meta, o, 0, err));
    MOEC_TRY(moec_st_header(out, len, entry, f->bias ? 3 : 2, meta, err));
done:
    moec_free(meta);
    moec_json_free(o);
    return st;
}

moec_status moec_final_save(const moec_final *f, const moec_corpus *corpus, const char *path, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *tmp = NULL, *header = NULL;
    size_t len;
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
    if (f->bias)
        MOEC_TRY(moec_write_all(fd, f->bias, (size_t)f->vocab * sizeof *f->bias, tmp, err));
    MOEC_TRY(write_head(fd, f, tmp, err));
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

/* Do the tensors of a reference file belong together? head_bias NULL: there is none. */
static bool fits_together(const moec_st_entry *hidden, const moec_st_entry *head, const moec_st_entry *bias)
{
    return hidden && head && hidden->rank == 2 && head->rank == 2 && hidden->dtype == MOEC_F32 &&
           moec_dtypes[head->dtype].to_f32 && moec_dtypes[head->dtype].bytes > 1 && head->dtype != MOEC_F64 &&
           hidden->dim[1] == head->dim[1] && hidden->dim[1] >= 1 && head->dim[0] >= 1 && head->dim[0] <= INT32_MAX &&
           (!bias || (bias->rank == 1 && bias->dtype == MOEC_F32 && bias->dim[0] == head->dim[0]));
}

static moec_tensor tensor_of(const moec_final *f, const moec_st_index *ix, const moec_st_entry *e, const char *name)
{
    moec_tensor t = {.name = name, .dtype = e->dtype, .rank = e->rank, .bytes = (size_t)(e->end - e->begin)};
    for (int i = 0; i < e->rank; i++)
        t.dim[i] = e->dim[i];
    t.data = (const char *)f->map + ix->data_at + e->begin;
    return t;
}

/* The tensors of a reference file, checked against the corpus. */
static moec_status bind_reference(moec_final *f, const moec_st_index *ix, const moec_corpus *corpus, const char *path,
                                  moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_digest text;
    moec_json *meta = NULL;
    const moec_st_entry *hidden = NULL, *head = NULL, *bias = NULL;
    MOEC_TRY(moec_corpus_digest(&text, corpus, err));
    for (size_t i = 0; i < ix->n; i++) {
        hidden = strcmp(ix->entry[i].name, "hidden") == 0 ? &ix->entry[i] : hidden;
        head = strcmp(ix->entry[i].name, "head") == 0 ? &ix->entry[i] : head;
        bias = strcmp(ix->entry[i].name, "head_bias") == 0 ? &ix->entry[i] : bias;
    }
    if (ix->metadata)
        MOEC_TRY(moec_json_parse(&meta, ix->metadata, strlen(ix->metadata), path, err));
    const char *format = moec_json_string(moec_json_get(meta, "format"));
    const char *made = moec_json_string(moec_json_get(meta, "text"));
    const char *model = moec_json_string(moec_json_get(meta, "model"));
    if (!format || strcmp(format, bias ? format_2 : format_1) != 0 || !made || !model || strlen(model) != 32 ||
        !fits_together(hidden, head, bias)) {
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
    f->divisor = 1.0f;
    f->rows = (const char *)f->map + ix->data_at + hidden->begin;
    f->tensor = tensor_of(f, ix, head, "head");
    f->head = moec_weight_of(&f->tensor);
    MOEC_TRY(moec_within(err, check_finite(&f->tensor, err), "%s", path));
    if (bias) {
        moec_tensor t = tensor_of(f, ix, bias, "head_bias");
        MOEC_TRY(moec_within(err, take_vector(&f->bias, &t, f->vocab, err), "%s", path));
    }
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
