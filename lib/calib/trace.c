/* See trace.h. */
#include "calib/trace.h"

#include "base/file.h"
#include "base/mem.h"
#include "ckpt/h5.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

struct moec_trace {
    const moec_model *m;
    char *dir;
    int64_t n; /* tokens */
    int32_t *ids;                /* [n,slots] of the layer under way */
    float *gates, *y_norm, *cos; /* [n,slots] [n,slots] [n] */
};

/* The arrays of one layer in file order. */
typedef struct part {
    const char *name;
    void *at;
    size_t bytes;
    moec_dtype dtype;
    int rank;
    const char *unit;
} part;
enum { PARTS = 4 };

static void list_parts(part p[PARTS], const moec_trace *t)
{
    size_t nk = (size_t)t->n * (size_t)t->m->dims.slots;
    p[0] = (part){"ids", t->ids, nk * sizeof *t->ids, MOEC_I32, 2, "expert, by descending gate; -1: none"};
    p[1] = (part){"gates", t->gates, nk * sizeof *t->gates, MOEC_F32, 2, "weight as applied"};
    p[2] = (part){"y_norm", t->y_norm, nk * sizeof *t->y_norm, MOEC_F32, 2, "Euclidean norm of the un-gated expert output"};
    p[3] = (part){"one_minus_cos", t->cos, (size_t)t->n * sizeof *t->cos, MOEC_F32, 1, "1 - cos(h, h + r)"};
}

size_t moec_trace_bytes(const moec_model *m, int64_t n_tokens)
{
    return (size_t)n_tokens * ((size_t)m->dims.slots * 12 + 4);
}

moec_status moec_trace_new(moec_trace **out, const moec_model *m, int64_t n_tokens, const char *dir, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_trace *t = NULL;
    size_t n = (size_t)n_tokens, k = (size_t)m->dims.slots;
    *out = NULL;
    MOEC_TRY(MOEC_NEW(t, 1, err));
    t->m = m;
    t->n = n_tokens;
    MOEC_TRY(moec_copy(&t->dir, dir, strlen(dir), err));
    MOEC_TRY(MOEC_NEW(t->ids, n * k, err));
    MOEC_TRY(MOEC_NEW(t->gates, n * k, err));
    MOEC_TRY(MOEC_NEW(t->y_norm, n * k, err));
    MOEC_TRY(MOEC_NEW(t->cos, n, err));
    *out = t;
    t = NULL;
done:
    moec_trace_free(t);
    return st;
}

void moec_trace_free(moec_trace *t)
{
    if (!t)
        return;
    moec_free(t->dir);
    moec_free(t->ids);
    moec_free(t->gates);
    moec_free(t->y_norm);
    moec_free(t->cos);
    moec_free(t);
}

void moec_trace_see(moec_trace *t, const moec_chunk *c, const moec_moe_view *v)
{
    int64_t k = t->m->dims.slots, width = t->m->dims.hidden;
    const double scale = t->m->dims.residual_scale;
    size_t nk = (size_t)(v->n * k);
    memcpy(t->ids + c->token * k, v->ids, nk * sizeof *t->ids);
    memcpy(t->gates + c->token * k, v->gates, nk * sizeof *t->gates);
    memcpy(t->y_norm + c->token * k, v->y_norm, nk * sizeof *t->y_norm);
    for (int64_t i = 0; i < v->n; i++) {
        const float *h = v->h + i * width, *r = v->r + i * width;
        double hh = 0, hs = 0, ss = 0;
        for (int64_t j = 0; j < width; j++) {
            double a = (double)h[j], b = a + scale * (double)r[j];
            hh += a * a;
            hs += a * b;
            ss += b * b;
        }
        t->cos[c->token + i] = (float)(hh > 0 && ss > 0 ? 1.0 - hs / sqrt(hh * ss) : 1.0);
    }
}

static moec_status open_layer(int *fd, const moec_trace *t, int64_t layer, int flags, char path[4096], moec_err *err)
{
    int n = snprintf(path, 4096, "%s/layer.%lld.trace", t->dir, (long long)layer);
    if (n < 0 || n >= 4096)
        return moec_fail(err, MOEC_EINVAL, "%.100s...: path too long", t->dir);
    *fd = open(path, flags | O_CLOEXEC, 0666);
    return *fd < 0 ? moec_fail_errno(err, errno, path) : MOEC_OK;
}

moec_status moec_trace_keep(moec_trace *t, int64_t layer, moec_err *err)
{
    char path[4096];
    part p[PARTS];
    int fd;
    moec_status st = open_layer(&fd, t, layer, O_WRONLY | O_CREAT | O_TRUNC, path, err);
    if (st != MOEC_OK)
        return st;
    list_parts(p, t);
    for (int i = 0; i < PARTS && st == MOEC_OK; i++)
        st = moec_write_all(fd, p[i].at, p[i].bytes, path, err);
    if (st == MOEC_OK && fsync(fd) != 0)
        st = moec_fail_errno(err, errno, path);
    close(fd);
    return st;
}

static moec_status put_layer(moec_trace *t, moec_h5 *h, int64_t layer, moec_err *err)
{
    moec_status st = MOEC_OK;
    char path[4096], name[96];
    part p[PARTS];
    int fd;
    const int64_t dim[2] = {t->n, t->m->dims.slots};
    MOEC_TRY(open_layer(&fd, t, layer, O_RDONLY, path, err));
    list_parts(p, t);
    for (int i = 0; i < PARTS && st == MOEC_OK; i++)
        st = moec_read_all(fd, p[i].at, p[i].bytes, path, err);
    close(fd);
    MOEC_TRY(st);
    snprintf(name, sizeof name, "/layer_%lld", (long long)layer);
    MOEC_TRY(moec_h5_group(h, name, err));
    for (int i = 0; i < PARTS; i++) {
        snprintf(name, sizeof name, "/layer_%lld/%s", (long long)layer, p[i].name);
        MOEC_TRY(moec_h5_put_array(h, name, p[i].dtype, p[i].rank, dim, p[i].at, err));
        MOEC_TRY(moec_h5_put_text(h, name, "unit", p[i].unit, err));
    }
done:
    return st;
}

static moec_status put_tokens(const moec_trace *t, moec_h5 *h, const moec_corpus *corpus, moec_err *err)
{
    static const char *const path[] = {"/tokens/id", "/tokens/sequence", "/tokens/position", "/tokens/domain"};
    moec_status st = MOEC_OK;
    int32_t *column[4] = {NULL};
    char *names = NULL;
    moec_json *list = moec_json_new_array();
    int64_t at = 0;
    int32_t sequence = 0;
    for (int i = 0; i < 4; i++)
        MOEC_TRY(MOEC_NEW(column[i], (size_t)t->n, err));
    for (int d = 0; d < corpus->n_domains; d++) {
        const moec_domain *dom = &corpus->domain[d];
        moec_json_push(list, moec_json_new_string(dom->name));
        for (int64_t w = 0; w < dom->n_windows; w++, sequence++)
            for (int64_t i = dom->start[w]; i < dom->start[w + 1]; i++, at++) {
                column[0][at] = dom->ids[i];
                column[1][at] = sequence;
                column[2][at] = (int32_t)(i - dom->start[w]);
                column[3][at] = d;
            }
    }
    MOEC_TRY(moec_json_dump(&names, list, 0, err));
    MOEC_TRY(moec_h5_group(h, "/tokens", err));
    MOEC_TRY(moec_h5_put_text(h, "/tokens", "domains", names, err));
    for (int i = 0; i < 4; i++)
        MOEC_TRY(moec_h5_put_array(h, path[i], MOEC_I32, 1, &t->n, column[i], err));
done:
    for (int i = 0; i < 4; i++)
        moec_free(column[i]);
    moec_free(names);
    moec_json_free(list);
    return st;
}

moec_status moec_trace_finish(moec_trace *t, const moec_corpus *corpus, const char *path, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *tmp = NULL;
    moec_h5 *h = NULL;
    MOEC_TRY(moec_format(&tmp, err, "%s.tmp", path));
    MOEC_TRY(moec_h5_create(&h, tmp, err));
    MOEC_TRY(put_tokens(t, h, corpus, err));
    for (int64_t i = 0; i < t->m->dims.layers; i++)
        if (t->m->layer[i].expert)
            MOEC_TRY(put_layer(t, h, i, err));
    st = moec_h5_close(h, err);
    h = NULL;
    MOEC_TRY(st);
    MOEC_TRY(moec_file_publish(tmp, path, err));
done:
    if (h) {
        moec_err ignored;
        moec_status closed = moec_h5_close(h, &ignored); /* the first failure is the one to report */
        (void)closed;
    }
    if (st != MOEC_OK && tmp)
        unlink(tmp);
    moec_free(tmp);
    return st;
}
