/* How every verb begins and ends. */
#include "tool.h"

#include <string.h>

static bool asks_for_help(int argc, char **argv)
{
    for (int i = 1; i < argc && strcmp(argv[i], "--") != 0; i++)
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0)
            return true;
    return false;
}

bool tool_begin(int *exit_code, void *params, moec_opt_list *words, const moec_verb *verb, int argc, char **argv)
{
    *exit_code = 0;
    if (asks_for_help(argc, argv)) {
        moec_opt_help(stdout, verb);
        return false;
    }
    moec_err err = {MOEC_OK, ""};
    moec_status st = moec_opt_parse(params, words, verb, argc, argv, &err);
    const tool_common *common = params;
    if (st == MOEC_OK && common->quiet && common->verbose)
        st = moec_fail(&err, MOEC_EINVAL, "--quiet and --verbose exclude each other");
    if (st != MOEC_OK) {
        *exit_code = tool_end(st, &err);
        return false;
    }
    moec_par_set_threads((int)common->threads);
    moec_log_set(common->quiet ? MOEC_QUIET : common->verbose ? MOEC_VERBOSE : MOEC_NORMAL);
    moec_catch_signals();
    return true;
}

int tool_end(moec_status st, const moec_err *err)
{
    if (st != MOEC_OK)
        fprintf(stderr, "moecompress: error: %s\n", err->text[0] ? err->text : "failed without a reason");
    return moec_exit_code(st);
}

int tool_fail(const moec_err *err)
{
    return tool_end(err->code == MOEC_OK ? MOEC_EIO : err->code, err);
}

moec_status tool_print_json(moec_json *v, moec_err *err)
{
    char *text;
    moec_status st = moec_json_dump(&text, v, 2, err);
    if (st == MOEC_OK)
        printf("%s\n", text);
    moec_free(text);
    moec_json_free(v);
    return st;
}
