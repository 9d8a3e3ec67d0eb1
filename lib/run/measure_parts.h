/* What the files of measure share, and gguf_measure.c with them. Private to these. */
#ifndef MOEC_RUN_MEASURE_PARTS_H
#define MOEC_RUN_MEASURE_PARTS_H

#include "method/quant.h"
#include "run/measure.h"
#include "run/work.h"

enum {
    MOEC_MEASURE_PARTS = 4, /* gate, up, down alone, all three */
    MOEC_MEASURE_BLOCK = 256, /* tokens of a product */
};
extern const int moec__measure_width[MOEC_QUANT_WIDTHS];

typedef struct moec_measuring {
    const moec_model *m;
    const moec_corpus *corpus;
    const moec_measure_opts *o;
    moec_work work;
    moec_pass *pass;
    int64_t n, slots;
    float *x;         /* [n,H] */
    int32_t *ids;     /* [n,slots] */
    float *gates;
    float *weight;    /* [n] 1 / mean(h'^2) */
    int32_t *window;  /* [n] number of a token's window over all domains */
    int32_t *domain;  /* [windows] */
    int64_t *first;   /* [E+1] the layer's selections by expert, tokens ascending: */
    int32_t *token;   /* [n slots] */
    float *gate;
    const moec_layer *l;
    double *sq;       /* [D,E,MOEC_MEASURE_PARTS,B] of the layer, */
    double *fro;      /* [D,E,B] */
    moec_progress progress;
} moec_measuring;

/* The grid of matrix k (gate, up, down) at a width. */
moec_qgrid moec__measure_grid(const moec_measuring *u, int k, int bits);
/* MOEC_EINVAL: other domains than the statistics', more than 2^31 tokens; MOEC_EFORMAT: statistics of another model. */
moec_status moec__measure_same_text(const moec_stats *s, const moec_model *m, const moec_corpus *corpus, moec_err *err) MOEC_USE_RESULT;
/* Scales and codes of w; c has room and grid. */
moec_status moec__measure_quantize(moec_qcodes *c, const float *w, moec_err *err) MOEC_USE_RESULT;

/* --- measure_expert.c --------------------------------------------------------------------------------------------------- */

/* Adds what experts [lo, hi) of the layer lose: a loop's body. */
moec_status moec__measure_experts(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err) MOEC_USE_RESULT;
/* What a thread of that takes. */
size_t moec__measure_bytes(const moec_measuring *u);

/* --- measure_gain.c ----------------------------------------------------------------------------------------------------- */

/* MOEC_ENOFIT: they will not fit the limit, which is better known before hours of work. */
moec_status moec__measure_gains_fit(moec_measuring *u, moec_err *err) MOEC_USE_RESULT;
/* QUANT_KL of all MoE layers that have no record yet. */
moec_status moec__measure_gains(moec_measuring *u, moec_err *err) MOEC_USE_RESULT;
/* "quant_kl.3", in the file "set-00003.safetensors". */
void moec__measure_gain_name(char name[64], char file[64], int64_t moe_layer);
/* A record: tensors of float64 that become a file of the folder. dim: [rank] of each. */
typedef struct moec_measured {
    const char *name;
    const double *data;
    int rank;
    int64_t dim[4];
} moec_measured;
moec_status moec__measure_record(moec_override *to, const char *file, const moec_measured *v, size_t n, moec_err *err) MOEC_USE_RESULT;

#endif
