/* Weights that were computed anew, beside a plan file: PLAN.weights. */
#ifndef MOEC_TOOLS_OUTPUT_WEIGHTS_H
#define MOEC_TOOLS_OUTPUT_WEIGHTS_H

#include "tool.h"

/** Opens the weights that go with a plan read from `file`; *out is NULL where it has none. MOEC_EFORMAT: their folder is not
 *  there or empty (the text says where it was looked for), or what moec_override_open refuses. moec_override_close. */
moec_status tool_weights_open(moec_override **out, const moec_plan *p, const char *file, moec_err *err) MOEC_USE_RESULT;
/** Before work begins: may the weights of a plan `file` be written? MOEC_EEXIST: the folder is there and overwrite was not asked,
 *  or it holds what this program did not make. MOEC_EIO, MOEC_ENOMEM. */
moec_status tool_weights_may_write(const char *file, bool overwrite, moec_err *err) MOEC_USE_RESULT;
/** Moves what a repair, a thinning or a factoring made (one of them, the others NULL) to where the plan `file` has it, in place of an
 *  older plan's. MOEC_EEXIST as above; MOEC_EIO, MOEC_ENOMEM. */
moec_status tool_weights_keep(moec_repair *r, moec_thin *t, moec_factoring *f, moec_quantizing *q, const char *file, moec_err *err) MOEC_USE_RESULT;
/** A plan without such weights has taken the place of an older one: the older one's go, if nothing else is in their
 *  folder; else a warning says that it is still there. */
void tool_weights_drop(const char *file);

#endif
