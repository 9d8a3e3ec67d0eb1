/* See forms.h. */
#include "forms.h"

#include "base/file.h"
#include "base/mem.h"
#include "run/apply.h"
#include "run/verify.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

char *forms_folder, *forms_source, *forms_out;

int forms_set_up(void **state)
{
    (void)state;
    forms_folder = tiny_folder();
    forms_source = tiny_path(forms_folder, "source");
    forms_out = tiny_path(forms_folder, "out");
    return 0;
}

int forms_tear_down(void **state)
{
    (void)state;
    tiny_remove(forms_folder);
    moec_free(forms_folder);
    moec_free(forms_source);
    moec_free(forms_out);
    return 0;
}

moec_model *forms_open_dir(const char *dir)
{
    moec_model *m;
    moec_err err = {MOEC_OK, ""};
    if (moec_model_open(&m, dir, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    return m;
}

void forms_write_tiny(const char *family, int64_t width, moec_dtype dtype)
{
    moec_err err = {MOEC_OK, ""};
    tiny_spec spec = tiny_of(family);
    if (width > 0)
        spec.hidden = spec.width = width;
    spec.dtype = dtype;
    tiny_remove(forms_source);
    tiny_remove(forms_out);
    if (tiny_write(forms_source, &spec, &err) != MOEC_OK)
        fail_msg("%s: %s", family, err.text);
}

moec_request forms_request(const moec_model *m, const moec_digest *print, int64_t keep)
{
    return (moec_request){.model = m, .fingerprint = print->hex, .keep = keep, .seed = 3};
}

moec_plan *forms_plan_of(const moec_request *q)
{
    moec_plan *p;
    moec_err err = {MOEC_OK, ""};
    if (moec_method_plan(&p, MOEC_PRUNE, "random", q, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    return p;
}

void forms_refuse_request(const moec_request *q, const char *says)
{
    moec_plan *p;
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_method_plan(&p, MOEC_PRUNE, "random", q, &err), MOEC_EINVAL);
    if (!strstr(err.text, says))
        fail_msg("\"%s\" does not say \"%s\"", err.text, says);
}

/* Applies (which verifies), and verifies again with every byte read. A plan that went through text makes the same. */
moec_model *forms_apply(const moec_model *m, const moec_plan *p)
{
    moec_apply_result r;
    moec_verify_report *report;
    moec_plan *again;
    char *text;
    moec_err err = {MOEC_OK, ""};
    const moec_apply_options opt = {.out = forms_out, .overwrite = true};
    assert_int_equal(moec_plan_to_text(&text, p, &err), MOEC_OK);
    if (moec_plan_parse(&again, text, strlen(text), "plan", &err) != MOEC_OK || moec_apply(&r, m, again, &opt, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    const moec_verify_options check = {.source = m, .data = true};
    assert_int_equal(moec_verify(&report, forms_out, &check, &err), MOEC_OK);
    if (report->problems > 0)
        fail_msg("%s", report->problem[0]);
    moec_verify_free(report);
    moec_plan_free(again);
    moec_free(text);
    return forms_open_dir(forms_out);
}

/* --- values ---------------------------------------------------------------------------------------------------------- */

static void same_view(const moec_weight *a, const moec_weight *b)
{
    float x[256], y[256];
    assert_int_equal(a->rows, b->rows);
    assert_int_equal(a->cols, b->cols);
    assert_true(a->cols <= 256);
    for (int64_t r = 0; r < a->rows; r++) {
        moec_weight_read(x, a->cols, a, r, 1, 0, a->cols);
        moec_weight_read(y, a->cols, b, r, 1, 0, a->cols);
        assert_memory_equal(x, y, (size_t)a->cols * sizeof *x);
    }
}

float forms_value(const moec_tensor *t, int64_t i)
{
    float v;
    const size_t size = (size_t)moec_dtypes[t->dtype].bytes;
    moec_dtypes[t->dtype].to_f32(&v, (const char *)t->data + (size_t)i * size, 1);
    return v;
}

/* A set before and after, and the new numbers of its experts. */
typedef struct pair {
    const moec_model *m;
    const moec_plan *p;
    int64_t set;
} pair;

/* n values of each expert. */
static void same_parts(const moec_tensor *a, const moec_tensor *b, const pair *x, int64_t n)
{
    const moec_plan_layer *l = &x->p->layer[x->set];
    assert_int_equal(!a, !b);
    for (int64_t k = 0; a && k < l->n_keep; k++)
        for (int64_t i = 0; i < n; i++)
            assert_true(forms_value(a, l->keep[k] * n + i) ==
                        forms_value(b, moec_plan_number(x->p, x->m, x->set, l->keep[k]) * n + i));
}

static void same_layer(const moec_layer *a, const moec_layer *b, const pair *x)
{
    const moec_dims *d = &x->m->dims;
    const moec_plan_layer *l = &x->p->layer[x->set];
    same_parts(a->mat[MOEC_MAT_ROUTER].of, b->mat[MOEC_MAT_ROUTER].of, x, a->mat[MOEC_MAT_ROUTER].cols);
    same_parts(a->bias[MOEC_MAT_ROUTER], b->bias[MOEC_MAT_ROUTER], x, 1);
    same_parts(a->vec[MOEC_VEC_SELECTION_BIAS], b->vec[MOEC_VEC_SELECTION_BIAS], x, 1);
    same_parts(a->gate_up_bias, b->gate_up_bias, x, 2 * d->expert_width);
    same_parts(a->down_bias, b->down_bias, x, d->hidden);
    for (int64_t k = 0; k < l->n_keep; k++) {
        const moec_mlp *was = &a->expert[l->keep[k]], *is = &b->expert[moec_plan_number(x->p, x->m, x->set, l->keep[k])];
        same_view(&was->gate, &is->gate);
        same_view(&was->up, &is->up);
        same_view(&was->down, &is->down);
    }
}

/* Source's number of row or column k of the output, experts that always stay included. */
static int64_t was(const moec_plan_layer *l, int64_t k)
{
    return k < l->n_keep ? l->keep[k] : k - l->n_keep + l->n_experts;
}

/* What stands behind the experts stays, and of what a layer gets from the one before the columns are that one's experts. */
static void same_tail(const moec_layer *a, const moec_layer *b, const pair *x)
{
    const moec_family *f = x->m->family;
    const moec_weight *from = &a->mat[MOEC_MAT_ROUTER_MAP], *to = &b->mat[MOEC_MAT_ROUTER_MAP];
    const moec_plan_layer *l = &x->p->layer[x->set], *before = &x->p->layer[x->set > 0 ? x->set - 1 : 0];
    if (f->n_tail == 0)
        return;
    same_view(&a->mat[MOEC_MAT_ROUTER_NULL], &b->mat[MOEC_MAT_ROUTER_NULL]);
    same_view(&a->mat[MOEC_MAT_ROUTER_IN], &b->mat[MOEC_MAT_ROUTER_IN]);
    assert_int_equal(to->rows, l->n_keep + f->n_tail);
    for (int64_t r = 0; r < to->rows; r++)
        for (int64_t c = 0; c < to->cols; c++)
            assert_true(forms_value(to->of, r * to->cols + c) ==
                        forms_value(from->of, was(l, r) * from->cols + was(before, c)));
    for (int i = 0; i < f->n_tail; i++) {
        assert_int_equal(!a->constant[i], !b->constant[i]);
        for (int64_t j = 0; a->constant[i] && j < x->m->dims.hidden; j++)
            assert_true(forms_value(a->constant[i], j) == forms_value(b->constant[i], j));
        for (int64_t j = 0; a->constant_mix[i] && j < 2 * x->m->dims.hidden; j++)
            assert_true(forms_value(a->constant_mix[i], j) == forms_value(b->constant_mix[i], j));
    }
}

/* Through the model's own eyes: every kept expert is the source's under its new number, in every set. */
void forms_same_experts(const moec_model *m, const moec_model *o, const moec_plan *p)
{
    assert_int_equal(o->sets, p->n_sets);
    assert_int_equal(o->dims.experts, moec_plan_experts(p));
    for (int64_t s = 0; s < p->n_sets; s++) {
        const moec_plan_layer *l = &p->layer[s];
        const moec_layer *a = moec_set_layer(m, s), *b = moec_set_layer(o, s);
        const pair x = {.m = m, .p = p, .set = s};
        if (l->kind != MOEC_SET_HEADS) {
            same_layer(a, b, &x);
            same_tail(a, b, &x);
            continue;
        }
        const int64_t n = m->dims.hidden * m->dims.kv_heads * m->dims.head_dim;
        same_parts(a->mat[MOEC_MAT_HEADS_ROUTER].of, b->mat[MOEC_MAT_HEADS_ROUTER].of, &x, m->dims.hidden);
        same_parts(a->heads_in, b->heads_in, &x, n);
        same_parts(a->heads_out, b->heads_out, &x, n);
    }
}

/* --- checkpoints made over -------------------------------------------------------------------------------------------- */

void forms_pool_add(forms_pool *x, const char *name, moec_dtype dtype, int rank, const int64_t *dim, const void *data)
{
    moec_st_entry *e = &x->entry[x->n];
    size_t bytes = (size_t)moec_dtypes[dtype].bytes;
    *e = (moec_st_entry){.dtype = dtype, .rank = rank};
    for (int i = 0; i < rank; i++)
        bytes *= (size_t)(e->dim[i] = dim[i]);
    e->end = bytes; /* for now its length */
    assert_true(x->n < FORMS_POOL);
    assert_int_equal(moec_copy(&e->name, name, strlen(name), NULL), MOEC_OK);
    assert_int_equal(moec_copy((char **)&x->data[x->n++], data, bytes, NULL), MOEC_OK);
}

/* All of the source but tensors whose name has `without`. */
forms_pool *forms_pool_of(const char *without)
{
    forms_pool *x;
    moec_model *m = forms_open_dir(forms_source);
    assert_int_equal(MOEC_NEW(x, 1, NULL), MOEC_OK);
    for (size_t i = 0; i < moec_ckpt_count(m->ckpt); i++) {
        const moec_tensor *t = moec_ckpt_at(m->ckpt, i);
        if (!without || !strstr(t->name, without))
            forms_pool_add(x, t->name, t->dtype, t->rank, t->dim, t->data);
    }
    const char *text = moec_ckpt_config_text(m->ckpt);
    assert_int_equal(moec_copy(&x->config, text, strlen(text), NULL), MOEC_OK);
    moec_model_close(m);
    return x;
}

/* "key": value in front of the others of the config. */
void forms_pool_key(forms_pool *x, const char *text)
{
    char *next;
    assert_int_equal(moec_format(&next, NULL, "{%s,%s", text, strchr(x->config, '{') + 1), MOEC_OK);
    moec_free(x->config);
    x->config = next;
}

void forms_pool_edit(forms_pool *x, const char *key, const char *with)
{
    char *next;
    assert_int_equal(moec_json_edit(&next, x->config, key, with, NULL), MOEC_OK);
    moec_free(x->config);
    x->config = next;
}

/* Writes the source anew and frees the pool. */
void forms_pool_write(forms_pool *x)
{
    char *header, *bytes, *path = tiny_path(forms_source, "model.safetensors");
    size_t len, at = 0;
    for (size_t i = 0; i < x->n; i++) {
        x->entry[i].begin = at;
        x->entry[i].end += at;
        at = (size_t)x->entry[i].end;
    }
    assert_int_equal(moec_st_header(&header, &len, x->entry, x->n, NULL, NULL), MOEC_OK);
    assert_int_equal(MOEC_NEW(bytes, len + at, NULL), MOEC_OK);
    memcpy(bytes, header, len);
    for (size_t i = 0; i < x->n; i++) {
        memcpy(bytes + len + x->entry[i].begin, x->data[i], (size_t)(x->entry[i].end - x->entry[i].begin));
        moec_free(x->entry[i].name);
        moec_free(x->data[i]);
    }
    assert_int_equal(moec_file_write(path, bytes, len + at, NULL), MOEC_OK);
    moec_free(path);
    path = tiny_path(forms_source, "config.json");
    assert_int_equal(moec_file_write(path, x->config, strlen(x->config), NULL), MOEC_OK);
    moec_free(path);
    moec_free(bytes);
    moec_free(header);
    moec_free(x->config);
    moec_free(x);
}

int64_t forms_config_int(const moec_model *m, const char *path)
{
    int64_t v = -1;
    moec_json_int(moec_json_path(moec_ckpt_config(m->ckpt), path), &v);
    return v;
}

void forms_check_dead(const moec_model *o, const moec_plan *p)
{
    for (int64_t s = 0; s < p->n_sets; s++) {
        const moec_layer *l = moec_set_layer(o, s);
        int64_t dead = 0;
        for (int64_t e = 0; e < p->pad; e++) {
            float row[256];
            if (moec_slots_kept(moec_plan_slots(p, o, s), e) >= 0)
                continue;
            dead++;
            const moec_tensor *bar = l->vec[MOEC_VEC_SELECTION_BIAS] ? l->vec[MOEC_VEC_SELECTION_BIAS] : l->bias[MOEC_MAT_ROUTER];
            const moec_weight *w[] = {&l->expert[e].gate, &l->expert[e].up, &l->expert[e].down};
            assert_true(fabsf(forms_value(bar, e) + 1e4f) < 20.0f);
            for (int64_t c = 0; c < o->dims.hidden; c++)
                assert_true(forms_value(l->mat[MOEC_MAT_ROUTER].of, e * o->dims.hidden + c) == 0.0f);
            for (size_t k = 0; k < MOEC_COUNT(w); k++)
                for (int64_t r = 0; r < w[k]->rows; r++) {
                    moec_weight_read(row, w[k]->cols, w[k], r, 1, 0, w[k]->cols);
                    for (int64_t c = 0; c < w[k]->cols; c++)
                        assert_true(row[c] == 0.0f);
                }
        }
        assert_int_equal(dead, p->pad - p->layer[s].n_keep);
    }
}
