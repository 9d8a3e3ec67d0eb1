/* What the removed experts of a plan were used for, for people and for programs. */
#ifndef MOEC_TOOLS_OUTPUT_SERVED_H
#define MOEC_TOOLS_OUTPUT_SERVED_H

#include "tool.h"

/** Prints the layers whose most affected text loses most, at most 16 of them, and the losses of at most 16 texts. */
moec_status tool_print_served(const moec_plan *p, const moec_stats *s, moec_err *err) MOEC_USE_RESULT;
/** Adds to a result: "served": [{"layer", "expert", "most": name or null, "domains": {name: {"selected", "gate"}}}] of every
 *  removed expert, and "lost_by_domain": {name: {"selected", "gate"}}. */
moec_status tool_set_served(moec_json *o, const moec_plan *p, const moec_stats *s, moec_err *err) MOEC_USE_RESULT;

#endif
