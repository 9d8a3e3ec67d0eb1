/* See prune_grain.h. */
#include "prune_grain.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

const char *const tool_grains[] = {"experts", "neurons", "weights", "blocks", NULL}; /* as moec_grain counts */

moec_status tool_grain_check(int64_t *drop, const tool_grain_params *g, const char *remove, int64_t keep, moec_err *err)
{
    const moec_grain grain = (moec_grain)g->grain;
    const bool sparse = g->sparsity >= 0.0 || g->pattern;
    *drop = 0;
    if (grain != MOEC_GRAIN_EXPERTS && keep > 0)
        return moec_fail(err, MOEC_EINVAL, "prune: --keep counts whole experts; with --grain %s all of them stay", tool_grains[grain]);
    if (grain != MOEC_GRAIN_NEURONS && (g->width > 0 || g->align > 0))
        return moec_fail(err, MOEC_EINVAL, "prune: --keep-width and --align go with --grain neurons");
    if (grain != MOEC_GRAIN_WEIGHTS && sparse)
        return moec_fail(err, MOEC_EINVAL, "prune: --sparsity and --pattern go with --grain weights");
    if (grain == MOEC_GRAIN_WEIGHTS && (remove || (g->sparsity >= 0.0) == (g->pattern != NULL)))
        return moec_fail(err, MOEC_EINVAL, "prune: how much? --grain weights takes --sparsity 50%% or --pattern 2:4");
    if (grain == MOEC_GRAIN_NEURONS && (remove != NULL) == (g->width > 0))
        return moec_fail(err, MOEC_EINVAL, "prune: how much? --grain neurons takes --remove 50%% or --keep-width N");
    if (grain == MOEC_GRAIN_BLOCKS && !remove)
        return moec_fail(err, MOEC_EINVAL, "prune: how much? --grain blocks takes --remove 10%% or --remove N, a number of layers");
    if (grain == MOEC_GRAIN_BLOCKS && strlen(remove) < 6 && strspn(remove, "0123456789") == strlen(remove))
        *drop = strtoll(remove, NULL, 10);
    return MOEC_OK;
}

moec_status tool_grain_request(moec_request *q, const tool_grain_params *g, int64_t drop, moec_err *err)
{
    q->grain = (moec_grain)g->grain;
    q->width = g->width;
    q->align = g->align;
    q->drop = drop;
    if (g->sparsity >= 0.0)
        q->share = g->sparsity;
    if (!g->pattern)
        return MOEC_OK;
    char *end;
    q->some = strtoll(g->pattern, &end, 10);
    if (end == g->pattern || *end != ':')
        return moec_fail(err, MOEC_EINVAL, "--pattern %.40s: expected N:M, such as 2:4", g->pattern);
    const char *second = end + 1;
    q->of = strtoll(second, &end, 10);
    if (end == second || *end || q->some < 1 || q->of <= q->some || q->of > 1024)
        return moec_fail(err, MOEC_EINVAL, "--pattern %.40s: expected N:M, such as 2:4, with N below M and M up to 1024", g->pattern);
    return MOEC_OK;
}

static void print_layers(const moec_plan *p)
{
    printf("dropped    layers");
    for (int64_t i = 0; i < p->n_drop; i++)
        printf(" %d", (int)p->drop[i]);
    printf("\n");
}

void tool_grain_print(const moec_plan *p, const moec_model *m, const moec_thin_tally *t)
{
    if (p->width > 0)
        printf("neurons    %" PRId64 " -> %" PRId64 " in every expert\n", m->dims.expert_width, p->width);
    if (p->n_drop > 0) {
        printf("layers     %" PRId64 " -> %" PRId64 "\n", m->dims.layers, m->dims.layers - p->n_drop);
        print_layers(p);
    }
    if (t && p->width == 0)
        printf("zeros      %" PRIu64 " of %" PRIu64 " weights of experts (%.2f %%); a dense file is not smaller for them\n", t->zeros,
               t->values, 100.0 * (double)t->zeros / (double)t->values);
    if (t && t->unseen > 0)
        printf("unseen     %" PRId64 " experts that no token selected, or of multi-token prediction: judged by their weights\n",
               t->unseen);
}

void tool_grain_set(moec_json *o, const moec_plan *p, const moec_model *m, const moec_thin_tally *t)
{
    if (p->width > 0) {
        moec_json *w = moec_json_new_object();
        moec_json_set(w, "source", moec_json_new_int(m->dims.expert_width));
        moec_json_set(w, "output", moec_json_new_int(p->width));
        moec_json_set(o, "expert_width", w);
    }
    if (p->n_drop > 0)
        moec_json_set(o, "drop_layers", moec_json_new_ints(p->drop, p->n_drop));
    if (t && p->width == 0) {
        moec_json_set(o, "zeros", moec_json_new_int((int64_t)t->zeros));
        moec_json_set(o, "expert_weights", moec_json_new_int((int64_t)t->values));
    }
    if (t)
        moec_json_set(o, "judged_by_weights", moec_json_new_int(t->unseen));
}
