/* The three ways in which people read option rows: --help, the man page, and a shell's completion. */
#include "base/opt.h"

#include "base/version.h"

#include <ctype.h>
#include <math.h>
#include <string.h>

enum { HELP_WIDTH = 96, HELP_COLUMN = 26 };

/* --- help --------------------------------------------------------------------------------------------------------- */

/* True where a new line begins: source texts are broken where it suits the source, so only a newline behind the end of a
 * sentence (or an empty line) means one. `p` is at the newline. */
static bool breaks(const char *text, const char *p)
{
    return p > text && strchr(".:;\n", p[-1]);
}

/* Words of `text` in lines of at most HELP_WIDTH columns, each behind `indent` spaces; the cursor is at column `at`. */
static void print_wrapped(FILE *to, const char *text, int indent, int at)
{
    const char *all = text;
    while (*text) {
        size_t word = strcspn(text, " \n");
        if (at > indent && at + 1 + (int)word > HELP_WIDTH) {
            fputc('\n', to);
            at = 0;
        }
        if (at < indent)
            at += fprintf(to, "%*s", indent - at, "");
        else if (at > indent)
            at += fprintf(to, " ");
        at += fprintf(to, "%.*s", (int)word, text);
        text += word;
        for (; *text == ' ' || *text == '\n'; text++)
            if (*text == '\n' && breaks(all, text)) {
                fputc('\n', to);
                at = 0;
            }
    }
    fputc('\n', to);
}

/* "-o, --output DIR" */
static void spell_option(char *buf, size_t cap, const moec_opt *row)
{
    char letter[8] = "";
    const char *value = row->value ? row->value : row->kind == MOEC_OPT_CHOICE ? "NAME" : "VALUE";
    bool on = row->kind == MOEC_OPT_FLAG && row->fallback && strcmp(row->fallback, "on") == 0;
    if (row->letter)
        snprintf(letter, sizeof letter, "-%c, ", row->letter);
    if (row->kind == MOEC_OPT_FLAG)
        snprintf(buf, cap, "%s--%s%s", letter, on ? "no-" : "", row->name);
    else
        snprintf(buf, cap, "%s--%s %s%s", letter, row->name, value, row->kind == MOEC_OPT_LIST ? "..." : "");
}

static bool inside(const moec_opt *row, const char *text)
{
    double v;
    if (row->kind != MOEC_OPT_INT && row->kind != MOEC_OPT_REAL && row->kind != MOEC_OPT_SHARE)
        return true;
    if (strchr(text, '%')) /* a share as people write it: not a mark for "not given" */
        return true;
    return sscanf(text, "%lf", &v) == 1 && (row->lo >= row->hi || (v >= row->lo && v <= row->hi));
}

/* " (a, b, c; default a)", " (0 to 1024; default 0)" or nothing. */
static void spell_range(char *buf, size_t cap, const moec_opt *row)
{
    char range[700] = "";
    size_t n = 0;
    if (row->kind == MOEC_OPT_CHOICE)
        for (int i = 0; row->choices[i] && n < sizeof range; i++)
            n += (size_t)snprintf(range + n, sizeof range - n, "%s%s", i > 0 ? ", " : "", row->choices[i]);
    else if ((row->kind == MOEC_OPT_INT || row->kind == MOEC_OPT_REAL) && row->lo < row->hi && row->hi < 1e9)
        snprintf(range, sizeof range, "%.15g to %.15g", row->lo, row->hi);
    else if ((row->kind == MOEC_OPT_INT || row->kind == MOEC_OPT_REAL) && row->lo > 0 && row->lo < row->hi)
        snprintf(range, sizeof range, "at least %.15g", row->lo); /* the upper end is there to catch slips only */
    else if (row->kind == MOEC_OPT_SHARE && row->lo < row->hi)
        snprintf(range, sizeof range, "%.15g%% to %.15g%%", row->lo * 100.0, row->hi * 100.0);
    bool tells = row->fallback && row->kind != MOEC_OPT_FLAG && *row->fallback && inside(row, row->fallback);
    if (!*range && !tells)
        snprintf(buf, cap, "%s", "");
    else
        snprintf(buf, cap, " (%s%s%s%s)", range, *range && tells ? "; " : "", tells ? "default " : "",
                 tells ? row->fallback : "");
}

/* A flag that is on by default is listed by the name that switches it off, and its sentence says what it does when on. */
static void spell_help(char *buf, size_t cap, const moec_opt *row)
{
    char range[800];
    bool on = row->kind == MOEC_OPT_FLAG && row->fallback && strcmp(row->fallback, "on") == 0;
    spell_range(range, sizeof range, row);
    snprintf(buf, cap, "%s%s%s", on ? "do not " : "", row->help ? row->help : "", range);
}

void moec_opt_help(FILE *to, const moec_verb *verb)
{
    fprintf(to, "usage: moecompress %s %s\n\n", verb->name, verb->args);
    print_wrapped(to, verb->about ? verb->about : verb->brief, 0, 0);
    if (verb->opts->kind != MOEC_OPT_HEADING)
        fprintf(to, "\noptions:\n");
    for (const moec_opt *row = verb->opts; row->kind != MOEC_OPT_END; row++) {
        char name[96], text[1800];
        if (row->kind == MOEC_OPT_HEADING) {
            fprintf(to, "\n%s:\n", row->help);
            continue;
        }
        spell_option(name, sizeof name, row);
        spell_help(text, sizeof text, row);
        int at = fprintf(to, "  %s%s", row->letter ? "" : "    ", name);
        if (at >= HELP_COLUMN - 1) {
            fputc('\n', to);
            at = 0;
        }
        print_wrapped(to, text, HELP_COLUMN, at);
    }
    fprintf(to, "      --help%*sprint this text\n", HELP_COLUMN - 12, "");
    const char *name, *text;
    for (size_t i = 0; verb->entry && (name = verb->entry(&text, i)) != NULL; i++) {
        if (i == 0)
            fprintf(to, "\n%s:\n", verb->entries);
        print_wrapped(to, text, HELP_COLUMN, fprintf(to, "  %s", name));
    }
    if (!verb->examples)
        return;
    fprintf(to, "\nexamples:\n");
    for (const char *line = verb->examples; *line;) {
        size_t n = strcspn(line, "\n");
        fprintf(to, "  %.*s\n", (int)n, line);
        line += n + (line[n] == '\n');
    }
}

/* --- man ---------------------------------------------------------------------------------------------------------- */

/* Text into roff: no request at a line's start, every backslash and dash as itself, lines where help has them. */
static void print_roff(FILE *to, const char *text)
{
    for (const char *p = text; *p; p++) {
        bool start = p == text || p[-1] == '\n';
        if (*p == '\n' && breaks(text, p))
            fputs(start ? ".PP" : "\n.br", to);
        if (start && (*p == '.' || *p == '\''))
            fputs("\\&", to);
        if (*p == '\\')
            fputs("\\e", to);
        else if (*p == '-')
            fputs("\\-", to);
        else
            fputc(*p, to);
    }
    fputc('\n', to);
}

static void man_verb(FILE *to, const moec_verb *verb)
{
    fprintf(to, ".SS \"%s\"\n.B moecompress %s\n", verb->name, verb->name);
    print_roff(to, verb->args);
    fputs(".PP\n", to);
    print_roff(to, verb->about ? verb->about : verb->brief);
    for (const moec_opt *row = verb->opts; row->kind != MOEC_OPT_END; row++) {
        char name[96], text[1800];
        if (row->kind == MOEC_OPT_HEADING) {
            fputs(".PP\n.I ", to);
            print_roff(to, row->help);
            continue;
        }
        spell_option(name, sizeof name, row);
        spell_help(text, sizeof text, row);
        fputs(".TP\n.B ", to);
        print_roff(to, name);
        print_roff(to, text);
    }
    if (!verb->examples)
        return;
    fputs(".PP\nExamples:\n.PP\n.nf\n.RS\n", to);
    print_roff(to, verb->examples);
    fputs(".RE\n.fi\n", to);
}

void moec_opt_man(FILE *to, const moec_verb *const *verbs)
{
    static const char *const exits[] = {
        "0", "done",
        "1", "failed: the operating system refused something",
        "2", "wrong usage",
        "3", "a bad or unsuitable input, or an output that is already there",
        "4", "does not fit: memory, disk or the byte budget",
        "5", "interrupted; run the same command again to continue",
    };
    fprintf(to, ".TH MOECOMPRESS 1 \"\" \"moecompress %s\" \"User commands\"\n", moec_version());
    fputs(".SH NAME\nmoecompress \\- compress Mixture\\-of\\-Experts language models\n", to);
    fputs(".SH SYNOPSIS\n.B moecompress\n.I VERB\n.RI [ WORD ...]\n.RI [ options ]\n", to);
    fputs(".SH DESCRIPTION\nReads a Mixture\\-of\\-Experts language model as it lies on disk (config.json, safetensors,\n"
          "tokenizer), watches how its routers behave on calibration text, and writes a smaller model that the same\n"
          "clients load. Results go to standard output, messages and progress to standard error.\n", to);
    fputs(".SH COMMANDS\n", to);
    for (; *verbs && (*verbs)->name; verbs++)
        man_verb(to, *verbs);
    fputs(".SH EXIT STATUS\n", to);
    for (size_t i = 0; i < MOEC_COUNT(exits); i += 2)
        fprintf(to, ".TP\n.B %s\n%s\n", exits[i], exits[i + 1]);
}

/* --- completion --------------------------------------------------------------------------------------------------- */

static void bash_verb(FILE *to, const moec_verb *verb)
{
    fprintf(to, "    %s)\n        options=\"--help", verb->name);
    for (const moec_opt *row = verb->opts; row->kind != MOEC_OPT_END; row++) {
        bool on = row->kind == MOEC_OPT_FLAG && row->fallback && strcmp(row->fallback, "on") == 0;
        if (row->kind != MOEC_OPT_HEADING)
            fprintf(to, " --%s%s", on ? "no-" : "", row->name);
    }
    fputs("\"\n        case \"$before\" in\n", to);
    for (const moec_opt *row = verb->opts; row->kind != MOEC_OPT_END; row++) {
        if (row->kind != MOEC_OPT_CHOICE)
            continue;
        fprintf(to, "        --%s) choices=\"", row->name);
        for (int i = 0; row->choices[i]; i++)
            fprintf(to, "%s%s", i > 0 ? " " : "", row->choices[i]);
        fputs("\" ;;\n", to);
    }
    fputs("        esac ;;\n", to);
}

void moec_opt_bash(FILE *to, const moec_verb *const *verbs)
{
    fputs("# bash completion for moecompress; printed by: moecompress completion bash\n"
          "_moecompress()\n{\n"
          "    local word=\"${COMP_WORDS[COMP_CWORD]}\" before=\"${COMP_WORDS[COMP_CWORD-1]}\" options=\"\" choices=\"\"\n"
          "    if [ \"$COMP_CWORD\" -eq 1 ]; then\n"
          "        COMPREPLY=($(compgen -W \"", to);
    for (size_t i = 0; verbs[i] && verbs[i]->name; i++)
        fprintf(to, "%s ", verbs[i]->name);
    fputs("help --version --help\" -- \"$word\"))\n        return\n    fi\n    case \"${COMP_WORDS[1]}\" in\n", to);
    for (; *verbs && (*verbs)->name; verbs++)
        bash_verb(to, *verbs);
    fputs("    esac\n"
          "    if [ -n \"$choices\" ]; then\n"
          "        COMPREPLY=($(compgen -W \"$choices\" -- \"$word\"))\n"
          "    elif [[ \"$word\" == -* ]]; then\n"
          "        COMPREPLY=($(compgen -W \"$options\" -- \"$word\"))\n"
          "    else\n"
          "        COMPREPLY=($(compgen -f -- \"$word\"))\n"
          "    fi\n}\n"
          "complete -o filenames -F _moecompress moecompress\n", to);
}
