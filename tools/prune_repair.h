/* Options of prune that repair what pruning leaves behind. */
#ifndef MOEC_TOOLS_PRUNE_REPAIR_H
#define MOEC_TOOLS_PRUNE_REPAIR_H

#include "tool_text.h"

typedef struct tool_repair_params {
    tool_text input;
    int kind;       /* index into tool_repair_kinds */
    int64_t epochs;
    int router;     /* 0: keep, 1: refit */
} tool_repair_params;

extern const char *const tool_repair_kinds[]; /* "auto" and the names of moec_repair_kind */
extern const char *const tool_repair_routers[];

/* T: the verb's parameter struct with a `tool_repair_params f;`. */
#define TOOL_REPAIR_ROWS(T, f)                                                                                         \
    {.name = "repair", MOEC_CHOICE(T, f.kind), .choices = tool_repair_kinds, .fallback = "auto", .bare = "ridge",      \
     .value = "none|ridge|deep",                                                                                       \
     .help = "fit the weights that stay to --text so that each layer gives again what the original's gave: ridge refits the "      \
             "experts' up and down projections in closed form, deep takes gradient steps on all their matrices and, in small " \
             "layers, the router; of whole experts, neurons and --top-k only; "                                                    \
             "by default ridge where there is --text, else none"},                                                     \
    {.name = "repair-epochs", MOEC_INT(T, f.epochs), .lo = 0, .hi = 1000, .fallback = "0", .value = "N",               \
     .help = "passes of --repair deep over each layer's tokens; 0: 6"},                                                \
    {.name = "repair-router", MOEC_CHOICE(T, f.router), .choices = tool_repair_routers, .fallback = "keep",            \
     .value = "keep|refit",                                                                                            \
     .help = "refit: behind --repair the routers' rows are refitted in closed form, too, layer by layer where that lowers the " \
             "held-out error, and the shift of load is reported. By default they stay (but for --repair deep in small layers): it gains " \
             "little behind a good selection of experts, and takes half as much time again"},                                  \
    TOOL_TEXT_ROWS_OF(T, f.input), TOOL_COMPUTE_ROW_OF(T, f.input, "bf16")

/** Sets kind and method of a repair from what was asked for: "auto" is ridge where there is text; a method that looks at tokens
 *  needs text, too. *wanted: there is something to run. MOEC_EINVAL: repair without text, text without a use. */
moec_status tool_repair_check(moec_repair_opts *out, bool *wanted, const tool_repair_params *p, const char *method,
                              moec_err *err) MOEC_USE_RESULT;

#endif
