/* See bits.h. */
#include "num/bits.h"

void moec_bits_pack(uint32_t *words, const uint8_t *code, int64_t n, int bits)
{
    uint64_t held = 0;
    int have = 0;
    for (int64_t i = 0; i < n; i++) {
        held |= (uint64_t)(code[i] & ((1u << bits) - 1u)) << have;
        have += bits;
        if (have >= 32) {
            *words++ = (uint32_t)held;
            held >>= 32;
            have -= 32;
        }
    }
}

void moec_bits_unpack(uint8_t *code, const uint32_t *words, int64_t n, int bits)
{
    uint64_t held = 0;
    int have = 0;
    for (int64_t i = 0; i < n; i++) {
        if (have < bits) {
            held |= (uint64_t)*words++ << have;
            have += 32;
        }
        code[i] = (uint8_t)(held & ((1u << bits) - 1u));
        held >>= bits;
        have -= bits;
    }
}
