/* verify: re-opens an output and checks it against its source and against what each client demands. */
#include "tool.h"

#include <inttypes.h>

typedef struct verify_params {
    tool_common common;
} verify_params;

static const moec_opt rows[] = {
    TOOL_COMMON_ROWS(verify_params),
    TOOL_END_ROW,
};

/* Names in it come from a folder that anybody may have filled. */
static void print_problem(const char *text)
{
    char line[1024];
    snprintf(line, sizeof line, "%s", text);
    moec_plain_line(line);
    printf("problem: %s\n", line);
}

static void print_report(const moec_verify_report *r, const char *dir)
{
    char size[32];
    for (uint64_t i = 0; i < r->problems && i < MOEC_VERIFY_SHOWN; i++)
        print_problem(r->problem[i]);
    if (r->problems > MOEC_VERIFY_SHOWN)
        printf("problem: and %" PRIu64 " more\n", r->problems - MOEC_VERIFY_SHOWN);
    printf("%s: %s; %" PRIu64 " tensors, %s, %" PRIu64 " files, checked %s\n", dir,
           r->problems == 0 ? "good" : "not good", r->tensors, moec_size_text(size, sizeof size, r->bytes), r->files,
           r->against_source ? "byte by byte against the source" : "against its manifest");
    if (r->fitted > 0)
        printf("%" PRIu64 " of the tensors were computed anew: names and shapes against the source, bytes against the manifest's hashes\n",
               r->fitted);
    for (int i = 0; i < r->n_clients && r->problems == 0; i++)
        printf("%-14s %s: %s%s%s\n", r->client[i].name, r->client[i].loads ? "loads" : "does not load", r->client[i].reason,
               r->client[i].advice[0] ? "; but " : "", r->client[i].advice);
}

static void print_gguf(const moec_verify_gguf_report *r, const char *path)
{
    char size[32];
    for (uint64_t i = 0; i < r->problems && i < MOEC_VERIFY_GGUF_SHOWN; i++)
        print_problem(r->problem[i]);
    if (r->problems > MOEC_VERIFY_GGUF_SHOWN)
        printf("problem: and %" PRIu64 " more\n", r->problems - MOEC_VERIFY_GGUF_SHOWN);
    printf("%s: %s; %" PRIu64 " tensors, %s, %" PRIu64 " file%s\n", path, r->problems == 0 ? "good" : "not good", r->tensors,
           moec_size_text(size, sizeof size, r->bytes), r->files, tool_s((int64_t)r->files));
    if (!r->against_source)
        printf("checked: the container, and that %" PRIu64 " of %" PRIu64 " rows hold finite numbers; with SOURCE they are compared\n", r->rows,
               r->all_rows);
    else
        printf("checked against the source: names, shapes, %" PRIu64 " keys, and %" PRIu64 " of %" PRIu64 " rows decoded\n", r->keys, r->rows,
               r->all_rows);
    if (r->worst > 0.0)
        printf("largest error: %.0f %% of what its type is allowed, in %s\n", 100.0 * r->worst, r->worst_tensor);
}

/* The output is one GGUF, or a series. */
static moec_status verify_gguf(const verify_params *p, const char *path, const moec_model *source, double began, uint64_t *problems,
                               moec_err *err)
{
    moec_verify_gguf_report *r = NULL;
    moec_status st = moec_verify_gguf(&r, path, source, err);
    if (st != MOEC_OK)
        return st;
    *problems = r->problems;
    if (p->common.json) {
        moec_json *o = moec_verify_gguf_json(r);
        moec_json_set(o, "output", moec_json_new_string(path));
        moec_json_set(o, "seconds", moec_json_new_real(moec_now() - began));
        moec_json_set(o, "peak_memory_bytes", moec_json_new_int((int64_t)moec_peak_memory()));
        st = tool_print_json(o, err);
    } else {
        print_gguf(r, path);
    }
    moec_free(r);
    return st;
}

static moec_status verify(const verify_params *p, const moec_opt_list *words, uint64_t *problems, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_model *source = NULL;
    moec_verify_report *r = NULL;
    double began = moec_now();
    *problems = 0;
    if (words->n > 1)
        MOEC_TRY(moec_model_open(&source, words->at[1], err));
    if (moec_verify_gguf_is(words->at[0])) {
        st = verify_gguf(p, words->at[0], source, began, problems, err);
        goto done;
    }
    if (source)
        if (moec_ckpt_gguf(source->ckpt))
            MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "%s: a folder is not compared with a GGUF; eval %s --base %s measures how they differ",
                               words->at[1], words->at[0], words->at[1]));
    const moec_verify_options opt = {.source = source, .data = true};
    MOEC_TRY(moec_verify(&r, words->at[0], &opt, err));
    *problems = r->problems;
    if (p->common.json) {
        moec_json *o = moec_verify_json(r);
        moec_json_set(o, "output", moec_json_new_string(words->at[0]));
        moec_json_set(o, "seconds", moec_json_new_real(moec_now() - began));
        moec_json_set(o, "peak_memory_bytes", moec_json_new_int((int64_t)moec_peak_memory()));
        st = tool_print_json(o, err);
    } else {
        print_report(r, words->at[0]);
    }
done:
    moec_verify_free(r);
    moec_model_close(source);
    return st;
}

static int run(const moec_verb *verb, int argc, char **argv)
{
    verify_params p;
    moec_opt_list words = {0};
    moec_err err = {MOEC_OK, ""};
    uint64_t problems;
    int rc;
    if (!tool_begin(&rc, &p, &words, verb, argc, argv))
        return rc;
    moec_status st = verify(&p, &words, &problems, &err);
    if (st == MOEC_OK && problems > 0) /* the list itself is the result and went to standard output */
        st = moec_fail(&err, MOEC_EFORMAT, "%s: %" PRIu64 " problem%s", words.at[0], problems,
                       tool_s((int64_t)problems));
    return tool_end(st, &err);
}

const moec_verb moec_verb_verify = {
    .name = "verify",
    .args = "OUTPUT [SOURCE]",
    .brief = "check an output against its source and what each client demands",
    .about = "Re-opens the folder: every tensor's name, shape and dtype, every byte against the source (routers and stacked "
             "experts part by part), the index, config.json, the copied files and the hashes in moecompress.json; says which clients load it. Without "
             "SOURCE the manifest is what it is checked against. Of a GGUF: the container, names, shapes and keys, and sampled rows of every "
             "tensor, decoded, against the source. When anything is wrong the report is printed all the same and "
             "the exit code is 3.",
    .examples = "moecompress verify Qwen3-15B-A3B Qwen3-30B-A3B\n"
                "moecompress verify Qwen3-15B-A3B --json\n"
                "moecompress verify Qwen3-12G.gguf Qwen3-30B-A3B",
    .opts = rows,
    .min_args = 1,
    .max_args = 2,
    .run = run,
};
