/* merge: experts become fewer by merging, layer by layer. */
#include "output.h"
#include "prune_repair.h"
#include "sources.h"

#include <string.h>

typedef struct merge_params {
    tool_common common;
    const char *output, *stats, *protect, *method, *compat;
    double remove;
    int64_t keep, least, pad, together;
    int mtp, groups, dtype, allocation, emit;
    moec_opt_list set;
    bool plan_only, methods;
    tool_repair_params repair;
} merge_params;

static const char *const policies[] = {"keep", "drop", NULL};
static const char *const allocations[] = {"uniform", "global", "mass", "loss", NULL}; /* as moec_allocation counts */
static const char *const emissions[] = {"native", "tied", "map", NULL};
enum { TIED = 1, MAP };

enum { LAYERS_TOGETHER = 2 };

static const moec_opt rows[] = {
    {"output", 'o', MOEC_TEXT(merge_params, output), .value = "OUT",
     .help = "folder to write; with --plan-only the plan file, its weights go beside it"},
    {"method", 0, MOEC_TEXT(merge_params, method), .value = "NAME",
     .help = "settings to begin with (--methods lists them); adaptive by default, which merges only where that helps"},
    {"set", 0, MOEC_LIST(merge_params, set), .value = "KEY=VALUE",
     .help = "another value for a setting of the method, such as align=canonical or weights=gate-sq (--methods lists all)"},
    {"remove", 0, MOEC_SHARE(merge_params, remove), .lo = 0, .hi = 1, .fallback = "0", .value = "SHARE",
     .help = "share by which each layer gets fewer experts, such as 25% or 0.25, rounded down"},
    {"keep", 0, MOEC_INT(merge_params, keep), .lo = 1, .hi = 65535, .fallback = "0", .value = "N",
     .help = "experts that each layer has afterwards, instead of --remove"},
    {"protect", 0, MOEC_TEXT(merge_params, protect), .value = "FILE|super",
     .help = "experts that stay as they are: a file of lines 'LAYER EXPERT' or JSON {\"LAYER\": [experts]}, or super (needs --stats)"},
    {"emit", 0, MOEC_CHOICE(merge_params, emit), .choices = emissions, .fallback = "native", .value = "native|tied|map",
     .help = "native: as many experts and router rows as groups, which every client loads. tied: the original router and a copy of "
             "its group's expert for every old one, as most papers measure it; that is not smaller. map: the same function, small: the "
             "groups' experts, the original router and a table from its rows to them, which transformers 5 runs by a Python file "
             "(trust_remote_code) and no other client does"},
    {"stats", 0, MOEC_TEXT(merge_params, stats), .value = "FILE",
     .help = "statistics that calibrate wrote; for --allocation global and mass and --protect super only"},
    {"allocation", 0, MOEC_CHOICE(merge_params, allocation), .choices = allocations, .fallback = "uniform",
     .value = "uniform|global|mass|loss",
     .help = "experts of each layer: the same number; by frequency out of one pool of all layers (M-SMoE); as many as hold the same "
             "mass of it; loss: two layers in a row share theirs so that their groupings lose least together (Sub-MoE), which "
             "takes one more pass over the text. Unequal layers load in no client unless they can be padded or --emit map is given; "
             "--plan-only and eval --plan measure them"},
    {"allocation-layers", 0, MOEC_INT(merge_params, together), .lo = 0, .hi = 65535, .fallback = "0", .value = "N",
     .help = "loss: layers in a row that share their experts; 0: 2, as in the paper; 1 is uniform"},
    {"min-experts", 0, MOEC_INT(merge_params, least), .lo = 0, .hi = 65535, .fallback = "0", .value = "N",
     .help = "global, mass, loss: experts that each layer has at least; 0: top-k, and for mass 4"},
    {"groups", 0, MOEC_CHOICE(merge_params, groups), .choices = policies, .fallback = "keep", .value = "keep|drop",
     .help = "where the router chooses among groups of experts (DeepSeek): merge inside them, or drop the groups"},
    {"mtp", 0, MOEC_CHOICE(merge_params, mtp), .choices = policies, .fallback = "keep", .value = "keep|drop",
     .help = "multi-token-prediction layers, which are not run: keep as many of their experts, or leave them out"},
    {"pad-to", 0, MOEC_INT(merge_params, pad), .lo = 0, .hi = 65535, .fallback = "0", .value = "N",
     .help = "write N experts a layer, dead ones behind the others; see prune --help"},
    TOOL_DTYPE_ROW(merge_params, "written; quantized sources need one"),
    TOOL_REPAIR_ROWS(merge_params, repair),
    TOOL_COMPAT_ROW(merge_params, compat),
    TOOL_PLAN_ONLY_ROW(merge_params, "and its weights, for apply and eval"),
    {"methods", 0, MOEC_FLAG(merge_params, methods), .help = "list the methods with their settings and leave"},
    TOOL_SEED_ROW(merge_params),
    TOOL_DRY_RUN_ROW(merge_params),
    TOOL_OVERWRITE_ROW(merge_params),
    TOOL_RESUME_ROW(merge_params),
    TOOL_MEMORY_ROW(merge_params),
    TOOL_COMMON_ROWS(merge_params),
    TOOL_END_ROW,
};

/* --- methods ----------------------------------------------------------------------------------------------------------- */

/* f_e(x): output of expert e, g_e: its gate, p_e: its full router score, z_e: its router logits over the tokens. */
static const struct {
    const char *key, *text;
} explained[] = {
    {"distance", "what makes two experts alike. logits: cosine of their router logits z; centred-logits: of z less the mean of all\n"
                 "experts; mean-output: distance of mean f; output-cosine: mean cosine of f; output: mean |f_i - f_j|^2; gated: cosine of\n"
                 "mean p f, and z; weights: distance of gate and up; router-rows: distance of the router's rows"},
    {"grouping", "nearest: the most salient experts are centres, each other one joins the nearest centre; pseudo: the same, one centre after\n"
                 "the other takes in its group-size - 1 nearest (REAM); average, ward, complete, single: hierarchical clustering of that\n"
                 "linkage; kmeans, spectral: clustering; pruning: the most salient stay and the others join nobody (with fill=segments)"},
    {"saliency", "which experts are centres. A sum over an expert's tokens of 1 (count: frequency), g, g^2 or g^2 |f|^2 (energy), or a mean\n"
                 "of g |f| (reap) or p^2 |f| (ream); equal: 1 for every expert that is selected at all"},
    {"weights", "how much each member counts in its group's average: the same kinds"},
    {"align", "order of neurons before averaging, by linear assignment. plain: on weights, as they are; canonical: on weights, up to the\n"
              "scale and sign that up and down can exchange; activations: on weights and what the neurons give"},
    {"fill", "the merged expert. average: weighted mean of its group; subspace: the same projected on the group's leading singular\n"
             "vectors (Sub-MoE); segments: neurons of pruned experts join the kept ones neuron by neuron (DERN)"},
    {"router", "a group's router row. keep: its centre's; mean, weighted: mean of its members', by the same weights; add: the centre's and\n"
               "shares of the others'; lse: fitted to log sum exp of the members' logits"},
    {"original", "on: groups are formed on what the original's layer sees; off: behind the layers that are merged already"},
    {"decide", "on: each group is merged or only pruned, whichever has the smaller error on held-out tokens"},
    {"group-size", "grouping=pseudo: members of a group, at most"},
    {"restarts", "grouping=kmeans, spectral: how often k-means begins anew; the best is taken"},
    {"rank", "fill=subspace: share of the singular vectors that stays; 1: all, which is the average"},
    {"whiten", "fill=subspace: on: singular vectors of the weights times the inputs' second moments"},
    {"alpha", "fill=segments, as are all below: a neuron joins a kept expert when its similarity is above this, else it is dropped"},
    {"segment-gate", "weight of the cosine of gate rows in that similarity; segment-up, segment-down likewise"},
    {"segment-canonical", "on: up and down are first scaled to equal norms, and their joint sign is free"},
    {"segment-response", "on: k-means begins at the neurons of largest response; off: at the kept expert's own"},
    {"segment-same-norm", "on: members of a cluster are scaled to its mean norm"},
    {"segment-sum-same-source", "on: down columns of members from one expert add up instead of being averaged"},
    {"segment-rounds", "of k-means, at most"},
};

/* Each setting's line of values, and below it what it is. */
static void print_settings(void)
{
    char list[2000];
    moec_merge_settings(list, sizeof list);
    printf("settings for --set (f: an expert's output for a token, g: its gate there, p: its router score, z: its router logits)\n");
    for (const char *line = list; *line; line += strcspn(line, "\n"), line += *line == '\n') {
        const size_t key = strcspn(line, "=");
        printf("%.*s\n", (int)strcspn(line, "\n"), line);
        for (size_t i = 0; i < sizeof explained / sizeof *explained; i++) {
            if (strlen(explained[i].key) != key || memcmp(explained[i].key, line, key) != 0)
                continue;
            for (const char *t = explained[i].text; *t; t += strcspn(t, "\n"), t += *t == '\n')
                printf("    %.*s\n", (int)strcspn(t, "\n"), t);
        }
    }
}

/* A method's settings as --set takes them. */
static void print_set(const moec_merge_recipe *r)
{
    char list[2000], key[40];
    moec_json *set = moec_merge_json(r);
    moec_merge_settings(list, sizeof list);
    printf("   ");
    for (const char *line = list; *line; line += strcspn(line, "\n"), line += *line == '\n') {
        bool on;
        double v;
        snprintf(key, sizeof key, "%.*s", (int)strcspn(line, "="), line);
        const moec_json *value = moec_json_get(set, key);
        if (!value || !moec_merge_applies(NULL, r, key))
            continue;
        if (moec_json_string(value))
            printf(" %s=%s", key, moec_json_string(value));
        else if (moec_json_bool(value, &on))
            printf(" %s=%s", key, on ? "on" : "off");
        else if (moec_json_real(value, &v))
            printf(" %s=%g", key, v);
    }
    printf("\n\n");
    moec_json_free(set);
}

static moec_status list_methods(const merge_params *p, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_method *m;
    moec_json *list = moec_json_new_array();
    for (size_t i = 0; (m = moec_method_at(i)) != NULL; i++) {
        if (m->kind != MOEC_MERGE)
            continue;
        if (p->common.json) {
            moec_json *o = moec_method_json(m);
            moec_json_set(o, "settings", moec_merge_json(m->row));
            moec_json_push(list, o);
            continue;
        }
        tool_print_method(m);
        print_set(m->row);
    }
    if (p->common.json) {
        st = tool_print_json(list, err);
        list = NULL;
    } else {
        print_settings();
    }
    moec_json_free(list);
    return st;
}

/* For --help. */
static const char *method_entry(const char **text, size_t i)
{
    return tool_method_entry(text, MOEC_MERGE, i);
}

/* --- the job ------------------------------------------------------------------------------------------------------------ */

static moec_status check_params(const merge_params *p, const moec_opt_list *words, moec_err *err)
{
    if (words->n < 1)
        return moec_fail(err, MOEC_EINVAL, "merge: MODEL is missing: the folder of the model");
    if (p->remove <= 0.0 && p->keep == 0)
        return moec_fail(err, MOEC_EINVAL, "merge: how much? give --remove 25%% or --keep N");
    if (p->remove > 0.0 && p->keep > 0)
        return moec_fail(err, MOEC_EINVAL, "merge: --remove and --keep say the same thing; give one");
    if (!p->output && !p->common.dry_run)
        return moec_fail(err, MOEC_EINVAL, "merge: -o OUT is missing: %s", p->plan_only ? "the plan file" : "the folder to write");
    if (p->together > 0 && p->allocation != MOEC_ALLOCATE_LOSS)
        return moec_fail(err, MOEC_EINVAL, "merge: --allocation-layers goes with --allocation loss");
    if (p->emit != 0 && p->repair.router == 1)
        return moec_fail(err, MOEC_EINVAL, "merge: --emit %s keeps the original router; leave --repair-router out", emissions[p->emit]);
    if (p->emit == MAP && p->pad > 0)
        return moec_fail(err, MOEC_EINVAL, "merge: --emit map needs no --pad-to: its layers may keep unequal numbers of experts");
    if (p->emit == TIED && p->repair.kind > 1)
        return moec_fail(err, MOEC_EINVAL, "merge: --emit tied goes with --repair none: fitted one by one, experts are no longer tied");
    if (p->repair.input.text.n == 0)
        return moec_fail(err, MOEC_EINVAL, "merge looks at what each layer does with tokens; give --text FILE");
    return MOEC_OK;
}

/* q->counts of --allocation loss. */
static moec_status count(int64_t **out, moec_request *q, moec_corpus *corpus, const merge_params *p, const moec_repair_opts *repair,
                         moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_repair_opts o = *repair; /* whose corpus is this one */
    o.max_memory = p->common.max_memory;
    o.seed = (uint64_t)p->common.seed;
    MOEC_TRY(tool_read_text(corpus, &p->repair.input, q->model, p->common.seed, err));
    MOEC_TRY(MOEC_NEW(*out, (size_t)q->model->moe_layers, err));
    MOEC_TRY(moec_merge_counts(*out, q->model, q, &o, err));
    q->counts = *out;
done:
    return st;
}

/* Every expert stays and shares its group's weights: as many groups as experts were to be kept. */
static moec_status tie(int64_t **groups, moec_plan *plan, moec_err *err)
{
    moec_status st = MOEC_NEW(*groups, (size_t)plan->n_layers, err);
    for (int64_t i = 0; st == MOEC_OK && i < plan->n_layers; i++)
        (*groups)[i] = plan->layer[i].n_keep;
    if (st == MOEC_OK)
        st = moec_plan_keep_all(plan, err);
    plan->new_top_k = plan->top_k;
    return st;
}

/* A setting that changes nothing is most likely meant for another value of one that does. */
static moec_status set_all(moec_merge_recipe *r, const moec_opt_list *set, moec_err *err)
{
    moec_status st = MOEC_OK;
    const char *of = NULL;
    for (int i = 0; i < set->n; i++)
        MOEC_TRY(moec_merge_set(r, set->at[i], err));
    for (int i = 0; i < set->n; i++)
        if (!moec_merge_applies(&of, r, set->at[i]))
            MOEC_TRY(moec_fail(err, MOEC_EINVAL, "--set %s: changes nothing here, it belongs to %s; leave it out or set that", set->at[i],
                               of));
done:
    return st;
}

/* The router stays, so every expert needs one to lead to, and a modelling file that does it. */
static moec_status check_map(moec_merge_recipe *r, const merge_params *p, const moec_model *m, moec_err *err)
{
    const char *why = moec_factor_refused(m);
    if (why)
        return moec_fail(err, MOEC_EINVAL, "--emit map: %s: %s; --emit native loads in every client, --emit tied is the same function",
                         m->family->model_type, why);
    if (r->grouping == MOEC_BY_PRUNING)
        return moec_fail(err, MOEC_EINVAL, "--emit map: %s prunes experts, whose rows of the router would lead nowhere; --emit native, or "
                         "another --method", p->method ? p->method : "grouping=pruning");
    if (r->decide) {
        moec_say("--emit map: every group is merged, none is only pruned (decide=off)");
        r->decide = false;
    }
    return MOEC_OK;
}

static moec_status merge(const merge_params *p, const char *dir, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_plan *plan = NULL;
    tool_sources o = {.stats_digest = {""}};
    const tool_source_names names = {.model = dir, .stats = p->stats, .protect = p->protect, .drop_mtp = p->mtp == 1};
    int64_t *tied = NULL, *counts = NULL;
    moec_corpus corpus = {0};
    const moec_method *me;
    const double began = moec_now();
    MOEC_TRY(moec_method_take(&me, MOEC_MERGE, MOEC_GRAIN_EXPERTS, p->method, err));
    moec_merge_recipe recipe = *(const moec_merge_recipe *)me->row;
    MOEC_TRY(set_all(&recipe, &p->set, err));
    moec_repair_opts repair = {.corpus = &corpus, .merge = &recipe};
    bool run_text;
    MOEC_TRY(tool_repair_check(&repair, &run_text, &p->repair, NULL, err));
    if (p->emit == TIED)
        repair.kind = MOEC_REPAIR_NONE;
    MOEC_TRY(tool_sources_open(&o, &names, err));
    MOEC_TRY(tool_is_folder(o.model, err));
    moec_request q = {.model = o.model, .fingerprint = o.print.hex, .stats = o.stats, .stats_digest = o.stats_digest.hex,
                            .guard = p->protect ? &o.guard : NULL, .guard_name = o.guard_name, .share = p->remove,
                            .keep = p->keep, .seed = p->common.seed, .drop_mtp = p->mtp == 1, .drop_groups = p->groups == 1,
                            .pad = p->pad, .allocation = (moec_allocation)p->allocation, .least = p->least,
                            .together = p->together > 0 ? p->together : LAYERS_TOGETHER,
                            .plan_only = p->plan_only || p->common.dry_run || p->emit != 0}; /* tied, all layers keep all */
    if (p->emit == MAP)
        MOEC_TRY(check_map(&recipe, p, o.model, err));
    tool_job job = {.common = &p->common, .model = o.model, .fingerprint = o.print.hex, .output = p->output, .compat = p->compat,
                    .plan_only = p->plan_only, .began = began, .repair = &repair};
    if (q.allocation == MOEC_ALLOCATE_LOSS)
        MOEC_TRY(count(&counts, &q, &corpus, p, &repair, err));
    MOEC_TRY(moec_method_plan(&plan, MOEC_MERGE, me->name, &q, err));
    MOEC_TRY(moec_plan_set_option(plan, "merge", moec_merge_json(&recipe), err));
    if (p->emit == MAP)
        MOEC_TRY(moec_plan_map(plan, err));
    if (p->emit == TIED) {
        MOEC_TRY(tie(&tied, plan, err));
        MOEC_TRY(moec_plan_set_option(plan, "emit", moec_json_new_string("tied"), err));
        repair.tied = tied;
    }
    plan->dtype = tool_dtype(p->dtype);
    if (corpus.n_domains == 0)
        MOEC_TRY(tool_read_text(&corpus, &p->repair.input, o.model, p->common.seed, err));
    if (recipe.decide && repair.kind == MOEC_REPAIR_NONE)
        moec_say("with --repair none nothing is tried out, so every removed expert is merged, whether that helps or not");
    if (p->common.dry_run && !p->common.json)
        moec_say("who is merged with whom is decided while the layers run");
    else if (p->common.dry_run)
        moec_warn("who is merged with whom is decided while the layers run: the experts listed here mean nothing, only how many");
    job.plan = plan;
    MOEC_TRY(tool_carry_out(&job, err));
done:
    moec_corpus_release(&corpus);
    moec_plan_free(plan);
    moec_free(tied);
    moec_free(counts);
    tool_sources_release(&o);
    return st;
}

static int run(const moec_verb *verb, int argc, char **argv)
{
    merge_params p;
    moec_opt_list words = {0};
    moec_err err = {MOEC_OK, ""};
    int rc;
    if (!tool_begin(&rc, &p, &words, verb, argc, argv))
        return rc;
    moec_status st = MOEC_OK;
    if (p.methods)
        return tool_end(list_methods(&p, &err), &err);
    MOEC_TRY(check_params(&p, &words, &err));
    MOEC_TRY(merge(&p, words.at[0], &err));
done:
    return tool_end(st, &err);
}

const moec_verb moec_verb_merge = {
    .name = "merge",
    .args = "MODEL --text FILE --remove SHARE -o OUT",
    .brief = "merge experts into fewer",
    .about = "Groups the experts of each layer by how alike they are, makes one expert of each group and writes the smaller model. A "
             "method is a row of settings: which distance, how groups are formed, with what weights experts are averaged, whether "
             "their neurons are aligned first, and what row the router gets; --set changes any of them. Then the merged experts are "
             "fitted so that each layer gives again what the original's gave (--repair ridge, the default; none is what the papers "
             "publish). Merging loses to pruning where experts have nothing in common, as in models whose experts were trained from "
             "scratch; it is worth having where they were copied from one dense network. The default method decides by held-out "
             "tokens, and prunes where merging does not help.",
    .examples = "moecompress merge Qwen3-30B-A3B --remove 25% -o Qwen3-22B-A3B --text calibration.txt\n"
                "moecompress merge Mixtral-8x7B --method m-smoe --keep 4 --set align=canonical weights=gate-sq -o Mixtral-4x7B --text "
                "calibration.txt\n"
                "moecompress merge Qwen3-30B-A3B --method dern --remove 50% --repair none --plan-only -o dern.json --text calibration.txt\n"
                "moecompress merge Qwen3-30B-A3B --method hc-smoe --remove 50% --repair none --emit tied --plan-only -o tied.json --text "
                "calibration.txt\n"
                "moecompress merge Qwen3-30B-A3B --method hc-smoe --remove 50% --emit map -o Qwen3-map --text calibration.txt",
    .opts = rows,
    .min_args = 0,
    .max_args = 1,
    .run = run,
    .entries = "methods (--methods also explains their settings)",
    .entry = method_entry,
};
