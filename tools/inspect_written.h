/* What inspect says of outputs that only transformers runs. */
#ifndef MOEC_TOOLS_INSPECT_WRITTEN_H
#define MOEC_TOOLS_INSPECT_WRITTEN_H

#include "tool.h"

/** Of a folder with factored experts, or routers whose rows share experts: prints what it is and sets *it_is; prints nothing of any
 *  other. Only config.json, headers and the manifest are read. What moec_ckpt_open returns. */
moec_status tool_inspect_written(bool *it_is, const char *dir, bool json, moec_err *err) MOEC_USE_RESULT;

#endif
