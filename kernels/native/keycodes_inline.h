/* Keys in few bits, ranked and never computed from: tiles of 16 keys whose codes stand side by side, so that one
   instruction serves 16 keys and no sum runs across lanes.

   A tile: words of 32 bits [n_vectors][16 keys], then 16 scales and 16 lows in bf16. A word holds fields of `width`
   bits (2 or 4); field i of its low half belongs to channel 2i of the vector, that of its high half to channel 2i + 1.
   8-bit codes are two fields of 4 bits: a lower one, and a higher one that meets 16 times the query's number. So a key
   is a row of `n_fields` small numbers, its query a row of as many, zeros where the last word is not full. */
#ifndef SESSIOND_KEYCODES_INLINE_H
#define SESSIOND_KEYCODES_INLINE_H

#include <string.h>

#include "native.h"

enum { TILE_KEYS = 16, MOST_FIELDS = 512 };

struct code_shape {
    int64_t head_dim, n_vectors, tile_bytes;
    int bits, width, vector_fields; /* fields of one key in a vector */
};

INLINE struct code_shape code_shape(int64_t head_dim, int bits) {
    struct code_shape shape = {.head_dim = head_dim, .bits = bits, .width = bits == 2 ? 2 : 4};
    shape.vector_fields = 32 / shape.width;
    int64_t n_fields = bits == 8 ? 2 * head_dim : head_dim;
    shape.n_vectors = (n_fields + shape.vector_fields - 1) / shape.vector_fields;
    shape.tile_bytes = shape.n_vectors * 64 + 2 * TILE_KEYS * 2;
    return shape;
}

/* One query head: its numbers by field, in fp32 and as sums of up to three bf16 parts, and their plain sum. */
struct code_query {
    float fields[MOST_FIELDS];
    uint16_t parts[3][MOST_FIELDS];
    float sum, field_sum;
    int n_parts;
};

INLINE void take_query(const struct code_shape *shape, const void *query, int is_bf16, struct code_query *out) {
    int64_t n = shape->n_vectors * shape->vector_fields;
    memset(out->fields, 0, (size_t)n * sizeof out->fields[0]);
    out->sum = 0.0f, out->field_sum = 0.0f, out->n_parts = is_bf16 ? 1 : 3;
    for (int64_t d = 0; d < shape->head_dim; d++) {
        float value = is_bf16 ? from_bf16(((const uint16_t *)query)[d]) : ((const float *)query)[d];
        out->sum += value;
        if (shape->bits == 8)
            out->fields[2 * d] = value, out->fields[2 * d + 1] = 16.0f * value;
        else
            out->fields[d] = value;
    }
    for (int64_t f = 0; f < n; f++) {
        float left = out->fields[f];
        out->field_sum += left;
        for (int part = 0; part < out->n_parts; part++) {
            out->parts[part][f] = to_bf16(left);
            left -= from_bf16(out->parts[part][f]);
        }
    }
}

/* scores[r * stride + k] of one tile's 16 keys. */
INLINE void score_tile_plain(const struct code_shape *shape, const uint8_t *tile, const struct code_query *query,
                             int64_t n_rows, float scaling, float *scores, int64_t stride) {
    const uint32_t *words = (const uint32_t *)tile;
    const uint16_t *scales = (const uint16_t *)(tile + shape->n_vectors * 64), *lows = scales + TILE_KEYS;
    const int n_pairs = shape->vector_fields / 2, width = shape->width;
    const uint32_t mask = (1u << width) - 1;
    for (int64_t r = 0; r < n_rows; r++) {
        float acc[TILE_KEYS] = {0};
        for (int64_t v = 0; v < shape->n_vectors; v++)
            for (int i = 0; i < n_pairs; i++) {
                const float *q = query[r].fields + v * shape->vector_fields + 2 * i;
                for (int k = 0; k < TILE_KEYS; k++) {
                    uint32_t word = words[v * TILE_KEYS + k] >> (i * width);
                    acc[k] += (float)(int)(word & mask) * q[0] + (float)(int)(word >> 16 & mask) * q[1];
                }
            }
        for (int k = 0; k < TILE_KEYS; k++)
            scores[r * stride + k] = (acc[k] * from_bf16(scales[k]) + query[r].sum * from_bf16(lows[k])) * scaling;
    }
}

#if HAVE_X86
/* Field i of both halves as the bf16 numbers 16 + code, or 4 + code of two bits: the code goes into the mantissa. */
INLINE AVX512 __m512bh open_field(const int WIDTH, const int i, __m512i word) {
    const __m512i mask = _mm512_set1_epi16(WIDTH == 4 ? 0x78 : 0x60);
    const __m512i offset = _mm512_set1_epi16(WIDTH == 4 ? 0x4180 : 0x4080);
    const int up = WIDTH == 4 ? 3 - 4 * i : 5 - 2 * i;
    switch (up) { /* shifts take constants */
    case 5: word = _mm512_slli_epi16(word, 5); break;
    case 3: word = _mm512_slli_epi16(word, 3); break;
    case 1: word = _mm512_slli_epi16(word, 1); break;
    case -1: word = _mm512_srli_epi16(word, 1); break;
    case -3: word = _mm512_srli_epi16(word, 3); break;
    case -5: word = _mm512_srli_epi16(word, 5); break;
    case -7: word = _mm512_srli_epi16(word, 7); break;
    default: word = _mm512_srli_epi16(word, 9); break;
    }
    return (__m512bh)_mm512_ternarylogic_epi32(word, mask, offset, 0xEA); /* a & b | c */
}

/* Scores of NT tiles for NR rows; a key's sum is the same for every NT and NR. */
INLINE AVX512 void score_tiles(const int WIDTH, const int NT, const int NR, const struct code_shape *shape,
                               const uint8_t *tiles, const struct code_query *query, float scaling, float *scores,
                               int64_t stride) {
    const int64_t tile_bytes = shape->tile_bytes;
    __m512 acc[4][4];
    for (int r = 0; r < NR; r++)
        for (int t = 0; t < NT; t++)
            acc[r][t] = _mm512_set1_ps((WIDTH == 4 ? -16.0f : -4.0f) * query[r].field_sum);
    for (int part = 0; part < query[0].n_parts; part++)
        for (int64_t v = 0; v < shape->n_vectors; v++) {
            __m512i words[4];
            for (int t = 0; t < NT; t++) words[t] = _mm512_loadu_si512(tiles + t * tile_bytes + v * 64);
#pragma GCC unroll 8
            for (int i = 0; i < 16 / WIDTH; i++) {
                __m512bh pairs[4];
                for (int r = 0; r < NR; r++) {
                    uint32_t pair;
                    memcpy(&pair, query[r].parts[part] + (v * 16 / WIDTH + i) * 2, sizeof pair);
                    pairs[r] = (__m512bh)_mm512_set1_epi32((int)pair);
                }
                for (int t = 0; t < NT; t++) {
                    __m512bh codes = open_field(WIDTH, i, words[t]);
                    for (int r = 0; r < NR; r++) acc[r][t] = _mm512_dpbf16_ps(acc[r][t], codes, pairs[r]);
                }
            }
        }
    for (int t = 0; t < NT; t++) {
        const __m256i *ends = (const __m256i *)(tiles + t * tile_bytes + shape->n_vectors * 64);
        __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(ends)), 16));
        __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(ends + 1)), 16));
        for (int r = 0; r < NR; r++) {
            __m512 score = _mm512_fmadd_ps(acc[r][t], scale, _mm512_mul_ps(low, _mm512_set1_ps(query[r].sum)));
            _mm512_storeu_ps(scores + r * stride + t * TILE_KEYS, _mm512_mul_ps(score, _mm512_set1_ps(scaling)));
        }
    }
}

INLINE AVX512 void score_rows_avx512(const int WIDTH, const int NR, const struct code_shape *shape,
                                     const uint8_t *tiles, int64_t n_tiles, const struct code_query *query,
                                     float scaling, float *scores, int64_t stride) {
    int64_t t = 0;
    for (; t + 4 <= n_tiles; t += 4)
        score_tiles(WIDTH, 4, NR, shape, tiles + t * shape->tile_bytes, query, scaling, scores + t * TILE_KEYS, stride);
    for (; t < n_tiles; t++)
        score_tiles(WIDTH, 1, NR, shape, tiles + t * shape->tile_bytes, query, scaling, scores + t * TILE_KEYS, stride);
}
#endif

/* scores[r * stride + i] of the keys of `n_tiles` whole tiles. In keycodes.c. */
void score_code_tiles(const struct code_shape *shape, const uint8_t *tiles, int64_t n_tiles,
                      const struct code_query *query, int64_t n_rows, float scaling, float *scores, int64_t stride);

#endif
