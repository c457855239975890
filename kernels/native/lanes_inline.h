/* Sixteen lanes of 32 bits: sums across them, rows that become columns, one pair for all. */
#ifndef SESSIOND_LANES_INLINE_H
#define SESSIOND_LANES_INLINE_H

#include "native.h"

#if HAVE_X86
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

/* Two bf16 as one 32-bit lane in every lane. */
INLINE AVX512 __m512bh broadcast_pair(const void *pair) {
    uint32_t both;
    __builtin_memcpy(&both, pair, sizeof both);
    return (__m512bh)_mm512_set1_epi32((int)both);
}

/* Rows of 16 lanes of 32 bits become columns. */
INLINE AVX512 void transpose16(const __m512i in[16], __m512i out[16]) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; i++) { /* a[4q + i]: element i of every 128 bits, rows 4q .. 4q + 3 */
        __m512i low = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), high = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
        out[i] = _mm512_shuffle_i32x4(low, high, 0x88);
        out[8 + i] = _mm512_shuffle_i32x4(low, high, 0xDD);
        low = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xDD), high = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xDD);
        out[4 + i] = _mm512_shuffle_i32x4(low, high, 0x88);
        out[12 + i] = _mm512_shuffle_i32x4(low, high, 0xDD);
    }
}
#endif

#endif
