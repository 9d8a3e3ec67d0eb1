/* calibrate: watch the routers on text, write the statistics file. */
#include "tool_text.h"

#include <inttypes.h>
#include <string.h>

typedef struct calibrate_params {
    tool_common common;
    tool_text input;
    const char *output, *trace;
    int64_t tier, floor, group, gain_tokens, gguf_tokens;
    double checkpoint_every;
    bool errors, gains, gguf;
} calibrate_params;

static const moec_opt rows[] = {
    TOOL_TEXT_ROWS(calibrate_params),
    {"output", 'o', MOEC_TEXT(calibrate_params, output), .value = "FILE", .help = "the statistics file to write (HDF5)"},
    {"tier", 0, MOEC_INT(calibrate_params, tier), .fallback = "0", .lo = 0, .hi = 1, .value = "N",
     .help = "0: what every pruning score needs; 1: sums for each channel as well (larger file, slower)"},
    {"trace", 0, MOEC_TEXT(calibrate_params, trace), .value = "FILE",
     .help = "also write who was selected for every token, in order (HDF5, large)"},
    {"floor", 0, MOEC_INT(calibrate_params, floor), .fallback = "32", .lo = 1, .hi = 1e15, .value = "N",
     .help = "warn of experts that fewer tokens than this selected"},
    {"checkpoint-every", 0, MOEC_REAL(calibrate_params, checkpoint_every), .fallback = "20", .lo = 0, .hi = 1e9,
     .value = "SECONDS", .help = "how much work a kill may cost, besides the layer under way"},
    {"errors", 0, MOEC_FLAG(calibrate_params, errors),
     .help = "also measure what 1, 2, 3, 4 and 8 bits cost each expert, which quantize chooses by (some 12 times as long); a FILE "
             "of the same run without them is completed"},
    {"group-size", 0, MOEC_INT(calibrate_params, group), .fallback = "0", .lo = 0, .hi = 1 << 20, .value = "N",
     .help = "--errors: weights of a row that share a scale; 0: 128, and 64 where experts are narrower than 1024"},
    {"gains", 0, MOEC_FLAG(calibrate_params, gains),
     .help = "--errors: and what each layer's errors cost the model's output (another half pass a layer over --gain-tokens)"},
    {"gain-tokens", 0, MOEC_INT(calibrate_params, gain_tokens), .fallback = "16384", .lo = 0, .hi = 1e15, .value = "N",
     .help = "--gains: on the first windows of each text, so many tokens of all texts; 0: all"},
    {"gguf", 0, MOEC_FLAG(calibrate_params, gguf),
     .help = "also measure what the block types of a GGUF cost each of its tensors, which quantize --format gguf chooses by; sets "
             "--tier 1; a FILE of the same run without it is completed"},
    {"gguf-tokens", 0, MOEC_INT(calibrate_params, gguf_tokens), .fallback = "4096", .lo = 0, .hi = 1e15, .value = "N",
     .help = "--gguf: what each tensor does to the model's output is measured on the first windows of each text, so many tokens of all "
             "texts (14 half passes or more over them a layer); 0: errors of weights alone"},
    TOOL_COMPUTE_ROW(calibrate_params, "f32"),
    TOOL_SEED_ROW(calibrate_params),
    TOOL_MEMORY_ROW(calibrate_params),
    TOOL_RESUME_ROW(calibrate_params),
    TOOL_OVERWRITE_ROW(calibrate_params),
    TOOL_DRY_RUN_ROW(calibrate_params),
    TOOL_COMMON_ROWS(calibrate_params),
    TOOL_END_ROW,
};

/* Only what decides the result: no paths, no threads. */
static moec_status options_text(char **out, const calibrate_params *p, moec_err *err)
{
    moec_json *o = moec_json_new_object();
    moec_json_set(o, "seq_len", moec_json_new_int(p->input.seq_len));
    moec_json_set(o, "max_windows", moec_json_new_int(p->input.max_windows));
    moec_json_set(o, "tokens", moec_json_new_int(p->input.tokens));
    moec_json_set(o, "bos", moec_json_new_bool(p->input.bos));
    moec_json_set(o, "seed", moec_json_new_int(p->common.seed));
    moec_status st = moec_json_dump(out, o, 0, err);
    moec_json_free(o);
    return st;
}

static void print_list(const char *what, const moec_json *experts)
{
    char text[600] = "";
    size_t n = moec_json_len(experts);
    for (size_t i = 0; i < n && strlen(text) < sizeof text - 40; i++) {
        const moec_json *e = moec_json_at(experts, i);
        int64_t layer = 0, expert = 0;
        (void)moec_json_int(moec_json_get(e, "layer"), &layer);
        (void)moec_json_int(moec_json_get(e, "expert"), &expert);
        snprintf(text + strlen(text), sizeof text - strlen(text), "%s%" PRId64 "/%" PRId64, i ? ", " : "", layer, expert);
    }
    if (n > 0)
        moec_warn("%zu expert%s %s (layer/expert): %s%s", n, n == 1 ? " was" : "s were", what, text,
                  strlen(text) >= sizeof text - 40 ? ", ..." : "");
}

/* Coverage: what the statistics cannot speak of, named. */
static moec_status warn_coverage(moec_json **coverage, const moec_stats *stats, int64_t floor, moec_err *err)
{
    moec_json *about;
    char what[96];
    moec_status st = moec_stats_describe(&about, stats, (uint64_t)floor, err);
    if (st != MOEC_OK)
        return st;
    const moec_json *c = moec_json_get(about, "coverage");
    print_list("never selected", moec_json_get(c, "never_experts"));
    snprintf(what, sizeof what, "selected by fewer than %" PRId64 " tokens", floor);
    print_list(what, moec_json_get(c, "below_floor_experts"));
    *coverage = moec_json_clone(c);
    moec_json_free(about);
    return MOEC_OK;
}

/* Operations over what the kernels reach of a core with the vector instructions of today's servers (tests/bench); a machine
 * without them is slower by what it lacks. */
static moec_status guess_seconds(double *out, const moec_model *m, int64_t tokens, int workers, int compute, moec_err *err)
{
    static const double rate[] = {[MOEC_COMPUTE_F32] = 80e9, [MOEC_COMPUTE_BF16] = 140e9};
    moec_sizes sizes;
    moec_status st = moec_model_sizes(&sizes, m, err);
    if (st == MOEC_OK)
        *out = 2.0 * (double)sizes.active * (double)tokens / (rate[compute] * (double)workers);
    return st;
}

/* A pass, and a matrix at a probe runs what is behind its layer over --gguf-tokens; see moec_gguf_measure. */
static double gguf_passes(const calibrate_params *p, const moec_model *m, double tokens)
{
    double variants = 0.0;
    for (int64_t l = 0; l < m->dims.layers; l++) {
        for (int k = 0; k < MOEC_MAT_COUNT; k++)
            variants += m->layer[l].mat[k].of != NULL;
        variants += m->layer[l].expert ? 3 : 0;
    }
    const double share = (double)p->gguf_tokens < tokens ? (double)p->gguf_tokens / tokens : 1.0;
    return p->gguf ? 1.0 + share * (2.0 + MOEC_PROBES * variants / 2.0) : 0.0;
}

/* Passes besides that of calibration; see moec_measure. */
static double more_passes(const calibrate_params *p, const moec_model *m, int64_t tokens)
{
    const double all = (double)tokens, some = p->gain_tokens > 0 ? (double)p->gain_tokens : all;
    const double gains = p->gains ? (2.0 + (double)m->dims.layers / 2.0) * (some < all ? some / all : 1.0) : 0.0;
    return (p->errors ? 11.0 + gains : 0.0) + gguf_passes(p, m, all);
}

static moec_status dry_run(const calibrate_params *p, const moec_model *m, const moec_corpus *corpus, moec_err *err)
{
    moec_pass_plan plan;
    size_t statistics;
    int64_t tokens = moec_corpus_tokens(corpus);
    moec_calibrate_opts o = {.compute = (moec_compute)p->input.compute, .tier = (int)p->tier, .trace = p->trace,
                             .max_memory = p->common.max_memory};
    moec_status st = moec_calibrate_plan(&plan, &statistics, m, corpus, &o, err);
    double seconds = 0;
    if (st == MOEC_OK)
        st = guess_seconds(&seconds, m, tokens, plan.threads, p->input.compute, err);
    if (st != MOEC_OK)
        return st;
    seconds *= 1.0 + more_passes(p, m, tokens);
    if (p->common.json) {
        moec_json *j = moec_json_new_object();
        moec_json_set(j, "seconds", moec_json_new_real(seconds));
        moec_json_set(j, "tokens", moec_json_new_int(tokens));
        moec_json_set(j, "threads", moec_json_new_int(plan.threads));
        moec_json_set(j, "memory_bytes", moec_json_new_int((int64_t)plan.bytes));
        moec_json_set(j, "hidden_states_on_disk", moec_json_new_bool(plan.on_disk));
        moec_json_set(j, "statistics_bytes", moec_json_new_int((int64_t)statistics));
        st = tool_print_json(j, err);
    } else {
        char memory[32], size[32];
        printf("tokens        %" PRId64 " in %d text%s\nthreads       %d\nmemory        about %s, hidden states %s\n", tokens,
               corpus->n_domains, tool_s(corpus->n_domains), plan.threads, moec_size_text(memory, sizeof memory, plan.bytes),
               plan.on_disk ? "on disk" : "in memory");
        printf("statistics    at most %s\ntime          about %.0f s on a server core's vector units\n",
               moec_size_text(size, sizeof size, statistics), seconds < 1 ? 1.0 : seconds);
    }
    return st;
}

static moec_status print_result(const calibrate_params *p, const moec_model *m, const moec_stats *stats, moec_json *coverage,
                                int64_t tokens, double began, moec_err *err)
{
    double seconds = moec_now() - began;
    moec_say("%s: %" PRId64 " tokens, %d text%s, %.1f s", p->output, tokens, stats->n_domains,
             tool_s(stats->n_domains), seconds);
    if (!p->common.json) {
        moec_json_free(coverage);
        return MOEC_OK;
    }
    moec_json *o = moec_json_new_object();
    moec_json_set(o, "output", moec_json_new_string(p->output));
    moec_json_set(o, "bytes", tool_bytes_json(moec_ckpt_bytes(m->ckpt), p->output));
    moec_json_set(o, "tokens", moec_json_new_int(tokens));
    moec_json_set(o, "domains", moec_json_new_int(stats->n_domains));
    moec_json_set(o, "compute", moec_json_new_string(stats->meta.compute));
    moec_json_set(o, "kernel", moec_json_new_string(moec_gemm_kernel((moec_compute)p->input.compute)));
    moec_json_set(o, "coverage", coverage);
    moec_json_set(o, "seconds", moec_json_new_real(seconds));
    moec_json_set(o, "peak_memory_bytes", moec_json_new_int((int64_t)moec_peak_memory()));
    return tool_print_json(o, err);
}

static moec_status check_outputs(const calibrate_params *p, bool to_complete, moec_err *err)
{
    if (p->common.dry_run)
        return MOEC_OK;
    if (p->trace && tool_same_file(p->output, p->trace))
        return moec_fail(err, MOEC_EINVAL, "%s: -o and --trace name the same file", p->trace);
    /* A run that was killed while it published its files may be completed; whether this is one, moec_calibrate knows. */
    bool replace = to_complete || p->common.overwrite || moec_calibrate_unfinished(p->output);
    moec_status st = tool_may_write(p->output, TOOL_FILE_HDF5, replace, err);
    return st == MOEC_OK && p->trace ? tool_may_write(p->trace, TOOL_FILE_HDF5, replace, err) : st;
}

static bool has_errors(const moec_stats *s)
{
    return s->n_domains > 0 && s->domain[0].data[MOEC_STAT_QUANT_SQ];
}

static int64_t group_of(const calibrate_params *p, const moec_model *m)
{
    return p->group > 0 ? p->group : moec_quantize_group(m);
}

/* Options as moec_measure leaves them: with the group of errors. */
static bool same_options(const calibrate_params *p, const moec_stats *stats, const moec_model *m, const char *options)
{
    moec_json *o = NULL;
    char *text = NULL;
    const int64_t group = moec_stats_quant_group(stats);
    if (group < 0)
        return strcmp(stats->meta.options, options) == 0;
    if ((p->errors && group != group_of(p, m)) || moec_json_parse(&o, options, strlen(options), "options", NULL) != MOEC_OK)
        return false;
    moec_json_set(o, "quant_group", moec_json_new_int(group));
    const bool same = moec_json_dump(&text, o, 0, NULL) == MOEC_OK && strcmp(stats->meta.options, text) == 0;
    moec_free(text);
    moec_json_free(o);
    return same;
}

/* Does `stats` come from this very run, and lack errors or what types of a GGUF cost? */
static moec_status is_same(bool *out, const calibrate_params *p, const moec_stats *stats, const moec_model *m,
                           const moec_corpus *corpus, const char *options, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_err other = {MOEC_OK, ""};
    const char *const compute = p->input.compute == MOEC_COMPUTE_BF16 ? "bf16" : "f32";
    *out = same_options(p, stats, m, options) && strcmp(stats->meta.compute, compute) == 0 &&
           ((p->errors && !has_errors(stats)) || (p->gguf && !stats->sensitivity)) &&
           stats->meta.tier == (int)p->tier && stats->n_domains == corpus->n_domains &&
           moec_stats_check(stats, m, &other) == MOEC_OK;
    for (int d = 0; *out && d < corpus->n_domains; d++) {
        const moec_corpus one = {1, corpus->domain + d};
        moec_digest digest;
        int at;
        MOEC_TRY(moec_corpus_digest(&digest, &one, err));
        *out = moec_stats_domain_find(&at, stats, corpus->domain[d].name, &other) == MOEC_OK &&
               strcmp(stats->domain[at].digest, digest.hex) == 0 &&
               !(stats->domain[at].weight < corpus->domain[d].weight) && !(stats->domain[at].weight > corpus->domain[d].weight);
    }
done:
    return st;
}

/* Statistics that an earlier run left in the output and that lack nothing but what is measured behind them: NULL where there are none. */
static moec_status find_begun(moec_stats **out, const calibrate_params *p, const moec_model *m, const moec_corpus *corpus,
                              const char *options, moec_err *err)
{
    moec_err other = {MOEC_OK, ""};
    bool same = false;
    *out = NULL;
    if (!(p->errors || p->gguf) || p->trace || p->common.overwrite || !p->common.resume ||
        moec_stats_load(out, p->output, &other) != MOEC_OK)
        return MOEC_OK;
    moec_status st = is_same(&same, p, *out, m, corpus, options, err);
    if (st == MOEC_OK && same && moec_calibrate_unfinished(p->output)) /* killed right behind writing the file */
        st = moec_calibrate_forget(p->output, err);
    if (!same) {
        moec_stats_free(*out);
        *out = NULL;
    }
    return st;
}

/* Adds errors to the statistics and to their file. */
static moec_status measure_errors(moec_stats *stats, const calibrate_params *p, const moec_model *m, const moec_corpus *corpus,
                           moec_err *err)
{
    char work[4096];
    const int n = snprintf(work, sizeof work, "%s.errors", p->output);
    if (n < 0 || (size_t)n >= sizeof work)
        return moec_fail(err, MOEC_EINVAL, "-o: the name is too long");
    const moec_measure_opts o = {.compute = (moec_compute)p->input.compute, .gains = p->gains,
                                 .group = group_of(p, m), .gain_tokens = p->gain_tokens, .max_memory = p->common.max_memory,
                                 .work = work, .resume = p->common.resume};
    moec_status st = moec_measure(stats, m, corpus, &o, err);
    return st == MOEC_OK ? moec_stats_save(stats, p->output, err) : st;
}

static moec_gguf_measure_opts gguf_opts(const calibrate_params *p)
{
    return (moec_gguf_measure_opts){.compute = (moec_compute)p->input.compute, .tokens = p->gguf_tokens,
                                    .max_memory = p->common.max_memory, .resume = p->common.resume};
}

/* And what types of a GGUF cost. */
static moec_status measure_gguf(moec_stats *stats, const calibrate_params *p, const moec_model *m, const moec_corpus *corpus,
                                moec_err *err)
{
    char work[4096];
    const int n = snprintf(work, sizeof work, "%s.gguf", p->output);
    if (n < 0 || (size_t)n >= sizeof work)
        return moec_fail(err, MOEC_EINVAL, "-o: the name is too long");
    moec_gguf_measure_opts o = gguf_opts(p);
    o.work = work;
    moec_status st = moec_gguf_measure(stats, m, corpus, &o, err);
    return st == MOEC_OK ? moec_stats_save(stats, p->output, err) : st;
}

/* Refused now, and not behind the calibration. */
static moec_status check_gguf(const calibrate_params *p, const moec_model *m, const moec_corpus *corpus, moec_err *err)
{
    const moec_gguf_measure_opts o = gguf_opts(p);
    const moec_status st = moec_gguf_measure_fit(m, corpus, &o, err);
    return st == MOEC_OK ? st : moec_within(err, st, "--gguf");
}

static moec_status calibrate(const calibrate_params *p, const char *dir, moec_err *err)
{
    moec_status st = MOEC_OK;
    double began = moec_now();
    moec_model *model = NULL;
    moec_corpus corpus = {0};
    moec_stats *stats = NULL;
    moec_json *coverage = NULL;
    char *options = NULL;
    if (!p->output && !p->common.dry_run)
        return moec_fail(err, MOEC_EINVAL, "-o FILE is missing: where shall the statistics go?");
    if (p->gains && !p->errors)
        return moec_fail(err, MOEC_EINVAL, "--gains is part of --errors: give both");
    if (!p->errors && !p->gguf) /* what is there may be completed, which is found out with the text */
        MOEC_TRY(check_outputs(p, false, err));
    MOEC_TRY(moec_model_open(&model, dir, err));
    MOEC_TRY(tool_read_text(&corpus, &p->input, model, p->common.seed, err));
    if (p->gguf)
        MOEC_TRY(check_gguf(p, model, &corpus, err));
    if (p->common.dry_run) {
        st = dry_run(p, model, &corpus, err);
        goto done;
    }
    MOEC_TRY(options_text(&options, p, err));
    MOEC_TRY(find_begun(&stats, p, model, &corpus, options, err));
    MOEC_TRY(check_outputs(p, stats != NULL, err));
    moec_calibrate_opts o = {.compute = (moec_compute)p->input.compute, .tier = (int)p->tier, .options = options,
                             .max_memory = p->common.max_memory, .resume = p->common.resume, .trace = p->trace,
                             .keep_existing = !p->common.overwrite,
                             .checkpoint_every = p->checkpoint_every};
    if (stats)
        moec_say("%s: is complete but for %s", p->output, p->errors && !has_errors(stats) ? "the errors" : "what types of a GGUF cost");
    else
        MOEC_TRY(moec_calibrate(&stats, model, &corpus, p->output, &o, err));
    if (p->errors && !has_errors(stats))
        MOEC_TRY(measure_errors(stats, p, model, &corpus, err));
    if (p->gguf && !stats->sensitivity)
        MOEC_TRY(measure_gguf(stats, p, model, &corpus, err));
    MOEC_TRY(warn_coverage(&coverage, stats, p->floor, err));
    st = print_result(p, model, stats, coverage, moec_corpus_tokens(&corpus), began, err);
done:
    moec_free(options);
    moec_stats_free(stats);
    moec_corpus_release(&corpus);
    moec_model_close(model);
    return st;
}

static int run(const moec_verb *verb, int argc, char **argv)
{
    calibrate_params p;
    moec_opt_list words;
    int code;
    if (!tool_begin(&code, &p, &words, verb, argc, argv))
        return code;
    moec_err err = {MOEC_OK, ""};
    if (p.gguf)
        p.tier = 1;
    return tool_end(calibrate(&p, words.at[0], &err), &err);
}

const moec_verb moec_verb_calibrate = {
    .name = "calibrate",
    .args = "MODEL --text FILE... -o STATS",
    .brief = "watch a model's routers on text and write a statistics file",
    .about = "Runs text through MODEL, layer by layer, and writes what its routers and experts did: sums, counts and maxima for "
             "every expert and text, from which every pruning method is computed later. Only one layer's weights are in memory "
             "at a time.\n"
             "Interrupted or killed, the same command continues where the last checkpoint was (in FILE.partial beside the "
             "output), and the result is the same.\n"
             "With --errors each expert is then quantized to 1, 2, 3, 4 and 8 bits, and how far its output moves on the tokens that "
             "select it is added to the same file; stats show has a line a layer.\n"
             "With --gguf each matrix is put into the model on a grid of 2 and of 4 bits, and how far the model's output moves is added, "
             "beside the errors of all block types: quantize --format gguf then fits any size without reading weights.",
    .examples = "moecompress calibrate Qwen3-30B-A3B --text calibration/ --seq-len 2048 --tokens 262144 -o qwen3.h5\n"
                "moecompress calibrate MODEL --text code=src.txt:2 prose=book.txt -o stats.h5 --max-memory 8GiB\n"
                "moecompress calibrate MODEL --text windows.ids -o stats.h5 --compute bf16\n"
                "moecompress calibrate MODEL --text calibration/ -o stats.h5 --errors --gains\n"
                "moecompress calibrate MODEL --text calibration/ -o stats.h5 --gguf",
    .opts = rows,
    .min_args = 1,
    .max_args = 1,
    .run = run,
};
