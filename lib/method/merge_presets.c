/* The merging methods: settings of one engine (merge.h), each a row. Who goes with whom is decided while the layers run, so the
 * plan made here has the counts only. */
#include "base/mem.h"
#include "method/merge.h"
#include "method/method.h"

#include <stdio.h>

/* How many experts each layer keeps; global, mass: by frequency, as M-SMoE counts. */
static moec_status plan_counts(moec_plan **out, const moec_method *me, const moec_request *q, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_method *frequency = moec_method_find(MOEC_PRUNE, "frequency");
    *out = NULL;
    if (q->allocation == MOEC_ALLOCATE_UNIFORM || q->allocation == MOEC_ALLOCATE_LOSS) {
        MOEC_TRY(moec_plan_counts(out, me, q, err));
    } else {
        if (!q->stats)
            return moec_fail(err, MOEC_EINVAL, "--allocation global and mass count how often experts are selected; give --stats FILE");
        MOEC_TRY(frequency->plan(out, frequency, q, err));
        snprintf((*out)->method, sizeof (*out)->method, "%s", me->name);
        moec_plan_drop_scores(*out);
    }
done:
    return st;
}

/* What all of them have unless they say otherwise. */
#define MOEC_MERGE_ROW(id, ...)                                                                                         \
    static const moec_merge_recipe recipe_##id = {.group_size = 16, .restarts = 32, .rank = 1.0, __VA_ARGS__};          \
    extern const moec_method moec_method_##id

MOEC_MERGE_ROW(adaptive, .distance = MOEC_FAR_OUTPUT, .grouping = MOEC_BY_NEAREST, .saliency = MOEC_MASS_ENERGY,
               .weights = MOEC_MASS_GATE_SQ, .align = MOEC_ALIGN_CANONICAL, .router = MOEC_ROW_KEEP, .decide = true);
const moec_method moec_method_adaptive = {
    .name = "adaptive", .kind = MOEC_MERGE, .row = &recipe_adaptive, .plan = plan_counts, .is_default = true,
    .brief = "each removed expert joins the kept one whose outputs are nearest, where repair gets further with it on held-out "
             "tokens; else it is only removed",
    .paper = "unpublished",
    .formula = "distance mean |f_i - f_j|^2, centres by sum g^2 |f|^2, weights sum g^2, canonical alignment",
};

MOEC_MERGE_ROW(m_smoe, .distance = MOEC_FAR_LOGITS, .grouping = MOEC_BY_NEAREST, .saliency = MOEC_MASS_COUNT,
               .weights = MOEC_MASS_COUNT, .align = MOEC_ALIGN_PLAIN, .router = MOEC_ROW_KEEP, .original = true);
const moec_method moec_method_m_smoe = {
    .name = "m-smoe", .kind = MOEC_MERGE, .row = &recipe_m_smoe, .plan = plan_counts,
    .brief = "the most used experts take in those with similar router logits, neurons aligned, by frequency",
    .paper = "Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy", .arxiv = "2310.01334",
    .formula = "cos(z_i, z_j), W = sum n_e P_e W_e / sum n_e; --allocation global is the paper's, this row's default is uniform",
};

MOEC_MERGE_ROW(hc_smoe, .distance = MOEC_FAR_MEAN_OUTPUT, .grouping = MOEC_BY_AVERAGE, .saliency = MOEC_MASS_COUNT,
               .weights = MOEC_MASS_COUNT, .align = MOEC_ALIGN_NONE, .router = MOEC_ROW_KEEP, .original = true);
const moec_method moec_method_hc_smoe = {
    .name = "hc-smoe", .kind = MOEC_MERGE, .row = &recipe_hc_smoe, .plan = plan_counts,
    .brief = "hierarchical clustering of mean outputs, average linkage, merged by frequency",
    .paper = "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering", .arxiv = "2410.08589",
    .formula = "|mean f_i - mean f_j|, W = sum n_e W_e / sum n_e",
};

MOEC_MERGE_ROW(sub_moe, .distance = MOEC_FAR_OUTPUT_COSINE, .grouping = MOEC_BY_KMEANS, .saliency = MOEC_MASS_COUNT,
               .weights = MOEC_MASS_COUNT, .align = MOEC_ALIGN_NONE, .fill = MOEC_FILL_SUBSPACE, .router = MOEC_ROW_WEIGHTED,
               .original = true);
const moec_method moec_method_sub_moe = {
    .name = "sub-moe", .kind = MOEC_MERGE, .row = &recipe_sub_moe, .plan = plan_counts,
    .brief = "k-means of output cosines, merged in the joint subspace of the group's matrices",
    .paper = "Sub-MoE: Efficient Mixture-of-Expert LLMs Compression via Subspace Expert Merging", .arxiv = "2506.23266",
    .formula = "mean cos(f_i, f_j), W = U U^T sum n_e W_e / sum n_e, U the leading left singular vectors of [W_1 .. W_n]; "
               "--allocation loss (of two layers) is the paper's, this row's default is uniform",
};

MOEC_MERGE_ROW(ream, .distance = MOEC_FAR_GATED, .grouping = MOEC_BY_PSEUDO, .saliency = MOEC_MASS_REAM,
               .weights = MOEC_MASS_REAM, .align = MOEC_ALIGN_ACTIVATIONS, .router = MOEC_ROW_KEEP);
const moec_method moec_method_ream = {
    .name = "ream", .kind = MOEC_MERGE, .row = &recipe_ream, .plan = plan_counts,
    .brief = "the most salient experts take in up to 15 of the others each, aligned by activations, by saliency",
    .paper = "REAM: Merging Improves Pruning of Experts in LLMs", .arxiv = "2604.04356",
    .formula = "centres by mean p^2 |f|, gated mean outputs and router logits, W = sum s_e P_e W_e / sum s_e",
};

MOEC_MERGE_ROW(uncurl, .distance = MOEC_FAR_LOGITS, .grouping = MOEC_BY_SPECTRAL, .saliency = MOEC_MASS_COUNT,
               .weights = MOEC_MASS_COUNT, .align = MOEC_ALIGN_PLAIN, .router = MOEC_ROW_WEIGHTED, .original = true);
const moec_method moec_method_uncurl = {
    .name = "uncurl", .kind = MOEC_MERGE, .row = &recipe_uncurl, .plan = plan_counts,
    .brief = "spectral clustering on router logits, neurons aligned, merged by frequency",
    .paper = "Revisiting SMoE Language Models by Evaluating Inefficiencies with Task Specific Expert Pruning (UNCURL)", .arxiv = "2409.01483",
    .formula = "affinity (1 + cos(z_i, z_j)) / 2, normalised Laplacian, k-means, W = sum n_e P_e W_e / sum n_e",
};

MOEC_MERGE_ROW(merge_moe, .distance = MOEC_FAR_WEIGHTS, .grouping = MOEC_BY_NEAREST, .saliency = MOEC_MASS_COUNT,
               .weights = MOEC_MASS_COUNT, .align = MOEC_ALIGN_NONE, .router = MOEC_ROW_LSE, .original = true);
const moec_method moec_method_merge_moe = {
    .name = "merge-moe", .kind = MOEC_MERGE, .row = &recipe_merge_moe, .plan = plan_counts,
    .brief = "the most used experts take in those with the nearest gate and up matrices, by frequency; its least-squares down "
             "projection is --repair ridge",
    .paper = "MergeMoE: Efficient Compression of MoE Models via Expert Output Merging", .arxiv = "2510.14436",
    .formula = "|[U G]_i - [U G]_j|, gate and up = sum n_e W_e / sum n_e, down by least squares",
};

MOEC_MERGE_ROW(dern, .grouping = MOEC_BY_PRUNING, .saliency = MOEC_MASS_GATE, .weights = MOEC_MASS_GATE,
               .fill = MOEC_FILL_SEGMENTS, .router = MOEC_ROW_ADD, .original = true,
               .segment = {.alpha = 0.3, .up = 0.5, .down = 0.5, .same_norm = true, .rounds = 30});
const moec_method moec_method_dern = {
    .name = "dern", .kind = MOEC_MERGE, .row = &recipe_dern, .plan = plan_counts,
    .brief = "neurons of dropped experts go to the kept experts that have neurons like them, which are clustered back to their "
             "width",
    .paper = "Dropping Experts, Recombining Neurons: Retraining-Free Pruning for Sparse Mixture-of-Experts LLMs",
    .arxiv = "2509.10377",
    .formula = "kept by sum g; 1/2 cos(up, up') + 1/2 cos(down, down') > alpha; spherical k-means weighted by sum g",
};
