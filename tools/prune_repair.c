/* See prune_repair.h. */
#include "prune_repair.h"

const char *const tool_repair_kinds[] = {"auto", "none", "ridge", "deep", NULL};

moec_status tool_repair_check(moec_repair_kind *out, const tool_repair_params *p, moec_err *err)
{
    const bool text = p->input.text.n > 0;
    *out = p->kind > 0 ? (moec_repair_kind)(p->kind - 1) : text ? MOEC_REPAIR_RIDGE : MOEC_REPAIR_NONE;
    if (*out != MOEC_REPAIR_NONE && !text)
        return moec_fail(err, MOEC_EINVAL, "--repair %s fits the weights to text; give --text FILE", tool_repair_kinds[p->kind]);
    if (*out == MOEC_REPAIR_NONE && text)
        return moec_fail(err, MOEC_EINVAL, "--text is for repair, and --repair none was given");
    if (*out != MOEC_REPAIR_DEEP && p->epochs > 0)
        return moec_fail(err, MOEC_EINVAL, "--repair-epochs goes with --repair deep");
    return MOEC_OK;
}
