/* Where quantized matrices lie in a folder of computed weights, and how a variant of the model computes with them. */
#include "base/mem.h"
#include "run/quantize_parts.h"

#include <string.h>

static void free_tensors(moec_tensor *t, size_t n)
{
    for (size_t i = 0; t && i < n; i++)
        moec_free((char *)(uintptr_t)t[i].name);
    moec_free(t);
}

static moec_status add_pieces(moec_tensor *t, size_t *n, const moec_qmatrix *q, const moec_qformat *f, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_piece piece[MOEC_PIECES];
    const int pieces = f->pieces(piece, &q->grid, q->source->rows, q->source->cols);
    for (int k = 0; k < pieces; k++) {
        moec_tensor *p = &t[*n];
        char *name;
        MOEC_TRY(moec_format(&name, err, "%s.%s", q->module, piece[k].suffix));
        *p = (moec_tensor){.name = name, .dtype = piece[k].dtype, .rank = piece[k].rank,
                           .bytes = (size_t)moec_dtypes[piece[k].dtype].bytes};
        ++*n;
        for (int d = 0; d < piece[k].rank; d++) {
            p->dim[d] = piece[k].dim[d];
            p->bytes *= (size_t)piece[k].dim[d];
        }
    }
done:
    return st;
}

/* Tensors of jobs; dense ones are called and shaped as the source's, in `dtype` where that is one. Free with free_tensors. */
static moec_status list_tensors(moec_tensor **out, size_t *n, const moec_qjob *job, size_t jobs, const moec_qformat *f, moec_dtype dtype,
                                moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_tensor *t = NULL;
    *out = NULL;
    *n = 0;
    MOEC_TRY(MOEC_NEW(t, jobs * MOEC_PIECES, err));
    for (size_t i = 0; i < jobs; i++) {
        const moec_tensor *of = job[i].q->source->of;
        if (!f->dense) {
            MOEC_TRY(add_pieces(t, n, job[i].q, f, err));
            continue;
        }
        char *name;
        MOEC_TRY(moec_copy(&name, of->name, strlen(of->name), err));
        t[*n] = *of;
        t[*n].name = name;
        if (dtype < MOEC_DTYPE_COUNT) {
            t[*n].dtype = dtype;
            t[*n].bytes = of->bytes / (size_t)moec_dtypes[of->dtype].bytes * (size_t)moec_dtypes[dtype].bytes;
        }
        t[(*n)++].data = NULL;
    }
    *out = t;
    t = NULL;
done:
    free_tensors(t, *n);
    return st;
}

moec_status moec__qplace(moec_qjob *job, size_t jobs, const moec_qformat *f, moec_dtype dtype, const moec_override *weights,
                         const char *file, moec_sheet **sheet, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_tensor *t = NULL;
    size_t n = 0, at = 0;
    MOEC_TRY(list_tensors(&t, &n, job, jobs, f, dtype, err));
    if (file)
        MOEC_TRY(moec_sheet_new(sheet, weights, file, t, n, err));
    for (size_t i = 0; i < jobs; i++) {
        const moec_weight *from = job[i].q->source;
        moec_piece piece[MOEC_PIECES];
        const int pieces = f->dense ? 1 : f->pieces(piece, &job[i].q->grid, from->rows, from->cols);
        const moec_tensor *one[MOEC_PIECES] = {NULL};
        for (int k = 0; k < pieces; k++, at++) {
            if (file)
                one[k] = moec_sheet_at(*sheet, at);
            else
                MOEC_TRY(moec_override_get(&one[k], weights, t[at].name, t[at].dtype, t[at].rank, t[at].dim, err));
        }
        if (f->dense) {
            job[i].to = *from;
            job[i].to.of = one[0];
        } else {
            memcpy(job[i].piece, one, sizeof one);
        }
    }
done:
    free_tensors(t, n);
    return st;
}

void moec__qshow(moec_layer *l, const moec_qjob *job, size_t jobs, const moec_qformat *f)
{
    for (size_t i = 0; i < jobs; i++) {
        const moec_qmatrix *q = job[i].q;
        moec_weight *slot = q->expert < 0 ? &l->mat[q->which] : q->which == 0 ? &l->expert[q->expert].gate
                            : q->which == 1 ? &l->expert[q->expert].up : &l->expert[q->expert].down;
        *slot = f->dense ? job[i].to : moec_qformat_view(f, job[i].piece, &q->grid, q->source->rows, q->source->cols);
    }
}
