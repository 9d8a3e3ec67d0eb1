/* Solves choices under a budget, for comparison with other solvers:    dump_lp < PROBLEMS
 *
 * Numbers on standard input, any number of problems: groups, rows, budget; of each group how many options, and size and cost of each;
 * of each row the least, how many options, and these. A line of results each: status, cost, bound, size, proven, options taken. */
#include "base/mem.h"
#include "num/lp.h"

#include <inttypes.h>
#include <stdio.h>

enum { MOST = 1 << 18, ROWS = 1 << 10 };

static int64_t first[MOST], size[MOST], member[MOST];
static double cost[MOST];
static moec_lp_row row[ROWS];

static int64_t number(void)
{
    int64_t v;
    return scanf("%" SCNd64, &v) == 1 ? v : -1;
}

static int read_problem(moec_lp *p)
{
    int64_t n = 0, members = 0;
    *p = (moec_lp){.groups = number(), .first = first, .cost = cost, .size = size, .row = row};
    p->rows = number();
    p->budget = number();
    if (p->groups < 1 || p->groups >= MOST || p->rows < 0 || p->rows >= ROWS)
        return 0;
    for (int64_t g = 0; g < p->groups; g++) {
        first[g] = n;
        for (int64_t k = number(); k > 0 && n < MOST; k--, n++) {
            size[n] = number();
            if (scanf("%lf", &cost[n]) != 1)
                return 0;
        }
    }
    first[p->groups] = n;
    for (int64_t r = 0; r < p->rows; r++) {
        row[r].option = member + members;
        row[r].least = number();
        row[r].n = number();
        for (int64_t k = 0; k < row[r].n && members < MOST; k++)
            member[members++] = number();
    }
    return 1;
}

int main(void)
{
    moec_lp p;
    while (read_problem(&p)) {
        moec_lp_answer a;
        moec_err err = {MOEC_OK, ""};
        const moec_status st = moec_lp_solve(&a, &p, 60.0, &err);
        printf("%d %.17g %.17g %" PRId64 " %d", (int)st, a.cost, a.bound, a.size, a.proven);
        for (int64_t g = 0; st == MOEC_OK && g < p.groups; g++)
            printf(" %" PRId64, a.pick[g]);
        printf("\n");
        moec_lp_answer_release(&a);
    }
    return 0;
}
