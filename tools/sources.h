/* What verbs that make a plan read: the model, statistics, protection. */
#ifndef MOEC_TOOLS_SOURCES_H
#define MOEC_TOOLS_SOURCES_H

#include "tool.h"

typedef struct tool_sources {
    moec_model *model, *base;
    moec_stats *stats;
    moec_guard guard;
    moec_digest print, base_print, stats_digest;
    char *guard_name;
} tool_sources;

/* What is read; NULL: none. */
typedef struct tool_source_names {
    const char *model, *base, *stats, *weights, *protect; /* weights: of the statistics' domains */
    bool drop_mtp, plain; /* plain: the model must not be in codes of few bits */
    bool lean;            /* the statistics by moec_stats_load_lean */
} tool_source_names;

/** Opens them; the statistics are found to be this model's. MOEC_EINVAL: drop_mtp of a model without such layers; MOEC_EFORMAT:
 *  `plain` of one in codes; errors of what is
 *  opened. Release also after failure; zeroed before. */
moec_status tool_sources_open(tool_sources *o, const tool_source_names *n, moec_err *err) MOEC_USE_RESULT;
void tool_sources_release(tool_sources *o);

#endif
