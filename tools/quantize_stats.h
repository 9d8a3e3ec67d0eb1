/* Statistics that verbs which quantize complete on their own. */
#ifndef MOEC_TOOLS_QUANTIZE_STATS_H
#define MOEC_TOOLS_QUANTIZE_STATS_H

#include "tool.h"

/** What an earlier run of the same model, text and arithmetic, which was stopped, left in `path`; NULL: nothing of that kind. Its
 *  calibration has ended. MOEC_EEXIST, MOEC_EIO, MOEC_ENOMEM. */
moec_status tool_found_stats(moec_stats **out, const moec_model *m, const moec_corpus *corpus, moec_compute compute, const char *path,
                             moec_err *err) MOEC_USE_RESULT;

#endif
