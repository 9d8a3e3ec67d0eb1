/* Options of prune for grains other than whole experts, and for fewer experts a token. */
#ifndef MOEC_TOOLS_PRUNE_GRAIN_H
#define MOEC_TOOLS_PRUNE_GRAIN_H

#include "tool.h"

typedef struct tool_grain_params {
    int grain; /* moec_grain */
    int64_t width, align, top_k;
    const char *pattern;
    double sparsity; /* -1: not given */
} tool_grain_params;

extern const char *const tool_grains[];

/* T: the verb's parameter struct with a `tool_grain_params f;`. */
#define TOOL_GRAIN_ROWS(T, f)                                                                                          \
    {.name = "grain", MOEC_CHOICE(T, f.grain), .choices = tool_grains, .fallback = "experts",                          \
     .value = "experts|neurons|weights|blocks",                                                                        \
     .help = "what is removed: whole experts; neurons inside all of them (--remove, --keep-width), so that they become narrower; "     \
             "single weights of experts, which become zero in files of the same size (--sparsity, --pattern); or whole layers "  \
             "(--remove SHARE or N). --methods lists the methods of each; without --method gate-weighted, wanda and similarity"},   \
    {.name = "keep-width", MOEC_INT(T, f.width), .lo = 1, .hi = 1 << 24, .fallback = "0", .value = "N",                \
     .help = "neurons: how many each expert keeps, instead of --remove"},                                              \
    {.name = "align", MOEC_INT(T, f.align), .lo = 1, .hi = 1 << 24, .fallback = "0", .value = "N",                     \
     .help = "neurons: the width becomes a multiple of N, rounded down; kernels like 16, 64 or 128. By default 16 where 64 or more " \
             "would stay, else 1"},                                                                                    \
    {.name = "sparsity", MOEC_SHARE(T, f.sparsity), .lo = 0, .hi = 1, .fallback = "-1", .value = "SHARE",              \
     .help = "weights: share of each output row that becomes zero"},                                                   \
    {.name = "pattern", MOEC_TEXT(T, f.pattern), .value = "N:M",                                                       \
     .help = "weights: of every M neighbours in a row N stay, such as 2:4 or 4:8, instead of --sparsity"},             \
    {.name = "top-k", MOEC_INT(T, f.top_k), .lo = 1, .hi = 65535, .fallback = "0", .value = "N",                       \
     .help = "experts a token uses in the output, fewer than now; alone or beside --remove. No weight changes"}

/** What does not go together. remove, keep: as given, NULL and 0 when not; the text of --remove becomes a number of layers
 *  in *drop where it is one. MOEC_EINVAL. */
moec_status tool_grain_check(int64_t *drop, const tool_grain_params *g, const char *remove, int64_t keep, moec_err *err)
    MOEC_USE_RESULT;
/** Can what this grain leaves be repaired? MOEC_EINVAL: no, the text says why. */
moec_status tool_grain_repairs(moec_grain grain, moec_err *err) MOEC_USE_RESULT;
/** Puts grain, widths, pattern and share into a request. MOEC_EINVAL: a pattern that is none. */
moec_status tool_grain_request(moec_request *q, const tool_grain_params *g, int64_t drop, moec_err *err) MOEC_USE_RESULT;
/** Says when fewer neurons stay than --remove asked for, since the width became a multiple of --align. */
void tool_grain_say(const moec_plan *p, const moec_request *q);
/** What a plan removes, by what stands in it. */
moec_grain tool_grain_of(const moec_plan *p);
/** Layer by layer what a plan of a grain other than experts removes: zeros, or which layers. `t` as below. */
void tool_grain_table(const moec_plan *p, const moec_model *m, const moec_thin_tally *t);
/** What became of neurons, weights and layers; `t`: counts, NULL where nothing was written. */
void tool_grain_print(const moec_plan *p, const moec_model *m, const moec_thin_tally *t);
void tool_grain_set(moec_json *o, const moec_plan *p, const moec_model *m, const moec_thin_tally *t);

#endif
