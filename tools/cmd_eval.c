/* eval: how good a model is on text, and how far it is from the model it was made from. */
#include "output_weights.h"
#include "tool_text.h"

#include <math.h>

typedef struct eval_params {
    tool_common common;
    tool_text input;
    const char *base, *reference, *save_reference, *plan;
    int64_t top_k, bits;
    double mass;
} eval_params;

static const moec_opt rows[] = {
    TOOL_TEXT_ROWS(eval_params),
    {"base", 'b', MOEC_TEXT(eval_params, base), .value = "DIR",
     .help = "the original: adds KL divergence and top-1 agreement"},
    {"reference", 0, MOEC_TEXT(eval_params, reference), .value = "FILE",
     .help = "what --save-reference kept of the original, in place of --base"},
    {"save-reference", 0, MOEC_TEXT(eval_params, save_reference), .value = "FILE",
     .help = "keep MODEL's final hidden states and head, exact, for later --reference"},
    {"plan", 0, MOEC_TEXT(eval_params, plan), .value = "FILE",
     .help = "measure what a plan (--plan-only of prune, merge, factor and quantize) would make of MODEL, without writing it"},
    {"top-k", 0, MOEC_INT(eval_params, top_k), .fallback = "0", .lo = 0, .hi = 65535, .value = "N",
     .help = "measure MODEL with N experts a token instead of its own number; 0: its own"},
    {"read-bits", 0, MOEC_INT(eval_params, bits), .fallback = "0", .lo = 0, .hi = 8, .value = "N",
     .help = "measure a nested MODEL (quantize --format nested) as it is when only the first N bits of each matrix are read; 0: all"},
    {"expert-mass", 0, MOEC_SHARE(eval_params, mass), .fallback = "0", .lo = 0, .hi = 1, .value = "SHARE",
     .help = "measure MODEL when each token uses only the fewest of its experts that hold this share of their weights"},
    TOOL_COMPUTE_ROW(eval_params, "f32"),
    TOOL_MEMORY_ROW(eval_params),
    TOOL_COMMON_ROWS(eval_params),
    TOOL_END_ROW,
};

static void print_sum(const char *name, const moec_score_sum *s, bool has_base)
{
    char shown[17];
    snprintf(shown, sizeof shown, "%s", name);
    moec_plain_line(shown);
    printf("%-16s %9llu  %8.4f +- %.4f  %10.3f", shown, (unsigned long long)s->tokens, s->cross_entropy,
           s->cross_entropy_se, exp(s->cross_entropy));
    if (has_base)
        printf("  %8.5f +- %.5f  %6.2f%% +- %.2f", s->kl, s->kl_se, 100.0 * s->top1, 100.0 * s->top1_se);
    printf("\n");
}

static void print_table(const moec_scores *s, const moec_corpus *corpus)
{
    printf("%-16s %9s  %18s  %10s%s\n", "text", "tokens", "cross-entropy", "perplexity",
           s->has_base ? "     KL to the base        top-1 the same" : "");
    for (int i = 0; i < corpus->n_domains && corpus->n_domains > 1; i++)
        print_sum(corpus->domain[i].name, &s->domain[i], s->has_base);
    print_sum("overall", &s->overall, s->has_base);
}

static moec_status print_result(const eval_params *p, const char *model, const moec_scores *s, const moec_corpus *corpus,
                                double began, moec_err *err)
{
    if (!p->common.json) {
        print_table(s, corpus);
        return MOEC_OK;
    }
    moec_json *o = moec_scores_json(s, corpus);
    moec_json_set(o, "model", moec_json_new_string(model));
    if (s->has_base)
        moec_json_set(o, "base", moec_json_new_string(p->base ? p->base : p->reference ? p->reference : model));
    if (p->plan)
        moec_json_set(o, "plan", moec_json_new_string(p->plan));
    if (p->top_k > 0)
        moec_json_set(o, "top_k", moec_json_new_int(p->top_k));
    if (p->bits > 0)
        moec_json_set(o, "read_bits", moec_json_new_int(p->bits));
    if (p->mass > 0.0)
        moec_json_set(o, "expert_mass", moec_json_new_real(p->mass));
    moec_json_set(o, "seq_len", moec_json_new_int(p->input.seq_len));
    moec_json_set(o, "compute", moec_json_new_string(tool_compute_names[p->input.compute]));
    moec_json_set(o, "seconds", moec_json_new_real(moec_now() - began));
    moec_json_set(o, "peak_memory_bytes", moec_json_new_int((int64_t)moec_peak_memory()));
    return tool_print_json(o, err);
}

/* The model that is measured: MODEL itself, or what a plan or fewer experts a token would make of it. */
typedef struct subject {
    moec_plan *plan;
    moec_override *weights;
    moec_preview preview;
} subject;

static moec_status plan_of(moec_plan **out, const eval_params *p, const moec_model *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_digest print;
    if (!p->plan)
        return moec_plan_whole(out, m, err);
    MOEC_TRY(moec_plan_read(out, p->plan, err));
    MOEC_TRY(moec_ckpt_fingerprint(&print, m->ckpt, err));
    MOEC_TRY(moec_within(err, moec_plan_check_shape(*out, m, print.hex, err), "%s", p->plan));
done:
    return st;
}

static moec_status choose(subject *s, const moec_model **out, const eval_params *p, const moec_model *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    *out = m;
    if (!p->plan && p->top_k == 0 && !(p->mass > 0.0))
        return MOEC_OK;
    MOEC_TRY(plan_of(&s->plan, p, m, err));
    if (p->top_k > 0)
        MOEC_TRY(moec_plan_set_top_k(s->plan, m, p->top_k, err));
    if (p->plan)
        MOEC_TRY(tool_weights_open(&s->weights, s->plan, p->plan, err));
    MOEC_TRY(moec_preview_new(&s->preview, m, s->plan, s->weights, err));
    if (p->mass > 0.0)
        moec_variant_keep_mass(s->preview.variant, p->mass);
    *out = &s->preview.variant->model;
done:
    return st;
}

static void release_subject(subject *s)
{
    moec_preview_release(&s->preview);
    moec_override_close(s->weights);
    moec_plan_free(s->plan);
}

static moec_status evaluate(const eval_params *p, const char *dir, moec_err *err)
{
    moec_status st = MOEC_OK;
    double began = moec_now();
    moec_model *model = NULL, *base = NULL;
    const moec_model *measured;
    subject what = {.plan = NULL};
    moec_corpus corpus = {0};
    moec_final *mine = NULL, *theirs = NULL;
    moec_scores scores = {0};
    moec_compute mode = (moec_compute)p->input.compute;
    if (p->save_reference) /* said now, not after hours */
        MOEC_TRY(tool_may_write(p->save_reference, TOOL_FILE_REFERENCE, false, err));
    MOEC_TRY(moec_model_open(&model, dir, err));
    if (p->bits > 0)
        MOEC_TRY(moec_within(err, moec_model_read_bits(model, (int)p->bits, err), "--read-bits"));
    const bool made = p->plan || p->top_k > 0 || p->mass > 0.0; /* the original is at hand */
    const char *base_dir = p->base ? p->base : made && !p->reference ? dir : NULL;
    if (made && p->save_reference)
        MOEC_TRY(moec_fail(err, MOEC_EINVAL, "--save-reference keeps MODEL's own states; it does not go with --plan, --top-k or "
                           "--expert-mass"));
    if (base_dir)
        MOEC_TRY(moec_model_open(&base, base_dir, err));
    if (base && base->dims.vocab != model->dims.vocab)
        MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "%s: vocabulary of %lld ids, %s has %lld", dir, (long long)model->dims.vocab,
                           base_dir, (long long)base->dims.vocab));
    MOEC_TRY(choose(&what, &measured, p, model, err));
    MOEC_TRY(tool_read_text(&corpus, &p->input, model, -1, err));
    if (p->reference)
        MOEC_TRY(moec_final_load(&theirs, &corpus, p->reference, err));
    if (theirs && moec_final_vocab(theirs) != model->dims.vocab)
        MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "%s: vocabulary of %lld ids, %s has %lld", dir, (long long)model->dims.vocab,
                           p->reference, (long long)moec_final_vocab(theirs)));
    if (base)
        MOEC_TRY(moec_final_run_before(&theirs, measured, base, &corpus, mode, p->common.max_memory, "base model", err));
    MOEC_TRY(moec_final_run(&mine, measured, &corpus, mode, p->common.max_memory, "model", err));
    MOEC_TRY(moec_ckpt_unchanged(model->ckpt, err));
    MOEC_TRY(moec_score(&scores, mine, theirs, &corpus, mode, p->common.max_memory, err));
    if (p->save_reference)
        MOEC_TRY(moec_final_save(mine, &corpus, p->save_reference, err));
    st = print_result(p, dir, &scores, &corpus, began, err);
done:
    moec_scores_release(&scores);
    moec_final_free(theirs);
    moec_final_free(mine);
    moec_corpus_release(&corpus);
    release_subject(&what);
    moec_model_close(base);
    moec_model_close(model);
    return st;
}

static int run(const moec_verb *verb, int argc, char **argv)
{
    eval_params p;
    moec_opt_list words;
    int code;
    if (!tool_begin(&code, &p, &words, verb, argc, argv))
        return code;
    moec_err err = {MOEC_OK, ""};
    moec_status st = p.base && p.reference ? moec_fail(&err, MOEC_EINVAL, "--base and --reference exclude each other")
                                           : evaluate(&p, words.at[0], &err);
    return tool_end(st, &err);
}

const moec_verb moec_verb_eval = {
    .name = "eval",
    .args = "MODEL --text FILE... [--base DIR]",
    .brief = "perplexity, and KL divergence and top-1 agreement with the original",
    .about = "Runs MODEL over text, layer by layer, and prints cross-entropy (nats) and perplexity for each text and over all. "
             "Each file is one stream of tokens, cut into windows of --seq-len that do not overlap; the first token of a "
             "window is not scored. Standard errors take windows, not tokens, as independent.\n"
             "With --base the original is run as well and compared at every position: KL(base || model) in nats and the share "
             "of positions with the same most likely token. An original that will be deleted can be kept as a reference file.\n"
             "--plan, --top-k and --expert-mass measure what MODEL would become, without writing it, and compare with MODEL where no other base is given.",
    .examples = "moecompress eval small --base original --text held-out.txt\n"
                "moecompress eval original --text wiki=a.txt code=b.txt --seq-len 2048 --save-reference original.ref\n"
                "moecompress eval original --plan plan.json --base original --text held-out.txt\n"
                "moecompress eval original --top-k 4 --base original --text held-out.txt\n"
                "moecompress eval small --reference original.ref --text wiki=a.txt code=b.txt --seq-len 2048 --json",
    .opts = rows,
    .min_args = 1,
    .max_args = 1,
    .run = run,
};
