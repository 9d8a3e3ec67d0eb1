/* What a pruned checkpoint holds, file by file: which tensors of the source go where, what config.json and the index
 * say, and what becomes of every other file of the folder. Used to write an output and to check one. */
#ifndef MOEC_RUN_LAYOUT_H
#define MOEC_RUN_LAYOUT_H

#include "ckpt/override.h"
#include "ckpt/writer.h"
#include "method/plan.h"
#include "model/model.h"
#include "run/cast.h"

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
 *  `p`: the output's, or NULL; some bring a modelling file of their own. Release with moec_side_release. */
MOEC_API moec_status moec_side_scan(moec_side_list *out, const moec_ckpt *c, const moec_plan *p, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_side_release(moec_side_list *l);

/** config.json of a plan's output: the source's text with the values replaced that the plan changes and nothing else
 *  touched; the text itself when there are none. Every key of the family that counts experts and is there is replaced,
 *  beside config_at; a list (one entry a layer) gets each entry replaced. Also: top-k, groups, number of MTP layers,
 *  entries of the quantization's lists of modules that name an expert; with a dtype the quantization goes and the key
 *  of the dtype follows; with betas their key is added or replaced; with a width that of the experts, and the number of shared
 *  experts where their width follows it. Where layers are dropped: their number, lists with an entry for each layer or with
 *  numbers of layers, first and last layers of a kind. With factors or a map: these, and auto_map. Free with moec_free.
 *  MOEC_ENOMEM; MOEC_EFORMAT: a layer that stays would be of another kind under its new number, since a rule counts layers
 *  ("every fourth"): the text names it. */
MOEC_API moec_status moec_config_edited(char **out, const moec_model *m, const moec_plan *p, moec_err *err)
    MOEC_USE_RESULT;

/* Values of dead experts in a tensor: weights and router rows 0, scales 1, biases by which they are never chosen -1e4. */
typedef enum moec_dead { MOEC_DEAD_ZERO, MOEC_DEAD_ONE, MOEC_DEAD_BAR } moec_dead;
/** The bytes of one such value, little-endian; returns how many. -1e4 is the nearest that the type has. */
MOEC_API size_t moec_dead_bytes(unsigned char out[8], moec_dtype t, moec_dead value);

/* A tensor that the source has not: factors of the matrices of a set, where the plan keeps them in place of the matrices, or the
 * codes, scales and the like of a quantized one. It is written in the place of the first of these. */
typedef struct moec_extra {
    char *name, *key; /* key: its name among the weights computed anew, where the matrices may be under the same name */
    moec_cast form;   /* dtype, rank, dim, bytes */
    size_t anchor;  /* that first tensor's index */
    size_t number;  /* in the order of the plan */
    int64_t set;    /* of factors; -1: of a quantized matrix */
    int matrix, piece; /* 0 gate, 1 up, 2 down; number among moec_factor_pieces, or the format's */
} moec_extra;

/* What each tensor of the source is to a plan, by its index in the checkpoint. */
typedef struct moec_forms {
    moec_place *place;
    moec_dead *dead;
    moec_cast *cast;
    int64_t *layer; /* number that the layer in the tensor's name has in the output; -1: it names none; -2: it is dropped */
    size_t n;
    bool *anew;        /* not of an expert, and all the same among the weights computed anew; NULL: none is */
    moec_extra *extra; /* [n_extra] by anchor, there by number */
    size_t n_extra;
} moec_forms;
/** The extra tensors behind whose first one's `anchor` stands tensor i of the source: *n of them. */
MOEC_API const moec_extra *moec_forms_extra(size_t *n, const moec_forms *f, size_t i);
/** MOEC_ENOMEM; MOEC_EFORMAT: dtype of the plan cannot be had; what moec_qformat_check returns. Release with moec_forms_release, also
 *  after failure. */
MOEC_API moec_status moec_forms_new(moec_forms *out, const moec_model *m, const moec_plan *p, moec_err *err)
    MOEC_USE_RESULT;
MOEC_API void moec_forms_release(moec_forms *f);

/* Where a tensor of the source goes. */
typedef struct moec_fate {
    bool dropped;
    int64_t number;               /* new number of an expert, else -1 */
    const moec_plan_layer *parts; /* of a stack: its parts are keep[0], keep[1], ..; NULL: all, unchanged */
    moec_slots slots;             /* how these stand in the output, dead parts among them */
    const moec_plan_layer *across; /* of its second dimension, too; NULL: that is unchanged */
    int64_t tail;                 /* parts behind those of the experts, in both, that stay */
    int64_t dead;                 /* stack: dead parts in all; expert: tensors of dead experts that follow this one, */
    int64_t first_dead;           /* numbered from here */
    bool rewritten;               /* its bytes are those of the tensor of its name among the weights computed anew */
} moec_fate;
/** Fate of tensor i under a plan that fits the model; `parts` is borrowed from it. */
MOEC_API moec_fate moec_plan_fate(const moec_plan *p, const moec_model *m, const moec_forms *f, size_t i);
/** Where byte `at` of tensor i's data in the output comes from: true and *from, a byte of the data before the keep lists, or
 *  false for dead experts; so do at least *n bytes from there on, side by side. `at` is inside the data. */
MOEC_API bool moec_fate_source(uint64_t *from, uint64_t *n, const moec_forms *f, size_t i, moec_fate fate, uint64_t at);
/** Shape in the output of tensor i whose fate is `fate`. */
MOEC_API void moec_fate_shape(int64_t *dim, const moec_plan *p, const moec_model *m, const moec_forms *f, size_t i,
                              moec_fate fate);
/** Name in the output of tensor i; an expert's under `number` (-1: as it is). Free with moec_free. MOEC_ENOMEM. */
MOEC_API moec_status moec_fate_name(char **out, const moec_model *m, const moec_forms *f, size_t i, int64_t number,
                                    moec_err *err) MOEC_USE_RESULT;

typedef struct moec_layout {
    moec_out *files;
    moec_side_list side;
    moec_forms forms;
    uint64_t tensor_bytes, tensors;
    uint64_t dead_bytes; /* of these, of dead experts */
    uint64_t loose; /* tensors of experts that belong to no layer that is known (a vision tower's); copied whole */
} moec_layout;

/** Lists the output of a plan that fits the model. `weights` holds the tensors that the plan's layers have computed anew; with
 *  NULL the list is right in names and sizes only, and must not be carried out. Shards keep the order of their tensors; those that become empty
 *  vanish and the rest are renumbered. With `expert_shards` a source's shard becomes two, its experts' in one called -experts, and there is
 *  an index. Reads no tensor data. MOEC_ENOMEM; MOEC_EIO: the folder cannot be
 *  read; MOEC_EFORMAT: of moec_forms_new and moec_config_edited, or a tensor that `weights` lacks or has in another form. Release with moec_layout_release. */
MOEC_API moec_status moec_layout_build(moec_layout *out, const moec_model *m, const moec_plan *p,
                                       const moec_override *weights, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_layout_release(moec_layout *l);

#define MOEC_INDEX_NAME "model.safetensors.index.json"

#endif
