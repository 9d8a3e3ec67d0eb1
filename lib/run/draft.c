/* See draft.h. */
#include "run/draft.h"

#include "base/file.h"
#include "base/log.h"
#include "base/mem.h"

#include <string.h>

/* One set of a plan, and the tensors of its output in question. */
typedef struct builder {
    const moec_model *m;
    const moec_plan *p;
    const moec_forms *forms;
    const moec_layer *l;
    int64_t set;
    uint32_t parts;
    size_t *source;      /* [n] tensors of the checkpoint, */
    moec_tensor *tensor; /* [n] and of the output; names are this builder's */
    char **name;
    size_t n, cap;
} builder;

static void release(builder *b)
{
    moec_names_free(b->name, b->n);
    moec_free(b->source);
    moec_free(b->tensor);
}

static moec_status add(builder *b, size_t i, moec_fate f, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_cast *c = &b->forms->cast[i];
    size_t caps[3] = {b->cap, b->cap, b->cap};
    MOEC_TRY(MOEC_GROW(b->source, caps[0], b->n + 1, err));
    MOEC_TRY(MOEC_GROW(b->tensor, caps[1], b->n + 1, err));
    MOEC_TRY(MOEC_GROW(b->name, caps[2], b->n + 1, err));
    b->cap = caps[0];
    if (c->dtype != MOEC_F32 && c->dtype != MOEC_BF16 && c->dtype != MOEC_F16)
        return moec_fail(err, MOEC_EINVAL, "tensor %s is %s, which cannot be written anew; --dtype bf16 makes it plain",
                         moec_ckpt_at(b->m->ckpt, i)->name, moec_dtypes[c->dtype].name);
    moec_tensor *t = &b->tensor[b->n];
    *t = (moec_tensor){.dtype = c->dtype, .rank = c->rank};
    moec_fate_shape(t->dim, b->p, b->m, b->forms, i, f);
    t->bytes = (size_t)moec_dtypes[c->dtype].bytes;
    for (int k = 0; k < c->rank; k++)
        t->bytes *= (size_t)t->dim[k]; /* at most what the source has */
    MOEC_TRY(moec_fate_name(&b->name[b->n], b->m, b->forms, i, f.number, err));
    t->name = b->name[b->n];
    b->source[b->n++] = i;
done:
    return st;
}

static moec_status collect(builder *b, moec_err *err)
{
    moec_status st = MOEC_OK;
    for (size_t i = 0; st == MOEC_OK && i < b->forms->n; i++) {
        const moec_place *at = &b->forms->place[i];
        if (at->role == MOEC_ROLE_OTHER || at->set != b->set || !(at->parts & b->parts))
            continue;
        const moec_fate f = moec_plan_fate(b->p, b->m, b->forms, i);
        if (!f.dropped)
            st = add(b, i, f, err);
    }
    return st;
}

/* --- bytes ----------------------------------------------------------------------------------------------------------- */

static moec_status bytes_of(unsigned char *out, const builder *b, size_t i, uint64_t at, uint64_t n, moec_err *err)
{
    moec_cast *c = &b->forms->cast[i];
    if (c->made)
        return moec_cast_make(out, c, at, (size_t)n, err);
    return moec_ckpt_read(out, b->m->ckpt, moec_ckpt_at(b->m->ckpt, i), (size_t)at, (size_t)n, err);
}

/* What the source has, in the order of the output; the bytes that layout.c makes of what is not changed. */
static moec_status fill(const builder *b, size_t k, unsigned char *out, moec_err *err)
{
    moec_status st = MOEC_OK;
    const size_t i = b->source[k];
    const moec_fate f = moec_plan_fate(b->p, b->m, b->forms, i);
    unsigned char dead[8];
    const size_t value = moec_dead_bytes(dead, b->forms->cast[i].dtype, b->forms->dead[i]);
    for (uint64_t at = 0, from, n; st == MOEC_OK && at < b->tensor[k].bytes; at += n) {
        if (moec_fate_source(&from, &n, b->forms, i, f, at)) {
            st = bytes_of(out + at, b, i, from, n, err);
            continue;
        }
        for (uint64_t to = at; to < at + n; to += value)
            memcpy(out + to, dead, value);
    }
    return st;
}

/* --- views ----------------------------------------------------------------------------------------------------------- */

/* Expert number j of a stack, or the whole of an expert's own tensor. H and I are those of the output. */
static moec_weight view(moec_expert_layout layout, uint32_t part, const moec_tensor *t, int64_t j, int64_t H, int64_t I)
{
    const bool down = part == MOEC_PART_DOWN, up = part == MOEC_PART_UP;
    moec_weight w = {.of = t, .rows = down ? H : I, .cols = down ? I : H, .col_step = 1, .storage = MOEC_PLAIN};
    switch (layout) {
    case MOEC_LAYOUT_SPLIT:
        w.row_step = w.cols;
        w.at = up && t->dim[0] == 2 * I ? I * H : 0; /* with the gate in one */
        break;
    case MOEC_LAYOUT_OUT_IN:
        w.row_step = w.cols;
        w.at = down ? j * H * I : (2 * j + up) * I * H;
        break;
    case MOEC_LAYOUT_IN_OUT:
        w.row_step = 1;
        w.col_step = down ? H : 2 * I;
        w.at = down ? j * H * I : j * 2 * I * H + up * I;
        break;
    case MOEC_LAYOUT_IN_OUT_PAIRS:
    case MOEC_LAYOUT_MXFP4_PAIRS: /* cast, they are the former */
        w.row_step = down ? 1 : 2;
        w.col_step = down ? H : 2 * I;
        w.at = down ? j * H * I : j * 2 * I * H + up;
        break;
    case MOEC_LAYOUT_FLAT:
        w.row_step = down ? 1 : H;
        w.col_step = down ? H : 1;
        w.at = j * I * H;
        break;
    }
    return w;
}

static moec_weight *slot_of(moec_mlp *e, uint32_t part)
{
    return part == MOEC_PART_GATE ? &e->gate : part == MOEC_PART_UP ? &e->up : &e->down;
}

/* `t`: the output's tensors, whose data is there now. */
static moec_status views(moec_draft *d, const builder *b, const moec_tensor *const *t, moec_err *err)
{
    moec_status st = MOEC_OK;
    static const uint32_t matrices[] = {MOEC_PART_GATE, MOEC_PART_UP, MOEC_PART_DOWN};
    const moec_plan_layer *pl = &b->p->layer[b->set];
    const int64_t H = b->m->dims.hidden, I = b->p->width > 0 ? b->p->width : b->m->dims.expert_width;
    d->n_keep = pl->n_keep;
    MOEC_TRY(MOEC_NEW(d->row, (size_t)pl->n_experts, err));
    for (int64_t e = 0; e < pl->n_experts; e++)
        d->row[e] = (int32_t)moec_plan_number(b->p, b->m, b->set, e);
    MOEC_TRY(MOEC_NEW(d->expert, (size_t)pl->n_keep, err));
    for (int64_t k = 0; k < pl->n_keep; k++)
        d->expert[k] = b->l->expert[pl->keep[k]];
    for (size_t i = 0; i < b->n; i++) {
        const moec_place *at = &b->forms->place[b->source[i]];
        if (at->parts & MOEC_PART_ROUTER) {
            d->router = moec_weight_of(t[i]);
            continue;
        }
        const bool stack = at->role == MOEC_ROLE_STACK,
                   vector = t[i]->rank < 2 + stack && b->l->layout != MOEC_LAYOUT_FLAT; /* a bias */
        if (vector)
            *(at->parts & MOEC_PART_GATE ? &d->gate_up_bias : &d->down_bias) = t[i];
        for (size_t q = 0; q < MOEC_COUNT(matrices) && !vector; q++)
            for (int64_t k = 0; (at->parts & matrices[q]) && k < pl->n_keep; k++)
                if (stack || at->expert == pl->keep[k]) {
                    moec_weight *w = slot_of(&d->expert[k], matrices[q]);
                    *w = view(b->l->layout, matrices[q], t[i], moec_plan_number(b->p, b->m, b->set, pl->keep[k]), H, I);
                    MOEC_TRY(moec_within(err, moec_weight_check(w, err), "tensor %s", t[i]->name));
                }
    }
done:
    return st;
}

/* Which tensors there are, and room for pointers to them; `end` releases both, whatever became of it. */
static moec_status begin(builder *b, const moec_tensor ***t, moec_draft *out, moec_err *err)
{
    moec_status st = MOEC_OK;
    *out = (moec_draft){0};
    *t = NULL;
    b->l = moec_set_layer(b->m, b->set);
    MOEC_TRY(collect(b, err));
    MOEC_TRY(MOEC_NEW(*t, b->n, err));
done:
    return st;
}

static moec_status end(builder *b, const moec_tensor **t, moec_draft *out, moec_status st)
{
    moec_free(t);
    release(b);
    if (st != MOEC_OK)
        moec_draft_release(out);
    return st;
}

moec_status moec_draft_new(moec_draft *out, const moec_override *weights, const char *file, const moec_model *m,
                           const moec_plan *p, const moec_forms *forms, int64_t set, uint32_t parts, moec_err *err)
{
    moec_status st = MOEC_OK;
    builder b = {.m = m, .p = p, .forms = forms, .set = set, .parts = parts};
    const moec_tensor **t;
    MOEC_TRY(begin(&b, &t, out, err));
    MOEC_TRY(moec_sheet_new(&out->sheet, weights, file, b.tensor, b.n, err));
    for (size_t i = 0; i < b.n; i++) {
        t[i] = moec_sheet_at(out->sheet, i);
        MOEC_TRY(moec_interrupted(err));
        if (p->width == 0 || forms->place[b.source[i]].width_axis < 0) /* experts of another width have no bytes in common */
            MOEC_TRY(fill(&b, i, (unsigned char *)(uintptr_t)t[i]->data, err));
        moec_pages_drop(t[i]->data, t[i]->bytes);
    }
    MOEC_TRY(views(out, &b, t, err));
done:
    return end(&b, t, out, st);
}

moec_status moec_draft_reopen(moec_draft *out, const moec_override *weights, const moec_model *m, const moec_plan *p,
                              const moec_forms *forms, int64_t set, uint32_t parts, moec_err *err)
{
    moec_status st = MOEC_OK;
    builder b = {.m = m, .p = p, .forms = forms, .set = set, .parts = parts};
    const moec_tensor **t;
    MOEC_TRY(begin(&b, &t, out, err));
    for (size_t i = 0; i < b.n; i++) {
        const moec_tensor *want = &b.tensor[i];
        MOEC_TRY(moec_override_get(&t[i], weights, want->name, want->dtype, want->rank, want->dim, err));
    }
    MOEC_TRY(views(out, &b, t, err));
done:
    return end(&b, t, out, st);
}

moec_status moec_draft_bytes(uint64_t *all, uint64_t *largest, const moec_model *m, const moec_plan *p, const moec_forms *forms,
                             int64_t set, uint32_t parts, moec_err *err)
{
    builder b = {.m = m, .p = p, .forms = forms, .set = set, .parts = parts};
    moec_status st = collect(&b, err);
    *all = *largest = 0;
    for (size_t i = 0; st == MOEC_OK && i < b.n; i++) {
        *all += b.tensor[i].bytes;
        *largest = b.tensor[i].bytes > *largest ? b.tensor[i].bytes : *largest;
    }
    release(&b);
    return st;
}

void moec_draft_release(moec_draft *d)
{
    moec_sheet_discard(d->sheet);
    moec_free(d->expert);
    moec_free(d->row);
    *d = (moec_draft){0};
}

void moec_draft_show(moec_layer *layer, const moec_draft *d, const int32_t *keep)
{
    for (int64_t k = 0; k < d->n_keep; k++)
        layer->expert[keep[k]] = d->expert[k];
    if (d->router.of) {
        layer->mat[MOEC_MAT_ROUTER] = d->router;
        layer->router_row = d->row;
    }
    if (d->gate_up_bias) {
        layer->gate_up_bias = d->gate_up_bias;
        layer->gate_up_bias_row = d->row;
    }
    if (d->down_bias) {
        layer->down_bias = d->down_bias;
        layer->down_bias_row = d->row;
    }
}
