/* Rows get their columns one after another. With costs c[i,j] = -profit[i,j] and a price v[j] <= 0 of each column, a matched row
 * has its column where c[i,j] - v[j] is least; a new row is matched along the shortest path of these reduced costs from it to
 * a free column, on which the matched rows pass their columns on, and the prices of the columns nearer than that fall.
 *
 * Nothing is matched before: with the loop over a row in vectors, column reduction and augmenting row reduction cost more paths
 * than they save where the rows' norms are broad, and gain little elsewhere. */
#include "num/assign.h"

#include "base/mem.h"
#include "num/vec.h"

#include <math.h>
#include <string.h>

typedef struct paths {
    const float *profit;
    int64_t n, blocks;
    int32_t *to;      /* [n] column of each row, or -1 */
    int32_t *from;    /* [n] row of each column, or -1 */
    double *v;        /* [n] */
    double *d;        /* [n] distance of each column that is not in the tree, inf of those that are */
    int64_t *before;  /* [n] the row that it is reached from */
    double *open;     /* [n] v, and -inf where the tree has the column: its distance stays then */
    int32_t *tree;    /* [n] columns of the tree in order, */
    double *in;       /* [n] their distances */
    double *low;      /* [blocks] least distance of each block of columns */
} paths;

static moec_status start(paths *s, moec_err *err)
{
    moec_status st = MOEC_OK;
    const size_t n = (size_t)s->n;
    MOEC_TRY(MOEC_NEW(s->from, n, err));
    MOEC_TRY(MOEC_NEW(s->v, n, err));
    MOEC_TRY(MOEC_NEW(s->d, n, err));
    MOEC_TRY(MOEC_NEW(s->before, n, err));
    MOEC_TRY(MOEC_NEW(s->open, n, err));
    MOEC_TRY(MOEC_NEW(s->tree, n, err));
    MOEC_TRY(MOEC_NEW(s->in, n, err));
    MOEC_TRY(MOEC_NEW(s->low, (size_t)s->blocks, err));
    for (int64_t j = 0; j < s->n; j++)
        s->to[j] = s->from[j] = -1;
done:
    return st;
}

static void release(paths *s)
{
    moec_free(s->from);
    moec_free(s->v);
    moec_free(s->d);
    moec_free(s->before);
    moec_free(s->open);
    moec_free(s->tree);
    moec_free(s->in);
    moec_free(s->low);
}

/* The nearest column, a free one before others, then the first: on ties that ends the path. */
static int64_t nearest(const paths *s, double *least)
{
    int64_t first = -1;
    *least = INFINITY;
    for (int64_t b = 0; b < s->blocks; b++)
        *least = s->low[b] < *least ? s->low[b] : *least;
    for (int64_t b = 0; b < s->blocks; b++) {
        const int64_t end = (b + 1) * MOEC_PATH_BLOCK < s->n ? (b + 1) * MOEC_PATH_BLOCK : s->n;
        for (int64_t j = b * MOEC_PATH_BLOCK; s->low[b] == *least && j < end; j++)
            if (s->d[j] == *least) {
                if (s->from[j] < 0)
                    return j;
                first = first < 0 ? j : first;
            }
    }
    return first;
}

static void match(paths *s, int64_t root)
{
    const int64_t n = s->n;
    int64_t in = 0, i = root, j;
    double base = 0.0, least;
    memcpy(s->open, s->v, (size_t)n * sizeof *s->v);
    for (j = 0; j < n; j++)
        s->d[j] = INFINITY;
    for (;;) {
        moec_path_step(s->low, s->d, s->before, s->open, s->profit + i * n, n, base, i);
        j = nearest(s, &least);
        if (s->from[j] < 0)
            break;
        s->tree[in] = (int32_t)j;
        s->in[in++] = least;
        s->d[j] = INFINITY;
        s->open[j] = -INFINITY;
        i = s->from[j];
        base = least + (double)s->profit[i * n + j] + s->v[j];
    }
    for (int64_t k = 0; k < in; k++)
        s->v[s->tree[k]] += s->in[k] - least;
    do {
        i = s->before[j];
        s->from[j] = (int32_t)i;
        const int32_t next = s->to[i];
        s->to[i] = (int32_t)j;
        j = next;
    } while (i != root);
}

moec_status moec_assign(int32_t *to, const float *profit, int64_t n, moec_err *err)
{
    moec_status st = MOEC_OK;
    paths s = {.profit = profit, .n = n, .blocks = (n + MOEC_PATH_BLOCK - 1) / MOEC_PATH_BLOCK, .to = to};
    for (int64_t i = 0; i < n; i++)
        if (!moec_all_finite(profit + i * n, n))
            return moec_fail(err, MOEC_ENUMERIC, "assignment: row %lld has a profit that is not finite", (long long)i);
    MOEC_TRY(start(&s, err));
    for (int64_t i = 0; i < n; i++)
        match(&s, i);
done:
    release(&s);
    return st;
}
