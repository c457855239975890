/* The k best positions of rows of scores, and whether positions lie where they may. */
#include "select_inline.h"
#include "select.h"

struct select_job {
    const float *scores;
    int64_t *positions;
    uint32_t *room;
    int64_t stride, n, k;
};

/* A row's share of `room`: its bits, room to search in, positions. */
static int64_t row_room(int64_t n) { return 3 * (n + 16); }

INLINE void widen(const int32_t *positions, int64_t k, int64_t *out) {
    for (int64_t i = 0; i < k; i++) out[i] = positions[i];
}

INLINE void select_row(const struct select_job *job, int64_t row) {
    uint32_t *bits = job->room + row * row_room(job->n), *room = bits + job->n + 16;
    int32_t *found = (int32_t *)(room + job->n + 16);
    order_bits(job->scores + row * job->stride, job->n, bits);
    select_largest(bits, job->n, job->k, room, found);
    widen(found, job->k, job->positions + row * job->k);
}

static void select_chunk(void *arg, int64_t row) { select_row(arg, row); }
#if HAVE_X86
static AVX2 void select_chunk_avx2(void *arg, int64_t row) { select_row(arg, row); }

static AVX512 void select_chunk_avx512(void *arg, int64_t row) {
    const struct select_job *job = arg;
    uint32_t *bits = job->room + row * row_room(job->n), *room = bits + job->n + 16;
    int32_t *found = (int32_t *)(room + job->n + 16);
    order_bits(job->scores + row * job->stride, job->n, bits);
    select_largest_avx512(bits, job->n, job->k, room, found);
    widen(found, job->k, job->positions + row * job->k);
}
#endif

/* positions [n_rows][k] int64: of the k largest of each row of scores [n_rows][n] fp32, ascending; of equal ones the
   earlier; NaN counts as -inf. 0 <= k <= n < 2^31. `room`: n_rows * 3 * (n + 16) words of 32 bits. */
void select_top(uintptr_t scores, int64_t stride, int64_t n_rows, int64_t n, int64_t k, uintptr_t positions,
                uintptr_t room, int n_threads) {
    struct select_job job = {(const float *)scores, (int64_t *)positions, (uint32_t *)room, stride, n, k};
    chunk_fn fn = select_chunk;
#if HAVE_X86
    if (isa() == ISA_AVX512) fn = select_chunk_avx512;
    else if (isa() == ISA_AVX2) fn = select_chunk_avx2;
#endif
    parallel_chunks(fn, &job, n_rows, n_rows * n < 16384 ? 1 : n_threads);
}
