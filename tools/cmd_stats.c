/* stats: show, merge and export statistics files, list their super experts, keep patterns of tasks. */
#include "stats_store.h"
#include "stats_thresholds.h"

#include <inttypes.h>
#include <string.h>

typedef struct stats_params {
    tool_common common;
    const char *output, *imatrix, *weights;
    int imatrix_form;
    int64_t floor, top;
    tool_store_params store;
    tool_threshold_params thresholds;
} stats_params;

static const char *const imatrix_forms[] = {"gguf", "dat", NULL}; /* moec_imatrix_form */

static const char *const threshold_kinds[] = {"none", "odp", "adapmoe", "hobbit", "premoe", NULL}; /* TOOL_NO_THRESHOLDS .. */

static const moec_opt rows[] = {
    {"output", 'o', MOEC_TEXT(stats_params, output), .value = "FILE", .help = "merge, export --thresholds: the file to write"},
    {"floor", 0, MOEC_INT(stats_params, floor), .lo = 1, .hi = 1e15, .fallback = "32", .value = "N",
     .help = "show: experts that fewer tokens than this selected count as poorly covered"},
    {"top", 0, MOEC_INT(stats_params, top), .lo = 0, .hi = 1e9, .fallback = "10", .value = "N",
     .help = "super: so many of the largest outputs are listed, super experts or not"},
    {"task", 0, MOEC_TEXT(stats_params, store.task), .value = "NAME", .help = "store add: what the task is called"},
    {"domain", 0, MOEC_TEXT(stats_params, store.domain), .value = "NAME",
     .help = "store add and query: only this text of the statistics; else all of them together"},
    {"by-domain", 0, MOEC_FLAG(stats_params, store.by_domain),
     .help = "store add: one task for each text of the statistics, of its name"},
    {"imatrix", 0, MOEC_TEXT(stats_params, imatrix), .value = "FILE",
     .help = "export: the importance matrix to write, for llama-quantize --imatrix FILE"},
    {"imatrix-format", 0, MOEC_CHOICE(stats_params, imatrix_form), .choices = imatrix_forms, .fallback = "gguf",
     .value = "FORM", .help = "export: gguf, or dat, the form before it, which other programs still read"},
    {"thresholds", 0, MOEC_CHOICE(stats_params, thresholds.kind), .choices = threshold_kinds, .fallback = "none",
     .value = "odp|adapmoe|hobbit|premoe",
     .help = "export: what such a runtime asks of statistics, as JSON: odp: medians of the second weight over the first; adapmoe: thresholds "
             "below which a token uses one expert, sizes of caches; hobbit: which copy of an expert is loaded; premoe: each text's experts"},
    {"skip-loss", 0, MOEC_REAL(stats_params, thresholds.loss), .lo = 0, .hi = 100, .fallback = "0.005", .value = "T",
     .help = "adapmoe: nats that one expert in place of two may cost at a layer; the threshold is sqrt(T / sensitivity)"},
    {"sensitivities", 0, MOEC_TEXT(stats_params, thresholds.sensitivities), .value = "FILE",
     .help = "adapmoe: of layers, lines LAYER,NUMBER or JSON; else those that calibrate --errors --gains measured"},
    {"cache-experts", 0, MOEC_INT(stats_params, thresholds.cache), .lo = -1, .hi = 1e9, .fallback = "-1", .value = "N",
     .help = "adapmoe: share a cache of N experts out to the layers; -1: do not"},
    {"cuts", 0, MOEC_TEXT(stats_params, thresholds.cuts), .value = "T1,T2",
     .help = "hobbit: the high copy up to T1 of a token's weight, the low one up to T2, then none; 0.6,0.9"},
    {"shares", 0, MOEC_TEXT(stats_params, thresholds.shares), .value = "H,L",
     .help = "hobbit: in place of --cuts the shares of selections that are to have the high and the low copy: 0.67,0.3"},
    {"keep", 0, MOEC_INT(stats_params, thresholds.keep), .lo = 0, .hi = 65535, .fallback = "0", .value = "N",
     .help = "premoe: experts a layer; 0: all, in order"},
    {"domain-weights", 0, MOEC_TEXT(stats_params, weights), .value = "NAME=W,..",
     .help = "export: how much each text counts; else as the file says"},
    TOOL_OVERWRITE_ROW(stats_params),
    TOOL_COMMON_ROWS(stats_params),
    TOOL_END_ROW,
};

/* --- show --------------------------------------------------------------------------------------------------------- */

static int64_t int_of(const moec_json *object, const char *key)
{
    int64_t v = 0;
    moec_json_int(moec_json_get(object, key), &v);
    return v;
}

static double real_of(const moec_json *object, const char *key)
{
    double v = 0;
    moec_json_real(moec_json_get(object, key), &v);
    return v;
}

static const char *text_of(const moec_json *object, const char *key)
{
    const char *text = moec_json_string(moec_json_get(object, key));
    return text ? text : "";
}

/* The same for a terminal: what a file says may hold control characters. */
static const char *plain_of(char *out, size_t size, const moec_json *object, const char *key)
{
    snprintf(out, size, "%s", text_of(object, key));
    moec_plain_line(out);
    return out;
}

/* "3 (11%), 7 (9%)" */
static void print_top(const moec_json *top)
{
    const char *sep = "";
    for (size_t i = 0; i < moec_json_len(top); i++, sep = ", ")
        printf("%s%" PRId64 " (%.0f%%)", sep, int_of(moec_json_at(top, i), "expert"),
               100.0 * real_of(moec_json_at(top, i), "share"));
    printf("\n");
}

static double real_at(const moec_json *array, size_t i)
{
    double v = 0;
    moec_json_real(moec_json_at(array, i), &v);
    return v;
}

static void print_errors(const moec_json *errors)
{
    const moec_json *layers = moec_json_get(errors, "layers"), *bits = moec_json_get(errors, "bits");
    int64_t group = 0;
    char wide[32];
    if (!errors)
        return;
    if (moec_json_int(moec_json_get(errors, "group_size"), &group) && group > 0)
        snprintf(wide, sizeof wide, "%" PRId64 " columns", group);
    else
        snprintf(wide, sizeof wide, "a row");
    printf("\nerrors of experts in few bits (a scale for %s)\n%5s", wide, "layer");
    for (size_t b = 0; b < moec_json_len(bits); b++)
        printf(" %7.0f bit%s", real_at(bits, b), b ? "s" : " ");
    printf(" %10s %10s\n", "KL", "gain");
    for (size_t i = 0; i < moec_json_len(layers); i++) {
        const moec_json *l = moec_json_at(layers, i), *relative = moec_json_get(l, "relative");
        double kl;
        printf("%5" PRId64, int_of(l, "layer"));
        for (size_t b = 0; b < moec_json_len(relative); b++)
            printf(" %12.5f", real_at(relative, b));
        if (moec_json_real(moec_json_get(l, "kl"), &kl))
            printf(" %10.5f %10.3g\n", kl, real_of(l, "gain"));
        else
            printf(" %10s %10s\n", "-", "-");
    }
    printf("\nerror of the layer's experts over the size of the residual stream; KL: nats a token with the layer's experts alone\n"
           "at 2 bits, gain: KL over the squared errors behind it (--gains measures them)\n");
}

static void print_table(const moec_json *about)
{
    const moec_json *meta = moec_json_get(about, "meta"), *domains = moec_json_get(about, "domains");
    const moec_json *coverage = moec_json_get(about, "coverage"), *layers = moec_json_get(about, "layers");
    char a[256], b[256];
    printf("%-10s %s %s\n", "model", plain_of(a, sizeof a, meta, "model_type"),
           plain_of(b, sizeof b, meta, "model"));
    printf("%-10s %" PRId64 " layers, %" PRId64 " with %" PRId64 " experts of which a token uses %" PRId64 "\n", "",
           int_of(meta, "layers"), int_of(meta, "moe_layers"), int_of(meta, "experts"), int_of(meta, "top_k"));
    printf("%-10s %s, %zu kinds of statistics\n", "computed", plain_of(a, sizeof a, meta, "compute"),
           moec_json_len(moec_json_get(about, "kinds")));
    for (size_t i = 0; i < moec_json_len(domains); i++) {
        const moec_json *d = moec_json_at(domains, i);
        printf("%-10s %s: %" PRId64 " tokens in %" PRId64 " windows, weight %g\n", i ? "" : "texts",
               plain_of(a, sizeof a, d, "name"), int_of(d, "tokens"), int_of(d, "sequences"), real_of(d, "weight"));
    }
    if (!coverage)
        return;
    printf("%-10s %" PRId64 " of %" PRId64 " experts were selected by fewer than %" PRId64 " tokens, %" PRId64 " never\n",
           "coverage", int_of(coverage, "below_floor"), int_of(coverage, "experts"), int_of(coverage, "floor"),
           int_of(coverage, "never"));
    printf("\n%5s %10s %10s %10s %6s %6s %6s  %s\n", "layer", "fewest", "median", "most", "few", "never", "even",
           "busiest experts");
    for (size_t i = 0; i < moec_json_len(layers); i++) {
        const moec_json *l = moec_json_at(layers, i);
        printf("%5" PRId64 " %10" PRId64 " %10.0f %10" PRId64 " %6" PRId64 " %6" PRId64 " %6.3f  ", int_of(l, "layer"),
               int_of(l, "min"), real_of(l, "median"), int_of(l, "max"), int_of(l, "below_floor"), int_of(l, "never"),
               real_of(l, "entropy"));
        print_top(moec_json_get(l, "top"));
    }
    printf("\nfewest, median, most: tokens that selected an expert; few: experts below %" PRId64 ";\n"
           "even: entropy of the selection over that of equal use, 1 is even\n", int_of(coverage, "floor"));
    print_errors(moec_json_get(about, "errors"));
    const moec_json *gguf = moec_json_get(about, "gguf");
    if (gguf)
        printf("\nGGUF       what block types cost %" PRId64 " tensors; KL of %" PRId64 " of them, over %" PRId64 " tokens\n",
               int_of(gguf, "tensors"), int_of(gguf, "measured"), int_of(gguf, "tokens"));
}

static moec_status show(const stats_params *params, const char *path, moec_err *err)
{
    moec_stats *stats = NULL;
    moec_json *about = NULL;
    moec_status st = MOEC_OK;
    MOEC_TRY(moec_stats_load(&stats, path, err));
    MOEC_TRY(moec_stats_describe(&about, stats, (uint64_t)params->floor, err));
    if (params->common.json) {
        st = tool_print_json(about, err);
        about = NULL;
    } else {
        print_table(about);
    }
done:
    moec_json_free(about);
    moec_stats_free(stats);
    return st;
}

/* --- merge -------------------------------------------------------------------------------------------------------- */

static moec_status merge_all(moec_stats **out, const moec_opt_list *words, moec_err *err)
{
    moec_status st = moec_stats_load(out, words->at[1], err);
    for (int i = 2; st == MOEC_OK && i < words->n; i++) {
        moec_stats *more = NULL;
        char *dropped = NULL;
        st = moec_stats_load(&more, words->at[i], err);
        if (st == MOEC_OK)
            st = moec_within(err, moec_stats_merge(*out, more, &dropped, err), "%s", words->at[i]);
        if (st == MOEC_OK && dropped && *dropped)
            moec_warn("%s: kinds that not all files have are left out: %s", words->at[i], dropped);
        moec_free(dropped);
        moec_stats_free(more);
    }
    return st;
}

static moec_status merge(const stats_params *params, const moec_opt_list *words, moec_err *err)
{
    double began = moec_now();
    if (words->n < 3)
        return moec_fail(err, MOEC_EINVAL, "stats merge: at least two files are needed");
    if (!params->output)
        return moec_fail(err, MOEC_EINVAL, "stats merge: -o FILE is missing");
    moec_stats *stats = NULL;
    moec_status st = MOEC_OK;
    MOEC_TRY(tool_may_write(params->output, TOOL_FILE_HDF5, params->common.overwrite, err));
    MOEC_TRY(merge_all(&stats, words, err));
    MOEC_TRY(moec_stats_save(stats, params->output, err));
    uint64_t tokens = 0;
    for (int d = 0; d < stats->n_domains; d++)
        tokens += stats->domain[d].tokens;
    moec_say("%s: %d file%s, %d text%s, %" PRIu64 " tokens", params->output, words->n - 1, tool_s(words->n - 1),
             stats->n_domains, tool_s(stats->n_domains), tokens);
    if (params->common.json) {
        moec_json *o = moec_json_new_object();
        moec_json_set(o, "output", moec_json_new_string(params->output));
        uint64_t source = 0;
        for (int i = 1; i < words->n; i++)
            source += tool_file_bytes(words->at[i]);
        moec_json_set(o, "bytes", tool_bytes_json(source, params->output));
        moec_json_set(o, "files", moec_json_new_int(words->n - 1));
        moec_json_set(o, "domains", moec_json_new_int(stats->n_domains));
        moec_json_set(o, "tokens", moec_json_new_int((int64_t)tokens));
        moec_json_set(o, "seconds", moec_json_new_real(moec_now() - began));
        moec_json_set(o, "peak_memory_bytes", moec_json_new_int((int64_t)moec_peak_memory()));
        st = tool_print_json(o, err);
    }
done:
    moec_stats_free(stats);
    return st;
}

/* --- export ------------------------------------------------------------------------------------------------------- */

static moec_status export_imatrix(const stats_params *p, const char *path, moec_err *err)
{
    const double began = moec_now();
    moec_stats *stats = NULL;
    moec_status st = MOEC_OK;
    MOEC_TRY(tool_may_write(p->imatrix, TOOL_FILE_IMATRIX, p->common.overwrite, err));
    MOEC_TRY(moec_stats_load(&stats, path, err));
    if (p->weights)
        MOEC_TRY(moec_within(err, moec_stats_set_weights(stats, p->weights, err), "%s", path));
    MOEC_TRY(moec_within(err, moec_imatrix_write(p->imatrix, stats, (moec_imatrix_form)p->imatrix_form, err), "%s", path));
    const int64_t entries = 3 * stats->meta.moe_layers;
    moec_say("%s: %" PRId64 " matrices of %" PRId64 " experts each", p->imatrix, entries, stats->meta.experts);
    if (p->common.json) {
        moec_json *o = moec_json_new_object();
        moec_json_set(o, "output", moec_json_new_string(p->imatrix));
        moec_json_set(o, "bytes", tool_bytes_json(tool_file_bytes(path), p->imatrix));
        moec_json_set(o, "entries", moec_json_new_int(entries));
        moec_json_set(o, "experts", moec_json_new_int(stats->meta.experts));
        moec_json_set(o, "seconds", moec_json_new_real(moec_now() - began));
        moec_json_set(o, "peak_memory_bytes", moec_json_new_int((int64_t)moec_peak_memory()));
        st = tool_print_json(o, err);
    }
done:
    moec_stats_free(stats);
    return st;
}

static int run(const moec_verb *verb, int argc, char **argv)
{
    stats_params params;
    moec_opt_list words;
    int code;
    if (!tool_begin(&code, &params, &words, verb, argc, argv))
        return code;
    moec_err err = {MOEC_OK, ""};
    moec_status st;
    const bool store = strcmp(words.at[0], "store") == 0, exports = strcmp(words.at[0], "export") == 0;
    const bool thresholds = params.thresholds.kind != TOOL_NO_THRESHOLDS;
    if (!exports && thresholds)
        st = moec_fail(&err, MOEC_EINVAL, "stats %.40s: --thresholds is for stats export", words.at[0]);
    else if (exports && thresholds && (params.imatrix || !params.output || words.n != 2))
        st = moec_fail(&err, MOEC_EINVAL, "stats export --thresholds: takes one file, -o FILE and no --imatrix");
    else if (exports && thresholds)
        st = tool_export_thresholds(&params.thresholds, &params.common, words.at[1], params.output, params.weights, &err);
    else if (!exports && (params.imatrix || params.imatrix_form || params.weights))
        st = moec_fail(&err, MOEC_EINVAL, "stats %.40s: --imatrix, --imatrix-format and --domain-weights are for stats export",
                       words.at[0]);
    else if (!store && (params.store.task || params.store.domain || params.store.by_domain))
        st = moec_fail(&err, MOEC_EINVAL, "stats %.40s: --task, --domain and --by-domain are for stats store", words.at[0]);
    else if (store)
        st = params.output ? moec_fail(&err, MOEC_EINVAL, "stats store: takes no -o")
                           : tool_store(&params.store, &params.common, &words, &err);
    else if (strcmp(words.at[0], "merge") == 0)
        st = merge(&params, &words, &err);
    else if (!exports && strcmp(words.at[0], "show") != 0 && strcmp(words.at[0], "super") != 0)
        st = moec_fail(&err, MOEC_EINVAL, "stats: '%s' is none of show, merge, export, super and store", words.at[0]);
    else if (words.n != 2 || params.output)
        st = moec_fail(&err, MOEC_EINVAL, "stats %s: takes one file and no -o", words.at[0]);
    else if (exports)
        st = params.imatrix ? export_imatrix(&params, words.at[1], &err)
                            : moec_fail(&err, MOEC_EINVAL, "stats export: --imatrix FILE is missing, or --thresholds KIND");
    else if (strcmp(words.at[0], "super") == 0)
        st = tool_show_super(words.at[1], params.top, params.common.json, &err);
    else
        st = show(&params, words.at[1], &err);
    return tool_end(st, &err);
}

const moec_verb moec_verb_stats = {
    .name = "stats",
    .args = "show FILE | stats merge FILE FILE... -o FILE | stats export FILE --imatrix FILE | stats export FILE --thresholds KIND -o FILE | stats super FILE | stats store add|show|query STORE [FILE]",
    .brief = "show, merge or export statistics files, list super experts, keep the patterns of tasks",
    .about = "show: what a statistics file holds: the model it is about, its texts and tokens, and how well each layer's "
             "experts were reached.\n"
             "merge: adds statistics of the same model from several runs, texts or machines into one file. Texts of the "
             "same name add up, others stand side by side; the sums are the same as those of one run over all texts.\n"
             "export: an importance matrix of the routed experts, with which llama-quantize rounds a GGUF; from statistics of "
             "--tier 1. Its other tensors are rounded without one. Or, with --thresholds, what a runtime that skips or offloads experts asks: "
             "the formula, its source and the units are in the file; no stock client reads it.\n"
             "super: the super experts, the few whose outputs are far larger than all others' and without which a model breaks "
             "down: layer, expert, largest output, its channel, and the threshold. prune --protect super keeps them.\n"
             "store: one small file that says for each task who matters in every layer (PreMoe). add puts a task in from "
             "statistics of its text (--overwrite replaces one that is there), show lists them, query says which is nearest to "
             "statistics of a prompt. prune --patterns makes a model for a task out of it, with any number of experts.",
    .examples = "moecompress stats show model.stats.h5\n"
                "moecompress stats show model.stats.h5 --floor 100 --json\n"
                "moecompress stats merge code.h5 prose.h5 -o all.h5\n"
                "moecompress stats export model.stats.h5 --imatrix model.imatrix.gguf\n"
                "moecompress stats export model.stats.h5 --thresholds hobbit --shares 0.67,0.3 -o hobbit.json\n"
                "moecompress stats export model.stats.h5 --thresholds adapmoe --skip-loss 0.005 --cache-experts 64 -o adapmoe.json\n"
                "moecompress stats super model.stats.h5 --json\n"
                "moecompress stats store add tasks.json code.h5 --task code\n"
                "moecompress stats store query tasks.json prompt.h5",
    .opts = rows,
    .min_args = 2,
    .max_args = MOEC_OPT_LIST_MAX,
    .run = run,
};
