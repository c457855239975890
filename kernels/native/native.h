/* What the compiled kernels share. Pointers come from Python as integers; the callers in kernels/ check shapes. */
#ifndef SESSIOND_NATIVE_H
#define SESSIOND_NATIVE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HAVE_X86 1
#include <immintrin.h>
/* Functions marked so are compiled for these processors whatever the build's flags, and called only there. */
#define AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define AVX512_VBMI2 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,bmi2,popcnt")))
#define INLINE static inline __attribute__((always_inline))
#else
#define HAVE_X86 0
#endif

/* Runs fn(arg, 0) .. fn(arg, n_chunks - 1), each once, by at most n_threads threads; which runs which is open. */
typedef void (*chunk_fn)(void *arg, int64_t chunk);
void parallel_chunks(chunk_fn fn, void *arg, int64_t n_chunks, int n_threads);

/* The exported functions; each is described where it is defined. */
int has_avx512_bf16(void);
int has_avx512_vbmi2(void);
int shares_threads(void);
void linear_bf16(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t out, int64_t rows, int64_t n_in,
                 int64_t n_out, int n_threads);
int64_t attention_scratch(int64_t n_groups, int64_t rows, int64_t head_dim, int64_t n_keys);
void attention_bf16(uintptr_t query, uintptr_t keys, uintptr_t values, uintptr_t out, uintptr_t scratch,
                    int64_t n_groups, int64_t group_stride, int64_t n_share, int64_t n_new, int64_t head_dim,
                    int64_t position, int64_t window, float scaling, int n_threads);
int64_t pack_exponents(uintptr_t values, int64_t n_groups, int64_t n_tokens, int64_t dim, uintptr_t out,
                       uintptr_t work);
int unpack_exponents(uintptr_t coded, int64_t n_bytes, uintptr_t values, int64_t group_stride, int64_t n_groups,
                     int64_t n_tokens, int64_t dim, int portable);

#endif
