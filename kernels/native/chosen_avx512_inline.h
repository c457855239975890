/* A chunk with AVX-512 and bf16 products. Not parsed by cffi.

   Keys are turned in tiles of 16, so that one instruction serves 16 keys; rows are read where they lie. Codes become bf16
   numbers about zero, which is exact, and meet their scale afterwards: in scores by a multiplication for each key and
   group of channels, in values by the weight, which is rounded with it once. */
#ifndef SESSIOND_CHOSEN_AVX512_INLINE_H
#define SESSIOND_CHOSEN_AVX512_INLINE_H

#include "chosen_inline.h"
#include "lanes_inline.h"

#if HAVE_X86

enum { AT_ONCE = 8, AHEAD = 3 }; /* rows whose weights are held at a time; tiles that are fetched ahead */

/* Rows of one block as bytes, and if they are codes the scale and zero of each group of channels and key. */
struct block {
    const uint8_t *rows[BLOCK];
    _Alignas(64) float scale[MAX_GROUPS][BLOCK], low[MAX_GROUPS][BLOCK];
};

struct room {
    struct block keys, values;
    _Alignas(64) float scores[ROWS * BLOCK];
    _Alignas(64) uint16_t query[ROWS * MAX_DIM], weights[AT_ONCE * BLOCK];
    _Alignas(64) uint16_t wide[BLOCK * MAX_DIM]; /* values of codes */
    float query_sums[ROWS * MAX_GROUPS];
    int64_t places[BLOCK]; /* -1: none */
    uint16_t hidden[BLOCK / TILE];
};

/* e^x for x <= 0, relative error below 2e-7; exactly 0 below -87 and for -inf. */
INLINE AVX512 __m512 exp_of(__m512 x) {
    __mmask16 alive = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_GT_OQ);
    __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f));
    __m512 whole = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    /* x - whole * ln 2 in two steps: the first product is exact */
    __m512 f = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), x);
    f = _mm512_fnmadd_ps(whole, _mm512_set1_ps(-2.12194440e-4f), f);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(alive, p, whole);
}

/* bf16 of -8 .. 7 and of -2 .. 1: the lower bits of a word choose, whatever else its lower five hold. */
static const uint16_t table_of_4[32] = {
    0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0,
    0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0};
static const uint16_t table_of_2[32] = {
    0xC000, 0xBF80, 0, 0x3F80, 0xC000, 0xBF80, 0, 0x3F80, 0xC000, 0xBF80, 0, 0x3F80, 0xC000, 0xBF80, 0, 0x3F80,
    0xC000, 0xBF80, 0, 0x3F80, 0xC000, 0xBF80, 0, 0x3F80, 0xC000, 0xBF80, 0, 0x3F80, 0xC000, 0xBF80, 0, 0x3F80};

INLINE AVX512 __m512i code_table(int64_t bits) { return _mm512_loadu_si512(bits == 2 ? table_of_2 : table_of_4); }

/* Where the keys [at, at + n) of a chunk stand, n whole tiles, and which of them do not exist. */
INLINE AVX512 void find_places(const struct chunk *chunk, int64_t at, int64_t n, struct room *room) {
    const __m512i none = _mm512_set1_epi64(-1), lanes = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    uint8_t *hidden = (uint8_t *)room->hidden;
    for (int64_t j = 0; j < n; j += 8) {
        int64_t left = chunk->end - at - j;
        __mmask8 there = left >= 8 ? 0xFF : left <= 0 ? 0 : (__mmask8)((1 << left) - 1);
        __m512i places = chunk->chosen ? _mm512_mask_loadu_epi64(none, there, chunk->chosen + at + j)
                                       : _mm512_mask_add_epi64(none, there, lanes, _mm512_set1_epi64(at + j));
        _mm512_storeu_si512(room->places + j, places);
        hidden[j / 8] = _mm512_movepi64_mask(places);
    }
}

/* Addresses of the rows at those places, `row_bytes` each, no_row for those that do not exist. */
INLINE AVX512 void find_rows(const struct chunk *chunk, const struct room *room, const struct source *source, const void *base,
                             int64_t row_bytes, int64_t at, int64_t n, const uint8_t **rows) {
    const int gathered = chunk->chosen && !source->in_order;
    const __m512i lanes = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), each = _mm512_set1_epi64(row_bytes);
    const __m512i start = _mm512_set1_epi64((int64_t)base), nowhere = _mm512_set1_epi64((int64_t)no_row);
    __m512i next = _mm512_add_epi64(_mm512_mul_epu32(_mm512_add_epi64(lanes, _mm512_set1_epi64(at)), each), start);
    for (int64_t j = 0; j < n; j += 8) {
        __m512i places = _mm512_loadu_si512(room->places + j);
        __m512i address = gathered ? _mm512_add_epi64(_mm512_mul_epu32(places, each), start) : next;
        _mm512_storeu_si512(rows + j, _mm512_mask_mov_epi64(address, _mm512_movepi64_mask(places), nowhere));
        next = _mm512_add_epi64(next, _mm512_slli_epi64(each, 3));
    }
}

/* 32 bits at a time of 16 rows of `n` of them, turned: lane j of out[i] is row j's. `ascending`: they stand in order. */
INLINE AVX512 void turn_words(const uint8_t *const *rows, int64_t n, int ascending, __m512i *out) {
    __m512i in[16];
    if (ascending && n <= 2 && rows[15] - rows[0] == 15 * 4 * n) { /* one behind the other */
        in[0] = _mm512_loadu_si512(rows[0]), in[1] = _mm512_loadu_si512(rows[0] + (n - 1) * 64);
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        out[0] = n == 1 ? in[0] : _mm512_permutex2var_epi32(in[0], even, in[1]);
        if (n == 2) out[1] = _mm512_permutex2var_epi32(in[0], _mm512_add_epi32(even, _mm512_set1_epi32(1)), in[1]);
        return;
    }
    for (int j = 0; j < TILE; j++) in[j] = _mm512_maskz_loadu_epi32((__mmask16)(n >= 16 ? 0xFFFF : (1 << n) - 1), rows[j]);
    transpose16(in, out);
}

/* Scale and zero of each key become rows of lanes; the zero moves with the codes, which are taken about 0. */
INLINE AVX512 void spread_scales(const struct chunk *chunk, const struct room *room, const struct source *source, int64_t at,
                                 int64_t count, struct block *block) {
    const int64_t n = source->n_scales;
    const uint8_t *rows[BLOCK];
    const __m512 half = _mm512_set1_ps((float)(1 << (source->bits - 1)));
    find_rows(chunk, room, source, source->scales, 4 * n, at, count, rows);
    for (int64_t j = 0; j < count; j += TILE) {
        __m512i turned[16];
        __m512 words[2 * MAX_GROUPS];
        turn_words(rows + j, n, !chunk->chosen, turned); /* chosen ones may come in any order */
        for (int64_t i = 0; i < n; i++) {
            words[2 * i] = _mm512_castsi512_ps(_mm512_slli_epi32(turned[i], 16));
            words[2 * i + 1] = _mm512_castsi512_ps(_mm512_and_si512(turned[i], _mm512_set1_epi32((int)0xFFFF0000)));
        }
        for (int64_t p = 0; p < n; p++) {
            _mm512_store_ps(block->scale[p] + j, words[p]);
            _mm512_store_ps(block->low[p] + j, _mm512_fmadd_ps(words[p], half, words[n + p]));
        }
    }
}

/* The same codes of 16 keys, of channels 4 i .. 4 i + 3 in lane j, as bf16: channels (0, 2) and (1, 3) in pairs. */
INLINE AVX512 void pairs_of_bytes(__m512i codes, __m512i *pairs) {
    __m512i bytes = _mm512_xor_si512(codes, _mm512_set1_epi32((int)0x80808080));
    __m512i numbers[4];
    for (int i = 0; i < 4; i++)
        numbers[i] = (__m512i)_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(bytes, (unsigned)(24 - 8 * i)), 24));
    for (int i = 0; i < 2; i++)
        pairs[i] = _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(numbers[i], 16), numbers[2 + i]);
}

INLINE AVX512 void turn_codes(const int BITS, const uint8_t *const *rows, int64_t head_dim, __m512i table, __m512i *tile) {
    const int64_t width = head_dim * BITS / 8;
    for (int64_t i = 0; i < width; i += 64) {
        __m512i in[16], codes[16];
        int64_t n = width - i < 64 ? (width - i) / 4 : 16;
        for (int j = 0; j < TILE; j++) in[j] = _mm512_maskz_loadu_epi32((__mmask16)((1 << n) - 1), rows[j] + i);
        transpose16(in, codes);
        for (int64_t w = 0; w < n; w++) {
            if (BITS == 8) {
                pairs_of_bytes(codes[w], tile + (i + 4 * w) / 2);
                continue;
            }
            for (int part = 0; part < 8 / BITS; part++) {
                __m512i *pairs = tile + (part * width + i + 4 * w) / 2;
                pairs[0] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes[w], (unsigned)(part * BITS)), table);
                pairs[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes[w], (unsigned)(part * BITS + 8)), table);
            }
        }
    }
}

INLINE AVX512 void turn_exact(const uint8_t *const *rows, int64_t head_dim, __m512i *tile) {
    for (int64_t d = 0; d < head_dim; d += 32) {
        __m512i in[16];
        for (int j = 0; j < TILE; j++)
            in[j] = _mm512_maskz_loadu_epi32(head_dim - d >= 32 ? 0xFFFF : 0xFF, rows[j] + 2 * d);
        transpose16(in, tile + d / 2);
    }
}

/* Rows of codes to rows of bf16, `padded` apart. Full stores may run into what is written next. */
INLINE AVX512 void widen_rows(const int BITS, const int FULL, const uint8_t *const *rows, int64_t n, int64_t head_dim,
                              int64_t padded, __m512i table, uint16_t *out) {
    const int64_t width = head_dim * BITS / 8;
    for (int64_t j = 0; j < n; j++, out += padded)
        for (int64_t i = 0; i < width; i += 32) {
            uint32_t there = FULL || width - i >= 32 ? 0xFFFFFFFF : (1u << (width - i)) - 1;
            __m256i bytes = _mm256_maskz_loadu_epi8(there, rows[j] + i);
            if (BITS == 8) {
                bytes = _mm256_xor_si256(bytes, _mm256_set1_epi8((char)0x80));
                __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
                __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
                _mm512_storeu_si512(out + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
                continue;
            }
            __m512i words = _mm512_cvtepu8_epi16(bytes);
            for (int part = 0; part < 8 / BITS; part++) {
                __m512i wide = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, (unsigned)(part * BITS)), table);
                if (FULL) _mm512_storeu_si512(out + part * width + i, wide);
                else _mm512_mask_storeu_epi16(out + part * width + i, there, wide);
            }
        }
}

static AVX512 void widen(const struct chunk *chunk, struct room *room, int64_t n) {
    const int64_t bits = chunk->values.bits, dim = chunk->head_dim, padded = chunk->padded;
    const uint8_t *const *rows = room->values.rows;
    const __m512i table = code_table(bits);
    const int full = dim * bits / 8 % 32 == 0;
    if (bits == 8) widen_rows(8, 0, rows, n, dim, padded, table, room->wide);
    else if (bits == 4 && full) widen_rows(4, 1, rows, n, dim, padded, table, room->wide);
    else if (bits == 4) widen_rows(4, 0, rows, n, dim, padded, table, room->wide);
    else widen_rows(2, 0, rows, n, dim, padded, table, room->wide);
}

/* scores[r][0 .. 16) = q[r] . k[j] of one turned tile, for NR rows. */
INLINE AVX512 void score_tile(const int NR, const int CODED, const struct chunk *chunk, const struct room *room,
                              int64_t r0, const __m512i *tile, int64_t at) {
    const int64_t padded = chunk->padded, head_dim = chunk->head_dim;
    const int64_t n_scales = CODED ? chunk->keys.n_scales : 1, group = CODED ? chunk->keys.group : head_dim;
    __m512 total[AT_ONCE];
    for (int r = 0; r < NR; r++) total[r] = _mm512_setzero_ps();
    for (int64_t p = 0; p < n_scales; p++) {
        int64_t last = (p + 1) * group < head_dim ? (p + 1) * group : head_dim;
        __m512 even[AT_ONCE], odd[AT_ONCE];
        for (int r = 0; r < NR; r++) even[r] = odd[r] = _mm512_setzero_ps();
        for (int64_t d = p * group; d < last; d += 4) {
            __m512bh first = (__m512bh)tile[d / 2], second = (__m512bh)tile[d / 2 + 1];
            for (int r = 0; r < NR; r++) {
                const uint16_t *q = room->query + (r0 + r) * padded + d;
                even[r] = _mm512_dpbf16_ps(even[r], first, broadcast_pair(q));
                odd[r] = _mm512_dpbf16_ps(odd[r], second, broadcast_pair(q + 2));
            }
        }
        for (int r = 0; r < NR; r++) {
            __m512 product = _mm512_add_ps(even[r], odd[r]);
            if (CODED) {
                __m512 sum = _mm512_set1_ps(room->query_sums[(r0 + r) * MAX_GROUPS + p]);
                total[r] = _mm512_fmadd_ps(product, _mm512_load_ps(room->keys.scale[p] + at), total[r]);
                total[r] = _mm512_fmadd_ps(sum, _mm512_load_ps(room->keys.low[p] + at), total[r]);
            } else {
                total[r] = product;
            }
        }
    }
    float *scores = (float *)room->scores;
    for (int r = 0; r < NR; r++)
        _mm512_store_ps(scores + (r0 + r) * BLOCK + at, _mm512_mul_ps(total[r], _mm512_set1_ps(chunk->scaling)));
}

INLINE AVX512 void score_all(const int CODED, const struct chunk *chunk, const struct room *room, const __m512i *tile,
                             int64_t at) {
    int64_t r = 0;
    for (; r + 8 <= chunk->rows; r += 8) score_tile(8, CODED, chunk, room, r, tile, at);
    for (; r + 4 <= chunk->rows; r += 4) score_tile(4, CODED, chunk, room, r, tile, at);
    for (; r + 3 <= chunk->rows; r += 3) score_tile(3, CODED, chunk, room, r, tile, at);
    for (; r < chunk->rows; r++) score_tile(1, CODED, chunk, room, r, tile, at);
}

INLINE AVX512 void fetch(const uint8_t *const *rows, int64_t at, int64_t n, int64_t row_bytes) {
    for (int64_t j = at; j < at + TILE && j < n; j++)
        for (int64_t i = 0; i < row_bytes; i += 64) _mm_prefetch((const char *)(rows[j] + i), _MM_HINT_T0);
}

static AVX512 void score_block(const struct chunk *chunk, struct room *room, int64_t n) {
    __m512i tile[MAX_DIM / 2];
    const struct source *keys = &chunk->keys, *values = &chunk->values;
    const uint8_t *const *rows = room->keys.rows;
    const __m512i table = code_table(keys->bits);
    for (int64_t j = 0; j < AHEAD * TILE; j += TILE) fetch(rows, j, n, keys->row_bytes);
    for (int64_t j = 0; j < n; j += TILE) {
        fetch(rows, j + AHEAD * TILE, n, keys->row_bytes);
        fetch(room->values.rows, j, n, values->row_bytes);
        if (keys->bits == 0) turn_exact(rows + j, chunk->head_dim, tile);
        else if (keys->bits == 8) turn_codes(8, rows + j, chunk->head_dim, table, tile);
        else if (keys->bits == 4) turn_codes(4, rows + j, chunk->head_dim, table, tile);
        else turn_codes(2, rows + j, chunk->head_dim, table, tile);
        if (keys->bits) score_all(1, chunk, room, tile, j);
        else score_all(0, chunk, room, tile, j);
    }
}

/* Keys of the block at `at` that row r must not see become -inf. */
INLINE AVX512 void hide(const struct chunk *chunk, struct room *room, int64_t r, int64_t at, int64_t n) {
    float *scores = room->scores + r * BLOCK;
    int64_t end = seen_by(chunk, r) - at;
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t j = 0; j < n; j += TILE) {
        __mmask16 hidden = room->hidden[j / TILE];
        if (j + TILE > end) hidden |= _mm512_cmpge_epi32_mask(lanes, _mm512_set1_epi32((int)(end - j)));
        if (hidden) _mm512_mask_store_ps(scores + j, hidden, _mm512_set1_ps(-INFINITY));
    }
}

/* Scores of one block become weights e^(s - max); returns what earlier sums are to be multiplied by. A score that is no
   number makes everything NaN, as it does in arithmetic: the comparisons below would hide it. */
INLINE AVX512 float soften(float *scores, int64_t n, float *max, float *sum) {
    __m512 top = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    __mmask16 strange = 0;
    for (int64_t j = 0; j < n; j += TILE) {
        __m512 s = _mm512_load_ps(scores + j);
        strange |= _mm512_cmp_ps_mask(s, s, _CMP_UNORD_Q);
        top = _mm512_max_ps(top, s);
    }
    float best = _mm512_reduce_max_ps(top);
    if (best < *max) best = *max;
    if (strange || best == -INFINITY) { /* no number; or nothing seen so far, and nothing here */
        for (int64_t j = 0; j < n; j += TILE) _mm512_store_ps(scores + j, _mm512_setzero_ps());
        if (strange) *sum = NAN;
        return strange ? NAN : 1.0f;
    }
    for (int64_t j = 0; j < n; j += TILE) {
        __m512 weight = exp_of(_mm512_sub_ps(_mm512_load_ps(scores + j), _mm512_set1_ps(best)));
        total = _mm512_add_ps(total, weight);
        _mm512_store_ps(scores + j, weight);
    }
    float scale = *max == -INFINITY ? 0.0f : expf(*max - best);
    *sum = *sum * scale + _mm512_reduce_add_ps(total);
    *max = best;
    return scale;
}

/* Weights of NR rows as bf16, by group p of channels of coded values times their scale; `lows`: sums of weight * zero. */
INLINE AVX512 void round_weights(int64_t n_rows, const int CODED, struct room *room, int64_t r0, int64_t p, int64_t n,
                                 float *lows) {
    for (int64_t r = 0; r < n_rows; r++) {
        __m512 low = _mm512_setzero_ps();
        for (int64_t j = 0; j < n; j += TILE) {
            __m512 weight = _mm512_load_ps(room->scores + (r0 + r) * BLOCK + j);
            if (CODED) {
                low = _mm512_fmadd_ps(weight, _mm512_load_ps(room->values.low[p] + j), low);
                weight = _mm512_mul_ps(weight, _mm512_load_ps(room->values.scale[p] + j));
            }
            _mm256_storeu_si256((__m256i *)(room->weights + r * BLOCK + j), (__m256i)_mm512_cvtneps_pbh(weight));
        }
        lows[r] = CODED ? _mm512_reduce_add_ps(low) : 0.0f;
    }
}

/* acc[r][d .. d + 32) = acc * scale[r] + lows[r] + weights[r] @ values, for NR rows. The 32 sums stand in the order in
   which unpacking two rows leaves them, until `put_in_order`. Few rows keep two sums each, of every other pair. */
INLINE AVX512 void weigh(const int NR, const int WIDE, const struct room *room, int64_t first, int64_t d, int64_t head_dim,
                         int64_t n, const float *scale, const float *lows, float *acc, int64_t padded) {
    const int NS = NR <= 4 ? 2 : 1;
    const __mmask32 left = head_dim - d >= 32 ? 0xFFFFFFFF : 0xFFFF;
    __m512 low[2][AT_ONCE], high[2][AT_ONCE];
    for (int r = 0; r < NR; r++) {
        __m512 s = _mm512_set1_ps(scale[r]), more = _mm512_set1_ps(lows[r]);
        low[0][r] = _mm512_fmadd_ps(_mm512_loadu_ps(acc + r * padded), s, more);
        high[0][r] = _mm512_fmadd_ps(_mm512_loadu_ps(acc + r * padded + 16), s, more);
        low[1][r] = high[1][r] = _mm512_setzero_ps();
    }
    for (int64_t j = 0; j < n; j += 2 * NS)
        for (int s = 0; s < NS; s++) {
            const uint16_t *wide = room->wide + (j + 2 * s) * padded;
            const uint8_t *const *rows = room->values.rows + j + 2 * s;
            __m512i v0 = _mm512_maskz_loadu_epi16(left, (WIDE ? wide : (const uint16_t *)rows[0]) + d);
            __m512i v1 = _mm512_maskz_loadu_epi16(left, (WIDE ? wide + padded : (const uint16_t *)rows[1]) + d);
            __m512bh l = (__m512bh)_mm512_unpacklo_epi16(v0, v1), h = (__m512bh)_mm512_unpackhi_epi16(v0, v1);
            for (int r = 0; r < NR; r++) {
                __m512bh w = broadcast_pair(room->weights + (first + r) * BLOCK + j + 2 * s);
                low[s][r] = _mm512_dpbf16_ps(low[s][r], l, w);
                high[s][r] = _mm512_dpbf16_ps(high[s][r], h, w);
            }
        }
    for (int r = 0; r < NR; r++) {
        _mm512_storeu_ps(acc + r * padded, NS == 2 ? _mm512_add_ps(low[0][r], low[1][r]) : low[0][r]);
        _mm512_storeu_ps(acc + r * padded + 16, NS == 2 ? _mm512_add_ps(high[0][r], high[1][r]) : high[0][r]);
    }
}

INLINE AVX512 void weigh_rows(const int WIDE, const struct room *room, int64_t n_rows, int64_t d, int64_t head_dim, int64_t n,
                              const float *scale, const float *lows, float *acc, int64_t padded) {
    int64_t i = 0;
    for (; i + 8 <= n_rows; i += 8) weigh(8, WIDE, room, i, d, head_dim, n, scale + i, lows + i, acc + i * padded, padded);
    for (; i + 4 <= n_rows; i += 4) weigh(4, WIDE, room, i, d, head_dim, n, scale + i, lows + i, acc + i * padded, padded);
    for (; i + 3 <= n_rows; i += 3) weigh(3, WIDE, room, i, d, head_dim, n, scale + i, lows + i, acc + i * padded, padded);
    for (; i < n_rows; i++) weigh(1, WIDE, room, i, d, head_dim, n, scale + i, lows + i, acc + i * padded, padded);
}

INLINE AVX512 void weigh_some(const struct chunk *chunk, struct room *room, int64_t r0, int64_t n_rows, int64_t n,
                              const float *scale) {
    const struct source *source = &chunk->values;
    const int64_t padded = chunk->padded, head_dim = chunk->head_dim;
    const int64_t group = source->bits ? source->group : head_dim, n_scales = source->bits ? source->n_scales : 1;
    float lows[AT_ONCE];
    for (int64_t p = 0; p < n_scales; p++) {
        if (source->bits) round_weights(n_rows, 1, room, r0, p, n, lows);
        else round_weights(n_rows, 0, room, r0, p, n, lows);
        int64_t last = (p + 1) * group < head_dim ? (p + 1) * group : head_dim;
        for (int64_t d = p * group; d < last; d += 32) {
            float *acc = chunk->acc + r0 * padded + d;
            if (source->bits) weigh_rows(1, room, n_rows, d, head_dim, n, scale, lows, acc, padded);
            else weigh_rows(0, room, n_rows, d, head_dim, n, scale, lows, acc, padded);
        }
    }
}

/* unpacklo_epi16 takes the lower four of every eight. */
INLINE AVX512 void put_in_order(float *acc, int64_t n) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int64_t i = 0; i < n; i += 32) {
        __m512 low = _mm512_loadu_ps(acc + i), high = _mm512_loadu_ps(acc + i + 16);
        _mm512_storeu_ps(acc + i, _mm512_permutex2var_ps(low, first, high));
        _mm512_storeu_ps(acc + i + 16, _mm512_permutex2var_ps(low, second, high));
    }
}

/* The queries side by side; for coded keys in the order in which these are paired, with the sum of each group. */
INLINE AVX512 void take_query(const struct chunk *chunk, struct room *room) {
    const int64_t head_dim = chunk->head_dim, group = chunk->keys.group;
    for (int64_t r = 0; r < chunk->rows; r++) {
        const uint16_t *row = query_row(chunk, r);
        uint16_t *query = room->query + r * chunk->padded;
        memcpy(query, row, (size_t)head_dim * sizeof *query);
        if (!chunk->keys.bits) continue;
        for (int64_t d = 0; d < head_dim; d += 4) query[d + 1] = row[d + 2], query[d + 2] = row[d + 1];
        for (int64_t p = 0; p * group < head_dim; p++) {
            float sum = 0.0f;
            for (int64_t d = p * group; d < (p + 1) * group && d < head_dim; d++) sum += from_bf16(row[d]);
            room->query_sums[r * MAX_GROUPS + p] = sum;
        }
    }
}

static AVX512 void avx512_chunk(const struct chunk *chunk) {
    struct room room;
    float scale[AT_ONCE];
    const struct source *keys = &chunk->keys, *values = &chunk->values;
    take_query(chunk, &room);
    for (int64_t i = 0; i < chunk->rows * chunk->padded; i++) chunk->acc[i] = 0.0f;
    for (int64_t r = 0; r < chunk->rows; r++) chunk->max[r] = -INFINITY, chunk->sum[r] = 0.0f;
    for (int64_t at = chunk->begin; at < chunk->end; at += BLOCK) {
        int64_t n = chunk->end - at < BLOCK ? (chunk->end - at + TILE - 1) / TILE * TILE : BLOCK;
        find_places(chunk, at, n, &room);
        find_rows(chunk, &room, keys, keys->rows, keys->row_bytes, at, n, room.keys.rows);
        find_rows(chunk, &room, values, values->rows, values->row_bytes, at, n, room.values.rows);
        if (keys->bits) spread_scales(chunk, &room, keys, at, n, &room.keys);
        if (values->bits) spread_scales(chunk, &room, values, at, n, &room.values);
        score_block(chunk, &room, n);
        if (values->bits) widen(chunk, &room, n);
        for (int64_t r = 0; r < chunk->rows; r += AT_ONCE) {
            int64_t n_rows = chunk->rows - r < AT_ONCE ? chunk->rows - r : AT_ONCE;
            for (int64_t i = 0; i < n_rows; i++) {
                hide(chunk, &room, r + i, at, n);
                scale[i] = soften(room.scores + (r + i) * BLOCK, n, chunk->max + r + i, chunk->sum + r + i);
            }
            weigh_some(chunk, &room, r, n_rows, n, scale);
        }
    }
    put_in_order(chunk->acc, chunk->rows * chunk->padded);
}

#endif
#endif
