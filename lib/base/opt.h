/* Command-line options as typed rows: parsing, ranges, defaults, help, man page, shell completion and the JSON listing all
 * come from the same row, and the same name means the same thing in every verb. Values go into a struct on the caller's
 * stack; a field of the wrong type does not compile. No abbreviations: adding an option never breaks a script. */
#ifndef MOEC_BASE_OPT_H
#define MOEC_BASE_OPT_H

#include "base/err.h"
#include "base/json.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

typedef enum moec_opt_kind {
    MOEC_OPT_END,
    MOEC_OPT_HEADING, /* no option: help and the man page put `help` over the rows behind it */
    MOEC_OPT_FLAG,   /* bool: --name, --no-name */
    MOEC_OPT_INT,    /* int64_t in [lo, hi] */
    MOEC_OPT_REAL,   /* double in [lo, hi] */
    MOEC_OPT_SIZE,   /* uint64_t bytes: 12GiB, 500MB, 1048576 (KiB MiB GiB TiB and kB MB GB TB) */
    MOEC_OPT_SHARE,  /* double in [lo, hi], written as 25% or 0.25 */
    MOEC_OPT_TEXT,   /* const char *, borrowed from argv */
    MOEC_OPT_LIST,   /* moec_opt_list: the option may be repeated, and takes several values up to the next option */
    MOEC_OPT_CHOICE  /* int: index into `choices` */
} moec_opt_kind;

enum { MOEC_OPT_LIST_MAX = 256 };
typedef struct moec_opt_list {
    int n;
    const char *at[MOEC_OPT_LIST_MAX];
} moec_opt_list;

typedef struct moec_opt {
    const char *name; /* without "--" */
    char letter;      /* short form, or 0 */
    moec_opt_kind kind;
    size_t offset;
    const char *fallback; /* default as text, NULL: zero / none */
    double lo, hi;        /* of INT, REAL, SHARE */
    const char *const *choices; /* NULL-terminated, of CHOICE */
    const char *bare;     /* of CHOICE: what the option means when no choice stands behind it; NULL: it needs one */
    const char *value;    /* what help calls the value: FILE, N, DIR */
    const char *help;     /* one sentence, no full stop needed */
} moec_opt;

/* The _Generic has one arm: a field of another type does not compile. */
#define MOEC_FIELD(T, f, type) (offsetof(T, f) + 0 * sizeof(char[_Generic(((T *)0)->f, type: 1)]))
#define MOEC_FLAG(T, f) .kind = MOEC_OPT_FLAG, .offset = MOEC_FIELD(T, f, bool)
#define MOEC_INT(T, f) .kind = MOEC_OPT_INT, .offset = MOEC_FIELD(T, f, int64_t)
#define MOEC_REAL(T, f) .kind = MOEC_OPT_REAL, .offset = MOEC_FIELD(T, f, double)
#define MOEC_SIZE(T, f) .kind = MOEC_OPT_SIZE, .offset = MOEC_FIELD(T, f, uint64_t)
#define MOEC_SHARE(T, f) .kind = MOEC_OPT_SHARE, .offset = MOEC_FIELD(T, f, double)
#define MOEC_TEXT(T, f) .kind = MOEC_OPT_TEXT, .offset = MOEC_FIELD(T, f, const char *)
#define MOEC_LIST(T, f) .kind = MOEC_OPT_LIST, .offset = MOEC_FIELD(T, f, moec_opt_list)
#define MOEC_CHOICE(T, f) .kind = MOEC_OPT_CHOICE, .offset = MOEC_FIELD(T, f, int)

/* What a verb is, for the dispatcher, help, man page and completion. */
typedef struct moec_verb {
    const char *name;
    const char *args;     /* "MODEL -o OUT" */
    const char *brief;    /* one line */
    const char *about;    /* a paragraph or two */
    const char *examples; /* lines of commands, or NULL */
    const moec_opt *opts; /* up to MOEC_OPT_END */
    int min_args, max_args; /* positional arguments */
    int (*run)(const struct moec_verb *verb, int argc, char **argv);
    const char *entries;  /* what --help lists behind the options ("methods"), or NULL */
    const char *(*entry)(const char **text, size_t i); /* name of entry i and its text, valid until the next call; NULL: the end */
} moec_verb;

/** Sets every default of `rows` in `params`, then parses argv[1..]; words that are no option and no option's value go to
 *  `words`. "--" ends options. "--name=value" and "--name value" are the same. MOEC_EINVAL: unknown option (the nearest
 *  name is suggested), missing value, not a number, out of range, unknown choice (lists them), an option twice that is not a
 *  LIST, too few or too many words. */
MOEC_API moec_status moec_opt_parse(void *params, moec_opt_list *words, const moec_verb *verb, int argc, char **argv,
                                    moec_err *err) MOEC_USE_RESULT;
/** Help of one verb: usage, about, options with defaults and ranges, examples. */
MOEC_API void moec_opt_help(FILE *to, const moec_verb *verb);
/** The options and their values as given or by default, for manifests and reports. */
MOEC_API moec_json *moec_opt_json(const void *params, const moec_verb *verb);
/** roff page (section 1) of all verbs; bash completion of all verbs. verbs ends with a NULL name. */
MOEC_API void moec_opt_man(FILE *to, const moec_verb *const *verbs);
MOEC_API void moec_opt_bash(FILE *to, const moec_verb *const *verbs);

/** Parses "12GiB" and the like. MOEC_EINVAL. */
MOEC_API moec_status moec_size_parse(uint64_t *out, const char *text, moec_err *err) MOEC_USE_RESULT;
/** Parses "25%" or "0.25"; the caller checks the range. MOEC_EINVAL. */
MOEC_API moec_status moec_share_parse(double *out, const char *text, moec_err *err) MOEC_USE_RESULT;
/** "1.25 GiB" into buf; returns buf. */
MOEC_API const char *moec_size_text(char *buf, size_t cap, uint64_t bytes);
/** The same, never less than it is: of a need, which moec_size_parse reads as enough. */
MOEC_API const char *moec_size_text_up(char *buf, size_t cap, uint64_t bytes);

#endif
