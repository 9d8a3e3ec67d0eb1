/* Permutation alignment of two experts: their neurons stand in an order of their own, and the same function can be written with
 * its neurons permuted and rescaled.
 *
 *     f(x) = sum_j down_j act(gate_j x) (up_j x)
 *
 * is unchanged by any order of j, and by up_j -> s up_j, down_j -> down_j / s for any s but 0.
 *
 * A neuron is row j of gate and up and column j of down. Without a gate (act(up_j x)) only the order is free. */
#ifndef MOEC_METHOD_ALIGN_H
#define MOEC_METHOD_ALIGN_H

#include "base/err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* An expert in float32, borrowed: down is transposed, so that a neuron's three vectors are rows. */
typedef struct moec_neurons {
    const float *gate, *up, *down;           /* [I,H]; gate NULL: there is none */
    const float *gate_bias, *up_bias;        /* [I] or NULL: one more column of gate and up */
    int64_t width, hidden;                   /* I, H */
    bool scales;                             /* up enters linearly: scale and sign are free (gate there, no clamp, no up + 1) */
} moec_neurons;

typedef struct moec_alignment {
    int32_t *from;  /* [I] place j takes neuron from[j] of the member, */
    float *scale;   /* [I] with up_j times scale[j] and down_j over it; sign included; never 0 */
    double fit;     /* sum of matched profits over the mean of both experts' sums with themselves: 1 the same, 0 unlike */
    double gain;    /* how much more that is than in the identity order; not below 0 */
} moec_alignment;

typedef struct moec_align_opts {
    bool canonical;  /* scale and sign are made free of choice first (where `scales`), else plain inner products */
    int64_t dense;   /* widest I for which the full matrix of profits is made; wider: `candidates` a neuron */
    int64_t candidates;
} moec_align_opts;

/* Defaults. The matrix, 4 I^2 bytes, is smaller than the two experts in float32, 24 I H, up to I = 6 H, and the assignment takes
 * about as long as the products at worst: so widths up to Mixtral's 14336 and 16384 are dense (0.8 and 1.1 GB; a caller with
 * less memory lowers it). Candidates lose nothing where matches are clear or neurons are of one length; of random neurons of
 * broad lengths 64 keep 94 % of the fit at I = 1408, 81 % at 6400 and 71 % at 14336: short neurons are on nobody's list. */
enum { MOEC_ALIGN_DENSE = 16384, MOEC_ALIGN_CANDIDATES = 64 };

/** Weight matching: the order of b's neurons, and where it is free the scale and sign of each, in which they come nearest to
 *  those of a (the centre):
 *
 *    plain       profit[j,k] = <gate_j, gate'_k> + <up_j, up'_k> + <down_j, down'_k>
 *    canonical   up and down of each neuron are first scaled to equal norms, sqrt(|up| |down|); then
 *                profit[j,k] = <gate_j, gate'_k> + |<up_j, up'_k> + <down_j, down'_k>|, the sign being that of the inner sum
 *
 *  and from = argmax of the sum (moec_assign). scale makes the member's up and down canonical up to the factor between the norms
 *  of the *centre's* up and down as they are, so that members and centre can be averaged as they stand: canonical members have
 *  |up| : |down| as the centre's neuron has. A neuron whose up or down is 0 gets scale 1. Above `dense` each neuron of a has its
 *  `candidates` most profitable ones of b only (moec_assign_sparse), found by blocks.
 *  from, scale: [I], the caller's. An order that is no better than the identity is not taken, which only candidates can bring.
 *  MOEC_EINVAL: experts of different width, hidden size or kind, or no candidates; MOEC_ENUMERIC: a weight or a product of two
 *  is not finite; MOEC_ENOMEM, MOEC_EINTR. Deterministic on any number of threads.
 *  Cost: 2 I^2 * 3 H operations for the products, and the assignment. Memory: moec_align_bytes: I^2 floats or I * candidates
 *  pairs, and 128 rows of products a thread.
 *  Source: Ainsworth et al., Git Re-Basin (arXiv 2209.04836, weight matching), as M-SMoE uses it (arXiv 2310.01334, 3.1).
 *  Departs: scale and sign are taken out first, which a SwiGLU's freedom asks for. */
MOEC_API moec_status moec_align_weights(moec_alignment *out, const moec_neurons *a, const moec_neurons *b,
                                        const moec_align_opts *o, moec_err *err) MOEC_USE_RESULT;

/** By what the neurons do: profit[j,k] = |correlation| (Pearson) of the activations ha[:,j] and hb[:,k] on the same tokens, the
 *  sign being the correlation's, and scale as above; the correlation itself and scale 1 where sign and scale are not free or
 *  not `canonical`. ha, hb [n, I]. A neuron that does not vary has profit 0.
 *  Errors and cost as above, with n in the place of 3 H. Source: REAM (arXiv 2604.04356); its code compares different tokens. */
MOEC_API moec_status moec_align_activations(moec_alignment *out, const moec_neurons *a, const moec_neurons *b, const float *ha,
                                            const float *hb, int64_t n, const moec_align_opts *o, moec_err *err)
    MOEC_USE_RESULT;

/** Bytes that the two need beside their arguments, on moec_par_threads() threads; SIZE_MAX: more than a size can say. */
MOEC_API size_t moec_align_bytes(int64_t width, const moec_align_opts *o);

#endif
