/* Prints what moec_choose_lu says of given tokens, for comparison with another implementation.
 *
 *   dump_choice MODEL LAYER KEEP WINDOW TOKENS IN
 *
 * IN holds x [T,H], y [T,H] and logits [T,E], float32 as they lie in memory. Output: the scores of the E experts in one line. */
#include "base/mem.h"
#include "method/choose.h"

#include <stdio.h>
#include <stdlib.h>

static moec_status read_floats(float **out, FILE *f, size_t n, moec_err *err)
{
    moec_status st = MOEC_NEW(*out, n, err);
    if (st == MOEC_OK && fread(*out, sizeof **out, n, f) != n)
        st = moec_fail(err, MOEC_EFORMAT, "fewer values than there should be");
    return st;
}

static moec_status dump(char **argv, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_model *m = NULL;
    float *x = NULL, *y = NULL, *logits = NULL;
    int32_t *keep = NULL;
    double *score = NULL;
    FILE *f = fopen(argv[6], "rb");
    if (!f)
        return moec_fail(err, MOEC_EIO, "%s cannot be read", argv[6]);
    MOEC_TRY(moec_model_open(&m, argv[1], err));
    const moec_dims *d = &m->dims;
    moec_choice_task t = {.model = m, .layer = &m->layer[atoi(argv[2])], .keep = atoi(argv[3]), .window = atoi(argv[4]),
                          .n = atoi(argv[5]), .ld = d->experts, .groups = 1};
    t.top_k = d->top_k < t.keep ? d->top_k : t.keep;
    MOEC_TRY(read_floats(&x, f, (size_t)(t.n * d->hidden), err));
    MOEC_TRY(read_floats(&y, f, (size_t)(t.n * d->hidden), err));
    MOEC_TRY(read_floats(&logits, f, (size_t)(t.n * d->experts), err));
    t.x = x;
    t.y = y;
    t.logits = logits;
    MOEC_TRY(MOEC_NEW(keep, (size_t)d->experts, err));
    MOEC_TRY(MOEC_NEW(score, (size_t)d->experts, err));
    MOEC_TRY(moec_choose_lu(keep, score, &t, err));
    for (int64_t e = 0; e < d->experts; e++)
        printf("%g%s", score[e], e + 1 < d->experts ? " " : "\n");
done:
    fclose(f);
    moec_model_close(m);
    moec_free(x);
    moec_free(y);
    moec_free(logits);
    moec_free(keep);
    moec_free(score);
    return st;
}

int main(int argc, char **argv)
{
    moec_err err = {MOEC_OK, ""};
    if (argc != 7) {
        fprintf(stderr, "usage: dump_choice MODEL LAYER KEEP WINDOW TOKENS IN\n");
        return 2;
    }
    moec_status st = dump(argv, &err);
    if (st != MOEC_OK)
        fprintf(stderr, "dump_choice: %s\n", err.text);
    return moec_exit_code(st);
}
