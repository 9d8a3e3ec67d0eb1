/* stats export --thresholds. */
#ifndef MOEC_TOOLS_STATS_THRESHOLDS_H
#define MOEC_TOOLS_STATS_THRESHOLDS_H

#include "tool.h"

enum { TOOL_NO_THRESHOLDS, TOOL_ODP, TOOL_ADAPMOE, TOOL_HOBBIT, TOOL_PREMOE };

typedef struct tool_threshold_params {
    int kind;
    const char *sensitivities, *shares, *cuts;
    double loss;
    int64_t cache, keep;
} tool_threshold_params;

/** Writes `output` from the statistics in `path`, domains counted by `weights` (NULL: as the file says). */
moec_status tool_export_thresholds(const tool_threshold_params *p, const tool_common *common, const char *path, const char *output,
                                   const char *weights, moec_err *err) MOEC_USE_RESULT;

#endif
