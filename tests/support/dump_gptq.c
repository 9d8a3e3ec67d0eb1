/* Rounds one matrix, for comparison with another implementation.
 *
 *   dump_gptq ROWS COLS BITS GROUP ZEROS TYPE RANGE DAMP ORDER SWEEPS COMPUTE IN OUT
 *
 * TYPE: F16, BF16 or F32, of the scales; RANGE: minmax, clip (without importance) or weighted (by the diagonal of H); ZEROS and ORDER: 0
 * or 1; COMPUTE: f32 or bf16. IN holds W [ROWS,COLS] in float32, then H [COLS,COLS] in float64. Prints the loss, that of rounding to
 * nearest, and that of moec_gptq_loss. OUT gets the scales that were found and those that were left (float32), zero points and codes
 * (bytes). */
#include "base/mem.h"
#include "method/gptq.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct problem {
    float *w, *v, *found;
    double *h;
    moec_qcodes c;
    moec_gptq *g;
} problem;

static moec_status solve(problem *p, char **argv, int64_t rows, int64_t cols, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_qgrid grid = {.bits = atoi(argv[3]), .group = atol(argv[4]), .zeros = atoi(argv[5]) != 0,
                             .scale_type = moec_dtype_find(argv[6])};
    const moec_gptq_opts opts = {.damp = atof(argv[8]), .act_order = atoi(argv[9]) != 0, .sweeps = atoi(argv[10]),
                                 .compute = strcmp(argv[11], "bf16") == 0 ? MOEC_COMPUTE_BF16 : MOEC_COMPUTE_F32};
    const size_t cells = (size_t)(rows * cols), square = (size_t)(cols * cols), scales = (size_t)(rows * cols / grid.group);
    double loss, nearest, again;
    MOEC_TRY(MOEC_NEW(p->w, cells, err));
    MOEC_TRY(MOEC_NEW(p->v, cells, err));
    MOEC_TRY(MOEC_NEW(p->h, square, err));
    MOEC_TRY(MOEC_NEW(p->found, scales, err));
    FILE *f = fopen(argv[12], "rb");
    if (!f || fread(p->w, sizeof *p->w, cells, f) != cells || fread(p->h, sizeof *p->h, square, f) != square)
        st = moec_fail(err, MOEC_EIO, "%s: not a matrix and its Hessian", argv[12]);
    if (f)
        fclose(f);
    MOEC_TRY(st);
    MOEC_TRY(moec_qcodes_new(&p->c, &grid, rows, cols, err));
    MOEC_TRY(moec_gptq_new(&p->g, p->h, cols, &opts, err));
    MOEC_TRY(moec_quant_range(&p->c, p->w, strcmp(argv[7], "minmax") == 0 ? MOEC_QRANGE_MINMAX : MOEC_QRANGE_CLIP,
                              strcmp(argv[7], "weighted") == 0 ? moec_gptq_importance(p->g) : NULL, 0, rows, err));
    memcpy(p->found, p->c.scale, scales * sizeof *p->found);
    MOEC_TRY(moec_gptq_round(&p->c, &loss, &nearest, p->g, p->w, err));
    moec_quant_restore(p->v, &p->c, 0, rows);
    MOEC_TRY(moec_gptq_loss(&again, p->g, p->w, p->v, rows, err));
    printf("%.17g %.17g %.17g\n", loss, nearest, again);
    f = fopen(argv[13], "wb");
    if (!f)
        return moec_fail(err, MOEC_EIO, "%s cannot be written", argv[13]);
    fwrite(p->found, sizeof *p->found, scales, f);
    fwrite(p->c.scale, sizeof *p->c.scale, scales, f);
    if (p->c.zero)
        fwrite(p->c.zero, 1, scales, f);
    fwrite(p->c.code, 1, cells, f);
    fclose(f);
done:
    return st;
}

int main(int argc, char **argv)
{
    moec_err err = {MOEC_OK, ""};
    problem p = {0};
    if (argc != 14 || atol(argv[4]) <= 0) {
        fprintf(stderr, "usage: dump_gptq ROWS COLS BITS GROUP ZEROS TYPE RANGE DAMP ORDER SWEEPS COMPUTE IN OUT\n");
        return 2;
    }
    const moec_status st = solve(&p, argv, atol(argv[1]), atol(argv[2]), &err);
    if (st != MOEC_OK)
        fprintf(stderr, "dump_gptq: %s\n", err.text);
    moec_gptq_free(p.g);
    moec_qcodes_release(&p.c);
    moec_free(p.found);
    moec_free(p.h);
    moec_free(p.v);
    moec_free(p.w);
    return moec_exit_code(st);
}
