/* Experts in codes of few bits: what names and shapes do not show. */
#include "run/verify_codes.h"

#include "num/bits.h"

#include <string.h>

enum { BLOCK = 32, AS_IT_IS = 16 };

/* Are all zero points of GPTQ's first format the middle of the range? */
static bool middle_zeros(const moec_weight *w)
{
    const unsigned char *data = w->zero->data;
    const size_t block = 4 * (size_t)w->bits;
    uint32_t want[MOEC_QUANT_BITS];
    uint8_t code[BLOCK];
    memset(code, (1 << (w->bits - 1)) - w->zero_more, sizeof code);
    moec_bits_pack(want, code, BLOCK, w->bits);
    for (size_t at = 0; at + block <= w->zero->bytes; at += block)
        if (memcmp(data + at, want, block) != 0)
            return false;
    return w->zero->bytes % block == 0;
}

static moec_status check_matrix(const moec_weight *w, int bits, bool zeros, moec_err *err)
{
    const bool coded = w->storage == MOEC_GPTQ || w->storage == MOEC_PACKED || w->storage == MOEC_NESTED;
    const int have = !coded ? AS_IT_IS : w->storage == MOEC_NESTED ? (int)w->scale->dim[0] + 1 : w->bits; /* read_bits or not */
    if (have != (bits == 0 ? AS_IT_IS : bits))
        return moec_fail(err, MOEC_EFORMAT, "tensor %s has %d bits, the plan says %d", w->of->name, have, bits);
    if (!coded)
        return MOEC_OK;
    const int64_t bad = moec_tensor_nonfinite(w->scale);
    if (bad >= 0)
        return moec_fail(err, MOEC_EFORMAT, "tensor %s: value %lld is NaN or infinite", w->scale->name, (long long)bad);
    if (!zeros && w->storage == MOEC_GPTQ && !middle_zeros(w))
        return moec_fail(err, MOEC_EFORMAT, "tensor %s: a zero point is not the middle of %d bits", w->zero->name, w->bits);
    return MOEC_OK;
}

moec_status moec__verify_codes(const moec_model *m, const moec_plan *p, moec_err *err)
{
    const moec_plan_quant *q = &p->quant;
    moec_status st = MOEC_OK;
    for (int64_t i = 0; st == MOEC_OK && i < p->n_layers * 3 * m->dims.experts; i++) {
        moec_mlp *e = &m->layer[p->layer[i / (3 * m->dims.experts)].layer].expert[i % (3 * m->dims.experts) / 3];
        st = check_matrix(moec_mlp_matrix(e, i % 3), q->expert[i], q->zeros, err);
    }
    for (int64_t i = 0; st == MOEC_OK && q->mat && i < m->dims.layers * MOEC_MAT_COUNT; i++) {
        const moec_weight *w = &m->layer[i / MOEC_MAT_COUNT].mat[i % MOEC_MAT_COUNT];
        if (w->of)
            st = check_matrix(w, q->mat[i], q->zeros, err);
    }
    return st;
}
