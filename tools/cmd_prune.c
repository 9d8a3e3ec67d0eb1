/* prune: removes whole experts, the same number in every layer, by a score from calibration statistics. */
#include "output.h"
#include "prune_repair.h"
#include "prune_tasks.h"

#include <string.h>

typedef struct prune_params {
    tool_common common;
    const char *output, *stats, *method, *protect;
    double share;
    int64_t keep;
    const char *compat;
    int64_t pad;
    int mtp, groups, dtype;
    bool plan_only, methods;
    tool_tasks_params tasks;
    tool_repair_params repair;
} prune_params;

static const char *const policies[] = {"keep", "drop", NULL};
static const char *const dtypes[] = {"source", "bf16", "f16", "f32", NULL};

static const moec_opt rows[] = {
    {"output", 'o', MOEC_TEXT(prune_params, output), .value = "OUT",
     .help = "folder to write; with --plan-only the plan file (none: standard output)"},
    {"stats", 0, MOEC_TEXT(prune_params, stats), .value = "FILE", .help = "statistics that calibrate wrote"},
    {"method", 0, MOEC_TEXT(prune_params, method), .fallback = "reap", .value = "NAME",
     .help = "how experts are scored; reap by default: it is the one whose published results hold up at half the experts, "
             "and a mean does not depend on how often the text happens to use an expert"},
    {"remove", 0, MOEC_SHARE(prune_params, share), .lo = 0, .hi = 1, .fallback = "-1", .value = "SHARE",
     .help = "share of each layer's experts to remove, rounded down"},
    {"keep", 0, MOEC_INT(prune_params, keep), .lo = 1, .hi = 65535, .fallback = "0", .value = "N",
     .help = "experts to keep in each layer, instead of --remove"},
    {"protect", 0, MOEC_TEXT(prune_params, protect), .value = "FILE|super",
     .help = "experts that stay whatever their score: a file of lines 'LAYER EXPERT' or JSON {\"LAYER\": [experts]}, or super: "
             "the few whose outputs are far larger than all others'"},
    {"groups", 0, MOEC_CHOICE(prune_params, groups), .choices = policies, .fallback = "keep", .value = "keep|drop",
     .help = "where the router chooses among groups of experts (DeepSeek): keep the same number of each group, or drop the "
             "groups and choose among all experts at once, which changes the routing"},
    {"mtp", 0, MOEC_CHOICE(prune_params, mtp), .choices = policies, .fallback = "keep", .value = "keep|drop",
     .help = "multi-token-prediction layers: prune them to the same count, or leave them out"},
    {"pad-to", 0, MOEC_INT(prune_params, pad), .lo = 0, .hi = 65535, .fallback = "0", .value = "N",
     .help = "write N experts a layer, dead ones behind those that are kept (of each group, where the router chooses among groups: "
             "N is a multiple of their number): for a client that needs a certain count; only where the router's bias can rule them "
             "out exactly. They cost disk and memory, no time"},
    {"dtype", 0, MOEC_CHOICE(prune_params, dtype), .choices = dtypes, .fallback = "source", .value = "source|bf16|f16|f32",
     .help = "number format of the weights written; source copies them byte for byte, FP8 and MXFP4 included"},
    TOOL_TASKS_ROWS(prune_params, tasks),
    TOOL_REPAIR_ROWS(prune_params, repair),
    TOOL_COMPAT_ROW(prune_params, compat),
    {"plan-only", 0, MOEC_FLAG(prune_params, plan_only), .help = "write the plan as JSON, for apply, and no model"},
    {"methods", 0, MOEC_FLAG(prune_params, methods), .help = "list the methods and leave"},
    TOOL_SEED_ROW(prune_params),
    TOOL_DRY_RUN_ROW(prune_params),
    TOOL_OVERWRITE_ROW(prune_params),
    TOOL_RESUME_ROW(prune_params),
    TOOL_MEMORY_ROW(prune_params),
    TOOL_COMMON_ROWS(prune_params),
    TOOL_END_ROW,
};

static moec_status list_methods(const prune_params *p, moec_err *err)
{
    if (p->common.json)
        return tool_print_json(moec_method_list(MOEC_PRUNE), err);
    const moec_method *m;
    for (size_t i = 0; (m = moec_method_at(i)) != NULL; i++) {
        if (m->kind != MOEC_PRUNE)
            continue;
        printf("%-13s %s\n%-13s %s\n%-13s %s%s%s%s\n%-13s needs", m->name, m->brief, "", m->formula, "", m->paper,
               m->arxiv ? " (arXiv:" : "", m->arxiv ? m->arxiv : "", m->arxiv ? ")" : "", "");
        for (int k = 0; k < m->n_needs; k++)
            printf(" %s", moec_stat_kinds[m->needs[k]].name);
        printf("%s\n\n", m->n_needs == 0 ? " no statistics" : "");
    }
    return MOEC_OK;
}

static moec_status check_params(const prune_params *p, const moec_opt_list *words, moec_err *err)
{
    if (words->n < 1)
        return moec_fail(err, MOEC_EINVAL, "prune: MODEL is missing: the folder of the model");
    if (p->share < 0.0 && p->keep == 0)
        return moec_fail(err, MOEC_EINVAL, "prune: how much? give --remove 25%% or --keep N");
    if (p->share >= 0.0 && p->keep > 0)
        return moec_fail(err, MOEC_EINVAL, "prune: --remove and --keep say the same thing; give one");
    if (!p->output && !p->plan_only && !p->common.dry_run)
        return moec_fail(err, MOEC_EINVAL, "prune: -o OUT is missing: the folder to write");
    return tool_tasks_check(&p->tasks, rows, p->method, p->stats, err);
}

static moec_status prune(const prune_params *p, const char *dir, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_model *m = NULL;
    moec_stats *stats = NULL;
    moec_plan *plan = NULL;
    moec_guard guard = {0};
    moec_digest print, stats_digest = {""};
    uint64_t bytes;
    char *guard_name = NULL;
    moec_corpus corpus = {0};
    moec_repair_opts repair = {.corpus = &corpus, .compute = (moec_compute)p->repair.input.compute,
                               .epochs = (int)p->repair.epochs};
    double began = moec_now();
    MOEC_TRY(tool_repair_check(&repair.kind, &p->repair, err));
    MOEC_TRY(moec_model_open(&m, dir, err));
    MOEC_TRY(moec_ckpt_fingerprint(&print, m->ckpt, err));
    if (p->stats) {
        MOEC_TRY(moec_stats_load(&stats, p->stats, err));
        MOEC_TRY(moec_file_digest(&stats_digest, &bytes, p->stats, err));
        MOEC_TRY(moec_within(err, moec_stats_check(stats, m, err), "%s", p->stats)); /* before anyone counts on its shape */
    }
    if (p->tasks.weights)
        MOEC_TRY(moec_within(err, moec_stats_set_weights(stats, p->tasks.weights, err), "--domain-weight"));
    if (p->protect)
        MOEC_TRY(moec_guard_read(&guard, &guard_name, p->protect, m, stats, err));
    const moec_request q = {.model = m, .fingerprint = print.hex, .stats = stats, .stats_digest = stats_digest.hex,
                            .guard = p->protect ? &guard : NULL, .guard_name = guard_name,
                            .share = p->share < 0.0 ? 0.0 : p->share, .keep = p->keep, .seed = p->common.seed,
                            .drop_mtp = p->mtp == 1, .drop_groups = p->groups == 1, .pad = p->pad};
    if (q.drop_mtp && m->mtp_layers == 0)
        MOEC_TRY(moec_fail(err, MOEC_EINVAL, "--mtp drop: the model has no multi-token-prediction layers with experts"));
    MOEC_TRY(tool_tasks_plan(&plan, &p->tasks, p->method, &q, err));
    if (p->dtype > 0)
        plan->dtype = moec_plan_dtype(dtypes[p->dtype]);
    if (p->protect)
        moec_say("protected: %lld expert%s", (long long)guard.count, tool_s(guard.count));
    if (repair.kind != MOEC_REPAIR_NONE)
        MOEC_TRY(tool_read_text(&corpus, &p->repair.input, m, p->common.seed, err));
    const tool_job job = {.common = &p->common, .model = m, .fingerprint = print.hex, .plan = plan, .stats = stats,
                          .repair = repair.kind != MOEC_REPAIR_NONE ? &repair : NULL, .output = p->output, .compat = p->compat, .plan_only = p->plan_only, .began = began};
    MOEC_TRY(tool_carry_out(&job, err));
done:
    moec_corpus_release(&corpus);
    moec_plan_free(plan);
    moec_guard_release(&guard);
    moec_free(guard_name);
    moec_stats_free(stats);
    moec_model_close(m);
    return st;
}

static int run(const moec_verb *verb, int argc, char **argv)
{
    prune_params p;
    moec_opt_list words = {0};
    moec_err err = {MOEC_OK, ""};
    int rc;
    if (!tool_begin(&rc, &p, &words, verb, argc, argv))
        return rc;
    moec_status st;
    if (p.methods)
        st = list_methods(&p, &err);
    else if ((st = check_params(&p, &words, &err)) == MOEC_OK)
        st = prune(&p, words.at[0], &err);
    return tool_end(st, &err);
}

const moec_verb moec_verb_prune = {
    .name = "prune",
    .args = "MODEL --stats FILE --remove SHARE -o OUT",
    .brief = "remove experts, by any saliency",
    .about = "Scores every expert from calibration statistics, keeps the best of each layer and writes the smaller model: "
             "expert tensors that stay are copied byte for byte and renumbered, routers lose the rows of the removed experts, "
             "config.json gets the new numbers, every other file is copied. Attention experts and multi-token-prediction "
             "layers are not seen by calibration: of them the same number is kept, by the norm of the router's rows. "
             "The output is verified before it gets its name; a "
             "run that was stopped continues when it is started again.",
    .examples = "moecompress prune Qwen3-30B-A3B --stats stats.h5 --remove 25% -o Qwen3-22B-A3B\n"
                "moecompress prune Qwen3-30B-A3B --stats stats.h5 --method easy-ep --keep 64 --dry-run\n"
                "moecompress prune Qwen3-30B-A3B --patterns tasks.json --task code --remove 50% -o Qwen3-code\n"
                "moecompress prune Qwen3-30B-A3B --stats stats.h5 --remove 50% --protect super --plan-only -o plan.json\n"
                "moecompress prune DeepSeek-V3 --stats stats.h5 --keep 192 --mtp drop --compat vllm,llama.cpp -o DeepSeek-V3-192\n"
                "moecompress prune gpt-oss-120b --stats stats.h5 --keep 90 --pad-to 96 -o gpt-oss-96",
    .opts = rows,
    .min_args = 0,
    .max_args = 1,
    .run = run,
};
