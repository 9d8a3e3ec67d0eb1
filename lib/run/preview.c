/* See preview.h. */
#include "run/preview.h"

#include "base/mem.h"
#include "run/format.h"

#include <string.h>

moec_status moec_preview_begin(moec_preview *out, const moec_model *m, const moec_plan *p, moec_err *err)
{
    moec_status st = MOEC_OK;
    *out = (moec_preview){.n_sets = p->n_sets};
    MOEC_TRY(moec_variant_new(&out->variant, m, err));
    MOEC_TRY(moec_forms_new(&out->forms, m, p, err));
    MOEC_TRY(MOEC_NEW(out->draft, (size_t)p->n_sets, err));
    moec_variant_top_k(out->variant, p->new_top_k);
    if (p->drop_groups)
        moec_variant_drop_groups(out->variant);
    if (p->width > 0)
        out->variant->model.dims.expert_width = p->width;
    for (int64_t i = 0; i < p->n_sets; i++)
        if (p->layer[i].kind == MOEC_SET_HEADS)
            MOEC_TRY(moec_preview_set(out, p, i, NULL, err));
done:
    return st;
}

moec_status moec_preview_set(moec_preview *v, const moec_plan *p, int64_t set, moec_draft *draft, moec_err *err)
{
    const moec_plan_layer *l = &p->layer[set];
    if (draft) {
        v->draft[set] = *draft;
        *draft = (moec_draft){0};
        if (l->kind == MOEC_SET_MOE)
            moec_draft_show(&v->variant->model.layer[l->layer], &v->draft[set], l->keep);
    }
    if (p->mapped && l->kind == MOEC_SET_MOE) { /* all rows stay, each with the expert that it leads to */
        moec_mlp *expert = v->variant->model.layer[l->layer].expert;
        for (int64_t e = 0; l->into && e < l->n_experts; e++)
            expert[e] = expert[l->into[e]]; /* which leads to itself */
        return MOEC_OK;
    }
    return l->n_keep < l->n_experts ? moec_variant_keep(v->variant, set, l->keep, l->n_keep, err) : MOEC_OK;
}

moec_status moec_preview_digest(moec_digest *out, const moec_plan *p, const moec_override *weights, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_hash *h = NULL;
    MOEC_TRY(moec_override_digest(out, weights, err));
    MOEC_TRY(moec_hash_new(&h, err));
    moec_hash_text(h, out->hex);
    for (int64_t i = 0; i < p->n_sets; i++) {
        const moec_plan_layer *l = &p->layer[i];
        if (!l->rewritten)
            continue;
        const int64_t head[] = {i, l->rewritten, l->n_keep};
        moec_hash_add(h, head, sizeof head);
        moec_hash_add(h, l->keep, (size_t)l->n_keep * sizeof *l->keep);
        if (p->mapped && l->into)
            moec_hash_add(h, l->into, (size_t)l->n_experts * sizeof *l->into);
    }
    if (p->factor.kind != MOEC_FACTOR_NONE) { /* whether factors are written or products does not matter */
        const moec_plan_factor *f = &p->factor;
        const int64_t form[] = {(int64_t)f->kind, f->rank[0], f->rank[1], f->rows[0], f->rows[1], f->cores};
        moec_hash_add(h, form, sizeof form);
        moec_hash_add(h, f->bond, sizeof f->bond);
    }
    if (p->quant.format[0]) { /* packed and dense are other tensors anyway */
        const moec_plan_quant *q = &p->quant;
        const int64_t form[] = {q->group, q->zeros, (int64_t)q->scale_type};
        moec_hash_add(h, form, sizeof form);
        moec_hash_add(h, q->expert, (size_t)(p->n_layers * p->layer[0].n_experts * 3));
        for (int64_t i = 0; q->mat && i < q->n_mat_layers * MOEC_MAT_COUNT; i++)
            if (q->mat[i] != 0 && q->mat[i] != 16) {
                const int64_t one[] = {i, q->mat[i]};
                moec_hash_add(h, one, sizeof one);
            }
    }
    *out = moec_hash_digest(h);
done:
    moec_hash_free(h);
    return st;
}

moec_status moec_preview_check(const moec_plan *p, const moec_override *weights, moec_err *err)
{
    moec_digest have = {""};
    if (!p->weights[0])
        return MOEC_OK;
    if (!weights)
        return moec_fail(err, MOEC_EFORMAT, "the plan has fitted weights (digest %s), and they are not here", p->weights);
    moec_status st = moec_preview_digest(&have, p, weights, err);
    if (st == MOEC_OK && strcmp(have.hex, p->weights) != 0)
        st = moec_fail(err, MOEC_EFORMAT, "the fitted weights have digest %s, the plan says %s: they are damaged, of another run, "
                       "or the plan's keep lists were edited (fitted weights belong to the experts they were fitted for)",
                       have.hex, p->weights);
    return st;
}

/* Weights that a plan rewrites and that a variant takes from the source all the same. */
static moec_status check_shown(const moec_plan *p, moec_err *err)
{
    for (int64_t i = 0; i < p->n_sets; i++) {
        const moec_plan_layer *l = &p->layer[i];
        const uint32_t biases = l->rewritten & (MOEC_PART_ROUTER_BIAS | MOEC_PART_SELECTION_BIAS);
        if (l->kind == MOEC_SET_HEADS ? l->rewritten != 0 : l->kind == MOEC_SET_MOE && biases != 0)
            return moec_fail(err, MOEC_EINVAL, "%s layer %lld: the plan rewrites %s, which cannot be measured before it is applied; "
                             "eval its output", moec_set_name(l->kind), (long long)l->layer,
                             l->kind == MOEC_SET_HEADS ? "attention experts" : "biases of the router");
    }
    return MOEC_OK;
}

/* The quantized matrix of one that the preview shows: of codes a view; of a dense one the tensor in its place. */
static moec_status quantized_view(moec_weight *out, const moec_qformat *f, const moec_qmatrix *x, const moec_override *weights,
                                  moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_tensor *t[MOEC_PIECES];
    moec_piece piece[MOEC_PIECES];
    char *name = NULL;
    if (f->dense) {
        const moec_tensor *of = moec_override_find(weights, x->source->of->name);
        if (!of || of->rank != 2 || of->dim[0] != x->source->rows || of->dim[1] != x->source->cols)
            return moec_fail(err, MOEC_EFORMAT, "tensor %s is not among the weights that were computed anew", x->source->of->name);
        *out = moec_weight_of(of);
        return MOEC_OK;
    }
    const int n = f->pieces(piece, &x->grid, x->source->rows, x->source->cols);
    for (int i = 0; i < n; i++) {
        MOEC_TRY(moec_format(&name, err, "%s.%s", x->module, piece[i].suffix));
        MOEC_TRY(moec_override_get(&t[i], weights, name, piece[i].dtype, piece[i].rank, piece[i].dim, err));
        moec_free(name);
        name = NULL;
    }
    *out = moec_qformat_view(f, t, &x->grid, x->source->rows, x->source->cols);
    st = moec_weight_check(out, err);
done:
    moec_free(name);
    return st;
}

moec_status moec_preview_quantized(moec_layer *layer, const moec_model *m, const moec_plan *p, int64_t index,
                                   const moec_override *weights, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_qmatrices q;
    MOEC_TRY(moec_qmatrices_of(&q, m, p, index, err));
    for (size_t i = 0; i < q.n; i++) {
        const moec_qmatrix *x = &q.at[i];
        moec_mlp *e = x->expert >= 0 ? &layer->expert[x->expert] : NULL;
        if (e && q.format->dense)
            continue; /* the set's draft has it */
        moec_weight *to = !e ? &layer->mat[x->which] : moec_mlp_matrix(e, x->which);
        MOEC_TRY(quantized_view(to, q.format, x, weights, err));
    }
done:
    moec_qmatrices_release(&q);
    return st;
}

moec_status moec_preview_new(moec_preview *out, const moec_model *m, const moec_plan *plan, const moec_override *weights,
                             moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_draft draft = {0};
    moec_plan dense = *plan; /* what factors stand for is among the weights, too */
    const moec_plan *p = &dense;
    dense.factor.kept = false;
    MOEC_TRY(moec_preview_begin(out, m, p, err));
    MOEC_TRY(moec_preview_check(p, weights, err));
    if (p->n_drop > 0)
        MOEC_TRY(moec_fail(err, MOEC_EINVAL, "a plan that drops layers cannot be measured before it is applied; eval its output"));
    MOEC_TRY(check_shown(p, err));
    for (int64_t i = 0; i < p->n_sets; i++) {
        if (p->layer[i].kind != MOEC_SET_MOE)
            continue; /* attention experts are there already, MTP is not run */
        if (p->layer[i].rewritten)
            MOEC_TRY(moec_draft_reopen(&draft, weights, m, p, &out->forms, i, p->layer[i].rewritten, err));
        MOEC_TRY(moec_preview_set(out, p, i, p->layer[i].rewritten ? &draft : NULL, err));
    }
    for (int64_t l = 0; p->quant.format[0] && l < m->dims.layers; l++)
        MOEC_TRY(moec_preview_quantized(&out->variant->model.layer[l], m, p, l, weights, err));
done:
    moec_draft_release(&draft);
    return st;
}

void moec_preview_release(moec_preview *v)
{
    for (int64_t i = 0; v->draft && i < v->n_sets; i++)
        moec_draft_release(&v->draft[i]);
    moec_free(v->draft);
    moec_forms_release(&v->forms);
    moec_variant_free(v->variant);
    *v = (moec_preview){0};
}
