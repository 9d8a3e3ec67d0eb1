/* What verbs that carry out a plan of few bits say of it. */
#ifndef MOEC_TOOLS_OUTPUT_QUANT_H
#define MOEC_TOOLS_OUTPUT_QUANT_H

#include "tool.h"

/** How many matrices have which width, layer by layer, errors where they are known, and bits on disk. report: of a run, NULL: none. */
void tool_quant_print(const moec_plan *p, const moec_model *m, const moec_quantize_report *report);
/** {"format", "group_size", "bits": mean of the routed weights, "bits_on_disk", "layers": [{"layer", "bits": mean, "widths": {"2": n, ..},
 *  "error": [gate, up, down]}], "report"}; free with moec_json_free. */
moec_json *tool_quant_json(const moec_plan *p, const moec_model *m, const moec_quantize_report *report);
/** Writes the record of every matrix, a JSON object a line. MOEC_EIO, MOEC_ENOMEM. */
moec_status tool_quant_record(const moec_quantizing *q, const char *path, moec_err *err) MOEC_USE_RESULT;

#endif
