/* Expert matrices made smaller by factoring: what is kept of a matrix W [rows, cols] and how W' comes back from it. Pure functions;
 * run/factor.h carries them through a model.
 *
 *    svd          W' = A B                 A [rows,r] = P, B [r,cols] = P^T W, P the r leading eigenvectors of W C W^T
 *    pivot        W' of svd as r of its own rows [r,cols] and the others as combinations of them, K [rows-r,r]: the same matrix in
 *                 r^2 values less, so of higher rank at the same bytes
 *    mc-smoe      W' = A B + S             S [rows,cols] keeps whole rows of what A B leaves, all others are 0
 *    base-delta   W' = M + A B             M [rows,cols] is one for all experts of a layer, A B the svd of W - M
 *    mpo          W' = T_1 T_2 .. T_n      a tensor train (matrix product operator), see moec_factor_matrix
 *
 * C [cols,cols] = E[g^2 x x^T] of the matrix's input over the tokens that the router gives to the expert, g its weight: with it
 * svd has the least mean squared error of the weighted output, tr((W - W') C (W - W')^T), of all matrices of rank r. */
#ifndef MOEC_METHOD_FACTOR_H
#define MOEC_METHOD_FACTOR_H

#include "method/method.h"

enum { MOEC_FACTOR_PIECES = MOEC_FACTOR_CORES };

/* How a matrix of some form is held: numbers of a plan with the sizes that they are of. */
typedef struct moec_factor_shape {
    moec_factor_kind kind;
    int64_t rows, cols;
    int64_t rank; /* svd, pivot, mc-smoe, base-delta */
    int64_t keep; /* mc-smoe: rows of S that are kept */
    int64_t cores, out[MOEC_FACTOR_CORES], in[MOEC_FACTOR_CORES]; /* mpo: rows = prod out, cols = prod in */
    int64_t bond[MOEC_FACTOR_CORES + 1];                          /* and D_0 = 1 .. D_n = 1 */
} moec_factor_shape;

/* One tensor that is kept of a matrix; of all experts they stand side by side in one tensor [E, dim..]. */
typedef struct moec_factor_piece {
    const char *suffix;   /* behind "gate_proj", "up_proj", "down_proj" */
    bool shared;          /* one for all experts of the layer: [dim..] */
    bool index;           /* I32 */
    int rank;
    int64_t dim[4];
} moec_factor_piece;

/** Form of a plan's matrix: `down` [H,I], else gate or up [I,H]. The plan fits the model. */
MOEC_API moec_factor_shape moec_factor_shape_of(const moec_plan_factor *f, const moec_model *m, bool down);
/** The pieces of a matrix; returns how many, at most MOEC_FACTOR_PIECES. The first has another shape than the dense matrix. */
MOEC_API int moec_factor_pieces(moec_factor_piece out[MOEC_FACTOR_PIECES], const moec_factor_shape *s);
/** Values of a piece, of one expert. */
MOEC_API int64_t moec_factor_piece_values(const moec_factor_piece *p);
/** Bytes of all pieces of `experts` matrices, values having `size` bytes. */
MOEC_API uint64_t moec_factor_bytes(const moec_factor_shape *s, int64_t experts, int64_t size);
/** Bytes that the factors of all MoE layers take, and those of the matrices they stand for in the same number format. */
MOEC_API void moec_factor_sizes(uint64_t *factors, uint64_t *dense, const moec_plan *p, const moec_model *m);

/** Why transformers' class of the family cannot run what the modelling file puts in place of its experts; NULL: it can. Where its
 *  experts are one module with matrices of the usual order and without biases, and config.json is the text model's. */
MOEC_API const char *moec_factor_refused(const moec_model *m);
/** MOEC_EINVAL: moec_factor_refused, and the text says why. */
MOEC_API moec_status moec_factor_can_keep(const moec_model *m, moec_err *err) MOEC_USE_RESULT;
/** The plan's numbers are possible for the model. MOEC_EFORMAT. */
MOEC_API moec_status moec_factor_check(const moec_plan *p, const moec_model *m, moec_err *err) MOEC_USE_RESULT;
/** {"method", "tensors": {"gate_proj": [..], ..}, "shared": [names]}: what the modelling file needs, for config.json. Free with
 *  moec_json_free. */
MOEC_API moec_json *moec_factor_config(const moec_plan *p, const moec_model *m);

/** `n` factors of a number, their product, as even as its prime factors allow, the largest in the middle. */
MOEC_API void moec_factor_split(int64_t *out, int64_t n, int64_t number);

/* --- one matrix ------------------------------------------------------------------------------------------------------ */

/** Adds share * trace(c) / n to the diagonal of c [n,n]: an expert of few tokens must not be free where they do not reach.
 *  False: the trace is 0 or not finite, nothing is known. */
MOEC_API bool moec_factor_damp(double *c, int64_t n, double share);
/** r leading eigenvectors p [r,rows] of W C W^T, W [rows,cols] in float64; c NULL: of W W^T. Of W with more rows than columns, and
 *  no fewer than r of these, by W = Q R and those of R C R^T. MOEC_ENUMERIC, MOEC_ENOMEM. Cost: up to 4 rows cols^2 + 2 (rows + cols)
 *  m^2 + 5 m^3 operations, m the lesser of rows and cols; no inverse and no Cholesky factor, whose square root cancels. */
MOEC_API moec_status moec_factor_lead(double *p, const double *w, const double *c, int64_t rows, int64_t cols, int64_t r,
                                      moec_err *err) MOEC_USE_RESULT;
/** The `keep` rows of largest s_o C s_o^T, ascending (ties: the lower): the output error that dropping row o of s [rows,cols] adds.
 *  Rows add up, so no other choice leaves less. MOEC_ENOMEM. */
MOEC_API moec_status moec_factor_rows(int32_t *row, int64_t keep, const double *s, const double *c, int64_t rows, int64_t cols,
                                      moec_err *err) MOEC_USE_RESULT;
/** What is kept of w [rows,cols]. piece[i]: [values of piece i], those with `index` go to `index`, shared ones are read: base-delta's
 *  M. c: [cols,cols] or NULL, the identity; mpo does not look at it.
 *
 *  mc-smoe: A B by svd, the rows of S = W - A B by moec_factor_rows; then A B anew by the other rows alone (those of W C W^T), since
 *  the kept ones come back exactly whatever A B is. Departs from MC-SMoE (arXiv:2310.01334), which finds rows by gradients while
 *  it trains and truncates without C.
 *  mpo: W as a tensor (o_1 i_1)(o_2 i_2)..(o_n i_n); for m = 1 .. n-1 the matrix [D_(m-1) o_m i_m, rest] is cut to D_m singular
 *  vectors: T_m = U, rest = S V^T (TT-SVD; MPOE, COLING 2022). Plain, C is not seen; no core is shared among experts: independently
 *  trained ones have no common gauge.
 *  pivot: rows by QR with column pivoting of P^T (each the one that is farthest from those before it), K = R11^-1 R12 of that; where
 *  P is orthonormal so are the coefficients small. PIFA (arXiv:2501.19090), which takes pivots of W'. index: [rows], the r rows and
 *  then the others.
 *  Singular vectors come from the smaller Gram matrix, in float64.
 *  MOEC_ENUMERIC: a value is not finite; MOEC_ENOMEM. */
MOEC_API moec_status moec_factor_matrix(float *const *piece, int32_t *index, const moec_factor_shape *s, const float *w,
                                        const double *c, moec_err *err) MOEC_USE_RESULT;
/** W' [rows,cols] from the pieces. MOEC_EFORMAT: a row in `index` that there is not; MOEC_ENOMEM. */
MOEC_API moec_status moec_factor_restore(float *w, const float *const *piece, const int32_t *index, const moec_factor_shape *s,
                                         moec_err *err) MOEC_USE_RESULT;
/** *lost = tr((w - v) C (w - v)^T), *whole = tr(w C w^T). MOEC_ENOMEM. */
MOEC_API moec_status moec_factor_error(double *lost, double *whole, const float *w, const float *v, const double *c, int64_t rows,
                                       int64_t cols, moec_err *err) MOEC_USE_RESULT;

#endif
