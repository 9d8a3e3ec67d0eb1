/* See group.h: what all ways of grouping have in common, and the two that join centres. */
#include "method/group_parts.h"

#include "base/mem.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* --- checks ---------------------------------------------------------------------------------------------------------- */

static bool is_fixed(const moec_group_task *t, int64_t e)
{
    return t->fixed && t->fixed[e];
}

int64_t moec_group_fixed(const moec_group_task *t, int64_t block)
{
    const int64_t width = t->n / t->blocks;
    int64_t n = 0;
    for (int64_t e = block * width; e < (block + 1) * width; e++)
        n += is_fixed(t, e);
    return n;
}

/* "3, 5, 9", cut where it gets long. */
static void name_fixed(char *out, size_t size, const moec_group_task *t, int64_t block)
{
    const int64_t width = t->n / t->blocks;
    size_t at = 0;
    *out = '\0';
    for (int64_t e = block * width; e < (block + 1) * width; e++) {
        if (!is_fixed(t, e))
            continue;
        if (at + 32 > size) {
            snprintf(out + at, size - at, ", ...");
            return;
        }
        at += (size_t)snprintf(out + at, size - at, "%s%lld", at ? ", " : "", (long long)e);
    }
}

moec_status moec_group_check(const moec_group_task *t, moec_err *err)
{
    char names[160];
    if (t->n < 1 || t->n > INT32_MAX || t->keep < 1 || t->keep > t->n)
        return moec_fail(err, MOEC_EINVAL, "%lld groups of %lld experts: 1 to as many as there are experts can be made",
                         (long long)t->keep, (long long)t->n);
    if (t->blocks < 1 || t->n % t->blocks != 0 || t->keep % t->blocks != 0)
        return moec_fail(err, MOEC_EINVAL, "%lld groups of %lld experts: both must be multiples of %lld, the router's groups",
                         (long long)t->keep, (long long)t->n, (long long)t->blocks);
    for (int64_t b = 0; b < t->blocks; b++) {
        const int64_t width = t->n / t->blocks, quota = t->keep / t->blocks, fixed = moec_group_fixed(t, b);
        if (fixed < quota || (fixed == quota && fixed == width))
            continue;
        name_fixed(names, sizeof names, t, b);
        return moec_fail(err, MOEC_EINVAL, "experts %s are groups of their own, and of their %lld are %lld groups made: none is "
                         "left for the others; keep more or protect fewer", names, (long long)width, (long long)quota);
    }
    return MOEC_OK;
}

static moec_status check_values(const moec_group_task *t, const moec_group_way *w, moec_err *err)
{
    static const char *const name[] = {[MOEC_GROUP_DISTANCE] = "distance", [MOEC_GROUP_KERNEL] = "inner product",
                                       [MOEC_GROUP_AFFINITY] = "affinity"};
    for (int64_t e = 0; e < t->n; e++)
        if (!(isfinite(t->mass[e]) && t->mass[e] >= 0.0))
            return moec_fail(err, MOEC_ENUMERIC, "the mass of expert %lld is %g: it must be finite and not below 0", (long long)e,
                             t->mass[e]);
    for (int64_t i = 0; i < t->n; i++)
        for (int64_t j = 0; j < t->n; j++) {
            const double v = w->matrix[i * t->n + j];
            if (!isfinite(v) || (v < 0.0 && (w->kind != MOEC_GROUP_KERNEL || i == j)))
                return moec_fail(err, MOEC_ENUMERIC, "the %s of experts %lld and %lld is %g: it must be finite%s",
                                 name[w->kind], (long long)i, (long long)j, v,
                                 w->kind != MOEC_GROUP_KERNEL || i == j ? " and not below 0" : "");
        }
    return MOEC_OK;
}

/* --- one block ------------------------------------------------------------------------------------------------------- */

static double apart(const moec_group_way *w, int64_t n, int64_t i, int64_t j)
{
    const double v = w->matrix[i * n + j];
    switch (w->kind) {
    case MOEC_GROUP_KERNEL: return w->matrix[i * n + i] - 2.0 * v + w->matrix[j * n + j];
    case MOEC_GROUP_AFFINITY: return -v;
    default: return v;
    }
}

/* Of each label the member of largest mass. `best` is scratch [n]. */
static void set_centres(int32_t *centre, const moec_group_part *p, const int32_t *label, int32_t *best)
{
    for (int64_t i = 0; i < p->n; i++)
        best[i] = -1;
    for (int32_t i = 0; i < p->n; i++) {
        int32_t *at = &best[label[i]];
        if (*at < 0 || p->mass[i] > p->mass[*at])
            *at = i;
    }
    for (int64_t i = 0; i < p->n; i++)
        centre[p->member[i]] = p->member[best[label[i]]];
}

static moec_status group_members(int32_t *centre, const moec_group_task *t, const moec_group_way *w, moec_group_part *p,
                                 moec_err *err)
{
    moec_status st = MOEC_OK;
    int32_t *label = NULL, *best = NULL;
    const size_t n = (size_t)p->n;
    MOEC_TRY(MOEC_NEW(label, n, err));
    MOEC_TRY(MOEC_NEW(best, n, err));
    MOEC_TRY(MOEC_NEW(p->matrix, n * n, err));
    MOEC_TRY(MOEC_NEW(p->mass, n, err));
    for (int64_t i = 0; i < p->n; i++) {
        p->mass[i] = t->mass[p->member[i]];
        for (int64_t j = 0; j < p->n; j++)
            p->matrix[i * p->n + j] = w->matrix[p->member[i] * t->n + p->member[j]];
    }
    MOEC_TRY(w->fn(label, p, w->ctx, err));
    set_centres(centre, p, label, best);
done:
    moec_free(p->mass);
    moec_free(p->matrix);
    moec_free(best);
    moec_free(label);
    return st;
}

/* Experts [first, last) that have no centre yet: as many of the lowest as groups are still to be made become one, the others
 * join the nearest that is not fixed, and has a mass where one has. */
static void place_rest(int32_t *centre, const moec_group_task *t, const moec_group_way *w, int64_t first, int64_t last,
                       int64_t to_make, bool live)
{
    for (int64_t e = first; e < last && to_make > 0; e++)
        if (centre[e] < 0) {
            centre[e] = (int32_t)e;
            to_make--;
        }
    for (int64_t e = first; e < last; e++) {
        int64_t best = -1;
        if (centre[e] >= 0)
            continue;
        for (int64_t c = first; c < last; c++)
            if (centre[c] == c && !is_fixed(t, c) && (t->mass[c] > 0.0 || !live) &&
                (best < 0 || apart(w, t->n, e, c) < apart(w, t->n, e, best)))
                best = c;
        centre[e] = (int32_t)best;
    }
}

static moec_status group_block(int32_t *centre, const moec_group_task *t, const moec_group_way *w, int64_t block,
                               int32_t *member, moec_err *err)
{
    const int64_t width = t->n / t->blocks, first = block * width, last = first + width;
    moec_group_part p = {.block = block, .member = member, .groups = t->keep / t->blocks - moec_group_fixed(t, block)};
    moec_status st = MOEC_OK;
    for (int64_t e = first; e < last; e++) {
        centre[e] = is_fixed(t, e) ? (int32_t)e : -1;
        if (!is_fixed(t, e) && t->mass[e] > 0.0)
            member[p.n++] = (int32_t)e;
    }
    if (p.n > p.groups)
        st = group_members(centre, t, w, &p, err);
    else
        for (int64_t i = 0; i < p.n; i++)
            centre[member[i]] = member[i];
    if (st == MOEC_OK)
        place_rest(centre, t, w, first, last, p.groups - p.n, p.n > 0);
    return st;
}

moec_status moec_group_run(int32_t *centre, const moec_group_task *t, const moec_group_way *w, moec_err *err)
{
    moec_status st = MOEC_OK;
    int32_t *member = NULL;
    MOEC_TRY(moec_group_check(t, err));
    MOEC_TRY(check_values(t, w, err));
    MOEC_TRY(MOEC_NEW(member, (size_t)t->n, err));
    for (int64_t b = 0; b < t->blocks; b++)
        MOEC_TRY(group_block(centre, t, w, b, member, err));
done:
    moec_free(member);
    return st;
}

/* --- joining the nearest centre -------------------------------------------------------------------------------------- */

/* Labels of the p->groups members of largest mass become their own numbers, in descending order in `order`; the others' -1. */
static void pick_centres(int32_t *label, int32_t *order, const moec_group_part *p)
{
    for (int64_t i = 0; i < p->n; i++)
        label[i] = -1;
    for (int64_t k = 0; k < p->groups; k++) {
        int32_t best = -1;
        for (int32_t i = 0; i < p->n; i++)
            if (label[i] < 0 && (best < 0 || p->mass[i] > p->mass[best]))
                best = i;
        order[k] = label[best] = best;
    }
}

static moec_status join_nearest(int32_t *label, const moec_group_part *p, void *ctx, moec_err *err)
{
    int32_t *order = NULL;
    moec_status st = MOEC_NEW(order, (size_t)p->groups, err);
    (void)ctx;
    if (st != MOEC_OK)
        return st;
    pick_centres(label, order, p);
    for (int64_t i = 0; i < p->n; i++) {
        int32_t best = -1;
        if (label[i] >= 0)
            continue;
        for (int32_t c = 0; c < p->n; c++) /* a member that has joined is no centre */
            if (label[c] == c && (best < 0 || p->matrix[i * p->n + c] < p->matrix[i * p->n + best]))
                best = c;
        label[i] = best;
    }
    moec_free(order);
    return MOEC_OK;
}

moec_status moec_group_nearest(int32_t *centre, const moec_group_task *t, moec_err *err)
{
    return moec_group_run(centre, t, &(moec_group_way){MOEC_GROUP_DISTANCE, t->distance, join_nearest, NULL}, err);
}

/* Each centre in turn takes the nearest that are free. */
static moec_status take_nearest(int32_t *label, const moec_group_part *p, void *ctx, moec_err *err)
{
    const int64_t size = *(const int64_t *)ctx;
    int32_t *order = NULL;
    moec_status st = MOEC_NEW(order, (size_t)p->groups, err);
    if (st != MOEC_OK)
        return st;
    pick_centres(label, order, p);
    for (int64_t k = 0, left = p->n - p->groups; left > 0; k++)
        for (int64_t taken = 1; taken < size && left > 0; taken++, left--) {
            const double *d = p->matrix + order[k] * p->n;
            int32_t best = -1;
            for (int32_t i = 0; i < p->n; i++)
                if (label[i] < 0 && (best < 0 || d[i] < d[best]))
                    best = i;
            label[best] = order[k];
        }
    moec_free(order);
    return MOEC_OK;
}

/* No group has more members than a block has experts. */
static int64_t size_in(const moec_group_task *t, int64_t size)
{
    return size < t->n / t->blocks ? size : t->n / t->blocks;
}

moec_status moec_group_pseudo_fits(const moec_group_task *t, int64_t size, moec_err *err)
{
    moec_status st = moec_group_check(t, err);
    if (st != MOEC_OK)
        return st;
    const int64_t width = t->n / t->blocks, quota = t->keep / t->blocks;
    size = size_in(t, size);
    for (int64_t b = 0; b < t->blocks; b++) {
        const int64_t fixed = moec_group_fixed(t, b);
        if (size < 1 || (quota - fixed) * size < width - fixed)
            return moec_fail(err, MOEC_EINVAL, "%lld groups of up to %lld do not hold %lld experts; keep more or give a larger "
                             "size", (long long)(quota - fixed), (long long)size, (long long)(width - fixed));
    }
    return MOEC_OK;
}

moec_status moec_group_pseudo(int32_t *centre, const moec_group_task *t, int64_t size, moec_err *err)
{
    moec_status st = moec_group_pseudo_fits(t, size, err);
    if (st != MOEC_OK)
        return st;
    size = size_in(t, size);
    return moec_group_run(centre, t, &(moec_group_way){MOEC_GROUP_DISTANCE, t->distance, take_nearest, &size}, err);
}
