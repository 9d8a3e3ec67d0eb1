/* From what a user asks of quantization to a plan: widths by a method, under a budget of bits or of the output's bytes. */
#ifndef MOEC_RUN_QUANTIZE_PLAN_H
#define MOEC_RUN_QUANTIZE_PLAN_H

#include "run/format.h"

typedef struct moec_quantize_request {
    const moec_request *q;       /* model, fingerprint, statistics, protection, dtype */
    const moec_method *method;   /* of kind MOEC_QUANTIZE */
    const moec_qformat *format;
    int64_t group;               /* columns of a scale; 0: usual_group, or less where the format wants one for all matrices */
    int64_t usual_group;         /* 0: moec_quantize_group */
    bool zeros;                  /* zero points */
    double bits;                 /* mean width of routed experts' weights, codes alone; or 0 and */
    uint64_t target;             /* bytes of all files of the output */
    int n_widths, width[8];      /* candidates, ascending; n_widths 0: 2, 3, 4 and 8 that the format has, nested 8 only
                                    where bits are more than 4 */
    moec_widths_grain grain;     /* finer than the format's is refused */
    int attention, shared, dense; /* bits of the other matrices, 16: as they are */
    double alpha, beta, gamma;   /* see widths.h */
} moec_quantize_request;

/** A plan that keeps every expert, with `quant` filled in.
 *  @param widths  what the solver says; moec_widths_release.
 *  @return MOEC_OK; MOEC_EINVAL: widths, a group, zero points or a grain that the format has not, neither or both of bits and target, a
 *          quantized model; MOEC_ENOFIT: the target is below what is possible, or above the model's own size (both said);
 *          what moec_widths_solve and the format's check return. Nothing is read but statistics (and, by the method, weights). */
MOEC_API moec_status moec_quantize_plan(moec_plan **out, moec_widths *widths, const moec_quantize_request *r, moec_err *err)
    MOEC_USE_RESULT;
/** Whatever of that can be refused before statistics are there: what is not about costs and budgets. */
MOEC_API moec_status moec_quantize_check(const moec_quantize_request *r, moec_err *err) MOEC_USE_RESULT;
/** Group size where none is asked: 128, 64 where experts are narrower than 1024. */
MOEC_API int64_t moec_quantize_group(const moec_model *m);
/** Mean width of the routed experts' weights in a plan, codes alone, and bits on disk per weight, scales and all. */
MOEC_API void moec_quantize_means(double *bits, double *disk, const moec_plan *p, const moec_model *m);

#endif
