/* See prune_repair.h. */
#include "prune_repair.h"

const char *const tool_repair_kinds[] = {"auto", "none", "ridge", "deep", NULL};
const char *const tool_repair_routers[] = {"keep", "refit", NULL};

moec_status tool_repair_check(moec_repair_opts *out, bool *wanted, const tool_repair_params *p, const char *method, moec_err *err)
{
    const bool text = p->input.text.n > 0;
    const moec_method *m = method ? moec_method_find(MOEC_PRUNE, method) : NULL;
    out->method = m && m->choose ? m : NULL;
    out->kind = p->kind > 0 ? (moec_repair_kind)(p->kind - 1) : text ? MOEC_REPAIR_RIDGE : MOEC_REPAIR_NONE;
    out->compute = (moec_compute)p->input.compute;
    out->epochs = (int)p->epochs;
    out->router = p->router == 1;
    *wanted = out->method || out->kind != MOEC_REPAIR_NONE;
    if (out->method && !text)
        return moec_fail(err, MOEC_EINVAL, "method %s looks at what each layer does with tokens; give --text FILE", method);
    if (*wanted && !text)
        return moec_fail(err, MOEC_EINVAL, "--repair %s fits the weights to text; give --text FILE", tool_repair_kinds[p->kind]);
    if (!*wanted && text && !out->merge)
        return moec_fail(err, MOEC_EINVAL, "--text is for repair, and --repair none was given");
    if (out->kind != MOEC_REPAIR_DEEP && p->epochs > 0)
        return moec_fail(err, MOEC_EINVAL, "--repair-epochs goes with --repair deep");
    if (out->kind == MOEC_REPAIR_NONE && out->router)
        return moec_fail(err, MOEC_EINVAL, "--repair-router refit goes with --repair ridge or deep");
    return MOEC_OK;
}
