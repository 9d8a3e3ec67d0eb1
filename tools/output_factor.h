/* What verbs that carry out a plan of factors say of it. */
#ifndef MOEC_TOOLS_OUTPUT_FACTOR_H
#define MOEC_TOOLS_OUTPUT_FACTOR_H

#include "tool.h"

/** Errors of each layer where they are known, forms and bytes. */
void tool_factor_print(const moec_plan *p, const moec_model *m);
/** {"emit", "rank", "rows" or "bonds" of [gate and up, down], "expert_bytes": {"source", "factors", "output"}, "error": [[gate, up, down]
 *  of each layer]}; free with moec_json_free. expert_bytes.source: in the number format of the output. */
moec_json *tool_factor_json(const moec_plan *p, const moec_model *m);

#endif
