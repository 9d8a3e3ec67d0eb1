/* Formats of quantized weights: which tensors stand for a matrix, what config.json says of them, and what clients can load. A format
 * is one file, format_*.c, and one row of the table. */
#ifndef MOEC_RUN_FORMAT_H
#define MOEC_RUN_FORMAT_H

#include "method/plan.h"
#include "method/quant.h"
#include "method/widths.h"
#include "num/weight.h"

enum { MOEC_PIECES = 4 };

/* One tensor of a quantized matrix: MODULE.suffix. */
typedef struct moec_piece {
    const char *suffix; /* "qweight" */
    moec_dtype dtype;
    int rank;
    int64_t dim[3];
} moec_piece;

typedef struct moec_qformat {
    const char *name;         /* of --format and in plans */
    const char *about, *loads; /* one line each: what is written, what loads it */
    const char *quant_method; /* of config.json; NULL: it says nothing */
    uint32_t widths;          /* bit b: codes of b bits can be written */
    moec_widths_grain grain;  /* as fine as its clients load routed experts */
    bool zeros;               /* zero points can be written */
    bool dense;               /* W' under the model's own names, in its number format and layout: loads everywhere, is not smaller.
                                 No pieces */
    bool nested;              /* codes have planes (nested.h), written by their own rounding */
    bool own_names;           /* experts' modules are called as in releases; else as transformers 5 has them (moec_expert_module) */
    moec_dtype scale_type;    /* MOEC_DTYPE_COUNT: any float type; dense: F32 */
    int64_t row_multiple, col_multiple, group_multiple; /* of rows, columns and the group of a matrix that can be written */
    int (*pieces)(moec_piece out[MOEC_PIECES], const moec_qgrid *g, int64_t rows, int64_t cols);
    void (*write)(void *const *piece, const moec_qcodes *c);            /* in the order of `pieces` */
    moec_status (*read)(moec_qcodes *c, const void *const *piece, moec_err *err); /* back; c has its grid and room */
    moec_weight (*view)(const moec_tensor *const *piece, const moec_qgrid *g, int64_t rows, int64_t cols); /* moec_qformat_view */
    /* Adds what config.json must have to its root. */
    moec_status (*config)(moec_json *root, const moec_plan *p, const moec_model *m, moec_err *err);
    /* Can this model's output of this plan be loaded? MOEC_EINVAL: no, the text says why and what would do. NULL: any. */
    moec_status (*check)(const moec_plan *p, const moec_model *m, moec_err *err);
} moec_qformat;

/** By name, NULL: there is none; row i, NULL behind the last. gptq, gptq-dynamic, gptq-server, compressed-tensors, nested, fake. */
MOEC_API const moec_qformat *moec_qformat_find(const char *name);
MOEC_API const moec_qformat *moec_qformat_at(size_t i);
/** MOEC_EINVAL for a name that there is not; the nearest is suggested. */
MOEC_API moec_status moec_qformat_take(const moec_qformat **out, const char *name, moec_err *err) MOEC_USE_RESULT;

/* A quantized matrix of a plan: one of an expert, or another one of its layer. */
typedef struct moec_qmatrix {
    int64_t layer, expert;    /* expert -1: another matrix */
    int which;                /* 0 gate, 1 up, 2 down of the expert; else a moec_mat */
    const moec_weight *source;
    moec_qgrid grid;
    char *module;             /* "model.layers.0.mlp.experts.3.gate_proj"; NULL in a dense format */
} moec_qmatrix;
typedef struct moec_qmatrices {
    const moec_qformat *format;
    moec_qmatrix *at;
    size_t n;
} moec_qmatrices;
/** Those of layer `layer` that the plan quantizes, other matrices by moec_mat first, then experts by number, each gate, up, down. The
 *  plan fits the model (moec_qformat_check). Release with moec_qmatrices_release. MOEC_EINVAL: no such format; MOEC_ENOMEM. */
MOEC_API moec_status moec_qmatrices_of(moec_qmatrices *out, const moec_model *m, const moec_plan *p, int64_t layer, moec_err *err)
    MOEC_USE_RESULT;
MOEC_API void moec_qmatrices_release(moec_qmatrices *q);
/** Sets what the layers of a plan with widths have rewritten: in a dense format gate, up and down of the MoE layers of which any
 *  matrix is quantized, else nothing. */
MOEC_API void moec_qformat_mark(moec_plan *p, const moec_qformat *f);
/** Can this plan's output be written, and loaded by what its format is for? MOEC_EFORMAT: no such format, a width, grain, group or
 *  matrix that it has not; MOEC_EINVAL: the format's `check`. MOEC_OK for plans that quantize nothing. */
MOEC_API moec_status moec_qformat_check(const moec_plan *p, const moec_model *m, moec_err *err) MOEC_USE_RESULT;
/** The grid of a matrix of `cols` columns at `bits`; group 0: no group of the format divides them. In a dense format whole rows are the
 *  group where none of 8 columns or more divides them and none of fewer was asked for. */
MOEC_API moec_qgrid moec_qformat_grid(const moec_qformat *f, const moec_plan_quant *q, int64_t cols, int bits);
/** The matrix whose tensors these are (in the order of `pieces`, in memory), not for dense formats. Values as moec_quant_restore has
 *  them. */
MOEC_API moec_weight moec_qformat_view(const moec_qformat *f, const moec_tensor *const *piece, const moec_qgrid *g, int64_t rows,
                                       int64_t cols);
/** Can another matrix of a layer be quantized? A whole plain tensor of its own whose rows and columns the format takes; never
 *  routers, shared experts' gates, or what mixes in other ways than by one product. */
MOEC_API bool moec_qformat_takes(const moec_qformat *f, const moec_plan_quant *q, const moec_layer *l, moec_mat which);
/** Bytes on disk of one expert's matrix (0 gate, 1 up, 2 down) at `bits` (16: as it is, in the output's type). */
MOEC_API uint64_t moec_qformat_bytes(const moec_qformat *f, const moec_plan_quant *q, const moec_model *m, int which, int bits);

#endif
