/* Linear systems by the factor of a damped Hessian. */
#include "method/gptq_parts.h"

#include "base/mem.h"
#include "num/linalg.h"

/* x U^T V U = b: both triangles in turn, columns in the factor's order. */
moec_status moec_gptq_solve(float *b, const moec_gptq *g, int64_t rows, moec_err *err)
{
    enum { ROWS = 256 };
    const int64_t n = g->n, stride = moec__gptq_stride(g);
    const float *u = moec__gptq_factor(g, 0, 0);
    float *x;
    moec_status st = MOEC_NEW(x, (size_t)(ROWS * n), err);
    for (int64_t lo = 0; st == MOEC_OK && lo < rows; lo += ROWS) {
        const int64_t some = rows - lo < ROWS ? rows - lo : ROWS;
        for (int64_t r = 0; r < some; r++)
            for (int64_t k = 0; k < n; k++)
                x[r * n + k] = b[(lo + r) * n + g->order[k]];
        moec_strsm_unit(x, false, u, stride, n, some);
        for (int64_t r = 0; r < some; r++)
            for (int64_t k = 0; k < n; k++)
                x[r * n + k] = (float)((double)x[r * n + k] / g->variance[k]);
        moec_strsm_unit(x, true, u, stride, n, some);
        for (int64_t r = 0; r < some; r++)
            for (int64_t k = 0; k < n; k++)
                b[(lo + r) * n + g->order[k]] = x[r * n + k];
    }
    moec_free(x);
    return st;
}
