/* Codes of a few bits each in a stream of 32-bit words: how every integer format of quantized weights packs them. */
#ifndef MOEC_NUM_BITS_H
#define MOEC_NUM_BITS_H

#include "base/err.h"

#include <stdint.h>

/** Code i (0 .. 2^bits - 1) takes bits [i bits, (i + 1) bits) of a little-endian stream, lowest bit first; word w holds bits
 *  [32 w, 32 w + 32), so that codes of 3, 5, 6 and 7 bits may straddle two words, and 32 codes fill `bits` words.
 *  @param words [n bits / 32], overwritten.  @param code [n], n a multiple of 32.  bits: 1 to 8. Safe from several threads. */
MOEC_API void moec_bits_pack(uint32_t *words, const uint8_t *code, int64_t n, int bits);
/** The inverse. */
MOEC_API void moec_bits_unpack(uint8_t *code, const uint32_t *words, int64_t n, int bits);

#endif
