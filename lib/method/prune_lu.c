/* Layer-wise pruning by reconstruction: the row of the table. It looks at tokens, not at sums, so the plan is not made here but
 * while the layers run (choose.h). */
#include "base/mem.h"
#include "method/choose.h"
#include "method/method.h"

/* Counts, protection and what calibration saw; who stays is chosen later. */
static moec_status plan_lu(moec_plan **out, const moec_method *me, const moec_request *q, moec_err *err)
{
    moec_status st = MOEC_OK;
    double *score = NULL;
    *out = NULL;
    MOEC_TRY(MOEC_NEW(score, (size_t)(q->model->moe_layers * q->model->dims.experts), err));
    MOEC_TRY(moec_select(out, me, q, score, err));
    for (int64_t i = 0; i < (*out)->n_layers; i++) {
        moec_free((*out)->layer[i].score);
        (*out)->layer[i].score = NULL;
    }
done:
    moec_free(score);
    return st;
}

extern const moec_method moec_method_lu;
const moec_method moec_method_lu = {
    .name = "lu",
    .kind = MOEC_PRUNE,
    .brief = "the experts without which the layer's output changes least: all subsets, or where these are too many one expert "
             "after the other",
    .paper = "Not All Experts are Equal: Efficient Expert Pruning and Skipping for Mixture-of-Experts Large Language Models",
    .arxiv = "2402.14800",
    .formula = "argmin over S of sum over windows |y - r_S|_F",
    .by_count = true,
    .plan = plan_lu,
    .choose = moec_choose_lu,
};
