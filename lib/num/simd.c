#include "num/simd.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static const char *const names[MOEC_ISA_COUNT] = {
    [MOEC_ISA_GENERIC] = "generic",
    [MOEC_ISA_AVX2] = "avx2",
    [MOEC_ISA_AVX512] = "avx512",
    [MOEC_ISA_AVX512BF16] = "avx512bf16",
};

static moec_isa of_cpu(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return MOEC_ISA_GENERIC;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return MOEC_ISA_AVX2;
    return __builtin_cpu_supports("avx512bf16") ? MOEC_ISA_AVX512BF16 : MOEC_ISA_AVX512;
#else
    return MOEC_ISA_GENERIC;
#endif
}

static moec_isa limit(void)
{
    const char *text = getenv("MOEC_KERNEL");
    for (int i = 0; text && i < MOEC_ISA_COUNT; i++)
        if (strcmp(text, names[i]) == 0)
            return (moec_isa)i;
    return MOEC_ISA_COUNT;
}

moec_isa moec__isa(void)
{
    /* Two threads may both get here first; they store the same value. */
    static atomic_int known = -1;
    int isa = atomic_load_explicit(&known, memory_order_relaxed);
    if (isa < 0) {
        moec_isa cpu = of_cpu(), top = limit();
        isa = (int)(top < cpu ? top : cpu);
        atomic_store_explicit(&known, isa, memory_order_relaxed);
    }
    return (moec_isa)isa;
}

const char *moec__isa_name(moec_isa isa)
{
    return names[isa];
}
