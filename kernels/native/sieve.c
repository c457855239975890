/* One step of sieve: estimated weights of all tokens by their codes, and the fewest earlier ones that hold the mass.

   Keys are scored in parts, each part and head with a maximum of its own (online softmax), joined when a group's
   weights are summed. The cut depends on lengths only, never on threads. Of a group's weights only the `most` heaviest
   are kept, and looked at again when all groups are known: the count is one for all. */
#include "keycodes_inline.h"
#include "select_inline.h"
#include "sieve.h"
#include "softmax_inline.h"

enum { PART = 1024 };

struct sieve_job {
    const uint8_t *tiles;
    const uint16_t *prior; /* fp16 [n_groups][prior_stride], or NULL */
    struct code_shape shape;
    struct code_query *query;
    float *scores, *states;
    uint32_t *bits, *room;
    int32_t *heaviest;
    int64_t *needed;
    void (*select)(const uint32_t *bits, int64_t n, int64_t k, uint32_t *room, int32_t *positions);
    int64_t tile_group_stride, prior_stride, n_prior, n_share, n, n_parts, n_earlier, kept;
    float scaling, tie, nothing;
    double mass;
};

/* With room for the whole vectors that are written beyond the end. */
static int64_t padded(int64_t n) { return (n + 31) / 16 * 16; }
static int64_t parts_of(int64_t n) { return (n + PART - 1) / PART; }

/* Words of 32 bits that sieve_choose needs. */
int64_t sieve_room(int64_t n_groups, int64_t n_share, int64_t n, int64_t most) {
    int64_t row = (int64_t)sizeof(struct code_query) / 4 + padded(n) + 2 * parts_of(n);
    return n_groups * (n_share * row + 2 * padded(n) + padded(most) + 2);
}

/* Not below 0, and no infinity. */
INLINE float from_half(uint16_t half) {
    union { uint32_t bits; float value; } word = {(uint32_t)half << 13};
    return word.value * 0x1p112f; /* the exponents' biases differ by 112 */
}

/* e^(score - max) of one part of one group's keys, and max and sum of each head. */
INLINE void weigh_part(const struct sieve_job *job, int64_t chunk) {
    const int64_t group = chunk / job->n_parts, part = chunk % job->n_parts, row = group * job->n_share;
    const int64_t begin = part * PART, n = job->n - begin < PART ? job->n - begin : PART, stride = padded(job->n);
    const uint8_t *tiles = job->tiles + group * job->tile_group_stride + begin / TILE_KEYS * job->shape.tile_bytes;
    float *scores = job->scores + row * stride + begin;
    score_code_tiles(&job->shape, tiles, (n + TILE_KEYS - 1) / TILE_KEYS, job->query + row, job->n_share, job->scaling,
                     scores, stride);
    for (int64_t r = 0; r < job->n_share; r++) {
        float *state = job->states + ((row + r) * job->n_parts + part) * 2;
        state[0] = row_max(scores + r * stride, n);
        state[1] = soften(scores + r * stride, n, state[0] == -INFINITY ? 0.0f : state[0]);
    }
}

/* What a head's parts are multiplied by takes the place of their maxima; NaN where softmax is. */
INLINE void part_factors(const struct sieve_job *job, float *state) {
    float top = -INFINITY, total = 0.0f;
    for (int64_t p = 0; p < job->n_parts; p++)
        if (state[2 * p] > top || state[2 * p] != state[2 * p]) top = state[2 * p];
    for (int64_t p = 0; p < job->n_parts; p++) {
        state[2 * p] = state[2 * p] == -INFINITY && top > -INFINITY ? 0.0f : expf(state[2 * p] - top);
        total += state[2 * p] * state[2 * p + 1];
    }
    for (int64_t p = 0; p < job->n_parts; p++) state[2 * p] /= total * (float)job->n_share;
}

/* The mean of a group's heads, in the place of the first head's row. */
INLINE float *join_heads(const struct sieve_job *job, int64_t group) {
    const int64_t row = group * job->n_share, stride = padded(job->n);
    float *weights = job->scores + row * stride, *states = job->states + row * job->n_parts * 2;
    for (int64_t r = 0; r < job->n_share; r++) part_factors(job, states + r * job->n_parts * 2);
    for (int64_t p = 0; p < job->n_parts; p++) {
        const int64_t begin = p * PART, n = job->n - begin < PART ? job->n - begin : PART;
        float *to = weights + begin;
        for (int64_t i = 0; i < n; i++) to[i] *= states[2 * p];
        for (int64_t r = 1; r < job->n_share; r++) {
            const float *from = to + r * stride, factor = states[(r * job->n_parts + p) * 2];
            for (int64_t i = 0; i < n; i++) to[i] += from[i] * factor;
        }
    }
    return weights;
}

INLINE void weigh_prior(const struct sieve_job *job, int64_t group, float *weights) {
    const uint16_t *prior = job->prior + group * job->prior_stride;
    for (int64_t i = 0; i < job->n_earlier; i++) {
        float known = i < job->n_prior ? from_half(prior[i]) : 1.0f;
        known = known > 1.0f ? 1.0f : known;
        weights[i] = weights[i] * (1.0f + job->tie * known) + job->nothing * known;
    }
}

/* The sum of those of weights[n] that are at least `least`, by 16 lanes. */
INLINE double sum_from(const float *weights, int64_t n, float least) {
    float sums[16] = {0};
    double total = 0.0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) sums[j] += weights[i + j] >= least ? weights[i + j] : 0.0f;
    for (; i < n; i++) total += weights[i] >= least ? weights[i] : 0.0f;
    for (int j = 0; j < 16; j++) total += sums[j];
    return total;
}

/* How many of the heaviest of weights[n] hold `wanted` together, one for nothing, n + 1 where all do not. */
INLINE int64_t count_for(const float *weights, int64_t n, double wanted) {
    if (!(wanted > 0.0)) return 1; /* NaN too: no sum would reach it */
    if (!(sum_from(weights, n, 0.0f) >= wanted)) return n + 1;
    union { uint32_t bits; float value; } found = {0}, more;
    for (int bit = 30; bit >= 0; bit--) { /* the largest bound from which they hold it */
        more.bits = found.bits | 1u << bit;
        if (more.bits < 0x7F800000u && sum_from(weights, n, more.value) >= wanted) found = more;
    }
    int64_t above = 0;
    double held = 0.0;
    for (int64_t i = 0; i < n; i++)
        if (weights[i] > found.value) above++, held += weights[i];
    double left = found.value > 0.0f ? ceil((wanted - held) / found.value) : 1.0;
    return above + (left < 1.0 ? 1 : (int64_t)left);
}

/* A group's heaviest earlier tokens, and how many of them it needs. */
INLINE void sift_group(const struct sieve_job *job, int64_t group) {
    const int64_t n = job->n_earlier, kept = job->kept;
    uint32_t *bits = job->bits + group * padded(job->n), *room = job->room + group * padded(job->n);
    int32_t *heaviest = job->heaviest + group * padded(kept);
    float *weights = join_heads(job, group), *held = (float *)room;
    double own = sum_from(weights + n, job->n - n, 0.0f);
    for (int64_t i = n; i < job->n; i++) own += weights[i] != weights[i] ? NAN : 0.0;
    if (job->prior) weigh_prior(job, group, weights);
    order_bits(weights, n, bits);
    job->select(bits, n, kept, room, heaviest);
    for (int64_t i = 0; i < kept; i++) held[i] = weights[heaviest[i]];
    job->needed[group] = count_for(held, kept, job->mass - own);
    for (int64_t i = 0; i < kept; i++) bits[i] = bits[heaviest[i]]; /* ascending: never overwritten before it is read */
}

/* The `count` heaviest of those kept. */
static void take_heaviest(const struct sieve_job *job, int64_t group, int64_t count, int64_t *positions) {
    const int32_t *heaviest = job->heaviest + group * padded(job->kept);
    uint32_t *bits = job->bits + group * padded(job->n), *room = job->room + group * padded(job->n);
    int32_t *taken = (int32_t *)(job->scores + group * job->n_share * padded(job->n));
    job->select(bits, job->kept, count, room, taken);
    for (int64_t i = 0; i < count; i++) positions[i] = heaviest[taken[i]];
}

static void select_plain(const uint32_t *bits, int64_t n, int64_t k, uint32_t *room, int32_t *positions) {
    select_largest(bits, n, k, room, positions);
}
static void weigh_chunk(void *arg, int64_t chunk) { weigh_part(arg, chunk); }
static void sift_chunk(void *arg, int64_t group) { sift_group(arg, group); }
#if HAVE_X86
static AVX2 void select_avx2(const uint32_t *bits, int64_t n, int64_t k, uint32_t *room, int32_t *positions) {
    select_largest(bits, n, k, room, positions);
}
static AVX2 void weigh_chunk_avx2(void *arg, int64_t chunk) { weigh_part(arg, chunk); }
static AVX2 void sift_chunk_avx2(void *arg, int64_t group) { sift_group(arg, group); }
static AVX512 void select_avx512(const uint32_t *bits, int64_t n, int64_t k, uint32_t *room, int32_t *positions) {
    select_largest_avx512(bits, n, k, room, positions);
}
static AVX512 void weigh_chunk_avx512(void *arg, int64_t chunk) { weigh_part(arg, chunk); }
static AVX512 void sift_chunk_avx512(void *arg, int64_t group) { sift_group(arg, group); }
#endif

/* Cuts `room` up, and reads the queries. */
static void lay_out(struct sieve_job *job, const uint8_t *query, int is_bf16, int64_t n_groups, void *room) {
    const int64_t rows = n_groups * job->n_share, size = is_bf16 ? 2 : 4;
    job->needed = room;
    job->query = (struct code_query *)(job->needed + n_groups);
    job->scores = (float *)(job->query + rows);
    job->states = job->scores + rows * padded(job->n);
    job->bits = (uint32_t *)(job->states + rows * job->n_parts * 2);
    job->room = job->bits + n_groups * padded(job->n);
    job->heaviest = (int32_t *)(job->room + n_groups * padded(job->n));
    for (int64_t row = 0; row < rows; row++)
        take_query(&job->shape, query + row * job->shape.head_dim * size, is_bf16, job->query + row);
}

/* Of the first `n_earlier` of n keys the positions [n_groups][K] that one query, [n_groups][n_share][head_dim] bf16 or
   fp32, needs for `mass`; returns K. `prior` fp16, n_prior numbers in rows of prior_stride, or 0: what differs by less
   than the share `tie`, or weighs less than `nothing`, is ordered by it. `positions` has room for n_groups * most;
   `room`: sieve_room() words, 8-byte aligned. 0 <= n_earlier <= n, n > 0, 1 <= least <= most; head_dim <= 256. */
int64_t sieve_choose(uintptr_t tiles, int64_t tile_group_stride, uintptr_t query, int is_bf16, int64_t n_groups,
                     int64_t n_share, int64_t head_dim, int bits, int64_t n, int64_t n_earlier, float scaling,
                     uintptr_t prior, int64_t prior_stride, int64_t n_prior, float tie, float nothing, double mass,
                     int64_t least, int64_t most, uintptr_t positions, uintptr_t room, int n_threads) {
    struct sieve_job job = {.tiles = (const uint8_t *)tiles, .prior = (const uint16_t *)prior,
                            .shape = code_shape(head_dim, bits), .tile_group_stride = tile_group_stride,
                            .prior_stride = prior_stride, .n_prior = n_prior, .n_share = n_share, .n = n,
                            .n_parts = parts_of(n), .n_earlier = n_earlier, .kept = n_earlier < most ? n_earlier : most,
                            .scaling = scaling, .tie = tie, .nothing = nothing, .mass = mass, .select = select_plain};
    chunk_fn weigh = weigh_chunk, sift = sift_chunk;
#if HAVE_X86
    if (isa() == ISA_AVX512) weigh = weigh_chunk_avx512, sift = sift_chunk_avx512, job.select = select_avx512;
    else if (isa() == ISA_AVX2) weigh = weigh_chunk_avx2, sift = sift_chunk_avx2, job.select = select_avx2;
#endif
    lay_out(&job, (const uint8_t *)query, is_bf16, n_groups, (void *)room);
    parallel_chunks(weigh, &job, n_groups * job.n_parts, n_threads);
    parallel_chunks(sift, &job, n_groups, n_threads);
    int64_t count = 1;
    for (int64_t group = 0; group < n_groups; group++)
        if (job.needed[group] > count) count = job.needed[group];
    count = (count + 15) / 16 * 16;
    count = count > most ? most : count < least ? least : count;
    if (count > n_earlier) count = n_earlier;
    for (int64_t group = 0; group < n_groups; group++)
        take_heaviest(&job, group, count, (int64_t *)positions + group * count);
    return count;
}
