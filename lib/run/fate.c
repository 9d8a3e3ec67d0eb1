/* What becomes of each tensor of a source under a plan: dropped, renumbered, some of its parts, dead ones added. */
#include "base/mem.h"
#include "run/extra.h"
#include "run/layout.h"

#include <string.h>

/* --- dead experts ---------------------------------------------------------------------------------------------------- */

size_t moec_dead_bytes(unsigned char out[8], moec_dtype t, moec_dead value)
{
    /* little-endian; -1e4 is -9984 in BF16, its nearest */
    static const struct {
        moec_dtype dtype;
        unsigned char one[8], bar[8];
    } rows[] = {
        {MOEC_F64, {0, 0, 0, 0, 0, 0, 0xf0, 0x3f}, {0, 0, 0, 0, 0, 0x88, 0xc3, 0xc0}},
        {MOEC_F32, {0, 0, 0x80, 0x3f}, {0, 0x40, 0x1c, 0xc6}},
        {MOEC_BF16, {0x80, 0x3f}, {0x1c, 0xc6}},
        {MOEC_F16, {0x00, 0x3c}, {0xe2, 0xf0}},
        {MOEC_F8_E8M0, {127}, {0}},
        {MOEC_U8, {127}, {0}}, /* a scale of MXFP4 */
    };
    memset(out, 0, 8);
    for (size_t i = 0; value != MOEC_DEAD_ZERO && i < MOEC_COUNT(rows); i++)
        if (rows[i].dtype == t)
            memcpy(out, value == MOEC_DEAD_ONE ? rows[i].one : rows[i].bar, 8);
    return (size_t)moec_dtypes[t].bytes;
}

static void mark(moec_forms *f, const moec_model *m, const moec_tensor *t, moec_dead value)
{
    if (t)
        f->dead[t - moec_ckpt_at(m->ckpt, 0)] = value;
}

static void mark_layer(moec_forms *f, const moec_model *m, const moec_layer *l)
{
    mark(f, m, l->vec[MOEC_VEC_SELECTION_BIAS], MOEC_DEAD_BAR);
    mark(f, m, l->bias[MOEC_MAT_ROUTER], MOEC_DEAD_BAR);
    for (int64_t e = 0; l->expert && e < m->dims.experts; e++) {
        mark(f, m, l->expert[e].gate.scale, MOEC_DEAD_ONE);
        mark(f, m, l->expert[e].up.scale, MOEC_DEAD_ONE);
        mark(f, m, l->expert[e].down.scale, MOEC_DEAD_ONE);
    }
}

/* --- forms ----------------------------------------------------------------------------------------------------------- */

moec_status moec_forms_new(moec_forms *out, const moec_model *m, const moec_plan *p, moec_err *err)
{
    moec_status st = MOEC_OK;
    *out = (moec_forms){.n = moec_ckpt_count(m->ckpt)};
    MOEC_TRY(moec_model_places(&out->place, m, err));
    MOEC_TRY(MOEC_NEW(out->dead, out->n, err));
    for (int64_t i = 0; i < m->dims.layers; i++)
        mark_layer(out, m, &m->layer[i]);
    for (int64_t i = 0; i < m->mtp_layers; i++)
        mark_layer(out, m, &m->mtp[i]);
    MOEC_TRY(MOEC_NEW(out->layer, out->n, err));
    for (size_t i = 0; i < out->n; i++) {
        const int64_t layer = out->place[i].layer;
        out->layer[i] = layer < 0 ? -1 : moec_plan_layer_number(p, layer);
        if (layer >= 0 && out->layer[i] < 0)
            out->layer[i] = -2;
    }
    MOEC_TRY(moec_casts_new(&out->cast, m, p, out->place, err));
    if (p->factor.kept)
        MOEC_TRY(moec__extras_new(out, m, p, err));
    if (p->quant.format[0])
        MOEC_TRY(moec__quant_new(out, m, p, err));
done:
    return st;
}

void moec_forms_release(moec_forms *f)
{
    moec_casts_free(f->cast, f->n);
    for (size_t i = 0; i < f->n_extra; i++) {
        moec_free(f->extra[i].name);
        moec_free(f->extra[i].key);
    }
    moec_free(f->extra);
    moec_free(f->place);
    moec_free(f->dead);
    moec_free(f->anew);
    moec_free(f->layer);
    *f = (moec_forms){0};
}

/* --- fates ----------------------------------------------------------------------------------------------------------- */

moec_fate moec_plan_fate(const moec_plan *p, const moec_model *m, const moec_forms *forms, size_t i)
{
    const moec_place *at = &forms->place[i];
    moec_fate f = {.number = -1};
    if (forms->cast[i].gone || forms->layer[i] == -2 || (at->mtp && p->mtp == MOEC_PLAN_MTP_DROP)) {
        f.dropped = true;
        return f;
    }
    f.rewritten = forms->anew && forms->anew[i];
    if (at->role == MOEC_ROLE_OTHER)
        return f;
    const moec_plan_layer *l = &p->layer[at->set];
    f.rewritten = (l->rewritten & at->parts) != 0;
    if (f.rewritten && p->factor.kept) { /* its factors stand for it */
        f.dropped = true;
        return f;
    }
    const moec_slots slots = moec_plan_slots(p, m, at->set);
    if (at->role == MOEC_ROLE_STACK) {
        const bool whole = p->mapped && (at->parts & (MOEC_PART_GATE | MOEC_PART_UP | MOEC_PART_DOWN)) == 0; /* the router's */
        if (l->n_keep < l->n_experts && !whole) {
            f.parts = l;
            f.slots = slots;
            f.across = at->across > 0 ? &p->layer[at->across - 1] : NULL;
            f.tail = at->tail;
            f.dead = p->pad > 0 ? p->pad - l->n_keep : 0;
        }
        return f;
    }
    if (at->expert >= l->n_experts) { /* one that always stays, behind the others */
        f.number = at->expert - l->n_experts + l->n_keep;
        return f;
    }
    f.number = moec_plan_number(p, m, at->set, at->expert);
    f.dropped = f.number < 0;
    if (!f.dropped && f.number % slots.size == slots.live - 1) { /* the last of its group that is kept */
        f.dead = slots.size - slots.live;
        f.first_dead = f.number + 1;
    }
    return f;
}

/* Which part of the source part k of the output is: kept ones, dead ones between or behind them, then the tail; -1: a dead one. */
static int64_t part_of(const moec_fate *f, int64_t k)
{
    const moec_plan_layer *l = f->parts;
    if (k >= l->n_keep + f->dead)
        return k - l->n_keep - f->dead + l->n_experts;
    const int64_t kept = moec_slots_kept(f->slots, k);
    return kept < 0 ? -1 : l->keep[kept];
}

/* The same of a column, among which none is dead. */
static int64_t column_of(const moec_plan_layer *l, int64_t k)
{
    return k < l->n_keep ? l->keep[k] : k - l->n_keep + l->n_experts;
}

bool moec_fate_source(uint64_t *from, uint64_t *n, const moec_forms *forms, size_t i, moec_fate f, uint64_t at)
{
    const uint64_t all = forms->cast[i].bytes;
    if (!f.parts) {
        *from = at;
        *n = all - at;
        return true;
    }
    const uint64_t part = all / (uint64_t)(f.parts->n_experts + f.tail);
    const uint64_t column = f.across ? part / (uint64_t)(f.across->n_experts + f.tail) : part;
    const uint64_t row = f.across ? column * (uint64_t)(f.across->n_keep + f.tail) : part;
    const uint64_t k = at / row, in = at - k * row, c = in / column, rest = in - c * column;
    const int64_t source = part_of(&f, (int64_t)k);
    if (source < 0) { /* to the end of its group */
        const uint64_t group = (uint64_t)f.slots.size;
        *n = (k / group + 1) * group * row - at;
        return false;
    }
    *from = (uint64_t)source * part + rest + (f.across ? (uint64_t)column_of(f.across, (int64_t)c) * column : 0);
    *n = column - rest;
    return true;
}

void moec_fate_shape(int64_t *dim, const moec_plan *p, const moec_model *m, const moec_forms *forms, size_t i, moec_fate f)
{
    const moec_cast *c = &forms->cast[i];
    const int32_t axis = forms->place[i].axis, was = forms->place[i].width_axis;
    const int32_t grows = c->turned && was > 0 ? 3 - was : was; /* of [E, in, out] instead of [E, out, in, ..] */
    memcpy(dim, c->dim, sizeof c->dim);
    if (f.parts)
        dim[axis] = (dim[axis] - f.tail) / m->dims.experts * (f.parts->n_keep + f.dead) + f.tail;
    if (f.across)
        dim[1] = f.across->n_keep + f.tail;
    if (p->width > 0 && f.rewritten && grows >= 0)
        dim[grows] = dim[grows] / m->dims.expert_width * p->width;
}

moec_status moec_fate_name(char **out, const moec_model *m, const moec_forms *forms, size_t i, int64_t number,
                           moec_err *err)
{
    const moec_tensor *t = moec_ckpt_at(m->ckpt, i);
    const moec_place *at = &forms->place[i];
    const char *name = forms->cast[i].name ? forms->cast[i].name : t->name;
    moec_status st;
    if (number >= 0 && number != at->expert)
        st = moec_model_rename_expert(out, t, *at, number, err);
    else
        st = moec_copy(out, name, strlen(name), err);
    if (st != MOEC_OK || forms->layer[i] < 0 || forms->layer[i] == at->layer)
        return st;
    char *was = *out; /* the layer's number stands in front of the expert's */
    const char *rest = was + at->layer_at;
    rest += strspn(rest, "0123456789");
    st = moec_format(out, err, "%.*s%lld%s", (int)at->layer_at, was, (long long)forms->layer[i], rest);
    moec_free(was);
    return st;
}
