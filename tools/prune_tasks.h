/* Options of prune that belong to texts and tasks: a stored task's ranking in place of a method, weights of the texts,
 * thresholds of dynamic skipping. */
#ifndef MOEC_TOOLS_PRUNE_TASKS_H
#define MOEC_TOOLS_PRUNE_TASKS_H

#include "tool.h"

typedef struct tool_tasks_params {
    const char *patterns, *task, *weights;
    bool betas;
} tool_tasks_params;

/* T: the verb's parameter struct with a `tool_tasks_params f;`. */
#define TOOL_TASKS_ROWS(T, f)                                                                                          \
    {.name = "domain-weight", MOEC_TEXT(T, f.weights), .value = "NAME=W[,NAME=W]",                                     \
     .help = "how much each text of the statistics counts, instead of the weights stored there; 0 leaves it out"},     \
    {.name = "patterns", MOEC_TEXT(T, f.patterns), .value = "STORE",                                                   \
     .help = "take the ranking of a task from a store (stats store) instead of scoring by a method; needs --task"},    \
    {.name = "task", MOEC_TEXT(T, f.task), .value = "NAME|nearest",                                                    \
     .help = "with --patterns: the task, or the one that is nearest to the statistics of a prompt (--stats)"},         \
    {.name = "betas", MOEC_FLAG(T, f.betas),                                                                           \
     .help = "write thresholds of dynamic skipping into config.json (\"betas\": the median of the second weight over the "       \
             "first, a layer each; Lu et al., arXiv:2402.14800): only with two experts a token, needs --stats"}

/** What does not go together. method, stats: as given, NULL when not. MOEC_EINVAL. */
moec_status tool_tasks_check(const tool_tasks_params *t, const char *method, const char *stats, moec_err *err) MOEC_USE_RESULT;
/** The plan of the method, or with --patterns that of the task; with weights and betas recorded. */
moec_status tool_tasks_plan(moec_plan **out, const tool_tasks_params *t, const char *method, const moec_request *q,
                            moec_err *err) MOEC_USE_RESULT;

#endif
