/* The k largest of a row of fp32 numbers, without sorting it: their least is found by radix from the highest bits, then
   positions are taken in order. */
#ifndef SESSIOND_SELECT_INLINE_H
#define SESSIOND_SELECT_INLINE_H

#include "native.h"

enum { BIN_BITS = 11, BINS = 1 << BIN_BITS, FEW = 768 };

/* Order of the result as unsigned numbers is order of the values; NaN becomes -inf, -0 becomes 0. */
INLINE uint32_t ordered_bits(float value) {
    union { float value; uint32_t bits; } word = {value + 0.0f};
    uint32_t bits = value != value ? 0xFF800000u : word.bits;
    return bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
}

/* Of n numbers the bin that holds the k-th largest, bins of `bits >> shift & mask`; *k becomes its rank in the bin. */
INLINE uint32_t bin_of(const uint32_t *bits, int64_t n, int shift, uint32_t mask, int64_t *k) {
    uint32_t counts[2][BINS] = {{0}}; /* two, so that equal neighbours do not wait for each other */
    int64_t i = 0;
    for (; i + 2 <= n; i += 2) counts[0][bits[i] >> shift & mask]++, counts[1][bits[i + 1] >> shift & mask]++;
    if (i < n) counts[0][bits[i] >> shift & mask]++;
    uint32_t bin = mask;
    for (;; bin--) {
        int64_t here = (int64_t)counts[0][bin] + counts[1][bin];
        if (here >= *k || bin == 0) return bin;
        *k -= here;
    }
}

/* The k-th largest of bits[n], 1 <= k <= n, which are the same from bit `known` up; `ties`: how many equal to it are
   among the k. `room` [n] is overwritten, and may be `bits`. */
INLINE uint32_t kth_largest(const uint32_t *bits, int64_t n, int64_t k, int known, uint32_t *room, int64_t *ties) {
    while (n > FEW && known > 0) {
        int width = known < BIN_BITS ? known : BIN_BITS;
        const uint32_t mask = (1u << width) - 1;
        known -= width;
        uint32_t bin = bin_of(bits, n, known, mask, &k);
        int64_t kept = 0;
        for (int64_t i = 0; i < n; i++) {
            uint32_t value = bits[i];
            room[kept] = value;
            kept += (value >> known & mask) == bin;
        }
        bits = room, n = kept;
    }
    uint32_t found = known < 32 ? bits[0] >> known << known : 0;
    for (int bit = known - 1; bit >= 0; bit--) {
        uint32_t more = found | 1u << bit;
        int32_t count = 0;
        for (int32_t i = 0; i < (int32_t)n; i++) count += bits[i] >= more;
        if (count >= k) found = more;
    }
    int32_t above = 0;
    for (int32_t i = 0; i < (int32_t)n; i++) above += bits[i] > found;
    *ties = k - above;
    return found;
}

/* Positions of the k largest of bits[n] ascending, the earlier of equal ones; 0 <= k <= n. */
INLINE void select_largest(const uint32_t *bits, int64_t n, int64_t k, uint32_t *room, int32_t *positions) {
    if (k <= 0) return;
    int64_t ties, taken = 0;
    const uint32_t least = kth_largest(bits, n, k, 32, room, &ties);
    for (int64_t i = 0; i < n && taken < k; i++) {
        int equal = bits[i] == least;
        positions[taken] = (int32_t)i;
        taken += (bits[i] > least) | (equal & (ties > 0));
        ties -= equal;
    }
}

INLINE void order_bits(const float *values, int64_t n, uint32_t *bits) {
    for (int64_t i = 0; i < n; i++) bits[i] = ordered_bits(values[i]);
}

#if HAVE_X86
INLINE AVX512 __mmask16 lanes_below(int64_t n) { return n < 16 ? (__mmask16)((1u << n) - 1) : (__mmask16)0xFFFF; }

INLINE AVX512 uint32_t kth_largest_avx512(const uint32_t *bits, int64_t n, int64_t k, uint32_t *room, int64_t *ties) {
    if (n <= FEW) return kth_largest(bits, n, k, 32, room, ties);
    const __m512i bin = _mm512_set1_epi32((int)bin_of(bits, n, 32 - BIN_BITS, BINS - 1, &k));
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i += 16) {
        __m512i b = _mm512_maskz_loadu_epi32(lanes_below(n - i), bits + i);
        __mmask16 in = _mm512_cmpeq_epi32_mask(_mm512_srli_epi32(b, 32 - BIN_BITS), bin) & lanes_below(n - i);
        _mm512_storeu_si512(room + kept, _mm512_maskz_compress_epi32(in, b));
        kept += __builtin_popcount(in);
    }
    return kth_largest(room, kept, k, 32 - BIN_BITS, room, ties);
}

/* The same by whole vectors; `room` [n + 16] and `positions` [k + 16] are written beyond what is told. */
INLINE AVX512 void select_largest_avx512(const uint32_t *bits, int64_t n, int64_t k, uint32_t *room, int32_t *positions) {
    if (k <= 0) return;
    int64_t ties, taken = 0;
    const __m512i least = _mm512_set1_epi32((int)kth_largest_avx512(bits, n, k, room, &ties));
    __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t i = 0; i < n && taken < k; i += 16, at = _mm512_add_epi32(at, _mm512_set1_epi32(16))) {
        __m512i b = _mm512_maskz_loadu_epi32(lanes_below(n - i), bits + i);
        __mmask16 in = _mm512_cmpgt_epu32_mask(b, least);
        __mmask16 equal = _mm512_cmpeq_epi32_mask(b, least) & lanes_below(n - i);
        for (; equal && ties > 0; ties--, equal &= (__mmask16)(equal - 1)) in |= (__mmask16)(equal & -equal);
        _mm512_storeu_si512(positions + taken, _mm512_maskz_compress_epi32(in, at));
        taken += __builtin_popcount(in);
    }
}
#endif

#endif
