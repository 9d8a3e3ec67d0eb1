/* quantize: experts' weights in few bits, mixed as an integer program says. */
#include "output.h"
#include "output_quant.h"
#include "quantize_gguf.h"
#include "quantize_stats.h"
#include "sources.h"
#include "sweep.h"
#include "tool_text.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct quantize_params {
    tool_common common;
    tool_text input;
    const char *output, *stats, *weights, *method, *format, *widths, *protect, *sweep, *record, *compat, *share, *types, *candidates;
    double bits, damp, alpha, beta, gamma;
    uint64_t target, shard;
    int64_t group, attention, shared, dense, power, sweeps;
    int grain, rounding, dtype;
    bool zeros, act_order, original, gains, plan_only, methods, formats, expert_shards, pair;
} quantize_params;

static const char *const grains[] = {"auto", "expert", "projection", "layer", "layer-projection", "model", NULL}; /* 1 + moec_widths_grain */
static const char *const roundings[] = {"method", "nearest", "clip", "gptq", NULL}; /* 1 + moec_rounding */

static const moec_opt rows[] = {
    {"output", 'o', MOEC_TEXT(quantize_params, output), .value = "OUT",
     .help = "folder to write, with --format gguf a file; with --plan-only the plan file, its weights go to OUT.weights"},
    {"bits", 'b', MOEC_REAL(quantize_params, bits), .lo = 0, .hi = 16, .fallback = "0", .value = "B",
     .help = "mean width of the routed experts' weights, at most 8, scales not counted: 2.5; with --format gguf of all matrices, scales "
             "counted; 16, with --expert-shards or --share-with: all weights as they are"},
    {"target-size", 0, MOEC_SIZE(quantize_params, target), .value = "SIZE",
     .help = "instead of --bits: the output's files have this many bytes at most, all of them together"},
    {"method", 0, MOEC_TEXT(quantize_params, method), .value = "NAME",
     .help = "who gets how many bits, and how they are rounded (--methods lists the ways); direct by default"},
    {"format", 0, MOEC_TEXT(quantize_params, format), .fallback = "gptq", .value = "NAME",
     .help = "what is written, and so what loads it (--formats lists them): gptq, gptq-dynamic, gptq-server, compressed-tensors, nested, fake, "
             "gguf"},
    {"stats", 's', MOEC_TEXT(quantize_params, stats), .value = "FILE",
     .help = "statistics of the model, of calibrate --errors --gains; where they have no errors yet, --text is run for them and they are "
             "added to the file. Without --stats they go to OUT.stats.h5"},
    {"domain-weight", 0, MOEC_TEXT(quantize_params, weights), .value = "NAME=W[,NAME=W]",
     .help = "how much each domain of the statistics counts"},
    {"sweep", 0, MOEC_TEXT(quantize_params, sweep), .value = "B,B,..",
     .help = "print what each of these --bits (or sizes, with a unit: 10GiB,12GiB) would cost and leave; needs --stats, no text"},
    TOOL_HEADING("widths"),
    {"widths", 0, MOEC_TEXT(quantize_params, widths), .value = "N,N,..",
     .help = "candidates, 16 for weights as they are; when not given 2, 3, 4 and 8, as far as the format has them"},
    {"per", 0, MOEC_CHOICE(quantize_params, grain), .choices = grains, .fallback = "auto",
     .value = "auto|expert|projection|layer|layer-projection|model",
     .help = "what has one width: each expert, each of its matrices, all experts of a layer, ..; auto: as fine as method and format go"},
    {"group-size", 0, MOEC_INT(quantize_params, group), .lo = 0, .hi = 1 << 20, .fallback = "0", .value = "N",
     .help = "columns that share a scale; halved where it does not divide a matrix. 0: that of the statistics' errors, else 128, and 64 "
             "where experts are narrower than 1024"},
    {"attention-bits", 0, MOEC_INT(quantize_params, attention), .lo = 1, .hi = 16, .fallback = "16", .value = "N",
     .help = "width of attention and what stands in its place, one that the format has; 16: as it is"},
    {"shared-bits", 0, MOEC_INT(quantize_params, shared), .lo = 1, .hi = 16, .fallback = "16", .value = "N", .help = "width of shared experts; 16: as they are"},
    {"dense-bits", 0, MOEC_INT(quantize_params, dense), .lo = 1, .hi = 16, .fallback = "16", .value = "N", .help = "width of dense layers; 16: as they are"},
    {"protect", 0, MOEC_TEXT(quantize_params, protect), .value = "super|FILE",
     .help = "experts that get the largest width: super experts, or lines LAYER EXPERT"},
    {"alpha", 0, MOEC_REAL(quantize_params, alpha), .lo = -1, .hi = 100, .fallback = "-1", .value = "A",
     .help = "pmq: exponent of the frequency; -1: that of the method"},
    {"beta", 0, MOEC_REAL(quantize_params, beta), .lo = -1, .hi = 100, .fallback = "-1", .value = "B",
     .help = "pmq: exponent of the router's weight; -1: that of the method"},
    {"gamma", 0, MOEC_REAL(quantize_params, gamma), .lo = -1, .hi = 100, .fallback = "-1", .value = "C",
     .help = "pmq: exponent of the error; -1: that of the method"},
    {"gains", 0, MOEC_FLAG(quantize_params, gains), .fallback = "on",
     .help = "measure what an error in each layer costs at the logits, where errors are measured in this run"},
    TOOL_HEADING("GGUF"),
    {"types", 0, MOEC_TEXT(quantize_params, types), .value = "TYPE[,PATTERN=TYPE,..]",
     .help = "types of tensors: one for all, or those whose name a regular expression finds, the last that does; with a budget the others "
             "are chosen: q4_k,ffn_down_exps=q6_k,^output=q8_0 (without ^ attn_output too); --dry-run lists the names"},
    {"candidates", 0, MOEC_TEXT(quantize_params, candidates), .value = "TYPE,TYPE,..", .help = "types that are chosen from; when not given "
     "q2_k to q6_k, q8_0, iq4_xs, iq4_nl, q4_1, q5_0, q5_1, mxfp4, f16, and below 3 bits tq1_0 and tq2_0, which few of llama.cpp's backends but the CPU's have"},
    {"pair-gate-up", 0, MOEC_FLAG(quantize_params, pair), .help = "gate and up of a layer's experts have one type, which vLLM needs"},
    {"shard-size", 0, MOEC_SIZE(quantize_params, shard), .value = "SIZE",
     .help = "several files of at most so much data, in the folder OUT, as llama.cpp splits them"},
    TOOL_HEADING("rounding"),
    {"rounding", 0, MOEC_CHOICE(quantize_params, rounding), .choices = roundings, .fallback = "method", .value = "method|nearest|clip|gptq",
     .help = "nearest: to the nearest, scales from the largest value; clip: scales searched; gptq: each column after the error of those "
             "before it. method: as the method has it"},
    {"weight-power", 0, MOEC_INT(quantize_params, power), .lo = 0, .hi = 2, .fallback = "1", .value = "0|1|2",
     .help = "a token counts g^N in an expert's Hessian, g its weight: 0 as GPTQ; 1 as MoEQuant, best on text that was not seen; 2 the squared error of "
             "the block"},
    {"damp", 0, MOEC_REAL(quantize_params, damp), .lo = 0, .hi = 10, .fallback = "0.01", .value = "X",
     .help = "share of a Hessian's mean diagonal that is added to the diagonal"},
    {"act-order", 0, MOEC_FLAG(quantize_params, act_order), .fallback = "on", .help = "round columns of large inputs first"},
    {"sweeps", 0, MOEC_INT(quantize_params, sweeps), .lo = 0, .hi = 100, .fallback = "2", .value = "N",
     .help = "rounds of coordinate descent and scale fitting behind gptq"},
    {"original-target", 0, MOEC_FLAG(quantize_params, original), .fallback = "on",
     .help = "round experts towards what the original's matrices give for the original's inputs (GPTAQ), not for those of the quantized model"},
    {"zero-points", 0, MOEC_FLAG(quantize_params, zeros), .help = "codes with zero points, where the format has them"},
    TOOL_DTYPE_ROW(quantize_params, "that are not quantized"),
    {"record", 0, MOEC_TEXT(quantize_params, record), .value = "FILE",
     .help = "a line of JSON for every matrix: width, tokens, how it was rounded, losses"},
    TOOL_HEADING("copies for offloading"),
    {"expert-shards", 0, MOEC_FLAG(quantize_params, expert_shards),
     .help = "put experts into shards of their own (NAME-experts-..), so that other outputs can share what is not expert"},
    {"share-with", 0, MOEC_TEXT(quantize_params, share), .value = "DIR",
     .help = "the same, and every shard that DIR, an output with --expert-shards of the same model, holds with the same bytes becomes one "
             "file with it (a hard link; where there are none it stays a copy, and that is said): the high and the low copy of HOBBIT"},
    TOOL_HEADING("text"),
    TOOL_TEXT_ROWS(quantize_params),
    TOOL_COMPUTE_ROW(quantize_params, "bf16"),
    TOOL_HEADING("run"),
    TOOL_COMPAT_ROW(quantize_params, compat),
    TOOL_PLAN_ONLY_ROW(quantize_params, "as JSON and its weights, for eval --plan and apply"),
    TOOL_METHODS_ROW(quantize_params),
    {"formats", 0, MOEC_FLAG(quantize_params, formats), .help = "list the formats and leave"},
    TOOL_SEED_ROW(quantize_params),
    TOOL_DRY_RUN_ROW(quantize_params),
    TOOL_OVERWRITE_ROW(quantize_params),
    TOOL_RESUME_ROW(quantize_params),
    TOOL_MEMORY_ROW(quantize_params),
    TOOL_COMMON_ROWS(quantize_params),
    TOOL_END_ROW,
};

/* --- lists ------------------------------------------------------------------------------------------------------------ */

static moec_json *widths_json(uint32_t widths)
{
    moec_json *list = moec_json_new_array();
    for (int b = 1; b <= 8; b++)
        if (widths >> b & 1)
            moec_json_push(list, moec_json_new_int(b));
    return list;
}

static moec_status list_formats(const quantize_params *p, moec_err *err)
{
    moec_json *list = p->common.json ? moec_json_new_array() : NULL;
    const moec_qformat *f;
    for (size_t i = 0; (f = moec_qformat_at(i)) != NULL; i++) {
        if (!list) {
            printf("%s\n    %s\n    loads in %s; one width for each %s; widths", f->name, f->about, f->loads, moec_widths_grain_name(f->grain));
            for (int b = 1; b <= 8; b++)
                if (f->widths >> b & 1)
                    printf(" %d", b);
            printf("\n\n");
            continue;
        }
        moec_json *o = moec_json_new_object();
        moec_json_set(o, "name", moec_json_new_string(f->name));
        moec_json_set(o, "about", moec_json_new_string(f->about));
        moec_json_set(o, "loads", moec_json_new_string(f->loads));
        moec_json_set(o, "per", moec_json_new_string(moec_widths_grain_name(f->grain)));
        moec_json_set(o, "widths", widths_json(f->widths));
        moec_json_push(list, o);
    }
    tool_gguf_format(list);
    return list ? tool_print_json(list, err) : MOEC_OK;
}

/* For --help. */
static const char *method_entry(const char **text, size_t i)
{
    return tool_method_entry(text, MOEC_QUANTIZE, i);
}

/* --- what is asked ----------------------------------------------------------------------------------------------------- */

static moec_status check_params(const quantize_params *p, const moec_opt_list *words, moec_err *err)
{
    if (words->n < 1)
        return moec_fail(err, MOEC_EINVAL, "quantize: MODEL is missing: the folder of the model");
    if (p->sweep && !p->stats)
        return moec_fail(err, MOEC_EINVAL, "quantize: --sweep solves from measured errors; give --stats FILE (calibrate --errors makes it)");
    if (p->share && (p->plan_only || p->sweep || !moec_path_is_dir(p->share)))
        return moec_fail(err, MOEC_EINVAL, moec_path_is_dir(p->share) ? "quantize: --share-with is for an output that is written"
                                                                      : "--share-with %s: no such folder", p->share);
    if (p->share && p->output && tool_same_file(p->share, p->output))
        return moec_fail(err, MOEC_EINVAL, "--share-with %s: is the output", p->share);
    if (p->bits > 8.0 && (p->bits != 16.0 || !(p->expert_shards || p->share)))
        return moec_fail(err, MOEC_EINVAL, "--bits %g: is not in 0 .. 8; 16 leaves the weights as they are, for --expert-shards or --share-with",
                         p->bits);
    if (!p->sweep && !p->output && !p->common.dry_run)
        return moec_fail(err, MOEC_EINVAL, "quantize: -o OUT is missing: %s", p->plan_only ? "weights that are computed need a place"
                                                                                           : "the folder to write");
    return MOEC_OK;
}

/* Options without a meaning where a GGUF is written, and where none is. */
static const char *const gguf_takes_not[] = {"method", "widths", "per", "group-size", "attention-bits", "shared-bits", "dense-bits", "protect",
                                             "alpha", "beta", "gamma", "gains", "rounding", "weight-power", "damp", "act-order", "sweeps",
                                             "original-target", "zero-points", "dtype", "record", "compat", "plan-only", "expert-shards", "share-with",
                                             NULL};
static const char *const gguf_alone[] = {"types", "candidates", "pair-gate-up", "shard-size", NULL};
/* And where no weight is changed: --bits 16. */
static const char *const whole_takes_not[] = {"format", "stats", "domain-weight", "sweep", "target-size", "method", "widths", "per", "group-size",
                                              "attention-bits", "shared-bits", "dense-bits", "protect", "alpha", "beta", "gamma", "gains",
                                              "rounding", "weight-power", "damp", "act-order", "sweeps", "original-target", "zero-points",
                                              "dtype", "record", NULL};

/* Refuses those that have another value than when they are not given. */
static moec_status check_options(const quantize_params *p, const moec_verb *verb, const char *const *names, const char *with, const char *value,
                                 moec_err *err)
{
    quantize_params plain;
    moec_opt_list words = {0};
    char *none[] = {(char[]){"quantize"}, NULL};
    moec_status st = moec_opt_parse(&plain, &words, verb, 1, none, err);
    moec_json *given = moec_opt_json(p, verb), *usual = moec_opt_json(&plain, verb);
    for (; st == MOEC_OK && *names; names++) {
        char *a = NULL, *b = NULL;
        st = moec_json_dump(&a, moec_json_get(given, *names), 0, err);
        if (st == MOEC_OK)
            st = moec_json_dump(&b, moec_json_get(usual, *names), 0, err);
        if (st == MOEC_OK && strcmp(a, b) != 0)
            st = moec_fail(err, MOEC_EINVAL, "--%s means nothing with --%s %s", *names, with, value);
        moec_free(a);
        moec_free(b);
    }
    moec_json_free(usual);
    moec_json_free(given);
    return st;
}

/* As fine as both go: of the grains a coarser one has the larger number, but for a layer's matrices. One width for all needs no grain,
 * unless some experts are protected and have another. */
static moec_widths_grain finest(const moec_method *me, const moec_qformat *f, bool protect)
{
    const moec_widths_grain g = moec_widths_finest(me);
    if (f->grain >= MOEC_WIDTHS_LAYER)
        return f->grain;
    return g == MOEC_WIDTHS_MODEL ? (protect ? MOEC_WIDTHS_EXPERT : g) : g == MOEC_WIDTHS_EXPERT ? g : f->grain;
}

/* "2,3,4": ascending, each once. */
static moec_status read_widths(moec_quantize_request *r, const char *text, moec_err *err)
{
    const char *at = text;
    while (text && *at) {
        char *end;
        const long v = strtol(at, &end, 10);
        const bool good = end != at && (*end == ',' || *end == '\0') && v >= 1 && v <= 16 && (v <= 8 || v == 16) && r->n_widths < 8 &&
                          (r->n_widths == 0 || v > r->width[r->n_widths - 1]);
        if (!good)
            return moec_fail(err, MOEC_EINVAL, "--widths %s: is a list of widths from 1 to 8, or 16, ascending: 2,3,4", text);
        r->width[r->n_widths++] = (int)v;
        at = *end ? end + 1 : end;
    }
    return MOEC_OK;
}

/* --- errors of widths -------------------------------------------------------------------------------------------------- */

static bool has_errors(const moec_stats *s)
{
    for (int d = 0; s && d < s->n_domains; d++)
        if (!s->domain[d].data[MOEC_STAT_QUANT_SQ])
            return false;
    return s != NULL;
}

static bool needs(const moec_method *me, bool errors)
{
    for (int i = 0; i < me->n_needs; i++)
        if (!errors || me->needs[i] >= MOEC_STAT_QUANT_SQ)
            return true;
    return false;
}

/* What an earlier run of the same that was stopped left in `path` is taken over. */
static moec_status take_over(tool_sources *s, const quantize_params *p, const moec_corpus *corpus, const char *path, int64_t group,
                             moec_err *err)
{
    if (s->stats || p->common.overwrite || !p->common.resume)
        return MOEC_OK;
    moec_status st = tool_found_stats(&s->stats, s->model, corpus, (moec_compute)p->input.compute, path, err);
    if (st == MOEC_OK && s->stats && has_errors(s->stats) && moec_stats_quant_group(s->stats) != group) {
        moec_stats_free(s->stats);
        s->stats = NULL;
    }
    return st;
}

/* What the method needs and nobody has measured is measured now, and kept in `path`. */
static moec_status complete_stats(tool_sources *s, const quantize_params *p, const moec_method *me, const moec_corpus *corpus,
                                  const char *path, int64_t group, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *work = NULL;
    uint64_t bytes;
    if (!needs(me, false) || (s->stats && (!needs(me, true) || has_errors(s->stats))))
        return MOEC_OK;
    if (!corpus)
        return moec_fail(err, MOEC_EINVAL, "method %s %s: give --text to measure them now, or calibrate --errors first", me->name,
                         s->stats ? "needs quantization errors, which the statistics do not hold" : "needs statistics (--stats FILE)");
    if (p->common.dry_run)
        return moec_fail(err, MOEC_EINVAL, "--dry-run reads no weights: calibrate --errors measures what method %s needs", me->name);
    MOEC_TRY(take_over(s, p, corpus, path, group, err));
    if (!s->stats) {
        const moec_calibrate_opts o = {.compute = (moec_compute)p->input.compute, .tier = 0, .max_memory = p->common.max_memory,
                                       .options = "{}", .resume = p->common.resume, .checkpoint_every = 60.0,
                                       .keep_existing = !p->common.overwrite};
        MOEC_TRY(tool_may_write(path, TOOL_FILE_HDF5, p->common.overwrite, err));
        MOEC_TRY(moec_calibrate(&s->stats, s->model, corpus, path, &o, err));
    }
    if (needs(me, true) && !has_errors(s->stats)) {
        MOEC_TRY(moec_format(&work, err, "%s.errors", path));
        const moec_measure_opts o = {.compute = (moec_compute)p->input.compute, .group = group, .gains = p->gains,
                                     .gain_tokens = MOEC_MEASURE_GAIN_TOKENS, .max_memory = p->common.max_memory, .work = work, .resume = p->common.resume};
        MOEC_TRY(moec_measure(s->stats, s->model, corpus, &o, err));
        MOEC_TRY(moec_stats_save(s->stats, path, err));
        moec_say("%s: has the errors of every width now; any other budget is solved from it without a new run", path);
    }
    MOEC_TRY(moec_file_digest(&s->stats_digest, &bytes, path, err));
done:
    moec_free(work);
    return st;
}

/* --- the trade-off ------------------------------------------------------------------------------------------------------ */

/* What a budget would cost; MOEC_ENOFIT where no widths meet it. */
static moec_status sweep_row(moec_json *row, void *ctx, const tool_budget *b, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_quantize_request r = *(const moec_quantize_request *)ctx;
    moec_plan *plan = NULL;
    moec_widths w = {.bits = NULL};
    moec_apply_result size = {0};
    double bits, disk;
    r.bits = b->bits;
    r.target = b->bytes;
    MOEC_TRY(moec_quantize_plan(&plan, &w, &r, err));
    moec_quantize_means(&bits, &disk, plan, r.q->model);
    snprintf(plan->weights, sizeof plan->weights, "not made");
    const moec_apply_options o = {.fingerprint = r.q->fingerprint};
    MOEC_TRY(moec_apply_estimate(&size, r.q->model, plan, &o, err));
    moec_json_set(row, "bits", moec_json_new_real(bits));
    moec_json_set(row, "bits_on_disk", moec_json_new_real(disk));
    moec_json_set(row, "file_bytes", moec_json_new_int((int64_t)size.disk_bytes));
    moec_json_set(row, "cost", moec_json_new_real(w.cost));
    moec_json_set(row, "bound", moec_json_new_real(w.bound));
    moec_json_set(row, "proven", moec_json_new_bool(w.proven));
done:
    moec_widths_release(&w);
    moec_plan_free(plan);
    return st == MOEC_EINVAL ? MOEC_ENOFIT : st; /* of a budget below or above what the widths have */
}

static void print_row(const moec_json *row)
{
    char size[32];
    bool proven;
    int64_t bytes = 0;
    const double cost = tool_sweep_number(row, "cost"), bound = tool_sweep_number(row, "bound");
    (void)moec_json_int(moec_json_get(row, "file_bytes"), &bytes);
    printf(" %8.3f %8.3f %12s", tool_sweep_number(row, "bits"), tool_sweep_number(row, "bits_on_disk"),
           moec_size_text(size, sizeof size, (uint64_t)bytes));
    if (!isfinite(cost)) /* of a method that measures none */
        printf(" %14s %10s\n", "-", "-");
    else if (moec_json_bool(moec_json_get(row, "proven"), &proven) && proven)
        printf(" %14.6g %10s\n", cost, "optimal");
    else
        printf(" %14.6g %10.2e\n", cost, cost > 0.0 ? (cost - bound) / cost : 0.0);
}

static moec_status sweep(const quantize_params *p, moec_quantize_request *asked, moec_err *err)
{
    const tool_sweep_form form = {
        .fill = sweep_row, .ctx = asked, .print = print_row,
        .head = "     bits  on disk        files           cost        gap",
        .foot = "cost is the method's, and compares with its own rows alone; gap: how much less it could be at most\n"};
    return tool_sweep(p->sweep, &form, p->common.json, err);
}

/* --- the verb ------------------------------------------------------------------------------------------------------------ */

/* The groups that were asked for, and what is left of the budget. */
static void say_use(const quantize_params *p, const moec_quantize_request *r, const moec_plan *plan)
{
    const moec_dims *d = &r->q->model->dims;
    const struct {
        const char *what;
        int64_t cols;
    } part[] = {{"gate and up", d->hidden}, {"down", d->expert_width}};
    double bits, disk;
    for (int i = 0; i < 2; i++) {
        const int64_t group = moec_qformat_grid(r->format, &plan->quant, part[i].cols, 4).group;
        if (p->group > 0 && group != p->group)
            moec_warn("--group-size %" PRId64 " does not divide the %" PRId64 " columns of %s: groups of %" PRId64 " there", p->group,
                      part[i].cols, part[i].what, group);
    }
    moec_quantize_means(&bits, &disk, plan, r->q->model);
    if (p->bits > 0.0)
        moec_say("budget %g bits, used %.4f", p->bits, bits);
}

static void say_solution(const moec_widths *w)
{
    if (!isfinite(w->cost))
        return;
    if (w->proven)
        moec_say("widths: cost %.6g, proven optimal", w->cost);
    else
        moec_say("widths: cost %.6g, no choice is below %.6g (gap %.1e); the time for a proof was over", w->cost, w->bound,
                 w->cost > 0.0 ? (w->cost - w->bound) / w->cost : 0.0);
}

static size_t name_length(const char *folder)
{
    size_t n = folder ? strlen(folder) : 0;
    while (n > 1 && folder[n - 1] == '/')
        n--;
    return n;
}

/* Now, and not when all is done. An earlier record is replaced, and nothing else. */
static moec_status may_record(const quantize_params *p, moec_err *err)
{
    const size_t n = name_length(p->output);
    if (n > 0 && strncmp(p->record, p->output, n) == 0 && (p->record[n] == '/' || p->record[n] == '\0'))
        return moec_fail(err, MOEC_EINVAL, "--record %s: lies in the output, which is written whole; choose another place", p->record);
    return tool_may_write(p->record, TOOL_FILE_RECORD, true, err);
}

/* Behind the writing: shards that the other folder has, too. */
static moec_status share(const quantize_params *p, moec_err *err)
{
    moec_share_report r;
    char size[32];
    if (!p->share || p->common.dry_run)
        return MOEC_OK;
    moec_status st = moec_share_files(&r, p->output, p->share, err);
    if (st != MOEC_OK)
        return moec_within(err, st, "--share-with");
    if (r.linked + r.copied == 0)
        moec_warn("%s: no shard is the same in %s; was that made of the same model with --expert-shards?", p->output, p->share);
    else if (r.copied > 0)
        moec_warn("%s: %" PRId64 " of %" PRId64 " shards (%s) are copies of those in %s: the file system makes no hard links between them",
                  p->output, r.copied, r.shards, moec_size_text(size, sizeof size, r.copied_bytes), p->share);
    if (r.linked > 0)
        moec_say("%s: %" PRId64 " of %" PRId64 " shards (%s) are one file with those in %s", p->output, r.linked, r.shards,
                 moec_size_text(size, sizeof size, r.linked_bytes), p->share);
    return MOEC_OK;
}

/* All weights as they are, experts apart. */
static moec_status write_whole(const quantize_params *p, const char *dir, moec_err *err)
{
    moec_status st = MOEC_OK;
    tool_sources s = {.model = NULL};
    tool_job job = {.common = &p->common, .output = p->output, .compat = p->compat, .plan_only = p->plan_only, .began = moec_now()};
    const tool_source_names names = {.model = dir};
    MOEC_TRY(tool_sources_open(&s, &names, err));
    MOEC_TRY(tool_is_folder(s.model, err)); /* said now, not after hours of measuring */
    job.model = s.model;
    job.fingerprint = s.print.hex;
    MOEC_TRY(moec_plan_whole(&job.plan, s.model, err));
    snprintf(job.plan->model, sizeof job.plan->model, "%s", s.print.hex);
    job.plan->expert_shards = true;
    MOEC_TRY(tool_carry_out(&job, err));
    MOEC_TRY(share(p, err));
done:
    moec_plan_free(job.plan);
    tool_sources_release(&s);
    return st;
}

static moec_status quantize(const quantize_params *p, const moec_method *me, const char *dir, moec_err *err)
{
    moec_status st = MOEC_OK;
    tool_sources s = {.model = NULL};
    moec_corpus corpus = {0};
    moec_widths widths = {.bits = NULL};
    char *stats = NULL;
    const bool text = p->input.text.n > 0;
    tool_job job = {.common = &p->common, .output = p->output, .compat = p->compat, .plan_only = p->plan_only, .began = moec_now()};
    const tool_source_names names = {.model = dir, .stats = p->stats, .weights = NULL, .protect = NULL, .plain = true}; /* set when they are whole */
    const moec_rounding how = p->rounding > 0 ? (moec_rounding)(p->rounding - 1) : moec_widths_rounding(me);
    MOEC_TRY(tool_sources_open(&s, &names, err));
    MOEC_TRY(tool_is_folder(s.model, err)); /* said now, not after hours of measuring */
    job.model = s.model;
    job.fingerprint = s.print.hex;
    moec_request q = {.model = s.model, .fingerprint = s.print.hex,
                      .dtype = tool_dtype(p->dtype)};
    moec_quantize_request r = {.q = &q, .method = me, .group = p->group, .zeros = p->zeros, .bits = p->bits, .target = p->target,
                               .attention = (int)p->attention, .shared = (int)p->shared,
                               .dense = (int)p->dense, .alpha = p->alpha < 0.0 ? (double)NAN : p->alpha,
                               .beta = p->beta < 0.0 ? (double)NAN : p->beta, .gamma = p->gamma < 0.0 ? (double)NAN : p->gamma};
    MOEC_TRY(moec_qformat_take(&r.format, p->format, err));
    r.grain = p->grain > 0 ? (moec_widths_grain)(p->grain - 1) : finest(me, r.format, p->protect != NULL);
    MOEC_TRY(read_widths(&r, p->widths, err));
    if (!p->sweep)
        MOEC_TRY(moec_quantize_check(&r, err));
    if (text && !p->sweep)
        MOEC_TRY(tool_read_text(&corpus, &p->input, s.model, p->common.seed, err));
    if (how == MOEC_ROUND_GPTQ && !text && !p->sweep && !p->common.dry_run)
        MOEC_TRY(moec_fail(err, MOEC_EINVAL, "quantize: rounding gptq looks at what the experts are given; give --text FILE, or --rounding "
                           "clip"));
    if (p->stats)
        MOEC_TRY(moec_copy(&stats, p->stats, strlen(p->stats), err));
    else
        MOEC_TRY(moec_format(&stats, err, "%.*s.stats.h5", (int)name_length(p->output), p->output ? p->output : ""));
    if (!p->sweep && !p->common.dry_run)
        MOEC_TRY(tool_check_room(&job, err));
    if (p->record && !p->sweep && !p->common.dry_run)
        MOEC_TRY(may_record(p, err));
    const int64_t group = p->group > 0 ? p->group : has_errors(s.stats) && moec_stats_quant_group(s.stats) > 0
                                                      ? moec_stats_quant_group(s.stats) : moec_quantize_group(s.model);
    MOEC_TRY(complete_stats(&s, p, me, text && !p->sweep ? &corpus : NULL, stats, group, err));
    r.usual_group = group;
    for (int d = 0; needs(me, true) && d < s.stats->n_domains; d++)
        if (!s.stats->domain[d].data[MOEC_STAT_QUANT_KL] && moec_widths_gains(me)) {
            moec_say("%s has no gains: errors of all layers count alike; calibrate --errors --gains measures what they cost at the logits",
                     stats);
            break;
        }
    if (needs(me, true) && moec_stats_quant_group(s.stats) != group)
        moec_warn("the errors of %s are of groups of %" PRId64 " columns; widths are chosen by these, weights are rounded in groups of %" PRId64,
                  stats, moec_stats_quant_group(s.stats), group);
    if (p->weights && s.stats)
        MOEC_TRY(moec_within(err, moec_stats_set_weights(s.stats, p->weights, err), "--domain-weight"));
    if (p->protect) {
        MOEC_TRY(moec_guard_read(&s.guard, &s.guard_name, p->protect, s.model, s.stats, err));
        moec_say("protected: %" PRId64 " expert%s", s.guard.count, tool_s(s.guard.count));
    }
    q.stats = s.stats;
    q.stats_digest = s.stats_digest.hex;
    q.guard = p->protect ? &s.guard : NULL;
    q.guard_name = s.guard_name;
    if (p->sweep) {
        st = sweep(p, &r, err);
        goto done;
    }
    MOEC_TRY(moec_quantize_plan(&job.plan, &widths, &r, err));
    say_solution(&widths);
    job.plan->expert_shards = p->expert_shards || p->share;
    say_use(p, &r, job.plan);
    const moec_quantize_opts o = {.corpus = text ? &corpus : NULL, .compute = (moec_compute)p->input.compute, .rounding = how,
                                  .gptq = {.damp = p->damp, .act_order = p->act_order, .sweeps = (int)p->sweeps},
                                  .weight_power = (int)p->power, .original = p->original && how == MOEC_ROUND_GPTQ,
                                  .losses = p->record != NULL,
                                  .fingerprint = s.print.hex};
    job.quantize = &o;
    job.record = p->record;
    MOEC_TRY(tool_carry_out(&job, err));
    MOEC_TRY(share(p, err));
done:
    moec_widths_release(&widths);
    moec_plan_free(job.plan);
    moec_corpus_release(&corpus);
    moec_free(stats);
    tool_sources_release(&s);
    return st;
}

static int run(const moec_verb *verb, int argc, char **argv)
{
    quantize_params p;
    moec_opt_list words = {0};
    moec_err err = {MOEC_OK, ""};
    const moec_method *me;
    moec_status st = MOEC_OK;
    int rc;
    if (!tool_begin(&rc, &p, &words, verb, argc, argv))
        return rc;
    if (p.methods)
        return tool_end(tool_list_methods(MOEC_QUANTIZE, p.common.json, &err), &err);
    if (p.formats)
        return tool_end(list_formats(&p, &err), &err);
    if (strcmp(p.format, tool_gguf_name) == 0) {
        MOEC_TRY(check_options(&p, verb, gguf_takes_not, "format", p.format, &err));
        const tool_gguf_job job = {.common = &p.common, .input = &p.input, .model = words.n > 0 ? words.at[0] : NULL, .output = p.output,
                                   .stats = p.stats, .weights = p.weights, .sweep = p.sweep, .types = p.types, .candidates = p.candidates,
                                   .bits = p.bits, .target = p.target, .shard = p.shard, .pair = p.pair};
        MOEC_TRY(tool_gguf_quantize(&job, &err));
        goto done;
    }
    const size_t length = p.output ? strlen(p.output) : 0;
    if (length > 5 && strcmp(p.output + length - 5, ".gguf") == 0) {
        st = moec_fail(&err, MOEC_EINVAL, "-o %s: --format %s writes a folder; a GGUF is written with --format gguf", p.output, p.format);
        goto done;
    }
    MOEC_TRY(check_options(&p, verb, gguf_alone, "format", p.format, &err));
    MOEC_TRY(moec_method_take(&me, MOEC_QUANTIZE, MOEC_GRAIN_EXPERTS, p.method, &err));
    MOEC_TRY(check_params(&p, &words, &err));
    if (p.bits == 16.0)
        MOEC_TRY(check_options(&p, verb, whole_takes_not, "bits", "16", &err));
    MOEC_TRY(p.bits == 16.0 ? write_whole(&p, words.at[0], &err) : quantize(&p, me, words.at[0], &err));
done:
    return tool_end(st, &err);
}

const moec_verb moec_verb_quantize = {
    .name = "quantize",
    .args = "MODEL --text FILE... --bits B -o OUT",
    .brief = "write experts in few bits, mixed by an integer program",
    .about = "Measures once what each width costs each routed expert, solves for the widths that cost least under a budget of bits or bytes "
             "(an integer program; the gap to its bound is told), and rounds the weights by GPTQ on the tokens that the router gives to each "
             "expert, layer by layer behind the layers that are quantized already. --format gguf chooses a block type for each tensor, attention and "
             "embeddings too. Errors stay in the statistics file: other budgets are "
             "solved from it in seconds (--sweep prints the curve). In other formats routers, norms, embeddings and the head are never quantized; attention, "
             "shared experts and dense layers where asked. "
             "A run that was stopped continues when it is started again.",
    .examples = "moecompress quantize Qwen3-30B-A3B --text calibration.txt --bits 2.5 -o Qwen3-2.5bit\n"
                "moecompress quantize Qwen3-30B-A3B --stats q.h5 --text a.txt --target-size 12GiB --attention-bits 4 -o Qwen3-12G\n"
                "moecompress quantize Qwen3-30B-A3B --stats q.h5 --sweep 2,2.25,2.5,3,4\n"
                "moecompress quantize Mixtral-8x7B --text a.txt --method pmq --widths 1,2,3 --bits 2 --format fake -o Mixtral-pmq\n"
                "moecompress quantize OLMoE-1B-7B --method rtn --bits 4 --format compressed-tensors -o OLMoE-w4\n"
                "moecompress quantize Qwen3-30B-A3B --text a.txt --bits 5 --format gptq-server -o Qwen3-server\n"
                "moecompress quantize Mixtral-8x7B --text a.txt --bits 3 --widths 2,3,4 --format nested -o Mixtral-nested\n"
                "moecompress quantize Mixtral-8x7B --text a.txt --bits 4 --expert-shards -o Mixtral-low\n"
                "moecompress quantize Mixtral-8x7B --bits 16 --share-with Mixtral-low -o Mixtral-high\n"
                "moecompress quantize Qwen3-30B-A3B --text a.txt --format gguf --target-size 12GiB -o Qwen3-12G.gguf\n"
                "moecompress quantize Qwen3-30B-A3B --format gguf --types q4_k,ffn_down_exps=q6_k -o Qwen3-q4.gguf",
    .opts = rows,
    .min_args = 0,
    .max_args = 1,
    .run = run,
    .entries = "methods",
    .entry = method_entry,
};
