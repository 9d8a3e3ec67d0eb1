/* As assign.c, on lists of columns: paths by Dijkstra with a heap. Column n + i, which only row i has, stands for "none" and costs
 * more than any other change of the matching can gain, so that as few rows as possible take it. */
#include "num/assign.h"

#include "base/mem.h"
#include "num/vec.h"

#include <math.h>
#include <stdbool.h>

typedef struct lists {
    const int32_t *col;
    const float *profit;
    int64_t n, each;
    double most, none; /* cost of an edge: most - profit, at least 0; of a row's last one: none */
    int32_t *to;       /* [n] */
    int32_t *from;     /* [2n] */
    double *v, *d;     /* [2n] as in assign.c; d counts where `place` is not -1 */
    int32_t *before;   /* [2n] */
    int32_t *heap;     /* [2n] columns that are reached and not in the tree, the nearest first; of equal ones the lowest */
    int32_t *place;    /* [2n] in the heap; -1 not reached, -2 in the tree */
    int32_t *reached;  /* [2n] */
    int32_t *tree;     /* [2n] */
    int64_t heaped, count, in;
} lists;

static moec_status start(lists *s, moec_err *err)
{
    moec_status st = MOEC_OK;
    const size_t n = 2 * (size_t)s->n;
    MOEC_TRY(MOEC_NEW(s->from, n, err));
    MOEC_TRY(MOEC_NEW(s->v, n, err));
    MOEC_TRY(MOEC_NEW(s->d, n, err));
    MOEC_TRY(MOEC_NEW(s->before, n, err));
    MOEC_TRY(MOEC_NEW(s->heap, n, err));
    MOEC_TRY(MOEC_NEW(s->place, n, err));
    MOEC_TRY(MOEC_NEW(s->reached, n, err));
    MOEC_TRY(MOEC_NEW(s->tree, n, err));
    for (size_t j = 0; j < n; j++)
        s->from[j] = s->place[j] = -1;
    for (int64_t i = 0; i < s->n; i++)
        s->to[i] = -1;
done:
    return st;
}

static void release(lists *s)
{
    moec_free(s->from);
    moec_free(s->v);
    moec_free(s->d);
    moec_free(s->before);
    moec_free(s->heap);
    moec_free(s->place);
    moec_free(s->reached);
    moec_free(s->tree);
}

static bool nearer(const lists *s, int32_t a, int32_t b)
{
    return s->d[a] < s->d[b] || (s->d[a] == s->d[b] && a < b);
}

static void put(lists *s, int64_t at, int32_t j)
{
    s->heap[at] = j;
    s->place[j] = (int32_t)at;
}

static void rise(lists *s, int32_t j)
{
    int64_t at = s->place[j];
    for (; at > 0 && nearer(s, j, s->heap[(at - 1) / 2]); at = (at - 1) / 2)
        put(s, at, s->heap[(at - 1) / 2]);
    put(s, at, j);
}

static int32_t take_nearest(lists *s)
{
    const int32_t top = s->heap[0], last = s->heap[--s->heaped];
    int64_t at = 0;
    for (int64_t next = 1; next < s->heaped; next = 2 * at + 1) {
        if (next + 1 < s->heaped && nearer(s, s->heap[next + 1], s->heap[next]))
            next++;
        if (!nearer(s, s->heap[next], last))
            break;
        put(s, at, s->heap[next]);
        at = next;
    }
    if (s->heaped > 0)
        put(s, at, last);
    s->place[top] = -2;
    return top;
}

static void reach(lists *s, int64_t j, double d, int64_t row)
{
    if (s->place[j] == -2 || (s->place[j] >= 0 && !(d < s->d[j])))
        return;
    s->d[j] = d;
    s->before[j] = (int32_t)row;
    if (s->place[j] == -1) {
        s->reached[s->count++] = (int32_t)j;
        s->place[j] = (int32_t)s->heaped;
        s->heap[s->heaped++] = (int32_t)j;
    }
    rise(s, (int32_t)j);
}

/* Cost of the column that row i has. */
static double cost_of(const lists *s, int64_t i)
{
    const int32_t j = s->to[i], *col = s->col + i * s->each;
    if (j >= s->n)
        return s->none;
    int64_t lo = 0, hi = s->each - 1;
    while (lo < hi) {
        const int64_t mid = (lo + hi) / 2;
        if (col[mid] < j)
            lo = mid + 1;
        else
            hi = mid;
    }
    return s->most - (double)s->profit[i * s->each + lo];
}

static void match(lists *s, int64_t root)
{
    int64_t i = root;
    int32_t j;
    double base = 0.0;
    s->heaped = s->count = s->in = 0;
    for (;;) {
        for (int64_t k = i * s->each; k < (i + 1) * s->each; k++)
            reach(s, s->col[k], base + (s->most - (double)s->profit[k]) - s->v[s->col[k]], i);
        reach(s, s->n + i, base + s->none - s->v[s->n + i], i);
        j = take_nearest(s);
        if (s->from[j] < 0)
            break;
        s->tree[s->in++] = j;
        i = s->from[j];
        base = s->d[j] - cost_of(s, i) + s->v[j];
    }
    for (int64_t k = 0; k < s->in; k++)
        s->v[s->tree[k]] += s->d[s->tree[k]] - s->d[j];
    for (int64_t k = 0; k < s->count; k++)
        s->place[s->reached[k]] = -1;
    do {
        i = s->before[j];
        s->from[j] = (int32_t)i;
        const int32_t next = s->to[i];
        s->to[i] = j;
        j = next;
    } while (i != root);
}

moec_status moec_assign_sparse(int32_t *to, const int32_t *col, const float *profit, int64_t n, int64_t each, moec_err *err)
{
    moec_status st = MOEC_OK;
    lists s = {.col = col, .profit = profit, .n = n, .each = each, .to = to};
    double least = INFINITY, most = -INFINITY;
    if (n > INT32_MAX / 2)
        return moec_fail(err, MOEC_EINVAL, "assignment: %lld rows, at most %d", (long long)n, INT32_MAX / 2);
    for (int64_t i = 0; i < n; i++) {
        if (!moec_all_finite(profit + i * each, each))
            return moec_fail(err, MOEC_ENUMERIC, "assignment: row %lld has a profit that is not finite", (long long)i);
        for (int64_t k = i * each; k < (i + 1) * each; k++) {
            if (col[k] < 0 || col[k] >= n || (k > i * each && col[k] <= col[k - 1]))
                return moec_fail(err, MOEC_EINVAL,
                                 "assignment: row %lld has column %lld, expected ascending ones from 0 to %lld", (long long)i,
                                 (long long)col[k], (long long)n - 1);
            least = fmin(least, (double)profit[k]);
            most = fmax(most, (double)profit[k]);
        }
    }
    s.most = each > 0 ? most : 0.0;
    s.none = most > least ? ((double)n + 1.0) * (most - least) : 1.0;
    MOEC_TRY(start(&s, err));
    for (int64_t i = 0; i < n; i++)
        match(&s, i);
    for (int64_t i = 0, j = 0; i < n; i++) /* what is left over, in order */
        if (to[i] >= n) {
            while (s.from[j] >= 0)
                j++;
            to[i] = (int32_t)j++;
        }
done:
    release(&s);
    return st;
}
