/* stats super: which experts are super experts, by the outputs that a statistics file saw. */
#include "tool.h"

#include <inttypes.h>

static int64_t int_at(const moec_json *o, const char *key)
{
    int64_t v = -1;
    moec_json_int(moec_json_get(o, key), &v);
    return v;
}

static double real_at(const moec_json *o, const char *key)
{
    double v = 0;
    moec_json_real(moec_json_get(o, key), &v);
    return v;
}

static bool is_set(const moec_json *o, const char *key)
{
    bool v = false;
    moec_json_bool(moec_json_get(o, key), &v);
    return v;
}

static void print_super(const moec_json *about)
{
    const moec_json *list = moec_json_get(about, "experts");
    printf("%" PRId64 " super expert%s: largest output above %.6g, the 99.5th percentile (%.6g) and a tenth of the largest (%.6g)\n"
           "of the %" PRId64 " MoE layers below layer %" PRId64 "\n\n%5s %6s %14s %8s  %s\n",
           int_at(about, "super"), tool_s(int_at(about, "super")), real_at(about, "threshold"),
           real_at(about, "percentile_99_5"), real_at(about, "tenth_of_max"), int_at(about, "pool_layers"),
           int_at(about, "layers_below"), "layer", "expert", "largest output", "channel", "");
    for (size_t i = 0; i < moec_json_len(list); i++) {
        const moec_json *e = moec_json_at(list, i);
        const bool pool = is_set(e, "in_pool"), super = is_set(e, "protected");
        printf("%5" PRId64 " %6" PRId64 " %14.6g", int_at(e, "layer"), int_at(e, "expert"), real_at(e, "abs_max"));
        if (int_at(e, "channel") >= 0)
            printf(" %8" PRId64, int_at(e, "channel"));
        else
            printf(" %8s", "-");
        printf("%s\n", super ? "  super" : pool ? "" : "  late layer, not looked at");
    }
    printf("\nprune --protect super keeps the super experts whatever the method\n");
}

moec_status tool_show_super(const char *path, int64_t top, bool json, moec_err *err)
{
    moec_stats *stats = NULL;
    moec_json *about = NULL;
    moec_status st = MOEC_OK;
    MOEC_TRY(moec_stats_load(&stats, path, err));
    MOEC_TRY(moec_within(err, moec_super_describe(&about, stats, top, err), "%s", path));
    if (json) {
        st = tool_print_json(about, err);
        about = NULL;
    } else {
        print_super(about);
    }
done:
    moec_json_free(about);
    moec_stats_free(stats);
    return st;
}
