/* families: which model families are read, what is particular about them, and which programs load what is written. */
#include "tool.h"

#include <stdio.h>
#include <string.h>

typedef struct families_params {
    tool_common common;
    bool markdown;
} families_params;

static const moec_opt rows[] = {
    {.name = "markdown", MOEC_FLAG(families_params, markdown), .help = "print the table as Markdown, as it is in README.md"},
    TOOL_COMMON_ROWS(families_params),
    TOOL_END_ROW,
};

enum { TEXT = TOOL_ROUTING };

static void add(char text[TEXT], const char *sep, const char *word)
{
    size_t n = strlen(text);
    snprintf(text + n, TEXT - n, "%s%s", n ? sep : "", word);
}

static void attention_text(char text[TEXT], const moec_family *f)
{
    static const char *const mixers[] = {
        [MOEC_MIXER_ATTENTION] = "grouped-query", [MOEC_MIXER_LATENT] = "latent (MLA)",
        [MOEC_MIXER_CONV] = "grouped-query and short convolution", [MOEC_MIXER_DELTA] = "grouped-query and gated delta net",
        [MOEC_MIXER_HEADS] = "attention experts"};
    text[0] = '\0';
    add(text, ", ", mixers[f->mixer]);
    if (f->window == MOEC_WINDOW_CHUNK)
        add(text, ", ", "chunked");
    else if (f->window != MOEC_WINDOW_NONE)
        add(text, ", ", "sliding");
    if (f->vec[MOEC_VEC_SINKS])
        add(text, ", ", "sinks");
    if (f->gate_in_q || f->mat[MOEC_MAT_ATTN_GATE])
        add(text, ", ", "output gate");
}

void tool_routing_text(char text[TOOL_ROUTING], const moec_family *f)
{
    static const char *const scores[] = {[MOEC_SCORE_SOFTMAX] = "softmax", [MOEC_SCORE_SIGMOID] = "sigmoid",
                                         [MOEC_SCORE_RELU] = "ReLU"};
    static const char *const choices[] = {
        [MOEC_CHOOSE_TOP_K] = "top-k", [MOEC_CHOOSE_TOP_K_SOFTMAX] = "top-k, then softmax", [MOEC_CHOOSE_TOP_P] = "top-p",
        [MOEC_CHOOSE_POSITIVE] = "all above 0", [MOEC_CHOOSE_SPARSEMIXER] = "sparsemixer"};
    text[0] = '\0';
    if (f->choice != MOEC_CHOOSE_TOP_K_SOFTMAX && f->choice != MOEC_CHOOSE_SPARSEMIXER)
        add(text, ", ", scores[f->score]);
    add(text, ", ", choices[f->choice]);
    if (f->vec[MOEC_VEC_SELECTION_BIAS])
        add(text, ", ", "selection bias");
    if (f->mat[MOEC_MAT_ROUTER_MAP])
        add(text, ", ", "logits of the layer before");
    if (f->mat[MOEC_MAT_ROUTER_NULL])
        add(text, ", ", "null experts");
    if (f->n_tail > 0)
        add(text, ", ", "zero, copy and constant experts");
}

/* That, and what only some models of a family have. */
static void routing_text(char text[TEXT], const moec_family *f)
{
    tool_routing_text(text, f);
    if (f->group != MOEC_GROUP_NONE)
        add(text, ", ", "groups");
    if (f->mat[MOEC_MAT_SHARED_DOWN])
        add(text, ", ", f->mat[MOEC_MAT_SHARED_MIX] ? "gated shared expert" : "shared experts");
}

static const char *type_text(char text[TEXT], const moec_family *f, const char *quote)
{
    char one[TEXT];
    text[0] = '\0';
    snprintf(one, sizeof one, "%s%s%s", quote, f->detect ? f->detect : f->model_type, quote);
    add(text, ", ", one);
    for (size_t i = 0; i < MOEC_COUNT(f->alias) && f->alias[i]; i++) {
        snprintf(one, sizeof one, "%s%s%s", quote, f->alias[i], quote);
        add(text, ", ", one);
    }
    if (f->detect)
        add(text, " ", "(key)");
    return text;
}

static const char *clients_text(char text[TEXT], const moec_family *f)
{
    text[0] = '\0';
    if (f->loads_transformers || f->remote_code)
        add(text, ", ", f->loads_transformers ? "transformers" : "transformers with the model's own code");
    if (f->loads_vllm)
        add(text, ", ", "vLLM");
    if (f->loads_sglang)
        add(text, ", ", "SGLang");
    if (f->loads_llama_cpp)
        add(text, ", ", f->gguf.arch ? "llama.cpp (GGUF written)" : "llama.cpp");
    return text;
}

static const char *loads(bool yes)
{
    return yes ? "yes" : "no";
}

static void print_markdown(void)
{
    const moec_family *f;
    char type[TEXT], attention[TEXT], routing[TEXT];
    printf("| models | `model_type` | attention | routing | read, calibrated, pruned | transformers | vLLM | SGLang | llama.cpp | GGUF written |\n"
           "|---|---|---|---|---|---|---|---|---|---|\n");
    for (int i = 0; (f = moec_family_at(i)) != NULL; i++) {
        attention_text(attention, f);
        routing_text(routing, f);
        printf("| %s | %s | %s | %s | yes | %s | %s | %s | %s | %s |\n", f->models, type_text(type, f, "`"), attention, routing,
               f->loads_transformers ? "yes" : f->remote_code ? "own code" : "no", loads(f->loads_vllm),
               loads(f->loads_sglang), loads(f->loads_llama_cpp), f->gguf.arch ? f->gguf.arch : "no");
    }
}

static moec_json *to_json(void)
{
    moec_json *all = moec_json_new_array(), *aliases;
    const moec_family *f;
    char text[TEXT];
    for (int i = 0; (f = moec_family_at(i)) != NULL; i++) {
        moec_json *o = moec_json_new_object(), *clients = moec_json_new_object();
        moec_json_set(o, "model_type", moec_json_new_string(f->model_type));
        moec_json_set(o, "architecture", moec_json_new_string(f->architecture));
        moec_json_set(o, "models", moec_json_new_string(f->models));
        moec_json_set(o, "aliases", aliases = moec_json_new_array());
        for (size_t k = 0; k < MOEC_COUNT(f->alias) && f->alias[k]; k++)
            moec_json_push(aliases, moec_json_new_string(f->alias[k]));
        if (f->detect)
            moec_json_set(o, "known_by_key", moec_json_new_string(f->detect));
        attention_text(text, f);
        moec_json_set(o, "attention", moec_json_new_string(text));
        routing_text(text, f);
        moec_json_set(o, "routing", moec_json_new_string(text));
        moec_json_set(o, "source", moec_json_new_string(f->source));
        moec_json_set(clients, "transformers", moec_json_new_bool(f->loads_transformers));
        moec_json_set(clients, "vllm", moec_json_new_bool(f->loads_vllm));
        moec_json_set(clients, "sglang", moec_json_new_bool(f->loads_sglang));
        moec_json_set(clients, "llama.cpp", moec_json_new_bool(f->loads_llama_cpp));
        moec_json_set(o, "own_code", moec_json_new_bool(f->remote_code));
        moec_json_set(o, "clients", clients);
        moec_json_set(o, "gguf", f->gguf.arch ? moec_json_new_string(f->gguf.arch) : moec_json_new_null());
        moec_json_push(all, o);
    }
    return all;
}

static void print_list(void)
{
    const moec_family *f;
    char type[TEXT], attention[TEXT], routing[TEXT], clients[TEXT];
    for (int i = 0; (f = moec_family_at(i)) != NULL; i++) {
        attention_text(attention, f);
        routing_text(routing, f);
        printf("%s%s  (%s)\n  attention  %s\n  routing    %s\n  loaded by  %s\n", i ? "\n" : "", type_text(type, f, ""), f->models,
               attention, routing, clients_text(clients, f));
    }
}

static int run(const moec_verb *verb, int argc, char **argv)
{
    families_params params;
    moec_opt_list words;
    int code;
    if (!tool_begin(&code, &params, &words, verb, argc, argv))
        return code;
    moec_err err = {MOEC_OK, ""};
    moec_status st = MOEC_OK;
    if (params.common.json)
        st = tool_print_json(to_json(), &err);
    else if (params.markdown)
        print_markdown();
    else
        print_list();
    return tool_end(st, &err);
}

const moec_verb moec_verb_families = {
    .name = "families",
    .args = "[options]",
    .brief = "the model families that are read, and which programs load them",
    .about = "Lists the model families: how their configs name them, how they attend and route, and which programs load a "
             "compressed model of each.",
    .examples = "moecompress families\n"
                "moecompress families --json",
    .opts = rows,
    .min_args = 0,
    .max_args = 0,
    .run = run,
};
