/* Private to lib/run. */
#ifndef MOEC_RUN_VERIFY_CODES_H
#define MOEC_RUN_VERIFY_CODES_H

#include "method/quant.h"
#include "run/format.h"

/* Matrices of an output against the plan that it was made by, in a packed format: widths, scales that are finite, zero points in the
 * middle where the plan has none. The plan fits the output's layers and experts. MOEC_EFORMAT: the first that is not so.
 * Cost: one read of scales and zero points. */
moec_status moec__verify_codes(const moec_model *m, const moec_plan *p, moec_err *err) MOEC_USE_RESULT;

#endif
