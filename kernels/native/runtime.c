/* What the processor can do. */
#include <stdatomic.h>

#include "native.h"
#include "runtime.h"

static int best_isa(void) {
#if HAVE_X86
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return ISA_PORTABLE;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")
               ? ISA_AVX512
               : ISA_AVX2;
#else
    return ISA_PORTABLE;
#endif
}

static _Atomic(int) most_isa = ISA_AVX512;

enum isa isa(void) {
    static _Atomic(int) best = -1;
    int found = atomic_load_explicit(&best, memory_order_relaxed);
    if (found < 0) {
        found = best_isa();
        atomic_store_explicit(&best, found, memory_order_relaxed);
    }
    int most = atomic_load_explicit(&most_isa, memory_order_relaxed);
    return (enum isa)(found < most ? found : most);
}

/* 0: portable, 1: AVX2, 2: AVX-512 with BF16 and VNNI. */
int isa_here(void) { return (int)isa(); }

/* Tests: kernels use no better instructions than these. */
void limit_isa(int most) { atomic_store_explicit(&most_isa, most, memory_order_relaxed); }

int has_avx512_vbmi2(void) {
#if HAVE_X86
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
#else
    return 0;
#endif
}
