/* stats export --thresholds: what runtimes that skip or offload experts ask of statistics. */
#include "stats_thresholds.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static moec_status read_two(double *a, double *b, const char *text, const char *option, moec_err *err)
{
    char *end, *last;
    *a = strtod(text, &end);
    if (end != text && *end == ',') {
        *b = strtod(end + 1, &last);
        if (last != end + 1 && *last == '\0' && isfinite(*a) && isfinite(*b))
            return MOEC_OK;
    }
    return moec_fail(err, MOEC_EINVAL, "--%s %s: is two numbers, 0.6,0.9", option, text);
}

static moec_status hobbit(moec_json **out, const tool_threshold_params *p, const moec_stats *s, moec_err *err)
{
    moec_hobbit_opts o = {.t1 = (double)NAN, .t2 = (double)NAN};
    moec_status st = p->shares && p->cuts ? moec_fail(err, MOEC_EINVAL, "--cuts and --shares say the same thing; give one")
                     : p->shares          ? read_two(&o.high, &o.low, p->shares, "shares", err)
                                          : read_two(&o.t1, &o.t2, p->cuts ? p->cuts : "0.6,0.9", "cuts", err);
    return st == MOEC_OK ? moec_hobbit_json(out, s, &o, err) : st;
}

static moec_status adapmoe(moec_json **out, const tool_threshold_params *p, const moec_stats *s, moec_err *err)
{
    moec_status st = MOEC_OK;
    double *sens = NULL;
    if (p->sensitivities) {
        st = moec_alloc((void **)&sens, (size_t)s->meta.moe_layers, sizeof *sens, err);
        if (st == MOEC_OK)
            st = moec_sensitivities_read(sens, p->sensitivities, s, err);
    }
    const moec_adapmoe_opts o = {.loss = p->loss, .sensitivity = sens, .origin = p->sensitivities ? moec_path_base(p->sensitivities) : NULL,
                                 .cache = p->cache};
    if (st == MOEC_OK)
        st = moec_adapmoe_json(out, s, &o, err);
    moec_free(sens);
    return st;
}

static moec_status make(moec_json **out, const tool_threshold_params *p, const moec_stats *s, moec_err *err)
{
    *out = NULL;
    switch (p->kind) {
    case TOOL_ODP: return moec_odp_json(out, s, err);
    case TOOL_ADAPMOE: return adapmoe(out, p, s, err);
    case TOOL_HOBBIT: return hobbit(out, p, s, err);
    default: return moec_premoe_json(out, s, p->keep > 0 ? p->keep : s->meta.experts, err);
    }
}

moec_status tool_export_thresholds(const tool_threshold_params *p, const tool_common *common, const char *path, const char *output,
                                   const char *weights, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_stats *stats = NULL;
    moec_json *made = NULL;
    char *text = NULL, *whole = NULL;
    MOEC_TRY(tool_may_write(output, TOOL_FILE_THRESHOLDS, common->overwrite, err));
    MOEC_TRY(moec_stats_load(&stats, path, err));
    if (weights)
        MOEC_TRY(moec_within(err, moec_stats_set_weights(stats, weights, err), "%s", path));
    MOEC_TRY(moec_within(err, make(&made, p, stats, err), "%s", path));
    MOEC_TRY(moec_json_dump(&text, made, 1, err));
    MOEC_TRY(moec_format(&whole, err, "%s\n", text));
    MOEC_TRY(moec_file_write(output, whole, strlen(whole), err));
    moec_say("%s: %s", output, moec_json_string(moec_json_get(made, "format")));
    if (common->json) {
        st = tool_print_json(made, err);
        made = NULL;
    }
done:
    moec_free(text);
    moec_free(whole);
    moec_json_free(made);
    moec_stats_free(stats);
    return st;
}
