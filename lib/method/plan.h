/* A plan: who is kept. Small, readable JSON that can be printed, edited, compared and applied later. */
#ifndef MOEC_METHOD_PLAN_H
#define MOEC_METHOD_PLAN_H

#include "base/json.h"
#include "model/model.h"

typedef struct moec_plan_layer {
    int64_t layer;      /* index among all layers */
    int64_t n_experts;  /* before */
    int64_t n_keep;
    int32_t *keep;      /* [n_keep] ascending */
    double *score;      /* [n_experts] or NULL; higher is kept */
    int64_t n_unseen;   /* experts that no calibration token selected, */
    int32_t *unseen;    /* ascending; a zero score here means "never seen", not "small" */
    int64_t n_guarded;  /* experts that were kept whatever their score, */
    int32_t *guarded;   /* ascending (--protect) */
} moec_plan_layer;

typedef struct moec_plan {
    char model[33];     /* fingerprint of the source; "": any model of this shape */
    char model_type[64];
    char method[64];
    char *options;      /* JSON of what the method was asked */
    char stats[33];     /* digest of the statistics file, "" when none */
    int64_t top_k, new_top_k;
    int64_t n_layers;   /* MoE layers, ascending */
    moec_plan_layer *layer;
} moec_plan;

/** NULL-safe. */
MOEC_API void moec_plan_free(moec_plan *p);
/** A plan with its layers (index, n_experts; nothing kept yet) and top_k taken from a model; `fingerprint` may be NULL. */
MOEC_API moec_status moec_plan_new(moec_plan **out, const moec_model *m, const char *method, const char *fingerprint,
                                   moec_err *err) MOEC_USE_RESULT;
/** {"moecompress_plan": 1, "kind": "prune", "model", "model_type", "method", "options", "stats", "top_k", "new_top_k",
 *  "layers": [{"layer", "experts", "keep", "unseen", "protected", "score"}]}; score only where there is one. */
MOEC_API moec_status moec_plan_to_json(moec_json **out, const moec_plan *p, moec_err *err) MOEC_USE_RESULT;
/** The same as text, one layer a line, so that plans can be read and compared. Free with moec_free. */
MOEC_API moec_status moec_plan_to_text(char **out, const moec_plan *p, moec_err *err) MOEC_USE_RESULT;
/** From an edited or hostile file: MOEC_EFORMAT for a wrong version, kind or type, indices out of range, not ascending or
 *  repeated, an empty or missing layer, sizes out of range. Unknown keys are refused: an edit that is misspelt must not be
 *  silently without effect. Needed: moecompress_plan, kind, model, top_k, new_top_k, layers with layer, experts, keep. */
MOEC_API moec_status moec_plan_parse(moec_plan **out, const char *text, size_t len, const char *what, moec_err *err)
    MOEC_USE_RESULT;
MOEC_API moec_status moec_plan_from_json(moec_plan **out, moec_json *root, const char *what, moec_err *err) MOEC_USE_RESULT;
/** moec_plan_parse of a file. MOEC_EIO too. */
MOEC_API moec_status moec_plan_read(moec_plan **out, const char *path, moec_err *err) MOEC_USE_RESULT;
/** The plan fits this model: fingerprint (that of m), MoE layers, expert counts, top-k as before, new top-k <= kept, one
 *  count of kept experts in all layers (no client loads anything else). MOEC_EFORMAT. */
MOEC_API moec_status moec_plan_check(const moec_plan *p, const moec_model *m, const char *fingerprint, moec_err *err)
    MOEC_USE_RESULT;

/** New number of an expert of MoE layer l (index into p->layer), or -1 when it is removed. */
MOEC_API int64_t moec_plan_number(const moec_plan *p, int64_t l, int64_t expert);
/** Layer record of layer index `layer`, or NULL. */
MOEC_API const moec_plan_layer *moec_plan_find(const moec_plan *p, int64_t layer);

#endif
