/* Keys of low rank, back at their positions (ShadowKV, Sun et al. 2024, arXiv 2410.21465; rotation: Su et al. 2021).

   The product is that of matrix.c: a token's coordinates are a row, a group's basis the weight. Plain keys never reach
   memory. */
#include <string.h>

#include "lowrank.h"
#include "product_inline.h"

enum { TOGETHER = 8, MOST_DIM = 256, MOST_RANK = 1024 };

INLINE void rotated(const struct low_rank *job, const float *plain, const float *mean, int64_t position, uint16_t *out) {
    const int64_t half = job->half;
    const float *cosines = (const float *)job->angles + position * half;
    const float *sines = cosines + job->n_angles * half;
    for (int64_t i = 0; i < half; i++) {
        float first = plain[i] + mean[i], second = plain[half + i] + mean[half + i];
        out[i] = to_bf16(first * cosines[i] - second * sines[i]);
        out[half + i] = to_bf16(second * cosines[i] + first * sines[i]);
    }
    for (int64_t i = 2 * half; i < job->head_dim; i++) out[i] = to_bf16(plain[i] + mean[i]);
}

INLINE void low_rank_chunk(void *arg, int64_t chunk) {
    const struct low_rank *job = arg;
    const int64_t blocks = (job->n_chosen + TOGETHER - 1) / TOGETHER, dim = job->head_dim;
    const int64_t group = chunk / blocks, first = chunk % blocks * TOGETHER;
    const int64_t *positions = (const int64_t *)job->positions + group * job->n_chosen;
    const uint8_t *exact = (const uint8_t *)job->exact + group * job->n_chosen;
    const uint16_t *keys = (const uint16_t *)job->keys + group * job->group_stride;
    const float *mean = (const float *)job->mean + group * dim;
    uint16_t *out = (uint16_t *)job->out + group * job->n_chosen * dim, rows[TOGETHER * MOST_RANK];
    float plain[TOGETHER * MOST_DIM];
    int64_t wanted[TOGETHER];
    int n = 0;
    for (int64_t k = first; k < first + TOGETHER && k < job->n_chosen; k++) {
        if (exact[k]) {
            memcpy(out + k * dim, keys + positions[k] * dim, (size_t)dim * 2);
            continue;
        }
        memcpy(rows + n * job->rank, (const uint16_t *)job->coordinates + positions[k] * job->rank, (size_t)job->rank * 2);
        wanted[n++] = k;
    }
    if (!n) return;
    few_rows_product(job->bases + group, rows, n, plain);
    for (int i = 0; i < n; i++) rotated(job, plain + i * dim, mean, positions[wanted[i]], out + wanted[i] * dim);
}
EACH_LEVEL(low_rank_chunk)

int low_rank_keys(const struct low_rank *job, int n_threads) {
    const int64_t *positions = (const int64_t *)job->positions;
    if (job->head_dim > MOST_DIM || job->rank > MOST_RANK || job->rank % BLOCK) return -1;
    for (int64_t i = 0; i < job->n_groups * job->n_chosen; i++)
        if (positions[i] < 0 || positions[i] >= job->n || positions[i] >= job->n_angles) return -1;
    int64_t blocks = (job->n_chosen + TOGETHER - 1) / TOGETHER;
    parallel_chunks(AT_LEVEL(low_rank_chunk), (void *)job, job->n_groups * blocks, n_threads);
    return 0;
}
