/* RocketKV's stage 2 (arXiv 2502.14051): the best tokens of a turn set, by pages' bounds in the strongest channels. */
#include "pages_inline.h"
#include "rocket.h"
#include "select_inline.h"
#include "softmax_inline.h"

struct rocket_job {
    const uint8_t *query, *low, *high;
    int64_t *chosen;
    float *room;
    int64_t group_stride, n_share, head_dim, n_tokens, n_pages, page_size, n_set, n_channels, n_chosen;
    float scaling;
    int query_bf16, bounds_bf16;
};

static int64_t padded(int64_t n) { return (n + 31) / 16 * 16; }

/* Words of 32 bits of one group: a head's scores, their sums over heads, and by token bits, room and positions. */
static int64_t group_room(int64_t n_pages, int64_t page_size) {
    return 2 * padded(n_pages) + 3 * padded(n_pages * page_size);
}

int64_t rocket_room(int64_t n_groups, int64_t n_pages, int64_t page_size) {
    return n_groups * group_room(n_pages, page_size);
}

/* The channels in which a group's heads are strongest together keep their numbers, the others become 0. */
INLINE void keep_strongest(const struct rocket_job *job, const float *query, uint8_t *used, uint8_t *rising) {
    float strength[MOST_CHANNELS];
    uint32_t bits[MOST_CHANNELS], room[MOST_CHANNELS + 16];
    int32_t strongest[MOST_CHANNELS + 16];
    for (int64_t d = 0; d < job->head_dim; d++) {
        float sum = 0.0f, total = 0.0f;
        for (int64_t r = 0; r < job->n_share; r++) {
            sum += query[r * job->head_dim + d];
            total += fabsf(query[r * job->head_dim + d]);
        }
        strength[d] = total, rising[d] = sum > 0.0f, used[d] = 0;
    }
    order_bits(strength, job->head_dim, bits);
    select_largest(bits, job->head_dim, job->n_channels, room, strongest);
    for (int64_t i = 0; i < job->n_channels; i++) used[strongest[i]] = 1;
}

/* totals[page] += a head's weight of each token of the page: softmax over tokens. */
INLINE void add_head(const struct rocket_job *job, const struct page_shape *shape, const float *query,
                     const uint8_t *used, const uint8_t *rising, float *scores, float *totals) {
    const int64_t n_pages = job->n_pages, last = job->n_tokens - (n_pages - 1) * job->page_size;
    float partial[MOST_CHANNELS], whole = 0.0f, left = 0.0f;
    struct page_query cut;
    for (int64_t d = 0; d < job->head_dim; d++) {
        partial[d] = used[d] ? query[d] : 0.0f;
        whole += fabsf(query[d]), left += fabsf(partial[d]);
    }
    /* SparQ (arXiv 2312.04985): fewer channels give smaller products; divide by the share that is left */
    float share = left / (whole < 1e-30f ? 1e-30f : whole);
    float scaling = job->scaling / sqrtf(share < 1e-30f ? 1e-30f : share);
    cut_query(partial, rising, job->head_dim, &cut);
    score_pages(shape, &cut, scores);
    for (int64_t p = 0; p < n_pages; p++) scores[p] *= scaling;
    float sum = soften(scores, n_pages, row_max(scores, n_pages));
    sum = sum * (float)job->page_size - scores[n_pages - 1] * (float)(job->page_size - last);
    for (int64_t p = 0; p < n_pages; p++) totals[p] += scores[p] / sum;
}

INLINE void choose_group(const struct rocket_job *job, int64_t group) {
    const int64_t head_dim = job->head_dim, offset = group * job->group_stride * (job->bounds_bf16 ? 2 : 4);
    const struct page_shape shape = {job->low + offset, job->high + offset, job->n_pages, head_dim, job->bounds_bf16,
                                     job->query_bf16};
    float *scores = job->room + group * group_room(job->n_pages, job->page_size), *totals = scores + padded(job->n_pages);
    uint32_t *bits = (uint32_t *)(totals + padded(job->n_pages)), *room = bits + padded(job->n_pages * job->page_size);
    int32_t *found = (int32_t *)(room + padded(job->n_pages * job->page_size));
    float query[16 * MOST_CHANNELS];
    uint8_t used[MOST_CHANNELS], rising[MOST_CHANNELS];
    const int64_t first = group * job->n_share * head_dim;
    for (int64_t i = 0; i < job->n_share * head_dim; i++)
        query[i] = job->query_bf16 ? from_bf16(((const uint16_t *)job->query)[first + i]) : ((const float *)job->query)[first + i];
    keep_strongest(job, query, used, rising);
    for (int64_t p = 0; p < job->n_pages; p++) totals[p] = 0.0f;
    for (int64_t r = 0; r < job->n_share; r++) add_head(job, &shape, query + r * head_dim, used, rising, scores, totals);
    for (int64_t t = 0; t < job->n_set; t++) bits[t] = ordered_bits(totals[t / job->page_size]);
    select_largest(bits, job->n_set, job->n_chosen, room, found);
    for (int64_t i = 0; i < job->n_chosen; i++) job->chosen[group * job->n_chosen + i] = found[i];
}

static void choose_chunk(void *arg, int64_t group) { choose_group(arg, group); }
#if HAVE_X86
static AVX2 void choose_chunk_avx2(void *arg, int64_t group) { choose_group(arg, group); }
static AVX512 void choose_chunk_avx512(void *arg, int64_t group) { choose_group(arg, group); }
#endif

/* chosen [n_groups][n_chosen], ascending: which of the first `n_set` of n_tokens tokens in pages of `page_size` weigh most
   for query [n_groups][n_share][head_dim], a group's heads summed, estimated in n_channels channels. Bounds as in
   page_scores; n_share <= 16, head_dim <= 256, 0 < n_chosen <= n_set <= n_tokens. `room`: rocket_room() words. */
void rocket_choose(uintptr_t query, int query_bf16, uintptr_t low, uintptr_t high, int64_t group_stride,
                   int bounds_bf16, int64_t n_groups, int64_t n_share, int64_t head_dim, int64_t n_tokens,
                   int64_t page_size, int64_t n_set, int64_t n_channels, int64_t n_chosen, float scaling,
                   uintptr_t chosen, uintptr_t room, int n_threads) {
    struct rocket_job job = {.query = (const uint8_t *)query, .low = (const uint8_t *)low, .high = (const uint8_t *)high,
                             .chosen = (int64_t *)chosen, .room = (float *)room, .group_stride = group_stride,
                             .n_share = n_share, .head_dim = head_dim, .n_tokens = n_tokens,
                             .n_pages = (n_tokens + page_size - 1) / page_size, .page_size = page_size, .n_set = n_set,
                             .n_channels = n_channels, .n_chosen = n_chosen, .scaling = scaling,
                             .query_bf16 = query_bf16, .bounds_bf16 = bounds_bf16};
    chunk_fn fn = choose_chunk;
#if HAVE_X86
    if (isa() == ISA_AVX512) fn = choose_chunk_avx512;
    else if (isa() == ISA_AVX2) fn = choose_chunk_avx2;
#endif
    parallel_chunks(fn, &job, n_groups, n_threads);
}
