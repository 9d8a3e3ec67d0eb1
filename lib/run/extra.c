/* See extra.h, and moec_extra of layout.h. */
#include "run/extra.h"

#include "base/mem.h"
#include "method/factor.h"

#include <string.h>

/* "model.layers.0.mlp.experts." of the name of an expert's or a stack's tensor: clients that rename what stands in front of experts
 * rename this, too. */
static size_t front_of(const char *name)
{
    static const char word[] = ".experts.";
    const char *at = strstr(name, word);
    return at ? (size_t)(at - name) + sizeof word - 1 : strlen(name); /* no client reads the latter: moec_factor_can_keep */
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
            *x = (moec_extra){.anchor = anchor, .set = set, .matrix = k, .piece = i};
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
    return st;
}

const moec_extra *moec_forms_extra(size_t *n, const moec_forms *f, size_t i)
{
    const moec_extra *first = NULL;
    *n = 0;
    for (size_t k = 0; k < f->n_extra; k++)
        if (f->extra[k].anchor == i) {
            first = first ? first : &f->extra[k];
            ++*n;
        }
    return first;
}
