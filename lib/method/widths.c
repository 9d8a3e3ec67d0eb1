/* Widths from a method and a budget: items, their sizes, and what is asked of all methods; see widths.h. */
#include "method/widths_parts.h"

#include "base/mem.h"

#include <math.h>
#include <stdio.h>

const char *moec_widths_grain_name(moec_widths_grain g)
{
    static const char *const names[] = {"expert", "projection", "layer", "layer-projection", "model"};
    return names[g];
}

bool moec_widths_gains(const moec_method *me)
{
    const moec__widths_row *row = me->row;
    return row->gains;
}

moec_widths_grain moec_widths_finest(const moec_method *me)
{
    const moec__widths_row *row = me->row;
    return row->whole ? MOEC_WIDTHS_EXPERT : row->costs || row->importance ? MOEC_WIDTHS_PROJECTION : MOEC_WIDTHS_MODEL;
}

moec_rounding moec_widths_rounding(const moec_method *me)
{
    return ((const moec__widths_row *)me->row)->rounding;
}

int64_t moec__item_of(const moec__items *x, int64_t layer, int64_t expert, int64_t matrix)
{
    switch (x->r->grain) {
    case MOEC_WIDTHS_EXPERT: return layer * x->experts + expert;
    case MOEC_WIDTHS_PROJECTION: return (layer * x->experts + expert) * 3 + matrix;
    case MOEC_WIDTHS_LAYER: return layer;
    case MOEC_WIDTHS_LAYER_PROJECTION: return layer * 3 + matrix;
    default: return 0;
    }
}

/* ---- what is asked ------------------------------------------------------------------------------------------------------- */

static void list_widths(char *text, size_t size, const moec_widths_request *r)
{
    size_t at = 0;
    text[0] = '\0';
    for (int i = 0; i < r->n_widths && at < size; i++)
        at += (size_t)snprintf(text + at, size - at, "%s%d", i ? ", " : "", r->width[i]);
}

static moec_status check(const moec_method *me, const moec_widths_request *r, moec_err *err)
{
    char text[80];
    if (me->kind != MOEC_QUANTIZE)
        return moec_fail(err, MOEC_EINVAL, "method %s chooses no widths", me->name);
    if (r->n_widths < 1 || r->n_widths > MOEC_WIDTHS_MOST)
        return moec_fail(err, MOEC_EINVAL, "%d candidate widths, expected 1 to %d", r->n_widths, MOEC_WIDTHS_MOST);
    for (int i = 0; i < r->n_widths; i++)
        if (r->width[i] < 1 || (r->width[i] > MOEC_QUANT_BITS && r->width[i] != 16) || (i > 0 && r->width[i] <= r->width[i - 1]))
            return moec_fail(err, MOEC_EINVAL, "candidate widths: %d, expected 1 to %d or 16, ascending", r->width[i], MOEC_QUANT_BITS);
    if (!isfinite(r->bits) || r->bits < 0.0 || (r->bits > 0.0) == (r->budget > 0))
        return moec_fail(err, MOEC_EINVAL, "how large experts may get: give either an average width (--bits) or a size (--target-size)");
    if (r->bits > (double)r->width[r->n_widths - 1]) {
        list_widths(text, sizeof text, r);
        return moec_fail(err, MOEC_EINVAL, "--bits %g: the widths to choose from are %s", r->bits, text);
    }
    return moec_method_check_stats(me, r->q, err);
}

/* ---- items --------------------------------------------------------------------------------------------------------------- */

static moec_status add_size(int64_t *to, uint64_t more, moec_err *err)
{
    return __builtin_add_overflow(*to, more, to) ? moec_fail(err, MOEC_ENOFIT, "experts of more than 2^63 bytes") : MOEC_OK;
}

static moec_status new_items(moec__items *x, const moec_method *me, const moec_widths_request *r, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_dims *d = &r->q->model->dims;
    const moec_guard *guard = r->q->guard;
    *x = (moec__items){.me = me, .r = r, .layers = r->q->model->moe_layers, .experts = d->experts, .cost = (double)NAN,
                       .bound = (double)NAN};
    const uint64_t weights = (uint64_t)d->expert_width * (uint64_t)d->hidden; /* of each matrix; bounded by the config reader */
    const size_t widths = (size_t)r->n_widths;
    x->n = moec__item_of(x, x->layers - 1, x->experts - 1, 2) + 1;
    MOEC_TRY(MOEC_NEW(x->size, (size_t)x->n * widths, err));
    MOEC_TRY(MOEC_NEW(x->layer, (size_t)x->n, err));
    MOEC_TRY(MOEC_NEW(x->guarded, (size_t)x->n, err));
    MOEC_TRY(MOEC_NEW(x->pick, (size_t)x->n, err));
    int64_t all = 0;
    for (int64_t l = x->layers - 1; l >= 0; l--)
        for (int64_t e = 0; e < x->experts; e++)
            for (int64_t p = 0; p < 3; p++) {
                const int64_t i = moec__item_of(x, l, e, p);
                x->layer[i] = l;
                x->guarded[i] |= guard && guard->flag && guard->flag[l * x->experts + e];
                for (size_t b = 0; b < widths; b++)
                    MOEC_TRY(add_size(&x->size[(size_t)i * widths + b],
                                      r->bits > 0.0 ? weights * (uint64_t)r->width[b] : r->bytes[(size_t)p * widths + b], err));
                MOEC_TRY(add_size(&all, weights, err));
            }
    if (r->bits > 0.0)
        x->budget = (int64_t)floor(r->bits * (double)all * (1.0 + 1e-12)); /* what 2.1 loses as a binary fraction */
    else
        x->budget = r->budget > INT64_MAX ? INT64_MAX : (int64_t)r->budget;
done:
    return st;
}

static void release_items(moec__items *x)
{
    moec_free(x->size);
    moec_free(x->layer);
    moec_free(x->guarded);
    moec_free(x->pick);
}

/* Is the budget no less than what is possible? by_layer: every layer has an even part of it. */
static moec_status check_least(const moec__items *x, bool by_layer, moec_err *err)
{
    int64_t least = 0, part = 0;
    for (int64_t i = 0; i < x->n; i++) {
        int64_t size = INT64_MAX;
        for (int b = x->guarded[i] ? x->r->n_widths - 1 : 0; b < x->r->n_widths; b++)
            size = x->size[i * x->r->n_widths + b] < size ? x->size[i * x->r->n_widths + b] : size;
        part = by_layer && i > 0 && x->layer[i] == x->layer[i - 1] ? part : by_layer ? 0 : part;
        if (__builtin_add_overflow(part, size, &part))
            return moec_fail(err, MOEC_ENOFIT, "experts of more than 2^63 bytes");
        least = part > least ? part : least;
    }
    if (least <= x->budget / (by_layer ? x->layers : 1))
        return MOEC_OK;
    const double need = (double)least * (by_layer ? (double)x->layers : 1.0);
    const char *why = x->r->q->guard && x->r->q->guard->count > 0 ? " with the experts that are protected" : "";
    const moec_dims *d = &x->r->q->model->dims;
    if (x->r->bits > 0.0)
        return moec_fail(err, MOEC_ENOFIT, "--bits %g: the least that is possible%s is %.4f", x->r->bits, why,
                         ceil(1e4 * need / (3.0 * (double)d->hidden * (double)d->expert_width * (double)(x->layers * x->experts))) * 1e-4);
    return moec_fail(err, MOEC_ENOFIT, "%llu bytes for the routed experts: the least that is possible%s is %.0f",
                     (unsigned long long)x->r->budget, why, need);
}

int64_t moec__widths_largest(const moec__items *x)
{
    const int64_t widths = x->r->n_widths;
    for (int64_t b = widths - 1; b >= 0; b--) {
        int64_t all = 0;
        bool fits = true;
        for (int64_t i = 0; i < x->n && fits; i++)
            fits = !__builtin_add_overflow(all, x->size[i * widths + (x->guarded[i] ? widths - 1 : b)], &all) && all <= x->budget;
        if (fits)
            return b;
    }
    return -1;
}

/* ---- uniform -------------------------------------------------------------------------------------------------------------- */

static moec_status uniform(moec__items *x, moec_err *err)
{
    const moec_widths_request *r = x->r;
    int64_t to = -1;
    int below = 0;
    char text[80];
    for (int b = 0; r->bits > 0.0 && b < r->n_widths; b++) {
        if (fabs((double)r->width[b] - r->bits) < 1e-9)
            to = b;
        if ((double)r->width[b] < r->bits)
            below = b;
    }
    if (r->bits > 0.0 && to < 0) {
        list_widths(text, sizeof text, r);
        if (r->bits < (double)r->width[0])
            return moec_fail(err, MOEC_ENOFIT, "--bits %g: the least that is possible is %d", r->bits, r->width[0]);
        if (r->bits == floor(r->bits))
            return moec_fail(err, MOEC_EINVAL, "--bits %g: method %s has one width, of %s; --widths %g offers this one where the format has it",
                             r->bits, x->me->name, text, r->bits);
        return moec_fail(err, MOEC_EINVAL, "--bits %g: method %s has one width, of %s; %d and %d are nearest, and an average in between "
                         "is for methods that mix widths, such as direct", r->bits, x->me->name, text, r->width[below],
                         r->width[below + 1]);
    }
    if (!(r->bits > 0.0) && (to = moec__widths_largest(x)) < 0)
        return check_least(x, false, err);
    for (int64_t i = 0; i < x->n; i++)
        x->pick[i] = x->guarded[i] ? r->n_widths - 1 : to;
    return MOEC_OK;
}

/* ---- all ------------------------------------------------------------------------------------------------------------------ */

static moec_status take_picks(moec_widths *out, const moec__items *x, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t cells = x->layers * x->experts * 3, widths = x->r->n_widths;
    double bits = 0.0;
    int64_t bytes = 0;
    MOEC_TRY(MOEC_NEW(out->bits, (size_t)cells, err));
    for (int64_t c = 0; c < cells; c++) {
        const int64_t b = x->pick[moec__item_of(x, c / 3 / x->experts, c / 3 % x->experts, c % 3)];
        out->bits[c] = (uint8_t)x->r->width[b];
        bits += x->r->width[b];
        if (x->r->bytes)
            MOEC_TRY(add_size(&bytes, x->r->bytes[c % 3 * widths + b], err));
    }
    out->mean = bits / (double)cells; /* gate, up and down are of one size */
    out->bytes = (uint64_t)bytes;
    out->cost = x->cost;
    out->bound = x->bound;
    out->proven = x->proven;
done:
    return st;
}

moec_status moec_widths_solve(moec_widths *out, const moec_method *me, const moec_widths_request *r, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec__items x = {.n = 0};
    *out = (moec_widths){.bits = NULL};
    MOEC_TRY(check(me, r, err));
    const moec__widths_row *row = me->row;
    const bool by_matrix = r->grain == MOEC_WIDTHS_PROJECTION || r->grain == MOEC_WIDTHS_LAYER_PROJECTION;
    if (row->whole && by_matrix)
        MOEC_TRY(moec_fail(err, MOEC_EINVAL, "method %s knows errors of whole experts, not of gate, up and down apart; method direct does",
                           me->name));
    MOEC_TRY(new_items(&x, me, r, err));
    if (!row->costs && !row->importance) {
        MOEC_TRY(uniform(&x, err));
    } else {
        MOEC_TRY(check_least(&x, row->by_layer && r->grain == MOEC_WIDTHS_EXPERT, err));
        MOEC_TRY((row->costs ? moec__widths_program : moec__widths_ranked)(&x, row, err));
    }
    MOEC_TRY(take_picks(out, &x, err));
done:
    release_items(&x);
    if (st != MOEC_OK)
        moec_widths_release(out);
    return moec_within(err, st, "widths");
}

void moec_widths_release(moec_widths *w)
{
    moec_free(w->bits);
    *w = (moec_widths){.bits = NULL};
}
