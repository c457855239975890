/* A chunk in plain C, in fp32 throughout: gcc makes AVX2 of it where it may. Not parsed by cffi. */
#ifndef SESSIOND_CHOSEN_PLAIN_INLINE_H
#define SESSIOND_CHOSEN_PLAIN_INLINE_H

#include "chosen_inline.h"

INLINE void plain_row(const struct source *source, int64_t row, int64_t head_dim, float *out) {
    const uint8_t *bytes = source->rows + row * source->row_bytes;
    if (!source->bits) {
        const uint16_t *exact = (const uint16_t *)bytes;
        for (int64_t d = 0; d < head_dim; d++) out[d] = from_bf16(exact[d]);
        return;
    }
    int64_t bits = source->bits, width = head_dim * bits / 8;
    for (int64_t part = 0; part < 8 / bits; part++)
        for (int64_t i = 0; i < width; i++) out[part * width + i] = (float)(bytes[i] >> part * bits & ((1 << bits) - 1));
    const uint16_t *scales = source->scales + row * 2 * source->n_scales;
    for (int64_t p = 0; p < source->n_scales; p++) {
        float scale = from_bf16(scales[p]), low = from_bf16(scales[source->n_scales + p]);
        int64_t last = (p + 1) * source->group < head_dim ? (p + 1) * source->group : head_dim;
        for (int64_t d = p * source->group; d < last; d++) out[d] = out[d] * scale + low;
    }
}

INLINE float plain_dot(const float *a, const float *b, int64_t n) {
    float acc[TILE] = {0};
    for (int64_t d = 0; d < n; d += TILE)
        for (int i = 0; i < TILE; i++) acc[i] += a[d + i] * b[d + i];
    for (int step = TILE / 2; step; step /= 2)
        for (int i = 0; i < step; i++) acc[i] += acc[i + step];
    return acc[0];
}

/* Scores of one block become weights e^(s - max); returns what earlier sums are to be multiplied by. */
INLINE float plain_soften(float *scores, int64_t n, float *max, float *sum) {
    float best = *max, total = 0.0f;
    for (int64_t j = 0; j < n; j++) {
        if (scores[j] != scores[j]) { /* as in arithmetic: no number makes everything none */
            *sum = NAN;
            return NAN;
        }
        if (scores[j] > best) best = scores[j];
    }
    if (best == -INFINITY) {
        for (int64_t j = 0; j < n; j++) scores[j] = 0.0f;
        return 1.0f;
    }
    for (int64_t j = 0; j < n; j++) total += scores[j] = expf(scores[j] - best);
    float scale = *max == -INFINITY ? 0.0f : expf(*max - best);
    *sum = *sum * scale + total;
    *max = best;
    return scale;
}

INLINE void plain_chunk(const struct chunk *chunk) {
    const int64_t rows = chunk->rows, head_dim = chunk->head_dim, padded = chunk->padded;
    float query[ROWS * MAX_DIM], scores[ROWS * BLOCK], row[MAX_DIM];
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t d = 0; d < head_dim; d++) query[r * head_dim + d] = from_bf16(query_row(chunk, r)[d]);
        for (int64_t d = 0; d < padded; d++) chunk->acc[r * padded + d] = 0.0f;
        chunk->max[r] = -INFINITY, chunk->sum[r] = 0.0f;
    }
    for (int64_t at = chunk->begin; at < chunk->end; at += BLOCK) {
        int64_t n = chunk->end - at < BLOCK ? chunk->end - at : BLOCK;
        for (int64_t j = 0; j < n; j++) {
            int64_t place = row_at(chunk, &chunk->keys, at + j);
            if (place >= 0) plain_row(&chunk->keys, place, head_dim, row);
            for (int64_t r = 0; r < rows; r++)
                scores[r * BLOCK + j] = place < 0 || at + j >= seen_by(chunk, r)
                                            ? -INFINITY
                                            : plain_dot(query + r * head_dim, row, head_dim) * chunk->scaling;
        }
        for (int64_t r = 0; r < rows; r++) {
            float scale = plain_soften(scores + r * BLOCK, n, chunk->max + r, chunk->sum + r);
            for (int64_t d = 0; d < head_dim; d++) chunk->acc[r * padded + d] *= scale;
        }
        for (int64_t j = 0; j < n; j++) {
            int64_t place = row_at(chunk, &chunk->values, at + j);
            if (place < 0) continue;
            plain_row(&chunk->values, place, head_dim, row);
            for (int64_t r = 0; r < rows; r++) {
                if (at + j >= seen_by(chunk, r)) continue;
                float weight = scores[r * BLOCK + j], *acc = chunk->acc + r * padded;
                for (int64_t d = 0; d < head_dim; d++) acc[d] += weight * row[d];
            }
        }
    }
}

#endif
