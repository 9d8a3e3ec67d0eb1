/* factor: experts' matrices become products of smaller ones. */
#include "output.h"
#include "prune_grain.h"
#include "tool_text.h"

#include <string.h>

typedef struct factor_params {
    tool_common common;
    tool_text input;
    const char *output, *method, *compat;
    double ratio, keep_rows; /* -1: not given */
    int64_t rank, cores;
    int emit, dtype;
    bool plan_only, methods;
} factor_params;

static const char *const emits[] = {"dense", "factored", NULL};

static const moec_opt rows[] = {
    {"output", 'o', MOEC_TEXT(factor_params, output), .value = "OUT",
     .help = "folder to write; with --plan-only the plan file, its weights go to OUT.weights"},
    {"method", 0, MOEC_TEXT(factor_params, method), .value = "NAME", .help = "how matrices are factored (--methods lists the ways); svd by default"},
    {"ratio", 0, MOEC_SHARE(factor_params, ratio), .lo = 0, .hi = 1, .fallback = "-1", .value = "SHARE",
     .help = "share of the experts' bytes that stays, such as 50%: ranks, bonds or neurons follow from it, rounded down"},
    {"rank", 0, MOEC_INT(factor_params, rank), .lo = 1, .hi = 1 << 20, .fallback = "0", .value = "R",
     .help = "instead of --ratio: the rank of every matrix; mpo: the most that a bond may have"},
    {"keep-rows", 0, MOEC_SHARE(factor_params, keep_rows), .lo = 0, .hi = 1, .fallback = "-1", .value = "SHARE",
     .help = "mc-smoe: share of each matrix's rows that is kept whole; 10% when it is not given"},
    {"cores", 0, MOEC_INT(factor_params, cores), .lo = 1, .hi = MOEC_FACTOR_CORES, .fallback = "0", .value = "N",
     .help = "mpo: tensors of a train, 2 or more; 3 when it is not given"},
    {"emit", 0, MOEC_CHOICE(factor_params, emit), .choices = emits, .fallback = "dense", .value = "dense|factored",
     .help = "dense: the products, under the model's own tensor names, as large as before, for every client and for measuring. factored: the "
             "factors, small, with a Python file that transformers 5 runs (trust_remote_code); no other client loads that. width writes "
             "narrow experts either way"},
    TOOL_DTYPE_ROW(factor_params, "written; needed where the source is quantized"),
    TOOL_TEXT_ROWS(factor_params),
    TOOL_COMPUTE_ROW(factor_params, "bf16"),
    TOOL_COMPAT_ROW(factor_params, compat),
    TOOL_PLAN_ONLY_ROW(factor_params, "as JSON and its weights, for eval --plan and apply"),
    TOOL_METHODS_ROW(factor_params),
    TOOL_SEED_ROW(factor_params),
    TOOL_DRY_RUN_ROW(factor_params),
    TOOL_OVERWRITE_ROW(factor_params),
    TOOL_RESUME_ROW(factor_params),
    TOOL_MEMORY_ROW(factor_params),
    TOOL_COMMON_ROWS(factor_params),
    TOOL_END_ROW,
};

/* For --help. */
static const char *method_entry(const char **text, size_t i)
{
    return tool_method_entry(text, MOEC_FACTOR, i);
}

/* MOEC_FACTOR_NONE: no matrix is factored, neurons are cut away. */
static moec_factor_kind kind_of(const moec_method *m)
{
    return m->row ? *(const moec_factor_kind *)m->row : MOEC_FACTOR_NONE;
}

static moec_status check_params(const factor_params *p, const moec_method *m, const moec_opt_list *words, moec_err *err)
{
    if (words->n < 1)
        return moec_fail(err, MOEC_EINVAL, "factor: MODEL is missing: the folder of the model");
    if ((p->ratio >= 0.0) == (p->rank > 0))
        return moec_fail(err, MOEC_EINVAL, p->rank > 0 ? "factor: --ratio and --rank say the same thing; give one"
                                                       : "factor: how much stays? give --ratio 50%% or --rank N");
    if (kind_of(m) == MOEC_FACTOR_NONE && p->rank > 0)
        return moec_fail(err, MOEC_EINVAL, "factor: --method %s takes --ratio; it has no ranks", m->name);
    if (p->keep_rows >= 0.0 && kind_of(m) != MOEC_FACTOR_ROWS)
        return moec_fail(err, MOEC_EINVAL, "factor: --keep-rows goes with --method mc-smoe");
    if (p->cores > 0 && kind_of(m) != MOEC_FACTOR_MPO)
        return moec_fail(err, MOEC_EINVAL, "factor: --cores goes with --method mpo");
    if (p->cores == 1)
        return moec_fail(err, MOEC_EINVAL, "factor: --cores 1: a train of one tensor is the matrix itself; 2 to %d", (int)MOEC_FACTOR_CORES);
    if (p->input.text.n == 0 && kind_of(m) != MOEC_FACTOR_MPO)
        return moec_fail(err, MOEC_EINVAL, "factor: method %s looks at what the experts are given; give --text FILE", m->name);
    if (!p->output && !p->common.dry_run)
        return moec_fail(err, MOEC_EINVAL, "factor: -o OUT is missing: %s", p->plan_only ? "weights that are computed need a place"
                                                                                         : "the folder to write");
    return MOEC_OK;
}

/* Statistics that tell neurons apart, in a file that is removed behind. A dry run needs none of their values. */
static moec_status calibrate(moec_stats **out, const factor_params *p, const moec_model *m, const moec_corpus *corpus, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *path = NULL;
    const moec_calibrate_opts o = {.compute = (moec_compute)p->input.compute, .tier = 1, .max_memory = p->common.max_memory,
                                   .options = "{}", .resume = p->common.resume, .checkpoint_every = 60.0};
    size_t n = strlen(p->output);
    while (n > 1 && p->output[n - 1] == '/')
        n--;
    MOEC_TRY(moec_format(&path, err, "%.*s.stats.h5", (int)n, p->output));
    if (moec_path_exists(path))
        MOEC_TRY(moec_fail(err, MOEC_EEXIST, "%s: is there already; the statistics of this run would go there", path));
    MOEC_TRY(moec_calibrate(out, m, corpus, path, &o, err));
    if (remove(path) != 0)
        moec_warn("%s: could not be removed", path);
done:
    moec_free(path);
    return st;
}

static moec_status cut_width(tool_job *job, const factor_params *p, const moec_request *asked, const moec_corpus *corpus, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_stats *stats = NULL;
    const moec_method *me;
    moec_request q = *asked;
    q.grain = MOEC_GRAIN_NEURONS;
    q.share = 1.0 - q.ratio;
    MOEC_TRY(moec_method_take(&me, MOEC_PRUNE, q.grain, NULL, err));
    MOEC_TRY(me->plan(&job->plan, me, &q, err)); /* which neurons is chosen when they are cut */
    job->plan->dtype = q.dtype;
    if (!p->common.dry_run)
        MOEC_TRY(tool_check_room(job, err));
    if (!p->common.dry_run)
        MOEC_TRY(calibrate(&stats, p, q.model, corpus, err));
    q.stats = stats;
    job->thin = me;
    job->request = &q;
    MOEC_TRY(tool_carry_out(job, err));
done:
    moec_stats_free(stats);
    return st;
}

static moec_status factor(const factor_params *p, const moec_method *me, const char *dir, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_model *m = NULL;
    moec_corpus corpus = {0};
    moec_digest print;
    tool_job job = {.common = &p->common, .output = p->output, .compat = p->compat, .plan_only = p->plan_only, .began = moec_now()};
    MOEC_TRY(moec_model_open(&m, dir, err));
    MOEC_TRY(tool_is_folder(m, err));
    MOEC_TRY(moec_ckpt_fingerprint(&print, m->ckpt, err));
    job.model = m;
    job.fingerprint = print.hex;
    moec_request q = {.model = m, .fingerprint = print.hex, .ratio = p->ratio, .rank = p->rank, .cores = p->cores > 0 ? p->cores : 3,
                      .keep_rows = p->keep_rows >= 0.0 ? p->keep_rows : 0.1, .kept = p->emit == 1,
                      .dtype = tool_dtype(p->dtype)};
    if (p->input.text.n > 0)
        MOEC_TRY(tool_read_text(&corpus, &p->input, m, p->common.seed, err));
    if (kind_of(me) == MOEC_FACTOR_NONE) {
        st = cut_width(&job, p, &q, &corpus, err);
        goto done;
    }
    const moec_factor_opts o = {.corpus = p->input.text.n > 0 ? &corpus : NULL, .compute = (moec_compute)p->input.compute};
    MOEC_TRY(moec_method_plan(&job.plan, MOEC_FACTOR, me->name, &q, err));
    job.factor = &o;
    MOEC_TRY(tool_carry_out(&job, err));
done:
    moec_plan_free(job.plan);
    moec_corpus_release(&corpus);
    moec_model_close(m);
    return st;
}

static int run(const moec_verb *verb, int argc, char **argv)
{
    factor_params p;
    moec_opt_list words = {0};
    moec_err err = {MOEC_OK, ""};
    const moec_method *me;
    moec_status st = MOEC_OK;
    int rc;
    if (!tool_begin(&rc, &p, &words, verb, argc, argv))
        return rc;
    if (p.methods)
        return tool_end(tool_list_methods(MOEC_FACTOR, p.common.json, &err), &err);
    MOEC_TRY(moec_method_take(&me, MOEC_FACTOR, MOEC_GRAIN_EXPERTS, p.method, &err));
    MOEC_TRY(check_params(&p, me, &words, &err));
    MOEC_TRY(factor(&p, me, words.at[0], &err));
done:
    return tool_end(st, &err);
}

const moec_verb moec_verb_factor = {
    .name = "factor",
    .args = "MODEL --text FILE... --ratio SHARE -o OUT",
    .brief = "make expert matrices smaller by factoring them",
    .about = "Runs MODEL over text, layer by layer, and replaces the matrices of each expert by factors that give the least error on the "
             "tokens that the router gives to it (--methods lists the ways). --ratio says how much of the experts' bytes stays. "
             "All experts stay; routers, shared experts, attention and multi-token-prediction layers are copied. "
             "By default the products are written, which every client loads and which are not smaller: measure them with eval, or with "
             "--plan-only and eval --plan. With --emit factored the factors themselves are written, and a file "
             "modeling_moecompress.py by which transformers computes with them. "
             "A run that was stopped continues when it is started again.",
    .examples = "moecompress factor Qwen3-30B-A3B --text calibration.txt --ratio 50% -o Qwen3-svd\n"
                "moecompress factor Qwen3-30B-A3B --text calibration.txt --method pivot --ratio 50% --emit factored -o Qwen3-small\n"
                "moecompress factor Qwen3-30B-A3B --text a.txt b.txt --method base-delta --ratio 50% --plan-only -o plan.json\n"
                "moecompress factor Qwen3-30B-A3B --text a.txt --method mc-smoe --keep-rows 5% --ratio 60% --dry-run\n"
                "moecompress factor Qwen3-30B-A3B --method mpo --cores 3 --ratio 75% -o Qwen3-mpo\n"
                "moecompress factor DeepSeek-V3 --text a.txt --ratio 50% --dtype bf16 --emit factored -o V3-small",
    .opts = rows,
    .min_args = 0,
    .max_args = 1,
    .run = run,
    .entries = "methods",
    .entry = method_entry,
};
