/* Widths of quantized weights in plan files. Private to lib/method. */
#ifndef MOEC_METHOD_PLAN_QUANT_H
#define MOEC_METHOD_PLAN_QUANT_H

#include "method/plan.h"
#include "method/reader.h"

/* "quant" of a plan, and "bits" of its MoE layer i. */
moec_json *moec__quant_to_json(const moec_plan *p);
moec_json *moec__quant_layer_to_json(const moec_plan *p, int64_t i);
/* And back, strictly; behind the layers. MOEC_EFORMAT, MOEC_ENOMEM. */
moec_status moec__quant_read(moec_plan *p, const moec_reader *r, const moec_json *root) MOEC_USE_RESULT;
/* Does it fit the model, and go with what else the plan says? MOEC_EFORMAT. */
moec_status moec__quant_check(const moec_plan *p, const moec_model *m, moec_err *err) MOEC_USE_RESULT;

#endif
