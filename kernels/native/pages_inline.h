/* Pages of keys by each channel's smallest and largest value, in bf16 or fp32: scored without the keys. */
#ifndef SESSIOND_PAGES_INLINE_H
#define SESSIOND_PAGES_INLINE_H

#include "lanes_inline.h"
#include "native.h"

enum { MOST_CHANNELS = 256, PAGES_AT_ONCE = 16, PAGES_AHEAD = 32 };

/* A query head, cut by which bound its channels meet: zeros where they meet the other one. */
struct page_query {
    float low[MOST_CHANNELS], high[MOST_CHANNELS];
    uint16_t low_bf16[MOST_CHANNELS], high_bf16[MOST_CHANNELS];
};

struct page_shape {
    const uint8_t *low, *high; /* of one group, [n_pages][head_dim] */
    int64_t n_pages, head_dim;
    int bounds_bf16, query_bf16; /* query_bf16: its numbers are bf16 */
};

INLINE void cut_query(const float *query, const uint8_t *rising, int64_t head_dim, struct page_query *out) {
    for (int64_t d = 0; d < head_dim; d++) {
        out->low[d] = rising[d] ? 0.0f : query[d];
        out->high[d] = rising[d] ? query[d] : 0.0f;
        out->low_bf16[d] = to_bf16(out->low[d]);
        out->high_bf16[d] = to_bf16(out->high[d]);
    }
}

/* One page and one query, by 16 lanes. */
INLINE float score_page(const int BF16, const struct page_shape *shape, const struct page_query *query, int64_t page) {
    const int64_t at = page * shape->head_dim;
    const uint16_t *low16 = (const uint16_t *)shape->low + at, *high16 = (const uint16_t *)shape->high + at;
    const float *low32 = (const float *)shape->low + at, *high32 = (const float *)shape->high + at;
    float acc[16] = {0};
    int64_t d = 0;
    for (; d + 16 <= shape->head_dim; d += 16)
        for (int j = 0; j < 16; j++) {
            float low = BF16 ? from_bf16(low16[d + j]) : low32[d + j];
            float high = BF16 ? from_bf16(high16[d + j]) : high32[d + j];
            acc[j] += low * query->low[d + j] + high * query->high[d + j];
        }
    for (; d < shape->head_dim; d++) {
        float low = BF16 ? from_bf16(low16[d]) : low32[d], high = BF16 ? from_bf16(high16[d]) : high32[d];
        acc[d % 16] += low * query->low[d] + high * query->high[d];
    }
    for (int step = 8; step; step /= 2)
        for (int j = 0; j < step; j++) acc[j] += acc[j + step];
    return acc[0];
}

INLINE void score_pages_plain(const struct page_shape *shape, const struct page_query *query, float *scores) {
    for (int64_t page = 0; page < shape->n_pages; page++)
        scores[page] = shape->bounds_bf16 ? score_page(1, shape, query, page) : score_page(0, shape, query, page);
}

#if HAVE_X86
/* bf16 all, head_dim % 32 == 0. A page's sum is the same wherever it stands. */
INLINE AVX512 void score_pages_avx512(const struct page_shape *shape, const struct page_query *query,
                                      float *scores) {
    const int64_t head_dim = shape->head_dim, end = shape->n_pages;
    const uint16_t *low = (const uint16_t *)shape->low, *high = (const uint16_t *)shape->high;
    for (int64_t page = 0; page < end; page += PAGES_AT_ONCE) {
        const int64_t n = end - page < PAGES_AT_ONCE ? end - page : PAGES_AT_ONCE;
        __m512 acc[16];
        for (int i = 0; i < 16; i++) acc[i] = _mm512_setzero_ps();
        for (int64_t d = 0; d < head_dim; d += 32) {
            __m512bh falls = (__m512bh)_mm512_loadu_si512(query->low_bf16 + d);
            __m512bh rises = (__m512bh)_mm512_loadu_si512(query->high_bf16 + d);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                int64_t at = (page + (i < n ? i : n - 1)) * head_dim + d;
                _mm_prefetch((const char *)(low + at + PAGES_AHEAD * head_dim), _MM_HINT_T0);
                _mm_prefetch((const char *)(high + at + PAGES_AHEAD * head_dim), _MM_HINT_T0);
                acc[i] = _mm512_dpbf16_ps(acc[i], (__m512bh)_mm512_loadu_si512(low + at), falls);
                acc[i] = _mm512_dpbf16_ps(acc[i], (__m512bh)_mm512_loadu_si512(high + at), rises);
            }
        }
        __mmask16 there = n < 16 ? (__mmask16)((1u << n) - 1) : (__mmask16)0xFFFF;
        _mm512_mask_storeu_ps(scores + page, there, sum_lanes(acc));
    }
}
#endif

/* scores[page] of all pages. In pages.c. */
void score_pages(const struct page_shape *shape, const struct page_query *query, float *scores);

#endif
