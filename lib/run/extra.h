/* Tensors of an output that the source has not. Private to lib/run. */
#ifndef MOEC_RUN_EXTRA_H
#define MOEC_RUN_EXTRA_H

#include "run/layout.h"

/* Fills `extra` of forms whose other parts are there, for a plan that keeps factors. MOEC_ENOMEM. */
moec_status moec__extras_new(moec_forms *f, const moec_model *m, const moec_plan *p, moec_err *err) MOEC_USE_RESULT;

/* The same of a plan that quantizes, whose quantized tensors go from `cast` in a packed format and are marked in `anew` in a dense
 * one. moec_qformat_check; MOEC_ENOMEM. */
moec_status moec__quant_new(moec_forms *f, const moec_model *m, const moec_plan *p, moec_err *err) MOEC_USE_RESULT;

/* The file that makes transformers run factored experts, and routers whose rows share experts. */
#define MOEC_MODELING_NAME "modeling_moecompress.py"
extern const char moec__modeling_text[];
extern const size_t moec__modeling_bytes;

#endif
