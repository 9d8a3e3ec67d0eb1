/* Factors in plan files. Private to lib/method. */
#ifndef MOEC_METHOD_FACTOR_PLAN_H
#define MOEC_METHOD_FACTOR_PLAN_H

#include "method/plan.h"
#include "method/reader.h"

/* "factor" of a plan. */
moec_json *moec__factor_to_json(const moec_plan *p);
/* And back, strictly; `o` NULL: none. The numbers' bounds are a model's: moec_factor_check. MOEC_EFORMAT, MOEC_ENOMEM. */
moec_status moec__factor_read(moec_plan *p, const moec_reader *r, moec_json *o) MOEC_USE_RESULT;

#endif
