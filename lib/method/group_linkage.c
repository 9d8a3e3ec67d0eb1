/* Groups by agglomeration; see group.h. */
#include "method/group_parts.h"

#include "base/mem.h"

#include <math.h>
#include <string.h>

typedef struct linkage {
    moec_linkage by;
    double *height;  /* [E - K] or NULL */
    int64_t unions;  /* of a block */
} linkage;

/* Groups are called by their lowest member. */
typedef struct groups {
    const moec_group_part *p;
    moec_linkage by;
    int32_t *name;  /* [n] those that are left, ascending */
    int64_t n;
    double *weight; /* [p->n] experts or mass of each */
    double *d;      /* [p->n,p->n] */
} groups;

/* Lance and Williams: the distance of c from a and b in one. */
static double united(const groups *g, int32_t a, int32_t b, int32_t c)
{
    const int64_t n = g->p->n;
    const double ac = g->d[a * n + c], bc = g->d[b * n + c], ab = g->d[a * n + b];
    const double wa = g->weight[a], wb = g->weight[b], wc = g->weight[c];
    switch (g->by) {
    case MOEC_LINK_AVERAGE: return (wa * ac + wb * bc) / (wa + wb);
    case MOEC_LINK_WARD: return ((wa + wc) * ac + (wb + wc) * bc - wc * ab) / (wa + wb + wc);
    case MOEC_LINK_COMPLETE: return ac > bc ? ac : bc;
    default: return ac < bc ? ac : bc;
    }
}

static moec_status too_large(moec_err *err)
{
    return moec_fail(err, MOEC_ENUMERIC, "distances or masses are so large that a group's are not finite; scale them down");
}

static moec_status start(groups *g, const moec_group_part *p, moec_err *err)
{
    const int64_t n = p->n;
    g->n = n;
    g->d = p->matrix;
    for (int32_t i = 0; i < n; i++) {
        g->name[i] = i;
        g->weight[i] = g->by == MOEC_LINK_WARD ? p->mass[i] : 1.0;
    }
    for (int64_t i = 0; i < n && g->by == MOEC_LINK_WARD; i++)
        for (int64_t j = i + 1; j < n; j++) {
            const double v = p->mass[i] * p->mass[j] / (p->mass[i] + p->mass[j]) * g->d[i * n + j];
            if (!isfinite(v))
                return too_large(err);
            g->d[i * n + j] = g->d[j * n + i] = v;
        }
    return MOEC_OK;
}

/* Places in g->name of the two that are nearest to each other. */
static void nearest(int64_t *first, int64_t *second, const groups *g)
{
    double least = (double)INFINITY;
    for (int64_t i = 0; i < g->n; i++)
        for (int64_t j = i + 1; j < g->n; j++) {
            const double v = g->d[g->name[i] * g->p->n + g->name[j]];
            if (v < least) {
                least = v;
                *first = i;
                *second = j;
            }
        }
}

static moec_status unite(groups *g, int64_t first, int64_t second, int32_t *label, moec_err *err)
{
    const int32_t a = g->name[first], b = g->name[second];
    const int64_t n = g->p->n;
    for (int64_t i = 0; i < g->n; i++) {
        const int32_t c = g->name[i];
        if (c == a || c == b)
            continue;
        const double v = united(g, a, b, c);
        if (!isfinite(v))
            return too_large(err);
        g->d[a * n + c] = g->d[c * n + a] = v; /* nothing of c's update with others reads it */
    }
    g->weight[a] += g->weight[b];
    for (int64_t i = 0; i < n; i++)
        label[i] = label[i] == b ? a : label[i];
    g->n--;
    memmove(g->name + second, g->name + second + 1, (size_t)(g->n - second) * sizeof *g->name);
    return MOEC_OK;
}

static moec_status agglomerate(int32_t *label, const moec_group_part *p, void *ctx, moec_err *err)
{
    const linkage *l = ctx;
    moec_status st = MOEC_OK;
    groups g = {.p = p, .by = l->by};
    double *height = l->height ? l->height + p->block * l->unions : NULL;
    MOEC_TRY(MOEC_NEW(g.name, (size_t)p->n, err));
    MOEC_TRY(MOEC_NEW(g.weight, (size_t)p->n, err));
    MOEC_TRY(start(&g, p, err));
    for (int32_t i = 0; i < p->n; i++)
        label[i] = i;
    while (g.n > p->groups) {
        int64_t first = 0, second = 1;
        nearest(&first, &second, &g);
        if (height)
            *height++ = g.d[g.name[first] * p->n + g.name[second]];
        MOEC_TRY(unite(&g, first, second, label, err));
    }
done:
    moec_free(g.weight);
    moec_free(g.name);
    return st;
}

moec_status moec_group_linkage(int32_t *centre, double *height, const moec_group_task *t, moec_linkage by, moec_err *err)
{
    linkage l = {.by = by, .height = height};
    moec_status st = moec_group_check(t, err);
    if (st != MOEC_OK)
        return st;
    l.unions = (t->n - t->keep) / t->blocks;
    if (height)
        memset(height, 0, (size_t)(t->n - t->keep) * sizeof *height);
    return moec_group_run(centre, t, &(moec_group_way){MOEC_GROUP_DISTANCE, t->distance, agglomerate, &l}, err);
}
