/* Bounds of pages of keys: made, and scored against queries (Quest, arXiv 2406.10774). */
#include "pages_inline.h"
#include "pages.h"

static void plain(const struct page_shape *shape, const struct page_query *query, float *scores) {
    score_pages_plain(shape, query, scores);
}
#if HAVE_X86
static AVX2 void plain_avx2(const struct page_shape *shape, const struct page_query *query, float *scores) {
    score_pages_plain(shape, query, scores);
}
static AVX512 void fast(const struct page_shape *shape, const struct page_query *query, float *scores) {
    if (shape->bounds_bf16 && shape->query_bf16 && shape->head_dim % 32 == 0)
        score_pages_avx512(shape, query, scores);
    else
        score_pages_plain(shape, query, scores);
}
#endif

void score_pages(const struct page_shape *shape, const struct page_query *query, float *scores) {
#if HAVE_X86
    if (isa() == ISA_AVX512) {
        fast(shape, query, scores);
        return;
    }
    if (isa() == ISA_AVX2) {
        plain_avx2(shape, query, scores);
        return;
    }
#endif
    plain(shape, query, scores);
}

enum { PART_PAGES = 512 };

struct pages_job {
    const uint8_t *query, *rising, *low, *high;
    float *scores;
    int64_t group_stride, rising_rows, n_share, n_pages, head_dim, n_parts;
    int query_bf16, bounds_bf16, best;
};

static void pages_chunk(void *arg, int64_t chunk) {
    const struct pages_job *job = arg;
    const int64_t group = chunk / job->n_parts, begin = chunk % job->n_parts * PART_PAGES, head_dim = job->head_dim;
    const int64_t end = begin + PART_PAGES < job->n_pages ? begin + PART_PAGES : job->n_pages;
    const int64_t offset = (group * job->group_stride + begin * head_dim) * (job->bounds_bf16 ? 2 : 4), n = end - begin;
    const struct page_shape shape = {job->low + offset, job->high + offset, n, head_dim, job->bounds_bf16,
                                     job->query_bf16};
    for (int64_t r = 0; r < job->n_share; r++) {
        const int64_t row = group * job->n_share + r;
        const uint8_t *query = job->query + row * head_dim * (job->query_bf16 ? 2 : 4);
        float numbers[MOST_CHANNELS], more[PART_PAGES];
        uint8_t own[MOST_CHANNELS];
        struct page_query cut;
        for (int64_t d = 0; d < head_dim; d++) {
            numbers[d] = job->query_bf16 ? from_bf16(((const uint16_t *)query)[d]) : ((const float *)query)[d];
            own[d] = numbers[d] > 0.0f;
        }
        const uint8_t *rising = job->rising ? job->rising + (group * job->rising_rows + r % job->rising_rows) * head_dim : own;
        cut_query(numbers, rising, head_dim, &cut);
        if (!job->best || r == 0) {
            score_pages(&shape, &cut, job->scores + (job->best ? group : row) * job->n_pages + begin);
            continue;
        }
        float *most = job->scores + group * job->n_pages + begin;
        score_pages(&shape, &cut, more);
        for (int64_t i = 0; i < n; i++) /* NaN stays */
            most[i] = more[i] > most[i] || more[i] != more[i] ? more[i] : most[i];
    }
}

/* Products of query [n_groups][n_share][head_dim] with the largest values of each page where `rising` (bytes
   [n_groups][rising_rows][head_dim], or 0: where the query is above 0), with the smallest elsewhere. Bounds: [n_groups],
   `group_stride` elements apart, [n_pages][head_dim]; head_dim <= 256; bf16 or fp32. scores fp32
   [n_groups][n_share][n_pages]; with `best` [n_groups][n_pages], the largest of a group's heads. */
void page_scores(uintptr_t query, int query_bf16, uintptr_t rising, int64_t rising_rows, uintptr_t low, uintptr_t high,
                 int64_t group_stride, int bounds_bf16, int64_t n_groups, int64_t n_share, int64_t n_pages,
                 int64_t head_dim, uintptr_t scores, int best, int n_threads) {
    struct pages_job job = {.query = (const uint8_t *)query, .rising = (const uint8_t *)rising,
                            .low = (const uint8_t *)low, .high = (const uint8_t *)high, .scores = (float *)scores,
                            .group_stride = group_stride, .rising_rows = rising_rows, .n_share = n_share,
                            .n_pages = n_pages, .head_dim = head_dim,
                            .n_parts = (n_pages + PART_PAGES - 1) / PART_PAGES, .query_bf16 = query_bf16,
                            .bounds_bf16 = bounds_bf16, .best = best};
    parallel_chunks(pages_chunk, &job, n_groups * job.n_parts, n_threads);
}

INLINE int below(const int BF16, const void *a, const void *b, int64_t i) {
    float x = BF16 ? from_bf16(((const uint16_t *)a)[i]) : ((const float *)a)[i];
    float y = BF16 ? from_bf16(((const uint16_t *)b)[i]) : ((const float *)b)[i];
    return x < y || x != x;
}

INLINE int above(const int BF16, const void *a, const void *b, int64_t i) {
    float x = BF16 ? from_bf16(((const uint16_t *)a)[i]) : ((const float *)a)[i];
    float y = BF16 ? from_bf16(((const uint16_t *)b)[i]) : ((const float *)b)[i];
    return x > y || x != x;
}

INLINE void widen_bounds(const int BF16, const void *key, void *low, void *high, int64_t head_dim) {
    for (int64_t d = 0; d < head_dim; d++) {
        if (BF16) {
            const uint16_t *from = key;
            uint16_t *least = low, *most = high;
            least[d] = below(1, from, least, d) ? from[d] : least[d];
            most[d] = above(1, from, most, d) ? from[d] : most[d];
        } else {
            const float *from = key;
            float *least = low, *most = high;
            least[d] = below(0, from, least, d) ? from[d] : least[d];
            most[d] = above(0, from, most, d) ? from[d] : most[d];
        }
    }
}

/* Takes `n` keys that stand at [first, first + n) into bounds of pages of `size`; the page of `first`, if it does not
   begin there, is widened. `keys`: the first of them, strides in elements; bounds as in page_scores. NaN stays. */
void pages_extend(uintptr_t keys, int64_t key_group_stride, int64_t key_stride, uintptr_t low, uintptr_t high,
                  int64_t group_stride, int is_bf16, int64_t n_groups, int64_t first, int64_t n, int64_t size,
                  int64_t head_dim) {
    const int64_t item = is_bf16 ? 2 : 4;
    for (int64_t group = 0; group < n_groups; group++)
        for (int64_t i = 0; i < n; i++) {
            const uint8_t *key = (const uint8_t *)keys + (group * key_group_stride + i * key_stride) * item;
            const int64_t at = (group * group_stride + (first + i) / size * head_dim) * item;
            uint8_t *least = (uint8_t *)low + at, *most = (uint8_t *)high + at;
            if ((first + i) % size == 0)
                __builtin_memcpy(least, key, (size_t)(head_dim * item)), __builtin_memcpy(most, key, (size_t)(head_dim * item));
            else if (is_bf16)
                widen_bounds(1, key, least, most, head_dim);
            else
                widen_bounds(0, key, least, most, head_dim);
        }
}

/* positions [n * size] of the tokens of n pages; -1 from `end` on. */
void page_positions(uintptr_t pages_, int64_t n, int64_t size, int64_t end, uintptr_t positions_) {
    const int64_t *pages = (const int64_t *)pages_;
    int64_t *positions = (int64_t *)positions_;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < size; j++) {
            int64_t at = pages[i] * size + j;
            positions[i * size + j] = at < end ? at : -1;
        }
}
