/* What the levels of chosen.c share: a chunk of work, and where its rows lie. Not parsed by cffi. */
#ifndef SESSIOND_CHOSEN_INLINE_H
#define SESSIOND_CHOSEN_INLINE_H

#include <math.h>
#include <string.h>

#include "native.h"
#include "chosen.h"

enum { TILE = 16, BLOCK = 128, ROWS = 64, MAX_DIM = 256, MAX_GROUPS = 16 };

/* Rows of one head group. A row of codes is `row_bytes` bytes and 2 * n_scales bf16: scales, then zeros. */
struct source {
    const uint8_t *rows;
    const uint16_t *scales;
    int64_t row_bytes, n_scales, bits, group, in_order;
};

/* Keys [begin, end) of one head group's chosen positions, or of the turn's own run, for `rows` rows: row r is token
   (first_row + r) % n_new. Without `chosen` key i is row i. Leaves acc [rows][padded], max [rows] and sum [rows]. */
struct chunk {
    const int64_t *chosen;
    int own;
    struct source keys, values;
    const uint16_t *query; /* of the head group's first head */
    int64_t head_stride, token_stride;
    int64_t begin, end, rows, first_row, n_new, n_own, head_dim, padded;
    float scaling;
    float *acc, *max, *sum;
};

/* What stands where no position is: finite, so that a weight of 0 makes 0 of it. */
static const uint16_t no_row[MAX_DIM];

/* The row that is the i-th key of a chunk's axis; -1: none. */
INLINE int64_t row_at(const struct chunk *chunk, const struct source *source, int64_t i) {
    if (i >= chunk->end) return -1;
    if (!chunk->chosen) return i;
    if (chunk->chosen[i] < 0) return -1;
    return source->in_order ? i : chunk->chosen[i];
}

/* Keys of its own run that row r sees, counted from the run's start; all chosen ones. */
INLINE int64_t seen_by(const struct chunk *chunk, int64_t r) {
    return !chunk->own ? chunk->end : chunk->n_own - chunk->n_new + (chunk->first_row + r) % chunk->n_new + 1;
}

INLINE const uint16_t *query_row(const struct chunk *chunk, int64_t r) {
    int64_t row = chunk->first_row + r;
    return chunk->query + row / chunk->n_new * chunk->head_stride + row % chunk->n_new * chunk->token_stride;
}

#endif
