/* See quantize_gguf.h. */
#include "quantize_gguf.h"
#include "output_gguf.h"
#include "quantize_stats.h"
#include "sources.h"
#include "sweep.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { NAME = 128, TRIES = 8, WORKER_BYTES = 4 << 20, BASE_BYTES = 64 << 20 };

/* What a run has in hand. */
typedef struct state {
    const tool_gguf_job *j;
    tool_sources s;
    moec_corpus corpus;
    moec_gguf_model *x;
    moec_gguf_out *tokenizer;
    moec_gguf_rules_list rules;
    moec_gguf_types types;
    moec_gguf_quant *quant;
    moec_gguf_importance *importance;
    char *stats;        /* file of the statistics */
    char *asked;        /* by what types were chosen */
    char name[NAME];    /* of the model, and of the files in a folder */
    int64_t unseen;
} state;

/* --- the format ------------------------------------------------------------------------------------------------------ */

const char tool_gguf_name[] = "gguf";

void tool_gguf_format(moec_json *list)
{
    static const char about[] = "one file or a series, experts stacked: a block type for each tensor, attention, embeddings and head too";
    static const char loads[] = "llama.cpp and what builds on it; vLLM with --pair-gate-up";
    moec_json *types = moec_json_new_array(), *o = moec_json_new_object();
    if (!list)
        printf("%s\n    %s\n    loads in %s; one type for each tensor; types", tool_gguf_name, about, loads);
    for (int b = 0; b < MOEC_BLOCK_COUNT; b++) {
        if (!list)
            printf(" %s", moec_blocks[b].name);
        moec_json_push(types, moec_json_new_string(moec_blocks[b].name));
    }
    if (!list)
        printf("\n\n");
    moec_json_set(o, "name", moec_json_new_string(tool_gguf_name));
    moec_json_set(o, "about", moec_json_new_string(about));
    moec_json_set(o, "loads", moec_json_new_string(loads));
    moec_json_set(o, "per", moec_json_new_string("tensor"));
    moec_json_set(o, "types", types);
    if (list)
        moec_json_push(list, o);
    else
        moec_json_free(o);
}

/* --- what is asked --------------------------------------------------------------------------------------------------- */

static moec_status check_job(const tool_gguf_job *j, moec_err *err)
{
    if (!j->model)
        return moec_fail(err, MOEC_EINVAL, "quantize: MODEL is missing: the folder of the model");
    if (j->bits > 0.0 && j->target > 0)
        return moec_fail(err, MOEC_EINVAL, "--bits and --target-size say the same thing; give one");
    if (j->sweep && !j->stats)
        return moec_fail(err, MOEC_EINVAL, "quantize: --sweep chooses from measured costs; give --stats FILE, which a run with --text makes");
    if (!j->sweep && !j->types && j->bits <= 0.0 && j->target == 0)
        return moec_fail(err, MOEC_EINVAL, "quantize: how small? give --bits 4.5, --target-size 12GiB or --types q4_k");
    if (!j->sweep && !j->output && !j->common->dry_run)
        return moec_fail(err, MOEC_EINVAL, "quantize: -o OUT is missing: the %s to write", j->shard > 0 ? "folder" : "file");
    if (j->weights && !j->stats && j->input->text.n == 0)
        return moec_fail(err, MOEC_EINVAL, "--domain-weight: there are no statistics; give --stats FILE");
    return MOEC_OK;
}

/* The last part of a path, without ".gguf" and slashes. */
static void base_name(char out[NAME], const char *path)
{
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/')
        n--;
    size_t at = n;
    while (at > 0 && path[at - 1] != '/')
        at--;
    if (n - at > 5 && strncmp(path + n - 5, ".gguf", 5) == 0)
        n -= 5;
    snprintf(out, NAME, "%.*s", (int)(n - at), path + at);
    if (!moec_path_is_plain(out))
        snprintf(out, NAME, "model");
}

static moec_status read_request(state *a, moec_gguf_types_request *r, moec_err *err)
{
    moec_status st = MOEC_OK;
    const tool_gguf_job *j = a->j;
    char budget[64] = "";
    *r = (moec_gguf_types_request){.bits = j->bits, .target = j->target, .pair = j->pair};
    if (j->types)
        MOEC_TRY(moec_gguf_rules_read(&a->rules, j->types, err));
    if (j->candidates)
        MOEC_TRY(moec_gguf_candidates_read(&r->candidates, j->candidates, err));
    if (j->bits > 0.0)
        snprintf(budget, sizeof budget, "--bits %.17g", j->bits);
    if (j->target > 0)
        snprintf(budget, sizeof budget, "--target-size %" PRIu64, j->target);
    const char *const part[] = {j->types ? "--types " : "", j->types ? j->types : "", j->candidates ? "--candidates " : "",
                                j->candidates ? j->candidates : ""};
    MOEC_TRY(moec_format(&a->asked, err, "%s%s%s%s%s%s%s%s", budget, budget[0] && j->types ? " " : "", part[0], part[1],
                         j->candidates ? " " : "", part[2], part[3], j->pair ? " --pair-gate-up" : ""));
done:
    return st;
}

/* Hours of measuring must not end at an output that was there before. */
static moec_status check_room(const state *a, moec_err *err)
{
    const moec_writer_options opt = {.dir = a->j->output, .magic = a->j->shard > 0 ? NULL : "GGUF", .source = a->j->model,
                                     .overwrite = a->j->common->overwrite};
    return moec_place_check(&opt, err);
}

/* --- the description ------------------------------------------------------------------------------------------------- */

static moec_status describe(state *a, double bits, double cost, moec_err *err)
{
    const moec_sensitivity *s = a->s.stats ? a->s.stats->sensitivity : NULL;
    const moec_gguf_quant_opts o = {.name = a->name, .asked = a->asked, .bits = bits, .cost = cost, .tokens = s ? s->tokens : 0,
                                    .fingerprint = a->s.print.hex, .shard_bytes = a->j->shard};
    moec_gguf_quant_free(a->quant);
    a->quant = NULL;
    return moec_gguf_quant_new(&a->quant, a->x, a->tokenizer, &o, err);
}

/* Bytes of the files that are no tensor data: the same for types of any cost, which has its place. */
static moec_status fixed_bytes(uint64_t *out, state *a, bool cost, moec_err *err)
{
    const moec_status st = describe(a, 0.0, cost ? 0.0 : (double)NAN, err);
    if (st != MOEC_OK)
        return st;
    *out = moec_gguf_quant_size(a->quant);
    for (size_t i = 0; i < moec_gguf_model_count(a->x); i++)
        *out -= moec_gguf_padded_bytes(moec_gguf_model_at(a->x, i));
    return MOEC_OK;
}

/* --- statistics ------------------------------------------------------------------------------------------------------ */

/* Hours of measuring must not end at a size that no types have. */
static moec_status check_budget(state *a, const moec_gguf_types_request *asked, moec_err *err)
{
    moec_gguf_types_request r = *asked;
    if (a->j->sweep || (r.bits <= 0.0 && r.target == 0))
        return MOEC_OK;
    r.rules = a->j->types ? &a->rules : NULL;
    const moec_status st = fixed_bytes(&r.fixed, a, true, err);
    return st == MOEC_OK ? moec_gguf_types_possible(a->x, &r, err) : st;
}

static moec_status measure(state *a, const moec_gguf_types_request *asked, moec_err *err)
{
    moec_status st = MOEC_OK;
    const tool_gguf_job *j = a->j;
    const tool_common *c = j->common;
    char *work = NULL;
    if (j->input->text.n == 0)
        return moec_fail(err, MOEC_EINVAL, "types for a budget are chosen by measured costs%s%s: give --text FILE to measure them now",
                         a->s.stats ? ", which are not in " : "", a->s.stats ? a->stats : "");
    MOEC_TRY(check_budget(a, asked, err));
    if (c->dry_run)
        return moec_fail(err, MOEC_EINVAL, "--dry-run reads no weights: give --stats FILE with measured costs, which a run with --text makes; "
                         "how long that takes says calibrate --gguf --dry-run");
    MOEC_TRY(tool_read_text(&a->corpus, j->input, a->s.model, c->seed, err));
    MOEC_TRY(moec_format(&work, err, "%s.gguf", a->stats));
    const moec_gguf_measure_opts m = {.compute = (moec_compute)j->input->compute, .tokens = MOEC_GGUF_MEASURE_TOKENS,
                                      .max_memory = c->max_memory, .work = work, .resume = c->resume};
    MOEC_TRY(moec_gguf_measure_fit(a->s.model, &a->corpus, &m, err)); /* not behind the calibration */
    if (!a->s.stats && c->resume) /* --overwrite means the output; what hours measured on the same text stays */
        MOEC_TRY(tool_found_stats(&a->s.stats, a->s.model, &a->corpus, (moec_compute)j->input->compute, a->stats, err));
    if (!a->s.stats) {
        const moec_calibrate_opts o = {.compute = (moec_compute)j->input->compute, .tier = 1, .max_memory = c->max_memory, .options = "{}",
                                       .resume = c->resume, .checkpoint_every = 60.0, .keep_existing = !c->overwrite};
        if (!c->overwrite && moec_path_exists(a->stats) && !moec_calibrate_unfinished(a->stats))
            MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "%s: is already there, of another model, text or --compute; --stats chooses by it without --text, "
                               "another -o or --overwrite measures anew", a->stats));
        MOEC_TRY(tool_may_write(a->stats, TOOL_FILE_HDF5, c->overwrite, err));
        MOEC_TRY(moec_calibrate(&a->s.stats, a->s.model, &a->corpus, a->stats, &o, err));
    }
    if (!a->s.stats->sensitivity) {
        MOEC_TRY(moec_gguf_measure(a->s.stats, a->s.model, &a->corpus, &m, err));
        MOEC_TRY(moec_stats_save(a->s.stats, a->stats, err));
        moec_say("%s: has the cost of every type now; any other size is chosen from it without a new run", a->stats);
    }
done:
    moec_free(work);
    return st;
}

/* The statistics are lean but while they are measured. */
static moec_status reopen(state *a, bool lean, moec_err *err)
{
    moec_stats_free(a->s.stats);
    a->s.stats = NULL;
    return (lean ? moec_stats_load_lean : moec_stats_load)(&a->s.stats, a->stats, err);
}

static moec_status measure_whole(state *a, const moec_gguf_types_request *asked, moec_err *err)
{
    moec_status st = MOEC_OK;
    if (a->s.stats && a->j->input->text.n > 0 && !a->j->common->dry_run)
        MOEC_TRY(reopen(a, false, err));
    MOEC_TRY(measure(a, asked, err));
    MOEC_TRY(reopen(a, true, err));
done:
    return st;
}

/* Opens what is there; measures what a budget needs and is not. */
static moec_status open_sources(state *a, const moec_gguf_types_request *asked, moec_err *err)
{
    moec_status st = MOEC_OK;
    uint64_t bytes;
    const tool_gguf_job *j = a->j;
    const bool budget = j->bits > 0.0 || j->target > 0 || j->sweep;
    const bool wanted = budget || (j->input->text.n > 0 && !j->common->dry_run); /* of types by rules: for importance */
    const bool there = j->stats && (moec_path_exists(j->stats) || !wanted || j->input->text.n == 0);
    char *plain = NULL;
    const tool_source_names names = {.model = j->model, .stats = there ? j->stats : NULL, .lean = true};
    MOEC_TRY(tool_sources_open(&a->s, &names, err));
    if (a->s.model->packed)
        moec_warn("%s: is quantized already, and errors add up; the unquantized release gives a better file", j->model);
    MOEC_TRY(moec_gguf_model_new(&a->x, a->s.model, MOEC_GGML_F16, err));
    MOEC_TRY(moec_gguf_out_new(&a->tokenizer, err));
    MOEC_TRY(moec_gguf_tokenizer(a->tokenizer, a->s.model, err));
    if (j->stats)
        MOEC_TRY(moec_copy(&a->stats, j->stats, strlen(j->stats), err));
    else if (j->output) {
        MOEC_TRY(moec_copy(&plain, j->output, strlen(j->output), err));
        for (size_t n = strlen(plain); n > 1 && plain[n - 1] == '/'; n--)
            plain[n - 1] = '\0';
        MOEC_TRY(moec_format(&a->stats, err, "%s.stats.h5", plain));
    }
    if (wanted && (!a->s.stats || !a->s.stats->sensitivity))
        MOEC_TRY(measure_whole(a, asked, err));
    if (a->s.stats) {
        MOEC_TRY(moec_file_digest(&a->s.stats_digest, &bytes, a->stats, err));
        if (j->weights) {
            MOEC_TRY(moec_within(err, moec_stats_set_weights(a->s.stats, j->weights, err), "--domain-weight"));
            if (budget)
                moec_warn("--domain-weight: columns are weighed by it; what types cost was measured with the weights that were in force then");
        }
        if (!moec_stats_holds(a->s.stats, MOEC_STAT_XIN_SQ))
            moec_warn("%s: has no mean squares of experts' inputs (calibrate --tier 1 collects them): their columns weigh alike", a->stats);
    }
done:
    moec_free(plain);
    return st;
}

/* --- types ----------------------------------------------------------------------------------------------------------- */

/* Several files have headers as their number is, and that depends on the types: what is too large is chosen again. */
static moec_status choose(state *a, moec_gguf_types_request *r, moec_err *err)
{
    moec_status st = MOEC_OK;
    r->sensitivity = a->s.stats ? a->s.stats->sensitivity : NULL;
    r->rules = a->j->types ? &a->rules : NULL;
    MOEC_TRY(fixed_bytes(&r->fixed, a, r->sensitivity != NULL, err));
    for (int i = 0; i < TRIES; i++) {
        moec_gguf_types_release(&a->types);
        MOEC_TRY(moec_gguf_types_choose(&a->types, a->x, r, err));
        MOEC_TRY(moec_gguf_types_set(a->x, &a->types, err));
        MOEC_TRY(describe(a, a->types.bits, a->types.cost, err));
        const uint64_t size = moec_gguf_quant_size(a->quant);
        if (r->target == 0 || size <= r->target)
            return MOEC_OK;
        r->fixed += size - r->target;
    }
    st = moec_fail(err, MOEC_ENOFIT, "--target-size: %zu files of --shard-size do not fit; choose a larger one", moec_gguf_quant_files(a->quant));
done:
    return st;
}

typedef struct sweeping {
    state *a;
    const moec_gguf_types_request *asked;
} sweeping;

/* What a budget would cost; MOEC_ENOFIT where no types meet it. */
static moec_status sweep_row(moec_json *row, void *ctx, const tool_budget *b, moec_err *err)
{
    state *a = ((sweeping *)ctx)->a;
    moec_gguf_types_request r = *((sweeping *)ctx)->asked;
    r.bits = b->bits;
    r.target = b->bytes;
    if (!(r.bits > 0.0) && r.target == 0)
        return moec_fail(err, MOEC_EINVAL, "--sweep %s: neither bits nor a size", b->word);
    const moec_status st = moec_within(err, choose(a, &r, err), "--sweep %s", b->word);
    if (st != MOEC_OK)
        return st;
    moec_json_set(row, "bits", moec_json_new_real(a->types.bits));
    moec_json_set(row, "file_bytes", moec_json_new_int((int64_t)moec_gguf_quant_size(a->quant)));
    moec_json_set(row, "expected_kl", moec_json_new_real(a->types.cost));
    moec_json_set(row, "bound", moec_json_new_real(a->types.bound));
    moec_json_set(row, "proven", moec_json_new_bool(a->types.proven));
    return MOEC_OK;
}

static void print_row(const moec_json *row)
{
    char size[32];
    int64_t bytes = 0;
    bool proven = false;
    (void)moec_json_int(moec_json_get(row, "file_bytes"), &bytes);
    (void)moec_json_bool(moec_json_get(row, "proven"), &proven);
    printf(" %8.3f %14" PRId64 " %12s %12.5g %8s\n", tool_sweep_number(row, "bits"), bytes,
           moec_size_text(size, sizeof size, (uint64_t)bytes), tool_sweep_number(row, "expected_kl"), proven ? "yes" : "no");
}

static moec_status sweep(state *a, const moec_gguf_types_request *asked, moec_err *err)
{
    sweeping s = {a, asked};
    const tool_sweep_form form = {.fill = sweep_row, .ctx = &s, .print = print_row,
                                  .head = "     bits          bytes        files  expected KL   proven", .foot = ""};
    return tool_sweep(a->j->sweep, &form, a->j->common->json, err);
}

/* --- the writing ----------------------------------------------------------------------------------------------------- */

static moec_status check_memory(const state *a, moec_err *err)
{
    char x[32], y[32];
    uint64_t need = BASE_BYTES + (uint64_t)moec_par_threads() * WORKER_BYTES;
    if (a->s.stats)
        need += moec_stats_memory(a->s.stats) + moec_gguf_importance_memory(a->x, a->s.stats);
    if (a->j->common->max_memory == 0 || need <= a->j->common->max_memory)
        return MOEC_OK;
    return moec_fail(err, MOEC_ENOFIT, "--max-memory %s: %s are needed%s", moec_size_text(x, sizeof x, a->j->common->max_memory),
                     moec_size_text_up(y, sizeof y, need), moec_par_threads() > 1 ? "; fewer --threads need less" : "");
}

static moec_status write_it(state *a, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *identity = NULL;
    const tool_gguf_job *j = a->j;
    const uint64_t said = moec_gguf_quant_size(a->quant);
    MOEC_TRY(check_memory(a, err));
    if (a->s.stats) {
        MOEC_TRY(moec_gguf_importance_new(&a->importance, a->x, a->s.stats, err));
        a->unseen = moec_gguf_importance_unseen(a->importance);
        moec_stats_free(a->s.stats);
        a->s.stats = NULL;
    }
    MOEC_TRY(moec_format(&identity, err, "%s %s %s", a->s.print.hex, a->importance ? a->s.stats_digest.hex : "-", j->weights ? j->weights : ""));
    const moec_gguf_quant_where w = {.out = j->output, .source = j->model, .identity = identity, .overwrite = j->common->overwrite,
                                     .resume = j->common->resume};
    MOEC_TRY(moec_gguf_quant_write(a->quant, a->importance, &w, err));
    if (j->shard == 0 && tool_file_bytes(j->output) != said)
        st = moec_fail(err, MOEC_EIO, "%s: has %" PRIu64 " bytes, %" PRIu64 " were said", j->output, tool_file_bytes(j->output), said);
done:
    moec_free(identity);
    return st;
}

moec_status tool_gguf_quantize(const tool_gguf_job *j, moec_err *err)
{
    moec_status st = MOEC_OK;
    state a = {.j = j, .unseen = -1};
    moec_gguf_types_request r;
    const double began = moec_now();
    int64_t tokens = 0;
    MOEC_TRY(check_job(j, err));
    MOEC_TRY(read_request(&a, &r, err));
    if (!j->sweep && !j->common->dry_run)
        MOEC_TRY(check_room(&a, err));
    base_name(a.name, j->shard > 0 && j->output ? j->output : j->model);
    MOEC_TRY(open_sources(&a, &r, err));
    if (j->sweep) {
        st = sweep(&a, &r, err);
        goto done;
    }
    MOEC_TRY(choose(&a, &r, err));
    tool_gguf_say_fallen(a.x, &a.types);
    if (a.s.stats && a.s.stats->sensitivity)
        tokens = a.s.stats->sensitivity->tokens;
    if (!j->common->dry_run)
        MOEC_TRY(write_it(&a, err));
    const tool_gguf_result result = {.common = j->common, .x = a.x, .types = &a.types, .output = j->output, .bytes = moec_gguf_quant_size(a.quant),
                                     .files = moec_gguf_quant_files(a.quant), .tokens = tokens, .unseen = a.unseen,
                                     .tensors = j->common->dry_run, .seconds = moec_now() - began};
    MOEC_TRY(tool_gguf_print(&result, err));
done:
    moec_gguf_importance_free(a.importance);
    moec_gguf_quant_free(a.quant);
    moec_gguf_types_release(&a.types);
    moec_gguf_rules_release(&a.rules);
    moec_gguf_out_free(a.tokenizer);
    moec_gguf_model_free(a.x);
    moec_corpus_release(&a.corpus);
    moec_free(a.stats);
    moec_free(a.asked);
    tool_sources_release(&a.s);
    return st;
}
