/* stats store: the pattern store on the command line. */
#ifndef MOEC_TOOLS_STATS_STORE_H
#define MOEC_TOOLS_STATS_STORE_H

#include "tool.h"

typedef struct tool_store_params {
    const char *task, *domain;
    bool by_domain;
} tool_store_params;

/** words: store add STORE FILE, store show STORE, store query STORE FILE. */
moec_status tool_store(const tool_store_params *p, const tool_common *common, const moec_opt_list *words, moec_err *err)
    MOEC_USE_RESULT;

#endif
