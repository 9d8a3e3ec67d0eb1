/* Which instruction set the number kernels of this process use. Private to lib/num.
 *
 * Chosen once from the CPU. The environment variable MOEC_KERNEL = generic | avx2 | avx512 | avx512bf16 sets an upper
 * limit, so that tests can run the lower kernels on a machine that has the higher ones. */
#ifndef MOEC_NUM_SIMD_H
#define MOEC_NUM_SIMD_H

typedef enum moec_isa {
    MOEC_ISA_GENERIC,    /* C with vector types, whatever the compiler makes of them */
    MOEC_ISA_AVX2,       /* AVX2 and FMA */
    MOEC_ISA_AVX512,     /* AVX-512 F, BW, DQ, VL */
    MOEC_ISA_AVX512BF16, /* the same and AVX512_BF16 */
    MOEC_ISA_COUNT
} moec_isa;

moec_isa moec__isa(void);
const char *moec__isa_name(moec_isa isa);

#endif
