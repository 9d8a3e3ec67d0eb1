/* See output.h. */
#include "output.h"
#include "output_factor.h"
#include "output_quant.h"
#include "output_served.h"
#include "output_weights.h"
#include "prune_grain.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

/* Bytes a second that the time estimate counts with: a plain solid-state disk, read and written at once. */
static const double nominal_rate = 500e6;
enum { MANIFEST_BYTES = 1 << 30 };

typedef struct tally {
    int64_t unseen, unseen_kept, guarded;
} tally;

static tally count(const moec_plan *p)
{
    tally t = {0, 0, 0};
    for (int64_t i = 0; i < p->n_layers; i++) {
        t.unseen += p->layer[i].n_unseen;
        t.guarded += p->layer[i].n_guarded;
        for (int64_t j = 0; j < p->layer[i].n_unseen; j++)
            t.unseen_kept += moec_plan_kept(p, i, p->layer[i].unseen[j]) >= 0;
    }
    return t;
}

/* Experts of which no statistics are kept. */
static void say_unwatched(const moec_plan *p)
{
    bool heads = false, mtp = false;
    for (int64_t i = p->n_layers; i < p->n_sets; i++) {
        heads = heads || p->layer[i].kind == MOEC_SET_HEADS;
        mtp = mtp || p->layer[i].kind == MOEC_SET_MTP;
    }
    if (p->mapped && mtp)
        moec_say("multi-token-prediction layers are not merged, they stay as they are");
    else if (heads || mtp)
        moec_say("calibration does not see %s%s%s: as many experts are kept there, by the norm of the router's rows",
                 heads ? "attention experts" : "", heads && mtp ? " and " : "", mtp ? "multi-token-prediction layers" : "");
}

/* Are all scores of a layer one value? Then the numbers of the experts decide, not the method. */
static bool all_equal(const moec_plan_layer *l)
{
    for (int64_t e = 1; l->score && e < l->n_experts; e++)
        if (l->score[e] != l->score[0])
            return false;
    return l->score && l->n_experts > 1 && l->n_keep < l->n_experts;
}

static void say_counts(const moec_plan *p)
{
    int64_t equal = 0, first = -1;
    for (int64_t i = 0; i < p->n_layers; i++)
        if (all_equal(&p->layer[i])) {
            first = equal++ == 0 ? p->layer[i].layer : first;
        }
    if (equal > 0)
        moec_warn("all scores are the same in %" PRId64 " layer%s, the first is layer %" PRId64 ": there the experts of the lowest "
                  "numbers are kept", equal, tool_s(equal), first);
    if (!moec_plan_even(p) && p->pad == 0 && !p->mapped)
        moec_warn("layers keep %" PRId64 " to %" PRId64 " experts: no client loads that, apply refuses it; eval MODEL --plan FILE "
                  "measures it", moec_plan_least(p), moec_plan_most(p));
}

/* `repair`: what is still to be done to it, or NULL; who stays may be decided only there, or nobody goes since experts are tied. */
static void say_policy(const moec_plan *p, bool hint, const moec_repair_opts *repair)
{
    tally t = count(p);
    const bool open = repair && (repair->method || repair->merge), tied = repair && repair->tied;
    if (!tied && !p->quant.format[0] && moec_plan_least(p) == p->layer[0].n_experts && !p->layer[0].rewritten && p->n_drop == 0 && p->new_top_k == p->top_k)
        moec_warn("no expert is removed: all %" PRId64 " of a layer are kept", p->layer[0].n_experts);
    if (t.unseen > 0 && open)
        moec_warn("experts that no calibration token selected, of which nothing is known: %" PRId64, t.unseen);
    else if (t.unseen > 0)
        moec_warn("experts that no calibration token selected, of which nothing is known: %" PRId64 "; removed %" PRId64
                  ", kept %" PRId64, t.unseen, t.unseen - t.unseen_kept, t.unseen_kept);
    if (p->new_top_k < p->top_k && p->new_top_k < moec_plan_least(p))
        moec_say("a token will use %" PRId64 " experts instead of %" PRId64 "; evaluate it", p->new_top_k, p->top_k);
    else if (p->new_top_k < p->top_k)
        moec_warn("only %" PRId64 " expert%s kept in a layer: a token will use %" PRId64 " instead of %" PRId64,
                  moec_plan_least(p), moec_plan_least(p) == 1 ? " is" : "s are", p->new_top_k, p->top_k);
    if (p->drop_groups)
        moec_warn("the router will choose among all experts at once instead of among groups: routing changes, evaluate it");
    say_counts(p);
    say_unwatched(p);
    if (hint && moec_plan_least(p) < p->layer[0].n_experts)
        moec_say("the weights that stay are copied as they are; with --text FILE they are fitted to make up for what is removed");
    if (moec_plan_dead(p) > 0)
        moec_say("dead experts that only pad the layers to %" PRId64 ": %" PRId64 " in all; they cost disk and memory, no time",
                 p->pad, moec_plan_dead(p));
}

/* Clients that were named: the plan is refused, or what is worth knowing is said. Of any: what loads the source only. */
static moec_status check_clients(const tool_job *j, moec_err *err)
{
    moec_client c[MOEC_VERIFY_CLIENTS];
    int n = 0;
    moec_status st = j->compat ? moec_compat_check(c, &n, j->compat, j->model, j->plan, err) : MOEC_OK;
    for (int i = 0; st == MOEC_OK && i < n; i++)
        if (c[i].advice[0])
            moec_warn("%s loads it, but: %s", c[i].name, c[i].advice);
    moec_client before[MOEC_VERIFY_CLIENTS];
    n = j->plan->quant.format[0] ? 0 : moec_clients(before, j->model); /* few load codes: the report says who does */
    (void)moec_clients_of(c, j->model, j->plan);
    for (int i = 0; st == MOEC_OK && i < n; i++) {
        char names[200] = "";
        size_t at = 0;
        bool said = !before[i].loads || c[i].loads;
        for (int k = 0; k < n; k++) { /* those of one reason in one line */
            if (!before[k].loads || c[k].loads || strcmp(c[k].reason, c[i].reason) != 0)
                continue;
            said = said || k < i;
            const int more = snprintf(names + at, sizeof names - at, "%s%s", at > 0 ? ", " : "", c[k].name);
            at = more > 0 && at + (size_t)more < sizeof names ? at + (size_t)more : sizeof names - 1;
        }
        if (!said)
            moec_warn("%s: the source loads there, the output will not (%s): %s", names, c[i].rule, c[i].reason);
    }
    return st;
}

/* --- for people ------------------------------------------------------------------------------------------------------ */

/* Lowest score that is kept and highest that is removed; NAN where there is none. */
static void edge_scores(double *kept, double *removed, const moec_plan *p, int64_t l)
{
    *kept = *removed = (double)NAN;
    for (int64_t e = 0; p->layer[l].score && e < p->layer[l].n_experts; e++) {
        double s = p->layer[l].score[e];
        if (moec_plan_kept(p, l, e) >= 0)
            *kept = !(s >= *kept) ? s : *kept;
        else
            *removed = !(s <= *removed) ? s : *removed;
    }
}

static void print_score(double v)
{
    if (isnan(v))
        printf(" %12s", "-");
    else
        printf(" %12.6g", v);
}

/* Was the plan made by merging with this value of a setting? */
static bool merge_is(const moec_plan *p, const char *key, const char *value)
{
    moec_err err = {MOEC_OK, ""};
    moec_json *o = NULL;
    if (!p->options || moec_json_parse(&o, p->options, strlen(p->options), "options", &err) != MOEC_OK)
        return false;
    const char *word = moec_json_string(moec_json_get(moec_json_get(o, "merge"), key));
    const bool is = word && strcmp(word, value) == 0;
    moec_json_free(o);
    return is;
}

/* What went into another expert, and what only went. */
static void print_merges(const moec_plan *p)
{
    printf("%5s %8s %6s %8s %8s %14s %10s\n", "layer", "experts", "groups", "merged", "pruned", "largest group", "protected");
    for (int64_t i = 0; i < p->n_layers; i++) {
        const moec_plan_layer *l = &p->layer[i];
        int64_t merged = 0, pruned = 0, largest = 1;
        for (int64_t e = 0; l->into && e < l->n_experts; e++) {
            int64_t size = 0;
            for (int64_t j = 0; j < l->n_experts; j++)
                size += l->into[j] == e;
            largest = size > largest ? size : largest;
            pruned += l->into[e] < 0;
            merged += l->into[e] >= 0 && l->into[e] != e;
        }
        printf("%5" PRId64 " %8" PRId64 " %6" PRId64 " %8" PRId64 " %8" PRId64 " %14" PRId64 " %10" PRId64 "\n", l->layer,
               l->n_experts, l->n_experts - merged - pruned, merged, pruned, largest, l->n_guarded);
    }
    printf("\nmethod %s\n", p->method);
    if (merge_is(p, "fill", "segments"))
        printf("pruned: but neurons of these experts went to kept ones that have neurons like them (-v says how many)\n");
}

/* Of a dry run: who goes with whom is not known yet. */
static void print_merge_sizes(const moec_plan *p, const moec_repair_opts *o)
{
    printf("%5s %8s %6s %10s\n", "layer", "experts", "groups", "protected");
    for (int64_t i = 0; i < p->n_layers; i++)
        printf("%5" PRId64 " %8" PRId64 " %6" PRId64 " %10" PRId64 "\n", p->layer[i].layer, p->layer[i].n_experts,
               o->tied ? o->tied[i] : p->layer[i].n_keep, p->layer[i].n_guarded);
    printf("\nmethod %s\n", p->method);
}

static void print_plan(const moec_plan *p, const moec_model *m, const moec_repair_opts *repair, const moec_thin_tally *t)
{
    if (moec_plan_merges(p)) {
        print_merges(p);
        return;
    }
    if (repair && repair->merge && !p->repair) {
        print_merge_sizes(p, repair);
        return;
    }
    if (tool_grain_of(p) != MOEC_GRAIN_EXPERTS) {
        tool_grain_table(p, m, t);
        return;
    }
    printf("%5s %8s %6s %8s %8s %10s %12s %12s\n", "layer", "experts", "kept", "removed", "unseen", "protected",
           "least kept", "most removed");
    for (int64_t i = 0; i < p->n_layers; i++) {
        const moec_plan_layer *l = &p->layer[i];
        double kept, removed;
        edge_scores(&kept, &removed, p, i);
        printf("%5" PRId64 " %8" PRId64 " %6" PRId64 " %8" PRId64 " %8" PRId64 " %10" PRId64, l->layer, l->n_experts,
               l->n_keep, l->n_experts - l->n_keep, l->n_unseen, l->n_guarded);
        print_score(kept);
        print_score(removed);
        printf("\n");
    }
    for (int64_t i = p->n_layers; i < p->n_sets; i++) {
        const moec_plan_layer *l = &p->layer[i];
        printf("%5" PRId64 " %8" PRId64 " %6" PRId64 " %8" PRId64 "   %s, by the norm of the router's rows\n", l->layer,
               l->n_experts, l->n_keep, l->n_experts - l->n_keep,
               l->kind == MOEC_SET_MTP ? "multi-token prediction" : "attention experts");
    }
    if (p->mtp == MOEC_PLAN_MTP_DROP)
        printf("\nmulti-token-prediction layers are left out");
    if (m->dims.groups > 1 && !p->drop_groups)
        printf("\neach of the router's %" PRId64 " groups keeps as many experts, so a removed one may score higher than a kept one",
               m->dims.groups);
    printf("\nmethod %s; scores are those of the method; unseen: no calibration token selected the expert\n",
           p->method[0] ? p->method : "none");
}

/* What fitted routers did to how much each expert has to do. */
static void print_shift(const moec_plan *p, bool fitted)
{
    const moec_plan_layer *most = NULL;
    int64_t routers = 0, refitted = 0;
    for (int64_t i = 0; i < p->n_layers; i++) {
        const moec_plan_layer *l = &p->layer[i];
        if (isnan(l->load_shift))
            continue;
        routers++;
        refitted += l->router_refit;
        most = !most || l->load_shift > most->load_shift ? l : most;
    }
    if (most && (fitted || refitted > 0)) /* the rows may be sums of others', fitted to nothing */
        printf("router: fitted in %" PRId64 " of %" PRId64 " layers; at most %.2f %% of the load moves to other experts (layer %"
               PRId64 ")\n", refitted, routers, 100.0 * most->load_shift, most->layer);
}

/* Was anything asked to be fitted, or did a router's rule fit its rows? */
static bool is_fitted(const moec_plan *p)
{
    moec_err err = {MOEC_OK, ""};
    moec_json *o = NULL;
    bool fitted = true;
    if (moec_json_parse(&o, p->repair, strlen(p->repair), "repair", &err) == MOEC_OK) {
        const char *kind = moec_json_string(moec_json_get(o, "method"));
        fitted = !kind || strcmp(kind, "none") != 0;
    }
    moec_json_free(o);
    for (int64_t i = 0; i < p->n_layers; i++)
        fitted = fitted || (p->layer[i].rewritten && p->layer[i].error_after < p->layer[i].error_before);
    return fitted;
}

/* Held-out error of each layer, without and with the weights that were fitted. */
static void print_repair(const moec_plan *p)
{
    if (!p->repair)
        return;
    const bool fitted = is_fitted(p);
    if (fitted)
        printf("%5s %14s %14s %8s\n", "layer", "error before", "repaired", "ratio");
    else
        printf("%5s %14s\n", "layer", "error");
    for (int64_t i = 0; i < p->n_layers; i++) {
        const moec_plan_layer *l = &p->layer[i];
        if (l->rewritten && !fitted)
            printf("%5" PRId64 " %14.5g\n", l->layer, l->error_after);
        else if (l->rewritten)
            printf("%5" PRId64 " %14.5g %14.5g %8.3f\n", l->layer, l->error_before, l->error_after,
                   l->error_before > 0.0 ? l->error_after / l->error_before : 1.0);
    }
    print_shift(p, fitted);
    printf("error: squared difference from what the layer's experts should give, relative to that, on held-out windows of --text%s%s\n\n",
           fitted ? "; ratio 1: not changed" : "", fitted && moec_plan_merges(p) ? "; before: merged and not fitted" : "");
}

static bool computes(const tool_job *j)
{
    return j->repair || j->thin || j->factor || j->quantize;
}

static void print_cost(const tool_job *j, const moec_work_cost *c)
{
    char a[32];
    if (!computes(j))
        return;
    const char *what = j->quantize ? "quantize" : j->factor ? "factor" : !j->repair ? "thin" : j->repair->merge ? "merge" : "repair";
    printf("%-11s%s of disk beside the output", what, moec_size_text(a, sizeof a, c->disk));
    if (c->token_passes > 0)
        printf(", %" PRIu64 " token passes", c->token_passes);
    const bool blind = j->quantize && !j->quantize->corpus && j->quantize->rounding != MOEC_ROUND_NEAREST;
    printf("; its time is not estimated%s\n", blind ? ", nor the memory that it takes with --text" : "");
}

static void print_sizes(const tool_job *j, const moec_apply_result *r, const moec_thin_tally *t, const moec_work_cost *cost)
{
    char a[32], b[32], c[32], d[32];
    if (r->source_bytes == 0)
        return; /* a plan that cannot be applied */
    printf("tensors    %s -> %s (%.1f %%)\n", moec_size_text(a, sizeof a, r->source_bytes),
           moec_size_text(b, sizeof b, r->output_bytes),
           100.0 * (double)r->output_bytes / (double)r->source_bytes);
    if (j->repair && j->repair->tied)
        printf("           every expert is written, copies of its group's: NOT smaller, for measuring (--emit tied)\n");
    if (j->plan->mapped)
        printf("           one expert a group and the original router, which leads to them (--emit map): for transformers 5 with\n"
               "           trust_remote_code, which runs modeling_moecompress.py\n");
    if (r->dead_bytes > 0)
        printf("dead       %s of %" PRId64 " experts that only pad a layer to %" PRId64 "\n",
               moec_size_text(a, sizeof a, r->dead_bytes), moec_plan_dead(j->plan), j->plan->pad);
    printf("top-k      %" PRId64 " -> %" PRId64 "\n", j->plan->top_k, j->plan->new_top_k);
    tool_grain_print(j->plan, j->model, t);
    if (j->common->dry_run) {
        printf("disk       %s needed%s%s%s\n", moec_size_text(a, sizeof a, r->disk_bytes), j->output ? ", " : "",
               j->output ? moec_size_text(c, sizeof c, r->disk_free) : "", j->output ? " free" : "");
        printf("memory     %s at most\n", moec_size_text(d, sizeof d, r->memory_bytes > cost->memory ? r->memory_bytes : cost->memory));
        print_cost(j, cost);
        printf("time       about %.0f s%s on a disk of 500 MB/s\n", ceil(2.0 * (double)r->disk_bytes / nominal_rate),
               computes(j) ? " of writing" : "");
        return;
    }
    printf("files      %s in %s, verified\n", moec_size_text(a, sizeof a, r->disk_bytes), j->output);
    printf("took       %.2f s, peak memory %s\n", moec_now() - j->began,
           moec_size_text(b, sizeof b, moec_peak_memory()));
}

/* --- for programs ---------------------------------------------------------------------------------------------------- */

static moec_json *pair(const char *a, int64_t x, const char *b, int64_t y)
{
    moec_json *o = moec_json_new_object();
    moec_json_set(o, a, moec_json_new_int(x));
    moec_json_set(o, b, moec_json_new_int(y));
    return o;
}

static moec_json *repair_json(const moec_plan *p)
{
    moec_json *list = moec_json_new_array();
    for (int64_t i = 0; i < p->n_layers; i++) {
        const moec_plan_layer *l = &p->layer[i];
        moec_json *o = moec_json_new_object();
        moec_json_set(o, "layer", moec_json_new_int(l->layer));
        moec_json_set(o, "before", moec_json_new_real(l->error_before));
        moec_json_set(o, "after", moec_json_new_real(l->error_after));
        if (!isnan(l->load_shift)) {
            moec_json_set(o, "load_shift", moec_json_new_real(l->load_shift));
            moec_json_set(o, "router_refit", moec_json_new_bool(l->router_refit));
        }
        moec_json_push(list, o);
    }
    return list;
}

static moec_json *result_json(const tool_job *j, const moec_apply_result *r, const moec_thin_tally *thin)
{
    const moec_plan *p = j->plan;
    const bool loads = moec_plan_even(p) || p->pad > 0 || p->mapped;
    tally t = count(p);
    moec_json *o = moec_json_new_object();
    moec_json_set(o, "output", j->output ? moec_json_new_string(j->output) : moec_json_new_null());
    moec_json_set(o, "bytes", pair("source", (int64_t)r->source_bytes, "output", (int64_t)r->output_bytes));
    moec_json_set(o, "file_bytes", moec_json_new_int((int64_t)r->disk_bytes));
    moec_json_set(o, "method", moec_json_new_string(p->method));
    moec_json_set(o, "experts", pair("source", p->layer[0].n_experts, "output", loads && !p->mapped ? moec_plan_experts(p) : moec_plan_most(p)));
    if (!loads)
        moec_json_set(o, "loads", moec_json_new_bool(false)); /* and the sizes below are 0 */
    moec_json_set(o, "kept", moec_json_new_int(moec_plan_total(p)));
    moec_json_set(o, "removed", moec_json_new_int(p->n_sets * p->layer[0].n_experts - moec_plan_total(p)));
    if (p->repair)
        moec_json_set(o, "held_out_error", repair_json(p));
    moec_json_set(o, "top_k", moec_json_new_int(p->new_top_k));
    if (p->mapped)
        moec_json_set(o, "emit", moec_json_new_string("map"));
    if (p->pad > 0) {
        moec_json_set(o, "dead_experts", moec_json_new_int(moec_plan_dead(p)));
        moec_json_set(o, "dead_bytes", moec_json_new_int((int64_t)r->dead_bytes));
    }
    if (p->n_sets > p->n_layers)
        moec_json_set(o, "kept_by_router_norm", moec_json_new_int(p->n_sets - p->n_layers));
    if (p->mtp != MOEC_PLAN_MTP_UNSAID)
        moec_json_set(o, "mtp", moec_json_new_string(p->mtp == MOEC_PLAN_MTP_DROP ? "drop" : "keep"));
    moec_json_set(o, "unseen", pair("kept", t.unseen_kept, "removed", t.unseen - t.unseen_kept));
    moec_json_set(o, "protected", moec_json_new_int(t.guarded));
    tool_grain_set(o, p, j->model, thin);
    moec_json_set(o, "left_out_files", moec_json_new_int((int64_t)r->left_out));
    return o;
}

static void print_what(const tool_job *j, const moec_thin_tally *t)
{
    if (j->plan->factor.kind != MOEC_FACTOR_NONE)
        tool_factor_print(j->plan, j->model);
    else if (j->plan->quant.format[0])
        tool_quant_print(j->plan, j->model, j->quantized);
    else
        print_plan(j->plan, j->model, j->repair, t);
}

/* `t`: of a run; `cost`: of a dry one. */
static moec_status report(const tool_job *j, const moec_apply_result *r, const moec_thin_tally *t, const moec_work_cost *cost,
                          moec_err *err)
{
    moec_json *plan = NULL;
    if (!j->common->json) {
        print_what(j, t);
        print_repair(j->plan);
        print_sizes(j, r, t, cost);
        return j->common->dry_run && j->stats ? tool_print_served(j->plan, j->stats, err) : MOEC_OK;
    }
    moec_json *o = result_json(j, r, t);
    if (j->plan->factor.kind != MOEC_FACTOR_NONE)
        moec_json_set(o, "factor", tool_factor_json(j->plan, j->model));
    if (j->plan->quant.format[0])
        moec_json_set(o, "quant", tool_quant_json(j->plan, j->model, j->quantized));
    if (j->common->dry_run) {
        moec_status st = moec_plan_to_json(&plan, j->plan, err);
        if (st != MOEC_OK) {
            moec_json_free(o);
            return st;
        }
        moec_json_set(o, "dry_run", moec_json_new_bool(true));
        moec_json_set(o, "estimate_is_of_writing_only", moec_json_new_bool(computes(j)));
        if (computes(j)) {
            moec_json_set(o, "work_disk_bytes", moec_json_new_int((int64_t)cost->disk));
            moec_json_set(o, "work_memory_bytes", moec_json_new_int((int64_t)cost->memory));
            moec_json_set(o, "token_passes", moec_json_new_int((int64_t)cost->token_passes));
        }
        moec_json_set(o, "disk_free_bytes", j->output ? moec_json_new_int((int64_t)r->disk_free) : moec_json_new_null());
        moec_json_set(o, "estimated_memory_bytes", moec_json_new_int((int64_t)r->memory_bytes));
        moec_json_set(o, "estimated_seconds", moec_json_new_real(ceil(2.0 * (double)r->disk_bytes / nominal_rate)));
        moec_json_set(o, "plan", plan);
        if (j->stats)
            st = tool_set_served(o, j->plan, j->stats, err);
        if (st != MOEC_OK) {
            moec_json_free(o);
            return st;
        }
    }
    moec_json_set(o, "seconds", moec_json_new_real(moec_now() - j->began));
    moec_json_set(o, "peak_memory_bytes", moec_json_new_int((int64_t)moec_peak_memory()));
    return tool_print_json(o, err);
}

/* --- the job --------------------------------------------------------------------------------------------------------- */

static moec_status save_plan(const tool_job *j, const moec_plan *p, const char *path, moec_err *err)
{
    char *text = NULL;
    moec_status st = MOEC_OK;
    MOEC_TRY(moec_plan_to_text(&text, p, err));
    if (path)
        MOEC_TRY(moec_file_write(path, text, strlen(text), err));
    else
        fputs(text, stdout);
    if (path && j->common->overwrite && !p->weights[0])
        tool_weights_drop(path);
done:
    moec_free(text);
    return st;
}

static moec_json *saved_json(const tool_job *j, const moec_plan *p, const char *path)
{
    moec_json *o = moec_json_new_object();
    moec_json_set(o, "output", moec_json_new_string(path));
    moec_json_set(o, "bytes", tool_bytes_json(moec_ckpt_bytes(j->model->ckpt), path));
    moec_json_set(o, "method", moec_json_new_string(p->method));
    moec_json_set(o, "removed", moec_json_new_int(p->n_sets * p->layer[0].n_experts - moec_plan_total(p)));
    moec_json_set(o, "top_k", moec_json_new_int(p->new_top_k));
    return o;
}

static moec_status print_saved(const tool_job *j, moec_json *o, moec_err *err)
{
    moec_json_set(o, "seconds", moec_json_new_real(moec_now() - j->began));
    moec_json_set(o, "peak_memory_bytes", moec_json_new_int((int64_t)moec_peak_memory()));
    return tool_print_json(o, err);
}

static moec_status write_plan(const tool_job *j, const moec_thin_tally *t, moec_err *err)
{
    moec_status st = MOEC_OK;
    if (j->output)
        MOEC_TRY(tool_may_write(j->output, TOOL_FILE_PLAN, j->common->overwrite, err));
    MOEC_TRY(save_plan(j, j->plan, j->output, err));
    if (j->output && j->common->json)
        MOEC_TRY(print_saved(j, saved_json(j, j->plan, j->output), err));
    else if (j->output) {
        print_what(j, t);
        print_repair(j->plan);
        tool_grain_print(j->plan, j->model, t);
        if (j->plan->weights[0])
            printf("plan       %s, its weights in %s.weights: they belong together\n", j->output, j->output);
    }
done:
    return st;
}

moec_status tool_write_plans(const tool_job *job, moec_plan *const *plan, const char *const *path, int n, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_json *list = NULL;
    for (int i = 0; i < n; i++) { /* all that can be refused, before anything is written */
        tool_job j = *job;
        j.plan = plan[i];
        MOEC_TRY(moec_within(err, check_clients(&j, err), "%s", path[i]));
        MOEC_TRY(tool_may_write(path[i], TOOL_FILE_PLAN, job->common->overwrite, err));
        moec_say("%s:", path[i]);
        say_policy(plan[i], false, NULL);
    }
    list = moec_json_new_array();
    for (int i = 0; i < n; i++) {
        MOEC_TRY(save_plan(job, plan[i], path[i], err));
        moec_json_push(list, saved_json(job, plan[i], path[i]));
        if (!job->common->json)
            printf("%s: %" PRId64 " of %" PRId64 " experts in %" PRId64 " layers\n", path[i], moec_plan_total(plan[i]),
                   plan[i]->n_layers * plan[i]->layer[0].n_experts, plan[i]->n_layers);
    }
    if (job->common->json) {
        moec_json *o = moec_json_new_object();
        moec_json_set(o, "plans", list);
        list = NULL;
        st = print_saved(job, o, err);
    }
done:
    moec_json_free(list);
    return st;
}

moec_status tool_check_room(const tool_job *j, moec_err *err)
{
    if (!j->output)
        return moec_fail(err, MOEC_EINVAL, "-o OUT is missing: %s", j->plan_only ? "weights that are computed need a place"
                                                                                 : "the folder to write");
    if (!j->common->overwrite && moec_path_exists(j->output))
        return moec_fail(err, MOEC_EEXIST, "%s: is there already; --overwrite replaces it", j->output);
    const moec_writer_options place = {.dir = j->output, .source = moec_ckpt_dir(j->model->ckpt), .overwrite = j->common->overwrite};
    if (!j->plan_only)
        return moec_place_check(&place, err);
    moec_status st = tool_may_write(j->output, TOOL_FILE_PLAN, j->common->overwrite, err);
    return st == MOEC_OK ? tool_weights_may_write(j->output, j->common->overwrite, err) : st;
}

/* What writing the output will need is asked for now, not after the repair. */
static moec_status check_writing(const tool_job *j, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_apply_result r = {0};
    char need[32], have[32];
    const moec_apply_options opt = {.out = j->output, .fingerprint = j->fingerprint, .max_memory = j->common->max_memory};
    if (j->plan_only)
        return MOEC_OK;
    if (j->thin)
        snprintf(j->plan->weights, sizeof j->plan->weights, "not made yet");
    MOEC_TRY(moec_apply_estimate(&r, j->model, j->plan, &opt, err));
    if (j->thin)
        j->plan->weights[0] = '\0';
    if (r.disk_free < r.disk_bytes)
        st = moec_fail(err, MOEC_ENOFIT, "%s: the output needs %s of disk, %s are free", j->output,
                       moec_size_text(need, sizeof need, r.disk_bytes), moec_size_text(have, sizeof have, r.disk_free));
done:
    return st;
}

/* OUT is made by a run that was killed before its folder of work was gone: the folder goes now, lest it be taken for the work of
 * another run. */
static moec_status forget_work(const tool_job *j, const char *work, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_err why = {MOEC_OK, ""};
    char *path = NULL;
    moec_json *manifest = NULL;
    moec_plan *made = NULL;
    if (j->plan_only || !j->output)
        return MOEC_OK;
    MOEC_TRY(moec_path_join(&path, j->output, MOEC_MANIFEST, err));
    if (moec_path_exists(path) && moec_json_read(&manifest, path, MANIFEST_BYTES, &why) == MOEC_OK &&
        moec_plan_from_json(&made, moec_json_get(manifest, "plan"), path, &why) == MOEC_OK)
        st = moec_work_forget(work, made, err);
done:
    moec_plan_free(made);
    moec_json_free(manifest);
    moec_free(path);
    return st;
}

/* Beside OUT, also where OUT is said with a slash behind it. */
static moec_status work_path(char **out, const tool_job *j, const char *what, moec_err *err)
{
    const char *name = j->output ? j->output : "";
    size_t n = strlen(name);
    while (n > 1 && name[n - 1] == '/')
        n--;
    return moec_format(out, err, "%.*s.%s", (int)n, name, what);
}

/* *work: OUT.END, where weights will be computed, or NULL. All that can be refused is, before that begins. `rewrites`: the plan
 * does already, and its estimate needs a name for the weights. */
static moec_status begin_work(char **work, const tool_job *j, const char *end, bool rewrites, moec_err *err)
{
    moec_status st = MOEC_OK;
    MOEC_TRY(work_path(work, j, end, err));
    MOEC_TRY(forget_work(j, *work, err));
    MOEC_TRY(tool_check_room(j, err));
    if (rewrites)
        snprintf(j->plan->weights, sizeof j->plan->weights, "not made yet");
    MOEC_TRY(check_writing(j, err));
    if (rewrites)
        j->plan->weights[0] = '\0';
done:
    return st;
}

static moec_status repair(moec_repair **out, const tool_job *j, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *work = NULL;
    moec_repair_opts o = *j->repair;
    MOEC_TRY(begin_work(&work, j, "repair", false, err));
    o.work = work;
    o.resume = j->common->resume;
    o.max_memory = j->common->max_memory;
    o.seed = (uint64_t)j->common->seed;
    o.fingerprint = j->fingerprint;
    o.thin = j->thin;
    o.request = j->request;
    MOEC_TRY(moec_repair_run(out, j->plan, j->model, &o, err));
done:
    moec_free(work);
    return st;
}

static moec_status thin(moec_thin **out, const tool_job *j, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *work = NULL;
    MOEC_TRY(begin_work(&work, j, "thin", true, err));
    const moec_thin_opts o = {.work = work, .resume = j->common->resume, .max_memory = j->common->max_memory};
    MOEC_TRY(moec_thin_run(out, j->plan, j->thin, j->request, &o, err));
done:
    moec_free(work);
    return st;
}

static moec_status factor(moec_factoring **out, const tool_job *j, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *work = NULL;
    moec_factor_opts o = *j->factor;
    MOEC_TRY(begin_work(&work, j, "factor", true, err));
    o.work = work;
    o.resume = j->common->resume;
    o.max_memory = j->common->max_memory;
    MOEC_TRY(moec_factoring_run(out, j->plan, j->model, &o, err));
    if (moec_factoring_unseen(*out) > 0)
        moec_warn("%" PRId64 " expert%s selected by no token: the factors are of least error of the weights alone",
                  moec_factoring_unseen(*out), moec_factoring_unseen(*out) == 1 ? " was" : "s were");
done:
    moec_free(work);
    return st;
}

static moec_status quantize(moec_quantizing **out, const tool_job *j, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *work = NULL;
    moec_quantize_opts o = *j->quantize;
    MOEC_TRY(begin_work(&work, j, "quantize", true, err));
    o.work = work;
    o.resume = j->common->resume;
    o.max_memory = j->common->max_memory;
    MOEC_TRY(moec_quantizing_run(out, j->plan, j->model, &o, err));
    const moec_quantize_report r = moec_quantizing_report(*out);
    if (r.unseen > 0)
        moec_warn("%" PRId64 " expert%s selected by no token of --text: rounded by what the layer's other tokens would give them", r.unseen,
                  r.unseen == 1 ? " was" : "s were");
    if (r.few > 0)
        moec_warn("%" PRId64 " expert%s fewer tokens than columns: rounded by their own and the layer's together", r.few,
                  r.few == 1 ? " has" : "s have");
    if (j->record)
        MOEC_TRY(tool_quant_record(*out, j->record, err));
done:
    moec_free(work);
    return st;
}

/* Of a dry run: what computing weights would take, before anything is written. */
static moec_status estimate_work(moec_work_cost *out, const tool_job *j, moec_err *err)
{
    moec_status st = MOEC_OK;
    if (j->repair) {
        moec_repair_opts o = *j->repair;
        o.max_memory = j->common->max_memory;
        o.thin = j->thin;
        o.request = j->request;
        MOEC_TRY(moec_repair_estimate(out, j->plan, j->model, &o, err));
    }
    if (j->thin && !j->repair) {
        const moec_thin_opts o = {.max_memory = j->common->max_memory};
        MOEC_TRY(moec_thin_estimate(out, j->plan, j->model, &o, err));
    }
    if (j->factor) {
        moec_factor_opts o = *j->factor;
        o.max_memory = j->common->max_memory;
        MOEC_TRY(moec_factoring_estimate(out, j->plan, j->model, &o, err));
    }
    if (j->quantize) {
        moec_quantize_opts o = *j->quantize;
        o.max_memory = j->common->max_memory;
        MOEC_TRY(moec_quantizing_estimate(out, j->plan, j->model, &o, err));
    }
    if (j->thin || j->factor || j->quantize)
        snprintf(j->plan->weights, sizeof j->plan->weights, "not made by a dry run");
done:
    return st;
}

moec_status tool_carry_out(const tool_job *job, moec_err *err)
{
    moec_status st = MOEC_OK;
    tool_job mine = *job;
    const tool_job *j = &mine;
    moec_quantizing *rounded = NULL;
    moec_quantize_report rounding;
    moec_apply_result r = {0};
    moec_repair *fixed = NULL;
    moec_thin *thinned = NULL;
    moec_factoring *factored = NULL;
    moec_thin_tally thin_tally = {0};
    moec_work_cost cost = {0};
    moec_apply_options opt = {.out = j->output, .fingerprint = j->fingerprint, .overwrite = j->common->overwrite,
                              .resume = j->common->resume, .max_memory = j->common->max_memory, .weights = j->weights};
    MOEC_TRY(check_clients(j, err));
    say_policy(j->plan, !j->repair && !moec_plan_rewrites(j->plan), j->repair);
    if (j->repair && !j->common->dry_run) {
        MOEC_TRY(repair(&fixed, j, err));
        opt.weights = j->plan->weights[0] ? moec_repair_weights(fixed) : NULL;
        if (j->thin)
            thin_tally.unseen = moec_thin_unseen(j->plan, j->thin, j->request);
    }
    if (j->common->dry_run)
        MOEC_TRY(estimate_work(&cost, j, err));
    if (j->factor && !j->common->dry_run) {
        MOEC_TRY(factor(&factored, j, err));
        opt.weights = moec_factoring_weights(factored);
    }
    if (j->quantize && !j->common->dry_run) {
        MOEC_TRY(quantize(&rounded, j, err));
        opt.weights = moec_quantizing_weights(rounded);
        rounding = moec_quantizing_report(rounded);
        mine.quantized = &rounding;
    }
    if (j->thin && !j->repair && !j->common->dry_run) {
        MOEC_TRY(thin(&thinned, j, err));
        opt.weights = moec_thin_weights(thinned);
        thin_tally = moec_thin_count(thinned);
    }
    if (j->plan_only && !j->common->dry_run) {
        if ((fixed || thinned || factored || rounded) && j->plan->weights[0])
            MOEC_TRY(tool_weights_keep(fixed, thinned, factored, rounded, j->output, err));
        st = write_plan(j, j->thin ? &thin_tally : NULL, err);
        goto done;
    }
    if (j->common->dry_run) {
        if (moec_plan_even(j->plan) || j->plan->pad > 0 || j->plan->mapped)
            MOEC_TRY(moec_apply_estimate(&r, j->model, j->plan, &opt, err));
    } else if (!j->output) {
        st = moec_fail(err, MOEC_EINVAL, "-o OUT is missing: the folder to write");
        goto done;
    } else {
        MOEC_TRY(moec_apply(&r, j->model, j->plan, &opt, err));
    }
    MOEC_TRY(report(j, &r, j->thin && !j->common->dry_run ? &thin_tally : NULL, &cost, err));
done:
    moec_repair_close(fixed, st == MOEC_OK && !(j->plan_only && j->plan->weights[0]));
    moec_thin_close(thinned, st == MOEC_OK && !j->plan_only);
    moec_factoring_close(factored, st == MOEC_OK && !j->plan_only);
    moec_quantizing_close(rounded, st == MOEC_OK && !j->plan_only);
    return st;
}
