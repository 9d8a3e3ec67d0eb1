/* Prints groups of points and eigenpairs, for comparison with other implementations.
 *
 *   dump_groups average|ward|complete|single N KEEP IN   IN: distances [N,N]; heights of the unions in the second line
 *   dump_groups spectral N KEEP IN                       IN: affinity [N,N]
 *   dump_groups kmeans N KEEP IN                         IN: inner products [N,N]; the objective in the second line
 *   dump_groups largest|smallest N R IN                  IN: a symmetric matrix [N,N]; eigenvalues, then R lines of a vector each
 *
 * IN is float64 as it lies in memory. The first line has each point's centre; all masses are 1. */
#include "base/mem.h"
#include "method/group.h"
#include "num/linalg.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { RESTARTS = 64 };

static void print(const double *v, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        printf("%.17g%s", v[i], i + 1 < n ? " " : "");
    printf("\n");
}

static moec_status read_matrix(double **out, const char *path, int64_t n, moec_err *err)
{
    FILE *f = fopen(path, "rb");
    if (!f)
        return moec_fail(err, MOEC_EIO, "%s cannot be read", path);
    moec_status st = MOEC_NEW(*out, (size_t)(n * n), err);
    if (st == MOEC_OK && fread(*out, sizeof **out, (size_t)(n * n), f) != (size_t)(n * n))
        st = moec_fail(err, MOEC_EFORMAT, "fewer values than there should be");
    fclose(f);
    return st;
}

static moec_status eigen(double *a, int64_t n, int64_t r, moec_eigen_end end, moec_err *err)
{
    moec_status st = MOEC_OK;
    double *values = NULL, *vectors = NULL;
    MOEC_TRY(MOEC_NEW(values, (size_t)r, err));
    MOEC_TRY(MOEC_NEW(vectors, (size_t)(r * n), err));
    MOEC_TRY(moec_eigen(values, vectors, a, n, r, end, err));
    print(values, r);
    for (int64_t i = 0; i < r; i++)
        print(vectors + i * n, n);
done:
    moec_free(vectors);
    moec_free(values);
    return st;
}

static moec_status group(const char *way, const double *matrix, int64_t n, int64_t keep, moec_err *err)
{
    static const char *const linkage[] = {[MOEC_LINK_AVERAGE] = "average", [MOEC_LINK_WARD] = "ward",
                                          [MOEC_LINK_COMPLETE] = "complete", [MOEC_LINK_SINGLE] = "single"};
    moec_status st = MOEC_OK;
    double *mass = NULL, *height = NULL, objective;
    int32_t *centre = NULL;
    int64_t heights = n - keep;
    MOEC_TRY(MOEC_NEW(mass, (size_t)n, err));
    MOEC_TRY(MOEC_NEW(height, (size_t)n, err));
    MOEC_TRY(MOEC_NEW(centre, (size_t)n, err));
    for (int64_t i = 0; i < n; i++)
        mass[i] = 1.0;
    const moec_group_task t = {.n = n, .keep = keep, .blocks = 1, .distance = matrix, .mass = mass, .seed = 1};
    if (strcmp(way, "spectral") == 0) {
        heights = 0;
        MOEC_TRY(moec_group_spectral(centre, &t, matrix, RESTARTS, err));
    } else if (strcmp(way, "kmeans") == 0) {
        heights = 1;
        MOEC_TRY(moec_group_kmeans(centre, &objective, &t, matrix, RESTARTS, err));
        height[0] = objective;
    } else {
        size_t by = 0;
        while (by < MOEC_COUNT(linkage) && strcmp(linkage[by], way) != 0)
            by++;
        if (by == MOEC_COUNT(linkage)) {
            st = moec_fail(err, MOEC_EINVAL, "%s is no way of grouping", way);
            goto done;
        }
        MOEC_TRY(moec_group_linkage(centre, height, &t, (moec_linkage)by, err));
    }
    for (int64_t i = 0; i < n; i++)
        printf("%d%s", (int)centre[i], i + 1 < n ? " " : "\n");
    print(height, heights);
done:
    moec_free(centre);
    moec_free(height);
    moec_free(mass);
    return st;
}

int main(int argc, char **argv)
{
    moec_err err = {MOEC_OK, ""};
    double *matrix = NULL;
    if (argc != 5) {
        fprintf(stderr, "usage: dump_groups WAY N KEEP IN\n");
        return 2;
    }
    const int64_t n = atoi(argv[2]), keep = atoi(argv[3]);
    moec_status st = read_matrix(&matrix, argv[4], n, &err);
    if (st == MOEC_OK && strcmp(argv[1], "largest") == 0)
        st = eigen(matrix, n, keep, MOEC_EIGEN_LARGEST, &err);
    else if (st == MOEC_OK && strcmp(argv[1], "smallest") == 0)
        st = eigen(matrix, n, keep, MOEC_EIGEN_SMALLEST, &err);
    else if (st == MOEC_OK)
        st = group(argv[1], matrix, n, keep, &err);
    if (st != MOEC_OK)
        fprintf(stderr, "dump_groups: %s\n", err.text);
    moec_free(matrix);
    return moec_exit_code(st);
}
