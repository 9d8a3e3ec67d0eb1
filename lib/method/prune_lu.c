/* Layer-wise pruning by reconstruction: the row of the table. It looks at tokens, not at sums, so the plan is not made here but
 * while the layers run (choose.h). */
#include "method/choose.h"
#include "method/method.h"

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
    .plan = moec_plan_counts,
    .choose = moec_choose_lu,
};
