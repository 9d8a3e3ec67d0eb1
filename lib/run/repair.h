/* Repair of a pruned model, layer by layer: the weights that stay are fitted on calibration tokens so that the smaller model
 * gives again what the original gave.
 *
 * Two models run over the same text in lock-step: the original, and behind layers that are repaired already the pruned one. In
 * MoE layer l, with H' the original's residual stream behind the layer and h the pruned model's in front of its experts
 * (after attention), the experts that stay are wanted to give for every token
 *
 *     y = (H' - h) / residual multiplier - shared experts' output of the pruned model
 *
 * so each layer also makes up for what the layers before it left. Where the branch has a norm behind it, y is the original's own
 * routed output (and the difference of the shared ones'). A token's squared error counts 1 / mean(H'^2), since what comes
 * next is normalised. Every eighth window is held out: a change that does not lower the error there is not taken.
 * Work is kept in a folder, a file a layer: a run that is stopped goes on behind the last one, with the same result. */
#ifndef MOEC_RUN_REPAIR_H
#define MOEC_RUN_REPAIR_H

#include "calib/pass.h"
#include "method/merge.h"
#include "method/method.h"
#include "run/work.h"

/* What is fitted: nothing; up and down projections in closed form (moec_repair_ridge); gate, up and down by
 * gradient steps (moec_repair_deep), with the router where a whole layer has at most 2^22 weights, else behind a ridge solution. */
typedef enum moec_repair_kind { MOEC_REPAIR_NONE, MOEC_REPAIR_RIDGE, MOEC_REPAIR_DEEP } moec_repair_kind;

typedef struct moec_repair_opts {
    moec_repair_kind kind;
    const moec_method *method; /* chooses who stays, layer by layer (its `choose`), keeping the plan's counts; NULL: the plan's
                                  lists stand */
    const moec_merge_recipe *merge; /* experts are merged before they are fitted: `method` is NULL, the plan has the counts only */
    const int64_t *tied;    /* [MoE layers] groups of each; the plan keeps all experts, and each gets the weights of its group, the
                               router stays (kind NONE only). NULL: merged experts are as many as the plan keeps */
    const moec_method *thin; /* of grain neurons: experts get the plan's width by this method before they are fitted, asked by */
    const moec_request *request; /* this request, of the same model; `method` and `merge` are NULL, kind is not NONE. NULL: no */
    const moec_corpus *corpus; /* weights of its domains: of masses where experts are merged (moec_merge_mass_of) */
    moec_compute compute;   /* of the forward passes; fitting is in float32 */
    bool router;            /* behind all that, the router's rows are refitted in closed form (moec_repair_router) where they can be:
                               a layer where not says so in a note */
    int epochs;             /* of MOEC_REPAIR_DEEP, over each layer's tokens; 0: the default */
    uint64_t seed;
    uint64_t max_memory;    /* 0: what the machine has */
    const char *work;       /* the folder is WORK.partial */
    bool resume;
    const char *fingerprint; /* of the model */
} moec_repair_opts;

typedef struct moec_repair moec_repair;

/** Repairs: fills rewritten, error_before and error_after of the plan's MoE layers, load_shift (over all tokens of the text) and
 *  router_refit of those whose router is fitted, and its `repair` and `weights`. The plan must
 *  fit the model (moec_plan_check) and rewrite nothing yet; with o->thin it is of grain neurons. error: sum w |y - r|^2 /
 *  sum w |y|^2 on held-out windows (on all when there is one window), without and with the fitted weights.
 *  With o->method the keep lists and scores of MoE layers are replaced, each by what its layer gives behind those before it; with
 *  o->merge likewise, and `into` is filled (score: the saliency). Of a mapped plan the experts that rows share are fitted to what
 *  all these rows send them, a token that selects one twice with the sum of its weights.
 *  Multi-token-prediction layers and attention experts are not repaired: they are not run. With o->thin they are made thinner.
 *  @param out  the work folder and its weights, to be given to moec_apply; moec_repair_close.
 *  @return MOEC_OK; MOEC_EINVAL: quantized weights without plan->dtype, a model whose experts are not all feed-forward, what
 *          moec_merge_group or moec_merge_fill_all refuses, options that do not go together (o->tied with a fit, o->thin with
 *          o->merge, a mapped plan with o->router or a recipe that decides or prunes); MOEC_EEXIST: another run is at work in the folder, or it holds finished layers of
 *          another one and resume is on; MOEC_EFORMAT: what an earlier run left is damaged; MOEC_ENOFIT, MOEC_EINTR (can be resumed),
 *          MOEC_EIO, MOEC_ENOMEM, MOEC_ENUMERIC.
 *  Cost: for each layer three forward passes and what repair.h of lib/method says. */
MOEC_API moec_status moec_repair_run(moec_repair **out, moec_plan *p, const moec_model *m, const moec_repair_opts *o,
                                     moec_err *err) MOEC_USE_RESULT;
/** What that run would take; the plan stays as it is. Errors of moec_repair_run that are known at the start. */
MOEC_API moec_status moec_repair_estimate(moec_work_cost *out, moec_plan *p, const moec_model *m, const moec_repair_opts *o,
                                          moec_err *err) MOEC_USE_RESULT;
/** How many experts each layer keeps by what merging loses (q->allocation loss; to be given as q->counts): the original runs once
 *  over the text, each layer's moec_merge_curve is made of what it sees there (the tokens that repair fits, not those held out), and
 *  moec_allocate_loss shares out. Nothing is kept: a run that is stopped does it again, with the same result.
 *  Departs: recipes that form groups behind merged layers (original off) do not have these curves then, but a layer's number may
 *  depend on layers behind it, which are not yet merged.
 *  @param out [MoE layers]. o: corpus, merge, compute, seed and max_memory are read. MOEC_EINVAL: a grouping without an
 *  objective, layers that cannot be padded and no q->plan_only, what moec_kept_experts, moec_allocate_loss and moec_merge_curve
 *  refuse; MOEC_ENOFIT, MOEC_EINTR, MOEC_EIO, MOEC_ENOMEM, MOEC_ENUMERIC. Cost: one forward pass and E groupings a layer. */
MOEC_API moec_status moec_merge_counts(int64_t *out, const moec_model *m, const moec_request *q, const moec_repair_opts *o,
                                       moec_err *err) MOEC_USE_RESULT;
MOEC_API const moec_override *moec_repair_weights(const moec_repair *r);
/** Moves the folder to `dir`, where it stays. MOEC_EIO. */
MOEC_API moec_status moec_repair_keep(moec_repair *r, const char *dir, moec_err *err) MOEC_USE_RESULT;
/** Releases it; `remove`: the folder goes, too. NULL-safe. */
MOEC_API void moec_repair_close(moec_repair *r, bool remove);

#endif
