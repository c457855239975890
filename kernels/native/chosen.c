/* Attention over a set of earlier tokens that are read where they lie, and over the turn's own: grouped heads.

   What is chosen and the turn's own run are cut into parts each; a part of one head group and of up to ROWS rows is a
   chunk, which keeps running maximum, sum and weighted values (online softmax). The chunks of a unit, a head group's
   rows, are joined at the end (flash-decoding, Dao et al. 2023). The cut depends on a span's lengths only: it comes out
   the same alone and beside others, with any number of threads. */
#include "chosen_avx512_inline.h"
#include "chosen_plain_inline.h"

enum { MIN_PART = 128, LONG_PART = 1024, MAX_PARTS = 24 };

struct chosen_job {
    const struct chosen_span *spans;
    float *states;
    int64_t n_spans, n_groups, n_share, head_dim;
    float scaling;
};

INLINE int64_t padded_dim(int64_t head_dim) { return (head_dim + 31) / 32 * 32; }

/* Floats of the state of one of a span's chunks: values, maxima and sums of its rows. */
INLINE int64_t state_floats(int64_t rows, int64_t head_dim) {
    return (rows < ROWS ? rows : ROWS) * (padded_dim(head_dim) + 2);
}

/* A part is a multiple of BLOCK: long ones where there are units enough for every thread. */
INLINE int64_t part_of(int64_t n_keys, int64_t rows) {
    int64_t least = rows > ROWS ? LONG_PART : MIN_PART, even = (n_keys + MAX_PARTS - 1) / MAX_PARTS;
    return (even < least ? least : even + BLOCK - 1) / BLOCK * BLOCK;
}

INLINE int64_t n_parts(int64_t n_keys, int64_t rows) {
    int64_t part = part_of(n_keys, rows);
    return (n_keys + part - 1) / part;
}

INLINE int64_t n_blocks(const struct chosen_span *span, int64_t n_share) {
    return (n_share * span->n_new + ROWS - 1) / ROWS;
}

INLINE int64_t chunks_a_unit(const struct chosen_span *span, int64_t n_share) {
    int64_t rows = n_share * span->n_new;
    return n_parts(span->n_chosen, rows) + n_parts(span->own_end - span->own_start, rows);
}

/* Numbers the chunks of all spans; returns the floats of scratch that attend_chosen_bf16 needs for them. */
int64_t chosen_plan(struct chosen_span *spans, int64_t n_spans, int64_t n_groups, int64_t n_share, int64_t head_dim) {
    int64_t unit = 0, chunk = 0, state = 0;
    for (int64_t i = 0; i < n_spans; i++) {
        spans[i].first_unit = unit, spans[i].first_chunk = chunk, spans[i].first_state = state;
        int64_t units = n_groups * n_blocks(spans + i, n_share), chunks = units * chunks_a_unit(spans + i, n_share);
        unit += units, chunk += chunks, state += chunks * state_floats(n_share * spans[i].n_new, head_dim);
    }
    return state;
}

INLINE const struct chosen_span *span_with(const struct chosen_job *job, int64_t chunk, int64_t unit) {
    int64_t i = job->n_spans - 1; /* few */
    while (i > 0 && (chunk < 0 ? job->spans[i].first_unit > unit : job->spans[i].first_chunk > chunk)) i--;
    return job->spans + i;
}

INLINE struct source source_of(const struct chosen_rows *rows, int64_t group, int64_t head_dim) {
    int64_t bits = rows->bits, row_bytes = bits ? head_dim * bits / 8 : head_dim * 2, size = bits ? rows->group : head_dim;
    struct source source = {(const uint8_t *)rows->rows + group * rows->stride * (bits ? 1 : 2),
                            (const uint16_t *)rows->scales + group * rows->scales_stride,
                            row_bytes, (head_dim + size - 1) / size, bits, size, rows->in_order};
    return source;
}

INLINE struct source own_rows(uintptr_t rows, int64_t stride, int64_t start, int64_t group, int64_t head_dim) {
    struct source source = {(const uint8_t *)rows + 2 * (group * stride + start * head_dim), NULL, 2 * head_dim, 0, 0,
                            head_dim, 1};
    return source;
}

static struct chunk chunk_at(const struct chosen_job *job, int64_t number) {
    const struct chosen_span *span = span_with(job, number, 0);
    const int64_t head_dim = job->head_dim, in_span = number - span->first_chunk, a_unit = chunks_a_unit(span, job->n_share);
    const int64_t unit = in_span / a_unit, group = unit / n_blocks(span, job->n_share);
    const int64_t all_rows = job->n_share * span->n_new, n_own = span->own_end - span->own_start;
    const int64_t first_row = unit % n_blocks(span, job->n_share) * ROWS;
    int64_t part = in_span % a_unit, of_chosen = n_parts(span->n_chosen, all_rows);
    struct chunk chunk = {.query = (const uint16_t *)span->query + group * job->n_share * span->head_stride,
                          .head_stride = span->head_stride, .token_stride = span->token_stride,
                          .rows = all_rows - first_row < ROWS ? all_rows - first_row : ROWS, .first_row = first_row,
                          .n_new = span->n_new, .n_own = n_own, .head_dim = head_dim, .padded = padded_dim(head_dim),
                          .scaling = job->scaling};
    int64_t n_keys = part < of_chosen ? span->n_chosen : n_own;
    if (part < of_chosen) {
        chunk.chosen = span->chosen ? (const int64_t *)span->chosen + group * span->chosen_stride : NULL;
        chunk.keys = source_of(&span->keys, group, head_dim), chunk.values = source_of(&span->values, group, head_dim);
    } else {
        part -= of_chosen, chunk.own = 1;
        chunk.keys = own_rows(span->own_keys, span->own_keys_stride, span->own_start, group, head_dim);
        chunk.values = own_rows(span->own_values, span->own_values_stride, span->own_start, group, head_dim);
    }
    int64_t size = part_of(n_keys, all_rows);
    chunk.begin = part * size;
    chunk.end = chunk.begin + size < n_keys ? chunk.begin + size : n_keys;
    while (chunk.chosen && chunk.end > chunk.begin && chunk.chosen[chunk.end - 1] < 0) chunk.end--;
    chunk.acc = job->states + span->first_state + in_span * state_floats(all_rows, head_dim);
    chunk.max = chunk.acc + chunk.rows * chunk.padded, chunk.sum = chunk.max + chunk.rows;
    return chunk;
}

static void portable_chunk(const struct chunk *chunk) { plain_chunk(chunk); }
#if HAVE_X86
static AVX2 void avx2_chunk(const struct chunk *chunk) { plain_chunk(chunk); }
#endif

static void run_chunk(void *arg, int64_t number) {
    struct chunk chunk = chunk_at(arg, number);
#if HAVE_X86
    if (isa() == ISA_AVX512) {
        avx512_chunk(&chunk);
        return;
    }
    if (isa() == ISA_AVX2) {
        avx2_chunk(&chunk);
        return;
    }
#endif
    portable_chunk(&chunk);
}

/* Joins the chunks of one unit and rounds. */
static void join_unit(void *arg, int64_t number) {
    const struct chosen_job *job = arg;
    const struct chosen_span *span = span_with(job, -1, number);
    const int64_t head_dim = job->head_dim, padded = padded_dim(head_dim), a_unit = chunks_a_unit(span, job->n_share);
    const int64_t unit = number - span->first_unit, group = unit / n_blocks(span, job->n_share);
    const int64_t all_rows = job->n_share * span->n_new, first_row = unit % n_blocks(span, job->n_share) * ROWS;
    const int64_t rows = all_rows - first_row < ROWS ? all_rows - first_row : ROWS, step = state_floats(all_rows, head_dim);
    const float *states = job->states + span->first_state + unit * a_unit * step;
    float joined[MAX_DIM];
    for (int64_t r = 0; r < rows; r++) {
        const float *max = states + rows * padded + r;
        float top = -INFINITY, total = 0.0f;
        for (int64_t p = 0; p < a_unit; p++) top = max[p * step] > top ? max[p * step] : top;
        for (int64_t d = 0; d < head_dim; d++) joined[d] = 0.0f;
        for (int64_t p = 0; p < a_unit; p++) {
            float sum = max[p * step + rows];
            float factor = max[p * step] == -INFINITY && sum == sum ? 0.0f : expf(max[p * step] - top);
            if (sum != sum) factor = NAN;
            total += factor * sum;
            for (int64_t d = 0; d < head_dim; d++) joined[d] += factor * states[p * step + r * padded + d];
        }
        int64_t row = first_row + r, head = group * job->n_share + row / span->n_new;
        uint16_t *out = (uint16_t *)span->out + (row % span->n_new * job->n_groups * job->n_share + head) * head_dim;
        for (int64_t d = 0; d < head_dim; d++) out[d] = to_bf16(joined[d] / total);
    }
}

/* -1: outside of [-1, end); 1: there are -1; 0: neither. positions [n_rows][n], `stride` from row to row. */
int positions_told(uintptr_t positions, int64_t n_rows, int64_t stride, int64_t n, int64_t end) {
    int64_t least = 0, beyond = 0;
    for (int64_t row = 0; row < n_rows; row++) {
        const int64_t *at = (const int64_t *)positions + row * stride;
        for (int64_t i = 0; i < n; i++) least = at[i] < least ? at[i] : least, beyond |= at[i] >= end;
    }
    return least < -1 || beyond ? -1 : least < 0;
}

/* All spans of one step, planned by chosen_plan, whose scratch this is. head_dim % 16 == 0 and at most 256. Returns -1,
   and nothing is computed, if a span's positions are outside of [-1, own_start); else 0. */
int attend_chosen_bf16(const struct chosen_span *spans, int64_t n_spans, int64_t n_groups, int64_t n_share,
                       int64_t head_dim, float scaling, uintptr_t scratch, int n_threads) {
    struct chosen_job job = {spans, (float *)scratch, n_spans, n_groups, n_share, head_dim, scaling};
    for (int64_t i = 0; i < n_spans; i++) {
        int64_t n_rows = spans[i].chosen_stride ? n_groups : 1;
        if (spans[i].chosen && positions_told(spans[i].chosen, n_rows, spans[i].chosen_stride, spans[i].n_chosen, spans[i].own_start) < 0)
            return -1;
    }
    if (n_spans == 0) return 0;
    const struct chosen_span *last = spans + n_spans - 1;
    int64_t units = n_groups * n_blocks(last, n_share), all_units = last->first_unit + units;
    parallel_chunks(run_chunk, &job, last->first_chunk + units * chunks_a_unit(last, n_share), n_threads);
    parallel_chunks(join_unit, &job, all_units, all_units > 4 * n_groups ? n_threads : 1);
    return 0;
}
