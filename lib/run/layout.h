/* What a pruned checkpoint holds, file by file: which tensors of the source go where, what config.json and the index say, and
 * what becomes of every other file of the folder. Used to write an output and to check one. */
#ifndef MOEC_RUN_LAYOUT_H
#define MOEC_RUN_LAYOUT_H

#include "ckpt/writer.h"
#include "method/plan.h"
#include "model/model.h"

/* What becomes of a file of the source folder. */
typedef enum moec_side_kind {
    MOEC_SIDE_COPY,     /* copied byte for byte */
    MOEC_SIDE_REWRITE,  /* shards, index, config.json, an older manifest: written anew */
    MOEC_SIDE_LEAVE     /* left out; `reason` says why */
} moec_side_kind;

typedef struct moec_side {
    char *name;
    moec_side_kind kind;
    const char *reason;
} moec_side;

typedef struct moec_side_list {
    moec_side *at; /* sorted by name */
    size_t n;
} moec_side_list;

/** Every entry of a checkpoint's folder and what becomes of it. Links to files are read through; folders, other weight
 *  formats (they hold the unpruned model) and anything that is no regular file are left out. MOEC_EIO, MOEC_ENOMEM.
 *  Release with moec_side_release. */
MOEC_API moec_status moec_side_scan(moec_side_list *out, const moec_ckpt *c, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_side_release(moec_side_list *l);

/** config.json of a model with another number of experts and top-k: the source's text with these values replaced and nothing
 *  else touched; the text itself when they are the same. Every key of the family that counts experts and is there is
 *  replaced. Free with moec_free. MOEC_ENOMEM, MOEC_EFORMAT. */
MOEC_API moec_status moec_config_edited(char **out, const moec_model *m, int64_t experts, int64_t top_k, moec_err *err)
    MOEC_USE_RESULT;

/** Where a tensor of the source goes. */
typedef struct moec_fate {
    bool dropped;
    int64_t number;              /* new number of an expert, else -1 */
    const moec_plan_layer *rows; /* of a router: its rows are keep[0], keep[1], ..; NULL: all, unchanged */
} moec_fate;
MOEC_API moec_fate moec_plan_fate(const moec_plan *p, const moec_model *m, moec_place place);
/** Name in the output of tensor i whose fate is `f`. Free with moec_free. */
MOEC_API moec_status moec_fate_name(char **out, const moec_model *m, size_t i, moec_place place, moec_fate f,
                                    moec_err *err) MOEC_USE_RESULT;

typedef struct moec_layout {
    moec_out *files;
    moec_side_list side;
    uint64_t tensor_bytes, tensors;
    uint64_t loose; /* tensors of experts that no layer of the forward pass owns; copied whole */
} moec_layout;

/** Lists the output of a plan that fits the model. Shards keep the order of their tensors; those that become empty vanish and
 *  the rest are renumbered. Reads no tensor data. Release with moec_layout_release. */
MOEC_API moec_status moec_layout_build(moec_layout *out, const moec_model *m, const moec_plan *p, moec_err *err)
    MOEC_USE_RESULT;
MOEC_API void moec_layout_release(moec_layout *l);

#define MOEC_INDEX_NAME "model.safetensors.index.json"

#endif
