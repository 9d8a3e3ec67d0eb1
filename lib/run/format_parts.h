/* What the formats of format.h share. Private to lib/run. */
#ifndef MOEC_RUN_FORMAT_PARTS_H
#define MOEC_RUN_FORMAT_PARTS_H

#include "run/format.h"

extern const moec_qformat moec__format_gptq, moec__format_gptq_dynamic, moec__format_gptq_server, moec__format_compressed,
    moec__format_nested, moec__format_fake;

uint64_t moec__piece_bytes(const moec_piece *p);

/* Modules that a regular expression "^..$" stands for and how they are held; 16 bits: as they are. */
typedef struct moec_rule {
    char *pattern;
    int bits;
    int64_t group;
    bool experts;
} moec_rule;
typedef struct moec_rules {
    moec_rule *at;
    size_t n, cap;
} moec_rules;
/* One rule for each layer, width and set of projections of routed experts, 16 bits included, and one for each other matrix and width
 * over the layers that have it so; what no rule names is as it was. MOEC_ENOMEM. Release with moec__rules_release. */
moec_status moec__rules_of(moec_rules *out, const moec_plan *p, const moec_model *m, moec_err *err) MOEC_USE_RESULT;
void moec__rules_release(moec_rules *r);

/* "model\.layers\.(?:1|2)\.[^.]+\.experts": modules of the plan's experts, and no others such as those of multi-token prediction. Free
 * with moec_free. MOEC_ENOMEM. */
moec_status moec__experts_pattern(char **out, const moec_plan *p, moec_err *err) MOEC_USE_RESULT;
/* The width that most of the routed experts' matrices have, of those that are quantized. */
int moec__usual_bits(const moec_plan *p, const moec_model *m);
/* A text model whose tensors are called as in text-only checkpoints? What clients make of other names was not tried. MOEC_EINVAL. */
moec_status moec__check_text_model(const moec_model *m, const char *format, moec_err *err) MOEC_USE_RESULT;

#endif
