/* prune: removes whole experts by a score, from calibration statistics or from the weights. */
#include "output.h"
#include "prune_grain.h"
#include "prune_repair.h"
#include "prune_tasks.h"
#include "sources.h"

#include <string.h>

typedef struct prune_params {
    tool_common common;
    const char *output, *stats, *protect, *remove, *base;
    const char *method; /* NULL: not given */
    int64_t keep;
    const char *compat;
    int64_t pad, least;
    double lambda1, lambda2;
    int mtp, groups, dtype, allocation;
    bool plan_only, methods;
    tool_tasks_params tasks;
    tool_repair_params repair;
    tool_grain_params grain;
} prune_params;

static const char *const policies[] = {"keep", "drop", NULL};
static const char *const allocations[] = {"uniform", "global", "mass", NULL}; /* as moec_allocation counts */

static const moec_opt rows[] = {
    TOOL_HEADING("what is removed"),
    {"stats", 0, MOEC_TEXT(prune_params, stats), .value = "FILE", .help = "statistics that calibrate wrote"},
    {"method", 0, MOEC_TEXT(prune_params, method), .value = "NAME",
     .help = "how experts are scored; energy by default: what an expert adds to the layer's output, squared, which is the error that "
             "repair lessens; reap has the most published results"},
    {"remove", 0, MOEC_TEXT(prune_params, remove), .value = "SHARE[,SHARE]",
     .help = "share of each layer's experts to remove, such as 25% or 0.25, rounded down; several, ascending, with --plan-only: "
             "plans OUT/remove-25.json and so on from one ranking, each contained in the one before"},
    {"keep", 0, MOEC_INT(prune_params, keep), .lo = 1, .hi = 65535, .fallback = "0", .value = "N",
     .help = "experts to keep in each layer, instead of --remove"},
    {"protect", 0, MOEC_TEXT(prune_params, protect), .value = "FILE|super",
     .help = "experts that stay whatever their score: a file of lines 'LAYER EXPERT' or JSON {\"LAYER\": [experts]}, or super: "
             "the few whose outputs are far larger than all others'"},
    {"mtp", 0, MOEC_CHOICE(prune_params, mtp), .choices = policies, .fallback = "keep", .value = "keep|drop",
     .help = "multi-token-prediction layers: prune them to the same count, or leave them out"},
    TOOL_HEADING("whole experts"),
    {"allocation", 0, MOEC_CHOICE(prune_params, allocation), .choices = allocations, .fallback = "uniform",
     .value = "uniform|global|mass",
     .help = "how many each layer keeps: the same number; out of one pool of all layers by its share of the layer's score; or as "
             "many as hold the same mass of it (NLLB-200). Unequal layers are padded to the largest where the router's bias can rule "
             "dead experts out; elsewhere no client loads them and only --plan-only and --dry-run go"},
    {"min-experts", 0, MOEC_INT(prune_params, least), .lo = 0, .hi = 65535, .fallback = "0", .value = "N",
     .help = "global, mass: experts that each layer keeps at least; 0: top-k, and for mass 4"},
    {"groups", 0, MOEC_CHOICE(prune_params, groups), .choices = policies, .fallback = "keep", .value = "keep|drop",
     .help = "where the router chooses among groups of experts (DeepSeek): keep the same number of each group, or drop the "
             "groups and choose among all experts at once, which changes the routing"},
    {"pad-to", 0, MOEC_INT(prune_params, pad), .lo = 0, .hi = 65535, .fallback = "0", .value = "N",
     .help = "write N experts a layer, dead ones behind those that are kept (of each group, where the router chooses among groups: "
             "N is a multiple of their number): for a client that needs a certain count; only where the router's bias can rule them "
             "out exactly. They cost disk and memory, no time"},
    MOEC_BASE_ROW(prune_params, base),
    MOEC_STUN_ROWS(prune_params, lambda1, lambda2),
    TOOL_HEADING("texts and tasks"),
    TOOL_TASKS_ROWS(prune_params, tasks),
    TOOL_HEADING("neurons, weights, layers, experts a token"),
    TOOL_GRAIN_ROWS(prune_params, grain),
    TOOL_HEADING("repair"),
    TOOL_REPAIR_ROWS(prune_params, repair),
    TOOL_HEADING("output"),
    {"output", 'o', MOEC_TEXT(prune_params, output), .value = "OUT",
     .help = "folder to write; with --plan-only the plan file (none: standard output), or for several shares the folder of the "
             "plans"},
    TOOL_DTYPE_ROW(prune_params, "written; source copies them byte for byte, FP8 and MXFP4 included"),
    TOOL_COMPAT_ROW(prune_params, compat),
    TOOL_PLAN_ONLY_ROW(prune_params, "as JSON, for apply"),
    TOOL_DRY_RUN_ROW(prune_params),
    TOOL_OVERWRITE_ROW(prune_params),
    TOOL_RESUME_ROW(prune_params),
    TOOL_HEADING("running"),
    TOOL_METHODS_ROW(prune_params),
    TOOL_SEED_ROW(prune_params),
    TOOL_MEMORY_ROW(prune_params),
    TOOL_COMMON_ROWS(prune_params),
    TOOL_END_ROW,
};

static void print_method(const moec_method *m)
{
    tool_print_method(m);
    printf("    needs");
    for (int k = 0; k < m->n_needs; k++)
        printf(" %s", moec_stat_kinds[m->needs[k]].name);
    printf("%s\n", m->n_needs == 0 ? " no statistics" : "");
    for (const moec_opt *r = m->opts; r && r->kind != MOEC_OPT_END; r++)
        printf("    --%s %s: %s%s%s\n", r->name, r->value, r->help, r->fallback ? "; default " : "",
               r->fallback ? r->fallback : "");
    printf("\n");
}

static moec_status list_methods(const prune_params *p, moec_err *err)
{
    if (p->common.json)
        return tool_print_json(moec_method_list(MOEC_PRUNE), err);
    const moec_method *m;
    for (size_t i = 0; (m = moec_method_at(i)) != NULL; i++)
        if (m->kind == MOEC_PRUNE) { /* those of a grain stand together */
            const moec_method *before = i > 0 ? moec_method_at(i - 1) : NULL;
            if (!before || before->grain != m->grain)
                printf("%s--grain %s\n\n", i > 0 ? "\n" : "", moec_grain_name(m->grain));
            print_method(m);
        }
    return MOEC_OK;
}

/* For --help. */
static const char *method_entry(const char **text, size_t i)
{
    static char buf[1200];
    const moec_method *m = moec_method_at(i);
    if (!m || m->kind != MOEC_PRUNE) /* prune methods are the first of the table */
        return NULL;
    const bool experts = m->grain == MOEC_GRAIN_EXPERTS;
    snprintf(buf, sizeof buf, "%s%s%s%s [%s]. %s%s%s%s", experts ? "" : "--grain ", experts ? "" : moec_grain_name(m->grain),
             experts ? "" : ": ", m->brief, m->formula, m->paper, m->arxiv ? " (arXiv:" : "",
             m->arxiv ? m->arxiv : "", m->arxiv ? ")" : "");
    *text = buf;
    return m->name;
}

/* --- shares ---------------------------------------------------------------------------------------------------------- */

enum { SHARES_MAX = 32 };
typedef struct shares {
    int n;
    double at[SHARES_MAX];
} shares;

static moec_status parse_shares(shares *out, const char *text, moec_err *err)
{
    for (const char *p = text;; p++) {
        char word[64];
        size_t n = strcspn(p, ",");
        snprintf(word, sizeof word, "%.*s", (int)(n < sizeof word ? n : sizeof word - 1), p);
        if (out->n == SHARES_MAX)
            return moec_fail(err, MOEC_EINVAL, "--remove: more than %d shares", (int)SHARES_MAX);
        double *v = &out->at[out->n++];
        moec_status st = moec_within(err, moec_share_parse(v, word, err), "--remove");
        if (st != MOEC_OK)
            return st;
        if (!(*v >= 0.0 && *v <= 1.0))
            return moec_fail(err, MOEC_EINVAL, "--remove: %s is not in 0%% .. 100%%", word);
        p += n;
        if (!*p)
            return MOEC_OK;
    }
}

/* "OUT/remove-12.5.json" for each share. */
static moec_status write_nested(const tool_job *job, const prune_params *p, const moec_method *me, const moec_request *q,
                                const shares *s, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_plan *plan[SHARES_MAX] = {NULL};
    char *path[SHARES_MAX] = {NULL};
    MOEC_TRY(moec_method_plans(plan, MOEC_PRUNE, me->name, q, s->at, s->n, err));
    for (int i = 0; i < s->n; i++) {
        MOEC_TRY(moec_format(&path[i], err, "%s/remove-%.6g.json", p->output, s->at[i] * 100.0));
        plan[i]->dtype = tool_dtype(p->dtype);
    }
    MOEC_TRY(tool_write_plans(job, plan, (const char *const *)path, s->n, err));
done:
    for (int i = 0; i < s->n; i++) {
        moec_plan_free(plan[i]);
        moec_free(path[i]);
    }
    return st;
}

/* --- the job --------------------------------------------------------------------------------------------------------- */

/* Options of one method go with no other. */
static moec_status check_method_options(const prune_params *p, const moec_method *m, moec_err *err)
{
    const struct {
        const char *name;
        bool given;
    } own[] = {{"base", p->base != NULL}, {"stun-lambda1", p->lambda1 < 1.0 || p->lambda1 > 1.0}, {"stun-lambda2", p->lambda2 > 0.0}};
    for (size_t i = 0; i < MOEC_COUNT(own); i++) {
        const moec_opt *r = m->opts;
        while (r && r->kind != MOEC_OPT_END && strcmp(r->name, own[i].name) != 0)
            r++;
        if (own[i].given && (!r || r->kind == MOEC_OPT_END))
            return moec_fail(err, MOEC_EINVAL, "prune: --%s is not for method %s; --methods says for which", own[i].name, m->name);
    }
    return MOEC_OK;
}

/* *me: the method, by default the grain's. */
static moec_status check_params(const moec_method **me, const prune_params *p, const shares *s, const moec_opt_list *words,
                                moec_err *err)
{
    moec_status st = MOEC_OK;
    if (words->n < 1)
        return moec_fail(err, MOEC_EINVAL, "prune: MODEL is missing: the folder of the model");
    const bool experts = p->grain.grain == MOEC_GRAIN_EXPERTS;
    if (s->n == 0 && p->keep == 0 && experts && p->grain.top_k == 0)
        return moec_fail(err, MOEC_EINVAL, "prune: how much? give --remove 25%% or --keep N");
    if (s->n > 0 && p->keep > 0)
        return moec_fail(err, MOEC_EINVAL, "prune: --remove and --keep say the same thing; give one");
    if (!p->output && !p->plan_only && !p->common.dry_run)
        return moec_fail(err, MOEC_EINVAL, "prune: -o OUT is missing: the folder to write");
    if (s->n > 1 && (!p->plan_only || p->common.dry_run || !p->output))
        return moec_fail(err, MOEC_EINVAL, "prune: several shares make several plans: --plan-only and -o FOLDER are needed, and no "
                         "--dry-run");
    if (s->n > 1 && (!experts || p->grain.top_k > 0))
        return moec_fail(err, MOEC_EINVAL, "prune: --grain and --top-k go with one share at a time");
    if (!experts && (p->tasks.patterns || p->tasks.betas || p->allocation > 0 || p->least > 0))
        return moec_fail(err, MOEC_EINVAL, "prune: --patterns, --betas, --allocation and --min-experts are for whole experts");
    if (s->n > 1 && (p->tasks.patterns || p->tasks.betas || p->tasks.weights))
        return moec_fail(err, MOEC_EINVAL, "prune: --patterns, --betas and --domain-weight go with one share at a time");
    if (p->repair.input.text.n == 0 && tool_text_options_given(&p->repair.input))
        return moec_fail(err, MOEC_EINVAL, "prune: --seq-len, --max-windows, --tokens and --bos say how --text is read; give --text "
                         "FILE, or leave them out");
    MOEC_TRY(moec_method_take(me, MOEC_PRUNE, (moec_grain)p->grain.grain, p->method, err));
    MOEC_TRY(check_method_options(p, *me, err));
    MOEC_TRY(tool_tasks_check(&p->tasks, p->method, p->stats, err));
done:
    return st;
}

/* Experts see other things in longer windows. Merged statistics have no one length. */
static void say_seq_len(const moec_stats *s, int64_t seq_len)
{
    moec_err err = {MOEC_OK, ""};
    moec_json *options = NULL;
    int64_t n;
    if (moec_json_parse(&options, s->meta.options, strlen(s->meta.options), "options", &err) == MOEC_OK &&
        moec_json_int(moec_json_get(options, "seq_len"), &n) && n != seq_len)
        moec_say("--text is read in windows of %lld tokens, the statistics were collected with --seq-len %lld", (long long)seq_len,
                 (long long)n);
    moec_json_free(options);
}

static moec_status prune(const prune_params *p, const moec_method *me, const shares *s, int64_t drop, const char *dir,
                         moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_plan *plan = NULL;
    tool_sources o = {.stats_digest = {""}};
    const tool_source_names names = {.model = dir, .base = p->base, .stats = p->stats, .weights = p->tasks.weights,
                                     .protect = p->protect, .drop_mtp = p->mtp == 1};
    const bool experts = p->grain.grain == MOEC_GRAIN_EXPERTS;
    moec_corpus corpus = {0};
    moec_repair_opts repair = {.corpus = &corpus};
    bool run_text;
    double began = moec_now();
    MOEC_TRY(tool_repair_check(&repair, &run_text, &p->repair, me->name, err));
    if (s->n > 1 && run_text)
        MOEC_TRY(moec_fail(err, MOEC_EINVAL, "prune: repair goes with one share at a time"));
    MOEC_TRY(tool_sources_open(&o, &names, err));
    MOEC_TRY(tool_is_folder(o.model, err));
    moec_request q = {.model = o.model, .fingerprint = o.print.hex, .stats = o.stats, .stats_digest = o.stats_digest.hex,
                            .guard = p->protect ? &o.guard : NULL, .guard_name = o.guard_name,
                            .share = s->n > 0 ? s->at[0] : 0.0, .keep = p->keep, .seed = p->common.seed,
                            .drop_mtp = p->mtp == 1, .drop_groups = p->groups == 1, .pad = p->pad,
                            .allocation = (moec_allocation)p->allocation, .least = p->least,
                            .plan_only = p->plan_only || p->common.dry_run, .base = o.base,
                            .base_print = o.base ? o.base_print.hex : NULL, .lambda1 = p->lambda1, .lambda2 = p->lambda2};
    MOEC_TRY(tool_grain_request(&q, &p->grain, drop, err));
    tool_job job = {.common = &p->common, .model = o.model, .fingerprint = o.print.hex, .stats = o.stats, .output = p->output,
                    .compat = p->compat, .plan_only = p->plan_only, .began = began};
    if (repair.kind != MOEC_REPAIR_NONE)
        MOEC_TRY(tool_grain_repairs(q.grain, err));
    if (p->protect)
        moec_say("protected: %lld expert%s", (long long)o.guard.count, tool_s(o.guard.count));
    if (s->n > 1) {
        st = write_nested(&job, p, me, &q, s, err);
        goto done;
    }
    if (experts && s->n == 0 && p->keep == 0) { /* --top-k alone */
        MOEC_TRY(moec_plan_new(&plan, o.model, "", o.print.hex, err));
        MOEC_TRY(moec_plan_keep_all(plan, err));
    } else {
        MOEC_TRY(tool_tasks_plan(&plan, &p->tasks, me->name, &q, err));
    }
    tool_grain_say(plan, &q);
    if (p->grain.top_k > 0)
        MOEC_TRY(moec_plan_set_top_k(plan, o.model, p->grain.top_k, err));
    if (q.grain == MOEC_GRAIN_NEURONS || q.grain == MOEC_GRAIN_WEIGHTS) {
        job.thin = me;
        job.request = &q;
    }
    plan->dtype = tool_dtype(p->dtype);
    if (run_text) {
        if (o.stats)
            say_seq_len(o.stats, p->repair.input.seq_len);
        MOEC_TRY(tool_read_text(&corpus, &p->repair.input, o.model, p->common.seed, err));
        job.repair = &repair;
    }
    if (repair.method && p->common.dry_run) {
        moec_warn("method %s decides while the layers run: which experts are listed here means nothing, only how many",
                  repair.method->name);
        job.stats = NULL; /* nor can be said what the removed ones served */
    }
    job.plan = plan;
    MOEC_TRY(tool_carry_out(&job, err));
done:
    moec_corpus_release(&corpus);
    moec_plan_free(plan);
    tool_sources_release(&o);
    return st;
}

static int run(const moec_verb *verb, int argc, char **argv)
{
    prune_params p;
    shares s = {0};
    moec_opt_list words = {0};
    moec_err err = {MOEC_OK, ""};
    int rc;
    if (!tool_begin(&rc, &p, &words, verb, argc, argv))
        return rc;
    moec_status st = MOEC_OK;
    if (p.methods)
        return tool_end(list_methods(&p, &err), &err);
    const moec_method *me;
    int64_t drop; /* layers */
    MOEC_TRY(tool_grain_check(&drop, &p.grain, p.remove, p.keep, &err));
    if (p.remove && drop == 0)
        MOEC_TRY(parse_shares(&s, p.remove, &err));
    MOEC_TRY(check_params(&me, &p, &s, &words, &err));
    MOEC_TRY(prune(&p, me, &s, drop, words.at[0], &err));
done:
    return tool_end(st, &err);
}

const moec_verb moec_verb_prune = {
    .name = "prune",
    .args = "MODEL --stats FILE --remove SHARE -o OUT",
    .brief = "remove experts, by any saliency",
    .about = "Scores every expert from calibration statistics or its weights (--methods lists the ways), keeps the best of each layer and writes the smaller model: "
             "expert tensors that stay are copied byte for byte and renumbered, routers lose the rows of the removed experts, "
             "config.json gets the new numbers, every other file is copied. Attention experts and multi-token-prediction "
             "layers are not seen by calibration: of them the same number is kept, by the norm of the router's rows. "
             "With --text the weights that stay are fitted so that each layer gives again what the original's gave (--repair). "
             "With --grain, neurons, single weights or layers go instead of whole experts. "
             "The output is verified before it gets its name; a "
             "run that was stopped continues when it is started again.",
    .examples = "moecompress prune Qwen3-30B-A3B --stats stats.h5 --remove 25% -o Qwen3-22B-A3B\n"
                "moecompress prune Qwen3-30B-A3B --stats stats.h5 --remove 50% --repair deep --seq-len 2048 -o Qwen3-15B-A3B --text "
                "calibration.txt\n"
                "moecompress prune Qwen3-30B-A3B --stats stats.h5 --method easy-ep --keep 64 --dry-run\n"
                "moecompress prune Qwen3-30B-A3B --patterns tasks.json --task code --remove 50% -o Qwen3-code\n"
                "moecompress prune Qwen3-30B-A3B --stats stats.h5 --remove 50% --protect super --plan-only -o plan.json\n"
                "moecompress prune DeepSeek-V3 --stats stats.h5 --keep 192 --mtp drop --compat vllm,llama.cpp -o DeepSeek-V3-192\n"
                "moecompress prune Qwen3-30B-A3B --stats stats.h5 --method nllb --allocation mass --remove 50% --plan-only -o mass.json\n"
                "moecompress prune Qwen3-30B-A3B --stats stats.h5 --remove 10%,25%,50% --plan-only -o plans\n"
                "moecompress prune tuned --base original --method router-norm --remove 25% -o smaller\n"
                "moecompress prune gpt-oss-120b --stats stats.h5 --keep 90 --pad-to 96 -o gpt-oss-96\n"
                "moecompress prune Qwen3-30B-A3B --stats stats.h5 --grain neurons --remove 50% -o Qwen3-narrow\n"
                "moecompress prune Qwen3-30B-A3B --stats stats.h5 --grain neurons --remove 50% --repair deep -o Qwen3-narrow "
                "--text calibration.txt\n"
                "moecompress prune Qwen3-30B-A3B --stats stats.h5 --grain weights --method wanda --pattern 2:4 -o Qwen3-sparse\n"
                "moecompress prune Qwen3-30B-A3B --stats stats.h5 --grain blocks --remove 4 -o Qwen3-44-layers\n"
                "moecompress prune Qwen3-30B-A3B --top-k 6 -o Qwen3-top-6",
    .opts = rows,
    .min_args = 0,
    .max_args = 1,
    .run = run,
    .entries = "methods (--methods also says which statistics they need, with --json for programs)",
    .entry = method_entry,
};
