/* What the files of gguf_measure share. Private to gguf_measure.c, gguf_measure_error.c and gguf_measure_kl.c.
 *
 * A unit is what is measured and recorded at once: the rows of a layer; as unit dims.layers those of the whole model (embedding, head). */
#ifndef MOEC_RUN_GGUF_MEASURE_PARTS_H
#define MOEC_RUN_GGUF_MEASURE_PARTS_H

#include "method/quant.h"
#include "run/gguf_importance.h"
#include "run/gguf_measure.h"
#include "run/gguf_parts.h"
#include "run/measure_parts.h"

extern const int moec__gguf_probe_bits[MOEC_PROBES];

/* One matrix of the list. */
typedef struct moec_gguf_row {
    size_t tensor;   /* its number in the moec_gguf_model */
    moec_mat mat;    /* of the layer; MOEC_MAT_COUNT: experts, embedding, head */
    bool head;       /* of the whole model: the head, else the embedding */
    int64_t squares; /* where its mean squares stand in its unit's, -1: it has none */
} moec_gguf_row;

typedef struct moec_gguf_measuring {
    const moec_model *m;
    const moec_stats *s;
    const moec_corpus *corpus;
    const moec_gguf_measure_opts *o;
    moec_work work;
    moec_gguf_model *x;
    moec_gguf_importance *importance; /* of experts */
    double *weight;     /* [domains of the corpus] */
    moec_gguf_row *row; /* [n] in the list's order: units are neighbours */
    size_t n;
    size_t *first;      /* [units] first row of a unit; it has `rows` of them */
    size_t *rows;
    int64_t *squares;   /* [units] mean squares of a unit */
    int64_t most_cols;
    moec_progress progress;
} moec_gguf_measuring;

const moec_gguf_source *moec__gguf_source(const moec_gguf_measuring *u, size_t row);
/* The grid of probe b. */
moec_qgrid moec__gguf_probe(int64_t cols, int b);
/* w [rows,cols] becomes what the grid makes of it. MOEC_ENUMERIC, MOEC_ENOMEM. */
moec_status moec__gguf_probe_rows(float *w, int64_t rows, int64_t cols, int b, moec_err *err) MOEC_USE_RESULT;
/* Is there a record of a unit? */
bool moec__gguf_done(const moec_gguf_measuring *u, int64_t unit, bool kl);
/* "kl.3" in "set-00003.safetensors"; "square.3" and "error.3" in "layer-00003.safetensors". */
void moec__gguf_names(char name[64], char file[64], const char *what, int64_t unit);

/* --- gguf_measure_error.c ------------------------------------------------------------------------------------------------ */

enum { MOEC_GGUF_ERRORS = MOEC_BLOCK_COUNT + MOEC_PROBES };
/* Mean squares of inputs and errors of rows, of all units that have no record yet. */
moec_status moec__gguf_errors(moec_gguf_measuring *u, moec_err *err) MOEC_USE_RESULT;

/* --- gguf_measure_kl.c --------------------------------------------------------------------------------------------------- */

/* MOEC_ENOFIT: they will not fit the limit. */
moec_status moec__gguf_kl_fit(const moec_gguf_measuring *u, moec_err *err) MOEC_USE_RESULT;
moec_status moec__gguf_kl(moec_gguf_measuring *u, moec_err *err) MOEC_USE_RESULT;

#endif
