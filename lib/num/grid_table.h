/* The operations of grid.h as one instruction set implements them. Private to lib/num. */
#ifndef MOEC_NUM_GRID_TABLE_H
#define MOEC_NUM_GRID_TABLE_H

#include "num/grid.h"
#include "num/vec_table.h"

typedef struct moec_grid_table {
    void (*measure)(moec_grid_sums *out, const float *x, const float *m, int64_t n, const float *s, const float *z, float top,
                    int count);
    void (*scan)(float (*xq)[2], float (*qq)[2], const float *x, const float *m, int64_t n, const float *s, float top, int count);
    void (*codes)(uint8_t *u, const float *x, int64_t n, float s, float z, float top);
    void (*values)(float *x, const uint8_t *u, int64_t n, float s, float z);
    void (*column)(uint8_t *u, float *d, const float *v, const float *w, const float *s, const float *z, float top, double *loss,
                   double weight, double add, int64_t n);
    void (*difference)(float *d, float *q, const float *w, const uint8_t *u, const float *s, const float *z, int64_t n);
    bool (*step)(uint8_t *u, float *d, float *change, const float *g, const float *s, const float *z, float top, float h, float add,
                 int64_t n);
    void (*pull)(float *y, const float *x, int64_t stride, const float *a, int64_t count, int64_t n);
    void (*less)(float *y, const float *x, const float *t, int64_t n);
    void (*dot)(float *sum, const float *x, const float *y, float weight, int64_t n);
    void (*squares)(double *sum, const float *y, double weight, int64_t n);
} moec_grid_table;

extern const moec_grid_table moec__grid_generic;
#ifdef MOEC_VEC_X86
extern const moec_grid_table moec__grid_avx2, moec__grid_avx512;
#endif

#endif
