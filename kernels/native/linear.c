/* out = x @ weight.T + bias for few rows: bound by reading the weights, so each is read once.

   One accumulator of 16 lanes for each (row, output) runs over the inputs in steps of 32; sixteen of them are summed
   together at the end. The order of additions does not depend on how many rows there are: a row's result is the same
   alone and beside others. */
#include "native.h"
#include "linear.h"

#if HAVE_X86

struct linear_job {
    const uint16_t *x, *weight, *bias;
    uint16_t *out;
    int64_t rows, n_in, n_out;
};

enum { BLOCK = 64 }; /* outputs a chunk, a multiple of 16 */

/* Lane i of the result is the sum of the lanes of acc[i]. */
INLINE AVX512 __m512 sum_lanes(const __m512 acc[16]) {
    __m512 quarter[4];
    for (int i = 0; i < 4; i++) { /* four accumulators side by side in every 128 bits */
        const __m512 *a = acc + 4 * i;
        __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
        __m512 high = _mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
        __m512d l = _mm512_castps_pd(low), h = _mm512_castps_pd(high);
        quarter[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(l, h)),
                                   _mm512_castpd_ps(_mm512_unpackhi_pd(l, h)));
    }
    __m512 half[2];
    for (int i = 0; i < 2; i++)
        half[i] = _mm512_add_ps(_mm512_shuffle_f32x4(quarter[2 * i], quarter[2 * i + 1], 0x88),
                                _mm512_shuffle_f32x4(quarter[2 * i], quarter[2 * i + 1], 0xDD));
    return _mm512_add_ps(_mm512_shuffle_f32x4(half[0], half[1], 0x88), _mm512_shuffle_f32x4(half[0], half[1], 0xDD));
}

/* Sums of NR rows with NO outputs, NR * NO = 16: lane r * NO + o. */
INLINE AVX512 __m512 tile(const int NR, const int NO, const uint16_t *x, const uint16_t *w, int64_t n_in) {
    __m512 acc[16];
    for (int i = 0; i < 16; i++) acc[i] = _mm512_setzero_ps();
    for (int64_t k = 0; k < n_in; k += 32) {
        __m512bh row[4];
        for (int r = 0; r < NR; r++) row[r] = (__m512bh)_mm512_loadu_si512(x + r * n_in + k);
        for (int o = 0; o < NO; o++) {
            __m512bh weights = (__m512bh)_mm512_loadu_si512(w + o * n_in + k);
            for (int r = 0; r < NR; r++) acc[r * NO + o] = _mm512_dpbf16_ps(acc[r * NO + o], weights, row[r]);
        }
    }
    return sum_lanes(acc);
}

/* One output for one row, in the same order of additions. */
INLINE AVX512 __m512 single(const uint16_t *x, const uint16_t *w, int64_t n_in) {
    __m512 acc[16];
    for (int i = 0; i < 16; i++) acc[i] = _mm512_setzero_ps();
    for (int64_t k = 0; k < n_in; k += 32)
        acc[0] = _mm512_dpbf16_ps(acc[0], (__m512bh)_mm512_loadu_si512(w + k), (__m512bh)_mm512_loadu_si512(x + k));
    return sum_lanes(acc);
}

/* Lanes r * NO + o go to out[r][o]. */
INLINE AVX512 void store(const int NR, const int NO, __m512 sums, const uint16_t *bias, uint16_t *out,
                              int64_t n_out) {
    if (bias) {
        uint16_t lanes[16];
        for (int i = 0; i < 16; i++) lanes[i] = i < NR * NO ? bias[i % NO] : 0;
        __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)lanes));
        sums = _mm512_add_ps(sums, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
    }
    uint16_t rounded[16];
    _mm256_storeu_si256((__m256i *)rounded, (__m256i)_mm512_cvtneps_pbh(sums));
    for (int r = 0; r < NR; r++)
        for (int o = 0; o < NO; o++) out[r * n_out + o] = rounded[r * NO + o];
}

static AVX512 void linear_chunk(void *arg, int64_t chunk) {
    const struct linear_job *job = arg;
    int64_t n_in = job->n_in, n_out = job->n_out, rows = job->rows;
    int64_t end = (chunk + 1) * BLOCK < n_out ? (chunk + 1) * BLOCK : n_out;
    int64_t o = chunk * BLOCK;
    for (; o + 16 <= end; o += 16) {
        const uint16_t *w = job->weight + o * n_in, *bias = job->bias ? job->bias + o : NULL;
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4)
            for (int part = 0; part < 16; part += 4)
                store(4, 4, tile(4, 4, job->x + r * n_in, w + part * n_in, n_in), bias ? bias + part : NULL,
                      job->out + r * n_out + o + part, n_out);
        for (; r + 2 <= rows; r += 2)
            for (int part = 0; part < 16; part += 8)
                store(2, 8, tile(2, 8, job->x + r * n_in, w + part * n_in, n_in), bias ? bias + part : NULL,
                      job->out + r * n_out + o + part, n_out);
        for (; r < rows; r++)
            store(1, 16, tile(1, 16, job->x + r * n_in, w, n_in), bias, job->out + r * n_out + o, n_out);
    }
    for (; o < end; o++)
        for (int64_t r = 0; r < rows; r++)
            store(1, 1, single(job->x + r * n_in, job->weight + o * n_in, n_in), job->bias ? job->bias + o : NULL,
                  job->out + r * n_out + o, n_out);
}
#endif

/* x [rows, n_in], weight [n_out, n_in], bias [n_out] or 0, out [rows, n_out]: bf16, contiguous; n_in % 32 == 0.
   Sums in fp32, rounded once. */
void linear_bf16(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t out, int64_t rows, int64_t n_in,
                 int64_t n_out, int n_threads) {
#if HAVE_X86
    struct linear_job job = {(const uint16_t *)x, (const uint16_t *)weight, (const uint16_t *)bias, (uint16_t *)out,
                             rows, n_in, n_out};
    parallel_chunks(linear_chunk, &job, (n_out + BLOCK - 1) / BLOCK, n_threads);
#else
    (void)x, (void)weight, (void)bias, (void)out, (void)rows, (void)n_in, (void)n_out, (void)n_threads;
#endif
}
