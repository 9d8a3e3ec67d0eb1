/* Quantizes a model by rounding to nearest and writes it in a format, for the tests of formats: no tokens, no search.
 *
 *   dump_quantize MODEL FORMAT WORK OUT [KEY=VALUE ..]
 *
 * WORK: folder for the weights, OUT for the checkpoint, WORK.plan.json the plan. bits=2,3,4,8: widths, which go round by=matrix,
 * expert, layer or model; others=BITS: of all other matrices that the format takes (0: none); group=N, zeros=1, scale=f16|bf16|f32,
 * dtype=f32|bf16|f16: of the output. Prints "bytes BYTES", of the output's tensors as they were estimated before anything was
 * computed. */
#include "base/file.h"
#include "base/mem.h"
#include "method/quant.h"
#include "run/apply.h"
#include "run/draft.h"
#include "run/format.h"
#include "run/preview.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct job {
    moec_model *m;
    moec_plan *p;
    const moec_qformat *format;
    moec_override *weights;
    moec_forms forms;
    int bits[8], n_bits, others;
    int64_t group;
    bool zeros;
    moec_dtype scale, dtype;
    char by[16];
} job;

static moec_status read_options(job *j, char **arg, moec_err *err)
{
    for (; *arg; arg++) {
        char *eq = strchr(*arg, '=');
        if (!eq)
            return moec_fail(err, MOEC_EINVAL, "%s: expected KEY=VALUE", *arg);
        const char *v = eq + 1;
        if (strncmp(*arg, "bits=", 5) == 0)
            for (j->n_bits = 0; *v && j->n_bits < 8; v += strcspn(v, ","), v += *v == ',')
                j->bits[j->n_bits++] = atoi(v);
        else if (strncmp(*arg, "by=", 3) == 0)
            snprintf(j->by, sizeof j->by, "%s", v);
        else if (strncmp(*arg, "others=", 7) == 0)
            j->others = atoi(v);
        else if (strncmp(*arg, "group=", 6) == 0)
            j->group = atoi(v);
        else if (strncmp(*arg, "zeros=", 6) == 0)
            j->zeros = atoi(v) != 0;
        else if (strncmp(*arg, "scale=", 6) == 0)
            j->scale = moec_plan_dtype(v);
        else if (strncmp(*arg, "dtype=", 6) == 0)
            j->dtype = moec_plan_dtype(v);
        else
            return moec_fail(err, MOEC_EINVAL, "%s: not known", *arg);
    }
    return MOEC_OK;
}

static moec_status make_plan(job *j, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t E = j->m->dims.experts, n = j->m->moe_layers * E * 3;
    moec_digest print;
    MOEC_TRY(moec_ckpt_fingerprint(&print, j->m->ckpt, err));
    MOEC_TRY(moec_plan_new(&j->p, j->m, "uniform", print.hex, err));
    MOEC_TRY(moec_plan_keep_all(j->p, err));
    j->p->dtype = j->dtype;
    moec_plan_quant *q = &j->p->quant;
    snprintf(q->format, sizeof q->format, "%s", j->format->name);
    q->group = j->group;
    q->zeros = j->zeros;
    q->scale_type = j->scale;
    MOEC_TRY(MOEC_NEW(q->expert, (size_t)n, err));
    for (int64_t i = 0; i < n; i++) {
        const int64_t k = j->by[0] == 'm' && j->by[1] == 'a' ? i : j->by[0] == 'e' ? i / 3 : j->by[0] == 'l' ? i / (3 * E) : 0;
        q->expert[i] = (uint8_t)j->bits[(k + k / (3 * E)) % j->n_bits];
    }
    if (j->others > 0) {
        q->n_mat_layers = j->m->dims.layers;
        MOEC_TRY(MOEC_NEW(q->mat, (size_t)q->n_mat_layers * MOEC_MAT_COUNT, err));
        for (int64_t i = 0; i < q->n_mat_layers * MOEC_MAT_COUNT; i++)
            if (moec_qformat_takes(j->format, q, &j->m->layer[i / MOEC_MAT_COUNT], (moec_mat)(i % MOEC_MAT_COUNT)))
                q->mat[i] = (uint8_t)j->others;
    }
    moec_qformat_mark(j->p, j->format);
    MOEC_TRY(moec_qformat_check(j->p, j->m, err));
done:
    return st;
}

/* --- rounding -------------------------------------------------------------------------------------------------------- */

static float as(moec_dtype t, float v)
{
    float out;
    uint16_t h = t == MOEC_BF16 ? moec_to_bf16(v) : moec_to_f16(v);
    if (t == MOEC_F32)
        return v;
    moec_dtypes[t].to_f32(&out, &h, 1);
    return out;
}

static void round_group(moec_qcodes *c, const float *w, int64_t at, int64_t j)
{
    const int64_t n = c->grid.group;
    const float top = (float)((1 << c->grid.bits) - 1);
    float lo = 0.0F, hi = 0.0F, zero = c->grid.bits == 1 ? 0.5F : (float)(1 << (c->grid.bits - 1));
    for (int64_t i = 0; i < n; i++) {
        lo = fminf(lo, w[i]);
        hi = fmaxf(hi, w[i]);
    }
    c->scale[j] = as(c->grid.scale_type, c->zero ? (hi - lo) / top : 2.0F * fmaxf(hi, -lo) / top);
    c->scale[j] = c->scale[j] > 0.0F ? c->scale[j] : 1.0F;
    if (c->zero) {
        c->zero[j] = (uint8_t)fminf(fmaxf(rintf(-lo / c->scale[j]), 0.0F), top);
        zero = (float)c->zero[j];
    }
    for (int64_t i = 0; i < n; i++)
        c->code[at + i] = (uint8_t)fminf(fmaxf(rintf(w[i] / c->scale[j] + zero), 0.0F), top);
}

static moec_status round_matrix(moec_qcodes *c, const moec_qmatrix *x, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_weight *w = x->source;
    float *values = NULL;
    *c = (moec_qcodes){0};
    MOEC_TRY(moec_qcodes_new(c, &x->grid, w->rows, w->cols, err));
    MOEC_TRY(MOEC_NEW(values, (size_t)(w->rows * w->cols), err));
    moec_weight_read(values, w->cols, w, 0, w->rows, 0, w->cols);
    const int64_t groups = w->cols / x->grid.group;
    for (int64_t j = 0; j < w->rows * groups; j++)
        round_group(c, values + j * x->grid.group, j * x->grid.group, j);
done:
    moec_free(values);
    return st;
}

/* --- a layer --------------------------------------------------------------------------------------------------------- */

static moec_status write_codes(moec_sheet *s, size_t *at, const moec_qformat *f, const moec_qmatrix *x, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_qcodes c = {0}, back = {0};
    moec_piece piece[MOEC_PIECES];
    void *data[MOEC_PIECES];
    const int n = f->pieces(piece, &x->grid, x->source->rows, x->source->cols);
    MOEC_TRY(round_matrix(&c, x, err));
    for (int i = 0; i < n; i++)
        data[i] = (void *)(uintptr_t)moec_sheet_at(s, *at + (size_t)i)->data;
    f->write(data, &c);
    MOEC_TRY(moec_qcodes_new(&back, &x->grid, c.rows, c.cols, err));
    MOEC_TRY(f->read(&back, (const void *const *)data, err));
    if (memcmp(back.code, c.code, (size_t)(c.rows * c.cols)) != 0 ||
        memcmp(back.scale, c.scale, (size_t)(c.rows * (c.cols / x->grid.group)) * sizeof *c.scale) != 0)
        MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "%s: what is read back is not what was written", x->module));
    *at += (size_t)n;
done:
    moec_qcodes_release(&c);
    moec_qcodes_release(&back);
    return st;
}

/* W' into a view of a draft or a sheet. */
static moec_status write_values(const moec_weight *to, const moec_qmatrix *x, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_qcodes c = {0};
    float *values = NULL;
    MOEC_TRY(round_matrix(&c, x, err));
    MOEC_TRY(MOEC_NEW(values, (size_t)(c.rows * c.cols), err));
    moec_quant_restore(values, &c, 0, c.rows);
    MOEC_TRY(moec_weight_write(to, values, c.cols, 0, c.rows, 0, c.cols, err));
done:
    moec_free(values);
    moec_qcodes_release(&c);
    return st;
}

static moec_status packed_layer(job *j, const moec_qmatrices *q, const char *file, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_tensor *t = NULL;
    char **name = NULL;
    moec_sheet *s = NULL;
    size_t n = 0, at = 0;
    MOEC_TRY(MOEC_NEW(t, q->n * MOEC_PIECES, err));
    MOEC_TRY(MOEC_NEW(name, q->n * MOEC_PIECES, err));
    for (size_t i = 0; i < q->n; i++) {
        moec_piece piece[MOEC_PIECES];
        const int k = j->format->pieces(piece, &q->at[i].grid, q->at[i].source->rows, q->at[i].source->cols);
        for (int r = 0; r < k; r++, n++) {
            MOEC_TRY(moec_format(&name[n], err, "%s.%s", q->at[i].module, piece[r].suffix));
            t[n] = (moec_tensor){.name = name[n], .dtype = piece[r].dtype, .rank = piece[r].rank};
            memcpy(t[n].dim, piece[r].dim, sizeof piece[r].dim);
            t[n].bytes = (size_t)moec_dtypes[t[n].dtype].bytes;
            for (int d = 0; d < t[n].rank; d++)
                t[n].bytes *= (size_t)t[n].dim[d];
        }
    }
    MOEC_TRY(moec_sheet_new(&s, j->weights, file, t, n, err));
    for (size_t i = 0; i < q->n; i++)
        MOEC_TRY(write_codes(s, &at, j->format, &q->at[i], err));
    MOEC_TRY(moec_sheet_commit(s, j->weights, err));
    s = NULL;
done:
    moec_sheet_discard(s);
    for (size_t i = 0; name && i < n; i++)
        moec_free(name[i]);
    moec_free(name);
    moec_free(t);
    return st;
}

/* Experts in a draft of their set, other matrices in a file beside it. */
static moec_status dense_layer(job *j, const moec_qmatrices *q, const moec_layer *l, const char *file, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_draft draft = {0};
    moec_sheet *s = NULL;
    moec_tensor other[MOEC_MAT_COUNT];
    size_t n = 0;
    char name[64];
    for (size_t i = 0; i < q->n && q->at[i].expert < 0; i++, n++) {
        const moec_tensor *from = q->at[i].source->of;
        other[n] = *from;
        other[n].dtype = j->forms.cast[from - moec_ckpt_at(j->m->ckpt, 0)].dtype;
        other[n].bytes = (size_t)(from->dim[0] * from->dim[1] * moec_dtypes[other[n].dtype].bytes);
    }
    snprintf(name, sizeof name, "others-%s", file);
    if (n > 0)
        MOEC_TRY(moec_sheet_new(&s, j->weights, name, other, n, err));
    for (size_t i = 0; i < n; i++) {
        const moec_weight to = moec_weight_of(moec_sheet_at(s, i));
        MOEC_TRY(write_values(&to, &q->at[i], err));
    }
    if (s)
        MOEC_TRY(moec_sheet_commit(s, j->weights, err));
    s = NULL;
    if (!l->expert)
        goto done;
    MOEC_TRY(moec_draft_new(&draft, j->weights, file, j->m, j->p, &j->forms, l->moe_index,
                            MOEC_PART_GATE | MOEC_PART_UP | MOEC_PART_DOWN, err));
    for (size_t i = n; i < q->n; i++) {
        const moec_mlp *e = &draft.expert[q->at[i].expert];
        const int which = q->at[i].which;
        MOEC_TRY(write_values(which == 0 ? &e->gate : which == 1 ? &e->up : &e->down, &q->at[i], err));
    }
    MOEC_TRY(moec_sheet_commit(draft.sheet, j->weights, err));
    draft.sheet = NULL;
done:
    moec_sheet_discard(s);
    moec_draft_release(&draft);
    return st;
}

static moec_status quantize(job *j, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_qmatrices q = {0};
    for (int64_t l = 0; l < j->m->dims.layers; l++) {
        char file[32];
        snprintf(file, sizeof file, "layer-%04d.safetensors", (int)l);
        MOEC_TRY(moec_qmatrices_of(&q, j->m, j->p, l, err));
        if (q.n > 0 && j->format->dense)
            MOEC_TRY(dense_layer(j, &q, &j->m->layer[l], file, err));
        else if (q.n > 0)
            MOEC_TRY(packed_layer(j, &q, file, err));
        moec_qmatrices_release(&q);
    }
done:
    moec_qmatrices_release(&q);
    return st;
}

/* --- all of it ------------------------------------------------------------------------------------------------------- */

static moec_status run(job *j, char **arg, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_digest digest;
    moec_apply_result r;
    moec_layout dry = {0};
    char *path = NULL, *text = NULL;
    MOEC_TRY(moec_qformat_take(&j->format, arg[2], err));
    MOEC_TRY(read_options(j, arg + 5, err));
    MOEC_TRY(moec_model_open(&j->m, arg[1], err));
    MOEC_TRY(make_plan(j, err));
    MOEC_TRY(moec_layout_build(&dry, j->m, j->p, NULL, err));
    printf("bytes %llu\n", (unsigned long long)dry.tensor_bytes);
    MOEC_TRY(moec_forms_new(&j->forms, j->m, j->p, err));
    MOEC_TRY(moec_override_open(&j->weights, arg[3], true, err));
    MOEC_TRY(quantize(j, err));
    MOEC_TRY(moec_preview_digest(&digest, j->p, j->weights, err));
    snprintf(j->p->weights, sizeof j->p->weights, "%s", digest.hex);
    MOEC_TRY(moec_format(&path, err, "%s.plan.json", arg[3]));
    MOEC_TRY(moec_plan_to_text(&text, j->p, err));
    FILE *f = fopen(path, "w");
    if (!f || fputs(text, f) < 0 || fclose(f) != 0)
        MOEC_TRY(moec_fail(err, MOEC_EIO, "%s cannot be written", path));
    moec_plan_free(j->p);
    j->p = NULL;
    MOEC_TRY(moec_plan_read(&j->p, path, err)); /* what is applied is what was read */
    const moec_apply_options o = {.out = arg[4], .weights = j->weights, .overwrite = true};
    MOEC_TRY(moec_apply(&r, j->m, j->p, &o, err));
done:
    moec_free(text);
    moec_free(path);
    moec_layout_release(&dry);
    moec_forms_release(&j->forms);
    moec_override_close(j->weights);
    moec_plan_free(j->p);
    moec_model_close(j->m);
    return st;
}

int main(int argc, char **argv)
{
    moec_err err = {MOEC_OK, ""};
    job j = {.bits = {4}, .n_bits = 1, .group = 32, .scale = MOEC_F16, .dtype = MOEC_DTYPE_COUNT, .by = "matrix"};
    if (argc < 5) {
        fputs("dump_quantize MODEL FORMAT WORK OUT [KEY=VALUE ..]\n", stderr);
        return 2;
    }
    if (run(&j, argv, &err) == MOEC_OK)
        return 0;
    fprintf(stderr, "%s\n", err.text);
    return 1;
}
