/* Prints what merging measures on given tokens, for comparison with another implementation.
 *
 *   dump_merge MODEL LAYER TOKENS IN
 *
 * IN holds x [T,H], logits [T,E] and weights [T,k] in float32 and the selected experts [T,k] in int32, as they lie in memory.
 * Output, a line each: the name of a mass and its E values, for all; the name of a distance and its E*E values, for all. */
#include "base/mem.h"
#include "method/merge.h"

#include <stdio.h>
#include <stdlib.h>

static moec_status read_all(void *out, size_t size, size_t n, FILE *f, moec_err *err)
{
    return fread(out, size, n, f) == n ? MOEC_OK : moec_fail(err, MOEC_EFORMAT, "fewer values than there should be");
}

static void print_line(const char *name, const double *v, int64_t n)
{
    printf("%s", name);
    for (int64_t i = 0; i < n; i++)
        printf(" %.17g", v[i]);
    printf("\n");
}

static moec_status dump(char **argv, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_model *m = NULL;
    float *x = NULL, *logits = NULL, *gates = NULL;
    int32_t *ids = NULL;
    double *out = NULL;
    FILE *f = fopen(argv[4], "rb");
    if (!f)
        return moec_fail(err, MOEC_EIO, "%s cannot be read", argv[4]);
    MOEC_TRY(moec_model_open(&m, argv[1], err));
    const moec_dims *d = &m->dims;
    const size_t n = (size_t)atoi(argv[3]), hidden = (size_t)d->hidden, experts = (size_t)d->experts, slots = (size_t)d->slots;
    MOEC_TRY(MOEC_NEW(x, n * hidden, err));
    MOEC_TRY(MOEC_NEW(logits, n * experts, err));
    MOEC_TRY(MOEC_NEW(gates, n * slots, err));
    MOEC_TRY(MOEC_NEW(ids, n * slots, err));
    MOEC_TRY(MOEC_NEW(out, experts * experts, err));
    MOEC_TRY(read_all(x, sizeof *x, n * hidden, f, err));
    MOEC_TRY(read_all(logits, sizeof *logits, n * experts, f, err));
    MOEC_TRY(read_all(gates, sizeof *gates, n * slots, f, err));
    MOEC_TRY(read_all(ids, sizeof *ids, n * slots, f, err));
    const moec_merge_task t = {.model = m, .layer = &m->layer[atoi(argv[2])], .n = (int64_t)n, .x = x, .logits = logits,
                               .ld = d->experts, .ids = ids, .gates = gates, .slots = d->slots, .keep = d->experts, .blocks = 1};
    for (int k = 0; k < MOEC_MASS_KINDS; k++) {
        MOEC_TRY(moec_merge_mass_of(out, &t, (moec_merge_mass)k, err));
        print_line(moec_merge_mass_names[k], out, d->experts);
    }
    for (int k = 0; k < MOEC_FAR_COUNT; k++) {
        MOEC_TRY(moec_merge_distances(out, NULL, &t, (moec_merge_distance)k, err));
        print_line(moec_merge_distance_names[k], out, d->experts * d->experts);
    }
done:
    fclose(f);
    moec_model_close(m);
    moec_free(x);
    moec_free(logits);
    moec_free(gates);
    moec_free(ids);
    moec_free(out);
    return st;
}

int main(int argc, char **argv)
{
    moec_err err = {MOEC_OK, ""};
    if (argc != 5) {
        fprintf(stderr, "usage: dump_merge MODEL LAYER TOKENS IN\n");
        return 2;
    }
    moec_status st = dump(argv, &err);
    if (st != MOEC_OK)
        fprintf(stderr, "dump_merge: %s\n", err.text);
    return moec_exit_code(st);
}
