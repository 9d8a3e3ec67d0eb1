/* What quantize --format gguf prints. */
#ifndef MOEC_TOOLS_OUTPUT_GGUF_H
#define MOEC_TOOLS_OUTPUT_GGUF_H

#include "tool.h"

typedef struct tool_gguf_result {
    const tool_common *common;
    const moec_gguf_model *x; /* with its types */
    const moec_gguf_types *types;
    const char *output;       /* NULL: none */
    uint64_t bytes;           /* of all files */
    size_t files;
    int64_t tokens, unseen;   /* unseen: -1 where there are no statistics */
    bool tensors;             /* each of them, too */
    double seconds;
} tool_gguf_result;

/** Says which types rows did not take, once for each kind of tensor. */
void tool_gguf_say_fallen(const moec_gguf_model *x, const moec_gguf_types *t);
/** Prints it, as JSON where asked. MOEC_ENOMEM. */
moec_status tool_gguf_print(const tool_gguf_result *r, moec_err *err) MOEC_USE_RESULT;

#endif
