/* Prints what small functions on matrices say, for comparison with other implementations. One line of results each.
 *
 *   dump_numbers assign N IN               moec_assign: the column of each row; IN: profit [N,N]
 *   dump_numbers assign-sparse N EACH IN   moec_assign_sparse; IN: profit [N,EACH], then columns [N,EACH] as numbers
 *
 * IN holds float32 as they lie in memory. */
#include "base/mem.h"
#include "num/assign.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static moec_status read_floats(float **out, FILE *f, int64_t n, moec_err *err)
{
    moec_status st = MOEC_NEW(*out, (size_t)n, err);
    if (st == MOEC_OK && fread(*out, sizeof **out, (size_t)n, f) != (size_t)n)
        st = moec_fail(err, MOEC_EFORMAT, "fewer values than there should be");
    return st;
}

static void print_indices(const int32_t *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        printf("%d%s", x[i], i + 1 < n ? " " : "\n");
}

static moec_status dump_assign(const int64_t *size, FILE *in, moec_err *err)
{
    moec_status st = MOEC_OK;
    float *profit = NULL;
    int32_t *to = NULL;
    MOEC_TRY(read_floats(&profit, in, size[0] * size[0], err));
    MOEC_TRY(MOEC_NEW(to, (size_t)size[0], err));
    MOEC_TRY(moec_assign(to, profit, size[0], err));
    print_indices(to, size[0]);
done:
    moec_free(profit);
    moec_free(to);
    return st;
}

static moec_status dump_assign_sparse(const int64_t *size, FILE *in, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t n = size[0] * size[1];
    float *profit = NULL, *number = NULL;
    int32_t *col = NULL, *to = NULL;
    MOEC_TRY(read_floats(&profit, in, n, err));
    MOEC_TRY(read_floats(&number, in, n, err));
    MOEC_TRY(MOEC_NEW(col, (size_t)n, err));
    MOEC_TRY(MOEC_NEW(to, (size_t)size[0], err));
    for (int64_t i = 0; i < n; i++)
        col[i] = (int32_t)number[i];
    MOEC_TRY(moec_assign_sparse(to, col, profit, size[0], size[1], err));
    print_indices(to, size[0]);
done:
    moec_free(profit);
    moec_free(number);
    moec_free(col);
    moec_free(to);
    return st;
}

/* A topic: its name, how many sizes stand before IN, what it does. */
static const struct topic {
    const char *name;
    int sizes;
    moec_status (*dump)(const int64_t *size, FILE *in, moec_err *err);
} topics[] = {
    {"assign", 1, dump_assign},
    {"assign-sparse", 2, dump_assign_sparse},
};

int main(int argc, char **argv)
{
    moec_err err = {MOEC_OK, ""};
    for (size_t k = 0; argc > 1 && k < MOEC_COUNT(topics); k++) {
        const struct topic *t = &topics[k];
        int64_t size[4] = {0};
        if (strcmp(argv[1], t->name) != 0 || argc != t->sizes + 3)
            continue;
        for (int i = 0; i < t->sizes; i++)
            size[i] = strtol(argv[2 + i], NULL, 10);
        FILE *in = fopen(argv[argc - 1], "rb");
        moec_status st = in ? t->dump(size, in, &err) : moec_fail(&err, MOEC_EIO, "%s cannot be read", argv[argc - 1]);
        if (in)
            fclose(in);
        if (st != MOEC_OK)
            fprintf(stderr, "dump_numbers: %s\n", err.text);
        return moec_exit_code(st);
    }
    fprintf(stderr, "usage: dump_numbers TOPIC SIZE... IN\n");
    return 2;
}
