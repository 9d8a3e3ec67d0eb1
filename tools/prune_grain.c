/* See prune_grain.h. */
#include "prune_grain.h"

#include <inttypes.h>
#include <math.h>
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

moec_status tool_grain_repairs(moec_grain grain, moec_err *err)
{
    if (grain == MOEC_GRAIN_WEIGHTS)
        return moec_fail(err, MOEC_EINVAL, "prune: repair would give the zeros of --grain weights other values; leave --text and "
                         "--repair out");
    if (grain == MOEC_GRAIN_BLOCKS)
        return moec_fail(err, MOEC_EINVAL, "prune: repair goes with whole experts, --grain neurons and --top-k, not with --grain "
                         "blocks; leave --text and --repair out");
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

void tool_grain_say(const moec_plan *p, const moec_request *q)
{
    const double all = (double)q->model->dims.expert_width, asked = ceil(all - all * q->share - 1e-9);
    if (q->grain == MOEC_GRAIN_NEURONS && q->width == 0 && (double)p->width < asked)
        moec_say("neurons: removing %.4g %% of %.0f would leave %.0f; %" PRId64 " stay (%.4g %% are removed), a width that --align "
                 "allows", 100.0 * q->share, all, asked, p->width, 100.0 * (1.0 - (double)p->width / all));
}

moec_grain tool_grain_of(const moec_plan *p)
{
    if (p->width > 0)
        return MOEC_GRAIN_NEURONS;
    if (p->n_drop > 0)
        return MOEC_GRAIN_BLOCKS;
    return moec_plan_rewrites(p) && !p->repair ? MOEC_GRAIN_WEIGHTS : MOEC_GRAIN_EXPERTS;
}

static void table_of_zeros(const moec_plan *p, const moec_model *m, const moec_thin_tally *t)
{
    const uint64_t values = (uint64_t)(3 * m->dims.experts * m->dims.hidden * m->dims.expert_width);
    printf("%5s %14s %14s %8s\n", "layer", "weights", "zeros", "share");
    for (int64_t i = 0; i < p->n_sets; i++)
        if (p->layer[i].rewritten)
            printf("%5" PRId64 " %14" PRIu64 " %14" PRIu64 " %6.2f %%%s\n", p->layer[i].layer, values, t->set_zeros[i],
                   100.0 * (double)t->set_zeros[i] / (double)values, i < p->n_layers ? "" : "   multi-token prediction");
}

/* Of the layers of the source; a plan that was edited may have no similarities. */
static void table_of_layers(const moec_plan *p, const moec_model *m)
{
    moec_err err = {MOEC_OK, ""};
    moec_json *options = NULL;
    if (moec_json_parse(&options, p->options, strlen(p->options), "options", &err) == MOEC_OK) {
        const moec_json *list = moec_json_get(options, "similarity");
        if (moec_json_len(list) == (size_t)m->dims.layers)
            printf("%5s %12s\n", "layer", "similarity");
        for (int64_t i = 0; moec_json_len(list) == (size_t)m->dims.layers && i < m->dims.layers; i++) {
            double v = 0.0;
            (void)moec_json_real(moec_json_at(list, (size_t)i), &v);
            printf("%5" PRId64 " %12.6g%s\n", i, v, moec_plan_layer_number(p, i) < 0 ? "   dropped" : "");
        }
    }
    moec_json_free(options);
}

void tool_grain_table(const moec_plan *p, const moec_model *m, const moec_thin_tally *t)
{
    if (p->n_drop > 0)
        table_of_layers(p, m);
    if (t && p->width == 0)
        table_of_zeros(p, m, t);
    printf("method %s\n", p->method);
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
        printf("unseen     %" PRId64 " expert%s that no token selected, or of multi-token prediction: judged by their weights\n",
               t->unseen, tool_s(t->unseen));
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
