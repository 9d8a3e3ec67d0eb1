/* quantize --format gguf: types per tensor, one file that llama.cpp loads. */
#ifndef MOEC_TOOLS_QUANTIZE_GGUF_H
#define MOEC_TOOLS_QUANTIZE_GGUF_H

#include "tool_text.h"

typedef struct tool_gguf_job {
    const tool_common *common;
    const tool_text *input;
    const char *model, *output, *stats, *weights, *sweep, *types, *candidates; /* as the options have them, NULL: not given */
    double bits;
    uint64_t target, shard;
    bool pair;
} tool_gguf_job;

/* The format as --format and --formats have it; list: an array that it is added to, NULL: it is printed. */
extern const char tool_gguf_name[];
void tool_gguf_format(moec_json *list);

/** Measures what is missing, chooses the types, writes, and prints what came of it. MOEC_EINVAL: what is asked contradicts itself or
 *  nothing is; what the steps return. */
moec_status tool_gguf_quantize(const tool_gguf_job *j, moec_err *err) MOEC_USE_RESULT;

#endif
