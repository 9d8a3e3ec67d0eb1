/* The table of verbs, and what belongs to no verb: usage, help, version, man page, completion, the last write error. */
#include "tool.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

static const moec_verb *const verbs[] = {
    &moec_verb_inspect,
    &moec_verb_calibrate,
    &moec_verb_prune,
    &moec_verb_merge,
    &moec_verb_factor,
    &moec_verb_quantize,
    &moec_verb_convert,
    &moec_verb_eval,
    &moec_verb_apply,
    &moec_verb_stats,
    &moec_verb_verify,
    &moec_verb_families,
    NULL,
};

static void print_usage(FILE *to)
{
    fprintf(to, "usage: moecompress VERB [words] [options]\n\n"
                "Compresses Mixture-of-Experts language models on one small machine: observes how the routers of a model\n"
                "behave on text, plans what can go, and writes a smaller model that the same programs load.\n\n"
                "verbs:\n");
    for (size_t i = 0; verbs[i]; i++)
        fprintf(to, "  %-11s %s\n", verbs[i]->name, verbs[i]->brief);
    fprintf(to, "  %-11s %s\n", "help", "print this text, or the help of a verb: help VERB");
    fprintf(to, "\n`moecompress man` prints the manual page, `moecompress completion bash` the shell completion.\n\n");
    fprintf(to, "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 bad input, 4 does not fit, 5 interrupted (resumable).\n"
                "Results go to standard output, messages and progress to standard error.\n");
}

static const moec_verb *find_verb(const char *name)
{
    for (size_t i = 0; verbs[i]; i++)
        if (strcmp(verbs[i]->name, name) == 0)
            return verbs[i];
    return NULL;
}

static int no_verb(const char *word)
{
    const char *names[MOEC_COUNT(verbs) + 1];
    size_t n = 0;
    moec_err err;
    for (; verbs[n]; n++)
        names[n] = verbs[n]->name;
    names[n++] = "help";
    const char *near = moec_word_nearest(word, names, n);
    moec_status st = near ? moec_fail(&err, MOEC_EINVAL, "no verb '%s'; did you mean %s?", word, near)
                          : moec_fail(&err, MOEC_EINVAL, "no verb '%s'; see moecompress --help", word);
    return tool_end(st, &err);
}

static int help(int argc, char **argv)
{
    if (argc < 3) {
        print_usage(stdout);
        return 0;
    }
    const moec_verb *verb = find_verb(argv[2]);
    if (!verb)
        return no_verb(argv[2]);
    moec_opt_help(stdout, verb);
    return 0;
}

static int completion(int argc, char **argv)
{
    moec_err err;
    if (argc != 3 || strcmp(argv[2], "bash") != 0)
        return tool_end(moec_fail(&err, MOEC_EINVAL, "completion: there is one for bash only: moecompress completion bash"),
                        &err);
    moec_opt_bash(stdout, verbs);
    return 0;
}

static int dispatch(int argc, char **argv)
{
    const char *word = argv[1];
    if (strcmp(word, "help") == 0 || strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0)
        return help(argc, argv);
    if (strcmp(word, "--version") == 0) {
        printf("moecompress %s\n", moec_version());
        return 0;
    }
    if (strcmp(word, "man") == 0) {
        moec_opt_man(stdout, verbs);
        return 0;
    }
    if (strcmp(word, "completion") == 0)
        return completion(argc, argv);
    const moec_verb *verb = find_verb(word);
    return verb ? verb->run(verb, argc - 1, argv + 1) : no_verb(word);
}

/* A mapped file that another program cuts short, or a disk that cannot be read. */
static void on_bus_error(int sig)
{
    static const char text[] = "\nmoecompress: error: a file was cut short or could not be read while it was in use\n";
    ssize_t n = write(STDERR_FILENO, text, sizeof text - 1);
    (void)sig;
    (void)n;
    _exit(moec_exit_code(MOEC_EIO));
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        print_usage(stderr);
        return 2;
    }
    signal(SIGBUS, on_bus_error);
    signal(SIGXFSZ, SIG_IGN); /* a file over `ulimit -f` is an error like a full disk, not a death */
    int code = dispatch(argc, argv);
    /* A full disk shows only when the last buffer is written. */
    errno = 0;
    if (fflush(stdout) != 0 || ferror(stdout)) {
        moec_err err;
        moec_status st = moec_fail_errno(&err, errno ? errno : EIO, "standard output");
        return code ? code : tool_end(st, &err);
    }
    return code;
}
