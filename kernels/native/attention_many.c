/* Attention of a block of many rows (a prefill cell): bound by vdpbf16ps.

   Sixteen rows are the lanes of a vector, in scores [key][16 rows] as in sums [dimension][16 rows] (flash attention,
   Dao et al. 2022, turned): keys are taken as they lie, a pair of dimensions at a time, values in pairs of keys, and
   softmax needs no sum across lanes. */
#include "attention_inline.h"

#if HAVE_X86

enum { KEYS = 64, VECTORS = BLOCK_ROWS / 16, TOGETHER = 3 };

struct many_work {
    __m512i query[VECTORS][MAX_DIM / 2];
    __m512 sums[VECTORS][MAX_DIM];
    __m512 scores[TOGETHER][KEYS];
    __m512i weights[TOGETHER][KEYS / 2];
    uint32_t values[KEYS / 2 * MAX_DIM]; /* [KEYS / 2][head_dim], of two keys */
    __m512 max[VECTORS], sum[VECTORS], scale[TOGETHER];
    __m512i first[VECTORS], last[VECTORS]; /* keys that a row sees */
};

static AVX512 void pack_query(const struct attention_piece *piece, struct many_work *work) {
    const int64_t head_dim = piece->shape->head_dim, rows = piece->n_rows;
    for (int64_t v = 0; v * 16 < rows; v++)
        for (int64_t d = 0; d < head_dim; d += 32) {
            __m512i lines[16];
            for (int i = 0; i < 16; i++) { /* lanes without a row repeat the last one */
                int64_t r = least(16 * v + i, rows - 1);
                lines[i] = _mm512_loadu_si512(query_of(piece, r) + d);
            }
            transpose16(lines, work->query[v] + d / 2);
        }
}

static AVX512 void begin(const struct attention_piece *piece, struct many_work *work) {
    for (int64_t v = 0; v * 16 < piece->n_rows; v++) {
        int32_t first[16], last[16];
        for (int i = 0; i < 16; i++) {
            int64_t r = least(16 * v + i, piece->n_rows - 1);
            first[i] = (int32_t)first_key(piece, r), last[i] = (int32_t)last_key(piece, r);
        }
        work->first[v] = _mm512_loadu_si512(first), work->last[v] = _mm512_loadu_si512(last);
        work->max[v] = _mm512_set1_ps(NO_SCORE), work->sum[v] = _mm512_setzero_ps();
        for (int64_t d = 0; d < piece->shape->head_dim; d++) work->sums[v][d] = _mm512_setzero_ps();
    }
}

INLINE AVX512 void pack_values(const uint16_t *values, int64_t head_dim, int64_t n, struct many_work *work) {
    for (int64_t j = 0; j < n; j += 2)
        for (int64_t d = 0; d < head_dim; d += 32) {
            __m512i low, high;
            interleave(_mm512_loadu_si512(values + j * head_dim + d),
                       _mm512_loadu_si512(values + (j + 1) * head_dim + d), &low, &high);
            _mm512_store_si512(work->values + j / 2 * head_dim + d, low);
            _mm512_store_si512(work->values + j / 2 * head_dim + d + 16, high);
        }
}

/* Scores of NK keys for NV vectors of rows. */
INLINE AVX512 void score(const int NV, const int NK, struct many_work *work, int64_t v, const uint16_t *keys,
                         int64_t head_dim, int64_t j, __m512 scaling) {
    __m512 acc[TOGETHER][16];
    for (int i = 0; i < NV; i++)
        for (int k = 0; k < NK; k++) acc[i][k] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < head_dim / 2; pair++) {
        __m512bh rows[TOGETHER];
        for (int i = 0; i < NV; i++) rows[i] = (__m512bh)work->query[v + i][pair];
        for (int k = 0; k < NK; k++) {
            __m512bh key = broadcast_pair(keys + (j + k) * head_dim + 2 * pair);
            for (int i = 0; i < NV; i++) acc[i][k] = _mm512_dpbf16_ps(acc[i][k], rows[i], key);
        }
    }
    for (int i = 0; i < NV; i++)
        for (int k = 0; k < NK; k++) work->scores[i][j + k] = _mm512_mul_ps(acc[i][k], scaling);
}

/* Scores of keys [at, at + n) that a row must not see become -inf. */
INLINE AVX512 void hide(__m512 *scores, __m512i first, __m512i last, int64_t at, int64_t n) {
    for (int64_t j = 0; j < n; j++) {
        __m512i key = _mm512_set1_epi32((int)(at + j));
        __mmask16 hidden = _mm512_cmplt_epi32_mask(key, first) | _mm512_cmpgt_epi32_mask(key, last);
        scores[j] = _mm512_mask_mov_ps(scores[j], hidden, _mm512_set1_ps(-INFINITY));
    }
}

/* Scores become weights 2^(s - max), in pairs of bf16; returns what earlier sums are to be multiplied by. */
INLINE AVX512 __m512 soften(const __m512 *scores, int64_t n, __m512i *weights, __m512 *max, __m512 *sum) {
    const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512 top[2] = {*max, *max}, total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t j = 0; j < n; j += 2)
        for (int i = 0; i < 2; i++) top[i] = _mm512_max_ps(scores[j + i], top[i]); /* NaN leaves the maximum alone */
    __m512 best = _mm512_max_ps(top[0], top[1]);
    for (int64_t j = 0; j < n; j += 2) {
        __m512 even = exp2_16(_mm512_sub_ps(scores[j], best)), odd = exp2_16(_mm512_sub_ps(scores[j + 1], best));
        total[0] = _mm512_add_ps(total[0], even), total[1] = _mm512_add_ps(total[1], odd);
        weights[j / 2] = _mm512_permutexvar_epi16(pairs, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
    }
    __m512 scale = exp2_16(_mm512_sub_ps(*max, best));
    *sum = _mm512_fmadd_ps(*sum, scale, _mm512_add_ps(total[0], total[1]));
    *max = best;
    return scale;
}

/* sums[d .. d + ND) = sums * scale + values @ weights for NV vectors of rows. */
INLINE AVX512 void weigh(const int NV, const int ND, struct many_work *work, int64_t v, int64_t head_dim, int64_t d, int64_t n) {
    __m512 acc[TOGETHER][16];
    for (int i = 0; i < NV; i++)
        for (int k = 0; k < ND; k++) acc[i][k] = _mm512_mul_ps(work->sums[v + i][d + k], work->scale[i]);
    for (int64_t pair = 0; pair < n / 2; pair++) {
        __m512bh rows[TOGETHER];
        for (int i = 0; i < NV; i++) rows[i] = (__m512bh)work->weights[i][pair];
        for (int k = 0; k < ND; k++) {
            __m512bh value = broadcast_pair(work->values + pair * head_dim + d + k);
            for (int i = 0; i < NV; i++) acc[i][k] = _mm512_dpbf16_ps(acc[i][k], rows[i], value);
        }
    }
    for (int i = 0; i < NV; i++)
        for (int k = 0; k < ND; k++) work->sums[v + i][d + k] = acc[i][k];
}

/* NV vectors of rows from v on over keys [at, at + n), whose values are packed. */
INLINE AVX512 void attend(const int NV, const struct attention_piece *piece, struct many_work *work, int64_t v, int64_t at,
                          int64_t n) {
    const int NK = NV == 1 ? 16 : 8;
    const int64_t head_dim = piece->shape->head_dim, last_row = least(16 * (v + NV), piece->n_rows) - 1;
    if (at > last_key(piece, last_row) || at + n <= first_key(piece, 16 * v)) return;
    n = least(n, (last_key(piece, last_row) - at) / TILE * TILE + TILE);
    const uint16_t *keys = piece->keys + at * head_dim;
    const __m512 scaling = _mm512_set1_ps(piece->shape->scaling * LOG2_E);
    for (int64_t j = 0; j < n; j += NK) {
        if (v == 0) { /* the next tile, while there is much to compute */
            fetch(keys + (j + KEYS) * head_dim, NK * head_dim);
            fetch(piece->values + (at + j + KEYS) * head_dim, NK * head_dim);
        }
        score(NV, NK, work, v, keys, head_dim, j, scaling);
    }
    int open = at + n - 1 <= last_key(piece, 16 * v) && at >= first_key(piece, last_row);
    for (int i = 0; i < NV; i++) {
        if (!open) hide(work->scores[i], work->first[v + i], work->last[v + i], at, n);
        work->scale[i] = soften(work->scores[i], n, work->weights[i], work->max + v + i, work->sum + v + i);
    }
    for (int64_t d = 0; d < head_dim; d += NK) weigh(NV, NK, work, v, head_dim, d, n);
}

static AVX512 void store_state(const struct attention_piece *piece, struct many_work *work) {
    const int64_t head_dim = piece->shape->head_dim, rows = piece->n_rows;
    float *max = piece->state + rows * head_dim, *sum = max + rows;
    for (int64_t v = 0; v * 16 < rows; v++) {
        int64_t n = least(16, rows - 16 * v);
        __mmask16 held = (__mmask16)((1u << n) - 1);
        _mm512_mask_storeu_ps(max + 16 * v, held, work->max[v]);
        _mm512_mask_storeu_ps(sum + 16 * v, held, work->sum[v]);
        for (int64_t d = 0; d < head_dim; d += 16) {
            __m512i columns[16], lines[16];
            for (int i = 0; i < 16; i++) columns[i] = (__m512i)work->sums[v][d + i];
            transpose16(columns, lines);
            for (int64_t i = 0; i < n; i++) _mm512_storeu_si512(piece->state + (16 * v + i) * head_dim + d, lines[i]);
        }
    }
}

AVX512 void attention_many(const struct attention_piece *piece) {
    struct many_work work;
    const int64_t head_dim = piece->shape->head_dim, n_vectors = (piece->n_rows + 15) / 16;
    pack_query(piece, &work);
    begin(piece, &work);
    for (int64_t at = piece->begin; at < piece->end; at += KEYS) {
        int64_t n = least((piece->end - at + TILE - 1) / TILE * TILE, KEYS), v = 0;
        pack_values(piece->values + at * head_dim, head_dim, n, &work);
        for (; v + 3 <= n_vectors; v += 3) attend(3, piece, &work, v, at, n);
        if (v + 2 <= n_vectors) attend(2, piece, &work, v, at, n), v += 2;
        if (v < n_vectors) attend(1, piece, &work, v, at, n);
    }
    store_state(piece, &work);
}
#endif
