/* What the verbs share: their declarations, the common options, and how a verb ends. A verb is one file cmd_<name>.c that
 * defines `const moec_verb moec_verb_<name>` and one row in main.c's table. */
#ifndef MOEC_TOOLS_TOOL_H
#define MOEC_TOOLS_TOOL_H

#include "moecompress.h"

extern const moec_verb moec_verb_inspect, moec_verb_calibrate, moec_verb_prune, moec_verb_merge, moec_verb_eval, moec_verb_apply,
    moec_verb_stats, moec_verb_verify, moec_verb_families, moec_verb_factor, moec_verb_quantize, moec_verb_convert;

/* Options that every verb spells alike. A verb's own parameters hold a `tool_common common;` and its rows end with the
 * TOOL_* rows it takes, all of the form {"name", 'x', MOEC_KIND(my_params, common.field), ...}. */
typedef struct tool_common {
    bool json, quiet, verbose, overwrite, resume, dry_run;
    int64_t threads, seed;
    uint64_t max_memory;
} tool_common;

/* T: the verb's parameter struct. Every verb takes TOOL_COMMON_ROWS; the others where they mean something. */
#define TOOL_COMMON_ROWS(T)                                                                                            \
    {.name = "json", MOEC_FLAG(T, common.json), .help = "print the result as one JSON object on standard output"},     \
    {.name = "threads", MOEC_INT(T, common.threads), .lo = 0, .hi = 1024, .fallback = "0", .value = "N",               \
     .help = "worker threads; 0 takes every CPU this process may use, results do not depend on it"},                   \
    {.name = "quiet", .letter = 'q', MOEC_FLAG(T, common.quiet), .help = "no messages but warnings and errors"},       \
    {.name = "verbose", .letter = 'v', MOEC_FLAG(T, common.verbose), .help = "say more of what is being done"}
#define TOOL_MEMORY_ROW(T)                                                                                             \
    {.name = "max-memory", MOEC_SIZE(T, common.max_memory), .value = "SIZE",                                           \
     .help = "stay below this much resident memory, or refuse at the start with exit code 4"}
#define TOOL_SEED_ROW(T)                                                                                               \
    {.name = "seed", MOEC_INT(T, common.seed), .lo = 0, .hi = 9007199254740991.0, .fallback = "0", .value = "N",       \
     .help = "seed of every random choice; the same seed gives the same bytes"}
#define TOOL_OVERWRITE_ROW(T)                                                                                          \
    {.name = "overwrite", MOEC_FLAG(T, common.overwrite), .help = "replace an output that is already there"}
#define TOOL_RESUME_ROW(T)                                                                                             \
    {.name = "resume", MOEC_FLAG(T, common.resume), .fallback = "on",                                                  \
     .help = "continue what an interrupted run of the same command left"}
#define TOOL_DRY_RUN_ROW(T)                                                                                            \
    {.name = "dry-run", MOEC_FLAG(T, common.dry_run),                                                                  \
     .help = "print the plan, sizes, memory and time estimate; write nothing"}
#define TOOL_METHODS_ROW(T) {.name = "methods", MOEC_FLAG(T, methods), .help = "list the methods and leave"}
/* `about`: of which weights. */
#define TOOL_DTYPE_ROW(T, about)                                                                                       \
    {.name = "dtype", MOEC_CHOICE(T, dtype), .choices = tool_dtypes, .fallback = "source",                             \
     .value = "source|bf16|f16|f32", .help = "number format of the weights " about}
#define TOOL_HEADING(text) {.kind = MOEC_OPT_HEADING, .help = text}
#define TOOL_END_ROW {.kind = MOEC_OPT_END}

extern const char *const tool_dtypes[];
/** What --dtype chose; MOEC_DTYPE_COUNT: that of the source. */
moec_dtype tool_dtype(int choice);

/** Parses argv into params (whose first member is the tool_common) and applies what is common: threads, message level.
 *  Returns true when the verb shall go on. False: the verb returns *exit_code at once (help was printed: 0; usage error,
 *  already reported: 2). */
bool tool_begin(int *exit_code, void *params, moec_opt_list *words, const moec_verb *verb, int argc, char **argv);

/** How a verb ends: nothing and 0 for MOEC_OK, else "moecompress: error: TEXT" on stderr and the exit code of `st`.
 *  Standard output stays empty on failure, with --json too: a script that sees an exit code reads stderr. */
int tool_end(moec_status st, const moec_err *err);

/** As tool_end for a status that is known to be a failure; for `return tool_fail(...)`. */
int tool_fail(const moec_err *err);

/** What this program writes as one file, to know it again. */
typedef enum tool_file {
    TOOL_FILE_HDF5, TOOL_FILE_PLAN, TOOL_FILE_REFERENCE, TOOL_FILE_PATTERNS, TOOL_FILE_RECORD, TOOL_FILE_IMATRIX, TOOL_FILE_THRESHOLDS
} tool_file;

/** Before work begins: may `path` be written? Makes the folder it shall lie in. MOEC_EINVAL: an empty name; MOEC_EEXIST: it
 *  is there and overwrite was not asked, or it is neither empty nor a file of this kind (a text, a model's config.json, a
 *  device): such are not replaced. MOEC_EIO, MOEC_ENOMEM. */
moec_status tool_may_write(const char *path, tool_file kind, bool overwrite, moec_err *err) MOEC_USE_RESULT;
/** "bytes": {"source", "output"} of a verb that wrote the file `path`. */
moec_json *tool_bytes_json(uint64_t source, const char *path);
/** Length of a file, 0 when there is none. */
uint64_t tool_file_bytes(const char *path);
/** True when both names are one file, written or not yet. */
bool tool_same_file(const char *a, const char *b);

/** MOEC_EFORMAT: the model is a GGUF, from which no folder is made by copying; `moecompress convert` makes one. */
moec_status tool_is_folder(const moec_model *m, moec_err *err) MOEC_USE_RESULT;
/** "s", or "" for one: the plural of a word that ends so. */
const char *tool_s(int64_t n);

enum { TOOL_ROUTING = 256 };
/** How a family's router scores and chooses: "sigmoid, top-k, selection bias". */
void tool_routing_text(char text[TOOL_ROUTING], const moec_family *f);

/** Prints the super experts of a statistics file and its `top` largest outputs. MOEC_EFORMAT: not a statistics file, or the
 *  outputs were not collected. */
moec_status tool_show_super(const char *path, int64_t top, bool json, moec_err *err) MOEC_USE_RESULT;

/** Prints what --methods says of any method: name, brief, formula, source, a line each. */
void tool_print_method(const moec_method *m);
/** --methods of verbs that say no more: each method of a kind, or one JSON array. MOEC_ENOMEM, MOEC_EIO. */
moec_status tool_list_methods(moec_method_kind kind, bool json, moec_err *err) MOEC_USE_RESULT;

/** Name of the i-th method of a kind and what --help says of it, valid until the next call; NULL behind the last. */
const char *tool_method_entry(const char **text, moec_method_kind kind, size_t i);

/** Prints a JSON value on standard output with a newline and frees it. */
moec_status tool_print_json(moec_json *v, moec_err *err) MOEC_USE_RESULT;

#endif
