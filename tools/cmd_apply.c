/* apply: carries out a plan file. */
#include "output.h"
#include "output_weights.h"

typedef struct apply_params {
    tool_common common;
    const char *output, *compat;
} apply_params;

static const moec_opt rows[] = {
    {"output", 'o', MOEC_TEXT(apply_params, output), .value = "OUT", .help = "folder to write"},
    TOOL_COMPAT_ROW(apply_params, compat),
    TOOL_DRY_RUN_ROW(apply_params),
    TOOL_OVERWRITE_ROW(apply_params),
    TOOL_RESUME_ROW(apply_params),
    TOOL_MEMORY_ROW(apply_params),
    TOOL_COMMON_ROWS(apply_params),
    TOOL_END_ROW,
};

static moec_status apply(const apply_params *p, const char *dir, const char *file, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_model *m = NULL;
    moec_plan *plan = NULL;
    moec_override *weights = NULL;
    moec_digest print;
    double began = moec_now();
    MOEC_TRY(moec_plan_read(&plan, file, err));
    MOEC_TRY(moec_model_open(&m, dir, err));
    MOEC_TRY(tool_is_folder(m, err));
    MOEC_TRY(moec_ckpt_fingerprint(&print, m->ckpt, err));
    MOEC_TRY(moec_within(err, moec_plan_check(plan, m, print.hex, err), "%s", file)); /* before anything is printed from it */
    MOEC_TRY(tool_weights_open(&weights, plan, file, err));
    const tool_job job = {.weights = weights, .common = &p->common, .model = m, .fingerprint = print.hex, .plan = plan,
                          .output = p->output, .compat = p->compat, .began = began};
    MOEC_TRY(tool_carry_out(&job, err));
done:
    moec_override_close(weights);
    moec_model_close(m);
    moec_plan_free(plan);
    return st;
}

static int run(const moec_verb *verb, int argc, char **argv)
{
    apply_params p;
    moec_opt_list words = {0};
    moec_err err = {MOEC_OK, ""};
    int rc;
    if (!tool_begin(&rc, &p, &words, verb, argc, argv))
        return rc;
    return tool_end(apply(&p, words.at[0], words.at[1], &err), &err);
}

const moec_verb moec_verb_apply = {
    .name = "apply",
    .args = "MODEL PLAN -o OUT",
    .brief = "carry out a plan that another verb wrote with --plan-only",
    .about = "A plan is JSON: for each layer the experts that are kept (others: attention experts and "
             "multi-token-prediction layers), and what else was asked: pad, groups, mtp, dtype. It can be read, compared and edited; what does not fit "
             "the model is refused. The result is the same, byte for byte, as that of the verb that made the plan.",
    .examples = "moecompress apply Qwen3-30B-A3B plan.json -o Qwen3-15B-A3B\n"
                "moecompress apply Qwen3-30B-A3B plan.json --dry-run --compat all --json",
    .opts = rows,
    .min_args = 2,
    .max_args = 2,
    .run = run,
};
