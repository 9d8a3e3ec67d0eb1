/* See extra.h, and moec_extra of layout.h. */
#include "run/extra.h"

#include "base/mem.h"
#include "method/factor.h"
#include "run/format_parts.h"

#include <stdlib.h>
#include <string.h>

/* "model.layers.0.mlp.experts." of the name of an expert's or a stack's tensor: clients that rename what stands in front of experts
 * rename this, too. */
static size_t front_of(const char *name)
{
    static const char word[] = ".experts.";
    const char *at = strstr(name, word);
    return at ? (size_t)(at - name) + sizeof word - 1 : strlen(name); /* no client reads the latter: moec_factor_can_keep */
}

/* By the tensor that they stand for; there in the order of their making. */
static int by_anchor(const void *a, const void *b)
{
    const moec_extra *x = a, *y = b;
    return x->anchor != y->anchor ? (x->anchor > y->anchor) - (x->anchor < y->anchor) : (x->number > y->number) - (x->number < y->number);
}

static moec_status add_set(moec_forms *f, const moec_model *m, const moec_plan *p, int64_t set, size_t anchor, moec_err *err)
{
    static const char *const matrix[] = {"gate_proj", "up_proj", "down_proj"};
    moec_status st = MOEC_OK;
    const char *name = moec_ckpt_at(m->ckpt, anchor)->name;
    const size_t front = front_of(name);
    for (int k = 0; k < 3; k++) {
        const moec_factor_shape s = moec_factor_shape_of(&p->factor, m, k == 2);
        moec_factor_piece piece[MOEC_FACTOR_PIECES];
        const int n = moec_factor_pieces(piece, &s);
        for (int i = 0; i < n; i++) {
            moec_extra *x = &f->extra[f->n_extra];
            const int lead = piece[i].shared ? 0 : 1;
            *x = (moec_extra){.anchor = anchor, .number = f->n_extra, .set = set, .matrix = k, .piece = i};
            x->form.dtype = piece[i].index ? MOEC_I32 : f->cast[anchor].dtype;
            x->form.rank = piece[i].rank + lead;
            x->form.dim[0] = m->dims.experts;
            memcpy(x->form.dim + lead, piece[i].dim, (size_t)piece[i].rank * sizeof *piece[i].dim);
            x->form.bytes = (uint64_t)moec_dtypes[x->form.dtype].bytes * (uint64_t)moec_factor_piece_values(&piece[i]) *
                            (uint64_t)(lead ? m->dims.experts : 1);
            st = moec_format(&x->name, err, "%.*s%s%s%s", (int)front, name, front == strlen(name) ? "." : "", matrix[k], piece[i].suffix);
            if (st != MOEC_OK)
                return st;
            f->n_extra++;
            if ((st = moec_format(&x->key, err, "factor of %s", x->name)) != MOEC_OK)
                return st;
        }
    }
    return MOEC_OK;
}

moec_status moec__extras_new(moec_forms *f, const moec_model *m, const moec_plan *p, moec_err *err)
{
    moec_status st = MOEC_NEW(f->extra, (size_t)p->n_sets * 3 * MOEC_FACTOR_PIECES, err);
    for (int64_t set = 0; st == MOEC_OK && set < p->n_sets; set++)
        for (size_t i = 0; st == MOEC_OK && i < f->n; i++)
            if (f->place[i].role != MOEC_ROLE_OTHER && f->place[i].set == set && (f->place[i].parts & p->layer[set].rewritten) &&
                !f->cast[i].gone) {
                st = add_set(f, m, p, set, i, err);
                break;
            }
    if (st == MOEC_OK && f->n_extra > 0)
        qsort(f->extra, f->n_extra, sizeof *f->extra, by_anchor);
    return st;
}

/* --- quantized matrices ---------------------------------------------------------------------------------------------- */

/* The tensors that stand for one, where its own was. */
static moec_status add_pieces(moec_forms *f, size_t *cap, const moec_qformat *format, const moec_qmatrix *x, size_t anchor,
                              moec_err *err)
{
    moec_piece piece[MOEC_PIECES];
    const int n = format->pieces(piece, &x->grid, x->source->rows, x->source->cols);
    moec_status st = MOEC_GROW(f->extra, *cap, f->n_extra + (size_t)n, err);
    for (int i = 0; st == MOEC_OK && i < n; i++) {
        moec_extra *e = &f->extra[f->n_extra];
        *e = (moec_extra){.anchor = anchor, .number = f->n_extra++, .set = -1, .matrix = x->which, .piece = i};
        e->form.dtype = piece[i].dtype;
        e->form.rank = piece[i].rank;
        memcpy(e->form.dim, piece[i].dim, sizeof piece[i].dim);
        e->form.bytes = moec__piece_bytes(&piece[i]);
        st = moec_format(&e->name, err, "%s.%s", x->module, piece[i].suffix);
        if (st == MOEC_OK)
            st = moec_copy(&e->key, e->name, strlen(e->name), err);
    }
    return st;
}

/* What is left of the layer's experts as it is goes under the names that the format's clients know. */
static moec_status rename_rest(moec_forms *f, const moec_model *m, const moec_plan *p, const moec_qformat *format, int64_t layer,
                               moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_layer *l = &m->layer[layer];
    char *module = NULL;
    for (int64_t k = 0; l->expert && k < 3 * m->dims.experts; k++) {
        const moec_tensor *t = moec_mlp_matrix(&l->expert[k / 3], k % 3)->of;
        moec_cast *c = &f->cast[t - moec_ckpt_at(m->ckpt, 0)];
        if (p->quant.expert[l->moe_index * 3 * m->dims.experts + k] != 16 || c->name)
            continue;
        MOEC_TRY(moec_expert_module(&module, m, layer, k / 3, (int)(k % 3), format->own_names, err));
        MOEC_TRY(moec_format(&c->name, err, "%s.weight", module));
        moec_free(module);
        module = NULL;
    }
done:
    moec_free(module);
    return st;
}

moec_status moec__quant_new(moec_forms *f, const moec_model *m, const moec_plan *p, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_qmatrices q = {0};
    size_t cap = 0;
    MOEC_TRY(moec_qformat_check(p, m, err));
    MOEC_TRY(MOEC_NEW(f->anew, f->n, err));
    for (int64_t l = 0; l < m->dims.layers; l++) {
        MOEC_TRY(moec_qmatrices_of(&q, m, p, l, err));
        for (size_t i = 0; i < q.n; i++) {
            const size_t at = (size_t)(q.at[i].source->of - moec_ckpt_at(m->ckpt, 0));
            if (q.format->dense) { /* of the experts' sets the plan says it */
                f->anew[at] = q.at[i].expert < 0;
                continue;
            }
            f->cast[at].gone = true;
            MOEC_TRY(add_pieces(f, &cap, q.format, &q.at[i], at, err));
        }
        if (!q.format->dense)
            MOEC_TRY(rename_rest(f, m, p, q.format, l, err));
        moec_qmatrices_release(&q);
    }
    if (f->n_extra > 0)
        qsort(f->extra, f->n_extra, sizeof *f->extra, by_anchor);
done:
    moec_qmatrices_release(&q);
    return st;
}

const moec_extra *moec_forms_extra(size_t *n, const moec_forms *f, size_t i)
{
    size_t lo = 0, hi = f->n_extra;
    while (lo < hi) {
        const size_t mid = lo + (hi - lo) / 2;
        if (f->extra[mid].anchor < i)
            lo = mid + 1;
        else
            hi = mid;
    }
    for (*n = 0; lo + *n < f->n_extra && f->extra[lo + *n].anchor == i;)
        ++*n;
    return *n > 0 ? &f->extra[lo] : NULL;
}
