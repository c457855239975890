/* What all kernels share inside this folder. What a kernel exports is declared in the header of its own name. */
#ifndef SESSIOND_NATIVE_H
#define SESSIOND_NATIVE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HAVE_X86 1
#include <immintrin.h>
/* Functions marked so are compiled for these processors whatever the build's flags, and called only there. */
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma,f16c")))
#define AVX512_VBMI2 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,bmi2,popcnt")))
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#else
#define HAVE_X86 0
#define AVX2
#endif
#define INLINE static inline __attribute__((always_inline))

/* The best instructions that kernels may use here: of this processor, unless limit_isa said less. */
enum isa { ISA_PORTABLE, ISA_AVX2, ISA_AVX512 };
enum isa isa(void);

/* Runs fn(arg, 0) .. fn(arg, n_chunks - 1), each once, by at most n_threads threads; which runs which is open. */
typedef void (*chunk_fn)(void *arg, int64_t chunk);
void parallel_chunks(chunk_fn fn, void *arg, int64_t n_chunks, int n_threads);

/* A chunk function's body, INLINE and in plain C, compiled for each level; AT_LEVEL is the one to call. */
#if HAVE_X86
#define EACH_LEVEL(body)                                                         \
    static void body##_portable(void *arg, int64_t chunk) { body(arg, chunk); }  \
    static AVX2 void body##_avx2(void *arg, int64_t chunk) { body(arg, chunk); } \
    static AVX512 void body##_avx512(void *arg, int64_t chunk) { body(arg, chunk); }
#define AT_LEVEL(body) (isa() == ISA_AVX512 ? body##_avx512 : isa() == ISA_AVX2 ? body##_avx2 : body##_portable)
#else
#define EACH_LEVEL(body) \
    static void body##_portable(void *arg, int64_t chunk) { body(arg, chunk); }
#define AT_LEVEL(body) body##_portable
#endif

INLINE float from_bf16(uint16_t bits) {
    union { uint32_t bits; float value; } word = {(uint32_t)bits << 16};
    return word.value;
}

/* To nearest, ties to even; NaN stays NaN. */
INLINE uint16_t to_bf16(float value) {
    union { float value; uint32_t bits; } word = {value};
    if (value != value) return (uint16_t)(word.bits >> 16 | 0x40);
    return (uint16_t)((word.bits + 0x7FFF + (word.bits >> 16 & 1)) >> 16);
}

#endif
