/* dump_quant ROWS COLS GROUP BITS: float32 values on stdin come back on stdout as the grid of measure.h has them, so that a client
 * in Python computes with the very weights whose errors were measured. */
#include "method/quant.h"

#include "base/mem.h"

#include <stdio.h>
#include <stdlib.h>

static moec_status restore(float *w, int64_t rows, const moec_qgrid *g, int64_t cols, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_qcodes c = {0};
    MOEC_TRY(moec_qcodes_new(&c, g, rows, cols, err));
    MOEC_TRY(moec_quant_range(&c, w, MOEC_QRANGE_CLIP, NULL, 0, rows, err));
    moec_quant_nearest(&c, w, 0, rows);
    moec_quant_restore(w, &c, 0, rows);
done:
    moec_qcodes_release(&c);
    return st;
}

int main(int argc, char **argv)
{
    moec_err err = {MOEC_OK, ""};
    float *w = NULL;
    if (argc != 5)
        return 2;
    const int64_t rows = atoll(argv[1]), cols = atoll(argv[2]), group = moec_quant_group(atoll(argv[3]), cols, 8);
    const moec_qgrid g = {.bits = atoi(argv[4]), .group = group > 0 ? group : cols, .scale_type = MOEC_F32};
    const size_t n = (size_t)rows * (size_t)cols;
    bool good = rows > 0 && cols > 0 && MOEC_NEW(w, n, &err) == MOEC_OK && fread(w, sizeof *w, n, stdin) == n &&
                restore(w, rows, &g, cols, &err) == MOEC_OK && fwrite(w, sizeof *w, n, stdout) == n;
    moec_free(w);
    if (!good)
        fprintf(stderr, "dump_quant: %s\n", err.text);
    return good ? 0 : 1;
}
