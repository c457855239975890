/* What this machine can do at most: reading memory from end to end, and multiply-adds with operands in registers. The
   floors that kernels are held against. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "native.h"
#include "probe.h"

enum { CHUNK = 1 << 20, LANES = 16, ACCUMULATORS = 16 };
enum kind { FP32, BF16, INT8 };

struct read_job {
    const uint8_t *data;
    int64_t n_bytes;
    _Atomic uint64_t sum;
};

INLINE uint64_t read_body(const uint8_t *data, int64_t n_bytes) {
    uint64_t acc[32] = {0}, words[32], sum = 0;
    for (int64_t i = 0; i < n_bytes; i += 256) {
        memcpy(words, data + i, 256);
        for (int lane = 0; lane < 32; lane++) acc[lane] += words[lane];
    }
    for (int lane = 0; lane < 32; lane++) sum += acc[lane];
    return sum;
}

static uint64_t read_portable(const uint8_t *data, int64_t n_bytes) { return read_body(data, n_bytes); }

#if HAVE_X86
static AVX2 uint64_t read_avx2(const uint8_t *data, int64_t n_bytes) { return read_body(data, n_bytes); }

static AVX512 uint64_t read_avx512(const uint8_t *data, int64_t n_bytes) {
    __m512i acc[4];
    for (int i = 0; i < 4; i++) acc[i] = _mm512_setzero_si512();
    for (int64_t at = 0; at < n_bytes; at += 256)
        for (int i = 0; i < 4; i++) acc[i] = _mm512_add_epi64(acc[i], _mm512_loadu_si512(data + at + 64 * i));
    return (uint64_t)_mm512_reduce_add_epi64(
        _mm512_add_epi64(_mm512_add_epi64(acc[0], acc[1]), _mm512_add_epi64(acc[2], acc[3])));
}
#endif

static void read_chunk(void *arg, int64_t chunk) {
    struct read_job *job = arg;
    int64_t left = job->n_bytes - chunk * CHUNK, n_bytes = left < CHUNK ? left : CHUNK;
    const uint8_t *data = job->data + chunk * CHUNK;
    uint64_t sum;
#if HAVE_X86
    if (isa() == ISA_AVX512) sum = read_avx512(data, n_bytes);
    else if (isa() == ISA_AVX2) sum = read_avx2(data, n_bytes);
    else
#endif
        sum = read_portable(data, n_bytes);
    atomic_fetch_add_explicit(&job->sum, sum, memory_order_relaxed);
}

/* The sum of the 64-bit words of data [n_bytes], modulo 2^64; n_bytes % 256 == 0. */
uint64_t probe_read(uintptr_t data, int64_t n_bytes, int n_threads) {
    struct read_job job = {(const uint8_t *)data, n_bytes, 0};
    parallel_chunks(read_chunk, &job, (n_bytes + CHUNK - 1) / CHUNK, n_threads);
    return atomic_load(&job.sum);
}

#if HAVE_X86
/* The compiler does not know what is in this register, and so folds nothing. */
#define OPAQUE(x) __asm__ volatile("" : "+v"(x))

/* acc[i] = step over and over; the accumulators do not wait for each other. */
#define LOOP(type, zero, step)                                    \
    type acc[ACCUMULATORS];                                       \
    for (int i = 0; i < ACCUMULATORS; i++) acc[i] = zero;         \
    for (int64_t round = 0; round < rounds; round++)              \
        for (int i = 0; i < ACCUMULATORS; i++) acc[i] = step;

static AVX512 void fp32_avx512(int64_t rounds, float *sums) {
    __m512 one = _mm512_set1_ps(1.0f), sum = _mm512_setzero_ps();
    OPAQUE(one);
    LOOP(__m512, _mm512_setzero_ps(), _mm512_fmadd_ps(one, one, acc[i]))
    for (int i = 0; i < ACCUMULATORS; i++) sum = _mm512_add_ps(sum, acc[i]);
    _mm512_storeu_ps(sums, sum);
}

static AVX512 void bf16_avx512(int64_t rounds, float *sums) {
    __m512i ones = _mm512_set1_epi16(0x3F80);
    __m512 sum = _mm512_setzero_ps();
    OPAQUE(ones);
    LOOP(__m512, _mm512_setzero_ps(), _mm512_dpbf16_ps(acc[i], (__m512bh)ones, (__m512bh)ones))
    for (int i = 0; i < ACCUMULATORS; i++) sum = _mm512_add_ps(sum, acc[i]);
    _mm512_storeu_ps(sums, sum);
}

static AVX512 void int8_avx512(int64_t rounds, float *sums) {
    __m512i ones = _mm512_set1_epi8(1), sum = _mm512_setzero_si512();
    OPAQUE(ones);
    LOOP(__m512i, _mm512_setzero_si512(), _mm512_dpbusd_epi32(acc[i], ones, ones))
    for (int i = 0; i < ACCUMULATORS; i++) sum = _mm512_add_epi32(sum, acc[i]);
    _mm512_storeu_ps(sums, _mm512_cvtepi32_ps(sum));
}

static AVX2 void fp32_avx2(int64_t rounds, float *sums) {
    __m256 one = _mm256_set1_ps(1.0f), sum = _mm256_setzero_ps();
    OPAQUE(one);
    enum { ACCUMULATORS = 12 }; /* of 16 registers */
    LOOP(__m256, _mm256_setzero_ps(), _mm256_fmadd_ps(one, one, acc[i]))
    for (int i = 0; i < ACCUMULATORS; i++) sum = _mm256_add_ps(sum, acc[i]);
    _mm256_storeu_ps(sums, sum);
    for (int lane = 8; lane < LANES; lane++) sums[lane] = 0.0f;
}
#endif

static void fp32_portable(int64_t rounds, float *sums) {
    float acc[LANES] = {0};
    volatile float one = 1.0f;
    const float a = one;
    for (int64_t round = 0; round < rounds; round++)
        for (int lane = 0; lane < LANES; lane++) acc[lane] += a * a;
    memcpy(sums, acc, sizeof acc);
}

struct multiply {
    void (*run)(int64_t rounds, float *sums);
    int64_t per_round;
};

/* Below AVX-512 there are no such instructions for bf16 and int8: kernels widen, and what counts is fp32. */
static struct multiply multiply_of(int kind) {
#if HAVE_X86
    if (isa() == ISA_AVX512) {
        if (kind == BF16) return (struct multiply){bf16_avx512, 32 * ACCUMULATORS};
        if (kind == INT8) return (struct multiply){int8_avx512, 64 * ACCUMULATORS};
        return (struct multiply){fp32_avx512, 16 * ACCUMULATORS};
    }
    if (isa() == ISA_AVX2) return (struct multiply){fp32_avx2, 8 * 12};
#endif
    (void)kind;
    return (struct multiply){fp32_portable, LANES};
}

struct multiply_job {
    struct multiply multiply;
    int64_t rounds;
    float *sums;
};

static void multiply_chunk(void *arg, int64_t chunk) {
    struct multiply_job *job = arg;
    job->multiply.run(job->rounds, job->sums + chunk * LANES);
}

/* Every thread does `rounds` of multiply-adds of ones, of kind 0 fp32, 1 bf16, 2 int8; sums [n_threads][16] are fp32.
   Returns how many were done in all: the total of the sums, while those are below 2^24. */
int64_t probe_multiply_adds(int kind, int64_t rounds, uintptr_t sums, int n_threads) {
    struct multiply_job job = {multiply_of(kind), rounds, (float *)sums};
    parallel_chunks(multiply_chunk, &job, n_threads, n_threads);
    return n_threads * rounds * job.multiply.per_round;
}

struct region_job {
    _Atomic int64_t *runs;
    _Atomic int64_t wrong;
    int64_t n_chunks;
};

static void count_run(void *arg, int64_t chunk) {
    struct region_job *job = arg;
    if (chunk < 0 || chunk >= job->n_chunks) atomic_fetch_add(&job->wrong, 1);
    else atomic_fetch_add(job->runs + chunk, 1);
}

/* Tests: how many chunks, of regions of 1 to n_chunks, were not run exactly once when their region was over; -1: no
   memory. */
int64_t probe_regions(int64_t n_regions, int64_t n_chunks, int n_threads) {
    struct region_job job = {.runs = calloc((size_t)n_chunks, sizeof *job.runs)};
    if (!job.runs) return -1;
    int64_t wrong = 0;
    for (int64_t region = 0; region < n_regions; region++) {
        job.n_chunks = 1 + region % n_chunks;
        parallel_chunks(count_run, &job, job.n_chunks, n_threads);
        for (int64_t i = 0; i < n_chunks; i++) wrong += atomic_exchange(job.runs + i, 0) != (i < job.n_chunks);
    }
    free(job.runs);
    return wrong + atomic_load(&job.wrong);
}
