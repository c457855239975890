/* Attention of at most FEW_ROWS rows of a group (a decoding session): bound by reading keys and values once.

   A key's score is a product along its own row; sixteen of them are summed together, so keys are never transposed. */
#include "attention_inline.h"

#if HAVE_X86

enum { SPAN = 64, AHEAD = 64 };

struct few_work {
    const uint16_t *query[FEW_ROWS];
    int64_t first[FEW_ROWS], last[FEW_ROWS]; /* keys that a row sees */
    float scores[FEW_ROWS][SPAN];
    uint16_t weights[FEW_ROWS][SPAN];
    float scale[FEW_ROWS];
};

/* Lane j is q . k[j]. */
INLINE AVX512 __m512 score_tile(const uint16_t *q, const uint16_t *keys, int64_t head_dim) {
    __m512 acc[16];
    for (int j = 0; j < TILE; j++) { /* row by row: as they lie in memory */
        acc[j] = _mm512_setzero_ps();
        for (int64_t d = 0; d < head_dim; d += 32)
            acc[j] = _mm512_dpbf16_ps(acc[j], (__m512bh)_mm512_loadu_si512(keys + j * head_dim + d),
                                      (__m512bh)_mm512_loadu_si512(q + d));
    }
    return sum_lanes(acc);
}

/* Lanes whose key, at + lane, lies outside [low, high], become -inf. */
INLINE AVX512 __m512 hide(__m512 scores, int64_t at, int64_t low, int64_t high) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i key = _mm512_add_epi32(_mm512_set1_epi32((int)at), lane);
    __mmask16 hidden = _mm512_cmplt_epi32_mask(key, _mm512_set1_epi32((int)low)) |
                       _mm512_cmpgt_epi32_mask(key, _mm512_set1_epi32((int)high));
    return _mm512_mask_mov_ps(scores, hidden, _mm512_set1_ps(-INFINITY));
}

/* Scores of a span become bf16 weights 2^(s - max); returns what earlier sums are to be multiplied by. */
INLINE AVX512 float soften(const float *scores, int64_t n, uint16_t *weights, float *max, float *sum) {
    __m512 top = _mm512_set1_ps(*max), total = _mm512_setzero_ps();
    for (int64_t j = 0; j < n; j += 16) top = _mm512_max_ps(_mm512_loadu_ps(scores + j), top);
    float best = _mm512_reduce_max_ps(top);
    for (int64_t j = 0; j < n; j += 16) {
        __m512 weight = exp2_16(_mm512_sub_ps(_mm512_loadu_ps(scores + j), _mm512_set1_ps(best)));
        total = _mm512_add_ps(total, weight);
        _mm256_storeu_si256((__m256i *)(weights + j), (__m256i)_mm512_cvtneps_pbh(weight));
    }
    float scale = power_of_two(*max - best);
    *sum = *sum * scale + _mm512_reduce_add_ps(total);
    *max = best;
    return scale;
}

/* acc[r][0 .. 32 * ND) = acc * scale[r] + weights[r] @ values, for NR rows. */
INLINE AVX512 void weigh(const int NR, const int ND, const struct few_work *work, int64_t first, const uint16_t *values,
                         int64_t head_dim, int64_t n, float *acc) {
    __m512 sum[4][4];
    for (int r = 0; r < NR; r++)
        for (int d = 0; d < 2 * ND; d++)
            sum[r][d] = _mm512_mul_ps(_mm512_loadu_ps(acc + r * head_dim + 16 * d), _mm512_set1_ps(work->scale[first + r]));
    for (int64_t j = 0; j < n; j += 2) {
        __m512i v[4];
        for (int d = 0; d < ND; d++)
            interleave(_mm512_loadu_si512(values + j * head_dim + 32 * d),
                       _mm512_loadu_si512(values + (j + 1) * head_dim + 32 * d), v + 2 * d, v + 2 * d + 1);
        for (int r = 0; r < NR; r++) {
            __m512bh w = broadcast_pair(work->weights[first + r] + j);
            for (int d = 0; d < 2 * ND; d++) sum[r][d] = _mm512_dpbf16_ps(sum[r][d], (__m512bh)v[d], w);
        }
    }
    for (int r = 0; r < NR; r++)
        for (int d = 0; d < 2 * ND; d++) _mm512_storeu_ps(acc + r * head_dim + 16 * d, sum[r][d]);
}

INLINE AVX512 void weigh_rows(const int NR, const struct few_work *work, int64_t first, const uint16_t *values,
                              int64_t head_dim, int64_t n, float *acc) {
    int64_t d = 0;
    acc += first * head_dim;
    for (; d + 64 <= head_dim; d += 64) weigh(NR, 2, work, first, values + d, head_dim, n, acc + d);
    for (; d < head_dim; d += 32) weigh(NR, 1, work, first, values + d, head_dim, n, acc + d);
}

/* The same for all rows: at most four together, or as many registers would not do. */
INLINE AVX512 void weigh_all(const struct few_work *work, int64_t rows, const uint16_t *values, int64_t head_dim,
                             int64_t n, float *acc) {
    int64_t half = rows > 4 ? (rows + 1) / 2 : rows;
    for (int64_t r = 0; r < rows; r += half) {
        int64_t together = least(half, rows - r);
        if (together == 4) weigh_rows(4, work, r, values, head_dim, n, acc);
        else if (together == 3) weigh_rows(3, work, r, values, head_dim, n, acc);
        else if (together == 2) weigh_rows(2, work, r, values, head_dim, n, acc);
        else weigh_rows(1, work, r, values, head_dim, n, acc);
    }
}

/* Scores of keys [at, at + n) for all rows, as logarithms to base 2 of weights. */
INLINE AVX512 void score_span(const int64_t head_dim, const struct attention_piece *piece, struct few_work *work, int64_t at,
                              int64_t n) {
    const int64_t rows = piece->n_rows;
    const __m512 scaling = _mm512_set1_ps(piece->shape->scaling * LOG2_E);
    const uint16_t *keys = piece->keys + at * head_dim, *values = piece->values + at * head_dim;
    for (int64_t j = 0; j < n; j += TILE) {
        fetch(values + j * head_dim, TILE * head_dim);
        if (at + j + AHEAD < piece->end) fetch(keys + (j + AHEAD) * head_dim, TILE * head_dim);
        for (int64_t r = 0; r < rows; r++) {
            __m512 scores = _mm512_mul_ps(score_tile(work->query[r], keys + j * head_dim, head_dim), scaling);
            if (work->first[r] > at + j || work->last[r] < at + j + TILE - 1)
                scores = hide(scores, at + j, work->first[r], work->last[r]);
            _mm512_storeu_ps(work->scores[r] + j, scores);
        }
    }
}

INLINE AVX512 void attend(const int64_t head_dim, const struct attention_piece *piece) {
    const int64_t rows = piece->n_rows;
    float *acc = piece->state, *max = acc + rows * head_dim, *sum = max + rows;
    struct few_work work;
    for (int64_t i = 0; i < rows * head_dim; i++) acc[i] = 0.0f;
    for (int64_t r = 0; r < rows; r++) {
        max[r] = NO_SCORE, sum[r] = 0.0f;
        work.query[r] = query_of(piece, r);
        work.first[r] = first_key(piece, r), work.last[r] = last_key(piece, r);
    }
    /* Later keys are asked for while earlier ones are scored, these by nobody else. */
    fetch(piece->keys + piece->begin * head_dim, least(AHEAD, piece->end - piece->begin) * head_dim);
    for (int64_t at = piece->begin; at < piece->end; at += SPAN) {
        int64_t n = least((piece->end - at + TILE - 1) / TILE * TILE, SPAN);
        score_span(head_dim, piece, &work, at, n);
        for (int64_t i = 0; i < rows; i++)
            work.scale[i] = soften(work.scores[i], n, work.weights[i], max + i, sum + i);
        weigh_all(&work, rows, piece->values + at * head_dim, head_dim, n, acc);
    }
}

/* The usual sizes of heads are constants to the compiler. */
AVX512 void attention_few(const struct attention_piece *piece) {
    if (piece->shape->head_dim == 64) attend(64, piece);
    else if (piece->shape->head_dim == 128) attend(128, piece);
    else attend(piece->shape->head_dim, piece);
}
#endif
