/* Threads and what the processor can do. */
#define _GNU_SOURCE
#include <dlfcn.h>
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

/* torch computes in the threads of the GNU OpenMP library it brings, whatever that file is called. The kernels use the
   same ones: a second pool would spin against the first on the same cores. So nothing is linked; the entry point that
   compilers emit for `#pragma omp parallel` is looked up in the process, where torch has made it visible. */
typedef void (*gomp_parallel_fn)(void (*fn)(void *), void *data, unsigned n_threads, unsigned flags);

static gomp_parallel_fn gomp_parallel(void) {
    static _Atomic(uintptr_t) found;
    uintptr_t entry = atomic_load_explicit(&found, memory_order_relaxed);
    if (!entry) { /* again each time until torch is there */
        entry = (uintptr_t)dlsym(RTLD_DEFAULT, "GOMP_parallel");
        atomic_store_explicit(&found, entry, memory_order_relaxed);
    }
    return (gomp_parallel_fn)entry;
}

struct job {
    chunk_fn fn;
    void *arg;
    int64_t n_chunks;
    _Atomic int64_t next;
};

static void work(void *data) {
    struct job *job = data;
    int64_t chunk;
    while ((chunk = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed)) < job->n_chunks)
        job->fn(job->arg, chunk);
}

void parallel_chunks(chunk_fn fn, void *arg, int64_t n_chunks, int n_threads) {
    struct job job = {fn, arg, n_chunks, 0};
    gomp_parallel_fn parallel = n_threads > 1 && n_chunks > 1 ? gomp_parallel() : NULL;
    if (parallel)
        parallel(work, &job, (unsigned)n_threads, 0);
    else
        work(&job);
}
